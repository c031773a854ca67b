"""Draw the gradient weights and the implied smoothing of all objectives, and the effect of alpha on a run.

Autograd computes the weights from the classes themselves; the run is that of a softmax policy of 128 parameters.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.optimize import brentq
from torch import Tensor

from pspo.base.command import answering, expanded
from pspo.base.figure import BLUE, GREY, ORANGE, name_curves, styled, write_png
from pspo.base.files import write_text
from pspo.base.schema import ConfigError
from pspo.objective import OBJECTIVES, Objective, ObjectiveInput, default_objective

OLD_PROBABILITY = 0.1
"""π_old of the token: DPPO and MASPO look at it, the other objectives at the ratio alone."""

TABLE_RATIOS, MAX_RATIO = (0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0), 8.0

OPTIONS: dict[str, dict[str, Any]] = {
    "clip, dual=3": {"dual": 3.0},
    "clip, two_sided=4": {"two_sided": 4.0},
    "clip, band=chi2": {"band": "chi2"},
    "clip, dcpo, 0.02, 0.28": {"band": "dcpo", "eps_low": 0.02, "eps_high": 0.28},
    "gppo, beta_low=0.5": {"beta_low": 0.5},
    "cfpo, mass, eps=0.2": {"mass": True},
    "dppo, kl, delta=0.05": {"divergence": "kl", "delta": 0.05},
    "dppo, symmetric": {"symmetric": True},
}
"""The further forms that an objective's options give it."""

KNOBS = {
    "clip": "eps_high", "pspo_geometric": "alpha", "pspo_clip": "eps_high", "pspo_relative": "alpha",
    "pspo_proportional": "delta", "gppo": "eps_high", "cispo": "cap", "aspo": "eps_high", "sapo": "tau_positive",
    "gmpo": "eps", "cfpo": "eps", "r2vpo": "lam", "dro": "beta", "dppo": "delta", "maspo": "sigma",
    "vespo": "lambda_positive", "clip, band=chi2": "delta", "cfpo, mass, eps=0.2": "eps",
    "dppo, kl, delta=0.05": "delta", "dppo, symmetric": "delta",
}  # fmt: skip
"""The field that sets an objective's width for A > 0 and r > 1, where it has one."""

LOG_REACH = math.log(1e4)
"""Widths are looked for among ratios up to 10⁴, and down to 10⁻⁴."""

ABOUT_WIDTHS = """Width: the ratio r at which w / r, what an objective leaves of noclip's weight, has fallen to half of
its value at r = 1, for either sign of A and on either side of 1. `python -m pspo.objective --width 1.2` prints the
value of each objective's knob that gives the width 1.2 for A > 0 and r > 1."""


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


def implied_smoothing(objective: Objective, ratio_N: Tensor, advantage: float) -> Tensor:
    """α(r, A) = 1 − w(r, A) / r: the α that ``pspo`` would need at that token for the same gradient."""
    return 1 - weight(objective, ratio_N, advantage) / ratio_N


def width(objective: Objective, advantage: float, above: bool) -> float | None:
    """The ratio, above or below 1, where w / r has fallen to half of its value at r = 1; None where it never does."""
    log_ratio_N = torch.linspace(0, LOG_REACH if above else -LOG_REACH, 2001, dtype=torch.float64)
    share_N = 1 - implied_smoothing(objective, log_ratio_N.exp(), advantage)
    half = share_N[0].item() / 2
    fallen = (share_N < half).nonzero()[:1].flatten().tolist()

    def excess(log_ratio: float) -> float:
        ratio_N = torch.tensor([log_ratio], dtype=torch.float64).exp()
        return 1 - implied_smoothing(objective, ratio_N, advantage).item() - half

    bracket = [log_ratio_N[n].item() for place in fallen for n in (place - 1, place)]
    return math.exp(brentq(excess, *bracket, xtol=1e-10)) if bracket else None


def widths() -> str:
    """The widths of all objectives, as a Markdown table."""
    sides = {
        (1.0, True): "A > 0, r > 1",
        (1.0, False): "A > 0, r < 1",
        (-1.0, False): "A < 0, r < 1",
        (-1.0, True): "A < 0, r > 1",
    }
    rows = [["objective", *sides.values()], ["---", *("---:" for _ in sides)]]
    for name, objective in variants().items():
        found = [width(objective, *side) for side in sides]
        rows.append([f"`{name}`", *("none" if value is None else f"{value:.3f}" for value in found)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def knob_of_width(objective: Objective, knob: str, wanted: float) -> float | None:
    """The value of the field ``knob`` that gives the width ``wanted`` for A > 0 and r > 1; None where none does."""

    def excess(log_value: float) -> float:
        values: dict[str, Any] = {knob: math.exp(log_value)}
        found = width(replace(objective, **values), 1.0, above=True)
        return (LOG_REACH if found is None else math.log(found)) - math.log(wanted)

    within = objective.__dataclass_fields__[knob].metadata["within"]
    low, high = (float(end) for end in within[1:-1].split(","))
    grid = torch.linspace(math.log(max(low, 1e-3) * 1.001), math.log(min(high, 100) * 0.999), 21).tolist()
    found = [(log_value, excess(log_value)) for log_value in grid]
    for (start, before), (end, after) in itertools.pairwise(found):
        if before * after <= 0:
            return math.exp(brentq(excess, start, end, xtol=1e-8))
    return None


def document() -> str:
    """``objectives.md``: the weights, then the widths."""
    return f"{table()}\n\n{ABOUT_WIDTHS}\n\n{widths()}\n"


def draw_weights(path: Path) -> None:
    """One panel for each objective: w over r for A > 0 and A < 0, noclip's w = r dotted behind."""
    title = "Gradient weight w(r, A): the factor on A ∇log π, over the importance ratio r (log scale)"
    _draw(path, title, weight, ("noclip: w = r", lambda ratio_N: ratio_N), (-1.2, 5.2))


def draw_implied_smoothing(path: Path) -> None:
    """One panel for each objective: α(r, A) = 1 − w / r, with PSPO's constant dotted behind and [0, 1] shaded."""
    title = "Implied smoothing α(r, A) = 1 − w / r over the importance ratio r (log scale); shaded: 0 to 1"
    alpha = getattr(default_objective("pspo"), "alpha", math.nan)
    reference = (f"pspo: α = {alpha:g}", lambda ratio_N: torch.full_like(ratio_N, alpha))
    _draw(path, title, implied_smoothing, reference, (-2.2, 3.2), shaded=(0, 1))


@styled
def _draw(
    path: Path,
    title: str,
    curve: Callable[[Objective, Tensor, float], Tensor],
    reference: tuple[str, Callable[[Tensor], Tensor]],
    ylim: tuple[float, float],
    shaded: tuple[float, float] | None = None,
) -> None:
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
        yticks = range(math.ceil(ylim[0]), math.floor(ylim[1]) + 1)
        axes.set(title=name, xlim=(1 / MAX_RATIO, MAX_RATIO), ylim=ylim, yticks=yticks)
        if shaded is not None:
            axes.axhspan(*shaded, color=GREY, alpha=0.12, lw=0)
        axes.axvline(1, color=GREY, lw=0.8)
        axes.plot(ratio_N, reference[1](ratio_N), color=GREY, lw=1.0, ls=(0, (2, 2)), label=reference[0])
        axes.plot(ratio_N, curve(objective, ratio_N, -1.0), color=ORANGE, lw=4.0, label="A < 0")
        axes.plot(ratio_N, curve(objective, ratio_N, 1.0), color=BLUE, lw=1.4, label="A > 0")
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
    """Write ``objectives.png``, ``implied_smoothing.png``, ``objectives.md`` and ``alpha.png``, or print knobs."""
    parser = argparse.ArgumentParser(prog="python -m pspo.objective", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=expanded, nargs="?", default=Path("outputs/objective"), help="where to write")
    parser.add_argument("--width", type=float, help="print instead what gives every objective this width, above 1")
    with answering(ConfigError):
        arguments = parser.parse_args()
        if arguments.width is not None:
            if not 1 < arguments.width < math.exp(LOG_REACH):
                raise ConfigError(f"--width={arguments.width:g}: give a ratio above 1, such as 1.2")
            shown = variants()
            for name, knob in KNOBS.items():
                value = knob_of_width(shown[name], knob, arguments.width)
                told = f"no objective.{knob} gives it" if value is None else f"objective.{knob}={value:.4g}"
                sys.stdout.write(f"{name}: {told}\n")
            return
        directory: Path = arguments.directory
        directory.mkdir(parents=True, exist_ok=True)
        draw_weights(directory / "objectives.png")
        draw_implied_smoothing(directory / "implied_smoothing.png")
        draw_alpha(directory / "alpha.png")
        write_text(directory / "objectives.md", document())
        sys.stdout.write(f"objectives.png, implied_smoothing.png, objectives.md and alpha.png are in {directory}\n")


if __name__ == "__main__":
    main()
