"""The demo's model on a bf16 base and on quantised ones: weights, peak memory, speed, held-out loss after a few steps.

    python -m benchmarks.memory.quantized           writes benchmarks/results/quantized.json

For the speed, the arms' own runs take turns step by step in one process. For memory and loss, each arm has a run in a
process of its own. Peaks are those of the whole process; `imported_bytes` is what the imported packages take.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.speed.arms import ENDLESS, paused_run
from tailora.train.config import TrainConfig
from tailora.train.events import Event, Prepared, Stepped

ARMS = ["bf16", "bf16, fast off", "nf4", "fp4", "int8", "torchao-int8"]
LOSS_STEPS, HELD_OUT = 8, 24


def cells(quick: bool) -> list[measure.Cell]:
    arms = ["bf16", "nf4"] if quick else ARMS
    common = {"threads": 2, "malloc": "default", "steps": 2 if quick else LOSS_STEPS}
    in_turn = arms if quick else ["bf16", "nf4", "int8", "torchao-int8"]
    speed = {**common, "what": "speed", "arms": in_turn, "rounds": 1 if quick else 3}
    return [speed, *({**common, "what": "run", "arm": arm} for arm in arms)]


def settings(arm: str) -> dict[str, Any]:
    shared = {"model": "demo", "data": "demo", "dtype": "bfloat16", "learning_rate": 1e-3}
    if arm.startswith("bf16"):
        return {**shared, "fast": "off" if arm.endswith("off") else "auto"}
    return {**shared, "quantize": arm}


def speed(arms: list[str], rounds: int) -> dict[str, Any]:
    """Returns the seconds and losses of steps of 8 examples; every arm has the same batches."""
    with ExitStack() as stack:
        steps: dict[str, Any] = {}
        events_of: dict[str, list[Stepped]] = {arm: [] for arm in arms}
        for arm in arms:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            config = TrainConfig(**settings(arm), output_dir=f"{folder}/run", validation_split=0, max_steps=ENDLESS)
            events = paused_run(config)
            stack.callback(events.close)

            def step(events: Any = events, steps_of_arm: list[Stepped] = events_of[arm]) -> None:
                steps_of_arm.append(next(event for event in events if isinstance(event, Stepped)))

            steps[arm] = step
        times = measure.take_turns(steps, rounds, measure.clock_for(2))
    return {
        "seconds": {arm: measure.spread(values) for arm, values in times.items()},
        "x_bf16": measure.ratios(times, "bf16"),
        "losses": {arm: [event.loss for event in events] for arm, events in events_of.items()},
    }


def one_run(arm: str, steps: int) -> dict[str, Any]:
    """Returns what a whole run of the arm took: held-out losses, the peak of the process, bytes of the weights."""
    from tailora.train.trainer import run

    imported = measure.process_memory("VmRSS")
    headers: list[dict[str, Any]] = []

    def on_event(event: Event) -> None:
        if isinstance(event, Prepared):
            headers.append(event.header)

    with tempfile.TemporaryDirectory() as folder:
        held_out = Path(folder) / "held_out.jsonl"
        held_out.write_text("".join(held_out_examples()[:HELD_OUT]))
        chosen = {**settings(arm), "eval_data": str(held_out), "max_steps": steps, "output_dir": f"{folder}/run"}
        result = run(TrainConfig(**chosen), on_event=on_event)
    return {
        "imported_bytes": imported,
        "base_bytes": headers[0]["base_bytes"],
        "kept_bytes": headers[0]["estimated_activation_bytes"],
        "kernels": headers[0]["kernels"],
        "peak_bytes": result.peak_memory_bytes,
        "tokens_per_second": result.tokens_per_second,
        "loss_before": result.eval_loss_before,
        "loss_after": result.eval_loss_after,
    }


def held_out_examples() -> list[str]:
    from tailora.data.demo import eval_file

    return eval_file().read_text().splitlines(keepends=True)


def run_cell(what: str, threads: int, steps: int, **cell: Any) -> dict[str, Any]:
    del threads  # set in the environment
    return speed(**cell) if what == "speed" else one_run(cell["arm"], steps)


if __name__ == "__main__":
    measure.main("quantized", str(__doc__), cells, run_cell)
