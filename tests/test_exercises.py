"""The graders of the course work grade: wrong solutions fail, right ones pass, each part alone."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT, run_here
from variants import RIGHT, WRONG

from course.__main__ import count_passed, grader_tests, handed_in
from course.handout import ALL, EXTRA, FILES, LIST, PARTS, find
from course.sandbox import sandbox

FUNCTIONS = PARTS | EXTRA


@pytest.fixture(scope="session")
def handout(tmp_path_factory):
    """A student's tree, as it is handed out."""
    folder = tmp_path_factory.mktemp("handout") / "tree"
    done = run_here("course", "handout", folder, "--extra", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def run():
    with sandbox() as run:
        yield run


def lines_of(file, name):
    """Returns (lines of a file, first, end) of a function's body."""
    lines = file.read_text().splitlines()
    first, end, _ = find("\n".join(lines), name)
    return lines, first, end


def written(name, change):
    """Returns the lines of a function's body, changed: see variants.py. None changes nothing."""
    lines, first, end = lines_of(ROOT / ALL[name][0], name)
    body = "\n".join(lines[first:end])
    if change is not None:
        assert change[0] in body, f"{name} has no {change[0]!r} any more"
        body = body.replace(*change)
    return body.splitlines()


def grade(run, handout, folder, name, body, **options):
    """Grades one function with this body in a student's tree where all others are empty.

    Returns how many tests did not pass, and what is wrong.
    """
    shutil.copytree(handout, folder)
    lines, first, end = lines_of(folder / ALL[name][0], name)
    text = "\n".join([*lines[:first], *body, *lines[end:]])
    (folder / ALL[name][0]).write_text(text + "\n")
    tests = grader_tests(name)
    passed, wrong = count_passed(tests, *run(folder, name, **options))
    return len(tests) - passed, wrong


def cases(variants):
    """Returns a case for each variant; they are slow, but for the first of the loss."""
    return [pytest.param(name, change, id=f"{name}-{number}",
                         marks=[] if (name, number) == ("self_kd_loss", 0) else pytest.mark.slow)
            for name, changes in variants.items() for number, change in enumerate(changes)]


@pytest.mark.parametrize("name, change", cases(WRONG))
def test_a_wrong_solution_is_rejected(name, change, run, handout, tmp_path):
    failed, wrong = grade(run, handout, tmp_path / "tree", name, written(name, change))
    assert failed and wrong, f"{change} is accepted"
    assert "not written yet" not in wrong, "the others may be empty"


@pytest.mark.parametrize("name, change", cases({n: [None, *RIGHT[n]] for n in FUNCTIONS}))
def test_a_right_solution_is_accepted_where_all_others_are_empty(name, change, run, handout,
                                                                 tmp_path):
    assert grade(run, handout, tmp_path / "tree", name, written(name, change)) == (0, "")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("body, says", [
    ("import os; os._exit(0)", "the process ended with 0"),
    slow("import pytest; pytest.skip('later')", "Skipped: later"),
    slow("import pytest; pytest.xfail('later')", "later"),
    slow("breakpoint()", "BdbQuit"),
    slow("while True: pass", "took over 3 s"),
    slow("return (", "SyntaxError"),
    slow("import os; open(os.environ['PWD'])", "KeyError"),
    slow("import os; print(open('/proc/self/fd/1').read()); os._exit(0)", "ended with 0"),
])
def test_code_that_would_rather_not_be_graded(body, says, run, handout, tmp_path):
    failed, wrong = grade(run, handout, tmp_path / "tree", "self_kd_loss", [f"    {body}"],
                          seconds=3)
    assert failed == len(grader_tests("self_kd_loss")) and says in wrong


def test_a_line_without_its_signature_and_a_missing_test_do_not_count():
    tests = ["test_a", "test_b"]
    told = [{"collected": ["test_a[0]", "test_a[1]"]}, {"test": "test_a[0]", "outcome": "passed"}]
    assert count_passed(tests, told, "end") == (0, "test_a[1]: end")
    told += [{"test": "test_a[1]", "outcome": "passed", "wrong": ""}]
    assert count_passed(tests, told, "end") == (1, "test_b: end")


def test_each_part_has_five_wrong_solutions_and_two_right_ones():
    assert {name: len(changes) for name, changes in WRONG.items()} == dict.fromkeys(FUNCTIONS, 5)
    assert {name: len(changes) for name, changes in RIGHT.items()} == dict.fromkeys(FUNCTIONS, 2)
    for name, changes in (*WRONG.items(), *RIGHT.items()):
        for change in changes:  # each stands in the function as it is now
            written(name, change)


def test_the_page_has_a_row_for_each_part():
    rows = re.findall(r"(?m)^\| `(\w+)` \| `?([\w/]+\.py|)`?\w* \| (\d+) \|",
                      (ROOT / "EXERCISES.md").read_text())
    assert {name: (file, int(points)) for name, file, points in rows} == ALL


def write(folder, *files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("pass\n")


@pytest.mark.parametrize("files, missing", [
    (FILES, {}),
    ([file.rpartition("/")[2] for file in FILES], {}),  # uploaded one by one
    ([f"hw/{file}" for file in FILES] + ["hw/.venv/lib/data.py", "__MACOSX/hw/._loss.py"], {}),
    ([f"{n}/loss.py" for n in "ab"] + ["train.py", "model.py", "data.py", "tables.py"],
     {"loss.py": "2 files are named loss.py"}),
    (["loss.py"], {file: f"there is no {file}" for file in FILES if file != "loss.py"}),
])
def test_files_are_found_where_students_put_them(files, missing, tmp_path):
    write(tmp_path / "flat", *files)
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive:
        for file in files:
            archive.write(tmp_path / "flat" / file, f"zipped/{file}")
    (tmp_path / "zip").mkdir()
    (tmp_path / "zipped.zip").rename(tmp_path / "zip/zipped.zip")
    for folder in ("flat", "zip"):
        found = handed_in(tmp_path / folder, tmp_path / "unpacked")
        assert {file: path for file, path in found.items() if isinstance(path, str)} == missing


def test_results_are_written_in_any_case(handout, tmp_path, monkeypatch):
    (tmp_path / "cut.zip").write_bytes(b"PK")
    write(tmp_path / "one", "loss.py")
    (tmp_path / "one/loss.py").write_bytes(b"# caf\xe9\n")  # Latin-1

    @contextlib.contextmanager
    def nothing(user):
        yield lambda tree, part: ([], "took over 60 s")

    monkeypatch.setattr("course.sandbox.sandbox", nothing)
    for folder, says in ((".", "cut.zip is not a zip file"), ("nowhere", "there is no"),
                         ("one", "took over")):
        out = tmp_path / "out/results.json"
        done = run_here("course", "grade", tmp_path / folder, "--out", out, cwd=ROOT)
        results = json.loads(out.read_text())
        assert done.returncode == 1 and results["score"] == 0, done.stderr
        assert [test["name"] for test in results["tests"]] == [*PARTS, "together"]
        assert says in results["tests"][0]["output"] and results["tests"][0]["max_score"] == 10


@pytest.mark.slow
def test_a_handout_gives_no_points_and_the_solutions_all(handout, tmp_path):
    for folder, code, score in ((handout, 1, 0), (ROOT, 0, 120)):
        words = [sys.executable, "-m", "course", "grade", folder, "--extra", "--out",
                 tmp_path / "results.json"]
        done = subprocess.run(words, cwd=handout, capture_output=True, text=True, timeout=600)
        results = json.loads((tmp_path / "results.json").read_text())
        assert (done.returncode, results["score"]) == (code, score), done.stdout + done.stderr


def test_a_handout_has_neither_solutions_nor_tests_but_all_else(handout):
    names = {path.name for path in handout.iterdir()}
    assert {"EXERCISES.md", "train.py", "eval.py", "world", "course", "analysis"} <= names
    assert not names & {".git", ".ci", "runs"} and not (handout / "docs/teaching.md").exists()
    assert [path.name for path in (handout / "tests").iterdir()] == ["course"]
    texts = [re.sub(r"\s+", " ", path.read_text()) for path in handout.rglob("*")
             if path.suffix in (".py", ".md", ".ipynb")]
    for name, (file, _) in FUNCTIONS.items():
        lines, first, end = lines_of(handout / file, name)
        assert lines[first:end] == [lines[first]] and "raise NotImplementedError" in lines[first]
        for line in written(name, None):
            code = re.sub(r"\s+", " ", line.partition("  # ")[0].strip())
            if len(code) > 40 and code[0] != "#":
                assert not any(code in text for text in texts), f"{name}: {code} stands elsewhere"


def test_a_handout_is_what_git_tracks(handout, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(handout, tree)
    (tree / LIST).unlink()
    for words in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *words], cwd=tree, check=True)
    write(tree, ".env", "solutions/loss.py", "loss.py.orig", "grades.csv")
    write(tree, "tests/test_all.py", "docs/teaching.md", "analysis/probe.py", "extra.py")
    subprocess.run(["git", "add", "tests", "docs", "analysis"], cwd=tree, check=True)
    done = subprocess.run([sys.executable, "-m", "course", "handout", tmp_path / "out"], cwd=tree)
    assert done.returncode == 0
    there, here = ({str(path.relative_to(folder)) for path in folder.rglob("*")
                    if "__pycache__" not in path.parts} for folder in (handout, tmp_path / "out"))
    assert there == here


def test_what_cannot_be_written_is_one_line(handout, tmp_path):
    again = run_here("course", "handout", handout, cwd=tmp_path)
    assert again.returncode == 1 and "is not empty" in again.stderr
    unknown = run_here("course", "grade", "--part", "forward", cwd=tmp_path)
    assert unknown.returncode == 2 and "self_kd_loss" in unknown.stderr
    assert again.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
