"""What a search comes back with, and what is said beside its verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from tailora.formats.io import write_file
from tailora.study.budget import Plan
from tailora.study.judging import Candidate, Finalist
from tailora.study.search_space import Axis, at_edge
from tailora.train.config import TrainConfig

FEW = 20  # held-out examples


@dataclass(frozen=True)
class Found:
    best: Finalist
    cheapest: Finalist
    finalists: list[Finalist]
    trials: list[Candidate]
    importances: dict[str, float]  # of each setting for being among the best quarter (PED-ANOVA); sum 1
    verdict: str
    base_loss: float  # before training, on the judging half
    steps: int  # of a whole trial
    seeds: list[int]
    judged_examples: int
    notes: list[str]
    settings: dict[str, Any]
    seconds: float  # of all trials and the runs that judge, whoever made them
    config: str  # best.yaml

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def write_config(path: Path, train: TrainConfig, changes: Mapping[str, Any]) -> Path:
    """What `tailora train --config` takes: the run's settings with the chosen ones, in a folder beside the file."""
    own = train.model_dump(exclude_unset=True, exclude={"resume_from_checkpoint"})
    values = {**own, **changes, "output_dir": str(path.with_suffix(""))}
    TrainConfig(**values)
    write_file(path, yaml.safe_dump(values, sort_keys=False).encode())
    return path


def remarks(
    plan: Plan,
    axes: Mapping[str, Axis],
    candidates: Sequence[Candidate],
    best: Finalist,
    importances: Mapping[str, float],
    judged: int,
) -> list[str]:
    """What limits the verdict. judged: held-out examples that judge."""
    edges = [name for name, value in best.settings.items() if at_edge(axes[name], value)]
    rules = {
        f"{', '.join(edges)} of the best lies at the edge of its space: a wider one may hold better": edges,
        f"trials had {plan.steps:,} of the {plan.longest:,} steps that the settings ask for; in longer runs a "
        "lower learning rate and a higher rank may be better": plan.steps < plan.longest,
        f"{len(candidates)} trials are too few to say which settings matter": not importances,
        f"{judged} held-out examples judge: more, by --eval-data or --validation-split, would tell finer": judged < FEW,
    }
    return [text for text, holds in rules.items() if holds]


def described(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )
