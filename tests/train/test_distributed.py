"""Two processes on one machine: the adapter, the held-out loss and the files are those of one process."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from runs import changed
from safetensors.torch import load_file
from tiny import tiny_model
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel

from tailora.cli.train import answer_prompts
from tailora.errors import CheckpointError, ConfigError, DataError
from tailora.study.plan import plan
from tailora.train.config import TrainConfig
from tailora.train.failures import FailureWatch
from tailora.train.model_loading import load_base
from tailora.train.parallel import Sharding, own_process_group
from tailora.train.setup import start_accelerator
from tailora.train.trainer import run

pytestmark = pytest.mark.ranks
LONGEST = 600  # s; some 15 on an idle machine, 150 for the exhaustive test
WORKER = """
import functools, json, sys, warnings
from contextlib import nullcontext, suppress
from unittest import mock
import torch
torch.set_num_threads(1)
from tailora.train import kernel_choice, kernel_comparison
from tailora.train.config import TrainConfig
from tailora.errors import DivergedError, ProcessFailedError
from tailora.train import trainer as trainer_file
from tailora.train.launch import end_process
from tailora.train.trainer import Trainer, run
from tailora.cli.train import RunFlags, train as train_command

warnings.simplefilter("error", UserWarning)
torch.distributed.init_process_group("gloo")  # which the runs use, and leave
rank = torch.distributed.get_rank()
kernel_choice.CompiledLayers = functools.partial(kernel_choice.CompiledLayers, backend="aot_eager")
obstacle_to_compiling = kernel_choice.obstacle_to_compiling
LACKING = {  # case -> what the second rank cannot do, and the first can
    "sharded, one rank packs": mock.patch.dict(
        kernel_comparison.TOLERANCES, {"packed logits": (-1.0, -1.0, -1.0)}
    ),
    "sharded, one rank splits the loss": mock.patch.dict(kernel_comparison.TOLERANCES, {"loss": (-1.0, -1.0, -1.0)}),
}

def break_norm(model, *_):
    if rank == 1:
        model.get_decoder().norm.register_forward_hook(lambda norm, inputs, output: output * float("nan"))

def broken_loss(*arguments, broken_loss=trainer_file.broken_loss):
    cause = broken_loss(*arguments)
    tell(f"cause on rank {rank}: {cause}")
    return cause

def tell(line):  # in one write: the ranks share the pipe
    sys.stdout.write(line + "\\n")
    sys.stdout.flush()

def held_bytes(parameter):
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).nbytes

def save_model(self, *, compare=False, save=Trainer.save_model):
    may_gather = compare or self.config.method == "full"
    with nullcontext() if may_gather else mock.patch("torch.distributed.tensor.DTensor.full_tensor", None):
        save(self, compare=compare)

trainer_file.broken_loss = broken_loss
Trainer.save_model = save_model
trainers, train = [], Trainer.train
Trainer.train = lambda self, *ready: (trainers.append(self), train(self, *ready))[1]
for name, settings in json.loads(sys.argv[1]).items():
    config = TrainConfig(**settings)
    lacks_compiler = rank == 1 and config.fast != "compile"
    obstacles = (lambda *_: "the second machine has no compiler"), obstacle_to_compiling
    kernel_choice.obstacle_to_compiling = obstacles[0] if lacks_compiler else obstacles[1]
    if name in ("sharded", "full, sharded, resumed from one process"):
        train_command(given=RunFlags(json=True), flags={}, defaults=settings)
    elif "broken" in name:
        with suppress(DivergedError, ProcessFailedError):
            run(config, on_ready=break_norm)
    else:
        with LACKING.get(name, nullcontext()) if rank else nullcontext():
            run(config)
    trainer = trainers.pop()
    tell(f"{name} on rank {rank}: {sum(map(held_bytes, trainer.run.base.parameters()))} bytes of the base")
    for buffer in (buffer for buffer in trainer.run.updates.buffers if not buffer.sharded):
        of_first = buffer.parameter.detach().clone()
        torch.distributed.broadcast(of_first, src=0)
        assert torch.equal(of_first, buffer.parameter)
torch.distributed.destroy_process_group()
end_process(0)  # gloo's threads can abort a process that ends by itself
"""
SHARED = {"num_train_epochs": 5, "per_device_train_batch_size": 3, "eval_steps": 9, "save_steps": 9}  # 20 steps
FULL = {"method": "full", "learning_rate": 1e-3, "r": 16}
SLOTS = {"use_dora": True, "learn_scaling": True, "modules_to_save": ["lm_head"]}
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": FULL,
    "full, sharded": {"fsdp": True, **FULL},
    "sharded": {"fsdp": True},
    "sharded, with all slots": {"fsdp": True, "gradient_checkpointing": True, "fast": "off", **SLOTS},
    # one rank evaluates 3 examples, the other 2, and has to take part in the third forward
    "sharded, evaluated unevenly": {
        "fsdp": True,
        "per_device_train_batch_size": 1,
        "validation_split": 1 / 6,
        "max_steps": 20,
    },
    "sharded, resumed from one process": {"fsdp": True},
    "full, sharded, resumed from one process": {"fsdp": True, **FULL},
    "dpo": {"data": "pairs"},
    "grpo": {
        "task": "grpo",
        "data": "prompts",
        "reward": ["max_length:10", "regex:.*[aeiou]=0.5"],
        "max_steps": 20,
        "num_generations": 4,
        "max_completion_length": 8,
        "scale_rewards": "batch",
    },
    "kto, sharded": {"data": "feedback", "fsdp": True},
    "sharded, one rank packs": {"fsdp": True},
    "sharded, one rank splits the loss": {"fsdp": True},
}
RESUMED = [case for case in CASES if "resumed" in case]
IN_ONE = {"fsdp": False, "gradient_accumulation_steps": 2}


class Ranks(NamedTuple):
    folder: Path  # the output of each case is in a folder of its name
    process: "subprocess.CompletedProcess[str]"

    def bytes_of_base(self, case: str) -> list[int]:
        return [int(number) for number in re.findall(rf"^{case} on rank \d: (\d+) bytes", self.process.stdout, re.M)]


def train_on_ranks(count: int, configs: dict[str, TrainConfig], folder: Path, program: str = WORKER) -> Ranks:
    """One start of several processes, which train every case. By default they compare what they trained."""
    script = folder / "worker.py"
    script.write_text(program)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]  # on a free port
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    settings = json.dumps({name: config.model_dump(exclude_unset=True) for name, config in configs.items()})
    command = [sys.executable, "-m", *launcher, str(script), settings]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=LONGEST)
    assert process.returncode == 0, process.stderr
    return Ranks(folder, process)


def check_close(one: Path, other: Path, *, file: str, atol: float = 1e-6) -> None:
    """Checks that both folders have the same tensors in this file, up to rounding."""
    expected, tensors = (load_file(folder / file) for folder in (one, other))
    assert expected.keys() == tensors.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def settings_of(
    pairs_file: Path, feedback_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """Returns the settings of a case, with the files of its data."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Count to {number}."}}\n' for number in range(20)))
    files = {"pairs": str(pairs_file), "feedback": str(feedback_file), "prompts": str(prompts)}

    def settings_of(case: str) -> dict[str, Any]:
        settings = {**SHARED, **CASES[case]}
        return {**settings, "data": files[settings["data"]]} if "data" in settings else settings

    return settings_of


@pytest.fixture(scope="module")
def two_ranks(make_settings: Any, settings_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("ranks")
    configs = {name: make_settings(output_dir=str(folder / name), **settings_of(name)) for name in CASES}
    diverging = {"fsdp": True, "validation_split": 0, "max_steps": 1, "gradient_accumulation_steps": 2}
    configs["broken on one rank"] = make_settings(output_dir=str(folder / "broken"), **diverging)
    for case in RESUMED:
        one = make_settings(output_dir=str(folder / f"one, {case}"), **{**SHARED, **CASES[case], **IN_ONE})
        run(one)
        configs[case] = changed(configs[case], resume_from_checkpoint=f"{one.output_dir}/checkpoint-9")
    return train_on_ranks(2, configs, folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_what_one_does(case: str, two_ranks: Ranks, settings: Any, settings_of: Any) -> None:
    one = settings(**{**settings_of(case), **IN_ONE})
    two = two_ranks.folder / case
    result = run(one)
    file = "model/model.safetensors" if case.startswith("full") else "adapter/adapter_model.safetensors"
    for name in (file, "checkpoint-18/adapter.safetensors"):
        check_close(Path(one.output_dir), two, file=name)
    record = json.loads((two / "run.json").read_text())
    assert (record["processes"], record["finished"]) == (2, True)
    if case == "lora":
        assert "compiled layers: the second machine has no compiler" in record["kernels"]  # on the first neither
    for name in ("steps", "train_tokens", "supervised_tokens", "best_step"):
        assert record["result"][name] == getattr(result, name)
    assert record["result"]["eval_loss_after"] == pytest.approx(result.eval_loss_after, abs=1e-6)
    lines, expected = (
        [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
        for folder in (two, Path(one.output_dir))
    )
    first = 10 if case in RESUMED else 1
    assert [line["step"] for line in lines] == list(range(first, result.steps + 1))
    last = 15 if case == "grpo" else len(lines)  # on some processors, rounding changes a token that is sampled later
    for number in ("loss", "grad_norm"):  # which shows a gradient that is too large; AdamW divides by its size
        values = [line[number] for line in expected[first - 1 :]]
        assert [line[number] for line in lines[:last]] == pytest.approx(values[:last], rel=1e-5, abs=1e-6)
    assert sorted(path.name for path in (two / "checkpoint-18").glob("random-*")) == [
        "random-0.safetensors",
        "random-1.safetensors",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        ("sharded, one rank packs", "sdpa with a padding mask"),
        ("sharded, one rank splits the loss", "loss: from the model's own logits"),
    ],
)
def test_all_ranks_compute_as_every_rank_can(case: str, kernels: str, two_ranks: Ranks) -> None:
    record = json.loads((two_ranks.folder / case / "run.json").read_text())
    assert kernels in record["kernels"]
    assert record["packed"] == ("packs" not in case)


@pytest.mark.slow
def test_every_rank_names_the_module_that_broke_on_one(two_ranks: Ranks) -> None:
    causes = re.findall(r"cause on rank \d: (.*)", two_ranks.process.stdout)
    assert causes == ["the loss is not finite; the first module with non-finite output is model.norm"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sharded", "full, sharded, resumed from one process"])
def test_ranks_answer_together_and_only_the_first_writes_and_prints(case: str, two_ranks: Ranks, settings: Any) -> None:
    one, two = settings(**{**SHARED, **CASES[case], **IN_ONE}), two_ranks.folder / case
    answers = json.loads(json.dumps([asdict(answer) for answer in answer_prompts(run(one), one)[0]]))
    assert json.loads((two / "samples.json").read_text()) == answers
    assert answers
    assert all(answer["base"] != answer["tuned"] for answer in answers)
    assert two_ranks.process.stdout.count(f'"output_dir": "{two}"') == 1
    assert (two / "report.html").exists()


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(two_ranks: Ranks, settings: Any) -> None:
    stopped, notes = two_ranks.folder / "sharded", list[str]()
    one = settings(**SHARED, gradient_accumulation_steps=2, resume_from_checkpoint=str(stopped / "checkpoint-9"))
    with pytest.raises(CheckpointError, match="the same steps on 1 processes, use --gradient-accumulation-steps 2"):
        run(changed(one, gradient_accumulation_steps=3))
    run(one, lambda event: notes.append(getattr(event, "text", "")))
    assert "resuming with 1 processes instead of 2: the steps are the same" in notes  # there is no dropout
    check_close(Path(one.output_dir), stopped, file="adapter/adapter_model.safetensors")


@pytest.mark.slow
def test_a_rank_holds_half_of_the_decoder_layers(two_ranks: Ranks, model_folder: Path) -> None:
    weights = load_file(model_folder / "model.safetensors")
    layers = sum(tensor.nbytes for name, tensor in weights.items() if ".layers." in name)
    whole = sum(tensor.nbytes for tensor in weights.values())
    assert two_ranks.bytes_of_base("lora") == [whole, whole]
    assert two_ranks.bytes_of_base("sharded") == [whole - layers // 2] * 2


SCRIPT = """
import atexit, json, sys
import torch.distributed
atexit.register(lambda: print(f"open at the end: {torch.distributed.is_initialized()}\\n", end=""))
from tailora.train.config import TrainConfig
from tailora.train.trainer import run

for settings in json.loads(sys.argv[1]).values():
    result = run(TrainConfig(**settings))
result.model(input_ids=torch.zeros(1, 2, dtype=torch.long))
"""


@pytest.mark.slow
def test_a_script_runs_twice_uses_the_sharded_model_and_ends_the_group_at_its_end(
    make_settings: Any, tmp_path: Path
) -> None:
    configs = {
        name: make_settings(output_dir=str(tmp_path / name), max_steps=1, fsdp=name == "sharded")
        for name in ("copied", "sharded")
    }
    assert train_on_ranks(2, configs, tmp_path, SCRIPT).process.stdout.count("open at the end: False") == 2


@pytest.mark.parametrize("fails", [False, True])
def test_the_group_of_a_failed_run_stays_open_until_the_error_is_shown(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With NCCL its end may wait for the other ranks."""
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    with suppress(DataError), own_process_group():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        if fails:
            raise DataError("row 7 is broken")
    assert dist.is_initialized() == fails
    for function in at_exit:
        function()
    assert not dist.is_initialized()


@pytest.fixture
def second_of_three() -> Iterator[None]:
    """This process takes itself for the second of three, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("second_of_three")
def test_a_rank_reads_its_own_rows_of_the_files(model_folder: Path) -> None:
    devices = []

    class Recorded(Sharding):
        def shard(self, base: PreTrainedModel) -> None:
            devices.append(base.device.type)
            super().shard(base)

    model, _ = load_base(str(model_folder), "float32", sharding=Recorded(torch.device("cpu")))
    assert devices == ["meta"]
    files = load_file(model_folder / "model.safetensors")
    parameters = dict(model.named_parameters())
    sharded = [name for name, parameter in parameters.items() if isinstance(parameter, DTensor)]
    assert {name for name in parameters if ".layers." in name} == set(sharded)
    for name, parameter in parameters.items():
        rows = files[name].chunk(3)[1] if name in sharded else files[name]
        assert torch.equal(parameter.to_local() if name in sharded else parameter, rows), name
    again, _ = load_base(str(model_folder), "float32")
    assert not any(isinstance(parameter, DTensor) for parameter in again.parameters())


@pytest.mark.usefixtures("second_of_three")
def test_a_rank_without_experts_is_refused() -> None:
    model = tiny_model("Qwen3MoeForCausalLM", num_local_experts=4)  # two for each of two ranks, none for the third
    with pytest.raises(ConfigError, match=r"share of the 4 experts of .*; use a number of processes that divides 4"):
        Sharding(torch.device("cpu")).shard(model)


@pytest.mark.usefixtures("second_of_three")
def test_a_decoder_whose_output_is_a_view_is_sharded_without_a_warning() -> None:
    model, filters = tiny_model("GPT2LMHeadModel"), list(warnings.filters)
    Sharding(torch.device("cpu")).shard(model)
    states = model.get_decoder()(torch.zeros(1, 2, dtype=torch.long))[0]
    assert states.requires_grad
    assert not states._is_view()
    assert warnings.filters == filters


STORED = [
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, in 8 bits"),
    ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao"),
]


@pytest.mark.parametrize(("stored", "method"), STORED)
def test_a_base_whose_scales_would_be_lost_is_refused_before_it_is_loaded(
    stored: dict[str, Any], method: str, settings: Any, model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "quantized"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    refusal = f"is quantized as {method}, and FSDP2 would lose the scales"
    with pytest.raises(ConfigError, match=refusal):
        load_base(str(folder), "float32", sharding=Sharding(torch.device("cpu")))
    with pytest.raises(ConfigError, match=refusal):
        plan(settings(model=str(folder), fsdp=True), nproc=2)
    with pytest.raises(ConfigError, match="is quantized as int8, and FSDP2"):
        load_base(str(model_folder), "float32", quantize="int8", sharding=Sharding(torch.device("cpu")))


PRODUCT: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.1},
    "dropout, transformers' layers": {"lora_dropout": 0.1, "fast": "off", "gradient_checkpointing": True},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 3},
    "padded": {"packing": "off"},
    "compiled": {"fast": "compile", "max_steps": 4},
    "bfloat16": {"dtype": "bfloat16"},
    "slots": SLOTS,
    "copies of a layer's modules": {"modules_to_save": ["input_layernorm", "down_proj"], "target_modules": ["q_proj"]},
    **{init: {"init_lora_weights": init} for init in ("pissa", "olora", "eva")},
}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": {},
    "GPT2LMHeadModel": {},
    "Gemma3ForCausalLM": {},
    "MambaForCausalLM": {},
    "LlamaForCausalLM": {"quantize": "nf4", "use_dora": True},
}
WAYS: dict[str, dict[str, Any]] = {"copied": {}, "sharded": {"fsdp": True}}


def save_tiny(architecture: str, model_folder: Path, folder: Path) -> str:
    """Writes a tiny model with the tokenizer of `model_folder`; returns its path."""
    path = folder / f"model {architecture}"
    shutil.copytree(model_folder, path)
    sizes = {"vocab_size": 320, "hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    experts = {"num_local_experts": 12} if "Moe" in architecture else {}  # for 2, 3 and 4 ranks
    tiny_model(architecture, **sizes, **experts).save_pretrained(path)
    return str(path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_sharded_base_trains_what_a_copied_one_does(
    ranks: int, make_settings: Any, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter has the same bits. 3 ranks shard the 32 rows of most weights unevenly.

    And one process trains the same adapter, without compiled layers.
    """
    monkeypatch.setenv("TAILORA_HOME", str(tmp_path / "home"))
    models = {name: {"model": save_tiny(name, model_folder, tmp_path), **changes} for name, changes in MODELS.items()}
    adapters = {**PRODUCT, **models}
    shared = {**SHARED, "num_train_epochs": 2, "eval_steps": 2}
    configs = {
        f"{case}/{way}": make_settings(
            output_dir=str(tmp_path / case / way), **{**shared, **adapters[case], **WAYS[way]}
        )
        for case, way in product(adapters, WAYS)
    }
    train_on_ranks(ranks, configs, tmp_path)
    for case, way in product(adapters, WAYS):
        files = [tmp_path / case / kind / "adapter/adapter_model.safetensors" for kind in ("copied", way)]
        assert files[0].read_bytes() == files[1].read_bytes(), (case, way)
    for case in ("plain", "compiled"):
        one = {**shared, **PRODUCT[case], "fast": "off", "gradient_accumulation_steps": ranks}
        run(make_settings(output_dir=str(tmp_path / "one" / case), **one))
        folders = [folder / case for folder in (tmp_path / "one", tmp_path)]
        check_close(folders[0] / "adapter", folders[1] / "copied/adapter", file="adapter_model.safetensors", atol=1e-5)


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed", "megatron_lm"])
def test_engines_that_accelerate_would_bring_are_refused(
    engine: str, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
    with pytest.raises(ConfigError, match=f"launch without --use_{engine}"):
        start_accelerator(settings())


def test_one_process_has_nothing_to_shard(settings: Any) -> None:
    with pytest.raises(ConfigError, match="across processes, but only one runs"):
        start_accelerator(settings(fsdp=True))


def test_a_failure_is_not_that_of_the_next_run_in_the_same_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    store = dist.HashStore()
    first = [FailureWatch(store, rank) for rank in range(2)]
    assert first[1].report(DataError("row 7 is broken")).rank == 1
    assert first[0].report(ConfigError("another")).message == "row 7 is broken"
    second = [FailureWatch(store, rank) for rank in range(2)]
    assert second[0].report(ConfigError("another")).message == "another"
    assert second[1].report(DataError("row 8 is broken")).message == "another"
