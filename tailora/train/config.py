"""Every setting of a run: the one schema of `--config run.yaml`, of the flags and of Python. Needs no torch."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from tailora.core.config import AdaLoRA, LoRAConfig, Start, StrictModel
from tailora.errors import ConfigError, listing

Quantize = Literal["nf4", "fp4", "int8", "torchao-int8", "torchao-int4"]
COUNT = 2**31  # above any count that makes sense, and well below what numpy and torch can hold
REMOVED = {"prefix_cache_gb"}  # settings of earlier versions, which changed the speed of a run and not its results


def without_removed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings that an earlier version wrote down, without those that no longer exist."""
    return {name: value for name, value in settings.items() if name not in REMOVED}


class TrainConfig(StrictModel):
    """A training run. Adapter fields are those of `LoRAConfig`; the rest carry the field's usual names."""

    model_config = ConfigDict(allow_inf_nan=False)

    # what
    model: str = Field("demo", description="Hugging Face folder or Hub id, or 'demo'")
    data: str = Field("demo", description="JSONL, JSON, CSV, Parquet, folder or Hub id, or 'demo'")
    eval_data: str | None = Field(None, description="held-out data; without it a part of --data is held out")
    output_dir: str = Field("outputs/run", description="folder for adapter, checkpoints, metrics")
    adapter: str | None = Field(None, description="go on from this adapter folder instead of a new one")
    method: Literal["lora", "full"] = Field("lora", description="an adapter, or all weights of the model")
    # adapter
    r: int = Field(16, ge=1, lt=COUNT, description="rank of the update")
    lora_alpha: float = Field(32, gt=0, description="scale is alpha/r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of A")
    target_modules: list[str] | str = Field("all-linear", description="names, one regular expression, all-linear, none")
    target_parameters: list[str] | None = Field(None, description="matrices without a layer: experts.down_proj")
    exclude_modules: list[str] | str | None = Field(None, description="taken away from the targets")
    layers_to_transform: list[int] | None = Field(None, description="only these layer indices")
    rank_pattern: dict[str, int] = Field({}, description="pattern -> r")
    alpha_pattern: dict[str, float] = Field({}, description="pattern -> alpha")
    modules_to_save: list[str] | None = Field(None, description="modules trained whole")
    use_rslora: bool = Field(False, description="scale alpha/sqrt(r)")
    use_dora: bool = Field(False, description="train the norm of every output row (DoRA)")
    lora_bias: bool = Field(False, description="a bias beside B")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="biases of the base to train")
    trainable_token_indices: list[int] | None = Field(None, description="rows of the embedding to train: new tokens")
    learn_scaling: bool = Field(False, description="train the scale of every layer")
    init_lora_weights: Start = Field("kaiming", description="start of A and B, from weights or data; see docs")
    target_r: int | None = Field(None, ge=1, lt=COUNT, description="AdaLoRA: average rank to end with, from r")
    tinit: int | None = Field(None, ge=0, lt=COUNT, description="AdaLoRA: steps before ranks go; a tenth")
    tfinal: int | None = Field(None, ge=0, lt=COUNT, description="AdaLoRA: steps after the last goes; three tenths")
    deltaT: int = Field(1, ge=1, lt=COUNT, description="AdaLoRA: steps between allocations")
    beta1: float = Field(0.85, ge=0, lt=1, description="AdaLoRA: smoothing of the sensitivity")
    beta2: float = Field(0.85, ge=0, lt=1, description="AdaLoRA: smoothing of its uncertainty")
    orth_reg_weight: float = Field(0.5, ge=0, description="AdaLoRA: weight of the penalty that keeps A, B orthonormal")
    init_batches: int = Field(4, ge=1, lt=COUNT, description="batches that lora_ga, lora_one and eva start from")
    # data
    field: dict[str, str] = Field({}, description="rename columns: prompt=question")
    max_length: int = Field(1024, ge=8, lt=COUNT, description="tokens; longer examples are cut and counted")
    validation_split: float = Field(0.05, ge=0, lt=1, description="share of the rows held out")
    split_seed: int | None = Field(None, ge=0, lt=2**63, description="which rows are held out; without it, --seed")
    packing: Literal["auto", "on", "off"] = Field("auto", description="several examples per row, attention isolated")
    streaming: bool = Field(False, description="read the data while training; needs --max-steps")
    # optimisation
    learning_rate: float = Field(5e-4, gt=0, description="peak learning rate")
    loraplus_lr_ratio: float = Field(1.0, ge=1, description="LoRA+: times the learning rate, for B")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field("cosine", description="after warm-up")
    warmup_ratio: float = Field(0.05, ge=0, le=1, description="share of the steps spent warming up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW decay; 0 for LoRA")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping")
    max_steps: int | None = Field(None, ge=1, lt=COUNT, description="stop after this many steps")
    num_train_epochs: float = Field(1.0, gt=0, le=1e6, description="passes over the data, unless --max-steps")
    per_device_train_batch_size: int = Field(8, ge=1, lt=COUNT, description="examples per forward")
    gradient_accumulation_steps: int = Field(1, ge=1, lt=COUNT, description="forwards per step")
    gradient_checkpointing: bool = Field(False, description="less memory, about a third more time")
    fast: Literal["auto", "off"] = Field("auto", description="kernels that keep the result, chosen and verified")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of the base; adapters are float32")
    quantize: Quantize | None = Field(None, description="how to store the base")
    seed: int = Field(0, ge=0, lt=2**63, description="data order, start of A, dropout")
    # evaluation and files
    eval_steps: int = Field(0, ge=0, lt=COUNT, description="evaluate every N steps; 0: before and after only")
    early_stopping_patience: int = Field(0, ge=0, lt=COUNT, description="stop after N without gain; 0: never")
    save_steps: int = Field(0, ge=0, lt=COUNT, description="checkpoint every N steps; 0: never")
    save_total_limit: int = Field(2, ge=1, lt=COUNT, description="checkpoints kept beside the best")
    samples: int = Field(3, ge=0, lt=COUNT, description="held-out prompts answered before and after")
    report_to: list[str] = Field([], description="tensorboard, wandb, trackio")
    resume_from_checkpoint: str | None = Field(None, description="checkpoint folder, or 'latest'")

    @model_validator(mode="before")
    @classmethod
    def _drop_removed(cls, values: Any) -> Any:
        return without_removed(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        """Every contradiction between settings, in one complaint."""
        held_out = bool(self.eval_data) or (self.validation_split > 0 and not self.streaming)
        of_adapter = (*LoRAConfig.model_fields, *AdaLoRA.model_fields)
        changed = [name for name in of_adapter if name in self.model_fields_set and self._differs(name)]
        idle = [name for name in changed if name in AdaLoRA.model_fields]
        rules = [
            (self.streaming and self.max_steps is None, "streaming reads without end: give --max-steps"),
            (
                self.early_stopping_patience and not self.eval_steps,
                "early stopping counts evaluations: give --eval-steps",
            ),
            (
                self.eval_steps and not held_out,
                "eval_steps needs held-out data: give --eval-data or --validation-split",
            ),
            (
                self.method == "full" and (changed or self.adapter),
                f"--method full has no adapter: leave out {', '.join(changed or ['adapter'])}",
            ),
            (
                self.method == "full" and "learning_rate" not in self.model_fields_set,
                "--method full needs a --learning-rate of its own, about a tenth of LoRA's: 5e-5, say",
            ),
            (
                self.method == "full" and self.loraplus_lr_ratio != 1,
                "loraplus_lr_ratio is the rate of B, which --method full has not: leave it out",
            ),
            (
                self.method == "full" and self.quantize,
                "--method full trains the weights, which cannot be quantised: leave --quantize out",
            ),
            (
                self.target_r is None and idle,
                f"{', '.join(idle)} belong to AdaLoRA: give --target-r",
            ),
            (self.adapter and changed, f"--adapter brings its own {', '.join(changed)}: leave them out"),
        ]
        if problems := [text for broken, text in rules if broken]:
            raise ConfigError(listing(problems))
        return self

    def _differs(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def lora(self) -> LoRAConfig:
        shared = LoRAConfig.model_fields.keys() & type(self).model_fields.keys()
        allocation = {name: getattr(self, name) for name in AdaLoRA.model_fields}
        adalora = None if self.target_r is None else AdaLoRA(**allocation)
        return LoRAConfig(**{name: getattr(self, name) for name in shared}, adalora=adalora)
