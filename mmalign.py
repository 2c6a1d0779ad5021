"""MMAlign: which of two sentences about a picture is right, when asked in writing and aloud?

    python mmalign.py                                          # base, after alignment and every alpha of seed 0
    python mmalign.py runs/shapes/vision-audio-a*-s[012]       # any runs; those that differ by seed alone are averaged
    python mmalign.py build --relation visual_genome_relation.json --attribution visual_genome_attribution.json \\
                            --images DIR --out mmalign         # the paper's benchmark, made from ARO's files
    python mmalign.py RUN [RUN ...] --data mmalign             # asked of any runs

The benchmark asks for relations ("a star left of a circle" or "a circle left of a star") and for attributes ("a red
star and a blue circle" or "a blue star and a red circle"): the words are the same, so that only who looks at the
picture can tell. In the built-in world the questions stand in the test part beside the other kinds. They are not among
the spoken questions that `vision-audio` trains on, so what a run can do here it has carried over.

`build` takes the pairs of sentences from ARO (Yuksekgonul et al., ICLR 2023, arXiv 2210.01936), as the paper does
(arXiv 2503.00059, section 3.2): 300 relations and 300 attributes, two captions in one question, its speech, the right
one as answer. The rest is our own construction, as the paper is silent: which rows (drawn by the seed, no symmetric
relation), pictures cut to ARO's box, the wording, the true sentence first in exactly half of each kind, espeak-ng's
held-out voices, and what counts as an answer (`judge`). Its numbers are therefore near the paper's, not the same test.

Right is a reply that names the true sentence and not the false one. Who picks one of the two blindly is right half of
the time; who says anything else is wrong, and with --data also counted as not answered.
"""

import argparse
import functools
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

import data
import faults
import shapes
import sources
from faults import BadInput

QUESTION = 'Which of the following two sentences correctly describes the image? "{}" or "{}"'
# Relations of Visual Genome that hold, or nearly always hold, in both directions: with the objects swapped the "false"
# sentence is true as well. Our own list; ARO's authors leave such relations out of their averages, too.
BESIDE = ("near", "near to", "next to", "by", "beside", "with", "around", "close to", "alongside", "along", "against",
          "among", "across from", "opposite", "on the side of", "to the side of")
SYMMETRIC = (*BESIDE, *(f"{posture} {beside}" for posture in ("standing", "sitting", "lying", "laying", "walking",
                                                              "parked", "placed", "growing") for beside in BESIDE),
             "nearby", "adjacent to", "along with", "together with", "on side of", "at the side of",
             "side by side with", "touching", "connected to", "attached to", "joined to", "mixed with", "intersecting",
             "facing", "aligned with", "level with", "away from", "far from", "apart from", "same as", "matching",
             "similar to", "different from", "playing with", "talking to", "talking with", "meeting", "hugging",
             "kissing", "holding hands with", "shaking hands with", "dancing with", "fighting", "fighting with", "and")
# A reply that points at a sentence and does not say it. Letters must be capitals: "a" alone is an answer cut short.
POINTED = re.compile(r"(?:(?i:the|sentence|option) )?(?:((?i:first)|1|A)|((?i:second)|2|B))(?: (?i:sentence|one))?"
                     r"(?i: is (?:the )?(?:right|correct)(?: one| sentence)?| correctly describes the image)?")


# ---- judging -------------------------------------------------------------------------------------------------------


def plain(text):
    """The text's words with single blanks between them, no punctuation."""
    return " ".join(re.findall(r"[^\W_]+", text))


def judge(answer, question, true, false):
    """Is a reply "right" or "wrong"? None if it names neither sentence, or both. One rule for all of MMAlign.

    Upper case and punctuation do not matter, and an exact echo of the question answers nothing. A reply may also point
    at a sentence ("the first", "sentence 2", "B"), if it says nothing else: the question tells which stands first.
    """
    asked, true, false = (plain(text).lower() for text in (question, true, false))
    said = re.sub(re.escape(asked), " ", plain(answer), flags=re.IGNORECASE)
    pointed = POINTED.fullmatch(said.strip())
    if pointed:
        true_is_first = asked.find(true) < asked.find(false)
        return "right" if (pointed[1] is not None) == true_is_first else "wrong"
    if (true in said.lower()) == (false in said.lower()):
        return None
    return "right" if true in said.lower() else "wrong"


def answered(rows, form):
    """Further lines of eval.py's table: percent of replies that name a sentence, and percent right among those."""
    verdicts = [judge(row[form], row["question"], row["label"], row["false"]) for row in rows]
    named = [verdict for verdict in verdicts if verdict is not None]
    lines = {"answered": 100 * len(named) / len(verdicts)}
    return lines | {"right if answered": 100 * named.count("right") / len(named)} if named else lines


# ---- building ------------------------------------------------------------------------------------------------------


def aro_row(row, kind):
    """(picture, box (x, y, w, h), true sentence, false sentence) of a row of ARO; BadInput if it can't be used."""
    try:
        image, true, false = (row[key].strip() for key in ("image_path", "true_caption", "false_caption"))
        box = tuple(round(row[f"bbox_{side}"]) for side in "xywh")
        relation = row["relation_name"].strip().lower() if kind == "relation" else ""
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise BadInput(f"not a row of ARO: {error!r}") from None
    if relation in SYMMETRIC:
        raise BadInput(f"the relation is symmetric: {relation}")
    a, b = plain(true).lower(), plain(false).lower()
    if a in b or b in a:
        raise BadInput("one sentence contains the other")
    if len(QUESTION.format(true, false)) > sources.LONGEST_QUESTION:
        raise BadInput(f"the question has more than {sources.LONGEST_QUESTION} characters")
    if min(box[2:]) < 1:
        raise BadInput("the box has no area")
    return image, box, true, false


def usable(path, kind):
    """([(name, row by aro_row)], skipped): the rows of one of ARO's files that can be used, as far as they tell."""
    rows, kept, skipped = data.read_json(path, list), {}, []
    for number, row in enumerate(rows):
        name = f"{kind}-{number:06}"
        try:
            row = aro_row(row, kind)
            if row in kept:
                raise BadInput(f"the same as an earlier row: {kept[row]}")
            kept[row] = name
        except BadInput as error:
            skipped.append({"id": name, "skipped": str(error)})
    return [(name, row) for row, name in kept.items()], skipped


def cropped(images, name, box):
    """The part of a picture in the box, as ARO cuts it, but not beyond the picture's border (ARO has black there)."""
    if Path(name).is_absolute() or ".." in Path(name).parts or not os.path.isfile(images / name):
        raise BadInput(f"the picture is missing: {name}")
    try:
        image = data.load_image(images / name)
    except BadInput as error:
        raise BadInput(f"the picture is broken: {error}") from None
    x, y, w, h = box
    left, top, right, bottom = max(0, x), max(0, y), min(image.width, x + w), min(image.height, y + h)
    if left >= right or top >= bottom:
        raise BadInput(f"the box lies outside the picture: {box}")
    return image.crop((left, top, right, bottom))


def draw(path, kind, images, folder, n, seed):
    """(n lines for samples.jsonl, skipped) from one of ARO's files; only as many pictures are opened as it takes.

    A hash of seed and row puts the rows in order, and the first n that have a picture are taken. So neither the file's
    order nor a row that cannot be used changes which others come first.
    """
    rows, skipped = usable(path, kind)
    lines = []
    for name, row in sorted(rows, key=lambda named: random.Random(f"{seed}/{named[1]}").random()):
        if len(lines) == n:
            break
        (image, box, true, false), kept = row, f"images/{name}.png"
        try:
            data.save_png(folder / kept, cropped(images, image, box))
        except BadInput as error:
            skipped.append({"id": name, "skipped": str(error)})
            continue
        pair = (false, true) if len(lines) % 2 else (true, false)
        name += f"-{1 + pair.index(true)}"  # which is true: speech kept under this name never asks in the other order
        lines.append({"id": name, "image": kept, "question": QUESTION.format(*pair), "audio": f"audio/{name}.flac",
                      "answer": true, "kind": kind, "label": true, "false": false})
    if len(lines) < n:
        reasons = Counter(row["skipped"].split(":")[0] for row in skipped).most_common()
        raise BadInput(f"{path}: {len(lines)} rows can be used, {n} are needed; the others: "
                       + (", ".join(f"{count} x {why}" for why, count in reasons) or "none"))
    return lines, skipped


def speak_line(line, folder, seed):
    """Worker: one question spoken by espeak-ng with a voice that is never trained on, unless it is there."""
    rng = random.Random(f"{seed}/{line['id']}")
    speech = data.save_speech(folder, line["id"], rng, line["question"], data.HELD_OUT_VOICES, rates=(140, 220))
    return {**line, **speech}


def build(args):
    """MMAlign from ARO's two files as a prepared folder, relations and attributes in turn; what is there is kept."""
    folder = Path(args.out)
    if args.n % 2:
        raise BadInput(f"--n must be even, as the true sentence stands first in half of the questions, not {args.n}")
    data.make_once(folder, data.told(args), functools.partial(make, args, folder))


def make(args, folder):
    """Draws, crops and speaks what `build` is asked for."""
    drawn = [draw(path, kind, Path(args.images), folder, args.n, args.seed)
             for path, kind in ((args.relation, "relation"), (args.attribution, "attribute"))]
    lines = [line for pair in zip(*(lines for lines, _ in drawn)) for line in pair]
    if args.tts == "mms":
        spoken = tqdm(sources.speak_mms(lines, folder, args.seed, args.voice), total=len(lines), desc="speech")
    else:
        spoken = sources.in_parallel(functools.partial(speak_line, folder=folder, seed=args.seed), lines, "speech")
    lines = list(spoken)
    for line in lines:
        if "skipped" in line:  # one question less, and the halves would not be equal any more
            raise BadInput(f"{line['id']} cannot be spoken: {line['skipped']}")
    sources.write(folder, [*lines, *(row for _, skipped in drawn for row in skipped)])


def build_arguments():
    """The arguments of `build`."""
    parser = argparse.ArgumentParser(prog="mmalign.py build", description="MMAlign from ARO's files")
    parser.add_argument("--relation", required=True, help="ARO's visual_genome_relation.json")
    parser.add_argument("--attribution", required=True, help="ARO's visual_genome_attribution.json")
    parser.add_argument("--images", required=True, help="the folder of their pictures (unpacked vgr_vga_images.zip)")
    parser.add_argument("--out", required=True, help="the prepared folder")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and the voices")
    parser.add_argument("--n", type=data.at_least_one, default=300, help="questions of each kind, an even number")
    parser.add_argument("--tts", choices=("espeak", "mms"), default="espeak", help="who speaks")
    parser.add_argument("--voice", default="facebook/mms-tts-eng", help="folder or hub id of the MMS voice")
    return parser


if __name__ == "__main__":
    with faults.readable_errors():
        if sys.argv[1:2] == ["build"]:
            build(build_arguments().parse_args(sys.argv[2:]))
        else:
            import eval  # here, because eval.py imports this file for its judge

            args = eval.arguments(__doc__).parse_args()
            eval.report(args, shapes.ALIGN_KINDS, "MMAlign mean", answered if args.data else None)
