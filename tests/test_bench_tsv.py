"""The benchmarks from end to end: small files in their format, asked in writing and aloud, cut off and continued."""

import base64
import csv
import io
import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, build_ollm, run_here, save_runs
from PIL import Image

import ask_benchmarks
import benchmarks
import data
import eval


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
    """All seven, a few rows each: pictures by reference, rows without one, options that are missing, both splits."""
    red, blue = picture("red"), picture("blue")
    mme = [{"index": i, "image": image, "image_path": f"{i // 2}.jpg", "question": f"{q} Please answer yes or no.",
            "answer": a, "category": c}
           for i, (image, q, a, c) in enumerate([(red, "Is there a circle?", "Yes", "existence"),
                                                 (red, "Is there a star?", "No", "existence"),
                                                 (blue, "Is it red?", "No", "code_reasoning"),
                                                 (blue, "Is it blue?", "Yes", "code_reasoning")])]
    hallusion = [{"category": "VD", "l2-category": "VD_ocr", "index": f"VD_ocr_1_0_{figure}_{question}",
                  "image": image, "question": "Is there a red star?", "answer": "No"}
                 for figure, image in enumerate((red, blue, "")) for question in (0, 1)]
    real = [{"image": red, "answer": "B", "index": 0, "A": "red", "B": "blue", "C": "", "D": "", "question": "color?"},
            {"image": "0", "answer": "A", "index": 1, "A": "one", "B": "two", "C": "three", "D": "",
             "question": "How?"}]
    text = [{"index": 34600 + i, "image": image, "question": "what is it?", "answer": str(["circle"] * 10)}
            for i, image in enumerate((red, "34600", blue))]
    chart = [{"index": i, "image": red, "question": "how many?", "answer": "14", "split": split}
             for i, split in enumerate(("test_human", "test_augmented", "test_human"))]
    doc = [{"index": 0, "image": blue, "question": "what?", "answer": "['circle', 'a circle']", "split": "val"}]
    for name, rows in zip(benchmarks.BENCHMARKS, (mme, hallusion, real, text, chart, doc, doc)):
        write_tsv(folder / f"{name}.tsv", rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the files in tsv/, and two runs: base, and one that listens."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "tsv").mkdir()
    write_benchmarks(folder / "tsv")
    return save_runs(folder, "sft", "vision-audio")


def test_all_seven_by_text_and_by_voice(place):
    done = run_here("eval.py", "base", "sft", "--bench", "tsv", "--max-new-tokens", 6, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "HallusionBench.tsv: 2 rows without a picture" in done.stdout
    for column in ("MME", "HalluB", "RWQA", "TextVQA", "CQA^H", "CQA^A", "DocVQA", "InfoVQA", "mean"):
        assert f"| {column} " in done.stdout
    assert "MME: yes ratio of answered" in done.stdout and "SFT, audio" in done.stdout
    assert "sft, MME, speech - text:" in done.stdout and "95 % interval" in done.stdout
    result = json.loads((place / "runs/report/benchmarks.json").read_text())
    assert set(result["runs"]["sft"]) == {"text", "audio"} and set(result["runs"]["base"]) == {"text"}
    assert len(result["runs"]["sft"]["audio"]["HallusionBench"]["rows"]) == 4
    assert Image.open(place / "runs/report/benchmarks.png").size[0] > 500
    lines = (next((place / "sft/predictions").glob("RealWorldQA-*"))).read_text().splitlines()
    lines = sorted(map(json.loads, lines), key=lambda line: line["index"])
    assert [line["index"] for line in lines] == ["0", "1"] and all(isinstance(line["audio"], str) for line in lines)
    assert lines[1]["prompt"] == ("How?\nA. one\nB. two\nC. three\n"
                                  "Answer with the option's letter from the given choices directly.")


def test_an_evaluation_that_was_killed_goes_on_to_the_same_answers(place, tmp_path):
    for name in ("base", "sft", "tsv"):
        shutil.copytree(place / name, tmp_path / name, ignore=shutil.ignore_patterns("predictions"))
    write_tsv(tmp_path / "tsv/DocVQA_VAL.tsv", [{"index": i, "image": picture((i, 9 * i, 0)), "answer": "circle",
                                                 "question": "what is it? " * (i % 5 + 1)} for i in range(24)])
    options = ["sft", "--bench", "tsv/DocVQA_VAL.tsv", "--batch", 2, "--max-new-tokens", 12]
    command = [sys.executable, ROOT / "eval.py", *map(str, options)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    predictions = tmp_path / "sft/predictions/DocVQA_VAL-prompt-gmw_en-US+m1-12tokens-1tiles.jsonl"
    while process.poll() is None and not (predictions.exists() and predictions.read_text().count("\n") >= 6):
        time.sleep(0.005)
    process.kill()
    process.wait()
    left = predictions.read_text()
    assert 6 <= left.count("\n") < 24, "it was killed half-way"
    predictions.write_text(left + '{"index": "5", "prom')  # as if the disk had been full in the middle of a line
    again = run_here("eval.py", *options, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    went_on = predictions.read_text()
    assert went_on.startswith(left), "what was answered was not asked again"
    predictions.unlink()
    assert run_here("eval.py", *options, cwd=tmp_path).returncode == 0
    assert predictions.read_text() == went_on and went_on.count("\n") == 24


def test_answers_to_another_file_are_not_taken_for_this_one_s(place, tmp_path):
    for name in ("base", "sft", "tsv"):
        shutil.copytree(place / name, tmp_path / name, ignore=shutil.ignore_patterns("predictions"))
    options = ["sft", "--bench", "tsv/DocVQA_VAL.tsv", "--max-new-tokens", 2]
    assert run_here("eval.py", *options, cwd=tmp_path).returncode == 0
    write_tsv(tmp_path / "tsv/DocVQA_VAL.tsv",
              [{"index": 0, "image": picture("red"), "question": "who?", "answer": "x"}])
    other = run_here("eval.py", *options, cwd=tmp_path)
    assert other.returncode == 1 and "another question than" in other.stderr and other.stderr.count("error:") == 1


def test_frozen_models_answer_written_questions_once(place, monkeypatch):
    asked = []
    monkeypatch.setattr(ask_benchmarks, "speech", lambda *_: None)
    args = eval.arguments("").parse_args([])
    args.batch, args.speak, args.voice, args.speech = 8, "prompt", "v", "speech"
    rows, texts = ask_benchmarks.bench_rows(place / "tsv/TextVQA_VAL.tsv", None), {}

    def ask(samples, forms):
        asked.append(tuple(forms))
        return {form: [f"{form} {s['id']}" for s in samples] for form in forms}

    for run in ("a", "b"):
        (place / run).mkdir()
        done = ask_benchmarks.predict(ask, ("text", "audio"), rows, place / run / "p.jsonl", texts, args)
        assert [row["text"] for row in done] == [f"text {row['index']}" for row in rows]
    assert asked == [("text", "audio"), ("audio",)]


def test_a_question_alone_is_spoken_and_the_rest_is_read():
    ollm = build_ollm(torch.float32)
    wave = data.speak("what is it")[0]
    sample = {"id": "0", "question": "what is it the circle", "wave": wave, "after": "the circle", "answer": ""}
    batch = data.collate([sample, {**sample, "after": ""}], ollm.tokenizer, ollm.mel_extractor, ollm.settings,
                         answers=False)
    with_rest, alone = batch["audio"]["ids"].tolist()
    n, rest = data.audio_tokens(wave), ollm.tokenizer("the circle").input_ids
    start = with_rest.index(data.AUDIO_SLOT)
    assert with_rest[start: start + n] == [data.AUDIO_SLOT] * n and with_rest[start + n:][: len(rest)] == rest
    assert with_rest[start + n + len(rest):] == alone[alone.index(data.AUDIO_SLOT) + n:]


def test_long_questions_are_spoken_faster_and_kept(tmp_path):
    slow = ask_benchmarks.speech("one two three", data.VOICES[0], tmp_path)
    long = " ".join(["seventeen elephants"] * 38)
    wave = ask_benchmarks.speech(long, data.VOICES[0], tmp_path)
    assert len(data.speak(long, data.VOICES[0])[0]) > 30 * data.SAMPLE_RATE >= len(wave)
    assert len(list(tmp_path.iterdir())) == 2 and len(slow) < len(wave)
    assert (ask_benchmarks.speech(long, data.VOICES[0], tmp_path) == wave).all()
    with pytest.raises(data.BadInput, match="--speak question"):
        ask_benchmarks.speech(long * 5, data.VOICES[0], tmp_path)


@pytest.mark.parametrize("arguments, message", [
    (["--bench", "nowhere.tsv"], "no such benchmark"),
    (["--bench", "tsv/none"], "has none of MME.tsv"),
    (["--bench", "tsv/broken/MME.tsv"], "MME.tsv:1: not a benchmark's table"),
    (["--endpoint", "http://localhost:1/v1"], "needs --model"),
    (["--bench", "tsv", "--endpoint", "localhost:1", "--model", "omni"], "http:// or https://"),
])
def test_what_cannot_be_asked_is_one_clear_line(place, arguments, message):
    (place / "tsv/none").mkdir(exist_ok=True)
    (place / "tsv/broken").mkdir(exist_ok=True)
    (place / "tsv/broken/MME.tsv").write_text("a\tb\n1\t2\n")
    done = run_here("eval.py", *([] if "--endpoint" in arguments else ["sft"]), *arguments, cwd=place)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
