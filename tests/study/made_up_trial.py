"""The process of a trial that trains nothing: its loss follows from its settings (tests/study/test_workers.py).

    made_up_trial.py TEMPLATE SECONDS CRASHES FOLDER [DEVICE]

TEMPLATE: a real trial, of which all but the losses is taken.    SECONDS: that it takes.
CRASHES: name of a trial in which the process fails once.
"""

import json
import math
import os
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

STARTED = time.time()


def main(template: str, seconds: str, crashes: str, folder: Path, *device: str) -> None:
    settings = json.loads((folder / "spec.json").read_text())["settings"]
    trial = json.loads(Path(template).read_text())
    parent = Connection(1, readable=False)
    count, counts = len(trial["counts"]), trial["counts"]
    loss = 2 + math.log10(settings["learning_rate"] / 3e-3) ** 2 + 0.01 * settings.get("seed", 0)
    steps = settings.get("max_steps") or 3
    for step in range(steps + 1):
        event = {"step": step, "steps": steps, "loss": loss, "parameters": settings["r"], "seconds": 0.01}
        parent.send({**event, "held_out": step in (0, steps)})
        time.sleep(float(seconds) / steps)
    if folder.name == crashes:
        sys.exit("the card has fallen off the bus")
    trial |= {
        "sums": [loss * tokens for tokens in counts[:count]],
        "curve": [[0, 3.0], [steps, loss]],
        "parameters": settings["r"],
        "numbers": {**trial["numbers"], "seed": settings.get("seed", 0)},
    }
    facts = {"from": STARTED, "to": time.time(), "threads": os.environ.get("OMP_NUM_THREADS"), "device": device}
    facts["cards"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    (folder / "facts.json").write_text(json.dumps(facts))
    parent.send(trial)


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]), *sys.argv[5:])
