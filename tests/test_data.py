"""The on-disk format: reproducible, restartable, read with clear errors, collated right."""

import json
import random
import shutil

import numpy as np
import pytest
import soundfile
import torch
from conftest import build_ollm, contents, run_here
from PIL import Image

import data
import mmalign
from plumbing import prepared
from plumbing.files import BadInput, write_json_lines
from plumbing.media import HELD_OUT_VOICES, speak
from real.families import PromptSettings
from world import shapes
from world.answers import is_in_base_style, score_answer
from world.lessons import curriculum, random_positions

SETTINGS = PromptSettings(max_tiles=1, image_size=64)


def make(folder, seed=3, n=100):
    return run_here("data.py", "shapes", "--seed", seed, "--out", folder, "--scenes", 12,
                    "--clips", 40, "--n", n, "--test", 32, cwd=folder.parent)


def test_same_seed_same_bytes_and_restart(world, tmp_path):
    again = tmp_path / "again"
    assert make(again).returncode == 0
    assert contents(again) == contents(world)
    # As if killed half-way: no list of samples yet, some files missing, a temporary one left.
    (again / "audio-text/samples.jsonl").unlink()
    (again / "audio-text/audio/000007.flac").unlink()
    kept = (again / "audio-text/audio/000008.flac").stat().st_mtime_ns
    assert make(again).returncode == 0
    assert contents(again) == contents(world)
    assert (again / "audio-text/audio/000008.flac").stat().st_mtime_ns == kept, (
        "what exists is kept")


def test_another_seed_is_another_world_and_may_not_mix(world, tmp_path):
    other = tmp_path / "other"
    assert make(other, seed=4).returncode == 0
    assert contents(other)["test/samples.jsonl"] != contents(world)["test/samples.jsonl"]
    mixed = make(other, seed=5)
    assert (mixed.returncode == 1 and mixed.stderr.count("\n") == 1
            and "settings.json" in mixed.stderr)


def test_scenes_and_voices_of_the_test_part_are_held_out(world):
    rng = random.Random(0)
    seen = {repr(shapes.draw_scene(rng, held_out=False)) for _ in range(3000)}
    held = {repr(shapes.draw_scene(rng, held_out=True)) for _ in range(3000)}
    assert not seen & held
    voices = {part: {row["voice"] for row in prepared.read_rows([world / part])}
              for part in ("audio-text", "test")}
    assert not voices["audio-text"] & voices["test"] and len(voices["test"]) > 3


def test_label_noise_spoils_about_its_share_and_only_of_training(world):
    rng, kinds = random.Random(0), shapes.KINDS
    for noise in (0.0, 0.25, 1.0):
        rows = [shapes.draw_question(rng, shapes.draw_scene(rng, False), kinds, noise)
                for _ in range(1500)]
        wrong = sum(row["label"] not in row["answer"] for row in rows) / len(rows)
        assert abs(wrong - noise) < 0.04, (noise, wrong)
    assert all(row["label"] in row["answer"] for row in prepared.read_rows([world / "test"]))


def test_another_writer_is_as_right_in_words_that_the_base_never_uses():
    """Same picture, question and label whoever writes; the words are known, their order is not."""
    rng, kinds = random.Random(0), shapes.KINDS + shapes.ALIGN_KINDS
    vocabulary = set(shapes.vocabulary())
    for _ in range(600):
        scene, seed = shapes.draw_scene(rng, False), rng.random()
        own, other = (shapes.draw_question(random.Random(seed), scene, kinds, paraphrase=share)
                      for share in (0.0, 1.0))
        assert {**own, "answer": 0} == {**other, "answer": 0}
        assert set(other["answer"].split()) <= vocabulary
        score_row = mmalign.score_reply if own["kind"] in shapes.ALIGN_KINDS else score_answer
        assert score_row(own, own["answer"]) == score_row(other, other["answer"]) == 1
        if own["kind"] in shapes.KINDS:
            assert is_in_base_style(own, own["answer"])
            assert not is_in_base_style(other, other["answer"])


def test_one_sentence_in_eight_is_never_spoken_in_training_and_half_of_the_tests(world):
    spoken = {row["question"] for row in prepared.read_rows([world / "vision-audio"])}
    spoken |= {row["answer"] for row in prepared.read_rows([world / "audio-text"])}
    assert not any(map(shapes.is_held_out, spoken))
    test = list(prepared.read_rows([world / "test"]))
    assert sum(row["seen"] for row in test) == len(test) / 2
    assert all(row["seen"] != shapes.is_held_out(row["question"]) for row in test)
    rng = random.Random(0)
    questions = {shapes.draw_question(rng, shapes.draw_scene(rng, False), shapes.KINDS)["question"]
                 for _ in range(6000)}
    assert 0.08 < sum(map(shapes.is_held_out, questions)) / len(questions) < 0.18


def test_every_word_is_known_and_every_label_is_in_its_class():
    ollm, rng = build_ollm(torch.float32), random.Random(0)
    for _ in range(500):
        row = shapes.draw_question(rng, shapes.draw_scene(rng, False),
                                   shapes.KINDS + shapes.ALIGN_KINDS)
        ids = ollm.tokenizer([row["question"], row["answer"]]).input_ids
        assert ollm.tokenizer.unk_token_id not in sum(ids, [])
        assert row["label"] in shapes.CLASSES.get(row["kind"], (row["label"],))


def test_speech_is_audible_finite_and_of_a_plausible_length():
    wave, rate = speak("what color is the circle")
    assert rate == 16_000 and wave.dtype == np.float32 and 0.6 < len(wave) / rate < 3
    assert np.isfinite(wave).all() and 0.05 < np.abs(wave).max() <= 1
    speak("is there a red star", HELD_OUT_VOICES[0])
    assert np.array_equal(speak("what color is the circle")[0], wave), (
        "whatever was said before")
    slow = speak("what color is the circle", words_per_minute=100)[0]
    assert len(slow) > 1.3 * len(wave)


@pytest.mark.parametrize("rate, suffix, channels", [(8_000, "wav", 1), (44_100, "flac", 2),
                                                    (48_000, "ogg", 1)])
def test_audio_of_any_rate_and_format_is_brought_to_16_khz_mono(tmp_path, rate, suffix, channels):
    seconds = np.arange(rate) / rate
    tone = np.repeat(0.5 * np.sin(2 * np.pi * 440 * seconds)[:, None], channels, axis=1)
    soundfile.write(tmp_path / f"a.{suffix}", tone, rate)
    wave = data.load_audio(tmp_path / f"a.{suffix}")
    assert abs(len(wave) - 16_000) < 100
    spectrum = np.abs(np.fft.rfft(wave))
    assert abs(spectrum.argmax() * 16_000 / len(wave) - 440) < 3


NOISE = np.random.default_rng(0).normal(0, 0.1, 8 * 16_000)


@pytest.mark.parametrize("format", ["WAV", "FLAC", "MP3", "OGG"])
def test_a_stretch_is_what_it_says(tmp_path, format):
    soundfile.write(tmp_path / "x", NOISE, 16_000, format=format)
    whole = data.load_audio(tmp_path / "x")
    for start, seconds in ((0, 8), (2.5, 1.25), (7, 1), (7, 1.05), (0, 8.09), (7.5, None)):
        stretch = data.load_audio(tmp_path / "x", start, seconds)
        expected = whole[round(16_000 * start):][: round(16_000 * (seconds or 8))]
        np.testing.assert_allclose(stretch, expected, atol=0.05 if format == "MP3" else 1e-3)


@pytest.mark.parametrize("start, seconds", [
    (6, 15), (0, 8.2), (8, 1), (8, None), (9, None), (-1, 2), (0, 0), (2, 0), (0, -1),
    (np.nan, 1), (0, np.nan), (np.inf, 1), (0, np.inf), (1e300, 1e300)])
def test_a_stretch_that_is_not_there_is_refused(tmp_path, start, seconds):
    soundfile.write(tmp_path / "x.wav", NOISE, 16_000)
    with pytest.raises(BadInput, match="it lasts 8.0 s, and has no"):
        data.load_audio(tmp_path / "x.wav", start, seconds)


@pytest.mark.parametrize("name, order", [("x.png", "<u2"), ("x.tiff", "<u2"), ("x.tiff", ">u2")])
def test_a_picture_of_16_bits_keeps_its_levels(tmp_path, name, order):
    levels = np.arange(2**16).reshape(256, 256).astype(order)
    Image.fromarray(levels).save(tmp_path / name)
    assert (np.asarray(data.load_image(tmp_path / name))[..., 0] == (levels >> 8)).all()


@pytest.mark.parametrize("mode, highest, is_usable", [
    ("I", 255, True), ("F", 255, True), ("I", 65_535, False), ("F", 65_535, False),
    ("F", 1, False), ("F", np.nan, False), ("I", -5, False)])
def test_grey_levels_of_another_scale_are_refused(tmp_path, mode, highest, is_usable):
    levels = np.linspace(0, highest, 81).reshape(9, 9)
    levels = levels.astype({"I": np.int32, "F": np.float32}[mode])
    Image.fromarray(levels).save(tmp_path / "x.tiff")
    if is_usable:
        pixels = np.asarray(data.load_image(tmp_path / "x.tiff"))
        assert np.abs(pixels[..., 0] - levels).max() <= 1
    else:
        with pytest.raises(BadInput, match="grey levels"):
            data.load_image(tmp_path / "x.tiff")


@pytest.fixture
def folder(world, tmp_path):
    """A copy of a prepared part that a test may spoil."""
    return shutil.copytree(world / "vision-audio", tmp_path / "part")


@pytest.mark.parametrize("key, value", [
    ("end", "star"), ("end", 3.5), ("wave", [0.5] * 9000), ("pixels", [1]), ("where", "here"),
    ("folder", "/"), ("speaker", "x"), ("phase", 1), ("group", [7]), ("mask", None)])
def test_a_user_s_own_keys_change_nothing(world, folder, key, value):
    """An "end" of theirs, say, is not the answer's end mark."""
    ollm, batches = build_ollm(torch.float32), []
    lines = (folder / "samples.jsonl").read_text().splitlines()
    for part in (world / "vision-audio", folder):
        (folder / "samples.jsonl").write_text("".join(
            json.dumps({**json.loads(line), key: value}) + "\n" for line in lines))
        samples = data.Samples(part, ollm.settings)
        batches.append(data.collate([samples[i] for i in range(4)], ollm.tokenizer,
                                    ollm.mel_extractor, ollm.settings))
        assert samples.rows[1]["where"] == f"{part}/samples.jsonl:2"
    for form in ("text", "audio"):
        assert torch.equal(batches[0][form]["ids"], batches[1][form]["ids"])
        assert torch.equal(batches[0][form]["labels"], batches[1][form]["labels"])
    assert torch.equal(batches[0]["mel"], batches[1]["mel"])


@pytest.mark.parametrize("spoil", [
    {"after": "star"}, {"after": 3.5}, {"after": None}, {"after": ["is"]}, {"phase": "train"},
    {"phase": 2}, {"phase": None}, {"question": None, "after": ""}])
def test_a_key_of_ours_with_another_meaning_is_refused(folder, spoil):
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    line = {key: value for key, value in {**lines[1], **spoil}.items()
            if key != "question" or value is not None}
    write_json_lines(folder / "samples.jsonl", [lines[0], line, *lines[2:]])
    with pytest.raises(BadInput, match="samples.jsonl:2: "):
        data.Samples(folder, SETTINGS, ("audio",))
    checked = run_here("data.py", "check", folder, cwd=folder)
    assert checked.returncode == 1 and "samples.jsonl:2: " in checked.stdout


def test_a_group_of_several_pictures_is_refused(world):
    """Only the first of them would be seen."""
    rows = list(prepared.read_rows([world / "vision-text"]))
    assert curriculum(rows, 0)
    for row in rows:
        row["group"] = "train"
    with pytest.raises(BadInput, match="samples.jsonl:.*another picture"):
        curriculum(rows, 0)


def test_random_positions_keep_their_order_and_leave_the_answer_whole():
    spread = [random_positions({"id": str(i)}, 6, 10, seed=0).tolist() for i in range(300)]
    assert (all(a < b for row in spread for a, b in zip(row, row[1:]))
            and all(len(row) == 10 for row in spread))
    assert all(row[6:] == list(range(row[6], row[6] + 4)) for row in spread)
    plain = sum(row == list(range(10)) for row in spread) / 300
    assert 0.3 < plain < 0.55 and 20 < max(row[6] for row in spread) <= 24
    assert spread[7] == random_positions({"id": "7"}, 6, 10, seed=0).tolist(), (
        "a function of seed and sample")


@pytest.fixture
def two_folders(tmp_path):
    """Two small folders: what may stand in a line, and what may be missing."""
    lines = {"a": [{"id": "x", "question": "what é", "answer": "red", "group": 7},
                   {"question": "how many", "audio": "audio/1.flac", "answer": "two"}],
             "b": [{"audio": "audio/2.flac", "answer": "it is", "image": "images/2.png"},
                   {"id": "y", "question": "who", "answer": "she", "group": 7}]}
    for name, values in lines.items():
        (tmp_path / name).mkdir()
        text = "\r\n".join(json.dumps(value, ensure_ascii=False) for value in values)
        (tmp_path / name / "samples.jsonl").write_bytes(text.encode())
    return tmp_path / "a", tmp_path / "b", lines


def test_rows_are_the_lines_of_all_folders(two_folders):
    a, b, lines = two_folders
    rows, expected = prepared.Rows([a, f"{b}/"]), []
    for folder in (a, b):
        for number, line in enumerate(lines[folder.name], 1):
            group = {"group": f"{folder}/7"} if "group" in line else {}
            place = {"where": f"{folder}/samples.jsonl:{number}", "folder": str(folder)}
            expected.append({"id": str(number), **line, **group, **place})
    assert list(rows) == expected and rows[-1] == expected[3]
    assert list(rows.lengths) == [9, 11, 5, 6]
    assert type(rows.content) is bytearray, "no objects, which DataLoader workers would copy"
    with pytest.raises(IndexError):
        rows[4]


def test_rows_have_the_forms_that_are_needed_and_no_other(two_folders):
    a, b, _ = two_folders
    written = list(prepared.read_rows([a], ["question"]))
    assert [row.keys() & {"question", "audio"} for row in written] == [{"question"}] * 2
    silent = list(prepared.read_rows([a, b], []))
    assert not any(row.keys() & {"question", "audio"} for row in silent)
    with pytest.raises(BadInput, match="b/samples.jsonl:1: has no question"):
        list(prepared.read_rows([a, b], ["question"]))


@pytest.mark.parametrize("line", [
    '{"id": "x", "answer": "red"', '["red"]', '{"id": "x", "question": "what", "answer": 3}',
    '{"id": "x", "question": " ", "answer": "red"}',
    '{"id": "x", "question": "what", "answer": ""}', '{"id": "x", "answer": "red"}', "",
    '{"id": "x", "question": "what", "answer": "red", "image": "../../secret.png"}',
    '{"id": "x", "question": "what", "answer": "red", "image": "/etc/secret.png"}'])
def test_a_wrong_line_is_named(folder, line):
    lines = (folder / "samples.jsonl").read_text().splitlines()
    (folder / "samples.jsonl").write_text("\n".join([*lines[:4], line, *lines[4:]]) + "\n")
    with pytest.raises(BadInput) as error:
        data.Samples(folder, SETTINGS, ("question",))
    assert "samples.jsonl:5:" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, content", [
    ("images/000002.png", None), ("images/000002.png", b"not a picture"),
    ("audio/000002.flac", None), ("audio/000002.flac", b"not a sound")])
def test_a_broken_file_is_named_with_its_line(folder, name, content):
    (folder / name).unlink()
    if content:
        (folder / name).write_bytes(content)
    samples = data.Samples(folder, SETTINGS)
    samples[1]
    with pytest.raises(BadInput) as error:
        samples[2]
    assert ("samples.jsonl:3:" in str(error.value) and "000002" in str(error.value)
            and "\n" not in str(error.value))
