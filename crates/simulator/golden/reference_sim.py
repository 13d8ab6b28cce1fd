"""An independent reference simulator of prefill/decode placement, and the maker of the golden files beside it.

usage, from this folder (pypy3 is ten times faster than python3):
    pypy3 reference_sim.py golden NAME                            writes NAME.csv; NAME is one of ROWS, or `all`
    pypy3 reference_sim.py highest WORKLOAD TTFT_MS TPOT_MS [--attainment 0.9] [--seconds 900] [--squeeze] [--seed 1]
WORKLOAD is azure2023_code or azure2023_conv (read from ../traces), or `shift`.

Eight workers, Qwen3-8B on H200, KV over 40 GB/s + 1 ms, no prefix cache, no noise, no stale view.
`highest` finds for each baseline the highest scale at which that share of requests meets both targets:
    nP      a fixed split, n prefill and 8-n decode workers, least queued prefill work, fewest held tokens
    co C    eight mixed workers, chunked prefill with a token budget of C beside the decodes
    +       the same with deadline order: prefills that can still meet their target first, hopeless ones last
A scale of x superposes x copies of the trace, each rotated by a seeded offset, the last one thinned, and leaves the
clock as it is; --squeeze divides the timestamps instead, as papers do, which also squeezes the bursts.
"""
import argparse, csv, gzip, heapq, math, random
from collections import deque

A0, A1, A2 = 3.84, 19.09e-3, 0.913e-6          # ms: compute-bound step, per new token, per attention pair
B0, B1, B2 = 5.09, 11.7e-3, 33.2e-6            # ms: memory-bound step, per new token, per context token
KV_TOKENS, KV_BYTES, LINK = 708_000, 147_456, 40e9
WORKERS, FULL_CHUNK, HEADROOM = 8, 2048, 512


def step_ms(new, pairs, context):
    return max(B0 + B1 * new, A0 + A1 * new) + A2 * pairs + B2 * context


class Job:
    __slots__ = ("arrival", "prompt", "output", "left", "first", "made", "deadline")

    def __init__(self, arrival, prompt, output, ttft):
        self.arrival, self.prompt, self.output = arrival, prompt, output
        self.left, self.first, self.made, self.deadline = prompt, None, 0, arrival + ttft


class Worker:
    __slots__ = ("prefill", "queue", "hopeless", "decoding", "context", "busy", "work", "arriving", "arriving_tokens")

    def __init__(self, prefill):
        self.prefill, self.decoding, self.context, self.busy = prefill, [], 0, False
        self.queue, self.hopeless = deque(), deque()   # what not even an idle worker could save is looked at once
        self.work, self.arriving, self.arriving_tokens = 0.0, deque(), 0

    def admit(self):
        while self.arriving and self.context + self.arriving[0].prompt + HEADROOM <= KV_TOKENS:
            job = self.arriving.popleft()
            self.arriving_tokens -= job.prompt
            self.decoding.append(job)
            self.context += job.prompt + job.made

    def order_by_deadline(self, now):
        end, good, crowded = now, [], []
        for job in self.queue:
            need = A0 + A1 * job.left + A2 * job.left * (job.prompt - job.left / 2)
            if job.left < job.prompt or end + need <= job.deadline:
                good.append(job)
                end += need
            elif now + need <= job.deadline:
                crowded.append(job)
            else:
                self.hopeless.append(job)
        self.queue = deque(good + crowded)


def run(requests, prefill_workers, chunk, deadline_order, ttft, tpot):
    """Share of requests that meet both targets, and the median time to the first token in ms.

    prefill_workers = 0 means co-located.
    """
    mixed = prefill_workers == 0
    workers = [Worker(mixed or i < prefill_workers) for i in range(WORKERS)]
    decoders = workers if mixed else [w for w in workers if not w.prefill]
    prefillers = [w for w in workers if w.prefill]
    events, order, met, waits = [], 0, 0, []

    def at(time, kind, *what):
        nonlocal order
        order += 1
        heapq.heappush(events, (time, order, kind, what))

    def start(w, now):
        if w.busy:
            return
        w.admit()
        new, pairs, done, budget = len(w.decoding), 0.0, [], chunk if mixed else FULL_CHUNK
        if deadline_order and len(w.queue) + len(w.hopeless) > 1:
            w.order_by_deadline(now)
        while (w.queue or w.hopeless) and budget > 0:
            line = w.queue or w.hopeless
            job = line[0]
            n = min(job.left, budget)
            pairs += n * n / 2 + n * (job.prompt - job.left)
            job.left -= n
            budget -= n
            new += n
            if job.left == 0:
                done.append(line.popleft())
            elif line is w.hopeless:
                w.queue.appendleft(line.popleft())   # begun: finished next
        if new:
            w.busy = True
            at(now + step_ms(new, pairs, w.context), "step", w, done, list(w.decoding))

    def finish(job, now):
        nonlocal met
        met += job.first - job.arrival <= ttft and (now - job.first) / max(1, job.output - 1) <= tpot

    def cost(job):
        return A1 * job.prompt + A2 * job.prompt ** 2 / 2 + A0 * job.prompt / (chunk if mixed else FULL_CHUNK)

    for r in requests:
        at(r[0], "arrive", r)
    while events:
        now, _, kind, what = heapq.heappop(events)
        if kind == "arrive":
            job = Job(*what[0], ttft)
            w = min(prefillers, key=lambda w: w.work + len(w.decoding) * 0.05)
            w.queue.append(job)
            w.work += cost(job)
            start(w, now)
        elif kind == "step":
            w, done, decoded = what
            w.busy = False
            for job in decoded:
                job.made += 1
                w.context += 1
                if job.made >= job.output:
                    w.context -= job.prompt + job.made
                    w.decoding.remove(job)
                    finish(job, now)
            for job in done:
                w.work = max(0.0, w.work - cost(job))
                job.first, job.made = now, 1
                waits.append(now - job.arrival)
                if job.output <= 1:
                    finish(job, now)
                    continue
                d = w if mixed else min(decoders, key=lambda d: d.context + d.arriving_tokens)
                d.arriving_tokens += job.prompt
                if d is w:
                    d.arriving.append(job)
                else:
                    at(now + 1 + job.prompt * KV_BYTES / LINK * 1e3, "kv", d, job)
            start(w, now)
        else:
            d, job = what
            d.arriving.append(job)
            start(d, now)
    waits.sort()
    return met / len(requests), waits[(len(waits) - 1) // 2]


def load(name, seconds=None):
    rows = csv.DictReader(gzip.open(f"../traces/{name}.csv.gz", "rt"))
    rows = [(float(r["arrival_ms"]), int(r["input_tokens"]), max(1, int(r["output_tokens"]))) for r in rows]
    return [r for r in rows if seconds is None or r[0] < seconds * 1000]


def superpose(trace, scale, seed):
    rnd, span, out, copy = random.Random(seed), max(r[0] for r in trace) + 1, [], 0
    while scale > 1e-9:
        share, scale = min(1.0, scale), scale - 1
        offset = rnd.random() * span if copy else 0
        copy += 1
        thin = random.Random(seed * 1000 + copy)
        out += [((t + offset) % span, i, o) for t, i, o in trace if share >= 1 or thin.random() < share]
    return sorted(out)


def shift(code, scale, seed):
    """Two times: 300 s of Azure Code at 5 x scale, then 300 s of reasoning-like load at 25 x scale per second."""
    rnd, out = random.Random(seed), []
    draw = lambda median: max(1, min(8000, int(rnd.lognormvariate(math.log(median), 0.8))))
    for phase in range(4):
        begin, t = phase * 300_000.0, 0.0
        if phase % 2 == 0:
            out += [(begin + t, i, o) for t, i, o in superpose(code, 5 * scale, seed + phase)]
            continue
        while (t := t + rnd.expovariate(25 * scale) * 1000) < 300_000:
            out.append((begin + t, draw(300), draw(900)))
    return sorted(out)


KINDS = [(f"{n}P", n, FULL_CHUNK) for n in range(1, 8)] + [(f"co {c}", 0, c) for c in (256, 512, 1024, 2048)]

# Workload, seconds, squeezed, both targets in ms, ten scales. Whole scales: no copy is thinned.
SUPERPOSED_CODE, SUPERPOSED_CONV = (6, 12, 18, 24, 30, 36, 42, 48, 56, 64), (6, 12, 18, 24, 28, 32, 36, 40, 44, 50)
SQUEEZED, SHIFTED = (4, 7, 10, 13, 16, 19, 22, 26, 30, 34), (0.8, 1.0, 1.4, 1.8, 2.2, 2.6, 3.0, 3.4, 3.8, 4.2)
ROWS = {
    "code-squeezed-1000-50": ("azure2023_code", None, True, 1000, 50, SQUEEZED),
    "code-squeezed-1000-20": ("azure2023_code", None, True, 1000, 20, SQUEEZED),
    "code-1000-50": ("azure2023_code", 900, False, 1000, 50, SUPERPOSED_CODE),
    "code-1000-20": ("azure2023_code", 900, False, 1000, 20, SUPERPOSED_CODE),
    "conv-1000-50": ("azure2023_conv", 400, False, 1000, 50, SUPERPOSED_CONV),
    "conv-1000-20": ("azure2023_conv", 400, False, 1000, 20, SUPERPOSED_CONV),
    "conv-500-15": ("azure2023_conv", 400, False, 500, 15, SUPERPOSED_CONV),
    "shift-1000-50": ("shift", None, False, 1000, 50, SHIFTED),
    "shift-1000-20": ("shift", None, False, 1000, 20, SHIFTED),
}


def maker(workload, seconds, squeeze, seed):
    trace = load("azure2023_code", 300) if workload == "shift" else load(workload, seconds)
    if workload == "shift":
        return lambda s: shift(trace, s, seed)
    if squeeze:
        return lambda s: [(t / s, i, o) for t, i, o in trace]
    return lambda s: superpose(trace, s, seed)


def golden(name):
    """One line per kind, order and scale; how many arrivals there were and what they sum up to stands beside."""
    workload, seconds, squeeze, ttft, tpot, scales = ROWS[name]
    make = maker(workload, seconds, squeeze, 1)
    with open(f"{name}.csv", "w") as out:
        print("kind,order,scale,arrivals,arrival_ms_sum,input_sum,output_sum,attainment,ttft_ms_median", file=out)
        for s in scales:
            requests = make(s)
            sums = [round(sum(r[0] for r in requests)), sum(r[1] for r in requests), sum(r[2] for r in requests)]
            for kind, n, chunk in KINDS:
                for plus in (False, True):
                    share, median = run(requests, n, chunk, plus, ttft, tpot)
                    order = "deadline" if plus else "arrival"
                    print(kind, order, s, len(requests), *sums, f"{share:.5f}", f"{median:.3f}", sep=",", file=out, flush=True)


def highest_scale(attainment_at, target, low=0.25, high=64.0):
    if attainment_at(low) < target:
        return 0.0
    while high / low > 1.02:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if attainment_at(middle) >= target else (low, middle)
    return low


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    g = commands.add_parser("golden")
    g.add_argument("name", choices=[*ROWS, "all"])
    h = commands.add_parser("highest")
    h.add_argument("workload")
    h.add_argument("ttft", type=float)
    h.add_argument("tpot", type=float)
    h.add_argument("--attainment", type=float, default=0.9)
    h.add_argument("--seconds", type=float)
    h.add_argument("--squeeze", action="store_true")
    h.add_argument("--seed", type=int, default=1)
    h.add_argument("--high", type=float, default=64.0)
    a = p.parse_args()
    if a.command == "golden":
        for name in ROWS if a.name == "all" else [a.name]:
            golden(name)
        return
    make = maker(a.workload, a.seconds, a.squeeze, a.seed)
    for plus in (False, True):
        for name, n, chunk in KINDS:
            s = highest_scale(lambda s: run(make(s), n, chunk, plus, a.ttft, a.tpot)[0], a.attainment, high=a.high)
            print(f"{a.workload} {name}{'+' if plus else ''} {s:.2f}", flush=True)


if __name__ == "__main__":
    main()
