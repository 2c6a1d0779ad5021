"""Train an LVLM to listen (arXiv 2503.00059): one loop, three stages, one epoch each.

    torchrun --standalone train.py --alpha 0.75           # the built-in world, from nothing
    torchrun --standalone train.py --alpha 0              # the same start, supervised fine-tuning
    python train.py --stage audio-text --max-steps 20 --out runs/try    # one stage, a few steps
    torchrun --standalone --nproc_per_node 8 train.py --preset internvl2-1b --alpha 0.75 --data DIR

| --stage      | input -> target                    | trained                                |
| vision-text  | image + written question -> answer | the LVLM; in the built-in world only   |
| audio-text   | speech -> transcript               | audio encoder and projector            |
| vision-audio | image + spoken question -> answer  | audio encoder and projector, KL and CE |

A stage starts from the run of the stage before it, and trains that first if it is missing. Runs go
to runs/<preset>/. After an interruption the same command goes on from the last checkpoint.
"""

import plumbing  # noqa: F401  # isort: skip (before torch: sets how its threads wait)
import argparse
import contextlib
import functools
import json
import math
import random
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from model import start_model
from plumbing import checkpoint, processes, runs
from plumbing.files import BadInput, enough_memory, folder_lock, in_range, readable_errors
from plumbing.media import MAX_SECONDS
from real.families import BASES
from world.lessons import lessons
from world.make import make_if_missing
from world.muon import Muon

# ---- settings ------------------------------------------------------------------------------------

STAGES = {  # each: the forms of the question that it reads, and what is learnt
    "vision-text": (["question"], "the LVLM learns to see and to read. It will be the teacher"),
    "audio-text": (["audio"], "audio encoder and projector learn to hear, by transcribing speech"),
    "vision-audio": (["question", "audio"], "they learn to answer spoken questions: alpha weighs "
                     "the KL to the teacher, who reads them, against the CE with the labels"),
}
PRESETS = {
    "shapes": {  # the built-in world: nothing is downloaded
        "lvlm": None,
        "whisper": None,
        # Here a batch counts pictures, with all that is asked about each: world/lessons.py.
        "vision-text": {"muon": True, "lr": 2e-3, "global_batch": 12, "micro_batch": 12},
        "audio-text": {"muon": True, "lr": 3e-3, "global_batch": 8, "micro_batch": 8},
        "vision-audio": {"lr": 1e-3, "global_batch": 8, "micro_batch": 8},
        # A real Whisper hears already: AdamW, small steps, and fewer clips are enough.
        "audio-text --whisper": {"lr": 3e-4, "global_batch": 8, "micro_batch": 8, "samples": 4800},
        "vision-audio --whisper": {"lr": 3e-4, "global_batch": 8, "micro_batch": 8},
    },
    # The paper's base models and others. Rates and batches are Appendix A's, micro-batches ours.
    **{name: {
        "lvlm": lvlm,
        "whisper": "openai/whisper-large-v3",
        "audio-text": clips and {"lr": 4e-5, "global_batch": 128, "micro_batch": clips},
        "vision-audio": {"lr": 4e-5, "global_batch": 64, "micro_batch": 8},
    } for name, (lvlm, clips) in BASES.items()},
}
WARMUP = 0.03  # share of the steps
CLIP = 1.0  # largest norm of the gradient
BETAS = (0.9, 0.98)  # of AdamW


@dataclass
class Config:
    """All that a stage's numbers depend on: the preset's values, then flags. A run keeps it."""
    stage: str  # one of STAGES
    seed: int  # of initialization, order and built-in data
    # Start and data
    init: str | None  # run or LVLM that the stage starts from; None: random weights
    whisper: str | None  # Whisper that audio-text starts from; None: the built-in encoder
    data: list  # prepared folders; twice the same is two epochs
    samples: int | None = None  # take only the first so many
    max_tiles: int | None = None  # tiles of a picture; None: as the start has it
    audio_seconds: float | None = None  # pad speech to so many; None: as the start has it
    # Loss
    alpha: float = 0.0  # weight of the KL; 0 is SFT
    temperature: float = 1.0  # of both distributions in the KL
    on_policy: float = 0.0  # share of steps that take the student's own answers
    # Optimization
    train: str = "audio"  # "audio": encoder and projector; or "projector" or "lvlm"
    muon: bool = False  # Muon in place of AdamW
    lr: float = 0.0  # peak learning rate
    global_batch: int = 0  # samples a step, over all processes
    micro_batch: int = 0  # samples a forward pass
    max_steps: int | None = None  # stop early


def parse_arguments():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # What to train
    add("--preset", choices=PRESETS, default="shapes", help="which models and settings")
    add("--stage", choices=STAGES, default="vision-audio", help="what to train")
    add("--alpha", type=in_range(0.0, 1.0), default=0.75, help="weight of the KL; 0 is SFT, 1 KD")
    add("--temperature", type=in_range(1e-3), default=1.0, help="of both distributions in the KL")
    add("--train", choices=["audio", "projector"], default="audio", help="what learns: audio "
        "encoder and projector, as in the paper, or the projector alone")
    add("--on-policy", type=in_range(0.0, 1.0), default=0.0, metavar="P", help="share of steps "
        "that take the student's own greedy answers instead of the data's, with alpha 1")
    add("--seed", type=in_range(0, 2**48), default=0, help="of start, order and built-in data")
    # Where things lie
    add("--data", nargs="+", help="prepared folders (default: the built-in world's)")
    add("--init", help="run to start from; for audio-text also an LVLM's folder or hub id")
    add("--whisper", help="folder or hub id of the Whisper that audio-text starts from")
    add("--out", help="run folder that the stage leaves")
    # Optimization (default: the preset's)
    add("--lr", type=in_range(1e-9), help="peak learning rate")
    add("--global-batch", type=in_range(1), help="samples a step, over all processes")
    add("--micro-batch", type=in_range(1), help="samples a forward pass")
    add("--max-steps", type=in_range(1), help="stop early; the cosine keeps its full length")
    # Inputs
    add("--max-tiles", type=in_range(1), help="squares that a picture is cut into, thumbnail aside")
    add("--audio-seconds", type=in_range(0.0, MAX_SECONDS), help="pad speech; 30 is plain Whisper")
    # Machine
    add("--device", choices=["cpu", "cuda", "mps"], help="default: cuda if there is one")
    add("--workers", type=in_range(0), default=4, help="processes that read ahead for each GPU")
    add("--save-every", type=in_range(1), default=500, help="steps between checkpoints")
    args = parser.parse_args()
    stages = stages_of(args.preset)
    if args.stage not in stages:
        parser.error(f"the preset {args.preset} has no stage {args.stage}: its LVLM comes trained")
    if args.whisper and "audio-text" not in stages:
        parser.error(f"the preset {args.preset} hears already: no --whisper")
    runs.check_start(args)
    return args


def stages_of(preset):
    """Returns the stages that a preset has, in their order."""
    return [stage for stage in STAGES if PRESETS[preset].get(stage)]


def stages_to_train(args):
    """Returns the stage asked for, after those before it that have not left a run yet."""
    stages = stages_of(args.preset)
    before = [] if args.init else stages[: stages.index(args.stage)]
    return [s for s in before if not runs.finished(runs.folder(args, s))] + [args.stage]


def configure(args, stage):
    """Returns the Config of a stage, and the folder of its run."""
    # The preset's values. A stage starts from the run of the one before it.
    preset, stages = PRESETS[args.preset], stages_of(args.preset)
    values = preset.get(f"{stage} --whisper" if args.whisper else stage, preset[stage])
    before = stages[: stages.index(stage)]
    init = str(runs.folder(args, before[-1])) if before else preset["lvlm"]
    whisper = (args.whisper or preset["whisper"]) if stage == "audio-text" else None
    folder = f"runs/{args.preset}/data-s{args.seed}/{stage}"
    config = Config(stage, args.seed, init, whisper, [folder], **values)

    # Then the flags. The loss's are for the last stage; most for the stage that --stage names.
    flags, out = ["max_tiles", "audio_seconds", "train"], runs.folder(args, stage)
    if stage == "vision-audio":
        flags += ["alpha", "temperature", "on_policy"]
    if stage == args.stage:
        flags += ["data", "init", "lr", "global_batch", "micro_batch", "max_steps"]
        out = args.out or out
        config.samples = None if args.data else config.samples
    for flag in flags:
        if getattr(args, flag) is not None:
            setattr(config, flag, getattr(args, flag))
    if stage == "vision-text":
        config.train = "lvlm"
    return config, Path(out)


# ---- what a step learns from ---------------------------------------------------------------------


def make_epoch(config, ollm, rank=0, world_size=1):
    """Returns the Epoch that a config describes, for one rank."""
    samples = data.Samples(config.data, ollm.settings, STAGES[config.stage][0])
    collate = functools.partial(data.collate, tokenizer=ollm.tokenizer,
                                mel_extractor=ollm.mel_extractor, settings=ollm.settings)

    # Each sample is a group of its own, but in the built-in base's lessons.
    order = [[i] for i in range(len(samples))[: config.samples]]
    random.Random(config.seed).shuffle(order)
    if config.stage == "vision-text":
        order, collate = lessons(samples.rows, collate, config.seed)
    return data.Epoch(config, samples, order, collate, rank, world_size)


def learning_rate(step, steps, peak):
    """Returns the rate of a step: linear warmup (WARMUP of the steps), then cosine to 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---- the loop ------------------------------------------------------------------------------------


def draw_on_policy(config, step, ollm, micro_batches, collate):
    """Returns a step's micro-batches and alpha, as they are or on-policy.

    On-policy (in a share of the steps), the student's own answers to the spoken questions replace
    the data's, and only the KL counts (alpha 1).
    """
    if random.Random(f"{config.seed}/{step}").random() >= config.on_policy:
        return micro_batches, config.alpha
    own = []
    for batch in micro_batches:
        if "samples" in batch:  # a rank may have none
            # As text, tokenised anew: both branches score the same tokens.
            answers = ollm.answer(batch["samples"], ("audio",), keep_end=True)["audio"]
            batch = collate([{**sample, "answer": answer, "end": ""}
                             for sample, answer in zip(batch["samples"], answers)])
        own.append(batch)
    return own, 1.0


def forward_backward(model, micro_batches, alpha, temperature, device, world_size):
    """Computes one step's gradient from this rank's micro-batches.

    Returns the global batch's [loss, kl, ce], three numbers. Every answer token of that batch
    counts the same, whatever its rank: sums are divided by the global number of answer tokens, and
    multiplied by world_size because DDP averages gradients over the ranks.
    """
    micro_batches = [processes.to_device(batch, device) for batch in micro_batches]
    n_tokens = sum(map(data.count_answer_tokens, micro_batches))
    n_tokens, = processes.all_reduce([n_tokens], device)

    # Ranks exchange gradients once a step, with the last micro-batch.
    sums = torch.zeros(3, dtype=torch.float64)
    for i, batch in enumerate(micro_batches):
        exchange_later = world_size > 1 and i < len(micro_batches) - 1
        with model.no_sync() if exchange_later else contextlib.nullcontext():
            with processes.half_precision(device):
                loss, kl, ce = model(batch, alpha, temperature, n_tokens)
            (loss * world_size).backward()
        sums += torch.stack([loss, kl, ce]).detach().cpu()
    return processes.all_reduce(sums.tolist(), device)


def train_stage(args, config, out, rank, world_size, device):
    """Trains one stage for one epoch. Leaves a run in the folder `out`."""
    # Model and data
    ollm = start_model(config, device).move_to(device)
    epoch = make_epoch(config, ollm, rank, world_size)
    n_steps = min(len(epoch), config.max_steps or len(epoch))
    trained = {name: p for name, p in ollm.named_parameters() if p.requires_grad}

    # The optimizer, and the checkpoint: weights, moments and the number of steps, read now if it is
    # there. Nothing else has a state. It names data and start by SHA-256, as folders may move.
    optimizer_class = Muon if config.muon else torch.optim.AdamW
    optimizer = optimizer_class(trained.values(), betas=BETAS, weight_decay=0.0, fused=True)
    identity = {**asdict(config), "data": epoch.samples.fingerprint(),
                "init": config.init and runs.fingerprint(config.init)}
    saved = out / "checkpoint.safetensors"
    first = checkpoint.load(saved, identity, n_steps, trained, optimizer, device)

    # DDP. In vision-text, micro-batches without a picture leave the vision encoder unused.
    model = processes.data_parallel(ollm, find_unused_parameters=config.stage == "vision-text")
    if rank == 0:
        log = checkpoint.open_log(out / "log.jsonl", first)
        print(f"{len(epoch.samples)} samples in {len(epoch.order)} groups, {n_steps} steps on "
              f"{world_size} x {device}, {sum(map(torch.numel, trained.values())):,} parameters "
              "trained")
        for key, value in asdict(config).items():
            print(f"    {key:14} {value}")
        batch = epoch.micro_batch(epoch.groups(0)[: config.micro_batch])
        print(checkpoint.describe_norms(ollm, batch, device), end="")
        if first:
            print(f"{config.stage}: going on after step {first}")

    # On a GPU, other processes read the next steps ahead; a CPU has none to spare.
    cuda = device.type == "cuda"
    loader = DataLoader(epoch, batch_size=None, sampler=range(first, n_steps), pin_memory=cuda,
                        num_workers=args.workers if cuda else 0,
                        worker_init_fn=processes.ignore_interrupts)
    bar = tqdm(loader, desc=config.stage, unit="step", disable=rank > 0, mininterval=1,
               initial=first, total=n_steps)
    started, longest_save = time.time(), 0.0
    with processes.deferred_signals() as signals:
        for step, micro_batches in enumerate(bar, first):
            # 1. The learning rate, a function of the step alone
            lr = learning_rate(step, len(epoch), config.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # 2. The paired passes, forward and backward (on-policy: of the student's own answers)
            micro_batches, alpha = draw_on_policy(config, step, ollm, micro_batches, epoch.collate)
            loss, kl, ce = forward_backward(model, micro_batches, alpha, config.temperature,
                                            device, world_size)

            # 3. Clip and update, unless something is not a number
            grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), CLIP).item()
            if not math.isfinite(loss + grad_norm):
                raise BadInput(f"step {step}: loss {loss}, gradient norm {grad_norm}; stopped "
                               f"before the weights were touched; samples {epoch.sample_ids(step)}")
            optimizer.step()
            optimizer.zero_grad()

            # 4. Log
            done = step + 1
            if rank == 0:
                numbers = {"loss": loss, "kl": kl, "ce": ce, "lr": lr, "grad_norm": grad_norm}
                speed = {"steps_per_s": (done - first) / (time.time() - started),
                         "longest_save_s": longest_save}
                print(json.dumps({"step": step, **numbers, "time": speed}), file=log, flush=True)
                bar.set_postfix_str(" ".join(f"{k} {v:.3g}" for k, v in numbers.items()), False)

            # 5. Save now and then, and before all stop because a signal came to one of them
            stop, = processes.all_reduce([len(signals)], device)
            if rank == 0 and done < n_steps and (stop or done % args.save_every == 0):
                seconds = checkpoint.save(saved, done, identity, trained, optimizer)
                longest_save = max(longest_save, seconds)
            if stop and done < n_steps:
                processes.wait_for_all()  # torchrun ends all processes once one has ended
                raise KeyboardInterrupt(f"{config.stage} stands at {done} of {n_steps} steps, "
                                        f"saved in {out}")

    if rank == 0:
        log.close()
        runs.save(ollm, out, asdict(config))
        for path in (saved, *out.glob("answers-*.jsonl")):  # an earlier run's answers go, too
            path.unlink(missing_ok=True)
        print(f"finished in {time.time() - started:.0f} s, the run is in {out}")


# ---- the command ---------------------------------------------------------------------------------


def main():
    args = parse_arguments()
    rank, world_size, device = processes.set_up_processes(args.device)
    print0 = print if rank == 0 else lambda *_: None
    if args.preset != "shapes" and args.device is None and device.type == "cpu":
        raise BadInput("no GPU was found (does `nvidia-smi` show one, with a driver as new as this "
                       "torch's CUDA?); --device cpu trains without one")
    if args.preset == "shapes":
        print0("This is the built-in world: tiny models. The paper's own: see README, Reproduce.")

    for stage in processes.broadcast(stages_to_train(args)):
        config, out = configure(args, stage)
        with folder_lock(out) if rank == 0 else contextlib.nullcontext():
            if processes.broadcast(runs.finished(out)):
                runs.check_same(out, asdict(config))
                print0(f"{stage}: finished already, by the code as it was then: {out}. For changed "
                       "code delete it, or give --out.")
                continue
            has_own_data = args.data and stage == args.stage
            if rank == 0 and args.preset == "shapes" and not has_own_data:
                make_if_missing(config.data[0], args.seed)
            processes.wait_for_all()
            print0(f"\n{stage}: {STAGES[stage][1]}.")
            with enough_memory(f"{stage}: a smaller --micro-batch gives the same numbers"):
                train_stage(args, config, out, rank, world_size, device)
    processes.close_processes()

    # A default run ends with the table, and with what to try next.
    is_default = not (args.out or args.data or args.init or args.max_steps)
    if args.preset == "shapes" and stage == "vision-audio" and is_default:
        chain = runs.chain_options(args)
        if rank == 0:
            processes.run_script("eval.py", *chain)
        print0("\nNext, the same start with another loss:\n    torchrun --standalone train.py "
               f"--alpha {0 if args.alpha else 0.75:g} {shlex.join(chain)}")
    else:
        asked = "" if args.preset == "shapes" else f" --data {config.data[0]} --n 200"
        print0(f"\nThe result is in {out}. To look at it:\n    python eval.py {out}{asked}")


if __name__ == "__main__":
    with readable_errors():
        main()
