"""Curriculum, packing and randomized positions: the built-in base is trained in minutes.

The method needs none of this, as real LVLMs are pretrained. Only the stage vision-text of the
built-in world uses it, by `lessons` in train.py.

    curriculum            phase 0 has only lists of what the picture shows; questions are phase 1
    packing               the questions about one picture share a row of the batch: the picture is
                          encoded once, and the attention mask separates the questions
    randomized positions  most questions get positions as far apart as those of speech

There is nothing to run here. `python -m pytest tests/test_model.py -k share_a_row` compares packed
rows with separate ones. Letters in shape comments: n samples, B rows, S tokens of a row.
"""

import functools
import itertools
import random

import torch
from torch.nn.utils.rnn import pad_sequence

from plumbing.files import BadInput
from real.families import CHATS


def lessons(rows, collate, seed):
    """Returns the order of the samples (a curriculum), and a collate that packs them.

    rows     lines of samples.jsonl; "group" names the picture, "phase" is 0 or 1
    collate  data.collate with its options, by functools.partial
    The order is a list of lists of row numbers: a list holds all that is asked about one picture.
    """
    return curriculum(rows, seed), functools.partial(collate_packed, collate=collate, seed=seed)


def curriculum(rows, seed):
    """Returns the groups of row numbers: phase 0 before phase 1, in each shuffled by the seed."""
    groups = {}
    for i, row in enumerate(rows):
        key = float(row.get("phase", 0)), row.get("group", i)
        groups.setdefault(key, []).append(i)
        if row.get("image") != rows[groups[key][0]].get("image"):
            raise BadInput(f"{row['where']}: its group has another picture")
    keys = list(groups)
    random.Random(seed).shuffle(keys)
    keys.sort(key=lambda key: key[0])
    return [groups[key] for key in keys]


def collate_packed(samples, collate, seed):
    """Makes a batch as `data.collate` does, but packs neighbours of one group into a row.

    Returns its batch with B rows for n samples. Its "text" also has "positions" and, where rows are
    packed, "document_ids": the number of the sample that a token belongs to, -1 for padding;
    (B, S) each.
    """
    # The first question of each row brings the picture.
    groups = itertools.groupby(range(len(samples)), lambda i: samples[i].get("group", i))
    rows = [list(group) for _, group in groups]
    first = [row[0] for row in rows]
    alone = []
    for i, sample in enumerate(samples):
        sample = dict(sample)
        if i not in first:
            sample.pop("pixels", None)
        alone.append(sample)

    # One row per sample first. Their tokens, without padding, are packed below.
    batch, tokenizer = collate(alone), collate.keywords["tokenizer"]
    query = batch["text"]
    lengths = query["mask"].sum(1).tolist()
    n_turn = len(tokenizer(CHATS["Hermes-2"]["generation_prompt"]).input_ids)
    positions, parts = [], []
    for i, sample in enumerate(samples):
        n_answer = int((query["labels"][i] >= 0).sum())
        positions.append(random_positions(sample, lengths[i] - n_answer - n_turn, lengths[i], seed))
        parts.append(torch.full((lengths[i],), i))

    def join(values, fill):
        """Puts the values of each row's samples one after another: (B, S)."""
        joined = []
        for row in rows:
            joined.append(torch.cat([values[i][: lengths[i]] for i in row]))
        return pad_sequence(joined, batch_first=True, padding_value=fill)

    batch["prefix"] = {key: value[first] for key, value in batch["prefix"].items()}
    batch["text"] = {"ids": join(query["ids"], tokenizer.pad_token_id),
                     "mask": join(query["mask"], False), "labels": join(query["labels"], -100),
                     "positions": join(positions, 0)}
    if len(rows) < len(samples):
        batch["text"]["document_ids"] = join(parts, -1)
    return batch


def random_positions(sample, n_question, n_all, seed, most=4, share=0.6):
    """Returns the positions (n_all,) of a question, the generation prompt and the answer.

    A tiny LLM that is trained on short questions alone fails at the positions of speech, which
    takes two to four tokens a word. So a share of the written questions gets randomized positions
    over up to `most` times their length, in order (Ruoss et al., ACL 2023); what follows the
    question is contiguous. Real LLMs are trained on long questions.
    """
    rng = random.Random(f"{seed}/{sample['id']}")
    if rng.random() >= share:
        return torch.arange(n_all)
    span = rng.randint(n_question, most * n_question)
    question = sorted(rng.sample(range(span), n_question))
    rest = range(span, span + n_all - n_question)
    return torch.tensor([*question, *rest])
