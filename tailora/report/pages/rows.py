"""The page of `tailora rows`: rows that may hurt, the proof by training without them, and repeated rows."""

from tailora.report.blocks import Block, Column, Number, Page, Section, Table
from tailora.report.charts import Estimate
from tailora.report.format import decimals, interval, one_line, plural, signed
from tailora.report.pages.shared import INTERVAL, difference_cells, loss_figures, numeric, settings_table
from tailora.study.results import TEXTS, RowsResult, measure_of

REPEATED = {  # repeated rows of a result -> title
    "duplicates": "Duplicates",
    "near_duplicates": "Near duplicates: rows that share most of their text",
    "contradictions": "Same prompt, different replies: normal for open-ended chats",
}
FIRST, LONGEST, MOST, NAMED = 10, 40, 8, 8  # rows in a terminal, at least and at most; groups; rows of a group
TEXT = 200  # characters, more than a text has


def rows_page(result: RowsResult) -> Page:
    are_several = len({row.file for row in result.rows}) > 1
    cells = [
        [f"{row.file}:" * are_several + str(row.row), signed(row.score), decimals(row.loss), one_line(row.text, TEXT)]
        for row in result.rows[: max(TEXTS, result.k)]
    ]
    positive = sum(row.score > 0 for row in result.rows)
    text = "A score above 0 means that a step of training on this row probably raises the loss of held-out examples "
    text += f"({positive:,} of {plural(len(result.rows), 'row')}). "
    text += f"The finished model's loss on the row is in {result.loss_unit}."
    shown, title = (result.k, "Harmful rows") if result.proven else (len(cells), "Rows with the highest scores")
    sections = [
        Section(title, text, _scores(cells[:shown], min(max(FIRST, result.k), LONGEST))),
        Section("Rows with the next highest scores", "", _scores(cells[shown:], FIRST)),
        Section("Rows that repeat or contradict each other", "", [_groups(result, name) for name in REPEATED]),
        Section("Settings", "", [settings_table("Settings", *result.settings.items())]),
    ]
    if result.variants:
        text = f"{plural(result.steps, 'step')} in each run, {plural(len(result.seeds), 'seed')}, evaluated on "
        text += f"{result.judged_examples:,} held-out examples that rows were not scored on."
        sections.insert(0, Section(f"Training without {plural(result.k, 'row')}", text, _proof(result)))
    numbers = [
        Number("training rows", f"{len(result.rows):,}"),
        Number("scored on", f"{result.held_out:,}", "held-out examples"),
    ]
    return Page("rows", result.run, result.verdict, numbers, sections, result.notes)


def _scores(cells: list[list[str]], first: int) -> list[Block | None]:
    columns = [Column("row"), *numeric("score", "loss"), Column("text")]
    more = Table(columns, cells[first:], "More rows", folded=True, detail="page")
    return [Table(columns, cells[:first]) if cells else None, more if cells[first:] else None]


def _proof(result: RowsResult) -> list[Block | None]:
    losses = [Estimate(of.name, of.eval_loss or 0.0, of.interval, of.seed_losses) for of in result.variants]
    differences = {variant.name: variant.difference for variant in result.variants}
    reference = next(name for name, difference in differences.items() if difference is None)
    rows = []
    for variant in result.variants:
        p = None if variant.difference is None else variant.difference.p_value
        ends = interval(variant.interval)
        rows.append([variant.name, f"{variant.eval_loss:.3f}", ends, *difference_cells(variant.difference, p)])
    columns = [Column("trained on"), *numeric("held-out loss"), INTERVAL, *numeric("difference"), INTERVAL]
    note = f"Differences are from the runs {reference}. Above 0: the runs {reference} are better."
    figures = loss_figures(losses, result.base_loss, differences, reference, None, measure_of(result.loss_unit))
    return [*figures, Table([*columns, Column("p", numeric=True, priority=1)], rows, note=note)]


def _groups(result: RowsResult, name: str) -> Table | None:
    groups, are_several, rows = result.repeated[name], len({row.file for row in result.rows}) > 1, []
    for group in groups[:MOST]:
        names = ", ".join(row if are_several else row.rpartition("/")[2] for row in group.rows[:NAMED])
        more = f" and {len(group.rows) - NAMED:,} more" if len(group.rows) > NAMED else ""
        rows.append([f"{len(group.rows):,}", f"{names}{more}", one_line(group.text, TEXT)])
    note = f"{plural(len(groups), 'group')} in total; report.json has all of them"
    columns = [*numeric("rows"), Column("where"), Column("text of the first")]
    return Table(columns, rows, REPEATED[name], note) if rows else None
