"""What counts as right: the tricks that fool a scorer score nothing."""

import json
import random
import shutil
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT, read_lines, run_here
from safetensors.torch import load_file, save_file

import data
import eval
import mmalign
from benchmarks import words
from model import OLLM
from plumbing.files import BadInput, write_json_lines
from world import shapes
from world.answers import has_answer_type, is_in_base_style, names_scene_content


def score_answer(row, answer):
    """Scores a built-in answer: MMAlign's kinds by mmalign.py's rule, the others by eval.py's."""
    if row["kind"] in shapes.ALIGN_KINDS:
        return mmalign.score_reply(row, answer)
    return eval.score_answer(row, answer)


@pytest.fixture(scope="module")
def rows():
    rng = random.Random(0)
    drawn = (shapes.draw_question(rng, shapes.draw_scene(rng, True),
                                  shapes.KINDS + shapes.ALIGN_KINDS) for _ in range(1200))
    return list(drawn)


def mean(rows, answer, kinds=shapes.KINDS + shapes.ALIGN_KINDS):
    return statistics.fmean(score_answer(row, answer(row)) for row in rows if row["kind"] in kinds)


def test_every_wording_of_the_right_answer_is_right(rows):
    assert mean(rows, lambda row: row["answer"]) == 1


def test_listing_everything_scores_nothing(rows):
    everything = " ".join([*shapes.COLORS, *shapes.SHAPES, *shapes.NUMBERS, *shapes.PLACES,
                           "yes no"])
    pairs = " and ".join(f"a {c} {s}" for c in shapes.COLORS for s in shapes.SHAPES)
    assert mean(rows,
                lambda row: f"{everything} {pairs} {row.get('false', '')} {row['label']}") == 0


def test_echo_and_silence_score_nothing(rows):
    assert mean(rows, lambda row: row["question"]) == 0 and mean(rows, lambda row: "") == 0


def test_an_answer_after_an_echo_still_counts(rows):
    assert mean(rows, lambda row: f"{row['question']} {row['answer']}") == 1


def test_always_yes_scores_the_base_rate(rows):
    asked = [row for row in rows if row["kind"] == "existence"]
    truth = statistics.fmean(row["label"] == "yes" for row in asked)
    assert mean(rows, lambda row: "yes", ["existence"]) == truth and 0.4 < truth < 0.6
    assert mean(rows, lambda row: "yes", [k for k in shapes.KINDS if k != "existence"]) == 0


def test_descriptions_count_by_f1():
    row = {"kind": "description", "question": "what do you see",
           "label": "a red circle and a blue star"}
    assert score_answer(row, "i see a red circle") == pytest.approx(2 * 1 / 3)
    assert score_answer(row, "a blue star and a red circle") == 1
    assert score_answer(row, "a blue circle and a red star") == 0


def test_mmalign_wants_the_true_sentence_and_not_the_false_one():
    row = {"kind": "relation",
           "question": "which is right a star above a circle or a circle above a star",
           "label": "a star above a circle", "false": "a circle above a star"}
    assert score_answer(row, "it is a star above a circle") == 1
    assert score_answer(row, "a circle above a star") == 0
    assert score_answer(row, "a star above a circle or a circle above a star") == 0


def test_the_example_is_a_question_that_only_the_second_answers_rightly(capsys):
    rows = [{"question": str(i), "label": "red", "folder": "f", "image": f"{i}.png", "text": "red",
             "audio": audio, "transcript": None}
            for i, audio in enumerate(("red", "blue", "green"))]
    better = [{**row, "audio": "red" if i else "blue"} for i, row in enumerate(rows)]
    aligned = [{**row, "audio": "zero", "transcript": f"heard {i}"} for i, row in enumerate(rows)]

    def score_row(row, answer):
        return float(answer == row["label"])

    eval.print_differences({("SFT", 0): rows, ("KD 0.75", 0): better}, score_row)
    assert capsys.readouterr().out.startswith("KD 0.75 - SFT, spoken: +33.3 points, 95 % interval ")
    eval.print_differences({("base", 0): rows, ("aligned", 0): aligned, ("KD 0.75", 0): rows,
                            ("KD 0.75, runs/mine", 0): better, ("KD 1", 1): rows}, score_row)
    assert capsys.readouterr().out.startswith("KD 0.75, runs/mine - KD 0.75, spoken: +33.3 points")
    eval.print_differences({("base", 0): rows}, score_row)
    assert capsys.readouterr().out == "", "nothing to compare"
    eval.print_example({"aligned": aligned, "SFT": rows, "KD 0.75": better}, score_row)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == ["KD 0.75 is right and SFT wrong: 2 questions. The other way round: 1.",
                     "The first: 1? (red)", "f/1.png", "base text red",
                     "aligned speech zero (transcript: heard 1)", "SFT speech blue",
                     "KD 0.75 speech red"]

    eval.print_example({"SFT": rows, "KD 1": rows}, score_row)
    assert capsys.readouterr().out.splitlines() == [
        "KD 1 is right and SFT wrong: 0 questions. The other way round: 0."]


def test_answers_of_the_asked_kind_and_in_the_bases_words(rows):
    asked = [row for row in rows if row["kind"] in shapes.KINDS]
    assert all(has_answer_type(row, row["answer"]) for row in asked)
    assert all(is_in_base_style(row, row["answer"]) for row in asked)
    for row in asked:
        other = f"you see {row['label']} there"
        assert has_answer_type(row, other) and not is_in_base_style(row, other)
        assert not has_answer_type(row, "the there") and not is_in_base_style(row, "the there")
    color, = [row for row in asked if row["kind"] == "color"][:1]
    assert not has_answer_type(color, "it is two") and not is_in_base_style(color, "it is two")


def test_a_wrong_answer_that_names_something_of_the_picture():
    sample = {"where": "", "question": "what color is the circle",
              "scene": "a red circle and a blue star"}
    assert names_scene_content(sample, "the star is blue") and names_scene_content(sample, "red")
    assert not names_scene_content(sample, "the circle is green"), (
        "the circle stands in the question already")
    assert not names_scene_content(sample, "yes there is") and not names_scene_content(sample, "")


# ---- any folder ----


# What was said and what was heard, and errors and words by jiwer 4.0.0 (process_words, its own
# transforms for case and punctuation).
TRANSCRIPTS = [
    ("mister quilter is the apostle of the middle classes",
     "Mister Quilter is the apostle of the middle classes.", 0, 9),
    ("nor is mister quilter's manner less interesting than his matter",
     "nor is mister quilters manor less interesting than matter", 3, 10),
    ("he tells us that at this festive season of the year",
     "he tells us that at this this festive season of year year", 2, 11),
    ("it's seven o'clock", "It’s seven o'clock!", 0, 3), ("twenty one", "Twenty-one", 0, 2),
    ("two circles", "", 2, 2), ("a red circle", "a red circle a red circle a red circle", 6, 3),
    ("the star is above the square", "above the star is the square", 2, 6)]
JIWER_WER = 0.32608695652173914  # of all eight together


def test_the_word_error_rate_is_jiwers():
    rows = [{"answer": said, "audio": heard} for said, heard, _, _ in TRANSCRIPTS]
    summary = words.error_rates(rows)
    assert summary["audio"]["word error rate"] == pytest.approx(100 * JIWER_WER, rel=1e-12)
    assert summary["audio"]["transcripts exact"] == 100 * 3 / 8
    for row, (said, _, errors, n_words) in zip(rows, TRANSCRIPTS):
        rate = words.error_rates([row])["audio"]["word error rate"]
        assert rate == pytest.approx(100 * errors / n_words), said


def test_transcripts_without_words_have_no_error_rate():
    with pytest.raises(BadInput, match="no words"):
        words.error_rates([{"answer": "...", "audio": "a", "folder": "f"}])


def test_answers_agree_word_for_word_and_silence_with_nothing():
    same = [("It's red.", "it’s RED"), ("two-thirds", "Two thirds!"), ("3.5", "3 5")]
    other = [("red", "it is red"), ("a b", "b a"), ("2", "two"), ("its", "it's"), ("", ""),
             ("...", "?!")]
    assert all(words.agree(a, b) for a, b in same)
    assert not any(words.agree(a, b) for a, b in other)
    rows = [{"answer": "it is red", "label": "red", "text": "Red.", "audio": "red"},
            {"answer": "blue", "text": "green", "audio": "Green"},
            {"answer": "one", "text": "one", "audio": "two"}]
    summary = words.agreement(rows)
    assert summary["text"] == {"as the label says": pytest.approx(200 / 3)}
    assert summary["audio"] == {"as the label says": pytest.approx(100 / 3),
                                "as with text": pytest.approx(200 / 3)}


def cells(line):
    """The cells of a table's line."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_floor_reads_another_question_and_the_cascade_its_own_transcript(
        world, start, tmp_path):
    shutil.copytree(start, tmp_path / "start")
    done = run_here("eval.py", "start/base", "start/audio", "--data", world / "test", "--n", 6,
                    cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| another of its kind " in done.stdout and "| reads its transcript " in done.stdout
    ollm = OLLM.load(start / "base").eval()
    samples = data.Samples(world / "test", ollm.settings, ("question",))
    for run, form, question in (("base", "floor", "other"), ("audio", "cascade", "transcript")):
        rows = read_lines(tmp_path / f"start/{run}/answers-mean-test.jsonl")
        read = [{**samples[i], "question": row[question]} for i, row in enumerate(rows)]
        assert [row[form] for row in rows] == ollm.answer(read, ("text",))["text"]
        assert all(row["other"] != row["question"] for row in rows)


def test_a_folder_of_speech_gives_the_word_error_rate(world, start, tmp_path):
    shutil.copytree(start, tmp_path / "start")
    done = run_here("eval.py", "start/base", "start/audio", "--data", world / "audio-text",
                    "--n", 6, "--show", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_lines(tmp_path / "start/audio/answers-WER-audio-text.jsonl")
    rate = words.error_rates(rows)["audio"]["word error rate"]
    title, header, _, first, _ = done.stdout.splitlines()[1:]
    assert title == "6 recordings a run; percent"
    assert cells(header) == ["", "aligned, audio"], "a base cannot listen, nothing is asked as text"
    assert cells(first) == ["word error rate", f"{rate:.1f}"] and rate > 50
    assert [row["id"] for row in rows] == [f"{i:06}" for i in range(6)]
    assert not (tmp_path / "start/audio/answers-mean.jsonl").exists()

    deaf = run_here("eval.py", "start/base", "--data", world / "audio-text", cwd=tmp_path)
    assert deaf.returncode == 1 and "cannot listen" in deaf.stderr


def test_a_folder_of_other_questions_gives_agreement(world, start, tmp_path):
    shutil.copytree(start, tmp_path / "start")
    folder = shutil.copytree(world / "test", tmp_path / "questions")
    rows = [{key: row[key] for key in ("image", "audio", "question", "answer")}
            for row in read_lines(folder / "samples.jsonl")]

    # The label of every other row is what the base writes, so that half of the answers are right.
    write_json_lines(folder / "samples.jsonl", rows[:6])
    command = ("eval.py", "start/base", "start/audio", "--data", folder)
    assert run_here(*command, cwd=tmp_path).returncode == 0
    kept = tmp_path / "start/audio/answers-agreement-questions.jsonl"
    for row, answered in list(zip(rows, read_lines(kept)))[::2]:
        row["label"] = answered["text"].upper() + "!"
    write_json_lines(folder / "samples.jsonl", rows[:6])

    done = run_here(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    title, header, _, label, same = done.stdout.splitlines()
    assert title == "6 questions a run; percent of answers with the same words"
    assert cells(header) == ["", "text", "aligned, audio", "aligned, gap"]
    assert cells(label)[:2] == ["as the label says", "50.0"] and cells(same)[0] == "as with text"
    agree = [words.agree(row["audio"], row["text"]) for row in read_lines(kept)]
    assert cells(same)[1:] == ["", f"{100 * statistics.fmean(agree):.1f}", ""]


def test_a_folder_of_both_is_refused_in_one_line(world, start, tmp_path):
    folder = shutil.copytree(world / "test", tmp_path / "both")
    rows = [{**row, "kind": "other"} for row in read_lines(folder / "samples.jsonl")]
    del rows[2]["question"]
    write_json_lines(folder / "samples.jsonl", rows)
    done = run_here("eval.py", start / "audio", "--data", folder, cwd=tmp_path)
    assert done.returncode == 1 and "samples.jsonl:3: has no question" in done.stderr
    assert done.stderr.count("\n") == 1


# ---- answers that are kept ----

KEPT = "answers-mean-questions.jsonl"


@pytest.fixture
def asked(world, start, tmp_path, monkeypatch):
    """A function that asks start/audio twelve questions: the batches that its model was asked."""
    shutil.copytree(start, tmp_path / "start")
    folder = shutil.copytree(world / "test", tmp_path / "questions")
    rows = [row for row in read_lines(folder / "samples.jsonl") if row["kind"] in shapes.KINDS]
    write_json_lines(folder / "samples.jsonl", rows[:12])
    answer, batches = OLLM.answer, []

    def record(ollm, samples, forms=("text", "audio"), **options):
        if set(forms) > {"audio"}:  # a transcript is of the same batch
            batches.append([sample["id"] for sample in samples])
            if len(batches) > most:
                raise KeyboardInterrupt
        return answer(ollm, samples, forms, **options)

    def ask(*options, stop_after=99):
        nonlocal most
        most = stop_after
        batches.clear()
        done = run_here("eval.py", "start/audio", "--data", "questions", "--batch", 3,
                        "--max-new-tokens", 5, *options, cwd=tmp_path)
        assert done.returncode == (0 if stop_after == 99 else 130), done.stderr
        return batches

    most = 99
    monkeypatch.setattr(OLLM, "answer", record)
    return ask


def change_line(folder, change):
    """Changes the first line of a folder's samples.jsonl."""
    lines = read_lines(folder / "samples.jsonl")
    lines[0] |= change
    write_json_lines(folder / "samples.jsonl", lines)


def change_weights(folder):
    path = folder.parent / "start/audio/model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)


def change_settings(folder):
    path = folder.parent / "start/audio/ollm.json"
    about = json.loads(path.read_text())
    about["settings"]["audio_seconds"] = 6
    path.write_text(json.dumps(about))


def change_file(name):
    """Returns a function that puts another line's file in place of the first line's."""
    def change(folder):
        first, *_, last = read_lines(folder / "samples.jsonl")
        shutil.copy(folder / last[name], folder / first[name])
    return change


def change_nothing(folder):
    pass


@pytest.mark.parametrize("change, options, batches", [
    (change_nothing, (), 0), (change_nothing, ("--n", 3), 0),
    (lambda folder: change_line(folder, {"label": "green", "answer": "green"}), (), 0),
    (lambda folder: change_line(folder, {"question": "what is red"}), (), 1),
    (change_file("image"), (), 1), (change_file("audio"), (), 1), (change_weights, (), 4),
    (change_settings, (), 4), (change_nothing, ("--max-tiles", 3), 4),
    (change_nothing, ("--max-new-tokens", 2), 4)])
def test_a_question_is_asked_anew_if_what_its_answer_depends_on_changed(
        asked, tmp_path, change, options, batches):
    assert len(asked()) == 4
    change(tmp_path / "questions")
    assert len(asked(*options)) == batches
    kept = tmp_path / "start/audio" / KEPT
    before, rows = kept.read_bytes(), read_lines(tmp_path / "questions/samples.jsonl")
    assert [row["id"] for row in read_lines(kept)] == [row["id"] for row in rows]
    assert asked(*options) == [] and kept.read_bytes() == before, "the others' answers stay"
    if batches:
        kept.unlink()
        assert len(asked(*options)) == 4 and kept.read_bytes() == before


def test_what_was_interrupted_goes_on_and_ends_with_the_same_bytes(asked, tmp_path):
    whole = list(asked())
    kept = tmp_path / "start/audio" / KEPT
    before = kept.read_bytes()
    kept.unlink()
    asked(stop_after=2)
    begun = kept.with_suffix(".begun.jsonl")
    lines = begun.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6 and not kept.exists(), "it is there once it is whole"
    begun.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    assert asked() == whole[1:], "half a batch is asked again as a whole"
    assert kept.read_bytes() == before and not begun.exists()


def test_the_base_is_asked_once_for_all_runs(world, start, tmp_path):
    """The LLM is frozen, so its written answers are the same for all."""
    shutil.copytree(start, tmp_path / "start")
    shutil.copytree(start / "audio", tmp_path / "start/other")
    command = ("--data", world / "test", "--n", 6, "--max-new-tokens", 3)
    for run, wanted in (("audio", 1), ("other", 0), ("base", 0)):
        done = run_here("eval.py", f"start/{run}", *command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        texts = read_lines(tmp_path / f"start/{run}/answers-mean-test.jsonl")
        assert ("6 written answers are kept" in done.stderr) == (not wanted)
        assert [row["text"] for row in texts] == [
            row["text"] for row in read_lines(tmp_path / "start/base/answers-base-mean-test.jsonl")]


def test_two_commands_ask_one_run_at_once(world, start, tmp_path):
    shutil.copytree(start, tmp_path / "start")
    command = [sys.executable, ROOT / "eval.py", "start/audio", "--n", "20", "--data",
               world / "test", "--batch", "1"]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE) for _ in range(2)]
    tables = [process.communicate(timeout=170)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and tables[0] == tables[1] != b""
    assert len(read_lines(tmp_path / "start/audio/answers-mean-test.jsonl")) == 20
