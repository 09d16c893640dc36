"""The exceptions of tailora, and the exit codes of its commands.

    TailoraError
    ├── ConfigError(ValueError)      an unknown, invalid or contradictory setting
    ├── TargetError(ValueError)      a selector that matches nothing, or a layer that cannot be adapted
    ├── AdapterError(LookupError)     an adapter name that is unknown or already in use
    │   └── AdapterNotFoundError      a name or a path that does not exist on a server
    ├── RowsError(ValueError)        a batch whose rows do not match the chosen adapters
    ├── FormatError(ValueError)      a damaged or unsupported file
    │   ├── BaseMismatchError        an adapter for a different base model
    │   └── PatternError             a regular expression that takes too long
    ├── MergeError(RuntimeError)     weights that cannot be merged or unmerged
    ├── DataError(ValueError)        invalid data
    ├── CheckpointError(RuntimeError) a checkpoint that is missing, damaged or from a different run
    ├── DivergedError(ArithmeticError) a loss or gradient that is NaN or infinite
    ├── MemoryLimitError(MemoryError) the machine does not have enough memory
    │   └── MemoryInUseError          enough memory, but other programs use it
    ├── FetchError(OSError)          a failed download
    ├── ServerError(OSError)         a server that cannot be reached or answers incorrectly
    ├── ProcessFailedError(RuntimeError) another process of a distributed run has failed
    └── WriteError(OSError)          a file or folder that cannot be written

A message states what is wrong (with the value), what is expected, and what to do. It lists all problems at once.
"""

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches
from errno import ENOMEM
from importlib.util import find_spec
from pathlib import Path

# Exit codes besides 0, and 1 to 3 of the exceptions
GATE_NOT_MET = 4  # a quality gate, a plan that does not fit, or an adapter that a server does not use
WORSE = 5  # training raised the held-out loss
INTERRUPTED = 130  # Ctrl-C, SIGTERM or SIGHUP
CLOSE, MUCH_LESS = 0.6, 0.15  # ratios of difflib; 'streaming' for 'do_train' is below CLOSE


class TailoraError(Exception):
    """Base class of all exceptions of tailora. The command line exits with `exit_code`."""

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
    """Another process of a distributed run has failed. `traceback`: its traceback, if the cause is a bug in tailora."""

    def __init__(self, message: str, exit_code: int = 1, *, traceback: str = "") -> None:
        super().__init__(message)
        self.exit_code, self.traceback = exit_code, traceback


class WriteError(TailoraError, OSError):
    pass


OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "std::bad_alloc"),
    *("failed to map segment", "can't start new thread"),  # of a library, of a thread's stack
    *("could not create a primitive", "error return without exception set"),  # oneDNN; Python within an import
)


def is_out_of_memory(error: BaseException) -> bool:
    """True if memory ran out in Python, torch, a library or the system. Most of these report it only in their text."""
    if isinstance(error, TailoraError):
        return False
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == ENOMEM):
        return True
    has_text = isinstance(error, RuntimeError | ImportError | SystemError) or type(error).__name__ == "SafetensorError"
    return has_text and any(sign in str(error).lower() for sign in OUT_OF_MEMORY)


def nearest(name: str, known: Iterable[str], *, cutoff: float = CLOSE) -> str:
    """Returns '; did you mean x, y?' with the known names closest to `name`, or '' if none reaches `cutoff`."""
    return _question(_close_names(name, known, cutoff))


def nearest_path(path: Path, *, folders_only: bool = False) -> str:
    """Like `nearest`, with the names in the folder of a missing path; suffixes are ignored."""
    entries = path.parent.iterdir() if path.parent.is_dir() else ()
    names = {entry.stem: entry.name for entry in entries if entry.is_dir() or not folders_only}
    return _question([names[stem] for stem in _close_names(path.stem, names)])


def _close_names(name: str, known: Iterable[str], cutoff: float = CLOSE) -> list[str]:
    """Returns the known names that are close to `name`, closest first, without much worse matches."""
    matches = get_close_matches(name, list(dict.fromkeys(known)), cutoff=cutoff)
    ratios = {match: SequenceMatcher(None, match, name).ratio() for match in matches}
    return [match for match in matches if ratios[match] > max(ratios.values()) - MUCH_LESS]


def _question(matches: Iterable[str]) -> str:
    text = ", ".join(matches)
    return f"; did you mean {text}?" if text else ""


def listing(problems: list[str], most: int | None = None) -> str:
    """Returns one problem unchanged, and several as an indented list, of all or the first `most`."""
    if len(problems) == 1:
        return problems[0]
    lines = [f"  - {problem}" for problem in problems[:most]]
    if more := len(problems) - len(lines):
        lines.append(f"  - and {more} more")
    return "\n".join([f"{len(problems)} problems:", *lines])


def require_packages(*packages: str, extra: str) -> None:
    """Raises ConfigError if one of these packages is not installed. extra: the extra of tailora that installs them."""
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ConfigError(f"{', '.join(missing)} not installed; run: pip install 'tailora[{extra}]'")


def value_type(value: object) -> str:
    """Names the type of a JSON or YAML value for a message, such as 'a string'; dates and others by their class."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return {**names, list: "a list", dict: "an object"}.get(type(value), type(value).__name__)
