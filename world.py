"""The built-in world on disk: every picture drawn, every question spoken, as four prepared folders.

    python data.py shapes --seed 0                     # to runs/shapes/data-s0, about a minute on two cores
    python data.py shapes --seed 0 --label-noise 0     # training answers without annotation errors

| part         | a sample                                                               | learnt from in    |
| vision-text  | a picture and a written question; one in six is a sentence to repeat   | vision-text       |
| audio-text   | a spoken sentence and its transcript                                   | audio-text        |
| vision-audio | a picture and a question, written and spoken; a quarter answered wrong | vision-audio      |
| test         | the same with held-out pictures, questions and voices, answered right  | nothing: eval.py  |

What is drawn and asked is in shapes.py. Each sample has a random number generator of its own, so that any of them can
be made anew, in any order, by any process.
"""

import functools
import json
import random
from pathlib import Path

from tqdm import tqdm

import data
import faults
import shapes
from faults import BadInput

PARTS = ("vision-text", "audio-text", "vision-audio", "test")
SCENE_QUESTIONS = 10  # written questions about each picture of the vision-text part


def make_scene(task):
    """Worker: one picture and its written questions (the vision-text part). Returns lines for samples.jsonl."""
    folder, seed, i = task
    rng = random.Random(f"{seed}/vision-text/{i}")
    scene = shapes.draw_scene(rng, held_out=False)
    data.save_png(folder / f"images/{i:06}.png", shapes.render(rng, scene))
    lines = []
    for j in range(SCENE_QUESTIONS):
        line = {"id": f"{i:06}-{j}", "phase": 1, "image": f"images/{i:06}.png"}
        if j < 2:  # first learn to see: a base that is asked before it can takes far longer
            line |= {"phase": 0, **shapes.draw_question(rng, scene, ("description", *shapes.LIST_KINDS))}
        elif rng.random() < 0.2:  # text alone: say it again. It teaches the LLM to copy, which alignment builds on
            sentence = shapes.draw_sentence(rng)
            line = {"id": f"{i:06}-{j}", "phase": 1, "question": f"{sentence} {shapes.INSTRUCTION}", "answer": sentence}
        else:
            line |= shapes.draw_question(rng, scene, shapes.BASE_KINDS)
        lines.append(line)
    return lines


def make_clip(task):
    """Worker: one spoken sentence and its transcript (the audio-text part)."""
    folder, seed, i = task
    rng = random.Random(f"{seed}/audio-text/{i}")
    sentence = shapes.draw_sentence(rng)
    return [{"id": f"{i:06}", **data.save_speech(folder, f"{i:06}", rng, sentence, data.VOICES), "answer": sentence}]


def make_pair(task):
    """Worker: one picture and one question, written and spoken (vision-audio: noisy answers; test: none, held out)."""
    folder, seed, i, kinds, noise, held_out = task
    rng = random.Random(f"{seed}/{folder.name}/{i}")
    sample = None
    while sample is None:
        scene = shapes.draw_scene(rng, held_out)
        sample = shapes.draw_question(rng, scene, kinds, noise)
    data.save_png(folder / f"images/{i:06}.png", shapes.render(rng, scene))
    voices = data.HELD_OUT_VOICES if held_out else data.VOICES
    speech = data.save_speech(folder, f"{i:06}", rng, sample["question"], voices)
    seen = {"scene": shapes.describe(scene)} if held_out else {}
    return [{"id": f"{i:06}", "image": f"images/{i:06}.png", **speech, **sample, **seen}]


def make_part(folder, worker, tasks):
    """Runs the worker on all tasks in parallel and writes folder/samples.jsonl last; what exists is kept."""
    with data.workers() as pool, faults.written_whole(folder / "samples.jsonl") as temporary:
        with open(temporary, "w", encoding="utf-8") as out:
            made = pool.map(worker, tasks, chunksize=32)
            for lines in tqdm(made, total=len(tasks), desc=str(folder), unit="file"):
                out.writelines(json.dumps(line) + "\n" for line in lines)


def make(args):
    """The built-in world's four parts under --out."""
    if not 0 <= args.label_noise <= 1:
        raise BadInput(f"--label-noise is a share between 0 and 1, not {args.label_noise}")
    out, seed, kinds = Path(args.out or f"runs/shapes/data-s{args.seed}"), args.seed, shapes.KINDS + shapes.ALIGN_KINDS
    makers = {  # by part: worker, what it is told of sample i beside folder, seed and i, and what settings.json notes
        "vision-text": (make_scene, lambda i: (), {"seed": seed, "scenes": args.scenes}),
        "audio-text": (make_clip, lambda i: (), {"seed": seed, "clips": args.clips}),
        "vision-audio": (make_pair, lambda i: (shapes.KINDS, args.label_noise, False),
                         {"seed": seed, "n": args.n, "label_noise": args.label_noise}),
        "test": (make_pair, lambda i: ((kinds[i % len(kinds)],), 0.0, True), {"seed": seed, "n": args.test}),
    }
    counts = dict(zip(PARTS, (args.scenes, args.clips, args.n, args.test)))
    for part in PARTS:
        if part in args.parts:
            worker, told, settings = makers[part]
            tasks = [(out / part, seed, i, *told(i)) for i in range(counts[part])]
            data.make_once(out / part, settings, functools.partial(make_part, out / part, worker, tasks))
    print(f"The built-in world of seed {seed} lies in {out}")


def add_command(commands):
    """The subcommand of data.py."""
    sub = commands.add_parser("shapes", help="make the built-in world")
    sub.add_argument("--seed", type=int, default=0, help="what is drawn, asked and spoken")
    sub.add_argument("--out", help="folder for the parts (default runs/shapes/data-s<seed>)")
    sub.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="which parts to make")
    sub.add_argument("--scenes", type=int, default=13000, help="pictures with written questions (vision-text)")
    sub.add_argument("--clips", type=int, default=18000, help="spoken sentences (audio-text)")
    sub.add_argument("--n", type=int, default=1600, help="spoken questions about pictures (vision-audio)")
    sub.add_argument("--test", type=int, default=800, help="held-out spoken questions (test)")
    sub.add_argument("--label-noise", type=float, default=0.25, help="share of wrong training answers (vision-audio)")
