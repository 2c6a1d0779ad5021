"""A chat server on this machine: what it is sent, and what happens when it fails."""

import base64
import http.server
import io
import json
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import soundfile
from conftest import ROOT, run_here
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
    """(its URL, what it was sent, what it shall do next: a status, a body, or seconds to wait).

    A function stays the first thing to do: it makes one of these of each request's body.
    """
    monkeypatch.setattr(endpoint, "WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    requests, todo = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, dict(self.headers), body))
            usual = (200, reply(body, f"answer {len(requests)}"))
            action = todo[0](body) if todo and callable(todo[0]) else todo.pop(0) if todo else usual
            if isinstance(action, float):
                time.sleep(action)
                action = usual
            status, text = action if isinstance(action, tuple) else (action, usual[1])
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


def kinds(body):
    """The types of the parts of a request's message."""
    return [part["type"] for part in body["messages"][0]["content"]]


def reply(body, content, end="stop", heard=("input_audio", "audio_url"), usage=True):
    """A chat completion as JSON; speech that is heard makes the prompt longer, by 23 tokens."""
    tokens = 57 + 23 * any(kind in heard for kind in kinds(body))
    counts = {"prompt_tokens": tokens, "completion_tokens": 3} if usage else None
    message = {"role": "assistant", "content": content}
    return json.dumps({"choices": [{"message": message, "finish_reason": end}], "usage": counts})


def answer(url, form="text", **changes):
    """The server's answer to the sample."""
    return endpoint.Server(url, "omni", 7).answer([{**SAMPLE, **changes}], (form,))[form][0]


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
    assert answer(url, "audio") == "answer 3"  # after two that ask whether it hears
    _, headers, body = requests[2]
    _, speech, after = body["messages"][0]["content"]
    assert headers["Authorization"] == "Bearer secret"
    assert after == {"type": "text", "text": "Answer briefly."}
    assert speech["type"] == "input_audio" and speech["input_audio"]["format"] == "wav"
    wav = io.BytesIO(base64.b64decode(speech["input_audio"]["data"]))
    wave, rate = soundfile.read(wav, dtype="float32")
    assert rate == SAMPLE_RATE and np.abs(wave - SAMPLE["wave"]).max() < 1e-4

    answer(url, "audio", after="")
    assert kinds(requests[5][2]) == ["image_url", "input_audio"]


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


def test_a_server_that_drops_speech_is_refused(server, tmp_path):
    """Its answers were scored as if it had heard: on MME, a habit of "yes" is half right."""
    url, requests, todo = server
    todo += [lambda body: (200, reply(body, "yes", heard=()))]
    write_benchmarks(tmp_path)
    done = run_here("eval.py", "--endpoint", url, "--model", "deaf", "--bench", "MME.tsv",
                    cwd=tmp_path)
    error, = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and "deaf does not hear: 57 prompt tokens with input_audio" in error
    assert [kinds(body)[1] for *_, body in requests] == ["text", "input_audio", "audio_url"]
    assert not list(tmp_path.rglob("predictions/*.jsonl"))


def test_a_server_that_tells_no_tokens_is_believed_and_that_is_said(server, capsys):
    url, _, todo = server
    todo += [lambda body: (200, reply(body, "yes", usage=False))]
    assert answer(url, "audio") == "yes"
    assert "it may not hear" in capsys.readouterr().out


@pytest.mark.parametrize("other", [(400, "no"), (422, "{}"), (415, ""), None])
def test_a_server_that_wants_speech_as_audio_url_gets_it(server, other):
    """SGLang's form. None: it takes OpenAI's form, too, but drops what is in it."""
    url, requests, todo = server

    def act(body):
        if other and "input_audio" in kinds(body):
            return other
        return 200, reply(body, "yes", heard=("audio_url",))

    todo += [act]
    one = endpoint.Server(url, "omni", 7)
    for _ in range(2):
        assert one.answer([SAMPLE] * 2, ("text", "audio"))["audio"] == ["yes", "yes"]
    sent = [kinds(body) for *_, body in requests]
    assert sent[:3] == [["image_url", "text"], ["image_url", "input_audio", "text"],
                        ["image_url", "audio_url", "text"]]
    assert sum("input_audio" in parts for parts in sent) == 1, "it stays with the other"
    _, speech, after = requests[-1][2]["messages"][0]["content"]
    kind, _, code = speech["audio_url"]["url"].partition(",")
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(code)), dtype="float32")
    assert kind == "data:audio/wav;base64" and rate == SAMPLE_RATE and len(wave) == 800
    assert after["text"] == "Answer briefly."


def test_a_server_that_takes_speech_in_no_form_says_why(server):
    url, requests, todo = server
    todo += [lambda body: (422, f"no {kinds(body)[1]}\nhere") if len(kinds(body)) > 2 else 200]
    with pytest.raises(BadInput, match="does not hear.*no input_audio.*no audio_url") as error:
        answer(url, "audio")
    assert len(requests) == 3 and "\n" not in str(error.value)
    assert answer(url) == "answer 4", "it still reads"


TEXT = {"type": "text", "text": "a red "}


@pytest.mark.parametrize("choice, usage, text, remark", [
    ({"message": {"content": "red"}}, None, "red", None),
    ({"message": {"content": [TEXT, {"type": "text", "text": "star"}]}}, {}, "a red star", None),
    ({"message": {"content": [{"type": "reasoning", "text": "hm"}, TEXT]}}, None, "a red ", None),
    ({"message": {"content": "red"}, "finish_reason": None}, None, "red", None),
    ({"message": {"content": None}, "finish_reason": "length"}, None, "",
     "without text, finish_reason length"),
    ({"message": {"role": "assistant"}, "finish_reason": "stop"}, None, "",
     "without text, finish_reason stop"),
    ({"message": {"content": None, "refusal": "I will not"}}, None, "",
     "without text, finish_reason stop"),
    *(({"message": {"content": content}}, None, text, "without text, finish_reason stop")
      for content, text in (("", ""), (" \n", " \n"), (7, ""), (True, ""), ([], ""), ({}, ""),
                            ([{"type": "refusal", "refusal": "no"}], ""),
                            ([{"type": "text", "text": None}, 3], ""))),
    ({"message": {"content": "a long"}, "finish_reason": "length"}, None, "a long",
     "with finish_reason length"),
    ({"message": {"content": "a"}, "finish_reason": "content_filter"}, None, "a",
     "with finish_reason content_filter"),
    ({"message": {"content": "w " * 8}, "finish_reason": "stop"}, None, "w " * 8,
     "longer than --max-new-tokens"),
    ({"message": {"content": "red"}, "finish_reason": "length"}, {"completion_tokens": 1024}, "red",
     "longer than --max-new-tokens")])
def test_what_is_no_whole_answer_is_remarked(choice, usage, text, remark):
    completion = {"choices": [choice], "usage": usage}
    assert endpoint.read_reply(completion, 7) == (text, remark, None)


def test_answers_that_are_none_stand_in_the_table_and_in_that_of_a_resumed_run(server, tmp_path):
    """They were kept as "" and scored 0, and nobody was told."""
    url, requests, todo = server

    def act(body):
        contents = {"Is it red? ": None, "Is it blue? ": "blue " * 9}
        asked = str(body["messages"][0]["content"])
        content = next((contents[key] for key in contents if key in asked), "no")
        return 200, reply(body, content, "stop" if content else "length")

    todo += [act]
    write_benchmarks(tmp_path)
    command = ["eval.py", "--endpoint", url, "--model", "omni", "--bench", "MME.tsv",
               "--max-new-tokens", 2]
    done = run_here(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if "how many" in line]
    told = {cells[1].strip(): [cell.strip() for cell in cells[2:4]] for cells in rows}
    assert told == {
        "MME: answers without text, finish_reason length (how many)": ["1.0", ""],
        "MME: answers longer than --max-new-tokens (how many)": ["3.0", "4.0"]}
    asked = len(requests)
    again = run_here(*command, cwd=tmp_path)
    assert len(requests) == asked == 2 + 8
    assert [line for line in again.stdout.splitlines() if "how many" in line] == [
        line for line in done.stdout.splitlines() if "how many" in line]
    result = json.loads((tmp_path / "runs/report/benchmarks.json").read_text())["runs"]["omni"]
    assert result["audio"]["MME"]["remarks"] == {"answers longer than --max-new-tokens": 4}


def test_several_questions_are_on_their_way_at_once_and_answers_are_in_order(server):
    url, requests, todo = server
    now, most = [], []

    def act(body):
        now.append(body)
        most.append(len(now))
        number = int(body["messages"][0]["content"][1]["text"])
        time.sleep(0.3 - 0.03 * number)  # the first take longest
        now.remove(body)
        return 200, reply(body, f"answer {number}")

    todo += [act]
    samples = [{**SAMPLE, "question": str(number)} for number in range(8)]
    answers = endpoint.Server(url, "omni", 7, parallel=4).answer(samples, ("text",))["text"]
    assert answers == [f"answer {number}" for number in range(8)]
    assert max(most) == 4


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_a_server_that_hangs(server, tmp_path):
    url, requests, todo = server
    todo += [lambda body: 30.0]
    write_benchmarks(tmp_path)
    command = [sys.executable, ROOT / "eval.py", "--endpoint", url, "--model", "omni", "--bench",
               "MME.tsv"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not requests:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130 and errors.splitlines()[-1].startswith("interrupted; the same")


def test_a_server_s_model_stands_in_the_table_and_goes_on_after_a_failure(server, tmp_path,
                                                                          monkeypatch):
    url, requests, todo = server
    monkeypatch.setattr(endpoint, "TRIES", 1)
    write_benchmarks(tmp_path)
    command = ["eval.py", "--endpoint", url, "--model", "some/omni", "--batch", 1,
               "--bench", "MME.tsv", "ChartQA_TEST.tsv"]
    todo += [200] * 6 + [500]  # does it hear, the answers to two rows, then a failure
    stopped = run_here(*command, cwd=tmp_path)
    assert stopped.returncode == 1 and url in stopped.stderr and len(requests) == 7
    requests.clear()

    done = run_here(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "some/omni, audio" in done.stdout and "CQA^H" in done.stdout
    # Does it hear? Then MME's other two rows and ChartQA's three, each in writing and aloud.
    assert len(requests) == 2 + 4 + 6
    assert len(list((tmp_path / "runs/endpoint/some-omni/predictions").glob("*.jsonl"))) == 2

    # The folder is another model's, too: its answers are not taken for that one's.
    other = run_here(*[part.replace("/", "-") if part == "some/omni" else part for part in command],
                     cwd=tmp_path)
    assert other.returncode == 1 and "another model" in other.stderr and len(requests) == 12
