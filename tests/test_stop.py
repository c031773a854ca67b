"""Stop strings: where a completion ends, and that nothing else about it changes."""

import dataclasses
import itertools
import re

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as decoding
from training import rollout_config

from pspo.base.schema import ConfigError
from pspo.config import compose
from pspo.dataset import Problem, Prompt, render
from pspo.rollout import OwnSampler
from pspo.rollout.samplers import own
from pspo.rollout.stop import StopStrings
from pspo.update.rows import Row, score

QUESTIONS = ["1+1=", "How many apples?", "Tom has 3 apples and buys 4 more.", "12*5"]


@pytest.fixture
def policy(tiny_policy):
    """In float64, with stop tokens, so that rows end at both."""
    policy = tiny_policy(torch.float64, exact=True)
    return dataclasses.replace(policy, stop_ids=list(range(2, 128, 32)))


@pytest.fixture
def prompts(tiny_tokenizer):
    texts = [render(tiny_tokenizer, "", [question], prompt="Q: {question}\nA:")[0] for question in QUESTIONS]
    return [Prompt(Problem(f"p{i}", "", "", ""), ids) for i, ids in enumerate(texts)]


def sampled(policy, prompts, **changes):
    return OwnSampler(policy, rollout_config(max_new_tokens=24, **changes)).sample(prompts, 16, [5])


def cut(completion, strings, tokenizer):
    """The first tokens whose text holds a stop string, looked for one token after the other."""
    for n in range(1, len(completion.token_ids) + 1):
        text = tokenizer.decode(completion.token_ids[:n], skip_special_tokens=True)
        if any(string in text for string in strings):
            return completion.token_ids[:n], min(text.find(s) for s in strings if s in text), True
    return completion.token_ids, None, completion.finished


@pytest.mark.parametrize("max_rows", [64, 27])
@pytest.mark.parametrize("strings", [["\n"], ["7", "buys", "e 4"]], ids=str)
def test_a_completion_is_the_one_without_stop_strings_up_to_the_first(policy, prompts, strings, max_rows):
    plain = sampled(policy, prompts)
    strings = [*strings, plain[5].text[2:6]]  # that several tokens spell
    stopped, differ = sampled(policy, prompts, stop=strings, max_rows=max_rows), 0
    for before, after in zip(plain, stopped, strict=True):
        ids, place, finished = cut(before, strings, policy.tokenizer)
        assert (after.token_ids, after.finished) == (ids, finished)
        assert after.logprobs == pytest.approx(before.logprobs[: len(ids)], abs=1e-10)
        assert after.text == policy.tokenizer.decode(ids, skip_special_tokens=True)[:place]
        assert not any(string in after.text for string in strings)
        differ += place is not None
    assert 0 < differ < len(plain)
    rows = [Row(c.prompt.token_ids, c.token_ids, c.logprobs, []) for c in stopped]
    for row, found in zip(rows, score(policy, rows, 1.0, 1000, None)[0], strict=True):
        assert found == pytest.approx(row.old_logprobs, abs=1e-10)


def test_a_base_model_without_a_template_ends_its_answer_before_the_next_question(policy, prompts, tiny_tokenizer):
    """The plain prompt of ``dataset.prompt`` shows questions line by line, which such a model goes on to write."""
    stopped = sampled(policy, prompts, stop=["\n", "Q:"])
    assert sum(c.finished and c.token_ids[-1] not in policy.stop_ids for c in stopped) > 5
    assert not any("\n" in c.text for c in stopped)
    assert any("\n" in tiny_tokenizer.decode(c.token_ids) for c in stopped)  # trained on, as the model wrote it


def test_rows_stop_being_decoded_and_without_stop_strings_no_text_is_looked_at(policy, prompts, monkeypatch):
    looked, decoded, states = [], [], own._states
    monkeypatch.setattr(
        StopStrings, "completed", lambda self, ids, f=StopStrings.completed: looked.append(1) or f(self, ids)
    )
    monkeypatch.setattr(own, "_states", lambda *given: decoded.append(len(given[2])) or states(*given))
    policy = dataclasses.replace(policy, stop_ids=[3])
    sampled(policy, prompts)
    assert looked == []
    before = sum(decoded)
    decoded.clear()
    sampled(policy, prompts, stop=["1", "2", "3", "a", "e", "o", " "])
    assert looked
    assert sum(decoded) < 0.6 * before


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Every byte a token, and one special token."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoding.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")


@given(
    text=st.text("ab é😀\n", max_size=12),
    strings=st.lists(st.text("ab é😀\n", min_size=1, max_size=3), min_size=1, max_size=3),
    special=st.lists(st.integers(0, 30), max_size=3),
)
def test_letters_of_many_bytes_and_special_tokens_within_are_no_obstacle(byte_tokenizer, text, strings, special):
    ids = byte_tokenizer.encode(text, add_special_tokens=False)
    for place in special:  # without text
        ids.insert(place, byte_tokenizer.eos_token_id)
    stop, logprobs = StopStrings(strings, byte_tokenizer), [-float(n) for n in range(len(ids))]
    ends = [n for n in range(1, len(ids) + 1) if any(s in stop.tokenizer.decode(ids[:n], True) for s in strings)]
    found, values, finished = stop.cut(ids, logprobs, False)
    assert (found, finished) == ((ids[: ends[0]], True) if ends else (ids, False))
    assert values == logprobs[: len(found)]
    assert stop.text(found) == re.split("|".join(map(re.escape, strings)), text)[0] or ends
    if ends:
        before = ids[: ends[0] - 1]
        assert stop.completed(torch.tensor([ids[: ends[0]]])) == [True]
        assert not before or stop.completed(torch.tensor([before])) == [False]
        assert not any(s in stop.text(found) for s in strings)
    else:
        assert stop.text(found) == text


@pytest.mark.parametrize(
    ("override", "strings"),
    [
        ("rollout.stop=['Q:']", ["Q:"]),
        ("rollout.stop=[Question:]", ["Question:"]),
        ('rollout.stop=["\n\nQ:", "###"]', ["\n\nQ:", "###"]),
        ("rollout.stop=[]", []),
    ],
)
def test_a_command_line_gives_them(override, strings):
    assert compose([override]).rollout.stop == strings


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("rollout.stop=['']", "rollout.stop=['']: every text holds the empty string"),
        ("rollout.stop=Q", "rollout.stop must be a list, each item text, got 'Q'"),
        ("rollout.stop=[1]", "rollout.stop must be a list, each item text, got [1]"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(override, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        compose([override])


def test_answers_of_an_evaluation_stop_there_too(policy, prompts):
    """Greedy ones as well."""
    sampler = OwnSampler(policy, rollout_config(max_new_tokens=24))
    plain = sampler.sample(prompts, 1, [5], greedy=True)
    string = next(c.text[3:5] for c in plain if len(c.text) > 6)
    stopped = OwnSampler(policy, rollout_config(max_new_tokens=24, stop=[string])).sample(prompts, 1, [5], greedy=True)
    texts = [c.text for c in stopped]
    assert texts == [text.partition(string)[0] for text in (c.text for c in plain)]
    assert len(list(itertools.chain(*(c.token_ids for c in stopped)))) < sum(len(c.token_ids) for c in plain)
