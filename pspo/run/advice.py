"""Warnings at a run's start, and in its report: an objective without effect, a low rate for LoRA, unpaired samples."""

from pspo.advantage import GAE
from pspo.config import Config, compose, groups
from pspo.objective.soft import CFPO
from pspo.optimizer import AdamW

LORA_RATE_FACTOR = 10
"""Best learning rate of adapters over that of all weights, with AdamW, at nearly any rank, in supervised and in
reinforcement learning (Schulman et al. 2025, LoRA Without Regret, https://thinkingmachines.ai/blog/lora)."""

INERT_EPS = 10.0
"""From here on the distance of two probabilities, over ε, changes no weight by more than a tenth."""


def advice(config: Config) -> list[str]:
    """One sentence for each setting that takes away what the objective's name, LoRA or a run of pspo promises."""
    factor = "linear smoothing multiplies the gradient by 1 - alpha"
    alpha, smoothing = getattr(config.objective, "alpha", None), config.smoothing
    shares_trunk = isinstance(config.advantage, GAE) and config.advantage.critic == "trunk"
    other_terms = config.loss.kl_weight or config.loss.entropy_weight or shares_trunk  # which 1 - alpha weighs against
    if not config.objective.linear or alpha is None or (alpha == 0 and smoothing.constant) or other_terms:
        rescaling = ""
    elif not config.optimizer.scale_free:
        rescaling = (
            f"{factor}: under optimizer={config.optimizer.name} this is noclip at a learning rate of lr (1 - alpha), "
            "as far as gradient-norm clipping does not act"
        )
    elif not smoothing.constant:
        rescaling = (
            f"smoothing={smoothing.name} under optimizer={config.optimizer.name}: {factor}, so an alpha that changes "
            "only weighs steps against each other in its moving averages; objective=pspo_geometric, pspo_relative, "
            "pspo_clip or pspo_proportional acts as a trust region"
        )
    else:
        rescaling = (
            f"alpha={alpha:g} is a mere rescaling here: {factor}, which optimizer={config.optimizer.name} takes out "
            "again, so this is "
            "noclip up to norm clipping and Adam's eps; alpha acts with objective=pspo_geometric, pspo_relative or "
            "pspo_clip, optimizer=sgd, smoothing=linear or adaptive, or a KL or entropy term (loss.kl=k3 "
            "loss.kl_weight=0.01, loss.entropy_weight=0.01)"
        )
    inert = (
        "one optimizer step per rollout: every ratio is 1 and the trust region is inert, whatever the objective; "
        "update.num_epochs or update.num_minibatches above 1 gives it something to do"
    )
    watched = (
        f"loss.kl={config.loss.kl} with loss.kl_weight=0 does nothing in training: it logs policy/kl_reference, at the "
        "cost of a second model; set loss.kl_weight above 0, or leave loss.kl out"
    )
    unpaired = (
        "rollout.sampler=vllm: its log-probabilities round with the batch, so arms of one seed share the seed of every "
        "sample but no longer its every token (pairing by common random numbers is weaker), and a resumed run learns "
        "equally, not with equal bits; policy/sampler_gap_mean and _max say how far it is from the trainer"
    )
    is_watched = config.loss.kl != "none" and config.loss.kl_weight == 0 and config.loss.reference == "start"
    single, loss, objective = config.update.steps == 1, config.loss, config.objective
    nothing = (
        "one optimizer step per rollout: the KL to the policy that sampled the rollout is 0 and has no gradient; set "
        "loss.reference=start, or update.num_epochs or update.num_minibatches above 1"
    )
    told = [inert] * (single and not objective.needs_batch) + [rescaling] * bool(rescaling)
    told += [nothing] * (single and loss.reference == "rollout" and loss.kl in ("k2", "k3") and loss.kl_weight > 0)
    if isinstance(objective, CFPO) and objective.mass and objective.eps >= INERT_EPS:
        told.append(
            f"objective.eps={objective.eps:g} with objective.mass=true: probabilities differ by 1 at most, so every "
            f"weight is that of noclip within {100 / objective.eps:.0f} %; a smaller objective.eps acts"
        )
    told += [watched] * is_watched + [unpaired] * (config.rollout.sampler == "vllm")
    return told + _about_lora(config)


def _about_lora(config: Config) -> list[str]:
    """A sentence where adapters learn at less than half of the rate that is expected to be best for them."""
    model, optimizer = config.model, config.optimizer
    if not (model.lora.rank and isinstance(optimizer, AdamW) and model.name in groups()["model"]):
        return []
    full = compose([f"model={model.name}", *([] if model.made_here else ["model.hub_id=any/model"])]).optimizer.lr
    sentence = (
        f"optimizer.lr={optimizer.lr:g} is low for adapters, whose best learning rate is about {LORA_RATE_FACTOR} "
        f"times that of all weights (Schulman et al. 2025, LoRA Without Regret): model={model.name} has {full:g} for "
        f"all weights, so try optimizer.lr={LORA_RATE_FACTOR * full:g}"
    )
    return [sentence] * (optimizer.lr < LORA_RATE_FACTOR / 2 * full)
