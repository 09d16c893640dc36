"""Vision-language models: the batches and losses of transformers' own processor, and a run that learns from images."""

import json
from pathlib import Path

import torch
from command_line import found
from tiny_vision import COLORS, save_image, save_tiny_llava, tiny_llava

from tailora.data.chat_template import DataSettings
from tailora.data.prepare import prepare
from tailora.train.image_text_to_text import language_model_task
from tailora.train.loss import BatchLayout, make_batch


def test_the_loss_is_that_of_a_plain_loop_over_the_processors_batches(tmp_path: Path) -> None:
    model, processor = tiny_llava()
    for index, name in enumerate(COLORS):
        save_image(tmp_path / f"{name}.png", COLORS[name], seed=index)
    part = {"type": "image", "path": "red.png"}
    rows = [
        {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "Which?"}]}]},
        {"messages": [{"role": "user", "content": "<image> or <image>?"}], "images": ["blue.png", "green.png"]},
        {"messages": [{"role": "user", "content": "no image"}]},
    ]
    for row in rows:
        row["messages"].append({"role": "assistant", "content": "red"})
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare(str(file), processor, DataSettings(validation_split=0))
    task, pad = language_model_task(processor), processor.tokenizer.pad_token_id
    batch = make_batch([*data.train], BatchLayout(False, "", pad), model.device, task)
    ours = task.outputs(model, batch, BatchLayout(False, "", pad)).losses.mean()

    def image(name: str) -> dict[str, str]:
        return {"type": "image", "path": str(tmp_path / f"{name}.png")}

    def text(words: str) -> dict[str, str]:
        return {"type": "text", "text": words}

    asked = [
        [image("red"), text("Which?")],
        [image("blue"), text(" or "), image("green"), text("?")],
        [text("no image")],
    ]
    reply = {"role": "assistant", "content": [text("red")]}
    chats = [[{"role": "user", "content": content}, reply] for content in asked]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    padded = {"padding": True, "padding_side": "right"}
    inputs = processor.apply_chat_template(chats, processor_kwargs=padded, **options)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, chat in enumerate(chats):
        prompt = processor.apply_chat_template([chat[:1]], add_generation_prompt=True, **options)["input_ids"][0]
        end = int(inputs["attention_mask"][row].sum()) - 1  # the model stops before the newline after <|im_end|>
        assert torch.equal(inputs["input_ids"][row, : len(prompt)], prompt)
        labels[row, len(prompt) : end] = inputs["input_ids"][row, len(prompt) : end]
    theirs = model(**inputs, labels=labels).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    parameters = [p for name, p in model.named_parameters() if "lm_head" in name or "multi_modal_projector" in name]
    for mine, other in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


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
    arguments = ["--model", model, "--data", data, "--output-dir", run, "--max-steps", 60]
    report = found("train", *arguments, "--learning-rate", 2e-2, "--validation-split", 0.2)
    assert report["eval_loss_after"] < report["eval_loss_before"] - 0.5
    targets = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert targets["task_type"] == "CAUSAL_LM"
    answers = json.loads((run / "samples.json").read_text())
    assert len({answer["prompt"] for answer in answers}) == 1
    assert len({answer["tuned"] for answer in answers}) > 1  # so they depend on the images
