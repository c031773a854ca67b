import pytest
import torch

from pspo.host.memory import NoRoomError, halving, is_out_of_memory, peak_gib


def limited(most, error, tried):
    def work(size):
        tried.append(size)
        if size > most:
            raise error
        return -size

    return work


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:75] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_half_is_tried_once_and_then_the_key_is_named(error):
    tried = []
    assert halving("a.b", 9, "or less", limited(9, error, tried)) == (-9, 9)
    assert halving("a.b", 9, "or less", limited(4, error, tried)) == (-4, 4)
    with pytest.raises(NoRoomError, match=r"a\.b=9 does not fit into memory, nor does half of it .* set a\.b=2 or"):
        halving("a.b", 9, "or less", limited(3, error, tried))
    assert tried == [9, 9, 4, 9, 4]


def test_other_errors_are_not_taken_for_it():
    tried = []
    with pytest.raises(RuntimeError, match="no such"):
        halving("a.b", 9, "or less", limited(3, RuntimeError("no such thing"), tried))
    assert tried == [9]
    assert not is_out_of_memory(ValueError("out of memory"))


def test_peak():
    before = peak_gib(torch.device("cpu"))
    held = torch.ones(2**26)  # a quarter of a GiB
    after = peak_gib(torch.device("cpu"))
    assert after >= before
    assert held.numel() * 4 / 2**30 < after < 100
