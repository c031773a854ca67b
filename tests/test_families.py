"""Published families of models, with tiny random weights: their chat templates, stop tokens, sampling and training."""

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
import transformers
from test_model import CPU, assert_one_sentence, configured, logprobs
from training import by_length, learner_of, rollout_config
from training import configured as composed

from pspo import dataset, model
from pspo.base.schema import ConfigError
from pspo.config import compose
from pspo.dataset import Problem
from pspo.model import tiny
from pspo.objective import default_objective
from pspo.rollout import OwnSampler
from pspo.tracker import Tracker
from pspo.trainer import Trainer
from pspo.update.rows import Row, score
from tests.conftest import TEXTS

SYSTEM, QUESTION = "Be brief.", "12*5"
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip

# The published templates, without tools, images and several parts of a message.
QWEN2 = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN3 = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- m.content + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first = messages[0]['content'] + '\n\n' -%}{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for m in rest -%}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family: the library's configuration, the template with its special tokens, and what they come to."""

    config: Callable
    template: str
    bos: str | None
    eos: str
    others: list[str]  # further tokens of the template
    stops: set[str]  # tokens at which generation stops
    prompt: str  # of ``QUESTION`` behind ``SYSTEM``, or alone where the template refuses a system message
    sizes: dict = dataclasses.field(default_factory=dict)
    kwargs: dict = dataclasses.field(default_factory=dict)


def with_vision(vocab_size, **settings):
    """The larger Gemma 3: the same text model beside a tower for images, which no text reaches."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {name: settings.pop(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    images = {"image_token_index": 0, "boi_token_index": 0, "eoi_token_index": 0}
    text = transformers.Gemma3TextConfig(vocab_size=vocab_size, **settings, **ends)
    tower = {"vision_config": vision | {"image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4}
    return transformers.Gemma3Config(text_config=text, **tower, **images, **ends)


CHATML = ["<|im_start|>", "<|im_end|>"]
TURNS = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n12*5<|im_end|>\n<|im_start|>assistant\n"
FAMILIES = {
    "qwen2.5, base": Family(
        transformers.Qwen2Config, QWEN2, None, "<|endoftext|>", CHATML, {"<|endoftext|>", "<|im_end|>"}, TURNS
    ),
    "qwen3": Family(
        transformers.Qwen3Config, QWEN3, None, "<|im_end|>", [*CHATML, "<|endoftext|>", "<think>", "</think>"],
        {"<|im_end|>"}, TURNS + "<think>\n\n</think>\n\n", {"head_dim": 16}, {"enable_thinking": False},
    ),
    "llama3": Family(
        transformers.LlamaConfig, LLAMA3, "<|begin_of_text|>", "<|end_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], {"<|end_of_text|>", "<|eot_id|>"},
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n12*5<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        {"tie_word_embeddings": True, "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }},
    ),
    "gemma3": Family(
        transformers.Gemma3TextConfig, GEMMA3, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"],
        {"<eos>", "<end_of_turn>"},
        "<bos><start_of_turn>user\nBe brief.\n\n12*5<end_of_turn>\n<start_of_turn>model\n",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mistral": Family(
        transformers.MistralConfig, MISTRAL, "<s>", "</s>", ["[INST]", "[/INST]"], {"</s>"}, "<s>[INST] 12*5 [/INST]",
        {"sliding_window": 6},
    ),
}  # fmt: skip
FAMILIES["gemma3, vision"] = dataclasses.replace(FAMILIES["gemma3"], config=with_vision)


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def folder(family, tmp_path):
    """The folder of a model of the family, as its publisher's: special tokens, template, random weights."""
    encoder = tiny.train_tokenizer([*TEXTS, SYSTEM, "system user assistant model"], 128)
    ends = {"bos_token": family.bos, "eos_token": family.eos, "pad_token": family.eos}
    encoder.add_special_tokens({name: token for name, token in ends.items() if token})
    encoder.add_special_tokens({"extra_special_tokens": family.others})
    encoder.chat_template = family.template
    config = family.config(
        vocab_size=len(encoder), **SIZES | family.sizes,
        bos_token_id=encoder.bos_token_id, eos_token_id=encoder.eos_token_id, pad_token_id=encoder.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "published")
    encoder.save_pretrained(tmp_path / "published")
    return tmp_path / "published"


def prompts_of(encoder, family, num=4):
    """Prompts of different lengths by the chat template, all longer than the sliding window."""
    system_prompt = SYSTEM if SYSTEM in family.prompt else ""
    settings = dataclasses.replace(composed("dataset=gsm8k").dataset, system_prompt=system_prompt)
    questions = [QUESTION, *(f"{TEXTS[0][: 9 * n]}" for n in range(1, num))]
    prompts, dropped = dataset.encode(encoder, settings, [Problem(f"p{n}", q, "", "") for n, q in enumerate(questions)])
    assert dropped == 0
    return prompts


def test_its_prompt_and_its_stop_tokens_are_those_of_its_publisher(folder, family):
    config = configured(folder, chat_template_kwargs=family.kwargs)
    encoder = model.tokenizer(config)
    ids = prompts_of(encoder, family)[0].token_ids
    assert encoder.decode(ids) == family.prompt
    assert ids == encoder.encode(family.prompt, add_special_tokens=False)  # one beginning of the text, not two
    policy = model.load(config, 0, CPU)
    assert set(policy.tokenizer.convert_ids_to_tokens(policy.stop_ids)) == family.stops


def test_it_is_sampled_trained_saved_and_loaded_as_one_policy(folder, family, tmp_path):
    """Whole steps of the trainer, whose guard compares sampler and trainer, on prompts longer than its windows."""
    config = configured(folder, chat_template_kwargs=family.kwargs)
    policy = model.load(config, 0, CPU)
    prompts = prompts_of(policy.tokenizer, family)
    assert min(len(prompt.token_ids) for prompt in prompts) > 6
    settings = composed(
        "tracker=jsonl", "budget.steps=2", "rollout.prompts=4", "rollout.group_size=4", "rollout.max_new_tokens=12",
        "optimizer.lr=1e-2", "optimizer.warmup_steps=0", "checkpoint.every=1",
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    tracker = Tracker(settings.tracker, tmp_path / "run")

    def reward(completions):
        return [by_length(c.text, c.problem) for c in completions]

    Trainer(settings, tmp_path / "run", policy, prompts, [], reward, tracker).run()
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(step["policy/sampler_gap_mean"] for step in steps if "policy/sampler_gap_mean" in step) < 1e-6

    completions = OwnSampler(policy, rollout_config(max_new_tokens=12)).sample(prompts, 4, [1])
    rows = [Row(c.prompt.token_ids, c.token_ids, c.logprobs, []) for c in completions]
    for found, row in zip(score(policy, rows, 1.0, 200, None)[0], rows, strict=True):
        assert found == pytest.approx(row.old_logprobs, abs=1e-5)
    pairs = [(row.prompt_ids, row.token_ids) for row in rows]
    with torch.no_grad():
        start, trained = logprobs(model.load(config, 0, CPU), pairs), logprobs(policy, pairs)
        assert (start - trained).abs().max() > 0.05  # it has learned something
        model.save(policy, tmp_path / "trained", prompts[0].token_ids)
        again = dataclasses.replace(config, path=str(tmp_path / "trained"))
        model.check(again)
        loaded = model.load(again, 0, CPU)
        torch.testing.assert_close(logprobs(loaded, pairs), trained, atol=1e-5, rtol=0)
    assert loaded.stop_ids == policy.stop_ids
    assert [p.token_ids for p in prompts_of(loaded.tokenizer, family)] == [p.token_ids for p in prompts]


@pytest.mark.parametrize("family", [FAMILIES["mistral"]], ids=["mistral"])
def test_a_template_that_refuses_roles_is_one_sentence(folder, family):
    encoder = model.tokenizer(configured(folder))
    with pytest.raises(ConfigError, match=r"refuses: Conversation roles must alternate user/.*; it writes") as caught:
        dataset.render(encoder, SYSTEM, [QUESTION])
    assert str(caught.value).endswith('set dataset.system_prompt=""')
    assert_one_sentence(str(caught.value))
    encoder.chat_template = "{{ raise_exception('no\n  prompt.\n') }}"
    with pytest.raises(ConfigError, match="refuses: no prompt; mend chat_template") as caught:
        dataset.render(encoder, "", [QUESTION])
    assert_one_sentence(str(caught.value))


@pytest.mark.parametrize("family", [FAMILIES["llama3"]], ids=["llama3"])
@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% if %}", {"rag": "x"}], ids=str)
def test_a_template_that_is_not_used_refuses_nothing(folder, family, template):
    """With dataset.prompt: its end of a turn is not known then, the model's own end of the text is."""
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    stored = [{"name": n, "template": t} for n, t in template.items()] if isinstance(template, dict) else template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": stored}))
    policy = model.load(configured(folder), 0, CPU)
    assert policy.tokenizer.convert_ids_to_tokens(policy.stop_ids) == ["<|end_of_text|>"]
    (ids,) = dataset.render(policy.tokenizer, "", [QUESTION], prompt="Q: {question}")
    assert policy.tokenizer.decode(ids) == f"{'<|begin_of_text|>' * (ids[0] == policy.tokenizer.bos_token_id)}Q: 12*5"
    assert learner_of(policy, default_objective("noclip"))  # trains like any other


@pytest.mark.parametrize("family", [FAMILIES["qwen3"]], ids=["qwen3"])
def test_the_chat_template_reads_what_is_given_to_it(folder, family):
    """Also one that is read from the command line, and with every prompt alike, worked examples included."""
    given = compose(["model=hf", f"model.path={folder}", "model.chat_template_kwargs.enable_thinking=false"]).model
    assert given.chat_template_kwargs == {"enable_thinking": False}
    (thinking,), (not_thinking,) = (
        dataset.render(model.tokenizer(config), "", [QUESTION], shots=[Problem("s", "1+1=", "2", "2")])
        for config in (configured(folder), given)
    )
    encoder = model.tokenizer(given)
    assert not_thinking == thinking + encoder.encode("<think>\n\n</think>\n\n", add_special_tokens=False)


@pytest.mark.parametrize("family", [FAMILIES["qwen3"]], ids=["qwen3"])
@pytest.mark.parametrize("name", ["enable_thinkin", "padding", "messages", "add_generation_prompt"])
def test_a_variable_that_the_chat_template_does_not_read_is_refused(folder, family, name):
    config = configured(folder, chat_template_kwargs={name: True})
    told = rf"model\.chat_template_kwargs=.*: {name} is no variable that the model's chat template leaves open"
    with pytest.raises(ConfigError, match=told) as caught:
        model.tokenizer(config)
    assert_one_sentence(str(caught.value))
