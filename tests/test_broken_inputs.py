"""Broken inputs: each is refused in one line that says where, or simply works; and what was there stays as it was.

What is broken is partly written by hand, partly drawn by a seed (bits flipped, files cut, values of another type).
`python -m pytest -s tests/test_broken_inputs.py` prints how many of each kind were tried and what came of them.
"""

import base64
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
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

import data
import faults
import model
import pretrained
import train

SETTINGS = {"image_size": 64, "max_tiles": 3}
BAR = re.compile(r"\d+%\||\d+\w+ \[\d\d:\d\d")  # tqdm's
TALLY = {}  # {kind of input: Counter of "refused", "handled", "failed"}


@pytest.fixture(scope="module", autouse=True)
def table():
    """Prints what was tried, after all tests."""
    yield
    print(f"\n\n| {'broken input':12} | tried | refused in one line | handled | failed |\n|---|---:|---:|---:|---:|")
    for kind, counts in [*TALLY.items(), ("all", sum(TALLY.values(), Counter()))]:
        print(f"| {kind:12} | {counts.total():5} | {counts['refused']:19} | {counts['handled']:7} "
              f"| {counts['failed']:6} |")


@contextlib.contextmanager
def bounded(seconds=30, gigabytes=2):
    """Meanwhile, what takes longer or more memory than that fails, and does not take the machine along."""
    def late(*_):
        raise AssertionError(f"took more than {seconds} s")

    usual, before = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    signal.alarm(seconds)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + gigabytes * 2**30, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, usual)
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def noise():
    """Yields a list of functions' side remarks that would go to stderr: warnings, and transformers' log."""
    said, log = [], logging.StreamHandler(io.StringIO())
    logging.getLogger("transformers").addHandler(log)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for usually_silent in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
            warnings.simplefilter("ignore", usually_silent)
        yield said
    logging.getLogger("transformers").removeHandler(log)
    said += [str(warning.message) for warning in warned] + log.stream.getvalue().splitlines()


def call(function, cwd):
    """The same as run_here for a function of the project, which has a script's own errors around it."""
    errors, code = io.StringIO(), 0
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stderr(errors), faults.readable_errors():
            function()
    except SystemExit as exit:
        code = 1
        errors.write(str(exit.code))
    return subprocess.CompletedProcess(function, code, "", errors.getvalue())


def ended(command, cwd):
    """(exit code, lines of stderr without bars) of a command or function, run in this process."""
    with noise() as said:
        try:
            with bounded():
                done = call(command, cwd) if callable(command) else run_here(*command, cwd=cwd)
            code, errors = done.returncode, done.stderr
        except Exception:  # what a user would see as a traceback
            code, errors = 1, traceback.format_exc()
    return code, [line for line in [*said, *re.split("[\r\n]", errors)] if line.strip() and not BAR.search(line)]


def judged(kind, case, code, lines, names, must=None):
    """Counts a case; returns what is wrong with it, or None.

    names: what the error must name; must: "refused" or "handled", where only one of them is right
    """
    usage = bool(lines) and re.match(r"\S+ ?\w*: error: ", lines[-1])
    if code == 0:
        came, wrong = "handled", lines and "says something on stderr"
    else:
        came, wrong = "refused", not usage and len(lines) != 1 and "not one line"
        wrong = wrong or not (usage or lines[-1].startswith("error: ")) and "no error line"
        wrong = wrong or [f"does not name {name}" for name in names if name not in lines[-1]]
    wrong = wrong or must not in (None, came) and f"was {came}"
    TALLY.setdefault(kind, Counter())["failed" if wrong else came] += 1
    return wrong and f"{case}: {wrong}: {' / '.join(lines[-8:])[:1500]}"


def contents(folder):
    """A hash of each file of a folder, but for locks and logs."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (".lock", "log.jsonl")}


@contextlib.contextmanager
def replaced(path, content):
    """The file at `path` with this content (bytes, text, something for JSON, or None: no file), put back after."""
    before = path.read_bytes() if path.exists() else None
    if not isinstance(content, (bytes, str, type(None))):
        content = json.dumps(content)
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)


@pytest.fixture(params=[16, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def most(request):
    """How many cases of a kind to try; None: all."""
    return request.param


def run_cases(kind, cases, command, cwd, keep, most=None):
    """Runs `command` with each of the cases in place, or with `most` drawn ones; asserts that all end as they should.

    cases  (name, path, content, names in the error, "refused" or "handled" or None) of files to replace
    keep   folders that must be the same after a refusal as before it
    """
    wrong, cases = [], random.Random(0).sample(cases, min(most or len(cases), len(cases)))
    for case, path, content, names, must in cases:
        with replaced(path, content):
            before = [contents(folder) for folder in keep]
            code, lines = ended(command, cwd)
            wrong.append(judged(kind, case, code, lines, names, must))
            if code and [contents(folder) for folder in keep] != before:
                wrong.append(f"{case}: something that was there has changed")
        shutil.rmtree(cwd / "out", ignore_errors=True)
    wrong = list(filter(None, wrong))
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong)


def mutations(content, rng, flips, start=0, end=None, cuts=(0, 1, 0.1, 0.5, 0.9)):
    """(name, bytes): a file cut at several places (bytes, or shares of it), and with single bits flipped."""
    for cut in cuts:
        yield f"cut at {cut}", content[: int(cut * len(content)) if isinstance(cut, float) else cut]
    for _ in range(flips):
        place, bit = rng.randrange(start, end or len(content)), rng.randrange(8)
        yield f"bit {bit} of byte {place}", (content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1:])


def leaves(value, path=()):
    """The paths of all values inside a JSON object."""
    for key in value:
        yield (*path, key)
        if isinstance(value[key], dict):
            yield from leaves(value[key], (*path, key))


def changed(value, path, new):
    """A copy of a JSON object with another value at a path, or without it if `new` is ...."""
    value = json.loads(json.dumps(value))
    place = value
    for key in path[:-1]:
        place = place[key]
    if new is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return value


ODD = (None, [], {}, "x", 3, -1, 0, 0.5, 10**30, True, [1, 2], {"a": 1}, ...)
BROKEN_JSON = (b"", b"{", b"[]", b"3", b"null", b'"settings"', b"\xff\xfe{\x00}\x00", b"[" * 100_000,
               b'{"a": 1' + b"0" * 10_000 + b"}", b'{"a": "\\ud800"}')


def odd_values(value, rng, count):
    """(name, JSON object): `count` copies, each with one value of another type or size, or left out."""
    for path in [rng.choice(list(leaves(value))) for _ in range(count)]:
        new = rng.choice(ODD)
        yield f"{'.'.join(path)} {'left out' if new is ... else repr(new)}", changed(value, path, new)


# ---- pictures and recordings ---------------------------------------------------------------------------------------


def try_files(kind, folder, key, must):
    """Reads every file that a folder's samples.jsonl names, and checks the folder; asserts that each case is right."""
    samples, wrong, broken = data.Samples(folder, SETTINGS, ("question",) if key == "image" else ("audio",)), [], set()
    for i, row in enumerate(samples.rows):
        with noise() as said:
            try:
                with bounded():
                    samples[i]
                code, lines = 0, []
            except data.BadInput as error:
                code, lines = 1, [f"error: {line}" for line in str(error).splitlines()]
                broken.add(row["where"])
            except Exception:
                code, lines = 1, traceback.format_exc().splitlines()
        names = (f"samples.jsonl:{i + 1}:", row[key])
        wrong.append(judged(kind, row["id"], code, [*said, *lines], names, must.get(row["id"])))
    wrong = list(filter(None, wrong))
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong)
    checked = run_here("data.py", "check", folder, cwd=folder)
    assert checked.returncode == 1 and f"{len(broken)} things are wrong" in checked.stderr
    assert {line.split(": ")[0] for line in checked.stdout.splitlines()} == broken


def write_files(folder, key, files):
    """A prepared folder that names these files, {name: bytes, or a function that makes the path}; its lines' ids."""
    (folder / "files").mkdir(parents=True)
    with open(folder / "samples.jsonl", "w") as lines:
        for number, (name, content) in enumerate(files.items()):
            path = folder / f"files/{number}{Path(name).suffix}"
            path.write_bytes(content) if isinstance(content, bytes) else content(path)
            lines.write(json.dumps({"id": name, key: f"files/{path.name}", "question": "what", "answer": "a"}) + "\n")
    return folder


def png_claiming(width, height, depth=8, color=2):
    """A PNG with a right checksum that claims to be so large."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999))
            + chunk(b"IEND", b""))


def picture_bytes(format, mode="RGB", size=(40, 30), **options):
    """A picture as a file's bytes."""
    file, pixels = io.BytesIO(), np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, format, **options)
    return file.getvalue()


def good_pictures():
    """Pictures of every usual kind."""
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    good = {f"{mode}.png": picture_bytes("PNG", mode) for mode in ("RGB", "P", "1", "L", "LA", "RGBA")}
    good |= {f"{mode}.tiff": picture_bytes("TIFF", mode) for mode in ("RGB", "CMYK", "I", "F")}
    good |= {f"{mode}.jpg": picture_bytes("JPEG", mode) for mode in ("RGB", "CMYK", "L")}
    good |= {"16 bit.png": lambda path: Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(path),
             "16 bit colours.png": png_claiming(4, 4, 16, 2), "webp.webp": picture_bytes("WEBP"),
             "gif.gif": picture_bytes("GIF"), "bmp.bmp": picture_bytes("BMP"), "png as.jpg": picture_bytes("PNG"),
             "progressive.jpg": picture_bytes("JPEG", progressive=True), "1x1.png": picture_bytes("PNG", size=(1, 1)),
             "wide.png": picture_bytes("PNG", size=(20_000, 2)), "high.png": picture_bytes("PNG", size=(2, 20_000)),
             "many pixels.png": lambda path: Image.new("1", (10_000, 9_100)).save(path)}
    for suffix in ("png", "gif", "webp"):
        good[f"animated.{suffix}"] = lambda path: frames[0].save(path, save_all=True, append_images=frames[1:])
    return good


def test_pictures(tmp_path):
    rng, good = random.Random(0), good_pictures()
    bad = {f"claims {w} x {h}.png": png_claiming(w, h) for w, h in
           ((2**31 - 1, 2**31 - 1), (2**32 - 1, 1), (50_000, 50_000), (10_000, 10_000), (0, 7), (13_000, 13_000))}
    bad |= {"empty.png": b"", "text.png": b"not a picture\n", "nothing.png": lambda path: None,
            "folder.png": Path.mkdir, "loop.png": lambda path: path.symlink_to(path.name),
            "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "svg.png": b"<svg/>",
            "half.png": picture_bytes("PNG")[:300], "speech.png": b"RIFF\0\0\0\0WAVEfmt "}
    drawn = {}
    for suffix, format, flips in (("png", "PNG", 40), ("jpg", "JPEG", 12), ("gif", "GIF", 8), ("webp", "WEBP", 8),
                                  ("tiff", "TIFF", 16), ("bmp", "BMP", 8)):
        content = picture_bytes(format)
        ends = (60, None) if suffix in ("png", "tiff") else (None,)
        drawn |= {f"{name} up to {end}.{suffix}": spoilt for end in ends
                  for name, spoilt in mutations(content, rng, flips, end=end)}
    folder = write_files(tmp_path / "pictures", "image", {**good, **bad, **drawn})
    try_files("pictures", folder, "image", {**dict.fromkeys(good, "handled"), **dict.fromkeys(bad, "refused")})


def sound(format="WAV", rate=16_000, seconds=0.5, channels=1, value=None, **options):
    """A recording as a file's bytes: noise, or one value throughout."""
    file, shape = io.BytesIO(), (round(seconds * rate), channels)
    wave = np.random.default_rng(0).normal(0, 0.1, shape) if value is None else np.full(shape, float(value))
    soundfile.write(file, wave, rate, format=format, **options)
    return file.getvalue()


def with_number(content, place, number, form="<I"):
    """The bytes with a number written over a place."""
    packed = struct.pack(form, number)
    return content[:place] + packed + content[place + len(packed):]


def bad_sounds():
    """Recordings that cannot be used, or that claim what would take gigabytes."""
    wav, flac, au = sound(), sound("FLAC"), sound("AU")
    bad = {f"{rate} Hz.wav": with_number(wav, 24, rate) for rate in (0, 1, 7, 999, 16_001, 44_101, 655_349, 2**31 - 1)}
    bad |= {f"{value}.wav": sound(value=value, subtype="FLOAT") for value in (np.nan, np.inf, -np.inf)}
    bad |= {"too loud.wav": sound(value=1e300, subtype="DOUBLE"), "long.wav": sound(seconds=31, rate=8_000),
            "long.flac": sound("FLAC", seconds=30.01), "no samples.wav": sound(seconds=0),
            "no samples.flac": sound("FLAC", seconds=0), "100 channels.wav": sound(channels=100),
            "1024 channels.wav": sound(channels=1024, seconds=0.01), "empty.flac": b"", "text.wav": b"no sound\n",
            "picture.flac": picture_bytes("PNG"), "folder.wav": Path.mkdir, "nothing.wav": lambda path: None,
            "loop.wav": lambda path: path.symlink_to(path.name),
            "2 GB of silence.wav": lambda path: (path.write_bytes(with_number(wav, 40, 2**31 - 64)),
                                                 os.truncate(path, 2**31)),
            "2^36 samples.flac": flac[:21] + bytes([flac[21] | 15]) + b"\xff" * 4 + flac[26:]}
    mixed = io.BytesIO()
    soundfile.write(mixed, np.array([[np.inf, -np.inf]] * 99), 16_000, format="WAV", subtype="FLOAT")
    claims = {"2^32 bytes.wav": with_number(wav, 40, 2**32 - 1), "2^32 bytes.au": with_number(au, 8, 2**32 - 2, ">I"),
              "0 channels.wav": with_number(wav, 22, 0, "<H"), "65535 channels.wav": with_number(wav, 22, 65_535, "<H")}
    return {**bad, "inf - inf.wav": mixed.getvalue()}, claims


def test_recordings(tmp_path):
    rates = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000)
    good = {f"{rate} Hz.flac": sound("FLAC", rate) for rate in rates}
    good |= {f"{n} channels.wav": sound(channels=n) for n in (2, 6, 8)}
    good |= {"30 s.wav": sound(seconds=30), "one sample.wav": sound(seconds=1 / 16_000), "silence.wav": sound(value=0),
             "mp3.mp3": sound("MP3", 24_000), "ogg.ogg": sound("OGG", 24_000), "8 bit.wav": sound(subtype="PCM_U8"),
             "24 bit.flac": sound("FLAC", subtype="PCM_24"), "aiff.aiff": sound("AIFF")}
    (bad, claims), rng = bad_sounds(), random.Random(1)
    for suffix, header, flips in (("wav", 44, 40), ("flac", 60, 40), ("ogg", 200, 15), ("mp3", 200, 15)):
        content = sound(suffix.upper(), 24_000)
        claims |= {f"{name} up to {end}.{suffix}": spoilt for end in (header, None)
                   for name, spoilt in mutations(content, rng, flips, end=end)}
    folder = write_files(tmp_path / "sounds", "audio", {**good, **bad, **claims})
    try_files("recordings", folder, "audio", {**dict.fromkeys(good, "handled"), **dict.fromkeys(bad, "refused")})


# ---- lines ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    """A base, a run that listens, a small prepared folder, an LVLM, a Whisper and a benchmark, to be spoilt."""
    folder = save_runs(tmp_path_factory.mktemp("broken"), "run")
    lines = (world / "test/samples.jsonl").read_text().splitlines()[:8]
    shutil.copytree(world / "test", folder / "part")
    (folder / "part/samples.jsonl").write_text("\n".join(lines[:3]) + "\n")
    build_internvl2(folder)
    build_whisper(folder / "whisper")
    return folder


def use(run, part):
    """Loads a run, reads a prepared folder and scores its answers: all that training does before a step."""
    ollm = model.load_run(run)
    samples = data.Samples(part, ollm.settings, ("question", "audio") if ollm.audio_encoder else ("question",))
    batch = data.collate([samples[i] for i in range(len(samples))], ollm.tokenizer, ollm.mel_extractor, ollm.settings)
    train.epoch_order(samples.rows, 0)
    samples.fingerprint()
    with torch.no_grad():
        ollm(batch, alpha=0.75)


TRAIN = ("train.py", "--init", "run", "--data", "part", "--out", "out", "--device", "cpu", "--max-steps", 1,
         "--global-batch", 4)


def odd_lines(good):
    """(name, line, "refused" or "handled") of samples.jsonl, from a good one (a dict)."""
    for key in ("id", "image", "question", "audio", "answer"):
        for value in (None, 3, [], {}, True, 0.5):
            yield f"{key} is {value!r}", {**good, key: value}, "refused"
    for value in (None, "1", [], 0.5, True):
        yield f"phase is {value!r}", {**good, "phase": value}, "refused"
    for key in ("question", "audio", "answer"):
        yield f"no {key}", {k: v for k, v in good.items() if k != key}, "refused"
        yield f"{key} of blanks", {**good, key: " \n\t"}, "refused"
    for key in ("image", "audio"):
        for value in ("../part/" + good[key], "/etc/passwd", "", ".", "a\0b", "x" * 5000, f"images/{'x' * 300}.png",
                      "no/such", "images", "..", good["audio" if key == "image" else "image"]):
            yield f"{key} is {value[:40]!r}", {**good, key: value}, "refused"
    for key in ("id", "question", "answer"):
        yield f"NUL in {key}", {**good, key: "red \0 circle"}, None
        yield f"a right-to-left mark in {key}", {**good, key: "red \u202e\u0301 \U0001f600"}, "handled"
    for key in ("id", "question", "answer", "scene"):
        yield f"half a character in {key}", {**good, key: "red \ud800"}, "refused"
    yield "an id of 10^5 characters", {**good, "id": "x" * 10**5}, "handled"
    yield "another key", {**good, "more": [{"a": None}]}, "handled"
    yield "an old phase", {**good, "phase": -10**30}, "handled"
    yield "no number", {**good, "more": float("nan")}, None
    yield "a question of one word of 10^5 letters", {**good, "question": "x" * 10**5}, "handled"
    yield "a question of nothing that is read", {**good, "question": "?!."}, "handled"
    yield "a question of special tokens", {**good, "question": "<img><IMG_CONTEXT></img><|im_end|>"}, None
    for key in ("question", "answer"):
        yield f"a {key} of 10^5 characters", {**good, key: "red " * 25_000}, "refused"


def raw_lines(good):
    """The same for lines that are no JSON object, as bytes."""
    line = json.dumps(good).encode()
    for name, content in {
            "cut": line[:-9], "text": b"red circle", "nothing": b"", "blanks": b"   ", "list": b"[]", "number": b"3",
            "null": b"null", "string": b'"x"', "deep": b'{"id": ' + b"[" * 100_000, "not UTF-8": b'{"id": "\xff"}',
            "long number": b'{"answer": ' + b"9" * 100_000 + b"}", "two": line + line, "UTF-16": line.decode().encode(
                "utf-16"), "half a character": line.replace(b'"id": "', b'"id": "\\udc00'), "NUL": line + b"\0",
            "comma": line + b",", "single quotes": line.replace(b'"', b"'"), "BOM": b"\xef\xbb\xbf" + line}.items():
        yield name, content, "refused"
    yield "CRLF", line + b"\r", "handled"
    yield "blanks around", b"  " + line + b" \t", "handled"
    yield "the same id", line, "handled"


def test_lines_of_samples(place, most):
    path = place / "part/samples.jsonl"
    lines = path.read_bytes().splitlines()
    good = json.loads(lines[1])
    cases = [*((name, json.dumps(line).encode(), must) for name, line, must in odd_lines(good)), *raw_lines(good)]
    cases = [(name, path, b"\n".join([lines[0], line, lines[2]]) + b"\n",
              ("samples.jsonl:2",), must) for name, line, must in cases]
    whole = path.read_bytes()
    for name, content, must in (("empty", b"", "refused"), ("new lines", b"\n\n", "refused"),
                                ("no new line at the end", whole[:-1], "handled"),
                                ("CRLF throughout", whole.replace(b"\n", b"\r\n"), "handled"),
                                ("UTF-16 throughout", whole.decode().encode("utf-16"), "refused"),
                                ("NULs", bytes(500), "refused"), ("a picture", picture_bytes("PNG"), "refused")):
        cases.append((name, path, content, ("samples.jsonl",), must))
    run_cases("samples", cases, lambda: use("run", "part"), place, [place], most)
    run_cases("samples", cases, TRAIN, place, [place], most and 8)


def test_lines_that_are_scored(place, most, monkeypatch):
    path, said = place / "part/samples.jsonl", "i see a red circle"
    monkeypatch.setattr(model.OLLM, "generate", lambda self, prefix, suffix, *_: [said] * len(suffix["ids"]))
    lines = path.read_text().splitlines()
    good = json.loads(lines[1])
    cases = []
    for key in ("label", "scene", "kind", "false"):
        for value in (..., None, 3, [], {"a": 1}, "x", ""):
            for kind in ("color", "description", "relation"):
                line = {**good, "kind": kind, "label": "a red circle", "false": "blue", "scene": "a red circle"}
                line = changed(line, (key,), value)
                text = "\n".join([lines[0], json.dumps(line), lines[2]]) + "\n"
                cases.append((f"{key} of {kind} is {value!r}", path, text, ("samples.jsonl:2",), None))
    command = ("eval.py", "base", "--data", "part", "--n", 3)
    run_cases("scored lines", cases, command, place, [place / "part"], most)


# ---- runs ----------------------------------------------------------------------------------------------------------


def spoilt_weights(path, rng):
    """(name, bytes) of a safetensors file, broken in every way."""
    content, tensors = path.read_bytes(), load_file(path)
    header = 8 + int.from_bytes(content[:8], "little")
    for end in (header, None):
        for name, spoilt in mutations(content, rng, 10, start=8 if end else header, end=end):
            yield f"{name} up to {end}", spoilt
    yield "text", b"no tensors\n"
    yield "header of 2^60", with_number(content, 0, 2**60, "<Q")
    yield "header of 10^8", with_number(content, 0, 10**8, "<Q")
    yield "header of 0", with_number(content, 0, 0, "<Q")
    yield "a part of a second file", content + content[:99]
    first = sorted(tensors)[0]
    for name, changes in (("lacks one", {first: None}), ("has one more", {"more": torch.zeros(3)}),
                          ("has another shape", {first: torch.zeros(1)}),
                          ("has a number alone", {first: torch.ones(())}),
                          ("has another type", {first: tensors[first].to(torch.int8)})):
        file = path.with_name("spoilt")
        save_file({k: v for k, v in {**tensors, **changes}.items() if v is not None}, file, metadata_of(path))
        yield name, file.read_bytes()
        file.unlink()


def metadata_of(path):
    """The metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_runs(place, most):
    rng, cases = random.Random(5), []
    for run in ("run", "base"):
        path = place / run / "model.safetensors"
        wanted = ("run",) if run == "run" else ("base",)
        cases += [(f"{run}: {name}", path, content, wanted, "refused") for name, content in spoilt_weights(path, rng)]
        cases.append((f"{run}: no weights", path, None, (run,), "refused"))
        for name in ("config.json", "ollm.json", *(["preprocessor_config.json"] if run == "run" else
                                                   ["tokenizer.json", "tokenizer_config.json"])):
            path = place / run / name
            unread = (run, name) == ("base", "ollm.json")  # by whoever listens for it
            for content in BROKEN_JSON:
                cases.append((f"{run}/{name}: {content[:12]}", path, content, (run,), None if unread else "refused"))
            cases.append((f"no {run}/{name}", path, None, (run,), None))
            cases += [(f"{run}/{name}: {what}", path, value, (), None)
                      for what, value in odd_values(json.loads(path.read_text()), rng, 25)]
    run_cases("runs", cases, lambda: use("run", "part"), place, [place], most)
    run_cases("runs", cases, TRAIN, place, [place], 8)


def test_settings_of_runs(place, most):
    about, cases = json.loads((place / "run/ollm.json").read_text()), []
    for path in (("settings",), ("settings", "system"), ("settings", "max_tiles"), ("settings", "image_size"),
                 ("settings", "tokens_per_tile"), ("training",), ("training", "alpha"), ("training", "seed"),
                 ("training", "stage"), ("base",), ("base_fingerprint",), ("settings", "instruction")):
        for new in (..., None, [], {}, 10**30, -1, 1.5, True):
            fine = path[-1] == "seed" and new in (10**30, -1)
            named = ("run",) if path[-1] != "max_tiles" else ()
            cases.append((f"{path}: {new}", place / "run/ollm.json", changed(about, path, new), named,
                          "handled" if fine else "refused"))
    for name, value, must in (("audio_seconds", "3", "refused"), ("audio_seconds", 1e9, "refused"),
                              ("audio_seconds", float("nan"), "refused"), ("audio_seconds", 2.5, "handled"),
                              ("max_tiles", 10**6, "refused"), ("more", [], "handled")):
        content = changed(about, ("settings", name), value)
        cases.append((f"{name} {value}", place / "run/ollm.json", content, (), must))
    for base in ("", ".", "..", "/", "/etc/passwd", "../part", "a\0b", "x" * 5000, "nowhere/nothing", "../run"):
        cases.append((f"base {base[:20]!r}", place / "run/ollm.json", {**about, "base": base}, (), "refused"))
    run_cases("ollm.json", cases, lambda: use("run", "part"), place, [place], most)


def test_checkpoints(place, most, monkeypatch):
    """A training that was interrupted after its first step, whose checkpoint is then broken."""
    def interrupt(*_):
        raise KeyboardInterrupt

    options = [place / "half" if option == "out" else option for option in TRAIN]
    options[options.index("--max-steps") + 1] = 2
    options[options.index("--global-batch") + 1] = 2
    monkeypatch.setattr(model, "save_run", interrupt)
    assert run_here(*options, "--save-every", 1, cwd=place).returncode == 130
    monkeypatch.undo()
    path, rng = place / "half/checkpoint.safetensors", random.Random(6)
    cases = [(name, path, content, ("half/checkpoint.safetensors",), "refused")
             for name, content in spoilt_weights(path, rng)]
    about = json.loads(metadata_of(path)["about"])
    tensors = load_file(path)
    for text in ("", "[]", "{", "3", "null", *map(json.dumps, (
            {**about, "step": 2}, {**about, "step": None}, {**about, "step": "x"}, {**about, "digest": None},
            {k: v for k, v in about.items() if k != "digest"}, {k: v for k, v in about.items() if k != "training"},
            {**about, "training": []}, {**about, "training": {**about["training"], "alpha": 0.5}}))):
        file = place / "spoilt"
        save_file(tensors, file, metadata={"about": text})
        cases.append((f"about {text[:30]}", path, file.read_bytes(), ("half/checkpoint.safetensors",), "refused"))
        file.unlink()
    run_cases("checkpoints", cases, (*options, "--save-every", 1), place, [place], most)
    code, lines = ended((*options, "--save-every", 1), place)
    assert code == 0 and not lines, "the whole one is gone on from"


def test_original_models(place, most):
    """An InternVL2 in its original layout, and a Whisper."""
    rng = random.Random(7)
    for folder, files, command in (
            ("internvl2", ("config.json", "tokenizer_config.json", "vocab.json"), lambda: use("internvl2", "part")),
            ("whisper", ("config.json", "preprocessor_config.json"), lambda: pretrained.load_audio_encoder("whisper"))):
        cases, path = [], place / folder / "model.safetensors"
        for name, content in spoilt_weights(path, rng):  # a bit of the data may be wrong: nothing says what is right
            named = name.startswith("bit") or name.startswith("has") or name == "lacks one"  # or the decoder's
            cases.append((f"{folder}: {name}", path, content, (folder,), None if named else "refused"))
        for name in files:
            path = place / folder / name
            for content in BROKEN_JSON:
                cases.append((f"{folder}/{name}: {content[:12]}", path, content, (folder, name), "refused"))
            cases.append((f"no {folder}/{name}", path, None, (folder,), None))
            cases += [(f"{folder}/{name}: {what}", path, value, (), None)
                      for what, value in odd_values(json.loads(path.read_text()), rng, 60)]
        if folder == "internvl2":
            cases += [(f"merges {str(content)[:20]}", place / "internvl2/merges.txt", content, ("internvl2",), None)
                      for content in (None, b"", b"\xff\xfe", b"#version: 0.2\na\n", b"a b c d\n", b"x" * 9999)]
            index = place / folder / "model.safetensors.index.json"
            cases += [(f"index {content}", index, content, ("internvl2",), "refused") for content in (
                b"", b"[]", {}, {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": {"a": "../x"}},
                {"weight_map": {"a": "none.safetensors"}}, {"weight_map": {}})]
        config = json.loads((place / folder / "config.json").read_text())
        cases += [(f"{folder}: {path} {value}", place / folder / "config.json", changed(config, path, value), (folder,),
                   "refused") for path in leaves(config) if path[-1] in pretrained.LARGEST
                  for value in (0, -1, 10**9, "7", None)]
        run_cases(folder, cases, command, place, [place], most)


# ---- benchmarks ----------------------------------------------------------------------------------------------------

COLUMNS = "index\timage\tquestion\tanswer\tsplit"


def test_benchmarks(place):
    image, path = base64.b64encode(picture_bytes("PNG")).decode(), place / "DocVQA_VAL.tsv"

    def table(*rows, columns=COLUMNS):
        """A file's text."""
        return "\n".join([columns, *("\t".join(row) for row in rows)]) + "\n"

    good = table(("0", image, "what", "['a']", "val"), ("1", image, "which", "b", "val"))
    bad = {
        "nothing": b"", "a header alone": COLUMNS, "text": "red circle\n", "not UTF-8": good.encode() + b"\xff\t\n",
        "UTF-16": good.encode("utf-16"), "a picture": picture_bytes("PNG"), "NULs": bytes(300),
        "no index": good.replace("index", "number"),
        "no image": good.replace("image", "picture"), "no question column": good.replace("question", "asked"),
        "an open quote": good.replace("which", '"which'), "a cell less": good.replace("\tb\tval", "\tb"),
        "a cell more": good.replace("\tb\tval", "\tb\tval\t7"),
        "an index twice": good.replace("\n1\t", "\n0\t"),
        "no base64": good.replace(image, "x" * 99), "base64 cut": good.replace(image, image[:99]),
        "a broken picture": good.replace(image, base64.b64encode(picture_bytes("PNG")[:300]).decode()),
        "a huge picture": good.replace(image, base64.b64encode(png_claiming(30_000, 30_000)).decode()),
        "no picture": good.replace(image, "é" * 99), "points nowhere": table(("0", "7", "what", "a", "val")),
        "points at itself": table(("0", "0", "what", "a", "val")), "no question": good.replace("which", ""),
        "no answer": good.replace("\tb\t", "\t\t"), "no pictures": good.replace(image, ""),
        "10^5 characters": good.replace("which", "why " * 25_000)}
    well = {"whole": good, "NUL in a row": good.replace("which", "\0"), "BOM": b"\xef\xbb\xbf" + good.encode(),
        "CRLF": good.replace("\n", "\r\n"),
            "no new line": good[:-1], "blank lines": good.replace("\n", "\n\n"),
            "deep answer": good.replace("['a']", "[" * 9999), "wild answer": good.replace("['a']", "['\\d', 1e999]"),
            "long number": good.replace("['a']", f"[{'9' * 9999}]"), "NaN": good.replace("['a']", "nan")}
    cases = [(name, path, content, ("DocVQA_VAL.tsv",), "refused") for name, content in bad.items()]
    cases += [(f"cut at {n}", path, good[:n], ("DocVQA_VAL.tsv",), None) for n in (9, 30, 200, len(good) // 2, -9, -40)]
    cases += [(name, path, content, (), "handled") for name, content in well.items()]
    for other in ("MME", "HallusionBench", "RealWorldQA", "ChartQA_TEST"):
        cases.append((other, place / f"{other}.tsv", good, (), None))
    for case in cases:
        command = ("eval.py", "base", "--bench", case[1], "--max-new-tokens", 1, "--out", "out")
        run_cases("benchmarks", [case], command, place, [place / "base", place / "run"] if case[4] == "refused" else [])
        shutil.rmtree(place / "base/predictions", ignore_errors=True)


def test_answers_of_an_earlier_evaluation(place):
    image = base64.b64encode(picture_bytes("PNG")).decode()
    rows = f"{COLUMNS}\n0\t{image}\twhat\ta\tval\n1\t{image}\twhich\tb\tval\n"
    with replaced(place / "DocVQA_VAL.tsv", rows):
        command = ("eval.py", "base", "--bench", "DocVQA_VAL.tsv", "--max-new-tokens", 1, "--out", "out")
        assert run_here(*command, cwd=place).returncode == 0
        path, = (place / "base/predictions").glob("*.jsonl")
        first, second = path.read_bytes().splitlines()
        line = json.loads(second)
        lines = {name: json.dumps(value).encode() for name, value in {
            "a list": [], "a number": 3, "null": None, "no keys": {}, "a number as index": {**line, "index": 1},
            "no prompt": {k: v for k, v in line.items() if k != "prompt"}, "no text": {**line, "text": None},
            "a list as audio": {**line, "audio": []}, "another prompt": {**line, "prompt": "who"}}.items()}
        lines |= {"cut": second[:-5], "not UTF-8": b"\xff", "NUL": b"\0", "nothing": b"", "deep": b"[" * 10**5}
        cases = [(name, path, b"\n".join([first, content, b""]), (path.name,), "refused")
                 for name, content in lines.items()]
        cases += [("the last one is cut", path, first + b"\n" + second[:-5], (), "handled"),
                  ("empty", path, b"", (), "handled"), ("the other is missing", path, first + b"\n", (), "handled"),
                  ("an old question", path, first + b"\n" + json.dumps({**line, "index": "9"}).encode() + b"\n", (),
                   None)]
        run_cases("predictions", cases, command, place, [place / "base"])
    shutil.rmtree(place / "base/predictions")


# ---- sources -------------------------------------------------------------------------------------------------------


def test_sources(place, most):
    picture, clip = place / "part/images/000000.png", place / "part/audio/000000.flac"
    dialogue = {"image": picture.name, "conversations": [{"from": "human", "value": "What?"},
                                                         {"from": "gpt", "value": "That."}]}
    aro = {"image_path": picture.name, "true_caption": "the red star", "false_caption": "the blue star",
           "relation_name": "above", **{f"bbox_{side}": 9 for side in "xywh"}}
    rows = [{**aro, "true_caption": f"the {number} star"} for number in ("one", "two")]
    odd = [{}, [], None, 3, "x", {"conversations": 3}, {**dialogue, "conversations": [1, 2]},
           {**dialogue, "image": 3}, {**dialogue, "image": "a\0b"}, {**dialogue, "image": "x" * 5000},
           {**dialogue, "image": "../part"}, {**dialogue, "conversations": [{"from": [], "value": {}}] * 2},
           {**dialogue, "conversations": [{"from": "human", "value": "\0"}, {"from": "gpt", "value": "\0"}]}]
    for value in (None, [], {}, "x", 1e999, -1, 10**400, float("nan")):
        odd += [{**row, key: value} for row in rows[:1] for key in ("image_path", "true_caption", "bbox_w", "bbox_x")]
    options = {
        "llava": ("data.py", "llava", "--annotations", "file.json", "--images", "part/images", "--tts", "espeak"),
        "aro": ("mmalign.py", "build", "--relation", "file.json", "--attribution", "good.json", "--images",
                "part/images", "--n", 2),
        "cv": ("data.py", "commonvoice", "--tsv", "file.tsv", "--clips", "part/audio"),
        "manifest": ("data.py", "manifest", "--manifest", "file.jsonl", "--root", "part/audio")}
    (place / "good.json").write_text(json.dumps(rows))
    for name, right in (("llava", [dialogue]), ("aro", rows)):
        cases = [(f"{name} {content[:12]}", place / "file.json", content, ("file.json",),
                  None if content == b"[]" and name == "llava" else "refused")
                 for content in (*BROKEN_JSON, b"{}", json.dumps(right).encode()[:-9])]
        cases += [(f"{name} of odd rows", place / "file.json", odd + right, (), "handled"),
                  (f"no {name}", place / "file.json", None, ("file.json",), "refused")]
        run_cases("sources", cases, (*options[name], "--out", "out"), place, [place / "part"], most)
    tsv = {"empty": b"", "no columns": b"a\tb\n1\t2\n", "a cell less": b"path\tsentence\nx\n",
           "not a table": picture.read_bytes(), "a long cell": b"path\tsentence\na\t" + b"x" * 200_000 + b"\n"}
    must = {"empty": None, "a long cell": None}
    cases = [(f"TSV: {name}", place / "file.tsv", content, ("file.tsv",), must.get(name, "refused"))
             for name, content in tsv.items()]
    cases += [(f"TSV: {name!r}", place / "file.tsv", b"path\tsentence\n" + name + b"\tx\n" + clip.name.encode()
               + b"\tgood\n", ("file.tsv",), "handled")
              for name in (b"", b".", b"..", b"a\0b", b"\xff\xfe", b"x" * 240, b"x" * 5000, b"/etc/passwd", b"images")]
    run_cases("sources", cases, (*options["cv"], "--out", "out"), place, [place / "part"], most)
    line, cases = {"audio": clip.name, "text": "red circle"}, []
    for key, values in {"start": (float("nan"), float("inf"), -1, "x", [1], {"a": 1}, 10**400, "-0.1", "nan"),
                        "seconds": (float("nan"), float("inf"), -1, "x", [1], {"a": 1}, 10**400, "inf"),
                        "audio": (None, 3, []), "text": (None, 3, {}), "id": ("a\0b", "x" * 300)}.items():
        cases += [(f"{key} is {value!r:.30}", place / "file.jsonl", "\n".join(map(json.dumps, (
            line, {**line, key: value}))), ("file.jsonl:2",), "refused") for value in values]
    for key, values in {"start": (1e9, 1e300, 0), "seconds": (1e9, 1e300, 1e-9, 0), "text": ("", " \0"),
                        "audio": ("", "a\0b", "x" * 5000, "none"), "id": (None, 3, "..", "a/b", [], "\n")}.items():
        cases += [(f"{key} is {value!r:.30}", place / "file.jsonl", "\n".join(map(json.dumps, (
            line, {**line, key: value}))), (), "handled") for value in values]
    cases += [(f"manifest {content[:9]}", place / "file.jsonl", content, ("file.jsonl",), "refused")
              for content in BROKEN_JSON if content]
    run_cases("sources", cases, (*options["manifest"], "--out", "out"), place, [place / "part"], most)


def test_notes_of_what_a_folder_is_made_of(place):
    note = place / "made/settings.json"
    note.parent.mkdir()
    cases = [(f"settings {content[:12]}", note, content, ("settings.json",), "refused")
             for content in (*BROKEN_JSON, b"{}", b'{"n": null}')]
    (place / "file.jsonl").write_text(json.dumps({"audio": "000000.flac", "text": "red"}))
    run_cases("notes", cases, ("data.py", "manifest", "--manifest", "file.jsonl", "--root", "part/audio", "--out",
                               "made"), place, [place])


# ---- command line --------------------------------------------------------------------------------------------------

ASK = ("eval.py", "run", "--image", "part/images/000000.png")
COMMANDS = [  # and what the error names
    ((*ASK, "--question", ""), "empty"), ((*ASK, "--question", " "), "empty"), ((*ASK, "--question", "\0"), "know"),
    ((*ASK, "--question", "red " * 25_000), "too long"), ((*ASK, "--audio", "none.wav"), "none.wav"),
    ((*ASK, "--audio", "part/images/000000.png"), "000000.png"), ((*ASK, "--audio", "part"), "part"),
    ((*ASK, "--question", "red " * 25_000, "--audio", "part/audio/000000.flac"), "25004 tokens"), (ASK,
    "needs --image"),
    (("eval.py", "run", "--image", "part/audio/000000.flac", "--question", "red"), "000000.flac"),
    (("eval.py", "run", "--image", "none.png", "--question", "red"), "none.png"),
    (("eval.py", "run", "--image", "part", "--question", "red"), "part"),
    (("eval.py", "base", "--image", "part/images/000000.png", "--question", "red"), "base"),
    (("eval.py", "nowhere"), "nowhere"), (("eval.py", "part"), "part"), (("eval.py", "run/ollm.json"), "ollm.json"),
    (("eval.py", "whisper"), "whisper"), (("eval.py", "x" * 5000), "xxx"), (("eval.py", "a\0b"), "error"),
    (("eval.py", "run", "--data", "nowhere"), "nowhere"), (("eval.py", "run", "--data", "run/ollm.json"), "ollm.json"),
    (("eval.py", "run", "--data", "run"), "samples.jsonl"), (("eval.py",), "no finished run"),
    (("eval.py", "run", "--bench", "part"), "part"), (("eval.py", "run", "--bench", "MME.tsv"), "MME.tsv"),
    (("eval.py", "run", "--n", "0"), "--n"), (("eval.py", "run", "--n", "1e3"), "--n"),
    (("eval.py", "run", "--max-tiles", 10**6, "--data", "part"), "1000000"), (("mmalign.py", "nowhere"), "nowhere"),
    (("mmalign.py", "run", "--data", "part", "--n", 2), "part"), ((*TRAIN, "--init", "nowhere"), "nowhere"),
    ((*TRAIN, "--init", "part"), "part"), ((*TRAIN, "--init", "run/ollm.json"), "ollm.json"),
    ((*TRAIN, "--data", "nowhere"), "nowhere"), ((*TRAIN, "--data", "run/ollm.json"), "ollm.json"),
    ((*TRAIN, "--out", "run/ollm.json"), "ollm.json"), ((*TRAIN, "--out", "run"), "run"),
    ((*TRAIN, "--out", "run/ollm.json/x"), "ollm.json"), ((*TRAIN, "--out", "/proc/x"), "/proc/x"),
    ((*TRAIN, "--out", "x" * 5000), "xxx"), ((*TRAIN, "--lr", "nan"), "--lr"), ((*TRAIN, "--lr", "inf"), "--lr"),
    ((*TRAIN, "--lr", 0), "--lr"), ((*TRAIN, "--temperature", "nan"), "--temperature"),
    ((*TRAIN, "--alpha", "nan"), "--alpha"), ((*TRAIN, "--alpha", "x"), "--alpha"),
    ((*TRAIN, "--seed", 10**30), "--seed"), ((*TRAIN, "--seed", "x"), "--seed"),
    ((*TRAIN, "--audio-seconds", "nan"), "--audio-seconds"), ((*TRAIN, "--audio-seconds", 31), "--audio-seconds"),
    ((*TRAIN, "--max-tiles", 10**9), "1000000000"), ((*TRAIN, "--global-batch", 0), "--global-batch"),
    (("data.py", "check", "nowhere"), "nowhere"), (("data.py", "check", "run/ollm.json"), "ollm.json"),
    (("data.py", "check", "run"), "run"), (("data.py", "speak", "red", "--out", "part"), "part"),
    (("data.py", "speak", "red", "--out", "none/x.wav"), "none/"),
    (("data.py", "speak", "red", "--out", "x.y"), "x.y"),
    (("data.py", "speak", "red " * 25_000), "too long"), (("data.py", "shapes", "--out", "run/ollm.json"), "ollm.json"),
    (("data.py", "merge", "part", "nowhere", "--out", "out"), "nowhere"),
    (("data.py", "merge", "part", "--out", "run/ollm.json"), "ollm.json"),
    (("data.py", "llava", "--annotations", "part", "--images", "part", "--out", "out"), "part"),
]


def test_command_lines(place):
    """A stage from what is no Whisper or LVLM, too."""
    wrong, before = [], contents(place)
    align = ("train.py", "--preset", "internvl2-1b", "--stage", "audio-text", "--data", "part", "--out", "out",
             "--max-steps", 1)
    more = [((*align, "--init", "whisper", "--whisper", "whisper"), "whisper"),
            ((*align, "--init", "internvl2", "--whisper", "internvl2"), "internvl2"),
            ((*align, "--init", "internvl2", "--whisper", "part"), "part"),
            ((*align, "--init", "part/samples.jsonl", "--whisper", "whisper"), "samples.jsonl")]
    for command, named in COMMANDS + more:
        code, lines = ended(command, place)
        wrong.append(judged("command line", " ".join(map(str, command))[:200], code, lines, (named,), "refused"))
        shutil.rmtree(place / "out", ignore_errors=True)
        if contents(place) != before:
            wrong.append(f"{command}: something has changed")
            before = contents(place)
    wrong = list(filter(None, wrong))
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong)
