"""Rules for judging the forecasts of `tailora curve`, written before any run that counts; the runs; the verdict.

    python -m benchmarks.studies.scaling_rules run      adds to benchmarks/results/scaling.json, ladder by ladder
    python -m benchmarks.studies.scaling_rules judge    judges the ladders in this file, and adds the verdict to it

Question: are its 90% intervals honest, and narrower than the intervals of naive forecasts?

Runs
    A ladder is one data set with one rank, one learning rate and one draw of N examples and of the held-out ones. The
    first N/8, N/4 and N/2 examples each get a complete curve: the runs of `tailora curve` with this data, at an eighth,
    a quarter, a half and all of it. They are computed by the command's own code, but in one process. All N examples get
    the runs of one size. The selection half decides the number of steps of each size, the evaluation half gives the
    losses. The number of steps is at most `epochs` passes. A ladder is left out, and counted, if a run diverges or if
    the loss at N is not below the loss before training.
    DATA: tiny language (markov.py), capitals (capitals.py), labels of film reviews, film reviews as texts
    (snippets.py), and the demo's chats. Ranks, rates and draws make up the ladders of a data set.

Cases
    `fit` gets the four sizes of a curve, and the size twice as large is hidden: the largest of the next curve, or N.
    So each ladder gives three cases. The truth is the mean loss of the hidden size's runs on the same evaluation
    examples. So the forecast gets `seeds`, but no error of the examples.

Naive forecasts
    "no change" predicts the loss of the last known size, "line" continues the line through the last two sizes. To make
    them intervals, each gets plus and minus q s: s is `unit`, and q the 90% quantile of |error| / s in the cases of all
    other ladders. This is generous: a user has no other ladders.

Verdict, with 95% intervals from resampled ladders, since the cases of a ladder depend on each other
    honest       the share of truths inside is between 85% and 95%; the interval of the share is reported
    narrower     of each naive forecast: the geometric mean of width / naive width is below 1, with its whole interval
    The interval score (Gneiting and Raftery 2007, eq. 43) and the share per data set are reported, without a verdict.
    `curve` makes forecasts only if it is honest and narrower than both with at least CASES cases. Otherwise the result
    is published as it is, and `curve` shows the measured points alone.

The constants of tailora/study/data_scaling.py were first chosen with synthetic curves
(tests/study/test_data_scaling.py). DEVELOPMENT ladders, of the tiny language with other draws, may be used to choose
them again; they are not counted. A ladder that was seen before the constants last changed is not counted either.

First round: numbers below 15, results/scaling_first.json, judged with the constants of commit 2519643e. The intervals
were narrow enough, but not honest: too few truths were inside. So these ladders became development ladders of all data
sets. With alpha from -1 instead of -.6 and a DEVIATION of .15 instead of .1, .89 of their truths are inside, and the
intervals are .47 and .48 times as wide as the naive ones. The synthetic curves of the test now deviate more as well (.3
instead of .15), as the first round did. Second round: other draws, FIRST and above, in results/scaling.json, with the
same rules. Its film reviews and chats are drawn from the same few hundred examples as before.

Settings of the runs (steps, rates) were chosen with ladders 100 to 299, which are not counted. Cost on a Zen 4 core
with one thread: about 110 CPU seconds per ladder of the tiny language and the capitals, 600 to 1,000 per ladder of
SmolLM2-135M (labels, reviews, chats), 2.5 hours in total.
"""

import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import measure
from benchmarks.studies import markov
from benchmarks.studies.capitals import capitals_folder
from benchmarks.studies.snippets import labelled_folder, write_rows
from benchmarks.studies.tiny_lm import BASE_STEPS, base_model
from tailora.data.demo import data_folder
from tailora.errors import ConfigError
from tailora.study.budget import START
from tailora.study.config import CurveConfig
from tailora.study.curve import PARTS, CurvePlan, CurveRuns
from tailora.study.data_scaling import LEVEL, fit
from tailora.study.study_store import StudySession
from tailora.study.trial import evaluation_half, run_here
from tailora.train.config import TrainConfig

CASES = 100
DRAWS = 2000
RESULTS = measure.RESULTS / "scaling.json"
WORK = Path(tempfile.gettempdir()) / "tailora-benchmarks" / "scaling"  # finished runs of unfinished ladders
DEVELOPMENT = range(100, 108)  # ladders of the tiny language, by number
FIRST = 300  # number of the first ladder of each data set that is counted

Floats = NDArray[np.float64]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """The ladders of one data set. examples: N.    rates, ranks: taken in turns."""

    ladders: int
    examples: int
    held_out: int
    epochs: int
    seeds: int
    rates: tuple[float, ...]
    settings: Settings
    ranks: tuple[int, ...] = (8, 2, 32)


OF_TINY = {"per_device_train_batch_size": 16, "dtype": "float32"}
OF_DEMO = {"model": "demo", "per_device_train_batch_size": 8, "max_length": 64}
DATA = {
    "tiny language": Data(15, 512, 160, 4, 3, (2**-7, 2**-8), OF_TINY),
    "capitals": Data(12, 512, 160, 6, 3, (2**-8, 2**-9), {**OF_TINY, "task": "seq2seq"}),
    "labels": Data(3, 256, 60, 1, 2, (2**-10, 2**-11), {**OF_DEMO, "task": "sequence-classification"}),
    "reviews": Data(3, 256, 60, 1, 2, (2**-9, 2**-10), OF_DEMO),
    "chats": Data(3, 256, 60, 1, 2, (2**-9, 2**-10), OF_DEMO),
}  # 36 ladders in all, 108 cases


# ---- Runs


def ladders() -> list[tuple[str, int]]:
    """Returns data set and number of each ladder. The data sets take turns, so a part of them is a fair sample."""
    turns = [
        ((place + 0.5) / of.ladders, name, FIRST + place) for name, of in DATA.items() for place in range(of.ladders)
    ]
    return [(name, number) for _, name, number in sorted(turns)]


def draw(name: str, number: int) -> tuple[str, list[Settings], list[Settings]]:
    """Returns the model, the N training examples and the held-out examples of a ladder."""
    of, shuffle = DATA[name], random.Random(f"{name} {number}")
    if name == "tiny language":
        ids = markov.texts(markov.new_table(), of.examples + of.held_out, torch.Generator().manual_seed(1000 + number))
        rows = [{"text": " ".join(f"w{word}" for word in row[:-1])} for row in ids.tolist()]
        return str(tiny_model()), rows[: of.examples], rows[of.examples :]
    folder = {"capitals": capitals_folder, "chats": data_folder}.get(name, labelled_folder)()
    parts = []
    for file, count in (("train", of.examples), ("eval", of.held_out)):
        lines = (folder / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in shuffle.sample(list(dict.fromkeys(lines)), count)]
        parts.append([{"text": row["text"]} for row in rows] if name == "reviews" else rows)
    return str(folder / "base") if name == "capitals" else "demo", *parts


def tiny_model() -> Path:
    folder = WORK / "tiny"
    if not folder.exists():
        base_model(BASE_STEPS).save_pretrained(folder.with_suffix(".new"))
        markov.tokenizer().save_pretrained(folder.with_suffix(".new"))
        folder.with_suffix(".new").rename(folder)
    return folder


def run_ladder(name: str, number: int) -> Settings:
    """Returns the curves of a ladder, each with its sizes; the last curve is N alone. Finished runs are read."""
    of, folder = DATA[name], WORK / f"{name.replace(' ', '-')}-{number}"
    model, rows, held_out = draw(name, number)
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "eval.jsonl", held_out)
    curves, started = [], time.process_time()
    for part in (8, 4, 2, 1):
        examples = of.examples // part
        write_rows(folder / f"{examples}.jsonl", rows[:examples])
        rank, rate = of.ranks[number % len(of.ranks)], of.rates[number % len(of.rates)]
        train = TrainConfig(
            **{"model": model, **of.settings, "r": rank, "learning_rate": rate, "seed": 10 * number},
            data=[str(folder / f"{examples}.jsonl")],
            eval_data=str(folder / "eval.jsonl"),
            output_dir=str(folder / str(examples)),
        )
        points = [(rank, examples // divisor) for divisor in (PARTS if part > 1 else (1,))]
        steps = math.ceil(of.epochs * examples / train.per_device_train_batch_size)
        plan = CurvePlan(steps, points, START, None, len(held_out), examples, processes=1)
        session = StudySession(Path(train.output_dir), None, measure.log, None, run_here)
        best, runs = CurveRuns(train, CurveConfig(seeds=of.seeds), session, plan).complete()
        first = runs[points[-1]][0]
        judging = evaluation_half(len(first.counts))
        losses = [[run.loss(judging) for run in runs[point]] for point in points]
        sizes, steps_of = [size for _, size in points], [best[point] for point in points]
        curves.append({"sizes": sizes, "steps": steps_of, "losses": losses})
    base_loss = float(np.array(first.before)[judging].sum() / np.array(first.counts)[judging].sum())
    return {"base_loss": base_loss, "curves": curves, "cpu_seconds": time.process_time() - started}


def run(chosen: Sequence[tuple[str, int]], path: Path) -> None:
    """Adds the ladders that are missing in the file."""
    for name, number in chosen:
        results = json.loads(path.read_text())["ladders"] if path.exists() else []
        if any((result["data"], result["number"]) == (name, number) for result in results):
            continue
        measure.log(f"{name} {number}")
        try:
            result = run_ladder(name, number)
        except ConfigError as error:
            result = {"failed": str(error)}
        results.append({"data": name, "number": number, **result})
        measure.write(path.with_suffix(".new"), {"ladders": results}).replace(path)


# ---- Cases


@dataclass(frozen=True)
class Case:
    """One hidden size. errors: of the naive forecasts.    unit: of these errors."""

    ladder: str
    truth: float
    low: float
    high: float
    errors: Mapping[str, float]
    unit: float


@dataclass(frozen=True)
class Share:
    """A number with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Judgement:
    """coverage: share of truths inside.    ratios: naive forecast -> geometric mean of width / its width.
    scores: forecast -> mean interval score in units of the case.
    """

    cases: int
    coverage: Share
    ratios: Mapping[str, Share]
    scores: Mapping[str, float]

    @property
    def is_honest(self) -> bool:
        return 0.85 <= self.coverage.value <= 0.95

    @property
    def is_useful(self) -> bool:
        """Whether `curve` may show forecasts."""
        return self.cases >= CASES and self.is_honest and all(ratio.high < 1 for ratio in self.ratios.values())


def unit(losses: Floats) -> float:
    """Returns the last change, or what the seeds explain of it. losses: (sizes, seeds)."""
    sizes, seeds = losses.shape
    residuals = losses - losses.mean(1)[:, None] - losses.mean(0) + losses.mean()
    noise = np.sqrt((residuals**2).sum() / ((sizes - 1) * (seeds - 1) * seeds))
    return float(np.hypot(losses[-1].mean() - losses[-2].mean(), 2 * noise))


def cases_of(ladder: str, curves: Sequence[Settings]) -> list[Case]:
    """Returns a case for each curve but the last; the hidden size is the largest of the next curve."""
    found = []
    for curve, following in pairwise(curves):
        known, truth = np.array(curve["losses"]), float(np.mean(following["losses"][-1]))
        forecast = fit(curve["sizes"], known).forecast(following["sizes"][-1], seeds=known.shape[1])
        before, last = known.mean(1)[-2:].tolist()
        errors = {"no change": truth - last, "line": truth - (2 * last - before)}
        found.append(Case(ladder, truth, forecast.low, forecast.high, errors, unit(known)))
    return found


def counted(path: Path) -> tuple[list[Case], list[str]]:
    """Returns the cases in the file, and the ladders that are left out."""
    cases, left_out = [], []
    for result in json.loads(path.read_text())["ladders"]:
        name = f"{result['data']} {result['number']}"
        if "failed" in result or np.mean(result["curves"][-1]["losses"]) >= result["base_loss"]:
            left_out.append(name)
        else:
            cases += cases_of(name, result["curves"])
    return cases, left_out


def judge(cases: Sequence[Case]) -> Judgement:
    ladders = np.array([case.ladder for case in cases])
    units = np.array([case.unit for case in cases])
    truths, lows, highs = (np.array([getattr(case, name) for case in cases]) for name in ("truth", "low", "high"))
    inside = (lows <= truths) & (truths <= highs)
    widths = (highs - lows) / units
    outside = np.maximum(lows - truths, 0) + np.maximum(truths - highs, 0)
    ratios, scores = {}, {"curve": float(np.mean(widths + 2 / (1 - LEVEL) * outside / units))}
    for name in cases[0].errors:
        errors = np.abs([case.errors[name] for case in cases]) / units
        halves = np.array([np.quantile(errors[ladders != ladder], LEVEL) for ladder in ladders])
        ratios[name] = _resampled(np.log(widths / (2 * halves)), ladders, exponential=True)
        scores[name] = float(np.mean(2 * halves + 2 / (1 - LEVEL) * np.maximum(errors - halves, 0)))
    return Judgement(len(cases), _resampled(inside.astype(float), ladders), ratios, scores)


def _resampled(values: Floats, ladders: NDArray[np.str_], *, exponential: bool = False) -> Share:
    """Returns the mean over all cases, with an interval from resampled ladders."""
    names, owners = np.unique(ladders, return_inverse=True)
    sums, counts = np.bincount(owners, values), np.bincount(owners)
    chosen = np.random.default_rng(0).integers(len(names), size=(DRAWS, len(names)))
    means = sums[chosen].sum(1) / counts[chosen].sum(1)
    numbers = np.array([values.mean(), *np.quantile(means, [0.025, 0.975])])
    return Share(*(np.exp(numbers) if exponential else numbers).tolist())


def report(path: Path) -> None:
    """Prints the verdict, and adds it to the file."""
    cases, left_out = counted(path)
    judged = judge(cases)
    inside = {
        name: [case.low <= case.truth <= case.high for case in cases if case.ladder.startswith(name)] for name in DATA
    }
    verdict = {
        **asdict(judged),
        "left_out": left_out,
        "inside": {name: [sum(of_data), len(of_data)] for name, of_data in inside.items()},
        "is_useful": judged.is_useful,
    }
    print(json.dumps(verdict, indent=1))
    stored = json.loads(path.read_text())
    path.with_suffix(".new").write_text(json.dumps({**stored, "verdict": verdict}, indent=2) + "\n")
    path.with_suffix(".new").replace(path)


if __name__ == "__main__":
    development = [("tiny language", number) for number in DEVELOPMENT]
    is_development = sys.argv[2:] == ["development"]
    file = WORK / "development.json" if is_development else RESULTS
    if sys.argv[1:2] == ["run"]:
        run(development if is_development else ladders(), file)
    elif sys.argv[1:2] == ["judge"]:
        report(file)
    else:
        sys.exit(__doc__)
