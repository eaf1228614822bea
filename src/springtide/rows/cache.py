"""The keys and values of one sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from springtide.kernels.native import huge_pages

GRAIN = 256  # buffers grow to a multiple of this many tokens


class Cache:
    """Per-layer buffers ``[2, H_kv, capacity, D]`` of post-RoPE keys and values, in the dtype that the model writes.

    Slot ``i < length`` holds the sequence's token ``i``. A pass writes its rows at the slots that follow its prefix;
    they count only once :meth:`commit` says so, and the next pass overwrites what was not committed. Writing below
    ``length`` refreshes tokens in place. Head counts and dtype are taken from the first tensors written.

    ``exact`` counts the leading tokens whose rows are as a dense pass would have written them.
    """

    def __init__(self, num_layers: int) -> None:
        self.length = 0
        self.exact = 0
        self._buffers: list[Tensor | None] = [None] * num_layers

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store rows ``[H_kv, n, D]`` at slots ``start .. start + n``, growing the buffers when needed."""
        stop = start + keys.shape[1]
        self._buffers[layer] = _room(self._buffers[layer], stop, keys)
        k, v = self.read(layer, start, stop)
        k.copy_(keys)
        v.copy_(values)

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Views ``[H_kv, stop - start, D]`` of the keys and values in those slots."""
        buffer = self._buffers[layer]
        assert buffer is not None, "a layer is written before it is read"
        return buffer[0, :, start:stop], buffer[1, :, start:stop]

    @torch.inference_mode()
    def commit(self, start: int, kept: Sequence[int], *, exact: bool) -> None:
        """Keep rows ``kept`` (ascending) of those written from slot ``start`` on, closing the gaps between them.

        ``length`` becomes at least ``start + len(kept)``: a refresh below it leaves it as it is. ``exact``: the rows
        attended to all that they could see; they are as a dense pass writes them if all before them are.
        """
        stay = next((i for i, row in enumerate(kept) if i != row), len(kept))  # rows without a gap before them
        moved = [start + row for row in kept[stay:]]
        if moved:
            buffers = [buffer for buffer in self._buffers if buffer is not None]
            source = torch.tensor(moved, device=buffers[0].device)
            for buffer in buffers:
                buffer[:, :, start + stay : start + len(kept)] = buffer.index_select(2, source)
        if exact and start <= self.exact:
            self.exact = max(self.exact, start + len(kept))
        elif not exact:
            self.exact = min(self.exact, start)
        self.length = max(self.length, start + len(kept))

    def crop(self, length: int) -> None:
        """Forget the tokens from position ``length`` on."""
        self.length = min(self.length, length)
        self.exact = min(self.exact, length)

    def fork(self, length: int | None = None) -> Cache:
        """A cache of the first ``length`` committed tokens (default: all) that goes on by itself."""
        twin, length = Cache(self.layers), self.length if length is None else length
        twin.length, twin.exact = length, min(self.exact, length)
        for layer, buffer in enumerate(self._buffers):
            if buffer is not None and length:
                twin.write(layer, 0, *self.read(layer, 0, length))
        return twin

    @property
    def layers(self) -> int:
        return len(self._buffers)

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers take."""
        return sum(buffer.nbytes for buffer in self._buffers if buffer is not None)


def _room(buffer: Tensor | None, needed: int, like: Tensor) -> Tensor:
    """``buffer`` itself when it holds ``needed`` tokens, else a larger one with the same content, for keys ``like``."""
    if buffer is not None and buffer.shape[2] >= needed:
        return buffer
    used = 0 if buffer is None else buffer.shape[2]
    capacity = -(-max(needed, used + used // 2) // GRAIN) * GRAIN
    grown = like.new_empty(2, like.shape[0], capacity, like.shape[2])
    huge_pages(grown, now=False)
    if buffer is not None:
        grown[:, :, :used] = buffer
    return grown
