"""The built-in world: small pictures, questions about them, and answers that can be checked.

Everything that a run on a laptop needs is drawn or written here from a seed; `data.py shapes` stores it and lets
espeak-ng speak it. Run this file to see one scene and what is asked about it:

    python shapes.py --seed 7 --out scene.png

A scene is a 2 x 2 grid with two to four objects, each a colour and a shape. There are six kinds of question (`KINDS`),
and two kinds in the manner of the paper's MMAlign (`ALIGN_KINDS`): which of two sentences is right? Questions and
answers come in several wordings, so that a teacher's distribution over answers says more than one word.
"""

import argparse
import hashlib
import math
import random

from PIL import Image, ImageDraw

COLORS = {"red": (225, 50, 45), "green": (40, 170, 70), "blue": (50, 90, 225), "yellow": (240, 210, 50),
          "purple": (150, 60, 190), "white": (245, 245, 245)}
SHAPES = ("circle", "square", "triangle", "star")
PLACES = ("top left", "top right", "bottom left", "bottom right")  # the cells of the grid, in reading order
NUMBERS = ("zero", "one", "two", "three", "four")
KINDS = ("color", "shape", "count", "existence", "place", "description")
ALIGN_KINDS = ("relation", "attribute")
LIST_KINDS = ("by shape", "by color")  # asked only while a base learns to see: find things by what they look like
# How often a base that can see is asked what: the more, the longer it takes to learn.
BASE_KINDS = (("shape", "description", "relation") + 2 * ("color",) + 3 * ("place", "attribute")
              + 4 * ("existence",) + 5 * ("count",))
CLASSES = {"color": tuple(COLORS), "shape": SHAPES, "count": NUMBERS, "existence": ("yes", "no"), "place": PLACES}
INSTRUCTION = "say it again"  # follows what is to be repeated (text) or transcribed (speech)
SIZE = 64  # pixels, both ways

QUESTIONS = {
    "color": ("what color is the {x}", "which color does the {x} have", "tell me the color of the {x}"),
    "shape": ("what shape is the {x} one", "which shape does the {x} one have", "tell me the shape of the {x} one"),
    "count": ("how many {x} are there", "how many {x} do you see", "count the {x}"),
    "existence": ("is there a {x}", "do you see a {x}", "does the picture show a {x}"),
    "place": ("where is the {x}", "in which corner is the {x}", "tell me where the {x} is"),
    "description": ("describe the picture", "what do you see", "tell me what the picture shows"),
    "by shape": ("list the shapes",),
    "by color": ("list the colors",),
    "relation": ("which is right {a} or {b}", "what do you see {a} or {b}"),
    "attribute": ("which is right {a} or {b}", "what do you see {a} or {b}"),
}
ANSWERS = {
    "color": ("{y}", "it is {y}", "the {x} is {y}"),
    "shape": ("{y}", "it is a {y}", "the {x} one is a {y}"),
    "count": ("{y}", "i see {y}", "the picture shows {y}"),
    "existence": ("{y}", "{y} there is", "{y} i do"),
    "place": ("{y}", "it is at the {y}", "the {x} is at the {y}"),
    "description": ("{y}", "i see {y}", "the picture shows {y}"),
    "by shape": ("{y}",),
    "by color": ("{y}",),
    "relation": ("{y}", "it is {y}", "i see {y}"),
    "attribute": ("{y}", "it is {y}", "i see {y}"),
}
NO_ANSWERS = ("no", "no there is not", "no i do not")  # existence, when the answer is no


def draw_scene(rng, held_out):
    """A scene {cell: (color, shape)} of 2-4 different objects, from the training half or from the held-out half.

    A hash of its content says which half a scene belongs to (one in eight is held out), so that no list is needed and
    no held-out scene can ever be trained on, whatever the seed.
    """
    while True:
        cells = sorted(rng.sample(range(len(PLACES)), rng.randint(2, 4)))
        objects = rng.sample([(c, s) for c in COLORS for s in SHAPES], len(cells))
        scene = dict(zip(cells, objects))
        if (hashlib.sha256(repr(scene).encode()).digest()[0] % 8 == 0) == held_out:
            return scene


def render(rng, scene):
    """The scene as a 64 x 64 picture: sizes, positions and the grey of the ground vary a little."""
    scale = 4  # drawn four times larger and reduced, for smooth edges
    image = Image.new("RGB", (SIZE * scale, SIZE * scale), (rng.randint(30, 70),) * 3)
    pen = ImageDraw.Draw(image)
    for cell, (color, shape) in scene.items():
        r = rng.uniform(8, 12) * scale
        x = ((cell % 2 + 0.5) * SIZE / 2 + rng.uniform(-3, 3)) * scale
        y = ((cell // 2 + 0.5) * SIZE / 2 + rng.uniform(-3, 3)) * scale
        rgb = tuple(min(255, max(0, v + rng.randint(-15, 15))) for v in COLORS[color])
        if shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=rgb)
        elif shape == "square":
            pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=rgb)
        else:
            n = 3 if shape == "triangle" else 10  # a star's corners lie on two circles in turn
            radii = [r if n == 3 or i % 2 == 0 else 0.45 * r for i in range(n)]
            pen.polygon([(x + q * math.sin(2 * math.pi * i / n), y - q * math.cos(2 * math.pi * i / n))
                         for i, q in enumerate(radii)], fill=rgb)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def describe(scene):
    """All objects in reading order: "a red circle and a blue star"."""
    return " and ".join(f"a {color} {shape}" for color, shape in scene.values())


def ask(rng, scene, kind):
    """One question of this kind that the scene can answer: (question, x, y), or None if the scene has none.

    x is what the question is about, y the right answer in words. For the two MMAlign kinds x is the false sentence.
    """
    wording, objects = rng.choice(QUESTIONS[kind]), list(scene.values())
    colors, shapes = [c for c, _ in objects], [s for _, s in objects]
    if kind in ("color", "shape"):  # ask for one by the other, where that other stands only once
        known, asked = (shapes, colors) if kind == "color" else (colors, shapes)
        once = [i for i, word in enumerate(known) if known.count(word) == 1]
        if not once:
            return None
        i = rng.choice(once)
        x, y = known[i], asked[i]
    elif kind == "count":
        things = {"things": len(objects), **{f"{s}s": shapes.count(s) for s in SHAPES},
                  **{f"{c} things": colors.count(c) for c in COLORS}}
        n = rng.choice(sorted(set(things.values())))  # every count about equally often
        x, y = rng.choice([t for t, count in things.items() if count == n]), NUMBERS[n]
    elif kind == "existence":
        y = rng.choice(("yes", "no"))
        absent = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in objects and (c in colors or s in shapes)]
        x = " ".join(rng.choice(objects if y == "yes" else absent))
    elif kind == "place":
        cell, thing = rng.choice(list(scene.items()))
        x, y = " ".join(thing), PLACES[cell]
    elif kind == "description":
        x, y = "", describe(scene)
    elif kind in LIST_KINDS:
        words = [(color, shape, PLACES[cell]) for cell, (color, shape) in scene.items()]
        if kind == "by shape":
            words = [(shape, color, place) for color, shape, place in words]
        order = list(COLORS) if kind == "by color" else SHAPES
        x, y = "", " and ".join(" ".join(w) for w in sorted(words, key=lambda w: order.index(w[0])))
    else:
        pair = align_sentences(rng, scene, kind)
        if pair is None:
            return None
        y, x = pair
        a, b = (x, y) if rng.random() < 0.5 else (y, x)
        return wording.format(a=a, b=b), x, y
    return wording.format(x=x), x, y


def align_sentences(rng, scene, kind):
    """(true, false): the same words in another order, as in ARO and the paper's MMAlign; None if there are none."""
    cells = list(scene)
    pairs = [(a, b) for a in cells for b in cells if scene[a][0] != scene[b][0] and scene[a][1] != scene[b][1]]
    if kind == "relation":  # neighbours in a row or a column, told apart by their shapes alone
        shapes = [s for _, s in scene.values()]
        pairs = [(a, b) for a, b in pairs if (a % 2 == b % 2) != (a // 2 == b // 2)
                 and shapes.count(scene[a][1]) == shapes.count(scene[b][1]) == 1]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    (color_a, shape_a), (color_b, shape_b) = scene[a], scene[b]
    if kind == "attribute":
        true, false = (f"a {p} {shape_a} and a {q} {shape_b}" for p, q in ((color_a, color_b), (color_b, color_a)))
        # Both sentences must not hold at once: the swapped objects may stand in the scene too.
        return None if {(color_b, shape_a), (color_a, shape_b)} & set(scene.values()) else (true, false)
    word = ("left of" if a < b else "right of") if a // 2 == b // 2 else ("above" if a < b else "below")
    return f"a {shape_a} {word} a {shape_b}", f"a {shape_b} {word} a {shape_a}"


def word_answer(rng, kind, x, y):
    """The answer y in one of its wordings."""
    return rng.choice(NO_ANSWERS if y == "no" else ANSWERS[kind]).format(x=x, y=y)


def wrong(rng, scene, kind, y):
    """A wrong but plausible answer of the same kind: what an annotator who looked at another picture would write."""
    if kind == "description":
        other = scene
        while describe(other) == y:
            other = draw_scene(rng, held_out=False)
        return describe(other)
    return rng.choice([word for word in CLASSES[kind] if word != y])


def draw_question(rng, scene, kinds, noise=0.0):
    """One question about the scene: {"kind", "question", "answer", "label"} (and "false", MMAlign's wrong sentence).

    None if the scene has none of these kinds (existence and description always go).
    `label` is always the right answer in words; with probability `noise` the answer that is trained on states another.
    """
    kinds = rng.sample(kinds, len(kinds))  # not every scene has every kind: the first that goes
    kind, asked = next(((k, a) for k in kinds if (a := ask(rng, scene, k)) is not None), (None, None))
    if asked is None:
        return None
    question, x, y = asked
    stated = wrong(rng, scene, kind, y) if rng.random() < noise else y
    sample = {"kind": kind, "question": question, "answer": word_answer(rng, kind, x, stated), "label": y}
    return {**sample, "false": x} if kind in ALIGN_KINDS else sample


def draw_sentence(rng):
    """Something to say or to repeat without a picture: a question of any kind, or a description."""
    sample = draw_question(rng, draw_scene(rng, held_out=False), 2 * KINDS + ALIGN_KINDS)
    return sample["answer"] if rng.random() < 0.25 else sample["question"]


def vocabulary():
    """All words of the built-in world, sorted."""
    sentences = [s for wordings in (*QUESTIONS.values(), *ANSWERS.values(), NO_ANSWERS) for s in wordings]
    sentences += [INSTRUCTION, *COLORS, *SHAPES, *(f"{s}s" for s in SHAPES), *PLACES, *NUMBERS]
    sentences += ["yes no", "things", "a and", "left of", "right of", "above below"]
    return sorted({word for s in sentences for word in s.split() if "{" not in word})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="which scene")
    parser.add_argument("--out", default="scene.png", help="where the picture goes")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    scene = draw_scene(rng, held_out=False)
    render(rng, scene).resize((512, 512), Image.Resampling.NEAREST).save(args.out)
    print(f"{args.out}: {describe(scene)}")
    for kind in KINDS + ALIGN_KINDS:
        asked = ask(rng, scene, kind)
        if asked is not None:
            question, x, y = asked
            print(f"  {kind:12} {question}?  {word_answer(rng, kind, x, y)}")
