"""The parts of the course work, and the tree that a student gets: their bodies are empty."""

import ast
import shutil
import subprocess
from pathlib import Path

from plumbing.files import BadInput, atomic_folder, write_text

ROOT = Path(__file__).parent.parent
PARTS = {  # in the order of EXERCISES.md: file and points
    "self_kd_loss": ("loss.py", 10),
    "learning_rate": ("train.py", 5),
    "train_only": ("model.py", 5),
    "answer_logits": ("model.py", 15),
    "embed": ("model.py", 15),
    "encode_audio": ("model.py", 15),
    "decode_query": ("model.py", 15),
    "forward_backward": ("train.py", 15),
}
EXTRA = {
    "collate": ("data.py", 10),
    "paired_bootstrap": ("plumbing/tables.py", 5),
    "seed_interval": ("plumbing/tables.py", 5),
}
LAST = {"together": ("", 5)}  # all files train and answer, once each part has points
ALL = PARTS | EXTRA | LAST
FILES = sorted({file for file, _ in ALL.values() if file})
LIST = "course/files.txt"  # in a student's tree: what it was handed out with
KEPT_BACK = (".ci/", "analysis/bench.py", "analysis/probe.py", "docs/teaching.md", "tests/")


def handed_out():
    """Returns the paths of a student's tree: what git tracks, less solutions and most tests."""
    if (ROOT / LIST).exists():
        return (ROOT / LIST).read_text().splitlines()
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise BadInput(f"{ROOT}: `git ls-files` fails; a handout is made in a clone of the project")
    paths = [path for path in done.stdout.split("\0") if (ROOT / path).is_file()]
    return [path for path in paths
            if path.startswith("tests/course/") or not path.startswith(KEPT_BACK)]


def copy_tree(folder):
    """Copies what is handed out into a folder, with its list."""
    paths = handed_out()
    for path in paths:
        target = Path(folder) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, target)
    write_text(Path(folder) / LIST, "".join(f"{path}\n" for path in paths))


def find(source, name):
    """Returns (first, end, indent): a function's body without docstring, as a slice of lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node.body[0].end_lineno, node.end_lineno, node.body[0].col_offset
    raise BadInput(f"has no function {name}")


def empty(file, names):
    """Empties functions of a Python file."""
    lines = file.read_text().splitlines()
    for name in names:
        first, end, indent = find("\n".join(lines), name)
        error = f'raise NotImplementedError("{name} is not written yet")'
        lines[first:end] = [" " * indent + error]
    write_text(file, "\n".join(lines) + "\n")


def write_handout(folder, parts):
    """Writes a student's tree into a new folder, in which these parts are empty."""
    if Path(folder).exists() and any(Path(folder).iterdir()):
        raise BadInput(f"{folder}: is not empty; a student's work is never overwritten")
    with atomic_folder(folder, last="EXERCISES.md") as tree:
        copy_tree(tree)
        for file in FILES:
            empty(tree / file, [name for name in parts if ALL[name][0] == file])
