"""The real models: InternVL2 and Whisper from their folders or hub ids, in the classes that model.py builds on.

    >>> lvlm, tokenizer = load_lvlm("OpenGVLab/InternVL2-1B"), load_tokenizer(folder)
    >>> audio_encoder, mel_extractor = load_audio_encoder("openai/whisper-large-v3")

InternVL2 is published with code of its own; here its weights are renamed to those of transformers' InternVL, and no
remote code is run. Weights are read from safetensors alone. What does not fit is refused: a missing setting would load
without a word and give wrong numbers. There is nothing to run here; `python -m pytest tests/test_internvl2.py` checks
it against the original code's outputs.
"""

import re
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (AutoTokenizer, InternVLConfig, InternVLForConditionalGeneration, Qwen2Tokenizer,
                          WhisperConfig, WhisperFeatureExtractor)
from transformers.initialization import no_init_weights
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from data import fetch, read_json
from faults import BadInput, differences, one_line

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
LARGEST = {  # numbers of a config.json and what they are at most, in any model that could be meant
    "num_hidden_layers": 200, "hidden_size": 2**14, "intermediate_size": 2**16, "num_attention_heads": 512,
    "num_key_value_heads": 512, "vocab_size": 2**20, "max_position_embeddings": 2**22, "image_size": 2**12,
    "patch_size": 2**10, "num_channels": 16, "encoder_layers": 200, "d_model": 2**14, "encoder_ffn_dim": 2**16,
    "encoder_attention_heads": 512, "num_mel_bins": 512, "max_source_positions": 2**14}
UNLOADABLE = (OSError, AttributeError, KeyError, TypeError, ValueError, ArithmeticError, RuntimeError, SafetensorError,
              StrictDataclassError)  # what is raised for folders whose numbers have a wrong type or do not fit together
PREPROCESSOR = "preprocessor_config.json"
SYSTEM_MESSAGE = ("你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
                  "英文名叫InternVL, 是一个有用无害的人工智能助手。")  # InternVL2's own, to the letter
ORIGINAL_NAMES = (  # OpenGVLab's parameter names, as regular expressions, and transformers'
    (r"^vision_model\.embeddings\.class_embedding$", "model.vision_tower.embeddings.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "model.vision_tower.embeddings.position_embeddings"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "model.vision_tower.embeddings.patch_embeddings.projection."),
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


def stored_tensors(folder):
    """(name, tensor) of every tensor in the folder's safetensors, single or sharded. Raises BadInput without any."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) and f == Path(f).name for f in files.values()):
            raise BadInput(f"{index}: its weight_map does not name files of this folder")
        names = sorted(set(files.values()))
    for path in (folder / name for name in names):
        if not path.is_file():
            raise BadInput(f"{path}: no such file; weights are read from safetensors alone, never from pickle (.bin)")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{path}: cannot be read: {error}") from None


def check_sizes(config, where):
    """Raises BadInput if a number in a config.json's object is none or absurd: so much would be built at once."""
    for key, value in config.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(value, dict):
                check_sizes(value, where)
            elif key in LARGEST and not (type(number) is int and 0 < number <= LARGEST[key]):
                raise BadInput(f"{where}: {key} is {number!r:.40}, not a number from 1 to {LARGEST[key]}")


def native_config(config, image_token_id):
    """transformers' InternVLConfig for an original InternVL2 config.json (a dict). Raises BadInput if unsupported.

    What must be said though the original does not say it: the native defaults for qkv bias, tied embeddings and rope
    are others, and every one of them would load without a word and give wrong numbers.
    """
    vision, llm = config["vision_config"], config["llm_config"]
    if not isinstance(vision, dict) or not isinstance(llm, dict):
        raise BadInput("vision_config and llm_config must be objects")
    family = (llm.get("architectures") or ["?"])[0]
    if family != "Qwen2ForCausalLM" or vision.get("qk_normalization") or vision.get("norm_type") != "layer_norm":
        encoder = "InternViT-6B" if vision.get("qk_normalization") else "InternViT-300M"
        raise BadInput(f"this InternVL has {family} and {encoder}; supported are Qwen2 and InternViT-300M (the 1B)")
    if config.get("ps_version") != "v2" or config.get("select_layer") != -1:
        raise BadInput("supported is InternVL2's ps_version v2 and select_layer -1, this config.json has "
                       f"{config.get('ps_version')} and {config.get('select_layer')}")
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    vision_config = {key: vision[key] for key in (*same, "image_size", "patch_size", "num_channels", "layer_norm_eps")}
    vision_config |= {"attention_bias": vision["qkv_bias"], "use_mean_pooling": True}  # the latter: no final norm
    text_config = {key: llm[key] for key in (*same, "vocab_size", "num_key_value_heads", "rms_norm_eps",
                                             "max_position_embeddings")}
    text_config |= {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": llm["rope_theta"]},
                    "bos_token_id": llm.get("bos_token_id"), "eos_token_id": llm.get("eos_token_id")}
    side = vision["image_size"] // vision["patch_size"] * config["downsample_ratio"]
    return InternVLConfig(vision_config=vision_config, text_config=text_config, image_token_id=image_token_id,
                          image_seq_length=int(side * side), downsample_ratio=config["downsample_ratio"],
                          tie_word_embeddings=False)  # lm_head is stored, whatever the original flag says


def renamed(tensors):
    """The original layout's (name, tensor) pairs under transformers' names; the ViT's fused qkv is cut in three."""
    for key, tensor in tensors:
        if ".attn.qkv." in key:
            for name, part in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3)):
                yield from renamed([(key.replace(".attn.qkv.", f".attention.{name}."), part)])
            continue
        for pattern, name in ORIGINAL_NAMES:
            key = re.sub(pattern, name, key)
        yield key, tensor


def load_weights(module, tensors, where):
    """Copies (name, tensor) pairs into a module as they come. Raises BadInput if a name or a shape is off."""
    own = module.state_dict()
    missing, unknown = set(own), []
    with torch.no_grad():
        for key, tensor in tensors:
            if key not in own:
                unknown.append(key)
                continue
            if tensor.shape != own[key].shape:
                raise BadInput(f"{where}: {key} has the shape {tuple(tensor.shape)}, not {tuple(own[key].shape)}")
            own[key].copy_(tensor)
            missing.discard(key)
    if missing or unknown:
        raise BadInput(f"{where}: the weights do not fit: {len(missing)} missing {sorted(missing)[:3]}, "
                       f"{len(unknown)} unknown {sorted(unknown)[:3]}")


def load_lvlm(path, image_token_id=None, dtype=torch.float32):
    """InternVLForConditionalGeneration from a folder or hub id, in OpenGVLab's original layout or transformers' own.

    image_token_id  id of <IMG_CONTEXT>; None: what the folder's tokenizer says (original layout only)
    No remote code is run and no pickle read. Raises BadInput if the model is unsupported or its weights do not fit.
    """
    folder = fetch(path)
    config = read_json(folder / "config.json")
    check_sizes(config, folder / "config.json")
    if config.get("model_type") == "internvl":
        lvlm, info = InternVLForConditionalGeneration.from_pretrained(folder, dtype=dtype, use_safetensors=True,
                                                                      output_loading_info=True)
        if info["missing_keys"]:
            raise BadInput(f"{path}: the weights do not fit: missing {sorted(info['missing_keys'])[:3]}")
        return lvlm
    if config.get("model_type") != "internvl_chat":
        raise BadInput(f"{path}: a model of the type {config.get('model_type')!r}; supported are InternVL2 in its "
                       "original layout (internvl_chat) and transformers' native one (internvl)")
    if image_token_id is None:
        image_token_id = load_tokenizer(folder).convert_tokens_to_ids("<IMG_CONTEXT>")
    try:
        config = native_config(config, image_token_id)
    except KeyError as error:
        raise BadInput(f"{path}/config.json: lacks {error}") from None
    except (AttributeError, TypeError, ArithmeticError, ValueError, StrictDataclassError, BadInput) as error:
        raise BadInput(f"{path}/config.json: {one_line(error, 300)}") from None
    with no_init_weights():  # 938 million random numbers that nobody would look at
        lvlm = InternVLForConditionalGeneration(config).to(dtype)
    load_weights(lvlm, renamed(stored_tensors(folder)), path)
    return lvlm.eval()


def lvlm_settings(lvlm):
    """How prompts are made for a real InternVL2: its own system message and tiles; the ASR instruction is ours."""
    return {"system": SYSTEM_MESSAGE, "image_size": lvlm.config.vision_config.image_size[0],
            "tokens_per_tile": lvlm.config.image_seq_length, "max_tiles": 6, "instruction": "Transcribe the speech."}


def load_tokenizer(folder):
    """The tokenizer in a folder. InternVL2's is Qwen2's, built from vocab.json and merges.txt without remote code."""
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"):
        if (Path(folder) / name).exists():
            read_json(Path(folder) / name)  # whose message names the file
    try:
        whole = (Path(folder) / "tokenizer.json").exists()
        tokenizer = (AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if whole
                     else Qwen2Tokenizer.from_pretrained(folder))
        lacking = [token for token in SPECIAL_TOKENS if token not in tokenizer.get_vocab()]
        if lacking or tokenizer.pad_token is None:
            raise ValueError(f"it lacks {lacking or 'a token for padding'}")
        if not tokenizer.model_max_length > 0:
            raise ValueError("its model_max_length is not above 0")
        return tokenizer
    except Exception as error:
        if not isinstance(error, UNLOADABLE) and type(error) is not Exception:  # tokenizers has no class of its own
            raise
        raise BadInput(f"{folder}: the tokenizer does not load: {one_line(error, 200)}") from None


def load_audio_encoder(path, dtype=torch.float32):
    """(Whisper's encoder, its mel front end) from a Whisper of any size, folder or hub id; the decoder is left out."""
    folder = fetch(path)
    encoder, start = empty_encoder(folder).to(dtype), "model.encoder."
    heard = ((k.removeprefix(start), t) for k, t in stored_tensors(folder) if k.startswith(start))
    load_weights(encoder, heard, path)
    return encoder, load_extractor(folder, encoder)


def empty_encoder(folder):
    """Whisper's encoder as a folder's config.json describes it, without weights. Raises BadInput if it is broken."""
    config = read_json(folder / "config.json")
    if config.get("model_type") != "whisper":
        raise BadInput(f"{folder}: not a Whisper model")
    check_sizes(config, folder / "config.json")
    try:
        with no_init_weights():
            return WhisperEncoder(WhisperConfig.from_pretrained(folder))
    except UNLOADABLE as error:
        raise BadInput(f"{folder / 'config.json'}: does not describe a Whisper: {one_line(error, 300)}") from None


def load_extractor(folder, encoder):
    """The mel front end of a folder's Whisper: all of them have the same one, but for the number of bins.

    Raises BadInput if its preprocessor_config.json is broken or says otherwise.
    """
    extractor, path = WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins), folder / PREPROCESSOR
    own = {key: getattr(extractor, key) for key in ("feature_size", "sampling_rate", "hop_length", "n_fft")}
    other = differences(read_json(path), own)
    if other:
        raise BadInput(f"{path}: not Whisper's: {one_line(other, 200)}")
    return extractor
