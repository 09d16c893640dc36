"""LoRA files of Kohya's tools and diffusers mean here what they mean there, and convert to PEFT."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import chat_model, stir
from tiny_adapters import adapted, logits
from torch import Tensor, nn

from tailora import LoRAConfig, LoRAModel
from tailora.errors import FormatError

Tensors = dict[str, Tensor]


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture
def live() -> LoRAModel:
    """r = 4, alpha = 6, and on one layer r = 3, alpha = 7."""
    patterns = {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"down_proj": 7}}
    return adapted({"target_modules": ["q_proj", "down_proj"], **patterns})


def factors(model: LoRAModel) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Path -> A, B, alpha."""
    layers = {key.replace("/", "."): layer for key, layer in model.lora_layers.items()}
    return {path: (layer.lora_A.detach(), layer.lora_B.detach(), layer.lora_alpha) for path, layer in layers.items()}


def kohya(model: LoRAModel, prefix: str = "lora_te1_") -> Tensors:
    tensors = {}
    for path, (A, B, alpha) in factors(model).items():
        flat = prefix + path.replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B, f"{flat}.alpha": torch.tensor(alpha)}
    return tensors


def named(model: LoRAModel, A_end: str, B_end: str, prefix: str = "", fold: bool = True) -> Tensors:
    """Keys with dots; without an alpha the scale is 1, so it is in B."""
    tensors = {}
    for path, (A, B, alpha) in factors(model).items():
        scale = alpha / len(A) if fold else 1
        tensors |= {f"{prefix}{path}{A_end}": A, f"{prefix}{path}{B_end}": B * scale}
    return tensors


WRITERS: dict[str, Callable[[LoRAModel], Tensors]] = {
    "kohya": kohya,
    "kohya, no alpha": lambda m: {
        **{key: value for key, value in kohya(m).items() if not key.endswith(".alpha")},
        **{
            f"lora_te1_{path.replace('.', '_')}.lora_up.weight": B * alpha / len(A)
            for path, (A, B, alpha) in factors(m).items()
        },
    },
    "diffusers": lambda m: named(m, ".lora_A.weight", ".lora_B.weight", "text_encoder."),
    "diffusers, before PEFT": lambda m: named(m, ".lora.down.weight", ".lora.up.weight", "unet."),
    "diffusers, text encoder": lambda m: named(
        m, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", "te."
    ),
    "diffusers, processors": lambda m: {
        re.sub(r"\.(\w+_proj)_lora", r".processor.\1_lora", key): value
        for key, value in named(m, "_lora.down.weight", "_lora.up.weight", "unet.").items()
    },
    "no prefix": lambda m: named(m, ".lora_A.weight", ".lora_B.weight"),
    "PEFT's keys in one file": lambda m: named(m, ".lora_A.weight", ".lora_B.weight", "base_model.model."),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_one_file_of_another_tool_gives_the_same_outputs(
    tmp_path: Path, live: LoRAModel, write: Callable[[LoRAModel], Tensors]
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({key: value.contiguous() for key, value in write(live).items()}, file)
    model = LoRAModel.from_pretrained(chat_model(), file)
    torch.testing.assert_close(logits(model), logits(live), rtol=1e-5, atol=1e-5)
    model.export(tmp_path / "peft", "peft")
    again = LoRAModel.from_pretrained(chat_model(), tmp_path / "peft")
    torch.testing.assert_close(logits(again), logits(live), rtol=1e-5, atol=1e-5)


def test_the_settings_in_diffusers_metadata_are_read(tmp_path: Path, live: LoRAModel) -> None:
    tensors = named(live, ".lora_A.weight", ".lora_B.weight", "transformer.", fold=False)
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"down_proj": 7},
        "target_modules": ["q_proj", "down_proj"],
        "use_rslora": False,
        "peft_type": "LORA",
    }
    written = {f"transformer.{key}": value for key, value in settings.items()} | {"text_encoder.r": 99}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(written)})
    for place in (file, tmp_path):
        torch.testing.assert_close(
            logits(LoRAModel.from_pretrained(chat_model(), place)), logits(live), rtol=1e-5, atol=1e-5
        )


def test_layers_of_another_model_in_the_same_file_are_skipped_with_a_warning(tmp_path: Path, live: LoRAModel) -> None:
    other = {
        "lora_unet_mid_block_to_q.lora_down.weight": torch.ones(4, 8),
        "lora_unet_mid_block_to_q.alpha": torch.ones(()),
    }
    save_file({**kohya(live), **other}, tmp_path / "lora.safetensors")
    with pytest.warns(UserWarning, match=r"ignoring the layers of other models: lora_unet \(1 layers\)"):
        model = LoRAModel.from_pretrained(chat_model(), tmp_path / "lora.safetensors")
    torch.testing.assert_close(logits(model), logits(live), rtol=1e-5, atol=1e-5)


def test_convolutions_of_a_unet(tmp_path: Path) -> None:
    block = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3), "to_out": nn.ModuleList([nn.Linear(6, 6)])})
    net = nn.ModuleDict({"down_blocks": nn.ModuleList([block])})
    stem = "lora_unet_down_blocks_0"
    tensors = {
        f"{stem}_conv.lora_down.weight": torch.randn(2, 4, 3, 3),
        f"{stem}_conv.lora_up.weight": torch.randn(6, 2, 1, 1),
        f"{stem}_conv.alpha": torch.tensor(1.0, dtype=torch.float16),
        "unet.down_blocks.0.processor.to_out_lora.down.weight": torch.randn(2, 6),
        "unet.down_blocks.0.processor.to_out_lora.up.weight": torch.randn(6, 2),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    model = LoRAModel.from_pretrained(net, tmp_path / "lora.safetensors")
    conv = model.lora_layers["down_blocks/0/conv"]
    up, down = tensors[f"{stem}_conv.lora_up.weight"], tensors[f"{stem}_conv.lora_down.weight"]
    expected = 0.5 * torch.einsum("or,rikl->oikl", up[..., 0, 0], down)
    torch.testing.assert_close(conv.delta_weight(block["conv"]), expected)
    assert model.lora_layers["down_blocks/0/to_out/0"].scaling == 1


Q_NAME = f"lora_te1_{Q.replace('.', '_')}"


def put(key: str, tensor: torch.Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({key: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q_NAME}.lora_up.weight"), rf"{Q}: missing factor B"),
        (put("lora_te1_nowhere.lora_down.weight", torch.ones(2, 2)), "lora_te1_nowhere: the model has no"),
        (put("lora_te1_x.hada_w1_a", torch.ones(2)), r"not plain LoRA: lora_te1_x\.hada_w1_a"),
        (put("lora_te1_x.dora_scale", torch.ones(2)), r"not plain LoRA: lora_te1_x\.dora_scale"),
        (put("something.weight", torch.ones(2)), r"not plain LoRA: something\.weight \(1 of 13 keys\)"),
        (put(f"{Q_NAME}.alpha", torch.ones(2)), "expected a single number as alpha, got 2"),
        (put(f"{Q_NAME}.alpha", torch.tensor(torch.nan)), "alpha"),
        (put(f"{Q_NAME}.lora_up.weight", torch.ones(5, 4)), "wrong shape of .*lora_B"),
        (dict.clear, "the model has none of the layers in the file"),
    ],
)
def test_keys_that_are_not_lora_or_fit_no_layer_are_refused(
    tmp_path: Path, live: LoRAModel, change: Callable[[Tensors], Any], message: str
) -> None:
    tensors = kohya(live)
    change(tensors)
    save_file(tensors, tmp_path / "lora.safetensors")
    base = chat_model()
    with pytest.raises(FormatError, match=message):
        LoRAModel.from_pretrained(base, tmp_path / "lora.safetensors")
    assert type(base.model.layers[0].self_attn.q_proj) is nn.Linear


def test_a_file_for_another_model_is_refused(tmp_path: Path, live: LoRAModel) -> None:
    save_file(kohya(live), tmp_path / "lora.safetensors")
    with pytest.raises(FormatError, match="the model has none of the layers in the file, such as lora_te1_model"):
        LoRAModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), tmp_path / "lora.safetensors")


@pytest.mark.parametrize("metadata", ["{", "[1]", "[" * 100_000, '{"transformer.r": 0}', '{"transformer.r": "many"}'])
def test_damaged_metadata_is_refused(tmp_path: Path, live: LoRAModel, metadata: str) -> None:
    tensors = named(live, ".lora_A.weight", ".lora_B.weight", "transformer.")
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(FormatError):
        LoRAModel.from_pretrained(chat_model(), tmp_path / "lora.safetensors")


def test_several_files_in_a_folder_are_refused(tmp_path: Path, live: LoRAModel) -> None:
    for name in ("a", "b"):
        save_file(kohya(live), tmp_path / f"{name}.safetensors")
    with pytest.raises(FormatError, match=r"several files.*a\.safetensors, b\.safetensors"):
        LoRAModel.from_pretrained(chat_model(), tmp_path)


# ---- What is written for diffusers


def unet() -> Any:
    import diffusers

    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of diffusers, while it is imported
@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"conv1": 3}},
        pytest.param({"init_lora_weights": "pissa", "target_modules": ["to_q"]}, marks=pytest.mark.exhaustive),
    ],
    ids=["patterns", "pissa"],
)
def test_diffusers_loads_what_is_exported_for_it(settings: dict[str, Any], tmp_path: Path) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Pipeline

    live = LoRAModel(unet(), LoRAConfig(**{"r": 4, "target_modules": ["to_q", "to_k", "conv1"], **settings})).eval()
    stir(live)
    images, texts = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8)
    inputs = {"sample": images, "timestep": torch.tensor([3, 700]), "encoder_hidden_states": texts}
    expected = live(**inputs).sample
    report = live.export(tmp_path / "out", "diffusers")
    assert [*report.files] == ["pytorch_lora_weights.safetensors"]
    assert report.logits.difference < 1e-6
    theirs = unet()
    state, alphas = Pipeline.lora_state_dict(tmp_path / "out")  # as `pipeline.load_lora_weights(folder)` does
    Pipeline.load_lora_into_unet(state, alphas, theirs)
    torch.testing.assert_close(theirs(**inputs).sample, expected, rtol=1e-4, atol=1e-4)
    assert (unet()(**inputs).sample - expected).abs().max() > 0.1
    torch.testing.assert_close(LoRAModel.from_pretrained(unet(), tmp_path / "out")(**inputs).sample, expected)


def test_what_diffusers_would_not_read_is_refused(tmp_path: Path, live: LoRAModel) -> None:
    with pytest.raises(FormatError, match="LlamaForCausalLM is not a diffusers model"):
        live.export(tmp_path / "out", "diffusers")
