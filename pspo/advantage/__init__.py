"""How good a completion is beside the others of its group, or than a value model expected."""

from pspo.advantage.estimators import ADVANTAGES, GAE, Advantage, Group, LeaveOneOut, Mean, has_spread

__all__ = ["ADVANTAGES", "GAE", "Advantage", "Group", "LeaveOneOut", "Mean", "has_spread"]
