"""Broken inputs: each is refused in one line that names the file, or simply handled.

After a refusal nothing is half-written, and nothing that was there is lost. Some inputs are written
by hand, others are drawn by a seed: bits flipped, files cut, values of another type.
"""

import io
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

from plumbing.files import write_json_lines

BAR = re.compile(r"\d+%\||\d+\w+ \[\d\d:\d\d")  # of tqdm
TOO_FAR = re.compile("MemoryError|allocate|Ghostscript")  # more was tried than reading it
USAGE = re.compile(r"\S+ ?\w*: error: ")  # of argparse
TRAIN = ("train.py", "--init", "run", "--data", "part", "--out", "out", "--device", "cpu",
         "--max-steps", 1, "--global-batch", 4)
ALIGN = ("train.py", "--preset", "internvl2-1b", "--stage", "audio-text", *TRAIN[3:],
         "--init", "internvl2", "--whisper", "whisper")


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
    """Returns a list of what is wrong with how a command ended.

    named: a pattern that the error must have; must: "refused" or "handled", if only one is right
    """
    result, last, wrong = "refused" if code else "handled", "".join(lines[-1:]), []
    one_line = code == 1 and len(lines) == 1 and last.startswith("error: ")
    if code and not one_line and not (code == 2 and USAGE.match(last)) or TOO_FAR.search(last):
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


def cuts(content):
    """Returns a file's bytes, cut at several places."""
    return [content[:n * len(content) // 10] for n in (0, 1, 5, 9)] + [content[:1], content[:-1]]


def flips(content, rng, count, end=None):
    """Returns copies of a file's bytes, each with one bit flipped, before the byte `end`."""
    places = [rng.randrange(end or len(content)) for _ in range(count)]
    return [content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1:]
            for place in places]


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


def sound(format="WAV", rate=16_000, seconds=0.5, channels=1, value=None, wave=None, **options):
    """Returns a recording as a file's bytes: a wave, one value throughout, or noise."""
    file, shape = io.BytesIO(), (round(seconds * rate), channels)
    if wave is None and value is None:
        wave = np.random.default_rng(0).normal(0, 0.1, shape)
    elif wave is None:
        wave = np.full(shape, float(value))
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


def write_number(content, place, number, form="<I"):
    """Returns the bytes with a number written over a place."""
    packed = struct.pack(form, number)
    return content[:place] + packed + content[place + len(packed):]


def test_recordings(tmp_path):
    wav, flac, noise = sound(), sound("FLAC"), np.random.default_rng(0).normal(0, 0.1, 8000)
    formats = {form: sound(form, 24_000) for form in (
        "WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "W64", "RF64", "WAVEX", "CAF")}
    formats |= {"opus": sound("OGG", 24_000, subtype="OPUS"),
                "flac24": sound("FLAC", subtype="PCM_24"), "ima": sound(subtype="IMA_ADPCM"),
                "float": sound(subtype="FLOAT", channels=2)}
    good = {f"{rate} Hz.flac": sound("FLAC", rate) for rate in (8_000, 11_025, 44_100, 96_000)}
    good |= {"6 channels.wav": sound(channels=6), "24 bit.flac": sound("FLAC", subtype="PCM_24"),
             "30 s.wav": sound(seconds=30), "one sample.wav": sound(seconds=1 / 16_000)}
    # A stream's writer does not know its end: ffmpeg, sox and arecord write so into a pipe.
    good |= {f"stream {n}.wav": write_number(write_number(wav, 4, n), 40, n)
             for n in (2**32 - 1, 2**31 - 1, 2**31)}
    good |= {"loud.wav": sound(wave=4 * noise, subtype="FLOAT"),
             "one side.wav": sound(wave=np.stack([noise, 0 * noise], 1)),
             "half against.wav": sound(wave=np.stack([noise, -0.5 * noise], 1))}
    bad = {f"{rate} Hz.wav": write_number(wav, 24, rate) for rate in (0, 1, 16_001, 2**31 - 1)}
    bad |= {f"{value}.wav": sound(value=value, subtype="FLOAT") for value in (np.nan, np.inf)}
    bad |= {"long.wav": sound(seconds=31, rate=8_000), "no samples.wav": sound(seconds=0),
            "too loud.wav": sound(value=1e300, subtype="DOUBLE"), "empty.flac": b"",
            "text.wav": b"no sound\n", "picture.flac": picture(), "folder.wav": Path.mkdir,
            "2^36 samples.flac": flac[:21] + bytes([flac[21] | 15]) + b"\xff" * 4 + flac[26:],
            "no length.flac": flac[:21] + bytes([flac[21] & 240, 0, 0, 0, 0]) + flac[26:],
            "no length.nist": sound("NIST", seconds=8)[:100_000]}
    bad |= {f"{n} times.wav": sound(wave=n * noise, subtype="DOUBLE") for n in (128, 32_767)}
    bad |= {f"channels {n}.wav": sound(wave=np.stack([noise, -n * noise], 1)) for n in (0.99, 1)}
    # Cut off: the words of all of it would stand beside what is left.
    for form, subtype in (*((form, None) for form in list(formats)[:10]), ("OGG", "OPUS"),
                          ("WAV", "IMA_ADPCM"), ("WAV", "ULAW"), ("WAVEX", "PCM_24")):
        whole = sound(form, seconds=8, subtype=subtype)
        good[f"whole {subtype}.{form}"] = whole
        bad |= {f"{share} of {subtype}.{form}": whole[: int(share * len(whole))]
                for share in (0.95, 0.4)}
    try_files("audio", tmp_path, formats, good, bad)


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
    data.py shapes --paraphrase -1; data.py librispeech --root part --out out --n 0
    data.py librispeech --root part --out out --n -3
    data.py librispeech --root part --out out --seed 99999999999999999999
    mmalign.py build --images part --relation x --attribution x --out out --n 0
    mmalign.py build --images part --relation x --attribution x --out out --n -2
    data.py speak red --out part; data.py speak red --out x.y; data.py shapes --out run/ollm.json
    data.py shapes --parts none; data.py tea; data.py speak red --voice martian
    train.py --preset internvl2-1b --stage vision-text; ALIGN --init OpenGVLab/InternVL2-1B
    analysis.attention base; analysis.attention ./run run; analysis.probe base; TRAIN --init base
    mmalign.py build --images part --relation x --attribution x --out out --tts parrot
"""


@pytest.mark.parametrize("line", re.split(r"[;\n]\s*", COMMANDS.strip()))
def test_command_lines(place, line):
    """The error names the last argument."""
    words = {"TRAIN": TRAIN, "ALIGN": ALIGN, "PICTURE": ["part/images/000000.png"]}
    for name, arguments in words.items():
        line = line.replace(name, " ".join(map(str, arguments)))
    command, before = line.split(), checksums(place)
    code, lines, _ = end(command, place)
    wrong = problems(line, code, lines, command[-1], "refused")
    if checksums(place) != before:
        wrong.append(f"has changed {checksums(place).items() ^ before.items()}")
    for left in ("out", "runs"):
        shutil.rmtree(place / left, ignore_errors=True)
    assert not wrong, "\n".join(wrong)
