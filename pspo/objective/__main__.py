"""Draw the gradient weights of all objectives and the effect of alpha on a run.

Autograd computes the weights from the classes themselves; the run is that of a softmax policy of 128 parameters.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pspo.base.command import answering, expanded
from pspo.base.figure import BLUE, GREY, ORANGE, name_curves, styled, write_png
from pspo.base.files import write_text
from pspo.objective import OBJECTIVES, Objective, ObjectiveInput, default_objective

OLD_PROBABILITY = 0.1
"""π_old of the token: DPPO and MASPO look at it, the other objectives at the ratio alone."""

TABLE_RATIOS, MAX_RATIO = (0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0), 8.0

OPTIONS: dict[str, dict[str, Any]] = {
    "clip, dual=3": {"dual": 3.0},
    "clip, two_sided=4": {"two_sided": 4.0},
    "clip, band=chi2": {"band": "chi2"},
    "clip, band=dcpo": {"band": "dcpo"},
    "gppo, beta_low=0.5": {"beta_low": 0.5},
    "cfpo, mass, eps=0.2": {"mass": True},
    "dppo, kl, delta=0.05": {"divergence": "kl", "delta": 0.05},
    "dppo, symmetric": {"symmetric": True},
}
"""The further forms that an objective's options give it."""


def variants() -> dict[str, Objective]:
    """Every objective whose weight is of a token by itself, at its defaults, then with each of ``OPTIONS``."""
    names = (*(name for name, objective in OBJECTIVES.items() if not objective.needs_batch), *OPTIONS)
    return {name: replace(default_objective(name.partition(",")[0]), **OPTIONS.get(name, {})) for name in names}


def weight(objective: Callable[[ObjectiveInput], Tensor], ratio_N: Tensor, advantage: float) -> Tensor:
    """w(r, A) = −(∂loss/∂log π) / A at each ratio, for completions of one token of old probability 0.1."""
    old_logprob_N1 = torch.full((len(ratio_N), 1), math.log(OLD_PROBABILITY), dtype=torch.float64)
    logprob_N1 = (old_logprob_N1 + ratio_N.double().log()[:, None]).requires_grad_()
    advantage_N1, mask_N1 = torch.full_like(old_logprob_N1, advantage), torch.ones_like(old_logprob_N1).bool()
    x = ObjectiveInput.at_tokens(logprob_N1, old_logprob_N1, advantage_N1, mask_N1)
    (gradient_N1,) = torch.autograd.grad(objective(x).sum(), logprob_N1)
    return -gradient_N1.squeeze(-1) / advantage


def table() -> str:
    """w(r, A) at ``TABLE_RATIOS`` as a Markdown table."""
    rows = [["objective", "A", *(f"r = {ratio:g}" for ratio in TABLE_RATIOS)]]
    rows.append(["---", "---", *("---:" for _ in TABLE_RATIOS)])
    for name, objective in variants().items():
        for label, sign, advantage in ((f"`{name}`", "+", 1.0), ("", "−", -1.0)):
            values = weight(objective, torch.tensor(TABLE_RATIOS), advantage).tolist()
            rows.append([label, sign, *(f"{value + 0.0:.3f}".replace("-", "−") for value in values)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@styled
def draw_weights(path: Path) -> None:
    """One panel for each objective: w over r for A > 0 and A < 0, noclip's w = r dotted behind."""
    shown = variants()
    lines = math.ceil(len(shown) / 4)
    figure = Figure(figsize=(12.4, 2.45 * lines + 0.7), layout="constrained")
    ratio_N = torch.logspace(-math.log2(MAX_RATIO), math.log2(MAX_RATIO), 1201, base=2, dtype=torch.float64)
    places = figure.subplots(lines, 4).flat
    for axes in places[len(shown) :]:
        axes.set_axis_off()
    for axes, (name, objective) in zip(places, shown.items(), strict=False):
        axes.set_xscale("log", base=2)
        axes.set_xticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], ["⅛", "¼", "½", "1", "2", "4", "8"])
        axes.grid(axis="x")
        axes.set(title=name, xlim=(1 / MAX_RATIO, MAX_RATIO), ylim=(-1.2, 5.2), yticks=range(-1, 6))
        axes.axvline(1, color=GREY, lw=0.8)
        axes.plot(ratio_N, ratio_N, color=GREY, lw=1.0, ls=(0, (2, 2)), label="noclip: w = r")
        axes.plot(ratio_N, weight(objective, ratio_N, -1.0), color=ORANGE, lw=4.0, label="A < 0")
        axes.plot(ratio_N, weight(objective, ratio_N, 1.0), color=BLUE, lw=1.4, label="A > 0")
    title = "Gradient weight w(r, A): the factor on A ∇log π, over the importance ratio r (log scale)"
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(handles=handles[::-1], loc="outside upper left", ncols=3, title=title, alignment="left")
    write_png(figure, path, dpi=110)


NUM_STATES, NUM_ACTIONS, SAMPLES_PER_STATE = 16, 8, 64
NUM_ROLLOUTS, UPDATES_PER_ROLLOUT = 25, 8
ALPHAS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)

OPTIMIZERS: dict[str, Callable[[Tensor, float], torch.optim.Optimizer]] = {
    "AdamW": lambda logits, alpha: torch.optim.Adam([logits], lr=0.05),  # without weight decay the two are one
    "SGD": lambda logits, alpha: torch.optim.SGD([logits], lr=2.0),
    "SGD at lr / (1 − alpha)": lambda logits, alpha: torch.optim.SGD([logits], lr=2.0 / (1 - alpha)),
}
ARMS = [
    *(f"pspo, {optimizer}" for optimizer in OPTIMIZERS),
    *("pspo, AdamW, entropy term", "pspo_geometric, AdamW", "pspo_clip, AdamW"),
]
"""Ways of training: objective, optimizer, and perhaps an entropy term of weight 0.05."""


def train(arm: str, alpha: float) -> tuple[Tensor, Tensor]:
    """The parameters before and after 200 updates, eight on each rollout of actions drawn without the policy."""
    objective_name, optimizer_name, *entropy_term = arm.split(", ")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(NUM_STATES, NUM_ACTIONS, dtype=torch.float64, generator=generator).requires_grad_()
    reward = torch.randn(NUM_STATES, NUM_ACTIONS, dtype=torch.float64, generator=generator)
    objective = replace(default_objective(objective_name), alpha=alpha)  # type: ignore[call-arg]
    start, optimizer = logits.detach().clone(), OPTIMIZERS[optimizer_name](logits, alpha)
    for _ in range(NUM_ROLLOUTS):
        action_BT = torch.randint(NUM_ACTIONS, (NUM_STATES, SAMPLES_PER_STATE), generator=generator)
        reward_BT = reward.gather(-1, action_BT)
        advantage_BT = reward_BT - reward_BT.mean(-1, keepdim=True)
        old_logprob_BT = logits.detach().log_softmax(-1).gather(-1, action_BT)
        for _ in range(UPDATES_PER_ROLLOUT):
            optimizer.zero_grad()
            logprob, mask_BT = logits.log_softmax(-1), torch.ones_like(action_BT).bool()
            x = ObjectiveInput.at_tokens(logprob.gather(-1, action_BT), old_logprob_BT, advantage_BT, mask_BT)
            negative_entropy = (logprob.exp() * logprob).sum(-1).mean()
            loss = objective(x).mean() + (0.05 if entropy_term else 0.0) * negative_entropy
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return start, logits.detach()


def drifts(arm: str, alphas: Sequence[float]) -> list[float]:
    """‖θ_α − θ_0‖ / ‖θ_0 − θ_start‖ after training, at each alpha, in float64 without norm clipping."""
    start, plain = train(arm, 0.0)
    return [float((train(arm, alpha)[1] - plain).norm() / (plain - start).norm()) for alpha in alphas]


@styled
def draw_alpha(path: Path) -> None:
    """How far alpha moves a run from the same run at alpha 0, for linear and other smoothing."""
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    names = []
    for name in ARMS:
        heights = [max(drift, 1e-16) for drift in drifts(name, ALPHAS)]
        (line,) = axes.plot(ALPHAS, heights, marker="o")
        names.append((heights[-1], name, str(line.get_color())))
    axes.set(yscale="log", ylim=(3e-17, 3), xticks=[0, 0.2, 0.4, 0.6, 0.8], xlabel="alpha")
    axes.set_title(
        "Distance of the final parameters from the run at alpha = 0,\nas a share of the way that run went (log scale)"
    )
    name_curves(axes, names, spacing=0.055)
    write_png(figure, path, dpi=110)


def main() -> None:
    """Write ``objectives.png``, ``objectives.md`` and ``alpha.png``."""
    parser = argparse.ArgumentParser(prog="python -m pspo.objective", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=expanded, nargs="?", default=Path("outputs/objective"), help="where to write")
    with answering():
        directory: Path = parser.parse_args().directory
        directory.mkdir(parents=True, exist_ok=True)
        draw_weights(directory / "objectives.png")
        draw_alpha(directory / "alpha.png")
        write_text(directory / "objectives.md", table() + "\n")
        sys.stdout.write(f"objectives.png, objectives.md and alpha.png are in {directory}\n")


if __name__ == "__main__":
    main()
