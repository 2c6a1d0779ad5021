"""Where the question and the answer look, layer by layer (the paper's Figs. 4 and 7).

    python attention.py                                        # base, after alignment and every alpha of seed 0
    python attention.py runs/shapes/vision-audio-a*-s[012]     # any runs; those that differ by seed alone are averaged
    python attention.py runs/shapes/vision-audio-a0.75-s0 --n 100 --out figures

Each item is a picture with one question. A run hears the question and goes on with the answer it gives itself; its base
reads the question and goes on with its own answer, which makes the line "text". Of each layer's attention, averaged
over heads, items and the positions of a span, this measures the share that falls on each span:

    system      the chat prompt up to the question, without the image tokens; the first token often takes most
    vision      image tokens
    query       the question, as word tokens or as audio tokens
    turn        what stands between question and answer: <|im_end|><|im_start|>assistant
    response    the answer with its <|im_end|>

The query looks from its own positions. The response looks from the positions that say it: the first answer token is
said by the last token of the turn, and <|im_end|> by the last word. Speech takes more tokens than writing and so gets a
larger share even of attention that goes everywhere alike: a second figure therefore shows the share divided by how many
tokens the span has. Both figures, and the numbers as attention.csv, go to --out.

Letters in shape comments: B batch, T tokens (question, picture, answer and padding), L layers, F spans that look (2),
S spans looked at (6), D width of the LLM.
"""

import contextlib
import csv
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

import data
import eval
import faults
import model
import shapes
from data import IGNORE
from faults import BadInput

SPANS = ("system", "vision", "query", "turn", "response", "padding")
SYSTEM, VISION, QUERY, TURN, RESPONSE, PADDING = range(len(SPANS))
LOOKING = ("query", "response")
PANELS = (("query", "vision"), ("query", "query"), ("query", "system"),
          ("response", "vision"), ("response", "query"), ("response", "response"))
MEASURES = {"share": "share of attention (%)", "per token": "share of attention per token (%)"}
LOOKS = tuple(zip(eval.COLORS, "os^DvPX", ("-", "--", "-.", "-", ":", "--", "-.")))  # colour, marker, line


# ---- one pass -------------------------------------------------------------------------------------------------------


def spans_of(ollm, batch, form):
    """Which span each token of prefix and suffix belongs to: (B, T), indices into SPANS."""
    prefix, suffix = batch["prefix"], batch[form]
    turn = len(data.prompts(ollm.tokenizer, ollm.settings, [0], [""])[2])
    asked = (suffix["mask"] & (suffix["labels"] == IGNORE)).sum(1, keepdim=True)  # (B, 1): tokens before the answer
    places = torch.arange(suffix["ids"].size(1), device=asked.device)[None]  # (1, suffix tokens): padding stands right
    before = torch.where(prefix["ids"] == ollm.lvlm.config.image_token_id, VISION, SYSTEM)  # (B, prefix tokens)
    after = torch.where(places < asked - turn, QUERY, torch.where(places < asked, TURN, RESPONSE))
    spans = torch.cat([before, after], dim=1)  # (B, T)
    return spans.masked_fill(~torch.cat([prefix["mask"], suffix["mask"]], dim=1), PADDING)


def embedded(ollm, batch, form):
    """What the LLM reads of `<system><image><query><answer>` in one piece: embeddings (B, T, D)."""
    ids = torch.cat([batch["prefix"]["ids"], batch[form]["ids"]], dim=1)  # (B, T)
    heard = ollm.hear(batch["mel"], batch["n_frames"]) if form == "audio" else None  # (B, A, D), A audio tokens
    return ollm.embed(ids, batch["pixels"], heard)


def full_pass(ollm, batch, form):
    """Hidden states (B, T, D) after the final norm of one pass over whole sequences, without a cache."""
    mask = torch.cat([batch["prefix"]["mask"], batch[form]["mask"]], dim=1)  # (B, T)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # (B, T): padding is no position, as in OLLM.suffix
    return ollm.lvlm.model.language_model(inputs_embeds=embedded(ollm, batch, form), attention_mask=mask,
                                          position_ids=positions, use_cache=False).last_hidden_state


@contextlib.contextmanager
def eager(llm):
    """Inside, attention is computed in the one way that says where it looks and takes a mask of numbers."""
    usual = llm.config._attn_implementation
    llm.set_attn_implementation("eager")
    try:
        yield
    finally:
        llm.set_attn_implementation(usual)


@contextlib.contextmanager
def hooked(register, modules, hook):
    """Inside, the hook is on every one of the modules; register: such as torch.nn.Module.register_forward_hook."""
    handles = [register(module, hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def watched(llm, reduce):
    """Inside, each forward pass appends reduce(attention (B, heads, T, T)) of every layer to the yielded list.

    A layer's attention is gone before the next layer's is made: at 1,800 tokens, all of InternVL2-1B's take 4 GB.
    """
    seen, layers = [], [layer.self_attn for layer in llm.layers]

    def look(module, given, made):
        """Hook: made is (output, attention)."""
        seen.append(reduce(made[1]))

    with eager(llm), hooked(torch.nn.Module.register_forward_hook, layers, look):
        yield seen


def shares(ollm, batch, form):
    """Shares of attention (B, L, F, S) between spans, mean over heads and over the positions that look; and the spans.

    A share is between 0 and 1, and those of one row sum to 1. (B, T) spans are as `spans_of` gives them.
    """
    spans = spans_of(ollm, batch, form)  # (B, T)
    says = (spans == RESPONSE).roll(-1, dims=1)  # (B, T): the position before a token says it; the first is no response
    looks = torch.stack([spans == QUERY, says], dim=-1).float()  # (B, T, F)
    looks = looks / looks.sum(1, keepdim=True)
    onto = torch.nn.functional.one_hot(spans, len(SPANS)).float()  # (B, T, S)

    def reduce(attention):
        """(B, heads, T, T) to (B, F, S)."""
        return torch.einsum("bqf,bqk,bks->bfs", looks, attention.float().mean(1), onto)  # (B, F, S)

    with watched(ollm.lvlm.model.language_model, reduce) as seen:
        full_pass(ollm, batch, form)
    return torch.stack(seen, dim=1), spans


# ---- a run ----------------------------------------------------------------------------------------------------------


def chosen(folder, settings, n):
    """(samples, indices) of the first n questions of a prepared folder, like lengths side by side."""
    samples = data.Samples(folder, settings)
    indices = [i for i, row in enumerate(samples.rows) if row.get("kind") in (None, *shapes.KINDS)][:n]
    if len(indices) < (n or 1):
        raise BadInput(f"{folder}: has {len(indices)} questions of the kinds asked here, fewer than {n or 1}")
    return samples, sorted(indices, key=samples.length)


@torch.no_grad()
def curve(ollm, folder, form, n, batch_size, device, desc):
    """({measure: shares (L, F, S) in percent, mean over items}, {span: mean number of tokens}, number of items).

    The question is read or heard, as `form` says, and the answer is the one the model gives to it.
    """
    samples, indices = chosen(folder, ollm.settings, n)
    total, tokens = {measure: 0 for measure in MEASURES}, 0
    for start in tqdm(range(0, len(indices), batch_size), desc=desc, unit="batch", leave=False):
        items = [samples[i] for i in indices[start: start + batch_size]]
        if form == "text":
            items = [{key: value for key, value in item.items() if key != "wave"} for item in items]
        said = eval.answers(ollm, items, device, forms=(form,))[form]
        batch = eval.collated(ollm, [{**i, "answer": a} for i, a in zip(items, said)], device, answers=True)
        share, spans = shares(ollm, batch, form)  # (B, L, F, S), (B, T)
        counts = torch.nn.functional.one_hot(spans, len(SPANS)).sum(1)  # (B, S)
        total["share"] += 100 * share.sum(0).cpu()
        total["per token"] += 100 * (share / counts.clamp(min=1)[:, None, None]).sum(0).cpu()
        tokens += counts.sum(0).cpu()
    lengths = dict(zip(SPANS, (tokens / len(indices)).tolist()))
    return {measure: value / len(indices) for measure, value in total.items()}, lengths, len(indices)


def curves(args):
    """{name: {seed: what `curve` gives}} of the base's written questions, "text", and of every run's spoken ones."""
    device, found, bases = torch.device(args.device), {"text": {}}, {}
    runs = args.runs or eval.default_runs(args.preset, args.seed)
    for run in runs:
        ollm, about = model.load_run(run).to(device).eval(), model.about_run(run)
        if ollm.audio_encoder is None:
            continue  # the base: what it reads is measured with the runs that listen for it
        name, seed, base = eval.run_name(about), about["training"]["seed"], about["base_fingerprint"]
        if seed in found.setdefault(name, {}) or bases.setdefault(seed, base) != base:
            raise BadInput(f"{run}: a second run called {name} of seed {seed}, or one on another base")
        folder = args.data or f"runs/{args.preset}/data-s{seed}/test"
        for line, form in (("text", "text"), (name, "audio")):
            if seed not in found[line]:  # the LLM is frozen: each run on a base reads alike
                found[line][seed] = curve(ollm, folder, form, args.n, args.batch, device, f"{run}, {form}")
    if len(found) == 1:
        raise BadInput(f"{', '.join(map(str, runs))}: cannot listen; give one of the stage audio-text or vision-audio")
    return found


# ---- reporting ------------------------------------------------------------------------------------------------------


def distance(name, found, looking, onto, measure="share"):
    """Per seed, the mean distance over layers of a run's curve to the text's, in points of the measure."""
    f, s = LOOKING.index(looking), SPANS.index(onto)
    return [(ours[measure] - found["text"][seed][0][measure])[:, f, s].abs().mean().item()
            for seed, (ours, *_) in found[name].items()]


def print_summary(found):
    """Prints the distances to the text's curves and the lengths of spans as Markdown tables."""
    names = [name for name in found if name != "text"]
    n, seeds = next(iter(found["text"].values()))[2], sorted(found["text"])
    print(f"Distance of each run's curve to the text's, percentage points, mean over layers; {n} items, "
          f"seed {', '.join(map(str, seeds))}")
    print(f"| share of attention | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    for looking, onto in PANELS:
        print(f"| {looking} to {onto} | {' | '.join(eval.cell(distance(a, found, looking, onto)) for a in names)} |")
    means = [[statistics.fmean(values) for values in zip(*(distance(a, found, *panel) for panel in PANELS))]
             for a in names]
    print(f"| mean of the six | {' | '.join(map(eval.cell, means))} |")
    print("\nTokens of a span, mean over items")
    print(f"| | {' | '.join(SPANS[:PADDING])} |\n|---|{'---:|' * PADDING}")
    for name, by_seed in found.items():
        lengths = [eval.cell([length[span] for _, length, _ in by_seed.values()]) for span in SPANS[:PADDING]]
        print(f"| {name} | {' | '.join(lengths)} |")


def spread(by_seed, measure):
    """Mean and standard deviation over seeds of a curve, two (L, F, S); the latter 0 for a single seed."""
    values = torch.stack([ours[measure] for ours, *_ in by_seed.values()])  # (seeds, L, F, S)
    return values.mean(0), values.std(0) if len(values) > 1 else torch.zeros_like(values[0])


def write_csv(found, path):
    """One line for each run, pair of spans and layer (from 1): share, share per token (percent), and their spread."""
    with faults.written_whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["run", "seeds", "items", "from", "to", "layer", "share", "share_sd", "per_token",
                         "per_token_sd"])
        for name, by_seed in found.items():
            numbers = torch.stack([*spread(by_seed, "share"), *spread(by_seed, "per token")], dim=-1)  # (L, F, S, 4)
            items, seeds = next(iter(by_seed.values()))[2], " ".join(map(str, sorted(by_seed)))
            for layer, f, s in torch.cartesian_prod(*map(torch.arange, (len(numbers), len(LOOKING), PADDING))).tolist():
                writer.writerow([name, seeds, items, LOOKING[f], SPANS[s], layer + 1,
                                 *(f"{value:.6g}" for value in numbers[layer, f, s].tolist())])


def draw(panels, ylabel, path, rows=1, sharey=False, looks=LOOKS):
    """A PNG of curves over layers: panels {title: [(label, values (L,), deviation (L,) as a band)]} in so many rows.

    A label looks the same in all panels and is told apart by colour, marker and line.
    """
    from matplotlib.figure import Figure  # a second to import

    columns = len(panels) // rows
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows + 1), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=sharey, squeeze=False)
    for axes, (title, curves) in zip(grid.flat, panels.items()):
        for (label, values, deviation), (color, marker, line) in zip(curves, looks * len(curves)):
            layers = range(1, len(values) + 1)
            axes.plot(layers, values, line, color=color, marker=marker, markersize=5, label=label)
            axes.fill_between(layers, values - deviation, values + deviation, color=color, alpha=0.2, linewidth=0)
        axes.set_title(title)
        axes.margins(y=0.1)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.supxlabel("layer")
    figure.supylabel(ylabel)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), columns + 1))
    with faults.written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def draw_attention(found, measure, path):
    """The figure of a measure: a row of panels for what the query looks at, one for the response (Figs. 4 and 7)."""
    panels = {f"{looking} \N{RIGHTWARDS ARROW} {onto}": [] for looking, onto in PANELS}
    for name, by_seed in found.items():
        for (looking, onto), curves in zip(PANELS, panels.values()):
            mean, deviation = (v[:, LOOKING.index(looking), SPANS.index(onto)] for v in spread(by_seed, measure))
            curves.append((name if name == "text" else f"{name}, audio", mean, deviation))  # (L,) each
    draw(panels, MEASURES[measure], path, rows=len(LOOKING))


def arguments(description):
    """The arguments that attention.py and probe.py share."""
    parser = eval.run_arguments(description)
    parser.set_defaults(out="runs/attention")
    parser.add_argument("--batch", type=data.at_least_one, default=8, help="items in one pass")
    return parser


if __name__ == "__main__":
    args = arguments(__doc__).parse_args()
    with faults.readable_errors():
        found, out = curves(args), Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        write_csv(found, out / "attention.csv")
        for measure in MEASURES:
            draw_attention(found, measure, out / f"attention-{measure.replace(' ', '-')}.png")
        print_summary(found)
        print(f"\nFigures and numbers: {out}/attention-share.png, attention-per-token.png, attention.csv")
