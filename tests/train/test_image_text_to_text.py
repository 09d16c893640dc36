"""Vision-language models: the batches and losses of transformers' own processor, and a run that learns from images."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import found
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from runs import ONE_PASS
from tiny import stir
from tiny_vision import (
    COLORS,
    FAMILIES,
    mllama_processor,
    paligemma_processor,
    save_image,
    save_tiny_llava,
    tiny_vlm,
)
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import LlavaProcessor, ProcessorMixin

from tailora import LoRAConfig, LoRAModel
from tailora.data.chat_template import DataSettings
from tailora.data.image_processor import accepted_inputs
from tailora.data.prepare import prepare
from tailora.errors import ConfigError
from tailora.kernels.loss import Batch
from tailora.train.dataloader import TrainingData
from tailora.train.generate import chat_ids
from tailora.train.image_text_to_text import check_processor, language_model_task
from tailora.train.loss import BatchLayout, make_batch
from tailora.train.model_loading import load_tokenizer
from tailora.train.trainable import FullModel

BY_DEFAULT = ("llava", "qwen2_5_vl", "gemma3", "idefics3")  # no token types, grids, token types, images per row
GLM = "ignore:__array__ implementation:DeprecationWarning"  # its processor converts tensors to arrays
EACH_FAMILY = pytest.mark.parametrize(
    "family", [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.exhaustive) for name in FAMILIES]
)
SIZES = {"red": (48, 40), "green": (60, 110), "blue": (28, 28)}


def write_rows(folder: Path) -> Path:
    """Writes chats with one image, two images of different sizes, none, and one that an earlier row has."""
    for index, name in enumerate(COLORS):
        save_image(folder / f"{name}.png", COLORS[name], SIZES[name], seed=index)
    part = {"type": "image", "path": "red.png"}
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "Which?"}]}]},
        {"messages": [{"role": "user", "content": "<image> or <image>?"}], "images": ["green.png", "blue.png"]},
        {"messages": [{"role": "user", "content": "no image"}]},
        {"messages": [{"role": "user", "content": "<image>"}], "image": "blue.png"},
    ]
    for row in rows:
        row["messages"].append({"role": "assistant", "content": "red"})
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def chats(folder: Path) -> list[list[dict[str, Any]]]:
    """Returns the same chats as the processor reads them."""

    def part(value: str) -> dict[str, str]:
        path = folder / value
        return {"type": "image", "path": str(path)} if path.suffix else {"type": "text", "text": value}

    asked = [["red.png", "Which?"], ["green.png", " or ", "blue.png", "?"], ["no image"], ["blue.png"]]
    reply = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    return [[{"role": "user", "content": [*map(part, values)]}, reply] for values in asked]


OPTIONS: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
PADDED = {"padding": True, "padding_side": "right"}


def batch_of(folder: Path, processor: ProcessorMixin) -> Batch:
    data = prepare(str(write_rows(folder)), processor, DataSettings(validation_split=0))
    layout = BatchLayout(False, "", processor.tokenizer.pad_token_id)
    return make_batch([*data.train], layout, torch.device("cpu"), language_model_task(processor))


def inputs_and_labels(folder: Path, processor: ProcessorMixin) -> tuple[Mapping[str, Tensor], Tensor]:
    """Returns what a plain loop trains on: the processor's batch, with labels for the replies."""
    inputs = processor.apply_chat_template(chats(folder), processor_kwargs=PADDED, **OPTIONS)
    prompts = [
        processor.apply_chat_template([chat[:1]], add_generation_prompt=True, **OPTIONS) for chat in chats(folder)
    ]
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, prompt in enumerate(prompts):
        start = prompt["input_ids"].shape[1]
        end = int(inputs["attention_mask"][row].sum()) - 1  # the model stops before the newline after <|im_end|>
        assert torch.equal(inputs["input_ids"][row, :start], prompt["input_ids"][0])
        labels[row, start:end] = inputs["input_ids"][row, start:end]
    return inputs, labels


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    values = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: value for name, value in zip(named, values, strict=True) if value is not None}


@pytest.mark.filterwarnings(GLM)
@EACH_FAMILY
def test_losses_and_gradients_are_those_of_a_plain_loop_over_the_processors_batches(
    family: str, tmp_path: Path
) -> None:
    model, processor = tiny_vlm(family)
    batch = batch_of(tmp_path, processor)
    inputs, labels = inputs_and_labels(tmp_path, processor)
    mask = batch.inputs["attention_mask"].bool()  # (batch, length), to the last <|im_end|>
    for name, value in accepted_inputs(model, batch.inputs).items():
        if value.shape == mask.shape:
            assert torch.equal(value[mask], inputs[name][:, : mask.shape[1]][mask]), name
        else:
            assert torch.equal(value, inputs[name]), name
    assert inputs.keys() <= {*batch.inputs, "token_type_ids"}
    task = language_model_task(processor)
    ours = task.outputs(model, batch, BatchLayout(False, "", processor.tokenizer.pad_token_id)).losses.mean()
    theirs = model(**inputs, labels=labels).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    mine, other = gradients(ours, model), gradients(theirs, model)
    assert mine.keys() == other.keys()
    assert any("vis" in name for name in mine)
    largest = max(float(value.abs().max()) for value in other.values())
    for name in mine:  # some are zero but for rounding, such as those of the keys' biases
        torch.testing.assert_close(mine[name], other[name], rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.filterwarnings(GLM)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # that PEFT asks for
@EACH_FAMILY
def test_peft_computes_the_same_from_the_adapter_and_the_reverse(family: str, tmp_path: Path) -> None:
    model, processor = tiny_vlm(family)
    inputs, _ = inputs_and_labels(write_rows(tmp_path).parent, processor)
    tuned = LoRAModel(model.eval(), LoRAConfig(r=2, target_modules="language-model"))
    stir(tuned)
    ours = tuned(**inputs).logits
    tuned.save_adapter(tmp_path / "ours")
    base = tiny_vlm(family)[0].eval()
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "ours")(**inputs).logits, ours)
    with tuned.disable_adapter():
        assert not torch.allclose(tuned(**inputs).logits, ours)

    config = PeftConfig(r=2, target_modules="all-linear", init_lora_weights=False)  # with the tower
    peft = get_peft_model(tiny_vlm(family)[0].eval(), config)
    peft.save_pretrained(tmp_path / "peft")
    read = LoRAModel.from_pretrained(tiny_vlm(family)[0].eval(), tmp_path / "peft")
    torch.testing.assert_close(read(**inputs).logits, peft(**inputs).logits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (mllama_processor, "MllamaProcessor does not return the text that replaces an image"),
        (paligemma_processor, "`images` are expected as arguments to a `PaliGemmaProcessor`"),
    ],
)
def test_other_processors_are_refused(make: Callable[[], ProcessorMixin], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_processor(make(), "a model")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("message['content'] + ''", 'can only concatenate list (not "str") to list'),
        ("message['content'] | map(attribute='text') | join", "it writes no placeholder"),
    ],
)
def test_a_chat_template_for_text_is_refused(content: str, cause: str) -> None:
    processor = tiny_vlm("llava")[1]
    processor.chat_template = None
    processor.tokenizer.chat_template = "{% for message in messages %}{{ " + content + " }}{% endfor %}"
    with pytest.raises(ConfigError) as caught:
        check_processor(processor, "a model")
    assert "'a model': the chat template does not render images (" in str(caught.value)
    assert f"{cause}); copy chat_template.jinja of the original model to the folder" in str(caught.value)


class NumbersImages(LlavaProcessor):
    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        return f"{image_idx % 2}{super().replace_image_token(image_inputs, image_idx, **kwargs)}"


class ReadsContents(LlavaProcessor):
    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        is_black = image_inputs["pixel_values"][image_idx].max() < 0
        return super().replace_image_token(image_inputs, image_idx, **kwargs) + "!" * (not is_black)


class TreatsSingleImagesDifferently(LlavaProcessor):
    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        is_single = len(image_inputs["pixel_values"]) == 1
        return super().replace_image_token(image_inputs, image_idx, **kwargs) + "!" * is_single


def test_placeholders_may_depend_on_a_chats_other_images_but_not_on_contents_or_other_chats() -> None:
    processor = tiny_vlm("llava")[1]
    processor.__class__ = NumbersImages
    check_processor(processor, "a model")
    for processor.__class__ in (ReadsContents, TreatsSingleImagesDifferently):
        with pytest.raises(ConfigError, match="its attention_mask, input_ids cannot be computed from single images"):
            check_processor(processor, "a model")


@pytest.mark.parametrize(("family", "adds_bos"), [("llava", True), ("lfm2_vl", False)])
def test_bos_is_added_where_the_processor_adds_it(family: str, adds_bos: bool) -> None:
    processor = tiny_vlm(family)[1]
    start = ("<|im_start|>", processor.tokenizer.convert_tokens_to_ids("<|im_start|>"))
    backend = processor.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    processor.chat_template = processor.chat_template.replace("<|im_start|>", "")
    check_processor(processor, "a model")
    ids = chat_ids([{"role": "user", "content": "a"}], processor)
    assert (ids[0] == start[1]) is adds_bos


def test_a_model_for_images_without_a_processor_is_refused(tmp_path: Path) -> None:
    save_tiny_llava(tmp_path / "model")
    file = tmp_path / "model" / "processor_config.json"
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"processor cannot be loaded: .* not a valid JSON.*; copy processor_config"):
        load_tokenizer(str(tmp_path / "model"))
    file.unlink()
    with pytest.raises(ConfigError, match="its files contain no processor; copy processor_config"):
        load_tokenizer(str(tmp_path / "model"))


def test_a_run_learns_from_images_and_text(tmp_path: Path) -> None:
    model = save_tiny_llava(tmp_path / "model")
    rows = []
    for index in range(24):
        name = [*COLORS][index % 3]
        save_image(tmp_path / f"{index}.png", COLORS[name], seed=index)
        question = {"role": "user", "content": "<image>Which color?"}
        rows.append({"messages": [question, {"role": "assistant", "content": name}], "image": f"{index}.png"})
    rows.append({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "red"}]})
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    arguments = [
        "--model",
        model,
        "--data",
        data,
        "--output-dir",
        run,
        "--max-steps",
        60,
        "--per-device-train-batch-size",
        8,
    ]
    report = found("train", *arguments, "--learning-rate", 2e-2, "--validation-split", 0.2)
    assert report["eval_loss_after"] < report["eval_loss_before"] - 0.5
    targets = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert targets["task_type"] == "CAUSAL_LM"
    held_out = [answer for answer in json.loads((run / "samples.json").read_text()) if not answer["is_training"]]
    answers = [answer for answer in held_out if answer["images"]]
    assert len({answer["prompt"] for answer in answers}) == 1
    assert len({answer["tuned"] for answer in answers}) > 1  # so they depend on the images
    assert [*answers[0]["images"][0]] == ["sha256", "width", "height", "name", "path"]  # and no pixels
    assert Path(answers[0]["images"][0]["path"]).parent == tmp_path
    page = (run / "report.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == sum(len(answer["images"]) for answer in held_out[:3])


def test_a_model_is_tried_on_an_example_with_images_if_there_is_one(tmp_path: Path) -> None:
    file, (_, processor) = write_rows(tmp_path), tiny_vlm("llava")
    long = {"messages": [{"role": role, "content": "long " * 200} for role in ("user", "assistant")]}
    file.write_text(file.read_text() + json.dumps(long) + "\n")
    data = prepare(str(file), processor, DataSettings(validation_split=0))
    shape: Any = SimpleNamespace(task=language_model_task(processor))
    longest = TrainingData(ONE_PASS, data, None, lambda _: iter(()), 1, data.train, shape).longest
    assert len(longest.images) == 2 < len(longest.input_ids) < max(data.train.lengths)


def test_all_weights_of_a_model_for_images_are_read_back(tmp_path: Path) -> None:
    base, processor = tiny_vlm("llava")
    model = FullModel(base, processor, lambda: base)
    model.save(tmp_path / "model")
    assert model.differences(tmp_path / "model") == []
    with torch.no_grad():
        base.model.vision_tower.embeddings.class_embedding[0] += 1
    assert model.differences(tmp_path / "model") == ["model.vision_tower.embeddings.class_embedding"]


@pytest.mark.ranks
def test_two_processes_take_the_steps_of_one_where_only_one_of_them_has_images(tmp_path: Path) -> None:
    save_tiny_llava(tmp_path / "model")
    name, reply = save_image(tmp_path / "red.png", "red", seed=0), {"role": "assistant", "content": "red"}
    rows: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": f"Say {n}"}, reply]} for n in range(8)]
    rows[0]["image"] = rows[5]["image"] = name
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = []
    for way in (["--nproc-per-node", 2], ["--gradient-accumulation-steps", 2], ["--nproc-per-node", 2, "--fsdp"]):
        run = tmp_path / f"run-{len(losses)}"
        tokens = ["train", "--model", tmp_path / "model", "--data", data, "--output-dir", run, "--max-steps", 4, *way]
        tokens += ["--target-modules", "all-linear", "--per-device-train-batch-size", 1, "--validation-split", 0]
        tokens += ["--learning-rate", 1e-2, "--metric-examples", 0]
        subprocess.run([sys.executable, "-m", "tailora", *map(str, tokens)], check=True, timeout=200)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 4
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-6)
