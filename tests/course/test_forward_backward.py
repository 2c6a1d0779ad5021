"""Grades `forward_backward` (train.py): micro-batches and ranks against the batch as a whole."""

import multiprocessing
import sys

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny import same
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import train
from data import IGNORE

torch.set_num_threads(1)  # a forked process waits for ever for threads that its parent started
ANSWERS = ([5, 1], [7], [0], [2, 4, 3])  # how many answer tokens each row of a batch has
ALPHA, TEMPERATURE = 0.75, 2.0


class Reader(nn.Module):
    """A model of one table, which keeps the contract of OLLM.forward; the OLLM may be empty yet."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Embedding(20, 20, dtype=torch.float64)
        self.teacher = torch.randn(20, 20, dtype=torch.float64)

    def forward(self, batch, alpha, temperature=1.0, n_tokens=None):
        is_answer = batch["text"]["labels"] != IGNORE
        ids, labels = batch["text"]["ids"][is_answer], batch["text"]["labels"][is_answer]
        n_tokens = max(1, len(labels)) if n_tokens is None else n_tokens
        student, teacher = self.student(ids), self.teacher[ids]
        ce = F.cross_entropy(student, labels, reduction="sum") / n_tokens
        kl = temperature**2 / n_tokens * F.kl_div(
            F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1),
            reduction="sum", log_target=True)
        return alpha * kl + (1 - alpha) * ce, kl, ce


def make_batches():
    """Returns micro-batches of two rows or one; each row has so many answer tokens of ANSWERS."""
    generator, batches = torch.Generator().manual_seed(0), []
    for counts in ANSWERS:
        ids, labels = torch.randint(20, (2, len(counts), 9), generator=generator)
        for row, count in zip(labels, counts):
            row[: 9 - count] = IGNORE
        batches.append({"text": {"ids": ids, "labels": labels}, "audio": None})
    return batches


def join(batches):
    """Returns all rows in one batch."""
    text = {key: torch.cat([batch["text"][key] for batch in batches]) for key in ("ids", "labels")}
    return {"text": text, "audio": None}


def step(model, micro_batches, world_size=1):
    """Returns what forward_backward gives for one rank: its three numbers, and the gradient."""
    terms = train.forward_backward(model, micro_batches, ALPHA, TEMPERATURE, torch.device("cpu"),
                                   world_size)
    gradient = next(model.parameters()).grad
    assert gradient is not None, "no gradient was left: backward was not called"
    return torch.tensor([float(term) for term in terms], dtype=torch.float64), gradient


def at_once():
    """Returns the numbers and the gradient of all rows in one batch, computed here."""
    model = Reader()
    terms = model(join(make_batches()), ALPHA, TEMPERATURE)
    terms[0].backward()
    return torch.stack(terms).detach(), model.student.weight.grad


def check(ours, cause):
    """Compares numbers and gradient with those of the whole batch."""
    __tracebackhide__ = True
    (terms, gradient), (their_terms, their_gradient) = ours, at_once()
    same(terms, their_terms, f"[loss, kl, ce] are not the whole batch's: {cause}")
    same(gradient, their_gradient, f"the gradient is not the whole batch's: {cause}")


def test_one_batch():
    whole = join(make_batches())
    check(step(Reader(), [whole]), "are alpha and temperature passed on, each in its place?")


def test_micro_batches():
    check(step(Reader(), make_batches()),
          "each micro-batch's sums are divided by the answer tokens of all of them (n_tokens); "
          "then the losses, and the gradients, are added up")


def run_rank(rank, folder):
    """Computes one of two ranks' step and writes it down: this is another process."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    batches = make_batches()
    mine = batches[:2] if rank == 0 else batches[2:]  # of rank 1 the first has no answer at all
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
        rank.join(timeout=90)
        rank.kill()
    results = [tmp_path / f"{rank}.safetensors" for rank in range(2)]
    if not all(path.exists() for path in results):
        pytest.fail("with two ranks it fails, or waits for ever: do both exchange as often?")
    for path in results:
        result = load_file(path)
        check((result["terms"], result["gradient"]),
              "with two ranks n_tokens and the three numbers are summed over both, and the loss is "
              "multiplied by world_size, as DDP averages the gradients")
