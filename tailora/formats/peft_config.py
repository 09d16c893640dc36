"""adapter_config.json: PEFT's settings of an adapter, to and from a LoRAConfig."""

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast, get_args

from packaging.version import InvalidVersion, Version
from torch import nn

from tailora.core.config import LoRAConfig, TaskType, scaling_divisor
from tailora.core.patterns import by_pattern, ends_with, exactly, matches, portable_targets
from tailora.core.targets import HEADS_OF_TASK, saved_modules
from tailora.errors import ConfigError, FormatError, TailoraWarning, listing
from tailora.formats.peft_keys import PeftLayer

# Settings that change the meaning of the tensors or their training. They are not supported unless they are OFF.
UNSUPPORTED_SETTINGS = (
    *("alora_invocation_tokens", "use_qalora", "megatron_config", "layer_replication", "arrow_config"),
    *("velora_config", "use_bdlora", "monteclora_config", "kasa_config", "ensure_weight_tying"),
)
OFF: tuple[Any, ...] = (None, False, [], {}, "")
SETTINGS_WITHOUT_EFFECT = (  # in an adapter whose tensors exist
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of the init
    *("inference_mode", "runtime_config", "auto_mapping", "revision"),  # how PEFT runs it, where the base is from
    *("fan_in_fan_out", "megatron_core", "qalora_group_size"),  # the layer's class or another setting decides
)
OTHER_SETTINGS = (  # in the order of the file
    *("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "bias"),
    *("use_rslora", "use_dora", "lora_bias"),
)
SHARED_SETTINGS = ("r", "lora_alpha", "lora_dropout", *OTHER_SETTINGS)  # same name and meaning in LoRAConfig
USED_SETTINGS = (
    *SHARED_SETTINGS,
    *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "init_lora_weights"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
)
INITS_WITHOUT_EFFECT = ("true", "false", "none", "gaussian", "eva", "orthogonal")  # the tensors exist
INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
DOUBLES_OUT_PROJ = Version("0.21.2")
TASK_TYPES: dict[str, TaskType] = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
# Errors of LoRAConfig for values from a file. The last two come from the compiler of regular expressions.
CONFIG_ERRORS = (ConfigError, TypeError, RecursionError, OverflowError)
BRACES, NUMBER = re.compile(r"\{[\d\s,]*\}"), re.compile(r"\d+")
MAX_REPETITIONS = 1000

# ---- LoRAConfig -> adapter_config.json


def to_peft_config(config: LoRAConfig, layers: Iterable[PeftLayer], base_model: nn.Module) -> dict[str, Any]:
    """Returns the content of the file. Its targets match exactly the adapted layers, so a reader selects the same."""
    layers = list(layers)
    modules = list(dict.fromkeys(layer.pattern_path for layer in layers if not layer.is_parameter))
    parameters = list(dict.fromkeys(layer.pattern_path for layer in layers if layer.is_parameter))
    # The last two names of each parameter's path, as PEFT's users write them, or full paths if those are ambiguous
    endings = sorted({".".join(path.split(".")[-2:]) for path in parameters})
    parameter_paths = [path for path, _ in base_model.named_parameters(remove_duplicate=False)]
    are_clear = set(parameters) == {path for path in parameter_paths if matches(endings, path)}
    module_paths = [path for path, _ in base_model.named_modules()]
    return {
        "peft_type": "LORA",
        "task_type": _task_type(config, base_model),
        "base_model_name_or_path": base_model_name(base_model),
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha if config.lora_alpha % 1 else int(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "target_modules": portable_targets(modules, module_paths) if modules else [],
        "target_parameters": (endings if are_clear else sorted(parameters)) or None,
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
        **{name: getattr(config, name) for name in OTHER_SETTINGS},
        "fan_in_fan_out": False,
        "init_lora_weights": "gaussian" if config.init_lora_weights == "gaussian" else True,
    }


def _task_type(config: LoRAConfig, base_model: nn.Module) -> TaskType | None:
    """Returns the user's task, or the task of the base's class if the adapter has the heads that PEFT expects."""
    class_name = type(base_model).__name__
    task = config.task_type
    if task is None and getattr(base_model, "main_input_name", "input_ids") == "input_ids":  # PEFT's classes pass it on
        task = next((task for ending, task in TASK_TYPES.items() if class_name.endswith(ending)), None)
        if task == "SEQ_2_SEQ_LM" and not cast(Any, base_model).config.is_encoder_decoder:  # vision-language models
            task = "CAUSAL_LM"
    modules = dict(base_model.named_modules())
    names = HEADS_OF_TASK.get(task or "", ())
    heads = [path for path in modules if any(ends_with(name, path) for name in names)]
    if missing := [path for path in heads if path not in saved_modules(modules, config)]:
        if config.task_type is None:
            return None
        message = f"task_type={task!r}: PEFT cannot load the adapter without the weights of {', '.join(missing)}"
        remedy = f"train them in full (modules_to_save={missing}), or remove task_type"
        warnings.warn(f"{message}; {remedy}", TailoraWarning, stacklevel=2)
    return task


def base_model_name(base_model: nn.Module) -> str | None:
    """Returns the folder or Hub id that the base model was read from, unchanged; None if it is unknown."""
    return getattr(getattr(base_model, "config", None), "_name_or_path", None) or None


def as_peft_computes(config: LoRAConfig, layers: Iterable[PeftLayer]) -> LoRAConfig:
    """Adds patterns for every layer whose rank or scale PEFT could not derive from the config alone.

    Such layers contain several parts of a fused layer, with different ranks and scales, or are target_parameters, for
    which PEFT has no dropout.
    """
    layers = list(layers)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for layer in layers:
        path, alpha = layer.pattern_path, layer.scale * scaling_divisor(layer.r, config.use_rslora)
        if layer.r != by_pattern(path, config.rank_pattern, config.r):
            ranks[exactly(path)] = layer.r
        if not math.isclose(alpha, by_pattern(path, config.alpha_pattern, config.lora_alpha), rel_tol=1e-9):
            alphas[exactly(path)] = alpha
    return config.replaced(
        rank_pattern=ranks | config.rank_pattern,
        alpha_pattern=alphas | config.alpha_pattern,
        lora_dropout=0.0 if any(layer.is_parameter for layer in layers) else config.lora_dropout,
    )


def with_double_rank(config: LoRAConfig) -> LoRAConfig:
    """Returns a config with the same scales for factors of twice the rank."""
    factor = scaling_divisor(2, config.use_rslora)
    return config.replaced(
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={pattern: 2 * r for pattern, r in config.rank_pattern.items()},
        alpha_pattern={pattern: factor * alpha for pattern, alpha in config.alpha_pattern.items()},
    )


# ---- adapter_config.json -> LoRAConfig


def from_peft_config(settings: Mapping[str, Any], paths: list[str], source: Path) -> LoRAConfig:
    """Returns the LoRAConfig for PEFT's settings.

    paths: the modules that have tensors; they are the targets if the settings have none.
    Raises FormatError with every setting that would make the adapter compute something different here.
    """
    init = str(settings.get("init_lora_weights")).lower()
    problems = [
        f"{key} = {settings[key]!r} is not supported; use the tool that wrote it to merge it into the base model"
        for key in UNSUPPORTED_SETTINGS
        if settings.get(key) not in OFF
    ]
    if settings.get("peft_type") != "LORA":
        problems.append(f"expected peft_type = 'LORA', got {settings.get('peft_type')!r}")
    if init == "mica":
        problems.append(
            "init_lora_weights = 'mica' only trains A, but tailora would also train B. To use the adapter without "
            "training it, set init_lora_weights to true in its adapter_config.json; its outputs stay the same"
        )
    elif init not in INITS_WITHOUT_EFFECT:
        why = "is unknown; merge the adapter with PEFT"
        if init.startswith(INITS_THAT_CHANGE_THE_BASE):
            why = "changed the base's weights, which are not in the folder; convert the adapter with PEFT "
            why += "(path_initial_model_for_weight_conversion)"
        problems.append(f"init_lora_weights = {settings['init_lora_weights']!r} {why}")
    if problems:
        raise FormatError(f"{source}: {listing(problems)}")
    known = {*USED_SETTINGS, *SETTINGS_WITHOUT_EFFECT, *UNSUPPORTED_SETTINGS}
    if unknown := {key: value for key, value in settings.items() if key not in known and value not in OFF}:
        shown = ", ".join(f"{key} = {value!r:.80}" for key, value in unknown.items())
        message = f"{source}: ignoring unknown settings in adapter_config.json: {shown}. Compare outputs with PEFT's"
        warnings.warn(message, TailoraWarning, stacklevel=2)
    values = {key: settings[key] for key in SHARED_SETTINGS if settings.get(key) is not None}
    values["task_type"] = task if (task := settings.get("task_type")) in get_args(TaskType) else None
    values["init_lora_weights"] = "gaussian" if init == "gaussian" else "kaiming"  # the tensors exist: it has no effect
    values["target_parameters"] = settings.get("target_parameters") or None
    values["target_modules"] = settings.get("target_modules") or ([] if values["target_parameters"] else paths)
    indices = settings.get("layers_to_transform")
    values["layers_to_transform"] = None if indices == [] else indices
    values["layers_pattern"] = None if indices in (None, []) else settings.get("layers_pattern") or None
    values["exclude_modules"] = settings.get("exclude_modules") or None
    try:
        return LoRAConfig(**values)
    except CONFIG_ERRORS as error:
        raise FormatError(f"{source}: {error}") from None


def adds_out_proj_twice(settings: Mapping[str, Any]) -> bool:
    """True if the adapter was trained by a version of PEFT that adds the update of out_proj twice: up to 0.21.2."""
    try:
        return Version(str(settings.get("peft_version", "no version"))) <= DOUBLES_OUT_PROJ
    except InvalidVersion:
        return False


def check_patterns(config: LoRAConfig, source: Path) -> None:
    """Raises FormatError for nested counts such as {1000}, with which a short pattern would need gigabytes."""
    selectors = [selector for selector in (config.target_modules, config.exclude_modules) if isinstance(selector, str)]
    for pattern in (*selectors, *config.layers_patterns, *config.rank_pattern, *config.alpha_pattern):
        counts = [max(map(int, NUMBER.findall(braces)), default=1) for braces in BRACES.findall(pattern)]
        if math.prod(max(1, count) for count in counts) > MAX_REPETITIONS:
            raise FormatError(
                f"{source}: the counts in the regular expression {pattern!r} multiply to more than {MAX_REPETITIONS}; "
                "list the names instead"
            )
