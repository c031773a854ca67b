import gc
import itertools
import math
import re
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import learner_of as plain_learner
from training import update_config

from pspo.advantage import GAE, make_critic
from pspo.base.schema import ConfigError
from pspo.base.statistics import Statistics
from pspo.config import compose, identity
from pspo.diagnostics import (
    ELSEWHERE,
    EXACT_UP_TO_PARAMETERS,
    ROWS_PER_PROBE_ROW,
    DiagnosticsConfig,
    Record,
    counterfactual,
    inner_metrics,
    kl_after,
    sample_coordinates,
    update_norm,
)
from pspo.model import Policy, tiny
from pspo.objective import OBJECTIVES, ObjectiveInput, default_objective
from pspo.update import step, update
from pspo.update.rows import Row, score
from pspo.update.step import accumulate

EVERY = [default_objective(name) for name in OBJECTIVES]
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)


@pytest.fixture(autouse=True)
def made_up_old_logprobs(monkeypatch):
    """Rows here come from no sampler, so nothing is said of one; test_guard.py is about samplers."""
    monkeypatch.setattr(step, "MAX_GAP_NATS", {False: math.inf})


def metrics_of(ratios, advantages, weights, *, token_ratios=None, entropies=None, wholes=None, cuts=None):
    """Metrics of tokens with the given weights, in pieces cut at ``cuts``, each between two masked tokens."""
    columns = [ratios, token_ratios or ratios, advantages, weights, entropies or [0.0] * len(ratios)]
    columns.append(wholes or [-w * a for w, a in zip(weights, advantages, strict=True)])
    record, edges = Record(), [0, *(cuts or []), len(ratios)]
    for start, end in itertools.pairwise(edges):
        padded = [torch.tensor([[math.nan, *column[start:end], 99.0]], dtype=torch.float64) for column in columns]
        ratio_BT, token_ratio_BT, advantage_BT, weight_BT, entropy_BT, whole_BT = padded
        old_logprob_BT = torch.full_like(ratio_BT, -1.0)
        x = ObjectiveInput(
            logprob_BT=old_logprob_BT + token_ratio_BT.log(),
            old_logprob_BT=old_logprob_BT,
            log_ratio_BT=ratio_BT.log(),
            advantage_BT=advantage_BT,
            mask_BT=torch.tensor([[False, *[True] * (end - start), False]]),
        )
        record.add(x, -weight_BT * advantage_BT, whole_BT, entropy_BT)
    return inner_metrics(record.tokens)


#             r,   A,    w
HAND = [
    (2.0, 1.0, 2.0),  # as noclip
    (2.0, 1.0, 0.0),  # zero
    (1.5, -1.0, 1.0),  # damped
    (0.5, 2.0, 1.0),  # amplified
    (1.0, -2.0, -0.3),  # reversed
    (1.0, 0.0, 0.0),  # teaches nothing, and is not counted among the weights
]
RATIOS, ADVANTAGES, WEIGHTS = map(list, zip(*HAND, strict=True))


def test_every_number_by_hand():
    token_ratios = [4.0, 1.0, 1.5, 0.5, 1.0, 1.0]
    wholes = [1, 0, -2, 3, 0, -2]  # of the objective with the KL: 2 of 8 where A = 0
    result = metrics_of(
        RATIOS, ADVANTAGES, WEIGHTS, token_ratios=token_ratios, entropies=[1, 2, 3, 4, 5, 6], wholes=wholes
    )
    log_sum = math.log(4 * 1.5 * 0.5)
    expected = {
        "ratio/ess": 8.0**2 / 12.5 / 6,  # Σr = 8, Σr² = 4 + 4 + 2.25 + 0.25 + 1 + 1
        "ratio/tv": (3 + 0.5 + 0.5) / 6 / 2,  # of the tokens' own ratios, as the two KLs
        "kl/before_k1": -log_sum / 6,
        "kl/before_k3": (9 - 6 - log_sum) / 6,
        "policy/entropy": 3.5,
        "gradient/zero_advantage_share": 0.25,
        "weight/zero_rate": 0.2,
        "weight/damped_rate": 0.2,
        "weight/amplified_rate": 0.2,
        "weight/reversed_rate": 0.2,
        "weight/mass_kept": (2 + 0 + 1 + 2 + 0.6) / (2 + 2 + 1.5 + 1 + 2),
        "ratio/positive_q50": 2.0,  # of 0.5, 2 and 2
        "ratio/positive_q25": 1.25,
        "ratio/positive_q75": 2.0,
        "ratio/positive_q01": 0.5 + 1.5 * 0.02,
        "ratio/positive_q99": 2.0,
        "ratio/positive_max": 2.0,
        "ratio/negative_q50": 1.25,  # of 1 and 1.5
        "ratio/negative_q25": 1.125,
        "ratio/negative_q75": 1.375,
        "ratio/negative_q01": 1.005,
        "ratio/negative_q99": 1.495,
        "ratio/negative_max": 1.5,
    }
    assert result == pytest.approx(expected, abs=1e-12)


@given(logs=st.lists(st.floats(-3, 3), min_size=1, max_size=40), seed=st.integers(0, 1000), count=st.integers(0, 5))
def test_quantiles_are_those_of_torch_and_nothing_depends_on_micro_batches(logs, seed, count):
    random, number = np.random.default_rng(seed), len(logs)
    advantages, weights = random.standard_normal((2, number)).tolist()
    ratios = [math.exp(x) for x in logs]
    result = metrics_of(ratios, advantages, weights)
    cuts = sorted(set(random.integers(1, number, size=count).tolist())) if number > 1 else []
    assert metrics_of(ratios, advantages, weights, cuts=cuts) == pytest.approx(result, rel=1e-12, abs=1e-12)
    for name, sign in (("positive", 1), ("negative", -1)):
        chosen = torch.tensor([r for r, a in zip(ratios, advantages, strict=True) if a * sign > 0], dtype=torch.float64)
        if len(chosen) == 0:
            assert not any(key.startswith(f"ratio/{name}") for key in result)
            continue
        for q in QUANTILES:
            assert result[f"ratio/{name}_q{round(100 * q):02d}"] == pytest.approx(torch.quantile(chosen, q).item())
        assert result[f"ratio/{name}_max"] == pytest.approx(chosen.max().item())
    shares = [result[f"weight/{name}_rate"] for name in ("zero", "damped", "amplified", "reversed")]
    assert sum(shares) <= 1 + 1e-12


def test_without_an_advantage_there_are_no_weights_to_tell_of():
    result = metrics_of([1.0, 2.0], [0.0, 0.0], [0.0, 0.0])
    assert not any(name.startswith(("weight/", "ratio/positive", "ratio/negative")) for name in result)
    assert result["ratio/ess"] == pytest.approx(9 / 5 / 2)


def test_rounding_is_neither_damping_nor_amplification():
    result = metrics_of([2.0, 2.0, 2.0], [1.0] * 3, [2 * (1 + 1e-6), 2 * (1 - 1e-6), 2 * (1 - 1e-4)])
    assert result["weight/damped_rate"] == pytest.approx(1 / 3)
    assert result["weight/amplified_rate"] == 0


def test_kl_after_by_hand():
    """log r = log 2 and −log 4 and 0: k1 = −mean log r; k3 = mean (r − 1 − log r)."""
    new, old = [[math.log(2), -math.log(4)], [-1.0]], [[0.0, 0.0], [-1.0]]
    assert kl_after(new, old) == pytest.approx(
        {"kl/after_k1": math.log(2) / 3, "kl/after_k3": (2.25 - 2 + math.log(2)) / 3}, rel=1e-12
    )
    assert kl_after([[-1e4]], [[0.0]])["kl/after_k1"] == 20.0  # the clamp of log-ratios


def test_update_norm_by_hand():
    parameters = [torch.tensor([1.0, 2.0]), torch.zeros(2, 2)]
    before = sample_coordinates(parameters)
    parameters[0][1], parameters[1][1, 0] = 5.0, 4.0
    assert update_norm(before, parameters) == pytest.approx(5.0, rel=1e-12)
    assert update_norm(sample_coordinates(parameters), parameters) == 0.0


def policy_shaped():
    """Tensors as a policy has them, of 1.6 million coordinates: an embedding, layers of matrices, and short norms."""
    random = torch.Generator().manual_seed(0)
    shapes = [(4000, 64), *[(64, 256), (256, 64), (64,), (64,)] * 40]
    return [torch.randn(shape, generator=random) for shape in shapes]


def norm_of(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).double().norm().item()


def test_a_policy_of_a_million_parameters_is_measured_whole():
    moved = [torch.randn(2**19), torch.randn(2**10, 2**9)]
    assert sum(p.numel() for p in moved) == EXACT_UP_TO_PARAMETERS
    before = sample_coordinates([torch.zeros_like(p) for p in moved])
    assert update_norm(before, moved) == pytest.approx(norm_of(moved), rel=1e-12)


@pytest.mark.parametrize("kind", ["dense", "rows of the embedding", "of unlike size"])
def test_the_estimate_of_a_larger_policy_is_near_its_norm(kind):
    parameters, random = policy_shaped(), torch.Generator().manual_seed(1)
    before = sample_coordinates(parameters)
    moves = [torch.randn(p.shape, generator=random) for p in parameters]
    if kind == "rows of the embedding":
        moves = [moves[0] * (torch.rand(4000, 1, generator=random) < 0.3), *(torch.zeros_like(m) for m in moves[1:])]
    if kind == "of unlike size":
        moves = [move * (1 + n % 5) for n, move in enumerate(moves)]
    for parameter, move in zip(parameters, moves, strict=True):
        parameter.add_(move)
    assert update_norm(before, parameters) == pytest.approx(norm_of(moves), rel=0.05)


class Allocations(TorchDispatchMode):
    """The most bytes of new tensors that were alive at one time."""

    def __init__(self):
        super().__init__()
        self.alive = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {place(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and place(tensor) not in given:
                size = tensor.untyped_storage().nbytes()
                self.alive += size
                self.most = max(self.most, self.alive)
                weakref.finalize(tensor, self.freed, size)
        return made

    def freed(self, size):
        self.alive -= size


def place(tensor):
    return tensor.untyped_storage().data_ptr()


def test_of_a_larger_policy_two_percent_of_the_coordinates_are_copied():
    parameters, allocations = policy_shaped(), Allocations()
    whole = sum(p.nbytes for p in parameters)
    assert sum(p.numel() for p in parameters) > EXACT_UP_TO_PARAMETERS
    with allocations:
        kept = sample_coordinates(parameters)
        assert 0.015 * whole < allocations.alive == sum(map(nbytes, kept)) <= 0.02 * whole
        update_norm(kept, parameters)
    assert allocations.most < 0.06 * whole  # the samples of before and after, and a tensor's difference in float64


def nbytes(tensor):
    """What the tensor keeps alive: a view keeps all of what it is a view of."""
    return tensor.untyped_storage().nbytes()


def test_an_update_with_diagnostics_keeps_two_percent_of_the_parameters(tiny_tokenizer):
    """Bytes of all tensors that are alive at an optimizer step, before it and after it, beside an update without."""
    architecture = tiny.WordsArchitecture(
        task="embedded",
        vocab_size=128,
        hidden_size=128,
        intermediate_size=512,
        num_layers=5,
        num_heads=4,
        num_kv_heads=2,
    )

    def most_alive(record):
        model = tiny.make_model(architecture, tiny_tokenizer, 0, "sdpa")
        policy = Policy(model.eval(), tiny_tokenizer, [2], autocast=False, gradient_checkpointing=False)
        optimizer, seen = torch.optim.SGD(policy.trainable().values(), lr=0.01), []
        for hook in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
            hook(lambda *_: seen.append(alive()))
        learner = learner_of(policy, default_objective("clip"))
        run(learner, make(), epochs=1, minibatches=1, record=record, optimizer=optimizer)
        assert len(seen) == 2
        return max(seen), sum(p.nbytes for p in policy.trainable().values())

    plain, whole = most_alive(None)
    assert whole > 4 * EXACT_UP_TO_PARAMETERS
    assert most_alive(Record())[0] - plain < 0.02 * whole


def alive():
    """Bytes of all tensors that there are."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return sum({place(tensor): nbytes(tensor) for tensor in tensors}.values())


def test_summary_is_the_mean_of_inner_steps_and_the_largest_of_maxima():
    rows = [
        {"epoch": 0, "minibatch": 0, "ratio/tv": 0.1, "ratio/positive_max": 3.0, "kl/before_k3": 1.0},
        {"epoch": 0, "minibatch": 1, "ratio/tv": 0.3, "ratio/positive_max": 2.0, "kl/before_k3": 1.0},
        {"epoch": 1, "minibatch": 0, "ratio/tv": 0.2, "kl/before_k3": 1.0},
    ]
    found = Record([], rows, {"counterfactual/active_norm": 7.0}).summary()
    assert found == {"ratio/tv": pytest.approx(0.2), "ratio/positive_max": 3.0, "counterfactual/active_norm": 7.0}
    assert set(ELSEWHERE) >= {"epoch", "minibatch", "kl/before_k3"}
    assert Record().summary() == {}


# --- in an update


def make(num_rows=8, seed=0):
    """Rows of many lengths whose old log-probs are near those of a random policy of 128 tokens."""
    random, rows = np.random.default_rng(seed), []
    for _ in range(num_rows):
        prompt, completion = (random.integers(7, 128, size=random.integers(1, 9)).tolist() for _ in range(2))
        old_logprobs = (-math.log(128) + 0.3 * random.standard_normal(len(completion))).tolist()
        advantages = [float(random.standard_normal())] * len(completion)
        values, returns = random.standard_normal((2, len(completion))).tolist()
        rows.append(Row(prompt, completion, old_logprobs, advantages, old_logprobs, values, returns))
    return rows


def learner_of(policy, objective, **changes):
    return plain_learner(policy, objective, **{"max_grad_norm": 0.5} | changes)


def weights(policy):
    return torch.cat([p.detach().flatten().clone() for p in policy.trainable().values()])


def run(learner, rows, *, epochs=2, minibatches=2, record=None, lr=0.05, optimizer=None):
    """``update`` under AdamW; the statistics."""
    groups = [{"params": group} for group in learner.parameters()]
    optimizer = optimizer or torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    config, statistics = update_config(num_epochs=epochs, num_minibatches=minibatches), Statistics()
    update(
        replace(learner, update=config), optimizer, rows,
        learning_rates=[lr] * config.steps, random=np.random.default_rng(0), statistics=statistics,
        record=record, failure=None,
    )  # fmt: skip
    return statistics.result()


@pytest.mark.parametrize(
    ("objective", "level"),
    [
        *(pytest.param(o, "token", id=o.name) for o in EVERY),
        *(
            pytest.param(default_objective("clip"), level, id=f"clip-{level}")
            for level in ("sequence", "sequence_token")
        ),
    ],
)
def test_an_inner_step_does_not_depend_on_micro_batches(tiny_policy, objective, level):
    policy, rows, found = tiny_policy(torch.float64, exact=True), make(), []
    for max_tokens in (10_000, 40, 1):
        record, loss = Record(), {"importance": level, "aggregation": "sequence"}
        accumulate(learner_of(policy, objective, loss=loss, max_tokens=max_tokens), rows, Statistics(), record)
        found.append(inner_metrics(record.tokens))
    assert found[1] == pytest.approx(found[0], rel=1e-10, abs=1e-12)
    assert found[2] == pytest.approx(found[0], rel=1e-10, abs=1e-12)


def first_inner(policy, name, level="token"):
    record, loss = Record(), {"importance": level}
    accumulate(learner_of(policy, default_objective(name), loss=loss), make(), Statistics(), record)
    return inner_metrics(record.tokens)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
def test_what_is_read_of_objectives_whose_weights_are_known(tiny_policy, level):
    policy = tiny_policy(torch.float64, exact=True)
    noclip, pspo, clip = (first_inner(policy, name, level) for name in ("noclip", "pspo", "clip"))
    rates = [f"weight/{name}_rate" for name in ("zero", "damped", "amplified", "reversed")]
    assert [noclip[name] for name in rates] == [0, 0, 0, 0]
    assert noclip["weight/mass_kept"] == pytest.approx(1, rel=1e-9)
    assert [pspo[name] for name in rates] == [0, 1, 0, 0]
    assert pspo["weight/mass_kept"] == pytest.approx(0.9, rel=1e-9)
    assert [clip[name] for name in rates[1:]] == [0, 0, 0]
    assert clip["weight/zero_rate"] > 0.05
    assert clip["weight/mass_kept"] < 0.95
    own = ("weight/", "policy/")
    for name, value in noclip.items():  # what is told of the ratios and the KL is the same for all
        assert name.startswith(own) or [clip[name], pspo[name]] == pytest.approx([value] * 2, rel=1e-12, abs=1e-15)


def test_the_numbers_are_those_of_the_tokens_of_the_minibatch(tiny_policy):
    """Against the definitions, from log-probs scored by themselves; clip's weights from its rule."""
    policy, rows = tiny_policy(torch.float64, exact=True), make()
    logprobs, _ = score(policy, rows, 1.0, 10_000, None)
    found = first_inner(policy, "clip")
    d = np.concatenate([np.subtract(new, row.old_logprobs) for new, row in zip(logprobs, rows, strict=True)])
    a, r = np.concatenate([row.advantages for row in rows]), np.exp(d)
    zero = ((a > 0) & (r > 1.2)) | ((a < 0) & (r < 0.8))
    expected = {
        "ratio/ess": r.sum() ** 2 / (r**2).sum() / len(r),
        "ratio/tv": np.abs(r - 1).mean() / 2,
        "kl/before_k1": -d.mean(),
        "kl/before_k3": (r - 1 - d).mean(),
        "weight/zero_rate": zero.mean(),
        "weight/mass_kept": np.abs(r * a)[~zero].sum() / np.abs(r * a).sum(),
        "ratio/positive_q25": np.quantile(r[a > 0], 0.25),
        "ratio/negative_q99": np.quantile(r[a < 0], 0.99),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-8)
    assert 0 < zero.mean() < 1


def test_a_record_has_a_row_for_every_inner_step(tiny_policy):
    record = Record()
    statistics = run(
        learner_of(tiny_policy(), default_objective("pspo")), make(), epochs=3, minibatches=2, record=record
    )
    assert [(row["epoch"], row["minibatch"]) for row in record.rows] == [(e, m) for e in range(3) for m in range(2)]
    assert all(math.isfinite(value) for row in record.rows for value in row.values())
    assert record.probe == {}
    norms = [row["optimizer/grad_norm"] for row in record.rows]
    assert [row["optimizer/grad_norm_clipped"] for row in record.rows] == [min(norm, 0.5) for norm in norms]
    assert sum(norms) / 6 == pytest.approx(statistics["optimizer/grad_norm_mean"], rel=1e-6)
    assert max(norms) > 0.5 > 0


def test_kl_after_and_update_norm_are_those_of_the_step(tiny_policy):
    """One optimizer step, so the policy in hand is the one after it; the probe is every sixty-fourth row."""
    policy, rows, record = tiny_policy(torch.float64, exact=True), make(150), Record()
    before = weights(policy)
    run(learner_of(policy, default_objective("pspo")), rows, epochs=1, minibatches=1, record=record)
    (row,) = record.rows
    assert row["optimizer/update_norm_estimate"] == pytest.approx((weights(policy) - before).norm().item(), rel=1e-9)
    chosen = [rows[i] for i in range(0, 150, ROWS_PER_PROBE_ROW)]
    assert len(chosen) == 3
    logprobs, _ = score(policy, chosen, 1.0, 10_000, None)
    d = np.concatenate([np.subtract(new, each.old_logprobs) for new, each in zip(logprobs, chosen, strict=True)])
    assert row["kl/after_k1"] == pytest.approx(-d.mean(), rel=1e-9)
    assert row["kl/after_k3"] == pytest.approx((np.exp(d) - 1 - d).mean(), rel=1e-9)


def test_kl_is_zero_before_the_first_step_on_fresh_rows_and_not_after_it(tiny_policy):
    policy, record = tiny_policy(torch.float64, exact=True), Record()
    logprobs, _ = score(policy, make(), 1.0, 10_000, None)
    rows = [replace(row, old_logprobs=new) for row, new in zip(make(), logprobs, strict=True)]
    run(learner_of(policy, default_objective("noclip")), rows, epochs=2, minibatches=1, record=record)
    first, second = record.rows
    assert first["kl/before_k3"] == pytest.approx(0, abs=1e-12)
    assert first["ratio/ess"] == pytest.approx(1)
    assert first["kl/after_k3"] == second["kl/before_k3"] > 1e-4  # the next step looks first
    assert first["kl/after_k1"] == second["kl/before_k1"]
    assert second["kl/after_k3"] != second["kl/before_k3"]


@pytest.mark.parametrize(
    ("objective", "critic", "gradient_checkpointing"),
    [
        *(pytest.param(o, None, False, id=o.name) for o in EVERY),
        pytest.param(default_objective("pspo"), "trunk", False, id="pspo-trunk"),
        pytest.param(default_objective("pspo"), "separate", False, id="pspo-separate"),
        pytest.param(default_objective("pspo"), "separate", True, id="pspo-gradient_checkpointing"),
    ],
)
def test_looking_changes_nothing_in_what_is_learned(tiny_policy, objective, critic, gradient_checkpointing):
    """The weights are the same with diagnostics and with a counterfactual probe on top of them."""
    advantage = GAE(
        name="gae", gamma=1.0, lam=0.9, normalize=True, critic=critic or "trunk", value_lr=1e-2, value_weight=0.5,
        value_clip=0.2,
    )  # fmt: skip
    loss = {"kl": "k3", "kl_weight": 0.1, "entropy_weight": 0.01}
    found = []
    for record in (None, Record(), Record([default_objective(name) for name in ("noclip", "cispo", "clip")])):
        policy = tiny_policy(torch.float64, exact=True, gradient_checkpointing=gradient_checkpointing)
        learner = learner_of(policy, objective, loss=loss, critic=make_critic(advantage, policy) if critic else None)
        statistics = run(learner, make(), record=record)
        found.append([*(p.detach() for group in learner.parameters() for p in group), statistics])
    for other in found[1:]:
        assert other[-1] == pytest.approx(found[0][-1], rel=1e-9, abs=1e-12)
        for got, expected in zip(other[:-1], found[0][:-1], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


# --- the counterfactual probe


def test_counterfactual_by_hand():
    gradients = {"pspo": [3.0, 4.0], "noclip": [6.0, 8.0], "clip": [4.0, -3.0], "sapo": [0.0, 0.0]}
    objectives = {name: default_objective(name) for name in gradients}
    found = counterfactual(lambda o: torch.tensor(gradients[o.name]), objectives["pspo"], list(objectives.values())[1:])
    assert math.isnan(found.pop("counterfactual/sapo_cosine"))
    assert found == pytest.approx(
        {
            "counterfactual/active_norm": 5.0,
            "counterfactual/noclip_norm": 10.0,
            "counterfactual/noclip_cosine": 1.0,
            "counterfactual/clip_norm": 5.0,
            "counterfactual/clip_cosine": 0.0,
            "counterfactual/sapo_norm": 0.0,
        },
        abs=1e-12,
    )


def test_the_mass_where_there_is_no_advantage_is_told(tiny_policy):
    """dro pulls back there, clip does not, and clip with a KL to the rollout policy does."""
    policy, rows = tiny_policy(torch.float64, exact=True), make()
    rows = [replace(row, advantages=[0.0] * len(row.token_ids)) if i % 2 else row for i, row in enumerate(rows)]

    def share(name, **loss):
        record = Record()
        accumulate(learner_of(policy, default_objective(name), loss=loss), rows, Statistics(), record)
        return inner_metrics(record.tokens)["gradient/zero_advantage_share"]

    assert share("clip") == 0
    assert 0.01 < share("dro") < 0.9
    assert 0.01 < share("clip", kl="k2", kl_weight=0.5, reference="rollout") < 0.9
    assert share("clip", kl="k2", kl_weight=0.0, reference="rollout") == 0


@pytest.mark.parametrize("name", ["dro", "r2vpo", "tpo", "gppo", "aspo", "pspo_relative"])
def test_a_probe_compares_every_new_objective(tiny_policy, name):
    policy, record = tiny_policy(torch.float64, exact=True), Record([default_objective(name)])
    run(learner_of(policy, default_objective("clip")), make(), record=record, minibatches=1)
    assert record.probe[f"counterfactual/{name}_norm"] > 0
    assert abs(record.probe[f"counterfactual/{name}_cosine"]) <= 1 + 1e-9  # rounding


def test_pspo_has_the_direction_of_noclip_and_its_length_times_one_minus_alpha(tiny_policy):
    policy, record = tiny_policy(torch.float64, exact=True), Record([default_objective(n) for n in ("noclip", "clip")])
    loss = {"kl": "k3", "kl_weight": 0.5, "entropy_weight": 0.3}  # not part of what is compared
    run(learner_of(policy, default_objective("pspo"), loss=loss), make(), record=record)
    probe = record.probe
    assert probe["counterfactual/noclip_cosine"] == pytest.approx(1, abs=1e-12)
    assert probe["counterfactual/active_norm"] == pytest.approx(0.9 * probe["counterfactual/noclip_norm"], rel=1e-12)
    assert -1 <= probe["counterfactual/clip_cosine"] < 0.999
    assert record.summary()["counterfactual/noclip_cosine"] == probe["counterfactual/noclip_cosine"]


def test_the_probe_is_of_the_last_inner_step_and_leaves_its_gradient_alone(tiny_policy):
    """What the optimizer sees is the gradient of the active objective, scaled to its bound."""
    policy, seen = tiny_policy(torch.float64, exact=True), []
    learner = learner_of(policy, default_objective("clip"))
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=0.01)

    def look(made, *_):
        seen.append(torch.cat([p.grad.flatten().clone() for p in policy.trainable().values()]))

    optimizer.register_step_pre_hook(look)
    record = Record([default_objective(name) for name in ("noclip", "sapo", "clip")])
    run(learner, make(), record=record, optimizer=optimizer)
    assert len(seen) == 4
    assert seen[-1].norm().item() == pytest.approx(record.rows[-1]["optimizer/grad_norm_clipped"], rel=1e-5)
    assert record.probe["counterfactual/active_norm"] == pytest.approx(record.rows[-1]["optimizer/grad_norm"], rel=1e-9)
    assert record.probe["counterfactual/clip_cosine"] == pytest.approx(1, abs=1e-12)


# --- configuration


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"every": -1}, "diagnostics.every must be in [0, inf), got -1"),
        ({"counterfactual_every": -1}, "diagnostics.counterfactual_every must be in [0, inf), got -1"),
        (
            {"counterfactual": ["noclip", "pspoo"]},
            "objective in diagnostics.counterfactual: pspoo (did you mean pspo?)",
        ),
        (
            {"counterfactual": [], "counterfactual_every": 2},
            "diagnostics.counterfactual_every=2: needs diagnostics.counterfactual=[noclip,clip,...]",
        ),
    ],
)
def test_bad_fields_are_refused(changes, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        DiagnosticsConfig(**{"every": 1, "counterfactual_every": 0, "counterfactual": ["noclip"]} | changes)


def test_a_probe_of_an_objective_that_does_not_fit_the_run_is_refused():
    overrides = ["loss.importance=sequence", "diagnostics.counterfactual=[noclip,dppo]"]
    assert compose(overrides).diagnostics.counterfactual == ["noclip", "dppo"]  # it is off
    with pytest.raises(ConfigError, match="does not go with objective=dppo"):
        compose([*overrides, "diagnostics.counterfactual_every=2"])


def test_a_probe_of_groups_needs_them_whole():
    overrides = ["diagnostics.counterfactual=[tpo]", "diagnostics.counterfactual_every=2"]
    assert compose([*overrides, "update.num_minibatches=1"])
    with pytest.raises(
        ConfigError, match=r"update\.num_minibatches=4: the probe of tpo needs whole groups; set it to 1"
    ):
        compose([*overrides, "update.num_minibatches=4"])
    told = r"update\.num_minibatches=40: must be at most the 32 rollout\.prompts, as objective=tpo takes whole groups"
    with pytest.raises(ConfigError, match=told):
        compose(["objective=tpo", "update.num_minibatches=40"])


def test_diagnostics_do_not_name_a_run():
    assert identity(compose()) == identity(compose(["diagnostics.every=0", "diagnostics.counterfactual_every=3"]))
