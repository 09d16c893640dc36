"""Reinforcement learning runs: sampled from the model in training, scored, resumed, and judged."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from command_line import save_random_adapter
from runs import run_and_collect
from tiny_run import write_rows

from tailora.data.dataset import Example, Examples, Mixture
from tailora.errors import DataError, DivergedError, MemoryLimitError, WriteError
from tailora.report.pages.train import write_train_report
from tailora.train.config_file import config_text
from tailora.train.events import Evaluated, Note
from tailora.train.grpo import DRIFT_LIMITS, advantages_of
from tailora.train.rollouts import SHOWN_PROMPTS, Prompts, Rollouts
from tailora.train.run_log import METRICS, add_metrics
from tailora.train.sampler import Sampler
from tailora.train.step import Step, StepShape
from tailora.train.trainer import Trainer, run

REWARDS = """
def ones(completions, answer, **kwargs):
    return [text.count("1") / max(len(text), 1) for text in completions]

def constant(completions, **kwargs):
    return [1.0] * len(completions)

def of_even(completions, answer, **kwargs):
    return [None if int(number) % 2 else float(len(text)) for text, number in zip(completions, answer)]

def never(completions, **kwargs):
    return [None] * len(completions)

def keyword(completions, **kwargs):
    return [float("one" in text) for text in completions]

def has_digit(completions, **kwargs):
    return [float("1" in text) for text in completions]
"""


@pytest.fixture
def grpo(settings: Any, tmp_path: Path) -> Any:
    """Makes settings of a run whose completions should consist of the letter 1."""
    rewards, data = tmp_path / "rewards.py", tmp_path / "prompts.jsonl"
    rewards.write_text(REWARDS)
    data.write_text("".join(json.dumps({"prompt": f"Count to {i}.", "answer": str(i)}) + "\n" for i in range(20)))

    def make(**changes: Any) -> Any:
        defaults = {
            "task": "grpo",
            "data": str(data),
            "reward": [f"{rewards}:ones"],
            "max_completion_length": 8,
            "num_generations": 4,
            "max_steps": 2,
            "samples": 0,
        }
        return settings(**{**defaults, **changes})

    return make


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The optimizer steps that a run takes."""
    taken, take = list[Step](), Trainer.step

    def keep(self: Trainer, step: Step, *arguments: Any) -> None:
        taken.append(step)
        take(self, step, *arguments)

    monkeypatch.setattr(Trainer, "step", keep)
    return taken


def with_reward(config: Any, name: str) -> Any:
    return config.replaced(reward=[config.reward[0].replace("ones", name)])


def metrics(folder: str) -> list[dict[str, float]]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [values for values in map(json.loads, lines) if "loss" in values]


def completions(folder: str) -> list[dict[str, Any]]:
    return [*map(json.loads, (Path(folder) / "completions.jsonl").read_text().splitlines())]


def test_padded_batches_where_there_are_no_others_and_drift_above_the_limit_are_reported_once(
    grpo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tailora.engine.continuous_batching.obstacle", lambda _: "not this model")
    monkeypatch.setitem(DRIFT_LIMITS, torch.float32, 1e-9)
    config = grpo()
    notes = [note.text for note in run_and_collect(config, Note)[1]]
    assert "using padded batches: continuous batching is not possible (not this model)" in notes
    assert all(0 < step["drift_mean"] < step["drift_max"] < 1e-4 for step in metrics(config.output_dir))
    (text,) = [note for note in notes if "sampling and training differ" in note]
    assert re.match(r"sampling and training differ by \S+e-\d+ nats per token", text)


def test_the_reward_rises_and_the_best_adapter_is_kept(grpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards, weights = dict[int, float](), dict[int, dict[str, torch.Tensor]]()
    evaluate = Rollouts.evaluate

    def planned(self: Rollouts, examples: Any, step: int, progress: Any) -> Any:
        evaluation = evaluate(self, examples, step, progress)
        rewards[step] = -evaluation.loss
        return replace(evaluation, sums=evaluation.sums - (5.0 if step == 5 else 0.0))  # a higher reward

    def keep(event: Any) -> None:
        if isinstance(event, Evaluated):
            state = trainer.run.model.lora_layers.state_dict()
            weights[event.step] = {name: value.clone() for name, value in state.items()}

    monkeypatch.setattr(Rollouts, "evaluate", planned)
    config = grpo(eval_steps=5, max_steps=10, learning_rate=2e-2, temperature=0.9, max_completion_length=12)
    with ExitStack() as stack:
        trainer = Trainer(config, stack, keep)
        result = trainer.train()
    assert rewards[10] > rewards[0] + 0.1
    assert all(0 < step["drift_mean"] < step["drift_max"] < 1e-4 for step in metrics(config.output_dir))  # nats
    assert result.best_step == 5
    assert -result.eval_loss_after > 5
    for name, value in result.model.lora_layers.state_dict().items():
        assert value.equal(weights[5][name])
    assert any(not value.equal(weights[10][name]) for name, value in weights[5].items())


def test_a_resumed_run_gives_the_same_bytes_and_logs_the_same_samples(grpo: Any) -> None:
    shared = {"eval_steps": 2, "save_steps": 2, "save_total_limit": 3, "num_iterations": 2, "beta": 0.01}
    config = grpo(max_steps=4, learning_rate=2e-2, **shared)
    run(config)
    files = [Path(config.output_dir) / name for name in ("completions.jsonl", "adapter/adapter_model.safetensors")]
    whole, lines = [file.read_bytes() for file in files], completions(config.output_dir)
    assert ["drift_mean" in step for step in metrics(config.output_dir)] == [True, False] * 2
    run(config.replaced(resume_from_checkpoint=f"{config.output_dir}/checkpoint-2"))
    assert [file.read_bytes() for file in files] == whole
    held_out = [line for line in lines if "held_out" in line]
    assert [line["step"] for line in held_out] == [0, 2, 4]
    prompts = [[sample["prompt"] for sample in line["held_out"]] for line in held_out]
    assert prompts == [prompts[0]] * len(prompts)
    assert len(prompts[0]) == SHOWN_PROMPTS
    groups = [line for line in lines if "advantage" in line]
    assert [line["step"] for line in groups] == [1, 3]
    for line in groups:
        best, worst = (text.count("1") / max(len(text), 1) for text in (line["best"], line["worst"]))
        assert (best, worst) == (max(line["rewards"]), min(line["rewards"]))


@pytest.mark.exhaustive  # evaluation/test_rewards.py has the rules
@pytest.mark.parametrize(
    ("reward", "start", "says"),
    [
        ("keyword", "The reward may be gamed (keyword): these rewards that", "The held-out reward rose by"),
        ("ones", "The held-out reward rose by", "These metrics rose with it: has_digit"),
    ],
)
def test_the_verdict_names_a_gamed_reward(grpo: Any, reward: str, start: str, says: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "many.jsonl", ({"prompt": f"Count to {i}.", "answer": str(i)} for i in range(60)))
    config = with_reward(grpo(max_steps=8, learning_rate=2e-2, num_generations=8, max_completion_length=8), reward)
    judge = [config.reward[0].replace(reward, "has_digit")]
    run(config.replaced(data=str(data), metric=judge, validation_split=0.5))
    verdict = str(write_train_report(Path(config.output_dir))["verdict"])
    assert verdict.startswith(start)
    assert says in verdict


def test_kl_is_that_of_the_completions_from_the_base(
    grpo: Any, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter is trained further: the base is still the model without it."""
    samples, sample = [], Sampler.sample

    def keep(*arguments: Any) -> Any:
        samples.append(sample(*arguments))
        return samples[-1]

    save_random_adapter(tmp_path / "first", model_folder)
    monkeypatch.setattr(Sampler, "sample", keep)
    config = grpo(learning_rate=2e-2, temperature=0.8, adapter=str(tmp_path / "first"), r=16)
    with ExitStack() as stack:
        trainer = Trainer(config, stack)
        result = trainer.train()
    for evaluation, completions in ((result.before, samples[0]), (result.after, samples[-1])):
        scores = dict(zip(trainer.run.task.score_names, evaluation.scores.swapaxes(0, 1), strict=True))
        kl = (scores["kl"] * scores["completion_tokens"].mean(1, keepdims=True)).reshape(-1)
        assert len(completions) == len(kl)
        for completion, log_ratio in zip(completions, kl, strict=True):
            of_base = plain_log_probability(result.model, completion, 0.8)
            assert log_ratio == pytest.approx(sum(completion.log_probabilities) - of_base, abs=1e-4)
        assert not np.allclose(kl, 0, atol=1e-4)


def plain_log_probability(model: Any, completion: Any, temperature: float) -> float:
    """Returns log p(completion) of the model without its adapter."""
    prompt, ids = completion.prompt.ids, completion.ids
    with torch.no_grad(), model.disable_adapter():
        logits = model(torch.tensor([[*prompt, *ids]], device=model.device)).logits[0, len(prompt) - 1 : -1].cpu()
    log_p = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
    return float(log_p.sum())


def test_groups_with_equal_rewards_are_counted_and_train_nothing(
    grpo: Any, steps: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it, a rank without held-out prompts evaluates."""
    config = with_reward(grpo(max_steps=1, per_device_train_batch_size=2, metric=grpo().reward), "constant")
    before, evaluations = dict[str, torch.Tensor](), list[Any]()

    def keep(model: Any, *_: Any) -> None:
        before.update({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        rollouts, held_out = trainer.run.rollouts, trainer.run.data.held_out
        assert rollouts is not None
        assert held_out is not None
        other = dict.fromkeys(rollouts.task.score_names, np.full((1, 4), 0.5))
        state = SimpleNamespace(process_index=1, num_processes=2, is_main_process=False)
        with monkeypatch.context() as patch:
            patch.setattr("tailora.train.rollouts.PartialState", lambda: state)
            patch.setattr("tailora.train.rollouts.gather_object", lambda own: [other, *own])
            evaluations.append(rollouts.evaluate(held_out.select(np.array([0])), 0, lambda *_: None))

    with ExitStack() as stack:
        trainer = Trainer(config, stack)
        result = trainer.train(keep)
    assert evaluations[0].loss == -0.5
    assert (evaluations[0].scores == 0.5).all()
    (step,) = metrics(config.output_dir)
    assert step["equal_groups"] == 1
    assert sum(map(len, steps[0].micro_batches)) == 1  # there is no step without a forward
    assert step["reward/ones"] >= 0
    assert all((p == before[name]).all() for name, p in result.model.named_parameters() if name in before)


def test_a_step_whose_completions_are_all_truncated_changes_nothing(grpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, truncate = Sampler.sample, partial(replace, is_truncated=True)
    monkeypatch.setattr(Sampler, "sample", lambda *arguments: [*map(truncate, sample(*arguments))])
    config = grpo(loss="dapo", mask_truncated_completions=True, max_steps=1, validation_split=0)
    run(config)
    (step,) = metrics(config.output_dir)
    assert (step["truncated"], step["loss"], step["grad_norm"]) == (1, 0, 0)


def test_without_a_token_limit_a_forward_has_at_most_the_tokens_of_a_group(
    grpo: Any, monkeypatch: pytest.MonkeyPatch, steps: list[Step]
) -> None:
    monkeypatch.setattr("tailora.train.step.token_limit", lambda _: None)
    with ExitStack() as stack:
        trainer = Trainer(grpo(gradient_accumulation_steps=2, max_completion_length=12), stack)
        trainer.train()
    data = trainer.run.data
    assert data.prompts is not None
    assert len(data.largest) == 4
    assert data.largest_tokens == data.prompts.tokens_of_group
    for step in steps:
        assert len(step.micro_batches) > 1
        assert all(sum(len(e.input_ids) for e in part) <= data.largest_tokens for part in step.micro_batches)


def test_held_out_prompts_without_rewards_are_left_out_of_the_mean(grpo: Any) -> None:
    notes: list[str] = []
    with ExitStack() as stack:
        trainer = Trainer(
            with_reward(grpo(validation_split=0.5, max_steps=1), "of_even"),
            stack,
            lambda event: notes.append(event.text) if isinstance(event, Note) else None,
        )
        result = trainer.train()
    prompts = trainer.run.data.prompts
    assert prompts is not None
    missing = sum(int(prompt.columns["answer"]) % 2 for prompt in prompts.data.eval_samples)
    assert 0 < missing < 10
    note = f"{missing} of 10 held-out prompts are left out of the mean reward: all of their completions got None"
    assert notes.count(note) == 1
    for evaluation in (result.before, result.after):
        assert evaluation is not None
        assert evaluation.scores is not None
        assert np.isnan(evaluation.scores[:, 0]).all(1).sum() == missing
        assert evaluation.loss == pytest.approx(-np.nanmean(evaluation.scores[:, 0]))


def test_held_out_prompts_need_a_reward(grpo: Any) -> None:
    with pytest.raises(DataError, match=r"None for all completions of all held-out prompts.*--eval-data"):
        run(with_reward(grpo(), "never"))


def test_running_out_of_memory_is_not_called_divergence(grpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def next_tokens(*_: Any) -> list[int]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def fail(*_: Any) -> None:
        for engine in ("continuous_batching", "padded_batching"):
            monkeypatch.setattr(f"tailora.engine.{engine}.next_tokens", next_tokens)

    expected = (
        r"out of memory while sampling completions: sampling failed: .*out of memory.*\nwhat helps: a lower --max-"
    )
    with pytest.raises(MemoryLimitError, match=expected):
        run(grpo(), on_ready=fail)


def test_logits_that_are_not_finite_are_divergence(grpo: Any) -> None:
    def overflow(model: Any, *_: Any) -> None:
        model.base_model.get_output_embeddings().weight.data.fill_(float("inf"))

    with pytest.raises(DivergedError, match="the logits of a completion are not finite, before any training; try a"):
        run(grpo(), on_ready=overflow)


def test_a_run_that_can_no_longer_sample_keeps_its_last_good_weights(
    grpo: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sample, config = Sampler.sample, grpo(eval_steps=0, output_dir=str(tmp_path / "out"))

    def fail_later(sampler: Sampler, *arguments: Any) -> Any:
        if getattr(sampler, "calls", 0) == 3:  # before training, and for two steps
            raise DivergedError("the logits of a completion are not finite")
        sampler.calls = getattr(sampler, "calls", 0) + 1  # type: ignore[attr-defined]
        return sample(sampler, *arguments)

    monkeypatch.setattr(Sampler, "sample", fail_later)
    with pytest.raises(
        DivergedError, match=r"after step 2: the logits of a completion are not finite\. the last weights"
    ):
        run(config)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["diverged"]
    assert (tmp_path / "out" / "adapter").is_dir()


@pytest.mark.parametrize(
    ("dtype", "generations", "sampled"),
    [("bfloat16", 4, 40), pytest.param("float32", 10, 64, marks=pytest.mark.exhaustive)],
)
def test_the_cache_is_as_large_as_planned(grpo: Any, dtype: str, generations: int, sampled: int) -> None:
    config = grpo(dtype=dtype, validation_split=0.5, num_generations=generations, max_completion_length=40)
    with ExitStack() as stack:
        trainer = Trainer(config, stack)
        rollouts, base = trainer.run.rollouts, trainer.run.base
        assert rollouts is not None
        engine: Any = rollouts.sampler._engine
        assert engine.max_requests == sampled
        cache = engine._manager.batch_processor.cache.cache_tensor
        assert cache.nbytes == rollouts.prompts.cache_bytes(base.config, base.dtype)


def test_prompts_of_a_source_with_a_weight_appear_as_often() -> None:
    examples = replace(
        Examples.of([Example.of_text(np.arange(2, dtype=np.int32))] * 3), mixture=Mixture((1, 2), (2, 1))
    )
    config: Any = SimpleNamespace(seed=0)
    prompts = Prompts(config, StepShape(4, 1), SimpleNamespace(train=examples), [], [])
    for number in range(3):
        assert sorted(prompts.of_step(number)) == [0, 0, 1, 2]


def test_advantages() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [3.0, np.nan, 1.0, 2.0]])
    std = np.std([1, 0, 0, 1], ddof=1)
    expected = np.array([0.5, -0.5, -0.5, 0.5])
    np.testing.assert_allclose(advantages_of(rewards, "grpo")[0], expected / (std + 1e-4))
    np.testing.assert_array_equal(advantages_of(rewards, "grpo", "none")[2], [1, 0, -1, 0])
    np.testing.assert_allclose(advantages_of(rewards, "rloo")[0], [2 / 3, -2 / 3, -2 / 3, 2 / 3])
    np.testing.assert_allclose(advantages_of(rewards, "rloo")[2], [1.5, 0, -1.5, 0])
    for loss in ("grpo", "rloo"):
        np.testing.assert_array_equal(advantages_of(rewards, loss)[1], 0)
        for scale in ("group", "batch", "none"):  # the mean of six times 0.1 is rounded
            np.testing.assert_array_equal(advantages_of(np.full((1, 6), 0.1), loss, scale), 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "match no known schema of --task grpo.\nKnown: prompts (messages or prompt)"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "expected a prompt, but it ends with a reply"),
        ({"prompt": "a" * 2000}, "tokens; expected 1 to 1,024"),
    ],
)
def test_rows_that_are_no_prompts_are_refused(grpo: Any, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=re.escape(message)) as raised:
        run(grpo(data=str(file), validation_split=0))
    assert "wrong.jsonl" in str(raised.value)


def hostile_completions(random: np.random.Generator) -> list[str]:
    """One of each kind: they take too much time or memory, or break parsers."""
    n = int(random.integers(20, 60))
    return [
        "9**9**9**9" + "**9" * (n % 3),
        rf"\\boxed{{{n}^{{{n}^{{{n}^{{9}}}}}}}}",
        rf"\\boxed{{{n}00000000!}}",
        rf"\\boxed{{\\binom{{10^{n}}}{{5*10^{n - 1}}}}}",
        "(" * 100 * n + "1" + ")" * 100 * n,
        "a" * n * 3 + "b",  # for (a|aa)+$
        json.dumps("a" * n * 2 + "b"),  # for a pattern of a schema
        json.dumps([{str(i): i} for i in range(100 * n)]),  # for uniqueItems
        "[" * 1000 * n,
        "1e999",
        "NaN",
        "1" * 5000,
        "\0\ud800",
        "",
        "x" * 10_000 * n,
    ]


@pytest.mark.exhaustive
def test_two_thousand_steps_with_hostile_completions_end_as_usual(
    grpo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the completions are hostile; a function hangs on one of 200."""
    monkeypatch.setattr("tailora.train.rewards.BUILT_IN_SECONDS", 0.05)
    schema, file = tmp_path / "schema.json", tmp_path / "hostile.py"
    schema.write_text('{"pattern": "^(a|a)*$", "uniqueItems": true}')
    file.write_text("import time\ndef slow(completions, **_):\n    if '' in completions:\n        time.sleep(9)\n"
                    "    return [float(len(text) % 7) for text in completions]\n")  # fmt: skip
    random, sample, seen = np.random.default_rng(0), Sampler.sample, Counter[int]()

    def replaced(*arguments: Any) -> list[Any]:
        samples = sample(*arguments)
        for number in range(0, len(samples), 2):
            kind = int(random.integers(15))
            kind = 0 if kind == 13 and random.random() > 0.1 else kind
            seen[kind] += 1
            samples[number] = replace(samples[number], text=hostile_completions(random)[kind])
        return samples

    monkeypatch.setattr(Sampler, "sample", replaced)
    sources = ["math", "regex:(a|aa)+$", f"json_schema:{schema}", f"{file}:slow"]
    data = tmp_path / "prompts.jsonl"
    config = grpo(
        reward=sources,
        data=str(data),
        max_steps=2000,
        max_completion_length=2,
        reward_seconds=0.2,
    )
    result = run(config.replaced(num_generations=2, per_device_train_batch_size=1, eval_steps=0, validation_split=0))
    assert result.steps == 2000
    assert len(seen) == 15
    metrics = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert sum(step.get("over_limit", 0) for step in metrics) > 100
    assert all(math.isfinite(step["loss"]) for step in metrics if "loss" in step)


STOPPED = """
import os, signal, subprocess, sys, time

way, ready = os.environ["WAY"], os.environ["READY"]
for own_session in (False, True):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=own_session)

def wait():
    open(ready, "w").close()
    if "compute" in way:
        9**9**9**9
    time.sleep(600)

if "import" in way:
    wait()

def score(completions, **_):
    if way == "raise":
        raise ValueError
    if way == "exit":
        os._exit(3)
    if way != "end":
        wait()
    return [1.0] * len(completions)
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "way",
    [
        *("end", "raise", "exit", "SIGINT import", "SIGINT sleep", "SIGTERM compute", "SIGHUP compute"),
        *("SIGKILL sleep", "SIGKILL compute", "SIGKILL import"),
    ],
)
def test_no_process_is_left_however_a_run_stops(grpo: Any, way: str, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(STOPPED)
    ready, environment = tmp_path / "ready", {"WAY": way, "READY": str(tmp_path / "ready")}
    seconds = 5 if "SIGHUP" in way else 600  # a second SIGHUP changes nothing, so the function must end
    config = grpo(reward=[f"{tmp_path}/rewards.py:score"], max_steps=1, reward_seconds=seconds)
    (tmp_path / "run.yaml").write_text(config_text(config.model_dump(exclude_unset=True)))
    command = [sys.executable, "-P", "-m", "tailora", "train", "--config", str(tmp_path / "run.yaml")]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=log, stderr=log, start_new_session=True
        )
    signals = [getattr(signal, way.split()[0])] * 2 if way.startswith("SIG") else []  # the first one waits for the step
    end = time.monotonic() + 120
    while signals and not ready.exists():
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < end
        time.sleep(0.1)
    started = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    for number in signals:
        process.send_signal(number)
        time.sleep(0.5)
    try:
        code = process.wait(120)
    finally:
        process.kill()
    assert (code == 0) == (way == "end"), (tmp_path / "log").read_text()
    assert len(started) >= 4 * bool(signals)  # the function's process, its guard, and two that it started
    while left := [child for child in psutil.process_iter() if environment["READY"] == ready_of(child)]:
        assert time.monotonic() < end, left
        time.sleep(0.1)


def ready_of(process: psutil.Process) -> str | None:
    """Returns the file that a process of a test inherited the name of, unless it has ended."""
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else process.environ().get("READY")
    except psutil.Error:
        return None


def test_a_full_disk_is_reported_with_the_file(tmp_path: Path) -> None:
    (tmp_path / METRICS).symlink_to("/dev/full")
    with pytest.raises(WriteError, match=rf"cannot write {tmp_path}/metrics.jsonl: No space left on device; free some"):
        add_metrics(tmp_path, METRICS, step=1)
