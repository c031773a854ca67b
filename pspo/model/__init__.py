"""The policy: a causal language model, its tokenizer and the tokens at which it stops."""

from transformers.utils import logging

from pspo.model.config import ModelConfig
from pspo.model.policy import Policy, end_of_turn, load, save, save_adapters, stop_ids, tokenizer
from pspo.model.source import check, digests

__all__ = [
    "ModelConfig", "Policy", "check", "digests", "end_of_turn", "load", "save", "save_adapters", "stop_ids",
    "tokenizer",
]  # fmt: skip

# No bars for reading and writing weights, which take seconds; downloads keep theirs, on a terminal.
logging.set_tqdm_hook(lambda tqdm, args, kwargs: tqdm(*args, **kwargs | {"disable": True}))
