"""One self-contained HTML page about a run. Everything that a model or a user wrote is escaped."""

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from pspo.base.files import read_lines, write_text
from pspo.base.schema import dotted
from pspo.host import environment
from pspo.report.curves import panel_images
from pspo.report.metrics import METRICS, meaning, read_metrics, read_summary
from pspo.report.table import DIFFERENCE_NOTE, objective, percent, points

NUM_EXAMPLES = 4
MAX_CHARACTERS = 4000
WORK = ("steps", "optimizer_steps", "prompts", "completion_tokens")
ELSEWHERE = ("group", "output_dir")
"""Configuration that says where a run lies, not what it is."""

# Control characters become their visible pictures: a completion must not hide what it holds.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}

_STYLE = """
:root { --ink: #1f2933; --soft: #5b6470; --rule: #e5e7eb; --paper: #f8fafc; --blue: #0072b2; --green: #009e73; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem; }
.over { color: var(--soft); font-size: .85rem; letter-spacing: .02em; margin: 0; overflow-wrap: anywhere; }
h1 { font-size: clamp(1.25rem, 2.6vw, 1.75rem); line-height: 1.3; font-weight: 650; margin: .3rem 0 1rem; }
h1 { max-width: 46rem; }
h2 { font-size: 1.1rem; margin: 2.8rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--rule); }
h3 { font-size: .95rem; margin: 0 0 .6rem; color: var(--soft); font-weight: 600; }
p.small, .small { color: var(--soft); font-size: .85rem; }
ul.notes { margin: 0 0 1rem; padding: .7rem 1rem .7rem 2rem; background: #fff8eb; border-left: 3px solid #e69f00; }
.panels, .columns { display: grid; gap: 1.2rem 1.6rem; }
.panels { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.columns { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.panels img { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem 1.2rem .38rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
code, pre { font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
td code { overflow-wrap: anywhere; }
article { border: 1px solid var(--rule); border-radius: 6px; padding: .8rem 1rem; margin: 0 0 1rem; }
article p { margin: .2rem 0; overflow-wrap: anywhere; }
pre { background: var(--paper); padding: .6rem .8rem; margin: .5rem 0; border-radius: 4px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 22rem; overflow-y: auto; unicode-bidi: isolate; }
.right { color: var(--green); font-weight: 600; } .wrong { color: #b45309; font-weight: 600; }
summary { cursor: pointer; color: var(--soft); }
svg.interval { width: 240px; height: 22px; display: block; }
"""


def write_report(directory: Path) -> Path:
    """Write ``report.html`` from a run directory's files; what depends on the clock or memory has lines of its own."""
    rows, summary = read_metrics(directory), read_summary(directory)
    title = str(summary.get("run", directory.name))
    sections = [
        f'<p class="over">{escape(title)}</p>\n<h1>{escape(headline(summary))}</h1>',
        _notes(summary.get("notes", [])),
        _section("Test accuracy", _evaluation(summary)),
        _section("Training", _panels(rows, summary)),
        _section("Work", _work(rows, summary)),
        _section("Completions, first and last step", _examples(read_lines(directory / "completions.jsonl"))),
        _section("Configuration", _pairs(dotted(_configuration(directory)))),
        _section("Environment", _pairs(dotted(_environment(directory)))),
        _section("Metrics, last value of each", _metrics(rows)),
    ]
    body = "\n".join(section for section in sections if section)
    path = directory / "report.html"
    write_text(path, _PAGE.format(title=escape(title), style=_STYLE, body=body))
    return path


# The policy lets a page fetch nothing and run nothing, whatever slipped through.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""


def escape(value: Any) -> str:
    """Text for an HTML page, whatever it holds."""
    return html.escape(str(value).translate(_VISIBLE).encode("utf-8", "replace").decode("utf-8"))


def headline(summary: Mapping[str, Any]) -> str:
    """The result in a sentence: what was run, accuracy before → after with its interval, on how many problems."""
    if not summary:
        return "This run is not done yet."
    what = f"{objective(summary)}, seed {summary['seed']}, {summary['steps']:,} steps"
    results = [
        f"greedy accuracy on {name} {' → '.join(map(percent, r.values()))}, n = {r['after']['n']:,}"
        for name, r in summary.get("evaluation", {}).items()
    ]
    return f"{what}: {'; '.join(results)}." if results else f"{what}; no test set was answered."


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>" if content else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: frozenset[int] = frozenset()) -> str:
    """A table of cells that are HTML already, one line to a row."""

    def line(tag: str, cells: Sequence[str]) -> str:
        marks = ['class="number"' if index in numbers else "" for index in range(len(cells))]
        return "<tr>" + "".join(f"<{tag} {m}>{c}</{tag}>" for m, c in zip(marks, cells, strict=True)) + "</tr>"

    lines = ([line("th", header)] if header else []) + [line("td", row) for row in rows]
    return '<div class="scroll"><table>\n' + "\n".join(lines).replace(" >", ">") + "\n</table></div>"


def _pairs(pairs: Mapping[str, Any]) -> str:
    if not pairs:
        return ""
    rows = [[f"<code>{escape(key)}</code>", f"<code>{escape(_plain(value))}</code>"] for key, value in pairs.items()]
    middle = (len(rows) + 1) // 2
    return f'<div class="columns">{_table((), rows[:middle])}{_table((), rows[middle:])}</div>'


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if notes else ""


def _evaluation(summary: Mapping[str, Any]) -> str:
    if not summary.get("evaluation"):
        return ""
    header = ("test set", "", "n", "accuracy, 95 % interval", "difference, points", "tokens", "truncated", _SCALE)
    rows = []
    for name, result in summary["evaluation"].items():
        for when, r in result.items():
            label, change = ("", points(result["before"], r)) if "before" in result and when == "after" else (name, "")
            counts = (f"{r['length_mean']:.1f}", f"{100 * r['truncated_rate']:.1f} %")
            rows.append([escape(label), when, f"{r['n']:,}", percent(r), change, *counts, _interval(r, when)])
    return _table(header, rows, frozenset(range(2, 7))) + f'<p class="small">{escape(DIFFERENCE_NOTE)}</p>'


_SCALE = (
    '<svg class="interval" viewBox="0 0 240 22" font-size="12" fill="#5b6470" text-anchor="middle">{}</svg>'.format(
        "".join(f'<text x="{20 + 2 * x}" y="15">{x} %</text>' for x in (0, 25, 50, 75, 100))
    )
)


def _interval(result: Mapping[str, float], when: str) -> str:
    """A dot with its 95 % interval on a scale from 0 to 100 %."""
    color = "#6b7280" if when == "before" else "#009e73"
    x, low, high = (20 + 200 * result[key] for key in ("accuracy", "ci95_low", "ci95_high"))
    ticks = "".join(f'<path d="M{20 + 50 * i} 0v22" stroke="#e5e7eb"/>' for i in range(5))
    return (
        f'<svg class="interval" viewBox="0 0 240 22" role="img" aria-label="{percent(result)}">{ticks}'
        f'<path d="M{low:.1f} 11H{high:.1f}" stroke="{color}" stroke-width="4" opacity=".45"/>'
        f'<circle cx="{x:.1f}" cy="11" r="5" fill="{color}"/></svg>'
    )


def _panels(rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> str:
    images = [
        f'<img alt="{escape(title)} over steps" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for title, png in panel_images(rows, summary)
    ]
    return '<div class="panels">\n' + "\n".join(images) + "\n</div>" if images else ""


def _work(rows: Sequence[dict[str, Any]], summary: Mapping[str, Any]) -> str:
    if not summary:
        return ""
    lines = [[escape(name.replace("_", " ")), f"{summary[name]:,}"] for name in WORK if name in summary]
    lines.append(["weights kept", f"{escape(summary['selection'])}, step {summary['selected_step']:,}"])
    lines += [[f"<code>{escape(key)}</code>", f"{summary[key]:,.1f}"] for key in summary if key.startswith("time/")]
    for key, text, reduce in (
        ("time/step_s", "median", median),
        ("time/tokens_per_s", "median", median),
        ("memory/peak_gib", "largest", max),
    ):
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            lines.append([f"<code>{key}</code>, {text}", f"{reduce(values):,.2f}"])
    return _table((), lines, frozenset({1}))


def _examples(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    columns = []
    for step in dict.fromkeys((rows[0]["step"], rows[-1]["step"])):
        chosen = [row for row in rows if row["step"] == step][:NUM_EXAMPLES]
        columns.append(f"<div><h3>Step {step:,}</h3>\n" + "\n".join(_example(row) for row in chosen) + "</div>")
    return f'<div class="columns">{"".join(columns)}</div>'


def _example(row: Mapping[str, Any]) -> str:
    text = str(row["completion"])
    more = f"\n… {len(text) - MAX_CHARACTERS:,} more characters" if len(text) > MAX_CHARACTERS else ""
    verdict = '<span class="right">correct</span>' if row["correct"] else '<span class="wrong">not correct</span>'
    cut = ", truncated" if row["truncated"] else ""
    facts = f"{verdict}, reward {row['reward']:.3g}, {row['tokens']:,} tokens{cut}"
    return (
        f'<article><p class="small">{escape(row["problem"])}</p><p>{escape(row["question"])}</p>'
        f"<pre>{escape(text[:MAX_CHARACTERS])}{more}</pre>"
        f'<p class="small">{facts}; right answer <code>{escape(row["answer"])}</code></p></article>'
    )


def _metrics(rows: Sequence[dict[str, Any]]) -> str:
    last: dict[str, Any] = {}
    for row in rows:
        last |= row
    order = {key: index for index, key in enumerate(METRICS)}
    lines = [
        [f"<code>{escape(key)}</code>", "not finite" if value is None else f"{value:,.6g}", escape(meaning(key) or "")]
        for key, value in sorted(last.items(), key=lambda item: order.get(item[0], len(order)))
    ]
    return _table((), lines, frozenset({1})) if lines else ""


def _configuration(directory: Path) -> dict[str, Any]:
    path = directory / "config.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: value for key, value in values.items() if key not in ELSEWHERE}


def _environment(directory: Path) -> dict[str, Any]:
    """Where the run's last process ran."""
    return next(reversed(environment.history(directory)), {})
