"""The parts of the course work, and the tree that a student gets: their bodies are empty."""

import ast
import shutil
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
    "decode_query": ("model.py", 20),
    "forward_backward": ("train.py", 15),
}
EXTRA = {
    "collate": ("data.py", 10),
    "paired_bootstrap": ("plumbing/tables.py", 5),
    "seed_interval": ("plumbing/tables.py", 5),
}
ALL = PARTS | EXTRA
FILES = sorted({file for file, _ in ALL.values()})
NOT_COPIED = (".git", ".ci", ".venv", ".*_cache", ".*.tmp", "__pycache__", "runs", "results.json",
              "tests", "teaching.md")


def copy_tree(folder):
    """Copies this tree into a folder. Of the tests, the graders alone."""
    ignore = shutil.ignore_patterns(*NOT_COPIED)
    for part in ("", "tests/course"):
        shutil.copytree(ROOT / part, Path(folder) / part, ignore=ignore, dirs_exist_ok=True)


def find(source, name):
    """Returns (first, end, indent): a function's body without docstring, as a slice of lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node.body[0].end_lineno, node.end_lineno, node.body[0].col_offset
    raise BadInput(f"has no function {name}")


def write_handout(folder, parts):
    """Writes a student's tree into a new folder, in which these parts are empty."""
    if Path(folder).exists() and any(Path(folder).iterdir()):
        raise BadInput(f"{folder}: is not empty; a student's work is never overwritten")
    with atomic_folder(folder, last="EXERCISES.md") as tree:
        copy_tree(tree)
        for name in parts:
            file = tree / ALL[name][0]
            lines = file.read_text().splitlines()
            first, end, indent = find("\n".join(lines), name)
            error = f'raise NotImplementedError("{name} is not written yet")'
            lines[first:end] = [" " * indent + error]
            write_text(file, "\n".join(lines) + "\n")
