"""The graders of EXERCISES.md grade: each fails on an empty body and on a plausible mistake."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

MISTAKES = {  # what a student might write instead
    "self_kd_loss": ("(teacher.exp() * (teacher - student))",
                     "(student.exp() * (student - teacher))"),
    "hear": ("x.unflatten(1, (-1, 2)).mean(2)", "x[:, ::2]"),
    "continue_prefix": ("prefix.mask.sum(1, keepdim=True) +", "prefix.mask.size(1) +"),
    "answer_logits": ("hidden[:, :-1][is_answer]", "hidden[:, 1:][is_answer]"),
    "train_only": ("self.audio_encoder.requires_grad_(True)", "pass"),
    "collate": ("slot + turn + answer)", "slot + answer)"),
    "tile": ("distance < best or (distance == best and is_large)", "distance < best"),
    "learning_rate": ("(step - warmup) / max(1, steps - warmup)", "step / steps"),
    "forward_backward": ("model(batch, alpha, temperature, n_tokens)",
                         "model(batch, alpha, temperature)"),
    "seed_interval": (" / len(differences) ** 0.5", ""),
}
ROWS = re.findall(r"(?m)^\| `(\w+)` in `([\w/.]+)` \| .* \| `python (-m pytest .*)` \|$",
                  (ROOT / "EXERCISES.md").read_text())


def emptied(source, name):
    """Returns a file's text with the body of one function replaced, its docstring aside."""
    node = next(node for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.FunctionDef) and node.name == name)
    lines = source.splitlines()
    body = " " * node.body[0].col_offset + "raise NotImplementedError"
    return "\n".join([*lines[: node.body[0].end_lineno], body, *lines[node.end_lineno:]]) + "\n"


def test_every_function_has_a_mistake():
    assert {name for name, *_ in ROWS} == MISTAKES.keys() and len(ROWS) == 10


CASES = [pytest.param(row, change, id=f"{row[0]}, {change}",
                      marks=([] if (row[0], change) == ("self_kd_loss", "mistake")
                             else pytest.mark.slow))
         for row in ROWS for change in ("empty", "mistake", "as it is")]


@pytest.mark.parametrize("row, change", CASES)
def test_a_grader_fails_unless_the_function_is_right(row, change, tmp_path):
    name, file, command = row
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree,
                    ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", "assets"))
    source = (tree / file).read_text()
    if change == "empty":
        source = emptied(source, name)
    if change == "mistake":
        assert source.count(MISTAKES[name][0]) >= 1
        source = source.replace(*MISTAKES[name])
    (tree / file).write_text(source)
    words = [sys.executable, *shlex.split(command), "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True,
                          timeout=170)
    assert done.returncode == (0 if change == "as it is" else 1), done.stdout[-2000:]
