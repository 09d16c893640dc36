"""Reinforcement learning: steps of tailora and of TRL's GRPOTrainer with PEFT, completions per second and memory.

    python -m benchmarks.speed.grpo run         writes benchmarks/results/grpo.json; continues what was stopped

Each arm is a process, and the arms take turns. They sample at temperature 1 from the demo's model, with an end token
that it never samples, and train LoRA of rank 16 on all linear layers. Seconds are CPU time of one thread, of whole
steps after the first. Memory is the peak of the process; tailora's includes the process of the rewards.
"""

import json
import os
import shutil
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import psutil

from benchmarks import measure
from tailora.cli.main import ENVIRONMENT

MODULE = "benchmarks.speed.grpo"
TASKS = {"short": (30, 16, 8), "long": (100, 128, 4)}  # tokens of a prompt and of a completion, prompts of a step
GENERATIONS, STEPS = 8, 2  # completions of a prompt; steps that count
TRL: dict[str, dict[str, Any]] = {  # 8 completions in a forward, and TRL's default: with gradient checkpointing
    "TRL": {"gradient_checkpointing": False},
    "TRL, checkpointing": {},
}
CELLS = [*product(TASKS, ("float32", "bfloat16"))]
ARMS = [f"{task}/{dtype}/{arm}" for task, dtype in CELLS for arm in ("tailora", *TRL)]
REWARD = """
def vowels(completions, **columns):
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]
"""


class Clock:
    """CPU seconds of sampling and of whole steps, and the highest memory of child processes."""

    def __init__(self) -> None:
        self.sampling, self.steps, self.children, self.since = [0.0], list[float](), 0, time.process_time()

    def measure_sampling(self, owner: Any, name: str) -> None:
        sample = getattr(owner, name)

        def timed_sample(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            result = sample(*args, **kwargs)
            self.sampling[-1] += time.process_time() - started
            return result

        setattr(owner, name, timed_sample)

    def step(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.process_time() - self.since)
        self.sampling.append(0.0)
        statuses = [Path(f"/proc/{child.pid}/status").read_text() for child in psutil.Process().children()]
        self.children = 1024 * sum(int(status.split("VmHWM:")[1].split()[0]) for status in statuses)
        self.since = time.process_time()


def run_arm(arm: str) -> dict[str, Any]:
    os.environ.update(ENVIRONMENT)  # of tailora's command line; torch is not imported yet
    (task, dtype, name), clock = arm.split("/"), Clock()
    with tempfile.TemporaryDirectory() as path:
        settings = {"output_dir": f"{path}/run", "max_completion_length": TASKS[task][1], "max_steps": STEPS + 1}
        settings |= {"num_generations": GENERATIONS, "per_device_train_batch_size": 8}
        folder = prepare(Path(path), task)
        if name == "tailora":
            settings |= {"dtype": dtype, "per_device_train_batch_size": TASKS[task][2]}
            run_tailora(folder, clock, settings)
        else:
            settings |= {"bf16": dtype == "bfloat16", "model_init_kwargs": {"dtype": dtype}, **TRL[name]}
            run_trl(folder, clock, settings, TASKS[task][2] * GENERATIONS)
    peak = measure.process_memory("VmHWM") + clock.children
    return {"steps": clock.steps[1:], "sampling": clock.sampling[1 : 1 + STEPS], "peak_bytes": peak}


def prepare(folder: Path, task: str) -> Path:
    """Writes the model, rewards.py and prompts.jsonl to the folder."""
    from transformers import AutoTokenizer

    from tailora.data.demo import data_file, model_folder

    shutil.copytree(model_folder(), folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", eos_token="<jupyter_script>")
    tokenizer.chat_template = None
    for file in ("config", "generation_config"):
        content = json.loads((path := folder / "model" / f"{file}.json").read_text())
        path.write_text(json.dumps({**content, "eos_token_id": tokenizer.eos_token_id}))
    (folder / "model" / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder / "model")
    ids, (length, _, prompts) = tokenizer(data_file().read_text()[:200_000])["input_ids"], TASKS[task]
    rows = ["Text: " + tokenizer.decode(ids[i * length : (i + 1) * length]) for i in range(prompts * (STEPS + 1))]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARD)
    return folder


def run_tailora(folder: Path, clock: Clock, settings: dict[str, Any]) -> None:
    from tailora.train.config import TrainConfig
    from tailora.train.events import Event, Stepped
    from tailora.train.sampler import Sampler
    from tailora.train.trainer import run

    def on_event(event: Event) -> None:
        if isinstance(event, Stepped):
            clock.step()

    clock.measure_sampling(Sampler, "sample")
    settings |= {"model": str(folder / "model"), "data": str(folder / "prompts.jsonl"), "validation_split": 0}
    run(TrainConfig(**settings, task="grpo", reward=[f"{folder}/rewards.py:vowels"]), on_event=on_event)


def run_trl(folder: Path, clock: Clock, settings: dict[str, Any], completions: int) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    settings |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    accumulated = completions // settings["per_device_train_batch_size"]
    exec(REWARD, names := dict[str, Any]())
    trainer = GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=names["vowels"],
        args=GRPOConfig(**settings, gradient_accumulation_steps=accumulated, dataloader_pin_memory=False),
        train_dataset=Dataset.from_json(str(folder / "prompts.jsonl")),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[type("Steps", (TrainerCallback,), {"on_step_end": clock.step})()],
    )
    clock.measure_sampling(trainer, "_generate")
    trainer.train()


if __name__ == "__main__":
    options, path = measure.arm_arguments(str(__doc__)), measure.RESULTS / "grpo.json"
    if options.command == "arm":
        print(json.dumps(run_arm(options.name)))
    for repeat, arm in product(range(options.repeats if options.command == "run" else 0), ARMS):
        runs: dict[str, list[Any]] = json.loads(path.read_text())["runs"] if path.exists() else {}
        if len(runs.setdefault(arm, [])) <= repeat:
            measure.write(path, {"runs": runs | {arm: runs[arm] + measure.run_arms(MODULE, [arm], 1)[arm]}})
