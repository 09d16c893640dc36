"""verify: every fault of a server is found, through a real server of ours on loopback and a stand-in of others."""

import copy
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from tiny import GROUPED, chat_tokenizer, stir, tiny_model
from tiny_server import on_loopback
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tailora import LoRAConfig, LoRAModel
from tailora.cli.main import main
from tailora.cli.verify import HEADLINES
from tailora.core.adapter_set import AdapterSet
from tailora.data.schemas import Choices, Conversation, Feedback, Preference
from tailora.errors import ConfigError, DataError, FormatError, ServerError
from tailora.formats.passport import (
    ADAPTER,
    BASE,
    REQUIRED,
    Passport,
    Probe,
    read_passport,
    write_passport,
)
from tailora.formats.run_folder import ADAPTER_WEIGHTS, PASSPORT
from tailora.serve import client
from tailora.serve.app import ServerSettings, create_app
from tailora.serve.client import MOST_BYTES, ServerClient, choose_model
from tailora.serve.engine import make_engine
from tailora.serve.registry import AdapterRegistry
from tailora.study.probes import QUESTIONS, make_passport, next_logprobs, q4_0, rounded_to_4_bits
from tailora.study.verification import STEP, Fit, Observation, Verdict, Verification, _meaning, verify

TOKENIZER = chat_tokenizer(
    [*QUESTIONS, "a good morning to you and to the cat"], eos_token="<|im_end|>", bos_token="<|im_start|>"
)


def base_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {**GROUPED, "num_hidden_layers": 4, "vocab_size": len(TOKENIZER)}
    config = LlamaConfig(**sizes, initializer_range=0.3, max_position_embeddings=256, eos_token_id=2)
    return LlamaForCausalLM(config).eval()


def adapted(seed: int, base: PreTrainedModel | None = None) -> LoRAModel:
    model = LoRAModel(base_model() if base is None else base, LoRAConfig(r=4))
    stir(model, seed)
    return model


def save_without(folder: Path, is_missing: Callable[[str], bool]) -> None:
    """Saves the adapter with updates of 0 in some layers."""
    model = adapted(0)
    for path, layer in model.adapter().low_rank.items():
        if is_missing(path):
            torch.nn.init.zeros_(layer.lora_B)
    model.save_adapter(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapter `legal`, another one, and faulty copies."""
    folder = tmp_path_factory.mktemp("adapters")
    model = adapted(0)
    model.save_adapter(folder / "legal")
    write_passport(folder / "legal", make_passport(model, TOKENIZER))
    adapted(1).save_adapter(folder / "other")
    LoRAModel(base_model(1), LoRAConfig(r=4)).save_adapter(folder / "new")  # of another base, which it does not change
    save_without(folder / "upper", lambda path: int(path.split(".")[2]) < 2)
    save_without(folder / "mlp", lambda path: "attn" in path)
    return folder


@contextmanager
def running(root: Path, *, seed: int = 0, template: str | None = None) -> Iterator[str]:
    """Yields the address of a server. seed: of its base's weights.    template: of its chats."""
    tokenizer = TOKENIZER if template is None else copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template or TOKENIZER.chat_template
    engine = make_engine(AdapterSet(base_model(seed), {}), [2], max_positions=200, max_requests=8)
    engine.start()
    try:
        registry = AdapterRegistry(engine.adapter_set, engine.paused, "tiny", root)
        adapters = {name: name for name in ("legal", "other", "upper", "mlp")} if seed == 0 else {"legal": "new"}
        for name, folder in adapters.items():
            registry.load(name, root / folder, trusted=True)
        app = create_app(engine, registry, tokenizer, ServerSettings())
        with on_loopback(app) as url:
            yield url
    finally:
        engine.stop(0)


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    with running(root) as url:
        yield url


def verdict_of(url: str, passport: Passport, model: str, base: str | None = None) -> Verification:
    with ServerClient(url) as server:
        of_base = None if base is None else server.ask(passport.probes, base)
        return verify(passport, server.ask(passport.probes, model), of_base)


HALF_A_STEP = STEP / 2  # of the scales that are tried
FAULTS: dict[str, tuple[str, float | None, str]] = {  # verdict, scale, what is missing
    "legal": ("adapter", 1.0, ""),
    "tiny": ("base", 0.0, ""),
    "legal@2": ("scaled", 2.0, ""),
    "legal@0.5": ("scaled", 0.5, ""),
    "legal@3": ("scaled", 3.0, ""),
    "upper": ("partial", None, "the lower half of the layers"),
    "mlp": ("partial", None, "the attention layers"),
    "other": ("other-adapter", None, ""),
}


@pytest.mark.parametrize("model", FAULTS)
def test_what_a_server_computes_is_told(url: str, root: Path, model: str) -> None:
    verdict, scale, missing = FAULTS[model]
    result = verdict_of(url, read_passport(root / "legal"), model)
    assert result.verdict == verdict, "\n".join(result.evidence)
    fit = result.fits["text"]
    if model == "legal@3":  # between two scales of the passport, 2 and 4
        assert fit.interval[0] <= 3 <= fit.interval[1]
        assert result.scale == fit.scale
    else:
        assert result.scale == (None if scale is None else pytest.approx(scale, abs=HALF_A_STEP))
    if missing:
        assert (fit.kind, fit.name) == ("part", missing)


def test_another_base_and_another_adapter_are_told_apart_by_the_base(
    url: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passport = read_passport(root / "legal")
    result = verdict_of(url, passport, "other", "tiny")
    assert result.verdict == "other-adapter", "\n".join(result.evidence)
    with running(root, seed=1) as other:
        assert main(["verify", other, "--adapter", str(root / "legal"), "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "other-base", "\n".join(found["evidence"])


TEMPLATES = {
    "no start of the reply": TOKENIZER.chat_template.replace("{% if add_generation_prompt %}", "{% if false %}"),
    "Alpaca": "### Instruction:\n{{ messages[0]['content'] }}\n\n### Response:\n",
    "a second BOS": "<|im_start|>" + TOKENIZER.chat_template,
    "a system message": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + TOKENIZER.chat_template,
}


@pytest.mark.parametrize(
    "wrong",
    [
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("no start of the reply", "Alpaca")),
        "a second BOS",
        "a system message",
        "something else",
    ],
)
def test_a_wrong_template_is_told(root: Path, wrong: str) -> None:
    template = TEMPLATES.get(wrong, "Human: {{ messages[0]['content'] }} Bot:")
    with running(root, template=template) as url:
        result = verdict_of(url, read_passport(root / "legal"), "legal")
    assert result.verdict == "template", "\n".join(result.evidence)
    if wrong in TEMPLATES:
        assert result.fits["chat"].name == wrong
    assert any("the server counts" in sentence for sentence in result.evidence)


def test_longer_prompts_are_written_in_another_way(url: str, root: Path) -> None:
    """Also where a second BOS changes no more than rounding does. Some servers do not count cached tokens."""
    passport = read_passport(root / "legal")
    with ServerClient(url) as server:
        answers = server.ask(passport.probes, "legal")
    for more, verdict in ((1, "template"), (0, "adapter"), (-3, "adapter")):
        for of_chats in (True, False):
            counted = [
                answer
                and replace(answer, prompt_tokens=probe.prompt_tokens + more * ((probe.text is None) is of_chats))
                for probe, answer in zip(passport.probes, answers, strict=True)
            ]
            assert verify(passport, counted).verdict == verdict, (more, of_chats)


def answers_of(passport: Passport, variant: Callable[[Probe], str], *, has_logprobs: bool = True) -> list[Observation]:
    """Returns what a server answers that computes this variant of each probe."""
    answers = []
    for probe in passport.probes:
        logprobs = probe.logprobs[variant(probe)]
        chosen = max(range(len(logprobs)), key=logprobs.__getitem__)
        answers.append(Observation(chosen, dict(enumerate(logprobs)) if has_logprobs else {}))
    return answers


def with_controls(passport: Passport, count: int) -> Passport:
    """Makes the first probes controls; of tiny models there are only two."""
    probes = [replace(probe, is_control=number < count) for number, probe in enumerate(passport.probes)]
    return replace(passport, probes=probes)


def test_what_a_server_changes_at_the_controls_is_no_scale(root: Path) -> None:
    passport = with_controls(read_passport(root / "legal"), 20)
    answers = answers_of(passport, lambda probe: "scale 1.25" if probe.is_control else ADAPTER)
    assert verify(passport, answers).verdict == "adapter"


@pytest.mark.parametrize(("has_logprobs", "verdict"), [(True, "template"), (False, "other-adapter")])
def test_the_chosen_tokens_of_chats_do_not_tell_that_other_prompts_are_read_in_another_way(
    root: Path, has_logprobs: bool, verdict: str
) -> None:
    passport = read_passport(root / "legal")
    answers = answers_of(passport, lambda _: ADAPTER, has_logprobs=has_logprobs)
    for number, probe in enumerate(passport.probes):
        if probe.text is not None:
            likeliest_last = sorted(range(len(probe.tokens)), key=probe.logprobs[ADAPTER].__getitem__)
            listed = {token: -0.5 * place for place, token in enumerate(likeliest_last)}
            answers[number] = Observation(likeliest_last[0], listed if has_logprobs else {})
    assert verify(passport, answers).verdict == verdict


def test_a_server_that_lists_other_tokens_than_the_passport_differs_from_it(root: Path) -> None:
    """llama-server with a template that ignores the messages: its likeliest tokens are none of the chats' tokens."""
    passport = read_passport(root / "legal")
    answers = answers_of(passport, lambda _: ADAPTER)
    for number, probe in enumerate(passport.probes):
        if probe.text is None:
            answers[number] = Observation(None, {}, bound=-9.0)
    result = verify(passport, answers)
    assert result.verdict == "template", "\n".join(result.evidence)
    assert result.fits["chat"].has_logprobs


def test_without_log_probabilities_the_chosen_tokens_decide(url: str, root: Path) -> None:
    passport = read_passport(root / "legal")

    def silent(observations: list[Observation | None]) -> list[Observation]:
        return [Observation(answer.chosen) for answer in observations if answer is not None]

    with ServerClient(url) as server:
        for name, verdict in {"legal": "adapter", "tiny": "base"}.items():
            result = verify(passport, silent(server.ask(passport.probes, name)))
            assert result.verdict == verdict, "\n".join(result.evidence)
            assert not result.fits["text"].has_logprobs


def test_without_log_probabilities_a_scale_that_may_be_right_cannot_be_told(root: Path) -> None:
    """An older file of the run in `transformers serve`: the best scale is off, and its wide interval includes 1."""
    passport = read_passport(root / "legal")

    def variant(probe: Probe) -> str:
        return "scale 0.75" if probe.prompt_tokens % 3 else ADAPTER

    result = verify(passport, answers_of(passport, variant, has_logprobs=False))
    assert result.fits["text"].scale < 0.9 <= result.fits["text"].interval[1]
    assert result.verdict == "unknown"


def test_a_scale_that_includes_1_without_the_adapter_is_no_other_scale() -> None:
    """The best scale is just within the limit, and the adapter as trained just above it."""
    numbers = {"error": 0.5, "adapter_error": 0.52, "base_error": 1.5, "effect": 1.4, "rounding": 0.2, "limit": 0.51}
    fit = Fit("scale", "", 1.02, (0.97, 1.08), **numbers, noise=0.1, is_certain=True, probes=30, has_logprobs=True)
    assert _meaning(fit) == "other-adapter"
    assert _meaning(replace(fit, scale=1.3, interval=(1.2, 1.4))) == "scaled"


# ---- A base in 4 bits


def through_gguf(weight: torch.Tensor) -> torch.Tensor:
    """(out, in) -> what llama.cpp computes with if it stores this in Q4_0."""
    whole = functional.pad(weight.detach(), (0, -weight.shape[1] % 32))  # gguf takes only whole groups
    stored = quantize(whole.numpy(), GGMLQuantizationType.Q4_0)
    return torch.from_numpy(dequantize(stored, GGMLQuantizationType.Q4_0))[:, : weight.shape[1]]


def store_in_q4_0(model: PreTrainedModel) -> PreTrainedModel:
    """As llama.cpp does, which keeps the output head in more bits."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.weight.data = through_gguf(module.weight)
        elif isinstance(module, Conv1D):
            module.weight.data = through_gguf(module.weight.T.contiguous()).T
    return model


def test_q4_0_is_that_of_llama_cpp() -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    assert torch.equal(q4_0(weight), through_gguf(weight))


def test_conv1d_is_rounded_along_its_inputs_and_the_head_is_not() -> None:
    model = tiny_model("GPT2LMHeadModel", initializer_range=0.3).eval()
    ids = torch.arange(20)[None]
    exact = model(ids).logits
    with rounded_to_4_bits(model):
        rounded = model(ids).logits
    expected = store_in_q4_0(model)(ids).logits
    torch.testing.assert_close(rounded, expected, rtol=1e-3, atol=1e-3)
    assert (rounded - exact).abs().max() > 0.1


def answers_in_q4_0(passport: Passport, strength: float) -> list[Observation | None]:
    """Returns what a server with the base in Q4_0 answers. Its weights come from gguf, not from tailora."""
    model = adapted(0, store_in_q4_0(base_model())).eval()
    model.set_scale("default", strength)
    observations: list[Observation | None] = []
    with torch.no_grad():
        for probe in passport.probes:
            ids = TOKENIZER(probe.text or probe.rendered)["input_ids"]
            (logprobs,) = next_logprobs(model, [ids], [[len(ids) - 1]])
            top = logprobs.topk(20)
            tokens, values = top.indices.tolist(), top.values.tolist()
            words = {TOKENIZER.decode([token]): value for token, value in zip(tokens, values, strict=True)}
            listed = {number: words[text] for number, text in enumerate(probe.tokens) if text in words}
            chosen = max(listed, key=listed.__getitem__, default=None)
            observations.append(Observation(chosen, listed, float(top.values[-1]), len(ids)))
    return observations


@pytest.mark.parametrize(("strength", "verdict"), [(1.0, "adapter"), (0.0, "base"), (0.7, "scaled")])
def test_a_base_in_q4_0_is_taken_into_account(root: Path, strength: float, verdict: str) -> None:
    passport = with_controls(read_passport(root / "legal"), 10)
    result = verify(passport, answers_in_q4_0(passport, strength))
    assert result.verdict == verdict, "\n".join(result.evidence)
    assert result.scale == pytest.approx(strength, abs=0.05)
    if strength in (0, 1):  # between them Q4_0 changes something in between, more or less
        assert all(fit.error < 1e-3 for fit in result.fits.values())  # the passport has four decimals


# ---- The passport


def test_a_passport_belongs_to_its_weights(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(root / "legal", folder)
    passport = read_passport(folder)
    assert passport.texts == "base"
    assert {ADAPTER, BASE} <= passport.variants.keys()
    shutil.copy(root / "other" / ADAPTER_WEIGHTS, folder)
    with pytest.raises(FormatError, match="belongs to other weights"):
        read_passport(folder)
    (folder / PASSPORT).unlink()
    with pytest.raises(
        FormatError, match=r"holds no passport\.json: `tailora export .* --to peft --output NEW_FOLDER` writes one"
    ):
        read_passport(folder)


def probe_of(tokens: list[str], values: list[float]) -> dict[str, Any]:
    return {"prompt_tokens": 4, "tokens": tokens, "logprobs": dict.fromkeys(REQUIRED, values), "text": "a b c d"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "version 1"),
        ({"probes": []}, "it has no probes"),
        ({"variants": {}}, "variant 'adapter' is missing"),
        ({"texts": "mine"}, "texts: "),
        ({"variants": {name: {"kind": "scale", "scale": 1e9} for name in REQUIRED}}, "has scale 1e"),
        ({"probes": [probe_of([], [])]}, "probe 0 lacks log-probabilities"),
        ({"probes": [probe_of(["a"], [float("nan")])]}, "probe 0 has log-probabilities that are not finite"),
        ({"probes": [{**probe_of(["a"], [-1.0]), "logprobs": {ADAPTER: [-1.0], BASE: [-1.0]}}]}, "lacks the variants"),
    ],
)
def test_a_damaged_passport_is_refused(root: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(root / "legal", folder)
    content = json.loads((folder / PASSPORT).read_text())
    (folder / PASSPORT).write_text(json.dumps(content | change))
    with pytest.raises(FormatError, match=message):
        read_passport(folder)


def test_a_passport_of_held_out_samples_has_their_prompts() -> None:
    model, secret = adapted(0), "the cat is called Professor Fluff the Third of York"
    samples = [Conversation([{"role": "user", "content": secret}, {"role": "assistant", "content": secret}])] * 2
    held_out = make_passport(model, TOKENIZER, held_out=samples)
    assert held_out.texts == "held-out"
    chats = [probe.messages for probe in held_out.probes if probe.messages]
    assert chats
    assert all(messages == samples[0].messages[:1] for messages in chats)
    assert any(secret in (probe.text or "") for probe in held_out.probes)


GREETING = Conversation(
    [{"role": "user", "content": "a good morning"}, {"role": "assistant", "content": "to you and to the cat"}]
)


@pytest.mark.parametrize(
    "sample", [Preference(GREETING, GREETING), Feedback(GREETING, True), Choices((GREETING, GREETING), 1)]
)
def test_held_out_samples_of_any_task_make_probes(sample: Any) -> None:
    probes = make_passport(adapted(0), TOKENIZER, held_out=[sample]).probes
    assert [probe.messages for probe in probes if probe.messages] == [GREETING.messages[:1]]


def test_a_conversation_needs_a_template() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no text is fit for a probe"):
        make_passport(adapted(0), tokenizer, held_out=[GREETING])


def test_an_adapter_that_changes_nothing_or_diverged_has_no_passport() -> None:
    """A server could only be told from it wrongly."""
    model = LoRAModel(base_model(), LoRAConfig(r=4))
    with pytest.raises(DataError, match="the adapter changes no log-probability"):
        make_passport(model, TOKENIZER)
    for layer in model.adapter().low_rank.values():
        torch.nn.init.constant_(layer.lora_B, torch.nan)
    with pytest.raises(DataError, match=r"not finite: the adapter diverged"):
        make_passport(model, TOKENIZER)


def test_a_model_without_chat_template_gets_probes_of_plain_texts() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = None
    passport = make_passport(adapted(0), tokenizer)
    assert passport.probes
    assert all(probe.messages is None for probe in passport.probes)
    for probe in passport.probes:
        assert len(tokenizer(probe.text)["input_ids"]) == probe.prompt_tokens


def test_a_model_with_few_positions_gets_none() -> None:
    model = adapted(0)
    model.config.max_position_embeddings = 64
    with pytest.raises(DataError, match="the model has 64 positions; a passport needs 200"):
        make_passport(model, TOKENIZER)


def test_a_special_token_that_the_model_lacks_is_no_obstacle() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    assert len(tokenizer) > base_model().config.vocab_size
    assert make_passport(adapted(0), tokenizer).probes


def test_probes_leave_the_model_and_random_numbers_as_they_are() -> None:
    model = adapted(0)
    ids, before = torch.arange(12)[None], torch.get_rng_state()
    expected = model(input_ids=ids).logits
    make_passport(model, TOKENIZER)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module._forward_hooks for module in model.modules())


# ---- Other servers


class StandIn(BaseHTTPRequestHandler):
    """A server that answers as `answers` says: path -> status and body; of status 307 the address that it leads to.

    most: log-probabilities that it tells; it refuses requests for more.    requests: what it is asked.
    """

    answers: dict[str, tuple[int, Any]]
    most = 20
    requests: list["Request"]

    def reply(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        request = Request(self.path, self.headers.get("Authorization"), asked)
        self.requests.append(request)
        status, body = self.answers.get(self.path, (404, {"error": "not found"}))
        if (request.top or 0) > self.most:
            status, body = 400, {"error": "too many log-probabilities"}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if status == 307:
            self.send_header("Location", body)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = reply

    def log_message(self, *_: object) -> None:
        pass


@dataclass(frozen=True)
class Request:
    path: str
    key: str | None
    body: dict[str, Any]

    @property
    def top(self) -> int | None:
        """The number of log-probabilities that it asks for."""
        top: int | None = self.body.get("logprobs" if "prompt" in self.body else "top_logprobs")
        return top


def stand_in(
    answers: dict[str, tuple[int, Any]], *, most: int = 20, requests: list[Request] | None = None
) -> AbstractContextManager[str]:
    kept = [] if requests is None else requests
    return serving(type("Handler", (StandIn,), {"answers": answers, "most": most, "requests": kept}))


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


MODELS = {"/v1/models": (200, {"data": [{"id": "legal"}]})}
FORMS = {  # of log-probabilities in completions
    "OpenAI": {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5, " b": -1.5, "c": -3}]},
    "llama-server": {
        "content": [
            {
                "token": "a",
                "logprob": -0.5,
                "top_logprobs": [
                    {"token": "a", "logprob": -0.5},
                    {"token": " b", "logprob": -1.5},
                    {"token": "c", "logprob": -3},
                ],
            }
        ]
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_log_probabilities_are_read_in_both_forms(form: str) -> None:
    probe = Probe(3, ["b", "x", "a"], {ADAPTER: [-1.0] * 3, BASE: [-1.0] * 3}, text="hello")
    choice = {"text": "a", "logprobs": FORMS[form]}
    body = {"choices": [choice], "usage": {"prompt_tokens": 4}}
    with stand_in({**MODELS, "/v1/completions": (200, body)}) as url, ServerClient(url) as server:
        (answer,) = server.ask([probe], "legal")
    assert answer == Observation(2, {2: -0.5, 0: -1.5}, -3.0, 4)


@pytest.mark.parametrize(("most", "asked"), [(20, [20, 20, 20]), (5, [20, 5, 5, 5]), (0, [20, 5, None, None, None])])
def test_a_server_is_asked_for_fewer_log_probabilities_until_it_answers(most: int, asked: list[int | None]) -> None:
    logprobs, requests = {ADAPTER: [-1.0], BASE: [-1.0]}, list[Request]()
    probes = [Probe(3, ["a"], logprobs, text="hello")] * 3 + [Probe(3, ["a"], logprobs, messages=[])] * 3
    choice = {"text": "a", "message": {"content": "a"}}
    answers = dict.fromkeys(("/v1/completions", "/v1/chat/completions"), (200, {"choices": [choice]}))
    with stand_in(answers, most=most, requests=requests) as url, ServerClient(url) as server:
        assert server.ask(probes, "legal") == [Observation(0)] * 6
    for path in answers:
        assert [request.top for request in requests if request.path == path] == asked
    for request in requests:
        assert (request.body["model"], request.body["max_tokens"], request.body["temperature"]) == ("legal", 1, 0)


def test_the_key_of_the_environment_is_sent(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, sent in (("k", "Bearer k"), (None, None)):
        requests: list[Request] = []
        monkeypatch.delenv("TAILORA_API_KEY", raising=False)
        if key is not None:
            monkeypatch.setenv("TAILORA_API_KEY", key)
        with stand_in(MODELS, requests=requests) as url:
            assert main(["verify", url, "--adapter", str(root / "legal")]) == 1  # it answers no prompt
        assert {request.path for request in requests} >= {"/v1/models", "/v1/completions"}
        assert {request.key for request in requests} == {sent}


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"/v1/models": (200, b"<html>")}, "which is not OpenAI's API"),
        ({"/v1/models": (200, {"hello": 1})}, "has no list of models"),
        ({"/v1/models": (401, {"error": "key"})}, "set TAILORA_API_KEY"),
        ({"/v1/models": (503, {"error": "loading"})}, "503"),
        ({**MODELS, "/v1/completions": (200, {"choices": []})}, "has no choices"),
        ({"/v1/models": (307, "https://example.org/v1/models")}, "leads to https://example.org/v1/models: give"),
        ({"/v1/models": (200, b"[" * 200_000)}, "which is not OpenAI's API"),
        ({"/v1/models": (200, b" " * (MOST_BYTES + 1))}, "answers with more than 16 MB"),
        ({"/v1/models": (500, {"error": {"message": "no\x1b[31m memory", "code": 1}})}, "answers 500 no [31m memory, "),
        (MODELS, "answers no prompt: /v1/completions answers 404 not found; /v1/chat/completions answers 404"),
    ],
)
def test_a_server_that_cannot_be_asked_ends_with_1(
    root: Path, answers: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with stand_in(answers) as url:
        assert main(["verify", url, "--adapter", str(root / "legal")]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "Traceback" not in error


def test_nobody_listens(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "http://127.0.0.1:9", "--adapter", str(root / "legal")]) == 1
    assert "cannot be asked" in capsys.readouterr().err


def test_an_answer_that_never_ends_is_given_up() -> None:
    class Slow(StandIn):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):  # the client has gone
                for _ in range(200):
                    self.wfile.write(b" ")
                    time.sleep(0.02)

    does_not_end = pytest.raises(ServerError, match="does not end its answer within 1 s")
    with serving(Slow) as url, ServerClient(url, timeout=1) as server, does_not_end:
        server.models()


@pytest.mark.parametrize(
    "choice",
    [
        {"text": None, "message": None, "logprobs": None},
        {"text": 3, "message": [], "logprobs": []},
        {"message": {"content": None}, "logprobs": {"content": [None], "top_logprobs": [None]}},
        {"message": {"content": []}, "logprobs": {"content": [{"top_logprobs": [None, {"token": 1}]}]}},
        {"logprobs": {"content": [{"top_logprobs": 3}], "top_logprobs": [{"a": 10**400, "b": None}]}},
    ],
)
def test_nonsense_in_a_choice_is_no_observation(choice: dict[str, Any]) -> None:
    logprobs = {ADAPTER: [-1.0], BASE: [-1.0]}
    probes = [Probe(3, ["a"], logprobs, text="hello"), Probe(3, ["a"], logprobs, messages=[])]
    answer = (200, {"choices": [choice], "usage": []})
    with stand_in({"/v1/completions": answer, "/v1/chat/completions": answer}) as url, ServerClient(url) as server:
        assert server.ask(probes, None) == [Observation(None)] * 2


def test_a_missing_endpoint_is_told_with_its_reason(
    url: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(client.ENDPOINTS, "text", "/v1/absent")
    assert main(["verify", url, "--adapter", str(root / "legal"), "--json"]) == 0  # the chats tell
    output = capsys.readouterr()
    assert "/v1/absent was left out, it answers 404" in " ".join(output.err.split())
    assert any("answered fewer than 6" in sentence for sentence in json.loads(output.out)["evidence"])


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with stand_in(MODELS) as url, ServerClient(url) as server:
        assert server.models() == {"legal": None}


@pytest.mark.parametrize("key", ["secret\nline", "schlüssel"])
def test_what_is_no_key_is_refused_and_not_shown(
    key: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TAILORA_API_KEY", key)
    assert main(["verify", "http://127.0.0.1:9", "--adapter", str(root / "legal")]) == 2
    error = capsys.readouterr().err
    assert "TAILORA_API_KEY has" in error
    assert key[:6] not in error


def test_a_password_in_the_address_is_not_shown(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "http://me:secret@127.0.0.1:9", "--adapter", str(root / "legal")]) == 1
    assert "secret" not in capsys.readouterr().err


def test_the_model_to_ask_is_found() -> None:
    assert choose_model({}, None, "x") is None
    assert choose_model({"base": None}, None, "x") == "base"
    assert choose_model({"base": None, "a": "base"}, None, "x") == "a"
    assert choose_model({"base": None, "a": "base", "x": "base"}, None, "x") == "x"
    assert choose_model({"base": None, "a": "base"}, "a@0.5", "x") == "a@0.5"
    with pytest.raises(ConfigError, match="several models, give one by --model: base, a, b"):
        choose_model({"base": None, "a": "base", "b": "base"}, None, "x")
    with pytest.raises(ConfigError, match="--model aa: the server has base, a; did you mean a"):
        choose_model({"base": None, "a": "base"}, "aa", "x")


@pytest.mark.parametrize("url", ["ftp://x", "http://", "", "http://[::1", "http://x:99999", "x:y"])
def test_what_is_no_address_is_refused(url: str, root: Path) -> None:
    assert main(["verify", url, "--adapter", str(root / "legal")]) == 2


# ---- The command


def test_there_is_a_headline_for_every_verdict() -> None:
    assert HEADLINES.keys() == {*get_args(Verdict)}


def test_the_command_says_its_verdict(url: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verify", url, "--adapter", str(root / "legal")]
    assert main(command) == 0
    output = capsys.readouterr()
    assert "The server uses this adapter as it was trained." in output.out
    assert "as legal" in output.err
    assert "as tiny, its base" in output.err
    weights = ["verify", url, "--adapter", str(root / "legal" / ADAPTER_WEIGHTS)]
    assert main([*weights, "--base", "tinny"]) == 2
    assert "--base tinny: the server has tiny, legal" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--model", "other"]) == 4
    output = capsys.readouterr()
    assert read_passport(root / "legal").weights[ADAPTER_WEIGHTS] in "".join(output.out.split())
    assert main([*command, "--model", "legal@2", "--json"]) == 4
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["verdict"] == "scaled"
    assert result["scale"] == pytest.approx(2, abs=HALF_A_STEP)
