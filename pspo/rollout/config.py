"""Settings of a rollout: what one step samples, and how."""

from dataclasses import dataclass

from pspo.base.schema import Schema, key


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Schema, block="rollout"):
    """What one step samples, and how."""

    prompts: int = key("prompts of one step", within="[1, inf)")
    group_size: int = key("completions of one prompt, compared with each other", within="[2, inf)")
    max_new_tokens: int = key("tokens after which a completion is truncated", within="[1, inf)")
    overlong_share: float = key(
        "over this last share of max_new_tokens a completion's reward falls linearly, by up to 1", within="[0, 1)"
    )
    max_redraws: int = key(
        "times that a step draws other prompts in place of those whose rewards are all equal; 0 trains on all",
        within="[0, inf)",
    )
    temperature: float = key("logits are divided by it, in sampling and in training alike", within="(0, inf)")
    top_p: float = key("sample from the smallest set of tokens that holds this much probability", within="(0, 1]")
    max_rows: int = key("completions decoded at one time; bounds memory", within="[1, inf)")

    def overlong_penalty(self, length: int) -> float:
        """DAPO's soft punishment (arXiv 2503.14476, eq. 13): 0 down to −1 over the last share of ``max_new_tokens``.

        With a buffer of b = share · L_max tokens: 0 up to L_max − b, then ((L_max − b) − length) / b.
        """
        buffer = self.overlong_share * self.max_new_tokens
        return min(0.0, (self.max_new_tokens - buffer - length) / buffer) if buffer else 0.0
