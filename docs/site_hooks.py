"""Hooks of mkdocs.yml: generated pages, links between repository files and pages, and llms.txt.

README.md is the home page; CONTRIBUTING.md, CHANGELOG.md, benchmarks/README.md and the notebooks are pages, too. Each
command generates its own page. The Python page comes from the docstrings, and the table of names from
`core/setting_names.py`. Scripts and folders that a page links to are shown under `source/`: the site is self-contained.
"""

import ast
import html
import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from traitlets.config import Config

import tailora
from tailora import errors
from tailora.cli.main import COMMANDS, app
from tailora.core.setting_names import ALIASES, NAMES_OF_OTHER_TOOLS, NOT_NEEDED

ROOT = Path(__file__).parent.parent
PAGES = {  # file of the repository -> page of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    **{f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")},
}
FILES = {page: file for file, page in PAGES.items()}
LINK = re.compile(r'(\]\(|<img src=")(?![a-z]+:|#)([^)"#\s]+)')
PICTURE = re.compile(r'<picture>\s*<source [^>]*srcset="([^"]+)">\s*<img src="([^"]+)"([^>]*)>\s*</picture>')
UNRENDERED = re.compile(r"<p>(?:(?!</p>).)*?\n(?:[-*] |\| )", re.DOTALL)  # a list or table that stayed plain text
log = logging.getLogger("mkdocs.hooks.site")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages of the commands into the navigation, below the overview."""
    (reference,) = (section["Reference"] for section in config.nav or [] if "Reference" in section)
    reference.insert(1, {"Each command": [{name: f"commands/{name}.md"} for name in COMMANDS]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {page: (ROOT / file).read_text() for file, page in PAGES.items() if file.endswith(".md")}
    for file in (file for file in PAGES if file.endswith(".ipynb")):
        pages[PAGES[file]], outputs = notebook_page(ROOT / file)
        for name, content in outputs.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    pages |= {"api.md": python_page(), "errors.md": errors_page(), "names.md": names_page()}
    pages |= {f"commands/{name}.md": command_page(name) for name in COMMANDS}
    texts = [*pages.items(), *((file.src_uri, file.content_string) for file in files.documentation_pages())]
    paths = {repository_path(page, match[2]) for page, text in texts for match in LINK.finditer(text)}
    sources = {ROOT / path for path in paths if is_source(path)}
    files_of_folders = {file for folder in sources if folder.is_dir() for file in folder.iterdir() if file.is_file()}
    sources |= {file for file in files_of_folders if is_source(name_of(file))}
    pages |= {site_path(name_of(path)): source_page(path) for path in sources}
    for name, text in sorted(pages.items()):
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Turns links between files of the repository into links between pages; links each command to its page."""
    if page.file.src_uri == "changelog.md":
        page.meta["search"] = {"boost": 0.3}  # below the other pages
    if page.file.src_uri == "commands.md":
        markdown = re.sub(r"(?m)^\| (`tailora (\w+)[^`]*`) \|", r"| [\1](commands/\2.md) |", markdown)
    here = posixpath.dirname(page.file.src_uri) or "."

    def link(match: re.Match[str]) -> str:
        path = repository_path(page.file.src_uri, match[2])
        return match[1] + (posixpath.relpath(site_path(path), here) if (ROOT / path).exists() else match[2])

    both = r'<img src="\2#only-light"\3><img src="\1#only-dark"\3>'  # the theme shows one of them
    return LINK.sub(link, PICTURE.sub(both, markdown))


def on_page_content(content: str, *, page: Page, **_: Any) -> str:
    if found := UNRENDERED.search(content):
        log.warning("%s: put an empty line before this list or table: %s", page.file.src_uri, found[0][-200:])
    return content


def on_env(_env: Any, *, config: MkDocsConfig, files: Files) -> None:
    """Adds llms.txt: title, address and first sentence of every page in the navigation."""
    text = f"# {config.site_name}\n\n> {config.site_description}\n"
    for section in config.nav or []:
        for title, children in section.items():
            lines = [llms_line(title, path, files) for title, path in leaves(children)]
            text += f"\n## {title}\n\n" + "\n".join(lines) + "\n"
    files.append(File.generated(config, "llms.txt", content=text))


# ---- Links


def repository_path(page: str, target: str) -> str:
    """Returns the repository path of a link's target on a page."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(FILES.get(page, f"docs/{page}")), target))


def site_path(path: str) -> str:
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def is_source(path: str) -> bool:
    return path not in PAGES and not path.startswith("docs/") and (ROOT / path).exists()


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- llms.txt


def leaves(children: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yields title and page of every entry in a part of the navigation, in order."""
    for child in children:
        for title, content in child.items():
            if isinstance(content, list):
                yield from leaves(content)
            else:
                yield title, content


def llms_line(title: str, path: str, files: Files) -> str:
    file = files.get_file_from_path(path)
    assert file is not None, path
    assert file.page is not None, path
    return f"- [{title}]({file.url}): {first_sentence(file.page.content or '')}"


def first_sentence(content: str) -> str:
    """Returns the first sentence of the first paragraph of a rendered page, as plain text."""
    paragraph = re.search(r"<p>(.*?)</p>", content, re.DOTALL)
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", paragraph[1])).split()) if paragraph else ""
    return re.split(r"(?<=[.?!:])\s", text, maxsplit=1)[0]


# ---- Generated pages


def command_page(name: str) -> str:
    """Returns the help of `tailora NAME` in cyclopts' Markdown."""
    text = app([name])[name].generate_docs(usage_name=f"tailora {name}")
    return text.replace(f"# {name}", f"# tailora {name}", 1)


def names_page() -> str:
    """Returns the table of our settings and their names in other tools."""
    rows = [
        f"| `{ours}` | {' '.join(f'`{name}`' for name in theirs.split())} |"
        for ours, theirs in NAMES_OF_OTHER_TOOLS.items()
    ]
    not_needed = [f"| {' '.join(f'`{name}`' for name in names.split())} | {why} |" for why, names in NOT_NEEDED.items()]
    read = ", ".join(f"`{theirs}` as `{ours}`" for theirs, ours in ALIASES.items())
    return (
        "# Names of settings in other tools\n\n"
        "Flags and YAML keys use the names of transformers and PEFT. If you use a name from TRL, Axolotl, "
        "LLaMA-Factory or another tool, the error message gives tailora's name. The defaults of other tools are on the "
        "pages for users of [PEFT](coming_from/peft.md), [TRL](coming_from/trl.md), "
        "[Unsloth](coming_from/unsloth.md), [Axolotl](coming_from/axolotl.md), "
        "[LLaMA-Factory](coming_from/llama_factory.md) and [mlx-lm](coming_from/mlx_lm.md). "
        f"tailora accepts some of the other names: {read}.\n\n"
        "| tailora | other tools |\n|---|---|\n" + "\n".join(rows) + "\n\n"
        "tailora does not need these settings:\n\n"
        "| other tools | what tailora does |\n|---|---|\n" + "\n".join(not_needed) + "\n"
    )


def errors_page() -> str:
    """Returns a table of the errors in the docstring of `tailora.errors`, with their exit codes."""
    rows = []
    for name, meaning in re.findall(r"── (\w+)\S* +(.+)", str(errors.__doc__)):
        error = getattr(errors, name)
        parents = ", ".join(f"`{parent.__name__}`" for parent in error.__bases__ if parent is not errors.TailoraError)
        rows.append(f"| `{name}` | {parents} | {error.exit_code} | {meaning} |")
    return (
        "# Errors\n\nA message lists all problems at once: what is wrong, what is expected, and what to do. "
        "On the command line it goes to stderr, without a traceback. All errors are subclasses of `TailoraError` in "
        "`tailora.errors`.\n\n"
        "| error | is also a | exit code | raised for |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def python_page() -> str:
    """Returns the mkdocstrings directives for all public names."""
    names = [name for name in tailora.__all__ if not name.startswith("_")]
    intro = "# Python API\n\nImport all public names from `tailora`: `from tailora import LoRAConfig, LoRAModel`.\n\n"
    return intro + "\n".join(f"::: tailora.{name}\n" for name in names)


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Returns a notebook with its outputs in Markdown, and its files: the pictures, and the notebook itself."""
    exporter = MarkdownExporter(config=Config({"HighlightMagicsPreprocessor": {"enabled": True}}))
    text, resources = exporter.from_filename(str(path), {"output_files_dir": path.stem, "unique_key": path.stem})
    text = text.replace("![png](", "![Plot of the code above](")
    link = f'<a href="{path.name}" download>Download this page as a notebook</a> to run and change it.'
    return f"{text}\n\n{link}\n", {**resources["outputs"], path.name: path.read_bytes()}


def source_page(path: Path) -> str:
    """Returns a page that shows a file, or links to the files of a folder; the search excludes it."""
    head = f"---\nsearch: {{exclude: true}}\n---\n# {name_of(path)}\n\n"
    if path.is_dir():
        here = posixpath.dirname(site_path(name_of(path)))
        links = {file: posixpath.relpath(site_path(name_of(file)), here) for file in path.iterdir() if file.is_file()}
        return f"{head}Files in this folder of the repository:\n\n" + "\n".join(
            f"- [{file.name}]({link}){purpose(file)}" for file, link in sorted(links.items())
        )
    language = "python" if path.suffix == ".py" else "text"
    return f"{head}~~~~~{language}\n{path.read_text()}\n~~~~~\n"


def purpose(path: Path) -> str:
    """Returns `: ` and the first line of a script's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) if path.suffix == ".py" else None
    return f": {docstring.splitlines()[0]}" if docstring else ""
