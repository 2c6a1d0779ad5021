"""ASR corpora brought to our format: hand-made inputs in the exact layouts, also when killed."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import soundfile
from conftest import ROOT, read_lines, run_here
from test_sources import kill_once, save_noise

import data
from plumbing.files import BadInput, write_json_lines
from real import corpora


def test_librispeech(tmp_path):
    """What cannot be used, or was never unpacked, is counted; a split or chapter is needed."""
    chapter = tmp_path / "LibriSpeech/dev-clean/84/121123"
    for i, seconds in enumerate((1.0, 31.0)):
        save_noise(chapter / f"84-121123-000{i}.flac", seconds, 16_000)
    transcripts = chapter / "84-121123.trans.txt"
    transcripts.write_text("84-121123-0000 GO DO YOU HEAR\n84-121123-0001 BUT IN LESS\n"
                           "84-121123-0002 GONE\n")

    def librispeech(split, out):
        return run_here("data.py", "librispeech", "--root", ".", "--split", split, "--out", out,
                        cwd=tmp_path)

    done = librispeech("dev-clean", "out")
    assert done.returncode == 0, done.stderr
    assert read_lines(tmp_path / "out/samples.jsonl") == [
        {"id": "84-121123-0000", "audio": "audio/84-121123-0000.flac", "answer": "go do you hear"}]
    long, gone = read_lines(tmp_path / "out/skipped.jsonl")
    assert long["id"] == "84-121123-0001" and "31.0 s" in long["skipped"]
    assert gone["id"] == "84-121123-0002" and "0002.flac" in gone["skipped"]
    transcripts.unlink()
    for split, out, named in (("no-such", "b", "no-such"), ("dev-clean", "c", "121123.trans.txt")):
        refused = librispeech(split, out)
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1
        assert named in refused.stderr


def pack_librispeech(folder, *splits, utterances=200):
    """Writes each split's archive as it is published, of so many utterances of 0.2 s."""
    sound = io.BytesIO()
    soundfile.write(sound, np.random.default_rng(0).normal(0, 0.1, 3200), 16_000, format="FLAC")
    for split in splits:
        with tarfile.open(folder / f"{split}.tar.gz", "w:gz") as archive:
            files = {"README.TXT": b"LibriSpeech"}
            for chapter in range(10):
                names = [f"84-{chapter}-{i:04}" for i in range(utterances // 10)]
                files |= {f"{split}/84/{chapter}/{name}.flac": sound.getvalue() for name in names}
                files[f"{split}/84/{chapter}/84-{chapter}.trans.txt"] = "".join(
                    f"{name} {split.upper()}\n" for name in names).encode()
            for name, content in files.items():
                member = tarfile.TarInfo(f"LibriSpeech/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def test_librispeech_killed_while_it_is_unpacked_is_unpacked_anew(tmp_path):
    """A split is there as a whole or not at all."""
    pack_librispeech(tmp_path, "dev-clean", utterances=2000)
    command = ("librispeech", "--root", tmp_path, "--split", "dev-clean", "--out", tmp_path / "out")
    kill_once(lambda: list(tmp_path.rglob("*.flac")), *command)
    assert not (tmp_path / "LibriSpeech/dev-clean").exists() and list(tmp_path.rglob("*.flac"))
    done = run_here("data.py", *command, cwd=tmp_path)
    assert done.returncode == 0 and "2000 samples; 0 left out" in done.stdout, done.stderr
    assert len(list((tmp_path / "LibriSpeech").rglob("*.flac"))) == 2000, "nothing half is left"
    assert (tmp_path / "dev-clean.tar.gz").exists()


def test_processes_that_unpack_librispeech_at_once(tmp_path):
    """Two splits on one --root, and one split twice."""
    pack_librispeech(tmp_path, "dev-clean", "dev-other")
    command = [sys.executable, ROOT / "data.py", "librispeech", "--root", tmp_path, "--split"]
    processes = [subprocess.Popen([*command, split, "--out", tmp_path / out]) for split, out in
                 (("dev-clean", "a"), ("dev-other", "b"), ("dev-clean", "c"))]
    assert [process.wait(timeout=100) for process in processes] == [0, 0, 0]
    for out, text in (("a", "dev clean"), ("b", "dev other"), ("c", "dev clean")):
        lines = read_lines(tmp_path / out / "samples.jsonl")
        assert len(lines) == 200 and {line["answer"] for line in lines} == {text}


def test_librispeech_is_linked_and_not_written_again(tmp_path):
    """Recordings of our format take no disk space twice; others are converted."""
    chapter = tmp_path / "LibriSpeech/dev-clean/84/1"
    for i, kind in enumerate(((16_000, "PCM_16"), (8_000, "PCM_16"), (16_000, "PCM_24"),
                              (16_000, "PCM_16"))):
        save_noise(chapter / f"84-1-{i}.flac", 1, kind[0], subtype=kind[1])
    (chapter / "84-1-3.flac").rename(tmp_path / "elsewhere.flac")
    (chapter / "84-1-3.flac").symlink_to("../../../../elsewhere.flac")
    (chapter / "84-1.trans.txt").write_text("".join(f"84-1-{i} GO\n" for i in range(4)))
    done = run_here("data.py", "librispeech", "--root", tmp_path, "--split", "dev-clean", "--out",
                    tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0 and "4 samples" in done.stdout, done.stderr
    ours = [tmp_path / f"out/audio/84-1-{i}.flac" for i in range(4)]
    same = [path.samefile(chapter / path.name) for path in ours]
    assert same == [True, False, False, True] and not any(map(os.path.islink, ours))
    shutil.rmtree(tmp_path / "LibriSpeech")
    (tmp_path / "elsewhere.flac").unlink()
    assert [len(data.load_audio(path)) for path in ours] == 4 * [16_000]


def test_commonvoice(tmp_path):
    save_noise(tmp_path / "clips/common_voice_en_1.mp3", 1.0, 48_000)
    (tmp_path / "validated.tsv").write_text(
        "client_id\tpath\tsentence\tup_votes\n"
        'abc\tcommon_voice_en_1.mp3\t"He said ""no""."\t2\n'
        "abc\tgone.mp3\tGone.\t2\n")
    done = run_here("data.py", "commonvoice", "--tsv", tmp_path / "validated.tsv",
                    "--clips", tmp_path / "clips", "--out", tmp_path / "cv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_lines(tmp_path / "cv/samples.jsonl") == [
        {"id": "common_voice_en_1", "audio": "audio/common_voice_en_1.flac",
         "answer": "he said no"}]
    assert "gone.mp3" in read_lines(tmp_path / "cv/skipped.jsonl")[0]["skipped"]
    wave = data.load_audio(tmp_path / "cv/audio/common_voice_en_1.flac")
    assert len(wave) == pytest.approx(16_000, rel=0.1)  # MP3 pads


def manifest(folder, rows, header=None):
    """Runs `data.py manifest` on rows, as .jsonl, or as a .tsv with the header's columns.

    The .tsv begins with a byte order mark, which must not hide its first column.
    """
    shutil.rmtree(folder / "out", ignore_errors=True)
    name = "x.tsv" if header else "x.jsonl"
    if header:
        lines = [header, *(["" if row.get(key) is None else str(row[key]) for key in header]
                           for row in rows)]
        text = "\ufeff" + "".join("\t".join(line) + "\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")
    else:
        write_json_lines(folder / name, rows)
    return run_here("data.py", "manifest", "--manifest", name, "--root", ".", "--out", "out",
                    cwd=folder)


@pytest.fixture
def ten_seconds(tmp_path):
    """A recording, x.wav, of ten seconds of noise; returns it."""
    wave = np.random.default_rng(0).normal(0, 0.1, 160_000)
    soundfile.write(tmp_path / "x.wav", wave, 16_000, subtype="FLOAT")
    return wave


@pytest.mark.parametrize("form", ["jsonl", "tsv"])
@pytest.mark.parametrize("stretch, start, seconds", [
    ({}, 0, 10), ({"start": 2, "seconds": 1.5}, 2, 1.5), ({"seconds": 2, "start": None}, 0, 2)])
def test_a_stretch_of_a_recording_is_taken(tmp_path, ten_seconds, stretch, start, seconds, form):
    soundfile.write(tmp_path / "x.flac", ten_seconds, 16_000)  # of our format; a part is not linked
    row = {**stretch, "audio": "x.flac", "text": "go"}
    done = manifest(tmp_path, [row], list(row) if form == "tsv" else None)
    assert done.returncode == 0, done.stderr
    line, = read_lines(tmp_path / "out/samples.jsonl")
    assert line["answer"] == "go"
    np.testing.assert_allclose(data.load_audio(tmp_path / "out" / line["audio"]), atol=1e-4,
                               desired=ten_seconds[16_000 * start:][: int(16_000 * seconds)])


@pytest.mark.parametrize("row, named", [
    ({"offset": 1, "text": "go"}, "offset"), ({"end": 3, "text": "go"}, "end"), ({}, "text"),
    ({"start": "a", "text": "go"}, "'a'"), ({"start": True, "text": "go"}, "True"),
    ({"seconds": [1], "text": "go"}, "[1]")])
def test_columns_unknown_missing_or_of_no_number_are_refused(tmp_path, ten_seconds, row, named):
    done = manifest(tmp_path, [{"audio": "x.wav", "text": "go"}, {"audio": "x.wav", **row}])
    assert done.returncode == 1 and done.stderr.startswith("error: x.jsonl:2: "), done.stdout
    assert named in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out/samples.jsonl").exists()


@pytest.mark.parametrize("one, other", [
    ("a", "a"), ("a/b", "a_b"), ("Abc", "aBC"), ("stra\u00dfe", "STRASSE"),
    ("caf\u00e9", "cafe\u0301"), ("00000001", None), (7, "7")])
def test_two_ids_of_one_file_are_refused(tmp_path, ten_seconds, one, other):
    """Some disks do not tell case apart: "a" would have the recording of "A". 0 is an id."""
    rows = [{"id": one, "audio": "x.wav", "text": "go"}, {"audio": "x.wav", "text": "no"}]
    rows[1] |= {"id": other} if other else {}
    done = manifest(tmp_path, rows)
    assert done.returncode == 1 and "two ids name one file" in done.stderr, done.stdout
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out/samples.jsonl").exists()
    done = manifest(tmp_path, [rows[0], {**rows[1], "id": 0}])
    assert done.returncode == 0, done.stderr
    assert read_lines(tmp_path / "out/samples.jsonl")[1]["id"] == "0"


@pytest.mark.parametrize("header", [None, ["audio", "text"]])
@pytest.mark.parametrize("text", ["", None, "  ", "[noise]"])
def test_a_row_without_words_is_left_out(tmp_path, ten_seconds, text, header):
    done = manifest(tmp_path, [{"audio": "x.wav", "text": text}, {"audio": "x.wav", "text": "go"}],
                    header)
    assert done.returncode == 0 and "1 samples; 1 left out" in done.stdout, done.stderr
    assert "the transcript" in read_lines(tmp_path / "out/skipped.jsonl")[0]["skipped"]


def test_silence_is_left_out(tmp_path, ten_seconds):
    """With its words it would teach to hear what nobody said. Faint speech is taken."""
    waves = [ten_seconds, 0 * ten_seconds, 0 * ten_seconds + 0.5, ten_seconds / 2**15,
             ten_seconds / 50, ten_seconds[:1]]
    for i, wave in enumerate(waves):
        soundfile.write(tmp_path / f"{i}.wav", wave, 16_000, subtype="DOUBLE")
    done = manifest(tmp_path, [{"audio": f"{i}.wav", "text": "go"} for i in range(len(waves))])
    assert done.returncode == 0 and "2 samples; 4 left out" in done.stdout, done.stderr
    reasons = [line["skipped"] for line in read_lines(tmp_path / "out/skipped.jsonl")]
    assert all("it is silent" in why for why in reasons), reasons


def cut(name, start=2.0, seconds=3.0, source="x.wav", **options):
    """A cut as Lhotse 1.33 writes it, its one supervision as long as itself."""
    words = {"id": name, "recording_id": "x", "start": 0.0, "duration": seconds, "channel": 0,
             "text": f"THIS IS <COMMA> {name[0]}"}
    recording = {"id": "x", "sources": [{"type": "file", "channels": [0], "source": source}],
                 "sampling_rate": 16_000, "num_samples": 160_000, "duration": 10.0,
                 "channel_ids": [0]}
    return {"id": name, "start": start, "duration": seconds, "channel": 0, "type": "MonoCut",
            "supervisions": [{**words, **options.pop("words", {})}],
            "recording": {**recording, **options.pop("recording", {})}, **options}


SPEED = [{"name": "Speed", "kwargs": {"factor": 1.1}}]
BOTH = [{"type": "file", "channels": [0, 1], "source": "x.wav"}]
ONE_EACH = [{"type": "file", "channels": [i], "source": "x.wav"} for i in (0, 1)]
RUN = [{"type": "command", "channels": [0], "source": "touch run; cat x.wav"}]
ADDRESS = [{"type": "url", "channels": [0], "source": "http://localhost/x.wav"}]


@pytest.mark.parametrize("packed", [False, True])
def test_lhotse_s_cuts_are_read_as_they_are(tmp_path, ten_seconds, packed):
    """Of one file, one channel and one supervision; other cuts are left out with the reason."""
    libriheavy = {"text": None, "custom": {"texts": ["He said: no.", "HE SAID NO"]}}
    wider = {"start": 0.5, "duration": 2.0}  # the cut holds a second that nobody has transcribed
    good = [cut("a"), cut("b/1", 7, 3), cut("c", words=libriheavy), cut("d", words=wider)]
    bad = [cut("e", recording={"transforms": SPEED}),
           {"id": "f", "type": "MixedCut", "tracks": [{"cut": cut("a"), "offset": 0.0}]},
           {"id": "g", "duration": 1.0, "sampling_rate": 16_000, "type": "PaddingCut"},
           cut("h", type="MultiCut", channel=[0, 1], recording={"sources": BOTH}),
           cut("i", channel=1, recording={"sources": BOTH}),
           cut("j", recording={"sources": ONE_EACH}), cut("k", recording={"sources": RUN}),
           cut("l", recording={"sources": ADDRESS}), cut("m", features={}) | {"recording": None},
           cut("n", supervisions=[]), cut("o", supervisions=2 * cut("o")["supervisions"])]
    bad = [(row, "the cut is transformed, or not of one file, one channel and one supervision")
           for row in bad]
    bad += [(cut("p", words={"text": None}), "is empty"), (cut("q", 8, 3), "it lasts 10.0 s"),
            (cut("r", source="no.wav"), "no.wav"), (cut("s", words={"text": "<MUSIC>"}), "a tag")]
    name = "cuts.jsonl" + ".gz" * packed
    text = "".join(json.dumps(row) + "\n" for row in [*good, *(row for row, _ in bad)])
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    done = run_here("data.py", "manifest", "--manifest", name, "--root", ".", "--out", "out",
                    cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = {line["id"]: line["answer"] for line in read_lines(tmp_path / "out/samples.jsonl")}
    assert kept == {"a": "this is a", "b_1": "this is b", "c": "he said no", "d": "this is d"}
    for row, start, seconds in (("a", 2, 3), ("b_1", 7, 3), ("c", 2, 3), ("d", 2.5, 2)):
        wave = data.load_audio(tmp_path / f"out/audio/{row}.flac")
        expected = ten_seconds[int(16_000 * start):][: 16_000 * seconds]
        np.testing.assert_allclose(wave, expected, atol=1e-4)
    skipped = {line["id"]: line["skipped"] for line in read_lines(tmp_path / "out/skipped.jsonl")}
    assert [*skipped] == [row["id"] for row, _ in bad] and not (tmp_path / "run").exists()
    for row, why in bad:
        assert why in skipped[row["id"]], (row["id"], skipped)


@pytest.mark.parametrize("text, transcript", [
    ("HELLO <COMMA> IT'S TWO <QUESTIONMARK>", "hello it's two"),
    ("YES <EXCLAMATIONPOINT> NO <PERIOD>", "yes no"), ('"He said ""no""."', "he said no"),
    ("“Don’t — stop,” she said: twenty-one…", "don't stop she said twenty one"),
    ("GO DO YOU HEAR", "go do you hear"),
    ("He said 'go away' and left", "he said go away and left"),
    ("'Go away!' she said", "go away she said"),
    ("\u2018Go\u2019 or \u2018don\u2019t go\u2019", "go or don't go"), ("don\u2018t", "don't"),
    ("don\u02bct", "don't"), ("don\uff07t", "don't"), ("'Tis the dogs", "'tis the dogs"),
    ("Ünïcode", "ünïcode"),
    ("the dogs' tails", "the dogs' tails"), ("rock 'n' roll, o'clock", "rock n roll o'clock"),
])
def test_transcripts_of_all_corpora_have_one_style(text, transcript):
    assert corpora.plain_transcript(text) == transcript


@pytest.mark.parametrize("text, reason", [
    ("<MUSIC>", "has a tag"), ("<SIL>", "has a tag"), ("<NOISE>", "has a tag"),
    ("<OTHER>", "has a tag"), ("rhythm & blues", "has a sign"), ("3.5 miles", "has a sign"),
    (" <COMMA> ... ", "is empty"), ("[laughter] yes", "has a tag"), ("(laughs) yes", "has a tag"),
    ("yes {noise}", "has a tag"), ("*coughs* yes", "has a tag"), ("yes [laugh", "has a tag"),
    ("yes <unk", "has a tag"), ("\u266a la \u266a", "has a sign"), ("spoken_noise", "has a sign"),
    ("'...'", "is empty")])
def test_transcripts_of_no_words_or_of_signs_are_left_out(text, reason):
    with pytest.raises(BadInput, match=reason):
        corpora.plain_transcript(text)
