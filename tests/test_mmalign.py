"""MMAlign from ARO's files: what is drawn, cut, asked and left out; the judge; the table."""

import argparse
import json
import random
import shutil
from collections import Counter

import pytest
from conftest import read_lines, run_here, save_runs
from PIL import Image
from test_sources import build_vits

import data
import mmalign
from model import OLLM
from plumbing.files import BadInput
from plumbing.media import HELD_OUT_VOICES
from real.families import PromptSettings
from world import shapes

SIZE, N = (40, 30), 6
SHAPES = ("circle", "square", "triangle", "star")
REASONS = {"the relation is symmetric": 2, "not a row of ARO": 5,
           "one sentence contains the other": 2, "the box has no area": 2,
           "the question has more than 400 characters": 1, "the same as an earlier row": 2,
           "the picture is missing": 2, "the picture is broken": 1,
           "the box lies outside the picture": 1}


def row(image, true, false, box=(3, 2, 20, 10), relation="above"):
    """A row as ARO's files have it."""
    sides = {f"bbox_{side}": value for side, value in zip("xywh", box)}
    return {"image_id": 1, "image_path": image, **sides, "true_caption": true,
            "false_caption": false, "relation_name": relation, "attributes": ["red", "blue"]}


def relation_row(i, **options):
    a, b = [(a, b) for a in SHAPES for b in SHAPES if a != b][i]
    return row(f"{i % 5}.png", f"the {a} is above the {b}", f"the {b} is above the {a}", **options)


def attribute_row(i):
    a, b = [(a, b) for a in SHAPES for b in SHAPES if a < b][i % 6]
    p, q = (("red", "blue"), ("white", "green"))[i // 6]
    return row(f"{i % 5}.png", f"the {p} {a} and the {q} {b}", f"the {q} {a} and the {p} {b}")


@pytest.fixture(scope="module")
def aro(tmp_path_factory):
    """ARO's files by hand: 8 usable relations, 18 bad ones, 12 attributes, 5 pictures."""
    folder = tmp_path_factory.mktemp("aro")
    (folder / "images").mkdir()
    for number in range(5):  # every pixel tells which picture it is of, and where it stood
        image = Image.new("RGB", SIZE)
        places = [(x, y) for y in range(SIZE[1]) for x in range(SIZE[0])]
        image.putdata([(6 * x, 8 * y, 50 * number) for x, y in places])
        image.save(folder / f"images/{number}.png")
    (folder / "images/broken.png").write_bytes((folder / "images/0.png").read_bytes()[:60])
    good = [relation_row(i) for i in range(6)]
    beyond = relation_row(6, box=(-5, 20, 100, 100))  # the picture's border
    good += [beyond, relation_row(7, box=(30, -4, 10, 8))]
    lacking = {key: value for key, value in relation_row(8).items() if key != "bbox_w"}
    same = "the star is above the star"
    bad = [relation_row(8, relation="near"), relation_row(8, relation=" Next to "),
           "no row", lacking, None, {**relation_row(8), "bbox_x": "3"},
           {**relation_row(8), "true_caption": 7}, row("0.png", same, same),
           row("0.png", "", "a star"), relation_row(8, box=(3, 3, 0, 9)),
           relation_row(8, box=(3, 3, 9, -1)), row("0.png", "the " * 80 + "star", "a star"),
           relation_row(0), beyond, {**relation_row(8), "image_path": "none.png"},
           {**relation_row(8), "image_path": "../images/0.png"},
           {**relation_row(8), "image_path": "broken.png"}, relation_row(9, box=(41, 3, 9, 9))]
    assert len(bad) == sum(REASONS.values())
    (folder / "relation.json").write_text(json.dumps(bad[:9] + good + bad[9:]))
    (folder / "attribution.json").write_text(json.dumps([attribute_row(i) for i in range(12)]))
    return folder


def command(aro, out, n=N, **other):
    options = {"relation": aro / "relation.json", "attribution": aro / "attribution.json",
               "images": aro / "images", "out": out, "n": n, **other}
    return ["mmalign.py", "build", *(f"--{key}={value}" for key, value in options.items())]


@pytest.fixture(scope="module")
def built(aro, tmp_path_factory):
    """The prepared folder of six relations and six attributes, and what making it printed."""
    folder = tmp_path_factory.mktemp("built")
    done = run_here(*command(aro, folder / "mmalign"), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "mmalign", done.stdout


def pick_rows(aro, out, rows=None, seed=0, images="images", kind="relation", n=N):
    """Returns the lines picked from a relation file, without their speech, and what is skipped."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows = rows or json.loads((aro / "relation.json").read_text())
    (out / "rows.json").write_text(json.dumps(rows))
    args = argparse.Namespace(images=aro / images, out=out, n=n, seed=seed, tts="espeak")
    return mmalign.pick_rows(out / "rows.json", kind, args)


def test_every_question_is_built_as_promised_and_the_true_sentence_is_first_in_half(built):
    folder, _ = built
    first = Counter()
    for line in read_lines(folder / "samples.jsonl"):
        pair = [line["label"], line["false"]]
        wordings = [mmalign.QUESTION.format(*pair), mmalign.QUESTION.format(*reversed(pair))]
        assert line["answer"] == line["label"] != line["false"] and line["question"] in wordings
        assert sorted(pair[0].split()) == sorted(pair[1].split())
        assert line["voice"] in HELD_OUT_VOICES
        assert (" is above " in line["label"]) == (line["kind"] == "relation")
        first[line["kind"], wordings.index(line["question"])] += 1
    assert first == {(kind, place): N // 2 for kind in shapes.ALIGN_KINDS for place in (0, 1)}
    assert line["question"].startswith(
        'Which of the following two sentences correctly describes the image? "the ')
    samples = data.Samples(folder, PromptSettings(image_size=64, max_tiles=1))
    first_kinds = [samples.rows[i]["kind"] for i in range(2)]
    assert first_kinds == list(shapes.ALIGN_KINDS), "the first few are of both kinds"
    assert all(len(samples[i]["wave"]) > 3 * data.SAMPLE_RATE for i in range(2 * N))
    for key in ("audio", "id"):
        assert len({row[key] for row in samples.rows}) == 2 * N


def test_pictures_are_cut_to_the_box_and_the_border(aro, tmp_path):
    taken, _ = pick_rows(aro, tmp_path, n=8)
    rows = json.loads((aro / "relation.json").read_text())[9:17]
    numbers = {row["true_caption"]: number for number, row in enumerate(rows)}
    assert {line["label"] for line in taken} == set(numbers)
    boxes = {6: (0, 20, 40, 10), 7: (30, 0, 10, 4)}
    for line in taken:
        number, crop = numbers[line["label"]], Image.open(tmp_path / line["image"])
        x, y, w, h = boxes.get(number, (3, 2, 20, 10))
        assert crop.size == (w, h)
        blue = 50 * int(rows[number]["image_path"][0])
        assert crop.getpixel((0, 0)) == (6 * x, 8 * y, blue)
        assert crop.getpixel((w - 1, h - 1)) == (6 * (x + w - 1), 8 * (y + h - 1), blue)


def test_what_cannot_be_asked_is_reported(aro, built, tmp_path):
    folder, printed = built
    counts = Counter(line["skipped"].split(":")[0] for line in read_lines(folder / "skipped.jsonl"))
    assert f"{2 * N} samples; {counts.total()} left out" in printed
    assert all(f"{count}  {reason}" in printed for reason, count in counts.items())
    for reason, count in REASONS.items():  # not every picture is looked at
        needs_picture = reason.startswith("the picture is") or "outside the picture" in reason
        assert counts[reason] == count or needs_picture and counts[reason] < count
    bad = mmalign.usable_rows(aro / "relation.json", "relation")[1]
    assert [line["id"] for line in bad[:2]] == ["relation-000000", "relation-000001"]
    assert "symmetric" in bad[0]["skipped"] and "bbox_w" in bad[3]["skipped"]
    few = run_here(*command(aro, tmp_path / "few", n=10), cwd=tmp_path)
    assert few.returncode == 1 and few.stderr.count("\n") == 1
    assert "relation.json" in few.stderr
    assert all(f"{count} x {reason}" in few.stderr for reason, count in REASONS.items()), few.stderr
    assert not (tmp_path / "few/samples.jsonl").exists()


@pytest.mark.parametrize("name", ["near", "next to", "by", "with", "beside", "around",
                                  "standing next to"])
def test_symmetric_relations_are_left_out(name):
    with pytest.raises(BadInput, match=name):
        mmalign.aro_row(relation_row(0, relation=name), "relation")
    assert mmalign.aro_row(relation_row(0, relation=name), "attribute"), "which have no relation"
    directed = {"above", "on", "in", "under", "to the left of", "riding", "covered with"}
    assert not directed & set(mmalign.SYMMETRIC)


def test_an_aro_file_that_changed_is_refused_where_another_was_begun(aro, tmp_path):
    """Pictures and speech are kept by row number: they were put under another file's questions."""
    rows = json.loads((aro / "relation.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    changed = command(aro, tmp_path / "out", n=2, relation=tmp_path / "rows.json")
    assert run_here(*changed, cwd=tmp_path).returncode == 0
    (tmp_path / "out/samples.jsonl").unlink()
    (tmp_path / "rows.json").write_text(json.dumps(rows[1:]))
    again = run_here(*changed, cwd=tmp_path)
    assert again.returncode == 1 and again.stderr.count("\n") == 1
    assert "relation_sha256" in again.stderr and not (tmp_path / "out/samples.jsonl").exists()


def test_a_draw_is_the_seeds_and_not_the_files_orders(aro, tmp_path):
    rows = [relation_row(i) for i in range(12)]
    questions = {}
    for name, order, seed in (("a", rows, 0), ("b", rows[::-1], 0), ("c", rows, 1)):
        taken, _ = pick_rows(aro, tmp_path / name, rows=order, seed=seed)
        questions[name] = [line["question"] for line in taken]
    assert questions["a"] == questions["b"] != questions["c"]

    # Without a picture, the rows that do not need it come in the same order.
    picture_of = {row["true_caption"]: row["image_path"] for row in rows}
    taken, _ = pick_rows(aro, tmp_path / "d", rows=rows)
    lost = picture_of[taken[2]["label"]]
    shutil.copytree(aro / "images", tmp_path / "images")
    (tmp_path / "images" / lost).unlink()
    fewer, skipped = pick_rows(aro, tmp_path / "e", rows=rows, images=tmp_path / "images")
    spared = [line["label"] for line in taken if picture_of[line["label"]] != lost]
    assert [line["label"] for line in fewer][:len(spared)] == spared
    assert len(fewer) == N > len(spared) and all(lost in line["skipped"] for line in skipped)


def test_speech_that_asks_in_the_other_order_is_never_kept(aro, tmp_path):
    """With another picture missing the orders shift: a name must still mean the same question."""
    rows, by_speech, by_picture = [relation_row(i) for i in range(12)], {}, {}
    for lost in range(5):
        images = tmp_path / f"images{lost}"
        shutil.copytree(aro / "images", images)
        (images / f"{lost}.png").unlink()
        for line in pick_rows(aro, tmp_path / f"out{lost}", rows=rows, images=images)[0]:
            by_speech.setdefault(line["audio"], set()).add(line["question"])
            by_picture.setdefault(line["image"], set()).add(line["question"])
    assert max(map(len, by_picture.values())) == 2, "asked in both orders, or nothing is tested"
    assert max(map(len, by_speech.values())) == 1


def test_the_voice_is_that_of_a_run(aro, tmp_path):
    save_runs(tmp_path, "run", "vision-audio")
    about = json.loads((tmp_path / "run/ollm.json").read_text())
    about["settings"] |= {"tts": "mms", "voice": str(build_vits(tmp_path / "voice"))}
    (tmp_path / "run/ollm.json").write_text(json.dumps(about))
    for other, told in (({}, ["mms", str(tmp_path / "voice")]),
                        ({"tts": "espeak"}, ["espeak", str(tmp_path / "voice")])):
        out = tmp_path / told[0]
        done = run_here(*command(aro, out, n=2, run=tmp_path / "run", **other), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        settings = json.loads((out / "settings.json").read_text())
        assert [settings["tts"], settings["voice"]] == told and "run" not in settings


def test_mms_can_speak_it(aro, tmp_path):
    """A caption that it cannot say is left out before the draw: it was spoken in part."""
    rows = [relation_row(i) for i in range(12)]
    for row in rows[:10]:
        row["true_caption"] += " & more"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    voice, options = build_vits(tmp_path / "voice"), {"relation": tmp_path / "rows.json"}
    done = run_here(*command(aro, tmp_path / "out", n=2, tts="mms", voice=voice, **options),
                    cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {line["label"] for line in read_lines(tmp_path / "out/samples.jsonl")} >= {
        row["true_caption"] for row in rows[10:]}
    assert all("the voice cannot say: &" in line["skipped"]
               for line in read_lines(tmp_path / "out/skipped.jsonl"))
    samples = data.Samples(tmp_path / "out", PromptSettings(image_size=64, max_tiles=1))
    assert len(samples) == 4
    assert all(len(samples[i]["wave"]) > 1000 and "voice" not in samples[i] for i in range(4))


TRUE, FALSE = "the man is on the horse", "the horse is on the man"


@pytest.mark.parametrize("reply, verdict, verdict_if_false_is_first", [
    ("the man is on the horse", "right", "right"),
    ("The man is on  the horse.", "right", "right"),
    ('"**The man** is on the horse!"', "right", "right"),
    ("It shows that the man is on the horse, I think.", "right", "right"),
    ("the horse is on the man", "wrong", "wrong"),
    ("the man is on the horse, not: the horse is on the man", None, None),
    ("ECHO", None, None),
    ("ECHO the man is on the horse", "right", "right"),
    ("ECHO The second.", "wrong", "right"),
    ("", None, None),
    ("a man rides", None, None),
    ("the man is on", None, None),
    ("First", "right", "wrong"),
    ("the second.", "wrong", "right"),
    ("The first sentence is correct.", "right", "wrong"),
    ("The second one", "wrong", "right"),
    ("Sentence 1", "right", "wrong"),
    ("sentence 2.", "wrong", "right"),
    ("1", "right", "wrong"),
    ("2.", "wrong", "right"),
    ("(A)", "right", "wrong"),
    ("B", "wrong", "right"),
    ("the first sentence correctly describes the image", "right", "wrong"),
    ("the second sentence: the man is on the horse", "right", "right"),
    ("a", None, None),
    ("A man", None, None),
    ("the first is wrong", None, None),
    ("1 and 2", None, None),
    ("the first thing to see is a horse", None, None),
    ("12", None, None),
])
def test_the_judge(reply, verdict, verdict_if_false_is_first):
    for pair, wanted in (((TRUE, FALSE), verdict), ((FALSE, TRUE), verdict_if_false_is_first)):
        question = mmalign.QUESTION.format(*pair)
        answer = reply.replace("ECHO", question.upper())
        assert mmalign.judge(answer, question, TRUE, FALSE) == wanted


@pytest.mark.parametrize("reply, right", [
    ("star above circle", True), ("it is circle below star", True), ("circle above star", False),
    ("star below circle", False), ("star", False),
    ("star above circle or circle above star", False)])
def test_a_relation_may_be_said_from_the_other_side(reply, right):
    sample = {"question": "which is right circle above star or star above circle",
              "label": "star above circle", "false": "circle above star"}
    assert mmalign.means_right(sample, reply) == right


def test_the_built_in_world_is_scored_by_its_own_rule():
    """A reply is right if the true sentence is in it and the false one is not."""
    rng, scores, words = random.Random(0), Counter(), shapes.vocabulary()
    for number in range(4000):
        sample = None
        while sample is None:
            scene, kind = shapes.draw_scene(rng, True), rng.choice(shapes.ALIGN_KINDS)
            sample = shapes.draw_question(rng, scene, (kind,))
        parts = [sample["label"], sample["false"], sample["question"], sample["answer"], "s",
                 *rng.choices(words, k=4)]
        reply = " ".join(rng.choices(parts, k=rng.randint(1, 4)))
        if number < len(words):
            reply = words[number]
        rest = reply.replace(sample["question"], " ")
        expected = float(sample["label"] in rest and sample["false"] not in rest)
        assert mmalign.score_reply(sample, reply) == expected, (sample, reply)
        scores[expected] += 1
    assert min(scores.values()) > 500


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A listening run with random weights."""
    return save_runs(tmp_path_factory.mktemp("run"), "kd", "vision-audio", 0.75) / "kd"


def table(printed):
    """Returns the printed table as {line: [cells]}."""
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}


def test_the_table_of_a_built_folder(built, run, tmp_path, monkeypatch):
    def answer(ollm, samples, forms, max_new_tokens):
        pairs = [(s["kind"] == "relation", s["label"]) for s in samples]
        texts = [label if relation else "I do not know." for relation, label in pairs]
        return {"text": texts,
                "audio": ["The first sentence." if relation else "B" for relation, _ in pairs]}

    monkeypatch.setattr(OLLM, "answer", answer)
    done = run_here("mmalign.py", run, "--data", built[0], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = {name: cells for name, cells in table(done.stdout).items() if "---" not in name}
    assert lines == {
        "": ["text", "KD 0.75, audio", "KD 0.75, gap"],
        "relation": ["100.0", "50.0", "50.0"], "attribute": ["0.0", "50.0", "-50.0"],
        "MMAlign mean": ["50.0", "50.0", "0.0"], "answered": ["50.0", "100.0", "-50.0"],
        "right if answered": ["100.0", "50.0", "50.0"], "as with text": ["", "0.0", ""]}

    kept = [run / "answers-MMAlign-mmalign.jsonl",
            run.parent / "base/answers-base-MMAlign-mmalign.jsonl"]
    for path in kept:
        path.unlink()  # or nothing would be asked
    monkeypatch.setattr(OLLM, "answer", lambda ollm, samples, forms, max_new_tokens: {
        "text": [s["label"] for s in samples], "audio": ["" for _ in samples]})
    silent = table(run_here("mmalign.py", run, "--data", built[0], cwd=tmp_path).stdout)
    assert silent["answered"] == ["100.0", "0.0", "100.0"]
    assert silent["right if answered"] == ["100.0", "", ""]
    for path in kept:
        path.unlink()


def test_a_built_folder_is_asked_as_text_and_as_speech(built, run, tmp_path, world):
    done = run_here("mmalign.py", run, "--data", built[0], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(table(done.stdout))[2:6] == ["relation", "attribute", "MMAlign mean", "answered"]
    assert f"{2 * N} held-out questions" in done.stdout
    answers = read_lines(run / "answers-MMAlign-mmalign.jsonl")
    assert len(answers) == 2 * N
    assert all(isinstance(line[form], str) for line in answers for form in ("text", "audio"))

    (tmp_path / "others").mkdir()
    others = [line for line in read_lines(world / "test/samples.jsonl") if line["kind"] == "color"]
    (tmp_path / "others/samples.jsonl").write_text("".join(json.dumps(o) + "\n" for o in others))
    none = run_here("mmalign.py", run, "--data", "others", cwd=tmp_path)
    assert none.returncode == 1 and none.stderr.count("\n") == 1 and "others" in none.stderr
    (tmp_path / "runs/shapes").mkdir(parents=True)
    (tmp_path / "runs/shapes/data-s0").symlink_to(world)
    ours = run_here("mmalign.py", run, "--n", 4, cwd=tmp_path)
    lines = ["relation", "attribute", "MMAlign mean", "unseen sentences", "answered",
             "right if answered", "right by meaning", "as with text"]
    assert set(list(table(ours.stdout))[2:]) <= set(lines), ours.stderr
