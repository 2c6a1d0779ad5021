"""Ask runs the same questions as text and as speech, and score the answers.

    python eval.py                                           # base, aligned, every alpha of seed 0
    python eval.py runs/shapes/vision-audio-a*-s[012]        # any runs; seeds are averaged
    python eval.py --show 10 runs/shapes/audio-text-s0       # and print ten of its answers
    python eval.py RUN [RUN ...] --data FOLDER               # any data: word errors, or agreement
    python eval.py --image scene.png --question "what color is the square"    # one to every run
    python eval.py RUN --image scene.png --audio question.wav                 # spoken by you
    python eval.py RUN RUN --bench prepared/MME ...          # the paper's, by benchmarks/build.py
    python eval.py --endpoint URL --model NAME --bench prepared/MME ...       # of a chat server

Answers are generated greedily. The base answers the written questions, once for all runs on it. In
the built-in world, pictures and voices are held out, and half of the sentences; how an answer is
scored stands in world/answers.py. Two bounds stand in its table: the base reads another question of
the same kind (the floor), the aligned run reads its own transcript (a cascade). Of any other
folder, transcripts and answers are compared word for word: benchmarks/words.py.
"""

import plumbing  # noqa: F401  # isort: skip (before torch: sets how its threads wait)
import functools
import random
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import data
from benchmarks import report as bench_report
from benchmarks import words
from benchmarks.endpoint import server_subject
from benchmarks.scorers import BENCHMARKS, score
from model import OLLM
from plumbing import prepared, runs
from plumbing.answers import answers_name, ask, subject_of
from plumbing.files import BadInput, at, in_range, readable_errors
from plumbing.media import MAX_SECONDS, speak
from plumbing.tables import print_summaries, seed_interval
from real.families import CHATS, QWEN2_VL
from world import answers as judge
from world import shapes
from world.answers import score_answer
from world.models import check_words

AVERAGE = "mean of six kinds"
ASKED = {"text": "question", "audio": "audio", "transcript": "audio",  # in samples.jsonl, by form
         "cascade": "audio", "floor": "question"}
FORMS = {"text": "text", "audio": "speech"}  # in what is printed
# Tokens of an answer, at most: of any other folder, of benchmarks, in the built-in world
LONG, SHORT, BRIEF = 256, 64, 48


# ---- asking --------------------------------------------------------------------------------------


def transcribe(ollm, samples):
    """Returns a transcript of each sample's speech: no picture, then the instruction."""
    speech = [{"wave": sample["wave"], "answer": ""} for sample in samples]
    return ollm.answer(speech, ("audio",))["audio"]


def run_subject(run, args):
    """Returns the Subject of a run, or of an LVLM's folder or hub id; audio-text transcribes."""
    ollm = OLLM.load(run, args.device).eval()
    forms = ("text", "floor") if ollm.audio_encoder is None else ("text", "audio")
    if runs.read_run_info(run)["training"]["stage"] == "audio-text":
        forms = ("text", "audio", "transcript", "cascade")

    def answer(samples, forms, max_new_tokens):
        answers = ollm.answer(samples, forms, max_new_tokens=max_new_tokens)
        if "transcript" in forms:
            answers["transcript"] = transcribe(ollm, samples)

        # A cascade reads its own transcript; the floor is to read another question of the kind.
        others = {"cascade": answers.get("transcript"), "floor": [s.get("other") for s in samples]}
        for form in {*others} & {*forms}:
            read = [{**s, "question": other} for s, other in zip(samples, others[form])]
            answers[form] = ollm.answer(read, ("text",), max_new_tokens=max_new_tokens)["text"]
        return answers

    several = 32 if args.device == "cuda" else 8
    batch = args.batch or (several if ollm.settings.image_size > shapes.SIZE else 100)
    return subject_of(run, args.device, answer, forms, batch, ollm.settings)


def subjects(args, listening=False):
    """Yields (name, seed, function that loads the Subject) of the command's runs and its server.

    listening: leave out runs that cannot listen
    """
    groups = {}
    if args.runs or not args.endpoint:
        groups = runs.group_runs(runs.asked_for(args, listening))
    if args.endpoint and not args.model:
        raise BadInput("--endpoint needs --model, the name of the server's model")
    if args.model in groups:
        raise BadInput(f"--model {args.model}: a run has this name, too")
    for name, by_seed in groups.items():
        for seed, run in by_seed.items():
            yield name, seed, functools.partial(run_subject, run, args)
    if args.endpoint:
        yield args.model, args.seed, functools.partial(server_subject, args)


def settings_for(subject, folder, args, forms):
    """Returns a subject's settings for a folder, which may tell tiles (benchmarks/build.py).

    Raises BadInput if the folder's prompts are another family's.
    """
    told, settings = {"tts": "espeak", **prepared.read_settings(folder)}, subject.settings
    if settings is None:
        return None
    chat = told.get("chat", settings.chat)
    if (CHATS[chat] == QWEN2_VL) != (CHATS[settings.chat] == QWEN2_VL):
        raise BadInput(f"{folder}: its prompts are worded for {chat}, and {subject.label} is "
                       f"{settings.chat}: prepare another by benchmarks.build --run")

    # Answers to another voice than the one that trained would be worse, unnoticed.
    for key, how in (("tts", "is spoken by"), ("suffix", "has suffixes")):
        asked, trained = told.get(key), getattr(settings, key)
        if None not in (asked, trained) and asked != trained and "text" in forms:
            print(f"note: {folder} {how} {asked}; in training of {subject.label} it was {trained}")
    tiles = {key: told[key] for key in ("min_tiles", "max_tiles") if key in told}
    settings = replace(settings, **tiles)
    settings.max_tiles = args.max_tiles or settings.max_tiles
    return settings


def evaluate(subject, folder, name, args, kinds=None, forms=("text", "audio"), most=LONG):
    """Asks a subject the first args.n questions of these kinds; of None, all.

    name: of the file that keeps the answers; most: tokens of an answer, if args do not say
    Returns samples with "text", "audio" and "transcript", None where it is not asked so. A row
    without a question is speech to transcribe: its "audio" is a transcript.
    """
    forms = [form for form in subject.forms if form in forms]
    settings = settings_for(subject, folder, args, forms)
    samples = data.Samples(folder, settings, [ASKED[form] for form in forms])
    indices = range(len(samples))
    if kinds:
        indices = [i for i, row in enumerate(samples.rows) if row.get("kind") in kinds]
    indices = indices[: args.n]
    if not indices:
        raise BadInput(f"{folder}: has no question of the kinds {', '.join(kinds or ['any'])}")
    if "other" not in samples.rows[indices[0]]:
        forms = [form for form in forms if form != "floor"]
    rows = ask(subject, samples, indices, forms, subject.folder / name, args.max_new_tokens or most)

    # A server says what is no answer, or not a whole one.
    for form in ("text", "audio"):
        for remark, count in Counter(row[f"{form} remark"] for row in rows).items():
            if remark:
                print(f"{subject.label}, {folder}, {form}: {count} of {len(rows)} answers {remark}")
    return rows


def answer_question(args):
    """Prints each base's answer to a written question, each run's to the spoken, transcripts."""
    wave = data.load_audio(args.audio) if args.audio else speak(args.question)[0]
    if len(wave) > MAX_SECONDS * data.SAMPLE_RATE:
        raise BadInput(f"the question takes over {MAX_SECONDS} s to say, Whisper hears no more")

    image, bases = data.load_image(args.image), set()
    for run in runs.asked_for(args):
        ollm = OLLM.load(run, args.device).eval()
        if args.question is not None:
            check_words(ollm.tokenizer, args.question)
        if args.max_tiles:
            ollm.settings.max_tiles = args.max_tiles
        picture = data.picture_inputs(image, ollm.settings)
        sample = {"pixels": picture, "question": args.question or "", "answer": ""}

        # The LLM is frozen: all runs on a base read alike, so only the first of them is asked.
        base, forms = str(runs.source_of(run, "base")), []
        if args.question is not None and base not in bases:
            forms.append("text")
            bases.add(base)
        if ollm.audio_encoder is not None:
            forms.append("audio")
            sample["wave"] = wave
        if not forms and args.runs:
            raise BadInput(f"{run}: cannot listen; give --question, too")
        info = runs.read_run_info(run)
        for form, answers in ollm.answer([sample], forms, max_new_tokens=LONG).items():
            print(f"{info['kind']:8}  {FORMS[form]:10}  {answers[0]}")
        if info["training"]["stage"] == "audio-text":
            print(f"{'':8}  {'transcript':10}  {transcribe(ollm, [sample])[0]}")


# ---- reporting -----------------------------------------------------------------------------------


def mean_scores(rows, form, kinds, score_row=score_answer):
    """Returns {kind: percent right} of the answers to questions in a form ("text" or "audio")."""
    scores = {}
    for row in rows:
        with at(row["where"]):
            scores.setdefault(row["kind"], []).append(score_row(row, row[form]))
    return {kind: 100 * statistics.fmean(scores[kind]) for kind in kinds if kind in scores}


def summarize(rows, kinds, average, score_row=score_answer, more=None):
    """Returns a run's percentages: {"text": {kind or measure: value}, "audio": ...}."""
    def mean_of(rows, form):
        return statistics.fmean(mean_scores(rows, form, kinds, score_row).values())

    summary = {}
    for form in ("text", "audio"):
        if rows[0][form] is None:
            continue
        values = mean_scores(rows, form, kinds, score_row)
        values[average] = statistics.fmean(values.values())
        unseen = [row for row in rows if not row.get("seen", True)]
        if unseen:
            values["unseen sentences"] = mean_of(unseen, form)
        if more:
            values |= more(rows, form)
        summary[form] = values | judge.style_rates(rows, form)
        summary[form] |= judge.answer_biases(rows, form, score_row)
    if rows[0]["floor"] is not None:
        summary["text"]["another of its kind"] = mean_of(rows, "floor")
    if "audio" in summary:
        same = [words.agree(row["audio"], row["text"]) for row in rows]
        summary["audio"]["as with text"] = 100 * statistics.fmean(same)
    if rows[0]["transcript"] is not None:
        summary["audio"]["reads its transcript"] = mean_of(rows, "cascade")
        summary["audio"] |= judge.transcripts(rows)
    return summary


def spoken_scores(rows, score_row):
    """Returns the scores of the answers to the spoken questions, 0 to 1."""
    return [score_row(row, row["audio"]) for row in rows]


def print_differences(answers, score_row):
    """Prints each run of the last stage against the first: the paired difference, its interval.

    answers: {(run name, seed): rows}, in the order of the command line; SFT is first by default
    """
    names = [name for name, _ in answers if not name.startswith(("base", "aligned"))]
    first, *others = dict.fromkeys(names) or [None]
    for name in others:
        seeds = [seed for n, seed in answers if n == first and (name, seed) in answers]
        if not seeds:
            continue
        before = [spoken_scores(answers[first, seed], score_row) for seed in seeds]
        after = [spoken_scores(answers[name, seed], score_row) for seed in seeds]
        (mean, low, high), how = seed_interval(before, after)
        print(f"{name} - {first}, spoken: {mean:+.1f} points, 95 % interval {low:+.1f} to "
              f"{high:+.1f} ({how}; {sum(map(len, before))} questions, seeds "
              f"{', '.join(map(str, seeds))})")


def print_example(answers, score_row):
    """Prints a question that SFT (or the aligned run) answers wrongly and Self-KD rightly."""
    better = max((name for name in answers if name.startswith("KD")), default=None)
    worse = "SFT" if "SFT" in answers else "aligned"
    if better is None or worse not in answers:
        return
    scores = list(zip(*(spoken_scores(answers[name], score_row) for name in (worse, better))))
    wins = [i for i, (a, b) in enumerate(scores) if a < 0.5 <= b]
    print(f"{better} is right and {worse} wrong: {len(wins)} questions. The other way round: "
          f"{sum(b < 0.5 <= a for a, b in scores)}.")
    if not wins:
        return
    row = answers[better][wins[0]]
    print(f"The first: {row['question']}?  ({row['label']})")
    print(f"    {Path(row['folder']) / row['image']}")
    print(f"    {'base':8}  {FORMS['text']:7} {row['text']}")
    for name, rows in answers.items():
        row = rows[wins[0]]
        if row["audio"] is not None:
            note = "" if row["transcript"] is None else f"    (transcript: {row['transcript']})"
            print(f"    {name:8}  {FORMS['audio']:7} {row['audio']}{note}")


def ask_all(args, average, summary_of, title, **options):
    """Asks all that the command line names, and prints their table.

    average: its mean, whose first word names the files of answers; options: of `evaluate`
    summary_of: function (rows) -> {form: {measure: value}}; title: of the table
    Returns {(name, seed): rows}.
    """
    summaries, answers = {}, {}
    file_name = answers_name(average.split()[0], args.data)
    for name, seed, load in subjects(args, listening="text" not in options["forms"]):
        folder = runs.questions_of(args, seed)
        rows = answers[name, seed] = evaluate(load(), folder, file_name, args, **options)
        summaries.setdefault(name, []).append(summary_of(rows))
        for row in random.Random(0).sample(rows, min(args.show, len(rows))):
            asked, label = row.get("question", row["id"]), row.get("label", row["answer"])
            print(f"  {asked}  ({label})  text: {row['text']}  audio: {row['audio']}")

    several = any(len(by_seed) > 1 for by_seed in summaries.values())
    print(f"{len(rows)} {title}" + (", mean ± standard deviation over seeds" if several else ""))
    print_summaries(summaries)
    return answers


def report(args, kinds, average, score_row=score_answer, more=None):
    """Evaluates the runs of the command line and prints their table; mmalign.py uses it, too.

    score_row  function (row, answer) -> 0 to 1
    more       further rows of the table: function (rows, form) -> {measure: value}
    """
    summary_of = functools.partial(summarize, kinds=kinds, average=average, score_row=score_row,
                                   more=more)
    answers = ask_all(args, average, summary_of, "held-out questions a run; percent right",
                      kinds=kinds, forms=tuple(ASKED), most=BRIEF)
    print_differences(answers, score_row)
    if len({seed for _, seed in answers}) == 1:
        print_example({name: rows for (name, _), rows in answers.items()}, score_row)


def bench_scores(subject, args):
    """Returns {form: {benchmark: what `score` gives}} of a subject on the folders of --bench."""
    results = {}
    for folder in args.bench:
        benchmark = Path(prepared.read_settings(folder).get("tsv", "")).stem
        if benchmark not in BENCHMARKS:
            raise BadInput(f"{folder}: no benchmark; `python -m benchmarks.build` prepares one")
        if any(benchmark in scores for scores in results.values()):
            raise BadInput(f"{folder}: another folder is of {benchmark}, too")
        rows = evaluate(subject, folder, answers_name("bench", folder), args, most=SHORT)
        for form in ("text", "audio"):
            if rows[0][form] is not None:
                answers = [{**row["row"], "where": row["where"], "prediction": row[form]}
                           for row in rows]
                results.setdefault(form, {})[benchmark] = score(benchmark, answers)
    return results


def report_benchmarks(args):
    """Asks the benchmarks' folders; prints the table, writes it as JSON and as a picture."""
    groups, results = {}, {}
    for name, _, load in subjects(args):
        subject = load()
        results[subject.label] = bench_scores(subject, args)
        groups.setdefault(name, []).append(bench_report.columns(results[subject.label]))
        del subject  # one model at a time is in memory
    bench_report.report(groups, results, Path(args.out))


def report_folder(args, rows):
    """Prints the runs' word error rates on a folder of speech, or how often its answers agree.

    rows: the folder's lines; none has a question, or each
    """
    asked = ["question" in row for row in rows]
    if not any(asked):
        ask_all(args, "WER", words.error_rates, "recordings a run; percent", forms=("audio",))
    elif all(asked):
        title = "questions a run; percent of answers with the same words"
        answers = ask_all(args, "agreement", words.agreement, title, forms=("text", "audio"))
        print_differences(answers, words.says_the_label)
    else:
        where = rows[asked.index(False)]["where"]
        raise BadInput(f"{where}: has no question, but others have: ask a folder for each")


def arguments(description):
    """Returns the argument parser that eval.py and mmalign.py share."""
    parser = runs.arguments(description)
    parser.add_argument("--show", type=in_range(0), default=0, help="print so many answers a run")
    parser.add_argument("--max-tiles", type=in_range(1), help="squares that a picture is cut into")
    parser.add_argument("--max-new-tokens", type=in_range(1), help="of an answer (default: "
                        f"{LONG}; in benchmarks {SHORT}, in the built-in world {BRIEF})")
    parser.add_argument("--batch", type=in_range(1), help="questions answered at once (default: 8, "
                        "on a GPU 32, in the built-in world 100); to a server, so many requests")
    parser.add_argument("--endpoint", metavar="URL", help="ask an OpenAI-compatible chat server "
                        "(http://.../v1), too")
    parser.add_argument("--model", help="the name of the server's model")
    return parser


def main():
    parser = arguments(__doc__)
    parser.add_argument("--image", help="ask one question about this picture")
    parser.add_argument("--question", help="the question; espeak-ng speaks it if --audio does not")
    parser.add_argument("--audio", help="the question spoken, in any format that soundfile reads")
    parser.add_argument("--bench", nargs="+", metavar="FOLDER", help="the paper's benchmarks, each "
                        "prepared by benchmarks/build.py")
    args = parser.parse_args()
    if bool(args.image) != bool(args.question is not None or args.audio):
        parser.error("one question needs --image, and --question or --audio")
    if args.image:
        answer_question(args)
    elif args.bench:
        report_benchmarks(args)
    else:
        rows = list(prepared.read_rows([args.data])) if args.data else []
        if not args.data or any(row.get("kind") in shapes.KINDS for row in rows):
            report(args, shapes.KINDS, AVERAGE)
        else:
            report_folder(args, rows)


if __name__ == "__main__":
    with readable_errors():
        main()
