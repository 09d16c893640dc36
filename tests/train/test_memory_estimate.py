"""Counts and memory from config.json alone, against stated ones and against real runs."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from kept_bytes import kept_bytes
from runs import token_losses
from tiny import LLAMA_3_8B, chat_tokenizer
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from tailora.core.config import LoRAConfig
from tailora.core.quantization import stored_bytes, stored_tensors
from tailora.data.dataset import Example
from tailora.errors import MemoryLimitError
from tailora.kernels.loss import FROZEN, OWN
from tailora.model import LoRAModel
from tailora.study.plan import plan
from tailora.train import memory_estimate as estimate
from tailora.train.config import TrainConfig
from tailora.train.defaults import with_numbers
from tailora.train.kernel_choice import PLAIN, Kernels, use_kernels
from tailora.train.loss import CAUSAL_LM, BatchLayout, make_batch
from tailora.train.memory import fake_tensors
from tailora.train.memory_estimate import (
    AbsentDevice,
    StepCost,
    estimate_memory,
    fake_model,
    fake_trainable,
    memory_of_loading,
    remedies,
    simulate_step,
)
from tailora.train.model_loading import load_base, read_config
from tailora.train.parallel import Sharding
from tailora.train.trainer import Trainer

CPU = torch.device("cpu")


def shape_of(vocabulary: int, width: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": kv_heads}


QWEN_HALF_B = Qwen2Config(**shape_of(151936, 896, 4864, 24, 14, 2), tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("shape", "settings", "count"),
    [  # reference/science.md, "Exact counts of trainable parameters"
        (LlamaConfig(**LLAMA_3_8B, num_hidden_layers=32), {"r": 16, "use_dora": True}, 43_319_296),
        (QWEN_HALF_B, {"r": 16}, 8_798_208),
        (GPT2Config(), {"r": 8, "target_modules": ["c_attn"]}, 294_912),
    ],
    ids=["3-8B dora", "qwen", "gpt-2"],
)
@pytest.mark.slow
def test_counts_are_the_known_ones(shape: PretrainedConfig, settings: dict[str, Any], count: int) -> None:
    with fake_tensors():
        model, _ = fake_trainable(TrainConfig(**settings), shape, torch.device("meta"))
        assert model.summary().trainable_parameters == count


def example(length: int) -> Example:
    return Example.of_text((np.arange(length) % 300).astype(np.int32))


def save_model(shape: LlamaConfig, dtype: torch.dtype, folder: Path) -> None:
    AutoModelForCausalLM.from_config(shape, dtype=dtype).save_pretrained(folder)
    chat_tokenizer(["one"], eos_token="<|im_end|>").save_pretrained(folder)


@pytest.mark.parametrize(
    "changes",
    [
        *({"packing": "off"}, {"quantize": "nf4"}),
        *(
            pytest.param(changes, marks=pytest.mark.exhaustive)
            for changes in ({}, {"fast": "off"}, {"quantize": "int8"})
        ),
    ],
    ids=str,
)
def test_what_a_forward_keeps_is_what_the_real_one_keeps(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_model(LlamaConfig(**shape_of(320, 128, 256, 2, 4, 2)), torch.float32, tmp_path)
    config = TrainConfig(model=str(tmp_path), r=4, dtype="float32", **changes)
    with fake_model(config, read_config(config.model), CPU) as fake:
        step = simulate_step(fake, [example(100)], checkpointed=False)
        layout, kernels = fake.layout, fake.kernels
    base, _ = load_base(config.model, config.dtype, CPU, config.quantize)
    model = LoRAModel(base, config.lora()).train()
    batch = make_batch([example(100)], layout, CPU)
    with use_kernels(base, layout, kernels) as recomputing:
        kept = kept_bytes(lambda: CAUSAL_LM.outputs(model, batch, layout).losses.sum(), base, recomputing)
    assert step.kept == pytest.approx(kept, rel=0.05)
    assert step.kept < step.activations + step.logits  # with temporaries


def prepare(config: TrainConfig) -> None:
    """What a run does before its first step."""
    with ExitStack() as stack:
        Trainer(config, stack)


@pytest.mark.parametrize(
    "changes",
    [{"method": "full"}, pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.exhaustive)],
    ids=str,
)
def test_a_run_is_refused_if_its_largest_step_needs_more_than_is_free(
    settings: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate is the one of a plan, and is made only if a bound from a short forward does not fit."""
    kept = settings(per_device_train_batch_size=8, max_steps=1).model_dump(exclude_unset=True, exclude={"r"})
    config = TrainConfig(**kept, **({} if "method" in changes else {"r": 4}), **changes)
    planned, steps = plan(config), list[StepCost]()
    needed = planned.memory.activations + planned.memory.logits
    estimated = estimate.largest_step
    monkeypatch.setattr(estimate, "largest_step", lambda *given: steps.append(estimated(*given)) or steps[-1])
    prepare(config)
    assert not steps
    monkeypatch.setattr("tailora.train.setup.available_bytes", lambda _: 0)
    monkeypatch.setattr(estimate, "available_bytes", lambda _: 2 * needed)
    prepare(config)
    assert steps[0].activations + steps[0].logits == needed
    monkeypatch.setattr(estimate, "available_bytes", lambda _: needed - 1)
    with pytest.raises(MemoryLimitError, match=r"a step needs about .*, but only .* are free\nwhat helps:") as caught:
        prepare(config)
    lines = str(caught.value).splitlines()[2:]
    assert lines[0] == "  - --per-device-train-batch-size 4 --gradient-accumulation-steps 2"
    assert ("  - --gradient-checkpointing" in lines) == ("gradient_checkpointing" not in changes)
    assert ("  - --method lora" in lines) == ("method" in changes)
    assert "  - --quantize nf4" not in lines  # on a CPU, the files that are quantized stay in memory


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", [CPU, AbsentDevice("cuda", torch.bfloat16)], ids=str)
def test_a_4_bit_base_is_recommended_where_its_estimate_is_smaller(stored: str, device: Any) -> None:
    """On a CPU, files in the precision of the run are mapped, but those that are converted or quantized are copied."""
    shape = LlamaConfig(**shape_of(320, 512, 1024, 1, 4, 2), dtype=stored)
    before, totals = shape.to_dict(), []
    config = TrainConfig(r=4, dtype="bfloat16")
    for changes in ({}, {"quantize": "nf4"}, {}):
        with fake_model(config.replaced(**changes), shape, device) as fake:
            step = StepCost(activations=0, logits=0, gradients=0, kept=0)
            totals.append(estimate_memory(config, fake, step, process=0).total)
    advice = remedies(with_numbers(config, None), shape, 0, device)
    assert ("--quantize nf4" in advice) == (totals[1] < totals[0]) == (device != CPU or stored == "float32")
    assert totals[2] == totals[0]
    assert shape.to_dict() == before  # an estimate does not change what it is made from


def test_longer_rows_and_checkpointing_take_what_they_should(model_folder: Path) -> None:
    config = TrainConfig(model=str(model_folder), r=4, dtype="float32")
    shape = read_config(config.model)
    shape.num_hidden_layers = 1
    with fake_model(config, shape, CPU) as fake:
        short, long = (simulate_step(fake, [example(n)], checkpointed=False) for n in (100, 200))
        checkpointed = simulate_step(fake, [example(200)], checkpointed=True)
    assert 1.7 < long.activations / short.activations < 2.1
    assert checkpointed.kept < 0.3 * long.kept
    assert checkpointed.bytes < long.bytes


def test_nothing_of_the_simulation_stays_behind(model_folder: Path) -> None:
    """What is remembered of rows is real again afterwards."""
    config = TrainConfig(model=str(model_folder), r=4, dtype="float32")
    with fake_model(config, read_config(config.model), CPU) as fake:
        simulate_step(fake, [example(40)], checkpointed=False)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = LoRAModel(base, LoRAConfig(r=4)).train()
    rows = BatchLayout(True, FROZEN, 0)
    with use_kernels(base, rows, Kernels(PLAIN, "")):
        losses, _ = token_losses(model, [example(40)], rows)
        losses.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.lora_layers.parameters())


@pytest.mark.parametrize(
    ("quantize", "tied"), [(None, False), (None, True), ("nf4", False), ("nf4", True), ("int8", False)]
)
def test_the_bytes_of_the_base_are_those_of_the_loaded_one(tmp_path: Path, quantize: str | None, tied: bool) -> None:
    shape = LlamaConfig(**shape_of(320, 128, 256, 2, 4, 4), tie_word_embeddings=tied)
    save_model(shape, torch.bfloat16, tmp_path)
    config = TrainConfig(model=str(tmp_path), quantize=quantize, dtype="bfloat16", r=4)
    with fake_tensors():
        model, weights = fake_trainable(config, read_config(config.model), CPU)
        total = model.summary().total_parameters
    base, _ = load_base(str(tmp_path), "bfloat16", "cpu", quantize)
    assert total == LoRAModel(base, config.lora()).summary().total_parameters
    assert weights.stored == pytest.approx(stored_bytes(base), rel=0.02)


@pytest.mark.ranks
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_bytes_of_a_rank_are_those_of_the_sharded_base(tmp_path: Path, quantize: str | None) -> None:
    """Scales stay whole, and a base is whole until it is quantized; of a plain one a rank reads its own rows."""
    save_model(LlamaConfig(**shape_of(320, 128, 256, 6, 4, 4)), torch.bfloat16, tmp_path)
    config = TrainConfig(model=str(tmp_path), quantize=quantize, dtype="bfloat16", r=4)
    with fake_model(config, read_config(config.model), AbsentDevice("cuda", torch.bfloat16)) as fake:
        step = simulate_step(fake, [example(20)], checkpointed=False)
        memory = estimate_memory(config, fake, step, process=0, shards=3)
    before, loading = [], memory_of_loading(fake, process=0, shards=3)

    class Recorded(Sharding):
        def shard(self, base: PreTrainedModel) -> None:
            before.append(0 if base.device.type == "meta" else stored_bytes(base))
            super().shard(base)

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    try:
        base, _ = load_base(str(tmp_path), "bfloat16", "cpu", quantize, sharding=Recorded(CPU))
        local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in stored_tensors(base)]
    finally:
        dist.destroy_process_group()
    assert memory.weights == pytest.approx(sum(tensor.nbytes for tensor in local), rel=0.02)
    largest = max(before[0], memory.weights)
    assert loading == pytest.approx(largest + fake.weights.dense, rel=0.02)
    assert memory.total >= loading


def test_full_fine_tuning_counts_masters_where_the_base_has_16_bits(model_folder: Path) -> None:
    parts = {}
    for dtype in ("float32", "bfloat16"):
        config = TrainConfig(model=str(model_folder), method="full", learning_rate=1e-4, dtype=dtype)
        shape = read_config(config.model)
        shape.num_hidden_layers = 1
        with fake_model(config, shape, CPU) as fake:
            count = fake.model.summary().trainable_parameters
            parts[dtype] = estimate_memory(
                config, fake, simulate_step(fake, [example(20)], checkpointed=False), process=0
            )
    assert parts["float32"].weights >= 4 * count
    assert parts["float32"].adapters == 0
    assert parts["bfloat16"].adapters == 4 * count
    for memory in parts.values():
        assert memory.gradients >= 4 * count
        assert memory.optimizer == 3 * 4 * count
        assert memory.total == sum(value for name, value in memory.to_dict().items() if name != "total")


def test_what_the_structure_tells_is_foreseen() -> None:
    """Logits that are scaled after the head are not computed in chunks; the chunks' form would be wrong."""
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    shape = CohereConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, logit_scale=0.5)
    with fake_model(TrainConfig(r=4), shape, CPU) as fake:
        assert fake.layout.loss == OWN
        assert "scale" in fake.notes[0]
        assert fake.kernels.layers == PLAIN


def test_a_card_that_is_absent_takes_the_way_of_devices(model_folder: Path) -> None:
    """In the precision of the card; on CUDA attention keeps no scores, on MPS their number grows with the square."""
    config, growth = TrainConfig(model=str(model_folder), r=4), {}
    shape = read_config(config.model)
    shape.num_hidden_layers = 1
    for kind in ("cuda", "mps"):
        with fake_model(config, shape, AbsentDevice(kind, torch.float16)) as fake:
            assert fake.base.dtype == torch.float16
            short, long = (simulate_step(fake, [example(n)], checkpointed=False) for n in (400, 1600))
            total = estimate_memory(config, fake, long, process=0)
        growth[kind] = long.activations / short.activations
        assert total.process > 0.1 * long.bytes  # what the allocator keeps
    assert growth["cuda"] < 4.2
    assert growth["mps"] > 8


def test_values_of_another_width_are_estimated_for_a_card_too() -> None:
    sizes = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 12}
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 12, "first_k_dense_replace": 1}
    shape = DeepseekV3Config(**sizes, **heads, **ranks)
    with fake_model(TrainConfig(r=4), shape, AbsentDevice("cuda", torch.bfloat16)) as fake:
        short, long = (simulate_step(fake, [example(n)], checkpointed=False) for n in (400, 1600))
    assert long.activations < 4.2 * short.activations  # no scores are kept
