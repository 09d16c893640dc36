"""A base model in a GGUF file. The file is written here as llama.cpp's converter does, in Q8_0."""

import json
from pathlib import Path
from typing import Any

import gguf
import hub_server
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from tiny import chat_model, chat_tokenizer
from torch import Tensor

from tailora.data.demo import resolve_model
from tailora.errors import ConfigError
from tailora.formats.gguf_base import convert, converted_base, folder_of, gguf_file
from tailora.formats.hub import check_model_exists, find_gguf, is_at_hand, name_of_model, public_name
from tailora.train.model_loading import load_base

hub = hub_server.hub  # the fixture
TEXTS = ["a question and an answer", "another question"]


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Returns a projection of queries or keys in llama.cpp's order of rows."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, *, without: str = "nothing", feed_forward: int = 64) -> dict[str, Tensor]:
    """Writes a tiny Llama with its tokenizer; returns the model's weights.

    without: part of the names of weights that are left out.    feed_forward: the size that the file names, 64 is right.
    """
    tokenizer = chat_tokenizer(TEXTS, eos_token="<|im_end|>")
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    model = chat_model(vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, head_dim=8)
    config: Any = model.config
    weights: dict[str, Tensor] = model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in weights.items():
        if without in name:
            continue
        if "q_proj" in name:
            weight = interleaved(weight, config.num_attention_heads)
        if "k_proj" in name:
            weight = interleaved(weight, config.num_key_value_heads)
        data = weight.float().numpy()
        if data.ndim == 2:
            data = gguf.quantize(np.ascontiguousarray(data), gguf.GGMLQuantizationType.Q8_0)
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return weights


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TAILORA_HOME", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def test_a_file_is_loaded_as_its_model(file: Path) -> None:
    expected = write_gguf(file)
    model, tokenizer = load_base(str(file))
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight.float(), expected[name].float(), rtol=0.02, atol=2e-3)
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]
    assert tokenizer.chat_template
    assert name_of_model(model.config.name_or_path) == str(file.resolve())


def test_a_file_is_converted_once_and_again_if_it_changes(file: Path) -> None:
    assert is_at_hand(str(file))
    first = converted_base(file)
    assert resolve_model(str(file)) == resolve_model(str(file.parent)) == str(first)
    content = file.read_bytes()
    for changed in (content[:-1] + bytes([content[-1] ^ 1]), content + bytes(32)):
        file.write_bytes(changed)
        assert folder_of(file) != first
        first = converted_base(file)
        assert first == folder_of(file)


@pytest.mark.usefixtures("file")
def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    assert gguf_file(str(tmp_path / "none.gguf")) is None
    for name, content in (("broken.gguf", b"GGUF but not really"), ("empty.gguf", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=rf"cannot read the GGUF file .*{name}.*use the folder of the original"):
            resolve_model(str(tmp_path / name))
    with pytest.raises(ConfigError, match=r"several GGUF files \(broken.gguf, empty.gguf, tiny.gguf\); use the path"):
        resolve_model(str(tmp_path))
    assert not [path for path in (tmp_path / "cache" / "gguf").glob("*") if path.is_dir()]


@pytest.mark.parametrize(
    ("changes", "weights"),
    [({"without": "layers.0.self_attn.q_proj"}, "1 weights"), ({"feed_forward": 32}, "6 weights")],
    ids=["missing", "other shapes"],
)
def test_weights_that_would_be_random_are_refused(file: Path, changes: dict[str, Any], weights: str) -> None:
    write_gguf(file, **changes)
    with pytest.raises(ConfigError, match=rf"lacks {weights} of LlamaForCausalLM, or has .*use a"):
        resolve_model(str(file))


def test_a_file_that_cannot_be_read_is_not_a_folder_that_cannot_be_written(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    with pytest.raises(
        ConfigError, match=r"cannot read the GGUF file .*Permission denied.*use the folder of the original"
    ):
        resolve_model(str(file))


def test_names_follow_the_file(file: Path, tmp_path: Path) -> None:
    folder = converted_base(file)
    assert name_of_model(str(folder)) == str(file.resolve())
    upper = file.rename(tmp_path / "tiny.GGUF")
    assert gguf_file(str(upper)) == gguf_file(str(tmp_path)) == upper
    assert name_of_model(str(folder)) == str(folder)  # which still works, unlike the old path


def test_the_demo_s_folder_has_no_path(file: Path, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    convert(file, tmp_path / "demo")
    assert not [path for path in (tmp_path / "demo").iterdir() if str(tmp_path).encode() in path.read_bytes()]


# ---- On the Hub


@pytest.fixture
def repository(file: Path, hub: hub_server.Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The files of user/model: one GGUF file."""
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    hub.repositories["user/model"] = hub_server.Repository()
    files = hub.repositories["user/model"].branches["main"]
    files |= {"tiny-Q8_0.gguf": file.read_bytes(), "README.md": b"", "mmproj-tiny-F16.gguf": b"of an image encoder"}
    return files


def test_a_repository_with_one_file_is_its_model(
    file: Path, repository: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_base("user/model")
    expected, _ = load_base(str(file))
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))
    base = name_of_model(model.config.name_or_path)
    assert public_name(base) == "user/model"
    assert is_at_hand(base)
    repository.clear()
    assert resolve_model(base) == model.config.name_or_path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("user/model", "user/model:q8_0", "user/model:tiny-Q8_0.gguf"):
        check_model_exists(resolve_model(name))
        assert resolve_model(name) == model.config.name_or_path


def test_one_of_several_files_is_selected_by_the_end_of_its_name(repository: dict[str, bytes]) -> None:
    repository |= {"tiny-Q4_K.gguf": b"4", "tiny.UD-Q4_K.gguf": b"dynamic", "sub/tiny-Q4_K_M.gguf": b"medium"}
    choices = "user/model:tiny-Q8_0.gguf, user/model:tiny-Q4_K.gguf, user/model:tiny.UD-Q4_K.gguf, .*Q4_K_M.gguf"
    for name, count in {"": "4 GGUF files", ":Q4_K": "2 GGUF files", ":Q5_K": "no GGUF files"}.items():
        with pytest.raises(ConfigError, match=f"'user/model{name}' matches {count} on the Hub; use one of: {choices}"):
            find_gguf(f"user/model{name}")
    for ending, content in {"Q4_K_M": b"medium", "ud-q4_k": b"dynamic", "tiny-Q4_K.gguf": b"4"}.items():
        found = find_gguf(f"user/model:{ending}")
        assert found is not None
        assert found.read_bytes() == content


def test_a_repository_with_other_weights_is_not_converted(repository: dict[str, bytes]) -> None:
    repository["model.safetensors"] = b""
    assert find_gguf("user/model") is None
    assert find_gguf("user/model:Q8_0") is not None
    assert find_gguf("user/none") is None
    check_model_exists("user/model:Q4_0")
    with pytest.raises(ConfigError, match="'user/model:Q4_0' matches no GGUF files on the Hub"):
        load_base("user/model:Q4_0")
    with pytest.raises(ConfigError, match="'user/none' is not a local folder, and the Hub has no such model"):
        load_base("user/none:Q4_0")
