"""The lines of a prepared folder's samples.jsonl: read, and checked with the files they name."""

import json
from pathlib import Path

from tqdm import tqdm

from plumbing.files import BadInput, at, json_lines, read_json
from plumbing.media import VOICES, load_audio, load_image, save_sound, speak
from plumbing.processes import workers


def read_samples(folder):
    """Returns the lines of folder/samples.jsonl as dicts; adds "where" (file:line) and "folder"."""
    samples = []
    for where, sample in json_lines(Path(folder) / "samples.jsonl"):
        with at(where):
            check_sample(sample)
        number = str(len(samples) + 1)
        if "group" in sample:  # other folders have groups of the same name
            sample["group"] = f"{folder}/{sample['group']}"
        samples.append({"id": number, **sample, "where": where, "folder": str(folder)})
    if not samples:
        raise BadInput(f"{folder}/samples.jsonl: has no sample")
    return samples


def how_asked(folders):
    """Returns how the folders' questions are spoken: {"suffix", "tts", "voice"}.

    suffix  what becomes of format suffixes: "spoken", "written" or "dropped"
    tts     who speaks, "mms" or "espeak", and its voice (of MMS only; espeak-ng has many)
    All stand in settings.json; what it does not tell is dropped suffixes and espeak-ng. Raises
    BadInput if two suffixes differ: one model cannot be evaluated in both ways. Of several voices,
    the first folder's counts.
    """
    suffixes, voices = {}, []
    for folder in folders:
        note = Path(folder) / "settings.json"
        settings = read_json(note) if note.exists() else {}
        suffixes.setdefault(settings.get("suffix", "dropped"), folder)
        tts = settings.get("tts", "espeak")
        voices.append({"tts": tts, "voice": settings.get("voice") if tts == "mms" else None})
    if len(suffixes) > 1:
        each = ", ".join(f"{suffix} in {folder}" for suffix, folder in suffixes.items())
        raise BadInput(f"the format suffixes are {each}: prepare all folders with one --suffix")
    return {"suffix": next(iter(suffixes)), **voices[0]}


def check_sample(sample):
    """Raises an error unless a line has an answer, a question or speech, and files inside."""
    if not sample["answer"].strip():
        raise BadInput("the answer is empty")
    if not sample.get("question", "speech").strip() or not sample.keys() & {"question", "audio"}:
        raise BadInput("there is no question, neither in writing nor aloud")
    for key in ("image", "audio"):
        path = Path(sample.get(key, ""))
        if path.is_absolute() or ".." in path.parts:
            raise BadInput(f"{key} must lie inside the folder, not at {path}")
    float(sample.get("phase", 0))  # the built-in base learns in phases, see train.Epoch


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


def check_folder(folder):
    """Reads every line, picture and recording of a prepared folder, and prints what is wrong."""
    path = Path(folder) / "samples.jsonl"
    lines = path.read_bytes().splitlines()
    tasks = [(path.parent, f"{path}:{number}", line) for number, line in enumerate(lines, 1)]
    with workers() as pool:
        results = pool.map(check_line, tasks, chunksize=16)
        wrong = [message for message in tqdm(results, total=len(tasks), unit="line") if message]
    print("".join(f"{message}\n" for message in wrong), end="")
    if wrong or not lines:
        raise BadInput(f"{path}: {len(wrong)} of its {len(lines)} lines are wrong")
    print(f"{path}: nothing is wrong with its {len(lines)} lines and their files")
