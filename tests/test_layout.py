"""What model_table asks for is what upstream's model has, for every configuration that the program takes."""

from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import msgspec
import pytest
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_flatten
from moshi_mlx.models.lm import Lm, LmConfig

from pipeline.checkpoints import synthesize
from pipeline.errors import CheckpointError
from pipeline.headers import Table, Tensor
from pipeline.layout import OFFICIAL, QUALITIES, ModelConfig, model_table
from pipeline.synthesis import SIZES, Size

SHRUNKEN: Final = {
    "dim": 128,
    "num_heads": 2,
    "num_layers": 2,
    "text_card": 96,
    "card": 64,
    "depformer_dim": 64,
    "depformer_num_heads": 2,
    "depformer_num_layers": 2,
    "depformer_dim_feedforward": 192,
}

# The translator's file for MLX has tensors of its own for each step, whatever steps share weights in PyTorch's.
TRANSLATOR: Final = {
    **SHRUNKEN,
    "dim": 256,
    "n_q": 32,
    "dep_q": 16,
    "delays": [0, 0, *[2] * 15, 0, *[2] * 15],
    "context": 500,
    "max_period": 100000.0,
    "depformer_context": 16,
    "depformer_weights_per_step_schedule": [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8, 8, 8, 8],
}

# 2B: dim 2560 in 24 layers, 20 heads; 1B: dim 2048 in 16 layers, 16 heads. Here by a tenth, and by an eighth.
CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "moshi": {**SHRUNKEN, "dim": 256},
    "hibiki-like": TRANSLATOR,
    "2B-like": {**TRANSLATOR, "num_layers": 3, "num_heads": 4, "text_card": 480},
    "1B-like": {**TRANSLATOR, "n_q": 16, "dep_q": 8, "delays": [0, 0, *[2] * 7, 0, *[2] * 7]},
    "sides of unlike width": {**SHRUNKEN, "dim": 256, "n_q": 12, "dep_q": 8, "delays": [0, *range(8), *[3] * 4]},
    "wide depformer": {**SHRUNKEN, "dim": 256, "depformer_dim": 256, "depformer_dim_feedforward": 1024},
    "low rank": {**TRANSLATOR, "depformer_low_rank_embeddings": 64},
    "no multi-linear": {**SHRUNKEN, "dim": 256, "depformer_multi_linear": False, "depformer_weights_per_step": False},
}

REQUIRED: Final = (
    "dim", "num_heads", "num_layers", "causal", "layer_scale", "context", "max_period", "positional_embedding",
    "text_card", "card", "n_q", "dep_q", "delays", "depformer_dim", "depformer_num_heads", "depformer_num_layers",
    "depformer_dim_feedforward", "depformer_pos_emb",
)  # fmt: skip
DTYPES: Final = {mx.bfloat16: "BF16", mx.uint32: "U32"}


def upstream(raw: dict[str, Any], quality: str) -> Table:
    """The tensors of upstream's own model."""
    model = Lm(LmConfig.from_config_dict(raw))
    model.set_dtype(mx.bfloat16)
    entry = QUALITIES[quality]
    if entry.bits is not None and entry.group is not None:
        quantize(model, bits=entry.bits, group_size=entry.group)
    flat: Any = tree_flatten(model.parameters())
    return {name: Tensor(DTYPES[value.dtype], value.shape) for name, value in flat}


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_upstreams(name: str, quality: str) -> None:
    raw = {**OFFICIAL, **CONFIGS[name]}
    assert model_table(msgspec.convert(raw, ModelConfig), quality) == upstream(raw, quality)


def test_the_keys_that_may_be_missing_are_those_that_upstream_does_without() -> None:
    raw = {key: value for key, value in {**OFFICIAL, **CONFIGS["moshi"]}.items() if key in REQUIRED}
    assert model_table(msgspec.convert(raw, ModelConfig), "q4") == upstream(raw, "q4")
    for key in REQUIRED:
        less = {name: value for name, value in raw.items() if name != key}
        with pytest.raises(KeyError, match=key):
            LmConfig.from_config_dict(less)
        with pytest.raises(msgspec.ValidationError, match=f"missing required field `{key}`"):
            msgspec.convert(less, ModelConfig)


def test_groups_that_do_not_fit() -> None:
    config = msgspec.convert({**OFFICIAL, **CONFIGS["moshi"], "dim": 128}, ModelConfig)
    with pytest.raises(CheckpointError, match="linear_out has 352 columns, expected a multiple of 64 for q8"):
        model_table(config, "q8")


@pytest.mark.parametrize("name", ["hibiki-like", "2B-like"])
def test_it_is_found_and_loads_into_upstreams_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mimi = SIZES["tiny"].mimi._replace(bins=64)
    monkeypatch.setitem(SIZES, name, Size(CONFIGS[name], mimi))
    found = synthesize(tmp_path, "q4", name)
    model = Lm(LmConfig.from_config_dict(found.config))
    model.set_dtype(mx.bfloat16)
    assert (found.bits, found.group) == (4, 32)
    quantize(model, bits=4, group_size=32)
    model.load_weights(str(found.model_file), strict=True)
    # One that codes for half of what the model hears.
    monkeypatch.setitem(SIZES, name, Size(CONFIGS[name], mimi._replace(codebooks=8)))
    with pytest.raises(CheckpointError, match="has 8 codebooks of 64 entries, the model asks for 16 of 64"):
        synthesize(tmp_path / "narrow", "q4", name)
