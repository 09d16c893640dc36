"""What an adapter's file says beyond PEFT's fields, in its safetensors metadata; other readers pass over it."""

from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from tailora.core.config import LoRAConfig
from tailora.errors import ConfigError, FormatError

KEY = "tailora"
# of LoRAConfig for what a stranger wrote; the last two are the compiler's, for parentheses and counts without end
REFUSALS = (ConfigError, TypeError, RecursionError, OverflowError)


class LayerPrint(BaseModel):
    """A layer of the base: shape, and evenly spaced weights.

    spread: how far each may be from the weight that was quantised; [] for a base that was not.
    """

    shape: list[int]
    weights: list[float]
    spread: list[FiniteFloat] = []
    base: str = "plain"


class Notes(BaseModel):
    """Empty for a file that another tool wrote."""

    model_config = ConfigDict(frozen=True)

    version: int = 1
    config: dict[str, Any] | None = None  # of LoRAConfig
    scaling: dict[str, FiniteFloat] = {}  # learned scales, by path; the file's B has them folded in
    start: bool = False  # the second half of the file's ranks is the frozen start, with B negated
    base: dict[str, LayerPrint] = {}  # fingerprint

    def lora(self, source: object) -> LoRAConfig | None:
        """The config that the adapter was trained with. Raises FormatError."""
        try:
            return None if self.config is None else LoRAConfig(**self.config)
        except REFUSALS as error:
            raise FormatError(f"{source}: its tailora metadata: {error}") from None


def parse(text: str | None, source: object) -> Notes:
    """Raises FormatError for metadata that is not ours."""
    try:
        return Notes() if text is None else Notes.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"{source}: its tailora metadata is damaged: {where}: {first['msg']}") from None
