import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from turbopump.compute.ops import Attention, Conv2d, CrossEntropy, Embedding, Gemm, Norm, Rnn
from turbopump.core.errors import UsageError
from turbopump.planner.workload_file import load
from turbopump.training.trace_workload import trace_workload

VOCAB, WIDTH, LENGTH, BATCH = 100, 32, 16, 4


class Decoder(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for qkv, out in zip(self.qkv, self.out):
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in qkv(self.norm(x)).chunk(3, -1))
            x = x + out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(x)


def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


TOKENS = torch.zeros(BATCH, LENGTH, dtype=torch.long)


def ops(workload, kind, phase="forward"):
    return {op: b.count for b in workload.blocks for op in getattr(b, phase) if isinstance(op, kind)}


def test_a_decoder_is_written_down_exactly(tmp_path):
    model = Decoder()
    workload = trace_workload(model, TOKENS, tmp_path / "w.json", loss=loss, unit="token", units=BATCH * LENGTH)
    assert load(tmp_path / "w.json") == workload
    rows = BATCH * LENGTH
    assert ops(workload, Gemm) == {Gemm(rows, 3 * WIDTH, WIDTH, "fp32"): 3, Gemm(rows, WIDTH, WIDTH, "fp32"): 3,
                                   Gemm(rows, VOCAB, WIDTH, "fp32"): 1}  # fmt: skip
    assert ops(workload, Attention) == {Attention(BATCH, 2, 2, LENGTH, LENGTH, WIDTH // 2, True, "fp32"): 3}
    assert sum(ops(workload, Attention, "backward").values()) == 3
    assert ops(workload, (Embedding, CrossEntropy, Norm)) == {
        Embedding(rows, VOCAB, WIDTH, "fp32"): 1,
        CrossEntropy(rows, VOCAB, "fp32"): 1,
        Norm("layer", rows, WIDTH, "fp32"): 3,
    }
    products = sum(op.cost.flops * n for op, n in ops(workload, Gemm).items())
    backward = sum(op.cost.flops * n for op, n in ops(workload, Gemm, "backward").items())
    assert backward == 2 * products
    assert workload.params == sum(p.numel() for p in model.parameters())  # the tied table once
    assert (workload.samples, workload.units, workload.unit) == (BATCH, BATCH * LENGTH, "token")


def test_the_module_is_as_it_was():
    model = Decoder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace_workload(model, TOKENS, loss=loss)
    with pytest.raises(RuntimeError, match="on purpose"):
        trace_workload(model, TOKENS, loss=lambda m, b: (_ for _ in ()).throw(RuntimeError("on purpose")))
    assert model.head.weight is model.embed.weight and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert loss(model, TOKENS).isfinite()


def test_kept_bytes_are_those_that_autograd_keeps():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    workload = trace_workload(model, torch.zeros(10, 8), loss=lambda m, x: m(x).sum())
    assert workload.kept_bytes() == 4 * (10 * 8 + 10 * 16)  # the input of each layer; tanh keeps the next one's
    assert set(workload.blocks[0].kept_bytes) == {"none"}


def test_autocast_is_seen():
    workload = trace_workload(Decoder(), TOKENS, loss=loss, dtype="bf16")
    assert {op.dtype for op in ops(workload, (Gemm, Attention))} == {"bf16"} and workload.dtype == "bf16"


def test_convolutions_count_as_torch_counts_them():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                          nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.ConvTranspose2d(8, 4, 2, stride=2),
                          nn.Flatten(2), nn.Conv1d(4, 6, 5))  # fmt: skip
    images = torch.randn(2, 3, 16, 16)
    workload = trace_workload(model, images)
    with FlopCounterMode(display=False) as counter:
        model(images).mean().backward()
    assert workload.cost.flops == counter.get_total_flops()
    assert len(ops(workload, Conv2d)) == 4


def test_groups_count_their_own_products_alone():
    """torch's counter multiplies the weight's gradient by the groups."""
    workload = trace_workload(nn.Conv2d(8, 8, 3, groups=4), torch.zeros(2, 8, 10, 10, requires_grad=True))
    assert workload.cost.flops == 3 * 2 * (2 * 8 * 8 * 8) * (2 * 9)


def test_a_recurrent_layer_is_one_operation():
    workload = trace_workload(nn.LSTM(8, 16, batch_first=True), torch.zeros(4, 10, 8))
    (op,) = ops(workload, Rnn)
    assert (op.kind, op.batch, op.steps, op.input_size, op.hidden_size) == ("lstm", 4, 10, 8, 16)


def test_a_model_larger_than_this_machine_is_traced():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(1 << 16, 1 << 16, bias=False) for _ in range(8)))  # 137 GB
    workload = trace_workload(model, torch.zeros(2, 1 << 16, device="meta"))
    assert workload.params == 8 << 32


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        ((nn.Linear(2, 2), "text"), {}, "the batch holds no tensor"),
        ((nn.Linear(2, 2), torch.tensor(1.0)), {}, "the batch holds no tensor"),
        ((nn.Linear(2, 2), torch.zeros(3, 2)), {"dtype": "fp8"}, "dtype: 'fp8' given; one of fp32, bf16"),
        ((nn.Linear(2, 2), torch.zeros(3, 2)), {"loss": lambda m, x: x.sum()}, "depends on no parameter"),
        ((nn.Linear(2, 2), torch.zeros(3, 2)), {"loss": lambda m, x: m(x).sum().item()}, "asks for the numbers"),
    ],
)
def test_what_cannot_be_traced_says_why(arguments, options, expected):
    with pytest.raises(UsageError, match=expected):
        trace_workload(*arguments, **options)


def test_without_torch_the_extra_is_named():
    code = "import sys; sys.modules['torch'] = None; import turbopump.training.trace_workload"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[2])  # fmt: skip
    assert "MissingDependencyError: tracing a module needs torch" in done.stderr
    assert "pip install 'turbopump[train]'" in done.stderr
