"""A trainer by itself, without the rest of a run."""

import functools
import math

from omegaconf import OmegaConf

from pspo.base.schema import as_dict
from pspo.config import compose, resolve
from pspo.dataset import Problem, Prompt
from pspo.reward import Score
from pspo.tracker import Tracker
from pspo.trainer import Trainer

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


def problems(number):
    return [Prompt(Problem(str(i), "", "", ""), [10 + i, 20 + i]) for i in range(number)]


class Killed(Exception):
    pass


def by_length(completion, problem):
    return Score(float(len(completion) % 3), False, {}, True)


def make_trainer(policy, directory, *overrides, reward=by_length, num_problems=8, calls=math.inf):
    """A trainer of steps of eight completions, from its newest checkpoint on, killed after so many of them."""
    directory.mkdir(exist_ok=True)
    config = configured("tracker=jsonl", "checkpoint.every=2", "budget.steps=4", *SMALL, *overrides)
    tracker = Tracker(config.tracker, directory, run_name="", group="", job_type="", resolved_config={})
    seen = []

    def counted(completions):
        seen.extend(completions)
        if len(seen) > calls:
            raise Killed
        return [reward(completion.text, completion.problem) for completion in completions]

    trainer = Trainer(config, directory, policy, problems(num_problems), [], counted, tracker)
    trainer.resume()
    return trainer
