"""Pictures and sound: reading the usual formats, speech by espeak-ng, atomic writing."""

import _ctypes
import ctypes
import functools
import math
import os
import re
import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import espeakng_loader
import numpy as np
import soundfile
import torch
import torchaudio
from PIL import Image

from plumbing.files import BadInput, at, atomic_write

SAMPLE_RATE = 16_000  # Hz, Whisper's
MAX_SECONDS = 30  # Whisper's limit
TOLERANCE = 0.1  # seconds that a recording may be shorter than its header says
SOUNDS = "WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3"  # tell their end
PICTURES = "PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"  # no format whose reader starts a program

# Voices of espeak-ng, "accent+variant". Runs are evaluated with variants that no training uses.
# Variants that breathe (f2, f3, f5, whisper, ...) are left out: their noise differs each time.
ACCENTS = ("gmw/en-US", "gmw/en", "gmw/en-GB-x-rp")
VARIANTS = ("m1", "m2", "m3", "m5", "m6", "m8", "f1", "f4",
            "Andy", "Annie", "Michael", "adam", "david", "linda", "steph")
HELD_OUT = ("m4", "m7", "Andrea", "belinda")
VOICES = tuple(f"{accent}+{variant}" for accent in ACCENTS for variant in VARIANTS)
HELD_OUT_VOICES = tuple(f"{accent}+{variant}" for accent in ACCENTS for variant in HELD_OUT)


# ---- reading -------------------------------------------------------------------------------------


def load_image(file):
    """Returns the picture of a path or an open file as RGB, fully decoded. Raises BadInput."""
    name = f" {file}" if isinstance(file, (str, Path)) else ""
    with at(f"cannot read the image{name}"):
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=PICTURES) as image:
            if image.mode[0] in "IF":  # grey of more than 8 bits, which `convert` cuts off at 255
                levels = np.float32(image) / (256 if ";16" in image.mode else 1)
                if not (levels.min() >= 0 and 1 < levels.max() < 256):
                    raise BadInput(f"its grey levels reach {levels.max():g} of 255")
                return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
            return image.convert("RGB")


def load_audio(path, start=0.0, seconds=None):
    """Returns a recording as 16 kHz mono float32 (samples,), whatever its format and rate.

    start, seconds: which stretch of it, in seconds; None is to its end
    Raises BadInput if it cannot be read or is cut off, has no such stretch or no sound there, or
    more than Whisper can hear.
    """
    with at(f"cannot read the audio {path}"), soundfile.SoundFile(path) as file:
        rate, length = file.samplerate, file.frames / file.samplerate
        if file.format not in SOUNDS or length > 1e9:
            raise BadInput(f"a {file.format} that does not tell its length: convert it to WAV")
        if seconds is None:
            # Where a file ends and where it should, in bytes. A stream's writer does not know.
            ends = re.findall(r": *(\d+) \(should be (\d+)\)", file.extra_info)
            is_short = any(int(real) + 1024 < int(told) < 2**31 - 2**16 for told, real in ends)
            if is_short or re.search("lacks an end-of-stream|Junk after the la", file.extra_info):
                raise BadInput(f"it is cut off: {length:.1f} s are left")
            seconds = length - start
        if not (start >= 0 and 0 < seconds <= length - start + TOLERANCE):
            raise BadInput(f"it lasts {length:.1f} s, and has no {seconds:g} s from {start:g} s on")
        # Asked before anything is read: a wrong header may claim gigabytes.
        count = round(seconds * rate)
        if count > MAX_SECONDS * rate:
            raise BadInput(f"it lasts {seconds:.1f} s, Whisper hears {MAX_SECONDS}")

        if start:
            file.seek(round(start * rate))
        wave = file.read(count, dtype="float32", always_2d=True)  # (samples, channels)
        if len(wave) < count - TOLERANCE * rate:
            raise BadInput(f"it is cut off: {len(wave) / rate:.1f} s of {seconds:.1f} can be read")

        # Full scale is 1, which compressed speech may pass. Opposite channels leave nothing.
        loudest = np.abs(wave).max(initial=0)
        wave = wave.mean(axis=1)  # (samples,)
        if not (len(wave) and loudest < 2 and np.abs(wave).max() >= loudest / 100):
            raise BadInput(f"no sound: samples reach {loudest:g}, or its channels leave nothing")
        return resample(wave, rate)


@functools.cache
def resampler(rate):
    """Returns torchaudio's filter from `rate` to 16 kHz; making it takes longer than using it.

    Double precision is three times as fast here, as torch picks another convolution.
    """
    # The filter of 16001 Hz would take 9 GB, of a broken header's rate all memory.
    if rate * SAMPLE_RATE // math.gcd(rate, SAMPLE_RATE) ** 2 > 2**22:
        raise BadInput(f"its sample rate is {rate} Hz: convert it to a usual one, such as 16000")
    return torchaudio.transforms.Resample(rate, SAMPLE_RATE).double()


def resample(wave, rate):
    """Returns a waveform (samples,) at 16 kHz."""
    if rate == SAMPLE_RATE:
        return wave
    return resampler(rate)(torch.from_numpy(wave).double()).float().numpy()


# ---- speaking ------------------------------------------------------------------------------------


def speak(text, voice=VOICES[0], words_per_minute=175, pitch=50):
    """Returns (waveform (samples,) float32, 16000): the text spoken by espeak-ng.

    The library is loaded anew each time, because espeak-ng keeps state between utterances and
    cannot be reset. So the speech depends on the arguments alone.
    Raises BadInput for an empty text and an unknown voice.
    """
    if not text.strip() or "\0" in text:
        raise BadInput("there is nothing to say: the text is empty, or has a NUL character")
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    short = TemporaryDirectory()  # espeak-ng crashes if its data path has 160 characters
    os.symlink(espeakng_loader.get_data_path(), f"{short.name}/espeak-ng-data")
    rate = library.espeak_Initialize(2, 0, short.name.encode(), 0)  # 2: samples to a callback
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
        # From character 0 to the end, as UTF-8.
        library.espeak_Synth(spoken, len(spoken), 0, 1, 0, 1, None, None)
        library.espeak_Synchronize()
    finally:
        library.espeak_Terminate()
        short.cleanup()
        _ctypes.dlclose(library._handle)
    if not pieces:
        raise BadInput(f"espeak-ng says nothing for {text!r:.200}")
    return resample(np.concatenate(pieces).astype(np.float32) / 32768, rate), SAMPLE_RATE


# ---- writing -------------------------------------------------------------------------------------


def link(source, target):
    """Makes a hard link, or a copy where the disk has no hard links."""
    with atomic_write(target) as temporary:
        try:
            os.link(os.path.realpath(source), temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def save_png(path, image):
    """Writes a picture, unless the file exists."""
    if not path.exists():
        with atomic_write(path) as temporary:
            image.save(temporary, format="PNG")


def save_sound(path, wave):
    """Writes 16 kHz speech as .flac or .wav. Raises BadInput if it is too long for Whisper."""
    if len(wave) > MAX_SECONDS * SAMPLE_RATE:
        raise BadInput(f"the speech is longer than Whisper's {MAX_SECONDS} s: "
                       f"{len(wave) / SAMPLE_RATE:.1f} s")
    file_format = Path(path).suffix[1:].upper()
    if file_format not in ("FLAC", "WAV"):
        raise BadInput(f"{path}: speech is written to .wav or .flac")
    # With an open file soundfile skips its fsync, which takes longer than the encoding.
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        soundfile.write(file, wave, SAMPLE_RATE, format=file_format, subtype="PCM_16")


def save_speech(folder, name, rng, text, voices, rates=(150, 340)):
    """Speaks a text into folder/audio, unless the file exists; returns {"audio", "voice"}.

    Voice, words a minute (from `rates`) and pitch are drawn from rng.
    """
    voice, words_per_minute, pitch = rng.choice(voices), rng.randint(*rates), rng.randint(30, 70)
    path = folder / f"audio/{name}.flac"
    if not path.exists():
        save_sound(path, speak(text, voice, words_per_minute, pitch)[0])
    return {"audio": f"audio/{name}.flac", "voice": voice}
