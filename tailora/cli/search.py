"""`tailora search`: the best settings for the user's own model and data, and the cheapest that are as good."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tailora.cli.compare import bar, page_of, resumable
from tailora.cli.flags import FIELDS, ConfigFile, Json, Settings, flags_of, merge_settings, parse_pairs
from tailora.cli.main import log, note, print_json, stderr, stdout
from tailora.errors import require_packages
from tailora.report import report_if_possible
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
SHOWN = 12  # trials
TITLED: Any = {"title_justify": "left", "title_style": "bold"}


def search(
    *,
    config: ConfigFile = None,
    study: StudyFlags = None,
    json: Json = False,
    flags: Flags = None,
) -> int:
    """Search learning rate, rank, alpha, targets, dropout and LoRA+ ratio; --space says what else, or which values.

    A setting with a value is not searched. Interrupted, the same command goes on; started again beside itself, or on
    another machine with the same --storage, it joins.
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
    from tailora.study.lr_range import find_range
    from tailora.study.search import search as run  # Optuna from here on

    for text in chosen.notes:
        note(text)
    console = stderr()
    work, display = (find_range, show_rates) if study.lr_only else (run, show)
    with resumable(chosen.config.output_dir):
        found: Any = work(
            chosen.config, study, log=lambda text: console.print(text, markup=False), progress=bar(console)
        )
    if as_json:
        print_json(found.to_dict())
    else:
        display(stdout(), found)
    report_if_possible(Path(chosen.config.output_dir))
    log(page_of(Path(chosen.config.output_dir)))
    return 0


def show_rates(console: Console, found: Any) -> None:
    table = Table("learning rate", "held-out loss", title=f"{found.steps} steps at rising rates", **TITLED)
    for rate, loss in found.curve:
        table.add_row(f"{rate:.1e}", f"{loss:.3f}")
    console.print(table)
    console.print(found.verdict, soft_wrap=True)
    console.print("", Text(f"Take --learning-rate {found.suggestion:.1e}.", style="bold"), sep="\n")


def show(console: Console, found: Any) -> None:
    console.print(_trials(found), "")
    console.print(_finalists(found))
    console.print(f"The base has {found.base_loss:.3f}.")
    if found.importances:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in found.importances.items())
        console.print(f"What made a trial one of the best quarter (PED-ANOVA): {shares}.", soft_wrap=True)
    console.print("", Text(found.verdict, style="bold"), sep="\n", soft_wrap=True)
    for text in found.notes:
        console.print(f"Note: {text}", markup=False, soft_wrap=True)
    both = found.cheapest.number != found.best.number
    names = {
        "the best": found.config,
        **({"the cheapest": Path(found.config).with_name("cheapest.yaml")} if both else {}),
    }
    for name, path in names.items():
        console.print(f"To train {name}: tailora train --config {path}", markup=False, soft_wrap=True)


def _trials(found: Any) -> Table:
    """The best trials, one a line."""
    ended = [each for each in found.trials if each.state != "done"]
    done = sorted((each for each in found.trials if each.state == "done"), key=lambda each: each.eval_loss)
    rest = f", {len(ended)} ended early" if ended else ""
    title = f"{len(found.trials)} trials of {found.steps} steps{rest}; loss on the half that chooses"
    names = list(done[0].settings)
    table = Table("trial", "loss", "trained", *names, title=title, **TITLED)
    for each in done[:SHOWN]:
        table.add_row(str(each.number), f"{each.eval_loss:.3f}", _size(each), *map(_short, each.settings.values()))
    return table


def _finalists(found: Any) -> Table:
    seeds, examples = len(found.seeds), found.judged_examples
    title = f"Finalists: {seeds} seed{'s' * (seeds > 1)}, judged on the other {examples} held-out examples"
    heads = ("trial", "held-out loss (95%)", "- best (95%)", "p", "trained", "train s", "peak GB")
    table = Table(*heads, title=title, **TITLED)
    for each in found.finalists:
        low, high = each.interval
        apart = each.difference
        table.add_row(
            str(each.number),
            f"{each.eval_loss:.3f} ({low:.3f} to {high:.3f})",
            f"{apart['value']:+.3f} ({apart['low']:+.3f} to {apart['high']:+.3f})" if apart else "best",
            "" if each.p_value is None else f"{each.p_value:.3f}",
            _size(each),
            f"{each.seconds:,.0f}",
            f"{each.peak_memory_bytes / 1e9:.2f}",
        )
    return table


def _size(each: Any) -> str:
    return f"{each.trainable_parameters / 1e6:,.2f}M"


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
