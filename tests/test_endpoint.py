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
from PIL import Image

import endpoint
from conftest import run_here
from data import SAMPLE_RATE, BadInput
from test_bench_tsv import write_benchmarks

SAMPLE = {"image": Image.new("RGB", (5, 4), (10, 200, 30)), "question": "How many? Answer briefly.",
          "wave": np.linspace(-0.5, 0.5, 800, dtype=np.float32), "after": "\nAnswer briefly."}


@pytest.fixture
def server(monkeypatch):
    """(its URL, what it was sent, a list of what it shall do next: a status, a body, or seconds to wait)."""
    monkeypatch.setattr(endpoint, "WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    seen, todo = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, dict(self.headers), body))
            action = todo.pop(0) if todo else 200
            if isinstance(action, float):
                time.sleep(action)
            status, text = action if isinstance(action, tuple) else (action if isinstance(action, int) else 200, None)
            answer = text or json.dumps({"choices": [{"message": {"content": f"answer {len(seen)}"}}]})
            try:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(answer.encode())
            except OSError:  # whoever asked has given up
                pass

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1", seen, todo
        running.shutdown()


def test_a_text_question_is_sent_with_its_picture(server):
    url, seen, _ = server
    assert endpoint.answers(url, "omni", [SAMPLE], ("text",), 7) == {"text": ["answer 1"]}
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("omni", 0, 7)
    (message,) = body["messages"]
    picture, text = message["content"]
    assert message["role"] == "user" and text == {"type": "text", "text": SAMPLE["question"]}
    kind, _, code = picture["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(code))).getpixel((4, 3)) == (10, 200, 30)


def test_a_spoken_question_is_sent_as_wav_with_what_follows_it(server, monkeypatch):
    url, seen, _ = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    endpoint.answers(url, "omni", [SAMPLE], ("audio",), 7)
    _, speech, after = seen[0][2]["messages"][0]["content"]
    assert seen[0][1]["Authorization"] == "Bearer secret"
    assert after == {"type": "text", "text": "Answer briefly."} and speech["input_audio"]["format"] == "wav"
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(speech["input_audio"]["data"])), dtype="float32")
    assert rate == SAMPLE_RATE and np.abs(wave - SAMPLE["wave"]).max() < 1e-4
    endpoint.answers(url, "omni", [{**SAMPLE, "after": ""}], ("audio",), 7)
    assert [part["type"] for part in seen[1][2]["messages"][0]["content"]] == ["image_url", "input_audio"]


@pytest.mark.parametrize("failure", [429, 500, 503, (200, "not JSON"), (200, '{"choices": []}'), (200, "[1]")])
def test_a_failure_that_may_pass_is_asked_again(server, failure):
    url, seen, todo = server
    todo += [failure, failure]
    assert endpoint.ask(url, "omni", SAMPLE, "text", 7) == "answer 3" and len(seen) == 3
    todo += [failure] * endpoint.TRIES
    with pytest.raises(BadInput, match="goes on from there"):
        endpoint.ask(url, "omni", SAMPLE, "text", 7)
    assert len(seen) == 3 + endpoint.TRIES


def test_a_refusal_is_not_asked_again(server):
    url, seen, todo = server
    todo += [(401, "no such\nkey")]
    with pytest.raises(BadInput, match="401.*no such key") as error:
        endpoint.ask(url, "omni", SAMPLE, "text", 7)
    assert len(seen) == 1 and "\n" not in str(error.value)


def test_a_server_that_hangs_or_is_not_there(server, monkeypatch):
    url, seen, todo = server
    monkeypatch.setattr(endpoint, "TIMEOUT", 0.2)
    todo += [1.0]
    assert endpoint.ask(url, "omni", SAMPLE, "text", 7) == "answer 2"
    monkeypatch.setattr(endpoint, "TRIES", 2)
    with pytest.raises(BadInput, match="after 2 tries"):
        endpoint.ask("http://127.0.0.1:1/v1", "omni", SAMPLE, "text", 7)


def test_a_server_s_model_stands_in_the_table_and_goes_on_after_a_failure(server, tmp_path, monkeypatch):
    url, seen, todo = server
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(endpoint, "TRIES", 1)
    write_benchmarks(tmp_path)
    command = ["eval.py", "--endpoint", url, "--model", "some/omni", "--batch", 2, "--bench", "MME.tsv",
               "ChartQA_TEST.tsv"]
    todo += [200] * 4 + [500]  # the first batch's four answers, then a failure
    stopped = run_here(*command, cwd=tmp_path)
    assert stopped.returncode == 1 and "goes on from there" in stopped.stderr and len(seen) == 5
    done = run_here(*command, cwd=tmp_path)
    assert done.returncode == 0 and "some/omni, audio" in done.stdout and "CQA^H" in done.stdout, done.stderr
    assert len(seen) == 5 + 4 + 6, "MME's second batch and ChartQA's three rows, each in writing and aloud"
    assert len(list((tmp_path / "runs/endpoint/some-omni/predictions").glob("*.jsonl"))) == 2
