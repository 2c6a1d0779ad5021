"""docs/lesson.ipynb: the committed page is whole, and it runs on the shortest chain of runs.

To run it, `pip install nbclient ipykernel`; nothing else needs them.
"""

import ast
import json
import re
import shutil

import pytest
from conftest import ROOT, run_here

PAGE = ROOT / "docs/lesson.ipynb"
CELLS = json.loads(PAGE.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def outputs(cells, kind):
    """Returns the cells' outputs of a kind, joined: "text/plain", "image/png", "stdout", ..."""
    texts = []
    for output in sum((cell["outputs"] for cell in cells), []):
        if output.get("name") == kind:
            texts.append("".join(output["text"]))
        if kind in output.get("data", {}):
            texts.append("".join(output["data"][kind]))
    return texts


# ---- as committed --------------------------------------------------------------------------------


def test_the_page_is_short_and_has_its_outputs():
    assert len(CELLS) <= 20 and PAGE.stat().st_size < 400_000
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    kinds = {output["output_type"] for cell in CODE for output in cell["outputs"]}
    assert kinds == {"stream", "display_data", "execute_result"}, "no error"
    assert len(outputs(CODE, "image/png")) == 3 and not outputs(CODE, "stderr")
    assert "<audio" in "".join(outputs(CODE, "text/html"))


def test_the_page_tells_nothing_of_a_machine():
    texts = ["".join(cell["source"]) for cell in CELLS]
    texts += outputs(CODE, "stdout") + outputs(CODE, "text/plain")
    for text in texts:
        assert not re.search(r"(?<![\w./])/[a-z]+/|\w:\\|file:|0x[0-9a-f]{6}", text), text


def test_the_cells_are_python():
    for cell in CODE:
        ast.parse("".join(cell["source"]))


def test_the_loss_by_hand_is_the_one_of_loss_py():
    text = "".join(outputs(CODE, "stdout"))
    by_hand = re.search(r"loss = 0\.75 \* (\S+) \+ 0\.25 \* (\S+) = (\S+)", text)
    by_loss = re.search(r"\| loss\.py \| (\S+) \| (\S+) \| (\S+) \|", text)
    kl, ce, loss = map(float, by_hand.groups())
    assert (loss, kl, ce) == tuple(map(float, by_loss.groups()))
    assert loss == pytest.approx(0.75 * kl + 0.25 * ce, abs=1e-4)


# ---- run -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(world, tmp_path_factory):
    """A clone with the shortest chain of seed 0: two steps a stage, a few answers."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    clone = tmp_path_factory.mktemp("clone")
    for path in [*ROOT.glob("*.py"), *(file.parent for file in ROOT.glob("*/__init__.py"))]:
        (clone / path.name).symlink_to(path)
    shutil.copytree(world, clone / "runs/shapes/data-s0")
    (clone / "docs").mkdir()
    for stage, alpha in (("vision-text", 0), ("audio-text", 0), ("vision-audio", 0),
                         ("vision-audio", 0.75)):
        done = run_here("train.py", "--stage", stage, "--alpha", alpha, "--max-steps", 2,
                        "--workers", 0, "--device", "cpu", cwd=clone)
        assert done.returncode == 0, done.stderr
    asked = run_here("eval.py", "--n", 12, "--device", "cpu", cwd=clone)
    assert asked.returncode == 0, asked.stderr
    return clone


@pytest.mark.slow
@pytest.mark.parametrize("folder, n", [("docs", len(CELLS)), (".", 6)])
def test_the_page_runs(clone, folder, n):
    """Runs all cells from docs/, and those that read files from the root."""
    import nbclient
    import nbformat

    book = nbformat.read(PAGE, as_version=4)
    book.cells = book.cells[:n]
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3",
                            resources={"metadata": {"path": str(clone / folder)}}).execute()
    ran = [cell for cell in book.cells if cell["cell_type"] == "code"]
    assert not outputs(ran, "stderr")
    for before, after in zip(CODE, ran):
        kinds = [[output["output_type"] for output in cell["outputs"]] for cell in (before, after)]
        assert kinds[0] == kinds[1]
