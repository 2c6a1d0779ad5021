"""Tables and figures: one way to write a Markdown table, a CSV and a PNG, for every script."""

import csv
import itertools
import statistics

import torch

from plumbing.files import atomic_write

# Okabe and Ito's colours, which all eyes can tell apart, with a marker and a line each.
COLORS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
LOOKS = tuple(zip(COLORS, "os^DvPX", ("-", "--", "-.", "-", ":", "--", "-.")))


# ---- numbers -------------------------------------------------------------------------------------


# Student's t: 97.5 % of the distribution lie below it, with 2, 3, ... 9 degrees of freedom.
STUDENT_T = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def seed_interval(before, after):
    """Returns a pair: (mean, low, high) of after - before in points, and a text: how it was made.

    before, after: scores from 0 to 1 of the same questions, a list for each seed of training; a
    seed counts as one, however many questions it has
    Of three seeds or more it is a 95 % interval of Student's t over the seeds' mean differences,
    which says what further seeds would give. More than ten take STUDENT_T's last value. One or two
    seeds say nothing of others: then it is `paired_bootstrap`'s, over the questions of both.
    """
    differences = [100 * (statistics.fmean(b) - statistics.fmean(a))
                   for a, b in zip(before, after)]
    if len(differences) < 3:
        return paired_bootstrap(sum(before, []), sum(after, [])), "bootstrap over the questions"
    mean = statistics.fmean(differences)
    t = STUDENT_T[min(len(differences), 10) - 3]  # of more than ten seeds a little too wide
    half = t * statistics.stdev(differences) / len(differences) ** 0.5
    return (mean, mean - half, mean + half), "Student's t over the seeds"


def paired_bootstrap(a, b, draws=2000, seed=0):
    """Returns (mean, low, high) of b - a in points: a 95 % interval over the choice of questions.

    a, b: scores from 0 to 1 of the same questions. Each draw takes as many questions as there are,
    with replacement, and both answers to each; low and high are the 2.5 and 97.5 percentiles of the
    draws' means. The interval says nothing about another seed of training.
    """
    difference = 100 * (torch.tensor(b, dtype=torch.float64) - torch.tensor(a, dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    questions = torch.randint(len(difference), (draws, len(difference)), generator=generator)
    means = difference[questions].mean(1).sort().values  # (draws,)
    low, high = means[int(0.025 * draws)], means[int(0.975 * draws)]
    return difference.mean().item(), low.item(), high.item()


def deviation(values):
    """Returns the standard deviation over seeds; 0 of a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def over_seeds(curves):
    """Returns the mean and the standard deviation (0 of a single one) of tensors, one a seed."""
    values = torch.stack(list(curves))  # (seeds, ...)
    return values.mean(0), values.std(0) if len(values) > 1 else torch.zeros_like(values[0])


def cell(values, digits=1):
    """Returns a table cell: the mean over seeds, and of several seeds their standard deviation."""
    if None in values:
        return ""
    spread = f" ±{deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


# ---- tables --------------------------------------------------------------------------------------


def table_columns(groups):
    """Returns {column: [{row: value} of each seed]} from {run name: [summary of each seed]}.

    A summary is {"text": {row: value}, "audio": {row: value}}. Runs on one base give the same
    written answers, as their LVLM is frozen: those stand once, before the spoken ones.
    """
    texts, columns = [], {}
    for name, summaries in groups.items():
        text = [summary["text"] for summary in summaries]
        if text not in texts:
            texts.append(text)
            columns["text" if len(texts) == 1 else f"text, {name}"] = text
        if "audio" in summaries[0]:
            columns[f"{name}, audio"] = [summary["audio"] for summary in summaries]
            columns[f"{name}, gap"] = [gap(summary) for summary in summaries]
    return columns


def gap(summary):
    """Returns {row: text - audio} of a summary, for the rows that have both."""
    text, audio = summary["text"], summary["audio"]
    return {row: text[row] - audio[row] for row in text if row in audio}


def print_summaries(groups):
    """Prints {run name: [summary of each seed]} as a table, a row for each kind and measure."""
    columns = {name: seeds for name, seeds in table_columns(groups).items() if any(seeds)}
    names = dict.fromkeys(name for seeds in columns.values() for name in seeds[0])
    rows = []
    for name in names:
        cells = [cell([seed.get(name) for seed in seeds]) for seeds in columns.values()]
        rows.append([name, *cells])
    print_table(["", *columns], rows)


def print_table(header, rows):
    """Prints a Markdown table of texts; all columns but the first stand right."""
    table = [list(header), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    table.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    for first, *others in table:
        cells = [first.ljust(widths[0]), *(c.rjust(width) for c, width in zip(others, widths[1:]))]
        print(f"| {' | '.join(cells)} |")


def write_csv(path, header, rows):
    """Writes a CSV, floats with six digits, and prints its name."""
    rows = ([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)
    with atomic_write(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows([header, *rows])
    print(path)


# ---- figures -------------------------------------------------------------------------------------


def blank_figure(width, height, rows=1, columns=1, **options):
    """Returns a figure of so many inches and its (rows, columns) array of axes."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save_figure(figure, path, dpi=150):
    """Writes a figure as a PNG, whole or not at all, and prints its name."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
    print(path)


def plot_curves(panels, xlabel, ylabel, path, rows=1, sharey=False, looks=LOOKS, first=1):
    """Draws curves in panels: {title: [(label, values (L,), deviation (L,) or None), ...]}.

    first: where the x axis begins; looks: (colour, marker, line) of each label, the same in all
    panels. A deviation is drawn as a band.
    """
    columns = -(-len(panels) // rows)
    figure, grid = blank_figure(3.4 * columns, 2.5 * rows + 1, rows, columns, sharex=True,
                                sharey=sharey)
    for axes, (title, curves) in zip(grid.flat, panels.items()):
        cycle = itertools.cycle(looks)
        for (label, values, spread), (color, marker, line) in zip(curves, cycle):
            x = range(first, first + len(values))
            axes.plot(x, values, line, color=color, marker=marker if len(x) < 50 else "",
                      markersize=5, label=label)
            if spread is not None:
                axes.fill_between(x, values - spread, values + spread, color=color, alpha=0.2,
                                  linewidth=0)
        axes.set_title(title)
        axes.margins(y=0.1)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.supxlabel(xlabel)
    figure.supylabel(ylabel)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), columns + 1))
    save_figure(figure, path)
