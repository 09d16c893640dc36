"""Does `tailora rows` find wrong rows, and does training without them undo the damage? The rules, before the runs.

**Not measured yet.** This file has the rules and plants the rows; the runs follow in a later commit, which must not
change the rules.

Data    chats    the demo's chats: open-ended, few replies are the only right one
        reviews  film reviews as chats (snippets.py): the reply is one word, "positive" or "negative"
        sums     sums of two or three one-digit numbers: the reply is a number
        For each: 320 training rows, 200 held-out rows, the demo's model, tailora's default settings, 3 epochs.
Kinds   shuffled   replies of other planted rows (all data)
        language   replies in another language: Spanish sentences of a public catalogue of translations, cut to the
                   length of the reply; for reviews "positivo" and "negativo"
        truncated  the first half of the reply (not for reviews, whose replies are one word)
        swapped    the other label (reviews only), or a sum that is wrong by 1 (sums only)
Shares  5% and 10% of the training rows. Held-out rows stay right.
Seeds   5 for each cell (data, kind, share): they choose the planted rows and seed the run.

Recall at k: the share of the planted rows among the first k, with k the number of planted rows. Rankings: score, as
`tailora rows` gives it; loss, of the finished run, highest first; length, the better of longest and shortest first,
chosen afterwards, which favours it; chance, k / rows. The interval of a cell is over its seeds (Student's t, 95%), of
the difference between two rankings too, paired by seed. Over cells: the mean of the cells' means, cells resampled.

1. `rows` finds planted rows if the mean difference in recall from loss, from length and from chance is above 0, each
   with an interval that excludes 0. It is reported for each kind and each data set, also where it loses. A kind that
   loss finds better, by an interval, is named on the page next to the command.
2. Retraining, on the cells of 10%: (a) the planted data, (b) without the k rows of highest scores, (c) without the
   planted rows, (d) without k random rows, 5 seeds each, removed rows with weight 0, as `tailora rows --prove` does.
   Cost of the planted rows: loss(a) - loss(c). Recovered: (loss(a) - loss(b)) / (loss(a) - loss(c)), with an interval
   by Fieller's method over seeds. A cell counts only if the interval of its cost excludes 0 and the cost is at least
   .01 nats per token; the number of other cells is reported.
   The claim "at least half is recovered" holds if the mean over the cells that count is .5 or more and the interval
   excludes values below .25.
3. Verdicts of `--prove`: the share of cells in which it calls the rows harmful, and the share of clean data sets (no
   planted rows, 3 data sets x 5 seeds) in which it does: at most 1 of 15 if its 95% intervals are honest.

If 1 or 2 fails, the page says by how much, and `tailora rows` ranks by what was best, if that is the loss.

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

    python -m benchmarks.studies.planted_rows CHATS.jsonl OUT.jsonl --kind shuffled --share 0.1 --seed 0
"""

import argparse
import json
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Row = dict[str, Any]  # with a prompt and a completion
KINDS = ("shuffled", "language", "truncated", "swapped")
KINDS_OF = {
    "chats": ("shuffled", "language", "truncated"),
    "reviews": ("language", "swapped"),
    "sums": ("shuffled", "language", "truncated", "swapped"),
}
SHARES, SEEDS, ROWS, HELD_OUT, EPOCHS = (0.05, 0.1), 5, 320, 200, 3
OTHER_LABEL = {"positive": "negative", "negative": "positive"}


def plant(rows: Sequence[Row], kind: str, share: float, seed: int, sentences: Sequence[str] = ()) -> list[int]:
    """Makes some replies wrong, in place, and returns the numbers of their rows, from 1.

    sentences: in another language, for the kind "language".    Rows whose reply would stay the same are not planted.
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
            wrong = wrong_reply(rows[index]["completion"], kind, generator, sentences)
            if wrong != rows[index]["completion"] and len(replies) < round(share * len(rows)):
                replies[index] = wrong
    for index, reply in replies.items():
        rows[index]["completion"] = reply
    return sorted(index + 1 for index in replies)


def wrong_reply(reply: str, kind: str, generator: random.Random, sentences: Sequence[str]) -> str:
    if kind == "language":
        return generator.choice(sentences)[: max(len(reply), 1)]
    if kind == "truncated":
        return reply[: len(reply) // 2].rstrip() or reply
    if reply in OTHER_LABEL:
        return OTHER_LABEL[reply]
    return str(int(reply) + generator.choice((-1, 1)))


def recall_at_k(order: Sequence[int], planted: Collection[int]) -> float:
    """Returns the share of the planted rows among the first k. order: numbers of rows, the worst first."""
    return len({*order[: len(planted)]} & {*planted}) / len(planted)


def recovered(planted: ArrayLike, without_found: ArrayLike, without_planted: ArrayLike) -> float:
    """Returns the share of the cost that training without the rows found undoes. All: losses by seed."""
    a, b, c = (float(np.mean(losses)) for losses in (planted, without_found, without_planted))
    return (a - b) / (a - c)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plants wrong rows and prints their numbers.")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--share", type=float, default=SHARES[-1])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sentences", type=Path, help="a text file with a sentence in another language per line")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.data.read_text().splitlines()]
    sentences = arguments.sentences.read_text().splitlines() if arguments.sentences else []
    numbers = plant(rows, arguments.kind, arguments.share, arguments.seed, sentences)
    arguments.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
