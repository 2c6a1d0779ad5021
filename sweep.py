"""What alpha does (the paper's Fig. 8): the spoken answers of every alpha as a curve, and the story in bars.

    for alpha in 0 0.25 0.5 0.75 1; do torchrun train.py --alpha $alpha; done
    python eval.py                                       # asks the runs, and keeps their answers beside them
    python sweep.py                                      # runs/report/sweep.png and story.png, of all seeds found
    python sweep.py runs/shapes=1,600 runs/twice=3,200   # curves for several folders of runs, FOLDER=LABEL

Points are means over seeds, error bars standard deviations, small dots the seeds themselves.
"""

import argparse
import re
import statistics
from pathlib import Path

import data
import eval
import faults
import model
import shapes
from faults import BadInput

BARS = {"text": "in writing", "aligned": "spoken,\nafter alignment", "SFT": "spoken,\nSFT",
        "KD 0.75": "spoken,\nSelf-KD"}  # of the story, from left to right


def found(folder):
    """{run's name: {seed: (percent right in writing, spoken)}} of the runs in a folder; means over the six kinds.

    Raises BadInput if there are none, or eval.py has not asked them yet.
    """
    scores = {}
    for path in sorted(Path(folder).glob("*/ollm.json")):
        about, answers = model.about_run(path.parent), path.with_name("answers-mean.jsonl")
        if not answers.exists():
            raise BadInput(f"{path.parent}: not asked yet; run: python eval.py {path.parent}")
        rows = [row for _, row in data.json_lines(answers)]
        means = {form: statistics.fmean(eval.mean_scores(rows, form, shapes.KINDS).values())
                 for form in ("text", "audio") if rows[0][form] is not None}
        seeds, seed = scores.setdefault(eval.run_name(about), {}), about["training"]["seed"]
        if seed in seeds:
            raise BadInput(f"{path.parent}: another run of {folder} is {eval.run_name(about)} of seed {seed} as well")
        seeds[seed] = means
    if not scores:
        raise BadInput(f"{folder}: has no finished run; `torchrun train.py --alpha 0.75` makes one")
    return scores


def draw_sweep(curves, path):
    """The spoken answers over alpha, a curve for each {label: `found`}; Fig. 8."""
    figure, axes = blank(6, 3.6)
    for i, (label, scores) in enumerate(curves.items()):
        by_alpha = {alpha_of(name): [m["audio"] for m in seeds.values()] for name, seeds in scores.items()
                    if alpha_of(name) is not None}
        alphas, color = sorted(by_alpha), eval.COLORS[i]
        at = [alpha + 0.008 * i for alpha in alphas]  # beside one another, not on top
        axes.errorbar(at, [statistics.fmean(by_alpha[a]) for a in alphas], [deviation(by_alpha[a]) for a in alphas],
                      color=color, marker="os^Dv"[i % 5], capsize=3, label=label)
        for x, a in zip(at, alphas):
            axes.plot([x] * len(by_alpha[a]), by_alpha[a], ".", color=color, alpha=0.4, markersize=4)
    axes.set_xlabel("alpha (0: SFT, 1: distillation alone)")
    axes.set_ylabel("spoken questions right (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def draw_story(scores, path):
    """Text, then speech after each step of training, as bars."""
    figure, axes = blank(6, 3.2)
    bars = {BARS["text"]: [m["text"] for m in scores["base"].values()]} if "base" in scores else {}
    bars |= {label: [m["audio"] for m in scores[name].values()] for name, label in BARS.items() if name in scores}
    for i, (label, values) in enumerate(bars.items()):
        mean = statistics.fmean(values)
        axes.bar(i, mean, 0.6, yerr=deviation(values), capsize=4, color=eval.COLORS[i])
        axes.plot([i] * len(values), values, ".", color="black", alpha=0.5)
        axes.annotate(f"{mean:.0f}", (i, 2), ha="center", color="white", weight="bold")
    axes.set_xticks(range(len(bars)), bars)
    axes.set_ylabel("questions right (%)")
    axes.set_ylim(0, 105)
    save(figure, path)


def alpha_of(name):
    """The alpha of a run's name in a table; None for a stage that has none."""
    known = re.fullmatch(r"SFT|KD ([\d.]+)", name)
    return known and float(known[1] or 0)


def deviation(values):
    """The standard deviation over seeds; 0 of a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0


def blank(width, height):
    """A figure of so many inches and its axes."""
    from matplotlib.figure import Figure  # a second to import

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def save(figure, path):
    """Writes the figure as a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with faults.written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", default=["runs/shapes"], help="folders of runs, each with =LABEL or "
                        "without; the story is the first one's")
    parser.add_argument("--out", default="runs/report", help="folder for the pictures")
    args = parser.parse_args()
    with faults.readable_errors():
        curves = {label or folder: found(folder) for folder, _, label in (f.partition("=") for f in args.folders)}
        draw_sweep(curves, Path(args.out) / "sweep.png")
        draw_story(next(iter(curves.values())), Path(args.out) / "story.png")
