"""What a search varies: read from text, fitted to the run and the model, and turned into settings."""

from typing import Any

import pytest

from tailora.errors import ConfigError
from tailora.study.config import SearchConfig
from tailora.study.search_space import (
    DEFAULT,
    Range,
    first_values,
    fit_to_model,
    is_at_edge,
    read_space,
    search_axes,
    settings_of,
)
from tailora.train.config import TrainConfig


def test_a_space_is_read_from_text_lists_and_ranges() -> None:
    space = read_space(
        {"rank": "4..48", "lr": "1e-4..1e-2", "targets": ["attention", "q_proj+v_proj"], "dropout": "0..0.2"}
    )
    assert space == {
        "r": (4, 8, 16, 32, 48),
        "learning_rate": Range(1e-4, 1e-2),
        "target_modules": ("attention", "q_proj+v_proj"),
        "lora_dropout": Range(0.0, 0.2, log=False),
    }
    assert read_space({"use_dora": "true,false", "init_lora_weights": "pissa"}) == {
        "use_dora": (True, False),
        "init_lora_weights": ("pissa",),
    }


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"ranks": "4"}, "unknown setting 'ranks'; did you mean rank"),
        ({"lora_dim": "4"}, "unknown setting 'lora_dim'; use r"),
        ({"warmup_steps": "4"}, "unknown setting 'warmup_steps'; use warmup_ratio, a share"),
        ({"model": "x"}, "model cannot be searched, because it must be the same for all trials"),
        ({"beta": [0.1, 0.5]}, "beta cannot be searched"),  # the losses are not comparable
        ({"r": "0,4"}, "greater than or equal to 1"),
        ({"learning_rate": "1e-2..1e-4"}, "0.01 is not below 0.0001"),
        ({"loraplus_lr_ratio": "0..4"}, "greater than or equal to 1"),
        ({"scale": "1,2", "alpha": "8"}, "use either scale or lora_alpha"),
        ({"r": "4", "rank": "8"}, "r appears twice"),
        ({"r": []}, "expected at least one value"),
        ({"rank_pattern": "x"}, "patterns"),
        ({"use_dora": "1..3"}, "boolean"),
        ({"ranks": "4", "r": "x"}, "ranks.*valid integer"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        SearchConfig(space=space)


def test_settings_that_have_a_value_are_not_search_axes() -> None:
    assert "r" not in search_axes({}, TrainConfig(r=8))
    assert search_axes({}, TrainConfig()) == DEFAULT
    assert list(search_axes({}, TrainConfig(adapter="there"))) == ["learning_rate"]
    assert "lora_alpha" not in search_axes(read_space({"scale": "1,2"}), TrainConfig())
    with pytest.raises(ConfigError, match="set to a fixed value and also listed in --space"):
        search_axes(read_space({"r": "4,8"}), TrainConfig(r=8))
    with pytest.raises(ConfigError, match="compare"):
        search_axes({}, TrainConfig(method="full", learning_rate=1e-5))
    one = {"learning_rate": 1e-4, "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1}
    with pytest.raises(ConfigError, match="nothing to search"):
        search_axes({}, TrainConfig(**one, loraplus_lr_ratio=2))


def test_a_trial_has_the_settings_that_its_words_mean() -> None:
    groups = {"attention": ["q_proj", "o_proj"], "mlp": ["up_proj"], "largest_r": 16}
    train = TrainConfig(r=8)
    assert settings_of({"scale": 2.0, "target_modules": "attention"}, groups, train) == {
        "lora_alpha": 16.0,
        "target_modules": ["q_proj", "o_proj"],
    }
    assert settings_of({"scale": 2.0, "r": 4}, groups, train)["lora_alpha"] == 8.0
    assert settings_of({"target_modules": "q_proj+v_proj"}, groups, train)["target_modules"] == ["q_proj", "v_proj"]
    assert settings_of({"target_modules": "all-linear"}, groups, train)["target_modules"] == "all-linear"
    word = {"target_modules": "language-model"}
    assert settings_of(word, groups, train) == word
    assert settings_of({"scale": 2.0, "r": 4}, groups, TrainConfig(use_rslora=True))["lora_alpha"] == 4.0


def test_a_search_begins_with_the_settings_of_the_run_or_the_nearest() -> None:
    space = read_space({"r": "2,4", "lr": "1e-3..1e-2", "targets": "mlp,attention", "dropout": "0,0.1"})
    begins = {"r": 4, "learning_rate": 1e-3, "target_modules": "mlp", "lora_dropout": 0.0}
    assert first_values(space, TrainConfig(learning_rate=1e-4)) == begins
    scale = read_space({"scale": "0.5..20"})
    assert first_values(scale, TrainConfig(r=16, lora_alpha=32, use_rslora=True)) == {"scale": 8.0}
    assert read_space({"temperature": "0.7,1.3"}) == {"temperature": (0.7, 1.3)}


def test_ranks_that_the_model_has_no_room_for_are_left_out_or_refused() -> None:
    groups = {"attention": ["q"], "mlp": ["up"], "largest_r": 8}
    axes, notes = fit_to_model(DEFAULT, groups, {})
    assert axes["r"] == (2, 4, 8)
    assert "ranks up to 8" in notes[0]
    given = read_space({"r": "4,64"})
    with pytest.raises(ConfigError, match=r"r = 64.*up to 8"):
        fit_to_model({**DEFAULT, **given}, groups, given)
    assert fit_to_model(DEFAULT, {"largest_r": 99}, {})[0]["target_modules"] == ("all-linear",)


def test_the_edge_of_a_range_is_known() -> None:
    assert is_at_edge(Range(1e-4, 1e-2), 9e-3)
    assert is_at_edge(Range(1e-4, 1e-2), 1.1e-4)
    assert not is_at_edge(Range(1e-4, 1e-2), 1e-3)
    assert not is_at_edge((2, 4), 2)
