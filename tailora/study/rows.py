"""Which training rows of a finished run hurt: scores, repeated rows, and a proof by training without them.

    score    each row, by gradients of the selection half of the held-out examples (influence.py); find rows that repeat
             or contradict each other (data/duplicates.py)
    prove    train with all rows, and without the k rows of the highest scores, the highest losses, or at random
             -> differences on the evaluation half, which rows were not scored on; verdict

All runs have the settings of the finished run, but other seeds, and as many steps as led to the adapter that it kept.
Removed rows stay in their batches with weight 0: without them, each of the others would be used more often in the same
number of steps, which alone changes the loss. Random rows are drawn for each seed. The same call resumes.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from tailora.data.chat_template import ChatTokenizer
from tailora.data.dataset import Example, evaluation_half, group_equal, selection_half
from tailora.data.duplicates import contradictions, duplicates, near_duplicates
from tailora.data.labels import Labels
from tailora.data.tokenize import preview
from tailora.errors import ConfigError
from tailora.formats.run_folder import ADAPTER, ADAPTER_WEIGHTS, write_report
from tailora.study.comparison_verdict import format_difference, one_seed, run_statistics
from tailora.study.config import RowsConfig, trial_settings
from tailora.study.influence import FinishedRun, row_scores
from tailora.study.results import TEXTS, ArmResult, Measure, RowGroup, RowsResult, ScoredRow, measure_of
from tailora.study.search_space import STEP_CHOICE
from tailora.study.study_store import PLAN, Log, StudySession, locked, open_folder, study_settings
from tailora.study.trial import (
    DONE,
    RESULT,
    Progress,
    RunTrial,
    Trial,
    TrialSpec,
    run_in_subprocess,
)
from tailora.train.config import TrainConfig
from tailora.train.memory import return_cached_memory
from tailora.train.setup import Run

STUDY, RUNS = "rows.json", "runs"
SHARE = 0.05  # of the rows to remove, unless the number is set
ALL, WORST, RANDOM, LOSS = "all rows", "without highest scores", "without random rows", "without highest losses"
FOLDERS = {ALL: "all", WORST: "score", RANDOM: "random", LOSS: "loss"}
HALF = 80  # characters that are shown of a text's beginning, and of its end
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

    train: settings of the finished run `study.run`, with the folder of the study.
    processes: of each run of a proof.
    Raises ConfigError, and any error of a run except divergence and lack of memory.
    """
    finished, folder = FinishedRun.read(Path(study.run)), Path(train.output_dir)
    if study.prove and processes != finished.processes:
        text = f"{study.run} was trained with --nproc-per-node {finished.processes}, but the proof has {processes}"
        raise ConfigError(f"{text}; use --nproc-per-node {finished.processes}")
    processes = finished.processes  # without a proof, too, so that a proof can follow
    adapter = hashlib.sha256((Path(study.run) / ADAPTER / ADAPTER_WEIGHTS).read_bytes()).hexdigest()[:12]
    settings = study_settings(finished.settings, processes, rows={"adapter_sha256": adapter})
    with locked(folder, STUDY, wait=False):
        open_folder(folder, STUDY, settings, begun=(folder / PLAN).exists())
        session = StudySession(folder, study.minutes, log, progress, run_trial, processes)
        scored = session.plan(lambda: _scored(finished, log), RowsResult)
        return_cached_memory()  # the proof's runs are other processes on the same device
        k = study.k or max(1, round(SHARE * len(scored.rows)))
        if study.prove and k >= len(scored.rows):
            raise ConfigError(f"--k {k} would remove all {len(scored.rows)} training rows; use a lower number")
        result = replace(scored, run=study.run, k=k, settings=settings, notes=session.notes)
        first = finished.settings.seed + 1
        seeds: Sequence[int] = range(first, first + study.seeds)
        if not study.prove:  # an earlier proof stays in the report
            seeds = [*takewhile(lambda seed: not _missing(session, k, [seed]), count(first))]
        if seeds:
            result = _with_proof(result, finished, session, seeds)
    verdict, proven = rows_verdict(result.variants, k, measure_of(result.loss_unit))
    result = replace(result, verdict=verdict, proven=proven)
    write_report(folder, "rows", result.to_dict())
    return result


# ---- Scores


def _scored(finished: FinishedRun, log: Log) -> RowsResult:
    with ExitStack() as stack:
        run = finished.load(stack)
        assert run.data.prepared is not None
        if not run.data.held_out:
            raise ConfigError("rows needs held-out examples, but the run has none; train with --validation-split")
        held_out = run.data.held_out.select(selection_half(len(run.data.held_out)))
        examples, locations = [*run.data.known], run.data.prepared.locations
        rows = group_equal([location.encode() for location in locations])
        whole = [_whole([examples[index] for index in of_row]) for of_row in rows]
        log(f"scoring {len(rows):,} rows by their gradients on {len(held_out):,} held-out examples")
        scores, losses = row_scores(run, rows, held_out, log)
        scored: list[ScoredRow] = []
        order = np.argsort(-scores, kind="stable").tolist()
        repeated = {find.__name__: find(whole) for find in (duplicates, near_duplicates, contradictions)}
        shown = [*order[:TEXTS], *(group[0] for groups in repeated.values() for group in groups)]
        texts = dict(zip(shown, _texts(run, [whole[index] for index in shown]), strict=True))
        for index in order:
            file, number = LOCATION.findall(locations[rows[index][0]])[0]
            numbers, text = (float(scores[index]), float(losses[index])), texts.get(index, "")
            scored.append(ScoredRow(int(number), file, *numbers, rows[index], text))
        return RowsResult(
            run=finished.settings.output_dir,
            rows=scored,
            repeated={
                name: [RowGroup([locations[rows[index][0]] for index in of], texts[of[0]]) for of in groups]
                for name, groups in repeated.items()
            },
            held_out=len(held_out),
            steps=finished.best_step,
            loss_unit=run.task.loss_unit,
        )


def _whole(examples: Sequence[Example]) -> Example:
    """Returns a row as one example: long rows have several."""
    ids, labels = (np.concatenate(parts) for parts in zip(*((e.input_ids, e.labels) for e in examples), strict=True))
    return replace(examples[0], input_ids=ids, labels=labels)


def _texts(run: Run, examples: Iterable[Example]) -> list[str]:
    """Returns the text and the label of each, without the lines that all begin with.

    Special tokens become " | ": they separate the turns of a chat.
    """
    show = preview if run.labels is None else Labels.from_dict(run.labels).preview
    texts = ["".join(text for text, _ in show(example, run.tokenizer)) for example in examples]
    lines = [text.splitlines(keepends=True)[:-1] for text in (min(texts), max(texts))]
    begin = sum(len(line) for line, other in takewhile(lambda pair: pair[0] == pair[1], zip(*lines, strict=False)))
    special = re.compile("|".join(map(re.escape, ChatTokenizer.of(run.tokenizer).special_tokens)) or "$^")
    texts = [" | ".join(filter(None, map(str.strip, special.split(text[begin:])))) for text in texts]
    return [text if len(text) <= 2 * HALF else _without_middle(text) for text in texts]


def _without_middle(text: str) -> str:
    """Cuts at spaces, except in languages without them."""
    begin, end = re.sub(r"\s\S{0,20}$", "", text[:HALF]), re.sub(r"^\S{0,20}\s", "", text[-HALF:])
    return f"{begin} … {end}"


# ---- Proof


def _with_proof(result: RowsResult, finished: FinishedRun, session: StudySession, seeds: Sequence[int]) -> RowsResult:
    trials = _train(result, finished, session, seeds)
    if not trials[ALL]:
        return result
    # Rows are harmful only if two differences both show it, so their intervals need no adjustment
    statistics = run_statistics(trials, WORST, comparisons=1)
    variants = []
    for name, of_name in trials.items():
        losses = [trial.loss(evaluation_half(len(trial.counts))) for trial in of_name]
        variants.append(ArmResult(name, {}, DONE, seed_losses=losses, **statistics.fields(name, of_name)))
    judged, base_loss = statistics.examples, statistics.base_objective
    return replace(result, variants=variants, seeds=statistics.seeds, judged_examples=judged, base_loss=base_loss)


def _folders(session: StudySession, k: int, seed: int) -> dict[str, Path]:
    names = {name: folder if name == ALL else f"{folder}-{k}" for name, folder in FOLDERS.items()}
    return {name: session.folder / RUNS / folder / f"seed-{seed}" for name, folder in names.items()}


def _missing(session: StudySession, k: int, seeds: Sequence[int]) -> int:
    """Returns the number of runs that a proof with these seeds still needs."""
    return sum(not session.has_trial(folder) for seed in seeds for folder in _folders(session, k, seed).values())


def _train(
    result: RowsResult, finished: FinishedRun, session: StudySession, seeds: Sequence[int]
) -> dict[str, list[Trial]]:
    """Trains with and without the first k rows, with as many seeds as there is time for."""
    if result.steps < finished.steps:
        kept = f"the finished run kept the adapter of step {result.steps:,} of {finished.steps:,}"
        session.note(f"{kept}, so the runs of the proof end there, with a shorter learning rate schedule")
    if runs := _missing(session, result.k, seeds):
        minutes = math.ceil(finished.seconds * result.steps / finished.steps * runs / 60)
        session.log(f"{runs} runs with and without {result.k} of {len(result.rows):,} rows, at least {minutes} min")
    trials: dict[str, list[Trial]] = {name: [] for name in FOLDERS}
    for seed in seeds:
        for name, folder in _folders(session, result.k, seed).items():
            if session.may_run(folder):
                spec = spec_without(_left_out(result, name, seed), finished, seed, result.steps)
                base = trials[ALL][0].base if trials[ALL] else None  # the same in all runs
                trial = session.trial(replace(spec, before=base), folder)
                if not trial.done:
                    (folder / RESULT).unlink()
                    text = (
                        f"nothing is proven: the run {name} with seed {seed} failed ({trial.outcome}: {trial.message})"
                    )
                    remedy = (
                        "The same command repeats it; if it fails again, train with other settings and use that run"
                    )
                    raise ConfigError(f"{text}. {remedy}")
                session.log(f"{name}: seed {seed}, {trial.summary}")
                trials[name].append(trial)
    complete = min(map(len, trials.values()))
    session.note_missing(complete, len(seeds), "seeds")
    return {name: of_name[:complete] for name, of_name in trials.items()}


def _left_out(result: RowsResult, name: str, seed: int) -> list[int]:
    """Returns the training examples that a run does without. name: key of FOLDERS."""
    rows: Sequence[ScoredRow] = [] if name == ALL else result.rows
    if name == RANDOM:
        rows = [rows[index] for index in np.random.default_rng(seed).permutation(len(rows))]
    elif name == LOSS:
        rows = sorted(rows, key=lambda row: -row.loss)
    return sorted(chain.from_iterable(row.examples for row in rows[: result.k]))


def spec_without(examples: list[int], finished: FinishedRun, seed: int, steps: int) -> TrialSpec:
    """Returns a run like the finished one, with a different seed, and weight 0 for these training examples."""
    fixed: Any = {"seed": seed, "max_steps": steps, "save_steps": 0, "report_to": []}
    settings = trial_settings(finished.settings, fixed, STEP_CHOICE)
    return TrialSpec(settings, keep=False, left_out=examples, data_sha256=finished.data_sha256)


def rows_verdict(variants: Sequence[ArmResult], k: int, measure: Measure) -> tuple[str, bool]:
    """Returns the sentences, and whether the rows are harmful. Differences are from the runs without these rows."""
    these, top, are, it = f"these {k} rows", f"the {k} rows", "are", "them"
    if k == 1:
        these, top, are, it = "this row", "the row", "is", "it"
    if not variants:
        return f"Not proven: scores are estimates. --prove trains again without {top} at the top.", False
    differences = {variant.name: variant.difference for variant in variants if variant.difference is not None}
    with_all, of_random, of_loss = (differences[name] for name in (ALL, RANDOM, LOSS))
    numbers, than_random, than_loss = (
        f"{name} - {WORST} = {format_difference(differences[name], measure)}" for name in (ALL, RANDOM, LOSS)
    )
    if with_all.seeds == 1:
        return one_seed(f"training with or without {these}", numbers), False
    more = "More held-out examples" if with_all.from_examples > 0.5 else "More seeds (--seeds)"
    begin, proven = f"Cannot tell whether {these} {are} harmful:", False
    if with_all.high < 0:
        text = f"Keep {these}: the model is worse without {it} ({numbers})."
    elif with_all.low <= 0:
        text = f"{begin} the interval of the difference contains 0 ({numbers}). {more} narrow it."
    elif of_random.low <= 0:
        text = f"{begin} removing them helped ({numbers}), but not more than removing random rows ({than_random})."
    else:
        proven = True
        text = (
            f"{these.capitalize()} {are} harmful: the held-out loss is lower without {it} ({numbers}), and lower than "
            f"without random rows ({than_random}). Correct or remove {these}."
        )
        if of_loss.high < 0:
            text += f" Removing {top} with the highest {'loss' if k == 1 else 'losses'} helps more ({than_loss})."
    return text, proven
