"""How answers to the paper's seven benchmarks are scored.

    python eval.py RUN --bench prepared/MME     # a run on a folder by benchmarks/build.py

Scores are those that VLMEvalKit used for InternVL2 and Qwen2-VL in February 2025, when the paper
was written, without a judge model: an answer in the wrong form is wrong. Each scorer names the
function there that it follows, with all its quirks. Later versions changed some of them, so scores
of today's VLMEvalKit differ.

A row is a dict, {column: cell}. `score` takes rows from anywhere, each with its "prediction".
"""

import ast
import functools
import re
import string
from statistics import fmean

from torchaudio.functional import edit_distance

from benchmarks.questions import need, options, text
from plumbing.files import BadInput, at

# By the file's stem: the paper's columns, and which of the scorer's numbers stands in each.
BENCHMARKS = {
    "MME": {"MME": "overall"},
    "HallusionBench": {"HalluB": "overall"},
    "RealWorldQA": {"RWQA": "overall"},
    "TextVQA_VAL": {"TextVQA": "overall"},
    "ChartQA_TEST": {"CQA^H": "test_human", "CQA^A": "test_augmented"},
    "DocVQA_VAL": {"DocVQA": "overall"},
    "InfoVQA_VAL": {"InfoVQA": "overall"},
}


# ---- scoring -------------------------------------------------------------------------------------


def score(benchmark, rows):
    """Returns {"rows": [score of each row, 0 to 1], "overall": the paper's number, other measures}.

    All but "rows" are in percent, unless the scorer says otherwise; None is a share of nothing.

    rows: dicts as in the file, each with the model's answer as "prediction" (none counts as "")
    Raises BadInput for a benchmark that is none of the seven, and for rows that cannot be scored.
    """
    with at(benchmark):
        return SCORERS[benchmark](rows)


def percent(scores):
    """Returns the mean of scores from 0 to 1, in percent."""
    return 100 * fmean(scores)


def group(keys, values):
    """Returns {key: [its values]}, in order of appearance; rows of a group may stand apart."""
    groups = {}
    for key, value in zip(keys, values):
        groups.setdefault(key, []).append(value)
    return groups


def group_accuracy(keys, scores):
    """Returns the percentage of groups, rows with one key, in which every row is right."""
    return percent([min(members) for members in group(keys, scores).values()])


MARKS = ";/[]\"{}()=+\\_-><@`,?!"


def remove_punctuation(reply):
    """Follows process_punctuation, which is the VQA challenge's.

    A mark is deleted if it stands beside a space anywhere in the text, or if there is a number like
    1,000; else it becomes a space. Full stops are deleted unless a digit follows, 32 at most (a
    flag was passed where the count belongs).
    """
    words, has_thousands = reply, re.search(r"\d,\d", reply)
    for mark in MARKS:
        beside_space = f"{mark} " in reply or f" {mark}" in reply
        words = words.replace(mark, "" if beside_space or has_thousands else " ")
    return re.sub(r"\.(?!\d)", "", words, count=32)


# ---- MME and HallusionBench: yes or no -----------------------------------------------------------


def yes_or_no(reply):
    """Follows YOrN_Extraction: "Yes", "No", or "Unknown" if the reply has both words or neither."""
    words = remove_punctuation(reply.lower()).split()
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def yes_no_scores(rows):
    """Returns (row scores, shares): the shares tell how far "yes" is a habit.

    "Unknown" counts as wrong, as it does without a judge.
    """
    replies = [yes_or_no(text(row, "prediction", "")) for row in rows]
    right = [float(reply == need(row, "answer", ("Yes", "No")))
             for row, reply in zip(rows, replies)]

    yes, unknown = replies.count("Yes"), replies.count("Unknown")
    answered = len(rows) - unknown
    shares = {"yes ratio of answered": 100 * yes / answered if answered else None,
              "yes ratio of all": 100 * yes / len(rows), "unknown share": 100 * unknown / len(rows)}
    return right, shares


MME_PERCEPTION = ("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark",
                  "position", "posters", "scene")
MME_REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation",
                 "text_translation")


def score_mme(rows):
    """Follows MME_rating; perception sums ten categories (2000), reasoning four (800).

    A category's score, up to 200, is its accuracy plus the share of its pictures with both
    questions right, each in percent. The paper does not say which of these numbers it prints; its
    values agree best with perception / 20, which is overall here. A category without rows counts 0,
    so only the whole file's sums can be compared with others.
    """
    right, shares = yes_no_scores(rows)
    pictures = [text(row, "image_path") or need(row, "image") for row in rows]
    names = [need(row, "category") for row in rows]

    categories = {}
    for name, members in group(names, zip(pictures, right)).items():
        keys, scores = zip(*members)
        categories[name] = percent(scores) + group_accuracy(keys, scores)
    perception = sum(categories.get(name, 0.0) for name in MME_PERCEPTION)
    reasoning = sum(categories.get(name, 0.0) for name in MME_REASONING)
    return {"rows": right, "overall": perception / 20, "perception": perception,
            "reasoning": reasoning, "perception/20": perception / 20,
            "sum/28": (perception + reasoning) / 28, "accuracy": percent(right),
            **shares, **categories}


def score_hallusion(rows):
    """Follows Hallusion_rating: aAcc counts rows, fAcc figures, qAcc questions (on all figures).

    A figure or a question is right if all its rows are. Each also by category (VD, VS) and
    l2-category, as "VD aAcc". Overall is the mean of the three, which is OpenVLM's number.
    """
    right, shares = yes_no_scores(rows)
    keys = [hallusion_key(row) for row in rows]
    measures = hallusion_measures(keys, right)
    overall = fmean(measures.values())

    for column in ("category", "l2-category"):
        names = [text(row, column) for row in rows]
        for name, members in group(names, zip(keys, right)).items():
            part = hallusion_measures(*zip(*members)) if name is not None else {}
            measures |= {f"{name} {measure}": value for measure, value in part.items()}
    return {"rows": right, "overall": overall, **measures, **shares}


def hallusion_key(row):
    """Returns (l2-category, set, figure, question); the numbers begin anew in each l2-category."""
    parts = need(row, "index").split("_")  # VD_illusion_<visual input>_<set>_<figure>_<question>
    if len(parts) < 6:
        raise BadInput(f"the index {row['index']} is not like VD_illusion_1_0_0_0")
    return need(row, "l2-category"), *parts[3:6]


def hallusion_measures(keys, right):
    """Returns {"aAcc", "fAcc", "qAcc"} of some rows."""
    figures = [(category, number, figure) for category, number, figure, _ in keys]
    questions = [(category, number, question) for category, number, _, question in keys]
    return {"aAcc": percent(right), "fAcc": group_accuracy(figures, right),
            "qAcc": group_accuracy(questions, right)}


# ---- RealWorldQA: a letter -----------------------------------------------------------------------

REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")


def option_letter(reply, choices):
    """Follows can_infer: the option that a reply chooses of {letter: text}, "Z" if none.

    A letter that stands alone anywhere counts, so "A car ..." is option A; otherwise an option's
    whole text does. Either must be the only one.
    """
    if "Failed to obtain answer via API" not in reply:
        if any(refusal in reply for refusal in REFUSALS):
            return "Z"
        words = re.sub(r"[.()\[\],:;!*#{}]", " ", reply).split()
        letters = [letter for letter in choices if letter in words]
        if len(letters) == 1:
            return letters[0]
        if not letters and "Z" in words:
            return "Z"
    letters = [letter for letter, option in choices.items() if option.lower() in reply.lower()]
    return letters[0] if len(letters) == 1 else "Z"


def score_realworldqa(rows):
    """Follows eval_vanilla without a judge: the share of right letters; "unknown share" is Z's."""
    letters = [option_letter(text(row, "prediction", ""), options(row)) for row in rows]
    right = [float(letter == need(row, "answer", [*string.ascii_uppercase]))
             for row, letter in zip(rows, letters)]
    return {"rows": right, "overall": percent(right),
            "unknown share": 100 * letters.count("Z") / len(letters)}


# ---- TextVQA, ChartQA, DocVQA, InfoVQA: words ----------------------------------------------------


def true_answers(row):
    """Follows process_line: the elements of a list literal, or the whole cell.

    VLMEvalKit evaluates the cell as Python; here it is only parsed.
    """
    cell = need(row, "answer")
    try:
        value = ast.literal_eval(cell) if cell.lstrip().startswith("[") else cell
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = cell  # [Red, Blue] is one answer
    return [str(element) for element in value] if isinstance(value, list) and value else [cell]


def score_words(rule, rows):
    """Follows ImageVQADataset.evaluate: the mean score, also by split if there are any.

    rule: a function of (true answers, reply) that returns a score from 0 to 1
    """
    scores = [rule(true_answers(row), text(row, "prediction", "")) for row in rows]
    splits = group([text(row, "split") for row in rows], scores)
    splits.pop(None, None)
    return {"rows": scores, "overall": percent(scores),
            **{split: percent(members) for split, members in splits.items()}}


NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4",
           "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll
    you're you've""".split()

# The VQA challenge's list is each word with one apostrophe left out, but for one pair, which it has
# the wrong way round.
CONTRACTIONS = {word[:i] + word[i + 1 :]: word
                for word in CONTRACTED for i, letter in enumerate(word) if letter == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"


def normalize_reply(reply):
    """Follows process_answer: lower case, digits up to ten, no articles, apostrophes put back."""
    reply = remove_punctuation(reply.replace("\n", " ").replace("\t", " ").strip()).lower()
    words = [NUMBERS.get(word, word) for word in reply.split()]
    words = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def vqa_score(answers, reply):
    """Returns TextVQA's score, the VQA challenge's accuracy.

    A third for each annotator who agrees, at most 1, averaged over leaving out each of them: with
    ten, one agreeing gives 0.3 and four give 1.
    """
    agrees = [normalize_reply(answer) == normalize_reply(reply) for answer in answers]
    return fmean(min(1, (sum(agrees) - left_out) / 3) for left_out in agrees)


def relaxed_match(answers, reply):
    """Follows relaxed_correctness (ChartQA): 1.0 if the reply matches any true answer, else 0.0."""
    return float(any(is_close(answer, reply.strip()) for answer in answers))


def is_close(answer, reply):
    """Tells whether two numbers are within 5 %, or else two texts equal but for case.

    The 5 % are of the reply, not of the true answer: VLMEvalKit passed them in the wrong order
    until September 2025. So a reply of 0 has to be the same text.
    """
    true, value = read_number(answer), read_number(reply)
    if true is None or not value:
        return answer.lower() == reply.lower()
    return abs(true - value) / abs(value) <= 0.05


def read_number(word):
    """Returns what float() reads, or None; a percentage is a hundredth."""
    try:
        return float(word.rstrip("%")) / 100 if word.endswith("%") else float(word)
    except ValueError:
        return None


def anls(answers, reply):
    """Follows anls_compute (DocVQA, InfoVQA): 1 - edits / length, 0 if that is below 0.5.

    The nearest of the true answers counts. Case and runs of blanks make no edit, but the length is
    that of the longer text as it stands, in capitals.
    """
    distances = []
    for answer in answers:
        edits = edit_distance(" ".join(answer.lower().split()), " ".join(reply.lower().split()))
        distances.append(edits / (max(len(answer.upper()), len(reply.upper())) or 1))
    nearest = 1 - min(distances)
    return nearest if nearest >= 0.5 else 0.0


SCORERS = {"MME": score_mme, "HallusionBench": score_hallusion, "RealWorldQA": score_realworldqa,
           "TextVQA_VAL": functools.partial(score_words, vqa_score),
           "ChartQA_TEST": functools.partial(score_words, relaxed_match),
           "DocVQA_VAL": functools.partial(score_words, anls),
           "InfoVQA_VAL": functools.partial(score_words, anls)}
