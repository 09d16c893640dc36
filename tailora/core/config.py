"""The settings of an adapter: rank, scale, targets. The names are PEFT's."""

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tailora.core.setting_names import OUR_NAMES, suggestion, without_removed
from tailora.errors import ConfigError, listing

MAX_SHOWN = 200  # characters of an invalid value in a message
TaskType = Literal["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
Init = Annotated[
    Literal["kaiming", "gaussian", "pissa", "olora", "eva"],
    BeforeValidator(lambda value: "kaiming" if value is True else value),  # as in PEFT
]


LAYER_RANGE = re.compile(r"(\d{1,4})-(\d{1,4})")
MOST_LAYERS = 100_000  # a hostile file could list ranges without end


def layer_numbers(value: Any) -> Any:
    """Expands ranges as written by `plan`: "20-22", ["0", "20-22"] or "{20-22}"."""
    numbers: list[Any] = []
    for item in value if isinstance(value, list) else [value]:
        text = str(item).strip("{}")
        match = LAYER_RANGE.fullmatch(text)
        numbers += range(int(match[1]), int(match[2]) + 1) if match else [text]
        if len(numbers) > MOST_LAYERS:
            raise ValueError(f"expected at most {MOST_LAYERS:,} layer numbers")
    return numbers if isinstance(value, list | str) else value


class StrictModel(BaseModel):
    """A frozen pydantic model that raises one `ConfigError` with all problems and suggests similar names."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**without_removed(values, type(self).model_fields))
        except ValidationError as error:
            raise ConfigError(listing([_explain(problem, type(self)) for problem in error.errors()])) from None

    def replaced(self, **changes: Any) -> Self:
        """Returns a validated copy with some fields changed. Unset fields stay unset."""
        return type(self)(**{**self.model_dump(exclude_unset=True), **changes})


def _explain(problem: Any, model: type[BaseModel]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        ours, _, value = OUR_NAMES.get(name, "").partition(" ")
        if value and problem["input"] is False:
            return f"unknown setting {name!r}; remove it ({ours}: {value} enables this, and it is disabled by default)"
        return f"unknown setting {name!r}{suggestion(name, model.model_fields)}"
    shown = repr(problem["input"])
    if len(shown) > MAX_SHOWN:
        shown = f"{shown[: MAX_SHOWN // 2]}... ({len(shown):,} characters)"
    message = problem["msg"].removeprefix("Value error, ")  # pydantic's prefix for our validators
    message = message.partition(", unable to parse string")[0]  # redundant
    return f"{name} = {shown}: {message[:1].lower()}{message[1:]}" if name else message


def scaling_divisor(r: int, use_rslora: bool) -> float:
    """What alpha is divided by: r (arXiv:2106.09685, sec. 4.1), or sqrt(r) (rsLoRA, arXiv:2312.03732, thm. 3.2)."""
    return math.sqrt(r) if use_rslora else r


ALL_LINEAR, LANGUAGE_MODEL = "all-linear", "language-model"  # words of target_modules
ALL_LAYERS = (ALL_LINEAR, LANGUAGE_MODEL)


class LoRAConfig(StrictModel):
    """The settings of one adapter.

    r: rank of the update, at most min(in, out) of the layer. Smaller layers selected by "all-linear" or a regular
        expression get a lower rank at the same scale (see `core.targets.with_fitting_ranks`).
    lora_alpha: alpha. The update is scaled by alpha / r, or by alpha / sqrt(r) with `use_rslora` (arXiv:2312.03732).
    lora_dropout: dropout probability for the inputs of A in training.
    target_modules: layers to adapt: names (exact, or the end of a path after a dot), one regular expression that must
        match the full path, "all-linear" (every linear layer except the output head and subclasses that do not
        compute W x + b), or "language-model" (the linear layers of the language model; for other models, the same as
        "all-linear").
    exclude_modules: layers to exclude, in the same formats.
    layers_to_transform: adapt only layers with these indices. As in PEFT, the index is the first number in the path
        after at least two names. Layers whose full path is in `target_modules` are always adapted.
    layers_pattern: name (or names) of the list of layers to which `layers_to_transform` refers. With "blocks", the
        index of `blocks.3.experts.2.proj` is 3; without it, the index would be 2.
    rank_pattern, alpha_pattern: regular expression -> value; matches like `(.*\\.)?KEY$`, the first match wins.
    target_parameters: names of parameters that a module uses without a layer, such as the stacked weights of experts
        (`["experts.gate_up_proj", "experts.down_proj"]`). A name is a path or its end after a dot. The weight of a
        linear layer (`"mlp.down_proj.weight"`) selects the layer.
    fused_parts: pattern -> sizes of the parts of a fused layer in the order of its output rows, repeated until all
        rows are used: `{"to_qkv": {"q": 64, "k": 64, "v": 64}}`. Each part is a target: `target_modules=["to_qkv.q"]`.
        Not needed for the classes in `core.fused_layers.LAYOUTS` (GPT-2, GPT-NeoX, Falcon, Phi-3, ...).
    modules_to_save: modules to train in full and save with the adapter: ends of their paths, as in PEFT. With
        a word for all layers, None selects the heads that transformers adds to a base model for classification and
        question answering (classifier, score, ...).
    trainable_token_indices: ids of tokens whose embeddings are trained, such as new tokens: a list of ids for the input
        embedding, or a dict from an embedding's name to ids. If the output head is tied to the embedding, it changes,
        too. As in torch and PEFT, the row of the padding token gets no gradient from the embedding.
    bias: which biases of the base model to train, as copies that belong to the adapter: "none", only in adapted layers
        ("lora_only"), or in all layers ("all").
    lora_bias: adds a trained bias to the update.
    use_dora: trains the magnitude of every output row of the adapted weight (DoRA, arXiv:2402.09353).
    learn_scaling: trains the scale of every layer, starting from the scale that `lora_alpha` sets.
    init_lora_weights: initialization of A and B. kaiming (or True, as in PEFT) and gaussian: A is random and B zero.
        pissa and olora: from the weights of the base model. eva: from training data, with
        `LoRAModel.start_from_data`. The weights of the base model never change.
    task_type: PEFT's name or TaskType of the task. "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS" add the model's head to
        modules_to_save, whatever the targets are. PEFT uses the saved task to choose the class that loads the adapter.
        The default depends on the base model's class.
    """

    r: int = Field(16, ge=1)
    lora_alpha: float = Field(32, gt=0, allow_inf_nan=False)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | str = ALL_LINEAR
    exclude_modules: list[str] | str | None = None
    layers_to_transform: Annotated[list[int] | int | None, BeforeValidator(layer_numbers)] = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    target_parameters: list[str] | None = None
    fused_parts: dict[str, dict[str, Annotated[int, Field(ge=1)]]] = {}
    modules_to_save: list[str] | None = None
    trainable_token_indices: dict[str, list[int]] | list[int] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    learn_scaling: bool = False
    init_lora_weights: Init = "kaiming"
    task_type: Annotated[TaskType | None, BeforeValidator(lambda task: getattr(task, "value", task))] = None

    def alpha_at_rank(self, lora_alpha: float, r: int, new_r: int) -> float:
        """Returns the alpha that keeps the scale of `lora_alpha` and r at a different rank."""
        return lora_alpha * (scaling_divisor(new_r, self.use_rslora) / scaling_divisor(r, self.use_rslora))

    @property
    def layers_patterns(self) -> list[str]:
        """Returns `layers_pattern` as a list; [] matches any name."""
        return [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []

    @property
    def layer_indices(self) -> set[int] | None:
        """Returns `layers_to_transform` as a set; None means all layers."""
        indices = self.layers_to_transform
        return {indices} if isinstance(indices, int) else None if indices is None else set(indices)

    @field_validator(
        "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "fused_parts", "layers_pattern"
    )
    @classmethod
    def _check_regular_expressions(cls, value: Any, info: ValidationInfo) -> Any:
        holds_patterns = isinstance(value, dict) or (info.field_name == "layers_pattern" and value is not None)
        for pattern in [value] if isinstance(value, str) else value if holds_patterns else []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return value

    @field_validator("trainable_token_indices")
    @classmethod
    def _check_token_ids(cls, value: Any) -> Any:
        for indices in value.values() if isinstance(value, dict) else [value] if value is not None else []:
            if not indices or len(set(indices)) < len(indices) or min(indices) < 0:
                raise ValueError("expected one or more distinct token ids >= 0")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.layers_patterns and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform; set both")
        if self.use_dora and self.lora_bias:
            raise ValueError(
                "lora_bias cannot be combined with use_dora, because no tool can load both; use bias='lora_only' "
                "instead"
            )
        return self
