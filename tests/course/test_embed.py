"""Grades `embed` (model.py): words, pictures and speech become one sequence of vectors."""

import pytest
import torch
from tiny import same, tiny_model

from data import AUDIO_PLACEHOLDER


@pytest.fixture(scope="module")
def ollm():
    return tiny_model().requires_grad_(False)


@pytest.fixture
def ids(ollm):
    """Two rows of words (2, 14)."""
    return torch.arange(11, 39).view(2, 14)


def word(ollm, ids):
    return ollm.lvlm.get_input_embeddings().weight[ids]


def test_words(ollm, ids):
    same(ollm.embed(ids), word(ollm, ids), "a word becomes its row of the LLM's embeddings")


def test_pictures(ollm, ids):
    ids[0, 2:6] = ids[1, 3:11] = ollm.lvlm.config.image_token_id  # one tile, and two
    pixels = {"pixel_values": torch.randn(3, 3, 64, 64, dtype=torch.float64)}
    image = ollm.lvlm.get_image_features(**pixels).pooler_output  # (tiles, 4, D)
    x = ollm.embed(ids, pixels)
    same(x[0, 2:6], image[0], "a row's image placeholders take its own tiles' tokens, in order")
    same(x[1, 3:11], image[1:].flatten(0, 1),
         "the pictures come for the whole batch at once: row after row, tile after tile")
    same(x[1, 11:], word(ollm, ids[1, 11:]), "words beside a picture stay words")


def test_speech(ollm, ids):
    ids[0, 1:8] = ids[1, 1:4] = AUDIO_PLACEHOLDER
    audio = torch.randn(2, 7, 128, dtype=torch.float64, requires_grad=True)
    x = ollm.embed(ids, audio_tokens=audio)
    same(x[0, 1:8], audio[0], "audio placeholders take the row's audio tokens, in their order")
    same(x[1, 1:4], audio[1, :3],
         "a row takes as many audio tokens as it has slots: those beyond are padding")
    same(x[1, 4:], word(ollm, ids[1, 4:]), "words after speech stay words")
    assert x.requires_grad, "the audio tokens need a gradient: something was detached"


def test_speech_that_comes_last(ollm, ids):
    ids[0, 5:9] = ids[1, 3:10] = AUDIO_PLACEHOLDER
    audio = torch.randn(2, 7, 128, dtype=torch.float64)
    x = ollm.embed(ids, audio_tokens=audio)
    same(x[0, 5:9], audio[0, :4], "slots may stand anywhere in a row")
    same(x[1, 3:10], audio[1], "slots may stand anywhere in a row")


def test_ids_stay_as_they_are(ollm, ids):
    ids[0, 1:3] = AUDIO_PLACEHOLDER
    before = ids.clone()
    ollm.embed(ids, audio_tokens=torch.randn(2, 2, 128, dtype=torch.float64))
    assert torch.equal(ids, before), "the batch's ids are needed again: change a copy"
