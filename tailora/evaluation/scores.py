"""How good a model is on held-out data, and how much of that its adapter brought.

    data, checked -> chunks of rows -> {tuned, base} x {loss, choices, answers} -> a number per row -> means, intervals

What is kept of a row is a few numbers, so the size of the data does not matter.
"""

import math
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailora.core.attach import evaluating
from tailora.core.config import LoRAConfig
from tailora.data.dataset import Examples
from tailora.data.demo import resolve
from tailora.data.prepare import Judged, Learned, Source, chunks, examine, prepare
from tailora.data.schemas import Conversation, Pair
from tailora.data.tokenize import prompt_ids, reply_text
from tailora.errors import ConfigError, DataError, listing, nearest
from tailora.evaluation.generate import prompt_of, request, room
from tailora.evaluation.metrics import CHANGE, METRICS
from tailora.evaluation.multiple_choice import Options, log_likelihoods, obstacle_to_sharing, options, picked
from tailora.evaluation.statistics import Interval, mean_interval, paired_difference, share_difference, wilson_interval
from tailora.model import LoRAModel
from tailora.train.config import TrainConfig
from tailora.train.dataloader import CPU_TOKENS
from tailora.train.loss import BatchLayout, Evaluation, evaluate
from tailora.train.setup import choose_rows
from tailora.train.trainable import Trainable

# ---- The loss on data that was not trained on, of whatever adapters are active when it is asked for.


def held_out(
    config: TrainConfig, model: LoRAModel, tokenizer: Any, note: Callable[[str], None]
) -> Callable[[], Evaluation]:
    """A function that evaluates `model` on all of `config.data`, example by example. `note` hears what was decided.

    'demo' is the demo's held-out part. Raises DataError with all that is wrong with the data.
    """
    prepared = prepare(
        resolve(config.data, "eval_data"),
        tokenizer,
        field=config.field,
        max_length=config.max_length,
        validation_split=0.0,
        embedding_rows=model.get_input_embeddings().weight.shape[0],
    )
    rows = choose_rows(config, model, tokenizer, note)
    on_cpu = next(model.parameters()).device.type == "cpu"
    budget = CPU_TOKENS if on_cpu else 8 * CPU_TOKENS
    return lambda: evaluate(model, prepared.train, rows=rows, token_budget=budget)


# ---- Whether the model's own greedy answer is the reply in the data, word for word after a stated normalisation.


Normal = Callable[[str], str]
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
STEPS: dict[str, Normal] = {  # in this order, whatever the order they are asked for in
    "case": str.casefold,
    "punctuation": lambda text: text.translate(NO_PUNCTUATION),
    "space": lambda text: " ".join(text.split()),
    "strip": str.strip,
}
HALF_LETTER = "\ufffd"  # what a tokenizer writes for the first bytes of a letter


@dataclass(frozen=True, slots=True)
class Match:
    prompt: str
    expected: str
    answer: str  # as far as it was written: a wrong one is not written to its end
    hit: bool


def normaliser(names: Sequence[str]) -> Normal:
    """Applies these steps. Raises ConfigError for unknown ones."""
    if unknown := [name for name in names if name not in STEPS]:
        known = f"; there are {', '.join(STEPS)}, or none"
        raise ConfigError(listing([f"--normalize {name}: unknown{nearest(name, STEPS) or known}" for name in unknown]))
    steps = [step for name, step in STEPS.items() if name in names]

    def normal(text: str) -> str:
        for step in steps:
            text = step(text)
        return text

    return normal


def match(
    model: Trainable,
    tokenizer: Any,
    sample: Conversation | Pair,
    normal: Normal,
    *,
    max_new_tokens: int,
    to_the_end: bool = False,
) -> Match | None:
    """None where the prompt leaves the model no positions for an answer.

    to_the_end: write the whole answer, though it went wrong; by default a wrong one ends with its first wrong word.
    """
    ids = prompt_ids(sample, tokenizer)
    if room(model, len(ids)) < 1:
        return None
    expected = normal(reply_text(sample))

    def said(output: Tensor) -> str:
        text: str = tokenizer.decode(
            output[0, len(ids) :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def wrong(output: Tensor, _scores: Any) -> Tensor:
        """Asked after every token: (1,)."""
        hopeless = not expected.startswith(normal(said(output).rstrip(HALF_LETTER)))
        return torch.full((1,), hopeless and not to_the_end, dtype=torch.bool, device=output.device)

    with evaluating(model), torch.no_grad():
        asked = request(model, tokenizer, ids, max_new_tokens=max_new_tokens)
        answer = said(model.generate(**asked, stopping_criteria=[wrong]))
    return Match(
        prompt_of(sample, tokenizer).text, reply_text(sample).strip(), answer.strip(), normal(answer) == expected
    )


# ----


TUNED, BASE = "tuned", "base"
CHUNK = 64  # rows judged at a time on a CPU, by one side and then by the other
NEEDS = {"exact_match": "a reply to compare with", "accuracy": "choices", "accuracy_norm": "choices"}
SHARES = tuple(NEEDS)

Progress = Callable[[int, int], None]  # done, of how many
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """What is measured, and how."""

    metrics: tuple[str, ...] = ()  # none: what the data is good for
    also: tuple[str, ...] = ()  # beside those; `loss_change` asks for loss
    max_length: int = 1024
    max_new_tokens: int = 128  # of an answer, for exact_match
    normalize: tuple[str, ...] = ("strip",)  # before answers are compared: keys of `exact.STEPS`
    limit: int | None = None  # the first so many rows
    shown: int = 3  # answers that are kept to look at


@dataclass(frozen=True, slots=True)
class Score:
    """A value with its 95% interval over `n` rows; the ends are NaN where there is no spread to see."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Scores:
    metrics: dict[str, Score]
    base: dict[str, Score] | None  # of the model without its adapter
    change: dict[str, Score] | None  # metrics - base, on the same rows
    data: Judged | None = None
    too_long: int = 0  # rows whose choices or prompt leave no room, left out of accuracy or exact_match
    samples: dict[str, list[Match]] = field(default_factory=dict)  # answers of either side
    tasks: dict[str, Any] = field(default_factory=dict)  # what is known of lm-evaluation-harness's tasks

    def values(self) -> dict[str, float]:
        """By the names that gates use."""
        changes = {f"{name}{CHANGE}": score.value for name, score in (self.change or {}).items()}
        return {name: score.value for name, score in self.metrics.items()} | changes

    def beside(self, other: "Scores") -> "Scores":
        """Both in one."""
        return Scores(
            metrics={**self.metrics, **other.metrics},
            base=None if self.base is None else {**self.base, **(other.base or {})},
            change=None if self.change is None else {**self.change, **(other.change or {})},
            data=self.data or other.data,
            too_long=self.too_long + other.too_long,
            samples={**self.samples, **other.samples},
            tasks={**self.tasks, **other.tasks},
        )


@dataclass(slots=True)
class Tally:
    """What one side did, row after row."""

    sums: list[Any] = field(default_factory=list)  # nats of each row's learned tokens
    counts: list[Any] = field(default_factory=list)
    hits: dict[str, list[bool]] = field(default_factory=lambda: {name: [] for name in SHARES})
    samples: list[Match] = field(default_factory=list)
    too_long: int = 0


def score(
    model: LoRAModel,
    tokenizer: Any,
    data: str,
    asked: Asked | None = None,
    *,
    field: Mapping[str, str] | None = None,
    base: bool = True,
    note: Note = lambda _: None,
    heard: Progress = lambda *_: None,
) -> Scores:
    """Judge the active adapters on `data`, and with `base` the model without them, row by row beside it.

    data: whatever training reads, or 'demo'.  field: the shape's key -> column.  note: hears what was decided.
    Raises DataError for data that a metric cannot be had from, ConfigError for an unknown normalisation.
    """
    asked = asked or Asked()
    normaliser(asked.normalize)
    longest = min(asked.max_length, getattr(model.config, "max_position_embeddings", None) or asked.max_length)
    source = Source(resolve(data, "eval_data"), tokenizer, field or {}, longest, asked.limit)
    judged = examine(source, model.get_input_embeddings().weight.shape[0])
    metrics = fitting(judged, asked.metrics, asked.also)
    rows = choose_rows(TrainConfig(), model, tokenizer, note)
    judge = _Judge(model, tokenizer, replace(asked, max_length=longest), metrics, rows, note)
    sides: dict[str, Callable[[], AbstractContextManager[None]]] = {TUNED: nullcontext}
    if base and model.active_adapters:
        sides[BASE] = model.disable_adapter
    tallies = {side: Tally() for side in sides}
    done = 0
    for chunk in chunks(source, CHUNK if judge.on_cpu else 16 * CHUNK):
        for side, become in sides.items():
            with become():
                judge.add(chunk, tallies[side])
            done += len(chunk)
            heard(done, len(sides) * (judged.rows - judged.cut_away))
    return _scores(tallies, metrics, judged)


def bare(base_model: Any) -> LoRAModel:
    """The base alone, as `score` takes it."""
    model = LoRAModel(base_model, LoRAConfig(r=1))
    model.delete_adapter("default")
    return model


def fitting(judged: Judged, asked: Sequence[str], also: Sequence[str] = ()) -> list[str]:
    """The metrics asked for; by default loss, or accuracy where there are choices. Raises DataError."""
    choices = judged.shape == "choices"
    default = ("accuracy", "accuracy_norm") if choices else ("loss", "perplexity")
    wanted = {name.removesuffix(CHANGE) for name in (*(asked or default), *also)}
    lacking = [name for name in NEEDS if name in wanted and not (choices or _replies(judged, name))]
    if lacking:
        needs = " and ".join(f"{name} needs {NEEDS[name]}" for name in lacking)
        raise DataError(
            f"data {judged.source}: {needs}; its rows are read as {judged.shape} "
            f"({', '.join(judged.mapping.values())}). Rows with choices have prompt, choices (a list) and answer; "
            "other columns are named by --field prompt=COLUMN,choices=COLUMN,answer=COLUMN"
        )
    return [name for name in METRICS if name in wanted]


def _replies(judged: Judged, name: str) -> bool:
    return name == "exact_match" and judged.shape != "text"


class _Judge:
    """One side at a time, chunk by chunk."""

    def __init__(
        self, model: LoRAModel, tokenizer: Any, asked: Asked, metrics: Sequence[str], rows: BatchLayout, note: Note
    ) -> None:
        self.model, self.tokenizer, self.asked, self.rows, self.note = model, tokenizer, asked, rows, note
        self.on_cpu = model.device.type == "cpu"
        self.budget = CPU_TOKENS if self.on_cpu else 8 * CPU_TOKENS
        self.shared: bool | None = None  # whether choices can share their prompt, once it is known
        self.parts = [part for part, names in self._parts().items() if names & set(metrics)]

    def _parts(self) -> dict[Callable[[list[Learned], Tally], None], set[str]]:
        return {
            self._loss: {"loss", "perplexity"},
            self._choices: {"accuracy", "accuracy_norm"},
            self._answers: {"exact_match"},
        }

    def add(self, chunk: list[Learned], tally: Tally) -> None:
        for part in self.parts:
            part(chunk, tally)

    def _loss(self, chunk: list[Learned], tally: Tally) -> None:
        examples = Examples.of(one.encoded.example for one in chunk)
        found = evaluate(self.model, examples, rows=self.rows, token_budget=self.budget)
        tally.sums.append(found.sums)
        tally.counts.append(found.counts)

    def _choices(self, chunk: list[Learned], tally: Tally) -> None:
        questions = [one.choices for one in chunk if one.choices is not None]
        found = options(questions, self.tokenizer, self.asked.max_length)
        tally.too_long += found.left_out
        if not len(found.answers):
            return
        if self.shared is None:
            self.shared = self._can_share(found)
        likelihoods = log_likelihoods(
            self.model, found, rows=self.rows, token_budget=self.budget // 2, branches=self.shared
        )
        tally.hits["accuracy"] += picked(found, likelihoods).tolist()
        tally.hits["accuracy_norm"] += picked(found, likelihoods / found.bytes).tolist()

    def _can_share(self, found: Options) -> bool:
        obstacle = obstacle_to_sharing(self.model, found, rows=self.rows, token_budget=self.budget)
        if obstacle is not None:
            self.note(f"a question is computed again for each of its choices: {obstacle}")
        return obstacle is None

    def _answers(self, chunk: list[Learned], tally: Tally) -> None:
        normal = normaliser(self.asked.normalize)
        for one in chunk:
            shown = len(tally.samples) < self.asked.shown
            found = match(
                self.model,
                self.tokenizer,
                one.sample,  # type: ignore[arg-type]  # `fitting` saw that it is no Text
                normal,
                max_new_tokens=self.asked.max_new_tokens,
                to_the_end=shown,
            )
            if found is None:
                tally.too_long += 1
                continue
            tally.hits["exact_match"].append(found.hit)
            tally.samples += [found] * shown


def _scores(tallies: Mapping[str, Tally], metrics: Sequence[str], judged: Judged) -> Scores:
    tuned, base = tallies[TUNED], tallies.get(BASE)
    return Scores(
        metrics=dict(_measured(tuned, metrics, judged)),
        base=None if base is None else dict(_measured(base, metrics, judged)),
        change=None if base is None else dict(_changes(base, tuned, metrics)),
        data=judged,
        too_long=tuned.too_long,
        samples={side: tally.samples for side, tally in tallies.items() if tally.samples},
    )


def _measured(tally: Tally, metrics: Sequence[str], judged: Judged) -> Iterator[tuple[str, Score]]:
    for name in metrics:
        if name in SHARES:
            hits = tally.hits[name]
            if not hits:
                raise DataError(f"data {judged.source}: no row leaves room for {name}; raise --max-length")
            yield name, _score(wilson_interval(hits), len(hits))
            continue
        sums, counts = np.concatenate(tally.sums), np.concatenate(tally.counts)
        found = mean_interval(sums, counts)
        yield name, _score(found if name == "loss" else Interval(*map(_exp, found)), len(sums))


def _changes(base: Tally, tuned: Tally, metrics: Sequence[str]) -> Iterator[tuple[str, Score]]:
    """Perplexity has none of its own: its change is that of the loss."""
    for name in metrics:
        if name in SHARES:
            yield name, _score(share_difference(base.hits[name], tuned.hits[name]), len(tuned.hits[name]))
        elif name == "loss":
            before, after, counts = map(np.concatenate, (base.sums, tuned.sums, tuned.counts))
            yield name, _score(paired_difference(before, after, counts), len(counts))


def _score(interval: Interval, n: int) -> Score:
    return Score(*interval, n)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def plain(found: Scores) -> dict[str, Any]:
    """For JSON: numbers that are none become null."""

    def of(scores: Mapping[str, Score] | None) -> dict[str, Any] | None:
        return None if scores is None else {name: as_json(each) for name, each in scores.items()}

    return {
        "metrics": of(found.metrics),
        "base": of(found.base),
        "change": of(found.change),
        "data": None if found.data is None else {**asdict(found.data), "too_long": found.too_long},
        "tasks": found.tasks or None,
        "samples": {side: [asdict(each) for each in matches] for side, matches in found.samples.items()},
    }


def as_json(found: Score) -> dict[str, Any]:
    ends = [found.low, found.high]
    return {
        "value": found.value if math.isfinite(found.value) else None,
        "interval": ends if all(map(math.isfinite, ends)) else None,
        "n": found.n,
    }
