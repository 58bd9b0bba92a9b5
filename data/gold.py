"""The gold score of the bundled data, which the reward model learns to predict from noisy labels.

    score = facts covered / facts in the document - 0.25 * facts invented - 0.02 * words

A fact is a name, place, thing, day, month or number. Training does not use this score. ``stage=evaluate`` calls
``data/gold.py:score``; any function with the same arguments can replace it.
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
    """Return the facts of a text: every number, and every word that is in one of the lists above."""
    return {word for word in re.findall(r"[A-Za-z]+|\d+", text) if word.isdigit() or word in _FACT_WORDS}


def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Gold score of each response; the best possible score is 1 minus 0.02 per word.

    Args:
        prompts: The documents as they are in the data, without a chat template.
        responses: One response per document, without special tokens.
    """
    return [_score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def _score(document: str, response: str) -> float:
    expected, found = facts(document), facts(response)
    covered = len(expected & found) / max(len(expected), 1)
    return covered - 0.25 * len(found - expected) - 0.02 * len(response.split())
