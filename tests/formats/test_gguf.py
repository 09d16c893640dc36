"""GGUF adapters are written and read as llama.cpp does."""

import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import chat_model
from tiny_adapters import adapted, logits

from tailora import LoRAModel
from tailora.errors import FormatError
from tailora.formats import gguf

PATTERNS = {"rank_pattern": {"q_proj": 3, "down_proj": 5}, "alpha_pattern": {"v_proj": 20}}


def test_a_gguf_file_read_by_llama_cpp_s_rules_gives_the_update(tmp_path: Path) -> None:
    """alpha / (rank of B) * B A is the update, with the rows of q and k as the base's GGUF has the weight's."""
    from gguf import GGUFReader

    model = adapted(PATTERNS)
    model.export(tmp_path / "out", "gguf")
    file = GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {name: field.contents() for name, field in file.fields.items()}
    tensors = {tensor.name: np.array(tensor.data) for tensor in file.tensors}
    assert fields["general.type"] == "adapter"
    assert (fields["adapter.type"], fields["general.architecture"]) == ("lora", "llama")
    assert len(tensors) == 2 * 14
    for name, path, heads in (
        ("blk.1.attn_q", "model/layers/1/self_attn/q_proj", 4),
        ("blk.0.attn_k", "model/layers/0/self_attn/k_proj", 2),
        ("blk.0.attn_v", "model/layers/0/self_attn/v_proj", None),
        ("blk.1.ffn_down", "model/layers/1/mlp/down_proj", None),
    ):
        A, B = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
        delta = model.lora_layers[path].delta_weight().detach().numpy()
        if heads:  # within a head, row i of the first half is followed by row i of the second
            size = len(delta) // heads
            order = [
                head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)
            ]
            delta = delta[order]
        np.testing.assert_allclose(fields["adapter.lora.alpha"] / B.shape[1] * B @ A, delta, rtol=1e-4, atol=1e-6)
    key, alpha = b"adapter.lora.alpha" + struct.pack("<I", 6), fields["adapter.lora.alpha"]  # 6: float32
    path = tmp_path / "out" / "adapter.gguf"
    path.write_bytes(path.read_bytes().replace(key + struct.pack("<f", alpha), key + struct.pack("<f", 0)))
    unscaled = LoRAModel.from_pretrained(chat_model(), tmp_path / "out").lora_layers  # by llama.cpp, alpha is ignored
    for name, layer in model.lora_layers.items():
        torch.testing.assert_close(unscaled[name].delta_weight(), layer.delta_weight() * layer.r / alpha)


LLAMA_CPP_PAIRS = {"llama", "mistral", "granite", "smollm3", "olmo"}  # of which its converter permutes q and k


@pytest.mark.parametrize("model_type", gguf.ARCHITECTURES)
def test_rows_of_q_and_k_are_paired_in_the_architectures_of_llama_cpp(model_type: str) -> None:
    config = SimpleNamespace(model_type=model_type, num_attention_heads=4, num_key_value_heads=2)
    base, A, B = SimpleNamespace(config=config), torch.zeros(2, 6), torch.arange(16.0)[:, None].expand(16, 2)
    for name, heads in (("blk.0.attn_q.weight", 4), ("blk.0.attn_k.weight", 2), ("blk.0.attn_v.weight", 0)):
        half = 8 // heads if heads and model_type in LLAMA_CPP_PAIRS else 0
        order = [head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in (0, 1)]
        A_in_file, B_in_file = gguf.to_gguf(A, B, name, base)
        assert B_in_file[:, 0].tolist() == [float(row) for row in order or range(16)]
        assert torch.equal(gguf.from_gguf(A_in_file, B_in_file, name, base)[1], B)


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    model = adapted()
    model.base_model.config.model_type = "unheard"
    with pytest.raises(FormatError, match=r"model_type 'unheard' is not supported in GGUF; supported: llama, mistral"):
        model.export(tmp_path / "out", "gguf")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda _: b"", "not a complete GGUF file"),
        (lambda _: b"GGUF" + b"\xff" * 200, "not a complete GGUF file"),
        (lambda data: data[:-2000], "not a complete GGUF file"),
        (lambda data: data.replace(b"adapter.type", b"adapter.tipe"), r"expected .* got .*'adapter\.type': None"),
        (lambda data: data.replace(b"blk.1.attn_q", b"blk.7.attn_q"), r"blk\.7\.attn_q\..*_a: the model has no"),
    ],
)
def test_a_damaged_gguf_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    model = adapted(PATTERNS)
    model.export(tmp_path / "out", "gguf")
    file = tmp_path / "out" / "adapter.gguf"
    torch.testing.assert_close(logits(LoRAModel.from_pretrained(chat_model(), tmp_path / "out")), logits(model))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(FormatError, match=message):
        LoRAModel.from_pretrained(chat_model(), tmp_path / "out")
