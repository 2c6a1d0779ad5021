"""What graders share: a tiny model with random weights, and a comparison with one message."""

import torch

from model import OLLM
from world.models import build_audio_encoder, build_lvlm


def tiny_model():
    """Returns the built-in world's model in float64, with random weights, none of them frozen."""
    torch.manual_seed(0)
    ollm = OLLM(*build_lvlm(), None, *build_audio_encoder()).double()
    torch.nn.init.normal_(ollm.projector.weight, std=0.3)  # speech as loud as words
    return ollm


def same(ours, theirs, cause):
    """Fails with the likely cause unless two tensors agree, as far as float32 can."""
    __tracebackhide__ = True
    assert ours.shape == theirs.shape, f"{cause}; shape {[*ours.shape]}, not {[*theirs.shape]}"
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5, msg=cause)
