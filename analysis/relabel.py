"""Writes a prepared folder anew, with answers that a base itself writes to the written questions.

    python -m analysis.relabel runs/shapes/vision-text-s0 runs/shapes/data-s0/vision-audio \\
        --out runs/relabel/data-s0
    torchrun --standalone train.py --alpha 0 --data runs/relabel/data-s0 --out runs/relabel/a0-s0

SFT on such answers is the baseline of BLSP (arXiv 2309.00916) and others: the model's own words are
the labels, greedy and written once, so that training needs no teacher. Self-KD learns the model's
whole distribution instead. An interrupted command goes on where it stopped.
"""

import argparse
from pathlib import Path

import data
from eval import LONG, run_subject
from plumbing import prepared, runs
from plumbing.answers import ask
from plumbing.files import in_range, readable_errors
from plumbing.media import link
from plumbing.processes import default_device


def relabel(args):
    """Makes the folder --out: the old lines with the base's answers, their files linked."""
    subject, out = run_subject(args.base, args), Path(args.out)
    samples = data.Samples(args.folder, subject.settings, ("question",))
    answered = ask(subject, samples, range(len(samples)), ["text"], out / "answers.jsonl", LONG)

    results = []
    for line, row in zip(prepared.read_rows([args.folder]), answered):
        folder = Path(line.pop("folder"))
        line.pop("where")
        for key in ("image", "audio"):
            if key in line and not (out / line[key]).exists():
                link(folder / line[key], out / line[key])
        results.append({**line, "answer": row["text"]})
        if not row["text"]:
            results[-1] = {"id": line["id"], "skipped": "the base answers nothing"}
    prepared.write(out, results)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("base", help="who answers: a run, or an LVLM's folder or hub id")
    add("folder", help="the prepared folder; its lines need a written question")
    add("--out", required=True, help="the new folder")
    add("--batch", type=in_range(1), help="questions answered at once")
    add("--device", choices=["cpu", "cuda", "mps"], default=default_device(),
        help="default: cuda if there is one")
    args = parser.parse_args()
    args.max_tiles = None  # as in training

    # Asked and suffixed as the old folder was; answered by these weights and no others.
    settings = prepared.read_settings(args.folder)
    settings |= {"relabelled": data.Samples(args.folder, None, ("question",)).fingerprint(),
                 "base": runs.fingerprint(args.base)}
    prepared.make_once(args.out, settings, lambda: relabel(args))


if __name__ == "__main__":
    with readable_errors():
        main()
