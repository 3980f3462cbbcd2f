"""The recall task: keys and their values stand early in a document, and at its end the keys are asked for.

After multi-query associative recall (Arora et al. 2023, arXiv:2312.04927). In `..Ak....Be…?Be?Ak` the key "A" has the
value "k", dots are filler, and after each "?" and a key its value is the answer. A model must find the one earlier
place of the key and copy what follows it. Only the answers are targets (`data.answers`).
"""

from __future__ import annotations

import random
import string

MARKER, FILLER = "?", "."
VALUES = string.ascii_lowercase
KEYS = "".join(sorted({*string.ascii_uppercase, *string.digits, *string.punctuation} - {MARKER, FILLER}))
"""No character of a document is of two kinds, and a document asks for none twice."""
SHORTEST = 16  # tokens of a document


def write_recall(rng: random.Random, length: int, pairs: int, number: int) -> list[str]:
    """Documents that have `length` tokens together, counting the separators that the tokenizer adds: one, or as many of
    an equal part of it. The parts 1, 1/2, 1/4, … down to `SHORTEST` tokens take turns with `number`.

    Only the short ones are learnt from in the beginning: where few keys are told, whoever copies any of the values is
    right more often.
    """
    sizes = [length]
    while sizes[-1] % 2 == 0 and sizes[-1] >= 2 * SHORTEST:
        sizes.append(sizes[-1] // 2)
    size = sizes[number % len(sizes)]
    return [write_document(rng, size, pairs) for _ in range(length // size)]


def write_document(rng: random.Random, length: int, pairs: int) -> str:
    """`length` − 1 characters, with so many pairs, but no more than an eighth of `length`.

    The distances from a key to its question spread evenly over log(distance), from the length of the questions to that
    of the document, so that each power of 2 between has about as many answers.
    """
    pairs = min(pairs, length // 8)
    questions = 3 * pairs
    body = list(FILLER * (length - 1 - questions))
    slots = len(body) // 2  # of two characters, counted from the end of the body
    ratio = (questions + len(body)) / questions
    chosen = [int((questions * ratio ** ((i + rng.random()) / pairs) - questions) / 2) for i in range(pairs)]
    for i in range(1, pairs):  # no two in one slot,
        chosen[i] = max(chosen[i], chosen[i - 1] + 1)
    asked = []
    for i, key in enumerate(rng.sample(KEYS, pairs)):
        slot = min(chosen[i], slots - pairs + i)  # and all within the body
        value = rng.choice(VALUES)
        body[len(body) - 2 * (slot + 1)] = key
        body[len(body) - 2 * slot - 1] = value
        asked.append(MARKER + key + value)
    rng.shuffle(asked)
    return "".join(body + asked)
