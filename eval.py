"""Ask a run the same questions in writing and aloud, and count the right answers.

    python eval.py                                             # base, after alignment and every alpha of seed 0
    python eval.py runs/shapes/vision-audio-a*-s[012]          # any runs; those that differ by seed alone are averaged
    python eval.py --show 10 runs/shapes/audio-text-s0         # and print ten of its answers
    python eval.py --cases 8                                   # eight questions with every run's answer, as a picture
    python eval.py --image scene.png --question "what color is the circle"    # one question, in writing and aloud
    python eval.py --image scene.png --audio question.wav                     # one spoken question
    python eval.py RUN RUN --bench DIR                         # the paper's seven benchmarks, as many as DIR has
    python eval.py --endpoint URL --model NAME --bench DIR     # and of any omnimodal model behind a chat server

Answers are generated (greedy), batched by length, and each picture is seen once for both forms of its question.

The built-in world: pictures, questions and voices are held out; no picture has been trained on, and no voice heard.
Right is an answer that has exactly one word of the question's answer class, and that the right one, once an exact echo
of the question is taken away; a description counts by F1 over (colour, shape) pairs.

The paper's benchmarks are asked by ask_benchmarks.py, and read, put into prompts and scored by benchmarks.py.
"""

import argparse
import json
import os
import random
import re
import statistics
import textwrap
from pathlib import Path

import torch
from tqdm import tqdm

import data
import faults
import mmalign
import model
import shapes
import train
from benchmarks import score  # noqa: F401: eval.score, for those who have answers of their own
from faults import BadInput

COLORS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito's, for all eyes
BATCH = 100  # questions generated at once
PAIR = re.compile(rf"\b({'|'.join(shapes.COLORS)}) ({'|'.join(shapes.SHAPES)})\b")  # what a description consists of
VLMEVALKIT_TILES = {"ChartQA_TEST": 12, "MMMU_DEV_VAL": 12, "DocVQA_VAL": 18, "DocVQA_TEST": 18, "InfoVQA_VAL": 24,
                    "InfoVQA_TEST": 24, "OCRBench": 24}  # and 6 for all others


# ---- scoring -------------------------------------------------------------------------------------------------------


def score_answer(sample, answer):
    """How right an answer to a sample of the built-in world is, 0 to 1 (only descriptions lie between)."""
    kind, said = sample["kind"], answer.lower().replace(sample["question"], " ")  # an echo answers nothing
    if kind in shapes.CLASSES:
        named = re.findall(rf"\b(?:{'|'.join(shapes.CLASSES[kind])})\b", said)
        return float(named == [sample["label"]])
    if kind in shapes.ALIGN_KINDS:
        return float(mmalign.judge(answer, sample["question"], sample["label"], sample["false"]) == "right")
    named, true = PAIR.findall(said), PAIR.findall(sample["label"])
    if len(named) > len(shapes.PLACES):  # more than a picture can hold: everything was listed
        return 0.0
    return 2 * len(set(named) & set(true)) / (len(named) + len(true))


def check_scorable(sample):
    """Raises BadInput unless the sample has what answers of its kind are scored by."""
    needed = ("label", "false") if sample["kind"] in shapes.ALIGN_KINDS else ("label",)
    for key in (*needed, *sample.keys() & {"scene"}):
        if not isinstance(sample.get(key), str):
            raise BadInput(f"{sample['where']}: {key!r} must be a string: answers are scored by it")
    if sample["kind"] == "description" and not PAIR.search(sample["label"]):
        raise BadInput(f"{sample['where']}: the label of a description names coloured shapes, not {sample['label']!r}")


def names_what_is_there(sample, answer):
    """Whether an answer names a colour or shape of the picture that its question does not: wrong answers to speech
    still do, the paper finds (section 2.2).
    """
    return bool(set(answer.lower().split()) & set(sample["scene"].split()) & {*shapes.COLORS, *shapes.SHAPES}
                - set(sample["question"].split()))


def paired_bootstrap(a, b, draws=2000, seed=0):
    """(mean, low, high) of b - a, in points: 95 % interval over questions, both runs' answers drawn together.

    It says how far the picked questions matter, not how far another seed of training would: that is the spread.
    """
    difference = 100 * (torch.tensor(b, dtype=torch.float64) - torch.tensor(a, dtype=torch.float64))  # (questions,)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(difference), (draws, len(difference)), generator=generator)  # (draws, questions)
    means = difference[drawn].mean(1).sort().values  # (draws,)
    return difference.mean().item(), means[int(0.025 * draws)].item(), means[int(0.975 * draws)].item()


# ---- asking --------------------------------------------------------------------------------------------------------


def collated(ollm, samples, device, answers=False):
    """A batch of samples on the device, for generation; or with their answers, as in training."""
    batch = data.collate(samples, ollm.tokenizer, ollm.mel_extractor, ollm.settings, answers)
    return train.to(batch, device)


@torch.no_grad()
def answers(ollm, samples, device, forms=("text", "audio"), max_new_tokens=model.MAX_NEW_TOKENS):
    """What the model answers to each sample of a batch: {form: [answer, ...]}; the image prefix is shared."""
    batch = collated(ollm, samples, device)
    prefix, said = ollm.prefix(batch), {}
    if "text" in forms:
        said["text"] = ollm.generate(prefix, batch["text"], None, max_new_tokens)
    if "audio" in forms:
        heard = ollm.hear(batch["mel"], batch["n_frames"])  # (B, A, D)
        said["audio"] = ollm.generate(prefix, batch["audio"], heard, max_new_tokens)
    return said


def transcripts(ollm, samples, device):
    """What the model says it heard in each sample's speech: as in audio-text, no picture, then the instruction."""
    heard = [{"wave": s["wave"], "answer": ""} for s in samples]
    return answers(ollm, heard, device, forms=("audio",))["audio"]


def tiles(choice, folder):
    """How many squares a benchmark's pictures are cut into: N, or what VLMEvalKit took for InternVL2 (July 2024)."""
    return VLMEVALKIT_TILES.get(Path(folder).name, 6) if choice == "vlmevalkit" else choice


def evaluate(run, folder, kinds, n, device, texts, desc, max_tiles=None):
    """Asks a run the first n questions of these kinds; returns its rows, samples with "text", "audio", "transcript".

    max_tiles: another number of tiles than the run was trained with, or "vlmevalkit"
    texts: answers to written questions by base and tiles, shared between runs: their LVLM is the same frozen one
    """
    ollm, about = model.load_run(run), model.about_run(run)
    ollm.to(device).eval()
    if max_tiles is not None:
        ollm.settings["max_tiles"] = tiles(max_tiles, folder)
    listens, base = ollm.audio_encoder is not None, about.get("base_fingerprint") or model.fingerprint(run)
    samples = data.Samples(folder, ollm.settings, ("question", "audio") if listens else ("question",))
    indices = [i for i, row in enumerate(samples.rows) if row.get("kind") in kinds][:n]
    if not indices:
        raise BadInput(f"{folder}: has no question of the kinds {', '.join(kinds)}")
    for i in indices:
        check_scorable(samples.rows[i])
    known = texts.setdefault((base, str(folder), ollm.settings["max_tiles"]), {})
    rows = {}
    indices = sorted(indices, key=samples.length)
    for start in tqdm(range(0, len(indices), BATCH), desc=desc, unit="batch", leave=False):
        chunk = indices[start: start + BATCH]
        batch = [samples[i] for i in chunk]
        forms = [form for form, needed in (("text", not known.keys() >= set(chunk)), ("audio", listens)) if needed]
        said = answers(ollm, batch, device, forms) if forms else {}
        known |= dict(zip(chunk, said.get("text", ())))
        spoken = said.get("audio", [None] * len(chunk))
        heard = transcripts(ollm, batch, device) if about["training"]["stage"] == "audio-text" else [None] * len(chunk)
        for i, audio, transcript in zip(chunk, spoken, heard):
            rows[i] = {**samples.rows[i], "text": known[i], "audio": audio, "transcript": transcript}
    return [rows[i] for i in sorted(rows)]


def answer_one(run, image, question, audio, device):
    """One question about one picture, in writing and aloud; prints the answers. The speech is synthesised if needed."""
    ollm = model.load_run(run).to(device).eval()
    if ollm.audio_encoder is None:
        raise BadInput(f"{run}: this run cannot listen; give one of the stage audio-text or vision-audio")
    sample = {"pixels": data.pixels(data.tile(data.load_image(image), ollm.settings["max_tiles"],
                                              ollm.settings["image_size"])), "question": question or "", "answer": ""}
    if question is not None:
        check_words(ollm.tokenizer, question)
    sample["wave"] = data.load_audio(audio) if audio else data.speak(question)[0]
    said = answers(ollm, [sample], device, ("text", "audio") if question is not None else ("audio",))
    for form, source in (("text", question), ("audio", audio or f"{question} (espeak-ng)")):
        if form in said:
            print(f"{form:5}  {source}  ->  {said[form][0]}")


def check_words(tokenizer, text):
    """Raises BadInput if the text is empty or has a word that a word-level tokenizer does not know."""
    if not text.strip():
        raise BadInput("the question is empty")
    unknown = [word for word in text.split() if tokenizer.unk_token_id in tokenizer(word).input_ids]
    if unknown:
        words = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
        raise BadInput(f"the built-in world does not know {', '.join(map(repr, unknown))}; "
                       f"its words are: {' '.join(words)}")


# ---- reporting -----------------------------------------------------------------------------------------------------


def run_name(about):
    """What a run is called in a table, the same for all seeds."""
    training = {"on_policy": 0, "divergence": "forward", "temperature": 1, **about["training"]}
    own, alpha = training["on_policy"], training["alpha"]
    name = {"vision-text": "base", "audio-text": "aligned"}.get(training["stage"])
    name = name or (f"KD {alpha:g}" if alpha or own else "SFT") + (f", on-policy {own:g}" if own else "")
    name += f", T {training['temperature']:g}" if training["temperature"] != 1 else ""
    return name + (", reverse" if training["divergence"] == "reverse" else "")


def mean_scores(rows, form, kinds):
    """Percent right by kind, for answers to questions in this form ("text" or "audio")."""
    by_kind = {kind: [score_answer(row, row[form]) for row in rows if row["kind"] == kind] for kind in kinds}
    return {kind: 100 * statistics.fmean(scores) for kind, scores in by_kind.items() if scores}


def summary(rows, kinds, average, more=None):
    """One run's percentages, {"text": {line: value}, "audio": {line: value}}; lines are kinds, their mean, more's..."""
    measures = {}
    for form in ("text", "audio"):
        if rows[0][form] is None:
            continue
        scores = mean_scores(rows, form, kinds)
        measures[form] = {**scores, average: statistics.fmean(scores.values()), **(more(rows, form) if more else {})}
        asked = [row[form].split()[:1] for row in rows if row["kind"] == "existence"]
        if asked:
            measures[form]["yes ratio"] = 100 * asked.count(["yes"]) / len(asked)
        wrong = [row for row in rows if "scene" in row and row["kind"] in shapes.KINDS
                 and not score_answer(row, row[form])]
        if wrong:
            named = statistics.fmean(names_what_is_there(row, row[form]) for row in wrong)
            measures[form]["wrong, names what is there"] = 100 * named
    if rows[0]["transcript"] is not None:
        exact = 100 * statistics.fmean(row["transcript"] == row["question"] for row in rows)
        measures["audio"]["transcripts exact"] = exact
    return measures


def table_columns(groups):
    """{column name: [{line: value} of each seed]} from {run name: [summary of each seed]}.

    Runs on one base give the same written answers, as their LVLM is frozen: those stand once, before the spoken ones.
    """
    texts, columns = [], {}
    for name, measures in groups.items():
        text = [m["text"] for m in measures]
        if text not in texts:
            texts.append(text)
            columns["text" if len(texts) == 1 else f"text, {name}"] = text
        if "audio" in measures[0]:
            columns[f"{name}, audio"] = [m["audio"] for m in measures]
            columns[f"{name}, gap"] = [{line: value - m["audio"][line] for line, value in m["text"].items()
                                        if line in m["audio"]} for m in measures]
    return columns


def cell(values, digits=1):
    """A table cell: the mean over seeds, and with several seeds their standard deviation."""
    if None in values:
        return ""
    spread = f" ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def print_table(groups):
    """Prints {run name: [summary of each seed]} as a Markdown table, a line for each kind and measure."""
    columns = table_columns(groups)
    lines = list(dict.fromkeys(line for seeds in columns.values() for line in seeds[0]))
    table = [["", *columns]]
    table += [[line, *(cell([seed.get(line) for seed in seeds]) for seeds in columns.values())] for line in lines]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    table.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    for row in table:
        print("| " + " | ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) + " |")


def print_differences(answered):
    """Each Self-KD run against SFT of the same seeds: the paired difference of spoken answers with its interval."""
    sft = {seed: rows for (name, seed), rows in answered.items() if name == "SFT"}
    for name in sorted({name for name, _ in answered if name.startswith("KD")}):
        seeds = [seed for seed in sft if (name, seed) in answered]
        pairs = [(score_answer(a, a["audio"]), score_answer(b, b["audio"]))
                 for seed in seeds for a, b in zip(sft[seed], answered[name, seed])]
        if pairs:
            mean, low, high = paired_bootstrap(*zip(*pairs))
            print(f"{name} - SFT, spoken: {mean:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f} "
                  f"({len(pairs)} questions, seeds {', '.join(map(str, seeds))})")


def default_runs(preset, seed):
    """The chain of a preset and seed: base, after alignment, every alpha found."""
    folder = Path("runs") / preset
    runs = [folder / f"vision-text-s{seed}", folder / f"audio-text-s{seed}"]
    runs += sorted(folder.glob(f"vision-audio-a*-s{seed}"), key=lambda path: path.name)
    runs = [run for run in runs if (run / "ollm.json").exists()]
    if not runs:
        raise BadInput(f"{folder}: no finished run of seed {seed}; `torchrun train.py --seed {seed}` makes one")
    return runs


def show_cases(answered, folder, n, out):
    """n held-out questions with their pictures and every run's answer, as out/cases.md and out/cases.png (Fig. 9).

    answered  {(run name, seed): rows}, of which the first seed is shown; the questions are drawn blindly
    """
    from matplotlib.figure import Figure  # a second to import

    first = next(iter(answered))[1]
    runs = {name: rows for (name, seed), rows in answered.items() if seed == first}
    forms = {"text": ("text", next(iter(runs.values())))}
    forms |= {f"{name}, audio": ("audio", rows) for name, rows in runs.items() if rows[0]["audio"] is not None}
    rows = next(iter(runs.values()))
    chosen = random.Random(0).sample([i for i, row in enumerate(rows) if "image" in row], min(n, len(rows)))
    lines = [["picture", "question", "true", *forms], ["---"] * (3 + len(forms))]
    figure = Figure(figsize=(9, 1.9 * len(chosen)), layout="constrained")
    for (left, right), i in zip(figure.subplots(len(chosen), 2, squeeze=False, width_ratios=(1, 5)), chosen):
        row, said = rows[i], {label: answers[i][form] for label, (form, answers) in forms.items()}
        left.imshow(data.load_image(folder / row["image"]))
        text = [f"{row['question']}?  ({row['label']})", ""]
        text += [f"{label:{max(map(len, said))}}  {'right' if score_answer(row, answer) == 1 else 'WRONG'}  "
                 + textwrap.shorten(answer, 90) for label, answer in said.items()]
        right.text(0, 0.5, "\n".join(text), family="monospace", fontsize=8, va="center")
        for axes in (left, right):
            axes.set_axis_off()
        picture = f"![]({os.path.relpath(folder / row['image'], out)})"
        lines.append([picture, row["question"], row["label"], *said.values()])
    out.mkdir(parents=True, exist_ok=True)
    with faults.written_whole(out / "cases.md") as temporary:
        temporary.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
    with faults.written_whole(out / "cases.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    print(f"{len(chosen)} questions with every run's answer: {out / 'cases.md'}, {out / 'cases.png'}")


def report(args, kinds, average, more=None):
    """Evaluates the runs named on the command line and prints their table; used by mmalign.py as well.

    more: further lines of the table, a function of (rows, form) that returns {line: value}
    """
    device = torch.device(args.device)
    groups, answered, texts = {}, {}, {}
    for run in args.runs or default_runs(args.preset, args.seed):
        about = model.about_run(run)
        name, seed = run_name(about), about["training"]["seed"]
        if (name, seed) in answered:
            raise BadInput(f"{run}: another of the runs is {name} of seed {seed} as well: ask one of them at a time")
        folder = Path(args.data or f"runs/{args.preset}/data-s{seed}/test")
        rows = evaluate(run, folder, kinds, args.n, device, texts, str(run), args.max_tiles)
        groups.setdefault(name, []).append(summary(rows, kinds, average, more))
        answered[name, seed] = rows
        with faults.written_whole(Path(run) / f"answers-{average.split()[0]}.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for row in random.Random(0).sample(rows, min(args.show, len(rows))):
            print(f"  {row['question']}?  ({row['label']})  text: {row['text']}  audio: {row['audio']}")
    print(f"{len(rows)} held-out questions a run; percent right"
          + (", mean ± standard deviation over seeds" if any(len(g) > 1 for g in groups.values()) else ""))
    print_table(groups)
    print_differences(answered)
    if args.cases:
        seed = next(iter(answered))[1]
        show_cases(answered, Path(args.data or f"runs/{args.preset}/data-s{seed}/test"), args.cases, Path(args.out))


def tile_count(text):
    """An argparse type: a count, or "vlmevalkit"."""
    return text if text == "vlmevalkit" else data.at_least_one(text)


def run_arguments(description):
    """The arguments of every script that looks at runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="run folders (default: the chain of --preset and --seed)")
    parser.add_argument("--preset", choices=train.PRESETS, default="shapes", help="whose runs, if none are named")
    parser.add_argument("--seed", type=int, default=0, help="whose runs, if none are named")
    parser.add_argument("--data", help="prepared folder of questions (default: the test part of each run's seed)")
    parser.add_argument("--n", type=data.at_least_one, help="take only the first so many questions")
    parser.add_argument("--out", default="runs/report", help="folder for tables and pictures")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="where to run (default: cuda if there is one)",
                        default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def arguments(description):
    """The arguments that eval.py and mmalign.py share."""
    parser = run_arguments(description)
    parser.add_argument("--max-tiles", type=tile_count, help="squares a picture is cut into, thumbnail aside: a number "
                        "or vlmevalkit, which goes by the benchmark (default: as the run was trained)")
    parser.add_argument("--show", type=int, default=0, help="print so many of each run's answers")
    parser.add_argument("--cases", type=data.at_least_one, help="put so many questions with every run's answer in a "
                        "picture and a Markdown table")
    return parser


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--image", help="ask one question about this picture")
    parser.add_argument("--question", help="the question; it is spoken by espeak-ng unless --audio is given")
    parser.add_argument("--audio", help="the question spoken, any format and rate that soundfile reads")
    parser.add_argument("--bench", nargs="+", metavar="TSV", help="benchmarks: VLMEvalKit's files, or folders of them")
    parser.add_argument("--speak", choices=["prompt", "question"], default="prompt", help="what of a benchmark's "
                        "prompt is spoken: all, or the question, with options and format in writing after it")
    parser.add_argument("--voice", default=data.VOICES[0], help="espeak-ng's voice for benchmarks, accent+variant")
    parser.add_argument("--speech", default="runs/speech", help="folder that keeps the benchmarks' speech")
    parser.add_argument("--batch", type=data.at_least_one, default=8, help="benchmark questions generated at once")
    parser.add_argument("--max-new-tokens", type=data.at_least_one, default=64, help="of an answer, in benchmarks")
    parser.add_argument("--endpoint", metavar="URL", help="ask an OpenAI-compatible chat server (.../v1), too")
    parser.add_argument("--model", help="the name of the server's model")
    args = parser.parse_args()
    if bool(args.image) != bool(args.question is not None or args.audio):
        parser.error("one question needs --image, and --question or --audio")
    if bool(args.endpoint) != bool(args.model) or args.endpoint and not args.bench:
        parser.error("an endpoint needs --model and --bench")
    with faults.readable_errors():
        if args.image:
            run = args.runs[0] if args.runs else train.run_folder(args.preset, "vision-audio", 0.75, args.seed)
            answer_one(run, args.image, args.question, args.audio, torch.device(args.device))
        elif args.bench:
            import ask_benchmarks  # here, because it imports this file

            ask_benchmarks.report_benchmarks(args)
        else:
            report(args, shapes.KINDS, "mean of six kinds")
