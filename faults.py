"""Nothing lost: how a program may be killed at any moment, and go on as if nothing had happened.

    a file is whole or not there       `written_whole`: a temporary name, fsync, rename
    one process writes a folder        `only_writer`: a lock that the system takes back when its holder dies
    no process outlives its parent     `end_with`: torchrun's processes and pools end when their parent is killed
    a run stops between two steps      `noted_signals`, after SIGINT (Ctrl-C) and SIGTERM
    a run goes on where it stopped     `save_checkpoint`, `load_checkpoint`, `open_log`
    what the user can mend is one line `BadInput`, `readable_errors`

A checkpoint holds the trained weights, AdamW's moments and how many steps they have behind them. The learning rate,
the samples and the random numbers of a step are functions of seed and step alone (train.py): there is no more to keep,
and a run may go on with another number of processes. There is nothing to run here;
`python -m pytest -m slow tests/test_killed.py` kills runs in every place, and compares what comes of them byte by byte.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

CHECKPOINT = "checkpoint.safetensors"  # in a run folder, while the run is under way
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter, once it has had a gradient
PATIENCE = 60  # seconds to wait for another writer
PARENT = "SELF_KD_PARENT"  # environment variable: the process that a script is to end with


class BadInput(Exception):
    """Something the user gave cannot be used; the message says what and where, on one line."""


@contextlib.contextmanager
def readable_errors():
    """Around a script's main part: an error that the user can mend is one line on stderr and exit code 1.

    Ctrl-C and SIGTERM end it with a line as well, and exit code 130, as a shell would say.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except (BadInput, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
    except BrokenProcessPool:
        sys.exit("error: a worker process was killed, perhaps for want of memory; the same command goes on from here")
    except RuntimeError as error:  # torch has no class of its own for these
        if not re.search("gloo|NCCL|DataLoader worker", str(error)):
            raise
        sys.exit(f"error: another process of this job failed, and says why, or was killed ({one_line(error, 100)})")
    except KeyboardInterrupt as error:
        if os.environ.get("RANK", "0") == "0":  # one of torchrun's processes speaks for all
            where = f": {error}" if error.args else ""
            print(f"interrupted{where}; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def one_line(error, most=1000):
    """An error's message without line breaks, cut to `most` characters."""
    text = re.sub(r"(?s)^Caught BadInput in DataLoader.*BadInput: ", "", str(error))  # torch puts a traceback before it
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]} ..."


# ---- files ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def written_whole(path, sync=False):
    """Yields a temporary path beside `path`, renamed to it if all went well: a reader never sees half a file.

    sync: first wait for the disk, so that not even a power cut leaves the new name on half a file
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if sync:
            flush_to_disk(temporary)
        os.replace(temporary, path)
        if sync:
            flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path):
    """Returns when the disk has a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def only_writer(folder, patience=PATIENCE):
    """Makes the folder and holds its lock meanwhile; what a killed writer left half done is removed first.

    The lock is the system's and goes with its holder, however that ends. Raises BadInput if another process still holds
    it after `patience` seconds.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        deadline, waiting = time.monotonic() + patience, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BadInput(f"{folder}: another process writes there, and did not end within {patience:g} s: "
                                   "wait for it, or choose another --out") from None
            if not waiting:
                print(f"{folder}: another process writes there; waiting for it up to {patience:g} s", file=sys.stderr)
            waiting = True
            time.sleep(0.2)
        for pattern in (".*.tmp", "images/.*.tmp", "audio/.*.tmp"):
            for half in folder.glob(pattern):
                shutil.rmtree(half) if half.is_dir() else half.unlink(missing_ok=True)
        yield


# ---- processes -----------------------------------------------------------------------------------------------------


def end_with(parent):
    """Ends this process soon after the process `parent`, which started it, has ended.

    A killed parent cannot take its children along. torchrun's live in sessions of their own, so that the terminal does
    not end them either: without this they would go on training, and writing, beside those of the next start.
    """
    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_worker(parent):
    """What a worker process begins with: it ends with its parent, and only with it."""
    end_with(parent)
    ignore_interrupts()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # the workers share the cores already


def ignore_interrupts(*_):
    """Leaves Ctrl-C, which reaches all processes of a terminal, to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def noted_signals():
    """Yields a list that gets SIGINT and SIGTERM, which meanwhile end nothing by themselves."""
    received = []
    usual = {number: signal.signal(number, lambda number, _: received.append(signal.Signals(number)))
             for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def versions():
    """What a run's numbers may depend on besides its arguments: noted with it, not compared."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "threads": torch.get_num_threads()}


def differences(there, here):
    """What two trainings' dicts say differently, as text: "alpha is 0.75 there and 0 here"; "" if they agree."""
    return ", ".join(f"{key} is {there[key]} there and {here[key]} here"
                     for key in here if key in there and there[key] != here[key])


def save_checkpoint(path, step, trained, optimizer, training):
    """What it takes to go on after `step` steps: weights and AdamW's moments, whole or not at all.

    training: a dict that tells which training it is; as JSON in the file's metadata, with the step and a digest
    """
    tensors = {f"weight.{name}": p.detach() for name, p in trained.items()}
    for moment in MOMENTS:
        tensors |= {f"{moment}.{name}": state[moment] for name, p in trained.items() if (state := optimizer.state[p])}
    about = {"step": step, "training": training, "versions": versions()}
    about["digest"] = digest(about, sorted(tensors.items()))
    try:
        with written_whole(path, sync=True) as temporary:
            save_file(tensors, temporary, metadata={"about": json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise BadInput(f"could not save the checkpoint {path}, an earlier one is kept: {error}") from None


def digest(about, tensors):
    """SHA-256 over a dict and (name, tensor) pairs: which checkpoint it is, to the bit."""
    whole = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in tensors:
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        whole.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return whole.hexdigest()


def load_checkpoint(path, trained, optimizer, training):
    """Puts a checkpoint back and returns how many steps it has behind it; 0 if there is none.

    Raises BadInput if it is broken or belongs to another training than the dict `training` says.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            other = differences(about["training"], training)
            if other:
                raise BadInput(f"{path}: belongs to another training ({other}): delete it, or choose another --out")
            if about.pop("digest") != digest(about, ((name, file.get_tensor(name)) for name in sorted(file.keys()))):
                raise ValueError("it is not what was saved there")
            for name, p in trained.items():
                p.data.copy_(file.get_tensor(f"weight.{name}"))
                if f"step.{name}" in file.keys():
                    optimizer.state[p] = {m: file.get_tensor(f"{m}.{name}").to(p.device) for m in MOMENTS}
            return int(about["step"])
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"{path}: does not load ({error}): delete it to begin anew") from None


def open_log(path, first):
    """The run's log, cut to the `first` steps that are kept, open for those to come."""
    kept = path.read_bytes().splitlines(keepends=True)[:first] if first and path.exists() else []
    with written_whole(path) as temporary:
        temporary.write_bytes(b"".join(kept))
    return open(path, "a")
