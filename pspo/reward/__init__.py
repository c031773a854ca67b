"""What a completion is worth. How its answer is found and compared is told in ``pspo/reward/answer.py``."""

from pspo.reward.base import Answered, Attempt, Reward, RewardError, Score
from pspo.reward.custom import Custom
from pspo.reward.graded import Paper, Plain
from pspo.reward.verify import Math

REWARDS: dict[str, type[Reward]] = {"plain": Plain, "paper": Paper, "math": Math, "custom": Custom}
Reward.kinds = REWARDS

__all__ = ["REWARDS", "Answered", "Attempt", "Custom", "Math", "Paper", "Plain", "Reward", "RewardError", "Score"]
