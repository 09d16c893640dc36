"""The loss on data that was not trained on, of whatever adapters are active when it is asked for."""

from collections.abc import Callable
from typing import Any

from tailora.data.demo import resolve
from tailora.data.prepare import prepare
from tailora.model import LoRAModel
from tailora.train.config import TrainConfig
from tailora.train.dataloader import CPU_TOKENS
from tailora.train.evaluate import Evaluation, evaluate
from tailora.train.setup import choose_rows


def held_out(
    config: TrainConfig, model: LoRAModel, tokenizer: Any, note: Callable[[str], None]
) -> Callable[[], Evaluation]:
    """A function that evaluates `model` on all of `config.data`, example by example. `note` hears what was decided.

    'demo' is the demo's held-out part. Raises DataError with all that is wrong with the data.
    """
    prepared = prepare(
        resolve(config.data, "eval_data"),
        tokenizer,
        field=config.field,
        max_length=config.max_length,
        validation_split=0.0,
        embedding_rows=model.get_input_embeddings().weight.shape[0],
    )
    rows = choose_rows(config, model, tokenizer, note)
    on_cpu = next(model.parameters()).device.type == "cpu"
    budget = CPU_TOKENS if on_cpu else 8 * CPU_TOKENS
    return lambda: evaluate(model, prepared.train, rows=rows, token_budget=budget)
