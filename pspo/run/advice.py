"""Warnings at a run's start, and in its report, about settings under which the objective has no effect of its own."""

from pspo.advantage import GAE
from pspo.config import Config
from pspo.optimizer import AdamW


def advice(config: Config) -> list[str]:
    """One sentence for each setting that takes an effect away which the objective's name promises."""
    factor = "linear smoothing multiplies the gradient by 1 - alpha"
    alpha, smoothing = getattr(config.objective, "alpha", None), config.smoothing
    shares_trunk = isinstance(config.advantage, GAE) and config.advantage.critic == "trunk"
    other_terms = config.loss.kl_weight or config.loss.entropy_weight or shares_trunk  # which 1 - alpha weighs against
    if not config.objective.linear or alpha is None or (alpha == 0 and smoothing.constant) or other_terms:
        rescaling = ""
    elif not isinstance(config.optimizer, AdamW):
        rescaling = (
            f"{factor}: under optimizer={config.optimizer.name} this is noclip at a learning rate of lr (1 - alpha), "
            "as far as gradient-norm clipping does not act"
        )
    elif not smoothing.constant:
        rescaling = (
            f"smoothing={smoothing.name} under optimizer=adamw: {factor}, so an alpha that changes only weighs steps "
            "against each other in Adam's moving averages; objective=pspo_geometric or pspo_clip acts as a trust region"
        )
    else:
        rescaling = (
            f"alpha={alpha:g} is a mere rescaling here: {factor}, which optimizer=adamw takes out again, so this is "
            "noclip up to norm clipping and Adam's eps; alpha acts with objective=pspo_geometric or pspo_clip, "
            "optimizer=sgd, smoothing=linear or adaptive, or a KL or entropy term (loss.kl=k3 loss.kl_weight=0.01, "
            "loss.entropy_weight=0.01)"
        )
    inert = (
        "one optimizer step per rollout: every ratio is 1 and the trust region is inert, whatever the objective; "
        "update.num_epochs or update.num_minibatches above 1 gives it something to do"
    )
    return [inert] * (config.update.steps == 1) + [rescaling] * bool(rescaling)
