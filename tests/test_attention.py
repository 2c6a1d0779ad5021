"""Where the model looks: the shares against textbook attention, and what must hold of any attention."""

import csv
import shutil

import pytest
import torch
from conftest import build_ollm, collate, run_here
from test_model import ANSWERS, QUESTIONS, make_samples

import attention
import data
import model
from attention import PADDING, QUERY, RESPONSE, SPANS, SYSTEM, TURN, VISION

FORMS = ("text", "audio")


@pytest.fixture(scope="module")
def ollm():
    return build_ollm(max_tiles=3)


@pytest.fixture(scope="module")
def samples(ollm):
    return make_samples(ollm)


def first_layer(ollm, batch, form):
    """The first layer's attention (heads, T, T), position by position as textbooks write it, in double precision."""
    x = attention.embedded(ollm, batch, form)  # (1, T, D)
    layer = ollm.lvlm.model.language_model.layers[0]
    x, heads = layer.input_layernorm(x)[0], ollm.lvlm.config.text_config.num_attention_heads
    half = layer.self_attn.head_dim // 2
    theta = ollm.lvlm.config.text_config.rope_parameters["rope_theta"]
    rates = theta ** (-torch.arange(half, dtype=x.dtype) / half)  # (half,)
    angles = torch.arange(len(x), dtype=x.dtype)[:, None, None] * rates  # (T, 1, half)

    def turned(project):
        a, b = project(x).unflatten(-1, (heads, -1)).split(half, dim=-1)  # each (T, heads, half)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    scores = torch.einsum("qhd,khd->hqk", turned(layer.self_attn.q_proj), turned(layer.self_attn.k_proj))
    ahead = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)  # (T, T)
    return (scores / (2 * half) ** 0.5).masked_fill(ahead, -torch.inf).softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_shares_equal_sums_over_textbook_attention(ollm, samples, form):
    batch = collate(ollm, samples[2:3])
    ours, spans = attention.shares(ollm, batch, form)
    weights, names = first_layer(ollm, batch, form).mean(0), spans[0].tolist()  # (T, T)
    response = [t for t, name in enumerate(names) if name == RESPONSE]
    assert response[-1] == len(names) - 1 and len(response) == len(ANSWERS[2].split()) + 1
    looking = ([t for t, name in enumerate(names) if name == QUERY], [t - 1 for t in response])
    for f, rows in enumerate(looking):
        for s in range(len(SPANS)):
            hand = sum(weights[q, k].item() for q in rows for k, name in enumerate(names) if name == s) / len(rows)
            assert ours[0, 0, f, s].item() == pytest.approx(hand, abs=2e-6), (f, SPANS[s])  # softmax is in float32
    assert ours[0, 0].std() > 0.05, "spans that differ too little would hide a mistake"


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_rows_sum_to_one_and_padding_gets_nothing(ollm, samples, form):
    ours, spans = attention.shares(ollm, collate(ollm, samples), form)
    prefix = collate(ollm, samples)["prefix"]["ids"].size(1)
    assert (spans[:, :prefix] == PADDING).any() and (spans[:, prefix:] == PADDING).any(), "padding at both ends"
    torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours[..., 0]), rtol=0, atol=1e-5)
    assert (ours[..., PADDING] == 0).all() and (ours[..., :TURN].amin((0, 1)) > 0).all()
    assert (ours[:, :, 0, [TURN, RESPONSE]] == 0).all(), "the question comes before turn and response"


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_batch_gives_what_each_item_gives_alone(ollm, samples, form):
    together = attention.shares(ollm, collate(ollm, samples), form)[0]
    alone = torch.cat([attention.shares(ollm, collate(ollm, [sample]), form)[0] for sample in samples])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-2, "items that are alike would hide a mix-up"


@pytest.mark.parametrize("form", FORMS)
def test_spans_partition_the_sequence(ollm, samples, form):
    batch = collate(ollm, samples)
    spans = attention.spans_of(ollm, batch, form)
    ids = torch.cat([batch["prefix"]["ids"], batch[form]["ids"]], dim=1)
    assert spans.shape == ids.shape
    words = ollm.tokenizer.convert_ids_to_tokens
    for i, (row, span) in enumerate(zip(ids, spans)):
        lengths = torch.bincount(span, minlength=len(SPANS)).tolist()
        asked = len(QUESTIONS[i].split()) if form == "text" else data.audio_tokens(samples[i]["wave"])
        assert lengths[VISION] == 4 * len(samples[i]["pixels"]) and lengths[QUERY] == asked
        assert words(row[span == TURN]) == ["<|im_end|>", "<|im_start|>", "assistant", "\n"]
        assert words(row[span == RESPONSE]) == [*ANSWERS[i].split(), "<|im_end|>"]
        assert words(row[span == VISION]) == ["<IMG_CONTEXT>"] * lengths[VISION]
        assert words(row[span == SYSTEM])[:3] == ["<|im_start|>", "system", "\n"]
        if form == "text":
            assert words(row[span == QUERY]) == QUESTIONS[i].split()
        order = span[(span != SYSTEM) & (span != PADDING)]
        assert torch.equal(order, order.sort().values), "image, question, turn and response, in this order"


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_eager_sdpa_and_the_shared_prefix_agree(ollm, samples, form):
    batch, llm = collate(ollm, samples), ollm.lvlm.model.language_model
    usual = attention.full_pass(ollm, batch, form)
    assert llm.config._attn_implementation == "sdpa"
    with attention.watched(llm, lambda weights: weights.shape) as seen:
        eager = attention.full_pass(ollm, batch, form)
    assert len(seen) == len(llm.layers) and llm.config._attn_implementation == "sdpa", "and it is left as it was"
    heard = ollm.hear(batch["mel"], batch["n_frames"]) if form == "audio" else None
    cached = ollm.suffix(ollm.prefix(batch), batch[form], heard)[0]
    real, prefix = batch[form]["mask"], batch["prefix"]["ids"].size(1)
    torch.testing.assert_close(eager[:, prefix:][real], usual[:, prefix:][real], rtol=0, atol=1e-5)
    torch.testing.assert_close(usual[:, prefix:][real], cached[real], rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, world):
    """A base and what listens for it: aligned, and Self-KD of two seeds; random weights, and the test part's items."""
    folder, ollm = tmp_path_factory.mktemp("runs") / "runs/shapes", build_ollm(torch.float32)
    base = folder / "vision-text-s0"
    model.save_run(ollm, base, {"stage": "vision-text", "alpha": 0.0, "seed": 0})
    for stage, alpha, seed in (("audio-text", 0.0, 0), ("vision-audio", 0.75, 0), ("vision-audio", 0.75, 1)):
        torch.nn.init.normal_(ollm.projector.weight, std=0.3 + seed)
        name = f"{stage}-s{seed}" if stage == "audio-text" else f"{stage}-a{alpha:g}-s{seed}"
        model.save_run(ollm, folder / name, {"stage": stage, "alpha": alpha, "seed": seed}, base)
    for seed in (0, 1):
        shutil.copytree(world / "test", folder / f"data-s{seed}/test")
    return folder.parent.parent


def test_the_script_writes_figures_numbers_and_a_summary(runs):
    names = [f"runs/shapes/{name}" for name in ("vision-text-s0", "audio-text-s0", "vision-audio-a0.75-s0",
                                                "vision-audio-a0.75-s1")]
    done = run_here("attention.py", *names, "--n", 3, "--out", "figures", cwd=runs)
    assert done.returncode == 0, done.stderr
    with open(runs / "figures/attention.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {(row["run"], row["seeds"]) for row in rows} == {("text", "0 1"), ("aligned", "0"), ("KD 0.75", "0 1")}
    for key in {(row["run"], row["from"], row["layer"]) for row in rows}:
        shares = [float(row["share"]) for row in rows if (row["run"], row["from"], row["layer"]) == key]
        assert sum(shares) == pytest.approx(100, abs=1e-2)
    vision = [(float(row["share"]), float(row["per_token"])) for row in rows if row["to"] == "vision"]
    assert all(share == pytest.approx(4 * each, rel=1e-4) for share, each in vision), "four image tokens a picture"
    kd = [float(row["share_sd"]) for row in rows if row["run"] == "KD 0.75" and row["to"] == "vision"]
    assert min(kd) > 0, "two seeds, two projectors"
    assert "| mean of the six | " in done.stdout and "3 items" in done.stdout and "±" in done.stdout
    for name in ("attention-share.png", "attention-per-token.png"):
        assert (runs / "figures" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments, message", [
    (["runs/shapes/vision-text-s0"], "cannot listen"),
    (["runs/shapes/audio-text-s0", "runs/shapes/audio-text-s0"], "a second run called aligned of seed 0"),
    (["runs/shapes/audio-text-s0", "--n", "1000"], "fewer than 1000")])
def test_what_cannot_be_measured_is_refused_in_one_line(runs, arguments, message):
    done = run_here("attention.py", *arguments, cwd=runs)
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1], done.stderr
