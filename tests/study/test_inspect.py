"""A whole inspection of a tiny model's adapter: from its files, beside its base, on data."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import chat_model, stir, stirred_model, tiny_model

from tailora import LoRAConfig, LoRAModel
from tailora.core.compress import leading_only, spectra_of
from tailora.errors import BaseMismatchError, ConfigError, FormatError
from tailora.study import inspect as inspecting
from tailora.study.inspect import InspectOptions, inspect, inspect_model
from tailora.train.config import TrainConfig
from tailora.train.loss import Evaluation
from tailora.train.trainer import run


@pytest.fixture(scope="module")
def tuned(small_run: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run that has learned something, with its adapter."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    config = small_run.replaced(output_dir=str(folder), learning_rate=2e-2, learn_scaling=True, samples=0)
    run(config)
    return config


def test_files_alone_say_ranks_energy_and_scales(tuned: TrainConfig) -> None:
    found = inspect(tuned.output_dir)
    assert found.adapter == f"{tuned.output_dir}/adapter"
    assert found.model is None
    assert found.named_base == tuned.model
    assert found.training["learning_rate"] == 2e-2
    assert len(found.modules) == 14
    assert sum(module.energy for module in found.modules) == pytest.approx(1)
    assert all(module.relative_norm is module.intruders is None for module in found.modules)
    assert all(module.learned_scaling and module.scaling != module.configured_scaling for module in found.modules)
    assert [module.path for module in found.modules][:2] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.gate_proj",
    ]


@pytest.mark.slow
def test_beside_the_base_and_on_data(tuned: TrainConfig) -> None:
    heard: list[str] = []
    counted: list[tuple[int, int]] = []
    found = inspect(
        tuned.output_dir, tuned.model, tuned.data, log=heard.append, progress=lambda *at: counted.append(at)
    )
    assert counted[-1] == (14, 14)
    assert all(module.relative_norm is not None and module.relative_norm > 0 for module in found.modules)
    assert all(module.intruders is not None and module.intruders_random is not None for module in found.modules)
    held = found.held_out
    assert held is not None
    assert held.examples == 60
    assert held.loss < held.base_loss
    assert held.improvement == pytest.approx(held.base_loss - held.loss)
    assert held.half.rise == pytest.approx(held.half.loss - held.loss)
    assert held.half.cost == pytest.approx(held.half.rise / held.improvement)
    assert held.half.cost > 0.03  # type: ignore[operator]
    assert found.forgetting is not None
    assert found.forgetting["kl"] > 0
    assert len([line for line in heard if "lower half" in line]) == 1
    assert not any(advice.rule == "no gain" for advice in found.advice)

    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["modules"][0].keys() >= {
        *("path", "r", "effective_rank", "stable_rank", "energy", "relative_norm", "intruders", "scaling"),
        *("singular_values", "group", "use"),
    }
    assert written["held_out"]["half"]["loss"] == held.half.loss
    alone = inspect(tuned.output_dir)
    for one, other in zip(alone.modules, found.modules, strict=True):
        assert one.effective_rank == pytest.approx(other.effective_rank, rel=1e-5)
        assert one.norm == pytest.approx(other.norm, rel=1e-5)


@pytest.mark.slow
def test_an_adapter_of_an_encoder_and_decoder_on_data(seq2seq_run: TrainConfig, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(seq2seq_run.model, model)
    ids = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 3}
    tiny_model("T5ForConditionalGeneration", vocab_size=300, **ids).save_pretrained(model)
    config = seq2seq_run.replaced(model=str(model), output_dir=str(tmp_path / "run"), max_steps=10, dtype="float32")
    run(config)
    found = inspect(config.output_dir, config.model, config.data)
    assert found.held_out is not None
    assert found.held_out.loss < found.held_out.base_loss
    assert found.forgetting is None
    with pytest.raises(ConfigError, match=r"^--forgetting-data .* an encoder-decoder model, .*; remove the flag"):
        inspect(config.output_dir, config.model, options=InspectOptions(forgetting_data=config.data))


@pytest.mark.slow
def test_forgetting_alone(tuned: TrainConfig) -> None:
    found = inspect(tuned.output_dir, tuned.model, options=InspectOptions(forgetting_data=tuned.data, intruders=False))
    assert found.held_out is None
    assert found.forgetting is not None
    assert found.forgetting["text"] == tuned.data
    assert found.forgetting["loss_after"] < found.forgetting["loss_before"]  # it is what was trained on
    assert all(module.intruders is None and module.relative_norm for module in found.modules)


def test_a_model_in_memory_is_left_as_it_was() -> None:
    model = LoRAModel(chat_model().eval(), LoRAConfig(r=4))
    model.add_adapter("other", LoRAConfig(r=2, target_modules=["q_proj"]))
    stir(model)
    ids = torch.arange(20).view(2, 10)
    before = model(ids).logits
    found = inspect_model(model, "other")
    assert [module.r for module in found.modules] == [2, 2]
    assert {advice.rule for advice in found.advice} == {"dead"}  # no step was taken
    assert model.active_adapters == ("default",)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("start", ["kaiming", "pissa"])
def test_without_the_lower_half_it_computes_as_an_adapter_shrunk_to_that(start: str) -> None:
    config = LoRAConfig(r=4, use_rslora=True, learn_scaling=True, init_lora_weights=start)
    model = stirred_model(chat_model().eval(), config)
    ids, adapter = torch.arange(20).view(2, 10), model.adapter()
    spectra = spectra_of(adapter)
    before = model(ids).logits
    with leading_only(adapter, spectra, dict.fromkeys(spectra, 2)):
        cut = model(ids).logits
    assert torch.equal(model(ids).logits, before)
    model.shrink("default", "small", r=2)
    model.set_adapter("small")
    torch.testing.assert_close(cut, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(cut, before, rtol=1e-3)


def evaluation(loss: float) -> Evaluation:
    return Evaluation(np.full(8, 10 * loss), np.full(8, 10))


def test_of_an_odd_number_of_values_the_larger_half_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stirred_model(chat_model().eval(), LoRAConfig(r=3))
    kept: list[set[int]] = []

    def cut(_adapter: object, _spectra: object, ranks: dict[str, int]) -> nullcontext[None]:
        kept.append(set(ranks.values()))
        return nullcontext()

    monkeypatch.setattr(inspecting, "leading_only", cut)
    evaluations = map(evaluation, [3.0, 2.0, *[2.5] * 9])  # of the base, with the adapter, without the lower half
    found = inspect_model(model, options=InspectOptions(intruders=False))
    held = inspecting._held_out_losses(found, model, "default", "chats", evaluations.__next__, lambda _: None)
    assert kept[0] == {2}
    assert (held.base_loss, held.loss, held.improvement, held.half.rise) == pytest.approx((3, 2, 1, 0.5))
    assert held.half.cost == pytest.approx(0.5)


def test_what_it_cannot_look_at_is_refused(tuned: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="add --model"):
        inspect(tuned.output_dir, data=tuned.data)
    with pytest.raises(FormatError, match=r"adapter_model\.safetensors"):
        inspect(tuned.model)
    with pytest.raises(FormatError, match="is not a folder"):
        inspect(tmp_path / "absent")
    chat_model(intermediate_size=48).save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / name).write_bytes((Path(tuned.model) / name).read_bytes())
    with pytest.raises(BaseMismatchError, match="a different base"):
        inspect(tuned.output_dir, str(tmp_path / "other"))
    model = LoRAModel(chat_model(), LoRAConfig(r=2))
    with pytest.raises(ConfigError, match="tokenizer"):
        inspect_model(model, options=InspectOptions(data="chats.jsonl"))
