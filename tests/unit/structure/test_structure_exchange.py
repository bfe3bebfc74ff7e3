"""Parameters that take the place of others in an optimizer."""

import pytest
import torch
from torch import nn

from lightning_prune.structure.optimizers import Swap, exchange


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


def stepped(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def holds(group, expected):
    return len(group["params"]) == len(expected) and all(
        a is b for a, b in zip(group["params"], expected, strict=True)
    )


def test_new_parameters_stand_where_the_old_one_stood_in_the_networks_order():
    before, weight, bias, after = parameter(2, 2), parameter(4, 4), parameter(4), parameter(3, 3)
    first, second = parameter(1, 4), parameter(4, 1)
    sgd = torch.optim.SGD([before, weight, bias, after], 0.1)
    groups, params = sgd.param_groups, sgd.param_groups[0]["params"]
    exchange([sgd], [Swap([weight], {"0.weight": first, "1.weight": second})])
    assert sgd.param_groups is groups
    assert sgd.param_groups[0]["params"] is params
    assert holds(groups[0], [before, first, second, bias, after])


def test_weights_and_biases_stay_in_the_groups_that_held_them():
    weights, biases = [parameter(4, 4), parameter(4, 4)], [parameter(4), parameter(4)]
    new_weight, new_bias = parameter(4, 4, 1, 1), parameter(4)
    sgd = torch.optim.SGD([{"params": weights, "weight_decay": 0.1}, {"params": biases}], 0.1)
    exchange([sgd], [Swap([weights[0], biases[0]], {"weight": new_weight, "bias": new_bias})])
    assert holds(sgd.param_groups[0], [new_weight, weights[1]])
    assert holds(sgd.param_groups[1], [new_bias, biases[1]])


def test_weights_and_biases_stay_with_the_optimizers_that_held_them():
    weight, bias, gone = parameter(4, 4), parameter(4), parameter(3, 3)
    new_weight, new_bias = parameter(4, 4), parameter(4)
    first, second = torch.optim.SGD([weight, gone], 0.1), torch.optim.Adam([bias])
    exchange([second, first], [Swap([weight, bias], {"weight": new_weight, "bias": new_bias})])
    assert holds(first.param_groups[0], [new_weight, gone])
    assert holds(second.param_groups[0], [new_bias])


def test_layers_that_go_leave_nothing_behind():
    gone, stays = parameter(2), parameter(3)
    adam = stepped(torch.optim.Adam([gone, stays]))
    exchange([adam], [Swap([gone], {})])
    assert holds(adam.param_groups[0], [stays])
    assert list(adam.state) == [stays]


def test_what_was_not_optimized_is_not_optimized_after():
    frozen, mine = parameter(2, 2), parameter(2)
    sgd = torch.optim.SGD([mine], 0.1)
    exchange([sgd], [Swap([frozen], {"weight": parameter(2, 2)})])
    assert holds(sgd.param_groups[0], [mine])


def test_names_follow_where_the_optimizer_was_given_names():
    old, stays, new = parameter(2), parameter(2), parameter(2)
    sgd = torch.optim.SGD([("old", old), ("stays", stays)], 0.1)
    exchange([sgd], [Swap([old], {"new": new})])
    assert sgd.param_groups[0]["param_names"] == ["new", "stays"]
    assert sgd.state_dict()["param_groups"][0]["param_names"] == ["new", "stays"]


@pytest.mark.parametrize(
    ("kind", "arguments", "carried"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, {"momentum_buffer": 2.0}),
        (torch.optim.Adam, {"amsgrad": True}, {"exp_avg": 2.0, "exp_avg_sq": 3.0, "max_exp_avg_sq": 3.0}),
        (torch.optim.RMSprop, {"centered": True}, {"square_avg": 3.0, "grad_avg": 2.0}),
        (torch.optim.Adagrad, {}, {"sum": 3.0}),
    ],
    ids=["SGD", "Adam", "RMSprop", "Adagrad"],
)
def test_averages_are_carried_over_and_the_next_step_works(kind, arguments, carried):
    old, new = parameter(2, 2), [parameter(1, 2), parameter(2, 1)]
    optimizer = stepped(kind([old], lr=0.1, **arguments))

    def carry(value, squared):
        assert value.shape == (2, 2)
        return [torch.full_like(p, 3.0 if squared else 2.0) for p in new]

    exchange([optimizer], [Swap([old], {"a": new[0], "b": new[1]}, carry)])
    for p in new:
        kept = {k: v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor) and v.dim()}
        assert {k: float(v.mean()) for k, v in kept.items()} == carried
    if "step" in optimizer.state[new[0]]:
        assert float(optimizer.state[new[0]]["step"]) == 1.0
        assert optimizer.state[new[0]]["step"] is not optimizer.state[new[1]]["step"]
    stepped(optimizer)
    assert old not in optimizer.state


@pytest.mark.parametrize("kind", [torch.optim.Adadelta, torch.optim.Adamax, torch.optim.Rprop])
def test_state_of_unknown_meaning_starts_anew(kind):
    old, new = parameter(2, 2), parameter(2, 2)
    optimizer = stepped(kind([old]))
    exchange([optimizer], [Swap([old], {"new": new}, lambda value, squared: [value])])
    assert new not in optimizer.state
    stepped(optimizer)


def test_lbfgs_goes_on_with_other_parameters():
    old, new, stays = parameter(2, 2), parameter(1, 3), parameter(2)
    lbfgs = torch.optim.LBFGS([stays, old], max_iter=3)

    def closure():
        lbfgs.zero_grad()
        loss = sum((p**2).sum() for p in lbfgs.param_groups[0]["params"])
        loss.backward()
        return loss

    lbfgs.step(closure)
    exchange([lbfgs], [Swap([old], {"new": new})])
    before = closure().item()
    lbfgs.step(closure)
    assert closure().item() < before
