"""All benchmarks one after another, the most important first, within a time.

    python benchmarks/run_all.py --minutes 50
    python benchmarks/run_all.py --quick

Every script writes each cell when it is finished, so a run that is stopped leaves valid results, and the same command
continues. A script starts no cell after its share of the time; what it does not use goes to those after it.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHARES: list[tuple[list[str], float]] = [  # module with its options, and its share of the minutes
    (["benchmarks.speed.real", "--only", "repeat=0"], 18),
    (["benchmarks.speed.steps", "--only", "threads=1", "malloc=default"], 10),
    (["benchmarks.speed.inference", "--only", "threads=1"], 4),
    (["benchmarks.memory.memory", "--only", "malloc=default"], 5),
    (["benchmarks.speed.adapters"], 3),
    (["benchmarks.speed.startup"], 1),
    (["benchmarks.speed.curves"], 5),
    (["benchmarks.speed.growth"], 4),
    (["benchmarks.speed.steps"], 2),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=50.0)
    parser.add_argument("--quick", action="store_true", help="a short run of each script, to see that it works")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    failed = []
    for position, (command, share) in enumerate(SHARES):
        left = (end - time.monotonic()) / 60
        if left <= 0:
            print(f"no time is left for {' '.join(command)} and those after it", file=sys.stderr)
            break
        minutes = left * share / sum(share for _, share in SHARES[position:])
        call = [command[0], "--quick"] if options.quick else [*command, "--minutes", f"{minutes:.1f}"]
        print(f"-- {' '.join(call)}", file=sys.stderr, flush=True)
        process = subprocess.run([sys.executable, "-m", *call], cwd=ROOT, check=False)
        failed += [command[0]] if process.returncode else []
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
