"""Attention for packed rows, for any model of transformers: every document of the row attends only to itself.

A packed row is (1, total) tokens; `cu_seq_lens_q` (documents + 1,) says where its documents start and end, and reaches
`packed_attention` through the model's keyword arguments, by transformers' attention registry. So no mask of total x
total exists, and no work is done for pairs of tokens from different documents.

On a CPU it is one operator, `kernels.cpu_attention`, which has no dropout of attention. With dropout, and on other
devices, one of the providers in `kernels.device_attention` computes it.

Position biases, soft caps and attention sinks are not supported and raise PackingError.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tailora.kernels import cpu_attention
from tailora.kernels.device_attention import PROVIDERS, DeviceRow, Documents, Options, PaddedRow
from tailora.patches import attention_of, leave_attention_open

NAME = "tailora_packed"
PADDED = "tailora_padded"
CPU = "cpu"  # the provider of a CPU
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")


class PackingError(ValueError):
    """The model asks its attention for something that packed rows do not support."""


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, total, width)
    key: Tensor,  # (1, key heads, total, width)
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    packed_row: DeviceRow | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Returns causal attention within each document, (1, total, heads, width), and no weights. Raises PackingError."""
    if cu_seq_lens_q is None:
        raise PackingError("the model does not pass cu_seq_lens_q to its attention")
    unsupported = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if attention_mask is not None:
        unsupported.append("an attention mask")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        unsupported.append("attention to later tokens")
    if key.shape[2] != query.shape[2]:
        unsupported.append("keys of a different sequence")
    if packed_row is not None and packed_row.windows is not None and sliding_window not in packed_row.windows:
        unsupported.append(f"a sliding window of {sliding_window}, which is in neither its config nor its modules")
    if unsupported:
        raise PackingError(f"the attention of {type(module).__name__} requires {', '.join(unsupported)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packed_row is None and dropout and query.device.type != "meta":  # there the operator stands for flash attention
        if max_length_q is None:
            raise PackingError("the model does not pass max_length_q to its attention")
        packed_row = PaddedRow(Documents(cu_seq_lens_q, max_length_q, query.shape[2], (sliding_window,)))
    if packed_row is not None:
        return packed_row.attend(query, key, value, Options(scale, dropout, sliding_window)), None
    q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))  # (total, heads, width)
    return cpu_attention.attention(q, k, v, cu_seq_lens_q, scale, sliding_window)[None], None


def attention_of_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    document_tokens: Tensor | None = None,
    row_tokens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Returns `packed_attention` of a row whose documents may share beginnings; see `data.collate.collate_packed`."""
    if document_tokens is None or row_tokens is None:
        return packed_attention(module, query, key, value, *args, **kwargs)
    whole = (heads[0].transpose(0, 1).index_select(0, document_tokens) for heads in (query, key, value))
    output, _ = packed_attention(module, *(heads.transpose(0, 1)[None] for heads in whole), *args, **kwargs)
    return output.index_select(1, row_tokens), None


# No mask function is registered under this name, so transformers makes no mask. To make one it would look for documents
# in position_ids, for which the host has to wait.
AttentionInterface.register(NAME, attention_of_row)


@contextmanager
def packed_rows(model: PreTrainedModel, provider: str | None = None) -> Iterator[None]:
    """Within the block the model's attention reads packed rows; afterwards it is restored. Raises PackingError.

    provider: a key of `device_attention.PROVIDERS`, or CPU. None: CPU on a CPU, and what every other device can do.
    """
    config = model.config
    if getattr(config, "attention_chunk_size", None) is not None:
        raise PackingError("the model uses chunked attention (attention_chunk_size)")
    provider = provider or (CPU if model.device.type == "cpu" else "sdpa")
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    prepare = partial(_prepare, None if provider == CPU else PROVIDERS[provider], sliding_windows(model))
    with use_attention(model, NAME):
        if attention_of(config) != NAME:
            raise PackingError(f"{type(model).__name__} does not allow choosing the attention implementation")
        with (model if decoder is None else decoder).register_forward_pre_hook(prepare, with_kwargs=True):
            yield


def sliding_windows(model: PreTrainedModel) -> tuple[int | None, ...]:
    """Returns every window that a layer may ask for, None for layers without."""
    owners = [model.config.get_text_config(), *model.modules()]
    windows = {getattr(owner, "sliding_window", None) for owner in owners}
    return None, *sorted(window for window in windows if isinstance(window, int))


@contextmanager
def padded_rows(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, padded rows on a device get a mask in any case, so that the host need not wait."""
    if model.device.type == "cpu" or attention_of(model.config) != "sdpa":
        yield
        return
    with use_attention(model, PADDED):
        yield


@contextmanager
def use_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Within the block the model uses this attention of transformers' registry."""
    config = model.config
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name)) is not None}
    before = {"": attention_of(config), **{name: attention_of(part) for name, part in parts.items()}}
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation({part: own for part, own in before.items() if own is not None})
        for part, own in before.items():
            if own is None:
                leave_attention_open(parts[part])


def _always_masked(**arguments: Any) -> Tensor:
    mask: Tensor = sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
    return mask


AttentionInterface.register(PADDED, sdpa_attention_forward)
AttentionMaskInterface.register(PADDED, _always_masked)


def _prepare(
    provider: type[DeviceRow] | None,
    windows: tuple[int | None, ...],
    decoder: nn.Module,
    inputs: tuple[Any, ...],
    arguments: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Adds what all layers share to the arguments of the decoder, which passes them on. Raises PackingError."""
    if attention_of(decoder.config) != NAME:
        return inputs, arguments  # another attention is used within `packed_rows`, to sample from the model
    if arguments.get("attention_mask") is not None:
        raise PackingError("a packed row has no padding, but an attention mask was passed")
    ends, longest = arguments.get("cu_seq_lens_q"), arguments.get("max_length_q")
    if provider is None or ends is None:
        return inputs, arguments
    if longest is None:
        raise PackingError("max_length_q was not passed to the model")
    tokens = next(iter(inputs), arguments.get("input_ids"))
    tokens = arguments["inputs_embeds"] if tokens is None else tokens
    ends = ends.to(tokens.device, non_blocking=True)
    return inputs, {**arguments, "packed_row": provider(Documents(ends, longest, tokens.shape[1], windows))}
