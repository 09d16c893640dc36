"""The code blocks of a page in Markdown: what the comments around them say, and a shell that runs their commands.

<!-- not run: REASON -->    above a block that cannot run as it stands
<!-- made by: SCRIPT -->    above figures that a script made
<!-- file: NAME -->         above the content of a file
<!-- measured:NAME -->      after a block, above what it printed, which <!-- /measured:NAME --> ends
"""

import os
import re
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

MARKDOWN = MarkdownIt().enable("table")
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
