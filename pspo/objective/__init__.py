"""Trust-region objectives: what stands where PPO and GRPO clip the importance ratio."""

from pspo.objective.base import Objective, ObjectiveInput
from pspo.objective.clip import Clip, NoClip
from pspo.objective.pspo import PSPO

OBJECTIVES: dict[str, type[Objective]] = {"noclip": NoClip, "clip": Clip, "pspo": PSPO}

__all__ = ["OBJECTIVES", "PSPO", "Clip", "NoClip", "Objective", "ObjectiveInput"]
