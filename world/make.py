"""The built-in world on disk: every picture drawn, every question spoken, as four prepared folders.

    python data.py shapes --seed 0                     # to runs/shapes/data-s0, in a minute
    python data.py shapes --seed 0 --paraphrase 0      # all training answers in the base's style

| part         | a sample                                                                |
| vision-text  | a picture and a written question, or a written sentence to repeat       |
| audio-text   | a spoken sentence and its transcript                                    |
| vision-audio | a picture and a question, written and spoken; half of the answers are   |
|              | paraphrases                                                             |
| test         | the same with held-out pictures and voices; half of the questions are   |
|              | sentences that training never speaks ("seen" is false)                 |

shapes.py draws and asks. Each sample has a random number generator of its own, so that any of them
can be made anew, in any order, by any process.
"""

import functools
import itertools
import random
from pathlib import Path

from plumbing.files import BadInput, in_range, write_json_lines
from plumbing.media import HELD_OUT_VOICES, VOICES, save_png, save_speech
from plumbing.prepared import in_parallel, make_once
from plumbing.processes import run_script
from world import shapes

PARTS = ("vision-text", "audio-text", "vision-audio", "test")
LISTED = 5000  # so many of the first pictures also get lists (phase 0), to learn to see
SCENE_QUESTIONS = 4  # about each picture of the vision-text part, its lists aside
# Some questions of the last stage are of MMAlign's kinds, so that these are not unlearned: one in
# 13, as not every scene has such a question.
PAIR_KINDS = 7 * shapes.KINDS + 3 * shapes.ALIGN_KINDS


# ---- the parts -----------------------------------------------------------------------------------
# Each function is what a worker process does: it makes sample i and returns its lines.


def make_scene(i, folder, seed):
    """Makes one picture and its written questions, or sentences to repeat (vision-text)."""
    rng = random.Random(f"{seed}/vision-text/{i}")
    line = {"group": i, "phase": 1}

    # One in eight is text to be repeated: alignment needs an LLM that can copy.
    if i % 8 == 7:
        sentences = [shapes.draw_sentence(rng) for _ in range(SCENE_QUESTIONS)]
        return [{"id": f"{i:06}-{j}", **line, "question": f"{sentence} {shapes.INSTRUCTION}",
                 "answer": sentence} for j, sentence in enumerate(sentences)]

    scene = shapes.draw_scene(rng, held_out=False)
    save_png(folder / f"images/{i:06}.png", shapes.render(rng, scene))
    line["image"] = f"images/{i:06}.png"

    # Lists come first (phase 0): without this curriculum training takes far longer.
    kinds = ("description", *shapes.LIST_KINDS) if i < LISTED else ()
    lists = [shapes.draw_question(rng, scene, (kind,)) for kind in kinds]
    lists = [{**question, "phase": 0} for question in lists if question]
    questions = [shapes.draw_question(rng, scene, shapes.BASE_KINDS)
                 for _ in range(SCENE_QUESTIONS)]
    return [{"id": f"{i:06}-{j}", **line, **question}
            for j, question in enumerate(lists + questions)]


def make_clip(i, folder, seed):
    """Makes one spoken sentence and its transcript (audio-text)."""
    rng = random.Random(f"{seed}/audio-text/{i}")
    sentence = shapes.draw_sentence(rng, spoken=True)
    speech = save_speech(folder, f"{i:06}", rng, sentence, VOICES)
    return [{"id": f"{i:06}", **speech, "answer": sentence}]


def draw_other(rng, question, kind):
    """Draws another question of a kind, about any picture."""
    while True:
        other = shapes.draw_question(rng, shapes.draw_scene(rng, held_out=False), (kind,))
        if other is not None and other["question"] != question:
            return other["question"]


def make_pair(i, folder, seed, kinds, noise=0.0, paraphrase=0.0, held_out=False, seen=True):
    """Makes one picture and one question about it, written and spoken (vision-audio, test).

    held_out: the picture and the voice are; seen: training may speak the question's sentence
    """
    rng = random.Random(f"{seed}/{folder.name}/{i}")
    sample = None
    while sample is None or shapes.is_held_out(sample["question"]) == seen:
        scene = shapes.draw_scene(rng, held_out)
        sample = shapes.draw_question(rng, scene, kinds, noise, paraphrase)
    save_png(folder / f"images/{i:06}.png", shapes.render(rng, scene))
    voices = HELD_OUT_VOICES if held_out else VOICES
    speech = save_speech(folder, f"{i:06}", rng, sample["question"], voices)
    line = {"id": f"{i:06}", "image": f"images/{i:06}.png", **speech, **sample}
    if held_out:
        # The test's floor: who hears only of what kind a question is may as well read "other".
        line |= {"seen": seen, "scene": shapes.describe(scene),
                 "other": draw_other(rng, sample["question"], sample["kind"])}
    return [line]


def make_test(i, folder, seed):
    """Makes one held-out question; types alternate, and so do seen and unseen sentences."""
    kinds = shapes.KINDS + shapes.ALIGN_KINDS
    turn, place = divmod(i, len(kinds))
    return make_pair(i, folder, seed, (kinds[place],), held_out=True, seen=turn % 2 == 0)


# ---- the command ---------------------------------------------------------------------------------


def make_part(folder, worker, count):
    """Makes samples 0 to count - 1 in parallel, then samples.jsonl; keeps files that exist."""
    lines = in_parallel(worker, range(count), str(folder), "file")
    write_json_lines(folder / "samples.jsonl", itertools.chain.from_iterable(lines))


def make(args):
    """Makes the built-in world's parts under --out."""
    out = Path(args.out or f"runs/shapes/data-s{args.seed}")
    pair = functools.partial(make_pair, kinds=PAIR_KINDS, noise=args.label_noise,
                             paraphrase=args.paraphrase)
    makers = {  # each part: its worker, how many samples, and what else settings.json tells
        "vision-text": (make_scene, args.scenes, {"scenes": args.scenes}),
        "audio-text": (make_clip, args.clips, {"clips": args.clips}),
        "vision-audio": (pair, args.n, {"n": args.n, "label_noise": args.label_noise,
                                        "paraphrase": args.paraphrase}),
        "test": (make_test, args.test, {"n": args.test}),
    }
    for part in args.parts:
        worker, count, settings = makers[part]
        worker = functools.partial(worker, folder=out / part, seed=args.seed)
        make_once(out / part, {"seed": args.seed, **settings},
                  functools.partial(make_part, out / part, worker, count))
    print(f"The built-in world of seed {args.seed} lies in {out}")


def make_if_missing(part, seed):
    """Runs `data.py shapes` in a process of its own if a default part's folder is not there yet."""
    is_there = Path(part, "samples.jsonl").exists()
    if not is_there and run_script("data.py", "shapes", "--seed", seed):
        raise BadInput("the built-in world could not be made (see above)")


def add_command(commands):
    """Adds the subcommand `shapes` to data.py."""
    sub = commands.add_parser("shapes", help="make the built-in world")
    add = sub.add_argument
    add("--seed", type=in_range(0, 2**48), default=0, help="of pictures, questions and voices")
    add("--out", help="folder for the parts (default: runs/shapes/data-s<seed>)")
    add("--parts", nargs="+", default=PARTS, choices=PARTS, help="which parts to make")
    add("--scenes", type=in_range(1), default=16000,
        help="pictures with written questions, or one in eight text alone (vision-text)")
    add("--clips", type=in_range(1), default=12000, help="spoken sentences (audio-text)")
    add("--n", type=in_range(1), default=6400, help="spoken questions on pictures (vision-audio)")
    add("--test", type=in_range(1), default=800, help="held-out spoken questions (test)")
    add("--label-noise", type=in_range(0.0, 1.0), default=0.0,
        help="share of wrong answers (vision-audio)")
    add("--paraphrase", type=in_range(0.0, 1.0), default=0.5,
        help="share of paraphrased answers (vision-audio)")
    sub.set_defaults(run=make)
