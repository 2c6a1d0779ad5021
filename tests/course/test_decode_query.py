"""Grades `decode_query` (model.py): a query read after a prefix, or both read at once."""

import pytest
import torch
from tiny import same, tiny_model

from data import AUDIO_PLACEHOLDER
from model import Prefix

P, S = 9, 8  # tokens of the longest prefix and query
LENGTHS = [(9, 5), (4, 8), (7, 1)]  # of each row's prefix and query


@pytest.fixture(scope="module")
def ollm():
    """A model whose `embed` is written out: words, and speech in AUDIO_SLOTs."""
    ollm = tiny_model().requires_grad_(False)
    words = ollm.lvlm.get_input_embeddings()

    def embed(ids, pixels=None, audio_tokens=None):
        x = words(ids.clamp(min=0))  # (B, T, D)
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
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = llm(ollm, ids, positions, attention_mask=mask)
    return ids, Prefix(out.cache, mask, 0)


def make_query(lengths=LENGTHS, left=False):
    """Returns a query of rows of several lengths, padded on the right or left."""
    mask = torch.arange(S) < torch.tensor(lengths)[:, 1:]
    return {"ids": torch.randint(11, 60, (len(lengths), S)), "mask": mask.flip(1) if left else mask}


def at_once(ollm, before, after, shift=0, positions=None):
    """Returns the states (S, D) of ids after others, two lists read in one pass, unpadded."""
    if positions is None:
        positions = torch.arange(len(after))
    positions = torch.cat([torch.arange(len(before)), len(before) + shift + positions])
    ids = torch.cat([before, after])[None]
    return llm(ollm, ids, positions[None]).last_hidden_state[0, len(before):]


def check(ollm, hidden, ids, prefix, query, cause, **options):
    """Compares each row's states with those of prefix and query read at once."""
    __tracebackhide__ = True
    rows = zip(hidden, ids, prefix.mask, query["ids"], query["mask"])
    for states, before, is_prefix, after, is_query in rows:
        same(states[is_query], at_once(ollm, before[is_prefix], after[is_query], **options), cause)


def test_one_row(ollm):
    lengths = [(P, S)]
    (ids, prefix), query = read_prefix(ollm, lengths), make_query(lengths)
    hidden, _ = ollm.decode_query(prefix, query)
    check(ollm, hidden, ids, prefix, query,
          "not as if both had been read at once: the LLM needs the prefix's cache, and positions "
          "that go on from it")


@pytest.mark.parametrize("left", [False, True])
def test_rows_of_several_lengths(ollm, left):
    (ids, prefix), query = read_prefix(ollm), make_query(left=left)
    hidden, _ = ollm.decode_query(prefix, query)
    check(ollm, hidden, ids, prefix, query,
          "padding changes a row: it takes no position, neither the prefix's nor the query's, and "
          "the mask (B, P + S) hides it")


def test_two_queries_continue_one_prefix(ollm):
    (ids, prefix), first, second = read_prefix(ollm), make_query(), make_query()
    cause = "the prefix has grown with the first query: continue a copy of its cache"
    ollm.decode_query(prefix, first)
    assert prefix.cache.get_seq_length() == P and prefix.mask.size(1) == P, cause
    hidden, _ = ollm.decode_query(prefix, second)
    check(ollm, hidden, ids, prefix, second, cause)


def test_the_shift_of_positions(ollm):
    (ids, prefix), query = read_prefix(ollm), make_query()
    hidden, _ = ollm.decode_query(prefix._replace(shift=torch.full((3, 1), -2)), query)
    check(ollm, hidden, ids, prefix, query,
          "prefix.shift is added to the positions: a Qwen2-VL's picture takes fewer than tokens",
          shift=-2)


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


def test_speech(ollm):
    (_, prefix), query = read_prefix(ollm, [(P, S)]), make_query([(P, S)])
    written, _ = ollm.decode_query(prefix, query)
    words = ollm.embed(query["ids"][:, :4])  # (1, 4, D)
    spoken = {**query, "ids": query["ids"].clone()}
    spoken["ids"][:, :4] = AUDIO_PLACEHOLDER
    hidden, _ = ollm.decode_query(prefix, spoken, words)
    same(hidden, written, "audio tokens that equal a question's embeddings are read as it is: are "
                          "they passed on to embed?")


def test_several_questions_in_a_row(ollm):
    """Row 0 has questions of 3 and 4 tokens, row 1 one of 8; positions are given."""
    (ids, prefix), query = read_prefix(ollm, LENGTHS[:2]), make_query([(9, 7), (4, 8)])
    query["document_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1], [2] * 8])
    query["positions"] = torch.tensor([[0, 2, 3, 0, 1, 5, 6, 0], [0, 1, 2, 4, 5, 6, 7, 8]])
    hidden, _ = ollm.decode_query(prefix, query)
    for part, row in ((0, 0), (1, 0), (2, 1)):
        places = query["document_ids"][row] == part
        theirs = at_once(ollm, ids[row][prefix.mask[row]], query["ids"][row, places],
                         positions=query["positions"][row, places])
        same(hidden[row, places], theirs,
             'a token sees the prefix and what stands before it in its own "part" alone, and its '
             '"positions", if given, count from the end of the prefix')


def test_positions_without_parts(ollm):
    (ids, prefix), query = read_prefix(ollm, [(P, S)]), make_query([(P, S)])
    query["positions"] = torch.tensor([[0, 1, 3, 4, 8, 9, 10, 11]])
    hidden, _ = ollm.decode_query(prefix, query)
    check(ollm, hidden, ids, prefix, query, 'a query may have "positions" without a "part"',
          positions=query["positions"][0])


def test_a_prefix_that_is_trained(ollm):
    vectors = torch.randn(1, P, 128, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, P, dtype=torch.bool)
    out = ollm.lvlm.model.language_model(inputs_embeds=vectors, use_cache=True)
    hidden, _ = ollm.decode_query(Prefix(out.cache, mask, 0), make_query([(P, S)]))
    hidden.sum().backward()
    assert vectors.grad is not None, "the base learns through the prefix: something was detached"
