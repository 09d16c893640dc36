"""A different adapter for every batch row: each row is what its adapter alone computes."""

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import LAYERS, PAIRS, SLOTS, LayerCase, all_of, pairs_of
from tiny import stir, stirred_model
from torch import Tensor, nn
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tailora import LoRAConfig, LoRAModel
from tailora.core import mixed_batch
from tailora.core.layer import LoRALayer
from tailora.core.mixed_batch import MixedBatch, MixedPart, make_blocks
from tailora.errors import AdapterError, MergeError, RowsError

ROWED = [case for case in LAYERS if case.shape != (12,)]  # one vector has no rows
layer_cases = all_of(ROWED)
pairs = pairs_of([pair for pair in PAIRS if pair[0] in ROWED])
NAMES = ["a", None, "b", "a", "c"]


def mixed(case: LayerCase, slot: str = "plain", dtype: torch.dtype = torch.float32) -> LoRAModel:
    """Adapters a, b, c: the slot at two ranks and two strengths, and a plain one. In eval mode, a active."""
    settings: dict[str, Any] = {"lora_alpha": 10, "target_modules": ["target"]}
    model = LoRAModel(case.net(dtype), LoRAConfig(r=case.r, **{**settings, **SLOTS[slot]}), "a")
    model.add_adapter(
        "b", LoRAConfig(r=case.r // 2 or 1, **{**settings, **SLOTS[slot]}) if halves(case) else model.adapters["a"]
    )
    model.add_adapter("c", LoRAConfig(r=case.r, **settings))
    for seed, name in enumerate("cba"):
        model.set_adapter(name)
        stir(model, seed)
    model.set_scale("b", 0.5)
    return model.eval()


def halves(case: LayerCase) -> bool:
    return (case.r // 2) % getattr(case.layer(), "groups", 1) == 0


def rows_of(case: LayerCase, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.cat([case.batch(dtype, seed) for seed in range(n)])[:n]


def one_by_one(model: LoRAModel, x: Tensor, names: list[str | None]) -> Tensor:
    """Every row in a batch of its own, with its adapter active."""
    outputs = []
    before = model.active_adapters
    for i, name in enumerate(names):
        model.set_adapter(name)
        outputs.append(model(x[i : i + 1]))
    model.set_adapter(before)
    return torch.cat(outputs)


@pairs
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.slow
def test_every_row_is_what_its_adapter_alone_makes_of_it(case: LayerCase, slot: str, gradients: bool) -> None:
    model, x = mixed(case, slot, torch.float64), rows_of(case, 5, torch.float64)
    with torch.set_grad_enabled(gradients):
        expected, plain = one_by_one(model, x, NAMES), one_by_one(model, x, [None] * 5)
        with model.adapter_rows(NAMES):
            found = model(x)
            again = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(found, again)
    differs = [not torch.equal(own, base) for own, base in zip(found, plain, strict=True)]
    assert differs == [True, False, True, True, True]
    torch.testing.assert_close(model(x), one_by_one(model, x, ["a"] * 5))  # a is active again


@pairs
def test_gradients_reach_every_adapter_and_are_those_of_its_rows(case: LayerCase, slot: str) -> None:
    model, x = mixed(case, slot, torch.float64), rows_of(case, 5, torch.float64)
    model.set_adapter(None)
    parameters = [p for name in "abc" for p in model.adapter(name).low_rank["block.target"].parameters()]
    expected = torch.autograd.grad(one_by_one(model, x, NAMES).square().sum(), parameters)
    with model.adapter_rows(NAMES):
        found = torch.autograd.grad(model(x).square().sum(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with model.adapter_rows(["a", "a", None, "a", "a"]):
        unused = torch.autograd.grad(model(x).square().sum(), parameters, allow_unused=True)
    assert [gradient is None for gradient in unused] == [i >= len(parameters) / 3 for i in range(len(parameters))]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("shape", [(40, 12), (40, 1, 12), (40, 9, 12), (40, 2, 3, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_every_size_agree_with_one_by_one(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16)).to(dtype)
    model = LoRAModel(base, LoRAConfig(r=3, target_modules=["0"]), "0")
    for number in range(1, count):
        model.add_adapter(str(number), LoRAConfig(r=1 + number % 5, target_modules=["0"]))
    for number in range(count):
        model.set_adapter(str(number))
        stir(model, number)
    names: list[str | None] = [str(i * i % count) for i in range(37)] + [None, "0", None]
    x = torch.randn(shape, dtype=dtype)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            expected = one_by_one(model.eval(), x, names)
            with model.adapter_rows(names):
                found = model(x)
        close = {"rtol": 2e-2, "atol": 4e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize(
    ("positions", "is_sorted", "size", "which"),
    [
        ([0, 1] * 32, True, 32, [0, 1]),  # as many rows of each adapter: a block for each
        ([0, 1] * 32, False, 1, [0, 1] * 32),  # in order, each row by itself
        ([0] * 32 + [1] * 32, False, 32, [0, 1]),
        ([0, 0, 1, 1, 1, 1], False, 2, [0, 1, 1]),  # what all runs can be divided into
        ([0] * 5, True, 5, [0]),
        ([0, 2, 0, 1, 0, 2, 0, 0], True, 2, [0, 0, 0, 2, 1]),
        ([1, 1, 0, 2, 2], True, 1, [1, 1, 0, 2, 2]),
        ([0] * 60 + [1, 2, 3], True, 15, [0, 0, 0, 0, 1, 2, 3]),
    ],
)
def test_blocks_hold_every_row_of_their_adapter(
    positions: list[int], is_sorted: bool, size: int, which: list[int]
) -> None:
    blocks = make_blocks(positions, is_sorted, torch.device("cpu"))
    assert (blocks.size, blocks.which.tolist(), blocks.rows.tolist()) == (size, which, positions)
    order, back = (None if index is None else index.tolist() for index in (blocks.order, blocks.back))
    assert (order is None) == (back is None)
    if order is not None and back is not None:
        assert [order[place] for place in back] == list(range(len(positions)))
        assert [which[place // size] for place in back] == positions
        assert [positions[row] for row in order] == [position for position in which for _ in range(size)]


# ---- whole models


def causal_lm(architecture: str = "llama", **settings: Any) -> LoRAModel:
    """Adapters q (attention), m (MLP) and all (every linear layer, rsLoRA, learned scale)."""
    torch.manual_seed(0)
    if architecture == "gpt2":
        base: Any = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=64))
        names = {"q": ["c_attn"], "m": ["c_fc"]}
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
        base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50, eos_token_id=None, bos_token_id=None))
        names = {"q": ["q_proj", "v_proj"], "m": ["up_proj", "down_proj"]}
    model = LoRAModel(base, LoRAConfig(r=4, target_modules=names["q"], **settings), "q")
    model.add_adapter("m", LoRAConfig(r=8, target_modules=names["m"]))
    model.add_adapter("all", LoRAConfig(r=2, use_rslora=True, learn_scaling=True))
    for seed, name in enumerate(["all", "m", "q"]):
        model.set_adapter(name)
        stir(model, seed)
    return model.eval()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_language_model_with_padded_rows_of_adapters_with_other_targets(architecture: str) -> None:
    model = causal_lm(architecture)
    names = ["q", None, "m", "all", "q"]
    lengths = [7, 3, 9, 1, 4]
    ids = torch.randint(1, 50, (5, 9), generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    mask = (torch.arange(9) >= 9 - torch.tensor(lengths)[:, None]).long()  # left padding
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), model.adapter_rows(names):
        found = model(ids, attention_mask=mask, position_ids=positions).logits
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for i, (name, length) in enumerate(zip(names, lengths, strict=True)):
        model.set_adapter(name)
        own = ids[i : i + 1, 9 - length :]
        with torch.no_grad():
            torch.testing.assert_close(found[i, 9 - length :], model(own).logits[0], rtol=1e-4, atol=1e-4)
        alone = model.generate(
            own, attention_mask=torch.ones_like(own), max_new_tokens=5, do_sample=False, pad_token_id=0
        )
        assert generated[i, 9:].tolist() == alone[0, length:].tolist()


@pytest.mark.parametrize("place", ["call", "config", "model"])
@pytest.mark.parametrize("asked", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beams_have_their_prompt_s_adapter(asked: dict[str, int], place: str) -> None:
    model, names = causal_lm(), ["q", None, "all"]
    ids = torch.randint(1, 50, (3, 4), generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **asked}
    if place == "model":
        model.base_model.generation_config.update(**settings)
    settings = {"config": {"generation_config": GenerationConfig(**settings)}, "model": {}}.get(place, settings)
    with model.adapter_rows(names):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        with pytest.raises(
            RowsError, match=r"model.*expected 3 rows, as in adapter_rows"
        ):  # the rule holds while generate runs
            model(torch.cat([ids] * asked["num_beams"]))
    expected = []
    for i, name in enumerate(names):
        model.set_adapter(name)
        expected.append(model.generate(ids[i : i + 1], attention_mask=torch.ones(1, 4, dtype=torch.long), **settings))
    assert torch.equal(found, torch.cat(expected))


def test_an_encoder_sees_the_rows_and_its_decoder_the_beams() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 50}
    model = stirred_model(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)), LoRAConfig(r=4), "a")
    model.eval()
    ids = torch.randint(2, 50, (2, 6), generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    with model.adapter_rows(["a", None]):
        found = model.generate(ids, **settings)
    for i, name in enumerate(["a", None]):
        model.set_adapter(name)
        alone = model.generate(ids[i : i + 1], **settings)[0]
        assert found[i, : len(alone)].tolist() == alone.tolist()


def test_dropout_is_each_adapter_s_own() -> None:
    model = LoRAModel(nn.Sequential(nn.Linear(64, 64)), LoRAConfig(r=4, lora_dropout=0.5, target_modules=["0"]), "half")
    model.add_adapter("none", LoRAConfig(r=4, target_modules=["0"]))
    for name in ("half", "none"):
        model.set_adapter(name)
        stir(model)
    x = torch.randn(3, 4, 64)
    with model.adapter_rows(["half", "none", None]):
        first, second = model(x), model(x)
        same = [torch.equal(one, other) for one, other in zip(first, second, strict=True)]
        assert same == [False, True, True]
        model.eval()
        assert torch.equal(model(x), model(x))
        draws = torch.stack([model.train()(x)[0] for _ in range(400)])
        standard_error = draws.std(0) / len(draws) ** 0.5
        assert ((draws.mean(0) - model.eval()(x)[0]).abs() <= 5 * standard_error).all()


def test_adapters_on_a_fused_layer_and_on_parts_of_it() -> None:
    model = causal_lm("gpt2")
    model.add_adapter("parts", LoRAConfig(r=4, target_modules=["c_attn.q", "c_attn.v"]))
    model.set_adapter("parts")
    stir(model, 5)
    ids = torch.randint(1, 50, (4, 5), generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    names = ["q", "parts", None, "parts"]
    with torch.no_grad():
        with model.adapter_rows(names):
            found = model(ids).logits
        for i, name in enumerate(names):
            model.set_adapter(name)
            torch.testing.assert_close(found[i : i + 1], model(ids[i : i + 1]).logits, rtol=1e-4, atol=1e-4)


# ---- kept factors


def two() -> LoRAModel:
    torch.manual_seed(0)
    model = LoRAModel(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=2, target_modules=["0"]), "a")
    model.add_adapter("b", LoRAConfig(r=2, target_modules=["0"], learn_scaling=True))
    for name in ("a", "b"):
        model.set_adapter(name)
        stir(model)
    return model.eval()


@torch.no_grad()
def test_factors_are_put_together_for_every_forward_but_once_where_nothing_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    original = mixed_batch.layer_terms
    monkeypatch.setattr(mixed_batch, "layer_terms", lambda part, *rest: calls.append(part) or original(part, *rest))
    model, x, names = two(), torch.randn(3, 8), ["b", None, "a"]
    with model.adapter_rows(names):
        before = model(x)
        model.adapter("b").low_rank["0"].lora_A.mul_(2)
        model.set_scale("a", 0.5)
        after = model(x)
        assert len(calls) == 4
        assert not torch.equal(after, before)
        for _ in range(2):
            with model._adapter_set.batch.generation(1):  # as in `generate`
                torch.testing.assert_close(model(x), after)
                torch.testing.assert_close(model(x), after)
        assert len(calls) == 8
    torch.testing.assert_close(after, one_by_one(model, x, names))


def test_nothing_of_a_block_is_held_afterwards() -> None:
    def parts() -> set[int]:
        gc.collect()
        return {id(thing) for thing in gc.get_objects() if type(thing) is MixedPart}

    model, before = two(), parts()  # an engine of another test may still hold its own
    with torch.no_grad(), model.adapter_rows(["b", None, "a"]):
        model(torch.randn(3, 8))
        assert parts() > before
    assert parts() == before
    assert copy.deepcopy(model).active_adapters == model.active_adapters


# ---- modules trained in full


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler asks for it
def test_rows_have_their_own_copies_of_modules_trained_whole() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).to(torch.bfloat16)
    model = LoRAModel(base, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["2"]), "a")
    model.add_adapter("b", LoRAConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    model.add_adapter("c", LoRAConfig(r=2, target_modules=["0"]))
    for seed, name in enumerate("cba"):
        model.set_adapter(name)
        stir(model, seed)
    x, names = torch.randn(5, 8, dtype=torch.bfloat16), ["b", "c", "a", None, "b"]
    expected = one_by_one(model, x, names)
    with model.adapter_rows(names):
        found = model(x)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), found)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    found.float().sum().backward()
    weights = [model.adapter(name).saved["2"].weight.grad for name in "ab"]
    assert all(gradient.abs().sum() > 0 for gradient in weights)
    assert torch.equal(model(x), model(x))


class Block(nn.Module):
    """Takes (n, steps, 8). `kind` says what the module `inner` returns."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.inner: nn.Module = nn.GRU(8, 8, batch_first=True) if kind == "gru" else Outputs(kind)

    def forward(self, x: Tensor) -> Tensor:
        output = self.inner(self.first(x))
        return output["y"] + output["z"][1] if isinstance(output, dict) else output


class Outputs(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(8, 8)
        self.batch_first = kind != "time first"

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        if self.kind == "dict":
            return {"y": y, "nothing": None, "z": (y[:, 0], 2 * y)}
        if self.kind == "dataclass":
            return Output(y)
        if self.kind == "mean":
            return y.mean(0)
        return y.flatten(0, 1) if self.kind == "flat" else y


@dataclass
class Output:
    y: Tensor


def with_inner(kind: str) -> LoRAModel:
    torch.manual_seed(0)
    config = LoRAConfig(r=2, target_modules=["first"], modules_to_save=["inner"])
    model = LoRAModel(Block(kind), config, "a")
    model.add_adapter("b", config)
    for seed, name in enumerate("ba"):
        model.set_adapter(name)
        stir(model, seed)
    return model


@pytest.mark.parametrize("kind", ["dict", "linear"])
@pytest.mark.parametrize(
    "names", [["a", "b"], ["a", None], ["b", "a", "b"], ["a", "b", None, "a"], ["b", "b"]], ids=str
)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_outputs_of_modules_trained_whole_are_joined_along_their_rows(
    kind: str, names: list[str | None], steps: int
) -> None:
    model, x = with_inner(kind), torch.randn(len(names), steps, 8)
    for module in (model.eval(), model.train()):
        expected = one_by_one(module, x, names)
        with module.adapter_rows(names):
            torch.testing.assert_close(module(x), expected)
            torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gru", "inner is recurrent or has batch_first=False"),
        ("time first", "inner is recurrent or has batch_first=False"),
        ("dataclass", "inner: expected tensors as output, got Output"),
        ("mean", r"inner: expected 1 rows in dimension 0 of the output, got \(3, 8\)"),
        ("flat", r"inner: expected 1 rows in dimension 0 of the output, got \(3, 8\)"),
    ],
)
def test_modules_trained_whole_that_do_not_keep_the_rows_apart_are_refused(kind: str, message: str) -> None:
    model, x = with_inner(kind), torch.randn(3, 3, 8)
    with pytest.raises(RowsError, match=message), model.adapter_rows(["a", None, "b"]):
        model(x)


# ---- what is refused


def test_names_that_do_not_fit_are_errors() -> None:
    model = two()
    for wrong, message in [
        (["a", "x", "y", "x"], r"unknown adapter 'x', 'y'; existing adapters: a, b"),
        ("a", "expected a list with a name or None for every row"),
        ([], "expected a list"),
        ({"a"}, "expected a list"),
        (3, "expected a list"),
        ([["a"]], "unknown adapter"),
        ([0], "unknown adapter 0"),
    ]:
        with pytest.raises(AdapterError, match=message), model.adapter_rows(wrong):  # type: ignore[arg-type]
            pass
    assert model.active_adapters == ("b",)
    assert model(torch.ones(1, 8)).shape == (1, 8)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 8), r"0: expected 3 rows, as in adapter_rows, in the first dimension, got \(2, 8\)"),
        ((6, 8), r"got \(6, 8\)"),
        ((1, 7, 8), "packed examples count as one row, so use padding"),
        ((8,), r"got \(8,\)"),
        ((3,), r"got \(3,\)"),
    ],
)
def test_a_batch_of_other_rows_is_refused_at_the_call(shape: tuple[int, ...], message: str) -> None:
    model = two()
    model.base_model[0] = model.base_model[0]
    with model.adapter_rows(["a", "b", None]), pytest.raises(RowsError, match=message):
        model.base_model[0].adapter_parts[0].add_to(
            torch.zeros(shape), torch.zeros(shape), torch.zeros(shape), model.base_model[0]
        )


def test_within_and_around_the_block() -> None:
    model = two()
    with model.adapter_rows(["a"]):
        for action in (
            lambda: model.adapter_rows(["b"]).__enter__(),
            lambda: model.set_adapter("a"),
            lambda: model.disable_adapter().__enter__(),
            lambda: model.delete_adapter("b"),
            lambda: model.merge(),
            lambda: model.merge_and_unload(),
            lambda: model.unload(),
        ):
            with pytest.raises(RowsError, match="inside an adapter_rows block; exit the block first"):
                action()
    with model.merged(), pytest.raises(MergeError, match="cannot choose adapters by row while merged"):
        model.adapter_rows(["a"]).__enter__()
    with pytest.raises(ZeroDivisionError), model.adapter_rows(["a"]):
        raise ZeroDivisionError
    assert model.active_adapters == ("b",)
    model.add_adapter("late", LoRAConfig(r=2, target_modules=["0"], init_lora_weights="eva"))
    with model.train().adapter_rows(["late"]), pytest.raises(AdapterError, match="call start_from_data"):
        model(torch.zeros(1, 8))
    assert model(torch.zeros(1, 8)).requires_grad  # b can be trained
    model.unload()
    with pytest.raises(AdapterError, match="existing adapters: none"), model.adapter_rows(["a"]):
        pass


@pytest.mark.parametrize(
    ("base", "names", "reason"),
    [
        (
            lambda: nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(8, 8)])}),
            ["experts.0"],
            r"a different adapter per row .* and experts, which process all rows together; exclude .*: experts\.0",
        ),
        (
            lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.Linear(8, 8)}),
            ["a"],
            "a different adapter per row is not supported on nn.MultiheadAttention",
        ),
    ],
)
def test_layers_that_do_not_see_the_rows_are_refused(
    base: Callable[[], nn.Module], names: list[str], reason: str
) -> None:
    model = LoRAModel(base(), LoRAConfig(r=2, target_modules=names), "a")
    with pytest.raises(RowsError, match=reason), model.adapter_rows(["a"]):
        pass


# ---- packed batches: each token computes with its own adapter, and nothing of the others reaches it

RANKS = {"a": 2, "b": 5, "c": 3}
LAYER = nn.Linear(6, 4)


def packed_part(names: Sequence[str] = tuple(RANKS)) -> MixedPart:
    torch.manual_seed(0)
    parts = {name: LoRALayer(6, 4, min(RANKS[name], 4)).eval() for name in names}
    for part in parts.values():
        nn.init.normal_(part.lora_B)
    mixed_part = MixedPart("layer", parts, MixedBatch(is_packed=True), LAYER)
    mixed_part.is_alone = True
    return mixed_part


def packed_outputs(part: MixedPart, names: Sequence[str | None], x: Tensor) -> Tensor:
    part.batch.set_rows(names, ())
    with torch.inference_mode():
        y = LAYER(x)
        return part.add_to(y, y, x, LAYER).clone()


@pytest.mark.parametrize(
    "batches",
    [
        [["a"], ["a", "a", "b"], [None, "b", "c", "a"], ["c"]],
        [["a", "b", "c"], [None, None], ["unknown", "a", "c"], ["b", "a"]],
        [["a"] * 9 + ["b", "c"], ["a"] * 4 + ["b"] * 4, [None] * 7 + ["c"] * 2],
    ],
)
def test_every_token_has_its_adapter_whoever_joins_and_leaves(batches: list[list[str | None]]) -> None:
    mixed_part = packed_part()
    for names in batches:
        x = torch.randn(1, len(names), 6)
        found = packed_outputs(mixed_part, names, x)
        for token, name in enumerate(names):
            own = x[:, token : token + 1]
            expected = LAYER(own) + (mixed_part.parts[name](own) if name in RANKS else 0)
            torch.testing.assert_close(found[:, token : token + 1], expected)


def test_an_adapter_that_overflows_leaves_the_tokens_of_others_alone() -> None:
    x = torch.randn(1, 3, 6)
    expected = packed_outputs(packed_part(), ["a", "b", None], x)
    mixed_part = packed_part()
    nn.init.constant_(mixed_part.parts["b"].lora_A, torch.inf)
    assert torch.equal(packed_outputs(mixed_part, ["a", "b", None], x)[:, ::2], expected[:, ::2])


def test_factors_of_adapters_that_left_take_no_time() -> None:
    mixed_part = packed_part()
    packed_outputs(mixed_part, ["a", "b", "c"], torch.randn(1, 3, 6))
    packed_outputs(mixed_part, ["a"], torch.randn(1, 1, 6))
    assert mixed_part._kept is not None
    assert mixed_part._kept.A.shape == (1, 2, 6)  # of adapter a alone
