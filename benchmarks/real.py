"""A real model on real data: time to the same number of supervised tokens, and to the same held-out loss.

    python benchmarks/real.py             writes benchmarks/results/real.json
    python benchmarks/real.py --only data=chat repeat=0

Every arm trains one pass over the same rows (the demo's conversations; film review snippets) with the same rank,
targets, learning rate, schedule and bf16 base. Held-out loss is computed after the run by one function for all arms,
from the adapter folders that each arm wrote on its way. Needs `pip install '.[bench]'`.
"""

import tempfile
import time
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure
from snippets import snippets_folder
from trainers import ARMS, Watch, packed, tailora

if TYPE_CHECKING:
    from tailora.data.dataset import Example

STARTED = time.perf_counter()
HELD_OUT = 60  # examples: the first of the held-out file
EVALUATED = 4  # of them in a forward
REPEATS = 3


def cells(quick: bool) -> list[measure.Cell]:
    grid = product(range(1 if quick else REPEATS), ["chat"] if quick else ["chat", "snippets"], list(ARMS))
    common = {"threads": 1 if quick else 2, "malloc": "default", "rows": 16 if quick else None}
    found = [{"repeat": repeat, "data": data, "arm": arm, **common} for repeat, data, arm in grid]
    return [cell for cell in found if cell["arm"] in ("tailora", "TRL, packed")] if quick else found


def work(data: str, arm: str, repeat: int, rows: int | None, threads: int) -> dict[str, Any]:
    """Seconds, memory, and the held-out loss along the way (of the first repeat; the others only tell the time)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = time.perf_counter()
        files = first_rows(data_files(data), rows, folder)
        fetching = time.perf_counter() - before  # of whichever arm comes first
        watch = Watch(folder)
        counts = train(arm, watch, files, folder)
        result = {
            **counts,
            "threads": threads,
            "wall": watch.snapshots[-1]["wall"],
            "cpu": watch.snapshots[-1]["cpu"],
            "whole_wall": time.perf_counter() - STARTED - fetching,
            "peak_bytes": measure.held("VmHWM"),
        }
        judged = watch.snapshots if repeat == 0 else []
        losses = held_out_losses(files[1], [Path(each.pop("path")) for each in judged])
    return {**result, "curve": [{**each, "loss": loss} for each, loss in zip(judged, losses, strict=True)]}


def train(arm: str, watch: Watch, files: tuple[Path, Path], folder: Path) -> dict[str, int]:
    """Run one arm; returns what it trained on."""
    from tailora.cli.train import DEFAULTS
    from tailora.data.prepare import prepare
    from tailora.train.config import TrainConfig
    from tailora.train.model_loading import load_base

    own = {"data": str(files[0]), "output_dir": str(folder / "run"), "validation_split": 0}
    config = TrainConfig(**{**DEFAULTS, **own})
    function, settings = ARMS[arm]
    base, tokenizer = load_base(config.model)
    examples = prepare(str(files[0]), tokenizer, max_length=config.max_length, validation_split=0).train
    if function is tailora:
        del base  # it loads its own
        tailora(config, watch, **settings)
    else:
        settings = {**settings, **packed(examples)} if settings.get("packing") else settings
        function(config, watch, base=base, tokenizer=tokenizer, examples=examples, **settings)
    return {"tokens": int(examples.lengths.sum()), "supervised_tokens": int(examples.supervised.sum())}


def held_out_losses(file: Path, adapters: list[Path]) -> list[float]:
    """Nats per supervised token with each of these adapters, by transformers' own forward on padded rows."""
    from tailora import LoRAModel
    from tailora.data.prepare import prepare
    from tailora.train.model_loading import load_base

    base, tokenizer = load_base("demo")
    examples = prepare(str(file), tokenizer, validation_split=0).train
    some = [examples[place] for place in range(min(HELD_OUT, len(examples)))]
    losses = []
    for folder in adapters:
        model = LoRAModel.from_pretrained(base, folder).eval()
        losses.append(loss(model, some, tokenizer.pad_token_id))
        model.unload()
    return losses


def loss(model: Any, examples: "list[Example]", pad_id: int) -> float:
    import torch
    from torch.nn.functional import cross_entropy

    from tailora.data.collate import collate_padded

    parts = []
    with torch.no_grad():
        for start in range(0, len(examples), EVALUATED):
            batch = collate_padded(examples[start : start + EVALUATED], pad_id)
            targets = batch.pop("labels")[:, 1:]  # (rows, longest - 1)
            wanted = targets != -100
            logits = model(**batch, use_cache=False).logits[:, :-1][wanted]  # (supervised, vocabulary)
            parts.append(cross_entropy(logits.float(), targets[wanted], reduction="none"))
    return float(torch.cat(parts).double().mean())


def data_files(data: str) -> tuple[Path, Path]:
    from tailora.data.demo import data_file, eval_file

    if data == "chat":
        return data_file(), eval_file()
    folder = snippets_folder()
    return folder / "train.jsonl", folder / "eval.jsonl"


def first_rows(files: tuple[Path, Path], rows: int | None, folder: Path) -> tuple[Path, Path]:
    """The training file cut to its first rows, and the held-out file as it is."""
    if rows is None:
        return files
    cut = folder / "rows.jsonl"
    cut.write_text("".join(files[0].read_text().splitlines(keepends=True)[:rows]))
    return cut, files[1]


if __name__ == "__main__":
    measure.main("real", str(__doc__), cells, work)
