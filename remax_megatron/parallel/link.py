"""What goes between the two sides of a split run: calls of the policy's ranks to the engine's, and weights.

    policy's ranks                                    engine's ranks
    link.begin("batch", 7, prompts) -- the call -->   link.serve({"batch": answer, ...})
    ...                                               ... answer(7, prompts) ...
    link.result()                   <-- its result --
    link.send_weights(stream)       -- buckets --->   link.received_weights()

A call and its result are pickled, on the way between ranks of one run, and go to all ranks. Weights go from the first
of the policy's ranks to each of the engine's, over NCCL between GPUs and gloo between CPUs; a bucket is on its way
while the next is gathered on one side, and the one before is loaded on the other.
"""

from __future__ import annotations

import datetime
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from remax_megatron.parallel import watchdog
from remax_megatron.parallel.whole_run import WholeRun

CLOSE = "close"
# The watchdog is who notices a side that is gone, or stands still; a side may wait for the other as long as it works.
_AS_LONG_AS_IT_TAKES = datetime.timedelta(days=365)
# Names and shapes of the tensors of a bucket, in the order of the stream.
TensorNames = Sequence[tuple[str, tuple[int, ...]]]


class Link:
    """One rank's end. The constructor is collective over all ranks of the run."""

    def __init__(self, whole: WholeRun, device: torch.device, timeout_s: int):
        """`device` is where weights lie; a transfer of them may take `timeout_s` seconds."""
        self._whole, self._device = whole, device
        self.is_waiting = False  # for the result of a call
        store = dist.PrefixStore("calls", whole.store)
        self._calls = dist.ProcessGroupGloo(store, whole.rank, whole.size, _AS_LONG_AS_IT_TAKES)
        self._weights: dist.Backend | None = None
        place = whole.rank - whole.num_policy_ranks + 1 if whole.is_engine_only else 0
        if whole.is_engine_only or whole.rank == 0:
            store, size = dist.PrefixStore("weights", whole.store), 1 + whole.num_engine_ranks
            self._weights = _backend(store, place, size, device, datetime.timedelta(seconds=timeout_s))

    @property
    def first_ranks(self) -> tuple[int, int]:
        """Return the numbers in the run of the first rank of the policy and of the engine."""
        return 0, self._whole.num_policy_ranks

    # -- calls -----------------------------------------------------------------------------------------------------

    def share(self, value: Any = None, *, source: int = 0) -> Any:
        """The `value` of the rank `source` of the run, on every rank. Collective over all ranks of the run."""
        is_source = self._whole.rank == source
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8) if is_source else torch.empty(0)
        size = torch.tensor([data.numel()])
        _broadcast(self._calls, size, source).wait()
        if not is_source:
            data = torch.empty(int(size), dtype=torch.uint8)
        _broadcast(self._calls, data, source).wait()
        return value if is_source else pickle.loads(data.numpy())

    def begin(self, name: str, *arguments: Any) -> None:
        """Have the engine's ranks do what they `serve` under `name`; they begin when they have nothing else to do.

        Every rank of the policy calls with the same arguments, and asks for the `result` before the next call.
        """
        assert not self.is_waiting, "the result of the call before was not asked for"
        self.share((name, arguments))
        self.is_waiting = True

    def result(self) -> Any:
        """Wait for the result of the call that was begun; every rank of the policy gets it."""
        self.is_waiting = False
        return self.share(source=self._whole.num_policy_ranks)

    def call(self, name: str, *arguments: Any) -> Any:
        """Begin a call and wait for its result. Every rank of the policy calls."""
        self.begin(name, *arguments)
        return self.result()

    def serve(self, handlers: Mapping[str, Callable[..., Any]]) -> None:
        """Do what the policy's ranks call for, one after the other, until they `close`. Every rank of the engine calls;
        the first of them answers."""
        while True:
            with watchdog.idle():
                name, arguments = self.share()
            if name == CLOSE:
                return
            result = handlers[name](*arguments)
            with watchdog.idle():
                self.share(result, source=self._whole.num_policy_ranks)

    def close(self) -> None:
        """End the service; every rank of the policy calls."""
        self.share((CLOSE, ()))

    # -- weights ---------------------------------------------------------------------------------------------------

    def send_weights(self, stream: Iterable[tuple[str, Tensor]], buckets: Sequence[TensorNames]) -> None:
        """Send the tensors of the `stream`, which come in these `buckets`. Every rank of the policy calls, since the
        stream is gathered from all of them; at most two buckets are alive."""
        if self._weights is None:
            for _ in stream:
                pass
            return
        tensors = iter(stream)
        on_the_way: deque[list[tuple[dist.Work, Tensor]]] = deque()
        for names in buckets:
            on_the_way.append([])
            for name, _ in names:
                sent, tensor = next(tensors)
                assert sent == name, (sent, name)
                tensor = tensor.contiguous()  # kept until it has arrived
                on_the_way[-1].append((_broadcast(self._weights, tensor, 0), tensor))
            if len(on_the_way) > 1:
                _wait(on_the_way.popleft())
        assert next(tensors, None) is None, "the stream has more than its buckets"
        for sent_bucket in on_the_way:
            _wait(sent_bucket)

    def received_weights(self, buckets: Sequence[TensorNames], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The tensors that the policy sends in these `buckets`; every rank of the engine iterates to the end."""
        assert self._weights is not None
        on_the_way: deque[list[tuple[str, Tensor, dist.Work]]] = deque()
        for names in (*buckets, None):
            if names is not None:
                on_the_way.append([])
                for name, shape in names:
                    tensor = torch.empty(shape, dtype=dtype, device=self._device)
                    on_the_way[-1].append((name, tensor, _broadcast(self._weights, tensor, 0)))
            if names is None or len(on_the_way) > 1:
                for name, tensor, work in on_the_way.popleft():
                    work.wait()
                    yield name, tensor


def _backend(
    store: dist.Store, rank: int, size: int, device: torch.device, timeout: datetime.timedelta
) -> dist.Backend:
    """What sends tensors on `device` between `size` ranks that meet in `store`."""
    if device.type != "cuda":
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _broadcast(group: dist.Backend, tensor: Tensor, source: int) -> dist.Work:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = source, 0
    return group.broadcast([tensor], options)


def _wait(sent: list[tuple[dist.Work, Tensor]]) -> None:
    for work, _ in sent:
        work.wait()
