"""Whisper from the folders that people have, and a real one, where a folder is given.

    WHISPER=FOLDER python -m pytest -s tests/test_real_whisper.py    # -s: with the numbers
"""

import json
import os
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import build_ollm, build_whisper, contents, run_here
from safetensors.torch import load_file, save_file
from transformers import WhisperForConditionalGeneration, WhisperModel

import data
import train
from model import OLLM
from plumbing import runs
from plumbing.files import BadInput
from plumbing.media import speak
from real.checkpoints import load_audio_encoder
from world.models import build_lvlm

# ---- folders as people have them -----------------------------------------------------------------


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A tiny Whisper, as transformers saves the whole of it; read only."""
    return build_whisper(tmp_path_factory.mktemp("whisper"))


def renamed(whisper, folder, name):
    """Copies a Whisper's folder, with other names of its parameters."""
    shutil.copytree(whisper, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name(key): tensor for key, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def same_encoder(folder, whisper):
    """Whether a folder gives the encoder that transformers finds in `whisper`, to the bit."""
    expected = WhisperModel.from_pretrained(whisper).encoder.state_dict()
    state = load_audio_encoder(folder)[0].state_dict()
    assert state.keys() == expected.keys()
    return all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


@pytest.mark.parametrize("part, name", [
    (lambda whole: whole, "model.encoder.conv1.weight"),
    (lambda whole: whole.model, "encoder.conv1.weight"),
    (lambda whole: whole.model.encoder, "conv1.weight"),
])
def test_each_of_transformers_classes_saves_what_we_read(whisper, tmp_path, part, name):
    whole = WhisperForConditionalGeneration.from_pretrained(whisper)
    part(whole).save_pretrained(tmp_path / "part")
    assert name in load_file(tmp_path / "part/model.safetensors")
    assert same_encoder(tmp_path / "part", whisper)
    part(whole).save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert not (tmp_path / "sharded/model.safetensors").exists()
    assert same_encoder(tmp_path / "sharded", whisper)


def test_names_within_peft_are_read_and_of_another_layout_refused(whisper, tmp_path):
    folder = renamed(whisper, tmp_path / "peft", lambda name: f"base_model.model.{name}")
    assert same_encoder(folder, whisper)
    for number, (ours, other) in enumerate((("layers.", "blocks."), ("conv1.", "conv."),
                                            ("q_proj.", "q_proj.base_layer."))):  # PEFT's, unmerged
        folder = renamed(whisper, tmp_path / f"other{number}",
                         lambda name: name.replace(ours, other))
        with pytest.raises(BadInput, match=f"other{number}: not a Whisper") as error:
            load_audio_encoder(folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    pickle = shutil.copytree(whisper, tmp_path / "pickle")
    (pickle / "model.safetensors").rename(pickle / "pytorch_model.bin")
    with pytest.raises(BadInput, match="pickle: not a Whisper"):
        load_audio_encoder(pickle)


# ---- the built-in world, heard through one -------------------------------------------------------


@pytest.fixture
def here(world, start, whisper, tmp_path):
    """A folder with the built-in world's data, its base, and what listens by its own encoder."""
    shutil.copytree(world, tmp_path / "runs/shapes/data-s0")
    for name, run in (("vision-text-s0", "base"), ("audio-text-s0", "audio")):
        shutil.copytree(start / run, tmp_path / "runs/shapes" / name)
    about = tmp_path / "runs/shapes/audio-text-s0/ollm.json"
    about.write_text(about.read_text().replace('"../base"', '"../vision-text-s0"'))
    shutil.copytree(whisper, tmp_path / "models/whisper-tiny")
    return tmp_path


def training(run):
    return json.loads((run / "ollm.json").read_text())["training"]


@pytest.mark.slow
def test_a_real_whisper_has_a_chain_of_its_own(here, capfd):
    shapes, chain = here / "runs/shapes", here / "runs/shapes-whisper-tiny"
    before = contents(shapes)
    done = run_here("train.py", "--whisper", "models/whisper-tiny", cwd=here)
    assert done.returncode == 0, done.stderr
    table = capfd.readouterr().out  # its child's
    assert all(text in table for text in (" text |", "aligned, audio", "KD 0.75, gap"))
    assert (done.stdout.splitlines()[-1].strip()
            == "torchrun --standalone train.py --alpha 0 --seed 0 --whisper models/whisper-tiny")
    after = contents(shapes)
    assert {name: after[name] for name in before} == before, "the base is shared, the rest apart"
    assert after.keys() - before.keys() == {
        f"vision-text-s0/{name}" for name in ("answers-mean.jsonl", ".answers-mean.jsonl.lock")}

    # Each run says what it was made of.
    assert {path.name for path in chain.iterdir()} == {"audio-text-s0", "vision-audio-a0.75-s0"}
    aligned, last = training(chain / "audio-text-s0"), training(chain / "vision-audio-a0.75-s0")
    said = {key: aligned[key] for key in ("whisper", "init", "muon", "lr", "samples")}
    assert said == {"whisper": "models/whisper-tiny", "init": "runs/shapes/vision-text-s0",
                    "muon": False, "lr": 3e-4, "samples": 4800}
    assert last["whisper"] is None and last["init"] == "runs/shapes-whisper-tiny/audio-text-s0"
    assert runs.source_of(chain / "vision-audio-a0.75-s0", "base") == shapes / "vision-text-s0"
    encoder = load_audio_encoder(chain / "vision-audio-a0.75-s0")[0]
    assert encoder.config.num_mel_bins == 128 and encoder.config.d_model == 32

    # The other loss starts from the same alignment; scripts find this chain, or the built-in one.
    sft = run_here("train.py", "--whisper", "models/whisper-tiny", "--alpha", 0,
                   "--max-steps", 1, cwd=here)
    assert sft.returncode == 0 and "audio-text:" not in sft.stdout + sft.stderr, sft.stderr
    table = run_here("eval.py", "--whisper", "models/whisper-tiny", cwd=here)
    assert table.returncode == 0 and "KD 0.75 - SFT, spoken: " in table.stdout, table.stderr
    own = run_here("eval.py", cwd=here)
    assert "aligned, audio" in own.stdout and "KD 0.75" not in own.stdout


@pytest.mark.parametrize("options, told", [
    ("--stage vision-text", "starts from nothing"),
    ("--init runs/shapes/audio-text-s0", "runs/shapes/audio-text-s0: hears already"),
    ("--stage audio-text --init runs/shapes/audio-text-s0 --out runs/on", "hears already"),
    ("--alpha 0.5", "runs/shapes-whisper-tiny/audio-text-s0: hears already, through other/"),
    ("--stage audio-text", "whisper is other/whisper-tiny there and models/whisper-tiny here"),
    ("--preset internvl2-1b", "runs/internvl2-1b/audio-text-s0: hears already, through other/"),
    ("--whisper nowhere", "nowhere"),
])
def test_a_whisper_that_no_alignment_starts_from_is_refused(here, options, told):
    for chain in ("shapes-whisper-tiny", "internvl2-1b"):
        run = here / "runs" / chain / "audio-text-s0"
        shutil.copytree(here / "runs/shapes/audio-text-s0", run)
        about = json.loads((run / "ollm.json").read_text())
        about["training"]["whisper"] = "other/whisper-tiny"
        (run / "ollm.json").write_text(json.dumps(about))
    before = contents(here / "runs")
    done = run_here("train.py", "--whisper", "models/whisper-tiny", *options.split(), cwd=here)
    assert done.returncode in (1, 2) and told in done.stderr.splitlines()[-1], done.stderr
    assert done.returncode == 2 or done.stderr.count("\n") == 1
    after = contents(here / "runs")
    assert {name for name in after if after[name] != before.get(name, b"")} == set()


def test_of_the_built_in_clips_a_part_is_taken_and_of_others_all(here, monkeypatch):
    monkeypatch.chdir(here)
    command = ["train.py", "--stage", "audio-text", "--whisper", "models/whisper-tiny"]
    for options, samples in (([], 4800), (["--data", "runs/shapes/data-s0/audio-text"], None)):
        monkeypatch.setattr(sys, "argv", command + options)
        config, _ = train.configure(train.parse_arguments(), "audio-text")
        assert config.samples == samples

    ollm = build_ollm(torch.float32)
    assert len(train.make_epoch(config, ollm).order) == 40
    first = train.make_epoch(replace(config, samples=12), ollm)
    assert sorted(first.order) == [[i] for i in range(12)] and len(first) == 2


# ---- a real one ----------------------------------------------------------------------------------

FOLDER = os.environ.get("WHISPER")
real = pytest.mark.skipif(not FOLDER, reason="needs a real Whisper: WHISPER=FOLDER")
TEXT = ("the quick brown fox jumps over the lazy dog, and what color is the circle, where is the "
        "square, how many stars are there, is there a red one, tell me what the picture shows, ")
COSINES = {1: 0.8, 2: 0.87, 4: 0.92, 8: 0.94, 15: 0.95}  # seconds: least mean cosine of frames


@pytest.fixture(scope="module")
def listening(whisper):
    """The built-in LVLM with the real encoder, or the tiny one, and 30 s of speech."""
    encoder, extractor = load_audio_encoder(FOLDER or whisper)
    torch.manual_seed(0)
    ollm = OLLM(*build_lvlm(), None, encoder.eval(), extractor, FOLDER or whisper)
    return ollm, speak(TEXT * 3)[0][: 30 * data.SAMPLE_RATE]


def padded(wave):
    """A clip with silence after it, up to 30 s."""
    return np.pad(wave, (0, 30 * data.SAMPLE_RATE - len(wave)))


@torch.no_grad()
def frames(ollm, wave):
    """Returns a clip's frames (L / 2, E), before they are pooled and projected."""
    kept = []
    hook = ollm.audio_encoder.layer_norm.register_forward_hook(lambda *call: kept.append(call[2]))
    ollm.encode_audio(*data.mel_spectrograms(ollm.mel_extractor, [wave]))
    hook.remove()
    return kept[0][0]


@pytest.mark.parametrize("seconds", [1, 7, 30])
def test_thirty_seconds_are_heard_as_transformers_hears_them(listening, seconds):
    """With --audio-seconds 30 the encoder gives what transformers' own gives, then projected."""
    ollm, speech = listening
    wave, settings = speech[: seconds * data.SAMPLE_RATE], replace(ollm.settings, audio_seconds=30)
    batch = data.collate([{"wave": wave, "answer": "red"}], ollm.tokenizer, ollm.mel_extractor,
                         settings)
    theirs = WhisperModel.from_pretrained(ollm.whisper).encoder.eval()
    features = ollm.mel_extractor(wave, sampling_rate=data.SAMPLE_RATE, return_tensors="pt")
    with torch.no_grad():
        x = theirs(features.input_features).last_hidden_state  # (1, 1500, E)
        expected = ollm.projector(x.unflatten(1, (-1, 2)).mean(2))  # (1, 750, D)
        ours = ollm.encode_audio(batch["mel"], batch["n_frames"])  # (1, 750, D)
    assert (batch["audio"]["ids"] == data.AUDIO_PLACEHOLDER).sum() == 750
    difference = (ours - expected).abs().max()
    print(f"\n{seconds} s in 30 s: {difference:.1e} of {expected.abs().max():.3g}")
    assert difference <= 1e-5 * expected.abs().max()


@real
def test_the_real_length_against_thirty_seconds(listening):
    """The longer a clip, the nearer are its frames to those of plain Whisper (docs/speed.md)."""
    ollm, speech = listening
    means = []
    for seconds in COSINES:
        starts = [i * data.SAMPLE_RATE for i in (0, 5, 10, 15)]
        clips = [speech[start: start + seconds * data.SAMPLE_RATE] for start in starts]
        cosines = [torch.cosine_similarity(x, frames(ollm, padded(clip))[: len(x)], dim=1)
                   for clip in clips for x in [frames(ollm, clip)]]  # (L / 2,) each
        means.append(torch.cat(cosines).mean().item())
        print(f"\n{seconds} s: cosine {means[-1]:.3f}", end="")
    assert all(mean > least for mean, least in zip(means, COSINES.values())), means
    assert means == sorted(means) and means[0] < 0.99, "the check can fail"
