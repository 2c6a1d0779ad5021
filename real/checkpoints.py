"""The real models, LVLMs and Whisper from folders or hub ids, in transformers' own classes.

    lvlm = load_lvlm("OpenGVLab/InternVL2-1B")
    tokenizer = load_tokenizer("OpenGVLab/InternVL2-1B", lvlm.config.text_config, "Hermes-2")
    audio_encoder, mel_extractor = load_audio_encoder("openai/whisper-large-v3")

InternVL2 is published with code of its own. Here its weights get the names of transformers'
InternVL, and no remote code is run. Weights are read from safetensors alone. A setting that is left
out would load without a word and give wrong numbers: what does not fit is refused.

There is nothing to run here. `python -m pytest tests/test_internvl2.py tests/test_families.py`
compares it with the original code's outputs.
"""

import re
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    InternVLConfig,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.initialization import no_init_weights
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from plumbing.files import BadInput, at, read_json
from plumbing.runs import fetch
from real.families import CHATS

transformers.utils.logging.disable_progress_bar()  # our own bars show what takes long
transformers.utils.logging.set_verbosity_error()  # and our own checks say what is wrong

LLMS = {"Qwen2ForCausalLM": "qwen2", "InternLM2ForCausalLM": "llama", "Phi3ForCausalLM": "phi3"}
NAMES = {  # by config.json's model_type: published parameter names, as patterns, and transformers'
    "internvl_chat": (  # OpenGVLab's InternVL2
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
        (r"^language_model\.(lm_head|output)\.", "lm_head."),
        # InternLM2's other names
        (r"\.tok_embeddings\.", ".embed_tokens."),
        (r"\.attention_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
        (r"\.attention\.wo\.", ".self_attn.o_proj."),
        (r"\.attention\.w([qkv])\.", r".self_attn.\1_proj."),
        (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
        (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
        (r"\.feed_forward\.w3\.", ".mlp.up_proj.")),
    "internvl": (  # as transformers saves it: InternVL3 and 3.5, and the built-in world's runs
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head.")),
    "qwen2_vl": (
        (r"^visual\.", "model.visual."),
        (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1.")),
}
NAMES["qwen2_5_vl"] = NAMES["qwen2_vl"]
NAMES["qwen2_5_omni"] = (
    (r"^thinker\.(visual|audio_tower)\.", r"model.\1."),
    (r"^thinker\.model\.", "model.language_model."),
    (r"^thinker\.lm_head\.", "lm_head."))
SPEAKING = ("talker.", "token2wav.")  # an omni model's voice, which is not loaded


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


def load_weights(lvlm, tensors):
    """Loads (name, tensor) pairs, whose memory is the mapped file's. Raises if any does not fit."""
    state = {}
    for name, tensor in tensors:
        if name in state:
            raise BadInput(f"{name} is stored twice")
        state[name] = tensor

    # A head that is tied to the embeddings is one tensor with two names. If another one is stored,
    # it is not tied. InternVL3's config.json does not tell; transformers decides in the same way.
    if lvlm.lm_head.weight is lvlm.get_input_embeddings().weight:
        embeddings = state["model.language_model.embed_tokens.weight"]
        if not torch.equal(state.setdefault("lm_head.weight", embeddings), embeddings):
            lvlm.lm_head.weight = torch.nn.Parameter(torch.empty_like(lvlm.lm_head.weight))
            lvlm.config.tie_word_embeddings = False
    lvlm.load_state_dict(state)


# ---- LVLMs ---------------------------------------------------------------------------------------


def load_lvlm(path, image_token_id=None, dtype=None, device="cpu"):
    """Returns the LVLM of a folder or hub id: InternVLForConditionalGeneration, or Qwen2VL...

    InternVL's layout may be OpenGVLab's original one or transformers' own.
    image_token_id: of <IMG_CONTEXT>; None is what the tokenizer says (original layout only)
    dtype: of the parameters; None is bfloat16 on a GPU, float32 elsewhere
    Tensors go to the device one by one, as they are stored. Memory for all in float32 would not do:
    there may be 8 billion, and as many processes. Buffers are not rounded: angles of far positions
    would be wrong.
    """
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    folder = fetch(path)
    config = read_json(folder / "config.json")
    with at(path):
        layout = config.get("model_type")
        if layout not in NAMES:
            raise BadInput(f"a model of the type {layout!r}; supported are InternVL2 "
                           f"(internvl_chat) and transformers' {', '.join([*NAMES][1:])}")
        if layout != "internvl_chat":
            config = AutoConfig.from_pretrained(folder)
            config = getattr(config, "thinker_config", config)
        else:
            if image_token_id is None:
                image_token_id = load_tokenizer(folder).convert_tokens_to_ids("<IMG_CONTEXT>")
            config = native_config(config, image_token_id)
        with no_init_weights():  # up to 8 billion random numbers that nobody would look at
            lvlm = AutoModelForImageTextToText.from_config(config, dtype=dtype).to(device)
        lvlm.tie_weights()
        if hasattr(lvlm.model, "audio_tower"):
            lvlm.model.audio_tower.float()  # it is trained
        load_weights(lvlm, rename(stored_tensors(folder), NAMES[layout], config.text_config))
        return lvlm.eval()


def native_config(config, image_token_id):
    """Returns transformers' InternVLConfig for an original InternVL2 config.json (a dict).

    Some values must be given though the original does not name them: transformers' defaults for
    the qkv bias, tied embeddings and rotations differ, and would load and give wrong numbers.
    Raises BadInput for a model of another kind.
    """
    vision, llm = config["vision_config"], config["llm_config"]
    family = (llm.get("architectures") or ["?"])[0]
    is_6b = vision.get("qk_normalization") or vision.get("norm_type") != "layer_norm"
    if family not in LLMS or is_6b:
        encoder = "InternViT-6B" if is_6b else "InternViT-300M"
        raise BadInput(f"this InternVL has {family} and {encoder}; supported are {', '.join(LLMS)} "
                       "and InternViT-300M (the 1B, 2B, 4B and 8B)")
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
    text_config |= {**rotations(llm), "model_type": LLMS[family],
                    "bos_token_id": llm.get("bos_token_id"),
                    "eos_token_id": llm.get("eos_token_id"),
                    "pad_token_id": None}  # Phi-3's default lies outside of small vocabularies

    ratio = config["downsample_ratio"]
    side = vision["image_size"] // vision["patch_size"] * ratio  # of a tile, in tokens
    return InternVLConfig(
        vision_config=vision_config, text_config=text_config, image_token_id=image_token_id,
        image_seq_length=int(side * side), downsample_ratio=ratio,
        template=config.get("template"),
        tie_word_embeddings=False)  # lm_head is stored, whatever the original's flag says


def rotations(llm):
    """Returns how an original llm_config turns keys, as two values of transformers' text_config."""
    scaling = dict(llm.get("rope_scaling") or {"type": "default"})
    kind = scaling.pop("type")
    rope = {"rope_type": {"su": "longrope"}.get(kind, kind),  # Phi-3's, which has been renamed
            "rope_theta": llm["rope_theta"], **scaling}
    limit = {key: llm[key] for key in ["original_max_position_embeddings"] if key in llm}
    return limit | {"rope_parameters": rope}


def rename(tensors, names, llm):
    """Yields (name, tensor) pairs of a published layout under transformers' names.

    Fused projections are cut in three: the vision encoder's, and InternLM2's, whose rows go by key
    head: the queries that share it, the key, the value. llm: the text_config
    """
    share = llm.num_attention_heads // llm.num_key_value_heads  # queries of a key head
    for key, tensor in tensors:
        if key.startswith(SPEAKING):
            continue
        parts = [(key, tensor)]
        if "vision_model." in key and ".attn.qkv." in key:
            parts = [(key.replace(".attn.qkv.", f".attention.{name}_proj."), part)
                     for name, part in zip("qkv", tensor.chunk(3))]
        if ".attention.wqkv." in key:
            heads = tensor.unflatten(0, (llm.num_key_value_heads, share + 2, -1))
            parts = [(key.replace("wqkv", f"w{name}"), part.flatten(0, 2))
                     for name, part in zip("qkv", heads.split((share, 1, 1), dim=1))]
        for key, part in parts:
            for pattern, name in names:
                key = re.sub(pattern, name, key)
            yield key, part


def load_tokenizer(path, llm=None, chat=None):
    """Returns a model's tokenizer, without remote code.

    llm: the LVLM's text_config, to take no prompt beyond the LLM's positions. Some LLMs turn all
    keys by other angles when a prompt is longer; those of a prefix that was read before would keep
    the old ones. chat: the name of the LVLM's chat, to check that the tokenizer can write it
    """
    folder = fetch(path)
    with at(f"{folder}: the tokenizer does not load"):
        # transformers would choose LlamaTokenizer for tokenizer.model, which shifts the ids of
        # InternLM2's special tokens. Where a prompt begins with <s>, the chat writes it.
        kind = Qwen2Tokenizer
        if (folder / "tokenizer.json").exists():
            kind = AutoTokenizer
        elif (folder / "tokenizer.model").exists():
            kind = PreTrainedTokenizerFast
        tokenizer = kind.from_pretrained(folder, add_bos_token=False)

        # Phi-3's tokenizer.model puts a blank before a text that begins with a word. Questions do,
        # but they stand after the prefix, where the original code writes none.
        if kind is PreTrainedTokenizerFast:
            tokenizer.backend_tokenizer.pre_tokenizer = None
        if llm is None:
            return tokenizer

        check_chat(tokenizer, llm, chat)
        limit = llm.rope_parameters.get("original_max_position_embeddings",
                                        llm.max_position_embeddings)
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
        return tokenizer


def check_chat(tokenizer, llm, name):
    """Raises BadInput if a tokenizer cannot write the chat of this name, or not for this LLM."""
    # The chat's marks are tokens, each of them one.
    chat, vocabulary = CHATS[name], tokenizer.get_vocab()
    around = "".join([*chat["image"], *chat.get("audio", ())])
    written = chat["before"] + around + chat["generation_prompt"] + chat["end"]
    marks = sorted(set(re.findall(r"<[^<>\s]+>", written)))
    missing = [mark for mark in marks if tokenizer(mark).input_ids != [vocabulary.get(mark)]]
    if missing or tokenizer.pad_token_id is None:
        raise BadInput(f"it lacks {missing or 'a token for padding'}")
    if tokenizer(chat["end"] + "A").input_ids[1:] != tokenizer("A").input_ids:
        raise BadInput("it puts something before a text that stands alone")

    # What we write has an embedding. (InternVL3-1B's tokenizer also has <video>, for which its LLM
    # has none.)
    used = [tokenizer.vocab_size - 1, tokenizer.pad_token_id, *map(vocabulary.get, marks)]
    if max(used) >= llm.vocab_size:
        raise BadInput(f"it has tokens beyond the LLM's {llm.vocab_size:,}")

    # "internvl" is any InternVL in transformers' own layout. How it is spoken to, only its chat
    # template tells.
    if name == "internvl":
        theirs = tokenizer.chat_template and tokenizer.apply_chat_template(
            [{"role": "user", "content": "A"}], tokenize=False, add_generation_prompt=True)
        if theirs != chat["before"] + "A" + chat["generation_prompt"]:
            raise BadInput(f"its chat template is not InternVL3's: it writes {theirs!r:.200}")


# ---- audio encoders ------------------------------------------------------------------------------


def own_audio_encoder(lvlm):
    """Returns (encoder, feature extractor) of an LVLM that hears, or () of one that does not."""
    tower = getattr(lvlm.model, "audio_tower", None)
    if tower is None:
        return ()
    return tower, WhisperFeatureExtractor(feature_size=tower.config.num_mel_bins)


def load_audio_encoder(path):
    """Returns (encoder, feature extractor) of a Whisper of any size; its decoder is left out.

    A folder may hold WhisperForConditionalGeneration, WhisperModel or WhisperEncoder, also within
    PEFT's classes; a run that trained an encoder is such a folder, too. Raises BadInput if it has
    no encoder under such names, or none in safetensors.
    """
    folder = fetch(path)
    with at(f"{folder}: not a Whisper's encoder as transformers saves it in safetensors"):
        encoder, info = WhisperEncoder.from_pretrained(
            folder, key_mapping={r"^.*encoder\.": ""}, dtype=torch.float32, use_safetensors=True,
            output_loading_info=True)
        lacking = sorted({*info["missing_keys"], *info["mismatched_keys"]}, key=str)
        if lacking:
            raise BadInput(f"{lacking[0]} and {len(lacking) - 1} more are missing or do not fit")
        return encoder, feature_extractor(folder, encoder)


def empty_audio_encoder(path):
    """Returns (encoder, feature extractor) as a run's config.json says, without weights."""
    with at(path), no_init_weights():
        encoder = WhisperEncoder(WhisperConfig.from_pretrained(path))
        return encoder, feature_extractor(path, encoder)


def feature_extractor(folder, encoder):
    """Returns Whisper's feature extractor for an encoder, with the frames that a run tells."""
    path, frames = Path(folder) / "preprocessor_config.json", {}
    if path.exists():
        frames = {"hop_length": read_json(path)["hop_length"]}
    return WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins, **frames)
