"""A user's own objective, for tests."""

from dataclasses import dataclass

from pspo.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Own(Objective):
    """The importance-sampled policy gradient."""

    def __call__(self, x):
        return -x.ratio_BT * x.advantage_BT
