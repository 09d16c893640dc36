"""A LoRAModel in trainers of TRL whose losses are not that of language modelling: preferences, rewards, generation."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import chat_model, chat_tokenizer, stir, tiny_model
from transformers import PreTrainedModel

from tailora import LoRAConfig, LoRAModel
from tailora.errors import ConfigError
from tailora.train.huggingface import ReferenceModel, adapting

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # read when TRL is imported
pytestmark = [
    pytest.mark.trainers,
    pytest.mark.filterwarnings("ignore"),  # TRL's own
]

TOKENIZER = chat_tokenizer(["yes or no"], eos_token="<|endoftext|>", pad_token="<|im_end|>")
PROMPTS = [{"prompt": f"q{number} "} for number in range(16)]
PREFERENCES = [{**row, "chosen": "yes good", "rejected": "no, a bad thing"} for row in PROMPTS]
LABELS = [{**row, "completion": "yes" if i % 2 else "no, bad", "label": bool(i % 2)} for i, row in enumerate(PROMPTS)]
TEXTS = [{"text": row["chosen"] * (1 + number % 3)} for number, row in enumerate(PREFERENCES)]
GENERATION = {"num_generations": 4, "max_completion_length": 8, "beta": 0.2}
OURS = {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "trainer_state.json"}


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in completion)) for completion in completions]


# name of the trainer -> its rows, settings and arguments
TRAINERS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "SFT": (TEXTS, {}, {}),
    "DPO": (PREFERENCES, {}, {}),
    "KTO": (LABELS, {}, {}),
    "Reward": (PREFERENCES, {}, {}),
    "GRPO": (PROMPTS, GENERATION, {"reward_funcs": vowels}),
    "RLOO": (PROMPTS, GENERATION, {"reward_funcs": vowels}),
}


def base(name: str) -> PreTrainedModel:
    if name != "Reward":
        return chat_model(pad_token_id=TOKENIZER.pad_token_id)
    ids = {"vocab_size": 300, "pad_token_id": TOKENIZER.pad_token_id}
    return tiny_model("LlamaForSequenceClassification", num_labels=1, **ids)


def lora_model(name: str, *, trained: bool = False, **settings: Any) -> LoRAModel:
    if name == "Reward":
        settings["modules_to_save"] = ["score"]
    model = LoRAModel(base(name), LoRAConfig(r=4, **settings))
    if trained:
        stir(model)
    return model


def trainer(make: Callable[[type[Any]], type[Any]], name: str, model: Any, folder: Path, **settings: Any) -> Any:
    rows, own, arguments = TRAINERS[name]
    import trl  # which takes seconds

    common = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "bf16": False}
    common |= {"per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    torch.manual_seed(0)
    return make(getattr(trl, f"{name}Trainer"))(
        model=model,
        args=getattr(trl, f"{name}Config")(output_dir=str(folder), **{**common, **own, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=TOKENIZER,
        **arguments,
    )


def logged(trained: Any) -> list[dict[str, float]]:
    """What every step has logged, without times, and without the number of tokens since the trainer was made."""
    return [
        {name: value for name, value in entry.items() if "time" not in name and name != "num_tokens"}
        for entry in trained.state.log_history
        if "loss" in entry
    ]


def same(actual: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [entry.keys() for entry in actual] == [entry.keys() for entry in expected]
    for entry, expected_entry in zip(actual, expected, strict=True):
        assert entry == pytest.approx(expected_entry, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.exhaustive if name in ("KTO", "Reward", "RLOO") else ())
        for name in TRAINERS
    ],
)
def test_what_is_logged_is_what_trl_logs_for_peft_and_a_resumed_run_goes_on(name: str, tmp_path: Path) -> None:
    """From an adapter that was trained before, so that the reference is not the base.

    DPO, KTO and reward switch dropout off; the others train without it here.
    """
    dropout = 0.5 if name in ("DPO", "KTO", "Reward") else 0.0
    model = lora_model(name, trained=True, lora_dropout=dropout)
    model.save_adapter(tmp_path / "start")
    tuner = trainer(adapting, name, model, tmp_path / "ours")
    tuner.train()
    assert len(logged(tuner)) == 4
    import peft

    theirs = peft.PeftModel.from_pretrained(base(name), str(tmp_path / "start"), is_trainable=True)
    with_peft = trainer(lambda trainer: trainer, name, theirs, tmp_path / "peft")
    with_peft.train()
    same(logged(tuner), logged(with_peft))

    checkpoint = tmp_path / "ours" / "checkpoint-2"
    files = {path.name for path in checkpoint.iterdir()}
    assert files >= OURS
    assert not any(file.startswith(("model", "default")) for file in files)
    resumed = trainer(adapting, name, lora_model(name, trained=True, lora_dropout=dropout), tmp_path / "ours")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    same(logged(resumed), logged(tuner))


@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_a_fresh_adapter_is_compared_with_the_base(name: str, tmp_path: Path) -> None:
    model = lora_model(name)
    tuner = trainer(adapting, name, model, tmp_path)
    assert [*model.adapters] == ["default"]
    tuner.train()
    first, *others = logged(tuner)
    key = "kl" if name == "GRPO" else "rewards/margins"
    assert first[key] == pytest.approx(0, abs=1e-6)
    assert all(abs(entry[key]) > 1e-4 for entry in others)
    ids = torch.arange(3, 11)[None]
    assert torch.equal(tuner.ref_model(ids).logits, base(name)(ids).logits)
    assert (model(ids).logits - base(name)(ids).logits).abs().max() > 1e-3


def test_a_trainer_of_ones_own_gets_the_reference_too(tmp_path: Path) -> None:
    import trl

    class OwnTrainer(trl.DPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    settings = trl.DPOConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    rows = {"train_dataset": Dataset.from_list(PREFERENCES), "processing_class": TOKENIZER}
    tuner = adapting(OwnTrainer)(lora_model("DPO"), None, settings, **rows)  # no ref_model, by position
    assert isinstance(tuner.ref_model, ReferenceModel)


def test_what_a_trainer_of_trl_would_do_wrong_is_refused(tmp_path: Path) -> None:
    def refused(match: str, name: str = "DPO", model: LoRAModel | None = None, **settings: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            trainer(adapting, name, model or lora_model(name), tmp_path, **settings)

    refused("TRL does not send the adapter to vLLM, so vLLM would not use it; remove use_vllm", "GRPO", use_vllm=True)
    refused("separate reference model", "GRPO", sync_ref_model=True)
    head = ["q_proj", "lm_head"]
    for name in ("DPO", "GRPO"):
        refused("lm_head has an adapter, but", name, lora_model(name, target_modules=head))
        refused("lm_head has an adapter, but", name, lora_model(name, modules_to_save=["lm_head"]))
