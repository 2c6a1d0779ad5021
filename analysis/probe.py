"""Probes what the model makes of a spoken question, in four ways, as in arXiv 2604.02605.

    python -m analysis.probe                                           # every run of seed 0
    python -m analysis.probe runs/shapes/vision-audio-a*-s[012] --n 100 --window 2

lens        Final norm and head are applied to a layer's states at the audio tokens. How many of the
            question's words are among the --top likeliest words at any audio token? By chance: how
            many of another question's words are (those of the own question left out).
knockout    In the layers [l, l + window), the question may not look at the picture, or the answer
            not at the question or not at the picture. How does the log-likelihood of the data's
            answer change (nats)? The answer looks from the last prompt token on, which predicts its
            first token.
controls    Percent right if the speech is silenced, or exchanged for another question's. And speech
            that is followed by a written question of another kind: which of the two is answered?
            (No stage of training shows both at once.)
shift       For each token of the data's answer: KL(text || audio) in nats, how often both have the
            same likeliest token, and the rank that the text branch gives to audio's likeliest one.

Controls need the built-in world's questions, whose answers have classes. Numbers are means over
items, those of shift over tokens. Lens and knockout go to --out as figures and as CSV.

Letters in shape comments:
    B batch   T tokens of prefix, query and answer   P prefix tokens   S tokens of query and answer
    A audio tokens   N answer tokens in the batch   L layers   V vocabulary   D width of the LLM
"""

import contextlib
import re
import statistics
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from analysis import attention
from analysis.attention import QUERY, VISION, looking_positions
from data import AUDIO_PLACEHOLDER, IGNORE
from eval import score_answer
from model import OLLM
from plumbing import runs, tables
from plumbing.answers import answer_batches
from plumbing.files import BadInput, in_range, readable_errors
from world import shapes

CUTS = {"query -/-> vision": ("query", VISION), "answer -/-> query": ("response", QUERY),
        "answer -/-> vision": ("response", VISION)}
MIXED_KINDS = ("count", "existence", "place")  # no answer to one has a word of another's class


# ---- lens ----------------------------------------------------------------------------------------


def likeliest_tokens(ollm, batch, top):
    """Returns the likeliest tokens at each audio token after each layer: L of (audio tokens, top).

    The final norm comes before the head: the head was trained on states of that scale.
    """
    llm, tokens = ollm.lvlm.model.language_model, []
    audio_placeholders = batch["audio"]["ids"] == AUDIO_PLACEHOLDER  # (B, S)
    no_slots = torch.zeros_like(batch["prefix"]["mask"])  # (B, P)
    audio_placeholders = torch.cat([no_slots, audio_placeholders], dim=1)  # (B, T)

    def read(layer, inputs, hidden):
        logits = ollm.lvlm.lm_head(llm.norm(hidden[audio_placeholders]))  # (audio tokens, V)
        tokens.append(logits.topk(top).indices)

    with attention.hooks(torch.nn.Module.register_forward_hook, llm.layers, read):
        attention.full_pass(ollm, batch, "audio")
    return tokens


def lens(ollm, batch, items, top):
    """Yields for each item the recall of its question's words, and of another's: (L,) each.

    The second is None if the other question has no word of its own.
    """
    lengths = (batch["audio"]["ids"] == AUDIO_PLACEHOLDER).sum(1).tolist()
    by_layer = [tokens.split(lengths) for tokens in likeliest_tokens(ollm, batch, top)]
    questions = [set(ollm.tokenizer(item["question"]).input_ids) for item in items]
    for b, own in enumerate(questions):
        readable = [set(layer[b].flatten().tolist()) for layer in by_layer]  # L sets
        other = questions[(b + 1) % len(questions)] - own
        yield recall(own, readable), recall(other, readable) if other else None


def recall(words, readable):
    """Returns the share of the words that is in each of the sets."""
    return [len(words & layer) / len(words) for layer in readable]


# ---- knockout ------------------------------------------------------------------------------------


def log_likelihood(ollm, batch, form):
    """Returns the log-probability (nats) of each item's answer, end mark included: (B,)."""
    hidden = attention.full_pass(ollm, batch, form)[:, batch["prefix"]["ids"].size(1):]  # (B, S, D)
    labels = batch[form]["labels"][:, 1:]  # (B, S - 1): the position before a token predicts it
    is_answer = labels != IGNORE  # (B, S - 1)
    logits = ollm.lvlm.lm_head(hidden[:, :-1][is_answer])  # (N, V)
    log_p = logits.float().log_softmax(-1).gather(1, labels[is_answer][:, None])[:, 0]  # (N,)
    rows = is_answer.nonzero()[:, 0]  # (N,): the item that a token belongs to
    return torch.zeros(len(labels), device=log_p.device).index_add(0, rows, log_p)


def forbidden_pairs(spans, looking, onto):
    """Returns which position must not look at which in a cut: (B, T, T), from spans (B, T)."""
    return looking_positions(spans, looking)[:, :, None] & (spans == onto)[:, None, :]


@contextlib.contextmanager
def cut_attention(llm, first, width, pairs):
    """Hides what pairs (B, T, T) mark from attention in the layers [first, first + width)."""

    def mask_pairs(layer, args, options):
        mask = options["attention_mask"]  # (B, 1, T, T), is added to the scores
        mask = mask.masked_fill(pairs[:, None], torch.finfo(mask.dtype).min)
        return args, {**options, "attention_mask": mask}

    def register(layer, hook):
        return layer.register_forward_pre_hook(hook, with_kwargs=True)

    layers = llm.layers[first: first + width]
    with attention.eager_attention(llm), attention.hooks(register, layers, mask_pairs):
        yield


def knockout(ollm, batch, form, width):
    """Returns {cut: change of the answer's log-likelihood (B, windows)}."""
    llm, spans = ollm.lvlm.model.language_model, attention.spans_of(ollm, batch, form)
    uncut, changes = log_likelihood(ollm, batch, form), {}
    for name, (looking, onto) in CUTS.items():
        pairs, windows = forbidden_pairs(spans, looking, onto), []
        for first in range(len(llm.layers) - width + 1):
            with cut_attention(llm, first, width, pairs):
                windows.append(log_likelihood(ollm, batch, form) - uncut)  # (B,)
        changes[name] = torch.stack(windows, dim=1)
    return changes


# ---- controls ------------------------------------------------------------------------------------


def answer_speech(ollm, items, size):
    """Returns the model's answers to the items' speech, so many at once."""
    def answer(samples):
        return ollm.answer(samples, ("audio",))

    def length(i):
        return len(items[i]["question"])

    answers = {}
    for batch in answer_batches(answer, items, range(len(items)), length, size):
        answers |= {i: told["audio"] for i, told in batch}
    return [answers[i] for i in range(len(items))]


def mix_questions(items):
    """Returns (samples, spoken kinds): before each written question, another's speech.

    The two questions are of different kinds.
    """
    items = [item for item in items if item["kind"] in MIXED_KINDS]
    samples, kinds = [], []
    for i, item in enumerate(items):
        other = next((o for o in items[i:] + items[:i] if o["kind"] != item["kind"]), None)
        if other is not None:
            samples.append({**item, "wave": other["wave"], "after": item["question"]})
            kinds.append(other["kind"])
    return samples, kinds


def answered_question(samples, spoken_kinds, answers):
    """Returns the percent of answers to the written question alone, and to the spoken one alone.

    An answer belongs to a question if it has a word of its answer class.
    """
    written_only, spoken_only = [], []
    for sample, spoken_kind, answer in zip(samples, spoken_kinds, answers):
        written, spoken = (re.search(rf"\b(?:{'|'.join(shapes.CLASSES[kind])})\b", answer)
                           for kind in (sample["kind"], spoken_kind))
        written_only.append(bool(written and not spoken))
        spoken_only.append(bool(spoken and not written))
    return {"mixed: written answered": 100 * statistics.fmean(written_only),
            "mixed: spoken answered": 100 * statistics.fmean(spoken_only)}


def controls(ollm, items, size):
    """Returns {line: percent}. Exchanged speech is that of the item half the list away."""
    half = len(items) // 2
    exchanged = zip(items, items[half:] + items[:half])
    variants = {"speech": items,
                "silence": [{**item, "wave": np.zeros_like(item["wave"])} for item in items],
                "another's speech": [{**item, "wave": other["wave"]} for item, other in exchanged]}
    result = {}
    for name, variant in variants.items():
        scores = map(score_answer, variant, answer_speech(ollm, variant, size))
        result[f"{name}: right"] = 100 * statistics.fmean(scores)

    samples, kinds = mix_questions(items)
    if samples:
        result |= answered_question(samples, kinds, answer_speech(ollm, samples, size))
    return result


# ---- shift ---------------------------------------------------------------------------------------


def shift(ollm, batch):
    """Returns (N, 3): KL(text || audio), agreement (0 or 1), text's rank of audio's likeliest."""
    prefix, audio = ollm.prefill(batch), ollm.encode_audio(batch["mel"], batch["n_frames"])
    by_audio, _ = ollm.answer_logits(prefix, batch["audio"], audio)  # (N, V)
    by_text, _ = ollm.answer_logits(prefix, batch["text"])  # (N, V)
    by_audio, by_text = (logits.float().log_softmax(-1) for logits in (by_audio, by_text))

    kl = (by_text.exp() * (by_text - by_audio)).sum(-1)  # (N,)
    likeliest = by_audio.argmax(-1, keepdim=True)  # (N, 1)
    rank = 1 + (by_text > by_text.gather(1, likeliest)).sum(-1)  # (N,): 1 is the likeliest
    return torch.stack([kl, (rank == 1).float(), rank.float()], dim=-1)


def shift_table(shifts):
    """Returns {line: mean} of all answer tokens' shifts (N, 3)."""
    kl, same, rank = shifts.T  # (N,) each
    lines = {"KL(text || audio), nats": kl, "same likeliest token, %": 100 * same,
             "rank of audio's token": rank,
             "audio's token in text's top 3, %": 100 * (rank <= 3).float()}
    return {line: values.mean().item() for line, values in lines.items()}


# ---- a run ---------------------------------------------------------------------------------------


@torch.no_grad()
def probe(run, seed, args):
    """Returns what all four probes say of a run.

    {"lens": {line: (L,)}, "knockout": {"cut, form": (windows,)}, "table": {line: number},
    "items": number}
    """
    ollm = OLLM.load(run, args.device).eval()
    layers = len(ollm.lvlm.model.language_model.layers)
    if args.window > layers:
        raise BadInput(f"--window {args.window}: the LLM has {layers} layers")
    folder = runs.questions_of(args, seed)
    samples, indices = attention.pick_questions(folder, ollm.settings, args.n)

    recalls, changes, shifts = [], {}, []
    for start in tqdm(range(0, len(indices), args.batch), desc=str(run), unit="batch", leave=False):
        items = [samples[i] for i in indices[start: start + args.batch]]
        batch = attention.collate_with_answers(ollm, items)
        recalls += lens(ollm, batch, items, args.top)
        for form in ("text", "audio"):
            for name, change in knockout(ollm, batch, form, args.window).items():
                changes.setdefault(f"{name}, {form}", []).append(change.cpu())
        shifts.append(shift(ollm, batch))

    table, items = shift_table(torch.cat(shifts)), [samples[i] for i in indices]
    if all("kind" in item for item in items):
        table |= controls(ollm, items, args.batch)
    own, other = zip(*recalls)
    lines = {"own words": own, "chance": [row for row in other if row is not None]}  # (items, L)
    return {"lens": {line: torch.tensor(rows).view(-1, layers).mean(0)
                     for line, rows in lines.items()},
            "knockout": {line: torch.cat(rows).mean(0) for line, rows in changes.items()},
            "table": table, "items": len(items)}


# ---- reporting -----------------------------------------------------------------------------------


def write_curves(results, kind, path):
    """Writes the "lens" or "knockout" curves; a window is named by its first layer (from 1)."""
    rows = []
    for name, by_seed in results.items():
        for seed, result in by_seed.items():
            for line, values in result[kind].items():
                rows += [[name, seed, line, i, value] for i, value in enumerate(values.tolist(), 1)]
    tables.write_csv(path, ("run", "seed", "line", "layer", "value"), rows)


def draw_lens(results, top, path):
    """Draws the share of the question's words that each layer shows, and what chance gives."""
    panels = {"own words": [], "chance": []}
    for line, panel in panels.items():
        for name, by_seed in results.items():
            curves = [100 * result["lens"][line] for result in by_seed.values()]
            panel.append((name, *tables.over_seeds(curves)))
    tables.plot_curves(panels, "layer", f"words in the top {top} (%)", path, sharey=True,
                       looks=tables.LOOKS[1:])


def draw_knockout(results, path):
    """Draws the change of the answer's log-likelihood in each window, a panel a cut.

    Written questions stand there once, from the first runs.
    """
    panels = {}
    for cut in CUTS:
        panels[cut] = []
        labels = {"text": next(iter(results.values()))}
        labels |= {f"{name}, audio": by_seed for name, by_seed in results.items()}
        for label, by_seed in labels.items():
            line = f"{cut}, {'text' if label == 'text' else 'audio'}"
            curves = [result["knockout"][line] for result in by_seed.values()]
            panels[cut].append((label, *tables.over_seeds(curves)))
    tables.plot_curves(panels, "layer", "change of log-likelihood (nats)", path)


def lines_of(result):
    """Returns {line: number} of all that a run's probes say, curves layer by layer."""
    lines = dict(result["table"])
    for line, values in result["lens"].items():
        lines |= {f"lens, {line}, layer {i}, %": 100 * v for i, v in enumerate(values.tolist(), 1)}
    for line, values in result["knockout"].items():
        lines |= {f"{line}, from layer {i}, nats": v for i, v in enumerate(values.tolist(), 1)}
    return lines


def print_results(results):
    """Prints the numbers of all runs, mean and standard deviation over seeds."""
    first = next(iter(results.values()))
    items = next(iter(first.values()))["items"]
    print(f"\n{items} items a run, seed {', '.join(map(str, first))}\n")
    columns = []
    for by_seed in results.values():
        columns.append([lines_of(result) for result in by_seed.values()])
    rows = []
    for line in columns[0][0]:
        values = [[result.get(line) for result in column] for column in columns]
        rows.append([line, *(tables.cell(seeds, digits=2) for seeds in values)])
    tables.print_table(["", *results], rows)


def main():
    parser = attention.arguments(__doc__)
    parser.set_defaults(out="runs/probe")
    parser.add_argument("--window", type=in_range(1), default=1, help="layers cut at once")
    parser.add_argument("--top", type=in_range(1), default=5, help="likely words of an audio token")
    args = parser.parse_args()
    results, out = {}, Path(args.out)
    for name, by_seed in runs.group_runs(runs.asked_for(args, listening=True)).items():
        results[name] = {seed: probe(run, seed, args) for seed, run in by_seed.items()}
    for kind in ("lens", "knockout"):
        write_curves(results, kind, out / f"{kind}.csv")
    draw_lens(results, args.top, out / "lens.png")
    draw_knockout(results, out / "knockout.png")
    print_results(results)


if __name__ == "__main__":
    with readable_errors():
        main()
