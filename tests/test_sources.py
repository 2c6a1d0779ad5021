"""Public formats brought to ours: hand-made inputs in the exact layouts, interrupted and not."""

import gzip
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, contents, read_lines, run_here
from PIL import Image
from transformers import VitsConfig, VitsModel, VitsTokenizer

import data
from plumbing import prepared
from plumbing.files import BadInput, write_json_lines
from plumbing.media import VOICES, speak
from real import corpora, speech

SHORT = "Answer the question using a single word or phrase."
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


def test_llava_rows_are_taken_cleaned_or_left_out_with_a_reason(llava, tmp_path):
    done = run_here(*llava, "--tts", "espeak", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = read_lines(tmp_path / "out/samples.jsonl")
    skipped = read_lines(tmp_path / "out/skipped.jsonl")
    assert len(kept) == 42 and kept[0]["answer"] == "Cat"
    assert kept[0]["question"] == f"What is this?\n{SHORT}" and "after" not in kept[0]
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
        drawn = [*read_lines(out / "samples.jsonl"), *read_lines(out / "skipped.jsonl")]
        assert len(drawn) == 5 + 8, "eight rows cannot be used, five of the others are drawn"
    assert read_lines(tmp_path / "0/samples.jsonl") != read_lines(tmp_path / "1/samples.jsonl")
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
    assert len(read_lines(out / "samples.jsonl")) == (42 if tts == "espeak" else 41), "no MMS for °"


@pytest.mark.parametrize("source", ["llava", "manifest", "commonvoice"])
def test_a_list_that_changed_is_refused_where_another_was_begun(llava, tmp_path, source):
    """Files are kept by row number: a shorter list had the recordings of other rows."""
    for i, seconds in enumerate((0.5, 1.0, 1.5)):
        save_noise(tmp_path / f"{i}.wav", seconds, 16_000)
    rows = [{"audio": f"{i}.wav", "text": f"clip {letter}"} for i, letter in enumerate("abc")]
    write_json_lines(tmp_path / "cuts.jsonl", rows)
    (tmp_path / "cv.tsv").write_text("path\tsentence\n0.wav\ta\n1.wav\tb\n")
    path, command = {
        "llava": (tmp_path / "mix.json", [*llava, "--tts", "espeak"]),
        "manifest": (tmp_path / "cuts.jsonl", ["data.py", "manifest", "--manifest",
                                               tmp_path / "cuts.jsonl", "--root", tmp_path]),
        "commonvoice": (tmp_path / "cv.tsv", ["data.py", "commonvoice", "--tsv",
                                              tmp_path / "cv.tsv", "--clips", tmp_path]),
    }[source]
    out = tmp_path / "out"
    assert run_here(*command, "--out", out, cwd=tmp_path).returncode == 0
    (out / "samples.jsonl").unlink()  # interrupted
    before = contents(out)

    text = path.read_text()
    if source == "llava":
        path.write_text(json.dumps(json.loads(text)[1:]))
    else:
        path.write_text(text.replace(text.splitlines(True)[1], ""))
    again = run_here(*command, "--out", out, cwd=tmp_path)
    assert again.returncode == 1 and again.stderr.count("\n") == 1
    assert "settings.json" in again.stderr and "sha256" in again.stderr
    assert "choose another --out" in again.stderr and contents(out) == before
    path.write_text(text)
    assert run_here(*command, "--out", out, cwd=tmp_path).returncode == 0, "the old list goes on"


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
    kept = read_lines(tmp_path / "out/samples.jsonl")
    skipped = read_lines(tmp_path / "out/skipped.jsonl")
    assert kept == [{"id": "84-121123-0000", "audio": "audio/84-121123-0000.flac",
                     "answer": "go do you hear"}]
    assert skipped[0]["id"] == "84-121123-0001" and "31.0 s" in skipped[0]["skipped"]
    missing = run_here(*command, "--split", "no-such", "--out", tmp_path / "b", cwd=tmp_path)
    assert missing.returncode == 1 and missing.stderr.count("\n") == 1
    assert "no-such" in missing.stderr


def pack_librispeech(folder, *splits, utterances=200):
    """Writes each split's archive as it is published, of so many utterances of 0.2 s."""
    sound = io.BytesIO()
    soundfile.write(sound, np.random.default_rng(0).normal(0, 0.1, 3200), 16_000, format="FLAC")
    for split in splits:
        with tarfile.open(folder / f"{split}.tar.gz", "w:gz") as archive:
            files = {"README.TXT": b"LibriSpeech"}
            for chapter in range(10):
                names = [f"84-{chapter}-{i:04}" for i in range(utterances // 10)]
                files |= {f"{split}/84/{chapter}/{name}.flac": sound.getvalue() for name in names}
                files[f"{split}/84/{chapter}/84-{chapter}.trans.txt"] = "".join(
                    f"{name} {split.upper()}\n" for name in names).encode()
            for name, content in files.items():
                member = tarfile.TarInfo(f"LibriSpeech/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def unpacking(root, split, out):
    """Starts `data.py librispeech` in a process group of its own."""
    return subprocess.Popen([sys.executable, ROOT / "data.py", "librispeech", "--root", root,
                             "--split", split, "--out", out], start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_librispeech_killed_while_it_is_unpacked_is_unpacked_anew(tmp_path):
    """What there was of it counted as all: "16 samples" of 200, and "there already" for ever."""
    pack_librispeech(tmp_path, "dev-clean", utterances=2000)
    process = unpacking(tmp_path, "dev-clean", tmp_path / "out")
    while process.poll() is None and not list(tmp_path.rglob("*.flac")):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "LibriSpeech/dev-clean").exists() and list(tmp_path.rglob("*.flac"))
    done = run_here("data.py", "librispeech", "--root", tmp_path, "--split", "dev-clean",
                    "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0 and "2000 samples; 0 left out" in done.stdout, done.stderr
    assert len(list((tmp_path / "LibriSpeech").rglob("*.flac"))) == 2000, "nothing half is left"
    assert (tmp_path / "dev-clean.tar.gz").exists()


def test_processes_that_unpack_librispeech_at_once(tmp_path):
    """Two splits on one --root, and one split twice."""
    pack_librispeech(tmp_path, "dev-clean", "dev-other")
    processes = [unpacking(tmp_path, split, tmp_path / out) for split, out in
                 (("dev-clean", "a"), ("dev-other", "b"), ("dev-clean", "c"))]
    assert [process.wait(timeout=100) for process in processes] == [0, 0, 0]
    for out, text in (("a", "dev clean"), ("b", "dev other"), ("c", "dev clean")):
        lines = read_lines(tmp_path / out / "samples.jsonl")
        assert len(lines) == 200 and {line["answer"] for line in lines} == {text}


def test_an_archive_that_is_cut_off_leaves_no_folder(tmp_path):
    pack_librispeech(tmp_path, "dev-clean")
    archive = tmp_path / "dev-clean.tar.gz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    command = ("data.py", "librispeech", "--root", tmp_path, "--split", "dev-clean", "--out", "out")
    done = run_here(*command, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "LibriSpeech/dev-clean").exists()
    archive.write_bytes(whole)
    done = run_here(*command, cwd=tmp_path)
    assert done.returncode == 0 and "200 samples; 0 left out" in done.stdout, done.stderr


def test_what_lacks_in_librispeech_is_said(tmp_path):
    """Recordings that somebody else's unpacking did not reach are counted; a chapter is refused."""
    pack_librispeech(tmp_path, "dev-clean")
    shutil.unpack_archive(tmp_path / "dev-clean.tar.gz", tmp_path, filter="data")
    (tmp_path / "LibriSpeech/dev-clean/84/3/84-3-0007.flac").unlink()
    command = ("data.py", "librispeech", "--root", tmp_path, "--split", "dev-clean", "--out")
    done = run_here(*command, "a", cwd=tmp_path)
    assert done.returncode == 0 and "199 samples; 1 left out" in done.stdout, done.stderr
    (tmp_path / "LibriSpeech/dev-clean/84/3/84-3.trans.txt").unlink()
    done = run_here(*command, "b", cwd=tmp_path)
    assert done.returncode == 1 and "84-3.trans.txt" in done.stderr, done.stdout


def test_librispeech_is_linked_and_not_written_again(tmp_path):
    """It was decoded and encoded: twice the disk space, and an hour."""
    chapter = tmp_path / "LibriSpeech/dev-clean/84/1"
    for i, kind in enumerate(((16_000, "PCM_16"), (8_000, "PCM_16"), (16_000, "PCM_24"),
                              (16_000, "PCM_16"))):
        save_noise(chapter / f"84-1-{i}.flac", 1, kind[0], subtype=kind[1])
    (chapter / "84-1-3.flac").rename(tmp_path / "elsewhere.flac")
    (chapter / "84-1-3.flac").symlink_to("../../../../elsewhere.flac")
    (chapter / "84-1.trans.txt").write_text("".join(f"84-1-{i} GO\n" for i in range(4)))
    done = run_here("data.py", "librispeech", "--root", tmp_path, "--split", "dev-clean", "--out",
                    tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0 and "4 samples" in done.stdout, done.stderr
    ours = [tmp_path / f"out/audio/84-1-{i}.flac" for i in range(4)]
    same = [path.samefile(chapter / path.name) for path in ours]
    assert same == [True, False, False, True] and not any(map(os.path.islink, ours))
    shutil.rmtree(tmp_path / "LibriSpeech")
    (tmp_path / "elsewhere.flac").unlink()
    assert [len(data.load_audio(path)) for path in ours] == 4 * [16_000]


@pytest.mark.parametrize("is_linkable", [True, False])
def test_pictures_that_are_relative_links_come_as_files(llava, tmp_path, monkeypatch, is_linkable):
    """The hub's cache, DVC and git-annex have such: the link was linked, and led nowhere."""
    def refuse(*_):
        raise OSError("another disk")

    picture = tmp_path / "pictures/coco/a.png"
    (tmp_path / "blobs").mkdir()
    picture.rename(tmp_path / "blobs/0")
    picture.symlink_to("../../blobs/0")
    if not is_linkable:
        monkeypatch.setattr(os, "link", refuse)
    done = run_here(*llava, "--tts", "espeak", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0 and "42 samples" in done.stdout, done.stderr
    paths = list((tmp_path / "out/images").iterdir())
    assert len(paths) == 42 and not any(map(os.path.islink, paths))
    assert {path.samefile(tmp_path / "blobs/0") for path in paths} == {is_linkable}
    shutil.rmtree(tmp_path / "blobs")
    checked = run_here("data.py", "check", tmp_path / "out", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout


def test_commonvoice(tmp_path):
    save_noise(tmp_path / "clips/common_voice_en_1.mp3", 1.0, 48_000)
    (tmp_path / "validated.tsv").write_text(
        "client_id\tpath\tsentence\tup_votes\n"
        'abc\tcommon_voice_en_1.mp3\t"He said ""no""."\t2\n'
        "abc\tgone.mp3\tGone.\t2\n")
    done = run_here("data.py", "commonvoice", "--tsv", tmp_path / "validated.tsv",
                    "--clips", tmp_path / "clips", "--out", tmp_path / "cv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_lines(tmp_path / "cv/samples.jsonl") == [
        {"id": "common_voice_en_1", "audio": "audio/common_voice_en_1.flac",
         "answer": "he said no"}]
    assert "gone.mp3" in read_lines(tmp_path / "cv/skipped.jsonl")[0]["skipped"]
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

    music = [{"audio": "a.wav", "text": text} for text in ("<MUSIC>", "<NOISE>")]
    write_json_lines(tmp_path / "cuts.jsonl", [good, part, *music])
    done = run_here(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2  the transcript has a tag" in done.stdout
    assert read_lines(tmp_path / "m/samples.jsonl")[0] == {
        "id": "x_1", "audio": "audio/x_1.flac", "answer": "ünïcode"}
    whole = data.load_audio(tmp_path / "m/audio/x_1.flac")
    part = data.load_audio(tmp_path / "m/audio/00000001.flac")
    assert len(whole) == 8000 and len(part) == 4000
    assert np.corrcoef(whole[2200:5800], part[200:3800])[0, 1] > 0.99


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_hides_no_column(tmp_path, mark):
    """The first column, start, was called "\ufeffstart": every clip began at second 0."""
    wave = np.random.default_rng(0).normal(0, 0.1, 32_000)
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    table = f"{mark}start\taudio\ttext\tseconds\n1.25\ta.wav\tred\t0.5\n"
    (tmp_path / "a.tsv").write_text(table, encoding="utf-8")
    done = run_here("data.py", "manifest", "--manifest", "a.tsv", "--root", ".", "--out", "out",
                    cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    clip = data.load_audio(tmp_path / "out/audio/00000000.flac")
    np.testing.assert_allclose(clip, wave[20_000:28_000], atol=1e-4)


def test_a_byte_order_mark_in_json(llava, tmp_path):
    path = tmp_path / "mix.json"
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    done = run_here(*llava, "--tts", "espeak", "--n", 3, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0 and "2 samples; 9" in done.stdout, done.stderr


@pytest.mark.parametrize("command", ["commonvoice", "manifest"])
@pytest.mark.parametrize("last", ["0.wav\n", "0.wav", "0.wav\tgo\t2\t3\n"])
def test_a_row_that_is_cut_short_is_one_line_with_its_number(tmp_path, command, last):
    """61 lines of traceback. Blank lines count, too."""
    arguments, header = {
        "commonvoice": (("--tsv", "x.tsv", "--clips", "."), "path\tsentence\tup_votes"),
        "manifest": (("--manifest", "x.tsv", "--root", "."), "audio\ttext\tid")}[command]
    (tmp_path / "x.tsv").write_text(f"{header}\n0.wav\tgo\t2\n\n{last}")
    done = run_here("data.py", command, *arguments, "--out", "out", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: x.tsv:4: ") and "cells" in done.stderr


def manifest(folder, rows, header=None):
    """Runs `data.py manifest` on rows, as .jsonl, or as a .tsv with the header's columns."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    name = "x.tsv" if header else "x.jsonl"
    if header:
        lines = [header, *(["" if row.get(key) is None else str(row[key]) for key in header]
                           for row in rows)]
        (folder / name).write_text("".join("\t".join(line) + "\n" for line in lines))
    else:
        write_json_lines(folder / name, rows)
    return run_here("data.py", "manifest", "--manifest", name, "--root", ".", "--out", "out",
                    cwd=folder)


@pytest.fixture
def ten_seconds(tmp_path):
    """A recording, x.wav, of ten seconds of noise; returns it."""
    wave = np.random.default_rng(0).normal(0, 0.1, 160_000)
    soundfile.write(tmp_path / "x.wav", wave, 16_000, subtype="FLOAT")
    return wave


@pytest.mark.parametrize("form", ["jsonl", "tsv"])
@pytest.mark.parametrize("row, start, seconds", [
    ({"audio": "x.wav", "text": "go"}, 0, 10),
    ({"audio": "x.wav", "text": "go", "start": 2, "end": 3.5}, 2, 1.5),
    ({"audio": "x.wav", "text": "go", "end": 1.5}, 0, 1.5),
    ({"audio": "x.wav", "text": "go", "duration": 1.5}, 0, 1.5),
    ({"audio_filepath": "x.wav", "text": "go", "offset": 2, "duration": 1.5, "lang": "en"}, 2, 1.5),
    ({"path": "x.wav", "sentence": "go", "gender": "f", "sentiment": 3, "up_votes": 2}, 0, 10),
    ({"file_name": "x.wav", "transcription": "go", "sampling_rate": 16_000}, 0, 10),
    ({" Audio": "x.wav", "TEXT": "go", "Start": 4, "Seconds ": 2, "speaker": "end"}, 4, 2),
    ({"audio": "x.wav", "text": "go", "start": 2, "end": 3.54, "duration": 1.5}, 2, 1.5),
    ({"audio": "x.wav", "text": "go", "seconds": 2, "duration": None, "channel": None}, 0, 2)])
def test_a_column_that_means_something_is_taken(tmp_path, ten_seconds, row, start, seconds, form):
    """Under another name than ours it was ignored: 1.5 s of words had 18 s of sound."""
    done = manifest(tmp_path, [row], list(row) if form == "tsv" else None)
    assert done.returncode == 0, done.stderr
    line, = read_lines(tmp_path / "out/samples.jsonl")
    assert line["answer"] == "go"
    np.testing.assert_allclose(data.load_audio(tmp_path / "out" / line["audio"]), atol=1e-4,
                               desired=ten_seconds[16_000 * start:][: int(16_000 * seconds)])


@pytest.mark.parametrize("more, named", [
    *(({column: 1}, column) for column in (
        "channel", "channels", "start_ms", "end_sample", "stop_ms", "num_frames", "frame_offset",
        "dur", "length", "time", "timestamp", "secs", "from", "to", "segment", "speed",
        "num_samples", "StartTime", "audioStart", "t_begin", "clip_end", "len_ms")),
    ({"seconds": 1, "duration": 2}, "duration"), ({"sentence": "yes"}, "sentence"),
    ({"path": "y.wav"}, "path"), ({"start": 1, "offset": 1}, "offset"),
    ({"start": 1, "end": 3, "seconds": 1}, "agree"), ({"start": "a"}, "'a'"),
    ({"start": True}, "True"), ({"end": "1:30"}, "1:30"), ({"seconds": [1]}, "[1]")])
def test_a_column_that_may_mean_something_is_never_ignored(tmp_path, ten_seconds, more, named):
    done = manifest(tmp_path, [{"audio": "x.wav", "text": "go"},
                               {"audio": "x.wav", "text": "go", **more}])
    assert done.returncode == 1 and done.stderr.startswith("error: x.jsonl:2: "), done.stdout
    assert named in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out/samples.jsonl").exists()


@pytest.mark.parametrize("one, other", [
    ("a", "a"), ("a/b", "a_b"), ("Abc", "aBC"), ("stra\u00dfe", "STRASSE"),
    ("caf\u00e9", "cafe\u0301"), ("00000001", None), (7, "7")])
def test_two_ids_of_one_file_are_refused(tmp_path, ten_seconds, one, other):
    """On a disk that does not tell case apart, "a" would have had the recording of "A"."""
    rows = [{"id": one, "audio": "x.wav", "text": "go"}, {"audio": "x.wav", "text": "no"}]
    rows[1] |= {"id": other} if other else {}
    done = manifest(tmp_path, rows)
    assert done.returncode == 1 and "two ids name one file" in done.stderr, done.stdout
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out/samples.jsonl").exists()
    done = manifest(tmp_path, [rows[0], {**rows[1], "id": "b"}])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("header", [None, ["audio", "text"]])
@pytest.mark.parametrize("text", ["", None, "  ", "[noise]"])
def test_a_row_without_words_is_left_out(tmp_path, ten_seconds, text, header):
    done = manifest(tmp_path, [{"audio": "x.wav", "text": text}, {"audio": "x.wav", "text": "go"}],
                    header)
    assert done.returncode == 0 and "1 samples; 1 left out" in done.stdout, done.stderr
    assert "the transcript" in read_lines(tmp_path / "out/skipped.jsonl")[0]["skipped"]


def test_an_id_of_zero_is_an_id(tmp_path, ten_seconds):
    done = manifest(tmp_path, [{"id": n, "audio": "x.wav", "text": "go"} for n in (1, 0)])
    assert done.returncode == 0, done.stderr
    assert [line["id"] for line in read_lines(tmp_path / "out/samples.jsonl")] == ["1", "0"]


def cut(name, start=2.0, seconds=3.0, source="x.wav", **options):
    """A cut as Lhotse 1.33 writes it, its one supervision as long as itself."""
    words = {"id": name, "recording_id": "x", "start": 0.0, "duration": seconds, "channel": 0,
             "text": f"THIS IS <COMMA> {name[0]}"}
    recording = {"id": "x", "sources": [{"type": "file", "channels": [0], "source": source}],
                 "sampling_rate": 16_000, "num_samples": 160_000, "duration": 10.0,
                 "channel_ids": [0]}
    return {"id": name, "start": start, "duration": seconds, "channel": 0, "type": "MonoCut",
            "supervisions": [{**words, **options.pop("words", {})}],
            "recording": {**recording, **options.pop("recording", {})}, **options}


SPEED = [{"name": "Speed", "kwargs": {"factor": 1.1}}]
BOTH = [{"type": "file", "channels": [0, 1], "source": "x.wav"}]
ONE_EACH = [{"type": "file", "channels": [i], "source": "x.wav"} for i in (0, 1)]
RUN = [{"type": "command", "channels": [0], "source": "touch run; cat x.wav"}]
ADDRESS = [{"type": "url", "channels": [0], "source": "http://localhost/x.wav"}]


@pytest.mark.parametrize("packed", [False, True])
def test_lhotse_s_cuts_are_read_as_they_are(tmp_path, ten_seconds, packed):
    """It was KeyError: 'audio', and the .gz was read as a TSV."""
    libriheavy = {"text": None, "custom": {"texts": ["He said: no.", "HE SAID NO"]}}
    wider = {"start": 0.5, "duration": 2.0}  # the cut holds a second that nobody has transcribed
    good = [cut("a"), cut("b/1", 7, 3), cut("c", words=libriheavy), cut("d", words=wider)]
    bad = [cut("e", recording={"transforms": SPEED}),
           {"id": "f", "type": "MixedCut", "tracks": [{"cut": cut("a"), "offset": 0.0}]},
           {"id": "g", "duration": 1.0, "sampling_rate": 16_000, "type": "PaddingCut"},
           cut("h", type="MultiCut", channel=[0, 1], recording={"sources": BOTH}),
           cut("i", channel=1, recording={"sources": BOTH}),
           cut("j", recording={"sources": ONE_EACH}), cut("k", recording={"sources": RUN}),
           cut("l", recording={"sources": ADDRESS}), cut("m", features={}) | {"recording": None},
           cut("n", supervisions=[]), cut("o", supervisions=2 * cut("o")["supervisions"])]
    bad = [(row, "the cut is transformed, or not of one file, one channel and one supervision")
           for row in bad]
    bad += [(cut("p", words={"text": None}), "is empty"), (cut("q", 8, 3), "it lasts 10.0 s"),
            (cut("r", source="no.wav"), "no.wav"), (cut("s", words={"text": "<MUSIC>"}), "a tag")]
    name = "cuts.jsonl" + ".gz" * packed
    text = "".join(json.dumps(row) + "\n" for row in [*good, *(row for row, _ in bad)])
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    done = run_here("data.py", "manifest", "--manifest", name, "--root", ".", "--out", "out",
                    cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = {line["id"]: line["answer"] for line in read_lines(tmp_path / "out/samples.jsonl")}
    assert kept == {"a": "this is a", "b_1": "this is b", "c": "he said no", "d": "this is d"}
    for row, start, seconds in (("a", 2, 3), ("b_1", 7, 3), ("c", 2, 3), ("d", 2.5, 2)):
        wave = data.load_audio(tmp_path / f"out/audio/{row}.flac")
        expected = ten_seconds[int(16_000 * start):][: 16_000 * seconds]
        np.testing.assert_allclose(wave, expected, atol=1e-4)
    skipped = {line["id"]: line["skipped"] for line in read_lines(tmp_path / "out/skipped.jsonl")}
    assert [*skipped] == [row["id"] for row, _ in bad] and not (tmp_path / "run").exists()
    for row, why in bad:
        assert why in skipped[row["id"]], (row["id"], skipped)


def converter(package):
    """Returns the code that docs/real-run.md shows for a package."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/real-run.md").read_text(), re.S)
    code, = [block for block in blocks if re.search(f"import .*{package}|from {package}", block)]
    return code


def check_converted(folder, wave):
    """Makes the prepared folder of what a converter has left, three times the same recording."""
    done = run_here("data.py", "manifest", "--manifest", "manifest.jsonl", "--root", ".", "--out",
                    "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = read_lines(folder / "out/samples.jsonl")
    assert [line["answer"] for line in lines] == ["word a", "word b", "word c"]
    for line in lines:
        np.testing.assert_allclose(data.load_audio(folder / "out" / line["audio"]), wave, atol=1e-4)


def test_hugging_face_s_datasets_become_a_manifest(tmp_path, ten_seconds, monkeypatch):
    """As the docs say. Some keep the recordings in their tables, others name a file."""
    datasets = pytest.importorskip("datasets")
    soundfile.write(tmp_path / "x.flac", ten_seconds, 16_000)
    sounds = [{"bytes": (tmp_path / "x.flac").read_bytes(), "path": "x.flac"}] * 2
    sounds.append({"bytes": None, "path": str(tmp_path / "x.flac")})
    rows = datasets.Dataset.from_dict({"audio": sounds, "raw_text": ["Word A", "word b", "word c"]})
    monkeypatch.setattr(datasets, "load_dataset",
                        lambda *names, split: rows.cast_column("audio", datasets.Audio()))
    monkeypatch.chdir(tmp_path)
    exec(converter("datasets"), {})
    check_converted(tmp_path, ten_seconds)


def test_webdataset_s_shards_become_a_manifest(tmp_path, ten_seconds, monkeypatch):
    pytest.importorskip("webdataset")
    soundfile.write(tmp_path / "x.flac", ten_seconds, 16_000)
    with tarfile.open(tmp_path / "shard-000.tar", "w") as shard:
        for letter in "abc":
            for suffix, content in (("flac", (tmp_path / "x.flac").read_bytes()),
                                    ("txt", f"Word {letter}.".encode())):
                member = tarfile.TarInfo(f"{letter}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    monkeypatch.chdir(tmp_path)
    exec(converter("webdataset").replace("{000..099}", "{000..000}"), {})
    check_converted(tmp_path, ten_seconds)


def test_a_packed_list_that_is_cut_off_is_one_line(tmp_path, ten_seconds):
    text = "".join(json.dumps(cut(f"c{i}")) + "\n" for i in range(500))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(text.encode())[:-40])
    done = run_here("data.py", "manifest", "--manifest", "x.jsonl.gz", "--root", ".", "--out",
                    "out", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "x.jsonl.gz" in done.stderr
    assert not (tmp_path / "out/samples.jsonl").exists()


LETTER = "Answer with the option's letter from the given choices directly."


@pytest.mark.parametrize("question, plain, suffix", [
    (f"<image>\nIs it red?\n{SHORT}", "Is it red?", SHORT),
    (f"Which one?\nA. cat\nB. dog\n{LETTER}\n<image>", "Which one? A. cat B. dog", LETTER),
    ("Provide a one-sentence caption.\nReference OCR token: STOP, 5",
     "Provide a one-sentence caption.", ""),
    (f"What?\nReference OCR token: a\n{SHORT}", "What?", SHORT),
    ("Can you answer the question using a single word?",
     "Can you answer the question using a single word?", ""),
])
def test_a_format_suffix_is_told_from_the_question(question, plain, suffix):
    assert corpora.split_suffix(question) == (plain, suffix)


def test_the_suffix_is_spoken_written_or_dropped(llava, tmp_path):
    """It was always dropped: the teacher was not told any more to answer in one word."""
    waves, first = {}, {}
    for suffix in ("spoken", "written", "dropped"):
        out = tmp_path / suffix
        done = run_here(*llava, "--tts", "espeak", "--suffix", suffix, "--out", out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads((out / "settings.json").read_text())["suffix"] == suffix
        samples = data.Samples(out, {"max_tiles": 1, "image_size": 64})
        waves[suffix], first[suffix] = samples[0]["wave"], samples.rows[0]
        assert "after" not in samples.rows[1] and "\n" not in samples.rows[1]["question"]
    assert first["dropped"]["question"] == "What is this?"
    assert first["spoken"]["question"] == first["written"]["question"] == f"What is this?\n{SHORT}"
    assert first["written"]["after"] == f"\n{SHORT}"
    assert "after" not in first["spoken"] and "after" not in first["dropped"]
    assert (waves["written"] == waves["dropped"]).all()
    assert len(waves["spoken"]) > len(waves["dropped"]) + data.SAMPLE_RATE


ASK_BOX = "Please provide the bounding box coordinate of the region this sentence describes: a cat."


@pytest.mark.parametrize("question, answer, usable", [
    (ASK_BOX, "[0.12, 0.3, 0.5, 0.77]", False),
    (ASK_BOX, "On the left.", False),
    ("Where is the cat?", "[0.12, 0.3, 0.5, 0.77]", False),
    ("Where is the cat?", "It is at <box>[[12, 40, 80, 200]]</box>.", False),
    ("Describe the region [0, 0.1, 0.3, 1].", "A cat.", False),
    ("Is her dress coordinated with the box?", "Yes, [as on page 12].", True),
])
def test_rows_about_coordinates_are_left_out(tmp_path, question, answer, usable):
    """Only coordinates in the question were looked for: an eighth of the rows answer with a box."""
    (tmp_path / "a.png").touch()
    row = {"image": "a.png", "conversations": [{"from": "human", "value": f"<image>\n{question}"},
                                               {"from": "gpt", "value": answer}]}
    if usable:
        assert corpora.llava_task(row, tmp_path)[0] == {"question": question, "answer": answer}
    else:
        with pytest.raises(BadInput, match="coordinates"):
            corpora.llava_task(row, tmp_path)


@pytest.mark.parametrize("text, spoken", [
    ("1,234,567", "one million two hundred and thirty four thousand five hundred and sixty seven"),
    ("3,4", "three four"), ("10,20,300", "ten twenty three hundred"), ("12:30", "twelve thirty"),
    ("12:05", "twelve zero five"), ("1990s", "nineteen nineties"), ("2000s", "two thousands"),
    ("$5", "five dollars"), ("$1,200.50", "one thousand two hundred point five zero dollars"),
    ("20%", "twenty percent"), ("0", "zero"), ("0.5", "zero point five"), ("-5", "minus five"),
    ("3.14159", "three point one four one five nine"), ("007", "zero zero seven"),
    ("Is bus 47 later than 12:30?", "Is bus forty seven later than twelve thirty"),
    ("Isn’t it\n“two,three”?", "Isn't it two three"),
    ("10 000", "ten thousand"), ("1 234", "one thousand two hundred and thirty four"),
    ("10\u00a0000", "ten thousand"), ("10\u202f000", "ten thousand"),
    ("in 2020 100", "in two thousand twenty one hundred"), ("10 20", "ten twenty"),
    ("Isn\u2018t it", "Isn't it"), ("isn\u02bct it", "isn't it"),
])
def test_numbers_are_words_before_mms_speaks(text, spoken):
    """MMS dropped digits; transformers' normaliser alone says 34 for 3,4 and nothing for 0."""
    assert speech.in_words(text) == spoken


@pytest.mark.parametrize("text", [
    "What is 7 + 9? Is bus 47 later than 12:30?", "x = y", "a < b", "R&B", "me@home", "9/11",
    "30 °", "café", "3D", "10th", "1.2.3", "7 - 9", "7-9", "1" * 40, "a_b", "???"])
def test_what_mms_cannot_say_is_refused(text):
    """It was spoken without what the voice does not know: "what is is bus later than"."""
    with pytest.raises(BadInput, match="the voice cannot say: "):
        speech.in_words(text)


@pytest.mark.parametrize("text, is_said", [
    ("What is near the café, 30 °C?", True), ("Is π ≈ 3.14?", False), ("Is π near 3.14?", True),
    ("Is it 10 000?", False), ("Is it 10,000 or 10 20?", True),
    ("Isn’t it — a “half”, ½…?", True), ("What is «naïve» in łódź?", True),
    ("这是什么？", False), ("What is 中?", False), ("これは何", False), ("Что это?", False),
    ("Is 3 < 4?", False), ("Is 3 > 4?", False), ("x^2", False), ("a_b", False), ("a|b", False),
    ("★ or ☆", False), ("♪", False), ("•", False), ("①", False), ("Ａ", False), ("7–9", False),
    ("It is 5 €, 3 × 4 = 12 & 7 % + #2 @ home/work ~ *a* \\ $5 £5 ¥5 §5 ±5 √5 5² ≤ ≥ ≠ ∞", True)])
def test_espeak_says_what_is_written_or_leaves_it_out(tmp_path, text, is_said):
    """Chinese was read as "chinese letter", whatever the letter; < and > were passed over."""
    task = "0", {"id": "0", "question": text}
    line = prepared.attempt(speech.speak_espeak, task, folder=tmp_path, seed=0, voices=VOICES)
    assert ("audio" in line) == is_said, line
    if not is_said:
        assert line["skipped"].startswith("the voice cannot say: ")


def test_espeak_says_another_sound_for_each_sign_that_it_is_given():
    """What is left in the questions tells them apart."""
    spoken = {}
    for sign in "éèñßłøæàαβπΔ°±×÷√∞²³½¼€£¥¢§©®™≤≥≠→\\/~=+*#@&%$":
        wave = speak(f"what is {sign} near this")[0].tobytes()
        assert not speech.UNREAD.search(sign) and wave not in spoken, (sign, spoken.get(wave))
        spoken[wave] = sign
    silence = speak("what is near this")[0].tobytes()
    assert silence not in spoken and len(spoken) > 40
    passed_over = [sign for sign in "^_|†‡‰″•★✓♪─█①１" if speech.UNREAD.search(sign)
                   and speak(f"what is {sign} near this")[0].tobytes() == silence]
    assert len(passed_over) == 15


def test_mms_says_what_is_written_or_leaves_it_out(tmp_path):
    """The written question keeps its digits; the speech is that of the words."""
    voice, spoken = build_vits(tmp_path / "voice"), []
    for i, question in enumerate(("Bus 47?", "bus forty seven")):
        (tmp_path / str(i)).mkdir()
        rows = [{"id": "sum", "question": "7 + 9?", "audio": "sum.flac"},
                {"id": "bus", "question": question + "\nA word.", "audio": "bus.flac",
                 "after": "\nA word."}]
        left_out, line = speech.speak_mms(rows, tmp_path / str(i), 0, voice)
        assert left_out == {"id": "sum", "skipped": "the voice cannot say: +"} and line == rows[1]
        spoken.append((tmp_path / str(i) / "bus.flac").read_bytes())
    assert spoken[0] == spoken[1]


@pytest.mark.parametrize("text, transcript", [
    ("HELLO <COMMA> IT'S TWO <QUESTIONMARK>", "hello it's two"),
    ("YES <EXCLAMATIONPOINT> NO <PERIOD>", "yes no"), ('"He said ""no""."', "he said no"),
    ("“Don’t — stop,” she said: twenty-one…", "don't stop she said twenty one"),
    ("GO DO YOU HEAR", "go do you hear"),
    ("He said 'go away' and left", "he said go away and left"),
    ("'Go away!' she said", "go away she said"),
    ("\u2018Go\u2019 or \u2018don\u2019t go\u2019", "go or don't go"), ("don\u2018t", "don't"),
    ("don\u02bct", "don't"), ("don\uff07t", "don't"), ("'Tis the dogs", "'tis the dogs"),
    ("the dogs' tails", "the dogs' tails"), ("rock 'n' roll, o'clock", "rock n roll o'clock"),
])
def test_transcripts_of_all_corpora_have_one_style(text, transcript):
    """They went in as each corpus writes them, with GigaSpeech's tags as words."""
    assert corpora.plain_transcript(text) == transcript


@pytest.mark.parametrize("text, reason", [
    ("<MUSIC>", "has a tag"), ("<SIL>", "has a tag"), ("<NOISE>", "has a tag"),
    ("<OTHER>", "has a tag"), ("rhythm & blues", "has a sign"), ("3.5 miles", "has a sign"),
    (" <COMMA> ... ", "is empty"), ("[laughter] yes", "has a tag"), ("(laughs) yes", "has a tag"),
    ("yes {noise}", "has a tag"), ("*coughs* yes", "has a tag"), ("yes [laugh", "has a tag"),
    ("yes <unk", "has a tag"), ("\u266a la \u266a", "has a sign"), ("spoken_noise", "has a sign"),
    ("'...'", "is empty")])
def test_transcripts_of_no_words_or_of_signs_are_left_out(text, reason):
    with pytest.raises(BadInput, match=reason):
        corpora.plain_transcript(text)


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
    ours, theirs = both[-1]["pixels"], two[-1]["pixels"]
    assert (ours["pixel_values"] == theirs["pixel_values"]).all() and "pixels" not in both[0]
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


def test_a_run_tells_how_its_questions_were_spoken(world, start, tmp_path):
    """Evaluation could not know. Two suffixes are refused; folders without a word drop it."""
    folders = [tmp_path / "spoken", world / "vision-audio"]
    shutil.copytree(world / "vision-audio", folders[0])
    (folders[0] / "settings.json").write_text('{"suffix": "spoken", "tts": "mms", "voice": "v"}')
    command = ("train.py", "--init", start / "audio", "--max-steps", 1, "--device", "cpu", "--data")
    mixed = run_here(*command, *folders, "--out", tmp_path / "mixed", cwd=tmp_path)
    assert mixed.returncode == 1 and mixed.stderr.count("\n") == 1 and "--suffix" in mixed.stderr
    assert f"spoken in {folders[0]}, dropped in {folders[1]}" in mixed.stderr
    for folder, *told in zip(folders, ("spoken", "dropped"), ("mms", "espeak"), ("v", None)):
        out = tmp_path / f"run-{told[0]}"
        done = run_here(*command, folder, "--out", out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        settings = json.loads((out / "ollm.json").read_text())["settings"]
        assert [settings[key] for key in ("suffix", "tts", "voice")] == told
    done = run_here("eval.py", tmp_path / "run-spoken", "--data", world / "test", "--n", 4,
                    cwd=tmp_path)
    assert "is spoken by espeak; in training" in done.stdout, done.stderr
