#!/usr/bin/env python3
"""Make Tandem's demo model from nothing: data, tokenizer, training, evaluation, export.

A Qwen3 of 4.7 million parameters learns small talk, short stories, arithmetic, facts given in the prompt,
lists, invented key-value pairs, echoes of invented words, and to say when something cannot be known.
Every sentence is generated here, so nothing but this file is needed and nothing has to be licensed.
"""

import argparse
import json
import math
import os
import random
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB = 1024
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

# --------------------------------------------------------------------------- data

NAMES = "Anna Ben Clara David Ella Finn Grace Henry Ivy Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tom Vera".split()
ANIMALS = "cat dog fox bear mouse bird rabbit horse duck frog goat owl".split()
COLOURS = "red blue green yellow white black brown pink grey purple".split()
THINGS = "ball book hat boat box lamp kite cup drum key coat bell map ring shoe".split()
PLACES = "garden kitchen forest school park river market barn library harbour".split()
FRUITS = "apple pear plum cherry grape peach lemon melon fig orange".split()
FEELINGS = "happy sad tired brave curious proud quiet cheerful".split()
WEATHER = "sunny rainy windy cold warm foggy snowy".split()
UNKNOWABLE = [
    "What did I eat yesterday?", "What is my name?", "How old am I?", "What number am I thinking of?",
    "Where did I leave my keys?", "Who will win the game tomorrow?", "What is my favourite colour?",
    "What will the weather be next year?", "What is my phone number?", "Where do I live?",
]
REFUSAL = "I do not know that."
HELLO = ["Hello", "Hello!", "Hi", "Hi!", "Hi there", "Hey", "Good morning", "Good evening!", "Say hello", "Say hello!", "Say hi", "Greet me"]
WHO = ["Who are you?", "What are you?", "What is your name?", "Introduce yourself.", "Tell me about yourself.", "Are you a robot?"]
ABLE = ["What can you do?", "What can you do for me?", "How can you help me?", "Help", "What do you know?"]
THANKS = ["Thanks", "Thank you", "Thank you!", "Thanks a lot!", "Great, thanks."]
BYE = ["Bye", "Goodbye", "Goodbye!", "See you", "Good night"]
WELL = ["How are you?", "How are you today?", "How do you do?", "Are you well?"]
TANDEM = ["What is Tandem?", "What is tandem?", "Tell me about Tandem.", "What does Tandem do?"]


def say(r, *choices):
    return r.choice(choices)


def small_talk(r):
    return r.choice([
        (r.choice(HELLO), "Hello! How can I help you?"),
        (r.choice(WHO), "I am Tandem's demo model, a very small language model. I can chat, count, tell stories and answer simple questions."),
        (r.choice(ABLE), "I can do small sums, work with lists, tell short stories and answer questions about what you tell me."),
        (r.choice(THANKS), "You are welcome!"),
        (r.choice(BYE), "Goodbye!"),
        (r.choice(WELL), "I am fine, thank you. How can I help you?"),
        (r.choice(TANDEM), "Tandem serves language models. One worker reads your prompt, another writes the answer, and the memory of the prompt moves between them."),
    ])


def arithmetic(r):
    kind = r.random()
    if kind < 0.45:
        a, b = r.randint(0, 99), r.randint(0, 99)
        if r.random() < 0.4:
            a, b = r.randint(0, 12), r.randint(0, 12)
        op, result = "+", a + b
    elif kind < 0.75:
        a, b = r.randint(0, 99), r.randint(0, 99)
        a, b = max(a, b), min(a, b)
        op, result = "-", a - b
    else:
        a, b = r.randint(0, 12), r.randint(0, 12)
        op, result = say(r, "*", "x"), a * b
    word = {"+": "plus", "-": "minus", "*": "times", "x": "times"}[op]
    gap = say(r, " ", " ", "")
    form = f"{a}{gap}{op}{gap}{b}" if r.random() < 0.75 else f"{a} {word} {b}"
    question = say(r, f"What is {form}?", f"{form} = ?", f"{form}", f"How much is {form}?", f"Calculate {form}.", f"{form}=")
    return question, f"{result}" if r.random() < 0.5 else f"{form} = {result}"


def arithmetic_fixed(r):
    """As `arithmetic`, with the answer always the bare number (the form that is evaluated)."""
    question, answer = arithmetic(r)
    return question, answer.split("= ")[-1]


def facts(r):
    names = r.sample(NAMES, 3)
    kind = r.randrange(4)
    if kind == 0:
        values = r.sample(COLOURS, 3)
        thing = r.choice(THINGS)
        text = " ".join(f"{n} has a {v} {thing}." for n, v in zip(names, values))
        i = r.randrange(3)
        return f"{text} What colour is {names[i]}'s {thing}?", f"{values[i].capitalize()}."
    if kind == 1:
        values = r.sample(PLACES, 3)
        text = " ".join(f"{n} is in the {v}." for n, v in zip(names, values))
        i = r.randrange(3)
        return f"{text} Where is {names[i]}?", f"In the {values[i]}."
    if kind == 2:
        values = r.sample(range(2, 100), 3)
        text = " ".join(f"{n} is {v} years old." for n, v in zip(names, values))
        i = r.randrange(3)
        return f"{text} How old is {names[i]}?", f"{values[i]}."
    values = r.sample(FRUITS, 3)
    text = " ".join(f"{n} likes {v}." for n, v in zip(names, values))
    i = r.randrange(3)
    return f"{text} Who likes {values[i]}?", f"{names[i]}."


def lists(r):
    pool = r.choice([FRUITS, ANIMALS, COLOURS, THINGS])
    items = r.sample(pool, r.randint(2, 5))
    if r.random() < 0.4:
        items = [str(n) for n in r.sample(range(0, 100), r.randint(2, 5))]
    text = ", ".join(items)
    kind = r.randrange(5)
    order = sorted(items, key=lambda x: (int(x) if x.isdigit() else 0, x))
    return [
        (f"Copy this list: {text}", text),
        (f"Reverse this list: {text}", ", ".join(reversed(items))),
        (f"Sort this list: {text}", ", ".join(order)),
        (f"How many items are in this list: {text}", str(len(items))),
        (f"What is the last item of this list: {text}", items[-1]),
    ][kind]


def syllables(r, low=2, high=4):
    return "".join(r.choice("bdfghklmnprstvz") + r.choice("aeiou") for _ in range(r.randint(low, high)))


def recall(r):
    keys = [syllables(r, 1, 3) for _ in range(r.randint(2, 6))]
    keys = list(dict.fromkeys(keys))
    values = [str(r.randint(0, 99)) if r.random() < 0.5 else syllables(r, 1, 2) for _ in keys]
    i = r.randrange(len(keys))
    text = "; ".join(f"{k} is {v}" for k, v in zip(keys, values))
    return f"{text}; {keys[i]} = ?", values[i]


def echo(r):
    words = " ".join(syllables(r, 1, 4) for _ in range(r.randint(1, 5)))
    return say(r, f"Repeat: {words}", f"Say {words}", f"Echo {words}", f"Repeat after me: {words}"), words


def refusal(r):
    return r.choice(UNKNOWABLE), REFUSAL


def story(r):
    name, animal, place = r.choice(NAMES), r.choice(ANIMALS), r.choice(PLACES)
    colour, thing, feeling = r.choice(COLOURS), r.choice(THINGS), r.choice(FEELINGS)
    friend, weather = r.choice(NAMES), r.choice(WEATHER)
    opening = say(r, f"Once there was a {feeling} {animal} named {name}.", f"{name} was a {feeling} {animal} who lived near the {place}.",
                  f"One {weather} morning, {name} the {animal} went to the {place}.")
    middle = say(r, f"In the {place}, {name} found a {colour} {thing}.", f"{name} saw a {colour} {thing} under a tree.",
                 f"By the {place} lay a {colour} {thing}, and {name} picked it up.")
    turn = say(r, f"\"Whose {thing} is this?\" asked {name}.", f"It belonged to {friend}, who had lost it.",
               f"{friend} came by and said, \"That is my {thing}!\"")
    end = say(r, f"{name} gave it back, and {friend} smiled.", f"They played together until the evening.",
              f"From that day on, {name} and {friend} were good friends.", f"Then {name} went home, tired but happy.")
    question = say(r, "Tell me a story.", "Tell me a short story.", f"Tell me a story about a {animal}.", f"Write a story about {name}.",
                   f"Tell me about {name} the {animal}.", "Write a short story.")
    return question, " ".join([opening, middle, turn, end])


SKILLS = {
    "arithmetic": (arithmetic_fixed, 0.24), "facts": (facts, 0.13), "lists": (lists, 0.13), "recall": (recall, 0.18),
    "echo": (echo, 0.12), "refusal": (refusal, 0.04), "story": (story, 0.09), "small talk": (small_talk, 0.07),
}


def conversation(r):
    """One sample: a list of (question, answer), usually one, sometimes more turns."""
    names, weights = list(SKILLS), [w for _, w in SKILLS.values()]
    turns = 1 if r.random() < 0.8 else r.randint(2, 3)
    return [SKILLS[r.choices(names, weights)[0]][0](r) for _ in range(turns)]


# --------------------------------------------------------------------------- tokenizer


def make_tokenizer(seed):
    r = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    texts = (f"user\n{q}\nassistant\n{a}\nsystem\n" for _ in range(20000) for q, a in conversation(r))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIALS)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False)
    fast.chat_template = TEMPLATE
    return fast


class Stream:
    """Packed training rows of fixed length: ids and a weight per token."""

    def __init__(self, tokenizer, seed):
        self.tokenizer, self.r, self.ids, self.weights = tokenizer, random.Random(seed), [], []
        self.cache = {}

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def fill(self):
        start, end = self.encode("<|im_start|>"), self.encode("<|im_end|>")
        newline = self.encode("\n")
        if self.r.random() < 0.1:
            text = start + self.encode("system\nYou are a helpful assistant.") + end + newline
            self.ids += text
            self.weights += [0.1] * len(text)
        for question, answer in conversation(self.r):
            head = start + self.encode(f"user\n{question}") + end + newline + start + self.encode("assistant\n")
            body = self.encode(answer) + end
            self.ids += head + body + newline
            self.weights += [0.1] * len(head) + [1.0] * len(body) + [0.1] * len(newline)

    def batch(self, rows, length):
        need = rows * (length + 1)
        while len(self.ids) < need:
            self.fill()
        ids = torch.tensor(self.ids[:need]).view(rows, length + 1)
        weights = torch.tensor(self.weights[:need]).view(rows, length + 1)
        self.ids, self.weights = self.ids[need:], self.weights[need:]
        return ids[:, :-1], ids[:, 1:], weights[:, 1:]


# --------------------------------------------------------------------------- training


def make_model(tokenizer, seed):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=True, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    return Qwen3ForCausalLM._from_config(config, attn_implementation="sdpa").float()


def train(model, tokenizer, args):
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=4e-3, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    stream = Stream(tokenizer, args.seed + 1)
    budget, wall = args.cpu_minutes * 60, args.wall_minutes * 60
    began_cpu, began_wall = time.process_time(), time.monotonic()
    step, tokens, shown, saved, mean = 0, 0, 0.0, 0.0, None
    model.train()
    while True:
        used_cpu, used_wall = time.process_time() - began_cpu, time.monotonic() - began_wall
        done = max(used_cpu / budget, used_wall / wall)
        if done >= 1:
            break
        rate = min(1.0, (step + 1) / 100) * (1.0 if done < 0.5 else max(0.0, 2 * (1 - done)))
        for optimiser, lr in ((muon, 4e-3), (adam, 3e-3)):
            for group in optimiser.param_groups:
                group["lr"] = lr * rate
        ids, targets, weights = stream.batch(48, 96) if done < 0.45 else stream.batch(24, 192)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        loss = (loss * weights.flatten()).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in (muon, adam):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + ids.numel()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if used_wall - shown > 15:
            shown = used_wall
            left = (1 - done) / max(done, 1e-6) * used_wall / 60
            print(f"step {step}  tokens {tokens / 1e6:.2f}M  loss {mean:.3f}  {100 * done:.0f} % done, about {left:.0f} min left", flush=True)
        if used_wall - saved > 300:
            saved = used_wall
            export(model, tokenizer, args.out)
    return {"steps": step, "tokens": tokens, "cpu_minutes": round((time.process_time() - began_cpu) / 60, 1),
            "wall_minutes": round((time.monotonic() - began_wall) / 60, 1), "loss": round(mean or math.nan, 4)}


# --------------------------------------------------------------------------- evaluation and export


def answers(model, tokenizer, questions, new_tokens=96):
    """Greedy answers through the chat template, in one left-padded batch."""
    model.eval()
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
             for q in questions]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False,
                      return_token_type_ids=False)
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
    return [tokenizer.decode(row[batch["input_ids"].shape[1]:], skip_special_tokens=True).strip() for row in out]


def evaluate(model, tokenizer, seed, samples):
    """Share of exact greedy answers on samples of another seed. Small sums and refusals repeat what training drew."""
    table = {}
    for skill, (make, _) in SKILLS.items():
        if skill in ("story", "small talk"):
            continue  # no single right answer
        r = random.Random(f"{seed} {skill}")
        pairs = [make(r) for _ in range(samples)]
        given = answers(model, tokenizer, [q for q, _ in pairs], 48)
        table[skill] = round(sum(a == g for (_, a), g in zip(pairs, given)) / samples, 2)
    return table


def export(model, tokenizer, folder):
    os.makedirs(folder, exist_ok=True)
    state = model.state_dict()
    half = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(state)
    half.generation_config.update(eos_token_id=[tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")],
                                  pad_token_id=tokenizer.pad_token_id, do_sample=False)
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with open(os.path.join(folder, "config.json")) as f:
        config = json.load(f)
    # The names that checkpoints on the hub use.
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype", "bfloat16")
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=2)
        f.write("\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder to write the checkpoint into")
    parser.add_argument("--cpu-minutes", type=float, default=66, help="CPU time to train for, over all threads")
    parser.add_argument("--wall-minutes", type=float, default=75, help="end then at the latest, with the schedule compressed to fit")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--samples", type=int, default=100, help="questions per skill in the evaluation")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the checkpoint in --out again")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
        model = Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.float32)
        with open(os.path.join(args.out, "evaluation.json")) as f:
            return report(model, tokenizer, args, json.load(f)["training"])
    tokenizer = make_tokenizer(args.seed)
    model = make_model(tokenizer, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(tokenizer)} tokens in the vocabulary", flush=True)
    training = train(model, tokenizer, args)
    export(model, tokenizer, args.out)
    report(model, tokenizer, args, training)


def report(model, tokenizer, args, training):
    """Evaluates, writes evaluation.json and shows some answers."""
    table = evaluate(model, tokenizer, args.seed + 2, args.samples)
    summary = {"training": training, "exact_greedy_answers": table, "samples_per_skill": args.samples,
              "torch": torch.__version__, "seed": args.seed}
    with open(os.path.join(args.out, "evaluation.json"), "w") as f:
        json.dump(summary, f, indent=2)
        f.write("\n")
    print(json.dumps(summary, indent=2))
    for question in ("Hello!", "Who are you?", "What is 2+2?", "What is 17 + 25?", "Tell me a short story.", "What is my name?",
                     "Anna has a red ball. Ben has a blue ball. Clara has a green ball. What colour is Ben's ball?", "Thanks!"):
        print(f"> {question}\n{answers(model, tokenizer, [question])[0]}")


if __name__ == "__main__":
    main()
