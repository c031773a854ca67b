"""Processes beside this one, each with a share of a rollout's or a minibatch's rows, for policies that are small.

Threads of one process meet at a barrier after every product, and a tiny policy's products are too short for that. Lanes
have one thread each and meet once a rollout or minibatch, waiting without spinning. What a share comes to does not
depend on who works it out: where a lane is not there, or not yet, this process does, to the same bits.
"""

import contextlib
import importlib
import io
import logging
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from pspo import fused
from pspo.base.console import log
from pspo.host import environment, interrupt
from pspo.model import Policy

T = TypeVar("T")

MOST = 4
"""Lanes of a run, this process among them: each more has fewer rows, and imports of half a GiB."""

SMALL = 2**23
"""Parameters up to which a policy is small; the products of a larger one are worth several threads."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""The first lane decides what they mean; the others end with it."""


def start(policy: Policy, threads: int) -> "Lanes | None":
    """A lane for each thread, where the policy is small, on the CPU and trained by our layers."""
    count, size = min(threads, MOST), sum(p.numel() for p in policy.model.parameters())
    ours = fused.trains(policy.model.get_decoder(), policy.autocast, policy.gradient_checkpointing)
    return Lanes(policy, count) if count > 1 and size <= SMALL and policy.device.type == "cpu" and ours else None


@contextlib.contextmanager
def beside(policy: Policy, threads: int) -> Iterator[None]:
    """While the block runs, the policy has lanes if they suit it."""
    policy.lanes = start(policy, threads)
    try:
        yield
    finally:
        if policy.lanes is not None:
            policy.lanes.close()
            policy.lanes = None


class Lanes:
    """This process and ``count - 1`` others, with memory in common: the weights, and a gradient of each lane."""

    def __init__(self, policy: Policy, count: int) -> None:
        self.count, self._parameters = count, list(policy.model.parameters())
        self._file = _memory(count * sum(p.nbytes for p in self._parameters))
        self._common = _common(self._file.fileno(), policy)
        self._others = [_Lane(policy, self._file.fileno(), number) for number in range(1, count)]

    def each(self, work: Callable[..., T], parts: Sequence[Sequence[Any]]) -> list[T]:
        """``work(*part)`` of each part, ``count`` of them at the most, in order; their gradients add up in order too.

        Another lane has a policy of its own in place of ours wherever work and parts name it. What it fails at is done
        again here, where it may raise.
        """
        busy: dict[int, _Lane] = {}
        found, gradients, threads = [], [_take_gradient(self._parameters)], torch.get_num_threads()
        torch.cat([p.detach().flatten() for p in self._parameters], out=self._common[0])
        try:
            busy |= {
                n: lane for n, lane in enumerate(self._others[: len(parts) - 1], start=1) if lane.ask(work, parts[n])
            }
            torch.set_num_threads(1)
            for n, part in enumerate(parts):
                answer = busy.pop(n).answer() if n in busy else None
                if answer is None:
                    found.append(work(*part))
                    gradients.append(_take_gradient(self._parameters))
                else:
                    found.append(answer[0])
                    gradients.append(self._common[n] if answer[1] else None)
        except Exception:
            for lane in busy.values():
                lane.answer()  # which nobody needs, but the next question must not get it
            raise
        except BaseException:  # this process is asked to stop, and waits for nobody
            for lane in busy.values():
                lane.end()
            raise
        finally:
            torch.set_num_threads(threads)
        _put_gradient(self._parameters, [gradient for gradient in gradients if gradient is not None])
        return found

    def wait(self) -> None:
        """Until the others have imported what they need: for measurements."""
        for lane in self._others:
            lane.is_ready(wait=True)

    def close(self) -> None:
        """End the others."""
        for lane in self._others:
            lane.end()
        self._file.close()


class _Lane:
    """Another process as this one sees it; one that is lost is asked no more."""

    def __init__(self, policy: Policy, file: int, number: int) -> None:
        self.policy, self.ready, self.lost = policy, False, False
        self.pipe, theirs = Pipe()
        words = [str(theirs.fileno()), str(file), str(number), type(policy.model).__module__]
        command = [sys.executable, "-m", "pspo.lanes", *words]
        self.process: subprocess.Popen[bytes] | None = None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until it ignores them
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno(), file])
        except OSError as error:  # too many processes
            self._lose(error)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    def is_ready(self, *, wait: bool = False) -> bool:
        """Whether it has imported what it needs, and has a policy."""
        if not self.ready and not self.lost and (wait or self.pipe.poll()):
            self.ready = self.answer() is not None and self._say(replace(self.policy, lanes=None))
        return self.ready and not self.lost

    def ask(self, work: Callable[..., Any], part: Sequence[Any]) -> bool:
        """Have it begin; False where it cannot."""
        return self.is_ready() and self._say((work, part))

    def answer(self) -> Any:
        """What its work returned, and whether there is a gradient; None where it has failed or died."""
        try:
            while not self.pipe.poll(0.5):
                interrupt.check()
            return _hear(self.pipe, self.policy)
        except Exception as error:  # noqa: BLE001  half a message may have come
            self._lose(error)
            return None

    def end(self) -> None:
        """Whatever it is at: it may be in its imports."""
        self.lost = True
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.pipe.close()

    def _say(self, message: Any) -> bool:
        try:
            _say(self.pipe, message, self.policy)
        except Exception as error:  # noqa: BLE001  half a message may have gone
            self._lose(error)
        return not self.lost

    def _lose(self, error: Exception) -> None:
        self.end()
        log.warning("a process beside this one is lost (%r): its share of the rows is worked out here", error)


def _own_policy() -> None:
    """Stands in a message for the policy of whoever reads it."""


class _Pickler(pickle.Pickler):
    """Names the policy where it stands in a message; tensors go as arrays, a twentieth of their pickle's time."""

    policy: Policy | None

    def reducer_override(self, obj: Any) -> Any:
        if obj is self.policy:
            return _own_policy, ()
        return (torch.from_numpy, (obj.numpy(),)) if type(obj) is Tensor else NotImplemented


class _Unpickler(pickle.Unpickler):
    """Puts a policy where one is named."""

    policy: Policy | None

    def find_class(self, module: str, name: str) -> Any:
        return (lambda: self.policy) if name == _own_policy.__name__ else super().find_class(module, name)


def _say(pipe: Connection, message: Any, policy: Policy | None) -> None:
    pickler = _Pickler(text := io.BytesIO())
    pickler.policy = policy
    pickler.dump(message)
    pipe.send_bytes(text.getbuffer())


def _hear(pipe: Connection, policy: Policy | None) -> Any:
    unpickler = _Unpickler(io.BytesIO(pipe.recv_bytes()))
    unpickler.policy = policy
    return unpickler.load()


def _memory(size: int) -> IO[bytes]:
    """A file of zeros that is nowhere on a disk, where the system has such files; all of it there, or an OSError."""
    file = open(os.memfd_create("pspo"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()  # noqa: SIM115
    file.write(bytes(size))
    file.flush()
    return file


def _common(file: int, policy: Policy) -> Tensor:
    """The memory in common: the weights, and what each lane but the first adds to the gradient, one to a row."""
    size = sum(p.numel() for p in policy.model.parameters())
    return torch.frombuffer(mmap.mmap(file, 0), dtype=policy.model.dtype).view(-1, size)


def _take_gradient(parameters: Sequence[torch.nn.Parameter]) -> Tensor | None:
    """The gradient, end to end; afterwards there is none."""
    found = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    if all(gradient is None for gradient in found):
        return None
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )


def _put_gradient(parameters: Sequence[torch.nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Their sum, in this order, as the gradient."""
    if gradients:
        total = sum(gradients[1:], gradients[0].clone())
        for p, gradient in zip(parameters, _split(total, parameters), strict=True):
            p.grad = gradient if p.requires_grad else None


def _split(flat: Tensor, parameters: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    """What stands end to end, in the parameters' shapes."""
    parts = torch.split(flat, [p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def _serve(pipe: Connection, file: int, number: int, module: str) -> None:
    """What another lane does: work as it is asked, until the first one is gone."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.dup2(2, 1)  # what anything prints
    logging.disable()
    environment.settle(1)
    for name in (module, "pspo.rollout", "pspo.update"):
        importlib.import_module(name)
    with contextlib.suppress(EOFError, OSError):
        _say(pipe, "ready", None)
        policy: Policy = _hear(pipe, None)
        common, parameters = _common(file, policy), list(policy.model.parameters())
        for p in parameters:
            p.data = p.data.clone()  # aligned in memory as the first lane's are: products may look at that
        while True:
            _await(pipe)
            work, part = _hear(pipe, policy)
            with torch.no_grad():
                torch._foreach_copy_(parameters, _split(common[0], parameters))
            try:
                found, gradient = work(*part), _take_gradient(parameters)
            except Exception:  # noqa: BLE001  the first lane does it again, and raises it
                for p in parameters:
                    p.grad = None
                _say(pipe, None, policy)
                continue
            if gradient is not None:
                common[number].copy_(gradient)
            _say(pipe, (found, gradient is not None), policy)


def _await(pipe: Connection) -> None:
    """Wait for a message, to about a hundredth of the time that it takes to come.

    A plain read would be woken on the processor of the process that wrote, which has just begun with its own part, and
    both would stand there for milliseconds.
    """
    begun = time.monotonic()
    while not pipe.poll():
        time.sleep(min(0.05, max(0.0003, (time.monotonic() - begun) / 100)))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
