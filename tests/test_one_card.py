"""What makes a training fit one card: the projector alone, Whisper's layers computed again."""

import shutil

import pytest
import torch
from conftest import build_internvl2, build_ollm, build_whisper, collate, run_here
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import data
from model import OLLM
from plumbing import runs
from plumbing.files import BadInput, enough_memory

FEW = ["--preset", "internvl2-1b", "--device", "cpu", "--micro-batch", 2, "--global-batch", 4]


@pytest.fixture(scope="module")
def aligned(world, tmp_path_factory):
    """A folder with tiny models, and a run that aligned their projector alone in two steps."""
    folder = tmp_path_factory.mktemp("projector")
    lvlm, whisper = build_internvl2(folder), build_whisper(folder / "whisper")
    done = run_here("train.py", *FEW, "--stage", "audio-text", "--init", lvlm, "--whisper", whisper,
                    "--data", world / "audio-text", "--train", "projector", "--max-steps", 2,
                    cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


RUN = "runs/internvl2-1b/audio-text-projector-s0"


def test_a_run_holds_the_projector_alone_and_names_whisper(aligned):
    weights = load_file(aligned / RUN / "model.safetensors")
    assert sorted(weights) == ["projector.bias", "projector.weight"]
    assert runs.read_run_info(aligned / RUN)["whisper"] == "../../../whisper"
    assert runs.read_run_info(aligned / RUN)["kind"] == "aligned, projector alone"
    ollm = OLLM.load(aligned / RUN)
    whisper = load_file(aligned / "whisper/model.safetensors")
    for name, tensor in ollm.audio_encoder.state_dict().items():
        assert torch.equal(tensor, whisper[f"model.encoder.{name}"]), name
    assert torch.equal(ollm.projector.weight, weights["projector.weight"])


@pytest.mark.parametrize("part, moves", [("audio", True), ("projector", False)])
def test_the_next_stage_trains_what_it_is_told_to(world, aligned, tmp_path, part, moves):
    """Both start from the run without an encoder; trained, the encoder is saved with the run."""
    done = run_here("train.py", *FEW, "--init", aligned / RUN, "--data", world / "vision-audio",
                    "--max-tiles", 1, "--max-steps", 2, "--train", part, "--out", tmp_path / "va",
                    cwd=aligned)
    assert done.returncode == 0, done.stderr
    before, after = OLLM.load(aligned / RUN), OLLM.load(tmp_path / "va")
    assert not torch.equal(before.projector.weight, after.projector.weight)
    weights = [ollm.audio_encoder.layers[0].fc1.weight for ollm in (before, after)]
    assert torch.equal(*weights) != moves
    stored = load_file(tmp_path / "va/model.safetensors")
    assert any(name.startswith("audio_encoder.") for name in stored) == moves


def test_an_encoder_that_an_earlier_stage_trained_stays_in_that_run(world, start, tmp_path):
    done = run_here("train.py", "--init", start / "audio", "--data", world / "vision-audio",
                    "--max-steps", 1, "--train", "projector", "--out", tmp_path / "va",
                    cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    info = runs.read_run_info(tmp_path / "va")
    size = (tmp_path / "va/model.safetensors").stat().st_size
    assert (tmp_path / "va" / info["whisper"]).resolve() == (start / "audio").resolve()
    assert size < 1e5 < (start / "audio/model.safetensors").stat().st_size
    encoders = [OLLM.load(run).audio_encoder.state_dict()
                for run in (start / "audio", tmp_path / "va")]
    assert all(torch.equal(encoders[0][name], encoders[1][name]) for name in encoders[0])


def test_another_whisper_than_in_training_is_refused(aligned, tmp_path):
    folder = shutil.copytree(aligned, tmp_path / "moved")
    OLLM.load(folder / RUN)
    weights = load_file(folder / "whisper/model.safetensors")
    weights["model.encoder.conv1.bias"] += 1
    save_file(weights, folder / "whisper/model.safetensors")
    with pytest.raises(BadInput, match="another whisper than lies in .*whisper now"):
        OLLM.load(folder / RUN)


def test_only_the_projector_gets_a_gradient(world):
    ollm = build_ollm()
    ollm.train_only("vision-audio", "projector")
    samples = data.Samples(world / "vision-audio", ollm.settings)
    ollm(collate(ollm, [samples[i] for i in range(3)]), 0.75)[0].backward()
    trained = {name for name, p in ollm.named_parameters() if p.grad is not None}
    assert trained == {"projector.weight", "projector.bias"}


@pytest.mark.parametrize("part", ["audio", "projector"])
def test_layers_computed_again_give_the_same_gradients(world, part):
    ollm = build_ollm()
    ollm.train_only("vision-audio", part)
    samples = data.Samples(world / "vision-audio", ollm.settings)
    batch, results = collate(ollm, [samples[i] for i in range(3)]), []
    for ollm.recompute in (False, True):
        ollm.zero_grad()
        with FlopCounterMode(display=False) as counter:
            ollm(batch, 0.75)[0].backward()
        gradients = {name: p.grad for name, p in ollm.named_parameters() if p.grad is not None}
        results.append((gradients, counter.get_total_flops()))
    (kept, flops), (again, more_flops) = results
    assert kept.keys() == again.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-12, atol=1e-15)
    assert (more_flops > flops) == (part == "audio"), "a frozen encoder is not computed twice"


def test_want_of_memory_is_one_line_with_advice():
    with pytest.raises(BadInput, match="out of memory; take less .*DefaultCPUAllocator"):
        with enough_memory("take less"):
            torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(BadInput, match="out of memory; take less .CUDA out of memory. Tried"):
        with enough_memory("take less"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="size"):
        with enough_memory("take less"):
            torch.zeros(2) @ torch.zeros(3)
