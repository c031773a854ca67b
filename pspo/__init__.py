"""A laboratory for what should stand where PPO and GRPO clip the importance ratio."""

__version__ = "0.1.0"
