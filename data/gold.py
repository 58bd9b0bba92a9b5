"""The gold scorer of the shipped data: what the reward model tries to guess from noisy labels.

    score = facts covered / facts in the document - 0.25 x facts invented - 0.02 x words

A fact is a name, place, thing, day, month or number. Training never sees this file; ``stage=evaluate`` calls
``data/gold.py:score``, and any function of yours with the same two arguments can take its place.
"""

import re
from collections.abc import Sequence

NAMES = """Ada Alma Anton Bela Boris Carla Cora Dana Dario Edda Elio Emil Erika Fabio Felix Flora Gerd Greta Hanna
Hugo Ida Igor Ines Ivan Jana Jonas Karla Kira Lars Lena Leo Lina Marco Mara Milo Mona Nadia Nils Nora Olaf""".split()
PLACES = """Aldford Ashby Barton Belmont Birkdale Blackwell Bramley Brookfield Burnham Caldwell Camden Carlton Clayton
Clifton Colby Corby Crawford Dalton Danbury Darley Denby Dunmore Easton Elmhurst Fairview Farley Felton Fenwick
Garston Glenwood Granby Halton Hampden Harwick Hatfield Hayden Hilton Holbrook Hurley Kelby""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
THINGS = """bakery library museum cinema gallery school theatre clinic concert parade lecture festival workshop
contest reunion auction flood fire storm blackout burglary landslide avalanche crash lamp kettle bicycle camera
toaster piano telescope printer bridge tunnel harbour stadium railway airport fountain lighthouse marathon regatta
tournament relay triathlon rally derby sprint""".split()

_FACT_WORDS = frozenset(NAMES + PLACES + DAYS + MONTHS + THINGS)


def facts(text: str) -> set[str]:
    """The fact words of a text: every number, and every word that stands in one of the lists above."""
    return {word for word in re.findall(r"[A-Za-z]+|\d+", text) if word.isdigit() or word in _FACT_WORDS}


def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Gold score of each answer to its document; 1 less 0.02 a word is the best there is.

    Args:
        prompts: the documents, as they stand in the data (no prompt template around them).
        answers: one answer a document, without special tokens.
    """
    return [_score_one(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def _score_one(document: str, answer: str) -> float:
    wanted, given = facts(document), facts(answer)
    covered = len(wanted & given) / max(len(wanted), 1)
    return covered - 0.25 * len(given - wanted) - 0.02 * len(answer.split())
