"""Creates the pictures of README.md and docs/ from real runs, each light and dark, in docs/pictures.

    python -m benchmarks.site.pictures --run outputs/demo          all; outputs/demo is the folder of `tailora demo`
    python -m benchmarks.site.pictures compare compare-page        some, here the ones that need no run

Terminals are SVG, 100 columns wide: `compare` is the terminal output for benchmarks/results/compare.json; the others
run the command. Pages are PNG, rendered by Chromium: `compare-page` is the
report.html of results/compare.json, `playground` is the page of a server that this script starts.
"""

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from benchmarks.measure import RESULTS, ROOT, log
from benchmarks.serving.server_process import started
from benchmarks.site import chromium
from tailora.report.files import page_of
from tailora.report.html import html
from tailora.report.terminal import print_page

if TYPE_CHECKING:
    from playwright.sync_api import Page

FOLDER = ROOT / "docs" / "pictures"
COLUMNS = 100
SCHEMES = ("light", "dark")
ANSI = {  # the 16 colours of a terminal, as GitHub shows them
    "light": "24292f cf222e 116329 4d2d00 0969da 8250df 1b7c83 6e7781 "
    "57606a a40e26 1a7f37 633c01 218bff a475f9 3192aa 8c959f",
    "dark": "484f58 ff7b72 3fb950 d29922 58a6ff bc8cff 39c5cf b1bac4 "
    "6e7681 ffa198 56d364 e3b341 79c0ff d2a8ff 56d4dd f0f6fc",
}
GROUND = {"light": ("ffffff", "24292f"), "dark": ("0d1117", "e6edf3")}  # background, text
FONTS = 'ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace'

# ---- Terminals


def train(_: Path | None) -> tuple[str, str]:
    words = ("--model", "demo", "--data", "examples/pirate.jsonl", "--output-dir", "outputs/pirate")
    line, printed = command("train", *words)
    return line, re.split(r"\n.*Written to ", printed)[0]


def compare(_: Path | None) -> tuple[str, str]:
    content = json.loads((RESULTS / "compare.json").read_text())
    printed = io.StringIO()
    console = Console(file=printed, width=COLUMNS, force_terminal=True, color_system="truecolor", legacy_windows=False)
    print_page(console, page_of(content["report"], "compare.json"))
    return content["command"], printed.getvalue()


def plan(_: Path | None) -> tuple[str, str]:
    return command("plan", "--model", "demo", "--data", "demo", "--device", "RTX 4090")


def inspect(run: Path | None) -> tuple[str, str]:
    return command("inspect", "outputs/demo", "--model", "none", run=run)


def command(*words: str, run: Path | None = None) -> tuple[str, str]:
    """Returns a command and what it prints on a terminal; `outputs/demo` in it is the folder of the run."""
    line = " ".join(["tailora", *(f'"{word}"' if " " in word else word for word in words)])
    terminal = {"COLUMNS": str(COLUMNS), "FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    with TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "examples", Path(folder) / "examples")
        if "outputs/demo" in words:
            shutil.copytree(checked(run), Path(folder) / "outputs" / "demo")
        process = subprocess.run(
            [sys.executable, "-m", "tailora.cli", *words],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), **terminal},
        )
    return line, process.stdout


def checked(run: Path | None) -> Path:
    if run is None or not (run / "adapter").is_dir():
        raise SystemExit("give --run the folder of a run of `tailora demo`")
    return run


def terminal_svg(line: str, printed: str, scheme: str, name: str) -> str:
    """Returns a window with a command and its output. Nothing in it is loaded from elsewhere."""
    console = Console(file=io.StringIO(), width=COLUMNS, record=True, force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ {line}", style="bold"))
    console.print(Text.from_ansi(printed.rstrip()))
    background, text = map(rgb, GROUND[scheme])
    colours = [rgb(colour) for colour in ANSI[scheme].split()]
    svg = console.export_svg(
        title="", theme=TerminalTheme(background, text, colours[:8], colours[8:]), unique_id=f"{name}-{scheme}"
    )
    svg = re.sub(r"\s*@font-face \{.*?\}(?=\s)", "", svg, flags=re.DOTALL)  # rich would load a font from a server
    svg = re.sub(r"<!--.*?-->\s*", "", svg)
    svg = svg.replace("Fira Code, monospace", FONTS).replace("font-family: arial", "font-family: sans-serif")
    svg = svg.replace('stroke="rgba(255,255,255,0.35)"', 'stroke="rgba(128,128,128,0.5)"')  # seen on white, too
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour)
    return red, green, blue


# ---- Pages


def compare_page(page: "Page", _: Path | None) -> None:
    content = json.loads((RESULTS / "compare.json").read_text())
    page.set_viewport_size({"width": 1000, "height": 895})  # up to the next heading
    page.set_content(html(page_of(content["report"], "compare.json")))
    screenshots(page, "compare-page")


def playground(page: "Page", run: Path | None) -> None:
    """The page of `tailora serve` after one question to the base and to the adapter of the run."""
    page.set_viewport_size({"width": 1000, "height": 760})
    with server(checked(run)) as address:
        page.goto(address)
        left, right = page.locator("#sides select").all()
        right.locator("option", has_text="chats").wait_for(state="attached")
        left.select_option("demo")
        right.select_option("chats")
        page.fill("#prompt", "What kind of music do you like?")
        page.fill("#max-tokens", "40")
        page.click("#send")
        page.locator("#send:disabled").wait_for(timeout=10_000)
        page.locator("#send:enabled").wait_for(timeout=300_000)
        speeds = page.locator(".speed")  # of this machine, while it makes pictures
        speeds.evaluate_all("elements => elements.forEach(element => element.hidden = true)")
        screenshots(page, "playground")


def screenshots(page: "Page", name: str) -> None:
    for scheme in SCHEMES:
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        page.screenshot(path=FOLDER / f"{name}-{scheme}.png")


def server(run: Path) -> AbstractContextManager[str]:
    words = ["serve", "--model", "demo", "--adapter", f"chats={run}"]
    return started([sys.executable, "-m", "tailora.cli", *words], env={**os.environ, "PYTHONPATH": str(ROOT)})


TERMINALS: dict[str, Callable[[Path | None], tuple[str, str]]] = {
    "train": train,
    "plan": plan,
    "compare": compare,
    "inspect": inspect,
}
PAGES: dict[str, Callable[["Page", Path | None], None]] = {"compare-page": compare_page, "playground": playground}


def make(name: str, run: Path | None) -> None:
    FOLDER.mkdir(exist_ok=True)
    if name in TERMINALS:
        line, printed = TERMINALS[name](run)
        for scheme in SCHEMES:
            (FOLDER / f"{name}-{scheme}.svg").write_text(terminal_svg(line, printed, scheme, name))
    else:
        with chromium.launched() as browser:
            PAGES[name](browser.new_page(), run)


def main() -> None:
    names = [*TERMINALS, *PAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *names], default=names, metavar="NAME")
    parser.add_argument("--run", type=Path, help="folder of a run of `tailora demo`, for inspect and playground")
    options = parser.parse_args()
    for name in options.names:
        make(name, options.run)
        log(f"wrote docs/pictures/{name}-*")


if __name__ == "__main__":
    main()
