"""The catalogue of messages (docs/site_errors.py): every message that names a setting says its cause and its remedy."""

import pytest
from site_errors import Message, accepted_values, messages, named_settings

from tailora.errors import ConfigError
from tailora.train.config import TrainConfig

pytestmark = pytest.mark.slow  # reads the whole source


def test_every_message_that_names_a_setting_says_its_cause_and_its_remedy() -> None:
    assert len(messages()) > 200
    lacking = [f"{each.file}:{each.line}: {each.text}" for each in messages() if not (each.cause and each.remedy)]
    assert not lacking, "\n".join(lacking)


@pytest.mark.parametrize(
    "settings",
    [
        {"streaming": True},
        {"class_weights": {"a": 1.0}},
        {"method": "full", "r": 8},
        {"fsdp_offload_params": True},
        {"optim": "adamw_8bit", "target_r": 4},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_catalogue_has_what_a_run_says(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig(**settings)
    found = {each.text for each in messages()}
    said = {line.removeprefix("  - ") for line in str(error.value).splitlines() if not line.endswith("problems:")}
    assert said <= {text.replace("NAMES", "r") for text in found}


def test_the_catalogue_follows_variables_lists_and_functions() -> None:
    texts = {each.text for each in messages()}
    assert "target_r = TARGET_R is above r = R, the rank at the start: lower it, or raise r" in texts  # a ValueError
    assert any(text.startswith("--gate TEXT: write METRIC<NUMBER") for text in texts)  # a list of problems
    assert any("--quantize nf4" in text and text.startswith("out of memory before the first step") for text in texts)


def test_a_message_without_a_remedy_is_seen() -> None:
    message = Message("--data FILE cannot be read: ERROR", "DataError", "x.py", 1, ("--data",))
    assert (message.cause, message.remedy) == ("--data FILE cannot be read: ERROR", "")
    message = Message("r = R is above LIMIT; take 1..LIMIT", "ConfigError", "x.py", 1, ("r",))
    assert (message.cause, message.remedy) == ("r = R is above LIMIT", "take 1..LIMIT")


def test_plain_words_are_settings_only_with_a_value() -> None:
    known = {"data", "r", "target_modules"}
    assert named_settings("the data holds no row for target_modules", known) == ("target_modules",)
    assert named_settings("data FILE: no row; r = R", known) == ("data", "r")
    assert named_settings("give --eval-data", known) == ("--eval-data",)


def test_every_setting_of_a_run_is_in_the_table_of_values() -> None:
    table = accepted_values(TrainConfig)
    assert all(f"| `{name}` |" in table for name in TrainConfig.model_fields)
    assert "| `r` | a whole number from 1 below 2,147,483,648 | `16` |" in table
