"""The questions of the paper's seven benchmarks: how their files are read, and what is asked.

The files are VLMEvalKit's (https://opencompass.openxlab.space/utils/VLMEval/MME.tsv and so on): a
row a question, its picture in base64. Prompts are those that VLMEvalKit used for InternVL2 and
Qwen2-VL in February 2025. A row is a dict, {column: cell}.

There is nothing to run here: build.py prepares, eval.py asks, scorers.py scores.
"""

import base64
import io
import string
from pathlib import Path

from plumbing.files import BadInput, table_rows
from plumbing.media import load_image
from real.families import CHATS, QWEN2_VL

COLUMNS = ("index", "image", "question", "answer")  # in any order, among others
MORE_COLUMNS = {"MME": ("category",), "HallusionBench": ("l2-category",)}  # which their scores need
REFERENCE = 64  # an image cell of at most so many characters is the index of another row

# Cells that pandas, with which VLMEvalKit reads its files, takes for empty ones.
MISSING = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND",
           "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}


# ---- reading -------------------------------------------------------------------------------------


def read_tsv(path):
    """Returns (rows, dropped): a benchmark's questions, and how many rows had no picture.

    Each row holds text alone, has no empty cells, and its "image" is the picture itself.
    Raises BadInput for a file that is no such table, and for a row that lacks a cell.
    """
    needed = (*COLUMNS, *MORE_COLUMNS.get(Path(path).stem, ()))
    rows, images, dropped = [], {}, 0
    for where, cells in table_rows(path, needed, strict=True):
        row = {name: cell for name, cell in cells.items() if has_value(name, cell)}
        row["where"] = where
        # HallusionBench asks 178 questions about no picture; VLMEvalKit drops them.
        if "image" not in row:
            dropped += 1
            continue
        for name in needed:
            need(row, name)
        if row["index"] in images:
            raise BadInput(f"{row['where']}: an earlier row has the index {row['index']}, too")
        images[row["index"]] = row["image"]
        rows.append(row)

    # Several questions about one picture: the others hold the index of the row that has it.
    for row in rows:
        if len(row["image"]) <= REFERENCE:
            image = images.get(row["image"], "")
            if len(image) <= REFERENCE:
                raise BadInput(f"{row['where']}: the image is that of row {row['image']}, "
                               "which has none of its own")
            row["image"] = image
    if not rows:
        raise BadInput(f"{path}: has no row with a picture")
    return rows, dropped


def has_value(column, cell):
    """Tells whether a cell of the file has a value.

    An option "None" counts as missing, as it does in VLMEvalKit's prompt. But questions and answers
    are taken as they stand: pandas turns the answer "None" into NaN, a word that no model says.
    """
    return cell != "" if column in ("question", "answer") else cell not in MISSING


def text(row, name, default=None):
    """Returns a cell's text, or the default where it is absent, None or NaN."""
    value = row.get(name)
    return default if value is None or value != value else str(value)


def need(row, name, choices=()):
    """Returns a cell's text; of choices, the one that it is in any case. Raises BadInput if none.
    """
    value = text(row, name)
    if value is not None and choices:
        value = value.strip().capitalize()
    if value is None or choices and value not in choices:
        wrong = f"has no {name}" if value is None else f"the {name} {value!r} is none that is known"
        raise BadInput(f"{row.get('where', 'index ' + text(row, 'index', '?'))}: {wrong}")
    return value


def image_of(row):
    """Returns a row's picture, RGB. (VLMEvalKit saves it as JPEG first, and loses a little.)"""
    return load_image(io.BytesIO(base64.b64decode(need(row, "image"))))


# ---- asking --------------------------------------------------------------------------------------

BRIEFLY = "Answer the question using a single word or phrase."


def prompt(benchmark, row, chat="Hermes-2"):
    """Returns an LVLM's prompt in two parts: the question, and all that follows it.

    Follows InternVLChat.build_prompt, or Qwen2VLPromptMixin's; the parts are to be joined without a
    blank. chat: model.py's setting, which names the family
    """
    if CHATS[chat] == QWEN2_VL:
        return qwen2_vl_prompt(benchmark, row)
    if benchmark == "RealWorldQA":
        lines = [f"{letter}. {option}" for letter, option in options(row).items()]
        if lines:
            lines.append("Answer with the option's letter from the given choices directly.")
        else:
            lines.append("Answer the question directly.")
        return need(row, "question"), "".join(f"\n{line}" for line in lines)
    rest = {"MME": f" {BRIEFLY}", "HallusionBench": f" Please answer yes or no. {BRIEFLY}"}
    return need(row, "question"), rest.get(benchmark, f"\n{BRIEFLY}")


def qwen2_vl_prompt(benchmark, row):
    """Returns Qwen2-VL's prompt in the same two parts."""
    if benchmark == "RealWorldQA":
        lines = [f"{letter}. {option}" for letter, option in options(row).items()]
        if lines:
            lines = ["Options:", *lines, "Please select the correct answer from the options above."]
        return f"Question: {need(row, 'question')}", "".join(f"\n{line}" for line in lines)
    briefly = "Please try to answer the question with short words or phrases if possible."
    rest = {"MME": "", "HallusionBench": " Please answer yes or no."}
    return need(row, "question"), rest.get(benchmark, f"\n{briefly}")


def options(row):
    """Returns a row's options, {letter: text}: the columns that are named by one capital letter."""
    cells = {letter: text(row, letter) for letter in string.ascii_uppercase}
    return {letter: option for letter, option in cells.items() if option}
