"""Our recipes beside TRL's GRPOTrainer: the same loss, and the same gradient of every parameter, on the same batch.

Both sides have the same weights, tokens, old log-probabilities and advantages. TRL's batch goes through its own
``training_step``, so its padding (prompts on the left), masks, shuffling, splitting, normalisers and reference model
are part of what is compared; only its generation is replaced. Where the two define a thing differently, the inputs
make the definitions coincide:

- We clamp every log-ratio to ±20, TRL in VESPO alone: here none is beyond ±5.
- TRL divides by the rows or tokens of a micro-batch and then by the number of micro-batches (grpo, sapo, luspo,
  dr_grpo, bnpo), we by those of the optimizer batch: its micro-batches have equally many rows here, and bnpo has one.
- TRL's cispo has no 1 + ε: its ``epsilon_high`` is the cap itself, as ours.
- TRL multiplies the KL by the ratio unless told otherwise (``use_bias_correction_kl``, after DeepSeek-V3.2, arXiv
  2512.02556); GRPO (2402.03300, eq. 3) does not, and neither do we.
"""

import copy
import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch

from pspo.base.statistics import Statistics
from pspo.config import compose
from pspo.model import save
from pspo.update import Learner
from pspo.update.rows import Row, score
from pspo.update.step import accumulate

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed: make oracle"),
]

NUM_ROWS, MICRO_BATCHES = 48, 4
MAX_LENGTH, LONGEST = 20, 12  # what dr_grpo divides by, and what there is
TEMPERATURE = 0.8
AGREE, DIFFER = 1e-5, 1e-3

# TRL's arguments for each recipe, from the papers and not read from the recipe. Beside them stand the recipe's fields.
ARGUMENTS = {
    "grpo": {
        "loss_type": "grpo",  # loss.aggregation: sequence
        "epsilon": 0.2,  # objective.eps_low, objective.eps_high
        "beta": 0.04,  # loss.kl_weight
        "use_bias_correction_kl": False,  # loss.kl: k3
    },
    "dapo": {
        "loss_type": "dapo",  # loss.aggregation: token
        "epsilon": 0.2,  # objective.eps_low
        "epsilon_high": 0.28,  # objective.eps_high
    },
    "dr_grpo": {
        "loss_type": "dr_grpo",  # loss.aggregation: constant
        "epsilon": 0.2,
        "max_completion_length": MAX_LENGTH,  # rollout.max_new_tokens, Learner.max_length
    },
    "bnpo": {
        "loss_type": "bnpo",  # loss.aggregation: token
        "epsilon": 0.2,
        "gradient_accumulation_steps": 1,
    },
    "two_sided": {
        "loss_type": "dapo",  # loss.aggregation: token
        "epsilon": 0.2,
        "delta": 4.0,  # objective.two_sided
    },
    "cispo": {
        "loss_type": "cispo",  # objective.name, loss.aggregation: token
        "epsilon_high": 5.0,  # objective.cap
    },
    "sapo": {
        "loss_type": "sapo",  # objective.name, loss.aggregation: sequence
        "sapo_temperature_pos": 1.0,  # objective.tau_positive
        "sapo_temperature_neg": 1.05,  # objective.tau_negative
    },
    "vespo": {
        "loss_type": "vespo",  # objective.name, loss.aggregation: token
        "vespo_k_pos": 2.0,  # objective.k_positive
        "vespo_lambda_pos": 3.0,  # objective.lambda_positive
        "vespo_k_neg": 3.0,  # objective.k_negative
        "vespo_lambda_neg": 2.0,  # objective.lambda_negative
    },
    "gspo": {
        "loss_type": "grpo",  # loss.aggregation: sequence
        "importance_sampling_level": "sequence",  # loss.importance
        "epsilon": 3e-4,  # objective.eps_low
        "epsilon_high": 4e-4,  # objective.eps_high
    },
    "luspo": {
        "loss_type": "luspo",  # loss.aggregation: sequence_sum
        "importance_sampling_level": "sequence",  # loss.importance
        "epsilon": 2e-3,  # objective.eps_low
        "epsilon_high": 2.5e-3,  # objective.eps_high
    },
}
# The old log-probabilities differ from the policy's by noise of the size of the trust region, or of the recipe's bound.
NOISE = dict.fromkeys(ARGUMENTS, 0.5) | {"two_sided": 1.2, "cispo": 1.2, "vespo": 0.3, "gspo": 1e-3, "luspo": 5e-3}


def other(argument, value):
    """Another value of one of TRL's arguments."""
    if argument == "loss_type":
        return "bnpo" if value == "grpo" else "grpo"
    return {"sequence": "token", False: True, 1: MICRO_BATCHES, MAX_LENGTH: 30}.get(value) or 2 * value


@pytest.mark.parametrize("name", ARGUMENTS)
def test_recipe(name, tiny_policy, tmp_path):
    policy, reference, config, rows = setting(name, tiny_policy)
    expected = theirs(ARGUMENTS[name], policy, reference, rows, tmp_path)
    assert max(difference(ours(config, policy, rows), expected)) < AGREE


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, arguments in ARGUMENTS.items() for argument in arguments]
)
def test_every_argument_is_felt(name, argument, tiny_policy, tmp_path):
    policy, reference, config, rows = setting(name, tiny_policy)
    wrong = ARGUMENTS[name] | {argument: other(argument, ARGUMENTS[name][argument])}
    unlike = theirs(wrong, policy, reference, rows, tmp_path)
    assert max(difference(ours(config, policy, rows), unlike)) > DIFFER


def setting(name, tiny_policy):
    """A policy, a reference of other weights, the recipe, and rows of many lengths with advantages of both signs."""
    policy, reference, config = tiny_policy(), tiny_policy(seed=1), compose([f"experiment={name}"])
    random = np.random.default_rng(0)
    rows = []
    for _ in range(NUM_ROWS):
        prompt, completion = (
            random.integers(7, policy.model.config.vocab_size, size=random.integers(1, longest + 1)).tolist()
            for longest in (8, LONGEST)
        )
        rows.append(Row(prompt, completion, [], [float(random.standard_normal())] * len(completion)))
    logprobs, references = (score(p, rows, TEMPERATURE, 10_000, None)[0] for p in (policy, reference))
    noise = [NOISE[name] * random.standard_normal(len(row.token_ids)).clip(-4, 4) for row in rows]
    rows = [
        replace(row, old_logprobs=(new + moved).tolist(), reference_logprobs=ref if config.loss.kl != "none" else None)
        for row, new, ref, moved in zip(rows, logprobs, references, noise, strict=True)
    ]
    return policy, reference, config, rows


def ours(config, policy, rows):
    """Loss of a recipe, and its gradients by name."""
    rollout = replace(config.rollout, temperature=TEMPERATURE, max_new_tokens=MAX_LENGTH)
    pieces = replace(config.update, max_tokens=80)  # about ten micro-batches, of unlike numbers of rows
    learner = Learner(policy, None, config.objective, config.loss, rollout, pieces, max_grad_norm=1.0)
    loss = accumulate(learner, rows, Statistics())
    return loss.item(), {name: parameter.grad for name, parameter in policy.trainable().items()}


def theirs(arguments, policy, reference, rows, directory):
    """Loss of TRL's trainer over one optimizer step, and its gradients by name."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            given = {name: pad([getattr(row, field) for row in rows], *how) for name, (field, *how) in COLUMNS.items()}
            given["advantages"] = torch.tensor([row.advantages[0] for row in rows])
            given["num_items_in_batch"] = given["completion_mask"].sum()
            if self.beta:
                both = [torch.cat([given[f"prompt_{k}"], given[f"completion_{k}"]], dim=1) for k in ("ids", "mask")]
                with torch.no_grad():
                    given["ref_per_token_logps"], _, _ = self._get_per_token_logps_and_entropies(
                        self.ref_model, *both, given["completion_ids"].shape[1]
                    )
            return given

    arguments = {"gradient_accumulation_steps": MICRO_BATCHES, "max_completion_length": MAX_LENGTH} | arguments
    micro_batches = arguments["gradient_accumulation_steps"]
    model = copy.deepcopy(policy.model)
    if "beta" in arguments:  # the trainer loads its reference from where the model's configuration says it came from
        save(reference, directory / "reference")
        model.config._name_or_path = str(directory / "reference")
    trainer = Trainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(directory / "trl"),
            per_device_train_batch_size=NUM_ROWS // micro_batches,
            num_generations=2,
            temperature=TEMPERATURE,
            activation_checkpointing=False,
            report_to="none",
            use_cpu=True,
            bf16=False,
            **arguments,
        ),
        train_dataset=Dataset.from_list([{"prompt": "1"}] * NUM_ROWS),
        processing_class=policy.tokenizer,
    )
    trainer.current_gradient_accumulation_steps = micro_batches  # as Trainer.train sets it
    losses = [trainer.training_step(model, [], None) for _ in range(micro_batches)]
    return sum(loss.item() for loss in losses), {name: parameter.grad for name, parameter in model.named_parameters()}


# TRL's name of a tensor: the field of our rows, whether it is padded on the left, whether it is the mask of that field.
COLUMNS = {
    "prompt_ids": ("prompt_ids", True, False),
    "prompt_mask": ("prompt_ids", True, True),
    "completion_ids": ("token_ids", False, False),
    "completion_mask": ("token_ids", False, True),
    "old_per_token_logps": ("old_logprobs", False, False),
}


def pad(rows, left, is_mask):
    length = max(map(len, rows))
    blank = [[0] * (length - len(row)) for row in rows]
    rows = [[1] * len(row) if is_mask else list(row) for row in rows]
    return torch.tensor([b + row if left else row + b for row, b in zip(rows, blank, strict=True)])


def difference(found, expected):
    """Relative difference of the loss, and the largest of a parameter's gradient."""
    (loss, gradients), (expected_loss, expected_gradients) = found, expected
    assert gradients.keys() == expected_gradients.keys()
    of_gradients = [(gradients[name] - g).norm() / g.norm() for name, g in expected_gradients.items()]
    return abs(loss / expected_loss - 1), max(of_gradients).item()
