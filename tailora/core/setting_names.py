"""Settings that tailora does not have: names from other tools, and removed settings."""

from collections.abc import Collection, Mapping
from typing import Any

from tailora.errors import nearest

ALIASES = {"lora_rank": "r", "lora_r": "r", "cutoff_len": "max_length", "init_r": "r"}  # accepted as our names
NAMES_OF_OTHER_TOOLS = {  # our name, with a value if theirs is a switch -> names in TRL, Axolotl, LLaMA-Factory, ...
    "model": "base_model model_name_or_path model_name model_id model_path checkpoint_dir",
    "data": "dataset datasets dataset_name dataset_path train_file train_data train_dataset",
    "eval_data": "eval_dataset eval_file test_datasets test_data val_data validation_file valid_data",
    "output_dir": "output out out_dir save_dir save_path output_path output_folder",
    "adapter": "adapter_path adapter_name_or_path lora_model_dir lora_path lora lora_weights peft_model "
    "resume_adapter_file",
    "method": "finetuning_type fine_tune_type train_type tuner_type",
    "method full": "full_finetuning",
    "r": "rank lora_dim lora_attn_dim",
    "lora_alpha": "alpha network_alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets lora_target lora_target_modules lora_targets lora_keys",
    "target_modules all-linear": "lora_target_linear",
    "target_parameters": "lora_target_parameters",
    "layers_to_transform": "lora_layers_to_transform peft_layers_to_transform",
    "rank_pattern": "lora_rank_pattern",
    "alpha_pattern": "lora_alpha_pattern",
    "trainable_token_indices": "peft_trainable_token_indices",
    "modules_to_save": "lora_modules_to_save additional_target",
    "use_rslora": "rslora peft_use_rslora",
    "use_dora": "dora peft_use_dora",
    "init_lora_weights": "peft_init_lora_weights init_lora",
    "init_lora_weights pissa": "pissa_init",
    "max_length": "seq_len seq_length max_seq_length max_seq_len sequence_len sequence_length block_size",
    "validation_split": "val_size val_set_size eval_split val_split_fraction test_size test_split",
    "packing": "sample_packing eval_packing",
    "completion_only_loss": "mask_prompt",
    "loss": "pref_loss",
    "beta": "pref_beta rl_beta",
    "label_smoothing": "dpo_label_smoothing",
    "metric": "metrics compute_metrics",
    "learning_rate": "lr",
    "loraplus_lr_ratio": "loraplus_ratio",
    "lr_scheduler_type": "scheduler lr_scheduler lr_schedule scheduler_type",
    "warmup_ratio": "warmup warmup_steps lr_warmup_steps",
    "max_grad_norm": "grad_clip gradient_clipping clip_grad_norm",
    "max_steps": "steps iters num_steps max_train_steps train_iters",
    "num_train_epochs": "epochs num_epochs epoch n_epochs train_epochs",
    "per_device_train_batch_size": "batch_size micro_batch_size train_batch_size per_device_batch_size bs",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum grad_accumulation_steps accumulation_steps",
    "gradient_checkpointing": "grad_checkpoint grad_checkpointing use_gradient_checkpointing",
    "dtype": "torch_dtype precision compute_dtype mixed_precision fp16",
    "dtype bfloat16": "bf16 bfloat16",
    "dtype float32": "fp32 float32",
    "quantize": "quantization quantization_bit quant bits",
    "quantize nf4": "load_in_4bit use_4bit qlora",
    "quantize int8": "load_in_8bit use_8bit",
    "seed": "random_state random_seed data_seed",
    "eval_steps": "steps_per_eval eval_interval eval_every",
    "early_stopping_patience": "patience",
    "save_steps": "save_every save_interval steps_per_save",
    "report_to": "logger log_with",
    "resume_from_checkpoint": "resume resume_from",
    "max_new_tokens": "max_tokens n_predict num_predict max_gen_len max_output_tokens",
    "temperature": "temp",
    "prompts": "prompts_file input_file prompt_file",
    "system": "system_prompt system_message",
    "memory": "vram gpu_memory max_memory",
    "trials": "n_trials num_trials",
    "to": "format export_format outtype",
}
NOT_NEEDED = {  # why tailora has no such setting -> names in other tools
    "the task is inferred from the data; see task and loss": "stage rl",
    "`tailora train` trains, and evaluates before and after": "do_train do_eval",
    "use `tailora predict`": "do_predict",
    "the tokenizer's chat template is used": "template chat_template",
    "data is a file, a folder or a Hub id": "dataset_dir",
    "only replies are trained; assistant_only_loss: false trains everything": "train_on_inputs",
    "every step is in metrics.jsonl, and the curves in report.html": "logging_steps steps_per_report plot_loss",
    "AdamW is always used": "optimizer",
    "use eval_steps": "eval_strategy evaluation_strategy evals_per_epoch",
    "use save_steps": "save_strategy saves_per_epoch",
    "use `tailora train --overwrite` to replace an earlier run": "overwrite_output_dir",
    "the fastest suitable attention is selected; see fast": "flash_attn flash_attention attn_implementation",
}
VALUES_OF_OTHER_TOOLS = {  # settings with a different meaning in other tools -> what to do here
    "adapter: lora": "this is Axolotl's name for the default method here; remove it (in tailora, adapter is the "
    "folder of an adapter to train further)",
    "adapter: qlora": "this is Axolotl's name for LoRA on a 4-bit base; use quantize: nf4 instead (in tailora, adapter "
    "is the folder of an adapter to train further)",
}
OUR_NAMES = {theirs: ours for ours, names in NAMES_OF_OTHER_TOOLS.items() for theirs in names.split()}
WHY_NOT_NEEDED = {theirs: why for why, names in NOT_NEEDED.items() for theirs in names.split()}
OTHER_UNITS = dict.fromkeys(("warmup_steps", "lr_warmup_steps"), ", a share of all steps")  # ours, if theirs differs
_ADALORA = "AdaLoRA is no longer supported; set the rank with r, and of single layers with rank_pattern"
REMOVED_SETTINGS: dict[str, tuple[Any, str]] = {  # name -> its default, and what to do instead
    "adalora": (None, _ADALORA),
    "target_r": (None, _ADALORA),
    "tinit": (None, _ADALORA),
    "tfinal": (None, _ADALORA),
    "deltaT": (1, _ADALORA),
    "beta1": (0.85, _ADALORA),
    "beta2": (0.85, _ADALORA),
    "orth_reg_weight": (0.5, _ADALORA),
    "activation_memory": (1.0, "compiled layers keep all activations; use gradient_checkpointing to save memory"),
    "lora_bias": (False, "use bias: lora_only to train the biases of the adapted layers"),
    "allow_remote_images": (False, "images must be files; download them, and name the files in the rows"),
    "lr_only": (False, "there is no range test; compare learning rates with --space learning_rate=1e-5..1e-2"),
    "optim": ("adamw", "AdamW is always used; the moments of an adapter need little memory"),
    "fsdp_offload_params": (False, "sharded weights stay on the devices; use more processes, or quantize nf4"),
    "fsdp_reshard_after_forward": (True, "gathered weights are always freed after the forward pass"),
    "eval_reward": ([], "use metric, which scores held-out completions and answers"),
    "normalize": ("strip", "use --metric exact_match:ignore=case+punctuation+space"),
    "passport": ("none", "`tailora export` and `tailora verify --prepare` write the verification file"),
}


def our_name(theirs: str, known: Collection[str], *, is_flag: bool = False) -> str:
    """Returns 'use NAME' if `theirs` is the name of a setting in another tool or another part of tailora.

    Returns 'remove it: REASON' if tailora does not need such a setting, and '' for an unknown name.
    is_flag: write --our-name instead of our_name.
    """
    if theirs in WHY_NOT_NEEDED:
        return f"remove it: {WHY_NOT_NEEDED[theirs]}"
    if theirs in REMOVED_SETTINGS:
        return f"remove it: {REMOVED_SETTINGS[theirs][1]}"
    if theirs in NAMES_OF_OTHER_TOOLS:
        name, value = theirs, ""
    else:
        name, _, value = OUR_NAMES.get(theirs, ALIASES.get(theirs, "")).partition(" ")
    if not name:
        return ""
    shown = f"--{name.replace('_', '-')}{value and f' {value}'}" if is_flag else f"{name}{value and f': {value}'}"
    if name not in known:
        others = "have it" if name == theirs else f"call this {shown}"
        return f"other commands {others}, but this one does not support it"
    return f"use {shown}{OTHER_UNITS.get(theirs, '')}"


def suggestion(name: str, known: Collection[str]) -> str:
    """Returns '; ' and the hint of `our_name` for a known name, otherwise the hint of `nearest`."""
    ours = our_name(name, known)
    also_read = (alias for alias, read_as in ALIASES.items() if read_as in known)
    return f"; {ours}" if ours else nearest(name, {*known, *also_read})


def without_removed(settings: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Returns the settings without removed ones at their default, which files of earlier runs may contain."""
    unchanged = {name for name, (default, _) in REMOVED_SETTINGS.items() if settings.get(name, ...) == default}
    return {name: value for name, value in settings.items() if name in known or name not in unchanged}
