"""Rows through `datasets`: Hub ids and folders that it saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tailora.data.rows import Row
from tailora.errors import DataError, nearest

OFFLINE = (
    "the Hub cannot be reached (no network, a proxy, or HF_HUB_OFFLINE): pass a file or folder instead, or fetch it "
    "once on a connected machine with `hf download --repo-type dataset {name} --local-dir FOLDER` and pass FOLDER"
)
NAMES = "a configuration is asked for as owner/name:configuration, a split as owner/name[split]"


def read_hub(source: str, split: str, streaming: bool) -> Iterator[Row]:
    """Rows of the Hub data set `owner/name` or `owner/name:configuration`. Raises DataError when it cannot be read."""
    import datasets

    name, _, configuration = source.partition(":")
    with _translated(source, name):
        rows = datasets.load_dataset(name, configuration or None, split=split, streaming=streaming)
        for number, fields in enumerate(rows, 1):
            yield Row(f"{source}[{split}]", number, fields)


def read_saved(folder: Path, split: str) -> Iterator[Row]:
    """Rows of a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    import datasets

    with _translated(str(folder), str(folder)):
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, dict) and split not in saved:
            raise DataError(f"data {folder}: no split {split!r}{nearest(split, saved)}; there are {', '.join(saved)}")
        rows = saved[split] if isinstance(saved, dict) else saved
        for number, fields in enumerate(rows, 1):
            yield Row(str(folder), number, fields)


@contextmanager
def _translated(source: str, name: str) -> Iterator[None]:
    """Turn what `datasets` and the Hub's client raise into a DataError that says what to do."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except ConnectionError:
        raise DataError(f"data {source}: no such file or folder here, and {OFFLINE.format(name=name)}") from None
    except DataError:
        raise
    except (datasets.exceptions.DatasetsError, HfHubHTTPError, OSError, ValueError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise DataError(f"data {source}: {cause} ({NAMES})") from None
