"""The benchmarks from end to end: prepared, asked as text and as speech, and scored."""

import base64
import csv
import io
import json
import shutil

import pytest
from conftest import read_lines, run_here, save_runs
from PIL import Image
from test_sources import build_vits

import data
from benchmarks import build
from benchmarks.scorers import BENCHMARKS
from model import OLLM
from plumbing.files import BadInput
from plumbing.media import SAMPLE_RATE, VOICES, speak
from real.families import PromptSettings


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


def prepare(folder, *names, cwd, **options):
    """Makes the folders of some benchmarks beside tsv/; names that begin with -- are flags."""
    words = [name for name in names if name.startswith("--")]
    names = [name for name in names if not name.startswith("--")]
    words += [word for key, value in options.items() for word in (f"--{key}", value)]
    for name in names:
        done = run_here("benchmarks.build", f"{folder}/{name}.tsv", "--out", name, *words, cwd=cwd)
        assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the files in tsv/, all seven prepared, and two runs: base, and sft."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "tsv").mkdir()
    write_benchmarks(folder / "tsv")
    prepare("tsv", *BENCHMARKS, cwd=folder)
    return save_runs(folder, "sft", "vision-audio")


def test_all_seven_by_text_and_by_voice(place):
    done = run_here("eval.py", "base", "sft", "--bench", *BENCHMARKS, "--max-new-tokens", 6,
                    cwd=place)
    assert done.returncode == 0, done.stderr
    for columns in (*BENCHMARKS.values(), ["mean"]):
        assert all(f"| {column} " in done.stdout for column in columns)
    assert "MME: unknown share" in done.stdout and "SFT, audio" in done.stdout
    assert "sft, MME, speech - text:" in done.stdout and "95 % interval" in done.stdout
    text = (place / "runs/report/benchmarks.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)["runs"]  # no NaN
    assert set(results["sft"]) == {"text", "audio"} and set(results["base"]) == {"text"}
    assert len(results["sft"]["audio"]["HallusionBench"]["rows"]) == 4, "two have no picture"
    assert Image.open(place / "runs/report/benchmarks.png").size[0] > 500
    lines = read_lines(place / "sft/answers-bench-RealWorldQA.jsonl")
    assert [line["row"]["index"] for line in lines] == ["0", "1"]
    assert all(isinstance(line["audio"], str) for line in lines)
    assert lines[1]["question"].startswith("How?\nA. one\nB. two\nC. three\nAnswer with the option")


def test_rows_share_their_picture_as_it_is(place):
    lines = read_lines(place / "TextVQA_VAL/samples.jsonl")
    images = [line["image"] for line in lines]
    assert images[0] == images[1] != images[2]
    assert Image.open(place / "TextVQA_VAL" / images[2]).getpixel((50, 50)) == (0, 0, 255)


def test_format_suffixes_are_spoken_written_or_dropped(place, tmp_path):
    samples, rest = {}, "Answer the question using a single word or phrase."
    for suffix in ("spoken", "written", "dropped"):
        (tmp_path / suffix).mkdir()
        prepare(place / "tsv", "DocVQA_VAL", cwd=tmp_path / suffix, suffix=suffix)
        folder = tmp_path / suffix / "DocVQA_VAL"
        samples[suffix] = data.Samples(folder, PromptSettings(image_size=64, max_tiles=1))[0]
    assert {s for s in samples if rest in samples[s]["question"]} == {"spoken", "written"}
    assert {s for s in samples if rest in samples[s].get("after", "")} == {"written"}
    waves = [len(samples[suffix]["wave"]) for suffix in ("spoken", "written", "dropped")]
    assert waves[0] > waves[1] == waves[2]


@pytest.mark.parametrize("name, tiles", [("DocVQA_VAL", 18), ("MME", 6)])
def test_a_folder_tells_vlmevalkits_tiles(place, tmp_path, monkeypatch, name, tiles):
    answer, asked = OLLM.answer, []
    monkeypatch.setattr(OLLM, "answer", lambda ollm, samples, forms, **options: (
        asked.extend(samples) or answer(ollm, samples, forms, **options)))
    for run in ("base", "sft"):
        shutil.copytree(place / run, tmp_path / run)
    prepare(place / "tsv", name, "--vlmevalkit-tiles", cwd=tmp_path)
    options = ("sft", "--max-new-tokens", 1, "--bench", name)
    for flags, most in (((), tiles), (("--max-tiles", 2), 2)):
        asked.clear()
        assert run_here("eval.py", *options, *flags, cwd=tmp_path).returncode == 0
        sizes = {len(sample["pixels"]["pixel_values"]) for sample in asked}
        wide = data.tile(Image.new("RGB", (90, 60)), most, 64)
        assert sizes == {len(wide)} and len(wide) > 2


def test_long_questions_are_spoken_faster_and_once(tmp_path):
    (tmp_path / "audio").mkdir()
    line = {"audio": "audio/0.flac", "question": " ".join(["seventeen elephants"] * 38)}
    build.speak_line("0", line, tmp_path, VOICES[0])
    wave = data.load_audio(tmp_path / "audio/0.flac")
    assert len(speak(line["question"])[0]) > 30 * SAMPLE_RATE >= len(wave)
    with pytest.raises(BadInput):
        build.speak_line("1", line | {"audio": "audio/1.flac", "question": "red " * 900}, tmp_path,
                         VOICES[0])


def test_benchmarks_are_spoken_as_a_run_was_trained(place, tmp_path):
    """What MMS cannot say, espeak-ng still says."""
    voice = build_vits(tmp_path / "voice")
    shutil.copytree(place / "sft", tmp_path / "sft")
    about = json.loads((tmp_path / "sft/ollm.json").read_text())
    about["settings"] |= {"tts": "mms", "voice": str(voice), "suffix": "dropped"}
    (tmp_path / "sft/ollm.json").write_text(json.dumps(about))
    write_tsv(tmp_path / "TextVQA_VAL.tsv", [
        {"index": i, "image": picture("red"), "question": question, "answer": "['a']"}
        for i, question in enumerate(("what is it?", "is it 30 \u00b0?"))])
    printed = prepare(tmp_path, "TextVQA_VAL", cwd=tmp_path, run="sft")
    assert "1 of 2 questions are said by espeak-ng" in printed
    settings = json.loads((tmp_path / "TextVQA_VAL/settings.json").read_text())
    assert [settings[key] for key in ("tts", "voice", "suffix")] == ["mms", str(voice), "dropped"]
    assert len(list((tmp_path / "TextVQA_VAL/audio").iterdir())) == 2


@pytest.mark.parametrize("name, rows", [
    ("MME", [{"a": "b"}]), ("Other", [{"a": "b"}]),
    ("DocVQA_VAL", [{"index": 0, "image": picture("red"), "question": "why " * 900, "answer": 1}]),
    ("InfoVQA_VAL", [{"index": 0, "image": "x" * 99, "question": "why", "answer": "x"}]),
    ("HallusionBench", [{"index": "VD_ocr_1_0_0_0", "l2-category": "VD_ocr", "answer": "True",
                         "image": picture("red"), "question": "Is it?"}])])
def test_what_cannot_be_asked_is_one_clear_line(tmp_path, name, rows):
    write_tsv(tmp_path / f"{name}.tsv", rows)
    done = run_here("benchmarks.build", f"{name}.tsv", "--out", "out", cwd=tmp_path)
    error = done.stderr.splitlines()[-1]
    assert done.returncode and "error: " in error and f"{name}.tsv" in error, done.stderr
    assert not (tmp_path / "out/samples.jsonl").exists()
