"""A real model on real data: time of one pass, and time to the same held-out loss.

    python -m benchmarks.speed.real             writes benchmarks/results/real.json
    python -m benchmarks.speed.real --only data=chat repeat=0

The data are the demo's conversations (chat) and film reviews (snippets). Every arm trains one pass over the same rows
with the same rank, target layers, learning rate, schedule and bf16 base, so all learn from the same number of tokens.
Held-out losses are computed after the run, by one function for all arms, from the adapter folders that each arm wrote
on its way. Needs `pip install '.[bench]'`.
"""

import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.speed.trainers import ARMS, SAME_WORK, Stopwatch, packing_settings, padded_losses, tailora
from benchmarks.studies.snippets import snippets_folder

STARTED = time.perf_counter()
HELD_OUT = 60  # examples, the first of the held-out file
EVAL_BATCH = 4
REPEATS = 3


def cells(quick: bool) -> list[measure.Cell]:
    grid = product(range(1 if quick else REPEATS), ["chat"] if quick else ["chat", "snippets"], list(ARMS))
    common = {"threads": 1 if quick else 2, "malloc": "default", "rows": 16 if quick else None}
    listed = [{"repeat": repeat, "data": data, "arm": arm, **common} for repeat, data, arm in grid]
    return [cell for cell in listed if cell["arm"] in ("tailora", "TRL, packed")] if quick else listed


def run_cell(data: str, arm: str, repeat: int, rows: int | None, threads: int) -> dict[str, Any]:
    """Returns seconds, memory and, for the first repeat, the held-out losses along the way."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = time.perf_counter()
        files = first_rows(data_files(data), rows, folder)
        fetching = time.perf_counter() - before  # only the first arm has to
        watch = Stopwatch(folder)
        counts = train(arm, watch, files, folder)
        result = {
            **counts,
            "threads": threads,
            "wall": watch.snapshots[-1]["wall"],
            "cpu": watch.snapshots[-1]["cpu"],
            "whole_wall": time.perf_counter() - STARTED - fetching,
            "peak_bytes": measure.process_memory("VmHWM"),
        }
        snapshots = watch.snapshots if repeat == 0 else []
        losses = held_out_losses(files[1], [Path(snapshot.pop("path")) for snapshot in snapshots])
    return {**result, "curve": [{**snapshot, "loss": loss} for snapshot, loss in zip(snapshots, losses, strict=True)]}


def train(arm: str, watch: Stopwatch, files: tuple[Path, Path], folder: Path) -> dict[str, int]:
    """Runs one arm; returns how many tokens it trained on."""
    from tailora.cli.train import DEFAULTS
    from tailora.data.chat_template import DataSettings
    from tailora.data.prepare import prepare
    from tailora.train.config import TrainConfig
    from tailora.train.model_loading import load_base

    paths = {"data": str(files[0]), "output_dir": str(folder / "run"), "validation_split": 0}
    config = TrainConfig(**{**DEFAULTS, **SAME_WORK, **paths})
    function, settings = ARMS[arm]
    base, tokenizer = load_base(config.model)
    data = DataSettings(max_length=config.max_length, validation_split=0)
    examples = prepare(str(files[0]), tokenizer, data).train
    if function is tailora:
        del base  # the run loads its own
        tailora(config, watch, **settings)
    else:
        settings = {**settings, **packing_settings(examples)} if settings.get("packing") else settings
        function(config, watch, base=base, tokenizer=tokenizer, examples=examples, **settings)
    return {"tokens": int(examples.lengths.sum()), "supervised_tokens": int(examples.supervised.sum())}


def held_out_losses(file: Path, adapters: list[Path]) -> list[float]:
    """Returns nats per supervised token with each of these adapters, by transformers' own forward on padded rows."""
    import torch

    from tailora import LoRAModel
    from tailora.data.chat_template import DataSettings
    from tailora.data.prepare import prepare
    from tailora.train.model_loading import load_base

    base, tokenizer = load_base("demo")
    examples = prepare(str(file), tokenizer, DataSettings(validation_split=0)).train
    first = [examples[i] for i in range(min(HELD_OUT, len(examples)))]
    batches = [first[start : start + EVAL_BATCH] for start in range(0, len(first), EVAL_BATCH)]
    losses = []
    for folder in adapters:
        model = LoRAModel.from_pretrained(base, folder).eval()
        with torch.no_grad():
            parts = [padded_losses(base, batch, tokenizer.pad_token_id) for batch in batches]
        losses.append(float(torch.cat(parts).double().mean()))
        model.unload()
    return losses


def data_files(data: str) -> tuple[Path, Path]:
    from tailora.data.demo import data_file, eval_file

    if data == "chat":
        return data_file(), eval_file()
    folder = snippets_folder()
    return folder / "train.jsonl", folder / "eval.jsonl"


def first_rows(files: tuple[Path, Path], rows: int | None, folder: Path) -> tuple[Path, Path]:
    """Returns the training file, cut to its first rows if `rows` is given, and the held-out file."""
    if rows is None:
        return files
    cut = folder / "rows.jsonl"
    cut.write_text("".join(files[0].read_text().splitlines(keepends=True)[:rows]))
    return cut, files[1]


if __name__ == "__main__":
    measure.main("real", str(__doc__), cells, run_cell)
