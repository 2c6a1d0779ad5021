"""The paper's other base models: prompts, weights, positions and pictures against the originals.

InternVL2's LLMs are compared with the original code in test_internvl2.py. Qwen2-VL is transformers'
own, so its native pass over whole sequences, with its own positions, is the reference.
`fixtures/prompt_reference_families.json` has token ids of prompts by the original tokenizers.
"""

import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    FIXTURES,
    QWEN2_VL_TOKENS,
    build_lvlm_folder,
    build_whisper,
    change_json,
    check_answers_do_not_depend_on_the_batch,
    collate,
    expand,
    read_lines,
    run_here,
    write_tokenizer,
)
from PIL import Image
from test_bench_tsv import prepare, write_benchmarks
from test_model import ANSWERS, QUESTIONS
from transformers import AutoModelForImageTextToText, Qwen3VLConfig

import data
from analysis.bench import to_float64
from data import AUDIO_PLACEHOLDER, IGNORE
from loss import self_kd_loss
from model import OLLM
from plumbing import runs
from plumbing.files import BadInput
from plumbing.media import speak
from real import checkpoints
from real.families import CHATS, OLD_CHATS, PromptSettings, normalize
from world.models import build_audio_encoder

FAMILIES = ("qwen2", "llama", "phi3", "qwen2_vl", "untied", "qwen2_5_vl",  # untied: Qwen2-VL
            "internvl3", "internvl3_5", "omni")
SIZES = ((64, 64), (56, 120), (140, 56), (100, 60))


# ---- the shared prefix, in float64 ----


def build_listener(family, folder, dtype=torch.float64):
    """Returns a tiny LVLM of a family that listens."""
    ollm = OLLM.load(build_lvlm_folder(family, folder))
    small = {"image_size": 56, "tokens_per_tile": 4, "max_tiles": 3}
    torch.manual_seed(0)
    settings = replace(ollm.settings, **small)
    if family == "omni":
        ollm.settings = settings
    else:
        ollm = OLLM(ollm.lvlm, ollm.tokenizer, settings, ollm.base, *build_audio_encoder())
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
    if hasattr(ollm.lvlm.model, "audio_tower"):
        ids = ids.masked_fill(ids == AUDIO_PLACEHOLDER, ollm.lvlm.config.audio_token_id)
        if form == "audio":
            frames = torch.ones(1, batch["mel"].size(2), dtype=torch.long)
            pixels |= {"input_features": batch["mel"], "feature_attention_mask": frames}
        return ollm.lvlm(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels).logits
    if form == "text":
        kind = {"mm_token_type_ids": is_image} if has_three else {}
        return ollm.lvlm(input_ids=ids, **pixels, **kind).logits

    embedded = ollm.embed(ids, batch["pixels"], ollm.encode_audio(batch["mel"], batch["n_frames"]))
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


@pytest.mark.parametrize("family", ["llama", "phi3", "untied", "omni"])
@pytest.mark.parametrize("form", ["text", "audio"])
def test_batched_answers_equal_one_by_one(family, form, tmp_path):
    ollm = build_listener(family, tmp_path)
    samples = make_samples(ollm, (1, 0, 1, 1))
    check_answers_do_not_depend_on_the_batch(ollm, samples, form, max_new_tokens=8)


@torch.no_grad()
def test_positions_go_on_from_the_picture_as_qwen2_vls_own(tmp_path):
    """Also behind the first new tokens of an answer."""
    ollm = build_listener("qwen2_vl", tmp_path)
    for sample in make_samples(ollm, (1, 1, 0)):
        batch = collate(ollm, [sample], answers=False)
        prefix, query, ids = ollm.prefill(batch), batch["text"], batch["text"]["ids"]
        for _ in range(4):
            hidden, prefix = ollm.decode_query(prefix, query)
            ours = ollm.lvlm.lm_head(hidden[:, -1])
            theirs = native_logits(ollm, batch | {"text": {"ids": ids}}, "text")[:, -1]
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
            token = theirs.argmax(-1, keepdim=True)
            query = {"ids": token, "mask": torch.ones_like(token, dtype=torch.bool)}
            ids = torch.cat([ids, token], dim=1)


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
    settings = PromptSettings(chat, CHATS[chat]["system"], tokens_per_tile=1)
    for case in cases:
        n, answer = case["image_tokens"], case["answer"]
        sample = {"question": case["question"], "answer": answer or ""}
        if n:
            sample["pixels"] = {"pixel_values": torch.zeros(n, 1)}
        batch = data.collate([sample], tokenizer, None, settings, answers=answer is not None)
        ids = batch["prefix"]["ids"][0].tolist() + batch["text"]["ids"][0].tolist()
        assert ids == expand(case["input_ids"]), case["question"]


def test_qwen2_vls_prompt_to_the_letter(tmp_path):
    ollm = OLLM.load(build_lvlm_folder("qwen2_vl", tmp_path))
    pixels = data.picture_inputs(Image.new("RGB", (64, 48)), replace(ollm.settings, image_size=56))
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
    settings = PromptSettings(min_tiles=1, max_tiles=most)
    pixels = data.picture_inputs(Image.new("RGB", size), settings)
    assert pixels["image_grid_thw"].tolist() == [[1, *grid]]
    assert pixels["pixel_values"].shape == (grid[0] * grid[1], 1176)
    assert pixels["pixel_values"].shape[0] <= most * 1024


def test_a_picture_that_is_too_long_is_one_line():
    with pytest.raises(BadInput, match="aspect ratio"):
        data.picture_inputs(Image.new("RGB", (2010, 10)), PromptSettings(min_tiles=1, max_tiles=1))


# ---- weights ----


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_half_precision_leave_rotations_alone(family, tmp_path):
    folder = build_lvlm_folder(family, tmp_path)
    whole = OLLM.load(folder).lvlm
    half = checkpoints.load_lvlm(folder, whole.config.image_token_id, torch.bfloat16)
    for name, parameter in whole.named_parameters():
        expected = parameter if "audio_tower" in name else parameter.bfloat16()  # that is trained
        assert torch.equal(half.get_parameter(name), expected), name
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
        change_json(folder / "config.json", tie_word_embeddings=True)
    ours, theirs = OLLM.load(folder).lvlm, AutoModelForImageTextToText.from_pretrained(folder)
    states = ours.state_dict(), theirs.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    tied = ours.lm_head.weight is ours.get_input_embeddings().weight
    assert tied == family.endswith("_vl") == ours.config.tie_word_embeddings
    buffers = dict(theirs.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in ours.named_buffers())


@pytest.mark.parametrize("family, file, change, message", [
    ("llama", "config.json", {"template": "internvl2_5"}, "internvl2_5"),
    ("qwen2", "config.json", {"template": "internvl2_5"}, "internvl2_5"),
    ("phi3", "config.json", {"llm_config__architectures": ["InternLM3ForCausalLM"]}, "InternLM3"),
    ("phi3", "config.json", {"vision_config__norm_type": "rms_norm"}, "InternViT-6B"),
    ("qwen2", "config.json", {"vision_config__qk_normalization": True}, "InternViT-6B"),
    ("qwen2", "config.json", {"ps_version": "v1"}, "ps_version"),
    ("qwen2", "config.json", {"model_type": "llava"}, "llava"),
    ("qwen2_vl", "config.json", {"tie_word_embeddings": False}, "lm_head"),
    ("qwen2_vl", "config.json", {"model_type": "qwen3_vl"}, "qwen3_vl"),
    ("internvl3", "config.json", {"template": "internvl2_5"}, "the chat internvl2_5"),
    ("internvl3", "config.json", {"text_config__model_type": "qwen3"}, "q_norm"),
    ("internvl3_5", "config.json", {"text_config__model_type": "qwen2"}, "q_norm"),
    ("qwen2_vl", "tokenizer_config.json", {"pad_token": "<|pad|>"}, "beyond the LLM's 199"),
    ("phi3", "tokenizer_config.json", {"added_tokens_decoder": {}}, "it lacks"),
])
def test_what_would_compute_wrongly_is_refused(family, file, change, message, tmp_path):
    folder = build_lvlm_folder(family, tmp_path)
    change_json(folder / file, **change)
    with pytest.raises(BadInput, match=message) as error:
        OLLM.load(folder)
    assert "\n" not in str(error.value)


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
    with pytest.raises(BadInput, match="deepstack"):
        ollm.encode_images({"pixel_values": torch.zeros(16, 3 * 2 * 16 * 16),
                            "image_grid_thw": torch.tensor([[1, 4, 4]])})


# ---- whole runs ----


PRESETS = {"qwen2": "internvl2-1b", "llama": "internvl2-2b", "phi3": "internvl2-4b",
           "qwen2_vl": "qwen2-vl-2b", "internvl3": "internvl3-1b", "internvl3_5": "internvl3.5-1b"}
FEW = ("--device", "cpu", "--global-batch", 4, "--micro-batch", 2, "--max-steps", 2)


def run(script, *arguments, cwd):
    done = run_here(script, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("family", [
    "qwen2", "qwen2_vl", "internvl3", *(pytest.param(family, marks=pytest.mark.slow)
                               for family in ("llama", "phi3", "internvl3_5"))])
def test_a_published_checkpoint_is_trained_and_evaluated(family, world, tmp_path):
    lvlm, whisper = build_lvlm_folder(family, tmp_path), build_whisper(tmp_path / "whisper")
    flags, trained = ("--preset", PRESETS[family], *FEW), tmp_path / "trained"
    aligned = tmp_path / f"runs/{PRESETS[family]}/audio-text-s0"
    printed = run("train.py", *flags, "--stage", "audio-text", "--init", lvlm, "--whisper", whisper,
                  "--data", world / "audio-text", cwd=tmp_path)
    _, *asking = shlex.split(printed.splitlines()[-1], comments=True)  # what to do next
    assert "| word error rate " in run(*asking, "--n", 3, cwd=tmp_path)
    run("train.py", *flags, "--alpha", 0.75, "--data", world / "vision-audio", "--max-tiles", 1,
        "--audio-seconds", 4, "--out", trained, cwd=tmp_path)
    before, after = OLLM.load(aligned), OLLM.load(trained)
    assert (after.settings.max_tiles, after.settings.audio_seconds) == (1, 4)
    assert runs.read_run_info(trained)["training"]["lr"] == 4e-5
    assert runs.source_of(trained, "base") == lvlm
    assert not torch.equal(before.projector.weight, after.projector.weight)
    for name, value in before.lvlm.state_dict().items():
        assert torch.equal(value, after.lvlm.state_dict()[name]), name

    answer = run("eval.py", trained, "--image", world / "test/images/000000.png", "--question",
                 "What is this?", cwd=tmp_path)
    assert answer.startswith("KD 0.75   text     ") and "\nKD 0.75   speech   " in answer
    assert "relation" in run("mmalign.py", trained, "--data", world / "test", "--n", 2,
                             cwd=tmp_path)
    (tmp_path / "tsv").mkdir()
    write_benchmarks(tmp_path / "tsv")
    prepare("tsv", "RealWorldQA", cwd=tmp_path, run=trained)
    assert "RWQA" in run("eval.py", trained, "--bench", "RealWorldQA", "--n", 1,
                         "--max-new-tokens", 2, cwd=tmp_path)
    question = read_lines(trained / "answers-bench-RealWorldQA.jsonl")[0]["question"]
    assert question.startswith("Question: ") == (family == "qwen2_vl")
    for script in ("analysis.attention", "analysis.probe"):
        assert "KD 0.75" in run(script, trained, "--data", world / "test", "--n", 2, cwd=tmp_path)
