"""One self-contained HTML page about a comparison: what differs, what came out, and how the arms got there."""

import base64
import hashlib
from pathlib import Path

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pspo.base.files import write_text
from pspo.compare.arms import Group
from pspo.compare.comparison import Comparison
from pspo.compare.figures import DASHES, SYMBOLS, Style
from pspo.compare.sections import sections_of
from pspo.report.page import templates

MAX_ARMS_SHOWN = 8
"""Arms whose curves are shown at first, the reference among them; the boxes of the legend show the others."""
MAX_COMPLETION_CHARACTERS = 4000


def write_page(group: Group, comparison: Comparison, path: Path) -> Path:
    """Write the page of a group; ``comparison`` has the numbers that stand first."""
    arms, sections = list(group.arms), sections_of(group, comparison)
    drawn = [figure for section in sections for figure in section.figures]
    environment = templates(Path(__file__).parent)
    environment.filters |= {"digest": _digest, "number": drawn.index}
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    page = environment.get_template("page.html").render(
        title=", ".join(sorted({Path(run).parent.name for run in group.arm_of})),
        subtitle=f"{len(arms)} arms, {len(group.arm_of)} finished runs",
        warnings=group.warnings,
        left_out=group.left_out,
        arms=[{"label": label, **vars(Style.of(number))} for number, label in enumerate(arms)],
        dashes=DASHES,
        symbols=SYMBOLS,
        shown=sorted(arms, key=lambda label: label != comparison.against)[:MAX_ARMS_SHOWN],
        max_characters=MAX_COMPLETION_CHARACTERS,
        sections=sections,
        figures=htmlsafe_json_dumps([{"traces": figure.traces, "layout": figure.layout} for figure in drawn]),
        scripts=[Markup(get_plotlyjs()), Markup(script)],
    )
    write_text(path, page)
    return path


def _digest(script: str) -> str:
    """The digest by which a Content-Security-Policy admits a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
