"""The real models, OpenGVLab's layout, tiles and prompts, and any Whisper, against the originals.

`fixtures/internvl2_tiny_a` is a tiny InternVL2 in the original layout with random weights, and what
the original code computed with it; the two JSON files hold tiles and prompts that it made.
"""

import hashlib
import json
import math
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import true_size
from conftest import FIXTURES, ROOT, build_internvl2, build_whisper, run_here, run_script
from PIL import Image
from safetensors.torch import load_file, save_file
from test_bench_tsv import write_benchmarks
from transformers import WhisperForConditionalGeneration

import data
from model import OLLM
from plumbing import runs
from plumbing.files import BadInput
from plumbing.media import speak
from real import checkpoints
from real.families import INTERNVL2
from world.models import build_lvlm

TINY = FIXTURES / "internvl2_tiny_a"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_and_greedy_tokens_are_the_original_codes(attention):
    reference = load_file(TINY / "reference.safetensors")
    lvlm = checkpoints.load_lvlm(TINY, image_token_id=int(reference["img_context_token_id"]))
    lvlm.set_attn_implementation(attention)
    real = reference["attention_mask"] == 1
    with torch.no_grad():
        logits = lvlm(input_ids=reference["input_ids"], attention_mask=reference["attention_mask"],
                      pixel_values=reference["pixel_values"]).logits
    torch.testing.assert_close(logits[real], reference["logits"][real], rtol=0, atol=1e-4)
    prompt, tiles = reference["generate_prompt_ids"].view(1, -1), 3  # row 0 has three tiles
    expected = reference["generate_new_ids"].flatten().tolist()
    ids = lvlm.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
        pixel_values=reference["pixel_values"][:tiles], max_new_tokens=len(expected),
        eos_token_id=-1, pad_token_id=0)
    assert ids[0, prompt.size(1):].tolist() == expected


def spoilt(tmp_path, change=None, **config):
    """Copies the tiny checkpoint with changed tensors or config (llm_config__vocab_size=3)."""
    folder = tmp_path / "spoilt"
    shutil.copytree(TINY, folder)
    if change:
        tensors = load_file(TINY / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    read = json.loads((folder / "config.json").read_text())
    for name, value in config.items():
        *parents, last = name.split("__")
        place = read
        for parent in parents:
            place = place[parent]
        place[last] = value
    (folder / "config.json").write_text(json.dumps(read))
    return folder


@pytest.mark.parametrize("change, config, message", [
    (lambda t: t.pop("mlp1.1.bias"), {}, "linear_1.bias"),
    (lambda t: t.update({"vision_model.extra": torch.zeros(1)}), {}, "vision_model.extra"),
    (lambda t: t.update({"mlp1.1.bias": torch.zeros(3)}), {}, "size mismatch for .*linear_1.bias"),
    (None, {"llm_config__architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
    (None, {"vision_config__qk_normalization": True}, "InternViT-6B"),
    (None, {"ps_version": "v1"}, "ps_version"),
    (None, {"model_type": "llava"}, "llava"),
])
def test_what_is_not_supported_is_named_in_one_line(tmp_path, change, config, message):
    with pytest.raises(BadInput, match=message) as error:
        checkpoints.load_lvlm(spoilt(tmp_path, change, **config), image_token_id=193)
    assert "\n" not in str(error.value)


def test_shards_and_the_old_tie_flag_load_the_same(tmp_path):
    """The 2024 config.json says that embeddings are tied. They are not: lm_head is stored."""
    folder = spoilt(tmp_path, llm_config__tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for part in range(2):
        file = f"model-0000{part + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[part::2]}, folder / file)
        weight_map |= dict.fromkeys(names[part::2], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sharded = checkpoints.load_lvlm(folder, 193).state_dict()
    whole = checkpoints.load_lvlm(TINY, 193).state_dict()
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(sharded[key], whole[key]) for key in whole)
    embeddings = whole["model.language_model.embed_tokens.weight"]
    assert not torch.equal(whole["lm_head.weight"], embeddings)


def test_a_hub_that_does_not_answer_is_one_line_that_says_what_to_do():
    with pytest.raises(BadInput, match="hf download OpenGVLab/InternVL2-1B") as error:
        checkpoints.load_lvlm("OpenGVLab/InternVL2-1B")
    assert "\n" not in str(error.value)


# ---- tiles and prompts ----


def reference_tiles():
    entries = json.loads((FIXTURES / "tiling_reference.json").read_text())["entries"]
    return [pytest.param(e["size"], int(n), case, id=f"{e['size'][0]}x{e['size'][1]}-{n}")
            for e in entries for n, case in e["by_max_num"].items()]


@pytest.mark.parametrize("size, max_tiles, expected", reference_tiles())
def test_tiles_are_the_original_codes(size, max_tiles, expected):
    x, y = np.arange(size[0])[None, :], np.arange(size[1])[:, None]
    colors = [(3 * x + 5 * y) % 256, (x * x // 7 + 2 * y) % 256, ((x ^ y) * 37) % 256]
    picture = Image.fromarray(np.stack(colors, axis=-1).astype(np.uint8))
    tiles = data.tile(picture, max_tiles)
    columns, rows = expected["grid_cols_rows"]
    assert len(tiles) == expected["num_tiles"] == columns * rows + expected["thumbnail"]
    means = [np.asarray(tile).reshape(-1, 3).mean(0) for tile in tiles]
    np.testing.assert_allclose(means, expected["tile_means_rgb"], atol=0.5)
    if int(PIL.__version__.split(".")[0]) < 13:  # version 13 resizes a little differently
        digest = hashlib.sha256(b"".join(tile.tobytes() for tile in tiles)).hexdigest()
        assert digest == expected.get("sha256_pillow_9.5_to_12.0", expected["sha256"])


def prompt_references():
    """Returns (name, question, tiles, answer, ids) of prompts with at most one image, one turn."""
    reference = json.loads((FIXTURES / "prompt_reference.json").read_text())
    cases = [(c["name"], c["question"], c["tiles_per_image"], None, c["input_ids"])
             for c in reference["chat"] if len(c["tiles_per_image"]) < 2 and not c["history"]]
    for case in reference["training_preprocess_mpt"]:
        if len(case["conversation"]) == 2:
            (_, question), (_, answer) = case["conversation"]
            cases.append((case["name"], question.replace("<image>\n", ""), case["tiles_per_image"],
                          answer, case["input_ids"]))
    return cases


def our_prompt(tokenizer, question, tiles, answer, tokens_per_tile):
    """Returns (ids, labels) as `collate` makes them, prefix and query joined."""
    settings = {"chat": "Hermes-2", "system": INTERNVL2["system"],
                "tokens_per_tile": tokens_per_tile}
    sample = {"question": question, "answer": answer or ""}
    if tiles:
        sample["pixels"] = {"pixel_values": torch.zeros(tiles[0], 1, 1, 1)}
    batch = data.collate([sample], tokenizer, None, settings, answers=answer is not None)
    ids = batch["prefix"]["ids"][0].tolist() + batch["text"]["ids"][0].tolist()
    labels = batch["text"]["labels"][0]
    return ids, labels[labels != data.IGNORE].tolist()


def test_prompts_have_the_original_codes_ids():
    folder = os.environ.get("INTERNVL2_1B")
    if not folder:
        pytest.skip("set INTERNVL2_1B to a folder with the tokenizer of OpenGVLab/InternVL2-1B")
    tokenizer = checkpoints.load_tokenizer(Path(folder))
    for name, question, tiles, answer, expected in prompt_references():
        expected_ids = []
        for entry in expected:
            repeated = isinstance(entry, dict)
            expected_ids += [entry["id"]] * entry["repeat"] if repeated else [entry]
        ids, labels = our_prompt(tokenizer, question, tiles, answer, tokens_per_tile=256)
        assert ids == expected_ids, name
        assert answer is None or tokenizer.decode(labels) == answer + "<|im_end|>", name


def test_prompts_with_a_tiny_tokenizer_of_the_same_special_tokens(tmp_path):
    tokenizer = checkpoints.load_tokenizer(build_internvl2(tmp_path))
    ids, labels = our_prompt(tokenizer, "What is this?", [2], "A red panda.", tokens_per_tile=4)
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\n")
    assert "<|im_end|><|im_start|>user\n<img><IMG_CONTEXT>" in text
    assert text.endswith("</img>\nWhat is this?<|im_end|><|im_start|>assistant\n"
                         "A red panda.<|im_end|>")
    assert ids.count(tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")) == 8
    assert tokenizer.decode(labels) == "A red panda.<|im_end|>"


# ---- Whisper, and a whole run ----


def test_hearing_thirty_seconds_is_plain_whisper(tmp_path):
    """With --audio-seconds 30 the encoder gives what transformers' own gives, then projected."""
    folder = build_whisper(tmp_path / "whisper")
    encoder, extractor = checkpoints.load_audio_encoder(folder)
    ollm = OLLM(*build_lvlm(), None, encoder.eval(), extractor)
    wave, _ = speak("what color is the circle")
    sample, settings = {"wave": wave, "answer": "red"}, {**ollm.settings, "audio_seconds": 30}
    batch = data.collate([sample], ollm.tokenizer, extractor, settings)
    whisper = WhisperForConditionalGeneration.from_pretrained(folder).model.encoder.eval()
    features = extractor(wave, sampling_rate=16_000, return_tensors="pt").input_features
    with torch.no_grad():
        frames = whisper(features).last_hidden_state  # (1, 1500, W)
        expected = ollm.projector(frames.unflatten(1, (-1, 2)).mean(2))  # (1, 750, D)
        audio = ollm.hear(batch["mel"], batch["n_frames"])  # (1, 750, D)
    assert extractor.feature_size == 128 and audio.shape == (1, 750, 128)
    assert (batch["audio"]["ids"] == data.AUDIO_SLOT).sum() == 750
    torch.testing.assert_close(audio, expected, rtol=0, atol=1e-4)


def test_only_a_whisper_is_taken_for_one(tmp_path):
    with pytest.raises(BadInput, match="config.json"):
        checkpoints.load_audio_encoder(TINY)
    folder = build_whisper(tmp_path / "whisper")
    tensors = load_file(folder / "model.safetensors")
    fewer = {name: t for name, t in tensors.items() if "encoder.layers.1" not in name}
    save_file(fewer, folder / "model.safetensors")
    with pytest.raises(BadInput, match="layers.1"):
        checkpoints.load_audio_encoder(folder)
    save_file(tensors, folder / "model.safetensors")
    about = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**about, "hop_length": 200}))
    with pytest.raises(BadInput, match="preprocessor_config.json.*hop_length"):
        checkpoints.load_audio_encoder(folder)


# ---- the preset ----


def train(*options, cwd):
    done = run_here("train.py", "--preset", "internvl2-1b", "--device", "cpu", "--micro-batch", 2,
                    "--max-steps", 2, "--global-batch", 4, *options, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def test_the_preset_aligns_trains_and_answers_from_original_checkpoints(world, tmp_path):
    lvlm, whisper = build_internvl2(tmp_path), build_whisper(tmp_path / "whisper")
    done = train("--stage", "audio-text", "--init", lvlm, "--whisper", whisper,
                 "--data", world / "audio-text", cwd=tmp_path)
    aligned = tmp_path / "runs/internvl2-1b/audio-text-s0"
    _, *command = shlex.split(done.stdout.splitlines()[-1], comments=True)
    asked = run_here(*command, "--n", 3, cwd=tmp_path)
    assert asked.returncode == 0 and "| word error rate " in asked.stdout, asked.stderr
    done = train("--alpha", 0.75, "--data", world / "vision-audio", "--max-tiles", 3,
                 "--audio-seconds", 4, cwd=tmp_path)
    assert "built-in world" not in done.stdout
    run = tmp_path / "runs/internvl2-1b/vision-audio-a0.75-s0"
    about, before, after = runs.about(run), OLLM.load(aligned), OLLM.load(run)
    settings = about["settings"]
    assert settings["max_tiles"] == 3 and settings["audio_seconds"] == 4
    assert settings["system"] == INTERNVL2["system"] and settings["tokens_per_tile"] == 4
    assert runs.source_of(run, "base") == lvlm and about["training"]["lr"] == 4e-5
    assert not torch.equal(before.projector.weight, after.projector.weight)
    for key, value in checkpoints.load_lvlm(lvlm).state_dict().items():
        assert torch.equal(value, after.lvlm.state_dict()[key]), key
    picture = world / "test/images/000000.png"
    answer = run_here("eval.py", run, "--image", picture, "--question", "What is this?",
                      cwd=tmp_path)
    assert answer.returncode == 0 and "KD 0.75   in writing" in answer.stdout, answer.stderr
    assert "\nKD 0.75   aloud  " in answer.stdout


@pytest.mark.parametrize("options, named", [
    (["--stage", "audio-text", "--data", "world/audio-text"], "OpenGVLab/InternVL2-1B"),
    (["--alpha", 0.75, "--init", "start/audio"], "runs/internvl2-1b/data-s0/vision-audio"),
    (["--stage", "vision-text"], "vision-text"),
])
def test_missing_real_data_and_weights_are_one_line(world, start, tmp_path, options, named):
    (tmp_path / "world").symlink_to(world)
    (tmp_path / "start").symlink_to(start)
    done = run_here("train.py", "--preset", "internvl2-1b", *options, cwd=tmp_path)
    assert done.returncode in (1, 2) and named in done.stderr.splitlines()[-1]
    assert done.returncode == 2 or done.stderr.count("\n") == 1


@pytest.mark.slow
def test_two_steps_of_each_stage_at_true_size(world, tmp_path):
    """InternVL2-1B's and Whisper-large-v3's shapes; minutes, 20 GB of disk and of memory."""
    lvlm, whisper = true_size.build(tmp_path)
    assert sum(math.prod(shape) for shape in true_size.shapes().values()) == 938_158_976
    few = ["--preset", "internvl2-1b", "--global-batch", 1, "--max-steps", 2, "--device", "cpu"]
    run_script("train.py", "--stage", "audio-text", "--init", lvlm, "--whisper", whisper,
               "--data", world / "audio-text", *few, cwd=tmp_path, timeout=900)

    # The second stage is killed after its first step, and goes on from there.
    out, aligned = tmp_path / "va", tmp_path / "runs/internvl2-1b/audio-text-s0"
    command = [sys.executable, ROOT / "train.py", "--alpha", 0.75, "--init", aligned, "--out", out,
               "--data", world / "vision-audio", "--max-tiles", 1, "--save-every", 1, *few]
    command = list(map(str, command))
    process = subprocess.Popen(command, cwd=tmp_path)
    while process.poll() is None and not (out / "checkpoint.safetensors").exists():
        time.sleep(0.1)
    process.kill()
    process.wait()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and "going on after step 1" in again.stdout, again.stderr

    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and all(math.isfinite(line["loss"]) and line["kl"] > 0 for line in log)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    seconds = [round(1 / line["time"]["steps_per_s"], 1) for line in log]
    print(f"peak memory {peak:.1f} GB, seconds a step: {seconds}")
    assert peak < 20

    # Two rows of each benchmark, in writing and aloud.
    (tmp_path / "tsv").mkdir()
    write_benchmarks(tmp_path / "tsv")
    began = time.time()
    done = run_script("eval.py", out, "--bench", "tsv", "--n", 2, "--max-new-tokens", 2,
                      "--batch", 2, "--device", "cpu", cwd=tmp_path, timeout=900)
    assert done.returncode == 0 and "InfoVQA" in done.stdout, done.stderr
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"evaluation of 12 questions: {time.time() - began:.0f} s, peak memory {peak:.1f} GB")
