"""Ranks: the processes that train one policy together, and the only place that knows of more than one.

``torchrun`` starts them and sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; a process by itself is rank 0 of 1,
for which everything here is nothing. All ranks run the same code and meet where they ``gather``. Rank 0 alone writes.
"""

import contextlib
import datetime
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pspo.base.schema import ConfigError

T = TypeVar("T")
BUCKET_BYTES = 2**26
"""Bytes that one collective sums; larger tensors are summed by themselves."""

LONGEST_WAIT_H = 6
"""Hours that ranks wait for one that is at work, before they give up."""


START_S = 300.0
"""Seconds in which rank 0 must have begun."""

BEAT_S, SILENT_S = 5.0, 60.0
"""Seconds from one sign of life of a rank to the next, and without one until the others give up."""

ENDED = "ended"
"""The last sign of a rank that has left."""

_store: Any = None  # what all ranks read and write, besides the collectives
_ended = threading.Event()
_on_loss: list[Callable[[str], None]] = []


class RankError(RuntimeError):
    """Another rank has ended."""


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Be one of the ranks, if there are several; under ``torchrun`` rank 0 alone is heard. Raises ConfigError."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    beat = _start()
    try:
        yield
    except BaseException as error:
        if not isinstance(error, RankError | SystemExit):  # the first reason of all
            with contextlib.suppress(RuntimeError):
                _store.set("reason", f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
        raise
    else:
        dist.destroy_process_group()
    finally:
        _ended.set()
        beat.join()
        with contextlib.suppress(RuntimeError):  # the store has gone with rank 0
            _store.set(f"pulse {os.environ['RANK']}", ENDED)


def _start() -> threading.Thread:
    """Join the process group; returns the thread that gives signs of life."""
    global _store  # noqa: PLW0603  it belongs to the process, as the ranks do
    local, beside = (int(os.environ[f"LOCAL_{name}"]) for name in ("RANK", "WORLD_SIZE"))
    gpus = torch.cuda.device_count()
    if os.environ["RANK"] != "0" and "TORCHELASTIC_RUN_ID" in os.environ:  # where all ranks share a terminal
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  to the process's end
    if gpus:
        if beside > gpus:
            raise ConfigError(f"{beside} ranks on a node of {gpus} GPUs; give torchrun --nproc-per-node {gpus}")
        torch.cuda.set_device(local)
    _ended.clear()
    start, longest = datetime.timedelta(seconds=START_S), datetime.timedelta(hours=LONGEST_WAIT_H)
    store, rank, number = next(dist.rendezvous("env://", timeout=start))  # type: ignore[attr-defined]
    _store = store.clone()  # with a connection of its own, as that of the collectives may be waiting
    beat = threading.Thread(target=_beat, args=(store.clone(), rank, number), daemon=True)
    beat.start()
    group = dist.PrefixStore("group", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=group, rank=rank, world_size=number, timeout=longest)
    return beat


def _beat(store: Any, rank: int, number: int) -> None:
    """Give signs of life and look for those of the others; ends the process where one has gone silent."""
    heard, since = dict[int, bytes](), dict.fromkeys(range(number), time.monotonic())
    with contextlib.suppress(RuntimeError):  # the store has gone with rank 0, which the next collective says
        while not _ended.wait(BEAT_S):
            store.set(f"pulse {rank}", str(time.monotonic()))
            for other in range(number):
                value = store.get(f"pulse {other}") if store.check([f"pulse {other}"]) else b""
                if value == ENDED.encode() or value != heard.get(other, b""):
                    heard[other], since[other] = value, time.monotonic()
                elif time.monotonic() - since[other] > SILENT_S and not _ended.is_set():
                    for tell in _on_loss:
                        tell(f"rank {other} gave no sign of life for {SILENT_S:g} s")
                    os._exit(1)  # the main thread waits in a collective, which nothing else ends


@contextlib.contextmanager
def watched(tell: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, ``tell`` is called with the reason before this process ends because a rank is silent."""
    _on_loss.append(tell)
    try:
        yield
    finally:
        _on_loss.remove(tell)


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def index() -> int:
    """This rank's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def nodes() -> int:
    """On how many nodes the ranks are."""
    return count() // int(os.environ["LOCAL_WORLD_SIZE"]) if count() > 1 else 1


def is_first() -> bool:
    """Whether this is rank 0, the one that writes."""
    return index() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of the items, which is empty where there are fewer items than ranks."""
    number = index()
    return items[len(items) * number // count() : len(items) * (number + 1) // count()]


def gather(work: Callable[[], T]) -> list[T]:
    """The results of all ranks' calls, on the CPU, by rank; what one rank's call raises, all ranks raise.

    Raises RankError where a rank has ended.
    """
    if count() == 1:
        return [work()]
    result, error = None, None
    try:
        result = work()
    except BaseException as raised:  # noqa: BLE001  also the signal that one rank has got
        error = raised
    outcomes: list[Any] = [None] * count()
    try:
        dist.all_gather_object(outcomes, (result, _portable(error)))
    except RuntimeError as lost:
        raise (error or RankError(f"{_reason()}; the same command resumes")) from lost
    errors = [(rank, other) for rank, (_, other) in enumerate(outcomes) if other is not None]
    if error is not None:
        raise error
    for rank, other in errors:
        other.add_note(f"raised in rank {rank}")
        raise other
    return [outcome for outcome, _ in outcomes]


def _reason() -> str:
    with contextlib.suppress(RuntimeError):
        if _store.check(["reason"]):
            return str(_store.get("reason").decode())
    return "another rank has ended"


def first(work: Callable[[], T]) -> T:
    """What rank 0's call returns, or raises, for all."""
    return cast(T, gather(lambda: work() if is_first() else None)[0])


def spread(items: Sequence[T], work: Callable[[Sequence[T]], list[Any]]) -> list[Any]:
    """``work(items)``, a list for every item one after the other, of which each rank makes the list for its share."""
    return [result for results in gather(lambda: work(share(items))) for result in results]


def total(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over all ranks."""
    if count() == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat)
        for tensor, part in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype, of ``BUCKET_BYTES`` at most or of one tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (bucket[0].dtype != tensor.dtype or sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _portable(error: BaseException | None) -> BaseException | None:
    """The error, or a RankError with its text where it cannot be sent to another process."""
    try:
        return cast(BaseException | None, pickle.loads(pickle.dumps(error)))
    except Exception:  # noqa: BLE001  whatever a class of exception does when it is made again
        return RankError(f"{type(error).__name__}: {error}")
