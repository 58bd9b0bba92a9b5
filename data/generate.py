"""Write the shipped data set again, byte for byte: ``python data/generate.py [folder]``.

Everything in these files is generated from the word lists of ``gold.py``: nobody in them exists. Targets are of mixed
quality and one preference label in ten is flipped, as with human data, so that RLHF has something to gain.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gold import DAYS, FIRST, LAST, MONTHS, PLACES, THINGS, score

SEED = 20261122
LABEL_NOISE = 0.1  # share of preference labels that are flipped
RATING_NOISE = 0.1  # standard deviation of the noise on scalar rewards, gold points
SMALLEST_GAP = 0.12  # gold points; closer pairs are not shown to the annotator
ROWS = {
    "rl_train": 5000, "rl_val": 300, "rl_test": 300,
    "prefs_train": 4000, "prefs_val": 500,
    "rewards_train": 1500, "rewards_val": 200,
}  # fmt: skip


@dataclass(frozen=True)
class Domain:
    """A kind of document: how it tells each fact, and which things and times it is about."""

    things: Sequence[str]
    times: Sequence[str]
    units: str
    who: Sequence[str]
    what: Sequence[str]
    when: Sequence[str]
    count: Sequence[str]


DOMAINS = (
    Domain(
        THINGS[0:8], MONTHS, "guests",
        who=("{who} has worked on the plan for years.", "The idea came from {who}.", "{who} will cut the ribbon."),
        what=("A new {what} will open in {where}.", "{where} is going to get a {what}.", "People in {where} can soon visit the {what}."),
        when=("The doors open in {when}.", "It should be ready by {when}.", "The first day falls in {when}."),
        count=("Around {count} guests are invited.", "There is room for {count} guests.", "The owners count on {count} guests."),
    ),
    Domain(
        THINGS[8:16], DAYS, "visitors",
        who=("{who} is in charge of the programme.", "Everything was organised by {who}.", "The host of the day is {who}."),
        what=("The {what} takes place in {where}.", "{where} looks forward to its {what}.", "Once more there is a {what} in {where}."),
        when=("It starts on {when} after lunch.", "Those who want to come should keep {when} free.", "The gates open on {when}."),
        count=("Last time {count} visitors came.", "Up to {count} visitors are expected.", "The square holds {count} visitors."),
    ),
    Domain(
        THINGS[16:24], DAYS, "calls",
        who=("{who} was the first to raise the alarm.", "The report was written by {who}.", "{who} spoke to the press."),
        what=("A {what} has shaken {where}.", "In {where} the damage after the {what} is being counted.", "The {what} hit {where} without warning."),
        when=("It happened on {when} before dawn.", "The night to {when} was a long one.", "Work went on until {when}."),
        count=("The station took {count} calls.", "More than {count} calls came in.", "Helpers answered {count} calls."),
    ),
    Domain(
        THINGS[24:32], MONTHS, "euros",
        who=("The design is by {who}.", "{who} built the first model at home.", "Behind the product stands {who}."),
        what=("A {what} from {where} is on its way to the shops.", "The workshop in {where} shows a {what}.", "Made in {where}, the {what} is said to last."),
        when=("It goes on sale in {when}.", "Orders are taken from {when}.", "The shops will have it in {when}."),
        count=("The price is {count} euros.", "Buyers will pay {count} euros.", "It costs {count} euros."),
    ),
    Domain(
        THINGS[32:40], MONTHS, "workers",
        who=("{who} leads the works.", "The engineer in charge is {who}.", "{who} signed the contract."),
        what=("Repairs of the {what} near {where} are about to begin.", "{where} has waited long for its {what}.", "The {what} at {where} will be rebuilt."),
        when=("The site closes in {when}.", "If all goes well it ends in {when}.", "First machines arrive in {when}."),
        count=("It keeps {count} workers busy.", "The firm sends {count} workers.", "On the site {count} workers are needed."),
    ),
    Domain(
        THINGS[40:48], DAYS, "runners",
        who=("The winner was {who}.", "Nobody could keep up with {who}.", "{who} took the first place."),
        what=("The {what} of {where} is over.", "Rain could not stop the {what} in {where}.", "{where} cheered at the {what}."),
        when=("It was held on {when}.", "On {when} the streets were full.", "Since {when} the town talks of nothing else."),
        count=("In all {count} runners took part.", "The list names {count} runners.", "At the start stood {count} runners."),
    ),
)  # fmt: skip
FILLERS = (
    "The mayor had no comment.", "Local papers have followed the story.", "Many people asked for details.",
    "The weather should stay mild.", "Nobody expected so much interest.", "A short film will be shown later.",
    "There was coffee for everyone.", "The radio reported on it twice.", "Some shops stay closed that day.",
    "Parking is free behind the church.", "Older residents remember the last one.", "Children liked it best of all.",
)  # fmt: skip

# how an answer words a fact: short first, then ways that say no more in more words
WORDINGS = {
    "who": ("{who}", "it is about {who}", "the person named is {who}"),
    "what": ("{what}", "there is word of a {what}", "the subject is the {what}"),
    "where": ("{where}", "the place is {where}", "all this is in {where}"),
    "when": ("{when}", "the time given is {when}", "as for the time, {when}"),
    "count": ("{count} {units}", "the number is {count} {units}", "a total of {count} {units}"),
}
OPENINGS = ("In short, ", "The text says this: ", "To sum it up, ")
CLOSINGS = (" More will follow soon.", " That is all we know.", " The rest is not known yet.")


@dataclass(frozen=True)
class Writer:
    """An author of answers: with which probability each fault appears."""

    omits: float  # per fact
    invents: float  # per answer: one fact is replaced by another of its kind
    wordy: float  # per fact, for the opening and for the closing


WRITERS = (
    Writer(omits=0.02, invents=0.02, wordy=0.05),
    Writer(omits=0.15, invents=0.05, wordy=0.2),
    Writer(omits=0.30, invents=0.15, wordy=0.5),
    Writer(omits=0.40, invents=0.05, wordy=0.1),
)


def pick(rng: random.Random, options: Sequence):
    """One of the options. Only ``rng.random`` is promised to give the same numbers in every Python."""
    return options[int(rng.random() * len(options))]


def draw_facts(rng: random.Random, domain: Domain) -> dict[str, str]:
    return {
        "who": f"{pick(rng, FIRST)} {pick(rng, LAST)}",
        "what": pick(rng, domain.things),
        "where": pick(rng, PLACES),
        "when": pick(rng, domain.times),
        "count": str(20 + 10 * int(rng.random() * 40)),
    }


def shuffled(rng: random.Random, items: Sequence[str]) -> list[str]:
    return [item for _, item in sorted((rng.random(), item) for item in items)]


def write_document(rng: random.Random, domain: Domain, values: dict[str, str]) -> str:
    told = [pick(rng, ways).format(**values) for ways in (domain.who, domain.what, domain.when, domain.count)]
    fillers = shuffled(rng, FILLERS)[: 1 + int(rng.random() * 3)]
    return " ".join(shuffled(rng, told + fillers))


def write_answer(rng: random.Random, domain: Domain, values: dict[str, str], writer: Writer) -> str:
    values = dict(values)
    if rng.random() < writer.invents:
        wrong = pick(rng, list(values))
        values[wrong] = draw_facts(rng, domain)[wrong]
    kept = [fact for fact in WORDINGS if rng.random() >= writer.omits] or ["what"]
    parts = [pick(rng, WORDINGS[fact][1:]) if rng.random() < writer.wordy else WORDINGS[fact][0] for fact in kept]
    opening = pick(rng, OPENINGS) if rng.random() < writer.wordy else ""
    closing = pick(rng, CLOSINGS) if rng.random() < writer.wordy else ""
    text = ", ".join(parts).format(units=domain.units, **values)
    return f"{opening}{text}.{closing}"


def write_pair(rng: random.Random, document: str, domain: Domain, values: dict[str, str]) -> tuple[str, str]:
    """Two answers by two authors, the better one first, further apart than the smallest gap."""
    while True:
        pair = [write_answer(rng, domain, values, pick(rng, WRITERS)) for _ in range(2)]
        first, second = score([document, document], pair)
        if abs(first - second) >= SMALLEST_GAP:
            return (pair[0], pair[1]) if first > second else (pair[1], pair[0])


def rows(rng: random.Random, split: str, count: int, seen: set[str]) -> Iterator[dict[str, object]]:
    """The records of one file; ``seen`` keeps a document from standing in two of them."""
    for _ in range(count):
        domain = pick(rng, DOMAINS)
        values = draw_facts(rng, domain)
        document = write_document(rng, domain, values)
        while document in seen:
            document = write_document(rng, domain, values := draw_facts(rng, domain))
        seen.add(document)
        if split.startswith("rl"):
            yield {"document": document, "target": write_answer(rng, domain, values, pick(rng, WRITERS))}
        elif split.startswith("prefs"):
            better, worse = write_pair(rng, document, domain, values)
            chosen, rejected = (worse, better) if rng.random() < LABEL_NOISE else (better, worse)
            yield {"document": document, "chosen": chosen, "rejected": rejected}
        else:
            response = write_answer(rng, domain, values, pick(rng, WRITERS))
            noise = RATING_NOISE * (sum(rng.random() for _ in range(12)) - 6)  # near normal, and portable
            yield {"document": document, "response": response, "reward": round(score([document], [response])[0] + noise, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    rng, seen = random.Random(SEED), set()
    for split, count in ROWS.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows(rng, split, count, seen))
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
