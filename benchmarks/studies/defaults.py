"""Which learning rate, batch size and number of passes suit how many rows?

    python -m benchmarks.studies.defaults [SIZE]     runs what is missing in benchmarks/results/defaults.json

Every run trains the demo's model on some rows of one kind (defaults_data.py), and is judged by the loss on 40 other
rows, of the pirate's chats on 6. A case is a kind and a size. A setting's regret is how far its loss is
above the lowest one of the case. `tailora.train.defaults` has what was chosen.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.site import evidence_tables
from benchmarks.studies.defaults_data import KINDS, rows
from tailora.train import trainer
from tailora.train.config import TrainConfig

RESULTS = measure.RESULTS / "defaults.json"
CELL = ("kind", "size", "seed", "rate", "batch", "passes")
Setting = tuple[float, int, int]  # learning rate, batch size, passes
GRID: dict[int, tuple[Setting, ...]] = {
    30: (
        *((1e-3, 1, 3), (3e-4, 8, 1), (1e-3, 2, 3), (1e-3, 1, 2), (3e-4, 1, 5), (1e-3, 4, 5), (2e-3, 2, 3)),
        *((1e-3, 1, 5), (1e-3, 1, 1), (3e-4, 1, 3), (1e-3, 2, 5), (2e-3, 4, 5)),
    ),
    100: (
        *((1e-3, 2, 2), (3e-4, 8, 1), (1e-3, 1, 1), (1e-3, 2, 3), (1e-3, 4, 3), (3e-4, 2, 3), (2e-3, 4, 2)),
        *((1e-3, 1, 2), (1e-3, 4, 2), (3e-4, 1, 2), (1e-3, 8, 3), (2e-3, 8, 3)),
    ),
    400: (
        *((1e-3, 4, 1), (3e-4, 8, 1), (1e-3, 8, 1), (1e-3, 8, 2), (3e-4, 4, 2), (1e-3, 4, 2), (2e-3, 8, 1)),
        *((1e-3, 2, 1), (3e-4, 2, 1), (3e-4, 8, 2), (2e-3, 8, 2), (1e-3, 2, 2)),
    ),
}


def measured() -> list[dict[str, Any]]:
    return list(json.loads(RESULTS.read_text())["runs"]) if RESULTS.exists() else []


def write(file: Path, pairs: list[tuple[str, str]]) -> str:
    roles = ("user", "assistant")
    chats = [[{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)] for pair in pairs]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return str(file)


def train(cell: dict[str, Any]) -> dict[str, Any]:
    trained, judged = rows(cell["kind"], cell["size"], cell["seed"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = TrainConfig(
            data=write(folder / "train.jsonl", trained),
            eval_data=write(folder / "judged.jsonl", judged),
            output_dir=str(folder / "run"),
            learning_rate=cell["rate"],
            per_device_train_batch_size=cell["batch"],
            num_train_epochs=cell["passes"],
            seed=cell["seed"],
            metric_examples=0,
            save_steps=0,
        )
        started = time.process_time()
        result = trainer.run(config)
        seconds = time.process_time() - started
    return {
        **cell,
        "steps": result.steps,
        "tokens": result.supervised_tokens,
        "before": result.eval_loss_before,
        "after": result.eval_loss_after,
        "cpu_seconds": round(seconds, 1),
    }


def main(sizes: list[int]) -> None:
    runs = measured()
    done = [{name: run[name] for name in CELL} for run in runs]
    for size in sizes:
        for rate, batch, passes in GRID[size]:
            for kind in KINDS if size == min(GRID) else KINDS.keys() - {"pirate"}:
                cell = dict(zip(CELL, (kind, size, 0, rate, batch, passes), strict=True))
                if cell not in done:
                    runs.append(train(cell))
                    measure.write(RESULTS, {"runs": runs})
                    measure.log(f"{runs[-1]}")
    print(evidence_tables.defaults({"runs": runs}))


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or [*GRID])
