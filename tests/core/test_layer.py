import pytest
import torch
from torch import nn

from tailora import LoRAConfig, LoRALayer, LoRAModel
from tailora.errors import ConfigError


def test_alone_it_is_the_update_for_x() -> None:
    layer = LoRALayer(6, 5, rank=2, lora_alpha=3)
    assert layer.lora_A.shape == (2, 6)
    assert layer.lora_B.shape == (5, 2)
    x = torch.randn(4, 6)
    assert torch.equal(layer(x), torch.zeros(4, 5))
    nn.init.normal_(layer.lora_B)
    torch.testing.assert_close(layer(x), 1.5 * x @ layer.lora_A.T @ layer.lora_B.T)
    assert torch.allclose(layer.delta_weight() @ x[0], layer(x[0]), atol=1e-6)


def test_a_parameter_makes_the_scale_learned_and_a_number_fixes_it_again() -> None:
    layer, x = LoRALayer(6, 5), torch.randn(4, 6)
    nn.init.normal_(layer.lora_B)
    layer.scaling = nn.Parameter(torch.ones(1))
    assert layer.learns_scaling
    layer(x).sum().backward()
    assert isinstance(layer.scaling, nn.Parameter)
    update = x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer.scaling.grad, update.sum().reshape(1), rtol=1e-4, atol=1e-4)
    for number in (2, 0.01):
        layer.scaling = number
        assert layer.scaling == number
        assert not layer.learns_scaling
        torch.testing.assert_close(layer(x), number * update)
        assert [name for name, _ in layer.named_parameters()] == ["lora_A", "lora_B"]


def test_a_learned_scale_of_a_bfloat16_input_feels_steps_that_bfloat16_cannot_hold() -> None:
    layer, x = LoRALayer(64, 64, rank=4, learn_scaling=True), torch.randn(8, 64, dtype=torch.bfloat16)
    nn.init.normal_(layer.lora_B)
    first = layer(x)
    layer.scaling.data += 1e-3  # 2.001 rounds to 2 in bfloat16
    assert not torch.equal(layer(x), first)


@pytest.mark.parametrize("scaling", [torch.ones(2), torch.ones(2, 1)])
def test_a_scale_is_one_number(scaling: torch.Tensor) -> None:
    layer = LoRALayer(6, 5)
    with pytest.raises(ConfigError, match="one number per layer"):
        layer.scaling = scaling
    assert layer.scaling == 2


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_the_rank_is_between_one_and_the_smaller_side(rank: int) -> None:
    with pytest.raises(ConfigError, match=r"expected rank 1\.\.5"):
        LoRALayer(6, 5, rank=rank)


def test_the_state_dict_carries_the_scale() -> None:
    layer, other = LoRALayer(6, 5), LoRALayer(6, 5)
    layer.scaling = 0.25
    other.load_state_dict(layer.state_dict())
    assert other.scaling == 0.25
    assert set(layer.state_dict()) == {"lora_A", "lora_B", "scaling"}


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_the_strength_multiplies_all_that_is_added_also_to_the_bias(strength: float) -> None:
    """W x + b + t ((g - 1) W x + g s B A x + b' - b), for DoRA with a trained bias."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5)).double()
    W, b, x = base[0].weight.clone(), base[0].bias.clone(), torch.randn(4, 6, dtype=torch.float64)
    model = LoRAModel(base, LoRAConfig(r=2, use_dora=True, bias="lora_only"))
    layer = model.lora_layers["0"]
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    model.set_scale("default", strength)
    update = layer.scaling * layer.lora_B @ layer.lora_A
    gain = layer.lora_magnitude_vector / (W + update).norm(dim=1)
    change = x @ ((gain[:, None] - 1) * W + gain[:, None] * update).T + layer.bias - b
    torch.testing.assert_close(model(x), x @ W.T + b + strength * change)


@torch.no_grad()
def test_a_number_of_tokens_that_depends_on_data_compiles_into_one_graph() -> None:
    layer, x, mask = LoRALayer(6, 5).eval(), torch.randn(8, 6), torch.arange(8) % 3 == 0
    nn.init.normal_(layer.lora_B)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lambda x, mask: layer(x[mask]), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, mask), layer(x[mask]))
