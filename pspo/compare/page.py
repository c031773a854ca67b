"""One self-contained HTML page about a comparison: what differs, what came out, and how the arms got there."""

import base64
import hashlib
from pathlib import Path

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pspo.base.files import write_text
from pspo.compare.comparison import Comparison
from pspo.compare.figures import DASHES, SYMBOLS, style
from pspo.compare.sections import sections_of
from pspo.report.page import MAX_COMPLETION_CHARACTERS, templates

MAX_ARMS_SHOWN = 8
"""Arms whose curves are shown at first, the reference among them; the boxes of the legend show the others."""


def write_page(comparison: Comparison, path: Path) -> Path:
    """Write the page of a comparison, whose numbers stand first, and of the runs' training."""
    group, sections = comparison.group, sections_of(comparison)
    drawn = [figure for section in sections for figure in section.figures]
    environment = templates(Path(__file__).parent)
    environment.filters |= {"digest": _digest, "number": drawn.index}
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    page = environment.get_template("page.html").render(
        title=", ".join(sorted({Path(run).parent.name for run in group.arm_of})),
        group=group,
        arms={arm: style(number) for number, arm in enumerate(group.arms)},
        dashes=DASHES,
        symbols=SYMBOLS,
        shown=sorted(group.arms, key=lambda arm: arm != comparison.against)[:MAX_ARMS_SHOWN],
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
