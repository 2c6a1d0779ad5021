"""Train an LVLM to listen: one loop, three stages, one epoch each.

    torchrun train.py --alpha 0.75                       # the built-in world, from nothing
    torchrun train.py --alpha 0                          # the same start, supervised fine-tuning
    torchrun --nproc_per_node 2 train.py --alpha 0.75    # the same steps on two processes
    python train.py --stage audio-text --max-steps 20 --out runs/try    # one stage, a few steps
    torchrun --nproc_per_node 8 train.py --preset internvl2-1b --alpha 0.75 --data FOLDER

| --stage      | input -> target                    | trained                                |
| vision-text  | image + written question -> answer | the LVLM; in the built-in world only   |
| audio-text   | speech -> transcript               | audio encoder and projector            |
| vision-audio | image + spoken question -> answer  | audio encoder and projector, KL and CE |

A stage starts from the run of the stage before it, and trains that first if it is missing. Runs go
to runs/<preset>/. After an interruption the same command goes on from the last checkpoint.
"""

import plumbing  # isort: skip  (before torch: it tells torch's threads how to wait)
import argparse
import contextlib
import functools
import math
import random
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import data
from data import IGNORE
from model import OLLM, half_precision
from plumbing import runs
from plumbing.checkpoint import Resumable
from plumbing.files import BadInput, only_writer, readable_errors
from plumbing.prepared import how_asked
from plumbing.processes import (all_sum, broadcast, close_processes, run_script, set_up_processes,
                                wait_for_all)
from real.checkpoints import load_audio_encoder
from real.families import BASES
from world.make import make_if_missing
from world.models import build_audio_encoder, build_lvlm, spread_positions
from world.muon import Muon

# ---- settings ------------------------------------------------------------------------------------

PRESETS = {
    "shapes": {  # the built-in world: nothing is downloaded
        "lvlm": None,
        "whisper": None,
        # Here a batch counts pictures, each with four questions or lists: see Epoch.
        "vision-text": {"muon": True, "lr": 2e-3, "global_batch": 12, "micro_batch": 12},
        "audio-text": {"muon": True, "lr": 3e-3, "global_batch": 8, "micro_batch": 4},
        "vision-audio": {"lr": 1e-3, "global_batch": 8, "micro_batch": 8},
    },
    # The paper's base models and one more; rates and batches are Appendix A's, micro-batches ours.
    **{name: {
        "lvlm": lvlm,
        "whisper": "openai/whisper-large-v3",
        "audio-text": {"lr": 4e-5, "global_batch": 128, "micro_batch": clips},
        "vision-audio": {"lr": 4e-5, "global_batch": 64, "micro_batch": 8},
    } for name, (lvlm, clips) in BASES.items()},
}
STAGES = {  # which forms of the question each reads
    "vision-text": ("question",),
    "audio-text": ("audio",),
    "vision-audio": ("question", "audio"),
}
PURPOSES = {  # what each learns and why, and its minutes in the built-in world on two CPU cores
    "vision-text": ("the model learns to see and to read questions. It will be the teacher; from "
                    "here on it is frozen", 5),
    "audio-text": ("the audio encoder and the projector learn to hear, by transcribing speech", 2),
    "vision-audio": ("audio encoder and projector learn to answer spoken questions: alpha weighs "
                     "the model's own answers on reading them (KL) against the data's (CE)", 2),
}
WARMUP = 0.03  # share of the steps
CLIP = 1.0  # largest norm of the gradient
BETAS = (0.9, 0.98)  # of AdamW


def parse_arguments():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # What to train
    add("--preset", choices=PRESETS, default="shapes", help="which models and settings")
    add("--stage", choices=STAGES, default="vision-audio", help="what to train")
    add("--alpha", type=float, default=0.75, help="weight of the KL: 0 is SFT, 1 KD alone")
    add("--temperature", type=float, default=1.0, help="of both distributions in the KL")
    add("--on-policy", type=float, default=0.0, metavar="P", help="share of the steps in which the "
        "student answers by itself and the teacher scores that: KL alone, no label")
    add("--seed", type=int, default=0, help="of the start, the order and the built-in data")
    # Where things lie
    add("--data", nargs="+", help="prepared folders (default: the built-in world's)")
    add("--init", help="run to start from; for audio-text also an LVLM's folder or hub id")
    add("--whisper", help="folder or hub id of the Whisper that audio-text starts from")
    add("--out", help="run folder that the stage leaves")
    # Optimization (default: the preset's)
    add("--lr", type=float, help="peak learning rate")
    add("--global-batch", type=int, help="samples a step, over all processes")
    add("--micro-batch", type=int, help="samples a forward pass")
    add("--max-steps", type=int, help="stop early; the cosine keeps its full length")
    # Inputs
    add("--max-tiles", type=int, help="squares that a picture is cut into, thumbnail aside")
    add("--audio-seconds", type=float, help="pad speech to so many seconds; 30 is plain Whisper")
    # Machine
    add("--device", choices=["cpu", "cuda", "mps"], help="default: cuda if there is one")
    add("--workers", type=int, default=4, help="processes that read ahead for each GPU")
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    args = parser.parse_args()
    if args.stage not in PRESETS[args.preset]:
        parser.error(f"the preset {args.preset} has no stage {args.stage}: its LVLM comes trained")
    if args.stage == "vision-text" and args.init:
        parser.error("the stage vision-text starts from nothing, not from --init")
    if not 0 <= args.alpha <= 1:
        parser.error(f"--alpha is a weight between 0 and 1, not {args.alpha}")
    return args


def stages_to_train(args):
    """Returns the stage asked for, after those before it that have not left a run yet."""
    stages = [stage for stage in STAGES if stage in PRESETS[args.preset]]
    before = [] if args.init else stages[: stages.index(args.stage)]
    missing = [stage for stage in before if not runs.finished(runs.folder(args, stage))]
    return missing + [args.stage]


def configure(args, stage):
    """Returns all that a stage's numbers depend on, as one dict, and the folder of its run."""
    preset, out = PRESETS[args.preset], runs.folder(args, stage)
    stages = [name for name in STAGES if name in preset]
    init = preset["lvlm"]
    if stage != stages[0]:
        init = str(runs.folder(args, stages[stages.index(stage) - 1]))
    config = {"stage": stage, "alpha": 0.0, "temperature": 1.0, "on_policy": 0.0, "seed": args.seed,
              "data": [f"runs/{args.preset}/data-s{args.seed}/{stage}"], "init": init,
              "whisper": preset["whisper"], "max_steps": None, "muon": False, **preset[stage],
              "max_tiles": args.max_tiles, "audio_seconds": args.audio_seconds}  # of all stages

    # The loss's settings are the last stage's: the others know nothing but CE.
    if stage == "vision-audio":
        config |= {key: getattr(args, key) for key in ("alpha", "temperature", "on_policy")}

    # Most of the command line is meant for the stage that it names, not for those before it.
    if stage == args.stage:
        out = args.out or out
        keys = ("data", "init", "whisper", "lr", "global_batch", "micro_batch", "max_steps")
        config |= {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
    return config, Path(out)


# ---- what a step learns from ---------------------------------------------------------------------


class Epoch(torch.utils.data.Dataset):
    """One epoch: item k is this rank's list of micro-batches for step k.

    The samples of a step depend on the seed and the step alone. So a run can go on after an
    interruption, also on another number of processes, and takes the same steps.
    """

    def __init__(self, config, samples, collate, rank=0, world_size=1):
        self.config, self.samples, self.collate = config, samples, collate
        self.rank, self.world_size = rank, world_size
        # The built-in base first learns to see (phase 0), then to answer (phase 1): world/make.py.
        # What is asked about one picture comes together: a group, which counts as one sample.
        groups = {}
        for i, row in enumerate(samples.rows):
            groups.setdefault((float(row.get("phase", 0)), row.get("group", i)), []).append(i)
        keys = list(groups)
        random.Random(config["seed"]).shuffle(keys)
        self.order = [groups[key] for key in sorted(keys, key=lambda key: key[0])]

    def __len__(self):
        return math.ceil(len(self.order) / self.config["global_batch"])

    def groups(self, step):
        """Returns the samples of a step on all ranks, in groups, shortest first."""
        size = self.config["global_batch"]
        return sorted(self.order[step * size: (step + 1) * size],
                      key=lambda group: sum(map(self.samples.length, group)))

    def __getitem__(self, step):
        # Every rank takes every world_size-th group, so that all have about the same work, and
        # the same number of micro-batches. Neighbours in length share one: little is padded.
        groups, size = self.groups(step), self.config["micro_batch"]
        mine = groups[self.rank:: self.world_size]
        longest = math.ceil(len(groups) / self.world_size)
        return [self.micro_batch(mine[start: start + size]) for start in range(0, longest, size)]

    def micro_batch(self, groups):
        """Collates some groups. Without any, one with weight 0: all ranks must take part."""
        samples = [self.samples[i] for group in groups or self.order[:1] for i in group]
        batch = self.collate(samples)
        for form in ("text", "audio"):
            if not groups and batch[form] is not None:
                batch[form]["labels"].fill_(IGNORE)
        return batch | ({"samples": samples} if self.config["on_policy"] and groups else {})


def make_epoch(config, ollm, rank=0, world_size=1):
    """Returns the Epoch that a config describes, for one rank."""
    samples = data.Samples(config["data"], ollm.settings, STAGES[config["stage"]])
    positions = spread_positions(config["seed"]) if config["stage"] == "vision-text" else None
    collate = functools.partial(
        data.collate, tokenizer=ollm.tokenizer, mel_extractor=ollm.mel_extractor,
        settings=ollm.settings, positions=positions)
    return Epoch(config, samples, collate, rank, world_size)


def learning_rate(step, steps, peak):
    """Returns the rate of a step: linear warmup, then cosine from `peak` to 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def start_model(config, device="cpu"):
    """Returns the OLLM that a stage starts from, frozen but for what the stage trains."""
    torch.manual_seed(config["seed"])
    stage = config["stage"]
    ollm = OLLM(*build_lvlm()) if stage == "vision-text" else OLLM.load(config["init"], device)
    if stage == "audio-text" and ollm.audio_encoder is None:
        whisper = config["whisper"]
        parts = load_audio_encoder(whisper) if whisper else build_audio_encoder()
        ollm = OLLM(ollm.lvlm, ollm.tokenizer, ollm.settings, ollm.base, *parts)
    if stage == "vision-audio" and ollm.audio_encoder is None:
        raise BadInput(f"{config['init']}: has no audio encoder; vision-audio starts from an "
                       "audio-text run")
    inputs = {key: config[key] for key in ("max_tiles", "audio_seconds")}
    ollm.settings |= {key: value for key, value in inputs.items() if value is not None}
    if stage == "vision-audio":  # evaluation asks as training did
        ollm.settings |= how_asked(config["data"])
    ollm.train_only(stage)
    return ollm


# ---- the loop ------------------------------------------------------------------------------------


def answer_itself(ollm, batch, collate):
    """Returns a micro-batch with the student's own answers to its spoken questions (on-policy)."""
    if "samples" not in batch:  # a rank without samples
        return batch
    answers = ollm.answer(batch["samples"], ("audio",), keep_end=True)["audio"]
    return collate([{**sample, "answer": answer, "end": ""}
                    for sample, answer in zip(batch["samples"], answers)])


def forward_backward(model, micro_batches, alpha, temperature, device, world_size):
    """Computes one step's gradient from this rank's micro-batches.

    Returns the global batch's [loss, kl, ce]. Every answer token of the global batch counts the
    same, whatever its rank: sums are divided by the global number of answer tokens, and multiplied
    by world_size because DDP averages gradients over the ranks.
    """
    micro_batches = [data.to(batch, device) for batch in micro_batches]
    n_tokens, = all_sum([sum(map(data.answer_tokens, micro_batches))], device)
    sums = [0.0, 0.0, 0.0]
    for i, batch in enumerate(micro_batches):
        # Ranks exchange gradients once a step, with the last micro-batch.
        is_last = i == len(micro_batches) - 1
        with contextlib.nullcontext() if is_last or world_size == 1 else model.no_sync():
            with half_precision(device):
                terms = model(batch, alpha, temperature, n_tokens)
            (terms[0] * world_size).backward()
        sums = [total + term.item() for total, term in zip(sums, terms)]
    return all_sum(sums, device)


def train_stage(args, config, out, rank, world_size, device):
    """Trains one stage for one epoch. Leaves a run in the folder `out`."""
    # Model and data
    ollm, stage = start_model(config, device).place(device), config["stage"]
    epoch = make_epoch(config, ollm, rank, world_size)
    n_steps = min(len(epoch), config["max_steps"] or len(epoch))

    # Optimizer and checkpoint, which names its data and its start by SHA-256: folders may move.
    trained = {name: p for name, p in ollm.named_parameters() if p.requires_grad}
    optimizer_class = Muon if config["muon"] else torch.optim.AdamW
    optimizer = optimizer_class(trained.values(), betas=BETAS, weight_decay=0.0, fused=True)
    content = {"data": epoch.samples.fingerprint(),
               "init": config["init"] and runs.fingerprint(config["init"])}
    progress = Resumable(out, config | content, trained, optimizer, args.save_every, device)
    model = ollm
    if world_size > 1:
        # In vision-text, micro-batches without a picture leave the vision encoder unused.
        model = DistributedDataParallel(ollm, find_unused_parameters=stage == "vision-text")
    if rank == 0:
        purpose, minutes = PURPOSES[stage]
        time_needed = f" (about {minutes} min on two CPU cores)" if args.preset == "shapes" else ""
        print(f"\n{stage}: {purpose}{time_needed}.\n{len(epoch.samples)} samples in "
              f"{len(epoch.order)} groups, {n_steps} steps on {world_size} x {device}, "
              f"{sum(map(torch.numel, trained.values())):,} parameters trained")

    for step, micro_batches in progress.steps(epoch, n_steps, args.workers):
        # 1. The learning rate, a function of the step alone
        lr, alpha = learning_rate(step, len(epoch), config["lr"]), config["alpha"]
        for group in optimizer.param_groups:
            group["lr"] = lr

        # 2. The paired passes, forward and backward (on-policy: of the student's own answers)
        if random.Random(f"{config['seed']}/{step}").random() < config["on_policy"]:
            micro_batches = [answer_itself(ollm, batch, epoch.collate) for batch in micro_batches]
            alpha = 1.0
        loss, kl, ce = forward_backward(model, micro_batches, alpha, config["temperature"], device,
                                        world_size)

        # 3. Clip and update, unless something is not a number
        grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), CLIP).item()
        if not math.isfinite(loss + grad_norm):
            ids = ", ".join(str(epoch.samples.rows[i]["id"])
                            for group in epoch.groups(step) for i in group)
            raise BadInput(f"step {step}: loss {loss}, gradient norm {grad_norm}; stopped before "
                           f"the weights were touched; samples {ids}")
        optimizer.step()
        optimizer.zero_grad()

        # 4. Log; save now and then, or when a signal asks to stop
        progress.after_step(step, loss=loss, kl=kl, ce=ce, lr=lr, grad_norm=grad_norm)

    if rank == 0:
        ollm.save(out, config)
        print(f"{stage}: finished in {time.time() - progress.started:.0f} s, the run is in {out}")
    progress.finish()


# ---- the command ---------------------------------------------------------------------------------


def main():
    args = parse_arguments()
    rank, world_size, device = set_up_processes(args.device)
    print0 = print if rank == 0 else lambda *_: None
    if args.preset == "shapes":
        print0("This is the built-in world: drawn pictures, synthetic speech, tiny models. The "
               "paper's own run is:\n    torchrun --nproc_per_node 8 train.py "
               "--preset internvl2-1b --alpha 0.75 --data FOLDER")

    for stage in broadcast(stages_to_train(args)):
        (config, out), started = configure(args, stage), time.time()
        with only_writer(out) if rank == 0 else contextlib.nullcontext():
            if broadcast(runs.finished(out)):
                runs.check_same(out, config)
                print0(f"{stage}: finished already, the run is in {out} (delete it to train again)")
                continue
            if rank == 0:
                if args.preset == "shapes" and not (args.data and stage == args.stage):
                    make_if_missing(config["data"][0], args.seed)
            wait_for_all()
            train_stage(args, config, out, rank, world_size, device)
    seconds = time.time() - started
    close_processes()

    # A default run ends with the table, and with what to try next.
    is_default = not (args.out or args.data or args.init or args.max_steps)
    if args.preset == "shapes" and stage == "vision-audio" and is_default:
        if rank == 0:
            run_script("eval.py", "--seed", args.seed)
        took = f", about {seconds:.0f} s on this machine" if seconds > 1 else ""
        print0(f"\nNext, the same start with another loss{took}:\n"
               f"    torchrun train.py --alpha {0 if args.alpha else 0.75:g} --seed {args.seed}")
    else:
        print0(f"\nThe result is in {out}. To look at it:\n    python eval.py {out}")


if __name__ == "__main__":
    with readable_errors():
        main()
