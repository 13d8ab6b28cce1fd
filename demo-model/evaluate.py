#!/usr/bin/env python3
"""Ask a running cluster held-out questions and print the share of greedy answers that are exactly right.

Standard library only. The categories are those of make_data.py; stories are right when the grammar could have told
them and they are about what was asked. Start `tandem up` first; the exit status is 1 when a rate misses its target.
"""

import argparse
import json
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import make_data

TARGETS = {"arithmetic": 0.9, "facts": 0.9, "copying": 0.98, "sorting": 0.9, "reversing": 0.9, "counting": 0.9, "refusals": 0.95,
           "about": 0.95, "references": 0.8}


def answer(url, model, messages):
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 128}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]["message"]["content"].strip()


def is_right(line, given):
    if line["answers"]:
        return given in line["answers"]
    return make_data.story_is_well_formed(line["messages"][-1]["content"], given)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the cluster's API")
    parser.add_argument("--model", help="model to ask; by default the first one listed")
    parser.add_argument("--n", type=int, default=500, help="questions per category")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="which questions; a fresh one each time by default")
    parser.add_argument("--category", choices=make_data.CATEGORIES, help="only this one")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--wrong", type=int, default=0, help="how many wrong answers of each category to show")
    args = parser.parse_args()
    model = args.model
    if model is None:
        with urllib.request.urlopen(f"{args.url}/v1/models", timeout=30) as response:
            model = json.load(response)["data"][0]["id"]
    rates, missed = {}, False
    print(f"seed {args.seed}, {args.n} questions each\n\n| category | exact | target |\n|---|---|---|")
    for category in [args.category] if args.category else make_data.CATEGORIES:
        lines = list(make_data.lines("heldout", args.seed, args.n, category))
        with ThreadPoolExecutor(args.concurrency) as pool:
            given = list(pool.map(lambda line: answer(args.url, model, line["messages"]), lines))
        wrong = [(line, text) for line, text in zip(lines, given) if not is_right(line, text)]
        rates[category] = round(1 - len(wrong) / len(lines), 4)
        target = TARGETS.get(category)
        missed |= target is not None and rates[category] < target
        print(f"| {category} | {rates[category]:.3f} | {target or ''} |", flush=True)
        for line, text in wrong[:args.wrong]:
            print(f"    {[m['content'] for m in line['messages']]} -> {text!r}, not {line['answers']}")
    if args.json:
        figures = {"seed": args.seed, "questions_per_category": args.n, "data_version": make_data.VERSION, "exact": rates}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
