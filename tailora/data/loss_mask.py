"""The loss mask: which tokens of a sample are trained.

The chat template says which spans of the text are trained; here these spans become tokens. Tokens are trained only if
the model sees the same tokens before them when it generates.
"""

from bisect import bisect_right

from tailora.data.chat_template import ChatTokenizer, RenderedSample, Tokens


def loss_mask(
    rendered: RenderedSample, tokens: Tokens, tokenizer: ChatTokenizer, max_length: int
) -> tuple[list[int], list[bool]]:
    """Returns token ids, with BOS and EOS where they belong, and for each whether it is trained.

    tokens: of the whole rendered text. They are used if its prompts have the same tokens as in generation; otherwise
    prompts and replies are tokenised one by one.
    max_length: only the prompts of replies that begin before it are compared, since the others will be cut off.
    """
    ids, mask = _mask_from_offsets(rendered, tokens, tokenizer, max_length) or _mask_from_pieces(rendered, tokenizer)
    if rendered.add_bos and ids[: len(tokenizer.bos_ids)] != tokenizer.bos_ids:
        ids, mask = tokenizer.bos_ids + ids, [False] * len(tokenizer.bos_ids) + mask
    if rendered.add_eos and tokenizer.eos_id is not None and ids[-1:] != [tokenizer.eos_id]:
        ids, mask = [*ids, tokenizer.eos_id], [*mask, True]
    return ids, mask


def _mask_from_offsets(
    rendered: RenderedSample, tokens: Tokens, tokenizer: ChatTokenizer, max_length: int
) -> tuple[list[int], list[bool]] | None:
    """Returns None if the prompts have other tokens than in generation, or if there are no offsets."""
    if tokens.offsets is None:
        return None
    ends = [end for _, end in tokens.offsets]
    mask = [False] * len(tokens.ids)
    for start, end in rendered.trained_spans:
        first, last = bisect_right(ends, start), bisect_right(ends, end)
        mask[first:last] = [True] * (last - first)
        if first >= max_length:
            continue
        # Special tokens split a text before anything else is done to it, so only what follows the last one can differ.
        split = next((i for i in range(first - 1, 0, -1) if tokens.ids[i] in tokenizer.special_ids), 0)
        split_start = tokens.offsets[split][0] if split else 0
        if tokenizer.token_ids(rendered.text[split_start:start]) != tokens.ids[split:first]:
            return None
    return tokens.ids, mask


def _mask_from_pieces(rendered: RenderedSample, tokenizer: ChatTokenizer) -> tuple[list[int], list[bool]]:
    """Prompts and replies tokenised one by one."""
    ids: list[int] = []
    mask: list[bool] = []
    previous_end = 0
    text_end = len(rendered.text)
    for start, end in [*rendered.trained_spans, (text_end, text_end)]:
        for piece, is_trained in ((rendered.text[previous_end:start], False), (rendered.text[start:end], True)):
            piece_ids = tokenizer.token_ids(piece) if piece else []
            ids += piece_ids
            mask += [is_trained] * len(piece_ids)
        previous_end = end
    return ids, mask
