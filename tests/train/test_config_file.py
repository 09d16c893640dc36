"""Files of settings: YAML 1.2, limits for untrusted files, and what we write is read back by everyone."""

from pathlib import Path
from typing import Any

import pytest

from tailora.errors import ConfigError
from tailora.train.config import TrainConfig
from tailora.train.config_file import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_SCALAR,
    MAX_VALUES,
    config_text,
    read_config_file,
)
from tailora.train.run_log import write_settings


def read(folder: Path, content: str | bytes) -> dict[str, Any]:
    path = folder / "x.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_config_file(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2E+3", -2000.0),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("08", 8),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("", None),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("{q_proj: 8}", {"q_proj": 8}),
        ("'1e-4'", "1e-4"),
    ],
)
def test_scalars_follow_yaml_1_2(tmp_path: Path, text: str, value: Any) -> None:
    value_read = read(tmp_path, f"key: {text}\n")["key"]
    assert value_read == value
    assert type(value_read) is type(value)


def test_keys_may_have_dashes(tmp_path: Path) -> None:
    settings = read(tmp_path, "max-steps: 3\narms:\n  one: {lora-alpha: 4}\n")
    assert settings == {"max_steps": 3, "arms": {"one": {"lora-alpha": 4}}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("r: 8\nr: 9", "x.yaml, line 2: r is set twice"),
        ("field:\n  prompt: a\n  'prompt': b", "line 3: 'prompt' is set twice"),
        ("max-steps: 8\nmax_steps: 9", "max_steps is set twice, as max-steps and as max_steps"),
        ("- r\n- 8", "expected a mapping of settings, got a list; write lines such as `max_steps: 100`"),
        ("r: [", "line 1 cannot be read as YAML"),
        ("r: 1\n---\nr: 2", "line 2 cannot be read as YAML: expected a single document"),
        (b"seed: 1\nr: \xff", "line 2 is not valid UTF-8; save the file as UTF-8"),
        (b"seed: 1\nr: \x00", r"line 2 cannot be read as YAML: the character U\+0000 is not allowed"),
        (b'model: "\\ud800"', "line 1 .* half of a surrogate pair"),
        ("a: [" + "1," * (MAX_VALUES + 1) + "]", "more than 5,000 values"),
        ("seed: 1\n\tr: 2", "line 2 cannot be read as YAML: .*t' that cannot start"),
        ("1: a\n'1': b", "1 is set twice"),
        ("r: !!int 3", "line 1 cannot be read as YAML: tags"),
        ("r: !!python/object/apply:os.system [ls]", "tags"),
        ("r: 0x_", "cannot be read as YAML"),
        ("seed: 1\nr: *a", r"line 2 cannot be read as YAML: anchors and aliases \(a\) are not supported"),
        ("a: &a {r: 1}\nb: {<<: *a}", "line 1 .* anchors and aliases"),
        ("r: " + "[" * (MAX_DEPTH + 1), f"nested more than {MAX_DEPTH} levels"),
        ("[" * 5000, "nested more than"),
        ("r: " + "9" * (MAX_SCALAR + 1), "a value has more than 3,000 characters"),
        ("#" * (MAX_BYTES + 1), "larger than 100,000 bytes"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith(f"--config {tmp_path / 'x.yaml'}")


def test_files_that_are_missing_or_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: No such file"):
        read_config_file(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_config_file(tmp_path)


def test_huge_numbers_are_refused_by_the_settings(tmp_path: Path) -> None:
    for number in ("9" * MAX_SCALAR, "0x" + "f" * (MAX_SCALAR - 2), "1e999999"):
        with pytest.raises(ConfigError, match=r"^r = "):
            TrainConfig(**read(tmp_path, f"r: {number}"))


VALUES: dict[str, Any] = {
    "packing": "on",
    "learning_rate": 1e-5,
    "huge": 1.5e22,
    "seed": 3,
    "eval_data": None,
    "use_dora": True,
    "target_modules": ["q_proj", "no", "08"],
    "field": {"prompt": "1e-4", "completion": "a: b #c"},
    "alpha_pattern": {r".*\.q_proj": 1e-7},
    "rank_pattern": {},
    "output_dir": 'C:\\runs "ü" ☃ 😀\n\x07',
    "date": "2024-01-01",
    "time": "12:30",
}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    assert read(tmp_path, config_text(VALUES)) == VALUES


def test_the_file_of_a_run_begins_with_what_it_changes_and_each_part_gives_the_same_run(tmp_path: Path) -> None:
    config = TrainConfig(data="a.jsonl", r=8, seed=0, field={"prompt": "a"}, resume_from_checkpoint="latest")
    write_settings(tmp_path, config)
    text = (tmp_path / "config.yaml").read_text()
    first, line, rest = text.partition("\n# defaults of this version\n")
    assert read(tmp_path, first) == {"data": "a.jsonl", "r": 8, "field": {"prompt": "a"}}
    assert line
    assert {**read(tmp_path, first), **read(tmp_path, rest)} == read(tmp_path, text)
    for part in (first, text):
        assert TrainConfig(**read(tmp_path, part)) == config.replaced(resume_from_checkpoint=None)


def test_yaml_1_1_reads_the_same(tmp_path: Path) -> None:
    """As PyYAML does, which is not a dependency: ruamel.yaml reads a file of version 1.1 by the rules of 1.1."""
    assert read(tmp_path, "%YAML 1.1\n---\n" + config_text(VALUES)) == VALUES
    assert read(tmp_path, "%YAML 1.1\n---\npacking: on\n") == {"packing": True}
