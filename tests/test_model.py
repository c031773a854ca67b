import copy
import dataclasses
import functools
import hashlib
import json
import re
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from training import rollout_config
from transformers import Qwen2Config, Qwen2ForCausalLM

from pspo import model
from pspo.base.files import SaveError
from pspo.base.schema import ConfigError
from pspo.dataset import Problem, Prompt, render
from pspo.host import hub
from pspo.model import source, tiny, warm_start
from pspo.model.batch import make_batch
from pspo.model.config import LoraConfig, WarmStart
from pspo.model.logprob import autocast_to_bfloat16, predicting_states, token_logprobs
from pspo.model.policy import can_share, merged_weights
from pspo.rollout import OwnSampler

CPU = torch.device("cpu")
ARCHITECTURE = tiny.WordsArchitecture(
    task="embedded", vocab_size=200, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2
)
WARM_START = WarmStart(worked_steps=3, mixed_steps=2, worked_share=0.25, batch_size=4, num_problems=32, lr=2e-3)


def configured(path=None, **changes):
    values = {
        "name": "test",
        "hub_id": None,
        "path": str(path) if path else None,
        "dtype": "float32",
        "autocast": False,
        "attention": "sdpa",
        "gradient_checkpointing": False,
        "chat_template_kwargs": {},
        "lora": LoraConfig(rank=0, alpha=16, target_modules="all-linear"),
        "architecture": None if path or "hub_id" in changes else ARCHITECTURE,
        "warm_start": None if path or "hub_id" in changes else WARM_START,
    }
    return model.ModelConfig(**values | changes)


@pytest.fixture
def saved(tmp_path, tiny_policy):
    """A directory as ``save`` makes it, and the policy in it."""
    policy = tiny_policy(attention="sdpa")
    model.save(policy, tmp_path / "saved")
    return tmp_path / "saved", policy


@pytest.fixture
def prompts(tiny_tokenizer):
    questions = ["1+1=", "How many apples?", "12*5"]
    return [Prompt(Problem(f"p{i}", q, "", ""), render(tiny_tokenizer, "", [q])[0]) for i, q in enumerate(questions)]


def sample(policy, prompts, seed=(1,), group_size=2, max_new_tokens=8, top_p=1.0):
    limits = {"max_new_tokens": max_new_tokens, "top_p": top_p, "max_rows": 100}
    config = rollout_config(prompts=len(prompts), group_size=group_size, **limits)
    return OwnSampler(policy, config).sample(prompts, group_size, seed)


def assert_one_sentence(message):
    assert "\n" not in message
    assert not re.search(r"\.\s+[A-Z]", message)
    assert not message.endswith(".")


# What is refused, before anything is loaded


def remove(name):
    def change(directory):
        (directory / name).unlink()

    return change


def pickled(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def configuring(**changes):
    def change(directory):
        settings = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(settings | changes))

    return change


def without_template(directory):
    (directory / "chat_template.jinja").unlink()
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def sharded(directory):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shutil.rmtree, "does not exist"),
        (remove("config.json"), "has no readable config.json"),
        (remove("model.safetensors"), r"has no \*.safetensors"),
        (pickled, r"has no \*.safetensors weights \(pickles are not loaded\)"),
        (sharded, "has no model-00002-of-00002.safetensors"),
        (remove("tokenizer.json"), "has no tokenizer"),
        (configuring(quantization_config={"quant_method": "gptq"}), "holds quantized weights, which cannot be trained"),
        (
            configuring(model_type="unheard_of"),
            "is of type unheard_of, no causal language model that transformers knows",
        ),
        (configuring(model_type="t5"), "is of type t5, no causal language model"),
    ],
)
def test_a_directory_that_lacks_something_is_refused_in_one_sentence(saved, change, reason):
    directory, _ = saved
    config = configured(directory)
    model.check(config)
    change(directory)
    with pytest.raises(ConfigError, match=reason) as caught:
        model.check(config)
    assert str(caught.value).startswith(f"model.path={directory} ")
    assert_one_sentence(str(caught.value))


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}, {"intermediate_size": 48}]
)
def test_weights_that_do_not_fit_are_refused_and_not_drawn_at_random(saved, change):
    directory, _ = saved
    configuring(**change)(directory)
    with pytest.raises(ConfigError, match=r"the weight model\.layers\S+ is missing, or not of the shape") as caught:
        model.load(configured(directory), 0, CPU)
    assert_one_sentence(str(caught.value))


def test_a_chat_template_may_stand_in_either_file_or_in_none(saved):
    directory, _ = saved
    template = (directory / "chat_template.jinja").read_text()
    without_template(directory)
    model.check(configured(directory))
    assert not model.tokenizer(configured(directory)).chat_template
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    assert model.tokenizer(configured(directory)).chat_template == template


def test_a_file_is_not_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="does not exist"):
        model.check(configured(tmp_path / "file"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": None}, "model.path=None: give a local folder or .gguf file"),
        (
            {"path": "/real", "architecture": ARCHITECTURE},
            "model.path='/real': model=test has the embedded task's lengths, learning rate and budget",
        ),
        ({"hub_id": "a/b", "architecture": ARCHITECTURE}, "model.hub_id='a/b': model=test has the embedded task's"),
        ({"hub_id": "a/b", "warm_start": WARM_START}, "; choose model=hf for another model"),
        ({"autocast": True, "dtype": "float64"}, "model.autocast=True: goes with model.dtype=float32 only"),
        ({"attention": "grouped"}, "model.attention must be one of eager, sdpa, flex, got 'grouped'"),
        ({"attention": "eager", "dtype": "float64"}, "model.attention='eager': goes with model.dtype=float32 only"),
        ({"dtype": "bfloat16"}, "model.dtype must be one of float32, float64"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, reason):
    with pytest.raises(ConfigError, match=re.escape(reason)) as caught:
        configured(**changes)
    assert_one_sentence(str(caught.value))


def test_adapters_without_peft_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    LoraConfig(rank=0, alpha=16, target_modules="all-linear")
    with pytest.raises(ConfigError, match=r"model.lora.rank=4: needs the package peft.*pip install 'pspo\[lora\]'"):
        LoraConfig(rank=4, alpha=16, target_modules="all-linear")


def scaled(tokenizer):
    return transformers.GraniteConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, logits_scaling=4.0
    )


def capped(tokenizer):
    return transformers.Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.1,
    )


@pytest.mark.parametrize("config", [scaled, capped])
def test_a_model_that_changes_its_logits_after_the_head_is_refused(tmp_path, tiny_tokenizer, config):
    """Else sampler and trainer would silently mean different policies."""
    changed = transformers.AutoModelForCausalLM.from_config(config(tiny_tokenizer))
    changed.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="scales or caps its logits"):
        model.load(configured(tmp_path, attention="eager"), 0, CPU)


# The hub


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def server(monkeypatch):
    """Stands in the hub's place and answers every request with the bytes it is given."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer(content):
        def loop():
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(content)

        threading.Thread(target=loop, daemon=True).start()
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield answer
    listening.close()


def refused(hub_id="nobody/nothing"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: pytest.fail(f"a pause of {seconds} s before another try"))
        with pytest.raises(ConfigError) as caught:
            model.check(configured(hub_id=hub_id))
    assert_one_sentence(str(caught.value))
    return str(caught.value)


@pytest.mark.parametrize("offline", [True, False])
def test_a_model_that_is_not_in_the_cache_is_refused_fast_where_there_is_no_network(empty_cache, monkeypatch, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    message = refused()
    assert "model.hub_id=nobody/nothing is not in the cache" in message
    assert "`python -m pspo.prefetch model=hf model.hub_id=nobody/nothing`" in message
    assert "model.path=<directory>" in message


@pytest.mark.parametrize("status", ["401 Unauthorized", "404 Not Found", "500 Internal Server Error"])
def test_whatever_the_hub_answers_the_remedy_is_named(empty_cache, monkeypatch, server, status):
    url = server(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    assert "`python -m pspo.prefetch model=hf model.hub_id=nobody/nothing`" in refused()


def test_a_proxy_that_refuses_is_no_network_either(empty_cache, monkeypatch, server):
    url = server(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, url)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.invalid")
    huggingface_hub.close_session()
    try:
        assert "`python -m pspo.prefetch model=hf model.hub_id=nobody/nothing`" in refused()
    finally:
        huggingface_hub.close_session()


@pytest.mark.parametrize("hub_id", ["a b", "a/b/c", "-a"])
def test_what_is_no_name_of_a_repository_is_refused(hub_id):
    assert f"model.hub_id={hub_id} is no name of a repository" in refused(hub_id)


def test_other_errors_are_not_taken_for_a_missing_network(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):
        source.locate(configured(hub_id="nobody/nothing"))


def cached(empty_cache, directory):
    """Put a model into the cache as `hf download` leaves it."""
    repository = empty_cache / "models--nobody--nothing"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(directory, repository / "snapshots" / ("0" * 40))
    return repository / "snapshots" / ("0" * 40)


def test_what_is_in_the_cache_needs_no_network(empty_cache, saved, monkeypatch):
    directory, policy = saved
    snapshot = cached(empty_cache, directory)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://never.asked.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("the network was asked"))
    assert source.locate(configured(hub_id="nobody/nothing")) == snapshot
    loaded = model.load(configured(hub_id="nobody/nothing"), 0, CPU)
    assert_same_weights(loaded.model, policy.model)
    assert model.digests(configured(hub_id="nobody/nothing")) == {"nobody/nothing": "0" * 40}


def test_what_is_in_the_cache_only_in_part_is_downloaded(empty_cache, saved, monkeypatch):
    snapshot = cached(empty_cache, saved[0])
    (snapshot / "model.safetensors").unlink()
    asked = []

    def download(*_, local_files_only, **__):
        if not local_files_only:
            asked.append(True)
            shutil.copy(saved[0] / "model.safetensors", snapshot)
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert source.locate(configured(hub_id="nobody/nothing")) == snapshot
    assert asked == [True]


def test_a_repository_that_lacks_something_is_named_by_its_own_name(empty_cache, saved, monkeypatch):
    snapshot = cached(empty_cache, saved[0])
    pickled(snapshot)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(snapshot))
    assert refused().startswith("model=hf model.hub_id=nobody/nothing has no *.safetensors weights")


# Loading and saving


def assert_same_weights(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def test_what_is_saved_is_loaded_to_the_bit(saved):
    directory, policy = saved
    loaded = model.load(configured(directory), 0, CPU)
    assert_same_weights(loaded.model, policy.model)
    assert loaded.stop_ids == policy.stop_ids
    assert loaded.pad_id == policy.pad_id
    assert loaded.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert render(loaded.tokenizer, "be brief", ["1+1?"])[0] == render(policy.tokenizer, "be brief", ["1+1?"])[0]
    assert not loaded.model.training
    assert loaded.trainable().keys() == policy.trainable().keys()
    assert sorted(path.name for path in directory.parent.iterdir()) == ["saved"]


def test_a_folder_is_known_by_its_files(saved):
    directory, _ = saved
    (directory / "README.md").write_text("not read")
    before = model.digests(configured(directory))
    expected = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"}
    assert {Path(name).name for name in before} == expected | {"generation_config.json"}
    assert (
        before[str(directory / "config.json")] == hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()
    )
    (directory / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE + " ")
    after = model.digests(configured(directory))
    assert {name for name in after if after[name] != before[name]} == {str(directory / "chat_template.jinja")}
    assert model.digests(configured()) == {}


def test_the_tokenizer_is_had_without_weights(saved, builds, monkeypatch):
    directory, policy = saved
    monkeypatch.setattr(model.policy, "read_model", lambda *_, **__: pytest.fail("weights were loaded"))
    assert model.tokenizer(configured(directory)).get_vocab() == policy.tokenizer.get_vocab()
    alone = model.tokenizer(configured())
    assert builds == []
    monkeypatch.undo()
    made = model.load(configured(), 0, CPU).tokenizer
    assert (alone.get_vocab(), alone.chat_template) == (made.get_vocab(), made.chat_template)


def test_the_library_loads_what_is_saved(saved):
    directory, policy = saved
    assert_same_weights(transformers.AutoModelForCausalLM.from_pretrained(directory), policy.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer.encode("Tom has 3") == policy.tokenizer.encode("Tom has 3")
    assert [path.name for path in directory.glob("*.safetensors")] == ["model.safetensors"]
    assert not [path for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".py")]


def test_saving_again_replaces_what_was_there(saved, tiny_policy):
    directory, _ = saved
    other = tiny_policy(seed=7)
    model.save(other, directory)
    assert_same_weights(model.load(configured(directory), 0, CPU).model, other.model)


def test_weights_are_float32_masters_of_what_was_saved_in_bfloat16(tmp_path, tiny_policy):
    policy = tiny_policy()
    policy.model.to(torch.bfloat16)
    model.save(policy, tmp_path / "half")
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        loaded = model.load(configured(tmp_path / "half", dtype=name), 0, CPU)
        assert {p.dtype for p in loaded.model.parameters()} == {dtype}
        assert_same_weights(loaded.model, copy.deepcopy(policy.model).to(dtype))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_is_the_one_asked_for(saved, attention):
    loaded = model.load(configured(saved[0], attention=attention), 0, CPU)
    assert loaded.model.config._attn_implementation == attention


@pytest.mark.parametrize(
    ("attention", "changes", "shares"),
    [
        ("sdpa", {}, True),
        ("eager", {}, False),
        ("sdpa", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, False),
    ],
)
def test_prompts_are_shared_where_a_layer_takes_any_mask(tiny_tokenizer, attention, changes, shares):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=len(tiny_tokenizer), num_key_value_heads=2, **sizes, **changes)
    config._attn_implementation = attention
    assert can_share(Qwen2ForCausalLM(config).eval()) is shares


def test_a_decoder_that_does_not_do_as_the_mask_says_shares_no_prompts(tiny_policy, monkeypatch):
    policy = tiny_policy(attention="sdpa")
    whole = policy.model.model.forward
    monkeypatch.setattr(policy.model.model, "forward", lambda attention_mask, **given: whole(**given))
    assert not can_share(policy.model)


@pytest.mark.parametrize(("off", "shares"), [(3e-4, True), (0.1, False), (float("nan"), False)])
def test_rounding_is_measured_by_the_norm_of_the_hidden_states(tiny_policy, monkeypatch, off, shares):
    """In SmolLM2 single numbers reach 54 where most are below 1, and rounding moves one by 2e-4."""
    apart = torch.full((6, 32), 0.7)
    apart[:, 0] = 54.0
    apart[5, 1] = 1e-3
    shared = apart.clone()
    shared[5, 1] += off
    states = iter([apart, shared])
    monkeypatch.setattr(model.policy, "predicting_states", lambda *_: next(states))
    assert can_share(tiny_policy(attention="sdpa").model) is shares


def test_reading_and_writing_weights_is_silent(saved, capfd):
    directory, _ = saved
    model.save(model.load(configured(directory), 0, CPU), directory)
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "")


# GGUF

GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.layers.": "blk.",
}  # fmt: skip


def write_gguf(path, policy, *, kind="F32", architecture="qwen2", template=tiny.CHAT_TEMPLATE, lacks=None):
    """The policy's weights and tokenizer as llama.cpp's converter writes them."""
    gguf = pytest.importorskip("gguf")
    config, writer = policy.model.config, gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(2048)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokenizer = json.loads(policy.tokenizer.backend_tokenizer.to_str())["model"]
    special = set(policy.tokenizer.all_special_tokens)
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_eos_token_id(policy.tokenizer.eos_token_id)
    writer.add_pad_token_id(policy.tokenizer.pad_token_id)
    if template:
        writer.add_chat_template(template)
    for name, weight in policy.model.state_dict().items():
        if name in ("lm_head.weight", lacks):
            continue
        there = functools.reduce(lambda there, pair: there.replace(*pair), GGUF_NAMES.items(), name)
        quantized = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        writer.add_tensor(there, gguf.quants.quantize(weight.float().numpy(), quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pspo" / "gguf"


def test_a_gguf_file_is_converted_once_and_is_the_same_policy(own_cache, tmp_path, tiny_policy, prompts, monkeypatch):
    policy, path = tiny_policy(attention="sdpa"), tmp_path / "tiny.gguf"
    write_gguf(path, policy)
    config = configured(path)
    model.check(config)
    assert not own_cache.exists()
    assert model.digests(config) == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}
    text = "Tom has 3 apples, 3+4=7\n"
    assert model.tokenizer(config).encode(text) == policy.tokenizer.encode(text)
    loaded = model.load(config, 0, CPU)
    assert_same_weights(loaded.model, policy.model)
    assert set(loaded.stop_ids) >= set(policy.stop_ids)  # transformers 5.16 takes the file's end of text as well
    assert render(loaded.tokenizer, "be brief", ["1+1?"])[0] == render(policy.tokenizer, "be brief", ["1+1?"])[0]
    (made,) = [found for found in own_cache.iterdir() if found.is_dir()]
    assert source.locate(config) == made
    train(loaded, prompts)
    model.save(loaded, tmp_path / "trained", prompts[0].token_ids)
    monkeypatch.setattr(source, "read_model", lambda *_, **__: pytest.fail("converted again"))
    assert_same_weights(model.load(config, 0, CPU).model, policy.model)


def test_quantized_weights_are_another_policy_with_a_folder_of_its_own(own_cache, tmp_path, tiny_policy):
    policy = tiny_policy(attention="sdpa")
    folders = []
    for kind in ("F32", "Q8_0"):
        write_gguf(tmp_path / f"{kind}.gguf", policy, kind=kind)
        folders.append(source.locate(configured(tmp_path / f"{kind}.gguf")))
    exact, rounded = (load_file(made / "model.safetensors") for made in folders)
    assert {weight.dtype for weight in rounded.values()} == {torch.float32}
    for name, weight in exact.items():
        assert (weight - rounded[name]).abs().max() <= weight.abs().max() / 127
    assert not torch.equal(exact["model.embed_tokens.weight"], rounded["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "rwkv6"}, "cannot be read by transformers"),
        ({"lacks": "model.layers.1.mlp.up_proj.weight"}, "the weight model.layers.1.mlp.up_proj.weight is missing"),
        ({"cut": 20}, "cannot be read by transformers"),
        ({"cut": 8000}, "cannot be read by transformers"),
    ],
)
def test_a_gguf_file_that_is_no_policy_is_refused_in_one_sentence(own_cache, tmp_path, tiny_policy, changes, reason):
    path, cut = tmp_path / "broken.gguf", changes.pop("cut", None)
    write_gguf(path, tiny_policy(attention="sdpa"), **changes)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ConfigError, match=reason) as caught:
        model.load(configured(path), 0, CPU)
    assert_one_sentence(str(caught.value))
    assert not [made for made in own_cache.iterdir() if "new" in made.name]


def test_a_file_of_a_package_is_named_without_importing_it(tmp_path, monkeypatch, own_cache, tiny_policy):
    (tmp_path / "weights_of").mkdir()
    (tmp_path / "weights_of" / "__init__.py").write_text("raise ImportError")
    write_gguf(tmp_path / "weights_of" / "tiny.gguf", tiny_policy(attention="sdpa"))
    monkeypatch.syspath_prepend(tmp_path)
    config = configured("package:weights_of/tiny.gguf")
    model.check(config)
    assert [Path(name).name for name in model.digests(config)] == ["tiny.gguf"]
    for path in ("package:weights_off/tiny.gguf", "package:", "package:os.path/x.gguf"):
        with pytest.raises(ConfigError, match=f"^model.path={path}: there is no package") as caught:
            model.check(configured(path))
        assert_one_sentence(str(caught.value))
    with pytest.raises(ConfigError, match=r"^model.path=package:weights_of/other.gguf does not exist"):
        model.check(configured("package:weights_of/other.gguf"))


def test_the_reader_of_gguf_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "any.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"needs the package gguf; run pip install 'pspo\[gguf\]'"):
        model.check(configured(tmp_path / "any.gguf"))


# Stop tokens

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def chatml_tokenizer():
    """As Qwen2.5's base models have it: documents end with one token, turns with another."""
    symbols = pre_tokenizers.ByteLevel.alphabet()
    made = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(sorted(symbols))}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    tokenizer.add_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    return tokenizer


def test_generation_stops_at_the_end_of_a_document_and_of_a_turn(chatml_tokenizer):
    made = tiny.make_model(ARCHITECTURE, chatml_tokenizer, 0, "sdpa")
    document, start, end = chatml_tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    stops = model.stop_ids(made, chatml_tokenizer)
    assert stops == sorted([document, end])
    policy = model.Policy(made.eval(), chatml_tokenizer, stops, autocast=False, gradient_checkpointing=False)
    prompt = Prompt(Problem("p", "", "", ""), render(chatml_tokenizer, "", ["1+1?"])[0])
    completions = sample(policy, [prompt], group_size=100, max_new_tokens=64)
    last = {c.token_ids[-1] for c in completions if c.finished}
    assert last == {document, end}
    assert any(start in c.token_ids[:-1] for c in completions)
    assert not any({document, end} & set(c.token_ids[:-1]) for c in completions)


@pytest.mark.parametrize(
    ("configured_ids", "template", "expected"),
    [
        (None, None, {"<|endoftext|>"}),
        ([], CHATML, {"<|endoftext|>", "<|im_end|>"}),
        (["<|im_end|>", "<|endoftext|>"], None, {"<|endoftext|>", "<|im_end|>"}),
        (["<|im_start|>"], None, {"<|endoftext|>", "<|im_start|>"}),
        ([], CHATML.replace("<|im_end|>", ""), {"<|endoftext|>"}),
        ([], CHATML.replace("<|im_end|>", "<|im_end|><|im_start|>"), {"<|endoftext|>", "<|im_end|>"}),
    ],
)
def test_stop_tokens_come_from_tokenizer_configuration_and_template(
    chatml_tokenizer, configured_ids, template, expected
):
    made = tiny.make_model(ARCHITECTURE, chatml_tokenizer, 0, "sdpa")
    chatml_tokenizer.chat_template = template
    made.generation_config.eos_token_id = configured_ids and chatml_tokenizer.convert_tokens_to_ids(configured_ids)
    assert set(chatml_tokenizer.convert_ids_to_tokens(model.stop_ids(made, chatml_tokenizer))) == expected


def test_a_model_without_any_stop_token_is_refused(chatml_tokenizer):
    made = tiny.make_model(ARCHITECTURE, chatml_tokenizer, 0, "sdpa")
    made.generation_config.eos_token_id = chatml_tokenizer.eos_token = chatml_tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no end-of-text token") as caught:
        model.stop_ids(made, chatml_tokenizer)
    assert_one_sentence(str(caught.value))


# Adapters


def adapted(directory, dtype="float32", **changes):
    pytest.importorskip("peft")
    lora = LoraConfig(rank=4, alpha=16, target_modules="all-linear")
    return model.load(configured(directory, dtype=dtype, lora=lora, **changes), 0, CPU)


def logprobs(policy, pairs):
    """What the trainer says of completions behind their prompts, (B, T)."""
    batch = make_batch([(prompt, [completion]) for prompt, completion in pairs], policy.pad_id, CPU)
    with autocast_to_bfloat16(CPU, policy.autocast):
        hidden = predicting_states(policy.model.get_decoder(), batch)
    return token_logprobs(policy.model, batch, hidden, 1.0, policy.autocast)[0]


def loss(policy, prompts):
    return -logprobs(policy, [(p.token_ids, [20, 21, 22, 2]) for p in prompts]).sum()


def train(policy, prompts, steps=3):
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(policy, prompts).backward()
        optimizer.step()


def test_adapters_start_as_nothing_and_alone_are_trained(saved, prompts):
    directory, plain = saved
    policy = adapted(directory)
    assert all("lora_" in name for name in policy.trainable())
    ids = torch.tensor([prompts[0].token_ids])
    torch.testing.assert_close(policy.model(ids).logits, plain.model(ids).logits)
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    train(policy, prompts)
    changed = {name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == policy.trainable().keys()


def test_adapters_start_from_the_seed_alone(saved):
    directory, _ = saved
    torch.manual_seed(1)
    one = adapted(directory)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    other = adapted(directory)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_weights(one.model, other.model)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_adapters_are_saved_merged_into_a_plain_model(saved, prompts, dtype, tolerance):
    directory, plain = saved
    policy = adapted(directory, dtype)
    train(policy, prompts)
    ids = torch.tensor([prompts[1].token_ids])
    with torch.no_grad():
        expected, start = policy.model(ids).logits, plain.model(ids).logits
    model.save(policy, directory.parent / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(directory.parent / "merged")
    assert merged.state_dict().keys() == plain.model.state_dict().keys()
    assert not (directory.parent / "merged" / "adapter_config.json").exists()
    assert merged.config.tie_word_embeddings
    with torch.no_grad():
        assert (merged(ids).logits - expected).abs().max() < tolerance
    assert (start - expected).abs().max() > 0.1


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_merged_weights_are_those_that_are_saved_and_the_policy_stays(saved, prompts, dtype, tolerance):
    """But for the head, which is tied to the embedding."""
    directory, plain = saved
    policy = adapted(directory, dtype)
    train(policy, prompts)
    before = {name: p.clone() for name, p in policy.model.state_dict().items()}
    merged = dict(merged_weights(policy))
    after = policy.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.save(policy, directory.parent / "merged")
    expected = load_file(directory.parent / "merged" / "model.safetensors")
    assert merged.keys() == expected.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=tolerance)
    assert any(
        not torch.equal(weight, plain.model.state_dict()[name].to(weight.dtype)) for name, weight in merged.items()
    )
    assert {n: id(w) for n, w in merged_weights(plain)}.keys() == expected.keys()


SHAPES = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}
TARGETS = {"attention": r".*\.[qkvo]_proj", "all": "all-linear"}


@pytest.fixture
def shaped(tmp_path, tiny_tokenizer):
    """Factory of folders with two random layers of an architecture."""

    def make(shape, tied):
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = SHAPES[shape](
            vocab_size=len(tiny_tokenizer), num_key_value_heads=2, head_dim=8, initializer_range=0.2,
            tie_word_embeddings=tied, eos_token_id=tiny_tokenizer.eos_token_id, bos_token_id=None, **sizes
        )  # fmt: skip
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "shaped")
        tiny_tokenizer.save_pretrained(tmp_path / "shaped")
        return tmp_path / "shaped"

    return make


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_adapters_are_sampled_trained_and_saved_as_one_policy(shaped, prompts, shape, targets, tied):
    """The sampler's log-probabilities are the trainer's, and the saved model's are the trained policy's."""
    pytest.importorskip("peft")
    directory = shaped(shape, tied)
    lora = LoraConfig(rank=4, alpha=16, target_modules=TARGETS[targets])
    policy = model.load(configured(directory, lora=lora), 0, CPU)
    assert policy.trainable()
    first = logprobs(policy, [(prompts[0].token_ids, [20, 21, 2])])
    train(policy, prompts)
    completions = sample(policy, prompts)
    pairs = [(c.prompt.token_ids, c.token_ids) for c in completions]
    with torch.no_grad():
        trained = logprobs(policy, pairs)
        assert (logprobs(policy, [(prompts[0].token_ids, [20, 21, 2])]) - first).abs().max() > 0.05
    for row, completion in zip(trained.tolist(), completions, strict=True):
        assert row[: len(completion.logprobs)] == pytest.approx(completion.logprobs, abs=1e-5)
    model.save(policy, directory.parent / "trained", prompts[0].token_ids)
    config = configured(directory.parent / "trained")
    model.check(config)
    loaded = model.load(config, 0, CPU)
    torch.testing.assert_close(logprobs(loaded, pairs), trained, atol=1e-4, rtol=0)
    assert loaded.model.config.tie_word_embeddings == tied
    assert len(loaded.trainable()) == len(model.load(configured(directory), 0, CPU).trainable())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("targets", ["lm_head", r".*embed_tokens", r".*"])
def test_the_head_and_the_embedding_take_no_adapters(shaped, targets, tied):
    pytest.importorskip("peft")
    lora = LoraConfig(rank=4, alpha=16, target_modules=targets)
    told = r"model\.lora\.target_modules=.*(embed_tokens|lm_head) takes no adapters; choose layers between"
    with pytest.raises(ConfigError, match=told) as caught:
        model.load(configured(shaped("llama", tied), lora=lora), 0, CPU)
    assert_one_sentence(str(caught.value))


@pytest.mark.parametrize("targets", ["nothing_of_that_name", "[", r".*norm"])
def test_what_takes_no_adapters_is_refused_in_one_sentence(saved, targets):
    pytest.importorskip("peft")
    lora = LoraConfig(rank=2, alpha=16, target_modules=targets)
    with pytest.raises(ConfigError, match=r"model\.lora\.target_modules=") as caught:
        model.load(configured(saved[0], lora=lora), 0, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_saved_model_is_loaded_again_when_the_policy_has_been_freed(saved, prompts, monkeypatch, dtype, autocast):
    directory, _ = saved
    policy = model.load(configured(directory, dtype=dtype), 0, CPU)
    policy = dataclasses.replace(policy, autocast=autocast)
    held, read, found = list(policy.trainable().values()), model.policy.read_model, []

    def looking(*given, **settings):
        found.append(sum(p.numel() for p in held))
        return read(*given, **settings)

    monkeypatch.setattr(model.policy, "read_model", looking)
    model.save(policy, directory.parent / "again", prompts[0].token_ids)
    assert found == [0]
    weights, expected = (load_file(d / "model.safetensors") for d in (directory.parent / "again", directory))
    assert all(torch.equal(weights[name], expected[name].to(weights[name].dtype)) for name in expected)


@pytest.mark.parametrize("value", [0.05, float("nan")])
def test_a_saved_model_that_answers_otherwise_is_refused_and_replaces_nothing(saved, prompts, monkeypatch, value):
    directory, policy = saved
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    write = policy.model.save_pretrained

    def wrong(to):
        policy.model.model.layers[1].mlp.down_proj.weight.data += value
        write(to)

    monkeypatch.setattr(policy.model, "save_pretrained", wrong)
    with pytest.raises(
        SaveError, match=r"cannot save .*: loaded again, the model's log-probabilities differ"
    ) as caught:
        model.save(policy, directory, prompts[0].token_ids)
    assert_one_sentence(str(caught.value))
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_a_regular_expression_chooses_what_is_adapted(saved):
    pytest.importorskip("peft")
    lora = LoraConfig(rank=2, alpha=16, target_modules=r".*\.(q_proj|v_proj)")
    policy = model.load(configured(saved[0], lora=lora), 0, CPU)
    assert {name.split(".")[4] for name in policy.trainable()} == {"q_proj", "v_proj"}


# Memory and precision


@pytest.mark.parametrize("load", [lambda d, **c: model.load(configured(d, dtype="float64", **c), 0, CPU), adapted])
def test_gradient_checkpointing_gives_the_same_gradient(saved, prompts, load):
    gradients = []
    for enabled in (False, True):
        policy = load(saved[0], gradient_checkpointing=enabled)
        policy.model.train(enabled)
        assert any(getattr(m, "gradient_checkpointing", False) for m in policy.model.modules()) == enabled
        loss(policy, prompts).backward()
        gradients.append({name: p.grad for name, p in policy.trainable().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-10, atol=1e-10 if load != adapted else 1e-6)


def test_a_policy_with_gradient_checkpointing_samples_as_without(saved, prompts):
    one, other = (
        sample(model.load(configured(saved[0], gradient_checkpointing=on), 0, CPU), prompts) for on in (False, True)
    )
    assert [c.token_ids for c in one] == [c.token_ids for c in other]


@pytest.mark.parametrize("load", [lambda d, **c: model.load(configured(d, **c), 0, CPU), adapted])
def test_autocast_samples_and_trains_float32_masters(saved, prompts, load):
    policy = load(saved[0], autocast=True)
    completions = sample(policy, prompts, top_p=0.9)
    assert all(len(c.logprobs) == len(c.token_ids) for c in completions)
    exact = loss(dataclasses.replace(policy, autocast=False), prompts)
    rounded = loss(policy, prompts)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs() / exact < 0.02
    rounded.backward()
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in policy.trainable().values()} == {torch.float32}


# The embedded policy


@pytest.fixture
def builds(monkeypatch, tmp_path):
    """Counts how often a warm start is really trained; the cache is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done, train = [], warm_start._made
    monkeypatch.setattr(warm_start, "_made", lambda *a: (done.append(a), train(*a))[1])
    return done


def test_the_same_content_is_trained_once(builds, tmp_path):
    first = warm_start.cached(configured(), 0)
    assert first.is_relative_to(tmp_path / "cache" / "pspo")
    assert warm_start.cached(configured(), 0) == first
    assert len(builds) == 1
    source.check_directory(first, "the warm policy")
    visible = [path for path in first.parent.iterdir() if not path.name.endswith(".lock")]
    assert visible == [first]


@pytest.mark.parametrize(
    "changes",
    [
        {"warm_start": dataclasses.replace(WARM_START, worked_steps=4)},
        {"warm_start": dataclasses.replace(WARM_START, lr=1e-3)},
        {"architecture": dataclasses.replace(ARCHITECTURE, hidden_size=16)},
        {"dtype": "float64"},
        {"attention": "eager"},
        None,
    ],
)
def test_what_influences_the_weights_has_a_directory_of_its_own(builds, changes):
    """None stands for another seed."""
    first = warm_start.cached(configured(), 0)
    other = warm_start.cached(configured(), 1) if changes is None else warm_start.cached(configured(**changes), 0)
    assert other != first
    assert len(builds) == 2
    assert (other / "model.safetensors").read_bytes() != (first / "model.safetensors").read_bytes()


def test_what_does_not_influence_the_warm_start_shares_it(builds):
    lora = LoraConfig(rank=2, alpha=16, target_modules="all-linear")
    changes = [{}, {"lora": lora}, {"name": "other"}, {"gradient_checkpointing": True}]
    assert len({warm_start.cached(configured(**change), 0) for change in changes}) == len(builds) == 1


def test_another_seed_starts_from_other_weights(builds):
    one, other = (load_file(warm_start.cached(configured(), seed) / "model.safetensors") for seed in (0, 1))
    for name, weight in one.items():
        if name.endswith("proj.weight"):  # five steps at a rate of 2e-3 move no weight this far
            assert (weight - other[name]).abs().max() > 0.1


def test_a_warm_start_is_the_same_to_the_bit_wherever_it_is_made(builds, monkeypatch, tmp_path):
    torch.manual_seed(1)
    first = warm_start.cached(configured(), 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    torch.manual_seed(2)
    second = warm_start.cached(configured(), 0)
    assert len(builds) == 2
    assert second.name == first.name
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_what_an_interrupted_build_left_does_not_matter(builds):
    whole = warm_start.cached(configured(), 0)
    content = {path.name: path.read_bytes() for path in whole.iterdir()}
    stale = whole.with_name(f".{whole.name}.new")
    whole.rename(stale)
    (stale / "left.over").write_text("")
    (stale / "model.safetensors").write_bytes(b"half")
    directory = warm_start.cached(configured(), 0)
    assert len(builds) == 2
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == content
    assert sorted(p.name for p in directory.parent.iterdir()) == [directory.name, f"{directory.name}.lock"]


def test_processes_that_ask_at_one_time_train_it_once(builds):
    found = []
    threads = [threading.Thread(target=lambda: found.append(warm_start.cached(configured(), 0))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert len(builds) == 1


def test_the_embedded_policy_loads_like_any_other(builds):
    policy = model.load(configured(), 0, CPU)
    assert_same_weights(policy.model, model.load(configured(warm_start.cached(configured(), 0)), 0, CPU).model)
    assert policy.tokenizer.convert_ids_to_tokens(policy.stop_ids) == [tiny.END]
    assert policy.pad_id == policy.tokenizer.convert_tokens_to_ids(tiny.PAD)
    assert len(policy.tokenizer) == policy.model.config.vocab_size == 200


def test_the_embedded_tokenizer_returns_every_text_it_was_made_for(builds):
    tokenizer = model.load(configured(), 0, CPU).tokenizer
    text = "".join(map(chr, [10, *range(32, 127)]))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1234567890")) == 10
    assert tokenizer.unk_token_id not in tokenizer.encode(text)


def test_a_seed_gives_the_same_random_weights_and_leaves_the_generator_alone(tiny_tokenizer):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, same, other = (tiny.make_model(ARCHITECTURE, tiny_tokenizer, seed, "sdpa") for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_weights(one, same)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_heads": 5}, "num_heads=5: must divide model.architecture.hidden_size=32"),
        ({"num_kv_heads": 3}, "num_kv_heads=3: must divide model.architecture.num_heads=4"),
        ({"vocab_size": 100}, "vocab_size must be in"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes, reason):
    with pytest.raises(ConfigError, match=re.escape(reason)):
        dataclasses.replace(ARCHITECTURE, **changes)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ({"a": "x", "b": "y"}, None),  # several without a default, which dataset.prompt replaces
        ("{{ messages[", None),
        ("{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[-1].content }}", True),
    ],
)
def test_a_template_that_refuses_has_no_end_of_a_turn_or_has_it_behind_a_system_message(tiny_tokenizer, template, end):
    encoder = copy.deepcopy(tiny_tokenizer)
    encoder.chat_template = template + encoder.eos_token if end else template
    assert model.end_of_turn(encoder) == (encoder.eos_token_id if end else None)
