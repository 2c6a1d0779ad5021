"""Where the model looks: shares against textbook attention, and what must hold of any attention.

And the figures that need nothing but what training wrote: analysis.training.
"""

import csv
import json
import shutil

import pytest
import torch
from conftest import build_ollm, collate, run_config, run_here
from test_model import ANSWERS, QUESTIONS, make_samples

from analysis import attention, training
from analysis.attention import PADDING, QUERY, RESPONSE, SPANS, SYSTEM, TURN, VISION
from plumbing.runs import save as save_run

FORMS = ("text", "audio")


@pytest.fixture(scope="module")
def ollm():
    return build_ollm(max_tiles=3)


@pytest.fixture(scope="module")
def samples(ollm):
    return make_samples(ollm)


def first_layer(ollm, batch, form):
    """Returns the first layer's attention (heads, T, T) as textbooks write it, in float64."""
    ids = torch.cat([batch["prefix"]["ids"], batch[form]["ids"]], dim=1)  # (1, T)
    audio = ollm.encode_audio(batch["mel"], batch["n_frames"]) if form == "audio" else None
    x = ollm.embed(ids, batch["pixels"], audio)  # (1, T, D)
    layer, config = ollm.lvlm.model.language_model.layers[0], ollm.lvlm.config.text_config
    x, half = layer.input_layernorm(x)[0], layer.self_attn.head_dim // 2
    rates = config.rope_parameters["rope_theta"] ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = torch.arange(len(x), dtype=x.dtype)[:, None, None] * rates  # (T, 1, half)

    def rotate(project):
        a, b = project(x).unflatten(-1, (config.num_attention_heads, -1)).split(half, dim=-1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()],
                         dim=-1)  # (T, heads, 2 half)

    queries, keys = rotate(layer.self_attn.q_proj), rotate(layer.self_attn.k_proj)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) / (2 * half) ** 0.5
    ahead = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)  # (T, T)
    return scores.masked_fill(ahead, -torch.inf).softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_shares_equal_sums_over_textbook_attention(ollm, samples, form):
    batch = collate(ollm, samples[2:3])
    ours, spans = attention.attention_shares(ollm, batch, form)
    weights, names = first_layer(ollm, batch, form).mean(0), spans[0].tolist()  # (T, T)
    response = [t for t, name in enumerate(names) if name == RESPONSE]
    assert response[-1] == len(names) - 1 and len(response) == len(ANSWERS[2].split()) + 1
    queries = [t for t, name in enumerate(names) if name == QUERY]
    for f, rows in enumerate((queries, [t - 1 for t in response])):
        for s in range(len(SPANS)):
            keys = [k for k, name in enumerate(names) if name == s]
            by_hand = weights[rows][:, keys].sum().item() / len(rows)
            # The model takes its softmax in float32.
            assert ours[0, 0, f, s].item() == pytest.approx(by_hand, abs=2e-6), (f, SPANS[s])
    assert ours[0, 0].std() > 0.05, "spans that differ too little would hide a mistake"


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_rows_sum_to_one_and_padding_gets_nothing(ollm, samples, form):
    batch = collate(ollm, samples)
    ours, spans = attention.attention_shares(ollm, batch, form)
    prefix = batch["prefix"]["ids"].size(1)
    assert (spans[:, :prefix] == PADDING).any() and (spans[:, prefix:] == PADDING).any()
    torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours[..., 0]), rtol=0, atol=1e-5)
    assert (ours[..., PADDING] == 0).all() and (ours[..., :TURN].amin((0, 1)) > 0).all()
    assert (ours[:, :, 0, [TURN, RESPONSE]] == 0).all(), "the query comes before turn and response"


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_batch_gives_what_each_item_gives_alone(ollm, samples, form):
    together = attention.attention_shares(ollm, collate(ollm, samples), form)[0]
    alone = torch.cat([attention.attention_shares(ollm, collate(ollm, [sample]), form)[0]
                       for sample in samples])
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
        question = QUESTIONS[i].split()
        query = len(question) if form == "text" else -(-len(samples[i]["wave"]) // 640)
        assert lengths[VISION] == 4 * len(samples[i]["pixels"]["pixel_values"])
        assert lengths[QUERY] == query
        assert words(row[span == TURN]) == ["<|im_end|>", "<|im_start|>", "assistant", "\n"]
        assert words(row[span == RESPONSE]) == [*ANSWERS[i].split(), "<|im_end|>"]
        assert words(row[span == VISION]) == ["<IMG_CONTEXT>"] * lengths[VISION]
        assert words(row[span == SYSTEM])[:3] == ["<|im_start|>", "system", "\n"]
        if form == "text":
            assert words(row[span == QUERY]) == question
        order = span[(span != SYSTEM) & (span != PADDING)]
        assert torch.equal(order, order.sort().values), "image, question, turn, response"


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_eager_sdpa_and_the_shared_prefix_agree(ollm, samples, form):
    batch, llm = collate(ollm, samples), ollm.lvlm.model.language_model
    usual = attention.full_pass(ollm, batch, form)
    assert llm.config._attn_implementation == "sdpa"
    with attention.record_attention(llm, lambda weights: weights.shape) as records:
        eager = attention.full_pass(ollm, batch, form)
    assert len(records) == len(llm.layers)
    assert llm.config._attn_implementation == "sdpa", "it is left as it was"
    audio = ollm.encode_audio(batch["mel"], batch["n_frames"]) if form == "audio" else None
    shared = ollm.decode_query(ollm.prefill(batch), batch[form], audio)[0]
    real, prefix = batch[form]["mask"], batch["prefix"]["ids"].size(1)
    usual, eager = usual[:, prefix:][real], eager[:, prefix:][real]
    torch.testing.assert_close(eager, usual, rtol=0, atol=1e-5)
    torch.testing.assert_close(usual, shared[real], rtol=1e-9, atol=1e-9)


# ---- the scripts ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory, world):
    """A base and what listens for it: aligned, and Self-KD of two seeds. Weights are random."""
    folder, ollm = tmp_path_factory.mktemp("runs") / "runs/shapes", build_ollm(torch.float32)
    save_run(ollm, folder / "vision-text-s0", run_config("vision-text"))
    ollm.base = folder / "vision-text-s0"
    shutil.copytree(ollm.base, folder / "vision-text-s1")
    for name, stage, alpha, seed in (("audio-text-s0", "audio-text", 0.0, 0),
                                     ("vision-audio-a0.75-s0", "vision-audio", 0.75, 0),
                                     ("vision-audio-a0.75-s1", "vision-audio", 0.75, 1)):
        ollm.base = folder / f"vision-text-s{seed}"
        torch.nn.init.normal_(ollm.projector.weight, std=0.3 + seed)
        save_run(ollm, folder / name, run_config(stage, alpha, seed))
    for seed in (0, 1):
        shutil.copytree(world / "test", folder / f"data-s{seed}/test")
    return folder.parent.parent


def test_the_script_writes_figures_numbers_and_a_summary(runs):
    names = ("vision-text-s0", "audio-text-s0", "vision-audio-a0.75-s0", "vision-audio-a0.75-s1")
    done = run_here("analysis.attention", *(f"runs/shapes/{name}" for name in names), "--n", 3,
                    "--out", "figures", cwd=runs)
    assert done.returncode == 0, done.stderr
    with open(runs / "figures/attention.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    groups = {(row["run"], row["seeds"]) for row in rows}
    assert groups == {("text", "0 1"), ("aligned", "0"), ("KD 0.75", "0 1")}
    sums = {}
    for row in rows:
        key = row["run"], row["from"], row["layer"]
        sums[key] = sums.get(key, 0) + float(row["share"])
    assert list(sums.values()) == pytest.approx([100] * len(sums), abs=1e-2)
    for row in rows:
        if row["to"] == "vision":  # a picture has four image tokens
            assert float(row["share"]) == pytest.approx(4 * float(row["per_token"]), rel=1e-4)
            assert row["run"] != "KD 0.75" or float(row["share_sd"]) > 0, "two projectors"
    assert "mean of the six" in done.stdout and "3 items" in done.stdout and "±" in done.stdout
    for name in ("attention-share.png", "attention-per-token.png"):
        assert (runs / "figures" / name).read_bytes().startswith(b"\x89PNG")


def write_log(run, steps, offset=0.0, kl=0.1):
    """Writes a training log whose loss falls by one a step."""
    run.mkdir()
    lines = [{"step": i, "loss": steps - i + offset, "kl": kl, "ce": 0.2, "lr": 1e-3,
              "grad_norm": 2.0, "time": {"steps_per_s": 8.0}} for i in range(steps)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_training_logs_are_drawn_side_by_side_as_running_means(tmp_path, monkeypatch):
    logs = [write_log(tmp_path / "a", 40, kl=0.0), write_log(tmp_path / "b", 60, offset=5.0)]
    figures, draw = [], training.tables.plot_curves
    monkeypatch.setattr(training.tables, "plot_curves",
                        lambda *args, **options: (figures.append((args, options)),
                                                  draw(*args, **options)))
    training.draw_logs(logs, tmp_path / "out/training.png")
    (panels, xlabel, ylabel, _), options = figures[0]
    (label_a, loss_a, _), (label_b, loss_b, _) = panels["loss"]
    assert (label_a, label_b) == tuple(map(str, logs)) and len(panels) == 4
    assert "4 steps" in ylabel and options["first"] == 3, "a tenth of the shorter log"
    assert loss_a.tolist() == pytest.approx([38.5 - i for i in range(37)])
    assert loss_b.tolist() == pytest.approx([63.5 - i for i in range(57)])
    (_, kl_a, _), (_, kl_b, _) = panels["KL (nats)"]
    assert kl_a.isnan().all() and kl_b.tolist() == pytest.approx([0.1] * 57), (
        "SFT does not measure the KL, and keeps its place in the colours")
    assert (tmp_path / "out/training.png").read_bytes().startswith(b"\x89PNG")
