"""Trained biases and token rows in PEFT's file, and what a file holds of the base itself."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tailora.core.adapter import extra_parts
from tailora.core.extra_targets import ExtraTargets

BIAS, ROWS = ".bias", ".token_adapter.trainable_tokens_delta"
BASE_WEIGHTS = (".token_adapter.base_layer.weight", ".base_layer.weight", ".weight")
TOLERANCE = 2.0**-7  # rounding to bfloat16, once on either side

Modules = Mapping[str, nn.Module]


def extra_tensors(extras: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Key without prefix -> tensor as the file holds it."""
    suffixes = {"bias": BIAS, "trainable_tokens_delta": ROWS}
    return {
        path + suffixes[name]: parameter.detach()
        for path, part in extras.items()
        for name, parameter in part.named_parameters()
    }


def extra_keys(wanted: ExtraTargets) -> dict[str, str]:
    """Key without prefix -> path, of what the settings name."""
    return {path + BIAS: path for path in wanted.biases} | {path + ROWS: path for path in wanted.tokens}


@torch.no_grad()
def filled_extras(
    wanted: ExtraTargets, modules: Modules, found: Mapping[str, Tensor]
) -> tuple[dict[str, nn.Module], list[str]]:
    """The parts with the file's tensors, `found` by path; and what is missing or misshapen."""
    parts, problems = extra_parts(wanted, modules), []
    for key, path in extra_keys(wanted).items():
        (parameter,) = parts[path].parameters()
        if path not in found:
            problems.append(f"missing {key} {tuple(parameter.shape)}")
        elif found[path].shape != parameter.shape:
            shape = tuple(found[path].shape)
            problems.append(f"misshapen {key}: the file has {shape}, the model needs {tuple(parameter.shape)}")
        else:
            parameter.copy_(found[path])
    return parts, problems


def of_the_base(key: str, tensor: Tensor, modules: Modules) -> tuple[bool, str | None]:
    """Whether this is a weight of the base, which PEFT saves with adapted or resized embeddings; and why it cannot be
    passed over: the base here has another.
    """
    path = next((key.removesuffix(end) for end in BASE_WEIGHTS if key.endswith(end)), None)
    weight = getattr(modules.get(path or ""), "weight", None)
    if path is None or not isinstance(weight, Tensor):
        return False, None
    if weight.shape != tensor.shape:
        resize = f"; resize_token_embeddings({len(tensor)}) comes first" if weight.shape[1:] == tensor.shape[1:] else ""
        return True, f"the file's {path}.weight is {tuple(tensor.shape)}, the model's {tuple(weight.shape)}{resize}"
    apart = ~torch.isclose(weight.detach().float().cpu(), tensor.float(), rtol=TOLERANCE, atol=1e-6)
    rows = apart.flatten(1).any(1).nonzero()[:, 0].tolist() if apart.ndim > 1 else []
    if not rows:
        return True, None
    return True, (
        f"the file has other values in {len(rows)} rows of {path}.weight ({rows[0]}..{rows[-1]}) than this base, "
        f"which is never changed here; copy the file's {key} into the base's {path}.weight, then load the adapter"
    )
