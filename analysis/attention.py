"""Measures the attention of question and answer, layer by layer (the paper's Figs. 4 and 7).

    python -m analysis.attention                                       # every run of seed 0
    python -m analysis.attention runs/shapes/vision-audio-a*-s[012]    # seeds are averaged
    python -m analysis.attention runs/shapes/vision-audio-a0.75-s0 --n 100 --out figures

Each item is a picture with one question. A run answers the spoken question, its base the written
one (the curve "text"). In each layer, attention is averaged over heads, items and the positions of
a span; the figures show the share that falls on each span:

    system      the chat prompt before the question; its first token often takes most
    vision      the image tokens in it
    query       the question, as word tokens or as audio tokens
    generation_prompt  between question and answer: <|im_end|><|im_start|>assistant
    response    the answer with its <|im_end|>

The query attends from its own positions, the response from those that predict it: the last token of
the generation prompt predicts the first answer token. Speech takes more tokens than text, so even
uniform attention gives it a larger share: a second figure divides the share by the token count.
Both figures and attention.csv go to --out.

Letters in shape comments:
    B batch   T tokens of prefix, query and answer   L layers   D width of the LLM
    F spans that attend (2)   S spans that are attended to (6)
"""

import contextlib
import itertools
import statistics
from pathlib import Path

import torch
from torch.nn.functional import one_hot
from tqdm import tqdm

import data
from data import IGNORE
from model import OLLM
from plumbing import processes, runs, tables
from plumbing.files import BadInput, in_range, readable_errors
from real.families import generation_prompt_ids, prefix_positions
from world import shapes

SPANS = ("system", "vision", "query", "generation_prompt", "response", "padding")
SYSTEM, VISION, QUERY, TURN, RESPONSE, PADDING = range(len(SPANS))
LOOKING = ("query", "response")
PANELS = {"query to vision": (0, VISION), "query to query": (0, QUERY),
          "query to system": (0, SYSTEM), "response to vision": (1, VISION),
          "response to query": (1, QUERY), "response to response": (1, RESPONSE)}
MEASURES = {"share": "share of attention (%)", "per token": "share of attention per token (%)"}


# ---- one pass ------------------------------------------------------------------------------------


def collate_with_answers(ollm, samples):
    """Returns a batch of samples and their answers, as in training, on the model's device."""
    batch = data.collate(samples, ollm.tokenizer, ollm.mel_extractor, ollm.settings)
    return processes.to_device(batch, ollm.lvlm.device)


def full_pass(ollm, batch, form):
    """Returns hidden states (B, T, D), after the final norm, of one pass over prefix and query.

    form: "text" or "audio", the query that follows the prefix
    """
    prefix, query = batch["prefix"], batch[form]
    audio = None
    if form == "audio":
        audio = ollm.encode_audio(batch["mel"], batch["n_frames"])  # (B, A, D)
    ids, mask = (torch.cat([prefix[key], query[key]], dim=1) for key in ("ids", "mask"))  # (B, T)
    x = ollm.embed(ids, batch["pixels"], audio)  # (B, T, D)
    positions, _ = prefix_positions(ollm.lvlm, ids, mask, batch["pixels"])
    return ollm.lvlm.model.language_model(inputs_embeds=x, attention_mask=mask, use_cache=False,
                                          position_ids=positions).last_hidden_state


def spans_of(ollm, batch, form):
    """Returns the span of each token of prefix and query: (B, T), indices into SPANS."""
    prefix, query = batch["prefix"], batch[form]
    is_image = prefix["ids"] == ollm.lvlm.config.image_token_id  # (B, prefix tokens)
    before = torch.where(is_image, VISION, SYSTEM)  # (B, prefix tokens)

    # Then come question, generation prompt and answer; only the answer has labels.
    n_prompt = len(generation_prompt_ids(ollm.tokenizer, ollm.settings))
    answer_at = (query["mask"] & (query["labels"] == IGNORE)).sum(1, keepdim=True)  # (B, 1)
    places = torch.arange(query["ids"].size(1), device=answer_at.device)[None]  # (1, query tokens)
    after = torch.where(places < answer_at, TURN, RESPONSE)  # (B, query tokens)
    after = after.masked_fill(places < answer_at - n_prompt, QUERY)

    mask = torch.cat([prefix["mask"], query["mask"]], dim=1)  # (B, T)
    return torch.cat([before, after], dim=1).masked_fill(~mask, PADDING)


def looking_positions(spans, looking):
    """Returns the positions (B, T) from which the "query" or the "response" attends."""
    if looking == "query":
        return spans == QUERY
    return (spans == RESPONSE).roll(-1, dims=1)  # the position before a token predicts it


@contextlib.contextmanager
def eager_attention(llm):
    """Switches to eager attention, which returns its weights and takes an additive mask."""
    usual = llm.config._attn_implementation
    llm.set_attn_implementation("eager")
    try:
        yield
    finally:
        llm.set_attn_implementation(usual)


@contextlib.contextmanager
def hooks(register, modules, hook):
    """Puts a hook on each of the modules, by e.g. torch.nn.Module.register_forward_hook."""
    handles = [register(module, hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def record_attention(llm, reduce):
    """Yields a list; a forward pass appends reduce(attention (B, heads, T, T)) of each layer.

    All layers' attention together would take 4 GB in InternVL2-1B at 1,800 tokens.
    """
    records = []

    def record(module, inputs, outputs):
        records.append(reduce(outputs[1]))  # outputs are (hidden states, attention)

    layers = [layer.self_attn for layer in llm.layers]
    with eager_attention(llm), hooks(torch.nn.Module.register_forward_hook, layers, record):
        yield records


def attention_shares(ollm, batch, form):
    """Returns (shares of attention (B, L, F, S), spans (B, T)).

    A share is from 0 to 1, a mean over heads and attending positions. The S shares sum to 1.
    """
    spans = spans_of(ollm, batch, form)  # (B, T)
    looks = torch.stack([looking_positions(spans, span) for span in LOOKING], dim=-1)  # (B, T, F)
    looks = looks / looks.sum(1, keepdim=True)
    onto = one_hot(spans, len(SPANS)).float()  # (B, T, S)

    def reduce(attention):
        return torch.einsum("bqf,bqk,bks->bfs", looks, attention.float().mean(1), onto)

    with record_attention(ollm.lvlm.model.language_model, reduce) as shares:  # L of (B, F, S)
        full_pass(ollm, batch, form)
    return torch.stack(shares, dim=1), spans


# ---- several runs --------------------------------------------------------------------------------


def pick_questions(folder, settings, n, forms=("question", "audio")):
    """Returns (samples, indices) of the first n questions, those of like length side by side."""
    samples = data.Samples(folder, settings, forms)
    indices = [i for i, row in enumerate(samples.rows) if row.get("kind") in (None, *shapes.KINDS)]
    least = n or 1
    if len(indices) < least:
        raise BadInput(f"{folder}: has {len(indices)} questions of the kinds asked here, "
                       f"fewer than {least}")
    return samples, sorted(indices[:n], key=samples.length)


@torch.no_grad()
def measure(ollm, folder, form, args, desc):
    """Returns a run's curves for written ("text") or spoken ("audio") questions, means over items.

    {"share", "per token": percent (L, F, S), "tokens": tokens of each span (S,), "items": number}
    """
    forms = ("question",) if form == "text" else ("question", "audio")
    samples, indices = pick_questions(folder, ollm.settings, args.n, forms)
    share_sum, per_token_sum, tokens_sum = 0, 0, 0
    for start in tqdm(range(0, len(indices), args.batch), desc=desc, unit="batch", leave=False):
        items = [samples[i] for i in indices[start: start + args.batch]]

        # The answer that follows the question is the run's own, not the data's.
        answers = ollm.answer(items, (form,))[form]
        items = [{**item, "answer": answer} for item, answer in zip(items, answers)]
        shares, spans = attention_shares(ollm, collate_with_answers(ollm, items), form)

        tokens = one_hot(spans, len(SPANS)).sum(1)  # (B, S)
        share_sum += 100 * shares.sum(0).cpu()
        per_token_sum += 100 * (shares / tokens.clamp(min=1)[:, None, None]).sum(0).cpu()
        tokens_sum += tokens.sum(0).cpu()
    n = len(indices)
    return {"share": share_sum / n, "per token": per_token_sum / n, "tokens": tokens_sum / n,
            "items": n}


def measure_runs(args):
    """Returns {name: {seed: what `measure` returns}}: "text" for the base, and every run."""
    results, bases = {"text": {}}, {}
    for name, by_seed in runs.group_runs(runs.asked_for(args, listening=True)).items():
        results[name] = {}
        for seed, run in by_seed.items():
            base = runs.read_run_info(run).get("base_fingerprint") or runs.fingerprint(run)
            if bases.setdefault(seed, base) != base:
                raise BadInput(f"{run}: has another base than the other runs of seed {seed}")
            ollm = OLLM.load(run, args.device).eval()
            folder = runs.questions_of(args, seed)

            # The LLM is frozen: all runs on a base give the same written answers.
            if seed not in results["text"]:
                results["text"][seed] = measure(ollm, folder, "text", args, f"{run}, text")
            results[name][seed] = measure(ollm, folder, "audio", args, f"{run}, audio")
    return results


# ---- reporting -----------------------------------------------------------------------------------


def distances(results, name, f, s):
    """Returns each seed's distance of a run's curve to the text's: points, mean over layers."""
    return [(result["share"] - results["text"][seed]["share"])[:, f, s].abs().mean().item()
            for seed, result in results[name].items()]


def print_summary(results):
    """Prints the distances to the text's curves, and the lengths of the spans."""
    names = [name for name in results if name != "text"]
    seeds = sorted(results["text"])
    print("\nDistance of each run's curve to the text's, percentage points, mean over layers; "
          f"{results['text'][seeds[0]]['items']} items, seed {', '.join(map(str, seeds))}\n")
    columns = []
    for name in names:
        by_panel = [distances(results, name, f, s) for f, s in PANELS.values()]
        means = [statistics.fmean(seed) for seed in zip(*by_panel)]
        columns.append([tables.cell(seeds) for seeds in (*by_panel, means)])
    rows = zip((*PANELS, "mean of the six"), *columns)
    tables.print_table(["share of attention", *names], rows)

    print("\nTokens of a span, mean over items\n")
    rows = []
    for name, by_seed in results.items():
        tokens = torch.stack([result["tokens"] for result in by_seed.values()])  # (seeds, S)
        rows.append([name, *map(tables.cell, tokens.T.tolist()[:PADDING])])
    tables.print_table(["", *SPANS[:PADDING]], rows)


def write_numbers(results, path):
    """Writes a line for each run, pair of spans and layer (from 1), in percent."""
    header = ("run", "seeds", "items", "from", "to", "layer", "share", "share_sd", "per_token",
              "per_token_sd")
    rows = []
    for name, by_seed in results.items():
        columns = []
        for key in MEASURES:
            columns += tables.over_seeds(result[key] for result in by_seed.values())
        numbers = torch.stack(columns, dim=-1)[:, :, :PADDING]  # (L, F, S - 1, 4)
        items = next(iter(by_seed.values()))["items"]
        run = (name, " ".join(map(str, sorted(by_seed))), items)
        for layer, f, s in itertools.product(*map(range, numbers.shape[:3])):
            rows.append([*run, LOOKING[f], SPANS[s], layer + 1, *numbers[layer, f, s].tolist()])
    tables.write_csv(path, header, rows)


def draw_attention(results, key, path):
    """Draws a row of panels for what the query looks at, and one for the response."""
    panels = {}
    for title, (f, s) in PANELS.items():
        panel = []
        for name, by_seed in results.items():
            curves = [result[key][:, f, s] for result in by_seed.values()]  # a seed each, (L,)
            label = name if name == "text" else f"{name}, audio"
            panel.append((label, *tables.over_seeds(curves)))
        panels[title.replace(" to ", " \N{RIGHTWARDS ARROW} ")] = panel
    tables.plot_curves(panels, "layer", MEASURES[key], path, rows=len(LOOKING))


def arguments(description):
    """Returns the argument parser that attention.py and probe.py share."""
    parser = runs.arguments(description)
    parser.add_argument("--batch", type=in_range(1), default=8, help="items in one pass")
    return parser


def main():
    parser = arguments(__doc__)
    parser.set_defaults(out="runs/attention")
    args = parser.parse_args()
    results, out = measure_runs(args), Path(args.out)
    write_numbers(results, out / "attention.csv")
    for key in MEASURES:
        draw_attention(results, key, out / f"attention-{key.replace(' ', '-')}.png")
    print_summary(results)


if __name__ == "__main__":
    with readable_errors():
        main()
