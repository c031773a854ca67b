"""Token reversal with a terminal reward (Kaddour 2026, arXiv 2604.06159, section 3.6): answer bits in reverse order."""

import itertools

from pspo.dataset.problem import Problem


def load(num_bits: int) -> list[Problem]:
    """All 2^``num_bits`` problems, counting up."""
    texts = ("".join(bits) for bits in itertools.product("01", repeat=num_bits))
    return [Problem(f"reversal/{text}", text, text[::-1], text[::-1]) for text in texts]
