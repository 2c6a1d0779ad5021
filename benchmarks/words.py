"""Scores of any prepared folder: word errors of transcripts, answers that agree word for word.

    python eval.py RUN [RUN ...] --data FOLDER    # asks the questions, or for transcripts

Texts are compared as lists of words: lower case, without punctuation but apostrophes inside a word.
A hyphen parts words. Numbers stay as they are written: "2" is not "two", as in our transcripts.
"""

import re
import statistics

from torchaudio.functional import edit_distance

from plumbing.files import BadInput
from real.speech import APOSTROPHES


def to_words(text):
    """Returns a text's words as they are compared: "It's twenty-one." has it's, twenty and one."""
    text = APOSTROPHES.sub("'", text.lower())
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text)


def error_rates(rows):
    """Returns {"text": {}, "audio": {measure: percent}} of transcripts: a row's "audio".

    The word error rate is that of the rows together: all substitutions, deletions and insertions,
    divided by the number of words in all "answer"s. It can be over 100: a model may go on and on.
    """
    n_errors, n_words, n_exact = 0, 0, 0
    for row in rows:
        reference, transcript = to_words(row["answer"]), to_words(row["audio"])
        errors = edit_distance(reference, transcript)
        n_errors += errors
        n_words += len(reference)
        n_exact += errors == 0
    if n_words == 0:
        raise BadInput(f"{rows[0]['folder']}: its transcripts have no words")
    return {"text": {}, "audio": {"word error rate": 100 * n_errors / n_words,
                                  "transcripts exact": 100 * n_exact / len(rows)}}


def agree(answer, other):
    """Tells whether two answers have the same words. One without any agrees with nothing."""
    words = to_words(answer)
    return bool(words) and words == to_words(other)


def says_the_label(row, answer):
    """Returns 1 if an answer has just the words of the row's label, or else of its "answer"."""
    return float(agree(answer, row.get("label", row["answer"])))


def agreement(rows):
    """Returns {form: {measure: percent}}: agreement with the label, and of speech with text."""
    summary = {}
    for form in ("text", "audio"):
        if rows[0][form] is not None:
            right = [says_the_label(row, row[form]) for row in rows]
            summary[form] = {"as the label says": 100 * statistics.fmean(right)}
    if "audio" in summary:
        same = [agree(row["audio"], row["text"]) for row in rows]
        summary["audio"]["as with text"] = 100 * statistics.fmean(same)
    return summary
