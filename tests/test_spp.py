"""SPP: the inclusion's known path on least squares, its steps term by term, and its behaviour on a model."""

from __future__ import annotations

import math

import pytest
import torch

from deploy_prune.methods.inclusion import ReleasedInclusion, SplitLBI


def least_squares_path(beta: torch.Tensor, nu: float, *, steps: int, step_m: float, kappa: float) -> SplitLBI:
    """L(M) = ½‖M − β‖² (identity design), α = step_m / κ."""
    lbi = SplitLBI({"u": beta * nu / (1 + nu)}, step_m=step_m, step_v=step_m / kappa / nu, kappa=kappa)
    for _ in range(steps):
        lbi.step({"u": lbi.M["u"] - beta}, {"u": 1 / nu})
    return lbi


def test_on_identity_design_the_time_of_entry_is_inverse_to_the_coefficient():
    """V̇ = (M − Γ)/ν with M at its equilibrium β ν/(1 + ν): V reaches 1 at t = (1 + ν)/|β|."""
    beta, nu, kappa, step_m = torch.tensor([3.0, -2.0, 1.0, 0.5, 0.25]), 1.5, 40.0, 0.2
    alpha = step_m / kappa
    lbi = least_squares_path(beta, nu, steps=2_500, step_m=step_m, kappa=kappa)
    time = alpha * lbi.entry["u"]
    torch.testing.assert_close(time, (1 + nu) / beta.abs(), rtol=1e-2, atol=0)


def test_after_entry_gamma_follows_the_coefficient_and_zeros_stay_out():
    beta = torch.tensor([2.0, -1.0, 0.0])
    lbi = least_squares_path(beta, 1.0, steps=2_000, step_m=0.2, kappa=5.0)
    torch.testing.assert_close(lbi.Γ["u"], beta, rtol=1e-2, atol=1e-6)
    assert lbi.entry["u"].isfinite().tolist() == [True, True, False]


def test_one_step_is_the_equations():
    lbi = SplitLBI({"u": torch.tensor([1.0, 0.5])}, step_m=0.1, step_v=2.5, kappa=3.0)
    lbi.step({"u": torch.tensor([0.2, -0.4])}, {"u": 2.0})
    # ∇_M L̄ = g + (M − Γ)/ν = (2.2, 0.6); V = 2.5 (M − Γ) = (2.5, 1.25); Γ = 3 (V − 1)
    torch.testing.assert_close(lbi.M["u"], torch.tensor([1 - 0.22, 0.5 - 0.06]))
    torch.testing.assert_close(lbi.V["u"], torch.tensor([2.5, 1.25]))
    torch.testing.assert_close(lbi.Γ["u"], torch.tensor([4.5, 0.75]))
    torch.testing.assert_close(lbi.entry["u"], torch.tensor([1 / 2.5, 1 / 1.25]))


def test_a_unit_that_never_enters_is_ranked_by_its_mean_rate():
    lbi = SplitLBI({"u": torch.tensor([1.0, 0.4, 0.2])}, step_m=0.0, step_v=0.15, kappa=1.0)
    for _ in range(10):
        lbi.step({"u": torch.zeros(3)}, {"u": 1.0})
    assert lbi.entry["u"].isfinite().tolist() == [True, False, False]
    times = lbi.entry_time("u")
    torch.testing.assert_close(times, torch.tensor([1 / 0.15, 1 / 0.06, 1 / 0.03]).double(), rtol=1e-5, atol=0)


def test_the_adaptive_step_is_blind_to_the_scale_of_the_loss():
    def moved(scale: float) -> torch.Tensor:
        lbi = SplitLBI({"u": torch.ones(2)}, step_m=0.01, step_v=0.0, kappa=1.0, adaptive=True)
        for _ in range(20):
            lbi.step({"u": scale * torch.tensor([1.0, -3.0])}, {"u": 0.0})
        return lbi.M["u"]

    torch.testing.assert_close(moved(1.0), moved(1e4))
    assert math.isclose(float(moved(1.0)[0]), 0.8, abs_tol=1e-5)
    assert pytest.approx(1.2, abs=1e-5) == float(moved(1.0)[1])


def test_a_group_enters_as_one_when_its_norm_passes_the_threshold():
    """Two heads of two dimensions: dimension 0 is strong in one head only, dimension 1 is middling in both."""
    lbi = SplitLBI({"u": torch.tensor([2.0, 1.0, 0.0, 1.0])}, lanes={"u": 2}, step_m=0.0, step_v=0.1, kappa=1.0)
    for _ in range(30):
        lbi.step({"u": torch.zeros(4)}, {"u": 0.0})
    time = lbi.entry_time("u").view(2, 2)
    assert torch.equal(time[0], time[1])
    # root mean squares sqrt((4 + 0) / 2) and 1, so 1 / (0.1 √2) and 1 / 0.1 steps
    torch.testing.assert_close(time[0], torch.tensor([10 / 2**0.5, 10.0]).double(), rtol=1e-5, atol=0)


def test_the_released_variant_is_its_code_term_by_term():
    lbi = ReleasedInclusion({"u": torch.tensor([1.0, -1.0])}, rate=0.5, shrink=3.0)
    lbi.step({"u": torch.tensor([0.2, -0.4])}, {"u": 7.0})  # the coupling is not in it
    # Adam's first step is the sign: M = (0.5, -0.5); V = 0.5 / 0.1 (M − 0) = (2.5, -2.5); nothing above 3 yet
    torch.testing.assert_close(lbi.M["u"], torch.tensor([0.5, -0.5]), rtol=1e-3, atol=0)
    torch.testing.assert_close(lbi.V["u"], torch.tensor([2.5, -2.5]), rtol=1e-3, atol=0)
    assert lbi.Γ["u"].tolist() == [0, 0]


def test_in_the_released_variant_an_open_gate_enters_after_three_thousand_steps_and_a_negative_one_never():
    lbi = ReleasedInclusion({"u": torch.tensor([1.0, -1.0])})
    for _ in range(3_100):
        lbi.step({"u": torch.zeros(2)}, {"u": 0.0})
    # V grows by 1e-3 a step, but for the first few, which the bias correction makes larger
    assert 2_950 < lbi.entry["u"][0] < 3_000 and lbi.entry["u"][1].isinf()
    assert lbi.Γ["u"][0] > 0 and lbi.Γ["u"][1] == 0
