"""Grades `encode_audio` (model.py) against transformers' Whisper encoder, cut to each clip."""

import copy

import pytest
import torch
from tiny import same, tiny_model
from torch import nn


@pytest.fixture(scope="module")
def ollm():
    return tiny_model()


def noise(n_frames):
    """Returns spectrograms (B, 40, L) of noise: beyond a clip's end they are 0."""
    mel = torch.randn(len(n_frames), 40, max(n_frames), dtype=torch.float64)
    for clip, n in zip(mel, n_frames):
        clip[:, n:] = 0
    return mel, torch.tensor(n_frames)


@torch.no_grad()
def whisper(ollm, mel):
    """Returns the tokens (B, L / 4, D) of whole clips; the encoder takes but one length, theirs."""
    encoder = copy.deepcopy(ollm.audio_encoder)
    length = mel.size(-1) // 2
    encoder.embed_positions = nn.Embedding.from_pretrained(encoder.embed_positions.weight[:length])
    encoder.config.max_source_positions = length
    frames = encoder(mel).last_hidden_state  # (B, L / 2, E)
    return ollm.projector(frames.unflatten(1, (-1, 2)).mean(2))


@pytest.mark.parametrize("frames", [4, 84, 3000])
def test_one_clip(ollm, frames):
    mel, n_frames = noise([frames])
    ours = ollm.encode_audio(mel, n_frames)
    assert ours.shape == (1, frames // 4, 128), (
        f"a token for every 4 frames: (1, {frames // 4}, 128), not {tuple(ours.shape)}")
    same(ours, whisper(ollm, mel),
         "Whisper's layers in its order: conv1 and conv2, a GELU after each, positions from 0, the "
         "layers, layer_norm; then the mean of each pair of frames, and the projector")


def test_clips_of_several_lengths(ollm):
    mel, n_frames = noise([48, 20, 84, 80])
    ours = ollm.encode_audio(mel, n_frames)
    for tokens, clip, n in zip(ours, mel, n_frames.tolist()):
        same(tokens[: n // 4], whisper(ollm, clip[None, :, :n])[0],
             "a clip's tokens depend on its batch: no layer's attention may look past the clip's "
             "end, which is at n_frames / 2 after the second convolution. (Is the mask of x's "
             "dtype?)")


def test_the_encoder_learns(ollm):
    mel, n_frames = noise([20, 48])
    ollm.encode_audio(mel, n_frames)[:, :5].square().sum().backward()
    for name, parameter in (*ollm.audio_encoder.named_parameters(),
                            *ollm.projector.named_parameters()):
        assert parameter.grad is not None or "embed_positions" in name, (
            f"{name} gets no gradient: the audio encoder and the projector are what is trained")


def test_no_speech(ollm):
    assert ollm.encode_audio(None, None) is None, "without speech (mel is None) it returns None"
