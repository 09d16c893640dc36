"""What the numbers of an inspection advise, by rules that are stated here with their thresholds and sources.

A rule looks at the numbers and gives advice, or nothing. docs/inspect.md has the same table in words. Nothing else
advises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tailora.study import ranks, strengths
from tailora.study.rule import Advice, Rule

if TYPE_CHECKING:
    from tailora.study.inspect import Inspection

RULES = [
    Rule(
        "dead",
        f"||s B A|| of a module is 0, or its root mean square at most {ranks.DEAD:g} of the median's",
        "B starts at 0, so an update of 0 has never been moved; the threshold is ours",
        ranks.dead,
    ),
    Rule(
        "no gain",
        "the interval of the improvement on held-out data reaches 0",
        "95%, bootstrap over examples",
        ranks.no_gain,
    ),
    Rule(
        "saturated",
        f"the lower half of the singular values is worth more than {ranks.SATURATED_COST:.0%} of the improvement, "
        f"for certain, and effective rank / r is above {ranks.SATURATED_USE:g}; then the same in groups",
        "calibrated, docs/inspect.md: doubling r gained where it fires, and next to nothing where not",
        ranks.saturated,
    ),
    Rule(
        "spare ranks",
        f"median effective rank / r is below {ranks.SPARE_USE:g} and half of the values hold 99% of the energy; "
        f"with data, the lower half is worth at most {ranks.SATURATED_COST:.0%} of the improvement, too",
        "the same calibration; Eckart and Young for the energy",
        ranks.spare,
    ),
    Rule(
        "too strong",
        f"median ||dW|| / ||W|| is above {strengths.TOO_STRONG:g}",
        "calibrated: all adapters of a useful rate are below .5 there, all above 1.6 are of a ruinous one",
        strengths.too_strong,
    ),
    Rule(
        "intruders",
        f"more than {strengths.INTRUDING:g} of 10, in the mean over modules, above a random update of the same shape, "
        "rank and norm",
        "arXiv:2410.21228, sec. 3 and 5",
        strengths.intruders,
    ),
    Rule(
        "scales moved",
        f"a learned scale is more than a factor of {strengths.MOVED:g} from its start",
        "the best rate of an alpha is within an octave over ranks; the threshold is ours",
        strengths.scales,
    ),
    Rule(
        "forgetting",
        f"the loss on other text rises by more than {strengths.FORGETTING:g} of what the loss on the data falls",
        "the threshold is ours; the strengths are measured",
        strengths.forgetting,
    ),
    Rule(
        "interference",
        "both adapters together lose more on the data than the better one alone, for certain",
        "95%, bootstrap over examples",
        strengths.interference,
    ),
    Rule(
        "rounding",
        f"||dW|| / ||W|| is below {strengths.ROUNDED:g} in the middle, and the base is in 16 bits",
        "measured: 17% of the update in bfloat16 at 1e-2, 79% at 1e-3",
        strengths.rounded,
    ),
]


def advise(found: Inspection) -> list[Advice]:
    """All that the rules say, in their order."""
    return [advice for rule in RULES for advice in rule.look(found)]
