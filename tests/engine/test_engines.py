"""Engines: the tokens of a request are those that it gets alone, whatever runs beside it."""

import gc
import logging
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from logging.handlers import BufferingHandler
from threading import Event
from typing import Any

import pytest
import torch
from llguidance.hf import from_tokenizer
from tiny import GROUPED
from tiny_server import TOKENIZER, base_model, started
from transformers import (
    AttentionInterface,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from tailora import LoRAConfig
from tailora.core import mixed_batch
from tailora.core.adapter import Adapter, create
from tailora.core.adapter_set import AdapterSet
from tailora.core.mixed_batch import layer_terms
from tailora.core.targets import select
from tailora.engine import continuous_batching
from tailora.engine.continuous_batching import ContinuousEngine, make_engine
from tailora.engine.interface import (
    Engine,
    Finish,
    Request,
    SamplingParams,
    Token,
    positions_of_short_factors,
)
from tailora.engine.padded_batching import PaddedEngine
from tailora.engine.sampling import RunningRequest, json_matcher
from tailora.errors import AdapterError, ConfigError

EOS = 7
CONFIGS = {  # ranks, DoRA, heads, embeddings and modules that are trained in full
    "small": LoRAConfig(r=2),
    "large": LoRAConfig(r=8, lora_alpha=32),
    "dora": LoRAConfig(r=4, use_dora=True),
    "head": LoRAConfig(r=4, target_modules=["q_proj", "lm_head", "embed_tokens"]),
    "biased": LoRAConfig(r=4, lora_bias=True),
    "saved": LoRAConfig(r=4, target_modules=["v_proj"], modules_to_save=["norm"]),
    "tokens": LoRAConfig(r=4, target_modules=["v_proj"], trainable_token_indices=[3, 5]),
}
ENGINES = {"continuous": ContinuousEngine, "padded": PaddedEngine}


def adapter(base: Any, name: str) -> Adapter:
    torch.manual_seed(sorted(CONFIGS).index(name))
    new = create(select(base, CONFIGS[name]))
    for part in new.parts.values():
        for parameter in part.parameters():
            parameter.data += torch.randn_like(parameter) * 0.3
        part.eval()
    return new


class Answers:
    """Submits requests and gathers what comes back."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.tokens, self.finishes = engine, dict[str, list[Token]](), dict[str, Finish]()
        self.ended: dict[str, Event] = {}
        self.first_token = Event()

    def submit(self, name: str, prompt: list[int], model: str | None, **params: Any) -> None:
        self.engine.submit(*self.request(name, prompt, model, **params))

    def submit_group(self, seeds: range, prompt: list[int], model: str | None, **params: Any) -> None:
        self.engine.submit_group([self.request(f"seed {seed}", prompt, model, seed=seed, **params) for seed in seeds])

    def request(
        self, name: str, prompt: list[int], model: str | None, **params: Any
    ) -> tuple[Request, Callable[[Token | Finish], None]]:
        self.tokens[name], self.ended[name] = [], Event()
        settings = SamplingParams(**{"max_tokens": 12, "temperature": 0.0, **params})

        def handle(event: Token | Finish) -> None:
            if isinstance(event, Token):
                self.tokens[name].append(event)
                self.first_token.set()
            else:
                self.finishes[name] = event
                self.ended[name].set()

        return Request(name, tuple(prompt), model, settings), handle

    def wait(self) -> dict[str, list[int]]:
        assert all(ended.wait(60) for ended in self.ended.values())
        return {name: [token.id for token in tokens] for name, tokens in self.tokens.items()}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    base = base_model()
    adapter_set = AdapterSet(base, {name: adapter(base, name) for name in CONFIGS})
    with started(ENGINES[request.param](adapter_set, [EOS], max_positions=200, max_requests=16)) as engine:
        yield engine


def prompts() -> list[tuple[str, list[int], str | None]]:
    """For each adapter and the base: its own prompt and one that is the same for all; then some long prompts.

    The long prompts do not fit into one forward of continuous batching.
    """
    generator = torch.Generator().manual_seed(1)
    result: list[tuple[str, list[int], str | None]] = []
    for number, model in enumerate([None, *CONFIGS]):
        own = torch.randint(8, 300, (3 + 5 * number,), generator=generator).tolist()
        result += [(f"{model}-own", own, model), (f"{model}-shared", [9, 10, 11, 3, 5, 12], model)]
    for model in (None, "large", "head", "saved"):
        result.append((f"{model}-long", torch.randint(8, 300, (150,), generator=generator).tolist(), model))
    return result


def alone(name: str | None, prompt: list[int]) -> list[int]:
    """What the model generates with this adapter active, without any engine."""
    return [*_alone(name, tuple(prompt))]


@cache
def _alone(name: str | None, prompt: tuple[int, ...]) -> list[int]:
    base = base_model()
    adapter_set = AdapterSet(base, {} if name is None else {name: adapter(base, name)})
    adapter_set.activate(name, training=False)
    output = base.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=EOS, pad_token_id=0)
    return output[0, len(prompt) :].tolist()


def test_greedy_tokens_are_those_of_the_request_alone(engine: Engine) -> None:
    answers = Answers(engine)
    for name, prompt, model in prompts():
        answers.submit(name, prompt, model)
    together = answers.wait()
    expected = {name: alone(model, prompt) for name, prompt, model in prompts()}
    assert together == expected
    shared = [tuple(tokens) for name, tokens in expected.items() if name.endswith("shared")]
    assert len(set(shared)) == len(shared)  # so that a mixture of adapters would be seen


def test_an_adapter_that_overflows_ends_with_an_error_and_changes_no_other_answer(engine: Engine) -> None:
    base: Any = engine.adapter_set.base_model
    hostile = adapter(base, "small")
    for layer in hostile.low_rank.values():
        layer.lora_B.data.fill_(1e30)
    with engine.paused():
        engine.adapter_set.add("hostile", hostile)
    answers = Answers(engine)
    for number, (name, prompt, model) in enumerate(prompts()):
        answers.submit(name, prompt, model)
        answers.submit(f"hostile-{number}", [9, 10, 11], "hostile", temperature=number % 2, max_tokens=150)
    together = answers.wait()
    for name, prompt, model in prompts():
        assert together[name] == alone(model, prompt)
        answers.submit(f"{name}-later", prompt, model)
    assert answers.wait() == together | {f"{name}-later": together[name] for name, _, _ in prompts()}
    for name in together:
        assert (answers.finishes[name].reason == "error") == name.startswith("hostile"), name
    assert all(not tokens for name, tokens in together.items() if name.startswith("hostile"))


def test_an_engine_that_is_stopped_at_once_logs_nothing() -> None:
    """So that a server that cannot start says its reason alone."""
    logger, handler = logging.getLogger("ContinuousBatchingLogger"), BufferingHandler(100)
    logger.addHandler(handler)
    try:
        with started(ContinuousEngine(AdapterSet(base_model(), {}), [EOS], max_positions=200)) as engine:
            engine.stop()
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in handler.buffer if record.levelno >= logging.WARNING] == []


def test_a_sliding_window() -> None:
    settings = {**GROUPED, "initializer_range": 0.2, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    base = MistralForCausalLM(MistralConfig(**settings, sliding_window=9, head_dim=None)).eval()
    generator = torch.Generator().manual_seed(2)
    requests = {n: torch.randint(8, 300, (n,), generator=generator).tolist() for n in (1, 4, 9, 10, 40, 700)}
    expected = {
        str(n): base.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=-1, pad_token_id=0
        )[0, n:].tolist()
        for n, prompt in requests.items()
    }
    with started(ContinuousEngine(AdapterSet(base, {}), [EOS], max_positions=1024)) as engine:
        answers = Answers(engine)
        for n, prompt in requests.items():
            answers.submit(str(n), prompt, None, ignore_eos=True)
        assert answers.wait() == expected
    assert base.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ENGINES)
def test_ignore_eos_also_ignores_the_end_that_the_base_names_itself(kind: str) -> None:
    prompt = [9, 10, 11]
    expected = alone("large", prompt)
    base = base_model()
    base.generation_config.eos_token_id = expected[2]
    adapter_set = AdapterSet(base, {"large": adapter(base, "large")})
    with started(ENGINES[kind](adapter_set, [], max_positions=200, max_requests=16)) as engine:
        answers = Answers(engine)
        answers.submit("a", prompt, "large", ignore_eos=True)
        assert answers.ended["a"].wait(20), "it never ends"
        assert answers.wait() == {"a": expected}


def test_what_is_computed_for_an_adapter_is_kept_while_others_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_model()
    adapter_set = AdapterSet(base, {"large": adapter(base, "large")})
    with started(ContinuousEngine(adapter_set, [EOS], max_positions=200)) as engine:
        answers = Answers(engine)
        answers.submit("before", [9, 10, 11], "large")
        answers.wait()
        computed: list[Any] = []
        monkeypatch.setattr(
            mixed_batch, "layer_terms", lambda part, *rest: computed.append(part) or layer_terms(part, *rest)
        )
        with engine.paused():
            engine.adapter_set.add("small", adapter(base, "small"))
        answers.submit("after", [9, 10, 11], "large")
        assert answers.wait()["after"] == answers.wait()["before"]
        assert not computed
        answers.submit("small", [9, 10, 11], "small")
        answers.wait()
        assert computed
        with engine.paused():
            engine.adapter_set.remove("large")
        assert set(engine._batch.terms) == set(computed)


def test_sampled_tokens_depend_on_the_seed_alone(engine: Engine) -> None:
    settings = {"temperature": 1.0, "top_p": 0.9, "logprobs": 2, "ignore_eos": True}
    by_itself = Answers(engine)
    by_itself.submit("alone", [9, 10, 11], "large", seed=5, **settings)
    expected = by_itself.wait()["alone"]
    answers = Answers(engine)
    for name, prompt, model in prompts():
        answers.submit(name, prompt, model, seed=1, temperature=1.0)
    answers.submit("x", [9, 10, 11], "large", seed=5, **settings)
    answers.submit("other seed", [9, 10, 11], "large", seed=6, **settings)
    together = answers.wait()
    assert together["x"] == expected
    assert together["other seed"] != expected
    assert len(expected) == 12
    assert all(len(token.top) == 2 and token.logprob <= token.top[0][1] for token in answers.tokens["x"])


@pytest.mark.parametrize("prompt", [[9], [9, 10, 11, 3, 5, 12], [*range(8, 158)]])
def test_a_group_gets_the_tokens_of_its_seeds_and_its_prompt_is_computed_once(prompt: list[int]) -> None:
    base, computed = base_model(), 0
    settings = {"temperature": 1.0, "ignore_eos": True, "max_tokens": 6, "logprobs": 0}
    adapter_set = AdapterSet(base, {"large": adapter(base, "large")})
    with started(ContinuousEngine(adapter_set, [EOS], max_positions=200, max_requests=5)) as engine:
        one_by_one, together = Answers(engine), Answers(engine)
        for seed in range(4):
            one_by_one.submit(f"seed {seed}", prompt, "large", seed=seed, **settings)
            one_by_one.wait()

        def count(_: Any, inputs: tuple[torch.Tensor]) -> None:
            nonlocal computed
            computed += inputs[0].shape[1]

        with base.get_submodule("model.norm").register_forward_pre_hook(count):
            with engine.paused():
                engine.free_cache()
                together.submit_group(range(4), prompt, "large", **settings)
            assert together.wait() == one_by_one.wait()
        assert computed == len(prompt) - 1 + 4 * 6
        assert len({tuple(tokens) for tokens in together.wait().values()}) == 4
        for name, tokens in together.tokens.items():
            logprobs = [token.logprob for token in one_by_one.tokens[name]]
            assert [token.logprob for token in tokens] == pytest.approx(logprobs, abs=1e-4)


def test_requests_that_fill_the_cache_start_together() -> None:
    base, batches = base_model(), 0

    def count(*_: Any) -> None:
        nonlocal batches
        batches += 1

    with started(ContinuousEngine(AdapterSet(base, {}), [EOS], max_positions=64, max_requests=16)) as engine:
        answers = Answers(engine)
        with base.get_submodule("model.norm").register_forward_pre_hook(count):
            with engine.paused():
                for number in range(4):  # a request needs two pages of the cache, as many as there are for it
                    answers.submit_group(range(4 * number, 4 * number + 4), [*range(8, 50)], None, ignore_eos=True)
            answers.wait()
    assert batches == 1 + len(answers.tokens["seed 0"])


def test_a_trial_leaves_no_cache_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    caches, base = weakref.WeakSet[Any](), base_model()
    create_cache = PagedAttentionCache.__init__

    def keep(self: PagedAttentionCache, *args: Any, **kwargs: Any) -> None:
        create_cache(self, *args, **kwargs)
        caches.add(self)

    monkeypatch.setattr(PagedAttentionCache, "__init__", keep)
    gc.disable()
    try:
        make_engine(AdapterSet(base, {}), [EOS], max_positions=64)
        assert not caches
    finally:
        gc.enable()


def test_logprobs_are_the_models(engine: Engine) -> None:
    answers = Answers(engine)
    answers.submit("x", [9, 10, 11], "dora", logprobs=3, max_tokens=1)
    answers.submit("beside", [9, 10], "small")
    answers.wait()
    base = base_model()
    AdapterSet(base, {"dora": adapter(base, "dora")}).activate("dora", training=False)
    with torch.no_grad():
        values, ids = base(torch.tensor([[9, 10, 11]])).logits[0, -1].log_softmax(-1).topk(3)
    (token,) = answers.tokens["x"]
    assert [i for i, _ in token.top] == ids.tolist()
    assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert answers.finishes["x"].reason == "length"


def test_adapters_come_and_go_while_requests_run(engine: Engine) -> None:
    answers = Answers(engine)
    for number in range(4):
        answers.submit(f"long-{number}", [9, 10, 11], "large", max_tokens=60, ignore_eos=True)
    assert answers.first_token.wait(60)
    base: Any = engine.adapter_set.base_model
    with engine.paused():
        engine.adapter_set.remove("small")
        engine.adapter_set.add("again", adapter(base, "small"))
    answers.submit("x", [9, 10, 11], "again")
    tokens = answers.wait()
    assert tokens["x"] == alone("small", [9, 10, 11])
    assert all(len(tokens[f"long-{number}"]) == 60 for number in range(4))
    with pytest.raises(AdapterError, match="small"):
        answers.engine.submit(Request("y", (9,), "small", SamplingParams(1)), lambda _: None)


def test_a_request_is_cancelled_and_others_go_on(engine: Engine) -> None:
    answers = Answers(engine)
    answers.submit("long", [9, 10, 11], "large", max_tokens=150, ignore_eos=True)
    answers.submit("beside", [9, 10, 11], "dora")
    assert answers.first_token.wait(60)
    engine.cancel("long")
    tokens = answers.wait()
    assert answers.finishes["long"].reason == "cancelled"
    assert len(tokens["long"]) < 150
    assert tokens["beside"] == alone("dora", [9, 10, 11])
    engine.cancel("long")  # has ended


def test_an_answer_that_its_grammar_completed_stops_computing(engine: Engine) -> None:
    count, base = 0, engine.adapter_set.base_model

    def add(*_: Any) -> None:
        nonlocal count
        count += 1

    grammar = json_matcher({"type": "boolean"}, from_tokenizer(TOKENIZER))
    answers = Answers(engine)
    request, handle = answers.request("x", [9, 10, 11], None, max_tokens=150, ignore_eos=True)
    with base.register_forward_pre_hook(add):
        engine.submit(replace(request, grammar=grammar), handle)
        tokens = answers.wait()["x"]
        answers.submit("next", [9, 10, 11], None)
        answers.wait()
    assert answers.finishes["x"].reason == "stop"
    assert len(tokens) < 10
    assert count <= len(tokens) + len(answers.tokens["next"]) + 2
    with engine.paused():
        assert engine.load == (0, 0)
        manager = getattr(engine, "_manager", None)
        assert manager is None or not manager.batch_processor.scheduler.active_requests


def test_stop_ends_what_runs(engine: Engine) -> None:
    answers = Answers(engine)
    for number in range(40):
        answers.submit(str(number), [9, 10, 11], None, max_tokens=190, ignore_eos=True)
    assert answers.first_token.wait(60)
    engine.stop()
    answers.wait()
    reasons = {finish.reason for finish in answers.finishes.values()}
    assert "cancelled" in reasons
    assert reasons <= {"length", "cancelled"}
    assert not engine.is_alive
    with pytest.raises(RuntimeError, match="not running"):
        engine.submit(Request("y", (9,), None, SamplingParams(1)), lambda _: None)


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("failing", [1, 2, 6])
def test_a_forward_that_fails_ends_the_requests_of_its_batch_and_no_others(kind: str, failing: int) -> None:
    """Whichever fails, the others get their tokens, and nothing of the failed ones is left in the cache."""
    base, count = base_model(), 0
    adapter_set = AdapterSet(base, {name: adapter(base, name) for name in CONFIGS})

    def fail(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == failing:
            raise RuntimeError("a kernel failed")

    with started(ENGINES[kind](adapter_set, [EOS], max_positions=64, max_requests=2)) as engine:
        for _ in range(3):
            answers, count = Answers(engine), 0
            asked = [(name, prompt[:50], model) for name, prompt, model in prompts()][:7]
            with base.get_submodule("model.layers.0.mlp").register_forward_pre_hook(fail):
                with engine.paused():
                    for request in asked:
                        answers.submit(*request)
                    answers.submit_group(range(2), [9, 10, 11], "large")
                tokens = answers.wait()
            failed = {name for name, finish in answers.finishes.items() if "a kernel failed" in finish.message}
            assert failed == {name for name, finish in answers.finishes.items() if finish.reason == "error"}
            assert 1 <= len(failed) <= 2
            expected = {name: alone(model, prompt) for name, prompt, model in asked}
            expected |= dict.fromkeys(["seed 0", "seed 1"], alone("large", [9, 10, 11]))
            assert tokens == expected | {name: tokens[name] for name in failed}
            with engine.paused():
                assert engine.load == (0, 0)


def test_a_forward_that_fails_ends_the_requests_that_wait_for_its_prompt(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: Any) -> None:
        raise RuntimeError("a kernel failed")

    answers = Answers(engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine.adapter_set.base_model.get_submodule("model.layers.0.mlp"), "forward", forward)
        answers.submit_group(range(4), [9, 10, 11], "large")
        answers.wait()
    assert all("a kernel failed" in finish.message for finish in answers.finishes.values())
    again = Answers(engine)
    again.submit_group(range(4), [9, 10, 11], "large")
    assert set(map(tuple, again.wait().values())) == {tuple(alone("large", [9, 10, 11]))}


def test_the_engine_is_chosen_by_the_model() -> None:
    assert isinstance(make_engine(AdapterSet(base_model(), {}), [EOS], max_positions=64), ContinuousEngine)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1))
    assert isinstance(make_engine(AdapterSet(mamba, {}), [EOS], max_positions=64), PaddedEngine)
    with pytest.raises(ConfigError, match="padded"):
        make_engine(AdapterSet(mamba, {}), [EOS], "continuous", max_positions=64)
    eager = base_model()
    eager.set_attn_implementation("eager")  # masks the keys of other requests, so that their infinities become NaN
    assert isinstance(make_engine(AdapterSet(eager, {}), [EOS], max_positions=64), PaddedEngine)


def test_an_engine_that_fails_with_the_model_is_not_chosen(capfd: pytest.CaptureFixture[str]) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=16)).eval()  # transformers' batching fails here
    attention, notes = model.config._attn_implementation, list[str]()
    engine = make_engine(AdapterSet(model, {}), [EOS], max_positions=64, note=notes.append)
    assert isinstance(engine, PaddedEngine)
    assert "continuous batching is not possible (PagedAttentionCache" in notes[0]
    assert model.config._attn_implementation == attention
    assert capfd.readouterr().err == ""
    with started(engine):
        answers = Answers(engine)
        answers.submit("x", [9, 10, 11], None)
        tokens = answers.wait()["x"]
    ids = torch.tensor([[9, 10, 11]])
    expected = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=EOS, pad_token_id=0)[0, 3:]
    assert tokens == expected.tolist()


def test_an_engine_that_computes_something_else_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_past(*arguments: Any, cu_seq_lens_k: torch.Tensor, **kwargs: Any) -> Any:
        module, query, key, value, mask = arguments
        return attend(module, query, key, value.roll(1, 2), mask, cu_seq_lens_k=cu_seq_lens_k, **kwargs)

    attend = continuous_batching.attention_by_request
    monkeypatch.setitem(AttentionInterface._global_mapping, continuous_batching.BY_REQUEST, without_past)
    notes: list[str] = []
    engine = make_engine(AdapterSet(base_model(), {}), [EOS], max_positions=64, note=notes.append)
    assert isinstance(engine, PaddedEngine)
    assert "its log-probabilities are off by" in notes[0]


def test_a_generate_that_does_not_answer_ends_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base_model()
    monkeypatch.setattr(model, "generate", lambda **_: None)
    with started(PaddedEngine(AdapterSet(model, {}), [EOS], max_positions=64)) as engine:
        answers = Answers(engine)
        answers.submit("x", [9, 10, 11], None)
        assert answers.wait()["x"] == []
    assert "ended without the answer" in answers.finishes["x"].message


def test_padded_batches_wait_for_all_requests_that_come_while_the_engine_is_paused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run with rewards would otherwise depend on the time, and could not be resumed with the same bits."""
    sizes: list[int] = []
    generate = PaddedEngine._generate
    monkeypatch.setattr(
        PaddedEngine, "_generate", lambda self, requests: sizes.append(len(requests)) or generate(self, requests)
    )
    with started(PaddedEngine(AdapterSet(base_model(), {}), [EOS], max_positions=64)) as engine:
        answers = Answers(engine)
        with engine.paused():
            for number in range(6):
                answers.submit(f"{number}", [9, 10, 11], None)
                time.sleep(0.02)  # the engine's thread sees the first ones
        answers.wait()
    assert sizes == [6]


def test_padded_rows_need_positions_until_the_last_one_ends() -> None:
    engine = PaddedEngine(AdapterSet(base_model(), {}), {EOS}, max_positions=40, max_requests=8)

    def batch(*requests: tuple[int, int]) -> list[int]:
        """Returns which of these numbers of prompt tokens and of tokens are in the first batch."""
        for number, (prompt, tokens) in enumerate(requests):
            request = Request(f"{number}", (3,) * prompt, None, SamplingParams(tokens))
            engine._waiting.append(RunningRequest(request, lambda *_: None))
        return [int(running.request.id) for running in engine._take_batch()]

    assert batch((30, 10), (5, 35)) == [0, 1]  # what a server asks for without max_tokens
    table = torch.nn.Embedding(engine.adapter_set.base_model.config.max_position_embeddings, 1)
    engine = PaddedEngine(AdapterSet(base_model(), {}), {EOS}, max_positions=40, max_requests=8)
    engine.adapter_set.base_model.register_module("positions", table)
    assert batch((30, 5), (5, 30), (3, 8)) == [0, 2]
    engine.cancel("1")
    assert not engine._waiting


def test_longrope_has_positions_of_its_short_factors() -> None:
    config: Any = base_model().config
    assert positions_of_short_factors(config) is None
    config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 32}
    assert positions_of_short_factors(config) == 32
