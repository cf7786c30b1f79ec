# SPDX-License-Identifier: Apache-2.0
"""The access-code task: fact sentences hidden in text, and questions."""
from __future__ import annotations

import random

ADJECTIVES = ("Amber Crimson Silver Golden Violet Azure Ivory Scarlet Emerald Copper Cobalt Indigo Quiet Rapid "
              "Gentle Ancient").split()
NOUNS = "Falcon Harbor Meadow Lantern Castle River Comet Garden Tiger Bridge Forest Anchor Mountain Pilot Temple Mirror".split()


def random_name(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def random_code(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(5))


def distinct_names(rng: random.Random, n: int) -> list[str]:
    """``n`` distinct names; half of the time from few words, so that names
    share words and both words have to match."""
    adj, noun = list(ADJECTIVES), list(NOUNS)
    if rng.random() < 0.5:
        k = 2
        while k * k < n:
            k += 1
        adj, noun = rng.sample(adj, k), rng.sample(noun, k)
    every = [f"{a} {b}" for a in adj for b in noun]
    return rng.sample(every, n)


def sentence(name: str, code: str) -> str:
    return f"The access code of {name} is {code}.\n"


def question(name: str) -> str:
    return f"\nQuestion: What is the access code of {name}?\nAnswer: The access code of {name} is"


# Other wordings, a small share of the training questions.
VARIANTS = (
    "\nQuestion: What is the code of {name}?\nAnswer: The access code of {name} is",
    "\nQuestion: Which access code does {name} have?\nAnswer: The access code of {name} is",
    "\nThe access code of {name} is",
    "\nAnswer: The access code of {name} is",
)
