"""Every error that tailora raises on purpose.

    TailoraError
    ├── ConfigError(ValueError)      a setting that is unknown, out of range, or contradicts another
    ├── TargetError(ValueError)      a selector that matches nothing, or a layer that cannot be adapted
    ├── AdapterError(LookupError)     an adapter name that is unknown or already taken
    │   └── AdapterNotFoundError      a name or a path that a server does not have
    ├── RowsError(ValueError)        a batch that does not have the rows that adapters were chosen for
    ├── FormatError(ValueError)      a file that is not what it should be
    │   ├── BaseMismatchError        an adapter made for another base model
    │   └── PatternError             a regular expression that takes too long
    ├── MergeError(RuntimeError)     weights that cannot be merged or unmerged
    ├── DataError(ValueError)        training data that cannot be learned from
    ├── CheckpointError(RuntimeError) a checkpoint that is missing, damaged or of another run
    ├── DivergedError(ArithmeticError) a loss or gradient that is not finite
    ├── MemoryLimitError(MemoryError) the machine's memory is too small for what was asked
    │   └── MemoryInUseError          it is large enough, but others use it now
    ├── FetchError(OSError)          something that had to be downloaded and was not
    ├── ServerError(OSError)         a server that cannot be asked, or does not answer as it should
    ├── ProcessFailedError(RuntimeError) another process of a distributed run has failed
    └── WriteError(OSError)          a file or folder that cannot be written

A message says what was asked, what there is, and what to do. All problems of an error are gathered before it is raised.
"""

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches
from errno import ENOMEM
from importlib.util import find_spec
from pathlib import Path

INTERRUPTED = 130  # exit code after Ctrl-C, SIGTERM or SIGHUP
CLOSE, MUCH_LESS = 0.6, 0.15  # of difflib's ratio; below CLOSE is 'streaming' for 'do_train'


class TailoraError(Exception):
    """Base of all errors below. `exit_code` is what the command line returns for it."""

    exit_code = 1

    def __str__(self) -> str:  # LookupError and OSError would print the repr
        return " ".join(str(part) for part in self.args)


class TailoraWarning(UserWarning):
    """Category of all warnings of tailora. The command line prints them as notes."""


class ConfigError(TailoraError, ValueError):
    exit_code = 2


class TargetError(TailoraError, ValueError):
    exit_code = 2


class AdapterError(TailoraError, LookupError):
    exit_code = 2


class AdapterNotFoundError(AdapterError):
    pass


class RowsError(TailoraError, ValueError):
    exit_code = 2


class FormatError(TailoraError, ValueError):
    exit_code = 2


class PatternError(FormatError):
    pass


class BaseMismatchError(FormatError):
    pass


class MergeError(TailoraError, RuntimeError):
    pass


class DataError(TailoraError, ValueError):
    exit_code = 2


class CheckpointError(TailoraError, RuntimeError):
    exit_code = 2


class DivergedError(TailoraError, ArithmeticError):
    exit_code = 3


class MemoryLimitError(TailoraError, MemoryError):
    pass


class MemoryInUseError(MemoryLimitError):
    pass


class FetchError(TailoraError, OSError):
    pass


class ServerError(TailoraError, OSError):
    pass


class ProcessFailedError(TailoraError, RuntimeError):
    """Another process of a distributed run has failed. `traceback`: of that process, if it has met a bug of tailora."""

    def __init__(self, message: str, exit_code: int = 1, *, traceback: str = "") -> None:
        super().__init__(message)
        self.exit_code, self.traceback = exit_code, traceback


class WriteError(TailoraError, OSError):
    pass


OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "std::bad_alloc"),
    *("failed to map segment", "can't start new thread"),  # a library, the stack of a thread
    *("could not create a primitive", "error return without exception set"),  # oneDNN; Python within an import
)


def is_out_of_memory(error: BaseException) -> bool:
    """True if memory ran out in Python, torch, a library or the system; most of them say so only in their text."""
    if isinstance(error, TailoraError):
        return False
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == ENOMEM):
        return True
    says_so = isinstance(error, RuntimeError | ImportError | SystemError) or type(error).__name__ == "SafetensorError"
    return says_so and any(sign in str(error).lower() for sign in OUT_OF_MEMORY)


def nearest(name: str, known: Iterable[str], *, cutoff: float = CLOSE) -> str:
    """Returns '; did you mean x, y?' with the known names closest to `name`, or '' if none is as close as `cutoff`."""
    return _question(_close_names(name, known, cutoff))


def nearest_path(path: Path, *, folders_only: bool = False) -> str:
    """Returns what `nearest` does, with the names in the folder of a missing path; suffixes are not compared."""
    entries = path.parent.iterdir() if path.parent.is_dir() else ()
    names = {entry.stem: entry.name for entry in entries if entry.is_dir() or not folders_only}
    return _question([names[stem] for stem in _close_names(path.stem, names)])


def _close_names(name: str, known: Iterable[str], cutoff: float = CLOSE) -> list[str]:
    """Returns the known names that are close to `name`, the closest first, without those that are much less close."""
    matches = get_close_matches(name, list(known), cutoff=cutoff)
    ratios = {match: SequenceMatcher(None, match, name).ratio() for match in matches}
    return [match for match in matches if ratios[match] > max(ratios.values()) - MUCH_LESS]


def _question(matches: Iterable[str]) -> str:
    text = ", ".join(matches)
    return f"; did you mean {text}?" if text else ""


def listing(problems: list[str], most: int | None = None) -> str:
    """Returns one problem as it is, several as a counted, indented list of the first `most` of them, or of all."""
    if len(problems) == 1:
        return problems[0]
    lines = [f"  - {problem}" for problem in problems[:most]]
    if more := len(problems) - len(lines):
        lines.append(f"  - and {more} more")
    return "\n".join([f"{len(problems)} problems:", *lines])


def require_packages(*packages: str, extra: str) -> None:
    """Raises ConfigError when one of these is not installed; `extra` is the extra of tailora that brings them."""
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ConfigError(f"this needs {', '.join(missing)}, which is not installed: pip install 'tailora[{extra}]'")
