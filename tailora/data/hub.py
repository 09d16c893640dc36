"""Rows through `datasets`: Hub ids and folders that it saved."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tailora.data.rows import Row
from tailora.errors import DataError, nearest

OFFLINE = (
    "the Hub cannot be reached (HF_HUB_OFFLINE, no network, or a proxy): pass a file or folder instead, "
    "or fetch the data once on a connected machine with `hf download --repo-type dataset {name}` and pass its folder"
)


def read_hub(source: str, split: str, streaming: bool) -> Iterator[Row]:
    """Rows of the Hub data set `owner/name` or `owner/name:configuration`."""
    import datasets

    name, _, configuration = source.partition(":")
    part = _translated(
        source, lambda: datasets.load_dataset(name, configuration or None, split=split, streaming=streaming)
    )
    return _numbered(f"{source}[{split}]", part)


def read_saved(folder: Path, split: str) -> Iterator[Row]:
    """Rows of a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    import datasets

    saved = _translated(str(folder), lambda: datasets.load_from_disk(str(folder)))
    if isinstance(saved, dict):
        if split not in saved:
            raise DataError(f"data {folder}: no split {split!r}, there are {', '.join(saved)}{nearest(split, saved)}")
        return _numbered(f"{folder}[{split}]", saved[split])
    return _numbered(str(folder), saved)


def _translated(source: str, load: Callable[[], Any]) -> Any:
    """What `load` returns; its many errors become one DataError that says what to do."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return load()
    except (ConnectionError, datasets.exceptions.DatasetsError, HfHubHTTPError, OSError, ValueError) as error:
        offline = isinstance(error, ConnectionError) or "offline" in str(error).lower()
        remedy = OFFLINE.format(name=source.partition(":")[0]) if offline else str(error).strip().splitlines()[0]
        raise DataError(f"data {source}: neither a file here nor readable as a Hub data set: {remedy}") from None


def _numbered(file: str, rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
    return (Row(file, number, fields) for number, fields in enumerate(rows, 1))
