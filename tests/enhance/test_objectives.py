"""Rectified flow: end points, velocity, and a density that is the sampler's."""

import math

import pytest
import torch

from llava_genhancer.enhance.objectives import rectified_flow_path, sample_t, t_density, velocity_loss

TABLE_4 = [("uniform", 1.0, 0.0), *(("logit_normal", s, 0.0) for s in (0.1, 0.5, 1.0, 5.0, 10.0))]
SAMPLINGS = [*TABLE_4, ("logit_normal", 1.0, 1.2)]


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 3, 4, generator=generator), torch.randn(5, 3, 4, generator=generator)


def test_the_path_runs_from_data_to_noise() -> None:
    clean, noise = pair()
    assert torch.equal(rectified_flow_path(clean, noise, torch.zeros(5))[0], clean)
    assert torch.equal(rectified_flow_path(clean, noise, torch.ones(5))[0], noise)


def test_velocity_is_the_derivative_of_the_path() -> None:
    clean, noise = (x.double() for x in pair())
    t, h = torch.tensor([0.0, 0.1, 0.4, 0.7, 0.99]), 1 / 128
    x, velocity = rectified_flow_path(clean, noise, t)
    moved, _ = rectified_flow_path(clean, noise, t + h)
    assert torch.allclose((moved - x) / h, velocity, atol=1e-4)


def test_every_sample_has_its_own_time() -> None:
    clean, noise = pair()
    t = torch.linspace(0, 1, 5)
    x, _ = rectified_flow_path(clean, noise, t)
    for i in range(5):
        alone, _ = rectified_flow_path(clean[i : i + 1], noise[i : i + 1], t[i : i + 1])
        assert torch.equal(x[i : i + 1], alone)


def test_half_precision_data_is_mixed_in_fp32() -> None:
    clean, noise = (x.bfloat16() for x in pair())
    x, velocity = rectified_flow_path(clean, noise, torch.full((5,), 0.3))
    assert x.dtype == velocity.dtype == torch.float32
    assert torch.equal(x, (1 - torch.tensor(0.3)) * clean.float() + 0.3 * noise.float())


def test_loss_is_the_mean_over_everything_in_fp32() -> None:
    predicted, velocity = pair()
    assert velocity_loss(predicted, velocity).item() == pytest.approx(float(((predicted - velocity) ** 2).mean()))
    assert velocity_loss(velocity, velocity) == 0
    assert velocity_loss(predicted.bfloat16(), velocity).dtype == torch.float32


@pytest.mark.parametrize(("sampling", "scale", "shift"), SAMPLINGS)
def test_density_integrates_to_one(sampling: str, scale: float, shift: float) -> None:
    # In z = logit(t) the integrand is smooth even where the density in t has poles (s = 5, 10).
    z = torch.linspace(-90, 90, 400_001, dtype=torch.float64)
    z = z[(z > -30) & (z < 30)] if sampling == "uniform" else z
    # The far tails of t round to 1 in fp64: beyond |z| = 36 t (1 - t) is exp(-|z|), which logit cannot take back.
    z = z[z.abs() < 36]
    t = torch.sigmoid(z)
    weight = t * torch.sigmoid(-z)
    mass = torch.trapezoid(t_density(t, sampling, scale, shift) * weight, z)  # type: ignore[arg-type]
    expected = 1.0 if sampling == "uniform" else normal_cdf((36 - shift) / scale) - normal_cdf((-36 - shift) / scale)
    assert float(mass) == pytest.approx(expected, abs=2e-3)


def normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


@pytest.mark.parametrize(("sampling", "scale", "shift"), SAMPLINGS)
def test_draws_follow_the_density(sampling: str, scale: float, shift: float) -> None:
    """Kolmogorov-Smirnov against the density, integrated numerically; at n = 20 000 the 0.1 % limit is .0138."""
    draws = sample_t(20_000, sampling, scale, shift, generator=torch.Generator().manual_seed(0)).double()  # type: ignore[arg-type]
    assert draws.dtype == torch.float64
    assert ((draws >= 0) & (draws <= 1)).all()
    inside = torch.linspace(0.01, 0.99, 197, dtype=torch.float64)
    fine = torch.linspace(0.01, 0.99, 196 * 200 + 1, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(t_density(fine, sampling, scale, shift), fine)  # type: ignore[arg-type]
    expected = torch.cat([torch.zeros(1, dtype=torch.float64), mass[199::200]])
    found = torch.stack([(draws <= t).double().mean() for t in inside])
    assert ((found - found[0]) - expected).abs().max() < 2 * 0.0138


def test_draws_are_fp32_and_follow_the_global_rng() -> None:
    torch.manual_seed(3)
    first, second = sample_t(8), sample_t(8)
    torch.manual_seed(3)
    assert torch.equal(first, sample_t(8))
    assert not torch.equal(first, second)
    assert first.dtype == torch.float32
