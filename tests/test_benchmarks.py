"""The paper's benchmarks: files are read, and rows are scored, as by VLMEvalKit."""

import base64
import csv
import io
import json
import random

import pytest
from conftest import FIXTURES
from PIL import Image

from benchmarks import scorers
from benchmarks.questions import image_of, options, prompt, read_tsv
from benchmarks.scorers import BENCHMARKS, option_letter, score, yes_or_no
from plumbing.files import BadInput

WORDS = ["TextVQA_VAL", "ChartQA_TEST", "DocVQA_VAL", "InfoVQA_VAL"]  # answered in words


def golden(benchmark):
    """Rows with the scores and totals that VLMEvalKit itself gave them."""
    name = benchmark.split("_")[0].removesuffix("Bench").lower()
    return json.loads((FIXTURES / f"golden_{name}_a.json").read_text(encoding="utf-8"))


def close(value):
    return pytest.approx(value, abs=1e-9)


# ---- scoring -------------------------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_row_scores_as_in_vlmevalkit(benchmark):
    rows = golden(benchmark)["rows"]
    scores = score(benchmark, rows)["rows"]
    wrong = [(row["answer"], row["prediction"], row["expected"]["score"], mine)
             for row, mine in zip(rows, scores, strict=True)
             if abs(mine - row["expected"]["score"]) > 1e-9]
    assert not wrong
    assert all(type(mine) is float for mine in scores)


@pytest.mark.parametrize("benchmark", WORDS)
def test_replies_that_a_spreadsheet_would_lose_are_taken_at_their_word(benchmark):
    rows = golden(benchmark)["direct"]
    assert score(benchmark, rows)["rows"] == [row["score_direct"] for row in rows]


def test_replies_are_read_as_in_vlmevalkit():
    for benchmark in ("MME", "HallusionBench"):
        for row in golden(benchmark)["rows"]:
            assert yes_or_no(row["prediction"]) == row["expected"]["extracted"], row["prediction"]
    for row in golden("RealWorldQA")["rows"]:
        letter = option_letter(row["prediction"], options(row))
        assert letter == row["expected"]["extracted"]
    for row in golden("TextVQA_VAL")["rows"]:
        assert scorers.normalize_reply(row["prediction"]) == row["expected"]["pred_norm"]
        true = {scorers.normalize_reply(answer) for answer in scorers.true_answers(row)}
        assert sorted(true) == row["expected"]["gt_norm"]


def test_totals_are_vlmevalkits():
    mme, hallusion, real = map(golden, ("MME", "HallusionBench", "RealWorldQA"))
    result, table = score("MME", mme["rows"]), mme["aggregate"]["vlmevalkit"]
    derived = mme["aggregate"]["derived"]
    assert {name: result[name] for name in table} == {k: close(v) for k, v in table.items()}
    assert result["overall"] == result["perception/20"] == close(derived["perception_over_20"])
    assert result["sum/28"] == close(derived["sum_over_28"])
    right = [row["expected"]["score"] for row in mme["rows"]]
    assert result["accuracy"] == close(100 * sum(right) / len(right))

    result = score("HallusionBench", hallusion["rows"])
    for group, accuracies in hallusion["aggregate"]["vlmevalkit"].items():
        for name, value in accuracies.items():
            name = name if group == "Overall" else f"{group} {name}"
            assert result[name] == close(value), name
    assert result["overall"] == close(hallusion["aggregate"]["derived"]["average_of_three"])

    result = score("RealWorldQA", real["rows"])
    assert result["overall"] == close(real["aggregate"]["derived"]["accuracy_percent"])
    letters = [row["expected"]["extracted"] for row in real["rows"]]
    assert result["unknown share"] == close(100 * letters.count("Z") / len(letters))


@pytest.mark.parametrize("benchmark", ["MME", "HallusionBench"])
def test_yes_ratios(benchmark):
    data = golden(benchmark)
    result, derived = score(benchmark, data["rows"]), data["aggregate"]["derived"]
    assert result["yes ratio of all"] == close(derived["yes_ratio_all"])
    assert result["yes ratio of answered"] == close(derived["yes_ratio_answered"])
    assert result["unknown share"] == close(100 * derived["unknown"] / len(data["rows"]))
    silent = score(benchmark, [{**row, "prediction": ""} for row in data["rows"]])
    assert silent["yes ratio of answered"] is None and silent["yes ratio of all"] == 0


@pytest.mark.parametrize("benchmark", WORDS)
def test_totals_of_answers_in_words(benchmark):
    data = golden(benchmark)
    result, table = score(benchmark, data["rows"]), data["aggregate"]["vlmevalkit"]
    assert result["overall"] == close(table.pop("Overall"))
    splits = {k: v for k, v in result.items() if k not in ("rows", "overall")}
    assert splits == {k: close(v) for k, v in table.items()}


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_the_order_of_rows_does_not_matter(benchmark):
    rows = golden(benchmark)["rows"]
    shuffled = random.Random(0).sample(rows, len(rows))
    one, other = score(benchmark, rows), score(benchmark, shuffled)
    scores = one.pop("rows"), other.pop("rows")
    assert {k: close(v) for k, v in one.items()} == other
    assert scores[1] == close([row["expected"]["score"] for row in shuffled])


def test_hallusion_figures_of_vd_and_vs_are_apart():
    rows = [{"index": f"{group}_ocr_1_0_0_{i}", "category": group, "l2-category": f"{group}_ocr",
             "answer": "Yes", "prediction": reply}
            for group, reply in (("VD", "yes"), ("VS", "no")) for i in (0, 1)]
    result = score("HallusionBench", rows)
    assert [result[name] for name in ("aAcc", "fAcc", "qAcc", "overall")] == [50, 50, 50, 50]
    assert (result["VD_ocr fAcc"], result["VS_ocr fAcc"]) == (100, 0)


def test_mme_groups_pictures_within_a_category():
    rows = [{"index": str(i), "category": category, "image_path": "1.jpg", "question": "?",
             "answer": "Yes", "prediction": reply}
            for i, (category, reply) in enumerate([("count", "yes"), ("color", "no")] * 2)]
    result = score("MME", rows)
    assert (result["count"], result["color"]) == (200, 0)
    assert (result["perception"], result["reasoning"]) == (200, 0)
    for row in rows:  # the same question numbers, told apart by the picture itself
        row["image"] = row.pop("image_path")
    assert score("MME", rows) == result


@pytest.mark.parametrize("reply, letter", [
    ("Failed to obtain answer via API. B", "Z"),  # the letter is not looked for
    ("Failed to obtain answer via API: straight", "B"),  # but the text is
    ("I'm sorry, but without the image provided B", "Z"), ("A B straight", "B"),
    ("Z straight", "Z"), ("Z B", "B"), ("{C}", "C"), ("D straight", "B")])
def test_option_letter(reply, letter):
    assert option_letter(reply, {"A": "Left", "B": "Straight", "C": "2 or 3"}) == letter


@pytest.mark.parametrize("reply, words", [
    ("a;b", "a b"), ("a; b", "a b"), ("a;b c; d", "ab c d"), ("a;b 1,0", "ab 10"),
    ("it's #1: 5%*", "it's #1: 5%*"), ("x -y-z", "x yz"),
    ("1994. j.k. .5 2.50", "1994 jk .5 2.50"), ("." * 40, "." * 8)])
def test_marks_are_deleted_or_become_spaces(reply, words):
    """Full stops go unless a digit follows, 32 at most."""
    assert scorers.remove_punctuation(reply) == words


def test_tabs_and_new_lines_are_spaces_to_marks():
    assert scorers.normalize_reply("x,\ty,z") == scorers.normalize_reply("x,\ny,z") == "x yz"
    # Not so for yes and no.
    assert (yes_or_no("well,\tyes,sir"), yes_or_no("well, yes,sir")) == ("Yes", "Unknown")


def test_contractions_are_those_of_the_vqa_challenge():
    pairs = {"dont": "don't", "couldnt've": "couldn't've", "couldn'tve": "couldn't've",
             "yall'd've": "y'all'd've", "'ow'sat": "'ow's'at", "twas": "'twas",
             "somebody'd": "somebodyd", "lets": "lets", "shes": "shes", "im": "im",
             "couldntve": "couldntve", "id": "id", "well": "well"}
    assert {word: scorers.normalize_reply(word) for word in pairs} == pairs
    assert len(scorers.CONTRACTIONS) == 114


@pytest.mark.parametrize("cell, answers", [
    ("['a', 'b']", ["a", "b"]), ("[2010, 2.50]", ["2010", "2.5"]),
    ("[Red, Blue]", ["[Red, Blue]"]), ("a, b", ["a, b"]), ("('a', 'b')", ["('a', 'b')"]),
    ("[__import__('os').getcwd()]", ["[__import__('os').getcwd()]"]), ("[]", ["[]"]),
    (f"[{'-' * 9999}1]", [f"[{'-' * 9999}1]"]), (14.0, ["14.0"]), (["a"], ["a"])])
def test_answers_are_a_list_literal_or_the_cell(cell, answers):
    assert scorers.true_answers({"answer": cell}) == answers


@pytest.mark.parametrize("answer, reply, right", [
    ("100", "105.26", 1), ("100", "105.27", 0), ("100", "95.24", 1), ("100", "95.23", 0),
    ("105", "100", 1), ("100", "-100", 0),  # 5 % of the reply
    ("0", "0", 1), ("0.0", "0", 0), ("45%", "45 %", 1), ("45%%", "0.45", 1), ("60", "6e1", 1),
    ("27500", "27_500", 1), ("Japan ", "Japan", 0), ("nan", "nan", 0), ("[1, 'x']", "X", 1)])
def test_relaxed_match(answer, reply, right):
    assert score("ChartQA_TEST", [{"answer": answer, "prediction": reply}])["rows"] == [right]


@pytest.mark.parametrize("answer, reply, expected", [
    ("['ab']", "ac", 0.5), ("['abc']", "axx", 0), ("['']", "", 1),
    ("['kitten']", "sitting", 1 - 3 / 7), ("['abcd']", "abcx    ", 1 - 1 / 8),
    ("['stra\u00dfe']", "strasse", 1 - 2 / 7), ("['x', 'yes']", "YES", 1),
    ("['gross']", "gro\u00df\u00df\u00df", 1 - 3 / 9)])  # in capitals, one \u00df is two letters
def test_anls(answer, reply, expected):
    result = score("DocVQA_VAL", [{"answer": answer, "prediction": reply}])
    assert result["rows"] == close([expected])


def test_vqa_score_counts_the_other_annotators():
    for agreeing, expected in enumerate([0, 0.3, 0.6, 0.9, 1, 1]):
        answers = ["stop"] * agreeing + ["go"] * (10 - agreeing)
        row = {"answer": repr(answers), "prediction": "The STOP!"}
        assert score("TextVQA_VAL", [row])["rows"] == close([expected])
    # There is no other annotator.
    assert score("TextVQA_VAL", [{"answer": "stop", "prediction": "stop"}])["rows"] == [0]


def test_missing_cells_and_replies_do_not_stop_scoring():
    row = {"index": 7, "answer": "A", "A": "Left", "B": 2.0, "C": float("nan"), "D": None}
    assert options(row) == {"A": "Left", "B": "2.0"}
    rows = [{**row, "prediction": reply} for reply in ("left", None, float("nan"), 2.0)]
    assert score("RealWorldQA", rows)["rows"] == [1, 0, 0, 0]
    rows = [{"answer": 14.0, "prediction": 14, "split": float("nan")}]
    assert score("ChartQA_TEST", rows) == {"rows": [1], "overall": 100}


@pytest.mark.parametrize("benchmark, answer, reply", [
    ("MME", "yes", "Yes."), ("MME", "NO", "no"), ("HallusionBench", " Yes ", "yes"),
    ("RealWorldQA", "b", "B"), ("RealWorldQA", " B", "B.")])
def test_true_answers_count_in_any_case(benchmark, answer, reply):
    row = {"index": "VD_ocr_1_0_0_1", "l2-category": "VD_ocr", "category": "count", "A": "one",
           "image": "i", "B": "two", "answer": answer, "prediction": reply}
    other = {**row, "prediction": "Yes" if "n" in reply else "no A"}
    assert score(benchmark, [row, other])["rows"] == [1, 0]


@pytest.mark.parametrize("benchmark", ["MME", "HallusionBench", "RealWorldQA"])
@pytest.mark.parametrize("answer", [1, "0", True, "False", "y", "Yes, it is", "ja", "two"])
def test_true_answers_that_no_reply_can_match_are_named(benchmark, answer):
    row = {"index": "VD_ocr_1_0_0_1", "l2-category": "VD_ocr", "category": "count", "A": "one",
           "image": "i", "B": "two", "where": "MME.tsv:7"}
    good = {**row, "answer": "B" if benchmark == "RealWorldQA" else "No"}
    if (benchmark, answer) == ("RealWorldQA", "y"):
        answer = "yy"  # Y might be an option's letter
    with pytest.raises(BadInput, match="MME.tsv:7: the answer '"):
        score(benchmark, [good, {**row, "answer": answer}])


@pytest.mark.parametrize("benchmark, rows, place", [
    ("MMBench", [{}], "MMBench"), ("MME", [], "MME"), ("DocVQA_VAL", [], "DocVQA_VAL"),
    ("DocVQA_VAL", [{"index": "7", "prediction": "x"}], "index 7"),
    ("MME", [{"where": "MME.tsv:3", "answer": "Yes"}], "MME.tsv:3"),
    ("MME", [{"index": "7", "answer": float("nan"), "prediction": "nan"}], "index 7"),
    ("HallusionBench", [{"index": "VD_1", "l2-category": "VD_ocr", "answer": "Yes"}], "VD_1")])
def test_rows_that_cannot_be_scored_are_named(benchmark, rows, place):
    with pytest.raises(BadInput, match=place) as error:
        score(benchmark, rows)
    assert "\n" not in str(error.value)


# ---- asking --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat, mme, hallusion, real, words, open", [
    ("Hermes-2", "Is it? Answer the question using a single word or phrase.",
     "Is it? Please answer yes or no. Answer the question using a single word or phrase.",
     "Is it?\nA. Yes\nB. No\nE. 5\n"
     "Answer with the option's letter from the given choices directly.",
     "Is it?\nAnswer the question using a single word or phrase.",
     ("Why?", "\nAnswer the question directly.")),
    ("qwen2_vl", "Is it?", "Is it? Please answer yes or no.",
     "Question: Is it?\nOptions:\nA. Yes\nB. No\nE. 5\n"
     "Please select the correct answer from the options above.",
     "Is it?\nPlease try to answer the question with short words or phrases if possible.",
     ("Question: Why?", ""))])
def test_prompts_are_internvl2s_or_qwen2_vls(chat, mme, hallusion, real, words, open):
    row = {"question": "Is it?", "A": "Yes", "B": "No", "C": None, "E": "5"}
    assert {name: "".join(prompt(name, row, chat)) for name in BENCHMARKS} == {
        "MME": mme, "HallusionBench": hallusion, "RealWorldQA": real, **dict.fromkeys(WORDS, words)}
    assert prompt("RealWorldQA", {"question": "Why?"}, chat) == open


# ---- reading -------------------------------------------------------------------------------------


def picture(color="red", mode="RGB"):
    """A small picture as a cell of a TSV."""
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), color).convert(mode).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_tsv(path, columns, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([columns, *rows])
    return path


BASIC = ["index", "image", "question", "answer"]


def test_a_table_is_read_with_columns_in_any_order(tmp_path):
    image = picture()
    path = write_tsv(tmp_path / "RealWorldQA.tsv",
                     ["A", "answer", "C", "image", "B", "index", "question"],
                     [["left", "A", "N/A", image, "NULL", "0", 'Where\tis "it"?\nSay.'],
                      ["None", "B", "3", image, "nan", "007", "Where?"]])
    rows, dropped = read_tsv(path)
    assert dropped == 0 and rows == [
        {"A": "left", "answer": "A", "image": image, "index": "0",
         "question": 'Where\tis "it"?\nSay.', "where": f"{path}:2"},
        {"answer": "B", "C": "3", "image": image, "index": "007", "question": "Where?",
         "where": f"{path}:4"}]


def test_questions_and_answers_that_look_missing_are_kept(tmp_path):
    path = write_tsv(tmp_path / "ChartQA_TEST.tsv", [*BASIC, "split"],
                     [["1", picture(), "NA", "None", "test_human"]])
    (row,), _ = read_tsv(path)
    assert (row["question"], row["answer"]) == ("NA", "None")
    assert score("ChartQA_TEST", [{**row, "prediction": "none"}])["test_human"] == 100


def test_a_short_image_is_the_index_of_another_row(tmp_path):
    red, blue = picture("red"), picture("blue")
    path = write_tsv(tmp_path / "t.tsv", BASIC, [["2", "10", "?", "a"], ["10", red, "?", "a"],
                                                 ["1", blue, "?", "a"], ["x", "1", "?", "a"]])
    assert [row["image"] for row in read_tsv(path)[0]] == [red, red, blue, blue]
    assert image_of(read_tsv(path)[0][3]).getpixel((0, 0)) == (0, 0, 255)


def test_rows_without_a_picture_are_dropped_and_counted(tmp_path):
    path = write_tsv(tmp_path / "t.tsv", BASIC,
                     [["1", "", "?", ""], ["2", picture(), "?", "a"], ["3", "nan", "?", "a"]])
    rows, dropped = read_tsv(path)
    assert [row["index"] for row in rows] == ["2"] and dropped == 2


@pytest.mark.parametrize("rows, line", [
    ([["1", "7", "?", "a"]], 2),  # no such row
    ([["1", "", "?", "a"], ["2", "1", "?", "a"]], 3),  # it was dropped
    ([["1", picture(), "?", "a"], ["2", "1", "?", "a"], ["3", "2", "?", "a"]], 4),  # two hops
    ([["1", picture(), "two\nlines", "a"], ["1", picture(), "?", "a"]], 4),  # an index twice
    ([["1", picture(), "?", "a"], ["", picture(), "?", "a"]], 3),  # no index
    ([["1", picture(), "", "a"]], 2), ([["1", picture(), "?", ""]], 2),
    ([["1", picture(), "?", "a"], ["2", picture(), "?"]], 3),  # cut off
    ([["1", picture(), "?", "a", "b"]], 2)])
def test_a_bad_row_is_named(tmp_path, rows, line):
    path = write_tsv(tmp_path / "t.tsv", BASIC, rows)
    with pytest.raises(BadInput) as error:
        read_tsv(path)
    assert str(error.value).startswith(f"{path}:{line}: ") and "\n" not in str(error.value)


HEADER = "\t".join(BASIC).encode()


@pytest.mark.parametrize("name, content, line", [
    ("t.tsv", b"index\tquestion\tanswer\n1\t?\ta\n", ":1"), ("MME.tsv", HEADER, ":1"),
    ("HallusionBench.tsv", HEADER + b"\tcategory", ":1"), ("t.tsv", b"", ":1"),
    ("t.tsv", b"index,image,question,answer\n", ":1"),
    ("t.tsv", b"\x89PNG\r\n\x1a\n\x00\xff\xfe", ":1"),
    ("t.tsv", HEADER + b'\n1\tx\t?\t"never closed\n2\ty\t?\tb\n', ":2"),
    ("t.tsv", HEADER + b"\n\n", "")])  # no row with a picture
def test_a_file_that_is_no_benchmark_is_refused(tmp_path, name, content, line):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput) as error:
        read_tsv(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}{line}: ")
    assert "\n" not in str(error.value)


def test_byte_order_mark_blank_lines_and_long_cells_do_not_matter(tmp_path):
    image = picture() + "A" * 200_000  # more than the csv module takes unasked
    row = f"1\t{image}\tsaid 5\" wide?\t\"a\r\nb\"\r\n"
    path = tmp_path / "t.tsv"
    path.write_bytes("\ufeff".encode() + HEADER + b"\r\n\r\n" + row.encode())
    (row,), _ = read_tsv(path)
    assert row == {"index": "1", "image": image, "question": 'said 5" wide?', "answer": "a\r\nb",
                   "where": f"{path}:3"}
