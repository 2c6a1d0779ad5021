"""Grades `decode_query` (model.py): a query read after a prefix, or both read at once."""

import pytest
import torch
from tiny import same, tiny_model, untouched

from data import AUDIO_PLACEHOLDER
from model import Prefix

P, S = 9, 8  # tokens of the longest prefix and query
ONE = [(P, S)]
LENGTHS = [(9, 5), (4, 8), (7, 1)]  # of each row's prefix and query


@pytest.fixture
def ollm():
    """A model whose `embed` is written out: words, and speech in its placeholders."""
    ollm = tiny_model()

    def embed(ids, pixels=None, audio_tokens=None):
        x = ollm.lvlm.get_input_embeddings()(ids.clamp(min=0))  # (B, T, D)
        if audio_tokens is not None:
            x[ids == AUDIO_PLACEHOLDER] = audio_tokens.flatten(0, 1)
        return x

    ollm.embed = embed
    return ollm


def llm(ollm, ids, positions, **options):
    """Runs the LLM on ids (B, T)."""
    return ollm.lvlm.model.language_model(inputs_embeds=ollm.embed(ids), position_ids=positions,
                                          use_cache=True, **options)


def read_prefix(ollm, lengths=LENGTHS):
    """Returns ids (B, P) and the Prefix of rows of several lengths, padded on the right."""
    ids = torch.randint(11, 60, (len(lengths), P))
    mask = torch.arange(P) < torch.tensor(lengths)[:, :1]
    out = llm(ollm, ids, (mask.cumsum(1) - 1).clamp(min=0), attention_mask=mask)
    return ids, Prefix(out.cache, mask, 0)


def make_query(lengths=LENGTHS, left=False):
    """Returns a query of rows of several lengths, padded on the right or left."""
    mask = torch.arange(S) < torch.tensor(lengths)[:, 1:]
    return {"ids": torch.randint(11, 60, (len(lengths), S)), "mask": mask.flip(1) if left else mask}


def check(ollm, hidden, ids, prefix, query, cause, rows=None, shift=0, positions=None, rtol=1e-4):
    """Compares the states of rows of tokens with one pass over prefix and query, unpadded.

    rows: (row, mask of its tokens), by default each row's; positions: (B, S), from the prefix's end
    """
    __tracebackhide__ = True
    for row, read in rows or enumerate(query["mask"]):
        before, after = ids[row, prefix.mask[row]], query["ids"][row, read]
        places = torch.arange(len(after)) if positions is None else positions[row, read]
        places = torch.cat([torch.arange(len(before)), len(before) + places + shift])
        theirs = llm(ollm, torch.cat([before, after])[None], places[None]).last_hidden_state[0]
        same(hidden[row, read], theirs[len(before):], cause, rtol, 2 * rtol)


def test_one_row(ollm):
    (ids, prefix), query = read_prefix(ollm, ONE), make_query(ONE)
    hidden, _ = ollm.decode_query(prefix, query)
    assert hidden.shape == (1, S, 128), "hidden states of the query alone, (B, S, D)"
    check(ollm, hidden, ids, prefix, query,
          "not as if both had been read at once: the LLM needs the prefix's cache, and positions "
          "that go on from it")


@pytest.mark.parametrize("left", [False, True])
def test_rows_of_several_lengths(ollm, left):
    (ids, prefix), query = read_prefix(ollm), make_query(left=left)
    hidden, _ = ollm.decode_query(prefix, query)
    assert hidden.isfinite().all(), "also padding's states are numbers: else no gradient is one"
    check(ollm, hidden, ids, prefix, query,
          "padding changes a row: it takes no position, neither the prefix's nor the query's, and "
          "the mask (B, P + S) hides it")


def test_two_queries_continue_one_prefix(ollm):
    (ids, prefix), first, second = read_prefix(ollm), make_query(), make_query()
    with untouched(prefix.mask, first):
        ollm.decode_query(prefix, first)
    check(ollm, ollm.decode_query(prefix, second)[0], ids, prefix, second,
          "the prefix has grown with the first query: continue a copy of its cache")


def test_speech(ollm):
    (_, prefix), query = read_prefix(ollm.requires_grad_(False), ONE), make_query(ONE)
    written, _ = ollm.decode_query(prefix, query)
    speech = ollm.embed(query["ids"][:, :4]).requires_grad_()  # (1, 4, D)
    query["ids"][:, :4] = AUDIO_PLACEHOLDER
    hidden, _ = ollm.decode_query(prefix, query, speech)
    same(hidden, written, "audio tokens that equal a question's embeddings are read as it is: are "
                          "they passed on to embed?")
    assert hidden.requires_grad, "what hears learns through the LLM: something was detached"
    hidden[:, -1].sum().backward()
    assert (speech.grad.abs().sum(-1) > 0).all(), "the last state depends on all audio tokens"


def test_the_base_learns(ollm):
    vectors = torch.randn(1, P, 128, dtype=torch.float64, requires_grad=True)
    out = ollm.lvlm.model.language_model(inputs_embeds=vectors, use_cache=True)
    mask = torch.ones(1, P, dtype=torch.bool)
    hidden, _ = ollm.decode_query(Prefix(out.cache, mask, 0), make_query(ONE))
    hidden.sum().backward()
    assert vectors.grad is not None, "the base learns through the prefix: something was detached"
    assert ollm.lvlm.get_input_embeddings().weight.grad is not None, "the base learns words, too"


def test_the_shift_of_positions(ollm):
    (ids, prefix), query = read_prefix(ollm), make_query()
    shift = torch.tensor([[-2], [3], [0]])
    hidden, _ = ollm.decode_query(prefix._replace(shift=shift), query)
    check(ollm, hidden, ids, prefix, query, "prefix.shift is added to the positions, each row's to "
          "its own: a Qwen2-VL's picture takes fewer than tokens",
          positions=torch.arange(S) + shift)


@pytest.mark.parametrize("shift", [0, 5])
def test_reading_on_token_by_token(ollm, shift):
    (ids, prefix), query = read_prefix(ollm), make_query(left=True)
    longer, states = prefix._replace(shift=shift and torch.full((3, 1), shift)), []
    for i in range(S):
        part = {key: value[:, i: i + 1] for key, value in query.items()}
        hidden, longer = ollm.decode_query(longer, part)
        states.append(hidden)
    check(ollm, torch.cat(states, dim=1), ids, prefix, query,
          "the Prefix returned is not the longer one: generation goes on from its cache, its mask "
          "(B, P + S) and its shift", shift=shift)


def test_half_precision(ollm):
    (ids, prefix), query = read_prefix(ollm.bfloat16()), make_query()
    hidden, _ = ollm.decode_query(prefix, query)
    assert hidden.dtype == torch.bfloat16, "an LLM in half precision reads in half precision"
    check(ollm, hidden, ids, prefix, query, "not as if read at once, in bfloat16", rtol=0.1)


def test_positions_without_documents(ollm):
    (ids, prefix), query = read_prefix(ollm, ONE), make_query(ONE)
    query["positions"] = torch.tensor([[0, 1, 3, 4, 8, 9, 10, 11]])
    check(ollm, ollm.decode_query(prefix, query)[0], ids, prefix, query,
          'a query may have "positions" without "document_ids"', positions=query["positions"])


@pytest.mark.parametrize("given", [True, False])
def test_several_questions_in_a_row(ollm, given):
    """Row 0 has questions of 3 and 4 tokens, row 1 one of 8."""
    (ids, prefix), query = read_prefix(ollm, LENGTHS[:2]), make_query([(9, 7), (4, 8)])
    query["document_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1], [2] * 8])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0], [*range(8)]])
    if given:
        positions = torch.tensor([[0, 2, 3, 0, 1, 5, 6, 0], [0, 1, 2, 4, 5, 6, 7, 8]])
        query["positions"] = positions
    hidden, _ = ollm.decode_query(prefix, query)
    rows = [(row, query["document_ids"][row] == number) for row, number in ((0, 0), (0, 1), (1, 2))]
    check(ollm, hidden, ids, prefix, query, "a token sees the prefix and what stands before it in "
          'its own document alone, and its "positions", if given, count from the end of the prefix',
          rows, positions=positions)
