"""A run with AdaLoRA: its ranks are written as rank_pattern, and it goes on to the same bytes."""

import json
from pathlib import Path
from typing import Any

import pytest
from runs import assert_resumed_alike

from tailora.errors import ConfigError
from tailora.train.trainer import run

SHORT = {"max_steps": 10, "r": 6, "target_r": 2, "lora_dropout": 0.1, "eval_steps": 2, "save_steps": 3}


@pytest.mark.parametrize("stop", [pytest.param(3, marks=pytest.mark.exhaustive), 8])
@pytest.mark.slow
def test_a_run_moves_ranks_and_goes_on_to_the_same_bytes(settings: Any, tmp_path: Path, stop: int) -> None:
    whole, stopped = (settings(output_dir=str(tmp_path / name), **SHORT) for name in ("whole", "stopped"))
    result = run(whole)
    ranks = [layer.r for layer in result.model.lora_layers.values()]
    written = json.loads((Path(whole.output_dir) / "adapter" / "adapter_config.json").read_text())
    assert len(ranks) <= sum(ranks) <= 2 * len(ranks) + sum(r == 1 for r in ranks)
    assert len(set(ranks)) > 1
    assert sorted(written["rank_pattern"].values()) == sorted(r for r in ranks if r != 6)
    assert result.best_step >= 8  # of the final ranks
    assert result.eval_loss_after < result.eval_loss_before
    assert_resumed_alike(whole, stopped, stop)


def test_settings_of_adalora_need_a_target_and_fit_the_others(settings: Any) -> None:
    with pytest.raises(ConfigError, match=r"tinit: requires --target-r; set --target-r, or remove tinit"):
        settings(tinit=3)
    with pytest.raises(ConfigError, match="target_r = 9 is above r = 4"):
        run(settings(target_r=9))
    with pytest.raises(ConfigError, match="must be less than 4 steps"):
        run(settings(target_r=2, tinit=2, tfinal=2, max_steps=4))
