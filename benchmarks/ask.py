"""The paper's evaluation: the seven benchmarks, asked in writing and aloud.

    python eval.py RUN RUN --bench DIR                       # runs, on those of the seven in DIR
    python eval.py RUN --bench MME.tsv --suffix written      # options and format stay in writing
    python eval.py --endpoint URL --model NAME --bench DIR   # any model behind a chat server

questions.py reads the files and writes the prompts, scorers.py scores, report.py prints and draws;
here they are asked. Answers are appended to RUN/predictions batch by batch, so an evaluation that
was interrupted goes on where it stopped and ends with the same file. Each file has a lock of its
own: seven commands may ask a run seven benchmarks at once. A model that is no run of ours has its
answers in runs/asked/NAME, a server's in runs/endpoint/NAME.
"""

import argparse
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from benchmarks import endpoint
from benchmarks.questions import image_of, prompt, read_tsv
from benchmarks.report import draw_bars, measures, print_bench_differences
from benchmarks.scorers import BENCHMARKS, score
from data import picture_inputs
from model import OLLM
from plumbing import runs
from plumbing.files import BadInput, at, at_least, only_writer, write_json_lines, write_text
from plumbing.media import MAX_SECONDS, SAMPLE_RATE, VOICES, load_audio, save_sound, speak
from plumbing.tables import print_summaries
from real.speech import MMS_VOICE, speak_mms

DEFAULT_VOICES = {"espeak": VOICES[0], "mms": MMS_VOICE}
SPEEDS = (175, 260, 350, 450)  # words a minute: long questions are spoken faster
VLMEVALKIT_TILES = {"ChartQA_TEST": 12, "DocVQA_VAL": 18, "InfoVQA_VAL": 24}  # others 6 (July 2024)
QWEN2_VL_TILES = {"min_tiles": 5, "max_tiles": 64}  # pixels of a picture, in all seven


def add_arguments(parser):
    """Adds the flags of the benchmarks to eval.py's parser."""
    add = parser.add_argument
    add("--bench", nargs="+", metavar="TSV", help="VLMEvalKit's files, or folders of them")
    add("--suffix", choices=["spoken", "written", "dropped"], help="options and format behind a "
        "question: said aloud, in writing after the speech, or left out (default: as in training)")
    add("--tts", choices=list(DEFAULT_VOICES), help="who speaks the benchmarks (default: as in "
        "training; espeak for a model that is no run)")
    add("--voice", help="a voice of espeak-ng, or an MMS model's folder or hub id (default: as in "
        "training)")
    add("--speech", default="runs/speech", help="folder that keeps the benchmarks' speech")
    add("--max-new-tokens", type=at_least(1), default=64, help="of an answer, in benchmarks")
    add("--vlmevalkit-tiles", action="store_true",
        help="tiles as VLMEvalKit had them: InternVL2 6 to 24, Qwen2-VL 5 to 64 in one picture")
    add("--endpoint", metavar="URL", help="ask an OpenAI-compatible chat server (.../v1), too")
    add("--model", help="the name of the server's model")


# ---- questions -----------------------------------------------------------------------------------


def bench_files(paths):
    """Returns the benchmarks' files; a folder stands for those of the seven that it has."""
    files = []
    for path in map(Path, paths):
        inside = [path / f"{name}.tsv" for name in BENCHMARKS]
        files += [file for file in inside if file.exists()] or [path]
    for file in files:
        if [other.stem for other in files].count(file.stem) > 1:
            raise BadInput(f"{file}: another file is {file.stem}, too; name one only")
        if file.stem not in BENCHMARKS:
            names = ", ".join(f"{name}.tsv" for name in BENCHMARKS)
            raise BadInput(f"{file}: no such benchmark; there are {names}")
    return files


def bench_rows(path, n, suffix, chat="Hermes-2"):
    """Returns a benchmark's first n rows, each with "prompt": what is written, "aloud" and "after".

    suffix: "spoken", "written" or "dropped", what becomes of options and format behind the question
    chat: whose wording
    """
    rows, dropped = read_tsv(path)
    if dropped:
        print(f"{path}: {dropped} rows without a picture are left out, as VLMEvalKit does")
    for row in rows:
        question, rest = prompt(path.stem, row, chat)
        row["prompt"] = question if suffix == "dropped" else question + rest
        row["aloud"] = question + rest if suffix == "spoken" else question
        row["after"] = rest if suffix == "written" else ""
    score(path.stem, rows[:n])  # what cannot be scored is refused before it is asked
    return rows[:n]


def bench_sample(row, forms, settings, args):
    """Returns a row as a sample: its picture, and its prompt in writing, and aloud if need be.

    settings: of the picture's tiles, as model.py has them; {} leaves it as it is (a server's)
    """
    with at(row["where"]):
        sample = {"where": row["where"], "image": image_of(row), "question": row["prompt"],
                  "answer": ""}
        if settings:
            sample["pixels"] = picture_inputs(sample["image"], settings)
        if "audio" in forms:
            sample |= {"wave": speech(row["aloud"], args), "after": row["after"]}  # (samples,)
        return sample


def with_voice(args, settings):
    """Returns args with --tts and --voice filled in: as a run was trained, by its settings."""
    tts = args.tts or settings.get("tts", "espeak")
    trained = settings.get("voice") if tts == settings.get("tts") else None
    voice = args.voice or trained or DEFAULT_VOICES[tts]
    return argparse.Namespace(**vars(args) | {"tts": tts, "voice": voice})


def speech_path(text, args):
    """Returns where --speech keeps a text spoken by the voice."""
    name = hashlib.sha256(f"{args.voice}|{text}".encode()).hexdigest()[:32]
    return Path(args.speech) / f"{name}.flac"


def speech(text, args):
    """Returns a text spoken, (samples,): from --speech, or by espeak-ng, a long text faster."""
    path = speech_path(text, args)
    if not path.exists():
        voice = args.voice if args.tts == "espeak" else VOICES[0]
        for words_per_minute in SPEEDS:
            wave, _ = speak(text, voice, words_per_minute)  # (samples,)
            if len(wave) <= MAX_SECONDS * SAMPLE_RATE:
                break
        save_sound(path, wave)  # refuses one that is still too long
    return load_audio(path)


def speak_rows(rows, args):
    """Speaks the rows with an MMS voice, as in training, into --speech.

    What that voice cannot say, `speech` has espeak-ng say: a benchmark is asked as a whole.
    """
    lines = {}
    for row in rows:
        path = speech_path(row["aloud"], args)
        lines[path.stem] = {"id": path.stem, "question": row["aloud"], "audio": path.name}
    folder = Path(args.speech)
    spoken = speak_mms(list(lines.values()), folder, seed=0, path=args.voice)
    skipped = sum("skipped" in line for line in tqdm(spoken, total=len(lines), desc="speech"))
    if skipped:
        print(f"{skipped} of {len(lines)} questions are said by espeak-ng, as MMS cannot")


# ---- answers -------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A model that is asked: a run, any LVLM that model.py reads, or a server's."""
    label: str  # in printed lines
    name: str  # in tables, the same for all seeds
    folder: Path  # of its predictions
    forms: tuple  # that it understands: "text", "audio"
    answer: Callable  # function of (samples, forms) that returns {form: [answer, ...]}
    settings: dict = field(default_factory=dict)  # model.py's; a server's are not ours to know
    version: str = ""  # 8 hex digits of its weights, or a server's model


def subjects(args):
    """Yields the runs that args name, then the server's model."""
    asked = runs.asked_for(args) if args.runs or not args.endpoint else []
    groups = runs.group_runs(asked)
    if args.endpoint and args.model in [*groups, *map(str, asked)]:
        raise BadInput(f"--model {args.model}: a run has this name, too")
    for name, by_seed in groups.items():
        for run in by_seed.values():
            yield run_subject(run, name, args)
    if args.endpoint:
        yield server_subject(args)


def run_subject(run, name, args):
    """Returns a run, or any LVLM that model.py reads."""
    ollm, info = OLLM.load(run, args.device).eval(), runs.about(run)
    settings = dict(ollm.settings)
    if args.max_tiles is not None:
        settings["max_tiles"] = args.max_tiles

    # A run that is trained anew in the same folder, or on another base, is asked anew.
    sources = [info.get(f"{part}_fingerprint", "") for part in ("base", "whisper")]
    weights = "".join([runs.fingerprint(run), *sources])
    return Subject(
        label=str(run), name=name, folder=runs.place_for_answers(run),
        forms=("text",) if ollm.audio_encoder is None else ("text", "audio"),
        answer=functools.partial(ollm.answer, max_new_tokens=args.max_new_tokens),
        settings=settings, version=hashlib.sha256(weights.encode()).hexdigest()[:8])


def server_subject(args):
    """Returns the server's model."""
    if not args.model:
        raise BadInput("--endpoint needs --model, the name of the server's model")
    name = re.sub(r"[^\w.-]+", "-", args.model).strip(".")
    server = endpoint.Server(args.endpoint, args.model, args.max_new_tokens, args.batch or 8)
    return Subject(label=args.model, name=args.model, folder=Path("runs/endpoint") / name,
                   forms=("text", "audio"), answer=server.answer, version=args.model)


def read_predictions(path, batches):
    """Returns {index: line} of the answers that an earlier evaluation left in a file.

    A last line cut off, and batches of which only a part is there, are dropped from the file: they
    are asked anew. Raises BadInput for a line that answers another question than its row asks now.
    """
    if not path.exists():
        return {}
    predictions, keys = {}, ("index", "prompt", "answer", "text", "audio")
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        with at(f"{path}:{number}"):
            line = json.loads(line)
            predictions[line["index"]] = {**line, **{key: line[key] for key in keys}}

    for batch in batches:
        lines = [predictions.get(row["index"]) for row in batch]
        for row, line in zip(batch, lines):
            asked = row["prompt"], row["asked"]
            if line and (line["prompt"], line.get("asked", row["asked"])) != asked:
                raise BadInput(f"{path}: answers another question, picture or voice than "
                               f"{row['where']} has, or is another model's: delete it to ask anew")
            if None in lines:
                predictions.pop(row["index"], None)
    write_json_lines(path, predictions.values())
    return predictions


def predict(subject, settings, rows, path, args):
    """Asks each row in writing and aloud. Returns {index: {"text": answer, "audio": answer, ...}}.

    path: JSONL to which each batch's answers are appended; "audio" is None without speech
    """
    # What an answer depends on, and the file's name may not tell: "a/b" and "a_b" have one name.
    for row in rows:
        inputs = [subject.version, args.voice, *map(row.get, ("prompt", "aloud", "after", "image"))]
        row["asked"] = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]

    # Questions of like length share a batch. Batches are the same each time, so an evaluation that
    # was interrupted ends with the same file as one that was not.
    ordered = sorted(rows, key=lambda row: len(row["prompt"]))
    size = args.batch or 8
    batches = [ordered[start : start + size] for start in range(0, len(rows), size)]
    predictions = read_predictions(path, batches)

    for batch in tqdm(batches, desc=str(path), unit="batch"):
        if batch[0]["index"] in predictions:  # and so are the others: there are whole batches only
            continue
        samples = [bench_sample(row, subject.forms, settings, args) for row in batch]
        answers = {"text": [], "audio": [None] * len(batch),
                   **subject.answer(samples, subject.forms)}

        # A batch is on disk before the next is asked.
        lines = [{**{key: row[key] for key in ("index", "prompt", "answer", "asked")},
                  **{key: values[i] for key, values in answers.items()}}
                 for i, row in enumerate(batch)]
        with open(path, "a", encoding="utf-8") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)
        predictions |= {line["index"]: line for line in lines}
    return predictions


def score_subject(subject, files, args):
    """Returns {form: {benchmark: what `score` gives}} of a subject on these files."""
    results = {form: {} for form in subject.forms}
    args = with_voice(args, subject.settings)
    suffix = args.suffix or subject.settings.get("suffix", "spoken")
    if "audio" in subject.forms:
        print(f"{subject.label}: spoken by {args.tts} ({args.voice}), format suffixes {suffix}")
    for file in files:
        settings = tile_settings(subject.settings, file.stem, args)
        rows = bench_rows(file, args.n, suffix, settings.get("chat", "Hermes-2"))
        if args.tts == "mms" and "audio" in subject.forms:
            speak_rows(rows, args)
        path = predictions_file(subject, settings, file.stem, suffix, args)
        with only_writer(path.parent, file=path.name):  # other benchmarks may be asked beside it
            predictions = predict(subject, settings, rows, path, args)
        for form in subject.forms:
            for row in rows:
                row["prediction"] = predictions[row["index"]][form]
            remarks = [predictions[row["index"]].get(f"{form} remark") for row in rows]
            remarks = Counter(f"answers {remark}" for remark in remarks if remark)
            results[form][file.stem] = {**score(file.stem, rows), "remarks": remarks}
    return results


def tile_settings(settings, benchmark, args):
    """Returns the settings of a benchmark's tiles: a subject's own, or VLMEvalKit's."""
    if not settings or not args.vlmevalkit_tiles:
        return settings
    if "min_tiles" in settings:
        return settings | QWEN2_VL_TILES
    return settings | {"max_tiles": VLMEVALKIT_TILES.get(benchmark, 6)}


def predictions_file(subject, settings, benchmark, suffix, args):
    """Returns where predictions are kept. The name tells all that they depend on."""
    voice = args.voice.replace("/", "_")
    name = f"{benchmark}-{suffix}-{voice}-{args.max_new_tokens}tokens"
    if settings:
        name += f"-{settings['max_tiles']}tiles-{subject.version}"
    return subject.folder / f"predictions/{name}.jsonl"


# ---- the report ----------------------------------------------------------------------------------


def report_benchmarks(args):
    """Asks every run, and the server; prints the table, and writes it as JSON and as a picture."""
    files, groups, results, out = bench_files(args.bench), {}, {}, Path(args.out)
    for subject in subjects(args):
        scores = score_subject(subject, files, args)
        results[subject.label] = scores
        column = {form: measures(benchmarks) for form, benchmarks in scores.items()}
        groups.setdefault(subject.name, []).append(column)
        del subject  # one model at a time is in memory

    print_summaries(groups)
    print_bench_differences(results)
    content = json.dumps({"table": groups, "runs": results}, indent=1)
    write_text(out / "benchmarks.json", content + "\n")
    print(out / "benchmarks.json")
    columns = [column for file in files for column in BENCHMARKS[file.stem]]
    draw_bars(groups, columns, out / "benchmarks.png")
