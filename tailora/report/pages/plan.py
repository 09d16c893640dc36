"""The page of a plan."""

from tailora.report.blocks import Block, Column, Number, Page, Paragraph, Section, Table
from tailora.report.format import NONE, count, duration, plural, share
from tailora.report.pages.shared import numeric, settings_table
from tailora.study.plan_result import Plan
from tailora.train.memory import format_bytes


def plan_page(plan: Plan) -> Page:
    memory, available = format_bytes(plan.memory.total), format_bytes(plan.available_bytes)
    rows = [
        [option.settings, format_bytes(option.memory), _batch_size(plan, option.batch_size), f"{option.tokens:,}"]
        for option in plan.options
    ]
    options = Table([Column("settings"), *numeric("memory", "largest batch", "longest single example")], rows)
    basis = plan.basis["memory"]
    of_each = "" if plan.ranks is None else f", in each of {plan.ranks.count} processes"
    sections = [
        Section("What is trained", f"Parts: {', '.join(plan.parts)}." if plan.parts else "", _trained(plan)),
        Section("Memory", f"Peak memory with {plan.dtype} on {plan.device}{of_each}; {basis}.", [_memory(plan)]),
        Section("What fits", f"In {available}, with all other settings unchanged.", [options]),
        Section("Steps and time", "", [Paragraph(_steps(plan)), Paragraph(plan.kernels)]),
        Section("Settings", "", [settings_table("Settings", ("", plan.settings))]),
    ]
    name = plan.model.rstrip("/").rpartition("/")[2]
    forward, full = plan.largest_forward, plan.full
    lead = (
        f"{'It fits' if plan.fits else 'It does not fit'}: {memory} of {available}. The "
        f"largest forward pass has {plural(forward['examples'], 'example')} with {forward['tokens']:,} tokens in total."
    )
    if full is not None:
        lead += f" Full fine-tuning needs {format_bytes(full.memory.total)}."
    if plan.remedies:
        lead += f" What helps: {'; '.join(plan.remedies)}."
    return Page("plan", f"{name}, before training", lead, _numbers(plan), sections, plan.notes)


def _numbers(plan: Plan) -> list[Number]:
    trainable, total, full = plan.trainable_parameters, plan.total_parameters, plan.full
    numbers = [
        Number("trained parameters", count(trainable), f"{share(trainable, total)} of {count(total)}"),
        Number("memory", format_bytes(plan.memory.total), f"of {format_bytes(plan.available_bytes)}", "page"),
    ]
    if full is not None:
        note = f"batches of {full.batch_size_that_fits} fit" if full.batch_size_that_fits else "does not fit"
        numbers.append(Number("memory, full fine-tuning", format_bytes(full.memory.total), note, "page"))
    fitting = _batch_size(plan, plan.batch_size_that_fits)
    numbers.append(Number("batch size that fits", fitting, f"requested: {plan.batch_size}", "page"))
    if plan.steps is not None:
        numbers.append(Number("steps", f"{plan.steps:,}", detail="page"))
    if plan.seconds is not None:
        numbers.append(Number("training time", duration(plan.seconds), "measured", "page"))
    return numbers


def _trained(plan: Plan) -> list[Block | None]:
    columns = [Column("path"), Column("type", priority=2), Column("shape", numeric=True, priority=1), *numeric("r")]
    columns += [Column("alpha", numeric=True, priority=2), *numeric("parameters")]
    rows = []
    for group in plan.groups:
        shape = " × ".join(map("{:,}".format, group.shape))
        r, alpha = (NONE if value is None else f"{value:g}" for value in (group.r, group.alpha))
        rows.append([group.path, group.kind, shape, r, alpha, f"{group.parameters:,}"])
    return [Table(columns, rows) if rows else None]


def _memory(plan: Plan) -> Table:
    memories = {"LoRA" if plan.groups else "full fine-tuning": plan.memory.to_dict()}  # method -> bytes by part
    if plan.full is not None:
        memories["full fine-tuning"] = plan.full.memory.to_dict()
    rows = [
        [part, *(format_bytes(memory[part]) if memory[part] else NONE for memory in memories.values())]
        for part in plan.memory.to_dict()
        if any(memory[part] for memory in memories.values())
    ]
    fitting = [plan.batch_size_that_fits, *([plan.full.batch_size_that_fits] if plan.full else [])]
    rows.append(["batch size that fits", *(_batch_size(plan, number) for number in fitting)])
    return Table([Column("part"), *numeric(*memories)], rows)


def _batch_size(plan: Plan, fitting: int) -> str:
    return f"{fitting:,}{' (all examples)' if fitting == plan.examples else ''}" if fitting else "none"


def _steps(plan: Plan) -> str:
    basis, ranks = plan.basis["time"], ""
    if plan.ranks is not None:
        how = "FSDP2 shards the base model across them" if plan.ranks.fsdp else "each has a copy of the base model"
        ranks = f"{plan.ranks.count} processes train together; {how}. "
    steps = "Add --data or --max-steps to see the number of steps."
    if plan.steps is not None:
        steps = f"{plural(plan.steps, 'step')}."
    if plan.seconds_per_step is None:
        return f"{ranks}{steps} The time of a step is {basis}."
    total = "" if plan.seconds is None else f", {duration(plan.seconds)} in total"
    per_step = f"{duration(plan.seconds_per_step)} per step{total} ({basis})"
    return f"{ranks}{steps} {per_step}. Evaluations, answers and saving are not included."
