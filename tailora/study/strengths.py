"""Rules about how strongly an adapter changes its base: intruders, learned scales, forgetting, rounding."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tailora.study.rule import Advice, above, command

if TYPE_CHECKING:
    from tailora.study.inspect import Inspection

INTRUDING = 1.0  # intruders of 10, mean over modules, above those of a random update
MOVED = 2.0  # factor of a learned scale from its start
TOO_STRONG = 1.0  # ||dW|| / ||W||, median
SLOWER = 4  # the learning rate is divided by
FORGETTING = 0.5  # rise of the loss on other text, of the improvement
ROUNDED = 1e-2  # ||dW|| / ||W||, median, in 16 bits


def too_strong(found: Inspection) -> Iterator[Advice]:
    sizes = [module.relative_norm for module in found.modules if module.relative_norm is not None]
    size = statistics.median(sizes) if sizes else 0.0
    if size <= TOO_STRONG:
        return
    rate = found.training.get("learning_rate")
    yield Advice(
        "too strong",
        f"||dW|| is {size:.1f} times ||W|| in the middle (limit {TOO_STRONG:g}): the base is drowned. The "
        f"learning rate was too high; try a {SLOWER}th of it.",
        {"relative_norm": size, "limit": TOO_STRONG},
        setting={"learning_rate": rate / SLOWER} if isinstance(rate, float) else {},
    )


def intruders(found: Inspection) -> Iterator[Advice]:
    counted = [module for module in found.modules if module.intruders is not None]
    if not counted:
        return
    mean = statistics.fmean(module.intruders or 0 for module in counted)
    random = statistics.fmean(module.intruders_random or 0 for module in counted)
    if mean - random <= INTRUDING:
        return
    size = statistics.median(module.relative_norm or 0.0 for module in counted)
    rate = found.training.get("learning_rate")
    yield Advice(
        "intruders",
        f"{mean:.1f} of the 10 leading directions of a tuned weight are new, {random:.1f} with random updates as large "
        f"(limit: {INTRUDING:g} more); ||dW|| is {size:.2%} of ||W|| in the middle. Such directions came with "
        "forgetting: halve the learning rate, or train fewer steps.",
        {"intruders": mean, "random": random, "limit": INTRUDING, "relative_norm": size, "modules": len(counted)},
        setting={"learning_rate": rate / 2} if isinstance(rate, float) else {},
    )


def scales(found: Inspection) -> Iterator[Advice]:
    learned = [module for module in found.modules if module.learned_scaling]
    moved = {
        module.path: module.scaling / module.configured_scaling
        for module in learned
        if not 1 / MOVED <= module.scaling / module.configured_scaling <= MOVED
    }
    if not moved:
        return
    middle = statistics.median(module.scaling / module.configured_scaling for module in learned)
    alpha = found.config["lora_alpha"] * middle
    yield Advice(
        "scales moved",
        f"{len(moved)} of {len(learned)} learned scales are more than a factor of {MOVED:g} from their start "
        f"({min(moved.values()):.2g} to {max(moved.values()):.2g} times it; {middle:.2g} in the middle). "
        + ("Start nearer to where they go." if middle > 0 else "Some changed their sign: A and B could do that."),
        {"moved": len(moved), "learned": len(learned), "limit": MOVED, "median": middle, "factors": moved},
        setting={"lora_alpha": round(alpha, 3)} if middle > 0 and not 1 / MOVED <= middle <= MOVED else {},
    )


def forgets_much(found: Inspection) -> bool:
    """Whether the loss on other text rose by more than FORGETTING of what the adapter gained on the data."""
    held, lost = found.held_out, found.forgetting
    if held is None or lost is None or not above(held.improvement, held.improvement_low):
        return False
    return float(lost["loss_after"] - lost["loss_before"]) > FORGETTING * held.improvement


def forgetting(found: Inspection) -> Iterator[Advice]:
    if not forgets_much(found) or found.held_out is None or found.forgetting is None:
        return
    rise = found.forgetting["loss_after"] - found.forgetting["loss_before"]
    gain = found.held_out.improvement
    better = next(
        (dial for dial in found.dial if _worth(dial.base_text_rise, found.held_out.base_loss, dial.loss)), None
    )
    tried = ", ".join(f"{dial.strength:g}: loss {dial.loss:.3f}, KL {dial.kl:.3f}" for dial in found.dial if dial.loss)
    cure = (
        f"At strength {better.strength:g} it keeps {_kept(found.held_out.base_loss, better.loss, gain):.0%} of the "
        "gain and forgets less than the limit."
        if better
        else "No lower strength that was tried is within the limit: train at a lower rate, or on data that are mixed."
    )
    yield Advice(
        "forgetting",
        f"On {found.forgetting['text']} the loss rose by {rise:.3f} nats per token, KL {found.forgetting['kl']:.3f}; "
        f"on the data it fell by {gain:.3f} (limit: {FORGETTING:g} of that). {cure} ({tried})",
        {"rise": rise, "kl": found.forgetting["kl"], "improvement": gain, "limit": FORGETTING},
        setting={"set_scale": better.strength} if better else {},
        command=_dialled_command(found, better.strength) if better else "",
    )


def _worth(rise: float, base_loss: float, loss: float | None) -> bool:
    return loss is not None and rise <= FORGETTING * (base_loss - loss)


def _kept(base_loss: float, loss: float | None, gain: float) -> float:
    return 0.0 if loss is None or gain <= 0 else (base_loss - loss) / gain


def _dialled_command(found: Inspection, strength: float) -> str:
    out = f"{found.adapter}-{strength:g}"
    return command("combine", "--adapter", f"a={found.adapter}", "--weight", f"a={strength:g}", "--output-dir", out)


def interference(found: Inspection) -> Iterator[Advice]:
    both = None if found.pair is None else found.pair.losses
    if found.pair is None or both is None or not above(both.worse, both.worse_low):
        return
    yield Advice(
        "interference",
        f"Added up, the two have a loss of {both.both:.4f}, {both.worse:.4f} above the better one alone: they disturb "
        f"each other (cosine of the updates {found.pair.cosine:+.2f}). Keep them apart and switch, or choose by row.",
        {"worse": both.worse, "low": both.worse_low, "one": both.one, "other": both.other, "cosine": found.pair.cosine},
        command=command(
            "chat",
            "--model",
            found.model or "BASE",
            "--adapter",
            f"one={found.adapter}",
            "--adapter",
            f"two={found.pair.other}",
        ),
    )


def rounded(found: Inspection) -> Iterator[Advice]:
    sizes = [module.relative_norm for module in found.modules if module.relative_norm]
    if not sizes or found.base_dtype not in ("bfloat16", "float16"):
        return
    size = statistics.median(sizes)
    if size >= ROUNDED:
        return
    out = f"{found.adapter}-merged"
    model = ["--model", found.model] if found.model else []
    yield Advice(
        "rounding",
        f"||dW|| is {size:.2%} of ||W|| in the middle (limit {ROUNDED:.0%}): merged into {found.base_dtype} weights "
        "the update would carry an error of a sixth of itself or more. Keep it beside the base, or merge in float32.",
        {"relative_norm": size, "limit": ROUNDED, "dtype": found.base_dtype},
        command=command("export", found.adapter, *model, "--to", "merged", "--dtype", "float32", "--output", out),
    )
