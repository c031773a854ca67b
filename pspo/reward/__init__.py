"""What a completion is worth; ``pspo/reward/answer.py`` says how its answer is extracted and compared."""

from pspo.base.files import CONF, read_yaml
from pspo.base.schema import build
from pspo.reward.base import Answered, Attempt, Exact, Paper, Plain, Reward, RewardError, Score
from pspo.reward.custom import Custom
from pspo.reward.verify import Math

Reward.kinds = {"plain": Plain, "paper": Paper, "math": Math, "exact": Exact, "custom": Custom}


def default_reward(name: str) -> Reward:
    """A reward with the values of its option under ``conf/reward``."""
    return build(Reward, read_yaml(CONF / "reward" / f"{name}.yaml"))  # type: ignore[type-abstract]


__all__ = ["Answered", "Attempt", "Paper", "Plain", "Reward", "RewardError", "Score", "default_reward"]
