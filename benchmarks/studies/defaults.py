"""Which batch size, number of passes and learning rate suit how many rows?

    python -m benchmarks.studies.defaults            runs what is missing in benchmarks/results/defaults.jsonl
    python -m benchmarks.studies.defaults --report   prints how close each rule comes to the best setting

Every run trains the demo's model on some rows of one kind (defaults_data.py), and is judged by the loss on 40 other
rows. A case is a kind and a size. Its best setting is the one of GRID[size] with the lowest loss.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.studies.defaults_data import KINDS, rows
from tailora.train import trainer
from tailora.train.config import TrainConfig

RESULTS = Path(__file__).parents[1] / "results" / "defaults.jsonl"
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


def cells(size: int, most: int) -> Iterator[dict[str, Any]]:
    """Yields the first `most` settings for all kinds."""
    for rate, batch, passes in GRID[size][:most]:
        for kind in KINDS:
            if kind != "pirate" or size == 30:
                yield {"kind": kind, "size": size, "seed": 0, "rate": rate, "batch": batch, "passes": passes}


def measured() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


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


def main(sizes: list[tuple[int, int]]) -> None:
    done = {
        json.dumps({name: row[name] for name in ("kind", "size", "seed", "rate", "batch", "passes")})
        for row in measured()
    }
    for size, most in sizes:
        for cell in cells(size, most):
            if json.dumps(cell) not in done:
                row = train(cell)
                print(row, flush=True)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main([(30, 2), (100, 2), (30, 7), (100, 7), (400, 2), (30, 12), (100, 12), (400, 7)])
