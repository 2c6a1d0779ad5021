"""Public formats brought to ours: hand-made inputs in the exact layouts, interrupted and not, good rows and bad."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, run_here
from PIL import Image
from transformers import VitsConfig, VitsModel, VitsTokenizer

import data
import sources

DIALOGUES = [
    {"id": "1", "image": "coco/a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?\nAnswer the question using a single word or phrase."},
        {"from": "gpt", "value": "Cat"}, {"from": "human", "value": "And now?"}, {"from": "gpt", "value": "Red"}]},
    {"id": "2", "image": "coco/a.png", "conversations": [
        {"from": "human", "value": "How warm is the café, 30 °C?\n<image>"},
        {"from": "gpt", "value": "Très warm."}]},
    {"id": "3", "conversations": [{"from": "human", "value": "Tell me a joke"}, {"from": "gpt", "value": "No."}]},
    {"id": "4", "image": "coco/none.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]},
    {"id": "5", "image": "coco/a.png", "conversations": [
        {"from": "human", "value": "<image>\n" + "why " * 200}, {"from": "gpt", "value": "So."}]},
    {"id": "6", "image": "coco/broken.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]},
    {"id": "7", "image": "coco/a.png", "conversations": [
        {"from": "human", "value": "<image>\nDescribe the region [0.1, 0.2, 0.3, 0.4]."},
        {"from": "gpt", "value": "x"}]},
    {"id": "8", "image": ["coco/a.png", "coco/a.png"], "conversations": [
        {"from": "human", "value": "Which?"}, {"from": "gpt", "value": "Both."}]},
    {"id": "9", "image": "coco/a.png", "conversations": [
        {"from": "human", "value": "<image>\nAnswer the question using a single word or phrase."},
        {"from": "gpt", "value": "x"}]},
    "not a dialogue",
    {"id": "11", "image": "../a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]},
]


@pytest.fixture
def llava(tmp_path):
    """Annotations of eleven rows, good and bad, and forty plain ones; the arguments that prepare them."""
    (tmp_path / "pictures/coco").mkdir(parents=True)
    Image.new("P", (40, 30), 3).save(tmp_path / "pictures/coco/a.png")
    (tmp_path / "pictures/coco/broken.png").write_bytes(b"\x89PNG")
    plain = [{"id": "x", "image": "coco/a.png", "conversations": [
        {"from": "human", "value": f"<image>\nHow many things are there in picture {i}?"},
        {"from": "gpt", "value": str(i)}]} for i in range(40)]
    (tmp_path / "mix.json").write_text(json.dumps(DIALOGUES + plain))
    return ["data.py", "llava", "--annotations", tmp_path / "mix.json", "--images", tmp_path / "pictures"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_llava_rows_are_taken_cleaned_or_left_out_with_a_reason(llava, tmp_path):
    done = run_here(*llava, "--tts", "espeak", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept, skipped = lines(tmp_path / "out/samples.jsonl"), lines(tmp_path / "out/skipped.jsonl")
    assert len(kept) == 42 and kept[0]["question"] == "What is this?" and kept[0]["answer"] == "Cat"
    assert kept[1]["question"] == "How warm is the café, 30 °C?" and kept[1]["answer"] == "Très warm."
    reasons = {row["id"]: row["skipped"] for row in skipped}
    for row, reason in {2: "no picture", 3: "picture is missing", 4: "more than 400", 5: "picture is broken",
                        6: "coordinates", 7: "several pictures", 8: "is empty", 9: "not a dialogue",
                        10: "picture is missing"}.items():
        assert reason in reasons.pop(f"{row:06}"), row
    assert not reasons and "1  the question has coordinates" in done.stdout
    samples = data.Samples(tmp_path / "out", {"max_tiles": 1, "image_size": 64})
    assert all(len(samples[i]["wave"]) > 8000 for i in range(len(samples)))


def test_a_draw_is_seeded_and_other_arguments_are_refused(llava, tmp_path):
    for seed in (0, 1):
        out = tmp_path / str(seed)
        done = run_here(*llava, "--tts", "espeak", "--n", 5, "--seed", seed, "--out", out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        drawn = [s["id"] for name in ("samples", "skipped") for s in lines(out / f"{name}.jsonl")]
        assert len(drawn) == 5 + 8, "eight rows can't be used at first sight, five of the others are drawn"
    assert (tmp_path / "0/samples.jsonl").read_bytes() != (tmp_path / "1/samples.jsonl").read_bytes()
    done = run_here(*llava, "--tts", "espeak", "--n", 6, "--out", tmp_path / "0", cwd=tmp_path)
    assert done.returncode == 1 and "choose another --out" in done.stderr and done.stderr.count("\n") == 1


def build_vits(folder):
    """A tiny VITS with random weights, speaking at 8 kHz, and its letters."""
    torch.manual_seed(0)
    config = VitsConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
                        flow_size=16, spectrogram_bins=9, prior_encoder_num_flows=1,
                        prior_encoder_num_wavenet_layers=1, posterior_encoder_num_wavenet_layers=1,
                        duration_predictor_num_flows=1, duration_predictor_filter_channels=16,
                        depth_separable_num_layers=1, upsample_initial_channel=16,
                        upsample_rates=[8, 8], upsample_kernel_sizes=[16, 16], resblock_kernel_sizes=[3],
                        resblock_dilation_sizes=[[1]], sampling_rate=8000)
    VitsModel(config).save_pretrained(folder)
    letters = {c: i for i, c in enumerate("-abcdefghijklmnopqrstuvwxyz '")}
    (folder / "vocab.json").write_text(json.dumps({**letters, "<unk>": len(letters)}))
    VitsTokenizer(folder / "vocab.json", pad_token="-", is_uroman=False, phonemize=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tts", ["espeak", "mms"])
def test_what_was_interrupted_goes_on_and_leaves_the_same_bytes(llava, tmp_path, tts):
    command = [*llava, "--tts", tts, "--voice", build_vits(tmp_path / "voice")]
    whole = run_here(*command, "--out", tmp_path / "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    out, arguments = tmp_path / "cut", [str(a) for a in command[1:]]
    process = subprocess.Popen([sys.executable, ROOT / "data.py", *arguments, "--out", out], cwd=tmp_path,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and len(list(out.glob("audio/*.flac"))) < 3:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (out / "samples.jsonl").unlink(missing_ok=True)  # should it have been quicker than we are
    for path in list(out.glob("audio/*.flac"))[2:]:
        path.unlink()
    again = run_here(*command, "--out", out, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    kept = {k: v for k, v in contents(out).items() if not k.endswith(".tmp")}
    assert kept == contents(tmp_path / "whole")
    assert len(lines(out / "samples.jsonl")) == 42


def save_noise(path, seconds, rate, **options):
    """A recording of noise in the format that the path's suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(0, 0.1, int(seconds * rate))
    soundfile.write(path, noise, rate, **options)


def test_librispeech(tmp_path):
    chapter = tmp_path / "LibriSpeech/dev-clean/84/121123"
    for i, seconds in enumerate((1.0, 31.0)):
        save_noise(chapter / f"84-121123-000{i}.flac", seconds, 16_000)
    (chapter / "84-121123.trans.txt").write_text("84-121123-0000 GO DO YOU HEAR\n84-121123-0001 BUT IN LESS\n")
    done = run_here("data.py", "librispeech", "--root", tmp_path, "--split", "dev-clean", "--out", tmp_path / "out",
                      cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept, skipped = lines(tmp_path / "out/samples.jsonl"), lines(tmp_path / "out/skipped.jsonl")
    assert kept == [{"id": "84-121123-0000", "audio": "audio/84-121123-0000.flac", "answer": "go do you hear"}]
    assert skipped[0]["id"] == "84-121123-0001" and "30 s" in skipped[0]["skipped"]
    missing = run_here("data.py", "librispeech", "--root", tmp_path, "--split", "no-such", "--out", tmp_path / "b",
                         cwd=tmp_path)
    assert missing.returncode == 1 and missing.stderr.count("\n") == 1 and "no-such" in missing.stderr


def test_commonvoice_and_manifests(tmp_path):
    save_noise(tmp_path / "clips/common_voice_en_1.mp3", 1.0, 48_000)
    (tmp_path / "validated.tsv").write_text(
        'client_id\tpath\tsentence\tup_votes\nabc\tcommon_voice_en_1.mp3\tHe said "no".\t2\nabc\tgone.mp3\tGone.\t2\n')
    done = run_here("data.py", "commonvoice", "--tsv", tmp_path / "validated.tsv", "--clips", tmp_path / "clips",
                      "--out", tmp_path / "cv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "cv/samples.jsonl") == [
        {"id": "common_voice_en_1", "audio": "audio/common_voice_en_1.flac", "answer": 'He said "no".'}]
    assert "gone.mp3" in lines(tmp_path / "cv/skipped.jsonl")[0]["skipped"]
    wave = data.load_audio(tmp_path / "cv/audio/common_voice_en_1.flac")
    assert len(wave) == pytest.approx(16_000, rel=0.1)  # MP3 pads

    save_noise(tmp_path / "a.wav", 0.5, 8_000)
    (tmp_path / "cuts.jsonl").write_text('{"id": "x/1", "audio": "a.wav", "text": "Ünïcode"}\n{"audio": "a.wav"}\n')
    bad = run_here("data.py", "manifest", "--manifest", tmp_path / "cuts.jsonl", "--root", tmp_path, "--out",
                     tmp_path / "m", cwd=tmp_path)
    assert bad.returncode == 1 and "cuts.jsonl:2: has no text" in bad.stderr and bad.stderr.count("\n") == 1
    (tmp_path / "cuts.jsonl").write_text('{"id": "x/1", "audio": "a.wav", "text": "Ünïcode"}\n'
                                         '{"audio": "a.wav", "text": "part", "start": 0.125, "seconds": 0.25}\n')
    good = run_here("data.py", "manifest", "--manifest", tmp_path / "cuts.jsonl", "--root", tmp_path, "--out",
                      tmp_path / "m", cwd=tmp_path)
    assert good.returncode == 0 and lines(tmp_path / "m/samples.jsonl")[0] == {
        "id": "x_1", "audio": "audio/x_1.flac", "answer": "Ünïcode"}
    whole, part = (data.load_audio(tmp_path / f"m/audio/{name}.flac") for name in ("x_1", "00000001"))
    assert len(whole) == 8000 and len(part) == 4000
    assert np.corrcoef(whole[2200:5800], part[200:3800])[0, 1] > 0.99


@pytest.mark.parametrize("said, kept", [
    ("<image>\nIs it red?\nAnswer the question using a single word or phrase.", "Is it red?"),
    ("Which one?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly.\n<image>",
     "Which one? A. cat B. dog"),
    ("Provide a one-sentence caption.\nReference OCR token: STOP, 5", "Provide a one-sentence caption."),
    ("Can you answer the question using a single word?", "Can you answer the question using a single word?"),
])
def test_what_nobody_would_say_aloud_is_left_out(said, kept):
    assert sources.cleaned(said) == kept


def test_prepared_folders_merge_into_one(world, tmp_path):
    one, two = world / "audio-text", world / "vision-audio"
    done = run_here("data.py", "merge", one, two, "--out", tmp_path / "all", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    samples = data.Samples(tmp_path / "all", {"max_tiles": 1, "image_size": 64}, ("audio",))
    parts = [data.Samples(folder, samples.settings, ("audio",)) for folder in (one, two)]
    assert len(samples) == len(parts[0]) + len(parts[1]) and len({row["id"] for row in samples.rows}) == len(samples)
    assert (samples[0]["wave"] == parts[0][0]["wave"]).all() and (samples[-1]["pixels"] == parts[1][-1]["pixels"]).all()
    again = run_here("data.py", "merge", one, one, "--out", tmp_path / "b", cwd=tmp_path)
    assert again.returncode == 1 and "one name" in again.stderr
