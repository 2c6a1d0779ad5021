"""The paper's seven benchmarks: how their files are read, what is asked, and how answers are scored.

    python eval.py RUN --bench DIR         # a run on the files found in DIR: MME.tsv, HallusionBench.tsv, ...

The files are VLMEvalKit's (https://opencompass.openxlab.space/utils/VLMEval/MME.tsv and so on): a row a question, its
picture in base64. Prompts and scores are what VLMEvalKit gave InternVL2 in February 2025, when the paper was written,
without a judge model: an answer in the wrong form is wrong. Each scorer names the function there that it follows,
quirks and all; later versions mended some, so scores of today's VLMEvalKit differ.
"""

import ast
import base64
import csv
import functools
import io
import math
import re
import string
from pathlib import Path
from statistics import fmean

import data
from faults import BadInput

BENCHMARKS = {  # by the file's stem: the paper's columns, and which of the scorer's numbers stands in each
    "MME": {"MME": "overall"},
    "HallusionBench": {"HalluB": "overall"},
    "RealWorldQA": {"RWQA": "overall"},
    "TextVQA_VAL": {"TextVQA": "overall"},
    "ChartQA_TEST": {"CQA^H": "test_human", "CQA^A": "test_augmented"},
    "DocVQA_VAL": {"DocVQA": "overall"},
    "InfoVQA_VAL": {"InfoVQA": "overall"},
}
COLUMNS = ("index", "image", "question", "answer")  # in any order, among others
MORE_COLUMNS = {"MME": ("category",), "HallusionBench": ("l2-category",)}  # what their scores cannot do without
MISSING = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
           "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}  # cells that pandas, by which VLMEvalKit reads, empties
REFERENCE = 64  # an image cell of at most so many characters is the index of the row that has the picture


# ---- reading -------------------------------------------------------------------------------------------------------


def read_tsv(path):
    """(rows, dropped): a benchmark's questions as dicts of strings, and how many rows had no picture and are left out.

    Cells without a value are left out of a row, and "where" ("file:line") is added for messages; `image` is always the
    picture itself. Raises BadInput for a file that is no such table, and for a row that lacks what it needs.
    """
    rows, images, dropped = [], {}, 0
    needed = (*COLUMNS, *MORE_COLUMNS.get(Path(path).stem, ()))
    for where, row in table(path, needed):
        if "image" not in row:  # HallusionBench asks 178 questions about no picture; VLMEvalKit drops them
            dropped += 1
            continue
        row["where"] = where
        for name in needed:
            need(row, name)
        if row["index"] in images:
            raise BadInput(f"{where}: the index {row['index']} stands in an earlier row already")
        images[row["index"]] = row["image"]
        rows.append(row)
    for row in rows:
        if len(row["image"]) <= REFERENCE:
            pointed = images.get(row["image"], "")
            if len(pointed) <= REFERENCE:  # one hop only
                raise BadInput(f"{row['where']}: the image is that of row {row['image']}, which has none of its own")
            row["image"] = pointed
    if not rows:
        raise BadInput(f"{path}: has no row with a picture")
    return rows, dropped


def table(path, needed):
    """("file:line", {column: cell}) of each row of a TSV, without missing cells; the line is the row's first."""
    csv.field_size_limit(2**31 - 1)  # a cell holds a whole picture
    start = 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter="\t", strict=True)
            header = next(lines, [])
            lacking = [name for name in needed if name not in header]
            if lacking:
                raise BadInput(f"{path}:1: not a benchmark's table: no column {', '.join(lacking)} in the first line")
            start = lines.line_num + 1
            for cells in lines:
                where, start = f"{path}:{start}", lines.line_num + 1
                if cells and len(cells) != len(header):  # cells is [] for a blank line
                    raise BadInput(f"{where}: {len(cells)} cells where the first line names {len(header)}; "
                                   "is the file whole?")
                if cells:
                    yield where, {name: cell for name, cell in zip(header, cells) if has_value(name, cell)}
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}:{start}: not tab-separated text, or cut off: {error}") from None


def has_value(column, cell):
    """Whether a cell of the file has a value.

    An option "None" is none, as it is in VLMEvalKit's prompt. But questions and answers are kept as they stand: pandas
    makes the answer "None" a NaN and thereby a word that no model says, which helps no one. Empty ones are refused.
    """
    return cell != "" if column in ("question", "answer") else cell not in MISSING


def text(row, name, default=None):
    """A cell's text, or the default where it is absent, None or NaN."""
    value = row.get(name)
    return default if value is None or value != value else str(value)


def name_of(row):
    """What a row is called in messages."""
    return " ".join(filter(None, [text(row, "where"), f"(index {text(row, 'index', 'missing')})"]))


def need(row, name):
    """A cell's text. Raises BadInput if there is none."""
    value = text(row, name)
    if value is None:
        raise BadInput(f"{name_of(row)}: has no {name}")
    return value


def image_of(row):
    """A row's picture, RGB. (VLMEvalKit saved it as JPEG once more on its way to the model; that loss is spared.)"""
    try:
        return data.decoded(io.BytesIO(base64.b64decode(need(row, "image"))))
    except data.BROKEN_PICTURE as error:
        raise BadInput(f"{name_of(row)}: the image is broken: {error}") from None


# ---- asking --------------------------------------------------------------------------------------------------------

BRIEFLY = "Answer the question using a single word or phrase."


def prompt(benchmark, row):
    """InternVL2's prompt in two parts, the question and all that follows it, which may or may not be said aloud.

    Follows InternVLChat.build_prompt; the parts are to be joined without a blank.
    """
    check(benchmark)
    if benchmark == "RealWorldQA":
        lines = [f"{letter}. {option}" for letter, option in options(row).items()]
        lines += ["Answer with the option's letter from the given choices directly." if lines
                  else "Answer the question directly."]
        return need(row, "question"), "".join(f"\n{line}" for line in lines)
    rest = {"MME": f" {BRIEFLY}", "HallusionBench": f" Please answer yes or no. {BRIEFLY}"}
    return need(row, "question"), rest.get(benchmark, f"\n{BRIEFLY}")


def options(row):
    """The options that a row has: {letter: text}; any column named by one capital letter is an option."""
    return {letter: text(row, letter) for letter in string.ascii_uppercase if text(row, letter)}


def check(benchmark):
    """Raises BadInput unless this is one of the seven."""
    if benchmark not in BENCHMARKS:
        raise BadInput(f"{benchmark}: no such benchmark; there are {', '.join(BENCHMARKS)}")


# ---- scoring -------------------------------------------------------------------------------------------------------


def score(benchmark, rows):
    """{"rows": [score of each row, 0 to 1], "overall": the paper's number, other measures by name}, all but "rows"
    in percent unless the scorer says otherwise.

    rows: dicts as in the file, each with the model's answer as "prediction" (none counts as an empty one)
    """
    check(benchmark)
    if not rows:
        raise BadInput(f"{benchmark}: there are no answers to score")
    return SCORERS[benchmark](rows)


def percent(scores):
    """The mean of scores from 0 to 1, in percent."""
    return 100 * fmean(scores)


def grouped(keys, values):
    """{key: [its values]}, in order of appearance; rows of a group need not be neighbours."""
    groups = {}
    for key, value in zip(keys, values):
        groups.setdefault(key, []).append(value)
    return groups


def all_right(keys, scores):
    """Percentage of groups, rows of one key each, of which every row is right."""
    return percent([min(group) for group in grouped(keys, scores).values()])


MARKS = ";/[]\"{}()=+\\_-><@`,?!"


def without_punctuation(said):
    """process_punctuation, of the VQA challenge, with the quirks of both.

    A mark is deleted if anywhere in the text it stands beside a space, or if there is a number like 1,000; else it
    becomes a space. Full stops go unless a digit follows: one before was meant too, but the expression never looked
    back. At most 32 go, as a flag was passed where the count belongs.
    """
    kept, thousands = said, re.search(r"\d,\d", said)
    for mark in MARKS:
        beside_space = f"{mark} " in said or f" {mark}" in said
        kept = kept.replace(mark, "" if beside_space or thousands else " ")
    return re.sub(r"\.(?!\d)", "", kept, count=32)


# MME and HallusionBench: yes or no


def yes_or_no(reply):
    """YOrN_Extraction: "Yes", "No", or "Unknown" if the reply has both words or neither."""
    words = without_punctuation(reply.lower()).split()
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def yes_no_scores(rows):
    """(row scores, shares): the shares tell how far "yes" is a habit. Unknown counts as wrong, as without a judge."""
    said = [yes_or_no(text(row, "prediction", "")) for row in rows]
    yes, answered = said.count("Yes"), len(said) - said.count("Unknown")
    shares = {"yes ratio of answered": 100 * yes / answered if answered else math.nan,
              "yes ratio of all": 100 * yes / len(said), "unknown share": 100 * said.count("Unknown") / len(said)}
    return [float(extracted == need(row, "answer")) for row, extracted in zip(rows, said)], shares


MME_REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
MME_PERCEPTION = ("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters",
                  "scene")


def score_mme(rows):
    """MME_rating: a category's score is its accuracy plus the share of its pictures with both questions right, each in
    percent, so up to 200; perception sums ten categories (2000), reasoning four (800).

    Which of these the paper prints it does not say; its numbers agree best with perception / 20, which is overall here.
    A category without rows counts 0, so only the whole file's sums can be compared with others.
    """
    right, shares = yes_no_scores(rows)
    pictures = [text(row, "image_path") or need(row, "image") for row in rows]
    categories = {}
    for category, pairs in grouped([need(row, "category") for row in rows], zip(pictures, right)).items():
        categories[category] = percent([score for _, score in pairs]) + all_right(*zip(*pairs))
    perception = sum(categories.get(name, 0.0) for name in MME_PERCEPTION)
    reasoning = sum(categories.get(name, 0.0) for name in MME_REASONING)
    return {"rows": right, "overall": perception / 20, "perception": perception, "reasoning": reasoning,
            "perception/20": perception / 20, "sum/28": (perception + reasoning) / 28, "accuracy": percent(right),
            **shares, **categories}


def score_hallusion(rows):
    """Hallusion_rating: aAcc counts rows, fAcc figures, qAcc questions (asked of several figures), the latter two right
    only if all their rows are; each also by category (VD, VS) and l2-category, as "VD aAcc". Overall is their mean,
    which is OpenVLM's number.
    """
    right, shares = yes_no_scores(rows)
    keys = [hallusion_key(row) for row in rows]
    measures = hallusion_measures(keys, right)
    overall = fmean(measures.values())
    for column in ("category", "l2-category"):
        for group, pairs in grouped([text(row, column) for row in rows], zip(keys, right)).items():
            if group is not None:
                measures |= {f"{group} {name}": value for name, value in hallusion_measures(*zip(*pairs)).items()}
    return {"rows": right, "overall": overall, **measures, **shares}


def hallusion_key(row):
    """(l2-category, set, figure, question): numbers from the index, which begin anew in each l2-category."""
    parts = need(row, "index").split("_")  # VD_illusion_<visual input>_<set>_<figure>_<question>
    if len(parts) < 6:
        raise BadInput(f"{name_of(row)}: the index {row['index']} is not like VD_illusion_1_0_0_0")
    return need(row, "l2-category"), *parts[3:6]


def hallusion_measures(keys, right):
    """aAcc, fAcc and qAcc of some rows."""
    return {"aAcc": percent(right), "fAcc": all_right([key[:3] for key in keys], right),
            "qAcc": all_right([(category, set_, question) for category, set_, _, question in keys], right)}


# RealWorldQA: a letter

REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")


def option_letter(reply, choices):
    """can_infer: the option that a reply chooses of {letter: text}, "Z" if none.

    A letter that stands alone anywhere counts, so that "A car ..." is option A; otherwise an option's whole text does.
    Either must be the only one.
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
    named = [letter for letter, option in choices.items() if option.lower() in reply.lower()]
    return named[0] if len(named) == 1 else "Z"


def score_realworldqa(rows):
    """eval_vanilla without a judge: the share of right letters. "unknown share" is that of Z."""
    said = [option_letter(text(row, "prediction", ""), options(row)) for row in rows]
    right = [float(letter == need(row, "answer")) for row, letter in zip(rows, said)]
    return {"rows": right, "overall": percent(right), "unknown share": 100 * said.count("Z") / len(said)}


# TextVQA, ChartQA, DocVQA, InfoVQA: words


def answers(row):
    """process_line's true answers: the elements of a list literal, or the whole cell. (There by eval; never here.)"""
    cell = need(row, "answer")
    try:
        value = ast.literal_eval(cell) if cell.lstrip().startswith("[") else cell
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # [Red, Blue] is one answer
        value = cell
    return [str(element) for element in value] if isinstance(value, list) and value else [cell]


def score_words(rule, rows):
    """ImageVQADataset.evaluate: the mean score by a rule of (true answers, reply), also by split if there are any."""
    scores = [rule(answers(row), text(row, "prediction", "")) for row in rows]
    splits = grouped([text(row, "split") for row in rows], scores)
    return {"rows": scores, "overall": percent(scores),
            **{split: percent(group) for split, group in splits.items() if split is not None}}


NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())}}
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've""".split()
CONTRACTIONS = {word[:i] + word[i + 1:]: word  # the VQA challenge's list is each word with one apostrophe left out,
                for word in CONTRACTED for i, letter in enumerate(word) if letter == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # ... but for this one, which it has the wrong way round


def normalised(said):
    """process_answer: lower case, digits for number words up to ten, no articles, apostrophes put back."""
    said = without_punctuation(said.replace("\n", " ").replace("\t", " ").strip()).lower()
    words = [NUMBERS.get(word, word) for word in said.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_score(true, reply):
    """TextVQA, the VQA challenge's accuracy: a third for each annotator who agrees, at most 1, averaged over leaving
    out each of them: with ten, one agreeing gives 0.3 and four give 1.
    """
    agree = [normalised(answer) == normalised(reply) for answer in true]
    return fmean(min(1, (sum(agree) - left_out) / 3) for left_out in agree)


def relaxed_match(true, reply):
    """ChartQA, relaxed_correctness: numbers within 5 %, else the same text but for case; the best answer counts.

    The 5 % are of the reply, not of the true answer: VLMEvalKit passed them in the wrong order until September 2025.
    So a reply of 0 has to be the same text.
    """
    def right(answer, reply):
        """Whether the reply matches this one answer."""
        wanted, said = number(answer), number(reply)
        if wanted is None or not said:
            return answer.lower() == reply.lower()
        return abs(wanted - said) / abs(said) <= 0.05

    return float(any(right(answer, reply.strip()) for answer in true))


def number(said):
    """What float() reads, or None; a percentage is a hundredth."""
    try:
        return float(said.rstrip("%")) / 100 if said.endswith("%") else float(said)
    except ValueError:
        return None


def anls(true, reply):
    """DocVQA and InfoVQA, anls_compute: 1 - edits / length for the nearest answer, 0 if that is below 0.5.

    Case and runs of blanks make no edit, but the length is that of the longer text as it stands, in capitals.
    """
    def distance(answer):
        """Edits from the reply to this one answer, by length."""
        a, b = (" ".join(said.lower().split()) for said in (answer, reply))
        return edits(a, b) / (max(len(answer.upper()), len(reply.upper())) or 1)

    nearest = 1 - min(map(distance, true))
    return nearest if nearest >= 0.5 else 0.0


def edits(a, b):
    """Levenshtein distance: how many letters to insert, delete or replace to make b of a."""
    row = list(range(len(b) + 1))  # from the letters of a so far to each beginning of b
    for i, letter in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


SCORERS = {"MME": score_mme, "HallusionBench": score_hallusion, "RealWorldQA": score_realworldqa,
           "TextVQA_VAL": functools.partial(score_words, vqa_score),
           "ChartQA_TEST": functools.partial(score_words, relaxed_match),
           "DocVQA_VAL": functools.partial(score_words, anls), "InfoVQA_VAL": functools.partial(score_words, anls)}
