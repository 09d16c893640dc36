"""Layer kernels against the layers' own forward, in float64, over several steps with different batches.

transformers computes norms in float32; here the plain model's norms are exchanged for ones that do not.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from tailora import LoRAConfig, LoRAModel
from tailora.core import layer as layer_module
from tailora.kernels.attention import packed_rows
from tailora.kernels.llama import FastLayer, eligible, fast_layers, noise, obstacle, obstacle_to_layers

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
BASES = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, heads alone": LlamaConfig(**{**SIZES, "num_key_value_heads": 6}),
    "llama, one key head": LlamaConfig(**{**SIZES, "num_key_value_heads": 1}, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, scaled positions": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "mistral, window": MistralConfig(**SIZES, sliding_window=7),
    "mistral, no window": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2, window in upper layers": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "qwen3, biases and a window": Qwen3Config(
        **SIZES, head_dim=8, attention_bias=True, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
}
ADAPTERS = {
    "all": LoRAConfig(r=4),
    "q and down": LoRAConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "v": LoRAConfig(r=2, target_modules=["v_proj"]),
    "down of the last": LoRAConfig(r=2, target_modules=["down_proj"], layers_to_transform=[2]),
    "up of the middle": LoRAConfig(r=2, target_modules=["up_proj"], layers_to_transform=[1]),
    "o": LoRAConfig(r=3, target_modules=["o_proj"]),
    "mixed ranks": LoRAConfig(r=4, rank_pattern={"k_proj": 2, "gate_proj": 7}, use_rslora=True),
    "learned scale": LoRAConfig(r=4, learn_scaling=True),
    "frozen start": LoRAConfig(r=4, init_lora_weights="pissa"),
    "dropout": LoRAConfig(r=4, lora_dropout=0.3),
    "dropout, mixed": LoRAConfig(
        r=4,
        target_modules=["k_proj", "v_proj", "up_proj", "down_proj"],
        rank_pattern={"v_proj": 1, "up_proj": 6},
        use_rslora=True,
        learn_scaling=True,
        lora_dropout=0.3,
    ),
}
BATCHES = [(5, 33, 2, 40), (1,), (17, 17, 3)]


class Norm(nn.Module):
    """RMSNorm in the input's own precision."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.weight, self.eps = theirs.weight, theirs.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def uncast(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, Norm(child))


def pair(base: str, adapter: str) -> tuple[LoRAModel, LoRAModel]:
    """The same adapted model twice: for the kernels, and with norms that do not cast, for the plain path."""
    torch.manual_seed(0)
    plain_base = AutoModelForCausalLM.from_config(BASES[base]).double()
    for name, parameter in plain_base.named_parameters():  # which start at 0 and 1
        if name.endswith("bias") or "norm" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    model = LoRAModel(plain_base, ADAPTERS[adapter])
    for name, parameter in model.lora_layers.named_parameters():
        parameter.data = parameter.data.double()
        if "scaling" not in name:
            parameter.data.normal_(0, 0.05)
    for _, buffer in model.lora_layers.named_buffers():
        buffer.data = buffer.data.double()
    plain = copy.deepcopy(model)
    uncast(plain.base_model)
    return model, plain


def states(model: LoRAModel, lengths: tuple[int, ...], seed: int) -> Tensor:
    """Before the last norm: (tokens, hidden). The rotary positions are the float32 ones of both paths."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    base: Any = model.base_model
    seen: list[Tensor] = []
    hook = base.model.layers[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    base.model(
        input_ids=torch.randint(97, (1, tokens), generator=generator),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seq_lens_q=torch.tensor([0, *lengths]).cumsum(0),
        use_cache=False,
    )
    hook.remove()
    return seen[0][0]


PLACES = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}


@contextmanager
def same_noise(model: LoRAModel) -> Iterator[None]:
    """Dropout of the plain path draws what the kernels draw: by a seed of each layer, one noise for each input."""
    now: dict[str, int] = {}

    def drawn(layer: nn.Module, *_: Any) -> None:
        dropped = [part.lora_dropout for part in layer.modules() for part in vars(part).get("adapter_parts", ())]
        if any(dropped):
            now["seed"] = int(torch.randint(2**62, ()))

    def at(name: str) -> Any:
        return lambda *_: now.update(place=PLACES[name])

    def dropped(x: Tensor, p: float, training: bool) -> Tensor:
        return x * noise(now["seed"] + now["place"], x, p) if p and training else x

    base: Any = model.base_model
    hooks = [layer.register_forward_pre_hook(drawn) for layer in base.model.layers]
    for path, module in base.named_modules():
        if (name := path.rpartition(".")[2]) in PLACES:
            hooks.append(module.register_forward_pre_hook(at(name)))
    before, layer_module.F.dropout = layer_module.F.dropout, dropped  # type: ignore[assignment]
    try:
        yield
    finally:
        layer_module.F.dropout = before
        for hook in hooks:
            hook.remove()


def trained(model: LoRAModel, fast: bool, checkpointed: bool = False) -> list[list[Tensor]]:
    """Steps of plain gradient descent, each on another batch; per step the states and the gradients."""
    parameters = list(model.lora_layers.parameters())
    base: PreTrainedModel = model.base_model  # type: ignore[assignment]
    found = []
    for step, lengths in enumerate(BATCHES):
        torch.manual_seed(step)
        with packed_rows(base), nullcontext() if fast else same_noise(model):
            if fast:
                with fast_layers(base, checkpointed=checkpointed) as count:
                    assert count == 3
                    output = states(model, lengths, step)
            else:
                output = states(model, lengths, step)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        gradients = torch.autograd.grad(output, parameters, weights, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 1e-2 * gradient / gradient.norm().clamp(min=1)
        found.append([output.detach(), *gradients])
    return found


WIDEST = (
    "all",
    "dropout, mixed",
)  # by default these on every base and every adapter on "llama"; the rest is exhaustive
CHECKPOINTED = ("q and down", "down of the last", "dropout, mixed")
CASES = [
    pytest.param(
        base,
        adapter,
        checkpointed,
        marks=() if adapter in WIDEST or base == "llama" else pytest.mark.exhaustive,
    )
    for base in BASES
    for checkpointed, adapters in ((False, ADAPTERS), (True, CHECKPOINTED))
    for adapter in adapters
]


@pytest.mark.parametrize(("base", "adapter", "checkpointed"), CASES)
@pytest.mark.slow
def test_steps_by_kernels_are_the_plain_steps(base: str, adapter: str, checkpointed: bool) -> None:
    model, plain = pair(base, adapter)
    for fast, slow in zip(trained(model, True, checkpointed), trained(plain, False), strict=True):
        largest = max(gradient.norm() for gradient in slow[1:])  # some gradients are zero but for rounding
        for found, expected in zip(fast, slow, strict=True):
            assert (found - expected).norm() <= 1e-10 * expected.norm() + 1e-13 * largest


def test_dropout_is_off_in_evaluation_and_drawn_anew_in_training() -> None:
    torch.manual_seed(0)
    model = LoRAModel(AutoModelForCausalLM.from_config(BASES["llama"]), LoRAConfig(r=4, lora_dropout=0.5))
    for name, parameter in model.lora_layers.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_()
    with packed_rows(model.base_model), fast_layers(model.base_model):  # type: ignore[arg-type]
        assert not torch.equal(states(model.train(), (9, 4), 0), states(model, (9, 4), 0))
        assert torch.equal(states(model.eval(), (9, 4), 0), states(model, (9, 4), 0))


def test_nothing_is_kept_below_the_first_adapted_layer() -> None:
    torch.manual_seed(0)
    model = LoRAModel(
        AutoModelForCausalLM.from_config(BASES["llama"]), LoRAConfig(r=2, layers_to_transform=[1, 2])
    ).train()
    outputs: list[Tensor] = []
    base: Any = model.base_model
    base.model.layers[0].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with packed_rows(base), fast_layers(base):
        assert states(model, (9, 4), 0).requires_grad
    assert not outputs[0].requires_grad


def test_the_classes_are_what_they_were_afterwards_also_after_an_error() -> None:
    model = AutoModelForCausalLM.from_config(BASES["llama"]).requires_grad_(False)
    before = [type(module) for module in model.modules()], list(vars(model.model.layers[0]))
    with fast_layers(model):
        assert all(isinstance(layer, FastLayer) for layer in model.model.layers)
    with pytest.raises(ZeroDivisionError), fast_layers(model):
        _ = 1 / 0
    assert ([type(module) for module in model.modules()], list(vars(model.model.layers[0]))) == before


@pytest.mark.parametrize("given", ["padded", "cache", "two adapters"])
def test_what_does_not_apply_takes_the_plain_path(given: str) -> None:
    torch.manual_seed(0)
    model = LoRAModel(AutoModelForCausalLM.from_config(BASES["llama"]), LoRAConfig(r=2)).eval()
    for parameter in model.lora_layers.parameters():
        parameter.data.normal_(0, 0.2)
    model.add_adapter("second", LoRAConfig(r=2))
    ids = torch.randint(97, (2, 8))
    inputs: dict[str, Any] = {"input_ids": ids}
    if given == "padded":
        inputs["attention_mask"] = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    if given == "cache":
        inputs["use_cache"] = True
    if given == "two adapters":
        model.set_adapter(["default", "second"])
    expected = model(**inputs).logits
    with fast_layers(model.base_model):
        assert torch.equal(model(**inputs).logits, expected)


def spoiled(what: str) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_config(BASES["llama"]).requires_grad_(False)
    for layer in model.model.layers:
        match what:
            case "hooks":
                layer.mlp.register_forward_hook(lambda *_: None)
            case "a forward put in its place":
                layer.mlp.forward = layer.mlp.forward
            case "trained weights":
                layer.mlp.up_proj.weight.requires_grad = True
            case "another activation":
                layer.mlp.act_fn = nn.GELU()
            case "dropout":
                layer.self_attn.attention_dropout = 0.1
            case "another linear class":
                layer.mlp.up_proj = nn.Identity()
            case "several dtypes":
                layer.mlp.up_proj.bfloat16()
            case "another norm":
                layer.input_layernorm = nn.LayerNorm(24).requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("hooks", "hooks"),
        ("a forward put in its place", "hooks"),
        ("trained weights", "trained"),
        ("another activation", "GELU"),
        ("dropout", "dropout"),
        ("another linear class", "up"),
        ("several dtypes", "dtypes"),
        ("another norm", "norms"),
    ],
)
def test_a_layer_that_computes_something_else_is_left_alone(what: str, said: str) -> None:
    model = spoiled(what)
    assert eligible(model) == []
    assert said in (obstacle_to_layers(model) or "")


def test_a_plain_layer_qualifies() -> None:
    model = AutoModelForCausalLM.from_config(BASES["llama"]).requires_grad_(False)
    assert obstacle_to_layers(model) is None
    assert [obstacle(layer) for layer in eligible(model)] == [None] * 3


def test_a_change_between_forward_and_backward_is_an_error() -> None:
    model = LoRAModel(AutoModelForCausalLM.from_config(BASES["llama"]), LoRAConfig(r=2)).train()
    with packed_rows(model.base_model), fast_layers(model.base_model):  # type: ignore[arg-type]
        output = states(model, (9, 4), 0)
    with torch.no_grad():
        for parameter in model.lora_layers.parameters():
            parameter.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
