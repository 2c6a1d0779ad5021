"""A chat server on this machine: what it is sent, what it may fail at, and what is kept of it."""

import base64
import http.server
import io
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import read_lines, run_here, save_runs
from PIL import Image
from test_bench_tsv import prepare, write_benchmarks

from benchmarks import endpoint
from plumbing.files import BadInput
from plumbing.media import SAMPLE_RATE

pytest.importorskip("openai")


@pytest.fixture
def server():
    """(its URL, the requests it got, what it does next: a status, a dict of the reply, or a rule).

    A rule, a function of the kinds of a message's parts, stays; others are for one request each.
    """
    requests, todo = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body)
            kinds = [part["type"] for part in body["messages"][0]["content"]]
            action = todo[0](kinds) if todo and callable(todo[0]) else todo.pop(0) if todo else 200
            status = action if isinstance(action, int) else 200
            reply = {"content": f"answer {len(requests)}", "end": "stop",
                     "heard": ("input_audio", "audio_url")}
            reply |= action if isinstance(action, dict) else {}
            tokens = 57 + 23 * any(kind in reply["heard"] for kind in kinds)
            text = json.dumps({
                "choices": [{"index": 0, "finish_reason": reply["end"],
                             "message": {"role": "assistant", "content": reply["content"]}}],
                "usage": {"prompt_tokens": tokens, "completion_tokens": 3, "total_tokens": 99}})
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1", requests, todo
        running.shutdown()


@pytest.fixture
def sample(tmp_path):
    Image.new("RGB", (5, 4), (10, 200, 30)).save(tmp_path / "0.png")
    return {"folder": str(tmp_path), "image": "0.png", "question": "How many? Briefly.",
            "after": " Briefly.", "wave": np.linspace(-0.5, 0.5, 800, dtype=np.float32)}


def answer(url, sample, form):
    """The server's answers to a sample, and the remarks on them."""
    subject = endpoint.server_subject(SimpleNamespace(endpoint=url, model="omni", batch=2))
    return subject.answer([sample] * 2, (form,), 7)


@pytest.mark.parametrize("heard", ["input_audio", "audio_url"])
def test_a_question_is_sent_with_its_picture_and_its_speech_as_the_server_hears_it(
        server, sample, heard):
    url, requests, todo = server
    assert sorted(answer(url, sample, "text")["text"]) == ["answer 1", "answer 2"]
    todo += [lambda kinds: {"heard": (heard,)}]
    answer(url, sample, "audio")
    written, spoken = requests[0], requests[-1]
    assert (written["model"], written["temperature"], written["max_tokens"]) == ("omni", 0, 7)
    picture, text = written["messages"][0]["content"]
    kind, _, code = picture["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64" and text["text"] == sample["question"]
    assert Image.open(io.BytesIO(base64.b64decode(code))).getpixel((4, 3)) == (10, 200, 30)

    _, speech, after = spoken["messages"][0]["content"]
    assert speech["type"] == heard and after["text"] == "Briefly."
    code = (speech[heard].get("data") or speech[heard]["url"]).rpartition(",")[2]
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(code)), dtype="float32")
    assert rate == SAMPLE_RATE and np.abs(wave - sample["wave"]).max() < 1e-4


@pytest.mark.parametrize("form, deed, message", [
    ("text", [401], "401"), ("text", [lambda _: {"content": ["a"]}], "AttributeError"),
    ("audio", [lambda _: {"heard": ()}], "does not hear: 57 prompt tokens with input_audio"),
    ("audio", [lambda kinds: 422 if len(kinds) > 2 else 200], "does not hear.*422.*422")])
def test_a_failure_is_one_line(server, sample, form, deed, message):
    url, requests, todo = server
    todo += deed
    with pytest.raises(BadInput, match=message) as error:
        answer(url, sample, form)
    assert url in str(error.value) and "\n" not in str(error.value) and len(requests) < 4


def test_a_server_stands_in_the_table_goes_on_after_a_failure_and_is_asked_once(server, tmp_path):
    url, requests, todo = server
    (tmp_path / "tsv").mkdir()
    write_benchmarks(tmp_path / "tsv")
    prepare("tsv", "MME", cwd=tmp_path)
    command = ["eval.py", "--endpoint", url, "--model", "some/omni", "--bench", "MME", "--batch", 1]
    todo += [200, 200, 503, 200, 200, 200, 200, 400]  # tests, two rows, one of them asked again
    failed = run_here(*command, cwd=tmp_path)
    assert failed.returncode == 1 and "400" in failed.stderr and len(requests) == 8

    # Two rows are left. An answer is empty, another one cut: both are counted, each time.
    todo += [200, 200, {"content": None}, {"end": "length"}]
    outputs = [run_here(*command, cwd=tmp_path) for _ in range(2)]
    assert len(requests) == 8 + 2 + 4, [done.stderr for done in outputs]
    assert outputs[0].stdout.splitlines()[1:] == outputs[1].stdout.splitlines()
    assert "some/omni, audio" in outputs[0].stdout
    assert "text: 1 of 4 answers are empty (stop)" in outputs[1].stdout
    lines = read_lines(tmp_path / "runs/endpoint/some_omni/answers-bench-MME.jsonl")
    remarks = [line[f"{form} remark"] for line in lines for form in ("text", "audio")]
    assert sorted(filter(None, remarks)) == ["are empty (stop)", "end by length"]


@pytest.mark.parametrize("options, message", [
    ((), "--endpoint needs --model"), (("--model", "SFT"), "a run has this name, too")])
def test_a_server_without_a_name_of_its_own_is_refused(tmp_path, options, message):
    save_runs(tmp_path, "sft", "vision-audio")
    done = run_here("eval.py", "sft", "--bench", "MME", "--endpoint", "http://x", *options,
                    cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
