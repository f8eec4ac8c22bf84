import copy

import pytest

from turbopump.compute.ops import Gemm, OptimizerStep
from turbopump.core.errors import UsageError
from turbopump.core.files import to_json
from turbopump.core.workload import Block, Workload
from turbopump.models.convnet.config import KIND as CONVNET
from turbopump.models.deepspeech2.config import KIND as DEEPSPEECH2
from turbopump.models.transformer.config import KIND as TRANSFORMER
from turbopump.planner.workload_file import from_table, load, save, to_table

OP = Gemm(2, 3, 4, "fp32")
SMALL = Workload("small", (Block("all", (OP,), OP.gradients, 12, {"none": 8}),), 2, 6, "token", "fp32", 0,
                 (OptimizerStep("adamw", 12),))  # fmt: skip
SHAPES = [
    (TRANSFORMER, {"seq_len": 16}),
    (CONVNET, {"channels": 1, "height": 8, "width": 8}),
    (DEEPSPEECH2, {"frequencies": 40, "frames": 50, "labels": 6, "num_labels": 9}),
]


@pytest.mark.parametrize(("kind", "shape"), SHAPES, ids=["transformer", "convnet", "deepspeech2"])
def test_the_workload_of_every_model_survives_the_file(kind, shape, tmp_path):
    workload = kind.workload(kind.config(), 2, shape, "bf16")
    save(workload, tmp_path / "workload.json")
    assert load(tmp_path / "workload.json") == workload


def changed(path: str, value: object) -> dict:
    table = copy.deepcopy(to_table(SMALL))
    *parents, last = path.split("/")
    where = table
    for name in parents:
        where = where[int(name)] if isinstance(where, list) else where[name]
    where[int(last) if isinstance(where, list) else last] = value
    return table


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("kind", "machine", '"kind" is not "workload"'),
        ("schema", 9, "has schema 9"),
        ("blocks", [], "blocks: none given"),
        ("blocks", {}, "blocks: {} given; a list"),
        ("dtype", "fp7", "dtype: 'fp7' given; one of"),
        ("samples", 0, "samples: 0 given; a whole number of at least 1"),
        ("units", 2.5, "units: 2.5 given"),
        ("name", "", "name: '' given; a text"),
        ("blocks/0/count", True, "blocks[0].count: True given"),
        ("blocks/0/kept_bytes", {"full": 1}, "blocks[0].kept_bytes"),
        ("blocks/0/kept_bytes", {"none": -1}, "blocks[0].kept_bytes.none: -1 given"),
        ("blocks/0/forward/0/op", "Gem", "blocks[0].forward[0]: 'Gem' given; an operation (one of Gemm"),
        ("blocks/0/forward/0/m", "2", "blocks[0].forward[0].m: '2' given; a whole number"),
        ("blocks/0/forward/0/m", -2, "blocks[0].forward[0].m: -2 given"),
        ("blocks/0/forward/0/rows", 2, "blocks[0].forward[0].rows: 2 given; no such field"),
        ("blocks/0/forward/0/dtype", "fp7", "Gemm cannot be made of these fields"),
        ("blocks/0/forward/0", {"op": "Gemm", "m": 2}, "Gemm cannot be made of these fields"),
        ("blocks/0/forward/0", 7, "blocks[0].forward[0]: 7 given"),
        ("blocks/0", 7, "blocks[0]: 7 given; a table"),
        ("optimizer_ops", None, "optimizer_ops: None given; a list"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(path, value, expected):
    with pytest.raises(UsageError) as caught:
        from_table(changed(path, value), "w.json")
    assert str(caught.value).startswith("w.json") and expected in str(caught.value), caught.value


def test_a_file_that_is_none_says_why(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        load(tmp_path / "absent.json")
    (tmp_path / "cut.json").write_bytes(to_json(to_table(SMALL))[:-30])
    with pytest.raises(UsageError, match=r"is not valid JSON .* trace the model again"):
        load(tmp_path / "cut.json")
