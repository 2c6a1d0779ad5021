"""Grades `collate` (data.py): ids, labels, padding and sound, row by row."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_model, untouched

from data import AUDIO_PLACEHOLDER, FRAMES_PER_TOKEN, IGNORE, collate, mel_spectrograms
from plumbing.files import BadInput

PROMPT, END = "<|im_end|><|im_start|>assistant\n", "<|im_end|>"
QUESTIONS = ("what color is the circle", "is there a red star", "count")
ANSWERS = ("red", "yes there is", "two things")
LENGTHS = (6_400, 16_001, 9_000)  # of speech, in waveform samples
TILES = (1, 3, 1)


@pytest.fixture(scope="module")
def ollm():
    return tiny_model()


def make_samples(*without, **more):
    """Returns three samples without some keys, and with lists of others."""
    rng, samples = np.random.default_rng(0), []
    for i in range(3):
        pixels = torch.randint(256, (TILES[i], 3, 64, 64), dtype=torch.uint8)
        sample = {"id": str(i), "question": QUESTIONS[i], "answer": ANSWERS[i],
                  "wave": rng.normal(0, 0.1, LENGTHS[i]).astype(np.float32),
                  "pixels": {"pixel_values": pixels}}
        sample |= {key: values[i] for key, values in more.items() if values[i] is not None}
        samples.append({key: value for key, value in sample.items() if key not in without})
    return samples


def make_batch(ollm, samples, answers=True, guard=nullcontext, **settings):
    settings = replace(ollm.settings, **settings)
    with guard(samples):
        return collate(samples, ollm.tokenizer, ollm.mel_extractor, settings, answers)


def count_tokens(ollm, lengths=LENGTHS):
    """Returns how many audio tokens speech of these lengths has: begun ones count."""
    return [-(-n // (FRAMES_PER_TOKEN * ollm.mel_extractor.hop_length)) for n in lengths]


def check(ollm, query, questions=QUESTIONS, spoken=False, answers=ANSWERS, ends=(END,) * 3):
    """Compares a query's rows, without padding, with question, prompt, answer and end mark.

    spoken: audio placeholders stand before the question's words
    """
    __tracebackhide__ = True
    assert query["ids"].shape == query["mask"].shape == query["labels"].shape, "one shape for all"
    assert query["ids"].dtype == torch.int64 and query["mask"].dtype == torch.bool
    prompt = ollm.tokenizer(PROMPT).input_ids
    for b, (question, answer, end) in enumerate(zip(questions, answers, ends)):
        asked = [AUDIO_PLACEHOLDER] * (spoken and count_tokens(ollm)[b])
        asked = asked + ollm.tokenizer(question).input_ids + prompt
        answer = ollm.tokenizer(answer + end).input_ids
        ids, labels = (query[key][b][query["mask"][b]].tolist() for key in ("ids", "labels"))
        assert ids == asked + answer, "a query is its question, the prompt, the answer and its end"
        assert labels == [IGNORE] * len(asked) + answer, (
            "labels stand where the answer and its end mark do, not shifted, IGNORE elsewhere")


def test_the_prefix(ollm):
    prefix = make_batch(ollm, make_samples())["prefix"]
    for ids, mask, tiles in zip(prefix["ids"], prefix["mask"], TILES):
        image = "<img>" + "<IMG_CONTEXT>" * 4 * tiles + "</img>\n"
        wanted = ollm.tokenizer(f"<|im_start|>system\n<|im_end|><|im_start|>user\n{image}")
        assert ids[mask].tolist() == wanted.input_ids, (
            "the prefix is all before the question, with a placeholder for each image token")


@pytest.mark.parametrize("form", ["text", "audio"])
def test_the_question(ollm, form):
    spoken = form == "audio"
    questions = [""] * 3 if spoken else QUESTIONS
    check(ollm, make_batch(ollm, make_samples())[form], questions, spoken)
    batch = make_batch(ollm, make_samples("answer"), answers=False)
    check(ollm, batch[form], questions, spoken, [""] * 3, [""] * 3)


@pytest.mark.parametrize("answers", [True, False])
def test_padding(ollm, answers):
    batch = make_batch(ollm, make_samples(), answers)
    for form in ("text", "audio", "prefix"):
        mask = batch[form]["mask"].int()
        if answers or form == "prefix":
            assert (mask.diff(dim=1) <= 0).all(), "training, and the prefix: padding stands right"
        else:
            assert (mask.diff(dim=1) >= 0).all(), "in generation the last column is the last token"
        padding = batch[form]["ids"][mask == 0]
        assert (padding == ollm.tokenizer.pad_token_id).all(), "padding is the tokenizer's"
        if form != "prefix":
            assert (batch[form]["labels"][mask == 0] == IGNORE).all(), "padding has no label"


@pytest.mark.parametrize("seconds", [None, 0.8])
def test_the_speech(ollm, seconds):
    samples = make_samples()
    batch = make_batch(ollm, samples, audio_seconds=seconds)
    shortest = int((seconds or 0) * 16_000)
    waves = [np.pad(s["wave"], (0, max(0, shortest - len(s["wave"])))) for s in samples]
    mel, n_frames = mel_spectrograms(ollm.mel_extractor, waves)
    assert torch.equal(batch["n_frames"], n_frames) and torch.equal(batch["mel"], mel), (
        "mel and n_frames are mel_spectrograms' of the samples' waves; the setting audio_seconds "
        "pads speech with silence to so many, and what is longer stays")
    placeholders = (batch["audio"]["ids"] == AUDIO_PLACEHOLDER).sum(1).tolist()
    assert placeholders == count_tokens(ollm, map(len, waves)), "silence has placeholders, too"


def test_the_pictures(ollm):
    samples = make_samples()
    del samples[1]["pixels"]
    together = torch.cat([samples[i]["pixels"]["pixel_values"] for i in (0, 2)])
    pixels = make_batch(ollm, samples)["pixels"]["pixel_values"]
    assert torch.equal(pixels, together), "all rows' pictures, in their order, in one tensor"


def test_what_samples_lack_is_none(ollm):
    batch = make_batch(ollm, make_samples("wave", "pixels"))
    lacking = [batch[key] for key in ("pixels", "mel", "n_frames", "audio")]
    assert lacking == [None] * 4, (
        "without speech mel, n_frames and audio are None; without a picture pixels is")
    assert make_batch(ollm, make_samples("question"))["text"] is None, "no question, no text"


def test_a_model_without_ears(ollm):
    batch = make_batch(tiny_model(ears=False), make_samples())
    check(ollm, batch["text"])
    assert batch["audio"] is batch["mel"] is batch["n_frames"] is None, (
        "a base has no mel_extractor (None): it reads samples that have sound, too")


def test_what_follows_the_speech_in_writing(ollm):
    batch = make_batch(ollm, make_samples("question"))
    check(ollm, batch["audio"], [ollm.settings.instruction] * 3, spoken=True)
    batch = make_batch(ollm, make_samples(after=(None, "answer with one word", "say it")))
    check(ollm, batch["audio"], ["", "answer with one word", "say it"], spoken=True)


def test_an_answer_that_ends_otherwise(ollm):
    batch = make_batch(ollm, make_samples(end=(None, "", "!")))
    check(ollm, batch["text"], ends=(END, "", "!"))


def test_what_is_too_long_is_refused(ollm):
    question = "is " * (ollm.tokenizer.model_max_length - 10)
    with pytest.raises(BadInput):
        make_batch(ollm, make_samples(question=(None, question, None)))
        pytest.fail("check_length refuses a sample whose prefix and query are too long together")


def test_its_samples_stay(ollm):
    samples = make_samples(after=(None, "say it", None), end=(None, "", "!"))
    make_batch(ollm, samples, guard=untouched, audio_seconds=0.8)
