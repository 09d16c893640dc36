"""Probes of an adapter: prompts whose next token tells the adapter from its base, and from the adapter used wrongly.

`make_passport` takes chats with replies, or plain texts for a model without chat template. It chooses the positions at
which the adapter changes the next token most, beside what rounding the base to 4 bits changes. There it computes the
log-probabilities of the likely tokens under every variant that a server may compute by mistake.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
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
from tailora.data.schemas import Choices, Conversation, Feedback, Preference, Sample, Text
from tailora.data.tokenize import last_reply
from tailora.errors import DataError
from tailora.evaluation.forgetting import sample_texts
from tailora.evaluation.generate import free_positions
from tailora.formats.export import with_only_adapter
from tailora.formats.fingerprint import fingerprint
from tailora.formats.peft_config import base_model_name
from tailora.study.model_layout import block_of, layer_count
from tailora.train.parallel import is_sharded
from tailora.train.state import seeded
from tailora.verify.passport import ADAPTER, BASE, NOISE_FLOOR, ROUNDED_ADAPTER, ROUNDED_BASE, Passport, Probe, Variant

PROMPT_LENGTH, REPLY_LENGTH = 256, 40  # tokens of a chat that are used; longer prompts are left out
SHORTEST_CONTEXT, ROOM = 200, 100  # positions of a model; of them for the reply and a longer template
TEXTS, TEXT_LENGTH = 8, 48  # for a model without chat template: texts that the base writes, and their tokens
SHORTEST_PROMPT = 4  # tokens; the first words of a plain text tell little
TEXT_PROBES, CONTROLS, MOST_PER_TEXT = 36, 12, 6
LIKELY = 8  # tokens of a probe that are kept for each of the variants in TOKENS_OF
SCALES = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0, 4.0)
GROUP = 32  # weights that share a scale in llama.cpp's Q4_0
CHUNK = 2**26  # logits computed at a time
FINGERPRINTS = 4  # layers of the base
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
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
OTHER_TEMPLATES = {  # that servers use when they do not know the right one
    "no template": "{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
    "ChatML": CHATML,
    "Llama 2": "{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}",
    "Alpaca": "{% for message in messages %}### Instruction:\n{{ message['content'] }}\n\n{% endfor %}### Response:\n",
}
SECOND_BOS, ADDED_BOS, NO_BOS = "a second BOS", "a BOS before the prompt", "no BOS"
SYSTEM = "You are a helpful assistant."

# ---- The passport


def passport_obstacle(model: Any) -> str | None:
    """Returns why an adapter's model can have no passport; None if it can."""
    config = getattr(model, "config", None)
    if not hasattr(config, "vocab_size") or getattr(config, "is_encoder_decoder", False):
        return "only language models of one decoder have a passport"
    if is_sharded(model):
        return "the model is sharded: `tailora export` writes the passport"
    return None


def make_passport(
    model: Any, tokenizer: Any, *, name: str = "default", held_out: Sequence[Sample] | None = None, seed: int = 0
) -> Passport:
    """Returns the passport of an adapter of a LoRAModel, without its hashes. The model stays as it is.

    held_out: samples whose words go into the passport. None: QUESTIONS, and replies that the base writes, so that the
        passport tells nothing of the data.
    Raises DataError if there is no text for a probe, or if nothing can tell the adapter from its base.
    """
    chat_tokenizer = ChatTokenizer.of(tokenizer)
    adapter, base_model = model.adapter(name), model.base_model
    if (positions := free_positions(base_model, 0)) < SHORTEST_CONTEXT:
        raise DataError(f"the model has {positions} positions; a passport needs {SHORTEST_CONTEXT}")
    if held_out is not None:
        texts = _of_samples(held_out, chat_tokenizer, positions)
    elif chat_tokenizer.template is None:
        texts = _written_texts(model, chat_tokenizer, seed)
    else:
        texts = _answered_questions(model, chat_tokenizer, seed)
    if not texts:
        raise DataError(
            f"no text is fit for a probe: it needs {SHORTEST_PROMPT + 1} tokens, at most {PROMPT_LENGTH} of them "
            "before the reply, and messages of plain text"
        )
    computations = _computations(adapter, base_model)
    with torch.no_grad(), evaluating(base_model):
        probes = _probes(texts, computations, chat_tokenizer)
    probes = [probe for probe in probes if probe.tokens]
    if not probes:
        raise DataError("no text is fit for a probe: its likely next tokens are special tokens or parts of characters")
    if not all(math.isfinite(value) for probe in probes for values in probe.logprobs.values() for value in values):
        raise DataError("the model's log-probabilities are not finite: the adapter diverged")
    if all(probe.logprobs[ADAPTER] == probe.logprobs[BASE] for probe in probes):
        raise DataError("the adapter changes no log-probability, so that nothing tells it from its base")
    layers = {path: layer.layer_type for path, layer in list(adapter.low_rank.items())[:FINGERPRINTS]}
    names = dict.fromkeys(variant for probe in probes for variant in probe.logprobs)
    return Passport(
        base_model=Path(base_model_name(base_model) or "").name,  # no folder of this machine
        texts="base" if held_out is None else "held-out",
        variants={
            variant: computations[variant].variant if variant in computations else Variant("prompt")
            for variant in names
        },
        probes=probes,
        base=fingerprint(base_model, layers),
    )


# ---- Texts


@dataclass(frozen=True, eq=False)
class ProbeText:
    """Token ids, with BOS if the tokenizer writes one. Probes end at token `first` or later.

    messages, rendered: of a chat, up to the reply, and what the template makes of them.
    """

    ids: tuple[int, ...]
    first: int
    messages: Messages | None = None
    rendered: str = ""


def _chat(messages: Messages, reply: Sequence[int], tokenizer: ChatTokenizer) -> ProbeText:
    rendered = tokenizer.render(messages, add_generation_prompt=True)
    prompt = tokenizer.token_ids(rendered)
    return ProbeText((*prompt, *reply[:REPLY_LENGTH]), len(prompt) - 1, messages, rendered)


def _answered_questions(model: Any, tokenizer: ChatTokenizer, seed: int) -> list[ProbeText]:
    """Returns QUESTIONS with replies that the base writes."""
    chats = [_chat([{"role": "user", "content": question}], [], tokenizer) for question in QUESTIONS]
    length, pad = max(len(chat.ids) for chat in chats), tokenizer.eos_id or 0
    ids = torch.tensor([[pad] * (length - len(chat.ids)) + list(chat.ids) for chat in chats], device=model.device)
    mask = torch.tensor([[0] * (length - len(chat.ids)) + [1] * len(chat.ids) for chat in chats], device=model.device)
    with seeded(seed), torch.no_grad(), evaluating(model), model.disable_adapter():
        output = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=0.9,
            max_new_tokens=REPLY_LENGTH,
            pad_token_id=pad,
        )  # (questions, length + reply)
    replies = [_up_to_special(reply, tokenizer) for reply in output[:, length:].tolist()]
    return [replace(chat, ids=(*chat.ids, *reply)) for chat, reply in zip(chats, replies, strict=True)]


def _written_texts(model: Any, tokenizer: ChatTokenizer, seed: int) -> list[ProbeText]:
    """Returns texts that the base writes from its first token on."""
    written = sample_texts(model, tokenizer.tokenizer, count=TEXTS, length=TEXT_LENGTH, seed=seed)
    return _plain_texts([ids[1:] for ids in written], tokenizer)


def _of_samples(samples: Sequence[Sample], tokenizer: ChatTokenizer, positions: int) -> list[ProbeText]:
    """Returns the first samples that are short enough, and whose messages are plain text."""
    texts: list[ProbeText] = []
    for sample in map(_wanted, samples):
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
        text = _chat(chat.messages[:reply], tokenizer.token_ids(chat.messages[reply]["content"]), tokenizer)
        if text.first < min(PROMPT_LENGTH, positions - ROOM):
            texts.append(text)
    return texts


def _wanted(sample: Any) -> Sample:
    """Returns what a sample of any task wants the model to write; of a reply that is not wanted, the reply."""
    match sample:
        case Preference():
            return sample.chosen
        case Feedback():
            return sample.reply
        case Choices():
            return sample.options[sample.answer]
    wanted: Sample = sample
    return wanted


def _plain_texts(texts: Sequence[Sequence[int]], tokenizer: ChatTokenizer) -> list[ProbeText]:
    first = len(tokenizer.bos_ids) + SHORTEST_PROMPT - 1
    rows = [(*tokenizer.bos_ids, *_up_to_special(ids, tokenizer)[:TEXT_LENGTH]) for ids in texts]
    return [ProbeText(row, first) for row in rows if len(row) > first]


def _up_to_special(ids: Sequence[int], tokenizer: ChatTokenizer) -> list[int]:
    end = next((number for number, token in enumerate(ids) if token in tokenizer.special_ids), len(ids))
    return list(ids[:end])


# ---- What may be computed


@dataclass(frozen=True)
class Computation:
    """context: in which the base model, which it yields, computes this variant."""

    variant: Variant
    context: Callable[[], AbstractContextManager[nn.Module]]


def _computations(adapter: Adapter, base_model: nn.Module) -> dict[str, Computation]:
    """Returns name -> what a server may compute, the right one first."""
    ranks = [layer.r for layer in adapter.low_rank.values()]
    root = math.sqrt(max(ranks, default=1))
    scales = sorted({*SCALES, *(round(scale, 4) for scale in (root, 1 / root) if scale != 1)})

    def only(adapter: Adapter | None) -> Callable[[], AbstractContextManager[nn.Module]]:
        return partial(with_only_adapter, base_model, adapter)

    @contextmanager
    def on_rounded_base(adapter: Adapter | None) -> Iterator[nn.Module]:
        with only(adapter)(), rounded_to_4_bits(base_model):
            yield base_model

    return {
        ADAPTER: Computation(Variant("scale"), only(adapter)),
        BASE: Computation(Variant("scale", 0.0), only(None)),
        **{
            f"scale {scale:g}": Computation(Variant("scale", scale), only(with_strength(adapter, scale)))
            for scale in scales
        },
        **{name: Computation(Variant("part"), only(part)) for name, part in _parts(adapter).items()},
        ROUNDED_ADAPTER: Computation(Variant("rounding"), partial(on_rounded_base, adapter)),
        ROUNDED_BASE: Computation(Variant("rounding", 0.0), partial(on_rounded_base, None)),
    }


def _parts(adapter: Adapter) -> dict[str, Adapter]:
    """Returns what is missing -> the adapter without it."""
    half = layer_count(adapter.parts) / 2

    def without(is_missing: Callable[[str], bool]) -> Adapter:
        def kept(parts: Mapping[str, Any]) -> dict[str, Any]:
            return {path: part for path, part in parts.items() if not is_missing(path)}

        return replace(adapter, low_rank=kept(adapter.low_rank), saved=kept(adapter.saved), extras=kept(adapter.extras))

    def index(path: str) -> int:
        number = layer_index(path)
        return -1 if number is None else number

    def of_block(block: str) -> Callable[[str], bool]:
        return lambda path: block_of(path) == block

    blocks = sorted({block_of(path) for path in adapter.low_rank})
    parts = {
        "the lower half of the layers": without(lambda path: 0 <= index(path) < half),
        "the upper half of the layers": without(lambda path: index(path) >= half),
        **{f"the {block} layers": without(of_block(block)) for block in blocks},
        "modules trained in full": replace(adapter, saved={}),
        "biases and token rows": replace(adapter, extras={}),
    }
    whole = len(adapter.parts)
    return {name: part for name, part in parts.items() if 0 < len(part.parts) < whole}


@contextmanager
def rounded_to_4_bits(base_model: nn.Module) -> Iterator[None]:
    """Within the block the base's linear layers compute as with weights in Q4_0; nothing of it changes."""

    def add_rounding(layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        weight = dense_weight(layer)
        weight = weight.T if layer_type_of(layer) is CONV1D else weight  # (out, in)
        return output + F.linear(args[0], (q4_0(weight) - weight).to(args[0].dtype))

    head = getattr(base_model, "get_output_embeddings", lambda: None)()  # servers keep it in more bits
    with ExitStack() as stack:
        for module in base_model.modules():
            if module is not head and layer_type_of(module) in (LINEAR, CONV1D):
                stack.callback(module.register_forward_hook(add_rounding).remove)
        yield


def q4_0(weight: Tensor) -> Tensor:
    """(out, in) -> the same as llama.cpp stores it in Q4_0: GROUP neighbours share a scale, which has 16 bits."""
    padded = F.pad(weight.detach().float(), (0, -weight.shape[1] % GROUP)).view(len(weight), -1, GROUP)
    largest = padded.gather(-1, padded.abs().argmax(-1, keepdim=True))  # with its sign; it becomes -8
    scale = largest / -8
    levels = (padded * torch.where(scale == 0, 0, 1 / scale) + 8.5).floor().clamp(0, 15) - 8
    rounded: Tensor = (levels * scale.half().float()).flatten(1)[:, : weight.shape[1]].to(weight.dtype)
    return rounded


# ---- Probes


def next_logprobs(model: nn.Module, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Tensor:
    """Returns log-probabilities of the token after positions of every row, one below the other: (n, vocabulary).

    rows: token ids.    positions: of each row, the tokens after which it is asked.
    """
    device = next(model.parameters()).device
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)  # (batch, length)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    asked = sorted({position for spots in positions for position in spots})
    index = {position: number for number, position in enumerate(asked)}
    keep = {"logits_to_keep": torch.tensor(asked, device=device)}  # the head computes these alone
    keep = keep if "logits_to_keep" in signature(model.forward).parameters else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits
    logits = logits if keep else logits[:, asked]  # (batch, asked, vocabulary)
    chosen = [logits[number, [index[position] for position in spots]] for number, spots in enumerate(positions)]
    return F.log_softmax(torch.cat(chosen).float(), dim=-1).cpu()


def _chunks(texts: Sequence[ProbeText], vocabulary: int) -> Iterator[Sequence[ProbeText]]:
    """Yields texts whose logits fit in CHUNK."""
    count = max(1, CHUNK // (vocabulary * max((len(text.ids) for text in texts), default=1)))
    yield from (texts[start : start + count] for start in range(0, len(texts), count))


Spot = tuple[ProbeText, int]  # a text, and the position of the token after which it is cut


def _probes(
    texts: Sequence[ProbeText], computations: Mapping[str, Computation], tokenizer: ChatTokenizer
) -> list[Probe]:
    """Returns probes of plain completions where the adapter changes most, controls, and one for each chat."""
    chosen, controls = _spots(texts, computations, tokenizer)
    words = {**chosen, **controls}
    plain: list[Probe] = []
    chats: list[Probe] = []
    for chunk in _chunks(texts, len(tokenizer.tokenizer)):
        rows = [text.ids for text in chunk]
        starts = [(text, text.first) for text in chunk if text.messages]
        spots = sorted(
            {*starts, *(spot for spot in words if spot[0] in chunk)}, key=lambda s: (chunk.index(s[0]), s[1])
        )
        positions = [[position for text, position in spots if text is row] for row in chunk]
        computed = {
            name: partial(_computed, computation, rows, positions) for name, computation in computations.items()
        }
        bos = tokenizer.tokenizer.bos_token_id
        for name, shift in _wrong_bos(tokenizer).items():
            shifted = [[position + shift for position in where] for where in positions]
            moved = [(bos, *row) if shift > 0 else row[-shift:] for row in rows]
            computed[name] = partial(_computed, computations[ADAPTER], moved, shifted)
        likely = dict(zip(spots, _likely_tokens(computed, tokenizer), strict=True))
        plain += [
            Probe(spot[1] + 1, tokens.texts, tokens.logprobs, text=words[spot], is_control=spot in controls)
            for spot, tokens in likely.items()
            if spot in words
        ]
        chats += _chat_probes({text: likely[text, first] for text, first in starts}, computations, tokenizer)
    return plain + chats


def _spots(
    texts: Sequence[ProbeText], computations: Mapping[str, Computation], tokenizer: ChatTokenizer
) -> tuple[dict[Spot, str], dict[Spot, str]]:
    """Returns where the adapter changes most, and where 4 bits change much and it little, with the words so far."""
    effects: list[float] = []
    roundings: list[float] = []
    spots: list[Spot] = []
    for chunk in _chunks(texts, len(tokenizer.tokenizer)):
        rows = [text.ids for text in chunk]
        positions: list[Sequence[int]] = [range(text.first, len(text.ids)) for text in chunk]
        base, adapter, rounded = (
            _computed(computations[name], rows, positions) for name in (BASE, ADAPTER, ROUNDED_ADAPTER)
        )
        special = [token for token in tokenizer.special_ids if token < base.shape[1]]  # the model may lack some
        ends = torch.maximum(*(logprobs[:, special].exp().sum(-1) for logprobs in (base, adapter)))
        of_chunk = [(text, position) for text, where in zip(chunk, positions, strict=True) for position in where]
        kept = (ends < MOST_SPECIAL).nonzero().flatten().tolist()
        effects += _change(base, adapter)[kept].tolist()
        roundings += _change(rounded, adapter)[kept].tolist()
        spots += [of_chunk[number] for number in kept]
    ratios = np.array(effects) / (np.array(roundings) + NOISE_FLOOR)
    chosen = _chosen(spots, np.argsort(-ratios), TEXT_PROBES, {}, tokenizer)
    order = np.argsort((np.array(effects) + NOISE_FLOOR) / roundings)
    return chosen, _chosen(spots, order, CONTROLS, chosen, tokenizer)


def _chosen(
    spots: Sequence[Spot], order: Iterable[int], count: int, taken: Mapping[Spot, str], tokenizer: ChatTokenizer
) -> dict[Spot, str]:
    """Returns the first `count` spots in this order whose words are the same tokens again, with their words.

    taken: spots that are left out.
    """
    chosen: dict[Spot, str] = {}
    for number in order:
        if len(chosen) == count:
            break
        text, position = spots[number]
        if (text, position) in taken or sum(other is text for other, _ in chosen) == MOST_PER_TEXT:
            continue
        words = tokenizer.tokenizer.decode(text.ids[len(tokenizer.bos_ids) : position + 1])
        if list(tokenizer.tokenizer(words, verbose=False)["input_ids"]) == list(text.ids[: position + 1]):
            chosen[text, position] = words
    return chosen


def _wrong_bos(tokenizer: ChatTokenizer) -> dict[str, int]:
    """Returns what is wrong with the beginning of plain prompts -> by how many tokens it moves them."""
    if tokenizer.tokenizer.bos_token_id is None:
        return {}
    return {SECOND_BOS: 1, NO_BOS: -1} if tokenizer.bos_ids else {ADDED_BOS: 1}


def _chat_probes(
    chats: Mapping[ProbeText, "LikelyTokens"], computations: Mapping[str, Computation], tokenizer: ChatTokenizer
) -> list[Probe]:
    """Returns a probe for the first token of the reply in every chat, with the prompts of wrong templates, too."""
    prompts = {text: list(text.ids[: text.first + 1]) for text in chats}
    wrong = {text: _wrong_prompts(text.messages or [], prompt, tokenizer) for text, prompt in prompts.items()}
    logprobs = {text: {name: tokens.logprobs[name] for name in computations} for text, tokens in chats.items()}
    for name in dict.fromkeys(name for of_chat in wrong.values() for name in of_chat):
        rows = [of_chat.get(name, prompts[text]) for text, of_chat in wrong.items()]
        computed = _computed(computations[ADAPTER], rows, [[len(row) - 1] for row in rows])  # (chats, vocabulary)
        for text, row in zip(chats, computed, strict=True):
            logprobs[text][name] = _rounded_logprobs(row, chats[text].ids)
    return [
        Probe(len(prompts[text]), tokens.texts, logprobs[text], messages=text.messages, rendered=text.rendered)
        for text, tokens in chats.items()
    ]


def _wrong_prompts(messages: Messages, prompt: list[int], tokenizer: ChatTokenizer) -> dict[str, list[int]]:
    """Returns what is wrong -> the token ids that a server may make of the messages by mistake."""
    compile_template = partial(tokenizer.tokenizer.apply_chat_template, messages, tokenize=False)
    texts = {name: str(compile_template(chat_template=template)) for name, template in OTHER_TEMPLATES.items()}
    texts["no start of the reply"] = tokenizer.render(messages)
    if messages[0]["role"] != "system":
        system = [{"role": "system", "content": SYSTEM}]
        try:
            texts["a system message"] = tokenizer.render([*system, *messages], add_generation_prompt=True)
            texts["no system message"] = tokenizer.render(
                [{"role": "system", "content": ""}, *messages], add_generation_prompt=True
            )
        except DataError:  # the template allows no system message
            pass
    prompts = {name: tokenizer.token_ids(text) for name, text in texts.items()}
    if (bos := tokenizer.tokenizer.bos_token_id) is not None:
        prompts[SECOND_BOS if prompt[0] == bos else ADDED_BOS] = [bos, *prompt]
        if prompt[0] == bos:
            prompts[NO_BOS] = prompt[1:]
    distinct = {tuple(ids): name for name, ids in reversed(prompts.items()) if ids and ids != prompt}
    return {name: list(ids) for ids, name in reversed(distinct.items())}


def _computed(computation: Computation, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Tensor:
    with computation.context() as base_model:
        return next_logprobs(base_model, rows, positions)


def _change(first: Tensor, second: Tensor) -> Tensor:
    """Returns how far the likely tokens' log-probabilities are apart, in nats: (n, vocabulary) twice -> (n,)."""
    weight = (first.exp() + second.exp()) / 2
    return (weight * (first - second).clamp(-10, 10).square()).sum(-1).sqrt()


TOKENS_OF = (ADAPTER, BASE, "scale 0.5", "scale 2", "scale 4")


@dataclass(frozen=True)
class LikelyTokens:
    """After a prompt. logprobs: variant -> log-probabilities of the tokens."""

    ids: list[int]
    texts: list[str]
    logprobs: dict[str, list[float]]


def _likely_tokens(computed: Mapping[str, Callable[[], Tensor]], tokenizer: ChatTokenizer) -> list[LikelyTokens]:
    """Returns the likely tokens of every probe.

    computed: variant -> what computes its log-probabilities, (n, vocabulary).
    """
    first = {name: computed[name]() for name in TOKENS_OF}
    top = torch.cat([logprobs.topk(LIKELY).indices for logprobs in first.values()], dim=1)  # (n, k)
    weights = first[ADAPTER].exp() + first[BASE].exp()
    result: list[LikelyTokens] = []
    for candidates, weight in zip(top.tolist(), weights, strict=True):
        by_text: dict[str, int] = {}
        for token in sorted({*candidates} - tokenizer.special_ids, key=lambda token: -float(weight[token])):
            text = tokenizer.tokenizer.decode([token])
            if text and "\ufffd" not in text:  # a part of a character, which servers write in different ways
                by_text.setdefault(text, token)
        result.append(LikelyTokens(list(by_text.values()), list(by_text), {}))
    for name, compute in computed.items():
        for tokens, row in zip(result, first[name] if name in first else compute(), strict=True):
            tokens.logprobs[name] = _rounded_logprobs(row, tokens.ids)
    return result


def _rounded_logprobs(row: Tensor, ids: Sequence[int]) -> list[float]:
    """Returns the log-probabilities of these tokens, for JSON. row: (vocabulary,)."""
    return [round(value, 4) for value in row[list(ids)].clamp_min(-100).tolist()]
