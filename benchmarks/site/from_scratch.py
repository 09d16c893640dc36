"""Runs the code of docs/from_scratch.md in order and records what it prints.

    python -m benchmarks.site.from_scratch

A block that prints is followed by a measured part; update_docs.py writes the output there.
"""

import argparse
import contextlib
import os
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import ROOT, write
from benchmarks.site.page_blocks import blocks, run_python

PAGE = ROOT / "docs" / "from_scratch.md"


def run_page() -> tuple[dict[str, str], dict[str, Any]]:
    """Returns the output of each block that prints, by the name of its part, and the names that the blocks defined.

    The blocks write files into the current folder. Raises SystemExit for a block that prints and has no part.
    """
    outputs: dict[str, str] = {}
    names: dict[str, Any] = {"__name__": "from_scratch_page"}
    for block in blocks(PAGE):
        if not block.is_run:
            continue
        printed = run_python(block.text, names)
        if bool(printed) != bool(block.output):
            raise SystemExit(f"line {block.line}: a block that prints, and no other, has a measured part")
        if block.output:
            outputs[block.output] = printed.strip()
    return outputs, names


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with TemporaryDirectory() as folder, contextlib.chdir(folder):
        outputs, _ = run_page()
    print(f"wrote {os.path.relpath(write('from_scratch', {'outputs': outputs}))}")


if __name__ == "__main__":
    main()
