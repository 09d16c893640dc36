"""Batches: every example once, similar lengths together, the same loss packed and padded."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tailora.data.collate import collate_packed, collate_padded, plan_batches
from tailora.data.dataset import IGNORED, Example

LENGTHS = np.random.default_rng(0).integers(4, 200, size=1003)


PAIR = [Example.of_text(np.array(ids, np.int32)) for ids in ([1, 2, 3], [4, 5])]


@pytest.mark.parametrize("batch_size", [1, 8, 64, 2000])
@pytest.mark.parametrize("epoch", [0, 1])
def test_every_example_comes_exactly_once_an_epoch(batch_size: int, epoch: int) -> None:
    batches = plan_batches(LENGTHS, batch_size=batch_size, seed=0, epoch=epoch)
    assert sorted(np.concatenate(batches)) == list(range(len(LENGTHS)))
    assert len(batches) == -(-len(LENGTHS) // batch_size)
    assert max(map(len, batches)) <= batch_size


def flat(seed: int, epoch: int) -> list[int]:
    return np.concatenate(plan_batches(LENGTHS, batch_size=8, seed=seed, epoch=epoch)).tolist()


def test_seed_and_epoch_alone_decide_the_order() -> None:
    assert flat(0, 0) == flat(0, 0)
    assert len({tuple(flat(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_batches_hold_similar_lengths_in_random_order() -> None:
    batches = plan_batches(LENGTHS, batch_size=8, seed=0, epoch=0)
    padded = sum(LENGTHS[batch].max() * len(batch) for batch in batches)
    assert padded / LENGTHS.sum() < 1.1
    means = [LENGTHS[batch].mean() for batch in batches]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3


def test_no_examples_make_no_batches() -> None:
    assert plan_batches([], batch_size=8, seed=0, epoch=0) == []


def test_packed_documents_keep_their_own_positions_and_borders() -> None:
    packed = collate_packed(PAIR)
    assert packed["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert packed["labels"].tolist() == [[IGNORED, 2, 3, IGNORED, 5]]
    assert packed["cu_seq_lens_q"].tolist() == packed["cu_seq_lens_k"].tolist() == [0, 3, 5]
    assert packed["max_length_q"] == packed["max_length_k"] == 3
    assert {name: tensor.dtype for name, tensor in packed.items() if isinstance(tensor, torch.Tensor)} == {
        "input_ids": torch.int64,
        "position_ids": torch.int64,
        "labels": torch.int64,
        "cu_seq_lens_q": torch.int32,
        "cu_seq_lens_k": torch.int32,
    }


def test_padding_is_masked_and_not_trained() -> None:
    padded = collate_padded(PAIR, pad_id=9)
    assert padded["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert padded["labels"].tolist() == [[IGNORED, 2, 3], [IGNORED, 5, IGNORED]]


def test_packed_and_padded_batches_have_the_same_loss() -> None:
    """With logits that depend on the token alone, the summed shifted loss must not know how the batch was built."""
    table = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    losses = [
        cross_entropy(
            table[batch["input_ids"][:, :-1]].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        for batch in (collate_packed(PAIR), collate_padded(PAIR, pad_id=0))
    ]
    torch.testing.assert_close(*losses)
