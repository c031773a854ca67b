"""The sampler ``own``: random numbers of a completion, decoding, log-probabilities, the library beside it."""

import dataclasses
import gc
import math
import signal
import weakref

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from training import rollout_config

from pspo.base.stream import generator
from pspo.dataset import Problem, Prompt, render
from pspo.host.interrupt import Interrupted
from pspo.host.memory import NoRoomError
from pspo.model import Policy
from pspo.model.policy import can_share
from pspo.rollout import OwnSampler
from pspo.rollout.sample import random_key
from pspo.rollout.samplers import own
from pspo.rollout.stop import StopStrings
from pspo.update.rows import Row, score

QUESTIONS = ["1+1=", "How many apples?", "Tom has 3 apples and buys 4 more.", "12*5", "?", "Tom buys 60 apples 4 times"]

NO_STOP = StopStrings([], None)


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer):
    """Of seven to some twenty tokens, in no order of length."""
    return [Prompt(Problem(f"p{i}", q, "", ""), render(tiny_tokenizer, "", [q])[0]) for i, q in enumerate(QUESTIONS)]


@pytest.fixture
def policy(tiny_policy):
    """In float64, with a stop token among sixteen tokens, so that rows end at different times."""
    return with_stops(tiny_policy(torch.float64, exact=True))


def with_stops(policy, every=16):
    return dataclasses.replace(policy, stop_ids=list(range(2, policy.model.config.vocab_size, every)))


def sampled(policy, prompts, *, seed=(5, 0, 1), group_size=4, greedy=False, **changes):
    config = (
        rollout_config(max_new_tokens=16, **changes) if "max_new_tokens" not in changes else rollout_config(**changes)
    )
    return OwnSampler(policy, config).sample(prompts, group_size, seed, greedy=greedy)


def by_name(completions):
    return {(c.problem.id, c.prompt.place, c.sample): c.token_ids for c in completions}


def at(place, prompts):
    return [dataclasses.replace(prompt, place=place + i) for i, prompt in enumerate(prompts)]


# The random numbers


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.8}])
@pytest.mark.parametrize(
    ("choose", "changes"),
    [
        pytest.param(lambda p: p, {"max_rows": 1}, id="one row at a time"),
        pytest.param(lambda p: p, {"max_rows": 7}, id="groups cut apart"),
        pytest.param(lambda p: p[::-1], {}, id="reversed"),
        pytest.param(lambda p: p[1:4], {}, id="subset"),
        pytest.param(lambda p: [p[3]], {}, id="alone"),
        pytest.param(lambda p: [p[3], p[0], p[3]], {"max_rows": 5}, id="one twice"),
        pytest.param(lambda p: p, {"group_size": 9, "max_rows": 11}, id="larger group"),
        pytest.param(lambda p: p, {"group_size": 1}, id="smaller group"),
        pytest.param(lambda p: p, {"max_new_tokens": 20}, id="longer"),
    ],
)
def test_a_completion_does_not_depend_on_what_else_is_sampled(policy, prompts, choose, changes, settings):
    reference = by_name(sampled(policy, prompts, **settings))
    chosen = choose(prompts)
    other = by_name(sampled(policy, chosen, **settings | changes))
    shared = reference.keys() & other.keys()
    assert len(shared) == len(set(map(id, chosen))) * min(4, changes.get("group_size", 4))
    assert {name: reference[name] for name in shared} == {name: other[name][:16] for name in shared}


def test_a_longer_prompt_beside_it_changes_nothing(policy, prompts, tiny_tokenizer):
    long = Prompt(Problem("long", "", "", ""), render(tiny_tokenizer, "", [" ".join(QUESTIONS)])[0])
    assert len(long.token_ids) > 2 * max(len(p.token_ids) for p in prompts)
    reference = by_name(sampled(policy, prompts))
    assert reference.items() <= by_name(sampled(policy, [*prompts, long], max_rows=100)).items()


def test_a_problem_drawn_again_at_another_place_gets_other_completions(policy, prompts):
    """Also in one call; the same place gives the same completions, whatever is beside it."""
    once, again = at(3, prompts), at(3 + len(prompts), prompts)
    both = by_name(sampled(policy, [*again, *once], max_rows=9))
    assert by_name(sampled(policy, once)) | by_name(sampled(policy, again)) == both
    pairs = [
        (both[p.problem.id, p.place, g], both[q.problem.id, q.place, g])
        for p, q in zip(once, again, strict=True)
        for g in range(4)
    ]
    assert sum(a == b for a, b in pairs) <= 2  # of 24, some of which are a token or two long


KEY = {"seed": 5, "purpose": 0, "step": 1, "problem": "a", "place": 7, "sample": 2}


def numbers(count, **changes):
    key = KEY | changes
    prompt = Prompt(Problem(key["problem"], "", "", ""), [1], key["place"])
    return generator(*random_key([key["seed"], key["purpose"], key["step"]], prompt, key["sample"])).random(count)


@pytest.mark.parametrize("change", KEY)
def test_every_part_of_the_key_matters(change):
    other = "b" if change == "problem" else KEY[change] + 1
    found = {*numbers(64).tolist(), *numbers(64, **{change: other}).tolist()}
    assert len(found) == 2 * 64


def test_a_number_does_not_depend_on_the_length():
    assert numbers(100)[:7].tolist() == numbers(7).tolist()


def test_random_numbers_of_neighbouring_keys_are_uniform_and_independent():
    found = np.stack([numbers(50, step=step, sample=sample) for step in range(50) for sample in range(8)])
    assert scipy.stats.kstest(found.ravel(), "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(found[:-1].ravel(), found[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(found[:, :-1].ravel(), found[:, 1:].ravel())[0, 1]) < 0.03


def test_random_numbers_are_the_same_for_ever():
    """Golden: Philox4x64 from SeedSequence([5, 0, 1, *BLAKE2b-64("a"), 7, 2]); else no recorded run can be repeated."""
    golden = [0.15875111009692555, 0.6859686945852651, 0.5464562001380122]
    words = [5, 0, 1, 1090035257, 1533428271, 7, 2]
    assert numbers(3).tolist() == golden
    assert np.random.Generator(np.random.Philox(np.random.SeedSequence(words))).random(3).tolist() == golden


def test_another_seed_and_step_give_other_completions(policy, prompts):
    one, step, seed = (by_name(sampled(policy, prompts, seed=s)) for s in ([5, 0, 1], [5, 0, 2], [6, 0, 1]))
    for other in (step, seed):
        assert sum(one[name] == other[name] for name in one) <= 2


def distance_to_edge(model, completion, position, seed, temperature, top_p):
    """How far the drawn uniform, or the nucleus, was from going the other way, in probability."""
    ids = torch.tensor([completion.prompt.token_ids + completion.token_ids[:position]])
    with torch.inference_mode():
        probability = (model(ids).logits[0, -1].double() / temperature).softmax(-1)
    ranked, order = probability.sort(descending=True, stable=True)
    before = ranked.cumsum(0) - ranked
    kept = torch.zeros_like(probability).scatter(0, order, torch.where(before < top_p, ranked, 0.0))
    drawn = generator(*random_key(seed, completion.prompt, completion.sample)).random(position + 1)[-1] * kept.sum()
    edges = [(kept.cumsum(0) - drawn).abs().min()]
    if top_p < 1:
        size = int((before < top_p).sum())
        edges += [(before - top_p).abs().min(), *(ranked[size - 1 : -1] - ranked[size:])[:1]]
    return float(min(edges))


@pytest.mark.parametrize("settings", [(1.0, 1.0), (0.8, 0.9)])
def test_in_float32_rows_differ_only_where_the_draw_is_at_an_edge(tiny_policy, prompts, settings):
    temperature, top_p = settings
    changes = {"group_size": 100, "temperature": temperature, "top_p": top_p, "max_new_tokens": 24}
    policy = tiny_policy(torch.float32)
    reference = sampled(policy, prompts, max_rows=600, **changes)
    other = sampled(policy, prompts[::-1], max_rows=70, **changes)
    tokens = by_name(other)
    differing = [c for c in reference if c.token_ids != tokens[c.problem.id, 0, c.sample]]
    assert len(differing) <= 0.01 * len(reference)
    for completion in differing:
        theirs = tokens[completion.problem.id, 0, completion.sample]
        position = next(t for t, (a, b) in enumerate(zip(completion.token_ids, theirs, strict=False)) if a != b)
        assert distance_to_edge(policy.model, completion, position, [5, 0, 1], temperature, top_p) < 1e-5


def test_the_order_of_the_answers_is_that_of_the_prompts(policy, prompts):
    completions = sampled(policy, prompts, group_size=3, max_rows=4)
    assert [(c.prompt, c.sample) for c in completions] == [(p, g) for p in prompts for g in range(3)]
    assert sampled(policy, []) == []


def watched(policy, monkeypatch):
    """The shapes (rows, positions) of all that is embedded from now on."""
    shapes, embed = [], policy.model.get_input_embeddings()
    monkeypatch.setattr(
        embed, "forward", lambda ids, forward=embed.forward: (shapes.append(tuple(ids.shape)), forward(ids))[1]
    )
    return shapes


@pytest.mark.parametrize("max_rows", [1, 3, 5, 1000])
def test_no_more_rows_than_allowed_are_decoded_at_one_time(policy, prompts, monkeypatch, max_rows):
    shapes = watched(policy, monkeypatch)
    sampled(policy, prompts, max_rows=max_rows)
    assert max(shape[0] for shape in shapes) <= max_rows


@pytest.mark.parametrize("group_size", [1, 8])
def test_a_prompt_is_prefilled_once_for_its_group(policy, prompts, monkeypatch, group_size):
    shapes = watched(policy, monkeypatch)
    sampled(policy, prompts, group_size=group_size)
    assert shapes[0] == (len(prompts), max(len(p.token_ids) for p in prompts))
    assert shapes[1][0] == group_size * len(prompts)
    assert {shape[1] for shape in shapes[1:]} == {1}


def test_equal_prompts_apart_from_each_other_are_written_as_side_by_side(policy, prompts):
    uniform_RT = torch.from_numpy(np.stack([numbers(16, sample=sample) for sample in range(12)]))
    ids = [prompts[n % 3].token_ids for n in range(12)]
    together = sorted(range(12), key=lambda n: n % 3)
    apart = own.decode(policy, ids, uniform_RT, 1.0, 1.0, NO_STOP)
    beside = own.decode(policy, [ids[n] for n in together], uniform_RT[together], 1.0, 1.0, NO_STOP)
    for n, row in zip(together, beside, strict=True):
        assert row == (apart[n][0], pytest.approx(apart[n][1], abs=1e-10), apart[n][2])


# The log-probabilities


def gap(policy, completions, temperature):
    """The largest difference between what the sampler recorded and what the trainer computes."""
    rows = [Row(c.prompt.token_ids, c.token_ids, c.logprobs, [0.0] * len(c.token_ids)) for c in completions]
    found, _ = score(policy, rows, temperature, 1000, None)
    pairs = [
        pair for row, logprobs in zip(rows, found, strict=True) for pair in zip(row.old_logprobs, logprobs, strict=True)
    ]
    return max(abs(recorded - computed) for recorded, computed in pairs)


@pytest.mark.parametrize(
    ("dtype", "attention", "tolerance"),
    [(torch.float64, "sdpa", 1e-10), (torch.float32, "sdpa", 1e-4), (torch.float32, "eager", 1e-4)],
)
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.8, 0.9), (2.5, 0.5)])
def test_recorded_logprobs_are_those_of_the_trainer(
    tiny_policy, prompts, dtype, attention, tolerance, temperature, top_p
):
    policy = with_stops(tiny_policy(dtype, attention=attention, exact=dtype == torch.float64))
    completions = sampled(policy, prompts, temperature=temperature, top_p=top_p, max_rows=10)
    assert gap(policy, completions, temperature) < tolerance
    assert gap(policy, completions, 1.3 * temperature) > 1e-3  # the comparison would notice


def test_recorded_logprobs_under_autocast_are_those_of_the_trainer(tiny_policy, prompts):
    policy = dataclasses.replace(tiny_policy(torch.float32, attention="sdpa"), autocast=True)
    assert gap(policy, sampled(policy, prompts), 1.0) < 0.05


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=str)
def test_adapters_that_have_moved_sample_as_they_train(tiny_policy, prompts, targets):
    peft = pytest.importorskip("peft")
    policy = tiny_policy(torch.float64, exact=True)
    adapters = peft.LoraConfig(r=2, target_modules=targets)
    policy = with_stops(dataclasses.replace(policy, model=peft.inject_adapter_in_model(adapters, policy.model)))
    before = by_name(sampled(policy, prompts))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    completions = sampled(policy, prompts)
    assert by_name(completions) != before
    assert gap(policy, completions, 1.0) < 1e-10


# The library's own generation

BASE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
ARCHITECTURES = {
    "qwen2": lambda: transformers.Qwen2Config(**BASE),
    "qwen2, tied": lambda: transformers.Qwen2Config(**BASE, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**BASE, head_dim=8),
    "llama": lambda: transformers.LlamaConfig(**BASE),
    "mistral, sliding window": lambda: transformers.MistralConfig(**BASE, sliding_window=6),
    "qwen2, sliding and full": lambda: transformers.Qwen2Config(
        **BASE, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "gpt2, learned positions": lambda: transformers.GPT2Config(**GPT),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**{k: v for k, v in BASE.items() if k != "num_key_value_heads"}),
}


@pytest.fixture(params=ARCHITECTURES)
def any_policy(request, tiny_tokenizer):
    """In float64, but for the norms and angles that the library works out in float32."""
    config = ARCHITECTURES[request.param]()
    config.vocab_size, config._attn_implementation = len(tiny_tokenizer), "sdpa"
    config.pad_token_id, config.eos_token_id = tiny_tokenizer.pad_token_id, tiny_tokenizer.eos_token_id
    config.bos_token_id = None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    return with_stops(Policy(model, tiny_tokenizer, [], autocast=False, gradient_checkpointing=False))


def generated(policy, prompts, max_new_tokens):
    """What ``model.generate`` gives greedily: each completion up to its stop token, and whether it stopped."""
    width = max(len(p.token_ids) for p in prompts)
    padding = [width - len(p.token_ids) for p in prompts]
    output = policy.model.generate(
        torch.tensor([[policy.pad_id] * n + p.token_ids for n, p in zip(padding, prompts, strict=True)]),
        attention_mask=torch.tensor([[0] * n + [1] * (width - n) for n in padding]),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=policy.stop_ids,
        pad_token_id=policy.pad_id,
    )
    found = []
    for ids in output[:, width:].tolist():
        end = next((t + 1 for t, i in enumerate(ids) if i in policy.stop_ids), None)
        found.append((ids[:end], end is not None))
    return found


@pytest.mark.parametrize("max_rows", [64, 4, 1])
def test_greedy_is_the_librarys_own(any_policy, prompts, max_rows):
    completions = sampled(any_policy, prompts, greedy=True, group_size=1, max_new_tokens=24, max_rows=max_rows)
    assert all(math.isfinite(x) for c in completions for x in c.logprobs)
    assert [(c.token_ids, c.finished) for c in completions] == generated(any_policy, prompts, 24)


def test_any_architecture_is_trained_as_it_is_sampled(any_policy, prompts):
    assert gap(any_policy, sampled(any_policy, prompts, temperature=0.8, top_p=0.9, max_rows=9), 0.8) < 1e-5


def test_any_architecture_is_trained_alike_where_completions_share_their_prompt(any_policy, prompts):
    completions = sampled(any_policy, prompts, temperature=0.8)
    rows = [Row(c.prompt.token_ids, c.token_ids, c.logprobs, [0.0] * len(c.token_ids)) for c in completions]
    sharing = dataclasses.replace(any_policy, shares_prompts=can_share(any_policy.model))
    windows = any("sliding" in kind for kind in getattr(any_policy.model.config, "layer_types", None) or [])
    assert sharing.shares_prompts is not (windows or any_policy.model.config.model_type == "mistral")
    (found, _), (expected, _) = (score(policy, rows, 0.8, 200, None) for policy in (sharing, any_policy))
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_greedy_in_float32_is_the_librarys_own(tiny_policy, prompts, seed):
    policy = with_stops(tiny_policy(torch.float32, seed=seed))
    completions = sampled(policy, prompts, greedy=True, group_size=1, max_new_tokens=24)
    assert [(c.token_ids, c.finished) for c in completions] == generated(policy, prompts, 24)


# Where a completion ends


def test_a_completion_ends_with_its_stop_token_or_is_cut_off(policy, prompts):
    completions = sampled(policy, prompts, group_size=64, max_rows=500)
    for c in completions:
        stops = [t for t, i in enumerate(c.token_ids) if i in policy.stop_ids]
        assert c.finished == bool(stops)
        assert len(c.token_ids) == (stops[0] + 1 if stops else 16)
        assert len(c.logprobs) == len(c.token_ids)
        assert c.text == policy.tokenizer.decode(c.token_ids, skip_special_tokens=True)
    lengths = {len(c.token_ids) for c in completions if c.finished}
    assert {1, 2, 3} <= lengths  # the test has seen rows end at different times,
    assert any(len(c.token_ids) == 16 and c.finished for c in completions)  # in the very last position,
    assert any(not c.finished for c in completions)  # and never


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_when_finished_rows_leave_the_batch_changes_nothing(policy, prompts, monkeypatch, share):
    reference = sampled(policy, prompts, group_size=8)
    monkeypatch.setattr(own, "COMPACT_BELOW_SHARE", share)
    other = sampled(policy, prompts, group_size=8)
    for a, b in zip(reference, other, strict=True):
        assert (a.token_ids, a.finished, a.text) == (b.token_ids, b.finished, b.text)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-10)


def test_finished_rows_do_leave_the_batch(policy, prompts, monkeypatch):
    shapes = watched(policy, monkeypatch)
    sampled(policy, prompts, group_size=16, max_rows=1000)
    rows = [shape[0] for shape in shapes]
    assert rows[1] == 96
    assert rows[-1] < 0.75 * rows[1]


def test_one_token_is_a_completion_too(policy, prompts):
    completions = sampled(policy, prompts, max_new_tokens=1)
    assert {len(c.token_ids) for c in completions} == {1}
    assert all(c.finished == (c.token_ids[0] in policy.stop_ids) for c in completions)


def test_sampling_leaves_the_global_generators_and_the_weights_alone(policy, prompts):
    before, weights = torch.get_rng_state(), {n: p.clone() for n, p in policy.trainable().items()}
    sampled(policy, prompts)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, weights[name]) for name, p in policy.trainable().items())
    assert all(p.requires_grad for p in policy.trainable().values())


def test_the_weights_of_the_policy_are_those_that_write(policy, tiny_policy, prompts):
    """Also where an optimizer step has changed them in place, and those of the policy that ``refresh`` gives."""
    other = with_stops(tiny_policy(torch.float64, exact=True, seed=1))
    sampler = OwnSampler(policy, rollout_config(max_new_tokens=16))
    before = by_name(sampler.sample(prompts, 4, [5, 0, 1]))
    sampler.refresh(other)
    assert by_name(sampler.sample(prompts, 4, [5, 0, 1])) == by_name(sampled(other, prompts)) != before
    sampler.refresh(policy)
    assert by_name(sampler.sample(prompts, 4, [5, 0, 1])) == before
    with torch.no_grad():
        for parameter, source in zip(policy.model.parameters(), other.model.parameters(), strict=True):
            parameter.copy_(source)
    assert by_name(sampler.sample(prompts, 4, [5, 0, 1])) == by_name(sampled(other, prompts))


def test_it_is_interrupted_between_two_tokens(policy, prompts, monkeypatch):
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 5:
            raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(own.interrupt, "check", check)
    with pytest.raises(Interrupted):
        sampled(policy, prompts)
    assert len(calls) == 5


# Memory


def test_nothing_is_left_of_the_cache(policy, prompts, monkeypatch):
    """Else a GPU would hold it through the updates, until Python happens to look for cycles."""
    made, make = [], own.make_cache

    def cache(config):
        kept = make(config)
        made.append(weakref.ref(kept))
        return kept

    monkeypatch.setattr(own, "make_cache", cache)
    gc.disable()
    try:
        sampled(policy, prompts, max_rows=9)
        assert len(made) == 3
        assert all(kept() is None for kept in made)
    finally:
        gc.enable()


def test_rows_that_do_not_fit_are_halved_once_and_change_nothing(policy, prompts, monkeypatch, caplog):
    expected, decode = sampled(policy, prompts, max_rows=20), own.decode

    def limited(policy, prompts, *given):
        if len(prompts) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return decode(policy, prompts, *given)

    monkeypatch.setattr(own, "decode", limited)
    assert by_name(sampled(policy, prompts, max_rows=20)) == by_name(expected)
    assert "rollout.max_rows=20 does not fit into memory" in caplog.text
    with pytest.raises(NoRoomError, match=r"set rollout\.max_rows=10 or lower"):
        sampled(policy, prompts, max_rows=42)
