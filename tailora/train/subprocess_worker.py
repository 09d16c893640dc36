"""A few real steps of a run, in a process of their own, for what they take: memory and time, and nothing else.

    parent: settings -> `python -m tailora.train.subprocess_worker FOLDER` -> what it took

The largest forward comes first and again at the end; between them are the first steps of the run. So the peak is that
of the run but for what its many other lengths add. Nothing is written but in the temporary folder.
"""

import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from tailora import errors
from tailora.errors import MemoryLimitError, TailoraError
from tailora.formats.io import write_file
from tailora.train.config import TrainConfig

# ---- Work in a process of its own: how its error reaches the process that asked for it. Needs no torch.


ERROR = "error.json"
KILLED = -9  # what the system does to a process when memory runs out


def tell(folder: Path, error: TailoraError) -> None:
    """In the process: leave the error for `told`."""
    write_file(folder / ERROR, json.dumps({"type": type(error).__name__, "message": str(error)}).encode())


def told(folder: Path, code: int, complaint: str, what: str) -> Exception:
    """The error that ended the process, as far as it could say. complaint: its stderr.    what: it was doing."""
    written = folder / ERROR
    if written.exists():
        content = json.loads(written.read_text())
        written.unlink()
        error: Exception = getattr(errors, content["type"])(content["message"])
        return error
    if code == KILLED:
        return MemoryLimitError(f"{what} was killed, most likely for memory: take a smaller batch size")
    return RuntimeError(f"{what} ended with code {code}: {complaint.strip()[-2000:]}")


# ----


STEPS = 3  # between the two of the largest forward
SPEC, RESULT = "spec.json", "result.json"


@dataclass(frozen=True)
class Rehearsal:
    """What a few steps took."""

    peak_bytes: int
    start_seconds: float  # until the first step: imports, weights, data, checks
    seconds_per_token: float  # of the steps after the first
    steps: int
    kernels: str


def rehearse(config: TrainConfig, *, with_data: bool) -> Rehearsal:
    """with_data: on the data that `config` names, else on random tokens of max_length.

    Raises what a run raises before and in its first steps.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = config.model_dump(mode="json", exclude_unset=True)
        write_file(folder / SPEC, json.dumps({"settings": settings, "with_data": with_data}).encode())
        command = [sys.executable, "-m", "tailora.train.subprocess_worker", name]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return Rehearsal(**json.loads((folder / RESULT).read_text()))
        raise told(folder, done.returncode, done.stderr, "the rehearsal")


def main(folder: Path) -> int:
    """In the process of its own."""
    spec = json.loads((folder / SPEC).read_text())
    try:
        found = rehearsed(TrainConfig(**spec["settings"]), folder, with_data=spec["with_data"])
    except TailoraError as error:
        tell(folder, error)
        return 1
    write_file(folder / RESULT, json.dumps(asdict(found)).encode())
    return 0


def rehearsed(config: TrainConfig, folder: Path, *, with_data: bool) -> Rehearsal:
    """The steps themselves, as `train.trainer.run` takes them. Peaks are those of this process."""
    started = time.perf_counter()
    from tailora.kernels.flat_parameters import flattened  # torch from here on
    from tailora.train.checkpoint import seeded
    from tailora.train.dataloader import MicroBatch, assumed, feed
    from tailora.train.kernel_choice import running
    from tailora.train.memory import explained, peak_bytes, remedies
    from tailora.train.optim import groups, scheduled
    from tailora.train.setup import assemble, start_accelerator
    from tailora.train.trainable import trained
    from tailora.train.trainer import bench_of, close, step

    config = config.replaced(output_dir=str(folder / "run"), report_to=[], resume_from_checkpoint=None)
    Path(config.output_dir).mkdir()
    accelerator = start_accelerator(config)
    with ExitStack() as stack:
        stack.enter_context(seeded(config.seed))
        kit = assemble(config, accelerator, lambda _: None, read=feed if with_data else assumed)
        flats = stack.enter_context(flattened(groups(trained(kit.model), config)))
        bench, _ = bench_of(
            config, Path(config.output_dir), accelerator, kit, flats, None, lambda _: None, scheduled(config)
        )
        stack.callback(close, bench)
        stack.enter_context(explained("rehearsing", lambda: remedies(kit.cost, kit.feed.largest, kit.feed.longest)))
        stack.enter_context(running(kit.base, kit.rows, kit.kernels, checkpointed=config.gradient_checkpointing))
        good = [flat.whole.detach().clone() for flat in flats]
        largest = [MicroBatch(kit.feed.heaviest)]
        ready = time.perf_counter() - started
        seconds, tokens = [], []
        for number, batches in enumerate([largest, *islice(kit.feed.steps(0), STEPS), largest]):
            began = time.perf_counter()
            step(bench, number, batches, sum(batch.supervised for batch in batches), good)
            seconds.append(time.perf_counter() - began)
            tokens.append(sum(batch.tokens for batch in batches))
        return Rehearsal(
            peak_bytes=peak_bytes(accelerator.device),
            start_seconds=ready,
            seconds_per_token=sum(seconds[1:]) / sum(tokens[1:]),
            steps=len(seconds),
            kernels=kit.kernels.words,
        )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
