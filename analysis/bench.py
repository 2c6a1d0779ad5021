"""Measures the cost of a Self-KD step against the naive two full passes.

    python -m analysis.bench                             # true widths, a quarter of the layers
    python -m analysis.bench --size shapes --rounds 20   # the built-in world's models, in seconds
    python -m analysis.bench --layers 1 --batch 8        # full depth: for a GPU
    python -m analysis.bench --json | tail -n 1          # the same numbers as one line of JSON

The naive implementation runs the model on two whole sequences, with speech padded to Whisper's
30 s. Three savings are added one at a time; the exact ones are first checked in float64:

    + shared prefix        `<system><image>` is encoded once for both (exact)
    + answer-only head     logits only at positions that predict the answer (exact)
    + real audio length    speech is not padded to 30 s (approximation)

Weights are random: time does not depend on them. Letters in shape comments:
    B batch   P prefix tokens   S tokens of query and answer   T tokens of both   A audio tokens
    N answer tokens in the batch   V vocabulary   D width of the LLM   W width of the audio encoder
"""

import argparse
import contextlib
import copy
import itertools
import json
import statistics
import time
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import InternVLForConditionalGeneration, WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import data
from data import AUDIO_PLACEHOLDER, IGNORE
from loss import self_kd_loss
from model import OLLM
from plumbing import processes, tables
from plumbing.files import in_range, readable_errors
from real.checkpoints import native_config
from real.families import lvlm_settings
from world.models import build_audio_encoder, build_lvlm

INTERNVL2_1B = {  # what matters here of its config.json
    "model_type": "internvl_chat", "downsample_ratio": 0.5, "ps_version": "v2", "select_layer": -1,
    "template": "Hermes-2",
    "vision_config": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                      "intermediate_size": 4096, "image_size": 448, "patch_size": 14,
                      "num_channels": 3, "hidden_act": "gelu", "norm_type": "layer_norm",
                      "layer_norm_eps": 1e-6, "qkv_bias": True, "qk_normalization": False},
    "llm_config": {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 896,
                   "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
                   "intermediate_size": 4864, "vocab_size": 151655, "hidden_act": "silu",
                   "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768}}
WHISPER_LARGE_V3 = {"num_mel_bins": 128, "d_model": 1280, "encoder_layers": 32,
                    "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
SYSTEM_TOKENS = 40  # InternVL2's system message has about as many
ALPHA = 0.75


# ---- naive ---------------------------------------------------------------------------------------


def naive_pass(ollm, batch, form):
    """Runs the native model over whole sequences (B, T), all of one length: nothing is padded.

    Returns (logits (B, T, V) at every position, labels (B, T): the token that each should predict).
    """
    prefix, query = batch["prefix"], batch[form]
    assert prefix["mask"].all() and query["mask"].all(), "sequences of one length only"
    ids = torch.cat([prefix["ids"], query["ids"]], dim=1)  # (B, T)
    x = ollm.lvlm.get_input_embeddings()(ids.clamp(min=0))  # (B, T, D)
    image_placeholders = (ids == ollm.lvlm.config.image_token_id)[..., None]  # (B, T, 1)
    x = x.masked_scatter(image_placeholders, ollm.encode_images(batch["pixels"]).to(x.dtype))
    if form == "audio":
        audio_placeholders = (ids == AUDIO_PLACEHOLDER)[..., None]  # (B, T, 1)
        x = x.masked_scatter(audio_placeholders, naive_encode_audio(ollm, batch).to(x.dtype))

    no_labels = torch.full_like(prefix["ids"], IGNORE)  # (B, P)
    labels = torch.cat([no_labels, query["labels"]], dim=1)  # (B, T)
    return ollm.lvlm(inputs_embeds=x).logits, next_labels(labels)


def next_labels(labels):
    """Returns the label of the position after each one, (B, T); IGNORE at the end."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def naive_encode_audio(ollm, batch):
    """Returns audio tokens (B, A, D) by transformers' encoder, if it is 30 s: it takes no other."""
    if batch["mel"].size(-1) != 2 * ollm.audio_encoder.config.max_source_positions:
        return ollm.encode_audio(batch["mel"], batch["n_frames"])
    mel = batch["mel"].to(ollm.projector.weight.dtype)  # (B, mel bins, L)
    frames = ollm.audio_encoder(mel).last_hidden_state  # (B, L / 2, W)
    return ollm.projector(frames.unflatten(1, (-1, 2)).mean(2))


def naive_loss(ollm, batch, alpha):
    """Returns Self-KD's loss by two full passes, or SFT's (alpha 0) by one.

    The CE is taken over the whole sequence, as in transformers.
    """
    if alpha > 0:
        with torch.no_grad():
            teacher, teacher_labels = naive_pass(ollm, batch, "text")  # (B, T, V), (B, T)
    student, labels = naive_pass(ollm, batch, "audio")  # speech takes more tokens
    ce = F.cross_entropy(student.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    if alpha == 0:
        return ce

    is_answer = labels != IGNORE  # (B, T)
    teacher = teacher[teacher_labels != IGNORE]  # (N, V)
    kl, *_ = self_kd_loss(student[is_answer], teacher, labels[is_answer], alpha=1)
    return (1 - alpha) * ce + alpha * kl


# ---- ours ----------------------------------------------------------------------------------------


def shared_prefix(ollm, batch, alpha):
    """Returns the loss with the prefix read once, but logits at all positions of the queries."""
    prefix = ollm.prefill(batch)
    audio = ollm.encode_audio(batch["mel"], batch["n_frames"])  # (B, A, D)
    student = ollm.lvlm.lm_head(ollm.decode_query(prefix, batch["audio"], audio)[0])  # (B, S, V)
    with torch.no_grad():
        teacher = ollm.lvlm.lm_head(ollm.decode_query(prefix, batch["text"])[0])  # (B, S, V)

    labels = next_labels(batch["audio"]["labels"])  # (B, S)
    student, labels = student[labels != IGNORE], labels[labels != IGNORE]  # (N, V), (N,)
    teacher = teacher[next_labels(batch["text"]["labels"]) != IGNORE]  # (N, V)
    return self_kd_loss(student, teacher, labels, alpha)[0]


def ours(ollm, batch, alpha):
    """Returns the loss that train.py takes."""
    return ollm(batch, alpha)[0]


STEPS = {  # key: (name, loss, alpha, length in seconds that speech is padded to)
    "naive_kd": ("naive Self-KD", naive_loss, ALPHA, 30),
    "shared_prefix": ("+ shared prefix", shared_prefix, ALPHA, 30),
    "answer_head": ("+ answer-only head", ours, ALPHA, 30),
    "kd": ("+ real audio length: our Self-KD", ours, ALPHA, 0),
    "sft": ("our SFT", ours, 0.0, 0),
    "naive_sft": ("naive SFT", naive_loss, 0.0, 30),
    "naive_kd_real_length": ("naive Self-KD, real length", naive_loss, ALPHA, 0),
}
EVERY_ROUND = ("naive_kd", "kd", "sft", "naive_sft")
RATIOS = {"naive_kd_over_kd": ("naive_kd", "kd"),
          "naive_sft_over_kd": ("naive_sft", "kd"), "kd_over_sft": ("kd", "sft"),
          "naive_kd_over_kd_both_30s": ("naive_kd", "answer_head"),
          "naive_kd_over_kd_both_real_length": ("naive_kd_real_length", "kd")}


def step(ollm, optimizer, batch, loss_of, alpha):
    """Takes one step: forward, backward and update, in bfloat16 on a GPU, as in train.py."""
    with processes.half_precision(batch["mel"].device):
        loss = loss_of(ollm, batch, alpha)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# ---- models and samples --------------------------------------------------------------------------


def build(size, share, device):
    """Returns (OLLM with random weights, its optimizer); share: of the real models' layers."""
    torch.manual_seed(0)
    lvlm, tokenizer, settings = build_lvlm()
    audio_parts = build_audio_encoder()
    if size == "internvl2-1b":
        config, whisper = copy.deepcopy(INTERNVL2_1B), dict(WHISPER_LARGE_V3)
        for part, key in ((config["vision_config"], "num_hidden_layers"),
                          (config["llm_config"], "num_hidden_layers"), (whisper, "encoder_layers")):
            part[key] = max(1, round(part[key] * share))
        image_token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")  # any id would do
        lvlm = InternVLForConditionalGeneration(native_config(config, image_token))
        settings = replace(lvlm_settings(lvlm), system=" ".join(["picture"] * SYSTEM_TOKENS))
        audio_parts = (WhisperEncoder(WhisperConfig(**whisper)),
                       WhisperFeatureExtractor(feature_size=whisper["num_mel_bins"]))
        tokenizer.model_max_length = config["llm_config"]["max_position_embeddings"]

    ollm = OLLM(lvlm, tokenizer, settings, None, *audio_parts)
    ollm.train_only("vision-audio")
    ollm.move_to(device)
    trained = [p for p in ollm.parameters() if p.requires_grad]
    return ollm, torch.optim.AdamW(trained, lr=1e-5, fused=True)


def to_float64(module):
    """Returns the module in double precision throughout, to compare runs and gradients exactly.

    transformers' RMSNorm computes in float32 even then; torch's own keeps the precision.
    """
    for name, child in module.named_children():
        if hasattr(child, "variance_epsilon"):
            norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
            norm.weight = child.weight
            setattr(module, name, norm)
        else:
            to_float64(child)
    return module.double()


def make_batch(ollm, tiles, args, audio_seconds):
    """Returns a batch of random samples, all of the lengths that the arguments ask for.

    tiles: squares of a picture, with the thumbnail; audio_seconds: what speech is padded to
    """
    rng, size = np.random.default_rng(0), ollm.settings.image_size
    samples = []
    for _ in range(args.batch):
        pixels = rng.standard_normal((tiles, 3, size, size), dtype=np.float32)
        wave = rng.standard_normal(round(args.seconds * data.SAMPLE_RATE), dtype=np.float32)
        samples.append({"question": " ".join(["what"] * args.question),
                        "answer": " ".join(["red"] * (args.answer - 1)),  # and the end mark
                        "pixels": {"pixel_values": torch.from_numpy(pixels)}, "wave": 0.1 * wave})
    settings = replace(ollm.settings, audio_seconds=audio_seconds)
    batch = data.collate(samples, ollm.tokenizer, ollm.mel_extractor, settings)
    return processes.to_device(batch, ollm.lvlm.device)


# ---- cost ----------------------------------------------------------------------------------------


def flop_counter():
    """Returns torch's counter, taught the CPU's attention: 2 products forward, 5 backward."""
    aten = torch.ops.aten
    return FlopCounterMode(display=False, custom_mapping={
        aten._scaled_dot_product_flash_attention_for_cpu:
            lambda query, key, *_, **__: 2 * 2 * query.numel() * key[-2],
        aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda _, query, key, *__, **___: 5 * 2 * query.numel() * key[-2]})


def worst_difference(args):
    """Returns the largest relative difference of our gradients from the naive one's, in float64."""
    ollm, _ = build("shapes", 1, torch.device("cpu"))
    to_float64(ollm)
    trained = [p for p in ollm.parameters() if p.requires_grad]
    batch = make_batch(ollm, 4, args, 30)
    pixels = batch["pixels"]["pixel_values"].double()
    batch |= {"pixels": {"pixel_values": pixels}, "mel": batch["mel"].double()}

    def gradient(loss_of, alpha):
        gradients = torch.autograd.grad(loss_of(ollm, batch, alpha), trained)
        return torch.cat([g.flatten() for g in gradients])

    worst = 0.0
    for loss_of, alpha in ((shared_prefix, ALPHA), (ours, ALPHA), (ours, 0.0)):
        expected = gradient(naive_loss, alpha)
        difference = (gradient(loss_of, alpha) - expected).norm() / expected.norm()
        worst = max(worst, difference.item())
    return worst


def now(device):
    """Returns the time in seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(args):
    """Returns (seconds, FLOPs, memory), each a dict by (tiles, step).

    All steps take turns. The first round counts FLOPs as well, which takes milliseconds. In the
    real widths, steps that are not in EVERY_ROUND are timed in the first round alone. Memory, the
    bytes above the weights and moments, is measured on a GPU.
    """
    device = torch.device(args.device)
    ollm, optimizer = build(args.size, args.layers, device)
    seconds, flops, memory = {}, {}, {}
    todo = itertools.product(range(args.rounds), args.tiles, STEPS)
    todo = [(i, tiles, name) for i, tiles, name in todo
            if i == 0 or name in EVERY_ROUND or args.size == "shapes"]
    for i, tiles, name in tqdm(todo, desc="steps", unit="step", mininterval=5):
        _, loss_of, alpha, audio_seconds = STEPS[name]
        batch = make_batch(ollm, tiles, args, audio_seconds)
        with flop_counter() if i == 0 else contextlib.nullcontext() as counter:
            started = now(device)
            step(ollm, optimizer, batch, loss_of, alpha)
            seconds.setdefault((tiles, name), []).append(now(device) - started)
        if i == 0:
            flops[tiles, name] = counter.get_total_flops()
        elif device.type == "cuda":  # now AdamW has its moments
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(ollm, optimizer, batch, loss_of, alpha)
            memory[tiles, name] = torch.cuda.max_memory_allocated() - before
    return seconds, flops, memory


# ---- reporting -----------------------------------------------------------------------------------


def ratio(seconds, tiles, slow, fast):
    """Returns the median of slow / fast over the rounds that timed both."""
    return statistics.median(a / b for a, b in zip(seconds[tiles, slow], seconds[tiles, fast]))


def summary(args, seconds, flops, memory):
    """Returns all numbers as one JSON object; a key ends with its number of tiles, _1 or _7."""
    result = {"seconds": {}, "ratios": {}, "memory": {}, "flops": {}}
    for tiles in args.tiles:
        for name in STEPS:
            result["seconds"][f"{name}_{tiles}"] = statistics.median(seconds[tiles, name])
            result["flops"][f"{name}_{tiles}"] = flops[tiles, name]
        for key, pair in RATIOS.items():
            result["ratios"][f"{key}_{tiles}"] = ratio(seconds, tiles, *pair)
        for name in STEPS:
            if (tiles, name) in memory:
                result["memory"][f"{name}_bytes_{tiles}"] = memory[tiles, name]
    return result


def print_steps(args, tiles, seconds, flops, memory):
    """Prints the table of one number of tiles, a line a step."""
    print(f"\nTiles: {tiles}; speech of {args.seconds:g} s, batches of {args.batch}\n")
    rows = []
    for name, (label, *_) in STEPS.items():
        times, work = seconds[tiles, name], flops[tiles, name]
        median, speedup = statistics.median(times), ratio(seconds, tiles, "naive_kd", name)
        size = f"{memory[tiles, name] / 1e9:.2f}" if (tiles, name) in memory else ""
        rows.append([label, f"{median:.3g} ({min(times):.3g} to {max(times):.3g})",
                     f"{speedup:.2f}", f"{work / 1e9:.4g}", size])
    tables.print_table(["step", "s, median (least to most)", "naive Self-KD / it", "GFLOP",
                        "GB above weights"], rows)


def parse_arguments():
    """Returns the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=["internvl2-1b", "shapes"], default="internvl2-1b",
        help="the real models' widths, or the built-in world's models")
    add("--layers", type=in_range(0.0, 1.0), default=0.25, help="share of the real models' layers")
    add("--tiles", type=in_range(1), nargs="+", default=[1, 7], help="squares of a picture")
    add("--seconds", type=in_range(0.1, 30.0), default=4.0, help="length of a spoken question")
    add("--question", type=in_range(1), default=16, help="tokens of a written question")
    add("--answer", type=in_range(1), default=40, help="tokens of an answer, with its end mark")
    add("--batch", type=in_range(1), default=1, help="samples a step")
    add("--rounds", type=in_range(1), default=3, help="how often each step is timed")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one",
        default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", action="store_true", help="print one line of JSON last")
    return parser.parse_args()


def main():
    args = parse_arguments()
    worst = worst_difference(args)
    print("gradients of shared prefix and answer-only head against the naive one's, float64, tiny "
          f"widths: relative difference {worst:.1e}")
    assert worst < 1e-9, "the shared prefix or the answer-only head changes the gradient"

    share = f", {args.layers:g} of the layers" if args.size == "internvl2-1b" else ""
    print(f"{args.size}{share}, random weights; {args.device}, {torch.get_num_threads()} threads")
    seconds, flops, memory = measure(args)
    for tiles in args.tiles:
        print_steps(args, tiles, seconds, flops, memory)

    result = summary(args, seconds, flops, memory)
    print()
    for key, value in result["ratios"].items():
        print(f"{key:40} {value:.3f}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    with readable_errors():
        main()
