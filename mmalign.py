"""MMAlign: which of two sentences about a picture is right, asked as text and as speech?

    python mmalign.py                                       # base, aligned, every alpha of seed 0
    python mmalign.py runs/shapes/vision-audio-a*-s[012]    # any runs; seeds are averaged
    python mmalign.py build --relation visual_genome_relation.json \\
        --attribution visual_genome_attribution.json --images DIR --out mmalign --run RUN
    python mmalign.py RUN [RUN ...] --data mmalign          # the benchmark, asked of any runs

The benchmark asks for relations ("a star left of a circle" or "a circle left of a star") and for
attributes ("a red star and a blue circle" or "a blue star and a red circle"). Both sentences have
the same words, so only the picture tells which is right. In the built-in world the questions stand
in the test part beside the other kinds ("star left of circle or circle left of star"). About one in
13 spoken questions of `vision-audio` is of these kinds.

`build` takes the pairs of sentences from ARO (Yuksekgonul et al., ICLR 2023, arXiv 2210.01936), as
the paper does (section 3.2): 300 relations and 300 attributes, two captions in a spoken question.
The rest is our own, as the paper is silent: which rows (drawn by the seed, no symmetric relation),
pictures cut to ARO's box, the wording, the true sentence first in exactly half of each kind, who
speaks (who spoke in RUN's training; without --run and --tts, espeak-ng's held-out voices), and what
counts as an answer (`judge`). So its numbers are near the paper's, but not of the same test.

An answer is right if it names the true sentence and not the false one. Who picks one of the two
blindly is right half of the time. With --data, the table also says how many name one at all.
"""

import argparse
import random
import re
import sys
from pathlib import Path

from eval import arguments, report
from plumbing import prepared
from plumbing.files import BadInput, at, in_range, read_json, readable_errors
from plumbing.media import HELD_OUT_VOICES, load_image, save_png
from real import speech
from world import shapes

QUESTION = 'Which of the following two sentences correctly describes the image? "{}" or "{}"'
# Relations that hold, or nearly always hold, in both directions: with the objects swapped, the
# "false" sentence is true as well. Our own list; ARO's authors leave such relations out, too.
BESIDE = ("near", "near to", "next to", "by", "beside", "with", "around", "close to", "alongside",
          "along", "against", "among", "across from", "opposite", "on the side of",
          "to the side of")
POSTURES = ("standing", "sitting", "lying", "laying", "walking", "parked", "placed", "growing")
SYMMETRIC = (
    *BESIDE, *(f"{posture} {beside}" for posture in POSTURES for beside in BESIDE),
    "nearby", "adjacent to", "along with", "together with", "on side of", "at the side of",
    "side by side with", "touching", "connected to", "attached to", "joined to", "mixed with",
    "intersecting", "facing", "aligned with", "level with", "away from", "far from", "apart from",
    "same as", "matching", "similar to", "different from", "playing with", "talking to",
    "talking with", "meeting", "hugging", "kissing", "holding hands with", "shaking hands with",
    "dancing with", "fighting", "fighting with", "and")
# A reply that points at a sentence. Letters must be capitals: "a" alone is an answer cut short.
POINTED = re.compile(r"""
    (?:(?i:the|sentence|option)\ )?                   # "the", "sentence"
    (?:((?i:first)|1|A)|((?i:second)|2|B))            # group 1: the first one; group 2: the second
    (?:\ (?i:sentence|one))?                          # "first sentence"
    (?i:\ is\ (?:the\ )?(?:right|correct)(?:\ one|\ sentence)?  # "is the right one"
       |\ correctly\ describes\ the\ image)?          # or in the question's words
    """, re.VERBOSE)


# ---- judging -------------------------------------------------------------------------------------


def plain(text):
    """Returns the text's words with single blanks between them, without punctuation."""
    return " ".join(re.findall(r"[^\W_]+", text))


def judge(answer, question, true, false):
    """Judges a reply: "right", "wrong", or None if it names neither sentence, or both.

    Upper case and punctuation do not matter, and an exact echo of the question answers nothing. A
    reply may also point at a sentence ("the first", "sentence 2", "B"), if it says nothing else.
    """
    question, true, false = (plain(text).lower() for text in (question, true, false))
    answer = re.sub(re.escape(question), " ", plain(answer), flags=re.IGNORECASE).strip()
    pointed = POINTED.fullmatch(answer)
    if pointed:
        true_is_first = question.find(true) < question.find(false)
        named_first = pointed[1] is not None
        return "right" if named_first == true_is_first else "wrong"

    if (true in answer.lower()) == (false in answer.lower()):
        return None
    return "right" if true in answer.lower() else "wrong"


def verdict(sample, answer):
    """Judges the answer to a sample."""
    return judge(answer, sample["question"], sample["label"], sample["false"])


def means_right(sample, answer):
    """Tells whether an answer is right by its meaning: "a above b" is "b below a", too."""
    texts = []
    for text in (answer, sample["question"], sample["label"], sample["false"]):
        text = re.sub(r"(\w+) right of (\w+)", r"\2 left of \1", text)
        texts.append(re.sub(r"(\w+) below (\w+)", r"\2 above \1", text))
    return judge(*texts) == "right"


def score_reply(sample, answer):
    """Returns 1 for a right answer, else 0."""
    return float(verdict(sample, answer) == "right")


def answer_rates(rows, form):
    """Returns further rows of the table: how many replies name a sentence, and are right then."""
    verdicts = [verdict(row, row[form]) for row in rows]
    named = [v for v in verdicts if v is not None]
    rates = {"answered": 100 * len(named) / len(verdicts)}
    if named:
        rates["right if answered"] = 100 * named.count("right") / len(named)
    if "scene" in rows[0]:  # the built-in world's sentences have one grammar
        right = sum(means_right(row, row[form]) for row in rows)
        rates["right by meaning"] = 100 * right / len(rows)
    return rates


# ---- building ------------------------------------------------------------------------------------


def aro_row(row, kind):
    """Returns (picture, box (x, y, w, h), true sentence, false one). Raises BadInput if unfit."""
    with at("not a row of ARO"):
        texts = ("image_path", "true_caption", "false_caption")
        image, true, false = (row[key].strip() for key in texts)
        box = tuple(round(row[f"bbox_{side}"]) for side in "xywh")
        relation = row["relation_name"].strip().lower() if kind == "relation" else ""

    a, b = plain(true).lower(), plain(false).lower()
    if relation in SYMMETRIC:
        raise BadInput(f"the relation is symmetric: {relation}")
    if a in b or b in a:
        raise BadInput("one sentence contains the other")
    if len(QUESTION.format(true, false)) > speech.LONGEST_QUESTION:
        raise BadInput(f"the question has more than {speech.LONGEST_QUESTION} characters")
    if min(box[2:]) < 1:
        raise BadInput("the box has no area")
    return image, box, true, false


def usable_rows(path, kind):
    """Returns ({row by aro_row: its name}, skipped lines) of one of ARO's files."""
    rows, skipped = {}, []
    with at(path):
        all_rows = list(read_json(path))
    for number, row in enumerate(all_rows):
        name = f"{kind}-{number:06}"
        try:
            row = aro_row(row, kind)
            if row in rows:
                raise BadInput(f"the same as an earlier row: {rows[row]}")
            rows[row] = name
        except BadInput as error:
            skipped.append({"id": name, "skipped": str(error)})
    return rows, skipped


def crop(images, name, box):
    """Returns a picture's part in the box, but nothing beyond its border (ARO has black there)."""
    prepared.check_inside(images, name)
    with at("the picture is broken"):
        image = load_image(images / name)
    x, y, w, h = box
    left, top = max(0, x), max(0, y)
    right, bottom = min(image.width, x + w), min(image.height, y + h)
    if left >= right or top >= bottom:
        raise BadInput(f"the box lies outside the picture: {box}")
    return image.crop((left, top, right, bottom))


def pick_rows(path, kind, args):
    """Returns (args.n lines for samples.jsonl, skipped lines) from one of ARO's files.

    A hash of the seed and the row puts the rows in order, and the first n that have a picture, and
    that the voice can say, are taken. So neither the file's order nor an unusable row changes which
    others come first.
    """
    rows, skipped = usable_rows(path, kind)
    lines = []
    for row in sorted(rows, key=lambda row: random.Random(f"{args.seed}/{row}").random()):
        if len(lines) == args.n:
            break
        task = rows[row], *row
        line = prepared.attempt(make_line, task, kind=kind, is_swapped=len(lines) % 2, args=args)
        (skipped if "skipped" in line else lines).append(line)
    if len(lines) < args.n:
        reasons = [f"{count} x {why}" for why, count in prepared.count_reasons(skipped)]
        raise BadInput(f"{path}: {len(lines)} rows can be used, {args.n} are needed; the others: "
                       f"{', '.join(reasons) or 'none'}")
    return lines, skipped


def make_line(name, image, box, true, false, kind, is_swapped, args):
    """Cuts out a row's picture and returns its line. is_swapped: the false sentence stands first"""
    pair = (false, true) if is_swapped else (true, false)
    question = QUESTION.format(*pair)
    if args.tts == "mms":
        speech.in_words(question)  # raises BadInput if the voice cannot say it
    save_png(Path(args.out) / f"images/{name}.png", crop(Path(args.images), image, box))

    # The id says where the true sentence stands: speech that lies there under this name never asks
    # in the other order.
    spoken = f"{name}-{1 + pair.index(true)}"
    return {"id": spoken, "image": f"images/{name}.png", "question": question,
            "audio": f"audio/{spoken}.flac", "answer": true, "kind": kind, "label": true,
            "false": false}


def build(args):
    """Makes MMAlign from ARO's files: relations and attributes in turn, cut out and spoken."""
    relations, skipped = pick_rows(args.relation, "relation", args)
    attributes, also_skipped = pick_rows(args.attribution, "attribute", args)
    lines = [line for pair in zip(relations, attributes) for line in pair]
    lines = speech.speak_all(lines, Path(args.out), args, HELD_OUT_VOICES)
    for line in lines:
        if "skipped" in line:  # with one question less, the halves would not be equal any more
            raise BadInput(f"{line['id']} cannot be spoken: {line['skipped']}")
    prepared.write(Path(args.out), [*lines, *skipped, *also_skipped])


def build_arguments(words):
    """Reads the command line of `build`."""
    parser = argparse.ArgumentParser(prog="mmalign.py build", description="MMAlign from ARO")
    add = parser.add_argument
    add("--relation", required=True, help="ARO's visual_genome_relation.json")
    add("--attribution", required=True, help="ARO's visual_genome_attribution.json")
    add("--images", required=True, help="folder of their pictures (unpacked vgr_vga_images.zip)")
    add("--out", required=True, help="the prepared folder")
    add("--seed", type=in_range(0, 2**48), default=0, help="of the draw and the voices")
    add("--n", type=in_range(2), default=300, help="questions of each kind, an even number")
    add("--run", help="a run: who spoke in its training speaks here (--tts, --voice override)")
    speech.add_voice_arguments(add, None)
    args = parser.parse_args(words)
    speech.take_from_run(args, tts="espeak", voice=speech.MMS_VOICE)
    if args.n % 2:
        parser.error(f"--n must be even: the true sentence stands first in half, not {args.n}")
    return args


def main():
    if sys.argv[1:2] == ["build"]:
        args = build_arguments(sys.argv[2:])
        prepared.prepare(args, build)
    else:
        args = arguments(__doc__).parse_args()
        report(args, shapes.ALIGN_KINDS, "MMAlign mean", score_reply, answer_rates)


if __name__ == "__main__":
    with readable_errors():
        main()
