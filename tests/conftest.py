"""What all tests share. It imports nothing heavy itself: the process that deals tests to workers reads it too."""

import copy
import functools

import hypothesis
import pytest
from hypothesis import HealthCheck

hypothesis.settings.register_profile(
    "pspo",
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],  # a busy machine is no failure
)
hypothesis.settings.load_profile("pspo")

TEXTS = ["Tom has 3 apples and buys 4 more. How many apples?", "3+4=7\n#### 7", "12*5=60\n#### 60"]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tensors this small gain nothing from more, and workers side by side lose much."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where runs find the warm policy that the first of them has made."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, cache):
    """The directory of a run that nothing has disturbed, as ``forked`` makes it; to be left as it is."""
    from forked import make, only_run, output_of

    cwd = tmp_path_factory.mktemp("unbroken")
    assert make(cwd, cache) == 0, output_of(cwd)
    return only_run(cwd)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A tokenizer of about a hundred tokens, with the chat template of the embedded policy."""
    from pspo.model import tiny

    return tiny.train_tokenizer(TEXTS, 128)


@pytest.fixture(scope="session")
def tiny_models(tiny_tokenizer):
    """The random models that tests have asked for, to be copied."""
    from pspo.model import tiny

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    architecture = tiny.WordsArchitecture(task="embedded", vocab_size=128, **sizes)
    return functools.cache(lambda seed, attention: tiny.make_model(architecture, tiny_tokenizer, seed, attention))


@pytest.fixture
def tiny_policy(tiny_tokenizer, tiny_models):
    """Factory of policies with two random Qwen2 layers: the same weights for the same seed in every dtype.

    The library's norms, and the softmax of its eager attention, work in float32 whatever the dtype of the model.
    ``exact=True`` makes a float64 policy that is float64 throughout.
    """
    import torch
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    from pspo.model import Policy, stop_ids

    def make(dtype=torch.float32, *, seed=0, attention="eager", gradient_checkpointing=False, exact=False):
        attention = "sdpa" if exact and attention == "eager" else attention
        model = copy.deepcopy(tiny_models(seed, attention)).to(dtype)
        for name, module in list(model.named_modules()) if exact else []:
            if isinstance(module, Qwen2RMSNorm):
                norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
                norm.weight = module.weight
                model.set_submodule(name, norm)
        if gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})  # transformers 5.16 has the second name only
        stops = stop_ids(model, tiny_tokenizer)
        return Policy(
            model.eval(), tiny_tokenizer, stops, autocast=False, gradient_checkpointing=gradient_checkpointing
        )

    return make
