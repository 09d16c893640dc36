"""`tailora`: finds the command, runs it, and turns every failure into a message and an exit code.

    0 done   1 failed   2 usage or settings   3 diverged   4 a quality gate not met   130 interrupted

A message goes to stderr. With `--json` the last line on stdout is {"error": {"type", "message", "exit_code"}}.
An exception that nobody expected is a bug of tailora and keeps its traceback, on stderr.
"""

import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from cyclopts import App, CycloptsError
from cyclopts.help import DefaultFormatter
from cyclopts.help.specs import DescriptionColumn, NameColumn, NameRenderer
from rich.console import Console

from tailora import __version__
from tailora.errors import MemoryLimitError, TailoraError
from tailora.quiet import hushed

# ---- Where the command line writes: results to stdout, everything else to stderr.
#
# rich honours NO_COLOR and FORCE_COLOR. A moving bar needs more than colour: a real terminal.


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


# ----


COMMANDS = {
    "demo": "Fine-tune a small model on real chats, and see what it changed.",
    "plan": "What a run would train, whether it fits, and how long it takes.",
    "train": "Fine-tune a model on your data.",
    "compare": "Is LoRA as good as full fine-tuning here? Each at its own learning rate, over several seeds.",
    "eval": "Loss, accuracy, exact match of an adapter beside its base; gates for CI.",
    "search": "Find the best settings here, and the cheapest that are as good.",
    "report": "Make the page of a run or a study again.",
    "chat": "Talk to a model, with or without adapters.",
    "generate": "Answer prompts once.",
    "combine": "Make one adapter out of several.",
    "shrink": "Make an adapter smaller.",
    "extract": "Get the adapter between a base and a fully tuned model.",
    "inspect": "Look into an adapter: where it learned what, and what follows for the next run.",
    "export": "Take an adapter to llama.cpp, Ollama, vLLM, mlx-lm, PEFT, or merge it.",
    "data": "Show what training would learn from a file.",
    "doctor": "Show what this machine can do.",
}
ENVIRONMENT = {  # read by torch's libraries when torch is loaded; what the user has set stays
    "GOMP_SPINCOUNT": "10000",  # spins of a waiting thread: 300,000 crawl beside other work, none lose a third alone
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",  # of 1024 compiled shapes; each row has its own length: 2.9 GB, now 2.4
    "LRU_CACHE_CAPACITY": "64",  # the same of torch's own cache around oneDNN: 1.07 GB, now .71, at the same speed
}
TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes")  # transformers imports the first unasked; both warn
INTERRUPTED = 130
LINES = 21  # of a message
SUMMARY = "Fine-tune a language model with LoRA, and know whether it worked."
LIGHTER = "what helps: a smaller --model, a smaller --max-length or --max-new-tokens, closing other programs"
EPILOGUE = "Exit codes: 0 done, 1 failed, 2 usage or settings, 3 diverged, 4 a quality gate not met, 130 interrupted."
HELP = DefaultFormatter(column_specs=(NameColumn.copy(renderer=NameRenderer(max_width=34)), DescriptionColumn))


def app() -> App:
    """The commands by name; a command's module is imported when it is called."""
    root = App(
        name="tailora",
        help=SUMMARY,
        help_epilogue=EPILOGUE,
        help_formatter=HELP,
        version=__version__,
        suppress_keyboard_interrupt=False,  # ours says more than exit
    )
    for order, (name, summary) in enumerate(COMMANDS.items()):
        root.command(f"tailora.cli.{name}:{name}", name=name, help=summary, sort_key=order)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    for name, value in ENVIRONMENT.items():
        if not (name == "GOMP_SPINCOUNT" and "OMP_WAIT_POLICY" in os.environ):  # which it would override
            os.environ.setdefault(name, value)
    write_any_text()
    tokens = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in tokens
    try:
        with hushed(*TALKATIVE):
            code = app()(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except BrokenPipeError:  # `tailora ... | head` has seen enough; without this the interpreter complains at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (TailoraError, CycloptsError, OSError, KeyboardInterrupt) as error:
        return failed(error, as_json)
    except Exception as error:
        if ran_out_of_memory(error):
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            return failed(MemoryLimitError(f"out of memory: {cause}\n{LIGHTER}"), as_json)
        logs().print("This is a bug in tailora: please report it with the lines below.", style="bold red")
        if as_json:
            print_error(error)
        raise
    return int(code or 0)


def ran_out_of_memory(error: Exception) -> bool:
    """As torch or Python says it; where torch was not needed it is not loaded to ask."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from tailora.train.memory import is_out_of_memory

    return is_out_of_memory(error)


def failed(error: BaseException, as_json: bool) -> int:
    """Says what went wrong, and returns the exit code for it."""
    code, message = exit_code(error), str(error)
    label = "interrupted" if code == INTERRUPTED else "error"
    logs().print(f"{label}: {shortened(message)}" if message else label, style="red", markup=False, soft_wrap=True)
    if as_json:
        print_error(error)
    return code


def shortened(message: str) -> str:
    """For a screen: hundreds of layers can have one and the same problem. JSON and Python have them all."""
    lines = message.splitlines()
    more = len(lines) - LINES
    return message if more <= 1 else "\n".join([*lines[:LINES], f"  ... and {more} lines more; --json gives them all"])


def print_error(error: BaseException) -> None:
    """The line of --json."""
    print_json({"error": {"type": type(error).__name__, "message": str(error), "exit_code": exit_code(error)}})


def exit_code(error: BaseException) -> int:
    match error:
        case TailoraError():
            return error.exit_code
        case KeyboardInterrupt():
            return INTERRUPTED
        case CycloptsError() | FileNotFoundError() | NotADirectoryError() | IsADirectoryError() | PermissionError():
            return 2
        case _:
            return 1
