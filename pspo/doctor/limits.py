"""What the machine's memory and processors allow a policy, in tokens per second and in rows."""

import torch

from pspo.config import Config
from pspo.doctor import Finding, found
from pspo.host import machine, speed
from pspo.model import Policy


def speeds(config: Config, device: torch.device) -> Finding:
    """Memory bandwidth, and the rate of matrix products in float32 and bfloat16."""
    copied = speed.copy_rate(device)
    plain, half = (speed.matmul_rate(dtype, device) for dtype in (torch.float32, torch.bfloat16))
    is_on, hint, warn = config.model.autocast, "", ""
    if is_on and half < plain:
        warn = "model.autocast=false: products in bfloat16 are slower here"
    elif not is_on and half > 1.5 * plain and config.model.dtype == "float32":
        hint = "model.autocast=true takes the faster products, to bfloat16's rounding"
    return found(
        "speed", "{gb_per_s:,.0f} GB/s copied; products: {plain:,.0f} GFLOP/s in float32, {half:,.0f} in bfloat16",
        hint=hint, warn=warn, gb_per_s=copied / 1e9, plain=plain / 1e9, half=half / 1e9, bytes_per_s=copied,
        operations_per_s=half if is_on else plain,
    )  # fmt: skip


def free_gib(device: torch.device) -> float:
    """Memory that a batch may take: on a GPU all that this process could hold, on a CPU what is free."""
    if device.type == "cuda":
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / 2**30
    return machine.memory_gib()[1]


def limits(
    policy: Policy, rows: int, context: float, bytes_per_s: float, operations_per_s: float
) -> tuple[float, float]:
    """Tokens per second that the memory's bandwidth allows a rollout, and the matrix products an update.

    A decoded token of ``rows`` reads the weights once, and for each row its ``row_bytes``; a token of the update is 6
    operations for each parameter.
    """
    parameters, itemsize = sum(p.numel() for p in policy.model.parameters()), _itemsize(policy)
    moved = parameters * itemsize + rows * row_bytes(policy, context)
    return rows * bytes_per_s / moved, operations_per_s / (6 * parameters)


def row_bytes(policy: Policy, context: float) -> float:
    """Bytes of one row of a rollout: keys and values of ``context`` tokens, and three passes over float32 logits."""
    config = policy.model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = 2 * config.num_hidden_layers * config.num_key_value_heads * head * _itemsize(policy)
    return float(context * keys + 3 * config.vocab_size * 4)


def _itemsize(policy: Policy) -> int:
    return int((torch.bfloat16 if policy.autocast else policy.model.dtype).itemsize)
