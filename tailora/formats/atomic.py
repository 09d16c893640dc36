"""Writing that is either whole or absent: a temporary sibling, fsync, rename."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp, mkstemp


def write_file(path: Path, content: bytes) -> None:
    """Put `content` at `path`; readers see the old file or the new one, never a part.

    Raises OSError where the folder cannot be written to; nothing is left behind.
    """
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
    """
    path = path.resolve()  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(mkdtemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent))
    try:
        yield fresh
        fresh.chmod(0o777 & ~_umask())
        for file in fresh.rglob("*"):
            _sync(file)
        _sync(fresh)
        _swap(fresh, path)
    except BaseException:
        shutil.rmtree(fresh)
        raise
    _sync(path.parent)


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
