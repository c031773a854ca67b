"""Warm start of the embedded policy by supervised learning, cached by everything that influences it.

First solutions that show the working, then a mix in which most give the bare answer. The policy then mostly answers
directly and is mostly wrong, yet is mostly right when it works step by step: reinforcement learning has a latent way of
working to discover.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import torch
import transformers

from pspo import fused
from pspo.base.console import track
from pspo.base.files import new_directory
from pspo.base.schema import ConfigError, Schema, as_dict, key
from pspo.base.stream import Stream, generator
from pspo.dataset import Problem, embedded, render
from pspo.host import interrupt
from pspo.model import tiny
from pspo.model.batch import make_batch
from pspo.model.logprob import token_logprobs

if TYPE_CHECKING:
    from pspo.model.policy import Model

log = logging.getLogger("pspo")


@dataclass(frozen=True, kw_only=True)
class WarmStart(Schema, block="model.warm_start"):
    """Supervised learning before the run: fixed steps, so that every machine does the same work."""

    worked_steps: int = key("steps on solutions that show the working", within="[1, inf)")
    mixed_steps: int = key("steps on a mix of worked solutions and bare answers", within="[0, inf)")
    worked_share: float = key("share of worked solutions in the mix", within="[0, 1]")
    batch_size: int = key("problems of one step", within="[1, inf)")
    num_problems: int = key("different problems of the embedded task to learn from", within="[1, inf)")
    lr: float = key("highest learning rate (AdamW, linear warm-up and decay)", within="(0, inf)")


def cached(config: "Model", seed: int) -> Path:
    """The directory of the warm-started policy and its tokenizer; made on first use, shared by all arms at one seed."""
    assert config.warm_start is not None
    problems = embedded.load("train", config.warm_start.num_problems)
    directory = cache_directory() / "warm_start" / _digest(config, seed, problems)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{directory}.lock").acquire()
    except OSError as error:
        raise ConfigError(
            f"XDG_CACHE_HOME={cache_directory().parent}: cannot write {directory.parent} ({error.strerror}), where the "
            "warm policy is kept; set it to a directory that can be written"
        ) from error
    with lock:
        if not directory.is_dir():
            log.info("warm start of the embedded policy, kept in %s", directory)
            model, tokenizer = _train(config, seed, problems)
            with new_directory(directory) as beside:
                model.save_pretrained(beside)
                tokenizer.save_pretrained(beside)
    return directory


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/pspo``, by default ``~/.cache/pspo``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pspo"


def _digest(config: "Model", seed: int, problems: list[Problem]) -> str:
    """A name for everything that influences the weights: settings, data, code, versions and thread count."""
    names = ("tiny", "warm_start", "batch", "logprob")
    code = [*(Path(__file__).with_name(f"{name}.py") for name in names), Path(embedded.__file__)]
    content = {
        "model": as_dict(config),
        "seed": seed,
        "problems": hashlib.sha256(repr(problems).encode()).hexdigest(),
        "code": hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _train(config: "Model", seed: int, problems: list[Problem]) -> tuple[Any, Any]:
    """Next-token cross-entropy on the solutions' tokens, mean over the batch."""
    settings, architecture = config.warm_start, config.architecture
    assert settings is not None
    assert architecture is not None
    texts = [text for p in problems for text in (p.question, p.solution)]
    tokenizer = tiny.train_tokenizer(texts, architecture.vocab_size)
    model = tiny.make_model(architecture, tokenizer, seed, config.attention).to(getattr(torch, config.dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    num_steps = settings.worked_steps + settings.mixed_steps
    prompts = [render(tokenizer, "", p.question) for p in problems]
    worked, direct = (
        [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in texts]
        for texts in ([p.solution for p in problems], [embedded.direct_solution(p) for p in problems])
    )
    ours = fused.trains(model.get_decoder(), config.autocast)
    model.train()
    batches = _batches(settings, seed, len(problems))
    for step, batch in enumerate(track(batches, "warm start", num_steps * settings.batch_size, "solutions")):
        interrupt.check()
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min((step + 1) / 20, 1.0) * (1 - step / num_steps)
        targets = [worked[i] if shows_working else direct[i] for i, shows_working in batch]
        asked = [prompts[i] for i, _ in batch]
        tensors = make_batch(asked, targets, tokenizer.pad_token_id, torch.device("cpu"), end_to_end=ours)
        logprob_BT = token_logprobs(model, tensors, temperature=1.0, autocast=config.autocast).logprob_BT
        loss = -logprob_BT.sum() / tensors.mask_BT.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    log.info("warm start: %d steps of %d solutions, loss %.3f", num_steps, settings.batch_size, loss.item())
    return model.eval(), tokenizer


def _batches(settings: WarmStart, seed: int, num_problems: int) -> Iterator[list[tuple[int, bool]]]:
    """Indices of problems, each with whether its working is shown: always at first, then in a share of the mix."""
    random = generator(seed, Stream.WARM_START)
    for step in range(settings.worked_steps + settings.mixed_steps):
        share = 1.0 if step < settings.worked_steps else settings.worked_share
        chosen = random.integers(num_problems, size=settings.batch_size)
        yield list(zip(chosen.tolist(), (random.random(settings.batch_size) < share).tolist(), strict=True))
