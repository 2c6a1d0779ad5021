"""Ask a run the same questions in writing and aloud, and count the right answers.

    python eval.py                                           # base, aligned, every alpha of seed 0
    python eval.py runs/shapes/vision-audio-a*-s[012]        # any runs; seeds are averaged
    python eval.py --show 10 runs/shapes/audio-text-s0       # and print ten of its answers
    python eval.py RUN [RUN ...] --data FOLDER               # any data: word errors, or agreement
    python eval.py --image scene.png --question "what color is the square"    # one to every run
    python eval.py RUN --image scene.png --audio question.wav                 # spoken by you
    python eval.py RUN RUN --bench DIR                       # the paper's seven benchmarks
    python eval.py --endpoint URL --model NAME --bench DIR   # of any model behind a chat server

Answers are generated greedily, and each picture is read once for both forms of its question. In
the built-in world, pictures and voices are held out, and half of the sentences. An answer is right
if it has exactly one word of its question's class, the right one, once an exact echo of the
question is taken away. A description counts by F1 over (colour, shape) pairs. Of any other folder,
speech without questions is transcribed, and answers to questions are compared word for word, spoken
with written and both with the label: benchmarks/words.py.
"""

import plumbing  # noqa: F401  # isort: skip (before torch: sets how its threads wait)
import random
import statistics
import sys
from pathlib import Path

from tqdm import tqdm

import data
from benchmarks import ask, words
from benchmarks.scorers import score  # noqa: F401 (eval.score: for answers at hand)
from model import OLLM
from plumbing import prepared, runs
from plumbing.files import BadInput, at, at_least, readable_errors, write_json_lines
from plumbing.media import MAX_SECONDS, speak
from plumbing.prepared import how_asked
from plumbing.tables import print_summaries, seed_interval
from world import answers as judge
from world import shapes
from world.answers import score_answer

AVERAGE = "mean of six kinds"
KEYS = {"text": "question", "audio": "audio"}  # what a form of asking needs in samples.jsonl
HOW = {"text": "in writing", "audio": "aloud"}
LONG = 256  # tokens of an answer, at most, where it is not of the built-in world's kinds


# ---- asking --------------------------------------------------------------------------------------


def transcribe(ollm, samples):
    """Returns what the model heard in each sample's speech: no picture, then the instruction."""
    speech = [{"wave": sample["wave"], "answer": ""} for sample in samples]
    return ollm.answer(speech, ("audio",))["audio"]


def batch_size(ollm, args):
    """Returns how many questions are answered at once: --batch, 8, or of a tiny model 100."""
    return args.batch or (8 if ollm.settings["image_size"] > shapes.SIZE else 100)


def evaluate(run, folder, kinds, args, forms=("text", "audio")):
    """Asks a run the first args.n questions of these kinds; of None, all, with room to answer.

    Returns samples with "text", "audio" and "transcript"; the latter two are None for a base, and
    only a run of the stage audio-text transcribes. A row without a question is answered by what
    was heard: its "audio" is a transcript.
    """
    ollm = OLLM.load(run, args.device).eval()
    if args.max_tiles:
        ollm.settings["max_tiles"] = args.max_tiles
    forms = ("text",) if ollm.audio_encoder is None else forms
    samples = data.Samples(folder, ollm.settings, [KEYS[form] for form in forms])
    indices = range(len(samples))
    if kinds:
        indices = [i for i, row in enumerate(samples.rows) if row.get("kind") in kinds]
    indices = indices[: args.n]
    if not indices:
        raise BadInput(f"{folder}: has no question of the kinds {', '.join(kinds or ['any'])}")

    # Answers to another voice than the one that trained would be worse, unnoticed.
    spoken, trained = how_asked([folder])["tts"], ollm.settings.get("tts")
    if trained not in (None, spoken) and "text" in forms:
        print(f"note: {folder} is spoken by {spoken}; in training of {run} it was {trained}")
    transcribes = kinds and runs.about(run)["training"]["stage"] == "audio-text"
    options = {} if kinds else {"max_new_tokens": LONG}

    # Like lengths are asked together; the rows come back in the folder's order.
    rows, indices = {}, sorted(indices, key=samples.length)
    size = batch_size(ollm, args)
    starts = range(0, len(indices), size)
    for start in tqdm(starts, desc=str(run), unit="batch", leave=False):
        chunk = indices[start: start + size]
        batch = [samples[i] for i in chunk]
        answers = ollm.answer(batch, forms, **options)
        if transcribes:
            answers["transcript"] = transcribe(ollm, batch)
        for n, i in enumerate(chunk):
            rows[i] = samples.rows[i]
            for key in ("text", "audio", "transcript"):
                rows[i][key] = answers[key][n] if key in answers else None
    return [rows[i] for i in sorted(rows)]


def answer_question(args):
    """Prints every run's answer to one question about one picture: written by each base, spoken.

    An aligned run also says what it heard.
    """
    wave = data.load_audio(args.audio) if args.audio else speak(args.question)[0]
    if len(wave) > MAX_SECONDS * data.SAMPLE_RATE:
        raise BadInput(f"the question takes over {MAX_SECONDS} s to say, Whisper hears no more")

    image, bases = data.load_image(args.image), set()
    for run in runs.asked_for(args):
        ollm = OLLM.load(run, args.device).eval()
        if args.max_tiles:
            ollm.settings["max_tiles"] = args.max_tiles
        if args.question is not None:
            check_words(ollm.tokenizer, args.question)
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
        for form, answers in ollm.answer([sample], forms, max_new_tokens=LONG).items():
            print(f"{runs.name(run):8}  {HOW[form]:10}  {answers[0]}")
        if runs.about(run)["training"]["stage"] == "audio-text":
            print(f"{'':8}  {'heard':10}  {transcribe(ollm, [sample])[0]}")


def check_words(tokenizer, text):
    """Raises BadInput if a text is empty or has a word that the tokenizer does not know."""
    if not text.strip():
        raise BadInput("the question is empty")
    unknown = [w for w in text.split() if tokenizer.unk_token_id in tokenizer(w).input_ids]
    if unknown:
        words = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
        raise BadInput(f"the built-in world does not know {', '.join(map(repr, unknown))}; its "
                       f"words are: {' '.join(words)}")


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
    summary = {}
    for form in ("text", "audio"):
        if rows[0][form] is None:
            continue
        values = mean_scores(rows, form, kinds, score_row)
        values[average] = statistics.fmean(values.values())
        never = [row for row in rows if not row.get("heard", True)]
        if never:
            scores = mean_scores(never, form, kinds, score_row)
            values["the same, never heard"] = statistics.fmean(scores.values())
        if more:
            values |= more(rows, form)
        summary[form] = values | judge.manners(rows, form)
        summary[form] |= judge.paper_remarks(rows, form, score_row)
    if rows[0]["transcript"] is not None:
        summary["audio"] |= judge.transcripts(rows)
    return summary


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
        pairs = [list(zip(answers[first, seed], answers[name, seed])) for seed in seeds]
        before = [[score_row(row, row["audio"]) for row, _ in pair] for pair in pairs]
        after = [[score_row(row, row["audio"]) for _, row in pair] for pair in pairs]
        (mean, low, high), how = seed_interval(before, after)
        print(f"{name} - {first}, spoken: {mean:+.1f} points, 95 % interval {low:+.1f} to "
              f"{high:+.1f} ({how}; {sum(map(len, before))} questions, seeds "
              f"{', '.join(map(str, seeds))})")


def print_example(answers, score_row):
    """Prints the first question that SFT (or the aligned run) answers wrongly and Self-KD rightly.

    answers: {run name: rows} of one seed
    """
    better = max((name for name in answers if name.startswith("KD")), default=None)
    worse = "SFT" if "SFT" in answers else "aligned"
    if better is None or worse not in answers:
        return
    pairs = list(zip(answers[worse], answers[better]))
    scores = [(score_row(a, a["audio"]), score_row(b, b["audio"])) for a, b in pairs]
    wins = [i for i, (a, b) in enumerate(scores) if a < 0.5 <= b]
    losses = sum(b < 0.5 <= a for a, b in scores)
    print(f"{better} is right and {worse} wrong: {len(wins)} questions. The other way round: "
          f"{losses}.")
    if not wins:
        return
    row = answers[better][wins[0]]
    print(f"The first: {row['question']}?  ({row['label']})  {Path(row['folder']) / row['image']}")
    print(f"    {'base':8}  {HOW['text']:10}  {row['text']}")
    for name, rows in answers.items():
        if rows[wins[0]]["audio"] is not None:
            heard = rows[wins[0]]["transcript"]
            note = f"    (heard: {heard})" if heard is not None else ""
            print(f"    {name:8}  {HOW['audio']:10}  {rows[wins[0]]['audio']}{note}")


def ask_runs(args, kinds, average, summary_of, title, forms=("text", "audio")):
    """Asks the runs of the command line, keeps their answers, and prints their table.

    summary_of: function (rows) -> {form: {measure: value}}; title: of the table
    Returns {(run name, seed): rows}.
    """
    summaries, answers = {}, {}
    groups = runs.group_runs(runs.asked_for(args) if "text" in forms else runs.listening_runs(args))
    for name, by_seed in groups.items():
        for seed, run in by_seed.items():
            rows = evaluate(run, runs.questions_of(args, seed), kinds, args, forms)
            summaries.setdefault(name, []).append(summary_of(rows))
            answers[name, seed] = rows
            try:
                write_json_lines(runs.answers_file(run, average), rows)
            except OSError as error:  # of a run that is read only, there is still the table
                print(f"{run}: its answers are not kept: {error}", file=sys.stderr)
            for row in random.Random(0).sample(rows, min(args.show, len(rows))):
                asked, label = row.get("question", row["id"]), row.get("label", row["answer"])
                print(f"  {asked}  ({label})  text: {row['text']}  audio: {row['audio']}")

    several = any(len(by_seed) > 1 for by_seed in groups.values())
    print(f"{len(rows)} {title}" + (", mean ± standard deviation over seeds" if several else ""))
    print_summaries(summaries)
    return answers


def report(args, kinds, average, score_row=score_answer, more=None):
    """Evaluates the runs of the command line and prints their table; mmalign.py uses it, too.

    score_row  function (row, answer) -> 0 to 1
    more       further rows of the table: function (rows, form) -> {measure: value}
    """
    def summary_of(rows):
        return summarize(rows, kinds, average, score_row, more)

    answers = ask_runs(args, kinds, average, summary_of, "held-out questions a run; percent right")
    print_differences(answers, score_row)
    if len({seed for _, seed in answers}) == 1:
        print_example({name: rows for (name, _), rows in answers.items()}, score_row)


def report_folder(args, rows):
    """Prints the runs' word error rates on a folder of speech, or how often its answers agree.

    rows: the folder's lines; none has a question, or each
    """
    asked = ["question" in row for row in rows]
    if not any(asked):
        ask_runs(args, None, "WER", words.error_rates, "recordings a run; percent", ("audio",))
    elif all(asked):
        title = "questions a run; percent of answers with the same words"
        answers = ask_runs(args, None, "agreement", words.agreement, title)
        print_differences(answers, words.says_the_label)
    else:
        where = rows[asked.index(False)]["where"]
        raise BadInput(f"{where}: has no question, but others have: ask a folder for each")


def arguments(description):
    """Returns the argument parser that eval.py and mmalign.py share."""
    parser = runs.arguments(description)
    parser.add_argument("--show", type=at_least(0), default=0, help="print so many answers a run")
    parser.add_argument("--max-tiles", type=at_least(1), help="squares that a picture is cut into")
    parser.add_argument("--batch", type=at_least(1), help="questions answered at once (default: 8; "
                        "the built-in world's tiny models 100); to a server, so many requests")
    return parser


def main():
    parser = arguments(__doc__)
    parser.add_argument("--image", help="ask one question about this picture")
    parser.add_argument("--question", help="the question; espeak-ng speaks it if --audio does not")
    parser.add_argument("--audio", help="the question spoken, in any format that soundfile reads")
    ask.add_arguments(parser)
    args = parser.parse_args()
    if bool(args.image) != bool(args.question is not None or args.audio):
        parser.error("one question needs --image, and --question or --audio")
    if args.image:
        answer_question(args)
    elif args.bench:
        ask.report_benchmarks(args)
    else:
        rows = prepared.Rows([args.data]) if args.data else []
        if not args.data or any(row.get("kind") in shapes.KINDS for row in rows):
            report(args, shapes.KINDS, AVERAGE)
        else:
            report_folder(args, rows)


if __name__ == "__main__":
    with readable_errors():
        main()
