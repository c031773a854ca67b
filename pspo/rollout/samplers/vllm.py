"""The sampler ``vllm``: completions from vLLM's engine in this process, by a copy of the policy's weights.

The engine is made from the model's configuration alone; its weights are the policy's, whose names they have, so that
a folder, a GGUF file, a checkpoint and merged adapters come to it in one way. Its log-probabilities are computed by
other kernels than the trainer's: equal to rounding, not in every bit. This module is imported where it is chosen.
"""

import copy
import os
import tempfile
from collections.abc import Sequence
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}  # read when vllm is imported
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import vllm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.sampling_params import RequestOutputKind

from pspo.base.stream import generator
from pspo.checkpoint import random_state_kept
from pspo.dataset import Prompt
from pspo.host import interrupt
from pspo.host.memory import NoRoomError
from pspo.model import Policy
from pspo.model.policy import merged_weights
from pspo.rollout.sample import Completion, RolloutConfig, random_key
from pspo.rollout.stop import StopStrings


class VllmSampler:
    """Samples by an engine that ``refresh`` gives the policy's weights."""

    def __init__(self, policy: Policy, config: RolloutConfig) -> None:
        """Raises ConfigError for a model that vLLM does not take, or that leaves no room for its KV cache."""
        self.config = config
        try:
            self.engine = _engine(policy, config)
            self.refresh(policy)
        except (ValueError, RuntimeError, NotImplementedError, KeyError) as error:
            why = f"vLLM cannot run this model ({' '.join(str(error).split()) or type(error).__name__})"
            raise config.refuse("sampler", f"{why}; change rollout.kv_cache_gib, or set rollout.sampler=own") from error

    def refresh(self, policy: Policy) -> None:
        """Load this policy's weights, adapters added; forgets what was computed with the earlier ones."""
        self.policy = policy
        if self.engine.is_sleeping():
            self.engine.wake_up()
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(policy)})
        self.engine.apply_model(_pack_heads)
        self.engine.reset_prefix_cache()

    def sleep(self) -> None:
        """Free the engine's memory on a GPU: level 1, as level 2 has corrupted weights (NVIDIA-NeMo/RL issue 2631)."""
        if self.policy.device.type == "cuda":
            self.engine.sleep(level=1)

    def under(self, config: RolloutConfig) -> "VllmSampler":
        """The same engine's sampler under other settings."""
        other = copy.copy(self)
        other.config = config
        return other

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, seed: Sequence[int], *, greedy: bool = False
    ) -> list[Completion]:
        """As ``Sampler.sample``, one request for each completion, with a seed of its own.

        A completion's seed is a number in [0, 2⁶³) from its ``random_key``. vLLM draws by it, but from probabilities
        that round with the batch, so that equal weights may write another completion beside other prompts.
        """
        self._check_length(prompts)
        config, engine, stop_ids = self.config, self.engine, self.policy.stop_ids
        stop = StopStrings(config.stop, self.policy.tokenizer)
        requests = {f"{i}/{g}": (prompt, g) for i, prompt in enumerate(prompts) for g in range(group_size)}
        written: dict[str, Completion] = {}
        try:
            for name, (prompt, g) in requests.items():
                settings = vllm.SamplingParams(
                    temperature=0.0 if greedy else config.temperature,
                    top_p=1.0 if greedy else config.top_p,
                    seed=int(generator(*random_key(seed, prompt, g)).integers(2**63)),
                    max_tokens=config.max_new_tokens,
                    stop_token_ids=stop_ids,
                    ignore_eos=True,  # which is one of the stop tokens
                    logprobs=0,  # of the sampled token alone
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                engine.add_request(name, vllm.TokensPrompt(prompt_token_ids=prompt.token_ids), settings)
            while engine.has_unfinished_requests():
                interrupt.check()
                for result in engine.step():
                    asked = requests[result.request_id]
                    written[result.request_id] = _completion(stop, not stop_ids, *asked, result.outputs[0])
        finally:
            engine.abort_request([name for name in requests if name not in written])
        return [written[name] for name in requests]

    def _check_length(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts behind which vLLM would write less than was asked for. Raises NoRoomError."""
        longest, limit = max(len(prompt.token_ids) for prompt in prompts), self.engine.model_config.max_model_len
        if longest + self.config.max_new_tokens > limit:
            raise NoRoomError(
                f"rollout.kv_cache_gib={self.config.kv_cache_gib:g}: a prompt of {longest} tokens and "
                f"{self.config.max_new_tokens} new ones are more than the {limit} that vLLM has room for, at most the "
                "model's context; raise it, or lower dataset.max_prompt_tokens or max_new_tokens"
            )


def _completion(stop: StopStrings, endless: bool, prompt: Prompt, sample: int, output: Any) -> Completion:
    """A finished output of vLLM's, cut at the stop strings, with the log-probabilities that it was drawn by.

    The text of an ``endless`` policy, which has no stop token, is finished at its one length.
    """
    token_ids = list(output.token_ids)
    logprobs = [step[token].logprob for token, step in zip(token_ids, output.logprobs, strict=True)]
    row = token_ids, logprobs, output.finish_reason == "stop" or endless
    token_ids, logprobs, finished = stop.cut(*row) if stop.strings else row
    return Completion(prompt, sample, token_ids, logprobs, finished, stop.text(token_ids))


def _pack_heads(model: Any) -> None:
    """Pack the heads' weights anew for the CPU's products; of a tied head vLLM's reload keeps the earlier packing."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _engine(policy: Policy, config: RolloutConfig) -> Any:
    """An engine for models of this policy's configuration, with weights that are still to be loaded."""
    is_cuda = policy.device.type == "cuda"
    settings = copy.deepcopy(policy.model.config)
    settings.architectures = [type(policy.model).__name__]
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    with tempfile.TemporaryDirectory() as folder, random_state_kept():
        settings.save_pretrained(folder)
        arguments = vllm.EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            generation_config="vllm",
            load_format="dummy",
            dtype="bfloat16" if policy.autocast else "float32",
            max_model_len=-1,  # the model's context, or as much of it as the KV cache holds
            max_num_seqs=config.max_rows,
            kv_cache_memory_bytes=int(config.kv_cache_gib * 2**30),
            logprobs_mode="processed_logprobs",
            enforce_eager=not is_cuda,  # compiling takes longer than it saves on a CPU
            enable_sleep_mode=is_cuda,
            disable_log_stats=True,
        )
        try:
            return vllm.LLMEngine.from_engine_args(arguments)
        finally:
            torch.set_num_threads = set_num_threads  # which vLLM's CPU worker replaces by nothing
            torch.set_num_threads(threads)
