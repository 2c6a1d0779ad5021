"""The built-in world: small pictures, questions about them, and answers that can be checked.

A scene is a 2 x 2 grid with two or three objects, each a colour and a shape. There are six kinds of
question (KINDS), and two in the manner of the paper's MMAlign (ALIGN_KINDS): which of two sentences
is right? Questions and answers come in several wordings, so that a teacher's distribution over
answers says more than one word. All of it is drawn from a seed. To see one scene:

    python -m world.shapes --seed 7 --out scene.png
"""

import argparse
import hashlib
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = {"red": (225, 50, 45), "green": (40, 170, 70), "blue": (50, 90, 225),
          "yellow": (240, 210, 50), "purple": (150, 60, 190), "white": (245, 245, 245)}
SHAPES = ("circle", "square", "triangle", "star")
# The cells, in reading order; each name is one token.
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
NUMBERS = ("zero", "one", "two", "three")
KINDS = ("color", "shape", "count", "existence", "place", "description")
ALIGN_KINDS = ("relation", "attribute")
# In vision-text only: long answers that list everything in the picture train the vision encoder.
LIST_KINDS = ("by shape", "by color", "by side", "by number")
# The mix of question types in vision-text: harder types are asked more often.
BASE_KINDS = (("shape", "description", "by side") + 3 * ("color",)
              + 4 * ("attribute", "relation", "place") + 5 * ("existence", "count"))
CLASSES = {"color": tuple(COLORS), "shape": SHAPES, "count": NUMBERS, "existence": ("yes", "no"),
           "place": PLACES}  # the words that an answer of each kind may have
INSTRUCTION = "say it again"  # follows what is to be repeated (text) or transcribed (speech)
SIZE = 64  # pixels, both ways

QUESTIONS = {
    "color": ("what color is the {x}", "which color does the {x} have",
              "tell me the color of the {x}", "which color is the {x}",
              "say what color the {x} is"),
    "shape": ("what shape is the {x} one", "which shape does the {x} one have",
              "tell me the shape of the {x} one", "which shape is the {x} one",
              "say what shape the {x} one is"),
    "count": ("how many {x} are there", "how many {x} do you see", "count the {x}"),
    "existence": ("is there a {x}", "do you see a {x}", "does the picture show a {x}"),
    "place": ("where is the {x}", "in which corner is the {x}", "tell me where the {x} is"),
    "description": ("describe the picture", "what do you see", "tell me what the picture shows",
                    "say what the picture shows", "what does the picture show",
                    "describe what you see", "tell me what you see", "what is in the picture"),
    "by shape": ("list the shapes",),
    "by color": ("list the colors",),
    "by side": ("list {x}",),
    "by number": ("list the numbers",),
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
    "by side": ("{y}",),
    "by number": ("{y}",),
    "relation": ("{y}", "it is {y}", "i see {y}"),
    "attribute": ("{y}", "it is {y}", "i see {y}"),
}
NO_ANSWERS = ("no", "no there is not", "no i do not")  # existence, when the answer is no
# Paraphrases: correct and in the vocabulary, but in word orders that the base never produces. A
# share of the vision-audio labels uses them (world/make.py).
PARAPHRASES = ("what the picture shows is {y}", "in the picture you see {y}",
               "you do see {y} there")


def is_held_out(thing):
    """Tells whether a scene or a sentence is held out: one in eight, by a hash of its content."""
    # Training uses no such scene and speaks no such sentence. A hash needs no list.
    return hashlib.sha256(str(thing).encode()).digest()[0] % 8 == 0


# ---- pictures ------------------------------------------------------------------------------------


def draw_scene(rng, held_out):
    """Draws a scene {cell: (color, shape)} from the training part or from the held-out part."""
    while True:
        cells = sorted(rng.sample(range(len(PLACES)), rng.randint(2, 3)))
        objects = rng.sample([(c, s) for c in COLORS for s in SHAPES], len(cells))
        scene = dict(zip(cells, objects))
        if is_held_out(scene) == held_out:
            return scene


def render(rng, scene):
    """Returns the scene as a 64 x 64 picture; sizes, positions and colours vary a little."""
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
        else:  # a star's ten corners lie on two circles in turn
            n = 3 if shape == "triangle" else 10
            radii = [r if n == 3 or i % 2 == 0 else 0.45 * r for i in range(n)]
            angles = [2 * math.pi * i / n for i in range(n)]
            pen.polygon([(x + radius * math.sin(angle), y - radius * math.cos(angle))
                         for radius, angle in zip(radii, angles)], fill=rgb)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def describe(scene):
    """Returns all objects in reading order: "a red circle and a blue star"."""
    return " and ".join(f"a {color} {shape}" for color, shape in scene.values())


# ---- questions -----------------------------------------------------------------------------------
# Each function returns (what the question is about, the right answer), or None if the scene has no
# such question. MMAlign's return (false sentence, true sentence).


def ask_by(rng, known, wanted):
    """Asks for an object's one feature by the other, where that other stands only once."""
    once = [i for i, word in enumerate(known) if known.count(word) == 1]
    if not once:
        return None
    i = rng.choice(once)
    return known[i], wanted[i]


def ask_color(rng, scene):
    """Asks for the colour of a shape."""
    colors, shapes = zip(*scene.values())
    return ask_by(rng, shapes, colors)


def ask_shape(rng, scene):
    """Asks for the shape of the object of a colour."""
    colors, shapes = zip(*scene.values())
    return ask_by(rng, colors, shapes)


def ask_count(rng, scene):
    """Asks for a count; each number is the answer about equally often."""
    colors, shapes = zip(*scene.values())
    counts = {"things": len(scene), **{f"{s}s": shapes.count(s) for s in SHAPES},
              **{f"{c} things": colors.count(c) for c in COLORS}}
    n = rng.choice(sorted(set(counts.values())))
    return rng.choice([thing for thing, count in counts.items() if count == n]), NUMBERS[n]


def ask_existence(rng, scene):
    """Asks whether there is an object; an absent one shares a feature with one that is there."""
    objects = list(scene.values())
    colors, shapes = zip(*objects)
    answer = rng.choice(("yes", "no"))
    absent = [(c, s) for c in COLORS for s in SHAPES
              if (c, s) not in objects and (c in colors or s in shapes)]
    return " ".join(rng.choice(objects if answer == "yes" else absent)), answer


def ask_place(rng, scene):
    """Asks in which corner an object is."""
    cell, thing = rng.choice(list(scene.items()))
    return " ".join(thing), PLACES[cell]


def ask_description(rng, scene):
    """Asks for all objects."""
    return "", describe(scene)


def ask_by_shape(rng, scene):
    """Asks for a list, circles first: "circle red top-left and star ..."."""
    things = [(shape, color, PLACES[cell]) for cell, (color, shape) in scene.items()]
    things.sort(key=lambda thing: SHAPES.index(thing[0]))
    return "", " and ".join(map(" ".join, things))


def ask_by_color(rng, scene):
    """Asks for a list, red objects first."""
    things = [(color, shape, PLACES[cell]) for cell, (color, shape) in scene.items()]
    things.sort(key=lambda thing: list(COLORS).index(thing[0]))
    return "", " and ".join(map(" ".join, things))


def ask_by_number(rng, scene):
    """Asks for how many there are of each colour and shape: "two red and one star and ..."."""
    colors, shapes = zip(*scene.values())
    counts = {**{c: colors.count(c) for c in COLORS}, **{s: shapes.count(s) for s in SHAPES}}
    return "", " and ".join(f"{NUMBERS[n]} {word}" for word, n in counts.items() if n)


def differing_pairs(scene):
    """Returns the pairs of cells whose objects have neither colour nor shape in common."""
    return [(a, b) for a in scene for b in scene
            if scene[a][0] != scene[b][0] and scene[a][1] != scene[b][1]]


def side(a, b):
    """Returns on which side of cell b cell a lies; None if they are no neighbours."""
    if a // 2 == b // 2:
        return "left of" if a < b else "right of"
    return ("above" if a < b else "below") if a % 2 == b % 2 else None


def ask_by_side(rng, scene):
    """Asks for all pairs of neighbours in one relation: "star left of circle and ..."."""
    pairs = [(side(a, b), a, b) for a in scene for b in scene if a != b and side(a, b)]
    if not pairs:
        return None
    wanted = rng.choice(pairs)[0]
    return wanted, " and ".join(f"{scene[a][1]} {wanted} {scene[b][1]}"
                                for relation, a, b in pairs if relation == wanted)


def ask_relation(rng, scene):
    """Asks how two neighbours stand, which are told apart by their shapes alone."""
    shapes = [shape for _, shape in scene.values()]
    pairs = [(a, b) for a, b in differing_pairs(scene) if side(a, b)
             and shapes.count(scene[a][1]) == shapes.count(scene[b][1]) == 1]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    first, second, where = scene[a][1], scene[b][1], side(a, b)
    return f"{second} {where} {first}", f"{first} {where} {second}"


def ask_attribute(rng, scene):
    """Asks which colour belongs to which of two shapes."""
    pairs = differing_pairs(scene)
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    (color_a, shape_a), (color_b, shape_b) = scene[a], scene[b]
    # Both sentences must not hold at once: the swapped objects may stand there, too.
    if {(color_b, shape_a), (color_a, shape_b)} & set(scene.values()):
        return None
    return (f"{color_b} {shape_a} and {color_a} {shape_b}",
            f"{color_a} {shape_a} and {color_b} {shape_b}")


ASK = {"color": ask_color, "shape": ask_shape, "count": ask_count, "existence": ask_existence,
       "place": ask_place, "description": ask_description, "by shape": ask_by_shape,
       "by color": ask_by_color, "by side": ask_by_side, "by number": ask_by_number,
       "relation": ask_relation, "attribute": ask_attribute}


def ask(rng, scene, kind):
    """Returns (question, what it is about, right answer) of a kind; None if the scene has none."""
    wording = rng.choice(QUESTIONS[kind])
    result = ASK[kind](rng, scene)
    if result is None:
        return None
    about, answer = result
    if kind not in ALIGN_KINDS:
        return wording.format(x=about), about, answer
    a, b = (about, answer) if rng.random() < 0.5 else (answer, about)
    return wording.format(a=a, b=b), about, answer


def word_answer(rng, kind, about, answer, paraphrase=False):
    """Returns the answer in one of the base's wordings, or as a paraphrase."""
    wordings = NO_ANSWERS if answer == "no" else ANSWERS[kind]
    return rng.choice(PARAPHRASES if paraphrase else wordings).format(x=about, y=answer)


def wrong_answer(rng, scene, kind, answer):
    """Returns a wrong but plausible answer of the same type, as if about another picture."""
    if kind != "description":
        return rng.choice([word for word in CLASSES[kind] if word != answer])
    other = scene
    while describe(other) == answer:
        other = draw_scene(rng, held_out=False)
    return describe(other)


def draw_question(rng, scene, kinds, noise=0.0, paraphrase=0.0):
    """Draws a question about the scene: {"kind", "question", "answer", "label"}, or None.

    noise, paraphrase: probabilities that the training target "answer" is wrong, and that it is a
    paraphrase; "label" is always right
    MMAlign's questions have the wrong sentence as "false". Not every scene has every kind.
    """
    for kind in rng.sample(kinds, len(kinds)):
        result = ask(rng, scene, kind)
        if result is not None:
            break
    else:
        return None
    question, about, label = result

    # Wordings have a generator of their own, so that picture and speech do not depend on them.
    writer, stated = random.Random(rng.random()), label
    if writer.random() < noise:
        stated = about if kind in ALIGN_KINDS else wrong_answer(writer, scene, kind, label)
    is_other = writer.random() < paraphrase
    sample = {"kind": kind, "question": question,
              "answer": word_answer(writer, kind, about, stated, is_other), "label": label}
    return {**sample, "false": about} if kind in ALIGN_KINDS else sample


def draw_sentence(rng, spoken=False):
    """Draws a question or an answer to repeat, or to speak (spoken: never a held-out one)."""
    while True:
        scene = draw_scene(rng, held_out=False)
        sample = draw_question(rng, scene, 2 * KINDS + ALIGN_KINDS)
        sentence = sample["answer"] if rng.random() < 0.25 else sample["question"]
        if not (spoken and is_held_out(sentence)):
            return sentence


def vocabulary():
    """Returns all words of the built-in world, sorted."""
    sentences = [s for wordings in (*QUESTIONS.values(), *ANSWERS.values(), NO_ANSWERS)
                 for s in wordings]
    sentences += [INSTRUCTION, *COLORS, *SHAPES, *(f"{s}s" for s in SHAPES), *PLACES, *NUMBERS]
    sentences += ["yes no", "things", "a and", "left of", "right of", "above below"]
    return sorted({word for s in sentences for word in s.split() if "{" not in word})


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="which scene")
    parser.add_argument("--out", default="scene.png", help="where the picture goes")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    scene = draw_scene(rng, held_out=False)
    image = render(rng, scene).resize((512, 512), Image.Resampling.NEAREST)
    image.save(Path(args.out), format="PNG")
    print(f"{args.out}: {describe(scene)}")
    for kind in KINDS + ALIGN_KINDS:
        result = ask(rng, scene, kind)
        if result is not None:
            question, about, answer = result
            print(f"  {kind:12} {question}?  {word_answer(rng, kind, about, answer)}")


if __name__ == "__main__":
    main()
