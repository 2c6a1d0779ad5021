"""A GPU's path gives the CPU's numbers, within bfloat16: every family, every stage, the commands.

Where there is no GPU, a pretended one takes its place: see pretended_gpu.py. Both devices read the
same run; on the GPU its LVLM is in bfloat16, on the CPU in float32.
"""

import functools
import math

import numpy as np
import pytest
import torch
import true_size
from conftest import collate, read_lines, run_config, run_here, run_script, save_runs
from pretended_gpu import on_gpu
from test_families import FAMILIES, build_listener, make_samples
from test_sources import build_vits

import train
from analysis import attention, probe
from model import OLLM
from plumbing import checkpoint, runs
from real import speech

# ---- each family ---------------------------------------------------------------------------------


def save_listener(family, folder):
    """Writes a run of a tiny model of a family, with random weights; returns its folder."""
    if family == "built-in":
        return save_runs(folder) / "audio"
    ollm = build_listener(family, folder, torch.float32)
    runs.save(ollm, folder / "run", run_config("vision-audio"))
    return folder / "run"


@pytest.fixture(scope="module", params=["built-in", *FAMILIES])
def run(request, tmp_path_factory):
    return save_listener(request.param, tmp_path_factory.mktemp("run"))


def take_step(run, device):
    """Returns one step's [loss, kl, ce], its gradient (trained,) and the LVLM's number type."""
    ollm = OLLM.load(run, device)
    ollm.train_only("vision-audio")
    ollm.move_to(device)
    batch = collate(ollm, make_samples(ollm, (1, 0, 1, 0)))
    numbers = train.forward_backward(ollm, [batch], 0.75, 1.0, torch.device(device), 1)
    gradients = [p.grad.flatten() for p in ollm.parameters() if p.requires_grad]
    return numbers, torch.cat(gradients).cpu().numpy(), ollm.lvlm.lm_head.weight.dtype


def test_a_training_step_is_the_cpus(run):
    numbers, gradient, dtype = take_step(run, "cpu")
    gpu_numbers, gpu_gradient, gpu_dtype = on_gpu(take_step, run, "cuda")
    assert (dtype, gpu_dtype) == (torch.float32, torch.bfloat16)
    assert gpu_numbers == pytest.approx(numbers, rel=0.01) and gpu_numbers != numbers
    assert np.linalg.norm(gpu_gradient - gradient) < 0.08 * np.linalg.norm(gradient)


@torch.no_grad()
def ask(run, device):
    """Returns 8 answers, shares of attention (B, L, F, S) and KL(text || audio) (N,)."""
    ollm = OLLM.load(run, device).eval()
    samples = make_samples(ollm, (1, 0, 1, 0))
    answers = ollm.answer(samples, max_new_tokens=3)
    batch = attention.collate_with_answers(ollm, samples)
    shares, _ = attention.attention_shares(ollm, batch, "audio")
    kl, _, _ = probe.shift(ollm, batch).T
    return answers["text"] + answers["audio"], shares.cpu().numpy(), kl.cpu().numpy()


def test_answers_and_where_they_look_are_the_cpus(run):
    answers, shares, kl = ask(run, "cpu")
    gpu_answers, gpu_shares, gpu_kl = on_gpu(ask, run, "cuda")
    same = [a == b for a, b in zip(answers, gpu_answers)]
    assert len(same) == 8 and sum(same) >= 6, "weights are random, so that some answers are close"
    np.testing.assert_allclose(gpu_shares, shares, rtol=0, atol=0.01)
    np.testing.assert_allclose(gpu_kl, kl, rtol=0.05, atol=0.05)


# ---- faults --------------------------------------------------------------------------------------


def step_with_fault(run, fault):
    """Takes a step in which something is wrong, as a slip in the code would make it."""
    arange, prefill, move_to = torch.arange, OLLM.prefill, OLLM.move_to

    def arange_on_cpu(*numbers, device=None, **options):
        return arange(*numbers, **options)

    def encode_with_mask_on_cpu(ollm, batch):
        prefix = batch["prefix"] | {"mask": batch["prefix"]["mask"].cpu()}
        return prefill(ollm, batch | {"prefix": prefix})

    def move_with_float64(ollm, device):
        move_to(ollm, device).lvlm.lm_head.double()

    with pytest.MonkeyPatch.context() as patch:
        if fault == "a factory without device":
            patch.setattr(torch, "arange", arange_on_cpu)
        if fault == "a mask on the CPU":
            patch.setattr(OLLM, "prefill", encode_with_mask_on_cpu)
        if fault == "float64 in bfloat16's place":
            patch.setattr(OLLM, "move_to", move_with_float64)
        take_step(run, "cuda")


@pytest.mark.parametrize("fault, message", [
    ("a factory without device", "cpu"), ("a mask on the CPU", "cpu"),
    ("float64 in bfloat16's place", "float64|dtype")])
def test_a_fault_is_seen(start, fault, message):
    with pytest.raises(RuntimeError, match=message):
        on_gpu(step_with_fault, start / "audio", fault)


# ---- commands ------------------------------------------------------------------------------------


def command(cwd, *words):
    """Runs a command; returns the number types of the LVLMs that it loads.

    Answers stop after three tokens: those of random weights have no end.
    """
    load, dtypes = OLLM.load, []

    def noted_load(run, device="cpu"):
        ollm = load(run, device)
        dtypes.append(ollm.lvlm.dtype)
        return ollm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OLLM, "load", noted_load)
        patch.setattr(OLLM, "generate", functools.partialmethod(OLLM.generate, max_new_tokens=3))
        done = run_here(*words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return dtypes


def train_and_go_on(cwd, *words):
    """Stops a training after its first step, and goes on from the checkpoint."""
    usual = checkpoint.save

    def stop(*arguments):
        usual(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", stop)
        assert run_here(*words, cwd=cwd).returncode == 130
    command(cwd, *words)


def check_same_steps(*outs):
    """Asserts that two trainings took the same two steps, within bfloat16."""
    lines, other_lines = (read_lines(out / "log.jsonl") for out in outs)
    assert len(lines) == len(other_lines) == 2
    for line, other in zip(lines, other_lines):
        for key in ("loss", "kl", "ce", "grad_norm"):
            assert other[key] == pytest.approx(line[key], rel=0.02), key


@pytest.mark.parametrize("stage, options", [
    ("vision-text", []), ("audio-text", ["--init", "base"]), ("vision-audio", ["--init", "audio"]),
    ("vision-audio", ["--init", "audio", "--train", "projector"])])
def test_a_stage_is_trained_as_on_the_cpu(world, start, tmp_path, stage, options):
    """Through the loader's processes, the optimizer and a checkpoint."""
    options = [start / word if word in ("base", "audio") else word for word in options]
    words = ["train.py", "--stage", stage, *options, "--data", world / stage, "--max-steps", 2,
             "--save-every", 1, "--global-batch", 4, "--micro-batch", 2, "--workers", 1]
    command(tmp_path, *words, "--device", "cpu", "--out", "cpu")
    on_gpu(train_and_go_on, tmp_path, *words, "--device", "cuda", "--out", "cuda")

    check_same_steps(tmp_path / "cpu", tmp_path / "cuda")


@pytest.mark.parametrize("words", [
    ["eval.py"], ["mmalign.py"], ["analysis.attention"], ["analysis.probe"]],
    ids=lambda words: " ".join(words[:2]))
def test_a_command_runs_with_the_lvlm_in_bfloat16(world, start, tmp_path, words):
    script, = words
    dtypes = on_gpu(command, tmp_path, script, start / "audio", "--data", world / "test", "--n", 2,
                    "--device", "cuda")
    assert dtypes == [torch.bfloat16]


def speak(folder):
    """Returns what becomes of a line that MMS's voice speaks on the GPU."""
    line = {"id": "7", "question": "what is this", "audio": "7.flac"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speech, "default_device", lambda: "cuda")
        return list(speech.speak_mms([line], folder, 0, build_vits(folder / "voice")))


def test_mms_speaks(tmp_path):
    line, = on_gpu(speak, tmp_path)
    assert "skipped" not in line and (tmp_path / "7.flac").exists()


# ---- what a pretended GPU cannot show ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_steps_of_both_stages_at_internvl2_1bs_true_size(world, tmp_path):
    lvlm, whisper = true_size.build(tmp_path)
    few = ["train.py", "--preset", "internvl2-1b", "--global-batch", 4, "--micro-batch", 2,
           "--max-steps", 5]
    for out, options in (("a", ["--stage", "audio-text", "--init", lvlm, "--whisper", whisper]),
                         ("va", ["--alpha", 0.75, "--init", "a", "--max-tiles", 1])):
        torch.cuda.reset_peak_memory_stats()
        part = "audio-text" if out == "a" else "vision-audio"
        command(tmp_path, *few, *options, "--data", world / part, "--out", out)
        last = read_lines(tmp_path / out / "log.jsonl")[-1]
        assert last["loss"] > 0 and math.isfinite(last["grad_norm"])
        print(f"{part}: {last['time']['steps_per_s']:.2f} steps/s, each 2 x 2 samples; "
              f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


@pytest.mark.slow
def test_two_processes_share_a_card(world, start, tmp_path):
    """By gloo: NCCL wants a card for each."""
    for processes in (1, 2):
        done = run_script("tests/train_gloo.py", "--init", start / "audio", "--max-steps", 2,
                          "--global-batch", 4, "--micro-batch", 2, "--workers", 1,
                          "--data", world / "vision-audio", "--out", str(processes),
                          cwd=tmp_path, processes=processes)
        assert done.returncode == 0, done.stderr
    check_same_steps(tmp_path / "1", tmp_path / "2")
