"""The probes: cuts against a hand-written mask, and numbers against the model's own."""

import numpy as np
import pytest
import torch
from conftest import build_ollm, collate, run_here
from test_attention import FORMS, first_layer, runs  # noqa: F401 (a fixture)
from test_model import make_samples

from analysis import attention, bench, probe
from analysis.attention import QUERY, RESPONSE, SYSTEM, TURN, VISION
from data import AUDIO_PLACEHOLDER
from loss import self_kd_loss


@pytest.fixture(scope="module")
def ollm():
    return build_ollm()


@pytest.fixture(scope="module")
def samples(ollm):
    return make_samples(ollm)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_an_empty_window_or_an_empty_cut_changes_nothing(ollm, samples, form):
    batch, llm = collate(ollm, samples), ollm.lvlm.model.language_model
    spans = attention.spans_of(ollm, batch, form)
    pairs = probe.forbidden_pairs(spans, "response", QUERY)
    nothing = torch.zeros_like(pairs)
    with attention.eager_attention(llm):
        uncut = attention.full_pass(ollm, batch, form)
    for first, width, cut in ((0, 0, pairs), (2, 0, pairs), (0, 4, nothing), (0, 4, pairs)):
        with probe.cut_attention(llm, first, width, cut):
            hidden = attention.full_pass(ollm, batch, form)
        assert torch.equal(hidden, uncut) == (width == 0 or not cut.any()), "the last must differ"


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", probe.CUTS)
def test_a_cut_equals_a_hand_written_mask(ollm, samples, form, name):
    batch, llm = collate(ollm, samples[2:3]), ollm.lvlm.model.language_model
    spans = attention.spans_of(ollm, batch, form)
    names, (looking, onto) = spans[0].tolist(), probe.CUTS[name]
    rows = [t for t, span in enumerate(names) if span == QUERY]
    if looking == "response":  # from the last prompt position to the last word
        rows = [t - 1 for t, span in enumerate(names) if span == RESPONSE]
        assert names[rows[0]] == TURN
    by_hand = first_layer(ollm, batch, form)  # (heads, T, T)
    for row in rows:
        by_hand[:, row, [t for t, span in enumerate(names) if span == onto]] = 0
        by_hand[:, row] /= by_hand[:, row].sum(-1, keepdim=True)  # a softmax without these keys
    pairs = probe.forbidden_pairs(spans, looking, onto)
    with (attention.record_attention(llm, lambda weights: weights[0]) as layers,
          probe.cut_attention(llm, 0, 1, pairs)):
        attention.full_pass(ollm, batch, form)
    torch.testing.assert_close(layers[0].double(), by_hand, rtol=0, atol=2e-6)
    assert (layers[0][:, pairs[0]] == 0).all()
    assert (layers[1][:, pairs[0]] > 0).any(), "the second layer is not cut"


@torch.no_grad()
def test_a_question_cut_from_the_picture_in_all_layers_does_not_know_it(ollm, samples):
    llm, states = ollm.lvlm.model.language_model, []
    for pixels in (samples[0]["pixels"], samples[1]["pixels"]):
        batch = collate(ollm, [{**samples[2], "pixels": pixels}])
        spans = attention.spans_of(ollm, batch, "audio")
        pairs = probe.forbidden_pairs(spans, "query", VISION)
        pairs |= (spans == SYSTEM)[:, :, None] & (spans == VISION)[:, None, :]  # </img> looks, too
        for width in (4, 3):
            with probe.cut_attention(llm, 0, width, pairs):
                states.append(attention.full_pass(ollm, batch, "audio")[spans == QUERY])
    torch.testing.assert_close(states[0], states[2], rtol=0, atol=1e-6)
    assert (states[1] - states[3]).abs().max() > 1e-3, "one layer is enough to see it"


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_log_likelihood_is_the_naive_s(ollm, samples, form):
    ours = probe.log_likelihood(ollm, collate(ollm, samples), form)
    for sample, value in zip(samples, ours):
        logits, labels = bench.naive_pass(ollm, collate(ollm, [sample]), form)
        theirs = -torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum")
        assert value.item() == pytest.approx(theirs.item(), abs=1e-4)


@torch.no_grad()
def test_knockout_is_a_difference_of_log_likelihoods(ollm, samples):
    batch, llm = collate(ollm, samples), ollm.lvlm.model.language_model
    changes = probe.knockout(ollm, batch, "audio", 2)["answer -/-> vision"]
    spans = attention.spans_of(ollm, batch, "audio")
    pairs = probe.forbidden_pairs(spans, "response", VISION)
    with probe.cut_attention(llm, 1, 2, pairs):
        cut = probe.log_likelihood(ollm, batch, "audio")
    change = cut - probe.log_likelihood(ollm, batch, "audio")
    assert changes.shape == (len(samples), 3) and change.abs().min() > 1e-3
    torch.testing.assert_close(changes[:, 1], change, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_lens_reads_at_the_last_layer_what_the_model_would_say(samples):
    ollm = build_ollm()
    norm = ollm.lvlm.model.language_model.norm
    torch.nn.init.normal_(norm.weight, mean=1.0)  # else the norm moves no rank
    batch = collate(ollm, samples)
    no_slots = torch.zeros_like(batch["prefix"]["mask"])
    slots = torch.cat([no_slots, batch["audio"]["ids"] == AUDIO_PLACEHOLDER], dim=1)
    logits = ollm.lvlm.lm_head(attention.full_pass(ollm, batch, "audio")[slots])
    theirs, ours = logits.topk(3).indices, probe.likeliest_tokens(ollm, batch, 3)
    assert len(ours) == 4 and torch.equal(ours[-1], theirs) and not torch.equal(ours[0], theirs)


@torch.no_grad()
def test_recall_of_words_by_hand(ollm, samples):
    batch = collate(ollm, samples[:1])
    words = set(ollm.tokenizer(samples[0]["question"]).input_ids)
    (own, _), = probe.lens(ollm, batch, samples[:1], 5)
    by_hand = [len(words & set(tokens.flatten().tolist())) / len(words)
               for tokens in probe.likeliest_tokens(ollm, batch, 5)]
    assert own == by_hand and 0 < sum(own) < len(own)
    (everything, _), = probe.lens(ollm, batch, samples[:1], len(ollm.tokenizer))
    assert everything == [1] * 4


@torch.no_grad()
def test_shift_is_the_loss_s_kl_and_ranks_count_from_one(ollm, samples):
    batch = collate(ollm, samples)
    kl, same, rank = probe.shift(ollm, batch).T
    assert kl.mean().item() == pytest.approx(ollm(batch, 1.0)[1].item(), rel=1e-4)
    prefix, audio = ollm.prefill(batch), ollm.encode_audio(batch["mel"], batch["n_frames"])
    student, labels = ollm.answer_logits(prefix, batch["audio"], audio)
    teacher, _ = ollm.answer_logits(prefix, batch["text"])
    assert kl.mean().item() == pytest.approx(
        self_kd_loss(student, teacher, labels, 1.0)[1].item(), rel=1e-4)
    order = teacher.argsort(-1, descending=True).tolist()
    by_hand = [1 + row.index(token) for row, token in zip(order, student.argmax(-1).tolist())]
    assert rank.tolist() == by_hand and rank.max() > 1
    assert torch.equal(same, (rank == 1).float())


def test_mixed_speech_is_of_another_kind_and_answers_belong_to_one_question():
    kinds = ("count", "color", "count", "existence", "place")
    items = [{"kind": kind, "question": f"{kind} {i}", "wave": np.full(9, i)}
             for i, kind in enumerate(kinds)]
    mixed, spoken = probe.mix_questions(items)
    assert [sample["question"] for sample in mixed] == [sample["after"] for sample in mixed]
    assert all(sample["kind"] != kind for sample, kind in zip(mixed, spoken))
    assert [int(sample["wave"][0]) for sample in mixed] == [3, 3, 4, 0]
    answers = ["two", "yes there is", "no i see one", "the picture"]
    shares = probe.answered_question(mixed[:1] * 4, ["existence"] * 4, answers)
    assert shares == {"mixed: written answered": 25, "mixed: spoken answered": 25}


def test_the_script_writes_figures_numbers_and_tables(runs):  # noqa: F811
    done = run_here("analysis.probe", "--n", 16, "--window", 2, "--out", "probed", cwd=runs)
    assert done.returncode == 0, done.stderr
    assert "| KL(text || audio), nats " in done.stdout and "| silence: right " in done.stdout
    assert done.stdout.count("answer -/-> vision, audio") == 3, "four layers, windows of two"
    lines = {kind: (runs / f"probed/{kind}.csv").read_text().splitlines()
             for kind in ("lens", "knockout")}
    # Two runs, two forms, three cuts, three windows; two runs, own words and chance, four layers.
    assert len(lines["knockout"]) == 1 + 2 * 2 * 3 * 3 and len(lines["lens"]) == 1 + 2 * 2 * 4
    for kind in lines:
        assert (runs / f"probed/{kind}.png").read_bytes().startswith(b"\x89PNG")
