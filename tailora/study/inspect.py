"""What an adapter has learned, where, and what follows: its singular values, beside the base's weights and on data.

files -> updates -> modules                     ranks, energy, learned scales
with the base's weights                         relative norms, intruder dimensions
with held-out data                              what the smaller singular values are worth; forgetting
-> rules -> advice
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailora.errors import ConfigError
from tailora.evaluation.spectral import ModuleReport, Update, examine, updates_alone, with_shares
from tailora.formats.io import write_file
from tailora.formats.offline import read_alone
from tailora.formats.run_folder import adapter_in, recorded_settings
from tailora.report import report_if_possible
from tailora.study.advice import advise
from tailora.study.model_layout import group_of, in_order, layers_of
from tailora.study.pair import Pair, overlaps
from tailora.study.rule import Advice

if TYPE_CHECKING:
    from tailora.study.tails import Dial, HeldOut

REPORT = "report.json"
NAME = "default"
RECORDED = ("model", "data", "learning_rate", "num_train_epochs", "max_steps", "seed")

Say = Callable[[str], None]
Progress = Callable[[int, int], None]  # module, of modules


@dataclass(frozen=True)
class Inspection:
    """layers: of the model as far as the adapter names them.    left_out: what is no update, and why.
    training: what the run beside the adapter recorded of its settings, {} without one.
    forgetting: KL from the base and loss on other text (`measure.forgetting`).    dial: measured where a rule asked.
    pair: beside another adapter.
    """

    adapter: str
    model: str | None
    named_base: str | None
    base_dtype: str | None
    config: dict[str, Any]
    training: dict[str, Any]
    layers: int
    modules: list[ModuleReport]
    left_out: dict[str, str]
    held_out: HeldOut | None = None
    forgetting: dict[str, Any] | None = None
    dial: list[Dial] = field(default_factory=list)
    pair: Pair | None = None
    advice: list[Advice] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `group` and `use` (effective rank / rank) of every module with them."""
        content = asdict(self)
        for values, module in zip(content["modules"], self.modules, strict=True):
            values |= {"group": group_of(module.path, self.layers), "use": module.use}
        return content


@dataclass(frozen=True)
class Asked:
    """What else is measured where there is a model. Paths and names are those of the command line.

    data: held-out data, or 'demo'.    field, max_length: as in training.
    forgetting_data: texts of other tasks; without it what the base writes by itself.
    intruders: whether they are counted, by far the slowest part.    seed: of the random updates and of the texts.
    """

    data: str | None = None
    field: dict[str, str] = field(default_factory=dict)
    max_length: int = 1024
    forgetting_data: str | None = None
    intruders: bool = True
    seed: int = 0


def inspect(
    adapter: str | Path,
    model: str | None = None,
    data: str | None = None,
    *,
    other: str | Path | None = None,
    asked: Asked | None = None,
    quantize: str | None = None,
    say: Say = lambda _: None,
    progress: Progress = lambda *_: None,
) -> Inspection:
    """Look at an adapter's files, beside the base `model` (folder, Hub id, 'demo') and on held-out `data` where given.

    adapter: a folder of tailora, PEFT or mlx-lm, a run's folder, or with `model` any file that `load_adapter` reads.
    other: a second one for the same base, to be compared with.
    Nothing is written and nothing is trained. Raises ConfigError, FormatError, BaseMismatchError, DataError.
    """
    asked = replace(asked or Asked(), data=data)
    folder, second = adapter_in(Path(adapter)), None if other is None else adapter_in(Path(other))
    if model is None:
        return _alone(folder, second, asked)
    from tailora.study.within import loaded  # transformers from here on

    found = loaded(folder, second, model, asked, quantize, say, progress)
    found = replace(found, adapter=str(folder), model=model, training=_training(folder))
    return replace(found, advice=advise(found))


def _alone(folder: Path, other: Path | None, asked: Asked) -> Inspection:
    started = time.perf_counter()
    alone = read_alone(folder)
    if asked.data is not None:
        named = f", such as {alone.base}, which the adapter names" if alone.base else ""
        raise ConfigError(f"data {asked.data!r} needs a model to be read by: give --model{named}")
    updates = updates_alone(alone)
    found = Inspection(
        adapter=str(folder),
        model=None,
        named_base=alone.base,
        base_dtype=None,
        config=alone.config.model_dump(),
        training=_training(folder),
        layers=layers_of(updates),
        modules=examined(updates, asked, lambda *_: None),
        left_out=alone.left_out,
        pair=None if other is None else overlaps(str(other), updates, updates_alone(read_alone(other))),
    )
    return replace(found, advice=advise(found), seconds=time.perf_counter() - started)


def examined(updates: Mapping[str, Update], asked: Asked, progress: Progress) -> list[ModuleReport]:
    """In the order of the layers."""
    reports = []
    for number, path in enumerate(in_order(updates), 1):
        reports.append(examine(updates[path], seed=asked.seed + number, look_for_intruders=asked.intruders))
        progress(number, len(updates))
    return with_shares(reports)


def _training(folder: Path) -> dict[str, Any]:
    settings = recorded_settings(folder)
    return {name: settings[name] for name in RECORDED if settings.get(name) is not None}


def write_report(found: Inspection, folder: Path) -> Path:
    """report.json, with all that was found, and report.html where the packages for it are. Raises WriteError."""
    text = json.dumps({"kind": "inspect", **found.to_dict()}, indent=1, allow_nan=False)
    write_file(folder / REPORT, text.encode())
    return report_if_possible(folder) or folder / REPORT
