"""Writes a prepared folder anew, with answers that a base itself writes to the written questions.

    python -m analysis.relabel runs/shapes/vision-text-s0 runs/shapes/data-s0/vision-audio \\
        --out runs/relabel/data-s0
    torchrun train.py --alpha 0 --data runs/relabel/data-s0 --out runs/relabel/a0-s0

SFT on such answers is the baseline of BLSP (arXiv 2309.00916) and others: the model's own words are
the labels, greedy and written once, so that training needs no teacher. Self-KD learns the model's
whole distribution instead. An interrupted command goes on where it stopped.
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

import data
from eval import batch_size
from model import OLLM
from plumbing import prepared, runs
from plumbing.files import at_least, json_lines, read_json, readable_errors
from plumbing.media import link
from plumbing.processes import default_device


def answer_all(ollm, folder, path, size):
    """Appends the base's answer to each written question of a folder to the JSONL file `path`.

    Those that are there already are not asked again. size: questions answered at once
    """
    # A last line that was cut off is dropped.
    whole = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in whole if line.endswith(b"\n")]
    path.write_bytes(b"".join(whole))

    samples = data.Samples(folder, ollm.settings, ("question",))
    for start in tqdm(range(len(whole), len(samples), size), unit="batch", desc=str(path)):
        batch = [samples[i] for i in range(start, min(start + size, len(samples)))]
        answers = ollm.answer(batch, ("text",), max_new_tokens=256)["text"]
        with open(path, "a", encoding="utf-8") as out:
            out.writelines(json.dumps(answer) + "\n" for answer in answers)


def relabel(args):
    """Makes the folder --out: the old lines with the base's answers, their files linked."""
    ollm, out = OLLM.load(args.base, args.device).eval(), Path(args.out)
    answers = out / "answers.jsonl"
    answer_all(ollm, args.folder, answers, batch_size(ollm, args))

    results = []
    for line, (_, answer) in zip(prepared.Rows([args.folder]), json_lines(answers)):
        folder = Path(line.pop("folder"))
        line.pop("where")
        for key in ("image", "audio"):
            if key in line and not (out / line[key]).exists():
                link(folder / line[key], out / line[key])
        results.append({**line, "answer": answer})
        if not answer:
            results[-1] = {"id": line["id"], "skipped": "the base answers nothing"}
    prepared.write(out, results)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("base", help="who answers: a run, or an LVLM's folder or hub id")
    add("folder", help="the prepared folder; its lines need a written question")
    add("--out", required=True, help="the new folder")
    add("--batch", type=at_least(1), help="questions answered at once")
    add("--device", choices=["cpu", "cuda", "mps"], default=default_device(),
        help="default: cuda if there is one")
    args = parser.parse_args()

    # Asked and suffixed as the old folder was; answered by these weights and no others.
    note = Path(args.folder) / "settings.json"
    settings = read_json(note) if note.exists() else {}
    settings |= {"relabelled": data.Samples(args.folder, {}, ("question",)).fingerprint(),
                 "base": runs.fingerprint(args.base)}
    prepared.make_once(args.out, settings, lambda: relabel(args))


if __name__ == "__main__":
    with readable_errors():
        main()
