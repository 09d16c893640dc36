"""The verdict on a server: which variant of the passport explains its answers best.

A server answers a probe with log-probabilities of the likeliest next tokens, or only with the likeliest token. The
error of a variant is how far its log-probabilities are from those, in nats. Scales between those of the passport are
interpolated. Whether two variants can be told apart follows from resampling the probes.

A server whose base is quantised answers otherwise. Prompts where the adapter changes little, the controls, tell how
much, and whether it is what Q4_0 changes; where there are too few, the server's base tells it under its own name. The
passport knows what Q4_0 changes: then that is added to every variant.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tailora.verify.passport import ADAPTER, BASE, NOISE_FLOOR, ROUNDED_ADAPTER, ROUNDED_BASE, Passport, Probe

Floats = NDArray[np.float64]
Verdict = Literal["adapter", "base", "scaled", "partial", "template", "other-base", "other-adapter", "unknown"]

LARGEST = 6.0  # nats; errors above it are wrong in the same way, and one token must not outweigh all others
STEP = 0.05  # between the scales that are tried
RESAMPLES, CONFIDENCE = 400, 0.95
SAME_SCALE = 0.1  # an interval that comes so near to 1, or to 0, includes it: rounding moves all probes together
SHARE = 0.5  # of the adapter's effect: a variant with a larger error does not explain the answers (measured)
CONTROL_BIAS = 2.5  # controls are where 4 bits change much, the others where they change little (measured)
LEAST_SHARE, NOISE = 0.2, 2.0  # the same where the server's rounding is known, of the effect and of the rounding
SHARES_OF_Q4_0 = (0.0, 0.5, 1.0)  # that are tried: how much of Q4_0's change is added to every variant
ROUNDING = 1.5  # times what rounding to 4 bits changes: smaller errors may come from it (measured)
CHAT_ERROR, CHAT_SHARE = 3.0, 0.15  # of the error that plain texts lead to expect, and of the effect: a right template
WIDEST = 1.0  # interval of a scale that says anything
FOREIGN = 2.0  # times the adapter's effect: errors of another base are larger (measured)
FEWEST = 6  # probes


@dataclass(frozen=True)
class Observation:
    """What a server answered to a probe.

    chosen: index of the likeliest token in the probe's tokens; None if it is none of them.
    logprobs: index of token -> log-probability, of those of the probe's tokens that the server lists.
    bound: tokens that are not in `logprobs` have at most this log-probability; None if unknown.
    prompt_tokens: as the server counts them; None if it does not.
    """

    chosen: int | None
    logprobs: Mapping[int, float] = field(default_factory=dict)
    bound: float | None = None
    prompt_tokens: int | None = None

    @property
    def has_logprobs(self) -> bool:
        """True if the server tells log-probabilities, also if they are of other tokens than the probe's."""
        return bool(self.logprobs) or self.bound is not None


@dataclass(frozen=True)
class Fit:
    """What explains the answers to one kind of probes best.

    kind: kind of the best variant, "scale", "part" or "prompt"; "none" if no variant explains the answers.
    name: of the best variant; of a scale, "".
    scale, interval: the best scale with its 95% interval, whatever the kind.
    error: of the best variant, in nats.    adapter_error, base_error: of the adapter as trained and of the base.
    effect: how far the adapter is from the base at these probes.
    rounding: how far 4-bit rounding moves the adapter.
    limit: the adapter or the base with a larger error does not explain the answers.
    noise: the error that the server's own rounding leaves in a right variant; None if it is unknown.
    is_certain: the others of another meaning were worse in 95% of the resamples.
    probes: their number.    has_logprobs: the server told log-probabilities.
    """

    kind: Literal["scale", "part", "prompt", "none"]
    name: str
    scale: float
    interval: tuple[float, float]
    error: float
    adapter_error: float
    base_error: float
    effect: float
    rounding: float
    limit: float
    noise: float | None
    is_certain: bool
    probes: int
    has_logprobs: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Candidates:
    """What is tried: names, kinds and scales, and the squared error of each at every probe, (candidates, probes)."""

    names: list[str]
    kinds: list[str]
    scales: Floats
    squares: Floats
    weights: Floats  # (probes,)

    def errors(self, counts: Floats | None = None) -> Floats:
        """Returns root mean squares, (candidates,); with counts (resamples, probes) of each resample, too."""
        weights = self.weights if counts is None else counts * self.weights  # (..., probes)
        total = np.maximum(weights.sum(-1, keepdims=True), 1e-12)
        mean: Floats = np.sqrt((weights @ self.squares.T) / total)
        return mean


@dataclass(frozen=True)
class ServerRounding:
    """How a server's base is rounded.

    share: how much of Q4_0's change is added to every variant: none, half or all.
    ratio: the error that is left then, relative to Q4_0's change.
    bias: what `ratio` is multiplied by at other prompts.
    """

    share: float
    ratio: float
    bias: float


def fit_variants(
    probes: Sequence[Probe],
    observations: Sequence[Observation],
    passport: Passport,
    server_rounding: ServerRounding | None = None,
) -> Fit | None:
    """Returns which variant explains the observations of these probes best; None for too few probes.

    server_rounding: None if it is unknown.
    If the server tells log-probabilities at all, probes without them are left out.
    """
    if any(observation.has_logprobs for observation in observations):
        probes, observations = _with_logprobs(probes, observations)
    if len(probes) < FEWEST:
        return None
    share = 0.0 if server_rounding is None else server_rounding.share
    candidates = _candidates(probes, observations, passport, share)
    errors = candidates.errors()
    effect, rounding = (_distance(probes, observations, ADAPTER, name) for name in (BASE, ROUNDED_ADAPTER))
    noise = None if server_rounding is None else server_rounding.bias * server_rounding.ratio * rounding
    is_scale = np.array([kind == "scale" for kind in candidates.kinds])
    scales = candidates.scales[is_scale]
    counts = np.random.default_rng(0).multinomial(len(probes), [1 / len(probes)] * len(probes), RESAMPLES)
    resampled = candidates.errors(counts.astype(np.float64))  # (resamples, candidates)
    resampled_scales = scales[resampled[:, is_scale].argmin(1)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled_scales, [tail, 1 - tail])
    best_scale = int(np.flatnonzero(is_scale)[errors[is_scale].argmin()])
    best = int(errors.argmin())
    if candidates.kinds[best] != "scale":
        wins = float((resampled[:, best] < resampled[:, is_scale].min(1)).mean())
        if wins < CONFIDENCE:
            best = best_scale
    others = _of_other_meaning(candidates, best)
    wins = float((resampled[:, best] < resampled[:, others].min(1)).mean()) if others.any() else 1.0
    names = candidates.names
    limit = limit_of_best = _limit(effect, noise)
    if noise is not None and names[best] not in (ADAPTER, BASE):  # of which alone it is known what Q4_0 changes
        limit_of_best = _limit(effect, noise + share * rounding)
    return Fit(
        kind=candidates.kinds[best] if errors[best] <= limit_of_best else "none",  # type: ignore[arg-type]
        name="" if candidates.kinds[best] == "scale" else names[best],
        scale=float(candidates.scales[best_scale]),
        interval=(float(low), float(high)),
        error=float(errors[best]),
        adapter_error=float(errors[names.index(ADAPTER)]),
        base_error=float(errors[names.index(BASE)]),
        effect=effect,
        rounding=rounding,
        limit=limit,
        noise=noise,
        is_certain=wins >= CONFIDENCE,
        probes=len(probes),
        has_logprobs=any(observation.has_logprobs for observation in observations),
    )


def _limit(effect: float, noise: float | None) -> float:
    """Returns the largest error of a variant that explains the answers."""
    if noise is None:
        return SHARE * effect
    return min(SHARE * effect, max(LEAST_SHARE * effect, NOISE * noise, NOISE_FLOOR))


def _of_other_meaning(candidates: Candidates, best: int) -> NDArray[np.bool_]:
    """Returns which candidates would change the verdict: the base for the adapter, and the other way round."""
    names = candidates.names
    if candidates.scales[best] < 0.5 and candidates.kinds[best] == "scale":
        return np.array([name == ADAPTER for name in names])
    return np.array([name == BASE for name in names])


def _candidates(
    probes: Sequence[Probe], observations: Sequence[Observation], passport: Passport, share: float
) -> Candidates:
    """Returns the variants that all probes have, with scales between those of the passport.

    share: of what Q4_0 changes, which is added to each variant.
    """
    variants = {
        name: variant
        for name, variant in passport.variants.items()
        if variant.kind != "rounding" and all(name in probe.logprobs for probe in probes)
    }
    nodes = sorted((variant.scale, name) for name, variant in variants.items() if variant.kind == "scale")
    known = np.array([scale for scale, _ in nodes])
    between = np.setdiff1d(np.round(np.arange(0, known[-1] + STEP / 2, STEP), 6), known)
    names = [*variants, *(f"scale {scale:g}" for scale in between)]
    kinds = [*(variant.kind for variant in variants.values()), *["scale"] * len(between)]
    scales = np.array([*(variant.scale for variant in variants.values()), *between])
    like_adapter = scales.clip(0, 1)[:, None]  # (candidates, 1): Q4_0 changes the adapter and the base differently
    squares, weights = np.zeros((len(names), len(probes))), np.zeros(len(probes))
    for number, (probe, observation) in enumerate(zip(probes, observations, strict=True)):
        at_nodes = np.array([probe.logprobs[name] for _, name in nodes])  # (nodes, tokens)
        interpolated = [np.interp(between, known, column) for column in at_nodes.T]
        predicted = np.concatenate([[probe.logprobs[name] for name in variants], np.array(interpolated).T])
        if share:
            of_adapter, of_base = (
                np.subtract(probe.logprobs[rounded], probe.logprobs[exact])
                for rounded, exact in ((ROUNDED_ADAPTER, ADAPTER), (ROUNDED_BASE, BASE))
            )
            predicted += share * (like_adapter * of_adapter + (1 - like_adapter) * of_base)
        squares[:, number], weights[number] = _squared_errors(probe, observation, predicted)
    return Candidates(names, list(kinds), scales, squares, weights)


def _squared_errors(probe: Probe, observation: Observation, predicted: Floats) -> tuple[Floats, float]:
    """Returns the mean squared errors of predictions (n, tokens) at a probe, (n,), and the weight of the probe."""
    if not observation.has_logprobs:
        return _regret(observation, predicted) ** 2, 1.0
    weights = np.exp(np.array([probe.logprobs[ADAPTER], probe.logprobs[BASE]])).mean(0)  # (tokens,)
    differences = np.zeros_like(predicted)
    for token in range(predicted.shape[1]):
        if token in observation.logprobs:
            differences[:, token] = predicted[:, token] - observation.logprobs[token]
        elif observation.bound is not None:  # it is not in the server's list: its probability is below all of those
            differences[:, token] = np.maximum(predicted[:, token] - observation.bound, 0)
    differences = np.clip(differences, -LARGEST, LARGEST)
    total = float(weights.sum())
    return (differences**2 @ weights) / max(total, 1e-12), total


def _regret(observation: Observation, predicted: Floats) -> Floats:
    """Returns how much likelier than the server's choice the likeliest token is, (n,), in nats."""
    if observation.chosen is not None:
        chosen = predicted[:, observation.chosen]
    else:  # a token that the passport does not know: at most what is left
        chosen = np.log(np.maximum(1 - np.exp(predicted).sum(1), 1e-6))
    regret: Floats = np.clip(predicted.max(1) - chosen, 0, LARGEST)
    return regret


def _distance(probes: Sequence[Probe], observations: Sequence[Observation], expected: str, computed: str) -> float:
    """Returns the error of the expected variant if a server computes another one, and tells as much as this one."""
    squares, weights = [], []
    for probe, observation in zip(probes, observations, strict=True):
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
    """verdict, the scale that explains the answers best (None if it was not found), and the evidence in sentences.

    fits: "text" and "chat", with "base " before them for the base's own name, "all" -> what explains the answers best.
    """

    verdict: Verdict
    scale: float | None
    evidence: list[str]
    fits: dict[str, Fit]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        fits = {name: fit.to_dict() for name, fit in self.fits.items()}
        return {"verdict": self.verdict, "scale": self.scale, "evidence": self.evidence, "fits": fits}


def verify(
    passport: Passport,
    observations: Sequence[Observation | None],
    of_base: Sequence[Observation | None] | None = None,
) -> Verification:
    """Returns the verdict on a server from its answers to the passport's probes.

    of_base: its answers under the name of its base; None if it offers no base.
    """
    of_base = of_base or [None] * len(observations)
    server_rounding = _server_rounding(passport, observations, of_base)
    fits: dict[str, Fit] = {}
    for name, is_kind in KINDS.items():
        for key, answers in ((name, observations), (f"base {name}", of_base)):
            if (fit := fit_variants(*_answered(passport, answers, is_kind), passport, server_rounding)) is not None:
                fits[key] = fit
    text, chat, base = fits.get("text"), fits.get("chat"), fits.get("base text") or fits.get("base chat")
    verdict = _combined(text, chat, server_rounding)
    leading = chat if text is None or (chat is not None and _meaning(text) == "unknown") else text
    if text is not None and chat is not None and verdict in ("adapter", "scaled"):
        if chat.kind == "part":
            answered = _answered(passport, observations, lambda probe: not probe.is_control)
            together = fit_variants(*answered, passport, server_rounding)
            if together is not None and _meaning(together) == "partial":
                verdict, leading, fits["all"] = "partial", together, together
            elif verdict == "adapter":
                verdict = "unknown"
        elif verdict == "adapter" and _agree_on_scale(text, chat):
            verdict, leading = "scaled", chat
    if verdict not in ("adapter", "template") and base is not None:
        if not _is_base(base):
            verdict = "other-base"
        elif verdict == "other-base":
            verdict = "other-adapter"
    longer = [_prompt_differences(kind, passport, observations) for kind in KINDS]
    # a server that counts cached tokens apart counts fewer
    if verdict == "adapter" and any(differences and min(differences) > 0 for differences in longer):
        verdict = "template"
    has_scale = leading is not None and leading.kind == "scale" and verdict in ("adapter", "base", "scaled", "template")
    scale = leading.scale if leading and has_scale else None
    return Verification(verdict, scale, _evidence(passport, observations, fits), fits)


KINDS: dict[str, Callable[[Probe], bool]] = {
    "text": lambda probe: probe.text is not None and not probe.is_control,
    "chat": lambda probe: probe.text is None,
}


def _answered(
    passport: Passport, observations: Sequence[Observation | None], is_kind: Callable[[Probe], bool]
) -> tuple[list[Probe], list[Observation]]:
    """Returns the probes of a kind that the server answered, and its answers."""
    probes, answers = [], []
    for probe, answer in zip(passport.probes, observations, strict=True):
        if answer is not None and is_kind(probe):
            probes.append(probe)
            answers.append(answer)
    return probes, answers


def _with_logprobs(
    probes: Sequence[Probe], observations: Sequence[Observation]
) -> tuple[list[Probe], list[Observation]]:
    pairs = [pair for pair in zip(probes, observations, strict=True) if pair[1].has_logprobs]
    return [probe for probe, _ in pairs], [observation for _, observation in pairs]


def _server_rounding(
    passport: Passport, observations: Sequence[Observation | None], of_base: Sequence[Observation | None]
) -> ServerRounding | None:
    """Returns how the server's base is rounded, from the controls, else from its answers as the base.

    None if too few of them have log-probabilities.
    """
    controls = _with_logprobs(*_answered(passport, observations, lambda probe: probe.is_control))
    if len(controls[0]) >= FEWEST:
        return _rounding_at(*controls, passport, ADAPTER)
    texts = _with_logprobs(*_answered(passport, of_base, lambda probe: probe.text is not None))
    if len(texts[0]) < FEWEST:
        return None
    rounding = _rounding_at(*texts, passport, BASE)
    fit = fit_variants(*texts, passport, rounding)
    return rounding if fit is not None and _is_base(fit) else None  # else it is another base


def _rounding_at(
    probes: Sequence[Probe], observations: Sequence[Observation], passport: Passport, name: str
) -> ServerRounding:
    """Returns the rounding that explains these answers best.

    name: BASE if the base answered; ADAPTER if it was the adapter, whose scale is unknown.
    """
    errors: dict[float, float] = {}
    for share in SHARES_OF_Q4_0:
        candidates = _candidates(probes, observations, passport, share)
        pairs = zip(candidates.names, candidates.kinds, strict=True)
        is_possible = np.array([kind == "scale" and name in (ADAPTER, other) for other, kind in pairs])
        errors[share] = float(candidates.errors()[is_possible].min())
    best = min(errors, key=errors.__getitem__)
    rounded, bias = (ROUNDED_BASE, 1.0) if name == BASE else (ROUNDED_ADAPTER, CONTROL_BIAS)
    change = _distance(probes, observations, name, rounded)
    return ServerRounding(best, errors[best] / max(change, 1e-12), bias)


def _meaning(fit: Fit | None) -> Verdict | None:
    """Returns the verdict that one kind of probes gives; None without them."""
    if fit is None:
        return None
    low, high = fit.interval
    if fit.kind == "none":
        return _unexplained(fit)
    if not fit.is_certain:
        return "unknown"
    if fit.kind == "part":
        return "partial"
    if fit.kind == "prompt":
        return "template"
    may_be_right = low - SAME_SCALE <= 1 <= high + SAME_SCALE
    if may_be_right and high - low > WIDEST:
        return "unknown" if min(fit.adapter_error, fit.base_error) <= fit.limit else _unexplained(fit)
    if may_be_right and fit.adapter_error <= fit.limit:
        # The choice of a token moves with the scale only here and there, so a wide interval alone tells little
        return "adapter" if fit.has_logprobs or abs(fit.scale - 1) <= SAME_SCALE + STEP / 2 else "unknown"
    if low <= SAME_SCALE and fit.base_error <= fit.limit:
        return "base"
    if low <= 1 <= high or low == 0:  # a scale that explains the answers only together with what the limit excludes
        return _unexplained(fit)
    return "scaled"


def _is_base(fit: Fit) -> bool:
    """Returns True if these answers are those of the base."""
    # Without log-probabilities, a right base has a wide interval
    return fit.base_error <= fit.limit and (not fit.has_logprobs or _meaning(fit) == "base")


def _agree_on_scale(text: Fit, chat: Fit) -> bool:
    """Returns True if chats tell another scale than 1, and plain texts one on the same side of 1."""
    (text_low, text_high), (low, high) = text.interval, chat.interval
    is_same_side = max(text_high, high) < 1 or min(text_low, low) > 1
    return is_same_side and _meaning(chat) == "scaled"


def _unexplained(fit: Fit) -> Verdict:
    """Returns the verdict on answers that no variant explains."""
    if fit.noise is None and fit.error <= ROUNDING * fit.rounding:
        return "unknown"
    far = min(fit.adapter_error, fit.base_error) > FOREIGN * fit.effect
    return "other-base" if far else "other-adapter"


def _combined(text: Fit | None, chat: Fit | None, server_rounding: ServerRounding | None) -> Verdict:
    """Plain completions tell which weights compute; then chats tell whether the template is right."""
    of_text, of_chat = _meaning(text), _meaning(chat)
    if of_text is None or of_text == "unknown":
        return of_chat or "unknown"
    if text is not None and chat is not None and of_text == "adapter":
        # The errors at plain texts and at the controls tell how much this server rounds
        at_controls = 0.0 if server_rounding is None else server_rounding.ratio
        ratio = max(text.adapter_error / max(text.rounding, 1e-12), at_controls)
        expected = ratio * chat.rounding
        fits = chat.kind != "prompt" and chat.adapter_error <= max(CHAT_ERROR * expected, CHAT_SHARE * chat.effect)
        return "adapter" if fits else "template"
    if chat is not None and of_chat == "adapter" and of_text in ("other-base", "other-adapter"):
        # The plain prompts are read in another way; the few tokens that a server chooses after chats do not show it
        return "template" if chat.has_logprobs else of_text
    return of_text


# ---- The evidence, in sentences

KIND_NAMES = {"text": "Plain completions", "chat": "Chats", "all": "All of them together"}


def _evidence(passport: Passport, observations: Sequence[Observation | None], fits: Mapping[str, Fit]) -> list[str]:
    evidence = [_comparison(name, fits[key]) for key, name in KIND_NAMES.items() if key in fits]
    if (base := fits.get("base text") or fits.get("base chat")) is not None:
        evidence.append(f"The base, asked under its own name, {_explanation(base)}.")
    for name in KINDS:
        evidence += _prompt_tokens(name, passport, observations)
    if "text" not in fits:
        evidence.append(f"Plain completions were not checked: the server answered fewer than {FEWEST} of them.")
    if "chat" not in fits:
        has_chats = any(map(KINDS["chat"], passport.probes))
        reason = f"the server answered fewer than {FEWEST} chats" if has_chats else "the passport has no chats"
        evidence.append(f"The chat template was not checked: {reason}.")
    if fits and not any(fit.has_logprobs for fit in fits.values()):
        evidence.append(
            "The server tells no log-probabilities, so its next tokens alone were compared. They tell less."
        )
    return evidence


def _comparison(name: str, fit: Fit) -> str:
    certain = "" if fit.is_certain else " That is not certain."
    return (
        f"{name}, {fit.probes} prompts: the server {_explanation(fit)}.{certain} "
        f"It differs from the adapter by {fit.adapter_error:.2f} nats, and from the base by {fit.base_error:.2f}. "
        f"For comparison: adapter and base differ by {fit.effect:.2f}, "
        f"and 4-bit weights change the adapter's answers by {fit.rounding:.2f}."
    )


def _explanation(fit: Fit) -> str:
    """Returns what the answers are like, or only nearest to, in words."""
    low, high = fit.interval
    like = "is nearest to" if _meaning(fit) in ("other-base", "other-adapter", "unknown") else "answers like"
    match fit.kind:
        case "none":
            return f"answers like none of the variants in the passport; the nearest differs by {fit.error:.2f} nats"
        case "part":
            return f"{like} the adapter without {fit.name}"
        case "prompt":
            return f"{like} the adapter after another prompt: {fit.name}"
    variant = "the bare base" if fit.scale == 0 else "the adapter"
    return f"{like} {variant} (scale {fit.scale:.2f}, 95% interval {low:.2f} to {high:.2f})"


def _prompt_differences(name: str, passport: Passport, observations: Sequence[Observation | None]) -> list[int]:
    """Returns how many more tokens than training the server counts in each prompt."""
    probes, answers = _answered(passport, observations, KINDS[name])
    return [
        answer.prompt_tokens - probe.prompt_tokens
        for probe, answer in zip(probes, answers, strict=True)
        if answer.prompt_tokens is not None
    ]


def _prompt_tokens(name: str, passport: Passport, observations: Sequence[Observation | None]) -> list[str]:
    """Returns how much longer the server's prompts are, in words; [] where they are not."""
    differences = _prompt_differences(name, passport, observations)
    if not any(differences):
        return []
    low, high = min(differences), max(differences)
    amount = f"{low:+d}" if low == high else f"{low:+d} to {high:+d}"
    return [f"{KIND_NAMES[name]}: the server counts {amount} tokens in a prompt, compared with training."]
