"""Exit codes, messages, streams."""

import io
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from command_line import check_refused
from report.contents import CONTENTS
from rich.table import Table

from tailora import cli, errors
from tailora.cli.flags import FIELDS
from tailora.cli.main import COMMANDS, exit_code, main, note, stderr, stdout, warnings_as_notes, write_stdout
from tailora.cli.progress import counter
from tailora.errors import TailoraWarning
from tailora.report.files import page_of
from tailora.report.terminal import print_page

TAILORA = [sys.executable, "-m", "tailora.cli"]


@pytest.mark.parametrize("tokens", [["--help"], [], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_and_version_exit_with_0(
    tokens: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(tokens) == 0
    shown = capsys.readouterr()
    assert shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
    if len(tokens) == 2:
        assert COMMANDS[tokens[0]][1].rstrip(".") in " ".join(shown.out.split())
    assert not shown.err


@pytest.mark.parametrize(
    ("tokens", "hint"),
    [
        (["trian"], 'Did you mean "train"'),
        (["generate", "--prompt", "hi"], 'Did you mean "predict"?'),
        (["train", "--learning-rat", "1"], "Did you mean --learning-rate"),
        (["train", "--r", "0", "--learning-rate", "x"], "  - --r '0': input should be greater than or equal to 1"),
        (["demo", "--max-step", "1"], "Did you mean --max-steps"),
        (["train", "--dtype", "float8"], "float32"),
        (["train", "--learning-rate", "fast"], "error: --learning-rate 'fast': input should be a valid number\n"),
        (["train", "chats.jsonl"], "unexpected argument chats.jsonl. To pass data, use --data chats.jsonl"),
        (["export", "--to", "gguf"], "parameter adapter requires an argument"),
        (["train", "--zzzz", "3"], "Unknown option: --zzzz. Run `tailora train --help-all` for all flags"),
        (["demo", "--model", "./absent"], "is not a local folder"),
        (["train", "--model", "./absent"], "not a Hub id. Use a folder, a Hub id such as owner/name, or 'demo'\n"),
    ],
)
def test_a_mistaken_command_line_exits_with_2_and_a_hint_and_leaves_nothing(
    tokens: list[str], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused(hint, *tokens)
    assert not list(tmp_path.rglob("*demo*"))
    assert not list(tmp_path.rglob(".lock"))


WRONG = {
    "data chat.jsonl --model demo": "no such file or folder; did you mean chats.jsonl?\n",
    "plan --model demo --data chat.jsonl": "did you mean chats.jsonl?",
    "train --model ./nomodel": "model './nomodel' is not a local folder",
    "train --adapter outt": "outt is not a folder; did you mean out?",
    "compare --forgetting-data nope.jsonl": "data nope.jsonl: no such file",
    "compare --minutes ten": "--minutes 'ten': input should be a valid number\n",
    "search --data nope.jsonl": "data nope.jsonl: no such file",
    "search --space r=4,four": "space: r=4,four: r = 'four': input should be a valid integer\n",
    "plan --device 'RTX 4900'": "unknown graphics card 'RTX 4900'; did you mean rtx 4090",
    "inspect out --model chats.jsonl": "model 'chats.jsonl' is a file; use a folder, a GGUF file, a Hub id",
    "eval outt --data chats.jsonl": "outt is not a folder; did you mean out?\nexpected the folder of a run",
    "extract --model ./nomodel --tuned demo --output-dir new": "model './nomodel' is not a local folder",
    "chat --max-new-tokens x": '--max-new-tokens: unable to convert "x" into int. Run `tailora chat --help-all`',
    "chat --top-p 2": 'Invalid value "2.0" for --top-p. Must be <= 1',
    "combine --method sum --adapter out --output-dir new": 'Choose from: "cat", "svd", "ties", "dare"',
    "train --model ./no --data no.csv": "2 problems:\n  - model './no' is not a local folder, ",
}
RUN_LINES = """
import json, shlex, sys
from tailora.cli.main import main
for line in json.load(sys.stdin):
    print(json.dumps([line, main(shlex.split(line)), "torch" in sys.modules]), flush=True)
    sys.stderr.write("\\0")
"""


def test_a_wrong_value_or_path_is_noticed_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    (tmp_path / "out" / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "demo"}')
    for name in ("chats.jsonl", "held-out.jsonl"):
        (tmp_path / name).touch()
    before = sorted(tmp_path.rglob("*"))
    process = subprocess.run(
        [sys.executable, "-c", RUN_LINES], cwd=tmp_path, input=json.dumps(list(WRONG)), capture_output=True, text=True
    )
    assert list(map(json.loads, process.stdout.splitlines())) == [[line, 2, False] for line in WRONG], process.stderr
    messages = dict(zip(WRONG, process.stderr.split("\0"), strict=False))
    assert [line for line, hint in WRONG.items() if hint not in messages[line]] == [], process.stderr
    assert "held-out" not in process.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_with_json_the_error_is_the_last_line_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--r", "0", "--json"]) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["type"] == "ConfigError"
    assert error["exit_code"] == 2
    assert error["message"].startswith("--r '0': ")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.TailoraError("x"), 1),
        (errors.ConfigError("x"), 2),
        (errors.DivergedError("x"), 3),
        (FileNotFoundError(2, "No such file"), 2),
        (OSError(28, "No space left on device"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from tailora.cli.main import COMMANDS, main; assert main(['--help']) == 0;"
        "assert not any(main([name, '--help']) for name in COMMANDS);"
        "print({'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"


def test_help_all_shows_every_setting_and_help_the_common_ones(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for flag in ("--help", "--help-all"):
        assert main(["train", flag]) == 0
        shown[flag] = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    settings = {f"--{name.replace('_', '-')}" for name in FIELDS}
    assert all(field.description for field in FIELDS.values())
    assert settings <= shown["--help-all"]
    assert "--learning-rate" in shown["--help"]
    assert len(settings & shown["--help"]) == 25


def test_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*TAILORA, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 1


def test_a_bug_keeps_its_traceback_and_asks_for_a_report_and_json_ends_stdout_with_its_error() -> None:
    code = (
        "import sys, tailora.cli.doctor as doctor; from tailora.cli.main import main;"
        "doctor.collect_facts = lambda: 1 / 0; sys.exit(main(['doctor', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert error == {"type": "ZeroDivisionError", "message": "division by zero", "exit_code": 1}
    assert done.returncode == 1
    assert "Please report it" in done.stderr
    assert "Traceback" in done.stderr


def test_out_of_memory_anywhere_is_a_message_with_what_helps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_much() -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes\nmore")

    monkeypatch.setattr("tailora.cli.doctor.collect_facts", too_much)
    assert main(["doctor", "--json"]) == 1
    shown = capsys.readouterr()
    assert "out of memory: [enforce fail]" in shown.err
    assert "try a smaller --model" in shown.err
    assert "Traceback" not in shown.err
    assert json.loads(shown.out)["error"]["type"] == "MemoryLimitError"


@pytest.mark.parametrize(("encoding", "flags"), [("ascii", ["--json"]), ("cp1252", [])])
def test_any_text_can_be_shown_in_any_encoding(
    encoding: str, flags: list[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"Grüße {number}", "completion": "雪 ☃"} for number in range(4)]
    (tmp_path / "snow.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", stdout)
    assert main(["data", str(tmp_path / "snow.jsonl"), "--model", str(tiny_model), "--rows", "4", *flags]) == 0
    assert b"\\u96ea" in stdout.buffer.getvalue()  # type: ignore[attr-defined]


def test_as_a_module_it_is_the_same_program_and_its_streams_take_any_text(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [*TAILORA, "train", "--config", str(tmp_path / "雪.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="ascii", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config")
    assert "\\u96ea.yaml: No such file" in done.stderr


# ---- Control characters in texts of others, which a terminal would obey

STEERING = "\x1b[31mred\x1b]0;title\x07\x9b2J\r"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("file", [io.StringIO, Terminal])
def test_no_escape_sequence_of_others_is_printed(
    file: type[io.StringIO], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")  # no sequences of our own
    monkeypatch.setattr("sys.stdout", file())
    monkeypatch.setattr("sys.stderr", file())
    content = CONTENTS["train"]()
    content["labels"] = {"names": [STEERING, "y"], "majority": {"label": STEERING, "share": 0.5, "is_tied": False}}
    content["labels"] |= {"confusion": [[1, 2], [3, 4]], "calibration": {"ece": 0.1, "bins": []}}
    print_page(stdout(), page_of(content, "x"), everything=True)
    table = Table(STEERING)
    table.add_row(STEERING)
    stdout().print(table)
    (tmp_path / "adapter").mkdir()
    config = {"base_model_name_or_path": f"./{STEERING}", "peft_type": "LORA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert main(["predict", "--adapter", str(tmp_path / "adapter"), "--prompt", "hi"]) == 2
    assert main(["train", "--data", f"{STEERING}.jsonl", "--model", str(tmp_path)]) == 2
    assert main(["train", f"--{STEERING}"]) == 2
    note(f"the server has {STEERING}")
    with counter(stderr(), STEERING) as progress:
        progress(1, 2)
    text = sys.stdout.getvalue() + sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert text.count("\ufffd[31mred\ufffd]0;title") > 6
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_answers_are_written_as_they_are_but_not_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for file, expected in ((io.StringIO(), STEERING), (Terminal(), "\ufffd[31mred\ufffd]0;title\ufffd\ufffd2J\ufffd")):
        monkeypatch.setattr("sys.stdout", file)
        write_stdout(STEERING)
        assert file.getvalue() == expected


def test_commands_print_through_one_console_alone() -> None:
    for path in Path(cli.__file__).parent.glob("*.py"):
        assert not re.search(
            r"(?<!Safe)\bConsole\((?!Console|quiet=True)|\bprint\(", re.sub(r"\.print\(", "", path.read_text())
        ), path


# ---- Brackets in texts of users, which rich would take for markup

BRACKETS = ("[bold]x[/bold]", "[/]", "[study]")
LINES = [  # TEXT stands for a text with brackets, which the message must show
    *("train TEXT", "train --TEXT", "train --config TEXT", "train --field TEXT", "compare --arm a:TEXT"),
    *("search --space TEXT", "eval --model TEXT --gate TEXT", "report TEXT", "push out TEXT", "serve --adapters TEXT"),
]


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_a_message_shows_brackets_as_they_were_typed(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORCE_COLOR", "1")
    for text in BRACKETS:
        check_refused(text, *(part.replace("TEXT", text) for part in line.split()))


def test_a_warning_of_tailora_is_a_note_and_those_of_others_stay_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings_as_notes():
        warnings.simplefilter("always")
        warnings.warn("r becomes 8", TailoraWarning, stacklevel=1)
        with pytest.warns(UserWarning, match="of another package"):
            warnings.warn("of another package", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "note: r becomes 8\n"


def test_the_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda _: None)
    check_refused("pip install 'tailora[study]'", "compare")


# ---- Signals


SIGNALLED = """
import atexit, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
import tailora.cli.__main__ as program

def send(name):
    os.kill(os.getpid(), getattr(signal, name))

class InDestructor:
    def __del__(self):
        send("SIGINT")

class Finder:
    def find_spec(self, name, *_):
        if name == "rich.console":
            send("SIGTERM")

def command(*_, **__):
    case = sys.argv[1]
    if case == "ignored by a library":
        try:
            send("SIGINT")
        except KeyboardInterrupt:
            raise ImportError("cannot import this")
    elif case == "in a destructor":
        InDestructor()
        print("went on")
    elif case == "the same while cleaning up":
        try:
            send("SIGTERM")
        finally:
            send("SIGTERM")
            print("cleaned up", flush=True)
    elif case == "hangups while cleaning up":
        try:
            send("SIGHUP")
        finally:
            send("SIGHUP")
            print("cleaned up", flush=True)
    elif case == "at the end":
        atexit.register(send, "SIGINT")
        atexit.register(send, "SIGTERM")
        return 4

if sys.argv[1] == "importing":
    sys.meta_path.insert(0, Finder())
else:
    import tailora.cli.main
    tailora.cli.main.app = lambda _: command
program.run()
"""


@pytest.mark.parametrize(
    ("case", "out", "code"),
    [
        ("importing", "", 130),
        ("ignored by a library", "", 130),
        ("in a destructor", "", 130),
        ("the same while cleaning up", "", 130),
        ("hangups while cleaning up", "cleaned up\n", 130),
        ("at the end", "", 4),
    ],
)
def test_signals_end_the_program_with_a_message_and_no_traceback(case: str, out: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", SIGNALLED, case], capture_output=True, text=True, check=False)
    assert done.stderr == ("interrupted\n" if code == 130 else "")
    assert (done.stdout, done.returncode) == (out, code)


# ---- What a terminal shows

ANSI = re.compile(r"\x1b\[[\d;]*m")


@pytest.mark.parametrize(
    "tokens",
    [
        ["data", "chats.jsonl", "--model", "MODEL"],
        ["doctor"],
        ["train", "--model", "absent model", "--r", "0", "--learning-rate", "fast"],
    ],
    ids=" ".join,
)
def test_a_terminal_gets_the_words_of_a_pipe_in_lines_that_fit(
    tokens: list[str],
    tiny_model: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(chats.parent)
    monkeypatch.setenv("COLUMNS", "80")
    Path("model").symlink_to(tiny_model)
    monkeypatch.setattr("tailora.cli.doctor.conclusions", lambda _: [" ".join(["conclusion"] * 40)])
    shown = {}
    for name in ("pipe", "terminal"):
        if name == "terminal":
            monkeypatch.setenv("FORCE_COLOR", "1")
            monkeypatch.setenv("NO_COLOR", "1")
        main(["model" if token == "MODEL" else token for token in tokens])
        captured = capsys.readouterr()
        shown[name] = ANSI.sub("", captured.out + captured.err)
    assert not [line for line in shown["pipe"].splitlines() if line != line.rstrip()]
    lines = shown["terminal"].splitlines()
    assert not [line for line in lines if len(line) > 80 and not line.startswith("tailora ")]
    if tokens[0] != "doctor":  # which tells how much memory is free now
        assert shown["terminal"].split() == shown["pipe"].split()
