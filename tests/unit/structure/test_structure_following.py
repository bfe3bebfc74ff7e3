"""What a pass follows, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.structure.graph import trace
from lightning_prune.structure.verify import prove


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 2))


def free(network: nn.Module, x: Tensor) -> set[str]:
    return {group.name for group in prove(network, trace(network, (x,)), (x,)) if not group.reason}


X = torch.zeros(2, 1, 8, 8)


def statistic(layer, inputs, output) -> None:
    layer.seen = output.mean(1) @ torch.ones(6, 1)


def logger(layer, inputs, output) -> None:
    layer.seen = [float(output.mean()), output.norm().item()]


@pytest.mark.parametrize("hook", [statistic, logger], ids=["statistic", "logger"])
def test_a_hook_that_only_looks_constrains_nothing(hook):
    network = net()
    network[0].register_forward_hook(hook)
    assert free(network, X) == {"0", "2"}


def test_a_hook_that_changes_the_output_is_followed():
    network = net()
    network[0].register_forward_hook(lambda layer, inputs, output: output - output.mean(1, keepdim=True))
    assert free(network, X) == {"2"}


def test_a_hook_that_changes_the_output_in_place_is_followed():
    network = net()

    def hook(layer, inputs, output):
        output.sub_(output.mean(1, keepdim=True))

    network[0].register_forward_hook(hook)
    assert free(network, X) == {"2"}


def test_a_number_taken_in_the_forward_is_followed():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x / (1 + float(x.abs().max())))

    assert free(Scaled(), torch.rand(2, 4)) == set()


def test_what_a_buffer_takes_in_is_followed_though_the_output_does_not_need_it():
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
            self.register_buffer("centre", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            out = self.b(x - self.centre)
            self.centre.copy_(x.mean(0))
            return out

    network = Centred()
    before = network.centre.clone()
    groups = trace(network, (torch.rand(2, 4),))
    assert [(m.tensor, m.dim) for m in groups[0].members if m.tensor == "centre"] == [("centre", 0)]
    assert torch.equal(network.centre, before)


def test_what_a_forward_keeps_stays_what_it_was():
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.anchors = nn.Linear(4, 8), nn.Linear(8, 2), torch.ones(8)
            self.width, self.calls = 8, []

        def forward(self, x: Tensor) -> Tensor:
            self.anchors, self.shape = self.anchors.to(x), x.shape
            self.calls.append(self.width)
            return self.b(self.a(x).view(-1, self.width) * 2)

    network = Keeping()
    trace(network, (torch.rand(2, 4),))
    assert network.anchors.device.type == "cpu"
    assert not hasattr(network, "shape")
    assert network.calls == []
    assert type(network.width) is int


def test_weights_of_attention_that_nobody_reads_do_not_hold_the_heads():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            out, _ = self.attention(x, x, x)
            return self.b(F.relu(out))

    assert "attention.in_proj_weight" in free(Attending(), torch.rand(2, 3, 4))


def test_numbers_that_forward_hashes_are_no_obstacle():
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.scales, self.width = nn.Linear(4, 8), nn.Linear(8, 2), {8: 2.0}, 8

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x) * self.scales.get(self.width, 2.0)))

    assert free(Cached(), torch.rand(2, 4)) == {"a"}


def test_a_width_that_a_list_holds_follows():
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(8, 2), nn.Linear(4, 2)
            self.sizes = [8, 4]

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.a(x).split(self.sizes, -1)
            return self.b(left) + self.c(right)

    x = torch.rand(2, 4)
    groups = prove(network := Listed(), trace(network, (x,)), (x,))
    assert [group.name for group in groups if not group.reason] == ["a"]
    names = {member.tensor for group in groups for member in group.members if "@" in member.tensor}
    assert names == {"@sizes[0]", "@sizes[1]"}


def test_layers_whose_result_nobody_uses_shrink_with_what_they_read():
    class Gates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.gate, self.back = nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 8)
            self.skip = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            z = torch.tanh(self.gate(x))
            x = x + self.back(z)
            x.mean(1)
            return self.skip(z)

    network = Gates()
    assert free(network, torch.rand(2, 4)) == {"a", "gate"}


def test_tables_and_bilinear_layers_shrink():
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.bags = nn.Embedding(9, 8), nn.EmbeddingBag(9, 6)
            self.both, self.head = nn.Bilinear(8, 6, 10), nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.both(self.words(x[:, 0]), self.bags(x))))

    assert free(Pairs(), torch.randint(9, (3, 4))) == {"words", "bags", "both"}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weights_that_hooks_compute_and_layers_keep_are_no_obstacle():
    network = nn.Sequential(
        nn.utils.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 2)
    )
    network(torch.rand(2, 4))  # leaves a weight with a graph behind
    assert "2" in free(network, torch.rand(2, 4))
