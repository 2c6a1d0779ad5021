"""Processes: torchrun's, pools of workers, and signals."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

PARENT = "SELF_KD_PARENT"  # environment variable: the process id of the script's parent


# ---- torchrun's processes ------------------------------------------------------------------------


def default_device():
    """Returns "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def set_up_processes(device=None):
    """Returns (rank, world_size, torch.device) from torchrun's environment, or of one process."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        exit_with(os.getppid())
    device = device or default_device()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if device == "cpu":  # bit-identical reruns, at no cost there
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False

    if processes > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return rank, processes, torch.device(device)


def data_parallel(model, **options):
    """Wraps a model in DDP, which averages gradients over all processes; one process needs none.

    Buffers never change, so they are not broadcast.
    """
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, forward_sync_buffers=False,
                                   gradient_as_bucket_view=True, **options)


def half_precision(device):
    """Returns the autocast context: bfloat16 matrix products on a GPU; weights keep their type."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def freeze_in_bfloat16(model):
    """Casts the parameters of fully frozen parts of a model to bfloat16.

    Buffers keep float32: rounded, the rotary angles of far positions would be wrong.
    """
    for part in (*model.children(), *model.lvlm.children(), *model.lvlm.model.children()):
        if not any(parameter.requires_grad for parameter in part.parameters()):
            for parameter in part.parameters():
                parameter.data = parameter.data.bfloat16()


def to_device(batch, device):
    """Returns a batch, a dict of tensors and such dicts, with all its tensors on the device."""
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    return batch


def close_processes():
    """Ends the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size():
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """Tells whether this is rank 0, which prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all():
    """Waits until all processes have reached this point."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce(values, device):
    """Returns a list of numbers, each summed over all processes."""
    if not dist.is_initialized():
        return list(values)
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


def broadcast(value):
    """Returns rank 0's value on every rank, as two reads of the disk may differ."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


# ---- children ------------------------------------------------------------------------------------


def run_script(name, *arguments):
    """Runs another of the project's scripts as a child process; returns its exit code."""
    script = Path(__file__).parent.parent / name
    command = [sys.executable, str(script), *map(str, arguments)]
    print("\nrunning: python", name, *arguments, flush=True)
    return subprocess.run(command, env={**os.environ, PARENT: str(os.getpid())}).returncode


def exit_with_parent():
    """Makes this script exit when the one that started it by `run_script` does."""
    if PARENT in os.environ:
        exit_with(int(os.environ[PARENT]))


def exit_with(parent):
    """Exits when the parent dies: a parent that is killed cannot stop its children."""
    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def workers():
    """Yields a pool with a process a core. A killed worker raises an error."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    # SLURM may give a job only some of the cores; macOS has no such call.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = ProcessPoolExecutor(cores, context, start_worker, (os.getpid(),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(parent):
    """Sets up a worker of the pool: it exits with its parent, and ignores Ctrl-C."""
    exit_with(parent)
    ignore_interrupts()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # the workers share the cores already


# ---- signals -------------------------------------------------------------------------------------


def ignore_interrupts(*_):
    """Ignores Ctrl-C, which reaches all processes of a terminal: the parent handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def deferred_signals():
    """Yields a list that collects SIGINT and SIGTERM; the caller decides when to stop."""
    received = []
    usual = {number: signal.signal(number, lambda number, _: received.append(number))
             for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
