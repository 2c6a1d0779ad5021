"""Grades `forward_backward` (train.py): micro-batches and ranks against the batch as a whole."""

import multiprocessing
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny import same, untouched
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import train
from data import IGNORE

torch.set_num_threads(1)  # a forked process waits for ever for threads that its parent started
CPU = torch.device("cpu")
ANSWERS = ([5, 1], [7], [2, 4, 3], [0])  # how many answer tokens each row of a batch has
ALPHA, TEMPERATURE = 0.75, 2.0


class Reader(nn.Module):
    """A model of one table with another loss, but the contract of OLLM.forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 20, dtype=torch.float64)

    def forward(self, batch, alpha, temperature=1.0, n_tokens=None):
        query = batch["audio"] or batch["text"]
        is_answer = query["labels"] != IGNORE
        states, labels = self.table(query["ids"][is_answer]), query["labels"][is_answer]
        n_tokens = len(labels) if n_tokens is None else n_tokens
        ce = (states.sin().sum(1) * labels).sum() / n_tokens
        kl = temperature * states.square().sum() / n_tokens if alpha > 0 else ce.detach() * 0
        return torch.lerp(ce, kl, alpha), kl, ce


def make_batches(form="text"):
    """Returns micro-batches of rows; each row has so many answer tokens of ANSWERS."""
    generator, batches = torch.Generator().manual_seed(0), []
    for counts in ANSWERS:
        ids, labels = torch.randint(20, (2, len(counts), 9), generator=generator)
        for row, count in zip(labels, counts):
            row[: 9 - count] = IGNORE
        batches.append({"text": None, "audio": None} | {form: {"ids": ids, "labels": labels}})
    return batches


def whole_batch():
    """Returns all rows in one batch."""
    queries = [batch["text"] for batch in make_batches()]
    joined = {key: torch.cat([query[key] for query in queries]) for key in ("ids", "labels")}
    return {"text": joined, "audio": None}


def step(model, micro_batches, world_size=1, alpha=ALPHA, guard=nullcontext):
    """Returns what forward_backward gives for one rank: its three numbers, and the gradient."""
    with guard((micro_batches, dict(model.named_parameters()))):
        terms = train.forward_backward(model, micro_batches, alpha, TEMPERATURE, CPU, world_size)
    gradient = next(model.parameters()).grad
    assert gradient is not None, "no gradient was left: backward was not called"
    assert [type(term) for term in terms] == [float] * 3, "three floats, which the log can write"
    return torch.tensor(terms, dtype=torch.float64), gradient


def check(ours, cause, alpha=ALPHA):
    """Compares numbers and gradient with those of all rows in one batch, computed here."""
    __tracebackhide__ = True
    model = Reader()
    terms = model(whole_batch(), alpha, TEMPERATURE)
    terms[0].backward()
    same(ours[0], torch.stack(terms).detach(), f"[loss, kl, ce] of the whole batch: {cause}")
    same(ours[1], model.table.weight.grad, f"the gradient is not the whole batch's: {cause}")


@pytest.mark.parametrize("alpha", [0.0, ALPHA, 1.0])
def test_one_batch(alpha):
    check(step(Reader(), [whole_batch()], alpha=alpha),
          "are alpha and temperature passed on, each in its place?", alpha)


@pytest.mark.parametrize("form", ["text", "audio"])
def test_micro_batches(form):
    check(step(Reader(), make_batches(form)),
          "each micro-batch's sums are divided by the answer tokens of all of them (n_tokens), "
          "spoken or written; then the losses, and the gradients, are added up")


class Elsewhere(torch.Tensor):
    """A tensor that is not on the device until it is moved there."""

    def to(self, *arguments, **options):
        return self.as_subclass(torch.Tensor).to(*arguments, **options)


def test_the_device(monkeypatch):
    """What matters on a GPU alone: batches are moved, and autocast is around the forward pass."""
    inside, enter = [], torch.autocast.__enter__
    monkeypatch.setattr(torch.autocast, "__enter__", lambda at: inside.append(1) or enter(at))

    class OnGPU(Reader):
        def forward(self, batch, *arguments, **options):
            assert type(batch["text"]["ids"]) is torch.Tensor, "batches are moved to the device"
            assert inside, "on a GPU the forward pass is in half precision: half_precision(device)"
            return super().forward(batch, *arguments, **options)

    batches = make_batches()
    for batch in batches:
        batch["text"] = {key: ids.as_subclass(Elsewhere) for key, ids in batch["text"].items()}
    train.forward_backward(OnGPU(), batches, ALPHA, TEMPERATURE, CPU, 1)


def run_rank(rank, folder):
    """Computes one of two ranks' step and writes it down: this is another process."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mine = make_batches()[2 * rank:][:2]  # of rank 1 the last has no answer at all
    terms, gradient = step(DistributedDataParallel(Reader()), mine, world_size=2)
    save_file({"terms": terms, "gradient": gradient}, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


def test_two_ranks(tmp_path):
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ranks = [context.Process(target=run_rank, args=(rank, tmp_path), daemon=True)
             for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=20)
        rank.kill()
    for path in (tmp_path / "0.safetensors", tmp_path / "1.safetensors"):
        assert path.exists(), "with two ranks it fails, or waits for ever: do both exchange?"
        result = load_file(path)
        check((result["terms"], result["gradient"]),
              "with two ranks n_tokens and the three numbers are summed over both, and the loss is "
              "multiplied by world_size, as DDP averages the gradients")


def test_batches_and_weights_stay():
    step(Reader(), make_batches(), guard=untouched)
