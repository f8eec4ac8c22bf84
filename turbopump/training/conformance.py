"""Checks for authors of plug-ins: does a model kind, a source kind or a logger keep the contracts of core/plugins.py?

    from turbopump.training.conformance import check_model_kind

    def test_my_kind():
        check_model_kind(KIND, MyConfig(width=8), shape={"features": 4}, batch=(x, y))

Each raises `AssertionError` with one line that says what is expected. tests/conformance runs them on the built-ins.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turbopump.core.config import to_table
from turbopump.core.errors import TurbopumpError
from turbopump.core.plugins import ModelKind, SourceKind
from turbopump.data.loader import Loader, seed_everything
from turbopump.training.metrics import Logger

RECORDS: tuple[dict[str, Any], ...] = (
    {"type": "note", "text": "going on from the checkpoint of step 1"},
    {"type": "evaluation", "step": 0, "split": "validation", "loss": 2.5, "epoch_s": 1.0, "s": 0.1},
    {"type": "step", "step": 1, "loss": 2.5, "grad_norm": 1.0, "lr": 1e-3},
    {"type": "progress", "step": 1, "loss": 2.5, "epoch_s": 2.0, "rss_bytes": 1, "device_bytes": None, "step_s": 0.1,
     "units_per_s": 9.5, "model_flops_per_s": None, "share_of_limit": None, "mfu": None, "remaining_s": 0.0},
    {"type": "checkpoint", "step": 1, "bytes": 9, "stall_s": 0.1, "write_s": 0.2, "epoch_s": 3.0},
    {"type": "step", "step": 2, "loss": float("nan"), "grad_norm": float("inf"), "lr": 1e-3},
    {"type": "of a later version", "anything": [1, {"a": None}]},
)  # fmt: skip


def check_model_kind(kind: ModelKind, config: Any, *, shape: Mapping[str, int], batch: Any) -> None:
    """`config` for samples of `shape`; `batch` is one of those samples as the loader gives it, the larger the better.

    Tried: the torch-free part, parameters and scaling of the workload, the loss, its weight and its metrics.
    """
    _check_config(kind.config, config)
    for name in ("problems", "misfits"):
        check = getattr(config, name, None)
        found = check(*((shape,) if name == "misfits" else ())) if check is not None else []
        _expect(not found, f"{name}() of a config that fits must be empty, not {found}")
    side = kind.torch_side()
    for name in ("build", "loss", "weight", "metrics"):
        _expect(callable(getattr(side, name, None)), f"{kind.module} needs a function {name}")
    one, two = (kind.workload(config, samples, shape, "fp32") for samples in (1, 2))
    _expect(abs(two.cost.flops - 2 * one.cost.flops) <= 0.01 * two.cost.flops, "twice the samples cost twice the FLOPs")
    _expect(two.units == 2 * one.units and two.params == one.params, "samples change the units, not the parameters")
    with torch.device("meta"):
        params = sum(p.numel() for p in side.build(config).parameters())
    _expect(one.params == params, f"the workload counts {one.params} parameters, the model has {params}")
    _check_loss(side, config, batch)


def _check_loss(side: Any, config: Any, batch: Any) -> None:
    seed_everything(1)
    model = side.build(config)
    seed_everything(1)
    same = side.build(config)
    _expect(_equal(model.state_dict(), same.state_dict()), "the same seed must build the same weights")
    seed_everything(2)
    loss = side.loss(model, batch)
    seed_everything(2)
    _expect(isinstance(loss, Tensor) and loss.shape == (), "loss(model, batch) returns one number, a tensor")
    _expect(torch.equal(loss, side.loss(same, batch)), "the same seed must give the same loss")
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    unused = [name for name, grad in grads.items() if grad is None]
    _expect(not unused, f"no gradient reaches {', '.join(unused[:3])}")
    _expect(all(bool(g.isfinite().all()) for g in grads.values() if g is not None), "gradients must be finite")
    weight = side.weight(batch)
    _expect(isinstance(weight, int) and weight > 0, f"weight(batch) is a positive integer, not {weight!r}")
    model.eval()
    with torch.inference_mode():
        metrics, loss = side.metrics(model, batch), side.loss(model, batch)
    _expect("loss" in metrics, "metrics(model, batch) holds `loss`: the best checkpoint is chosen by it")
    total, count = metrics["loss"]
    _expect(count == weight, f"the count of the metric `loss` ({count}) is the weight of the batch ({weight})")
    _expect(abs(total / count - float(loss)) < 1e-3 * max(1.0, abs(float(loss))), "metric and loss are the same mean")


def check_source_kind(kind: SourceKind, config: Any, *, split: str = "train") -> None:
    """`config` of a dataset that is there, with 8 samples or more. Reads a few, in this process and in a worker."""
    _check_config(kind.config, config)
    shape = kind.shape(config)
    _expect(
        all(isinstance(v, int) and v > 0 for v in shape.values()), f"shape(config) holds positive integers: {shape}"
    )
    source = kind.open(config, split)
    size = len(source)
    _expect(size >= 8, f"the check needs 8 samples, there are {size}")
    randomness = getattr(source, "randomness", "seeded")
    _expect(randomness in ("none", "seeded"), f"randomness is 'none' or 'seeded', not {randomness!r}")

    def read(index: int, key: int = 5, of: Any = None) -> Any:
        seed_everything(key)
        return (source if of is None else of)[index]

    for index in (0, size - 1):
        _expect(_equal(read(index), read(index)), f"sample {index} must be the same when it is read again")
    if randomness == "none":
        _expect(_equal(read(1, 5), read(1, 6)), "a source that names no randomness must not depend on the generators")
    _expect(not _equal([read(i) for i in range(4)], [read(0)] * 4), "samples must differ")
    _raises(IndexError, lambda: source[size], f"sample {size} of {size} must raise IndexError")
    _raises(TurbopumpError, lambda: kind.open(config, "no such split"), "an unknown split must raise a TurbopumpError")
    first, kept = read(0), copy.deepcopy(read(0))
    for array in _arrays(first):
        _expect(array.flags.writeable, "samples are arrays that the caller may write to")
        array[...] = 0
    _expect(_equal(kept, read(0)), "samples are fresh arrays: writing to one changed the next")
    _expect(_equal(read(3), read(3, of=pickle.loads(pickle.dumps(source)))), "a pickled source gives the same samples")
    if hasattr(source, "__getitems__") and randomness == "none":
        _check_batches(source)
    threads = getattr(source, "releases_gil", False)
    _expect(
        not threads or randomness == "none", "a source that draws from the global generators cannot be read by threads"
    )
    here = list(Loader(source, global_batch=4, num_steps=3))
    for workers in ("processes", "threads") if threads else ("processes",):
        with Loader(source, global_batch=4, num_steps=3, num_workers=2, workers=workers) as loader:
            _expect(_equal(here, list(loader)), f"loader {workers} must read the same batches as the training thread")


def _check_batches(source: Any) -> None:
    indices = np.array([2, 0, 1])
    got = source.__getitems__(indices)
    one_by_one = [source[int(i)] for i in indices]
    same = got if isinstance(got, list) else [_row(got, i) for i in range(len(indices))]
    _expect(
        _equal(same, one_by_one), "__getitems__ must give the samples that __getitem__ gives, in the order asked for"
    )
    if hasattr(source, "batch_buffers"):
        buffers = source.batch_buffers(len(indices))
        source.__getitems__(indices[::-1].copy(), out=buffers)
        _expect(
            _equal(source.__getitems__(indices, out=buffers), got), "a batch in buffers used again must be the same"
        )


def check_logger(make: Callable[[Path], Logger]) -> None:
    """What the entry point names: `make(directory)` opens a logger, which may write below `directory` only."""
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder) / "logs"
        logger = make(logs)
        for record in RECORDS:
            before = pickle.dumps(record)
            logger.log(record)
            _expect(pickle.dumps(record) == before, "a logger must not change the record: others read it too")
        logger.close()
        outside = [p.name for p in Path(folder).iterdir() if p != logs]
        _expect(not outside, f"a logger writes below its directory only, not {outside}")


def _check_config(cls: type, config: Any) -> None:
    _expect(dataclasses.is_dataclass(cls) and isinstance(config, cls), "config must be of the kind's config dataclass")
    params = getattr(cls, "__dataclass_params__")  # noqa: B009
    _expect(params.frozen, f"{cls.__name__} must be a frozen dataclass")
    _expect(to_table(config).get("kind") == config.kind, f"{cls.__name__} needs a field `kind`")
    code = f"import sys, importlib; sys.path[:] = {sys.path!r}; importlib.import_module({cls.__module__!r})\n"
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    _expect(done.returncode == 0, f"{cls.__module__} must import without torch {done.stderr[-200:]}".strip())


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _raises(expected: type[Exception], call: Callable[[], Any], message: str) -> None:
    try:
        call()
    except expected:
        return
    except Exception as error:
        raise AssertionError(f"{message}, not {error!r}") from error
    raise AssertionError(message)


def _arrays(sample: Any) -> list[np.ndarray]:
    """The writable arrays of a sample."""
    if isinstance(sample, np.ndarray):
        return [sample] if sample.ndim and sample.any() else []
    if isinstance(sample, Mapping):
        sample = tuple(sample.values())
    return [array for item in sample for array in _arrays(item)] if isinstance(sample, (tuple, list)) else []


def _row(batch: Any, index: int) -> Any:
    if isinstance(batch, Mapping):
        return {key: value[index] for key, value in batch.items()}
    return tuple(value[index] for value in batch) if isinstance(batch, tuple) else batch[index]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b))
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))
