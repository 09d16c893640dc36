"""Greedy answers to held-out prompts before and after training, and their metrics.

    samples -> questions -> answers of the base and of the tuned model -> scores of each answer, in a separate process

The engine of `tailora serve` answers, as it samples completions for reinforcement learning. Encoder-decoders and
sharded models, which it cannot run, answer one by one.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from time import perf_counter
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from transformers import PreTrainedModel, ProcessorMixin

from tailora.core.attach import evaluating
from tailora.data.dataset import ENOUGH_TO_HALVE, IGNORED, Example, Int64
from tailora.data.duplicates import duplicates, near_duplicates
from tailora.data.image_processor import text_tokenizer
from tailora.data.image_tokens import media_ids
from tailora.data.images import Image
from tailora.data.messages import Messages
from tailora.data.prepare import PreparedData
from tailora.data.samples import Conversation, Pair, Sample
from tailora.data.schemas import GRPO, TEXT
from tailora.data.tokenize import last_reply, reply_text
from tailora.errors import ConfigError
from tailora.kernels.attention import use_attention
from tailora.model import LoRAModel
from tailora.patches import attention_of
from tailora.train.config import TASK_TYPES, TrainConfig
from tailora.train.events import TrainResult
from tailora.train.generate import (
    EncodedPrompt,
    free_positions,
    generation_arguments,
    is_seq2seq,
    new_tokens,
    prompt_of,
)
from tailora.train.parallel import is_sharded
from tailora.train.rewards import Completion, Reward, RewardProcess, parse_rewards
from tailora.train.sampler import Answer, Sampler
from tailora.train.state import seeded
from tailora.train.trainable import Trainable

NEW_TOKENS = 64  # of an answer that no metric scores
MOST_SCORED, MOST_READ = 200, 24  # held-out prompts to answer, with and without a metric
FEW_HELD_OUT, TRAINING_PROMPTS = 20, 30  # with fewer held-out prompts, some training prompts are answered too
MOST_AT_ONCE = 64  # answers in a batch
PROBE_TOKENS = 4  # of the prompts and the answers that show how long a token takes
Note = Callable[[str], None]
Progress = Callable[[int, int], None]  # number done, total


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out prompt. value, columns: as metrics get them; `answer` is the reply in the data, if there is one."""

    prompt: EncodedPrompt
    value: str | Messages
    reference: str = ""  # the reply in the data; "" if there is none
    columns: Mapping[str, Any] = field(default_factory=dict)
    is_training: bool = False


@dataclass(frozen=True, slots=True)
class AnswerFacts:
    tokens: int
    is_cut: bool  # it reached the limit of its tokens
    scores: dict[str, float | None] = field(default_factory=dict)  # by metric; None: not scored


@dataclass(frozen=True, slots=True)
class ComparedAnswer:
    prompt: str
    base: str
    tuned: str
    earlier_messages: int = 0  # before the prompt
    reference: str = ""  # the reply in the data; "" if there is none
    images: tuple[Image, ...] = ()  # of the prompt and the messages before it
    reference_tokens: int = 0
    before: AnswerFacts | None = None  # of `base`; None in files of earlier versions
    after: AnswerFacts | None = None  # of `tuned`
    cluster: int = 0  # the same number for prompts that are alike, or belong together
    is_training: bool = False  # the prompt is one that was trained
    judged: tuple[float | None, ...] = ()  # by a judge: 1 if it preferred `tuned` as answer A, and as answer B

    @property
    def pairs(self) -> list[tuple[str, AnswerFacts]]:
        """Text and facts of both answers; [] if a file of an earlier version has no facts."""
        answers = (self.base, self.before), (self.tuned, self.after)
        return [(text, facts) for text, facts in answers if facts is not None]


JudgeAnswers = Callable[[Sequence[ComparedAnswer], Sequence[Question]], list[ComparedAnswer]]


def answer_held_out(
    result: TrainResult, config: TrainConfig, note: Note, progress: Progress
) -> tuple[list[ComparedAnswer], list[Question]]:
    """Returns answers to a fixed sample of the held-out prompts, and to training prompts if these are few.

    Prompts that chose the step of the run are left out.

    Texts have no replies, and reinforcement learning evaluates itself: of these, answers are only shown.
    With a sharded model, all ranks must call it.
    """
    model, tokenizer, data = result.model, result.tokenizer, result.data
    if data is None:
        return [], []
    is_shown_only = data.report.task == GRPO or data.report.shape == TEXT
    has_metric = not is_shown_only and bool(config.metric)
    number = config.metric_examples if config.metric_examples is not None else MOST_SCORED if has_metric else MOST_READ
    if is_shown_only:
        number = min(number, config.samples)
    evaluated = np.arange(len(data.eval_samples))
    evaluated = evaluated if result.selection is None else np.setdiff1d(evaluated, result.selection)
    questions = held_out_questions(model, tokenizer, data, number, evaluated)
    if number and not is_shown_only and len(data.eval_samples) < FEW_HELD_OUT and not is_seq2seq(model):
        some = np.random.default_rng(0).permutation(len(data.train))[:TRAINING_PROMPTS]
        questions += [training_question(data.train[int(i)], tokenizer) for i in some if not data.train[int(i)].images]
    limit = config.max_completion_length if has_metric or data.report.task == GRPO else NEW_TOKENS
    return compare_answers(model, tokenizer, questions, max_new_tokens=limit, note=note, progress=progress), questions


def held_out_questions(
    model: Trainable, tokenizer: Any, data: PreparedData, number: int, examples: Int64
) -> list[Question]:
    """Returns the prompts of at most `number` of the held-out examples with these indices, a fixed random sample."""
    chosen = np.sort(np.random.default_rng(0).permutation(examples)[:number]).tolist()
    columns = [{name: data.eval_rows[i].get(name) for name in data.report.ignored} for i in chosen]
    return questions_of(model, tokenizer, [data.eval_samples[i] for i in chosen], columns)


def training_question(example: Example, tokenizer: Any) -> Question:
    """Returns the prompt before the first reply of a training example."""
    ids, is_trained = example.input_ids.tolist(), example.labels != IGNORED
    start = int(is_trained.argmax())
    end = start + int((~is_trained[start:]).argmax()) if not is_trained[start:].all() else len(ids)
    prompt, reply = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:start], ids[start:end]))
    return Question(EncodedPrompt(prompt, ids[:start]), prompt, reply.strip(), is_training=True)


def questions_of(
    model: Any, tokenizer: Any, samples: Sequence[str | Sample], columns: Sequence[Mapping[str, Any]] = ()
) -> list[Question]:
    """Returns the questions that leave the model positions for an answer; of a sample, its last reply is asked for.

    columns: of each sample's row, which are not part of it.
    Raises DataError if the chat template rejects a prompt.
    """
    questions = []
    for number, sample in enumerate(samples):
        prompt = prompt_of(model, sample, tokenizer)
        if free_positions(model, len(prompt.ids)) < 1:
            continue
        questions.append(_question(prompt, sample, tokenizer, columns[number] if columns else {}))
    return questions


def _question(
    prompt: EncodedPrompt, sample: str | Sample, tokenizer: Any, columns: Mapping[str, Any] = MappingProxyType({})
) -> Question:
    is_chat = isinstance(sample, Conversation)
    value = sample.messages[: last_reply(sample)] if is_chat else prompt.text  # type: ignore[union-attr, arg-type]
    has_reply = isinstance(sample, Pair) or (is_chat and bool(sample.replies))  # type: ignore[union-attr]
    reference = reply_text(sample, tokenizer) if has_reply else ""  # type: ignore[arg-type]
    known: dict[str, Any] = {"answer": reference} if reference else {}
    return Question(prompt, value, reference, known | dict(columns))


def check_metrics(config: TrainConfig, data: PreparedData | None, tokenizer: Any) -> None:
    """Tries the metrics on two held-out rows, as if their replies were answers.

    Raises ConfigError if there is nothing to score, or a metric needs what the rows lack; RewardError if one fails.
    """
    metrics = [metric for metric in parse_rewards([], config.metric)[1] if not metric.is_judge]
    names = ", ".join(config.metric)
    if data is not None and (data.report.task in TASK_TYPES or data.report.shape == TEXT):
        raise ConfigError(f"--metric {names} scores answers, but the data has {data.report.shape} rows; remove it")
    if data is None or not data.eval_samples:
        raise ConfigError(
            f"--metric {names} scores answers to held-out prompts, but there are none; use --eval-data FILE"
        )
    if config.metric_for_best_model and len(data.eval_samples) < ENOUGH_TO_HALVE:
        raise ConfigError(
            f"--metric-for-best-model needs at least {ENOUGH_TO_HALVE} held-out rows, got {len(data.eval_samples)}: "
            "one half chooses the step, and the other half evaluates it; use --eval-data, a larger --validation-split, "
            "or remove it to choose by the loss"
        )
    rows = [{name: row.get(name) for name in data.report.ignored} for row in data.eval_rows[:2]]
    pairs = zip(data.eval_samples, rows, strict=False)
    questions = [_question(EncodedPrompt(_prompt_text(sample), []), sample, tokenizer, row) for sample, row in pairs]
    if config.metric_for_best_model:
        best_metric(config)
    try_metrics(metrics, questions, config.reward_seconds)


def try_metrics(metrics: Sequence[Reward], questions: Sequence[Question], seconds: float) -> None:
    """Scores the replies of two rows, as if they were answers.

    Raises ConfigError if a metric needs a column that the rows lack, RewardError if one fails.
    """
    columns = [*dict.fromkeys(name for question in questions for name in question.columns)]
    with RewardProcess(metrics, seconds, columns) as process:
        process.score([completion_of(question, question.reference) for question in questions[:2]])


def best_metric(config: TrainConfig) -> Reward:
    """Returns the metric that chooses the step. Raises ConfigError if it is not one of --metric."""
    metrics, name = parse_rewards([], config.metric)[1], config.metric_for_best_model
    for metric in metrics:
        if name in (metric.name, metric.source):
            return metric
    known = ", ".join(metric.name for metric in metrics)
    raise ConfigError(f"--metric-for-best-model {name}: expected a metric of --metric ({known}); add it there")


def _prompt_text(sample: Any) -> str:
    return str(sample.prompt) if isinstance(sample, Pair) else ""


def compare_answers(
    model: Trainable,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = NEW_TOKENS,
    base: bool = True,
    note: Note = lambda _: None,
    progress: Progress = lambda _done, _total: None,
) -> list[ComparedAnswer]:
    """Returns greedy answers of the tuned model, and for `base` of the base. With a sharded model, all ranks call it.

    note: called with the estimated time, before it begins.
    progress: called with the number of finished answers and their total.
    """
    prompts, total = [question.prompt for question in questions], (1 + base) * len(questions)
    if not prompts:
        return []
    of_base: Sequence[Answer | None] = [None] * len(prompts)
    with ExitStack() as stack:
        answerer = Answerer(model, tokenizer, prompts, max_new_tokens, stack)
        models = "the base and the tuned model" if base else "one model"
        seconds = (1 + base) * _estimate_seconds(answerer, prompts, max_new_tokens)
        limits = f"at most {max_new_tokens:,} new tokens each and {timedelta(seconds=math.ceil(seconds))} in total"
        note(f"answering {len(prompts):,} prompts with {models}: {limits}")
        tuned = answerer.answer(prompts, max_new_tokens, progress=lambda done: progress(done, total))
        if base:
            of_base = answerer.answer(
                prompts, max_new_tokens, base=True, progress=lambda done: progress(len(prompts) + done, total)
            )
    count_tokens = text_tokenizer(tokenizer)
    return [
        ComparedAnswer(
            question.prompt.text,
            "" if first is None else first.text,
            second.text,
            question.prompt.earlier_messages,
            question.reference,
            question.prompt.images,
            len(count_tokens(question.reference, add_special_tokens=False)["input_ids"]),
            None if first is None else AnswerFacts(first.tokens, first.is_cut),
            AnswerFacts(second.tokens, second.is_cut),
            cluster,
            question.is_training,
        )
        for question, first, second, cluster in zip(questions, of_base, tuned, clusters_of(questions), strict=True)
    ]


def clusters_of(questions: Sequence[Question]) -> list[int]:
    """Returns a number for each question, the same for prompts that are alike or have the same `group`."""
    prompts = [
        replace(Example.of_text(np.array(question.prompt.ids, dtype=np.int32)), images=question.prompt.images)
        for question in questions
    ]
    groups = defaultdict[str, list[int]](list)
    for number, question in enumerate(questions):
        group = question.columns.get("group")
        groups[f"row {number}" if group is None else f"group {group}"].append(number)
    clusters = list(range(len(questions)))
    for alike in [*groups.values(), *duplicates(prompts), *near_duplicates(prompts)]:
        joined = {clusters[number] for number in alike}
        if len(joined) == 1:
            continue
        clusters = [min(joined) if cluster in joined else cluster for cluster in clusters]
    return clusters


def score_answers(
    answers: Sequence[ComparedAnswer],
    questions: Sequence[Question],
    metrics: Sequence[Reward],
    seconds: float,
    judge: JudgeAnswers | None = None,
) -> tuple[list[ComparedAnswer], dict[str, bool]]:
    """Returns the answers with their scores, except for training prompts. Raises RewardError, and ConfigError.

    Also returns of each metric whether higher is better, in the order of the metrics.
    seconds: limit for one call of a metric. judge: the language model among the metrics, if there is one.
    """
    asked = [number for number, question in enumerate(questions) if not question.is_training]
    functions = [metric for metric in metrics if not metric.is_judge]
    scored, directions = list(answers), {metric.name: True for metric in metrics}
    if not metrics or not asked:
        return scored, {}
    if functions:
        texts = [(questions[number], text) for number in asked for text, _ in answers[number].pairs]
        columns = [*dict.fromkeys(name for question, _ in texts for name in question.columns)]
        with RewardProcess(functions, seconds, columns) as process:
            rows = process.score([completion_of(question, text) for question, text in texts]).tolist()
            directions |= {m.name: higher for m, higher in zip(functions, process.higher_is_better, strict=True)}
        names = [metric.name for metric in functions]
        scores = iter({name: None if v != v else v for name, v in zip(names, row, strict=True)} for row in rows)
        for number in asked:
            answer = answers[number]
            before = None if answer.before is None else replace(answer.before, scores=next(scores))
            after = None if answer.after is None else replace(answer.after, scores=next(scores))
            scored[number] = replace(answer, before=before, after=after)
    return scored if judge is None else judge(scored, questions), directions


def completion_of(question: Question, text: str) -> Completion:
    is_chat = not isinstance(question.value, str)
    reply: Any = [{"role": "assistant", "content": text}] if is_chat else text
    return Completion(question.value, reply, [], question.columns)


class Answerer:
    """Answers prompts greedily, until `stack` is left; with a sharded model, all ranks must call it.

    Make it before training, whose attention may not support answers.
    """

    model: Trainable
    at_once: int  # prompts
    _attention: str | None  # of the base before training
    _sampler: Sampler | None  # None: transformers' generate answers one prompt after the other

    def __init__(
        self, model: Trainable, tokenizer: Any, prompts: Sequence[EncodedPrompt], max_new_tokens: int, stack: ExitStack
    ) -> None:
        """prompts: at least one. max_new_tokens: the most that will be asked for."""
        self.model, self.tokenizer, self.base = model, tokenizer, cast(PreTrainedModel, model.base_model)
        self._attention, self._sampler, self.at_once = attention_of(self.base.config), None, 1
        if not (is_sharded(model) or is_seq2seq(model)):
            longest = max(len(prompt.ids) for prompt in prompts) + max_new_tokens
            self.at_once = min(MOST_AT_ONCE, len(prompts))
            with seeded(0):
                self._sampler = Sampler(model, tokenizer, longest, self.at_once, lambda _note: None)
            stack.callback(self._sampler.stop)

    def answer(
        self,
        prompts: Sequence[EncodedPrompt],
        max_new_tokens: int,
        *,
        base: bool = False,
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[Answer]:
        """base: by the model without its adapter."""
        by_adapter = self._sampler is not None and isinstance(self.model, LoRAModel)  # the engine needs no switch
        with seeded(0), self.model.disable_adapter() if base and not by_adapter else nullcontext():
            if self._sampler is not None:
                return self._sampler.answer(prompts, max_new_tokens, base=base, progress=progress)
            now, before = attention_of(self.base.config), self._attention
            with nullcontext() if before is None or now == before else use_attention(self.base, before):
                return _answer_one_by_one(self.model, self.tokenizer, prompts, max_new_tokens, progress)


def _estimate_seconds(answerer: Answerer, prompts: Sequence[EncodedPrompt], max_new_tokens: int) -> float:
    """Measures how long one model takes to read a prompt of median length, and to add a token to as many answers as
    fit. Returns the time of all prompts, if every answer reaches the limit.
    """

    def seconds(some: Sequence[EncodedPrompt], tokens: int) -> tuple[float, int]:
        started = perf_counter()
        longest = max(given.tokens for given in answerer.answer(some, tokens))
        return perf_counter() - started, longest

    median = sorted(prompts, key=lambda prompt: len(prompt.ids))[len(prompts) // 2]
    images = media_ids(answerer.tokenizer if isinstance(answerer.tokenizer, ProcessorMixin) else None)
    short = [
        EncodedPrompt("", [token for token in prompt.ids if token not in images][-PROBE_TOKENS:])
        for prompt in prompts[: answerer.at_once]
    ]
    seconds(short[:1], 1)  # whatever only the first one does
    (reading, _), (first, _), (more, longest) = seconds([median], 1), seconds(short, 1), seconds(short, PROBE_TOKENS)
    step = max(more - first, 0.0) / (longest - 1) if longest > 1 else first
    return len(prompts) * reading + math.ceil(len(prompts) / answerer.at_once) * max_new_tokens * step


def _answer_one_by_one(
    model: Trainable,
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    max_new_tokens: int,
    progress: Callable[[int], None],
) -> list[Answer]:
    answers = list[Answer]()
    with evaluating(model):
        for prompt in prompts:
            arguments = generation_arguments(model, tokenizer, prompt, max_new_tokens=max_new_tokens)
            output = model.generate(**arguments, synced_gpus=is_sharded(model))  # no rank stops before others
            new = new_tokens(model, output[0], prompt.ids)  # (length,)
            is_cut = int(new[-1]) not in (arguments["generation_config"].eos_token_id or [])
            text = str(tokenizer.decode(new, skip_special_tokens=True)).strip()
            answers.append(Answer(text, len(new), is_cut))
            progress(len(answers))
    return answers
