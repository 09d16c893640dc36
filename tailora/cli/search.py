"""`tailora search`: searches the best settings for the user's own model and data, and the cheapest as good ones."""

from pathlib import Path
from typing import Any

from tailora.cli.compare import bar, resumable
from tailora.cli.flags import FIELDS, ConfigFile, Json, Settings, flags_of, merge_settings, parse_pairs
from tailora.cli.main import log, note, print_json, stderr, stdout
from tailora.errors import require_packages
from tailora.report.files import write_page_if_possible
from tailora.report.terminal import print_page
from tailora.study.config import SearchConfig
from tailora.train.config import TrainConfig
from tailora.train.config_file import read_config_file

OWN = SearchConfig.model_fields
DEFAULTS = {"output_dir": "outputs/search"}
RATES = {"output_dir": "outputs/learning-rates"}  # of --lr-only
LEFT_OUT = {"resume_from_checkpoint", "samples", "report_to", "save_steps", "streaming", "method", "eval_steps"}
LEFT_OUT |= {"early_stopping_patience", "save_total_limit"}
Flags: Any = flags_of(TrainConfig, only=FIELDS.keys() - LEFT_OUT, defaults=DEFAULTS)
StudyFlags: Any = flags_of(SearchConfig, sections={"trials": "Search"})


def search(*, config: ConfigFile = None, study: StudyFlags = None, json: Json = False, flags: Flags = None) -> int:
    """Search the best settings, and the cheapest that are as good.

    Searched are learning rate, rank, alpha, targets, dropout and the LoRA+ ratio; --space adds settings or limits
    their values. A setting that is given is not searched. After Ctrl-C the same command resumes; started a second
    time, or on another machine with the same --storage, it helps.
    """
    require_packages("optuna", "scipy", extra="study")
    in_file = {name: value for name, value in (read_config_file(config) if config else {}).items() if name in OWN}
    typed = dict(study or {})
    if "space" in typed:
        typed["space"] = {**in_file.get("space", {}), **parse_pairs("space", typed["space"])}
    search_config = SearchConfig(**{**in_file, **typed})
    defaults = RATES if search_config.lr_only else DEFAULTS
    return _run(merge_settings(flags, config, defaults=defaults, ignore=OWN), search_config, json)


def _run(chosen: Settings, study: SearchConfig, as_json: bool) -> int:
    from tailora.report.pages.lr_range import lr_range_page
    from tailora.report.pages.search import search_page
    from tailora.study.lr_range import find_range
    from tailora.study.search import search as run  # loads torch and Optuna

    for text in chosen.notes:
        note(text)
    console = stderr()
    work, make_page = (find_range, lr_range_page) if study.lr_only else (run, search_page)
    with resumable(chosen.config.output_dir):
        result: Any = work(
            chosen.config, study, log=lambda text: console.print(text, markup=False), progress=bar(console)
        )
    if as_json:
        print_json(result.to_dict())
    else:
        print_page(stdout(), make_page(result))
    log(write_page_if_possible(Path(chosen.config.output_dir)))
    return 0
