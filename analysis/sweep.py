"""Draws spoken accuracy over alpha (the paper's Fig. 8).

    for alpha in 0 0.25 0.5 0.75 1; do torchrun --standalone train.py --alpha $alpha; done
    python eval.py                                  # asks the runs, keeps their answers beside them
    python -m analysis.sweep                        # sweep.png, of all seeds
    python -m analysis.sweep runs/shapes=1,600 runs/twice=3,200   # a curve each, FOLDER=LABEL

Points are means over seeds, error bars standard deviations, small dots the seeds.
"""

import argparse
import re
import statistics
from pathlib import Path

from eval import mean_scores
from plumbing import runs, tables
from plumbing.answers import read_answers
from plumbing.files import BadInput, readable_errors
from world import shapes


def scores_of(folder):
    """Returns {name: {form: [percent right of each seed]}} of a folder's runs, means over kinds."""
    paths = sorted(path.parent for path in Path(folder).glob("*/ollm.json"))
    if not paths:
        raise BadInput(f"{folder}: has no finished run; `torchrun --standalone train.py` makes one")
    scores = {}
    for name, by_seed in runs.group_runs(paths).items():
        if "(" in name:  # a curve is of one training for each alpha
            raise BadInput(f"{folder}: another run is called so, but for its seed: {name}")
        scores[name] = {"text": [], "audio": []}
        for run in by_seed.values():
            rows = read_answers(run)
            for form, seeds in scores[name].items():
                if rows[0][form] is not None:
                    seeds.append(statistics.fmean(mean_scores(rows, form, shapes.KINDS).values()))
    return scores


def draw_sweep(curves, path):
    """Draws spoken answers over alpha, a curve for each {label: what `scores_of` returns}."""
    figure, ((axes,),) = tables.blank_figure(6, 3.6)
    for i, (label, scores) in enumerate(curves.items()):
        by_alpha = {}
        for name, forms in scores.items():
            match = re.fullmatch(r"SFT|KD ([\d.]+)", name)
            if match:
                by_alpha[float(match[1] or 0)] = forms["audio"]
        alphas = sorted(by_alpha)

        # The curves' points stand a little beside each other, not on top.
        places = [alpha + 0.008 * i for alpha in alphas]
        means = [statistics.fmean(by_alpha[alpha]) for alpha in alphas]
        deviations = [tables.deviation(by_alpha[alpha]) for alpha in alphas]
        color, marker, _ = tables.LOOKS[i % len(tables.LOOKS)]
        axes.errorbar(places, means, deviations, color=color, marker=marker, capsize=3, label=label)
        for place, alpha in zip(places, alphas):
            seeds = by_alpha[alpha]
            axes.plot([place] * len(seeds), seeds, ".", color=color, alpha=0.4, markersize=4)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])  # the paper's
    axes.set_xlabel("alpha (0: SFT, 1: distillation alone)")
    axes.set_ylabel("spoken questions right (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    tables.save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", default=["runs/shapes"], help="folders of runs, each "
                        "with =LABEL or without")
    parser.add_argument("--out", default="runs/report", help="folder for the pictures")
    args = parser.parse_args()

    curves = {}
    for argument in args.folders:
        folder, _, label = argument.partition("=")
        curves[label or folder] = scores_of(folder)
    draw_sweep(curves, Path(args.out) / "sweep.png")


if __name__ == "__main__":
    with readable_errors():
        main()
