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
import hashlib
import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import torch
import torchaudio
from tqdm import tqdm

from plumbing.files import (BadInput, at, json_lines, make_once, read_json, write_json_lines,
                            written_whole)
from plumbing.media import VOICES, load_audio, load_image, resample, save_sound, save_speech
from plumbing.processes import workers
from plumbing.runs import fetch

# Format suffixes of LLaVA's mix are lines that tell how to write the answer: see --suffix.
SUFFIX = re.compile(r"(?im)^\s*(answer the question using a single word or phrase"
                    r"|answer with the option's letter from the given choices directly).*$")
# Help for reading is dropped in any case, for teacher and student: nobody would say it aloud.
NOT_ASKED = re.compile(r"(?im)^\s*(reference ocr token:|hint:).*$")
# A box in the picture: told, as [0.12, 0.3 or as four numbers, and asked for.
COORDINATES = re.compile(r"\[\s*([01]\.\d|\d+(\s*,\s*[\d.]+){3})")
ASKS_COORDINATES = re.compile(r"(?i)\bbounding box|\bcoordinates?\b")
MMS_VOICE = "facebook/mms-tts-eng"
LONGEST_QUESTION = 400  # characters; saying more would take longer than Whisper's 30 s


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


def check_inside(folder, name):
    """Raises BadInput unless a picture lies in the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts or not os.path.isfile(folder / name):
        raise BadInput(f"the picture is missing: {name}")


def take_llava(task, folder):
    """Worker: completes a line of (id, line, image); its picture is linked or copied."""
    name, line, image = task
    path = folder / "images" / f"{name}{image.suffix.lower()}"
    try:
        load_image(image)  # a broken one shows now, not in the middle of training
    except BadInput as error:
        return {"id": name, "skipped": f"the picture is broken: {error}"}
    if not path.exists():
        with written_whole(path) as temporary:
            try:
                os.link(image, temporary)  # takes no disk space
            except OSError:
                shutil.copyfile(image, temporary)
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

    take = functools.partial(take_llava, folder=folder)
    lines = list(in_parallel(take, pick(tasks, args.n, args.seed), "pictures"))
    results += [line for line in lines if "skipped" in line]
    lines = [line for line in lines if "skipped" not in line]
    write(folder, results + speak_all(lines, folder, args))


# ---- speech --------------------------------------------------------------------------------------

# What a voice passes over in silence, without a loss.
SILENT = re.compile(r"[.,;:?!\"()\[\]{}…“”«»‘–—]")
# A number that can be spelled: sign, amount, its whole part, and the plural of 1990s.
NUMBER = re.compile(r"(?<![\w.])(-?)([$€£¥]?(\d{1,15})(?:\.\d+)?%?)((?<=0)'?s)?(?!\w|\.\d|%)")


def spoken_text(line):
    """Returns what of a line's question is spoken: all but what follows in writing."""
    return line["question"].removesuffix(line.get("after", ""))


def in_words(text):
    """Returns a text as an English MMS voice can say it, its numbers in words.

    Such a voice has a sound for letters, apostrophes and hyphens, and drops all else without a
    word. Raises BadInput for a text with more than punctuation beside them.
    """
    from transformers.models.speecht5.number_normalizer import EnglishNumberNormalizer
    convert = EnglishNumberNormalizer().convert

    def spell(match):
        """Writes one number in words. The normaliser says nothing for zeros at the front."""
        sign, amount, whole, plural = match.groups()
        zeros = len(whole) - len(whole.lstrip("0"))
        words = "minus " * bool(sign) + "zero " * zeros + convert(amount)
        return re.sub("y$", "ie", words.strip()) + "s" if plural else words

    # Its own search for numbers takes 3,4 for 34, and 1,234,567 and 3.14159 for two numbers each;
    # it leaves 1990s as it is, and a colon or a comma without a blank would glue two words.
    spoken = re.sub(r"[’`´]", "'", text)
    spoken = re.sub(r"(?<![\d,])\d{1,3}(,\d{3})+(?!,?\d)",
                    lambda match: match[0].replace(",", ""), spoken)  # 1,234,567
    spoken = re.sub(r"(?<=\d)[,:](?=\d)", " ", spoken)  # 3,4 and 12:30
    spoken = re.sub(r"\b(1\d|20)([1-9]0'?s)\b", r"\1 \2", spoken)  # nineteen nineties
    spoken = SILENT.sub(" ", NUMBER.sub(spell, spoken))

    # A dash between numbers may mean "minus" or "to".
    unknown = re.findall(r"[^a-z\s'-]", spoken.lower()) + re.findall(r"\d\s*[-–]\s*\d", text)
    if unknown or not re.search("[a-z]", spoken.lower()):
        raise BadInput(f"the voice cannot say: {' '.join(unknown) or text}")
    return " ".join(spoken.split())


def speak_all(lines, folder, args, voices=VOICES):
    """Speaks the lines' questions by --tts; returns lines, of which some may be "skipped"."""
    if args.tts == "mms":
        spoken = speak_mms(lines, folder, args.seed, args.voice)
        return list(tqdm(spoken, total=len(lines), desc="speech", unit="sample"))
    speak = functools.partial(speak_espeak, folder=folder, seed=args.seed, voices=voices)
    return list(in_parallel(speak, lines, "speech"))


def speak_espeak(line, folder, seed, voices=VOICES):
    """Worker: speaks a line's question with espeak-ng; voice, rate and pitch are the line's own."""
    rng = random.Random(f"{seed}/{line['id']}")
    try:
        speech = save_speech(folder, line["id"], rng, spoken_text(line), voices, (140, 220))
        return {**line, **speech}
    except BadInput as error:
        return {"id": line["id"], "skipped": str(error)}


def speak_mms(lines, folder, seed, path=MMS_VOICE, batch_size=16):
    """Yields the lines, their questions spoken by MMS-TTS (VITS), on a GPU if there is one.

    VITS draws noise. So each batch has a seed of its own, and is spoken anew as a whole if any of
    it is missing: an interrupted folder ends like an undisturbed one.
    """
    from transformers import VitsModel, VitsTokenizer  # takes seconds; only this voice needs it

    device, voice = "cuda" if torch.cuda.is_available() else "cpu", fetch(path)
    with at(path):
        vits = VitsModel.from_pretrained(voice, use_safetensors=True).eval().to(device)
        tokenizer = VitsTokenizer.from_pretrained(voice)

    # What the voice would say in part only is left out.
    speakable, texts = [], {}
    for line in lines:
        try:
            texts[line["id"]] = in_words(spoken_text(line))
            speakable.append(line)
        except BadInput as error:
            yield {"id": line["id"], "skipped": str(error)}

    for start in range(0, len(speakable), batch_size):
        batch = speakable[start: start + batch_size]
        if all((folder / line["audio"]).exists() for line in batch):
            yield from batch
            continue
        torch.manual_seed(seed * 1_000_003 + start)
        questions = [texts[line["id"]] for line in batch]
        inputs = tokenizer(questions, return_tensors="pt", padding=True).to(device)
        with torch.no_grad():
            out = vits(**inputs)  # waveform (B, samples), the rest of a row is padding
        waves = out.waveform.float().cpu().numpy()
        for line, wave, length in zip(batch, waves, out.sequence_lengths.int().tolist()):
            try:
                wave = resample(wave[:length], vits.config.sampling_rate)
                save_sound(folder / line["audio"], wave)
                yield line
            except BadInput as error:
                yield {"id": line["id"], "skipped": str(error)}


# ---- ASR corpora ---------------------------------------------------------------------------------
# Each function yields tasks (id, recording, transcript), and perhaps start and length in seconds.

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
    """Yields LibriSpeech by torchaudio's dataset, downloaded if need be."""
    with at(f"LibriSpeech {args.split} is not under {args.root}, and there is no download"):
        Path(args.root).mkdir(parents=True, exist_ok=True)
        corpus = torchaudio.datasets.LIBRISPEECH(args.root, url=args.split, download=True)
    for n in range(len(corpus)):
        path, _, transcript, speaker, chapter, utterance = corpus.get_metadata(n)
        recording = Path(args.root) / "LibriSpeech" / path
        yield f"{speaker}-{chapter}-{utterance:04}", recording, transcript


def commonvoice_tasks(args):
    """Yields the rows of Common Voice's TSV, whose recordings lie in --clips."""
    for where, row in read_table(args.tsv):
        with at(where):
            yield Path(row["path"]).stem, Path(args.clips) / row["path"], row["sentence"]


def manifest_tasks(args):
    """Yields the rows of a TSV or JSONL: audio (below --root), text, perhaps id, start, seconds.

    A Lhotse cut becomes such a row by its recording's source, its own id, start and duration, and
    its supervision's text (GigaSpeech) or custom.texts[0] (Libriheavy).
    """
    for i, (where, row) in enumerate(read_table(args.manifest)):
        with at(where):
            start = float(row.get("start") or 0)
            seconds = float(row["seconds"]) if row.get("seconds") else None
            if not 0 <= start + (seconds or 0) < float("inf") or start < 0:
                raise BadInput("start and seconds must be numbers from 0 on")
            name = str(row.get("id") or f"{i:08}").replace("/", "_")
            recording, transcript = Path(args.root) / row["audio"], row["text"] + ""
        yield name, recording, transcript, start, seconds


def read_table(path):
    """Yields ("file:line", row) of a .jsonl, or of a .tsv with a header."""
    if Path(path).suffix == ".jsonl":
        yield from json_lines(path)
        return
    with at(path), open(path, encoding="utf-8", errors="replace", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        for number, row in enumerate(rows, 2):
            yield f"{path}:{number}", row


def take_clip(task, folder):
    """Worker: turns a task's recording into 16 kHz FLAC and returns its line."""
    name, recording, transcript, *stretch = task
    path = folder / "audio" / f"{name}.flac"
    try:
        answer = plain_transcript(transcript)
        with at("the recording cannot be used"):
            if not path.exists():
                save_sound(path, load_audio(recording, *stretch))
    except BadInput as error:
        return {"id": name, "skipped": str(error)}
    return {"id": name, "audio": f"audio/{name}.flac", "answer": answer}


def make_asr(args):
    """Makes the folder of a corpus: args.tasks yields its recordings and transcripts."""
    tasks, folder = pick(list(args.tasks(args)), args.n, args.seed), Path(args.out)
    name, count = (Counter(name for name, *_ in tasks).most_common(1) or [("", 0)])[0]
    if count > 1:
        raise BadInput(f"{args.command}: the id {name!r} stands there more than once")
    write(folder, in_parallel(functools.partial(take_clip, folder=folder), tasks, "speech"))


# ---- writing -------------------------------------------------------------------------------------


def pick(tasks, n, seed):
    """Returns n of the tasks, drawn by the seed, in their old order; all of them if n is None."""
    n = len(tasks) if n is None else min(n, len(tasks))
    return [tasks[i] for i in sorted(random.Random(seed).sample(range(len(tasks)), n))]


def in_parallel(worker, tasks, desc):
    """Yields the worker's results in the tasks' order, from all cores, with a bar."""
    with workers() as pool:
        results = pool.map(worker, tasks, chunksize=16)
        yield from tqdm(results, total=len(tasks), desc=desc, unit="sample")


def write(folder, results):
    """Writes skipped.jsonl and then samples.jsonl; prints how many were left out and why."""
    results = list(results)
    skipped = [line for line in results if "skipped" in line]
    lines = [line for line in results if "skipped" not in line]
    write_json_lines(folder / "skipped.jsonl", skipped)
    write_json_lines(folder / "samples.jsonl", lines)
    print(f"{folder}: {len(lines)} samples; {len(skipped)} left out (skipped.jsonl names them)")
    for why, count in Counter(line["skipped"].split(":")[0] for line in skipped).most_common():
        print(f"{count:8}  {why}")


def prepare(args, make):
    """Calls make(args) for the folder args.out, unless it is finished already.

    settings.json tells the arguments, and the SHA-256 of the files that list its rows: files in the
    folder are named by row, and must not be kept under another list's lines.
    """
    settings = {key: value for key, value in sorted(vars(args).items())
                if key != "out" and not callable(value)}
    for key in ("annotations", "tsv", "manifest", "relation", "attribution"):
        if key not in settings:
            continue
        with open(settings[key], "rb") as file:
            settings[f"{key}_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    make_once(args.out, settings, functools.partial(make, args))


def add_commands(commands):
    """Adds the sources' subcommands to data.py."""
    def command(name, help, make, tasks=None):
        sub = commands.add_parser(name, help=help)
        sub.add_argument("--out", required=True, help="the prepared folder")
        sub.add_argument("--n", type=int, help="take so many, drawn by --seed (default: all)")
        sub.add_argument("--seed", type=int, default=0, help="of the draw and the voices")
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
    add("--manifest", required=True, help="lines with audio, text, perhaps id, start, seconds "
        "(Libriheavy's text is its cuts' supervisions[0].custom.texts[0])")
    add("--root", required=True, help="the folder that its audio paths are relative to")


def add_voice_arguments(add, default):
    """Adds --tts and --voice to a command. default: of --tts; None leaves both to the caller."""
    add("--tts", choices=("mms", "espeak"), default=default, help="who speaks")
    add("--voice", default=default and MMS_VOICE, help="folder or hub id of the MMS voice")
