"""The files in the output folder of a run or a study, by name. Importing this needs no torch."""

import json
import re
import textwrap
import time
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tailora.errors import ConfigError, FormatError
from tailora.formats.io import read_json_object, wrap_os_error, write_file

ADAPTER, MODEL, RUN = "adapter", "model", "run.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as in PEFT
METADATA_KEY = "tailora"  # for tailora's own fields in the metadata of ADAPTER_WEIGHTS
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
GGUF_WEIGHTS, MODELFILE, MLX_WEIGHTS = "adapter.gguf", "Modelfile", "adapters.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
REPORT, PAGE = "report.json", "report.html"  # the numbers, and the page that shows them
SUMMARY = "summary.json"  # what `tailora runs` lists of a report, in at most SUMMARY_BYTES
SUMMARIZED, SUMMARY_BYTES = ("train", "compare", "search", "rows", "curve"), 4096
SAMPLES = "samples.json"
VERDICTS = "verdicts.jsonl"  # of a judge: hashes of requests, and their verdicts
HELD_OUT = "held_out.jsonl"  # rows of the data that the run was evaluated on
TRAINED_ROWS = "trained-rows.bin"  # 8 bytes for each row that the run trains on
REFERENCE = "reference.npz"  # the model's values for the examples before training, for losses that need them
CARD = "README.md"
# Files that a server reads along with an exported adapter, and the script that starts the server
SERVE_SCRIPT, CHAT_TEMPLATE, TOKENIZER_CONFIG = "serve.sh", "chat_template.jinja", "tokenizer_config.json"
PASSPORT = "passport.json"  # the verification file of `tailora verify`
SYSTEM = "system_message.txt"  # the most frequent one of the training conversations
TOKENIZER_FILES = (
    *("tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE),
    *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
)
ADAPTER_FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, CARD, PASSPORT, SYSTEM)
# A merged model looks like any other
OTHER_EXPORTED_FILES = (GGUF_WEIGHTS, MODELFILE, MLX_WEIGHTS, DIFFUSERS_WEIGHTS, SERVE_SCRIPT, CHAT_TEMPLATE)
EXPORTED_FILES = (*ADAPTER_FILES, *OTHER_EXPORTED_FILES)
REPORT_FILES = (REPORT, PAGE)


def adapter_folder(path: Path) -> Path:
    """Returns the folder of the adapter: `path` itself, or the adapter in it if `path` is the folder of a run."""
    inside = path / ADAPTER
    return inside if not (path / ADAPTER_CONFIG).exists() and inside.is_dir() else path


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, oldest first."""
    entries = output_dir.iterdir() if output_dir.is_dir() else []
    numbered = [(int(match[1]), path) for path in entries if (match := CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def check_result_folder(folder: Path, files: Collection[str], *, overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """Raises ConfigError if the folder is not empty, unless `overwrite` is set and it only contains an earlier result.

    files: names of the files of a result. A folder that contains anything else is never replaced, nor is the adapter
        of a run, nor one of `sources`, which the command reads.
    """
    with wrap_os_error(folder):
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
        problem = _obstacle_to_overwrite(folder, files, sources) if folder.is_dir() else None
    if problem is not None:
        start = f"--overwrite: {folder}" if overwrite else f"{folder} already exists and"
        raise ConfigError(f"{start} {problem}; use a different folder")
    if not overwrite or not folder.is_dir():
        raise ConfigError(f"{folder} already exists; use a different folder, delete it, or replace it (--overwrite)")


def _obstacle_to_overwrite(folder: Path, files: Collection[str], sources: Iterable[Path]) -> str | None:
    """Returns why a folder may not be replaced; None if it may."""
    target = folder.resolve()
    others = sorted(path.name for path in target.iterdir() if path.name not in files or not path.is_file())
    if others:
        shown = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        return f"contains {shown}, but only {', '.join(files)} would be replaced"
    if target.name == ADAPTER and (target.parent / RUN).exists():
        return "is the adapter of a run"
    if any(target in (path, *path.parents) for path in map(Path.resolve, sources)):
        return "contains the input of this command"
    return None


def check_report_kind(folder: Path | None, kind: str) -> None:
    """Raises ConfigError if a report of this kind would overwrite one of another kind, or a damaged one."""
    if folder is None or not (folder / REPORT).exists():
        return
    try:
        existing = read_json_object(folder / REPORT).get("kind")
    except FormatError:
        existing = None
    if existing != kind:
        raise ConfigError(f"--output-dir {folder} contains the {REPORT} of another command; use a different folder")


def recorded_settings(adapter: Path, part: str = "settings") -> dict[str, Any]:
    """Returns this part of the run.json next to an adapter; {} if it is missing or unreadable."""
    try:
        recorded = json.loads((adapter.resolve().parent / RUN).read_text(encoding="utf-8"))[part]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return recorded if isinstance(recorded, dict) else {}


def write_system_message(folder: Path, text: str | None) -> None:
    """Writes the system message into the folder of an adapter or a model; None removes an earlier one."""
    if text is not None:
        write_file(folder / SYSTEM, text.encode())
        return
    with wrap_os_error(folder / SYSTEM):
        (folder / SYSTEM).unlink(missing_ok=True)


def read_system_message(folder: Path) -> str | None:
    """Returns the system message stored with an adapter, a run or a model; None without one. Raises FormatError."""
    path = adapter_folder(folder) / SYSTEM
    try:
        return path.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"cannot read {path} ({error}); save it as UTF-8 text, or delete it") from None


def trained_rows(adapter: Path) -> set[bytes] | None:
    """Returns the hashes of the rows that this adapter or model was trained on; None if they are unknown."""
    try:
        content = (adapter.resolve().parent / TRAINED_ROWS).read_bytes()
    except OSError:
        return None
    return {content[start : start + 8] for start in range(0, len(content), 8)}


def recorded_metadata(path: Path) -> dict[str, Any]:
    """Returns tailora's own fields in the weights of an adapter, or of the one in a run; {} if there are none."""
    try:
        with safe_open(adapter_folder(path) / ADAPTER_WEIGHTS, framework="numpy") as file:
            fields = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (OSError, SafetensorError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def write_report(folder: Path, kind: str, content: Mapping[str, Any], *, allow_nan: bool = True) -> Path:
    """Writes report.json and returns its path; of a run or a study, also summary.json.

    Raises WriteError, and ValueError for NaN unless `allow_nan`.
    """
    write_file(folder / REPORT, json.dumps({"kind": kind, **content}, indent=1, allow_nan=allow_nan).encode())
    if kind in SUMMARIZED:
        write_file(folder / SUMMARY, _summary(folder, kind, content))
    return folder / REPORT


def _summary(folder: Path, kind: str, content: Mapping[str, Any]) -> bytes:
    """Returns the content of summary.json. Of very many metrics, the last are missing."""
    result, run = content.get("result") or content, folder / RUN
    ended = run.stat().st_mtime if run.exists() else time.time()  # a report may be written again much later
    summary = {
        "kind": kind,
        "date": datetime.fromtimestamp(ended, UTC).isoformat(timespec="seconds"),
        "verdict": textwrap.shorten(content.get("verdict", ""), 1000, placeholder=" …"),
        "finding": content.get("finding"),
        "loss_before": result.get("eval_loss_before"),
        "loss_after": result.get("eval_loss_after"),
        "seconds": result.get("total_seconds") or result.get("seconds"),
        "metrics": list(content.get("metrics", ())),
    }
    summary = json.loads(json.dumps(summary), parse_constant=lambda _: None)  # NaN is not JSON
    while len(text := json.dumps(summary, ensure_ascii=False).encode()) > SUMMARY_BYTES and summary["metrics"]:
        summary["metrics"].pop()
    return text
