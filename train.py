"""Train an LVLM to listen, by the paper's four steps: one loop, three stages (the first two of its steps are one here).

    torchrun train.py --alpha 0.75                         # the built-in world, from nothing to a Self-KD run
    torchrun train.py --alpha 0                            # the same start, conventional SFT
    torchrun train.py --on-policy 1                        # the student answers, the teacher scores: without a label
    torchrun --nproc_per_node 2 train.py --alpha 0.75      # the same steps on two processes
    python train.py --stage audio-text --max-steps 20 --out runs/try    # one stage, a few steps, without torchrun
    torchrun --nproc_per_node 8 train.py --preset internvl2-1b --alpha 0.75 --data FOLDER      # the paper's own run

| --stage      | input -> target                     | trained                     |
| vision-text  | image + written question -> answer  | the LVLM (built-in world only; real ones come trained) |
| audio-text   | speech -> transcript                | audio encoder and projector |
| vision-audio | image + spoken question -> answer   | audio encoder and projector, alpha * KL + (1 - alpha) * CE |

A stage starts from what the one before it left in its default folder; what is missing is made first. One epoch, AdamW,
cosine. Runs go to runs/<preset>/<stage>-s<seed>, and the last stage's to runs/<preset>/vision-audio-a<alpha>-s<seed>.
What is interrupted goes on from its last checkpoint when the same command is given again.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import faults
import model
import pretrained
from data import IGNORE
from faults import CHECKPOINT, BadInput

STAGES = {  # the forms of the question that each reads
    "vision-text": ("question",), "audio-text": ("audio",), "vision-audio": ("question", "audio")}
PRESETS = {  # by stage: peak learning rate, samples a step over all processes, samples a forward pass
    "shapes": {
        "vision-text": {"lr": 1.5e-3, "global_batch": 48, "micro_batch": 48},
        "audio-text": {"lr": 1.5e-3, "global_batch": 8, "micro_batch": 8},
        "vision-audio": {"lr": 1e-3, "global_batch": 8, "micro_batch": 8},
    },
    "internvl2-1b": {  # section 4.1; the micro-batches are ours
        "audio-text": {"lr": 4e-5, "global_batch": 128, "micro_batch": 16},
        "vision-audio": {"lr": 4e-5, "global_batch": 64, "micro_batch": 8},
    },
}
MODELS = {"internvl2-1b": ("OpenGVLab/InternVL2-1B", "openai/whisper-large-v3")}  # LVLM and Whisper, hub ids
WARMUP = 0.03  # share of the steps
CLIP = 1.0  # largest norm of a gradient
BETAS = (0.9, 0.98)  # of AdamW


def learning_rate(step, steps, peak):
    """Cosine from `peak` to 0 over `steps`, after a short linear warmup."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def epoch_order(rows, seed):
    """The order in which an epoch visits the samples: one seeded permutation, lines of an earlier "phase" first.

    Only the built-in `vision-text` data has phases: descriptions (the paper's step 1), then all questions (step 2).
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return sorted(order, key=lambda i: rows[i].get("phase", 0))


def deal(order, step, global_batch, micro_batch, length, rank, world):
    """This rank's micro-batches in a step, [([index, ...], idle), ...], as many on every rank.

    Step k takes entries k * G to (k + 1) * G of the order, whatever the number of processes; only within them like
    lengths come together. A rank for which nothing is left goes through the motions with a sample, idle.
    """
    batch = sorted(order[step * global_batch: (step + 1) * global_batch], key=length)
    count = math.ceil(len(batch) / micro_batch / world) * world  # micro-batches over all ranks
    cuts = [round(i * len(batch) / count) for i in range(count + 1)]
    chunks = [(batch[a:b], False) if a < b else (batch[:1], True) for a, b in zip(cuts, cuts[1:])]
    return chunks[rank::world]


class Steps(torch.utils.data.Dataset):
    """The epoch as an indexable list of steps, each a list of this rank's collated micro-batches."""

    def __init__(self, samples, collate, training, micro_batch, rank, world):
        self.samples, self.collate, self.training = samples, collate, training
        self.micro_batch, self.rank, self.world = micro_batch, rank, world
        self.order, self.global_batch = epoch_order(samples.rows, training["seed"]), training["global_batch"]

    def __len__(self):
        return math.ceil(len(self.order) / self.global_batch)

    def __getitem__(self, step):
        own = random.Random(f"{self.training['seed']}/{step}").random() < self.training["on_policy"]
        chunks = deal(self.order, step, self.global_batch, self.micro_batch, self.samples.length, self.rank, self.world)
        return [{**self.collate([self.samples[i] for i in indices], answers=not own), "own": own, "idle": idle}
                for indices, idle in chunks]

    def ids(self, step):
        """The ids of the samples that all ranks together learn from in a step."""
        return [self.samples.rows[i]["id"] for i in self.order[step * self.global_batch:][: self.global_batch]]


def to(batch, device):
    """The batch with all its tensors on the device."""
    if isinstance(batch, dict):
        return {key: to(value, device) for key, value in batch.items()}
    return batch.to(device, non_blocking=True) if isinstance(batch, torch.Tensor) else batch


def total(values, device):
    """The sums of some floats over all processes."""
    if not dist.is_initialized():
        return values
    values = torch.tensor(values, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    dist.all_reduce(values)
    return values.tolist()


def agreed(truth, rank, device):
    """What holds for rank 0, for all processes: what lies on disk may change between two looks."""
    return total([float(truth and rank == 0)], device) == [1.0]


def wait_for_all(world):
    """Returns when all processes have come here."""
    if world > 1:
        dist.barrier()


def answered(ollm, batch, device):
    """A micro-batch with the answers to be learnt: the data's, the student's own, or for an idle rank none."""
    if batch["own"]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            batch = ollm.answer_itself(to(batch, device))
    if batch["idle"]:
        for suffix in filter(None, (batch["text"], batch["audio"])):
            suffix["labels"].fill_(IGNORE)
    return batch


def train_step(ollm, micro_batches, training, device, world):
    """Forward and backward over this rank's micro-batches; returns its share of the global batch's [loss, kl, ce].

    Every answer token of the global batch counts alike: local sums are divided by the global count, and multiplied by
    the number of processes because DistributedDataParallel averages gradients over them. On a GPU the matrix products
    are in bfloat16; weights, their updates and the loss stay in float32. Of the student's own answers nothing but the
    teacher can say how good they are: their loss is the KL alone.
    """
    alpha = 1.0 if micro_batches[0]["own"] else training["alpha"]
    micro_batches = [answered(getattr(ollm, "module", ollm), batch, device) for batch in micro_batches]
    labels = [model.asked(batch)["labels"] for batch in micro_batches]
    n_tokens, = total([float(sum((of_batch != IGNORE).sum() for of_batch in labels))], device)
    sums = [0.0, 0.0, 0.0]
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1  # gradients are averaged over the processes once a step
        with contextlib.nullcontext() if last or world == 1 else ollm.no_sync():
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                terms = ollm(to(batch, device), alpha, training["temperature"], n_tokens, training["divergence"])
            (terms[0] * world).backward()
        sums = [s + term.item() for s, term in zip(sums, terms)]
    return sums


def set_up_processes(device):
    """(rank, world, device): torchrun's environment, or a single process."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if device == "cpu":  # where it costs nothing: the same command gives the same bytes
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # that would cost
    if world > 1:
        store, *_ = next(dist.rendezvous("env://", rank, world))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # Processes that --max-restarts starts anew get the store of the dead, with their addresses still in it. (On
            # several nodes the counts may differ; TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun start a new one.)
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return rank, world, torch.device(device)


def run_folder(preset, stage, alpha, seed, on_policy=0.0, divergence="forward"):
    """Where a stage's run lies by default."""
    variant = f"-a{alpha:g}" + (f"-p{on_policy:g}" if on_policy else "") + ("-reverse" * (divergence == "reverse"))
    return Path("runs") / preset / f"{stage}{variant if stage == 'vision-audio' else ''}-s{seed}"


def start_model(stage, init, whisper, seed):
    """(the model a stage begins with, frozen but for what the stage trains; its LVLM's folder or hub id, or None).

    init     run folder, or for audio-text also the folder or hub id of an LVLM; whisper: likewise of a Whisper
    """
    torch.manual_seed(seed)
    if stage == "vision-text":
        ollm, base = model.OLLM(*model.build_lvlm()), None
    else:
        ollm, base = model.load_run(init), model.base_of(init)
    if stage == "audio-text" and ollm.audio_encoder is None:
        listening = pretrained.load_audio_encoder(whisper) if whisper else model.build_audio_encoder()
        ollm = model.OLLM(ollm.lvlm, ollm.tokenizer, ollm.settings, *listening)
    if stage == "vision-audio" and ollm.audio_encoder is None:
        raise BadInput(f"{init}: has no audio encoder; the stage vision-audio starts from an audio-text run")
    ollm.train_only(stage)
    return ollm, base


def checked_norm(trained, loss, where):
    """Clips the gradient and returns the norm that it had; raises BadInput if it or the loss is not a number."""
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), CLIP).item()
    if not math.isfinite(loss + norm):
        raise BadInput(f"{where}: loss {loss}, gradient norm {norm}; stopped before the weights were touched")
    return norm


def prepare_model(args, stage, init, whisper, device):
    """The model of a stage on its device, in its precision, with the command line's tiles and seconds; and its base."""
    ollm, base = start_model(stage, init, whisper, args.seed)
    ollm.settings |= {k: v for k in ("max_tiles", "audio_seconds") if (v := getattr(args, k)) is not None}
    ollm = (model.to_float64(ollm) if args.float64 else ollm).to(device)
    if device.type == "cuda" and stage != "vision-text":
        model.to_bfloat16(ollm.lvlm)  # frozen: no update is too small for it
    return ollm, base


def epoch_of(training, ollm, micro_batch, rank, world):
    """The epoch that a training's dict describes, for this rank."""
    samples, spread = data.Samples(training["data"], ollm.settings, STAGES[training["stage"]]), None
    if training["stage"] == "vision-text":
        spread = training["seed"]
    collate = functools.partial(data.collate, tokenizer=ollm.tokenizer, mel_extractor=ollm.mel_extractor,
                                settings=ollm.settings, stretch_seed=spread)
    return Steps(samples, collate, training, micro_batch, rank, world)


def contents(training, samples):
    """A training's dict with what lies in its places instead of their names, for its checkpoints.

    How many steps are asked for is left out: any of them may follow those that were taken.
    """
    init = training["init"]
    if init is not None:  # load_run has just compared a run's weights with what is noted there
        init = model.about_run(init).get("fingerprint") or model.fingerprint(init)
    return {**{key: training[key] for key in training if key != "max_steps"}, "data": samples.fingerprint(),
            "init": init}


def train_stage(args, training, out, chosen, processes):
    """One stage, one epoch; leaves a run in `out`.

    training   {"stage", "alpha", "data", "init", ...}: what the run's numbers depend on, see `describe`
    chosen     {"micro_batch", "save_every"}
    processes  (rank, world, device)
    """
    (rank, world, device), stage, lr = processes, training["stage"], training["lr"]
    ollm, base = prepare_model(args, stage, training["init"], training["whisper"], device)
    steps = epoch_of(training, ollm, chosen["micro_batch"], rank, world)
    n_steps = min(len(steps), training["max_steps"] or len(steps))
    trained = {name: p for name, p in ollm.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, betas=BETAS, weight_decay=0.0, fused=True)
    same = contents(training, steps.samples)
    first = faults.load_checkpoint(out / CHECKPOINT, trained, optimizer, same)
    if total([float(first)], device) != [float(first * world)]:
        raise BadInput(f"{out}: not all processes find the same checkpoint; all nodes must share the folder")
    if first > n_steps:
        raise BadInput(f"{out}: its checkpoint has {first} steps behind it already, more than the {n_steps} asked for")
    # Text-only micro-batches leave the vision encoder without gradient, which DDP must be told.
    wrapped = DistributedDataParallel(ollm, find_unused_parameters=stage == "vision-text") if world > 1 else ollm
    log = faults.open_log(out / "log.jsonl", first) if rank == 0 else None
    if rank == 0:
        print(f"{stage}: {len(steps.samples)} samples of {training['data']}, {n_steps} steps of {steps.global_batch} "
              f"on {world} x {device}, lr {lr:g}, {sum(p.numel() for p in trained.values()):,} parameters trained"
              + (f"; going on after step {first} of an interrupted run" if first else ""))
    loader = torch.utils.data.DataLoader(steps, batch_size=None, sampler=range(first, n_steps),
                                         num_workers=args.workers if device.type == "cuda" else 0,
                                         worker_init_fn=faults.ignore_interrupts, pin_memory=device.type == "cuda")
    started, done = time.time(), first
    with (faults.noted_signals() as received, tqdm(loader, desc=stage, unit="step", disable=rank > 0, mininterval=1,
                                                   initial=first, total=n_steps) as bar):
        for step, micro_batches in enumerate(bar, first):
            torch.manual_seed(args.seed + 1_000_003 * step)  # for whoever adds dropout; so far nothing is drawn
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, len(steps), lr)
            terms = train_step(wrapped, micro_batches, training, device, world)
            loss, kl, ce, stop = total([*terms, float(len(received))], device)  # a signal to one process stops all
            norm = checked_norm(trained, loss, f"step {step}, samples {', '.join(steps.ids(step))}")
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1
            if rank == 0:
                speed = (done - first) * steps.global_batch / (time.time() - started)
                line = {"step": step, "loss": loss, "kl": kl, "ce": ce, "lr": group["lr"], "grad_norm": norm}
                print(json.dumps({**line, "time": {"samples_per_s": speed}}), file=log, flush=True)
                bar.set_postfix_str(f"loss {loss:.3f} kl {kl:.3f} ce {ce:.3f} lr {group['lr']:.1e} |g| {norm:.2f} "
                                    f"{speed:.0f} samples/s", refresh=False)
                if done < n_steps and (stop or done % chosen["save_every"] == 0):
                    faults.save_checkpoint(out / CHECKPOINT, done, trained, optimizer, same)
            if stop:
                break
        if rank == 0 and done >= n_steps:
            about = {**training, "steps": done, "contents": same, "versions": faults.versions()}
            model.save_run(ollm, out, about, base)
            (out / CHECKPOINT).unlink(missing_ok=True)
        stop, = total([float(len(received))], device)
    if stop:
        raise KeyboardInterrupt(f"{stage} stands at {done} of {n_steps} steps, saved in {out}")
    if rank == 0:
        log.close()
        print(f"{stage}: finished in {time.time() - started:.0f} s, the run lies in {out}")


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="shapes", help="which models, data and settings")
    parser.add_argument("--stage", choices=STAGES, default="vision-audio", help="what to train; what it needs is made")
    parser.add_argument("--alpha", type=float, default=0.75, help="weight of the KL; 0 is SFT, 1 is distillation alone")
    parser.add_argument("--temperature", type=float, default=1.0, help="of both distributions in the KL")
    parser.add_argument("--on-policy", type=float, default=0.0, metavar="P", help="share of the steps in which the "
                        "student answers by itself (up to 48 tokens) and the teacher scores that: KL alone, no label")
    parser.add_argument("--divergence", choices=["forward", "reverse"], default="forward", help="KL(teacher || "
                        "student), the paper's, or KL(student || teacher)")
    parser.add_argument("--data", help="prepared folder of the stage (default: the built-in world's)")
    parser.add_argument("--init", help="run folder the stage starts from (default: that of the stage before it); "
                        "for audio-text also the folder or hub id of an InternVL2")
    parser.add_argument("--whisper", help="folder or hub id of the Whisper that audio-text starts from, if "
                        "--init cannot listen yet")
    parser.add_argument("--max-tiles", type=data.at_least_one, help="squares a picture is cut into, thumbnail aside")
    parser.add_argument("--audio-seconds", type=float, help="pad speech to so many seconds; 30 is plain Whisper "
                        "(default: its real length)")
    parser.add_argument("--out", help="run folder that the stage leaves")
    parser.add_argument("--seed", type=int, default=0, help="of the start, the order and the built-in data")
    parser.add_argument("--max-steps", type=data.at_least_one, help="stop early; the cosine keeps its full length")
    parser.add_argument("--save-every", type=data.at_least_one, help="steps between checkpoints (default: 500); an "
                        "interrupted run goes on from the last one")
    parser.add_argument("--global-batch", type=data.at_least_one, help="samples a step, over all processes")
    parser.add_argument("--micro-batch", type=data.at_least_one, help="samples a forward pass")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--workers", type=int, default=4, help="processes that read ahead of each GPU (a CPU has none "
                        "to spare)")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: cuda if there is one")
    parser.add_argument("--float64", action="store_true", help="double precision, to compare runs exactly")
    args = parser.parse_args()
    if args.stage not in PRESETS[args.preset]:
        parser.error(f"the preset {args.preset} has no stage {args.stage}: its LVLM comes trained")
    for name in ("alpha", "on_policy"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} is a weight between 0 and 1, not {getattr(args, name)}")
    for name in ("temperature", "lr"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name} must be above 0, not {value}")
    if abs(args.seed) >= 2**62:  # torch takes 64 bits, of the seed and what is added to it
        parser.error(f"--seed must be smaller than 2^62, not {args.seed}")
    if args.audio_seconds is not None and not 0 < args.audio_seconds <= data.MAX_SECONDS:
        parser.error(f"--audio-seconds is between 0 and {data.MAX_SECONDS}, not {args.audio_seconds}")
    return args


def prepare_data(args, stage, folder):
    """Makes the built-in world if a stage's default data folder is missing; asks for real data."""
    if (Path(folder) / "samples.jsonl").exists():
        return
    if args.preset != "shapes":
        raise BadInput(f"{folder}: no data for the stage {stage}. Prepare some (`python data.py --help` lists the "
                       f"sources) and name it: --stage {stage} --data FOLDER")
    command = [sys.executable, str(Path(__file__).with_name("data.py")), "shapes", "--seed", str(args.seed)]
    print(f"{folder} is missing; running: python data.py shapes --seed {args.seed}", flush=True)
    if subprocess.run(command, env={**os.environ, faults.PARENT: str(os.getpid())}).returncode:
        raise BadInput("the built-in world could not be made (see above)")


def check_finished(out, training):
    """Says that `out` holds this training's run; raises BadInput if it is that of another."""
    other = faults.differences(model.about_run(out)["training"], training)
    if other:
        raise BadInput(f"{out}: holds the finished run of another training ({other}): choose another --out")
    (out / CHECKPOINT).unlink(missing_ok=True)  # if it was killed just before it would have done so itself
    print(f"{training['stage']}: finished already, the run lies in {out} (delete it to train it again)")


def describe(args, stage, init, asked):
    """(training, out, chosen) of a stage: what its numbers depend on, its run folder, and the settings that are left.

    asked: whether it is the command line's own stage, to which --data, --init, --out, --lr and so on apply; --seed,
    --max-tiles, --audio-seconds and --float64 apply to all
    """
    options = vars(args) if asked else {}
    chosen = {"save_every": 500, "whisper": MODELS.get(args.preset, (None, None))[1], **PRESETS[args.preset][stage]}
    chosen |= {name: options[name] for name in chosen if options.get(name) is not None}
    folder = options.get("data") or f"runs/{args.preset}/data-s{args.seed}/{stage}"
    init = options.get("init") or init
    loss = {"alpha": 0.0, "temperature": 1.0, "on_policy": 0.0, "divergence": "forward"}
    if stage == "vision-audio":  # the others know nothing but CE
        loss = {name: getattr(args, name) for name in loss}
    training = {"stage": stage, **loss, "seed": args.seed, "lr": chosen.pop("lr"),
                "global_batch": chosen.pop("global_batch"), "max_steps": options.get("max_steps"),
                "max_tiles": args.max_tiles, "audio_seconds": args.audio_seconds, "float64": args.float64,
                "data": str(folder), "init": init and str(init),
                "whisper": chosen.pop("whisper") if stage == "audio-text" else None}
    out = run_folder(args.preset, stage, args.alpha, args.seed, args.on_policy, args.divergence)
    return training, Path(options.get("out") or out), chosen


def main():
    """The asked stage, after whatever it needs and does not find."""
    args = parse_arguments()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        faults.end_with(os.getppid())
    processes = rank, world, device = set_up_processes(args.device)
    say = print if rank == 0 else lambda *_: None
    if args.preset == "shapes":
        say("This is the built-in world: drawn pictures, synthetic speech, tiny models. The paper's own run is:\n"
            "    torchrun --nproc_per_node 8 train.py --preset internvl2-1b --alpha 0.75 --data FOLDER")
    stages, before = list(PRESETS[args.preset]), MODELS.get(args.preset, (None, None))[0]
    for stage in stages[: stages.index(args.stage) + 1]:
        asked = stage == args.stage
        training, out, chosen = describe(args, stage, before, asked)
        before = out
        if not asked and (args.init or agreed((out / "ollm.json").exists(), rank, device)):
            cut = not args.init and model.about_run(out)["training"].get("max_steps")
            if cut:
                say(f"{stage}: note that {out}, which is used here, was stopped after {cut} steps (--max-steps)")
            continue
        with contextlib.nullcontext() if rank > 0 else faults.only_writer(out):
            if agreed((out / "ollm.json").exists(), rank, device):  # before, or by whom we have waited for
                if asked and rank == 0:
                    check_finished(out, training)
                continue
            if rank == 0 and not (asked and args.data):
                prepare_data(args, stage, training["data"])
            wait_for_all(world)
            train_stage(args, training, out, chosen, processes)
    say(f"\nThe result lies in {out}. To look at it:")
    if args.preset == "shapes":
        say(f"    python eval.py --seed {args.seed}        # text against speech, every run of this seed side by side")
    else:
        say(f'    python eval.py {out} --image PICTURE --question "..."        # in writing, and aloud by TTS')
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    with faults.readable_errors():
        main()
