"""One run in a process of its own: its peak of memory is its own, and what ends it ends nothing else.

    parent: trial.json there? -> that; else spec.json -> `python -m tailora.study.trial FOLDER` -> progress, trial.json

A trial that diverges or does not fit is a result, not an error: both say something about its settings.
"""

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailora import errors
from tailora.errors import ConfigError, DivergedError, MemoryLimitError, TailoraError
from tailora.formats.io import write_file
from tailora.train import subprocess_worker
from tailora.train.config import TrainConfig, without_removed

# ---- The held-out examples in two halves: one chooses settings, the other judges what was chosen.


Places = NDArray[np.int64]


def halves(count: int) -> tuple[Places, Places]:
    """Places of the choosing and of the judging examples, always the same for a count. Raises ConfigError below 4."""
    if count < 4:
        there = "1 held-out example is" if count == 1 else f"{count} held-out examples are"
        raise ConfigError(
            f"{there} too few: one half chooses settings, the other judges. Hold out at least 4, better 100: "
            "--eval-data FILE, or a larger --validation-split"
        )
    shuffled = np.random.default_rng(0).permutation(count)
    return np.sort(shuffled[: count // 2]), np.sort(shuffled[count // 2 :])


def choosing_half(count: int) -> Places:
    return halves(count)[0]


def judging_half(count: int) -> Places:
    return halves(count)[1]


# ----


PRUNED, OUT_OF_MEMORY = "pruned", "out of memory"
SPEC, RESULT, RUN = "spec.json", "trial.json", "run"
OUTCOMES = {DivergedError: "diverged", MemoryLimitError: OUT_OF_MEMORY}

Progress = Callable[[int, int, float], None]  # step, of steps, loss
Base = tuple[list[float], list[int]]  # nats by the base, and learned tokens, of each held-out example
SHARED = ("before", "texts")  # of a spec: what trials tell each other, no settings


@dataclass(frozen=True)
class Told:
    """What a trial says of itself while it runs, a line of JSON each."""

    step: int
    steps: int
    loss: float  # nats per token, of the step's examples or the held-out ones
    held_out: bool
    parameters: int  # trained
    seconds: float  # of the step or the evaluation


Judge = Callable[[Told], str | None]  # why the trial is to end now; None to go on


@dataclass(frozen=True)
class Spec:
    """What a trial does. `forgetting`: None for not measured, '' for the base's own texts, or a file of texts."""

    settings: dict[str, Any]  # of TrainConfig, output_dir left out
    forgetting: str | None = None
    keep: bool = True  # what was trained; a fully trained model is large
    choosing: bool = False  # evaluate the half of the held-out examples that chooses, and no more
    rising: tuple[float, float] | None = None  # learning rates from, to, in place of the schedule
    describe: bool = False  # say which parts the model has
    before: Base | None = None  # of the held-out examples, where another trial has it
    texts: str | None = None  # file of what the base wrote, for all trials of a study; the first one writes it


@dataclass(frozen=True)
class Trial:
    """What came out. Without an outcome of `done` the numbers are missing."""

    outcome: str  # done, diverged, out of memory, or pruned: ended by who listened
    message: str
    numbers: dict[str, Any]  # of TrainResult; seed, parts of the model, examples to train on, seconds of forgetting
    sums: list[float]  # nats of each held-out example, afterwards
    before: list[float]  # likewise by the base
    counts: list[int]  # learned tokens of each
    forgetting: dict[str, Any] | None
    bytes: int  # on disk, of what was trained
    losses: list[float] = field(default_factory=list)  # of each step's examples, before it
    curve: list[tuple[int, float]] = field(default_factory=list)  # step, held-out loss
    parameters: int = 0  # trained; 0 when it ended before that was known
    step_seconds: list[float] = field(default_factory=list)
    evaluation_seconds: list[float] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.outcome == "done"

    def loss(self, part: NDArray[np.int64] | None = None) -> float:
        """Held-out nats per token, over a part of the examples; infinite unless done."""
        if not self.done:
            return math.inf
        sums, counts = np.array(self.sums), np.array(self.counts)
        chosen = slice(None) if part is None else part
        return float(sums[chosen].sum() / counts[chosen].sum())

    @property
    def base(self) -> Base | None:
        """For other trials of the same base and held-out examples. None unless done."""
        return (self.before, self.counts) if self.done else None


def choosing_part(base: Base | None) -> Base | None:
    """Of all held-out examples, those that choose."""
    if base is None:
        return None
    places = choosing_half(len(base[0]))
    return [base[0][place] for place in places], [base[1][place] for place in places]


class Heard:
    """What was told, gathered on either side of the pipe."""

    def __init__(self, before: Base | None) -> None:
        self.told: list[Told] = []
        self.start = [] if before is None else [(0, float(np.sum(before[0]) / np.sum(before[1])))]

    def trial(self, outcome: str, message: str, **more: Any) -> Trial:
        held_out = [told for told in self.told if told.held_out]
        nothing: dict[str, Any] = {"numbers": {}, "sums": [], "before": [], "counts": [], "forgetting": None}
        return Trial(
            outcome,
            message,
            **{**nothing, "bytes": 0, **more},
            losses=[told.loss for told in self.told if not told.held_out],
            curve=[*self.start, *((told.step, told.loss) for told in held_out)],
            parameters=self.told[0].parameters if self.told else 0,
            step_seconds=[told.seconds for told in self.told if not told.held_out],
            evaluation_seconds=[told.seconds for told in held_out],
        )


def try_out(spec: Spec, folder: Path, progress: Progress | None = None, judge: Judge | None = None) -> Trial:
    """The trial of this folder, made now unless it was made before. `judge` may end it; then its outcome is pruned.

    Raises ConfigError when the folder holds a trial of other settings; whatever else the run raises.
    """
    if (folder / RESULT).exists():
        return _stored(spec, folder)
    shutil.rmtree(folder / RUN, ignore_errors=True)  # of a trial that was ended
    write_file(folder / SPEC, json.dumps(asdict(spec), indent=1).encode())
    command = [sys.executable, "-m", "tailora.study.trial", str(folder)]
    log, heard = folder / "log.txt", Heard(spec.before)
    with (
        log.open("w") as complaints,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True) as process,
    ):
        try:
            ended = _listen(process, heard, progress, judge)
        finally:
            process.kill()  # has no effect on one that has ended
    if ended is not None:
        _leave(folder, heard.trial(PRUNED, ended), keep=False)
    elif process.returncode == subprocess_worker.KILLED:
        _leave(folder, heard.trial(OUT_OF_MEMORY, "killed by the system, most likely for memory"), keep=False)
    elif process.returncode != 0:
        raise subprocess_worker.told(folder, process.returncode, log.read_text(), f"the run in {folder}")
    return _stored(spec, folder)


def _listen(process: Any, heard: Heard, progress: Progress | None, judge: Judge | None) -> str | None:
    """Until the trial has ended, None, or is to end: why."""
    for line in process.stdout:
        told = Told(**json.loads(line))
        heard.told.append(told)
        if progress is not None and not told.held_out:
            progress(told.step, told.steps, told.loss)
        if judge is not None and (why := judge(told)) is not None:
            return why
    process.wait()
    return None


def _stored(spec: Spec, folder: Path) -> Trial:
    if _asked(json.loads((folder / SPEC).read_text())) != _asked(json.loads(json.dumps(asdict(spec)))):
        raise errors.ConfigError(f"{folder} holds a trial of other settings; give another --output-dir")
    return Trial(**json.loads((folder / RESULT).read_text()))


def _asked(spec: dict[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in spec.items() if name not in SHARED}
    return {**own, "settings": without_removed(spec["settings"])}


def main(folder: Path) -> int:
    """In the trial's own process."""
    spec = Spec(**json.loads((folder / SPEC).read_text()))
    config = TrainConfig(**{**spec.settings, "output_dir": str(folder / RUN)})
    heard = Heard(spec.before)
    try:
        trial = _made(config, spec, heard)
    except tuple(OUTCOMES) as error:
        trial = heard.trial(OUTCOMES[type(error)], str(error))
    except TailoraError as error:
        subprocess_worker.tell(folder, error)
        return 1
    _leave(folder, trial, keep=spec.keep and trial.done)
    return 0


def _leave(folder: Path, trial: Trial, *, keep: bool) -> None:
    if not keep:
        shutil.rmtree(folder / RUN, ignore_errors=True)
    write_file(folder / RESULT, json.dumps(asdict(trial)).encode())


def _made(config: TrainConfig, spec: Spec, heard: Heard) -> Trial:
    from tailora.study.model_layout import target_groups  # torch from here on
    from tailora.train.loss import Evaluation
    from tailora.train.optim import rising
    from tailora.train.trainable import folder_of
    from tailora.train.trainer import run

    between = spec.rising
    found: dict[str, Any] = {}
    result = run(
        config,
        on_event=_teller(heard),
        on_ready=lambda model, *_: found.update(target_groups(model.base_model) if spec.describe else {}),
        rate_at=None if between is None else lambda step, steps: rising(step, steps, *between),
        held_out=choosing_half if spec.choosing else None,
        before=None if spec.before is None else Evaluation(*map(np.array, spec.before)),
    )
    if result.before is None or result.after is None:
        raise errors.ConfigError("there is no held-out data to judge by: give --eval-data or --validation-split")
    left = folder_of(result.model, Path(result.output_dir))
    forgotten, took = (None, {}) if spec.forgetting is None else _forgotten(result, spec)
    cut = None if result.data is None else result.data.report.truncated
    own = {"seed": config.seed, "parts": found, "examples": _examples(result), "truncated": cut, **took}
    return heard.trial(
        "done",
        "",
        numbers={**result.to_dict(), **own},
        sums=result.after.sums.tolist(),
        before=result.before.sums.tolist(),
        counts=result.after.counts.tolist(),
        forgetting=forgotten,
        bytes=sum(file.stat().st_size for file in left.rglob("*") if file.is_file()),
    )


def _teller(heard: Heard) -> Callable[[Any], None]:
    """Says steps and evaluations on stdout, and remembers them."""
    from tailora.train.events import Evaluated, Event, Prepared, Stepped

    known = {"steps": 0, "parameters": 0}

    def tell(event: Event) -> None:
        if isinstance(event, Prepared):
            known.update(steps=event.header["max_steps"], parameters=event.header["trainable_parameters"])
        if isinstance(event, Stepped | Evaluated):
            told = Told(
                event.step, loss=event.loss, held_out=isinstance(event, Evaluated), seconds=event.seconds, **known
            )
            heard.told.append(told)
            print(json.dumps(asdict(told)), flush=True)

    return tell


def _examples(result: Any) -> int | None:
    """To train on; of a stream that is not known."""
    return None if result.data is None else len(result.data.train)


def _forgotten(result: Any, spec: Spec) -> tuple[dict[str, Any], dict[str, float]]:
    """What was forgotten; and the seconds of writing texts, which the first trial of a study does, and of the rest."""
    from tailora.evaluation.forgetting import forgetting

    started = time.monotonic()
    texts = _texts(result, spec)
    written = time.monotonic()
    found = asdict(forgetting(result.model, texts))
    return found, {"writing_seconds": written - started, "forgetting_seconds": time.monotonic() - written}


def _texts(result: Any, spec: Spec) -> list[list[int]]:
    """Ids of each."""
    from tailora.evaluation.forgetting import read_texts, sample_texts

    if spec.forgetting:
        return read_texts(spec.forgetting, result.model, result.tokenizer)
    if spec.texts is None:
        return sample_texts(result.model, result.tokenizer)
    kept = Path(spec.texts)
    if not kept.exists():
        write_file(kept, json.dumps(sample_texts(result.model, result.tokenizer)).encode())
    known: list[list[int]] = json.loads(kept.read_text())
    return known


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
