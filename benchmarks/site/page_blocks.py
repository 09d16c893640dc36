"""Pages in Markdown: their code blocks, measured parts and links, and a shell that runs their commands.

<!-- not run: REASON -->    above a block that cannot run unchanged
<!-- made by: SCRIPT -->    above figures that a script made
<!-- file: NAME -->         above the content of a file
<!-- measured:NAME -->      after a block, above what it printed, which <!-- /measured:NAME --> ends
"""

import io
import os
import re
import signal
import subprocess
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

MARKDOWN = MarkdownIt().enable("table")
PART = re.compile(r"<!-- measured:([\w-]+) -->(.*?)<!-- /measured:\1 -->", re.DOTALL)
MARK = re.compile(r"<!-- (not run|made by|file): (.+) -->\s*\Z")
MEASURED = re.compile(r"<!-- (/?)measured:([\w-]+) -->")


@dataclass
class Block:
    language: str
    text: str
    line: int
    part: str  # the measured part that it is in
    mark: str = ""  # not run, made by, or file
    value: str = ""  # of the mark
    output: str = ""  # the measured part that follows it

    @property
    def is_run(self) -> bool:
        """True for what a reader types."""
        return self.language in ("bash", "python") and self.mark not in ("not run", "file") and not self.part


def blocks(page: Path) -> list[Block]:
    """Returns the code blocks of a page in their order."""
    found: list[Block] = []
    above, part = "", ""
    for token in MARKDOWN.parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            mark = MARK.search(above)
            language = token.info.strip() if token.type == "fence" else "indented"
            line = (token.map or [0])[0] + 1
            found.append(Block(language, token.content, line, part, *(mark.groups() if mark else ())))
        above = token.content if token.type == "html_block" else ""
        for closing, name in MEASURED.findall(above):
            part = "" if closing else name
            if part and found and not found[-1].part:
                found[-1].output = found[-1].output or part
    return found


def inline(page: Path) -> list[Token]:
    """Returns what is within the text of a page: links, code, emphasis."""
    return [child for token in MARKDOWN.parse(page.read_text(encoding="utf-8")) for child in token.children or []]


def measured_parts(page: Path) -> list[tuple[str, str]]:
    """Returns name and content of the measured parts of a page in their order."""
    return [(name, content.strip()) for name, content in PART.findall(page.read_text(encoding="utf-8"))]


def with_parts(document: str, contents: dict[str, str]) -> str:
    """Returns the document with new contents of its measured parts. Raises SystemExit if its parts differ."""
    found = [name for name, _ in PART.findall(document)]
    if sorted(found) != sorted(contents):
        raise SystemExit(f"the page has the measured parts {sorted(found)}, expected {sorted(contents)}")
    return PART.sub(
        lambda part: f"<!-- measured:{part[1]} -->\n{contents[part[1]].strip()}\n<!-- /measured:{part[1]} -->", document
    )


def run_python(code: str, names: dict[str, Any]) -> str:
    """Returns what the code prints; its names are kept in `names`."""
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "page", "exec"), names)
    return printed.getvalue()


@dataclass
class Shell:
    """Runs commands in a folder. `close` ends what they left in the background."""

    folder: Path
    environment: dict[str, str]
    stderr: int | None = None  # subprocess.STDOUT: `run` returns that, too
    seconds: float | None = None  # that `run` may take
    sessions: list[int] = field(default_factory=list)

    def run(self, text: str) -> str:
        """Returns what the commands print. Raises SystemExit, with that, if one of them fails."""
        output = self.folder / "output.txt"  # not a pipe, which a server in the background would keep open
        with output.open("w") as file:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", text],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=self.stderr,
                start_new_session=True,
            )
        self.sessions.append(process.pid)
        if code := process.wait(self.seconds):
            raise SystemExit(f"{self.folder}: exit code {code} of\n{text}\n{output.read_text()[-4000:]}")
        return output.read_text()

    def close(self) -> None:
        for session in self.sessions:
            with suppress(ProcessLookupError):
                os.killpg(session, signal.SIGTERM)
