"""GrAPE 2026 section 3.2 and appendices B, C: the cosine of J^ with J, on grapefx's own J^."""

from __future__ import annotations

import math

import pytest
import torch

from tests.theory import closed_forms as theory
from tests.theory import measure
from tests.theory.measure import BATCHES, NS, SPECTRA, Z


def test_mean_first_coordinate_on_the_sphere() -> None:
    """E|s_1| has GrAPE 2026 B.2's closed form."""
    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 10, 50):
        p = torch.randn(100_000, n, generator=generator, dtype=torch.float64)
        found = measure.Mean.of(p[:, 0].abs() / p.norm(dim=1))
        assert abs(found.z(theory.sphere_mean(n))) < Z, n


def test_bound_on_the_sphere() -> None:
    """GrAPE 2026 eq. 11 holds at every n, is strict, and tight: the ratio falls to 1 as 1 + 1 / (4
    n).
    """
    for n in [*range(1, 300), 10**4]:
        ratio = theory.sphere_mean(n) / theory.sphere_bound(n)
        assert 1 < ratio < 1 + 0.26 / n
        if n > 10:
            assert (ratio - 1) * 4 * n == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_expected_cosine_of_one_sample(spectrum: str, n: int) -> None:
    """GrAPE 2026 eq. 4, and the tighter bracket that does not know the spectrum."""
    j, found = measure.expected_cosine(spectrum, n, "gaussian")
    low, high = theory.cosine_bracket(n)
    assert found.value > theory.cosine_bound(j) - Z * found.se
    assert low - Z * found.se < found.value < high + Z * found.se
    if spectrum in ("rank one", "two coordinates"):
        # eq. 4 is an equality here but for the step from E|s_1| to its bound
        assert abs(found.z(theory.sphere_mean(n))) < Z


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_mean_squared_cosine_is_one_over_n(noise: str) -> None:
    """E cos^2 = 1 / n for any J: the upper end of the bracket, and J^ is of rank 1."""
    j = measure.jacobian_with("decaying", 6, 32)
    e = measure.estimates(j, 1, 400, noise)
    assert float(torch.linalg.svdvals(e)[:, 1].max()) < 1e-9
    squares = ((e * j).sum((1, 2)) / e.norm(dim=(1, 2)) / j.norm()) ** 2
    assert abs(measure.Mean.of(squares).z(1 / 32)) < Z


def test_bound_does_not_hold_for_random_signs() -> None:
    """Eq. 4 needs rotation invariance: signs along (1, 1, 0, ...) stay at Khintchine's."""
    for n in NS:
        j, found = measure.expected_cosine("two coordinates", n, "rademacher")
        assert found.value < theory.cosine_bound(j) - Z * found.se
        assert abs(found.z(theory.khintchine_bound(n))) < Z
        for spectrum in SPECTRA:
            _, other = measure.expected_cosine(spectrum, n, "rademacher")
            assert other.value > theory.khintchine_bound(n) - Z * other.se


def test_mean_of_cosines_concentrates() -> None:
    """GrAPE 2026 B.3: Std(C-bar_B) falls as B^(-1/2); its mean stays where one sample's is."""
    found = measure.concentration()
    stds = []
    for b, c in found.items():
        mean = measure.Mean.of(c)
        assert abs(mean.z(theory.sphere_mean(32))) < Z, b
        centred = measure.Mean.of((c - mean.value) ** 2)  # the variance, with its own error
        stds.append(measure.Mean(centred.value**0.5, centred.se / (2 * centred.value**0.5)))
    fitted = measure.slope([float(b) for b in BATCHES], stds)
    assert fitted.se < 0.03  # otherwise the next line says nothing
    assert abs(fitted.z(-0.5)) < Z
    # Std(C) of one sample itself: E C^2 = 1 / n
    assert abs(stds[0].z(math.sqrt(1 / 32 - theory.sphere_mean(32) ** 2))) < Z


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("batch", BATCHES)
def test_cosine_of_a_batch_mean(batch: int, noise: str) -> None:
    """The cosine of the averaged J^ (what grape aligns with) tends to 1, not to eq. 4."""
    found = measure.batch_mean(noise)[batch]
    ratio = theory.noise_to_signal(32, noise)
    assert abs(found.projection.z(1)) < Z  # unbiased
    assert abs(found.square.z_of_scale(1 + ratio / batch)) < Z
    expected = theory.batch_cosine(ratio, batch)
    if batch > 1:  # one sample: the test above; the expansion is around many
        assert abs(found.cosine.value - expected) < Z * found.cosine.se + abs(found.second_order)
    if batch == max(BATCHES):
        assert found.cosine.value > 5 * theory.sphere_mean(32)


def test_cosines_compose_along_a_run() -> None:
    """GrAPE 2026 lemma B.2 on grape's own B and J^ while it trains, and on what ``alignment()``
    says.
    """
    run = measure.alignment_run()
    for t in run:
        low, high = theory.composed(t.learned, t.estimated)
        assert low - 1e-12 <= t.true <= high + 1e-12
        assert t.reported == pytest.approx(t.learned, abs=1e-5)
    last = [t for t in run if t.step >= 100]
    first = [t for t in run if t.step < 3]
    assert min(t.true for t in last) > 0.5 > max(t.true for t in first)  # the lemma is not idle


def test_composition_bound_is_attained() -> None:
    """Equality for B, J^, J in one plane with J^ between: the bound cannot be better."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.linalg.qr(torch.randn(40, 2, generator=generator, dtype=torch.float64))[0].t()
    for s, t in [(0.3, 0.4), (1.0, 0.9), (1.2, 1.5), (0.1, 2.5)]:
        feedback, true = math.cos(s) * a + math.sin(s) * b, math.cos(t) * a - math.sin(t) * b
        low, _ = theory.composed(measure.cosine(feedback, a), measure.cosine(a, true))
        assert low == pytest.approx(measure.cosine(feedback, true), abs=1e-12)


def test_second_half_of_the_composition_lemma_needs_a_sum_of_at_least_zero() -> None:
    """Lower bounds a_0, b_0 may go into the lemma only if a_0 + b_0 >= 0 (not in GrAPE 2026)."""
    grid = torch.linspace(-1, 1, 41).tolist()
    for a0 in grid:
        for b0 in grid:
            claimed = theory.composed(a0, b0)[0]
            worst = min(theory.composed(a, b)[0] for a in grid if a >= a0 for b in grid if b >= b0)
            if a0 + b0 >= 0:
                assert claimed <= worst + 1e-12
    # every pair has cosines >= -1, and gamma_0(-1, -1) = 1 would make all of them equal
    assert theory.composed(-1.0, -1.0)[0] == 1 > theory.composed(0.0, 0.0)[0]


def test_weights_of_the_columnwise_cosines_do_not_sum_to_one() -> None:
    """GrAPE 2026 appendix C prints sum_k w_k = 1; it is sqrt(2 / pi) for one sample and unit
    columns.
    """
    found = measure.column_weights()
    assert found.value + Z * found.se < 0.9
    # mean |p| / rms p over n = 128 entries: sqrt(2 / pi) (1 + 1 / (4 n)) to the first order
    assert abs(found.z(theory.sphere_mean(128) * 128**0.5)) < Z
