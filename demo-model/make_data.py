#!/usr/bin/env python3
"""Print the demo model's conversations, one JSON line each: {"category", "messages", "answers"}.

Everything comes from the word lists in sentences.py and from the seed. What is held out is decided by a hash, not
by the seed: operand pairs of + and -, phrasings of x and of questions about Tandem, and names, words and invented
words everywhere else. No line of one split has a held-out part of the other. `messages` ends with the user's last
turn; `answers` are those that count as right, the first is the one to train on, and none means that a grammar
judges (stories; see `story_is_well_formed`).
"""

import argparse
import hashlib
import json
import random
import re
import sys

from sentences import (
    ABOUT, ANIMALS, COLOURS, FAREWELLS, FEELINGS, FOODS, HELLO, JOBS, NAMES, NOTED, NOUNS, PLACES, REFUSAL, WEATHER)

VERSION = 3
SYSTEM = ["You are a helpful assistant.", "You are a friendly assistant.", "Answer briefly.", "Be kind and brief."]


def held_out(kind, *parts, share=10):
    """One part in `share` belongs to the held-out split, the same ones for every seed."""
    text = f"{kind}:{':'.join(map(str, parts))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") % share == 0


KNOWN = {known.lower() for known in NAMES + NOUNS}


def until(make, wanted):
    while True:
        made = make()
        if wanted(made):
            return made


NAMES_OF = {held: [n for n in NAMES if held_out("name", n, share=7) == held] for held in (False, True)}
NOUNS_OF = {held: [n for n in NOUNS if held_out("noun", n) == held] for held in (False, True)}


def invented(r, held, low=1, high=3):
    """A word of syllables that no dictionary has."""
    def make():
        count = r.randint(low, high)
        word = "".join(r.choice("bdfghklmnprstvz") + r.choice("aeiou") for _ in range(count))
        return word + (r.choice("lmnrst") if r.random() < 0.15 else "")
    return until(make, lambda word: word not in KNOWN and held_out("invented", word) == held)


def distinct(count, make):
    found = {}
    while len(found) < count:
        found[make()] = None
    return list(found)


class Draw(random.Random):
    """Where everything is drawn from, and how many of the names and words come from the lists. In training fewer do:
    a model that has learned the lists by heart takes Ines for Ingrid."""

    known = 0.75


KNOWN_IN_TRAINING = 0.4


def blended(r, held, words):
    """The beginning of one word and the end of another, in the letters of real ones."""
    def make():
        first, second = r.choice(words), r.choice(words)
        return first[:r.randint(1, max(1, len(first) - 1))] + second[r.randint(1, max(1, len(second) - 2)):].lower()
    return until(make, lambda word: 2 <= len(word) <= 9 and word.lower() not in KNOWN and held_out("invented", word.lower()) == held)


def name(r, held):
    if r.random() < r.known:
        return r.choice(NAMES_OF[held])
    if r.known < Draw.known and r.random() < 0.6:
        return blended(r, held, NAMES_OF[held])
    return invented(r, held, 2, 3).capitalize()


def word(r, held):
    if r.random() < r.known - 0.05:
        return r.choice(NOUNS_OF[held])
    if r.known < Draw.known and r.random() < 0.5:
        return blended(r, held, NOUNS_OF[held])
    return invented(r, held)


def ask(r, frame, *parts):
    """The frame as people type it, with its parts as they are."""
    if r.random() < 0.25:
        frame = frame[0].lower() + frame[1:]
    if r.random() < 0.2:
        frame = frame.rstrip("?.! ")
    if r.random() < 0.08 and not frame.startswith("{"):
        frame = r.choice(["Please: ", "Hey, ", "Now: ", "Next: ", "And "]) + frame
    return frame.format(*parts)


# --------------------------------------------------------------------------- one question, one answer

SUM_FRAMES = ["What is {}?", "What is {}?", "{} = ?", "{}", "How much is {}?", "Calculate {}.", "{}=", "Compute {}.", "What's {}?",
              "Can you tell me what {} is?", "{}?", "Tell me {}.", "Work out {}.", "What does {} make?", "How many is {}?"]
SUM_FORMS = {"+": ["{} + {}", "{} + {}", "{}+{}", "{} plus {}"], "-": ["{} - {}", "{} - {}", "{}-{}", "{} minus {}"],
             "x": ["{} x {}", "{}x{}", "{}*{}", "{} * {}", "{} times {}", "{} × {}"]}
TALES = {"+": ["I have {} {2} and get {1} more. How many {2} do I have?", "{} {2} and {1} {2}: how many {2} is that?"],
         "-": ["I have {} {2} and eat {1}. How many {2} do I have?", "I had {} {2} and lost {1}. How many {2} are left?"]}


def arithmetic(r, held, top=99):
    kind = r.choices("+-x", (0.45, 0.3, 0.25))[0]
    if kind == "x":
        a, b = r.randint(0, 12), r.randint(0, 12)
        form, frame = until(lambda: (r.choice(SUM_FORMS[kind]), r.choice(SUM_FRAMES)),
                            lambda both: held_out("phrasing of x", both[0], both[1].rstrip("?.! ")) == held)
        return ask(r, frame, form.format(a, b)), [str(a * b)]

    def pair():
        high = top if r.random() < 0.75 else min(top, 20)
        a, b = r.randint(0, high), r.randint(0, high)
        return (max(a, b), min(a, b)) if kind == "-" else (a, b)
    a, b = until(pair, lambda ab: held_out(kind, *(sorted(ab) if kind == "+" else ab)) == held)
    if r.random() < 0.06:
        question = ask(r, r.choice(TALES[kind]).replace("{}", "{0}"), a, b, r.choice(FOODS[:8]))
    else:
        question = ask(r, r.choice(SUM_FRAMES), r.choice(SUM_FORMS[kind]).format(a, b))
    return question, [str(a + b if kind == "+" else a - b)]


# A fact, what to ask by its name, what to ask by its value, and the answer to that; the fact itself answers the others.
# An answer to a question by value says the value first: the name then follows what it is looked up with, which is
# learned soon, while an answer that begins with the name is not (docs/demo-model.md).
FACTS = [
    ("{n} is in the {v}.", ["Where is {n}?", "In which place is {n}?"], ["Who is in the {v}?"], "The one in the {v} is {n}.",
     lambda r, held: r.choice(PLACES)),
    ("{n} likes {v}.", ["What does {n} like?"], ["Who likes {v}?"], "The one who likes {v} is {n}.", lambda r, held: r.choice(FOODS)),
    ("{n} is {v} years old.", ["How old is {n}?", "What age is {n}?"], ["Who is {v} years old?", "Who is {v}?"], "The one aged {v} is {n}.",
     lambda r, held: str(r.randint(2, 99))),
    ("{n} is a {v}.", ["What is {n}'s job?", "What job does {n} have?"], ["Who is a {v}?", "Who is the {v}?"], "The {v} is {n}.",
     lambda r, held: r.choice(JOBS)),
    ("{n} has the {v}.", ["What does {n} have?"], ["Who has the {v}?"], "The one who has the {v} is {n}.", word),
    ("{n} lives in {v}.", ["Where does {n} live?"], ["Who lives in {v}?"], "The one who lives in {v} is {n}.",
     lambda r, held: invented(r, held, 2, 3).capitalize()),
    ("{n}'s {t} is {v}.", ["What colour is {n}'s {t}?", "Which colour has {n}'s {t}?"], ["Whose {t} is {v}?"], "The one whose {t} is {v} is {n}.",
     lambda r, held: r.choice(COLOURS)),
    ("{n} is {v}.", ["What is {n}?", "{n} = ?", "{n} is?"], ["Which one is {v}?", "What is {v}?"], "The one that is {v} is {n}.", None),
]


class Fact:
    """A fact with all that there is to ask about it."""

    def __init__(self, row, **parts):
        fact, by_name, by_value, who, _ = row
        fill = lambda text: text.format(**parts)
        self.name, self.value, self.text, self.who = parts["n"], parts["v"], fill(fact), fill(who)
        self.by_name, self.by_value = [fill(text) for text in by_name], [fill(text) for text in by_value]

    def asked(self, r, by_name):
        """A question, and what answers it; the first answer is the one to learn."""
        if r.random() < by_name:
            return r.choice(self.by_name).replace("{", "{{"), [self.text]
        return r.choice(self.by_value).replace("{", "{{"), [self.who, self.text]


def some_facts(r, held, count):
    """`count` facts, mostly of one kind."""
    if r.random() < 0.75:
        kinds = [r.choice(FACTS)] * count
    else:
        kinds = r.sample(FACTS[:-1], count) if count < len(FACTS) else FACTS[:count]
    thing = r.choice(NOUNS_OF[held])
    code = kinds[0][-1] is None
    names = distinct(count, lambda: invented(r, held) if code else name(r, held))
    if kinds[0] is not kinds[-1] and r.random() < 0.3:
        names = [r.choice(names[:2]) for _ in names]
    made, seen = [], set(names)
    for who, row in zip(names, kinds):
        make = row[-1] or (lambda r, held: str(r.randint(0, 99)) if r.random() < 0.5 else invented(r, held, 1, 2))
        v = until(lambda: make(r, held), lambda v: v not in seen)
        seen.add(v)
        made.append(Fact(row, n=who, v=v, t=thing))
    return made


def told_together(made):
    return " ".join(fact.text for fact in made)


def pairs(r):
    """Training: facts, and which name belongs to each value, in another order. A value is followed by its name at
    once, which is learned first; to answer a question by value, the same is then looked up from further away."""
    made = until(lambda: some_facts(r, False, r.choices((2, 3, 4, 5), (0.25, 0.35, 0.25, 0.15))[0]),
                 lambda made: len({fact.name for fact in made}) == len(made))
    order = r.sample(made, len(made))
    question = told_together(made) + r.choice([" Who: ", " Names for "]) + ", ".join(fact.value for fact in order)
    return question, [", ".join(f"{fact.value} {fact.name}" for fact in order)]


def more_facts(r):
    """Training: facts, a question, and others about the same facts."""
    made = some_facts(r, False, r.choices((2, 3, 4, 5), (0.25, 0.35, 0.25, 0.15))[0])
    before = (" " if r.random() < 0.85 else "\n").join(fact.text for fact in made) + " "
    for fact in r.sample(made, r.randint(2, len(made))):
        question, answers = fact.asked(r, 0.4)
        yield before + ask(r, question), answers[0]
        before = ""


def facts(r, held):
    # Training has more of what is hard: many facts.
    made = some_facts(r, held, r.choices((1, 2, 3, 4, 5), (0.1, 0.25, 0.35, 0.2, 0.1) if held else (0.04, 0.21, 0.3, 0.25, 0.2))[0])
    question, answers = r.choice(made).asked(r, 0.5)
    text = (" " if r.random() < 0.85 else "\n").join(fact.text for fact in made)
    return f"{text} {ask(r, question)}", answers


COPY_FRAMES = ["Repeat: {}", "Repeat after me: {}", "Say {}", "Say: {}", "Echo {}", "Copy this: {}", "Copy: {}", "Write {}", "Repeat {}",
               "Please say {}", "Copy this list: {}", "Repeat the words {}"]


def copying(r, held):
    count = r.randint(1, 6)
    kind = r.random()
    if kind < 0.45:
        text = " ".join(invented(r, held, 1, 4) for _ in range(count))
    elif kind < 0.75:
        text = r.choice([", ", " "]).join(word(r, held) for _ in range(count))
    elif kind < 0.85:
        text = r.choice([", ", " "]).join([word(r, held)] + [str(r.randint(0, 999)) for _ in range(count)])
    else:
        text = told_together(some_facts(r, held, r.randint(1, 2)))
    return ask(r, r.choice(COPY_FRAMES), text), [text]


def items(r, held, low, high):
    """A list: numbers with one held-out combination, or words."""
    count = r.randint(low, high)
    if r.random() < 0.5:
        return until(lambda: [str(n) for n in r.sample(range(100 if r.random() < 0.7 else 20), count)],
                     lambda made: held_out("numbers", *sorted(made)) == held)
    # Different first letters, so that the order does not hang on what a token hides.
    kept = {}
    while len(kept) < count:
        made = word(r, held)
        kept.setdefault(made[0], made)
    return list(kept.values())


def listed(r, values):
    return ", ".join(values) if r.random() < 0.85 else " ".join(values)


def in_order(values):
    return sorted(values, key=lambda value: (int(value) if value.isdigit() else 0, value))


SORT_FRAMES = ["Sort this list: {}", "Sort: {}", "Sort {}", "Put in order: {}", "Sort these: {}", "Order this list: {}", "Please sort {}",
               "Put these in order: {}", "Can you sort {}?"]
REVERSE_FRAMES = ["Reverse this list: {}", "Reverse: {}", "Reverse {}", "Turn this list around: {}", "Reverse the order of {}",
                  "Say this backwards: {}", "Please reverse {}", "Write in reverse order: {}", "Can you reverse {}?"]
COUNT_FRAMES = ["How many items are in this list: {}", "How many words are here: {}", "Count these: {}", "How many are there: {}",
                "Count the items: {}", "How many things are these: {}", "How many items: {}", "Count this list: {}"]


def sorting(r, held):
    values = items(r, held, 2, 5)
    if values[0].isdigit() and r.random() < 0.1:
        frame = r.choice(["Sort from large to small: {}", "Sort in descending order: {}"])
        return ask(r, frame, listed(r, values)), [", ".join(reversed(in_order(values)))]
    return ask(r, r.choice(SORT_FRAMES), listed(r, values)), [", ".join(in_order(values))]


def reversing(r, held):
    values = items(r, held, 2, 6)
    return ask(r, r.choice(REVERSE_FRAMES), listed(r, values)), [", ".join(reversed(values))]


def counting(r, held):
    if r.random() < 0.25:
        low, high = until(lambda: (r.randint(0, 30), r.randint(1, 9)), lambda made: held_out("count", *made) == held)
        numbers = [str(n) for n in range(low, low + high + 1)]
        if r.random() < 0.25:
            return ask(r, "Count down from {} to {}.", numbers[-1], numbers[0]), [", ".join(reversed(numbers))]
        if low == 1:
            return ask(r, r.choice(["Count to {}.", "Count up to {}."]), numbers[-1]), [", ".join(numbers)]
        return ask(r, r.choice(["Count from {} to {}.", "Count {} to {}."]), numbers[0], numbers[-1]), [", ".join(numbers)]
    values = items(r, held, 1, 9)
    return ask(r, r.choice(COUNT_FRAMES), listed(r, values)), [str(len(values))]


# --------------------------------------------------------------------------- stories

OPENING = ["Once there was a {feeling} {animal} named {name}.", "{name} was a {feeling} {animal} who lived near the {place}.",
           "One {weather} morning, {name} the {animal} went to the {place}."]
MIDDLE = ["In the {place}, {name} found a {colour} {thing}.", "{name} saw a {colour} {thing} under a tree.",
          "By the {place} lay a {colour} {thing}, and {name} picked it up."]
TURN = ["It belonged to {friend}, who had lost it.", "{friend} came by and said, \"That is my {thing}!\"",
        "{name} asked {friend}, \"Is this {thing} yours?\""]
END = ["{name} gave it back, and {friend} smiled.", "They played together until the evening.",
       "From that day on, {name} and {friend} were good friends.", "Then {name} went home, tired but happy."]
THINGS_OF = {held: [noun for noun in nouns if noun[0] not in "aeiou"] for held, nouns in NOUNS_OF.items()}
STORY_ASKS = ["Tell me a story.", "Tell me a short story.", "Write a short story.", "A story please", "Do you know a story?", "Story"]


def story(r, held):
    """A question and a story for it, with who it is about."""
    who, animal = name(r, held), r.choice(ANIMALS)
    kind = r.randrange(2, 4) if held else r.randrange(4)
    if kind == 0:
        who, question = r.choice(NAMES_OF[False]), ask(r, r.choice(STORY_ASKS))
    elif kind == 1:
        who = r.choice(NAMES_OF[False])
        question = ask(r, r.choice(["Tell me a story about a {}.", "Write a story about a {}."]), animal)
    elif kind == 2:
        question = ask(r, r.choice(["Write a story about {}.", "Tell me a story about {}."]), who)
    else:
        question = ask(r, r.choice(["Tell me about {} the {}.", "Tell me a story about {} the {}."]), who, animal)
    slots = {
        "name": who, "animal": animal, "friend": until(lambda: r.choice(NAMES_OF[held]), lambda n: n != who), "place": r.choice(PLACES),
        "feeling": r.choice(FEELINGS), "weather": r.choice(WEATHER), "colour": r.choice([c for c in COLOURS if c != "orange"]),
        "thing": r.choice(THINGS_OF[held])}
    text = " ".join(r.choice(part).format(**slots) for part in (OPENING, MIDDLE, TURN, END))
    return question, text, slots


def story_is_well_formed(question, text):
    """Whether the grammar could have told this: its four sentences, about whom and what was asked."""
    slots = {"name": r"[A-Z]\w*", "friend": r"[A-Z]\w*", "animal": "|".join(ANIMALS), "place": "|".join(PLACES), "thing": r"\w+",
             "feeling": "|".join(FEELINGS), "weather": "|".join(WEATHER), "colour": "|".join(COLOURS)}
    part = lambda texts: "(?:" + "|".join(re.sub(r"\\{(\w+)\\}", lambda m: f"(?:{slots[m[1]]})", re.escape(t)) for t in texts) + ")"
    if not re.fullmatch(" ".join(map(part, (OPENING, MIDDLE, TURN, END))), text):
        return False
    asked = re.search(r"about (?:a (\w+)|(\w+)(?: the (\w+))?)", question)
    return asked is None or all(part is None or part in text for part in asked.groups())


def stories(r, held):
    question, text, _ = story(r, held)
    return question, [text]


# --------------------------------------------------------------------------- what it cannot know, and what it is

PERSONAL = ["What is my name?", "How old am I?", "Where do I live?", "What is my favourite {w}?", "What is my phone number?",
            "What is my {w}'s name?", "When is my birthday?", "Who am I?", "What do I like?", "What is my job?", "What do I have?",
            "What colour is my {w}?", "Where did I leave my {w}?", "What did I eat yesterday?", "What did I dream last night?",
            "What did I buy with the {w}?", "Who gave me the {w}?", "What number am I thinking of?", "What am I thinking?",
            "Do you remember my {w}?", "Where is my {w}?", "How many {w}s do I have?"]
IMPERSONAL = ["Who will win the game tomorrow?", "What will the weather be tomorrow?", "What will happen next year?", "What time is it?",
              "What day is it today?", "What is the weather like?", "Who wrote the book about the {w}?", "What is the capital of {p}?",
              "How many people live in {p}?", "Who is the president of {p}?", "Where is {p}?", "How far is it to {p}?", "Who is {n}?",
              "Who invented the {w}?", "How much does a {w} cost?", "How heavy is a {w}?", "Why is the {w} {c}?", "What is a {w}?",
              "How do I make a {w}?", "When was the first {w} made?", "Where can I buy a {w}?", "Who is the best {j} in {p}?",
              "How tall is {n}?", "What did {n} do yesterday?", "Where is {n} now?", "What is {n}'s phone number?", "How old is {n}?",
              "Where does {n} live?", "When was {n} born?", "What does {n} like?", "Who is {n}'s mother?", "What is in the {w}?",
              "What does {i} mean?", "What is {i}?", "Translate {i}.", "{i} {i}", "{i}", "{i} {i} {i}?", "Why do {w}s {i}?",
              "Who broke the {w}?", "Will it rain in {p} tomorrow?", "What is the news?", "Which {w} is the best?", "How old is the {w}?",
              "What is the square root of {d}?", "What is the longest river?", "Why is the sky blue?", "Who painted the {w}?",
              "Does {n} have a {w}?", "How deep is the ocean?", "Is there a {w} in {p}?", "What will {n} do tomorrow?", "Write code for a {w}.",
              "Tell me about the {w}.", "Explain the {w}.", "What happened in {p}?", "Who lives in {p}?", "Who likes the {w}?",
              "Can you cook {w}?", "Do you know {n}?", "Where is the {w}?", "Should I buy a {w}?", "How many {w}s are there?",
              "What is the price of a {w}?", "Who was the first {j}?", "How fast is a {w}?", "Who is the {j}?", "Can I have a {w}?"]


def refusals(r, held, personal=True):
    if r.random() < (0.12 if held else 0.25) and personal:
        made = some_facts(r, held, r.randint(1, 3 if held else 4))
        # Half of training asks for what was told, but of somebody else.
        alike = not held and r.random() < 0.5
        other = until(lambda: some_facts(r, held, 1)[0], lambda other: not any(other.name in fact.text for fact in made) and (
            not alike or other.by_name[0].split()[:2] == made[0].by_name[0].split()[:2]))
        return f"{told_together(made)} {r.choice(other.by_name)}", [REFUSAL]

    def make():
        frame = r.choice(PERSONAL if personal and r.random() < 0.35 else IMPERSONAL)
        parts = {"w": word(r, held), "p": invented(r, held, 2, 3).capitalize(), "n": name(r, held), "c": r.choice(COLOURS),
                 "j": r.choice(JOBS), "i": invented(r, held, 2, 4), "d": r.randint(2, 99)}
        return frame, parts
    # A question without a part of its own is never held out.
    frame, parts = until(make, lambda made: not held or re.search(r"{[wpni]}", made[0]))
    return ask(r, frame.format(**parts)), [REFUSAL]


OPENERS = ["", "", "", "", "Hey, ", "Please tell me: ", "Hi! ", "Hello. ", "One question: ", "So, ", "Well, ", "Tell me, ", "Quick question: ",
           "I am {}. ", "{} asks: ", "Dear Tandem, ", "Now tell me: ", "Hmm, ", "Another question: "]
CLOSERS = ["", "", "", " Please.", " :)", "!", " Tell me.", "...", " my friend", " please", " today", " ??"]


def plain(text):
    return " ".join(re.findall(r"\w+", text.lower()))


STEMS = {plain(stem) for stems in ABOUT.values() for stem in stems}


def about(r, held):
    if not held and r.random() < 0.06:
        return ask(r, r.choice(FAREWELLS)), [r.choice([answer for answer in ABOUT if answer.startswith("Goodbye")])]
    answer = r.choice(list(ABOUT))

    def is_held_out(made):
        words = plain("".join(made))
        return words not in STEMS and held_out("about", words)
    opener, stem, closer = until(
        lambda: (r.choice(OPENERS), r.choice(ABOUT[answer]), r.choice(CLOSERS)), lambda made: is_held_out(made) == held)
    text = stem
    if r.random() < 0.3:
        text = text[0].lower() + text[1:]
    if closer or r.random() < 0.25:
        text = text.rstrip("?.!")
    elif r.random() < 0.05:
        text = text.upper()
    return opener.format(r.choice(NAMES_OF[held])) + text + closer, [answer]


YOUR_NAME = "I am Tandem's demo model. A system prompt can give me another name."
WHO = "I am Tandem's demo model, a very small language model. I can do sums, work with lists, remember what you tell me and tell stories."
CALLED = ["Your name is {}.", "You are {}.", "You are {}, a helpful assistant.", "You are called {}.", "Your name is {}. Be friendly.",
          "You are an assistant named {}.", "You are a helpful assistant. Your name is {}."]


def named(r, held):
    """A system prompt that sets the name, and a question about it."""
    who = name(r, held)
    system = r.choice(CALLED).format(who)
    if r.random() < 0.6:
        return system, ask(r, r.choice(ABOUT[YOUR_NAME])), [f"My name is {who}."]
    return system, ask(r, r.choice(ABOUT[WHO])), [f"I am {who}. How can I help you?"]


# --------------------------------------------------------------------------- two turns

def told(r, held):
    """Something about the user, and the question about it."""
    w, n = word(r, held), name(r, held)
    if r.random() < 0.2:
        n = n.lower()
    food, colour, job, age = r.choice(FOODS), r.choice(COLOURS), r.choice(JOBS), r.randint(3, 99)
    town = invented(r, held, 2, 3).capitalize()
    pairs = [
        (r.choice(["My name is {}.", "I am {}.", "I'm {}.", "Hi, I am {}.", "Hello, my name is {}.", "Call me {}."]
                  + ([] if held else ["I'm {}, nice to meet you.", "Hey, I'm {}!", "I am {}, hello."])).format(n),
         f"Nice to meet you, {n}!", ["What is my name?", "Who am I?", "Do you know my name?", "What's my name?"], f"Your name is {n}."),
        (f"My {w} is {colour}.", NOTED, [f"What colour is my {w}?", f"Which colour has my {w}?"], f"Your {w} is {colour}."),
        (f"My {w} is called {n}.", NOTED, [f"What is my {w} called?", f"What is my {w}'s name?"], f"Your {w} is called {n}."),
        (r.choice([f"I live in {town}.", f"I am from {town}."]), NOTED, ["Where do I live?", "Where am I from?"], f"You live in {town}."),
        (f"I have a {w}.", NOTED, ["What do I have?"], f"You have a {w}."),
        # Nothing in these can be held out.
        (f"I like {food}.", NOTED, ["What do I like?"], f"You like {food}."),
        (f"I am a {job}.", NOTED, ["What is my job?", "What do I do?"], f"You are a {job}."),
        (f"I am {age} years old.", NOTED, ["How old am I?", "What is my age?"], f"You are {age} years old."),
    ]
    return r.choice(pairs[:-3] if held else pairs)


def references(r, held):
    """Two questions; the second is about the first."""
    kind = r.randrange(9)
    if kind < 3:
        first, reply, questions, answer = told(r, held)
        return [(ask(r, first.replace("{", "{{")), reply), (ask(r, r.choice(questions)), answer)]
    if kind == 3:
        made = some_facts(r, held, r.randint(1, 3))
        question, answers = r.choice(made).asked(r, 0.6)
        return [(told_together(made), NOTED), (ask(r, question), answers[0])]
    if kind == 4:
        question, (first,) = until(lambda: arithmetic(r, held, 40), lambda made: 5 <= int(made[1][0]) < 80)
        plus = r.random() < 0.6
        # The first sum is held out already; the second only must not teach a held-out pair.
        b = until(lambda: r.randint(1, 20) if plus else r.randint(0, min(20, int(first))),
                  lambda b: held or not held_out(*(("+", *sorted((int(first), b))) if plus else ("-", int(first), b))))
        second = r.choice(["Add {} to that.", "Plus {}?", "And plus {}?", "+ {}"] if plus else ["Take {} from that.", "Minus {}?", "And minus {}?", "- {}"])
        return [(question, first), (ask(r, second, b), str(int(first) + (b if plus else -b)))]
    if kind == 5:
        question, (first,) = copying(r, held)
        return [(question, first), (ask(r, r.choice(["Again.", "Say it again.", "Repeat that.", "Once more.", "What did you say?"])), first)]
    if kind == 6:
        question, text, slots = story(r, held)
        if r.random() < 0.6:
            return [(question, text), (ask(r, r.choice(["Who was the story about?", "Who was it about?", "What was the name of the {}?"]), slots["animal"]),
                                       f"It was about {slots['name']}.")]
        if slots["friend"] not in text:
            return references(r, held)
        return [(question, text), (ask(r, r.choice(["What did {} find?", "What was lost?"]), slots["name"]), f"It was a {slots['colour']} {slots['thing']}.")]
    values = items(r, held, 2, 5)
    if kind == 7:
        first, reply = ask(r, r.choice(["Remember this list: {}", "Here is a list: {}", "Remember: {}", "My list is {}"]), ", ".join(values)), NOTED
        given = values
    else:
        given = list(reversed(values))
        first, reply = ask(r, r.choice(REVERSE_FRAMES), ", ".join(values)), ", ".join(given)
    second, answer = r.choice([
        (["What is the first item?", "What was the first item?", "What comes first?"], given[0]),
        (["What is the last item?", "What was the last item?", "What comes last?"], given[-1]),
        (["Sort it.", "Sort that.", "Now sort it.", "Sort them."], ", ".join(in_order(given))),
        (["Reverse it.", "Reverse that.", "Now reverse it."], ", ".join(reversed(given))),
        (["How many items are there?", "How many are there?", "How many items were in the list?"], str(len(given))),
        (["What was the list?", "Repeat the list.", "Say the list again."], ", ".join(given))])
    return [(first, reply), (ask(r, r.choice(second)), answer)]


# --------------------------------------------------------------------------- drills

def drills(r, held):
    """Only in training: the single steps of what is asked elsewhere. Which letters a word has and which of two comes
    first (sorting, copying), what stands before something, names for values (facts), each with a short answer."""
    if r.random() < 0.4:
        return pairs(r)
    kind = r.random()
    some = lambda: word(r, held) if r.random() < 0.6 else name(r, held).lower()
    if kind < 0.3:
        values = distinct(r.randint(2, 6), some)
        at = r.randrange(len(values))
        before = at > 0 and (at == len(values) - 1 or r.random() < 0.6)
        return ask(r, r.choice(["What is {0} {1} here: {2}", "{2}: what is {0} {1}?"]), "before" if before else "after", values[at], ", ".join(values)), [
            values[at - 1 if before else at + 1]]
    if kind < 0.6:
        pair = distinct(2, some) if r.random() < 0.75 else [str(n) for n in r.sample(range(100), 2)]
        if pair[0][0] == pair[1][0] and not pair[0].isdigit():
            return drills(r, held)
        return ask(r, r.choice(["Which comes first, {} or {}?", "{} or {}: which comes first?"]), *pair), [in_order(pair)[0]]
    if kind < 0.75:
        one = some()
        return ask(r, r.choice(["What does {} begin with?", "What does {} start with?"]), one), [one[0]]
    if kind < 0.95:
        one = some()
        return ask(r, r.choice(["Spell {}.", "Spell {}", "What are the letters of {}?"]), one), ["-".join(one)]
    one = some()
    return ask(r, r.choice(["Which word is {}?", "What does {} spell?"]), "-".join(one)), [one]


# --------------------------------------------------------------------------- conversations

SINGLE = {"arithmetic": arithmetic, "facts": facts, "copying": copying, "sorting": sorting, "reversing": reversing, "counting": counting,
          "stories": stories, "refusals": refusals, "about": about, "drills": drills}
# The training mix. Copying and facts teach to look things up in the prompt, which everything else builds on;
# when that is learned, the slow ones, arithmetic and sorting, get its room.
SHARES = {"arithmetic": 0.14, "facts": 0.22, "copying": 0.1, "sorting": 0.08, "reversing": 0.045, "counting": 0.04, "stories": 0.02,
          "references": 0.05, "name": 0.02, "refusals": 0.04, "about": 0.055, "drills": 0.2}
LATER_SHARES = {"arithmetic": 0.26, "facts": 0.22, "copying": 0.08, "sorting": 0.12, "reversing": 0.03, "counting": 0.06, "stories": 0.012,
                "references": 0.06, "name": 0.01, "refusals": 0.05, "about": 0.068, "drills": 0.03}
CATEGORIES = [category for category in SHARES if category != "drills"]


def example(r, category, held):
    """One conversation of one category: (messages that end with the assistant's answer, accepted answers)."""
    messages, system = [], r.choice(SYSTEM) if r.random() < 0.06 else None
    if category == "name":
        system, question, answers = named(r, held)
    elif category == "references":
        *before, (question, answer) = references(r, held)
        answers = [answer]
        for asked, given in before:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": given}]
    else:
        question, answers = SINGLE[category](r, held)
    if system:
        messages.insert(0, {"role": "system", "content": system})
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answers[0]}]
    return messages, answers


def conversation(r, turns, shares=SHARES):
    """Training: one example, or several in a row; sometimes the beginning is asked about later."""
    category = r.choices(list(shares), shares.values())[0]
    if turns == 1 and category == "facts" and r.random() < 0.4:
        return category, [{"role": role, "content": text} for both in more_facts(r) for role, text in zip(("user", "assistant"), both)]
    if turns == 1:
        return category, example(r, category, False)[0]
    messages, later = [], []
    if r.random() < 0.1:
        messages.append({"role": "system", "content": r.choice(SYSTEM)})
    if r.random() < 0.06:
        system, question, answers = named(r, False)
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}, {"role": "assistant", "content": answers[0]}]
    said = lambda asked, given: messages.extend([{"role": "user", "content": asked}, {"role": "assistant", "content": given}])
    if r.random() < 0.4:
        first, reply, questions, answer = told(r, False)
        said(ask(r, first), reply)
        later.append((ask(r, r.choice(questions)), answer))
    for _ in range(turns):
        if later and r.random() < 1.5 / turns:
            said(*later[0])
            continue
        category = r.choices(list(shares), shares.values())[0]
        if category == "references":
            for asked, given in references(r, False):
                said(asked, given)
        elif category == "facts" and r.random() < 0.5:
            for asked, given in more_facts(r):
                said(asked, given)
        elif category == "refusals":
            question, answers = refusals(r, False, personal=False)
            said(question, answers[0])
        elif category != "name" and not (category == "about" and messages and messages[0]["role"] == "system"):
            question, answers = SINGLE[category](r, False)
            said(question, answers[0])
    return ("several", messages) if messages and messages[-1]["role"] == "assistant" else conversation(r, turns, shares)


def lines(split, seed, count, category=None):
    """The lines that the command prints."""
    r = Draw(f"{split} {seed}")
    held = split == "heldout"
    if not held:
        r.known = KNOWN_IN_TRAINING
    for index in range(count):
        if held or category:
            chosen = category or CATEGORIES[index % len(CATEGORIES)]
            messages, answers = example(r, chosen, held)
        else:
            chosen, messages = conversation(r, r.choices((1, 2, 3, 6), (0.8, 0.1, 0.07, 0.03))[0])
            answers = [messages[-1]["content"]]
        yield {"category": chosen, "messages": messages[:-1], "answers": [] if held and chosen == "stories" else answers}


def check(seed, count):
    """That the splits have nothing in common that matters, and that lines are what they say."""
    asked = {}
    for split in ("train", "heldout"):
        asked[split] = set()
        for line in lines(split, seed, count):
            assert set(line) == {"category", "messages", "answers"} and line["messages"][-1]["role"] == "user", line
            assert all(m["content"] == m["content"].strip() and m["content"] for m in line["messages"]), line
            assert all(answer == answer.strip() and answer for answer in line["answers"]), line
            text = "\n".join(m["content"] for m in line["messages"])
            asked[split].add((text, line["answers"][0] if line["answers"] else ""))
            words = set(re.findall(r"\w+", text))
            other = split == "train"
            # A held-out name may also be an ordinary word ("Mark", "Max"), but never the other way round in lower case.
            leaked = [n for n in NAMES_OF[other] if n in words and n not in COMMON] + [n for n in NOUNS_OF[other] if n in words and n not in COMMON]
            assert not leaked, (split, leaked, text)
            for a, sign, b in re.findall(r"^\D*?(\d+) ?(\+|-|plus|minus) ?(\d+)\D*$", line["messages"][-1]["content"]) if line["category"] == "arithmetic" else ():
                key = ("+", *sorted((int(a), int(b)))) if sign in ("+", "plus") else ("-", int(a), int(b))
                assert held_out(*key) == (split == "heldout"), (split, text)
    both = {text for text, _ in asked["train"]} & {text for text, _ in asked["heldout"]}
    assert not both, sorted(both)[:5]
    for line in lines("train", seed, 200, "stories"):
        assert story_is_well_formed(line["messages"][-1]["content"], line["answers"][0]), line
    print(f"{count} lines of each split: no held-out part in training, and every line is well formed")


# Words of the sentences themselves, which both splits have.
COMMON = set(re.findall(r"\w+", " ".join(
    [a for answer, stems in ABOUT.items() for a in (answer, *stems)] + SORT_FRAMES + REVERSE_FRAMES + COUNT_FRAMES + COPY_FRAMES + SUM_FRAMES
    + OPENING + MIDDLE + TURN + END + PERSONAL + IMPERSONAL + OPENERS + SYSTEM + CALLED + ANIMALS + COLOURS + PLACES + FOODS + JOBS
    + [text for fact in FACTS for text in (fact[0], *fact[1], *fact[2])])))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("train", "heldout"), default="train", help="training mix, or held out with categories in turn")
    parser.add_argument("--seed", type=int, default=1, help="which conversations are drawn; the splits do not depend on it")
    parser.add_argument("--n", type=int, default=20, help="number of lines")
    parser.add_argument("--category", choices=CATEGORIES, help="only this one")
    parser.add_argument("--check", action="store_true", help="print nothing but whether the splits are disjoint and the lines well formed")
    args = parser.parse_args()
    if args.check:
        return check(args.seed, args.n)
    for line in lines(args.split, args.seed, args.n, args.category):
        sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
