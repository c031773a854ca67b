"""What random numbers are for: each purpose has a stream of its own, and nothing draws from a global generator."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """Purposes, as a word of the key; never 0, with which ``SeedSequence`` pads its keys."""

    TRAIN = 1
    VALIDATION = 2
    TEST = 3
    MINIBATCH = 4
    ORDER = 5
    SPLIT = 6
    WARM_START = 7


def generator(*words: int) -> np.random.Generator:
    """A counter-based generator (Philox, Salmon et al. 2011) keyed by (run seed, purpose, position ...)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
