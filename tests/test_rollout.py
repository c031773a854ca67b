import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from pspo.rollout.experience import Row, score
from pspo.rollout.samplers.decode import Fused, Library

from pspo import rollout
from pspo.dataset import Problem, Prompt, render
from pspo.host.memory import NoRoomError
from pspo.model import Policy
from pspo.model.attention import can_share
from pspo.rollout import sample, uniforms
from pspo.rollout.samplers.draw import draw

LAST = 1 - 2**-53  # the largest number that the generator gives
QUESTIONS = ["1+1=", "How many apples?", "Tom has 3 apples and buys 4 more.", "12*5", "?", "Tom buys 60 apples 4 times"]


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer):
    """Of seven to some twenty tokens, in no order of length."""
    return [Prompt(Problem(f"p{i}", q, "", ""), render(tiny_tokenizer, "", q)) for i, q in enumerate(QUESTIONS)]


@pytest.fixture
def policy(tiny_policy):
    """In float64, with a stop token among sixteen tokens, so that rows end at different times."""
    return with_stops(tiny_policy(torch.float64, exact=True))


def with_stops(policy, every=16):
    return dataclasses.replace(policy, stop_ids=list(range(2, policy.model.config.vocab_size, every)))


def sampled(policy, prompts, **changes):
    settings = {
        "seed": [5, 0, 1],
        "group_size": 4,
        "max_new_tokens": 16,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_rows": 64,
    }
    return sample(policy, prompts, **(settings | changes))


def by_name(completions):
    return {(c.prompt.problem.id, c.sample): c.token_ids for c in completions}


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
    long = Prompt(Problem("long", "", "", ""), render(tiny_tokenizer, "", " ".join(QUESTIONS)))
    assert len(long.token_ids) > 2 * max(len(p.token_ids) for p in prompts)
    reference = by_name(sampled(policy, prompts))
    assert reference.items() <= by_name(sampled(policy, [*prompts, long], max_rows=100)).items()


@pytest.mark.parametrize("change", ["seed", "kind", "step", "problem"])
def test_every_part_of_the_key_matters(change):
    words = {"seed": 5, "kind": 0, "step": 1, "problem": 77}
    one, other = (uniforms(list(w.values()), 3, 64) for w in (words, words | {change: words[change] + 1}))
    assert not set(one.ravel()) & set(other.ravel())
    assert len(set(one.ravel())) == 3 * 64


def test_a_number_does_not_depend_on_how_many_samples_and_positions_there_are():
    np.testing.assert_array_equal(uniforms([1, 2, 3], 5, 100)[:2, :7], uniforms([1, 2, 3], 2, 7))


def test_random_numbers_of_neighbouring_keys_are_uniform_and_independent():
    numbers = np.concatenate([uniforms([5, 0, step], 8, 50) for step in range(50)])
    assert scipy.stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.03


def test_random_numbers_are_the_same_for_ever():
    """Golden: Philox4x64 from SeedSequence([1, 2, 3]). If these change, no recorded run can be repeated."""
    golden = [0.7198955456932165, 0.012702050455707714, 0.09963616681365695]
    first, second = uniforms([1, 2, 3], 2, 3)
    assert first.tolist() == golden
    counter = np.random.Philox(key=np.random.SeedSequence([1, 2, 3]).generate_state(2, np.uint64), counter=[0, 0, 0, 1])
    assert second.tolist() == np.random.Generator(counter).random(3).tolist()


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
    words = [*seed, *rollout._words(completion.prompt.problem)]
    drawn = uniforms(words, completion.sample + 1, position + 1)[-1, -1] * kept.sum()
    edges = [(kept.cumsum(0) - drawn).abs().min()]
    if top_p < 1:
        size = int((before < top_p).sum())
        edges += [(before - top_p).abs().min(), *(ranked[size - 1 : -1] - ranked[size:])[:1]]
    return float(min(edges))


@pytest.mark.parametrize("settings", [(1.0, 1.0), (0.8, 0.9)])
def test_in_float32_rows_differ_only_where_the_draw_is_at_an_edge(tiny_policy, prompts, settings):
    temperature, top_p = settings
    changes = {"group_size": 200, "temperature": temperature, "top_p": top_p, "max_new_tokens": 24}
    policy = tiny_policy(torch.float32)
    reference = sampled(policy, prompts, max_rows=1200, **changes)
    other = sampled(policy, prompts[::-1], max_rows=70, **changes)
    tokens = by_name(other)
    differing = [c for c in reference if c.token_ids != tokens[c.prompt.problem.id, c.sample]]
    assert len(differing) <= 0.001 * len(reference)
    for completion in differing:
        theirs = tokens[completion.prompt.problem.id, completion.sample]
        position = next(t for t, (a, b) in enumerate(zip(completion.token_ids, theirs, strict=False)) if a != b)
        assert distance_to_edge(policy.model, completion, position, [5, 0, 1], temperature, top_p) < 1e-5


def test_the_order_of_the_answers_is_that_of_the_prompts(policy, prompts):
    completions = sampled(policy, prompts, group_size=3, max_rows=4)
    assert [(c.prompt, c.sample) for c in completions] == [(p, g) for p in prompts for g in range(3)]
    assert sampled(policy, []) == []


@pytest.fixture(params=[Fused, Library], ids=lambda decoder: decoder.__name__)
def each_decoder(request, monkeypatch):
    """The sampler on one decoder, then on the other."""
    monkeypatch.setattr(rollout, "make_decoder", request.param)
    return request.param


def watched(policy, monkeypatch):
    """The shapes (rows, positions) of all that is embedded from now on."""
    shapes = []
    embed = policy.model.get_input_embeddings()
    monkeypatch.setattr(
        embed, "forward", lambda ids, forward=embed.forward: (shapes.append(ids.shape), forward(ids))[1]
    )
    step, read = Fused.step, Fused._read
    monkeypatch.setattr(Fused, "step", lambda self, ids: (shapes.append((len(ids), 1)), step(self, ids))[1])

    def watched_read(self, count, seen, query, pair):
        if not self.prompts:  # the first layer
            shapes.append((count, len(pair) // count))
        return read(self, count, seen, query, pair)

    monkeypatch.setattr(Fused, "_read", watched_read)
    return shapes


@pytest.mark.parametrize("max_rows", [1, 3, 5, 1000])
def test_no_more_rows_than_allowed_are_decoded_at_one_time(each_decoder, policy, prompts, monkeypatch, max_rows):
    shapes = watched(policy, monkeypatch)
    sampled(policy, prompts, max_rows=max_rows)
    assert max(shape[0] for shape in shapes) <= max_rows


def test_a_prompt_is_prefilled_once_for_its_group(each_decoder, policy, prompts, monkeypatch):
    shapes = watched(policy, monkeypatch)
    sampled(policy, prompts, group_size=8)
    assert shapes[0] == (len(prompts), max(len(p.token_ids) for p in prompts))
    assert {shape[1] for shape in shapes[1:]} == {1}


# The draw


def nucleus(probability, top_p):
    """By hand: the most probable tokens, of equal ones the first, until they hold top_p; as probabilities."""
    kept, total = np.zeros(len(probability)), 0.0
    for token in sorted(range(len(probability)), key=lambda i: (-probability[i], i)):
        if total >= top_p:
            break
        kept[token] = probability[token]
        total += probability[token]
    return kept / kept.sum()


PROBABILITY = np.array([0.05, 0.4, 0.0, 0.1, 0.3, 0.15])


def logits_of(probability, rows, dtype=torch.float64):
    return torch.log(torch.tensor(np.asarray(probability), dtype=dtype)).expand(rows, -1)


DISTRIBUTIONS = [
    # By hand: squares 0.0025, 0.16, 0.01, 0.09, 0.0225 over their sum 0.285; the nuclei of 0.4, 0.3, 0.15, 0.1, 0.05.
    (1.0, 1.0, [0.05, 0.4, 0, 0.1, 0.3, 0.15]),
    (0.5, 1.0, [0.0025 / 0.285, 0.16 / 0.285, 0, 0.01 / 0.285, 0.09 / 0.285, 0.0225 / 0.285]),
    (1.0, 0.6, [0, 4 / 7, 0, 0, 3 / 7, 0]),
    (1.0, 0.72, [0, 0.4 / 0.85, 0, 0, 0.3 / 0.85, 0.15 / 0.85]),
    (1.0, 0.3, [0, 1, 0, 0, 0, 0]),
    (0.5, 0.9, [0, 0.16 / 0.2725, 0, 0, 0.09 / 0.2725, 0.0225 / 0.2725]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("temperature", "top_p", "expected"), DISTRIBUTIONS)
def test_draws_have_the_distribution_worked_out_by_hand(temperature, top_p, expected, dtype):
    num = 200_000
    uniform = torch.from_numpy(uniforms([1, 2], 1, num)[0])
    token, logprob = draw(logits_of(PROBABILITY, num, dtype), uniform, temperature, top_p)
    counts, expected = np.bincount(token, minlength=6), np.array(expected)
    assert counts[expected == 0].sum() == 0
    if (expected > 0).sum() > 1:
        assert scipy.stats.chisquare(counts[expected > 0], num * expected[expected > 0]).pvalue > 1e-4
    assert logprob.dtype == dtype
    tempered = PROBABILITY ** (1 / temperature) / (PROBABILITY ** (1 / temperature)).sum()
    np.testing.assert_allclose(logprob, np.log(tempered[token]), atol=1e-6 if dtype == torch.float32 else 1e-12)


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any),
    st.floats(0.01, 1.0),
    st.sampled_from([0.5, 1.0, 1.7]),
)
def test_evenly_spread_numbers_hit_every_token_in_proportion(weights, top_p, temperature):
    """Inverting the distribution function is exact: of N evenly spread numbers each token gets N p, plus or minus 1."""
    num = 4000
    tempered = np.array(weights) ** (1 / temperature)
    expected = nucleus(tempered / tempered.sum(), top_p)
    uniform = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    token, _ = draw(logits_of(weights, num), uniform, temperature, top_p)
    counts = np.bincount(token, minlength=len(weights))
    if np.abs(np.cumsum(np.sort(tempered / tempered.sum())[::-1]) - top_p).min() > 1e-9 or top_p == 1:
        assert np.abs(counts - num * expected).max() <= 1 + 1e-6
        assert counts[expected == 0].sum() == 0


@pytest.mark.parametrize(("top_p", "kept"), [(0.25 - 1e-9, 1), (0.25 + 1e-9, 2), (0.5 - 1e-9, 2), (0.75 + 1e-9, 4)])
def test_of_equally_probable_tokens_the_nucleus_takes_no_more_than_it_needs(top_p, kept):
    uniform = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    token, _ = draw(torch.zeros(400, 4, dtype=torch.float64), uniform, 1.0, top_p)
    assert sorted(set(token.tolist())) == list(range(kept))


def test_the_nucleus_ends_where_it_reaches_top_p():
    """0.5 + 0.25 is 0.75 without rounding: the third token is not needed, and a hair more needs it."""
    logits = torch.log2(torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64)) * math.log(2)
    for top_p, last in ((0.5 - 1e-12, 0), (0.75 - 1e-12, 1), (0.75 + 1e-12, 2), (0.875 + 1e-12, 3)):
        assert draw(logits, torch.tensor([LAST], dtype=torch.float64), 1.0, top_p)[0].item() == last


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.9, 1.0])
def test_tokens_without_probability_are_never_drawn(dtype, top_p):
    """Not at the ends of the vocabulary, and not at an exact edge of the distribution function."""
    probability = np.array([0, 0, 0.25, 0, 0.5, 0, 0.25, 0, 0])
    edges = [0.0, 2**-53, 0.25, 0.75, np.nextafter(0.25, 0), np.nextafter(0.75, 0), np.nextafter(0.75, 1), LAST]
    uniform = torch.tensor(edges, dtype=torch.float64)
    token, logprob = draw(logits_of(probability, len(edges), dtype), uniform, 1.0, top_p)
    assert (probability[token] > 0).all()
    assert logprob.isfinite().all()
    if top_p == 1:
        assert token[0] == 2
        assert token[-1] == 6


@given(st.integers(0, 2**32), st.integers(1, 300))
def test_the_largest_number_draws_the_last_possible_token(seed, size):
    generator = np.random.default_rng(seed)
    logits = torch.from_numpy(generator.normal(0, 5, size))
    logits[torch.from_numpy(generator.random(size) < 0.3)] = -torch.inf
    if logits.isfinite().any():
        possible = logits.double().softmax(-1).nonzero().squeeze(-1)
        token, _ = draw(logits.expand(2, -1), torch.tensor([0.0, LAST], dtype=torch.float64), 1.0, 1.0)
        assert token.tolist() == [possible[0], possible[-1]]


@pytest.mark.parametrize("scale", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_vocabulary_of_152_thousand(scale, top_p):
    vocabulary, rows = 151_936, 4
    logits = scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))
    uniform = torch.tensor([0.0, 0.3, 0.9999999, LAST], dtype=torch.float64)
    token, logprob = draw(logits, uniform, 1.0, top_p)
    for row in range(rows):
        exact = torch.log_softmax(logits[row].double(), -1).exp().numpy()
        kept = nucleus(exact, top_p)
        upper = kept.cumsum()[token[row]]
        assert kept[token[row]] > 0 or abs(exact[token[row]] - exact[kept > 0].min()) < 1e-9
        assert upper - kept[token[row]] - 1e-6 <= uniform[row] <= upper + 1e-6
        assert logprob[row].item() == pytest.approx(np.log(exact[token[row]]), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_a_large_vocabulary_are_exact_to_a_thousandth_of_a_token(dtype):
    vocabulary, wanted = 151_936, torch.tensor([0, 1, 76_543, 100_001, 151_000, 151_935])
    for within in (0.001, 0.999):
        uniform = (wanted.double() + within) / vocabulary
        token, _ = draw(torch.zeros(len(wanted), vocabulary, dtype=dtype), uniform, 1.0, 1.0)
        assert token.tolist() == wanted.tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("vocabulary", [5, 5000])
def test_logits_that_are_not_numbers_draw_a_token_and_say_so(temperature, top_p, vocabulary):
    """The update then refuses the step in one sentence; an index outside the vocabulary would crash a GPU before."""
    logits = torch.full((2, vocabulary), torch.nan)
    logits[1] = torch.arange(vocabulary)
    logits[1, 3] = torch.inf
    token, logprob = draw(logits, torch.tensor([0.0, LAST], dtype=torch.float64), temperature, top_p)
    assert ((token >= 0) & (token < vocabulary)).all()
    assert logprob.isnan().all()


def test_temperature_zero_takes_the_most_probable_token():
    uniform = torch.from_numpy(uniforms([3], 1, 8)[0])
    token, logprob = draw(logits_of(PROBABILITY, 8), uniform, 0.0, 1.0)
    assert token.tolist() == [1] * 8
    assert logprob.tolist() == pytest.approx([np.log(0.4)] * 8)


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
    policy = with_stops(tiny_policy(dtype, attention=attention))
    completions = sampled(policy, prompts, temperature=temperature, top_p=top_p, max_rows=10)
    assert gap(policy, completions, temperature) < tolerance
    assert gap(policy, completions, 1.3 * temperature) > 1e-3  # the comparison would notice


def test_recorded_logprobs_under_autocast_are_those_of_the_trainer(tiny_policy, prompts):
    policy = dataclasses.replace(tiny_policy(torch.float32, attention="sdpa"), autocast=True)
    assert gap(policy, sampled(policy, prompts), 1.0) < 0.05


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


OURS = ["qwen2, by grouped", "qwen2, tied, by grouped", "llama, by grouped"]  # our layers, in sampling and in training


@pytest.fixture(params=[*ARCHITECTURES, *OURS])
def any_policy(request, tiny_tokenizer):
    name, _, attention = request.param.partition(", by ")
    config = ARCHITECTURES[name]()
    config.vocab_size, config._attn_implementation = len(tiny_tokenizer), attention or "sdpa"
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
    completions = sampled(any_policy, prompts, temperature=0.0, group_size=1, max_new_tokens=24, max_rows=max_rows)
    assert all(math.isfinite(x) for c in completions for x in c.logprobs)
    assert [(c.token_ids, c.finished) for c in completions] == generated(any_policy, prompts, 24)


def test_any_architecture_is_trained_as_it_is_sampled(any_policy, prompts):
    assert gap(any_policy, sampled(any_policy, prompts, temperature=0.8, top_p=0.9, max_rows=9), 0.8) < 1e-10


def test_any_architecture_is_trained_alike_where_completions_share_their_prompt(any_policy, prompts):
    completions = sampled(any_policy, prompts, temperature=0.8)
    rows = [Row(c.prompt.token_ids, c.token_ids, c.logprobs, [0.0] * len(c.token_ids)) for c in completions]
    sharing = dataclasses.replace(any_policy, shares_prompts=can_share(any_policy.model))
    windows = any("sliding" in kind for kind in getattr(any_policy.model.config, "layer_types", None) or [])
    assert sharing.shares_prompts is not (windows or any_policy.model.config.model_type == "mistral")
    (found, _), (expected, _) = (score(policy, rows, 0.8, 200, None) for policy in (sharing, any_policy))
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_greedy_in_float32_is_the_librarys_own(tiny_policy, prompts, seed):
    policy = with_stops(tiny_policy(torch.float32, seed=seed))
    completions = sampled(policy, prompts, temperature=0.0, group_size=1, max_new_tokens=24)
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
def test_when_finished_rows_leave_the_batch_changes_nothing(each_decoder, policy, prompts, monkeypatch, share):
    reference = sampled(policy, prompts, group_size=8)
    monkeypatch.setattr(rollout, "COMPACT_BELOW", share)
    other = sampled(policy, prompts, group_size=8)
    assert by_name(other) == by_name(reference)
    for a, b in zip(reference, other, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-10)
        assert (a.finished, a.text) == (b.finished, b.text)


def test_finished_rows_do_leave_the_batch(each_decoder, policy, prompts, monkeypatch):
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


# Memory


def test_rows_that_do_not_fit_are_halved_once_and_change_nothing(policy, prompts, monkeypatch, caplog):
    expected, decode = sampled(policy, prompts, max_rows=20), rollout._in_step

    def limited(policy, prompts, *given):
        if len(prompts) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return decode(policy, prompts, *given)

    monkeypatch.setattr(rollout, "_in_step", limited)
    assert by_name(sampled(policy, prompts, max_rows=20)) == by_name(expected)
    assert "rollout.max_rows=20 does not fit into memory" in caplog.text
    with pytest.raises(NoRoomError, match=r"set rollout\.max_rows=10 or lower"):
        sampled(policy, prompts, max_rows=42)
