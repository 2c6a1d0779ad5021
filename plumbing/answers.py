"""The loop that asks: in batches of like length, and no question twice.

Answers are appended to a JSONL file as they come. A line is a question's line of samples.jsonl with
its answers and "asked", the digest of who was asked, and of the question, picture and recording.
Where one of these has changed, the digest does not match, and the question is asked anew.

There is nothing to run here: eval.py, mmalign.py and analysis/ ask by `ask` and `answer_batches`.
"""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from plumbing import runs
from plumbing.files import BadInput, at, folder_lock, json_lines, write_json_lines

KEYS = ("text", "audio", "transcript", "cascade", "floor",  # beside a sample's own
        "text remark", "audio remark", "asked")
SPEECH = ("audio_seconds", "suffix", "tts", "voice")  # settings that no written answer depends on
CODE = ("model.py", "data.py", "real/families.py")  # answers depend on it, too


@dataclass
class Subject:
    """Who is asked: a run, any LVLM that model.py reads, or a server's model."""
    label: str  # in printed lines
    folder: Path  # of its answers
    answer: Callable  # function (samples, forms, max_new_tokens) -> {form: [answer, ...]}
    forms: tuple  # that it understands: "text", "audio", "transcript", "cascade", "floor"
    identity: str  # of its weights and code, or the name of a server's model
    batch: int  # questions answered at once
    settings: object = None  # PromptSettings; a server takes pictures as they are
    reader: object = None  # the Subject that answers written questions: the base of frozen runs


def subject_of(run, device, answer, forms, batch, settings):
    """Returns the Subject of a run, and as its reader that of its base; see Subject.

    OLLM.load has checked that the run's sources are still those that ollm.json names.
    """
    info, own = runs.read_run_info(run), runs.fingerprint(run)
    base, whisper = info.get("base_fingerprint", own), info.get("whisper_fingerprint")
    source = runs.source_of(run, "base")
    reader = Subject(str(source), answers_folder(source), answer, ("text",),
                     identity([base], device), batch, settings)
    return Subject(str(run), answers_folder(run), answer, forms,
                   identity([own, base, whisper], device), batch, settings, reader)


# ---- asking --------------------------------------------------------------------------------------


def answer_batches(answer, samples, indices, length, size, done=frozenset(), desc=None):
    """Yields [(index, {form: answer}), ...] of each batch of samples.

    answer: function (samples) -> {form: [answer, ...]}; length: function (index), to sort by
    done: a batch is left out if it is here as a whole, so batches are the same after a kill
    """
    order = sorted(indices, key=length)
    for start in tqdm(range(0, len(order), size), desc=desc, unit="batch", leave=False):
        batch = order[start: start + size]
        if not done.issuperset(batch):
            answers = answer([samples[i] for i in batch])
            yield [(i, {form: texts[n] for form, texts in answers.items()})
                   for n, i in enumerate(batch)]


def ask(subject, samples, indices, forms, path, max_new_tokens):
    """Returns the rows of samples.rows at the indices, with their answers under KEYS.

    path: JSONL that keeps the answers. Until all are there, they are appended to a file beside it,
    so that a command which was killed goes on. Its lock is held meanwhile.
    """
    # All runs on a frozen base read alike: it is asked once for all of them.
    written = {}
    if subject.reader and "text" in forms:
        base_path = subject.reader.folder / f"answers-base-{path.name.removeprefix('answers-')}"
        rows = ask(subject.reader, samples, indices, ["text"], base_path, max_new_tokens)
        written = {i: {"text": row["text"]} for i, row in zip(indices, rows)}
        forms = [form for form in forms if form != "text"]

    # A written answer does not depend on the speech.
    settings, files = samples.settings and samples.settings.to_json(), ("image", "audio")
    if forms == ["text"] and settings:
        settings = {key: value for key, value in settings.items() if key not in SPEECH}
        files = ("image",)
    about = digest([subject.identity, settings, forms, max_new_tokens])
    asked = {i: about + question_digest(samples.rows[i], files) for i in indices}
    answer = functools.partial(subject.answer, forms=forms, max_new_tokens=max_new_tokens)
    begun, nothing = path.with_suffix(".begun.jsonl"), dict.fromkeys(KEYS)
    with folder_lock(path.parent, file=path.name):
        kept = read_kept([path, begun], about)
        done = {i for i in indices if i in kept and kept[i]["asked"] == asked[i]}
        if forms == ["text"] and done:
            print(f"{len(done):,} written answers are kept in {path}", file=sys.stderr)
        if not forms:
            kept |= {i: {**samples.rows[i], **nothing, "asked": asked[i]} for i in indices}
            done = {*indices}
        batches = answer_batches(answer, samples, indices, samples.length, subject.batch, done,
                                 subject.label)
        write_kept(begun, kept)
        with open(begun, "a", encoding="utf-8") as out:
            for batch in batches:
                for i, answers in batch:
                    kept[i] = {**samples.rows[i], **nothing, **answers, "asked": asked[i]}
                    out.write(json.dumps(kept[i]) + "\n")
                out.flush()

        # What no answer depends on, such as a label, may have changed.
        for i in indices:
            kept[i] = {**samples.rows[i], **{key: kept[i][key] for key in KEYS}}
            kept[i] |= written.get(i, {})
        write_kept(path, kept)
        begun.unlink()
    return [kept[i] for i in indices]


# ---- digests -------------------------------------------------------------------------------------


def digest(value):
    """Returns 16 hexadecimal digits of the SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def file_digest(path):
    """Returns the SHA-256 of a file's bytes, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(weights, device):
    """Returns the digest of a model's weights (SHA-256s), the code and the device."""
    root = Path(__file__).parent.parent
    return digest([weights, [file_digest(root / name) for name in CODE], device])


def question_digest(row, files=("image", "audio")):
    """Returns the digest of a question: its text, and the bytes of its picture and recording."""
    content = [row.get("question"), row.get("after"), row.get("other")]
    for key in files:
        with at(row["where"]):
            content.append(file_digest(Path(row["folder"]) / row[key]) if key in row else None)
    return digest(content)


# ---- files ---------------------------------------------------------------------------------------


def answers_folder(run):
    """Returns where a run's answers lie: in it, or in runs/asked if it is no run or read only."""
    if runs.finished(run) and os.access(run, os.W_OK):
        return Path(run)
    path = os.path.abspath(run) if ".." in Path(run).parts else run
    parts = [part for part in Path(path).parts if part != "/"]
    return Path("runs/asked") / "_".join(parts)


def answers_name(table, data=None):
    """Returns the name of a file of answers: by a word of its table and by --data, if given."""
    return "-".join(["answers", table, *([Path(data).resolve().name] if data else [])]) + ".jsonl"


def read_answers(run, data=None):
    """Returns the rows that eval.py kept: samples with their "text" and "audio" answers."""
    path = answers_folder(run) / answers_name("mean", data)
    if not path.exists():
        asked = f" --data {data}" if data else ""
        raise BadInput(f"{run}: has no answers yet; `python eval.py {run}{asked}` asks it")
    return [row for _, row in json_lines(path)]


def read_kept(paths, about):
    """Returns {index of a question's row: kept line} of the answers in some files.

    about: the digest with which "asked" must begin; others' answers are left out, and so is a last
    line that was cut off
    """
    kept = {}
    for path in paths:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines, 1):
            if line.endswith(b"\n"):
                with at(f"{path}:{number}"):
                    line = json.loads(line)
                    if line.get("asked", "").startswith(about):
                        kept[int(line["where"].rpartition(":")[2]) - 1] = line
    return kept


def write_kept(path, kept):
    """Writes the kept lines in the order of their questions."""
    write_json_lines(path, [kept[i] for i in sorted(kept)])
