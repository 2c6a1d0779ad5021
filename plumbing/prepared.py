"""Prepared folders: how they are made, once and by one writer, and how their lines are read.

A line of samples.jsonl is a sample. What could not be used has a line in skipped.jsonl instead, an
id and the reason, and settings.json tells how the folder was made.
"""

import bisect
import functools
import hashlib
import json
import os
import random
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from plumbing.files import (
    BadInput,
    at,
    folder_lock,
    json_lines,
    read_json,
    write_json_lines,
    write_text,
)
from plumbing.media import VOICES, load_audio, load_image, save_sound, speak
from plumbing.processes import workers

INNER = "end", "wave", "pixels", "where", "folder"  # what only our own code adds to a sample
LISTS = ("annotations", "tsv", "manifest", "relation", "attribution")  # options that name a list


# ---- reading -------------------------------------------------------------------------------------


class Rows(Sequence):
    """What `read_rows` yields, as a list that keeps rows as JSON bytes, and their lengths.

    A million dicts take 1 GB, and reference counts copy them into every DataLoader worker; bytes
    stay shared.
    """

    def __init__(self, folders, forms=None):
        self.content, self.ends, self.lengths = bytearray(), array("q", [0]), array("i")
        self.folders, self.firsts = folders, []  # firsts: each folder's first index
        for folder in folders:
            self.firsts.append(len(self))
            for row in read_rows([folder], forms):
                del row["where"], row["folder"]  # the same in all rows but for a number
                self.content += json.dumps(row).encode()
                self.ends.append(len(self.content))
                self.lengths.append(len(row.get("question", "")) + len(row["answer"]))

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        """Returns a row, a new dict each time."""
        index = range(len(self))[index]  # raises IndexError behind the last one
        part = bisect.bisect_right(self.firsts, index) - 1
        folder, number = Path(self.folders[part]), index - self.firsts[part] + 1
        row = json.loads(self.content[self.ends[index]: self.ends[index + 1]])
        return {**row, "where": f"{folder}/samples.jsonl:{number}", "folder": str(folder)}


def read_rows(folders, forms=None):
    """Yields the lines of prepared folders as dicts, with "where" (file:line) and "folder".

    forms: of the question; every row must have these, others are left out. None: as they stand
    Raises BadInput with the file and line.
    """
    for folder in map(Path, folders):
        number = 0
        for number, (where, sample) in enumerate(json_lines(folder / "samples.jsonl"), 1):
            with at(where):
                sample = {key: value for key, value in sample.items() if key not in INNER}
                check_sample(sample)
                for form in ("question", "audio"):
                    if forms is not None and form not in forms:
                        sample.pop(form, None)
                    elif forms is not None and form not in sample:
                        raise BadInput(f"has no {form}, which is needed here")
            if "group" in sample:  # other folders have groups of the same name
                sample["group"] = f"{folder}/{sample['group']}"
            yield {"id": str(number), **sample, "where": where, "folder": str(folder)}
        if not number:
            raise BadInput(f"{folder}/samples.jsonl: has no sample")


def check_sample(sample):
    """Raises an error unless a line has an answer, a question or speech, and files inside."""
    if not sample["answer"].strip():
        raise BadInput("the answer is empty")
    if "question" not in sample and "audio" not in sample:
        raise BadInput("there is no question, neither as text nor as speech")
    if "question" in sample and not sample["question"].strip():
        raise BadInput("the question is empty")
    if "after" in sample and not sample["question"].endswith(sample["after"]):
        raise BadInput("what comes after the speech is not the end of the question")
    if sample.get("phase", 0) not in (0, 1):
        raise BadInput(f"the phase is 0 or 1, not {sample['phase']!r}")
    for key in ("image", "audio"):
        path = Path(sample.get(key, ""))
        if path.is_absolute() or ".." in path.parts:
            raise BadInput(f"{key} must lie inside the folder, not at {path}")


def read_settings(folder):
    """Returns a folder's settings.json, how it was made; {} if there is none."""
    note = Path(folder) / "settings.json"
    return read_json(note) if note.exists() else {}


def speech_settings(folders):
    """Returns how the folders' questions are spoken: {"suffix", "tts", "voice"}.

    suffix  what becomes of format suffixes: "spoken", "written" or "dropped"
    tts     who speaks, "mms" or "espeak", and its voice (of MMS only; espeak-ng has many)
    All stand in settings.json; what it does not tell is dropped suffixes and espeak-ng. Raises
    BadInput if two suffixes differ: one model cannot be evaluated in both ways. Of several voices,
    the first folder's counts.
    """
    suffixes, voices = {}, []
    for folder in folders:
        settings = read_settings(folder)
        suffixes.setdefault(settings.get("suffix", "dropped"), folder)
        tts = settings.get("tts", "espeak")
        voices.append({"tts": tts, "voice": settings.get("voice") if tts == "mms" else None})
    if len(suffixes) > 1:
        each = ", ".join(f"{suffix} in {folder}" for suffix, folder in suffixes.items())
        raise BadInput(f"the format suffixes are {each}: prepare all folders with one --suffix")
    return {"suffix": next(iter(suffixes)), **voices[0]}


# ---- making --------------------------------------------------------------------------------------


def make_once(folder, settings, make):
    """Calls make() as the folder's only writer, unless it is finished already.

    settings: a dict, kept as settings.json; a folder in which other settings made files is refused
    """
    folder = Path(folder)
    with folder_lock(folder):
        note = folder / "settings.json"
        there = read_json(note) if note.exists() else settings
        other = [f"{key} {there.get(key)}, not {settings.get(key)}"
                 for key in {**there, **settings} if there.get(key) != settings.get(key)]
        if other and [*folder.glob("*/*"), *folder.glob("samples.jsonl")]:
            raise BadInput(f"{note}: the folder was made with {', '.join(other)}: "
                           "choose another --out, or delete it")
        write_text(note, json.dumps(settings) + "\n")
        if (folder / "samples.jsonl").exists():
            print(f"{folder}: there already")
            return

        for name in ("images", "audio"):
            (folder / name).mkdir(exist_ok=True)
        make()


def prepare(args, make):
    """Calls make(args) for the folder args.out, unless it is finished already.

    settings.json tells the arguments, and the SHA-256 of the files that list its rows: files in the
    folder are named by row, and must not be kept under another list's lines.
    """
    settings = {key: value for key, value in sorted(vars(args).items())
                if key != "out" and not callable(value)}
    for key in LISTS:
        if key in settings:
            with open(settings[key], "rb") as file:
                settings[f"{key}_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    make_once(args.out, settings, functools.partial(make, args))


def pick(tasks, n, seed):
    """Returns n of the tasks, drawn by the seed, in their old order; all of them if n is None."""
    n = len(tasks) if n is None else min(n, len(tasks))
    return [tasks[i] for i in sorted(random.Random(seed).sample(range(len(tasks)), n))]


def in_parallel(worker, tasks, desc, unit="sample"):
    """Yields the worker's results in the tasks' order, from all cores, with a bar."""
    with workers() as pool:
        results = pool.map(worker, tasks, chunksize=16)
        yield from tqdm(results, total=len(tasks), desc=desc, unit=unit)


def attempt(make, task, **options):
    """Worker: returns make(*task, **options), a line of samples.jsonl, or why there is none.

    task: begins with the line's id. A BadInput becomes a line of skipped.jsonl.
    """
    try:
        return make(*task, **options)
    except BadInput as error:
        return {"id": task[0], "skipped": str(error)}


def write(folder, results):
    """Writes skipped.jsonl and then samples.jsonl; prints how many were left out and why."""
    results = list(results)
    skipped = [line for line in results if "skipped" in line]
    lines = [line for line in results if "skipped" not in line]
    write_json_lines(folder / "skipped.jsonl", skipped)
    write_json_lines(folder / "samples.jsonl", lines)
    print(f"{folder}: {len(lines)} samples; {len(skipped)} left out (skipped.jsonl names them)")
    for why, count in count_reasons(skipped):
        print(f"{count:8}  {why}")


def count_reasons(skipped):
    """Returns [(reason, how often)] of skipped lines, the most frequent first."""
    return Counter(line["skipped"].split(":")[0] for line in skipped).most_common()


def check_inside(folder, name):
    """Raises BadInput unless a picture lies in the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts or not os.path.isfile(folder / name):
        raise BadInput(f"the picture is missing: {name}")


# ---- two commands --------------------------------------------------------------------------------


def add_commands(commands):
    """Adds the subcommands `check` and `speak` to data.py."""
    sub = commands.add_parser("check", help="read every line, picture and recording of a folder")
    sub.add_argument("folder", help="the prepared folder")
    sub.set_defaults(run=lambda args: check_folder(args.folder))
    sub = commands.add_parser("speak", help="speak a text with espeak-ng")
    sub.add_argument("text", help="what to say")
    sub.add_argument("--voice", default=VOICES[0], help="an espeak-ng voice, accent+variant")
    sub.add_argument("--out", default="speech.wav", help="where the speech goes (.wav or .flac)")
    sub.set_defaults(run=lambda args: save_sound(args.out, speak(args.text, args.voice)[0]))


def check_folder(folder):
    """Reads every line, picture and recording of a prepared folder, and prints what is wrong."""
    path = Path(folder) / "samples.jsonl"
    lines = path.read_bytes().splitlines()
    tasks = [(path.parent, f"{path}:{number}", line) for number, line in enumerate(lines, 1)]
    results = in_parallel(check_line, tasks, None, "line")
    wrong = [message for message in results if message]
    print("".join(f"{message}\n" for message in wrong), end="")
    if wrong or not lines:
        raise BadInput(f"{path}: {len(wrong)} of its {len(lines)} lines are wrong")
    print(f"{path}: nothing is wrong with its {len(lines)} lines and their files")


def check_line(task):
    """Worker: reads a line of samples.jsonl and its files; returns what is wrong, or None."""
    folder, where, line = task
    try:
        with at(where):
            sample = json.loads(line)
            check_sample(sample)
            for key, load in (("image", load_image), ("audio", load_audio)):
                if key in sample:
                    load(folder / sample[key])
    except BadInput as error:
        return str(error)
