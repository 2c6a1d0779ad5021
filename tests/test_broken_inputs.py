"""Broken inputs: each is refused in one line that names the file, or simply handled.

After a refusal nothing is half-written, and nothing that was there is lost. Some inputs are written
by hand, others are drawn by a seed: bits flipped, files cut, values of another type.
"""

import base64
import gzip
import io
import itertools
import json
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
from conftest import build_internvl2, build_whisper, run_here, save_runs
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save

from model import OLLM
from plumbing import runs
from plumbing.files import write_json_lines

BAR = re.compile(r"\d+%\||\d+\w+ \[\d\d:\d\d")  # of tqdm
USAGE = re.compile(r"\S+ ?\w*: error: ")  # of argparse
TRAIN = ("train.py", "--init", "run", "--data", "part", "--out", "out", "--device", "cpu",
         "--max-steps", 1, "--global-batch", 4)
ALIGN = ("train.py", "--preset", "internvl2-1b", "--stage", "audio-text", *TRAIN[3:],
         "--init", "internvl2", "--whisper", "whisper")
BROKEN_JSON = (b"", b"{", b"[]", b"3", b"null", b'"settings"', b"\xff\xfe{\x00}\x00",
               b"[" * 100_000, b'{"a": 1' + b"0" * 10_000 + b"}")
ODD = (None, [], {}, "x", 3, -1, 0, 0.5, True, [1, 2], {"a": 1}, ...)  # ...: left out

VALUES = (*ODD, "a\0b", "x" * 5000, "..", 1e300, 1e999, float("nan"))


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


@pytest.fixture(params=[5, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
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


def problems(case, code, lines, named, must):
    """Returns a list of what is wrong with how a command ended; see try_contents."""
    result, last, wrong = "refused" if code else "handled", "".join(lines[-1:]), []
    one_line = code == 1 and len(lines) == 1 and last.startswith("error: ")
    if code and not one_line and not (code == 2 and USAGE.match(last)) or "MemoryError" in last:
        wrong.append("not refused in one line")
    if code and not re.search(named, last):
        wrong.append(f"does not name {named}")
    if must not in (None, result) or lines and not code:
        wrong.append(f"was {result}")
    return wrong and [f"{case!r:.700}: {', '.join(wrong)}: {' / '.join(lines[-8:])[:1500]}"]


def checksums(folder):
    """Returns a checksum of each file of a folder that a refused command must leave alone."""
    files = [path for path in folder.rglob("*")
             if path.is_file() and not path.name.endswith((".lock", "log.jsonl"))]
    return {path: zlib.crc32(path.read_bytes()) for path in files
            if folder / "out" not in path.parents  # what stands there a second try goes on from
            or path.name in ("samples.jsonl", "ollm.json") or path.suffix == ".tmp"}


def put(path, content):
    """Writes bytes, text or something for JSON to a file; None takes it away."""
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if content is not None:
        content = content if isinstance(content, (bytes, str)) else json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def try_contents(path, contents, command, cwd, must=None, named=None, most=None):
    """Runs `command` with each of the contents in the file, or with `most` drawn ones.

    must: "refused" or "handled", if only one is right
    named: pattern that the error must have, if not the file's name
    """
    wrong, original = [], path.read_bytes() if path.exists() else None
    for content in random.Random(0).sample(contents, min(most or len(contents), len(contents))):
        put(path, content)
        before = checksums(cwd)
        code, lines, _ = end(command, cwd)
        wrong += problems(content, code, lines, path.name if named is None else named, must)
        if code and checksums(cwd) != before:
            wrong.append(f"{content!r:.700}: has changed {checksums(cwd).items() ^ before.items()}")
        put(path, original)
        for left in ("out", "half", "runs", "base/predictions"):
            shutil.rmtree(cwd / left, ignore_errors=True)
    assert not wrong, "\n".join(wrong)


def cuts(content):
    """Returns a file's bytes, cut at several places."""
    return [content[:n * len(content) // 10] for n in (0, 1, 5, 9)] + [content[:1], content[:-1]]


def flips(content, rng, count, end=None):
    """Returns copies of a file's bytes, each with one bit flipped, before the byte `end`."""
    places = [rng.randrange(end or len(content)) for _ in range(count)]
    return [content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1:]
            for place in places]


def write_number(content, place, number, form="<I"):
    """Returns the bytes with a number written over a place."""
    packed = struct.pack(form, number)
    return content[:place] + packed + content[place + len(packed):]


def change(value, key, new):
    """Returns a copy of a dict with another value at a key; ... leaves it out."""
    return {k: v for k, v in value.items() if k != key} | ({} if new is ... else {key: new})


# ---- pictures and recordings ---------------------------------------------------------------------


def picture(format="PNG", mode="RGB", size=(40, 30)):
    """Returns a picture as a file's bytes."""
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


def png_claiming(*size):
    """Returns a PNG, its checksum right, that claims to be so large."""
    whole, header = picture(), b"IHDR" + struct.pack(">II", *size) + b"\x08\2\0\0\0"
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


def sound(format="WAV", rate=16_000, seconds=0.5, channels=1, value=None, **options):
    """Returns a recording as a file's bytes: noise, or one value throughout."""
    file, shape = io.BytesIO(), (round(seconds * rate), channels)
    noise = np.random.default_rng(0).normal(0, 0.1, shape)
    wave = noise if value is None else np.full(shape, float(value))
    soundfile.write(file, wave, rate, format=format, **options)
    return file.getvalue()


def try_files(key, folder, formats, good, bad):
    """Checks a prepared folder of pictures or recordings: `data.py check` must find the bad ones.

    formats: {format: a whole file}, whose spoilt copies are checked, too
    good, bad: {name: bytes, or a function that makes the path}
    """
    good |= {f"whole.{form}": content for form, content in formats.items()}
    files, rng, rows, wrong = {**good, **bad}, random.Random(0), [], []
    for form, whole in formats.items():
        for content in (*cuts(whole), *flips(whole, rng, 15), *flips(whole, rng, 15, end=60)):
            files[f"spoilt {len(files)}.{form}"] = content
    for number, (name, content) in enumerate(files.items()):
        path = folder / f"{number}{Path(name).suffix}"
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
        rows.append({"id": name, key: path.name, "question": "what", "answer": "a"})
    write_json_lines(folder / "samples.jsonl", rows)

    code, lines, out = end(("data.py", "check", "."), folder)
    assert not problems("check", code, lines, "samples.jsonl", "refused")
    errors = {int(line.split(":")[1]): [f"error: {line}"] for line in out.splitlines()}
    must = dict.fromkeys(good, "handled") | dict.fromkeys(bad, "refused")
    for number, row in enumerate(rows, 1):
        lines = errors.get(number, [])
        wrong += problems(row["id"], len(lines), lines, row[key], must.get(row["id"]))
    assert not wrong, "\n".join(wrong)


def test_pictures(tmp_path):
    formats = {form: picture(form) for form in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")}
    formats |= {f"{mode}.TIFF": picture("TIFF", mode) for mode in ("I", "F", "CMYK")}
    for form in ("PNG", "TIFF"):
        file = io.BytesIO()
        Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(file, form)
        formats[f"16 bit.{form}"] = file.getvalue()
    good = {f"{mode}.tiff": picture("TIFF", mode) for mode in ("1", "L", "LA", "CMYK", "I", "F")}
    good |= {"png as.jpg": picture(), "P.png": picture(mode="P"), "1x1.png": picture(size=(1, 1)),
             "wide.png": picture(size=(20_000, 2)), "high.png": picture(size=(2, 20_000)),
             "16 bit.png": Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save}
    bad = {f"{w} x {h}.png": png_claiming(w, h)
           for w, h in ((2**31 - 1, 2**31 - 1), (2**32 - 1, 1), (50_000, 50_000), (0, 7))}
    bad |= {"empty.png": b"", "text.png": b"no picture\n", "nothing.png": lambda path: None,
            "folder.png": Path.mkdir, "loop.png": lambda path: path.symlink_to(path.name),
            "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
            "half.png": picture()[:300], "speech.png": sound()}
    try_files("image", tmp_path, formats, good, bad)


def test_recordings(tmp_path):
    wav, flac = sound(), sound("FLAC")
    formats = {form: sound(form, 24_000) for form in (
        "WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "W64", "RF64", "WAVEX", "CAF")}
    formats |= {"opus": sound("OGG", 24_000, subtype="OPUS"),
                "flac24": sound("FLAC", subtype="PCM_24"), "ima": sound(subtype="IMA_ADPCM"),
                "float": sound(subtype="FLOAT", channels=2)}
    good = {f"{rate} Hz.flac": sound("FLAC", rate) for rate in (8_000, 11_025, 44_100, 96_000)}
    good |= {"6 channels.wav": sound(channels=6), "24 bit.flac": sound("FLAC", subtype="PCM_24"),
             "30 s.wav": sound(seconds=30), "one sample.wav": sound(seconds=1 / 16_000)}
    bad = {f"{rate} Hz.wav": write_number(wav, 24, rate) for rate in (0, 1, 16_001, 2**31 - 1)}
    bad |= {f"{value}.wav": sound(value=value, subtype="FLOAT") for value in (np.nan, np.inf)}
    bad |= {"long.wav": sound(seconds=31, rate=8_000), "no samples.wav": sound(seconds=0),
            "too loud.wav": sound(value=1e300, subtype="DOUBLE"), "empty.flac": b"",
            "text.wav": b"no sound\n", "picture.flac": picture(), "folder.wav": Path.mkdir,
            "2^36 samples.flac": flac[:21] + bytes([flac[21] | 15]) + b"\xff" * 4 + flac[26:]}
    try_files("audio", tmp_path, formats, good, bad)


# ---- lines of samples.jsonl ----------------------------------------------------------------------


def test_lines_of_samples(place, most):
    path = place / "part/samples.jsonl"
    first, line, third = path.read_bytes().splitlines()
    good, long = json.loads(line), "red " * 25_000
    paths = ("", "../part/samples.jsonl", "/etc/passwd", "..", ".", "a\0b", "x" * 5000, "no/such",
             "images", "samples.jsonl")
    refused = [{**good, key: value} for key, value in [
        *itertools.product(("image", "question", "audio", "answer"), (None, 3, [], {}, True)),
        *itertools.product(("question", "answer"), ("", " \n\t", long)),
        *itertools.product(("image", "audio"), paths), ("phase", None), ("phase", "x")]]
    refused += [change(good, key, ...) for key in ("question", "audio", "answer")]
    refused += [*BROKEN_JSON, line[:-9], b"   ", b'{"id": "\xff"}', line * 2, line + b"\0"]
    handled = [{**good, key: "red \u202e\u0301 \U0001f600"} for key in ("id", "question", "answer")]
    handled += [{**good, "more": [None]}, line + b"\r", b"  " + line + b" \t"]
    either = [{**good, key: "red \0 circle"} for key in ("id", "question", "answer")]
    either.append({**good, "question": "<img><IMG_CONTEXT></img><|im_end|>"})
    for lines, must in ((refused, "refused"), (handled, "handled"), (either, None)):
        lines = [new if isinstance(new, bytes) else json.dumps(new).encode() for new in lines]
        try_contents(path, [b"\n".join([first, new, third]) for new in lines], TRAIN, place, must,
                     "samples.jsonl:2:", most and 2 * most)
    files = [None, b"", b"\n\n", bytes(500), picture(), path.read_text().encode("utf-16")]
    try_contents(path, files, TRAIN, place, "refused")


def test_lines_that_are_scored(place, most, answers):
    path, contents = place / "part/samples.jsonl", []
    first, second, third = path.read_text().splitlines()
    line = {**json.loads(second), "label": "a red circle", "false": "blue", "scene": "a red circle"}
    keys, kinds = ("label", "scene", "kind", "false"), ("color", "description", "relation")
    for kind, key, value in itertools.product(kinds, keys, ODD):
        odd = json.dumps(change({**line, "kind": kind}, key, value))
        contents.append(f"{first}\n{odd}\n{third}\n")
    for script in ("eval.py", "mmalign.py"):
        try_contents(path, contents, (script, "run", "--data", "part"), place, None, "part", most)


# ---- runs, checkpoints and models ----------------------------------------------------------------


def try_weights(path, command, place, named, most):
    """Runs `command` with a broken safetensors file. A flipped bit may pass, but not raise."""
    content, tensors = path.read_bytes(), load_file(path)
    first = sorted(name for name in tensors if "decoder" not in name)[0]
    broken = [*cuts(content), with_tensors(change(tensors, first, ...), path)]
    broken += [write_number(content, 0, number, "<Q") for number in (0, 10**8, 2**60)]
    try_contents(path, broken, command, place, "refused", named, most)
    header = 8 + int.from_bytes(content[:8], "little")
    flipped = flips(content, random.Random(5), 20, header)
    try_contents(path, flipped, command, place, None, named, most)


def with_tensors(tensors, path, **metadata):
    """Returns the bytes of a safetensors file like that at `path`, with other content."""
    with safe_open(path, framework="pt") as file:
        return save(tensors, {**file.metadata(), **metadata})


@pytest.mark.parametrize("folder, command, names", [
    ("run", TRAIN, ("config.json", "preprocessor_config.json")),
    ("base", TRAIN, ("config.json", "tokenizer.json", "tokenizer_config.json")),
    ("internvl2", ALIGN, ("config.json", "tokenizer_config.json", "vocab.json")),
    ("whisper", ALIGN, ("config.json", "preprocessor_config.json")),
])
def test_models(place, most, folder, command, names):
    """A run, its base, an InternVL2 in its original layout, and a Whisper."""
    rng, named = random.Random(7), f"{folder}|samples.jsonl"
    try_weights(place / folder / "model.safetensors", command, place, folder, most)
    for path in (place / folder / name for name in names):
        value = json.loads(path.read_text())
        pairs = [(rng.choice(list(value)), rng.choice(ODD)) for _ in range(50)]
        odd = [None, *(change(value, *pair) for pair in pairs)]
        try_contents(path, odd, command, place, None, named, most)
        try_contents(path, list(BROKEN_JSON), command, place, "refused", folder, most)


def test_other_files_of_an_internvl2(place):
    index = ["", [], {}, {"weight_map": []}, {"weight_map": {"a": 3}}]
    merges = [None, b"", b"\xff\xfe", b"#version: 0.2\na\n", b"a b c d\n"]
    for name, contents in (("model.safetensors.index.json", index), ("merges.txt", merges)):
        try_contents(place / "internvl2" / name, contents, ALIGN, place, None, "internvl2")


def test_what_a_run_says_of_itself(place):
    path = place / "run/ollm.json"
    about = json.loads(path.read_text())
    contents = [*BROKEN_JSON, *(change(about, key, ...) for key in about)]
    contents += [{**about, "base": base} for base in (
        "", ".", "/", "/etc/passwd", "../part", "a\0b", "x" * 5000, "no/such", "../run")]
    contents.append({**about, "base_fingerprint": "0" * 64})
    for command in (TRAIN, ("eval.py", "run", "--data", "part")):
        try_contents(path, contents, command, place, "refused", "")


def test_checkpoints(place, most, monkeypatch):
    """A training is interrupted after its first step, and its checkpoint is then broken."""
    def interrupt(*_):
        raise KeyboardInterrupt

    command = (*TRAIN, "--max-steps", 2, "--global-batch", 2, "--save-every", 1, "--out", "half")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "save", interrupt)
        assert run_here(*command, cwd=place).returncode == 130
    path = place / "half/checkpoint.safetensors"
    whole, about = path.read_bytes(), json.loads(safe_open(path, "pt").metadata()["about"])
    odd = ["", [], 3, {**about, "step": 9}, *(change(about, key, ...) for key in about)]
    odd += [{**about, "config": {**about["config"], key: 0.5}} for key in ("alpha", "data", "init")]
    contents = [with_tensors(load_file(path), path, about=json.dumps(new)) for new in odd]
    try_weights(path, command, place, "half", most)
    try_contents(path, contents, command, place, "refused", "half")
    try_contents(path, [whole], command, place, "handled")


# ---- benchmarks and sources ----------------------------------------------------------------------

IMAGE = base64.b64encode(picture()).decode()
TSV = ("index\timage\tquestion\tanswer\tsplit\n"
       f"0\t{IMAGE}\twhat\t['a']\tval\n1\t0\twhich\tb\tval\n")


def test_benchmarks(place, most, answers):
    path, command = place / "DocVQA_VAL.tsv", ("eval.py", "base", "--bench", "DocVQA_VAL.tsv")
    bad = [None, b"", TSV[:20], picture(), TSV.encode("utf-16"), TSV.encode() + b"\xff\t\n"]
    bad += [TSV.replace(*pair) for pair in (
        ("index", "number"), ("image", "picture"), ("question", "words"), ("\tb\tval", "\tb"),
        ("\tb\tval", "\tb\tval\t7"), ("\tb\t", "\t\t"), ("which", ""), ("\n1\t", "\n0\t"),
        ("\t0\t", "\t7\t"), (IMAGE, "x" * 99), (IMAGE, IMAGE[:99]), (IMAGE, ""))]
    well = [TSV, b"\xef\xbb\xbf" + TSV.encode(), TSV.replace("\n", "\r\n")]
    well += [TSV.replace("['a']", new) for new in ("[" * 9999, "nan", "['\\d', 1e999]")]
    try_contents(path, bad, command, place, "refused", most=most)
    try_contents(path, well, command, place, "handled", most=most)
    try_contents(path, cuts(TSV), command, place)


def test_sources(place, most):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    dialogue = {"image": "000000.png", "conversations": turns}
    row = {"image_path": "000000.png", "true_caption": "the red star", "relation_name": "above",
           "false_caption": "the blue star", **{f"bbox_{side}": 9 for side in "xywh"}}
    rows, path = [dialogue, row, {**row, "true_caption": "the green star"}], place / "file.json"
    put(place / "good.json", rows)
    llava = ("data.py", "llava", "--annotations", path.name, "--tts", "espeak")
    aro = ("mmalign.py", "build", "--relation", path.name, "--attribution", "good.json", "--n", 2)
    values = (*ODD, "a\0b", "x" * 5000, "../part", 1e999, float("nan"), [{"from": []}] * 2)
    for good, command in ((dialogue, llava), (row, aro)):
        command = (*command, "--images", "part/images", "--out", "out")
        odd = [change(good, *pair) for pair in itertools.product(good, values)] + [*ODD[:-1]]
        try_contents(path, [odd + rows], command, place, "handled")
        try_contents(path, [None, *BROKEN_JSON], command, place)


def test_tables_of_recordings(place, most):
    path, row = place / "x.jsonl", {"audio": "audio/000000.flac", "text": "red circle"}
    command = ("data.py", "manifest", "--manifest", "x.jsonl", "--root", "part", "--out", "out")
    columns = ("audio", "text", "id", "start", "seconds", "end", "duration", "offset", "channel")
    lines = [change(row, *pair) for pair in itertools.product(columns, VALUES)]
    contents = [f"{json.dumps(row)}\n{json.dumps(line)}" for line in lines]
    try_contents(path, contents, command, place, most=most)
    try_contents(path, list(BROKEN_JSON[1:]), command, place, "refused")


def test_tables_in_text(place, most):
    """Common Voice's and a manifest's TSV: bits flipped, cut, marked, packed."""
    clip, rng = "audio/000000.flac", random.Random(0)
    commonvoice = (f"client_id\tpath\tsentence\tup_votes\na\t{clip}\tRed circle.\t2\n"
                   "b\taudio/000001.flac\tA blue star!\t0\n")
    manifest = (f"id\taudio\ttext\tstart\tseconds\nx\t{clip}\tred\t0.1\t0.5\n"
                f"y\t{clip}\tblue\t\t0.25\nz\t{clip}\tstar\t0.2\t\n")
    to = ("part", "--out", "out")
    for name, text, command in (
            ("x.tsv", commonvoice, ("data.py", "commonvoice", "--tsv", "x.tsv", "--clips", *to)),
            ("y.tsv", manifest, ("data.py", "manifest", "--manifest", "y.tsv", "--root", *to))):
        whole, bad = text.encode(), [None, b"a\tb\n1\t2\n", picture(), text.encode("utf-16"), b""]
        bad += [text[:-1].rpartition("\t")[0], text + "x", text.replace("\t", ",")]
        well = [whole, b"\xef\xbb\xbf" + whole, text.replace("\n", "\r\n"), whole + b"\n\n"]
        try_contents(place / name, bad, command, place, "refused")
        try_contents(place / name, well, command, place, "handled")
        odd = [bytes(500), *cuts(whole), *flips(whole, rng, 150), *flips(whole, rng, 30, end=50)]
        try_contents(place / name, odd, command, place, most=most)
        packed, command = gzip.compress(whole), [f"{word}.gz" if word == name else word
                                                 for word in command]
        odd = [*cuts(packed)[:-1], *flips(packed, rng, 40)]
        try_contents(place / f"{name}.gz", odd, command, place, most=most)


def nested(value, new):
    """Yields copies of a JSON value, in each of which another part of it is replaced by `new`."""
    if not isinstance(value, (dict, list)):
        return
    for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
        for changed in (new, *nested(part, new)):
            copy = value.copy()
            copy[key] = changed
            if changed is ...:
                del copy[key]
            yield copy


def test_lhotse_s_cuts(place, most):
    """Every part of a cut is replaced by every odd value."""
    cut = {"id": "x", "start": 0.1, "duration": 0.5, "channel": 0, "type": "MonoCut",
           "supervisions": [{"id": "x", "start": 0.1, "duration": 0.25, "text": "red",
                             "custom": {"texts": ["Blue."]}}],
           "recording": {"id": "x", "sampling_rate": 16_000, "transforms": [], "sources": [
               {"type": "file", "channels": [0], "source": "audio/000000.flac"}]}}
    path, command = place / "z.jsonl", ("data.py", "manifest", "--manifest", "z.jsonl", "--root",
                                        "part", "--out", "out")
    cuts = [changed for value in VALUES for changed in nested(cut, value)]
    contents = [f"{json.dumps(cut)}\n{json.dumps({'id': 'y', **changed})}" for changed in cuts]
    contents = [content.replace('"id": "x"', '"id": "first"', 1) for content in contents]
    try_contents(path, contents, command, place, most=most and 4 * most)
    try_contents(path, [json.dumps(cut), json.dumps({**cut, "id": 3})], command, place, "handled")


# ---- command lines -------------------------------------------------------------------------------

COMMANDS = """
    eval.py nowhere; eval.py part; eval.py run/ollm.json; eval.py whisper; eval.py run --n 1e3
    eval.py run --data nowhere; eval.py run --data run; eval.py run --data run/ollm.json
    eval.py run --bench part; eval.py run --bench MME.tsv; eval.py run --question red --image part
    eval.py run --question red --image none.png
    eval.py --audio part/audio/000000.flac --image PICTURE base
    eval.py run --image PICTURE --audio PICTURE; eval.py run --image PICTURE --question unheard-of
    mmalign.py nowhere; mmalign.py run --data nowhere
    TRAIN --init nowhere; TRAIN --init part; TRAIN --init run/ollm.json; TRAIN --data nowhere
    TRAIN --out run/ollm.json; TRAIN --out base; TRAIN --out /proc/x; TRAIN --data part run
    TRAIN --alpha nan; TRAIN --seed x; ALIGN --whisper internvl2; ALIGN --whisper part
    ALIGN --init whisper; ALIGN --init nowhere; data.py check nowhere; data.py check run
    TRAIN --max-steps 0; TRAIN --max-steps -1; TRAIN --max-steps 1.5; TRAIN --save-every 0
    TRAIN --save-every -1; TRAIN --audio-seconds 40; TRAIN --audio-seconds nan; TRAIN --lr nan
    TRAIN --audio-seconds -1; TRAIN --audio-seconds inf; TRAIN --workers -1; TRAIN --micro-batch 0
    TRAIN --micro-batch -2; TRAIN --global-batch 0; TRAIN --lr 0; TRAIN --lr -0.1; TRAIN --lr inf
    TRAIN --temperature 0; TRAIN --temperature -1; TRAIN --temperature nan; TRAIN --max-tiles 0
    TRAIN --temperature inf; TRAIN --max-tiles -1; TRAIN --alpha 1.5; TRAIN --on-policy -0.1
    TRAIN --on-policy nan; TRAIN --seed -1; TRAIN --seed 99999999999999999999
    eval.py run --n 0; eval.py run --n -1; eval.py run --max-tiles 0; eval.py run --batch 0
    eval.py run --batch -1; eval.py run --show -1; eval.py run --bench MME.tsv --max-new-tokens 0
    data.py shapes --n 0; data.py shapes --n -5; data.py shapes --scenes 0; data.py shapes --test 0
    data.py shapes --clips -1; data.py shapes --label-noise 1.5; data.py shapes --label-noise nan
    data.py shapes --other-hand -1; data.py librispeech --root part --out out --n 0
    data.py librispeech --root part --out out --n -3
    data.py librispeech --root part --out out --seed 99999999999999999999
    mmalign.py build --images part --relation x --attribution x --out out --n 0
    mmalign.py build --images part --relation x --attribution x --out out --n -2
    data.py speak red --out part; data.py speak red --out x.y; data.py shapes --out run/ollm.json
"""


@pytest.mark.parametrize("line", re.split(r"[;\n]\s*", COMMANDS.strip()))
def test_command_lines(place, line):
    """The error names the last argument."""
    words = {"TRAIN": TRAIN, "ALIGN": ALIGN, "PICTURE": ["part/images/000000.png"]}
    for name, arguments in words.items():
        line = line.replace(name, " ".join(map(str, arguments)))
    command = line.split()
    try_contents(place / "none", [None], command, place, "refused", command[-1])
