"""A chat server on this machine: what it is sent, and what happens when it fails."""

import base64
import http.server
import io
import json
import threading
import time

import numpy as np
import pytest
import soundfile
from conftest import run_here
from PIL import Image
from test_bench_tsv import write_benchmarks

from benchmarks import endpoint
from plumbing.files import BadInput
from plumbing.media import SAMPLE_RATE

SAMPLE = {"image": Image.new("RGB", (5, 4), (10, 200, 30)),
          "question": "How many? Answer briefly.", "after": "\nAnswer briefly.",
          "wave": np.linspace(-0.5, 0.5, 800, dtype=np.float32)}


@pytest.fixture
def server(monkeypatch):
    """(its URL, what it was sent, what it shall do next: a status, a body, or seconds to wait)."""
    monkeypatch.setattr(endpoint, "WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    requests, todo = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, dict(self.headers), body))
            action = todo.pop(0) if todo else 200
            if isinstance(action, float):
                time.sleep(action)
                action = 200
            usual = {"choices": [{"message": {"content": f"answer {len(requests)}"}}]}
            status, text = action if isinstance(action, tuple) else (action, json.dumps(usual))
            try:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:  # whoever asked has given up
                pass

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1", requests, todo
        running.shutdown()


def answer(url, form="text", **changes):
    """The server's answer to the sample."""
    return endpoint.answer(url, "omni", [{**SAMPLE, **changes}], (form,), 7)[form][0]


def test_a_text_question_is_sent_with_its_picture(server):
    url, requests, _ = server
    assert answer(url) == "answer 1"
    path, headers, body = requests[0]
    assert path == "/v1/chat/completions" and "authorization" not in map(str.lower, headers)
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("omni", 0, 7)
    (message,) = body["messages"]
    picture, text = message["content"]
    assert message["role"] == "user" and text == {"type": "text", "text": SAMPLE["question"]}
    kind, _, code = picture["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(code))).getpixel((4, 3)) == (10, 200, 30)


def test_a_spoken_question_is_sent_as_wav_with_what_follows_it(server, monkeypatch):
    url, requests, _ = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert answer(url, "audio") == "answer 1"
    _, headers, body = requests[0]
    _, speech, after = body["messages"][0]["content"]
    assert headers["Authorization"] == "Bearer secret"
    assert after == {"type": "text", "text": "Answer briefly."}
    assert speech["type"] == "input_audio" and speech["input_audio"]["format"] == "wav"
    wav = io.BytesIO(base64.b64decode(speech["input_audio"]["data"]))
    wave, rate = soundfile.read(wav, dtype="float32")
    assert rate == SAMPLE_RATE and np.abs(wave - SAMPLE["wave"]).max() < 1e-4

    answer(url, "audio", after="")
    content = requests[1][2]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "input_audio"]


@pytest.mark.parametrize("failure", [429, 500, 503, (200, "not JSON"), (200, '{"choices": []}'),
                                     (200, "[1]")])
def test_a_failure_that_may_pass_is_asked_again(server, failure):
    url, requests, todo = server
    todo += [failure, failure]
    assert answer(url) == "answer 3" and len(requests) == 3
    todo += [failure] * endpoint.TRIES
    with pytest.raises(BadInput):
        answer(url)
    assert len(requests) == 3 + endpoint.TRIES


def test_a_refusal_is_not_asked_again(server):
    url, requests, todo = server
    todo += [(401, "no such\nkey")]
    with pytest.raises(BadInput, match="401.*no such key") as error:
        answer(url)
    assert len(requests) == 1 and "\n" not in str(error.value)


def test_a_server_that_hangs_or_is_not_there(server, monkeypatch):
    url, requests, todo = server
    monkeypatch.setattr(endpoint, "TIMEOUT", 0.2)
    todo += [1.0]
    assert answer(url) == "answer 2"
    monkeypatch.setattr(endpoint, "TRIES", 2)
    with pytest.raises(BadInput, match="after 2 tries"):
        answer("http://127.0.0.1:1/v1")


@pytest.mark.parametrize("url", ["localhost:1", "file:///etc/hosts", "nowhere", ""])
def test_an_address_that_is_none_is_not_tried_again(url, monkeypatch):
    monkeypatch.setattr(endpoint, "WAIT", 1000)
    with pytest.raises(BadInput):
        answer(url)


def test_a_server_s_model_stands_in_the_table_and_goes_on_after_a_failure(server, tmp_path,
                                                                          monkeypatch):
    url, requests, todo = server
    monkeypatch.setattr(endpoint, "TRIES", 1)
    write_benchmarks(tmp_path)
    command = ["eval.py", "--endpoint", url, "--model", "some/omni", "--batch", 2,
               "--bench", "MME.tsv", "ChartQA_TEST.tsv"]
    todo += [200] * 4 + [500]  # the first batch's four answers, then a failure
    stopped = run_here(*command, cwd=tmp_path)
    assert stopped.returncode == 1 and url in stopped.stderr and len(requests) == 5

    done = run_here(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "some/omni, audio" in done.stdout and "CQA^H" in done.stdout
    # MME's second batch and ChartQA's three rows, each in writing and aloud.
    assert len(requests) == 5 + 4 + 6
    assert len(list((tmp_path / "runs/endpoint/some-omni/predictions").glob("*.jsonl"))) == 2
