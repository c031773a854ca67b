"""What learns in an update, and from what: rows of tokens, made of a step's completions and packed in micro-batches."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pspo.advantage import Advantage, Critic
from pspo.base.schema import Schema, key
from pspo.host import ranks
from pspo.loss import LossConfig, batch_statistics
from pspo.model import Policy
from pspo.model.attention import BLOCK_POSITIONS
from pspo.model.batch import Batch, make_batch, scatter
from pspo.model.logprob import predicting_states, token_logprobs
from pspo.objective import Objective, ObjectiveInput
from pspo.rollout import Completion, RolloutConfig
from pspo.update.correction import corrections

RowIndices = list[list[int]]
"""The rows of one micro-batch, by index, in bundles: the rows of one bundle share one copy of their prompt."""

GAP, GAP_MAX = "policy/sampler_gap_mean", "policy/sampler_gap_max"
"""Mean and largest |log π_trainer − log π_sampler| of fresh rows, in nats."""

OVERHEAD_POSITIONS = {"cpu": 128, "cuda": 4096}
"""Fixed cost of one micro-batch, counted in positions: measured on a CPU, a guess on a GPU."""


@dataclass(frozen=True, kw_only=True)
class UpdateConfig(Schema, block="update"):
    """How often and in what pieces a rollout is learned from; updates per rollout = epochs x minibatches."""

    num_epochs: int = key("passes over a rollout", within="[1, inf)")
    num_minibatches: int = key("optimizer steps of one pass", within="[1, inf)")
    max_tokens: int = key("padded positions of one micro-batch; bounds memory, changes rounding", within="[1, inf)")
    old_logprobs: Literal["sampler", "recompute"] = key(
        "log π_old: the sampler's, or from one more pass of the trainer, which takes rounding out of the ratios"
    )

    def check(self, objective: Objective, rollout: RolloutConfig) -> None:
        """Refuse more minibatches than completions, or than groups where the objective takes them whole."""
        most = rollout.prompts * (1 if objective.needs_batch else rollout.group_size)
        what = "completions of a step (rollout.prompts x rollout.group_size)"
        if objective.needs_batch:
            what = f"rollout.prompts, as objective={objective.name} takes whole groups"
        if self.num_minibatches > most:
            raise self.refuse("num_minibatches", f"must be at most the {most} {what}")

    @property
    def steps(self) -> int:
        """Optimizer steps of one rollout."""
        return self.num_epochs * self.num_minibatches


@dataclass(frozen=True)
class Learner:
    """The models that learn and their loss: the same through a run but for the objective's alpha."""

    policy: Policy
    critic: Critic | None  # the policy's value model, where the advantage needs one
    objective: Objective
    loss: LossConfig
    rollout: RolloutConfig
    update: UpdateConfig
    max_grad_norm: float  # of the policy's gradient and, by itself, of the value model's
    reference: Policy | None = None  # the policy before training, where the loss has a KL penalty

    def parameters(self) -> list[list[torch.nn.Parameter]]:
        """The policy's trained parameters, then the value model's own."""
        own = [] if self.critic is None else [list(self.critic.parameters())]
        return [list(self.policy.trainable().values()), *own]


@dataclass(frozen=True)
class Row:
    """One completion as the update sees it; every list but the prompt has one number for each of its tokens."""

    prompt_ids: list[int]
    token_ids: list[int]
    old_logprobs: list[float]  # log π_old, in nats
    advantages: list[float]  # A
    reference_logprobs: list[float] | None = None  # log π_ref, in nats, where there is a KL penalty
    values: list[float] | None = None  # V at the start of the step, where there is a value model
    returns: list[float] | None = None  # the targets of V
    corrections: list[float] | None = None  # factors on the losses, where ``rollout.correction`` is not none
    group: int = 0  # the place of its prompt in the step: completions of one prompt are compared with each other
    target: list[float] | None = None  # ``ObjectiveInput.target_BT``, made of an optimizer batch
    kept: list[float] | None = None  # 1 where ``loss.drop``, looking at an optimizer batch, keeps the token, else 0


def make_rows(
    completions: Sequence[Completion], reward_PG: Tensor, advantage: Advantage, learner: Learner
) -> tuple[list[Row], dict[str, float]]:
    """The rows that train, and metrics of the value model and of the gap between sampler and trainer.

    Truncated completions, where the loss masks them, count in the mean of their group and do not train.
    """
    size, metrics = reward_PG.shape[-1], dict[str, float]()
    rows = [Row(c.prompt.token_ids, c.token_ids, c.logprobs, [], group=n // size) for n, c in enumerate(completions)]
    if not rows:
        return rows, metrics
    temperature, max_tokens = learner.rollout.temperature, learner.update.max_tokens
    recompute, values = learner.update.old_logprobs == "recompute", None
    if learner.critic is not None or recompute:
        logprobs, values = score(learner.policy, rows, temperature, max_tokens, learner.critic)
    if recompute:
        sampled = [row.old_logprobs for row in rows]
        metrics |= gap_metrics(np.concatenate(logprobs) - np.concatenate(sampled), learner.rollout)
        if learner.rollout.correction != "none":
            factors, metrics["policy/corrected_rate"] = corrections(learner.rollout, logprobs, sampled)
            rows = [replace(row, corrections=c) for row, c in zip(rows, factors, strict=True)]
        rows = [replace(row, old_logprobs=new) for row, new in zip(rows, logprobs, strict=True)]
    advantages, returns = advantage.estimate(reward_PG, [len(row.token_ids) for row in rows], values)
    rows = [replace(row, advantages=a) for row, a in zip(rows, advantages, strict=True)]
    if values and returns:
        rows = [replace(row, values=v, returns=r) for row, v, r in zip(rows, values, returns, strict=True)]
        value_N, return_N = np.concatenate(values), np.concatenate(returns)
        metrics["critic/explained_variance"] = float(1 - np.var(return_N - value_N) / max(np.var(return_N), 1e-12))
    if learner.loss.mask_truncated:
        rows = [row for row, completion in zip(rows, completions, strict=True) if completion.finished]
    if learner.reference is not None:
        logprobs, _ = score(learner.reference, rows, temperature, max_tokens, None)
        rows = [replace(row, reference_logprobs=fixed) for row, fixed in zip(rows, logprobs, strict=True)]
    return rows, metrics


def gap_metrics(gap_N: np.ndarray[Any, Any], config: RolloutConfig) -> dict[str, float]:
    """Mean and largest |log π_trainer − log π_sampler|, in nats, as far as it is an error.

    vLLM's are of the nucleus, which holds top_p of the probability at least: they may be higher by −log top_p.
    """
    if config.sampler == "vllm":
        gap_N = gap_N - gap_N.clip(math.log(config.top_p), 0.0)
    return {GAP: float(np.abs(gap_N).mean()), GAP_MAX: float(np.abs(gap_N).max())}


@torch.no_grad()
def score(
    policy: Policy, rows: Sequence[Row], temperature: float, max_tokens: int, critic: Critic | None
) -> tuple[list[list[float]], list[list[float]]]:
    """Log-probabilities, in nats, of every row's tokens, and their values where there is a critic; no gradient.

    Each rank scores its share of the rows.
    """
    parts = ranks.gather(lambda: _score(policy, ranks.share(rows), temperature, max_tokens, critic))
    logprobs, values = ([row for part in parts for row in part[i]] for i in range(2))
    return logprobs, values


def _score(
    policy: Policy, rows: Sequence[Row], temperature: float, max_tokens: int, critic: Critic | None
) -> tuple[list[list[float]], list[list[float]]]:
    logprobs: list[list[float]] = [[] for _ in rows]
    values: list[list[float]] = [[] for _ in rows]
    for places, batch in micro_batches(rows, policy, max_tokens):
        with policy.scoring():
            hidden_NH = predicting_states(policy.model.get_decoder(), batch, policy.autocast)
            columns = [(logprobs, token_logprobs(policy.model, batch, hidden_NH, temperature, policy.autocast)[0])]
        if critic is not None:
            columns.append((values, critic(batch, hidden_NH, policy.autocast)))
        for numbers, number_BT in columns:
            for i, padded in zip(places, number_BT.tolist(), strict=True):
                numbers[i] = padded[: len(rows[i].token_ids)]
    return logprobs, values


def with_batch_statistics(learner: Learner, rows: Sequence[Row], max_tokens: int) -> Sequence[Row]:
    """The rows of an optimizer batch with their target and kept, from a pass without gradient, where these are needed.

    Whatever the micro-batches then are, each has what the whole batch says of its tokens.
    """
    config, objective = learner.loss, learner.objective
    if not (objective.needs_batch or config.drop == "m2"):
        return rows
    logprobs, _ = score(learner.policy, rows, learner.rollout.temperature, max_tokens, None)
    lists = (logprobs, *([getattr(row, name) for row in rows] for name in ("old_logprobs", "advantages", "token_ids")))
    columns = [[torch.tensor(values, dtype=torch.float64) for values in rows_of] for rows_of in lists]
    logprob_BT, old_BT, advantage_BT, token_BT = (pad_sequence(column, True, -1.0) for column in columns)
    x = ObjectiveInput.at_tokens(logprob_BT, old_BT, advantage_BT, token_BT >= 0)
    found = batch_statistics(config, objective, x, torch.tensor([row.group for row in rows]))
    for name, value_BT in zip(("target", "kept"), found, strict=True):
        if value_BT is not None:
            values = [value_T[: len(row.token_ids)].tolist() for value_T, row in zip(value_BT, rows, strict=True)]
            rows = [Row(**vars(row) | {name: own}) for row, own in zip(rows, values, strict=True)]
    return rows


def micro_batches(rows: Sequence[Row], policy: Policy, max_tokens: int) -> Iterator[tuple[list[int], Batch]]:
    """The micro-batches of ``pack``, each with the indices of its rows, in the order of its completions."""
    for bundles in pack(rows, max_tokens, policy):
        yield [i for bundle in bundles for i in bundle], batch_of(rows, policy, bundles)


def batch_of(rows: Sequence[Row], policy: Policy, bundles: RowIndices) -> Batch:
    """The tokens of one micro-batch of rows."""
    texts = [(rows[bundle[0]].prompt_ids, [rows[i].token_ids for i in bundle]) for bundle in bundles]
    return make_batch(texts, policy.pad_id, policy.device, policy.packs)


def column(rows: Sequence[Row], name: str, like_BT: Tensor) -> Tensor:
    """One of the rows' lists, padded with zeros to the shape, dtype and device of ``like_BT``."""
    value_N = like_BT.new_tensor([value for row in rows for value in getattr(row, name)])
    length_B1 = torch.tensor([[len(row.token_ids)] for row in rows], device=like_BT.device)
    return scatter(torch.arange(like_BT.shape[1], device=like_BT.device) < length_B1, value_N)


def pack(rows: Sequence[Row], max_tokens: int, policy: Policy) -> list[RowIndices]:
    """Cut rows into micro-batches.

    A micro-batch has at most ``max_tokens`` padded positions, or one bundle. Of all ways to cut the bundles in the
    order of their length, the chosen one minimises padded positions plus ``OVERHEAD_POSITIONS`` for every micro-batch.
    Packed bundles have no padding: each micro-batch takes the next ones in their order, as many as go in.
    """
    bundles = _bundles(rows, max_tokens, policy)
    lengths = [len(rows[bundle[0]].prompt_ids) + sum(len(rows[i].token_ids) - 1 for i in bundle) for bundle in bundles]
    if policy.packs:
        return _filled(bundles, lengths, max_tokens)
    by_length = sorted(range(len(bundles)), key=lambda n: lengths[n])
    parts = _least_padded([lengths[n] for n in by_length], max_tokens, OVERHEAD_POSITIONS[policy.device.type])
    return [[bundles[n] for n in by_length[part]] for part in parts]


def _bundles(rows: Sequence[Row], max_tokens: int, policy: Policy) -> RowIndices:
    """Bundle the rows of each prompt, so that a completion costs least, within ``max_tokens`` positions a bundle.

    k completions of C tokens behind a prompt of P are S = P + kC positions. With a hidden size d, a position costs a
    layer about 6 d + S units: its products, and its attention to all S. The cost of a completion,
    (P + kC)(6 d + P + kC) / k, is least where kC = √(P (6 d + P)).
    """
    if not policy.shares_prompts:
        return [[i] for i in range(len(rows))]
    width = 6 * policy.model.config.get_text_config().hidden_size
    bundles: RowIndices = []
    last: dict[tuple[int, ...], tuple[list[int], int]] = {}  # of each prompt, its last bundle and that bundle's tokens
    for i, row in enumerate(rows):
        prompt, own = tuple(row.prompt_ids), len(row.token_ids) - 1
        bundle, tokens = last.get(prompt, ([], 0))
        most = min((len(prompt) * (width + len(prompt))) ** 0.5, max_tokens - len(prompt))
        if not bundle or tokens + own > most:
            bundle, tokens = [], 0
            bundles.append(bundle)
        bundle.append(i)
        last[prompt] = bundle, tokens + own
    return bundles


def _filled(bundles: RowIndices, lengths: Sequence[int], max_tokens: int) -> list[RowIndices]:
    """Cut bundles into runs of whole blocks of attention, at most ``max_tokens`` positions, or of one bundle."""
    runs, room = list[RowIndices](), 0
    for bundle, length in zip(bundles, lengths, strict=True):
        if not runs or length > room:
            runs.append([])
            room = max_tokens - max_tokens % BLOCK_POSITIONS
        runs[-1].append(bundle)
        room -= length
    return runs


def _least_padded(lengths: Sequence[int], max_tokens: int, overhead: int) -> list[slice]:
    """Cut ascending lengths into runs; by dynamic programming over the end of the last run."""
    cost, start = [0.0], [0]  # of the first n lengths: the least cost, and where their last run starts
    for end in range(1, len(lengths) + 1):
        starts = [s for s in range(end) if (end - s) * lengths[end - 1] <= max_tokens or s == end - 1]
        start.append(min(starts, key=lambda s: cost[s] + (end - s) * lengths[end - 1]))
        cost.append(cost[start[-1]] + (end - start[-1]) * lengths[end - 1] + overhead)
    runs: list[slice] = []
    end = len(lengths)
    while end:
        runs.insert(0, slice(start[end], end))
        end = start[end]
    return runs
