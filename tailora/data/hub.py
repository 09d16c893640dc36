"""The Hub: rows through `datasets`, of Hub ids and of folders that it saved; and whether a model is there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tailora.data.rows import Row
from tailora.errors import ConfigError, DataError, nearest

OFFLINE = (
    "the Hub cannot be reached (no network, a proxy, or HF_HUB_OFFLINE): pass a file or folder instead, or fetch it "
    "once on a connected machine with `hf download --repo-type dataset {name} --local-dir FOLDER` and pass FOLDER"
)
SECONDS = 5.0  # that the Hub has to answer whether it has a model
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


def check_model(name: str) -> None:
    """Ask the Hub once for a model that is not on this machine: transformers asks six times per file, waiting longer
    each time, which is most of a minute without a network.

    Raises ConfigError when the Hub cannot be reached or has no such model.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's or httpx2's
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if Path(name).is_dir():
        return
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=SECONDS)
    except RepositoryNotFoundError:
        raise ConfigError(_no_model(name, "the Hub has no such model, or a private one")) from None
    except HfHubHTTPError:
        return  # the Hub answers, and is busy: worth asking again
    except HFValidationError:
        raise ConfigError(_no_model(name, "it is not a Hub id")) from None
    except (HTTPError, OfflineModeIsEnabled) as error:
        cause = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConfigError(_no_model(name, f"the Hub cannot be reached ({cause})")) from None


def _no_model(name: str, cause: str) -> str:
    path = Path(name)
    beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    return (
        f"model {name!r}: no such folder here, and {cause}{nearest(path.name, beside) or '.'} "
        "Give a folder, a Hub id such as owner/name, or 'demo'; HF_TOKEN opens private and gated models"
    )
