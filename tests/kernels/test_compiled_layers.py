import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import chat_model, chat_tokenizer, packed_row, stir, tiny_model
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from tailora import LoRAConfig, LoRAModel
from tailora.core.float32_products import float32_products
from tailora.kernels import compiled_layers, cpu_attention
from tailora.kernels.attention import packed_rows
from tailora.kernels.compiled_layers import CompiledLayers, code_folder, decoder_layers, obstacle_to_compiling
from tailora.train.model_loading import load_base
from tailora.train.parallel import Sharding

ARCHITECTURES: dict[str, dict[str, Any]] = {  # class -> settings of its config
    "LlamaForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "GemmaForCausalLM": {},
    "Gemma2ForCausalLM": {"attn_logit_softcapping": None},
    "Gemma3ForCausalLM": {"sliding_window": 4},
    "PhiForCausalLM": {},
    "Phi3ForCausalLM": {"sliding_window": None},
    "GPT2LMHeadModel": {},
    "MixtralForCausalLM": {},
    "Qwen3MoeForCausalLM": {},
}
SLOTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "scale": {"learn_scaling": True},
    "bias": {"lora_bias": True},
    "start": {"init_lora_weights": "pissa"},
}
FEW = ["q_proj", "down_proj"]  # adapted layers of a small graph
LENGTHS = [(3, 7), (12, 4, 9), (5,)]


def adapted(class_name: str = "LlamaForCausalLM", config: dict[str, Any] | None = None, **settings: Any) -> LoRAModel:
    base = tiny_model(class_name, **{"vocab_size": 300, **(config or {})})
    model = LoRAModel(base, LoRAConfig(r=4, **settings)).train()
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.data.normal_(0, 0.02)
    return model


def gradients(model: LoRAModel, inputs: dict[str, Any]) -> Tensor:
    model.zero_grad()
    logits = model(**inputs).logits
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(found)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def assert_compiled_is_plain(model: LoRAModel, backend: str, provider: str | None = None) -> None:
    layers = decoder_layers(model.base_model)
    assert len(layers) == model.base_model.config.num_hidden_layers
    counters.clear()
    with packed_rows(model.base_model, provider):
        plain = [gradients(model, packed_row(lengths)) for lengths in LENGTHS]
        with CompiledLayers(backend=backend).used_by(layers):
            compiled = [gradients(model, packed_row(lengths)) for lengths in LENGTHS]
    assert graphs() >= 1
    for found, expected in zip(compiled, plain, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.slow
def test_one_graph_serves_every_depth_and_length() -> None:
    """The first layer's too, whose input needs no gradient; it is given one."""
    assert_compiled_is_plain(adapted(target_modules=FEW), "eager")
    assert graphs() == 1
    assert not counters["graph_break"]


def test_layers_that_train_nothing_are_plain_below_the_first_that_does() -> None:
    layers = [nn.Linear(4, 4).requires_grad_(train) for train in (False, True, False)]
    counters.clear()
    with CompiledLayers(backend="eager").used_by(layers):
        nn.Sequential(*layers)(torch.ones(3, 4)).sum().backward()
    assert graphs() == 2  # of the last two, whose weights differ in what they need


@pytest.mark.slow
def test_documents_padded_for_a_device_take_a_graph_for_one_and_one_for_several() -> None:
    model = adapted(config={"num_hidden_layers": 1}, target_modules=["o_proj"])
    assert_compiled_is_plain(model, "eager", "sdpa")
    assert graphs() == 2


@pytest.mark.slow
def test_dropout_of_attention_takes_a_graph_for_one_document_and_one_for_several() -> None:
    model = adapted("GPT2LMHeadModel", {"n_layer": 1, "attn_pdrop": 0.1}, target_modules=["c_attn"])
    counters.clear()
    with packed_rows(model.base_model), CompiledLayers(backend="eager").used_by(decoder_layers(model.base_model)):
        for lengths in [*LENGTHS, (2, 3, 4, 5)]:
            model(**packed_row(lengths)).logits.sum().backward()
    assert graphs() == 2


def test_more_graphs_than_torch_allows_by_itself_are_compiled() -> None:
    layers = [nn.Linear(4, size) for size in range(2, 3 + dynamo_config.recompile_limit)]
    counters.clear()
    with CompiledLayers(backend="eager").used_by(layers):
        for layer in layers:
            layer(torch.ones(3, 4))
    assert graphs() == len(layers)


def test_what_the_user_compiled_is_used_again_afterwards() -> None:
    layer = nn.Linear(4, 4)
    layer.compile(backend="eager")
    own = layer._compiled_call_impl
    with CompiledLayers(backend="eager").used_by([layer]):
        assert layer._compiled_call_impl is not own
    assert layer._compiled_call_impl is own


def test_the_forward_of_a_sharded_layer_is_what_it_was_afterwards() -> None:
    layers: list[Any] = [nn.Linear(4, 4), nn.Linear(4, 4)]
    for layer in layers:
        layer.__class__ = type("ShardedLinear", (FSDPModule, nn.Linear), {})  # as `fully_shard` does
    layers[0].forward = own = partial(nn.Linear.forward, layers[0])
    with CompiledLayers(backend="eager").used_by(layers):
        assert layers[0].forward is not own
    assert layers[0].forward is own
    assert "forward" not in vars(layers[1])


RUN = """
import json, sys, torch
from tailora.core.float32_products import Float32Products
from test_compiled_layers import LENGTHS, CompiledLayers, adapted, counters, decoder_layers, gradients, packed_rows
from tiny import packed_row

model = adapted(config={"num_hidden_layers": 1}, target_modules=["q_proj"])
model.base_model.bfloat16()
with packed_rows(model.base_model), Float32Products(2):
    plain = gradients(model, packed_row(LENGTHS[int(sys.argv[1])]))
    with CompiledLayers().used_by(decoder_layers(model.base_model)):
        compiled = gradients(model, packed_row(LENGTHS[int(sys.argv[1])]))
print(json.dumps([float((compiled - plain).norm() / plain.norm()), counters["aot_autograd"], counters["inductor"]]))
"""


def test_code_is_kept_in_the_users_cache_folder_or_where_the_user_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch sets its variable itself, so that its default says nothing."""
    monkeypatch.setenv("TAILORA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    assert code_folder() == tmp_path / "home" / "compiled"
    with CompiledLayers(backend="eager").used_by([nn.Linear(4, 4)]):
        assert cache_dir() == str(tmp_path / "home" / "compiled")
    assert cache_dir() == default_cache_dir()
    monkeypatch.setattr(os, "access", lambda *_: False)  # read-only
    assert code_folder() == Path(default_cache_dir())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert code_folder() == tmp_path


@pytest.mark.exhaustive
def test_a_later_process_compiles_nothing_anew(tmp_path: Path) -> None:
    """Two processes compile at once; the third traces documents of other lengths and loads the code."""

    def start(lengths: int) -> subprocess.Popen[str]:
        path = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
        environment = {**os.environ, "TAILORA_HOME": str(tmp_path), "PYTHONPATH": path}
        environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
        command = [sys.executable, "-c", RUN, str(lengths)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    def result(process: subprocess.Popen[str]) -> Any:
        output, _ = process.communicate(timeout=600)
        return json.loads(output.splitlines()[-1])

    results = [result(process) for process in [start(0), start(0)]]
    assert any(aot["autograd_cache_miss"] for _, aot, _ in results)
    results.append(result(start(1)))
    assert all(difference < 0.02 for difference, _, _ in results)
    _, aot, inductor = results[-1]
    assert aot.keys() & {"autograd_cache_miss", "autograd_cache_bypass"} == set()
    assert inductor["fxgraph_cache_hit"] == 2  # forward and backward
    assert "fxgraph_cache_miss" not in inductor


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch uses what it calls deprecated
@pytest.mark.parametrize(
    ("architecture", "slot"),
    [
        *((name, "plain") for name in ARCHITECTURES if name != "LlamaForCausalLM"),
        *(("LlamaForCausalLM", slot) for slot in SLOTS if slot != "plain"),
    ],
)
def test_inductors_code_of_other_architectures_and_slots_gives_the_same_gradients(architecture: str, slot: str) -> None:
    assert_compiled_is_plain(adapted(architecture, ARCHITECTURES[architecture], **SLOTS[slot]), "inductor")


def padded(shape: tuple[int, int]) -> dict[str, Any]:
    """Returns rows of different lengths, padded on the right."""
    ids = torch.randint(300, shape, generator=torch.Generator().manual_seed(shape[1]))
    lengths = torch.arange(shape[1], shape[1] - shape[0], -1)
    return {"input_ids": ids, "attention_mask": (torch.arange(shape[1]) < lengths[:, None]).long(), "use_cache": False}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch uses what it calls deprecated
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.exhaustive)])
def test_a_base_in_4_bits_takes_one_graph(backend: str, tmp_path: Path) -> None:
    chat_model(hidden_size=64).save_pretrained(tmp_path)
    chat_tokenizer(["a"]).save_pretrained(tmp_path)
    model = LoRAModel(load_base(str(tmp_path), "float32", "cpu", "nf4")[0], LoRAConfig(r=4)).train()
    stir(model)
    compiled, layers = CompiledLayers(backend=backend), decoder_layers(model.base_model)
    counters.clear()
    for length in (7, 12):
        expected = gradients(model, padded((4, length)))
        with compiled.used_by(layers):
            found = gradients(model, padded((4, length)))
        assert found.any()
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert graphs() == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_and_slot_is_compiled_without_graph_breaks(architecture: str, slot: str) -> None:
    assert_compiled_is_plain(adapted(architecture, ARCHITECTURES[architecture], **SLOTS[slot]), "aot_eager")


def test_layers_are_found_by_structure() -> None:
    for name, config in ARCHITECTURES.items():
        assert len(decoder_layers(adapted(name, config).base_model)) == 2, name  # and not the experts within them


def test_within_the_block_copies_pickles_evaluation_and_generation_are_plain() -> None:
    model = adapted()
    layers = decoder_layers(model.base_model)
    prompt = torch.arange(5)[None]
    expected = model.generate(prompt, max_new_tokens=4, do_sample=False)
    counters.clear()
    with CompiledLayers(backend="aot_eager").used_by(layers):
        assert all(layer._compiled_call_impl for layer in layers)
        copied = copy.deepcopy(model)
        pickled = pickle.loads(pickle.dumps(model.base_model))
        assert not any(layer._compiled_call_impl for m in (copied, pickled) for layer in decoder_layers(m))
        assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), expected)
        with torch.no_grad(), packed_rows(model.base_model):
            model(**packed_row((3, 4)))
        model.merge()
        model.unmerge()
    assert graphs() == 0
    assert not any(layer._compiled_call_impl for layer in layers)
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), expected)


class Block(nn.Module):
    """Attention of two heads and an activation, with a weight that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(16, 48)
        self.register_buffer("ends", torch.tensor([0, 40, 70]))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.rows(x).view(-1, 2, 24).split(8, dim=-1)
        return torch.tanh(cpu_attention.attention(q, k, v, self.ends, 0.3, None).flatten(1)).exp().sin()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch uses what it calls deprecated
def test_products_of_compiled_layers_are_computed_in_float32_where_those_of_plain_layers_are() -> None:
    """The compiled code has float32 products itself, so that it does not depend on the block."""
    torch.manual_seed(0)
    block, x, found = Block().bfloat16(), torch.randn(70, 16).bfloat16(), dict[str, list[Tensor]]()
    compiled = CompiledLayers(backend="aot_eager")
    for name, use in (("half", nullcontext), ("plain", nullcontext), ("compiled", lambda: compiled.used_by([block]))):
        with use(), float32_products(None if name == "half" else 4):
            y = block(x.requires_grad_())
        found[name] = [y, *torch.autograd.grad(y.float().square().sum(), [x, block.rows.weight])]
    for half, plain, ours in zip(*found.values(), strict=True):
        assert (ours - plain).norm() < 0.3 * (half - plain).norm()


def test_layers_of_many_kinds_and_a_missing_compiler_are_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    config = {"num_hidden_layers": 5}
    model = adapted(config=config, rank_pattern={rf".*layers\.{i}\..*": i + 1 for i in range(5)})
    assert "5 kinds" in (obstacle_to_compiling(model.base_model, cpu) or "")
    model = adapted(config=config)
    assert obstacle_to_compiling(model.base_model, cpu) is None

    def no_compiler() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(compiled_layers, "get_cpp_compiler", no_compiler)
    assert "C++ compiler" in (obstacle_to_compiling(model.base_model, cpu) or "")


@pytest.fixture
def only_rank() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.ranks
@pytest.mark.usefixtures("only_rank")
def test_sharded_layers_are_compiled_once_for_all() -> None:
    """FSDP2 frees the weights after the forward and gathers them for the backward, around the compiled code."""
    graphs, gradients = [], []
    for sharded in (False, True):
        torch._dynamo.reset()
        counters.clear()
        base = tiny_model("LlamaForCausalLM", num_hidden_layers=3)
        if sharded:
            Sharding(torch.device("cpu")).shard(base)
        model = LoRAModel(base, LoRAConfig(r=2)).train()
        ids = torch.arange(12)[None]
        model(
            ids, use_cache=False
        )  # the first forward records which layers are called; a run does that before it compiles
        with CompiledLayers(backend="eager").used_by(decoder_layers(base)):
            model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.lora_layers.parameters()])
        graphs.append(counters["stats"]["unique_graphs"])
        assert not any("forward" in vars(layer) for layer in decoder_layers(base))
    assert graphs[0] == graphs[1] > 0
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
