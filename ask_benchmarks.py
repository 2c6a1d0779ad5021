"""The paper's evaluation: the seven benchmarks, asked in writing and aloud, as its tables have them.

    python eval.py RUN RUN --bench DIR                         # runs, on as many of the seven as DIR has
    python eval.py RUN --bench MME.tsv --speak question        # options and format in writing, after the speech
    python eval.py --endpoint URL --model NAME --bench DIR     # any omnimodal model behind a chat server

Files, prompts and scores are those of benchmarks.py; here they are asked. Answers are appended to RUN/predictions as
they come, batch by batch, so that what was interrupted goes on where it stopped, and ends with the same file.
"""

import functools
import hashlib
import json
import math
import re
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

import benchmarks
import data
import endpoint
import eval
import faults
import model
from benchmarks import BENCHMARKS, score
from faults import BadInput

SPEEDS = (175, 260, 350, 450)  # words a minute; a long question is spoken faster until Whisper hears it whole
SHARES = ("yes ratio of answered", "yes ratio of all", "unknown share")
SHOWN = {  # what the table says of a benchmark beside the paper's columns
    "MME": ("perception", "reasoning", "sum/28", "accuracy", *SHARES),
    "HallusionBench": ("aAcc", "fAcc", "qAcc", *SHARES), "RealWorldQA": ("unknown share",)}


def bench_files(paths):
    """The benchmarks' files among these; a folder stands for those of the seven that it has."""
    files = []
    for path in map(Path, paths):
        found = [path / f"{name}.tsv" for name in BENCHMARKS if (path / f"{name}.tsv").exists()]
        if path.is_dir() and not found:
            raise BadInput(f"{path}: has none of {', '.join(f'{name}.tsv' for name in BENCHMARKS)}")
        files += found if path.is_dir() else [path]
    for path in files:
        benchmarks.check(path.stem)
    return files


def bench_rows(path, n):
    """The first n questions of a benchmark's file, each with its "prompt" and the prompt's parts, "said" and "rest"."""
    rows, dropped = benchmarks.read_tsv(path)
    if dropped:
        print(f"{path}: {dropped} rows without a picture are left out, as VLMEvalKit does")
    for row in rows:
        row["said"], row["rest"] = benchmarks.prompt(path.stem, row)
        row["prompt"] = row["said"] + row["rest"]
    return rows[:n]


def speech(text, voice, cache):
    """The text spoken by espeak-ng, (samples,), from the folder `cache`, which keeps each text and voice."""
    path = cache / f"{hashlib.sha256(f'{voice}|{text}'.encode()).hexdigest()[:32]}.flac"
    if not path.exists():
        waves = (data.speak(text, voice, rate)[0] for rate in SPEEDS)
        wave = next((w for w in waves if len(w) <= data.MAX_SECONDS * data.SAMPLE_RATE), None)
        if wave is None:
            raise BadInput(f"a question of {len(text.split())} words takes over {data.MAX_SECONDS} s to say; "
                           "--speak question leaves options and format in writing")
        cache.mkdir(parents=True, exist_ok=True)
        data.save_flac(path, wave)
    return data.load_audio(path)


def bench_sample(row, forms, args):
    """A row as a sample: its picture, the prompt in writing, and the prompt or the question alone aloud."""
    sample = {"id": row["index"], "where": row["where"], "image": benchmarks.image_of(row), "question": row["prompt"],
              "answer": ""}
    if "audio" not in forms:
        return sample
    spoken, after = (row["prompt"], "") if args.speak == "prompt" else (row["said"], row["rest"])
    try:
        return {**sample, "wave": speech(spoken, args.voice, Path(args.speech)), "after": after}
    except BadInput as error:
        raise BadInput(f"{row['where']}: {error}") from None


def finished(path, batches):
    """{index: line} of the answers that an earlier evaluation left in `path`.

    A last line cut off, and batches of which only a part stands there, are dropped from it: they are asked anew, whole.
    """
    if not path.exists():
        return {}
    done = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        line = data.parsed(line, where := f"{path}:{number}")
        if not isinstance(line, dict) or not all(isinstance(line.get(key), str) for key in ("index", "prompt", "text")):
            raise BadInput(f"{where}: not an answer of an earlier evaluation: delete the file to ask anew")
        if not isinstance(line.get("audio", 0), (str, type(None))):
            raise BadInput(f"{where}: 'audio' must be a string or null: delete the file to ask anew")
        done[line["index"]] = line
    for row in (row for batch in batches for row in batch if row["index"] in done):
        if done[row["index"]]["prompt"] != row["prompt"]:
            raise BadInput(f"{path}: answers another question than {row['where']} asks: delete it to ask anew")
    for batch in batches:
        if not all(row["index"] in done for row in batch):
            for row in batch:
                done.pop(row["index"], None)
    with faults.written_whole(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in done.values()), encoding="utf-8")
    return done


def predict(ask, forms, rows, path, texts, args):
    """Asks each row in writing and aloud; returns the rows with "text" and "audio", which is None without speech.

    ask    (samples, forms) -> {form: [answer, ...]}
    path   JSONL to which each batch's answers are appended; a batch that stands there whole is not asked again.
           Batches are the same each time, so that what was interrupted and what was not are the same
    texts  {index: answer} to written questions, known from another run on the same frozen LVLM
    """
    ordered = sorted(rows, key=lambda row: len(row["prompt"]))
    batches = [ordered[start: start + args.batch] for start in range(0, len(rows), args.batch)]
    done = finished(path, batches)
    texts.update({index: line["text"] for index, line in done.items()})
    for batch in tqdm(batches, desc=str(path), unit="batch"):
        if all(row["index"] in done for row in batch):
            continue
        needed = [f for f in forms if f == "audio" or any(row["index"] not in texts for row in batch)]
        said = ask([bench_sample(row, needed, args) for row in batch], needed) if needed else {}
        texts.update({row["index"]: answer for row, answer in zip(batch, said.get("text", ()))})
        lines = [{"index": row["index"], "prompt": row["prompt"], "answer": row["answer"], "text": texts[row["index"]],
                  "audio": audio} for row, audio in zip(batch, said.get("audio", [None] * len(batch)))]
        with open(path, "a", encoding="utf-8") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)
        done |= {line["index"]: line for line in lines}
    return [{**row, **done[row["index"]]} for row in rows]


def ask_run(ollm, device, max_new_tokens, samples, forms):
    """`answers` of a run to a benchmark's samples, whose pictures are still to be tiled."""
    for sample in samples:
        squares = data.tile(sample["image"], ollm.settings["max_tiles"], ollm.settings["image_size"])
        sample["pixels"] = data.pixels(squares)
    return eval.answers(ollm, samples, device, forms, max_new_tokens)


def subject(run, args):
    """Who is asked: {"name" in the table, "folder" for answers, "reads" (what answers written questions), "forms",
    "settings" of prompts, "ask" as `predict` wants it}; a run, or for None the endpoint's model.
    """
    if run is None:
        ask = functools.partial(endpoint.answers, args.endpoint, args.model, max_new_tokens=args.max_new_tokens)
        folder = Path("runs/endpoint") / re.sub(r"[^\w.-]+", "-", args.model)
        return {"name": args.model, "folder": folder, "reads": args.model, "forms": ("text", "audio"),
                "settings": {"max_tiles": None}, "ask": ask}
    ollm, about, device = model.load_run(run).eval(), model.about_run(run), torch.device(args.device)
    reads = about.get("base_fingerprint") or model.fingerprint(run)
    forms = ("text",) if ollm.audio_encoder is None else ("text", "audio")
    return {"name": eval.run_name(about), "folder": Path(run), "reads": reads, "forms": forms,
            "settings": ollm.settings, "ask": functools.partial(ask_run, ollm.to(device), device, args.max_new_tokens)}


def bench_scores(run, files, texts, args):
    """(the subject's name, {form: {benchmark: what score() gives}}) of a run on these files."""
    who = subject(run, args)
    results = {form: {} for form in who["forms"]}
    for file in files:
        if args.max_tiles is not None and run is not None:
            who["settings"]["max_tiles"] = eval.tiles(args.max_tiles, file.stem)
        squares = who["settings"]["max_tiles"]
        rows = bench_rows(file, args.n)
        name = f"{file.stem}-{args.speak}-{args.voice.replace('/', '_')}-{args.max_new_tokens}tokens"
        name += f"-{squares}tiles" if squares else ""
        known = texts.setdefault((who["reads"], file, squares), {})
        path = who["folder"] / f"predictions/{name}.jsonl"
        with faults.only_writer(path.parent):
            rows = predict(who["ask"], who["forms"], rows, path, known, args)
        for form in who["forms"]:
            results[form][file.stem] = score(file.stem, [{**row, "prediction": row[form]} for row in rows])
    return who["name"], results


def bench_measures(results):
    """{column: value} of one run and form from {benchmark: what score() gives}: the paper's columns, mean, the rest."""
    columns = {column: result[key] for name, result in results.items() for column, key in BENCHMARKS[name].items()
               if key in result}
    rest = {f"{name}: {key}": result[key] for name, result in results.items() for key in SHOWN.get(name, ())}
    return {**columns, "mean": statistics.fmean(columns.values() or [math.nan]), **rest}


def report_benchmarks(args):
    """Asks every run, and the endpoint, the benchmarks' questions; prints the table and writes it as JSON and PNG."""
    files, groups, results, texts = bench_files(args.bench), {}, {}, {}
    runs = args.runs or ([] if args.endpoint else eval.default_runs(args.preset, args.seed))
    for run in [*runs, *([None] if args.endpoint else [])]:
        name, scored = bench_scores(run, files, texts, args)
        results[name if run is None else str(run)] = scored
        groups.setdefault(name, []).append({form: bench_measures(scores) for form, scores in scored.items()})
    eval.print_table(groups)
    print_bench_differences(results)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with faults.written_whole(out / "benchmarks.json") as temporary:
        temporary.write_text(json.dumps(without_nan({"table": groups, "runs": results}), indent=1) + "\n")
    draw_bars(groups, [column for path in files for column in BENCHMARKS[path.stem]], out / "benchmarks.png")
    print(f"The same as JSON and as a picture: {out / 'benchmarks.json'}, {out / 'benchmarks.png'}")


def without_nan(value):
    """A JSON value with null for what is not a number, such as the yes ratio of no answer at all."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def print_bench_differences(results):
    """Differences of the mean score of a row, with 95 % intervals over rows: speech against text, run against run."""
    listening = [run for run in results if "audio" in results[run]]
    for i, run in enumerate(listening):
        pairs = [("speech - text", results[run]["text"], results[run]["audio"])]
        if i:
            pairs.append((f"speech - that of {listening[0]}", results[listening[0]]["audio"], results[run]["audio"]))
        for what, before, after in pairs:
            for name in after:
                mean, low, high = eval.paired_bootstrap(before[name]["rows"], after[name]["rows"])
                print(f"{run}, {name}, {what}: {mean:+.1f} points a row, 95 % interval {low:+.1f} to {high:+.1f}")


def draw_bars(groups, columns, path):
    """The table's columns as grouped bars: text once for each base, and every run's speech; means over seeds."""
    from matplotlib.figure import Figure  # a second to import

    bars = {}
    for name, seeds in groups.items():
        for form in seeds[0]:
            values = [statistics.fmean(seed[form].get(column, math.nan) for seed in seeds) for column in columns]
            if form == "audio" or values not in bars.values():
                bars["text" if form == "text" and not bars else f"{name}, {form}"] = values
    figure = Figure(figsize=(2 + 1.2 * len(columns), 4), layout="constrained")
    axes, width = figure.add_subplot(), 0.8 / len(bars)
    for i, (label, values) in enumerate(bars.items()):
        places = [x - 0.4 + (i + 0.5) * width for x in range(len(columns))]
        axes.bar(places, values, width, label=label, color=eval.COLORS[i % len(eval.COLORS)])
    axes.set_xticks(range(len(columns)), columns)
    axes.set_ylabel("score (%)")
    figure.legend(loc="outside upper center", ncols=4, fontsize="small")
    with faults.written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
