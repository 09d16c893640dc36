"""`tailora inspect`."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import call, check_refused, output, save_random_adapter
from tiny import chat_model


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_adapter(tmp_path_factory.mktemp("inspect") / "one", tiny_model)


def test_the_table_fits_80_columns_and_says_what_more_there_is(
    adapter: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, said, told = call("inspect", adapter)
    assert code == 0
    assert told == "loading the adapter\n"
    assert f"{adapter}: 14 updates of rank 4, scale 8, made for {tiny_model}" in said
    assert "None of the applicable rules advises a change." in said
    assert f"Add --model {tiny_model} to see " in said
    table = [line for line in said.splitlines() if "_proj" in line]
    assert len(table) == 8  # of 14: two layers in two thirds, seven names
    assert all(len(line) <= 80 for line in table)
    energy = [float(line.split()[3].rstrip("%")) for line in table]
    assert energy == sorted(energy, reverse=True)
    assert "\n--all shows 6 more rows.\n" in said
    names = said.partition("layers  module")[2].partition("\n")[0].split()
    legend = said.partition("more rows.\n\n")[2].partition("\n\n")[0]
    assert [line.split()[0] for line in legend.splitlines()] == names  # what each column means
    code, said, _ = call("inspect", adapter, "--all", "--model", tiny_model, "--no-intruders")
    assert code == 0
    assert "0.self_attn.q_proj" in said
    assert "more rows" not in said
    assert "None of the applicable rules advises a change." in said or "Rules that advise" in said
    assert "module (after model.layers.)" in said
    assert "‖ΔW‖/‖W‖  " in said


@pytest.mark.slow
def test_json_is_one_object_and_the_report_has_the_same(
    adapter: Path, tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    both = ["--model", tiny_model, "--data", chats]
    code, said, told = call("inspect", adapter, *both, "--output-dir", tmp_path / "report", "--json")
    assert code == 0, told
    found = json.loads(said.splitlines()[-1])
    assert found["modules"][0].keys() >= {
        *("path", "r", "effective_rank", "stable_rank", "energy", "relative_norm", "intruders", "scaling")
    }
    assert found["held_out"]["half"]["loss"] > 0
    assert {"kl", "loss_before", "loss_after"} <= found["forgetting"].keys()
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report.pop("kind") == "inspect"
    assert report == found


@pytest.mark.slow
def test_data_is_read_with_the_columns_and_the_system_message_of_the_run(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "run" / "adapter")
    settings = {"field": {"prompt": "question", "completion": "reply"}, "system": "be brief"}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"settings": settings}))
    (tmp_path / "rows.jsonl").write_text('{"question": "What colour is thing 1?", "reply": "It is red."}\n' * 2)
    flags = ["--field", "prompt=question,completion=reply", "--system", "be brief"]

    def losses(*words: object) -> tuple[dict[str, float], str]:
        code, said, told = call("inspect", *words, "--data", tmp_path / "rows.jsonl", "--no-intruders", "--json")
        assert code == 0, told
        return json.loads(said.splitlines()[-1])["held_out"], told

    of_run, told = losses(tmp_path / "run")
    assert "using the column names from training: --field prompt=question,completion=reply; " in told
    assert of_run == losses(adapter, *flags)[0]


def test_the_base_of_a_run_is_used_if_it_is_there(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    run = shutil.copytree(adapter, tmp_path / "run" / "adapter").parent
    (run / "run.json").write_text(json.dumps({"settings": {"field": {"prompt": "question"}}}))
    with_base = output("inspect", run, "--no-intruders")
    assert with_base == output("inspect", run, "--no-intruders", "--model", tiny_model)
    assert "‖ΔW‖/‖W‖  " in with_base
    files = output("inspect", run, "--model", "none")
    assert "‖ΔW‖/‖W‖  " not in files
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    (run / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "absent/"}))
    code, said, told = call("inspect", run)
    assert (code, said.splitlines()[1:]) == (0, files.replace(str(tiny_model), "absent/").splitlines()[1:])
    assert "using the column names" not in told  # no data is read


MISTAKES = {
    "no adapter": (["BASE"], "adapter_model.safetensors"),
    "no data, base of the adapter": (["ONE", "--data", "absent.jsonl"], "the base model is BASE, as recorded in ONE"),
    "another base": (["ONE", "--model", "OTHER"], "a different base model"),
    "no data": (["ONE", "--model", "BASE", "--data", "absent.jsonl"], "absent.jsonl"),
    "no report": (["ONE", "--output-dir", "ONE", "--overwrite"], "but only report.json, report.html would be replaced"),
}


@pytest.mark.parametrize(("tokens", "hint"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_exit_with_2(tokens: list[str], hint: str, adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    if "OTHER" in tokens:
        chat_model(initializer_range=0.05).save_pretrained(tmp_path / "other")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "other" / name).write_bytes((tiny_model / name).read_bytes())
    places = {"ONE": adapter, "BASE": tiny_model, "OTHER": tmp_path / "other"}
    for name, place in places.items():
        tokens, hint = [token.replace(name, str(place)) for token in tokens], hint.replace(name, str(place))
    check_refused(hint, "inspect", *tokens)
