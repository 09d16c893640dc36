"""The statements about LoRA that tiny_lm.py checks, each a function of losses: arm -> {octave: held-out loss}.

A learning rate is 2^octave.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Losses = Mapping[str, Mapping[int, float]]
PLAIN = "r8"  # the LoRA arm with the rank of the DoRA and PiSSA arms


@dataclass(frozen=True)
class Claim:
    statement: str
    found: str
    holds: bool


def best(losses: Losses, arm: str) -> int:
    """Returns the octave of the lowest loss."""
    return min(losses[arm], key=losses[arm].__getitem__)


def best_loss(losses: Losses, arm: str) -> float:
    return min(losses[arm].values())


def ranks(losses: Losses) -> list[str]:
    return sorted((arm for arm in losses if arm[1:].isdigit()), key=lambda arm: int(arm[1:]))


def one_rate_for_all_ranks(losses: Losses) -> Claim:
    octaves = {arm: best(losses, arm) for arm in ranks(losses)}
    distance = max(octaves.values()) - min(octaves.values())
    found = ", ".join(f"{arm} 2^{octave}" for arm, octave in octaves.items())
    return Claim("best learning rate within one octave over the ranks", found, distance <= 1)


def monotone(losses: Losses) -> Claim:
    values = [best_loss(losses, arm) for arm in ranks(losses)]
    found = ", ".join(f"{arm} {value:.3f}" for arm, value in zip(ranks(losses), values, strict=True))
    return Claim("loss falls with every doubling of r", found, values == sorted(values, reverse=True))


def difference(statement: str, first: str, second: str, holds: Callable[[float], bool]) -> Callable[[Losses], Claim]:
    """Returns the claim on the difference between the best losses of two arms, first minus second."""

    def claim(losses: Losses) -> Claim:
        value = best_loss(losses, first) - best_loss(losses, second)
        return Claim(statement, f"{value:+.4f}", holds(value))

    return claim


def pissa_is_ahead_at_a_low_rate(losses: Losses) -> Claim:
    low = min(losses["pissa"].keys() & losses[PLAIN].keys())
    difference = losses["pissa"][low] - losses[PLAIN][low]
    return Claim("PiSSA ahead of LoRA at a low learning rate", f"{difference:+.4f} at 2^{low}", difference < 0)


def rate_of_lora_over_full(losses: Losses) -> Claim:
    factors = [2 ** (best(losses, arm) - best(losses, "full")) for arm in ranks(losses)]
    found = f"{min(factors):g}x to {max(factors):g}x"
    return Claim("best learning rate: LoRA 2-16x full", found, min(factors) >= 2 and max(factors) <= 16)


CLAIMS: list[Callable[[Losses], Claim]] = [
    one_rate_for_all_ranks,
    monotone,
    difference("r = 64 within .02 of full fine-tuning", "r64", "full", lambda value: abs(value) < 0.02),
    difference("attention-only worse than MLP-only by > .15", "attention", "mlp", lambda value: value > 0.15),
    difference("|DoRA - LoRA| < .01", "dora", PLAIN, lambda value: abs(value) < 0.01),
    pissa_is_ahead_at_a_low_rate,
    difference("PiSSA not ahead after tuning", "pissa", PLAIN, lambda value: value >= 0),
    rate_of_lora_over_full,
]


def check_claims(losses: Losses) -> list[Claim]:
    return [claim(losses) for claim in CLAIMS]


def best_at_the_edge(losses: Losses) -> list[str]:
    """Returns the arms whose best learning rate is the lowest or highest tried: another may be still better."""
    return [arm for arm, by_octave in losses.items() if best(losses, arm) in (min(by_octave), max(by_octave))]
