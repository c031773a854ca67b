"""Supervised learning, one loop for every model; by it the warm start, and the making, of the policies made here.

The warm start shows the working of a problem at first, then mostly the bare answer: the policy mostly answers directly
and wrong, yet is mostly right when it works step by step. Reinforcement learning has this way of working to discover.
"""

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from pspo.base.console import track
from pspo.base.stream import Stream, generator
from pspo.dataset import Problem, embedded, problem, render
from pspo.host import interrupt
from pspo.model import bits, tiny
from pspo.model.batch import Batch, make_batch
from pspo.model.config import BitsArchitecture, ModelConfig, WordsArchitecture
from pspo.model.logprob import predicting_states, token_logprobs
from pspo.model.source import made_once, save_parts

log = logging.getLogger("pspo")
CODE = ("tiny", "bits", "warm_start", "batch", "logprob")  # modules of this folder that influence the weights
Steps = Iterable[tuple[Sequence[Batch], float]]  # the micro-batches and the learning rate of each optimizer step


def train(
    model: Any, optimizer: torch.optim.Optimizer, steps: Steps, autocast: bool, max_norm: float
) -> Iterator[float]:
    """Minimise −Σ log π(token) / tokens over the completions of all micro-batches of a step; yields it for each step.

    Stops at a signal, between steps. Raises FloatingPointError before a step whose loss or gradient is not finite, and
    after a step that left weights that are not finite.
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
            reason = f"loss {total}, gradient norm {norm.item()}: the optimizer step was not taken"
            raise FloatingPointError(f"{reason}; lower the learning rate or max_grad_norm")
        optimizer.step()
        if not torch.nn.utils.get_total_norm(model.parameters()).isfinite():
            raise FloatingPointError(f"learning rate {lr:g} made weights that are not finite; lower it")
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
    """The folder of a policy that is made here and its tokenizer; on first use, shared by all arms at one seed."""

    def make(directory: Path) -> None:
        save_parts(directory, *_made(config, seed))

    return made_once("warm_start", _digest(config, seed), make)


def tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of a policy that is made here, which needs no warm start and is the same for every seed."""
    if isinstance(config.architecture, BitsArchitecture):
        return bits.make_tokenizer()
    assert isinstance(config.architecture, WordsArchitecture)
    texts = [text for problem in _problems(config) for text in (problem.question, problem.solution)]
    return tiny.train_tokenizer(texts, config.architecture.vocab_size)


def _problems(config: ModelConfig) -> list[Problem]:
    return embedded.load("train", config.warm_start.num_problems) if config.warm_start else []


def _digest(config: ModelConfig, seed: int) -> str:
    """A name for everything that influences the weights: settings, data, code, versions and thread count."""
    code = [*(Path(__file__).with_name(f"{name}.py") for name in CODE), Path(embedded.__file__)]
    settings = [config.architecture, config.warm_start, config.dtype, config.autocast, config.attention]
    versions = [torch.__version__, transformers.__version__, torch.get_num_threads()]
    content = [seed, settings, versions, _problems(config), [path.read_bytes() for path in code]]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def _made(config: ModelConfig, seed: int) -> tuple[Any, Any]:
    """The policy, trained on solutions if it has a warm start, and its tokenizer."""
    settings, architecture = config.warm_start, config.architecture
    if isinstance(architecture, BitsArchitecture):
        made = bits.make_model(architecture, seed, config.attention).to(getattr(torch, config.dtype))
        return made.eval(), bits.make_tokenizer()
    assert isinstance(architecture, WordsArchitecture)
    assert settings is not None
    encoder, problems = tokenizer(config), _problems(config)
    policy = tiny.make_model(architecture, encoder, seed, config.attention).to(getattr(torch, config.dtype))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
    prompts = render(encoder, "", [p.question for p in problems])
    worked, direct = (
        [[*encoder.encode(text, add_special_tokens=False), encoder.eos_token_id] for text in texts]
        for texts in ([p.solution for p in problems], [problem.worked(p.answer) for p in problems])
    )
    num_steps, random = settings.worked_steps + settings.mixed_steps, generator(seed, Stream.WARM_START)

    def batches() -> Iterator[list[tuple[list[int], list[list[int]]]]]:
        """Prompts with solutions whose working is shown: always at first, then in a share of the mix."""
        for step in range(num_steps):
            share = 1.0 if step < settings.worked_steps else settings.worked_share
            chosen = random.integers(len(problems), size=settings.batch_size).tolist()
            shown = (random.random(settings.batch_size) < share).tolist()
            yield [(prompts[i], [worked[i] if show else direct[i]]) for i, show in zip(chosen, shown, strict=True)]

    def steps() -> Iterator[tuple[list[Batch], float]]:
        for step, texts in enumerate(track(batches(), "warm start", num_steps * settings.batch_size, "solutions")):
            lr = settings.lr * min((step + 1) / 20, 1.0) * (1 - step / num_steps)
            yield [make_batch(texts, encoder.pad_token_id, torch.device("cpu"))], lr

    *_, loss = train(policy.train(), optimizer, steps(), config.autocast, max_norm=1.0)
    log.info("warm start: %d steps of %d solutions, loss %.3f", num_steps, settings.batch_size, loss)
    return policy.eval(), encoder
