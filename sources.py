"""Public data brought to the one on-disk format: instruction pairs with their questions spoken, and ASR corpora.

    python data.py llava --annotations llava_v1_5_mix665k.json --images DIR --n 50000 --seed 0 --out DIR
    python data.py librispeech --root DIR --split train-clean-360 --out DIR
    python data.py commonvoice --tsv cv-corpus/en/validated.tsv --clips cv-corpus/en/clips --out DIR
    python data.py manifest --manifest cuts.jsonl --root DIR --out DIR        # GigaSpeech, Libriheavy, your own
    python data.py merge DIR DIR ... --out DIR                                # several prepared folders as one

The paper aligns on 988,000 clips of LibriSpeech, Common Voice, GigaSpeech and Libriheavy, and trains on 50,000 samples
of LLaVA-1.5's instruction mix whose questions are spoken by TTS. A source is a list of tasks, the same for the same
arguments; each ends as one line of samples.jsonl or as one of skipped.jsonl, which says why. What was interrupted goes
on where it stopped, and leaves the same bytes.
"""

import csv
import functools
import json
import math
import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import torch
import torchaudio
from tqdm import tqdm

import data
import faults
from faults import BadInput

# Format suffixes of LLaVA's mix: they tell how to write the answer, and nobody would say them aloud. A line that begins
# with one of these is left out of the question, in writing as well, so that teacher and student are asked the same.
NOT_SPOKEN = re.compile(r"(?im)^\s*(answer the question using a single word or phrase"
                        r"|answer with the option's letter from the given choices directly"
                        r"|reference ocr token:|hint:).*$")
COORDINATES = re.compile(r"\[\s*[01]\.\d")  # a box in the picture, as RefCOCO and Visual Genome rows ask about
LONGEST_QUESTION = 400  # characters; what is longer would take more than Whisper's 30 s to say


def cleaned(question):
    """What is asked, without the <image> mark and format suffixes, on one line."""
    return " ".join(NOT_SPOKEN.sub("", question.replace("<image>", "")).split())


def llava_task(row, images):
    """(question, answer, image path) of one row of LLaVA's annotations; raises BadInput if it can't be used."""
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise BadInput("not a dialogue")
    image, turns = row.get("image"), [turn for turn in row["conversations"] if isinstance(turn, dict)]
    if not isinstance(image, str):
        raise BadInput("no picture" if image is None else "several pictures")
    if [turn.get("from") for turn in turns[:2]] != ["human", "gpt"]:
        raise BadInput("does not begin with a question and its answer")
    question, answer = cleaned(str(turns[0].get("value", ""))), str(turns[1].get("value", "")).strip()
    if not question or not answer:
        raise BadInput("the question or the answer is empty")
    if COORDINATES.search(question):
        raise BadInput("the question has coordinates, which nobody would say aloud")
    if len(question) > LONGEST_QUESTION:
        raise BadInput(f"the question has more than {LONGEST_QUESTION} characters")
    if Path(image).is_absolute() or ".." in Path(image).parts or not os.path.isfile(images / image):
        raise BadInput(f"the picture is missing: {image}")
    return question, answer, images / image


def take_llava(task, folder):
    """Worker: one (id, question, answer, image) as a line of samples.jsonl, its image linked or copied."""
    name, question, answer, image = task
    kept = folder / "images" / f"{name}{image.suffix.lower()}"
    try:
        data.load_image(image)  # a broken one is found now, not in the middle of training
    except BadInput as error:
        return {"id": name, "skipped": f"the picture is broken: {error}"}
    if not kept.exists():
        with faults.written_whole(kept) as temporary:
            try:
                os.link(image, temporary)  # costs no disk
            except OSError:
                shutil.copyfile(image, temporary)
    return {"id": name, "image": f"images/{kept.name}", "question": question, "audio": f"audio/{name}.flac",
            "answer": answer}


def speak_espeak(lines, folder, seed):
    """Speaks the lines' questions with espeak-ng, each with a voice, rate and pitch of its own; yields the lines."""
    with data.workers() as pool:
        yield from pool.map(functools.partial(espeak_line, folder=folder, seed=seed), lines, chunksize=16)


def espeak_line(line, folder, seed):
    """Worker: one line's speech, unless it is there."""
    rng = random.Random(f"{seed}/{line['id']}")
    try:
        data.save_speech(folder, line["id"], rng, line["question"], data.VOICES, rates=(140, 220))
    except BadInput as error:
        return {"id": line["id"], "skipped": str(error)}
    return line


def speak_mms(lines, folder, seed, path="facebook/mms-tts-eng", batch_size=16):
    """Speaks the lines' questions with MMS-TTS (VITS), a batch at a time, on a GPU if there is one; yields the lines.

    VITS draws noise: each batch has a seed of its own, and is spoken anew as a whole if any of it is missing, so that
    what was interrupted and what was not are the same.
    """
    from transformers import VitsModel, VitsTokenizer  # here, because it takes seconds and only this voice needs it

    device, found = "cuda" if torch.cuda.is_available() else "cpu", data.fetch(path)
    vits = VitsModel.from_pretrained(found, use_safetensors=True).eval().to(device)
    tokenizer = VitsTokenizer.from_pretrained(found)
    lines = [line if tokenizer(line["question"]).input_ids[1:] else
             {"id": line["id"], "skipped": "the voice has no sound for any of its letters"} for line in lines]
    yield from (line for line in lines if "skipped" in line)
    lines = [line for line in lines if "skipped" not in line]
    for start in range(0, len(lines), batch_size):
        batch = lines[start: start + batch_size]
        if all((folder / line["audio"]).exists() for line in batch):
            yield from batch
            continue
        torch.manual_seed(seed * 1_000_003 + start)
        inputs = tokenizer([line["question"] for line in batch], return_tensors="pt", padding=True).to(device)
        with torch.no_grad():
            out = vits(**inputs)  # waveform (B, samples), the rest of a row is padding
        for line, wave, length in zip(batch, out.waveform.float().cpu().numpy(), out.sequence_lengths.int().tolist()):
            try:
                data.save_flac(folder / line["audio"], data.resample(wave[:length], vits.config.sampling_rate))
                yield line
            except BadInput as error:
                yield {"id": line["id"], "skipped": str(error)}


def take_clip(task, folder):
    """Worker: one recording (id, path, transcript, start and seconds or nothing) as 16 kHz FLAC and its line."""
    name, path, transcript, *stretch = task
    kept = folder / "audio" / f"{name}.flac"
    try:
        if not transcript.strip():
            raise BadInput("the transcript is empty")
        if not os.path.exists(kept):
            data.save_flac(kept, data.load_audio(path, *stretch))
    except BadInput as error:
        return {"id": name, "skipped": f"the recording cannot be used: {error}"}
    return {"id": name, "audio": f"audio/{name}.flac", "answer": transcript.strip()}


def librispeech_tasks(args):
    """LibriSpeech by torchaudio's own dataset class, downloaded to --root if it is not there; capitals are lowered."""
    Path(args.root).mkdir(parents=True, exist_ok=True)
    try:
        corpus = torchaudio.datasets.LIBRISPEECH(args.root, url=args.split, download=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise BadInput(f"LibriSpeech {args.split} is not under {args.root}, and no download: {error}") from None
    for n in range(len(corpus)):
        path, _, transcript, speaker, chapter, utterance = corpus.get_metadata(n)
        yield f"{speaker}-{chapter}-{utterance:04}", Path(args.root) / "LibriSpeech" / path, transcript.lower()


def commonvoice_tasks(args):
    """Common Voice's TSV: columns `path` and `sentence`, recordings in --clips."""
    for _, row in table(args.tsv, ("path", "sentence")):
        yield Path(row["path"]).stem, Path(args.clips) / row["path"], row["sentence"]


def manifest_tasks(args):
    """A TSV with a header, or a JSONL: `audio` (relative to --root), `text`, and perhaps `id`, `start` and `seconds`.

    A Lhotse cut (GigaSpeech, Libriheavy) becomes such a line by its recording's source, its supervision's text, and its
    own id, start and duration.
    """
    for i, (where, row) in enumerate(table(args.manifest, ("audio", "text"))):
        try:
            stretch = float(row.get("start") or 0), float(row["seconds"]) if row.get("seconds") else None
        except (OverflowError, TypeError, ValueError):
            raise BadInput(f"{where}: start and seconds must be numbers") from None
        if not all(0 <= number < math.inf for number in stretch if number is not None):
            raise BadInput(f"{where}: start and seconds must be numbers from 0 on")
        name = str(row.get("id") or f"{i:08}").replace("/", "_")
        if len(name.encode()) > 200 or "\0" in name:
            raise BadInput(f"{where}: the id {name!r:.50} cannot be the name of a file")
        yield name, Path(args.root) / row["audio"], row["text"], *stretch


def table(path, columns):
    """("file:line", row) of a .jsonl or of a .tsv with a header. Raises BadInput if a row lacks one of the columns."""
    try:
        for where, row in data.json_lines(path) if Path(path).suffix == ".jsonl" else tsv_lines(path):
            lacking = [c for c in columns if not isinstance(row, dict) or not isinstance(row.get(c), str)]
            if lacking:
                raise BadInput(f"{where}: has no {' and no '.join(lacking)}")
            yield where, row
    except (OSError, csv.Error) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from None


def tsv_lines(path):
    """("file:line", row) of each line of a tab-separated file below its header."""
    with open(path, encoding="utf-8", errors="replace", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), 2):
            yield f"{path}:{number}", row


# ---- writing -------------------------------------------------------------------------------------------------------


def picked(tasks, n, seed):
    """n of the tasks, drawn by the seed, in their old order; all of them if n is None."""
    n = len(tasks) if n is None else min(n, len(tasks))
    return [tasks[i] for i in sorted(random.Random(seed).sample(range(len(tasks)), n))]


def in_parallel(worker, tasks, desc):
    """The worker's results in the tasks' order, by all cores, with a bar."""
    with data.workers() as pool:
        yield from tqdm(pool.map(worker, tasks, chunksize=16), total=len(tasks), desc=desc, unit="sample")


def write(folder, results):
    """samples.jsonl and skipped.jsonl from finished lines, the former last; prints how many were skipped and why."""
    results = list(results)
    kept, skipped = [r for r in results if "skipped" not in r], [r for r in results if "skipped" in r]
    for name, rows in (("skipped.jsonl", skipped), ("samples.jsonl", kept)):
        with faults.written_whole(folder / name) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{folder}: {len(kept)} samples; {len(skipped)} left out (skipped.jsonl names them)")
    for why, count in Counter(row["skipped"].split(":")[0] for row in skipped).most_common():
        print(f"{count:8}  {why}")


def make_llava(args):
    """LLaVA's instruction pairs: the first question of a dialogue about one picture, spoken, and its answer."""
    rows, usable, results = data.read_json(args.annotations, list), [], []
    for number, row in enumerate(rows):
        try:
            usable.append((f"{number:06}", *llava_task(row, Path(args.images))))
        except BadInput as error:
            results.append({"id": f"{number:06}", "skipped": str(error)})
    folder = Path(args.out)
    take = functools.partial(take_llava, folder=folder)
    taken = list(in_parallel(take, picked(usable, args.n, args.seed), "pictures"))
    results += [line for line in taken if "skipped" in line]
    lines = [line for line in taken if "skipped" not in line]
    spoken = (speak_mms(lines, folder, args.seed, args.voice) if args.tts == "mms"
              else speak_espeak(lines, folder, args.seed))
    write(folder, results + list(tqdm(spoken, total=len(lines), desc="speech", unit="sample")))


def make_asr(args):
    """A corpus of recordings and transcripts: 16 kHz FLAC, a line each."""
    tasks = {"librispeech": librispeech_tasks, "commonvoice": commonvoice_tasks, "manifest": manifest_tasks}
    tasks, folder = picked(list(tasks[args.command](args)), args.n, args.seed), Path(args.out)
    repeated = [name for name, count in Counter(name for name, *_ in tasks).items() if count > 1]
    if repeated:
        raise BadInput(f"{args.command}: the id {repeated[0]!r} stands there more than once")
    write(folder, in_parallel(functools.partial(take_clip, folder=folder), tasks, "speech"))


def make_merge(args):
    """Several prepared folders as one: links to them, and their lines, paths and ids prefixed with their names."""
    names, lines = [Path(folder).name for folder in args.folders], []
    if len(set(names)) < len(names):
        raise BadInput(f"two of the folders have one name: {' '.join(args.folders)}")
    for name, folder in zip(names, args.folders):
        for line in data.read_samples(folder):
            line.pop("where")
            line |= {key: f"{name}/{line[key]}" for key in ("id", "image", "audio") if key in line}
            lines.append(line)
        if not (Path(args.out) / name).exists():
            (Path(args.out) / name).symlink_to(Path(folder).resolve())
    write(Path(args.out), lines)


def make(args):
    """The folder --out from a source; refused if another source or other arguments began it."""
    folder = Path(args.out)
    maker = {"llava": make_llava, "merge": make_merge}.get(args.command, make_asr)
    parts = () if args.command == "merge" else ("images", "audio")
    data.make_once(folder, data.told(args), functools.partial(maker, args), parts)


def add_commands(commands):
    """The sources' subcommands of data.py."""
    def command(name, help):
        sub = commands.add_parser(name, help=help)
        sub.add_argument("--out", required=True, help="the prepared folder")
        sub.add_argument("--n", type=data.at_least_one, help="take so many, drawn by --seed (default: all)")
        sub.add_argument("--seed", type=int, default=0, help="of the draw and the voices")
        return sub

    sub = commands.add_parser("merge", help="several prepared folders as one")
    sub.add_argument("folders", nargs="+", help="prepared folders of different names")
    sub.add_argument("--out", required=True, help="the folder of all; it links to the others")
    sub = command("llava", "LLaVA's instruction pairs, their questions spoken")
    sub.add_argument("--annotations", required=True, help="llava_v1_5_mix665k.json")
    sub.add_argument("--images", required=True, help="the folder its image paths are relative to")
    sub.add_argument("--tts", choices=("mms", "espeak"), default="mms", help="who speaks")
    sub.add_argument("--voice", default="facebook/mms-tts-eng", help="folder or hub id of the MMS voice")
    sub = command("librispeech", "LibriSpeech, downloaded if need be")
    sub.add_argument("--root", required=True, help="where the corpus lies or goes")
    sub.add_argument("--split", default="train-clean-100", help="train-clean-360, train-other-500, ...")
    sub = command("commonvoice", "Common Voice")
    sub.add_argument("--tsv", required=True, help="its validated.tsv")
    sub.add_argument("--clips", required=True, help="its folder of recordings")
    sub = command("manifest", "any recordings with transcripts, listed in a .jsonl or .tsv")
    sub.add_argument("--manifest", required=True, help="lines with audio, text, perhaps id, start, seconds")
    sub.add_argument("--root", required=True, help="the folder its audio paths are relative to")
