"""What a step of Self-KD costs: seconds, memory and arithmetic, against the textbook's two full passes.

    python bench.py                                  # InternVL2-1B's and Whisper-large-v3's widths, 1/4 of the layers
    python bench.py --size shapes --rounds 20        # the built-in world's models, in seconds
    python bench.py --layers 1 --batch 8             # full depth: for a GPU
    python bench.py --json | tail -n 1               # the same numbers as one line of JSON

Self-KD needs two sets of logits for each answer: the teacher's, who reads the question, and the student's, who hears
it. The textbook runs the whole model twice, over the whole sequence, on speech padded to Whisper's 30 s. Three things
make a step here cheaper, and the table takes them one at a time:

    + shared prefix        vision encoder and `<system><image>` run once, without gradient, for both (exact)
    + answer-only head     logits at the positions that predict the answer, of 151,655 words each (exact)
    + real audio length    Whisper hears the question, not the silence up to 30 s (an approximation of plain Whisper)

That the first two change no gradient is checked first, in float64. Weights are random: time does not depend on them.

Letters in shape comments: B batch, T tokens, A audio tokens, N answer tokens in the batch, V vocabulary, D width.
"""

import argparse
import contextlib
import copy
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import InternVLForConditionalGeneration, WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import data
import model
import pretrained
import train
from data import AUDIO_SLOT, IGNORE
from loss import self_kd_loss

INTERNVL2_1B = {  # its own config.json, what matters of it
    "downsample_ratio": 0.5, "ps_version": "v2", "select_layer": -1,
    "vision_config": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                      "intermediate_size": 4096, "image_size": 448, "patch_size": 14, "num_channels": 3,
                      "hidden_act": "gelu", "norm_type": "layer_norm", "layer_norm_eps": 1e-6, "qkv_bias": True,
                      "qk_normalization": False},
    "llm_config": {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "num_hidden_layers": 24,
                   "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864,
                   "vocab_size": 151655, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
                   "max_position_embeddings": 32768}}
WHISPER_LARGE_V3 = {"num_mel_bins": 128, "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20,
                    "encoder_ffn_dim": 5120}
SYSTEM_TOKENS = 40  # InternVL2's system message has about as many
ALPHA = 0.75


# ---- the textbook ---------------------------------------------------------------------------------------------------


def full_pass(ollm, batch, spoken):
    """One pass of the native model over whole sequences: (logits (B, T, V) at every position, each next label (B, T)).

    The sequences of the batch must be of one length: nothing is padded here.
    """
    suffix = batch["audio" if spoken else "text"]
    assert batch["prefix"]["mask"].all() and suffix["mask"].all(), "sequences of one length only"
    ids = torch.cat([batch["prefix"]["ids"], suffix["ids"]], dim=1)  # (B, T)
    x = ollm.lvlm.get_input_embeddings()(ids.clamp(min=0))  # (B, T, D)
    slots = ids == ollm.lvlm.config.image_token_id  # (B, T)
    x = x.masked_scatter(slots[..., None], ollm.see(batch["pixels"]).to(x.dtype))
    if spoken:
        x = x.masked_scatter((ids == AUDIO_SLOT)[..., None], textbook_hear(ollm, batch).to(x.dtype))
    ahead = torch.cat([torch.full_like(batch["prefix"]["ids"], IGNORE), suffix["labels"]], dim=1)[:, 1:]  # (B, T - 1)
    return ollm.lvlm(inputs_embeds=x).logits, F.pad(ahead, (0, 1), value=IGNORE)


def textbook_hear(ollm, batch):
    """Audio tokens (B, A, D) by transformers' own encoder, which takes 30 s and nothing else; shorter ones by ours."""
    if batch["mel"].size(-1) != 3000:
        return ollm.hear(batch["mel"], batch["n_frames"])
    mel = batch["mel"].to(ollm.projector.weight.dtype)  # (B, M, 3000)
    return ollm.projector(ollm.audio_encoder(mel).last_hidden_state.unflatten(1, (-1, 2)).mean(2))


def textbook(ollm, batch, alpha):
    """Self-KD's loss by two full passes, SFT's (alpha 0) by one; the CE over the whole sequence, as in transformers."""
    if alpha > 0:
        with torch.no_grad():
            teacher, read = full_pass(ollm, batch, spoken=False)  # (B, T, V)
    student, heard = full_pass(ollm, batch, spoken=True)  # (B, T', V): speech takes more tokens
    loss = (1 - alpha) * F.cross_entropy(student.flatten(0, 1), heard.flatten(), ignore_index=IGNORE)
    if alpha > 0:
        answers = heard[heard != IGNORE]  # (N,)
        loss = loss + alpha * self_kd_loss(student[heard != IGNORE], teacher[read != IGNORE], answers, alpha=1)[0]
    return loss


# ---- ours -----------------------------------------------------------------------------------------------------------


def shared_prefix(ollm, batch, alpha):
    """The prefix once, but logits at every position of both suffixes."""
    prefix = ollm.prefix(batch)
    heard = ollm.hear(batch["mel"], batch["n_frames"])  # (B, A, D)
    student = ollm.lvlm.lm_head(ollm.suffix(prefix, batch["audio"], heard)[0])  # (B, S, V)
    with torch.no_grad():
        teacher = ollm.lvlm.lm_head(ollm.suffix(prefix, batch["text"])[0])  # (B, S, V)
    (student, labels), (teacher, _) = (ollm.answer_states(logits, batch[form]["labels"])  # (N, V), (N,)
                                       for form, logits in (("audio", student), ("text", teacher)))
    return self_kd_loss(student, teacher, labels, alpha)[0]


def ours(ollm, batch, alpha):
    """What train.py does."""
    return ollm(batch, alpha)[0]


STEPS = {  # what it is called, its loss, alpha, and what speech is padded to (s)
    "textbook_kd": ("textbook Self-KD", textbook, ALPHA, 30),
    "shared_prefix": ("+ shared prefix", shared_prefix, ALPHA, 30),
    "answer_head": ("+ answer-only head", ours, ALPHA, 30),
    "kd": ("+ real audio length: our Self-KD", ours, ALPHA, 0),
    "sft": ("our SFT", ours, 0.0, 0),
    "textbook_sft": ("textbook SFT", textbook, 0.0, 30),
    "textbook_kd_real_length": ("textbook Self-KD, real length", textbook, ALPHA, 0),
}
EVERY_ROUND = ("textbook_kd", "kd", "sft", "textbook_sft")
RATIOS = {"textbook_kd_over_kd": ("textbook_kd", "kd"), "textbook_sft_over_kd": ("textbook_sft", "kd"),
          "kd_over_sft": ("kd", "sft"), "textbook_kd_over_kd_both_30s": ("textbook_kd", "answer_head"),
          "textbook_kd_over_kd_both_real_length": ("textbook_kd_real_length", "kd")}


def step(ollm, optimizer, batch, loss_of, alpha):
    """One step: forward, backward and update; matrix products in bfloat16 on a GPU, as in train.py."""
    device = batch["mel"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        loss = loss_of(ollm, batch, alpha)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# ---- models and samples ---------------------------------------------------------------------------------------------


def build(size, share, device):
    """An OLLM of this size with random weights, `share` of the real models' layers, and its optimizer."""
    torch.manual_seed(0)
    lvlm, tokenizer, settings = model.build_lvlm()
    listening = model.build_audio_encoder()
    if size == "internvl2-1b":
        about, whisper = copy.deepcopy(INTERNVL2_1B), dict(WHISPER_LARGE_V3)
        for part, key in ((about["vision_config"], "num_hidden_layers"), (about["llm_config"], "num_hidden_layers"),
                          (whisper, "encoder_layers")):
            part[key] = max(1, round(part[key] * share))
        image_token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")  # any ids will do: they are only looked up
        lvlm = InternVLForConditionalGeneration(pretrained.native_config(about, image_token))
        settings = {**pretrained.lvlm_settings(lvlm), "system": " ".join(["picture"] * SYSTEM_TOKENS)}
        listening = WhisperEncoder(WhisperConfig(**whisper)), WhisperFeatureExtractor(feature_size=128)
        tokenizer.model_max_length = about["llm_config"]["max_position_embeddings"]
    ollm = model.OLLM(lvlm, tokenizer, settings, *listening)
    ollm.train_only("vision-audio")
    ollm.to(device)
    if device.type == "cuda":
        model.to_bfloat16(ollm.lvlm)
    trained = [p for p in ollm.parameters() if p.requires_grad]
    return ollm, torch.optim.AdamW(trained, lr=1e-5, fused=True)


def make_batch(ollm, tiles, args, seconds_at_least):
    """args.batch samples of `tiles` squares each (thumbnail counted), all of the lengths that the arguments ask for."""
    rng, size = np.random.default_rng(0), ollm.settings["image_size"]
    question, answer = " ".join(["what"] * args.question), " ".join(["red"] * (args.answer - 1))
    samples = [{"id": str(i), "question": question, "answer": answer,
                "pixels": torch.from_numpy(rng.standard_normal((tiles, 3, size, size), dtype=np.float32)),
                "wave": 0.1 * rng.standard_normal(round(args.seconds * data.SAMPLE_RATE), dtype=np.float32)}
               for i in range(args.batch)]
    settings = {**ollm.settings, "audio_seconds": seconds_at_least}
    return train.to(data.collate(samples, ollm.tokenizer, ollm.mel_extractor, settings), ollm.projector.weight.device)


# ---- measuring ------------------------------------------------------------------------------------------------------


def worst_difference(args):
    """The largest relative difference between the gradients of the textbook and of the exact steps (float64)."""
    ollm, _ = build("shapes", 1, torch.device("cpu"))
    model.to_float64(ollm)
    trained = [p for p in ollm.parameters() if p.requires_grad]

    def gradient(loss_of, alpha, seconds):
        """The loss's gradient for all that is trained, as one vector."""
        batch = make_batch(ollm, 4, args, seconds)
        batch |= {key: batch[key].double() for key in ("pixels", "mel")}
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(ollm, batch, alpha), trained)])

    worst = 0.0
    for loss_of, alpha in ((shared_prefix, ALPHA), (ours, ALPHA), (ours, 0.0)):
        expected = gradient(textbook, alpha, 30)
        worst = max(worst, ((gradient(loss_of, alpha, 30) - expected).norm() / expected.norm()).item())
    return worst


def matmul_rate(device):
    """FLOP/s of one large matrix product, float32 on a CPU and bfloat16 on a GPU: what the machine can do at best."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = torch.randn(n, n, dtype=dtype, device=device), torch.randn(n, n, dtype=dtype, device=device)
    times = []
    for _ in range(10):
        started = now(device)
        a @ b
        times.append(now(device) - started)
    return 2 * n**3 / min(times)


def now(device):
    """Seconds, once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def flop_counter():
    """torch's own counter, told about the CPU's attention, which it does not know: two products, five backwards."""
    aten = torch.ops.aten
    return FlopCounterMode(display=False, custom_mapping={
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 2 * 2 * q.numel() * k[-2],
        aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda _, q, k, *__, **___: 5 * 2 * q.numel() * k[-2]})


def floor(ollm, batch):
    """The FLOPs that our Self-KD step cannot do without: each product that its mathematics needs, once.

    As torch counts them: two for each multiplication, attention over all pairs. Vision encoder and LLM run once over
    the prefix; the teacher's suffix forward; the student's forward and its input's gradient, none for frozen weights;
    the audio encoder on real frames and the projector forward with both gradients; the head forward for both, backward
    for one.
    """
    vision, llm, audio = ollm.lvlm.config.vision_config, ollm.lvlm.config.text_config, ollm.audio_encoder.config
    (b, p), (_, s_teacher), (_, s_student) = (batch[k]["ids"].shape for k in ("prefix", "text", "audio"))
    answers = int((batch["text"]["labels"] != IGNORE).sum())
    tiles, d, w = len(batch["pixels"]), llm.hidden_size, vision.hidden_size

    patches = (vision.image_size[0] // vision.patch_size[0]) ** 2
    weights = 4 * w**2 + 2 * w * vision.intermediate_size  # of a layer
    see = 2 * patches * 3 * vision.patch_size[0] ** 2 * w
    see += vision.num_hidden_layers * ((patches + 1) * 2 * weights + 4 * (patches + 1) ** 2 * w)
    see += 2 * ollm.settings["tokens_per_tile"] * (patches // ollm.settings["tokens_per_tile"] * w * d + d**2)

    kv = llm.num_key_value_heads * d // llm.num_attention_heads
    weights = 2 * d**2 + 2 * d * kv + 3 * d * llm.intermediate_size
    layers = llm.num_hidden_layers
    read = [(layers - 1) * (p * 2 * weights + 4 * p**2 * d) + p * 2 * 2 * d * kv]  # keys and values of the last layer
    read += [layers * (s * 2 * weights + 4 * s * (p + s) * d) for s in (s_teacher, s_student)]
    # Backward, attention needs products with all keys for the queries' gradient, with the student's own for theirs.
    learn = layers * (s_student * 2 * weights + 4 * s_student * (p + 2 * s_student) * d)

    frames, w = int(batch["n_frames"].sum()) // b, audio.d_model  # a clip's
    weights = 4 * w**2 + 2 * w * audio.encoder_ffn_dim
    hear = 2 * frames * 3 * audio.num_mel_bins * w * 2 + 3 * (frames // 2) * 2 * 3 * w**2  # conv1 has no input gradient
    hear += 3 * audio.encoder_layers * (frames // 2 * 2 * weights + 4 * (frames // 2) ** 2 * w)
    hear += 3 * 2 * (frames // 4) * w * d
    return tiles * see + b * (sum(read) + learn + hear) + 3 * 2 * answers * d * llm.vocab_size


def highest_use(device):
    """The most bytes that this process has held so far, on a GPU those of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage begins with what the parent process held
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, in bytes


def peak_memory(args):
    """Bytes above the weights that one step of the kind args.peak takes: activations, gradients, AdamW's moments."""
    device = torch.device(args.device)
    ollm, optimizer = build(args.size, args.layers, device)
    _, loss_of, alpha, seconds = STEPS[args.peak]
    batch = make_batch(ollm, args.tiles[0], args, seconds)
    weights = highest_use(device)
    for group in optimizer.param_groups:  # AdamW's moments are there from the second step on: make them, by gradient 0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    step(ollm, optimizer, batch, loss_of, alpha)
    return highest_use(device) - weights


def peaks(args, tiles):
    """{step: bytes}, each from a process of its own."""
    measured = {}
    for name in ("textbook_kd", "kd"):
        command = [sys.executable, __file__, "--peak", name, "--tiles", str(tiles), "--device", args.device]
        for key in ("size", "layers", "seconds", "question", "answer", "batch"):
            command += [f"--{key}", str(getattr(args, key))]
        measured[name] = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return measured


def measure(args):
    """({(tiles, step): [seconds, ...]}, {(tiles, step): FLOPs}, {tiles: floor}), all steps in turn.

    The first round counts FLOPs as well, which takes some milliseconds. The other steps of the real widths, which take
    up to a minute, are timed in that round alone.
    """
    device = torch.device(args.device)
    ollm, optimizer = build(args.size, args.layers, device)
    seconds, flops = {}, {}
    todo = [(i, tiles, name) for i in range(args.rounds) for tiles in args.tiles for name in STEPS
            if i == 0 or name in EVERY_ROUND or args.size == "shapes"]
    for i, tiles, name in tqdm(todo, desc="steps", unit="step", mininterval=5):
        _, loss_of, alpha, at_least = STEPS[name]
        batch = make_batch(ollm, tiles, args, at_least)
        with flop_counter() if i == 0 else contextlib.nullcontext() as counter:
            started = now(device)
            step(ollm, optimizer, batch, loss_of, alpha)
            seconds.setdefault((tiles, name), []).append(now(device) - started)
        if i == 0:
            flops[tiles, name] = counter.get_total_flops()
    return seconds, flops, {tiles: floor(ollm, make_batch(ollm, tiles, args, 0)) for tiles in args.tiles}


# ---- reporting ------------------------------------------------------------------------------------------------------


def ratio(seconds, tiles, slow, fast):
    """The median of slow / fast over the rounds that timed both."""
    return statistics.median(a / b for a, b in zip(seconds[tiles, slow], seconds[tiles, fast]))


def summary(args, seconds, flops, floors, memory):
    """The result as one JSON object; a trailing _1 or _7 is the number of tiles."""
    result = {"seconds": {}, "ratios": {}, "memory": {}, "flops": {}}
    for tiles in args.tiles:
        result["seconds"] |= {f"{name}_{tiles}": statistics.median(seconds[tiles, name]) for name in STEPS}
        result["ratios"] |= {f"{key}_{tiles}": ratio(seconds, tiles, *pair) for key, pair in RATIOS.items()}
        result["memory"] |= {f"{name}_bytes_{tiles}": size for name, size in memory[tiles].items()}
        result["memory"][f"kd_over_textbook_{tiles}"] = memory[tiles]["kd"] / memory[tiles]["textbook_kd"]
        result["flops"] |= {f"{name}_{tiles}": flops[tiles, name] for name in STEPS}
        result["flops"] |= {f"floor_{tiles}": floors[tiles],
                            f"over_floor_{tiles}": flops[tiles, "kd"] / floors[tiles]}
    return result


def print_table(args, tiles, seconds, flops, memory, rate):
    """One number of tiles as a Markdown table: a line a step."""
    print(f"\n{tiles} tile{'s' * (tiles > 1)}, speech of {args.seconds:g} s, {args.batch} a batch\n")
    print("| step | s, median (least to most) | textbook Self-KD / it | GFLOP | of matmul rate | GB above weights |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, (label, *_) in STEPS.items():
        times, size, work = seconds[tiles, name], memory[tiles].get(name), flops[tiles, name]
        middle = statistics.median(times)
        print(f"| {label} | {middle:.3g} ({min(times):.3g} to {max(times):.3g}) | "
              f"{ratio(seconds, tiles, 'textbook_kd', name):.2f} | {work / 1e9:.4g} | "
              f"{100 * work / middle / rate:.0f} % | {f'{size / 1e9:.2f}' if size else ''} |")


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["internvl2-1b", "shapes"], default="internvl2-1b",
                        help="the real models' widths, or the built-in world's models")
    parser.add_argument("--layers", type=float, default=0.25, help="share of the real models' layers; 1 is full depth")
    parser.add_argument("--tiles", type=data.at_least_one, nargs="+", default=[1, 7], help="squares of a picture")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a spoken question")
    parser.add_argument("--question", type=data.at_least_one, default=16, help="tokens of a written question")
    parser.add_argument("--answer", type=data.at_least_one, default=40, help="tokens of an answer, end mark included")
    parser.add_argument("--batch", type=data.at_least_one, default=1, help="samples a step")
    parser.add_argument("--rounds", type=data.at_least_one, default=3, help="how often each step is timed")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one",
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    parser.add_argument("--peak", choices=STEPS, help="print the memory (bytes) of one such step and nothing else")
    args = parser.parse_args()
    if not 0 < args.layers <= 1:
        parser.error(f"--layers is a share above 0 and up to 1, not {args.layers}")
    if not 0 < args.seconds <= data.MAX_SECONDS:
        parser.error(f"--seconds is above 0 and up to {data.MAX_SECONDS}, not {args.seconds}")
    return args


if __name__ == "__main__":
    args = parse_arguments()
    if args.peak:
        print(peak_memory(args))
        sys.exit()
    worst = worst_difference(args)
    print(f"gradients of shared prefix and answer-only head against the textbook's, float64, tiny widths: relative "
          f"difference {worst:.1e}")
    assert worst < 1e-9, "the shared prefix or the answer-only head changes the gradient"
    memory = {tiles: peaks(args, tiles) for tiles in tqdm(args.tiles, desc="memory", unit="size", mininterval=5)}
    rate = matmul_rate(torch.device(args.device))
    print(f"{args.size}{f', {args.layers:g} of the layers' * (args.size == 'internvl2-1b')}, random weights; "
          f"{args.device}, {torch.get_num_threads()} threads, matrix products at {rate / 1e9:.0f} GFLOP/s")
    seconds, flops, floors = measure(args)
    result = summary(args, seconds, flops, floors, memory)
    for tiles in args.tiles:
        print_table(args, tiles, seconds, flops, memory, rate)
    print()
    for kind in ("ratios", "memory", "flops"):
        for key, value in result[kind].items():
            if value < 1000:
                print(f"{key:32} {value:.3f}")
    if args.json:
        print(json.dumps(result))
