"""The omnimodal LLM: a vision-language model that can read, and an audio encoder that teaches it to listen.

    image    -> vision encoder -> projector --.
                                              +-> <system><image>  <query>  <answer>  -> LLM -> answer
    question -> word embeddings   (teacher) --+
    speech   -> Whisper's encoder -> one linear projector (student)

One image prefix, two questions, one answer. The image stands before the question, attention is causal, and vision
encoder and LLM are frozen: so the keys and values of `<system><image>` are the same for teacher and student and need no
gradient. `prefix` computes them once; `suffix` continues from them with the written or the spoken question.

Two sets of parts fit: the built-in world's tiny ones (`build_lvlm`, `build_audio_encoder`), and the paper's real ones
(pretrained.py). A batch is what `data.collate` returns. There is nothing to run here;
`python -m pytest tests/test_model.py` checks it against two full passes, tests/test_internvl2.py against the original
code's outputs.

Letters in shape comments: B batch, P prefix tokens, S suffix tokens, A audio tokens, N answer tokens in the batch,
V vocabulary, D width of the LLM, W width of the audio encoder, M mel bins, F mel frames.
"""

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from transformers import (DynamicCache, InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast,
                          WhisperConfig, WhisperFeatureExtractor)
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import shapes
from data import AUDIO_SLOT, IGNORE, MAX_SECONDS, fetch, read_json
from faults import BadInput, differences, flush_to_disk, one_line
from loss import chunked_self_kd_loss
from pretrained import (SPECIAL_TOKENS, UNLOADABLE, empty_encoder, load_extractor, load_lvlm, load_tokenizer,
                        load_weights, lvlm_settings, stored_tensors)

transformers.utils.logging.disable_progress_bar()  # our own bars show what takes long
transformers.utils.logging.set_verbosity_error()  # and our own checks say what is wrong

POSITIONS = 2048  # of the built-in LLM
MAX_NEW_TOKENS = 48  # of an answer


class OLLM(nn.Module):
    """InternVL, Whisper's encoder and one linear projector; the audio parts may be absent (a plain LVLM).

    lvlm           transformers' InternVLForConditionalGeneration
    tokenizer      its tokenizer
    settings       {"system", "image_size", "tokens_per_tile", "max_tiles", "instruction"}: how prompts are made
    audio_encoder  transformers' WhisperEncoder, or None
    mel_extractor  its WhisperFeatureExtractor, or None
    """

    def __init__(self, lvlm, tokenizer, settings, audio_encoder=None, mel_extractor=None):
        super().__init__()
        self.lvlm, self.tokenizer, self.settings = lvlm, tokenizer, settings
        self.audio_encoder, self.mel_extractor = audio_encoder, mel_extractor
        if audio_encoder is not None:
            self.projector = nn.Linear(audio_encoder.config.d_model, lvlm.config.text_config.hidden_size)

    def train_only(self, stage):
        """Freezes everything but what this stage trains (section 3.3): the LVLM, or audio encoder and projector."""
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        parts = [self.lvlm] if stage == "vision-text" else [self.audio_encoder, self.projector]
        for part in parts:
            part.requires_grad_(True)
        if self.audio_encoder is not None:  # sinusoids, which Whisper keeps as they are
            self.audio_encoder.embed_positions.requires_grad_(False)

    def see(self, pixels):
        """Image tiles (N, 3, H, W) to image tokens (N, tokens per tile, D)."""
        return self.lvlm.get_image_features(pixel_values=pixels, vision_feature_layer=-1,
                                            vision_feature_select_strategy="default").pooler_output

    def hear(self, mel, n_frames):
        """Log-mel spectrograms (B, M, F) of n_frames (B,) real frames each to audio tokens (B, A, D), A = F / 4.

        Whisper's own layers, on the real length instead of 30 s: frames past a clip's end are no keys for attention,
        and a pair of frames is pooled only within a clip (n_frames is a multiple of 4), so that a clip's tokens do not
        depend on its batch. Tokens past n_frames / 4 mean nothing.
        """
        encoder = self.audio_encoder
        x = F.gelu(encoder.conv1(mel.to(encoder.conv1.weight.dtype)))  # (B, W, F)
        x = F.gelu(encoder.conv2(x)).transpose(1, 2)  # (B, F / 2, W)
        x = x + encoder.embed_positions.weight[: x.size(1)]
        padded = torch.arange(x.size(1), device=x.device) >= n_frames[:, None] // 2  # (B, F / 2)
        mask = None  # attention is faster without
        if padded.any():
            mask = torch.zeros_like(padded, dtype=x.dtype).masked_fill(padded, torch.finfo(x.dtype).min)
            mask = mask[:, None, None, :]  # (B, 1, 1, F / 2)
        for layer in encoder.layers:
            x = layer(x, mask)  # (B, F / 2, W)
        x = encoder.layer_norm(x)
        x = x.unflatten(1, (-1, 2)).mean(2)  # (B, A, W): 25 tokens a second, as in Qwen2-Audio
        return self.projector(x)  # (B, A, D)

    def embed(self, ids, pixels=None, heard=None):
        """What the LLM reads of ids (B, T): embeddings (B, T, D), with image tokens and audio tokens in their slots.

        pixels: image tiles (N, 3, H, W) of the whole batch; heard: audio tokens (B, A, D), which take the AUDIO_SLOTs.
        """
        speech = ids == AUDIO_SLOT  # (B, T)
        x = self.lvlm.get_input_embeddings()(ids.masked_fill(speech, 0))  # (B, T, D)
        if pixels is not None:
            image = ids == self.lvlm.config.image_token_id  # (B, T)
            seen = self.see(pixels).flatten(0, 1)  # (image tokens in the batch, D)
            assert image.sum() == len(seen), f"{image.sum()} image slots for {len(seen)} image tokens"
            x = x.masked_scatter(image[..., None], seen.to(x.dtype))
        if heard is not None:
            real = torch.arange(heard.size(1), device=x.device) < speech.sum(1, keepdim=True)  # (B, A)
            x = x.masked_scatter(speech[..., None], heard[real].to(x.dtype))
        return x

    def prefix(self, batch):
        """Runs `<system><image>` once: (cache of keys and values, mask (B, P)), to be continued by `suffix`."""
        ids, mask = batch["prefix"]["ids"], batch["prefix"]["mask"]  # (B, P)
        x = self.embed(ids, batch["pixels"])  # (B, P, D)
        llm, cache = self.lvlm.model.language_model, DynamicCache(config=self.lvlm.config.text_config)
        positions = torch.arange(ids.size(1), device=ids.device)[None]  # (1, P): padding stands right
        rotation = llm.rotary_emb(x, positions)
        causal = create_causal_mask(llm.config, x, mask, cache, position_ids=positions)
        for layer in llm.layers[:-1]:
            x = layer(x, attention_mask=causal, position_embeddings=rotation, past_key_values=cache)  # (B, P, D)
        keys_and_values(llm.layers[-1], x, rotation, cache)  # nobody asks what the last layer says after the image
        return cache, mask

    def suffix(self, prefix, suffix, heard=None):
        """Continues the prefix with a question and what follows it: (hidden states (B, S, D), cache, mask (B, P + S)).

        heard: audio tokens (B, A, D), which take the AUDIO_SLOTs of suffix["ids"] in order; None for text.
        """
        cache, seen = copy.copy(prefix[0]), prefix[1]
        cache.layers = [copy.copy(layer) for layer in cache.layers]  # a cache grows in place: each branch its own
        x = self.embed(suffix["ids"], heard=heard)  # (B, S, D)
        mask = torch.cat([seen, suffix["mask"]], dim=1)  # (B, P + S)
        positions = seen.sum(1, keepdim=True) + suffix["positions"]  # (B, S): padding is no position
        out = self.lvlm.model.language_model(inputs_embeds=x, attention_mask=mask, position_ids=positions,
                                             past_key_values=cache, use_cache=True)
        return out.last_hidden_state, cache, mask

    def answer_states(self, hidden, labels):
        """Hidden states (N, D) at the positions that predict answer tokens, and those tokens (N,).

        The position before a token predicts it, so an answer's first token is predicted by the prompt's last position.
        """
        targets = labels[:, 1:]  # (B, S - 1)
        supervised = targets != IGNORE
        return hidden[:, :-1][supervised], targets[supervised]

    def paired(self, batch, teach):
        """The paired pass: (student's states (N, D), teacher's (N, D) or None, labels (N,)), see `answer_states`.

        The student hears the question if the batch holds speech and reads it otherwise; with `teach`, the same weights
        read it as the teacher, without gradient (Eq. 2). Both are scored on the very same answer tokens.
        """
        trains_lvlm = self.lvlm.lm_head.weight.requires_grad
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains_lvlm):
            prefix = self.prefix(batch)
        student = asked(batch)
        heard = None if batch["mel"] is None else self.hear(batch["mel"], batch["n_frames"])
        student_states, labels = self.answer_states(self.suffix(prefix, student, heard)[0], student["labels"])
        if not teach:
            return student_states, None, labels
        with torch.no_grad():
            hidden = self.suffix(prefix, batch["text"])[0]
            teacher_states, read = self.answer_states(hidden, batch["text"]["labels"])
        assert torch.equal(read, labels), "student and teacher must be scored on the same answer tokens"
        return student_states, teacher_states, labels

    def forward(self, batch, alpha, temperature=1.0, n_tokens=None, divergence="forward"):
        """(loss, kl, ce) of the student's answers, see loss.py. The head is applied to answer positions alone."""
        student, teacher, labels = self.paired(batch, teach=alpha > 0)  # (N, D), (N, D), (N,)
        return chunked_self_kd_loss(student, teacher, self.lvlm.lm_head, labels, alpha, temperature, n_tokens,
                                    divergence)

    def generate(self, prefix, suffix, heard=None, max_new_tokens=MAX_NEW_TOKENS):
        """Greedy answers as a list of strings; the suffix is padded on the left (`collate(answers=False)`)."""
        rows, pad = self.say(prefix, suffix, heard, max_new_tokens), self.tokenizer.pad_token_id
        return [self.tokenizer.decode(row[row != pad], skip_special_tokens=True).strip() for row in rows]

    @torch.no_grad()
    def answer_itself(self, batch, max_new_tokens=MAX_NEW_TOKENS):
        """The batch (of `collate(answers=False)`) with the student's own greedy answers to its spoken questions.

        On-policy distillation (Agarwal et al., ICLR 2024, for which the paper's training has no counterpart): both
        forms of the question get the same answer, so that the teacher scores what the student says by itself.
        """
        heard = self.hear(batch["mel"], batch["n_frames"])  # (B, A, D)
        rows = self.say(self.prefix(batch), batch["audio"], heard, max_new_tokens)  # (B, R)
        said = rows != self.tokenizer.pad_token_id  # (B, R)
        behind = torch.arange(1, rows.size(1) + 1, device=rows.device)  # (R,): positions after the question's last
        forms = {form: {"ids": torch.cat([suffix["ids"], rows], 1), "mask": torch.cat([suffix["mask"], said], 1),
                        "positions": torch.cat([suffix["positions"], suffix["positions"][:, -1:] + behind], 1),
                        "labels": torch.cat([suffix["labels"], rows.masked_fill(~said, IGNORE)], 1)}  # (B, S + R) each
                 for form, suffix in (("text", batch["text"]), ("audio", batch["audio"]))}
        return {**batch, **forms}

    @torch.no_grad()
    def say(self, prefix, suffix, heard=None, max_new_tokens=MAX_NEW_TOKENS):
        """Greedy answers as token ids (B, R <= max_new_tokens), padded behind the end mark, which a cut one lacks."""
        stop, pad = self.tokenizer.convert_tokens_to_ids("<|im_end|>"), self.tokenizer.pad_token_id
        rows = torch.zeros(len(suffix["ids"]), 0, dtype=torch.long, device=suffix["ids"].device)  # (B, new tokens)
        done = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)  # (B,)
        while rows.size(1) < max_new_tokens and not done.all():
            hidden, cache, mask = self.suffix(prefix, suffix, heard)
            token = self.lvlm.lm_head(hidden[:, -1]).argmax(-1)  # (B,)
            token = token.masked_fill(done, pad)
            done |= token == stop
            rows = torch.cat([rows, token[:, None]], dim=1)
            # The next suffix is this one token; what was said so far has become part of the prefix.
            suffix = {"ids": token[:, None], "mask": torch.ones_like(token[:, None], dtype=torch.bool),
                      "positions": torch.zeros_like(token[:, None])}
            prefix, heard = (cache, mask), None
        return rows


def keys_and_values(layer, x, rotation, cache):
    """Puts into the cache what later tokens see of a decoder layer's input x (B, P, D), and computes nothing else."""
    attention, x = layer.self_attn, layer.input_layernorm(x)
    keys, values = (project(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # (B, heads, P, D / heads)
                    for project in (attention.k_proj, attention.v_proj))
    keys, _ = apply_rotary_pos_emb(keys, keys, *rotation)
    cache.update(keys, values, attention.layer_idx)


def asked(batch):
    """The suffix that the student is asked and learns from: the spoken question, or the written one without speech."""
    return batch["text"] if batch["mel"] is None else batch["audio"]


def to_bfloat16(module):
    """The module's parameters in half precision. Its buffers stay as they are: rotations of far positions need them."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def to_float64(module):
    """The module in double precision throughout, to compare runs and gradients exactly.

    transformers' RMSNorm computes in float32 even in a float64 model, where torch's own keeps the precision.
    """
    for name, child in module.named_children():
        if isinstance(child, Qwen2RMSNorm):
            norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
            norm.weight = child.weight
            setattr(module, name, norm)
        else:
            to_float64(child)
    return module.double()


# ---- the built-in models -------------------------------------------------------------------------------------------


def build_tokenizer():
    """The built-in world's tokenizer: a word a token, with InternVL2's special tokens and chat prompt."""
    words = ["<unk>", *SPECIAL_TOKENS, "\n", "system", "user", "assistant", *shapes.vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Lowercase(), normalizers.Replace("colour", "color"), *(normalizers.Replace(c, "") for c in "?.!,")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<|endoftext|>",
                                   eos_token="<|im_end|>", additional_special_tokens=[*SPECIAL_TOKENS, "\n"],
                                   clean_up_tokenization_spaces=False, model_max_length=POSITIONS)


def build_lvlm():
    """The built-in world's LVLM with random weights: InternVL's and Qwen2's own classes, 1.3 M parameters."""
    tokenizer = build_tokenizer()
    vision = dict(hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384,
                  image_size=[shapes.SIZE] * 2, patch_size=[16, 16], attention_bias=True, use_mean_pooling=True,
                  # Not the usual 0.1 and 0.02: with these, a model this narrow is slow to see.
                  layer_scale_init_value=0.5, initializer_range=0.08)
    text = dict(model_type="qwen2", vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4,
                num_attention_heads=8, num_key_value_heads=8, intermediate_size=256, max_position_embeddings=POSITIONS,
                initializer_range=0.08)
    config = InternVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False,  # it ties by default
                            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4)
    settings = {"system": "", "image_size": shapes.SIZE, "tokens_per_tile": 4, "max_tiles": 1,
                "instruction": shapes.INSTRUCTION}
    lvlm = InternVLForConditionalGeneration(config)
    with torch.no_grad():
        # InternVL's positions begin at 0: beside the patches they would long stay too small to tell left from right.
        nn.init.normal_(lvlm.model.vision_tower.embeddings.position_embeddings, std=0.3)
        # A word is read and said in the same direction at first, which makes it sooner found in a picture.
        lvlm.lm_head.weight.copy_(lvlm.get_input_embeddings().weight)
    return lvlm, tokenizer, settings


def build_audio_encoder():
    """The built-in world's audio encoder with random weights: Whisper's own class, two layers, 40 mel bins."""
    config = WhisperConfig(num_mel_bins=40, d_model=128, encoder_layers=2, encoder_attention_heads=4,
                           encoder_ffn_dim=512, max_source_positions=1500, init_std=0.04)
    return WhisperEncoder(config), WhisperFeatureExtractor(feature_size=40)


# ---- runs on disk --------------------------------------------------------------------------------------------------


def fingerprint(base):
    """SHA-256 over a model's configuration and weights (run folder, or an LVLM's folder or hub id): which one it is."""
    folder, digest = fetch(base), hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("model*.safetensors")]):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def save_run(ollm, folder, training, base=None):
    """Writes what a stage trained into a run folder: safetensors and JSON only, `ollm.json` last.

    base      folder or hub id of the LVLM this one listens for; None: the LVLM itself was trained and is stored
    training  a dict that tells how (stage, alpha, seed, ...), kept in ollm.json
    Everything is written to a temporary folder first and renamed file by file. Raises BadInput if the disk is full.
    """
    folder = Path(folder)
    partial = folder / ".saving.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        about = {"settings": ollm.settings, "base": None, "training": training}
        if base is None:
            ollm.lvlm.save_pretrained(partial)
            ollm.tokenizer.save_pretrained(partial)
        else:
            name = os.path.relpath(base, folder) if Path(base).is_dir() else str(base)
            about |= {"base": name, "base_fingerprint": fingerprint(base)}
            state = {k: v.contiguous() for k, v in ollm.state_dict().items() if not k.startswith("lvlm.")}
            save_file(state, partial / "model.safetensors", metadata={"format": "pt"})
            ollm.audio_encoder.config.save_pretrained(partial)
            ollm.mel_extractor.save_pretrained(partial)
        about["fingerprint"] = fingerprint(partial)
        (partial / "ollm.json").write_text(json.dumps(about, indent=1) + "\n")
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "ollm.json"):
            flush_to_disk(path)
            os.replace(path, folder / path.name)
        flush_to_disk(folder)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"could not save the run to {folder}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def about_run(path):
    """The dict in a finished run's ollm.json; of an LVLM's folder or hub id, one like it without settings.

    Raises BadInput if it is neither, or broken.
    """
    path = Path(path)
    if os.path.lexists(path / "ollm.json"):
        about = read_json(path / "ollm.json")
        check_about(about, path / "ollm.json")
        return about
    on_hub = not os.path.exists(path) and len(path.parts) == 2 and not path.is_absolute()
    config = path / "config.json"
    if on_hub or os.path.exists(config) and str(read_json(config).get("model_type")).startswith("internvl"):
        return {"settings": None, "base": None, "training": {"stage": "vision-text", "alpha": 0.0, "seed": 0}}
    raise BadInput(f"{path}: not a finished run (it has no ollm.json)")


def check_about(about, where):
    """Raises BadInput unless a run's ollm.json has what is read of it, in the types that `save_run` gave it."""
    settings, base, training = about.get("settings"), about.get("base", 0), about.get("training")

    def has(place, kind, *keys):
        """Whether all of the keys have values of this type."""
        return isinstance(place, dict) and all(type(place.get(key)) in kind for key in keys)

    right = {
        "settings": has(settings, (str,), "system", "instruction")
        and has(settings, (int,), "image_size", "tokens_per_tile", "max_tiles") and settings["max_tiles"] > 0
        and has({"audio_seconds": 0, **settings}, (int, float), "audio_seconds")
        and 0 <= settings.get("audio_seconds", 0) <= MAX_SECONDS,
        "base": base is None or has(about, (str,), "base", "base_fingerprint"),
        "training": has(training, (str,), "stage") and has(training, (int,), "seed")
        and has(training, (int, float), "alpha") and 0 <= training["alpha"] <= 1,
    }
    for key in right:
        if not right[key]:
            raise BadInput(f"{where}: broken: {key!r} is missing, or has not the values that a run has there")


def base_of(path):
    """The LVLM that a run listens for, folder or hub id; an LVLM is its own."""
    base = about_run(path)["base"]
    if base is None:
        return path
    beside = Path(os.path.normpath(Path(path) / base))
    return beside if beside.is_dir() else base


def load_run(path):
    """The OLLM of a run folder: its own LVLM, or its base's with the audio encoder and projector stored here.

    An LVLM's folder or hub id gives an OLLM that cannot listen yet. Raises BadInput if a file is missing or broken, the
    base is another than the one trained on, or shapes do not fit.
    """
    about, base = about_run(path), base_of(path)
    try:
        if base != path and fingerprint(base) != about["base_fingerprint"]:
            raise BadInput(f"{path}: was trained on another base than the one that lies in {base} now")
        if "fingerprint" in about and fingerprint(path) != about["fingerprint"]:
            raise BadInput(f"{path}: model.safetensors or config.json is not what was saved there. It is broken; or if "
                           'you have changed it yourself, delete "fingerprint" from ollm.json')
        lvlm, tokenizer = load_lvlm(base), load_tokenizer(fetch(base))
        own, settings = lvlm_settings(lvlm), about["settings"]
        other = differences(settings or own, {key: own[key] for key in ("image_size", "tokens_per_tile")})
        if other:
            raise BadInput(f"{path}/ollm.json: the settings are not for this LVLM: {one_line(other, 200)}")
        if max(tokenizer.get_vocab().values()) >= len(lvlm.get_input_embeddings().weight):
            raise BadInput(f"{base}: the tokenizer has more tokens than the LVLM")
        if base == path:
            return OLLM(lvlm, tokenizer, settings or own)
        folder = Path(path)
        encoder = empty_encoder(folder)
        ollm = OLLM(lvlm, tokenizer, settings, encoder, load_extractor(folder, encoder))
        listening = nn.ModuleDict({"audio_encoder": ollm.audio_encoder, "projector": ollm.projector})
        load_weights(listening, stored_tensors(folder), folder)
    except UNLOADABLE as error:
        raise BadInput(f"{path}: the run does not load: {one_line(error, 300)}") from None
    return ollm
