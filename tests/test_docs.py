"""What the documents show is true: their code runs, their links lead somewhere."""

import re
from pathlib import Path

import pytest
from forked import SMALL

from pspo import config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.process
def test_the_python_examples_run_in_their_order(tmp_path, monkeypatch, cache, capsys):
    """With the tests' small settings under those of the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    compose = config.compose
    monkeypatch.setattr(config, "compose", lambda overrides=(): compose([*SMALL, *overrides]))
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(code) == 3
    exec(compile("\n".join(code), "docs/python.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "eps_high=0.28" in printed
    assert "validation/sampled_accuracy" in printed
    weights = {line.split()[0]: line for line in printed.splitlines() if line.startswith(("noclip", "clip", "pspo"))}
    assert "1.2214, 1.4918, 0.6065" in weights["noclip"]  # r = e^0.2, e^0.4, e^-0.5, by hand
    assert "0.0000, 0.6065" in weights["clip"]  # the second ratio is above 1 + ε
    assert "1.0993, 1.3426, 0.5459" in weights["pspo"]  # 0.9 r


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_of_a_page_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target
