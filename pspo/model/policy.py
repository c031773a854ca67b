"""The policy and the ways to get one: from a local directory, from the hub, or the embedded one, warm-started."""

import contextlib
import copy
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pspo.base.files import SaveError, new_directory
from pspo.base.schema import ConfigError
from pspo.dataset.prompt import TEMPLATE_ERRORS
from pspo.model import source, warm_start
from pspo.model.attention import BY_MASK
from pspo.model.batch import make_batch
from pspo.model.config import ModelConfig
from pspo.model.logprob import predicting_states, raised
from pspo.model.source import read_model, read_tokenizer

MAX_SAVED_GAP_NATS = 1e-3
"""Nats by which a log-probability of the saved model may differ from the trained policy's; both without autocast."""


@dataclass
class Policy:
    """A model in one process, sampled from and trained alike."""

    model: Any
    tokenizer: Any
    stop_ids: list[int]
    autocast: bool
    gradient_checkpointing: bool
    shares_prompts: bool = False  # whether completions may share one copy of their prompt (``can_share``)
    packs: bool = False  # whether texts stand in one row without padding, as FlexAttention has them
    adapters_off: bool = False  # whether ``scoring`` is without the adapters

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return cast(torch.device, self.model.device)

    @property
    def pad_id(self) -> int:
        """A token for positions that nothing looks at."""
        pad_id = self.tokenizer.pad_token_id
        return (self.stop_ids or [0])[0] if pad_id is None else int(pad_id)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that the optimizer changes, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """The mode of a pass with gradient: the library recomputes activations in training mode only."""
        if self.gradient_checkpointing:
            self.model.train()
            for module in self.model.modules():
                if isinstance(module, torch.nn.Dropout):  # noise would make the ratio of fresh weights differ from 1
                    module.eval()
        yield
        self.model.eval()

    def frozen(self) -> "Policy":
        """The policy before training, the reference of a KL penalty: a copy, or the same weights without adapters."""
        if any(_adapters(self.model)):  # which begin as nothing
            return replace(self, adapters_off=True)
        return replace(self, model=copy.deepcopy(self.model).requires_grad_(False).eval())

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """The mode of a pass without gradient."""
        layers = [layer for _, layer in _adapters(self.model)] if self.adapters_off else []
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)


def tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of the policy, without weights; a model of the hub or in GGUF is fetched or converted for it."""
    encoder = warm_start.tokenizer(config) if config.made_here else read_tokenizer(source.locate(config))
    return _with_variables(encoder, config)


def load(config: ModelConfig, seed: int, device: torch.device) -> Policy:
    """The policy that a run starts from: the same weights for every objective at one seed. Raises ConfigError."""
    directory = warm_start.cached(config, seed) if config.made_here else source.locate(config)
    flex = config.attention == "flex" and device.type == "cuda"
    attention = BY_MASK if flex else "sdpa" if config.attention == "flex" else config.attention
    model = read_model(directory, getattr(torch, config.dtype), attn_implementation=attention)
    if config.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # 5.16
        enable({"use_reentrant": False})
    if config.lora.rank:
        model = _adapted(model, config, seed, base=str(directory.absolute()))
    model.to(device).eval()
    _check_head(config, model)
    encoder, shares = _with_variables(read_tokenizer(directory), config), can_share(model)
    about = (config.autocast, config.gradient_checkpointing, shares, shares and flex)
    return Policy(model, encoder, stop_ids(model, encoder), *about)


def save(policy: Policy, directory: Path, probe: Sequence[int] = ()) -> None:
    """Write a plain Hugging Face directory, adapters merged. Raises SaveError, and then leaves the earlier directory.

    With ``probe``, two token ids or more, the policy is spent: its weights are freed, the directory is loaded again,
    and the log-probabilities of the probe's tokens must be the same to ``MAX_SAVED_GAP_NATS`` nats.
    """
    model = policy.model.eval()
    expected: Any = _probe_logprobs(model, probe) if probe else None
    for name, layer in list(_adapters(model)):  # added to the weights, in place
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    with _saving(directory) as new:
        model.save_pretrained(new)
        policy.tokenizer.save_pretrained(new)
        if probe:
            device, dtype, attention = model.device, model.dtype, model.config._attn_implementation
            for parameter in model.parameters():  # freed, whoever else holds the parameter
                parameter.data, parameter.grad = parameter.data.new_empty(0), None
            loaded = read_model(new, dtype, attn_implementation=attention).to(device).eval()
            gap = float((_probe_logprobs(loaded, probe) - expected).abs().max())
            if not gap <= MAX_SAVED_GAP_NATS:  # also where the gap is NaN
                raise SaveError(
                    f"cannot save {directory}: loaded again, the model's log-probabilities differ from the trained "
                    f"policy's by {gap:.3g} nats, more than {MAX_SAVED_GAP_NATS}; try model.lora.rank=0"
                )


def save_adapters(policy: Policy, directory: Path) -> None:
    """Write the adapters alone, for ``peft.PeftModel.from_pretrained(<base model>, directory)``. Raises SaveError."""
    import peft

    config = copy.copy(policy.model.peft_config["default"])
    if isinstance(config.target_modules, set):  # whose order changes from process to process
        config.target_modules = sorted(config.target_modules)
    weights = peft.get_peft_model_state_dict(policy.model, save_embedding_layers=False)
    with _saving(directory) as new:
        config.save_pretrained(new)
        named = {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()}  # as in PeftModel
        save_file(named, new / "adapter_model.safetensors")


@contextlib.contextmanager
def _saving(directory: Path) -> Iterator[Path]:
    """``new_directory``. Raises SaveError, and then leaves the earlier directory."""
    try:
        with new_directory(directory) as new:
            yield new
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"cannot save {directory} ({error}); make room or mend the permissions, then run the same command again"
        ) from error


@torch.no_grad()
def merged_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """The weights by their names on disk, adapters added; nothing of the policy changes.

    A weight of two names, as a head that is tied to the embedding, comes once.
    """
    model = policy.model
    adapted = {f"{name}.base_layer.weight": layer for name, layer in _adapters(model)}
    distinct = {name for name, _ in model.named_parameters()}
    copies = {name for name, _ in model.named_parameters(remove_duplicate=False)} - distinct
    for name, weight in model.state_dict().items():
        if name not in copies and ".lora_" not in name:
            deltas = [adapted[name].get_delta_weight("default")] if name in adapted else []
            yield name.replace(".base_layer.", "."), sum(deltas, weight)


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Where generation stops: the end of a document and the chat template's end of a turn, which may differ.

    Base models such as Qwen2.5 name ``<|endoftext|>`` as EOS while their template closes turns with ``<|im_end|>``. A
    tokenizer without any special token has no stop: each completion has the one length, and is finished there.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = {
        tokenizer.eos_token_id,
        end_of_turn(tokenizer),
        *(configured if isinstance(configured, list) else [configured]),
    }
    if ids == {None} and tokenizer.all_special_ids:
        raise ConfigError("the model names no end-of-text token; set eos_token in its tokenizer_config.json")
    return sorted(ids - {None})


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template writes behind an answer; None without one, or where it refuses."""
    turn = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "7"}]
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    for talk in (turn, [{"role": "system", "content": "1"}, *turn]) if tokenizer.chat_template else ():
        with contextlib.suppress(*TEMPLATE_ERRORS):  # a template that dataset.prompt replaces may refuse everything
            after = tokenizer.apply_chat_template(talk, tokenize=False).rpartition("7")[2]
            return next((i for i in tokenizer.encode(after, add_special_tokens=False) if i in special), None)
    return None


@torch.inference_mode()
def can_share(model: Any) -> bool:
    """Whether completions may share one copy of their prompt, as its sdpa attention takes any mask of what sees what.

    A decoder with a sliding window or a state in a layer cannot share. A probe without autocast decides: the hidden
    states of two completions that share a prompt may differ from the states in separate rows by 1e-4 of their norm.
    """
    config, size = model.config.get_text_config(), model.get_input_embeddings().num_embeddings
    window = "window" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = set(getattr(config, "layer_types", None) or [window])
    if kinds != {"full_attention"} or config._attn_implementation not in ("sdpa", BY_MASK):
        return False
    prompt, *completions = ([token % size for token in row] for row in ([1, 2, 3], [4, 5, 0], [7, 6, 0]))
    try:
        apart, shared = (
            predicting_states(model.get_decoder(), make_batch(bundles, 0, model.device))
            for bundles in ([(prompt, [c]) for c in completions], [(prompt, completions)])
        )
    except (IndexError, RuntimeError, TypeError, ValueError):  # the decoder takes no mask of four dimensions
        return False
    return bool((apart - shared).norm() <= 1e-4 * apart.norm())


@torch.inference_mode()
def _check_head(config: ModelConfig, model: Any) -> None:
    """Refuse a model whose logits are not head(decoder(x)), as ``token_logprobs`` has it. Raises ConfigError."""
    ids = torch.tensor([[0, 1]], device=model.device)
    expected, hidden = model(input_ids=ids).logits, model.get_decoder()(input_ids=ids).last_hidden_state
    if not torch.allclose(model.get_output_embeddings()(hidden), expected, rtol=1e-3, atol=1e-3):
        why = f"{type(model).__name__} scales or caps its logits after the head, which is not supported; choose another"
        raise config.refuse("path" if config.path else "hub_id", why)


def _with_variables(encoder: Any, config: ModelConfig) -> Any:
    """The tokenizer, whose chat template is given ``model.chat_template_kwargs``. Raises ConfigError."""
    given, template = config.chat_template_kwargs, str(encoder.chat_template)
    for name in given:
        if name in ("messages", "add_generation_prompt") or not re.search(rf"\b{re.escape(str(name))}\b", template):
            why = f"{name} is no variable that the model's chat template leaves open; take a name from its text"
            raise config.refuse("chat_template_kwargs", f"{why}, or set model.chat_template_kwargs={{}}")
    if given:
        encoder.apply_chat_template = functools.partial(encoder.apply_chat_template, **given)
    return encoder


def _adapters(model: Any) -> Iterator[tuple[str, Any]]:
    """The layers with adapters, by name."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def _adapted(model: Any, settings: ModelConfig, seed: int, base: str) -> Any:
    """The model, read from the folder ``base``, with adapters drawn from ``seed``. Raises ConfigError."""
    import peft

    config, name = settings.lora, base if settings.path else settings.hub_id or base
    ends, targets = (model.get_input_embeddings(), model.get_output_embeddings()), config.target_modules
    about: dict[str, Any] = {"task_type": "CAUSAL_LM", "base_model_name_or_path": name}
    adapters = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, **about)
    try:
        for name, module in model.named_modules():
            if module in ends and re.fullmatch(targets, name):  # the two may be one weight, and the head is a matrix
                raise ValueError(f"{name} takes no adapters; choose layers between the input embedding and the head")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return peft.inject_adapter_in_model(adapters, model)
    except (ValueError, re.error) as error:  # no layer of that name, or one that takes no adapters
        raise config.refuse("target_modules", " ".join(str(error).split()).rstrip(".")) from error


@torch.inference_mode()
def _probe_logprobs(model: Any, token_ids: Sequence[int]) -> Tensor:
    """Log-probabilities of all tokens but the first, each given the tokens before it."""
    ids = torch.tensor([list(token_ids)], device=model.device)
    logprob_TV = raised(model(input_ids=ids, use_cache=False).logits[0, :-1]).log_softmax(-1)
    return logprob_TV.gather(-1, ids[0, 1:, None]).squeeze(-1)
