"""The shared prefix, the paired forward, listening, generation and runs on disk, against plain references."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import build_ollm, collate
from PIL import Image

import bench
import data
import model
from data import IGNORE, BadInput
from loss import chunked_self_kd_loss

QUESTIONS = ("what color is the circle", "is there a red star", "tell me what the picture shows", "count the things")
ANSWERS = ("red", "yes there is", "a red circle and a blue star", "two")
SIZES = ((64, 64), (64, 192), (200, 64), (128, 64))  # with up to three tiles: 1, 4, 4 and 3 with thumbnail


def make_samples(ollm, n=4, seed=0):
    """Samples with ragged pictures, questions, speech and answers."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(n):
        image = Image.fromarray(rng.integers(0, 255, (*SIZES[i][::-1], 3), dtype=np.uint8))
        samples.append({
            "id": str(i), "question": QUESTIONS[i], "answer": ANSWERS[i],
            "pixels": data.pixels(data.tile(image, ollm.settings["max_tiles"], ollm.settings["image_size"])),
            "wave": data.speak(QUESTIONS[i])[0][: 9000 + 777 * i]})
    return samples


def textbook_loss(ollm, samples, alpha):
    """Self-KD by two full passes of the native model a sample: no cache, no padding."""
    batches = [collate(ollm, [sample]) for sample in samples]
    counts = [int((batch["audio"]["labels"] != IGNORE).sum()) for batch in batches]
    return sum(n * bench.textbook(ollm, batch, alpha) for n, batch in zip(counts, batches)) / sum(counts)


@pytest.mark.parametrize("max_tiles", [1, 3])
@pytest.mark.parametrize("alpha", [0.0, 0.75])
def test_shared_prefix_equals_two_full_passes(max_tiles, alpha):
    ollm = build_ollm(max_tiles=max_tiles)
    samples = make_samples(ollm)
    assert len({len(s["pixels"]) for s in samples}) == (1 if max_tiles == 1 else 3), "the batch must be ragged"
    trained = [p for p in ollm.parameters() if p.requires_grad]
    ours = ollm(collate(ollm, samples), alpha)[0]
    theirs = textbook_loss(ollm, samples, alpha)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    for a, b in zip(torch.autograd.grad(ours, trained), torch.autograd.grad(theirs, trained)):
        assert (a - b).norm() <= 1e-9 * b.norm() + 1e-15


def test_its_own_answers_are_scored_as_by_two_full_passes():
    """A batch padded on the left, answers of several lengths behind it, against each sample alone."""
    ollm = build_ollm()
    samples = make_samples(ollm)
    batch = ollm.answer_itself(collate(ollm, samples, answers=False), max_new_tokens=6)
    alone = [ollm.answer_itself(collate(ollm, [sample], answers=False), max_new_tokens=6) for sample in samples]
    counts = [int((one["audio"]["labels"] != IGNORE).sum()) for one in alone]
    for row, one in zip(batch["audio"]["labels"], alone):
        assert row[row != IGNORE].tolist() == one["audio"]["labels"][one["audio"]["labels"] != IGNORE].tolist()
    theirs = sum(n * bench.textbook(ollm, one, 1.0) for n, one in zip(counts, alone)) / sum(counts)
    torch.testing.assert_close(ollm(batch, 1.0)[0], theirs, rtol=1e-9, atol=0)


def test_teaching_does_not_change_the_student():
    ollm = build_ollm()
    batch = collate(ollm, make_samples(ollm))
    alone, taught = ollm.paired(batch, teach=False)[0], ollm.paired(batch, teach=True)[0]
    assert torch.equal(alone, taught)


def test_half_precision_leaves_the_rotations_of_far_positions_alone():
    ollm = build_ollm(torch.float32)
    before = ollm.lvlm.model.language_model.rotary_emb.inv_freq.clone()
    model.to_bfloat16(ollm.lvlm)
    assert torch.equal(ollm.lvlm.model.language_model.rotary_emb.inv_freq, before)
    assert {p.dtype for p in ollm.lvlm.parameters()} == {torch.bfloat16}


def test_teacher_has_no_gradient_and_student_has():
    ollm = build_ollm()
    student, teacher, _ = ollm.paired(collate(ollm, make_samples(ollm)), teach=True)
    assert student.requires_grad and not teacher.requires_grad


def test_last_prompt_position_predicts_a_one_token_answer():
    ollm = build_ollm()
    batch = collate(ollm, make_samples(ollm)[:1])
    labels = batch["audio"]["labels"]
    first = int((labels[0] != IGNORE).nonzero()[0])
    hidden = ollm.suffix(ollm.prefix(batch), batch["audio"], ollm.hear(batch["mel"], batch["n_frames"]))[0].detach()

    def loss(student):
        states, answer = ollm.answer_states(student, labels)
        return chunked_self_kd_loss(states, ollm.answer_states(hidden, labels)[0], ollm.lvlm.lm_head, answer, 0.75)[0]

    def moved(position):
        student = hidden.clone()
        student[0, position] += torch.randn(hidden.size(-1), dtype=hidden.dtype)
        return student

    assert loss(moved(first - 1)) != loss(hidden), "the last prompt position predicts the first answer token"
    assert loss(moved(first)) != loss(hidden), "the answer's last word predicts <|im_end|>"
    assert loss(moved(first - 2)) == loss(moved(first + 1)) == loss(hidden)


def test_end_of_answer_is_supervised():
    ollm = build_ollm()
    _, _, labels = ollm.paired(collate(ollm, make_samples(ollm)[:1]), teach=False)
    assert ollm.tokenizer.convert_ids_to_tokens(labels) == ["red", "<|im_end|>"]


def test_different_answers_for_teacher_and_student_are_refused():
    ollm = build_ollm()
    batch = collate(ollm, make_samples(ollm))
    batch["text"]["labels"][batch["text"]["labels"] != IGNORE] = 5
    with pytest.raises(AssertionError, match="same answer tokens"):
        ollm.paired(batch, teach=True)


@pytest.mark.parametrize("stage, trained", [("vision-text", "lvlm."), ("audio-text", ("audio_encoder.", "projector.")),
                                            ("vision-audio", ("audio_encoder.", "projector."))])
def test_only_the_stage_s_parameters_move(stage, trained):
    ollm = build_ollm(torch.float32)
    ollm.train_only(stage)
    samples = [{k: v for k, v in s.items() if stage != "vision-text" or k != "wave"} for s in make_samples(ollm)]
    before = {name: p.detach().clone() for name, p in ollm.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in ollm.parameters() if p.requires_grad], lr=1e-2)
    ollm(collate(ollm, samples), alpha=0.0)[0].backward()
    optimizer.step()
    for name, parameter in ollm.named_parameters():
        should_move = name.startswith(trained) and "embed_positions" not in name
        assert (parameter.grad is not None) == should_move, name
        assert torch.equal(parameter, before[name]) != (should_move and parameter.grad.abs().max() > 0), name


@pytest.mark.parametrize("samples", [9_600, 10_240, 10_241, 12_799])
def test_a_clip_sounds_the_same_in_any_company(samples):
    ollm = build_ollm()
    wave, other = data.speak("is there a red star")[0][:samples], data.speak("tell me what the picture shows")[0]

    def hear(waves):
        mel, n_frames = data.mels(ollm.mel_extractor, waves)
        return ollm.hear(mel.double(), n_frames)[0, : data.audio_tokens(wave)]

    torch.testing.assert_close(hear([wave]), hear([wave, other]), rtol=1e-10, atol=1e-12)
    assert (hear([wave]) - hear([other])[: data.audio_tokens(wave)]).abs().max() > 1e-3, "the check can fail"


def test_hearing_equals_whisper_on_thirty_seconds():
    ollm = build_ollm()
    wave = np.zeros(30 * data.SAMPLE_RATE, np.float32)
    wave[:16_000] = data.speak("is there a red star")[0][:16_000]
    mel, n_frames = data.mels(ollm.mel_extractor, [wave])
    theirs = ollm.audio_encoder(mel.double()).last_hidden_state  # (1, 1500, W)
    theirs = ollm.projector(theirs.unflatten(1, (750, 2)).mean(2))
    torch.testing.assert_close(ollm.hear(mel.double(), n_frames), theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", ["text", "audio"])
def test_batched_generation_equals_one_by_one(form):
    ollm = build_ollm(max_tiles=3)
    samples = make_samples(ollm)

    def generate(samples):
        batch = collate(ollm, samples, answers=False)
        heard = ollm.hear(batch["mel"], batch["n_frames"]) if form == "audio" else None
        return ollm.generate(ollm.prefix(batch), batch[form], heard, max_new_tokens=12)

    together = generate(samples)
    assert together == [generate([s])[0] for s in samples]
    assert len(set(together)) > 1, "the check can fail: answers differ"


def test_greedy_generation_equals_the_native_model_s():
    ollm = build_ollm()
    sample = make_samples(ollm)[0]
    batch = collate(ollm, [sample], answers=False)
    ours = ollm.generate(ollm.prefix(batch), batch["text"], max_new_tokens=10)[0]
    ids = torch.cat([batch["prefix"]["ids"], batch["text"]["ids"]], 1)
    new = ollm.lvlm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=batch["pixels"],
                             max_new_tokens=10, do_sample=False, pad_token_id=ollm.tokenizer.pad_token_id,
                             eos_token_id=ollm.tokenizer.eos_token_id)[0, ids.size(1):]
    assert ours == ollm.tokenizer.decode(new, skip_special_tokens=True).strip()


# ---- runs on disk ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base run and an audio run on it, with random weights."""
    folder, ollm = tmp_path_factory.mktemp("runs"), build_ollm(torch.float32)
    model.save_run(ollm, folder / "base", {"stage": "vision-text", "alpha": 0.0, "seed": 0})
    model.save_run(ollm, folder / "audio", {"stage": "audio-text", "alpha": 0.0, "seed": 0}, base=folder / "base")
    return folder, ollm


def test_save_and_load_round_trip(runs):
    folder, ollm = runs
    loaded = model.load_run(folder / "audio")
    assert all(torch.equal(a, b) for a, b in zip(ollm.state_dict().values(), loaded.state_dict().values(), strict=True))
    samples = make_samples(ollm)
    assert torch.equal(ollm(collate(ollm, samples), 0.75)[0], loaded(collate(loaded, samples), 0.75)[0])
    assert not list(folder.glob("*/.saving")) and not list(folder.rglob("*.pt")) + list(folder.rglob("*.bin"))


def test_runs_can_be_moved_together(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "elsewhere")
    assert model.load_run(tmp_path / "elsewhere" / "audio").audio_encoder is not None


@pytest.mark.parametrize("spoil, message", [
    (lambda f: (f / "base/model.safetensors").write_bytes(b"x" * 99), "another base"),
    (lambda f: (f / "audio/model.safetensors").write_bytes((f / "audio/model.safetensors").read_bytes()[:5000]),
     "not what was saved"),
    (lambda f: (f / "audio/ollm.json").write_text("{"), "not JSON"),
    (lambda f: (f / "audio/ollm.json").unlink(), "not a finished run"),
    (lambda f: (f / "audio/config.json").write_text(json.dumps(
        json.loads((f / "audio/config.json").read_text()) | {"d_model": 64})), "not what was saved"),
])
def test_a_run_that_does_not_fit_is_refused_in_one_line(runs, tmp_path, spoil, message):
    shutil.copytree(runs[0], tmp_path / "spoilt")
    spoil(tmp_path / "spoilt")
    with pytest.raises(BadInput, match=message) as error:
        model.load_run(tmp_path / "spoilt" / "audio")
    assert "\n" not in str(error.value)
