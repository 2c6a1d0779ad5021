"""Text to speech by espeak-ng, or by an MMS voice (VITS), which needs numbers in words.

There is nothing to run here: `data.py llava`, `mmalign.py build` and `eval.py --bench` speak by
these functions.
"""

import functools
import random
import re

import torch
from tqdm import tqdm

from plumbing.files import BadInput, at
from plumbing.media import VOICES, resample, save_sound, save_speech
from plumbing.prepared import attempt, in_parallel
from plumbing.processes import default_device
from plumbing.runs import fetch, read_run_info

MMS_VOICE = "facebook/mms-tts-eng"
LONGEST_QUESTION = 400  # characters; saying more would take longer than Whisper's 30 s

# Punctuation that may be dropped before speaking.
SILENT = re.compile(r"[.,;:?!\"()\[\]{}…“”«»‘–—]")
APOSTROPHES = re.compile("[’‘‛ʼ`´′＇]")
# What espeak-ng skips or misreads: "chinese letter", or 10 000 as ten zero zero zero.
UNREAD = re.compile(r"[^\s!-;=?-\]`a-~\u00a1-\u024f\u0300-\u03ff\u1e00-\u1eff\u2000-\u206f\u20ac"
                    r"→−√∞≤≥≠™\ufeff]|[|¦·¨†‡‰″•]|\d+\s*–\s*\d+|\d+\s\d{3}(?!\d)")
# A number that the normalizer can read: sign, amount, whole part, and the plural of 1990s.
NUMBER = re.compile(r"(?<![\w.])(-?)([$€£¥]?(\d{1,15})(?:\.\d+)?%?)((?<=0)'?s)?(?!\w|\.\d|%)")


def add_voice_arguments(add, default):
    """Adds --tts and --voice. default: of --tts; None leaves both to the caller."""
    add("--tts", choices=("mms", "espeak"), default=default, help="who speaks")
    add("--voice", default=default and MMS_VOICE, help="folder or hub id of the MMS voice")


def take_from_run(args, **usual):
    """Fills in args as args.run was trained, or else as usual, and drops args.run.

    usual: {name: value if neither the command nor the run tells it}; returns the run's settings
    """
    info = read_run_info(args.run) if args.run else {}
    settings = info.get("settings") or {}  # an LVLM's folder has none
    for key, value in usual.items():
        setattr(args, key, getattr(args, key) or settings.get(key) or value)
    del args.run
    return settings


def speak_all(lines, folder, args, voices=VOICES):
    """Speaks the lines' questions by --tts; returns lines, of which some may be "skipped"."""
    if args.tts == "mms":
        spoken = speak_mms(lines, folder, args.seed, args.voice)
        return list(tqdm(spoken, total=len(lines), desc="speech", unit="sample"))
    speak = functools.partial(attempt, speak_espeak, folder=folder, seed=args.seed, voices=voices)
    return list(in_parallel(speak, [(line["id"], line) for line in lines], "speech"))


def spoken_text(line):
    """Returns the spoken part of a line's question: all but the text that follows the speech."""
    return line["question"].removesuffix(line.get("after", ""))


# ---- espeak-ng -----------------------------------------------------------------------------------


def speak_espeak(name, line, folder, seed, voices):
    """Speaks a line's question with espeak-ng; voice, rate and pitch are the line's own."""
    rng = random.Random(f"{seed}/{name}")
    text = spoken_text(line)
    if UNREAD.search(text):
        raise BadInput(f"the voice cannot say: {' '.join(UNREAD.findall(text))}")
    return {**line, **save_speech(folder, name, rng, text, voices, (140, 220))}


# ---- MMS -----------------------------------------------------------------------------------------


def in_words(text):
    """Returns a text as an English MMS voice can say it, its numbers in words.

    Its tokenizer keeps letters, apostrophes and hyphens and silently drops the rest. Raises
    BadInput if that would drop more than punctuation.
    """
    from transformers.models.speecht5.number_normalizer import EnglishNumberNormalizer
    convert = EnglishNumberNormalizer().convert

    def spell(match):
        """Writes one number in words. The normalizer ignores leading zeros."""
        sign, amount, whole, plural = match.groups()
        zeros = len(whole) - len(whole.lstrip("0"))
        words = "minus " * bool(sign) + "zero " * zeros + convert(amount)
        return re.sub("y$", "ie", words.strip()) + "s" if plural else words

    # Its own search for numbers takes 3,4 for 34, and 1,234,567 and 3.14159 for two numbers each;
    # it leaves 1990s as it is, and a colon or a comma without a blank would glue two words.
    spoken = APOSTROPHES.sub("'", text)
    spoken = re.sub(r"(?<![\d,])\d{1,3}([,\s]\d{3})+(?!,?\d)",
                    lambda match: re.sub(r"\D", "", match[0]), spoken)  # 1,234,567 and 10 000
    spoken = re.sub(r"(?<=\d)[,:](?=\d)", " ", spoken)  # 3,4 and 12:30
    spoken = re.sub(r"\b(1\d|20)([1-9]0'?s)\b", r"\1 \2", spoken)  # nineteen nineties
    spoken = SILENT.sub(" ", NUMBER.sub(spell, spoken))

    # A dash between numbers may mean "minus" or "to".
    unknown = re.findall(r"[^a-z\s'-]", spoken.lower()) + re.findall(r"\d\s*[-–]\s*\d", text)
    if unknown or not re.search("[a-z]", spoken.lower()):
        raise BadInput(f"the voice cannot say: {' '.join(unknown) or text}")
    return " ".join(spoken.split())


def speak_mms(lines, folder, seed, path=MMS_VOICE, batch_size=16):
    """Yields the lines, their questions spoken by MMS-TTS (VITS), on a GPU if there is one.

    VITS samples noise. So each batch has its own seed, and is spoken again as a whole if a file
    of it is missing: an interrupted folder ends with the same bytes.
    """
    from transformers import VitsModel, VitsTokenizer  # takes seconds; only this voice needs it

    device, voice = default_device(), fetch(path)
    with at(path):
        vits = VitsModel.from_pretrained(voice, use_safetensors=True).eval().to(device)
        tokenizer = VitsTokenizer.from_pretrained(voice)

    # Questions that the voice could say only in part are left out.
    speakable, texts = [], {}
    for line in lines:
        try:
            texts[line["id"]] = in_words(spoken_text(line))
            speakable.append(line)
        except BadInput as error:
            yield {"id": line["id"], "skipped": str(error)}

    for start in range(0, len(speakable), batch_size):
        batch = speakable[start: start + batch_size]
        if all((folder / line["audio"]).exists() for line in batch):
            yield from batch
            continue
        torch.manual_seed(seed * 1_000_003 + start)
        questions = [texts[line["id"]] for line in batch]
        inputs = tokenizer(questions, return_tensors="pt", padding=True).to(device)
        with torch.no_grad():
            out = vits(**inputs)  # waveform (B, samples), the rest of a row is padding
        waves = out.waveform.float().cpu().numpy()
        for line, wave, length in zip(batch, waves, out.sequence_lengths.int().tolist()):
            task = line["id"], line, wave[:length], vits.config.sampling_rate
            yield attempt(save_wave, task, folder=folder)


def save_wave(name, line, wave, rate, folder):
    """Writes a line's speech, (samples,) of so many a second, and returns the line."""
    save_sound(folder / line["audio"], resample(wave, rate))
    return line
