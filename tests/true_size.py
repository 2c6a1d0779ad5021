"""Stand-ins of true size with random weights, in transformers' layout.

    python tests/true_size.py FOLDER    # InternVL2-1B (1.9 GB), Whisper-large-v3's encoder (1.3 GB)

They show that loading and a training step take a real checkpoint's shapes, in what time and memory.
They know nothing.
"""

import math
import sys
from pathlib import Path

import torch
from conftest import build_internvl2
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    InternVLForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from analysis import bench
from real.checkpoints import native_config


def random_tensor(name, shape, dtype):
    """Returns small weights, and norms and layer scales that neither silence nor explode."""
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape, dtype=dtype)
    return (torch.randn(shape) * (0.1 if ".lambda_" in name else 0.02)).to(dtype)


def count(folder):
    """Returns how many numbers a folder's weights hold."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())


def save_random(config, model, folder, dtype, prefix=""):
    """Writes a configuration, and random weights of the shapes that its model has."""
    config.save_pretrained(folder)
    save_file({prefix + name: random_tensor(name, tensor.shape, dtype)
               for name, tensor in model.state_dict().items()}, folder / "model.safetensors")


def build(folder):
    """Writes both models; returns their folders."""
    torch.manual_seed(0)
    internvl2 = build_internvl2(folder)
    (internvl2 / "reference.safetensors").unlink()
    config = native_config(bench.INTERNVL2_1B, image_token_id=193)
    with torch.device("meta"):
        lvlm = InternVLForConditionalGeneration(config)
    save_random(config, lvlm, internvl2, torch.bfloat16)
    return internvl2, build_whisper(folder)


def build_whisper(folder):
    """Writes Whisper-large-v3's encoder; returns its folder."""
    whisper = folder / "whisper-large-v3"
    config = WhisperConfig(**bench.WHISPER_LARGE_V3)
    with torch.device("meta"):
        encoder = WhisperEncoder(config)
    save_random(config, encoder, whisper, torch.float16, "model.encoder.")
    WhisperFeatureExtractor(feature_size=128).save_pretrained(whisper)
    return whisper


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    print(*build(out), sep="\n")
