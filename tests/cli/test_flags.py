"""Flags, and how they are merged with a YAML file and with defaults. None of this needs torch."""

import re
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from command_line import check_refused
from cyclopts import App

from tailora.cli.flags import FIELDS, merge_settings
from tailora.cli.main import main
from tailora.cli.train import train as command
from tailora.core.config import LoRAConfig
from tailora.core.setting_names import ALIASES, NAMES_OF_OTHER_TOOLS, OUR_NAMES, REMOVED_SETTINGS, WHY_NOT_NEEDED
from tailora.errors import ConfigError
from tailora.train.config import TrainConfig
from tailora.train.config_file import config_text


def parsed(
    *tokens: str, yaml: str | None = None, folder: Path | None = None, defaults: dict[str, Any] | None = None
) -> TrainConfig:
    """What `tailora train TOKENS` would run."""
    app = App()
    app.default(command)
    _, bound, _ = app.parse_args(list(tokens), exit_on_error=False, print_error=False)
    path = bound.arguments["given"].config if "given" in bound.arguments else None
    if yaml is not None:
        assert folder is not None
        path = folder / "run.yaml"
        path.write_text(yaml)
    return merge_settings(bound.arguments.get("flags"), path, defaults=defaults)


def test_without_flags_the_settings_are_the_defaults() -> None:
    assert parsed("--data", "mine.jsonl") == TrainConfig(data="mine.jsonl")


@pytest.mark.parametrize(
    ("tokens", "eval_data"),
    [
        ([], "demo"),
        (["--data", "mine.jsonl"], None),
        (["--validation-split", "0.1"], None),
        (["--eval-data", "x"], "x"),
    ],
)
def test_the_data_of_the_demo_brings_its_held_out_part(tokens: list[str], eval_data: str | None) -> None:
    assert parsed(*tokens).eval_data == eval_data


@pytest.mark.parametrize(
    ("tokens", "name", "value"),
    [
        (["--r", "8"], "r", 8),
        (["--learning-rate", "1e-4"], "learning_rate", 1e-4),
        (["--target-modules", "q_proj,v_proj"], "target_modules", ["q_proj", "v_proj"]),
        (["--target-modules", "none"], "target_modules", []),
        (["--target-parameters", "down_proj,gate.weight"], "target_parameters", ["down_proj", "gate.weight"]),
        (["--target-modules", "q_proj", "--target-modules", "v_proj"], "target_modules", ["q_proj", "v_proj"]),
        (["--target-modules", "all-linear"], "target_modules", "all-linear"),
        (["--target-modules", r"layers\.\d{1,2}\.q_proj"], "target_modules", r"layers\.\d{1,2}\.q_proj"),
        (["--layers-to-transform", "{0,20-22}"], "layers_to_transform", [0, 20, 21, 22]),
        (["--field", "prompt=q", "--field", "completion=a"], "field", {"prompt": "q", "completion": "a"}),
        (["--field", "prompt=question, in full"], "field", {"prompt": "question, in full"}),
        (["--rank-pattern", "0.q_proj=8,v_proj=4"], "rank_pattern", {"0.q_proj": 8, "v_proj": 4}),
        (["--rank-pattern", r"\d{1,2}\.q_proj=8"], "rank_pattern", {r"\d{1,2}\.q_proj": 8}),
        (["--alpha-pattern", "(?=.*q)q_proj=8.5"], "alpha_pattern", {"(?=.*q)q_proj": 8.5}),
        (["--use-rslora"], "use_rslora", True),
        (["--report-to", "tensorboard,wandb"], "report_to", ["tensorboard", "wandb"]),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--resume-from-checkpoint", "latest"], "resume_from_checkpoint", "latest"),
    ],
)
def test_a_flag_sets_its_field(tokens: list[str], name: str, value: Any) -> None:
    assert parsed("--data", "mine.jsonl", *tokens) == TrainConfig(data="mine.jsonl", **{name: value})


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    found = parsed("--r", "4", yaml="r: 8\nseed: 7\n", folder=tmp_path, defaults={"r": 2, "seed": 3, "max_steps": 9})
    assert found == TrainConfig(r=4, seed=7, max_steps=9, eval_data="demo")
    assert parsed("--no-use-rslora", yaml="use_rslora: true", folder=tmp_path).use_rslora is False
    assert parsed(yaml="# nothing yet\n", folder=tmp_path) == parsed()


def test_values_that_other_tools_and_plan_write_are_read_as_meant(tmp_path: Path) -> None:
    for text, packing in {"true": "on", "false": "off", "on": "on", "auto": "auto"}.items():
        assert parsed(yaml=f"packing: {text}", folder=tmp_path).packing == packing
    for text in ("20-22", "[20, 21-22]", '"{20-22}"'):
        assert parsed(yaml=f"layers_to_transform: {text}", folder=tmp_path).layers_to_transform == [20, 21, 22]
    assert LoRAConfig(layers_to_transform="0-2").layer_indices == {0, 1, 2}
    assert LoRAConfig(layers_to_transform=7).layer_indices == {7}
    with pytest.raises(ConfigError, match="layers_to_transform"):
        parsed("--layers-to-transform", "20-x")
    with pytest.raises(ConfigError, match=r"'load_in_8bit'; remove it \(quantize: int8 enables this"):
        parsed(yaml="load_in_8bit: false", folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rnk: 8", r"lora_rnk.*did you mean"),
        ("r: -1\nlearning_rate: fast", r"2 problems(.|\n)*r = -1(.|\n)*learning_rate = 'fast'"),
        ("lora_rank: 8\nr: 4", "two names of r are set; use only r"),
    ],
)
def test_bad_yaml_is_refused_with_its_cause(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parsed(yaml=text, folder=tmp_path)
    assert str(caught.value).startswith(f"--config {tmp_path / 'run.yaml'}")


@pytest.mark.parametrize(
    ("tokens", "text", "start"),
    [
        ([], "streaming: true", "--config FILE: "),
        (["--max-steps", "9"], "lora_dropout: 2", "--config FILE and the flags: lora_dropout = 2"),
        (["--r", "0"], "", "--r '0': "),
    ],
)
def test_the_file_is_named_where_its_settings_are_wrong(
    tmp_path: Path, tokens: list[str], text: str, start: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(*tokens, yaml=text, folder=tmp_path)
    assert str(caught.value).startswith(start.replace("FILE", str(tmp_path / "run.yaml")))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["--config", "absent.yaml"], "absent.yaml: No such file"),
        (["--r", "0"], "--r '0': "),
        (["--lora-rank", "8", "--lora-r", "4"], "two names of r are set"),
        (["--rank-pattern", "q_proj"], "expected key=value"),
        (["--rank-pattern", "q_proj=x"], "rank_pattern"),
        (["--rank-pattern", "q_proj=4", "--rank-pattern", "q_proj=8"], "q_proj is set twice"),
        (["--field", "prompt=a,prompt=b"], "prompt is set twice"),
        (["--target-modules", "q_proj", "--target-modules", ".*v"], "expected names or a single regular expression"),
    ],
)
def test_bad_flags_are_refused_with_their_cause(tokens: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(*tokens)


@pytest.mark.parametrize(
    ("tokens", "changes", "note"),
    [
        (["--lora-rank", "8"], {"r": 8}, "lora_rank is read as r"),
        (["--lora-r", "8"], {"r": 8}, "lora_r is read as r"),
        (["--cutoff-len", "64"], {"max_length": 64}, "cutoff_len is read as max_length"),
    ],
)
def test_names_of_other_tools_are_read_with_a_note(
    tokens: list[str], changes: dict[str, Any], note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parsed(*tokens) == TrainConfig(eval_data="demo", **changes)
    assert capsys.readouterr().err == f"note: {note}\n"
    name, value = tokens[0].removeprefix("--").replace("-", "_"), tokens[1]
    assert parsed(yaml=f"{name}: {value}", folder=tmp_path) == TrainConfig(eval_data="demo", **changes)
    assert capsys.readouterr().err == f"note: {note}\n"


TOO_LARGE: dict[Any, tuple[str, ...]] = {float: ("inf", "nan"), int: (str(2**70),), int | None: (str(2**70),)}


def test_no_number_is_larger_than_what_torch_and_numpy_hold() -> None:
    values = [(name, value) for name in FIELDS for value in TOO_LARGE.get(FIELDS[name].annotation, ())]
    for refused in ("inf", "nan", str(2**70)):
        flags = [(f"--{name.replace('_', '-')}", value) for name, value in values if value == refused]
        with pytest.raises(ConfigError, match=f"{len(flags)} problems") as caught:
            parsed(*(word for flag in flags for word in flag))
        assert all(f"{flag} '{value}': " in str(caught.value) for flag, value in flags)


@pytest.mark.parametrize(("name", "value"), [("alpha_pattern", {"q_proj": float("inf")}), ("seed", 2**63)])
def test_limits_hold_in_python_too(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        TrainConfig(**{name: value})


PEERS = {  # what users of TRL, Axolotl, LLaMA-Factory, Unsloth, LitGPT and mlx-lm type -> what it is here
    "--lr": "--learning-rate",
    "--micro-batch-size": "--per-device-train-batch-size",
    "--sequence_len": "--max-length",
    "--load-in-4bit": "--quantize nf4",
    "--base-model": "--model",
}


# each flag with one of the commands that train, in turn
@pytest.mark.parametrize(("subcommand", "theirs"), [*zip(cycle(("train", "demo", "plan")), PEERS, strict=False)])
def test_a_flag_of_another_tool_is_answered_with_ours(
    subcommand: str, theirs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = PEERS[theirs]
    assert main([subcommand, theirs, "1", "--json"]) == 2
    shown = capsys.readouterr()
    assert (
        shown.err
        == f"error: Unknown option: {theirs}. Use {ours}. Run `tailora {subcommand} --help-all` for all flags\n"
    )
    assert f"Use {ours}." in shown.out
    name, setting = (text.removeprefix("--").replace("-", "_") for text in (theirs, ours.replace(" ", ": ")))
    with pytest.raises(ConfigError, match=f"unknown setting '{name}'; use {setting}"):
        parsed(yaml=f"{name}: 1", folder=tmp_path)


def test_lora_config_in_python_names_the_setting_too() -> None:
    with pytest.raises(ConfigError, match="3 problems") as caught:
        LoRAConfig(rank=8, alpha=16, lr=1e-3)
    assert "unknown setting 'rank'; use r" in str(caught.value)
    assert "unknown setting 'alpha'; use lora_alpha" in str(caught.value)
    assert "unknown setting 'lr'; other commands call this learning_rate, but this one does not support it" in str(
        caught.value
    )
    with pytest.raises(ConfigError, match=r"other commands have it, but this one does not support it$"):
        LoRAConfig(learning_rate=1)


def test_a_flag_that_is_not_needed_says_why() -> None:
    check_refused("Unknown option: --stage. Remove it: the task is inferred from the data", "train", "--stage", "sft")
    check_refused(
        "--lr. Other commands call this --learning-rate, but this one does not support it.", "predict", "--lr", "1"
    )


def test_a_name_that_is_not_close_is_not_suggested(tmp_path: Path) -> None:
    for name in ("dataset_format", "plot_lines", "nonsense"):
        with pytest.raises(ConfigError) as caught:
            parsed(yaml=f"{name}: 1", folder=tmp_path)
        assert str(caught.value).endswith(f"unknown setting '{name}'")


@pytest.mark.parametrize(("method", "remedy"), [("lora", "remove it"), ("qlora", "use quantize: nf4")])
def test_axolotls_name_of_the_method_is_no_adapter(
    method: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for tokens, yaml in (([], f"adapter: {method}\nmodel: demo"), (["--adapter", method], "model: demo")):
        with pytest.raises(ConfigError, match=f"this is Axolotl's name .*{remedy}.* adapter is the folder"):
            parsed(*tokens, yaml=yaml, folder=tmp_path)
    Path(method).mkdir()
    assert parsed(yaml=f"adapter: {method}\nmodel: demo", folder=tmp_path).adapter == method


def test_unknown_settings_are_told_before_an_adapter_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown setting 'base_model'; use model"):
        parsed(yaml="adapter: nowhere\nbase_model: demo", folder=tmp_path)


def test_steps_of_warmup_are_answered_with_the_unit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use warmup_ratio, a share of all steps"):
        parsed(yaml="warmup_steps: 100", folder=tmp_path)
    check_refused("Use --warmup-ratio, a share of all steps", "train", "--warmup-steps", "100")


def test_a_setting_is_no_name_of_another_tool() -> None:
    assert not (OUR_NAMES.keys() | WHY_NOT_NEEDED.keys()) & {*FIELDS, *ALIASES}
    assert not OUR_NAMES.keys() & WHY_NOT_NEEDED.keys()
    assert sum(len(names.split()) for names in NAMES_OF_OTHER_TOOLS.values()) == len(OUR_NAMES)


def test_a_removed_setting_loads_at_its_default_alone_and_its_flag_is_refused(tmp_path: Path) -> None:
    removed = {name: REMOVED_SETTINGS[name] for name in sorted(REMOVED_SETTINGS.keys() - FIELDS.keys())}
    defaults = config_text({name: default for name, (default, _) in removed.items()})
    assert parsed(yaml=f"r: 4\n{defaults}", folder=tmp_path) == parsed(yaml="r: 4", folder=tmp_path)
    for name, (_, instead) in removed.items():
        with pytest.raises(ConfigError, match=re.escape(f"unknown setting '{name}'; remove it: {instead}")):
            parsed(yaml=config_text({name: "other"}), folder=tmp_path)
    for subcommand, (name, (_, instead)) in zip(("train", "plan", "compare", "search"), removed.items(), strict=False):
        flag = f"--{name.replace('_', '-')}"
        check_refused(f"Unknown option: {flag}. Remove it: {instead}", subcommand, flag, "1")
    check_refused("Remove it: ", "train", f"--no{flag[1:]}")


def test_rewards_are_not_split_at_commas() -> None:
    flags = {"reward": [r"regex:\d{1,2}", "a.py:b=0.5"], "metric": ["regex:a,b"]}
    settings = merge_settings({"task": "grpo", **flags}, None)
    assert (settings.reward, settings.metric) == (flags["reward"], flags["metric"])
