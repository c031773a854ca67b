"""The panels of a run: what its figure, the page of a comparison and the W&B workspace draw over its steps."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """Axes with a title; ``curves`` maps a metric to its curve's name, which only a panel with several needs."""

    title: str
    curves: Mapping[str, str]
    percent: bool = False
    log: bool = False


ACCURACY = {"reward/correct_mean": "training,\nsampled", "validation/greedy_accuracy": "validation,\ngreedy"}
WEIGHTS = {f"weight/{name}_rate": name for name in ("damped", "zero", "amplified", "reversed")}
VALIDATION_LENGTH = {"validation/greedy_length_mean": "greedy", "validation/sampled_length_mean": "sampled"}

SECTIONS = {
    "Learning": (
        Panel("Accuracy", ACCURACY, percent=True),
        Panel("Reward", {"reward/mean": ""}),
        Panel("Completion length (tokens)", {"completion/length_mean": ""}),
        Panel("Truncated completions", {"completion/truncated_rate": ""}, percent=True),
    ),
    "Trust region": (
        Panel("KL(old‖new), k3 (nats per token)", {"policy/kl_old_new_k3": ""}),
        Panel("Tokens by gradient weight relative to noclip", WEIGHTS, percent=True),
        Panel("Gradient mass relative to noclip", {"weight/mass_kept": ""}),
        Panel("Alpha", {"objective/alpha": ""}),
        Panel("Effective sample size, share of tokens", {"ratio/ess": ""}),
    ),
    "Evaluation": (
        Panel("Validation accuracy, sampled", {"validation/sampled_accuracy": ""}, percent=True),
        Panel("Validation completion length (tokens)", VALIDATION_LENGTH),
    ),
    "Stability": (
        Panel("Gradient norm before clipping", {"optimizer/grad_norm_mean": ""}),
        Panel("Largest importance ratio, log scale", {"policy/ratio_max": ""}, log=True),
        Panel("Policy entropy (nats per token)", {"policy/entropy_mean": ""}),
    ),
    "Speed": (
        Panel("Completion tokens per second", {"time/tokens_per_s": ""}),
        Panel("Time of a step (seconds)", {"time/rollout_s": "rollout", "time/update_s": "update"}),
        Panel("Peak memory (GiB)", {"memory/peak_gib": ""}),
    ),
}
"""Section -> its panels, in the order in which a reader asks."""

FIGURE = tuple(panel for name in ("Learning", "Trust region", "Stability") for panel in SECTIONS[name])
"""The panels of a single run's figure; none depends on the clock, so that equal runs have equal figures."""

INNER_STEPS = (
    Panel("KL(old‖new), k3, before each inner step", {"kl/before_k3": ""}),
    Panel("Total variation of the policy by inner step", {"ratio/tv": ""}),
    Panel("Effective sample size, share of tokens by inner step", {"ratio/ess": ""}),
    Panel("Tokens of zero gradient weight by inner step", {"weight/zero_rate": ""}, percent=True),
    Panel("Gradient mass relative to noclip by inner step", {"weight/mass_kept": ""}),
    Panel("Norm of the update by inner step, estimated", {"optimizer/update_norm_estimate": ""}),
)
"""The panels over the optimizer steps of one rollout, of the columns of ``diagnostics.jsonl``."""
