"""The code blocks of README.md and docs/: each one is run as a reader types it, is output, or says why it is neither.

A page's ```bash and ```python blocks run one after the other, in a folder of the page. What differs from the reader's
machine is in SUBSTITUTIONS and in `page_commands.FEWER`, and the demo's model and data are tiny ones in TAILORA_HOME.
The python blocks of a page share their names, as in one session. A `tailora serve` line runs on in the background.

    ```text                  output; with figures only in a measured part, or below <!-- made by: SCRIPT -->
    ```json, ```yaml         is one, at least; <!-- file: NAME --> above it writes it to a file that the page names
    <!-- not run: REASON --> above a block that a test cannot run
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from benchmarks.serving.server_process import free_port
from benchmarks.site.page_blocks import Block, Shell, blocks, inline, measured_parts, run_python
from tailora.cli.main import COMMANDS, app
from tailora.data.readers import Row, read_rows
from tailora.data.samples import Conversation
from tailora.data.schemas import convert_row, detect_schema

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN_ELSEWHERE = ("docs/from_scratch",)  # test_from_scratch.py: with what they print
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # of the demo's model
FIGURE = re.compile(r"(?<![\w.])\d")
FENCE = re.compile(r"```(?:text)?\n(.*?)```", re.DOTALL)  # of what a command printed
LABEL = re.compile(r"([A-Za-z][A-Za-z ,-]{,24}?)( {2,}\S.*)?$")
OF_LARGE_MODELS = {"layernorm", "logits"}  # rows that the tiny model lacks
SECONDS = 300  # for a block, on a busy machine
home = tiny_run.home  # the fixture

SERVER = """\
[ -e server.pid ] && kill "$(cat server.pid)" && sleep 1
{command} > server.log 2>&1 & echo $! > server.pid
until curl -so /dev/null http://127.0.0.1:{port}/ready; do kill -0 $! || {{ cat server.log; exit 1; }}; sleep 0.1; done
"""
SUBSTITUTIONS = {  # pattern -> what a page's blocks have in its place; {model} and {port} are those of the test
    rf"(?<![\w/]){HUB_ID}": "{model}",
    r"(?m)^ *pip install [^&\n]*(&& )?": "",  # CI's first step does it
    r"(?<=127\.0\.0\.1:)\d+|(?<=localhost:)\d+|(?<=--port )\d+": "{port}",
    r"(?m)^tailora serve (?!.*--port)": "tailora serve --port {port} ",
    r"(?m)^(tailora serve [^#&\n]*[^#&\s])( +#.*)?$": SERVER.format(command=r"\1", port="{port}"),
}


@dataclass
class Reader:
    """Types the blocks of one page."""

    shell: Shell
    values: dict[str, str]
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})

    def type(self, block: Block) -> str:
        """Returns what the block prints."""
        text = self.substituted(block.text)
        if block.mark == "file":
            (self.shell.folder / block.value).write_text(text)
        elif block.language == "bash":
            return self.shell.run(text)
        elif block.language == "python":
            return run_python(text, self.names)
        return ""

    def substituted(self, text: str) -> str:
        for pattern, replacement in SUBSTITUTIONS.items():
            for name, value in self.values.items():
                replacement = replacement.replace(f"{{{name}}}", value)
            text = re.sub(pattern, replacement, text)
        return text


def problem(block: Block) -> str | None:
    """Returns what is wrong with a block that is neither run, nor output, nor marked."""
    if block.mark == "not run" or block.part:
        return None
    if block.mark == "made by":
        return None if (ROOT / block.value).exists() else f"made by {block.value}, which does not exist"
    match block.language:
        case "bash" | "python":
            return None
        case "json" | "yaml":
            return None if is_data(block) else f"is no {block.language}"
        case "text":
            figures = "figures that no script made: put it into a measured part, or say <!-- made by: SCRIPT -->"
            return figures if FIGURE.search(block.text) else None
    return f"```{block.language} is none of bash, python, json, yaml and text"


def is_data(block: Block) -> bool:
    """True if the block can be read: as YAML, or as one JSON value or a value in each line."""
    try:
        if block.language == "yaml":
            return isinstance(YAML(typ="safe").load(block.text), dict | list)  # any sentence is a YAML string
        try:
            json.loads(block.text)
        except ValueError:
            [json.loads(line) for line in block.text.splitlines()]
    except (ValueError, YAMLError):
        return False
    return True


def name(page: Path) -> str:
    return page.relative_to(ROOT).with_suffix("").as_posix()


def test_every_block_is_run_or_output_or_says_why_not() -> None:
    assert [
        f"{name(page)}:{block.line}: {wrong}" for page in PAGES for block in blocks(page) if (wrong := problem(block))
    ] == []


def test_commands_within_the_text_have_these_flags() -> None:
    for code in (token.content for page in PAGES for token in inline(page) if token.type == "code_inline"):
        if code.startswith("tailora "):
            command, *words = shlex.split(code)[1:]
            assert command in COMMANDS, code
            flags = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--help", "--help-all"}
            assert flags <= flags_of(command), f"{code}: {flags - flags_of(command)}"


@cache
def flags_of(command: str) -> set[str]:
    return {name for argument in app([command])[command].assemble_argument_collection() for name in argument.names}


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `tailora` and `python`, which start in no time (page_commands.py)."""
    folder = tmp_path_factory.mktemp("programs")
    command = [sys.executable, str(ROOT / "tests" / "page_commands.py"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield folder
        server.terminate()


@pytest.fixture
def reader(home: Path, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # a reader types README's blocks in a clone
    here = {"TAILORA_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    for variable, value in here.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    values = {"model": str(home / "demo-1" / "SmolLM2-135M-Instruct"), "port": str(free_port())}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with closing(Shell(tmp_path, dict(os.environ), subprocess.STDOUT, SECONDS)) as shell:
        yield Reader(shell, values)
    torch.set_num_threads(threads)


@pytest.mark.pages
@pytest.mark.filterwarnings("ignore:.* deprecated and will be removed:FutureWarning")  # of libraries for one another
@pytest.mark.parametrize("page", [page for page in PAGES if name(page) not in RUN_ELSEWHERE], ids=name)
def test_the_blocks_of_a_page_run(page: Path, reader: Reader) -> None:
    """What a page shows below a block has the labels that the code prints today."""
    recorded = {part: labels("\n".join(FENCE.findall(content))) for part, content in measured_parts(page)}
    outdated = {}
    for block in blocks(page):
        if block.is_run or block.mark == "file":
            printed = reader.type(block)
            outdated[block.output] = recorded.get(block.output, set()) - labels(printed)
    assert not any(outdated.values()), f"record {name(page)} again (benchmarks/site/tutorials.py)"


def labels(output: str) -> set[str]:
    """Returns the titles and the first column of a report, without numbers and names of layers; of answers, none."""
    rows = [row for line in output.splitlines() if (row := LABEL.match(line))]
    return {row[1] for row in rows if row[2]} and {row[1] for row in rows} - OF_LARGE_MODELS


def test_the_rows_of_an_exported_chat_have_a_reply_and_no_notices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = (block for block in blocks(ROOT / "docs/tutorials/chats.md") if "EXPORT" in block.text)
    monkeypatch.chdir(tmp_path)
    run_python(block.text, {})
    items = list(read_rows("exported.jsonl"))
    mapping = detect_schema("exported.jsonl", items)
    samples = [convert_row(item, mapping) for item in items if isinstance(item, Row)]
    chats = [[(m["role"], m["content"]) for m in chat.messages] for chat in samples if isinstance(chat, Conversation)]
    reply = "Dry air!\nRemember: mist it twice a week.\nNot at noon."
    assert len(chats) == len(items)  # none was refused
    assert chats == [
        [("user", "My fern has brown tips."), ("assistant", reply), ("user", "And in winter?")],
        [("user", "Do you sell pots?"), ("assistant", "We do, in every size.")],
    ]
