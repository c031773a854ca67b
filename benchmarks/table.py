"""All results as one Markdown table: ``python -m benchmarks.table``; ``--write`` puts it into the README."""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, markdown

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def text(results: Path = RESULTS) -> str:
    """The rows of every result and, under them, where they were measured; nothing where there are none."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    if not found:
        return ""
    rows = [row for result in found for row in result["rows"]]
    return "\n\n".join([markdown(rows), *sorted({_machine(result) for result in found})])


def _machine(result: dict[str, Any]) -> str:
    about = result["environment"]
    packages = ", ".join(f"{name} {about['packages'][name]}" for name in ("torch", "transformers", "trl"))
    device = about["cpu"] if about["device"] == "cpu" else about["device"]
    return f"Measured on {device}, {about['threads']} CPU threads, with {packages}, {result['date']}."


def put(readme: str, table: str) -> str:
    """The README with this table between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}" if table else f"{before}{BEGIN}\n{END}{after}"


def main() -> None:
    """Print the table, or write it."""
    if "--write" in sys.argv:
        README.write_text(put(README.read_text(encoding="utf-8"), text()), encoding="utf-8")
    else:
        print(text())


if __name__ == "__main__":
    main()
