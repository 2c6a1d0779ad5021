"""Grades `encode_audio` (model.py) against transformers' Whisper encoder, cut to each clip."""

import copy
from contextlib import nullcontext

import pytest
import torch
from tiny import same, tiny_model, untouched
from torch import nn


@pytest.fixture(scope="module")
def ollm():
    return tiny_model()


def encode(ollm, *n_frames, dtype=torch.float64, guard=nullcontext):
    """Returns encode_audio's tokens of noise, and the spectrograms: beyond a clip's end 0."""
    mel = torch.randn(len(n_frames), 40, max(n_frames), dtype=dtype)
    for clip, n in zip(mel, n_frames):
        clip[:, n:] = 0
    n_frames = torch.tensor(n_frames)
    with guard((mel, n_frames, dict(ollm.named_parameters()))):
        return ollm.encode_audio(mel, n_frames), mel


@torch.no_grad()
def whisper(ollm, mel):
    """Returns the tokens (B, L / 4, D) of whole clips; the encoder takes but one length, theirs."""
    encoder = copy.deepcopy(ollm.audio_encoder)
    length = mel.size(-1) // 2
    encoder.embed_positions = nn.Embedding.from_pretrained(encoder.embed_positions.weight[:length])
    encoder.config.max_source_positions = length
    frames = encoder(mel).last_hidden_state  # (B, L / 2, E)
    return ollm.projector(frames.unflatten(1, (-1, 2)).mean(2))


@pytest.mark.parametrize("frames", [4, 84, 1500])  # 1,500 are 30 s
def test_one_clip(ollm, frames):
    ours, mel = encode(ollm, frames)
    same(ours, whisper(ollm, mel),
         "a token for every 4 frames, (1, frames / 4, D). Whisper's layers in its order: conv1 and "
         "conv2, a GELU after each, positions from 0, the layers, layer_norm; then the mean of "
         "each pair of frames, and the projector")


def test_clips_of_several_lengths(ollm):
    lengths = (48, 20, 84, 80)
    ours, mel = encode(ollm, *lengths)
    for tokens, clip, n in zip(ours, mel, lengths):
        same(tokens[: n // 4], whisper(ollm, clip[None, :, :n])[0],
             "a clip's tokens depend on its batch: no layer's attention may look past the clip's "
             "end, which is at n_frames / 2 after the second convolution")


def test_the_encoder_learns(ollm):
    encode(ollm, 20, 48)[0][:, :5].square().sum().backward()
    for module in (ollm.audio_encoder, ollm.projector):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None or "embed_positions" in name, (
                f"{name} gets no gradient: audio encoder and projector are what is trained")


def test_half_precision(ollm):
    half = copy.deepcopy(ollm).bfloat16()
    ours, mel = encode(half, 20, 48, dtype=torch.float32)
    assert ours.dtype == torch.bfloat16, "spectrograms are in float32, the encoder may be in half"
    same(ours[0, :5], whisper(ollm, mel[:1, :, :20].double())[0],
         "a mask in half precision hides no less", 0.1, 0.2)


def test_no_speech(ollm):
    assert ollm.encode_audio(None, None) is None, "without speech (mel is None) it returns None"


def test_its_arguments_stay(ollm):
    encode(ollm, 20, 48, guard=untouched)
