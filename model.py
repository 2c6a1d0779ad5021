"""The omnimodal LLM: InternVL (or Qwen2-VL), Whisper's encoder and one linear projector.

image    -> vision encoder -> projector --.
                                          +-> <system><image>  <query>  <answer>  -> LLM -> answer
question -> word embeddings   (teacher) --+
speech   -> Whisper's encoder -> one linear projector   (student)

Teacher and student share their weights, the image precedes the question, and attention is causal.
So the keys and values of `<system><image>` are the same for both: `prefill` computes them once, and
`decode_query` continues from them with the written or the spoken question. The LVLM is frozen: the
prefix needs no gradient, and the teacher does not change. `forward` is the whole method.

`python -m pytest tests/test_model.py` compares the shared prefix with two full passes in float64.
A batch is what `data.collate` returns. Letters in shape comments:
    B rows of a batch   P prefix tokens   S tokens of query and answer   A audio tokens
    N answer tokens in the batch   V vocabulary   D width of the LLM   E width of the audio encoder
    M mel bins   L mel frames   T tokens of any kind   H, W height and width of a picture
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from data import AUDIO_PLACEHOLDER, FRAMES_PER_TOKEN, IGNORE, collate
from loss import self_kd_loss
from plumbing import runs
from plumbing.files import BadInput, at
from plumbing.parts import loss_in_parts
from plumbing.prepared import speech_settings
from plumbing.processes import freeze_in_bfloat16, half_precision, to_device
from real import checkpoints
from real.families import CHATS, normalize, prefix_positions, prompt_settings
from world.models import build_audio_encoder, build_lvlm


class Prefix(NamedTuple):
    """The LLM's state after `<system><image>`; in generation also after what followed."""
    cache: object  # transformers' cache of keys and values
    mask: torch.Tensor  # (B, P) bool, False is padding
    shift: object  # next position minus tokens: 0, or (B, 1) for Qwen2-VL, whose pictures take less


class OLLM(nn.Module):
    """An LVLM with Whisper's encoder and one linear projector, or without them a plain LVLM.

    lvlm           transformers' InternVLForConditionalGeneration, or Qwen2VL...
    tokenizer      its tokenizer
    base           folder or hub id of the lvlm; None if the lvlm itself is trained
    audio_encoder  transformers' WhisperEncoder; mel_extractor: its WhisperFeatureExtractor
    whisper        folder or hub id of the audio encoder; None if it is trained itself
    settings       how prompts are made: PromptSettings of real/families.py
    """

    def __init__(self, lvlm, tokenizer, settings, base=None, audio_encoder=None,
                 mel_extractor=None, whisper=None):
        super().__init__()
        self.lvlm, self.tokenizer, self.settings, self.base = lvlm, tokenizer, settings, base
        self.audio_encoder, self.mel_extractor = audio_encoder, mel_extractor
        self.whisper = whisper
        self.recompute = False  # encode_audio's layers in the backward pass: saves a GPU's memory
        if hasattr(audio_encoder, "proj"):  # an omni model's own encoder, which ends with it
            self.projector = audio_encoder.proj
        elif audio_encoder is not None:
            width = lvlm.config.text_config.hidden_size
            # The "one-layer MLP" of section 5.1, here without a hidden layer: E to D
            self.projector = nn.Linear(audio_encoder.config.d_model, width)

    def train_only(self, stage, part="audio"):
        """Freezes all but the LVLM (vision-text), or all but audio encoder and projector (App. A).

        part: "audio", or "projector" to freeze the audio encoder, too
        """
        self.requires_grad_(False)
        if stage == "vision-text":
            self.lvlm.requires_grad_(True)
        else:
            self.audio_encoder.requires_grad_(part == "audio")
            self.projector.requires_grad_(True)
            for name in ("embed_positions", "audio_bos_eos_token"):  # sinusoids; unused
                if hasattr(self.audio_encoder, name):
                    getattr(self.audio_encoder, name).requires_grad_(False)

    def move_to(self, device):
        """Moves the model to a device. On a GPU, frozen parts are kept in bfloat16."""
        self.to(device)
        self.recompute = self.lvlm.device.type == "cuda"
        if self.recompute:
            freeze_in_bfloat16(self)
        return self

    # ---- encoders --------------------------------------------------------------------------------

    def encode_images(self, pixels):
        """Returns the image tokens (of all pictures, D) of a batch; see `data.picture_inputs`."""
        if pixels["pixel_values"].dtype == torch.uint8:  # Qwen2-VL's patches come normalised
            pixels = {"pixel_values": normalize(pixels["pixel_values"])}  # (tiles, 3, H, W)
        features = self.lvlm.get_image_features(**pixels)
        if hasattr(features, "deepstack_features"):  # ignored, they would give wrong numbers
            raise BadInput("not supported: an LVLM whose picture enters deeper layers (deepstack)")
        return torch.cat([*features.pooler_output])  # a tile each, or a Qwen2-VL picture each

    def encode_audio(self, mel, n_frames):
        """Returns the audio tokens (B, A, D), A = L / 4, of log-mel spectrograms (B, M, L).

        n_frames (B,): frames of each clip, without padding. The layers are Whisper's own conv1,
        conv2 (a GELU after each), embed_positions, layers and layer_norm, on the speech's real
        length instead of 30 s; then pairs of frames are averaged and projected. Padding is masked,
        so a clip's tokens do not depend on its batch. Tokens beyond n_frames / 4 are padding.
        Without speech (mel is None) returns None.
        """
        if mel is None:
            return None

        # An omni model's own encoder returns the clips' tokens one after another.
        if hasattr(self.audio_encoder, "proj"):
            is_speech = torch.arange(mel.size(2), device=mel.device) < n_frames[:, None]  # (B, L)
            x = self.lvlm.get_audio_features(mel, is_speech.long()).last_hidden_state  # (all, D)
            clips = x.split((n_frames // FRAMES_PER_TOKEN).tolist())
            return pad_sequence(clips, batch_first=True)  # (B, A, D)

        # Whisper's two convolutions; the second halves the number of frames. A clip has a multiple
        # of 4 frames, so padding does not reach its tokens.
        encoder = self.audio_encoder
        x = F.gelu(encoder.conv1(mel.to(encoder.conv1.weight.dtype)))  # (B, E, L)
        x = F.gelu(encoder.conv2(x)).transpose(1, 2)  # (B, L / 2, E)
        x = x + encoder.embed_positions.weight[: x.size(1)]

        # Its transformer layers. Without a mask, attention is faster. On a GPU, what they compute
        # would fill the memory: it is not kept for the backward pass, but computed again.
        padding = torch.arange(x.size(1), device=x.device) >= n_frames[:, None] // 2  # (B, L / 2)
        mask = None
        if padding.any():
            mask = torch.zeros_like(padding, dtype=x.dtype)
            mask = mask.masked_fill(padding, torch.finfo(x.dtype).min)[:, None, None, :]
        recompute = self.recompute and x.requires_grad
        for layer in encoder.layers:
            # (B, L / 2, E) throughout
            x = checkpoint(layer, x, mask, use_reentrant=False) if recompute else layer(x, mask)
        x = encoder.layer_norm(x)

        # Pairs of frames are averaged, as in Qwen2-Audio (Whisper's to 25 a second), and projected.
        x = x.unflatten(1, (-1, 2)).mean(2)  # (B, A, E)
        return self.projector(x)  # (B, A, D)

    def embed(self, ids, pixels=None, audio_tokens=None):
        """Returns embeddings (B, T, D) of ids (B, T), with image and audio tokens in place.

        pixels: the pictures of all rows; audio_tokens: (B, A, D), with padding
        """
        # AUDIO_PLACEHOLDER is not in the vocabulary: 0 stands in until the audio tokens come.
        is_audio = ids == AUDIO_PLACEHOLDER  # (B, T)
        x = self.lvlm.get_input_embeddings()(ids.masked_fill(is_audio, 0))  # (B, T, D)

        if pixels is not None:
            is_image = ids == self.lvlm.config.image_token_id  # (B, T)
            image = self.encode_images(pixels)  # (image tokens in the batch, D)
            assert is_image.sum() == len(image), "as many image placeholders as image tokens"
            x = x.masked_scatter(is_image[..., None], image.to(x.dtype))

        if audio_tokens is not None:
            places = torch.arange(audio_tokens.size(1), device=x.device)  # (A,)
            is_speech = places < is_audio.sum(1, keepdim=True)  # (B, A), the rest is padding
            x = x.masked_scatter(is_audio[..., None], audio_tokens[is_speech].to(x.dtype))
        return x

    # ---- one image prefix, two questions, one answer ---------------------------------------------

    def prefill(self, batch):
        """Reads `<system><image>` once. Returns the Prefix that each question continues."""
        ids, mask = batch["prefix"]["ids"], batch["prefix"]["mask"]  # (B, P), padded on the right
        positions, shift = prefix_positions(self.lvlm, ids, mask, batch["pixels"])
        out = self.lvlm.model.language_model(
            inputs_embeds=self.embed(ids, batch["pixels"]), attention_mask=mask,
            position_ids=positions, use_cache=True)
        return Prefix(out.cache, mask, shift)

    def decode_query(self, prefix, query, audio_tokens=None):
        """Reads a query, and its answer if there is one, after the prefix.

        audio_tokens: (B, A, D) of a spoken query; None for a written one
        Returns (hidden states (B, S, D), the longer Prefix). The prefix itself stays as it is, and
        may need a gradient. Its shift is added to all positions that follow.
        In the built-in base's lessons (world/lessons.py) a query may have "positions" (B, S), from
        the prefix's end, in place of 0, 1, 2, ...; and with or without these "document_ids" (B, S),
        which number a row's questions: a token sees the prefix and its own document before it.
        """
        # A cache grows, so each query continues a copy. The tensors are shared: growing makes new
        # ones.
        cache = copy.copy(prefix.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]

        # Positions go on from the prefix's real length: padding takes no position.
        mask = torch.cat([prefix.mask, query["mask"]], dim=1)  # (B, P + S)
        positions = (query["mask"].cumsum(1) - 1).clamp(min=0)  # (B, S)

        # Packed questions do not see each other.
        if "document_ids" in query:
            ids = query["document_ids"]  # (B, S)
            own = (ids[:, :, None] == ids[:, None]).tril()  # (B, S, S)
            before = prefix.mask[:, None].expand(-1, own.size(1), -1)  # (B, S, P)
            mask = torch.cat([before, own], dim=2)[:, None]  # (B, 1, S, P + S)
        positions = query.get("positions", positions)

        # The LLM reads on.
        positions = prefix.mask.sum(1, keepdim=True) + prefix.shift + positions  # (B, S)
        out = self.lvlm.model.language_model(
            inputs_embeds=self.embed(query["ids"], audio_tokens=audio_tokens),
            attention_mask=mask, position_ids=positions, cache=cache, use_cache=True)
        return out.last_hidden_state, Prefix(cache, mask, prefix.shift)

    def answer_logits(self, prefix, query, audio_tokens=None, head=None):
        """Returns logits (N, V) at the positions that predict the answer, and its tokens (N,).

        They are in row order: the n-th of teacher and student predict the same token, whatever the
        lengths of the questions. The head is applied to these positions alone, which are few.
        head: another one than the LLM's; nn.Identity() gives the states (N, D) that it takes
        """
        hidden, _ = self.decode_query(prefix, query, audio_tokens)  # (B, S, D)
        labels = query["labels"][:, 1:]  # (B, S - 1): the position before a token predicts it
        is_answer = labels != IGNORE  # (B, S - 1)
        logits = (head or self.lvlm.lm_head)(hidden[:, :-1][is_answer])  # (N, V)
        return logits, labels[is_answer]

    def forward(self, batch, alpha, temperature=1.0, n_tokens=None):
        """Computes the paired-input loss (Eq. 3). Returns (loss, kl, ce); see loss.py."""
        prefix = self.prefill(batch)

        # The student hears the question. (In vision-text there is no speech: it reads.)
        audio_tokens = self.encode_audio(batch["mel"], batch["n_frames"])  # (B, A, D)
        query, states = batch["audio"] or batch["text"], nn.Identity()
        student, labels = self.answer_logits(prefix, query, audio_tokens, states)  # (N, D), (N,)

        # The teacher, with the same weights, reads it. It gets no gradient.
        teacher = None
        if alpha > 0:
            with torch.no_grad():
                teacher, teacher_labels = self.answer_logits(prefix, batch["text"], head=states)
            assert torch.equal(teacher_labels, labels), "both are scored on the same answer tokens"

        # Logits of many answers would fill the memory: the head is applied to parts of them.
        return loss_in_parts(self_kd_loss, self.lvlm.lm_head, student, teacher, labels, alpha,
                             temperature, n_tokens)

    # ---- answering -------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, prefix, query, audio_tokens=None, max_new_tokens=48, keep_end=False):
        """Returns greedy answers, a string a row. The query is padded on the left.

        keep_end: leave the end mark on answers that reached it
        """
        end = self.tokenizer.convert_tokens_to_ids(CHATS[self.settings.chat]["end"])
        answers = torch.empty_like(query["ids"][:, :0])  # (B, tokens so far)

        # All tokens but the last new one are inputs, too, and must fit.
        n_read = int((prefix.mask.sum(1) + query["mask"].sum(1)).max())
        max_new_tokens = min(max_new_tokens, self.tokenizer.model_max_length - n_read + 1)
        while answers.size(1) < max_new_tokens and not (answers == end).any(1).all():
            hidden, prefix = self.decode_query(prefix, query, audio_tokens)
            token = self.lvlm.lm_head(hidden[:, -1]).argmax(-1, keepdim=True)  # (B, 1)
            answers = torch.cat([answers, token], dim=1)

            # The next query is this token alone: everything before it is in the prefix now.
            query = {"ids": token, "mask": torch.ones_like(token, dtype=torch.bool)}
            audio_tokens = None

        # An answer ends with its end mark.
        rows = []
        for row in answers.tolist():
            if end in row:
                stop = row.index(end)
                row = row[: stop + 1] if keep_end else row[:stop]
            rows.append(row)
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=not keep_end)
        return [text.strip() for text in texts]

    @torch.no_grad()
    def answer(self, samples, forms=("text", "audio"), **options):
        """Answers a list of samples, as text and as speech. Returns {form: [answer, ...]}."""
        mel_extractor = self.mel_extractor if "audio" in forms else None
        batch = collate(samples, self.tokenizer, mel_extractor, self.settings, answers=False)
        batch, answers = to_device(batch, self.lvlm.device), {}
        with half_precision(self.lvlm.device):
            prefix = self.prefill(batch)
            if "text" in forms:
                answers["text"] = self.generate(prefix, batch["text"], **options)
            if "audio" in forms:
                audio_tokens = self.encode_audio(batch["mel"], batch["n_frames"])  # (B, A, D)
                answers["audio"] = self.generate(prefix, batch["audio"], audio_tokens, **options)
        return answers

    # ---- from disk (plumbing/runs.py writes runs) ------------------------------------------------

    @classmethod
    def load(cls, run, device="cpu"):
        """Reads a run folder, all frozen, or an LVLM's folder or hub id, without audio parts."""
        with at(run):
            info, base, whisper = runs.checked_sources(run)

            # The LVLM, from the base.
            lvlm = checkpoints.load_lvlm(base, device=device)
            settings = prompt_settings(lvlm, info["settings"])
            tokenizer = checkpoints.load_tokenizer(base, lvlm.config.text_config, settings.chat)
            parts = checkpoints.own_audio_encoder(lvlm)
            if base == run:
                ollm = cls(lvlm, tokenizer, settings, base, *parts, whisper=base if parts else None)
                return ollm.requires_grad_(False).move_to(device)

            # The trained parts, from the run; names must match.
            if not parts and whisper == run:
                parts = checkpoints.empty_audio_encoder(run)
            elif not parts:
                parts = checkpoints.load_audio_encoder(whisper)
            ollm = cls(lvlm, tokenizer, settings, base, *parts, whisper)
            own = runs.own_parts(ollm, whisper == run)
            own.load_state_dict(load_file(Path(run) / "model.safetensors"))
            return ollm.requires_grad_(False).to(device)


def start_model(config, device="cpu"):
    """Returns the OLLM that a stage starts from; only what the stage trains has gradients."""
    torch.manual_seed(config.seed)
    stage = config.stage
    ollm = OLLM(*build_lvlm()) if stage == "vision-text" else OLLM.load(config.init, device)

    # The stage audio-text gives the LVLM an audio encoder; vision-audio must find one.
    if stage == "audio-text" and checkpoints.own_audio_encoder(ollm.lvlm):
        raise BadInput(f"{config.init}: hears already; its only stage is vision-audio")
    if stage == "audio-text" and ollm.audio_encoder is None:
        whisper = config.whisper
        parts = checkpoints.load_audio_encoder(whisper) if whisper else build_audio_encoder()
        ollm = OLLM(ollm.lvlm, ollm.tokenizer, ollm.settings, ollm.base, *parts, whisper)
    if stage == "vision-audio" and ollm.audio_encoder is None:
        raise BadInput(f"{config.init}: has no audio encoder; vision-audio starts from an "
                       "audio-text run")

    # Kept in the run, so that evaluation prepares questions as training did.
    for key in ("max_tiles", "audio_seconds"):
        if getattr(config, key) is not None:
            setattr(ollm.settings, key, getattr(config, key))
    if stage == "vision-audio":
        ollm.settings = replace(ollm.settings, **speech_settings(config.data))
    ollm.train_only(stage, config.train)
    if config.train == "audio":
        ollm.whisper = None
    return ollm.eval()  # no dropout, so teacher and student differ in the question alone
