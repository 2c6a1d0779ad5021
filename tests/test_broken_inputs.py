"""Broken inputs: each is refused in one line that names the file, or simply handled.

After a refusal nothing is half-written, and nothing that was there is lost. Some inputs are written
by hand, others are drawn by a seed: bits flipped, files cut, values of another type.
"""

import base64
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import traceback
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import build_internvl2, build_whisper, run_here, save_runs
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model import OLLM

BAR = re.compile(r"\d+%\||\d+\w+ \[\d\d:\d\d")  # of tqdm
USAGE = re.compile(r"\S+ ?\w*: error: ")  # of argparse
TRAIN = ("train.py", "--init", "run", "--data", "part", "--out", "out", "--device", "cpu",
         "--max-steps", 1, "--global-batch", 4)
ALIGN = ("train.py", "--preset", "internvl2-1b", "--stage", "audio-text", *TRAIN[3:],
         "--init", "internvl2", "--whisper", "whisper")
BROKEN_JSON = (b"", b"{", b"[]", b"3", b"null", b'"settings"', b"\xff\xfe{\x00}\x00",
               b"[" * 100_000, b'{"a": 1' + b"0" * 10_000 + b"}")
ODD = (None, [], {}, "x", 3, -1, 0, 0.5, True, [1, 2], {"a": 1}, ...)  # ...: left out


@pytest.fixture(scope="module", autouse=True)
def bounds():
    """What takes 30 s or 4 GB more than now fails, and does not take the machine along."""
    def interrupt(*_):
        raise KeyboardInterrupt("took more than 30 s")

    before, usual = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, interrupt)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, before[1]))
    yield
    signal.signal(signal.SIGALRM, usual)
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(params=[16, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def most(request):
    """How many cases of a kind to try; None: all."""
    return request.param


@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    """A base, a run, a prepared folder of three lines, an LVLM and a Whisper, to be spoilt."""
    folder = save_runs(tmp_path_factory.mktemp("broken"), "run", "vision-audio")
    for name in ("images", "audio"):
        shutil.copytree(world / "test" / name, folder / "part" / name)
    lines = (world / "test/samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "part/samples.jsonl").write_text("".join(lines[:3]))
    build_internvl2(folder)
    build_whisper(folder / "whisper")
    return folder


@pytest.fixture
def answers(monkeypatch):
    """Every model answers all questions alike, without thinking."""
    monkeypatch.setattr(OLLM, "answer", lambda ollm, samples, forms, **options: {
        form: ["i see a red circle"] * len(samples) for form in forms})


# ---- the property --------------------------------------------------------------------------------


def end(command, cwd):
    """Runs a command here; returns (exit code, lines of stderr without bars, stdout)."""
    signal.alarm(30)
    with warnings.catch_warnings(record=True) as noise:
        try:
            done = run_here(*command, cwd=cwd)
            code, errors, out = done.returncode, done.stderr, done.stdout
        except Exception:  # a user would see a traceback
            code, errors, out = 1, traceback.format_exc(), ""
    signal.alarm(0)
    lines = [str(warning.message) for warning in noise
             if not issubclass(warning.category, (DeprecationWarning, ResourceWarning))]
    lines += [line for line in re.split("[\r\n]", errors) if line.strip() and not BAR.search(line)]
    return code, lines, out


def problems(case, code, lines, named="", must=None):
    """Returns a list of what is wrong with how a command ended.

    named: what the error must name; must: "refused" or "handled", where only one of them is right
    """
    result, last, wrong = "refused" if code else "handled", lines[-1] if lines else "", []
    one_line = code == 1 and len(lines) == 1 and last.startswith("error: ")
    if code and not one_line and not (code == 2 and USAGE.match(last)) or "MemoryError" in last:
        wrong.append("not refused in one line")
    if code and named not in last:
        wrong.append(f"does not name {named}")
    if must not in (None, result) or lines and not code:
        wrong.append(f"was {result}")
    return wrong and [f"{case}: {', '.join(wrong)}: {' / '.join(lines[-8:])[:1500]}"]


def contents(folder):
    """Returns a checksum of each file of a folder that a refused command must leave alone."""
    finished = ("samples.jsonl", "ollm.json")  # all else in out/ is what a second try goes on from
    return {path: zlib.crc32(path.read_bytes()) for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in (".lock", "log.jsonl")
            and (folder / "out" not in path.parents or path.name in finished
                 or path.suffix == ".tmp")}


def put(path, content):
    """Writes bytes, text or something for JSON to a file; None takes it away."""
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if content is not None:
        content = content if isinstance(content, (bytes, str)) else json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def try_cases(cases, command, cwd, most=None, named=None):
    """Runs `command` with each of the cases in place, or with `most` drawn ones.

    cases: (name, path, content, "refused" or "handled" or None)
    named: what the error must name, if not the file
    """
    wrong, cases = [], random.Random(0).sample(cases, min(most or len(cases), len(cases)))
    for case, path, content, must in cases:
        original = path.read_bytes() if path.exists() else None
        put(path, content)
        before = contents(cwd)
        code, lines, _ = end(command, cwd)
        wrong += problems(case, code, lines, path.name if named is None else named, must)
        if code and contents(cwd) != before:
            wrong.append(f"{case}: has changed {dict(contents(cwd).items() ^ before.items())}")
        put(path, original)
        for left in ("out", "half", "runs", "base/predictions"):
            shutil.rmtree(cwd / left, ignore_errors=True)
    assert not wrong, "\n".join(wrong)


def mutate(content, rng, flips, end=None):
    """Yields (name, bytes): a file cut at several places, and with single bits flipped."""
    for cut in (0, 1, len(content) // 10, len(content) // 2, 9 * len(content) // 10):
        yield f"cut at {cut}", content[:cut]
    for _ in range(flips):
        place, bit = rng.randrange(end or len(content)), rng.randrange(8)
        flipped = bytes([content[place] ^ 1 << bit])
        yield f"bit {bit} of byte {place}", content[:place] + flipped + content[place + 1:]


def write_number(content, place, number, form="<I"):
    """Returns the bytes with a number written over a place."""
    packed = struct.pack(form, number)
    return content[:place] + packed + content[place + len(packed):]


def change(value, key, new):
    """Returns a copy of a dict with another value at a key; ... leaves it out."""
    return {k: v for k, v in value.items() if k != key} | ({} if new is ... else {key: new})


def json_cases(path, rng, count):
    """Yields cases of a JSON file: missing, no object, and objects with one odd value."""
    yield f"no {path.name}", path, None, None
    yield from ((f"{path.name}: {text[:12]}", path, text, "refused") for text in BROKEN_JSON)
    value = json.loads(path.read_text())
    for key, new in ((rng.choice(list(value)), rng.choice(ODD)) for _ in range(count)):
        yield f"{path.name}: {key} is {new!r}", path, change(value, key, new), None


# ---- pictures and recordings ---------------------------------------------------------------------


def picture(format="PNG", mode="RGB", size=(40, 30)):
    """Returns a picture as a file's bytes."""
    file, rng = io.BytesIO(), np.random.default_rng(0)
    pixels = rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


def png_claiming(*size):
    """Returns a PNG, its checksum right, that claims to be so large."""
    whole, header = picture(), b"IHDR" + struct.pack(">II", *size) + b"\x08\2\0\0\0"
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


def sound(format="WAV", rate=16_000, seconds=0.5, channels=1, value=None, **options):
    """Returns a recording as a file's bytes: noise, or one value throughout."""
    file, shape = io.BytesIO(), (round(seconds * rate), channels)
    wave = np.random.default_rng(0).normal(0, 0.1, shape)
    wave = wave if value is None else np.full(shape, float(value))
    soundfile.write(file, wave, rate, format=format, **options)
    return file.getvalue()


def try_files(key, folder, good, bad, formats):
    """Checks a prepared folder of pictures or recordings, {name: bytes or a function that writes}.

    formats: {format: a whole file}, whose spoilt copies are checked, too
    """
    rng, files, rows = random.Random(0), {**good, **bad}, []
    for form, whole in formats.items():
        for part, length in (("header", 60), ("file", None)):
            spoilt = mutate(whole, rng, 15, length)
            files |= {f"{part} {name}.{form}": content for name, content in spoilt}
    (folder / "files").mkdir()
    for number, (name, content) in enumerate(files.items()):
        path = folder / f"files/{number}{Path(name).suffix}"
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
        rows.append({"id": name, key: f"files/{path.name}", "question": "what", "answer": "a"})
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))

    code, lines, out = end(("data.py", "check", "."), folder)
    assert code == 1 and len(lines) == 1 and "samples.jsonl" in lines[0], lines
    errors, wrong = {int(line.split(":")[1]): line for line in out.splitlines()}, []
    must = dict.fromkeys(good, "handled") | dict.fromkeys(bad, "refused")
    for number, row in enumerate(rows, 1):
        lines = [f"error: {errors[number]}"] if number in errors else []
        wrong += problems(row["id"], len(lines), lines, row[key], must.get(row["id"]))
    assert not wrong, "\n".join(wrong)


def test_pictures(tmp_path):
    formats = {form: picture(form) for form in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")}
    good = {f"whole.{form}": content for form, content in formats.items()}
    good |= {f"{mode}.tiff": picture("TIFF", mode) for mode in ("1", "L", "LA", "CMYK", "I", "F")}
    good |= {"png as.jpg": picture(), "P.png": picture(mode="P"), "1x1.png": picture(size=(1, 1)),
             "wide.png": picture(size=(20_000, 2)), "high.png": picture(size=(2, 20_000)),
             "16 bit.png": Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save}
    bad = {f"{w} x {h}.png": png_claiming(w, h)
           for w, h in ((2**31 - 1, 2**31 - 1), (2**32 - 1, 1), (50_000, 50_000), (0, 7))}
    bad |= {"empty.png": b"", "text.png": b"no picture\n", "nothing.png": lambda path: None,
            "folder.png": Path.mkdir, "loop.png": lambda path: path.symlink_to(path.name),
            "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
            "svg.png": b"<svg/>", "half.png": picture()[:300], "speech.png": sound()}
    try_files("image", tmp_path, good, bad, formats)


def test_recordings(tmp_path):
    wav, flac = sound(), sound("FLAC")
    formats = {form: sound(form, 24_000) for form in ("WAV", "FLAC", "OGG", "MP3", "AIFF", "AU")}
    good = {f"whole.{form}": content for form, content in formats.items()}
    good |= {f"{rate} Hz.flac": sound("FLAC", rate) for rate in (8_000, 11_025, 44_100, 96_000)}
    good |= {"6 channels.wav": sound(channels=6), "24 bit.flac": sound("FLAC", subtype="PCM_24"),
             "30 s.wav": sound(seconds=30), "one sample.wav": sound(seconds=1 / 16_000)}
    bad = {f"{rate} Hz.wav": write_number(wav, 24, rate) for rate in (0, 1, 16_001, 2**31 - 1)}
    bad |= {f"{value}.wav": sound(value=value, subtype="FLOAT") for value in (np.nan, np.inf)}
    bad |= {"long.wav": sound(seconds=31, rate=8_000), "no samples.wav": sound(seconds=0),
            "too loud.wav": sound(value=1e300, subtype="DOUBLE"), "empty.flac": b"",
            "text.wav": b"no sound\n", "picture.flac": picture(), "nothing.wav": lambda path: None,
            "folder.wav": Path.mkdir, "2 GB of silence.wav": lambda path: (
                path.write_bytes(write_number(wav, 40, 2**31 - 64)), os.truncate(path, 2**31)),
            "2^36 samples.flac": flac[:21] + bytes([flac[21] | 15]) + b"\xff" * 4 + flac[26:]}
    try_files("audio", tmp_path, good, bad, formats)


# ---- lines of samples.jsonl ----------------------------------------------------------------------


def odd_lines(good):
    """Yields (name, line, "refused", "handled" or None), from a good line (a dict)."""
    for key in ("image", "question", "audio", "answer"):
        for value in (None, 3, [], {}, True, "" if key in ("image", "audio") else " \n\t"):
            yield f"{key} is {value!r}", {**good, key: value}, "refused"
    for key in ("question", "audio", "answer"):
        yield f"no {key}", change(good, key, ...), "refused"
    for key, other in (("image", "audio"), ("audio", "image")):
        for value in (f"../part/{good[key]}", "/etc/passwd", "..", ".", "a\0b", "x" * 5000,
                      "no/such", "images", good[other]):
            yield f"{key} is {value[:40]!r}", {**good, key: value}, "refused"
    for key in ("id", "question", "answer"):
        yield f"NUL in {key}", {**good, key: "red \0 circle"}, None
        yield f"odd letters in {key}", {**good, key: "red \u202e\u0301 \U0001f600"}, "handled"
    for value in (None, "x", []):
        yield f"phase is {value!r}", {**good, "phase": value}, "refused"
    yield "another key", {**good, "more": [{"a": None}]}, "handled"
    yield "special tokens", {**good, "question": "<img><IMG_CONTEXT></img><|im_end|>"}, None
    for key in ("question", "answer"):
        yield f"a {key} of 10^5 characters", {**good, key: "red " * 25_000}, "refused"


def test_lines_of_samples(place, most):
    path = place / "part/samples.jsonl"
    first, line, third = path.read_bytes().splitlines()
    odd = [(name, json.dumps(new).encode(), must)
           for name, new, must in odd_lines(json.loads(line))]
    odd += [(f"line {text[:12]}", text, "refused") for text in (
        *BROKEN_JSON, line[:-9], b"   ", b'{"id": "\xff"}', line * 2, line + b"\0",
        line.replace(b'"', b"'"), b"\xef\xbb\xbf" + line)]
    odd += [("CRLF", line + b"\r", "handled"), ("blanks around", b"  " + line + b" \t", "handled"),
            ("the same id", line, "handled")]
    cases = [(name, path, b"\n".join([first, new, third]), must) for name, new, must in odd]
    try_cases(cases, TRAIN, place, most and 24, "samples.jsonl:2:")
    files = (None, b"", b"\n\n", bytes(500), picture(), path.read_text().encode("utf-16"))
    cases = [(f"{content!r:.12}", path, content, "refused") for content in files]
    try_cases(cases, TRAIN, place)


def test_lines_that_are_scored(place, most, answers):
    path, cases = place / "part/samples.jsonl", []
    first, second, third = path.read_text().splitlines()
    line = {**json.loads(second), "label": "a red circle", "false": "blue", "scene": "a red circle"}
    for kind, key, value in itertools.product(
            ("color", "description", "relation"), ("label", "scene", "kind", "false"), ODD):
        odd = json.dumps(change({**line, "kind": kind}, key, value))
        cases.append((f"{key} of {kind} is {value!r}", path, f"{first}\n{odd}\n{third}\n", None))
    try_cases(cases, ("eval.py", "run", "--data", "part"), place, most)
    try_cases(cases, ("mmalign.py", "run", "--data", "part"), place, most, "part")


# ---- runs, checkpoints and models ----------------------------------------------------------------


def weights_cases(path, rng):
    """Yields cases of a safetensors file; no digest tells a bit flipped in a weight."""
    content, tensors = path.read_bytes(), load_file(path)
    for name, spoilt in mutate(content, rng, 10, 8 + int.from_bytes(content[:8], "little")):
        yield name, path, spoilt, None if name.startswith("bit") else "refused"
    for number in (0, 10**8, 2**60):
        yield f"header of {number}", path, write_number(content, 0, number, "<Q"), "refused"
    first = sorted(name for name in tensors if "decoder" not in name)[0]
    yield "lacks one", path, with_tensors(change(tensors, first, ...), path), "refused"


def with_tensors(tensors, path, **metadata):
    """Returns the bytes of a safetensors file like that at `path`, with other content."""
    with safe_open(path, framework="pt") as file:
        save_file(tensors, path.with_name("new"), {**file.metadata(), **metadata})
    content = path.with_name("new").read_bytes()
    path.with_name("new").unlink()
    return content


def test_runs(place, most):
    rng = random.Random(5)
    for run, names in (("run", ("config.json", "preprocessor_config.json")),
                       ("base", ("config.json", "tokenizer.json", "tokenizer_config.json"))):
        cases = list(weights_cases(place / run / "model.safetensors", rng))
        for name in names:
            cases += json_cases(place / run / name, rng, 25)
        try_cases(cases, TRAIN, place, most, named=run)


def test_what_a_run_says_of_itself(place, most):
    path = place / "run/ollm.json"
    about = json.loads(path.read_text())
    contents = [*BROKEN_JSON, *(change(about, key, ...) for key in about)]
    contents += [{**about, "base": base} for base in (
        "", ".", "/", "/etc/passwd", "../part", "a\0b", "x" * 5000, "no/such", "../run")]
    contents.append({**about, "base_fingerprint": "0" * 64})
    cases = [(f"{content!r:.400}", path, content, "refused") for content in contents]
    for command in (TRAIN, ("eval.py", "run", "--data", "part")):
        try_cases(cases, command, place, most, named="")


def test_checkpoints(place, most, monkeypatch):
    """A training is interrupted after its first step, and its checkpoint is then broken."""
    def interrupt(*_):
        raise KeyboardInterrupt

    command = (*TRAIN, "--max-steps", 2, "--global-batch", 2, "--save-every", 1, "--out", "half")
    with monkeypatch.context() as patch:
        patch.setattr(OLLM, "save", interrupt)
        assert run_here(*command, cwd=place).returncode == 130
    path = place / "half/checkpoint.safetensors"
    about, tensors = json.loads(safe_open(path, "pt").metadata()["about"]), load_file(path)
    cases = list(weights_cases(path, random.Random(6)))
    other_alpha = {**about, "config": {**about["config"], "alpha": 0.5}}
    other_data = {**about, "config": {**about["config"], "data": "another"}}
    for new in ("", [], 3, change(about, "config", ...), change(about, "step", ...), other_alpha,
                other_data, {**about, "step": 9}):
        content = with_tensors(tensors, path, about=json.dumps(new))
        cases.append((f"about {new!r:.40}", path, content, "refused"))
    whole = ("whole", path, path.read_bytes(), "handled")
    try_cases(cases, command, place, most, named="half")
    try_cases([whole], command, place)


def test_original_models(place, most):
    """An InternVL2 in its original layout, and a Whisper."""
    rng = random.Random(7)
    for folder, names in (("internvl2", ("config.json", "tokenizer_config.json", "vocab.json")),
                          ("whisper", ("config.json", "preprocessor_config.json"))):
        cases = list(weights_cases(place / folder / "model.safetensors", rng))
        for name in names:
            cases += json_cases(place / folder / name, rng, 50)
        path = place / folder / "model.safetensors.index.json"
        for new in ("", [], {}, {"weight_map": []}, {"weight_map": {"a": 3}}):
            cases.append((f"index {new}", path, new, "refused"))
        for new in (None, b"", b"\xff\xfe", b"#version: 0.2\na\n", b"a b c d\n"):
            cases.append((f"merges {new}", place / "internvl2/merges.txt", new, None))
        try_cases(cases, ALIGN, place, most, named="")


# ---- benchmarks and sources ----------------------------------------------------------------------

IMAGE = base64.b64encode(picture()).decode()
TSV = ("index\timage\tquestion\tanswer\tsplit\n"
       f"0\t{IMAGE}\twhat\t['a']\tval\n1\t0\twhich\tb\tval\n")


def test_benchmarks(place, most, answers):
    path = place / "DocVQA_VAL.tsv"
    bad = [None, b"", TSV[:20], "red circle\n", picture(), bytes(300), TSV.encode("utf-16"),
           TSV.encode() + b"\xff\t\n"]
    bad += [TSV.replace(*pair) for pair in (
        ("index", "number"), ("image", "picture"), ("question", "words"), ("\tb\tval", "\tb"),
        ("\tb\tval", "\tb\tval\t7"), ("\tb\t", "\t\t"), ("which", ""), ("\n1\t", "\n0\t"),
        ("\t0\t", "\t7\t"), (IMAGE, "x" * 99), (IMAGE, IMAGE[:99]), (IMAGE, ""))]
    well = [TSV, b"\xef\xbb\xbf" + TSV.encode(), TSV.replace("\n", "\r\n")]
    well += [TSV.replace("['a']", new) for new in ("[" * 9999, "nan", "['\\d', 1e999]")]
    cases = [(f"bad {i}", path, content, "refused") for i, content in enumerate(bad)]
    cases += [(f"well {i}", path, content, "handled") for i, content in enumerate(well)]
    cases += [(f"cut at {n}", path, TSV[:n], None) for n in (9, 30, 200, -9, -40)]
    try_cases(cases, ("eval.py", "base", "--bench", path.name), place, most)


def test_answers_of_an_earlier_evaluation(place, most, answers):
    put(place / "DocVQA_VAL.tsv", TSV)
    command = ("eval.py", "base", "--bench", "DocVQA_VAL.tsv")
    assert run_here(*command, cwd=place).returncode == 0
    path, = (place / "base/predictions").glob("*.jsonl")
    first, second = path.read_bytes().splitlines(keepends=True)
    line = json.loads(second)
    texts = [*BROKEN_JSON, second[:-5], json.dumps({**line, "prompt": "who"}).encode()]
    texts += [json.dumps(change(line, key, ...)).encode() for key in line]
    cases = [(f"{text[-40:]}", path, first + text + b"\n", "refused") for text in texts]
    try_cases(cases, command, place, most)


def test_sources(place, most):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    dialogue = {"image": "000000.png", "conversations": turns}
    row = {"image_path": "000000.png", "true_caption": "the red star", "relation_name": "above",
           "false_caption": "the blue star", **{f"bbox_{side}": 9 for side in "xywh"}}
    rows, path = [dialogue, row, {**row, "true_caption": "the green star"}], place / "file.json"
    put(place / "good.json", rows)
    values = (*ODD, "a\0b", "x" * 5000, "../part", 1e999, float("nan"), [{"from": []}] * 2)
    for good, command in (
            (dialogue, ("data.py", "llava", "--annotations", path.name, "--tts", "espeak")),
            (row, ("mmalign.py", "build", "--relation", path.name, "--attribution", "good.json",
                   "--n", 2))):
        odd = [change(good, *pair) for pair in itertools.product(good, values)] + [*ODD[:-1]]
        cases = [(f"{text!r:.12}", path, text, None) for text in (None, *BROKEN_JSON)]
        cases.append(("odd rows", path, odd + rows, "handled"))
        try_cases(cases, (*command, "--images", "part/images", "--out", "out"), place)

    clip, path, cases = {"audio": "000000.flac", "text": "red circle"}, place / "file.jsonl", []
    lines = [change(clip, key, value) for key, value in itertools.product(
        ("audio", "text", "id", "start", "seconds"), (*values, "..", 1e300))]
    for line in (*BROKEN_JSON, *(json.dumps(line).encode() for line in lines)):
        cases.append((f"{line[:80]}", path, json.dumps(clip).encode() + b"\n" + line, None))
    try_cases(cases, ("data.py", "manifest", "--manifest", path.name, "--root", "part/audio",
                      "--out", "out"), place, most)
    cases = [(f"{text!r:.20}", place / "file.tsv", text, None) for text in (
        None, b"a\tb\n1\t2\n", b"path\tsentence\nx\n", picture(), b"path\tsentence\na\0b\tx\n")]
    try_cases(cases, ("data.py", "commonvoice", "--tsv", "file.tsv", "--clips", "part/audio",
                      "--out", "out"), place)


# ---- command lines -------------------------------------------------------------------------------

COMMANDS = """
    eval.py nowhere; eval.py part; eval.py run/ollm.json; eval.py whisper; eval.py run --n 1e3
    eval.py run --data nowhere; eval.py run --data run; eval.py run --data run/ollm.json
    eval.py run --bench part; eval.py run --bench MME.tsv; eval.py run --question red --image part
    eval.py run --question red --image none.png; eval.py --question red --image part/images/000000.png base
    eval.py run --image part/images/000000.png --audio part/images/000000.png
    eval.py run --image part/images/000000.png --question unheard-of
    mmalign.py nowhere; mmalign.py run --data nowhere
    TRAIN --init nowhere; TRAIN --init part; TRAIN --init run/ollm.json; TRAIN --data nowhere
    TRAIN --out run/ollm.json; TRAIN --out base; TRAIN --out /proc/x; TRAIN --data part run
    TRAIN --alpha nan; TRAIN --seed x; ALIGN --whisper internvl2; ALIGN --whisper part
    ALIGN --init whisper; ALIGN --init nowhere; data.py check nowhere; data.py check run
    data.py speak red --out part; data.py speak red --out x.y; data.py shapes --out run/ollm.json
"""


@pytest.mark.parametrize("line", map(str.strip, re.split("[;\n]", COMMANDS.strip())))
def test_command_lines(place, line):
    """The error names the last argument."""
    for name, arguments in (("TRAIN", TRAIN), ("ALIGN", ALIGN)):
        line = line.replace(name, " ".join(map(str, arguments)))
    command = line.split()
    try_cases([(line, place / "none", None, "refused")], command, place, named=command[-1])
