import json
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import adapter, changed, run_and_collect
from tiny import chat_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from tailora.core.layer_calls import LayerCalls
from tailora.data.dataset import selection_half
from tailora.errors import ConfigError, DataError, TailoraWarning, TargetError
from tailora.formats.run_folder import read_system_message
from tailora.model import LoRAModel
from tailora.report.pages.train import train_report
from tailora.train import events
from tailora.train.config import TrainConfig
from tailora.train.config_file import read_config_file
from tailora.train.loss import Evaluation
from tailora.train.run_log import git_state
from tailora.train.trainer import Trainer, run


def test_a_run_lowers_the_held_out_loss_and_leaves_an_adapter_that_gives_it_again(settings: Any) -> None:
    config = settings(num_train_epochs=4)
    result = run(config)
    assert result.eval_loss_after < result.eval_loss_before - 0.3
    base = AutoModelForCausalLM.from_pretrained(config.model)
    model = LoRAModel.from_pretrained(base, Path(config.output_dir) / "adapter").eval()
    sums = 0.0
    for example in result.data.eval:
        ids, labels = (torch.from_numpy(part).long() for part in (example.input_ids, example.labels))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        sums += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100).item()
    assert sums / result.after.counts.sum() == pytest.approx(result.eval_loss_after, abs=1e-5)


def test_a_run_leaves_what_is_needed_to_repeat_it(settings: Any) -> None:
    config = settings(max_steps=3)
    result = run(config)
    folder = Path(config.output_dir)
    record = json.loads((folder / "run.json").read_text())
    assert (record["finished"], record["result"]) == (True, result.to_dict())
    assert record["settings"] == config.replaced(num_train_epochs=3).model_dump(mode="json")
    assert record["data"]["sha256"] == result.data.report.sha256
    assert {"torch", "transformers", "tailora"} <= record["versions"].keys()
    assert record["git"] == git_state(Path.cwd())
    again = TrainConfig(**{**read_config_file(folder / "config.yaml"), "output_dir": f"{folder}-again"})
    run(again)
    assert adapter(again) == adapter(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3]


@pytest.mark.parametrize(("rows", "halved"), [(80, True), (78, False)])
def test_the_examples_that_choose_the_step_do_not_judge_it(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, halved: bool
) -> None:
    """Half of the held-out examples are best after step 1, the others and all together after step 2."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i} {i * 7919 % 9973}", "completion": f"{i}"}) + "\n" for i in range(rows))
    )
    count = rows // 2
    chosen = np.isin(np.arange(count), selection_half(count))

    def evaluate(trainer: Trainer, *_: Any) -> Evaluation:
        of_selection, of_others = [(3.0, 3.0), (1.0, 2.0), (2.0, 0.0)][trainer.state.step]
        return Evaluation(np.where(chosen, of_selection, of_others), np.ones(count, np.int64))

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    config = settings(data=str(tmp_path / "rows.jsonl"), validation_split=0.5, eval_steps=1, max_steps=2)
    assert run(config).best_step == (1 if halved else 2)
    lines = [json.loads(line) for line in (tmp_path / "out" / "examples.jsonl").read_text().splitlines()]
    assert [line.get("chose") for line in lines] == (chosen.tolist() if halved else [None] * count)
    report = train_report(tmp_path / "out")
    assert report["result"]["eval_loss_after"] == (2.0 if halved else 38 / 39)
    assert len(report["held_out"]["after"]) == (20 if halved else 39)
    assert ("over 20 held-out examples that did not choose the step" in report["verdict"]) == halved
    assert ("The same examples chose the step" in report["verdict"]) != halved


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_system_message_is_stored_with_what_was_trained(settings: Any, method: str, tmp_path: Path) -> None:
    changes = {"method": method, "r": 16, "streaming": True, "validation_split": 0}
    config = settings(max_steps=1, output_dir=str(tmp_path / "run"), **changes)
    folder = tmp_path / "run" / ("adapter" if method == "lora" else "model")
    result = run(changed(config, system="be brief"))
    assert read_system_message(folder) == "be brief"
    assert (result.eval_loss_before, result.data) == (None, None)  # of a stream


@pytest.mark.parametrize("streaming", [False, True])
def test_the_data_is_read_before_the_model_is_loaded(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setattr("tailora.train.setup.load_base", None)
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "reply": "b"}\n')
    changes = {"streaming": True, "validation_split": 0} if streaming else {}
    config = settings(max_steps=1, data=str(tmp_path / "rows.jsonl"), **changes)
    with pytest.raises(DataError, match="Maybe use: --field prompt=question --field completion=reply"):
        run(config)


def test_skipped_rows_are_kept_in_the_folder_with_their_reasons(settings: Any, data_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(data_file.read_text() + '{"messages": []}\n{"messages": "\\ud800"\n')
    config = settings(max_steps=1, data=str(path), skip_bad_rows=True)
    assert run(config).steps == 1
    rows = [json.loads(line) for line in (Path(config.output_dir) / "skipped-rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == [f"{path}:31", f"{path}:32"]
    assert rows[0]["reason"] == "messages: expected a list of messages, got []"
    assert [row["content"] for row in rows] == [{"messages": []}, '{"messages": "\\ud800"\n']


def read_down_proj(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """Reads a weight without calling its layer, in a way that the code does not tell."""
    gated = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return torch.nn.functional.linear(gated, next(mlp.get_submodule("down_proj").parameters()))


def test_a_layer_whose_weight_is_only_read_is_refused_before_training(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", read_down_proj)
    message = r"only reads the weights of model.layers.0.mlp.down_proj, .*\(2 in total\).*--exclude-modules down_proj"
    with pytest.raises(TargetError, match=message):
        run(settings(max_steps=1, fast="off"))
    assert run(settings(max_steps=1, exclude_modules=["down_proj"], fast="off")).steps == 1


def test_layers_that_the_longest_example_does_not_train_are_named(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaMLP, "__call__", lambda _mlp, x: x)  # as a tower for images is passed over in text
    message = r"mlp.gate_proj, .*\(6 adapted layers in total\) get no gradient from the first 32 tokens of"
    with pytest.warns(TailoraWarning, match=message):
        run(settings(max_steps=1, fast="off"))


def test_the_check_of_the_layers_keeps_no_activations(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: set[int] = set()

    def look(_calls: LayerCalls, output: Tensor) -> list[str]:
        node = output.grad_fn
        while node is not None:
            saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
            sizes.update(tensor.numel() for tensor in saved if isinstance(tensor, Tensor))
            node = next((following for following, _ in node.next_functions if following), None)
        return []

    monkeypatch.setattr(LayerCalls, "not_trained_by", look)
    run(settings(max_steps=1, fast="off"))
    assert sizes == {0}


def test_the_commit_of_a_repository_is_known(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for arguments in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    (tmp_path / "new").write_text("")
    commit = next((tmp_path / ".git/refs/heads").iterdir()).read_text().strip()
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


@pytest.mark.parametrize("rows", [pytest.param("data_file", marks=pytest.mark.exhaustive), "feedback_file"])
def test_the_same_weight_for_all_rows_changes_nothing_and_other_weights_do(
    request: pytest.FixtureRequest, settings: Any, tmp_path: Path, rows: str
) -> None:
    lines = request.getfixturevalue(rows).read_text().splitlines()
    adapters = {}
    for name, weight in {"none": None, "two": lambda _: 2, "some": lambda index: 1 + 7 * (index % 2)}.items():
        weighted = [
            json.loads(line) | ({} if weight is None else {"weight": weight(i)}) for i, line in enumerate(lines)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in weighted))
        config = settings(data=str(tmp_path / f"{name}.jsonl"), output_dir=str(tmp_path / name), max_steps=2, samples=0)
        run(config)
        adapters[name] = adapter(config)
    assert adapters["two"] == adapters["none"] != adapters["some"]


def test_gradient_checkpointing_changes_no_bit(settings: Any, tmp_path: Path) -> None:
    written = []
    for on in (False, True):
        folder = str(tmp_path / str(on))
        config = settings(
            gradient_checkpointing=on, lora_dropout=0.1, max_steps=2, validation_split=0, output_dir=folder
        )
        run(config)
        written.append(adapter(config))
    assert written[0] == written[1]


@pytest.mark.parametrize("fast", ["auto", "off"])
def test_layers_below_the_first_adapted_one_compute_once_and_the_others_twice(
    settings: Any, model_folder: Path, fast: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "deep")
    chat_model(vocab_size=320, num_hidden_layers=4).save_pretrained(folder)
    calls, calls_after_step = [0] * 4, list[list[int]]()

    def count(place: int) -> None:
        calls[place] += 1

    def add_hooks(model: Any, *_: Any) -> None:
        for place, layer in enumerate(model.base_model.model.layers):
            layer.input_layernorm.register_forward_pre_hook(lambda *_, place=place: count(place))

    def note(event: events.Event) -> None:
        if isinstance(event, events.Stepped):
            calls_after_step.append(list(calls))

    adapted = {"layers_to_transform": [2, 3], "gradient_checkpointing": True, "max_steps": 4}
    run(settings(model=str(folder), fast=fast, **adapted), on_event=note, on_ready=add_hooks)
    per_step = [[after - before for before, after in zip(*pair, strict=True)] for pair in pairwise(calls_after_step)]
    assert per_step == [[1, 1, 2, 2]] * 3


def test_the_model_and_the_callers_random_state_are_given_back_as_they_were(settings: Any) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    result = run(settings(max_steps=1, gradient_checkpointing=True, lora_dropout=0.5))
    assert torch.equal(torch.rand(3), expected)
    assert result.model.base_model.config._attn_implementation == "sdpa"
    assert not result.model.base_model.is_activation_checkpointing
    output = result.model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, min_new_tokens=2)
    assert output.shape == (1, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_dir": "file/out", "model": "no such model"}, r"is not writable.*--output-dir"),
        ({"model": "./no-such-model"}, "no-such-model"),
        ({"model": "folder"}, r"notes\.txt"),
    ],
)
def test_what_cannot_be_read_or_written_is_named(
    changes: dict[str, str], message: str, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match=message):
        run(settings(**changes))


def test_streaming_trains_on_the_rows_in_order(settings: Any, data_file: Path) -> None:
    config = settings(streaming=True, max_steps=9, eval_data=str(data_file))  # 36 examples: more than one pass
    result, notes = run_and_collect(config, events.Note)
    assert result.steps == 9
    note = "30 of 30 streamed rows are also in the held-out data, so the held-out loss looks too good: chats.jsonl:1, "
    assert any(each.text.startswith(note) and each.text.endswith(" and 25 more") for each in notes)
    assert result.eval_loss_after < result.eval_loss_before


def test_trackers_that_are_missing_or_unknown_are_errors(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError) as caught:
        run(settings(report_to=["wandb", "tensorbord"]))
    assert "pip install wandb" in str(caught.value)
    assert "did you mean tensorboard" in str(caught.value)


def test_numbers_of_a_step_add_up(settings: Any) -> None:
    result, reports = run_and_collect(settings(num_train_epochs=2, gradient_accumulation_steps=2), events.Stepped)
    assert result.data is not None
    assert len(reports) == result.steps == reports[0].max_steps == 2 * 3  # 24 examples, 8 a step
    assert sum(event.tokens for event in reports) == result.train_tokens == 2 * int(result.data.train.lengths.sum())
    assert sum(event.supervised_tokens for event in reports) == result.supervised_tokens
    assert result.supervised_tokens == 2 * int(result.data.train.supervised.sum())
    assert reports[-1].eta_seconds == 0
    assert result.seconds > sum(event.seconds for event in reports)
    assert reports[-1].memory_bytes >= reports[0].memory_bytes > 0
