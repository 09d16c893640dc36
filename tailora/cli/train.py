"""`tailora train` and `tailora demo`: fine-tune a model and show whether it worked."""

import json
import shlex
import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from tailora.cli.__main__ import run as run_program
from tailora.cli.flags import SWITCH, ConfigFile, Json, NprocPerNode, Overwrite, merge_settings, train_flags
from tailora.cli.main import ARGUMENTS, is_rank_0, log, note, print_json, stderr, stdout
from tailora.cli.models import check_sources_of_run, fetch_sources
from tailora.cli.progress import counter, run_progress
from tailora.data.messages import IMAGE_TEXT
from tailora.data.schemas import PREFERENCE
from tailora.errors import INTERRUPTED, WORSE, ConfigError, WriteError
from tailora.formats.io import wrap_os_error, write_file
from tailora.formats.run_folder import ADAPTER, HELD_OUT, PAGE, REPORT, RUN, SAMPLES, VERDICTS, write_report
from tailora.report.blocks import Code, Column, Section, Table
from tailora.report.files import read_page, write_page_if_possible
from tailora.report.terminal import print_page, print_section
from tailora.train import run_log
from tailora.train.config import GRPO, TASK_TYPES, TrainConfig
from tailora.train.launch import count_processes, how_to_resume, is_launched_by_tailora, launch, world_size

if TYPE_CHECKING:
    from tailora.evaluation.judge import Judge
    from tailora.train.answers import ComparedAnswer, Question
    from tailora.train.events import TrainResult

Flags: Any = train_flags()  # the settings of train/config.py


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunFlags:
    config: ConfigFile = None
    json: Json = False
    overwrite: Overwrite = False
    nproc_per_node: NprocPerNode = None
    verbose: Annotated[bool, SWITCH, Parameter(help="also show precision, kernels and batches")] = False


NO_FLAGS = RunFlags()


DEFAULTS: dict[str, Any] = {"model": "demo", "data": "demo"}
DEMO_DEFAULTS = {**DEFAULTS, "output_dir": "outputs/demo"}
DemoFlags: Any = train_flags(defaults=DEMO_DEFAULTS)


def demo(*, given: RunFlags = NO_FLAGS, flags: DemoFlags = None) -> int:
    """Fine-tune a small model on real chats and see what changed. Accepts the flags of `train`."""
    return train(given=given, flags=flags, defaults=DEMO_DEFAULTS)


def train(
    *,
    given: RunFlags = NO_FLAGS,
    flags: Flags = None,
    defaults: Annotated[Mapping[str, Any] | None, Parameter(parse=False)] = None,
) -> int:
    """Fine-tune a model on your data. Run `tailora data FILE` first to see what it would be trained on."""
    config = merge_settings(flags, given.config, defaults=defaults)
    started = time.monotonic()
    if world_size() == 1 and not (Path(config.output_dir) / run_log.HOLDER).exists():  # otherwise, the trainer checks
        run_log.check_run_folder(config, overwrite=given.overwrite)
    check_sources_of_run(config)
    fetch_sources(config.model)
    judge = start_judge(config)
    if given.nproc_per_node is not None and not is_launched_by_tailora():
        processes = count_processes(given.nproc_per_node, config.device)
        if processes > 1:
            log(f"starting {processes} processes")
            return launch(run_program, ARGUMENTS.get(), processes, Path(config.output_dir), [WORSE])
    with ExitStack() as stack:
        console = stderr() if is_rank_0() else Console(quiet=True)
        with run_progress(console, verbose=given.verbose) as listener:  # before torch is loaded
            from accelerate import PartialState

            from tailora.evaluation.classification import check_packages
            from tailora.train.failures import Interrupted, fail_together
            from tailora.train.memory import peak_bytes
            from tailora.train.parallel import own_process_group
            from tailora.train.trainer import run

            if config.task in TASK_TYPES:
                check_packages()  # for the report
            stack.enter_context(own_process_group())
            try:
                result = run(config, listener, overwrite=given.overwrite)
            except Interrupted as interrupted:
                if not PartialState().is_main_process:
                    return INTERRUPTED
                message = f"the run so far is saved in {interrupted.folder}; {how_to_resume(interrupted.folder)}"
                raise KeyboardInterrupt(message) from interrupted
        is_main = PartialState().is_main_process
        if config.fsdp:  # all processes compute an answer together
            stack.enter_context(fail_together(PartialState()))
        if config.fsdp or is_main:
            answers, questions = answer_prompts(result, config)
            measured = measure_forgetting(result, config)
    if not is_main:
        return 0
    answers, measured["higher_is_better"] = score_run(answers, questions, config, judge)
    measured |= {} if judge is None else {"judge": dict(judge.counts)}
    folder, peak = Path(result.output_dir), peak_bytes(next(result.model.parameters()).device)
    report, page = write_results(folder, answers, measured, started, peak)
    if given.json:
        verdict = {"verdict": report["verdict"], "finding": report["finding"]} if report else {}
        print_json({**(report["result"] if report else result.to_dict()), **verdict})
    else:
        show(stdout(), config, folder, report)
        if page and not (folder / PAGE).exists():
            log(page)
    return WORSE if report is not None and report["finding"] == "worse" else 0


def start_judge(config: TrainConfig) -> "Judge | None":
    """Returns the language model among the metrics for the main process, after one request."""
    if not config.judges or not is_rank_0():
        return None
    from tailora.evaluation.judge import Judge

    judge = Judge(config, log)
    if not is_launched_by_tailora():
        judge.check()
    return judge


# ---- What a finished run prints: the result, its files, and what to do next


PROMPT_LENGTH = 60  # characters of the prompt in the suggested commands
FILES = {
    PAGE: "the full report; open it in a browser",
    ADAPTER: "the adapter, in PEFT format",
    "model": "the fine-tuned model, in Hugging Face format",
    SAMPLES: "answers to held-out prompts, before and after training",
    VERDICTS: "verdicts of the judge, which it is not asked for again",
    HELD_OUT: "the rows that were held out",
    "metrics.jsonl": "{loss}, learning rate and speed of every step",
    "examples.jsonl": "{loss} of each held-out example, before and after training",
    "completions.jsonl": "completions of some prompts over time",
    "skipped-rows.jsonl": "the rows that were skipped, and why",
    "run.json": "settings, versions, seeds and data hash, to reproduce the run",
    "config.yaml": "the settings; use --config to run them again",
    REPORT: "the numbers of report.html as JSON",
}


def show(console: Console, config: TrainConfig, folder: Path, report: dict[str, Any] | None) -> None:
    """Prints the result of the run if it has a report, the files in its folder, and commands to try next."""
    if report is not None:
        print_page(console, read_page(folder), lead_first=True)
    loss = "reward" if config.task == GRPO else "loss"
    rows = [(name, content.format(loss=loss)) for name, content in FILES.items() if (folder / name).exists()]
    print_section(console, Section(f"Written to {folder}", "", [Table([Column(""), Column("")], rows)]))
    commands = next_commands(config, folder, [] if report is None else report["remedy"])
    print_section(console, Section("Next", "", [Code("\n".join(map(shlex.join, commands)))]))


def next_commands(config: TrainConfig, folder: Path, remedy: Sequence[str] = ()) -> list[list[str]]:
    """Returns commands that use the result of this run, with a prompt from its data and its held-out data.

    remedy: flags for a better run, if this one made the model worse. Then only that command is returned.
    """
    if remedy:
        return [["tailora", "train", "--config", f"{folder}/config.yaml", *remedy, "--output-dir", f"{folder}-better"]]
    is_lora = config.method == "lora"
    tuned = ["--adapter", str(folder)] if is_lora else ["--model", str(folder / "model")]
    pairs = ",".join(f"{ours}={theirs}" for ours, theirs in config.field.items())
    columns = ["--field", pairs] if pairs and not is_lora else []  # an adapter's run records them
    evaluated = [str(folder)] if is_lora else tuned
    answer = ["tailora", "predict", *evaluated, "--prompt", first_prompt(folder)]
    held_out = [
        "--data",
        config.eval_data or (str(folder / HELD_OUT) if (folder / HELD_OUT).exists() else "HELD_OUT.jsonl"),
    ]
    held_out += columns
    system = ["--system", config.system] if config.system and not is_lora else []
    images_of_data = ["--image-folder", config.image_folder] if config.image_folder else []
    evaluate = ["tailora", "eval", *evaluated, *system, *held_out, *images_of_data]
    if config.task in (*TASK_TYPES, "seq2seq"):
        predict = ["tailora", "predict", *evaluated, "--data", "ROWS.jsonl", *columns, "--output", "PREDICTIONS.jsonl"]
        return [*([] if config.task in TASK_TYPES else [answer]), evaluate, predict]
    evaluation = [] if config.task == GRPO else [evaluate]  # prompts have no replies to evaluate
    commands = [["tailora", "chat", *tuned], answer, *evaluation]
    if is_lora:
        run = json.loads((folder / RUN).read_text(encoding="utf-8")) if (folder / RUN).exists() else {}
        reads_images = bool(run.get("parts"))  # of a vision-language model
        target, name = ("merged", "merged") if reads_images else ("llama-server", "llama")
        commands.append(["tailora", "export", str(folder), "--to", target, "--output", f"{folder}-{name}"])
    if config.data == "demo":
        commands.append(["tailora", "data", "YOUR_DATA.jsonl", "--model", config.model])
    return commands


def first_prompt(folder: Path) -> str:
    """Returns the start of the first prompt that the run answered."""
    file = folder / SAMPLES  # missing with --samples 0, or if it could not be written
    samples = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    words = " ".join(samples[0]["prompt"].replace(IMAGE_TEXT, " ").split()) if samples else ""
    return textwrap.shorten(words, PROMPT_LENGTH, placeholder="") or words[:PROMPT_LENGTH] or "Hello!"


def write_results(
    folder: Path, answers: Sequence["ComparedAnswer"], measured: Mapping[str, Any], started: float, peak: int
) -> tuple[dict[str, Any] | None, str]:
    """Writes the reports; returns report.json, and where report.html is or how to get it. peak: bytes of memory."""
    from tailora.report.pages.train import train_report

    report, page = None, ""
    log("writing the report")
    try:
        with wrap_os_error(folder / SAMPLES):
            (folder / SAMPLES).unlink(missing_ok=True)  # from the resumed run
        if answers:
            content = [{**asdict(answer), "images": [i.to_dict() for i in answer.images]} for answer in answers]
            write_file(folder / SAMPLES, json.dumps(content, ensure_ascii=False, indent=2).encode())
        run_log.add_result(folder, **measured, total_seconds=time.monotonic() - started, peak_memory_bytes=peak)
        report = train_report(folder)
        write_report(folder, "train", report)
        page = write_page_if_possible(folder)
    except WriteError as error:  # the trained weights are complete, so the run has not failed
        again = shlex.join(["tailora", "report", str(folder)])
        note(f"the trained weights were saved, but the report was not: {error}. To write it later, run `{again}`")
    return report, page


def answer_prompts(result: "TrainResult", config: TrainConfig) -> tuple[list["ComparedAnswer"], list["Question"]]:
    """Returns answers of the base and the fine-tuned model."""
    from tailora.train.answers import answer_held_out
    from tailora.train.memory import explain_out_of_memory

    if result.data is None or result.data.report.task in TASK_TYPES:  # the model predicts labels
        return [], []
    advice = f"the adapter in {result.output_dir} is complete; use --metric-examples 0 to skip the answers"
    console = stderr() if is_rank_0() else Console(quiet=True)
    with explain_out_of_memory("comparing answers", advice), counter(console, "answers") as progress:
        return answer_held_out(result, config, log, progress)


def score_run(
    answers: Sequence["ComparedAnswer"], questions: Sequence["Question"], config: TrainConfig, judge: "Judge | None"
) -> tuple[list["ComparedAnswer"], dict[str, bool]]:
    """Returns the answers with their scores, and of each metric whether higher is better.

    If a metric fails, the answers have no scores: the run is complete, so it has not failed.
    """
    from tailora.train.answers import score_answers
    from tailora.train.rewards import RewardError, parse_rewards

    metrics = [] if config.task == GRPO else parse_rewards([], config.metric)[1]  # GRPO has scored completions
    try:
        with counter(stderr(), "verdicts") as progress:
            compare = None if judge is None else partial(judge.compare, progress=progress)
            return score_answers(answers, questions, metrics, config.reward_seconds, compare)
    except (RewardError, ConfigError, WriteError) as error:
        log(f"the answers have no scores: {error}\nthe adapter is complete; `tailora eval` can evaluate it again")
        return list(answers), {}


def measure_forgetting(result: "TrainResult", config: TrainConfig) -> dict[str, Any]:
    """Returns further numbers for the result of preferences and of rewards; {} for an adapter trained further."""
    from tailora.evaluation.forgetting import forgetting, kl_texts, sample_texts

    data = result.data
    if data is None or config.adapter is not None or not len(data.eval):
        return {}
    if data.report.task == GRPO:  # the held-out prompts are few, and have no reply
        return {"forgetting": asdict(forgetting(result.model, sample_texts(result.model, result.tokenizer)))}
    return {"eval_kl": forgetting(result.model, kl_texts(data.eval)).kl} if data.report.task == PREFERENCE else {}
