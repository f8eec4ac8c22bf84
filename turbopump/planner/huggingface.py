"""Sizes of a decoder from the `config.json` of Hugging Face's transformers, by its model_type and field names.

Families differ in what their fields do not say: whether the MLP is gated, positions are a learned table, products
have biases. That is written here per `model_type`; one that is not listed is an error, not a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbopump.core.errors import UsageError
from turbopump.planner.cases import DecoderShape

FIELDS: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model", "n_embed"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "vocab": ("vocab_size",),
}
"""What every decoder has, by the names that are in use."""
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
MLP = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
POSITIONS = ("n_positions", "max_position_embeddings", "max_seq_len", "n_ctx")
EXPERTS = ("num_local_experts", "num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok",)


@dataclass(frozen=True)
class Family:
    """What the fields of a model_type do not say, or say only where they differ from this."""

    gated: bool = True
    tied: bool = False
    """Where `tie_word_embeddings` is absent."""
    learned: bool = False
    biases: bool = False
    mlp_times: int = 0
    """MLP over hidden size, where no field gives it; 0: the field must be there."""


_LLAMA = Family()
_GPT = Family(gated=False, tied=True, learned=True, biases=True, mlp_times=4)
FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3", "olmo", "olmo2",
                     "olmoe", "smollm3", "granite", "stablelm"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "cohere"), Family(tied=True)),
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "opt": _GPT,
    "gpt_neo": _GPT,
    "gpt_neox": Family(gated=False, biases=True),
    "gptj": Family(gated=False, biases=True, mlp_times=4),
    "bloom": Family(gated=False, tied=True, biases=True, mlp_times=4),
    "falcon": Family(gated=False, tied=True, mlp_times=4),
    "starcoder2": Family(gated=False, tied=True, biases=True),
    "phi": Family(gated=False, biases=True),
    "mpt": Family(gated=False, tied=True, learned=True, mlp_times=4),
}  # fmt: skip


def decoder_shape(table: Any, path: Path | str) -> DecoderShape:
    """The shape a `config.json` describes; raises `UsageError` for a family or fields that are not known."""
    if not isinstance(table, dict):
        raise UsageError(f"{path} holds no table: give a recipe, a Hugging Face config.json or a workload.json")
    if "model_type" not in table and not any(name in table for names in FIELDS.values() for name in names):
        raise UsageError(f"{path} is neither a config.json (it has no model_type) nor a workload.json (docs/plan.md)")
    kind = table.get("model_type")
    if kind not in FAMILIES and isinstance(table.get("text_config"), dict):  # of a model that sees or hears too
        table = table["text_config"]
        kind = table.get("model_type")
    if kind not in FAMILIES:
        raise UsageError(
            f"{path}: model_type: {kind!r} is not known: if it is built like one of {', '.join(FAMILIES)}, write that "
            f"one there; else trace it into a workload.json (docs/plan.md)"
        )
    family = FAMILIES[str(kind)]
    missing = [f"{name} ({' or '.join(names)})" for name, names in FIELDS.items() if _first(table, names) is None]
    if missing or (_first(table, MLP) is None and not family.mlp_times and "expansion_ratio" not in table):
        needed = missing or [f"mlp ({' or '.join(MLP)})"]
        raise UsageError(f"{path}: fields are missing for {kind!r}: {'; '.join(needed)}")
    return _shape(table, family, path)


def _shape(table: Mapping[str, Any], family: Family, path: Path | str) -> DecoderShape:
    sizes = {name: _number(table, names, path) for name, names in FIELDS.items()}
    hidden, heads = sizes["hidden"], sizes["heads"]
    experts = max(1, _number(table, EXPERTS, path, default=1))
    mlp = _number(table, MLP, path, default=(table.get("expansion_ratio") or family.mlp_times) * hidden)
    if experts > 1:
        mlp = _number(table, ("moe_intermediate_size",), path, default=mlp)
    head_dim = _number(table, ("head_dim",), path, default=0)
    if not head_dim and hidden % heads:
        raise UsageError(f"{path}: hidden size ({hidden}) must be divisible by the heads ({heads}), or give head_dim")
    name = str(table.get("_name_or_path") or table.get("name") or "").rstrip("/").rpartition("/")[2]
    return DecoderShape(
        hidden, sizes["layers"], heads, sizes["vocab"], mlp, _kv_heads(table, heads, path), head_dim,
        gated=family.gated, tied=bool(table.get("tie_word_embeddings", family.tied)),
        learned_positions=_positions(table, family, path), biases=family.biases and not table.get("no_bias", False),
        experts=experts, experts_per_token=_number(table, EXPERTS_PER_TOKEN, path, default=1) if experts > 1 else 1,
        name=name or Path(path).resolve().parent.name,
    )  # fmt: skip


def _kv_heads(table: Mapping[str, Any], heads: int, path: Path | str) -> int:
    attention = table.get("attn_config")  # of MPT
    if isinstance(attention, dict) and attention.get("kv_n_heads"):
        return _number(attention, ("kv_n_heads",), path)
    if table.get("multi_query") and not table.get("new_decoder_architecture"):
        return 1
    keys = _number(table, KV_HEADS, path, default=0)
    if keys and heads % keys:
        raise UsageError(f"{path}: key heads ({keys}) must divide the heads ({heads})")
    return keys


def _positions(table: Mapping[str, Any], family: Family, path: Path | str) -> int:
    attention = table.get("attn_config")
    without_table = isinstance(attention, dict) and (attention.get("alibi") or attention.get("rope"))
    return _number(table, POSITIONS, path, default=0) if family.learned and not without_table else 0


def _first(table: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((table[name] for name in names if table.get(name) is not None), None)


def _number(table: Mapping[str, Any], names: tuple[str, ...], path: Path | str, default: float | None = None) -> int:
    """A field that is a whole number above 0; `default` where it is absent."""
    value = _first(table, names)
    if value is None and default is not None:
        return int(default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 40:
        name = next((name for name in names if table.get(name) is not None), names[0])
        raise UsageError(f"{path}: {name}: {value!r} given; a whole number above 0 is needed")
    return value
