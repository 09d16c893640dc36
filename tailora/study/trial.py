"""One run in a process of its own: its peak of memory is its own, and what ends it ends nothing else.

    parent: trial.json there? -> that; else spec.json -> `python -m tailora.study.trial FOLDER` -> progress, trial.json

A trial that diverges or does not fit is a result, not an error: both say something about its settings.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailora import errors
from tailora.errors import DivergedError, MemoryLimitError, TailoraError
from tailora.formats.atomic import write_file
from tailora.train.config import TrainConfig

SPEC, RESULT, RUN = "spec.json", "trial.json", "run"
OUTCOMES = {DivergedError: "diverged", MemoryLimitError: "out of memory"}

Progress = Callable[[int, int, float], None]  # step, of steps, loss


@dataclass(frozen=True)
class Spec:
    """What a trial does. `forgetting`: None for not measured, '' for the base's own texts, or a file of texts."""

    settings: dict[str, Any]  # of TrainConfig, output_dir left out
    forgetting: str | None = None
    keep: bool = True  # what was trained; a fully trained model is large


@dataclass(frozen=True)
class Trial:
    """What came out. Without an outcome of `done` the numbers are missing."""

    outcome: str  # done, diverged, out of memory
    message: str
    numbers: dict[str, Any]  # of TrainResult, and the seed
    sums: list[float]  # nats of each held-out example, afterwards
    before: list[float]  # likewise by the base
    counts: list[int]  # learned tokens of each
    forgetting: dict[str, Any] | None
    bytes: int  # on disk, of what was trained

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


def try_out(spec: Spec, folder: Path, progress: Progress | None = None) -> Trial:
    """The trial of this folder, made now unless it was made before.

    Raises ConfigError when the folder holds a trial of other settings; whatever else the run raises.
    """
    if (folder / RESULT).exists():
        return _stored(spec, folder)
    shutil.rmtree(folder / RUN, ignore_errors=True)  # of a trial that was ended
    write_file(folder / SPEC, json.dumps(asdict(spec), indent=1).encode())
    command = [sys.executable, "-m", "tailora.study.trial", str(folder)]
    log = folder / "log.txt"
    with (
        log.open("w") as complaints,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if progress is not None:
                    progress(*json.loads(line))
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise _raised(folder, process.returncode, log.read_text())
    return _stored(spec, folder)


def _stored(spec: Spec, folder: Path) -> Trial:
    if json.loads((folder / SPEC).read_text()) != json.loads(json.dumps(asdict(spec))):
        raise errors.ConfigError(f"{folder} holds a trial of other settings; give another --output-dir")
    return Trial(**json.loads((folder / RESULT).read_text()))


def _raised(folder: Path, code: int, complaint: str) -> Exception:
    """The error that ended the process, as far as it could say."""
    written = folder / "error.json"
    if written.exists():
        content = json.loads(written.read_text())
        written.unlink()
        error: Exception = getattr(errors, content["type"])(content["message"])
        return error
    if code == -9:
        return MemoryLimitError(f"the run in {folder} was killed, most likely for memory: take a smaller batch size")
    return RuntimeError(f"the run in {folder} ended with code {code}: {complaint.strip()[-2000:]}")


def main(folder: Path) -> int:
    """In the trial's own process."""
    spec = Spec(**json.loads((folder / SPEC).read_text()))
    config = TrainConfig(**{**spec.settings, "output_dir": str(folder / RUN)})
    try:
        trial = _made(config, spec)
    except tuple(OUTCOMES) as error:
        nothing: dict[str, Any] = {
            "numbers": {},
            "sums": [],
            "before": [],
            "counts": [],
            "forgetting": None,
            "bytes": 0,
        }
        trial = Trial(OUTCOMES[type(error)], str(error), **nothing)
    except TailoraError as error:
        write_file(folder / "error.json", json.dumps({"type": type(error).__name__, "message": str(error)}).encode())
        return 1
    if not (spec.keep and trial.done):
        shutil.rmtree(folder / RUN, ignore_errors=True)
    write_file(folder / RESULT, json.dumps(asdict(trial)).encode())
    return 0


def _made(config: TrainConfig, spec: Spec) -> Trial:
    from tailora.train.events import Event, Stepped  # torch from here on
    from tailora.train.run import run
    from tailora.train.subject import folder_of

    def tell(event: Event) -> None:
        if isinstance(event, Stepped):
            print(json.dumps([event.step, event.max_steps, event.loss]), flush=True)

    result = run(config, on_event=tell)
    if result.before is None or result.after is None:
        raise errors.ConfigError("there is no held-out data to judge by: give --eval-data or --validation-split")
    left = folder_of(result.model, Path(result.output_dir))
    return Trial(
        outcome="done",
        message="",
        numbers={**result.to_dict(), "seed": config.seed},
        sums=result.after.sums.tolist(),
        before=result.before.sums.tolist(),
        counts=result.after.counts.tolist(),
        forgetting=None if spec.forgetting is None else _forgotten(result, spec.forgetting),
        bytes=sum(file.stat().st_size for file in left.rglob("*") if file.is_file()),
    )


def _forgotten(result: Any, source: str) -> dict[str, Any]:
    from tailora.measure.forgetting import forgetting, own_texts, texts_of

    texts = texts_of(source, result.model, result.tokenizer) if source else own_texts(result.model, result.tokenizer)
    return asdict(forgetting(result.model, texts))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
