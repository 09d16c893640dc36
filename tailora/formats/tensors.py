"""Safetensors with the same bytes for the same content, and read without trust."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tailora.errors import FormatError


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The file's bytes. Sorted: safetensors writes its metadata in hash order, another one in every process."""
    plain: dict[str, Tensor] = {}
    seen: set[tuple[int, int]] = set()  # safetensors refuses what shares memory, as a tied head does
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.data_ptr(), own.nbytes
        plain[name] = own.clone() if place in seen else own
        seen.add(place)
    raw = save(plain, dict(metadata) or None)  # no tensors and {} would give a header that is not JSON
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    described = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    ordered = {**described, **_by_offset(header)}
    text = json.dumps(ordered, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata. Raises FormatError for what is not a whole safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise FormatError(f"{path} is not a whole safetensors file: {error}; save or copy it again") from None


def _by_offset(header: Mapping[str, dict[str, list[int]]]) -> dict[str, dict[str, list[int]]]:
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    return dict(sorted(entries, key=lambda item: (item[1]["data_offsets"], item[0])))
