"""What is kept when the numbers break, and who may write where."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tailora.errors import ConfigError, DivergedError
from tailora.train.run_log import lock
from tailora.train.trainer import run


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"learning_rate": 1e38, "max_steps": 1, "validation_split": 0}, "left weights that are not finite"),
        ({"learning_rate": 1e25, "eval_steps": 1, "max_steps": 2}, "held-out loss after it is nan"),
        ({"learning_rate": 1e25, "max_steps": 1}, "held-out loss after it is nan"),
    ],
)
def test_the_last_good_adapter_is_kept(settings: Any, changes: dict[str, Any], cause: str) -> None:
    config = settings(warmup_ratio=0, lr_scheduler_type="constant", max_grad_norm=1e9, **changes)
    with pytest.raises(DivergedError, match=cause):
        run(config)
    tensors = load_file(Path(config.output_dir) / "adapter" / "adapter_model.safetensors")
    assert tensors
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_folder_that_another_run_writes_to_is_refused(settings: Any) -> None:
    config = settings(max_steps=1)
    Path(config.output_dir).mkdir(parents=True)
    with lock(Path(config.output_dir)), pytest.raises(ConfigError, match="another run is writing"):
        run(config)
    run(config)
    assert (Path(config.output_dir) / "adapter").is_dir()
