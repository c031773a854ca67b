"""A softmax policy small enough to follow exactly: what alpha does to where training ends."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pspo.objective import Objective, ObjectiveInput, default_objective

NUM_STATES, NUM_ACTIONS, NUM_SAMPLES = 16, 8, 64
NUM_ROLLOUTS, NUM_UPDATES = 25, 8

Optimizer = Callable[[list[Tensor], float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Arm:
    """One way of training: an objective that takes alpha, an optimizer, and what stands beside the objective."""

    objective: str
    optimizer: Optimizer
    entropy_weight: float = 0.0


def adamw(parameters: list[Tensor], alpha: float) -> torch.optim.Optimizer:
    """AdamW, whatever alpha."""
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0)


def sgd(parameters: list[Tensor], alpha: float) -> torch.optim.Optimizer:
    """SGD, whatever alpha."""
    return torch.optim.SGD(parameters, lr=2.0)


def sgd_undone(parameters: list[Tensor], alpha: float) -> torch.optim.Optimizer:
    """SGD at a learning rate that takes the factor 1 − α out again."""
    return torch.optim.SGD(parameters, lr=2.0 / (1 - alpha))


ARMS: dict[str, Arm] = {
    "pspo, AdamW": Arm("pspo", adamw),
    "pspo, SGD": Arm("pspo", sgd),
    "pspo, SGD at lr / (1 − alpha)": Arm("pspo", sgd_undone),
    "pspo, AdamW, entropy term": Arm("pspo", adamw, entropy_weight=0.05),
    "pspo_geometric, AdamW": Arm("pspo_geometric", adamw),
    "pspo_clip, AdamW": Arm("pspo_clip", adamw),
}


def drift(arm: Arm, alpha: float) -> float:
    """‖θ_α − θ_0‖ / ‖θ_0 − θ_start‖ after 200 updates on the same sampled actions, in float64 without norm clipping."""
    smoothed, plain = train(arm, alpha), train(arm, 0.0)
    return float((smoothed[-1] - plain[-1]).norm() / (plain[-1] - plain[0]).norm())


@cache
def train(arm: Arm, alpha: float) -> tuple[Tensor, Tensor]:
    """The parameters before and after training on rollouts of fixed actions, eight updates on each."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(NUM_STATES, NUM_ACTIONS, dtype=torch.float64, generator=generator).requires_grad_()
    reward = torch.randn(NUM_STATES, NUM_ACTIONS, dtype=torch.float64, generator=generator)
    start, objective = logits.detach().clone(), default_objective(arm.objective).with_alpha(alpha)
    optimizer = arm.optimizer([logits], alpha)
    for _ in range(NUM_ROLLOUTS):
        action_BT = torch.randint(NUM_ACTIONS, (NUM_STATES, NUM_SAMPLES), generator=generator)
        reward_BT = reward.gather(-1, action_BT)
        advantage_BT = reward_BT - reward_BT.mean(-1, keepdim=True)
        old_logprob_BT = logits.detach().log_softmax(-1).gather(-1, action_BT)
        for _ in range(NUM_UPDATES):
            optimizer.zero_grad()
            loss = _loss(objective, logits, action_BT, old_logprob_BT, advantage_BT)
            if arm.entropy_weight:
                logprob = logits.log_softmax(-1)
                loss = loss + arm.entropy_weight * (logprob.exp() * logprob).sum(-1).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return start, logits.detach()


def _loss(
    objective: Objective, logits: Tensor, action_BT: Tensor, old_logprob_BT: Tensor, advantage_BT: Tensor
) -> Tensor:
    logprob_BT = logits.log_softmax(-1).gather(-1, action_BT)
    x = ObjectiveInput(
        logprob_BT=logprob_BT,
        old_logprob_BT=old_logprob_BT,
        log_ratio_BT=logprob_BT - old_logprob_BT,
        advantage_BT=advantage_BT,
        mask_BT=torch.ones_like(action_BT, dtype=torch.bool),
    )
    return objective(x).mean()
