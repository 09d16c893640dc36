"""The verdict on a server: which variant explains its answers best, and does it explain them well enough?

A server answers a probe with the log-probabilities of its most likely next tokens, or only with the most likely token.
The error of a variant is the root mean square of the differences between its log-probabilities and the server's, in
nats. Scales between those in the verification file are interpolated. Resampling the probes gives a scale's uncertainty.

A correct server differs from the file by its rounding. Its size can be seen at the controls, prompts where the adapter
changes little, or in the answers of the server's base. The unit is the effect of weights in Q4_0, which the file
contains for every prompt. Answers are also compared with variants on a Q4_0 base, so a server in Q4_0 matches closely.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tailora.verify.passport import ADAPTER, BASE, NOISE_FLOOR, ROUNDED_ADAPTER, ROUNDED_BASE, Passport, Probe, Variant

Floats = NDArray[np.float64]
Verdict = Literal["adapter", "base", "scaled", "other", "unknown"]

SHARE = 0.5  # of the distance between adapter and base: an answer that is farther from both is neither
ROUNDING = 1.5  # times the effect of Q4_0: a server in 4 bits may differ by this much (measured)
MARGIN = 5.0  # times the rounding of the base's answers or at the controls: the most at other prompts (measured)
LEAST = 0.1  # of the distance between adapter and base: smaller errors are rounding, too
SAME_SCALE = 0.1  # rounding moves all probes together, so a scale is not known more exactly
CONFIDENCE, RESAMPLES = 0.95, 400  # of the interval of the scale
FEWEST = 6  # probes for a verdict
LEAST_KNOWN = 0.1  # share of the listed probability that must be on tokens of the file
LARGEST = 6.0  # nats; larger errors are clipped, so that one token does not outweigh all others
STEP = 0.05  # between candidate scales


@dataclass(frozen=True)
class Observation:
    """A server's answer to a probe.

    chosen: index of the most likely token in the probe's tokens; None if it is none of them.
    logprobs: index of token -> log-probability, for the probe's tokens that the server lists.
    bound: tokens that are not in `logprobs` have at most this log-probability; None if unknown.
    prompt_tokens: counted by the server; None if it does not.
    unknown: probability of the listed tokens that are not the probe's, except for parts of characters.
    """

    chosen: int | None
    logprobs: Mapping[int, float] = field(default_factory=dict)
    bound: float | None = None
    prompt_tokens: int | None = None
    unknown: float = 0.0

    @property
    def known_share(self) -> float:
        """The share of the listed probability, or of the chosen token, that is on the probe's tokens."""
        if not self.logprobs:
            return float(self.chosen is not None)
        known = sum(map(math.exp, self.logprobs.values()))
        return known / max(known + self.unknown, 1e-12)

    @property
    def has_logprobs(self) -> bool:
        """True if the server returned log-probabilities, even if none is of the probe's tokens."""
        return bool(self.logprobs) or self.bound is not None


@dataclass(frozen=True)
class Fit:
    """How well each variant explains the answers to some of the probes.

    best: the variant with the smallest error, if it remains the best in resamples of the probes; else the best scale.
    scale, interval: the best scale with its 95% interval, whatever `best` is.
    errors: of each variant, in nats; includes scales between those in the verification file.
    effect: distance between the adapter and the base at these probes.
    rounding: distance between the adapter on a Q4_0 base and the adapter.
    probes: their number.    has_logprobs: the server returned log-probabilities.
    """

    best: str
    scale: float
    interval: tuple[float, float]
    errors: dict[str, float]
    effect: float
    rounding: float
    probes: int
    has_logprobs: bool

    @property
    def is_scale(self) -> bool:
        """True if the best variant is the complete adapter at some scale, with the right prompt."""
        return self.best == scale_name(self.scale)


def scale_name(scale: float) -> str:
    """Returns the name of the variant that is the adapter at this scale."""
    return {0.0: BASE, 1.0: ADAPTER}.get(scale, f"scale {scale:g}")


# ---- Comparing the answers with the variants

Pairs = Sequence[tuple[Probe, Observation]]  # of probes with their answers


def fit_variants(pairs: Pairs, variants: Mapping[str, Variant]) -> Fit | None:
    """Returns how well each variant explains these answers; None for too few probes.

    Probes without log-probabilities are ignored if the server returned any. The server's base is assumed to be exact or
    in Q4_0, whichever explains the answers better.
    """
    if any(answer.has_logprobs for _, answer in pairs):
        pairs = [(probe, answer) for probe, answer in pairs if answer.has_logprobs]
    if len(pairs) < FEWEST:
        return None
    fits = [_fit(pairs, variants, on_q4_0=on_q4_0) for on_q4_0 in (False, True)]
    return min(fits, key=lambda fit: min(fit.errors.values()))


def _fit(pairs: Pairs, variants: Mapping[str, Variant], *, on_q4_0: bool) -> Fit:
    """Compares the answers with the variants that all probes have, and with scales between those in the file.

    on_q4_0: add the effect of Q4_0 to each. It is known for the adapter and the base, and interpolated for scales
    between 0 and 1.
    """
    variants = {
        name: variant
        for name, variant in variants.items()
        if variant.kind != "rounding" and all(name in probe.logprobs for probe, _ in pairs)
    }
    nodes = sorted((variant.scale, name) for name, variant in variants.items() if variant.kind == "scale")
    known = np.array([scale for scale, _ in nodes])
    between = np.setdiff1d(np.round(np.arange(0, known[-1] + STEP / 2, STEP), 6), known)
    names = [*variants, *map(scale_name, between)]
    is_scale = np.array([name not in variants or variants[name].kind == "scale" for name in names])
    scales = np.array([*(variant.scale for variant in variants.values()), *between])
    like_adapter = scales.clip(0, 1)[:, None]  # (candidates, 1)
    squares, weights = np.zeros((len(names), len(pairs))), np.zeros(len(pairs))
    for number, (probe, observation) in enumerate(pairs):
        at_nodes = np.array([probe.logprobs[name] for _, name in nodes])  # (nodes, tokens)
        interpolated = [np.interp(between, known, column) for column in at_nodes.T]
        predicted = np.concatenate([[probe.logprobs[name] for name in variants], np.array(interpolated).T])
        if on_q4_0:
            of_adapter = np.subtract(probe.logprobs[ROUNDED_ADAPTER], probe.logprobs[ADAPTER])
            of_base = np.subtract(probe.logprobs[ROUNDED_BASE], probe.logprobs[BASE])
            predicted += like_adapter * of_adapter + (1 - like_adapter) * of_base
        squares[:, number], weights[number] = _squared_errors(probe, observation, predicted)

    drawn = np.random.default_rng(0).multinomial(len(pairs), [1 / len(pairs)] * len(pairs), RESAMPLES)
    counts = np.concatenate([np.ones((1, len(pairs))), drawn]) * weights  # the answers, original and resampled
    means = (counts @ squares.T) / np.maximum(counts.sum(-1, keepdims=True), 1e-12)
    errors, resampled = np.sqrt(means[0]), np.sqrt(means[1:])  # (candidates,), (resamples, candidates)
    scale = float(scales[is_scale][errors[is_scale].argmin()])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(scales[is_scale][resampled[:, is_scale].argmin(1)], [tail, 1 - tail])
    best = int(errors.argmin())
    is_certain = (resampled[:, best] < resampled[:, is_scale].min(1)).mean() >= CONFIDENCE
    return Fit(
        best=names[best] if is_certain and not is_scale[best] else scale_name(scale),
        scale=scale,
        interval=(round(float(low), 6), round(float(high), 6)),
        errors=dict(zip(names, errors.tolist(), strict=True)),
        effect=_distance(pairs, ADAPTER, BASE),
        rounding=_distance(pairs, ADAPTER, ROUNDED_ADAPTER),
        probes=len(pairs),
        has_logprobs=pairs[0][1].has_logprobs,
    )


def _squared_errors(probe: Probe, observation: Observation, predicted: Floats) -> tuple[Floats, float]:
    """Returns the mean squared errors of predictions (n, tokens) at a probe, (n,), and the weight of the probe."""
    if not observation.has_logprobs:  # compare how much more likely the most likely token is than the server's choice
        chosen = np.log(np.maximum(1 - np.exp(predicted).sum(1), 1e-6))  # at most, if it is not in the file
        if observation.chosen is not None:
            chosen = predicted[:, observation.chosen]
        return np.clip(predicted.max(1) - chosen, 0, LARGEST) ** 2, 1.0
    weights = np.exp(np.array([probe.logprobs[ADAPTER], probe.logprobs[BASE]])).mean(0)  # (tokens,)
    differences = np.zeros_like(predicted)
    for token in range(predicted.shape[1]):
        if token in observation.logprobs:
            differences[:, token] = predicted[:, token] - observation.logprobs[token]
        elif observation.bound is not None:  # not in the server's list, so less likely than all in it
            differences[:, token] = np.maximum(predicted[:, token] - observation.bound, 0)
    differences = np.clip(differences, -LARGEST, LARGEST)
    total = float(weights.sum())
    return (differences**2 @ weights) / max(total, 1e-12), total


def _distance(pairs: Pairs, expected: str, computed: str) -> float:
    """Returns the error of `expected` if a server used `computed` and returned the same number of tokens."""
    squares, weights = [], []
    for probe, observation in pairs:
        other = np.array(probe.logprobs[computed])
        count = max(len(observation.logprobs), 1) if observation.has_logprobs else 0
        listed = {int(token): float(other[token]) for token in np.argsort(-other)[:count]}
        seen = Observation(int(other.argmax()), listed, min(listed.values(), default=None))
        square, weight = _squared_errors(probe, seen, np.array([probe.logprobs[expected]]))
        squares.append(float(square[0]))
        weights.append(weight)
    return float(np.sqrt(np.dot(squares, weights) / max(sum(weights), 1e-12)))


# ---- The verdict


@dataclass(frozen=True)
class Verification:
    """verdict, the scale (None for "other" and "unknown"), and the evidence in sentences.

    fits: "text", "chat" and "all" prompts, and "base" for those that were sent to the server's base.
    """

    verdict: Verdict
    scale: float | None
    evidence: list[str]
    fits: dict[str, Fit]


def verify(
    passport: Passport, observations: Sequence[Observation | None], of_base: Sequence[Observation | None] | None = None
) -> Verification:
    """Returns the verdict from the answers to the probes. of_base: those under the name of its base, if it has one."""
    kinds = _by_kind(passport, observations)
    fits = _fits(kinds, passport.variants)
    if of_base is not None:
        fits_of_base = _fits(_by_kind(passport, of_base), passport.variants)
        if fit := fits_of_base.get("text") or fits_of_base.get("chat"):
            fits["base"] = fit
    verdict: Verdict = "unknown"
    if "all" in fits and _is_comparable(kinds["all"]):
        verdict = _combined(fits, [_extra_tokens(kinds[name]) for name in ("text", "chat")])
    scale = fits["all"].scale if verdict in ("adapter", "base", "scaled") else None
    return Verification(verdict, scale, _evidence(kinds, fits, passport.variants), fits)


def _fits(kinds: Mapping[str, Pairs], variants: Mapping[str, Variant]) -> dict[str, Fit]:
    return {name: fit for name, pairs in kinds.items() if (fit := fit_variants(pairs, variants)) is not None}


def _combined(fits: Mapping[str, Fit], extra_tokens: Sequence[Sequence[int]]) -> Verdict:
    """Returns the verdict on all answers, if it also explains plain texts and chats separately.

    extra_tokens: for each of the two, how many more tokens than in training the server counts in its prompts.
    """
    whole, parts = fits["all"], [fits[name] for name in ("text", "chat") if name in fits]
    rounding = ROUNDING  # how much the server may round, in units of the effect of Q4_0
    known = fits.get("base") or fits.get("controls")  # where its errors are only rounding
    if known is not None and known.has_logprobs:
        error = min(known.errors[ADAPTER], known.errors[BASE])
        rounding = min(ROUNDING, MARGIN * error / max(known.rounding, 1e-12))
    verdict = _verdict_of(whole, rounding)
    if verdict == "unknown":
        return verdict
    explanation, allowed = {"adapter": (ADAPTER, rounding), "base": (BASE, rounding)}.get(
        verdict,
        (scale_name(whole.scale), ROUNDING),  # scales between those in the file are less exact
    )
    if any(not fit.is_scale or fit.errors[explanation] > _noise(fit, allowed) for fit in parts):
        return "other"
    if any(not fit.has_logprobs and _verdict_of(fit, rounding) == "unknown" for fit in parts):
        return "unknown"
    if verdict != "adapter":
        is_base = "base" not in fits or _verdict_of(fits["base"], ROUNDING) in ("base", "unknown")
        return verdict if is_base else "other"
    is_off = all(fit.interval[1] < 1 for fit in parts) or all(fit.interval[0] > 1 for fit in parts)
    if len(parts) == 2 and is_off and _verdict_of(parts[1], rounding) == "scaled":  # two kinds of prompts agree
        return "scaled"
    # A server that does not count cached tokens counts fewer
    return "other" if any(extra and min(extra) > 0 for extra in extra_tokens) else "adapter"


def _noise(fit: Fit, rounding: float) -> float:
    """Returns the error that rounding may cause in the right variant."""
    if not fit.has_logprobs:  # a change of the most likely token is a large error or none, so little is known
        return SHARE * fit.effect
    return max(rounding * fit.rounding, LEAST * fit.effect, NOISE_FLOOR)


def _verdict_of(fit: Fit, rounding: float) -> Verdict:
    """Returns the verdict on these answers alone."""
    low, high = fit.interval
    scale = scale_name(fit.scale)
    if not fit.is_scale:
        return "other"
    if low - SAME_SCALE <= 1 <= high + SAME_SCALE and fit.errors[ADAPTER] <= _noise(fit, rounding):
        limit = (SHARE if fit.has_logprobs else LEAST) * fit.effect
        is_wide = high - low > 1 - 2 * SAME_SCALE  # it may reach from the base to the adapter
        return "unknown" if is_wide or fit.errors[ADAPTER] > limit else "adapter"
    if low <= SAME_SCALE and fit.errors[BASE] <= _noise(fit, rounding):
        return "base" if fit.errors[BASE] <= SHARE * fit.effect else "unknown"
    if low <= 1 <= high or low == 0 or fit.errors[scale] > _noise(fit, ROUNDING):
        return "other"
    return "scaled" if fit.errors[scale] <= SHARE * fit.effect else "unknown"


def _by_kind(passport: Passport, observations: Sequence[Observation | None]) -> dict[str, Pairs]:
    """Returns kind of prompt -> the probes that the server answered, and its answers."""
    answered = zip(passport.probes, observations, strict=True)
    pairs = [(probe, answer) for probe, answer in answered if answer is not None]
    text, chat, controls = (
        [pair for pair in pairs if (pair[0].text is None, pair[0].is_control) == kind]
        for kind in ((False, False), (True, False), (False, True))
    )
    return {"text": text, "chat": chat, "all": [*text, *chat], "controls": controls}


def _is_comparable(pairs: Pairs) -> bool:
    """Returns True if at least LEAST_KNOWN of the listed probability is on tokens of the probes."""
    return sum(answer.known_share for _, answer in pairs) >= LEAST_KNOWN * len(pairs)


def _extra_tokens(pairs: Pairs) -> list[int]:
    """Returns how many more tokens than in training the server counts in each prompt."""
    return [answer.prompt_tokens - probe.prompt_tokens for probe, answer in pairs if answer.prompt_tokens is not None]


# ---- The evidence, in sentences

KIND_NAMES = {"text": "Plain completions", "chat": "Chats", "all": "All", "base": "The base under its own name"}
SHOWN = 3  # explanations


def _evidence(kinds: Mapping[str, Pairs], fits: Mapping[str, Fit], variants: Mapping[str, Variant]) -> list[str]:
    evidence = [_comparison(name, fits[key], variants) for key, name in KIND_NAMES.items() if key in fits]
    for name in ("text", "chat"):
        if any(extra := _extra_tokens(kinds[name])):
            low, high = min(extra), max(extra)
            amount = f"{low:+d}" if low == high else f"{low:+d} to {high:+d}"
            differ = f"the server's prompts differ by {amount} tokens from those used in training"
            evidence.append(f"{KIND_NAMES[name]}: {differ}.")
        if name not in fits:
            what = "Plain completions were" if name == "text" else "The chat template was"
            evidence.append(f"{what} not checked: fewer than {FEWEST} answers.")
    if fits and not any(fit.has_logprobs for fit in fits.values()):
        evidence.append(
            "The server returned no log-probabilities, so only its next tokens were compared. This is weaker evidence."
        )
    if not _is_comparable(kinds["all"]):
        evidence.append("Few of the server's tokens are in the verification file, so its answers cannot be compared.")
    return evidence


def _comparison(name: str, fit: Fit, variants: Mapping[str, Variant]) -> str:
    scale = scale_name(fit.scale)
    tried = {scale, BASE, *(name for name in fit.errors if name != ADAPTER and not name.startswith("scale "))}
    nearest = sorted(tried, key=lambda variant: (fit.errors[variant], variant != scale))[:SHOWN]
    low, high = fit.interval
    words = {
        "part": "the adapter without {}",
        "prompt": "the adapter with a different prompt: {}",
        "scale": f"the adapter at scale {fit.scale:.2f} (95% interval {low:.2f} to {high:.2f})",
    }

    def in_words(variant: str) -> str:
        kind = "scale" if variant == scale else variants[variant].kind
        explanation = "the base" if variant == BASE else words[kind].format(variant)
        return f"{explanation}, by {fit.errors[variant]:.2f} nats"

    return (
        f"{name}, {fit.probes} prompts: the answers are closest to {'; '.join(map(in_words, nearest))}. "
        f"For comparison: adapter and base differ by {fit.effect:.2f}, and 4-bit weights change the adapter's answers "
        f"by {fit.rounding:.2f}."
    )
