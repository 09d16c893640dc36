"""`tailora compare --minutes 15` and `tailora search --minutes 10` on the demo's model and data, as a user types them.

    python benchmarks/studies.py [compare search]

writes benchmarks/results/NAME.txt (what the user sees) and NAME.json (the study's report.json, machine and seconds).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import RESULTS, say, write

MINUTES = {"compare": 15, "search": 10}
SEEN = {"COLUMNS": "118", "NO_COLOR": "1", "TERM": "dumb"}


def arguments(name: str) -> list[str]:
    return [name, "--model", "demo", "--data", "demo", "--minutes", str(MINUTES[name])]


def study(name: str) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, "-m", "tailora.cli", *arguments(name), "--output-dir", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **SEEN})
        seconds = time.perf_counter() - started
        (RESULTS / f"{name}.txt").write_text(done.stdout.replace(folder, f"outputs/{name}"))
        report = json.loads((Path(folder) / "report.json").read_text().replace(folder, f"outputs/{name}"))
    return write(name, {"command": f"tailora {' '.join(arguments(name))}", "seconds": seconds, "report": report})


def main() -> None:
    for name in sys.argv[1:] or list(MINUTES):
        say(str(study(name)))


if __name__ == "__main__":
    main()
