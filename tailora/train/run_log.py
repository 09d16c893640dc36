"""The output folder of a run: run.json, config.yaml, metrics.jsonl, examples.jsonl and more, next to the adapter."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from filelock import FileLock, Timeout

import tailora
from tailora.data.schemas import TEXT
from tailora.errors import CheckpointError, ConfigError, WriteError
from tailora.formats.io import create_output_folder, remove_leftovers, wrap_os_error, write_file
from tailora.formats.run_folder import (
    ADAPTER,
    CHECKPOINT,
    HELD_OUT,
    MODEL,
    PAGE,
    REFERENCE,
    REPORT,
    RUN,
    SAMPLES,
    SUMMARY,
    TRAINED_ROWS,
    VERDICTS,
    adapter_folder,
    checkpoints_in,
    trained_rows,
)
from tailora.train.config import TrainConfig
from tailora.train.config_file import config_text

if TYPE_CHECKING:
    from tailora.data.prepare import PreparedData
    from tailora.train.loss import Evaluation

CONFIG, METRICS, EXAMPLES, SKIPPED = "config.yaml", "metrics.jsonl", "examples.jsonl", "skipped-rows.jsonl"
COMPLETIONS = "completions.jsonl"  # some that were sampled in reinforcement learning
LOGS = (METRICS, COMPLETIONS)
# and checkpoint-N
FILES = (
    ADAPTER,
    MODEL,
    RUN,
    CONFIG,
    *LOGS,
    EXAMPLES,
    TRAINED_ROWS,
    HELD_OUT,
    SKIPPED,
    REFERENCE,
    SAMPLES,
    REPORT,
    SUMMARY,
    PAGE,
    VERDICTS,
)
RESULTS = {ADAPTER: "an adapter", MODEL: "a model"}
LOCK, HOLDER = ".lock", ".lock-holder"  # the second says who holds the first
EARLIER = "earlier-run"
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "datasets", "numpy")


@contextmanager
def lock(output_dir: Path) -> Iterator[None]:
    """Within the block no other run can write to this folder, which is created. Removes what killed runs half wrote.

    If the block fails before it has written anything, nothing is left: no lock file, and no folder that was new.
    Raises ConfigError if another run writes to the folder, or if it cannot be written to.
    """
    new_folders = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    create_output_folder(output_dir)
    file_lock, holder = FileLock(output_dir / LOCK), output_dir / HOLDER
    try:
        file_lock.acquire(timeout=0)
    except Timeout:
        by = f" ({holder.read_text()})" if holder.exists() else ""
        raise ConfigError(
            f"another run is writing to {output_dir}{by}; use a different --output-dir, or wait until that run ends"
        ) from None
    try:
        write_file(holder, f"process {os.getpid()} on {platform.node()}".encode())
        remove_leftovers(output_dir, lambda name: name in FILES or CHECKPOINT.fullmatch(name) is not None)
        yield
    except BaseException:
        if {path.name for path in output_dir.iterdir()} <= {LOCK, HOLDER}:
            for path in output_dir.iterdir():
                path.unlink()
            for folder in new_folders:
                if not any(folder.iterdir()):  # another run may have started next to this one
                    folder.rmdir()
        raise
    finally:
        holder.unlink(missing_ok=True)
        file_lock.release()


def check_run_folder(config: TrainConfig, *, overwrite: bool) -> None:
    """Raises ConfigError if the folder has another run. overwrite: one with a run.json may be replaced."""
    output_dir, resumed = Path(config.output_dir), config.resume_from_checkpoint
    if overwrite and resumed is not None:
        raise ConfigError(
            "--overwrite would delete the run that --resume-from-checkpoint resumes; use only one of these flags"
        )
    if overwrite and config.adapter and Path(config.adapter).resolve().is_relative_to(output_dir.resolve()):
        raise ConfigError(f"--overwrite would replace --adapter {config.adapter}; use a different --output-dir")
    is_resumed_here = resumed == "latest" or (resumed and Path(resumed).resolve().parent == output_dir.resolve())
    checkpoints = [path.name for path in checkpoints_in(output_dir)]
    names = [*(text for name, text in RESULTS.items() if (output_dir / name).exists()), *checkpoints[-1:]]
    if not names or is_resumed_here or (overwrite and _read_run(output_dir)):
        return
    content = f"{output_dir} contains {' and '.join(names)}"
    if overwrite:
        raise ConfigError(f"--overwrite: {content}, but no {RUN} from a tailora run; use a different --output-dir")
    hints = "resume with --resume-from-checkpoint latest, " if checkpoints else ""
    raise ConfigError(
        f"{content} of an earlier run; use a different --output-dir, {hints}replace it with --overwrite, or delete it"
    )


def set_aside(output_dir: Path) -> Path | None:
    """Moves the files of an earlier run to the folder earlier-run next to them and returns it; None if there are none.

    If that folder has a run, the files are from a failed run that should have replaced it: they are deleted.
    """
    aside, partial = output_dir / EARLIER, output_dir / f".{EARLIER}"
    files = [path for name in FILES if (path := output_dir / name).exists()] + checkpoints_in(output_dir)
    with wrap_os_error(aside):
        if aside.exists() and not _read_run(aside):  # what a run left that failed before it wrote run.json
            shutil.rmtree(aside)
        if aside.exists():
            for path in files:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif files or partial.exists():
            partial.mkdir(exist_ok=True)  # renamed when it is complete, so that a crash loses nothing
            for path in files:
                path.rename(partial / path.name)
            partial.rename(aside)
        else:
            return None
    return aside


def delete_earlier(output_dir: Path) -> None:
    """Deletes the run that was set aside, now that the new one is complete."""
    if _read_run(output_dir / EARLIER):
        with wrap_os_error(output_dir / EARLIER):
            shutil.rmtree(output_dir / EARLIER)


def has_diverged(output_dir: Path) -> bool:
    """True if run.json says that the run ended because a loss or its weights were not finite."""
    return bool(_read_run(output_dir).get("diverged"))


def _read_run(output_dir: Path) -> dict[str, Any]:
    """Returns what run.json holds; {} if no run has written it."""
    try:
        content = json.loads((output_dir / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and {"settings", "finished"} <= content.keys() else {}


def write_settings(output_dir: Path, config: TrainConfig) -> None:
    """Writes config.yaml: `tailora train --config config.yaml` repeats the run. What the run changes comes first."""
    settings = config.model_dump(exclude={"resume_from_checkpoint"})
    first = {name: settings.pop(name) for name in config.changed([*settings])}
    text = f"{config_text(first)}\n# defaults of this version\n{config_text(settings)}"
    write_file(output_dir / CONFIG, text.encode())


def write_rows(output_dir: Path, config: TrainConfig, data: "PreparedData") -> None:
    """Writes hashes of the trained rows, and the rows that were held out of the data or skipped.

    The hashes include the rows that an adapter to train further has seen before. Held-out rows are as they were read,
    for `tailora eval --data`.
    """
    earlier = trained_rows(adapter_folder(Path(config.adapter))) if config.adapter else None
    write_file(output_dir / TRAINED_ROWS, b"".join(sorted({*data.trained_rows, *(earlier or ())})))
    files: dict[str, list[Any]] = {}
    if config.eval_data is None and data.report.shape != TEXT and not data.eval.images:
        # whole texts are also trained, and images are found from the folder of their file
        files[HELD_OUT] = [*{id(row): row for row in data.eval_rows}.values()]  # one row may be several examples
    if data.skipped:
        files[SKIPPED] = [{"row": row.location, "reason": row.cause, "content": row.content} for row in data.skipped]
    for name, rows in files.items():
        write_file(output_dir / name, "".join(f"{json.dumps(row, default=str)}\n" for row in rows).encode())


def write_run(output_dir: Path, header: Mapping[str, Any], result: Mapping[str, Any] | None = None) -> None:
    """Writes run.json: the header, and the result once there is one."""
    content = {**header, "finished": result is not None, "result": result}
    write_file(output_dir / RUN, (json.dumps(content, indent=2) + "\n").encode())


def add_result(output_dir: Path, **numbers: Any) -> None:
    """Raises WriteError if the run could not write its own result."""
    content = _read_run(output_dir)
    if not content.get("result"):
        raise WriteError(f"{output_dir / RUN} has no result")
    write_run(output_dir, content, {**content["result"], **numbers})


def write_examples(
    output_dir: Path,
    before: "Evaluation | None",
    after: "Evaluation | None",
    score_names: Sequence[str],
    targets: Sequence[Any] | None,
    texts: Iterable[str],
    selection: "np.ndarray[Any, Any] | None" = None,
) -> None:
    """Writes examples.jsonl: each held-out example's number of losses (tokens), and their sums (nats); none, no file.

    score_names: of what else is known of each example; with several losses of an example, a list of lists.
    targets: what is right for each example, if it is more than its tokens.
    texts: what the model reads.
    selection: indices of the examples that chose the best step, marked by `chose`; None if no others evaluate it.
    """
    if before is None or after is None:
        return
    columns = after.counts.tolist(), before.sums.tolist(), after.sums.tolist()
    rows: list[dict[str, Any]] = [
        {"tokens": tokens, "before": loss_before, "after": loss_after, "text": text}
        for tokens, loss_before, loss_after, text in zip(*columns, texts, strict=True)
    ]
    for when, evaluation in (("before", before), ("after", after)):
        if evaluation.scores is None:
            continue
        scores = evaluation.scores.astype(object)
        scores[np.isnan(evaluation.scores)] = None  # JSON has no NaN
        by_example = np.split(scores, np.cumsum(evaluation.counts)[:-1])
        has_several = bool((evaluation.counts > 1).any())
        for row, values in zip(rows, by_example, strict=True):
            row[f"scores_{when}"] = (
                values.tolist() if has_several else dict(zip(score_names, values[0].tolist(), strict=True))
            )
    if selection is not None:
        for index, row in enumerate(rows):
            row["chose"] = bool(np.isin(index, selection))
    for row, target in zip(rows, targets or (), strict=bool(targets)):
        row["target"] = target
    write_file(output_dir / EXAMPLES, "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def environment() -> dict[str, Any]:
    """Returns versions, machine and the state of the working folder's git repository."""
    import torch  # the checks of the folder come before torch is loaded

    from tailora.core.device import accelerators, device_name

    return {
        "versions": {
            "tailora": tailora.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "machine": {
            "platform": platform.platform(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
            "gpus": [device_name(device) for device in accelerators()],
        },
        "git": git_state(Path.cwd()),
        "command": sys.argv,
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Returns the commit, and whether anything differs from it; None outside a repository or without git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def start_metrics(output_dir: Path, *, resumed_at: int | None, evaluated: Collection[int] = ()) -> None:
    """Begins metrics.jsonl, or keeps the lines up to step `resumed_at`, with the evaluations of steps `evaluated`.

    The same for completions.jsonl, if there is one.
    """
    for path in (output_dir / name for name in LOGS):
        if path.exists() or path.name == METRICS:
            kept = [] if resumed_at is None or not path.exists() else _kept_lines(path, resumed_at, evaluated)
            write_file(path, "".join(f"{line}\n" for line in kept).encode())


def _kept_lines(path: Path, resumed_at: int, evaluated: Collection[int]) -> list[str]:
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]  # a line without its end was cut by a crash
    try:
        lines = [(line, json.loads(line)) for line in whole]
        return [
            line
            for line, values in lines
            if values["step"] <= resumed_at
            and (not values.keys() & {"eval_loss", "held_out"} or values["step"] in evaluated)
        ]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise CheckpointError(f"{path} contains an invalid line; move the file away to resume") from None


def add_metrics(output_dir: Path, name: str, /, **values: Any) -> None:
    """Adds a line. name: one of LOGS. Raises WriteError."""
    path = output_dir / name
    with wrap_os_error(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")
