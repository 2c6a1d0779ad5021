"""Public formats brought to ours: hand-made inputs in the exact layouts, interrupted and not."""

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
from plumbing.files import write_json_lines
from real import corpora

DIALOGUES = [
    {"id": "1", "image": "coco/a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?\n"
                                   "Answer the question using a single word or phrase."},
        {"from": "gpt", "value": "Cat"},
        {"from": "human", "value": "And now?"}, {"from": "gpt", "value": "Red"}]},
    {"id": "2", "image": "coco/a.png", "conversations": [
        {"from": "human", "value": "How warm is the café, 30 °C?\n<image>"},
        {"from": "gpt", "value": "Très warm."}]},
    {"id": "3", "conversations": [
        {"from": "human", "value": "Tell me a joke"}, {"from": "gpt", "value": "No."}]},
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
    """Writes annotations, eleven rows good and bad, forty plain; returns the command."""
    (tmp_path / "pictures/coco").mkdir(parents=True)
    Image.new("P", (40, 30), 3).save(tmp_path / "pictures/coco/a.png")
    (tmp_path / "pictures/coco/broken.png").write_bytes(b"\x89PNG")
    plain = [{"id": "x", "image": "coco/a.png", "conversations": [
        {"from": "human", "value": f"<image>\nHow many things are there in picture {i}?"},
        {"from": "gpt", "value": str(i)}]} for i in range(40)]
    (tmp_path / "mix.json").write_text(json.dumps(DIALOGUES + plain))
    return ["data.py", "llava", "--annotations", tmp_path / "mix.json",
            "--images", tmp_path / "pictures"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def test_llava_rows_are_taken_cleaned_or_left_out_with_a_reason(llava, tmp_path):
    done = run_here(*llava, "--tts", "espeak", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept, skipped = lines(tmp_path / "out/samples.jsonl"), lines(tmp_path / "out/skipped.jsonl")
    assert len(kept) == 42 and kept[0]["question"] == "What is this?" and kept[0]["answer"] == "Cat"
    assert kept[1]["question"] == "How warm is the café, 30 °C?"
    assert kept[1]["answer"] == "Très warm."
    reasons = {row["id"]: row["skipped"] for row in skipped}
    for row, reason in {2: "no picture", 3: "picture is missing", 4: "more than 400",
                        5: "picture is broken", 6: "coordinates", 7: "several pictures",
                        8: "is empty", 9: "not a dialogue", 10: "picture is missing"}.items():
        assert reason in reasons.pop(f"{row:06}"), row
    assert not reasons and "1  the question has coordinates" in done.stdout
    samples = data.Samples(tmp_path / "out", {"max_tiles": 1, "image_size": 64})
    assert all(len(samples[i]["wave"]) > 8000 for i in range(len(samples)))


def test_a_draw_is_seeded_and_other_arguments_are_refused(llava, tmp_path):
    for seed in (0, 1):
        out = tmp_path / str(seed)
        done = run_here(*llava, "--tts", "espeak", "--n", 5, "--seed", seed, "--out", out,
                        cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        drawn = [*lines(out / "samples.jsonl"), *lines(out / "skipped.jsonl")]
        assert len(drawn) == 5 + 8, "eight rows cannot be used, five of the others are drawn"
    assert lines(tmp_path / "0/samples.jsonl") != lines(tmp_path / "1/samples.jsonl")
    done = run_here(*llava, "--tts", "espeak", "--n", 6, "--out", tmp_path / "0", cwd=tmp_path)
    assert done.returncode == 1 and "settings.json" in done.stderr
    assert done.stderr.count("\n") == 1


def build_vits(folder):
    """A tiny VITS with random weights, speaking at 8 kHz, and its letters."""
    torch.manual_seed(0)
    config = VitsConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
        flow_size=16, spectrogram_bins=9, prior_encoder_num_flows=1,
        prior_encoder_num_wavenet_layers=1, posterior_encoder_num_wavenet_layers=1,
        duration_predictor_num_flows=1, duration_predictor_filter_channels=16,
        depth_separable_num_layers=1, upsample_initial_channel=16, upsample_rates=[8, 8],
        upsample_kernel_sizes=[16, 16], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]],
        sampling_rate=8000)
    VitsModel(config).save_pretrained(folder)
    letters = {c: i for i, c in enumerate("-abcdefghijklmnopqrstuvwxyz '")}
    (folder / "vocab.json").write_text(json.dumps({**letters, "<unk>": len(letters)}))
    tokenizer = VitsTokenizer(folder / "vocab.json", pad_token="-", is_uroman=False,
                              phonemize=False)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tts", ["espeak", "mms"])
def test_what_was_interrupted_goes_on_and_leaves_the_same_bytes(llava, tmp_path, tts):
    command = [*llava, "--tts", tts, "--voice", build_vits(tmp_path / "voice")]
    whole = run_here(*command, "--out", tmp_path / "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    out, arguments = tmp_path / "cut", [str(a) for a in command[1:]]
    process = subprocess.Popen([sys.executable, ROOT / "data.py", *arguments, "--out", out],
                               cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
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
    (chapter / "84-121123.trans.txt").write_text(
        "84-121123-0000 GO DO YOU HEAR\n84-121123-0001 BUT IN LESS\n")
    command = ("data.py", "librispeech", "--root", tmp_path)
    done = run_here(*command, "--split", "dev-clean", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept, skipped = lines(tmp_path / "out/samples.jsonl"), lines(tmp_path / "out/skipped.jsonl")
    assert kept == [{"id": "84-121123-0000", "audio": "audio/84-121123-0000.flac",
                     "answer": "go do you hear"}]
    assert skipped[0]["id"] == "84-121123-0001" and "31.0 s" in skipped[0]["skipped"]
    missing = run_here(*command, "--split", "no-such", "--out", tmp_path / "b", cwd=tmp_path)
    assert missing.returncode == 1 and missing.stderr.count("\n") == 1
    assert "no-such" in missing.stderr


def test_commonvoice(tmp_path):
    save_noise(tmp_path / "clips/common_voice_en_1.mp3", 1.0, 48_000)
    (tmp_path / "validated.tsv").write_text(
        "client_id\tpath\tsentence\tup_votes\n"
        'abc\tcommon_voice_en_1.mp3\tHe said "no".\t2\n'
        "abc\tgone.mp3\tGone.\t2\n")
    done = run_here("data.py", "commonvoice", "--tsv", tmp_path / "validated.tsv",
                    "--clips", tmp_path / "clips", "--out", tmp_path / "cv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "cv/samples.jsonl") == [
        {"id": "common_voice_en_1", "audio": "audio/common_voice_en_1.flac",
         "answer": 'He said "no".'}]
    assert "gone.mp3" in lines(tmp_path / "cv/skipped.jsonl")[0]["skipped"]
    wave = data.load_audio(tmp_path / "cv/audio/common_voice_en_1.flac")
    assert len(wave) == pytest.approx(16_000, rel=0.1)  # MP3 pads


def test_manifests(tmp_path):
    save_noise(tmp_path / "a.wav", 0.5, 8_000)
    good = {"id": "x/1", "audio": "a.wav", "text": "Ünïcode"}
    part = {"audio": "a.wav", "text": "part", "start": 0.125, "seconds": 0.25}
    command = ("data.py", "manifest", "--manifest", tmp_path / "cuts.jsonl", "--root", tmp_path,
               "--out", tmp_path / "m")
    write_json_lines(tmp_path / "cuts.jsonl", [good, {"audio": "a.wav"}])
    bad = run_here(*command, cwd=tmp_path)
    assert bad.returncode == 1 and bad.stderr.count("\n") == 1
    assert "cuts.jsonl:2:" in bad.stderr and "text" in bad.stderr
    write_json_lines(tmp_path / "cuts.jsonl", [good, good])
    twice = run_here(*command, cwd=tmp_path)
    assert twice.returncode == 1 and twice.stderr.count("\n") == 1 and "x_1" in twice.stderr

    write_json_lines(tmp_path / "cuts.jsonl", [good, part])
    done = run_here(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "m/samples.jsonl")[0] == {
        "id": "x_1", "audio": "audio/x_1.flac", "answer": "Ünïcode"}
    whole = data.load_audio(tmp_path / "m/audio/x_1.flac")
    part = data.load_audio(tmp_path / "m/audio/00000001.flac")
    assert len(whole) == 8000 and len(part) == 4000
    assert np.corrcoef(whole[2200:5800], part[200:3800])[0, 1] > 0.99


@pytest.mark.parametrize("question, spoken", [
    ("<image>\nIs it red?\nAnswer the question using a single word or phrase.", "Is it red?"),
    ("Which one?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
     "\n<image>", "Which one? A. cat B. dog"),
    ("Provide a one-sentence caption.\nReference OCR token: STOP, 5",
     "Provide a one-sentence caption."),
    ("Can you answer the question using a single word?",
     "Can you answer the question using a single word?"),
])
def test_what_nobody_would_say_aloud_is_left_out(question, spoken):
    assert corpora.clean_question(question) == spoken


def test_several_prepared_folders_are_one_dataset(world):
    """Pictures and recordings are read from where they lie, also if both folders use one id."""
    folders = [world / "audio-text", world / "vision-audio"]
    settings = {"max_tiles": 1, "image_size": 64}
    both = data.Samples(folders, settings, ("audio",))
    one, two = (data.Samples(folder, settings, ("audio",)) for folder in folders)
    assert len(both) == len(one) + len(two)
    assert one.rows[0]["audio"] == two.rows[0]["audio"], "the same name, or nothing is tested"
    for i, sample in ((0, one[0]), (len(one) - 1, one[-1]), (len(one), two[0]), (-1, two[-1])):
        assert (both[i]["wave"] == sample["wave"]).all() and both[i]["where"] == sample["where"]
    assert (both[-1]["pixels"] == two[-1]["pixels"]).all() and "pixels" not in both[0]
    assert [both.length(len(one) + i) for i in range(5)] == [two.length(i) for i in range(5)]
    prints = {samples.fingerprint() for samples in (both, one, two)}
    assert len(prints) == 3 and both.fingerprint() in prints


def test_a_stage_trains_on_several_folders(world, start, tmp_path):
    out, folders = tmp_path / "out", [world / "audio-text", world / "vision-audio"]
    done = run_here("train.py", "--stage", "audio-text", "--init", start / "audio", "--out", out,
                    "--data", *folders, "--max-steps", 1, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads((out / "ollm.json").read_text())["training"]
    assert config["data"] == [str(folder) for folder in folders]
    assert f"{40 + 100} samples" in done.stdout
