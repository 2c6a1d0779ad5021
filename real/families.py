"""What differs between LVLM families: chat format, special tokens, picture patches, positions.

CHATS has a row for each chat format (the setting "chat"): the exact text around a question that
the LVLM was trained with. config.json names it: OpenGVLab's by "template", transformers' by
"model_type". A new LVLM needs a row here, and its parameters' names in checkpoints.py. There is
nothing to run here.
"""

from dataclasses import asdict, dataclass

import torch

from plumbing.files import BadInput, at

# By preset: hub id, and how many clips of 30 s audio-text takes at once on 80 GB
BASES = {
    "internvl2-1b": ("OpenGVLab/InternVL2-1B", 16),
    "internvl2-2b": ("OpenGVLab/InternVL2-2B", 16),
    "internvl2-4b": ("OpenGVLab/InternVL2-4B", 16),
    "internvl2-8b": ("OpenGVLab/InternVL2-8B", 8),
    "qwen2-vl-2b": ("Qwen/Qwen2-VL-2B-Instruct", 16),
    "qwen2-vl-7b": ("Qwen/Qwen2-VL-7B-Instruct", 8),
    # Not of the paper
    "qwen2.5-vl-3b": ("Qwen/Qwen2.5-VL-3B-Instruct", 16),
    "internvl3-1b": ("OpenGVLab/InternVL3-1B-hf", 16),
    "internvl3.5-1b": ("OpenGVLab/InternVL3_5-1B-HF", 16),
    # Omni models hear already: their only stage is vision-audio
    "qwen2.5-omni-3b": ("Qwen/Qwen2.5-Omni-3B", None),
    "qwen2.5-omni-7b": ("Qwen/Qwen2.5-Omni-7B", None),
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCHES_PER_TOKEN = 4  # of a Qwen2-VL: 2 x 2 patches of 14 x 14 pixels

INTERNVL2 = {
    "system": ("你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
               "英文名叫InternVL, 是一个有用无害的人工智能助手。"),
    "before": "<|im_start|>system\n{}<|im_end|><|im_start|>user\n",
    "image": ("<img>", "<IMG_CONTEXT>", "</img>\n"),
    "generation_prompt": "<|im_end|><|im_start|>assistant\n",
    "end": "<|im_end|>"}
QWEN2_VL = {
    "system": "You are a helpful assistant.",
    "before": "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n",
    "image": ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    "generation_prompt": "<|im_end|>\n<|im_start|>assistant\n",
    "end": "<|im_end|>"}
CHATS = {
    # InternVL2-1B, and the built-in world
    "Hermes-2": INTERNVL2,
    # InternVL2-2B and -8B: InternLM2
    "internlm2-chat": INTERNVL2 | {"before": "<s>" + INTERNVL2["before"]},
    # InternVL2-4B. The blank is a token of its own, which the original tokenizer puts there.
    "phi3-chat": INTERNVL2 | {
        "before": "<s> <|system|>\n{}<|end|><|user|>\n",
        "generation_prompt": "<|end|><|assistant|>\n",
        "end": "<|end|>"},
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_VL,
    # Speech has marks of its own around it.
    "qwen2_5_omni_thinker": QWEN2_VL | {
        "image": ("<|vision_bos|>", "<|IMAGE|>", "<|vision_eos|>"),
        "audio": ("<|audio_bos|>", "<|audio_eos|>")},
    # InternVL3 and 3.5 in transformers' own layout. Their processors write no system message.
    "internvl": INTERNVL2 | {
        "system": "",
        "before": "<|im_start|>user\n",
        "generation_prompt": QWEN2_VL["generation_prompt"]},
}
OLD_CHATS = {  # what earlier versions of this code called them in a run's ollm.json: "llm"
    "qwen2": "Hermes-2", "llama": "internlm2-chat", "phi3": "phi3-chat",
    "qwen2_vl_text": "qwen2_vl", "qwen2_5_vl_text": "qwen2_5_vl"}


@dataclass(slots=True)  # slots: a misspelt name is an error
class PromptSettings:
    """How a prompt is made. A run keeps it in its ollm.json, without what is None."""
    chat: str = "Hermes-2"  # a row of CHATS
    system: str = ""  # the system message
    instruction: str = "Transcribe the speech."  # follows speech to be transcribed; ours
    image_size: int = 448  # side of a tile in pixels
    tokens_per_tile: int = 256  # image tokens of a tile
    max_tiles: int = 6  # most tiles of a picture, the thumbnail not counted
    min_tiles: int | None = None  # Qwen2-VL only: least area, in tiles
    audio_seconds: float | None = None  # pad speech to so many; None: its own length
    suffix: str | None = None  # how format suffixes were asked in training: plumbing/prepared.py
    tts: str | None = None  # what spoke the questions of training
    voice: str | None = None  # its voice

    def to_json(self):
        """Returns the settings as a dict for JSON."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def lvlm_settings(lvlm):
    """Returns the PromptSettings of a real LVLM.

    Raises BadInput for an unknown chat format, which would silently lower the scores.
    """
    llm, vision = lvlm.config.text_config.model_type, lvlm.config.vision_config
    chat = getattr(lvlm.config, "template", None) or lvlm.config.model_type
    if chat not in CHATS or chat == "internvl" and llm not in ("qwen2", "qwen3"):
        raise BadInput(f"an LVLM with the LLM {llm} and the chat {chat}; supported are InternVL2 "
                       "of 1B to 8B in OpenGVLab's layout, InternVL3 and 3.5 with Qwen's LLMs in "
                       "transformers' (-hf), Qwen2-VL, 2.5-VL and 2.5-Omni")
    # Qwen2-VL does not tile. Its 448 x 448 pixels are as many tokens as InternVL's tile.
    if not hasattr(vision, "image_size"):
        return PromptSettings(chat, CHATS[chat]["system"], min_tiles=1)
    return PromptSettings(chat, CHATS[chat]["system"], image_size=vision.image_size[0],
                          tokens_per_tile=lvlm.config.image_seq_length)


def prompt_settings(lvlm, stored):
    """Returns the PromptSettings of a run's ollm.json (a dict), or if None those of its LVLM."""
    if stored is None:
        return lvlm_settings(lvlm)
    if "llm" in stored:  # written by an earlier version
        stored["chat"] = OLD_CHATS[stored.pop("llm")]
    return PromptSettings(**stored)


def prompt_ids(tokenizer, settings, image_tokens, questions):
    """Returns the chat prompts as token ids: (prefixes, questions, generation prompt).

    A prefix is everything before the question, the image included. The generation prompt stands
    between question and answer. The written or the spoken question goes between the two. Each
    prompt is tokenised whole and then cut; a token that spans a cut is an error.
    """
    # The prompts as text.
    chat = CHATS[settings.chat]
    opening, mark, closing = chat["image"]
    before, prompts = [], []
    for n, question in zip(image_tokens, questions):
        prefix = chat["before"].format(settings.system)
        if n:
            prefix += opening + mark * n + closing
        before.append(prefix)
        prompts.append(prefix + question.strip() + chat["generation_prompt"])

    # The same as ids, cut in three.
    ending = generation_prompt_ids(tokenizer, settings)
    prefix_ids = tokenizer(before).input_ids
    question_ids = []
    for prefix, ids, question in zip(prefix_ids, tokenizer(prompts).input_ids, questions):
        if ids[: len(prefix)] != prefix or ids[-len(ending):] != ending:
            raise BadInput(f"the tokenizer merges {question!r:.200} with what stands around it")
        question_ids.append(ids[len(prefix): -len(ending)])
    return prefix_ids, question_ids, ending


def generation_prompt_ids(tokenizer, settings):
    """Returns the ids of what stands between question and answer."""
    return tokenizer(CHATS[settings.chat]["generation_prompt"]).input_ids


def audio_mark_ids(tokenizer, settings):
    """Returns the ids of what stands before and behind speech: nothing, but in omni models."""
    return tokenizer(list(CHATS[settings.chat].get("audio", ("", "")))).input_ids


def tile(image, max_tiles, size=448, thumbnail=True):
    """Cuts a picture by InternVL2's dynamic tiling into at most `max_tiles` squares.

    The grid is the one whose aspect ratio is nearest the picture's. Returns a list of size x size
    PIL images, row by row; if there is more than one, a thumbnail of the whole comes last.
    """
    # Of two grids that are equally near, the larger wins if the picture has pixels enough for it.
    width, height = image.size
    best, columns, rows = float("inf"), 1, 1
    for area in range(1, max_tiles + 1):
        for c in range(1, area + 1):
            if area % c:
                continue
            r = area // c
            distance = abs(width / height - c / r)  # floats as in the original: ties depend on it
            is_large = width * height > 0.5 * size * size * c * r
            if distance < best or (distance == best and is_large):
                best, columns, rows = distance, c, r

    # Bicubic stretching to the grid changes the aspect ratio, as in the original.
    whole = image.resize((size * columns, size * rows))
    tiles = []
    for r in range(rows):
        for c in range(columns):
            left, top = size * c, size * r
            tiles.append(whole.crop((left, top, left + size, top + size)))

    if thumbnail and len(tiles) > 1:
        tiles.append(image.resize((size, size)))
    return tiles


def picture_patches(image, settings):
    """Returns a picture as Qwen2-VL takes it: {"pixel_values" (N, 1176), "image_grid_thw" (1, 3)}.

    The whole picture, at nearly its aspect ratio, with the area of min_tiles to max_tiles tiles.
    """
    from transformers import Qwen2VLImageProcessorPil  # seconds, which other LVLMs need not wait

    area = settings.image_size ** 2
    size = {"shortest_edge": settings.min_tiles * area,  # transformers calls these areas edges
            "longest_edge": settings.max_tiles * area}
    with at("the picture"):  # one that is 200 times as long as wide is refused
        return dict(Qwen2VLImageProcessorPil(size=size)(image, return_tensors="pt"))


def normalize(tiles):
    """Normalizes tiles (tiles, 3, H, W) uint8 to the float32 that InternVL's encoder expects."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=tiles.device)[..., None, None]
    return (tiles / 255 - mean) / std


def join_pictures(samples):
    """Returns the samples' pictures, each a dict of tensors, as one such dict; None without any."""
    pictures = [sample["pixels"] for sample in samples if "pixels" in sample]
    if not pictures:
        return None
    return {key: torch.cat([picture[key] for picture in pictures]) for key in pictures[0]}


def count_image_tokens(pixels, settings):
    """Returns how many tokens a picture becomes; no picture (None) becomes 0."""
    if pixels is None:
        return 0
    if "image_grid_thw" in pixels:
        return len(pixels["pixel_values"]) // PATCHES_PER_TOKEN
    return len(pixels["pixel_values"]) * settings.tokens_per_tile


def prefix_positions(lvlm, ids, mask, pixels):
    """Returns the positions of ids (B, T), and the shift of those that follow: (B, 1), or 0.

    Padding takes no position. Qwen2-VL has three per token (3, B, T): equal in text; time, row and
    column in a picture, which advances the position by the tokens of its longer side.
    """
    if not hasattr(lvlm.model, "get_rope_index"):
        return (mask.cumsum(1) - 1).clamp(min=0), 0
    grid = (pixels or {}).get("image_grid_thw")
    if hasattr(lvlm.model, "audio_tower"):
        # Audio tokens take a position each, as text does.
        ids = ids.masked_fill(ids == lvlm.config.audio_start_token_id, 0)
        positions, shift = lvlm.model.get_rope_index(ids, grid, attention_mask=mask)
        return positions, shift.view(-1, 1)
    is_image = (ids == lvlm.config.image_token_id).int()  # (B, T)
    return lvlm.model.get_rope_index(ids, is_image, grid, attention_mask=mask)


def check_length(sample, n_tokens, n_image, settings, tokenizer):
    """Raises BadInput if a prompt of n_tokens, n_image of them the picture's, is over the limit."""
    limit = tokenizer.model_max_length
    if n_tokens > limit:
        where = sample.get("where", "the question")
        tiles = (limit - n_tokens + n_image) // settings.tokens_per_tile
        if settings.min_tiles is None and tiles > 1:
            tiles -= 1  # the thumbnail is one, too
        fits = f"; --max-tiles {tiles} fits" if n_image and tiles > 0 else ""
        raise BadInput(f"{where}: {n_tokens:,} tokens, the model has room for {limit:,}{fits}")
