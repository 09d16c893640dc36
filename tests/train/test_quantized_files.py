"""Models that are quantized already: what loads, what is trained, what is refused, and what `plan` counts.

gptqmodel does not run here. In its place, a quantizer for transformers installs layers that pack weights as it does.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_layers import AwqLinear, GptqLinear, InferenceLinear
from peft import PeftModel
from quantized_files import Dense, awq, compressed, fp8, gptq, linear_layers, mxfp4
from runs import run_and_collect
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from tailora import LoRAConfig, LoRAModel
from tailora.cli.progress import format_header
from tailora.core.quantization import dense_weight, packed_layers, stored_bytes, weight_count
from tailora.errors import ConfigError, TargetError
from tailora.formats.export import float32_logits
from tailora.train.config import TrainConfig
from tailora.train.events import Prepared
from tailora.train.memory import fake_tensors
from tailora.train.memory_estimate import fake_trainable
from tailora.train.model_loading import load_base, read_config
from tailora.train.quantize import QUANTIZED_FORMATS, quantization_problems
from tailora.train.trainer import run

CPU = torch.device("cpu")
ALL = ["Linear"]
ATTENTION, MLP = [r"re:.*self_attn.*"], [r"re:.*mlp.*"]
SCHEMES = ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16", "W4A16_ASYM")
DENSE: dict[str, Callable[[Path], Dense]] = {
    "fp8": fp8,
    "mxfp4": mxfp4,
    **{scheme: partial(compressed, {scheme: ALL}) for scheme in SCHEMES},
    "FP8 and W8A8": partial(compressed, {"FP8": ATTENTION, "W8A8": MLP}),
}
PACKED: dict[str, tuple[Callable[[Path], Dense], type[nn.Module]]] = {
    "gptq": (gptq, GptqLinear),
    "awq": (awq, AwqLinear),
}
dense_formats = pytest.mark.parametrize("name", DENSE)
packed_formats = pytest.mark.parametrize("name", PACKED)


@pytest.fixture
def layer_class() -> dict[str, type[nn.Module]]:
    """quant_method -> the class that stands for gptqmodel's."""
    return {name: cls for name, (_, cls) in PACKED.items()}


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch, layer_class: dict[str, type[nn.Module]]) -> None:
    class Quantizer(HfQuantizer):
        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            settings: Any = self.quantization_config
            assert settings.backend == QUANTIZED_FORMATS[settings.quant_method].settings["backend"]
            for path, layer in linear_layers(model).items():
                model.set_submodule(path, layer_class[settings.quant_method](layer))

        is_serializable = is_trainable = lambda _: True

    for name in PACKED:
        monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, name, Quantizer)
        monkeypatch.setitem(QUANTIZED_FORMATS, name, replace(QUANTIZED_FORMATS[name], packages=()))


def written(name: str, folder: Path) -> Dense:
    return DENSE[name](folder) if name in DENSE else PACKED[name][0](folder)


@dense_formats
def test_a_model_without_layers_for_training_becomes_dense_and_is_counted(name: str, tmp_path: Path) -> None:
    expected = written(name, tmp_path)
    base, _ = load_base(str(tmp_path))
    assert base.dtype == torch.bfloat16
    assert not hasattr(base.config, "quantization_config")
    for path, weight in expected.items():
        loaded = base.get_parameter(path if name == "mxfp4" else f"{path}.weight")
        assert (loaded.float() - weight).norm() <= 2**-8 * weight.norm()
    others = stored_bytes(base) - sum(2 * weight.numel() for weight in expected.values())
    stored_in_files = (tmp_path / "model.safetensors").stat().st_size - others
    assert counted_bytes(tmp_path, base).while_read == pytest.approx(stored_in_files, rel=0.1)  # and names and scales


def counted_bytes(folder: Path, base: Any) -> Any:
    """Returns the estimate for the model in this folder, which has to have the bytes of the loaded one."""
    config = TrainConfig(model=str(folder), dtype="bfloat16", r=2)
    with fake_tensors():
        model, weights = fake_trainable(config, read_config(config.model), CPU)
        parameters = weight_count(model.base_model)
    assert weights.stored == stored_bytes(base)
    assert parameters == weight_count(base)
    return weights


@packed_formats
def test_a_packed_model_stays_packed_and_its_logits_are_compared_in_float32(name: str, tmp_path: Path) -> None:
    written(name, tmp_path)
    base, _ = load_base(str(tmp_path), "bfloat16")
    layers = packed_layers(dict(base.named_modules()))
    assert len(layers) == 14
    weights = counted_bytes(tmp_path, base)
    assert weights.while_read == 0
    assert weights.stored == pytest.approx((tmp_path / "model.safetensors").stat().st_size, rel=0.02)
    ids = torch.arange(20)[None]
    before = base(input_ids=ids).logits
    plain, _ = load_base(str(tmp_path), "float32")
    for path, layer in layers.items():
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False)  # type: ignore[arg-type]
        dense.weight.data = dense_weight(layer).float()
        x = torch.randn(3, dense.in_features).bfloat16()
        torch.testing.assert_close(layer(x).float(), dense(x.float()), rtol=2e-2, atol=2e-2)
        plain.set_submodule(path, dense)
    torch.testing.assert_close(float32_logits(base, ids), plain(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(base(input_ids=ids).logits, before)


@pytest.mark.parametrize("name", ["FP8 and W8A8", "gptq", pytest.param("awq", marks=pytest.mark.exhaustive)])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # that PEFT asks for
def test_a_run_trains_it_and_files_and_merges_compute_the_same(
    name: str, settings: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    written(name, tmp_path / "model")
    config = settings(model=str(tmp_path / "model"), max_steps=3, eval_steps=3, learning_rate=1e-2)
    result, (prepared,) = run_and_collect(config, Prepared)
    assert (f"linear layers in {name} (" in format_header(prepared.header)) == (name in PACKED)
    assert result.eval_loss_after < result.eval_loss_before  # type: ignore[operator]
    adapter, ids = Path(config.output_dir) / "adapter", torch.arange(20)[None]
    base, _ = load_base(config.model, "float32")
    model = LoRAModel.from_pretrained(base, adapter).eval()
    expected = model(input_ids=ids).logits
    model.merge()
    assert (model(input_ids=ids).logits - expected).norm() <= 1e-2 * expected.norm()
    model.unmerge()
    assert torch.equal(model(input_ids=ids).logits, expected)
    if name in DENSE:  # PEFT does not know the stand-ins
        theirs = PeftModel.from_pretrained(load_base(config.model, "float32")[0], adapter).eval()
        torch.testing.assert_close(theirs(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_compiled_dequantization_is_dropped() -> None:
    layer: Any = GptqLinear(nn.Linear(64, 32))
    layer.dequantize_weight = layer.dequantize_weight  # as an attribute
    LoRAModel(nn.Sequential(layer), LoRAConfig(r=2))
    assert "dequantize_weight" not in vars(layer)


# ---- Refusals


@pytest.mark.parametrize("layer_class", [{"gptq": InferenceLinear}])
def test_a_kernel_for_inference_is_refused(tmp_path: Path, layer_class: dict[str, type[nn.Module]]) -> None:
    gptq(tmp_path)
    with pytest.raises(ConfigError, match="gradients cannot pass InferenceLinear"):
        load_base(str(tmp_path))
    net = nn.Sequential(layer_class["gptq"](nn.Linear(64, 32)))
    with pytest.raises(TargetError, match="0: gradients cannot pass InferenceLinear"):
        LoRAModel(net, LoRAConfig(r=2))


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    @staticmethod
    def backward(_: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * 0.9


class ScaledGradient(GptqLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return WrongGradient.apply(super().forward(x))  # type: ignore[no-any-return, no-untyped-call]


def test_a_wrong_gradient_is_refused() -> None:
    with pytest.raises(TargetError, match="the gradient of ScaledGradient is off by 10%"):
        LoRAModel(nn.Sequential(ScaledGradient(nn.Linear(64, 32))), LoRAConfig(r=2))


def test_weights_that_were_not_used_are_reported(tmp_path: Path) -> None:
    compressed({"FP8": ALL}, tmp_path)
    base, _ = load_base(str(tmp_path))  # leaves out the scales of inputs
    layer = "model.layers.0.mlp.up_proj"
    others = [f"{layer}.input_scale", "model.layers.0.self_attn.q_scale", "model.layers.9.mlp.up_proj.weight_scale"]
    (problem,) = quantization_problems(base, [*others, f"{layer}.weight_g_idx"])
    assert problem == f"{layer}.weight_g_idx: transformers did not use it, so the weight is wrong"


def test_layers_with_different_schemes_are_refused(tmp_path: Path) -> None:
    compressed({"W4A16": MLP, "FP8_DYNAMIC": ATTENTION}, tmp_path)
    with pytest.raises(ConfigError, match="its layers may have different schemes"):
        load_base(str(tmp_path))


@pytest.fixture
def of_format(model_folder: Path) -> Iterator[Callable[..., str]]:
    """The tiny model, with settings in config.json as if it were quantized."""
    file = model_folder / "config.json"
    before = file.read_text()

    def name(**settings: Any) -> str:
        file.write_text(json.dumps({**json.loads(before), "quantization_config": settings}))
        return str(model_folder)

    yield name
    file.write_text(before)


def test_other_formats_are_refused(of_format: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match="is quantized as hqq, which is not supported; expected one of bitsandbytes"):
        load_base(of_format(quant_method="hqq"))


def test_a_missing_package_is_named(of_format: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUANTIZED_FORMATS, "gptq", replace(QUANTIZED_FORMATS["gptq"], packages=("no_such_package",)))
    with pytest.raises(ConfigError, match="needs a missing package: install it with pip install no-such-package"):
        load_base(of_format(quant_method="gptq", bits=4, group_size=32))


def test_all_weights_of_a_packed_model_cannot_be_trained(tmp_path: Path, settings: Callable[..., TrainConfig]) -> None:
    gptq(tmp_path / "model")
    config = TrainConfig(**settings(model=str(tmp_path / "model")).model_dump(exclude={"r"}, exclude_unset=True))
    config = config.replaced(method="full")
    with pytest.raises(ConfigError, match=r"is quantized \(gptq\), and --method full trains weights that are not"):
        run(config)
    with pytest.raises(ConfigError, match="--method full"), fake_tensors():
        fake_trainable(config, read_config(config.model), CPU)


def test_files_with_old_or_short_settings_are_counted(of_format: Callable[..., str]) -> None:
    def counted(**settings: Any) -> int:
        name = of_format(**settings)
        with fake_tensors():
            _, weights = fake_trainable(TrainConfig(model=name, r=2), read_config(name), CPU)
        return weights.stored + weights.left_mapped

    dense = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    scheme = {"targets": ALL, "weights": {"num_bits": 8}}
    expected = counted(**dense, config_groups={"group_0": scheme})
    assert counted(**dense, config_groups={"W8A8": ALL}) == counted(**dense, config_groups=None) == expected
    new, old = {"bits": 8, "group_size": 64}, {"w_bit": 8, "q_group_size": 64}
    assert counted(quant_method="awq", **old) == counted(quant_method="awq", **new) > counted(quant_method="awq")


def test_an_unknown_layout_cannot_be_estimated(of_format: Callable[..., str]) -> None:
    name = of_format(quant_method="torchao", quant_type="int4_weight_only")
    with pytest.raises(ConfigError, match="cannot estimate the memory of this torchao model"), fake_tensors():
        fake_trainable(TrainConfig(model=name, r=2), read_config(name), CPU)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao", "fp4"])
def test_models_that_were_saved_quantized_are_counted(kind: str, tmp_path: Path) -> None:
    fp8(tmp_path / "model")
    plain, tokenizer = load_base(str(tmp_path / "model"))
    plain.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    if kind in ("torchao", "fp4"):  # the scales of fp4 are not quantized
        own = BitsAndBytesConfig(load_in_4bit=True) if kind == "fp4" else TorchAoConfig(Int8WeightOnlyConfig(version=2))
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16, quantization_config=own)
    else:
        base, _ = load_base(str(tmp_path / "plain"), "bfloat16", "cpu", kind)
    base.save_pretrained(tmp_path / "quantized")
    tokenizer.save_pretrained(tmp_path / "quantized")
    config = TrainConfig(model=str(tmp_path / "quantized"), dtype="bfloat16", r=2)
    with fake_tensors():
        _, weights = fake_trainable(config, read_config(config.model), CPU)
    again, _ = load_base(config.model, "bfloat16")
    assert weights.stored == pytest.approx(stored_bytes(again), rel=0.02)
    assert weights.stored < 0.8 * stored_bytes(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"))
