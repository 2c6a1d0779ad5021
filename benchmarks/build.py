"""One of the paper's seven benchmarks as a prepared folder, its questions written and spoken.

    python -m benchmarks.build MME.tsv --out prepared/MME                     # by espeak-ng
    python -m benchmarks.build MME.tsv --out prepared/MME --run RUN           # as RUN was trained
    python eval.py RUN RUN --bench prepared/MME prepared/DocVQA_VAL           # asks and scores

The file is VLMEvalKit's. --run takes voice, format suffixes and prompts from a run's training. A
benchmark is asked as a whole: what an MMS voice cannot say, espeak-ng says, long questions faster.
"""

import argparse
import functools
import hashlib
from pathlib import Path

from benchmarks.questions import image_of, prompt, read_tsv
from benchmarks.scorers import BENCHMARKS, score
from plumbing import prepared
from plumbing.files import BadInput, at, in_range, readable_errors
from plumbing.media import MAX_SECONDS, SAMPLE_RATE, VOICES, save_png, save_sound, speak
from real import speech
from real.families import CHATS, QWEN2_VL

SPEEDS = (175, 260, 350, 450)  # words a minute: long questions are spoken faster
# As VLMEvalKit had them in July 2024: InternVL2's tiles; the area of Qwen2-VL's pictures
VLMEVALKIT_TILES = {"ChartQA_TEST": 12, "DocVQA_VAL": 18, "InfoVQA_VAL": 24}  # others 6
QWEN2_VL_TILES = {"min_tiles": 5, "max_tiles": 64}


def make_line(name, row, benchmark, folder, chat, suffix):
    """Writes a row's picture and returns its line; "row" keeps the cells that its score needs."""
    question, rest = prompt(benchmark, row, chat)
    image = hashlib.sha256(row["image"].encode()).hexdigest()[:16]  # several rows may share it
    with at(row["where"]):
        save_png(folder / f"images/{image}.png", image_of(row))
    cells = {key: cell for key, cell in row.items() if key not in ("image", "where")}
    line = {"id": name, "image": f"images/{image}.png", "audio": f"audio/{name}.flac",
            "question": question if suffix == "dropped" else question + rest,
            "answer": row["answer"], "row": {"image_path": image, **cells}}
    return line | ({"after": rest} if suffix == "written" and rest else {})


def speak_line(name, line, folder, voice):
    """Speaks a line's question by espeak-ng, unless it is there, a long one faster."""
    path = folder / line["audio"]
    if not path.exists():
        for words_per_minute in SPEEDS:
            wave, _ = speak(speech.spoken_text(line), voice, words_per_minute)  # (samples,)
            if len(wave) <= MAX_SECONDS * SAMPLE_RATE:
                break
        save_sound(path, wave)  # refuses one that is still too long
    return line


def make(args):
    """Makes the folder args.out."""
    benchmark, folder = Path(args.tsv).stem, Path(args.out)
    rows, dropped = read_tsv(args.tsv)
    rows = rows[: args.n]
    score(benchmark, rows)  # what cannot be scored is refused before it is asked
    if dropped:
        print(f"{args.tsv}: {dropped} rows without a picture are left out, as VLMEvalKit does")
    lines = [make_line(f"{number:06}", row, benchmark, folder, args.chat, args.suffix)
             for number, row in enumerate(rows)]

    left, voice = lines, args.voice
    if args.tts == "mms":
        spoken = list(speech.speak_mms(lines, folder, args.seed, args.voice))
        skipped = {line["id"] for line in spoken if "skipped" in line}
        left, voice = [line for line in lines if line["id"] in skipped], VOICES[0]
        print(f"{len(left)} of {len(lines)} questions are said by espeak-ng, as MMS cannot")
    say = functools.partial(prepared.attempt, speak_line, folder=folder, voice=voice)
    for line in prepared.in_parallel(say, [(line["id"], line) for line in left], "speech"):
        if "skipped" in line:
            raise BadInput(f"{args.tsv}: {line['id']}: {line['skipped']}")
    prepared.write(folder, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("tsv", help=f"one of {', '.join(BENCHMARKS)}, .tsv")
    add("--out", required=True, help="the prepared folder")
    add("--n", type=in_range(1), help="take only the first so many questions")
    add("--seed", type=in_range(0, 2**32), default=0, help="of an MMS voice")
    add("--run", help="a run: its --tts, --voice, --suffix and --chat, where they are not given")
    add("--chat", choices=CHATS, help="whose wording (default: InternVL2's)")
    add("--suffix", choices=["spoken", "written", "dropped"], help="options and format behind a "
        "question: spoken, in writing after the speech, or left out (default: spoken)")
    add("--vlmevalkit-tiles", action="store_true", help="ask with pictures cut as VLMEvalKit cut "
        "them: into 6 to 24 tiles, or a Qwen2-VL's area of 5 to 64 (default: as in training)")
    speech.add_voice_arguments(add, None)
    args = parser.parse_args()
    benchmark = Path(args.tsv).stem
    if benchmark not in BENCHMARKS:
        parser.error(f"no such benchmark: {args.tsv}")
    told = speech.take_from_run(args, chat="Hermes-2", suffix="spoken", tts="espeak")
    trained = told.get("voice") if args.tts == told.get("tts") else None
    args.voice = args.voice or trained or {"mms": speech.MMS_VOICE, "espeak": VOICES[0]}[args.tts]

    # The folder tells the tiles, and eval.py cuts the pictures so.
    if args.vlmevalkit_tiles:
        args.max_tiles = VLMEVALKIT_TILES.get(benchmark, 6)
        if CHATS[args.chat] == QWEN2_VL:
            vars(args).update(QWEN2_VL_TILES)
    del args.vlmevalkit_tiles
    prepared.prepare(args, make)


if __name__ == "__main__":
    with readable_errors():
        main()
