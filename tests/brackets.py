"""Rendered samples as text, with the trained spans in [[ ]]."""

from tailora.data.loss_mask import RenderedSample


def with_brackets(rendered: RenderedSample) -> str:
    text, done = "", 0
    for start, stop in rendered.trained_spans:
        text += f"{rendered.text[done:start]}[[{rendered.text[start:stop]}]]"
        done = stop
    return text + rendered.text[done:] + ("[[EOS]]" if rendered.add_eos else "")
