"""Several sources with their shares of an epoch, and weights of rows."""

from pathlib import Path

import pytest
from data_rows import PAIRS, chat_row, prepare, stream, texts_of

from tailora.data.dataset import Mixture, warnings_of
from tailora.data.readers import Source
from tailora.data.samples import Conversation
from tailora.errors import DataError

# ---- Several sources

SEED = 2  # which holds out both rows of one of two sources


def test_several_sources_are_read_held_out_and_reported_together(bytes_tokenizer, jsonl, chatml) -> None:
    chats = jsonl([chat_row(f"hello {n}", "you") for n in range(10)], "chats.jsonl")
    texts = jsonl([{"text": f"one two {n}", "id": n} for n in range(6)], "texts.jsonl")
    sources = [Source(chats, 2), Source(texts, 0.5), Source(jsonl(PAIRS[:4], "pairs.jsonl"))]
    prepared = prepare(sources, bytes_tokenizer(chatml), validation_split=0.2)
    report = prepared.report
    assert report.source == f"{chats}=2, {texts}=0.5, {sources[2].name}"
    assert (report.shape, report.ignored) == ("messages, text, prompt/completion", ["id"])
    counted = [(chats, 2, 10), (texts, 0.5, 6), (sources[2].name, 1, 4)]
    assert [(part.name, part.weight, part.rows) for part in report.sources] == counted
    assert [part.train + part.eval for part in report.sources] == [10, 6, 4]
    assert (report.train, report.eval, report.rows) == (16, 4, 20)
    sizes = tuple(part.train for part in report.sources)
    assert prepared.train.mixture == Mixture(sizes, (2, 0.5, 1))
    assert prepared.train.mixture.counts == [2 * sizes[0], round(sizes[1] / 2), sizes[2]]
    assert prepared.train.mixture.counts == [part.epoch for part in report.sources]
    assert len(prepared.eval) == len(prepared.eval_samples) == 4
    for sample, example in zip(prepared.eval_samples, prepared.eval, strict=True):
        is_chat = isinstance(sample, Conversation)
        written = sample.messages[0]["content"] if is_chat else getattr(sample, "prompt", "one")
        assert written.strip() in bytes_tokenizer().decode(example.input_ids.tolist())


def test_sources_without_weights_have_no_mixture(bytes_tokenizer, jsonl) -> None:
    parts = [Source(jsonl(PAIRS[:25], "a.jsonl")), Source(jsonl(PAIRS[25:], "b.jsonl"))]
    together = prepare(parts, bytes_tokenizer())
    assert together.train.mixture is None
    assert together.report.sha256 == prepare(jsonl(PAIRS), bytes_tokenizer()).report.sha256


def test_copies_in_other_sources_are_on_the_same_side(bytes_tokenizer, jsonl) -> None:
    sources = [Source(jsonl(PAIRS[:20], "a.jsonl")), Source(jsonl(PAIRS[10:], "b.jsonl"), 3)]
    assert prepare(sources, bytes_tokenizer(), validation_split=0.3).report.flagged["duplicates"] == 0


def test_the_problems_of_all_sources_are_named(bytes_tokenizer, jsonl) -> None:
    sources = [Source(jsonl([row], name)) for name, row in (("a.jsonl", {"text": ""}), ("b.jsonl", {"x": 1}))]
    with pytest.raises(
        DataError, match=r"(?s)2 problems:.*a.jsonl:1: .*nothing to learn.*b.jsonl: the keys of the rows \(x\)"
    ):
        prepare(sources, bytes_tokenizer())


def test_a_source_of_which_all_is_held_out_is_refused(bytes_tokenizer, jsonl) -> None:
    sources = [Source(jsonl(PAIRS[:2], "a.jsonl")), Source(jsonl(PAIRS[2:4], "b.jsonl"))]
    with pytest.raises(DataError, match=r"[ab].jsonl: no examples left to train on; add more data"):
        prepare(sources, bytes_tokenizer(), validation_split=0.5, seed=SEED)


# ---- Weights of rows


def test_rows_bring_their_weights(bytes_tokenizer, jsonl, tmp_path: Path) -> None:
    given = [2, 0.5, 0, None, 1, 3.0]
    rows = [{**row, "weight": weight} for row, weight in zip(PAIRS, given, strict=False)]
    path = jsonl(rows)
    prepared = prepare(path, bytes_tokenizer(), validation_split=0)
    assert prepared.train.weights.tolist() == [2, 0.5, 1, 1, 3]
    assert [example.weight for example in stream(path, bytes_tokenizer())] == [2, 0.5, 1, 1, 3]
    flagged = prepared.report.flagged
    assert (prepared.report.rows, flagged["without_weight"], flagged["cut_away"]) == (6, 1, 0)
    warning = warnings_of(prepared.report.to_dict())["weight 0"]
    assert warning == "1 rows have weight 0, so they are skipped: rows.jsonl:3"
    table = tmp_path / "rows.csv"
    table.write_text("prompt,completion,importance\na,b,2\nc,d,\ne,f,.5\n")
    field = {"weight": "importance"}
    assert prepare(str(table), bytes_tokenizer(), field=field, validation_split=0).train.weights.tolist() == [2, 1, 0.5]
    table.write_text(",prompt,completion\n0,a,b\n1,c,d\n")  # with the index of a pandas DataFrame
    assert prepare(str(table), bytes_tokenizer(), validation_split=0).train.weights.tolist() == [1, 1]
    without = prepare(jsonl(PAIRS[:6]), bytes_tokenizer(), validation_split=0)
    assert (without.train.weights == 1).all()
    assert without.train.hashes()[:2] == prepared.train.hashes()[:2]
    doubled = jsonl([{**row, "weight": 2} for row in PAIRS[:6]])
    assert without.report.sha256 != prepare(doubled, bytes_tokenizer(), validation_split=0).report.sha256


@pytest.mark.parametrize("weight", [-1, "heavy", True, [1], float("nan"), float("inf"), 10**400, "nan"])
def test_a_weight_is_a_number_of_at_least_0(bytes_tokenizer, jsonl, weight) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: weight: expected a number >= 0 .*, got "):
        prepare(jsonl([{**PAIRS[0], "weight": weight}]), bytes_tokenizer())


def test_rows_of_which_none_has_a_weight_are_refused(bytes_tokenizer, jsonl) -> None:
    with pytest.raises(DataError, match="nothing to train on, because 2 rows have weight 0"):
        prepare(jsonl([{**row, "weight": 0} for row in PAIRS[:2]]), bytes_tokenizer())


def test_the_blocks_of_a_text_have_its_weight(bytes_tokenizer, jsonl) -> None:
    path = jsonl([{**row, "weight": 2 + number} for number, row in enumerate(texts_of(30, 40))])
    train = prepare(path, bytes_tokenizer(), max_length=16, validation_split=0).train
    assert train.weights.tolist() == [2 + index for index in train.source_indices]
    assert len(train) > 4
    with pytest.raises(DataError, match="row weights are not supported with --documents concatenated"):
        prepare(path, bytes_tokenizer(), documents="concatenated")
