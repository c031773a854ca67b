import html
import io
import json
import re
import shutil
import urllib.parse

import pandas as pd
import plotly.graph_objects
import pytest
from plotly.offline import get_plotlyjs

from benchmarks.comparison import ATTACK, arms, make_group
from pspo.compare import figures
from pspo.compare.arms import group, selections
from pspo.compare.comparison import choose, compare
from pspo.compare.page import write_page
from pspo.report.panels import SECTIONS, Panel
from pspo.results import load


def page_of(directory):
    """The page as ``python -m pspo.compare`` writes it."""
    runs = group(load(directory, texts=False))
    return write_page(compare(runs, choose(runs, {})), directory / "comparison.html")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Five arms of three seeds, with their page."""
    made = make_group(tmp_path_factory.mktemp("outputs") / "made", list(arms(5)), seeds=3, steps=12, problems=40)
    page_of(made)
    return made


@pytest.fixture(scope="module")
def text(directory):
    """The page without plotly's own script."""
    whole = (directory / "comparison.html").read_text(encoding="utf-8")
    assert whole.count(get_plotlyjs()) == 1
    return whole.replace(get_plotlyjs(), "")


def drawn(text):
    """Title -> traces and layout of every figure of a page."""
    content = json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', text)[1])
    titles = re.findall(r'data-figure="(\d+)".*?aria-label="(.*?)"', text)
    assert len(titles) == len(content)
    return {html.unescape(title): content[int(number)] for number, title in titles}


def test_page_has_a_figure_for_each_question(text):
    titles = drawn(text)
    for part in (
        "Accuracy: training, sampled", "Accuracy: embedded, greedy", "Difference from noclip: embedded, greedy",
        "Accuracy over objective.alpha: embedded, greedy", "Accuracy over the temperature: embedded, paper",
        "pass@k: embedded, temperature 0.8", "Length of correct answers", "Truncated completions",
        "Effective sample size, share of tokens by inner step",
    ):  # fmt: skip
        assert any(part in title for title in titles), part
    positions = [text.index(f"<h2>{title}</h2>") for title in ("What differs", "Outcome", *SECTIONS)]
    assert positions == sorted(positions)
    for title in ("arms, %", "minus noclip, points"):
        assert f">embedded, greedy: {title}</h3>" in text
    assert ">Where the time goes: seconds per step</h3>" in text


def test_every_figure_is_one_that_plotly_knows(text):
    for figure in drawn(text).values():
        plotly.graph_objects.Figure(figure["traces"], figure["layout"])  # raises ValueError for an unknown property


def test_page_needs_no_network_and_runs_nothing_but_its_own_scripts(text):
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    assert "default-src 'none'" in text
    assert text.count("'sha256-") == 2
    assert re.findall(r"<script[^>]*>", text) == [
        '<script type="application/json" id="figures">',
        "<script>",
        "<script>",
    ]


def test_knobs_that_are_swept_together_are_one_axis_and_its_lines_have_names(tmp_path):
    both = "objective=clip", "objective.eps_low={0}", "objective.eps_high={0}"
    swept = [[word.format(eps) for word in both] for eps in (0.1, 0.2, 0.4)]
    swept += [["objective=dppo", "loss.importance=token", f"objective.delta={delta}"] for delta in (0.1, 0.2)]
    swept += [["objective=pspo_proportional", f"objective.delta={delta}"] for delta in (0.1, 0.2)]
    made = make_group(tmp_path / "made", swept, seeds=2, steps=1, problems=4, samples=0)
    figures = drawn(page_of(made).read_text(encoding="utf-8").replace(get_plotlyjs(), ""))
    over = {title: figure for title, figure in figures.items() if title.startswith("Accuracy over")}
    assert [title.partition(":")[0] for title in over] == [
        "Accuracy over objective.eps_low, objective.eps_high", "Accuracy over objective.delta"
    ]  # fmt: skip
    clip, delta = over.values()
    assert [(trace["name"], trace["x"]) for trace in clip["traces"]] == [("clip", ["0.1", "0.2", "0.4"])]
    assert [trace["name"] for trace in delta["traces"]] == ["dppo", "pspo_proportional"]
    assert delta["layout"]["showlegend"]
    assert not clip["layout"]["showlegend"]


def test_page_escapes_what_a_model_wrote(tmp_path):
    made = make_group(tmp_path / "made", [["objective=noclip"]], seeds=1, steps=1, problems=1, samples=0)
    (answers,) = made.glob("*/evaluation/after/greedy/*.jsonl")
    row = json.loads(answers.read_text())
    answers.write_text("".join(json.dumps(row | {"problem": name}) + "\n" for name in ("<b>one", "two")))
    text = page_of(made).read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    assert ATTACK not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "\x1b" not in text
    assert "&lt;b&gt;one" in text
    assert "How many &lt;apples&gt;" in text


def test_the_same_runs_have_the_same_page(directory, text, tmp_path):
    again = shutil.copytree(directory, tmp_path / "made")
    assert page_of(again).read_text(encoding="utf-8").replace(get_plotlyjs(), "") == text


def test_tables_are_files_too(text, directory):
    links = dict(re.findall(r'download="(.+?)" href="data:text/[\w-]+;charset=utf-8,(.*?)"', text))
    runs = group(load(directory, texts=False))
    expected = compare(runs, choose(runs, {}))
    numbers = pd.read_csv(io.StringIO(urllib.parse.unquote(links["embedded_greedy_arms.csv"])))
    pd.testing.assert_frame_equal(numbers, expected.arms, check_dtype=False)
    latex = urllib.parse.unquote(links["embedded_greedy_minus_noclip_points.tex"])
    assert latex.startswith("\\begin{tabular}")
    assert "\\toprule" in latex
    assert "pspo\\_geometric" in latex
    assert all(verdict in html.unescape(text) for verdict in expected.differences["verdict"])
    assert {name.rpartition(".")[0] for name in links if name.endswith("csv")} == {
        name.rpartition(".")[0] for name in links if name.endswith("tex")
    }


def test_completions_of_one_problem_are_different_ones(text, directory):
    cards = re.findall(r"<article><h3>(.*?)</h3>\n<pre>(.*?)</pre>", text, re.DOTALL)
    completions = [completion for _, completion in cards]
    assert len(cards) > 1
    assert len(set(completions)) == len(cards)
    shown = [arm for names, _ in cards for arm in names.split(", ")]
    assert sorted(shown) == sorted(group(load(directory, texts=False)).arms)
    assert "✓ correct" in text
    assert "✗ not correct" in text


def test_equal_completions_stand_once_with_all_their_arms(tmp_path):
    made = make_group(tmp_path / "made", list(arms(3)), seeds=1, steps=1, problems=2, samples=0)
    for run in made.iterdir():
        answers = run / "evaluation" / "after" / "greedy" / "embedded_t0.jsonl"
        rows = [json.loads(line) for line in answers.read_text().splitlines()]
        same = {"completion": "the same", "correct": True, "tokens": 2}
        other = {"completion": "another", "correct": False, "tokens": 3} if "arm00" in run.name else same
        answers.write_text(json.dumps(rows[0] | same) + "\n" + json.dumps(rows[1] | other) + "\n")
    text = page_of(made).read_text(encoding="utf-8")
    cards = dict(re.findall(r"<article><h3>(.*?)</h3>\n<pre>(.*?)</pre>", text))
    assert sorted(cards.values()) == ["another", "the same"]
    assert "embedded/test/1" in text
    (together,) = (names for names, completion in cards.items() if completion == "the same")
    assert len(together.split(", ")) == 2


def test_a_group_with_little_in_it_has_a_page(tmp_path):
    made = make_group(tmp_path / "made", [["objective=clip"]], seeds=1, steps=1, problems=3, samples=0)
    (run,) = made.iterdir()
    (run / "diagnostics.jsonl").unlink()
    (run / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "budget/prompts": 1, "budget/completion_tokens": 1}) + "\n"
    )
    titles = drawn(page_of(made).read_text(encoding="utf-8"))
    assert not any("step" in title or "Difference" in title for title in titles)
    assert any("Accuracy" in title for title in titles)


def rows_of(values):
    """Steps of runs a and b of one arm: (step, value of a, value of b)."""
    return pd.DataFrame(
        [
            {"arm": "x", "run": run, "step": step, "m": value}
            for step, *both in values
            for run, value in zip("ab", both, strict=True)
        ]
    )


PANEL = Panel("t", {"m": ""})


def test_a_curve_is_the_mean_over_runs_with_a_band_from_the_lowest_to_the_highest():
    (figure,) = figures.curves(rows_of([(1, 1.0, 3.0), (2, 2.0, 6.0)]), ["x"], "step", PANEL)
    band, line = figure.traces
    assert (line["x"], line["y"]) == ([1, 2], [2, 4])
    assert (band["x"], band["y"]) == ([1, 2, 2, 1], [3, 6, 2, 1])
    assert not [*figures.curves(rows_of([(1, None, None)]), ["x"], "step", PANEL)]
    assert not [*figures.curves(rows_of([(1, 1.0, 2.0)]), ["x"], "step", Panel("t", {"unknown": ""}))]


def test_long_curves_are_averaged_in_windows_that_end_at_their_step():
    values = [(step, float(step), float(step)) for step in range(1, 201)]
    (figure,) = figures.curves(rows_of(values), ["x"], "step", PANEL)
    (line,) = figure.traces
    assert line["x"] == list(range(2, 201, 2))
    assert line["y"] == [step - 0.5 for step in line["x"]]


def test_marks_are_told_apart_without_colour():
    styles = [figures.style(arm) for arm in range(42)]
    assert len({(style["dash"], style["symbol"]) for style in styles}) == 42
    assert len({style["dash"] for style in styles[:6]}) == 6
    assert all(len(signs) == 1 for signs in ({style["sign"] for style in styles[n::7]} for n in range(7)))


def test_an_interval_and_its_numbers_survive_the_drawing():
    rows = pd.DataFrame([{"arm": "<a>", "value": 1.0, "low": 0.5, "high": 2.5}])
    figure = figures.forest(rows, ["<a>"], "t", "x", zero=True)
    (trace,) = figure.traces
    assert (trace["x"], trace["error_x"]["array"], trace["error_x"]["arrayminus"]) == ([1], [1.5], [0.5])
    assert figure.layout["yaxis"]["ticktext"] == ["&lt;a&gt;"]
    (line,) = figures.intervals(rows.assign(k=2), ["<a>"], "k", "t").traces
    assert (line["x"], line["error_y"]["array"]) == (["2"], [1.5])
    assert figures.short([1 / 3, float("nan"), float("inf")]) == [0.3333, None, None]


def test_of_many_arms_the_reference_and_some_others_are_shown_at_first(tmp_path):
    made = make_group(tmp_path / "made", list(arms(12)), seeds=1, steps=1, problems=2, samples=0)
    text = page_of(made).read_text(encoding="utf-8")
    shown = re.findall(r'<input type="checkbox" value="(.*?)" checked>', text)
    assert len(shown) == 8 < text.count('<input type="checkbox"') == 12
    assert "noclip" in shown


def test_selections_of_the_made_group(directory):
    found = {(s.evaluation, s.temperature, s.when) for s in selections(group(load(directory, texts=False)))}
    assert found == {("greedy", 0, "before"), ("greedy", 0, "after"), ("paper", 0.4, "after"), ("paper", 0.8, "after")}


OVERFLOWING = """() => [...document.querySelectorAll("main *")].filter((element) => {
    const box = element.getBoundingClientRect();
    const wide = element.clientWidth && element.scrollWidth > element.clientWidth + 1;
    return box.width && !element.closest(".scroll, pre, .legend div, svg") && (wide || box.right > innerWidth + 1);
}).map((element) => element.outerHTML.slice(0, 120))"""

CUT = """() => [...document.querySelectorAll(".plot text")].filter((text) => {
    const box = text.getBoundingClientRect(), plot = text.closest(".plot").getBoundingClientRect();
    return box.width && text.textContent.trim() && getComputedStyle(text).visibility != "hidden"
        && (box.left < plot.left - 1 || box.right > plot.right + 1 || box.bottom > plot.bottom + 1);
}).map((text) => text.textContent)"""

DRAWN = """() => [...document.querySelectorAll(".plot")].map((plot) =>
    plot.querySelectorAll(".trace path, .points path, .scatterlayer path, .boxlayer path, .barlayer path").length)"""


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, Debian's chromium-headless-shell or any other on the path."""
    from playwright.sync_api import sync_playwright

    names = ("chromium-headless-shell", "chromium", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    assert path, "no Chromium on the path; apt-get install chromium-headless-shell, as `make browser` does"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path)
        yield chromium
        chromium.close()


def opened(browser, path, width, messages):
    """The page at a width, all figures drawn."""
    tab = browser.new_page(viewport={"width": width, "height": 900}, offline=True)
    tab.set_default_timeout(300_000)  # a busy machine is no failure
    tab.on("console", lambda message: messages.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.on("requestfailed", lambda request: messages.append(f"asked for {request.url}"))
    tab.goto(path.as_uri())
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    tab.wait_for_function("[...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('.main-svg'))")
    return tab


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_all_figures_are_drawn_and_nothing_overflows(browser, directory, text, width):
    messages = []
    tab = opened(browser, directory / "comparison.html", width, messages)
    assert messages == []
    marks = tab.evaluate(DRAWN)
    assert len(marks) == len(drawn(text)) > 20
    assert all(marks), [title for title, number in zip(drawn(text), marks, strict=True) if not number]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(OVERFLOWING) == []
    assert tab.evaluate(CUT) == []
    heights = tab.evaluate("[...document.querySelectorAll('.plot')].map((plot) => plot.getBoundingClientRect().height)")
    assert min(heights) >= 100
    tab.close()


@pytest.mark.browser
def test_in_a_browser_the_legend_hides_an_arm_in_all_figures(browser, directory):
    messages = []
    tab = opened(browser, directory / "comparison.html", 1280, messages)
    lines = "document.querySelectorAll('.scatterlayer .trace').length"
    before = tab.evaluate(lines)
    tab.locator(".legend input").first.uncheck()
    tab.wait_for_function(f"{lines} < {before}")
    tab.locator(".legend input").first.check()
    tab.wait_for_function(f"{lines} == {before}")
    boxes, curves = tab.locator(".legend input").all(), tab.locator('figure:has([aria-label="Reward"])')
    for box in boxes:
        assert curves.is_visible()
        box.uncheck()
    assert curves.is_hidden()  # as it has no line
    assert tab.locator("figure").first.is_visible()
    boxes[0].check()
    assert curves.is_visible()
    assert messages == []
    tab.close()


@pytest.mark.browser
def test_in_a_browser_a_broken_page_is_noticed(browser, directory, tmp_path):
    """What the two tests above look for is found where it is wrong."""
    whole = (directory / "comparison.html").read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(
        whole.replace("<h1>made</h1>", "<h1 style='white-space:nowrap'>" + "made " * 60 + "</h1><script>1</script>")
    )
    messages = []
    tab = opened(browser, broken, 390, messages)
    assert any("Content Security Policy" in message for message in messages)
    assert tab.evaluate(OVERFLOWING)
    tab.close()
