"""The graders of the course work grade: wrong solutions fail, right ones pass, each part alone."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run_here
from variants import RIGHT, WRONG

from course.handout import ALL, FILES, find


@pytest.fixture(scope="session")
def handout(tmp_path_factory):
    """A student's tree, as it is handed out."""
    folder = tmp_path_factory.mktemp("handout") / "tree"
    done = run_here("course", "handout", folder, "--extra", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


def written(name, change):
    """Returns the lines of a function's body, changed: see variants.py. None changes nothing."""
    lines = (ROOT / ALL[name][0]).read_text().splitlines()
    first, end, _ = find("\n".join(lines), name)
    body = "\n".join(lines[first:end])
    if isinstance(change, str):
        body = change.strip("\n")
    elif change is not None:
        assert change[0] in body, f"{name} has no {change[0]!r} any more"
        body = body.replace(*change)
    return body.splitlines()


def grade(handout, folder, name, body):
    """Grades one function with this body in a student's tree where all others are empty.

    Returns the finished process and results.json.
    """
    shutil.copytree(handout, folder)
    file = folder / ALL[name][0]
    lines = file.read_text().splitlines()
    first, end, _ = find("\n".join(lines), name)
    file.write_text("\n".join([*lines[:first], *body, *lines[end:]]) + "\n")
    out = folder / "results.json"
    words = [sys.executable, "-m", "course", "grade", folder, "--part", name, "--out", out]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=170)
    return done, json.loads(out.read_text())


def cases(variants):
    """Returns a case for each variant; they are slow, but for the first of the loss."""
    return [pytest.param(name, change, id=f"{name}-{number}",
                         marks=[] if (name, number) == ("self_kd_loss", 0) else pytest.mark.slow)
            for name, changes in variants.items() for number, change in enumerate(changes)]


@pytest.mark.parametrize("name, change", cases(WRONG))
def test_a_wrong_solution_is_rejected(name, change, handout, tmp_path):
    done, results = grade(handout, tmp_path / "tree", name, written(name, change))
    output = results["tests"][0]["output"]
    assert done.returncode == 1 and results["score"] == 0, f"{change} is accepted"
    assert output in done.stdout and "not written yet" not in output, "the others may be empty"


@pytest.mark.parametrize("name, change", cases({n: [None, *RIGHT[n]] for n in ALL}))
def test_a_right_solution_is_accepted_where_all_others_are_empty(name, change, handout, tmp_path):
    done, results = grade(handout, tmp_path / "tree", name, written(name, change))
    assert (done.returncode, results["score"]) == (0, ALL[name][1]), results


def test_each_part_has_five_wrong_solutions_and_two_right_ones():
    assert {name: len(changes) for name, changes in WRONG.items()} == dict.fromkeys(ALL, 5)
    assert {name: len(changes) for name, changes in RIGHT.items()} == dict.fromkeys(ALL, 2)
    for name, changes in (*WRONG.items(), *RIGHT.items()):
        for change in changes:  # each stands in the function as it is now
            written(name, change)


def test_the_page_has_a_row_for_each_part():
    rows = re.findall(r"(?m)^\| `(\w+)` \| `([\w/.]+)` \| (\d+) \|",
                      (ROOT / "EXERCISES.md").read_text())
    assert [(name, (file, int(points))) for name, file, points in rows] == list(ALL.items())


@pytest.mark.slow
def test_a_tree_as_it_is_handed_out_has_no_points(handout):
    for name in ("self_kd_loss", "seed_interval"):
        done = subprocess.run([sys.executable, "-m", "course", "grade", "--part", name],
                              cwd=handout, capture_output=True, text=True, timeout=170)
        assert done.returncode == 1 and f"{name} is not written yet" in done.stdout, done.stderr
    results = json.loads((handout / "results.json").read_text())
    assert results == {"score": 0, "tests": [
        {"name": "seed_interval", "score": 0, "max_score": 5, "status": "failed",
         "output": "NotImplementedError: seed_interval is not written yet"}]}
    (handout / "results.json").unlink()


def test_a_handout_has_neither_solutions_nor_tests_but_all_else(handout):
    names = {path.name for path in handout.iterdir()}
    assert {"EXERCISES.md", "train.py", "eval.py", "world", "course", "analysis"} <= names
    assert not names & {".git", ".ci", "runs"} and not (handout / "docs/teaching.md").exists()
    assert [path.name for path in (handout / "tests").iterdir()] == ["course"]
    for name, (file, _) in ALL.items():
        lines = (handout / file).read_text().splitlines()
        first, end, _ = find("\n".join(lines), name)
        assert lines[first:end] == [lines[first]] and "raise NotImplementedError" in lines[first]


def test_what_cannot_be_graded_or_written_is_one_line(handout, tmp_path):
    again = run_here("course", "handout", handout, cwd=tmp_path)
    assert again.returncode == 1 and "is not empty" in again.stderr
    nothing = run_here("course", "grade", tmp_path, cwd=tmp_path)
    assert nothing.returncode == 1 and FILES[0] in nothing.stderr
    unknown = run_here("course", "grade", "--part", "forward", cwd=tmp_path)
    assert unknown.returncode == 2 and "self_kd_loss" in unknown.stderr
    for done in (again, nothing):
        assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_code_that_cannot_be_read_is_named(handout, tmp_path):
    done, results = grade(handout, tmp_path / "tree", "self_kd_loss", ["    return ("])
    assert done.returncode == 1 and "SyntaxError" in results["tests"][0]["output"]
