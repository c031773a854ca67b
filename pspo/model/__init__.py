"""The policy: a causal language model, its tokenizer and the tokens at which it stops."""

from pspo.model.policy import Model, Policy, check, load, save, stop_ids

__all__ = ["Model", "Policy", "check", "load", "save", "stop_ids"]
