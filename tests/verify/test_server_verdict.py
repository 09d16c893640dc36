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
from verified_server import TOKENIZER, adapted, base_model, running, store_in_q4_0, verdict_of, with_controls

from tailora import LoRAModel
from tailora.verify.passport import (
    ADAPTER,
    BASE,
    NOISE_FLOOR,
    REQUIRED,
    ROUNDED_ADAPTER,
    ROUNDED_BASE,
    Passport,
    Probe,
    read_passport,
)
from tailora.verify.probes import make_passport, next_logprobs
from tailora.verify.server_client import ServerClient
from tailora.verify.server_verdict import STEP, Observation, _verdict_of, fit_variants, scale_name, verify

root, url = verified_server.root, verified_server.url  # the fixtures

FAULTS: dict[str, tuple[str, float | None, str]] = {  # verdict, scale, the best variant
    "legal": ("adapter", 1.0, ADAPTER),
    "tiny": ("base", 0.0, BASE),
    "legal@2": ("scaled", 2.0, "scale 2"),
    "legal@0.5": ("scaled", 0.5, "scale 0.5"),
    "legal@3": ("scaled", None, ""),  # between two scales of the passport, 2 and 4
    "upper": ("other", None, "the lower half of the layers"),
    "mlp": ("other", None, "the attention layers"),
    "other": ("other", None, ""),
}


@pytest.mark.parametrize("model", FAULTS)
def test_what_a_server_computes_is_found(url: str, root: Path, model: str) -> None:
    verdict, scale, best = FAULTS[model]
    result = verdict_of(url, read_passport(root / "legal"), model)
    assert result.verdict == verdict, "\n".join(result.evidence)
    fit = result.fits["text"]
    if model == "legal@3":
        assert fit.interval[0] <= 3 <= fit.interval[1]
        assert result.scale == result.fits["all"].scale
    else:
        assert result.scale == (None if scale is None else pytest.approx(scale, abs=STEP / 2))
    if best:
        assert fit.best == best
    if verdict == "other" and best:
        assert f"the adapter without {best}" in result.evidence[0]


def test_an_adapter_that_changes_little_may_differ_by_what_16_bits_change(root: Path) -> None:
    passport = read_passport(root / "legal")

    def smaller(probe: Probe) -> Probe:
        logprobs = {
            name: [base + 0.02 * (value - base) for value, base in zip(values, probe.logprobs[BASE], strict=True)]
            for name, values in probe.logprobs.items()
        }
        return replace(probe, logprobs=logprobs)

    passport = replace(passport, probes=[smaller(probe) for probe in passport.probes])
    answers = answers_of(passport, lambda _: ADAPTER)
    rounded = [
        replace(answer, logprobs={token: value + 0.02 * (-1) ** token for token, value in answer.logprobs.items()})
        for answer in answers
    ]
    result = verify(passport, rounded, answers_of(passport, lambda _: BASE))
    assert result.verdict == "adapter", "\n".join(result.evidence)
    fit = result.fits["text"]
    assert 0.2 * fit.effect < fit.errors[ADAPTER] < NOISE_FLOOR


TEMPLATES = {
    "no start of the reply": TOKENIZER.chat_template.replace("{% if add_generation_prompt %}", "{% if false %}"),
    "Alpaca": "### Instruction:\n{{ messages[0]['content'] }}\n\n### Response:\n",
    "a second BOS": "<|im_start|>" + TOKENIZER.chat_template,
    "a system message": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + TOKENIZER.chat_template,
}


@pytest.mark.parametrize(
    "wrong",
    [
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("Alpaca", "a system message", "a second BOS")),
        "no start of the reply",
        "something else",
    ],
)
def test_a_wrong_template_is_found(root: Path, wrong: str) -> None:
    template = TEMPLATES.get(wrong, "Human: {{ messages[0]['content'] }} Bot:")
    with running(root, template=template) as url:
        result = verdict_of(url, read_passport(root / "legal"), "legal")
    assert result.verdict == "other", "\n".join(result.evidence)
    assert result.fits["text"].best == ADAPTER
    if wrong in ("no start of the reply", "a second BOS"):
        assert result.fits["chat"].best == wrong
        assert f"the adapter with a different prompt: {wrong}" in result.evidence[1]
    assert any("tokens from those used in training" in sentence for sentence in result.evidence)


def test_longer_prompts_are_written_in_another_way(url: str, root: Path) -> None:
    """Also where a second BOS changes no more than rounding does. Some servers do not count cached tokens."""
    passport = read_passport(root / "legal")
    with ServerClient(url) as server:
        answers = server.ask(passport.probes, "legal")
    for more, verdict in ((1, "other"), (0, "adapter"), (-3, "adapter")):
        for of_chats in (True, False):
            counted = [
                answer
                and replace(answer, prompt_tokens=probe.prompt_tokens + more * ((probe.text is None) is of_chats))
                for probe, answer in zip(passport.probes, answers, strict=True)
            ]
            assert verify(passport, counted).verdict == verdict, (more, of_chats)


def answers_of(passport: Passport, variant: Callable[[Probe], str], *, has_logprobs: bool = True) -> list[Observation]:
    """Returns what a server answers that computes this variant of each probe."""
    answers = []
    for probe in passport.probes:
        logprobs = probe.logprobs[variant(probe)]
        chosen = max(range(len(logprobs)), key=logprobs.__getitem__)
        answers.append(Observation(chosen, dict(enumerate(logprobs)) if has_logprobs else {}))
    return answers


def test_errors_are_weighted_by_the_probabilities_of_the_adapter_and_the_base() -> None:
    """Of the tokens within a probe, and of the probes; a token that is not listed is only wrong above the bound."""
    adapter, base = np.log([[0.5, 0.3, 0.1], [0.2, 0.02, 0.01]]), np.log([[0.1, 0.6, 0.2], [0.1, 0.04, 0.03]])
    probes = [
        Probe(3, ["a", "b", "c"], {ADAPTER: a, BASE: b, ROUNDED_ADAPTER: a, ROUNDED_BASE: b}, text="x")
        for a, b in zip(adapter.tolist(), base.tolist(), strict=True)
    ] * 3
    answers = [Observation(0, {0: -1.0, 1: -2.0}, bound=-2.5)] * 6
    weights = (np.exp(adapter) + np.exp(base)) / 2
    fit = fit_variants(list(zip(probes, answers, strict=True)), REQUIRED)
    assert fit is not None
    for name, values in ((ADAPTER, adapter), (BASE, base)):
        off = np.stack([values[:, 0] + 1, values[:, 1] + 2, np.maximum(values[:, 2] + 2.5, 0)], 1)
        assert fit.errors[name] == pytest.approx(np.sqrt((weights * off**2).sum() / weights.sum()))


def test_what_a_server_changes_at_the_controls_is_no_scale(root: Path) -> None:
    passport = with_controls(read_passport(root / "legal"), 20)
    answers = answers_of(passport, lambda probe: "scale 1.25" if probe.is_control else ADAPTER)
    result = verify(passport, answers)
    assert result.verdict == "adapter"
    assert result.fits["all"].probes == len(passport.probes) - 20
    assert result.fits["all"].scale == 1


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_single_longer_prompt_is_no_other_template(root: Path, kind: str) -> None:
    passport = read_passport(root / "legal")
    answers = answers_of(passport, lambda _: ADAPTER)
    of_kind = [number for number, probe in enumerate(passport.probes) if (probe.text is None) == (kind == "chat")]
    counts = {number: passport.probes[number].prompt_tokens for number in of_kind}
    for more, verdict in (({of_kind[0]: 1}, "adapter"), (dict.fromkeys(of_kind, 1), "other")):
        counted = [
            replace(answer, prompt_tokens=counts[number] + more.get(number, 0)) if number in counts else answer
            for number, answer in enumerate(answers)
        ]
        assert verify(passport, counted).verdict == verdict


@pytest.mark.parametrize("has_logprobs", [True, False])
def test_right_chats_do_not_excuse_wrong_plain_completions(root: Path, has_logprobs: bool) -> None:
    passport = read_passport(root / "legal")
    answers = answers_of(passport, lambda _: ADAPTER, has_logprobs=has_logprobs)
    for number, probe in enumerate(passport.probes):
        if probe.text is not None:
            likeliest_last = sorted(range(len(probe.tokens)), key=probe.logprobs[ADAPTER].__getitem__)
            listed = {token: -0.5 * place for place, token in enumerate(likeliest_last)}
            answers[number] = Observation(likeliest_last[0], listed if has_logprobs else {})
    assert verify(passport, answers).verdict == "other"


def test_a_server_that_lists_other_tokens_than_the_passport_differs_from_it(root: Path) -> None:
    """llama-server with a template that ignores the messages: its likeliest tokens are none of the chats' tokens."""
    passport = read_passport(root / "legal")
    answers = answers_of(passport, lambda _: ADAPTER)
    for number, probe in enumerate(passport.probes):
        if probe.text is None:
            answers[number] = Observation(None, {}, bound=-9.0)
    result = verify(passport, answers)
    assert result.verdict == "other", "\n".join(result.evidence)
    assert result.fits["chat"].has_logprobs


def test_few_answers_of_each_kind_are_compared_together(root: Path) -> None:
    passport = read_passport(root / "legal")
    texts = [number for number, probe in enumerate(passport.probes) if probe.text is not None and not probe.is_control]
    chats = [number for number, probe in enumerate(passport.probes) if probe.text is None]
    kept = {*texts[:5], *chats[:5]}
    answers = [answer if number in kept else None for number, answer in enumerate(answers_of(passport, lambda _: BASE))]
    result = verify(passport, answers)
    assert result.verdict == "base"
    assert result.fits.keys() == {"all"}


@pytest.mark.parametrize("bound", [-9.0, None])
def test_answers_without_a_token_of_the_passport_show_nothing(root: Path, bound: float | None) -> None:
    passport = read_passport(root / "legal")
    result = verify(passport, [Observation(None, {}, bound)] * len(passport.probes))
    assert result.verdict == "unknown"
    assert "cannot be compared" in result.evidence[-1]


def test_answers_that_are_mostly_about_other_tokens_show_nothing(root: Path) -> None:
    """Also if what they say of the known tokens is right."""
    passport = read_passport(root / "legal")
    answers = answers_of(passport, lambda _: ADAPTER)

    def share(known: float) -> list[Observation]:
        probabilities = [sum(map(math.exp, answer.logprobs.values())) for answer in answers]
        pairs = zip(answers, probabilities, strict=True)
        return [replace(answer, unknown=probability * (1 / known - 1)) for answer, probability in pairs]

    assert verify(passport, share(0.11)).verdict == "adapter"
    assert verify(passport, share(0.09)).verdict == "unknown"


def test_without_log_probabilities_the_chosen_tokens_decide(url: str, root: Path) -> None:
    passport = read_passport(root / "legal")

    def silent(observations: list[Observation | None]) -> list[Observation]:
        return [Observation(answer.chosen) for answer in observations if answer is not None]

    with ServerClient(url) as server:
        for name, verdict in {"legal": "adapter", "tiny": "base"}.items():
            result = verify(passport, silent(server.ask(passport.probes, name)))
            assert result.verdict == verdict, "\n".join(result.evidence)
            assert not result.fits["text"].has_logprobs


def test_without_log_probabilities_a_scale_that_may_be_right_cannot_be_told(root: Path) -> None:
    """An older file of the run in `transformers serve`: the best scale is off, and its wide interval includes 1."""
    passport = read_passport(root / "legal")

    def variant(probe: Probe) -> str:
        return "scale 0.75" if probe.prompt_tokens % 3 else ADAPTER

    result = verify(passport, answers_of(passport, variant, has_logprobs=False))
    assert result.fits["text"].scale < 0.9 <= result.fits["text"].interval[1]
    assert result.verdict == "unknown"


def test_only_errors_that_rounding_explains_are_of_the_adapter_or_the_base(root: Path) -> None:
    fit = verify(passport := read_passport(root / "legal"), answers_of(passport, lambda _: ADAPTER)).fits["all"]
    cases = {  # interval, error of the variant that it contains -> verdict
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
            fit, best=scale_name(scale), scale=scale, interval=interval, effect=1.0, rounding=0.1,
            errors={ADAPTER: error, BASE: error, scale_name(scale): error},
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
def test_a_base_in_q4_0_is_taken_into_account(root: Path, strength: float, verdict: str) -> None:
    """The weights in Q4_0 come from gguf, not from tailora."""
    model = adapted(0, store_in_q4_0(base_model()))
    passport = with_controls(read_passport(root / "legal"), 10)
    answers, of_base = (answers_of_model(passport, model, scale) for scale in (strength, 0.0))
    result = verify(passport, answers)
    without_controls = verify(with_controls(passport, 0), answers, of_base)
    assert result.verdict == without_controls.verdict == verdict, "\n".join(result.evidence)
    assert result.scale == pytest.approx(strength, abs=0.05)
    if strength in (0, 1):  # between them Q4_0 changes something in between, more or less
        fits = [*result.fits.values(), *without_controls.fits.values()]
        assert all(min(fit.errors.values()) < 1e-3 for fit in fits)  # the passport has four decimals


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
    """The passport has only two controls, as those of tiny models have."""

    def base(seed: int) -> LlamaForCausalLM:
        return base_model(seed, intermediate_size=64)

    passport = make_passport(adapted(2, base(2)), TOKENIZER)
    server = computes(base)
    answers, of_base = (answers_of_model(passport, server, scale) for scale in (1.0, 0.0))
    result = verify(passport, answers, of_base)
    assert result.verdict == verdict, "\n".join(result.evidence)
