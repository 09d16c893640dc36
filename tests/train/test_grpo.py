"""Reinforcement learning: the losses of TRL's trainers, advantages, and runs whose reward rises."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import chat_model, chat_tokenizer

from tailora.kernels.loss import OWN
from tailora.train.grpo import GRPO, ScoredCompletion
from tailora.train.loss import BatchLayout, make_batch
from tailora.train.step import Step

LAYOUT = BatchLayout(False, OWN, 0)
PROMPT, LONGEST = 5, 7


def completions(step: int, model: Any, masked: int | None = None) -> list[ScoredCompletion]:
    """Returns four completions of different lengths, sampled by a slightly different model. masked: is not trained."""
    random = np.random.default_rng(step)
    examples = list[ScoredCompletion]()
    for length in (LONGEST, 3, 5, 1):
        ids = random.integers(300, size=PROMPT + length).astype(np.int32)
        example = ScoredCompletion.of_text(ids, np.arange(len(ids)) >= PROMPT)
        logits = model(torch.tensor(ids[None].astype(np.int64))).logits[0, PROMPT - 1 : -1] / 0.7
        old = logits.log_softmax(-1).gather(1, torch.tensor(ids[PROMPT:, None].astype(np.int64)))[:, 0]
        old = old.detach().numpy() + random.normal(0, 0.3, length)
        reference = old + random.normal(0, 0.3, length)
        advantage = random.normal() if len(examples) != masked else None
        of_tokens = {"sampled": old.tolist(), "old": old.tolist(), "reference": reference.tolist()}
        examples.append(replace(example, advantage=advantage, **of_tokens))
    return examples


def inputs_of_trl(examples: list[ScoredCompletion]) -> dict[str, Any]:
    rows, lengths = len(examples), [example.supervised for example in examples]
    is_masked = [example.advantage is None for example in examples]
    inputs: dict[str, Any] = {
        "prompt_ids": torch.tensor(np.stack([e.input_ids[:PROMPT] for e in examples]).astype(np.int64)),
        "prompt_mask": torch.ones(rows, PROMPT, dtype=torch.long),
        "completion_ids": torch.zeros(rows, LONGEST, dtype=torch.long),
        "completion_mask": torch.zeros(rows, LONGEST, dtype=torch.long),
        "advantages": torch.tensor([e.advantage or 0.0 for e in examples]),
        "old_per_token_logps": torch.zeros(rows, LONGEST),
        "ref_per_token_logps": torch.zeros(rows, LONGEST),
        "num_items_in_batch": torch.tensor(sum(n for n, masked in zip(lengths, is_masked, strict=True) if not masked)),
    }
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        inputs["completion_ids"][row, :length] = torch.tensor(example.input_ids[PROMPT:].astype(np.int64))
        inputs["completion_mask"][row, :length] = not is_masked[row]
        inputs["old_per_token_logps"][row, :length] = torch.tensor(example.old)
        inputs["ref_per_token_logps"][row, :length] = torch.tensor(example.reference)
    inputs["old_logps"] = inputs["old_per_token_logps"].sum(1)
    return inputs


@pytest.mark.trainers
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("loss", "beta", "masked"),
    [
        *[("grpo", 0.0, None), ("grpo", 0.1, None), ("dr_grpo", 0.0, None), ("dapo", 0.1, None), ("rloo", 0.0, None)],
        *[("grpo", 0.1, 1), ("dapo", 0.1, 1)],
    ],
)
def test_ten_steps_are_those_of_trl(loss: str, beta: float, masked: int | None, tmp_path: Path) -> None:
    import trl

    kind = "RLOO" if loss == "rloo" else "GRPO"
    options: dict[str, Any] = {} if loss == "rloo" else {"loss_type": loss, "epsilon_high": 0.28}
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=LONGEST,
        temperature=0.7,
        beta=beta,
        report_to=[],
        use_cpu=True,
        bf16=False,
        **options,
    )
    theirs = chat_model()
    theirs.save_pretrained(tmp_path)  # TRL loads the reference model from there
    theirs.config._name_or_path = str(tmp_path)
    trainer = getattr(trl, f"{kind}Trainer")(
        theirs,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 4}),
        processing_class=chat_tokenizer(["a"], eos_token="<|im_end|>", pad_token="<|endoftext|>"),
    )
    trainer.current_gradient_accumulation_steps = 1
    ours = chat_model()
    high = 0.2 if loss == "rloo" else 0.28
    task = GRPO(loss, beta, 0.2, high, temperature=0.7, max_completion_length=LONGEST)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in (theirs, ours)]
    for step in range(10):
        examples = completions(step, ours, masked)
        losses = task.outputs(ours, make_batch(examples, LAYOUT, ours.device, task), LAYOUT).losses
        mine = losses.sum() / sum(map(task.divisor, examples))
        other = trainer._compute_loss(theirs, inputs_of_trl(examples))
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        for optimizer, value in zip(optimizers, (other, mine), strict=True):
            optimizer.zero_grad()
            value.backward()
        for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert (q.grad - p.grad).norm() <= 1e-5 * p.grad.norm(), name
        for optimizer in optimizers:
            optimizer.step()


def test_a_rank_whose_completions_are_all_masked_adds_nothing_to_the_divisor() -> None:
    example = ScoredCompletion.of_text(np.arange(4, dtype=np.int32), np.arange(4) >= 2)
    for advantage, divisor in ((None, 0), (1.0, 2)):
        examples = [replace(example, advantage=advantage, sampled=[0.0, 0.0])]
        assert Step.of([examples], examples, GRPO("dapo")).divisor == divisor
