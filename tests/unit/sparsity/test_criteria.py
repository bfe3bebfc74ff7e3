"""Criteria and what they are fed, against autograd and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune.errors import ConfigurationError
from lightning_prune.sparsity import criteria
from lightning_prune.sparsity.criteria import Evidence
from lightning_prune.sparsity.statistics import Statistics, has_input_features, input_squares


def test_taylor_predicts_the_change_of_a_linear_loss():
    """For a loss that is linear in the weights the first-order change is the change."""
    torch.manual_seed(0)
    weight = torch.randn(3, 4, requires_grad=True)
    direction = torch.randn(3, 4)
    loss = (weight * direction).sum()
    loss.backward()
    scores = criteria.taylor(Evidence("w", weight.detach(), gradient=weight.grad))
    for i in range(3):
        for j in range(4):
            without = weight.detach().clone()
            without[i, j] = 0
            assert float(scores[i, j]) == pytest.approx(
                abs(float(loss.detach() - (without * direction).sum())), abs=1e-6
            )


def test_movement_tells_weights_that_grow_from_those_that_shrink():
    weight = torch.tensor([1.0, 1.0, -1.0, -1.0], requires_grad=True)
    target = torch.tensor([2.0, 0.5, -2.0, -0.5])
    statistics = Statistics(["movement"])
    optimizer = torch.optim.SGD([weight], 0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        statistics.observe_gradient("w", weight.detach(), weight.grad)
        optimizer.step()
    scores = criteria.movement(statistics.evidence("w", weight.detach()))
    assert (scores > 0).tolist() == [True, False, True, False]


def test_saliency_is_that_of_the_first_step_only():
    statistics = Statistics(["saliency"])
    statistics.observe_gradient("w", torch.tensor([2.0, -1.0]), torch.tensor([3.0, 5.0]))
    statistics.observe_gradient("w", torch.tensor([9.0, 9.0]), torch.tensor([9.0, 9.0]))
    statistics.restart()
    statistics.observe_gradient("w", torch.tensor([9.0, 9.0]), torch.tensor([9.0, 9.0]))
    assert criteria.snip(statistics.evidence("w", torch.zeros(2))).tolist() == [6, 5]


def test_gradients_are_averaged_since_the_last_event():
    statistics = Statistics(["gradient"])
    for value in (1.0, 3.0):
        statistics.observe_gradient("w", torch.ones(1), torch.tensor([value]))
    assert statistics.complete(["w"])
    assert statistics.evidence("w", torch.ones(1)).gradient.tolist() == [2]
    statistics.restart()
    assert not statistics.complete(["w"])
    assert statistics.known(["w"])
    statistics.observe_gradient("w", torch.ones(1), torch.tensor([7.0]))
    assert statistics.complete(["w"])
    assert statistics.evidence("w", torch.ones(1)).gradient.tolist() == [7]


def test_observed_tensors_are_copied():
    statistics = Statistics(["gradient"])
    gradient = torch.ones(1)
    statistics.observe_gradient("w", torch.ones(1), gradient)
    gradient.zero_()
    assert statistics.evidence("w", torch.ones(1)).gradient.tolist() == [1]


def test_state_of_statistics_is_plain_and_complete(tmp_path):
    first = Statistics(["gradient", "movement"])
    first.observe_gradient("w", torch.ones(2), torch.tensor([1.0, 2.0]))
    first.restart()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = Statistics(["gradient", "movement"])
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for statistics in (first, second):
        statistics.observe_gradient("w", torch.ones(2), torch.tensor([5.0, 5.0]))
    a, b = (s.evidence("w", torch.ones(2)) for s in (first, second))
    assert torch.equal(a.gradient, b.gradient)
    assert torch.equal(a.movement, b.movement)
    assert b.movement.tolist() == [-6, -7]


LAYERS = [
    (nn.Linear(4, 3), (5, 4)),
    (nn.Linear(4, 3), (5, 2, 4)),
    (nn.Linear(4, 3), (4,)),
    (nn.Conv1d(4, 6, 3), (5, 4, 7)),
    (nn.Conv2d(4, 6, 3), (5, 4, 7, 6)),
    (nn.Conv2d(4, 6, 3), (4, 7, 6)),
    (nn.Conv2d(4, 8, 3, groups=2), (5, 4, 7, 6)),
    (nn.Conv2d(4, 8, 3, groups=4), (5, 4, 7, 6)),
    (nn.Conv3d(2, 3, 1), (5, 2, 3, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 3), (5, 4, 7, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_input_norms_belong_to_the_inputs_that_weights_see(layer, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    squares = input_squares(layer, x)
    broad = squares.expand(layer.weight.shape)
    if isinstance(layer, nn.Linear):
        features = x.reshape(-1, shape[-1]).unbind(1)
    else:
        space = layer.weight.dim() - 2
        features = x.movedim(-1 - space, 0).flatten(1).unbind(0)
    norms = [float(feature.square().sum()) for feature in features]
    for index in torch.ones(layer.weight.shape).nonzero().tolist():
        if isinstance(layer, nn.ConvTranspose2d):
            seen = index[0]
        elif isinstance(layer, nn.Linear):
            seen = index[1]
        else:
            group = index[0] // (layer.out_channels // layer.groups)
            seen = group * (layer.in_channels // layer.groups) + index[1]
        assert float(broad[tuple(index)]) == pytest.approx(norms[seen], rel=1e-5)


def test_wanda_multiplies_magnitude_and_input_norm_over_all_batches():
    layer = nn.Linear(2, 2, bias=False)
    statistics = Statistics(["activation"])
    for batch in (torch.tensor([[3.0, 1.0]]), torch.tensor([[4.0, 0.0]])):
        statistics.observe_input("w", input_squares(layer, batch))
    weight = torch.tensor([[1.0, -2.0], [0.5, 0.1]])
    scores = criteria.wanda(statistics.evidence("w", weight))
    assert scores.flatten().tolist() == pytest.approx([5.0, 2.0, 2.5, 0.1])


def test_layers_whose_inputs_cannot_be_seen_are_known():
    attention = nn.MultiheadAttention(4, 2)
    assert not has_input_features(attention.out_proj)
    assert not has_input_features(attention)
    assert not has_input_features(nn.Embedding(3, 3))
    assert has_input_features(nn.Conv1d(1, 1, 1))


@pytest.mark.parametrize("name", sorted(criteria.CRITERIA))
def test_every_criterion_gives_scores_of_the_shape_of_the_weight(name):
    torch.manual_seed(0)
    weight = torch.randn(3, 4)
    full = Evidence("w", weight, torch.rand(3, 4), torch.rand(3, 4), torch.rand(3, 4), torch.rand(1, 4))
    before = weight.clone()
    scores = criteria.CRITERIA[name](full)
    assert scores.shape == weight.shape
    assert scores.is_floating_point()
    assert torch.equal(weight, before)
    if criteria.is_elementwise(criteria.CRITERIA[name]):
        half = Evidence("w", weight[1:], full.gradient[1:], full.movement[1:], full.saliency[1:])
        assert torch.equal(criteria.CRITERIA[name](half), scores[1:])


def test_a_criterion_of_ones_own_says_what_it_needs():
    @criteria.needs("gradient", "movement")
    def both(evidence):
        return evidence.gradient + evidence.movement

    assert criteria.needs_of(criteria.resolve(both, "Test")) == ("gradient", "movement")
    assert not criteria.is_elementwise(both)

    @criteria.needs("hessian")
    def unknown(evidence):
        return evidence.weight

    with pytest.raises(ConfigurationError, match="hessian"):
        criteria.resolve(unknown, "Test")


@pytest.mark.parametrize(
    "wrong", ["magnitud", "lightning_prune.sparsity.criteria:nothing", "nowhere:score", 3, None], ids=str
)
def test_what_is_no_criterion_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="Test: `criterion` must be"):
        criteria.resolve(wrong, "Test")
