"""FDFA 2024 propositions 2, 5, 6 and eq. 13, and GrAPE 2024 figure 2, measured on grapefx's
gradients.
"""

from __future__ import annotations

import pytest

from tests.theory import closed_forms as theory
from tests.theory import measure
from tests.theory.measure import ALPHAS, NS, RUNNING, SIZES, Z


def slope_in(method: str, which: str, kaiming: bool = False) -> measure.Mean:
    """Log-log slope of the variance of an entry; every point is at its closed form, too."""
    points = measure.variance_in_size(method, which, kaiming)
    for n, (found, expected) in points.items():
        assert abs(found.z_of_scale(expected)) < Z, (method, which, n)
    fitted = measure.slope([float(n) for n in NS], [found for found, _ in points.values()])
    assert fitted.se < 0.1  # 4.5 of them tell 1 from 0.5 and 1.5
    return fitted


@pytest.mark.parametrize("which", ["n0", "n1"])
def test_weight_perturbation_scales_with_inputs_and_neurons(which: str) -> None:
    """FDFA 2024 proposition 5: slope 1 in n_0 and in n_1."""
    assert abs(slope_in("fg-w", which).z(1)) < Z


@pytest.mark.parametrize(("which", "expected"), [("n0", 0), ("n1", 1)])
def test_activity_perturbation_scales_with_neurons_only(which: str, expected: float) -> None:
    """FDFA 2024 proposition 6: slope 1 in n_1 and 0 in n_0."""
    # variance is proportional to n_1 + 1: the end points' own slope is 0.95
    fitted = slope_in("fg-a", which)
    finite = measure.slope(
        [8.0, 32.0, 128.0], [measure.Mean(n + 1, 0.0) for n in (8.0, 32.0, 128.0)]
    )
    assert abs(fitted.z(expected * finite.value)) < Z


def test_kaiming_outputs_hide_the_growth() -> None:
    """W^(2) of size 1 / sqrt(n_1) makes the gradient shrink as the relative variance grows."""
    assert abs(slope_in("fg-a", "n1", kaiming=True).z(0)) < Z


@pytest.mark.parametrize(
    ("method", "noise"), [("fg-w", "gaussian"), ("fg-a", "gaussian"), ("fg-a", "rademacher")]
)
def test_variance_of_one_large_entry(method: str, noise: str) -> None:
    """G.1 and H.1 in full: the entry's own square counts, and random signs turn its sign."""
    found, expected = measure.largest_entry(method, noise)
    assert found.se < 0.12 * found.value
    assert abs(found.z_of_scale(expected)) < Z


def test_fdfa_from_a_converged_map_has_variance_alpha_squared() -> None:
    """FDFA 2024 proposition 2: slope 2 in alpha, at alpha^2 times FG-A's variance."""
    points = measure.variance_in_alpha()
    for alpha, (found, expected) in points.items():
        assert abs(found.z_of_scale(expected)) < Z, alpha
    fitted = measure.slope(list(ALPHAS), [found for found, _ in points.values()])
    assert fitted.se < 0.05
    assert abs(fitted.z(2)) < Z


@pytest.mark.parametrize("alpha", RUNNING)
def test_fdfa_that_runs_has_variance_alpha(alpha: float) -> None:
    """The map carries earlier noise: a / (2 - a), so slope 1 at small alpha, not 2."""
    r = measure.running(alpha)
    assert abs(r.square.z_of_scale(r.expected_square)) < Z
    assert abs(r.variance.z_of_scale(r.expected_variance)) < Z
    if alpha < 0.3:  # a^2, as proposition 2 would have it, is far away
        one_step = r.expected_variance * alpha**2 / theory.running_factor(alpha)
        assert r.variance.value - one_step > Z * r.variance.se


@pytest.mark.parametrize("alpha", RUNNING)
def test_penultimate_feedback_converges_to_the_output_weights(alpha: float) -> None:
    """FDFA 2024 eq. 13: E[B^(L-1)] = W^(L), entry by entry."""
    blocks = measure.running(alpha).maps
    w = measure.weight(measure.random_setting().model, 2)
    z = (blocks.mean(0) - w) / (blocks.std(0) / len(blocks) ** 0.5)
    assert float(z.abs().max()) < 5.5  # 60 entries, 30 blocks: Student's t
    assert 0.4 < float((z**2).mean()) < 1.9


def test_penultimate_feedback_approaches_geometrically() -> None:
    """From B = 0 the part of W in B is 1 - (1 - a)^t on average."""
    found = measure.approach()
    for t in (1, 5, 20, 40, 80):
        mean = measure.Mean.of(found[:, t - 1])
        assert abs(mean.z(1 - 0.95**t)) < Z, t


@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize(("depth", "streams"), [(2, "shared"), (8, "shared"), (8, "per_layer")])
def test_cosine_against_batch_and_depth(depth: int, streams: str, batch: int) -> None:
    """GrAPE 2024 figure 2 has a closed form: the other layers' noise comes with depth, 1/B of it
    stays.
    """
    r = measure.first_layer(depth, batch, streams)
    assert abs(r.found.projection.z(1)) < Z
    square = 1 + r.ratio / batch
    assert abs(r.found.square.z_of_scale(square)) < Z
    if batch > 1:
        expected = theory.batch_cosine(r.ratio, batch)
        slack = Z * r.found.cosine.se + abs(r.found.second_order)
        assert abs(r.found.cosine.value - expected) < slack


def test_depth_costs_cosine_and_iterations_bring_it_back() -> None:
    """GrAPE 2024 figure 2's three claims: down with depth, up with the batch, up with averaged
    JVPs.
    """
    at = {(d, b): measure.first_layer(d, b) for d in (2, 8) for b in SIZES}
    for b in SIZES[1:]:
        assert at[2, b].found.cosine.value > at[8, b].found.cosine.value
    for d in (2, 8):
        cosines = [at[d, b].found.cosine.value for b in SIZES]
        assert cosines == sorted(cosines)
    r = at[2, 16]
    # one run of 24 JVPs of 16 samples each is 384 samples: its cosine has a small spread
    expected = theory.batch_cosine(r.ratio, 16 * 24)
    assert r.cumulative[-1].item() == pytest.approx(expected, abs=0.03)
    assert r.cumulative[-1] > r.cumulative[0]
    # with a pass for each layer depth no longer adds noise
    alone = measure.first_layer(8, 256, "per_layer").found.cosine.value
    assert alone > at[8, 256].found.cosine.value + 0.1
