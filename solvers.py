"""Solvers: turn a denoiser or a velocity into a whole trajectory; few-step sampling. They keep no state.

  what                          of                           source
  logsnr_sigmas, edm_sigmas     grids of noise levels        DPM-Solver (uniform log-SNR); EDM Eq. 5
  ode_step, euler, heun         D(x, sigma) -> denoised      EDM Alg. 1
  dpmpp                         D(x, sigma) -> denoised      DPM-Solver++ multistep, order 1 to 3
  flow_euler, flow_heun         v(x, t) -> velocity          flow matching, t = 1 noise, t = 0 data
  mean_flow                     u(x, t, r) -> mean velocity  Mean Flow: x_r = x_t - (t - r) u
  few_step                      f(x, sigma) -> clean         multistep consistency sampling
  noise, randn, fold            seeds and noise              sample i depends on its own generator only

B.2, Eq. 7 and so on are those of the CMT paper, arXiv 2509.24526.
Every solver of a trajectory returns all states, (steps+1, B, ...), noisiest first, because CMT regresses
from each of them (Eq. 7, 8). Grids are float64 CPU tensors and become plain numbers before the first call:
a solve reads no number back from the GPU.
"""
import functools
import hashlib
import math

import torch


# ---- grids -------------------------------------------------------------------------------------
def logsnr_sigmas(steps, sigma_max=80.0, sigma_min=0.002):
    """Noise levels uniform in lambda = -ln sigma: (steps+1,) float64, decreasing (B.2, DPM-Solver)."""
    lambdas = torch.linspace(-math.log(sigma_max), -math.log(sigma_min), steps + 1, dtype=torch.float64)
    return torch.exp(-lambdas)


def edm_sigmas(steps, sigma_max=80.0, sigma_min=0.002, rho=7):
    """Noise levels of EDM Eq. 5 and a final 0: (steps+1,) float64; for CIFAR-10 EDM has steps=18."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


def as_grid(grid):
    """A grid as a tuple of floats; ValueError unless two or more, strictly falling, none below 0."""
    grid = tuple(float(g) for g in (grid.tolist() if torch.is_tensor(grid) else grid))
    if len(grid) < 2 or not all(b < a for a, b in zip(grid, grid[1:])) or grid[-1] < 0:
        raise ValueError(f"grid {grid}: it must have two or more values, fall strictly and end at 0 or above")
    return grid


# ---- denoiser D(x, sigma), consistency model f(x, sigma) ----------------------------------------
def ode_step(D, x_t, t, r, order):
    """One step of dx/dsigma = (x - D)/sigma from t to r, both (B,). Order 1: Euler, 2: Heun (EDM Alg. 1).

    Levels may differ from sample to sample, as consistency distillation needs. Where r is 0, Heun becomes
    Euler (EDM).
    """
    if order not in (1, 2):
        raise ValueError(f"ode_step: order {order!r}; it must be 1 (Euler) or 2 (Heun)")
    t, r = (s.view(-1, *[1] * (x_t.ndim - 1)).to(x_t) for s in (t, r))
    slope = (x_t - D(x_t, t.flatten()).to(x_t.dtype)) / t
    x_r = x_t + (r - t) * slope
    if order == 2:
        level = torch.where(r > 0, r, t)              # trap: at r = 0 the second slope is 0/0
        slope_r = (x_r - D(x_r, level.flatten()).to(x_t.dtype)) / level
        x_r = torch.where(r > 0, x_t + (r - t) * (slope + slope_r) / 2, x_r)
    return x_r


def by_steps(D, x, sigmas, order):
    """ode_step from level to level of a grid (steps+1,) -> all states (steps+1, B, ...)."""
    xs, grid = [x], as_grid(sigmas)
    for s, s_next in zip(grid, grid[1:]):
        t, r = x.new_full((len(x),), s), x.new_full((len(x),), s_next)
        xs.append(ode_step(D, xs[-1], t, r, order if s_next else 1))      # to 0 Heun is Euler: one call
    return torch.stack(xs)


def euler(D, x, sigmas):
    """Euler on the probability-flow ODE, one call of D a step. Shapes as by_steps."""
    return by_steps(D, x, sigmas, 1)


def heun(D, x, sigmas):
    """Heun on the same ODE, without churn. Two calls of D a step, one where the step ends at sigma 0."""
    return by_steps(D, x, sigmas, 2)


@functools.lru_cache(maxsize=64)
def dpmpp_coefficients(sigmas, order):
    """Constants of DPM-Solver++ (multistep, data prediction) on a grid given as a tuple of floats.

    One row (a, b0, b1, b2) per step: x_next = a x + b0 D_i + b1 D_{i-1} + b2 D_{i-2}. With h the step in
    lambda = -ln sigma, and r0, r1 the two steps before it in units of h:

      phi1 = e^-h - 1               phi2 = phi1 / h + 1              phi3 = phi2 / h - 1/2
      d0 = (D_i - D_{i-1}) / r0     d1 = (D_{i-1} - D_{i-2}) / r1    slopes of D in lambda, times h

      order 1   x_next = a x - phi1 D_i                              a = sigma_next / sigma
      order 2   x_next = a x - phi1 (D_i + d0 / 2)
      order 3   x_next = a x - phi1 D_i + phi2 D1 - phi3 D2          D2 = (d0 - d1) / (r0 + r1), D'' h^2 / 2
                                                                     D1 = d0 + r0 D2
    In order 3 the weight of d0 is phi2 + c, of d1 -c, with c = (phi2 r0 - phi3) / (r0 + r1).
    """
    lambdas = [-math.log(s) if s > 0 else math.inf for s in sigmas]
    rows, steps = [], len(sigmas) - 1
    for i in range(steps):
        # choice: the order falls at the end for any number of steps (12 of the 16 of B.2 are of order 3), as
        # in the authors' copy of the solver; the reference solver does so below 10 steps only
        k = min(order, i + 1, steps - i)
        h = lambdas[i + 1] - lambdas[i]
        phi1 = math.expm1(-h)
        a, b = sigmas[i + 1] / sigmas[i], [-phi1, 0.0, 0.0]
        if k == 2:
            r0 = (lambdas[i] - lambdas[i - 1]) / h
            b[0] -= 0.5 * phi1 / r0
            b[1] += 0.5 * phi1 / r0
        elif k == 3:
            phi2 = phi1 / h + 1                     # trap: with the wrong sign of phi2 images still look fine
            phi3 = phi2 / h - 0.5
            r0, r1 = (lambdas[i] - lambdas[i - 1]) / h, (lambdas[i - 1] - lambdas[i - 2]) / h
            c = (phi2 * r0 - phi3) / (r0 + r1)      # choice: phi3 D2, as the official code; Taylor: 2 phi3 D2
            b[0] += (phi2 + c) / r0
            b[1] -= (phi2 + c) / r0 + c / r1
            b[2] += c / r1
        rows.append((a, *b))
    return rows


def dpmpp(D, x, sigmas, order=3):
    """DPM-Solver++ multistep of the given order (1, 2, 3): the teacher's trajectory (B.2: order 3, 16 steps).

    D(x, sigma (B,)) -> denoised, called exactly `steps` times. x (B, ...): state at sigmas[0], dtype kept.
    sigmas (steps+1,): any decreasing grid, the last may be 0. Returns (steps+1, B, ...), xs[0] = x. It
    writes in place, so call it under torch.no_grad.
    """
    grid = as_grid(sigmas)
    if order not in (1, 2, 3):
        raise ValueError(f"dpmpp: order {order!r}; it must be 1, 2 or 3")
    xs = x.new_empty((len(grid), *x.shape))
    xs[0] = x
    history = []                                      # D_i, D_{i-1}, D_{i-2}
    for i, (a, *b) in enumerate(dpmpp_coefficients(grid, order)):
        history = [D(xs[i], x.new_full((len(x),), grid[i])).to(x.dtype)] + history[:2]
        torch.mul(xs[i], a, out=xs[i + 1])            # a x + b0 D_i + ..., in place: no copy for each term
        for weight, D_x in zip(b, history):
            if weight:
                xs[i + 1].add_(D_x, alpha=weight)
    return xs


def few_step(f, x_T, sigmas, generator=None):
    """Consistency sampling: one evaluation of f per noise level, fresh noise between them.

    f(x, sigma (B,)) -> clean. x_T (B, ...): noise at sigmas[0]. sigmas: [80.] one step, [80., 0.821] two
    (B.2). generator: None, one torch.Generator, or a list with one CPU generator per sample. Returns (B,
    ...), not clipped.
    """
    x = f(x_T, x_T.new_full((len(x_T),), float(sigmas[0])))
    for s in sigmas[1:]:
        if isinstance(generator, (list, tuple)):
            eps = noise(x.shape[1:], generator).to(x)
        else:
            eps = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x = f(x + float(s) * eps, x.new_full((len(x),), float(s)))
    return x


# ---- velocity v(x, t), average velocity u(x, t, r) ------------------------------------------------
def flow_euler(v, x, times):
    """Euler on dx/dt = v(x, t), times (steps+1,) from 1 (noise) to 0 (data) -> (steps+1, B, ...)."""
    return mean_flow(lambda x, t, r: v(x, t), x, times)       # v at t replaces the step's mean velocity


def flow_heun(v, x, times):
    """Heun on dx/dt = v(x, t): order 2, two calls a step, at t = 0 as well. Shapes as flow_euler."""
    grid = as_grid(times)
    xs = [x]
    for t, r in zip(grid, grid[1:]):
        d = v(x, x.new_full((len(x),), t)).to(x.dtype)         # trap: else the step too is rounded to bf16
        d_next = v(x - (t - r) * d, x.new_full((len(x),), r)).to(x.dtype)
        x = x - (t - r) * (d + d_next) / 2
        xs.append(x)
    return torch.stack(xs)


def mean_flow(u, x, times):
    """Mean-Flow roll-out: x_r = x_t - (t - r) u(x_t, t, r) from time to time, exact for an exact u."""
    grid = as_grid(times)
    xs = [x]
    for t, r in zip(grid, grid[1:]):
        x = x - (t - r) * u(x, x.new_full((len(x),), t), x.new_full((len(x),), r)).to(x.dtype)
        xs.append(x)
    return torch.stack(xs)


# ---- seeds and noise ---------------------------------------------------------------------------
def fold(*key):
    """A 63-bit seed from numbers and words: all noise follows from (seed, purpose, number), none is saved."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def randn(shape, g):
    """Unit Gaussian noise on the generator's device."""
    return torch.randn(shape, generator=g, device=g.device)


def noise(shape, generators):
    """Unit Gaussian noise (len(generators), *shape) on the CPU; row i comes from generators[i] alone."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])
