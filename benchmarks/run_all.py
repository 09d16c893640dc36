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

HERE = Path(__file__).parent
SHARES: list[tuple[list[str], float]] = [  # script with its options, and its share of the minutes
    (["real.py", "--only", "repeat=0"], 18),
    (["steps.py", "--only", "threads=1", "malloc=default"], 10),
    (["inference.py", "--only", "threads=1"], 4),
    (["memory.py", "--only", "malloc=default"], 5),
    (["adapters.py"], 3),
    (["startup.py"], 1),
    (["curves.py"], 5),
    (["growth.py"], 4),
    (["steps.py"], 2),
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
        process = subprocess.run([sys.executable, *call], cwd=HERE, check=False)
        failed += [command[0]] if process.returncode else []
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
