"""Experiment 6: LoRA's ranks, target layers and variants, and full fine-tuning, each at several learning rates.

    python -m benchmarks.studies.tiny_lm                 writes benchmarks/results/tiny_lm.json: the grid and the claims
    python -m benchmarks.studies.tiny_lm --make FOLDER   writes model, tokenizer and data, for `tailora compare`

The language and the arms are in markov.py, the tested statements in claims.py. A cell is one arm and seed at all
learning rates, 2^-10 to 2^-5. Losses are in nats per predicted token of 512 held-out texts.
"""

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks import measure
from benchmarks.studies import claims, markov

OCTAVES = range(-10, -4)
SEEDS = 2
STEPS, BASE_STEPS = 150, 1600
QUICK_STEPS = 40  # enough for a warm-up
TRAIN_TEXTS, EVAL_TEXTS = STEPS * markov.BATCH, 400


def cells(quick: bool) -> list[measure.Cell]:
    common = {"threads": 1, "malloc": "default", "steps": QUICK_STEPS if quick else STEPS}
    common |= {"base_steps": QUICK_STEPS if quick else BASE_STEPS, "octaves": [-7] if quick else list(OCTAVES)}
    arms = ["r8", "full"] if quick else list(markov.ARMS)
    return [{"arm": arm, "seed": seed, **common} for seed in range(1 if quick else SEEDS) for arm in arms]


def run_cell(arm: str, seed: int, steps: int, base_steps: int, octaves: list[int], threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    base = base_model(base_steps)
    started = time.process_time()
    losses = {
        octave: markov.held_out_loss(markov.train_arm(base, markov.ARMS[arm], 2.0**octave, steps, seed))
        for octave in octaves
    }
    return {
        "losses": losses,
        "base_loss": markov.held_out_loss(base),
        "floor": markov.lowest_loss(markov.new_table(), markov.held_out()),
        "trainable_parameters": markov.trainable_parameters(base, markov.ARMS[arm]),
        "cpu_seconds_each": (time.process_time() - started) / len(octaves),
    }


def base_model(steps: int) -> LlamaForCausalLM:
    """Returns the pretrained model. It is made once, and again if markov.py or torch changes."""
    version = hashlib.sha256(Path(markov.__file__).read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / "tailora-benchmarks" / f"tiny-lm-{steps}-{version}"
    if not folder.exists():
        fresh = folder.with_name(f"{folder.name}-{os.getpid()}")
        markov.pretrained(steps).save_pretrained(fresh)
        fresh.rename(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()


def mean_losses(results: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Returns arm -> {octave: mean over the seeds}."""
    by_arm: dict[str, list[Mapping[str, float]]] = {}
    for result in results:
        by_arm.setdefault(result["cell"]["arm"], []).append(result["result"]["losses"])
    return {arm: {int(octave): mean(run[octave] for run in runs) for octave in runs[0]} for arm, runs in by_arm.items()}


def write_claims(path: Path) -> None:
    """Adds the claims to the file of the cells: whether all seeds together show each, and how many do alone."""
    results = json.loads(path.read_text())["cells"]
    seeds = sorted({result["cell"]["seed"] for result in results})
    losses = mean_losses(results)
    if losses.keys() != markov.ARMS.keys():
        return  # the grid was stopped before its end
    alone = [
        claims.check_claims(mean_losses([result for result in results if result["cell"]["seed"] == seed]))
        for seed in seeds
    ]
    together = claims.check_claims(losses)
    checked = [
        {**asdict(claim), "seeds_alone": sum(of_seed[i].holds for of_seed in alone), "seeds": len(seeds)}
        for i, claim in enumerate(together)
    ]
    measure.write(path, {"cells": results, "claims": checked, "best_at_the_edge": claims.best_at_the_edge(losses)})
    log_claims(together)


def make(folder: str) -> None:
    markov.write_folder(base_model(BASE_STEPS), Path(folder), TRAIN_TEXTS, EVAL_TEXTS)


def log_claims(checked: list[claims.Claim]) -> None:
    for claim in checked:
        measure.log(f"{'yes' if claim.holds else 'NO '} {claim.statement}: {claim.found}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make(sys.argv[2])
    else:
        measure.main("tiny_lm", str(__doc__), cells, run_cell)
        if "--cell" not in sys.argv:
            write_claims((measure.QUICK if "--quick" in sys.argv else measure.RESULTS) / "tiny_lm.json")
