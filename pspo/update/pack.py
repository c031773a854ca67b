"""How rows are cut into micro-batches: bundles that share one copy of a prompt, sorted by length, little padding."""

from collections.abc import Sequence

from pspo.model import Policy

Bundles = list[list[int]]
"""Rows of one micro-batch, by index; the rows of one bundle share one copy of their prompt."""

OVERHEAD_POSITIONS = {"cpu": 128, "cuda": 4096}
"""Fixed cost of one micro-batch, counted in positions: measured on a CPU, a guess on a GPU."""


def pack(rows: Sequence[tuple[list[int], int]], max_tokens: int, policy: Policy) -> list[Bundles]:
    """Cut rows, each a prompt and the tokens of its completion, into micro-batches.

    A micro-batch has at most ``max_tokens`` padded positions, or one bundle. Of all ways to cut the bundles in the
    order of their length, the chosen one minimises padded positions plus ``OVERHEAD_POSITIONS`` for every micro-batch.
    """
    bundles = _bundles(rows, max_tokens, policy)
    lengths = [len(rows[bundle[0]][0]) + sum(rows[i][1] - 1 for i in bundle) for bundle in bundles]
    by_length = sorted(range(len(bundles)), key=lambda n: lengths[n])
    parts = _least_padded([lengths[n] for n in by_length], max_tokens, OVERHEAD_POSITIONS[policy.device.type])
    return [[bundles[n] for n in by_length[part]] for part in parts]


def _bundles(rows: Sequence[tuple[list[int], int]], max_tokens: int, policy: Policy) -> Bundles:
    """Rows of one prompt, as many to a bundle as cost least and fit into ``max_tokens`` positions.

    k completions of C tokens behind a prompt of P are S = P + kC positions. With a hidden size d, a position costs a
    layer about 6 d + S units: its products, and its attention to all S. Per completion that is least,
    (P + kC)(6 d + P + kC) / k, where kC = √(P (6 d + P)).
    """
    if not policy.shares_prompts:
        return [[i] for i in range(len(rows))]
    width = 6 * policy.model.config.get_text_config().hidden_size
    bundles: Bundles = []
    last: dict[tuple[int, ...], tuple[list[int], int]] = {}  # of each prompt, its last bundle and that bundle's tokens
    for i, (prompt_ids, length) in enumerate(rows):
        prompt, own = tuple(prompt_ids), length - 1
        bundle, tokens = last.get(prompt, ([], 0))
        most = min((len(prompt) * (width + len(prompt))) ** 0.5, max_tokens - len(prompt))
        if not bundle or tokens + own > most:
            bundle, tokens = [], 0
            bundles.append(bundle)
        bundle.append(i)
        last[prompt] = bundle, tokens + own
    return bundles


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
