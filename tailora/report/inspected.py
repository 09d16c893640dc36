"""What report.json of an inspection holds."""

from typing import Any

from pydantic import BaseModel

from tailora.core.patterns import layer_index
from tailora.report.pair import Pair


class Module(BaseModel):
    path: str
    r: int
    rank: int | None = None  # how many singular values the update may have; r where it is not told
    effective_rank: float
    stable_rank: float
    energy: float  # share of the adapter's
    relative_norm: float | None = None
    intruders: int | None = None
    intruders_random: int | None = None
    scaling: float
    singular_values: list[float] = []

    @property
    def use(self) -> float:
        """Effective rank / rank."""
        return self.effective_rank / (self.rank or self.r)

    @property
    def layer(self) -> int | None:
        return layer_index(self.path)


class Rise(BaseModel):
    """Of the held-out loss, without the lower half of some singular values."""

    loss: float
    rise: float
    low: float | None = None
    high: float | None = None
    cost: float | None = None  # of the improvement, what goes
    values: float | None = None  # share of the adapter's singular values that these are


class HeldOut(BaseModel):
    data: str
    examples: int
    base_loss: float
    loss: float
    improvement: float
    improvement_low: float | None = None
    improvement_high: float | None = None
    half: Rise
    groups: dict[str, Rise] = {}


class Strength(BaseModel):
    """The adapter at a lower strength."""

    strength: float
    loss: float | None
    kl: float
    base_text_rise: float


class Advice(BaseModel):
    rule: str
    says: str
    setting: dict[str, Any] = {}
    command: str = ""


class Inspection(BaseModel):
    adapter: str
    model: str | None = None
    named_base: str | None = None
    config: dict[str, Any] = {}
    training: dict[str, Any] = {}
    modules: list[Module]
    left_out: dict[str, str] = {}
    held_out: HeldOut | None = None
    forgetting: dict[str, Any] | None = None
    dial: list[Strength] = []
    pair: Pair | None = None
    advice: list[Advice]
