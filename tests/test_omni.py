"""An omni model as the base: asked before any training, trained in one stage, resumed.

Its logits and gradients are compared with the class's own forward pass in test_families.py, its
numbers on a GPU in test_gpu.py.
"""

import shutil

import pytest
import torch
from conftest import OMNI_3B, build_lvlm_folder, build_omni, run_here, run_script
from test_bench_tsv import prepare, write_benchmarks
from test_families import FEW, run

from model import OLLM
from plumbing import checkpoint, runs


def test_an_omni_model_is_asked_and_trained_without_an_alignment(world, tmp_path):
    """Its own encoder is trained; the base is asked as text and as speech before any training."""
    lvlm = build_lvlm_folder("omni", tmp_path)
    flags = ("--preset", "qwen2.5-omni-3b", *FEW, "--init", lvlm, "--data", world / "vision-audio")
    asked = run("eval.py", lvlm, "--data", world / "test", "--n", 4, "--max-new-tokens", 3,
                cwd=tmp_path)
    assert "base, audio" in asked
    assert "base, audio" in run("mmalign.py", lvlm, "--data", world / "test", "--n", 2,
                                cwd=tmp_path)

    base = OLLM.load(lvlm)
    for name, changed, options in [
            ("kd", ("audio_encoder", "projector"), ("--alpha", 0.75)),
            ("own", ("audio_encoder", "projector"), ("--on-policy", 1)),
            ("sft", ("projector",), ("--alpha", 0, "--train", "projector"))]:
        run("train.py", *flags, *options, "--out", name, cwd=tmp_path)
        after = OLLM.load(tmp_path / name)
        assert runs.source_of(tmp_path / name, "base") == lvlm
        for key, value in base.lvlm.state_dict().items():
            part = "projector" if ".audio_tower.proj." in key else "audio_encoder"
            is_trained = ".audio_tower." in key and part in changed and "bos_eos" not in key
            same = torch.equal(value, after.lvlm.state_dict()[key])
            assert same != is_trained or same and is_trained and value.abs().max() == 0, key
    table = run("eval.py", lvlm, "kd", "sft", "--data", world / "test", "--n", 4,
                "--max-new-tokens", 3, cwd=tmp_path)
    assert "base, audio" in table and "KD 0.75, audio" in table and "SFT, projector alone" in table

    (tmp_path / "tsv").mkdir()
    write_benchmarks(tmp_path / "tsv")
    prepare("tsv", "RealWorldQA", cwd=tmp_path, run=tmp_path / "kd")
    assert "RWQA" in run("eval.py", lvlm, "kd", "--bench", "RealWorldQA", "--n", 1,
                         "--max-new-tokens", 2, cwd=tmp_path)
    for script in ("analysis.attention", "analysis.probe"):
        assert "KD 0.75" in run(script, lvlm, "kd", "--data", world / "test", "--n", 2,
                                cwd=tmp_path)


@pytest.mark.parametrize("options, message", [
    (("--stage", "audio-text"), "no stage audio-text"), (("--whisper", "w"), "hears already")])
def test_an_omni_model_needs_no_alignment(options, message, world, tmp_path):
    lvlm = build_lvlm_folder("omni", tmp_path)
    done = run_here("train.py", "--preset", "qwen2.5-omni-3b", "--init", lvlm, *options,
                    "--data", world / "audio-text", cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.slow
def test_an_omni_model_resumes_to_the_byte_and_two_processes_train_as_one(world, tmp_path):
    lvlm = build_lvlm_folder("omni", tmp_path)
    command = ("train.py", "--preset", "qwen2.5-omni-3b", "--device", "cpu", "--init", lvlm,
               "--data", world / "vision-audio", "--global-batch", 4, "--micro-batch", 2,
               "--lr", 1e-3, "--save-every", 2)
    run(*command, "--max-steps", 4, "--out", "whole", cwd=tmp_path)

    # A checkpoint of two steps is what a kill leaves.
    save = checkpoint.save

    def save_and_keep(path, *args):
        seconds = save(path, *args)
        shutil.copy(path, tmp_path / "kept")
        return seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_keep)
        run(*command, "--max-steps", 4, "--out", "first", cwd=tmp_path)
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "kept", tmp_path / "again/checkpoint.safetensors")
    assert "going on after step 2" in run(*command, "--max-steps", 4, "--out", "again",
                                          cwd=tmp_path)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "again")]
    assert weights[0] == weights[1]

    done = run_script(*command, "--max-steps", 4, "--out", "two", cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (OLLM.load(tmp_path / name).state_dict() for name in ("whole", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_step_of_each_loss_at_omni_3bs_true_widths(world, tmp_path):
    lvlm = build_omni(tmp_path, OMNI_3B)
    for options in (("--alpha", 0), ("--alpha", 0.75), ("--on-policy", 1)):
        run("train.py", "--preset", "qwen2.5-omni-3b", "--device", "cpu", "--init", lvlm, *options,
            "--data", world / "vision-audio", "--global-batch", 2, "--micro-batch", 2,
            "--max-tiles", 1, "--max-steps", 1, "--out", f"run{options[1]}", cwd=tmp_path)
