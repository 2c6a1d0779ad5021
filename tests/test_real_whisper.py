"""Whisper from the folders that people have, and a real one, where a folder is given.

    WHISPER=FOLDER python -m pytest -s tests/test_real_whisper.py    # -s: with the numbers
"""

import json
import os
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import build_ollm, build_whisper, contents, run_here
from safetensors.torch import load_file, save_file
from transformers import (
    WhisperForConditionalGeneration,
    WhisperModel,
    WhisperProcessor,
    WhisperTokenizer,
)

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


def test_names_within_peft_are_read(whisper, tmp_path):
    folder = renamed(whisper, tmp_path / "peft", lambda name: f"base_model.model.{name}")
    assert same_encoder(folder, whisper)


def openai_name(name):
    return name.replace("model.", "").replace("layers.", "blocks.").replace("fc1", "mlp.0")


@pytest.mark.parametrize("name, told", [
    (openai_name, ["as transformers names it: encoder.blocks.0.", "begin with decoder.blocks, "]),
    (lambda name: name.replace("q_proj.", "q_proj.base_layer."),  # PEFT's, before it is merged
     ["model.encoder.layers.0.self_attn.q_proj.base_layer.bias and 7 more"]),
    (lambda name: name.replace("conv1.", "conv."), ["begin with model.decoder, model.encoder"]),
])
def test_names_of_another_layout_are_told(whisper, tmp_path, name, told):
    folder = renamed(whisper, tmp_path / "other", name)
    with pytest.raises(BadInput) as error:
        load_audio_encoder(folder)
    message = str(error.value)
    assert message.startswith(f"{folder}/model") and all(text in message for text in told)
    assert "\n" not in message and len(message) < 400


def test_an_adapter_alone_is_refused(whisper, tmp_path):
    """PEFT's save_pretrained leaves two files."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.model.encoder.layers.0.fc1.lora_A.weight": torch.zeros(2, 32)},
              tmp_path / "adapter_model.safetensors")
    with pytest.raises(BadInput, match="adapter .* merge_and_unload"):
        load_audio_encoder(tmp_path)


def test_a_pickle_is_not_read_and_the_advice_converts_it(whisper, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(whisper, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="to convert it: ") as error:
        load_audio_encoder(folder)
    python, option, command = shlex.split(str(error.value).partition("to convert it: ")[2])
    exec(command)
    assert (python, option) == ("python", "-c") and same_encoder(folder, whisper)


def test_the_processor_of_transformers_5_tells_of_the_front_end(whisper, tmp_path):
    folder = tmp_path / "processor"
    extractor = load_audio_encoder(whisper)[1]
    words = {"<|endoftext|>": 0, "a": 1}
    WhisperProcessor(extractor, WhisperTokenizer(vocab=words, merges=[])).save_pretrained(folder)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(whisper / name, folder)
    path = folder / "processor_config.json"
    assert path.exists() and not (folder / "preprocessor_config.json").exists()
    assert same_encoder(folder, whisper)

    about = json.loads(path.read_text())
    about["feature_extractor"]["hop_length"] = 200
    path.write_text(json.dumps(about))
    with pytest.raises(BadInput, match="/processor_config.json.*hop_length is 200"):
        load_audio_encoder(folder)
    path.unlink()
    assert same_encoder(folder, whisper), "its config.json tells the number of mel bins"


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
            == "torchrun train.py --alpha 0 --seed 0 --whisper models/whisper-tiny")
    after = contents(shapes)
    assert {name: after[name] for name in before} == before, "the base is shared, the rest apart"
    assert after.keys() - before.keys() == {"vision-text-s0/answers-mean.jsonl"}

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
    """It was ignored, and written into the run's config."""
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
        assert config["samples"] == samples

    ollm = build_ollm(torch.float32)
    assert len(train.make_epoch(config, ollm).order) == 40
    first = train.make_epoch({**config, "samples": 12}, ollm)
    assert sorted(first.order) == [[i] for i in range(12)] and len(first) == 2


# ---- a real one ----------------------------------------------------------------------------------

FOLDER = os.environ.get("WHISPER")
real = pytest.mark.skipif(not FOLDER, reason="needs a real Whisper: WHISPER=FOLDER")
TEXT = ("the quick brown fox jumps over the lazy dog, and what color is the circle, where is the "
        "square, how many stars are there, is there a red one, tell me what the picture shows, ")
COSINES = {1: 0.8, 2: 0.87, 4: 0.92, 8: 0.94, 15: 0.95}  # seconds: least mean cosine of frames


@pytest.fixture(scope="module")
def listening():
    """The built-in LVLM with the real encoder, and 30 s of speech."""
    encoder, extractor = load_audio_encoder(FOLDER)
    torch.manual_seed(0)
    ollm = OLLM(*build_lvlm(), None, encoder.eval(), extractor)
    return ollm, speak(TEXT * 3)[0][: 30 * data.SAMPLE_RATE]


def padded(wave):
    """A clip with silence after it, up to 30 s."""
    return np.pad(wave, (0, 30 * data.SAMPLE_RATE - len(wave)))


@torch.no_grad()
def hear(ollm, waves):
    """Returns the audio tokens (B, A, D) of clips at their real length."""
    return ollm.hear(*data.mel_spectrograms(ollm.mel_extractor, waves))


@torch.no_grad()
def frames(ollm, wave):
    """Returns a clip's frames (L / 2, E), before they are pooled and projected."""
    kept = []
    hook = ollm.audio_encoder.layer_norm.register_forward_hook(lambda *call: kept.append(call[2]))
    hear(ollm, [wave])
    hook.remove()
    return kept[0][0]


@real
@pytest.mark.parametrize("seconds", [1, 7, 30])
def test_thirty_seconds_are_heard_as_transformers_hears_them(listening, seconds):
    ollm, speech = listening
    wave = speech[: seconds * data.SAMPLE_RATE]
    theirs = WhisperModel.from_pretrained(FOLDER).encoder.eval()
    features = ollm.mel_extractor(wave, sampling_rate=data.SAMPLE_RATE, return_tensors="pt")
    with torch.no_grad():
        x = theirs(features.input_features).last_hidden_state  # (1, 1500, E)
        expected = ollm.projector(x.unflatten(1, (-1, 2)).mean(2))  # (1, 750, D)
    difference = (hear(ollm, [padded(wave)]) - expected).abs().max()
    print(f"\n{seconds} s in 30 s: {difference:.1e} of {expected.abs().max():.3g}")
    assert difference <= 1e-5 * expected.abs().max()


@real
def test_a_clip_sounds_the_same_in_any_company(listening):
    ollm, speech = listening
    short, long = speech[: 3 * data.SAMPLE_RATE], speech[: 8 * data.SAMPLE_RATE]
    alone, together = hear(ollm, [short])[0], hear(ollm, [short, long])[0, :75]
    difference = (alone - together).abs().max()
    print(f"\nalone and in a batch: {difference:.1e} of {alone.abs().max():.3g}")
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)


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
