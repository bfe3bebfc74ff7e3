"""`nn.MultiheadAttention` whose heads are not as wide as what it reads, against PyTorch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_prune.structure.heads import FreeMultiheadAttention, settle
from lightning_prune.structure.manifest import describe, reshape
from lightning_prune.structure.surgery import Change, apply

OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 6, "vdim": 10, "batch_first": True},
]
B, L, S = 2, 4, 5
BOOLEAN = torch.zeros(L, S, dtype=torch.bool).index_fill(1, torch.tensor([1]), True)
PADDING = torch.arange(B * S).view(B, S) == S - 1
CALLS = {
    "weights": {},
    "weights of every head": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
    "boolean mask": {"attn_mask": BOOLEAN},
    "mask of numbers": {"attn_mask": torch.linspace(0, 1, L * S).view(L, S), "need_weights": False},
    "mask for each head": {"attn_mask": torch.linspace(0, 1, B * 2 * L * S).view(B * 2, L, S)},
    "padding": {"key_padding_mask": PADDING, "need_weights": False},
    "both masks": {"key_padding_mask": PADDING.float(), "attn_mask": BOOLEAN.float()},
    "causal": {"attn_mask": BOOLEAN, "is_causal": True, "need_weights": False},
}


def made(options: dict) -> tuple[nn.MultiheadAttention, list[torch.Tensor]]:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, **options).eval()
    for parameter in layer.parameters():
        parameter.data.normal_()
    widths = (8, options.get("kdim", 8), options.get("vdim", 8))
    inputs = [torch.randn(B, n, width) for n, width in zip((L, S, S), widths, strict=True)]
    return layer, inputs if options.get("batch_first") else [x.transpose(0, 1) for x in inputs]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_it_computes_what_the_usual_one_does(options, call):
    layer, inputs = made(options)
    free = copy.deepcopy(layer)
    free.__class__ = FreeMultiheadAttention
    expected, weights = layer(*inputs, **call)
    actual, ours = free(*inputs, **call)
    torch.testing.assert_close(actual, expected)
    assert (weights is None) == (ours is None)
    if weights is not None:
        torch.testing.assert_close(ours, weights)


def test_one_sequence_without_a_batch():
    layer, inputs = made({"batch_first": True})
    free = copy.deepcopy(layer)
    free.__class__ = FreeMultiheadAttention
    alone = [x[0] for x in inputs]
    for expected, actual in zip(layer(*alone), free(*alone), strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_cut_gives_the_class_and_growing_back_takes_it():
    layer, _ = made({"batch_first": True})
    dense, weight = describe(layer), layer.in_proj_weight
    rows = torch.cat([torch.arange(4) + start for start in (0, 8, 16)])
    kept = {"in_proj_weight": ((0, rows),), "in_proj_bias": ((0, rows),), "out_proj.weight": ((1, rows[:4]),)}
    apply(layer, Change(kept, {"": {"num_heads": 1}, "out_proj": {"in_features": 4}}))
    assert type(layer) is FreeMultiheadAttention
    assert layer.in_proj_weight is weight
    assert layer(*[torch.rand(1, 3, 8)] * 3)[0].shape == (1, 3, 8)
    fresh = nn.MultiheadAttention(8, 2, batch_first=True)
    reshape(fresh, describe(layer))
    fresh.load_state_dict(layer.state_dict())
    reshape(layer, dense)
    assert (type(fresh), type(layer)) == (FreeMultiheadAttention, nn.MultiheadAttention)
    assert layer.num_heads == 2


def test_fused_kernels_of_an_encoder_keep_away_from_a_cut_layer():
    """PyTorch's encoder reads attributes that are private, or set once in its constructor."""
    inner = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    encoder = nn.TransformerEncoder(inner, 2).eval()
    assert encoder.use_nested_tensor
    assert encoder.layers[1].self_attn._qkv_same_embed_dim
    encoder.layers[1].self_attn.num_heads = 1
    settle(encoder)
    assert not encoder.use_nested_tensor
    assert not encoder.layers[1].self_attn._qkv_same_embed_dim
    encoder.layers[1].self_attn.num_heads = 2
    settle(encoder)
    assert encoder.use_nested_tensor
    assert encoder.layers[1].self_attn._qkv_same_embed_dim
