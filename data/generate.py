"""Generate the bundled data set: ``python data/generate.py [directory]``.

The files are the same, byte for byte, on every run. All people, places and events in them are invented and come from
the word lists of ``gold.py``. As in human data, targets are of mixed quality and one preference label in ten is
flipped, so that RLHF can improve on the demonstrations.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gold import DAYS, MONTHS, NAMES, PLACES, THINGS, score

SEED = 20261122
LABEL_NOISE = 0.1  # fraction of preference labels that are flipped
RATING_NOISE = 0.1  # standard deviation of the noise on scalar rewards, in units of the gold score
MIN_SCORE_GAP = 0.25  # smallest difference between the gold scores of a pair
ROWS = {
    "rl_train": 5000,
    "rl_val": 300,
    "rl_test": 300,
    "prefs_train": 4000,
    "prefs_val": 500,
    "rewards_train": 1500,
    "rewards_val": 200,
}


T = TypeVar("T")


@dataclass(frozen=True)
class Domain:
    """A topic of documents, with sentence templates for each kind of fact."""

    things: Sequence[str]
    times: Sequence[str]  # including the preposition
    units: str
    what: Sequence[str]
    when: Sequence[str]
    who: Sequence[str]
    count: Sequence[str]


ON_DAYS = [f"on {day}" for day in DAYS]
DURING_MONTHS = [f"during {month}" for month in MONTHS]
DOMAINS = (
    Domain(
        THINGS[0:8],
        DURING_MONTHS,
        "guests",
        what=(
            "Everybody can visit the {what} in {where} soon.",
            "At last the {what} in {where} will open.",
            "Work on the {what} in {where} is done.",
        ),
        when=("The doors open {when}.", "It should be ready {when}.", "The first day falls {when}."),
        who=("The plan was made by {who}.", "The ribbon is cut by {who}.", "The speech is given by {who}."),
        count=(
            "There is room for about {count} guests.",
            "The owners expect about {count} guests.",
            "Seats stand ready for about {count} guests.",
        ),
    ),
    Domain(
        THINGS[8:16],
        ON_DAYS,
        "visitors",
        what=(
            "Soon the {what} in {where} takes place.",
            "Many look forward to the {what} in {where}.",
            "Once more the {what} in {where} is at hand.",
        ),
        when=(
            "It starts {when} after lunch.",
            "The gates open {when}.",
            "Those who want to come should keep free {when}.",
        ),
        who=(
            "Everything was organised by {who}.",
            "The programme was chosen by {who}.",
            "Guests are welcomed by {who}.",
        ),
        count=(
            "Last time about {count} visitors came.",
            "The square holds about {count} visitors.",
            "Friends hope for about {count} visitors.",
        ),
    ),
    Domain(
        THINGS[16:24],
        ON_DAYS,
        "calls",
        what=(
            "Nobody was ready for the {what} in {where}.",
            "The damage after the {what} in {where} is being counted.",
            "Without warning came the {what} in {where}.",
        ),
        when=("It happened {when} before dawn.", "Helpers were busy {when} until late.", "It all began {when}."),
        who=("The alarm was raised by {who}.", "The report was written by {who}.", "Questions were answered by {who}."),
        count=(
            "The station took about {count} calls.",
            "In one night came about {count} calls.",
            "Helpers answered about {count} calls.",
        ),
    ),
    Domain(
        THINGS[24:32],
        DURING_MONTHS,
        "euros",
        what=(
            "Buyers wait for the {what} made in {where}.",
            "A fair shows the {what} made in {where}.",
            "Said to last is the {what} made in {where}.",
        ),
        when=("It goes on sale {when}.", "Orders are taken {when}.", "The shops will have it {when}."),
        who=("The design is by {who}.", "The first model was built by {who}.", "The idea was sold by {who}."),
        count=(
            "The price is about {count} euros.",
            "Buyers will pay about {count} euros.",
            "It costs about {count} euros.",
        ),
    ),
    Domain(
        THINGS[32:40],
        DURING_MONTHS,
        "workers",
        what=(
            "Repairs of the {what} in {where} will begin.",
            "The town needs the {what} in {where}.",
            "Rust has eaten the {what} in {where}.",
        ),
        when=("The site closes {when}.", "If all goes well it ends {when}.", "First machines arrive {when}."),
        who=("The works are led by {who}.", "The contract was signed by {who}.", "Everything is checked by {who}."),
        count=(
            "It keeps busy about {count} workers.",
            "The firm sends about {count} workers.",
            "On the site are needed about {count} workers.",
        ),
    ),
    Domain(
        THINGS[40:48],
        ON_DAYS,
        "runners",
        what=(
            "Over is the {what} in {where} at last.",
            "Rain could not stop the {what} in {where}.",
            "The whole town cheered at the {what} in {where}.",
        ),
        when=("It was held {when}.", "The streets were full {when}.", "The start was {when}."),
        who=("The first place was taken by {who}.", "The race was won by {who}.", "A record was broken by {who}."),
        count=(
            "In all took part about {count} runners.",
            "The list names about {count} runners.",
            "At the start stood about {count} runners.",
        ),
    ),
)
FILLERS = (
    "The mayor had no comment.",
    "Local papers have followed the story.",
    "Many people asked for details.",
    "The weather should stay mild.",
    "Nobody expected so much interest.",
    "A short film will be shown later.",
    "There was coffee for everyone.",
    "The radio reported on it twice.",
    "Some shops stay closed that day.",
    "Parking is free behind the church.",
    "Older residents remember the last one.",
    "Children liked it best of all.",
)

# Ways in which a response states a fact: the short one first, then wordy ones with the same content.
WORDINGS = {
    "what": ("the {what}", "this is about the {what}", "the text tells of the {what}"),
    "where": ("in {where}", "all this is in {where}", "to be exact in {where}"),
    "when": ("{when}", "the time given is {when}", "as far as we know {when}"),
    "who": ("by {who}", "and that by {who}", "it seems by {who}"),
    "count": (
        "about {count} {units}",
        "the number given is about {count} {units}",
        "with a total of about {count} {units}",
    ),
}
OPENINGS = ("in short, ", "the text says this: ", "to sum it up, ")
CLOSINGS = (" More will follow soon.", " That is all we know.", " The rest is not known yet.")


@dataclass(frozen=True)
class Writer:
    """An author of responses, defined by the probability of each kind of flaw."""

    omits: float  # per fact
    invents: float  # per fact: it is replaced by another one of the same kind
    wordy: float  # per fact, for the opening and for the closing


DEMONSTRATORS = (  # authors of the SFT targets: accurate, but often incomplete and wordy
    Writer(omits=0.10, invents=0.005, wordy=0.10),
    Writer(omits=0.35, invents=0.005, wordy=0.50),
    Writer(omits=0.55, invents=0.005, wordy=0.15),
    Writer(omits=0.30, invents=0.005, wordy=0.75),
)
CANDIDATES = (  # authors of the responses that are compared and rated
    *DEMONSTRATORS,
    Writer(omits=0.02, invents=0.00, wordy=0.02),
    Writer(omits=0.10, invents=0.03, wordy=0.20),
)


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """Choose one of the options. Only ``rng.random`` is guaranteed to be the same in every version of Python."""
    return options[int(rng.random() * len(options))]


def draw_facts(rng: random.Random, domain: Domain) -> dict[str, str]:
    """Draw the five facts of a document."""
    return {
        "who": pick(rng, NAMES),
        "what": pick(rng, domain.things),
        "where": pick(rng, PLACES),
        "when": pick(rng, domain.times),
        "count": str(10 + 10 * int(rng.random() * 30)),
    }


def shuffled(rng: random.Random, items: Sequence[str]) -> list[str]:
    """Return the items in random order."""
    return [item for _, item in sorted((rng.random(), item) for item in items)]


def write_document(rng: random.Random, domain: Domain, values: dict[str, str]) -> str:
    """Write a news item that contains the facts and up to two filler sentences, in random order."""
    statements = [pick(rng, ways).format(**values) for ways in (domain.who, domain.what, domain.when, domain.count)]
    fillers = shuffled(rng, FILLERS)[: int(rng.random() * 3)]
    return " ".join(shuffled(rng, statements + fillers))


def write_response(rng: random.Random, domain: Domain, values: dict[str, str], writer: Writer) -> str:
    """Write a summary of the facts, with the flaws of its author."""
    values = dict(values)
    for fact, other in draw_facts(rng, domain).items():
        if rng.random() < writer.invents:
            values[fact] = other
    kept = [fact for fact in WORDINGS if rng.random() >= writer.omits] or ["what"]
    phrases = [pick(rng, WORDINGS[fact][1:]) if rng.random() < writer.wordy else WORDINGS[fact][0] for fact in kept]
    opening = pick(rng, OPENINGS) if rng.random() < writer.wordy else ""
    closing = pick(rng, CLOSINGS) if rng.random() < writer.wordy else ""
    text = ", ".join(phrases).format(units=domain.units, **values)
    return f"{opening}{text}.{closing}"


def write_pair(rng: random.Random, document: str, domain: Domain, values: dict[str, str]) -> tuple[str, str]:
    """Write two responses by two authors, the better one first, whose scores differ by at least ``MIN_SCORE_GAP``."""
    while True:
        pair = [write_response(rng, domain, values, pick(rng, CANDIDATES)) for _ in range(2)]
        first, second = score([document, document], pair)
        if abs(first - second) >= MIN_SCORE_GAP:
            return (pair[0], pair[1]) if first > second else (pair[1], pair[0])


def rows(rng: random.Random, split: str, count: int, seen: set[str]) -> Iterator[dict[str, object]]:
    """Yield the rows of one file. ``seen`` contains all documents so far, so that no document occurs twice."""
    for _ in range(count):
        domain = pick(rng, DOMAINS)
        values = draw_facts(rng, domain)
        document = write_document(rng, domain, values)
        while document in seen:
            document = write_document(rng, domain, values := draw_facts(rng, domain))
        seen.add(document)
        if split.startswith("rl"):
            yield {"document": document, "target": write_response(rng, domain, values, pick(rng, DEMONSTRATORS))}
        elif split.startswith("prefs"):
            better, worse = write_pair(rng, document, domain, values)
            chosen, rejected = (worse, better) if rng.random() < LABEL_NOISE else (better, worse)
            yield {"document": document, "chosen": chosen, "rejected": rejected}
        else:
            response = write_response(rng, domain, values, pick(rng, CANDIDATES))
            noise = RATING_NOISE * (sum(rng.random() for _ in range(12)) - 6)  # nearly normal and portable
            yield {
                "document": document,
                "response": response,
                "reward": round(score([document], [response])[0] + noise, 2),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=Path(__file__).parent)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    seen: set[str] = set()
    for split, count in ROWS.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows(rng, split, count, seen))
        (directory / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
