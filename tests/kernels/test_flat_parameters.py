from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tailora import LoRAConfig, LoRAModel
from tailora.errors import ConfigError
from tailora.kernels.flat_parameters import ALIGNMENT, CHUNK, Group, check_views, flattened, gradient_norm


@pytest.fixture
def model() -> LoRAModel:
    """Factors of three shapes, learned scales of one element, and a module trained in full."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5), nn.Linear(5, 3))
    config = LoRAConfig(r=2, target_modules=["0", "2"], modules_to_save=["3"], learn_scaling=True)
    adapted = LoRAModel(base, config)
    for layer in ("0", "2"):
        nn.init.normal_(adapted.lora_layers[layer].lora_B)
    return adapted


def parameters(model: LoRAModel) -> dict[str, nn.Parameter]:
    return dict(model.lora_layers.named_parameters())


def in_buffer(part: Tensor, buffer: Tensor) -> bool:
    return part.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def own(parameter: nn.Parameter) -> bool:
    return parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


def backward(model: LoRAModel, seed: int) -> None:
    torch.manual_seed(seed)
    model(torch.randn(4, 7)).square().sum().backward()


def test_one_buffer_holds_all_that_is_trained(model: LoRAModel) -> None:
    before = {name: parameter.detach().clone() for name, parameter in parameters(model).items()}
    assert {tuple(tensor.shape) for tensor in before.values()} >= {(2, 7), (9, 2), (), (3, 5)}
    with flattened([Group(parameters(model))]) as (flat,):
        assert flat.parameters.keys() == before.keys()
        for name, parameter in parameters(model).items():
            assert in_buffer(parameter, flat.parameter)
            assert in_buffer(parameter.grad, flat.gradient)
            assert parameter.data_ptr() % ALIGNMENT == parameter.grad.data_ptr() % ALIGNMENT == 0
            assert torch.equal(parameter, before[name])
            assert torch.equal(flat.view(name, flat.parameter), before[name])
            assert not parameter.grad.any()


def test_the_backward_of_several_micro_batches_adds_up_in_the_buffer(model: LoRAModel) -> None:
    for seed in range(3):
        backward(model, seed)
    expected = {name: parameter.grad.clone() for name, parameter in parameters(model).items()}
    expected["unused"] = torch.zeros(3)
    with flattened([Group({**parameters(model), "unused": nn.Parameter(torch.ones(3))})]) as (flat,):
        for seed in range(3):
            backward(model, seed)
            check_views([flat])
        for name, gradient in expected.items():
            assert torch.equal(flat.view(name, flat.gradient), gradient)
        assert flat.gradient.norm() > 0


@pytest.mark.parametrize("failing", [False, True])
def test_afterwards_every_parameter_is_a_tensor_of_its_own(model: LoRAModel, failing: bool) -> None:
    trained = parameters(model)
    last = {name: 2 * parameter.detach() for name, parameter in trained.items()}
    try:
        with flattened([Group(trained)]) as (flat,):
            backward(model, 0)
            flat.parameter.detach().mul_(2)
            assert not any(own(parameter) for parameter in trained.values())
            if failing:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert failing
    assert parameters(model).keys() == trained.keys()
    for name, parameter in parameters(model).items():
        assert parameter is trained[name]
        assert torch.equal(parameter, last[name])
        assert parameter.requires_grad
        assert parameter.grad is None
        assert own(parameter)
        assert parameter.is_contiguous()
    backward(model, 0)
    assert len({parameter.grad.untyped_storage().data_ptr() for parameter in trained.values()}) == len(trained)


def test_groups_dtypes_and_their_settings_have_buffers_of_their_own() -> None:
    single, double, other = map(nn.Parameter, (torch.ones(3), torch.ones(3).double(), torch.ones(2)))
    groups = [Group({"single": single, "double": double}, 1.0, 0.5), Group({"other": other}, 16.0, 0.0)]
    with flattened(groups) as flats:
        assert [
            (list(flat.parameters), flat.parameter.dtype, flat.rate_factor, flat.weight_decay) for flat in flats
        ] == [
            (["single"], torch.float32, 1.0, 0.5),
            (["double"], torch.float64, 1.0, 0.5),
            (["other"], torch.float32, 16.0, 0.0),
        ]
        single.grad.fill_(1.0)
        double.grad.fill_(2.0)
        other.grad.fill_(3.0)
        assert float(gradient_norm(flats)) == pytest.approx((3 * 1 + 3 * 4 + 2 * 9) ** 0.5)


def test_the_norm_of_millions_is_right_to_a_millionth() -> None:
    torch.manual_seed(0)
    with flattened([Group({"all": nn.Parameter(torch.zeros(10_000_000))})]) as (flat,):
        flat.view("all", flat.gradient).normal_(std=1e-3)
        exact = float(torch.linalg.vector_norm(flat.gradient.double()))
        assert float(gradient_norm([flat])) == pytest.approx(exact, rel=1e-6)


def test_a_parameter_or_a_name_in_two_groups_is_refused() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with (
        pytest.raises(ConfigError, match=r"a is in several.*\n.*b is in several"),
        flattened([Group({"a": first, "b": first})]),
    ):
        pass
    with pytest.raises(ConfigError, match="a is in several"), flattened([Group({"a": first}), Group({"a": second})]):
        pass
    assert own(first)


@pytest.mark.parametrize(
    "harm",
    [
        lambda model: model.zero_grad(),
        lambda model: model.to(torch.float64),
        lambda model: setattr(model.lora_layers["0"].lora_A, "grad", torch.zeros(2, 7)),
        lambda model: setattr(model.lora_layers["0"].lora_A, "data", torch.zeros(2, 7)),
    ],
)
def test_a_parameter_that_left_its_buffer_is_named(model: LoRAModel, harm: Callable[[LoRAModel], None]) -> None:
    with flattened([Group(parameters(model))]) as flats:
        gradient_norm(flats)
        harm(model)
        with pytest.raises(RuntimeError, match=r"first 0\.lora_A"):
            gradient_norm(flats)


def test_moving_a_model_to_where_it_is_leaves_the_buffers(model: LoRAModel) -> None:
    with flattened([Group(parameters(model))]) as flats:
        backward(model, 0)
        model.to("cpu").to(torch.float32)
        check_views(flats)


def test_the_gaps_take_less_than_one_row() -> None:
    with flattened([Group({str(i): nn.Parameter(torch.ones(16, 576)) for i in range(99)})]) as (flat,):
        assert 99 * 16 * 576 <= flat.parameter.numel() < 99 * 16 * 576 + CHUNK
