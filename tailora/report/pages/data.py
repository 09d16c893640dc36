"""The page of `tailora data`: the counts of the data, and examples with their images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tailora.data.dataset import sources_of, warnings_of
from tailora.report.blocks import Column, Number, Page, Sample, Section, Table
from tailora.report.format import share
from tailora.report.pages.shared import numeric, settings_table


@dataclass(frozen=True)
class DataContent:
    report: dict[str, Any]  # DataReport.to_dict()
    examples: list[Sample]

    def to_dict(self) -> dict[str, Any]:
        examples = [
            {
                "title": example.title,
                "pieces": example.pieces,
                "images": [image.to_dict() for image in example.images],
            }
            for example in self.examples
        ]
        return {"report": self.report, "examples": examples}


def data_page(content: DataContent) -> Page:
    report = content.report
    facts = facts_of(report)
    counts = [
        Number("rows", f"{report['rows']:,}", f"{report['train']:,} to train on, {report['eval']:,} held out"),
        Number("tokens", f"{report['tokens']:,}"),
        Number(
            "trained tokens", f"{report['supervised_tokens']:,}", share(report["supervised_tokens"], report["tokens"])
        ),
        Number("longest", f"{report['longest']:,}", "tokens"),
    ]
    if images := report["messages"].get("images"):
        counts.append(Number("images", f"{images:,}"))
    lengths = [[f"{bin['low']:,} to {bin['high']:,}", f"{bin['examples']:,}"] for bin in report["lengths"]]
    table = Table([Column("tokens"), *numeric("examples")], lengths, "Lengths", folded=True)
    text = "The model is trained on the green text."
    if images:
        text += " The text shows an image as one [image], whatever its number of tokens."
    sections = [
        Section("Examples", text, content.examples),
        Section("Data", "", [settings_table("Details", ("", facts)), table]),
    ]
    return Page("data", str(report["source"]), "", counts, sections)


def facts_of(report: Mapping[str, Any]) -> dict[str, str]:
    """Returns the facts in a data report, by name. report: DataReport.to_dict()."""
    mapping = ", ".join(key if key == column else f"{key} = {column}" for key, column in report["mapping"].items())
    learned = f", {report['supervised_tokens']:,} trained ({report['supervised_share']:.0%})"
    unused = "for rewards" if report.get("task") == "grpo" else "not used"
    facts = {
        "source": report["source"],
        "held-out source": report["eval_source"],
        "read as": report["shape"] if mapping in ("", report["shape"]) else f"{report['shape']} ({mapping})",
        unused: ", ".join(report["ignored"]),
        "format": "the model's chat template" if report["chat_template"] else "plain text, without a chat template",
        "messages": ", ".join(f"{count:,} {name}" for name, count in report["messages"].items()),
        **sources_of(report),
        "labels": ", ".join(f"{name} {number:,}" for name, number in report["labels"].items()),
        "rows": f"{report['rows']:,}: {report['train']:,} to train on, {report['eval']:,} held out",
        "tokens": f"{report['tokens']:,}{learned if report['supervised_tokens'] else ''}",
        "longest": f"{report['longest']:,} tokens",
        **warnings_of(report),
        "data hash": report["sha256"],
    }
    return {name: value for name, value in facts.items() if value}
