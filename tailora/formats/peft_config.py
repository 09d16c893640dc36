"""adapter_config.json: PEFT's settings of an adapter, to and from ours."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version
from torch import nn

from tailora.core.config import LoRAConfig
from tailora.core.patterns import by_pattern, exactly, matches, portable_targets
from tailora.errors import FormatError, listing
from tailora.formats.metadata import REFUSALS
from tailora.formats.peft_paths import Stem

# Settings that change what the tensors mean and have no slot here yet: key -> values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "megatron_config": (None,),
    "layer_replication": (None, []),
    "arrow_config": (None,),
    "velora_config": (None,),
}
SHARED = (
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "modules_to_save", "bias"),
    *("use_rslora", "use_dora", "lora_bias", "trainable_token_indices"),
)
STARTS = {"gaussian": "gaussian"}  # what else PEFT names has done its work once the tensors exist
BRACES, NUMBER = re.compile(r"\{[\d\s,]*\}"), re.compile(r"\d+")
COUNTS = 1000
DOUBLES_OUT_PROJ = Version("0.21.2")
MOVED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


def to_peft(config: LoRAConfig, stems: Iterable[Stem], base_model: nn.Module) -> dict[str, Any]:
    """The file's content. Targets are written as what they selected, so that a reader selects the same."""
    modules = list(dict.fromkeys(stem.key for stem in stems if not stem.is_parameter))
    parameters = list(dict.fromkeys(stem.key for stem in stems if stem.is_parameter))
    return {
        "peft_type": "LORA",
        "task_type": _task_type(base_model),
        "base_model_name_or_path": getattr(getattr(base_model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha if config.lora_alpha % 1 else int(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "target_modules": portable_targets(modules, [path for path, _ in base_model.named_modules()])
        if modules
        else [],
        "target_parameters": _parameter_names(parameters, base_model) if parameters else None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "bias": config.bias,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        "fan_in_fan_out": False,
        "init_lora_weights": "gaussian" if config.init_lora_weights == "gaussian" else True,
    }


def adds_twice(settings: Mapping[str, Any]) -> bool:
    """Whether it was trained by a PEFT that adds the update of an attention's out_proj twice (0.21.2 does)."""
    try:
        return Version(str(settings.get("peft_version", "no version"))) <= DOUBLES_OUT_PROJ
    except InvalidVersion:
        return False


def _parameter_names(paths: list[str], base_model: nn.Module) -> list[str]:
    """The last two names of each, as PEFT's users write them, where they mean nothing else; whole paths otherwise."""
    ends = sorted({".".join(path.split(".")[-2:]) for path in paths})
    meant = {path for path, _ in base_model.named_parameters(remove_duplicate=False) if matches(ends, path)}
    return ends if meant == set(paths) else sorted(paths)


def with_patterns(config: LoRAConfig, stems: Iterable[Stem]) -> LoRAConfig:
    """The settings that give each wrapper of PEFT its rank and scale, where the parts in it have their own."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for stem in stems:
        alpha = stem.scale * (math.sqrt(stem.r) if config.use_rslora else stem.r)
        if stem.r != by_pattern(stem.key, config.rank_pattern, config.r):
            ranks[exactly(stem.key)] = stem.r
        if not math.isclose(alpha, by_pattern(stem.key, config.alpha_pattern, config.lora_alpha), rel_tol=1e-9):
            alphas[exactly(stem.key)] = alpha
    return (
        config.replaced(rank_pattern=ranks | config.rank_pattern, alpha_pattern=alphas | config.alpha_pattern)
        if ranks or alphas
        else config
    )


def doubled(config: LoRAConfig) -> LoRAConfig:
    """The settings that give the same scales to factors of twice the rank."""
    factor = math.sqrt(2) if config.use_rslora else 2
    return config.replaced(
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={pattern: 2 * r for pattern, r in config.rank_pattern.items()},
        alpha_pattern={pattern: factor * alpha for pattern, alpha in config.alpha_pattern.items()},
    )


def from_peft(settings: Mapping[str, Any], paths: list[str], source: Path) -> LoRAConfig:
    """Our config for PEFT's settings; `paths` (those that have tensors) stand in where the file names no targets.

    Raises FormatError with every setting that would make the adapter compute something else here.
    """
    problems = [
        f"{key} = {settings[key]!r} is not supported; merge the adapter with the tool that wrote it"
        for key, neutral in NEUTRAL.items()
        if settings.get(key) not in neutral
    ]
    if settings.get("peft_type") != "LORA":
        problems.append(f"peft_type = {settings.get('peft_type')!r}; this reads 'LORA'")
    if str(settings.get("init_lora_weights")).lower().startswith(MOVED_BASES):
        problems.append(
            f"init_lora_weights = {settings['init_lora_weights']!r} changed the base's weights, which the folder does "
            "not hold; convert it with PEFT (path_initial_model_for_weight_conversion)"
        )
    if problems:
        raise FormatError(f"{source}: {listing(problems)}")
    values = {key: settings[key] for key in SHARED if settings.get(key) is not None}
    values["init_lora_weights"] = STARTS.get(str(settings.get("init_lora_weights")), "kaiming")
    values["target_parameters"] = settings.get("target_parameters") or None
    values["target_modules"] = settings.get("target_modules") or ([] if values["target_parameters"] else paths)
    if not settings.get("layers_pattern"):  # with it PEFT counts other numbers; the tensors say which layers
        values["layers_to_transform"] = settings.get("layers_to_transform")
        values["exclude_modules"] = settings.get("exclude_modules") or None
    try:
        return LoRAConfig(**values)
    except REFUSALS as error:
        raise FormatError(f"{source}: {error}") from None


def check_patterns(config: LoRAConfig, source: Path) -> None:
    """Raises FormatError for counts such as {1000} that multiply up: a short pattern would need gigabytes."""
    selectors = [each for each in (config.target_modules, config.exclude_modules) if isinstance(each, str)]
    for pattern in (*selectors, *config.rank_pattern, *config.alpha_pattern):
        counts = [max(map(int, NUMBER.findall(braces)), default=1) for braces in BRACES.findall(pattern)]
        if math.prod(max(1, count) for count in counts) > COUNTS:
            raise FormatError(
                f"{source}: the counts in the regular expression {pattern!r} multiply to above {COUNTS}; list the names"
            )


def read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist; an adapter folder holds adapter_config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise FormatError(f"{path} holds a {type(settings).__name__}, not an object of settings")
    return settings


def _task_type(base_model: nn.Module) -> str | None:
    name = type(base_model).__name__
    endings = {
        "ForCausalLM": "CAUSAL_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    }
    return next((task for ending, task in endings.items() if name.endswith(ending)), None)
