import pytest

from turbopump.core.errors import UsageError
from turbopump.planner.huggingface import FAMILIES, decoder_shape

LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}


@pytest.mark.parametrize(
    ("table", "billions"),  # as published
    [
        (LLAMA, 8.03),
        ({**LLAMA, "model_type": "mistral", "vocab_size": 32000}, 7.24),
        ({**LLAMA, "model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2},
         46.7),
        (GPT2, 0.1244),
        ({"model_type": "gpt_neox", "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
          "intermediate_size": 24576, "vocab_size": 50432}, 20.55),
        ({"model_type": "mpt", "d_model": 4096, "n_layers": 32, "n_heads": 32, "expansion_ratio": 4,
          "vocab_size": 50432, "max_seq_len": 2048, "attn_config": {"alibi": True}, "no_bias": True}, 6.65),
        ({"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
          "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
          "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936}, 30.5),
        ({"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
          "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
          "tie_word_embeddings": True}, 0.494),
        ({"model_type": "opt", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
          "ffn_dim": 16384, "vocab_size": 50272, "max_position_embeddings": 2048}, 6.66),
        ({"model_type": "bloom", "hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880}, 7.07),
        ({"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
          "multi_query": True, "vocab_size": 65024}, 6.92),
    ],
)  # fmt: skip
def test_the_parameters_are_those_of_the_published_model(table, billions):
    shape = decoder_shape(table, "m/config.json")
    assert shape.params / 1e9 == pytest.approx(billions, rel=0.01)


def test_the_name_is_the_models_or_the_folders():
    assert decoder_shape({**LLAMA, "_name_or_path": "meta-llama/Llama-3-8B"}, "x/config.json").name == "Llama-3-8B"
    assert decoder_shape(LLAMA, "some/mine/config.json").name == "mine"


def test_a_model_that_sees_too_is_its_text_part():
    assert decoder_shape({"model_type": "llava", "text_config": LLAMA}, "c.json") == decoder_shape(LLAMA, "c.json")


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([], "holds no table"),
        ({"a": 1}, "neither a config.json"),
        ({**LLAMA, "model_type": "retnet"}, "model_type: 'retnet' is not known"),
        ({key: value for key, value in LLAMA.items() if key != "hidden_size"}, "hidden (hidden_size or n_embd"),
        ({key: value for key, value in LLAMA.items() if key != "intermediate_size"}, "mlp (intermediate_size or"),
        ({**LLAMA, "num_hidden_layers": "32"}, "num_hidden_layers: '32' given; a whole number above 0"),
        ({**LLAMA, "vocab_size": 0}, "vocab_size: 0 given"),
        ({**LLAMA, "num_hidden_layers": True}, "num_hidden_layers: True given"),
        ({**LLAMA, "num_key_value_heads": 5}, "key heads (5) must divide the heads (32)"),
        ({**LLAMA, "num_attention_heads": 48, "num_key_value_heads": 8}, "must be divisible by the heads (48)"),
    ],
)
def test_what_is_wrong_is_named(table, expected):
    with pytest.raises(UsageError) as caught:
        decoder_shape(table, "m/config.json")
    assert expected in str(caught.value) and "m/config.json" in str(caught.value)


def test_an_unknown_family_lists_those_that_are_known():
    with pytest.raises(UsageError) as caught:
        decoder_shape({**LLAMA, "model_type": "retnet"}, "c.json")
    assert all(kind in str(caught.value) for kind in FAMILIES) and "workload.json" in str(caught.value)
