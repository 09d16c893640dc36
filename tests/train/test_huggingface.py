"""A LoRAModel in trainers of transformers and TRL."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import chat_model, chat_tokenizer, tiny_model
from torch import nn
from transformers import Trainer, TrainingArguments

from tailora import LoRAConfig, LoRAModel
from tailora.errors import ConfigError
from tailora.train.huggingface import adapting

KEPT = {"adapter_model.safetensors", "adapter_config.json", "README.md", "training_args.bin", "trainer_state.json"}
CONFIGS: dict[str, LoRAConfig] = {
    "plain": LoRAConfig(r=4, lora_dropout=0.2),
    "everything": LoRAConfig(r=4, learn_scaling=True, use_dora=True, modules_to_save=["lm_head"]),
    "start": LoRAConfig(r=4, init_lora_weights="pissa"),
}


def rows(count: int = 16) -> Dataset:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    ids = torch.randint(3, 40, (count, 8), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row, "note": "not for the model"} for row in ids])


def trainer(folder: Path, config: LoRAConfig = CONFIGS["plain"], **settings: Any) -> Any:
    torch.manual_seed(0)
    arguments = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "seed": 0}
    arguments |= {"per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    return adapting(Trainer)(
        model=LoRAModel(chat_model(), config),
        args=TrainingArguments(output_dir=str(folder), **{**arguments, **settings}),
        train_dataset=rows(),
        eval_dataset=rows(4),
    )


def numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.lora_layers.state_dict().items()}


def losses(trained: Any) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("plain", "start")), "everything"]
)
@pytest.mark.slow
def test_a_checkpoint_holds_the_adapter_alone_and_a_resumed_run_ends_like_a_whole_one(
    name: str, tmp_path: Path
) -> None:
    config = CONFIGS[name]
    whole = trainer(tmp_path / "whole", config)
    assert type(whole) is adapting(Trainer)
    before = {name: value.clone() for name, value in whole.model.base_model.state_dict().items()}
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    after = whole.model.base_model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    files = {path.name for path in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert files >= KEPT
    assert not any(name.startswith("model") for name in files)

    resumed = trainer(tmp_path / "whole", config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for path, value in numbers(resumed.model).items():
        torch.testing.assert_close(value, numbers(whole.model)[path], rtol=1e-5, atol=1e-6)
    assert losses(resumed)[-1] == pytest.approx(losses(whole)[-1], rel=1e-4)


def test_what_is_saved_is_a_peft_folder_of_the_active_adapters(tmp_path: Path) -> None:
    tuner = trainer(tmp_path)
    tuner.model.add_adapter("b", LoRAConfig(r=2, target_modules=["q_proj"]))
    tuner.model.set_adapter("b")
    tuner.train()
    tuner.save_model(str(tmp_path / "last"))
    assert [path.name for path in (tmp_path / "last").iterdir() if path.is_dir()] == ["b"]
    loaded = LoRAModel.from_pretrained(chat_model(), tmp_path / "last" / "b").eval()
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(loaded(ids).logits, tuner.model.eval()(ids).logits)
    assert loaded.adapters["default"].r == 2


def test_the_best_checkpoint_comes_back_at_the_end(tmp_path: Path) -> None:
    tuner = trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that it is not the last
    )
    tuner.train()
    best = Path(tuner.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    kept = LoRAModel.from_pretrained(chat_model(), best)
    for name, value in numbers(tuner.model).items():
        assert torch.equal(value, numbers(kept)[name])
    assert tuner.evaluate()["eval_loss"] == pytest.approx(tuner.state.best_metric, rel=1e-5)


def test_a_classifier_is_trained_by_the_loss_of_its_model(tmp_path: Path) -> None:
    base = tiny_model("LlamaForSequenceClassification", num_labels=3, pad_token_id=0, vocab_size=300)
    model = LoRAModel(base, LoRAConfig(r=4, modules_to_save=["score"]))
    data = [{"input_ids": row["input_ids"], "labels": number % 3} for number, row in enumerate(rows())]
    with torch.no_grad():
        expected = base(torch.tensor([row["input_ids"] for row in data]), labels=torch.arange(16) % 3).loss.item()
    settings = {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "per_device_train_batch_size": 16}
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, **settings)
    tuner = adapting(Trainer)(model=model, args=arguments, train_dataset=Dataset.from_list(data))
    tuner.train()
    assert losses(tuner)[0] == pytest.approx(expected, rel=1e-4)
    assert losses(tuner)[-1] < 0.9 * losses(tuner)[0]


@pytest.mark.slow
def test_reentrant_gradient_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    curves = []
    for on in (False, True):
        how = {"use_reentrant": True}
        tuner = trainer(tmp_path / str(on), activation_checkpointing=on, activation_checkpointing_kwargs=how)
        tuner.train()
        curves.append(losses(tuner))
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def test_what_cannot_be_trained_or_saved_is_refused(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True)
    with pytest.raises(ConfigError, match=r"expected LoRAModel.*, got LlamaForCausalLM"):
        adapting(Trainer)(model=chat_model(), args=arguments)
    model = LoRAModel(chat_model(), LoRAConfig(r=2))
    with pytest.raises(ConfigError, match=r"adapting\(Trainer\)\(model=lora_model"):  # it would not save the adapter
        Trainer(model=model, args=arguments, train_dataset=rows())
    model.set_adapter(None)
    with pytest.raises(ConfigError, match="no adapter to train"):
        adapting(Trainer)(model=model, args=arguments)
    assert not (tmp_path / "out").exists()
    tuner = trainer(tmp_path)
    tuner.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ConfigError, match="none of the adapter's parameters"):
        tuner.train()


def embedding_model(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    tiny_model("BertModel", vocab_size=300).save_pretrained(folder)
    chat_tokenizer(["a b"], pad_token="<|im_end|>").save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(str(folder)), Pooling(32)], device="cpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of sentence-transformers
def test_the_trainer_of_sentence_transformers_logs_the_losses_of_a_loop_and_resumes(tmp_path: Path) -> None:
    import sentence_transformers as library
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    columns = {"anchor": [f"question {i}" for i in range(8)], "positive": [f"answer {i}" for i in range(8)]}

    def start() -> tuple[LoRAModel, Any]:
        base = embedding_model(tmp_path / "base")
        torch.manual_seed(0)
        return LoRAModel(base, LoRAConfig(r=4)), MultipleNegativesRankingLoss(base)

    def tuner() -> Any:
        model, loss = start()
        settings = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 0, "report_to": []}
        args = library.SentenceTransformerTrainingArguments(
            str(tmp_path / "out"), max_steps=4, save_steps=2, logging_steps=1, use_cpu=True, **settings
        )
        return adapting(library.SentenceTransformerTrainer)(
            model=model, args=args, train_dataset=Dataset.from_dict(columns), loss=loss
        )

    whole = tuner()
    whole.train()
    model, loss = start()
    optimizer = torch.optim.AdamW(model.lora_layers.parameters(), lr=1e-2, weight_decay=0)
    expected = []
    for _ in range(4):  # every batch holds all rows, whose order makes no difference
        value = loss([model.tokenize(texts) for texts in columns.values()], None)
        expected.append(value.item())
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert expected[-1] < expected[0]
    assert losses(whole) == pytest.approx(expected, rel=1e-4)
    assert {path.name for path in (tmp_path / "out" / "checkpoint-2").iterdir()} >= KEPT
    resumed = tuner()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(expected, rel=1e-4)
    wrapper = nn.Sequential(resumed.model)  # as DDP, which the trainer puts into the loss at the first batch
    assert resumed.override_model_in_loss(resumed.loss, wrapper).model is wrapper
