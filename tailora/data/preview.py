"""An example as people read it: its text in pieces, each learned or only read."""

from itertools import groupby
from typing import Any

from tailora.data.dataset import IGNORED, Example


def preview(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """(text, learned) pieces in order; joined they are the decoded example, special tokens shown."""
    pieces = []
    end, shown = 0, ""
    for learned, run in groupby(example.labels.tolist(), key=lambda label: label != IGNORED):
        end += len(list(run))
        # The whole so far, less what was shown: decoding a run alone would lose its leading space.
        ids = example.input_ids[:end].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append((text[len(shown) :], learned))
        shown = text
    return pieces
