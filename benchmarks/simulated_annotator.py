"""Labels pairs through the HTTP interface of ``stage=label``, as an annotator who is sometimes wrong.

    python train.py stage=label command.port=8088
    python benchmarks/simulated_annotator.py --url http://127.0.0.1:8088 --scorer data/gold.py:score --noise 0.1

The response with the higher score is chosen; with the probability ``--noise``, the other one. The program waits until
the server has started. It ends when no pair is left and the server does not start again for ``--patience`` seconds, so
that it can label all rounds of a pipeline.
"""

import argparse
import json
import random
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from rlhf.reward_functions import load_scorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8088", help="address of the page")
    parser.add_argument("--scorer", default="data/gold.py:score", help="<file.py>:<function>")
    parser.add_argument("--noise", type=float, default=0.1, help="probability of choosing the other response")
    parser.add_argument("--annotator", default="simulated", help="name of the annotator")
    parser.add_argument("--seed", type=int, default=1, help="seed of the noise")
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait for the server")
    options = parser.parse_args()
    scorer = load_scorer(options.scorer, key="--scorer")
    generator = random.Random(options.seed)
    choices, waited = 0, time.monotonic()
    query = urllib.parse.urlencode({"annotator": options.annotator})
    view: dict[str, Any] | None = None
    while True:
        try:
            view = view or request(f"{options.url}/api/pair?{query}")
            if view["pair"] is not None:
                choice = choose(view["pair"], scorer, generator, options.noise)
                body = {"annotator": options.annotator, "pair": view["pair"]["id"], "choice": choice}
                view = request(f"{options.url}/api/choice", body)
                choices, waited = choices + 1, time.monotonic()
                continue
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass  # The server is not there yet, or has ended with its last pair.
        view = None
        if time.monotonic() - waited > options.patience:
            break
        time.sleep(0.2)
    sys.stdout.write(f"{choices} choices\n")


def choose(pair: dict[str, str], scorer: Any, generator: random.Random, noise: float) -> str:
    """Return the choice for a pair: ``left``, ``right`` or ``tie``."""
    left, right = scorer([pair["prompt"]] * 2, [pair["left"], pair["right"]], [None, None])
    if left == right:
        return "tie"
    return "left" if (left > right) != (generator.random() < noise) else "right"


def request(url: str, body: dict[str, str] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(
        urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=30
    ) as response:
        content: dict[str, Any] = json.load(response)
    return content


if __name__ == "__main__":
    main()
