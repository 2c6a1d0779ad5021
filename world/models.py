"""The built-in world's models: tiny configurations of the real classes, with random weights.

There is nothing to run here; `train.py` builds them.
"""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from plumbing.files import BadInput
from real.families import PromptSettings
from world import shapes

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
POSITIONS = 2048  # of the LLM


def build_tokenizer():
    """Returns a tokenizer with a token a word, and InternVL2's special tokens and chat prompt."""
    words = ["<unk>", *SPECIAL_TOKENS, "\n", "system", "user", "assistant", *shapes.vocabulary()]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Lowercase(), normalizers.Replace("colour", "color"),
        *(normalizers.Replace(mark, "") for mark in "?.!,")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<|endoftext|>",
        eos_token="<|im_end|>", additional_special_tokens=[*SPECIAL_TOKENS, "\n"],
        clean_up_tokenization_spaces=False, model_max_length=POSITIONS)


def check_words(tokenizer, text):
    """Raises BadInput if a text is empty or has a word that the tokenizer does not know."""
    if not text.strip():
        raise BadInput("the question is empty")
    unknown = [w for w in text.split() if tokenizer.unk_token_id in tokenizer(w).input_ids]
    if unknown:
        words = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
        raise BadInput(f"the built-in world does not know {', '.join(map(repr, unknown))}; its "
                       f"words are: {' '.join(words)}")


def build_lvlm():
    """Returns (lvlm, tokenizer, settings): InternVL and Qwen2 with 1.0 M parameters."""
    # Layer scale and init are larger than the usual 0.1 and 0.02: a model this narrow would train
    # slowly with those.
    tokenizer = build_tokenizer()
    vision = dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=384,
                  image_size=[shapes.SIZE] * 2, patch_size=[16, 16], attention_bias=True,
                  use_mean_pooling=True, layer_scale_init_value=0.5, initializer_range=0.08)
    text = dict(model_type="qwen2", vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=4, intermediate_size=256,
                max_position_embeddings=POSITIONS, initializer_range=0.08)
    image_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=image_token_id,
                            image_seq_length=4, tie_word_embeddings=False)  # it ties by default
    lvlm = InternVLForConditionalGeneration(config)

    with torch.no_grad():
        # InternVL initialises position embeddings to 0, which is too small beside the patches for
        # long. Here the patches of a row of cells share one random direction, those of a column
        # another: without it, left and right are learned late.
        positions = lvlm.model.vision_tower.embeddings.position_embeddings  # (1, 1 + 4 * 4, 96)
        nn.init.normal_(positions, std=0.3)
        cells = torch.randn(2, 1, 96) + torch.randn(1, 2, 96)  # (2, 2, 96)
        positions[0, 1:] += cells.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten(0, 1)
        # The head starts as a copy of the embeddings: words are grounded in pictures sooner.
        lvlm.lm_head.weight.copy_(lvlm.get_input_embeddings().weight)
    settings = PromptSettings("Hermes-2", "", shapes.INSTRUCTION, shapes.SIZE, tokens_per_tile=4,
                              max_tiles=1)
    return lvlm, tokenizer, settings


def build_audio_encoder():
    """Returns Whisper's encoder with two layers and 40 mel bins, and its feature extractor."""
    config = WhisperConfig(num_mel_bins=40, d_model=128, encoder_layers=2,
                           encoder_attention_heads=4, encoder_ffn_dim=512,
                           max_source_positions=1500, init_std=0.04)
    return WhisperEncoder(config), WhisperFeatureExtractor(feature_size=40)
