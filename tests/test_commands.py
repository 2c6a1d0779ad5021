"""Every command that the README or a docstring shows is one that its script takes."""

import argparse
import ast
import re
import shlex

import pytest
from conftest import ROOT, run_here
from torch.distributed.run import get_args_parser

# The launcher and its options, the script, and words or "quoted words" as far as a comment, a pipe or the end.
COMMAND = r"""(?:torchrun|python)(?: [^\s;`)|#]+)*? \w+\.py(?: (?:"[^"]*"|[^\s;`)|#"]+))*"""


def written_commands():
    """(where, command) of each `python X.py ...` and `torchrun X.py ...` in the README and the docstrings."""
    texts = {path.name: path.read_text() for path in ROOT.glob("*.md")}
    texts |= {path.name: ast.get_docstring(ast.parse(path.read_text())) for path in ROOT.glob("*.py")}
    for where, text in texts.items():
        text = re.sub(r"\\\n\s*", "", text)  # a command that goes on on the next line
        for match in re.finditer(COMMAND, text):
            yield where, match[0]


COMMANDS = sorted(set(written_commands()))


def test_commands_are_found():
    assert len(COMMANDS) > 60 and len({where for where, _ in COMMANDS}) >= 10


@pytest.mark.parametrize("where, command", COMMANDS, ids=[f"{where}: {command}" for where, command in COMMANDS])
def test_a_command_is_one_that_its_script_takes(where, command, monkeypatch, tmp_path):
    launcher, *words = shlex.split(command.removesuffix(" ..."))
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    if launcher == "torchrun":
        get_args_parser().parse_args(words[: script + 1])
    parse = argparse.ArgumentParser.parse_args

    def parse_and_leave(parser, *arguments):
        parse(parser, *arguments)
        raise SystemExit("taken")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_leave)
    arguments = [re.sub(r"\$\w+|\$\{\w+\}", "1", word) for word in words[script + 1:]]
    done = run_here(words[script], *arguments, cwd=tmp_path)
    assert done.stderr == "taken\n", f"{where}: {command}"


README = (ROOT / "README.md").read_text()


def test_pointers_lead_to_what_they_name():
    pointers = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(pointers) >= 5
    for name, file, line in pointers:
        assert f"def {name}(" in (ROOT / file).read_text().splitlines()[int(line) - 1], f"{name}: {file}, line {line}"


def test_pictures_are_there_and_nothing_is_left_to_fill_in():
    pictures = re.findall(r"\]\((assets/[^)]+)\)", README)
    assert len(pictures) >= 4 and all((ROOT / picture).is_file() for picture in pictures)
    assert not re.findall(r"@[A-Z]+@|TODO", README + (ROOT / "EXERCISES.md").read_text())


def test_every_file_has_its_place_in_the_reading_order_and_about_as_many_lines():
    counts = {file: int(lines) for file, lines in re.findall(r"(?m)^\| `(\w+\.py)` \| (\d+) \|", README)}
    assert counts.keys() == {path.name for path in ROOT.glob("*.py")}
    for file, lines in counts.items():
        assert lines == pytest.approx(len((ROOT / file).read_text().splitlines()), rel=0.05), file
