"""Recordings that are not what they say: cut off, shorter than their stretch, or no sound."""

import io

import numpy as np
import pytest
import soundfile
from conftest import read_lines, run_here

from plumbing.files import BadInput, write_json_lines
from plumbing.media import load_audio

NOISE = np.random.default_rng(0).normal(0, 0.1, 8 * 16_000)
FORMATS = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("WAV", "IMA_ADPCM"),
           ("WAVEX", "PCM_24"), ("RF64", "PCM_16"), ("W64", "PCM_16"), ("AIFF", "PCM_16"),
           ("AU", "PCM_16"), ("CAF", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"),
           ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]


def encode(wave, format, subtype=None, rate=16_000):
    """Returns a recording as a file's bytes."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=format, subtype=subtype)
    return file.getvalue()


# ---- cut off -------------------------------------------------------------------------------------


@pytest.mark.parametrize("format, subtype", FORMATS)
def test_a_recording_that_is_cut_off_is_refused_in_every_format(tmp_path, format, subtype):
    """An MP3's header told 8 s and 3.1 s came; a WAV or Ogg was as long as what was left of it."""
    path, whole = tmp_path / "x", encode(NOISE, format, subtype)
    path.write_bytes(whole)
    assert len(load_audio(path)) / 16_000 == pytest.approx(8, abs=0.1)
    for share in (0.95, 0.8, 0.4, 0.1):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(BadInput, match="cut off|malformed|lost sync|psf_fseek"):
            load_audio(path)


@pytest.mark.parametrize("end", [0xFFFFFFFF, 0x7FFFFFFF, 0x80000000])
def test_a_stream_s_wav_that_does_not_know_its_end_is_whole(tmp_path, end):
    """ffmpeg, sox and arecord write so into a pipe."""
    whole = encode(NOISE, "WAV")
    size = end.to_bytes(4, "little")
    (tmp_path / "x.wav").write_bytes(whole[:4] + size + whole[8:40] + size + whole[44:])
    assert len(load_audio(tmp_path / "x.wav")) == len(NOISE)


def test_a_flac_of_unknown_length_says_so(tmp_path):
    """It "lasts 576460752303423.5 s"."""
    whole = encode(NOISE, "FLAC")
    (tmp_path / "x.flac").write_bytes(whole[:21] + bytes([whole[21] & 240, 0, 0, 0, 0])
                                      + whole[26:])
    with pytest.raises(BadInput, match="does not tell its length"):
        load_audio(tmp_path / "x.flac")


def test_a_format_that_cannot_tell_is_not_trusted(tmp_path):
    (tmp_path / "x.nist").write_bytes(encode(NOISE, "NIST")[:100_000])
    with pytest.raises(BadInput, match="a NIST that does not tell its length"):
        load_audio(tmp_path / "x.nist")


# ---- a stretch of it -----------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["WAV", "FLAC", "MP3", "OGG"])
def test_a_stretch_is_what_it_says(tmp_path, format):
    (tmp_path / "x").write_bytes(encode(NOISE, format))
    whole = load_audio(tmp_path / "x")
    for start, seconds in ((0, 8), (2.5, 1.25), (7, 1), (7, 1.05), (0, 8.09), (7.5, None)):
        stretch = load_audio(tmp_path / "x", start, seconds)
        expected = whole[round(16_000 * start):][: round(16_000 * (seconds or 8))]
        np.testing.assert_allclose(stretch, expected, atol=0.05 if format == "MP3" else 1e-3)


@pytest.mark.parametrize("start, seconds", [
    (6, 15), (0, 8.2), (8, 1), (9, 1), (8, None), (9, None), (-1, 2), (-1, None), (0, 0), (2, 0),
    (0, -1), (np.nan, 1), (0, np.nan), (np.inf, 1), (0, np.inf), (-np.inf, np.inf), (1e300, 1e300)])
def test_a_stretch_that_is_not_there_is_refused(tmp_path, start, seconds):
    """What there was of it was taken, with the words of all; 0 s meant everything."""
    (tmp_path / "x.wav").write_bytes(encode(NOISE, "WAV"))
    with pytest.raises(BadInput, match="it lasts 8.0 s, and has no"):
        load_audio(tmp_path / "x.wav", start, seconds)


def test_a_manifest_s_rows_without_their_stretch_are_left_out(tmp_path):
    (tmp_path / "x.wav").write_bytes(encode(NOISE, "WAV"))
    stretches = [{"start": 2, "seconds": 3}, {"start": 6, "seconds": 15}, {"seconds": 0},
                 {"start": "9"}, {"start": -1}, {"seconds": -2}, {"seconds": 1e999}]
    write_json_lines(tmp_path / "x.jsonl", [{"audio": "x.wav", "text": "go", **stretch}
                                            for stretch in stretches])
    done = run_here("data.py", "manifest", "--manifest", "x.jsonl", "--root", ".", "--out", "out",
                    cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line["id"] for line in read_lines(tmp_path / "out/samples.jsonl")] == ["00000000"]
    reasons = [line["skipped"] for line in read_lines(tmp_path / "out/skipped.jsonl")]
    assert len(reasons) == 6 and all("it lasts 8.0 s, and has no" in why for why in reasons)


# ---- no sound ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wave, why", [
    (32767 * NOISE, "samples reach 1"), (128 * NOISE, "samples reach "), (NOISE[:0], "has no"),
    (NOISE + np.nan, "samples reach nan"), (NOISE + np.inf, "samples reach inf"),
    (np.stack([NOISE, -NOISE], 1), "channels"), (np.stack([NOISE, -0.99 * NOISE], 1), "channels")])
def test_what_is_no_sound_is_refused(tmp_path, wave, why):
    """Values to 32767 became a square wave, opposite channels silence, with the words beside it."""
    (tmp_path / "x.wav").write_bytes(encode(wave, "WAV", "DOUBLE"))
    with pytest.raises(BadInput, match=why) as error:
        load_audio(tmp_path / "x.wav")
    assert str(error.value).count(str(tmp_path / "x.wav")) == 1


@pytest.mark.parametrize("wave", [
    NOISE * 4, NOISE / 30, NOISE + 0.4, np.stack([NOISE, 0 * NOISE], 1),
    np.stack([NOISE, -0.5 * NOISE], 1), np.stack([NOISE] + 15 * [0 * NOISE], 1)])
def test_what_is_loud_quiet_or_beside_the_middle_is_heard(tmp_path, wave):
    (tmp_path / "x.wav").write_bytes(encode(wave, "WAV", "FLOAT"))
    expected = wave.mean(1) if wave.ndim == 2 else wave
    np.testing.assert_allclose(load_audio(tmp_path / "x.wav"), expected, atol=1e-5)


def test_silence_is_left_out(tmp_path):
    """With its words it was a sample. One of a folder that was made before is read as ever."""
    waves = [NOISE, 0 * NOISE, 0 * NOISE + 0.5, NOISE / 2**15, 0 * np.stack([NOISE, NOISE], 1),
             NOISE / 50]
    for i, wave in enumerate(waves):
        (tmp_path / f"{i}.wav").write_bytes(encode(wave, "WAV", "DOUBLE"))
    (tmp_path / "6.wav").write_bytes(encode(NOISE[:1], "WAV"))
    write_json_lines(tmp_path / "x.jsonl", [{"audio": f"{i}.wav", "text": "go"} for i in range(7)])
    done = run_here("data.py", "manifest", "--manifest", "x.jsonl", "--root", ".", "--out", "out",
                    cwd=tmp_path)
    assert done.returncode == 0 and "2 samples; 5 left out" in done.stdout, done.stderr
    reasons = [line["skipped"] for line in read_lines(tmp_path / "out/skipped.jsonl")]
    assert all("it is silent" in why for why in reasons), reasons
    assert not load_audio(tmp_path / "1.wav").any()
