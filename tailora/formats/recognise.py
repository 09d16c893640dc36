"""An adapter of any tool, told by what its files hold."""

from pathlib import Path

from torch import nn

from tailora.errors import FormatError
from tailora.formats import gguf, kohya_diffusers, mlx
from tailora.formats.peft import WEIGHTS, StoredAdapter, read_adapter

LOOSE = "pytorch_lora_weights.safetensors"  # diffusers' name


def read_any(path: Path, base_model: nn.Module) -> StoredAdapter:
    """A PEFT folder, one of mlx-lm, of `export` to GGUF, or one safetensors file of Kohya's tools or diffusers.

    Raises FormatError for what is none of them, and for what they hold that is not LoRA.
    """
    if path.is_file():
        return kohya_diffusers.read(path, base_model)
    if (path / WEIGHTS).exists() or not path.is_dir():
        return read_adapter(path)
    if (path / mlx.WEIGHTS).is_file():
        return mlx.read(path)
    if (path / gguf.WEIGHTS).is_file():
        return gguf.read(path, base_model)
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1 or (path / LOOSE).is_file():
        return kohya_diffusers.read(path / LOOSE if (path / LOOSE).is_file() else files[0], base_model)
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise FormatError(f"{path} holds several files and none called {WEIGHTS}; give one of them: {names}")
    return read_adapter(path)
