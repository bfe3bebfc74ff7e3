"""`nn.MultiheadAttention` with heads that together need not be as wide as what it reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FreeMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` after a cut: any number of heads over any width.

    PyTorch's own forward takes the heads' widths from the width of its input. Here `num_heads` heads of
    `head_dim` read `embed_dim` channels, whatever their product is; names, parameters, arguments and results
    are the same. `settle` gives a layer this class, and takes it back when it is not needed.

    Example:
        >>> layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        >>> x = torch.rand(1, 3, 8)
        >>> expected, _ = layer(x, x, x)
        >>> layer.__class__ = FreeMultiheadAttention
        >>> torch.allclose(layer(x, x, x)[0], expected, atol=1e-6)
        True
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; see `nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched, first = query.dim() == 3, self.batch_first
        inputs = [self._batch_first(x, batched) for x in _once(query, key, value)]
        q, k, v = self._projected(*inputs)
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        q, k, v = (x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        rate = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), rate)
            mixed = weights @ v
        elif is_causal and key_padding_mask is None:
            mixed = F.scaled_dot_product_attention(q, k, v, None, rate, is_causal=True)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, rate)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if first else out.transpose(0, 1), weights

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _projected(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        packed = self.in_proj_weight is not None
        if packed and len(inputs) == 1:
            q, k, v = F.linear(inputs[0], self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            separate: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = self.in_proj_weight.chunk(3) if packed else separate
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            inputs = inputs * 3 if len(inputs) == 1 else inputs
            q, k, v = (F.linear(*parts) for parts in zip(inputs, weights, biases, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], 1)
        if self.add_zero_attn:
            k, v = (torch.cat([x, torch.zeros_like(x[:, :1])], 1) for x in (k, v))
        return q, k, v

    def _mask(self, attention: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as one to be added to the scores of (batch, heads, queries, keys)."""
        total: Tensor | None = None
        if attention is not None:
            total = _additive(attention, q.dtype)
            if total.dim() == 3:
                total = total.reshape(-1, self.num_heads, *total.shape[1:])
        if padding is not None:
            rows = _additive(padding if padding.dim() == 2 else padding.unsqueeze(0), q.dtype)
            rows = rows[:, None, None]
            total = rows if total is None else total + rows
        if total is None:
            return None
        # What bias_k and zero attention add at the end is never masked.
        return F.pad(total, (0, k.shape[1] - total.shape[-1]))


def _once(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Self-attention reads one tensor, and can project it once."""
    return (query,) if query is key and key is value else (query, key, value)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def settle(module: nn.Module) -> None:
    """Give every `nn.MultiheadAttention` of a network the class that its numbers ask for.

    Args:
        module: The network, after its parameters and attributes have changed.

    Example:
        >>> layer = nn.MultiheadAttention(8, 2)
        >>> layer.num_heads = 1
        >>> settle(layer)
        >>> type(layer).__name__
        'FreeMultiheadAttention'
    """
    for layer in module.modules():
        if type(layer) in (nn.MultiheadAttention, FreeMultiheadAttention):
            _settle(layer)
    for encoder in module.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            _settle_encoder(encoder)


def _settle_encoder(encoder: Any) -> None:
    free = any(isinstance(child, FreeMultiheadAttention) for child in encoder.modules())
    # Nested tensors are for the fused kernel only.
    if free and getattr(encoder, "use_nested_tensor", False):
        encoder.use_nested_tensor, encoder.nested_before_cut = False, True
    elif not free and vars(encoder).pop("nested_before_cut", False):
        encoder.use_nested_tensor = True


def _settle(layer: Any) -> None:
    wide = layer.num_heads * layer.head_dim
    usual = wide == layer.embed_dim == layer.out_proj.out_features
    kind = nn.MultiheadAttention if usual else FreeMultiheadAttention
    if type(layer) is not kind:
        layer.__class__ = kind
        # Private, but PyTorch's encoder layer looks nowhere else for whether its fused kernel can run.
        layer._qkv_same_embed_dim = usual and layer.in_proj_weight is not None
