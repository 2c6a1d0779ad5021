"""Grades `collate` (data.py): ids, labels, padding and sound, row by row."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_model

from data import AUDIO_PLACEHOLDER, IGNORE, collate, mel_spectrograms

TURN, END = "<|im_end|><|im_start|>assistant\n", "<|im_end|>"
QUESTIONS = ("what color is the circle", "is there a red star", "count")
ANSWERS = ("red", "yes there is", "two things")
LENGTHS = (6_400, 16_001, 9_000)  # of speech, in waveform samples: 10, 26 and 15 tokens
N_AUDIO = (10, 26, 15)
TILES = (1, 3, 1)


@pytest.fixture(scope="module")
def ollm():
    return tiny_model()


def make_samples(*without, **more):
    """Returns three samples without some keys, or with more."""
    rng, samples = np.random.default_rng(0), []
    for i in range(3):
        pixels = torch.randint(256, (TILES[i], 3, 64, 64), dtype=torch.uint8)
        sample = {"id": str(i), "question": QUESTIONS[i], "answer": ANSWERS[i],
                  "wave": rng.normal(0, 0.1, LENGTHS[i]).astype(np.float32),
                  "pixels": {"pixel_values": pixels}, **more}
        samples.append({key: value for key, value in sample.items() if key not in without})
    return samples


def make_batch(ollm, samples, answers=True, **settings):
    settings = replace(ollm.settings, **settings)
    return collate(samples, ollm.tokenizer, ollm.mel_extractor, settings, answers)


def rows(ollm, query, keys=("ids", "labels")):
    """Returns the lists of each row without its padding."""
    assert len({query[key].shape for key in (*keys, "mask")}) == 1, (
        "ids, mask and labels have one shape: does each part of a row have its labels?")
    return [[query[key][b][mask].tolist() for key in keys] for b, mask in enumerate(query["mask"])]


def expected(ollm, slots, answers=ANSWERS, end=END):
    """Returns the ids and labels of each row: slot, turn, answer, end."""
    turn = ollm.tokenizer(TURN).input_ids
    wanted = []
    for slot, answer in zip(slots, answers):
        answer = ollm.tokenizer(answer + end).input_ids
        wanted.append([slot + turn + answer, [IGNORE] * len(slot + turn) + answer])
    return wanted


def written(ollm):
    return [ollm.tokenizer(question).input_ids for question in QUESTIONS]


def spoken(ollm, after=""):
    return [[AUDIO_PLACEHOLDER] * n + ollm.tokenizer(after).input_ids for n in N_AUDIO]


def check_rows(ours, wanted):
    """Compares each row's ids and labels, with a likely cause."""
    __tracebackhide__ = True
    for (ids, labels), (their_ids, their_labels) in zip(ours, wanted, strict=True):
        assert ids == their_ids, "a query is its slot, the turn, the answer and the end mark"
        assert labels == their_labels, (
            "labels stand where the answer and its end mark do, not shifted, IGNORE elsewhere")


def test_the_prefix(ollm):
    batch = make_batch(ollm, make_samples())
    start = "<|im_start|>system\n<|im_end|><|im_start|>user\n<img>"
    prompts = [start + "<IMG_CONTEXT>" * 4 * n + "</img>\n" for n in TILES]
    wanted = [[ollm.tokenizer(prompt).input_ids] for prompt in prompts]
    ours = rows(ollm, batch["prefix"], ["ids"])
    assert ours == wanted, "the prefix is all before the question, with a slot for each image token"


def test_the_written_question(ollm):
    check_rows(rows(ollm, make_batch(ollm, make_samples())["text"]), expected(ollm, written(ollm)))


def test_the_spoken_question(ollm):
    check_rows(rows(ollm, make_batch(ollm, make_samples())["audio"]), expected(ollm, spoken(ollm)))


def test_padding(ollm):
    for answers in (True, False):
        batch = make_batch(ollm, make_samples(), answers)
        for form in ("text", "audio"):
            query = batch[form]
            mask = query["mask"].int()
            assert mask.dtype != query["mask"].dtype == torch.bool, "the mask is bool"
            is_right = (mask.diff(dim=1) <= 0).all() if answers else (mask.diff(dim=1) >= 0).all()
            assert is_right, ("with answers (training) padding stands right, without (generation) "
                              "left: the last column is the last token read")
            assert (query["labels"][~query["mask"]] == IGNORE).all(), "padding has no label"
            assert (query["ids"][~query["mask"]] == ollm.tokenizer.pad_token_id).all(), (
                "padding is the tokenizer's pad token")
        assert (batch["prefix"]["mask"].int().diff(dim=1) <= 0).all(), (
            "the prefix is padded on the right in any case")


def test_without_answers(ollm):
    batch = make_batch(ollm, make_samples(), answers=False)
    for form, slots in (("text", written(ollm)), ("audio", spoken(ollm))):
        wanted = expected(ollm, slots, answers=[""] * 3, end="")
        check_rows(rows(ollm, batch[form]), wanted)


def test_the_speech(ollm):
    samples = make_samples()
    batch = make_batch(ollm, samples)
    mel, n_frames = mel_spectrograms(ollm.mel_extractor, [sample["wave"] for sample in samples])
    assert torch.equal(batch["n_frames"], n_frames) and torch.equal(batch["mel"], mel), (
        "mel and n_frames are mel_spectrograms' of the samples' waves")


def test_speech_of_a_fixed_length(ollm):
    batch = make_batch(ollm, make_samples(), audio_seconds=1)
    assert batch["n_frames"].tolist() == [100, 104, 100], (
        "the setting audio_seconds pads speech with silence to so many; what is longer stays")
    slots = (batch["audio"]["ids"] == AUDIO_PLACEHOLDER).sum(1).tolist()
    assert slots == [25, 26, 25], "padded speech takes slots for its silence, too"


def test_the_pictures(ollm):
    samples = make_samples()
    together = torch.cat([sample["pixels"]["pixel_values"] for sample in samples])
    pixels = make_batch(ollm, samples)["pixels"]["pixel_values"]
    assert torch.equal(pixels, together), "all rows' pictures, in their order, in one tensor"


def test_what_samples_lack_is_none(ollm):
    batch = make_batch(ollm, make_samples("wave", "pixels"))
    lacking = [batch[key] for key in ("pixels", "mel", "n_frames", "audio")]
    assert lacking == [None] * 4, (
        "without speech mel, n_frames and audio are None; without a picture pixels is")
    assert make_batch(ollm, make_samples("question"))["text"] is None, "no question, no text"


def test_speech_to_transcribe(ollm):
    batch = make_batch(ollm, make_samples("question", "pixels"))
    check_rows(rows(ollm, batch["audio"]),
               expected(ollm, spoken(ollm, ollm.settings.instruction)))


def test_what_follows_the_speech_in_writing(ollm):
    batch = make_batch(ollm, make_samples(after="answer with one word"))
    check_rows(rows(ollm, batch["audio"]), expected(ollm, spoken(ollm, "answer with one word")))


def test_an_answer_that_ends_otherwise(ollm):
    batch = make_batch(ollm, make_samples(end=""))
    check_rows(rows(ollm, batch["text"]), expected(ollm, written(ollm), end=""))
