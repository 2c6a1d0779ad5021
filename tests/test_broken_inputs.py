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
from model import OLLM
from plumbing.files import readable_errors
from real.checkpoints import load_audio_encoder

BAR = re.compile(r"\d+%\||\d+\w+ \[\d\d:\d\d")  # a line of tqdm's
USAGE = re.compile(r"\S+ ?\w*: error: ")  # of argparse
TALLY = {}  # {kind of input: Counter of "refused", "handled", "failed"}
TRAIN = ("train.py", "--init", "run", "--data", "part", "--out", "out", "--device", "cpu",
         "--max-steps", 1, "--global-batch", 4)
BROKEN_JSON = (b"", b"{", b"[]", b"3", b"null", b'"settings"', b"\xff\xfe{\x00}\x00", b"[" * 100_000,
               b'{"a": 1' + b"0" * 10_000 + b"}")
ODD = (None, [], {}, "x", 3, -1, 0, 0.5, True, [1, 2], {"a": 1}, ...)  # ...: left out


@pytest.fixture(scope="module", autouse=True)
def table():
    """Prints what was tried, after all tests."""
    yield
    print("\n\n| broken input | tried | refused in one line | handled | failed |")
    for kind, counts in [*TALLY.items(), ("all", sum(TALLY.values(), Counter()))]:
        print(f"| {kind} | {counts.total()} | {counts['refused']} | {counts['handled']} "
              f"| {counts['failed']} |")


@pytest.fixture(params=[16, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def most(request):
    """How many cases of a kind to try; None: all."""
    return request.param


@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    """A base, a run, a prepared folder of three lines, an LVLM and a Whisper, to be spoilt."""
    folder = save_runs(tmp_path_factory.mktemp("broken"), "run")
    (folder / "part").mkdir()
    for name in ("images", "audio"):
        shutil.copytree(world / "test" / name, folder / "part" / name)
    lines = (world / "test/samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "part/samples.jsonl").write_text("".join(lines[:3]))
    build_internvl2(folder)
    build_whisper(folder / "whisper")
    return folder


# ---- the property --------------------------------------------------------------------------------


@contextlib.contextmanager
def bounded(seconds=30, gigabytes=2):
    """Meanwhile, what takes longer or more memory than that fails."""
    def interrupt(*_):
        raise KeyboardInterrupt(f"took more than {seconds} s")

    before, usual = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, interrupt)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + gigabytes * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, usual)
        resource.setrlimit(resource.RLIMIT_AS, before)


def end(command, cwd):
    """Runs a command or a function here; returns (exit code, lines of stderr without bars)."""
    errors, code = io.StringIO(), 0
    with warnings.catch_warnings(record=True) as warned, bounded():
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            if callable(command):
                with contextlib.chdir(cwd), readable_errors():
                    command()
            else:
                done = run_here(*command, cwd=cwd)
                code = done.returncode
                errors.write(done.stderr)
        except SystemExit as exit:
            code = 1
            errors.write(str(exit.code))
        except BaseException:  # a user would see a traceback
            code = 1
            errors.write(traceback.format_exc())
    lines = [str(warning.message) for warning in warned] + re.split("[\r\n]", errors.getvalue())
    return code, [line for line in lines if line.strip() and not BAR.search(line)]


def judge(kind, case, code, lines, names, must=None):
    """Counts a case; returns what is wrong with it, or None.

    names: what the error must name; must: "refused" or "handled", where only one of them is right
    """
    result, wrong = "handled" if code == 0 else "refused", None
    if code == 0 and lines:
        wrong = "says something on stderr"
    if code:
        one_line = len(lines) == 1 and lines[0].startswith("error: ") and code == 1
        is_usage = bool(lines) and USAGE.match(lines[-1]) and code == 2
        missing = [name for name in names if name not in lines[-1]]
        if not one_line and not is_usage or "MemoryError" in lines[-1]:
            wrong = "not refused in one line"
        elif missing:
            wrong = f"does not name {missing}"
    if must not in (None, result):
        wrong = f"was {result}"
    TALLY.setdefault(kind, Counter())["failed" if wrong else result] += 1
    return wrong and f"{case}: {wrong}: {' / '.join(lines[-8:])[:1500]}"


def assert_none(wrong):
    """Fails with a list of what is wrong, if anything is."""
    wrong = list(filter(None, wrong))
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong)


def contents(folder):
    """Returns a checksum of each file of a folder, but for locks, and what a stopped run may leave."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): zlib.crc32(path.read_bytes()) for path in files
            if path.name not in (".lock", "log.jsonl") and folder / "out" not in path.parents}


@contextlib.contextmanager
def replaced(path, content):
    """Meanwhile, the file has this content: bytes, text, something for JSON, or None: no file."""
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


def try_cases(kind, cases, command, cwd, most=None):
    """Runs `command` with each of the cases in place, or with `most` drawn ones.

    cases: (name, path, content, names in the error, "refused", "handled" or None)
    Asserts that all end as they should, and that a refusal leaves all as it was.
    """
    wrong, cases = [], random.Random(0).sample(cases, min(most or len(cases), len(cases)))
    for case, path, content, names, must in cases:
        with replaced(path, content):
            before = contents(cwd)
            code, lines = end(command, cwd)
            wrong.append(judge(kind, case, code, lines, names, must))
            if code and contents(cwd) != before:
                wrong.append(f"{case}: something that was there has changed")
            for name in ("samples.jsonl", "ollm.json", "checkpoint.safetensors", "*.tmp", ".*.tmp"):
                if code and list((cwd / "out").glob(name)):
                    wrong.append(f"{case}: {name} is left, though refused")
        shutil.rmtree(cwd / "out", ignore_errors=True)
    assert_none(wrong)


def mutate(content, rng, flips, start=0, end=None):
    """Yields (name, bytes): a file cut at several places, and with single bits flipped."""
    for cut in (0, 1, len(content) // 10, len(content) // 2, 9 * len(content) // 10):
        yield f"cut at {cut}", content[:cut]
    for _ in range(flips):
        place, bit = rng.randrange(start, end or len(content)), rng.randrange(8)
        flipped = bytes([content[place] ^ 1 << bit])
        yield f"bit {bit} of byte {place}", content[:place] + flipped + content[place + 1:]


def change(value, path, new):
    """Returns a copy of a JSON object with another value at a path; ... leaves it out."""
    value = json.loads(json.dumps(value))
    *parents, last = path
    parent = value
    for key in parents:
        parent = parent[key]
    if new is ...:
        parent.pop(last, None)
    else:
        parent[last] = new
    return value


def leaves(value, path=()):
    """Yields the paths of all values inside a JSON object."""
    for key in value:
        yield (*path, key)
        if isinstance(value[key], dict):
            yield from leaves(value[key], (*path, key))


def odd_values(path, rng, count):
    """Yields cases of a JSON file, each with one value of another type or size, or left out."""
    value = json.loads(path.read_text())
    for _ in range(count):
        where, new = rng.choice(list(leaves(value))), rng.choice(ODD)
        name = f"{path.parent.name}/{path.name}: {'.'.join(where)} is {new!r}"
        yield name, path, change(value, where, new), (), None


def broken_json(path, names, must="refused"):
    """Returns cases of a file that is no JSON object."""
    return [(f"{path.parent.name}/{path.name}: {content[:12]}", path, content, names, must)
            for content in BROKEN_JSON]
