"""Plain English (CONTRIBUTING.md): phrases that make a text read as translated, in README, docs, `--help` and tailora/.

A hit is a reason to read the sentence again and to say what you would say to a colleague.
"""

import ast
import io
import re
import tokenize
from bisect import bisect
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

PHRASES = {  # regular expression -> what to write instead
    r"(?<!than )(?<!with )(?<!minus )(?<!from )(?:that|those) of": "name the thing",
    r"beside": "next to, along with, compared with",
    r"reckon\w*": "estimate, calculate",
    r"another one": "a different one, its own",
    r"(?<!instead )of (?:its|their) own(?=[.,;:)]|$| (?:and|or|with|which|that|in|so|by|to|as|for|on))": "its own X",
    r"but for": "except for",
    r"where (?:a|an|the) [\w ,]+ (?:is|are) needed": "expected X, got Y",
    r"(?<!to )(?<!will )(?<!can )(?<!not )take(?= (?:`|--|\w+ ?=|'|1\.\.))": "use",
    r"(?:is|are) (?:there )?already(?: there)?,? (?:will do|is used)": "if you already have",
    r"is there already": "already exists",
    r"will do": "is enough, works",
    r"all else": "everything else",
    r"says? so": "prints a message, reports it",
    r"(?:server|file|passport|row|page|number|list|answer|interval|folder|tokenizer)s? (?:tells?|told)": "contains",
    r"nobody": "use the active voice",
    r"without a word": "silently",
    r"leave[sd]? (?:it|them|\S+) out": "omit, remove, skip",
    r"in all\)": "in total",
    r"give (?:it |them )?(?:another|the former|a few|one|two)": "use, pass",
    r"(?:is|are) whole|whole,? or streamed": "is complete",
    r"so many": "how many, at most N",
    r"ha(?:ve|s) other \w+ than|other \w+ than": "different",
    r"stands? beside": "is next to",
    r"as (?:it stands|they stand)": "unchanged",
    r"(?:each )?for itself": "separately",
    r"of which": "two sentences",
    r"how (?:it|they) (?:is|are) to be": "how to",
    r"the like": "similar",
    r"in the place of": "instead of",
    r"was (?:looked|tried) (?:at|again)": "use the active voice",
    r"of today|today's words": "current",
    r"(?:has|have) to be told": "needs",
    r"to judge by": "to evaluate",
    r"(?:is|are) not to be \w+ed": "do not X",
}
COMPILED = {re.compile(rf"(?<!\w)(?:{pattern})(?!\w)", re.IGNORECASE): hint for pattern, hint in PHRASES.items()}


def hits(texts: Iterable[tuple[int, str]]) -> Iterator[str]:
    """What to look at. texts: line and text; whitespace, also the end of a line, counts as one blank."""
    lines, starts, length = list[int](), list[int](), 0
    joined = list[str]()
    for line, text in texts:
        joined.append(" ".join(text.split()) + "\n")
        lines.append(line)
        starts.append(length)
        length += len(joined[-1])
    everything = "".join(joined)
    for pattern, hint in COMPILED.items():
        for match in pattern.finditer(everything):
            number = bisect(starts, match.start()) - 1
            at = match.start() - starts[number]
            around = joined[number][max(at - 60, 0) : at + 90].strip()
            yield f"{lines[number]}: {match.group()!r} ({hint}): ...{around}..."


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of all strings, docstrings included; {} stands for what an f-string inserts."""
    parts = set[int]()
    for node in ast.walk(tree):  # an f-string comes before its parts
        if isinstance(node, ast.JoinedStr):
            parts.update(map(id, node.values))
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every comment; one that goes on in the next line is one text."""
    first, last, texts = 1, 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1:
                yield first, " ".join(texts)
                first, texts = token.start[0], []
            texts.append(token.string.lstrip("# "))
            last = token.start[0]
    yield first, " ".join(texts)


def paragraphs(page: str) -> Iterator[tuple[int, str]]:
    """First line and text of every paragraph of a page, without its blocks of code."""
    page = re.sub(r"^ *```.*?^ *```", lambda block: "\n" * block.group().count("\n"), page, flags=re.M | re.S)
    line = 1
    for text in page.split("\n\n"):
        yield line, text
        line += text.count("\n") + 2


@cache
def texts_of(path: Path) -> list[tuple[int, str]]:
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return list(paragraphs(source))
    return [*strings(ast.parse(source)), *comments(source)]


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted(path for path in (ROOT / "tailora").rglob("*") if path.suffix in (".py", ".html", ".j2"))


@pytest.mark.parametrize("paths", [PAGES, SOURCES], ids=["pages", "sources"])
def test_texts_are_plain_english(paths: list[Path]) -> None:
    """The sources hold everything that `--help`, messages and reports show."""
    found = [f"{path.relative_to(ROOT)}:{hit}" for path in paths for hit in hits(texts_of(path))]
    if found:
        pytest.fail("\n".join([f"{len(found)} sentences to read again:", *found]), pytrace=False)


PLANTED = {
    "page.md": "One\nline.\n\n```python\nso many  # not read\n```\nThere are so\nmany.\n",
    "docstring.py": 'def f():\n    """Returns so\n    many."""\n',
    "message.py": 'raise ValueError(\n    "there are so "\n    f"many{1}"\n)\n',
    "inserted.py": 'f"{1} so many {2}"\n',
    "comment.py": "x = 1  # there are so\n# many\n",
    "page.html": "<p>So many</p>\n",
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_phrase_is_seen_wherever_a_person_reads_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(PLANTED[name])
    found = list(hits(texts_of(tmp_path / name)))
    assert len(found) == 1, found
