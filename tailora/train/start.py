"""How a run's adapter starts: from the weights by itself, from the run's own data here."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tailora.core.config import LoRAConfig
from tailora.core.init import DATA_STARTS, FROM_GRADIENT
from tailora.data.dataset import Example
from tailora.model import LoRAModel
from tailora.train.checkpoint import Checkpoint
from tailora.train.config import TrainConfig
from tailora.train.dataloader import Feed
from tailora.train.kernel_choice import Kernels, running
from tailora.train.loss import Rows, token_losses
from tailora.train.subject import Subject

PLAIN = Kernels(False, "")


def from_data(model: Subject, feed: Feed, rows: Rows, device: torch.device, batches: int) -> None:
    """Start an adapter that waits for data from the first batches of the run, the same on every rank."""
    if not isinstance(model, LoRAModel) or not model.waits_for_data:
        return
    opening = feed.opening(batches)
    supervised = sum(example.supervised for batch in opening for example in batch)

    def loss(model: Any, examples: Sequence[Example]) -> Tensor:
        return token_losses(model, examples, rows, device)[0].sum() / supervised

    with running(cast(PreTrainedModel, model.base_model), rows, PLAIN):
        model.start_from_data(opening, loss)


def words(config: TrainConfig) -> str:
    """The start, for the run's header."""
    name = config.init_lora_weights
    if config.adapter:
        return f"from {config.adapter}"
    if name not in DATA_STARTS:
        source = {"pissa": "leading directions of each weight", "olora": "QR of each weight"}.get(name)
        return f"{name}: {source}, taken off again at run time" if source else f"{name}: random A, zero B"
    seen = f"up to {config.init_batches * config.per_device_train_batch_size} examples"
    return f"{name}: {'gradient' if name in FROM_GRADIENT else 'principal components of the inputs'} over {seen}"


def resumed(config: TrainConfig, saved: Checkpoint | None) -> LoRAConfig | None:
    """The settings of the checkpoint's adapter, whose ranks may differ from those asked for; None without one.

    None, too, where the run asks for another adapter: then the two are compared, and refused, as a whole.
    """
    if saved is None or config.adapter or "adapter" not in saved.state:
        return None
    asked, then = config.model_dump(mode="json"), saved.state["run"]["settings"]
    if any(asked[name] != then.get(name) for name in ("model", *(LoRAConfig.model_fields.keys() & asked.keys()))):
        return None
    return LoRAConfig(**saved.state["adapter"])
