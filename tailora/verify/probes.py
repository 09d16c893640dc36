"""Probes of an adapter: prompts whose next token differs between the adapter, its base and a wrong scale.

`make_passport` uses chats with replies, or plain texts for a model without chat template. Each gives two plain
completions that end where the adapter changes the next token most, compared with the effect of rounding the base to 4
bits, and a chat that ends before the reply. There it computes the log-probabilities of likely tokens at every scale.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailora.core.adapter import Adapter, with_strength
from tailora.core.attach import evaluating
from tailora.core.layer_types import CONV1D, LINEAR, layer_type_of
from tailora.core.quantization import dense_weight
from tailora.data.chat_template import ChatTokenizer
from tailora.data.messages import Messages
from tailora.errors import DataError
from tailora.evaluation.forgetting import sample_texts
from tailora.formats.export import with_only_adapter
from tailora.formats.peft_config import base_model_name
from tailora.train.generate import free_positions
from tailora.train.parallel import is_sharded
from tailora.train.state import seeded
from tailora.verify.passport import ADAPTER, BASE, NOISE_FLOOR, Passport, Probe

REPLY_LENGTH = 40  # tokens
SHORTEST_CONTEXT = 200  # positions of a model
TEXTS, TEXT_LENGTH = 16, 48  # for a model without chat template: texts written by the base, and their tokens
SHORTEST_PROMPT = 4  # tokens; the first words of a plain text are too uncertain
PER_TEXT = 2  # plain completions; with one, a correct base in Q5_0 was mistaken for a scaled adapter
LIKELY = 8  # tokens of a probe that are kept for each scale
SCALES = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0, 4.0)
GROUP = 32  # weights that share a scale in llama.cpp's Q4_0
CHUNK = 2**24  # logits computed at a time; needs a few times their memory
MOST_SPECIAL = 0.1  # probability of special tokens at a probe: servers hide them, each in its own way

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
    system: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Passport:
    """Returns the verification file of an adapter of a LoRAModel, without its hashes. The model does not change.

    The texts are QUESTIONS with replies written by the base, so the file reveals nothing about the data.
    system: the system message of the chats; servers that know it add it.
    progress: called with the number of finished computations and their total.
    Raises DataError for another kind of model, if no text is usable as a probe, or if the adapter cannot be
    distinguished from its base.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or getattr(config, "is_encoder_decoder", False):
        raise DataError("verification files are only supported for decoder-only language models")
    if is_sharded(model):
        raise DataError("the model is sharded; create the verification file with `tailora export`")
    chat_tokenizer, base_model = ChatTokenizer.of(tokenizer), model.base_model
    if (positions := free_positions(base_model, 0)) < SHORTEST_CONTEXT:
        raise DataError(f"a verification file needs a context of at least {SHORTEST_CONTEXT} tokens, got {positions}")
    if chat_tokenizer.template is None:
        written = sample_texts(model, tokenizer, count=TEXTS, length=TEXT_LENGTH, seed=seed)  # each after a first token
        texts = _plain_texts([ids[1:] for ids in written], chat_tokenizer)
    else:
        texts = _answered_questions(model, chat_tokenizer, seed, system)
    if not texts:
        raise DataError(f"no text is usable as a prompt: expected at least {SHORTEST_PROMPT + 1} tokens")
    with torch.no_grad(), evaluating(base_model):
        probes = _probes(texts, model.adapter(name), base_model, chat_tokenizer, progress)
    if not probes:
        raise DataError("no text is usable as a prompt: likely next tokens are special tokens or parts of characters")
    if not all(math.isfinite(value) for probe in probes for values in probe.logprobs.values() for value in values):
        raise DataError("the model's log-probabilities are not finite: the adapter has diverged")
    if all(probe.logprobs[ADAPTER] == probe.logprobs[BASE] for probe in probes):
        raise DataError("the adapter changes no log-probability, so it cannot be distinguished from its base")
    base_name = Path(base_model_name(base_model) or "").name  # without the local path
    return Passport(base_model=base_name, probes=probes)


# ---- Texts


@dataclass(frozen=True, eq=False)
class ProbeText:
    """Token ids, with BOS if the tokenizer writes one. Probes end at token `first` or later.

    messages, rendered: of a chat, up to the reply, and their text under the template.
    """

    ids: tuple[int, ...]
    first: int
    messages: Messages | None = None
    rendered: str = ""


def _answered_questions(model: Any, tokenizer: ChatTokenizer, seed: int, system: str | None) -> list[ProbeText]:
    """Returns QUESTIONS with replies written by the base."""
    first = [] if system is None else [{"role": "system", "content": system}]
    chats: list[ProbeText] = []
    for question in QUESTIONS:
        messages = [*first, {"role": "user", "content": question}]
        rendered = tokenizer.render(messages, add_generation_prompt=True)
        prompt = tuple(tokenizer.token_ids(rendered))
        chats.append(ProbeText(prompt, len(prompt) - 1, messages, rendered))
    length, pad = max(len(chat.ids) for chat in chats), tokenizer.eos_id or 0
    ids = torch.tensor([[pad] * (length - len(chat.ids)) + list(chat.ids) for chat in chats], device=model.device)
    mask = torch.tensor([[0] * (length - len(chat.ids)) + [1] * len(chat.ids) for chat in chats], device=model.device)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.9, "max_new_tokens": REPLY_LENGTH}
    with seeded(seed), torch.no_grad(), evaluating(model), model.disable_adapter():
        output = model.generate(ids, attention_mask=mask, pad_token_id=pad, **sampling)  # (questions, length + reply)
    replies = [_up_to_special(reply, tokenizer) for reply in output[:, length:].tolist()]
    return [replace(chat, ids=(*chat.ids, *reply)) for chat, reply in zip(chats, replies, strict=True)]


def _plain_texts(texts: Sequence[Sequence[int]], tokenizer: ChatTokenizer) -> list[ProbeText]:
    first = len(tokenizer.bos_ids) + SHORTEST_PROMPT - 1
    rows = [(*tokenizer.bos_ids, *_up_to_special(ids, tokenizer)[:TEXT_LENGTH]) for ids in texts]
    return [ProbeText(row, first) for row in rows if len(row) > first]


def _up_to_special(ids: Sequence[int], tokenizer: ChatTokenizer) -> list[int]:
    end = next((number for number, token in enumerate(ids) if token in tokenizer.special_ids), len(ids))
    return list(ids[:end])


# ---- Weights in Q4_0


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


def _logprobs(
    base_model: nn.Module,
    adapter: Adapter,
    rows: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    scale: float,
    *,
    on_q4_0: bool = False,
) -> Tensor:
    """Returns what `next_logprobs` does, with the adapter at this scale."""
    with ExitStack() as stack:
        stack.enter_context(with_only_adapter(base_model, with_strength(adapter, scale) if scale else None))
        if on_q4_0:
            stack.enter_context(rounded_to_4_bits(base_model))
        return next_logprobs(base_model, rows, positions)


def _probes(
    texts: Sequence[ProbeText],
    adapter: Adapter,
    base_model: nn.Module,
    tokenizer: ChatTokenizer,
    progress: Callable[[int, int], None],
) -> list[Probe]:
    """Returns the plain completions of each text, and a chat where it is one."""
    root = math.sqrt(max((layer.r for layer in adapter.low_rank.values()), default=1))
    scales = sorted({BASE, ADAPTER, *SCALES, round(root, 4), round(1 / root, 4)})
    size = max(1, CHUNK // (len(tokenizer.tokenizer) * max(len(text.ids) for text in texts)))
    chunks = [texts[start : start + size] for start in range(0, len(texts), size)]
    probes: list[Probe] = []
    for number, chunk in enumerate(chunks):
        compute = partial(_logprobs, base_model, adapter, [text.ids for text in chunk])
        spots = _spots(chunk, compute, tokenizer)
        positions = [[spot.position for spot in spots if spot.text is text] for text in chunk]
        logprobs: dict[float, Tensor] = {}
        for done, scale in enumerate(scales):
            progress(number * len(scales) + done, len(chunks) * len(scales))
            logprobs[scale] = compute(positions, scale)  # (spots, vocabulary)
        rounded = {scale: compute(positions, scale, on_q4_0=True) for scale in (BASE, ADAPTER)}
        for row, spot in enumerate(spots):
            words, ids = _likely_tokens([values[row] for values in logprobs.values()], tokenizer)
            exact, on_q4_0 = (
                {
                    scale: [round(value, 4) for value in values[row][ids].clamp_min(-100).tolist()]
                    for scale, values in computed.items()
                }
                for computed in (logprobs, rounded)
            )
            probe = Probe(spot.position + 1, words, exact, on_q4_0, spot.words)
            if spot.words is None:
                probe = replace(probe, messages=spot.text.messages, rendered=spot.text.rendered)
            if words:
                probes.append(probe)
    return probes


@dataclass(frozen=True, eq=False)
class Spot:
    """Where a prompt ends: after the token at `position`. words: the prompt; None for a chat."""

    text: ProbeText
    position: int
    words: str | None


def _spots(chunk: Sequence[ProbeText], compute: Callable[..., Tensor], tokenizer: ChatTokenizer) -> list[Spot]:
    """Returns where the plain completions and the chat of each text end.

    Plain completions end where the adapter changes most compared with 4-bit weights, among the positions whose text has
    the same tokens if it is tokenized again.
    """
    positions = [range(text.first, len(text.ids)) for text in chunk]
    sizes = [len(of_text) for of_text in positions]
    base, tuned = compute(positions, BASE), compute(positions, ADAPTER)  # (positions, vocabulary)
    ratios = (_change(base, tuned) + NOISE_FLOOR) / (
        _change(compute(positions, ADAPTER, on_q4_0=True), tuned) + NOISE_FLOOR
    )
    special = [token for token in tokenizer.special_ids if token < base.shape[1]]  # the model may lack some
    ratios[torch.maximum(*(values[:, special].exp().sum(-1) for values in (base, tuned))) >= MOST_SPECIAL] = -1
    spots: list[Spot] = []
    for text, of_text in zip(chunk, torch.split(ratios, sizes), strict=True):
        for index in of_text.argsort(descending=True).tolist():
            if sum(spot.text is text for spot in spots) == PER_TEXT:
                break
            position = text.first + index
            words = tokenizer.tokenizer.decode(text.ids[len(tokenizer.bos_ids) : position + 1])
            is_same = [*tokenizer.tokenizer(words, verbose=False)["input_ids"]] == [*text.ids[: position + 1]]
            if not of_text[index] < 0 and is_same:
                spots.append(Spot(text, position, words))
        if text.messages:
            spots.append(Spot(text, text.first, None))
    return spots


def _change(first: Tensor, second: Tensor) -> Tensor:
    """Returns the distance of the likely tokens' log-probabilities in nats: (n, vocabulary) twice -> (n,)."""

    def change(a: Tensor, b: Tensor) -> Tensor:
        return ((a.exp() + b.exp()) / 2 * (a - b).clamp(-10, 10).square()).sum().sqrt()

    return torch.stack([change(a, b) for a, b in zip(first, second, strict=True)])  # without large temporary tensors


def _likely_tokens(logprobs: Sequence[Tensor], tokenizer: ChatTokenizer) -> tuple[list[str], list[int]]:
    """Returns the texts and ids of tokens that are likely at any scale, the likeliest first.

    logprobs: for each scale, (vocabulary,).
    """
    stacked = torch.stack([*logprobs])
    top = stacked.topk(LIKELY).indices.flatten().tolist()
    highest = stacked.amax(0)
    by_text: dict[str, int] = {}
    for token in sorted({*top} - tokenizer.special_ids, key=lambda token: -float(highest[token])):
        text = tokenizer.tokenizer.decode([token])
        if text and "\ufffd" not in text:  # a part of a character, which servers write in different ways
            by_text.setdefault(text, token)
    return list(by_text), list(by_text.values())
