"""Every command that a page or a docstring shows is one that its script takes."""

import argparse
import ast
import json
import re
import shlex

import pytest
from conftest import ROOT, run_here
from torch.distributed.run import get_args_parser

# The launcher and its options, the script or module, and words or "quoted words" as far as a
# comment, a pipe or the end.
SCRIPT = r"(?:\w+\.py|-m (?:course|(?:analysis|benchmarks|world)\.\w+))"
WORD = r"""(?:"[^"]*"|[^\s;`)|#"]+)"""
COMMAND = rf"(?:torchrun|python)(?: (?!-m )[^\s;`)|#]+)*? {SCRIPT}(?: {WORD})*"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/*.ipynb")]
FILES = [path for path in ROOT.rglob("*.py")
         if "tests" not in path.parts and not path.relative_to(ROOT).parts[0].startswith(".")]


def read_page(path):
    """Returns a page's Markdown; of a notebook, that of its cells."""
    if path.suffix == ".md":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells
                       if cell["cell_type"] == "markdown")


def written_commands():
    """Yields (where, command) of each command in the pages and the files' docstrings."""
    texts = {str(path.relative_to(ROOT)): read_page(path) for path in PAGES}
    for path in FILES:
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        texts[str(path.relative_to(ROOT))] = docstring.replace("\\\\\n", "\\\n")
    for where, text in texts.items():
        text = re.sub(r"\\\n\s*", "", text)  # a command that goes on on the next line
        for match in re.finditer(COMMAND, text):
            yield where, match[0]


COMMANDS = sorted(set(written_commands()))


def test_commands_are_found():
    assert len(COMMANDS) > 60 and len({where for where, _ in COMMANDS}) >= 12
    assert sum(" -m " in command for _, command in COMMANDS) >= 6


@pytest.mark.parametrize("where, command", COMMANDS,
                         ids=[f"{where}: {command}" for where, command in COMMANDS])
def test_a_command_is_one_that_its_script_takes(where, command, monkeypatch, tmp_path):
    launcher, *words = shlex.split(command.removesuffix(" ..."))
    script = next(i for i, word in enumerate(words)
                  if word.endswith(".py") or words[i - 1] == "-m" and i)
    if launcher == "torchrun":
        get_args_parser().parse_args(words[: script + 1])
    parse = argparse.ArgumentParser.parse_args

    def parse_and_leave(parser, *arguments):
        parse(parser, *arguments)
        raise SystemExit("taken")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_leave)
    arguments = [re.sub(r"\$\w+|\$\{\w+\}", "1", word) for word in words[script + 1:]]
    done = run_here(words[script], *arguments, cwd=tmp_path)
    is_help = "--help" in words and done.stdout.startswith("usage")
    assert done.stderr == "taken\n" or is_help, f"{where}: {command}"


README = (ROOT / "README.md").read_text()


def test_pointers_lead_to_what_they_name():
    pointers = re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", README)
    assert len(pointers) >= 5
    for name, file in pointers:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{name}: {file}"


def anchors(path):
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)", read_page(path))
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_links_and_pictures_are_there_and_nothing_is_left_to_fill_in():
    for path in PAGES:
        text = read_page(path)
        for link, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", text):
            page = path.parent / link if link else path
            assert page.exists(), f"{path.name}: {link}"
            assert not anchor or anchor in anchors(page), f"{path.name}: {link}#{anchor}"
        assert not re.findall(r"@[A-Z]+@|TODO|<!--", text), path.name


def test_the_readme_names_every_file_and_folder_with_about_as_many_lines():
    counts = {name: int(lines) for name, lines in
              re.findall(r"(?m)^\| `([\w./]+)` \| (\d+) \|", README)}
    folders = {path.relative_to(ROOT).parts[0] + "/" for path in FILES if path.parent != ROOT}
    assert counts.keys() == {path.name for path in ROOT.glob("*.py")} | folders
    for name, lines in counts.items():
        files = [ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py")
        total = sum(len(path.read_text().splitlines()) for path in files)
        assert lines == pytest.approx(total, rel=0.05), name


def imports(path):
    """Returns the project's modules that a file imports, as folder or file names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_go_one_way():
    """The order of the rooms; a file may import what stands before it, and its own folder."""
    order = ["plumbing", "loss", "real", "world", "data", "model", "train", "benchmarks", "eval",
             "mmalign", "analysis", "course"]
    modules = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
    arrows = {name: imports(path) & set(modules.values()) for path, name in modules.items()}
    for name, others in arrows.items():
        for other in others:
            rooms = [order.index(module.split(".")[0]) for module in (other, name)]
            assert rooms[0] <= rooms[1], f"{name} imports {other}"

    def reachable(name, known):
        for other in arrows[name] - known:
            known.add(other)
            reachable(other, known)
        return known

    assert not [name for name in arrows if name in reachable(name, set())], "no circle"
