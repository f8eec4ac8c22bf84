"""Memory of a shard's buffers: bytes in order over many pieces, used again, never more than a shard of empty ones."""

import numpy as np

from turbopump.data.pieces import PIECE_BYTES, Pieces, Pool, pool_for


def test_bytes_come_back_in_order_whatever_the_pieces():
    rng = np.random.default_rng(0)
    for piece_bytes in (1, 7, 64, 5000):
        pool = Pool(piece_bytes)
        for _ in range(3):  # the second and third time in memory that held other bytes
            buffer, given = Pieces(pool), []
            for _ in range(20):
                array = rng.integers(-9, 9, (int(rng.integers(0, 30)), 3)).astype(np.int32)
                buffer.append(array)
                given.append(array.tobytes())
            pieces = [piece.tobytes() for piece in buffer]
            assert b"".join(pieces) == b"".join(given) and buffer.size == len(b"".join(given))
            assert all(len(piece) == piece_bytes for piece in pieces[:-1])
            buffer.free()
            assert buffer.size == 0 and list(buffer) == []


def test_pieces_are_used_again():
    pool = Pool(4096)
    first = Pieces(pool)
    first.append(np.zeros(3 * 4096, np.uint8))
    places = {piece.ctypes.data for piece in first}
    first.free()
    second, third = Pieces(pool), Pieces(pool)
    second.append(np.ones(2 * 4096, np.uint8))
    third.append(np.ones(4096, np.uint8))
    assert {piece.ctypes.data for piece in (*second, *third)} == places


def test_pieces_hold_whole_blocks_and_little_where_there_are_many_buffers():
    assert pool_for(1 << 26, 4096, 2).piece_bytes == PIECE_BYTES
    assert pool_for(1 << 26, 4096, 1000).piece_bytes == 65536  # 1000 buffers with a byte each: no more than a shard
    assert pool_for(4096, 4096, 3).piece_bytes == 4096
    for block_bytes in (128, 1000, 4096, 1 << 23):
        assert pool_for(1 << 26, block_bytes, 3).piece_bytes % block_bytes == 0
