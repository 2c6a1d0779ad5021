"""A run is a folder: where it lies, what ollm.json says, its base, its name in tables."""

import argparse
import hashlib
import json
import os
import re
import shlex
from collections import Counter
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import nn

from plumbing.files import BadInput, at, atomic_folder, in_range, read_json
from plumbing.processes import default_device

# ---- one run -------------------------------------------------------------------------------------


def folder(args, stage):
    """Returns the folder where a stage's run lies by default."""
    variant, chain = "", args.preset
    if stage == "vision-audio":
        variant = f"-a{args.alpha:g}" + (f"-p{args.on_policy:g}" if args.on_policy else "")
    if stage != "vision-text" and getattr(args, "train", "audio") == "projector":
        variant += "-projector"

    # In the built-in world, what listens through a real Whisper lies apart. The base is shared.
    if args.preset == "shapes" and args.whisper and stage != "vision-text":
        chain += f"-{Path(args.whisper).name}"
    return Path("runs") / chain / f"{stage}{variant}-s{args.seed}"


def chain_options(args):
    """Returns the options by which the other scripts find the runs of a train.py command."""
    return ["--seed", str(args.seed)] + (["--whisper", args.whisper] if args.whisper else [])


def check_start(args):
    """Raises BadInput if train.py's stage cannot start from its --init or --whisper.

    A run that hears already can only have been aligned from the Whisper that is named.
    """
    if args.stage == "vision-text" and (args.init or args.whisper):
        raise BadInput("the stage vision-text starts from nothing: no --init, no --whisper")
    aligned, start = folder(args, "audio-text"), args.init
    if args.stage == "vision-audio" and not start and finished(aligned):
        start = aligned
    if args.whisper and start and read_run_info(start)["base"] is not None:
        before = read_run_info(start)["training"].get("whisper") or "another encoder"
        if Path(before) != Path(args.whisper):
            raise BadInput(f"{start}: hears already, through {before}. --whisper is where an "
                           f"alignment starts, and this command trains none from {args.whisper}")


def finished(run):
    """Tells whether a folder holds a finished run: ollm.json is written last."""
    return (Path(run) / "ollm.json").exists()


def read_run_info(run):
    """Returns a finished run's ollm.json as a dict; the same keys for an LVLM's folder or hub id.

    Raises BadInput if it is neither.
    """
    path = Path(run) / "ollm.json"
    if finished(run):
        with at(path):
            info = read_json(path)
            return {"kind": kind_of(info["training"]), "recipe": hash_recipe(info), **info}
    is_hub_id = len(Path(run).parts) == 2 and not Path(run).is_absolute()
    if is_hub_id and not os.path.exists(run) or (Path(run) / "config.json").exists():
        return {"settings": None, "base": None, "kind": "base", "recipe": "",
                "training": {"stage": "vision-text", "alpha": 0.0, "seed": 0}}
    raise BadInput(f"{run}: not a finished run (it has no ollm.json)")


def can_listen(run):
    """Tells whether a run hears, or an LVLM that is no run: omni models do."""
    if read_run_info(run)["base"] is not None:
        return True
    config = read_json(fetch(run) / "config.json")
    return "audio_config" in config.get("thinker_config", config)


def save(ollm, run, config):
    """Writes a run folder: what was trained (safetensors), and how and on which base (JSON).

    ollm: model.py's OLLM; config: of the training
    """
    with atomic_folder(run, last="ollm.json") as folder:
        info = {"settings": ollm.settings.to_json(), "base": None, "training": config}
        if ollm.base is None:
            ollm.lvlm.save_pretrained(folder)
            ollm.tokenizer.save_pretrained(folder)
        else:
            weights = own_parts(ollm, ollm.whisper is None).state_dict()
            weights = {name: tensor.contiguous() for name, tensor in weights.items()}
            for part, source in (("base", ollm.base), ("whisper", ollm.whisper)):
                if source:
                    is_folder = Path(source).is_dir()
                    info[part] = os.path.relpath(source, run) if is_folder else str(source)
                    info[f"{part}_fingerprint"] = fingerprint(source)
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            ollm.audio_encoder.config.save_pretrained(folder)
            ollm.mel_extractor.save_pretrained(folder)
        info |= {"kind": kind_of(config), "recipe": hash_recipe(info)}
        (folder / "ollm.json").write_text(json.dumps(info, indent=1) + "\n")


def kind_of(training):
    """Returns the name of a training in tables, the same for all seeds: "SFT", "KD 0.75", ..."""
    alone = ", projector alone" if training.get("train") == "projector" else ""
    if training["stage"] != "vision-audio":
        return {"vision-text": "base", "audio-text": "aligned"}[training["stage"]] + alone
    alpha, on_policy = training["alpha"], training["on_policy"]
    kind = f"KD {alpha:g}" if alpha or on_policy else "SFT"
    if on_policy:
        kind += f", on-policy {on_policy:g}"
    if training["temperature"] != 1:
        kind += f", T {training['temperature']:g}"
    return kind + alone


def hash_recipe(info):
    """Returns the SHA-256 of what runs of one training with different seeds have in common.

    info: of ollm.json. Earlier versions wrote more keys whose value is None, so None is absent.
    """
    facts = {**info["training"], **info["settings"], "base": info["base"]}
    common = {key: value for key, value in facts.items()
              if value is not None and key not in ("seed", "micro_batch")}
    recipe = without_seed(json.dumps(common, sort_keys=True), facts["seed"])
    return hashlib.sha256(recipe.encode()).hexdigest()


def without_seed(text, seed):
    """Returns a text with paths without their mark of this seed, such as the "-s0" of data-s0."""
    return re.sub(rf"[-_]?(?<![a-z])s(eed)?[-_]?{seed}(?!\d)", "", text)


def own_parts(ollm, with_encoder):
    """Returns what a run holds of an OLLM that listens, as one module; all else lies elsewhere."""
    parts = {}
    if not (with_encoder and hasattr(ollm.audio_encoder, "proj")):  # which ends with the projector
        parts["projector"] = ollm.projector
    if with_encoder:
        parts["audio_encoder"] = ollm.audio_encoder
    return nn.ModuleDict(parts)


def source_of(run, part):
    """Returns where a run's part lies, a folder or hub id: the run itself if it was trained there.

    part: "base", the LVLM, or "whisper", the audio encoder
    """
    source = read_run_info(run).get(part)
    if source is None:
        return run
    beside = Path(os.path.normpath(Path(run) / source))
    return beside if beside.is_dir() else source


def checked_sources(run):
    """Returns a run's ollm.json and where its base and its Whisper lie, see `source_of`.

    Raises BadInput if one of them is another now than in training.
    """
    info = read_run_info(run)
    sources = [source_of(run, part) for part in ("base", "whisper")]
    for part, source in zip(("base", "whisper"), sources):
        if source != run and fingerprint(source) != info[f"{part}_fingerprint"]:
            raise BadInput(f"was trained on another {part} than lies in {source} now")
    return info, *sources


def differences(there, here, free=()):
    """Returns what two configs say differently, as text: "alpha is 0.75 there and 0 here".

    free: keys that may differ. "" if all others agree
    """
    return ", ".join(f"{key} is {there[key]} there and {here[key]} here" for key in here
                     if key not in free and placed(there.get(key, here[key])) != placed(here[key]))


def placed(setting):
    """Returns a setting with its paths as the disk has them: "data/" is "data"."""
    values = setting if isinstance(setting, list) else [setting]
    return [os.path.realpath(value) if isinstance(value, str) else value for value in values]


def check_same(run, config):
    """Raises BadInput if a finished run's folder holds another training than `config` asks for."""
    other = differences(read_run_info(run)["training"], config, free=("micro_batch",))
    if other:
        raise BadInput(f"{run}: holds the finished run of another training ({other}): "
                       "choose another --out")
    # A run that was killed just before it ended may have left its checkpoint.
    (Path(run) / "checkpoint.safetensors").unlink(missing_ok=True)


# ---- models --------------------------------------------------------------------------------------


def fetch(path):
    """Returns the folder of a model: `path` itself, or the hub's copy, downloaded if need be."""
    files = ("config.json", "ollm.json", "adapter_config.json")
    if any(Path(path, file).exists() for file in files):
        return Path(path)
    wanted = ["*.json", "*.txt", "chat_template.jinja", "tokenizer.model", "model.safetensors",
              "model-*.safetensors"]  # no code, no pickle
    with at(f"{path}: no such folder, and not from the Hugging Face hub (where there is a network, "
            f"`hf download {path} --local-dir FOLDER`, then name that folder)"):
        return Path(snapshot_download(str(path), allow_patterns=wanted))


def fingerprint(path):
    """Returns the SHA-256 of a model's configuration and weights, as hexadecimal text."""
    model_folder, digest = fetch(path), hashlib.sha256()
    for file in sorted([model_folder / "config.json", *model_folder.glob("model*.safetensors")]):
        digest.update(file.name.encode())
        with at(path), open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


# ---- several runs --------------------------------------------------------------------------------


def asked_for(args, listening=False):
    """Returns the runs that a command names, or else its seed's: base, aligned, every alpha found.

    listening: only those that can listen. Raises BadInput if there is none.
    """
    paths = args.runs
    if not paths:
        aligned = folder(args, "audio-text")
        trained = sorted(aligned.parent.glob(f"vision-audio-a*-s{args.seed}"))
        paths = [run for run in (folder(args, "vision-text"), aligned, *trained) if finished(run)]
    if not paths:
        command = f"torchrun --standalone train.py {shlex.join(chain_options(args))}"
        raise BadInput(f"{aligned.parent}: no finished run of seed {args.seed}; "
                       f"`{command}` makes one")
    able = [run for run in paths if not listening or can_listen(run)]
    if not able:
        raise BadInput(f"{', '.join(map(str, paths))}: cannot listen; "
                       "name a run of the stage audio-text or vision-audio")
    return able


def group_runs(paths):
    """Returns {name: {seed: run}}. Runs that differ in more than the seed are named apart.

    Raises BadInput if a run is named twice.
    """
    groups, places = {}, [os.path.realpath(run) for run in paths]
    for run in paths:
        if places.count(os.path.realpath(run)) > 1:
            raise BadInput(f"{run}: is named twice")
        info = read_run_info(run)
        seed = info["training"]["seed"]

        # The run's own path counts, too: runs of changed code have the same recipe.
        key = info["kind"], info["recipe"], without_seed(Path(run).as_posix(), seed)
        if seed in groups.get(key, {}):
            key = (*key, run)
        groups.setdefault(key, {})[seed] = run

    kinds, named = Counter(kind for kind, *_ in groups), {}
    for (kind, *_), by_seed in groups.items():
        first = next(iter(by_seed.values()))
        named[kind if kinds[kind] == 1 else f"{kind} ({first})"] = by_seed
    return named


def arguments(description):
    """Returns the argument parser of every script that looks at runs."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", help="run folders (default: the chain of --preset and --seed)")
    add("--preset", default="shapes", help="whose runs, if none are named")
    add("--seed", type=in_range(0, 2**48), default=0, help="whose runs, if none are named")
    add("--whisper", help="train.py's, whose runs, if none are named")
    add("--data", help="prepared folder of questions (default: the test part of each run's seed)")
    add("--n", type=in_range(1), help="take only the first so many questions")
    add("--out", default="runs/report", help="folder for tables and pictures")
    add("--device", choices=["cpu", "cuda", "mps"], help="default: cuda if there is one",
        default=default_device())
    return parser


def questions_of(args, seed):
    """Returns the folder of the questions that a run of this seed is asked."""
    return Path(args.data or f"runs/{args.preset}/data-s{seed}/test")
