"""The plan: its closed forms are what torch counts, on tiny models of the real classes."""

import argparse
import itertools

import pytest
import torch
from conftest import ROOT, run_here
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen2VLConfig,
    WhisperConfig,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from analysis import bench, plan
from model import OLLM
from train import PRESETS
from world.models import build_audio_encoder, build_lvlm

LLM_TYPES = ("qwen2", "llama", "phi3", "qwen2_vl_text", "qwen3")
WHISPER = WhisperConfig(**plan.WHISPER_LARGE_V3)
PARAMETERS = {"internvl2-1b": 938_158_976, "internvl2-2b": 2_205_754_368,
              "internvl2-4b": 4_146_855_936, "internvl2-8b": 8_075_365_376,
              "qwen2-vl-2b": 2_208_985_600, "qwen2-vl-7b": 8_291_375_616,
              "internvl3-1b": 938_193_024, "internvl3.5-1b": 1_060_897_792}


# What is trained, and whether Whisper's layers are computed again in the backward pass
HEARING = {"kept": ("audio", False), "recomputed": ("audio", True), "frozen": ("projector", True)}


def build(llm_type, hearing="kept", vocabulary=2000):
    """Returns an OLLM that listens, with a small LLM of one of the types, and random weights."""
    torch.manual_seed(0)
    lvlm, tokenizer, settings = build_lvlm()
    llm = {"model_type": llm_type, "hidden_size": 128, "num_hidden_layers": 3,
           "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 320,
           "vocab_size": vocabulary, "pad_token_id": None}
    if llm_type == "qwen3":
        llm["head_dim"] = 32  # wider than its share of the hidden state, as in InternVL3.5-1B
    if llm_type == "qwen2_vl_text":
        llm["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6,
                                  "mrope_section": [2, 3, 3]}
    config = InternVLConfig(
        vision_config=lvlm.config.vision_config, text_config=llm, image_seq_length=4,
        image_token_id=lvlm.config.image_token_id, tie_word_embeddings=False)
    lvlm = InternVLForConditionalGeneration(config)
    ollm = OLLM(lvlm, tokenizer, settings, None, *build_audio_encoder())
    part, ollm.recompute = HEARING[hearing]
    ollm.train_only("vision-audio", part)
    return ollm


def make_batch(ollm, teacher):
    """Returns (a batch of two samples of one length, the lengths as the plan has them)."""
    args = argparse.Namespace(batch=2, seconds=4.0, question=20, answer=30)
    batch = bench.make_batch(ollm, 8, args, 0)
    return batch, {"tiles": 8, "prefix": batch["prefix"]["ids"].size(1),
                   "teacher": batch["text"]["ids"].size(1) if teacher else 0, "answers": 30,
                   "student": batch["audio"]["ids"].size(1), "frames": batch["mel"].size(-1)}


@pytest.mark.parametrize("base", plan.LLMS)
def test_parameters(base):
    config = plan.base_config(base)
    with torch.device("meta"):
        lvlm, audio = AutoModelForImageTextToText.from_config(config), WhisperEncoder(WHISPER)
    assert lvlm.num_parameters() == PARAMETERS[base]
    assert 0.998 < plan.base_parameters(config) / PARAMETERS[base] < 1
    projector = (WHISPER.d_model + 1) * config.text_config.hidden_size
    trained = audio.num_parameters() + projector
    assert 0.996 < plan.trained_parameters(config, WHISPER) / trained < 1


CASES = [(llm_type, alpha, "kept") for llm_type in LLM_TYPES for alpha in (0.75, 0.0)]
CASES += [("qwen2", 0.75, "recomputed"), ("qwen2", 0.75, "frozen")]


@pytest.mark.parametrize("llm_type, alpha, hearing", CASES)
def test_flops_of_a_step(llm_type, alpha, hearing):
    ollm = build(llm_type, hearing)
    batch, sample = make_batch(ollm, teacher=alpha > 0)
    with sdpa_kernel(SDPBackend.MATH), bench.flop_counter() as counter:  # nothing is done twice
        ollm(batch, alpha)[0].backward()
    part, recompute = HEARING[hearing]
    expected = 2 * plan.step_flops(ollm.lvlm.config, ollm.audio_encoder.config, **sample, part=part,
                                   recompute=recompute)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-5)  # rotations


@pytest.mark.parametrize("tiles", [1, 2])
def test_flops_of_qwen2_vl_s_eyes(tiles):
    config = Qwen2VLConfig(text_config={"hidden_size": 96}, vision_config={
        "hidden_size": 96, "embed_dim": 32, "depth": 2, "num_heads": 2})
    vision_encoder = Qwen2VisionTransformerPretrainedModel(config.vision_config)
    patches, grid = torch.randn(1024 * tiles, 1176), torch.tensor([[1, 32, 32 * tiles]])
    with torch.no_grad(), bench.flop_counter() as counter:
        vision_encoder(patches, grid)
    assert counter.get_total_flops() == plan.see_flops(config, tiles)


def half_precision_step(ollm, batch, alpha):
    """Takes a step as on a GPU: matrix products in bfloat16; the LVLM is already."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = ollm(batch, alpha)[0]
    loss.backward()


def most_bytes(run):
    """Returns the most bytes that tensors take while a function runs, above those before."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(changes, key=lambda pair: pair[0])))


@pytest.mark.parametrize("llm_type, alpha, hearing", CASES)
def test_bytes_of_a_step(llm_type, alpha, hearing):
    ollm, kept = build(llm_type, hearing), {}
    batch, sample = make_batch(ollm, teacher=alpha > 0)
    for part in ollm.children():
        if not any(parameter.requires_grad for parameter in part.parameters()):
            for parameter in part.parameters():
                parameter.data = parameter.data.bfloat16()
    config, audio = ollm.lvlm.config, ollm.audio_encoder.config
    trained, recompute = HEARING[hearing]
    copies = 2 * plan.trained_parameters(config, audio, trained)  # in bfloat16, part of fixed_bytes
    expected = 2 * plan.sample_bytes(config, audio, **sample, part=trained, recompute=recompute)
    expected += copies

    # What autograd keeps, each storage once. The rest is there only while the loss is computed:
    # the prefix's own keys and values, and logits that the backward pass does not need.
    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        half_precision_step(ollm, batch, alpha)
    for parameter in ollm.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    key_width = plan.key_width(config.text_config)
    prefix = 3 * 2 * 2 * key_width * sample["prefix"]  # 3 layers, keys and values
    logits = sample["answers"] * 2000 * (16 if alpha else 8)
    copies_of_layers = 0  # cast again in the backward pass
    if hearing == "recomputed":
        weights = plan.encoder_weights(audio.d_model, audio.encoder_ffn_dim)
        copies_of_layers = 2 * audio.encoder_layers * weights
    assert size == pytest.approx(expected - copies_of_layers - 2 * (prefix + logits), rel=0.01)

    # The most of a second step, whose gradients have their place already.
    most = most_bytes(lambda: half_precision_step(ollm, batch, alpha))
    assert most == pytest.approx(expected, rel=0.02)


def test_the_table_is_printed_and_presets_fit():
    done = run_here("analysis.bench", "--plan", "--peak-share", "0.2", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in done.stdout.splitlines()
            if line.startswith("|")}
    assert list(rows)[2:] == [*plan.LLMS, "the paper"]
    assert float(rows["internvl2-8b"][5]) == pytest.approx(2 * 3.715, abs=0.01)  # half the speed

    for base in set(plan.LLMS) & set(PRESETS):
        config = plan.base_config(base)
        samples = {"vision-audio": plan.kd_sample(7), "audio-text": plan.asr_clip(30)}
        for stage, sample in samples.items():
            size = plan.sample_bytes(config, WHISPER, **sample, recompute=True)
            size = plan.fixed_bytes(config, WHISPER) + PRESETS[base][stage]["micro_batch"] * size
            assert size < 80e9, f"{base}, {stage}: {size / 1e9:.0f} GB"
