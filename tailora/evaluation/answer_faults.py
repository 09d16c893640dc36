"""Faults of generated answers that are visible without a metric: empty, a loop, or cut off.

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
from typing import Literal, get_args

Fault = Literal["empty", "loop", "cut"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
NGRAM, WINDOW = 8, 200  # bytes
MOST_REPEATED = 0.35  # share of repeated n-grams; any threshold from .34 to .36 finds almost the same answers
LIST_NUMBER = re.compile(r"^\s*\d+[.)]\s", re.MULTILINE)


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
    words = LIST_NUMBER.sub("", text).casefold().split()
    end = " ".join(words).encode(errors="replace")[-WINDOW:]
    ngrams = [end[i : i + NGRAM] for i in range(len(end) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
