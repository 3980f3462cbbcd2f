"""The recall task: keys and their values stand early in a document, and at its end the keys are asked for.

After multi-query associative recall (Arora et al. 2023, arXiv:2312.04927). In `..A3....Q7…?Q7?A3` the key "A" has the
value "3", dots are filler, and after each "?" and a key its value is the answer. A model must find the one earlier
place of the key and copy what follows it. Only the answers are targets (`data.answers`).
"""

from __future__ import annotations

import random
import string

MARKER, FILLER = "?", "."
KEYS, VALUES = string.ascii_letters, string.digits
"""No character of a document is of two kinds, and a document asks for none twice."""
SHORTEST = 8  # tokens of a document


def write_recall(rng: random.Random, length: int, pairs: int, number: int, progress: float) -> list[str]:
    """Documents that have `length` tokens together, counting the separators that the tokenizer adds: one, or as many of
    an equal part of it, 1/2, 1/4, … down to `SHORTEST` tokens. The sizes take turns with `number`.

    Which there are grows with `progress`: the shortest up to 1/4, one more at a time, and all from 3/4 on. How to find
    a key is learnt where there are two, and then how to find it among more and farther away.
    """
    sizes = [length]
    while sizes[-1] % 2 == 0 and sizes[-1] >= 2 * SHORTEST:
        sizes.append(sizes[-1] // 2)
    sizes = sizes[::-1][: 1 + max(0, int((2 * progress - 0.5) * len(sizes)))]
    size = sizes[number % len(sizes)]
    return [write_document(rng, size, pairs) for _ in range(length // size)]


def write_document(rng: random.Random, length: int, pairs: int) -> str:
    """`length` − 1 characters, with so many pairs, but no more than a quarter of `length`; half of the keys are asked
    for, so that no answer is known by those before it.

    The distances from a key to its question spread evenly over log(distance), from the length of the questions to that
    of the document, so that each power of 2 between has about as many answers.
    """
    pairs = min(pairs, length // 4)
    asked = rng.sample(range(pairs), max(1, pairs // 2))
    questions = 3 * len(asked)
    body = list(FILLER * (length - 1 - questions))
    slots = len(body) // 2  # of two characters, counted from the end of the body
    ratio = (questions + len(body)) / questions
    chosen = [int((questions * ratio ** ((i + rng.random()) / pairs) - questions) / 2) for i in range(pairs)]
    for i in range(1, pairs):  # no two in one slot,
        chosen[i] = max(chosen[i], chosen[i - 1] + 1)
    told = [key + rng.choice(VALUES) for key in rng.sample(KEYS, pairs)]
    for i, pair in enumerate(told):
        begin = len(body) - 2 * (min(chosen[i], slots - pairs + i) + 1)  # and all within the body
        body[begin : begin + 2] = pair
    return "".join([*body, *(MARKER + told[i] for i in asked)])


def write_probe(rng: random.Random, length: int, depths: int) -> tuple[str, list[int]]:
    """A document of `length` − 1 characters with a pair in each of so many equal parts of what is before the questions,
    and the part of each key that is asked for, in the order of the questions: half of them.

    Raises:
        ValueError: the parts have no room for a pair.
    """
    asked = rng.sample(range(depths), max(1, depths // 2))
    body = list(FILLER * (length - 1 - 3 * len(asked)))
    ends = [part * len(body) // depths for part in range(depths + 1)]
    if len(body) < 2 * depths:
        raise ValueError(f"{length} tokens are too few to tell {depths} keys and ask for half; use more")
    told = [key + rng.choice(VALUES) for key in rng.sample(KEYS, depths)]
    for part, pair in enumerate(told):
        begin = rng.randrange(ends[part], ends[part + 1] - 1)
        body[begin : begin + 2] = pair
    return "".join([*body, *(MARKER + told[part] for part in asked)]), asked
