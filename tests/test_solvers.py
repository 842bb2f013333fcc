"""Solvers on teachers with a closed form: golden numbers, measured order of convergence, all states."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import solvers

GOLDEN = np.load(Path(__file__).parent / "golden/dpmsolver_mixture.npz")
x_T = torch.tensor(GOLDEN["x_T"])


def mixture(x, sigma):
    """Closed-form denoiser of the mixture of two Gaussians of the golden file."""
    mu, w, s0 = (torch.tensor(GOLDEN[k]) for k in ("mu", "w", "s0"))
    s, flat = sigma.view(-1, 1), x.flatten(1)
    variance = s0**2 + s**2
    p = torch.stack([w[k].log() - ((flat - mu[k]) ** 2).sum(1) / (2 * variance[:, 0]) for k in range(2)], 1).softmax(1)
    means = torch.stack([(s0**2 * flat + s**2 * mu[k]) / variance for k in range(2)], 1)
    return (p[..., None] * means).sum(1).view_as(x)


@pytest.fixture(scope="module")
def exact():
    """The mixture's trajectory end, by Heun with 800 steps."""
    return solvers.heun(mixture, x_T, solvers.logsnr_sigmas(800))[-1]


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [8, 16])
def test_dpmpp_equals_the_reference_solver(order, steps):
    xs = solvers.dpmpp(mixture, x_T, solvers.logsnr_sigmas(steps), order)
    assert (xs - torch.tensor(GOLDEN[f"o{order}_n{steps}_traj"])).abs().max() < 1e-9


def measured(solve, exact, steps):
    errors = [(solve(n) - exact).abs().mean().item() for n in steps]
    return math.log2(errors[0] / errors[1])


def test_an_order_that_a_solver_does_not_have_is_refused():
    sigmas = solvers.logsnr_sigmas(4)
    with pytest.raises(ValueError, match="dpmpp: order 4"):
        solvers.dpmpp(mixture, x_T, sigmas, 4)
    with pytest.raises(ValueError, match="ode_step: order 3"):
        solvers.ode_step(mixture, x_T, torch.full((len(x_T),), 80.0), torch.full((len(x_T),), 40.0), 3)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmpp_converges_at_its_order(order, exact):
    # the official order 3 has half of Taylor's last term: it is of order 2 in the limit, and above on short grids
    rate = measured(lambda n: solvers.dpmpp(mixture, x_T, solvers.logsnr_sigmas(n), order)[-1], exact, (64, 128))
    assert {1: 0.9, 2: 1.85, 3: 2.2}[order] < rate < {1: 1.1, 2: 2.2, 3: 3.5}[order], rate


def test_third_order_is_above_two_on_short_grids_and_two_in_the_limit():
    """Of states in the middle of the grid, untouched by the lower order of the end (docs/choices.md)."""
    fine = solvers.heun(mixture, x_T, solvers.logsnr_sigmas(4096))[2048]
    short, long = (measured(lambda n: solvers.dpmpp(mixture, x_T, solvers.logsnr_sigmas(n), 3)[n // 2], fine, steps) for steps in ((48, 96), (192, 384)))
    assert short > 2.6 and 1.9 < long < 2.3, (short, long)


def test_sixteen_steps_agree_with_a_fine_heun_solve(exact):
    """A wrong sign of phi_2 leaves a plausible trajectory, whose error here is 10 times as large."""
    error = (solvers.dpmpp(mixture, x_T, solvers.logsnr_sigmas(16))[-1] - exact).abs().mean().item()
    assert error < 0.01, error


@pytest.mark.parametrize("D, end", [(lambda x, s: x * 0.25 / (0.25 + s.view(-1, 1) ** 2), 0.50858101),
                                    (lambda x, s: torch.tanh(x / (1 + s.view(-1, 1))), 0.472952693602)])
def test_official_vectors_from_80(D, end):
    xs = solvers.dpmpp(D, torch.full((1, 1), 80.0, dtype=torch.float64), solvers.logsnr_sigmas(16))
    assert xs[-1].item() == pytest.approx(end, abs=1e-8) and len(xs) == 17


def test_grid_is_the_official_one():
    grid = solvers.logsnr_sigmas(16)
    assert torch.allclose(grid, torch.tensor(GOLDEN["timesteps16"], dtype=torch.float64), rtol=1e-6)
    edm = solvers.edm_sigmas(18)
    assert len(edm) == 19 and edm[0] == pytest.approx(80) and edm[17] == pytest.approx(0.002) and edm[18] == 0


def test_every_solver_calls_the_denoiser_as_often_as_it_says_and_returns_all_states():
    calls = []
    D = lambda x, s: calls.append(s) or mixture(x, s)                                 # noqa: E731
    for solve, n in ((solvers.dpmpp, 5), (solvers.euler, 5), (solvers.heun, 10)):
        calls.clear()
        xs = solve(D, x_T, solvers.logsnr_sigmas(5))
        assert len(calls) == n and xs.shape == (6, *x_T.shape) and torch.equal(xs[0], x_T)
        assert all(s.shape == (len(x_T),) for s in calls)


def test_any_decreasing_grid_works_and_may_end_at_zero(exact):
    xs = solvers.dpmpp(mixture, x_T, solvers.edm_sigmas(100))
    assert torch.isfinite(xs).all() and (xs[-1] - exact).abs().mean() < 0.01
    assert torch.isfinite(solvers.heun(mixture, x_T, solvers.edm_sigmas(20))).all()


@pytest.mark.parametrize("solve, order", [(solvers.euler, 1), (solvers.heun, 2)])
def test_euler_and_heun_converge_at_their_order(solve, order, exact):
    rate = measured(lambda n: solve(mixture, x_T, solvers.logsnr_sigmas(n))[-1], exact, (64, 128))
    assert order - 0.15 < rate < order + 0.35, rate


def test_ode_step_takes_a_level_per_sample_and_ends_at_zero():
    t, r = torch.tensor([5.0, 1.0, 0.3, 2.0, 0.7, 9.0]).double(), torch.tensor([4.0, 0.0, 0.2, 0.0, 0.1, 2.0]).double()
    for order, solve in ((1, solvers.euler), (2, solvers.heun)):
        both = solvers.ode_step(mixture, x_T, t, r, order)
        single = torch.cat([solve(mixture, x_T[i:i + 1], [t[i], r[i]])[-1] for i in range(6)])
        assert torch.isfinite(both).all() and torch.allclose(both, single)            # trap: r = 0


@pytest.mark.parametrize("solve, order", [(solvers.flow_euler, 1), (solvers.flow_heun, 2)])
def test_flow_solvers_converge_at_their_order(solve, order):
    """dx/dt = x cos(3t): x(0) = x(1) exp(-sin(3)/3)."""
    x = torch.ones(1, 1, dtype=torch.float64)
    end = lambda n: solve(lambda x, t: x * torch.cos(3 * t).view(-1, 1), x, torch.linspace(1, 0, n + 1).double())[-1]  # noqa: E731
    assert measured(end, math.exp(-math.sin(3) / 3), (128, 256)) == pytest.approx(order, abs=0.1)


def test_mean_flow_is_exact_for_an_exact_average_velocity():
    u = lambda x, t, r: x * ((1 - torch.exp((r - t))) / (t - r)).view(-1, 1)          # noqa: E731  of dx/dt = x
    for times in ([1.0, 0.0], [1.0, 0.7, 0.2, 0.0]):
        xs = solvers.mean_flow(u, torch.ones(2, 3, dtype=torch.float64), times)
        assert torch.allclose(xs[-1], torch.full((2, 3), math.exp(-1), dtype=torch.float64)) and len(xs) == len(times)


def test_few_step_by_hand():
    f = lambda x, s: x / (1 + s.view(-1, 1))                                          # noqa: E731
    x = torch.full((2, 3), 81.0)
    assert torch.equal(solvers.few_step(f, x, [80.0]), torch.ones(2, 3))
    z = torch.randn((2, 3), generator=torch.Generator().manual_seed(5))
    two = solvers.few_step(f, x, [80.0, 0.5], torch.Generator().manual_seed(5))
    assert torch.allclose(two, (1 + 0.5 * z) / 1.5)


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    f = lambda x, s: x                                                                # noqa: E731
    make = lambda seeds: [torch.Generator().manual_seed(s) for s in seeds]            # noqa: E731
    four = solvers.few_step(f, torch.zeros(4, 1, 2, 2), [80.0, 1.0], make(range(4)))
    one = solvers.few_step(f, torch.zeros(1, 1, 2, 2), [80.0, 1.0], make([2]))
    assert torch.equal(four[2], one[0]) and not torch.equal(four[1], one[0])


@pytest.mark.parametrize("grid", [[1.0, 2.0], [1.0], [1.0, 1.0], [1.0, -0.1]])
def test_grids_that_do_not_fall_are_refused(grid):
    for solve in (solvers.dpmpp, solvers.euler, solvers.heun):
        with pytest.raises(ValueError, match="fall strictly"):
            solve(mixture, x_T, grid)


def test_unknown_order_is_refused():
    with pytest.raises(ValueError, match="order 4"):
        solvers.dpmpp(mixture, x_T, [2.0, 1.0], order=4)


def test_a_step_is_not_rounded_to_the_precision_of_the_answer():
    """Under autocast u and v are bf16; the difference of two states is the teacher's mean velocity (Eq. 8)."""
    x, u, times = torch.zeros(2, 1, 4, 4), torch.linspace(0.1, 1, 16).view(1, 4, 4).bfloat16(), [1.0, 0.3, 0.0]
    for states in solvers.mean_flow(lambda *a: u, x, times), solvers.flow_heun(lambda *a: u, x, times):
        assert states.dtype == torch.float32 and torch.equal(states[1][1], -(1.0 - 0.3) * u.float())
        assert torch.allclose((states[1] - states[2])[0] / 0.3, u.float(), atol=1e-6)
