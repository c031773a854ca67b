"""The meaning of every metric, that is, of every key of ``metrics.jsonl``."""

import re

QUANTILES = {f"q{percent:02}": f"{percent} % quantile" for percent in (1, 25, 50, 75, 99)}
QUANTILES |= {"q50": "median", "max": "largest value in the step"}

METRICS: dict[str, str] = {
    "step": "rollouts so far; row 0 is the validation before training",
    "reward/mean": "mean reward of the step's completions",
    "reward/std": "standard deviation of the step's rewards",
    "reward/correct_mean": "share of sampled completions that are correct (training accuracy), 0 to 1",
    "reward/format_mean": "mean of the reward's format component",
    "reward/<component>_mean": "mean of a component of the reward",
    "reward/unparsed_rate": "share of completions without a readable answer, 0 to 1",
    "reward/timed_out_rate": "share of completions that score 0 as grading took too long (reward=math), 0 to 1",
    "reward/zero_spread_rate": "share of groups whose rewards are all equal: they teach nothing, 0 to 1",
    "completion/length_mean": "completion length, tokens",
    "completion/truncated_rate": "share of completions cut at rollout.max_new_tokens, 0 to 1",
    "reward/overlong_mean": "mean of the soft over-long penalty, part of the reward, -1 to 0",
    "loss/mean": "the objective's loss, mean over the step's tokens",
    "policy/kl_old_new_k3": "KL(old‖new), k3 estimate on sampled tokens, nats per token; mean over the step's updates, "
    "each measured before it, so 0 by construction with one update per rollout",
    "policy/entropy_mean": "entropy of the policy at the sampling temperature, nats per token",
    "policy/ratio_max": "largest importance ratio new/old of any token",
    "policy/ratio_clamped_rate": "share of tokens whose log-ratio was clamped to ±20, 0 to 1",
    "policy/sampler_gap_mean": "mean |log-prob of sampler − of trainer| at equal weights, nats: numerical error only",
    "policy/sampler_gap_max": "the largest such difference of any token, nats",
    "policy/corrected_rate": "share of tokens whose loss rollout.correction truncates or leaves out, 0 to 1",
    "policy/ratio_variance": "E[(r − 1)²] over tokens, at the level of loss.importance; mean over the step's updates",
    "policy/kl_reference": "loss.kl's estimate of KL(policy‖reference), nats, at the level of loss.importance",
    "loss/kl_weight": "β of the step, where loss.kl_target steers it",
    "loss/dropped_rate": "share of tokens whose objective loss.drop left out, 0 to 1",
    "loss/gate_mean": "mean factor of loss.gate on the tokens' objective, 0 to 1",
    "objective/alpha": "alpha of the step, where the objective has one",
    "objective/lam": "λ of the step, where the objective steers it by objective.delta",
    **{
        f"ratio/{sign}_{quantile}": f"{words} of the ratio on tokens with A {relation} 0"
        for sign, relation in (("positive", ">"), ("negative", "<"))
        for quantile, words in QUANTILES.items()
    },
    "ratio/positive_q01": "1 % quantile of the ratio on tokens with A > 0, at the level of loss.importance; mean over "
    "the step's inner steps, as all keys down to optimizer/update_norm_estimate (each one: diagnostics.jsonl)",
    "ratio/ess": "effective sample size (Σr)² / Σr² as a share of the tokens, 0 to 1",
    "ratio/tv": "total variation between old and new policy, E|r − 1| / 2 on sampled tokens, before the inner step",
    "weight/zero_rate": "share of tokens (A ≠ 0) whose gradient weight w is 0, 0 to 1",
    "weight/damped_rate": "share of tokens with 0 < w < noclip's r",
    "weight/amplified_rate": "share of tokens with w > r",
    "weight/reversed_rate": "share of tokens with w < 0: pulled back",
    "weight/mass_kept": "gradient mass kept, Σ|w A| / Σ|r A|",
    "gradient/zero_advantage_share": "share of Σ|∂(objective + β KL)/∂log π| that lies on tokens with A = 0, 0 to 1",
    "kl/before_k1": "KL(old‖new), k1 estimate E[−log r], before the inner step, nats per token",
    "kl/after_k1": "KL(old‖new), k1 estimate, after the inner step, on the minibatch of the next inner step; after the "
    "rollout's last inner step on every 64th row",
    "kl/after_k3": "KL(old‖new), k3 estimate, after the inner step, on the rows of kl/after_k1",
    "optimizer/grad_norm_clipped": "norm of the policy's gradient after clipping",
    "optimizer/update_norm_estimate": "‖Δθ‖ of the policy in one optimizer step, estimated from every 53rd weight",
    "counterfactual/active_norm": "norm of the active objective's gradient on the probe's batch, the last minibatch",
    "counterfactual/<objective>_norm": "norm of another objective's gradient on the same batch and policy",
    "counterfactual/<objective>_cosine": "cosine of another objective's gradient with the active objective's",
    "critic/loss_mean": "weighted value loss, mean over the step's tokens",
    "critic/explained_variance": "1 − Var(R − V) / Var(R) before the updates: 1 is perfect, 0 a constant",
    "optimizer/grad_norm_mean": "norm of the gradient before clipping, mean over the step's updates",
    "optimizer/lr": "learning rate of the step's last update",
    "update/padding_rate": "positions of the updates' micro-batches that hold no token, as a share",
    "budget/steps": "rollouts so far",
    "budget/prompts": "prompts sampled from so far",
    "budget/completion_tokens": "tokens sampled for training so far",
    "budget/prompts_used": "prompts trained on so far: fewer than sampled from under dynamic sampling",
    "budget/optimizer_steps": "optimizer steps so far",
    "validation/greedy_accuracy": "accuracy of greedy answers to held-out training problems, 0 to 1",
    "validation/greedy_length_mean": "length of greedy validation answers, tokens",
    "validation/sampled_accuracy": "accuracy of validation answers sampled as in training, 0 to 1",
    "validation/sampled_reward_mean": "mean reward of sampled validation answers; selection=best goes by it",
    "validation/sampled_length_mean": "length of sampled validation answers, tokens",
    "time/step_s": "rollout and updates of a step, seconds",
    "time/rollout_s": "sampling and rewards, seconds",
    "time/update_s": "advantages and updates, seconds",
    "time/refresh_s": "giving the sampler the new weights, seconds; nothing for rollout.sampler=own",
    "time/validation_s": "one validation, seconds",
    "time/tokens_per_s": "completion tokens per second of the step",
    "memory/peak_gib": "peak memory: of the GPU where there is one, else of the process, GiB",
}
"""Metric key -> its meaning with its unit."""


def meaning(key: str) -> str | None:
    """The meaning of a metric, or None; ``reward/<component>_mean`` stands for every component of a reward."""
    return METRICS.get(key) or next(
        (text for pattern, text in METRICS.items() if re.fullmatch(re.sub("<.*>", r"\\w+", pattern), key)), None
    )
