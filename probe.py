"""What the model makes of a spoken question inside: four probes in the manner of arXiv 2604.02605.

    python probe.py                                            # base, after alignment and every alpha of seed 0
    python probe.py runs/shapes/vision-audio-a*-s[012] --n 100 --window 2     # seeds are averaged

lens        What a layer's states at the audio tokens would say (final norm and head applied): how many of the written
            question's words are among the --top likeliest words at any audio token; chance: the words of another item's
            question, those of its own left out.
knockout    The gold answer's log-likelihood (nats) if in the layers [l, l + window) the question may not look at the
            picture, or what says the answer not at the question or not at the picture; less what it is without a cut.
            What says the answer begins at the last prompt position: else a one-word answer would not be touched.
controls    Percent right if the speech is silenced, or is another item's question (right: as the written one asks).
            And speech followed by a written question of another kind: which of the two is answered? No stage of
            training shows both at once.
shift       Per token of the gold answer: KL(text || audio) in nats, how often both have the same likeliest token, and
            how the text branch, the vision-text parent, ranks the audio branch's likeliest one.

Controls need the built-in world's items, whose answers have classes. Numbers are means over items (shift: over tokens).
Lens and knockout go to --out as figures and, in a line a number, to lens.csv and knockout.csv.

Letters in shape comments: B batch, T tokens, A audio tokens, N answer tokens in the batch, L layers, V vocabulary,
D width of the LLM.
"""

import contextlib
import csv
import re
import statistics
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import attention
import data
import eval
import faults
import model
import shapes
from attention import QUERY, RESPONSE, VISION
from data import AUDIO_SLOT, IGNORE
from faults import BadInput

CUTS = {"query -/-> vision": ("query", VISION), "answer -/-> query": ("response", QUERY),
        "answer -/-> vision": ("response", VISION)}
MIXED_KINDS = ("count", "existence", "place")  # no answer to one has a word of another's class


# ---- lens -----------------------------------------------------------------------------------------------------------


def likeliest(ollm, batch, top):
    """The likeliest tokens at each audio token after every layer: a list of L tensors (audio tokens in batch, top).

    The final norm comes before the head: without it the head reads states of another scale than it was trained on.
    """
    llm, seen = ollm.lvlm.model.language_model, []
    slots = batch["audio"]["ids"] == AUDIO_SLOT  # (B, suffix tokens)
    heard = torch.cat([torch.zeros_like(batch["prefix"]["mask"]), slots], dim=1)  # (B, T)

    def read(module, given, hidden):
        """Hook: hidden (B, T, D) is what the layer gives."""
        seen.append(ollm.lvlm.lm_head(llm.norm(hidden[heard])).topk(top).indices)  # (audio tokens, top)

    with attention.hooked(torch.nn.Module.register_forward_hook, llm.layers, read):
        attention.full_pass(ollm, batch, "audio")
    return seen


def lens(ollm, batch, items, top):
    """Recall of the question's words at audio tokens, and of another question's: each item two (L,) lists."""
    lengths = (batch["audio"]["ids"] == AUDIO_SLOT).sum(1).tolist()
    words = [set(ollm.tokenizer(item["question"]).input_ids) for item in items]
    readable = [[set(part.flatten().tolist()) for part in tokens.split(lengths)]  # L lists of B sets
                for tokens in likeliest(ollm, batch, top)]
    for b, own in enumerate(words):
        other = words[(b + 1) % len(words)] - own
        yield ([len(own & layer[b]) / len(own) for layer in readable],
               [len(other & layer[b]) / len(other) for layer in readable] if other else None)


# ---- knockout -------------------------------------------------------------------------------------------------------


def log_likelihood(ollm, batch, form):
    """Log-probability of each item's answer, end mark included, in nats: (B,)."""
    labels = batch[form]["labels"]
    hidden = attention.full_pass(ollm, batch, form)[:, batch["prefix"]["ids"].size(1):]  # (B, suffix tokens, D)
    states, targets = ollm.answer_states(hidden, labels)  # (N, D), (N,)
    log_p = ollm.lvlm.lm_head(states).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]  # (N,)
    owners = (labels[:, 1:] != IGNORE).nonzero()[:, 0]  # (N,)
    return torch.zeros(len(labels), device=log_p.device).index_add(0, owners, log_p)


def forbidden(spans, looking, onto):
    """Which position must not look at which, (B, T, T): those of a cut. spans (B, T) as attention.spans_of gives."""
    rows = spans == QUERY if looking == "query" else (spans == RESPONSE).roll(-1, dims=1)  # (B, T)
    return rows[:, :, None] & (spans == onto)[:, None, :]


@contextlib.contextmanager
def cut(llm, first, width, pairs):
    """Inside, positions do not look where pairs (B, T, T) is true in the layers [first, first + width)."""

    def blind(layer, given, named):
        """Hook: the layer's arguments with another mask."""
        mask = named["attention_mask"]  # (B, 1, T, T), added to the scores
        mask = mask.masked_fill(pairs[:, None], torch.finfo(mask.dtype).min)
        return given, {**named, "attention_mask": mask}

    def register(layer, hook):
        """Puts a hook before the layer."""
        return layer.register_forward_pre_hook(hook, with_kwargs=True)

    with attention.eager(llm), attention.hooked(register, llm.layers[first: first + width], blind):
        yield


def knockout(ollm, batch, form, width):
    """{cut: change of the answer's log-likelihood (B, windows)} for every window of `width` layers."""
    llm, spans = ollm.lvlm.model.language_model, attention.spans_of(ollm, batch, form)
    whole, changes = log_likelihood(ollm, batch, form), {}
    for name, (looking, onto) in CUTS.items():
        pairs, cuts = forbidden(spans, looking, onto), []
        for first in range(len(llm.layers) - width + 1):
            with cut(llm, first, width, pairs):
                cuts.append(log_likelihood(ollm, batch, form) - whole)  # (B,)
        changes[name] = torch.stack(cuts, dim=1)
    return changes


# ---- controls -------------------------------------------------------------------------------------------------------


def percent_right(items, answers):
    """Mean score of answers to what the items ask in writing, in percent."""
    return 100 * statistics.fmean(map(eval.score_answer, items, answers))


def answered(ollm, items, device, size):
    """What the model answers to the items' speech, as a list."""
    parts = (items[i: i + size] for i in range(0, len(items), size))
    return [answer for part in parts for answer in eval.answers(ollm, part, device, forms=("audio",))["audio"]]


def mixed(items):
    """Items with another item's speech, of another kind, before their own written question: (samples, spoken kinds)."""
    items = [item for item in items if item["kind"] in MIXED_KINDS]
    samples, kinds = [], []
    for i, item in enumerate(items):
        other = next((o for o in items[i:] + items[:i] if o["kind"] != item["kind"]), None)
        if other is not None:
            samples.append({**item, "wave": other["wave"], "after": item["question"]})
            kinds.append(other["kind"])
    return samples, kinds


def sided(samples, kinds, answers):
    """Percent of answers that name a word of only the written question's class, and of only the spoken one's."""

    def names(kind, answer):
        """Whether the answer has a word of the kind's class."""
        return bool(re.search(rf"\b(?:{'|'.join(shapes.CLASSES[kind])})\b", answer))

    pairs = [(names(s["kind"], a), names(kind, a)) for s, kind, a in zip(samples, kinds, answers)]
    return {"mixed: written answered": 100 * statistics.fmean(w and not s for w, s in pairs),
            "mixed: spoken answered": 100 * statistics.fmean(s and not w for w, s in pairs)}


def controls(ollm, items, device, size):
    """{line: percent} of the controls; the speech exchanged is the item's half the list away."""
    silent = [{**item, "wave": np.zeros_like(item["wave"])} for item in items]
    others = items[len(items) // 2:] + items[: len(items) // 2]
    swapped = [{**item, "wave": other["wave"]} for item, other in zip(items, others)]
    result = {f"{name}: right": percent_right(items, answered(ollm, asked, device, size))
              for name, asked in (("speech", items), ("silence", silent), ("another's speech", swapped))}
    samples, kinds = mixed(items)
    return result | (sided(samples, kinds, answered(ollm, samples, device, size)) if samples else {})


# ---- shift ----------------------------------------------------------------------------------------------------------


def shift(ollm, batch):
    """Per answer token: KL(text || audio), whether both argmaxes agree, the text branch's rank of audio's; (N, 3)."""
    audio, text, _ = ollm.paired(batch, teach=True)  # (N, D) each
    audio, text = (ollm.lvlm.lm_head(states).float().log_softmax(-1) for states in (audio, text))  # (N, V)
    kl = (text.exp() * (text - audio)).sum(-1)  # (N,)
    chosen = audio.argmax(-1, keepdim=True)  # (N, 1)
    rank = 1 + (text > text.gather(1, chosen)).sum(-1)  # (N,): 1 is the likeliest
    return torch.stack([kl, (rank == 1).float(), rank.float()], dim=-1)


def shift_table(shifts):
    """{line: number} of all answer tokens' shifts (N, 3)."""
    kl, same, rank = shifts.T  # (N,) each
    lines = {"KL(text || audio), nats": kl, "same likeliest token, %": 100 * same, "rank of audio's token": rank,
             "audio's token in text's top 3, %": 100 * (rank <= 3).float()}
    return {line: values.mean().item() for line, values in lines.items()}


# ---- a run ----------------------------------------------------------------------------------------------------------


def prepared(run, args):
    """(ollm, samples, indices) of a run and the items it is asked. Raises BadInput if it cannot listen."""
    ollm, about = model.load_run(run).to(args.device).eval(), model.about_run(run)
    if ollm.audio_encoder is None:
        raise BadInput(f"{run}: this run cannot listen; give one of the stage audio-text or vision-audio")
    layers = len(ollm.lvlm.model.language_model.layers)
    if args.window > layers:
        raise BadInput(f"--window {args.window}: the LLM has {layers} layers")
    folder = args.data or f"runs/{args.preset}/data-s{about['training']['seed']}/test"
    return ollm, *attention.chosen(folder, ollm.settings, args.n)


@torch.no_grad()
def probe(run, args):
    """All four probes of a run: {"lens": {line: [L numbers]}, "knockout": {(form, cut): [windows numbers]},
    "table": {line: number}, "items": how many}.
    """
    ollm, samples, indices = prepared(run, args)
    device, recalls, changes, shifts = torch.device(args.device), [], [], []
    for start in tqdm(range(0, len(indices), args.batch), desc=str(run), unit="batch", leave=False):
        items = [samples[i] for i in indices[start: start + args.batch]]
        batch = eval.collated(ollm, items, device, answers=True)
        recalls += lens(ollm, batch, items, args.top)
        changes.append({(form, name): change for form in ("text", "audio")
                        for name, change in knockout(ollm, batch, form, args.window).items()})
        shifts.append(shift(ollm, batch))
    own, other = zip(*recalls)
    table = shift_table(torch.cat(shifts))
    items = [samples[i] for i in indices]
    if all("kind" in item for item in items):
        table |= controls(ollm, items, device, args.batch)
    return {"lens": {"own words": mean(own), "chance": mean([recall for recall in other if recall])},
            "knockout": {key: torch.cat([change[key] for change in changes]).mean(0).tolist() for key in changes[0]},
            "table": table, "items": len(items)}


def mean(rows):
    """The mean of lists of equal length, number by number; an empty list if there is none."""
    return [statistics.fmean(column) for column in zip(*rows)]


# ---- reporting ------------------------------------------------------------------------------------------------------


def write_csv(found, kind, path):
    """The curves of all runs, a line a number; layers count from 1, and a window is called by its first."""
    with faults.written_whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["run", "seed", "line", "layer", "value"])
        for name, by_seed in found.items():
            for seed, result in by_seed.items():
                for line, values in result[kind].items():
                    line = line if isinstance(line, str) else ": ".join(line)
                    writer.writerows([name, seed, line, i, f"{value:.6g}"] for i, value in enumerate(values, 1))


def over_seeds(by_seed, kind, line):
    """Mean and standard deviation over seeds of a curve, two (L,); the latter 0 for a single seed."""
    values = torch.tensor([result[kind][line] for result in by_seed.values()])  # (seeds, L)
    return values.mean(0), values.std(0) if len(values) > 1 else torch.zeros_like(values[0])


def draw_lens(found, top, path):
    """Share of the question's words that can be read per layer, and chance, as two panels."""
    panels = {line: [] for line in ("own words", "chance")}
    for line, curves in panels.items():
        for name, by_seed in found.items():
            curves.append((name, *(100 * values for values in over_seeds(by_seed, "lens", line))))
    attention.draw(panels, f"words in the top {top} (%)", path, sharey=True, looks=attention.LOOKS[1:])


def draw_knockout(found, path):
    """Change of the answer's log-likelihood per window, a panel a cut; written questions once, from the first runs."""
    panels = {}
    for cut_name in CUTS:
        panels[cut_name] = [("text", *over_seeds(next(iter(found.values())), "knockout", ("text", cut_name)))]
        panels[cut_name] += [(f"{name}, audio", *over_seeds(by_seed, "knockout", ("audio", cut_name)))
                             for name, by_seed in found.items()]
    attention.draw(panels, "change of log-likelihood (nats)", path)


def lines_of(result):
    """{line: number} of all that a run's probes found, the curves layer by layer."""
    lens_lines = {f"lens, {line}, layer {i}, %": 100 * value for line, values in result["lens"].items()
                  for i, value in enumerate(values, 1)}
    knockout_lines = {f"{name}, {form}, from layer {i}, nats": value
                      for (form, name), values in result["knockout"].items() for i, value in enumerate(values, 1)}
    return {**result["table"], **lens_lines, **knockout_lines}


def print_table(found):
    """Prints the numbers of all runs as one Markdown table, mean and standard deviation over seeds."""
    first = next(iter(found.values()))
    print(f"{next(iter(first.values()))['items']} items a run, seed {', '.join(map(str, first))}")
    print(f"| | {' | '.join(found)} |\n|---|{'---:|' * len(found)}")
    columns = [[lines_of(result) for result in by_seed.values()] for by_seed in found.values()]
    for line in columns[0][0]:
        cells = ([result.get(line) for result in column] for column in columns)
        print(f"| {line} | {' | '.join(eval.cell(values, digits=2) for values in cells)} |")


if __name__ == "__main__":
    parser = attention.arguments(__doc__)
    parser.set_defaults(out="runs/probe")
    parser.add_argument("--window", type=data.at_least_one, default=1, help="layers that a knockout cuts at once")
    parser.add_argument("--top", type=data.at_least_one, default=5, help="words an audio token may say (lens)")
    args = parser.parse_args()
    with faults.readable_errors():
        runs = args.runs or [run for run in eval.default_runs(args.preset, args.seed) if model.about_run(run)["base"]]
        if not runs:
            raise BadInput("the base alone is there, and cannot listen: train the stage audio-text")
        found, out = {}, Path(args.out)
        for run in runs:
            about = model.about_run(run)
            by_seed, seed = found.setdefault(eval.run_name(about), {}), about["training"]["seed"]
            if seed in by_seed:
                raise BadInput(f"{run}: a second run called {eval.run_name(about)} of seed {seed}")
            by_seed[seed] = probe(run, args)
        out.mkdir(parents=True, exist_ok=True)
        for kind in ("lens", "knockout"):
            write_csv(found, kind, out / f"{kind}.csv")
        draw_lens(found, args.top, out / "lens.png")
        draw_knockout(found, out / "knockout.png")
        print_table(found)
