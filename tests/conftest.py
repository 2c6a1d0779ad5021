"""A small built-in world and tiny models of the real classes, shared by all tests. No network."""

import contextlib
import io
import json
import os
import resource
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more threads
ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen2Tokenizer,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

import data
from analysis.bench import to_float64
from model import OLLM
from plumbing import runs
from world.models import build_audio_encoder, build_lvlm


def pytest_configure(config):
    config.addinivalue_line("markers",
                            "slow: much time, or gigabytes; run only when asked for, by `-m slow`")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        items[:] = [item for item in items if "slow" not in item.keywords]


def run_script(*arguments, cwd, processes=0, timeout=170, largest_file=None):
    """Runs a script of the project as a user would; returns the finished process with its texts.

    processes: start so many by torchrun; largest_file: bytes, beyond which writing fails as on a
    full disk
    """
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                     str(processes)]
    command = launcher + [str(ROOT / arguments[0]), *map(str, arguments[1:])]
    limit = largest_file and (
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file)))
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          preexec_fn=limit)


def run_here(script, *arguments, cwd):
    """Does the same in this process: no seconds for starting one.

    script: a file such as "eval.py", or a module such as "analysis.attention" or "course"
    """
    out, errors, code = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        with (contextlib.chdir(cwd), contextlib.redirect_stdout(out),
              contextlib.redirect_stderr(errors)):
            file = script if script.endswith(".py") else script.replace(".", "/") + ".py"
            file = file if (ROOT / file).exists() else f"{script}/__main__.py"
            runpy.run_path(str(ROOT / file), run_name="__main__")
    except SystemExit as exit:  # a message goes to stderr and means 1, as Python does it
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        errors.write(f"{exit.code}\n" if isinstance(exit.code, str) else "")
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess(script, code, out.getvalue(), errors.getvalue())


def read_lines(path):
    """Returns the values of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder):
    """Returns {name: bytes} of all files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def change_json(path, **keys):
    """Sets keys of a JSON file: llm_config__vocab_size=3."""
    content = json.loads(path.read_text())
    for name, value in keys.items():
        *parents, last = name.split("__")
        place = content
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(content))


def expand(entries):
    """Returns the ids of a reference, where {"id", "repeat"} stands for so many of one."""
    ids = []
    for entry in entries:
        ids += [entry["id"]] * entry["repeat"] if isinstance(entry, dict) else [entry]
    return ids


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A prepared built-in world of a few dozen samples: a folder with the four parts."""
    folder = tmp_path_factory.mktemp("world")
    made = run_script("data.py", "shapes", "--seed", 3, "--out", folder, "--scenes", 12,
                      "--clips", 40, "--n", 100, "--test", 32, cwd=folder)
    assert made.returncode == 0, made.stderr
    return folder


def build_ollm(dtype=torch.float64, max_tiles=1):
    """Returns the built-in model with random weights, listening; the audio part is scaled up."""
    torch.manual_seed(0)
    ollm = OLLM(*build_lvlm(), None, *build_audio_encoder())
    ollm.settings.max_tiles = max_tiles
    torch.nn.init.normal_(ollm.projector.weight, std=0.3)
    ollm.train_only("vision-audio")
    return to_float64(ollm) if dtype == torch.float64 else ollm


def run_config(stage, alpha=0.0, seed=0):
    """What a run's ollm.json tells of its training, as far as tables need it."""
    return {"stage": stage, "alpha": alpha, "seed": seed, "on_policy": 0.0, "temperature": 1.0}


def save_runs(folder, name="audio", stage="audio-text", alpha=0.0):
    """Writes two runs with random weights, folder/base and one that listens, folder/name."""
    ollm = build_ollm(torch.float32)
    runs.save(ollm, folder / "base", run_config("vision-text"))
    ollm.base = folder / "base"
    runs.save(ollm, folder / name, run_config(stage, alpha))
    return folder


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Two runs to start the later stages from; read only."""
    return save_runs(tmp_path_factory.mktemp("start"))


def collate(ollm, samples, **options):
    """A batch in the model's precision."""
    batch = data.collate(samples, ollm.tokenizer, ollm.mel_extractor, ollm.settings, **options)
    dtype = ollm.projector.weight.dtype
    if batch["mel"] is not None:
        batch["mel"] = batch["mel"].to(dtype)
    if batch["pixels"] and batch["pixels"]["pixel_values"].dtype != torch.uint8:
        batch["pixels"]["pixel_values"] = batch["pixels"]["pixel_values"].to(dtype)
    return batch


def generate(ollm, samples, form, max_new_tokens):
    """Greedy answers to the written or spoken questions of a batch."""
    batch = collate(ollm, samples, answers=False)
    audio = ollm.encode_audio(batch["mel"], batch["n_frames"]) if form == "audio" else None
    return ollm.generate(ollm.prefill(batch), batch[form], audio, max_new_tokens)


def check_answers_do_not_depend_on_the_batch(ollm, samples, form, max_new_tokens):
    """Asserts that a ragged batch is answered as its samples are one by one."""
    together = generate(ollm, samples, form, max_new_tokens)
    assert together == [generate(ollm, [sample], form, max_new_tokens)[0] for sample in samples]
    assert len(set(together)) > 1, "the check can fail: answers differ"


def make_picture(size):
    """Returns a picture of colour gradients. (Noise would be resized to one grey.)"""
    x, y = np.arange(size[0])[None, :], np.arange(size[1])[:, None]
    colors = [(3 * x + 5 * y) % 256, (x * x // 7 + 2 * y) % 256, ((x ^ y) * 37) % 256]
    return Image.fromarray(np.stack(colors, axis=-1).astype(np.uint8))


def build_internvl2(folder):
    """A tiny InternVL2 in OpenGVLab's layout: the fixture's weights, a tokenizer of its 200 ids."""
    folder = folder / "internvl2"
    shutil.copytree(FIXTURES / "internvl2_tiny_a", folder)
    special = json.loads((folder / "fixture.json").read_text())["special_token_ids"]
    write_tokenizer(folder, special)
    return folder


def write_tokenizer(folder, special):
    """Writes a tokenizer of letters in Qwen2's files; special: {token: id}, behind all letters."""
    letters = [chr(i) for i in range(33, 127)] + ["\u0120", "\u010a"]  # byte-pair space and newline
    words = letters + [f"\u0120{c}{d}" for c in "abcdefgh" for d in "aeiourstnlm,"]
    vocabulary = {word: i for i, word in enumerate(words[:min(special.values())])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokens = {str(i): {"content": t, "lstrip": False, "rstrip": False, "normalized": False,
                       "single_word": False, "special": True} for t, i in special.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"added_tokens_decoder": tokens, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
         "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 8192}))


QWEN2_VL_TOKENS = [f"<|{name}|>" for name in (
    "endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end",
    "quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")]


def build_qwen2_vl(folder, tied=True, kind="qwen2_vl"):
    """A tiny Qwen2-VL in the layout that it is published in: a flat config.json, older names."""
    torch.manual_seed(0)
    folder = folder / kind
    folder.mkdir()
    vision = {"depth": 2, "hidden_size": 64, "out_hidden_size": 64, "embed_dim": 32, "num_heads": 2,
              "mlp_ratio": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
              "in_chans": 3}
    if kind == "qwen2_5_vl":
        vision |= {"hidden_size": 32, "intermediate_size": 64, "fullatt_block_indexes": [1]}
    flat = {"model_type": kind, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 199,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
            "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 4096,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "initializer_range": 0.08, "tie_word_embeddings": tied, "vision_config": vision}
    names = {"model.language_model.": "model.", "model.visual.": "visual."}
    return save_published(folder, flat | write_qwen2_vl_tokenizer(folder), names, tied)


def write_qwen2_vl_tokenizer(folder):
    """Writes a tokenizer of letters and Qwen2-VL's special tokens; returns their ids' names."""
    special = {token: 185 + i for i, token in enumerate(QWEN2_VL_TOKENS)}
    write_tokenizer(folder, special)
    names = {"bos": "endoftext", "eos": "im_end", "vision_start": "vision_start",
             "vision_end": "vision_end", "image": "image_pad", "video": "video_pad"}
    return {f"{key}_token_id": special[f"<|{name}|>"] for key, name in names.items()}


def save_published(folder, config, names, tied=False):
    """Writes an LVLM with random weights; names: how published ones begin, {now: then}."""
    (folder / "config.json").write_text(json.dumps(config))
    config, tensors = AutoConfig.from_pretrained(folder), {}
    config.tie_word_embeddings = tied
    for name, tensor in AutoModelForImageTextToText.from_config(config).state_dict().items():
        start = next((start for start in names if name.startswith(start)), "")
        if not tied or name != "lm_head.weight":
            tensors[names.get(start, "") + name.removeprefix(start)] = tensor
    save_file(tensors, folder / "model.safetensors")
    return folder


OMNI_TOKENS = [f"<|{name}|>" for name in (
    "endoftext", "im_start", "im_end", "AUDIO", "audio_bos", "audio_eos", "vision_bos",
    "vision_eos", "IMAGE", "VIDEO")]


# Widths of Qwen2.5-Omni-3B
OMNI_3B = {"audio": {"d_model": 1280, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
                     "output_dim": 2048, "n_window": 100, "initializer_range": 0.02},
           "vision": {"hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420,
                      "out_hidden_size": 2048},
           "text": {"hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 11008,
                    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24],
                                        "rope_theta": 1e6}, "initializer_range": 0.02}}


def build_omni(folder, widths=None):
    """A Qwen2.5-Omni of two layers as the hub has it: shards, and the talker's tensors beside.

    widths: OMNI_3B, or None for tiny ones
    """
    widths = widths or {"audio": {}, "vision": {}, "text": {}}
    torch.manual_seed(0)
    folder = folder / "omni"
    folder.mkdir()
    special = {token: 189 + i for i, token in enumerate(OMNI_TOKENS)}
    write_tokenizer(folder, special)
    audio = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4,
             "encoder_ffn_dim": 64, "output_dim": 64, "n_window": 10, "initializer_range": 0.2}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64,
              "out_hidden_size": 64, "fullatt_block_indexes": [1]}
    text = {"vocab_size": 199, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3],
                                "rope_theta": 1e6},
            "initializer_range": 0.08, "tie_word_embeddings": False}
    ids = {"image_token_index": "IMAGE", "audio_token_index": "AUDIO", "video_token_index": "VIDEO",
           "vision_start_token_id": "vision_bos", "audio_start_token_id": "audio_bos",
           "audio_end_token_id": "audio_eos"}
    thinker = {"audio_config": audio | widths["audio"], "vision_config": vision | widths["vision"],
               "text_config": text | widths["text"],
               **{key: special[f"<|{name}|>"] for key, name in ids.items()}}
    config = {"model_type": "qwen2_5_omni", "thinker_config": thinker}
    (folder / "config.json").write_text(json.dumps(config))

    names = {"model.language_model.": "model.", "model.": ""}
    thinker = AutoConfig.from_pretrained(folder).thinker_config
    shards = [{"talker.codec_head.weight": torch.zeros(3)}, {"token2wav.scale": torch.zeros(3)}]
    lvlm = AutoModelForImageTextToText.from_config(thinker)
    for i, (name, tensor) in enumerate(lvlm.state_dict().items()):
        start = next((start for start in names if name.startswith(start)), "")
        published = f"thinker.{names.get(start, '')}{name.removeprefix(start)}"
        shards[i % 2][published] = tensor.contiguous()
    index = {}
    for i, shard in enumerate(shards, 1):
        save_file(shard, folder / f"model-{i:05}-of-00002.safetensors")
        index |= dict.fromkeys(shard, f"model-{i:05}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


# Of the processors of OpenGVLab/InternVL3-1B-hf and InternVL3_5-1B-HF
INTERNVL3_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}")
INTERNVL3_NAMES = {"model.language_model.": "language_model.model.",
                   "lm_head.": "language_model.lm_head.", "model.": ""}


def build_internvl3(folder, llm="qwen2"):
    """A tiny InternVL3 in the layout of its -hf checkpoints, 3.5 with the LLM "qwen3".

    As published, config.json does not say that the head is not tied, parameters have older names,
    and InternVL3's LLM has no embedding for the tokenizer's last token, <video>.
    """
    torch.manual_seed(0)
    folder = folder / f"internvl3-{llm}"
    folder.mkdir()
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>",
              "<video>"]
    write_tokenizer(folder, {token: 190 + i for i, token in enumerate(tokens)})
    roles = {"start_image": "<img>", "end_image": "</img>", "context_image": "<IMG_CONTEXT>",
             "video": "<video>"}
    roles = {f"{role}_token": token for role, token in roles.items()}
    tokenizer = Qwen2Tokenizer.from_pretrained(folder, extra_special_tokens=roles)
    tokenizer.chat_template = INTERNVL3_TEMPLATE
    tokenizer.save_pretrained(folder)

    text = {"model_type": llm, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 196,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
            "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 4096,
            "initializer_range": 0.08, "bos_token_id": 190, "eos_token_id": 192}
    if llm == "qwen2":
        text["rope_scaling"] = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
    if llm == "qwen3":
        text |= {"head_dim": 32, "vocab_size": 208}  # heads wider than their share
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "intermediate_size": 64, "image_size": [56, 56], "patch_size": [14, 14],
              "attention_bias": True, "use_mean_pooling": True, "initializer_range": 0.08}
    return save_published(folder, {
        "model_type": "internvl", "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 0.5, "image_seq_length": 4, "image_token_id": 195,
        "projector_hidden_act": "gelu", "text_config": text, "vision_config": vision,
        "vision_feature_layer": -1, "vision_feature_select_strategy": "default"}, INTERNVL3_NAMES)


def build_lvlm_folder(family, folder):
    """A tiny checkpoint of a family, as it is published.

    family: "qwen2", "llama" or "phi3" is InternVL2 with this LLM, "untied" a Qwen2-VL
    """
    if family == "qwen2":
        return build_internvl2(folder)
    if family == "omni":
        return build_omni(folder)
    if family.startswith("internvl3"):
        return build_internvl3(folder, "qwen3" if family == "internvl3_5" else "qwen2")
    if family in ("llama", "phi3"):
        name = {"llama": "internlm2"}.get(family, family)
        return shutil.copytree(FIXTURES / f"internvl2_tiny_{name}", folder / name)
    return build_qwen2_vl(folder, family != "untied", "qwen2_vl" if family == "untied" else family)


def build_whisper(folder):
    """A tiny Whisper with decoder and large-v3's 128 mel bins, as transformers saves it."""
    torch.manual_seed(0)
    config = WhisperConfig(num_mel_bins=128, d_model=32, encoder_layers=2,
                           encoder_attention_heads=2, encoder_ffn_dim=64, decoder_layers=1,
                           decoder_attention_heads=2, decoder_ffn_dim=64, vocab_size=100,
                           pad_token_id=0, bos_token_id=1, eos_token_id=2,
                           decoder_start_token_id=1, init_std=0.1)
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=128).save_pretrained(folder)
    return folder
