import errno
import json
import logging
import os
import random
import resource
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from pspo import checkpoint
from pspo.checkpoint import SaveError


@pytest.fixture
def caught(caplog):
    caplog.set_level(logging.WARNING, logger="pspo")
    return caplog


@pytest.fixture
def tmpfs(tmp_path):
    """Mounts a file system of a given size, which a test then fills or makes read-only; unmounted afterwards."""
    place = tmp_path / "tmpfs"
    place.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a tmpfs cannot be mounted here: {getattr(error, 'stderr', error)}")
        return place

    yield mount
    subprocess.run(["umount", str(place)], check=False, capture_output=True)


def trained(policy, optimizer=torch.optim.AdamW, steps=2):
    """A checkpoint's content after a few optimizer steps."""
    made = optimizer(policy.trainable().values(), lr=1e-2)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in policy.trainable().values():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        made.step()
    return made, {
        "weights": checkpoint.weights(policy),
        "optimizer": made.state_dict(),
        "random": checkpoint.random_state(),
        "state": {"progress": {"steps": steps}, "best_score": -1e300},
        "completions": 17,
    }


def state(number, size=1000):
    return {"weights": {"w": torch.full((size,), float(number))}, "number": number}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def assert_same(a, b):
    """Equal to the bit, tensors included, whatever the nesting."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.numpy().tobytes() == b.numpy().tobytes()
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_saved_comes_back_to_the_bit(tmp_path, tiny_policy, dtype):
    policy = tiny_policy(dtype)
    _, saved = trained(policy)
    checkpoint.save(tmp_path, "step_000002", saved, {"time/wall_s": 1.5})
    path, loaded, meta = checkpoint.newest(tmp_path)
    assert path == tmp_path / "step_000002"
    assert_same(loaded, saved)
    assert meta["time/wall_s"] == 1.5
    assert {name.partition("/")[0] for name in meta if "/" in name} == {"time"}


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_training_continues_from_a_checkpoint_to_the_bit(tmp_path, tiny_policy, optimizer):
    straight, resumed = tiny_policy(), tiny_policy(seed=1)
    made, saved = trained(straight, optimizer)
    checkpoint.save(tmp_path, "step_000002", saved, {})
    loaded = checkpoint.newest(tmp_path)[1]
    checkpoint.restore_weights(resumed, loaded["weights"])
    other = optimizer(resumed.trainable().values(), lr=1.0)
    other.load_state_dict(loaded["optimizer"])
    for policy, one in ((straight, made), (resumed, other)):
        for parameter in policy.trainable().values():
            parameter.grad = torch.sin(parameter.detach())
        one.step()
    assert_same(checkpoint.weights(resumed), checkpoint.weights(straight))


def test_weights_of_another_model_are_refused(tiny_policy):
    policy = tiny_policy()
    saved = checkpoint.weights(policy)
    first = next(iter(saved))
    del saved[first]
    with pytest.raises(KeyError, match=first):
        checkpoint.restore_weights(policy, saved)


def test_equal_state_is_equal_bytes(tmp_path, tiny_policy):
    for place in ("a", "b"):
        _, saved = trained(tiny_policy())
        saved["random"] = {}
        checkpoint.save(tmp_path / place, "step_000002", saved, {})
    first, second = (tmp_path / place / "step_000002" for place in ("a", "b"))
    assert (first / "state.pt").read_bytes() == (second / "state.pt").read_bytes()
    assert (first / "meta.json").read_bytes() == (second / "meta.json").read_bytes()


def test_the_newest_is_found_and_the_right_number_kept(tmp_path):
    for number in (2, 9, 10, 11):
        checkpoint.save(tmp_path, f"step_{number:06d}", state(number), {})
        checkpoint.prune(tmp_path, 3)
        assert checkpoint.newest(tmp_path)[1]["number"] == number
    assert names(tmp_path) == ["step_000009", "step_000010", "step_000011"]
    checkpoint.prune(tmp_path, 1)
    assert names(tmp_path) == ["step_000011"]


def test_pruning_leaves_the_best_alone(tmp_path):
    for name in ("best", "step_000001", "step_000002"):
        checkpoint.save(tmp_path, name, state(1), {})
    checkpoint.prune(tmp_path, 1)
    assert names(tmp_path) == ["best", "step_000002"]
    checkpoint.save(tmp_path, "best", state(7), {})
    assert checkpoint.load(tmp_path / "best")[0]["number"] == 7


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "absent") is None


def truncate(path):
    os.truncate(path / "state.pt", (path / "state.pt").stat().st_size // 2)


def empty(path):
    os.truncate(path / "state.pt", 0)


def flip_bit(path):
    content = bytearray((path / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "state.pt").write_bytes(content)


def remove_meta(path):
    (path / "meta.json").unlink()


def remove_state(path):
    (path / "state.pt").unlink()


def truncate_meta(path):
    os.truncate(path / "meta.json", 20)


def blot_meta(path):
    (path / "meta.json").write_bytes(b'{"sha256": "\xff\xfe"}')


DAMAGES = [truncate, empty, flip_bit, remove_meta, remove_state, truncate_meta, blot_meta]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_checkpoint_is_passed_over_with_a_warning(tmp_path, caught, damage):
    for number in (1, 2, 3):
        checkpoint.save(tmp_path, f"step_{number:06d}", state(number), {})
    damage(tmp_path / "step_000003")
    path, loaded, _ = checkpoint.newest(tmp_path)
    assert (path.name, loaded["number"]) == ("step_000002", 2)
    assert "passing over checkpoint" in caught.text
    assert "step_000003" in caught.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_all_are_torn_there_is_none(tmp_path, caught, damage):
    checkpoint.save(tmp_path, "step_000001", state(1), {})
    damage(tmp_path / "step_000001")
    assert checkpoint.newest(tmp_path) is None
    assert "passing over checkpoint" in caught.text


def test_a_torn_checkpoint_is_written_anew(tmp_path):
    for number in (1, 2):
        checkpoint.save(tmp_path, f"step_{number:06d}", state(number), {})
    truncate(tmp_path / "step_000002")
    checkpoint.save(tmp_path, "step_000002", state(7), {})
    assert checkpoint.newest(tmp_path)[1]["number"] == 7
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_no_single_flipped_bit_goes_unnoticed(tmp_path):
    checkpoint.save(tmp_path, "step_000001", state(1, size=8), {})
    file = tmp_path / "step_000001" / "state.pt"
    whole = file.read_bytes()
    positions = np.random.default_rng(0).integers(len(whole) * 8, size=200)
    for position in positions.tolist():
        content = bytearray(whole)
        content[position // 8] ^= 1 << position % 8
        file.write_bytes(content)
        assert checkpoint.load(file.parent) is None


def test_leftovers_of_interrupted_saves_are_ignored_and_cleaned(tmp_path):
    for name in (".step_000007.new", ".step_000003.new", ".step_000002.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.pt").write_bytes(b"half")
    assert checkpoint.newest(tmp_path) is None
    checkpoint.save(tmp_path, "step_000003", state(3), {})
    assert checkpoint.newest(tmp_path)[1]["number"] == 3
    checkpoint.prune(tmp_path, 2)
    assert names(tmp_path) == ["step_000003"]


def assert_refused(directory, last, size=1_000_000):
    """Saving fails with one sentence, and what was there is there still, to the bit."""
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} if last else {}
    with pytest.raises(SaveError) as caught:
        checkpoint.save(directory, "step_000002", state(2, size), {})
    message = str(caught.value)
    assert str(directory / "step_000002") in message
    assert "\n" not in message
    assert f"last good checkpoint is {last}" in message if last else "no earlier checkpoint" in message
    if last:
        assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
        assert names(directory) == [last.name]
        assert checkpoint.newest(directory)[1]["number"] == 1
    return message


def test_a_full_disk_leaves_the_last_checkpoint_intact(tmpfs):
    place = tmpfs("size=1m")
    checkpoint.save(place, "step_000001", state(1), {})
    assert "No space left on device" in assert_refused(place, place / "step_000001")
    checkpoint.save(place, "step_000002", state(2), {})  # it goes on as soon as there is room
    assert checkpoint.newest(place)[1]["number"] == 2


@pytest.mark.parametrize("inodes", [4, 5, 6])
def test_a_disk_may_become_full_at_any_file(tmpfs, inodes):
    """The root and one checkpoint take 4; then the directory, state.pt or meta.json is the first without room."""
    place = tmpfs(f"nr_inodes={inodes}")
    checkpoint.save(place, "step_000001", state(1), {})
    assert "No space left on device" in assert_refused(place, place / "step_000001", size=10)


def test_a_read_only_disk_leaves_the_last_checkpoint_intact(tmpfs):
    place = tmpfs("size=1m")
    checkpoint.save(place, "step_000001", state(1), {})
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    assert "Read-only file system" in assert_refused(place, place / "step_000001", size=10)


def test_a_limit_on_file_size_leaves_the_last_checkpoint_intact(tmp_path):
    """The portable full disk: the operating system itself refuses the write in the middle of state.pt."""
    checkpoint.save(tmp_path, "step_000001", state(1), {})
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        assert "File too large" in assert_refused(tmp_path, tmp_path / "step_000001")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("function", ["fsync", "rename", "mkdir", "replace"])
def test_whatever_call_fails_the_last_checkpoint_is_intact(tmp_path, monkeypatch, function):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoint.save(tmp_path, "step_000001", state(1), {})
    monkeypatch.setattr(os, function, fail)
    assert "No space left on device" in assert_refused(tmp_path, tmp_path / "step_000001", size=10)


def test_a_place_that_cannot_be_written_is_said_plainly(tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in assert_refused(tmp_path / "file" / "checkpoints", None, size=10)


def draws():
    return torch.rand(3).tolist() + np.random.rand(3).tolist() + [np.random.randn(), random.random(), random.gauss()]


def test_the_global_generators_are_restored_through_a_file(tmp_path):
    before = checkpoint.random_state()
    try:
        random.gauss()  # leaves a second normal number waiting, as numpy's does
        np.random.randn()
        checkpoint.save(tmp_path, "step_000001", {"random": checkpoint.random_state()}, {})
        first = draws()
        assert draws() != first
        checkpoint.restore_random_state(checkpoint.newest(tmp_path)[1]["random"])
        assert draws() == first
    finally:
        checkpoint.restore_random_state(before)


def test_taking_the_state_of_the_generators_changes_nothing():
    before = checkpoint.random_state()
    assert_same(checkpoint.random_state(), before)


def test_meta_says_which_version_wrote_it(tmp_path):
    from pspo import __version__

    checkpoint.save(tmp_path, "step_000001", state(1), {})
    meta = json.loads(Path(tmp_path, "step_000001", "meta.json").read_text())
    assert meta["version"] == __version__
    assert len(meta["sha256"]) == 64
