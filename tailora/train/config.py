"""Every setting of a run: the one schema of `--config run.yaml`, of the flags and of Python. Needs no torch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from tailora.core.config import VALUES_OF_OTHER_TOOLS, AdaLoRA, Init, LoRAConfig, StrictModel, TaskType, layer_numbers
from tailora.errors import ConfigError, listing

PreferenceLoss = Literal["dpo", "ipo", "simpo", "orpo", "kto"]
Quantize = Literal["nf4", "fp4", "int8", "torchao-int8", "torchao-int4"]
SHARDED_QUANTIZE = ("nf4", "fp4")  # which FSDP2 can shard: it would lose the scales of the others with the whole weight
NATS_PER_TOKEN = "nats per token"  # the unit of a language model's loss
COUNT = 2**31  # above any count that makes sense, and well below what numpy and torch can hold
PositiveInt = Annotated[int, Field(ge=1, lt=COUNT)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=COUNT)]
Packing = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(lambda value: ("on" if value else "off") if isinstance(value, bool) else value),  # as in TRL
]
PREFERENCE_FIELDS = ("loss", "beta", "label_smoothing", "simpo_gamma", "sft_weight")
FEW_STEPS = 24  # a run with fewer is short: at the usual learning rates it changes little
ACCUMULATION = "gradient_accumulation_steps"
TASK_TYPES: dict[str, TaskType] = {  # of tasks with a head for labels
    "sequence-classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
}
LANGUAGE_MODELS = ("auto", "causal-lm", "preference")  # tasks
ADAPTER_FIELDS = (*LoRAConfig.model_fields, *AdaLoRA.model_fields)
# settings that have an effect only with these values of another one; True: if that is given, False: if it is not
COMBINATIONS: tuple[tuple[Sequence[str], str, tuple[str | None, ...] | bool], ...] = (
    (PREFERENCE_FIELDS, "task", ("auto", "preference")),
    (("class_weights",), "task", ("sequence-classification", "token-classification")),
    (("system", "assistant_only_loss", "completion_only_loss", "fsdp"), "task", LANGUAGE_MODELS),
    (("streaming",), "task", (*LANGUAGE_MODELS, "seq2seq")),  # the others read all labels before the model is loaded
    (("label_smoothing",), "loss", (None, "dpo", "simpo")),
    (("simpo_gamma",), "loss", ("simpo",)),
    (("activation_memory",), "fast", ("auto", "compile")),
    ((*ADAPTER_FIELDS, "adapter", "loraplus_lr_ratio", "quantize"), "method", ("lora",)),
    (("streaming",), "max_steps", True),  # it reads without end
    (("skip_bad_rows",), "streaming", False),
    (("early_stopping_patience",), "eval_steps", True),
    (("fsdp_reshard_after_forward", "fsdp_offload_params"), "fsdp", True),
    (tuple(AdaLoRA.model_fields), "target_r", True),
    (("optim",), "target_r", False),  # AdaLoRA reads the steps of torch's AdamW
)


def batches_per_step(settings: Mapping[str, Any], processes: int) -> int:
    """Returns how many batches all processes of a run compute in a step. settings: of `TrainConfig`, all or some."""
    return int(settings.get(ACCUMULATION, 1)) * processes


class TrainConfig(StrictModel):
    """A training run. Adapter fields are those of `LoRAConfig`; the others have their usual names."""

    model_config = ConfigDict(allow_inf_nan=False)

    # what
    model: str = Field("demo", description="model to train: Hugging Face folder or Hub id, or 'demo'")
    data: list[str] | str = Field(
        "demo",
        description="training data: JSONL, JSON, CSV, Parquet, text, folder or Hub id, or 'demo'; may be given several "
        "times, as DATA=WEIGHT with the passes over it in an epoch",
    )
    eval_data: str | None = Field(None, description="held-out data; by default a part of --data (--validation-split)")
    output_dir: str = Field("outputs/run", description="folder for the adapter, checkpoints and metrics")
    adapter: str | None = Field(None, description="folder of an adapter to train further, instead of a new one")
    method: Literal["lora", "full"] = Field("lora", description="train an adapter (lora) or all weights (full)")
    # task
    task: Literal[
        "auto", "causal-lm", "preference", "sequence-classification", "regression", "token-classification", "seq2seq"
    ] = Field("auto", description="what to learn; auto: found from the rows, causal-lm or preference")
    class_weights: dict[str, float] | Literal["balanced"] | None = Field(
        None,
        description="weight of each class in the loss of classification: LABEL=WEIGHT,..., or balanced",
    )
    loss: PreferenceLoss | None = Field(
        None, description="loss of preferences; default: dpo for pairs of replies, kto for single ones"
    )
    beta: float | None = Field(
        None,
        gt=0,
        description="weight of the reward in the loss of preferences; default 0.1, of simpo 2; "
        'see "Preferences" in the docs',
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="dpo and simpo: assumed share of pairs whose replies are interchanged"
    )
    simpo_gamma: float = Field(1.0, ge=0, description="simpo: margin by which the chosen reward should be larger")
    sft_weight: float = Field(
        0.0, ge=0, description="weight of the loss per token of the chosen reply, added to that of preferences"
    )
    # adapter
    r: PositiveInt = Field(16, description="rank of the update")
    lora_alpha: float = Field(32, gt=0, description="the update is scaled by alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability of the input of A")
    target_modules: list[str] | str = Field(
        "all-linear", description="layers to adapt: names, one regular expression, all-linear, or none"
    )
    target_parameters: list[str] | None = Field(
        None, description="parameters to adapt that are no layer's weight, such as experts.down_proj"
    )
    exclude_modules: list[str] | str | None = Field(
        None, description="layers to leave out of the targets: names or one regular expression"
    )
    layers_to_transform: Annotated[list[int] | None, BeforeValidator(layer_numbers)] = Field(
        None, description="adapt only layers with these indices, such as 0,20-29"
    )
    rank_pattern: dict[str, int] = Field({}, description="rank of the layers that match a pattern: PATTERN=RANK")
    alpha_pattern: dict[str, float] = Field({}, description="alpha of the layers that match a pattern: PATTERN=ALPHA")
    modules_to_save: list[str] | None = Field(
        None, description="modules to train in full and save with the adapter, such as lm_head"
    )
    use_rslora: bool = Field(False, description="rank-stabilised LoRA: scale by alpha / sqrt(r)")
    use_dora: bool = Field(False, description="DoRA: also train the magnitude of every output row")
    lora_bias: bool = Field(False, description="add a trained bias to the update")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which biases of the base model to train")
    trainable_token_indices: list[int] | None = Field(
        None, description="token ids whose embeddings to train, such as new tokens"
    )
    learn_scaling: bool = Field(False, description="train the scale of every layer")
    init_lora_weights: Init = Field(
        "kaiming", description='initialisation of A and B; see "Settings of an adapter" in the docs'
    )
    target_r: int | None = Field(
        None, ge=1, lt=COUNT, description="AdaLoRA: average rank at the end of training; ranks start at --r"
    )
    tinit: int | None = Field(
        None, ge=0, lt=COUNT, description="AdaLoRA: steps before ranks are reduced; default: 10% of the steps"
    )
    tfinal: int | None = Field(
        None, ge=0, lt=COUNT, description="AdaLoRA: steps with the final ranks; default: 30% of the steps"
    )
    deltaT: PositiveInt = Field(1, description="AdaLoRA: steps between two allocations of ranks")
    beta1: float = Field(0.85, ge=0, lt=1, description="AdaLoRA: smoothing of the sensitivity")
    beta2: float = Field(0.85, ge=0, lt=1, description="AdaLoRA: smoothing of the uncertainty")
    orth_reg_weight: float = Field(0.5, ge=0, description="AdaLoRA: weight of the penalty keeping A and B orthonormal")
    init_batches: PositiveInt = Field(4, description="batches for the initialisation eva")
    # data
    field: dict[str, str] = Field({}, description="columns of the data: prompt=COLUMN,completion=COLUMN")
    system: str | None = Field(None, description="system message of conversations that have none")
    assistant_only_loss: bool | None = Field(
        None, description="learn only the replies of conversations; default: yes, and with 'no' all of them"
    )
    completion_only_loss: bool | None = Field(
        None, description="learn only completions, not their prompts; default: yes, and with 'no' both"
    )
    documents: Literal["isolated", "concatenated"] = Field(
        "isolated",
        description="plain texts: each in examples of its own, or all joined; both are cut every --max-length tokens",
    )
    max_length: int = Field(
        1024, ge=8, lt=COUNT, description="longest example in tokens; longer ones are truncated and counted"
    )
    validation_split: float = Field(0.05, ge=0, lt=1, description="share of the examples that is held out")
    split_seed: int | None = Field(None, ge=0, lt=2**63, description="seed for the held-out examples; default: --seed")
    packing: Packing = Field("auto", description="put several examples into one row; attention stays within each")
    skip_bad_rows: bool = Field(
        False, description="leave out rows that cannot be used, and write them to skipped-rows.jsonl with the reasons"
    )
    streaming: bool = Field(False, description="read the data while training, without loading it; needs --max-steps")
    # optimisation
    learning_rate: float = Field(5e-4, gt=0, description="peak learning rate")
    loraplus_lr_ratio: float = Field(1.0, ge=1, description="LoRA+: learning rate of B, relative to --learning-rate")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="learning rate schedule after the warm-up"
    )
    warmup_ratio: float = Field(0.05, ge=0, le=1, description="share of the steps in which the learning rate rises")
    optim: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="optimizer; adamw_8bit: AdamW of bitsandbytes with moments of one byte, for --method full"
    )
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="the gradient is clipped to this norm")
    max_steps: int | None = Field(None, ge=1, lt=COUNT, description="optimizer steps; overrides --num-train-epochs")
    num_train_epochs: float = Field(1.0, gt=0, le=1e6, description="number of passes over the data")
    per_device_train_batch_size: PositiveInt = Field(8, description="examples per forward pass")
    gradient_accumulation_steps: PositiveInt = Field(1, description="forward passes per optimizer step")
    gradient_checkpointing: bool = Field(False, description="less memory for activations, about a third more time")
    fast: Literal["auto", "compile", "off"] = Field(
        "auto",
        description="faster kernels, where verified to give the same results; compile: compiled layers in any case",
    )
    activation_memory: float = Field(
        1.0, gt=0, le=1, description="share of the activations that compiled layers keep; the rest is computed again"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of the base model; adapters are float32"
    )
    quantize: Quantize | None = Field(None, description="quantization of the base model")
    device: str = Field(
        "auto", description="device to run on: auto (a GPU if there is one), cpu, cuda, cuda:1, mps, xpu"
    )
    fsdp: bool = Field(False, description="shard the base model over the processes (FSDP2)")
    fsdp_reshard_after_forward: bool = Field(
        True, description="FSDP2: free gathered weights between forward and backward"
    )
    fsdp_offload_params: bool = Field(
        False, description="FSDP2: keep sharded weights in host memory; each layer is copied to the device when it runs"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of data order, initialisation and dropout")
    # evaluation and files
    eval_steps: NonNegativeInt = Field(0, description="evaluate every N steps; 0: only before and after training")
    early_stopping_patience: NonNegativeInt = Field(
        0, description="stop after N evaluations without improvement; 0: never"
    )
    save_steps: int | None = Field(
        None,
        ge=0,
        lt=COUNT,
        description="save a checkpoint every N steps; 0: never; default: every ten minutes, with --method full never",
    )
    save_total_limit: PositiveInt = Field(2, description="checkpoints to keep besides the best one")
    samples: NonNegativeInt = Field(
        3, description="answer the prompts of the first N held-out examples before and after training"
    )
    passport: Literal["base", "held-out", "none"] = Field(
        "none",
        description="write the adapter's passport.json right after training, with prompts that the base model answers, "
        "or with held-out data; by default `tailora verify` and `tailora export` write it when it is needed",
    )
    report_to: list[str] = Field([], description="trackers to log to: tensorboard, wandb, trackio")
    resume_from_checkpoint: str | None = Field(None, description="checkpoint folder to resume from, or 'latest'")

    @field_validator("adapter")
    @classmethod
    def _is_no_method(cls, adapter: str | None) -> str | None:
        meaning = VALUES_OF_OTHER_TOOLS.get(f"adapter: {adapter}")
        if adapter is not None and meaning and not Path(adapter).exists():
            raise ValueError(meaning)
        return adapter

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        """Raises ConfigError with all contradictions between settings."""
        full = self.method == "full"
        held_out = bool(self.eval_data) or (self.validation_split > 0 and not self.streaming)
        weights = self.class_weights.values() if isinstance(self.class_weights, dict) else ()
        adapter_settings = self.adapter and ", ".join(self.changed(ADAPTER_FIELDS))
        rules = [
            (
                self.gradient_checkpointing and (self.fast == "compile" or self.activation_memory < 1),
                "--gradient-checkpointing excludes compiled layers: leave it out, and use --activation-memory 0.4",
            ),
            (
                self.streaming and isinstance(self.data, list) and len(self.data) > 1,
                "streaming reads one source: join the files in a folder, or leave out --streaming",
            ),
            (not all(0 < weight < math.inf for weight in weights), "class_weights: every weight must be above 0"),
            (
                self.eval_steps and not held_out,
                "eval_steps needs held-out data: give --eval-data or --validation-split",
            ),
            (
                full and "learning_rate" not in self.model_fields_set,
                "--method full needs its own --learning-rate: give a lower one than LoRA's, such as 5e-5",
            ),
            (
                self.fsdp and self.quantize and self.quantize not in SHARDED_QUANTIZE,
                f"--fsdp shards no base in {self.quantize}, whose scales it would lose: take --quantize nf4 or fp4",
            ),
            (
                self.optim == "adamw_8bit" and self.fsdp and full,
                "--fsdp shards the moments of --method full, which adamw_8bit keeps in blocks: leave --optim out",
            ),
            (
                self.fsdp_offload_params and (full or self.quantize),
                "fsdp_offload_params is for frozen weights that are not quantised: leave it out",
            ),
            (adapter_settings, f"--adapter brings its own {adapter_settings}: leave them out"),
        ]
        problems = [message for is_broken, message in rules if is_broken]
        for settings, other, allowed in COMBINATIONS:
            value, given = getattr(self, other), ", ".join(self.changed(settings))
            flag = f"--{other.replace('_', '-')}"
            if isinstance(allowed, tuple):
                names = " or ".join(str(name) for name in allowed if name not in ("auto", None))
                fits, needed = value in allowed, f"only for {flag} {names}, not {value or 'the default'}; change"
            else:
                needed = f"only with {flag}; give" if allowed else f"not with {flag}; leave out"
                fits = bool(value) == allowed
            if given and not fits:
                problems.append(f"{given}: {needed} {flag}, or leave out {given}")
        if problems:
            raise ConfigError(listing(problems))
        return self

    def changed(self, names: Iterable[str]) -> list[str]:
        """Returns the names of those settings that do not have their default."""
        fields = type(self).model_fields
        return [name for name in names if name in fields and getattr(self, name) != fields[name].default]

    def preference_settings(self) -> list[str]:
        """Returns the names of those settings for preferences that are not the default."""
        return self.changed(PREFERENCE_FIELDS)

    def lora(self) -> LoRAConfig:
        shared = LoRAConfig.model_fields.keys() & type(self).model_fields.keys()
        allocation = {name: getattr(self, name) for name in AdaLoRA.model_fields}
        adalora = None if self.target_r is None else AdaLoRA(**allocation)
        task_type = "SEQ_2_SEQ_LM" if self.task == "seq2seq" else TASK_TYPES.get(self.task)
        return LoRAConfig(**{name: getattr(self, name) for name in shared}, adalora=adalora, task_type=task_type)
