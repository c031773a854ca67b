import json
import logging
import re
import time

import pytest

from pspo.base import console
from pspo.base.console import Phase, duration, log, log_to_file, track


@pytest.fixture
def lines(caplog, monkeypatch):
    """What a log that is no terminal gets to read."""
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="pspo")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture(autouse=True)
def no_phase(monkeypatch):
    monkeypatch.setattr(Phase, "current", None)


def wait_for(condition):
    while not condition():  # as long as a busy machine takes
        time.sleep(0.01)


def test_every_phase_begins_with_a_line(lines):
    Phase("loading the model")
    with Phase("training", 30, done=12, unit="steps") as told:
        told(13, "reward 0.31")
    assert list(track(["ab", "c"], "testing on svamp, after", 3, "problems")) == ["ab", "c"]
    Phase("saving the model")
    assert lines() == [
        "loading the model",
        "training: 12 of 30 steps, 40 %",
        "testing on svamp, after: 0 of 3 problems, 0 %",
        "saving the model",
    ]


def test_a_phase_says_how_much_is_done_and_how_long_the_rest_takes(monkeypatch):
    with Phase("training", 1311, done=20, unit="steps") as told:
        assert told.left_s is None
        monkeypatch.setattr(time, "monotonic", lambda: told.begun + 400.0001)
        told(120, "reward 0.31")
        assert told.left_s == pytest.approx(4.0 * (1311 - 120))
        assert str(told) == "training: 120 of 1311 steps, 9 %, reward 0.31, 1:19:24 left"
    with Phase("training", 10**8, unit="completion tokens") as told:
        assert str(told) == "training: 0 of 100000000 completion tokens, 0 %"
    with Phase("training", 0, unit="steps") as told:
        assert str(told) == "training: 0 of 0 steps"


def test_a_validation_in_the_training_has_no_line_of_its_own_unless_one_is_due(lines):
    with Phase("training", 30):
        list(track(["a"], "validation", 1))
        assert lines() == ["training: 0 of 30, 0 %"]
        with Phase("validation", 473, unit="problems"):
            Phase.current.tell()
            assert lines()[1:] == ["validation: 0 of 473 problems, 0 %"]
        assert Phase.current.name == "training"
    assert Phase.current is None


def test_a_run_tells_its_phase_again_and_again_to_its_log_and_to_other_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "TELL_S", 0.01)
    monkeypatch.setattr(log, "level", logging.INFO)
    file, text = tmp_path / ".phase", tmp_path / "run.log"
    file.write_text("of a process that was killed")
    with log_to_file(text):
        assert not file.exists()
        with Phase("training", 30, unit="steps") as told:
            told(12, "reward 0.31")
            wait_for(lambda: json.loads(file.read_text())["done"] == 12)
            wait_for(lambda: text.read_text().count("training: 12 of 30 steps, 40 %, reward 0.31, ") >= 2)
        now = json.loads(file.read_text())
        assert (now["phase"], now["done"], now["total"]) == ("training", 12, 30)
        assert now["left_s"] >= 0
        assert now["time"] <= time.time()
    assert list(tmp_path.iterdir()) == [text]
    assert all(re.match(r"time/\S+ INFO training: ", line) for line in text.read_text().splitlines())
    Phase("saving the model")
    assert not file.exists()


def test_a_run_that_raises_leaves_no_phase_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), log_to_file(tmp_path / "run.log"), Phase("training", 3):
        1 / 0  # noqa: B018
    assert (Phase.current, Phase.file, (tmp_path / ".phase").exists()) == (None, None, False)


def test_a_full_disk_does_not_stop_a_run_at_its_phase(tmp_path, monkeypatch):
    def refuse(path, text):
        raise OSError(28, "No space left on device")

    with log_to_file(tmp_path / "run.log"):
        monkeypatch.setattr(console, "write_text", refuse)
        Phase("saving the model")


def test_a_terminal_has_a_line_that_is_rewritten_in_place_of_lines_of_the_log(monkeypatch):
    terminal = console.Console(force_terminal=True, width=80, record=True, stderr=True)
    monkeypatch.setattr(console, "console", terminal)
    handler = console._ConsoleHandler()
    log.addHandler(handler)
    try:
        with Phase("training", 30, unit="steps") as told:
            told(12, "reward [ok]")
            told.line._live.refresh()
    finally:
        log.removeHandler(handler)
    assert "training: 12 of 30 steps, 40 %, reward [ok], 0:00:00 left" in terminal.export_text()


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.9, "0:00:00"), (80, "0:01:20"), (4800, "1:20:00"), (360000, "100:00:00")]
)
def test_durations(seconds, told):
    assert duration(seconds) == told
