"""Sampler: completions of prompts, by the engine of `tailora serve`, from the model in training.

The engine runs the model itself, with its adapter unmerged, and waits while the model trains.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from threading import Semaphore
from typing import Any, cast

import numpy as np
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from tailora.core.adapter_set import AdapterSet
from tailora.core.attach import evaluating
from tailora.data.chat_template import to_conversation
from tailora.data.image_processor import text_tokenizer
from tailora.data.samples import Prompt
from tailora.data.tokenize import stop_ids
from tailora.engine.continuous_batching import make_engine
from tailora.engine.interface import EventHandler, Finish, Request, SamplingParams, Token
from tailora.engine.sampling import OVERFLOW
from tailora.errors import DivergedError
from tailora.kernels.attention import use_attention
from tailora.model import LoRAModel
from tailora.patches import attention_of
from tailora.train.config import TrainConfig
from tailora.train.grpo import ScoredCompletion
from tailora.train.memory import explain_out_of_memory, return_freed_memory
from tailora.train.trainable import Trainable

Note = Callable[[str], None]
SHOWN_CHARACTERS = 400  # of a text in the run log
ADVICE = "what helps: a lower --max-completion-length, fewer --num-generations, shorter prompts, or a smaller model"


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion."""

    prompt: Prompt
    ids: list[int]  # with the end token, unless it is truncated
    log_probabilities: list[float]  # of each token
    is_truncated: bool
    text: str

    @property
    def shown(self) -> dict[str, str]:
        """The beginnings of the prompt's last message and of the completion."""
        asked = to_conversation(self.prompt.chat).messages[-2]  # the last message has no reply yet
        texts = {"prompt": str(asked["content"]), "completion": self.text}
        return {name: text[:SHOWN_CHARACTERS] for name, text in texts.items()}

    def completion(self) -> ScoredCompletion:
        """Returns prompt and completion, which alone is trained, without an advantage."""
        ids = np.array([*self.prompt.ids, *self.ids], dtype=np.int32)
        completion = ScoredCompletion.of_text(ids, np.arange(len(ids)) >= len(self.prompt.ids))
        return replace(completion, sampled=self.log_probabilities)


class Sampler:
    """Starts the engine, which waits except within `sample`, until `stop`.

    longest: tokens of a prompt with its completion.
    most: completions that are sampled at once.
    """

    def __init__(
        self, config: TrainConfig, model: Trainable, tokenizer: Any, longest: int, most: int, note: Note
    ) -> None:
        self.config, self.model, self.tokenizer = config, model, text_tokenizer(tokenizer)
        self.base = cast(PreTrainedModel, model.base_model)
        self._request_numbers = count()
        with evaluating(model), use_attention(self.base, cast(str, attention_of(self.base.config))):
            self._engine = make_engine(
                _adapters_of(model), stop_ids(model, tokenizer), max_positions=longest, max_requests=most, note=note
            )
            self._engine.start()
            self._attention = cast(str, attention_of(self.base.config))  # that the engine has chosen
        self._pause = ExitStack()
        self._pause_engine()

    def stop(self) -> None:
        self._pause.close()
        self._engine.stop()
        self._activate_adapter()

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[list[int]], progress: Callable[[int], None] = lambda _: None
    ) -> list[Sample]:
        """Returns `num_generations` completions of each prompt. seeds: for each prompt, numbers that determine them.

        Raises DivergedError on all ranks if the logits of one are not finite, and MemoryLimitError.
        """
        ended, generations = Semaphore(0), self.config.num_generations
        answers = list[tuple[Prompt, list[Token | Finish]]]()
        adapter = "default" if isinstance(self.model, LoRAModel) else None
        return_freed_memory()

        def add(events: list[Token | Finish], event: Token | Finish) -> None:
            events.append(event)
            if isinstance(event, Finish):
                ended.release()

        with explain_out_of_memory("sampling completions", ADVICE):
            for prompt, seed in zip(prompts, seeds, strict=True):
                group = list[tuple[Request, EventHandler]]()
                for number in range(generations):
                    params = SamplingParams(
                        self.config.max_completion_length,
                        temperature=self.config.temperature,
                        seed=int(np.random.SeedSequence([*seed, number]).generate_state(1)[0]),
                        logprobs=0,
                        at_temperature=True,
                    )
                    events = list[Token | Finish]()
                    request = Request(f"{next(self._request_numbers)}", tuple(prompt.ids), adapter, params)
                    group.append((request, partial(add, events)))
                    answers.append((prompt, events))
                self._engine.submit_group(group)  # while it waits, so that its batches do not depend on the time
            with evaluating(self.model), use_attention(self.base, self._attention):
                self._engine.parameters_changed()
                self._pause.close()
                try:
                    for done in range(len(answers)):
                        ended.acquire()
                        progress((done + 1) // generations)
                finally:
                    self._pause_engine()
            finishes = [cast(Finish, events[-1]) for _, events in answers]
            if any(gather_object([any(finish.message == OVERFLOW for finish in finishes)])):
                raise DivergedError("the logits of a completion are not finite")
            return [self._sample_of(*answer) for answer in answers]

    def _sample_of(self, prompt: Prompt, events: Sequence[Token | Finish]) -> Sample:
        tokens, finish = [event for event in events if isinstance(event, Token)], events[-1]
        reason, message = cast(Finish, finish).reason, cast(Finish, finish).message
        if reason in ("error", "cancelled"):
            raise RuntimeError(f"sampling failed: {message or reason}")
        ids = [token.id for token in tokens]
        text = str(self.tokenizer.decode(ids if reason == "length" else ids[:-1], skip_special_tokens=True))
        return Sample(prompt, ids, [token.logprob for token in tokens], reason == "length", text)

    # ---- The engine

    def _pause_engine(self) -> None:
        """Lets the model train, with the memory of the cache, until the next `sample`."""
        self._pause.enter_context(self._engine.paused())
        self._engine.free_cache()
        self._activate_adapter()

    def _activate_adapter(self) -> None:
        if isinstance(self.model, LoRAModel):
            self.model.set_adapter("default")


def _adapters_of(model: Trainable) -> AdapterSet:
    if isinstance(model, LoRAModel):
        return model._adapter_set
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapters = AdapterSet(model.base_model, {})  # freezes it
    for parameter in trained:
        parameter.requires_grad_(True)
    return adapters
