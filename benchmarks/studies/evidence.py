"""What is true about LoRA: tests common statements with `tailora compare` on two models and three data sets.

    python -m benchmarks.studies.evidence                  writes benchmarks/results/evidence.json, cell by cell
    python -m benchmarks.studies.evidence --only setting=reviews study=full
    python -m benchmarks.studies.evidence --only study=rewards     writes benchmarks/results/evidence_rewards.json
    python -m benchmarks.studies.evidence --judge          evaluates the stored measurements again
    python -m benchmarks.studies.evidence --make FOLDER    writes data and STUDY.yaml of every setting

The settings and their studies are in evidence_data.py, the statements and the rules for their verdicts in
evidence_rules.py. A cell is one study, a complete run of the command. Studies of a setting share common runs, which are
kept in the folder for temporary files, so an interrupted run resumes.
"""

import hashlib
import json
import os
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import measure
from benchmarks.studies.evidence_data import FULL, PLAIN, STUDIES, study, write_setting
from benchmarks.studies.evidence_rules import findings, of_grid
from benchmarks.studies.tiny_lm import BASE_STEPS, QUICK_STEPS
from tailora.evaluation.spectral import intruder_counter, module_report, updates_of
from tailora.study.compare import compare
from tailora.study.config import CompareConfig
from tailora.study.trial import (
    Listen,
    Trial,
    TrialSpec,
    Worker,
    evaluation_half,
    get_trial,
    run_here,
    run_in_subprocess,
)
from tailora.train.config import TrainConfig
from tailora.train.trainer import run

REWARDS_FILE = "evidence_rewards"  # of the study "rewards", which is younger than the others
EVERY = 10  # of the layers of a large model, one is looked at for intruders
NOT_IDENTITY = ("before", "texts", "processes")  # of a TrialSpec: change no result
STORED = ("reference", "base_loss", "steps", "seeds", "judged_examples", "verdict", "p_values", "notes")
STORED_OF_ARM = ("name", "changes", "outcome", "learning_rate", "rates", "bracketed", "eval_loss", "interval")
STORED_OF_ARM += ("difference", "trainable_parameters", "forgetting", "seed_losses")


def cells(quick: bool, *, file: str = "evidence") -> list[measure.Cell]:
    listed = [
        {"setting": setting, "study": name}
        for setting, names in STUDIES.items()
        for name in (*names, *["intruders"] * ("full" in names))
        if (name == "rewards") == (file == REWARDS_FILE)
    ]
    if quick:
        listed = [cell for cell in listed if cell["setting"] == "markov" and cell["study"] in ("full", "intruders")]
    return [{**cell, "threads": 1, "malloc": "default", "quick": quick} for cell in listed]


def run_cell(setting: str, study: str, quick: bool, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    work = measure.QUICK / f"evidence{'-quick' * quick}" / measure.source_hash() / setting
    if not (work / "data").exists():
        write_setting(setting, work / "fresh", base_steps=QUICK_STEPS if quick else BASE_STEPS)
        (work / "fresh").rename(work / "data")
    os.chdir(work / "data")  # so that results contain the same paths as the commands
    runs = Runs(work / "runs")
    if study == "intruders":
        return count_intruders(setting, runs, quick=quick)
    return run_study(setting, study, runs, quick=quick)


class Runs:
    """Trials of a setting by their settings, each made once and then read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base: dict[bool, Any] = {}  # choosing -> losses of the base

    def __call__(self, spec: TrialSpec, folder: Path, listen: Listen, worker: Worker | None = None) -> Trial:
        del folder, worker
        kept = {name: value for name, value in asdict(spec).items() if name not in NOT_IDENTITY}
        name = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
        texts = str(self.folder.parent / "texts.json")
        spec = replace(spec, texts=texts, before=spec.before or self.base.get(spec.choosing))
        started = time.perf_counter()
        trial = get_trial(spec, self.folder / name, stop=listen, run_trial=run_here)
        measure.log(f"    {time.perf_counter() - started:.0f} s")
        self.base.setdefault(spec.choosing, trial.base)
        return trial


def run_study(setting: str, name: str, runs: Runs, *, quick: bool) -> dict[str, Any]:
    """Returns the report of the comparison, and the loss of every held-out example."""
    settings = study(setting, name, quick=quick)
    folder = runs.folder.parent / name
    train = {**settings, "output_dir": str(folder)}
    of_study = {key: train.pop(key) for key in tuple(train) if key in CompareConfig.model_fields}
    run_trial = run_in_subprocess if "workers" in of_study else runs
    report = asdict(compare(TrainConfig(**train), CompareConfig(**of_study), measure.log, run_trial=run_trial))
    arms = [arm for arm in report["arms"] if arm["outcome"] == "done"]
    trials = {
        arm["name"]: [
            trial_of(folder, arm["name"], f"seed-{seed}-rate-{arm['learning_rate']:.3g}") for seed in report["seeds"]
        ]
        for arm in arms
    }
    tries = {
        arm["name"]: {
            repr(rate): trial_of(folder, arm["name"], f"rate-{rate:.3g}")
            for rate, loss in arm["rates"].items()
            if loss is not None
        }
        for arm in arms
    }
    any_trial, any_try = (next(iter(values)) for values in (trials[arms[0]["name"]], tries[arms[0]["name"]].values()))
    judging = evaluation_half(len(any_trial.counts))
    return {
        "command": f"tailora compare --config {name}.yaml --output-dir outputs/{name}",
        "settings": settings,
        "report": {key: report[key] for key in STORED}
        | {"arms": [{key: arm[key] for key in STORED_OF_ARM} for arm in report["arms"]]},
        "counts": np.array(any_trial.counts)[judging].tolist(),
        "sums": {arm: [rounded(np.array(trial.sums)[judging]) for trial in of_arm] for arm, of_arm in trials.items()},
        "kl": {arm: [trial.forgetting["kl"] for trial in of_arm if trial.forgetting] for arm, of_arm in trials.items()},
        "rate_counts": any_try.counts,
        "rate_sums": {
            arm: {rate: rounded(trial.sums) for rate, trial in of_arm.items()} for arm, of_arm in tries.items()
        },
    }


def trial_of(folder: Path, arm: str, name: str) -> Trial:
    return Trial(**json.loads((folder / "runs" / arm / name / "trial.json").read_text()))


def rounded(values: Any) -> list[float]:
    return [round(float(value), 4) for value in values]


# ---- Intruder dimensions


def count_intruders(setting: str, runs: Runs, *, quick: bool) -> dict[str, Any]:
    """Trains LoRA and full fine-tuning at the best rates of the study "full", and looks at their weights.

    matrices: path -> intruders among the 10 leading directions of each, and of a random update of LoRA's norm.
    """
    reported = run_study(setting, "full", runs, quick=quick)["report"]
    rates = {arm["name"]: arm["learning_rate"] for arm in reported["arms"]}
    settings = study(setting, "full", quick=quick)
    arms = settings["arms"]
    common = {key: value for key, value in settings.items() if key in TrainConfig.model_fields}
    common |= {"seed": reported["seeds"][0], "samples": 0}
    lora = trained({**common, "learning_rate": rates[PLAIN]}, runs.folder.parent / "intruders-lora")
    reports = {
        update.path: module_report(update)
        for update in updates_of(lora.adapter(), lora.base_model)[0].values()
        if layer_number(update.path) % EVERY == 0 or lora.base_model.config.num_hidden_layers <= EVERY
    }
    of_adapters = ("r", "lora_alpha")
    full_settings = {key: value for key, value in common.items() if key not in of_adapters}
    full = trained({**full_settings, **arms[FULL], "learning_rate": rates[FULL]}, runs.folder.parent / "intruders-full")
    with full.disable_adapter():
        before = {path: weight_of(full, path).clone() for path in reports}
    matrices = {}
    for path, report in reports.items():
        W, tuned = before[path], full.trained[f"{path}.weight".replace(".", "/")].detach()
        matrices[path] = {
            "lora": report.intruders,
            "full": intruder_counter(W)(tuned),
            "random": report.intruders_random,
            "relative_norm_lora": report.relative_norm,
            "relative_norm_full": float((tuned - W).norm() / W.norm()),
        }
    return {"matrices": matrices, "rates": rates}


def trained(settings: dict[str, Any], folder: Path) -> Any:
    """Returns the model of a training run: a LoRAModel or a FullModel."""
    return run(TrainConfig(**{**settings, "output_dir": str(folder)})).model


def weight_of(model: Any, path: str) -> torch.Tensor:
    return model.base_model.get_submodule(path).weight.detach().float()


def layer_number(path: str) -> int:
    return next(int(part) for part in path.split(".") if part.isdigit())


# ---- Files


def make(folder: str) -> None:
    """Writes a folder for each setting, with its data and a YAML file for each study; JSON is YAML."""
    for setting, names in STUDIES.items():
        path = Path(folder) / setting
        write_setting(setting, path, base_steps=BASE_STEPS)
        for name in names:
            (path / f"{name}.yaml").write_text(json.dumps(study(setting, name), indent=1) + "\n")


def write_findings(path: Path) -> None:
    """Adds to the file of the cells what they say of each statement."""
    content = json.loads(path.read_text())
    measured = content["cells"]
    results: dict[str, dict[str, Any]] = {setting: {} for setting in STUDIES}
    rewards = measure.RESULTS / f"{REWARDS_FILE}.json"
    for cell in measured + (json.loads(rewards.read_text())["cells"] if rewards.exists() else []):
        results[cell["cell"]["setting"]][cell["cell"]["study"]] = cell["result"]
    found = findings(results)
    found += of_grid("tiny_lm", json.loads((measure.RESULTS / "tiny_lm.json").read_text())["cells"])
    results_of_runs = {"machine": content["machine"], "cells": measured}
    measure.write(path, {**results_of_runs, "findings": [asdict(finding) for finding in found]})
    for finding in found:
        measure.log(
            f"{finding.verdict:14} {finding.statement:10} {finding.setting:8} {finding.quantity}: "
            f"{finding.value:+.3f} ({finding.low:+.3f} to {finding.high:+.3f}) {finding.remark}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make(sys.argv[2])
    elif sys.argv[1:] == ["--judge"]:
        write_findings(measure.RESULTS / "evidence.json")
    else:
        file = REWARDS_FILE if "study=rewards" in sys.argv else "evidence"
        measure.main(file, str(__doc__), partial(cells, file=file), run_cell)
        if "--cell" not in sys.argv:
            write_findings((measure.QUICK if "--quick" in sys.argv else measure.RESULTS) / "evidence.json")
