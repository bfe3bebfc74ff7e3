"""Small networks, one for each way in which attention takes its heads apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A transformer block, pre-norm, around any attention."""

    def __init__(self, attention: nn.Module, dim: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(dim), attention, nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Tower(nn.Module):
    """An embedding, blocks, a norm and a head, over (batch, tokens, 12)."""

    def __init__(self, make, depth: int = 2, dim: int = 32, norm=nn.LayerNorm) -> None:
        super().__init__()
        self.embed = nn.Linear(12, dim)
        self.blocks = nn.Sequential(*(Block(make(), dim) for _ in range(depth)))
        self.norm, self.head = norm(dim), nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x))).mean(1))


class TiedWords(nn.Module):
    """A language model: the table of words is the head, so one weight has channels and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.block, self.norm = nn.Embedding(11, 32), Block(Split()), nn.LayerNorm(32)
        self.places, self.head = nn.Parameter(torch.randn(1, 9, 32)), nn.Linear(32, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.words(x) + self.places[:, : x.shape[1]])))


class FromShape(nn.Module):
    """The usual hand-written attention, whose head width is the stream's by the number of heads."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class Split(nn.Module):
    """As in GPT: one projection split by an attribute, a causal mask, views by the stream's width."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.n_embd, self.n_head = dim, heads
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (y.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class Chunked(nn.Module):
    """A projection in three chunks; the heads' width is an attribute, and so is their sum."""

    def __init__(self, dim: int = 32, heads: int = 4, width: int = 6) -> None:
        super().__init__()
        self.heads, self.width, self.inner = heads, width, heads * width
        self.to_qkv, self.to_out = (
            nn.Linear(dim, 3 * heads * width, bias=False),
            nn.Linear(heads * width, dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, self.heads, self.width).transpose(1, 2) for t in self.to_qkv(x).chunk(3, -1))
        out = torch.softmax(q @ k.transpose(-1, -2) / self.width**0.5, -1) @ v
        return self.to_out(out.transpose(1, 2).reshape(b, n, self.inner))


class Distil(nn.Module):
    """As in DistilBERT: the width of a head is computed from two attributes, and so is their sum."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.n_heads, self.dim = heads, dim
        self.q_lin, self.k_lin, self.v_lin, self.out_lin = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        width = self.dim // self.n_heads
        q, k, v = (
            lin(x).view(x.size(0), -1, self.n_heads, width).transpose(1, 2)
            for lin in (self.q_lin, self.k_lin, self.v_lin)
        )
        scores = (q / width**0.5) @ k.transpose(2, 3)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).contiguous()
        return self.out_lin(mixed.view(x.size(0), -1, self.n_heads * width))


class Grouped(nn.Module):
    """Two query heads share one of keys and values; norms of each head, rotary positions."""

    def __init__(self, dim: int = 32, heads: int = 4, shared: int = 2, width: int = 8) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, shared, width
        self.repeats = heads // shared
        self.q, self.o = nn.Linear(dim, heads * width), nn.Linear(heads * width, dim)
        self.k, self.v = nn.Linear(dim, shared * width), nn.Linear(dim, shared * width)
        self.q_norm, self.k_norm = nn.LayerNorm(width), nn.RMSNorm(width)
        self.register_buffer("speeds", 1.0 / (1 + torch.arange(width // 2)))

    def rotate(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)[:, None] * self.speeds
        cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
        left, right = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * cos + torch.cat((-right, left), -1) * sin

    def repeat(self, x: Tensor) -> Tensor:
        b, heads, n, d = x.shape
        return x[:, :, None].expand(b, heads, self.repeats, n, d).reshape(b, heads * self.repeats, n, d)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q_norm(self.q(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2))
        k = self.k_norm(self.k(x).view(b, n, self.num_kv_heads, self.head_dim).transpose(1, 2))
        q, k = self.rotate(q), self.rotate(k)
        v = self.v(x).view(b, n, self.num_kv_heads, self.head_dim).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v))
        return self.o(mixed.transpose(1, 2).reshape(b, n, -1))


class Window(nn.Module):
    """Swin's attention: windows of 2x2 tokens of a 4x4 grid, a bias for each head and offset."""

    def __init__(self, dim: int = 32, heads: int = 4, size: int = 2) -> None:
        super().__init__()
        self.size, self.num_heads, self.grid = size, heads, 4
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.randn((2 * size - 1) ** 2, heads))
        at = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
        offset = (at[:, :, None] - at[:, None]).permute(1, 2, 0) + size - 1
        self.register_buffer("index", (offset[..., 0] * (2 * size - 1) + offset[..., 1]).flatten())

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        s, g = self.size, self.grid
        windows = x.view(b, g // s, s, g // s, s, c).transpose(2, 3).reshape(-1, s * s, c)
        windows = torch.roll(windows, 1, 1)
        qkv = self.qkv(windows).reshape(-1, s * s, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (c // self.num_heads) ** -0.5) @ k.transpose(-2, -1)
        bias = self.table[self.index].view(s * s, s * s, -1).permute(2, 0, 1).contiguous()
        mixed = ((scores + bias.unsqueeze(0)).softmax(-1) @ v).transpose(1, 2).reshape(-1, s * s, c)
        mixed = torch.roll(self.proj(mixed), -1, 1)
        return mixed.view(b, g // s, g // s, s, s, c).transpose(2, 3).reshape(b, n, c)


class Torch(nn.Module):
    """`nn.MultiheadAttention` on one input."""

    def __init__(self, dim: int = 32, heads: int = 4, *, weights: bool = False, **options: bool) -> None:
        super().__init__()
        self.need_weights, self.first = weights, options.get("batch_first", False)
        self.inner = nn.MultiheadAttention(dim, heads, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else x.transpose(0, 1)
        out = self.inner(x, x, x, need_weights=self.need_weights)[0]
        return out if self.first else out.transpose(0, 1)


class Cross(nn.Module):
    """`nn.MultiheadAttention` over memories of two other widths, with a padding mask."""

    def __init__(self, *, weights: bool = False) -> None:
        super().__init__()
        self.weights = weights
        self.embed, self.keys, self.values = nn.Linear(12, 32), nn.Linear(12, 20), nn.Linear(12, 24)
        self.attention = nn.MultiheadAttention(32, 4, kdim=20, vdim=24, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        padding[:, -1] = True
        q = self.embed(x)
        out, weights = self.attention(q, self.keys(x), self.values(x), key_padding_mask=padding)
        out = self.head(q + out).mean(1)
        return out + weights.sum() if self.weights else out


class Vit(nn.Module):
    """torchvision's ViT: patches, a class token, positions, and the width of the stream as an attribute."""

    def __init__(self, make=lambda: Torch(batch_first=True)) -> None:
        super().__init__()
        self.hidden_dim, self.patch = 32, 4
        self.conv_proj = nn.Conv2d(3, 32, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, 32))
        self.positions = nn.Parameter(torch.randn(1, 5, 32))
        self.blocks = nn.Sequential(*(Block(make()) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        torch._assert(h == 8, "wrong height")
        x = self.conv_proj(x).reshape(n, self.hidden_dim, (h // self.patch) * (w // self.patch))
        x = torch.cat([self.class_token.expand(n, -1, -1), x.permute(0, 2, 1)], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class Masked(nn.Module):
    """A `nn.TransformerEncoder` with a padding mask, which PyTorch runs with nested tensors where it can."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True, activation="gelu")
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        padding[0, -2:] = True
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padding)[:, 0])


class Decoder(nn.Module):
    """`nn.Transformer`: an encoder and a decoder with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Linear(12, 32), nn.Linear(12, 32)
        self.inner = nn.Transformer(32, 4, 1, 1, 48, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((x.shape[1],) * 2, float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        return self.head(self.inner(self.source(x), self.target(x), tgt_mask=mask, tgt_is_causal=True))


class Einsum(nn.Module):
    """Attention by `einsum` over (batch, tokens, heads, width)."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
        return self.o(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))
