"""README's "Reproduce the paper" and the docs' "One card", on a small tree of the same layout."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import ROOT, build_internvl2, build_whisper
from PIL import Image
from test_bench_tsv import write_benchmarks
from test_sources import build_vits


def block(page, heading):
    """Returns the first block of commands under a heading."""
    pattern = rf"# {heading}\n.*?```sh\n(.*?)```"
    return re.search(pattern, (ROOT / page).read_text(), re.DOTALL)[1]


def save_on_hub(cache, name, build):
    """Puts a folder where huggingface_hub keeps its copy of a model."""
    place = cache / "hub" / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("0" * 40)
    (place / "snapshots").mkdir()
    build(place / "built").rename(place / "snapshots" / ("0" * 40))


def build_tree(folder):
    """Makes what the commands read: recordings, annotations, pictures, benchmarks, models."""
    for file in ROOT.iterdir():
        if not file.name.startswith(".") and file.name not in ("runs", "prepared"):
            (folder / file.name).symlink_to(file)
    for split in ("train-clean-100", "train-clean-360", "test-clean"):
        place = folder / "corpora/LibriSpeech" / split / "1/2"
        place.mkdir(parents=True)
        for i in range(4):
            noise = np.random.default_rng(i).normal(0, 0.1, 8000 + 800 * i)
            soundfile.write(place / f"1-2-{i:04}.flac", noise, 16000)
        texts = [f"1-2-{i:04} A RED CIRCLE\n" for i in range(4)]
        (place / "1-2.trans.txt").write_text("".join(texts))

    (folder / "llava").mkdir()
    dialogues = []
    for i in range(6):
        Image.new("RGB", (60 + i, 40), "red").save(folder / f"llava/{i}.jpg")
        turns = [("human", "<image>\nWhat is red?\nAnswer the question using a single word or "
                           "phrase."), ("gpt", "a circle")]
        dialogues.append({"id": str(i), "image": f"{i}.jpg", "conversations":
                          [{"from": who, "value": text} for who, text in turns]})
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(dialogues))
    (folder / "tsv").mkdir()
    write_benchmarks(folder / "tsv")

    def build_base(place):
        place.mkdir()
        return build_internvl2(place)

    save_on_hub(folder / "hf", "OpenGVLab/InternVL2-1B", build_base)
    save_on_hub(folder / "hf", "facebook/mms-tts-eng", build_vits)
    save_on_hub(folder / "hf", "openai/whisper-large-v3", build_whisper)
    save_on_hub(folder / "hf", "openai/whisper-small", build_whisper)


def run_block(commands, folder):
    """Runs a block of commands in a small tree; returns what it printed."""
    build_tree(folder)
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1",
                   "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    commands = commands.replace("--nproc_per_node 8", "--nproc_per_node 2")
    done = subprocess.run(["bash", "-euc", commands], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_commands_of_the_readme_train_and_evaluate_with_one_voice(tmp_path):
    printed = run_block(block("README.md", "Reproduce the paper"), tmp_path)
    runs = sorted((tmp_path / "runs/internvl2-1b").glob("vision-audio-*"))
    assert [run.name for run in runs] == [f"vision-audio-a{alpha}-s0"
                                          for alpha in ("0", "0.25", "0.5", "0.75", "1")]
    for run in runs:
        settings = json.loads((run / "ollm.json").read_text())["settings"]
        assert (settings["tts"], settings["voice"]) == ("mms", "facebook/mms-tts-eng")
    bench = json.loads((tmp_path / "prepared/MME/settings.json").read_text())
    assert (bench["tts"], bench["voice"], bench["suffix"]) == ("mms", "facebook/mms-tts-eng",
                                                               "spoken")
    assert "note: " not in printed
    table = json.loads((tmp_path / "runs/report/benchmarks.json").read_text())["table"]
    assert set(table) == {"SFT", "KD 0.25", "KD 0.5", "KD 0.75", "KD 1"}
    assert "MME" in table["KD 1"][0]["audio"]


@pytest.mark.slow
def test_the_commands_for_one_card_come_to_a_table(tmp_path):
    printed = run_block(block("docs/one-card.md", "One card, one evening"), tmp_path)
    assert "word error" in printed
    table = json.loads((tmp_path / "runs/report/benchmarks.json").read_text())["table"]
    assert set(table) == {"SFT", "KD 1"} and "MME" in table["KD 1"][0]["audio"]
