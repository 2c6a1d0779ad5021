"""Checkpoints: a training that is killed at any moment resumes and ends with the same bytes.

A checkpoint holds the trained weights, the optimizer's moments and the number of steps taken. The
samples and the learning rate of a step are functions of the seed and the step.
"""

import json
import time

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from plumbing.files import BadInput, at, atomic_write
from plumbing.processes import all_reduce, broadcast, half_precision, to_device, world_size
from plumbing.runs import differences

FREE = ("max_steps", "micro_batch")  # may differ when a training resumes


def save(path, step, config, trained, optimizer):
    """Writes the state after `step` steps, atomically. Returns how many seconds it took.

    config: dict of all that the numbers depend on; trained: {name: parameter}
    """
    began = time.time()
    tensors = {f"weight.{name}": p.detach() for name, p in trained.items()}
    for name, p in trained.items():
        for moment, tensor in optimizer.state[p].items():
            tensors[f"{moment}.{name}"] = tensor
    about = json.dumps({"step": step, "config": config, "tensors": [*tensors]})
    with at(f"{path}: could not be saved, an earlier one is kept"):
        with atomic_write(path, sync=True) as temporary:
            save_file(tensors, temporary, metadata={"about": about})
    return time.time() - began


def load(path, config, n_steps, trained, optimizer, device):
    """Restores weights and moments; returns the number of steps taken, 0 without a checkpoint.

    Raises BadInput if the checkpoint is another training's or has taken more than n_steps steps,
    or if the processes differ.
    """
    other = differences(broadcast(config), config)
    if all_reduce([bool(other)], device) != [0]:
        raise BadInput(f"{path.parent}: not all processes see the same: {other or 'others do'}")
    first = 0
    if path.exists():
        with at(f"{path}: cannot be used; delete it, or choose another --out"):
            first = read(path, config, trained, optimizer)
            if first > n_steps:
                raise BadInput(f"it has taken {first} steps, more than {n_steps}")
    if all_reduce([first], device) != [first * world_size()]:
        raise BadInput(f"{path.parent}: not all processes find the same checkpoint; all machines "
                       "must share the folder")
    return first


def read(path, config, trained, optimizer):
    """Reads a checkpoint into weights and optimizer. Returns its number of steps."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
        other = differences(about["config"], config, FREE)
        if other:
            raise BadInput(f"it belongs to another training ({other})")
        if set(about["tensors"]) != set(file.keys()):
            raise BadInput("its tensors are not those that were saved")
        for name, p in trained.items():
            p.data.copy_(file.get_tensor(f"weight.{name}"))

        # A parameter that was never updated has no moments.
        for key in about["tensors"]:
            moment, _, name = key.partition(".")
            if moment != "weight":
                p = trained[name]
                optimizer.state[p][moment] = file.get_tensor(key).to(p.device)
        return int(about["step"])


def describe_norms(ollm, batch, device):
    """Returns a line with the median norms of word embeddings and of a batch's audio tokens.

    Where audio tokens are many times as long, a pre-norm LLM's layers hardly change them.
    """
    if batch["mel"] is None:
        return ""
    batch = to_device(batch, device)
    with torch.no_grad(), half_precision(device):
        audio_tokens = ollm.encode_audio(batch["mel"], batch["n_frames"])  # (B, A, D)
    words = ollm.lvlm.get_input_embeddings().weight  # (V, D)
    norms = [tokens.norm(dim=-1).median().item() for tokens in (words, audio_tokens)]
    return "median norm of a word embedding {:.3g}, of an audio token {:.3g}\n".format(*norms)


def open_log(path, first):
    """Opens the run's log for the steps to come, cut to the `first` steps of the checkpoint."""
    lines = path.read_bytes().splitlines(keepends=True)[:first] if first and path.exists() else []
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"".join(lines))
    return open(path, "a")
