"""Any omnimodal model behind an OpenAI-compatible chat server, asked as a run is asked.

    python eval.py --endpoint http://localhost:8000/v1 --model Qwen/Qwen2.5-Omni-7B --bench TSV ...

The server gets the same pictures, questions and speech as a run of this project: a picture and a
text, or a picture and a WAV, in one user message. Its answers are scored alike. A key is read from
OPENAI_API_KEY, if that is set. `python -m pytest tests/test_endpoint.py` plays a server. Some
servers drop speech without a word: before the first spoken question, each is put to the test.

(huggingface_hub's InferenceClient would refuse a server on this machine while HF_HUB_OFFLINE is
set, and would send the hub's own token to a server that needs none.)
"""

import base64
import io
import os
import time
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool

import httpx
import soundfile

from plumbing.files import BadInput, at, one_line
from plumbing.media import SAMPLE_RATE

TRIES = 5  # of a request, the first included
WAIT = 1.0  # seconds before the second try, doubled each time
TIMEOUT = 120  # seconds for one answer

# Failures that may pass: of the network, and a body that is no chat completion (the last four).
PASSING = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError,
           ValueError, LookupError, TypeError, AttributeError)


@dataclass
class Server:
    """A model behind a chat server."""
    url: str  # of the API, .../v1
    model: str
    max_new_tokens: int
    parallel: int = 8  # requests on their way at once
    speech: str = ""  # in which form it is sent, once that is known

    def answer(self, samples, forms):
        """Returns {form: [answer, ...]}, as OLLM.answer, and {form + " remark": what is wrong}."""
        if "audio" in forms and not self.speech:
            self.speech = self.find_speech_form(samples[0])
        answers = {}
        with ThreadPool(self.parallel) as pool:
            for form in forms:
                messages = (message(sample, form, self.speech) for sample in samples)
                replies = pool.imap(self.request, messages)  # in the samples' order
                answers[form], answers[f"{form} remark"], _ = map(list, zip(*replies))
        return answers

    def find_speech_form(self, sample):
        """Returns "input_audio" (OpenAI, vLLM) or "audio_url" (SGLang): what the server hears.

        It hears if speech makes its prompt longer. One that does not count its prompt is believed.
        Raises BadInput if it hears neither.
        """
        sample, tried = {**sample, "question": "Answer.", "after": "Answer."}, []
        *_, silent = self.request(message(sample, "text"))
        for speech in ("input_audio", "audio_url"):
            try:
                *_, spoken = self.request(message(sample, "audio", speech))
            except BadInput as error:
                tried.append(str(error))
                continue
            tried.append(f"{spoken} prompt tokens with {speech}, {silent} without")
            unknown = None in (silent, spoken)
            if unknown or spoken > silent:
                print(f"{self.url}: {tried[-1]}{': it may not hear' if unknown else ''}")
                return speech
        raise BadInput(f"{self.url}: {self.model} does not hear: {'; '.join(tried)}")

    def request(self, message):
        """Returns what `read_reply` reads of the reply to one user message.

        Raises BadInput if the server refuses, or fails TRIES times in a row.
        """
        body = {"model": self.model, "messages": [message], "temperature": 0,
                "max_tokens": self.max_new_tokens}
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        for attempt in range(TRIES):
            if attempt:
                time.sleep(WAIT * 2 ** (attempt - 1))

            with at(self.url):  # an address that is none is not tried again
                try:
                    response = httpx.post(f"{self.url.rstrip('/')}/chat/completions", json=body,
                                          headers=headers, timeout=TIMEOUT)
                    if response.is_success:
                        return read_reply(response.json(), self.max_new_tokens)
                    reason = f"{response.status_code} {response.reason_phrase}: {response.text}"
                    if response.status_code != 429 and response.status_code < 500:
                        break  # a refusal
                except PASSING as error:
                    reason = f"{type(error).__name__}: {error}"
        raise BadInput(f"{self.url}: {one_line(reason, 300)} (after {attempt + 1} tries); "
                       "the answers so far are on disk, the same command goes on from there")


def message(sample, form, speech="input_audio"):
    """Returns the user message for one sample: its picture, then the question, read or spoken.

    sample: {"image": PIL image, "question": the whole prompt, "wave": (samples,), "after": text
    that follows the speech}; speech: the form in which that is sent
    """
    # Both travel as base64 text: the picture as PNG, the speech as WAV.
    png, wav = io.BytesIO(), io.BytesIO()
    sample["image"].save(png, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}]

    text = sample["question"]
    if form == "audio":
        soundfile.write(wav, sample["wave"], SAMPLE_RATE, format="WAV", subtype="PCM_16")
        code = base64.b64encode(wav.getvalue()).decode()
        forms = {"input_audio": {"data": code, "format": "wav"},
                 "audio_url": {"url": f"data:audio/wav;base64,{code}"}}
        content.append({"type": speech, speech: forms[speech]})
        text = sample["after"].strip()
    if text:
        content.append({"type": "text", "text": text})
    return {"role": "user", "content": content}


def read_reply(completion, max_new_tokens):
    """Returns an answer, what is wrong with it or None, and the prompt's tokens or None.

    completion: the server's reply, parsed JSON; max_new_tokens: how many were asked for
    """
    choice, usage = completion["choices"][0], completion.get("usage") or {}
    content, text = choice["message"].get("content"), ""
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict) and part.get("type") in ("text", "output_text"):
            part = part.get("text")
        if isinstance(part, str):
            text += part

    # Where the server does not count them, a word has at least one token.
    n_tokens = usage.get("completion_tokens") or len(text.split())
    end, remark = choice.get("finish_reason") or "stop", None
    if not text.strip():
        remark = f"without text, finish_reason {end}"
    elif n_tokens > max_new_tokens:
        remark = "longer than --max-new-tokens"
    elif end != "stop":
        remark = f"with finish_reason {end}"
    return text, remark, usage.get("prompt_tokens")
