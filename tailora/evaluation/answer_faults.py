"""Faults of generated answers that are visible without a metric: empty, a loop, or cut off; and what answers have in
common.

A loop is an answer whose end repeats itself: seq-rep-n of Welleck et al. 2020 (arXiv:1908.04319), the share of n-grams
that occurred before. The n-grams consist of bytes, so that languages without spaces, code and numbers need no other
rule. Only the end counts, because most loops begin somewhere and never stop.

tests/evaluation/looping_answers.jsonl has answers of the demo's model, read and labelled before any rule was tried. n,
window and threshold are from this table: recall at the threshold with a precision of at least 95% on one half of the
answers, and recall and precision with this threshold on the other half.

    rule                                       one half   other half
    seq-rep-8 of the last 200 bytes            88%        96%, 94%
    seq-rep-4 of the last 64 tokens            83%        82%, 96%
    seq-rep-4 of all tokens, as in the paper   68%        69%, 97%
    ends in a phrase of 3 tokens, twice        67%        71%, 95%   (the code of Holtzman et al. 2020)
    zlib compresses it by a factor of 2.7      67%        73%, 97%   (as in Whisper, which uses 2.4)
    tokens in repeated pairs                   43%        49%, 100%  (rep-r of Fu et al. 2021)

The threshold below finds 91% of all loops with a precision of 96%; without the arguable answers, 98% with 98%.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, get_args

Fault = Literal["empty", "loop", "cut"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
NGRAM, WINDOW = 8, 200  # bytes
MOST_REPEATED = 0.35  # share of repeated n-grams; any threshold from .34 to .36 finds almost the same answers
LIST_NUMBER = re.compile(r"^\s*\d+[.)]\s", re.MULTILINE)
SHORTEST_COPY = 12  # characters of a prompt; "Good night!" may be answered by the same words


def faults_of(text: str, *, tokens: int = 0, is_cut: bool = False, reference_tokens: int = 0) -> list[Fault]:
    """Returns what is wrong with an answer: at most one fault, since a loop is expected to reach the limit.

    tokens: length of the answer; if it is cut, this is the limit.
    reference_tokens: length of the reply in the data, without an end token; 0 if there is none.
    """
    if not text.strip():
        return ["empty"]
    if repetition(text) >= MOST_REPEATED:
        return ["loop"]
    return ["cut"] if is_cut and 0 < reference_tokens < tokens else []  # the end token needs a place, too


def repetition(text: str) -> float:
    """Returns 1 - (distinct n-grams) / (n-grams) at the end of a text. Welleck et al. (arXiv:1908.04319), seq-rep-n.

    Case, whitespace and the numbers of list items do not count.
    """
    end = normalize(LIST_NUMBER.sub("", text)).encode(errors="replace")[-WINDOW:]
    ngrams = [end[i : i + NGRAM] for i in range(len(end) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def normalize(text: str) -> str:
    return " ".join(text.casefold().split())


@dataclass(frozen=True, slots=True)
class AnswerSummary:
    length_ratio: float | None  # median of an answer's length, divided by its reference's; None without references
    copies_of_prompt: float  # share of answers that begin with their prompt
    identical: float  # share of answers that a different prompt got, too


def summarize_answers(prompts: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> AnswerSummary:
    """Describes answers. None of this is a fault: labels are identical answers, too. references: "" if there is none.

    Summarize the references as answers to see what the data itself does.
    """
    ratios = [len(answer) / len(reference) for answer, reference in zip(answers, references, strict=True) if reference]
    asked, given = [normalize(prompt) for prompt in prompts], [normalize(answer) for answer in answers]
    prompts_of = defaultdict[str, set[str]](set)
    for prompt, answer in zip(asked, given, strict=True):
        prompts_of[answer].add(prompt)
    copies = [len(p) >= SHORTEST_COPY and answer.startswith(p) for p, answer in zip(asked, given, strict=True)]
    identical = [len(prompts_of[answer]) > 1 for answer in given]
    count = max(1, len(given))
    return AnswerSummary(median(ratios) if ratios else None, sum(copies) / count, sum(identical) / count)
