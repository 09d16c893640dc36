"""Does `tailora rows` find wrong rows, and does training without them undo the damage?

    python -m benchmarks.studies.planted_rows run      writes results/planted_rows.json, cell by cell; resumes
    python -m benchmarks.studies.planted_rows judge    adds the verdict to that file, also for a part of the cells

These rules were written before the runs and must not change afterwards.

Data    chats    questions and replies of the demo's chats: open-ended, few replies are the only right one
        reviews  film reviews (snippets.py): the reply is "positive" or "negative"
        words    four random words; the reply repeats them in reverse order
        For each: 240 training rows, 200 held-out rows (100 to score on, 100 to evaluate), the demo's model, 2 epochs
        (60 steps), --max-length 128, and tailora's default settings.
Kinds   shuffled   replies of other planted rows (chats, words)
        language   Spanish replies; "positivo" and "negativo" for reviews (chats, reviews)
        truncated  the first half of the reply (chats, words)
        swapped    the other label (reviews)
Shares  5% and 10% of the training rows. Held-out rows stay right.
Seeds   3 for each cell (data, kind, share): they choose the planted rows and seed the run that is scored.

Recall at k: the share of the planted rows among the first k, with k the number of planted rows. Rankings: score, as
`tailora rows` gives it; loss, of the finished run, highest first; length, longest or shortest row first, whichever is
better in the mean of a cell, which favours it; chance, k / rows. All intervals are 95%, by the bootstrap: cells are
resampled, then the seeds of each cell (1,000 draws).

1. `rows` finds planted rows if the mean difference in recall from loss, from length and from chance is above 0, each
   with an interval that excludes 0. The same numbers are reported for each kind, each data set and each share, also
   where `rows` loses. A kind that loss finds better, by its interval, is named in the documentation of the command.
2. Retraining, in the cells of 10%, with a seed that differs from the scored run's, and removed rows with weight 0, as
   `tailora rows --prove` does: (a) with all rows, (b) without the k rows of highest scores, (c) without the planted
   rows. Cost: loss(a) - loss(c). Recovered: the sum over seeds of loss(a) - loss(b), divided by the sum of the costs.
   A cell counts if the interval of its cost (`difference_over_seeds`) excludes 0 and the cost is at least .01 in the
   unit of the loss; the other cells are listed. Retraining recovers at least half if the mean over the cells that count
   is .5 or more and its interval excludes values below .25.

If 1 or 2 fails, the page says by how much.

Cost, measured with one thread on a busy machine: about 52 s of CPU time for a run and 135 s for a scoring (.42 s for
each of the 340 gradients), so 8 min for the two cells of a kind and a seed, and 3.1 h for all 42 cells.

What is known of small cases, from which the score was chosen: a random Llama of 2 layers and width 64, 200 rows that
map a word to 1 to 3 others, 50 held-out rows to score on, 10% planted among the rows whose reply can be predicted.
Recall at k of the final adapter, mean of 4 seeds (the last row: 3); chance is .10, or .05 in the row of 5%.

    rows that cannot be predicted, kind       loss   TracIn   cosine   score   score, g_i of length 1
    30%,  3 epochs, shuffled                   .01      .28      .16     .16      .16
    30%,  3 epochs, shuffled, 500 rows         .03      .20      .14     .17      .17
    30%, 10 epochs, shuffled                   .15      .24      .12     .46      .42
    10%,  6 epochs, shuffled                   .29      .58      .47     .62      .68
    30%,  6 epochs, shuffled, 5%               .11      .22      .11     .30      .19
    20%,  6 epochs, truncated                  .12      .45      .35     .55      .55
    20%,  3 epochs, unknown words              .81      .52      .04     .51      .05
     0%,  3 epochs, shuffled                   .74      .47        -    .60      .50

    TracIn: -g_i . mean of h_j.    cosine: the same, with g_i of length 1.

So the loss is better where wrong rows are the only ones that cannot be predicted, and much worse where others have a
high loss as well. With three or four checkpoints instead of the last adapter (3 seeds), summed without weights, the
recall fell from .48 to .37 (30%, 10 epochs) and from .60 to .44 (0%, 3 epochs). Dividing gradients by the root of
AdamW's second moments changed neither number for the last one.
"""

import json
import random
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import measure
from benchmarks.studies.snippets import QUESTION, labelled_folder, write_rows
from tailora.data.demo import data_folder
from tailora.evaluation.statistics import difference_over_seeds
from tailora.study.config import RowsConfig
from tailora.study.influence import FinishedRun
from tailora.study.rows import score_rows, spec_without
from tailora.study.trial import TrialSpec, evaluation_half, get_trial, run_here
from tailora.train.config import TrainConfig

Row = dict[str, Any]  # with a prompt and a completion
Numbers = Sequence[int]  # of rows, from 1
KINDS_OF = {
    "chats": ("shuffled", "language", "truncated"),
    "reviews": ("language", "swapped"),
    "words": ("shuffled", "truncated"),
}
SHARES, SEEDS, ROWS, HELD_OUT, EPOCHS = (0.1, 0.05), 3, 240, 200, 2
QUICK_ROWS, QUICK_HELD_OUT, QUICK_STEPS = 20, 8, 2
OTHER_SEED, DRAWS, LEAST_COST = 100, 1000, 0.01
RANKINGS = ("score", "loss", "length", "chance")
OTHER_LABEL = {"positive": "negative", "negative": "positive"}
SPANISH = {"positive": "positivo", "negative": "negativo"}
SENTENCES = """Hola, ¿qué tal estás hoy?|No lo sé, quizás mañana.|Me gusta mucho el cine.|Ayer fui a la playa.
¿De dónde eres?|Claro que sí, me encantaría.|Tengo mucha hambre.|Creo que hoy va a llover.|Nunca he probado esa comida.
Mi perro duerme todo el día.|Estoy estudiando para un examen.|¡Qué buena idea!|Prefiero leer un libro en casa.
Trabajo en una tienda pequeña.|No tengo tiempo ahora mismo.|Mi color favorito es el verde.|Vivo cerca de la estación.
A veces juego al fútbol con mis amigos.|Buenas noches, hasta luego.|Eso suena muy divertido.|¿La has visto?
Me duele un poco la cabeza.|El verano es mi estación preferida.|Gracias, eres muy amable.|Toco la guitarra."""
LANGUAGE = re.split(r"[|\n]", SENTENCES)

# ---- Data and planted rows


def chats() -> list[Row]:
    rows = []
    for line in [line for name in ("train", "eval") for line in read_lines(data_folder() / f"{name}.jsonl")]:
        messages = json.loads(line)["messages"]
        for question, reply in zip(messages[::2], messages[1::2], strict=False):
            if len(question["content"]) <= 100 and 8 <= len(reply["content"]) <= 100:
                rows.append({"prompt": question["content"], "completion": reply["content"]})
    return rows


def reviews() -> list[Row]:
    lines = [line for name in ("train", "eval") for line in read_lines(labelled_folder() / f"{name}.jsonl")]
    rows = [json.loads(line) for line in lines]
    return [
        {"prompt": QUESTION.format(text=row["text"]), "completion": row["label"]}
        for row in rows
        if len(row["text"]) <= 100
    ]


def words() -> list[Row]:
    known = sorted({*re.findall(r"\b[a-z]{3,7}\b", (data_folder() / "train.jsonl").read_text(encoding="utf-8"))})
    chosen = [random.Random(number).sample(known, 4) for number in range(ROWS + HELD_OUT)]
    return [{"prompt": f"Reverse: {' '.join(row)}", "completion": " ".join(row[::-1])} for row in chosen]


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def plant(rows: Sequence[Row], kind: str, share: float, seed: int) -> list[int]:
    """Makes some replies wrong, in place, and returns the numbers of their rows, from 1.

    Rows whose reply would stay the same are not planted.
    """
    generator = random.Random(seed)
    order = generator.sample(range(len(rows)), len(rows))
    replies: dict[int, str] = {}  # index -> the wrong reply
    if kind == "shuffled":
        chosen = order[: round(share * len(rows))]
        replies = {
            index: other
            for index, source in zip(chosen, chosen[1:] + chosen[:1], strict=True)
            if (other := rows[source]["completion"]) != rows[index]["completion"]
        }
    else:
        for index in order:
            wrong = wrong_reply(rows[index]["completion"], kind, generator)
            if wrong != rows[index]["completion"] and len(replies) < round(share * len(rows)):
                replies[index] = wrong
    for index, reply in replies.items():
        rows[index]["completion"] = reply
    return sorted(index + 1 for index in replies)


def wrong_reply(reply: str, kind: str, generator: random.Random) -> str:
    if kind == "language":
        return SPANISH.get(reply) or generator.choice(LANGUAGE)
    if kind == "truncated":
        return reply[: len(reply) // 2].rstrip() or reply
    return OTHER_LABEL[reply]


# ---- Runs


def cells(quick: bool) -> list[measure.Cell]:
    """All cells of the first seed come first, so that a part of them is a fair sample."""
    listed = [
        {"data": data, "kind": kind, "share": share, "seed": seed}
        for seed, share, (data, kinds) in product(range(SEEDS), SHARES, KINDS_OF.items())
        for kind in kinds
    ]
    return [{**cell, "threads": 1, "malloc": "default", "quick": quick} for cell in listed[: 2 if quick else None]]


def run_cell(data: str, kind: str, share: float, seed: int, quick: bool, threads: int) -> dict[str, Any]:
    """Returns the places of the planted rows in each ranking, from 0; and the losses after retraining.

    sums: of the evaluated held-out examples, for the runs "all", "found" and "planted".    counts: their tokens.
    """
    torch.set_num_threads(threads)
    name = f"{data}-{kind}-{share:g}-{seed}"
    folder = measure.QUICK / f"planted_rows{'-quick' * quick}" / measure.source_hash() / name
    folder.mkdir(parents=True, exist_ok=True)
    count, held_out = (QUICK_ROWS, QUICK_HELD_OUT) if quick else (ROWS, HELD_OUT)
    rows = {"chats": chats, "reviews": reviews, "words": words}[data]()
    rows = random.Random(0).sample(rows, count + held_out)
    planted = plant(rows[:count], kind, share, seed)
    write_rows(folder / "train.jsonl", rows[:count])
    write_rows(folder / "held_out.jsonl", rows[count:])

    files = {"data": str(folder / "train.jsonl"), "eval_data": str(folder / "held_out.jsonl")}
    settings = {"model": "demo", **files, "num_train_epochs": EPOCHS, "max_length": 128, "seed": seed, "samples": 0}
    settings |= {"max_steps": QUICK_STEPS} if quick else {}
    first = get_trial(TrialSpec(settings), folder / "scored", run_trial=run_here)
    run = str(folder / "scored" / "run")
    train = TrainConfig(**{**settings, "output_dir": str(folder / "rows")})
    scored = score_rows(train, RowsConfig(run=run), measure.log)
    lengths = [len(row["prompt"]) + len(row["completion"]) for row in rows[:count]]
    longest = (np.argsort(lengths, kind="stable")[::-1] + 1).tolist()
    rankings: dict[str, Numbers] = {
        "score": [row.row for row in scored.rows],
        "loss": [row.row for row in sorted(scored.rows, key=lambda row: -row.loss)],
        "longest": longest,
        "shortest": longest[::-1],
    }
    result = {"places": {key: [order.index(number) for number in planted] for key, order in rankings.items()}}
    if share < max(SHARES):
        return result
    half, sums = evaluation_half(len(first.counts)), {}
    examples_of = {row.row: row.examples for row in scored.rows}
    for variant, numbers in {"all": [], "found": rankings["score"][: len(planted)], "planted": planted}.items():
        left_out = [example for number in numbers for example in examples_of[number]]
        spec = spec_without(left_out, FinishedRun.read(Path(run)), OTHER_SEED + seed, scored.steps)
        trial = get_trial(replace(spec, before=first.base), folder / variant, run_trial=run_here)
        sums[variant] = [round(float(value), 4) for value in np.array(trial.sums)[half]]
    return {**result, "sums": sums, "counts": np.array(first.counts)[half].tolist()}


# ---- Evaluation


def recall_at_k(order: Numbers, planted: Collection[int]) -> float:
    """Returns the share of the planted rows among the first k. order: numbers of rows, the worst first."""
    return len({*order[: len(planted)]} & {*planted}) / len(planted)


def interval(values: Sequence[Sequence[float]], mean: Callable[..., float] | None = None) -> list[float]:
    """Returns the mean over cells with its interval. values: of each cell, one or more numbers per seed."""
    mean_of = mean or (lambda of_cell: np.mean(of_cell))
    generator = np.random.default_rng(0)
    arrays = [np.array(of_cell) for of_cell in values]
    draws = [
        np.mean([mean_of(generator.choice(arrays[index], len(arrays[index]))) for index in chosen])
        for chosen in generator.integers(len(arrays), size=(DRAWS, len(arrays)))
    ]
    return [float(np.mean([mean_of(of_cell) for of_cell in arrays])), *np.quantile(draws, (0.025, 0.975)).tolist()]


def share_recovered(of_seeds: Any) -> float:
    """of_seeds: loss(a) - loss(b) and loss(a) - loss(c) of each seed."""
    undone, cost = np.sum(of_seeds, axis=0)
    return float(undone / cost)


def judge(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the verdict; intervals as [value, low, high].

    recall: "all", a kind, a data set or a share -> interval of each ranking and of its difference from the score.
    retraining: the cells of 10%.    recovered: over those that count; None if there are none.
    """
    by_cell: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for cell in measured:
        key = cell["cell"]
        by_cell.setdefault((key["data"], key["kind"], key["share"]), []).append(cell["result"])
    recalls = {key: recalls_of(results, key[-1]) for key, results in by_cell.items()}
    groups = {"all": [*recalls]}
    for part, values in enumerate(zip(*recalls, strict=True)):
        groups |= {str(value): [key for key in recalls if key[part] == value] for value in dict.fromkeys(values)}
    of_groups = {}
    for group, keys in groups.items():
        of_groups[group] = {name: interval([recalls[key][name] for key in keys]) for name in RANKINGS}
        for name in RANKINGS[1:]:
            differences = [np.subtract(recalls[key]["score"], recalls[key][name]).tolist() for key in keys]
            of_groups[group][f"score - {name}"] = interval(differences)
    retrained = {key: retraining(results) for key, results in by_cell.items() if "sums" in results[0]}
    counted = [cell["undone and cost"] for cell in retrained.values() if cell["counts"]]
    return {
        "cells": len(measured),
        "recall": of_groups,
        "retraining": [{"data": key[0], "kind": key[1], **cell} for key, cell in retrained.items()],
        "recovered": interval(counted, share_recovered) if counted else None,
    }


def recalls_of(results: Sequence[Mapping[str, Any]], share: float) -> dict[str, list[float]]:
    """Returns the recall of each ranking with each seed."""
    places = [result["places"] for result in results]
    recalls = {name: [float(np.mean(np.array(p[name]) < len(p[name]))) for p in places] for name in places[0]}
    recalls["length"] = max(recalls.pop("longest"), recalls.pop("shortest"), key=lambda values: float(np.mean(values)))
    return {**recalls, "chance": [share] * len(places)}


def retraining(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what the planted rows cost, what was undone, and whether the cell counts."""
    counts = results[0]["counts"]
    a, b, c = (np.array([result["sums"][name] for result in results]) for name in ("all", "found", "planted"))
    cost = difference_over_seeds(c, a, counts)
    losses = np.stack([(a - b).sum(1), (a - c).sum(1)], axis=1) / np.sum(counts)  # (seeds, 2)
    does_count = cost.low > 0 and cost.value >= LEAST_COST
    return {
        "cost": [cost.value, cost.low, cost.high],
        "undone": float(losses[:, 0].mean()),
        "counts": bool(does_count),
        "recovered": share_recovered(losses) if does_count else None,
        "undone and cost": losses.tolist(),
    }


def report(path: Path) -> None:
    """Prints the verdict, and adds it to the file."""
    stored = json.loads(path.read_text())
    verdict = judge(stored["cells"])
    print(json.dumps(verdict, indent=1))
    path.write_text(json.dumps({**stored, "verdict": verdict}, indent=2) + "\n")


if __name__ == "__main__":
    command = sys.argv.pop(1) if sys.argv[1:2] in (["run"], ["judge"]) else "run"
    if command == "run":
        measure.main("planted_rows", str(__doc__), cells, run_cell)
    else:
        report(measure.RESULTS / "planted_rows.json")
