"""Settings of a run that contradict each other are refused before anything is loaded, with what to do."""

import re
from typing import Any

import pytest

from tailora.errors import ConfigError
from tailora.train.config import TrainConfig

FULL = {"method": "full", "learning_rate": 1e-4}
GRPO = {"task": "grpo", "reward": ["exact_match"]}
LABELS = {"task": "sequence-classification"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"streaming": True}, "max-steps"),
        ({"early_stopping_patience": 2}, "eval-steps"),
        ({"eval_steps": 2, "validation_split": 0}, "held-out"),
        ({"adapter": "somewhere", "r": 8}, "already defines r"),
        # full fine-tuning
        ({**FULL, "r": 8}, "remove r"),
        ({**FULL, "adapter": "somewhere"}, "remove adapter"),
        ({**FULL, "quantize": "nf4"}, "remove quantize"),
        ({"method": "full"}, "needs an explicit --learning-rate"),
        # sharding
        ({"fsdp": True, "quantize": "int8"}, "--fsdp does not support --quantize int8"),
        # labels
        ({**LABELS, "streaming": True, "max_steps": 2}, "streaming"),
        ({**LABELS, "fsdp": True}, "fsdp"),
        ({**LABELS, "system": "Answer."}, "system"),
        ({**LABELS, "class_weights": {"a": 0.0}}, "above 0"),
        ({"task": "causal-lm", "class_weights": "balanced"}, "class_weights"),
        # preferences
        ({"task": "causal-lm", "beta": 0.3}, "beta: requires --task preference or grpo, got causal-lm"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing: requires --loss dpo or simpo, got ipo"),
        ({"simpo_gamma": 0.5}, "simpo_gamma: requires --loss simpo; add it, or remove simpo_gamma"),
        ({"task": "preference", "beta": 0.0}, "--beta 0: expected more than 0"),
        # rewards
        ({"reward": ["math"]}, "reward: requires --task grpo; add it, or remove reward"),
        ({"task": "grpo"}, "--task grpo needs a --reward, such as --reward rewards.py:score"),
        ({**GRPO, "loss": "dpo"}, "--task grpo does not support --loss dpo; use one of grpo, dr_grpo, dapo, rloo"),
        ({**GRPO, "loss": "rloo", "beta": 0.1}, "--loss rloo does not support --beta"),
        ({**GRPO, "num_iterations": 2, "save_steps": 3}, "--save-steps 3 must be a multiple of --num-iterations 2"),
        ({**GRPO, "fsdp": True}, "fsdp"),
        ({**GRPO, "beta": 0.1, "adapter": "old"}, "--beta compares with the base model, so it needs a new adapter"),
        ({**GRPO, "beta": 0.1, **FULL}, "--beta compares with the base model"),
        ({**GRPO, "init_lora_weights": "eva"}, "--init-lora-weights eva needs examples with replies"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        TrainConfig(**settings)


def test_no_penalty_may_be_named() -> None:
    assert TrainConfig(**GRPO, beta=0.0).beta == 0
