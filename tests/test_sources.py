"""LLaVA's mix brought to our format, interrupted and not, and several folders in one run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, contents, read_lines, run_here
from PIL import Image
from transformers import VitsConfig, VitsModel, VitsTokenizer

import data
from plumbing.files import write_json_lines
from real import corpora
from real.families import PromptSettings

SHORT = "Answer the question using a single word or phrase."


def dialogue(question, answer="That.", image="coco/a.png"):
    """A row of LLaVA's annotations."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns}


USABLE = [dialogue(f"<image>\nWhat is this?\n{SHORT}", "Cat"),
          dialogue("How warm is the café, 30 °C?\n<image>", "Très warm."),
          dialogue("<image>\nIs her dress coordinated with the box?", "Yes, [as on page 12].")]
ASK_BOX = "Please provide the bounding box coordinate of the region this sentence describes: a cat."
UNUSABLE = [  # and why
    (dialogue("Tell me a joke", image=None), "no picture"),
    (dialogue("<image>\nWhat?", image="coco/none.png"), "picture is missing"),
    (dialogue("<image>\n" + "why " * 200), "more than 400"),
    (dialogue("<image>\nWhat?", image="coco/broken.png"), "picture is broken"),
    (dialogue("<image>\nDescribe the region [0.1, 0.2, 0.3, 0.4]."), "coordinates"),
    (dialogue("<image>\nDescribe the region [0, 0.1, 0.3, 1]."), "coordinates"),
    (dialogue(f"<image>\n{ASK_BOX}", "[0.12, 0.3, 0.5, 0.77]"), "coordinates"),
    (dialogue(f"<image>\n{ASK_BOX}", "On the left."), "coordinates"),
    (dialogue("<image>\nWhere is the cat?", "[0.12, 0.3, 0.5, 0.77]"), "coordinates"),
    (dialogue("<image>\nWhere is the cat?", "At <box>[[12, 40, 80, 200]]</box>."), "coordinates"),
    (dialogue("Which?", image=["coco/a.png", "coco/a.png"]), "several pictures"),
    (dialogue(f"<image>\n{SHORT}"), "is empty"), ("not a dialogue", "not a dialogue"),
    (dialogue("<image>\nWhat?", image="../a.png"), "picture is missing")]


@pytest.fixture
def llava(tmp_path):
    """Writes annotations, rows good and bad, and forty plain; returns the command."""
    (tmp_path / "pictures/coco").mkdir(parents=True)
    Image.new("P", (40, 30), 3).save(tmp_path / "pictures/coco/a.png")
    (tmp_path / "pictures/coco/broken.png").write_bytes(b"\x89PNG")
    plain = [dialogue(f"<image>\nHow many things are there in picture {i}?", str(i))
             for i in range(40)]
    rows = USABLE + [row for row, _ in UNUSABLE] + plain
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    return ["data.py", "llava", "--annotations", tmp_path / "mix.json",
            "--images", tmp_path / "pictures"]


def test_llava_rows_are_taken_cleaned_or_left_out_with_a_reason(llava, tmp_path):
    done = run_here(*llava, "--tts", "espeak", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = read_lines(tmp_path / "out/samples.jsonl")
    skipped = read_lines(tmp_path / "out/skipped.jsonl")
    assert len(kept) == 43 and kept[0]["answer"] == "Cat"
    assert kept[0]["question"] == f"What is this?\n{SHORT}" and "after" not in kept[0]
    assert kept[1]["question"] == "How warm is the café, 30 °C?"
    assert kept[1]["answer"] == "Très warm."
    reasons = {row["id"]: row["skipped"] for row in skipped}
    for row, (_, reason) in enumerate(UNUSABLE, len(USABLE)):
        assert reason in reasons.pop(f"{row:06}"), row
    assert not reasons and "2  the question has coordinates" in done.stdout
    samples = data.Samples(tmp_path / "out", PromptSettings(image_size=64, max_tiles=1))
    assert all(len(samples[i]["wave"]) > 8000 for i in range(len(samples)))


def test_a_draw_is_seeded_and_other_arguments_are_refused(llava, tmp_path):
    ids = []
    for seed in (0, 1):
        out = tmp_path / str(seed)
        done = run_here(*llava, "--tts", "espeak", "--n", 5, "--seed", seed, "--out", out,
                        cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        drawn = [*read_lines(out / "samples.jsonl"), *read_lines(out / "skipped.jsonl")]
        assert len(drawn) == 5 + len(UNUSABLE) - 1, "a broken picture is found when it is drawn"
        ids.append({line["id"] for line in drawn})
    assert ids[0] != ids[1]
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


def kill_once(begun, *command):
    """Starts data.py in a process group of its own, and kills the group once begun()."""
    process = subprocess.Popen([sys.executable, ROOT / "data.py", *map(str, command)],
                               start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while process.poll() is None and not begun():
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("tts", ["espeak", "mms"])
def test_what_was_interrupted_goes_on_and_leaves_the_same_bytes(llava, tmp_path, tts):
    command = [*llava, "--tts", tts, "--voice", build_vits(tmp_path / "voice")]
    whole = run_here(*command, "--out", tmp_path / "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "cut"
    kill_once(lambda: len(list(out.glob("audio/*.flac"))) > 2, *command[1:], "--out", out)
    (out / "samples.jsonl").unlink(missing_ok=True)  # should it have been quicker than we are
    for path in list(out.glob("audio/*.flac"))[2:]:
        path.unlink()
    again = run_here(*command, "--out", out, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    kept = {k: v for k, v in contents(out).items() if not k.endswith(".tmp")}
    assert kept == contents(tmp_path / "whole")
    assert len(read_lines(out / "samples.jsonl")) == (43 if tts == "espeak" else 42), "no MMS for °"


@pytest.mark.parametrize("source", ["llava", "manifest", "commonvoice"])
def test_a_list_that_changed_is_refused_where_another_was_begun(llava, tmp_path, source):
    """Files are kept by row number: another list's rows would have the wrong recordings."""
    save_noise(tmp_path / "0.wav", 0.5, 16_000)
    write_json_lines(tmp_path / "cuts.jsonl", [{"audio": "0.wav", "text": "clip"}])
    (tmp_path / "cv.tsv").write_text("path\tsentence\n0.wav\ta\n")
    name, command = {
        "llava": ("mix.json", [*llava, "--tts", "espeak", "--n", 2]),
        "manifest": ("cuts.jsonl", ["data.py", "manifest", "--manifest", "cuts.jsonl", "--root",
                                    "."]),
        "commonvoice": ("cv.tsv", ["data.py", "commonvoice", "--tsv", "cv.tsv", "--clips", "."]),
    }[source]
    command += ["--out", "out"]
    assert run_here(*command, cwd=tmp_path).returncode == 0
    (tmp_path / "out/samples.jsonl").unlink()  # interrupted
    before, text = contents(tmp_path / "out"), (tmp_path / name).read_text()
    (tmp_path / name).write_text(text + "\n")
    again = run_here(*command, cwd=tmp_path)
    assert again.returncode == 1 and again.stderr.count("\n") == 1
    assert "settings.json" in again.stderr and "sha256" in again.stderr
    assert "choose another --out" in again.stderr and contents(tmp_path / "out") == before
    (tmp_path / name).write_text(text)
    assert run_here(*command, cwd=tmp_path).returncode == 0, "the old list goes on"


def save_noise(path, seconds, rate, **options):
    """A recording of noise in the format that the path's suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(0, 0.1, int(seconds * rate))
    soundfile.write(path, noise, rate, **options)


@pytest.mark.parametrize("is_linkable", [True, False])
def test_pictures_that_are_relative_links_come_as_files(llava, tmp_path, monkeypatch, is_linkable):
    """The hub's cache, DVC and git-annex have such links."""
    def refuse(*_):
        raise OSError("another disk")

    picture = tmp_path / "pictures/coco/a.png"
    (tmp_path / "blobs").mkdir()
    picture.rename(tmp_path / "blobs/0")
    picture.symlink_to("../../blobs/0")
    if not is_linkable:
        monkeypatch.setattr(os, "link", refuse)
    done = run_here(*llava, "--tts", "espeak", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0 and "43 samples" in done.stdout, done.stderr
    paths = list((tmp_path / "out/images").iterdir())
    assert len(paths) == 43 and not any(map(os.path.islink, paths))
    assert {path.samefile(tmp_path / "blobs/0") for path in paths} == {is_linkable}
    shutil.rmtree(tmp_path / "blobs")
    checked = run_here("data.py", "check", tmp_path / "out", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout


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
    """The teacher reads it in the first two cases."""
    waves, first = {}, {}
    for suffix in ("spoken", "written", "dropped"):
        out = tmp_path / suffix
        done = run_here(*llava, "--tts", "espeak", "--suffix", suffix, "--out", out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads((out / "settings.json").read_text())["suffix"] == suffix
        samples = data.Samples(out, PromptSettings(image_size=64, max_tiles=1))
        waves[suffix], first[suffix] = samples[0]["wave"], samples.rows[0]
        assert "after" not in samples.rows[1] and "\n" not in samples.rows[1]["question"]
    assert first["dropped"]["question"] == "What is this?"
    assert first["spoken"]["question"] == first["written"]["question"] == f"What is this?\n{SHORT}"
    assert first["written"]["after"] == f"\n{SHORT}"
    assert "after" not in first["spoken"] and "after" not in first["dropped"]
    assert (waves["written"] == waves["dropped"]).all()
    assert len(waves["spoken"]) > len(waves["dropped"]) + data.SAMPLE_RATE


def test_several_prepared_folders_are_one_dataset(world):
    """Pictures and recordings are read from where they lie, also if both folders use one id."""
    folders = [world / "audio-text", world / "vision-audio"]
    settings = PromptSettings(max_tiles=1, image_size=64)
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


def test_a_run_tells_how_its_questions_were_spoken(world, start, tmp_path):
    """A run of one folder, and of two. Two suffixes are refused; none told means dropped."""
    spoken, there, copy = tmp_path / "spoken", world / "vision-audio", tmp_path / "copy"
    for folder in (spoken, copy):
        shutil.copytree(there, folder)
    (spoken / "settings.json").write_text('{"suffix": "spoken", "tts": "mms", "voice": "v"}')
    command = ("train.py", "--init", start / "audio", "--max-steps", 1, "--device", "cpu", "--data")
    mixed = run_here(*command, spoken, there, "--out", tmp_path / "mixed", cwd=tmp_path)
    assert mixed.returncode == 1 and mixed.stderr.count("\n") == 1 and "--suffix" in mixed.stderr
    assert f"spoken in {spoken}, dropped in {there}" in mixed.stderr
    for folders, *told in (([spoken], "spoken", "mms", "v"), ([there, copy], "dropped", "espeak",
                                                              None)):
        out = tmp_path / f"run-{told[0]}"
        done = run_here(*command, *folders, "--out", out, cwd=tmp_path)
        assert done.returncode == 0 and f"{100 * len(folders)} samples" in done.stdout, done.stderr
        info = json.loads((out / "ollm.json").read_text())
        assert [info["settings"].get(key) for key in ("suffix", "tts", "voice")] == told
        assert info["training"]["data"] == list(map(str, folders))
    done = run_here("eval.py", tmp_path / "run-spoken", "--data", world / "test", "--n", 4,
                    cwd=tmp_path)
    assert "is spoken by espeak; in training" in done.stdout, done.stderr
