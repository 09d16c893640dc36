"""LoRAModel: adapters by name, and what stays as it was."""

import json
import re
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import chat_model, stir, stirred_model
from torch import Tensor, nn

from tailora import LoRAConfig, LoRAModel
from tailora.core.adapter import layer_key
from tailora.errors import AdapterError, ConfigError, MergeError, TargetError
from tailora.model import PEFT_NAMES


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))


def two() -> LoRAModel:
    """Adapters `default` and `b`, of different ranks, both doing something; `default` is active."""
    model = stirred_model(net(), LoRAConfig(r=2))
    model.add_adapter("b", LoRAConfig(r=3, target_modules=["2"]))
    model.set_adapter("b")
    stir(model, seed=7)
    model.set_adapter("default")
    return model


def test_a_model_and_what_combine_returns_are_shown_in_a_line() -> None:
    model = two()
    assert repr(model) == (
        "LoRAModel(Sequential, 2 layers adapted, adapters: 'default' (active), 'b'; summary() lists the layers)"
    )
    report = model.combine({"default": 0.5, "b": 0.5}, name="mix", method="svd", r=1)
    assert re.fullmatch(r"Truncation\(2 layers, relative error up to 0\.\d+: see rank, error\)", repr(report))
    assert set(report.rank) == {"0", "2"}
    tuned = net()
    tuned[0].weight.data += 0.1
    _, extraction = LoRAModel.from_difference(net(), tuned, r=1)
    assert repr(extraction).startswith("Extraction(1 layers, relative error up to ")


def test_switching_adapters_changes_the_output() -> None:
    model, x = two(), torch.randn(3, 8)
    default, base = model(x), net()(x)
    model.set_adapter("b")
    b = model(x)
    assert list(model.lora_layers) == ["2"]
    model.set_adapter(None)
    assert torch.equal(model(x), base)
    assert len(model.lora_layers) == 0
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    model.set_adapter("default")
    assert torch.equal(model(x), default)
    assert len(model.lora_layers) == 2
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert model.active_adapters == ("default",)
    assert torch.equal(model(x), default)
    assert not torch.equal(default, b)


def test_several_active_adapters_add_up() -> None:
    model, x = two(), torch.randn(3, 8)
    layer: Any = model.base_model[2]
    inner = torch.tanh(model.base_model[0](x))
    deltas = [model.adapter(name).low_rank["2"].delta_weight() for name in ("default", "b")]
    model.set_adapter(["default", "b"])
    torch.testing.assert_close(model(x), inner @ (layer.weight + sum(deltas)).T + layer.bias)
    assert len(model.lora_layers) == 2
    parameters = {id(parameter) for parameter in model.lora_layers.parameters()}
    assert len(parameters) == 6  # A and B of three low-rank layers


@pytest.mark.parametrize("training", [True, False])
def test_loading_and_switching_change_neither_mode_nor_requires_grad(training: bool, tmp_path: Path) -> None:
    model = two().train(training)
    model.base_model[0].bias.requires_grad = True  # the user's own choice
    model.lora_layers["0"].lora_A.requires_grad = False
    model.save_adapter(tmp_path)
    random = torch.get_rng_state()
    state = [(name, p.requires_grad) for name, p in model.named_parameters()]
    model.load_adapter(tmp_path, "c")
    model.set_adapter("c")
    assert {module.training for module in model.modules()} == {training}
    model.set_adapter("default")
    assert {module.training for module in model.modules()} == {training}
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == state
    assert torch.equal(torch.get_rng_state(), random)
    assert model.active_adapters == ("default",)


@pytest.mark.parametrize("name", ["q_proj", "0", "keys", "weight", "a.b", "base_model", "lora_A"])
def test_a_name_never_enters_a_parameter_path(name: str, tmp_path: Path) -> None:
    plain, named = LoRAModel(net(), LoRAConfig(r=2)), LoRAModel(net(), LoRAConfig(r=2), adapter_name=name)
    assert [key for key, _ in named.named_parameters()] == [key for key, _ in plain.named_parameters()]
    stir(named)
    folder = named.save_adapter(tmp_path, name)
    assert folder == tmp_path / name
    x = torch.randn(2, 8)
    assert torch.equal(LoRAModel.from_pretrained(net(), folder)(x), named(x))


@pytest.mark.parametrize("name", ["keys", "values", "pop", "layer"])
def test_a_layer_may_be_called_like_a_method_of_moduledict(name: str) -> None:
    base = nn.Module()
    base.add_module(name, nn.Linear(4, 4))
    model = LoRAModel(base, LoRAConfig(r=2))
    assert list(model.lora_layers) == [layer_key(name)]
    assert model.summary().rows[0].path == name


def test_the_base_may_be_a_single_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = LoRAModel(nn.Linear(4, 4), LoRAConfig(r=2)), torch.randn(2, 4)
    stir(model)
    torch.manual_seed(0)
    again = LoRAModel.from_pretrained(nn.Linear(4, 4), model.save_adapter(tmp_path))
    assert torch.equal(again(x), model(x))


def test_unknown_and_taken_names_are_errors_that_name_what_there_is() -> None:
    model = two()
    with pytest.raises(
        AdapterError, match="unknown adapter 'defalt'; existing adapters: default, b; did you mean default"
    ):
        model.set_adapter("defalt")
    for add in (lambda: model.add_adapter("b", LoRAConfig(r=2)), lambda: model.load_adapter("anywhere", "b")):
        with pytest.raises(AdapterError, match="'b' already exists"):
            add()
    with pytest.raises(AdapterError, match="non-empty string"):
        model.add_adapter("", LoRAConfig(r=2))
    with pytest.raises(AdapterError, match="expected a name, several names, or None for the base model, got 3"):
        model.set_adapter(3)  # type: ignore[arg-type]
    assert model.active_adapters == ("default",)


def test_a_deleted_adapter_leaves_the_others_and_the_classes_of_the_base() -> None:
    model, x = two(), torch.randn(3, 8)
    expected = model(x)
    model.delete_adapter("b")
    assert list(model.adapters) == ["default"]
    assert torch.equal(model(x), expected)
    model.delete_adapter("default")
    assert torch.equal(model(x), net()(x))
    assert type(model.base_model[0]) is nn.Linear


def test_the_base_s_own_attributes_and_generate_are_there() -> None:
    base = chat_model()
    model = LoRAModel(base)
    assert model.config is base.config
    ids = torch.arange(4)[None]
    torch.testing.assert_close(
        model.generate(ids, max_new_tokens=4, do_sample=False), base.generate(ids, max_new_tokens=4, do_sample=False)
    )
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = model.nothing_like_it


def test_adapters_that_are_not_active_follow_the_model_to_another_precision() -> None:
    model, x = two(), torch.randn(3, 8, dtype=torch.float64)
    model.double()
    model.set_adapter("b")
    assert model(x).dtype == torch.float64
    assert {parameter.dtype for parameter in model.lora_layers.parameters()} == {torch.float64}


def test_the_encoder_s_inference_fast_path_does_not_pass_by_the_adapter() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0), 2).eval()
    x, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 4 + [True], [False] * 5])
    model = stirred_model(encoder, LoRAConfig(r=4))
    with_grad = model(x, src_key_padding_mask=mask)
    with torch.no_grad():
        without_grad = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(with_grad[~mask], without_grad[~mask])
    with model.disable_adapter():
        assert not torch.allclose(model(x, src_key_padding_mask=mask)[~mask], with_grad[~mask], atol=1e-3)
    assert type(model.unload()) is nn.TransformerEncoder


@pytest.mark.slow
def test_attaching_takes_linear_time_and_adds_one_module_per_layer() -> None:
    def seconds(layers: int) -> float:
        base = nn.Sequential(*[nn.Linear(8, 8) for _ in range(layers)])
        start = time.process_time()
        model = LoRAModel(base, LoRAConfig(r=2))
        model.add_adapter("second", LoRAConfig(r=2))
        elapsed = time.process_time() - start
        assert sum(1 for _ in model.lora_layers.modules()) == layers + 1
        return elapsed

    seconds(100)
    small = min(seconds(125) for _ in range(3))
    large = min(seconds(1000) for _ in range(2))
    assert large < 8 * 3 * small  # quadratic time would be 64 times
    assert large < 1.5


def test_switching_does_not_grow_with_the_number_of_loaded_adapters() -> None:
    model = LoRAModel(nn.Sequential(*[nn.Linear(8, 8) for _ in range(100)]), LoRAConfig(r=2))

    def seconds_with(adapters: int) -> float:
        """Of 100 switches, the least of three measurements, with so many adapters beside the first."""
        for number in range(len(model.adapters) - 1, adapters):
            model.add_adapter(str(number), LoRAConfig(r=2))
        measured = []
        for _ in range(3):
            start = time.process_time()
            for _ in range(50):
                model.set_adapter("default")
                model.set_adapter("0")
            measured.append(time.process_time() - start)
        return min(measured)

    few = seconds_with(2)
    assert seconds_with(40) < 3 * few
    assert few / (100 * 100) < 20e-6  # a layer takes microseconds


def saving(*names: str) -> LoRAConfig:
    return LoRAConfig(r=2, target_modules=["0"], modules_to_save=list(names))


def test_two_adapters_that_train_the_same_module_whole_are_independent() -> None:
    model, x = LoRAModel(net(), saving("2")), torch.randn(4, 8)
    model.lora_layers["2"].weight.data.fill_(1.0)
    first = model(x)
    model.add_adapter("b", saving("2"))
    model.set_adapter("b")
    assert torch.equal(model(x), net()(x))
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.lora_layers["2"].parameters())
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    with pytest.raises(AdapterError, match="cannot be active together"):
        model.set_adapter(["default", "b"])
    assert torch.equal(model(x), first)


def test_a_target_inside_a_module_that_is_trained_whole_is_refused() -> None:
    base = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8))
    with pytest.raises(TargetError, match=r"0\.0 is in both target_modules and modules_to_save \(0\)"):
        LoRAModel(base, LoRAConfig(r=2, target_modules=["0.0", "1"], modules_to_save=["0"]))


def test_modules_to_save_train_a_copy_which_a_merge_puts_into_the_base_and_takes_out_again() -> None:
    model, x = LoRAModel(net(), saving("2")), torch.randn(4, 8)
    before = {name: value.clone() for name, value in model.base_model.state_dict().items()}
    optimizer = torch.optim.SGD(model.lora_layers.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    expected = model(x)
    assert not torch.equal(expected, net()(x))
    with model.merged():
        torch.testing.assert_close(model(x), expected)
        assert torch.equal(model.base_model[2].weight, model.adapter().saved["2"].weight)
    assert all(torch.equal(value, before[name]) for name, value in model.base_model.state_dict().items())
    assert torch.equal(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), net()(x))
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_a_module_trained_whole_is_float32_on_a_bfloat16_base() -> None:
    model = LoRAModel(net().to(torch.bfloat16), saving("2"))
    y = model(torch.randn(4, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.lora_layers.parameters()} == {torch.float32}
    y.float().sum().backward()
    assert model.merge_and_unload()[2].weight.dtype == torch.bfloat16


def test_the_mode_of_every_part_follows_the_model() -> None:
    model, x = LoRAModel(net(), LoRAConfig(r=2, lora_dropout=0.5)), torch.randn(4, 8)
    model.add_adapter("b", LoRAConfig(r=2, lora_dropout=0.5))
    stir(model)
    model.set_adapter(["default", "b"])
    model.eval()
    model.set_adapter(None)
    model.train()
    model.set_adapter("default")
    assert not torch.equal(model(x), model(x))  # dropout is on
    model.set_adapter(None)
    model.eval()
    model.set_adapter("default")
    assert torch.equal(model(x), model(x))


def test_an_invalid_strength_is_refused() -> None:
    model = two()
    for strength in (float("nan"), "much", None):
        with pytest.raises(ConfigError, match="expected a finite strength"):
            model.set_scale("default", strength)  # type: ignore[arg-type]
    model.set_scale("default", torch.tensor(1.0))  # type: ignore[arg-type]
    model.merge()
    with pytest.raises(MergeError, match="cannot change a strength while merged"):
        model.set_scale("default", 0.5)


def test_an_argument_that_is_no_plain_model_or_config_is_refused() -> None:
    with pytest.raises(TargetError, match=r"expected a torch\.nn\.Module as base_model, got str; load it first"):
        LoRAModel("gpt2")  # type: ignore[arg-type]
    for base in ((model := two()).base_model, model):
        with pytest.raises(TargetError, match="already has tailora adapters"):
            LoRAModel(base, LoRAConfig(r=2))
    with pytest.raises(TargetError, match="as base_model, got NoneType"):
        LoRAModel.from_pretrained(None, "anywhere")  # type: ignore[arg-type]
    for config in ({"r": 2}, peft.LoraConfig(r=2)):
        with pytest.raises(ConfigError, match=f"expected a LoRAConfig, .*, got {type(config).__name__}"):
            LoRAModel(nn.Linear(4, 4), config)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"lora_alpha = 1e\+300 overflows torch\.float32"):
        LoRAModel(nn.Linear(4, 4), LoRAConfig(r=2, lora_alpha=1e300))


def test_paths_that_a_slash_makes_alike_keep_their_own_entries() -> None:
    base = nn.ModuleDict({"a/b": nn.Linear(4, 4), "a": nn.ModuleDict({"b": nn.Linear(4, 4)})})
    assert len(LoRAModel(base, LoRAConfig(r=2)).lora_layers) == 2


def test_a_subclass_with_a_forward_of_its_own_is_not_adapted() -> None:
    class Clamped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clamp(-5, 5))

    base = nn.Sequential(nn.Linear(8, 8), Clamped(8, 8))
    assert [*LoRAModel(base, LoRAConfig(r=2)).lora_layers] == ["0"]
    with pytest.raises(TargetError, match=r"1: Clamped overrides forward, .* register_layer_type"):
        LoRAModel(nn.Sequential(nn.Linear(8, 8), Clamped(8, 8)), LoRAConfig(r=2, target_modules=["0", "1"]))
    with pytest.raises(TargetError, match=r"no layer left.*Clamped overrides forward"):
        LoRAModel(nn.Sequential(Clamped(8, 8)), LoRAConfig(r=2))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # that PEFT asks for
def test_the_numbers_of_parameters_are_those_of_peft(capsys: pytest.CaptureFixture[str]) -> None:
    model = LoRAModel(chat_model(), LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
    expected = peft.get_peft_model(chat_model(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert model.get_nb_trainable_parameters() == expected.get_nb_trainable_parameters()
    expected.print_trainable_parameters()
    model.print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_an_adapter_that_is_loaded_for_use_alone_has_no_trainable_parameters(tmp_path: Path) -> None:
    LoRAModel(net(), LoRAConfig(r=2)).save_pretrained(tmp_path)
    model = LoRAModel.from_pretrained(net(), tmp_path, is_trainable=False)
    model.load_adapter(tmp_path, "b", is_trainable=False)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.set_adapter("b")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.load_adapter(tmp_path, name="c")
    model.set_adapter("c")
    assert all(parameter.requires_grad for parameter in model.lora_layers.parameters())


def test_the_other_names_of_peft_lead_to_ours() -> None:
    model = LoRAModel(chat_model())
    for name, ours in PEFT_NAMES.items():
        with pytest.raises(AttributeError, match=f"does not have PEFT's {name}; use {re.escape(ours)}"):
            getattr(model, name)
        assert hasattr(LoRAModel, ours.partition("(")[0].strip()) or ours == "base_model"


@pytest.mark.parametrize("task_type", ["TOKEN_CLS", peft.TaskType.TOKEN_CLS])
def test_the_task_type_is_written_to_the_folder(task_type: Any, tmp_path: Path) -> None:
    LoRAModel(net(), LoRAConfig(r=2, task_type=task_type)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"
    assert LoRAModel.from_pretrained(net(), tmp_path).adapters["default"].task_type == "TOKEN_CLS"
    with pytest.raises(ConfigError, match="task_type = 'CHAT': input should be 'SEQ_CLS'"):
        LoRAConfig(task_type="CHAT")


# ---- What users of PEFT try


def test_a_loaded_adapter_is_in_the_mode_of_its_base(tmp_path: Path) -> None:
    model = stirred_model(net(), LoRAConfig(r=2, lora_dropout=0.5))
    model.save_adapter(tmp_path)
    x = torch.randn(4, 8)
    expected = model.eval()(x)
    for base_model, is_trainable in ((net().eval(), True), (net(), False)):
        loaded = LoRAModel.from_pretrained(base_model, tmp_path, is_trainable=is_trainable)
        assert not loaded.training
        torch.testing.assert_close(loaded(x), expected)
    assert LoRAModel.from_pretrained(net(), tmp_path).training


def test_the_argument_of_peft_for_rows_is_refused_and_leads_to_ours() -> None:
    model = LoRAModel(chat_model(), LoRAConfig(r=2))
    tokens = torch.arange(6).view(2, 3)
    for call in (model, model.generate):
        with pytest.raises(AdapterError, match="adapter_rows"):
            call(input_ids=tokens, adapter_names=["default", "__base__"])


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj"]}]
)
def test_embeddings_are_resized_unless_an_adapter_holds_them(settings: dict[str, Any]) -> None:
    model = LoRAModel(chat_model(), LoRAConfig(r=2, **settings))
    rows = model.base_model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if settings == {"target_modules": ["q_proj"]}:
        model.resize_token_embeddings(rows + 8)
        assert model(torch.tensor([[rows + 7]])).logits.shape[-1] == rows + 8
        return
    with pytest.raises(AdapterError, match="cannot resize the base model, because adapters of"):
        model.resize_token_embeddings(rows + 8)
    assert model.base_model.get_input_embeddings().num_embeddings == rows  # type: ignore[operator]


def test_saving_without_an_adapter_is_refused(tmp_path: Path) -> None:
    model = LoRAModel(net(), LoRAConfig(r=2))
    model.delete_adapter("default")
    with pytest.raises(AdapterError, match="no adapter to save"):
        model.save_pretrained(tmp_path / "out")
