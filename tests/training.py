"""A trainer by itself, without the rest of a run."""

import functools
import math

from omegaconf import OmegaConf

from pspo.base.schema import as_dict
from pspo.config import compose, resolve
from pspo.dataset import Problem, Prompt
from pspo.loss import LossConfig
from pspo.reward import Score
from pspo.rollout import RolloutConfig
from pspo.tracker import Tracker
from pspo.trainer import Trainer
from pspo.update import Learner
from pspo.update.rows import UpdateConfig

SMALL = ["rollout.prompts=2", "rollout.group_size=4", "rollout.max_new_tokens=4", "optimizer.lr=1e-3"]


@functools.cache
def composed(*overrides):
    """``compose``, once for the same overrides: it takes a tenth of a second, and a configuration never changes."""
    return compose(overrides)


def configured(*overrides):
    """The same configuration with Hydra for its options alone: keys are set here, in a hundredth of a second."""
    options = [override for override in overrides if "." not in override.partition("=")[0]]
    keys = OmegaConf.from_dotlist([override for override in overrides if override not in options])
    return resolve(OmegaConf.to_container(OmegaConf.merge(as_dict(composed(*options)), keys)))


def rollout_config(**changes):
    """Settings of a small rollout: plain sampling, every group trains."""
    values = {"prompts": 3, "group_size": 4, "max_new_tokens": 4, "overlong_share": 0.0, "max_redraws": 0}
    values |= {
        "sampler": "own",
        "kv_cache_gib": 1.0,
        "correction": "none",
        "correction_low": 0.5,
        "correction_high": 2.0,
    }
    return RolloutConfig(**values | {"temperature": 1.0, "top_p": 1.0, "max_rows": 64, "stop": []} | changes)


def update_config(**changes):
    """One optimizer step of a rollout, in one micro-batch."""
    values = {"num_epochs": 1, "num_minibatches": 1, "max_tokens": 10_000, "old_logprobs": "sampler"}
    return UpdateConfig(**values | changes)


def learner_of(policy, objective, *, critic=None, loss=None, reference=None, max_grad_norm=math.inf, **changes):
    """A learner; ``loss`` has what differs from the plain token mean, ``changes`` what does of rollout and update."""
    plain = {"importance": "token", "aggregation": "token", "kl": "none", "kl_weight": 0.0, "entropy_weight": 0.0}
    plain |= {
        "kl_target": None,
        "reference": "start",
        "gate": "none",
        "gate_eta": 1.0,
        "drop": "none",
        "drop_limit": None,
    }
    loss = LossConfig(**plain | {"mask_truncated": False} | (loss or {}))
    own = {name: changes.pop(name) for name in list(changes) if name in UpdateConfig.__dataclass_fields__}
    rollout = rollout_config(**{"max_new_tokens": 10} | changes)
    return Learner(policy, critic, objective, loss, rollout, update_config(**own), max_grad_norm, reference)


def problems(number):
    return [Prompt(Problem(str(i), "", "", ""), [10 + i, 20 + i]) for i in range(number)]


def scripted(spread):
    """A reward that differs inside the groups of the problems named in ``spread``, and is 1/2 in all others."""
    calls = []

    def reward(completion, problem):
        calls.append(problem.id)
        value = float(calls.count(problem.id) % 2) if int(problem.id) in spread else 0.5
        return Score(value, value == 1, {"script": value}, True)

    return reward


def batched(reward):
    """A reward of one (text, problem) as one of many completions."""
    return lambda completions: [reward(c.text, c.problem) for c in completions]


class Killed(Exception):
    pass


def by_length(completion, problem):
    return Score(float(len(completion) % 3), False, {}, True)


def make_trainer(policy, directory, *overrides, reward=by_length, num_problems=8, calls=math.inf):
    """A trainer of steps of eight completions, from its newest checkpoint on, killed after so many of them."""
    directory.mkdir(exist_ok=True)
    config = configured("tracker=jsonl", "checkpoint.every=2", "budget.steps=4", *SMALL, *overrides)
    tracker = Tracker(config.tracker, directory)
    seen = []

    def counted(completions):
        seen.extend(completions)
        if len(seen) > calls:
            raise Killed
        return batched(reward)(completions)

    trainer = Trainer(config, directory, policy, problems(num_problems), [], counted, tracker)
    trainer.resume()
    return trainer
