"""Tailora's own fields of an adapter file: JSON under one key of the safetensors metadata. Other tools ignore it."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from tailora.core.config import LoRAConfig, with_known_init
from tailora.errors import ConfigError, FormatError

METADATA_KEY = "tailora"
# What LoRAConfig raises for values from a file. The last two come from the compiler of regular expressions.
CONFIG_ERRORS = (ConfigError, TypeError, RecursionError, OverflowError)


class LayerFingerprint(BaseModel):
    """Shape and evenly spaced values of one weight of the base.

    spread: how far each value may be from the one before quantisation; [] for a weight that is not quantised.
    storage: how the weight is stored, such as "nf4"; "base" in the file.
    """

    model_config = ConfigDict(populate_by_name=True)

    shape: list[int]
    weights: list[float]
    spread: list[FiniteFloat] = []
    storage: str = Field(default="plain", alias="base")


class AdapterMetadata(BaseModel):
    """What PEFT has no field for; empty for a file that another tool wrote.

    config: the settings of LoRAConfig.
    scaling: learned scales by path; the file's B has them folded in.
    start: whether the second half of the ranks is the frozen start, with B negated.
    base: fingerprint of the base model by path.
    vocabulary: rows of the base model's input embedding; None for a model without one.
    saved_modules: paths of the modules that were trained in full; None in files of before it was stored.
    base_folder: absolute path of the base model, whose name in adapter_config.json is a relative path.
    label_names, problem_type: of the base model's head for labels, as in its config; None for other models.
    """

    model_config = ConfigDict(frozen=True)

    version: int = 1
    config: dict[str, Any] | None = None
    scaling: dict[str, FiniteFloat] = {}
    start: bool = False
    base: dict[str, LayerFingerprint] = {}
    vocabulary: int | None = None
    saved_modules: list[str] | None = None
    base_folder: str | None = None
    label_names: list[str] | None = None
    problem_type: str | None = None

    def to_json(self) -> str:
        """The same for the same adapter: read from a file, it has its layers in another order than the model."""
        in_order = {"base": dict(sorted(self.base.items())), "scaling": dict(sorted(self.scaling.items()))}
        return self.model_copy(update=in_order).model_dump_json(by_alias=True)

    def lora_config(self, source: object) -> LoRAConfig | None:
        """Returns the config that the adapter was trained with; None if it is not stored. Raises FormatError."""
        try:
            return None if self.config is None else LoRAConfig(**with_known_init(self.config))
        except CONFIG_ERRORS as error:
            raise FormatError(f"{source}: its tailora metadata: {error}") from None


def parse_metadata(text: str | None, source: object) -> AdapterMetadata:
    """Reads the JSON of METADATA_KEY; None gives empty metadata. Raises FormatError if it is damaged."""
    try:
        return AdapterMetadata() if text is None else AdapterMetadata.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"{source}: its tailora metadata is damaged: {field}: {first['msg']}") from None
