"""The shared prefix, paired forward, listening, generation and runs on disk, against references."""

import functools
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    build_ollm,
    build_whisper,
    change_json,
    check_answers_do_not_depend_on_the_batch,
    collate,
    save_runs,
)
from PIL import Image

import data
import train
from analysis import bench
from data import IGNORE
from model import OLLM, start_model
from plumbing.files import BadInput
from plumbing.media import speak
from real.families import normalize
from world.lessons import collate_packed

QUESTIONS = ("what color is the circle", "is there a red star",
             "tell me what the picture shows", "count the things")
ANSWERS = ("red", "yes there is", "a red circle and a blue star", "two")
SIZES = ((64, 64), (64, 192), (200, 64), (128, 64))  # up to three tiles: 1, 4, 4, 3 with thumbnail


def make_samples(ollm, n=4, seed=0):
    """Samples with ragged pictures, questions, speech and answers."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(n):
        image = Image.fromarray(rng.integers(0, 255, (*SIZES[i][::-1], 3), dtype=np.uint8))
        samples.append({
            "id": str(i), "question": QUESTIONS[i], "answer": ANSWERS[i],
            "pixels": data.picture_inputs(image, ollm.settings),
            "wave": speak(QUESTIONS[i])[0][: 9000 + 777 * i]})
    return samples


def average_naive_loss(ollm, samples, alpha):
    """Self-KD by two full passes of the native model a sample: no cache, no padding."""
    batches = [collate(ollm, [sample]) for sample in samples]
    counts = [int((batch["audio"]["labels"] != IGNORE).sum()) for batch in batches]
    return (sum(n * bench.naive_loss(ollm, batch, alpha) for n, batch in zip(counts, batches))
            / sum(counts))


@pytest.mark.parametrize("max_tiles", [1, 3])
@pytest.mark.parametrize("alpha", [0.0, 0.75])
def test_shared_prefix_equals_two_full_passes(max_tiles, alpha):
    ollm = build_ollm(max_tiles=max_tiles)
    samples = make_samples(ollm)
    tiles = {len(s["pixels"]["pixel_values"]) for s in samples}
    assert len(tiles) == (1 if max_tiles == 1 else 3), "the batch must be ragged"
    trained = [p for p in ollm.parameters() if p.requires_grad]
    ours = ollm(collate(ollm, samples), alpha)[0]
    theirs = average_naive_loss(ollm, samples, alpha)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    for a, b in zip(torch.autograd.grad(ours, trained), torch.autograd.grad(theirs, trained)):
        assert (a - b).norm() <= 1e-9 * b.norm() + 1e-15


def test_questions_about_one_picture_share_a_row(world):
    """One prefix, many questions: loss and gradients are those of as many separate rows."""
    ollm = build_ollm()
    ollm.train_only("vision-text")
    samples = data.Samples(world / "vision-text", ollm.settings, ("question",))
    scenes = ("000006", "000007", "000008")  # the second is text alone
    samples = [samples[i] for i in range(len(samples)) if samples.rows[i]["id"][:6] in scenes]
    apart = [{key: value for key, value in s.items() if key != "group"} for s in samples]
    separately = functools.partial(data.collate, tokenizer=ollm.tokenizer, mel_extractor=None,
                                   settings=ollm.settings)
    trained, results = [p for p in ollm.parameters() if p.requires_grad], []
    for rows in (samples, apart):
        batch = collate_packed(rows, separately, seed=0)
        results.append((len(batch["prefix"]["ids"]), ollm(batch, 0.0)[0]))
    (n_shared, shared), (n_apart, separate) = results
    assert (n_shared, n_apart) == (3, len(samples)) and len(samples) >= 12
    torch.testing.assert_close(shared, separate, rtol=1e-9, atol=0)
    gradients = [torch.autograd.grad(loss, trained, allow_unused=True)
                 for loss in (shared, separate)]
    for a, b in zip(*gradients):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 1e-9 * b.norm() + 1e-15


def test_different_answers_for_teacher_and_student_are_refused():
    ollm = build_ollm()
    batch = collate(ollm, make_samples(ollm))
    batch["text"]["labels"][batch["text"]["labels"] != IGNORE] = 5
    with pytest.raises(AssertionError, match="same answer tokens"):
        ollm(batch, alpha=0.75)


@pytest.mark.parametrize("form", ["text", "audio"])
def test_batched_generation_equals_one_by_one(form):
    ollm = build_ollm(max_tiles=3)
    samples = make_samples(ollm)
    check_answers_do_not_depend_on_the_batch(ollm, samples, form, max_new_tokens=12)


def test_greedy_generation_equals_the_native_model_s():
    ollm = build_ollm()
    sample = make_samples(ollm)[0]
    batch = collate(ollm, [sample], answers=False)
    ours = ollm.generate(ollm.prefill(batch), batch["text"], max_new_tokens=10)[0]
    ids = torch.cat([batch["prefix"]["ids"], batch["text"]["ids"]], 1)
    new = ollm.lvlm.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                             pixel_values=normalize(batch["pixels"]["pixel_values"]),
                             max_new_tokens=10, do_sample=False,
                             pad_token_id=ollm.tokenizer.pad_token_id,
                             eos_token_id=ollm.tokenizer.eos_token_id)[0, ids.size(1):]
    assert ours == ollm.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("keep_end, expected", [
    (False, ["red", "red"]), (True, ["<|endoftext|> red <|im_end|>", "red <|im_end|>"])])
def test_a_model_that_says_the_padding_token_goes_on(keep_end, expected):
    """<|endoftext|> pads prompts; inside an answer it is a token like any other."""
    ollm = build_ollm()
    batch = collate(ollm, make_samples(ollm)[:2], answers=False)
    words = [ollm.tokenizer.convert_tokens_to_ids(w)
             for w in ("<|endoftext|>", "red", "<|im_end|>", "blue")]
    answers = iter([[words[0], words[1]], [words[1], words[2]], [words[2], words[3]]])

    class Head(torch.nn.Module):
        def forward(self, hidden):
            return torch.nn.functional.one_hot(torch.tensor(next(answers)),
                                               len(ollm.tokenizer)).double()

    ollm.lvlm.lm_head = Head()
    said = ollm.generate(ollm.prefill(batch), batch["text"], keep_end=keep_end)
    assert said == expected


def test_the_precision_of_a_gpu_gives_about_the_same_loss(monkeypatch):
    """bfloat16 products and a frozen LVLM in bfloat16, here on a CPU: no dtype meets another."""
    ollm = build_ollm(torch.float32, max_tiles=3)
    samples = make_samples(ollm)
    batch = collate(ollm, samples)
    exact = ollm(batch, alpha=0.75)[0]
    monkeypatch.setattr("model.half_precision",
                        lambda device: torch.autocast("cpu", torch.bfloat16))
    for parameter in ollm.lvlm.parameters():
        parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ollm(batch, alpha=0.75)[0]
    loss.backward()
    assert loss.dtype == ollm.projector.weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.1, atol=0)
    answers = ollm.answer(samples, max_new_tokens=4)
    assert len(answers["text"]) == len(answers["audio"]) == 4


@pytest.mark.parametrize("limit, ends", [(48, True), (2, False)])
def test_an_answer_of_its_own_is_scored_as_by_two_full_passes(limit, ends):
    """On-policy: what the student says is collated again. One cut at the limit gets no end mark."""
    ollm = build_ollm()
    sample = make_samples(ollm)[2]
    text, = ollm.answer([sample], ("audio",), max_new_tokens=limit, keep_end=True)["audio"]
    if ends:
        text = "red <|im_end|>"  # random weights hardly ever end
    batch = collate(ollm, [{**sample, "answer": text, "end": ""}])
    labels = batch["audio"]["labels"]
    scored = ollm.tokenizer.convert_ids_to_tokens(labels[labels != IGNORE])
    assert scored == text.split() and ("<|im_end|>" in scored) == ends
    torch.testing.assert_close(ollm(batch, 1.0)[0], bench.naive_loss(ollm, batch, 1.0),
                               rtol=1e-9, atol=0)


# ---- runs on disk ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base run and an audio run on it, with random weights."""
    folder = tmp_path_factory.mktemp("runs")
    return save_runs(folder)


def test_a_whisper_s_dropout_is_off_in_training(runs, tmp_path):
    """It is randomness that is not the step's: no run could go on with the same bytes."""
    whisper = build_whisper(tmp_path / "whisper")
    change_json(whisper / "config.json", dropout=0.1, attention_dropout=0.1,
                activation_dropout=0.1, encoder_layerdrop=0.5)
    ollm = start_model(train.Config("audio-text", 0, runs / "base", whisper, []))
    mel, n_frames = torch.randn(2, 128, 400), torch.tensor([400, 200])
    once, again = (ollm.encode_audio(mel, n_frames) for _ in range(2))
    assert once.requires_grad and torch.equal(once, again)
    assert not torch.equal(ollm.train().encode_audio(mel, n_frames), once), "the check can fail"


def test_save_and_load_round_trip(runs, tmp_path):
    """Also if the runs are moved together."""
    moved = shutil.copytree(runs, tmp_path / "elsewhere")
    ollm, loaded = build_ollm(torch.float32), OLLM.load(moved / "audio")
    states = ollm.state_dict().values(), loaded.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    samples = make_samples(ollm)
    ours, theirs = (one(collate(one, samples), 0.75)[0] for one in (ollm, loaded))
    assert torch.equal(ours, theirs)
    assert not list(runs.glob("*/.saving*")) and not [*runs.rglob("*.pt"), *runs.rglob("*.bin")]


@pytest.mark.parametrize("spoil", [
    lambda folder: (folder / "base/model.safetensors").write_bytes(b"x" * 99),
    lambda folder: os.truncate(folder / "audio/model.safetensors", 5000),
    lambda folder: (folder / "audio/ollm.json").write_text("{"),
    lambda folder: (folder / "audio/ollm.json").unlink(),
    lambda folder: change_json(folder / "audio/config.json", d_model=64),
])
def test_a_run_that_does_not_fit_is_refused_in_one_line(runs, tmp_path, spoil):
    shutil.copytree(runs, tmp_path / "spoilt")
    spoil(tmp_path / "spoilt")
    with pytest.raises(BadInput) as error:
        OLLM.load(tmp_path / "spoilt" / "audio")
    assert "\n" not in str(error.value) and "spoilt/audio" in str(error.value)
