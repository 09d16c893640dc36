"""Evaluates a model on held-out data, with and without its adapter.

`score` reads the data in chunks. `_Evaluator` computes the metrics of a chunk, `_Totals` keeps a few numbers of each
example, and `_scores` turns them into means with intervals. Several ranks evaluate a share of every chunk each, and all
get the scores of all examples. `loss_on_data` is the plain loss, for other commands.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from tailora.core.config import LoRAConfig
from tailora.data.chat_template import ChatTokenizer, DataSettings
from tailora.data.dataset import Examples, distinct_of
from tailora.data.prepare import EvalDataReport, check_vocabulary, prepare, read_eval_data
from tailora.data.schemas import AUTO, PREFERENCE, SEQ2SEQ, TEXT
from tailora.data.tokenize import EncodedSample
from tailora.errors import DataError
from tailora.evaluation.answers import MetricChange, metric_changes
from tailora.evaluation.metrics import CHANGE, METRICS
from tailora.evaluation.multiple_choice import log_likelihoods, right_is_likeliest, tokenize_choices
from tailora.evaluation.statistics import mean_interval, wilson_interval
from tailora.model import LoRAModel
from tailora.train.answers import (
    ComparedAnswer,
    JudgeAnswers,
    Question,
    clusters_of,
    compare_answers,
    questions_of,
    score_answers,
    try_metrics,
)
from tailora.train.config import TrainConfig
from tailora.train.dataloader import data_settings, resolved_sources
from tailora.train.generate import free_positions, is_seq2seq
from tailora.train.image_text_to_text import language_model_task
from tailora.train.kernel_choice import choose_layout
from tailora.train.loss import SEQ2SEQ_TASK, Evaluation, Task, evaluate
from tailora.train.rewards import Reward
from tailora.train.significance import Interval, change_of
from tailora.train.step import CPU_TOKENS

TUNED, BASE = "tuned", "base"
CHUNK = 64  # examples evaluated at a time on a CPU, by one model and then by the other
SHARES = ("accuracy", "accuracy_norm")  # metrics that are shares of right choices

Progress = Callable[[int, int], None]  # number done, total
Log = Callable[[str], None]


# ---- Options and results


@dataclass(frozen=True, slots=True)
class EvalOptions:
    metrics: tuple[str, ...] | None = None  # None: the default for the data
    extra_metrics: tuple[str, ...] = ()  # in addition to those; `loss_change` stands for loss
    answer_metrics: tuple[Reward, ...] = ()  # metrics of generated answers
    metric_seconds: float = 60.0  # for one call of such a metric
    max_length: int = 1024
    max_new_tokens: int = 256  # of an answer
    limit: int | None = None  # only the first examples
    field: Mapping[str, str] | None = None  # key -> column of the data
    system: str | None = None  # system message for conversations without one
    image_folder: str | None = None  # of the images in the data; None: the folder of its file


@dataclass(frozen=True, slots=True)
class Score:
    """A value with its 95% interval over `n` examples. The ends are NaN if the spread is unknown."""

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON: numbers that are not finite become null."""
        ends = [self.low, self.high]
        return {
            "value": self.value if math.isfinite(self.value) else None,
            "interval": ends if all(map(math.isfinite, ends)) else None,
            "n": self.n,
        }


@dataclass(frozen=True, slots=True)
class Scores:
    metrics: dict[str, Score]
    base: dict[str, Score] | None  # of the model without its adapter
    change: dict[str, Score] | None  # metrics - base, on the same examples
    data: EvalDataReport | None = None
    too_long: int = 0  # examples without room for their choices or an answer, not in accuracy or in `answers`
    answers: list[ComparedAnswer] = field(default_factory=list)
    changes: dict[str, MetricChange] = field(default_factory=dict)  # of metrics of answers
    tasks: dict[str, Any] = field(default_factory=dict)  # facts about the tasks of lm-evaluation-harness
    labels: dict[str, Any] | None = None  # for classification: `classification.label_details`

    def values(self) -> dict[str, float]:
        """Returns all values, by the names that gates use."""
        changes = {f"{name}{CHANGE}": score.value for name, score in (self.change or {}).items()}
        return {name: score.value for name, score in self.metrics.items()} | changes

    def only(self, names: Sequence[str]) -> "Scores":
        chosen: dict[str, Any] = {
            part: {name: scores[name] for name in scores if name in names}
            for part in ("metrics", "base", "change")
            if (scores := getattr(self, part)) is not None
        }
        return replace(self, **chosen)

    def merge(self, other: "Scores") -> "Scores":
        return Scores(
            metrics={**self.metrics, **other.metrics},
            base=None if self.base is None else {**self.base, **(other.base or {})},
            change=None if self.change is None else {**self.change, **(other.change or {})},
            data=self.data or other.data,
            too_long=self.too_long + other.too_long,
            answers=self.answers + other.answers,
            changes={**self.changes, **other.changes},
            tasks={**self.tasks, **other.tasks},
            labels=self.labels if self.labels is not None else other.labels,
        )

    def to_dict(self) -> dict[str, Any]:
        def scores(of: Mapping[str, Score] | None) -> dict[str, Any] | None:
            return None if of is None else {name: score.to_dict() for name, score in of.items()}

        return {
            "metrics": {name: score.to_dict() | self._change(name) for name, score in self.metrics.items()},
            "base": scores(self.base),
            "change": scores(self.change),
            "data": None if self.data is None else {**asdict(self.data), "too_long": self.too_long},
            "tasks": self.tasks or None,
            "labels": self.labels,
            "answers": [{**asdict(a), "images": [image.to_dict() for image in a.images]} for a in self.answers],
        }

    def _change(self, name: str) -> dict[str, Any]:
        return self.changes[name].to_dict() if name in self.changes else {}


# ---- Evaluation


def score(
    model: LoRAModel,
    tokenizer: Any,
    data: str,
    options: EvalOptions | None = None,
    *,
    base: bool = True,
    log: Log = lambda _: None,
    progress: Progress = lambda *_: None,
    ranks: PartialState | None = None,
    trained_rows: Collection[bytes] | None = None,
    judge: JudgeAnswers | None = None,
) -> Scores:
    """Evaluates the active adapters on `data`, and with `base` also the model without them, on the same examples.

    Duplicate rows are evaluated once: they would count as independent examples in the intervals.
    data: as for training, or 'demo'.
    log: called with messages on how the scores are computed.
    ranks: of the processes that call this together, each with the same model; None for one process. Only the first one
        scores answers.
    trained_rows: hashes of the rows that the adapter was trained on, to count them; see `read_eval_data`.
    judge: the language model among the metrics of answers, if there is one.
    Raises DataError if the data lacks what a metric needs, ConfigError for an unknown normalization.
    """
    options = options or EvalOptions()
    max_length = min(options.max_length, free_positions(model, 0))
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    task = SEQ2SEQ if is_seq2seq(model) else AUTO
    settings = DataSettings(
        options.field,
        task,
        max_length=max_length,
        system=options.system,
        image_folder=options.image_folder,
        for_evaluation=True,
    )
    facts, rows = read_eval_data(data, ChatTokenizer.of(tokenizer, settings), options.limit, trained_rows)
    metrics = choose_metrics(facts, options.metrics, options.extra_metrics)
    evaluator = _Evaluator(model, tokenizer, replace(options, max_length=max_length), metrics, log)
    models = models_to_score(model, base)
    both = BASE in models
    rank, world = (0, 1) if ranks is None else (ranks.process_index, ranks.num_processes)
    questions = _questions(model, tokenizer, rows, facts) if options.answer_metrics else []
    if options.answer_metrics and not questions:
        raise DataError(f"data {facts.source}: all rows are too long for an answer; use shorter prompts")
    functions = [metric for metric in options.answer_metrics if not metric.is_judge]
    if functions:  # before the first answer, because answers take time
        try_metrics(functions, questions, options.metric_seconds)
    scores = _scores(_evaluate(evaluator, models, rows, rank, world, progress), metrics, facts)
    if not questions:
        return scores
    asking: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "base": both, "note": log, "progress": progress}
    answers = compare_answers(model, tokenizer, questions[rank::world], **asking)
    if world > 1:
        parts = gather_object([answers])
        answers = [parts[number % world][number // world] for number in range(len(questions))]
    if rank:  # the main process scores all answers
        return scores
    too_long = len(rows) - len(answers)
    return scores.merge(_answer_scores(answers, questions, options, judge, too_long=too_long, both=both))


def models_to_score(model: LoRAModel, base: bool) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """Returns name -> a context in which `model` computes as the tuned model, and with `base` also as the base."""
    contexts: dict[str, Callable[[], AbstractContextManager[None]]] = {TUNED: nullcontext}
    return {**contexts, BASE: model.disable_adapter} if base and model.active_adapters else contexts


def without_adapter(base_model: Any) -> LoRAModel:
    """Returns the base model in the form that `score` needs."""
    model = LoRAModel(base_model, LoRAConfig(r=1))
    model.delete_adapter("default")
    return model


def choose_metrics(facts: EvalDataReport, metrics: Sequence[str] | None, extra: Sequence[str] = ()) -> list[str]:
    """Returns the metrics to compute that need no answers; for None loss, or accuracy if the data has choices.

    Raises DataError if the data lacks what a metric needs.
    """
    has_choices = facts.shape in ("choices", "preference")  # of a pair of replies the chosen one is right
    default = ("accuracy", "accuracy_norm") if has_choices else ("loss", "perplexity")
    wanted = {name.removesuffix(CHANGE) for name in (*(default if metrics is None else metrics), *extra)}
    if not has_choices and (lacking := [name for name in SHARES if name in wanted]):
        raise DataError(
            f"data {facts.source}: {' and '.join(lacking)} needs choices, but its rows were read as {facts.shape} "
            f"({', '.join(facts.mapping.values())}); set --field prompt=COLUMN,choices=COLUMN,answer=COLUMN"
        )
    return [name for name in METRICS if name in wanted]


@dataclass(slots=True)
class _Totals:
    """The results of one model. losses: by index of the example."""

    losses: dict[int, tuple[float, int]] = field(default_factory=dict)  # nats of the trained tokens, and their number
    hits: dict[str, list[bool]] = field(default_factory=lambda: {name: [] for name in SHARES})
    too_long: int = 0

    @property
    def sums_and_counts(self) -> tuple[Any, Any]:
        """Nats and trained tokens, both (examples,)."""
        sums, counts = np.array([*self.losses.values()]).T
        return sums, counts


def _joined(of_ranks: Sequence[Mapping[str, _Totals]]) -> dict[str, _Totals]:
    """Returns the totals of all ranks, the losses in the order of one process."""
    joined = {}
    for name in of_ranks[0]:
        parts = [totals[name] for totals in of_ranks]
        joined[name] = _Totals(
            losses=dict(sorted(item for part in parts for item in part.losses.items())),
            hits={metric: [hit for part in parts for hit in part.hits[metric]] for metric in SHARES},
            too_long=sum(part.too_long for part in parts),
        )
    return joined


class _Evaluator:
    """Computes the metrics of a chunk of examples, by index, with whatever adapters are active."""

    def __init__(
        self, model: LoRAModel, tokenizer: Any, options: EvalOptions, metrics: Sequence[str], log: Log
    ) -> None:
        self.model, self.tokenizer, self.options, self.log = model, tokenizer, options, log
        self.task: Task = SEQ2SEQ_TASK if is_seq2seq(model) else language_model_task(tokenizer)
        self.layout = choose_layout(TrainConfig(), model, tokenizer, log, trains=False, task=self.task)
        self.token_budget = token_budget(model)
        steps = {
            self._loss: {"loss", "perplexity"},
            self._accuracy: {"accuracy", "accuracy_norm"},
        }
        self.steps = [step for step, names in steps.items() if names & set(metrics)]

    def _loss(self, chunk: Mapping[int, EncodedSample], totals: _Totals) -> None:
        examples = Examples.of(item.example for item in chunk.values())
        evaluation = evaluate(self.model, examples, layout=self.layout, token_budget=self.token_budget, task=self.task)
        totals.losses.update(zip(chunk, zip(evaluation.sums, evaluation.counts, strict=True), strict=True))

    def _accuracy(self, chunk: Mapping[int, EncodedSample], totals: _Totals) -> None:
        questions = [item.choices for item in chunk.values() if item.choices is not None]
        choices = tokenize_choices(questions, self.tokenizer, self.options.max_length)
        totals.too_long += choices.left_out
        if not len(choices.answers):
            return
        likelihoods = log_likelihoods(self.model, choices, self.layout, token_budget=self.token_budget)
        totals.hits["accuracy"] += right_is_likeliest(choices, likelihoods).tolist()
        totals.hits["accuracy_norm"] += right_is_likeliest(choices, likelihoods / choices.bytes).tolist()


def _evaluate(
    evaluator: _Evaluator,
    models: Mapping[str, Callable[[], AbstractContextManager[None]]],
    rows: Sequence[EncodedSample],
    rank: int,
    world: int,
    progress: Progress,
) -> dict[str, _Totals]:
    """Returns the totals of all ranks, after this one has evaluated its share of each chunk."""
    totals, done = {name: _Totals() for name in models}, 0
    size = world * (CHUNK if evaluator.model.device.type == "cpu" else 16 * CHUNK)
    for start in range(0, len(rows), size):
        chunk = range(start, min(start + size, len(rows)))
        share = {i: rows[i] for i in chunk[rank::world]}
        for name, activated in models.items():
            with activated():
                for step in evaluator.steps if share else ():
                    step(share, totals[name])
            done += len(chunk)
            progress(done, len(models) * len(rows))
    return totals if world == 1 else _joined(gather_object([totals]))


# ---- Answers


def _questions(
    model: LoRAModel, tokenizer: Any, rows: Sequence[EncodedSample], facts: EvalDataReport
) -> list[Question]:
    """Raises DataError if the rows have no prompts."""
    if facts.shape in (TEXT, "choices", "preference"):
        raise DataError(
            f"data {facts.source}: metrics score answers, but its rows were read as {facts.shape} "
            f"({', '.join(facts.mapping.values())}), which has no prompt with one reply; use --metric loss or choice"
        )
    read = {*facts.mapping.values()}
    columns = [{name: value for name, value in row.row.items() if name not in read} for row in rows]
    samples: list[Any] = [row.sample for row in rows]
    return questions_of(model, tokenizer, samples, columns)


def _answer_scores(
    answers: Sequence[ComparedAnswer],
    questions: Sequence[Question],
    options: EvalOptions,
    judge: JudgeAnswers | None,
    *,
    too_long: int,
    both: bool,
) -> Scores:
    """Returns the scores by metrics of answers. answers: of all ranks. both: of the base, too."""
    clusters = clusters_of(questions)
    answers = [replace(answer, cluster=cluster) for answer, cluster in zip(answers, clusters, strict=True)]
    answers, higher_is_better = score_answers(answers, questions, options.answer_metrics, options.metric_seconds, judge)
    compared = answers if both else [replace(answer, before=answer.after) for answer in answers]
    changes = metric_changes(compared, higher_is_better)
    if missing := [name for name in higher_is_better if name not in changes]:
        raise DataError(f"no answer has a score by {' and '.join(missing)}; check the columns that it reads")

    def of_side(intervals: Mapping[str, Interval]) -> dict[str, Score]:
        return {name: Score(*interval, changes[name].answers) for name, interval in intervals.items()}

    return Scores(
        metrics=of_side({name: change.after for name, change in changes.items()}),
        base=of_side({name: change.before for name, change in changes.items()}) if both else None,
        change=of_side({name: change.change.interval for name, change in changes.items()}) if both else None,
        too_long=too_long,
        answers=answers,
        changes=changes if both else {},
    )


# ---- From totals to scores


def _scores(totals: Mapping[str, _Totals], metrics: Sequence[str], facts: EvalDataReport) -> Scores:
    tuned, base = totals[TUNED], totals.get(BASE)
    return Scores(
        metrics={name: _score(name, tuned, facts) for name in metrics},
        base=None if base is None else {name: _score(name, base, facts) for name in metrics},
        # no change of perplexity, which would duplicate the change of the loss
        change=None if base is None else {name: _change(name, base, tuned) for name in metrics if name != "perplexity"},
        data=facts,
        too_long=tuned.too_long,
    )


def _score(metric: str, totals: _Totals, facts: EvalDataReport) -> Score:
    if metric in SHARES:
        hits = totals.hits[metric]
        if not hits:
            raise DataError(f"data {facts.source}: all rows are too long for {metric}; use a larger --max-length")
        return Score(*wilson_interval(hits), len(hits))
    interval = mean_interval(*totals.sums_and_counts)
    if metric == "perplexity":
        interval = Interval(*(math.exp(nats) if nats < 700 else math.inf for nats in interval))
    return Score(*interval, len(totals.losses))


def _change(metric: str, base: _Totals, tuned: _Totals) -> Score:
    if metric in SHARES:
        return Score(*change_of(base.hits[metric], tuned.hits[metric]).interval, len(tuned.hits[metric]))
    (before, _), (after, counts) = base.sums_and_counts, tuned.sums_and_counts
    return Score(*change_of(before, after, counts).interval, len(counts))


# ---- The loss alone


def loss_on_data(config: TrainConfig, model: LoRAModel, tokenizer: Any, log: Log) -> Callable[[], Evaluation]:
    """Returns a function that evaluates the active adapters on the distinct examples of `config.data`, one by one.

    It is the loss of a language model: for pairs of replies, the loss of the chosen ones. 'demo' is the demo's held-out
    data. Raises DataError with everything that is wrong with the data.
    """
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    rows, task = (SEQ2SEQ, SEQ2SEQ_TASK) if is_seq2seq(model) else (AUTO, language_model_task(tokenizer))
    settings = replace(data_settings(config), task=rows, validation_split=0.0, for_evaluation=True)
    prepared = prepare(resolved_sources(config, "eval_data"), tokenizer, settings, split="validation")
    if prepared.report.task == PREFERENCE:
        log("evaluating only the chosen replies of the pairs, with the language modeling loss")
    examples = prepared.train.distinct()
    if len(examples) < len(prepared.train):
        log(f"{distinct_of(len(prepared.train), len(examples), 'held-out example')}: duplicates are evaluated once")
    layout = choose_layout(config, model, tokenizer, log, trains=False, task=task)
    return lambda: evaluate(model, examples, layout=layout, token_budget=token_budget(model), task=task)


def token_budget(model: LoRAModel) -> int:
    return CPU_TOKENS if model.device.type == "cpu" else 8 * CPU_TOKENS
