"""What graders share: a tiny model with random weights, and comparisons with one message."""

import contextlib

import numpy as np
import torch

from model import OLLM
from world.models import build_audio_encoder, build_lvlm


def tiny_model(ears=True):
    """Returns the built-in world's model in float64, with random weights, none of them frozen."""
    torch.manual_seed(0)
    ollm = OLLM(*build_lvlm(), None, *(build_audio_encoder() if ears else ())).double()
    if ears:
        torch.nn.init.normal_(ollm.projector.weight, std=0.3)  # speech as loud as words
    return ollm


def same(ours, theirs, cause, rtol=1e-4, atol=1e-5):
    """Fails with the likely cause unless two tensors agree, as far as float32 can."""
    __tracebackhide__ = True
    assert ours.shape == theirs.shape, f"{cause}; shape {[*ours.shape]}, not {[*theirs.shape]}"
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=rtol, atol=atol, msg=cause)


@contextlib.contextmanager
def untouched(*arguments):
    """Fails if what is done inside changes an argument: the caller needs it as it was."""
    __tracebackhide__ = True
    before = dict(contents(arguments))
    yield
    after = dict(contents(arguments))
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    assert not changed, f"an argument is changed ({changed[0]}): the caller needs it as it was"


def contents(value, name=""):
    """Yields (name, value) of all that is inside; of tensors and arrays type, shape and bytes."""
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield name, (value.dtype, value.shape, data.tobytes())
    elif isinstance(value, np.ndarray):
        yield name, (value.dtype, value.shape, value.tobytes())
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from contents(item, f"{name} {key}".strip())
    else:
        yield name, value
