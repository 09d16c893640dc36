"""Sampler: completions and greedy answers by the engine of `tailora serve`, from the model in training.

The engine runs the model itself, with its adapter unmerged, and waits while the model trains.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from threading import Semaphore
from typing import Any, cast

import numpy as np
from accelerate.utils import gather_object
from transformers import PreTrainedModel, ProcessorMixin

from tailora.core.adapter_set import AdapterSet
from tailora.core.attach import evaluating
from tailora.data.chat_template import to_conversation
from tailora.data.image_processor import text_tokenizer
from tailora.data.images import Image
from tailora.data.samples import Prompt
from tailora.data.tokenize import stop_ids
from tailora.engine.continuous_batching import make_engine
from tailora.engine.interface import Finish, Request, SamplingParams, Token
from tailora.engine.sampling import OVERFLOW
from tailora.errors import DivergedError
from tailora.kernels.attention import use_attention
from tailora.model import LoRAModel
from tailora.patches import attention_of
from tailora.train.config import TrainConfig
from tailora.train.generate import EncodedPrompt
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


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy reply."""

    text: str
    tokens: int  # with the end token
    is_cut: bool  # it reached the limit of its tokens


class Sampler:
    """Starts the engine, which waits except while it samples or answers, until `stop`.

    longest: tokens of a prompt with its completion.
    most: completions that are sampled at once.
    """

    def __init__(self, model: Trainable, tokenizer: Any, longest: int, most: int, note: Note) -> None:
        self.model, self.tokenizer = model, text_tokenizer(tokenizer)
        self.base = cast(PreTrainedModel, model.base_model)
        self._numbers = count()  # of requests
        self._active = list(model.active_adapters) if isinstance(model, LoRAModel) else []
        with evaluating(model), use_attention(self.base, cast(str, attention_of(self.base.config))):
            self._engine = make_engine(
                _adapters_of(model), stop_ids(model, tokenizer), max_positions=longest, max_requests=most, note=note
            )
            self._engine.processor = copy.deepcopy(tokenizer) if isinstance(tokenizer, ProcessorMixin) else None
            self._engine.start()
            self._attention = cast(str, attention_of(self.base.config))  # that the engine has chosen
        self._pause = ExitStack()
        self._pause_engine()

    def stop(self) -> None:
        self._pause.close()
        self._engine.stop()
        self._activate_adapter()

    def sample(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[list[int]],
        config: TrainConfig,
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[Sample]:
        """Returns `num_generations` completions of each prompt. seeds: for each prompt, numbers that determine them.

        Raises DivergedError on all ranks if the logits of one are not finite, and MemoryLimitError.
        """
        number, longest, temperature = config.num_generations, config.max_completion_length, config.temperature
        groups = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            states = [int(np.random.SeedSequence([*seed, i]).generate_state(1)[0]) for i in range(number)]
            params = SamplingParams(longest, temperature, logprobs=0, at_temperature=True)
            groups.append([self._request(prompt.ids, replace(params, seed=state)) for state in states])
        with explain_out_of_memory("sampling completions", ADVICE):
            results = self._run(groups, lambda done: progress(done // number))
            finishes = [cast(Finish, events[-1]) for events in results]
            if any(gather_object([any(finish.message == OVERFLOW for finish in finishes)])):
                raise DivergedError("the logits of a completion are not finite")
            samples = []
            for prompt, events in zip((p for p in prompts for _ in range(number)), results, strict=True):
                tokens, text, is_truncated = self._read(events)
                ids, log_probabilities = [token.id for token in tokens], [token.logprob for token in tokens]
                samples.append(Sample(prompt, ids, log_probabilities, is_truncated, text))
            return samples

    def answer(
        self,
        prompts: Sequence[EncodedPrompt],
        max_new_tokens: int,
        *,
        base: bool = False,
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[Answer]:
        """Returns the greedy answer to each prompt. base: of the model without its adapter."""
        params = SamplingParams(max_new_tokens, temperature=0)
        groups = [[self._request(prompt.ids, params, prompt.images, base=base)] for prompt in prompts]
        answers = []
        for events in self._run(groups, progress):
            tokens, text, is_cut = self._read(events)
            answers.append(Answer(text.strip(), len(tokens), is_cut))
        return answers

    # ---- The engine

    def _request(
        self, ids: Sequence[int], params: SamplingParams, images: tuple[Image, ...] = (), *, base: bool = False
    ) -> Request:
        adapter = None if base or not self._active else self._active[0]
        return Request(f"{next(self._numbers)}", tuple(ids), adapter, params, images=images)

    def _run(self, groups: Sequence[Sequence[Request]], progress: Callable[[int], None]) -> list[list[Token | Finish]]:
        """Returns the events of every request. progress: called with the number of those that have ended.

        groups: requests with the same prompt, whose adapter, length and parameters are equal except for the seed.
        """
        ended, results = Semaphore(0), list[list[Token | Finish]]()
        return_freed_memory()

        def add(events: list[Token | Finish], event: Token | Finish) -> None:
            events.append(event)
            if isinstance(event, Finish):
                ended.release()

        for group in groups:  # while the engine waits, so that its batches do not depend on the time
            of_group: list[list[Token | Finish]] = [[] for _ in group]
            results += of_group
            self._engine.submit_group([(request, partial(add, e)) for request, e in zip(group, of_group, strict=True)])
        with evaluating(self.model), use_attention(self.base, self._attention):
            self._engine.parameters_changed()
            self._pause.close()
            try:
                for done in range(len(results)):
                    ended.acquire()
                    progress(done + 1)
            finally:
                self._pause_engine()
        return results

    def _read(self, events: Sequence[Token | Finish]) -> tuple[list[Token], str, bool]:
        """Returns the tokens, the text without the end token, and whether the limit ended it.

        Raises DivergedError for logits that are not finite, RuntimeError for other failures.
        """
        tokens, finish = [event for event in events if isinstance(event, Token)], cast(Finish, events[-1])
        if finish.message == OVERFLOW:
            raise DivergedError("the logits of an answer are not finite")
        if finish.reason in ("error", "cancelled"):
            raise RuntimeError(f"sampling failed: {finish.message or finish.reason}")
        is_cut = finish.reason == "length"
        ids = [token.id for token in (tokens if is_cut else tokens[:-1])]
        return tokens, str(self.tokenizer.decode(ids, skip_special_tokens=True)), is_cut

    def _pause_engine(self) -> None:
        """Lets the model train, with the memory of the cache, until completions or answers are needed."""
        self._pause.enter_context(self._engine.paused())
        self._engine.free_cache()
        self._activate_adapter()

    def _activate_adapter(self) -> None:
        if isinstance(self.model, LoRAModel):
            self.model.set_adapter(self._active)


def _adapters_of(model: Trainable) -> AdapterSet:
    if isinstance(model, LoRAModel):
        return model._adapter_set
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapters = AdapterSet(model.base_model, {})  # freezes it
    for parameter in trained:
        parameter.requires_grad_(True)
    return adapters
