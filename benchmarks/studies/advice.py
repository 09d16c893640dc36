"""Does it help to follow the advice after a run?

    python -m benchmarks.studies.advice     runs what is missing in benchmarks/results/advice.json

Every case is a run on some rows of one kind (defaults_data.py). If it ends with advice, a second run follows it. More
rows are three times as many of the same kind.
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.studies.defaults import write
from benchmarks.studies.defaults_data import rows
from tailora.report.pages.train import train_report
from tailora.report.run_advice import advice_of
from tailora.train import trainer
from tailora.train.config import TrainConfig

RESULTS = measure.RESULTS / "advice.json"
LONG, SLOW = {"learning_rate": 1e-3, "num_train_epochs": 12}, {"learning_rate": 1e-4}
SHORT = {"learning_rate": 3e-4, "num_train_epochs": 1, "per_device_train_batch_size": 8}


@dataclass(frozen=True)
class Case:
    kind: str
    size: int
    settings: dict[str, Any]


CASES = [
    *(Case(kind, 30, LONG) for kind in ("style", "facts")),
    *(Case(kind, 30, SLOW) for kind in ("chats", "style", "facts", "translation")),
    *(Case(kind, 100, {"num_train_epochs": 1}) for kind in ("arithmetic", "extraction", "facts", "style")),
    *(Case(kind, 30, {"num_train_epochs": 6}) for kind in ("labels", "translation", "style", "facts")),
    *(Case(kind, 30, {}) for kind in ("labels", "facts", "style", "extraction")),
    *(Case(kind, 100, SHORT) for kind in ("arithmetic", "extraction", "facts", "translation")),
    Case("arithmetic", 30, LONG),
]


def train(case: Case, size: int, changes: dict[str, Any]) -> tuple[float, str, list[str]]:
    """Returns the held-out loss, the advice, and its flags."""
    trained, judged = rows(case.kind, size, 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = {
            part: write(folder / f"{part}.jsonl", pairs) for part, pairs in (("data", trained), ("eval_data", judged))
        }
        fixed = {"output_dir": str(folder / "run"), "metric_examples": 0, "save_steps": 0}
        trainer.run(TrainConfig(**{**data, **fixed, **case.settings, **changes}))
        report = train_report(folder / "run")
    curve = [(point["step"], point["loss"]) for point in report["evaluations"]]
    losses = [step["loss"] for step in report["steps"]]
    advice = advice_of(report["settings"], losses, curve, len(judged)) if report["finding"] == "better" else ("", [])
    return curve[-1][1], *advice


def main() -> None:
    cases = json.loads(RESULTS.read_text())["cases"] if RESULTS.exists() else []
    done = [{name: case[name] for name in ("kind", "size", "settings")} for case in cases]
    for case in CASES:
        if asdict(case) in done:
            continue
        loss, advice, flags = train(case, case.size, {})
        result = {**asdict(case), "loss": loss, "advice": advice, "flags": flags}
        if advice:
            changes = {flags[0].removeprefix("--").replace("-", "_"): float(flags[1])} if flags else {}
            size = case.size if flags else 3 * case.size
            result["followed"], *_ = train(case, size, changes)
        cases.append(result)
        measure.write(RESULTS, {"cases": cases})
        measure.log(f"{result}")


if __name__ == "__main__":
    main()
