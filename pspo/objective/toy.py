"""A softmax policy small enough to follow exactly, which shows the effect of alpha on the parameters after training."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pspo.objective import ObjectiveInput, default_objective

NUM_STATES, NUM_ACTIONS, SAMPLES_PER_STATE = 16, 8, 64
NUM_ROLLOUTS, UPDATES_PER_ROLLOUT = 25, 8


@dataclass(frozen=True)
class Arm:
    """One way of training: an objective that takes alpha, an optimizer and the weight of an entropy term.

    ``undo_alpha`` takes the factor 1 − alpha out of the gradient again, by a learning rate of lr / (1 − alpha).
    """

    objective: str
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    lr: float = 0.05
    undo_alpha: bool = False
    entropy_weight: float = 0.0


ARMS: dict[str, Arm] = {
    "pspo, AdamW": Arm("pspo"),
    "pspo, SGD": Arm("pspo", torch.optim.SGD, lr=2.0),
    "pspo, SGD at lr / (1 − alpha)": Arm("pspo", torch.optim.SGD, lr=2.0, undo_alpha=True),
    "pspo, AdamW, entropy term": Arm("pspo", entropy_weight=0.05),
    "pspo_geometric, AdamW": Arm("pspo_geometric"),
    "pspo_clip, AdamW": Arm("pspo_clip"),
}
"""Without weight decay, as here, AdamW is Adam."""


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
    optimizer = arm.optimizer([logits], lr=arm.lr / (1 - alpha) if arm.undo_alpha else arm.lr)
    for _ in range(NUM_ROLLOUTS):
        action_BT = torch.randint(NUM_ACTIONS, (NUM_STATES, SAMPLES_PER_STATE), generator=generator)
        reward_BT = reward.gather(-1, action_BT)
        advantage_BT = reward_BT - reward_BT.mean(-1, keepdim=True)
        old_logprob_BT = logits.detach().log_softmax(-1).gather(-1, action_BT)
        for _ in range(UPDATES_PER_ROLLOUT):
            optimizer.zero_grad()
            logprob = logits.log_softmax(-1)
            x = objective_input(logprob.gather(-1, action_BT), old_logprob_BT, advantage_BT)
            negative_entropy = (logprob.exp() * logprob).sum(-1).mean()
            loss = objective(x).mean() + arm.entropy_weight * negative_entropy
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return start, logits.detach()


def objective_input(logprob_BT: Tensor, old_logprob_BT: Tensor, advantage_BT: Tensor) -> ObjectiveInput:
    """The input of an objective at ``loss.importance=token``, without padding."""
    return ObjectiveInput(
        logprob_BT=logprob_BT,
        old_logprob_BT=old_logprob_BT,
        log_ratio_BT=logprob_BT - old_logprob_BT,
        advantage_BT=advantage_BT,
        mask_BT=torch.ones_like(advantage_BT, dtype=torch.bool),
    )
