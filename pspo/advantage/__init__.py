"""Advantages: completions compared with the others of their group, or with what a value model expected."""

from pspo.advantage.estimators import ADVANTAGES, GAE, Advantage, Group, LeaveOneOut, Mean, has_spread

__all__ = ["ADVANTAGES", "GAE", "Advantage", "Group", "LeaveOneOut", "Mean", "has_spread"]
