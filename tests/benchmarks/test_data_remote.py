"""The order of the remote benchmark reads every record once, window by window."""

import numpy as np

from benchmarks.data_remote import OBJECT_BYTES, ORDER_BLOCK_BYTES, RECORD_BYTES, WINDOW_BLOCKS, order_of


def test_every_record_is_read_once_in_windows_of_whole_blocks():
    batches = list(order_of(2))
    handles, offsets, lengths = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert set(lengths.tolist()) == {RECORD_BYTES}
    in_block = ORDER_BLOCK_BYTES // RECORD_BYTES
    assert (
        len(set(zip(handles.tolist(), offsets.tolist())))
        == len(handles)
        == 2 * OBJECT_BYTES // ORDER_BLOCK_BYTES * in_block
    )
    assert (offsets % ORDER_BLOCK_BYTES <= ORDER_BLOCK_BYTES - RECORD_BYTES).all()
    for begin in range(0, len(handles), WINDOW_BLOCKS * in_block):
        window = slice(begin, begin + WINDOW_BLOCKS * in_block)
        touched = set(zip(handles[window].tolist(), (offsets[window] // ORDER_BLOCK_BYTES).tolist()))
        assert len(touched) <= WINDOW_BLOCKS
