"""What of an adapter's folder goes to others: its own files, checked, without pickles and without paths of a machine.

Whoever gets the files needs neither the folder that the base was in here, nor the samples and logs of the run.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tailora.errors import FormatError, listing
from tailora.formats.hub import public_name
from tailora.formats.io import check_is_file, with_metadata, wrap_os_error
from tailora.formats.metadata import METADATA_KEY
from tailora.formats.offline import OfflineAdapter, read_stored, updates_of
from tailora.formats.peft import StoredAdapter
from tailora.formats.run_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    DIFFUSERS_WEIGHTS,
    GGUF_WEIGHTS,
    MLX_WEIGHTS,
    MODEL,
    TOKENIZER_FILES,
)

SHARED = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, *TOKENIZER_FILES)  # and the card
NOT_SEARCHED = (ADAPTER_WEIGHTS, "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
BEGIN, END = r"(?<![\w.~-])(?<![\w:.]/)", r"(?![\w-])[\w./@-]*"  # of a path; not within another one, or an address
HOME = BEGIN + r"(?:/home/|/Users/|/root/|[A-Za-z]:\\+Users\\+)[\w.@-]+[\w./\\@-]*"  # a home directory of any system
TOKEN = r"\bhf_[A-Za-z0-9]{30,}"  # of the Hub: some tools wrote it into the files of a tokenizer


@dataclass(frozen=True)
class SharedAdapter:
    """settings: of adapter_config.json, with the base's public name.
    files: name -> content, without the card.
    card: README.md as it is in the folder; None without one.
    left_behind: names in the folder that are not shared.
    secrets: paths of the base model on this machine, which no file may name.
    """

    settings: dict[str, Any]
    updates: OfflineAdapter
    files: dict[str, bytes]
    card: str | None
    left_behind: list[str]
    secrets: list[str]


def shared_files(folder: Path, base_name: str | None) -> SharedAdapter:
    """Returns the files of a PEFT folder that others may have. The folder stays as it is.

    base_name: what the files call the base model, instead of a path.
    Raises FormatError for a folder that is not an adapter, is damaged, or whose files name paths of a machine.
    """
    if (folder / MODEL).is_dir() and not (folder / ADAPTER_CONFIG).exists():
        raise FormatError(f"{folder} holds a whole model, of --method full; `tailora extract` makes an adapter of it")
    needed = (ADAPTER_WEIGHTS, ADAPTER_CONFIG)
    others = [name for name in (MLX_WEIGHTS, GGUF_WEIGHTS, DIFFUSERS_WEIGHTS) if (folder / name).is_file()]
    if others and not all((folder / name).is_file() for name in needed):
        raise FormatError(
            f"{folder} holds {others[0]}, and no {' and '.join(needed)} as PEFT has them: "
            f"`tailora export {folder} --to peft --output FOLDER` writes them"
        )
    stored, updates = check_adapter(folder)
    if stored.settings is None:
        raise FormatError(f"{folder} has no {ADAPTER_CONFIG}, without which PEFT and servers cannot read it")
    files = {name: _content(folder / name) for name in SHARED if (folder / name).exists()}
    settings = {**stored.settings, "base_model_name_or_path": base_name}
    if settings != stored.settings:
        files[ADAPTER_CONFIG] = (json.dumps(settings, indent=2) + "\n").encode()
    if stored.metadata.base_folder is not None:
        files[ADAPTER_WEIGHTS] = _without_base_folder(files[ADAPTER_WEIGHTS], stored)
    bases = (stored.settings.get("base_model_name_or_path"), stored.metadata.base_folder)
    secrets = [base for base in bases if isinstance(base, str) and Path(base).is_absolute()]
    searched = {name: content for name, content in files.items() if name not in NOT_SEARCHED}
    searched[f"the metadata of {ADAPTER_WEIGHTS}"] = json.dumps(_metadata(files[ADAPTER_WEIGHTS])).encode()
    check_nothing_private(folder, searched, secrets)
    left_behind = sorted(path.name for path in folder.iterdir() if path.name not in (*files, CARD))
    card = _card(folder / CARD) if (folder / CARD).exists() else None
    return SharedAdapter(settings, updates, files, card, left_behind, secrets)


def make_public(folder: Path) -> None:
    """Replaces the files of a PEFT folder by those that others may have. Raises as `shared_files`."""
    stored = read_stored(folder)
    base = stored.metadata.base_folder or (stored.settings or {}).get("base_model_name_or_path")
    for name, content in shared_files(folder, public_name(base) if base else None).files.items():
        (folder / name).write_bytes(content)


def check_adapter(folder: Path) -> tuple[StoredAdapter, OfflineAdapter]:
    """Returns the adapter of a folder of PEFT or mlx-lm, after the checks that need no base model.

    Raises FormatError if a tensor is missing, not finite, or has another shape than its settings say, and ConfigError
    for formats that cannot be read without the base model.
    """
    stored = read_stored(folder)
    check_finite(folder, stored.tensors)
    return stored, updates_of(stored)


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises FormatError, which names `path` and all tensors that are not finite."""
    if problems := [f"{key} is not finite" for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise FormatError(f"{path}: {listing(problems)}")


def check_nothing_private(folder: Path, files: Mapping[str, bytes], secrets: Sequence[str] = ()) -> None:
    """Raises FormatError with the paths in these files that say something of a machine, and with tokens of the Hub.

    The paths are those below a home directory, `folder`, the current folder, and `secrets`.
    """
    here = [str(path) for path in (Path.home(), Path.cwd(), folder.resolve()) if len(path.parts) > 1]
    search = re.compile("|".join([*(f"{BEGIN}{re.escape(path)}{END}" for path in (*here, *secrets)), HOME, TOKEN]))
    problems = [
        f"{name} names {', '.join(list(dict.fromkeys(paths))[:3])}"
        for name, content in files.items()
        if (paths := search.findall(content.decode(errors="replace")))
    ]
    if problems:
        raise FormatError(
            f"{folder} is not shared, because its files name paths of a machine, or a token; take them out: "
            f"{listing(problems)}"
        )


def _content(path: Path) -> bytes:
    check_is_file(path)
    with wrap_os_error(path):
        return path.read_bytes()


def _card(path: Path) -> str:
    try:
        return _content(path).decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _metadata(raw: bytes) -> dict[str, str]:
    size = int.from_bytes(raw[:8], "little")
    metadata: dict[str, str] = json.loads(raw[8 : 8 + size]).get("__metadata__", {})
    return metadata


def _without_base_folder(raw: bytes, stored: StoredAdapter) -> bytes:
    public = stored.metadata.model_copy(update={"base_folder": None})
    return with_metadata(raw, {**_metadata(raw), METADATA_KEY: public.to_json()})
