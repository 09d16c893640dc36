"""Files that are written completely or not at all, and safetensors with the same bytes for the same content.

New content goes to a temporary sibling, is flushed to the disk and renamed, so no reader sees half of a file.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp, mkstemp
from typing import TYPE_CHECKING, Any, TypeVar, cast

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from tailora.core.cache import cache_folder
from tailora.errors import ConfigError, FetchError, FormatError, TailoraError, WriteError, value_type

if TYPE_CHECKING:
    from torch import Tensor

Kind = TypeVar("Kind")
REMEDIES = {  # error number of the system -> what to do
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "use a folder that you may write to"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or use a folder on a different disk"),
}

TEMPORARY = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}(?P<suffix>\.new|\.old|)")  # our names of temporary files

# ---- Atomic writing


def demo_folder() -> Path:
    """Returns the folder of the demo's model and data, which `data.demo` creates."""
    return cache_folder() / "demo-1"  # increase the number when the files of data.demo change


def write_file(path: Path, content: bytes) -> None:
    """Readers see the old file or the new one, never a part. Raises WriteError, and leaves nothing behind."""
    with wrap_os_error(path):
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
        _fsync(path.parent)


def partial_file(path: Path) -> Path:
    """Returns the file that `write_lines` writes to until it is complete."""
    return path.with_name(f"{path.name}.partial")


@contextmanager
def write_lines(path: Path) -> Iterator[Callable[[str], None]]:
    """Yields a function that adds a line to a partial file, which is renamed to `path` at the end of the block.

    If the block fails, the partial file stays with the lines so far; without lines it is removed.
    Raises WriteError if the file cannot be written.
    """
    partial = partial_file(path)
    with wrap_os_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8") as file:
                yield lambda line: print(line, file=file, flush=True)
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            if partial.exists() and not partial.stat().st_size:
                partial.unlink()
        _fsync(path.parent)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path`. It is renamed to `path` at the end of the block, or removed on an error.

    An existing folder is moved aside first and deleted last, so that a crash leaves at least one of the two.
    Raises WriteError, also for files that the block could not write.
    """
    with wrap_os_error(path):
        target = path.resolve()  # a link stays a link
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(mkdtemp(prefix=f".{target.name}.", suffix=".new", dir=target.parent))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            for file in temporary.rglob("*"):
                if file.is_file():  # safetensors makes files that only their owner can read
                    file.chmod(0o666 & ~_umask())
                _fsync(file)
            _fsync(temporary)
            _replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary)
            raise
        _fsync(target.parent)


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Returns `folder`, after `build(temporary sibling)` if it does not exist yet.

    Only a complete folder gets the name. A second process waits for the first; a lock ends with its process.
    Raises FetchError.
    """
    if folder.is_dir():
        return folder
    try:
        with wrap_os_error(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{folder.name}.lock")):
                if not folder.is_dir():
                    for orphan in folder.parent.glob(f".{folder.name}.*.new"):  # from a killed process
                        shutil.rmtree(orphan)
                    with replace_folder(folder) as temporary:
                        build(temporary)
    except WriteError as error:
        raise FetchError(f"{error}, or set TAILORA_HOME to a folder with enough space") from error
    return folder


def remove_leftovers(folder: Path, is_known: Callable[[str], bool]) -> None:
    """Removes temporary files of killed processes, for the names that `is_known` accepts.

    A folder that was moved aside but never replaced is moved back. No other process may write at the same time.
    """
    with wrap_os_error(folder):
        for path in list(folder.iterdir()):
            match = TEMPORARY.fullmatch(path.name)
            if match is None or not is_known(match["name"]):
                continue
            target = folder / match["name"]
            if path.is_file():
                path.unlink()
            elif match["suffix"] == ".old" and not target.exists() and any(path.iterdir()):
                path.rename(target)
            else:
                shutil.rmtree(path)


def create_output_folder(folder: Path) -> None:
    """Creates the folder if necessary. Raises ConfigError if no file can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"output_dir {folder} is not writable ({error.strerror}); use a different --output-dir"
        ) from None


def check_new_file(path: Path, *, overwrite: bool) -> None:
    """Raises ConfigError for a folder or an existing file, unless `overwrite`, and WriteError without write access."""
    with wrap_os_error(path):
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; use the path of a file")
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} already exists; use a different file, or --overwrite")
        parent = next(parent for parent in path.absolute().parents if parent.exists())
        with TemporaryFile(dir=parent):
            pass


@contextmanager
def wrap_os_error(path: Path) -> Iterator[None]:
    """Turns an OSError in the block into a WriteError that names `path` instead of a temporary sibling."""
    try:
        yield
    except TailoraError:  # some of them are OSErrors
        raise
    except Exception as caught:
        error: Exception = caught
        if not isinstance(error, OSError):  # tokenizers and safetensors (Rust) only have its number in their message
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            error = OSError(int(number[1]), os.strerror(int(number[1])))
        cause = f"{error.strerror or error}; {REMEDIES.get(error.errno or 0, 'use a different path')}"
        file = next((parent for parent in (*reversed(path.parents), path) if os.path.isfile(parent)), None)
        if file is not None and error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            cause = f"{file} is a file, not a folder; use a different path, or move that file away"
        raise WriteError(f"cannot write {path}: {cause}") from caught


def _replace(new: Path, path: Path) -> None:
    if not path.exists():
        os.replace(new, path)
        return
    backup = Path(mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    try:
        os.replace(path, backup)
    except OSError:
        backup.rmdir()
        raise
    try:
        os.replace(new, path)
    except OSError:
        os.replace(backup, path)
        raise
    shutil.rmtree(backup)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


# ---- Reading


def check_is_file(path: Path) -> None:
    """Raises FormatError unless there is a regular file: reading a device or a named pipe may never end."""
    if not os.path.lexists(path):
        raise FormatError(f"{path} does not exist")
    if not path.is_file():
        raise FormatError(f"{path} is a folder, a device or a broken link, not a file; copy the adapter again")


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises FormatError if the file is missing, not a regular file or not a JSON object."""
    settings = _read_json(path)
    if not isinstance(settings, dict):
        raise FormatError(f"{path}: expected a JSON object, got {value_type(settings)}")
    return settings


def read_own_json(path: Path, kind: type[Kind], remedy: str) -> Kind:
    """Reads a file that we wrote, as a value of this type. Raises FormatError, with the remedy, if it is damaged."""
    try:
        return TypeAdapter(kind).validate_python(_read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise FormatError(f"{path} is damaged ({where}{first['msg']}); {remedy}") from None
    except FormatError as error:
        raise FormatError(f"{error}; {remedy}") from None


def _read_json(path: Path) -> Any:
    check_is_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from None


# ---- Safetensors


def safetensors_bytes(tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> bytes:
    """Returns the same bytes for the same content: safetensors itself writes metadata in an order that differs."""
    from safetensors.torch import save  # imports torch, which atomic writing does not need

    contiguous: dict[str, Tensor] = {}
    addresses: set[tuple[int, int]] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.data_ptr(), tensor.nbytes
        # safetensors refuses tensors that share memory, as a tied head does
        contiguous[name] = tensor.clone() if address in addresses else tensor
        addresses.add(address)
    raw = save(contiguous, dict(metadata) or None)  # no tensors and {} would give a header that is not JSON
    return with_metadata(raw, metadata)


def safetensors_header(raw: bytes) -> dict[str, Any]:
    """Returns tensor name -> dtype, shape and offsets; the metadata of the file are under "__metadata__"."""
    return cast(dict[str, Any], json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]))


def with_metadata(raw: bytes, metadata: Mapping[str, str]) -> bytes:
    """Returns the safetensors file with this metadata and a sorted header."""
    size, entries = int.from_bytes(raw[:8], "little"), safetensors_header(raw)
    entries.pop("__metadata__", None)
    header = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    header |= dict(sorted(entries.items(), key=lambda entry: (entry[1]["data_offsets"], entry[0])))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def read_safetensors(path: Path) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Returns tensors and metadata; 8-bit floats as float32, with which torch computes more. Raises FormatError."""
    from safetensors.torch import load  # imports torch, which atomic writing does not need

    check_is_file(path)
    try:
        # Not by safe_open: a file that shrinks while it is mapped kills the process, and safetensors 0.8 keeps two
        # numbers of every tensor that it reads, which adds up in a server
        content = path.read_bytes()
        tensors = load(content)
        metadata: dict[str, str] = safetensors_header(content).get("__metadata__", {})
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is not a complete safetensors file: {error}; save or copy it again") from None
    except (KeyError, RuntimeError) as error:
        raise FormatError(f"{path} contains tensors of an unsupported type: {error}; save it as floats") from None
    for name in sorted(tensors):  # adapters would be written again in the order of `load`, which differs
        tensor = tensors.pop(name)
        is_8_bit_float = tensor.is_floating_point() and tensor.dtype.itemsize == 1
        tensors[name] = tensor.float() if is_8_bit_float else tensor
    return tensors, metadata
