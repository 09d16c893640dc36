"""What experiment 6 states, asked of losses: arm -> {octave: held-out loss}, the learning rate being 2^octave."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Losses = Mapping[str, Mapping[int, float]]
PLAIN = "r8"  # what DoRA and PiSSA of the same rank are compared with


@dataclass(frozen=True)
class Claim:
    statement: str
    found: str
    holds: bool


def best(losses: Losses, arm: str) -> int:
    """The octave of the lowest loss."""
    return min(losses[arm], key=losses[arm].__getitem__)


def tuned(losses: Losses, arm: str) -> float:
    return min(losses[arm].values())


def ranks(losses: Losses) -> list[str]:
    return sorted((arm for arm in losses if arm[1:].isdigit()), key=lambda arm: int(arm[1:]))


def one_rate_for_all_ranks(losses: Losses) -> Claim:
    octaves = {arm: best(losses, arm) for arm in ranks(losses)}
    apart = max(octaves.values()) - min(octaves.values())
    found = ", ".join(f"{arm} 2^{octave}" for arm, octave in octaves.items())
    return Claim("best learning rate within one octave over the ranks", found, apart <= 1)


def monotone(losses: Losses) -> Claim:
    values = [tuned(losses, arm) for arm in ranks(losses)]
    found = ", ".join(f"{arm} {value:.3f}" for arm, value in zip(ranks(losses), values, strict=True))
    return Claim("loss falls with every doubling of r", found, values == sorted(values, reverse=True))


def as_good_as_full(losses: Losses) -> Claim:
    apart = tuned(losses, "r64") - tuned(losses, "full")
    return Claim("r = 64 within .02 of full fine-tuning", f"{apart:+.4f}", abs(apart) < 0.02)


def attention_alone_is_worse(losses: Losses) -> Claim:
    apart = tuned(losses, "attention") - tuned(losses, "mlp")
    return Claim("attention-only worse than MLP-only by > .15", f"{apart:+.4f}", apart > 0.15)


def dora_is_equal(losses: Losses) -> Claim:
    apart = tuned(losses, "dora") - tuned(losses, PLAIN)
    return Claim("|DoRA - LoRA| < .01", f"{apart:+.4f}", abs(apart) < 0.01)


def pissa_is_ahead_at_a_low_rate(losses: Losses) -> Claim:
    low = min(losses["pissa"].keys() & losses[PLAIN].keys())
    apart = losses["pissa"][low] - losses[PLAIN][low]
    return Claim("PiSSA ahead of LoRA at a low learning rate", f"{apart:+.4f} at 2^{low}", apart < 0)


def pissa_is_not_ahead_when_tuned(losses: Losses) -> Claim:
    apart = tuned(losses, "pissa") - tuned(losses, PLAIN)
    return Claim("PiSSA not ahead after tuning", f"{apart:+.4f}", apart >= 0)


def rate_of_lora_over_full(losses: Losses) -> Claim:
    times = [2 ** (best(losses, arm) - best(losses, "full")) for arm in ranks(losses)]
    found = f"{min(times):g}x to {max(times):g}x"
    return Claim("best learning rate of LoRA 2-16x that of full", found, min(times) >= 2 and max(times) <= 16)


CLAIMS: list[Callable[[Losses], Claim]] = [
    one_rate_for_all_ranks,
    monotone,
    as_good_as_full,
    attention_alone_is_worse,
    dora_is_equal,
    pissa_is_ahead_at_a_low_rate,
    pissa_is_not_ahead_when_tuned,
    rate_of_lora_over_full,
]


def judged(losses: Losses) -> list[Claim]:
    return [claim(losses) for claim in CLAIMS]


def at_the_edge(losses: Losses) -> list[str]:
    """Arms whose best learning rate is the lowest or the highest tried: theirs may be better yet."""
    return [arm for arm, found in losses.items() if best(losses, arm) in (min(found), max(found))]


# ---- of what the commands report


def of_comparison(report: Mapping[str, Any]) -> list[Claim]:
    """Finished arms at the rates that the comparison chose; at a low rate, those of its search for rates."""
    finals = {arm["name"]: {octave(arm["learning_rate"]): arm["eval_loss"]} for arm in report["arms"]}
    tried = {arm["name"]: {octave(float(rate)): loss for rate, loss in arm["rates"].items()} for arm in report["arms"]}
    return [claim(tried if claim is pissa_is_ahead_at_a_low_rate else finals) for claim in CLAIMS]


def of_search(report: Mapping[str, Any], losses: Losses) -> list[Claim]:
    """losses: of the whole grid, whose best configuration and rate the search should come near to."""
    found = report["best"]["settings"]
    apart = abs(math.log2(found["learning_rate"]) - best(losses, "r64"))
    said = f"{found['learning_rate']:.2g}, which is {apart:.1f} octaves from 2^{best(losses, 'r64')}"
    of_best, of_cheapest = (report[name]["settings"] for name in ("best", "cheapest"))
    lost = report["cheapest"]["eval_loss"] - report["best"]["eval_loss"]
    return [
        Claim("learning rate of the best within one octave of the grid's", said, apart <= 1),
        Claim("the best is of high rank on all layers or the MLP", _config(of_best), _is_good(of_best)),
        Claim("the cheapest is within the margin of the best", f"{_config(of_cheapest)}, {lost:+.4f}", lost < 0.02),
    ]


def octave(rate: float) -> int:
    return round(math.log2(rate))


def _config(settings: Mapping[str, Any]) -> str:
    return f"r = {settings['r']} on {settings['target_modules']}"


def _is_good(settings: Mapping[str, Any]) -> bool:
    return settings["r"] >= 16 and settings["target_modules"] != "attention"
