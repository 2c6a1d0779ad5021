"""The paper's other base models: prompts, weights, positions and pictures against the originals.

`fixtures/internvl2_tiny_internlm2` and `internvl2_tiny_phi3` are tiny checkpoints in OpenGVLab's
layout, tokenizer included, and what the original code computed with them. Qwen2-VL is transformers'
own, so its native pass over whole sequences, with its own positions, is the reference.
`fixtures/prompt_reference_families.json` has token ids of prompts by the original tokenizers.
"""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import true_size
from conftest import (
    FIXTURES,
    QWEN2_VL_TOKENS,
    ROOT,
    build_lvlm_folder,
    build_whisper,
    check_answers_do_not_depend_on_the_batch,
    collate,
    run_here,
    run_script,
    write_tokenizer,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from test_bench_tsv import write_benchmarks
from test_model import ANSWERS, QUESTIONS
from transformers import AutoModelForImageTextToText, Qwen3VLConfig

import data
import train
from analysis.bench import to_float64
from data import IGNORE
from loss import self_kd_loss
from model import OLLM, normalize
from plumbing import runs
from plumbing.files import BadInput
from plumbing.media import speak
from real import checkpoints
from real.families import BASES, CHATS, OLD_CHATS
from world.models import build_audio_encoder

FAMILIES = ("qwen2", "llama", "phi3", "qwen2_vl", "untied", "qwen2_5_vl",  # untied: Qwen2-VL
            "internvl3", "internvl3_5")
SIZES = ((64, 64), (56, 120), (140, 56), (100, 60))


# ---- InternLM2 and Phi-3 against the original code ----


@pytest.fixture(params=["internlm2", "phi3"])
def original(request):
    """Returns (OLLM, samples, reference) of a tiny checkpoint."""
    folder = FIXTURES / f"internvl2_tiny_{request.param}"
    reference = load_file(folder / "reference.safetensors")
    rows = json.loads((folder / "fixture.json").read_text())["rows"]
    pictures = reference["pixel_values"].split([row["tiles"] for row in rows])
    samples = [{**row, "pixels": {"pixel_values": picture}} for row, picture in zip(rows, pictures)]
    return OLLM.load(folder), samples, reference


@torch.no_grad()
def test_prompts_and_logits_are_the_original_codes(original):
    ollm, samples, reference = original
    batch = data.collate(samples, ollm.tokenizer, None, ollm.settings)
    hidden, _ = ollm.continue_prefix(ollm.encode_prefix(batch), batch["text"])
    logits = ollm.lvlm.lm_head(hidden)
    for i, real in enumerate(reference["attention_mask"].bool()):
        parts = [batch[part]["ids"][i][batch[part]["mask"][i]] for part in ("prefix", "text")]
        assert torch.cat(parts).tolist() == reference["input_ids"][i][real].tolist()
        ours = logits[i][batch["text"]["mask"][i]]
        theirs = reference["logits"][i][real[-40:]]
        n = min(len(ours), len(theirs))
        assert n > 15
        torch.testing.assert_close(ours[-n:], theirs[-n:], rtol=0, atol=1e-4)


@torch.no_grad()
def test_greedy_answers_are_the_original_codes(original):
    ollm, samples, reference = original
    end = ollm.tokenizer.convert_tokens_to_ids(CHATS[ollm.settings["chat"]]["end"])
    for i, sample in enumerate(samples):
        batch = data.collate([sample], ollm.tokenizer, None, ollm.settings, answers=False)
        prefix, query = ollm.encode_prefix(batch), batch["text"]
        new = reference[f"new_ids_{i}"].tolist()  # twelve, whether or not one is the end
        for token in new:
            hidden, prefix = ollm.continue_prefix(prefix, query)
            assert ollm.lvlm.lm_head(hidden[0, -1]).argmax() == token
            query = {"ids": torch.tensor([[token]]), "mask": torch.ones(1, 1, dtype=torch.bool)}
        answer = ollm.tokenizer.decode(new[: new.index(end)] if end in new else new,
                                       skip_special_tokens=True)
        assert ollm.answer([sample], ("text",), max_new_tokens=12)["text"] == [answer.strip()]


@torch.no_grad()
def test_a_whole_pass_beyond_the_rotations_limit_is_the_original_codes(original):
    """A shared prefix is not: its keys would keep the rotations of short prompts."""
    ollm, samples, reference = original
    assert ollm.tokenizer.model_max_length == 512 < reference["long_input_ids"].size(1)
    logits = ollm.lvlm(input_ids=reference["long_input_ids"], **samples[0]["pixels"]).logits
    torch.testing.assert_close(logits[:, -20:], reference["long_logits"], rtol=0, atol=1e-4)


def test_beyond_the_limit_is_refused_with_the_tiles_that_fit(original):
    ollm, samples, _ = original
    wide = Image.new("RGB", (56 * 150, 56))
    sample = {"where": "it", "question": "What is this?", "answer": "A red panda."}

    def batch(max_tiles):
        pixels = data.picture_inputs(wide, ollm.settings | {"max_tiles": max_tiles})
        return data.collate([sample | {"pixels": pixels}], ollm.tokenizer, None, ollm.settings)

    with pytest.raises(BadInput, match=r"it: \d+ tokens, .* 512; --max-tiles (\d+) fits") as error:
        batch(150)
    fits = int(str(error.value).split()[-2])
    parts = batch(fits)
    n = sum(int(parts[part]["mask"].sum()) for part in ("prefix", "text"))
    assert 512 - ollm.settings["tokens_per_tile"] < n <= 512, "one tile more would be too many"
    with pytest.raises(BadInput):
        batch(fits + 1)


def test_an_answer_ends_where_the_rotations_change(original):
    ollm, samples, _ = original
    sample = samples[0] | {"question": "What is this? " * 40}
    parts = data.collate([sample], ollm.tokenizer, None, ollm.settings, answers=False)
    n = sum(int(parts[part]["mask"].sum()) for part in ("prefix", "text"))

    def answer(limit, max_new_tokens):
        ollm.tokenizer.model_max_length = limit
        return ollm.answer([sample], ("text",), max_new_tokens=max_new_tokens)["text"]

    assert answer(n + 7, 48) == answer(512, 8) != answer(512, 16)


# ---- the shared prefix, in float64 ----


def build_listener(family, folder, dtype=torch.float64):
    """Returns a tiny LVLM of a family that listens."""
    ollm = OLLM.load(build_lvlm_folder(family, folder))
    small = {"image_size": 56, "tokens_per_tile": 4, "max_tiles": 3}
    torch.manual_seed(0)
    ollm = OLLM(ollm.lvlm, ollm.tokenizer, ollm.settings | small, ollm.base, *build_audio_encoder())
    torch.nn.init.normal_(ollm.projector.weight, std=0.3)
    ollm.train_only("vision-audio")
    return to_float64(ollm) if dtype == torch.float64 else ollm


def make_samples(ollm, pictures):
    """Samples with ragged questions, speech and answers, and pictures where `pictures` says so."""
    rng, samples = np.random.default_rng(0), []
    for i, has_picture in enumerate(pictures):
        sample = {"question": QUESTIONS[i], "answer": ANSWERS[i],
                  "wave": speak(QUESTIONS[i])[0][: 9000 + 777 * i]}
        if has_picture:
            image = Image.fromarray(rng.integers(0, 255, (*SIZES[i][::-1], 3), dtype=np.uint8))
            sample["pixels"] = data.picture_inputs(image, ollm.settings)
        samples.append(sample)
    return samples


def native_logits(ollm, batch, form):
    """Logits (1, T, V) by transformers' own pass: one sample, no cache, its own positions."""
    ids = torch.cat([batch["prefix"]["ids"], batch[form]["ids"]], dim=1)
    is_image = (ids == ollm.lvlm.config.image_token_id).int()
    pixels = dict(batch["pixels"] or {})
    if pixels and pixels["pixel_values"].dtype == torch.uint8:
        pixels["pixel_values"] = normalize(pixels["pixel_values"]).double()
    has_three = hasattr(ollm.lvlm.model, "get_rope_index")
    if has_three:
        ollm.lvlm.model.rope_deltas = None  # which it keeps from one call to the next
    if form == "text":
        kind = {"mm_token_type_ids": is_image} if has_three else {}
        return ollm.lvlm(input_ids=ids, **pixels, **kind).logits

    embedded = ollm.embed(ids, batch["pixels"], ollm.hear(batch["mel"], batch["n_frames"]))
    positions = None
    if has_three:
        positions, _ = ollm.lvlm.model.get_rope_index(ids, is_image, pixels.get("image_grid_thw"))
    return ollm.lvlm(inputs_embeds=embedded, position_ids=positions).logits


def two_full_passes(ollm, samples, alpha):
    """Self-KD's loss by two native passes a sample."""
    total, tokens = 0, 0
    for sample in samples:
        batch, scored = collate(ollm, [sample]), {}
        for form in ("text", "audio"):
            before = torch.full_like(batch["prefix"]["ids"], IGNORE)
            labels = torch.cat([before, batch[form]["labels"]], dim=1)[:, 1:]
            logits = native_logits(ollm, batch, form)[:, :-1]
            scored[form] = logits[labels != IGNORE], labels[labels != IGNORE]
        (student, answer), (teacher, _) = scored["audio"], scored["text"]
        total += len(answer) * self_kd_loss(student, teacher.detach(), answer, alpha)[0]
        tokens += len(answer)
    return total / tokens


@pytest.mark.parametrize("pictures", [(1, 1, 1, 1), (1, 0, 1, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_shared_prefix_equals_two_full_native_passes(family, pictures, tmp_path):
    ollm = build_listener(family, tmp_path)
    samples = make_samples(ollm, pictures)
    ours, theirs = ollm(collate(ollm, samples), 0.75)[0], two_full_passes(ollm, samples, 0.75)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    trained = [p for p in ollm.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(ours, trained), torch.autograd.grad(theirs, trained)):
        assert (a - b).norm() <= 1e-9 * b.norm() + 1e-15


def test_one_dimensional_positions_would_be_seen(tmp_path, monkeypatch):
    """The test above fails for a Qwen2-VL whose image tokens stand in one line."""
    ollm = build_listener("qwen2_vl", tmp_path)
    samples = make_samples(ollm, (1, 1, 1, 1))
    theirs = two_full_passes(ollm, samples, 0.75)
    monkeypatch.setattr("model.prefix_positions", lambda lvlm, ids, mask, pixels:
                        ((mask.cumsum(1) - 1).clamp(min=0), 0))
    ours = ollm(collate(ollm, samples), 0.75)[0]
    assert abs(ours - theirs) > 1e-6 * theirs


@pytest.mark.parametrize("family", ["llama", "phi3", "untied"])
@pytest.mark.parametrize("form", ["text", "audio"])
def test_batched_answers_equal_one_by_one(family, form, tmp_path):
    ollm = build_listener(family, tmp_path)
    samples = make_samples(ollm, (1, 0, 1, 1))
    check_answers_do_not_depend_on_the_batch(ollm, samples, form, max_new_tokens=8)


@torch.no_grad()
def test_greedy_answers_are_qwen2_vls_own(tmp_path):
    """Positions go on from the picture, also behind the first new token."""
    ollm = build_listener("qwen2_vl", tmp_path)
    for sample in make_samples(ollm, (1, 1, 0)):
        batch = collate(ollm, [sample], answers=False)
        ours = ollm.generate(ollm.encode_prefix(batch), batch["text"], max_new_tokens=8)
        query = batch["text"]
        for _ in range(8):
            token = native_logits(ollm, batch | {"text": query}, "text")[:, -1:].argmax(-1)
            query = {"ids": torch.cat([query["ids"], token], dim=1)}
        new = query["ids"][:, batch["text"]["ids"].size(1):]
        end = ollm.tokenizer.convert_tokens_to_ids("<|im_end|>")
        new = new[0].tolist()
        new = new[: new.index(end)] if end in new else new
        assert ours == [ollm.tokenizer.decode(new, skip_special_tokens=True).strip()]


# ---- prompts of the original tokenizers ----


def reference_prompts():
    """Returns {llm: prompts and their ids}."""
    return json.loads((FIXTURES / "prompt_reference_families.json").read_text())["prompts"]


def build_qwen2_vl_tokenizer(folder):
    """Qwen2-VL's tokenizer from that of InternVL2-1B: the same words, other special tokens."""
    write_tokenizer(folder, {token: 151_643 + i for i, token in enumerate(QWEN2_VL_TOKENS)})
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(Path(os.environ["INTERNVL2_1B"]) / name, folder / name)


@pytest.mark.parametrize("llm", reference_prompts())
def test_prompts_have_the_original_tokenizers_ids(llm, tmp_path):
    """INTERNLM2, PHI3 and INTERNVL2_1B name folders with these tokenizers."""
    name = {"llama": "INTERNLM2", "qwen2_vl_text": "INTERNVL2_1B"}.get(llm, "PHI3")
    if name not in os.environ:
        pytest.skip(f"set {name} to a folder with the tokenizer")
    (tmp_path / "config.json").write_text("{}")
    if llm == "qwen2_vl_text":
        build_qwen2_vl_tokenizer(tmp_path)
    else:
        shutil.copytree(os.environ[name], tmp_path, dirs_exist_ok=True)
    cases = reference_prompts()[llm]
    tokenizer, chat = checkpoints.load_tokenizer(tmp_path), OLD_CHATS[llm.removesuffix("_plain")]
    settings = {"chat": chat, "system": CHATS[chat]["system"], "tokens_per_tile": 1}
    for case in cases:
        n, answer = case["image_tokens"], case["answer"]
        sample = {"question": case["question"], "answer": answer or ""}
        if n:
            sample["pixels"] = {"pixel_values": torch.zeros(n, 1)}
        batch = data.collate([sample], tokenizer, None, settings, answers=answer is not None)
        ids = batch["prefix"]["ids"][0].tolist() + batch["text"]["ids"][0].tolist()
        expected = []
        for entry in case["input_ids"]:
            repeated = isinstance(entry, dict)
            expected += [entry["id"]] * entry["repeat"] if repeated else [entry]
        assert ids == expected, case["question"]


def test_qwen2_vls_prompt_to_the_letter(tmp_path):
    ollm = OLLM.load(build_lvlm_folder("qwen2_vl", tmp_path))
    pixels = data.picture_inputs(Image.new("RGB", (64, 48)), ollm.settings | {"image_size": 56})
    sample = {"question": "What is this?", "answer": "A red panda.", "pixels": pixels}
    batch = data.collate([sample], ollm.tokenizer, None, ollm.settings)
    ids = batch["prefix"]["ids"][0].tolist() + batch["text"]["ids"][0].tolist()
    n = len(pixels["pixel_values"]) // 4
    assert ollm.tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>What is this?<|im_end|>\n"
        "<|im_start|>assistant\nA red panda.<|im_end|>")


# ---- pictures of Qwen2-VL ----


@pytest.mark.parametrize("size, most, grid", [
    ((640, 480), 6, (34, 46)), ((640, 480), 1, (26, 36)), ((100, 100), 6, (32, 32)),
    ((3000, 200), 2, (10, 174)), ((448, 448), 1, (32, 32))])
def test_a_whole_picture_has_the_area_of_its_tiles(size, most, grid):
    settings = {"image_size": 448, "min_tiles": 1, "max_tiles": most}
    pixels = data.picture_inputs(Image.new("RGB", size), settings)
    assert pixels["image_grid_thw"].tolist() == [[1, *grid]]
    assert pixels["pixel_values"].shape == (grid[0] * grid[1], 1176)
    assert pixels["pixel_values"].shape[0] <= most * 1024


def test_a_picture_that_is_too_long_is_one_line():
    with pytest.raises(BadInput, match="aspect ratio"):
        data.picture_inputs(Image.new("RGB", (2010, 10)), {"image_size": 56, "min_tiles": 1,
                                                   "max_tiles": 1})


# ---- weights ----


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_half_precision_leave_rotations_alone(family, tmp_path):
    folder = build_lvlm_folder(family, tmp_path)
    whole = OLLM.load(folder).lvlm
    half = checkpoints.load_lvlm(folder, whole.config.image_token_id, torch.bfloat16)
    for name, parameter in whole.named_parameters():
        assert torch.equal(half.get_parameter(name), parameter.bfloat16()), name
    buffers = dict(half.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffers[name], buffer) and buffers[name].dtype == buffer.dtype, name
    tied = whole.lm_head.weight is whole.get_input_embeddings().weight
    assert tied == family.endswith("_vl")
    assert (half.lm_head.weight is half.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("spoil", [False, True])
@pytest.mark.parametrize("family", ["qwen2_vl", "untied", "qwen2_5_vl", "internvl3", "internvl3_5"])
def test_weights_are_those_that_transformers_reads(family, spoil, tmp_path):
    """Even if config.json calls a head tied that is not: InternVL3's calls it nothing."""
    folder = build_lvlm_folder(family, tmp_path)
    if spoil:
        change_config(folder, tie_word_embeddings=True)
    ours, theirs = OLLM.load(folder).lvlm, AutoModelForImageTextToText.from_pretrained(folder)
    states = ours.state_dict(), theirs.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    tied = ours.lm_head.weight is ours.get_input_embeddings().weight
    assert tied == family.endswith("_vl") == ours.config.tie_word_embeddings
    buffers = dict(theirs.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in ours.named_buffers())


def change_config(folder, file="config.json", **keys):
    """Sets keys of a JSON file: llm_config__vocab_size=3."""
    config = json.loads((folder / file).read_text())
    for name, value in keys.items():
        *parents, last = name.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    (folder / file).write_text(json.dumps(config))


@pytest.mark.parametrize("family, change, message", [
    ("llama", {"template": "internvl2_5"}, "internvl2_5"),
    ("qwen2", {"template": "internvl2_5"}, "internvl2_5"),
    ("phi3", {"llm_config__architectures": ["InternLM3ForCausalLM"]}, "InternLM3ForCausalLM"),
    ("phi3", {"vision_config__norm_type": "rms_norm"}, "InternViT-6B"),
    ("qwen2_vl", {"tie_word_embeddings": False}, "lm_head"),
    ("qwen2_vl", {"model_type": "qwen3_vl"}, "qwen3_vl"),
])
def test_what_would_compute_wrongly_is_refused(family, change, message, tmp_path):
    folder = build_lvlm_folder(family, tmp_path)
    change_config(folder, **change)
    with pytest.raises(BadInput, match=message) as error:
        OLLM.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spoil, message", [
    (lambda c: None, "chat template .* it writes None"),
    (lambda c: c["text_config"].update(model_type="qwen3", head_dim=8), "q_norm"),
])
def test_internvl_in_transformers_layout_does_not_tell_its_chat(spoil, message, tmp_path):
    folder = build_lvlm_folder("qwen2", tmp_path)
    lvlm = OLLM.load(folder).lvlm
    native = tmp_path / "native"
    del lvlm.config.template
    lvlm.save_pretrained(native)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(folder / name, native)
    config = json.loads((native / "config.json").read_text())
    spoil(config)
    (native / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=message):
        OLLM.load(native)


def test_norms_that_nobody_applies_are_refused(tmp_path):
    """InternVL3.5 norms queries and keys; as InternVL with Qwen2 it would load without them."""
    folder = build_lvlm_folder("qwen2", tmp_path)
    OLLM.load(folder).lvlm.save_pretrained(tmp_path / "native")
    tensors = load_file(tmp_path / "native/model.safetensors")
    tensors["language_model.model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
    save_file(tensors, tmp_path / "native/model.safetensors")
    with pytest.raises(BadInput, match="q_norm"):
        checkpoints.load_lvlm(tmp_path / "native")


def test_a_tokenizer_without_the_chats_marks_is_refused(tmp_path):
    folder = build_lvlm_folder("phi3", tmp_path)
    shutil.copy(FIXTURES / "internvl2_tiny_internlm2/tokenizer_config.json", folder)
    with pytest.raises(BadInput, match="it lacks"):
        OLLM.load(folder)


def test_a_picture_that_enters_deeper_layers_is_refused():
    """Without them, logits would be off by half of their range, and nothing would say so."""
    text = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                head_dim=16, intermediate_size=32, vocab_size=50,
                rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3],
                                 "rope_theta": 1e4})
    vision = dict(depth=2, hidden_size=16, out_hidden_size=32, num_heads=2, intermediate_size=32,
                  deepstack_visual_indexes=[0])
    config = Qwen3VLConfig(text_config=text, vision_config=vision)
    ollm = OLLM(AutoModelForImageTextToText.from_config(config), None, {})
    picture = {"pixel_values": torch.zeros(16, 3 * 2 * 16 * 16),
               "image_grid_thw": torch.tensor([[1, 4, 4]])}
    with pytest.raises(BadInput, match="deepstack"):
        ollm.see(picture)


def test_a_token_beyond_the_embeddings_is_refused(tmp_path):
    folder = build_lvlm_folder("qwen2_vl", tmp_path)
    change_config(folder, pad_token="<|pad|>", file="tokenizer_config.json")
    with pytest.raises(BadInput, match="beyond the LLM's 199"):
        OLLM.load(folder)


# ---- whole runs ----


def test_the_papers_bases_have_its_settings():
    assert len(BASES) == 9
    for name, (lvlm, clips) in BASES.items():
        preset = train.PRESETS[name]
        assert lvlm.split("/")[1].lower().replace("_", ".").startswith(name)
        assert preset["lvlm"] == lvlm
        assert preset["audio-text"] == {"lr": 4e-5, "global_batch": 128, "micro_batch": clips}
        assert preset["vision-audio"] == {"lr": 4e-5, "global_batch": 64, "micro_batch": 8}
        assert 16 % clips == 0, "eight GPUs have 16 clips a step each"


PRESETS = {"llama": "internvl2-2b", "phi3": "internvl2-4b", "qwen2_vl": "qwen2-vl-2b",
           "untied": "qwen2-vl-7b", "qwen2_5_vl": "qwen2.5-vl-3b",
           "internvl3": "internvl3-1b", "internvl3_5": "internvl3.5-1b"}
FEW = ("--device", "cpu", "--global-batch", 4, "--micro-batch", 2, "--max-steps", 2)


def run(script, *arguments, cwd):
    done = run_here(script, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def align(family, world, folder):
    """Trains audio-text from a family's tiny checkpoint; returns (preset's flags, LVLM, run)."""
    lvlm, whisper = build_lvlm_folder(family, folder), build_whisper(folder / "whisper")
    flags = ("--preset", PRESETS[family], *FEW)
    run("train.py", *flags, "--stage", "audio-text", "--init", lvlm, "--whisper", whisper,
        "--data", world / "audio-text", cwd=folder)
    return flags, lvlm, folder / f"runs/{PRESETS[family]}/audio-text-s0"


@pytest.mark.parametrize("family", [
    "qwen2_vl", "internvl3", *(pytest.param(family, marks=pytest.mark.slow)
                               for family in ("llama", "phi3", "internvl3_5"))])
def test_a_published_checkpoint_is_trained_and_evaluated(family, world, tmp_path):
    flags, lvlm, aligned = align(family, world, tmp_path)
    trained = tmp_path / "trained"
    run("train.py", *flags, "--alpha", 0.75, "--data", world / "vision-audio", "--max-tiles", 1,
        "--out", trained, cwd=tmp_path)
    before, after = OLLM.load(aligned), OLLM.load(trained)
    assert after.settings["max_tiles"] == 1 and runs.source_of(trained, "base") == lvlm
    assert not torch.equal(before.projector.weight, after.projector.weight)
    for name, value in before.lvlm.state_dict().items():
        assert torch.equal(value, after.lvlm.state_dict()[name]), name

    answer = run("eval.py", trained, "--image", world / "test/images/000000.png", "--question",
                 "What is this?", cwd=tmp_path)
    assert answer.startswith("KD 0.75   in writing  ") and "\nKD 0.75   aloud       " in answer
    assert "relation" in run("mmalign.py", trained, "--data", world / "test", "--n", 2,
                             cwd=tmp_path)
    (tmp_path / "tsv").mkdir()
    write_benchmarks(tmp_path / "tsv")
    table = run("eval.py", trained, "--bench", "tsv/RealWorldQA.tsv", "--n", 1,
                "--max-new-tokens", 2, "--suffix", "written", cwd=tmp_path)
    line, = (trained / "predictions").glob("RealWorldQA*.jsonl")
    prompt = json.loads(line.read_text())["prompt"]
    assert "RWQA" in table and prompt.startswith("Question: ") == (family == "qwen2_vl")
    for script in ("analysis.attention", "analysis.probe"):
        assert "KD 0.75" in run(script, trained, "--data", world / "test", "--n", 2, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", PRESETS)
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(family, world, tmp_path):
    flags, _, aligned = align(family, world, tmp_path)
    command = ["train.py", *flags, "--alpha", 0.75, "--init", aligned, "--max-tiles", 1,
               "--data", world / "vision-audio", "--save-every", 1, "--max-steps", 4]
    run(*command, "--out", tmp_path / "whole", cwd=tmp_path)

    killed = tmp_path / "killed"
    words = [sys.executable, ROOT / command[0], *command[1:], "--out", killed]
    process = subprocess.Popen(list(map(str, words)), cwd=tmp_path, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (killed / "checkpoint.safetensors").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not runs.finished(killed)
    assert "going on after step" in run(*command, "--out", killed, cwd=tmp_path)
    whole, resumed = (folder / "model.safetensors" for folder in (tmp_path / "whole", killed))
    assert whole.read_bytes() == resumed.read_bytes()


@pytest.mark.slow
def test_two_steps_of_each_stage_at_qwen2_vl_2bs_true_size(world, tmp_path):
    """Its and Whisper-large-v3's shapes; minutes, 24 GB of memory, 20 GB of disk."""
    lvlm, whisper = true_size.build_qwen2_vl(tmp_path), true_size.build_whisper(tmp_path)
    few = ["--preset", "qwen2-vl-2b", "--global-batch", 1, "--max-steps", 2, "--device", "cpu",
           "--max-tiles", 1, "--workers", 0]
    for stage in (["--stage", "audio-text", "--init", lvlm, "--whisper", whisper],
                  ["--alpha", 0.75]):
        data_folder = world / ("audio-text" if "--stage" in stage else "vision-audio")
        done = run_script("train.py", *stage, *few, "--data", data_folder, cwd=tmp_path,
                          timeout=1800)
        assert done.returncode == 0, done.stderr
    for log in (tmp_path / "runs/qwen2-vl-2b").glob("*/log.jsonl"):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        seconds = [round(1 / line["time"]["steps_per_s"], 1) for line in lines]
        assert len(lines) == 2 and all(math.isfinite(line["loss"]) for line in lines)
        print(f"{log.parent.name}: seconds a step {seconds}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"peak memory {peak:.1f} GB")
    assert peak < 24
