"""Random command lines and settings files: each ends in a result or a message, never in a traceback."""

import io
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import limited

from tailora.cli.flags import FIELDS, merge_settings
from tailora.cli.main import COMMANDS, app, main
from tailora.core.setting_names import OUR_NAMES
from tailora.errors import ConfigError, FetchError
from tailora.train.config import TrainConfig

EXIT_CODES = {0, 1, 2, 3, 4, 130}

# ---- Settings files

YAML_PIECES = """\
r: |- |[|]|{|}|, |: |\n|  |\t|&a |*a|<<: |!!int |! |!!python/name:x |'|"|> |? |---\n|...\n|%YAML 1.1\n|%TAG ! x\n|# |\
\ufeff|\x00|\x85|\u2028|é|1e5|0x_|null|~|.nan|-.inf|true|2024-01-01|12:30:00|1_0|\\ud800|\\UFFFFFFFF|model|\
learning_rate: |field: |target_modules: |rank_pattern: |adapter: """.split("|")  # noqa: SIM905
YAML_PIECES += ["| ", "0x" + "f" * 3000, "9" * 4400]
NAMES = st.sampled_from([*FIELDS, *OUR_NAMES])
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([10**2900, -1])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder, which is empty."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def is_read_or_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with limited(), suppress(ConfigError):
        assert isinstance(merge_settings(None, file), TrainConfig)


@given(
    content=st.binary(max_size=200) | st.lists(st.sampled_from(YAML_PIECES), max_size=12).map("".join).map(str.encode)
)
def test_any_bytes_are_settings_or_refused(folder: Path, content: bytes) -> None:
    is_read_or_refused(folder / "run.yaml", content)


@pytest.mark.slow
@given(settings=st.dictionaries(NAMES, VALUES, max_size=4))
def test_any_values_are_settings_or_refused(folder: Path, settings: dict[str, Any]) -> None:
    is_read_or_refused(folder / "run.yaml", json.dumps(settings).encode())


# ---- Command lines

WORDS = """
-1 0 1 2 1e400 nan demo none auto latest a=b a=1,b=2 = , a:r=4 r=2..8 [/] ( ((a+)+)+$ . - -- é \udcff here.yaml
here.jsonl absent loss<1 a/acc>0 8GB peft gguf cat nf4 lora full true
""".split()  # noqa: SIM905
WORD = st.sampled_from([*WORDS, "", "9" * 5000]) | st.text(st.characters(exclude_characters="/\\\0"), max_size=6)


def flags_of_command(command: str) -> list[str]:
    arguments = app()[command].assemble_argument_collection()
    return [name for argument in arguments for name in argument.names if name.startswith("-")]


FLAGS = {command: flags_of_command(command) for command in COMMANDS}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Up to five flags of a command, most of them with a word, and up to two other words."""
    command = draw(st.sampled_from(list(COMMANDS)))
    flag = st.sampled_from([*FLAGS[command], *(f"--{name.replace('_', '-')}" for name in OUR_NAMES)])
    parts = draw(st.lists(st.tuples(flag, WORD | st.none()), max_size=5))
    flags = [word for part in parts for word in part if word is not None]
    return [command, *draw(st.lists(WORD, max_size=2)), *flags]


@pytest.fixture(scope="module")
def nothing_is_loaded(folder: Path) -> Iterator[None]:
    """No model or data can be had, and what comes after the arguments does nothing."""
    (folder / "here.yaml").write_text("seed: 1\n")
    (folder / "here.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')

    def not_there(*_: Any, **__: Any) -> Any:
        raise FetchError("not in this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tailora.data.demo.build_once", not_there)
        patch.setattr("huggingface_hub.HfApi.model_info", not_there)
        patch.setattr("tailora.train.model_loading.AutoConfig.from_pretrained", not_there)
        patch.setattr("tailora.cli.doctor.collect_facts", not_there)
        patch.setattr("tailora.cli.train.check_sources_of_run", not_there)
        patch.setattr("tailora.cli.study.run_study", not_there)
        patch.setattr("sys.stdin", io.StringIO())
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_is_loaded")
@given(tokens=command_lines())
def test_any_command_line_ends_with_an_exit_code(tokens: list[str]) -> None:
    with limited():
        assert main(tokens) in EXIT_CODES
