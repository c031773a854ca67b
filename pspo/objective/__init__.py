"""Trust-region objectives: what stands where PPO and GRPO clip the importance ratio."""

from pspo.base.files import CONF, read_yaml
from pspo.base.schema import build
from pspo.objective.base import LOG_RATIO_CLAMP, Objective, ObjectiveInput, log_ratio, own_class
from pspo.objective.clip import GMPO, GPPO, Clip, NoClip
from pspo.objective.detached import ASPO, CISPO, DPPO, TOPR, VESPO
from pspo.objective.pspo import PSPO, PSPOClip, PSPOGeometric, PSPOProportional, PSPORelative
from pspo.objective.soft import CFPO, DRO, MASPO, R2VPO, SAPO
from pspo.objective.target import TPO

OBJECTIVES: dict[str, type[Objective]] = {
    "noclip": NoClip,
    "clip": Clip,
    "pspo": PSPO,
    "pspo_geometric": PSPOGeometric,
    "pspo_clip": PSPOClip,
    "pspo_relative": PSPORelative,
    "pspo_proportional": PSPOProportional,
    "gppo": GPPO,
    "cispo": CISPO,
    "aspo": ASPO,
    "sapo": SAPO,
    "gmpo": GMPO,
    "cfpo": CFPO,
    "r2vpo": R2VPO,
    "dro": DRO,
    "dppo": DPPO,
    "maspo": MASPO,
    "topr": TOPR,
    "vespo": VESPO,
    "tpo": TPO,
}
Objective.kinds = OBJECTIVES | {"custom": own_class}


def default_objective(name: str) -> Objective:
    """An objective with the values of its option under ``conf/objective``."""
    return build(Objective, read_yaml(CONF / "objective" / f"{name}.yaml"))  # type: ignore[type-abstract]


__all__ = ["LOG_RATIO_CLAMP", "OBJECTIVES", "PSPO", "Objective", "ObjectiveInput", "default_objective", "log_ratio"]
