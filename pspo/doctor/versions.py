"""The versions of Python and the packages; it imports nothing that another version may break."""

import platform
import re
from importlib.metadata import distribution, distributions

from packaging.requirements import Requirement

from pspo.doctor import Finding, found


def versions() -> Finding:
    """Python and the packages, against the ranges that pspo was installed with; an extra counts where it is whole."""
    about, python = distribution("pspo"), platform.python_version()
    installed = {str(each.name).lower().replace("_", "-"): each.version for each in distributions()}
    installed["python"] = python
    needs = {"": [Requirement(f"python{about.metadata['Requires-Python']}")]}
    for requirement in map(Requirement, about.requires or []):
        extra = re.search(r"extra == ['\"](.+?)['\"]", str(requirement.marker))
        needs.setdefault(extra[1] if extra else "", []).append(requirement)
    whole = {extra: rs for extra, rs in needs.items() if not extra or all(r.name in installed for r in rs)}
    wrong = {
        extra: [r for r in rs if not r.specifier.contains(installed.get(r.name, "0"), prereleases=True)]
        for extra, rs in whole.items()
    }
    outside = [f"{r.name} {installed.get(r.name, 'is missing')}" for rs in wrong.values() for r in rs]
    remedy = "pip install " + " ".join(f"'{r.name}{r.specifier}'" for rs in wrong.values() for r in rs)
    return found(
        "versions",
        "python {python}, torch {torch}, transformers {transformers}; "
        + ("outside pspo's ranges: {outside}" if outside else "{num} packages in the ranges of pspo"),
        fail=remedy * bool(wrong[""]), warn=remedy * bool(outside), outside=", ".join(outside), python=python,
        num=sum(map(len, whole.values())) - 1, torch=installed.get("torch"), transformers=installed.get("transformers"),
    )  # fmt: skip
