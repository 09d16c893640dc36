"""Every setting of a run: the one schema of `--config run.yaml`, of the flags and of Python. Needs no torch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from tailora.core.config import (
    LANGUAGE_MODEL,
    Init,
    LoRAConfig,
    StrictModel,
    TaskType,
    layer_numbers,
)
from tailora.core.setting_names import VALUES_OF_OTHER_TOOLS
from tailora.errors import ConfigError, listing

LabelTask = Literal["sequence-classification", "regression", "token-classification"]
GRPO = "grpo"  # task: reinforcement learning
JUDGE = "judge"  # --metric judge:URL: a language model
PreferenceLoss = Literal["dpo", "ipo", "simpo", "orpo", "kto"]
GRPOLoss = Literal["grpo", "dr_grpo", "dapo", "rloo"]
Quantize = Literal["nf4", "int8"]
NATS_PER_TOKEN = "nats per token"  # the unit of a language model's loss
PER_EXAMPLE = "per example"  # the unit of losses of preferences
REWARD = "reward"  # the unit of reinforcement learning, whose loss of held-out prompts is minus their reward
COUNT = 2**31  # above any count that makes sense, and well below what numpy and torch can hold
PositiveInt = Annotated[int, Field(ge=1, lt=COUNT)]
AUTO = BeforeValidator(lambda value: None if value == "auto" else value)
NonNegativeInt = Annotated[int, Field(ge=0, lt=COUNT)]
Packing = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(lambda value: ("on" if value else "off") if isinstance(value, bool) else value),  # as in TRL
]
PREFERENCE_FIELDS = ("loss", "beta", "label_smoothing", "simpo_gamma", "sft_weight")
GRPO_FIELDS = (
    *("reward", "num_generations", "temperature", "epsilon", "epsilon_high", "num_iterations"),
    *("mask_truncated_completions", "scale_rewards"),
)
FEW_STEPS = 24  # at the usual learning rates, a run with fewer steps changes little
ACCUMULATION = "gradient_accumulation_steps"
TASK_TYPES: dict[str, TaskType] = {  # tasks with a head for labels
    "sequence-classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
}
LANGUAGE_MODELS = ("auto", "causal-lm", "preference")  # tasks
ADAPTER_FIELDS = tuple(LoRAConfig.model_fields)
# settings that need certain values of another setting; True: it must be set, False: it must not be set
COMBINATIONS: tuple[tuple[Sequence[str], str, tuple[str | None, ...] | bool], ...] = (
    (("loss", "beta"), "task", ("auto", "preference", GRPO)),
    (("label_smoothing", "simpo_gamma", "sft_weight"), "task", ("auto", "preference")),
    (GRPO_FIELDS, "task", (GRPO,)),
    (("class_weights",), "task", ("sequence-classification", "token-classification")),
    (("system",), "task", (*LANGUAGE_MODELS, GRPO)),
    (("assistant_only_loss", "completion_only_loss", "fsdp"), "task", LANGUAGE_MODELS),
    (("streaming",), "task", LANGUAGE_MODELS),  # other tasks read all labels before loading the model
    (("label_smoothing",), "loss", (None, "dpo", "simpo")),
    (("simpo_gamma",), "loss", ("simpo",)),
    ((*ADAPTER_FIELDS, "adapter", "loraplus_lr_ratio", "quantize"), "method", ("lora",)),
    (("streaming",), "max_steps", True),  # a stream has no end
    (("skip_bad_rows",), "streaming", False),
    (("early_stopping_patience", "metric_for_best_model"), "eval_steps", True),
    (("metric_for_best_model",), "metric", True),
)


def batches_per_step(settings: Mapping[str, Any], processes: int) -> int:
    """Returns the number of batches in a step, over all processes. settings: fields of `TrainConfig`."""
    return int(settings.get(ACCUMULATION, 1)) * processes


class TrainConfig(StrictModel):
    """A training run. Adapter fields have the names of `LoRAConfig`, the others the names of transformers or TRL."""

    model_config = ConfigDict(allow_inf_nan=False)

    # what
    model: str = Field("demo", description="model to train: Hugging Face folder, GGUF file, Hub id, or 'demo'")
    data: list[str] | str = Field(
        "demo",
        description="training data: JSONL, JSON, CSV, Parquet or text file, folder, Hub id, or 'demo'; repeatable; "
        "DATA=WEIGHT sets the number of passes over DATA per epoch",
    )
    eval_data: str | None = Field(None, description="held-out data; default: a part of --data (see --validation-split)")
    output_dir: str = Field("outputs/run", description="folder for the adapter, checkpoints and metrics")
    adapter: str | None = Field(None, description="folder of an existing adapter to train further")
    method: Literal["lora", "full"] = Field("lora", description="train an adapter (lora) or all weights (full)")
    # task
    task: Literal["auto", "causal-lm", "preference", "grpo", LabelTask, "seq2seq"] = Field(
        "auto", description="training task; auto infers causal-lm or preference from the data"
    )
    class_weights: dict[str, float] | Literal["balanced"] | None = Field(
        None, description="class weights for the classification loss: LABEL=WEIGHT,..., or balanced"
    )
    loss: Literal[PreferenceLoss, GRPOLoss] | None = Field(
        None,
        description="preference loss; default: dpo for pairs of replies, kto for single replies. With --task grpo: "
        "grpo (default), dr_grpo, dapo or rloo",
    )
    beta: float | None = Field(
        None,
        ge=0,
        description="weight of the reward in the preference loss; default: 0.1, or 2 for simpo. With --task grpo: "
        "weight of the KL penalty; default: none",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="dpo and simpo: assumed fraction of pairs with chosen and rejected swapped"
    )
    simpo_gamma: float = Field(
        1.0, ge=0, description="simpo: target margin between the rewards of the chosen and the rejected reply"
    )
    sft_weight: float = Field(
        0.0, ge=0, description="weight of the chosen reply's per-token loss, added to the preference loss"
    )
    # reinforcement learning
    reward: list[str] = Field(
        [],
        description="grpo: reward for completions, FILE.py:FUNCTION, exact_match, contains, regex:PATTERN, "
        "json_schema:FILE, max_length:CHARACTERS, math, chrf or rouge_l; repeatable; a final =NUMBER is its weight, so "
        "write x=1 as regex:x[=]1",
    )
    reward_seconds: float = Field(60.0, gt=0, description="time limit for one call of a reward or a metric")
    num_generations: int = Field(8, ge=2, lt=COUNT, description="grpo: completions sampled for each prompt")
    temperature: float = Field(1.0, gt=0, description="grpo: temperature of sampling")
    max_completion_length: PositiveInt = Field(
        256, description="maximum tokens of a completion, and of an answer that a metric scores"
    )
    epsilon: float = Field(0.2, gt=0, description="grpo: clip the probability ratio below 1 - epsilon")
    epsilon_high: float | None = Field(
        None, gt=0, description="grpo: clip the probability ratio above 1 + epsilon_high; default: epsilon"
    )
    num_iterations: PositiveInt = Field(1, description="grpo: optimizer steps for each sample of completions")
    mask_truncated_completions: bool = Field(False, description="grpo: do not train completions without an end")
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description="grpo: divide advantages by the standard deviation of the rewards of the group or the batch, or "
        "not at all",
    )
    # adapter
    r: PositiveInt = Field(16, description="rank of the adapter")
    lora_alpha: float = Field(32, gt=0, description="alpha; the update is scaled by alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability applied to the adapter's input")
    target_modules: list[str] | str = Field(
        LANGUAGE_MODEL,
        description="layers to adapt: names, a regular expression, language-model (the linear layers of the language "
        "model; for other models, the same as all-linear), all-linear, or none",
    )
    target_parameters: list[str] | None = Field(
        None, description="parameters to adapt that are not a layer's weight, such as experts.down_proj"
    )
    exclude_modules: list[str] | str | None = Field(
        None, description="layers to exclude: names or a regular expression"
    )
    layers_to_transform: Annotated[list[int] | None, BeforeValidator(layer_numbers)] = Field(
        None, description="adapt only layers with these indices, such as 0,20-29"
    )
    rank_pattern: dict[str, int] = Field({}, description="rank of the layers that match a pattern: PATTERN=RANK")
    alpha_pattern: dict[str, float] = Field({}, description="alpha of the layers that match a pattern: PATTERN=ALPHA")
    modules_to_save: list[str] | None = Field(
        None, description="modules to train in full and save with the adapter, such as lm_head"
    )
    use_rslora: bool = Field(False, description="rank-stabilized LoRA: scale by alpha / sqrt(r)")
    use_dora: bool = Field(False, description="DoRA: also train the magnitude of every output row")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="biases of the base model to train")
    trainable_token_indices: list[int] | None = Field(
        None, description="ids of tokens whose embeddings are trained, such as new tokens"
    )
    learn_scaling: bool = Field(False, description="also train the scale of each layer's update")
    init_lora_weights: Init = Field(
        "kaiming", description='initialization of A and B; see "Settings of an adapter" in the docs'
    )
    init_batches: PositiveInt = Field(4, description="eva: batches used for the initialization")
    # data
    field: dict[str, str] = Field({}, description="column names in the data: prompt=COLUMN,completion=COLUMN")
    system: str | None = Field(None, description="system message for conversations without one")
    assistant_only_loss: bool | None = Field(
        None, description="train on the assistant's replies only (default), not on all messages"
    )
    completion_only_loss: bool | None = Field(
        None, description="train on completions only (default), not on their prompts"
    )
    documents: Literal["isolated", "concatenated"] = Field(
        "isolated",
        description="plain texts: start each text in a new example (isolated), or join all texts (concatenated); "
        "either way, examples have at most --max-length tokens",
    )
    max_length: int = Field(
        1024, ge=8, lt=COUNT, description="maximum tokens per example; longer examples are truncated and reported"
    )
    validation_split: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="fraction of the examples to hold out; default: 20 examples or 5%, whichever is more, and at most "
        "20%",
    )
    split_seed: int | None = Field(
        None, ge=0, lt=2**63, description="seed for choosing the held-out examples; default: --seed"
    )
    packing: Packing = Field(
        "auto", description="pack several examples into one row, without attention across examples"
    )
    skip_bad_rows: bool = Field(
        False, description="skip unusable rows and write them to skipped-rows.jsonl, each with the reason"
    )
    image_folder: str | None = Field(
        None, description="folder of the images that rows name; default: the folder of the data file"
    )
    streaming: bool = Field(False, description="stream the data instead of loading it first; requires --max-steps")
    # optimization
    learning_rate: Annotated[float | None, AUTO] = Field(
        None, gt=0, description="peak learning rate; default: what suits the number of examples"
    )
    loraplus_lr_ratio: float = Field(
        1.0, ge=1, description="LoRA+: learning rate of B as a multiple of --learning-rate"
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="learning rate schedule after warm-up"
    )
    warmup_ratio: float = Field(0.05, ge=0, le=1, description="fraction of the steps used for warm-up")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="clip the gradient to this norm")
    max_steps: int | None = Field(
        None, ge=1, lt=COUNT, description="number of optimizer steps; overrides --num-train-epochs"
    )
    num_train_epochs: Annotated[float | None, AUTO] = Field(
        None, gt=0, le=1e6, description="number of passes over the data; default: more over small data"
    )
    per_device_train_batch_size: Annotated[int | None, AUTO] = Field(
        None, ge=1, lt=COUNT, description="examples per forward pass; default: fewer for small data"
    )
    gradient_accumulation_steps: PositiveInt = Field(1, description="forward passes per optimizer step")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations to save memory; takes about a third longer"
    )
    fast: Literal["auto", "compile", "off"] = Field(
        "auto",
        description="auto: use faster kernels after checking that they give the same results; compile: compile the "
        "layers even without a known speedup; off: use the standard kernels",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of the base model; adapters are float32"
    )
    quantize: Quantize | None = Field(None, description="quantization method for the base model")
    device: str = Field("auto", description="device: auto (a GPU if available), cpu, cuda, cuda:1, mps, xpu")
    fsdp: bool = Field(False, description="shard the base model across processes (FSDP2)")
    ddp_timeout: PositiveInt = Field(
        600, description="several processes: seconds to wait for each other, for example for a checkpoint"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed for data order, initialization and dropout")
    # evaluation and files
    eval_steps: NonNegativeInt | None = Field(
        None,
        description="evaluate every N steps, and keep the best of them; 0: only before and after training; default: "
        "also twice in between, for the curve",
    )
    metric_for_best_model: str | None = Field(
        None,
        description="metric of --metric that chooses the best step at each evaluation, by answers to half of the "
        "held-out prompts; default: the held-out loss chooses",
    )
    early_stopping_patience: NonNegativeInt = Field(
        0, description="stop after N evaluations without improvement; 0: never"
    )
    save_steps: int | None = Field(
        None,
        ge=0,
        lt=COUNT,
        description="save a checkpoint every N steps; 0: never; default: every ten minutes, or never with --method "
        "full",
    )
    save_total_limit: PositiveInt = Field(2, description="number of checkpoints to keep, not counting the best one")
    metric: list[str] = Field(
        [],
        description="scores answers to held-out prompts before and after training, as a reward does, but is not "
        "trained on; the first decides the verdict; repeatable",
    )
    metric_examples: NonNegativeInt | None = Field(
        None,
        description="number of held-out prompts to answer before and after training; 0: none; default: 200 with a "
        "metric, 24 without",
    )
    judge_model: str | None = Field(None, description="name of the model that --metric judge:URL uses on its server")
    judge_prompt: str | None = Field(
        None, description="file with the prompt of the judge, with {prompt}, {answer_a} and {answer_b}"
    )
    samples: NonNegativeInt = Field(3, description="number of these answers to show")
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
        held_out = bool(self.eval_data) or (self.validation_split != 0 and not self.streaming)
        weights = self.class_weights.values() if isinstance(self.class_weights, dict) else ()
        adapter_settings = self.adapter and ", ".join(self.changed(ADAPTER_FIELDS))
        rules = [
            (
                self.gradient_checkpointing and self.fast == "compile",
                "--gradient-checkpointing does not work with --fast compile; remove one of them",
            ),
            (
                self.streaming and isinstance(self.data, list) and len(self.data) > 1,
                "--streaming supports one data source; put the files into a folder, or remove --streaming",
            ),
            (not all(0 < weight < math.inf for weight in weights), "--class-weights: expected weights above 0"),
            (
                self.eval_steps and not held_out,
                "--eval-steps needs held-out data; set --eval-data or --validation-split",
            ),
            (
                full and "learning_rate" not in self.model_fields_set,
                "--method full needs an explicit --learning-rate; use a lower one than for LoRA, such as 5e-5",
            ),
            (
                self.fsdp and self.quantize not in (None, "nf4"),  # FSDP2 would lose the scales of the others
                f"--fsdp does not support --quantize {self.quantize}, because its scales would be lost; use nf4",
            ),
            (adapter_settings, f"the adapter in --adapter already defines {adapter_settings}; remove these settings"),
        ]
        rules += [*self._grpo_rules(), *self._metric_rules()]
        problems = [message for is_broken, message in rules if is_broken] + self._combination_problems()
        if problems:
            raise ConfigError(listing(problems))
        return self

    def _combination_problems(self) -> list[str]:
        """Returns a message for each setting whose condition in COMBINATIONS does not hold."""
        problems = []
        for settings, other, allowed in COMBINATIONS:
            value, given = getattr(self, other), ", ".join(self.changed(settings))
            flag = f"--{other.replace('_', '-')}"
            if isinstance(allowed, tuple):
                names = " or ".join(str(name) for name in allowed if name not in ("auto", None))
                change = f", got {value}; change {flag}" if self.changed([other]) else "; add it"
                fits, needed = value in allowed, f"requires {flag} {names}{change}"
            else:
                needed = f"requires {flag}; set {flag}" if allowed else f"not supported with {flag}; remove {flag}"
                fits = bool(value) == allowed
            if given and not fits:
                problems.append(f"{given}: {needed}, or remove {given}")
        return problems

    def _metric_rules(self) -> list[tuple[Any, str]]:
        """Returns conditions on metrics and judges that must not hold, with their messages."""
        never = "a judge compares answers after training, and is never trained on; remove it"
        return [
            (any(reward.startswith(f"{JUDGE}:") for reward in self.reward), f"--reward judge: {never}"),
            (self.task == GRPO and bool(self.judges), f"--task grpo does not support --metric judge:URL: {never}"),
            (len(self.judges) > 1, "--metric judge:URL appears twice; use one judge"),
            (
                (self.metric_for_best_model or "").partition(":")[0] == JUDGE,
                "--metric-for-best-model judge: a judge never chooses checkpoints; use a different metric",
            ),
            (
                self.metric_for_best_model and self.task == GRPO,
                "--task grpo chooses the step by the reward; remove --metric-for-best-model",
            ),
            (
                self.metric_for_best_model and self.metric_examples == 0,
                "--metric-for-best-model needs answers; remove --metric-examples 0",
            ),
            (bool(self.judges) and not self.judge_model, "--metric judge:URL needs --judge-model NAME"),
            (
                not self.judges and (self.judge_model or self.judge_prompt),
                "--judge-model and --judge-prompt need a judge; add --metric judge:URL",
            ),
        ]

    def _grpo_rules(self) -> list[tuple[Any, str]]:
        """Returns conditions that must not hold, with their messages."""
        is_grpo, steps = self.task == GRPO, self.save_steps or self.num_iterations
        losses, other_task = get_args(GRPOLoss if is_grpo else PreferenceLoss), "" if is_grpo else ", or --task grpo"
        return [
            (is_grpo and not self.reward, "--task grpo needs a --reward, such as --reward rewards.py:score"),
            (
                self.loss not in (None, *losses),
                f"--task {self.task} does not support --loss {self.loss}; use one of {', '.join(losses)}{other_task}",
            ),
            (is_grpo and self.loss == "rloo" and self.beta, "--loss rloo does not support --beta; remove it"),
            (not is_grpo and self.beta == 0, "--beta 0: expected more than 0; only --task grpo has no penalty at 0"),
            (
                is_grpo and self.beta and (self.method == "full" or self.adapter),
                "--beta compares with the base model, so it needs a new adapter; remove --beta, --adapter and --method",
            ),
            (
                is_grpo and self.init_lora_weights == "eva",
                "--init-lora-weights eva needs examples with replies, but --task grpo has prompts; use a different one",
            ),
            (
                steps % self.num_iterations,
                f"--save-steps {steps} must be a multiple of --num-iterations {self.num_iterations}",
            ),
        ]

    @property
    def judges(self) -> list[str]:
        """Addresses of the judges, which are language models."""
        return [metric.removeprefix(f"{JUDGE}:") for metric in self.metric if metric.startswith(f"{JUDGE}:")]

    def changed(self, names: Iterable[str]) -> list[str]:
        """Returns the names of the settings that differ from their defaults."""
        fields = type(self).model_fields
        return [name for name in names if name in fields and getattr(self, name) != fields[name].default]

    def lora(self) -> LoRAConfig:
        shared = LoRAConfig.model_fields.keys() & type(self).model_fields.keys()
        task_type = "SEQ_2_SEQ_LM" if self.task == "seq2seq" else TASK_TYPES.get(self.task)
        return LoRAConfig(**{name: getattr(self, name) for name in shared}, task_type=task_type)
