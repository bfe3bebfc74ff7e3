"""Small networks that look up, gather, scatter, pack, or write into parts of tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

EDGES = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 0, 4, 3, 0]])


class Graph(nn.Module):
    """Messages along the edges of a graph, summed by two operators, over (batch, nodes, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.message, self.head = nn.Linear(5, 16), nn.Linear(32, 16), nn.Linear(16, 3)
        self.other = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        source, target = EDGES
        x = F.relu(self.embed(x))
        messages = self.message(torch.cat([x[:, source], x[:, target]], -1))
        x = x + torch.zeros_like(x).index_add(1, target, messages)
        other = self.other(x)[:, source]
        places = target.view(1, -1, 1).expand(x.size(0), -1, other.size(2))
        sums = x.new_zeros(x.size(0), x.size(1), other.size(2)).scatter_add_(1, places, other)
        return self.head(sums)


class Experts(nn.Module):
    """A mixture of experts: the two best of four, each on the rows that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gate, self.head = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        total = torch.zeros_like(x)
        for place, expert in enumerate(self.experts):
            row, column = (chosen == place).nonzero(as_tuple=True)
            total.index_add_(0, row, expert(x[row]) * weights[row, column, None])
        return self.head(x + total)


class Steps(nn.Module):
    """A loop over time whose outputs are written into a tensor; the last of each row is gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.embed = 16, nn.Linear(5, 12)
        self.cell, self.head = nn.LSTMCell(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        hidden, state = x.new_zeros(batch, self.hidden), x.new_zeros(batch, self.hidden)
        out = torch.zeros(time, batch, self.hidden, dtype=x.dtype)
        for step in range(time):
            hidden, state = self.cell(self.embed(x[:, step]), (hidden, state))
            out[step] = hidden
        last = torch.full((1, batch, 1), time - 1).expand(-1, -1, out.size(2))
        return self.head(out.gather(0, last).squeeze(0))


class Packed(nn.Module):
    """Sequences of unlike lengths through a recurrent stack of two directions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 12), nn.Linear(32, 3)
        self.rnn = nn.LSTM(12, 16, 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([5, 7])[-x.shape[0] :]
        packed = pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


class Patches(nn.Module):
    """Pictures taken apart into patches, and put together again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(64, 24)
        self.outer, self.head = nn.Linear(24, 32), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(self.stem(x), 2, stride=2).transpose(1, 2)
        patches = self.outer(F.relu(self.inner(patches))).transpose(1, 2)
        return self.head(F.fold(patches, x.shape[2:], 2, stride=2))
