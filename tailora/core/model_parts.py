"""The parts of a vision-language model: which one a layer belongs to."""

from collections.abc import Iterable
from typing import Any

from tailora.core.patterns import inside

TOWERS = {"vision_config": "image tower", "audio_config": "audio tower"}  # key of config.json -> part
LANGUAGE_PART, PROJECTOR = "language model", "projector"
PARTS = (LANGUAGE_PART, *TOWERS.values(), PROJECTOR)


def language_model_path(model: Any) -> str:
    """Returns the path of the decoder in a vision-language model; "" for other models."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "vision_config") or config.is_encoder_decoder:
        return ""
    decoder = model.get_decoder()
    return str(next(path for path, module in model.named_modules() if module is decoder))


def parts_of(model: Any, paths: Iterable[str]) -> list[str]:
    """Returns the parts of a vision-language model that contain these paths, in the order of PARTS; [] for others.

    A tower is a module with its own config; the projector is all that is in no tower and no language model.
    """
    language = language_model_path(model)
    if not language:
        return []
    towers = {
        type(getattr(model.config, key)): part for key, part in TOWERS.items() if getattr(model.config, key, None)
    }
    head, owners = model.get_output_embeddings(), dict[str, str]()  # path -> the part that it begins
    for path, module in model.named_modules():
        if path == language or module is head:
            owners[path] = LANGUAGE_PART
        elif part := towers.get(type(getattr(module, "config", None))):
            owners[path] = part
    parts = {next((part for owner, part in owners.items() if inside(path, owner)), PROJECTOR) for path in paths}
    return [part for part in PARTS if part in parts]
