"""Public data brought to the one format on disk: LLaVA's questions spoken, and ASR corpora.

    python data.py llava --annotations llava_v1_5_mix665k.json --images DIR --n 50000 --out DIR
    python data.py librispeech --root DIR --split train-clean-360 --out DIR
    python data.py commonvoice --tsv cv-corpus/en/validated.tsv --clips cv-corpus/en/clips --out DIR
    python data.py manifest --manifest cuts.jsonl --root DIR --out DIR    # GigaSpeech, your own

The paper aligns on 988,000 clips of LibriSpeech, Common Voice, GigaSpeech and Libriheavy. It trains
on 50,000 samples of LLaVA-1.5's instruction mix, their questions spoken by TTS. Each source is a
list of tasks, the same for the same arguments. Each task ends as a line of samples.jsonl, or as one
of skipped.jsonl, which says why. An interrupted command goes on where it stopped.
"""

import csv
import functools
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import soundfile
import torchaudio

from plumbing.files import (
    BadInput,
    at,
    at_least,
    json_lines,
    link,
    only_writer,
    read_json,
    table_rows,
)
from plumbing.media import SAMPLE_RATE, load_image, load_speech, save_sound
from plumbing.prepared import attempt, check_inside, check_names, in_parallel, pick, prepare, write
from real.speech import LONGEST_QUESTION, SILENT, add_voice_arguments, speak_all, spoken_text

# Format suffixes of LLaVA's mix are lines that tell how to write the answer: see --suffix.
SUFFIX = re.compile(r"(?im)^\s*(answer the question using a single word or phrase"
                    r"|answer with the option's letter from the given choices directly).*$")
# Help for reading is dropped in any case, for teacher and student: nobody would say it aloud.
NOT_ASKED = re.compile(r"(?im)^\s*(reference ocr token:|hint:).*$")
# A box in the picture: told, as [0.12, 0.3 or as four numbers, and asked for.
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
        raise BadInput("the question has coordinates, which nobody would say aloud")
    if ASKS_COORDINATES.search(question) or COORDINATES.search(answer):
        raise BadInput("the answer is coordinates, which nobody would say aloud")

    # The suffix is a line of its own, as in InternVL2's prompts for the benchmarks.
    line = {"question": question, "answer": answer}
    if after and suffix != "dropped":
        line["question"] += f"\n{after}"
    if after and suffix == "written":
        line["after"] = f"\n{after}"
    if len(spoken_text(line)) > LONGEST_QUESTION:
        raise BadInput(f"the question has more than {LONGEST_QUESTION} characters")
    check_inside(images, image)
    return line, images / image


def take_llava(name, line, image, folder):
    """Completes a line; its picture is linked or copied."""
    with at("the picture is broken"):  # this shows now, not in the middle of training
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
    write(folder, results + speak_all(lines, folder, args))


# ---- ASR corpora ---------------------------------------------------------------------------------
# Each function yields tasks (id, recording, transcript), and perhaps start and length in seconds.

# What a manifest's columns are called by us, NeMo, Hugging Face and others.
COLUMNS = {
    "id": "id",
    "audio": "audio|audio_filepath|audio_path|path|file|file_name|wav",
    "text": "text|sentence|transcript|transcription",
    "start": "start|offset|begin|start_time",
    "end": "end|stop|end_time",
    "seconds": "seconds|duration",
}
# Another one is ignored, unless its name may say which part of the recording is meant.
PART = re.compile("start|begin|offset|durat|channel|frames|samples|segment|speed|tempo"
                  "|(?<![a-z])((end|stop|dur|time|sec|len)|(ms|from|to)(?![a-z]))")

TAGS = re.compile(r"(?i)<(comma|period|questionmark|exclamationpoint)>")  # GigaSpeech's punctuation


def plain_transcript(text):
    """Returns a transcript in the one style of all corpora: "it's seven o'clock".

    Lower case, number words as words, no punctuation but apostrophes. Raises BadInput for what is
    more than punctuation: a tag such as <MUSIC>, or a sign that somebody has spoken as a word.
    """
    text = re.sub(r"[’`´]", "'", TAGS.sub(" ", text)).lower()
    tag = re.search("<.*?>", text)
    if tag:
        raise BadInput(f"the transcript has a tag: {tag[0]}")
    plain = re.sub(r"-|(?<!\w)'(?!\w)", " ", SILENT.sub(" ", text))
    sign = re.search(r"[^\w\s']|_", plain) or re.search(r"\d[.,:]\d", text)
    if sign:
        raise BadInput(f"the transcript has a sign that is spoken: {sign[0]}")
    if not plain.strip():
        raise BadInput("the transcript is empty")
    return " ".join(plain.split())


def librispeech_tasks(args):
    """Yields the utterances of LibriSpeech, downloaded and unpacked if need be."""
    split = Path(args.root) / "LibriSpeech" / args.split
    if not split.exists():
        unpack_librispeech(args.root, split)
    for chapter in sorted(split.glob("*/*/")):
        transcripts = chapter / f"{chapter.parent.name}-{chapter.name}.trans.txt"
        with at(transcripts):
            lines = transcripts.read_text(encoding="utf-8").splitlines()
        for line in lines:
            name, _, transcript = line.partition(" ")
            yield name, chapter / f"{name}.flac", transcript


def unpack_librispeech(root, split):
    """Makes the folder of a split by torchaudio, whole or not at all: unpacked beside, renamed."""
    place, archive = split.with_name(f".{split.name}"), Path(root, f"{split.name}.tar.gz")
    with (at(f"LibriSpeech {split.name} is not under {root}, and there is no download"),
          only_writer(place, patience=24 * 3600),
          TemporaryDirectory(dir=place, prefix=".", suffix=".tmp") as beside):
        if split.exists():
            return  # while we waited for another process
        if archive.exists():
            Path(beside, archive.name).symlink_to(archive.resolve())
        torchaudio.datasets.LIBRISPEECH(beside, url=split.name, download=True)
        os.replace(Path(beside, "LibriSpeech", split.name), split)


def commonvoice_tasks(args):
    """Yields the rows of Common Voice's TSV, whose recordings lie in --clips."""
    for where, row in read_table(args.tsv):
        with at(where):
            yield Path(row["path"]).stem, Path(args.clips) / row["path"], row["sentence"]


def manifest_tasks(args):
    """Yields the rows of a TSV or JSONL: audio (below --root), text, perhaps id and a stretch.

    Lhotse's cuts are taken, too. One that cannot be has the reason, a BadInput, in place of a path.
    """
    for i, (where, row) in enumerate(read_table(args.manifest)):
        with at(where):
            is_cut = "supervisions" in row or str(row.get("type")).endswith("Cut")
            row = attempt(cut_row, (row["id"], row)) if is_cut else our_names(row)
            name = str(row.get("id", f"{i:08}")).replace("/", "_")
            if "skipped" in row:
                task = name, BadInput(row["skipped"])
            elif not isinstance(row["text"], str):
                raise BadInput("text must be a text")
            else:
                task = name, Path(args.root) / row["audio"], row["text"], *stretch_of(row)
        yield task


def stretch_of(row):
    """Returns (start, seconds or None) of a manifest's row."""
    start, end, seconds = (float(str(row[key])) if key in row else None
                           for key in ("start", "end", "seconds"))
    start = start or 0.0
    if end is None:
        return start, seconds
    if seconds is not None and not abs(end - start - seconds) < 0.1:
        raise BadInput("start, end and seconds do not agree")
    return start, end - start


def our_names(row):
    """Returns the cells of a manifest's row that are not empty, {our name of the column: cell}."""
    known = {}
    for column, cell in row.items():
        theirs = column.strip().lower()
        ours = [name for name, usual in COLUMNS.items() if re.fullmatch(usual, theirs)]
        if cell in ("", None) or not ours and not PART.search(theirs):
            continue
        if not ours or ours[0] in known:
            raise BadInput(f"the column {column!r} is not known, or another says the same")
        known[ours[0]] = cell
    return known


def cut_row(name, cut):
    """Returns a Lhotse cut's words and where they are said, as a row of a manifest."""
    recording, supervisions = cut.get("recording") or {}, cut.get("supervisions") or []
    sources = [(source["type"], len(source["channels"])) for source in recording.get("sources", [])]
    if cut.get("type", "MonoCut") != "MonoCut" or recording.get("transforms"):
        raise BadInput("the cut is mixed or transformed")
    if sources != [("file", 1)]:
        raise BadInput("the cut is not of one file with one channel")
    if len(supervisions) != 1:
        raise BadInput(f"the cut has not one supervision: {len(supervisions)}")

    # Its start counts from the cut's. Libriheavy has several texts; the first has capitals.
    words = supervisions[0]
    texts = [words.get("text"), *(words.get("custom") or {}).get("texts", [])]
    return {"id": name, "audio": recording["sources"][0]["source"],
            "text": next(filter(None, texts), ""), "start": cut["start"] + words.get("start", 0),
            "seconds": words.get("duration", cut["duration"])}


def read_table(path):
    """Yields ("file:line", row) of a .jsonl, or of a .tsv with a header; either may be a .gz."""
    if Path(path).name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return json_lines(path)
    # A byte that is no UTF-8 spoils a row, not the table.
    return table_rows(path, errors="replace", quoting=csv.QUOTE_NONE)


def take_clip(name, recording, transcript=None, *stretch, folder):
    """Turns a recording into 16 kHz FLAC and returns its line. stretch: start, seconds"""
    if isinstance(recording, BadInput):
        raise recording
    answer = plain_transcript(transcript)
    path = folder / "audio" / f"{name}.flac"
    with at("the recording cannot be used"):
        if not path.exists():
            wave, file = load_speech(recording, *stretch), soundfile.info(recording)
            kind = file.format, file.subtype, file.samplerate, file.channels
            if kind == ("FLAC", "PCM_16", SAMPLE_RATE, 1) and not any(stretch):
                link(recording, path)  # as we would write it: LibriSpeech's are
            else:
                save_sound(path, wave)
    return {"id": name, "audio": f"audio/{name}.flac", "answer": answer}


def make_asr(args):
    """Makes the folder of a corpus: args.tasks yields its recordings and transcripts."""
    tasks, folder = pick(list(args.tasks(args)), args.n, args.seed), Path(args.out)
    check_names([name for name, *_ in tasks])
    take = functools.partial(attempt, take_clip, folder=folder)
    write(folder, in_parallel(take, tasks, "speech"))


# ---- the commands --------------------------------------------------------------------------------


def add_commands(commands):
    """Adds the sources' subcommands to data.py."""
    def command(name, help, make, tasks=None):
        sub = commands.add_parser(name, help=help)
        sub.add_argument("--out", required=True, help="the prepared folder")
        sub.add_argument("--n", type=at_least(1), help="take so many, drawn by --seed; or all")
        sub.add_argument("--seed", type=at_least(0, 2**32), default=0, help="of draw and voices")
        sub.set_defaults(run=lambda args: prepare(args, make), tasks=tasks)
        return sub.add_argument

    add = command("llava", "LLaVA's instruction pairs, their questions spoken", make_llava)
    add("--annotations", required=True, help="llava_v1_5_mix665k.json")
    add("--images", required=True, help="the folder that its image paths are relative to")
    add("--suffix", choices=("spoken", "written", "dropped"), default="spoken",
        help='"Answer the question using a single word or phrase." and its like: spoken with the '
             "question, in writing after the speech, or left out")
    add_voice_arguments(add, "mms")
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
