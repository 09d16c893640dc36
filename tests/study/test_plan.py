"""The plan of a run: what it says about the run, and that it says the same as the run."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from runs import changed, run_and_collect
from tiny_run import write_rows
from tiny_vision import save_image, save_tiny_llava, tiny_llava
from transformers import Gemma2Config, LlamaForCausalLM

from tailora import LoRAConfig, LoRAModel
from tailora.data.dataset import Example
from tailora.errors import ConfigError
from tailora.report.pages.plan import plan_page
from tailora.study.plan import batch_size_that_fits, place_of, plan, quantization
from tailora.study.plan_result import Plan, Ranks
from tailora.train.config import TrainConfig
from tailora.train.events import Prepared
from tailora.train.image_text_to_text import ImageTextToText
from tailora.train.measure_steps import take_steps
from tailora.train.memory import fake_tensors
from tailora.train.memory_estimate import AbsentDevice, FakeModel, Memory, fake_trainable, largest_step
from tailora.train.model_loading import read_config
from tailora.train.rollouts import Rollouts
from tailora.train.step import Step


@pytest.fixture(scope="module")
def planned(small_run: TrainConfig) -> Plan:
    return plan(small_run)


@pytest.mark.slow
def test_counts_steps_and_forward_are_those_of_the_run(planned: Plan, small_run: TrainConfig, tmp_path: Path) -> None:
    _, (prepared,) = run_and_collect(changed(small_run, output_dir=str(tmp_path / "run"), samples=0), Prepared)
    header = prepared.header
    assert planned.trainable_parameters == header["trainable_parameters"]
    assert planned.total_parameters == header["total_parameters"]
    assert sum(group.count for group in planned.groups) == header["adapted_layers"]
    assert planned.steps == header["max_steps"]
    assert planned.full is None  # unless asked for
    assert planned.largest_forward["tokens"] == header["largest_forward_tokens"]
    assert planned.memory.weights == header["base_bytes"]
    assert planned.kernels.split(";")[-1] == header["kernels"].split(";")[-1]


def test_measured_steps_of_reinforcement_learning_include_sampling(
    small_run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Count to {number}."} for number in range(9)])
    changes = {"task": "grpo", "reward": ["max_length:9"], "max_completion_length": 8, "beta": 0.04}
    seconds, sampled = 0.0, Rollouts._sampled_step

    def sampled_in_ten_seconds(self: Rollouts, number: int) -> Step:
        nonlocal seconds
        seconds += 10
        return sampled(self, number)

    monkeypatch.setattr(Rollouts, "_sampled_step", sampled_in_ten_seconds)
    monkeypatch.setattr("tailora.train.measure_steps.time", SimpleNamespace(perf_counter=lambda: seconds))
    monkeypatch.setattr("tailora.study.plan.measure_steps", partial(take_steps, folder=tmp_path))
    planned = plan(small_run.replaced(**changes, data=str(data), num_iterations=2), measure=True, full=True)
    assert planned.seconds_per_step == pytest.approx(10 / 2)  # every second step samples
    assert planned.measured is not None
    assert planned.memory.total == planned.measured.peak_bytes
    assert any(note.startswith("sampling needs a cache of ") for note in planned.notes)
    assert "the time excludes evaluations, which usually take longer than the steps" in planned.notes
    assert planned.full is None
    assert any(note.startswith("full fine-tuning is not shown") for note in planned.notes)
    with pytest.raises(ConfigError, match="--task grpo needs the prompts of the data; add --data"):
        plan(TrainConfig(model=small_run.model, task="grpo", reward=["max_length:9"]))


def test_trained_layers_are_grouped_whatever_is_trained(small_run: TrainConfig) -> None:
    slots = {"use_dora": True, "lora_dropout": 0.1, "init_lora_weights": "eva", "modules_to_save": ["lm_head"]}
    how = {"packing": "off", "fast": "off", "gradient_checkpointing": True}
    found = plan(changed(small_run, target_modules=["q_proj"], **slots, **how))
    assert min(found.memory.activations, found.trainable_parameters) > 0
    assert [(each.path, each.count) for each in found.groups] == [
        ("model.layers.{0-1}.self_attn.q_proj", 2),
        ("lm_head", 1),
    ]


def test_a_card_without_bfloat16_is_planned_in_float16() -> None:
    place = place_of(TrainConfig(device="T4"))
    assert (place.name, place.device) == ("T4 16GB", AbsentDevice("cuda", torch.float16))


@pytest.mark.parametrize(("room", "count"), [(109, 0), (110, 1), (119, 1), (120, 2), (200, 10), (10**9, 10)])
def test_the_largest_batch_fills_the_room(room: int, count: int) -> None:
    example = Example.of_text(np.arange(4, dtype=np.int32))
    batches: Any = SimpleNamespace(at=lambda size: [example] * size, largest=[example] * 2, most=10)
    parts = dict.fromkeys(("adapters", "gradients", "optimizer", "logits", "process"), 0)
    memory = Memory(weights=100, activations=20, growing=20, **parts)  # 10 bytes for each example
    assert batch_size_that_fits(room, memory, batches) == count


def test_logits_that_are_not_in_chunks_grow_with_the_batch(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=4096).save_pretrained(tmp_path)
    config = TrainConfig(model=str(tmp_path), max_length=64, device="L4", per_device_train_batch_size=2)
    room = plan(config.replaced(per_device_train_batch_size=8)).memory
    planned = plan(config, memory=room.total)
    assert room.logits == 4 * planned.memory.logits > room.activations
    assert planned.batch_size_that_fits == planned.options[0].batch_size == 8
    assert planned.options[0].tokens == pytest.approx(8 * 64, rel=0.1)


@pytest.mark.ranks
def test_a_few_real_steps_say_what_they_took(planned: Plan, small_run: TrainConfig) -> None:
    measured = plan(small_run, measure=True)
    took = measured.measured
    assert took is not None
    assert measured.memory.total == took.peak_bytes > 10**8  # of a process of its own
    assert measured.memory.activations == planned.memory.activations
    seconds = took.seconds_per_token * (measured.tokens or 0)
    assert measured.seconds == pytest.approx(seconds, rel=0.01)
    assert set(measured.basis.values()) == {f"measured in {took.steps} steps"}
    assert planned.seconds_per_step is planned.seconds is None
    assert planned.basis["memory"].startswith("estimated")


@pytest.mark.ranks
def test_a_rank_has_a_share_of_what_fsdp2_shards(small_run: TrainConfig) -> None:
    settings = small_run.model_dump(exclude_unset=True, exclude={"data", "eval_data"})
    config = TrainConfig(**{**settings, "max_steps": 5, "per_device_train_batch_size": 1})  # one forward a step
    base = LlamaForCausalLM(read_config(config.model))
    sizes = [sum(parameter.nbytes for parameter in layer.parameters()) for layer in base.model.layers]
    one, replicated = plan(config, full=True), plan(config, nproc=4)
    sharded = plan(config.replaced(fsdp=True), full=True, nproc=4)
    stored = one.memory.weights
    outside = stored - sum(sizes)
    assert one.ranks is None
    assert replace(replicated.memory, process=0) == replace(one.memory, process=0)  # this process grows meanwhile
    assert replicated.ranks == Ranks(4, fsdp=False)
    memory = sharded.memory
    assert memory.weights == outside + sum(sizes) // 4
    assert memory.gathered == 3 * max(sizes)  # two buffers and the whole weights
    same = ("adapters", "gradients", "optimizer", "activations", "logits")
    assert [getattr(memory, part) for part in same] == [getattr(one.memory, part) for part in same]
    assert sharded.ranks == Ranks(4, fsdp=True)
    assert sharded.tokens == 4 * (one.tokens or 0)
    assert one.full is not None
    assert sharded.full is not None
    full, whole = sharded.full.memory, one.full.memory
    assert whole.adapters == 0  # float32 weights are their own masters, but not the parts of sharded ones
    assert (full.weights, full.adapters) == (memory.weights, sum(sizes) // 4)
    trained = sum(parameter.nbytes for parameter in base.parameters())
    on_rank = trained - sum(sizes) + sum(sizes) // 4
    assert full.optimizer == whole.optimizer // trained * on_rank
    assert full.gradients == on_rank + 2 * max(sizes)  # a layer's gradient is whole until it is summed
    with pytest.raises(ConfigError, match="set their number with --nproc"):
        plan(config.replaced(fsdp=True))
    with pytest.raises(ConfigError, match="in one process"):
        plan(config, measure=True, nproc=2)


def test_ranks_share_the_steps_of_an_epoch(planned: Plan, small_run: TrainConfig) -> None:
    one, two = planned, plan(small_run, nproc=2)
    assert (one.steps, two.steps) == (22, 12)  # the last step of each epoch is short
    assert one.tokens is not None
    assert two.tokens == pytest.approx(one.tokens * 2 * 12 / 22, abs=1)  # of both ranks
    assert two.available_bytes < one.available_bytes  # both take from the memory of this machine


def test_replies_take_what_as_many_tokens_of_single_rows_take(small_run: TrainConfig) -> None:
    common = {"model": small_run.model, "dtype": "float32", "r": 4, "max_length": 64, "max_steps": 3}
    single = plan(TrainConfig(**common, per_device_train_batch_size=4))
    pairs = plan(TrainConfig(**common, per_device_train_batch_size=2, loss="dpo"))
    assert pairs.largest_forward == {"examples": 2, "tokens": 2 * 2 * 64}
    assert pairs.tokens == single.tokens
    assert "every reply with its prompt is assumed to have --max-length 64 tokens" in pairs.notes[0]
    assert pairs.memory.activations == pytest.approx(single.memory.activations, rel=0.1)
    kto = plan(TrainConfig(**common, per_device_train_batch_size=2, loss="kto"))
    assert kto.memory.activations < 0.7 * pairs.memory.activations  # the other reply has no gradient


def test_pairs_are_planned_as_they_are_trained(small_run: TrainConfig, pairs: Path, tmp_path: Path) -> None:
    config = small_run.replaced(data=str(pairs), loss="ipo", max_steps=1, output_dir=str(tmp_path))
    planned = plan(config)
    _, (prepared,) = run_and_collect(config, Prepared)
    header = prepared.header
    assert planned.largest_forward["tokens"] == header["largest_forward_tokens"]
    assert planned.trainable_parameters == header["trainable_parameters"]
    assert any("log-probabilities of all replies" in note for note in planned.notes)


def test_an_adapter_that_is_trained_further_is_planned(small_run: TrainConfig, tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(small_run.model)
    LoRAModel(base, LoRAConfig(r=2, target_modules=["q_proj"])).save_adapter(tmp_path / "adapter")
    planned = plan(TrainConfig(model=small_run.model, adapter=str(tmp_path), max_length=64))  # the folder of a run
    assert {(group.path.rpartition(".")[2], group.r) for group in planned.groups} == {("q_proj", 2)}


def test_a_language_model_that_is_quantized_gets_no_advice_to_quantize() -> None:
    shape = tiny_llava()[0].config
    shape.get_text_config().quantization_config = {"quant_method": "fp8"}
    run: Any = SimpleNamespace(config=TrainConfig(model="any"), shape=shape)
    nothing: Any = None
    assert quantization(run, nothing, nothing) == {}


def test_no_weights_are_drawn(small_run: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """For some models, torch would draw without an end, because numbers without contents are never in range."""

    def draw(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(LlamaForCausalLM, "_init_weights", draw)
    with fake_tensors():
        fake_trainable(small_run, read_config(small_run.model), torch.device("cpu"))


def test_a_tower_is_left_out_of_the_estimate_only_if_its_shapes_depend_on_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, example = ImageTextToText(tiny_llava()[1]), Example.of_text(np.arange(4))
    nothing: Any = None
    fake = FakeModel(nothing, task, nothing, nothing, nothing, notes=[])

    def step(error: Exception) -> Any:
        def simulate(_: Any, examples: list[Example], **__: Any) -> str:
            if examples[0].images:
                raise error
            return "as text"

        monkeypatch.setattr("tailora.train.memory_estimate.simulate_step", simulate)
        return largest_step(TrainConfig(), fake, [replace(example, images=("an image",))])

    monkeypatch.setattr("tailora.train.memory_estimate.trains_on_pixels", lambda _: True)
    reads: list[Callable[[], Any]] = [  # as in towers
        lambda: torch.ones(()).tolist(),
        lambda: torch.ones(()).nonzero(),
        lambda: torch.tensor([torch.ones(())]),
        lambda: torch.ones(()).numpy(),
    ]
    for read in reads:
        with fake_tensors(), pytest.raises(RuntimeError) as caught:
            read()
        assert step(caught.value) == "as text"
    assert len(fake.notes) == len(reads)
    with pytest.raises(RuntimeError, match="a mistake"):
        step(RuntimeError("a mistake"))


@pytest.mark.slow
def test_a_model_for_images_names_its_parts_and_counts_the_tower_where_it_is_trained(tmp_path: Path) -> None:
    model, image = save_tiny_llava(tmp_path / "model"), save_image(tmp_path / "a.png", "red", (40, 60))
    reply = {"role": "assistant", "content": "red"}
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"Which {number}?"}, reply], **({"image": image} if number else {})}
        for number in range(4)
    ]
    data = write_rows(tmp_path / "chats.jsonl", rows)
    settings = {"model": str(model), "data": str(data), "validation_split": 0}
    language, everything = plan(TrainConfig(**settings)), plan(TrainConfig(**settings, target_modules="all-linear"))
    assert language.parts == ["language model"]
    assert everything.parts == ["language model", "image tower", "projector"]
    assert any(note.startswith("12 of ") and note.endswith("are images") for note in language.notes)  # 3 images of 4
    assert everything.memory.weights == language.memory.weights
    assert everything.memory.activations > 1.05 * language.memory.activations
    assert plan_page(everything).sections[0].text == "Parts: language model, image tower, projector."
