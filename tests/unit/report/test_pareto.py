"""The Pareto front against brute force, and where its marks stand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.report.html import render_html
from lightning_prune.report.pareto import falls, front, worth_having
from lightning_prune.report.results import Report, Variant

small = st.integers(0, 5).map(float)


@given(st.lists(st.tuples(small, small), min_size=1, max_size=8))
def test_exactly_what_nothing_beats_is_worth_having(pairs):
    costs, values = zip(*pairs, strict=True)
    kept = worth_having(costs, values)
    assert any(kept)
    for i, (cost, value) in enumerate(pairs):
        better = [(c, v) for c, v in pairs if (c < cost and v >= value) or (c <= cost and v > value)]
        assert kept[i] == (not better)


def report(metrics, macs=(100, 70, 50, 30)):
    variants = [
        Variant(f"v{i}", macs=m, metrics={"val_loss": 1.0, name: value})
        for i, (m, (name, value)) in enumerate(zip(macs, metrics, strict=True))
    ]
    return Report(tuple(variants), title="Net")


def test_the_front_is_of_the_first_metric_that_is_no_loss():
    plot = front(report([("val_acc", value) for value in (0.9, 0.88, 0.91, 0.7)]))
    assert (plot.metric, plot.cost) == ("val_acc", "MACs")
    assert [point.label for point in plot.kept] == ["v3", "v2"]
    by_name = {point.label: point for point in plot.points}
    assert by_name["v0"].x > by_name["v1"].x > by_name["v2"].x > by_name["v3"].x > 0
    assert 0 < by_name["v2"].y < by_name["v0"].y < by_name["v1"].y < by_name["v3"].y < 100


def test_of_a_loss_less_is_better():
    plot = front(report([("val_loss", value) for value in (0.5, 0.6, 0.4, 0.9)]))
    assert [point.label for point in plot.kept] == ["v3", "v2"]


@pytest.mark.parametrize(
    ("name", "less"),
    [("val_loss", True), ("loss", True), ("val/mae", True), ("val_acc", False), ("gloss", False)],
)
def test_names_say_which_way_is_better(name, less):
    assert falls(name) == less


def test_there_is_no_front_of_few_variants_or_without_cost_or_metric():
    whole = report([("val_acc", value) for value in (0.9, 0.88, 0.91, 0.7)])
    assert front(Report(whole.variants[:3], title="Net")) is None
    assert front(report([("val_acc", 0.5)] * 4, macs=(None,) * 4)) is None
    assert front(Report(tuple(Variant(f"v{i}", macs=10) for i in range(4)), title="Net")) is None


def test_equal_values_still_have_a_place():
    plot = front(report([("val_acc", 0.5)] * 4))
    assert all(0 <= point.y <= 100 for point in plot.points)


def test_the_page_draws_every_variant_and_escapes_names():
    variants = [Variant(f"<v{i}>", macs=10 + i, metrics={"acc": 0.5 + i / 10}) for i in range(4)]
    page = render_html(Report(tuple(variants), title="Net"))
    assert page.count("<circle") == 4
    assert "acc against MACs" in page
    assert "<v0>" not in page
