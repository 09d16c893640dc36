"""Where the command line writes: results to stdout, everything else to stderr.

rich honours NO_COLOR and FORCE_COLOR. A moving bar needs more than colour: a real terminal.
"""

import io
import json
import sys
from typing import Any

from rich.console import Console


def results() -> Console:
    return Console(highlight=False, emoji=False)


def logs() -> Console:
    return Console(stderr=True, highlight=False, emoji=False)


def on_terminal(console: Console) -> bool:
    """Whether lines can be redrawn; FORCE_COLOR makes `Console.is_terminal` true in a pipe."""
    return console.file.isatty() and not console.is_dumb_terminal


def print_json(payload: dict[str, Any]) -> None:
    """One object on one line, in ASCII, whatever the width and the encoding of the terminal."""
    sys.stdout.write(json.dumps(payload, allow_nan=False) + "\n")


def write_any_text() -> None:
    """What the encoding of a stream lacks is written as its escape: no answer of a model is a reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def note(text: str) -> None:
    aside(f"note: {text}")


def aside(text: str) -> None:
    logs().print(text, style="dim", markup=False, soft_wrap=True)
