"""The real models, OpenGVLab's layout, tiles and prompts, against the originals.

`fixtures/internvl2_tiny_a` is a tiny InternVL2 in the original layout with random weights, and what
the original code computed with it; `internvl2_tiny_internlm2` and `internvl2_tiny_phi3` have other
LLMs, and their tokenizers. The two JSON files hold tiles and prompts that it made.
"""

import hashlib
import json
import math
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import true_size
from conftest import (
    FIXTURES,
    ROOT,
    build_internvl2,
    change_json,
    expand,
    make_picture,
    read_lines,
    run_script,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import data
from model import OLLM
from plumbing.files import BadInput
from real import checkpoints
from real.families import CHATS, INTERNVL2, PromptSettings

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


@pytest.mark.parametrize("name, tensor, message", [
    ("mlp1.1.bias", None, "linear_1.bias"),
    ("vision_model.extra", torch.zeros(1), "vision_model.extra"),
    ("mlp1.1.bias", torch.zeros(3), "size mismatch for .*linear_1.bias"),
    ("language_model.model.layers.0.self_attn.q_norm.weight", torch.ones(8), "q_norm"),
])
def test_weights_that_do_not_fit_are_named_in_one_line(tmp_path, name, tensor, message):
    tensors = load_file(TINY / "model.safetensors")
    tensors.pop(name, None)
    tensors |= {} if tensor is None else {name: tensor}
    folder = build_internvl2(tmp_path)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadInput, match=message) as error:
        checkpoints.load_lvlm(folder)
    assert "\n" not in str(error.value)


def test_shards_and_the_old_tie_flag_load_the_same(tmp_path):
    """The 2024 config.json says that embeddings are tied. They are not: lm_head is stored."""
    folder = build_internvl2(tmp_path)
    change_json(folder / "config.json", llm_config__tie_word_embeddings=True)
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


# ---- InternLM2 and Phi-3 ----


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
    hidden, _ = ollm.decode_query(ollm.prefill(batch), batch["text"])
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
    end = ollm.tokenizer.convert_tokens_to_ids(CHATS[ollm.settings.chat]["end"])
    for i, sample in enumerate(samples):
        batch = data.collate([sample], ollm.tokenizer, None, ollm.settings, answers=False)
        prefix, query = ollm.prefill(batch), batch["text"]
        new = reference[f"new_ids_{i}"].tolist()  # twelve, whether or not one is the end
        for token in new:
            hidden, prefix = ollm.decode_query(prefix, query)
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
        pixels = data.picture_inputs(wide, replace(ollm.settings, max_tiles=max_tiles))
        return data.collate([sample | {"pixels": pixels}], ollm.tokenizer, None, ollm.settings)

    with pytest.raises(BadInput, match=r"it: \d+ tokens, .* 512; --max-tiles (\d+) fits") as error:
        batch(150)
    fits = int(str(error.value).split()[-2])
    parts = batch(fits)
    n = sum(int(parts[part]["mask"].sum()) for part in ("prefix", "text"))
    assert 512 - ollm.settings.tokens_per_tile < n <= 512, "one tile more would be too many"
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


# ---- tiles and prompts ----


def reference_tiles():
    entries = json.loads((FIXTURES / "tiling_reference.json").read_text())["entries"]
    return [pytest.param(e["size"], int(n), case, id=f"{e['size'][0]}x{e['size'][1]}-{n}")
            for e in entries for n, case in e["by_max_num"].items()]


@pytest.mark.parametrize("size, max_tiles, expected", reference_tiles())
def test_tiles_are_the_original_codes(size, max_tiles, expected):
    tiles = data.tile(make_picture(size), max_tiles)
    columns, rows = expected["grid_cols_rows"]
    assert len(tiles) == expected["num_tiles"] == columns * rows + expected["thumbnail"]
    means = [np.asarray(tile).reshape(-1, 3).mean(0) for tile in tiles]
    np.testing.assert_allclose(means, expected["tile_means_rgb"], atol=0.5)
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
    settings = PromptSettings(system=INTERNVL2["system"], tokens_per_tile=tokens_per_tile)
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
        ids, labels = our_prompt(tokenizer, question, tiles, answer, tokens_per_tile=256)
        assert ids == expand(expected), name
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


@pytest.mark.slow
def test_two_steps_of_each_stage_at_true_size(world, tmp_path):
    """InternVL2-1B's and Whisper-large-v3's shapes; minutes, 20 GB of disk and of memory."""
    lvlm, whisper = true_size.build(tmp_path)
    assert true_size.count(lvlm) == 938_158_976
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

    log = read_lines(out / "log.jsonl")
    assert len(log) == 2 and all(math.isfinite(line["loss"]) and line["kl"] > 0 for line in log)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    seconds = [round(1 / line["time"]["steps_per_s"], 1) for line in log]
    print(f"peak memory {peak:.1f} GB, seconds a step: {seconds}")
    assert peak < 20
