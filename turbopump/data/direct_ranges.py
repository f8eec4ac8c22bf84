"""Direct reads of local files behind the protocol of all range readers: `DirectReader` gives batches in the order in
which they were prefetched, and only those; here batches may be read in any order, announced or not."""

from __future__ import annotations

import os
from collections import deque

import numpy as np

from turbopump.core.errors import DatasetError
from turbopump.data.direct import DirectReader
from turbopump.data.direct_engines import Ranges
from turbopump.data.ranges import Array


class DirectRanges:
    """A `RangeReader` (see `ranges`) over `reader`. One thread at a time."""

    def __init__(self, reader: DirectReader) -> None:
        self._reader = reader
        self._announced: deque[Ranges] = deque()
        self._pid = os.getpid()

    def open(self, key: str, num_bytes: int | None = None) -> int:
        return self._reader.open(key)

    def prefetch(self, handles: Array, offsets: Array, lengths: Array) -> None:
        """Start reading; beyond what the reader takes ahead nothing is started, and the read does it."""
        self._here()
        if len(self._announced) < self._reader.max_pending:
            ranges = Ranges(np.array(handles), np.array(offsets), np.array(lengths))
            self._reader.prefetch(*ranges)
            self._announced.append(ranges)

    def read(self, handles: Array, offsets: Array, lengths: Array) -> Array:
        """Addresses, uint64 [n]. What was announced and is not read now is started again behind it."""
        self._here()
        ranges = Ranges(handles, offsets, lengths)
        try:
            if self._announced and self._announced[0].same(ranges):
                self._announced.popleft()
                return self._reader.read(*ranges)
            again = list(self._announced)
            self.forget()
            at = self._reader.read(*ranges)
            place = next((i for i, other in enumerate(again) if other.same(ranges)), len(again))
            for other in again[:place] + again[place + 1 :]:
                self.prefetch(*other)
            return at
        except DatasetError:
            raise  # of these ranges alone
        except BaseException:  # the reader has dropped all
            self._announced.clear()
            raise

    def refetch(self, handles: Array, offsets: Array, lengths: Array) -> Array:
        """Read anew, because the content was wrong."""
        return self.read(handles, offsets, lengths)

    def forget(self) -> None:
        self._here()
        if self._announced:
            self._announced.clear()
            self._reader.cancel()

    def statistics(self) -> dict[str, float]:
        return {"announced": float(len(self._announced))}

    def close(self) -> None:
        self._announced.clear()
        self._reader.close()

    def _here(self) -> None:
        if self._pid != os.getpid():  # a forked child has nothing under way
            self._pid = os.getpid()
            self._announced.clear()
