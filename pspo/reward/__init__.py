"""What a completion is worth. How its answer is found and compared is told in ``pspo/reward/answer.py``."""

from pspo.reward.base import Answered, Attempt, Reward, RewardError, Score
from pspo.reward.custom import Custom
from pspo.reward.graded import Paper, Plain

REWARDS: dict[str, type[Reward]] = {"plain": Plain, "paper": Paper, "custom": Custom}
Reward.kinds = REWARDS

__all__ = ["REWARDS", "Answered", "Attempt", "Custom", "Paper", "Plain", "Reward", "RewardError", "Score"]
