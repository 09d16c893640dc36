"""Which training rows of a finished run hurt: scores, repeated rows, and a proof by training without them.

    score    a score for each row, from gradients on the selection half of the held-out examples (influence.py)
             and rows that repeat or contradict each other (data/near_duplicates.py)
    prove    train with all rows, and without the k rows of the highest scores, the highest losses, or at random
             -> differences on the evaluation half, which had no influence on the scores; verdict

All runs have the settings and the steps of the finished run, but other seeds. Removed rows stay in their batches with
weight 0: without them, each of the others would be used more often in the same number of steps, which alone changes the
loss. Random rows are drawn for each seed. The same call resumes.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tailora.data.dataset import group_equal
from tailora.data.near_duplicates import contradictions, duplicates, near_duplicates
from tailora.errors import ConfigError
from tailora.formats.run_folder import ADAPTER, ADAPTER_WEIGHTS, write_report
from tailora.study.budget import MARGIN
from tailora.study.config import RowsConfig, trial_settings
from tailora.study.influence import FinishedRun, row_scores
from tailora.study.results import ArmResult, RowsResult, ScoredRow
from tailora.study.search_space import STEP_CHOICE
from tailora.study.study_store import (
    PLAN,
    Log,
    StudySession,
    locked,
    make_workers,
    map_on_workers,
    open_folder,
    study_settings,
)
from tailora.study.trial import (
    DONE,
    Progress,
    RunTrial,
    Trial,
    TrialSpec,
    Worker,
    evaluation_half,
    run_in_subprocess,
    selection_half,
)
from tailora.study.verdict import format_difference, one_seed, run_statistics
from tailora.train.config import TrainConfig

STUDY, RUNS, KIND = "rows.json", "runs", "rows"
SHARE = 0.05  # of the rows to remove, unless the number is set
ALL, WORST, RANDOM, LOSS = "all rows", "without the highest scores", "without random rows", "without the highest losses"
FOLDERS = {ALL: "all", WORST: "score", RANDOM: "random", LOSS: "loss"}
TEXTS, LONGEST = 200, 300  # rows that are shown with their text; its characters
LOCATION = re.compile(r"(.*?)(?::|, item )(\d+)$")


def score_rows(
    train: TrainConfig,
    study: RowsConfig,
    log: Log = lambda _: None,
    progress: Progress | None = None,
    run_trial: RunTrial = run_in_subprocess,
    *,
    processes: int = 1,
) -> RowsResult:
    """Completes the study in `train.output_dir` and returns its result.

    train: settings of the finished run `study.run`, with the folder of the study.    processes: of each run of a proof.
    Raises ConfigError, and any error of a run except divergence and lack of memory.
    """
    finished, folder = FinishedRun.read(Path(study.run)), Path(train.output_dir)
    adapter = hashlib.sha256((Path(study.run) / ADAPTER / ADAPTER_WEIGHTS).read_bytes()).hexdigest()
    settings = study_settings(finished.settings, processes, rows={"run": study.run, "adapter": adapter})
    workers = make_workers(study.workers, train.device, study.minutes, processes) if study.prove else []
    with locked(folder, STUDY):
        open_folder(folder, STUDY, settings, begun=(folder / PLAN).exists())
        session = StudySession(folder, study.minutes, log, progress, run_trial, processes)
        scored = session.plan(lambda: _scored(finished, log), RowsResult)
        k = study.k or max(1, round(SHARE * len(scored.rows)))
        if k >= len(scored.rows):
            raise ConfigError(f"--k {k} would remove all {len(scored.rows)} training rows; use a lower number")
        result = replace(scored, k=k, settings=settings, notes=session.notes)
        if study.prove:
            seeds = [finished.settings.seed + number for number in range(1, study.seeds + 1)]
            result = _with_proof(result, finished, session, workers, seeds)
    verdict, proven = rows_verdict(result.variants, k, result.loss_unit)
    result = replace(result, verdict=verdict, proven=proven, seconds=session.seconds)
    write_report(folder, KIND, result.to_dict())
    return result


# ---- Scores


def _scored(finished: FinishedRun, log: Log) -> RowsResult:
    with ExitStack() as stack:
        run = finished.load(stack)
        assert run.data.prepared is not None
        if not run.data.held_out:
            raise ConfigError("rows are scored by the held-out loss, but the run has no held-out examples")
        held_out = run.data.held_out.select(selection_half(len(run.data.held_out)))
        examples, locations = [*run.data.known], run.data.prepared.locations
        rows = group_equal([location.encode() for location in locations])
        firsts = [examples[of_row[0]] for of_row in rows]
        log(f"scoring {len(rows):,} rows by their gradients on {len(held_out):,} held-out examples")
        scores, losses = row_scores(run, rows, held_out, log)
        scored: list[ScoredRow] = []
        for index in np.argsort(-scores, kind="stable").tolist():
            file, number = LOCATION.findall(locations[rows[index][0]])[0]
            text = run.tokenizer.decode(firsts[index].input_ids[:LONGEST])[:LONGEST] if len(scored) < TEXTS else ""
            numbers = float(scores[index]), float(losses[index])
            scored.append(ScoredRow(int(number), file, *numbers, rows[index], text))
        return RowsResult(
            run=finished.settings.output_dir,
            rows=scored,
            repeated={
                find.__name__: [[locations[rows[index][0]] for index in group] for group in find(firsts)]
                for find in (duplicates, near_duplicates, contradictions)
            },
            held_out=len(held_out),
            steps=run.data.max_steps,
            loss_unit=run.task.loss_unit,
        )


# ---- Proof


def _with_proof(
    result: RowsResult, finished: FinishedRun, session: StudySession, workers: Sequence[Worker], seeds: Sequence[int]
) -> RowsResult:
    """Trains with and without the first k rows, with as many seeds as there is time for."""
    seconds = len(FOLDERS) * finished.seconds / max(len(workers), 1)  # of one seed
    session.log(
        f"{len(FOLDERS) * len(seeds)} runs with and without {result.k} of {len(result.rows):,} rows, about "
        f"{seconds * len(seeds) / 60:.0f} min"
    )
    train, trials = partial(_train_without, result, finished), {name: list[Trial]() for name in FOLDERS}
    for wave in [seeds] if session.minutes is None else [[seed] for seed in seeds]:
        if session.seconds_left < seconds:
            if not trials[ALL]:
                needed = math.ceil(MARGIN * (session.seconds + 2 * seconds) / 60)
                raise ConfigError(f"--minutes {session.minutes:g} is too short; use {needed} or more")
            session.note(f"only {len(trials[ALL])} of {len(seeds)} seeds fit into --minutes")
            break
        begun, runs = session.seconds, [(name, seed) for seed in wave for name in FOLDERS]
        for (name, seed), trial in zip(runs, map_on_workers(session, workers, train, runs), strict=True):
            if not trial.done:
                raise ConfigError(f"nothing is proven: the run {name} with seed {seed} failed ({trial.message})")
            session.log(f"{name}: seed {seed}, {trial.summary}")
            trials[name].append(trial)
        seconds = session.seconds - begun
    session.note_workers(chain(*trials.values()))
    # Rows are harmful only if two differences both show it, so their intervals need no adjustment
    statistics = run_statistics(trials, WORST, comparisons=1)
    variants = []
    for name, of_name in trials.items():
        losses = [trial.loss(evaluation_half(len(trial.counts))) for trial in of_name]
        variants.append(ArmResult(name, {}, DONE, seed_losses=losses, **statistics.fields(name, of_name)))
    evaluated, base_loss = statistics.examples, statistics.base_loss
    return replace(result, variants=variants, seeds=statistics.seeds, evaluated=evaluated, base_loss=base_loss)


def _train_without(result: RowsResult, finished: FinishedRun, session: StudySession, run: tuple[str, int]) -> Trial:
    """run: key of FOLDERS, seed."""
    (name, seed), rows, k = run, result.rows, result.k
    orders: dict[str, Sequence[int]] = {
        ALL: [],
        WORST: range(len(rows)),
        RANDOM: np.random.default_rng(seed).permutation(len(rows)).tolist(),
        LOSS: sorted(range(len(rows)), key=lambda index: -rows[index].loss),
    }
    left_out = chain.from_iterable(rows[index].examples for index in orders[name][:k])
    folder = session.folder / RUNS / (FOLDERS[name] if name == ALL else f"{FOLDERS[name]}-{k}")
    return session.trial(spec_without(left_out, finished.settings, seed, result.steps), folder / f"seed-{seed}")


def spec_without(examples: Iterable[int], train: TrainConfig, seed: int, steps: int) -> TrialSpec:
    """Returns a run with the settings `train`, another seed, and weight 0 for these training examples."""
    fixed: Any = {"seed": seed, "max_steps": steps, "save_steps": 0, "report_to": [], "passport": "none"}
    return TrialSpec(trial_settings(train, fixed, STEP_CHOICE), keep=False, left_out=sorted(examples))


def rows_verdict(variants: Sequence[ArmResult], k: int, unit: str) -> tuple[str, bool]:
    """Returns the sentences, and whether the rows are harmful. Differences are from the runs without these rows."""
    if not variants:
        return f"Not proven: scores are estimates. --prove trains again without the {k} rows at the top.", False
    differences = {variant.name: variant.difference for variant in variants if variant.difference is not None}
    with_all, of_random, of_loss = (differences[name] for name in (ALL, RANDOM, LOSS))
    numbers, than_random, than_loss = (
        f"{name} - {WORST} = {format_difference(differences[name], unit)}" for name in (ALL, RANDOM, LOSS)
    )
    if with_all.seeds == 1:
        return one_seed(f"training with or without these {k} rows", numbers), False
    begin, proven = f"Cannot tell whether these {k} rows are harmful:", False
    if with_all.high < 0:
        text = f"Keep these {k} rows: the model is worse without them ({numbers})."
    elif with_all.low <= 0:
        text = f"{begin} the interval of the difference contains 0 ({numbers})."
    elif of_random.low <= 0:
        text = f"{begin} removing them helped ({numbers}), but not more than removing random rows ({than_random})."
    else:
        proven = True
        text = (
            f"These {k} rows are harmful: the held-out loss is lower without them ({numbers}), and lower than without "
            f"random rows ({than_random}). Correct or remove them."
        )
    if of_loss.high < 0:
        text += f" Removing the {k} rows with the highest losses helps more ({than_loss})."
    return text, proven
