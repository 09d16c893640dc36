"""What `inspect` finds in an adapter: the data classes, and their JSON form.

`study/inspect.py` fills them in, `study/advice.py` reads them, and `tailora/report` shows them. Field names are the
keys of report.json.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from tailora.evaluation.spectral import ModuleReport
from tailora.study.model_layout import group_of

# ---- On held-out data


@dataclass(frozen=True)
class TruncationCost:
    """The held-out loss without the lower half of the singular values of some modules, in nats per token.

    rise: by how much the loss rises, paired by example; low, high: its 95% interval, None for a single example.
    cost: the rise as a share of what the adapter gains over the base; None where the adapter gains nothing.
    values: the share of the adapter's singular values that these modules have.
    """

    loss: float
    rise: float
    low: float | None
    high: float | None
    cost: float | None
    values: float


@dataclass(frozen=True)
class HeldOutLosses:
    """Losses in nats per supervised token. `improvement` is base - adapter, with its 95% interval.

    half: without the lower half of the singular values of all modules; groups: of each group of modules.
    """

    data: str
    examples: int
    tokens: int
    base_loss: float
    loss: float
    improvement: float
    improvement_low: float | None
    improvement_high: float | None
    half: TruncationCost
    groups: dict[str, TruncationCost]


@dataclass(frozen=True)
class ReducedStrength:
    """The adapter at a lower strength: its held-out loss (None without data), and how much it forgets."""

    strength: float
    loss: float | None
    kl: float
    base_text_rise: float


# ---- Beside a second adapter


@dataclass(frozen=True)
class ModuleOverlap:
    """One matrix that both adapters change. Norms are those of the updates, s (B A - B0 A0).

    writes, reads: overlap of the spaces of their outputs and of their inputs (`evaluation.spectral.subspace_overlap`),
        each beside the overlap of random spaces of the same sizes.
    cosine: <dW1, dW2> / (||dW1|| ||dW2||): 1 for the same direction, 0 for orthogonal updates, -1 for opposite ones.
    sum_norm: ||dW1 + dW2||.
    """

    path: str
    norm: float
    other_norm: float
    sum_norm: float
    cosine: float
    writes: float
    writes_by_chance: float
    reads: float
    reads_by_chance: float


@dataclass(frozen=True)
class CombinedLosses:
    """Held-out losses of the base, of either adapter and of both added up, in nats per supervised token.

    worse: the loss of both - the loss of the better adapter alone, with its 95% interval.
    """

    base: float
    one: float
    other: float
    both: float
    worse: float
    worse_low: float | None
    worse_high: float | None


@dataclass(frozen=True)
class AdapterOverlap:
    """modules: those that both adapters change.    cosine: of the two updates, over all modules together."""

    other: str
    modules: list[ModuleOverlap]
    only_here: list[str]
    only_there: list[str]
    cosine: float
    losses: CombinedLosses | None = None


# ---- The inspection


@dataclass(frozen=True)
class Advice:
    """What a rule of `study/advice.py` recommends.

    rule: its name.    says: the recommendation, in a sentence or two.
    evidence: the numbers, and the thresholds that they passed.
    setting: values of LoRAConfig or TrainConfig, ready to use.    command: a command line to copy, or "".
    """

    rule: str
    says: str
    evidence: dict[str, Any]
    setting: dict[str, Any] = field(default_factory=dict)
    command: str = ""


@dataclass(frozen=True)
class Inspection:
    """layers: how many the model has, as far as the adapter names them.
    left_out: path -> why its change has no singular values.
    training: the settings that the run beside the adapter recorded, {} without a run.
    forgetting: KL divergence from the base and loss on other text (`evaluation.forgetting`).
    dial: the adapter at lower strengths, measured where it forgets much.
    pair: the comparison with a second adapter.
    """

    adapter: str
    config: dict[str, Any]
    layers: int
    modules: list[ModuleReport]
    left_out: dict[str, str]
    model: str | None = None
    named_base: str | None = None
    base_dtype: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    held_out: HeldOutLosses | None = None
    forgetting: dict[str, Any] | None = None
    dial: list[ReducedStrength] = field(default_factory=list)
    pair: AdapterOverlap | None = None
    advice: list[Advice] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the `group` and the `use` (effective rank / rank) of every module."""
        content = asdict(self)
        for values, module in zip(content["modules"], self.modules, strict=True):
            values |= {"group": group_of(module.path, self.layers), "use": module.use}
        return content
