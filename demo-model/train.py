#!/usr/bin/env python3
"""Train the demo model: tokenizer, weights, loss curve and a first evaluation.

The schedule is counted in steps and every step's data follow from the seed and its number, so a run that is
stopped and resumed, or stopped early, is the same run as far as it goes. Checkpoints go to the user's cache
folder; the result goes to --out.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

# Threads that wait must sleep, not spin: at low priority the other one often has no core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import make_data
import model as architecture

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
STEPS = 7400
# (first step, mix, how many names and words are from the lists, rows, tokens per row, turns of a conversation and how
# often, what prompts count): looking things up in the prompt is learned from many short conversations; long ones come
# last, when there is something to keep. That prompts count for something helps at first; later it is noise, for most
# of them is drawn by chance. Steps are those of a run of STEPS; a longer or shorter one stretches them.
STAGES = [
    (0, make_data.SHARES, 0.4, 22, 192, (1, 2), (0.9, 0.1), 0.1),
    (500, make_data.SHARES, 0.4, 22, 192, (1, 2, 3), (0.85, 0.1, 0.05), 0.02),
    (1800, make_data.LATER_SHARES, 0.4, 22, 192, (1, 2, 3, 5), (0.75, 0.1, 0.1, 0.05), 0.004),
    (5200, make_data.LATER_SHARES, 0.4, 8, 512, (1, 2, 3, 5, 10), (0.7, 0.1, 0.08, 0.07, 0.05), 0.004),
    (6700, make_data.LATER_SHARES, 0.45, 4, 1024, (1, 3, 8, 16, 30), (0.6, 0.1, 0.1, 0.1, 0.1), 0.004),
]
# The rate at these steps, of the full one; straight lines between.
RATES = [(0, 1.0), (3800, 1.0), (STEPS, 0.0)]
MATRIX_RATE, OTHER_RATE, WARM_UP = 4e-3, 3e-3, 50
FIXED_SEED, FIXED_PER_CATEGORY, FIXED_EVERY = 1000, 100, 250


# --------------------------------------------------------------------------- tokenizer and rows

def make_tokenizer(seed):
    r = make_data.Draw(f"tokenizer {seed}")
    r.known = make_data.KNOWN_IN_TRAINING
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=architecture.VOCAB - len(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    texts = ("".join(f"{m['role']}\n{m['content']}\n" for m in make_data.conversation(r, 1)[1]) for _ in range(40000))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


class Encoder:
    """A conversation as the template writes it: ids, and how much each counts as a target."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.start, self.end = (tokenizer.token_to_id(t) for t in SPECIALS[1:])
        self.newline = self.encode("\n")

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def plain(self, text):
        ids = [*self.encode(text), self.end]
        return ids, [1.0] * len(ids)

    def conversation(self, messages, prompt_weight=0.0):
        ids, weights = [], []
        for message in messages:
            head = [self.start, *self.encode(message["role"] + "\n")]
            body = [*self.encode(message["content"]), self.end]
            ids += head + body + self.newline
            weight = 1.0 if message["role"] == "assistant" else prompt_weight
            weights += [prompt_weight] * len(head) + [weight] * len(body) + [prompt_weight]
        return ids, weights


def packed(conversations, rows, length):
    """Rows filled with whole conversations, first fit: (ids, segments, weights), None once all rows are full enough."""
    taken, free = [[] for _ in range(rows)], [length + 1] * rows
    misses = 0
    for ids, weights in conversations:
        row = next((i for i in range(rows) if free[i] >= len(ids)), None)
        if row is None:
            misses += 1
            if misses > 12:
                break
            continue
        taken[row].append((ids, weights))
        free[row] -= len(ids)
    shape = (rows, length + 1)
    ids, segments, weights = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1), torch.zeros(shape)
    for row, parts in enumerate(taken):
        at = 0
        for number, (some, weight) in enumerate(parts):
            span = slice(at, at + len(some))
            ids[row, span], segments[row, span] = torch.tensor(some), number
            weights[row, span] = torch.tensor(weight)
            weights[row, at] = 0.0  # the first token of a conversation follows from nothing
            at += len(some)
    return ids, segments, weights


def stage_of(step, steps):
    return next(stage[1:] for stage in reversed(STAGES) if step * STEPS >= stage[0] * steps)


def batch(encoder, seed, step, steps):
    shares, known, rows, length, turns, often, prompt_weight = stage_of(step, steps)
    r = make_data.Draw(f"{seed} {step}")
    r.known = known

    def endless():
        while True:
            if r.random() < 0.01:
                yield encoder.plain(make_data.story(r, False)[1])  # for those who let it continue a text
            yield encoder.conversation(make_data.conversation(r, r.choices(turns, often)[0], shares)[1], prompt_weight)
    return packed(endless(), rows, length)


# --------------------------------------------------------------------------- training

def rate_at(step, steps):
    at = step * STEPS / steps
    (before, high), (after, low) = next(pair for pair in zip(RATES, RATES[1:]) if at <= pair[1][0])
    return min(1.0, (step + 1) / WARM_UP) * (high + (low - high) * (at - before) / (after - before))


def losses(network, ids, segments, weights, kind):
    with torch.autocast("cpu", kind, enabled=kind != torch.float32):
        logits = network(ids[:, :-1], segments[:, :-1])
    logits = logits.float()
    return logits, F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(weights[:, 1:])


class FixedSet:
    """Held-out conversations that are the same for every run: the loss of their last answers, and the share of
    answers that greedy decoding would give exactly (each token is the likeliest after the right ones before it)."""

    def __init__(self, encoder):
        self.batches = {}
        for category in make_data.CATEGORIES:
            made = make_data.lines("heldout", FIXED_SEED, FIXED_PER_CATEGORY, category)
            rows = []
            for line in made:
                ids, _ = encoder.conversation(line["messages"])
                answers = line["answers"]
                if not answers:
                    continue
                tail, weights = encoder.conversation([{"role": "assistant", "content": answers[0]}])
                rows.append((ids + tail, [0.0] * len(ids) + [float(w == 1.0) for w in weights]))
            if rows:
                width = max(len(ids) for ids, _ in rows) - 1
                self.batches[category] = packed_alone(rows, width)

    @torch.no_grad()
    def measure(self, network, kind):
        total, count, exact = 0.0, 0.0, {}
        for category, (ids, segments, weights) in self.batches.items():
            logits, loss = losses(network, ids, segments, weights, kind)
            wanted = weights[:, 1:]
            total, count = total + (loss * wanted).sum().item(), count + wanted.sum().item()
            right = (logits.argmax(-1) == ids[:, 1:]) | (wanted == 0)
            exact[category] = round(right.all(1).float().mean().item(), 3)
        return total / count, exact


def packed_alone(rows, width):
    shape = (len(rows), width + 1)
    ids, segments, weights = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1), torch.zeros(shape)
    for row, (some, weight) in enumerate(rows):
        ids[row, :len(some)], segments[row, :len(some)] = torch.tensor(some), 0
        weights[row, :len(some)] = torch.tensor(weight)
    return ids, segments, weights


def kind_for(name):
    """What is multiplied: bfloat16 where the processor has instructions for it, which is three times as fast there
    and a hundredth as fast elsewhere. Weights, their gradients and what lies between the layers stay in float32."""
    has = "avx512_bf16" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else False
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and has) else torch.float32


class Threads:
    """How many threads compute. Products are split evenly, so a thread without a core makes the others wait: where
    builds have one of two cores, one thread is many times as fast as two. The last digits of the sums may depend on
    this, therefore the first tenth of the run has a fixed number."""

    def __init__(self, most):
        self.most = self.now = most
        self.began = self.idle()

    @staticmethod
    def idle():
        """Seconds by the clock, of this process on processors, and that processors had nothing to do."""
        stat = Path("/proc/stat")
        idle = int(stat.read_text().split()[4]) / os.sysconf("SC_CLK_TCK") if stat.is_file() else 0.0
        return time.monotonic(), time.process_time(), idle

    def after_step(self, first_tenth):
        clock, computed, idle = (now - then for now, then in zip(self.idle(), self.began))
        if clock < 0.3:
            return
        self.began = self.idle()
        if not first_tenth and self.most > 1:
            self.now = self.most if self.now == 1 and idle > 0.6 * (self.most - 1) * clock else 1 if computed < 1.05 * clock else self.now
            torch.set_num_threads(self.now)


def train(args, tokenizer, network, cache):
    kind = kind_for(args.kind)
    encoder = Encoder(tokenizer)
    fixed = FixedSet(encoder)
    matrices = [p for n, p in network.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in network.named_parameters() if p.dim() != 2 or "embed" in n]
    muon = architecture.Muon(matrices, kind)
    adam = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    step, tokens, curve, seconds, mean = 0, 0, [], 0.0, None
    checkpoint = cache / f"seed{args.seed}-steps{args.steps}-data{make_data.VERSION}.pt"
    if checkpoint.is_file() and not args.fresh:
        state = torch.load(checkpoint)
        network.load_state_dict(state["network"])
        muon.state, step, tokens, curve, seconds = state["muon"], state["step"], state["tokens"], state["curve"], state["seconds"]
        mean = state["mean"]
        adam.load_state_dict(state["adam"])
        print(f"resumed at step {step} from {checkpoint}", flush=True)
    end = min(args.steps, args.stop_at_step or args.steps)

    def save():
        state = {"network": network.state_dict(), "muon": muon.state, "adam": adam.state_dict(), "step": step, "tokens": tokens,
                 "curve": curve, "seconds": seconds, "mean": mean}
        torch.save(state, checkpoint.with_suffix(".new"))
        os.replace(checkpoint.with_suffix(".new"), checkpoint)

    threads = Threads(args.threads)
    began, shown, saved = time.monotonic() - seconds, 0.0, time.monotonic()
    while True:
        seconds = time.monotonic() - began
        if step % FIXED_EVERY == 0 or step == end:
            if not curve or curve[-1]["step"] != step:
                loss, exact = fixed.measure(network, kind)
                curve.append({"step": step, "tokens": tokens, "train": mean, "heldout": round(loss, 4), "exact": exact})
                print(f"step {step}  held-out loss {loss:.4f}  " + "  ".join(f"{c} {v:.2f}" for c, v in exact.items()), flush=True)
        if step == end:
            break
        ids, segments, weights = batch(encoder, args.seed, step, args.steps)
        _, loss = losses(network, ids, segments, weights, kind)
        loss = (loss * weights[:, 1:]).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        rate = rate_at(step, args.steps)
        muon.step(MATRIX_RATE * rate)
        adam.param_groups[0]["lr"] = OTHER_RATE * rate
        adam.step()
        network.zero_grad(set_to_none=True)
        threads.after_step(step * 10 < args.steps)
        step, tokens = step + 1, tokens + int((segments >= 0).sum())
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if time.monotonic() - shown > 20:
            shown = time.monotonic()
            left = (shown - began) / step * (end - step) / 60
            print(f"step {step}/{args.steps}  tokens {tokens / 1e6:.2f}M  loss {mean:.3f}  {tokens / (shown - began):.0f} tokens/s  "
                  f"{threads.now} threads  about {left:.0f} min left", flush=True)
        if time.monotonic() - saved > 180:
            saved = time.monotonic()
            save()
    save()
    return {"steps": step, "of": args.steps, "tokens": tokens, "minutes": round(seconds / 60, 1), "seed": args.seed,
            "data_version": make_data.VERSION, "kind": str(kind).removeprefix("torch."), "torch": torch.__version__.split("+")[0]}, curve


# --------------------------------------------------------------------------- what is written

def export(network, tokenizer, out):
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    pad, _, end = (tokenizer.token_to_id(t) for t in SPECIALS)
    a = architecture
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16", "vocab_size": a.VOCAB,
        "hidden_size": a.HIDDEN, "intermediate_size": a.INNER, "num_hidden_layers": a.LAYERS, "num_attention_heads": a.HEADS,
        "num_key_value_heads": a.KV_HEADS, "head_dim": a.HEAD, "max_position_embeddings": a.CONTEXT, "rope_theta": a.THETA,
        "rms_norm_eps": a.EPS, "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
        "initializer_range": 0.02, "use_cache": True, "use_sliding_window": False, "sliding_window": None,
        "bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    write(out / "config.json", config)
    write(out / "generation_config.json", {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad})
    write(out / "tokenizer_config.json", {
        "clean_up_tokenization_spaces": False, "eos_token": SPECIALS[2], "pad_token": SPECIALS[0], "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": a.CONTEXT})
    (out / "chat_template.jinja").write_text(TEMPLATE)


def write(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def picture(curve, path):
    """The loss on the fixed held-out set and the exact answers per category, as an SVG without any library."""
    width, height, left, top = 860, 300, 60, 20
    last = max(1e-9, curve[-1]["tokens"])
    colours = "#0b6e99 #d9730d #0f7b6c #ad1a72 #6940a5 #e03e3e #64473a #9b9a97 #dfab01 #2f6f3e #000000".split()
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 170}" height="{2 * height + 100}" font-family="sans-serif" font-size="12">',
             '<rect width="100%" height="100%" fill="white"/>']

    def chart(y, title, low, high, ticks, text, series):
        place = lambda t, v: f"{left + t / last * (width - left):.1f},{y + height - (v - low) / (high - low) * height:.1f}"
        parts.append(f'<text x="{left}" y="{y - 6}">{title}</text>')
        for tick in ticks:
            _, at = place(0, tick).split(",")
            parts.append(f'<path d="M{left} {at}H{width}" stroke="#ddd"/><text x="{left - 8}" y="{at}" text-anchor="end" dy="4">{text(tick)}</text>')
        for at, (label, points) in enumerate(series):
            colour = colours[at % len(colours)]
            parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{" ".join(place(t, v) for t, v in points)}"/>')
            parts.append(f'<text x="{width + 12}" y="{y + 14 + 17 * at}" fill="{colour}">{label}</text>')
        for million in range(0, int(last / 1e6) + 1, max(1, round(last / 8e6))):
            at, _ = place(million * 1e6, low).split(",")
            parts.append(f'<text x="{at}" y="{y + height + 15}" text-anchor="middle">{million}M</text>')

    logs = [(p["tokens"], math.log10(p["heldout"])) for p in curve]
    train = [(p["tokens"], math.log10(p["train"])) for p in curve if p["train"]]
    low = math.floor(min(v for _, v in logs + train) * 2) / 2
    ticks = [v / 2 for v in range(int(2 * low), 3)]
    chart(top + 10, "Loss (logarithmic) over training tokens", low, 1, ticks, lambda v: f"{10 ** v:.3g}", [("fixed held-out set", logs), ("training, weighted", train)])
    chart(top + height + 60, "Exact answers on the fixed held-out set", 0, 1, [0, 0.25, 0.5, 0.75, 1], str,
          [(c, [(p["tokens"], p["exact"][c]) for p in curve]) for c in curve[-1]["exact"]])
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def table(curve, path):
    """The curve as lines that a program can compare with another run's."""
    categories = list(curve[-1]["exact"])
    rows = [",".join(["step", "tokens", "train_loss", "heldout_loss", *categories])]
    for p in curve:
        train = f"{p['train']:.4f}" if p["train"] else ""
        rows.append(",".join(map(str, [p["step"], p["tokens"], train, p["heldout"], *(p["exact"][c] for c in categories)])))
    path.write_text("\n".join(rows) + "\n")


def main():
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem" / "demo-model"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, training.json, curve.csv and curve.svg")
    parser.add_argument("--steps", type=int, default=STEPS, help="length of the schedule")
    parser.add_argument("--stop-at-step", type=int, help="end there, on the same schedule")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kind", choices=("auto", "float32", "bfloat16"), default="auto", help="numbers to multiply in; auto asks the processor")
    parser.add_argument("--nice", type=int, default=19, help="priority to run at")
    parser.add_argument("--cache", type=Path, default=cache, help=f"folder of the checkpoints to resume from (default {cache})")
    parser.add_argument("--fresh", action="store_true", help="do not resume")
    args = parser.parse_args()
    os.nice(args.nice)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    args.cache.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(args.seed)
    network = architecture.Model(args.seed)
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f}M parameters, {tokenizer.get_vocab_size()} tokens in the vocabulary", flush=True)
    training, curve = train(args, tokenizer, network, args.cache)
    export(network, tokenizer, args.out)
    write(args.out / "training.json", training | {"heldout_loss": curve[-1]["heldout"], "exact": curve[-1]["exact"]})
    table(curve, args.out / "curve.csv")
    picture(curve, args.out / "curve.svg")


if __name__ == "__main__":
    main()
