"""Computes what the paper's trainings take, for its six bases and two newer ones. Runs nothing.

    python -m analysis.bench --plan                            # eight A100s of 80 GB
    python -m analysis.bench --plan --peak-share 0.3 --gb 40   # slower, with half the memory
    python -m analysis.bench --plan --cards 1 --gb 24 --peak-tflops 71 --whisper small

`python -m pytest tests/test_plan.py` compares the closed forms with torch's counts on tiny models.
A sample is given by its lengths: "tiles" (448 x 448) of the picture; tokens of "prefix"
(`<system><image>`), "teacher" (question in writing, answer; 0 if there is no teacher), "student"
(speech, answer) and "answers" alone; mel "frames" of the speech, 100 a second.
"""

from transformers import InternVLConfig, Qwen2VLConfig, WhisperConfig

from plumbing import tables

LLMS = {  # the LLM: transformers' type, width, layers, heads, key heads, MLP, vocabulary, tied?
    "internvl2-1b": ("qwen2", 896, 24, 14, 2, 4864, 151655, False),
    "internvl2-2b": ("llama", 2048, 24, 16, 8, 8192, 92553, False),
    "internvl2-4b": ("phi3", 3072, 32, 32, 32, 8192, 32020, False),
    "internvl2-8b": ("llama", 4096, 32, 32, 8, 14336, 92553, False),
    "qwen2-vl-2b": ("qwen2_vl_text", 1536, 28, 12, 2, 8960, 151936, True),
    "qwen2-vl-7b": ("qwen2_vl_text", 3584, 28, 28, 4, 18944, 152064, False),
    "internvl3-1b": ("qwen2", 896, 24, 14, 2, 4864, 151674, False),
    "internvl3.5-1b": ("qwen3", 1024, 28, 16, 8, 3072, 151936, False),  # heads of 128
}
WHISPER_LARGE_V3 = {"num_mel_bins": 128, "d_model": 1280, "encoder_layers": 32,
                    "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
WHISPER_SMALL = {"num_mel_bins": 80, "d_model": 768, "encoder_layers": 12,
                 "encoder_attention_heads": 12, "encoder_ffn_dim": 3072}
WHISPERS = {"large-v3": WHISPER_LARGE_V3, "small": WHISPER_SMALL}
SYSTEM_TOKENS = 40  # InternVL2's system message has about as many


def base_config(base):
    """Returns transformers' config of a base. Its vision encoder is the library's default."""
    llm_type, width, layers, heads, key_heads, mlp, vocabulary, tied = LLMS[base]
    llm = {"model_type": llm_type, "hidden_size": width, "num_hidden_layers": layers,
           "num_attention_heads": heads, "num_key_value_heads": key_heads,
           "intermediate_size": mlp, "vocab_size": vocabulary}
    make, vision = InternVLConfig, {"attention_bias": True, "use_mean_pooling": True}
    if llm_type == "qwen2_vl_text":
        make, vision = Qwen2VLConfig, {"hidden_size": width}  # what its projector leads to
    return make(text_config=llm, vision_config=vision, tie_word_embeddings=tied)


def kd_sample(tiles, teacher=121):
    """Returns a question of 4 s or 16 tokens, the prompt's 5, and an answer of 100 tokens."""
    return {"tiles": tiles, "prefix": SYSTEM_TOKENS + 256 * tiles, "teacher": teacher,
            "student": 205, "answers": 100, "frames": 400}


def asr_clip(seconds):
    """Returns speech (25 tokens a second), instruction and prompt (10), transcript (3 a second)."""
    return {"tiles": 0, "prefix": SYSTEM_TOKENS, "teacher": 0, "student": 28 * seconds + 10,
            "answers": 3 * seconds, "frames": 100 * seconds}


# ---- weights: of the linear maps alone, biases, norms and positions are 0.4 % at most ------------


def query_width(llm):
    """Returns the width of a layer's queries: all heads side by side. Qwen3's have 128 each."""
    head = getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads
    return head * llm.num_attention_heads


def key_width(llm):
    """Returns the width of a layer's keys: all key heads side by side."""
    return query_width(llm) // llm.num_attention_heads * llm.num_key_value_heads


def llm_weights(llm):
    """Returns the weights of an LLM's layer: queries, output, keys, values and the MLP's three."""
    heads = query_width(llm) + key_width(llm)
    return llm.hidden_size * (2 * heads + 3 * llm.intermediate_size)


def encoder_weights(width, mlp):
    """Returns the weights of an encoder's layer, for vision and for Whisper."""
    return 4 * width**2 + 2 * width * mlp


def vision_shape(config):
    """Returns (width, layers, width of the MLP, numbers in a patch, weights of the projector)."""
    vision, llm_width = config.vision_config, config.text_config.hidden_size
    if config.model_type == "qwen2_vl":  # every picture is doubled, as two frames of a film
        width, numbers = vision.embed_dim, 2 * 3 * vision.patch_size**2
        projector = (4 * width) ** 2 + 4 * width * llm_width  # four patches become a token
        return width, vision.depth, vision.mlp_ratio * width, numbers, projector
    width, numbers = vision.hidden_size, 3 * vision.patch_size[0] ** 2
    projector = 4 * width * llm_width + llm_width**2
    return width, vision.num_hidden_layers, vision.intermediate_size, numbers, projector


def base_parameters(config):
    """Returns the number of a base's parameters."""
    llm = config.text_config
    width, layers, mlp, numbers, projector = vision_shape(config)
    vision = layers * encoder_weights(width, mlp) + numbers * width + projector
    embeddings = llm.vocab_size * llm.hidden_size * (1 if config.tie_word_embeddings else 2)
    return vision + llm.num_hidden_layers * llm_weights(llm) + embeddings


def encoder_parameters(audio):
    """Returns the number of parameters of Whisper's encoder."""
    layers = audio.encoder_layers * encoder_weights(audio.d_model, audio.encoder_ffn_dim)
    return layers + 3 * audio.d_model * (audio.num_mel_bins + audio.d_model)


def trained_parameters(config, audio, part="audio"):
    """Returns the number of parameters of the linear projector and, of "audio", the encoder."""
    encoder = encoder_parameters(audio) if part == "audio" else 0
    return encoder + audio.d_model * config.text_config.hidden_size


# ---- FLOPs: two a multiplication, as torch counts ------------------------------------------------


def layer_flops(tokens, keys, width, weights):
    """Returns the FLOPs of a transformer layer: linear maps, scores and weighted values."""
    return 2 * tokens * weights + 2 * 2 * tokens * keys * width


def see_flops(config, tiles):
    """Returns the FLOPs of a picture's vision encoder and projector, forward.

    InternVL reads each tile apart, with a class token; Qwen2-VL reads all patches at once.
    """
    width, layers, mlp, numbers, projector = vision_shape(config)
    pieces, patches, class_tokens = 1, 32**2 * tiles, 0
    if config.model_type != "qwen2_vl":
        vision, class_tokens = config.vision_config, 1
        pieces, patches = tiles, (vision.image_size[0] // vision.patch_size[0]) ** 2
    tokens = patches + class_tokens
    encoder = layers * layer_flops(tokens, tokens, width, encoder_weights(width, mlp))
    return pieces * (2 * patches * numbers * width + encoder + 2 * patches // 4 * projector)


def hear_flops(config, audio, frames, part="audio", recompute=False):
    """Returns the FLOPs of a clip's audio encoder and projector, forward and backward.

    part: what is trained, see train.py; recompute: the layers are computed again, as on a GPU
    """
    width, positions, tokens = audio.d_model, frames // 2, frames // 4
    convolution_1 = 2 * frames * 3 * audio.num_mel_bins * width
    convolution_2 = 2 * positions * 3 * width**2
    weights = encoder_weights(width, audio.encoder_ffn_dim)
    layers = audio.encoder_layers * layer_flops(positions, positions, width, weights)
    projector = 2 * tokens * width * config.text_config.hidden_size

    # A frozen encoder needs no gradient, nor does its output: the projector's weights alone do.
    if part == "projector":
        return convolution_1 + convolution_2 + layers + 2 * projector

    # The spectrogram needs no gradient: for the first convolution, two products instead of three.
    # What is computed again stops at the input of a layer's last linear map.
    last_maps = audio.encoder_layers * 2 * positions * width * audio.encoder_ffn_dim
    again = layers - last_maps if recompute else 0
    return 2 * convolution_1 + 3 * (convolution_2 + layers + projector) + again


def step_flops(config, audio, tiles, prefix, teacher, student, answers, frames, **hearing):
    """Returns the FLOPs of a sample, forward and backward; hearing: options of hear_flops.

    Frozen weights take no gradient, so a linear map costs as much backward as forward. Attention
    costs twice as much, for the gradients of scores, values, queries and keys.
    """
    llm = config.text_config
    width, weights, keys = query_width(llm), llm_weights(llm), prefix + student
    layer = layer_flops(prefix, prefix, width, weights)
    layer += layer_flops(teacher, prefix + teacher, width, weights)
    layer += layer_flops(student, keys, width, weights)
    layer += 2 * student * weights + 2 * 2 * 2 * student * keys * width  # backward
    heads = (3 if teacher else 2) * 2 * answers * llm.hidden_size * llm.vocab_size  # one backward
    return (see_flops(config, tiles) + llm.num_hidden_layers * layer + heads
            + hear_flops(config, audio, frames, **hearing))


# ---- bytes: 2 a number in bfloat16, 4 in float32 -------------------------------------------------


def sample_bytes(config, audio, tiles, prefix, teacher, student, answers, frames, part="audio",
                 recompute=False):
    """Returns the bytes that a sample holds while its loss is computed: the most of a step."""
    # A layer of the LLM keeps what two norms read (float32), queries and attention's output, three
    # tensors of the MLP, keys and values for all heads, the mask as numbers. The prefix stays, too.
    llm, width, keys = config.text_config, query_width(config.text_config), prefix + student
    layer = student * (2 * 4 * llm.hidden_size + 2 * 2 * width + 3 * 2 * llm.intermediate_size)
    layer += keys * 2 * 2 * width + student * keys * 2 + prefix * 2 * 2 * key_width(llm)
    if llm.model_type == "qwen3":  # it also norms each head of queries and keys
        heads = llm.num_attention_heads + llm.num_key_value_heads
        layer += student * 4 * (width + key_width(llm) + heads)
    last_norm = student * 4 * llm.hidden_size

    # A layer of Whisper keeps what two norms read (float32), a copy of it for each of four linear
    # maps, queries, keys, values, output twice, the MLP twice; or, if all that is computed again,
    # its input. Around the layers: the spectrogram, two convolutions, a norm, the projector.
    positions, width = frames // 2, audio.d_model
    layer_of_whisper = (2 * 4 + 9 * 2) * width + 2 * 2 * audio.encoder_ffn_dim
    if recompute:
        layer_of_whisper = 4 * width
    hear = audio.encoder_layers * layer_of_whisper
    hear += 2 * 2 * audio.num_mel_bins + (5 * 2 + 4 + 1) * width
    if part == "projector":  # of a frozen encoder, the projector's input alone
        hear = width

    # A logit is there twice in bfloat16, six times in float32, and as a bit for "ruled out", a
    # byte; without a teacher, three times in float32.
    logit = 2 * 2 + 6 * 4 + 1 if teacher else 3 * 4
    return (llm.num_hidden_layers * layer + last_norm + positions * hear
            + answers * llm.vocab_size * logit)


def fixed_bytes(config, audio, part="audio"):
    """Returns the bytes of a process without any sample: frozen weights are in bfloat16.

    What is trained is there as weights, gradients (DDP's buckets are the same memory) and AdamW's
    two moments, and in bfloat16. CUDA and its libraries take 1 GB or so.
    """
    frozen = base_parameters(config) + (encoder_parameters(audio) if part == "projector" else 0)
    return 2 * frozen + (4 * 4 + 2) * trained_parameters(config, audio, part) + 1e9


# ---- the table -----------------------------------------------------------------------------------


def print_plan(args):
    """Prints memory, micro-batches and hours for every base, and last the paper's own hours.

    args: bench.py's; the machine is args.cards cards, the models args.whisper and args.train
    """
    audio, rows = WhisperConfig(**WHISPERS[args.whisper]), []
    how = {"part": args.train, "recompute": True}
    flops_per_hour = args.cards * args.peak_share * args.peak_tflops * 1e12 * 3600
    trainings = ((988_000, asr_clip(12)), (50_000, kd_sample(1, teacher=0)), (50_000, kd_sample(1)),
                 (50_000, kd_sample(7, teacher=0)), (50_000, kd_sample(7)))
    for base in LLMS:
        config = base_config(base)
        fixed = fixed_bytes(config, audio, args.train)
        sizes = [sample_bytes(config, audio, **sample, **how)
                 for sample in (kd_sample(7), asr_clip(15), asr_clip(30))]
        fits = [max(0, int((args.gb * 1e9 - fixed) // size)) for size in sizes]
        flops = [count * step_flops(config, audio, **sample, **how) for count, sample in trainings]
        rows.append([base, *(f"{size / 1e9:.2f}" for size in [fixed, *sizes]),
                     ", ".join(map(str, fits)),
                     *(f"{work / flops_per_hour:.2f}" for work in flops)])
    rows.append(["the paper", *[""] * 5, "4", "0.5", "1", "0.5", "1"])

    print(f"Computed, not measured: {args.cards} cards of {args.gb:g} GB, {100 * args.peak_share:g}"
          f" % of {args.peak_tflops:g} TFLOP/s each; Whisper {args.whisper}; trained: {args.train}."
          "\nHours: ASR of 988,000 clips of 12 s; SFT and Self-KD of 50,000 samples of 4 s, with "
          "answers of 100 tokens.\n")
    tables.print_table(
        ["base", "GB fixed", "+ a KD sample, 7 tiles", "+ ASR of 15 s", "+ ASR of 30 s",
         "micro-batches that fit", "h: ASR", "SFT, 1 tile", "Self-KD, 1 tile", "SFT, 7 tiles",
         "Self-KD, 7 tiles"], rows)
