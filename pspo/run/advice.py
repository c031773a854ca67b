"""What a composed run's settings make of it, said once at its start and in its report."""

from pspo.advantage import GAE
from pspo.config import Config
from pspo.optimizer import AdamW


def advice(config: Config) -> list[str]:
    """One sentence for each thing that a reader of the results should know beforehand."""
    told = [inert(config), rescaling(config)]
    return [sentence for sentence in told if sentence is not None]


def inert(config: Config) -> str | None:
    """The trust region does nothing at all where every ratio is 1."""
    if config.update.steps > 1:
        return None
    return (
        "one optimizer step per rollout: every ratio is 1 and the trust region is inert, whatever the objective; "
        "update.num_epochs or update.num_minibatches above 1 gives it something to do"
    )


def rescaling(config: Config) -> str | None:
    """Linear smoothing is a factor 1 − α on the gradient, which a scale-free optimizer takes out again."""
    alpha = getattr(config.objective, "alpha", None)
    if not config.objective.linear or alpha is None or (alpha == 0 and config.smoothing.constant):
        return None
    if config.loss.kl_weight or config.loss.entropy_weight or _shares_trunk(config):
        return None  # 1 - alpha then counts against their weight
    if not isinstance(config.optimizer, AdamW):
        return (
            f"linear smoothing multiplies the gradient by 1 - alpha: under optimizer={config.optimizer.name} this is "
            "noclip at a learning rate of lr (1 - alpha), as far as gradient-norm clipping does not act"
        )
    if not config.smoothing.constant:
        return (
            f"smoothing={config.smoothing.name} under optimizer=adamw: linear smoothing multiplies the gradient by "
            "1 - alpha, so an alpha that changes only weighs steps against each other in Adam's moving averages; "
            "objective=pspo_geometric or pspo_clip gives alpha a trust region to act on"
        )
    return (
        f"alpha={alpha:g} is a mere rescaling here: linear smoothing multiplies the gradient by 1 - alpha, which "
        "optimizer=adamw takes out again, so this run is noclip up to gradient-norm clipping and Adam's eps; alpha has "
        "an effect with objective=pspo_geometric or pspo_clip, optimizer=sgd, a KL or entropy term "
        "(loss.kl=k3 loss.kl_weight=0.01, loss.entropy_weight=0.01), or smoothing=linear or adaptive"
    )


def _shares_trunk(config: Config) -> bool:
    return isinstance(config.advantage, GAE) and config.advantage.critic == "trunk"
