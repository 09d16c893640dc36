"""Probes of an adapter: prompts whose next token differs between the adapter, its base and a misused adapter.

`make_passport` uses chats with replies, or plain texts for a model without chat template. It chooses the positions at
which the adapter changes the next token most, compared with the effect of rounding the base to 4 bits. There it
computes the log-probabilities of the likely tokens under every variant that a server may compute by mistake.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailora.core.adapter import Adapter, with_strength
from tailora.core.attach import evaluating
from tailora.core.layer_types import CONV1D, LINEAR, layer_type_of
from tailora.core.patterns import layer_index
from tailora.core.quantization import dense_weight
from tailora.data.chat_template import ChatTokenizer, to_conversation
from tailora.data.messages import Messages
from tailora.data.samples import Choices, Conversation, Feedback, Preference, Sample, Text
from tailora.data.tokenize import last_reply
from tailora.errors import DataError
from tailora.evaluation.forgetting import sample_texts
from tailora.evaluation.generate import free_positions
from tailora.formats.export import with_only_adapter
from tailora.formats.peft_config import base_model_name
from tailora.study.model_layout import block_of, layer_count
from tailora.train.parallel import is_sharded
from tailora.train.state import seeded
from tailora.verify.passport import ADAPTER, BASE, NOISE_FLOOR, ROUNDED_ADAPTER, ROUNDED_BASE, Passport, Probe, Variant

PROMPT_LENGTH, REPLY_LENGTH = 256, 40  # tokens of a chat that are used; longer prompts are skipped
SHORTEST_CONTEXT, ROOM = 200, 100  # positions of a model; of them for the reply and a longer template
TEXTS, TEXT_LENGTH = 8, 48  # for a model without chat template: texts written by the base, and their tokens
SHORTEST_PROMPT = 4  # tokens; the first words of a plain text are too uncertain
TEXT_PROBES, CONTROLS, MOST_PER_TEXT = 36, 12, 6
LIKELY = 8  # tokens of a probe that are kept for each of the variants in TOKENS_OF
SCALES = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0, 4.0)
TOKENS_OF = (ADAPTER, BASE, "scale 0.5", "scale 2", "scale 4")
GROUP = 32  # weights that share a scale in llama.cpp's Q4_0
CHUNK = 2**24  # logits computed at a time; needs a few times their memory
MOST_SPECIAL = 0.1  # probability of special tokens at a probe: servers hide them, each in its own way

SECOND_BOS, ADDED_BOS, NO_BOS = "a second BOS", "a BOS before the prompt", "no BOS"
NO_START = "no start of the reply"

QUESTIONS = (
    "What would you do on a rainy Sunday?",
    "Explain in two sentences why the sky is blue.",
    "Write a short greeting for a new colleague.",
    "What is the capital of Australia?",
    "How do I make a good cup of tea?",
    "Give me three tips for learning a language.",
    "Write a Python function that reverses a string.",
    "I feel tired today. What should I do?",
)

# ---- The verification file


def make_passport(
    model: Any,
    tokenizer: Any,
    *,
    name: str = "default",
    held_out: Sequence[Sample] | None = None,
    system: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Passport:
    """Returns the passport of an adapter of a LoRAModel, without its hashes. The model does not change.

    progress: called with the number of finished computations and their total.
    held_out: samples whose text goes into the passport. None: QUESTIONS with replies written by the base, so that the
        passport reveals nothing about the data.
    system: the system message for chats without one; servers that know it add it.
    Raises DataError for another kind of model, if no text is usable as a probe, or if the adapter cannot be
    distinguished from its base.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or getattr(config, "is_encoder_decoder", False):
        raise DataError("verification files are only supported for decoder-only language models")
    if is_sharded(model):
        raise DataError("the model is sharded; create the verification file with `tailora export`")
    chat_tokenizer = ChatTokenizer.of(tokenizer)
    adapter, base_model = model.adapter(name), model.base_model
    if (positions := free_positions(base_model, 0)) < SHORTEST_CONTEXT:
        raise DataError(f"a verification file needs a context of at least {SHORTEST_CONTEXT} tokens, got {positions}")
    first = [] if system is None else [{"role": "system", "content": system}]
    if held_out is not None:
        texts = _of_samples(held_out, chat_tokenizer, positions, first)
    elif chat_tokenizer.template is None:
        written = sample_texts(model, tokenizer, count=TEXTS, length=TEXT_LENGTH, seed=seed)  # each after a first token
        texts = _plain_texts([ids[1:] for ids in written], chat_tokenizer)
    else:
        texts = _answered_questions(model, chat_tokenizer, seed, first)
    if not texts:
        raise DataError(
            f"no text is usable as a prompt: expected at least {SHORTEST_PROMPT + 1} tokens, at most {PROMPT_LENGTH} "
            "of them before the reply, and messages of plain text"
        )
    computations = _computations(adapter, base_model)
    with torch.no_grad(), evaluating(base_model):
        probes = _probes(texts, computations, chat_tokenizer, progress)
    probes = [probe for probe in probes if probe.tokens]
    if not probes:
        raise DataError("no text is usable as a prompt: likely next tokens are special tokens or parts of characters")
    if not all(math.isfinite(value) for probe in probes for values in probe.logprobs.values() for value in values):
        raise DataError("the model's log-probabilities are not finite: the adapter has diverged")
    if all(probe.logprobs[ADAPTER] == probe.logprobs[BASE] for probe in probes):
        raise DataError("the adapter changes no log-probability, so it cannot be distinguished from its base")
    names = dict.fromkeys(variant for probe in probes for variant in probe.logprobs)
    return Passport(
        base_model=Path(base_model_name(base_model) or "").name,  # without the local path
        texts="base" if held_out is None else "held-out",
        variants={name: computations[name].variant if name in computations else Variant("prompt") for name in names},
        probes=probes,
    )


# ---- Texts


@dataclass(frozen=True, eq=False)
class ProbeText:
    """Token ids, with BOS if the tokenizer writes one. Probes end at token `first` or later.

    messages, rendered: of a chat, up to the reply, and their text under the template.
    start: number of tokens that the template writes to start the reply; 0 if unknown.
    """

    ids: tuple[int, ...]
    first: int
    messages: Messages | None = None
    rendered: str = ""
    start: int = 0


def _chat(messages: Messages, reply: Sequence[int], tokenizer: ChatTokenizer) -> ProbeText:
    rendered = tokenizer.render(messages, add_generation_prompt=True)
    prompt, unstarted = (tokenizer.token_ids(text) for text in (rendered, tokenizer.render(messages)))
    start = len(prompt) - len(unstarted) if prompt[: len(unstarted)] == unstarted else 0
    return ProbeText((*prompt, *reply[:REPLY_LENGTH]), len(prompt) - 1, messages, rendered, start)


def _answered_questions(model: Any, tokenizer: ChatTokenizer, seed: int, first: Messages) -> list[ProbeText]:
    """Returns QUESTIONS with replies written by the base. first: the messages before each question."""
    chats = [_chat([*first, {"role": "user", "content": question}], [], tokenizer) for question in QUESTIONS]
    length, pad = max(len(chat.ids) for chat in chats), tokenizer.eos_id or 0
    ids = torch.tensor([[pad] * (length - len(chat.ids)) + list(chat.ids) for chat in chats], device=model.device)
    mask = torch.tensor([[0] * (length - len(chat.ids)) + [1] * len(chat.ids) for chat in chats], device=model.device)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.9, "max_new_tokens": REPLY_LENGTH}
    with seeded(seed), torch.no_grad(), evaluating(model), model.disable_adapter():
        output = model.generate(ids, attention_mask=mask, pad_token_id=pad, **sampling)  # (questions, length + reply)
    replies = [_up_to_special(reply, tokenizer) for reply in output[:, length:].tolist()]
    return [replace(chat, ids=(*chat.ids, *reply)) for chat, reply in zip(chats, replies, strict=True)]


def _of_samples(
    samples: Sequence[Sample], tokenizer: ChatTokenizer, positions: int, first: Messages
) -> list[ProbeText]:
    """Returns the first usable samples. first: the messages before a chat without a system message."""
    texts: list[ProbeText] = []
    for sample in map(_desired, samples):
        if len(texts) == len(QUESTIONS):
            break
        if isinstance(sample, Text) or tokenizer.template is None:
            if not isinstance(sample, Conversation):  # which needs a template
                words = sample.text if isinstance(sample, Text) else f"{sample.prompt}{sample.completion}"
                texts += _plain_texts([tokenizer.token_ids(words)], tokenizer)
            continue
        chat = to_conversation(sample)
        reply = last_reply(chat)
        if reply is None or chat.tools or any(set(message) != {"role", "content"} for message in chat.messages):
            continue
        has_system = chat.messages[0]["role"] == "system"
        prompt = [*([] if has_system else first), *chat.messages[:reply]]
        text = _chat(prompt, tokenizer.token_ids(chat.messages[reply]["content"]), tokenizer)
        if text.first < min(PROMPT_LENGTH, positions - ROOM):
            texts.append(text)
    return texts


def _desired(sample: Any) -> Any:
    """Returns the desired text of a sample of any task; for feedback, its reply, even an undesired one."""
    match sample:
        case Preference():
            return sample.chosen
        case Feedback():
            return sample.reply
        case Choices():
            return sample.options[sample.answer]
    return sample


def _plain_texts(texts: Sequence[Sequence[int]], tokenizer: ChatTokenizer) -> list[ProbeText]:
    first = len(tokenizer.bos_ids) + SHORTEST_PROMPT - 1
    rows = [(*tokenizer.bos_ids, *_up_to_special(ids, tokenizer)[:TEXT_LENGTH]) for ids in texts]
    return [ProbeText(row, first) for row in rows if len(row) > first]


def _up_to_special(ids: Sequence[int], tokenizer: ChatTokenizer) -> list[int]:
    end = next((number for number, token in enumerate(ids) if token in tokenizer.special_ids), len(ids))
    return list(ids[:end])


# ---- Variants


@dataclass(frozen=True)
class Computation:
    """The base model with an adapter, or without one. If the variant is of kind "rounding", its weights are in Q4_0."""

    variant: Variant
    base_model: nn.Module
    adapter: Adapter | None

    def logprobs(self, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Tensor:
        """Returns what `next_logprobs` does."""
        with ExitStack() as stack:
            stack.enter_context(with_only_adapter(self.base_model, self.adapter))
            if self.variant.kind == "rounding":
                stack.enter_context(rounded_to_4_bits(self.base_model))
            return next_logprobs(self.base_model, rows, positions)


def _computations(adapter: Adapter, base_model: nn.Module) -> dict[str, Computation]:
    """Returns name -> a computation that a server may use, the right one first."""
    root = math.sqrt(max((layer.r for layer in adapter.low_rank.values()), default=1))
    scales = sorted({*SCALES, *(round(scale, 4) for scale in (root, 1 / root) if scale != 1)})
    variants: dict[str, tuple[Variant, Adapter | None]] = {
        ADAPTER: (Variant("scale"), adapter),
        BASE: (Variant("scale", 0.0), None),
        **{f"scale {scale:g}": (Variant("scale", scale), with_strength(adapter, scale)) for scale in scales},
        **{name: (Variant("part"), part) for name, part in _parts(adapter).items()},
        ROUNDED_ADAPTER: (Variant("rounding"), adapter),
        ROUNDED_BASE: (Variant("rounding", 0.0), None),
    }
    return {name: Computation(variant, base_model, part) for name, (variant, part) in variants.items()}


def _parts(adapter: Adapter) -> dict[str, Adapter]:
    """Returns the missing part -> the adapter without it."""
    half = layer_count(adapter.parts) / 2
    in_layers = {path: index for path in adapter.parts if (index := layer_index(path)) is not None}
    missing: dict[str, Collection[str]] = {
        "the lower half of the layers": {path for path, index in in_layers.items() if index < half},
        "the upper half of the layers": {path for path, index in in_layers.items() if index >= half},
    }
    for block in sorted({block_of(path) for path in adapter.low_rank}):
        missing[f"the {block} layers"] = {path for path in adapter.parts if block_of(path) == block}
    groups: tuple[Mapping[str, Any], ...] = (adapter.low_rank, adapter.saved, adapter.extras)
    parts: dict[str, Adapter] = {}
    for name, paths in missing.items():
        low_rank, saved, extras = (
            {path: part for path, part in group.items() if path not in paths} for group in groups
        )
        parts[name] = replace(adapter, low_rank=low_rank, saved=saved, extras=extras)
    parts["modules trained in full"] = replace(adapter, saved={})
    parts["biases and token rows"] = replace(adapter, extras={})
    return {name: part for name, part in parts.items() if 0 < len(part.parts) < len(adapter.parts)}


@contextmanager
def rounded_to_4_bits(base_model: nn.Module) -> Iterator[None]:
    """Within the block, the base's linear layers compute as if their weights were in Q4_0. No weight changes."""

    def add_rounding(layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        weight = dense_weight(layer)
        weight = weight.T if layer_type_of(layer) is CONV1D else weight  # (out, in)
        return output + F.linear(args[0], (q4_0(weight) - weight).to(args[0].dtype))

    head = getattr(base_model, "get_output_embeddings", lambda: None)()  # servers store it in more bits
    with ExitStack() as stack:
        for module in base_model.modules():
            if module is not head and layer_type_of(module) in (LINEAR, CONV1D):
                stack.callback(module.register_forward_hook(add_rounding).remove)
        yield


def q4_0(weight: Tensor) -> Tensor:
    """(out, in) -> the same, rounded as in llama.cpp's Q4_0: GROUP neighbours share a 16-bit scale."""
    padded = F.pad(weight.detach().float(), (0, -weight.shape[1] % GROUP)).view(len(weight), -1, GROUP)
    largest = padded.gather(-1, padded.abs().argmax(-1, keepdim=True))  # with its sign; it becomes -8
    scale = largest / -8
    levels = (padded * torch.where(scale == 0, 0, 1 / scale) + 8.5).floor().clamp(0, 15) - 8
    rounded: Tensor = (levels * scale.half().float()).flatten(1)[:, : weight.shape[1]].to(weight.dtype)
    return rounded


# ---- Probes


def next_logprobs(model: nn.Module, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Tensor:
    """Returns the log-probabilities of the next token after these positions of each row, (n, vocabulary)."""
    device = next(model.parameters()).device
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)  # (batch, length)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    asked = sorted({position for spots in positions for position in spots})
    index = {position: number for number, position in enumerate(asked)}
    keep = {"logits_to_keep": torch.tensor(asked, device=device)}  # the head only computes these
    keep = keep if "logits_to_keep" in signature(model.forward).parameters else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits
    logits = logits if keep else logits[:, asked]  # (batch, asked, vocabulary)
    chosen = [logits[number, [index[position] for position in spots]] for number, spots in enumerate(positions)]
    return F.log_softmax(torch.cat(chosen).float(), dim=-1).cpu()


Spot = tuple[ProbeText, int]  # a text, and the position of the token after which it is cut


def _probes(
    texts: Sequence[ProbeText],
    computations: Mapping[str, Computation],
    tokenizer: ChatTokenizer,
    progress: Callable[[int, int], None],
) -> list[Probe]:
    """Returns probes of plain completions where the adapter changes most, then one for the reply in each chat."""
    count = max(1, CHUNK // (len(tokenizer.tokenizer) * max(len(text.ids) for text in texts)))
    chunks = [texts[start : start + count] for start in range(0, len(texts), count)]
    chosen, controls = _spots(chunks, computations, tokenizer)
    words = {**chosen, **controls}
    plain: list[Probe] = []
    chats: list[Probe] = []
    for number, chunk in enumerate(chunks):
        starts = {(text, text.first) for text in chunk if text.messages}
        of_chunk = starts | {spot for spot in words if spot[0] in chunk}
        spots = sorted(of_chunk, key=lambda spot: (chunk.index(spot[0]), spot[1]))
        computed = _computed(computations, chunk, spots, tokenizer.tokenizer.bos_token_id)

        def show(done: int, *, before: int = number, total: int = len(computed)) -> None:
            progress(before * total + done, len(chunks) * total)

        for spot, (tokens, logprobs) in zip(spots, _likely_tokens(computed, tokenizer, show), strict=True):
            text, position = spot
            if spot in words:
                of_text = {name: values for name, values in logprobs.items() if name != NO_START}
                plain.append(Probe(position + 1, tokens, of_text, text=words[spot], is_control=spot in controls))
            if spot in starts:
                chats.append(Probe(position + 1, tokens, logprobs, messages=text.messages, rendered=text.rendered))
    return plain + chats


def _spots(
    chunks: Sequence[Sequence[ProbeText]], computations: Mapping[str, Computation], tokenizer: ChatTokenizer
) -> tuple[dict[Spot, str], dict[Spot, str]]:
    """Returns the spots where the adapter changes most compared with 4-bit weights, and the controls, with their text.

    Controls are spots where the adapter changes least. Tokenizing the text again gives the same tokens.
    """
    ratios: list[float] = []
    spots: list[Spot] = []
    for chunk in chunks:
        rows = [text.ids for text in chunk]
        positions: list[Sequence[int]] = [range(text.first, len(text.ids)) for text in chunk]
        base, adapter, rounded = (
            computations[name].logprobs(rows, positions) for name in (BASE, ADAPTER, ROUNDED_ADAPTER)
        )
        special = [token for token in tokenizer.special_ids if token < base.shape[1]]  # the model may lack some
        ends = torch.maximum(*(logprobs[:, special].exp().sum(-1) for logprobs in (base, adapter)))
        of_chunk = [(text, position) for text, where in zip(chunk, positions, strict=True) for position in where]
        ratio = (_change(base, adapter) + NOISE_FLOOR) / (_change(rounded, adapter) + NOISE_FLOOR)
        for number in (ends < MOST_SPECIAL).nonzero().flatten().tolist():
            ratios.append(float(ratio[number]))
            spots.append(of_chunk[number])

    def words_of(text: ProbeText, position: int) -> str | None:
        words: str = tokenizer.tokenizer.decode(text.ids[len(tokenizer.bos_ids) : position + 1])
        is_same = list(tokenizer.tokenizer(words, verbose=False)["input_ids"]) == list(text.ids[: position + 1])
        return words if is_same else None

    def chosen(order: Iterable[int], count: int, taken: Collection[Spot] = ()) -> dict[Spot, str]:
        result: dict[Spot, str] = {}
        for text, position in (spots[number] for number in order):
            is_free = (text, position) not in taken and sum(other is text for other, _ in result) < MOST_PER_TEXT
            if len(result) < count and is_free and (words := words_of(text, position)) is not None:
                result[text, position] = words
        return result

    order = np.argsort(-np.array(ratios)).tolist()
    plain = chosen(order, TEXT_PROBES)
    return plain, chosen(reversed(order), CONTROLS, plain)


def _computed(
    computations: Mapping[str, Computation], chunk: Sequence[ProbeText], spots: Sequence[Spot], bos: int | None
) -> dict[str, Callable[[], Tensor]]:
    """Returns variant -> a function that computes its log-probabilities at the spots, (spots, vocabulary)."""
    rows = [text.ids for text in chunk]
    positions = [[position for text, position in spots if text is row] for row in chunk]
    computed: dict[str, Callable[[], Tensor]] = {
        name: partial(computation.logprobs, rows, positions) for name, computation in computations.items()
    }
    logprobs = computations[ADAPTER].logprobs
    if bos is not None:
        has_bos = all(row[0] == bos for row in rows)
        later = [[position + 1 for position in where] for where in positions]
        computed[SECOND_BOS if has_bos else ADDED_BOS] = partial(logprobs, [(bos, *row) for row in rows], later)
        if has_bos:
            earlier = [[position - 1 for position in where] for where in positions]
            computed[NO_BOS] = partial(logprobs, [row[1:] for row in rows], earlier)
    if any(text.start for text in chunk):
        unstarted = [
            [position - text.start if position == text.first else position for position in where]
            for text, where in zip(chunk, positions, strict=True)
        ]
        computed[NO_START] = partial(logprobs, rows, unstarted)
    return computed


def _change(first: Tensor, second: Tensor) -> Tensor:
    """Returns the distance of the likely tokens' log-probabilities in nats: (n, vocabulary) twice -> (n,)."""

    def change(a: Tensor, b: Tensor) -> Tensor:
        return ((a.exp() + b.exp()) / 2 * (a - b).clamp(-10, 10).square()).sum().sqrt()

    return torch.stack([change(a, b) for a, b in zip(first, second, strict=True)])  # without large temporary tensors


def _likely_tokens(
    computed: Mapping[str, Callable[[], Tensor]], tokenizer: ChatTokenizer, progress: Callable[[int], None]
) -> list[tuple[list[str], dict[str, list[float]]]]:
    """Returns for every spot the texts of its likely tokens, and variant -> their log-probabilities."""
    first = {name: computed[name]() for name in TOKENS_OF}
    top = torch.cat([logprobs.topk(LIKELY).indices for logprobs in first.values()], dim=1)  # (spots, k)
    weights = first[ADAPTER].exp() + first[BASE].exp()
    ids: list[dict[str, int]] = []
    for candidates, weight in zip(top.tolist(), weights, strict=True):
        by_text: dict[str, int] = {}
        for token in sorted({*candidates} - tokenizer.special_ids, key=lambda token: -float(weight[token])):
            text = tokenizer.tokenizer.decode([token])
            if text and "\ufffd" not in text:  # a part of a character, which servers write in different ways
                by_text.setdefault(text, token)
        ids.append(by_text)
    logprobs: list[dict[str, list[float]]] = [{} for _ in ids]
    for done, (name, compute) in enumerate(computed.items()):
        progress(done)
        rows = first[name] if name in first else compute()
        for row, by_text, of_spot in zip(rows, ids, logprobs, strict=True):
            of_spot[name] = [round(value, 4) for value in row[list(by_text.values())].clamp_min(-100).tolist()]
    return [(list(by_text), of_spot) for by_text, of_spot in zip(ids, logprobs, strict=True)]
