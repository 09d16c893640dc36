"""The program `tailora`: runs a command, and turns every failure into a message and an exit code.

    0 success   1 failure   2 invalid usage or settings   3 diverged   4 gate or plan not met
    5 the run made the model worse   130 interrupted

A message goes to stderr. With `--json` the last line of stdout is {"error": {"type", "message", "exit_code"}}.
An unexpected exception is a bug of tailora: its traceback is printed to stderr.

If a run has several processes, only rank 0 prints notes, and only one rank prints an error: see `fail`.
"""

import io
import json
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from cyclopts import App, CycloptsError, Parameter, UnknownOptionError, UnusedCliTokensError
from cyclopts.help import DefaultFormatter, HelpPanel
from cyclopts.help.specs import DescriptionColumn, NameColumn, NameRenderer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from tailora import __version__
from tailora.core.setting_names import our_name
from tailora.errors import (
    INTERRUPTED,
    MemoryLimitError,
    ProcessFailedError,
    TailoraError,
    TailoraWarning,
    is_out_of_memory,
)
from tailora.quiet import TORCHAO_LOGGERS, quiet_loggers
from tailora.report.format import printable
from tailora.train import failures, launch

COMMANDS = {  # name -> file in this folder, what `tailora --help` says
    "demo": ("train", "Fine-tune a small model on real chats and see what changed."),
    "plan": ("plan", "Estimate the memory of a run, and show what would be trained."),
    "train": ("train", "Fine-tune a model on your data."),
    "compare": ("study", "Compare LoRA with full fine-tuning on your model and data."),
    "eval": ("eval", "Evaluate an adapter and its base model on held-out data."),
    "search": ("study", "Search for the best settings, and for cheaper ones that work just as well."),
    "rows": ("study", "Find the training rows that hurt, and prove it by training without them."),
    "curve": ("study", "Measure whether more data, or a higher rank, would help."),
    "runs": ("runs", "List runs and studies with their results, or compare two runs."),
    "report": ("study", "Regenerate report.html for a run or a study."),
    "chat": ("chat", "Chat with a model, with or without adapters."),
    "predict": ("predict", "Predict labels, or generate answers, for the rows of a file or for prompts."),
    "combine": ("adapters", "Combine several adapters into one."),
    "shrink": ("adapters", "Reduce the rank of an adapter."),
    "extract": ("adapters", "Extract an adapter from a fine-tuned model and its base model."),
    "inspect": ("inspect", "Show what an adapter learned in each layer, with advice."),
    "export": ("export", "Export an adapter for llama.cpp, Ollama, vLLM, mlx-lm or PEFT, or merge it."),
    "push": ("hub", "Upload an adapter to the Hugging Face Hub, with a model card."),
    "pull": ("hub", "Download an adapter from the Hugging Face Hub."),
    "serve": ("serve", "Serve a model and any number of adapters with an OpenAI-compatible API."),
    "playground": ("serve", "Compare two models on a server side by side in the browser."),
    "verify": ("verify", "Verify that a server really uses an adapter."),
    "data": ("data", "Show what would be trained on, token by token."),
    "doctor": ("doctor", "Show what this machine can do."),
}
SYNONYMS = {"predict": ("generate",)}  # words for which the error about an unknown command suggests this one
DATA_COMMANDS = ("demo", "plan", "train", "compare", "eval", "search", "curve")  # with the flag --data
SUMMARY = "Fine-tune a language model with LoRA, and know whether it worked."
EPILOGUE = """\
Exit codes: 0 success; 1 failure; 2 invalid usage or settings; 3 diverged;
4 quality gate not met, run does not fit, or adapter not in use;
5 worse than before training; 130 interrupted."""
HELP_FLAGS = ("--help", "-h", "--help-all")
HELP_COLUMNS = (NameColumn.copy(renderer=NameRenderer(max_width=34)), DescriptionColumn)
ADVANCED = "Advanced settings"  # section of --help-all
ENVIRONMENT = {  # for torch's libraries; variables that are already set stay unchanged
    "GOMP_SPINCOUNT": "10000",  # of idle OpenMP threads; the default of 300,000 is slow if other processes run
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",  # compiled shapes; 1024 batches of many lengths took 2.9 GB, now 2.4
    "LRU_CACHE_CAPACITY": "64",  # torch's cache around oneDNN; took 1.07 GB, now 0.71, at the same speed
}
NOISY_LOGGERS = (*TORCHAO_LOGGERS, "bitsandbytes")
PROGRAMS = ("tailora ", "torchrun ", "accelerate ", "python ")  # a line that begins so is a command to copy
ARGUMENTS: ContextVar[list[str]] = ContextVar("arguments")  # of the running command line
LIVE: ContextVar[Console | None] = ContextVar("live")  # the console with the progress bar
STDIN = "/dev/stdin"  # what - means
MAX_LINES = 21  # of a message; --json prints it in full
BUG = "This is a bug in tailora. Please report it with the lines below."
MEMORY_ADVICE = "try a smaller --model, --max-length or --max-new-tokens, or close other programs"


def main(argv: Sequence[str] | None = None, *, interrupted: Callable[[], bool] = lambda: False) -> int:
    """Runs one command line and returns its exit code.

    interrupted: True if a signal has raised KeyboardInterrupt. Libraries may replace it by a different exception.
    """
    for name, value in ENVIRONMENT.items():
        if not (name == "GOMP_SPINCOUNT" and "OMP_WAIT_POLICY" in os.environ):  # GOMP_SPINCOUNT would override it
            os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape characters that its encoding lacks, such as \u96ea in ASCII
            stream.reconfigure(errors="backslashreplace")
    tokens = list(sys.argv[1:] if argv is None else argv)
    if tokens[:1] == ["--"]:  # torchrun forwards it; without it, torchrun would read --r itself
        tokens = tokens[1:]
    ARGUMENTS.set(tokens)
    readable = [STDIN if token == "-" else token for token in tokens]  # cyclopts takes - for an option
    as_json = "--json" in tokens
    try:
        with quiet_loggers(*NOISY_LOGGERS), warnings_as_notes():
            code = app(tokens)(readable, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except BrokenPipeError:  # as in `tailora ... | head`; otherwise Python reports a second error at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as caught:
        error = _error_to_show(caught, interrupted())
        if isinstance(error, TailoraError | CycloptsError | OSError | KeyboardInterrupt):
            return fail(error, as_json)
        if _report_to_launcher(error, traceback.format_exc()):
            return 1
        stderr().print(BUG, style="bold red")
        if as_json:
            print_json_error(error)
        raise
    return int(code or 0)


def app(tokens: Sequence[str] = ()) -> App:
    """Returns all commands. The file of a command is imported when the command is called.

    The command in `tokens` gets no summary, so that its --help shows the full docstring.
    """
    root = App(
        name="tailora",
        help=SUMMARY,
        help_epilogue=EPILOGUE,
        help_formatter=HelpFormatter(column_specs=HELP_COLUMNS),
        help_flags=HELP_FLAGS,
        version=__version__,
        default_parameter=Parameter(negative_iterable=()),
        suppress_keyboard_interrupt=False,  # `main` prints how to resume
    )
    for order, (name, (file, summary)) in enumerate(COMMANDS.items()):
        called = list(tokens[:1]) == [name]
        shown: Any = {"help": None if called else summary, "sort_key": order, "synonym": SYNONYMS.get(name)}
        root.command(f"tailora.cli.{file}:{name}", name=name, **shown)
    return root


class HelpFormatter(DefaultFormatter):
    """Shows the advanced settings only with --help-all."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        if panel.title != ADVANCED or "--help-all" in ARGUMENTS.get([]):
            super().__call__(console, options, panel)
        else:
            console.print(f"{len(panel.entries)} more settings: --help-all\n")


# ---- Failures


def _error_to_show(error: BaseException, is_interrupted: bool) -> BaseException:
    """Replaces an error due to a signal or too little memory with a clear one, unless another rank prints it."""
    explained, is_shown_here = error, failures.shown_by(error) in (None, launch.rank())
    if is_interrupted and is_shown_here and not isinstance(error, KeyboardInterrupt):
        explained = KeyboardInterrupt()
    elif is_out_of_memory(error):
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        explained = MemoryLimitError(f"out of memory: {cause}\n{MEMORY_ADVICE}")
    if explained is not error:
        explained.__cause__ = error
    return explained


def fail(error: BaseException, as_json: bool) -> int:
    """Prints an error and returns its exit code.

    If `tailora.train.launch` started this process, the parent process prints the error instead. If torchrun did, only
    one rank prints it: the one that the processes agreed on (`failures.fail_together`). Before they are connected, this
    is rank 0, unless torch's launcher hides the errors of the other ranks.
    """
    code, message = exit_code(error), message_of(error)
    if (number := failures.shown_by(error)) is not None:
        is_shown_here = number == launch.rank()
    else:
        is_hidden = isinstance(error, KeyboardInterrupt) or failures.ERROR_FILE in os.environ
        is_shown_here = is_rank_0() or not is_hidden
    if _report_to_launcher(error) or not is_shown_here:
        return code
    if isinstance(error, ProcessFailedError) and error.traceback:
        stderr().print(BUG, style="bold red")
        print_text(stderr(), error.traceback)
    label = "interrupted" if code == INTERRUPTED else "error"
    lines = message.splitlines()
    if (more := len(lines) - MAX_LINES) > 1:  # the same problem can affect hundreds of layers
        message = "\n".join([*lines[:MAX_LINES], f"  ... and {more} more lines (use --json to see all)"])
    print_text(stderr(), f"{label}: {message}" if message else label, "red")
    if as_json:
        print_json_error(error)
    return code


def _report_to_launcher(error: BaseException, bug: str = "") -> bool:
    """Passes the error to the launcher. Returns True if there is one, which prints it. bug: the traceback of a bug."""
    known = {"message": message_of(error), "exit_code": exit_code(error), "traceback": bug}
    return failures.leave_failure(error, **known) and launch.is_launched_by_tailora()


def message_of(error: BaseException) -> str:
    """Returns the message. For command line errors, it ends with a pointer to --help."""
    if not isinstance(error, CycloptsError):
        return str(error)
    message, command = str(error).removesuffix("."), " ".join(error.command_chain or ())
    if isinstance(error, UnknownOptionError):
        flags = {name for item in error.argument_collection for name in item.names}
        known, first = {name.lstrip("-").replace("-", "_") for name in flags}, error.token.keyword or error.token.value
        if ours := our_name(first.lstrip("-").removeprefix("no-").replace("-", "_"), known, is_flag=True):
            message = f"Unknown option: {first}. {ours[:1].upper()}{ours[1:]}"
    elif isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        unused = shlex.join(error.unused_tokens)
        hint = f". To pass data, use --data {unused}" if command in DATA_COMMANDS else ""
        message = f"unexpected argument {unused}{hint}"
    message = message if message.endswith("?") else f"{message}."
    return f"{message} Run `tailora {command} --help-all` for all flags" if command else str(error)


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


# ---- Output: results go to stdout, everything else to stderr
#
# User texts such as paths and prompts may contain brackets, so consoles do not interpret markup.
# rich honours NO_COLOR and FORCE_COLOR. A progress bar needs more than color: a real terminal.


class SafeConsole(Console):
    """Removes control characters: labels, metadata and the names of files and servers could control the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def stdout() -> Console:
    return SafeConsole(markup=False, highlight=False, emoji=False)


def stderr() -> Console:
    """Returns the console with the current progress bar, which prints above it, or a new console."""
    return LIVE.get(None) or SafeConsole(stderr=True, markup=False, highlight=False, emoji=False)


def write_stdout(text: str) -> None:
    """Writes text unchanged and without delay; on a terminal, control characters are removed."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def on_terminal(console: Console) -> bool:
    """True if lines can be redrawn. `Console.is_terminal` is not enough: FORCE_COLOR sets it in a pipe, too."""
    return console.file.isatty() and not console.is_dumb_terminal


def print_text(console: Console, text: str, style: str | None = None) -> None:
    """Prints lines of text. On a terminal they are wrapped between words, except for commands to copy."""
    for line in text.splitlines():
        console.print(line, style=style, soft_wrap=not console.is_terminal or line.startswith(PROGRAMS))


def is_rank_0() -> bool:
    return launch.rank() == 0


def log(text: str) -> None:
    """Prints to stderr, on rank 0 only."""
    if is_rank_0():
        print_text(stderr(), text, "dim")


def note(text: str) -> None:
    log(f"note: {text}")


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Within the block, tailora's warnings are printed as notes, without a line of source code."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def print_warning(message: Warning | str, category: type[Warning], *where: Any, **to: Any) -> None:
            if issubclass(category, TailoraWarning):
                note(str(message))
            else:
                show(message, category, *where, **to)

        warnings.showwarning = print_warning
        yield


def print_json(payload: dict[str, Any]) -> None:
    """Prints one object on one line, in ASCII, regardless of the terminal's width and encoding."""
    sys.stdout.write(json.dumps(payload, allow_nan=False) + "\n")


def print_json_error(error: BaseException) -> None:
    print_json({"error": {"type": type(error).__name__, "message": message_of(error), "exit_code": exit_code(error)}})
