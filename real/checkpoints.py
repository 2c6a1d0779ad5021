"""The real models: InternVL2 and Whisper from folders or hub ids, in transformers' own classes.

    lvlm, tokenizer = load_lvlm("OpenGVLab/InternVL2-1B"), load_tokenizer("OpenGVLab/InternVL2-1B")
    audio_encoder, mel_extractor = load_audio_encoder("openai/whisper-large-v3")

InternVL2 is published with code of its own. Here its weights get the names of transformers'
InternVL, and no remote code is run. Weights are read from safetensors alone. A setting that is left
out would load without a word and give wrong numbers: what does not fit is refused.

There is nothing to run here. `python -m pytest tests/test_internvl2.py` compares it with the
original code's outputs.
"""

import re

import torch
import transformers
from safetensors import safe_open
from transformers import (AutoTokenizer, InternVLConfig, InternVLForConditionalGeneration,
                          Qwen2Tokenizer, WhisperConfig, WhisperFeatureExtractor)
from transformers.initialization import no_init_weights
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from plumbing.files import BadInput, at, read_json
from plumbing.runs import differences, fetch

transformers.utils.logging.disable_progress_bar()  # our own bars show what takes long
transformers.utils.logging.set_verbosity_error()  # and our own checks say what is wrong

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
SYSTEM_MESSAGE = ("你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
                  "英文名叫InternVL, 是一个有用无害的人工智能助手。")  # InternVL2's own, to the letter
ORIGINAL_NAMES = (  # OpenGVLab's parameter names, as regular expressions, and transformers'
    (r"^vision_model\.embeddings\.class_embedding$", "model.vision_tower.embeddings.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$",
     "model.vision_tower.embeddings.position_embeddings"),
    (r"^vision_model\.embeddings\.patch_embedding\.",
     "model.vision_tower.embeddings.patch_embeddings.projection."),
    (r"^vision_model\.encoder\.layers\.", "model.vision_tower.encoder.layer."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)


# ---- weights -------------------------------------------------------------------------------------


def stored_tensors(folder):
    """Yields (name, tensor) of every tensor in the folder's safetensors, single or sharded."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
    for name in names:
        with at(folder / name), safe_open(folder / name, framework="pt") as file:
            for key in file.keys():
                yield key, file.get_tensor(key)


def load_weights(module, tensors):
    """Copies (name, tensor) pairs into a module. Raises BadInput if a name or a shape is off."""
    own = module.state_dict()
    missing, unknown = set(own), []
    with torch.no_grad():
        for key, tensor in tensors:
            if key not in own:
                unknown.append(key)
                continue
            if tensor.shape != own[key].shape:  # copy_ would broadcast
                raise BadInput(f"{key} has the shape {tuple(tensor.shape)}, "
                               f"not {tuple(own[key].shape)}")
            own[key].copy_(tensor)
            missing.discard(key)
    if missing or unknown:
        raise BadInput(f"the weights do not fit: {len(missing)} missing {sorted(missing)[:3]}, "
                       f"{len(unknown)} unknown {sorted(unknown)[:3]}")


# ---- InternVL2 -----------------------------------------------------------------------------------


def load_lvlm(path, image_token_id=None, dtype=torch.float32):
    """Returns InternVLForConditionalGeneration from a folder or hub id.

    The layout may be OpenGVLab's original one or transformers' own.
    image_token_id: of <IMG_CONTEXT>; None is what the tokenizer says (original layout only)
    """
    folder = fetch(path)
    config = read_json(folder / "config.json")
    with at(path):
        if config.get("model_type") == "internvl":
            lvlm, info = InternVLForConditionalGeneration.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
            if info["missing_keys"]:
                missing = sorted(info["missing_keys"])
                raise BadInput(f"the weights do not fit: missing {missing[:3]}")
            return lvlm

        if image_token_id is None:
            image_token_id = load_tokenizer(folder).convert_tokens_to_ids("<IMG_CONTEXT>")
        with no_init_weights():  # 938 million random numbers that nobody would look at
            config = native_config(config, image_token_id)
            lvlm = InternVLForConditionalGeneration(config).to(dtype)
        load_weights(lvlm, rename(stored_tensors(folder)))
        return lvlm.eval()


def native_config(config, image_token_id):
    """Returns transformers' InternVLConfig for an original InternVL2 config.json (a dict).

    Some values must be given though the original does not name them: transformers' defaults for
    the qkv bias, tied embeddings and rotations differ, and would load and give wrong numbers.
    Raises BadInput for a model of another kind.
    """
    if config.get("model_type") != "internvl_chat":
        raise BadInput(f"a model of the type {config.get('model_type')!r}; supported are InternVL2 "
                       "(internvl_chat) and transformers' internvl")
    vision, llm = config["vision_config"], config["llm_config"]
    family = (llm.get("architectures") or ["?"])[0]
    is_6b = vision.get("qk_normalization") or vision.get("norm_type") != "layer_norm"
    if family != "Qwen2ForCausalLM" or is_6b:
        encoder = "InternViT-6B" if is_6b else "InternViT-300M"
        raise BadInput(f"this InternVL has {family} and {encoder}; supported are Qwen2 and "
                       "InternViT-300M (the 1B)")
    if config.get("ps_version") != "v2" or config.get("select_layer") != -1:
        raise BadInput(f"supported are ps_version v2 and select_layer -1, not "
                       f"{config.get('ps_version')} and {config.get('select_layer')}")

    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "hidden_act")
    vision_keys = (*same, "image_size", "patch_size", "num_channels", "layer_norm_eps")
    vision_config = {key: vision[key] for key in vision_keys}
    vision_config |= {"attention_bias": vision["qkv_bias"],
                      "use_mean_pooling": True}  # that is, no norm at the end

    text_keys = (*same, "vocab_size", "num_key_value_heads", "rms_norm_eps",
                 "max_position_embeddings")
    text_config = {key: llm[key] for key in text_keys}
    text_config |= {"model_type": "qwen2",
                    "rope_parameters": {"rope_type": "default", "rope_theta": llm["rope_theta"]},
                    "bos_token_id": llm.get("bos_token_id"),
                    "eos_token_id": llm.get("eos_token_id")}

    ratio = config["downsample_ratio"]
    side = vision["image_size"] // vision["patch_size"] * ratio  # of a tile, in tokens
    return InternVLConfig(
        vision_config=vision_config, text_config=text_config, image_token_id=image_token_id,
        image_seq_length=int(side * side), downsample_ratio=ratio,
        tie_word_embeddings=False)  # lm_head is stored, whatever the original's flag says


def rename(tensors):
    """Yields (name, tensor) pairs of the original layout under transformers' names.

    The vision encoder's fused qkv is cut in three.
    """
    for key, tensor in tensors:
        if ".attn.qkv." in key:
            for name, part in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3)):
                yield from rename([(key.replace(".attn.qkv.", f".attention.{name}."), part)])
            continue
        for pattern, name in ORIGINAL_NAMES:
            key = re.sub(pattern, name, key)
        yield key, tensor


def lvlm_settings(lvlm):
    """Returns how prompts are made for a real InternVL2; the instruction to transcribe is ours."""
    return {"system": SYSTEM_MESSAGE, "image_size": lvlm.config.vision_config.image_size[0],
            "tokens_per_tile": lvlm.config.image_seq_length, "max_tiles": 6,
            "instruction": "Transcribe the speech."}


def load_tokenizer(path):
    """Returns a model's tokenizer. InternVL2's is Qwen2's, from vocab.json and merges.txt."""
    folder = fetch(path)
    with at(f"{folder}: the tokenizer does not load"):
        if (folder / "tokenizer.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        else:
            tokenizer = Qwen2Tokenizer.from_pretrained(folder)
        ids = tokenizer.get_vocab()
        missing = [token for token in SPECIAL_TOKENS
                   if tokenizer(token).input_ids != [ids.get(token)]]
        if missing or tokenizer.pad_token not in SPECIAL_TOKENS:
            raise BadInput(f"it lacks {missing or 'a token for padding'}")
        return tokenizer


# ---- Whisper -------------------------------------------------------------------------------------


def load_audio_encoder(path):
    """Returns (encoder, feature extractor) of a Whisper of any size; its decoder is left out."""
    encoder, extractor = empty_audio_encoder(path)
    start = "model.encoder."
    tensors = ((name.removeprefix(start), tensor) for name, tensor in stored_tensors(fetch(path))
               if name.startswith(start))
    with at(path):
        load_weights(encoder, tensors)
    return encoder, extractor


def empty_audio_encoder(path):
    """Returns (encoder, feature extractor) as a folder's config.json says, without weights."""
    folder = fetch(path)
    config = read_json(folder / "config.json")
    with at(folder / "config.json"), no_init_weights():
        if config["model_type"] != "whisper":
            raise BadInput("not a Whisper")
        encoder = WhisperEncoder(WhisperConfig.from_pretrained(folder))

    # All Whispers have the same front end, but for the number of mel bins.
    extractor = WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins)
    path = folder / "preprocessor_config.json"
    own = {key: getattr(extractor, key) for key in ("feature_size", "sampling_rate", "hop_length",
                                                    "n_fft")}
    with at(path):
        there = read_json(path)
        other = differences({key: there[key] for key in own}, own)
        if other:
            raise BadInput(f"not Whisper's: {other}")
    return encoder, extractor
