"""The policy and the ways to get one: from a local directory, from the hub, or made here and warm-started."""

import copy
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from pspo.base.files import SaveError, new_directory
from pspo.base.schema import ConfigError, Schema, key
from pspo.model import attention, source, warm_start
from pspo.model.logprob import autocast_to_bfloat16
from pspo.model.tiny import Architecture
from pspo.model.warm_start import WarmStart


@dataclass(frozen=True, kw_only=True)
class Lora(Schema, block="model.lora"):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) through ``peft``, the extra ``pspo[lora]``."""

    rank: int = key("rank of the adapters; 0 trains all weights", within="[0, inf)")
    alpha: int = key("the adapters' output is scaled by alpha / rank", within="[1, inf)")
    target_modules: str = key("which linear layers: all-linear, or a regular expression on their names")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank:
            try:
                import peft  # noqa: F401
            except ImportError:
                raise self.refuse("rank", "needs the package peft; run pip install 'pspo[lora]'") from None


@dataclass(frozen=True, kw_only=True)
class Model(Schema, block="model"):
    """The policy that all arms of a comparison start from; float32 masters keep the small steps of a small rate."""

    name: str = key("what the run calls it")
    hub_id: str | None = key("repository on the Hugging Face hub")
    path: str | None = key(
        "a local directory in its place: safetensors weights, tokenizer and chat template", path=True
    )
    dtype: Literal["float32", "float64"] = key("of weights and optimizer; bfloat16 would lose updates at lr 5e-7")
    autocast: bool = key("matrix products in bfloat16, on float32 masters")
    attention: Literal["grouped", "eager", "sdpa", "flash_attention_2"] = key(
        "grouped: pspo's plain products and, for Llama and Qwen2, layers, fast on a CPU; else transformers' own"
    )
    gradient_checkpointing: bool = key("recompute activations in the backward pass: less memory, more time")
    lora: Lora
    architecture: Architecture | None
    warm_start: WarmStart | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is None and self.hub_id is None and self.architecture is None:
            raise self.refuse("path", "name a local directory, or choose a model option that has a hub_id")
        if self.path is None and self.hub_id is None and self.warm_start is None:
            raise self.refuse("warm_start", "the embedded policy needs one; choose model=tiny, or give model.path")
        if self.autocast and self.dtype == "float64":
            raise self.refuse("autocast", "goes with model.dtype=float32 only")
        if self.attention == "flash_attention_2" and not self.autocast:
            raise self.refuse("attention", "flash attention needs model.autocast=true")
        if self.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            raise self.refuse("attention", "needs the package flash-attn; install it or set model.attention=sdpa")
        if self.attention == "eager" and self.dtype == "float64":
            # Its softmax is in float32, where the mask's lowest float64 is -inf: rows of padding become NaN.
            raise self.refuse("attention", "goes with model.dtype=float32 only; set model.attention=sdpa")


@dataclass
class Policy:
    """A model in one process, sampled from and trained alike."""

    model: Any
    tokenizer: Any
    stop_ids: list[int]
    autocast: bool
    gradient_checkpointing: bool
    shares_prompts: bool = False
    """Whether completions may stand behind one copy of their prompt, as ``attention.can_share`` found."""
    lanes: Any = None
    """Processes that share the work on it (``pspo.lanes``), where there are any."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return cast(torch.device, self.model.device)

    @property
    def pad_id(self) -> int:
        """A token for positions that nothing looks at."""
        pad_id = self.tokenizer.pad_token_id
        return self.stop_ids[0] if pad_id is None else int(pad_id)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that the optimizer changes, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def frozen(self) -> "Policy":
        """A copy that nothing trains: the reference of a KL penalty."""
        return replace(self, model=copy.deepcopy(self.model).requires_grad_(False).eval(), lanes=None)


def check(config: Model) -> None:
    """Refuse a model that cannot be had, before anything is loaded. Raises ConfigError."""
    if config.path is not None:
        source.check_directory(Path(config.path))
    elif config.hub_id is not None:
        source.locate(config.hub_id)


def tokenizer(config: Model) -> Any:
    """The tokenizer of the policy, without weights; a model of the hub is fetched for it. Raises ConfigError."""
    if config.path is None and config.hub_id is None:
        return warm_start.tokenizer(config)
    return _read_tokenizer(Path(config.path) if config.path is not None else source.locate(str(config.hub_id)))


def _read_tokenizer(directory: Path) -> Any:
    made = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    made.init_kwargs.pop("local_files_only", None)  # how it was read is no part of what is saved
    return made


def load(config: Model, seed: int, device: torch.device) -> Policy:
    """The policy that a run starts from: the same weights for every objective at one seed."""
    if config.path is not None or config.hub_id is not None:
        directory = Path(config.path) if config.path is not None else source.locate(str(config.hub_id))
    else:
        directory = warm_start.cached(config, seed)
    encoder = _read_tokenizer(directory)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
        )
    except SafetensorError as error:
        raise ConfigError(f"{directory}: its weights cannot be read ({error}); copy or download them again") from error
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if config.lora.rank:
        from peft import LoraConfig, inject_adapter_in_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            targets = config.lora.target_modules
            adapters = LoraConfig(r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=targets)
            try:
                model = inject_adapter_in_model(adapters, model)
            except ValueError as error:  # no layer of that name
                raise config.lora.refuse("target_modules", str(error)) from error
    model.to(device).eval()
    _check_head(config, model)
    shares = attention.can_share(model, config.autocast)
    return Policy(model, encoder, stop_ids(model, encoder), config.autocast, config.gradient_checkpointing, shares)


def save(policy: Policy, directory: Path) -> None:
    """Write a plain Hugging Face directory, adapters merged into the weights; written beside and renamed."""
    model = policy.model
    if any("lora_" in name for name, _ in model.named_parameters()):
        model = _merged(model)
    try:
        with new_directory(directory) as beside:
            model.save_pretrained(beside)
            policy.tokenizer.save_pretrained(beside)
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"cannot save {directory} ({error}); make room or mend the permissions, then run the same command again"
        ) from error


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Where generation stops: the end of a document and the chat template's end of a turn, which may differ.

    Base models such as Qwen2.5 name ``<|endoftext|>`` as EOS while their template closes turns with ``<|im_end|>``.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id} | set(configured if isinstance(configured, list) else [configured])
    if tokenizer.chat_template is not None:
        marker = "7"
        turn = [{"role": "user", "content": "1"}, {"role": "assistant", "content": marker}]
        after = tokenizer.apply_chat_template(turn, tokenize=False).rpartition(marker)[2]
        special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
        ids |= set([i for i in tokenizer.encode(after, add_special_tokens=False) if i in special][:1])
    found = sorted(i for i in ids if i is not None)
    if not found:
        raise ConfigError("the model names no end-of-text token; set eos_token in its tokenizer_config.json")
    return found


@torch.inference_mode()
def _check_head(config: Model, model: Any) -> None:
    """Refuse a model whose logits are not head(decoder(x)), as ``token_logprobs`` has it. Raises ConfigError."""
    ids = torch.tensor([[0, 1]], device=model.device)
    with autocast_to_bfloat16(model.device, config.autocast):
        expected, hidden = model(input_ids=ids).logits, model.get_decoder()(input_ids=ids).last_hidden_state
        logits = model.get_output_embeddings()(hidden)
    if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3):
        raise config.refuse(
            "path" if config.path else "hub_id",
            f"{type(model).__name__} scales or caps its logits after the head, which is not supported; choose another",
        )


def _merged(model: Any) -> Any:
    from peft.tuners.lora import LoraLayer

    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    return model
