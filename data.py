"""Paired samples: one on-disk format, what reads it, and what writes it.

A prepared folder holds `samples.jsonl`, one object a line, `{"id", "image", "question", "audio", "answer"}`, and the
files it names: pictures, and speech as 16 kHz mono FLAC. `audio` says aloud what `question` says in writing; a line
without image is speech or text alone, a line without audio is text alone, a line without question is speech to
transcribe. Every source is brought to this format: the built-in world by world.py, public data by sources.py.

    python data.py shapes --seed 0                     # the built-in world, to runs/shapes/data-s0
    python data.py check runs/shapes/data-s0/test      # is every line, picture and recording whole?
    python data.py speak "what color is the circle" --out question.wav

Letters in shape comments: B batch, T tokens, S suffix tokens, A audio tokens, N tiles, M mel bins, F mel frames.
"""

import _ctypes
import argparse
import contextlib
import ctypes
import functools
import hashlib
import json
import math
import multiprocessing
import os
import random
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import espeakng_loader
import httpx
import numpy as np
import soundfile
import torch
import torchaudio
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from tqdm import tqdm

from faults import PARENT, BadInput, end_with, only_writer, readable_errors, start_worker, written_whole

SAMPLE_RATE = 16_000
TOKEN_SAMPLES = 640  # waveform samples per audio token: 10 ms hop x 2 (convolution stride) x 2 (pooling)
IGNORE = -100  # the label of a token that is not supervised, as everywhere in torch and transformers
AUDIO_SLOT = -200  # stands in the ids where an audio token goes (LLaVA marks image tokens in the same way)
MAX_SECONDS = 30  # Whisper has positions for no more
MAX_TILES = 128  # far more than any LLM has positions for
MAX_CHANNELS = 16
MAX_SPOKEN = 5_000  # characters: minutes of speech
RATES = 4_000, 200_000  # Hz: between them lies whatever speech is recorded at
PICTURES = "PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"  # no format whose reader starts another program
BROKEN_PICTURE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what PIL may say of a file
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def at_least_one(text):
    """An argparse type: a count."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {count}")
    return count


def fetch(path):
    """The folder of a model: `path` itself, or where the hub's copy of it lies, downloaded if it is not there yet."""
    if Path(path).is_dir():
        return Path(path)
    wanted = ["*.json", "*.txt", "model.safetensors", "model-*.safetensors"]  # no code, no pickle, no second precision
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError, httpx.HTTPError) as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise BadInput(f"{path}: no such folder, and the Hugging Face hub did not give it ({reason[0][:150]}). Where "
                       f"there is a network: `hf download {path} --local-dir FOLDER`; then name that folder "
                       "(--init, --whisper, --voice)") from None


def read_json(path, kind=dict):
    """A JSON file's object, or with kind=list its list. Raises BadInput if it is missing, broken or of another kind."""
    try:
        value = parsed(Path(path).read_bytes(), path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, kind):
        raise BadInput(f"{path}: should hold a JSON {'object' if kind is dict else 'list'}, not this: {value!r:.40}")
    return value


def json_lines(path):
    """("file:line", value) of each line of a JSONL file. Raises BadInput at a line that is not JSON."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            yield where, parsed(line, where)


def parsed(line, where):
    """The value of a line of JSON (bytes). Raises BadInput if it is none, or has half a character ("\\ud800")."""
    try:
        value = json.loads(line.decode("utf-8"))
        if b"\\u" in line:  # only an escape can be half of one; no tokenizer takes it, and no file
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON: {error}") from None


# ---- reading -------------------------------------------------------------------------------------------------------


def read_samples(folder):
    """The lines of folder/samples.jsonl as dicts, each checked; `where` ("file:line") is added for messages."""
    path = Path(folder) / "samples.jsonl"
    if not path.is_file():
        raise BadInput(f"{path}: no such file (a prepared folder has one; `python data.py shapes` makes some)")
    samples = []
    for number, (where, sample) in enumerate(json_lines(path), 1):
        check_sample(sample, where)
        samples.append({"id": str(number), **sample, "where": where})
    if not samples:
        raise BadInput(f"{path}: has no sample")
    return samples


def check_sample(sample, where):
    """Raises BadInput unless this is a sample: an object of strings, with an answer and a question or speech."""
    if not isinstance(sample, dict):
        raise BadInput(f"{where}: a sample is a JSON object, not {type(sample).__name__}")
    for key in ("id", "image", "question", "audio", "answer"):
        if not isinstance(sample.get(key, ""), str):
            raise BadInput(f"{where}: {key!r} must be a string")
    if type(sample.get("phase", 0)) is not int:
        raise BadInput(f"{where}: 'phase' must be an integer")
    for key in ("image", "audio"):
        if Path(sample.get(key, "")).is_absolute() or ".." in Path(sample.get(key, "")).parts:
            raise BadInput(f"{where}: {key!r} must lie inside the folder, not at {sample[key]!r}")
    if not sample.get("answer", "").strip():
        raise BadInput(f"{where}: the answer is missing or empty")
    if "question" in sample and not sample["question"].strip():
        raise BadInput(f"{where}: the question is empty")
    if "question" not in sample and "audio" not in sample:
        raise BadInput(f"{where}: neither question nor audio")


class Samples(torch.utils.data.Dataset):
    """A prepared folder, a sample an index: {"question", "answer", "pixels", "wave", ...}, read when asked for."""

    def __init__(self, folder, settings, forms=("question", "audio")):
        """settings as in model.py (image_size, max_tiles); forms: the forms of the question that every line must have.

        The other form is left out, its files unopened. Raises BadInput for a line that lacks a form.
        """
        self.folder, self.settings, self.rows = Path(folder), settings, read_samples(folder)
        for row in self.rows:
            for form in ("question", "audio"):
                if form in forms and form not in row:
                    raise BadInput(f"{row['where']}: has no {form}, which is needed here")
                if form not in forms:
                    row.pop(form, None)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = dict(self.rows[index])
        try:
            if "image" in row:
                image = load_image(self.folder / row["image"])
                row["pixels"] = pixels(tile(image, self.settings["max_tiles"], self.settings["image_size"]))
            if "audio" in row:
                row["wave"] = load_audio(self.folder / row["audio"])
        except BadInput as error:
            raise BadInput(f"{row['where']}: {error}") from None
        return row

    def fingerprint(self):
        """SHA-256 over the folder's lines and its files' sizes: which data it is, without reading every file."""
        digest = hashlib.sha256((self.folder / "samples.jsonl").read_bytes())
        for name in sorted({row[key] for row in self.rows for key in ("image", "audio") if key in row}):
            path = self.folder / name
            digest.update(f"{name} {path.stat().st_size if os.path.exists(path) else None}\n".encode())
        return digest.hexdigest()

    def length(self, index):
        """A cheap stand-in for how long a sample is (characters): enough to put like with like in a batch."""
        return len(self.rows[index].get("question", "")) + len(self.rows[index]["answer"])


def load_image(path):
    """An RGB PIL image, wholly decoded. Raises BadInput if it is missing or broken."""
    try:
        return decoded(path)
    except BROKEN_PICTURE as error:
        raise BadInput(f"cannot read the image {path}: {error}") from None


def decoded(file):
    """The same from a path or an open file. Raises one of BROKEN_PICTURE if it is missing or broken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a broken file that is read all the same, and of very many pixels
        with Image.open(file, formats=PICTURES) as image:
            return image.convert("RGB")


def load_audio(path, start=0.0, seconds=None):
    """16 kHz mono float32 waveform (samples,) from any format and rate that soundfile reads.

    start, seconds: take a stretch of the recording, in seconds; None: to its end
    Raises BadInput if the file is missing, broken, empty, silent-by-NaN or longer than Whisper's 30 s.
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate, wave = file.samplerate, stretch_of(file, start, seconds)  # (samples, channels)
        if not len(wave) or not np.isfinite(wave).all():
            raise BadInput("it has no samples, or samples that are not numbers")
        return resample(wave.mean(axis=1), rate)
    except (soundfile.LibsndfileError, OSError, RuntimeError, BadInput) as error:
        raise BadInput(f"cannot read the audio {path}: {error}") from None


def stretch_of(file, start, seconds):
    """Samples (n, channels) of an open recording. Raises BadInput, before anything is read, if they are too many.

    The header says how many there are. It may be wrong, and what it claims would be allocated.
    """
    if file.channels > MAX_CHANNELS:
        raise BadInput(f"it has {file.channels} channels, {MAX_CHANNELS} are the most")
    first = min(start * file.samplerate, file.frames)
    count = file.frames - round(first) if seconds is None else min(seconds * file.samplerate, file.frames - first)
    if count > MAX_SECONDS * file.samplerate:
        raise BadInput(f"it lasts {count / file.samplerate:.1f} s; Whisper hears {MAX_SECONDS} s at most")
    file.seek(round(first))
    return file.read(round(count), dtype="float32", always_2d=True)


@functools.cache
def resampler(rate):
    """torchaudio's filter from `rate` to 16 kHz; making it takes longer than using it.

    In double precision: thrice as fast for speech, as torch's plain convolution suits so long a filter best.
    Raises BadInput for a rate that nobody records at: if it has too little in common with 16 kHz (16001 Hz has
    nothing), the filter would take gigabytes.
    """
    if not RATES[0] <= rate <= RATES[1] or rate * SAMPLE_RATE // math.gcd(rate, SAMPLE_RATE) ** 2 > 2**22:
        raise BadInput(f"its sample rate is {rate} Hz: convert it to a usual one, such as 16000 or 44100")
    return torchaudio.transforms.Resample(rate, SAMPLE_RATE).double()


def resample(wave, rate):
    """The waveform (samples,) at 16 kHz."""
    return wave if rate == SAMPLE_RATE else resampler(rate)(torch.from_numpy(wave).double()).float().numpy()


def tile(image, max_tiles, size=448, thumbnail=True):
    """InternVL2's dynamic tiling: the grid of at most `max_tiles` squares whose aspect ratio is nearest the image's.

    Returns a list of size x size PIL images, row by row, and a thumbnail of the whole last if there is more than one.
    Raises BadInput if there may be more of them than any model could see.
    """
    if max_tiles > MAX_TILES:
        raise BadInput(f"a picture cannot be cut into up to {max_tiles} squares, {MAX_TILES} are the most")
    width, height = image.size
    best, columns, rows = float("inf"), 1, 1
    for area in range(1, max_tiles + 1):
        for c in range(1, area + 1):
            if area % c:
                continue
            r = area // c
            distance = abs(width / height - c / r)  # in floats: exact fractions break ties differently
            if distance < best or (distance == best and width * height > 0.5 * size * size * c * r):
                best, columns, rows = distance, c, r
    whole = image.resize((size * columns, size * rows))  # bicubic; the aspect ratio is not kept
    tiles = [whole.crop((size * c, size * r, size * (c + 1), size * (r + 1)))
             for r in range(rows) for c in range(columns)]
    return tiles + [image.resize((size, size))] if thumbnail and len(tiles) > 1 else tiles


def pixels(tiles):
    """Normalised pixel values of a list of tiles, (N, 3, H, W) float32."""
    values = torch.from_numpy(np.stack([np.asarray(t) for t in tiles])).permute(0, 3, 1, 2) / 255  # (N, 3, H, W)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (values - mean) / std


def problems(task):
    """Worker: what is wrong with one line of samples.jsonl and the files it names, as a list of messages."""
    folder, where, line = task
    try:
        sample = parsed(line, where)
        check_sample(sample, where)
    except BadInput as error:
        return [str(error)]
    found = []
    for key, load in (("image", load_image), ("audio", load_audio)):
        try:
            key in sample and load(folder / sample[key])
        except BadInput as error:
            found.append(f"{where}: {error}")
    return found


def check_folder(folder):
    """Reads every line, picture and recording of a prepared folder; prints what is wrong. Raises BadInput if any is."""
    path = Path(folder) / "samples.jsonl"
    lines = path.read_bytes().splitlines()
    tasks, found = [(Path(folder), f"{path}:{number}", line) for number, line in enumerate(lines, 1)], []
    with workers() as pool:
        for messages in tqdm(pool.map(problems, tasks, chunksize=16), total=len(tasks), desc=str(path), unit="line"):
            found += messages
    print("".join(f"{message}\n" for message in found), end="")
    if found or not lines:
        raise BadInput(f"{path}: {len(found)} things are wrong with its {len(lines)} lines")
    print(f"{path}: nothing is wrong with its {len(lines)} lines and their files")


# ---- collating -----------------------------------------------------------------------------------------------------


def collate(samples, tokenizer, mel_extractor, settings, answers=True, stretch_seed=None):
    """A batch: what comes before the slot, once, and what follows it, once for each form of the question.

    samples         dicts of Samples; "after" is text that follows the speech (without a question: the instruction)
    answers         True: answers are appended and labelled, padding stands right (training);
                    False: the suffix ends where the answer begins, padding stands left (generation)
    stretch_seed    not None: spread the written questions' positions (see `stretched`)

    Returns {"pixels" (N, 3, H, W) or None, "prefix": {"ids", "mask"} (B, P), "text": suffix or None,
    "mel" (B, M, F) or None, "n_frames" (B,), "audio": suffix or None}. A suffix is a dict of (B, S) tensors: "ids" with
    AUDIO_SLOT where speech goes, "mask", "positions" counted from the prefix's end, and "labels".
    """
    images = [s["pixels"] for s in samples if "pixels" in s]
    image_tokens = [len(s["pixels"]) * settings["tokens_per_tile"] if "pixels" in s else 0 for s in samples]
    answer_ids = tokenizer([s["answer"] + "<|im_end|>" for s in samples]).input_ids if answers else [[]] * len(samples)
    batch = {"pixels": torch.cat(images) if images else None, "mel": None, "text": None, "audio": None}
    heads, slots, tail = prompts(tokenizer, settings, image_tokens, [s.get("question", "") for s in samples])
    room = [tokenizer.model_max_length - len(head) for head in heads]
    batch["prefix"] = pad(heads, tokenizer.pad_token_id)
    if "question" in samples[0]:
        spread = [None if stretch_seed is None else random.Random(f"{stretch_seed}/{s['id']}") for s in samples]
        check_length(samples, room, slots, tail, answer_ids)
        batch["text"] = suffixes(tokenizer, slots, tail, answer_ids, spread, left=not answers)
    if "wave" in samples[0]:
        waves = [padded(s["wave"], settings) for s in samples]
        batch["mel"], batch["n_frames"] = mels(mel_extractor, waves)
        # Speech without a question is to be transcribed.
        after = [s.get("after", "" if "question" in s else settings["instruction"]) for s in samples]
        after_ids = [tokenizer(text).input_ids if text else [] for text in after]
        heard = [[AUDIO_SLOT] * audio_tokens(wave) + ids for wave, ids in zip(waves, after_ids)]
        check_length(samples, room, heard, tail, answer_ids)
        batch["audio"] = suffixes(tokenizer, heard, tail, answer_ids, [None] * len(samples), left=not answers)
    return batch


def check_length(samples, room, slots, tail, answer_ids):
    """Raises BadInput if a sample has more tokens after its image than there is room for: the LLM has no positions."""
    for sample, most, slot, answer in zip(samples, room, slots, answer_ids):
        length = len(slot) + len(tail) + len(answer)
        if length > most:
            name = sample.get("where") or f"the question {sample.get('id', '')}".strip()
            raise BadInput(f"{name}: question and answer have {length} tokens, and the model has room for {most:,} "
                           "after the image")


def prompts(tokenizer, settings, image_tokens, questions):
    """Token ids of InternVL2's chat prompt in three parts: before the slot, in it, and after it.

    Text and speech fill the same slot, so everything around it must be the same for both: each prompt is tokenised
    whole and cut, and it is checked that no token grew across a cut. Returns (heads, slots, tail).
    """
    system = f"<|im_start|>system\n{settings['system']}<|im_end|><|im_start|>user\n"
    before = [system + ("<img>" + "<IMG_CONTEXT>" * n + "</img>\n" if n else "") for n in image_tokens]
    after = "<|im_end|><|im_start|>assistant\n"
    questions = [q.strip() for q in questions]
    whole = tokenizer([b + q + after for b, q in zip(before, questions)]).input_ids
    heads, tail = tokenizer(before).input_ids, tokenizer(after).input_ids
    for head, ids, question in zip(heads, whole, questions):
        if ids[: len(head)] != head or ids[-len(tail):] != tail:
            raise BadInput(f"the tokenizer merges the question {question!r:.200} with what stands around it")
    return heads, [ids[len(head): -len(tail)] for head, ids in zip(heads, whole)], tail


def suffixes(tokenizer, slots, tail, answer_ids, spread, left):
    """The suffix tensors of a batch: slot, tail and answer of each sample, padded."""
    rows = [slot + tail + answer for slot, answer in zip(slots, answer_ids)]
    batch = pad(rows, tokenizer.pad_token_id, left)
    batch["labels"] = pad([[IGNORE] * (len(row) - len(answer)) + answer for row, answer in zip(rows, answer_ids)],
                          IGNORE, left)["ids"]
    positions = [stretched(len(slot), len(row), rng) for slot, row, rng in zip(slots, rows, spread)]
    batch["positions"] = pad(positions, 0, left)["ids"]
    return batch


def pad(rows, value, left=False):
    """Lists of ids as {"ids" (B, T) int64, "mask" (B, T) bool}, padded on the right or on the left."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), value)  # (B, T)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)  # (B, T)
    for b, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        ids[b, where], mask[b, where] = torch.tensor(row, dtype=torch.long), True
    return {"ids": ids, "mask": mask}


def stretched(n_slot, n_all, rng, most=4, share=0.6):
    """Positions of a suffix whose first `n_slot` tokens are the question: 0, 1, 2, ... or, with `rng`, spread out.

    Speech takes more tokens than text, here two to four a word. A tiny LLM that has only met short written questions
    fails on long spoken ones for that reason alone. So most written questions of the built-in world are spread, in
    order, over up to `most` times their length, as if they had been spoken (in the manner of the randomised positions
    of Ruoss et al., ACL 2023). Real LLMs have met long questions already.
    """
    if rng is None or rng.random() >= share:
        return list(range(n_all))
    span = rng.randint(n_slot, most * n_slot)
    return sorted(rng.sample(range(span), n_slot)) + list(range(span, span + n_all - n_slot))


def padded(wave, settings):
    """The waveform with silence up to settings["audio_seconds"], if that is set: 30 is what plain Whisper hears."""
    return np.pad(wave, (0, max(0, int(settings.get("audio_seconds", 0) * SAMPLE_RATE) - len(wave))))


def audio_tokens(wave):
    """How many tokens a waveform becomes: one for each 40 ms, the last one begun counts."""
    return -(-len(wave) // TOKEN_SAMPLES)


def mels(extractor, waves):
    """Log-mel spectrograms (B, M, F) of waveforms and their own lengths in frames (B,).

    Each waveform is padded with zeros to whole tokens before its own spectrogram is taken, and what lies beyond its end
    is 0, as the convolution's own padding: so a clip's features do not depend on what it is batched with.
    """
    clips = []
    for wave in waves:
        wave = np.pad(wave, (0, audio_tokens(wave) * TOKEN_SAMPLES - len(wave)))
        features = extractor(wave, sampling_rate=SAMPLE_RATE, padding="do_not_pad", return_tensors="pt")
        clips.append(features.input_features[0])  # (M, F)
    n_frames = torch.tensor([clip.size(1) for clip in clips])  # (B,)
    mel = torch.zeros(len(clips), clips[0].size(0), int(n_frames.max()))  # (B, M, F)
    for row, clip in zip(mel, clips):
        row[:, : clip.size(1)] = clip
    return mel, n_frames


# ---- speaking ------------------------------------------------------------------------------------------------------

# Voices of espeak-ng, "accent+variant". Runs are evaluated with voices whose variant was never trained on. Variants
# that breathe (f2, f3, f5, whisper and some more) are left out: their noise is another one each time.
ACCENTS = ("gmw/en-US", "gmw/en", "gmw/en-GB-x-rp")
VARIANTS = ("m1", "m2", "m3", "m5", "m6", "m8", "f1", "f4",
            "Andy", "Annie", "Michael", "adam", "david", "linda", "steph")
VOICES = tuple(f"{accent}+{variant}" for accent in ACCENTS for variant in VARIANTS)
HELD_OUT_VOICES = tuple(f"{accent}+{variant}" for accent in ACCENTS for variant in ("m4", "m7", "Andrea", "belinda"))


def speak(text, voice=VOICES[0], words_per_minute=175, pitch=50):
    """The text spoken by espeak-ng: (waveform float32 (samples,), 16000). Raises BadInput for an unknown voice.

    espeak-ng carries state from one utterance to the next (its flutter and noise go on), and has no call to reset it.
    So its library is loaded afresh each time, which costs little: speech is then a function of the arguments alone.
    """
    if not text.strip() or "\0" in text:  # at which the library would stop
        raise BadInput("there is nothing to say: the text is empty, or has a NUL character")
    if len(text) > MAX_SPOKEN:
        raise BadInput(f"the text is too long to be spoken: {len(text)} characters, {MAX_SPOKEN} are the most")
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0)  # 2: hand samples to a callback
    pieces = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def keep(samples, count, events):
        if count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    try:
        library.espeak_SetSynthCallback(keep)
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise BadInput(f"espeak-ng has no voice {voice!r}")
        library.espeak_SetParameter(1, words_per_minute, 0)
        library.espeak_SetParameter(3, pitch, 0)
        spoken = text.encode() + b"\0"
        library.espeak_Synth(spoken, len(spoken), 0, 1, 0, 1, None, None)  # from 0, by characters, to the end, as UTF-8
        library.espeak_Synchronize()
    finally:
        library.espeak_Terminate()
        _ctypes.dlclose(library._handle)
    if not pieces:
        raise BadInput(f"espeak-ng says nothing for {text!r}")
    return resample(np.concatenate(pieces).astype(np.float32) / 32768, rate), SAMPLE_RATE


# ---- writing -------------------------------------------------------------------------------------------------------

def save_png(path, image):
    """Writes a picture, unless it is there."""
    if not path.exists():
        with written_whole(path) as temporary:
            image.save(temporary, format="PNG")


def save_flac(path, wave):
    """Writes 16 kHz speech, whole or not at all. Raises BadInput if Whisper could not hear it to the end."""
    if len(wave) > MAX_SECONDS * SAMPLE_RATE:
        seconds = len(wave) / SAMPLE_RATE
        raise BadInput(f"the speech is longer than Whisper's {MAX_SECONDS} s: {seconds:.1f} s")
    with written_whole(path) as temporary:
        soundfile.write(temporary, wave, SAMPLE_RATE, format="FLAC", subtype="PCM_16")


def save_speech(folder, name, rng, text, voices, rates=(240, 340)):
    """Speaks `text` into folder/audio, unless it is there; voice, words a minute and pitch are drawn from rng."""
    voice, words_per_minute, pitch = rng.choice(voices), rng.randint(*rates), rng.randint(30, 70)
    path = folder / f"audio/{name}.flac"
    if not path.exists():
        save_flac(path, speak(text, voice, words_per_minute, pitch)[0])
    return {"audio": f"audio/{name}.flac", "voice": voice}


@contextlib.contextmanager
def workers():
    """A process for each core; one that is killed is an error, where multiprocessing.Pool would wait for ever."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")  # whose parent we are
    pool = ProcessPoolExecutor(os.cpu_count(), context, start_worker, (os.getpid(),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, what has not begun need not be done


def note_settings(folder, settings):
    """Writes folder/settings.json, or checks it: what the folder is made of, so that two makings can't mix."""
    note = folder / "settings.json"
    if note.exists() and read_json(note) != settings:
        raise BadInput(f"{note}: this folder was made with {note.read_text().strip()}, "
                       f"not with {json.dumps(settings)}: choose another --out, or delete it")
    with written_whole(note) as temporary:
        temporary.write_text(json.dumps(settings) + "\n")


def make_once(folder, settings, make, parts=("images", "audio")):
    """Runs make() as the folder's only writer, unless it is finished; refused if other settings began it.

    parts: folders for files that it needs inside
    """
    with only_writer(folder):
        note_settings(folder, settings)
        if (folder / "samples.jsonl").exists():
            return print(f"{folder}: there already")
        for name in parts:
            (folder / name).mkdir(exist_ok=True)
        make()


def told(args):
    """A command's arguments as settings: all but where its folder lies."""
    return {key: value for key, value in sorted(vars(args).items()) if key != "out"}


if __name__ == "__main__":
    import sources
    import world

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    world.add_command(commands)
    sub = commands.add_parser("speak", help="speak a text with espeak-ng")
    sub.add_argument("text", help="what to say")
    sub.add_argument("--voice", default=VOICES[0], help="an espeak-ng voice, accent+variant")
    sub.add_argument("--out", default="speech.wav", help="where the speech goes (.wav or .flac)")
    sub = commands.add_parser("check", help="read every line, picture and recording of a prepared folder")
    sub.add_argument("folder", help="the folder")
    sources.add_commands(commands)
    args = parser.parse_args()
    with readable_errors():
        if PARENT in os.environ:  # train.py, which needs the built-in world
            end_with(int(os.environ[PARENT]))
        if args.command == "shapes":
            world.make(args)
        elif args.command == "check":
            check_folder(args.folder)
        elif args.command != "speak":
            sources.make(args)
        else:
            form = Path(args.out).suffix[1:].upper()
            if form not in ("WAV", "FLAC"):
                raise BadInput(f"{args.out}: speech is written to .wav or .flac")
            wave, rate = speak(args.text, args.voice)
            with written_whole(args.out) as temporary, open(temporary, "wb") as file:
                soundfile.write(file, wave, rate, format=form)
            print(f"{args.out}: {len(wave) / rate:.2f} s")
