"""A run that can be killed at any moment and goes on as if nothing had happened.

    progress = Resumable(out, config, trained, optimizer, save_every, device)    # reads it
    for step, micro_batches in progress.steps(epoch, n_steps, workers):          # begins after it
        ...
        progress.after_step(step, loss=loss, ...)                                # logs, may save
    progress.finish()                                                            # drops it

A checkpoint holds the trained weights, the optimizer's moments and the number of steps taken. No
more is needed: the samples and the learning rate of a step are functions of the seed and the step.
"""

import json
import time

from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from plumbing.files import BadInput, at, written_whole
from plumbing.processes import (
    all_sum,
    broadcast,
    ignore_interrupts,
    is_main,
    noted_signals,
    wait_for_all,
    world_size,
)
from plumbing.runs import differences

FREE = ("max_steps", "micro_batch")  # may differ when a stopped run goes on


class Resumable:
    """The loop's bookkeeping: checkpoint, log, bar and signals."""

    def __init__(self, out, config, trained, optimizer, save_every, device):
        """Reads the checkpoint in the folder `out`, if there is one, into weights and optimizer.

        config      dict of all that the numbers depend on; the checkpoint of another is refused
        trained     {name: parameter}
        save_every  steps between checkpoints
        """
        self.out, self.config, self.trained, self.optimizer = out, config, trained, optimizer
        self.save_every, self.device, self.save_seconds = save_every, device, 0.0
        self.path = out / "checkpoint.safetensors"
        self.first = self.read()
        if is_main():
            self.log = open_log(out / "log.jsonl", self.first)
            if self.first:
                print(f"{config['stage']}: going on after step {self.first}")

    def save(self, step):
        """Writes the state after so many steps, whole or not at all."""
        tensors = {f"weight.{name}": p.detach() for name, p in self.trained.items()}
        for name, p in self.trained.items():
            moments = self.optimizer.state[p]
            tensors |= {f"{moment}.{name}": tensor for moment, tensor in moments.items()}
        started = time.time()
        info = json.dumps({"step": step, "config": self.config, "tensors": [*tensors]})
        with at(f"{self.path}: could not be saved, an earlier one is kept"):
            with written_whole(self.path, sync=True) as temporary:
                save_file(tensors, temporary, metadata={"about": info})
        self.save_seconds = max(self.save_seconds, time.time() - started)

    def read(self):
        """Returns how many steps the checkpoint has taken; 0 without one."""
        other = differences(broadcast(self.config), self.config)
        if all_sum([bool(other)], self.device) != [0]:
            raise BadInput(f"{self.out}: not all processes see the same: {other or 'others do'}")
        first = self.load() if self.path.exists() else 0
        if all_sum([first], self.device) != [first * world_size()]:
            raise BadInput(f"{self.out}: not all processes find the same checkpoint; all machines "
                           "must share the folder")
        return first

    def load(self):
        """Puts the checkpoint's weights and moments back; returns how many steps were taken."""
        with at(f"{self.path}: cannot be used; delete it, or choose another --out"):
            with safe_open(self.path, framework="pt") as file:
                info = json.loads(file.metadata()["about"])
                other = differences(info["config"], self.config, FREE)
                if other:
                    raise BadInput(f"it belongs to another training ({other})")
                if set(info["tensors"]) != set(file.keys()):
                    raise BadInput("its tensors are not those that were saved")

                # Every weight must be there. A parameter that no step has moved has no moments.
                for name, p in self.trained.items():
                    p.data.copy_(file.get_tensor(f"weight.{name}"))
                for key in file.keys():
                    kind, _, name = key.partition(".")
                    if kind != "weight":
                        p = self.trained[name]
                        self.optimizer.state[p][kind] = file.get_tensor(key).to(p.device)
                return int(info["step"])

    def steps(self, epoch, n_steps, workers):
        """Yields (step, micro_batches) for each step not taken yet, with a bar."""
        if self.first > n_steps:
            raise BadInput(f"{self.out}: its checkpoint has taken {self.first} steps already, more "
                           f"than the {n_steps} asked for")
        self.n_steps, self.started = n_steps, time.time()
        cuda = self.device.type == "cuda"  # a CPU has no process to spare for reading ahead
        loader = DataLoader(epoch, batch_size=None, sampler=range(self.first, n_steps),
                            num_workers=workers if cuda else 0, pin_memory=cuda,
                            worker_init_fn=ignore_interrupts)
        with noted_signals() as self.signals:
            self.bar = tqdm(loader, desc=self.config["stage"], unit="step", disable=not is_main(),
                            mininterval=1, initial=self.first, total=n_steps)
            yield from enumerate(self.bar, self.first)

    def after_step(self, step, **numbers):
        """Logs a step; saves now and then, and before it stops because a process got a signal."""
        stop, = all_sum([len(self.signals)], self.device)  # a signal to one process stops all
        done = step + 1
        if is_main():
            speed = (done - self.first) / (time.time() - self.started)
            line = {"step": step, **numbers,
                    "time": {"steps_per_s": speed, "longest_save_s": self.save_seconds}}
            print(json.dumps(line), file=self.log, flush=True)
            text = " ".join(f"{name} {value:.3g}" for name, value in numbers.items())
            self.bar.set_postfix_str(text, refresh=False)
            if done < self.n_steps and (stop or done % self.save_every == 0):
                self.save(done)
        if stop and done < self.n_steps:
            wait_for_all()  # torchrun ends all processes once one has ended
            raise KeyboardInterrupt(f"{self.config['stage']} stands at {done} of {self.n_steps} "
                                    f"steps, saved in {self.out}")

    def finish(self):
        """Drops the checkpoint, once the run itself is saved, and what an earlier run answered."""
        if is_main():
            self.log.close()
            for path in (self.path, *self.out.glob("answers-*.jsonl")):
                path.unlink(missing_ok=True)


def open_log(path, first):
    """Opens the run's log for the steps to come, cut to the `first` steps of the checkpoint."""
    lines = path.read_bytes().splitlines(keepends=True)[:first] if first and path.exists() else []
    with written_whole(path) as temporary:
        temporary.write_bytes(b"".join(lines))
    return open(path, "a")
