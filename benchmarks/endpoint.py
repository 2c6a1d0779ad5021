"""Any omnimodal model behind an OpenAI-compatible chat server, asked as a run is asked.

    python eval.py --endpoint http://localhost:8000/v1 --model Qwen/Qwen2.5-Omni-7B --bench TSV ...

The server gets the same pictures, questions and speech as a run of this project: a picture and a
text, or a picture and a WAV, in one user message. Its answers are scored alike. A key is read from
OPENAI_API_KEY, if that is set. `python -m pytest tests/test_endpoint.py` plays a server.

(huggingface_hub's InferenceClient would refuse a server on this machine while HF_HUB_OFFLINE is
set, and would send the hub's own token to a server that needs none.)
"""

import base64
import io
import os
import time

import httpx
import soundfile

from plumbing.files import BadInput, at, one_line
from plumbing.media import SAMPLE_RATE

TRIES = 5  # of a request, the first included
WAIT = 1.0  # seconds before the second try, doubled each time
TIMEOUT = 120  # seconds for one answer

# Failures that may pass: of the network, and a body that is no chat completion (the last three).
PASSING = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError,
           ValueError, LookupError, TypeError)


def answer(url, model, samples, forms, max_new_tokens):
    """Returns a server's answers to a list of samples: {form: [answer, ...]}, as OLLM.answer."""
    answers = {}
    for form in forms:
        messages = [message(sample, form) for sample in samples]
        answers[form] = [request_answer(url, model, one, max_new_tokens) for one in messages]
    return answers


def message(sample, form):
    """Returns the user message for one sample: its picture, then the question, read or spoken.

    sample: {"image": PIL image, "question": the whole prompt, "wave": (samples,), "after": text
    that follows the speech}
    """
    # Both travel as base64 text: the picture as PNG, the speech as WAV.
    png, wav = io.BytesIO(), io.BytesIO()
    sample["image"].save(png, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}]

    text = sample["question"]
    if form == "audio":
        soundfile.write(wav, sample["wave"], SAMPLE_RATE, format="WAV", subtype="PCM_16")
        speech = {"data": base64.b64encode(wav.getvalue()).decode(), "format": "wav"}
        content.append({"type": "input_audio", "input_audio": speech})
        text = sample["after"].strip()
    if text:
        content.append({"type": "text", "text": text})
    return {"role": "user", "content": content}


def request_answer(url, model, message, max_new_tokens):
    """Returns a server's answer to one user message.

    Raises BadInput if the server refuses, or fails TRIES times in a row.
    """
    body = {"model": model, "messages": [message], "temperature": 0, "max_tokens": max_new_tokens}
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for attempt in range(TRIES):
        if attempt:
            time.sleep(WAIT * 2 ** (attempt - 1))

        with at(url):  # an address that is none is not tried again
            try:
                response = httpx.post(f"{url.rstrip('/')}/chat/completions", json=body,
                                      headers=headers, timeout=TIMEOUT)
                if response.is_success:
                    return response.json()["choices"][0]["message"]["content"] or ""
                reason = f"{response.status_code} {response.reason_phrase}: {response.text}"
                if response.status_code != 429 and response.status_code < 500:
                    break  # a refusal
            except PASSING as error:
                reason = f"{type(error).__name__}: {error}"
    raise BadInput(f"{url}: {one_line(reason, 300)} (after {attempt + 1} tries); "
                   "the answers so far are on disk, the same command goes on from there")
