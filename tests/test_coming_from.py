"""docs/coming_from: the names there are those of the tools (benchmarks/results/peers.json)."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from benchmarks.site.page_blocks import blocks
from tailora.cli.flags import merge_settings
from tailora.cli.main import app
from tailora.core.setting_names import ALIASES
from tailora.errors import ConfigError
from tailora.train.config import TrainConfig

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "coming_from"
PEERS = json.loads((ROOT / "benchmarks" / "results" / "peers.json").read_text())
TOOLS = {tool.lower().replace("-", "_"): tool for tool in PEERS["tools"]}  # page -> tool


def not_run(page: str, language: str) -> list[str]:
    """The blocks that no test runs."""
    return [
        block.text for block in blocks(PAGES / f"{page}.md") if (block.mark, block.language) == ("not run", language)
    ]


def test_every_tool_has_its_page_which_says_the_version() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == TOOLS.keys()
    for page, tool in TOOLS.items():
        assert f"{tool} {PEERS['tools'][tool]['version']}" in (PAGES / f"{page}.md").read_text().partition("\n## ")[0]


@pytest.mark.parametrize("page", ["axolotl", "llama_factory"])
def test_their_files_have_only_settings_that_their_tool_has(page: str) -> None:
    files = [YAML(typ="safe").load(block) for block in not_run(page, "yaml")]
    assert files
    for file in files:
        assert not file.keys() - set(PEERS["tools"][TOOLS[page]]["names"])


@pytest.mark.parametrize("page", ["axolotl", "llama_factory"])
def test_their_file_is_answered_with_all_its_keys(page: str, tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(not_run(page, "yaml")[0])
    with pytest.raises(ConfigError) as caught:
        merge_settings(None, path)
    lines = str(caught.value).splitlines()[1:]
    keys = YAML(typ="safe").load(path).keys()
    told = {line.partition("'")[2].partition("'")[0] for line in lines if "unknown setting" in line}
    assert told == keys - {*TrainConfig.model_fields, *ALIASES}
    assert {"base_model", "micro_batch_size"} <= told or {"stage", "do_train", "template", "dataset"} <= told
    assert all("; use " in line or "; remove it: " in line for line in lines if "unknown setting" in line)
    assert ("  - adapter = 'lora': this is Axolotl's name for the default method" in str(caught.value)) is (
        page == "axolotl"
    )


def test_the_lines_of_unsloth_have_only_parameters_that_it_has() -> None:
    names = set(PEERS["tools"]["Unsloth"]["names"])
    calls = [
        node
        for block in not_run("unsloth", "python")
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("FastLanguageModel")
    ]
    assert len(calls) == 3
    assert not {keyword.arg for call in calls for keyword in call.keywords} - names


def test_the_flags_of_mlx_lm_are_its_settings() -> None:
    (line,) = (block for block in not_run("mlx_lm", "bash") if block.startswith("mlx_lm.lora"))
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z-]+)", line)}
    assert not flags - set(PEERS["tools"]["mlx-lm"]["names"])


@pytest.mark.parametrize("page", TOOLS)
def test_our_lines_that_no_test_runs_are_commands_of_tailora(page: str) -> None:
    for block in not_run(page, "bash"):
        for _, *tokens in (
            words for words in map(shlex.split, block.replace("\\\n", "").splitlines()) if words[0] == "tailora"
        ):
            assert not app(tokens).parse_known_args(tokens)[2], tokens
