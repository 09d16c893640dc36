"""What `compare` and `search` find: the data classes. Field names are the keys of report.json.

`study/verdict.py` fills them in from the runs and says in words what the numbers show, and
`tailora/report` shows both. Losses are those of held-out examples; half of these choose settings, the other half judge
what was chosen (`study/trial.py`). `loss_unit`: what they are measured in; earlier versions had language models alone.
Needs no torch.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from tailora.evaluation.statistics import Difference
from tailora.train.config import NATS_PER_TOKEN

# ---- compare


@dataclass(frozen=True)
class ArmResult:
    """One arm of a comparison. An arm that could not be trained has an outcome other than 'done', and no numbers.

    rates: learning rate -> loss on the choosing examples, None for a run that failed.
    bracketed: whether a lower and a higher learning rate than the best were tried.
    difference: from the reference arm; None for the reference itself.
    seconds: of training, mean over the seeds.    bytes: on disk.
    forgetting: mean over the seeds; None where it was not measured or is not finite.
    accuracy, accuracy_interval: share of right labels, or of pairs of replies in the right order, for such tasks.
    accuracy_difference: from the reference arm.
    seed_losses: of each seed, with the mean eval_loss.    train_losses: of each seed and step, before the step.
    runs: folders.
    """

    name: str
    changes: dict[str, Any]
    outcome: str
    learning_rate: float | None = None
    rates: dict[float, float | None] = field(default_factory=dict)
    bracketed: bool = False
    eval_loss: float | None = None
    interval: tuple[float, float] | None = None
    difference: Difference | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    trainable_parameters: int | None = None
    bytes: int | None = None
    forgetting: dict[str, float] | None = None
    accuracy: float | None = None
    accuracy_interval: tuple[float, float] | None = None
    accuracy_difference: Difference | None = None
    seed_losses: list[float] = field(default_factory=list)
    train_losses: list[list[float]] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """base_loss: before training, on the judging examples.
    p_values: arm -> p of no difference from the reference, adjusted for the number of arms as the intervals are.
    p_value: of the arm that the verdict is about.
    """

    arms: list[ArmResult]
    reference: str
    base_loss: float
    steps: int
    seeds: list[int]
    judged_examples: int
    verdict: str
    p_value: float | None
    p_values: dict[str, float]
    notes: list[str]
    settings: dict[str, Any]
    seconds: float
    loss_unit: str = NATS_PER_TOKEN

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# ---- search


@dataclass(frozen=True)
class Candidate:
    """One trial of a search.

    state: done, pruned, diverged, or out of memory.    settings: those that the search varies.
    eval_loss: on the choosing examples; of a pruned trial at its last evaluation.
    curve: (step, loss on the choosing examples).    message: why the trial ended early.
    """

    number: int
    state: str
    settings: dict[str, Any]
    eval_loss: float | None = None
    trainable_parameters: int | None = None
    seconds: float | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    message: str = ""


@dataclass(frozen=True)
class Finalist:
    """A trial whose settings were run again with several seeds, and judged on the judging examples.

    choosing_loss: of the trial, on the choosing examples.
    difference: from the best; None for the best itself.
    p_value: of no difference, adjusted for the number of finalists.
    seconds: of training, mean over the seeds.    runs: folders.
    """

    number: int
    settings: dict[str, Any]
    trainable_parameters: int
    choosing_loss: float
    eval_loss: float
    interval: tuple[float, float]
    difference: Difference | None
    p_value: float | None
    seconds: float
    peak_memory_bytes: int
    runs: list[str]


@dataclass(frozen=True)
class SearchResult:
    """best, cheapest: of the finalists, which come with the best first.
    importances: share of each setting in being among the best quarter of the trials (PED-ANOVA); they sum to 1.
    base_loss: before training, on the judging examples.    steps: of a whole trial.
    seconds: of all trials and runs, in all processes.    config: path of best.yaml.
    """

    best: Finalist
    cheapest: Finalist
    finalists: list[Finalist]
    trials: list[Candidate]
    importances: dict[str, float]
    verdict: str
    base_loss: float
    steps: int
    seeds: list[int]
    judged_examples: int
    notes: list[str]
    settings: dict[str, Any]
    seconds: float
    config: str
    loss_unit: str = NATS_PER_TOKEN

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
