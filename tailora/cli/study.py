"""`tailora compare`, `search`, `rows` and `curve`: studies of several runs on the user's own data; `tailora report`."""

import shlex
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from cyclopts import Parameter

from tailora.cli.flags import (
    ConfigFile,
    Json,
    NprocPerNode,
    flags_of,
    merge_settings,
    name_flags,
    parse_pairs,
    parse_settings,
    train_flags,
)
from tailora.cli.main import log, on_terminal, print_json, print_text, stderr, stdout
from tailora.cli.models import check_sources_of_run, fetch_sources
from tailora.core.config import StrictModel
from tailora.errors import ConfigError, require_packages
from tailora.formats.run_folder import REPORT, RUN
from tailora.report.files import read_page, write_page, write_page_if_possible
from tailora.report.terminal import print_page
from tailora.study.config import FULL, LORA, CompareConfig, CurveConfig, RowsConfig, SearchConfig
from tailora.study.search_space import STEP_CHOICE
from tailora.train.config import GRPO_FIELDS, TrainConfig
from tailora.train.config_file import read_config_file
from tailora.train.launch import count_processes, world_size

EXCLUDED = {"resume_from_checkpoint", "samples", "report_to", "save_steps", "streaming", "method"}
EXCLUDED |= STEP_CHOICE
Study = TypeVar("Study", bound=StrictModel)

# ---- `tailora compare`


COMPARE_DEFAULTS = {"output_dir": "outputs/compare"}
CompareFlags: Any = train_flags(without=EXCLUDED | {"learning_rate"}, defaults=COMPARE_DEFAULTS)
STUDY = "Comparison"
StudyFlags: Any = flags_of(CompareConfig, CompareConfig.model_fields.keys() - {"arms"}, STUDY)

Arms = Annotated[
    list[str] | None,
    Parameter(
        group=STUDY,
        help="variant to compare, as NAME:setting=value,...; repeatable; default: lora with the settings from "
        "the other flags",
    ),
]


def compare(
    *,
    config: ConfigFile = None,
    arm: Arms = None,
    full: Annotated[bool, Parameter(group=STUDY, help="also compare full fine-tuning")] = True,
    study: StudyFlags = None,
    json: Json = False,
    nproc_per_node: NprocPerNode = None,
    flags: CompareFlags = None,
) -> int:
    """Compare LoRA with full fine-tuning on your model and data.

    Each variant is trained at its own best learning rate, with several seeds. After Ctrl-C, the same command resumes.
    """
    require_packages("scipy", extra="study")
    in_file = study_settings(config, CompareConfig)
    if arm is not None or "arms" not in in_file:
        arms: dict[str, dict[str, Any]] = {} if arm else {LORA: {}}
        for text in arm or ():
            name, _, settings = text.partition(":")
            if not name or "/" in name or name in arms:
                raise ConfigError(f"--arm {text}: expected NAME:setting=value,... with a new NAME without /")
            arms[name] = parse_settings(settings)
        in_file["arms"] = {**arms, **({FULL: {"method": FULL}} if full else {})}
    train = merge_settings(flags, config, defaults=COMPARE_DEFAULTS, ignore=CompareConfig.model_fields)
    comparison = read_study(CompareConfig, in_file, study)
    check_sources_of_run(train, comparison.forgetting_data)
    log("loading the model and data")
    from tailora.study.compare import compare as run

    return run_study(run, train, comparison, json, nproc_per_node)


# ---- `tailora search`


SEARCH_DEFAULTS = {"output_dir": "outputs/search"}
TrainFlags: Any = train_flags(without=EXCLUDED | {"save_total_limit"}, defaults=SEARCH_DEFAULTS)
SearchFlags: Any = flags_of(SearchConfig, section="Search")


def search(
    *,
    config: ConfigFile = None,
    study: SearchFlags = None,
    json: Json = False,
    nproc_per_node: NprocPerNode = None,
    flags: TrainFlags = None,
) -> int:
    """Search for the best settings, and for cheaper ones that work just as well.

    Varies the learning rate, rank, alpha, target layers, dropout and LoRA+ ratio, except for settings that you set.
    --space adds settings or limits their values. --workers 4 runs four trials at a time, each on its own device. After
    Ctrl-C, the same command resumes. Start it several times, or on several machines with the same --storage, to share
    the work.
    """
    require_packages("optuna", "scipy", extra="study")
    in_file, typed = study_settings(config, SearchConfig), dict(study or {})
    if "space" in typed:
        typed["space"] = {**in_file.get("space", {}), **parse_pairs("--space", typed["space"])}
    search_config = read_study(SearchConfig, in_file, typed)
    train = merge_settings(flags, config, defaults=SEARCH_DEFAULTS, ignore=SearchConfig.model_fields)
    check_sources_of_run(train)
    from tailora.study.search import search as run  # loads Optuna

    return run_study(run, train, search_config, json, nproc_per_node)


# ---- `tailora rows`


RowsFlags: Any = flags_of(RowsConfig, RowsConfig.model_fields.keys() - {"run"}, "Proof")


def rows(
    run: Annotated[Path, Parameter(help="output folder of a finished training run")],
    /,
    *,
    study: RowsFlags = None,
    output_dir: Annotated[Path, Parameter(help="folder for the results")] = Path("outputs/rows"),
    json: Json = False,
    nproc_per_node: NprocPerNode = None,
) -> int:
    """Find the training rows that hurt, and prove it by training without them.

    Scores each training row of a finished run by its effect on the held-out loss, and lists rows that repeat or
    contradict each other. --prove trains again with and without the rows with the highest scores. After Ctrl-C, the
    same command resumes.
    """
    require_packages("scipy", extra="study")
    config = read_study(RowsConfig, {"run": str(run)}, study)
    log("loading the run")
    from tailora.study.influence import FinishedRun
    from tailora.study.rows import score_rows

    train = FinishedRun.read(run).settings.replaced(output_dir=str(output_dir))
    check_sources_of_run(train)
    return run_study(score_rows, train, config, json, nproc_per_node)


# ---- `tailora curve`


CURVE_DEFAULTS = {"output_dir": "outputs/curve", "num_train_epochs": 2}  # one epoch is rarely the best number
CurveTrainFlags: Any = train_flags(without=EXCLUDED | {"adapter", *GRPO_FIELDS}, defaults=CURVE_DEFAULTS)
CurveFlags: Any = flags_of(CurveConfig, section="Learning curve")


def curve(
    *,
    config: ConfigFile = None,
    study: CurveFlags = None,
    json: Json = False,
    nproc_per_node: NprocPerNode = None,
    flags: CurveTrainFlags = None,
) -> int:
    """Measure whether more data, or a higher rank, would help.

    Trains on an eighth, a quarter, a half and all of the data with several seeds, and repeats this at four times the
    rank. Reports what the last doublings of the data and the higher rank changed. After Ctrl-C, the same command
    resumes.
    """
    require_packages("scipy", extra="study")
    curve_config = read_study(CurveConfig, study_settings(config, CurveConfig), study)
    train = merge_settings(flags, config, defaults=CURVE_DEFAULTS, ignore=CurveConfig.model_fields)
    check_sources_of_run(train)
    log("loading the model and data")
    from tailora.study.curve import curve as run

    return run_study(run, train, curve_config, json, nproc_per_node)


# ---- What all share


def study_settings(config_file: Path | None, schema: type[StrictModel]) -> dict[str, Any]:
    """Returns the settings in the file that belong to the study, not to its training runs."""
    content = read_config_file(config_file) if config_file else {}
    return {name: value for name, value in content.items() if name in schema.model_fields}


def read_study(schema: type[Study], in_file: Mapping[str, Any], flags: Mapping[str, Any] | None) -> Study:
    """Returns the settings of a study; flags override the file. Raises ConfigError with all problems."""
    try:
        return schema(**{**in_file, **(flags or {})})
    except ConfigError as error:
        raise ConfigError(name_flags(str(error), flags or {})) from None


def run_study(
    run: Callable[..., Any],
    train: TrainConfig,
    study: CompareConfig | SearchConfig | RowsConfig | CurveConfig,
    as_json: bool,
    nproc_per_node: str | None,
) -> int:
    """Runs a study and prints its result. After Ctrl-C the message has the command that resumes."""
    from tailora.cli.progress import StepCounter

    if world_size() > 1:
        raise ConfigError("each process of a launcher would run the whole study; use --nproc-per-node instead")
    processes = 1 if nproc_per_node is None else count_processes(nproc_per_node, train.device)
    fetch_sources(train.model)
    console = stderr()
    try:
        progress = StepCounter(console, getattr(study, "workers", 1)) if on_terminal(console) else None
        result = run(train, study, log=partial(print_text, console), progress=progress, processes=processes)
    except KeyboardInterrupt:
        command = shlex.join(["tailora", *sys.argv[1:]])
        raise KeyboardInterrupt(f"finished runs are in {train.output_dir}; resume with:\n{command}") from None
    if as_json:
        print_json(result.to_dict())
    else:
        print_page(stdout(), read_page(Path(train.output_dir)))
    log(write_page_if_possible(Path(train.output_dir)))
    return 0


# ---- `tailora report`


RunFolder = Annotated[
    Path,
    Parameter(help="output folder of a run, plan, comparison, search, curve, study of rows, evaluation or inspection"),
]


def report(folder: RunFolder, /, *, json: Json = False) -> int:
    """Regenerate report.html for a run or a study from the files in its folder."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; expected the output folder of a run or a study")
    if (folder / RUN).exists():
        from tailora.report.pages.train import write_train_report  # loads torch

        write_train_report(folder)
    page = write_page(folder)
    if json:
        print_json({"report": str(page), "data": str(folder / REPORT)})
    else:
        stdout().print(str(page), soft_wrap=True)
    return 0
