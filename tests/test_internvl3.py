"""InternVL3 and 3.5 in transformers' own layout, against transformers' own processor and model."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import build_internvl3, make_picture, save_runs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer, InternVLProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

import data
from model import OLLM
from plumbing.files import BadInput
from real import checkpoints
from real.families import OLD_CHATS, PromptSettings, normalize

QUESTION = "What is left of the door?"
SIZES = [(64, 64), (56, 120), (300, 100), (448, 448), (640, 480), (1000, 90), (90, 1000)]


@pytest.fixture(params=["qwen2", "qwen3"])
def folder(request, tmp_path):
    return build_internvl3(tmp_path, request.param)


def build_processor(folder, size=56):
    """Returns transformers' processor of a checkpoint, with the settings of the published ones."""
    pictures = GotOcr2ImageProcessorPil(
        size={"height": size, "width": size}, image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:  # its processor of films would need torchvision
        patch.setattr(InternVLProcessor, "check_argument_for_proper_class", lambda *_: None)
        return InternVLProcessor(pictures, tokenizer, None, image_seq_length=4,
                                 chat_template=tokenizer.chat_template)


def their_inputs(folder, picture):
    """Returns what the processor makes of a picture (or None) and QUESTION."""
    content = [{"type": "text", "text": QUESTION}]
    if picture is not None:
        content.insert(0, {"type": "image", "image": picture})
    return build_processor(folder).apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt")


@torch.no_grad()
@pytest.mark.parametrize("size", [None, *SIZES])
def test_prompt_tiles_logits_and_answer_are_transformers_own(size, folder):
    picture = size and make_picture(size)
    ollm, theirs = OLLM.load(folder), their_inputs(folder, picture)
    settings = replace(ollm.settings, max_tiles=12)  # the processor's default
    assert ollm.settings == PromptSettings("internvl", image_size=56, tokens_per_tile=4)

    # The prompt and the picture.
    sample = {"question": QUESTION}
    if picture:
        sample["pixels"] = data.picture_inputs(picture, settings)
        tiles = normalize(sample["pixels"]["pixel_values"])
        assert tiles.shape == theirs["pixel_values"].shape and len(tiles) <= 13
        torch.testing.assert_close(tiles, theirs["pixel_values"], rtol=0, atol=1e-5)
    batch = data.collate([sample], ollm.tokenizer, None, settings, answers=False)
    ids = torch.cat([batch["prefix"]["ids"], batch["text"]["ids"]], dim=1)
    assert ids.tolist() == theirs["input_ids"].tolist()

    # The logits of the question's last token, and twelve greedy tokens.
    native = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    hidden, _ = ollm.decode_query(ollm.prefill(batch), batch["text"])
    ours = ollm.lvlm.lm_head(hidden)
    logits = native(**theirs).logits[:, -ours.size(1):]
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-4)
    new = native.generate(**theirs, do_sample=False, max_new_tokens=12)[0, ids.size(1):]
    expected = ollm.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert ollm.answer([sample], ("text",), max_new_tokens=12)["text"] == [expected]


def test_both_layouts_of_names_are_the_same_model(folder):
    """transformers 4 stored language_model.model.*; its classes have model.language_model.*."""
    published = checkpoints.load_lvlm(folder).state_dict()
    assert "language_model.model.norm.weight" in load_file(folder / "model.safetensors")
    save_file(published, folder / "model.safetensors")
    again = checkpoints.load_lvlm(folder).state_dict()
    assert published.keys() == again.keys()
    assert all(torch.equal(published[name], again[name]) for name in again)


def test_a_question_in_other_words_is_refused(folder):
    """What the chat template writes around a question must be what the LVLM is trained with."""
    path = folder / "chat_template.jinja"
    template = path.read_text()
    path.write_text("{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
                    + template)
    with pytest.raises(BadInput, match="chat template is not InternVL3's") as error:
        OLLM.load(folder)
    assert "\n" not in str(error.value)
    path.write_text(template)
    OLLM.load(folder)


def test_prompts_end_where_the_rotations_change(tmp_path):
    """InternVL3's rotations are "dynamic" beyond its LLM's positions."""
    ollm = OLLM.load(build_internvl3(tmp_path))
    assert ollm.lvlm.config.text_config.rope_parameters["rope_type"] == "dynamic"
    assert ollm.tokenizer.model_max_length == 4096
    sample = {"question": "a " * 4096, "answer": "b"}
    with pytest.raises(BadInput, match="the model has room for 4,096"):
        data.collate([sample], ollm.tokenizer, None, ollm.settings)


@pytest.mark.parametrize("llm, chat", OLD_CHATS.items())
def test_runs_of_earlier_versions_load(llm, chat, tmp_path):
    """They called the chat "llm", and by its LLM's type."""
    base = save_runs(tmp_path) / "base"
    info = json.loads((base / "ollm.json").read_text())
    assert info["settings"].pop("chat") == "Hermes-2"
    info["settings"]["llm"] = llm
    (base / "ollm.json").write_text(json.dumps(info))
    if chat == "Hermes-2":
        assert OLLM.load(base).settings.chat == chat
    else:
        with pytest.raises(BadInput, match="lacks"):  # the built-in tokenizer cannot write it
            OLLM.load(base)
