"""Draws README's picture: a scene, a spoken question, four answers, and all seeds' means.

    for alpha in 0.75 0; do torchrun --standalone train.py --alpha $alpha; done
    python -m analysis.first_picture --id 000121    # writes runs/report/first.png

The question is one of seed 0's test part, chosen by its id. Bars are means over the seeds in
runs/shapes, with standard deviations. The dotted line is what the best fixed answers score.
"""

import argparse
import statistics
from pathlib import Path

from analysis.cases import picture_of
from analysis.sweep import scores_of
from eval import score_answer
from plumbing import runs, tables
from plumbing.files import at, readable_errors
from plumbing.media import load_audio, load_image

FOLDER = Path("runs/shapes")
MODELS = {  # each: its label, its run of seed 0, and the form of its question
    "base": ("text: the base (teacher)", "audio-text-s0", "text"),
    "aligned": ("speech, after alignment", "audio-text-s0", "audio"),
    "SFT": ("speech, after SFT", "vision-audio-a0-s0", "audio"),
    "KD 0.75": ("speech, after Self-KD", "vision-audio-a0.75-s0", "audio"),
}


def score_fixed_answers(rows):
    """Returns the percent right of the best fixed answer to each question type, their mean."""
    best = []
    for kind in {row["kind"] for row in rows}:
        asked = [row for row in rows if row["kind"] == kind]
        best.append(max(statistics.fmean(score_answer(row, answer) for row in asked)
                        for answer in {row["label"] for row in asked}))
    return 100 * statistics.fmean(best)


def draw(sample, answers, bars, guess, path):
    """Draws a sample with the models' answers, and bars: the percent right by seed of each."""
    figure, ((scene, text, chart),) = tables.blank_figure(11, 3, 1, 3, width_ratios=(3, 4, 4))
    labels = [label for label, _, _ in MODELS.values()]
    scene.imshow(load_image(picture_of(sample)))
    wave = load_audio(picture_of(sample).parent.parent / f"audio/{sample['id']}.flac")  # (samples,)
    text.text(0, 0.93, f"“{sample['question']}?”", fontsize=12)
    text.inset_axes((0, 0.76, 0.9, 0.14)).plot(wave, color="grey", linewidth=0.3)
    for i, answer in enumerate(answers):
        mark, color = ("✓", "#1a7f37") if score_answer(sample, answer) == 1 else ("✗", "#cf222e")
        text.text(0, 0.63 - 0.2 * i, labels[i], fontsize=8, color="dimgrey")
        text.text(0, 0.54 - 0.2 * i, f"{mark}  {answer}", fontsize=12, color=color)
    for axes in (scene, text, *text.child_axes):
        axes.set_axis_off()

    for i, seeds in enumerate(bars):
        mean, spread = statistics.fmean(seeds), tables.deviation(seeds)
        chart.barh(labels[i], mean, 0.6, xerr=spread, capsize=3, color=tables.COLORS[i])
        chart.annotate(f"{mean:.0f}", (2, i), va="center", color="white", weight="bold")
    chart.axvline(guess, color="#cf222e", linestyle=":", zorder=0)
    chart.annotate(f"fixed answers: {guess:.0f}", (guess + 1, -0.65), fontsize=8)
    chart.set(ylim=(3.5, -1), xlim=(0, 104), xlabel="% right of 600 questions, five seeds")
    chart.spines[["top", "right"]].set_visible(False)
    tables.save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--id", default="000121", help="which question")
    parser.add_argument("--out", default="runs/report", help="folder for the picture")
    args = parser.parse_args()
    answers = []
    for _, run, form in MODELS.values():
        rows = runs.read_answers(FOLDER / run)
        with at(f"{FOLDER / run}: question {args.id}"):
            sample, = [row for row in rows if row["id"] == args.id]
        answers.append(sample[form])
    scores = scores_of(FOLDER)
    bars = [scores[name][form] for name, (_, _, form) in MODELS.items()]
    draw(sample, answers, bars, score_fixed_answers(rows), Path(args.out) / "first.png")


if __name__ == "__main__":
    with readable_errors():
        main()
