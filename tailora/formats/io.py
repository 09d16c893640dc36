"""Writing that is either whole or absent: a temporary sibling, fsync, rename."""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp, mkstemp

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tailora.errors import ConfigError, FormatError, TailoraError, WriteError

IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
REMEDIES = {  # what the system refuses -> what to do
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give a folder that you may write to"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or give a folder on another disk"),
}


def write_file(path: Path, content: bytes) -> None:
    """Put `content` at `path`; readers see the old file or the new one, never a part.

    Raises WriteError where that cannot be; nothing is left behind.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        _sync(path.parent)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path`, renamed onto it when the block ends well and removed when it does not.

    A folder that was there is moved aside first and deleted last, so that a crash leaves at least one of the two.
    Raises WriteError, also for what the block could not write.
    """
    with writing(path):
        target = path.resolve()  # a link stays a link
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(mkdtemp(prefix=f".{target.name}.", suffix=".new", dir=target.parent))
        try:
            yield fresh
            fresh.chmod(0o777 & ~_umask())
            for file in fresh.rglob("*"):
                if file.is_file():  # safetensors' own are for their owner alone
                    file.chmod(0o666 & ~_umask())
                _sync(file)
            _sync(fresh)
            _swap(fresh, target)
        except BaseException:
            shutil.rmtree(fresh)
            raise
        _sync(target.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses within the block is told of `path`, not of a temporary sibling. Raises WriteError."""
    try:
        yield
    except TailoraError:  # some of them are OSErrors
        raise
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {_cause_and_remedy(path, error)}") from error


def _cause_and_remedy(path: Path, error: OSError) -> str:
    obstacle = next((each for each in (*reversed(path.parents), path) if os.path.isfile(each)), None)
    if error.errno in IN_THE_WAY and obstacle is not None:
        return f"{obstacle} is a file, not a folder; give another path, or move that file away"
    return f"{error.strerror or error}; {REMEDIES.get(error.errno or 0, 'give another path')}"


def _swap(fresh: Path, path: Path) -> None:
    if not path.exists():
        os.replace(fresh, path)
        return
    aside = Path(mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    try:
        os.replace(path, aside)
    except OSError:
        aside.rmdir()
        raise
    try:
        os.replace(fresh, path)
    except OSError:
        os.replace(aside, path)
        raise
    shutil.rmtree(aside)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def make_writable(folder: Path) -> None:
    """The folder is there and takes files. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"output_dir {folder} cannot be written to ({error.strerror}); give another --output-dir"
        ) from None


# ---- Safetensors with the same bytes for the same content, and read without trust.


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The file's bytes. Sorted: safetensors writes its metadata in hash order, another one in every process."""
    plain: dict[str, Tensor] = {}
    seen: set[tuple[int, int]] = set()  # safetensors refuses what shares memory, as a tied head does
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.data_ptr(), own.nbytes
        plain[name] = own.clone() if place in seen else own
        seen.add(place)
    raw = save(plain, dict(metadata) or None)  # no tensors and {} would give a header that is not JSON
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    described = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    ordered = {**described, **_by_offset(header)}
    text = json.dumps(ordered, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata. Raises FormatError for what is not a whole safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise FormatError(f"{path} is not a whole safetensors file: {error}; save or copy it again") from None


def _by_offset(header: Mapping[str, dict[str, list[int]]]) -> dict[str, dict[str, list[int]]]:
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    return dict(sorted(entries, key=lambda item: (item[1]["data_offsets"], item[0])))
