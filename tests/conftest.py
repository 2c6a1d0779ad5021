"""A small built-in world and tiny models of the real classes, shared by all tests. No network, no accelerator."""

import os
import resource
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch

import data
import model


def run_script(*arguments, cwd, processes=0, timeout=170, largest_file=None):
    """Runs one of the project's scripts as a user would; returns the finished process, its output as text.

    processes: start so many by torchrun; largest_file: bytes, beyond which writing fails as on a full disk
    """
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = launcher + [str(ROOT / arguments[0]), *map(str, arguments[1:])]
    limit = largest_file and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file)))
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, preexec_fn=limit)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A prepared built-in world of a few dozen samples: a folder with the four parts."""
    folder = tmp_path_factory.mktemp("world")
    made = run_script("data.py", "shapes", "--seed", 3, "--out", folder, "--scenes", 12, "--clips", 40, "--n", 100,
                      "--test", 32, cwd=folder)
    assert made.returncode == 0, made.stderr
    return folder


def build_ollm(dtype=torch.float64, max_tiles=1):
    """The built-in model with random weights, listening; the audio part is scaled up so that it matters."""
    torch.manual_seed(0)
    ollm = model.OLLM(*model.build_lvlm(), *model.build_audio_encoder())
    ollm.settings = {**ollm.settings, "max_tiles": max_tiles}
    torch.nn.init.normal_(ollm.projector.weight, std=0.3)
    ollm.train_only("vision-audio")
    return model.to_float64(ollm) if dtype == torch.float64 else ollm


def collate(ollm, samples, **options):
    """A batch in the model's precision."""
    batch = data.collate(samples, ollm.tokenizer, ollm.mel_extractor, ollm.settings, **options)
    for key in ("pixels", "mel"):
        batch[key] = batch[key] if batch[key] is None else batch[key].to(ollm.projector.weight.dtype)
    return batch
