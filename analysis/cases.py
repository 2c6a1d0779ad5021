"""Shows some questions with their pictures and every run's answer (in the manner of Fig. 9).

    python eval.py                           # asks the runs, and keeps their answers beside them
    python -m analysis.cases                 # eight questions to every run of seed 0
    python -m analysis.cases --n 20 runs/shapes/vision-audio-a*-s0 --out figures

The questions (--n of them, 8 by default) are drawn at random. Of several seeds, the first named is
shown. The answers are those that eval.py kept. cases.md and cases.png go to --out.
"""

import os
import random
import textwrap
from pathlib import Path

from eval import score_answer
from plumbing import runs, tables
from plumbing.answers import read_answers
from plumbing.files import BadInput, readable_errors, write_text
from plumbing.media import load_image


def pick_cases(groups, n, data=None):
    """Returns n cases, (sample, {"name, audio": answer}) each, of {name: {seed: run}}.

    data: the folder asked, if it is not the test part
    """
    answers, columns = {}, {}
    for name, by_seed in groups.items():
        # A question is known by its file and line, as not all runs may have been asked the same.
        kept = read_answers(next(iter(by_seed.values())), data)
        rows = answers[name] = {row["where"]: row for row in kept}
        columns.setdefault("text", {where: row["text"] for where, row in rows.items()})
        if next(iter(rows.values()))["audio"] is not None:
            columns[f"{name}, audio"] = {where: row["audio"] for where, row in rows.items()}

    first = next(iter(answers.values()))
    common = set(first).intersection(*columns.values())
    places = [place for place, row in first.items() if place in common and "image" in row]
    drawn = random.Random(0).sample(places, min(n, len(places)))
    return [(first[place], {label: column[place] for label, column in columns.items()})
            for place in drawn]


def draw_cases(cases, path):
    """Draws the cases below each other: the picture, and beside it question and answers."""
    figure, grid = tables.blank_figure(9, 1.9 * len(cases), len(cases), 2, width_ratios=(1, 5))
    for (left, right), (sample, answers) in zip(grid, cases):
        left.imshow(load_image(picture_of(sample)))
        lines = [f"{sample['question']}?  ({sample['label']})", ""]
        for label, answer in answers.items():
            verdict = "right" if score_answer(sample, answer) == 1 else "WRONG"
            lines.append(f"{label:{max(map(len, answers))}}  {verdict}  "
                         f"{textwrap.shorten(answer, 90)}")
        right.text(0, 0.5, "\n".join(lines), family="monospace", fontsize=8, va="center")
        for axes in (left, right):
            axes.set_axis_off()
    tables.save_figure(figure, path, dpi=110)


def picture_of(sample):
    """Returns the path of a sample's picture: it lies beside the file that the sample is from."""
    return Path(sample["where"]).parent / sample["image"]


def main():
    parser = runs.arguments(__doc__)
    parser.set_defaults(n=8)
    args = parser.parse_args()
    groups = runs.group_runs(runs.asked_for(args))
    cases, out = pick_cases(groups, args.n, args.data), Path(args.out)
    if not cases:
        raise BadInput("the runs have no question with a picture in common")

    header = ["picture", "question", "true", *cases[0][1]]
    lines = [header, ["---"] * len(header)]
    for sample, answers in cases:
        picture = f"![]({os.path.relpath(picture_of(sample), out)})"
        lines.append([picture, sample["question"], sample["label"], *answers.values()])
    write_text(out / "cases.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))
    draw_cases(cases, out / "cases.png")


if __name__ == "__main__":
    with readable_errors():
        main()
