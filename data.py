"""Paired samples: one format on disk, the dataset that reads it, and the batch for a model.

A prepared folder holds `samples.jsonl`, one object a line, and the files that the lines name:

    {"id": "7", "image": "images/7.png", "question": "what color is it", "audio": "audio/7.flac",
     "answer": "red"}

`audio` is the spoken form of `question`. If the end of the question follows the speech as text, it
is repeated: "after": " Answer in one word." A line has a question, audio or both; audio alone is
speech to transcribe. The image is optional. ("group" is for the built-in base alone:
world/lessons.py.) All sources are converted to this format:

    python data.py shapes --seed 0                   # the built-in world (world/make.py)
    python data.py llava --help                      # LLaVA's mix, spoken (real/corpora.py); also:
                                                     # librispeech, commonvoice, manifest
    python data.py check runs/shapes/data-s0/test    # is every line, picture and recording whole?
    python data.py speak "what color is the circle" --out question.wav

Letters in shape comments: B rows of a batch, P prefix tokens, S tokens of query and answer,
T tokens, H and W height and width of a picture, M mel bins, L mel frames.
"""

import argparse
import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from plumbing import prepared
from plumbing.files import at, readable_errors
from plumbing.media import SAMPLE_RATE, load_audio, load_image, speak  # noqa: F401 (data.speak)
from plumbing.processes import exit_with_parent
from real import corpora, families
from real.families import CHATS, tile
from world import make

FRAMES_PER_TOKEN = 4  # mel frames an audio token: 2 (convolution) x 2 (pooling)
IGNORE = -100  # the label of a token that is not supervised: torch's default
AUDIO_PLACEHOLDER = -200  # in the ids, where an audio token goes; LLaVA marks image tokens so


# ---- the dataset ---------------------------------------------------------------------------------


class Samples(torch.utils.data.Dataset):
    """Prepared folders. Item i is line i, with its picture's "pixels" and its sound, "wave"."""

    def __init__(self, folders, settings, forms=("question", "audio")):
        """Reads all lines. Pictures and recordings are read with their item.

        folders: one or a list; settings: PromptSettings, for pictures; None: no pictures
        forms: which forms of the question every line must have; others are left out
        """
        if isinstance(folders, (str, Path)):
            folders = [folders]
        self.settings = settings
        self.folders = [Path(folder) for folder in folders]
        self.rows = prepared.Rows(self.folders, forms)
        self.last_picture = None, None  # path and inputs: a group's questions have one picture

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        sample = self.rows[index]
        folder = Path(sample["folder"])
        with at(sample["where"]):
            if "image" in sample and self.settings is not None:
                path = folder / sample["image"]
                if path != self.last_picture[0]:
                    self.last_picture = path, picture_inputs(load_image(path), self.settings)
                sample["pixels"] = self.last_picture[1]
            if "audio" in sample:
                sample["wave"] = load_audio(folder / sample["audio"])
        return sample

    def length(self, index):
        """Returns a sample's length in characters, to batch samples of similar length."""
        return self.rows.lengths[index]

    def fingerprint(self):
        """Returns the SHA-256 of the folders' lines: which data this is."""
        files = [(folder / "samples.jsonl").read_bytes() for folder in self.folders]
        return hashlib.sha256(b"".join(files)).hexdigest()


# ---- pictures and sound --------------------------------------------------------------------------


def picture_inputs(image, settings):
    """Returns a picture as the arguments of the LVLM's get_image_features.

    InternVL's are tiles, {"pixel_values" (tiles, 3, H, W)}, uint8 until they are on the device. An
    LVLM with settings.min_tiles takes the picture whole.
    """
    if settings.min_tiles is not None:
        return families.picture_patches(image, settings)
    tiles = tile(image, settings.max_tiles, settings.image_size)
    values = np.stack([np.asarray(square) for square in tiles])  # (tiles, H, W, 3)
    return {"pixel_values": torch.from_numpy(values).permute(0, 3, 1, 2)}  # (tiles, 3, H, W)


def mel_spectrograms(extractor, waves):
    """Returns log-mel spectrograms (B, M, L) of waveforms, and each one's number of frames (B,).

    Each waveform is padded to whole audio tokens before its spectrogram is computed, and the batch
    is padded with 0, as a convolution pads. So a clip's features do not depend on its batch. A
    frame is 10 ms (extractor.hop_length).
    """
    clips = []
    for wave in waves:
        silence = -len(wave) % (FRAMES_PER_TOKEN * extractor.hop_length)
        features = extractor(np.pad(wave, (0, silence)), sampling_rate=SAMPLE_RATE,
                             padding="do_not_pad", return_tensors="pt")
        clips.append(features.input_features[0].T)  # (its own frames, M)

    n_frames = torch.tensor([len(clip) for clip in clips])  # (B,)
    mel = pad_sequence(clips, batch_first=True).transpose(1, 2)  # (B, M, L)
    return mel.contiguous(), n_frames


# ---- one prompt, two queries ---------------------------------------------------------------------


def collate(samples, tokenizer, mel_extractor, settings, answers=True):
    """Makes a batch: the prefix once, then a written and a spoken query that continue it.

    samples   dicts of Samples, all with the same forms of the question
    answers   True: queries end with the labelled answer, padding on the right (training)
              False: queries end where the answer begins, padding on the left (generation)

    Returns a dict; what the samples lack is None, as is all sound without a mel_extractor. <prompt>
    is the generation prompt, AUDIO the placeholder of an audio token; each query has its own S:
        prefix         <system> <image> ...                             {"ids", "mask"} (B, P)
        text           what color is it           <prompt> red <end>    {"ids", "mask", "labels"}
        audio          AUDIO AUDIO AUDIO [after]  <prompt> red <end>    the same; each (B, S)
        (labels)       -100  -100  -100  -100     -100     red <end>
        mel, n_frames  the speech                                       (B, M, L), (B,)
        pixels         all rows' pictures in one dict: {"pixel_values": (all tiles, 3, H, W)}
    """
    # The prompts' parts as ids, and the answers'.
    image_tokens = [families.count_image_tokens(s.get("pixels"), settings) for s in samples]
    texts = [s.get("question", "") for s in samples]
    prefix_ids, text_ids, prompt = families.prompt_ids(tokenizer, settings, image_tokens, texts)
    answer_ids = [[] for _ in samples]
    if answers:
        end = CHATS[settings.chat]["end"]
        answer_ids = tokenizer([s["answer"] + s.get("end", end) for s in samples]).input_ids

    def query(questions):
        """Makes queries of questions (text ids or placeholders), generation prompt and answers."""
        ids, labels = [], []
        parts = zip(samples, prefix_ids, questions, answer_ids, image_tokens)
        for sample, prefix, question, answer, n in parts:
            ids.append(question + prompt + answer)
            labels.append([IGNORE] * len(question + prompt) + answer)
            families.check_length(sample, len(prefix + ids[-1]), n, settings, tokenizer)
        padded = pad(ids, tokenizer.pad_token_id, left=not answers)
        return {**padded, "labels": pad(labels, IGNORE, left=not answers)["ids"]}

    batch = {"prefix": pad(prefix_ids, tokenizer.pad_token_id), "text": None, "audio": None,
             "mel": None, "n_frames": None, "pixels": families.join_pictures(samples)}

    # The written question, which the teacher reads.
    if "question" in samples[0]:
        batch["text"] = query(text_ids)

    # The spoken question, which the student hears. Without a question, an instruction after the
    # speech asks for a transcript. Plain Whisper pads speech to 30 s (settings.audio_seconds).
    if "wave" in samples[0] and mel_extractor:
        shortest = int((settings.audio_seconds or 0) * SAMPLE_RATE)
        waves, audio_ids = [], []
        for sample in samples:
            silence = max(0, shortest - len(sample["wave"]))
            waves.append(np.pad(sample["wave"], (0, silence)))
        batch["mel"], batch["n_frames"] = mel_spectrograms(mel_extractor, waves)
        opening, closing = families.audio_mark_ids(tokenizer, settings)
        for sample, n_frames in zip(samples, batch["n_frames"].tolist()):
            instruction = "" if "question" in sample else settings.instruction
            after = tokenizer(sample.get("after", instruction)).input_ids
            speech = [AUDIO_PLACEHOLDER] * (n_frames // FRAMES_PER_TOKEN)
            audio_ids.append(opening + speech + closing + after)
        batch["audio"] = query(audio_ids)
    return batch


def pad(rows, value, left=False):
    """Pads lists of ids, on the right or left: {"ids" (B, T) int64, "mask" (B, T) bool}."""
    side = "left" if left else "right"
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return {"ids": pad_sequence(ids, True, value, side),  # (B, T)
            "mask": pad_sequence(mask, True, False, side)}  # (B, T)


def count_answer_tokens(batch):
    """Returns the number of answer tokens in the student's query."""
    query = batch["audio"] or batch["text"]
    return int((query["labels"] != IGNORE).sum())


# ---- an epoch -----------------------------------------------------------------------------------


class Epoch(torch.utils.data.Dataset):
    """One epoch: item k is this rank's list of micro-batches for step k.

    The samples of step k depend on data, seed, global batch and k alone. So an interrupted run
    resumes with the same bytes; on another number of processes with the same steps, up to rounding.
    """

    def __init__(self, config, samples, order, collate, rank=0, world_size=1):
        """order: groups of sample indices. A group is one sample, except in world/lessons.py."""
        self.config, self.samples, self.order, self.collate = config, samples, order, collate
        self.rank, self.world_size = rank, world_size

    def __len__(self):
        return math.ceil(len(self.order) / self.config.global_batch)

    def groups(self, step):
        """Returns the samples of a step on all ranks, in groups, shortest first."""
        size = self.config.global_batch
        groups = self.order[step * size: (step + 1) * size]
        return sorted(groups, key=lambda group: sum(map(self.samples.length, group)))

    def sample_ids(self, step):
        """Returns the ids of a step's samples."""
        return [self.samples.rows[i]["id"] for i in sum(self.groups(step), [])]

    def __getitem__(self, step):
        # Every rank takes every world_size-th group, so that all have about the same work and the
        # same number of micro-batches. Samples of similar length share one, which saves padding.
        groups = self.groups(step)
        size = self.config.micro_batch
        mine = groups[self.rank:: self.world_size]
        longest = math.ceil(len(groups) / self.world_size)
        return [self.micro_batch(mine[start: start + size]) for start in range(0, longest, size)]

    def micro_batch(self, groups):
        """Collates groups. Without any, labels are ignored: DDP needs a backward pass anyway."""
        samples = [self.samples[i] for i in sum(groups or self.order[:1], [])]
        batch = self.collate(samples)
        if not groups:
            for form in ("text", "audio"):
                if batch[form] is not None:
                    batch[form]["labels"].fill_(IGNORE)
        elif self.config.on_policy:
            batch["samples"] = samples
        return batch


# ---- commands ------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make.add_command(commands)
    corpora.add_commands(commands)
    prepared.add_commands(commands)
    args = parser.parse_args()
    exit_with_parent()
    args.run(args)


if __name__ == "__main__":
    with readable_errors():
        main()
