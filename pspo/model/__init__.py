"""The policy: a causal language model, its tokenizer and the tokens at which it stops."""

from transformers.utils import logging

from pspo.model.policy import Model, Policy, check, load, save, stop_ids, tokenizer

__all__ = ["Model", "Policy", "check", "load", "save", "stop_ids", "tokenizer"]

# No bars for reading and writing weights, which take seconds; downloads keep theirs, on a terminal.
logging.set_tqdm_hook(lambda tqdm, args, kwargs: tqdm(*args, **kwargs | {"disable": True}))
