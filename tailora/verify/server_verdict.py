"""The verdict on a server: at which scale of the adapter are its answers explained best, and well enough?

A server answers a probe with the log-probabilities of its most likely next tokens, or only with the most likely token.
The error of a scale is the root mean square of the differences between its log-probabilities and the server's, in
nats. Scales between those in the verification file are interpolated. Resampling the probes gives a scale's uncertainty.

A correct server differs from the file by its rounding. Its size can be seen in the answers of the server's base. The
unit is the effect of weights in Q4_0, which the file contains for every prompt. Answers are also compared with scales
on a Q4_0 base, so a server in Q4_0 matches closely.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tailora.verify.passport import ADAPTER, BASE, NOISE_FLOOR, Passport, Probe

Floats = NDArray[np.float64]
Verdict = Literal["adapter", "base", "scaled", "other", "unknown"]

SHARE = 0.5  # of the distance between adapter and base: an answer that is farther from both is neither
ROUNDING = 1.5  # times the effect of Q4_0: a server in 4 bits may differ by this much (measured)
MARGIN = 5.0  # times the rounding of the base's answers: the most for the adapter's (measured)
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

    logprobs: index of token -> log-probability, for the probe's tokens that the server lists.
    """

    chosen: int | None  # index of the most likely token in the probe's tokens; None if it is none of them
    logprobs: Mapping[int, float] = field(default_factory=dict)
    bound: float | None = None  # tokens that are not in `logprobs` have at most this log-probability; None if unknown
    prompt_tokens: int | None = None  # counted by the server; None if it does not
    unknown: float = 0.0  # probability of the listed tokens that are not the probe's, except for parts of characters

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
    """How well each scale explains the answers to some of the probes.

    scale, interval: the best scale, and its 95% interval.
    """

    scale: float
    interval: tuple[float, float]
    errors: dict[float, float]  # scale -> error in nats
    effect: float  # distance between the adapter and the base at these probes
    rounding: float  # distance between the adapter on a Q4_0 base and the adapter
    probes: int
    has_logprobs: bool


@dataclass(frozen=True)
class Verification:
    """The verdict, the scale (None for "other" and "unknown"), and the evidence in sentences."""

    verdict: Verdict
    scale: float | None
    evidence: list[str]
    fits: dict[str, Fit]  # "text", "chat" and "all" prompts, and "base" for those that were sent to the server's base


Pairs = Sequence[tuple[Probe, Observation]]  # of probes with their answers


def verify(
    passport: Passport, observations: Sequence[Observation | None], of_base: Sequence[Observation | None] | None = None
) -> Verification:
    """Returns the verdict from the answers to the probes. of_base: those under the name of its base, if it has one."""
    pairs = _by_kind(passport, observations)
    fits = _fits(pairs)
    if of_base is not None:
        fits_of_base = _fits(_by_kind(passport, of_base))
        if fit := fits_of_base.get("text") or fits_of_base.get("chat"):
            fits["base"] = fit
    verdict: Verdict = "unknown"
    if "all" in fits and _is_comparable(pairs["all"]):
        verdict = _verdict(fits, [_extra_tokens(pairs[kind]) for kind in ("text", "chat")])
    scale = fits["all"].scale if verdict in ("adapter", "base", "scaled") else None
    return Verification(verdict, scale, _evidence(pairs, fits), fits)


def _by_kind(passport: Passport, observations: Sequence[Observation | None]) -> dict[str, Pairs]:
    """Returns kind of prompt -> the probes that the server answered, and its answers."""
    answered = zip(passport.probes, observations, strict=True)
    pairs = [(probe, answer) for probe, answer in answered if answer is not None]
    text = [pair for pair in pairs if pair[0].text is not None]
    return {"text": text, "chat": [pair for pair in pairs if pair[0].text is None], "all": pairs}


def _is_comparable(pairs: Pairs) -> bool:
    """Returns True if at least LEAST_KNOWN of the listed probability is on tokens of the probes."""
    return sum(answer.known_share for _, answer in pairs) >= LEAST_KNOWN * len(pairs)


def _extra_tokens(pairs: Pairs) -> list[int]:
    """Returns how many more tokens than in training the server counts in each prompt."""
    return [answer.prompt_tokens - probe.prompt_tokens for probe, answer in pairs if answer.prompt_tokens is not None]


# ---- Comparing the answers with the scales


def _fits(pairs: Mapping[str, Pairs]) -> dict[str, Fit]:
    return {kind: fit for kind, of_kind in pairs.items() if (fit := fit_scales(of_kind)) is not None}


def fit_scales(pairs: Pairs) -> Fit | None:
    """Returns how well each scale explains these answers; None for too few probes.

    Probes without log-probabilities are ignored if the server returned any. The server's base is assumed to be exact or
    in Q4_0, whichever explains the answers better.
    """
    if any(answer.has_logprobs for _, answer in pairs):
        pairs = [(probe, answer) for probe, answer in pairs if answer.has_logprobs]
    if len(pairs) < FEWEST:
        return None
    return min((_fit(pairs, on_q4_0=on_q4_0) for on_q4_0 in (False, True)), key=lambda fit: fit.errors[fit.scale])


def _fit(pairs: Pairs, *, on_q4_0: bool) -> Fit:
    """on_q4_0: add the effect of Q4_0, which is interpolated for scales between 0 and 1."""
    known = sorted(pairs[0][0].logprobs)
    scales = np.union1d(np.round(np.arange(0, known[-1] + STEP / 2, STEP), 6), known)
    like_adapter = scales.clip(0, 1)[:, None]  # (scales, 1)
    squares, weights = np.zeros((len(scales), len(pairs))), np.zeros(len(pairs))
    for number, (probe, observation) in enumerate(pairs):
        columns = np.array([probe.logprobs[scale] for scale in known]).T  # (tokens, known scales)
        predicted = np.stack([np.interp(scales, known, column) for column in columns], 1)  # (scales, tokens)
        if on_q4_0:
            of_adapter, of_base = (np.subtract(probe.on_q4_0[s], probe.logprobs[s]) for s in (ADAPTER, BASE))
            predicted += like_adapter * of_adapter + (1 - like_adapter) * of_base
        squares[:, number], weights[number] = _squared_errors(probe, observation, predicted)
    drawn = np.random.default_rng(0).multinomial(len(pairs), [1 / len(pairs)] * len(pairs), RESAMPLES)
    counts = np.concatenate([np.ones((1, len(pairs))), drawn]) * weights  # the answers, original and resampled
    means = (counts @ squares.T) / np.maximum(counts.sum(-1, keepdims=True), 1e-12)  # (1 + resamples, scales)
    best = scales[means.argmin(1)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(best[1:], [tail, 1 - tail])
    return Fit(
        scale=float(best[0]),
        interval=(round(float(low), 6), round(float(high), 6)),
        errors=dict(zip(scales.tolist(), np.sqrt(means[0]).tolist(), strict=True)),
        effect=_distance(pairs, [probe.logprobs[BASE] for probe, _ in pairs]),
        rounding=_distance(pairs, [probe.on_q4_0[ADAPTER] for probe, _ in pairs]),
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


def _distance(pairs: Pairs, computed: Sequence[Sequence[float]]) -> float:
    """Returns the adapter's error if a server computed these log-probabilities and returned the same number of them."""
    squares, weights = [], []
    for (probe, observation), logprobs in zip(pairs, computed, strict=True):
        other = np.array(logprobs)
        count = max(len(observation.logprobs), 1) if observation.has_logprobs else 0
        listed = {int(token): float(other[token]) for token in np.argsort(-other)[:count]}
        seen = Observation(int(other.argmax()), listed, min(listed.values(), default=None))
        square, weight = _squared_errors(probe, seen, np.array([probe.logprobs[ADAPTER]]))
        squares.append(float(square[0]))
        weights.append(weight)
    return float(np.sqrt(np.dot(squares, weights) / max(sum(weights), 1e-12)))


# ---- The verdict


def _verdict(fits: Mapping[str, Fit], extra_tokens: Sequence[Sequence[int]]) -> Verdict:
    """Returns the verdict on all answers, if it also explains plain texts and chats separately.

    extra_tokens: for each of the two, how many more tokens than in training the server counts in its prompts.
    """
    whole, parts = fits["all"], [fits[kind] for kind in ("text", "chat") if kind in fits]
    rounding = ROUNDING  # how much the server may round, in units of the effect of Q4_0
    if (base := fits.get("base")) and base.has_logprobs:
        error = min(base.errors[ADAPTER], base.errors[BASE])
        rounding = min(ROUNDING, MARGIN * error / max(base.rounding, 1e-12))
    verdict = _verdict_of(whole, rounding)
    if verdict == "unknown":
        return verdict
    scale, allowed = {"adapter": (ADAPTER, rounding), "base": (BASE, rounding)}.get(
        verdict,
        (whole.scale, ROUNDING),  # scales between those in the file are less exact
    )
    if any(fit.errors[scale] > _noise(fit, allowed) for fit in parts):
        return "other"
    if any(not fit.has_logprobs and _verdict_of(fit, rounding) == "unknown" for fit in parts):
        return "unknown"
    if verdict != "adapter":
        is_base = base is None or _verdict_of(base, ROUNDING) in ("base", "unknown")
        return verdict if is_base else "other"
    is_off = all(fit.interval[1] < 1 for fit in parts) or all(fit.interval[0] > 1 for fit in parts)
    if len(parts) == 2 and is_off and _verdict_of(parts[1], rounding) == "scaled":  # two kinds of prompts agree
        return "scaled"
    # A server that does not count cached tokens counts fewer
    return "other" if any(extra and min(extra) > 0 for extra in extra_tokens) else "adapter"


def _noise(fit: Fit, rounding: float) -> float:
    """Returns the error that rounding may cause at the right scale."""
    if not fit.has_logprobs:  # a change of the most likely token is a large error or none, so little is known
        return SHARE * fit.effect
    return max(rounding * fit.rounding, LEAST * fit.effect, NOISE_FLOOR)


def _verdict_of(fit: Fit, rounding: float) -> Verdict:
    """Returns the verdict on these answers alone."""
    low, high = fit.interval
    if low - SAME_SCALE <= 1 <= high + SAME_SCALE and fit.errors[ADAPTER] <= _noise(fit, rounding):
        limit = (SHARE if fit.has_logprobs else LEAST) * fit.effect
        is_wide = high - low > 1 - 2 * SAME_SCALE  # it may reach from the base to the adapter
        return "unknown" if is_wide or fit.errors[ADAPTER] > limit else "adapter"
    if low <= SAME_SCALE and fit.errors[BASE] <= _noise(fit, rounding):
        return "base" if fit.errors[BASE] <= SHARE * fit.effect else "unknown"
    if low <= 1 <= high or low == 0 or fit.errors[fit.scale] > _noise(fit, ROUNDING):
        return "other"
    return "scaled" if fit.errors[fit.scale] <= SHARE * fit.effect else "unknown"


# ---- The evidence, in sentences

KIND_NAMES = {"text": "Plain completions", "chat": "Chats", "base": "The base under its own name"}


def _evidence(pairs: Mapping[str, Pairs], fits: Mapping[str, Fit]) -> list[str]:
    evidence = [_comparison(name, fits[kind]) for kind, name in KIND_NAMES.items() if kind in fits]
    for kind in ("text", "chat"):
        if any(extra := _extra_tokens(pairs[kind])):
            low, high = min(extra), max(extra)
            amount = f"{low:+d}" if low == high else f"{low:+d} to {high:+d}"
            differ = f"the server's prompts differ by {amount} tokens from those used in training"
            evidence.append(f"{KIND_NAMES[kind]}: {differ}.")
        if kind not in fits:
            what = "Plain completions were" if kind == "text" else "The chat template was"
            evidence.append(f"{what} not checked: fewer than {FEWEST} answers.")
    if fits and not any(fit.has_logprobs for fit in fits.values()):
        evidence.append(
            "The server returned no log-probabilities, so only its next tokens were compared. This is weaker evidence."
        )
    if not _is_comparable(pairs["all"]):
        evidence.append("Few of the server's tokens are in the verification file, so its answers cannot be compared.")
    return evidence


def _comparison(name: str, fit: Fit) -> str:
    low, high = fit.interval
    return (
        f"{name}, {fit.probes} prompts: the answers differ from the adapter's by {fit.errors[ADAPTER]:.2f} nats, from "
        f"the base's by {fit.errors[BASE]:.2f}, and least from the adapter at scale {fit.scale:.2f} (95% interval "
        f"{low:.2f} to {high:.2f}), by {fit.errors[fit.scale]:.2f}. For comparison: adapter and base differ by "
        f"{fit.effect:.2f}, and 4-bit weights change the adapter's answers by {fit.rounding:.2f}."
    )
