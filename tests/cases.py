"""The cases that the laws run over: layer types x slots of the equation x storages of the weight.

`all_of` and `pairs_of` turn them into the parameters of a test. By default every layer type meets the plain slot and
every slot meets a few layer types; the rest of the product has the marker `exhaustive` (see conftest.py).
"""

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import bitsandbytes
import pytest
import torch
from packed_layers import AwqLinear, GptqLinear
from tiny import stirred_model
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, quantize_
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

from tailora import LoRAConfig, LoRAModel


def _called(layer: nn.Module, x: Tensor) -> Any:
    return layer(x)


def _attended(layer: nn.Module, x: Tensor) -> Any:
    return layer(x, x, x, need_weights=False)[0]


def _attended_apart(layer: Any, x: Tensor) -> Any:
    # Contiguous and not batch first: torch sums up other inputs in another order where the weight has a gradient.
    key, value = (x[..., :size].contiguous() for size in (layer.kdim, layer.vdim))
    return layer(x, key, value, need_weights=False)[0]


def _routed(layer: nn.Module, x: Tensor) -> Any:
    """Routes each token to two of four experts, with weights .7 and .3."""
    first = torch.arange(len(x)) % 4
    chosen, shares = torch.stack([first, (first + 1 + torch.arange(len(x)) // 4) % 4], 1), torch.tensor([0.7, 0.3])
    return layer(x, chosen, shares.to(x).expand(len(x), 2))


class Net(nn.Module):
    """One layer at the path block.target."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Any] = _called) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"target": layer})
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.call(self.block["target"], x)
        return y


@dataclass(frozen=True)
class LayerCase:
    name: str
    layer: Callable[[], nn.Module]
    shape: tuple[int, ...] = ()  # of x; () means ids
    r: int = 4
    peft_is_wrong: str = ""  # why PEFT cannot be the oracle
    call: Callable[[nn.Module, Tensor], Any] = _called
    names: Mapping[str, Any] = field(default_factory=lambda: {"target_modules": ["target"]})
    parameter: str = "weight"  # of the layer, that holds the adapted matrix
    store: Callable[[nn.Module], nn.Module] | None = None  # how its weight is quantised
    tolerance: float = 1e-5  # relative, of outputs in evaluation against those of the dense weight

    @property
    def pattern(self) -> str:
        """The name by which patterns for rank and alpha match the layer."""
        return f"target.{self.parameter}" if "target_parameters" in self.names else "target"

    def weight(self, net: nn.Module) -> Tensor:
        """Returns the adapted weight of a Net, or of the Net inside a model."""
        return net.get_parameter(f"block.target.{self.parameter}")

    def net(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
        torch.manual_seed(seed)
        layer = self.layer().to(dtype)
        return Net(self.store(layer) if self.store else layer, self.call)

    def batch(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
        if not self.shape:
            ids = torch.randint(0, 20, (3, 5), generator=generator)
            ids[0, 0] = 0  # the padding id, which has no gradient
            return ids
        return torch.randn(self.shape, generator=generator).to(dtype)


LAYERS = [
    LayerCase("linear", lambda: nn.Linear(12, 10), (3, 5, 12)),
    LayerCase("linear without bias", lambda: nn.Linear(12, 10, bias=False), (12,)),
    LayerCase("transformers conv1d", lambda: Conv1D(10, 12), (3, 5, 12)),
    LayerCase("embedding", lambda: nn.Embedding(20, 12, padding_idx=0)),
    LayerCase("conv1d", lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 9)),
    LayerCase("conv2d", lambda: nn.Conv2d(6, 8, (3, 2), stride=(1, 2), padding=1), (2, 6, 7, 8)),
    LayerCase("conv2d same", lambda: nn.Conv2d(6, 8, 3, padding="same"), (2, 6, 7, 8)),
    LayerCase("conv3d", lambda: nn.Conv3d(4, 6, 2), (2, 4, 4, 5, 4)),
    LayerCase("conv2d grouped", lambda: nn.Conv2d(8, 12, 3, groups=4, padding=1), (2, 8, 6, 6), r=8),
    LayerCase("conv1d depthwise", lambda: nn.Conv1d(6, 6, 3, groups=6), (2, 6, 9), r=6),
    LayerCase(
        "conv2d dilated", lambda: nn.Conv2d(6, 8, 3, dilation=2), (2, 6, 9, 9), peft_is_wrong="its A is not dilated"
    ),
    LayerCase(
        "conv2d reflect",
        lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
        (2, 6, 7, 7),
        peft_is_wrong="its A pads with zeros",
    ),
]


# ---- How the weight of a layer is stored


def bitsandbytes_4bit(quant_type: str, double: bool) -> Callable[[nn.Module], nn.Module]:
    def store(layer: Any) -> nn.Module:
        weight, made = _as_linear(layer, lambda *sizes: bitsandbytes.nn.Linear4bit(*sizes, quant_type=quant_type))
        settings = {"quant_type": quant_type, "compress_statistics": double, "module": made}
        made.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **settings)
        return made.to("cpu")

    return store


def bitsandbytes_int8(layer: nn.Module) -> nn.Module:
    weight, made = _as_linear(layer, lambda *sizes: bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False))
    made.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return made.to("cpu")


def _as_linear(layer: Any, make: Callable[..., Any]) -> tuple[Tensor, Any]:
    """Returns the weight (out, in), of a Conv1D transposed, and a layer of bitsandbytes as transformers makes it."""
    weight = layer.weight.detach().clone()
    weight = weight.T.contiguous() if isinstance(layer, Conv1D) else weight
    made = make(weight.shape[1], weight.shape[0], layer.bias is not None)
    made.bias, made.source_cls = layer.bias, type(layer)
    return weight, made


def torchao_weights(config: Any) -> Callable[[nn.Module], nn.Module]:
    def store(layer: nn.Module) -> nn.Module:
        quantize_(layer.requires_grad_(False), config)
        vars(layer).pop("extra_repr", None)  # of a partial function, which no pickle takes; transformers drops it, too
        return layer

    return store


@dataclass(frozen=True)
class StorageCase:
    """A storage of weights. layers: names of the cases whose weight can have it. others: why the rest cannot."""

    name: str
    store: Callable[[nn.Module], nn.Module]
    layers: tuple[str, ...]
    others: str
    tolerance: float = 1e-5
    vectors: bool = True  # whether a layer takes a single vector


LINEARS = ("linear", "linear without bias", "part", "part of every head")
BITSANDBYTES: dict[str, Any] = {
    "layers": (*LINEARS, "transformers conv1d", "part of conv1d"),
    "others": "bitsandbytes has linear layers; its embeddings override forward and cannot be saved",
}
TORCHAO: dict[str, Any] = {"layers": LINEARS, "others": "torchao quantises nn.Linear, and no other unless told so"}
PACKED: dict[str, Any] = {"layers": LINEARS, "others": "gptqmodel has linear layers"}
STORAGES = [
    StorageCase("nf4", bitsandbytes_4bit("nf4", double=True), **BITSANDBYTES),
    StorageCase("fp4", bitsandbytes_4bit("fp4", double=False), **BITSANDBYTES),
    # LLM.int8 rounds the input, too, where it does not train
    StorageCase("int8", bitsandbytes_int8, **BITSANDBYTES, tolerance=2e-2, vectors=False),
    StorageCase("torchao int8", torchao_weights(Int8WeightOnlyConfig(version=2)), **TORCHAO),
    StorageCase("torchao int4", torchao_weights(IntxWeightOnlyConfig(torch.int4, PerAxis(0))), **TORCHAO),
    StorageCase("gptq", GptqLinear, **PACKED),
    StorageCase("awq", AwqLinear, **PACKED),
]


def quantized(case: LayerCase, storage: StorageCase) -> LayerCase:
    shape = case.shape if storage.vectors or len(case.shape) > 1 else (5, *case.shape)
    name = f"{case.name}, {storage.name}"
    return replace(case, name=name, store=storage.store, tolerance=storage.tolerance, shape=shape)


def _attention() -> nn.MultiheadAttention:
    return nn.MultiheadAttention(12, 3, batch_first=True)


def _experts(is_transposed: bool = False) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_local_experts": 4}
    config = GptOssConfig(**sizes) if is_transposed else MixtralConfig(**sizes)
    config._experts_implementation = "batched_mm"  # the one that float64 and the compiler take
    experts = GptOssExperts(config) if is_transposed else MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


QKV, PAIRS_OF_QKV = {"q": 8, "k": 4, "v": 4}, {"q": 4, "k": 2, "v": 2}


def _part(name: str, layout: dict[str, int]) -> dict[str, Any]:
    return {"target_modules": [f"target.{name}"], "fused_parts": {"target": layout}}


def _attention_case(name: str, target: str, parameter: str) -> LayerCase:
    names = {"target_modules": [f"target.{target}"]}
    return LayerCase(name, _attention, (2, 5, 12), call=_attended, names=names, parameter=parameter)


def _experts_case(name: str, parameter: str, layer: Callable[[], nn.Module] = _experts) -> LayerCase:
    names = {"target_modules": [], "target_parameters": [f"target.{parameter}"]}
    return LayerCase(name, layer, (9, 16), call=_routed, names=names, parameter=parameter)


# What its class does not call, or calls for several matrices at once.
SPECIAL_LAYERS = [
    _attention_case("attention in", "in_proj_weight", "in_proj_weight"),
    _attention_case("attention out", "out_proj", "out_proj.weight"),
    LayerCase(
        "attention value",
        lambda: nn.MultiheadAttention(12, 3, kdim=6, vdim=10),
        (2, 5, 12),
        call=_attended_apart,
        names={"target_modules": ["target.v_proj_weight"]},
        parameter="v_proj_weight",
        peft_is_wrong="it refuses separate weights",
    ),
    LayerCase("part", lambda: nn.Linear(12, 16), (3, 5, 12), names=_part("v", QKV)),
    LayerCase("part of every head", lambda: nn.Linear(12, 16), (12,), names=_part("q", PAIRS_OF_QKV)),
    LayerCase("part of conv1d", lambda: Conv1D(16, 12), (3, 5, 12), names=_part("k", QKV)),
    _experts_case("experts up", "gate_up_proj"),
    _experts_case("experts down", "down_proj"),
    _experts_case("experts transposed", "gate_up_proj", lambda: _experts(is_transposed=True)),
]

SLOTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "learned scale": {"learn_scaling": True},
    "dropout": {"lora_dropout": 0.3},
    "gaussian": {"init_lora_weights": "gaussian"},
    "alpha pattern": {"alpha_pattern": {"target": 3}},
    "dora": {"use_dora": True},
    "dora, learned scale, dropout": {"use_dora": True, "learn_scaling": True, "lora_dropout": 0.3},
    "lora bias": {"lora_bias": True},
    "biases of the adapted": {"bias": "lora_only"},
    "dora and biases": {"use_dora": True, "bias": "lora_only"},
}


BIASES = ("biases of the adapted", "dora and biases")
WITHOUT_BIAS = ("embedding", "linear without bias")


def why_not(case: LayerCase, slot: str) -> str | None:
    """Returns why the pair makes no sense, in the words of its refusal; None if it does make sense."""
    special = case in SPECIAL_LAYERS
    if "fused_parts" in case.names and "dora" in slot:
        return "use_dora is not supported for this layer type and parts of layers"
    if special and (slot in BIASES or slot == "lora bias"):
        return "is not supported for parts of fused layers, attention or parameters"
    if case.name in WITHOUT_BIAS and slot in BIASES:
        return "none of the adapted layers has a bias"
    if case.name == "embedding" and slot == "lora bias":
        return "lora_bias is not supported for an Embedding"
    if (case.call in (_attended, _attended_apart) or "target_parameters" in case.names) and "dropout" in slot:
        return "lora_dropout is not supported for a weight that is used without a layer"
    return None


UNMERGEABLE = {("linear without bias", "lora bias"): "refused: there is no bias to merge into"}
# Where PEFT 0.21.2 is right in general, and fails in this slot: the update of a grouped weight is misshapen.
PEFT_FAILS = {
    (case, slot)
    for case in ("conv2d grouped", "conv1d depthwise")
    for slot, settings in SLOTS.items()
    if settings.get("use_dora")
}
ALL_LAYERS = [*LAYERS, *SPECIAL_LAYERS]
ALL_PAIRS = [(case, slot) for case in ALL_LAYERS for slot in SLOTS if why_not(case, slot) is None]
PAIRS = [(case, slot) for case, slot in ALL_PAIRS if case in LAYERS]
SPECIAL_PAIRS = [(case, slot) for case, slot in ALL_PAIRS if case in SPECIAL_LAYERS]
QUANTIZED = [quantized(case, storage) for storage in STORAGES for case in ALL_LAYERS if case.name in storage.layers]
QUANTIZED_PAIRS = [
    (quantized(case, storage), slot) for storage in STORAGES for case, slot in ALL_PAIRS if case.name in storage.layers
]


def all_of(cases: Sequence[LayerCase]) -> pytest.MarkDecorator:
    """Parametrises a test by `case`."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def pairs_of(pairs: Sequence[tuple[LayerCase, str]], per_slot: int = 2) -> pytest.MarkDecorator:
    """Parametrises a test by `case` and `slot`.

    Pairs are marked `exhaustive` but for the plain slot and `per_slot` cases of every other slot, which are as far
    apart in the list as they can be, and others from slot to slot.
    """
    default = {(case.name, "plain") for case, _ in pairs}
    for number, slot in enumerate(SLOTS):
        cases = [case for case, name in pairs if name == slot]
        default |= {
            (cases[(number + i * len(cases) // per_slot) % len(cases)].name, slot)
            for i in range(per_slot)[: len(cases)]
        }
    parameters = [
        pytest.param(case, slot, id=f"{slot}-{case.name}", marks=() if (case.name, slot) in default else EXHAUSTIVE)
        for case, slot in pairs
    ]
    return pytest.mark.parametrize(("case", "slot"), parameters)


EXHAUSTIVE = pytest.mark.exhaustive


def config(case: LayerCase, slot: str = "plain") -> LoRAConfig:
    settings = dict(SLOTS[slot])
    if "alpha_pattern" in settings:
        settings["alpha_pattern"] = {case.pattern: 3}
    return LoRAConfig(r=case.r, lora_alpha=10, **case.names, **settings)


def trained(case: LayerCase, slot: str = "plain", dtype: torch.dtype = torch.float32) -> LoRAModel:
    """Returns a model whose adapter changes the output, in eval mode."""
    model = stirred_model(case.net(dtype), config(case, slot))
    return model.eval()


def check_copies(model: LoRAModel, x: Any) -> None:
    """A copy and a pickle compute the same, with tensors of their own."""
    expected = model(x).detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        for parameter in twin.lora_layers.parameters():
            parameter.data.zero_()
        assert not torch.equal(twin(x), expected)
        assert torch.equal(model(x), expected)
