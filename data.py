"""Paired samples: one format on disk, the dataset that reads it, and the batch for a model.

A prepared folder holds `samples.jsonl`, one object a line, and the files that the lines name:

    {"id": "7", "image": "images/7.png", "question": "what color is it", "audio": "audio/7.flac",
     "answer": "red"}

`audio` says aloud what `question` says in writing; if the question's end follows the speech in
writing, `after` repeats it. A line has at least one of the two; one with audio alone is speech to
transcribe. The image may be missing. Lines of one `group` have the same picture and no speech: in
training they share its prefix, one prefix, many questions. All sources come in this format:

    python data.py shapes --seed 0                   # the built-in world (world/make.py)
    python data.py llava --help                      # LLaVA's mix, spoken (real/corpora.py); also:
                                                     # librispeech, commonvoice, manifest
    python data.py check runs/shapes/data-s0/test    # is every line, picture and recording whole?
    python data.py speak "what color is the circle" --out question.wav

Letters in shape comments: B rows of a batch, P prefix tokens, S tokens of query and answer,
T tokens, H and W height and width, M mel bins, F mel frames.
"""

import argparse
import hashlib
import itertools
import math
from pathlib import Path

import numpy as np
import torch

from plumbing.files import BadInput, at, readable_errors
from plumbing.media import SAMPLE_RATE, load_audio, load_image
from plumbing.prepared import add_commands, read_samples
from plumbing.processes import end_with_parent
from real import corpora
from real.families import CHATS, check_length, count_image_tokens, picture_patches
from world import make as world

TOKEN_SAMPLES = 640  # waveform samples an audio token: 10 ms hop x 2 (convolution) x 2 (pooling)
IGNORE = -100  # the label of a token that is not supervised, as everywhere in torch
AUDIO_SLOT = -200  # stands in the ids where an audio token goes, as LLaVA marks image tokens
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---- the dataset ---------------------------------------------------------------------------------


class Samples(torch.utils.data.Dataset):
    """Prepared folders. Item i is line i, with "pixels" (see `pixels`) and "wave" (samples,)."""

    def __init__(self, folders, settings, forms=("question", "audio")):
        """Reads all lines. Pictures and recordings are read when an item is.

        folders: one or a list; settings: model.py's, for pictures
        forms: which forms of the question are needed; others are left out, their files unopened
        """
        folders = [folders] if isinstance(folders, (str, Path)) else folders
        self.settings, self.folders = settings, [Path(folder) for folder in folders]
        self.picture = None, None  # the path and pixels last read: a group has one picture
        self.rows = [row for folder in self.folders for row in read_samples(folder)]
        for row in self.rows:
            for form in ("question", "audio"):
                if form in forms and form not in row:
                    raise BadInput(f"{row['where']}: has no {form}, which is needed here")
                if form not in forms:
                    row.pop(form, None)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        sample = dict(self.rows[index])
        with at(sample["where"]):
            if "image" in sample:
                path = Path(sample["folder"]) / sample["image"]
                if path != self.picture[0]:
                    self.picture = path, pixels(load_image(path), self.settings)
                sample["pixels"] = self.picture[1]
            if "audio" in sample:
                sample["wave"] = load_audio(Path(sample["folder"]) / sample["audio"])
        return sample

    def length(self, index):
        """Estimates a sample's length in characters, to put like with like in a batch."""
        return len(self.rows[index].get("question", "")) + len(self.rows[index]["answer"])

    def fingerprint(self):
        """Returns the SHA-256 of the folders' lines: which data this is."""
        files = [folder / "samples.jsonl" for folder in self.folders]
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


# ---- pictures and sound --------------------------------------------------------------------------


def tile(image, max_tiles, size=448, thumbnail=True):
    """Cuts a picture by InternVL2's dynamic tiling into at most `max_tiles` squares.

    The grid is the one whose aspect ratio is nearest the picture's. Returns a list of size x size
    PIL images, row by row; if there is more than one, a thumbnail of the whole comes last.
    """
    # Of two grids that are equally near, the larger wins if the picture has pixels enough for it.
    width, height = image.size
    best, columns, rows = float("inf"), 1, 1
    for area in range(1, max_tiles + 1):
        for c in (c for c in range(1, area + 1) if area % c == 0):
            r = area // c
            distance = abs(width / height - c / r)  # floats as in the original: ties depend on it
            is_large = width * height > 0.5 * size * size * c * r
            if distance < best or (distance == best and is_large):
                best, columns, rows = distance, c, r

    # The picture is stretched to the grid (bicubic): its aspect ratio is not kept.
    whole = image.resize((size * columns, size * rows))
    tiles = [whole.crop((size * c, size * r, size * (c + 1), size * (r + 1)))
             for r in range(rows) for c in range(columns)]
    return tiles + [image.resize((size, size))] if thumbnail and len(tiles) > 1 else tiles


def pixels(image, settings):
    """Returns a picture as the arguments of the LVLM's get_image_features.

    InternVL's are tiles, {"pixel_values" (tiles, 3, H, W) uint8}: they travel as bytes to the
    device. An LVLM with "min_tiles" among its settings takes the picture whole.
    """
    if "min_tiles" in settings:
        return picture_patches(image, settings)
    tiles = tile(image, settings["max_tiles"], settings["image_size"])
    values = torch.from_numpy(np.stack([np.asarray(t) for t in tiles]))  # (tiles, H, W, 3)
    return {"pixel_values": values.permute(0, 3, 1, 2)}  # (tiles, 3, H, W)


def normalize(pixels):
    """Returns the values (tiles, 3, H, W) float32 that the vision encoder expects of bytes."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=pixels.device)[..., None, None]
    return (pixels / 255 - mean) / std


def audio_tokens(wave):
    """Returns how many tokens a waveform becomes: one for every 40 ms, rounded up."""
    return math.ceil(len(wave) / TOKEN_SAMPLES)


def mel_spectrograms(extractor, waves):
    """Returns log-mel spectrograms (B, M, F) of waveforms, and each one's number of frames (B,).

    Each waveform is padded to whole tokens before its own spectrogram is taken, and beyond its end
    all is 0, as in a convolution's padding. So a clip's features do not depend on its batch.
    """
    clips = []
    for wave in waves:
        wave = np.pad(wave, (0, audio_tokens(wave) * TOKEN_SAMPLES - len(wave)))
        features = extractor(wave, sampling_rate=SAMPLE_RATE, padding="do_not_pad",
                             return_tensors="pt")
        clips.append(features.input_features[0])  # (M, its own frames)

    n_frames = torch.tensor([clip.size(1) for clip in clips])  # (B,)
    mel = torch.zeros(len(clips), clips[0].size(0), int(n_frames.max()))  # (B, M, F)
    for row, clip in zip(mel, clips):
        row[:, : clip.size(1)] = clip
    return mel, n_frames


# ---- one prompt, one slot ------------------------------------------------------------------------


def prompt_ids(tokenizer, settings, image_tokens, questions):
    """Returns the LVLM's chat prompt as token ids in three parts: (heads, questions, tail).

    A head is what stands before the question, the image included; the tail is what stands between
    the question and the answer. Writing and speech fill the same slot between them. Each prompt is
    tokenised whole and then cut, and it is checked that no token grew across a cut.
    """
    chat = CHATS[settings["llm"]]
    opening, mark, closing = chat["image"]
    system, after = chat["before"].format(settings["system"]), chat["after"]
    before = [system + (opening + mark * n + closing) * (n > 0) for n in image_tokens]
    questions = [question.strip() for question in questions]
    prompts = tokenizer([b + q + after for b, q in zip(before, questions)]).input_ids
    heads, tail = tokenizer(before).input_ids, tokenizer(after).input_ids

    for head, prompt, question in zip(heads, prompts, questions):
        if prompt[: len(head)] != head or prompt[-len(tail):] != tail:
            raise BadInput(f"the tokenizer merges {question!r:.200} with what stands around it")
    return heads, [ids[len(head): -len(tail)] for head, ids in zip(heads, prompts)], tail


def collate(samples, tokenizer, mel_extractor, settings, answers=True, positions=None):
    """Makes a batch: what stands before the question, once; what follows, once a form of it.

    samples    dicts of Samples; "after" is text behind the speech, "end" the answer's end mark;
               neighbours of one "group" share a row: one prefix, several written questions
    answers    True: answers follow and are labelled, padding stands right (training)
               False: queries end where the answer begins, padding stands left (generation)
    positions  None, or a function (sample, question tokens, all tokens) -> positions, if written

    Returns {"pixels" of all pictures, "prefix": {"ids", "mask"} (B, P), "text": query,
    "mel" (B, M, F), "n_frames" (B,), "audio": query}; what the samples lack is None. A query is
    {"ids", with AUDIO_SLOT for speech, "mask", "labels", "positions"}, and where rows are shared
    "part", the number of the sample that a token belongs to; each is (B, S).
    """
    # Which samples stand in each row. In generation every question has a row of its own.
    rows = share_rows(samples) if answers else [[i] for i in range(len(samples))]
    image_tokens = [count_image_tokens(s.get("pixels"), settings) for s in samples]
    texts = [s.get("question", "") for s in samples]
    heads, questions, tail = prompt_ids(tokenizer, settings, image_tokens, texts)
    answer_ids = [[]] * len(samples)
    if answers:
        end = CHATS[settings["llm"]]["end"]
        answer_ids = tokenizer([s["answer"] + s.get("end", end) for s in samples]).input_ids

    def query(slots, positions=None):
        """Makes a query of each slot (a question's ids, or AUDIO_SLOTs), tail and answer."""
        sequences = [slot + tail + answer for slot, answer in zip(slots, answer_ids)]
        for sample, head, ids, n in zip(samples, heads, sequences, image_tokens):
            check_length(sample, len(head) + len(ids), n, settings, tokenizer.model_max_length)
        labels = [[IGNORE] * (len(ids) - len(answer)) + answer
                  for ids, answer in zip(sequences, answer_ids)]
        places = [positions(sample, len(slot), len(ids)) if positions else list(range(len(ids)))
                  for sample, slot, ids in zip(samples, slots, sequences)]
        return join_rows(rows, sequences, labels, places, tokenizer.pad_token_id, not answers)

    batch = {"prefix": pad([heads[row[0]] for row in rows], tokenizer.pad_token_id),
             "pixels": join_pictures([samples[row[0]] for row in rows]),
             "text": None, "mel": None, "n_frames": None, "audio": None}

    # The question in writing, which the teacher reads.
    if "question" in samples[0]:
        batch["text"] = query(questions, positions)

    # The question aloud, which the student hears. Where there is none, an instruction after the
    # speech asks for a transcript. "audio_seconds" pads speech; plain Whisper hears 30 s.
    if "wave" in samples[0]:
        shortest = int(settings.get("audio_seconds", 0) * SAMPLE_RATE)
        waves = [np.pad(s["wave"], (0, max(0, shortest - len(s["wave"])))) for s in samples]
        batch["mel"], batch["n_frames"] = mel_spectrograms(mel_extractor, waves)
        after = [s.get("after", "" if "question" in s else settings["instruction"])
                 for s in samples]
        after_ids = [tokenizer(text).input_ids if text else [] for text in after]
        slots = [[AUDIO_SLOT] * audio_tokens(w) + ids for w, ids in zip(waves, after_ids)]
        batch["audio"] = query(slots)
    return batch


def share_rows(samples):
    """Returns the numbers of the samples in each row: neighbours of one "group" share one."""
    rows = itertools.groupby(range(len(samples)), lambda i: samples[i].get("group", i))
    return [list(row) for _, row in rows]


def join_pictures(samples):
    """Returns the samples' pictures, each a dict of tensors, as one such dict; None without any."""
    pictures = [sample["pixels"] for sample in samples if "pixels" in sample]
    keys = pictures[0] if pictures else ()
    return {key: torch.cat([picture[key] for picture in pictures]) for key in keys} or None


def join_rows(rows, ids, labels, positions, pad_id, left):
    """Returns a query: the samples of each row one after another, padded.

    rows: the numbers of each row's samples; ids, labels, positions: a list for each sample
    """
    def join(lists, value):
        return pad([sum([lists[i] for i in row], []) for row in rows], value, left)

    query = {**join(ids, pad_id), "labels": join(labels, IGNORE)["ids"],
             "positions": join(positions, 0)["ids"]}
    if len(rows) < len(ids):
        parts = [[i] * len(sequence) for i, sequence in enumerate(ids)]
        query["part"] = join(parts, -1)["ids"]
    return query


def pad(rows, value, left=False):
    """Pads lists of ids, on the right or left: {"ids" (B, T) int64, "mask" (B, T) bool}."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), value)  # (B, T)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)  # (B, T)
    for b, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[b, place], mask[b, place] = torch.tensor(row, dtype=torch.long), True
    return {"ids": ids, "mask": mask}


def answer_tokens(batch):
    """Counts the answer tokens that the student is scored on."""
    query = batch["text"] if batch["mel"] is None else batch["audio"]
    return int((query["labels"] != IGNORE).sum())


def to(batch, device):
    """Returns the batch with all its tensors on the device."""
    if isinstance(batch, dict):
        return {key: to(value, device) for key, value in batch.items()}
    return batch.to(device, non_blocking=True) if isinstance(batch, torch.Tensor) else batch


# ---- commands ------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    world.add_command(commands)
    corpora.add_commands(commands)
    add_commands(commands)
    args = parser.parse_args()
    end_with_parent()
    args.run(args)


if __name__ == "__main__":
    with readable_errors():
        main()
