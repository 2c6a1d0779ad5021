"""Broken inputs: each is refused in one line that names the file, or simply handled.

After a refusal nothing is half-written, and nothing that was there is lost. Some inputs are written
by hand, others are drawn by a seed: bits flipped, files cut, values of another type.
`python -m pytest -s tests/test_broken_inputs.py` prints how many were tried and what came of them.
"""

import base64
import contextlib
import io
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
from collections import Counter
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

BAR = re.compile(r"\d+%\||\d+\w+ \[\d\d:\d\d")  # a line of tqdm's
USAGE = re.compile(r"\S+ ?\w*: error: ")  # of argparse
TALLY = {}  # {kind of input: Counter of "refused", "handled", "failed"}
TRAIN = ("train.py", "--init", "run", "--data", "part", "--out", "out", "--device", "cpu",
         "--max-steps", 1, "--global-batch", 4)
ALIGN = ("train.py", "--preset", "internvl2-1b", "--stage", "audio-text", *TRAIN[3:])
BROKEN_JSON = (b"", b"{", b"[]", b"3", b"null", b'"settings"', b"\xff\xfe{\x00}\x00",
               b"[" * 100_000, b'{"a": 1' + b"0" * 10_000 + b"}")
ODD = (None, [], {}, "x", 3, -1, 0, 0.5, True, [1, 2], {"a": 1}, ...)  # ...: left out


@pytest.fixture(scope="module", autouse=True)
def table():
    """Prints what was tried, after all tests."""
    yield
    print("\n\n| broken input | tried | refused in one line | handled | failed |")
    for kind, counts in [*TALLY.items(), ("all", sum(TALLY.values(), Counter()))]:
        numbers = [counts.total(), *(counts[key] for key in ("refused", "handled", "failed"))]
        print(f"| {kind} | {' | '.join(map(str, numbers))} |")


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


@contextlib.contextmanager
def bounded(seconds=30, gigabytes=2):
    """Meanwhile, what takes longer or more memory than that fails."""
    def interrupt(*_):
        raise KeyboardInterrupt(f"took more than {seconds} s")

    before, usual = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, interrupt)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + gigabytes * 2**30, before[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, usual)
        resource.setrlimit(resource.RLIMIT_AS, before)


def end(command, cwd):
    """Runs a command here; returns (exit code, lines of stderr without bars, stdout)."""
    with warnings.catch_warnings(record=True) as warned, bounded():
        warnings.simplefilter("always")
        for usually_silent in (DeprecationWarning, ResourceWarning):
            warnings.simplefilter("ignore", usually_silent)
        try:
            done = run_here(*command, cwd=cwd)
            code, errors, out = done.returncode, done.stderr, done.stdout
        except Exception:  # a user would see a traceback
            code, errors, out = 1, traceback.format_exc(), ""
    lines = [str(warning.message) for warning in warned] + re.split("[\r\n]", errors)
    return code, [line for line in lines if line.strip() and not BAR.search(line)], out


def judge(kind, case, code, lines, named="", must=None):
    """Counts a case; returns what is wrong with it, or None.

    named: what the error must name; must: "refused" or "handled", where only one of them is right
    """
    result, last, wrong = "refused" if code else "handled", lines[-1] if lines else "", None
    one_line = code == 1 and len(lines) == 1 and last.startswith("error: ")
    if code and not one_line and not (code == 2 and USAGE.match(last)) or "MemoryError" in last:
        wrong = "not refused in one line"
    elif code and named not in last:
        wrong = f"does not name {named}"
    elif must not in (None, result) or lines and not code:
        wrong = f"was {result}"
    TALLY.setdefault(kind, Counter())["failed" if wrong else result] += 1
    return wrong and f"{case}: {wrong}: {' / '.join(lines[-8:])[:1500]}"


def assert_none(wrong):
    """Fails with a list of what is wrong, if anything is."""
    wrong = list(filter(None, wrong))
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong)


def contents(folder):
    """Returns a checksum of each file of a folder, but for locks and logs."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: zlib.crc32(path.read_bytes()) for path in files
            if path.name not in (".lock", "log.jsonl")}


def changes(before, folder):
    """Yields what a refused command has changed, but for what a second try would go on from."""
    after = contents(folder)
    yield from (f"{path} has changed" for path in before if after.get(path) != before[path])
    for path in after.keys() - before.keys():
        is_unfinished = path.name not in ("samples.jsonl", "ollm.json") and path.suffix != ".tmp"
        if folder / "out" not in path.parents or not is_unfinished:
            yield f"{path} is left"


@contextlib.contextmanager
def replaced(path, content):
    """Meanwhile, the file has this content: bytes, text, something for JSON, or None: no file."""
    before = path.read_bytes() if path.exists() else None
    if not isinstance(content, (bytes, str, type(None))):
        content = json.dumps(content)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)


def try_cases(kind, cases, command, cwd, most=None, named=None):
    """Runs `command` with each of the cases in place, or with `most` drawn ones.

    cases: (name, path, content, "refused" or "handled" or None); named: what the error must name,
    if not the file
    """
    wrong, cases = [], random.Random(0).sample(cases, min(most or len(cases), len(cases)))
    for case, path, content, must in cases:
        with replaced(path, content):
            before = contents(cwd)
            code, lines, _ = end(command, cwd)
            wrong.append(judge(kind, case, code, lines, path.name if named is None else named, must))
            wrong += [f"{case}: {what}" for what in changes(before, cwd) if code]
        for left in ("out", "runs", "base/predictions"):
            shutil.rmtree(cwd / left, ignore_errors=True)
    assert_none(wrong)


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
    name, value = f"{path.parent.name}/{path.name}", json.loads(path.read_text())
    yield f"no {name}", path, None, None
    yield from ((f"{name}: {text[:12]}", path, text, "refused") for text in BROKEN_JSON)
    for key, new in ((rng.choice(list(value)), rng.choice(ODD)) for _ in range(count)):
        yield f"{name}: {key} is {new!r}", path, change(value, key, new), None
        if isinstance(value[key], dict):
            inner = change(value[key], rng.choice(list(value[key])), new)
            yield f"{name}: {key}: {inner}", path, {**value, key: inner}, None


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
    for number, row in enumerate(rows, 1):
        name, error = row["id"], errors.get(number)
        must = "handled" if name in good else "refused" if name in bad else None
        lines = [f"error: {error}"] if error else []
        wrong.append(judge(f"{key} files", name, len(lines), lines, row[key], must))
    assert_none(wrong)


def test_pictures(tmp_path):
    good = {f"{mode}.png": picture("PNG", mode) for mode in ("RGB", "P", "1", "L", "LA", "RGBA")}
    good |= {f"{mode}.tiff": picture("TIFF", mode) for mode in ("RGB", "CMYK", "I", "F")}
    good |= {f"{mode}.jpg": picture("JPEG", mode) for mode in ("RGB", "CMYK", "L")}
    good |= {"png as.jpg": picture(), "1x1.png": picture(size=(1, 1)),
             "wide.png": picture(size=(20_000, 2)), "high.png": picture(size=(2, 20_000)),
             "16 bit.png": Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save}
    bad = {f"claims {w} x {h}.png": png_claiming(w, h)
           for w, h in ((2**31 - 1, 2**31 - 1), (2**32 - 1, 1), (50_000, 50_000), (0, 7))}
    bad |= {"empty.png": b"", "text.png": b"no picture\n", "nothing.png": lambda path: None,
            "folder.png": Path.mkdir, "loop.png": lambda path: path.symlink_to(path.name),
            "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
            "svg.png": b"<svg/>", "half.png": picture()[:300], "speech.png": sound()}
    formats = {form: picture(form) for form in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")}
    try_files("image", tmp_path, good, bad, formats)


def test_recordings(tmp_path):
    wav, flac, formats = sound(), sound("FLAC"), ("wav", "flac", "ogg", "mp3", "aiff", "au")
    formats = {form: sound(form.upper(), 24_000) for form in formats}
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
        for value in (None, 3, [], {}, True):
            yield f"{key} is {value!r}", {**good, key: value}, "refused"
    for key in ("question", "audio", "answer"):
        yield f"no {key}", change(good, key, ...), "refused"
        yield f"{key} of blanks", {**good, key: " \n\t"}, "refused"
    for key, other in (("image", "audio"), ("audio", "image")):
        for value in (f"../part/{good[key]}", "/etc/passwd", "..", "", ".", "a\0b", "x" * 5000,
                      f"images/{'x' * 300}.png", "no/such", "images", good[other]):
            yield f"{key} is {value[:40]!r}", {**good, key: value}, "refused"
    for key in ("id", "question", "answer"):
        yield f"NUL in {key}", {**good, key: "red \0 circle"}, None
        yield f"odd letters in {key}", {**good, key: "red \u202e\u0301 \U0001f600"}, "handled"
    for value in (None, "x", []):
        yield f"phase is {value!r}", {**good, "phase": value}, "refused"
    yield "another key", {**good, "more": [{"a": None}]}, "handled"
    yield "a question of nothing that is read", {**good, "question": "?!."}, "handled"
    yield "special tokens", {**good, "question": "<img><IMG_CONTEXT></img><|im_end|>"}, None
    for key in ("question", "answer"):
        yield f"a {key} of 10^5 characters", {**good, key: "red " * 25_000}, "refused"


def test_lines_of_samples(place, most):
    path = place / "part/samples.jsonl"
    first, line, third = path.read_bytes().splitlines()
    odd = [(name, json.dumps(new).encode(), must) for name, new, must in odd_lines(json.loads(line))]
    odd += [(f"line {text[:12]}", text, "refused") for text in (
        *BROKEN_JSON, line[:-9], b"   ", b'{"id": "\xff"}', line * 2, line + b"\0",
        line.replace(b'"', b"'"), b"\xef\xbb\xbf" + line)]
    odd += [("CRLF", line + b"\r", "handled"), ("blanks around", b"  " + line + b" \t", "handled"),
            ("the same id", line, "handled")]
    cases = [(name, path, b"\n".join([first, new, third]), must) for name, new, must in odd]
    try_cases("lines of samples.jsonl", cases, TRAIN, place, most and 24, "samples.jsonl:2:")
    files = (None, b"", b"\n\n", bytes(500), picture(), path.read_text().encode("utf-16"))
    cases = [(f"{content!r:.12}", path, content, "refused") for content in files]
    try_cases("samples.jsonl", cases, TRAIN, place)


def test_lines_that_are_scored(place, most, answers):
    path, cases = place / "part/samples.jsonl", []
    first, second, third = path.read_text().splitlines()
    for kind in ("color", "description", "relation"):
        line = {**json.loads(second), "kind": kind, "label": "a red circle", "false": "blue",
                "scene": "a red circle"}
        for key, value in ((key, value) for key in ("label", "scene", "kind", "false") for value in ODD):
            text = "\n".join([first, json.dumps(change(line, key, value)), third])
            cases.append((f"{key} of {kind} is {value!r}", path, text, None))
    for script in ("eval.py", "mmalign.py"):
        try_cases("scored lines", cases, (script, "run", "--data", "part"), place, most, "part")


# ---- runs, checkpoints and models ----------------------------------------------------------------


def weights_cases(path, rng):
    """Yields cases of a safetensors file; no digest tells a bit flipped in a weight."""
    content, tensors = path.read_bytes(), load_file(path)
    yield f"no {path}", path, None, "refused"
    for name, spoilt in mutate(content, rng, 10, 8 + int.from_bytes(content[:8], "little")):
        yield name, path, spoilt, None if name.startswith("bit") else "refused"
    for number in (0, 10**8, 2**60):
        yield f"header of {number}", path, write_number(content, 0, number, "<Q"), "refused"
    first = sorted(name for name in tensors if "decoder" not in name)[0]
    for new in (..., torch.zeros(1), torch.ones(())):
        yield f"{first} is {new}", path, with_tensors(change(tensors, first, new), path), "refused"


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
        cases = [*weights_cases(place / run / "model.safetensors", rng)]
        for name in names:
            cases += json_cases(place / run / name, rng, 25)
        try_cases("runs", cases, TRAIN, place, most, named=run)
    path = place / "run/ollm.json"
    cases, about = [*json_cases(path, rng, 40)], json.loads(path.read_text())
    for base in ("", ".", "/", "/etc/passwd", "../part", "a\0b", "x" * 5000, "no/such", "../run"):
        cases.append((f"base {base[:20]!r}", path, {**about, "base": base}, "refused"))
    cases.append(("another base", path, {**about, "base_fingerprint": "0" * 64}, "refused"))
    try_cases("ollm.json", cases, TRAIN, place, most, named="")
    try_cases("ollm.json", cases, ("eval.py", "run", "--data", "part"), place, most, named="")


def test_checkpoints(place, most, monkeypatch):
    """A training is interrupted after its first step, and its checkpoint is then broken."""
    def interrupt(*_):
        raise KeyboardInterrupt

    command = (*TRAIN, "--max-steps", 2, "--global-batch", 2, "--save-every", 1)
    with monkeypatch.context() as patch:
        patch.setattr(OLLM, "save", interrupt)
        assert run_here(*command, cwd=place).returncode == 130
    path = shutil.move(place / "out/checkpoint.safetensors", place / "whole")
    about, tensors = json.loads(safe_open(path, "pt").metadata()["about"]), load_file(path)
    cases = [(name, place / "out/checkpoint.safetensors", content, must)
             for name, _, content, must in weights_cases(path, random.Random(6)) if content]
    for new in ("", "[]", "{", "3", {**about, "step": 9}, {**about, "step": None},
                change(about, "config", ...), {**about, "config": {**about["config"], "alpha": 0.5}},
                {**about, "config": {**about["config"], "data": "another"}}):
        text = new if isinstance(new, str) else json.dumps(new)
        content = with_tensors(tensors, path, about=text)
        cases.append((f"about {text[:40]}", cases[0][1], content, "refused"))
    try_cases("checkpoints", cases, command, place, most, "out")
    try_cases("checkpoints", [("whole", cases[0][1], path.read_bytes(), "handled")], command, place)
    path.unlink()


def test_original_models(place, most):
    """An InternVL2 in its original layout, and a Whisper."""
    rng, command = random.Random(7), (*ALIGN, "--init", "internvl2", "--whisper", "whisper")
    for folder, names in (("internvl2", ("config.json", "tokenizer_config.json", "vocab.json")),
                          ("whisper", ("config.json", "preprocessor_config.json"))):
        cases = [*weights_cases(place / folder / "model.safetensors", rng)]
        for name in names:
            cases += json_cases(place / folder / name, rng, 50)
        index = place / folder / "model.safetensors.index.json"
        cases += [(f"index {content}", index, content, "refused") for content in (
            b"", b"[]", {}, {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": {"a": "x"}})]
        cases += [(f"merges {content!r:.20}", place / "internvl2/merges.txt", content, None)
                  for content in (None, b"", b"\xff\xfe", b"#version: 0.2\na\n", b"a b c d\n")]
        try_cases(folder, cases, command, place, most, named="")
