"""`generate` with adapters as constant factors, against the same steps by the plain path."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tailora import LoRAConfig, LoRAModel
from tailora.core.inference import FEW_TOKENS, ConstantUpdate, generating
from tailora.core.layer import LoRALayer
from tests.tiny import chat_model, tiny_model

CONFIGS = {
    "all": LoRAConfig(r=4),
    "some": LoRAConfig(r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2}, use_rslora=True),
    "learned scale": LoRAConfig(r=4, learn_scaling=True),
    "frozen start": LoRAConfig(r=4, init_lora_weights="pissa"),
    "DoRA": LoRAConfig(r=4, use_dora=True),
    "embedding": LoRAConfig(r=4, target_modules=["embed_tokens", "v_proj"]),
    "trained biases": LoRAConfig(r=4, bias="lora_only"),
    "DoRA with biases": LoRAConfig(r=4, use_dora=True, bias="lora_only"),
    "biases beside B": LoRAConfig(r=4, lora_bias=True),
}
PROMPTS = {
    "one": torch.tensor([[5, 9, 200, 31]]),
    "two": torch.tensor([[5, 9, 200, 31], [7, 7, 1, 250]]),
    "token": torch.tensor([[17]]),
}


def stirred(config: LoRAConfig, dtype: torch.dtype = torch.float32) -> LoRAModel:
    model = LoRAModel(chat_model(initializer_range=0.3, attention_bias=True).to(dtype), config).eval()
    stir(model)
    return model


def stir(model: LoRAModel) -> None:
    for parameter in model.lora_layers.parameters():
        if parameter.numel() > 1:
            nn.init.normal_(parameter, std=0.3)


def logits_of(model: Any, prompt: Tensor, **more: Any) -> Tensor:
    """What every token was chosen by: (rows, new tokens, vocabulary)."""
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **more}
    found = model.generate(prompt, output_logits=True, return_dict_in_generate=True, **settings)
    return torch.stack(found.logits, dim=1)


@contextmanager
def watched() -> Iterator[list[tuple[int, bool]]]:
    """Rows of every update by a constant, and whether oneDNN was on."""
    seen: list[tuple[int, bool]] = []
    add_to = ConstantUpdate.add_to

    def noted(self: ConstantUpdate, y: Tensor, output: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        seen.append((x.shape[:-1].numel(), torch.backends.mkldnn.enabled))  # type: ignore[arg-type]
        return add_to(self, y, output, x, layer)

    ConstantUpdate.add_to = noted  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        ConstantUpdate.add_to = add_to  # type: ignore[method-assign]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.slow
def test_tokens_and_logits_are_those_of_the_plain_path(config: str, prompt: str) -> None:
    model = stirred(CONFIGS[config])
    with watched() as seen:
        found = logits_of(model, PROMPTS[prompt])
    assert seen
    expected = logits_of(model.base_model, PROMPTS[prompt])  # past LoRAModel.generate
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits_of(model.unload(), PROMPTS[prompt]), atol=0.1)


@pytest.mark.parametrize("second", ["some", "DoRA", "DoRA with biases"])
def test_several_adapters_and_their_strengths_are_one_constant(second: str) -> None:
    model = stirred(CONFIGS["all" if second == "some" else "DoRA"])
    model.add_adapter("second", CONFIGS[second])
    model.set_adapter(["default", "second"])
    stir(model)
    model.set_scale("second", 0.5)
    with watched() as seen:
        found = logits_of(model, PROMPTS["one"])
    assert len(seen) == 6 * 14
    torch.testing.assert_close(found, logits_of(model.base_model, PROMPTS["one"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "Phi3ForCausalLM"])
def test_layers_that_store_the_transpose_and_parts_of_fused_layers(architecture: str) -> None:
    model = LoRAModel(tiny_model(architecture), LoRAConfig(r=4, use_dora=True)).eval()
    stir(model)
    prompt = PROMPTS["two"] % 80
    with watched() as seen:
        found = logits_of(model, prompt)
    assert seen
    torch.testing.assert_close(found, logits_of(model.base_model, prompt), rtol=1e-4, atol=1e-4)


class Operations(TorchDispatchMode):
    """Counts the operations that compute or copy, each of which is a kernel on a device. Views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func not in (torch.ops.aten._unsafe_view.default,)
        return func(*args, **(kwargs or {}))


def operations_of_a_token(model: Any, rows: int) -> int:
    counts = []
    for tokens in (3, 4):
        with Operations() as operations:
            logits_of(model, torch.full((rows, 3), 7), max_new_tokens=tokens, min_new_tokens=tokens)
        counts.append(operations.count)
    return counts[1] - counts[0]


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("names", [["default"], ["default", "second"]])
@pytest.mark.parametrize(("config", "more"), [("all", 2), ("DoRA", 3), ("DoRA with biases", 3)])
def test_a_token_takes_two_more_operations_in_each_layer_and_three_with_dora(
    config: str, more: int, names: list[str], rows: int
) -> None:
    model = stirred(CONFIGS[config], torch.bfloat16)
    model.add_adapter("second", CONFIGS[config])
    model.set_adapter(names)
    stir(model)
    logits_of(model, PROMPTS["token"])  # a CPU keeps the norms
    adapted = operations_of_a_token(model, rows)
    model.set_adapter(None)
    assert adapted - operations_of_a_token(model.base_model, rows) == more * 14


@pytest.mark.slow
def test_in_bfloat16_few_rows_leave_onednn_and_many_do_not() -> None:
    model = stirred(CONFIGS["all"], torch.bfloat16)
    forced = {"prefix_allowed_tokens_fn": lambda *_: [7]}
    with watched() as seen:
        found = logits_of(model, PROMPTS["one"], **forced)
    onednn = torch.backends.mkldnn.is_available()
    assert set(seen) == {(4, onednn), (1, False)}
    assert torch.backends.mkldnn.enabled is onednn
    plain = logits_of(model.base_model, PROMPTS["one"], **forced)
    exact = logits_of(model.float(), PROMPTS["one"], **forced)
    assert (found - exact).norm() <= 2 * (plain - exact).norm()  # factors are rounded, as in training
    model.bfloat16()
    with watched() as seen:
        logits_of(model, PROMPTS["one"].expand(FEW_TOKENS + 1, -1))
    assert all(enabled is onednn for _, enabled in seen)


def test_a_second_generate_meanwhile_leaves_the_kernels_alone() -> None:
    """The choice is the whole process's, and slow for the many rows of another prompt."""
    model, other = stirred(CONFIGS["all"], torch.bfloat16), stirred(CONFIGS["all"], torch.bfloat16)
    inside, over = Event(), Event()

    def wait(ids: Tensor, _scores: Tensor) -> Tensor:
        inside.set()
        over.wait(60)
        return torch.zeros(len(ids), dtype=torch.bool)

    thread = Thread(target=logits_of, args=(model, PROMPTS["one"]), kwargs={"stopping_criteria": [wait]})
    thread.start()
    assert inside.wait(60)
    with watched() as seen:
        logits_of(other, PROMPTS["one"])
    over.set()
    thread.join()
    assert seen == []
    assert torch.backends.mkldnn.enabled is torch.backends.mkldnn.is_available()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_afterwards_all_is_as_before_also_after_an_error(dtype: torch.dtype) -> None:
    model = stirred(CONFIGS["all"], dtype)
    before = {path: layer.adapter_parts for path, layer in model._adapter_set.layers.items()}  # type: ignore[misc]
    hooks = [len(module._forward_hooks) for module in model.modules()]

    def fail(_ids: Tensor, _scores: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        logits_of(model, PROMPTS["one"], stopping_criteria=[fail])
    assert {path: layer.adapter_parts for path, layer in model._adapter_set.layers.items()} == before
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.backends.mkldnn.enabled is torch.backends.mkldnn.is_available()


def test_what_changes_between_two_calls_counts() -> None:
    model = stirred(CONFIGS["all"])
    first = logits_of(model, PROMPTS["one"])
    layer = model.lora_layers["model/layers/0/mlp/down_proj"]
    assert isinstance(layer, LoRALayer)
    layer.lora_B.data.mul_(2)
    second = logits_of(model, PROMPTS["one"])
    assert not torch.allclose(first, second)
    model.set_adapter(None)
    assert not torch.allclose(second, logits_of(model, PROMPTS["one"]))


def test_a_switch_meanwhile_holds() -> None:
    model = stirred(CONFIGS["all"])
    model.add_adapter("second", CONFIGS["some"])

    def switch(ids: Tensor, _scores: Tensor) -> Tensor:
        model.set_adapter("second")
        return torch.zeros(len(ids), dtype=torch.bool)

    logits_of(model, PROMPTS["one"], stopping_criteria=[switch])
    assert model.active_adapters == ("second",)
    parts = [part for layer in model._adapter_set.layers.values() for part in layer.adapter_parts]  # type: ignore[union-attr]
    assert {id(part) for part in parts} == {id(layer) for layer in model.lora_layers.values()}


def test_dropout_in_training_is_drawn() -> None:
    model = stirred(LoRAConfig(r=4, lora_dropout=0.5)).train()
    with watched() as seen:
        logits_of(model, PROMPTS["one"])
    assert seen == []


@pytest.mark.slow
def test_a_compiled_model_is_left_alone() -> None:
    model = stirred(CONFIGS["all"])
    model.base_model.model.layers[0].compile(backend="eager")  # type: ignore[union-attr,index,operator]
    with watched() as seen:
        logits_of(model, PROMPTS["one"])
    assert seen == []


def test_the_last_states_of_several_prompts_reach_the_head_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = stirred(CONFIGS["all"]), list[bool]()
    head: Any = model.base_model.lm_head
    compute = head.forward

    def forward(states: Tensor) -> Tensor:
        seen.append(states.is_contiguous())
        return compute(states)

    monkeypatch.setattr(head, "forward", forward)
    logits_of(model, PROMPTS["two"])
    assert len(seen) == 6
    assert all(seen)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_base_may_be_anywhere(device: str) -> None:
    """accelerate leaves weights that it keeps on a disk on the device "meta"."""
    layer = nn.Linear(2, 2, device=device)
    with generating(nn.Sequential(layer), {"0": layer}):
        assert not torch.is_grad_enabled()


def test_a_call_that_transformers_compiles_makes_no_constants_and_is_compiled_once() -> None:
    """For a static cache on a card, `generate` compiles the call of the base, as CUDA graphs, within the block."""
    torch._dynamo.reset()
    model, graphs, x = (
        LoRAModel(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=2, use_dora=True)).eval(),
        [],
        torch.randn(3, 8),
    )
    stir(model)

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model.base_model.__call__, fullgraph=True, backend=count)
    with torch.no_grad():
        expected, seen = model(x), []
        for _ in range(4):
            with generating(model.base_model, model._adapter_set.layers):
                torch.testing.assert_close(compiled(x), expected)
                (constant,) = model.base_model[0].adapter_parts  # type: ignore[index,union-attr]
                assert constant._constants is None
            seen.append(len(graphs))
    assert seen[1] == seen[3]
