"""Draws training logs: loss, KL, CE and gradient norm of each step, several runs side by side.

    python -m analysis.training                                         # every alpha of seed 0
    python -m analysis.training runs/shapes/audio-text-s0 runs/shapes/audio-text-s1 --out figures

It reads log.jsonl of each run, also while the run is being trained, and writes training.png to
--out.
"""

from pathlib import Path

import torch

from plumbing import runs, tables
from plumbing.files import BadInput, at, json_lines, readable_errors

PANELS = {"loss": "loss", "kl": "KL (nats)", "ce": "CE (nats)", "grad_norm": "gradient norm"}
KL = [*PANELS].index("kl")
MOST = 50  # steps in a running mean


def read_log(run):
    """Returns each training step's numbers as a tensor (steps, panels); NaN is not measured."""
    rows = []
    for place, line in json_lines(Path(run) / "log.jsonl"):
        with at(place):
            rows.append([line[key] for key in PANELS])
    if not rows:
        raise BadInput(f"{run}: its log has no step yet")
    log = torch.tensor(rows)
    if not log[:, KL].any():  # at alpha 0 there is no teacher, so the KL is unknown
        log[:, KL] = torch.nan
    return log


def draw_logs(paths, path):
    """Draws the logs of some runs, a panel for each number."""
    logs = {str(run): read_log(run) for run in paths}

    # Single steps are noisy, as each has other samples. A mean needs as many steps as it is wide.
    width = max(1, min(MOST, *(len(log) // 10 for log in logs.values())))
    panels = {title: [] for title in PANELS.values()}
    for run, log in logs.items():
        means = log.unfold(0, width, 1).mean(-1)  # (steps - width + 1, panels)
        for panel, values in zip(panels.values(), means.T):
            panel.append((run, values, None))
    tables.plot_curves(panels, "step", f"mean of the last {width} steps", path, first=width - 1)


def main():
    args = runs.arguments(__doc__).parse_args()
    paths = runs.asked_for(args)
    if not args.runs:
        last = runs.read_run_info(paths[-1])["training"]["stage"]
        paths = [run for run in paths if runs.read_run_info(run)["training"]["stage"] == last]
    draw_logs(paths, Path(args.out) / "training.png")


if __name__ == "__main__":
    with readable_errors():
        main()
