"""Supervised learning, one loop for every model, and the warm start of the embedded policy, which is made by it.

The warm start learns first from solutions that show the working, then from a mix in which most give the bare answer.
The policy then mostly answers directly and is mostly wrong, yet is mostly right when it works step by step:
reinforcement learning has a latent way of working to discover.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from pspo.base.console import track
from pspo.base.schema import as_dict
from pspo.base.stream import Stream, generator
from pspo.dataset import Problem, embedded, problem, render
from pspo.host import interrupt
from pspo.model import tiny
from pspo.model.batch import Batch, make_batch
from pspo.model.config import ModelConfig, WarmStart
from pspo.model.folder import made_once
from pspo.model.logprob import predicting_states, token_logprobs

log = logging.getLogger("pspo")
CODE = ("tiny", "warm_start", "batch", "logprob")  # modules of this folder that influence the weights
Steps = Iterable[tuple[Sequence[Batch], float]]  # the micro-batches and the learning rate of each optimizer step


def train(
    model: Any, optimizer: torch.optim.Optimizer, steps: Steps, autocast: bool, max_norm: float
) -> Iterator[float]:
    """Next-token cross-entropy on completions; yields the loss of each optimizer step, in nats per token.

    The loss is −Σ log π(token) / tokens over the completion tokens of all micro-batches of the step, so it does not
    depend on how they are cut. Stops at a signal, between steps. Raises FloatingPointError before an optimizer step
    whose loss or gradient is not finite.
    """
    for batches, lr in steps:
        interrupt.check()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        num_tokens, total = sum(int(batch.mask_BT.sum()) for batch in batches), 0.0
        for batch in batches:
            loss = -_logprobs(model, batch, autocast).sum() / num_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        if not (math.isfinite(total) and norm.isfinite()):
            raise FloatingPointError(f"loss {total}, gradient norm {norm.item()}: the optimizer step was not taken")
        optimizer.step()
        yield total


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[Batch], autocast: bool) -> float:
    """The loss of ``train`` on all batches, without a step."""
    total = sum(_logprobs(model, batch, autocast).double().sum().item() for batch in batches)
    return -total / sum(int(batch.mask_BT.sum()) for batch in batches)


def _logprobs(model: Any, batch: Batch, autocast: bool) -> Tensor:
    hidden_NH = predicting_states(model.get_decoder(), batch, autocast)
    return token_logprobs(model, batch, hidden_NH, temperature=1.0, autocast=autocast)[0]


def cached(config: ModelConfig, seed: int) -> Path:
    """The folder of the warm-started policy and its tokenizer; made on first use, shared by all arms at one seed."""
    assert config.warm_start is not None
    problems = embedded.load("train", config.warm_start.num_problems)

    def make(directory: Path) -> None:
        for part in _train(config, seed, problems):
            part.save_pretrained(directory)

    return made_once("warm_start", _digest(config, seed, problems), make)


def tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of the embedded policy, which needs no warm start and is the same for every seed."""
    assert config.warm_start is not None
    assert config.architecture is not None
    problems = embedded.load("train", config.warm_start.num_problems)
    return tiny.train_tokenizer([t for p in problems for t in (p.question, p.solution)], config.architecture.vocab_size)


def _digest(config: ModelConfig, seed: int, problems: list[Problem]) -> str:
    """A name for everything that influences the weights: settings, data, code, versions and thread count."""
    code = [*(Path(__file__).with_name(f"{name}.py") for name in CODE), Path(embedded.__file__)]
    settings = as_dict(config)
    content = {
        "model": [settings[name] for name in ("architecture", "warm_start", "dtype", "autocast", "attention")],
        "seed": seed,
        "problems": hashlib.sha256(repr(problems).encode()).hexdigest(),
        "code": hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _train(config: ModelConfig, seed: int, problems: list[Problem]) -> tuple[Any, Any]:
    """The policy, trained on solutions, and its tokenizer."""
    settings, architecture = config.warm_start, config.architecture
    assert settings is not None
    assert architecture is not None
    encoder = tokenizer(config)
    model = tiny.make_model(architecture, encoder, seed, config.attention).to(getattr(torch, config.dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    num_steps = settings.worked_steps + settings.mixed_steps
    prompts = render(encoder, "", [p.question for p in problems])
    worked, direct = (
        [[*encoder.encode(text, add_special_tokens=False), encoder.eos_token_id] for text in texts]
        for texts in ([p.solution for p in problems], [problem.worked(p.answer) for p in problems])
    )
    batches = track(_batches(settings, seed, len(problems)), "warm start", num_steps * settings.batch_size, "solutions")

    def steps() -> Iterator[tuple[list[Batch], float]]:
        for step, chosen in enumerate(batches):
            texts = [(prompts[i], [worked[i] if shows_working else direct[i]]) for i, shows_working in chosen]
            lr = settings.lr * min((step + 1) / 20, 1.0) * (1 - step / num_steps)
            yield [make_batch(texts, encoder.pad_token_id, torch.device("cpu"))], lr

    *_, loss = train(model.train(), optimizer, steps(), config.autocast, max_norm=1.0)
    log.info("warm start: %d steps of %d solutions, loss %.3f", num_steps, settings.batch_size, loss)
    return model.eval(), encoder


def _batches(settings: WarmStart, seed: int, num_problems: int) -> Iterator[list[tuple[int, bool]]]:
    """Indices of problems, each with whether its working is shown: always at first, then in a share of the mix."""
    random = generator(seed, Stream.WARM_START)
    for step in range(settings.worked_steps + settings.mixed_steps):
        share = 1.0 if step < settings.worked_steps else settings.worked_share
        chosen = random.integers(num_problems, size=settings.batch_size)
        yield list(zip(chosen.tolist(), (random.random(settings.batch_size) < share).tolist(), strict=True))
