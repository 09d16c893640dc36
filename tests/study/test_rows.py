"""`tailora rows` on a tiny model: planted wrong replies are found, and training without rows is compared."""

import json
import random
import shutil
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import check_refused, found, output
from runs import not_run
from tiny import chat_tokenizer
from tiny_run import WORDS, save_model, write_rows
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import tailora.study.rows
from tailora.data.dataset import Example, Examples
from tailora.errors import ConfigError, FormatError
from tailora.evaluation.statistics import Difference
from tailora.formats.io import read_json_object
from tailora.report.blocks import Table
from tailora.report.files import write_page
from tailora.report.pages.rows import rows_page
from tailora.study.config import RowsConfig
from tailora.study.influence import FinishedRun, row_scores
from tailora.study.results import ArmResult, RowsResult, measure_of
from tailora.study.rows import ALL, LOSS, RANDOM, WORST, _texts, rows_verdict, score_rows
from tailora.study.trial import DIVERGED, DONE, Listen, Trial, TrialSpec, run_here
from tailora.train.config import TrainConfig
from tailora.train.trainer import run

ROWS, PLANTED = 200, 20
Finished = tuple[TrainConfig, list[int]]  # settings, and the numbers of the rows with the reply of a different row


def lookup(count: int, seed: int) -> list[dict[str, str]]:
    """Rows whose reply follows from the first word of the prompt; of a tenth of them it cannot be predicted."""
    generator, rows = random.Random(seed), []
    for number in range(count):
        word = generator.choice(WORDS)
        index = WORDS.index(word)
        reply = [WORDS[(3 * index + 1 + 2 * k) % len(WORDS)] for k in range(1 + index % 3)]
        if generator.random() < 0.1:
            word, reply = f"any {word}", generator.choices(WORDS, k=generator.randint(1, 3))
        rows.append({"prompt": f"{word} {number}", "completion": " ".join(reply)})
    return rows


def plant(rows: list[dict[str, str]], count: int) -> list[int]:
    """Gives rows the replies of each other, in place; returns the numbers, from 1, of those whose reply changed."""
    chosen = random.Random(0).sample(range(len(rows)), len(rows))[:count]
    replies = [rows[index]["completion"] for index in (*chosen[1:], chosen[0])]
    changed = sorted(i + 1 for i, reply in zip(chosen, replies, strict=True) if rows[i]["completion"] != reply)
    for index, reply in zip(chosen, replies, strict=True):
        rows[index]["completion"] = reply
    return changed


def recall_at_k(order: list[int], planted: Collection[int]) -> float:
    """Returns the share of the planted rows among as many first rows of the order."""
    return len({*order[: len(planted)]} & {*planted}) / len(planted)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("rows")
    save_model(folder / "model", hidden_size=64)
    rows = lookup(ROWS, seed=0)
    planted = plant(rows, PLANTED)
    train = TrainConfig(
        model=str(folder / "model"),
        data=str(write_rows(folder / "train.jsonl", rows)),
        eval_data=str(write_rows(folder / "held_out.jsonl", lookup(100, seed=1000))),
        output_dir=str(folder / "run"),
        dtype="float32",
        r=8,
        learning_rate=1e-2,
        num_train_epochs=6,
        per_device_train_batch_size=8,
        samples=0,
    )
    run(train)
    return train, planted


@pytest.fixture(scope="module")
def scored(finished: Finished) -> RowsResult:
    train, _ = finished
    folder = Path(train.output_dir).parent / "scored"
    return score_rows(train.replaced(output_dir=str(folder)), RowsConfig(run=train.output_dir))


def test_planted_rows_are_found_better_than_by_loss_length_and_chance(finished: Finished, scored: RowsResult) -> None:
    train, planted = finished
    by_score = recall_at_k([row.row for row in scored.rows], planted)
    by_loss = recall_at_k([row.row for row in sorted(scored.rows, key=lambda row: -row.loss)], planted)
    lengths = [len(line) for line in Path(str(train.data)).read_text().splitlines()]
    shortest = (np.argsort(lengths, kind="stable") + 1).tolist()
    by_length = max(recall_at_k(shortest, planted), recall_at_k(shortest[::-1], planted))
    assert by_score >= 0.6
    assert by_score > max(by_loss, by_length, len(planted) / len(scored.rows)) + 0.15


def test_scores_are_products_of_gradients_that_plain_autograd_computes(finished: Finished) -> None:
    """The gradient of a row has its weight, unlike its loss; that of a held-out example has length 1."""
    with ExitStack() as stack:
        run = FinishedRun.read(Path(finished[0].output_dir)).load(stack)
        known, held_out = (Examples.of([*examples][:4]) for examples in (run.data.known, run.data.held_out or ()))
        known = replace(known, weights=np.array([1, 0, 0.5, 2]))
        found = row_scores(replace(run, data=replace(run.data, known=known)), [[0], [1], [2, 3]], held_out)
        parameters = [parameter for parameter in run.model.eval().parameters() if parameter.requires_grad]

        def computed(example: Example) -> tuple[Tensor, float]:
            ids, labels = (torch.from_numpy(values).long() for values in (example.input_ids, example.labels))
            loss = cross_entropy(run.model(input_ids=ids[None]).logits[0, :-1], labels[1:], reduction="sum")
            return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)]), loss.item()

        direction = sum(normalize(computed(example)[0], dim=0) for example in held_out) / len(held_out)
        gradients, losses = zip(*map(computed, known), strict=True)
    products = [-weight * float(own @ direction) for weight, own in zip(known.weights, gradients, strict=True)]
    products, losses, counts = (
        np.add.reduceat(values, [0, 1, 2]) for values in (products, losses, [example.supervised for example in known])
    )
    np.testing.assert_allclose(found, [products, losses / counts], 1e-3, 1e-7)


def made_up_trial(spec: TrialSpec, _folder: Path, _listen: Listen, *, helpful: Collection[int]) -> Trial:
    """A trial that trains nothing. Its losses are lower for each of the `helpful` examples that it left out."""
    seed, examples = spec.settings["seed"], 30
    loss = 2 - 0.02 * len({*helpful} & {*spec.left_out}) + 0.001 * seed
    losses = loss + 0.01 * np.random.default_rng(0).standard_normal(examples)
    numbers = {"seed": seed, "train_tokens": 10, "tokens_per_second": 10.0, "peak_memory_bytes": 1, "output_dir": "run"}
    sums, counts = losses.tolist(), [1] * examples
    return Trial(
        DONE, "", {**numbers, "steps": 5, "data_warnings": {}}, sums=sums, before=[3.0] * examples, counts=counts
    )


def test_only_a_proof_calls_rows_harmful(finished: Finished, scored: RowsResult, tmp_path: Path) -> None:
    train, _ = finished
    (tmp_path / "rows.json").write_bytes((Path(scored.run).parent / "scored" / "rows.json").read_bytes())
    (tmp_path / "plan.json").write_bytes((Path(scored.run).parent / "scored" / "plan.json").read_bytes())
    assert not scored.proven
    assert scored.verdict == "Not proven: scores are estimates. --prove trains again without the 10 rows at the top."
    worst = [index for row in scored.rows[:10] for index in row.examples]
    study, lines = RowsConfig(run=train.output_dir, prove=True), list[str]()
    in_folder = train.replaced(output_dir=str(tmp_path))
    proof = score_rows(in_folder, study, lines.append, run_trial=partial(made_up_trial, helpful=worst))
    assert proof.proven
    assert proof.verdict.startswith("These 10 rows are harmful: the held-out loss is lower without them (all rows - ")
    assert not any(line.startswith("scoring") for line in lines)  # the scores are in the folder
    assert [variant.name for variant in proof.variants] == [ALL, WORST, RANDOM, LOSS]
    assert {len(variant.seed_losses) for variant in proof.variants} == {3}
    specs = {path.parent.name: read_json_object(path / "spec.json") for path in (tmp_path / "runs").glob("*/seed-1")}
    assert {spec["data_sha256"] for spec in specs.values()} == {FinishedRun.read(Path(train.output_dir)).data_sha256}
    left_out = {name: spec["left_out"] for name, spec in specs.items()}
    assert left_out["all"] == []
    drawn = [read_json_object(path)["left_out"] for path in (tmp_path / "runs" / "random-10").glob("*/spec.json")]
    assert len({*map(tuple, drawn)}) == len(drawn) == 3  # drawn for each seed
    assert left_out["score-10"] == sorted(worst)
    assert {len(examples) for name, examples in left_out.items() if name != "all"} == {10}
    losses = {row.examples[0]: row.loss for row in scored.rows}
    assert min(losses[index] for index in left_out["loss-10"]) >= sorted(losses.values())[-10]
    page = unescape(write_page(tmp_path).read_text())
    assert "Harmful rows" in page
    assert proof.verdict in page

    kept = score_rows(in_folder, study.replaced(prove=False), run_trial=not_run)
    assert (kept.verdict, kept.seeds, kept.variants) == (proof.verdict, [1, 2, 3], proof.variants)
    other = score_rows(in_folder, study.replaced(prove=False, k=2), run_trial=not_run)
    assert (other.variants, other.verdict[:10]) == ([], "Not proven")
    again = score_rows(in_folder, study.replaced(seeds=2, minutes=1), run_trial=not_run)
    assert again.seeds == [1, 2]
    late = score_rows(in_folder, study.replaced(k=5, minutes=1e-9), run_trial=not_run)
    assert late.verdict == "Not proven: scores are estimates. --prove trains again without the 5 rows at the top."
    assert late.notes[-1].startswith("--minutes 1e-09 left time for 0 of 3 seeds; the same command")
    helpless = partial(made_up_trial, helpful=[])
    with pytest.raises(
        ConfigError, match=r"the run without highest scores with seed 1 failed \(diverged: nan\). The same command rep"
    ):
        score_rows(in_folder, study.replaced(k=3), run_trial=lambda *_: Trial(DIVERGED, "nan"))
    without_effect = score_rows(in_folder, study.replaced(k=3), run_trial=helpless)
    assert not without_effect.proven
    assert without_effect.verdict.startswith(
        "Cannot tell whether these 3 rows are harmful: the interval of the difference"
    )
    harmless = score_rows(in_folder, study.replaced(k=4), run_trial=partial(made_up_trial, helpful=range(ROWS)))
    assert harmless.verdict.startswith("Cannot tell whether these 4 rows are harmful: removing them helped")
    with pytest.raises(ConfigError, match="--k 200 would remove all 200 training rows"):
        score_rows(in_folder, study.replaced(k=ROWS))
    with pytest.raises(ConfigError, match=r"with --nproc-per-node 1, but the proof has 2; use --nproc"):
        score_rows(in_folder, study, processes=2)


def test_a_proof_ends_at_the_step_whose_adapter_was_kept(finished: Finished, tmp_path: Path) -> None:
    """As after early stopping."""
    train, _ = finished
    shutil.copytree(train.output_dir, tmp_path / "run")
    content = read_json_object(tmp_path / "run" / "run.json")
    numbers = content["result"] | {
        "best_step": 3,
        "tokens_per_second": content["result"]["train_tokens"] / 60 / content["result"]["steps"],
    }
    (tmp_path / "run" / "run.json").write_text(json.dumps({**content, "result": numbers}))
    study, lines = RowsConfig(run=str(tmp_path / "run"), prove=True, seeds=1), list[str]()
    in_folder = train.replaced(output_dir=str(tmp_path / "out"))
    proof = score_rows(in_folder, study, lines.append, run_trial=partial(made_up_trial, helpful=[]))
    assert proof.notes[0].startswith(f"the finished run kept the adapter of step 3 of {numbers['steps']}, so the runs")
    assert "4 runs with and without 10 of 200 rows, at least 12 min" in lines
    specs = [read_json_object(path) for path in tmp_path.glob("out/runs/*/seed-1/spec.json")]
    assert [spec["settings"]["max_steps"] for spec in specs] == [3] * 4


def test_only_removed_rows_are_on_the_page_as_harmful(scored: RowsResult) -> None:
    def numbers(result: RowsResult) -> dict[str, list[int]]:
        """Returns the numbers of the rows in each section."""
        tables = {section.title: section.blocks for section in rows_page(result).sections[:2]}
        return {
            title: [int(row[0]) for table in blocks if isinstance(table, Table) for row in table.rows]
            for title, blocks in tables.items()
        }

    order = [row.row for row in scored.rows]
    proven = numbers(replace(scored, proven=True, k=12))
    assert proven == {"Harmful rows": order[:12], "Rows with the next highest scores": order[12:]}
    without_text = replace(scored, rows=[replace(row, text="") for row in scored.rows])
    assert numbers(without_text)["Rows with the highest scores"] == order


def test_texts_lose_only_the_lines_that_all_begin_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tailora.study.rows, "preview", lambda example, _: [(example, True)])
    run: Any = SimpleNamespace(labels=None, tokenizer=chat_tokenizer(["Hi"] * 3, eos_token="<s>"))
    examples: Any = ["<s>Be kind.\nHow to cook rice?", "<s>Be kind.\nHow do I cook?", "<s>Be kind.\nHow"]
    assert _texts(run, examples) == ["How to cook rice?", "How do I cook?", "How"]
    assert _texts(run, examples[2:] * 2) == ["How", "How"]
    turns: Any = ["<s>Hi\nyou<s><s>me\nyes", f"<s>{'word ' * 100}", f"<s>{'字' * 200}"]
    shortened = [f"{'word ' * 15}word … {'word ' * 15}word", f"{'字' * 80} … {'字' * 80}"]
    assert _texts(run, turns) == ["Hi\nyou | me\nyes", *shortened]


def test_a_verdict_needs_several_seeds_and_mentions_what_helps_more() -> None:
    def variants(with_all: float, random: float, loss: float, seeds: int = 3) -> list[ArmResult]:
        values = {ALL: with_all, WORST: None, RANDOM: random, LOSS: loss}
        return [
            ArmResult(
                name, {}, DONE, difference=value and Difference(value, value - 0.1, value + 0.1, 0.01, 50, seeds, 0.5)
            )
            for name, value in values.items()
        ]

    text, proven = rows_verdict(variants(0.2, 0.2, 0.2, seeds=1), 5, measure_of("nats per token"))
    assert not proven
    assert "one seed does not show" in text
    text, proven = rows_verdict(variants(-0.3, 0.2, -0.2), 5, measure_of("nats per token"))
    assert not proven
    assert text.startswith("Keep these 5 rows: the model is worse without them")
    assert "helps" not in text
    unclear = variants(0.01, 0.2, 0.2)
    assert rows_verdict(unclear, 5, measure_of("nats per token"))[0].endswith("More seeds (--seeds) narrow it.")
    of_all = next(variant for variant in unclear if variant.name == ALL)
    assert of_all.difference is not None
    few = [replace(of_all, difference=replace(of_all.difference, from_examples=0.9)), *unclear[1:]]
    assert rows_verdict(few, 5, measure_of("nats per token"))[0].endswith("More held-out examples narrow it.")
    text, proven = rows_verdict(variants(0.2, 0.2, -0.2), 5, measure_of("nats per token"))
    assert proven
    assert "Removing the 5 rows with the highest losses helps more" in text
    text, _ = rows_verdict(variants(0.2, 0.2, -0.2), 1, measure_of("nats per token"))
    assert text.startswith("This row is harmful: the held-out loss is lower without it (all rows - ")
    assert "Correct or remove this row. Removing the row with the highest loss helps more" in text
    texts = [rows_verdict(found, 1, measure_of("nats"))[0] for found in ([], variants(-0.3, 0.2, 0.2), unclear)]
    beginnings = [
        "Not proven: scores are estimates. --prove trains again without the row at the top.",
        "Keep this row:",
    ]
    for text, beginning in zip(texts, [*beginnings, "Cannot tell whether this row is harmful:"], strict=True):
        assert text.startswith(beginning)


@pytest.mark.slow
def test_examples_that_are_left_out_are_not_learned(finished: Finished, tmp_path: Path) -> None:
    """Steps keep all their examples, even if none of them counts."""
    train, planted = finished
    settings = train.replaced(max_steps=30).model_dump(mode="json", exclude={"output_dir"}, exclude_unset=True)
    sha256 = FinishedRun.read(Path(train.output_dir)).data_sha256
    everything, without, nothing = (
        run_here(TrialSpec(settings, left_out=left_out, data_sha256=sha256), tmp_path / name, lambda _: None)
        for name, left_out in (("all", []), ("some", [number - 1 for number in planted]), ("none", [*range(ROWS)]))
    )
    assert len(everything.losses) == len(without.losses) == 30
    assert everything.losses[0] != without.losses[0] or everything.losses[1] != without.losses[1]
    assert nothing.sums == pytest.approx(nothing.before)
    assert nothing.losses == [0.0] * 30


def test_the_command_lists_rows_in_order_of_harm(finished: Finished, tmp_path: Path) -> None:
    train, _ = finished
    result = found("rows", train.output_dir, "--k", "8", "--output-dir", tmp_path / "out")
    row = json.loads(Path(str(train.data)).read_text().splitlines()[result["rows"][0]["row"] - 1])
    assert result["rows"][0]["text"].startswith(row["prompt"])
    assert result["rows"][0]["text"].endswith(row["completion"])
    assert {"row", "score"} <= result["rows"][0].keys()
    scores = [row["score"] for row in result["rows"]]
    assert scores == sorted(scores, reverse=True)
    assert sorted(row["row"] for row in result["rows"]) == list(range(1, ROWS + 1))
    said = output("rows", train.output_dir, "--output-dir", tmp_path / "out")
    assert "Not proven: scores are estimates." in said
    assert "Rows with the highest scores" in said
    check_refused("contains no run.json", "rows", tmp_path)
    check_refused("--k '0': input should be", "rows", tmp_path, "--k", "0")


def test_a_run_that_cannot_be_scored_is_refused(finished: Finished, tmp_path: Path) -> None:
    train, _ = finished
    content = json.loads((Path(train.output_dir) / "run.json").read_text())
    for changes, settings, reason in (
        ({"finished": False}, {}, "it has not finished, so resume it first"),
        ({"loss_unit": "per example"}, {}, "it learned preferences"),
        ({}, {"documents": "concatenated"}, "its examples do not belong to rows"),
    ):
        changed = {**content, **changes, "settings": {**content["settings"], **settings}}
        (tmp_path / "run.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=f"cannot be scored: {reason}"):
            FinishedRun.read(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(FormatError, match="was not written by this version"):
        FinishedRun.read(tmp_path)
    changed = replace(FinishedRun.read(Path(train.output_dir)), data_sha256="0")
    with (
        ExitStack() as stack,
        pytest.raises(ConfigError, match=r"rows have changed since .*train.jsonl, .*held_out.jsonl"),
    ):
        changed.load(stack)
