"""After a cut an optimizer goes on as it would on the dense network with those channels masked."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from structure_networks import Grouped, Plain, Residual
from torch import nn

from lightning_prune.structure.budget import Budget
from lightning_prune.structure.optimizers import cuts_of, migrate
from lightning_prune.structure.plan import Example, Recipe, measure, plan, survey
from lightning_prune.structure.surgery import Change, apply

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
}
"""Those that treat every weight by itself, for which the masked dense network is an exact twin."""


def removal(net: nn.Module, x: torch.Tensor) -> Change:
    example = Example((x,), {}, ((x[:1],), {}))
    groups = survey(net, example)
    recipe = Recipe(Budget(channels=0.5), round_to=1)
    return plan(net, groups, recipe, measure(net, groups, example), 1.0, example)


def hold(net: nn.Module, change: Change) -> None:
    """Keep every removed weight of the dense twin at zero, so that nothing of it reaches the rest."""
    tensors = dict(net.named_parameters())
    with torch.no_grad():
        for name, cuts in change.kept.items():
            if name in tensors:
                for dim, kept in cuts:
                    lost = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
                    lost[kept] = False
                    tensors[name].index_fill_(dim, lost.nonzero().flatten(), 0.0)


def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> float:
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return float(optimizer.step(closure).detach())


def two_groups(net: nn.Module) -> list[dict]:
    matrices = [p for p in net.parameters() if p.dim() > 1]
    vectors = [p for p in net.parameters() if p.dim() == 1]
    return [{"params": matrices}, {"params": vectors, "lr": 3e-3, "weight_decay": 0.0}]


@pytest.mark.parametrize("make", [Residual, Grouped, Plain])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_cut_network_learns_as_its_masked_dense_twin(name, make):
    torch.manual_seed(0)
    net = make().double()
    shape = (6, 12) if make is Plain else (6, 3, 8, 8)
    x, y = torch.randn(shape).double(), torch.randint(3, (6,))
    optimizer = OPTIMIZERS[name](two_groups(net))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    for _ in range(3):
        step(net, optimizer, x, y)
        schedule.step()

    change = removal(net, x)
    twin = copy.deepcopy(net)
    twin_optimizer = OPTIMIZERS[name](two_groups(twin))
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(twin_optimizer, 12)
    twin_schedule.load_state_dict(schedule.state_dict())
    hold(twin, change)

    net.zero_grad()
    cuts = cuts_of(net, change)
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    apply(net, change)
    migrate(optimizer, cuts)
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == groups

    for _ in range(8):
        assert step(net, optimizer, x, y) == pytest.approx(step(twin, twin_optimizer, x, y), rel=1e-9)
        schedule.step()
        twin_schedule.step()
        hold(twin, change)
        assert schedule.get_last_lr() == twin_schedule.get_last_lr()
    twins = dict(twin.named_parameters())
    for label, parameter in net.named_parameters():
        if float(parameter.grad.abs().max()) < 1e-12:
            continue  # a bias before a BatchNorm has no gradient but rounding noise, whose sign some follow
        torch.testing.assert_close(parameter, change.narrow(label, twins[label]), rtol=1e-8, atol=1e-10)


def test_lbfgs_goes_on_with_its_history():
    """L-BFGS mixes all weights, so its twin is the small network with the history sliced by hand."""
    torch.manual_seed(0)
    net = Plain().double()
    x, y = torch.randn(6, 12).double(), torch.randint(3, (6,))
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3, history_size=5)
    for _ in range(3):
        step(net, optimizer, x, y)
    change = removal(net, x)

    places, offset = [], 0
    for name, parameter in net.named_parameters():
        index = torch.arange(offset, offset + parameter.numel()).view(parameter.shape)
        places.append(change.narrow(name, index).flatten())
        offset += parameter.numel()
    where = torch.cat(places)
    old = next(iter(optimizer.state.values()))
    wanted = {key: [t[where] for t in old[key]] for key in ("old_dirs", "old_stps")}
    wanted["d"] = old["d"][where]
    wanted["prev_flat_grad"] = old["prev_flat_grad"][where]

    net.zero_grad()
    cuts = cuts_of(net, change)
    apply(net, change)
    migrate(optimizer, cuts)
    state = next(iter(optimizer.state.values()))
    for key, value in wanted.items():
        got = state[key]
        pairs = zip(value, got, strict=True) if isinstance(value, list) else [(value, got)]
        assert all(torch.equal(a, b) for a, b in pairs), key
    losses = [step(net, optimizer, x, y) for _ in range(4)]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["Adafactor", "Muon", "SparseAdam"])
def test_other_optimizers_of_torch_go_on(kind):
    """Their update of one weight depends on its neighbours, so no masked twin exists; shapes must follow."""
    torch.manual_seed(0)
    net = (
        Plain().double()
        if kind != "Muon"
        else nn.Sequential(*[nn.Linear(12, 12, bias=False) for _ in range(3)])
    )
    x, y = torch.randn(6, 12), torch.randint(3, (6,))
    x = x.to(next(net.parameters()).dtype)
    if kind == "SparseAdam":
        table = nn.Embedding(10, 8, sparse=True)
        optimizer = torch.optim.SparseAdam(table.parameters())
        table(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
        change = Change({"weight": ((1, torch.tensor([0, 3, 5])),)}, {"": {"embedding_dim": 3}})
        optimizer.zero_grad()
        cuts = cuts_of(table, change)
        apply(table, change)
        migrate(optimizer, cuts)
        table(torch.tensor([1, 4])).sum().backward()
        optimizer.step()
        assert {v.shape for v in optimizer.state[table.weight].values() if isinstance(v, torch.Tensor)} == {
            (10, 3)
        }
        return
    optimizer = getattr(torch.optim, kind)(net.parameters(), lr=1e-2)
    for _ in range(2):
        step(net, optimizer, x, y)
    change = removal(net, x)
    assert change
    cuts = cuts_of(net, change)
    apply(net, change)
    net.zero_grad()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    migrate(optimizer, cuts)
    for _ in range(3):
        step(net, optimizer, x, y)
    assert all(not torch.equal(before[name], p) for name, p in net.named_parameters())


def test_every_optimizer_of_torch_is_tried():
    known = {type(make([nn.Parameter(torch.zeros(2))])).__name__ for make in OPTIMIZERS.values()}
    known |= {"LBFGS", "Adafactor", "Muon", "SparseAdam"}
    exported = {n for n in dir(torch.optim) if isinstance(getattr(torch.optim, n), type)} - {"Optimizer"}
    assert exported == known
