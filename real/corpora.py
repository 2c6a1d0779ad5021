"""Converts public data to prepared folders: LLaVA's questions with speech, and ASR corpora.

    python data.py llava --annotations llava_v1_5_mix665k.json --images DIR --n 50000 --out DIR
    python data.py librispeech --root DIR --split train-clean-360 --out DIR
    python data.py commonvoice --tsv cv-corpus/en/validated.tsv --clips cv-corpus/en/clips --out DIR
    python data.py manifest --manifest cuts.jsonl --root DIR --out DIR    # GigaSpeech, your own

The paper aligns on 988,000 clips of LibriSpeech, Common Voice, GigaSpeech and Libriheavy. It trains
on 50,000 samples of LLaVA-1.5's instruction mix, their questions spoken by TTS. Each source
is a list of tasks that depends on the arguments alone. Each task becomes a line of samples.jsonl,
or of skipped.jsonl with the reason. An interrupted command resumes.
"""

import csv
import functools
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import soundfile
import torchaudio

from plumbing.files import BadInput, at, folder_lock, in_range, json_lines, read_json, table_rows
from plumbing.media import SAMPLE_RATE, link, load_audio, load_image, save_sound
from plumbing.prepared import attempt, check_inside, in_parallel, pick, prepare, write
from real import speech

# Format suffixes of LLaVA's mix are lines that say how to write the answer: see --suffix.
SUFFIX = re.compile(r"(?im)^\s*(answer the question using a single word or phrase"
                    r"|answer with the option's letter from the given choices directly).*$")
# OCR tokens and hints are always dropped, for teacher and student: they are not spoken language.
NOT_ASKED = re.compile(r"(?im)^\s*(reference ocr token:|hint:).*$")
# Bounding boxes: given as [0.12, 0.3 or as four numbers, or asked for.
COORDINATES = re.compile(r"\[\s*([01]\.\d|\d+(\s*,\s*[\d.]+){3})")
ASKS_COORDINATES = re.compile(r"(?i)\bbounding box|\bcoordinates?\b")


# ---- LLaVA's instruction mix ---------------------------------------------------------------------


def split_suffix(question):
    """Returns a question on one line, without its <image> mark, and its format suffix or ""."""
    question = NOT_ASKED.sub("", question.replace("<image>", ""))
    suffixes = [match[0].strip() for match in SUFFIX.finditer(question)]
    return " ".join(SUFFIX.sub("", question).split()), " ".join(suffixes)


def llava_task(row, images, suffix="spoken"):
    """Returns (line, image path) of a row of the annotations; the line has question and answer.

    suffix: "spoken" leaves the format suffix in the question, "written" says in "after" that it is
    not spoken, "dropped" asks without it. Raises BadInput if the row cannot be used.
    """
    image, turns = row.get("image"), row["conversations"]
    if not isinstance(image, str):
        raise BadInput("no picture" if image is None else "several pictures")
    if [turn.get("from") for turn in turns[:2]] != ["human", "gpt"]:
        raise BadInput("does not begin with a question and its answer")
    (question, after), answer = split_suffix(turns[0]["value"]), turns[1]["value"].strip()
    if not question or not answer:
        raise BadInput("the question or the answer is empty")
    if COORDINATES.search(question):
        raise BadInput("the question has coordinates, which are not spoken language")
    if ASKS_COORDINATES.search(question) or COORDINATES.search(answer):
        raise BadInput("the answer is coordinates, which are not spoken language")

    # The suffix is a line of its own, as in InternVL2's prompts for the benchmarks.
    line = {"question": question, "answer": answer}
    if after and suffix != "dropped":
        line["question"] += f"\n{after}"
    if after and suffix == "written":
        line["after"] = f"\n{after}"
    if len(speech.spoken_text(line)) > speech.LONGEST_QUESTION:
        raise BadInput(f"the question has more than {speech.LONGEST_QUESTION} characters")
    check_inside(images, image)
    return line, images / image


def take_llava(name, line, image, folder):
    """Completes a line; its picture is linked or copied."""
    with at("the picture is broken"):  # found here, not in the middle of training
        load_image(image)
    path = folder / "images" / f"{name}{image.suffix.lower()}"
    if not path.exists():
        link(image, path)
    return {"id": name, "image": f"images/{path.name}", "audio": f"audio/{name}.flac", **line}


def make_llava(args):
    """Makes the folder of LLaVA: the first question of each dialogue about one picture."""
    folder, tasks, results = Path(args.out), [], []
    with at(args.annotations):
        rows = list(read_json(args.annotations))
    for number, row in enumerate(rows):
        name = f"{number:06}"
        try:
            tasks.append((name, *llava_task(row, Path(args.images), args.suffix)))
        except BadInput as error:
            results.append({"id": name, "skipped": str(error)})
        except (AttributeError, KeyError, TypeError) as error:
            results.append({"id": name, "skipped": f"not a dialogue: {error!r}"})

    take = functools.partial(attempt, take_llava, folder=folder)
    lines = list(in_parallel(take, pick(tasks, args.n, args.seed), "pictures"))
    results += [line for line in lines if "skipped" in line]
    lines = [line for line in lines if "skipped" not in line]
    write(folder, results + speech.speak_all(lines, folder, args))


# ---- ASR corpora ---------------------------------------------------------------------------------
# Each function yields tasks (id, recording, transcript), and perhaps start and length in seconds.

COLUMNS = {"id", "audio", "text", "start", "seconds"}  # of a manifest: these and no others

TAGS = re.compile(r"(?i)<(comma|period|questionmark|exclamationpoint)>")  # GigaSpeech's punctuation


def plain_transcript(text):
    """Returns a transcript in a common style: "it's seven o'clock".

    Lower case, no punctuation but apostrophes. Raises BadInput for a tag such as <MUSIC> or
    [laughter], and for signs that are spoken, such as %.
    """
    text = speech.APOSTROPHES.sub("'", TAGS.sub(" ", text)).lower()
    text = re.sub(r"(?<!\w)'(.+?)'(?!\w)", r"\1", text)  # 'go away'
    tag = re.search(r"(?s)[<\[({*].*?([>\])}*]|$)", text)
    if tag:
        raise BadInput(f"the transcript has a tag: {tag[0]}")
    plain = re.sub(r"-|(?<!\w)'(?!\w)", " ", speech.SILENT.sub(" ", text))
    sign = re.search(r"[^\w\s']|_", plain) or re.search(r"\d[.,:]\d", text)
    if sign:
        raise BadInput(f"the transcript has a sign that is spoken: {sign[0]}")
    if not plain.strip():
        raise BadInput("the transcript is empty")
    return " ".join(plain.split())


def librispeech_tasks(args):
    """Yields LibriSpeech. torchaudio downloads and unpacks a missing split."""
    split, archive = Path(args.root, "LibriSpeech", args.split), f"{args.split}.tar.gz"
    place = split.with_name(f".{split.name}")
    if not split.exists():
        with (at(f"LibriSpeech {args.split} is not under {args.root}, and there is no download"),
              folder_lock(place, patience=24 * 3600),
              TemporaryDirectory(dir=place, prefix=".", suffix=".tmp") as beside):
            if Path(args.root, archive).exists():
                Path(beside, archive).symlink_to(Path(args.root, archive).resolve())
            if not split.exists():  # another process may have made it
                torchaudio.datasets.LIBRISPEECH(beside, url=args.split, download=True)
                os.replace(Path(beside, "LibriSpeech", args.split), split)

    for chapter in sorted(split.glob("*/*/")):
        transcripts = chapter / f"{chapter.parent.name}-{chapter.name}.trans.txt"
        with at(transcripts):
            lines = transcripts.read_text(encoding="utf-8").splitlines()
        for line in lines:
            name, _, transcript = line.partition(" ")
            yield name, chapter / f"{name}.flac", transcript


def commonvoice_tasks(args):
    """Yields the rows of Common Voice's TSV, whose recordings lie in --clips."""
    for where, row in read_table(args.tsv):
        with at(where):
            yield Path(row["path"]).stem, Path(args.clips) / row["path"], row["sentence"]


def manifest_tasks(args):
    """Yields the rows of a TSV or JSONL: audio (below --root), text, perhaps id, start, seconds."""
    for i, (where, row) in enumerate(read_table(args.manifest)):
        with at(where):
            is_cut = "supervisions" in row or str(row.get("type")).endswith("Cut")
            row = cut_row(row) if is_cut else our_row(row)
            name = str(row.get("id", f"{i:08}")).replace("/", "_")
            stretch = row.get("start", 0.0), row.get("seconds")
            task = name, Path(args.root) / row["audio"], row["text"], *stretch
        yield task


def our_row(row):
    """Returns a manifest's row, its start and seconds as numbers. Empty cells are left out.

    A further column is refused: it may say which part of a recording is meant.
    """
    row = {key: cell for key, cell in row.items()
           if key in ("audio", "text") or cell not in ("", None)}
    if row.keys() - COLUMNS:
        raise BadInput(f"unknown columns {sorted(row.keys() - COLUMNS)}; a manifest has audio and "
                       "text, and perhaps id, start and seconds")
    return row | {key: float(str(row[key])) for key in ("start", "seconds") if key in row}


def cut_row(cut):
    """Returns a Lhotse cut as a manifest's row; one that is more than that has a BadInput for text.

    A supervision's start counts from the cut's. Libriheavy has several texts, one with capitals.
    """
    recording, supervisions = cut.get("recording") or {}, cut.get("supervisions") or []
    sources = [(source["type"], len(source["channels"])) for source in recording.get("sources", [])]
    is_mono = cut.get("type", "MonoCut") == "MonoCut" and sources == [("file", 1)]
    if recording.get("transforms") or not is_mono or len(supervisions) != 1:
        why = "the cut is transformed, or not of one file, one channel and one supervision"
        return {"id": cut["id"], "audio": "", "text": BadInput(why)}
    words = supervisions[0]
    texts = [words.get("text"), *(words.get("custom") or {}).get("texts", [])]
    return {"id": cut["id"], "audio": recording["sources"][0]["source"],
            "text": next(filter(None, texts), ""), "start": cut["start"] + words.get("start", 0),
            "seconds": words.get("duration", cut["duration"])}


def read_table(path):
    """Yields ("file:line", row) of a .jsonl, or of a .tsv with a header; either may be a .gz."""
    if Path(path).name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return json_lines(path)
    # An invalid UTF-8 byte spoils its row, not the table.
    return table_rows(path, errors="replace", quoting=csv.QUOTE_NONE)


def take_clip(name, recording, transcript, *stretch, folder):
    """Converts a recording to 16 kHz FLAC and returns its line. stretch: start, seconds"""
    if isinstance(transcript, BadInput):
        raise transcript
    with at("the transcript"):
        answer = plain_transcript(transcript)
    path = folder / "audio" / f"{name}.flac"
    with at("the recording cannot be used"):
        if not path.exists():
            wave, file = load_audio(recording, *stretch), soundfile.info(recording)
            if wave.std() < 1e-4:
                raise BadInput("it is silent")
            kind = file.format, file.subtype, file.samplerate, file.channels, any(stretch)
            if kind == ("FLAC", "PCM_16", SAMPLE_RATE, 1, False):
                link(recording, path)  # already in our format, as LibriSpeech is
            else:
                save_sound(path, wave)
    return {"id": name, "audio": f"audio/{name}.flac", "answer": answer}


def make_asr(args):
    """Makes the folder of a corpus: args.tasks yields its recordings and transcripts."""
    tasks, folder = pick(list(args.tasks(args)), args.n, args.seed), Path(args.out)
    # Some file systems ignore case.
    files = Counter(unicodedata.normalize("NFC", name).casefold() for name, *_ in tasks)
    if len(files) < len(tasks):
        source = getattr(args, "tsv", None) or getattr(args, "manifest", None) or args.root
        raise BadInput(f"{source}: two ids name one file: {files.most_common(1)[0][0]!r}")
    take = functools.partial(attempt, take_clip, folder=folder)
    write(folder, in_parallel(take, tasks, "speech"))


# ---- the commands --------------------------------------------------------------------------------


def add_commands(commands):
    """Adds the sources' subcommands to data.py."""
    def command(name, help, make, tasks=None):
        sub = commands.add_parser(name, help=help)
        sub.add_argument("--out", required=True, help="the prepared folder")
        sub.add_argument("--n", type=in_range(1), help="take so many, drawn by --seed; or all")
        sub.add_argument("--seed", type=in_range(0, 2**32), default=0, help="of draw and voices")
        sub.set_defaults(run=lambda args: prepare(args, make), tasks=tasks)
        return sub.add_argument

    add = command("llava", "LLaVA's instruction pairs, their questions spoken", make_llava)
    add("--annotations", required=True, help="llava_v1_5_mix665k.json")
    add("--images", required=True, help="the folder that its image paths are relative to")
    add("--suffix", choices=("spoken", "written", "dropped"), default="spoken",
        help='"Answer the question using a single word or phrase." and its like: spoken with the '
             "question, in writing after the speech, or left out")
    speech.add_voice_arguments(add, "mms")
    add = command("librispeech", "LibriSpeech, downloaded if need be", make_asr, librispeech_tasks)
    add("--root", required=True, help="where the corpus lies or goes")
    add("--split", default="train-clean-100", help="train-clean-360, train-other-500, ...")
    add = command("commonvoice", "Common Voice", make_asr, commonvoice_tasks)
    add("--tsv", required=True, help="its validated.tsv")
    add("--clips", required=True, help="its folder of recordings")
    add = command("manifest", "recordings and transcripts listed in a .jsonl or .tsv", make_asr,
                  manifest_tasks)
    add("--manifest", required=True, help="lines with audio, text, perhaps id, start, seconds; "
        "or Lhotse's cuts")
    add("--root", required=True, help="the folder that its audio paths are relative to")
