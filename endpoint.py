"""Any omnimodal model as a subject: one that answers behind an OpenAI-compatible chat server.

    python eval.py --endpoint http://localhost:8000/v1 --model Qwen/Qwen2.5-Omni-7B --bench TSV ...

The same pictures, questions and speech that a run of this project is given go to the server, a picture and a text, or a
picture and a WAV, in one user message; its answers are scored alike. A key is read from OPENAI_API_KEY, if it is set.
There is nothing to run here; `python -m pytest tests/test_endpoint.py` plays a server on this machine.
"""

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request

import soundfile

from data import SAMPLE_RATE
from faults import BadInput

TRIES = 5  # a request, the first included
WAIT = 1.0  # seconds before the second try, doubled each time
TIMEOUT = 120  # seconds for one answer


def encoded(write):
    """What `write(file)` writes, as base64 text."""
    file = io.BytesIO()
    write(file)
    return base64.b64encode(file.getvalue()).decode()


def message(sample, form):
    """The user message for one sample: its picture, then the question as text, or as speech with what follows it.

    sample  {"image" PIL image, "question" the whole prompt, "wave" (samples,), "after" text that follows the speech}
    """
    content = []
    if "image" in sample:
        png = encoded(lambda file: sample["image"].save(file, format="PNG"))
        content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}})
    if form == "text":
        content.append({"type": "text", "text": sample["question"]})
    else:
        wav = encoded(lambda file: soundfile.write(file, sample["wave"], SAMPLE_RATE, format="WAV", subtype="PCM_16"))
        content.append({"type": "input_audio", "input_audio": {"data": wav, "format": "wav"}})
        if sample.get("after", "").strip():
            content.append({"type": "text", "text": sample["after"].strip()})
    return {"role": "user", "content": content}


def ask(url, name, sample, form, max_new_tokens):
    """The server's answer to one question. Raises BadInput if it refuses, or fails TRIES times in a row."""
    body = {"model": name, "messages": [message(sample, form)], "temperature": 0, "max_tokens": max_new_tokens}
    headers = {"Content-Type": "application/json"}
    if os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
    if not url.startswith(("http://", "https://")):
        raise BadInput(f"{url}: an endpoint's address begins with http:// or https://")
    request = urllib.request.Request(url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers)
    for attempt in range(TRIES):
        if attempt:
            time.sleep(WAIT * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                return json.load(response)["choices"][0]["message"]["content"] or ""
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.reason}: {error.read(300).decode(errors='replace')}"
            if error.code != 429 and error.code < 500:  # asking again would not help
                break
        except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
            reason = str(error) or type(error).__name__
        except (ValueError, KeyError, IndexError, TypeError) as error:
            reason = f"no chat completion came back ({type(error).__name__}: {error})"
    raise BadInput(f"{url}: {' '.join(reason.split())[:300]} (after {attempt + 1} tries); what was answered so far is "
                   "kept, the same command goes on from there")


def answers(url, name, samples, forms, max_new_tokens):
    """What the server answers to each sample: {form: [answer, ...]}."""
    return {form: [ask(url, name, sample, form, max_new_tokens) for sample in samples] for form in forms}
