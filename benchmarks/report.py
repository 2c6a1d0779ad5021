"""The benchmarks' table, differences and picture, from the scores of all models asked.

There is nothing to run here: `python eval.py RUN --bench FOLDER` prints and draws by it.
"""

import json
import math
import statistics

from benchmarks.scorers import BENCHMARKS
from plumbing.files import write_text
from plumbing.tables import (
    COLORS,
    blank_figure,
    paired_bootstrap,
    print_summaries,
    save_figure,
)

# What the table says of a benchmark beside the paper's columns.
SHARES = ("yes ratio of answered", "yes ratio of all", "unknown share")
DETAILS = {"MME": ("perception", "reasoning", "sum/28", "accuracy", *SHARES),
           "HallusionBench": ("aAcc", "fAcc", "qAcc", *SHARES),
           "RealWorldQA": ("unknown share",)}


def report(groups, results, out):
    """Prints the table and differences; writes them to benchmarks.json, and the picture.

    groups: {name: [`columns` of each seed]}; results: {label: {form: {benchmark: scores}}}
    out: the folder
    """
    print_summaries(groups)
    print_bench_differences(results)
    write_text(out / "benchmarks.json", json.dumps({"table": groups, "runs": results}, indent=1))
    print(out / "benchmarks.json")
    asked = next(iter(results.values()))["text"]
    draw_bars(groups, [column for name in asked for column in BENCHMARKS[name]],
              out / "benchmarks.png")


def columns(scores):
    """Returns a subject's columns of the table, {form: {row: value}}."""
    return {form: measures(benchmarks) for form, benchmarks in scores.items()}


def measures(results):
    """Returns {row: value} of the table from {benchmark: scores} of one run and form."""
    columns, details = {}, {}
    for name, result in results.items():
        for column, key in BENCHMARKS[name].items():
            if key in result:  # ChartQA's file may lack one of its splits
                columns[column] = result[key]
        for key in DETAILS.get(name, ()):
            if result[key] is not None:
                details[f"{name}: {key}"] = result[key]
    mean = {"mean": statistics.fmean(columns.values())} if columns else {}
    return {**columns, **mean, **details}


def print_bench_differences(results):
    """Prints differences of the mean score: speech against text, and run against run."""
    listening = {label: scores for label, scores in results.items() if "audio" in scores}
    first = next(iter(listening), None)
    for label, scores in listening.items():
        pairs = {"speech - text": scores["text"]}
        if label != first:
            pairs[f"speech - that of {first}"] = listening[first]["audio"]
        for title, others in pairs.items():
            for name, result in scores["audio"].items():
                mean, low, high = paired_bootstrap(others[name]["rows"], result["rows"])
                print(f"{label}, {name}, {title}: {mean:+.1f} points a row, "
                      f"95 % interval {low:+.1f} to {high:+.1f} (bootstrap over the questions)")


def draw_bars(groups, columns, path):
    """Draws the paper's columns as bars, means over seeds: each base's text, each run's speech."""
    bars = {}
    for name, seeds in groups.items():
        for form in seeds[0]:
            values = [statistics.fmean(seed[form].get(column, math.nan) for seed in seeds)
                      for column in columns]
            if form == "audio" or values not in bars.values():
                bars["text" if not bars else f"{name}, {form}"] = values

    figure, grid = blank_figure(2 + 1.2 * len(columns), 4)
    axes, width = grid[0, 0], 0.8 / len(bars)
    for i, (label, values) in enumerate(bars.items()):
        positions = [x - 0.4 + (i + 0.5) * width for x in range(len(columns))]
        axes.bar(positions, values, width, label=label, color=COLORS[i % len(COLORS)])
    axes.set_xticks(range(len(columns)), columns)
    axes.set_ylabel("score (%)")
    figure.legend(loc="outside upper center", ncols=4, fontsize="small")
    save_figure(figure, path)
