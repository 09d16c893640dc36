"""`tailora plan`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call, check_refused, found, output
from transformers import LlamaConfig

from tailora.cli.plan import bytes_of
from tailora.errors import ConfigError
from tailora.study.plan import plan
from tailora.study.plan_result import Plan
from tailora.train.config import TrainConfig
from tailora.train.defaults import with_numbers
from tailora.train.memory_estimate import remedies


@pytest.fixture(scope="module", autouse=True)
def same_settings_are_planned_once() -> Iterator[None]:
    made: dict[Any, Plan] = {}

    def plan_once(config: TrainConfig, measure: bool, *, log: Any, **options: Any) -> Plan:
        key = (config.model_dump_json(exclude_unset=True), *options.values())
        if key not in made:
            made[key] = plan(config, measure, log=log, **options)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tailora.study.plan.plan", plan_once)
        yield


@pytest.fixture(scope="module")
def bare(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the config.json of a model with one layer."""
    folder = tmp_path_factory.mktemp("bare")
    config = json.loads((tiny_model / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


PARTS = {"weights", "adapters", "gradients", "optimizer", "activations", "logits", "total"}


@pytest.mark.slow
def test_the_line_of_json_has_what_scripts_ask_for(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    tokens = ["plan", "--model", str(tiny_model), "--data", str(chats), "--r", "4", "--dtype", "float32"]
    tokens += ["--memory", "100GB", "--output-dir", str(tmp_path / "out")]
    result = found(*tokens)
    assert result["memory"].keys() >= PARTS
    assert result["full"]["memory"].keys() >= PARTS
    assert result["memory"]["total"] == sum(size for part, size in result["memory"].items() if part != "total")
    assert sum(each["parameters"] for each in result["groups"]) == result["trainable_parameters"]
    assert result["groups"][0].keys() >= {"path", "kind", "shape", "r", "count", "parameters"}
    assert result["batch_size_that_fits"] >= 8
    assert result["steps"] == 30  # 20 examples, three passes of 2
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["kind"], report["memory"]["total"]) == ("plan", result["memory"]["total"])
    shown = output(*tokens)
    assert re.search(r"^batch size that fits +(\d+) \(all examples\) +\1 \(all examples\)$", shown, re.MULTILINE)
    assert re.search(r"The largest forward pass has 2 examples with \d+ tokens in total\.", shown)
    (tmp_path / "out" / "report.json").write_text('{"kind": "train"}')
    check_refused("contains the report.json of another command; use a different folder", *tokens)
    assert (tmp_path / "out" / "report.json").read_text() == '{"kind": "train"}'


def test_what_is_shown_fits_a_narrow_terminal(bare: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"COLUMNS": "60", "LINES": "25", "FORCE_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "bare").symlink_to(bare)
    shown = output("plan", "--model", "bare", "--r", "4")
    table, _, words = shown.partition("It fits")
    assert max(map(len, shown.splitlines())) <= 60
    assert "full fine-tuning" in table
    assert "all examples" not in table
    assert "without --data" in words
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]  # nothing is written


def test_a_model_in_quantized_files_is_planned_as_it_will_be_loaded(bare: Path, tmp_path: Path) -> None:
    config = json.loads((bare / "config.json").read_text())
    settings = {"gptq": {"bits": 4, "group_size": 16}, "fp8": {"weight_block_size": [16, 16]}}
    shown = {}
    for method, more in settings.items():
        (tmp_path / method).mkdir()
        quantization = {"quantization_config": {"quant_method": method, **more}}
        (tmp_path / method / "config.json").write_text(json.dumps({**config, **quantization}))
        shown[method] = output("plan", "--model", str(tmp_path / method), "--r", "4")
    assert re.search(r"^part +LoRA$", shown["gptq"], re.MULTILINE)  # its weights cannot be trained
    assert re.search(r"^part +LoRA +full fine-tuning$", shown["fp8"], re.MULTILINE)
    assert "Note: the fp8 weights are dequantized" in shown["fp8"]
    assert "dequantized" not in shown["gptq"]


def test_a_card_that_is_not_here_is_planned_from_its_data_sheet(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    tokens = ["plan", "--model", tiny_model, "--device", "h100", "--max-steps", "10"]
    shown = output(*tokens)
    table, _, words = shown.partition("It fits")
    no_sentences = [line for line in table.splitlines() if not re.search(r"[.;:] ", line)]
    assert max(map(len, no_sentences)) <= 80
    assert "bfloat16 on H100 SXM 80GB" in table
    steps = "10 steps. The time of a step is not estimated, because this machine does not have the device."
    assert steps in " ".join(table.split())
    assert "--quantize nf4" in table
    assert "of 80 GB" in words
    assert "H100 PCIe 80GB, H100 NVL 94GB" in words
    payload = found(*tokens)
    assert (payload["device"], payload["dtype"], payload["available_bytes"]) == ("H100 SXM 80GB", "bfloat16", 80e9)
    assert payload["seconds_per_step"] is payload["seconds"] is None
    assert payload["memory"]["process"] > 5e8  # the card's context, and what products need
    settings = {option["settings"]: option for option in payload["options"]}
    assert settings["as set"]["memory"] == payload["memory"]["total"]
    assert settings["--gradient-checkpointing"]["memory"] < payload["memory"]["total"]


def test_a_run_that_does_not_fit_exits_with_4_and_says_what_helps(bare: Path) -> None:
    tokens = ["plan", "--model", bare, "--per-device-train-batch-size", "64", "--memory", "1MB"]
    code, shown, _ = call(*tokens)
    assert code == 4
    assert "It does not fit" in shown
    assert "What helps: --gradient-checkpointing; --max-length 512; a smaller --model." in shown
    code, shown, _ = call(*tokens, "--json")
    assert code == 4
    payload = json.loads(shown)
    assert not payload["fits"]
    assert all(option["batch_size"] == option["tokens"] == 0 for option in payload["options"])
    first = "--per-device-train-batch-size 24 --gradient-accumulation-steps 6"
    config = with_numbers(TrainConfig(per_device_train_batch_size=64, gradient_accumulation_steps=2), None)
    assert remedies(config, LlamaConfig(), 24, torch.device("cpu"))[0] == first
    full = TrainConfig(method="full", learning_rate=1e-4, gradient_checkpointing=True, max_length=64)
    advice = remedies(with_numbers(full, None), LlamaConfig(), 0, torch.device("cpu"))
    assert advice == ["--method lora", "a smaller --model"]


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["--model", "MODEL", "--target-modules", "q_prj"], "target_modules: 'q_prj' matches no layer; did you mean"),
        (["--model", "MODEL", "--method", "full", "--r", "4", "--learning-rate", "1e-4"], "r: requires --method lora"),
        (["--model", "MODEL", "--memory", "much"], "8GB"),
        (["--model", "MODEL", "--device", "h1000"], "did you mean h200, h100 sxm"),
        (["--model", "MODEL", "--device", "9" * 10_000], '"Will it fit?" in the docs'),
        (["--model", "MODEL", "--device", "L4", "--measure"], "this machine has no L4 24GB"),
    ],
)
def test_mistakes_exit_with_2(tiny_model: Path, tokens: list[str], said: str) -> None:
    check_refused(said, "plan", *(str(tiny_model) if token == "MODEL" else token for token in tokens))


@pytest.mark.parametrize(("text", "size"), [("8GB", 8 * 10**9), ("512 MiB", 2**29), ("1e3", 1000), (".5g", 5 * 10**8)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "8 apples", "1.2.3GB", "-1GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="8GB"):
        bytes_of(text)
