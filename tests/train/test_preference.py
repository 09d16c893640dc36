"""Training on preferences: equal to TRL, whatever the layout; from the rows to the report."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import ONE_PASS, changed, losses
from tiny import chat_model
from tiny_run import write_rows
from torch import Tensor

from tailora.core.config import LoRAConfig
from tailora.data.dataset import Example, Examples, with_other_replies
from tailora.errors import CheckpointError, ConfigError, DataError
from tailora.evaluation.statistics import describe_preferences, preference_metrics
from tailora.kernels.loss import FROZEN, WHOLE
from tailora.model import LoRAModel
from tailora.report.blocks import Table
from tailora.report.files import read_page
from tailora.report.pages.train import write_train_report
from tailora.train import events
from tailora.train.dataloader import TrainingData, dataset_steps
from tailora.train.loss import BatchLayout, Evaluation, ModelWithLoss, Reference, Task, evaluate, make_batch
from tailora.train.preference import KTO, LOSSES, Pairs
from tailora.train.step import StepShape
from tailora.train.trainer import accumulate_gradients, run

CPU = torch.device("cpu")
BETA = 0.2
STEPS, BATCH = 10, 3


def sequence(random: np.random.Generator, prompt: Sequence[int]) -> Example:
    reply = random.integers(300, size=random.integers(2, 9))
    ids = np.array([*prompt, *reply], dtype=np.int32)
    return Example.of_text(ids, np.arange(len(ids)) >= len(prompt))


def pairs(count: int = STEPS * BATCH) -> Examples:
    random = np.random.default_rng(0)
    prompts = [random.integers(300, size=random.integers(3, 12)).tolist() for _ in range(count)]
    return Examples.of(Example.of_two(sequence(random, prompt), sequence(random, prompt)) for prompt in prompts)


def feedback(count: int = STEPS * BATCH) -> Examples:
    """As TRL pairs them: the other reply is that of the example before, within a batch."""
    random, examples = np.random.default_rng(1), []
    for _ in range(count // BATCH):
        prompts = [random.integers(300, size=random.integers(3, 12)).tolist() for _ in range(BATCH)]
        own = [sequence(random, prompt) for prompt in prompts]
        for i, prompt in enumerate(prompts):
            ids = np.array([*prompt, *own[i - 1].input_ids[len(prompts[i - 1]) :]], dtype=np.int32)
            other = Example.of_text(ids, np.arange(len(ids)) >= len(prompt))
            examples.append(Example.of_two(own[i], other, np.array([float(i % 2 == 0)])))
    return Examples.of(examples)


def lora_model() -> LoRAModel:
    model = LoRAModel(chat_model(initializer_range=0.2), LoRAConfig(r=4))
    torch.manual_seed(1)
    for layer in model.lora_layers.values():
        torch.nn.init.normal_(layer.lora_A, std=0.1)
    return model


def with_reference(task: Any, model: LoRAModel, examples: Examples, layout: BatchLayout) -> Any:
    """Returns the task with the log-probabilities of the model as it is."""
    reference = Reference()
    scores = evaluate(model, examples, layout=layout, token_budget=64, task=task).scores
    assert scores is not None
    reference.add(examples, scores[:, :2])
    return replace(task, reference=reference)


def gradient_of(model: LoRAModel) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.lora_layers.parameters() if p.grad is not None])


def test_equal_rewards_are_half_right() -> None:
    task = Pairs("dpo", BETA)
    scores = np.array([[0, 0, chosen, rejected] for chosen, rejected in ((2.0, 1.0), (1.0, 1.0), (1.0, 2.0))])
    hits = task.hits(pairs(3), Evaluation(np.zeros(3), np.ones(3, np.int64), scores))
    assert hits is not None
    assert hits.tolist() == [1.0, 0.5, 0.0]


# ---- The reference point of KTO


def reference_point(
    model: LoRAModel,
    examples: Examples,
    *,
    weights: Sequence[float],
    of_reference: float,
    other_rank: Sequence[float] = (0, 0),
) -> float:
    """z0 of a step with a batch of each weight, for replies whose log-probability was `of_reference` before.

    other_rank: sum and number of the log-ratios of another rank.
    """
    reference = Reference()
    reference.add(examples, np.full((len(examples), 2), of_reference))
    task, layout = KTO(BETA, reference), BatchLayout(packed=False, loss=WHOLE, pad_id=0)
    sizes = np.array_split(np.arange(len(examples)), len(weights))
    batches = [
        replace(make_batch([examples[int(i)] for i in part], layout, CPU, task), weight=weight)
        for part, weight in zip(sizes, weights, strict=True)
    ]
    completed = task.complete_step(model, batches, layout, lambda sums: sums + torch.tensor(other_rank))
    (point,) = {float(batch.extras["reference_point"]) for batch in completed}
    return point


def test_the_reference_point_of_kto_is_the_mean_of_the_counted_batches_and_at_least_0() -> None:
    model, examples = lora_model(), feedback(6)
    half = Examples.of(examples[i] for i in range(3))
    scores = evaluate(model, examples, layout=BatchLayout(False, WHOLE, 0), token_budget=64, task=KTO(BETA)).scores
    assert scores is not None
    others = scores[:, 1]  # log-probabilities of the other replies
    assert reference_point(model, examples, weights=[1, 1], of_reference=-99) == pytest.approx(others.mean() + 99)
    assert reference_point(model, examples, weights=[1, 0], of_reference=-99) == pytest.approx(others[:3].mean() + 99)
    assert reference_point(model, half, weights=[1], of_reference=-99) == pytest.approx(others[:3].mean() + 99)
    assert reference_point(model, examples, weights=[1, 1], of_reference=99) == 0
    both = reference_point(model, half, weights=[1], of_reference=-99, other_rank=(5.0, 2.0))
    assert both == pytest.approx((others[:3].sum() + 3 * 99 + 5) / 5)


def test_the_reference_point_of_kto_is_computed_without_dropout() -> None:
    model, examples = lora_model(), feedback(6)
    for layer in model.lora_layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        layer.lora_dropout = 0.5
    expected = reference_point(model.eval(), examples, weights=[1], of_reference=-99)
    assert reference_point(model.train(), examples, weights=[1], of_reference=-99) == expected
    assert model.training


def test_the_reference_point_of_an_evaluation_is_at_least_0() -> None:
    task, examples = KTO(BETA), feedback(3)
    # columns: reply, other, reward, log-ratio of the other reply, whether it is wanted
    scores = np.array([[-1.0, -1.0, 0.2, ratio, 1.0] for ratio in (-5.0, -4.0, -3.0)])
    evaluation = task.evaluation(examples, np.zeros(3), scores)
    assert evaluation.sums == pytest.approx(1 - 1 / (1 + np.exp(-0.2)))


# ---- TRL


def ids_of(example: Example) -> dict[str, Any]:
    """What TRL's collator reads."""
    own, other = example.sequences
    start = int(np.argmax(own.labels != -100))
    prompt, first, second = (
        ids.tolist() for ids in (own.input_ids[:start], own.input_ids[start:], other.input_ids[start:])
    )
    if example.target is None:
        return {"prompt_ids": prompt, "chosen_ids": first, "rejected_ids": second}
    label = bool(example.target[0])
    return {"prompt_ids": prompt, "completion_ids": first, "KL_completion_ids": second, "label": label}


def trl_trainer(kind: str, folder: Path, adapter_folder: Path, **settings: Any) -> Any:
    """A trainer of TRL around PEFT's model with the adapter in this folder."""
    import peft
    import trl
    from datasets import Dataset
    from tiny import chat_tokenizer

    model = peft.PeftModel.from_pretrained(chat_model(initializer_range=0.2), adapter_folder, is_trainable=True)
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), report_to=[], use_cpu=True, beta=BETA, disable_dropout=False, bf16=False, **settings
    )
    row: dict[str, Any] = {"prompt": "a b", "chosen": " c", "rejected": " d"}
    if kind == "KTO":
        row = {"prompt": "a b", "completion": " c", "label": True}
    tokenizer = chat_tokenizer(["a b c d"], eos_token="<|im_end|>", pad_token="<|im_end|>")
    return getattr(trl, f"{kind}Trainer")(
        model=model, args=config, train_dataset=Dataset.from_list([row] * 4), processing_class=tokenizer
    )


TRL_CASES: dict[str, tuple[str, Callable[[], Examples], Task, dict[str, Any]]] = {
    "dpo": ("DPO", pairs, Pairs("dpo", BETA), {"loss_type": ["sigmoid"]}),
    "ipo": ("DPO", pairs, Pairs("ipo", BETA), {"loss_type": ["ipo"]}),
    "kto": ("KTO", feedback, KTO(BETA), {"per_device_train_batch_size": 3, "train_sampling_strategy": "sequential"}),
}


@pytest.mark.trainers
@pytest.mark.filterwarnings("ignore")  # TRL's and PEFT's own
@pytest.mark.parametrize("case", TRL_CASES)
def test_ten_steps_equal_those_of_trl(case: str, tmp_path: Path) -> None:
    kind, make_examples, task, settings = TRL_CASES[case]
    model, layout, examples = lora_model(), BatchLayout(True, FROZEN, 0), make_examples()
    model.save_adapter(tmp_path / "adapter")
    trainer = trl_trainer(kind, tmp_path / "trl", tmp_path / "adapter", **settings)
    task = with_reference(task, model, examples, layout)
    forward, theirs = ModelWithLoss(model.train(), layout, task), trainer.model.train()
    paths = ["base_model.model." + path.replace("/", ".") for path in model.lora_layers]
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (model, theirs)]
    for step in range(STEPS):
        batch = [examples[i] for i in range(step * BATCH, (step + 1) * BATCH)]
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = trainer.compute_loss(theirs, trainer.data_collator([ids_of(example) for example in batch]))
        loss.backward()
        made = task.complete_step(model, [make_batch(batch, layout, CPU, task)], layout, lambda sums: sums)
        own = accumulate_gradients(forward, made, len(batch))
        assert float(own) == pytest.approx(float(loss), rel=1e-5, abs=1e-6)
        factors = [getattr(theirs.get_submodule(path), name).default for path in paths for name in ("lora_A", "lora_B")]
        actual, expected = gradient_of(model), torch.cat([factor.weight.grad.flatten() for factor in factors])
        assert float((actual - expected).norm() / expected.norm()) < 1e-5
        for optimizer in optimizers:
            optimizer.step()
    assert float(own) != pytest.approx(float(np.log(2)), abs=0.01)  # it has learned something


# ---- One result in every layout


@pytest.mark.parametrize("loss", [*LOSSES, "kto"])
def test_packed_and_padded_batches_and_parts_give_one_gradient(loss: str) -> None:
    examples = feedback(6) if loss == "kto" else pairs(6)
    task: Any = KTO(BETA) if loss == "kto" else Pairs(loss, BETA, sft_weight=0.3)
    model, gradients = lora_model(), []
    task = with_reference(task, model, examples, BatchLayout(False, WHOLE, 0))
    for layer in model.lora_layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    for packed, form, parts in ((True, FROZEN, [6]), (False, WHOLE, [6]), (True, FROZEN, [1, 3, 2])):
        layout = BatchLayout(packed, form, 0)
        bounds = pairwise(np.cumsum([0, *parts]))
        batches = [make_batch([examples[i] for i in range(*ends)], layout, CPU, task) for ends in bounds]
        model.zero_grad()
        made = task.complete_step(model, batches, layout, lambda sums: sums)
        accumulate_gradients(ModelWithLoss(model, layout, task), made, 6)
        gradients.append(gradient_of(model))
    for other in gradients[1:]:
        assert float((other - gradients[0]).norm() / gradients[0].norm()) < 1e-4


@pytest.mark.parametrize("count", [2, 9])
def test_each_reply_is_the_other_reply_once(count: int) -> None:
    own = Examples.of(replace(example.sequences[0], target=np.ones(1)) for example in pairs(count))
    combined = with_other_replies(own, seed=0, max_length=30)

    def reply(example: Example) -> bytes:
        return example.input_ids[example.labels != -100].tobytes()

    assert [example.sequences[0].hash for example in combined] == [replace(e, target=None).hash for e in own]
    assert sorted(reply(e.sequences[1]) for e in combined) == sorted(reply(e) for e in own)
    assert all(reply(e.sequences[1]) != reply(e.sequences[0]) for e in combined)
    for example in combined:
        first, second = (part.input_ids[part.labels == -100].tolist() for part in example.sequences)
        assert first == second  # the prompt

    # a long prompt with a long reply of another row could have more positions than the model has
    longest = int(own.lengths.max())
    others = [example.sequences[1] for example in with_other_replies(own, seed=0, max_length=longest)]
    assert max(len(other.input_ids) for other in others) == longest
    assert all(other.supervised for other in others)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_batches_hold_no_float64_which_mps_lacks(loss: str) -> None:
    examples, reference = feedback(3) if loss == "kto" else pairs(3), Reference()
    reference.add(examples, np.ones((3, 2)))
    task: Any = KTO(BETA, reference) if loss == "kto" else Pairs(loss, BETA, reference=reference)
    batch = make_batch([*examples], BatchLayout(True, FROZEN, 0), CPU, task)
    parts = [batch, *([batch.other] if batch.other else [])]
    tensors = [tensor for part in parts for tensor in part.extras.values()]
    assert not [tensor for tensor in tensors if tensor.dtype == torch.float64]


def training_data(examples: Examples, task: Task) -> TrainingData:
    """All examples in one forward."""
    shape = StepShape(len(examples), 1, task=task)
    return TrainingData(ONE_PASS, None, None, partial(dataset_steps, examples, shape), 1, examples, shape)


def test_what_kto_computes_without_gradients_counts_as_neither_trained_nor_kept_in_memory() -> None:
    examples = feedback(6)
    own = [example.sequences[0] for example in examples]
    data = training_data(examples, KTO(BETA))
    assert data.largest_tokens == sum(len(sequence.input_ids) for sequence in own)
    assert next(data.steps(0)).supervised == sum(sequence.supervised for sequence in own)


def test_the_longest_sequence_of_a_pair_may_be_the_rejected_one() -> None:
    """The model is tried on it."""
    random = np.random.default_rng(0)
    short, long = sequence(random, [1, 2]), sequence(random, range(3, 60))
    assert training_data(Examples.of([Example.of_two(short, long)]), Pairs("dpo", BETA)).longest.hash == long.hash


# ---- Runs

LONG = {"num_train_epochs": 2, "eval_steps": 4, "save_steps": 4, "learning_rate": 5e-3}


def test_a_run_on_pairs_begins_at_log_2_and_learns_the_order(settings: Any, pairs_file: Path) -> None:
    config = settings(data=str(pairs_file), **LONG)
    result = run(config)
    folder = Path(config.output_dir)
    assert losses(config)[:2] == [(0, pytest.approx(np.log(2), abs=1e-6)), (1, pytest.approx(np.log(2), abs=1e-5))]
    report = write_train_report(folder)
    numbers = report["result"]
    assert (numbers["eval_accuracy_before"], numbers["eval_margin_before"]) == (0.5, 0)
    assert numbers["eval_accuracy_after"] > 0.8
    assert numbers["eval_margin_after"] > 0.1
    assert numbers["eval_loss_after"] == result.eval_loss_after < 0.6
    assert {metric["name"] for metric in report["metrics"]} == {"accuracy", "margin", "likelier", "chosen", "rejected"}
    assert "right order" in report["verdict"]
    blocks = {section.title: section.blocks for section in read_page(folder).sections}
    (table,) = blocks["Metrics"]
    assert isinstance(table, Table)
    assert all(f"{name}: " in table.note for name, *_ in table.rows)  # what each means
    rows = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    changes = [row["scores_after"]["chosen"] - row["scores_before"]["chosen"] for row in rows]
    rewards = [row["scores_after"]["chosen_reward"] for row in rows]
    assert rewards == pytest.approx([0.1 * change for change in changes], abs=1e-5)


@pytest.mark.parametrize(
    "loss", ["orpo", "kto", *(pytest.param(loss, marks=pytest.mark.exhaustive) for loss in ("ipo", "simpo"))]
)
def test_runs_with_the_other_losses_learn_the_order(
    loss: str, settings: Any, pairs_file: Path, feedback_file: Path
) -> None:
    data = feedback_file if loss == "kto" else pairs_file
    config = settings(data=str(data), loss=loss, num_train_epochs=1, learning_rate=1e-2)
    result = run(config)
    numbers = write_train_report(Path(config.output_dir))["result"]
    assert result.to_dict()["eval_accuracy_after"] == pytest.approx(numbers["eval_accuracy_after"])
    assert numbers["eval_accuracy_after"] > max(0.6, numbers["eval_accuracy_before"] - 0.1)
    assert numbers["eval_margin_after"] > numbers["eval_margin_before"]
    assert (Path(config.output_dir) / "reference.npz").exists() == (loss in ("ipo", "kto"))


def test_what_the_model_was_is_the_reference_of_an_adapter_that_is_trained_further(
    settings: Any, tmp_path: Path, pairs_file: Path
) -> None:
    first = settings(data=str(pairs_file), output_dir=str(tmp_path / "first"), max_steps=3, learning_rate=5e-3)
    run(first)
    further = {"adapter": f"{first.output_dir}/adapter", "r": 16, "lr_scheduler_type": "constant", "warmup_ratio": 0}
    steps = {"save_steps": 2, "max_steps": 4}
    second = settings(output_dir=str(tmp_path / "second"), data=str(pairs_file), **further, **steps)
    run(second)
    assert losses(second)[0] == (0, pytest.approx(np.log(2), abs=1e-6))
    longer = changed(second, max_steps=20, resume_from_checkpoint=f"{second.output_dir}/checkpoint-2")
    with pytest.raises(CheckpointError, match="so their reference values are missing"):
        run(longer)


def test_full_fine_tuning_compares_with_the_original_weights_and_takes_them_along_to_another_folder(
    settings: Any, tmp_path: Path, pairs_file: Path
) -> None:
    common = {"data": str(pairs_file), "method": "full", "r": 16, **LONG, "learning_rate": 1e-3}
    first, second = (settings(output_dir=str(tmp_path / name), **common) for name in ("first", "second"))
    run(first)
    assert losses(first)[0] == (0, pytest.approx(np.log(2), abs=1e-6))
    assert write_train_report(tmp_path / "first")["result"]["eval_accuracy_after"] > 0.8
    run(changed(second, resume_from_checkpoint=f"{first.output_dir}/checkpoint-8"))
    run(changed(second, resume_from_checkpoint="latest"))
    assert losses(second)[-1] == losses(first)[-1]


def test_ctrl_c_while_the_reference_is_computed_ends_the_run_at_once(settings: Any, pairs_file: Path) -> None:
    done = list[int]()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.EvaluationProgress):
            done.append(event.done)
            os.kill(os.getpid(), signal.SIGINT)

    config = settings(data=str(pairs_file), **LONG)
    with pytest.raises(KeyboardInterrupt):
        run(config, on_event=on_event)
    assert len(done) == 1
    assert not (Path(config.output_dir) / "adapter").exists()


# ---- Mistakes

PAIR = {"prompt": "a", "chosen": " b", "rejected": " c"}


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            [{"prompt": "a", "chosen": "b"}],
            {"task": "preference"},
            r"of --task preference(.|\n)*preference \(chosen, rej",
        ),
        ([{"prompt": "a", "chosen": " b", "rejected": " b"}], {}, "chosen and rejected are the same"),
        ([{"prompt": "a", "chosen": " b", "rejected": ""}], {}, "rejected is empty"),
        ([{"chosen": "one", "rejected": "two"}], {}, "do not begin with the same prompt"),
        (
            [{"prompt": "a", "completion": "b", "label": 3}],
            {"task": "preference"},
            "label: expected true .desirable. or false, got 3",
        ),
        ([PAIR], {"loss": "kto"}, "--loss kto needs rows with prompt, completion and label"),
        (
            [{"prompt": "a", "completion": "b", "label": label} for label in (True, True, False)],
            {"loss": "ipo"},
            "needs rows with chosen and rejected",
        ),
        ([{"prompt": "a", "completion": "b"}], {"loss": "dpo"}, "loss: only applies to preferences"),
        ([{"prompt": "a", "completion": "b", "label": 1}] * 2, {}, "all rows have the same label; add others"),
        ([PAIR], {"streaming": True, "max_steps": 2}, "remove --streaming"),
    ],
)
def test_rows_and_settings_that_do_not_fit_are_refused(
    rows: list[dict[str, Any]], changes: dict[str, Any], message: str, settings: Any, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises((DataError, ConfigError), match=message):
        run(settings(data=str(file), validation_split=0, **changes))


def test_a_share_of_all_pairs_is_not_certain() -> None:
    rows = [{"chosen": -1.0, "rejected": -2.0, "chosen_reward": 1.0, "rejected_reward": 0.0}] * 9
    for name in ("accuracy", "likelier"):
        value, low, high = preference_metrics(rows)[name]
        assert (value, high) == (1, 1)
        assert low == pytest.approx(9 / (9 + 1.96**2), abs=1e-3)  # Wilson's


def test_ties_count_as_half() -> None:
    logs = {"chosen": -1.0, "rejected": -2.0, "rejected_reward": 0.0}
    rows = [{**logs, "chosen_reward": reward} for reward in (0.0, 1.0, -1.0)]
    assert preference_metrics(rows)["accuracy"].value == 0.5


def test_the_margin_of_single_replies_is_the_difference_of_two_means() -> None:
    rows = [{"reply": -1.0, "reward": r, "desirable": d} for r, d in ((3.0, 1.0), (1.0, 1.0), (-4.0, 0.0))]
    metrics = preference_metrics(rows)
    assert metrics["margin"].value == pytest.approx(2 - -4)
    assert metrics["accuracy"].value == 1
    assert describe_preferences(metrics, metrics).startswith("100% of the rewards have the right sign")
