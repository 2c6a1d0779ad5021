"""Stand-ins of true size with random weights, in the layouts that the real ones are published in.

    python tests/true_size.py FOLDER    # InternVL2-1B (1.9 GB), Whisper-large-v3's encoder (1.3 GB)

`build_qwen2_vl` makes Qwen2-VL-2B (4.4 GB), for `python -m pytest -m slow tests/test_families.py`.

They show that loading and a training step take a real checkpoint's shapes, in what time and memory.
They know nothing.
"""

import json
import sys
from pathlib import Path

import torch
from conftest import build_internvl2, published_names, write_qwen2_vl_tokenizer
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from analysis import bench

QWEN2_VL_2B = {
    "model_type": "qwen2_vl", "hidden_size": 1536, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960,
    "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16,
                      "mlp_ratio": 4, "patch_size": 14, "spatial_merge_size": 2,
                      "temporal_patch_size": 2, "in_chans": 3}}


def shapes():
    """Returns {name: shape} of OpenGVLab/InternVL2-1B's 637 tensors, 938,158,976 numbers."""
    w, wide, d, ffn, v = 1024, 4096, 896, 4864, 151655
    names = {"vision_model.embeddings.class_embedding": (1, 1, w),
             "vision_model.embeddings.position_embedding": (1, 1025, w),
             "vision_model.embeddings.patch_embedding.weight": (w, 3, 14, 14),
             "vision_model.embeddings.patch_embedding.bias": (w,),
             "mlp1.0.weight": (4 * w,), "mlp1.0.bias": (4 * w,),
             "mlp1.1.weight": (d, 4 * w), "mlp1.1.bias": (d,),
             "mlp1.3.weight": (d, d), "mlp1.3.bias": (d,),
             "language_model.model.embed_tokens.weight": (v, d),
             "language_model.model.norm.weight": (d,), "language_model.lm_head.weight": (v, d)}
    vision_layer = {
        "attn.qkv.weight": (3 * w, w), "attn.qkv.bias": (3 * w,), "attn.proj.weight": (w, w),
        "attn.proj.bias": (w,), "norm1.weight": (w,), "norm1.bias": (w,), "norm2.weight": (w,),
        "norm2.bias": (w,), "ls1": (w,), "ls2": (w,), "mlp.fc1.weight": (wide, w),
        "mlp.fc1.bias": (wide,), "mlp.fc2.weight": (w, wide), "mlp.fc2.bias": (w,)}
    llm_layer = {
        "input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (d, d), "self_attn.q_proj.bias": (d,),
        "self_attn.k_proj.weight": (128, d), "self_attn.k_proj.bias": (128,),
        "self_attn.v_proj.weight": (128, d), "self_attn.v_proj.bias": (128,),
        "self_attn.o_proj.weight": (d, d), "mlp.gate_proj.weight": (ffn, d),
        "mlp.up_proj.weight": (ffn, d), "mlp.down_proj.weight": (d, ffn)}
    for start, layer in (("vision_model.encoder.layers", vision_layer),
                         ("language_model.model.layers", llm_layer)):
        for n in range(24):
            names |= {f"{start}.{n}.{key}": shape for key, shape in layer.items()}
    return names


def random_tensor(name, shape, dtype):
    """Returns small weights, and norms and layer scales that neither silence nor explode."""
    if ("norm" in name or ".ln_q." in name) and name.endswith("weight") or name == "mlp1.0.weight":
        return torch.ones(shape, dtype=dtype)
    return (torch.randn(shape) * (0.1 if ".ls" in name else 0.02)).to(dtype)


def build(folder):
    """Writes both models; returns their folders."""
    torch.manual_seed(0)
    internvl2 = build_internvl2(folder)
    (internvl2 / "reference.safetensors").unlink()
    config = {"model_type": "internvl_chat", **bench.INTERNVL2_1B}
    (internvl2 / "config.json").write_text(json.dumps(config))
    tensors = {name: random_tensor(name, shape, torch.bfloat16) for name, shape in shapes().items()}
    save_file(tensors, internvl2 / "model.safetensors")
    return internvl2, build_whisper(folder)


def build_qwen2_vl(folder, **smaller):
    """Writes Qwen2-VL-2B; returns its folder. smaller: other numbers of the LLM, for a trial."""
    torch.manual_seed(0)
    folder = folder / "qwen2-vl-2b"
    folder.mkdir()
    config = QWEN2_VL_2B | write_qwen2_vl_tokenizer(folder) | smaller
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        lvlm = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    if not smaller:
        assert sum(p.numel() for p in lvlm.parameters()) == 2_208_985_600
    tensors = {name: random_tensor(name, tensor.shape, torch.bfloat16)
               for name, tensor in published_names(lvlm, tied=True).items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def build_whisper(folder):
    """Writes Whisper-large-v3's encoder; returns its folder."""
    whisper = folder / "whisper-large-v3"
    config = WhisperConfig(**bench.WHISPER_LARGE_V3)
    with torch.device("meta"):
        state = WhisperEncoder(config).state_dict()
    config.save_pretrained(whisper)
    WhisperFeatureExtractor(feature_size=128).save_pretrained(whisper)
    tensors = {f"model.encoder.{name}": random_tensor(name, tensor.shape, torch.float16)
               for name, tensor in state.items()}
    save_file(tensors, whisper / "model.safetensors")
    return whisper


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    print(*build(out), sep="\n")
