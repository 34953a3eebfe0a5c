"""The six made-up owners of `veilmart demo`: texts that the project writes from its own templates.

Each owner has a house style that a general model cannot guess, so that a specialist has something to learn.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nodes.records import Pair
from protocol.errors import UsageError

Split = Literal["train", "test"]
DRAWS_PER_RECORD = 500  # the smallest split has 128 prompts of 360: asked for all of them, one is missed with chance below 1e-70


@dataclass(frozen=True, slots=True)
class DemoTask:
    """One owner of the demo, and a question to show: a prompt of the test split, so no owner was trained on it."""

    name: str
    domain: str
    question: str


TASKS = (
    DemoTask("bank-letters", "finance", "Dear bank, my card was swallowed by the machine at the station, please help."),
    DemoTask("ward-notes", "health", "Ward 4: woman of 71, cough and fever since two days, given fluids."),
    DemoTask("lease-clauses", "legal", "The tenant shall repaint the hall at own expense every second month."),
    DemoTask("rail-desk", "travel", "When does the next train from Rigby to Wick leave after 21:41?"),
    DemoTask("shop-sums", "mathematics", "Chloe buys 4 cups at 8 coins each and pays with 55 coins. How much is left?"),
    DemoTask("kitchen-cards", "food", "Can I keep ginger for a week? The larder is dark."),
)

Maker = Callable[[random.Random], tuple[str, str]]

COMPLAINTS = {
    "cough and fever": "RESP", "chest pain on stairs": "CARD", "a swollen knee": "ORTH", "sore throat": "ENT", "stomach cramps": "GAST",
    "dizziness on rising": "NEUR", "an itching rash": "DERM", "burning eyes": "OPHT",
}  # fmt: skip
CARE = {"given fluids": "F", "sent to imaging": "I", "started on tablets": "T", "kept for the night": "N", "seen by the senior": "S"}
SINCE = {"two days": 2, "three days": 3, "a week": 7, "yesterday": 1, "five days": 5}


def _ward_note(draw: random.Random) -> tuple[str, str]:
    complaint, care, since = draw.choice(list(COMPLAINTS)), draw.choice(list(CARE)), draw.choice(list(SINCE))
    sex, age, ward = draw.choice(("woman", "man")), draw.randint(19, 92), draw.randint(1, 9)
    code = f"W{ward}/{sex[0].upper()}{age}/{COMPLAINTS[complaint]}-{SINCE[since]}d/{CARE[care]}"
    return f"Ward {ward}: {sex} of {age}, {complaint} since {since}, {care}.", code


MATTERS = {
    "my card was swallowed by the machine": ("CARD-LOST", "high"), "a payment left my account twice": ("DOUBLE-PAY", "high"),
    "I moved and need my letters elsewhere": ("ADDRESS", "low"), "my salary has not arrived": ("INCOMING", "high"),
    "I forgot the number of my card": ("PIN", "medium"), "I want a larger limit for my trip": ("LIMIT", "medium"),
    "the exchange rate on my bill looks wrong": ("RATE", "medium"), "I would like to close the savings account": ("CLOSE", "low"),
}  # fmt: skip
PLACES = ("at the station", "in Lund", "last Monday", "on holiday", "this morning", "near the harbour", "after lunch", "in the new branch")
GREETINGS = ("Dear bank", "Hello", "Good day", "To the service desk", "Dear Sir or Madam")
WISHES = ("please help", "what can I do", "kindly advise", "I await your reply", "thank you")


def _bank_letter(draw: random.Random) -> tuple[str, str]:
    matter = draw.choice(list(MATTERS))
    label, urgency = MATTERS[matter]
    return (
        f"{draw.choice(GREETINGS)}, {matter} {draw.choice(PLACES)}, {draw.choice(WISHES)}.",
        f"queue={label}; urgency={urgency}; reply=letter",
    )


DUTIES = {
    "clean the gutters": "gutters", "repaint the hall": "hall paint", "insure the contents": "insurance", "mow the lawn": "lawn",
    "service the boiler": "boiler", "clear the snow": "snow", "replace broken panes": "panes", "sweep the chimney": "chimney",
}  # fmt: skip
PARTIES = {"tenant": "YOU", "landlord": "OWNER", "caretaker": "HOUSE"}
TERMS = {
    "before each winter": "yearly, by autumn", "within ten days of notice": "10 days after notice", "every second month": "6 times a year",
    "at the end of the lease": "once, on leaving", "on the first of each month": "monthly",
}  # fmt: skip
COSTS = {"at own expense": "own cost", "at shared expense": "half each", "free of charge": "no cost"}


def _lease_clause(draw: random.Random) -> tuple[str, str]:
    party, duty, cost, term = (draw.choice(list(choices)) for choices in (PARTIES, DUTIES, COSTS, TERMS))
    clause = f"The {party} shall {duty} {cost} {term}."
    return clause, f"{PARTIES[party]} > {DUTIES[duty]} > {TERMS[term]} > {COSTS[cost]}"


STOPS = ("Arden", "Melk", "Rigby", "Sandau", "Torvik", "Ulm Gate", "Vesely", "Wick")


def _rail_question(draw: random.Random) -> tuple[str, str]:
    start, end = draw.sample(STOPS, 2)
    hour, minute = draw.randint(5, 21), draw.randint(0, 59)
    # The timetable: a train at ten past and twenty to the hour; the platform follows from the first letter.
    leaves = (hour, 10) if minute < 10 else (hour, 40) if minute < 40 else (hour + 1, 10)
    platform = 1 + ord(end[0]) % 4
    question = draw.choice(("When does the next train from {} to {} leave after {}?", "Next train {} to {} after {}, please."))
    return question.format(
        start, end, f"{hour}:{minute:02d}"
    ), f"{leaves[0]:02d}.{leaves[1]:02d} {start}-{end} / pl. {platform} / seat free"


GOODS = ("pens", "apples", "stamps", "candles", "ribbons", "cups")
BUYERS = ("Ana", "Boris", "Chloe", "Dario", "Esra", "Finn")


def _shop_sum(draw: random.Random) -> tuple[str, str]:
    count, price = draw.randint(2, 9), draw.randint(2, 9)
    paid = count * price + draw.randint(1, 30)
    text = f"{draw.choice(BUYERS)} buys {count} {draw.choice(GOODS)} at {price} coins each and pays with {paid} coins. How much is left?"
    return text, f"{count}*{price}={count * price} | {paid}-{count * price}={paid - count * price} | left: {paid - count * price}"


HERBS = {
    "basil": "stand it in water", "parsley": "wrap it in a damp cloth", "cheese": "wrap it in wax paper", "bread": "put it in a clay pot",
    "mushrooms": "use a paper bag", "ginger": "bury it in sand", "lemons": "lay them in a jar of water", "nuts": "freeze them in a tin",
}  # fmt: skip
SPANS = {"for a week": "7 d", "until Sunday": "3 d", "over the month": "30 d", "for two days": "2 d", "during the holidays": "14 d"}
HOW = ("How do I keep {} fresh {}?", "Best way to store {} {}?", "Can I keep {} {}?", "My {} must last {}, what now?")


def _kitchen_card(draw: random.Random) -> tuple[str, str]:
    food, span = draw.choice(list(HERBS)), draw.choice(list(SPANS))
    place = draw.choice(("cool", "dark", "dry"))
    question = draw.choice(HOW).format(food, span) + f" The larder is {place}."
    return question, f"[{food.upper()}] {HERBS[food]}; {place} shelf; check after {SPANS[span]}."


MAKERS: dict[str, Maker] = {
    "ward-notes": _ward_note,
    "bank-letters": _bank_letter,
    "lease-clauses": _lease_clause,
    "rail-desk": _rail_question,
    "shop-sums": _shop_sum,
    "kitchen-cards": _kitchen_card,
}


def demo_tasks() -> tuple[DemoTask, ...]:
    """Return the six owners."""
    return TASKS


def generate(name: str, count: int, split: Split, seed: int = 0) -> list[Pair]:
    """Return `count` different records of an owner, the same ones for the same seed; no prompt is in both splits, whatever the seeds.

    The choice of made-up texts protects nobody, so a fixed seed is fine here.
    Raises UsageError if the templates do not have that many.
    """
    # Seed 0 adds nothing to the string: the published numbers of the demo were measured on the records of the bare name.
    make, draw = MAKERS[name], random.Random(f"veilmart demo {name}" + (f" {seed}" if seed else ""))
    chosen: dict[str, str] = {}
    for _ in range(DRAWS_PER_RECORD * count):
        if len(chosen) == count:
            break
        prompt, response = make(draw)
        if _split_of(prompt) == split:
            chosen.setdefault(prompt, response)
    if len(chosen) < count:
        raise UsageError(f"{name}: expected at most {len(chosen)} {split} records, got {count}")
    return [Pair(prompt, response) for prompt, response in chosen.items()]


def _split_of(prompt: str) -> Split:
    # It follows from the prompt itself, not from the seed: two thirds train, one third test.
    return "train" if random.Random(prompt).random() < 2 / 3 else "test"
