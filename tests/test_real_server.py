"""A real chat server with a tiny model of a real class: it answers as the class in this process.

    python -m pytest -m slow tests/test_real_server.py    # needs transformers[serving],
                                                          # accelerate, librosa, torchvision

The server is `transformers serve`, the model a Qwen2.5-Omni with random weights.
"""

import json
import os
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
import torch
from conftest import build_qwen2_vl, run_here, write_tokenizer
from PIL import Image
from test_bench_tsv import write_benchmarks

from benchmarks import endpoint
from plumbing.files import BadInput
from plumbing.media import load_audio

pytestmark = pytest.mark.slow
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>",
          "<|audio_eos|>", "<|IMAGE|>", "<|VIDEO|>", "<|vision_bos|>", "<|vision_eos|>"]
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}{% if part.type == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>\
{% elif part.type == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
"""


def build_qwen2_5_omni(folder):
    """A tiny Qwen2.5-Omni with random weights, and its processor."""
    from transformers import (
        Qwen2_5OmniConfig,
        Qwen2_5OmniForConditionalGeneration,
        Qwen2_5OmniProcessor,
        Qwen2TokenizerFast,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        WhisperFeatureExtractor,
    )
    folder.mkdir()
    ids = {token: 185 + i for i, token in enumerate(TOKENS)}
    write_tokenizer(folder, ids)
    names = {"image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
             "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
             "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder, extra_special_tokens=names)
    Qwen2_5OmniProcessor(Qwen2VLImageProcessor(), Qwen2VLVideoProcessor(),
                         WhisperFeatureExtractor(feature_size=128), tokenizer,
                         chat_template=TEMPLATE).save_pretrained(folder)

    text = {"vocab_size": 199, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                                "mrope_section": [2, 3, 3]}}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
              "out_hidden_size": 64, "fullatt_block_indexes": [1], "initializer_range": 0.3}
    audio = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
             "d_model": 32, "output_dim": 64, "initializer_range": 0.3}
    thinker = {"text_config": text, "vision_config": vision, "audio_config": audio,
               "audio_token_index": ids["<|AUDIO|>"], "image_token_index": ids["<|IMAGE|>"],
               "video_token_index": ids["<|VIDEO|>"], "initializer_range": 0.3,
               "audio_start_token_id": ids["<|audio_bos|>"],
               "audio_end_token_id": ids["<|audio_eos|>"],
               "vision_start_token_id": ids["<|vision_bos|>"],
               "vision_end_token_id": ids["<|vision_eos|>"]}
    # It is not asked to speak, but transformers' class wants what it would speak with.
    talker = {**text, "embedding_size": 64, "head_dim": 16, "vocab_size": 8448}
    speaker = {"dit_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                              "head_dim": 16, "emb_dim": 16, "enc_emb_dim": 8, "enc_dim": 8,
                              "enc_channels": [8, 8, 8, 8, 24], "enc_attention_channels": 8,
                              "enc_se_channels": 8, "look_ahead_layers": [0],
                              "look_backward_layers": [0]},
               "bigvgan_config": {"upsample_initial_channel": 64}}
    torch.manual_seed(0)
    config = Qwen2_5OmniConfig(thinker_config=thinker, talker_config=talker,
                               token2wav_config=speaker)
    model = Qwen2_5OmniForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.save_pretrained(folder)
    torch.save({"Chelsie": {}}, folder / "spk_dict.pt")  # without which it is not read
    return folder


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """A function that starts `transformers serve` for a model's folder, and returns its URL."""
    for package in ("fastapi", "uvicorn", "openai", "accelerate", "librosa", "torchvision"):
        pytest.importorskip(package, reason=f"transformers serve needs {package}")
    servers = []

    def start(folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder,
                   "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        with open(folder / "server.log", "w") as log:
            servers.append(subprocess.Popen(command, stdout=log, stderr=log, env={
                **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}))
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert servers[-1].poll() is None, (folder / "server.log").read_text()[-3000:]
            try:
                if httpx.get(f"{url}/health").is_success:
                    return f"{url}/v1"
            except httpx.TransportError:
                time.sleep(0.2)
        pytest.fail("the server does not start")

    yield start
    for server in servers:
        server.terminate()
        server.wait()


def in_process(folder, parts):
    """What the class itself answers to a user message, greedily; the server's limit of tokens."""
    from transformers import AutoModelForMultimodalLM, AutoProcessor
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForMultimodalLM.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, generation_config=model.generation_config, do_sample=False,
                             generation_mode="text", thinker_max_new_tokens=1024)
    return processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def test_transformers_serve_answers_as_the_class_in_this_process(serve, tmp_path):
    folder = build_qwen2_5_omni(tmp_path / "omni")
    url = serve(folder)
    (tmp_path / "tsv").mkdir()
    write_benchmarks(tmp_path / "tsv")
    done = run_here("eval.py", "--endpoint", url, "--model", folder, "--bench",
                    tmp_path / "tsv/DocVQA_VAL.tsv", "--max-new-tokens", 8, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    kept, = (tmp_path / "runs/endpoint").rglob("predictions/*.jsonl")
    line = json.loads(kept.read_text())

    # The same picture and speech: PNG and 16-bit WAV lose nothing.
    image = Image.new("RGB", (90, 60), "blue")
    question = "what?\nAnswer the question using a single word or phrase."
    wave = load_audio(next((tmp_path / "runs/speech").iterdir()))
    picture = {"type": "image", "image": image}
    text = in_process(folder, [picture, {"type": "text", "text": question}])
    audio = in_process(folder, [picture, {"type": "audio", "audio": wave}])
    assert (line["text"], line["audio"]) == (text, audio) and text != audio

    # It does not mind how many tokens are asked for, which is told.
    assert "DocVQA_VAL: answers longer than --max-new-tokens (how many)" in done.stdout

    # Speech as a data URI is the same speech.
    other = endpoint.Server(url, str(folder), 8, speech="audio_url")
    sample = {"image": image, "question": question, "wave": wave, "after": ""}
    assert other.answer([sample], ("audio",))["audio"] == [audio]


def test_transformers_serve_drops_speech_for_a_model_that_only_sees(serve, tmp_path):
    """Status 200, and as many prompt tokens with the speech as without."""
    from transformers import (
        AutoModelForImageTextToText,
        Qwen2TokenizerFast,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )
    published = build_qwen2_vl(tmp_path)
    folder = tmp_path / "sees"
    AutoModelForImageTextToText.from_pretrained(published).save_pretrained(folder)
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = Qwen2TokenizerFast.from_pretrained(published, extra_special_tokens=names)
    template = TEMPLATE.replace("<|vision_bos|><|IMAGE|><|vision_eos|>",
                                "<|vision_start|><|image_pad|><|vision_end|>")
    template = template.replace("<|audio_bos|><|AUDIO|><|audio_eos|>", "")  # as Qwen2-VL's own
    Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(),
                     chat_template=template).save_pretrained(folder)
    server = endpoint.Server(serve(folder), str(folder), 8)
    sample = {"image": Image.new("RGB", (56, 56)), "question": "what", "after": "",
              "wave": np.linspace(-0.5, 0.5, 16000, dtype=np.float32)}
    assert server.answer([sample], ("text",))["text"][0]
    with pytest.raises(BadInput, match="does not hear") as error:
        server.answer([sample], ("audio",))
    print(error.value)
