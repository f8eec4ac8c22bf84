from dataclasses import fields

import pytest

from turbopump.core.workload import OpCost
from turbopump.data.ops import CheckpointRead, CheckpointWrite, RandomRead, SequentialRead, SequentialWrite
from turbopump.hardware.profile import Measurement, Trial


@pytest.mark.parametrize(
    "op,key",
    [
        (RandomRead(4096, 16, True), "RandomRead(bytes=4096,depth=16,cached=True)"),
        (SequentialRead(1 << 20), "SequentialRead(bytes_per_read=1048576,cached=False,depth=1)"),
        (SequentialWrite(512), "SequentialWrite(bytes_per_write=512)"),
        (CheckpointWrite(10), "CheckpointWrite(bytes=10)"),
        (CheckpointRead(10), "CheckpointRead(bytes=10)"),
    ],
)
def test_key_and_cost_of_each_operation_and_of_its_row(op, key):
    assert op.key == key
    (first, *_) = fields(op)
    assert op.cost == OpCost(0.0, float(getattr(op, first.name)))
    row = Measurement.failed(Trial(op, "pread"), "data", "not tried")
    assert row.op_key == key and row.bytes == op.cost.bytes and row.flops == 0


def test_depth_does_not_change_what_one_read_moves():
    assert RandomRead(4096, 64).cost == RandomRead(4096, 1).cost
