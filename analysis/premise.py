"""Measures how surprising a folder's labels are to a base: would Self-KD help? No training.

    python -m analysis.premise runs/shapes/vision-text-s0 runs/shapes/data-s0/vision-audio --n 400
    python -m analysis.premise OpenGVLab/InternVL2-1B prepared/llava --n 400

The base reads each picture and written question, and answers of three kinds are scored, in nats a
token (the end mark included): the folder's labels, the base's own greedy answers, and answers that
it draws. Drawn answers cost what the base's distribution costs at its best, its entropy.

Where labels cost about as much as drawn answers, they are such as the base writes itself: the
gradients of cross-entropy and of the KL are then the same on average. The more labels cost, the
more of SFT's gradient is spent on their wording. Intervals are 95 %, by bootstrap over questions.
"""

import argparse

import torch

import data
from eval import LONG
from model import OLLM
from plumbing.answers import answer_batches
from plumbing.files import in_range, readable_errors
from plumbing.processes import default_device, half_precision, to_device
from plumbing.tables import print_table

DRAWS = 2000  # of the bootstrap


def answer_nats(ollm, samples):
    """Returns each answer's negative log-likelihood (nats) and number of tokens: (B, 2)."""
    batch = data.collate(samples, ollm.tokenizer, None, ollm.settings)
    batch = to_device(batch, ollm.lvlm.device)
    with torch.no_grad(), half_precision(ollm.lvlm.device):
        logits, labels = ollm.answer_logits(ollm.prefill(batch), batch["text"])  # (N, V), (N,)
    nats = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")  # (N,)
    n_tokens = (batch["text"]["labels"] != data.IGNORE).sum(1)  # (B,)
    sums = torch.stack([part.sum() for part in nats.split(n_tokens.tolist())])  # (B,)
    return torch.stack([sums.cpu().double(), n_tokens.cpu().double()], dim=1)


def with_answers(samples, answers):
    """Returns samples with other answers, as text with the end mark that the model wrote."""
    return [{**sample, "answer": answer, "end": ""} for sample, answer in zip(samples, answers)]


def draw_answers(ollm, samples, generator):
    """Returns an answer to each sample, drawn from the base's distribution."""

    # The likeliest token after Gumbel noise is a draw from the softmax.
    def add_noise(head, inputs, logits):
        uniform = torch.rand(logits.shape, generator=generator).clamp(min=1e-20)
        return logits.float() - (-uniform.log()).log().to(logits.device)

    hook = ollm.lvlm.lm_head.register_forward_hook(add_noise)
    try:
        return ollm.answer(samples, ("text",), keep_end=True, max_new_tokens=LONG)["text"]
    finally:
        hook.remove()


def measure(ollm, samples, generator):
    """Returns {kind of answer: (B, 2) by `answer_nats`} of the samples."""
    greedy = ollm.answer(samples, ("text",), keep_end=True, max_new_tokens=LONG)["text"]
    drawn = draw_answers(ollm, samples, generator)
    return {"labels": answer_nats(ollm, samples),
            "own, greedy": answer_nats(ollm, with_answers(samples, greedy)),
            "own, drawn": answer_nats(ollm, with_answers(samples, drawn))}


def interval(values, generator):
    """Returns (nats a token, low, high) of values (questions, 2), 95 % by bootstrap."""
    picks = torch.randint(len(values), (DRAWS, len(values)), generator=generator)
    sums = values[picks].sum(1)  # (draws, 2)
    low, high = torch.quantile(sums[:, 0] / sums[:, 1], torch.tensor([0.025, 0.975]).double())
    nats, n_tokens = values.sum(0)
    return (nats / n_tokens).item(), low.item(), high.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("base", help="who reads: a run, or an LVLM's folder or hub id")
    add("folder", help="prepared folder of questions and labels")
    add("--n", type=in_range(2), default=400, help="questions, the first so many")
    add("--seed", type=in_range(0, 2**32), default=0, help="of drawn answers and bootstrap")
    add("--batch", type=in_range(1), help="questions answered at once")
    add("--device", choices=["cpu", "cuda", "mps"], default=default_device(),
        help="default: cuda if there is one")
    args = parser.parse_args()
    ollm = OLLM.load(args.base, args.device).eval()
    samples = data.Samples(args.folder, ollm.settings, ("question",))
    generator = torch.Generator().manual_seed(args.seed)
    batches = answer_batches(
        lambda batch: measure(ollm, batch, generator), samples, range(len(samples))[: args.n],
        samples.length, args.batch or 8, desc="questions")

    # A row for each kind of answer.
    values = {}
    for batch in batches:
        for _, by_kind in batch:
            for kind, value in by_kind.items():
                values.setdefault(kind, []).append(value)
    rows = []
    for kind, pairs in values.items():
        pairs = torch.stack(pairs)  # (questions, 2)
        nats, low, high = interval(pairs, generator)
        length = pairs[:, 1].mean().item()
        rows.append([kind, f"{nats:.3f}", f"{low:.3f} to {high:.3f}", f"{length:.1f}"])
    print(f"{len(pairs)} questions of {args.folder}, read by {args.base}")
    print_table(["answers", "nats a token", "95 %", "tokens"], rows)


if __name__ == "__main__":
    with readable_errors():
        main()
