"""The verdict on a server: every fault is found, through a real server of ours on loopback."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import verified_server
from transformers import LlamaForCausalLM
from verified_server import TOKENIZER, adapted, base_model, running, store_in_q4_0, verdict_of

from tailora import LoRAModel
from tailora.verify.passport import ADAPTER, BASE, NOISE_FLOOR, Passport, Probe, read_passport
from tailora.verify.probes import make_passport, next_logprobs
from tailora.verify.server_client import ServerClient
from tailora.verify.server_verdict import STEP, Observation, _verdict_of, fit_scales, verify

root, url = verified_server.root, verified_server.url  # the fixtures


@pytest.fixture
def passport(root: Path) -> Passport:
    return read_passport(root / "legal")


FAULTS: dict[str, tuple[str, float | None]] = {  # model of the server -> verdict and scale
    "legal": ("adapter", 1.0),
    "tiny": ("base", 0.0),
    "legal@2": ("scaled", 2.0),
    "legal@0.5": ("scaled", 0.5),
    "legal@3": ("scaled", 3.0),  # between two scales of the file, 2 and 4
    "upper": ("other", None),
    "mlp": ("other", None),
    "other": ("other", None),
}


@pytest.mark.parametrize("model", FAULTS)
def test_what_a_server_computes_is_found(url: str, passport: Passport, model: str) -> None:
    verdict, scale = FAULTS[model]
    result = verdict_of(url, passport, model)
    assert result.verdict == verdict, "\n".join(result.evidence)
    if model == "legal@3":
        assert result.fits["text"].interval[0] <= 3 <= result.fits["text"].interval[1]
    else:
        assert result.scale == (None if scale is None else pytest.approx(scale, abs=STEP / 2))


def test_an_adapter_that_changes_little_may_differ_by_what_16_bits_change(passport: Passport) -> None:
    def smaller(probe: Probe) -> Probe:
        base = probe.logprobs[BASE]
        logprobs = {
            scale: [to + 0.02 * (value - to) for value, to in zip(values, base, strict=True)]
            for scale, values in probe.logprobs.items()
        }
        return replace(probe, logprobs=logprobs, on_q4_0={scale: logprobs[scale] for scale in (BASE, ADAPTER)})

    passport = replace(passport, probes=[smaller(probe) for probe in passport.probes])
    rounded = [
        replace(answer, logprobs={token: value + 0.02 * (-1) ** token for token, value in answer.logprobs.items()})
        for answer in answers_of(passport, ADAPTER)
    ]
    result = verify(passport, rounded, answers_of(passport, BASE))
    assert result.verdict == "adapter", "\n".join(result.evidence)
    fit = result.fits["text"]
    assert 0.1 * fit.effect < fit.errors[ADAPTER] < NOISE_FLOOR


TEMPLATES = {
    "no start of the reply": TOKENIZER.chat_template.replace("{% if add_generation_prompt %}", "{% if false %}"),
    "a second BOS": "<|im_start|>" + TOKENIZER.chat_template,
    "something else": "Human: {{ messages[0]['content'] }} Bot:",
}


@pytest.mark.parametrize("wrong", TEMPLATES)
def test_a_wrong_template_is_found(root: Path, passport: Passport, wrong: str) -> None:
    with running(root, template=TEMPLATES[wrong]) as url:
        result = verdict_of(url, passport, "legal")
    assert result.verdict == "other", "\n".join(result.evidence)
    assert result.fits["text"].scale == ADAPTER
    assert any("tokens from those used in training" in sentence for sentence in result.evidence)


def test_longer_prompts_are_written_in_another_way(url: str, passport: Passport) -> None:
    """Also where a second BOS changes no more than rounding does. Some servers do not count cached tokens."""
    with ServerClient(url) as server:
        answers = server.ask(passport.probes, "legal")
    for of_chats in (True, False):
        of_kind = [number for number, probe in enumerate(passport.probes) if (probe.text is None) is of_chats]
        every = [(dict.fromkeys(of_kind, more), verdict) for more, verdict in ((1, "other"), (-3, "adapter"))]
        for more, verdict in (*every, ({of_kind[0]: 1}, "adapter")):
            counted = [
                answer and replace(answer, prompt_tokens=probe.prompt_tokens + more.get(number, 0))
                for number, (probe, answer) in enumerate(zip(passport.probes, answers, strict=True))
            ]
            assert verify(passport, counted).verdict == verdict, (more, of_chats)


def answers_of(passport: Passport, *scales: float, has_logprobs: bool = True) -> list[Observation]:
    """Returns what a server answers that computes with these scales in turn."""
    answers = []
    for number, probe in enumerate(passport.probes):
        logprobs = probe.logprobs[scales[number % len(scales)]]
        chosen = max(range(len(logprobs)), key=logprobs.__getitem__)
        answers.append(Observation(chosen, dict(enumerate(logprobs)) if has_logprobs else {}))
    return answers


def test_errors_are_weighted_by_the_probabilities_of_the_adapter_and_the_base() -> None:
    """Of the tokens within a probe, and of the probes; a token that is not listed is only wrong above the bound."""
    adapter, base = np.log([[0.5, 0.3, 0.1], [0.2, 0.02, 0.01]]), np.log([[0.1, 0.6, 0.2], [0.1, 0.04, 0.03]])
    probes = [
        Probe(3, ["a", "b", "c"], logprobs, logprobs, text="x")
        for logprobs in ({ADAPTER: a, BASE: b} for a, b in zip(adapter.tolist(), base.tolist(), strict=True))
    ] * 3
    answers = [Observation(0, {0: -1.0, 1: -2.0}, bound=-2.5)] * 6
    weights = (np.exp(adapter) + np.exp(base)) / 2
    fit = fit_scales(list(zip(probes, answers, strict=True)))
    assert fit is not None
    for scale, values in ((ADAPTER, adapter), (BASE, base)):
        off = np.stack([values[:, 0] + 1, values[:, 1] + 2, np.maximum(values[:, 2] + 2.5, 0)], 1)
        assert fit.errors[scale] == pytest.approx(np.sqrt((weights * off**2).sum() / weights.sum()))


@pytest.mark.parametrize("has_logprobs", [True, False])
def test_right_chats_do_not_excuse_wrong_plain_completions(passport: Passport, has_logprobs: bool) -> None:
    answers = answers_of(passport, ADAPTER, has_logprobs=has_logprobs)
    for number, probe in enumerate(passport.probes):
        if probe.text is not None:
            likeliest_last = sorted(range(len(probe.tokens)), key=probe.logprobs[ADAPTER].__getitem__)
            listed = {token: -0.5 * place for place, token in enumerate(likeliest_last)}
            answers[number] = Observation(likeliest_last[0], listed if has_logprobs else {})
    assert verify(passport, answers).verdict == "other"


def test_a_server_that_lists_other_tokens_than_the_file_differs_from_it(passport: Passport) -> None:
    """llama-server with a template that ignores the messages: its likeliest tokens are none of the chats' tokens."""
    answers = answers_of(passport, ADAPTER)
    for number, probe in enumerate(passport.probes):
        if probe.text is None:
            answers[number] = Observation(None, {}, bound=-9.0)
    result = verify(passport, answers)
    assert result.verdict == "other", "\n".join(result.evidence)
    assert result.fits["chat"].has_logprobs


def test_few_answers_of_each_kind_are_compared_together(passport: Passport) -> None:
    answers: list[Observation | None] = [*answers_of(passport, BASE)]
    for is_chat in (True, False):
        of_kind = [number for number, probe in enumerate(passport.probes) if (probe.text is None) is is_chat]
        for number in of_kind[5:]:
            answers[number] = None
    result = verify(passport, answers)
    assert result.verdict == "base"
    assert result.fits.keys() == {"all"}


@pytest.mark.parametrize("bound", [-9.0, None])
def test_answers_without_a_token_of_the_file_show_nothing(passport: Passport, bound: float | None) -> None:
    result = verify(passport, [Observation(None, {}, bound)] * len(passport.probes))
    assert result.verdict == "unknown"
    assert "cannot be compared" in result.evidence[-1]


def test_answers_that_are_mostly_about_other_tokens_show_nothing(passport: Passport) -> None:
    """Also if what they say of the known tokens is right."""
    answers = answers_of(passport, ADAPTER)

    def share(known: float) -> list[Observation]:
        probabilities = [sum(map(math.exp, answer.logprobs.values())) for answer in answers]
        pairs = zip(answers, probabilities, strict=True)
        return [replace(answer, unknown=probability * (1 / known - 1)) for answer, probability in pairs]

    assert verify(passport, share(0.11)).verdict == "adapter"
    assert verify(passport, share(0.09)).verdict == "unknown"


def test_without_log_probabilities_the_chosen_tokens_decide(passport: Passport) -> None:
    for scales, verdict in (((ADAPTER,), "adapter"), ((BASE,), "base"), ((0.75, 0.75, ADAPTER), "unknown")):
        result = verify(passport, answers_of(passport, *scales, has_logprobs=False))
        assert result.verdict == verdict, "\n".join(result.evidence)
        assert not result.fits["text"].has_logprobs


def test_only_errors_that_rounding_explains_are_of_the_adapter_or_the_base(passport: Passport) -> None:
    fit = verify(passport, answers_of(passport, ADAPTER)).fits["all"]
    cases = {  # interval, error of the scale where it begins -> verdict
        ((1.0, 1.0), 0.14): "adapter",
        ((1.0, 1.0), 0.16): "other",
        ((0.0, 0.3), 0.14): "base",
        ((0.0, 0.3), 0.16): "other",
        ((1.2, 1.4), 0.14): "scaled",
        ((1.2, 1.4), 0.16): "other",
        ((0.1, 1.0), 0.14): "unknown",
    }
    for (interval, error), verdict in cases.items():
        scale = interval[0]
        case = replace(
            fit, scale=scale, interval=interval, effect=1.0, rounding=0.1,
            errors={ADAPTER: error, BASE: error, scale: error},
        )  # fmt: skip
        assert _verdict_of(case, rounding=1.5) == verdict, (interval, error)
        # As large as half of the effect: the base or the adapter could have given the same answers
        assert _verdict_of(replace(case, effect=0.2), rounding=1.5) == ("unknown" if error < 0.15 else "other")


def answers_of_model(passport: Passport, model: LoRAModel, strength: float = 1.0) -> list[Observation | None]:
    """Returns what a server answers that computes with this model."""
    model.eval().set_scale("default", strength)
    observations: list[Observation | None] = []
    with torch.no_grad():
        for probe in passport.probes:
            ids = TOKENIZER(probe.text or probe.rendered)["input_ids"]
            (logprobs,) = next_logprobs(model, [ids], [[len(ids) - 1]])
            top = logprobs.topk(20)
            tokens, values = top.indices.tolist(), top.values.tolist()
            words = {TOKENIZER.decode([token]): value for token, value in zip(tokens, values, strict=True)}
            listed = {number: words[text] for number, text in enumerate(probe.tokens) if text in words}
            chosen = max(listed, key=listed.__getitem__, default=None)
            observations.append(Observation(chosen, listed, float(top.values[-1]), len(ids)))
    return observations


@pytest.mark.parametrize(("strength", "verdict"), [(1.0, "adapter"), (0.0, "base"), (0.7, "scaled")])
def test_a_base_in_q4_0_is_taken_into_account(passport: Passport, strength: float, verdict: str) -> None:
    """The weights in Q4_0 come from gguf, not from tailora."""
    model = adapted(0, store_in_q4_0(base_model()))
    answers, of_base = (answers_of_model(passport, model, scale) for scale in (strength, 0.0))
    result = verify(passport, answers, of_base)
    assert verify(passport, answers).verdict == result.verdict == verdict, "\n".join(result.evidence)
    assert result.scale == pytest.approx(strength, abs=0.05)
    if strength in (0, 1):  # between them Q4_0 changes something in between, more or less
        assert all(min(fit.errors.values()) < 1e-3 for fit in result.fits.values())  # the file has four decimals


@pytest.mark.parametrize(
    ("computes", "verdict"),
    [
        (lambda base: adapted(102, base(2)), "other"),
        (lambda base: adapted(2, base(52)), "other"),
        (lambda base: adapted(2, base(2)), "adapter"),
    ],
    ids=["another adapter", "another base", "the same"],
)
def test_the_answers_of_the_base_tell_what_the_answers_alone_do_not(
    computes: Callable[[Callable[[int], LlamaForCausalLM]], LoRAModel], verdict: str
) -> None:
    def base(seed: int) -> LlamaForCausalLM:
        return base_model(seed, intermediate_size=64)

    passport = make_passport(adapted(2, base(2)), TOKENIZER)
    server = computes(base)
    answers, of_base = (answers_of_model(passport, server, scale) for scale in (1.0, 0.0))
    result = verify(passport, answers, of_base)
    assert result.verdict == verdict, "\n".join(result.evidence)
