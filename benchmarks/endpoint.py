"""Any omnimodal model behind an OpenAI-compatible chat server, asked as a run is asked.

    python eval.py --endpoint http://localhost:8000/v1 --model Qwen/Qwen2.5-Omni-7B --bench MME

The server gets what a run gets: a picture and a text, or a picture and a WAV, in one user message.
Some servers drop speech silently, so each is tested before its first spoken question.
"""

import io
import mimetypes
import os
from base64 import b64encode
from multiprocessing.pool import ThreadPool
from pathlib import Path

import soundfile

from plumbing.answers import Subject
from plumbing.files import BadInput, at
from plumbing.media import SAMPLE_RATE


def server_subject(args):
    """Returns the Subject of the server's model. Raises BadInput without OpenAI's client."""
    try:
        from openai import OpenAI  # an optional package
    except ImportError as error:
        raise BadInput("--endpoint needs OpenAI's client: pip install openai") from error
    client = OpenAI(base_url=args.endpoint, api_key=os.environ.get("OPENAI_API_KEY") or "none",
                    max_retries=4, timeout=120)  # seconds for one answer
    parallel, speech_forms = args.batch or 8, []

    def request(content, max_new_tokens=8):
        """Returns (answer, what is wrong with it or None, the prompt's tokens or None)."""
        with at(args.endpoint):
            reply = client.chat.completions.create(
                model=args.model, messages=[{"role": "user", "content": content}], temperature=0,
                max_tokens=max_new_tokens)
            text, end = reply.choices[0].message.content or "", reply.choices[0].finish_reason
            remark = f"end by {end}" if text.strip() else f"are empty ({end})"
            is_whole = text.strip() and end in ("stop", None)
            return text, None if is_whole else remark, reply.usage and reply.usage.prompt_tokens

    def answer(samples, forms, max_new_tokens):
        if "audio" in forms and not speech_forms:
            speech_forms.append(find_speech_form(request, samples[0], args))
        answers = {}
        with ThreadPool(parallel) as pool:
            for form in forms:
                contents = [message(sample, form, *speech_forms) for sample in samples]
                replies = pool.starmap(request, [(c, max_new_tokens) for c in contents])
                answers[form], answers[f"{form} remark"], _ = map(list, zip(*replies))
        return answers

    folder = Path("runs/endpoint", args.model.replace("/", "_"))
    return Subject(args.model, folder, answer, ("text", "audio"), args.model, parallel)


def find_speech_form(request, sample, args):
    """Returns "input_audio" (OpenAI, vLLM) or "audio_url" (SGLang): what makes a prompt longer."""
    sample, tried = {**sample, "question": "Answer.", "after": "Answer."}, []
    *_, silent = request(message(sample, "text"))
    for speech in ("input_audio", "audio_url"):
        try:
            *_, spoken = request(message(sample, "audio", speech))
            tried.append(f"{spoken} prompt tokens with {speech}, {silent} without")
            if None in (silent, spoken) or spoken > silent:  # one that does not count is believed
                print(f"{args.model}: {tried[-1]}")
                return speech
        except BadInput as error:
            tried.append(str(error))
    raise BadInput(f"{args.endpoint}: {args.model} does not hear: {'; '.join(tried)}")


def message(sample, form, speech="input_audio"):
    """Returns a user message's content: the picture, then the question, read or spoken."""
    content, text = [], sample.get("question")
    if "image" in sample:
        path = Path(sample["folder"]) / sample["image"]
        url = f"data:{mimetypes.guess_type(path)[0]};base64,{b64encode(path.read_bytes()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    if form == "audio":
        wav = io.BytesIO()
        soundfile.write(wav, sample["wave"], SAMPLE_RATE, format="WAV", subtype="PCM_16")
        code = b64encode(wav.getvalue()).decode()
        sent = {"input_audio": {"data": code, "format": "wav"},
                "audio_url": {"url": f"data:audio/wav;base64,{code}"}}
        content.append({"type": speech, speech: sent[speech]})
        text = sample.get("after", "") if "question" in sample else "Transcribe the speech."
    return content + [{"type": "text", "text": text.strip()}] * bool(text.strip())
