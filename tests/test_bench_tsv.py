"""The benchmarks from end to end: asked in writing and aloud, cut off and continued."""

import base64
import csv
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, build_ollm, contents, run_here, save_runs
from PIL import Image
from safetensors.torch import load_file, save_file
from test_sources import build_vits

import data
from benchmarks import ask
from benchmarks.scorers import BENCHMARKS
from plumbing.files import BadInput
from plumbing.media import SAMPLE_RATE, VOICES, speak


def picture(color):
    """A row's image cell."""
    file = io.BytesIO()
    Image.new("RGB", (90, 60), color).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def write_tsv(path, rows):
    """A file as VLMEvalKit stores it; the columns are those of the first row, in its order."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)


def write_benchmarks(folder):
    """All seven, a few rows each: shared pictures and none, missing options, both splits."""
    red, blue = picture("red"), picture("blue")
    mme = [{"index": i, "image": image, "image_path": f"{i // 2}.jpg",
            "question": f"{question} Please answer yes or no.", "answer": answer,
            "category": category}
           for i, (image, question, answer, category) in enumerate([
               (red, "Is there a circle?", "Yes", "existence"),
               (red, "Is there a star?", "No", "existence"),
               (blue, "Is it red?", "No", "code_reasoning"),
               (blue, "Is it blue?", "Yes", "code_reasoning")])]
    hallusion = [{"category": "VD", "l2-category": "VD_ocr", "index": f"VD_ocr_1_0_{figure}_{i}",
                  "image": image, "question": "Is there a red star?", "answer": "No"}
                 for figure, image in enumerate((red, blue, "")) for i in (0, 1)]
    real = [{"image": red, "answer": "B", "index": 0, "A": "red", "B": "blue", "C": "", "D": "",
             "question": "color?"},
            {"image": "0", "answer": "A", "index": 1, "A": "one", "B": "two", "C": "three", "D": "",
             "question": "How?"}]
    text = [{"index": 34600 + i, "image": image, "question": "what is it?",
             "answer": str(["circle"] * 10)} for i, image in enumerate((red, "34600", blue))]
    chart = [{"index": i, "image": red, "question": "how many?", "answer": "14", "split": split}
             for i, split in enumerate(("test_human", "test_augmented", "test_human"))]
    doc = [{"index": 0, "image": blue, "question": "what?", "answer": "['circle', 'a circle']",
            "split": "val"}]
    for name, rows in zip(BENCHMARKS, (mme, hallusion, real, text, chart, doc, doc)):
        write_tsv(folder / f"{name}.tsv", rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the files in tsv/, and two runs: base, and sft, which listens."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "tsv").mkdir()
    write_benchmarks(folder / "tsv")
    return save_runs(folder, "sft", "vision-audio")


@pytest.fixture
def copy(place, tmp_path):
    """A copy of it, without predictions."""
    for name in ("base", "sft", "tsv"):
        ignore = shutil.ignore_patterns("predictions")
        shutil.copytree(place / name, tmp_path / name, ignore=ignore)
    return tmp_path


def test_all_seven_by_text_and_by_voice(place):
    done = run_here("eval.py", "base", "sft", "--bench", "tsv", "--max-new-tokens", 6, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "HallusionBench.tsv: 2 rows without a picture" in done.stdout
    for columns in (*BENCHMARKS.values(), ["mean"]):
        assert all(f"| {column} " in done.stdout for column in columns)
    assert "MME: unknown share" in done.stdout and "SFT, audio" in done.stdout
    assert "sft, MME, speech - text:" in done.stdout and "95 % interval" in done.stdout

    text = (place / "runs/report/benchmarks.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)["runs"]  # no NaN
    assert set(results["sft"]) == {"text", "audio"} and set(results["base"]) == {"text"}
    assert len(results["sft"]["audio"]["HallusionBench"]["rows"]) == 4
    assert Image.open(place / "runs/report/benchmarks.png").size[0] > 500

    path, = (place / "sft/predictions").glob("RealWorldQA-*")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines.sort(key=lambda line: line["index"])
    assert [line["index"] for line in lines] == ["0", "1"]
    assert all(isinstance(line["audio"], str) for line in lines)
    assert lines[1]["prompt"].startswith("How?\nA. one\nB. two\nC. three\nAnswer with the option")


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on_to_the_same_answers(copy):
    write_tsv(copy / "tsv/DocVQA_VAL.tsv",
              [{"index": i, "image": picture((i, 9 * i, 0)), "answer": "circle",
                "question": "what is it? " * (i % 5 + 1)} for i in range(16)])
    options = ["sft", "--bench", "tsv/DocVQA_VAL.tsv", "--batch", 2, "--max-new-tokens", 12]
    command = [sys.executable, ROOT / "eval.py", *map(str, options)]
    process = subprocess.Popen(command, cwd=copy, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    left = ""
    while process.poll() is None and left.count("\n") < 6:
        left = "".join(path.read_text() for path in (copy / "sft/predictions").glob("DocVQA_VAL-*"))
        time.sleep(0.005)
    process.kill()
    process.wait()
    predictions, = (copy / "sft/predictions").glob("DocVQA_VAL-*.jsonl")
    lines = predictions.read_text().splitlines(keepends=True)
    assert 6 <= len(lines) < 16, "it was killed half-way"

    # As if the disk had been full in the middle of a line: half a batch, and half a line.
    predictions.write_text("".join(lines[:5]) + lines[5][:20])
    again = run_here("eval.py", *options, cwd=copy)
    assert again.returncode == 0, again.stderr
    went_on = predictions.read_text()
    predictions.unlink()
    assert run_here("eval.py", *options, cwd=copy).returncode == 0
    assert predictions.read_text() == went_on and went_on.count("\n") == 16


def test_seven_processes_ask_one_run_seven_benchmarks_at_once(copy):
    """They waited for each other and stopped after two minutes: the folder had one lock."""
    files = sorted((copy / "tsv").glob("*.tsv"))
    context = multiprocessing.get_context("fork")
    all_ready = context.Barrier(len(files))

    def ask_one(path):
        """Asks a benchmark of the run; its answers begin when all other processes' do."""
        predict = ask.predict

        def predict_together(*arguments):
            all_ready.wait(timeout=60)  # each holds its lock here
            return predict(*arguments)

        ask.predict = predict_together
        done = run_here("eval.py", "sft", "--bench", path, "--max-new-tokens", 2,
                        "--out", f"report-{path.stem}", cwd=copy)
        os._exit(done.returncode)

    processes = [context.Process(target=ask_one, args=(path,)) for path in files]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=100)
    assert [process.exitcode for process in processes] == [0] * 7

    # Asked once more, all together are there already, and make one table.
    before = contents(copy / "sft/predictions")
    done = run_here("eval.py", "sft", "--bench", "tsv", "--max-new-tokens", 2, cwd=copy)
    assert done.returncode == 0 and "| mean " in done.stdout, done.stderr
    assert contents(copy / "sft/predictions") == before
    assert len([name for name in before if name.endswith(".jsonl")]) == 7


def test_whole_batches_are_not_asked_again(place, tmp_path, monkeypatch):
    batches = []

    def answer(samples, forms):
        batches.append([sample["where"][-1] for sample in samples])
        return {form: [f"{form} {len(batches)}" for _ in samples] for form in forms}

    monkeypatch.setattr(ask, "speech", lambda *_: None)
    args = SimpleNamespace(batch=2, tts="espeak", voice="v", speech="speech")
    subject = ask.Subject("a", "a", tmp_path, ("text", "audio"), answer)
    rows = ask.bench_rows(place / "tsv/TextVQA_VAL.tsv", None, "spoken")
    path = tmp_path / "p.jsonl"
    first = ask.predict(subject, {}, rows, path, args)
    assert [first[row["index"]]["audio"] for row in rows] == ["audio 1", "audio 1", "audio 2"]
    lines = path.read_text().splitlines(keepends=True)

    assert ask.predict(subject, {}, rows, path, args) == first and len(batches) == 2
    path.write_text("".join(lines[1:]))  # the last batch, and half of the first
    again = ask.predict(subject, {}, rows, path, args)
    assert [again[row["index"]]["text"] for row in rows] == ["text 3", "text 3", "text 2"]
    assert batches == [["2", "3"], ["4"], ["2", "3"]]


def test_answers_to_another_question_are_not_taken_for_this_one_s(copy):
    options = ["sft", "--bench", "tsv/DocVQA_VAL.tsv", "--max-new-tokens", 2]
    assert run_here("eval.py", *options, cwd=copy).returncode == 0
    predictions, = (copy / "sft/predictions").glob("*.jsonl")
    before = predictions.read_bytes()
    write_tsv(copy / "tsv/DocVQA_VAL.tsv",
              [{"index": 0, "image": picture("red"), "question": "who?", "answer": "x"}])
    other = run_here("eval.py", *options, cwd=copy)
    assert other.returncode == 1 and predictions.name in other.stderr
    assert predictions.read_bytes() == before


def test_answers_about_another_picture_are_not_taken_for_this_one_s(copy):
    """A picture that changed under the same index and question kept the old one's answers."""
    options = ["sft", "--bench", "tsv/DocVQA_VAL.tsv", "--max-new-tokens", 2]
    assert run_here("eval.py", *options, cwd=copy).returncode == 0
    path, = (copy / "sft/predictions").glob("*.jsonl")
    before = path.read_bytes()
    table = (copy / "tsv/DocVQA_VAL.tsv").read_text()
    (copy / "tsv/DocVQA_VAL.tsv").write_text(table.replace(picture("blue"), picture("red")))
    other = run_here("eval.py", *options, cwd=copy)
    assert other.returncode == 1 and f"{path.name}: answers another question" in other.stderr
    assert path.read_bytes() == before

    # Answers of before there was a digest are taken, as the question is the same.
    line = {key: value for key, value in json.loads(before).items() if key != "asked"}
    path.write_text(json.dumps(line) + "\n")
    assert run_here("eval.py", *options, cwd=copy).returncode == 0
    assert json.loads(path.read_text()) == line


def test_voices_whose_file_has_one_name_are_told_apart(place, tmp_path, monkeypatch):
    monkeypatch.setattr(ask, "speech", lambda *_: None)
    subject = ask.Subject("a", "a", tmp_path, ("text",), lambda samples, forms: {
        "text": ["red"] * len(samples)})
    rows = ask.bench_rows(place / "tsv/TextVQA_VAL.tsv", None, "spoken")
    args = SimpleNamespace(batch=None, voice="a/b", max_new_tokens=2)
    path = ask.predictions_file(subject, {}, "TextVQA_VAL", "spoken", args)
    path.parent.mkdir()
    ask.predict(subject, {}, rows, path, args)
    args.voice = "a_b"
    assert ask.predictions_file(subject, {}, "TextVQA_VAL", "spoken", args) == path
    with pytest.raises(BadInput, match="voice"):
        ask.predict(subject, {}, rows, path, args)


def test_two_bases_have_a_column_each_and_seeds_one(copy):
    """They were averaged as if seeds: "base" 50.0 +- 10.0 of two models."""
    for name in ("base", "sft"):
        shutil.copytree(copy / name, copy / "other" / name)
    about = json.loads((copy / "sft/ollm.json").read_text())
    for folder, change in (("sft-s1", {"seed": 1, "data": ["d-s1"]}), ("tiles", {"max_tiles": 6})):
        shutil.copytree(copy / "sft", copy / folder)
        training = {**about["training"], "data": ["d-s0"], "max_tiles": 1, **change}
        (copy / folder / "ollm.json").write_text(json.dumps({**about, "training": training}))
    training = {**about["training"], "data": ["d-s0"], "max_tiles": 1}
    (copy / "sft/ollm.json").write_text(json.dumps({**about, "training": training}))
    asked = ["base", "other/base", "sft", "other/sft", "sft-s1", "tiles"]
    done = run_here("eval.py", *asked, "--bench", "tsv/DocVQA_VAL.tsv", "--max-new-tokens", 1,
                    cwd=copy)
    assert done.returncode == 0, done.stderr
    table = json.loads((copy / "runs/report/benchmarks.json").read_text())["table"]
    assert {name: len(seeds) for name, seeds in table.items()} == {
        "base (base)": 1, "base (other/base)": 1, "SFT (sft)": 2, "SFT (other/sft)": 1,
        "SFT (tiles)": 1}


def test_weights_that_changed_are_asked_anew(copy):
    options = ["sft", "--bench", "tsv/DocVQA_VAL.tsv", "--max-new-tokens", 2]
    assert run_here("eval.py", *options, cwd=copy).returncode == 0
    path = copy / "sft/model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    assert run_here("eval.py", *options, cwd=copy).returncode == 0
    assert len(list((copy / "sft/predictions").glob("*.jsonl"))) == 2


def test_an_lvlm_that_is_no_run_keeps_its_folder_clean(copy):
    (copy / "base/ollm.json").unlink()
    config = json.loads((copy / "base/config.json").read_text())
    (copy / "base/config.json").write_text(json.dumps(config | {"template": "Hermes-2"}))
    before = sorted((copy / "base").iterdir())
    done = run_here("eval.py", "base", "--bench", "tsv/DocVQA_VAL.tsv", "--max-new-tokens", 2,
                    cwd=copy)
    assert done.returncode == 0, done.stderr
    assert sorted((copy / "base").iterdir()) == before
    assert len(list((copy / "runs/asked/base/predictions").glob("*.jsonl"))) == 1


@pytest.mark.parametrize("names, flags, tiles", [
    (["DocVQA_VAL"], ["--max-tiles", 2], {"2tiles"}),
    (["DocVQA_VAL", "MME"], ["--vlmevalkit-tiles"], {"18tiles", "6tiles"})])
def test_tiles(copy, names, flags, tiles):
    done = run_here("eval.py", "base", "--bench", *(f"tsv/{name}.tsv" for name in names),
                    "--max-new-tokens", 1, *flags, cwd=copy)
    assert done.returncode == 0, done.stderr
    paths = (copy / "base/predictions").glob("*.jsonl")
    assert {path.stem.split("-")[-2] for path in paths} == tiles


def test_format_suffixes_are_spoken_written_or_dropped(place, tmp_path):
    ollm, samples = build_ollm(torch.float32), {}
    for suffix in ("spoken", "written", "dropped"):
        rows = ask.bench_rows(place / "tsv/DocVQA_VAL.tsv", None, suffix)
        args = SimpleNamespace(tts="espeak", voice=VOICES[0], speech=tmp_path)
        samples[suffix] = ask.bench_sample(rows[0], ("text", "audio"), ollm.settings, args)
    rest = "Answer the question using a single word or phrase."
    assert {suffix for suffix in samples
            if rest in samples[suffix]["question"]} == {"spoken", "written"}
    assert {suffix for suffix in samples if rest in samples[suffix]["after"]} == {"written"}
    waves = [samples[suffix]["wave"] for suffix in ("spoken", "written", "dropped")]
    assert len(waves[0]) > len(waves[1]) == len(waves[2])

    # The rest stands between the speech and the end of the user's turn.
    sample = {"question": "what is it the circle", "wave": waves[1], "after": "the circle",
              "answer": ""}
    batch = data.collate([sample, {**sample, "after": ""}], ollm.tokenizer, ollm.mel_extractor,
                         ollm.settings, answers=False)
    with_rest, alone = batch["audio"]["ids"].tolist()
    slots = [data.AUDIO_SLOT] * data.count_audio_tokens(waves[1])
    rest = ollm.tokenizer("the circle").input_ids
    end = alone[alone.index(data.AUDIO_SLOT) + len(slots):]
    assert with_rest[with_rest.index(data.AUDIO_SLOT):] == slots + rest + end


def test_long_questions_are_spoken_faster_and_once(tmp_path):
    args = SimpleNamespace(tts="espeak", voice=VOICES[0], speech=tmp_path)
    slow = ask.speech("one two three", args)
    long = " ".join(["seventeen elephants"] * 38)
    wave = ask.speech(long, args)
    assert len(speak(long, VOICES[0])[0]) > 30 * SAMPLE_RATE >= len(wave)
    assert len(list(tmp_path.iterdir())) == 2 and len(slow) < len(wave)
    assert (ask.speech(long, args) == wave).all()
    with pytest.raises(BadInput):
        ask.speech(long * 5, args)
    assert len(list(tmp_path.iterdir())) == 2


TOO_LONG = [{"index": 0, "image": picture("red"), "question": "why " * 400, "answer": "x"}]
BROKEN = [{"index": 0, "image": "x" * 99, "question": "why", "answer": "x"}]


@pytest.mark.parametrize("arguments, name", [
    (["sft", "--bench", "nowhere.tsv"], "nowhere.tsv"), (["sft", "--bench", "none"], "none"),
    (["sft", "--bench", "MME.tsv"], "MME.tsv:1"),
    (["sft", "--bench", "DocVQA_VAL.tsv"], "DocVQA_VAL.tsv:2"),
    (["sft", "--bench", "InfoVQA_VAL.tsv"], "InfoVQA_VAL.tsv:2"),
    (["--bench", "tsv", "--endpoint", "http://localhost:1/v1"], "--model"),
    (["sft", "--bench", "tsv", "--endpoint", "http://localhost:1/v1", "--model", "SFT"],
     "--model SFT"),
    (["sft", "--bench", "tsv/MME.tsv", "tsv"], "MME.tsv"),
    (["sft", "./sft", "--bench", "tsv/MME.tsv"], "sft: is named twice"),
    (["sft", "--bench", "HallusionBench.tsv"], "HallusionBench.tsv:3"),
    (["--bench", "tsv", "--endpoint", "localhost:1", "--model", "omni"], "localhost:1")])
def test_what_cannot_be_asked_is_one_clear_line(copy, arguments, name):
    (copy / "none").mkdir()
    (copy / "MME.tsv").write_text("a\tb\n1\t2\n")
    write_tsv(copy / "DocVQA_VAL.tsv", TOO_LONG)
    write_tsv(copy / "InfoVQA_VAL.tsv", BROKEN)
    write_tsv(copy / "HallusionBench.tsv", [
        {"index": f"VD_ocr_1_0_0_{i}", "l2-category": "VD_ocr", "image": picture("red"),
         "question": "Is it?", "answer": answer} for i, answer in enumerate(("Yes", "True"))])
    done = run_here("eval.py", *arguments, cwd=copy)
    error, = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and name in error and "Traceback" not in done.stderr
    assert not any(path.stat().st_size for path in copy.rglob("predictions/*.jsonl"))


def test_benchmarks_are_spoken_by_the_voice_that_trained(copy):
    """They were spoken by espeak-ng alone. What MMS cannot say, espeak-ng still says."""
    voice = build_vits(copy / "voice")
    about = json.loads((copy / "sft/ollm.json").read_text())
    about["settings"] |= {"tts": "mms", "voice": str(voice), "suffix": "dropped"}
    (copy / "sft/ollm.json").write_text(json.dumps(about))
    lines = (copy / "tsv/TextVQA_VAL.tsv").read_text().splitlines(keepends=True)
    command = ("eval.py", "sft", "--bench", "tsv/TextVQA_VAL.tsv", "--max-new-tokens", 2)
    done = run_here(*command, cwd=copy)
    assert done.returncode == 0, done.stderr
    assert f"sft: spoken by mms ({voice}), format suffixes dropped" in done.stdout
    path, = (copy / "sft/predictions").glob("*voice*.jsonl")
    assert len(path.read_text().splitlines()) == len(lines) - 1
    assert len(list((copy / "runs/speech").glob("*.flac"))) >= 1
    done = run_here(*command, "--tts", "espeak", cwd=copy)
    assert f"sft: spoken by espeak ({VOICES[0]})" in done.stdout, "--tts comes first"
