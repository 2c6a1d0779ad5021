"""Grades `embed` (model.py): words, pictures and speech become one sequence of vectors."""

import pytest
import torch
from tiny import same, tiny_model, untouched

from data import AUDIO_PLACEHOLDER


@pytest.fixture
def ollm():
    return tiny_model()


def make_ids(ollm, first=(), second=(), image=False):
    """Returns two rows of words (2, 14) with speech in some places, and 4 and 8 image tokens."""
    ids = torch.arange(11, 39).view(2, 14)
    if image:
        ids[0, :4] = ids[1, 2:10] = ollm.lvlm.config.image_token_id  # one tile, and two
    ids[0, [*first]] = ids[1, [*second]] = AUDIO_PLACEHOLDER
    return ids


def word(ollm, ids):
    return ollm.lvlm.get_input_embeddings().weight[ids]


def test_words(ollm):
    ids = make_ids(ollm)
    same(ollm.embed(ids), word(ollm, ids), "a word becomes its row of the LLM's embeddings")
    assert ollm.embed(ids[:, :1]).shape == (2, 1, 128), "a query may be one token"


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_pictures(ollm, dtype):
    ollm.float()
    ids = make_ids(ollm, image=True)
    pixels = {"pixel_values": (99 * torch.rand(3, 3, 64, 64)).to(dtype)}
    image, x = ollm.encode_images(pixels), ollm.embed(ids, pixels)  # (12, D)
    same(torch.cat([x[0, :4], x[1, 2:10]]), image,
         "image placeholders take the batch's image tokens, row after row, tile after tile; pixels "
         "may be bytes, which encode_images normalizes")
    same(x[1, 10:], word(ollm, ids[1, 10:]), "words beside a picture stay words")


@pytest.mark.parametrize("first, second", [(range(1, 8), range(1, 4)), (range(5, 9), range(3, 10)),
                                           ((2, 5, 6, 13), ()), ((), (0, 13))])
def test_speech(ollm, first, second):
    ids, audio = make_ids(ollm, first, second), torch.randn(2, 7, 128, dtype=torch.float64)
    x = ollm.embed(ids, None, audio)
    for row, places in enumerate((first, second)):
        same(x[row, [*places]], audio[row, : len(places)],
             "a row's audio placeholders, wherever they stand, take its audio tokens in their "
             "order, as many as there are placeholders: those beyond are padding")
    same(x[ids >= 0], word(ollm, ids[ids >= 0]), "words beside speech stay words")


@pytest.mark.parametrize("base, speech", [(torch.float32, torch.float32),
                                          (torch.bfloat16, torch.float32),
                                          (torch.float32, torch.bfloat16)])
def test_pictures_and_speech(ollm, base, speech):
    ollm.lvlm.to(base)
    ids = make_ids(ollm, (6, 7, 8), (12, 13), image=True)
    audio, tiles = torch.randn(2, 3, 128).to(speech), torch.rand(3, 3, 64, 64).to(base)
    x = ollm.embed(ids, {"pixel_values": tiles}, audio)
    assert x.dtype == base, "the sequence has the words' type, whatever the speech's is"
    same(x[0, :4], ollm.encode_images({"pixel_values": tiles})[:4], "pictures stand beside speech")
    same(x[1, 12:], audio[1, :2], "speech stands in its place beside pictures, too", 0.02, 0.02)


def test_gradients(ollm):
    ids = make_ids(ollm, (6, 7, 8), (12, 13), image=True)
    audio = torch.randn(2, 3, 128, dtype=torch.float64, requires_grad=True)
    pixels = {"pixel_values": torch.rand(3, 3, 64, 64, dtype=torch.float64)}
    ollm.embed(ids, pixels, audio).square().sum().backward()
    assert audio.grad is not None, "the audio tokens need a gradient: something was detached"
    used = audio.grad.abs().sum(-1) > 0
    assert used.tolist() == [[True] * 3, [True, True, False]], "every audio token that is read"
    for module, learns in ((ollm.lvlm.get_input_embeddings(), "its words"),
                           (ollm.lvlm.model.vision_tower, "to see")):
        assert any(p.grad is not None and p.grad.any() for p in module.parameters()), (
            f"the base learns {learns}: that gradient was cut")


def test_its_arguments_stay(ollm):
    ids, audio = make_ids(ollm, (6, 7), (12,), image=True), torch.randn(2, 2, 128)
    pixels = {"pixel_values": torch.rand(3, 3, 64, 64, dtype=torch.float64)}
    with untouched(ids, pixels, audio, ollm.lvlm.get_input_embeddings().weight):
        ollm.embed(ids, pixels, audio)
