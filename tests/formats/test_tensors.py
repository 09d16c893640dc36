from pathlib import Path

import pytest
import torch
from torch import Tensor

from tailora.formats.io import read_safetensors, safetensors_bytes


@pytest.mark.parametrize("metadata", [{}, {"b": "1", "a": "2"}])
@pytest.mark.parametrize("tensors", [{}, {"x": torch.arange(3.0), "a": torch.ones(2, 2)}])
def test_what_is_written_is_read_back(tensors: dict[str, Tensor], metadata: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(safetensors_bytes(tensors, metadata))
    found, notes = read_safetensors(path)
    assert notes == metadata
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
