"""The block ``model`` of the configuration: source, precision and adapters of the policy, and the embedded one."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

from pspo.base.schema import Schema, key


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Schema, block="model.lora"):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) through ``peft``, the extra ``pspo[lora]``."""

    rank: int = key("rank of the adapters; 0 trains all weights", within="[0, inf)")
    alpha: int = key("the adapters' output is scaled by alpha / rank", within="[1, inf)")
    target_modules: str = key("layers with adapters, not embedding or head: all-linear, or a regular expression")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank and importlib.util.find_spec("peft") is None:
            raise self.refuse("rank", "needs the package peft; run pip install 'pspo[lora]'")


@dataclass(frozen=True, kw_only=True)
class Architecture(Schema, block="model.architecture"):
    """The shape of a policy that this machine makes, for one of the tasks without files."""

    task: Literal["embedded", "reversal"] = key("the data set that the policy is made for", before="embedded")
    hidden_size: int = key("width of the residual stream", within="[8, inf)")
    num_layers: int = key("decoder layers", within="[1, inf)")
    num_heads: int = key("attention heads", within="[1, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_divides("num_heads", "hidden_size")

    def _check_divides(self, part: str, whole: str) -> None:
        if getattr(self, whole) % getattr(self, part):
            raise self.refuse(part, f"must divide model.architecture.{whole}={getattr(self, whole)}")

    @classmethod
    def select(cls, values: Mapping[str, Any]) -> type[Self]:
        kind = BitsArchitecture if values.get("task") == "reversal" else WordsArchitecture
        return cast(type[Self], kind)


@dataclass(frozen=True, kw_only=True)
class WordsArchitecture(Architecture):
    """A Qwen2 policy for the word problems of dataset=embedded."""

    vocab_size: int = key("tokens of the tokenizer trained on the embedded task", within="[128, 1000000]")
    intermediate_size: int = key("width of the gated feed-forward layers", within="[8, inf)")
    num_kv_heads: int = key("key and value heads, shared by groups of attention heads", within="[1, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_divides("num_kv_heads", "num_heads")


@dataclass(frozen=True, kw_only=True)
class BitsArchitecture(Architecture):
    """A decoder over two tokens for dataset=reversal."""

    num_bits: int = key("bits of a prompt; there are twice as many positions", within="[1, 16]")


@dataclass(frozen=True, kw_only=True)
class WarmStart(Schema, block="model.warm_start"):
    """Supervised learning before the run: a fixed number of steps, so that every machine does the same work."""

    worked_steps: int = key("steps on solutions that show the working", within="[1, inf)")
    mixed_steps: int = key("steps on a mix of worked solutions and bare answers", within="[0, inf)")
    worked_share: float = key("share of worked solutions in the mix", within="[0, 1]")
    batch_size: int = key("problems of one step", within="[1, inf)")
    num_problems: int = key("different problems of the embedded task to learn from", within="[1, inf)")
    lr: float = key("highest learning rate (AdamW, linear warm-up and decay)", within="(0, inf)")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Schema, block="model"):
    """The policy that all arms of a comparison start from; float32 masters keep the small steps of a small rate."""

    name: str = key("name of the model in reports")
    hub_id: str | None = key("repository on the Hugging Face hub, owner/name")
    path: str | None = key(
        "instead of hub_id: a folder with safetensors and tokenizer, a .gguf file, or package:NAME/FILE of a package",
        path=True,
    )
    dtype: Literal["float32", "float64"] = key("of weights and optimizer; bfloat16 would lose updates at lr 5e-7")
    autocast: bool = key("matrix products in bfloat16, on float32 masters")
    attention: Literal["eager", "sdpa", "flex"] = key(
        "implementation of attention, as transformers names it; flex, on a GPU, is sdpa whose updates have no padding"
    )
    gradient_checkpointing: bool = key("recompute activations in the backward pass: less memory, more time")
    chat_template_kwargs: dict[str, Any] = key(
        "variables of the chat template by name, such as enable_thinking", before={}
    )
    lora: LoraConfig
    architecture: Architecture | None
    warm_start: WarmStart | None

    def __post_init__(self) -> None:
        super().__post_init__()
        words = isinstance(self.architecture, WordsArchitecture)
        if self.made_here and not (self.warm_start if words else self.architecture):
            raise self.refuse(
                "path", "give a local folder or .gguf file, or choose model=tiny or one that has a hub_id"
            )
        if not self.made_here and (self.architecture or self.warm_start):
            task = self.architecture.task if self.architecture else "embedded"
            why = f"has the {task} task's lengths, learning rate and budget; choose model=hf for another model"
            raise self.refuse("path" if self.hub_id is None else "hub_id", f"model={self.name} {why}")
        if self.autocast and self.dtype == "float64":
            raise self.refuse("autocast", "goes with model.dtype=float32 only")
        if self.attention == "eager" and self.dtype == "float64":
            # Its softmax is in float32, where the mask's lowest float64 is -inf: rows of padding become NaN.
            raise self.refuse("attention", "goes with model.dtype=float32 only; set model.attention=sdpa")

    @property
    def made_here(self) -> bool:
        """Whether the policy is the embedded one, whose weights this machine draws and warm-starts."""
        return self.path is None and self.hub_id is None
