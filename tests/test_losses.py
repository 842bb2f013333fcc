"""The losses by hand, the pairs of a trajectory, one update, one checkpoint."""

import shutil

import pytest
import torch
from PIL import Image
from test_forks import ask_pairs

import fid
import nets
import solvers
import train_cmt_cifar as script
import train_cmt_imagenet as imagenet


def gaussian(x, sigma, mean=0.3, s0=0.5):
    """Closed-form denoiser of N(mean, s0^2)."""
    s = sigma.view(-1, 1, 1, 1)
    return (s0**2 * x + s**2 * mean) / (s0**2 + s**2)


def flow_map(x, sigma, end=0.002, mean=0.3, s0=0.5):
    """Exact end at sigma = end of the trajectory through x."""
    s = sigma.view(-1, 1, 1, 1)
    return mean + (x - mean) * ((s0**2 + end**2) / (s0**2 + s**2)).sqrt()


def config(*argv):
    return script.parse(["--data", "digits", "--stage", "mid", *argv])


def pairs(*argv):
    """The noise levels and the pairs that the loop of train would draw."""
    cfg = config("--batch", "16", "--trajectories", "4", "--nfe", "8", *argv)
    sigmas, g = solvers.logsnr_sigmas(cfg.nfe), torch.Generator().manual_seed(0)
    if cfg.mid == "slow":
        images = torch.randint(0, 256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(3)).byte()
        return sigmas, script.slow_pairs(cfg, gaussian, images, g)
    return sigmas, script.teacher_pairs(cfg, gaussian, (1, 8, 8), g)


# ---- Eq. 7 ---------------------------------------------------------------------------------------
def test_every_cmt_pair_lies_on_the_trajectory_that_ends_in_its_target():
    sigmas, (x_t, t, owner, x_0) = pairs()
    assert x_t.shape == (32, 1, 8, 8) and x_0.shape == (4, 1, 8, 8) and t.shape == owner.shape == (32,)
    first = t == t.max()
    xs = script.teacher_solver(gaussian, x_t[first][owner[first].argsort()], sigmas)
    for p in range(32):
        i = (sigmas.float() - t[p]).abs().argmin()
        assert torch.equal(x_t[p], xs[i, owner[p]]) and torch.equal(x_0[owner[p]], xs[-1, owner[p]])
    assert sorted(set(t.tolist()), reverse=True) == pytest.approx(sigmas[:-1].tolist())


def test_cmt_loss_is_zero_for_the_oracle_flow_map_and_grows_with_the_error():
    """A fine solve is the exact flow map, so the exact student has nothing left to learn."""
    _, (x_t, t, owner, x_0) = pairs("--nfe", "512", "--trajectories", "1")
    distance = nets.PixelDistance()
    zero = script.loss_cmt(flow_map, x_t, t, [x_0[owner]], distance)
    assert zero < 1e-6
    assert script.loss_cmt(lambda x, s: flow_map(x, s) + 0.1, x_t, t, [x_0[owner]], distance) == pytest.approx(0.01, rel=0.02)


def test_distillation_uses_only_the_prior_and_slow_cmt_forward_perturbed_data():
    sigmas, (x_t, t, owner, x_0) = pairs("--mid", "kd")
    assert len(x_t) == len(x_0) == 16 and (t == 80).all() and x_t.std() == pytest.approx(80, rel=0.1)
    assert torch.equal(owner.sort()[0], torch.arange(16))
    assert torch.allclose(x_0[owner], script.teacher_solver(gaussian, x_t, sigmas)[-1])
    sigmas, (x_t, t, owner, x_0) = pairs("--mid", "slow")
    assert len(x_t) == len(x_0) == 32 and torch.equal(owner.sort()[0], torch.arange(32))
    assert sorted(t.tolist()) == pytest.approx(sorted(sigmas[:-1].tolist() * 4))
    quiet = t < 0.01
    assert ((x_t[quiet] + 1) * 127.5).frac().abs().mean() > 0 and x_t[quiet].abs().max() < 1.1       # data, and a little noise
    for i in range(8):
        mine = t == sigmas[i].float()
        assert torch.allclose(x_0[owner[mine]], script.teacher_solver(gaussian, x_t[mine], sigmas[i:])[-1])


@pytest.mark.parametrize("mid", ["cmt", "slow"])
def test_the_last_line_of_solve_size_alone_says_which_states_are_used(mid, monkeypatch):
    """The walk-through's exercise: of 8 states the 3 noisiest, in Slow CMT, too."""
    monkeypatch.setattr(script, "solve_size", lambda cfg: (4, 3))
    sigmas, (x_t, t, _, _) = pairs("--mid", mid)
    assert len(x_t) == 12 and sorted(t.tolist()) == pytest.approx(sorted(sigmas[:3].tolist() * 4))


def test_random_numbers_are_those_of_the_whole_batch_on_every_process(monkeypatch):
    """Each process solves its share; gathered, they are the trajectories of one process."""
    seen = []
    monkeypatch.setattr(script, "gather", lambda x: seen.append(x) or x.repeat(1, script.WORLD, 1, 1, 1))
    for world, rank in ((1, 0), (2, 0), (2, 1)):
        monkeypatch.setattr(script, "WORLD", world)
        monkeypatch.setattr(script, "RANK", rank)
        pairs()
    whole, *halves = seen
    for rank, half in enumerate(halves):
        assert torch.allclose(half, whole[:, 2 * rank:2 * rank + 2], atol=1e-5)


# ---- Eq. 3 ---------------------------------------------------------------------------------------
def tanh_net(x, s):
    s = s.view(-1, 1, 1, 1)
    return torch.tanh(x) * s / (1 + s)


@pytest.mark.parametrize("q, r, losses", [(4096, [7.255404, 0.184891], [0.1276461, 1.1986251]),
                                          (256, [7.228678, 0.181752], [0.1281061, 1.2003199]),
                                          (2, [3.608140, 0.0], [0.2060538, 9.9151134])])
def test_ect_loss_equals_the_official_numbers(q, r, losses):
    x = torch.linspace(-1, 1, 24).view(2, 3, 2, 2)
    torch.manual_seed(0)
    t = (torch.randn(2, 1, 1, 1) * 2.0 - 1.1).exp().flatten()
    eps = torch.randn_like(x)
    assert t.tolist() == pytest.approx([7.257186, 0.185100], rel=1e-5)
    level = script.ect_step(t, q)
    assert level.tolist() == pytest.approx(r, rel=1e-5, abs=1e-7)
    x_t, x_r = x + t.view(-1, 1, 1, 1) * eps, x + level.view(-1, 1, 1, 1) * eps
    each = [script.loss_ect(tanh_net, x_t[i:i + 1], x_r[i:i + 1], t[i:i + 1], level[i:i + 1]).item()
            for i in range(2)]
    assert each == pytest.approx(losses, rel=2e-3)    # float32: t - r has three digits left at q = 4096


class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x, s):
        return self.a * x * s.view(-1, 1, 1, 1)


def test_ect_gradient_stops_at_the_target():
    net, x = Scale(), torch.full((1, 1, 1, 1), 3.0)
    script.loss_ect(net, x, x, torch.tensor([2.0]), torch.tensor([1.0])).backward()
    assert net.a.grad.item() == pytest.approx(6.0)    # d/da |a 3 2 - stop(a 3 1)| / 1; with gradient in both it would be 3


def test_ect_has_no_nan_where_both_answers_agree():
    net = Scale()
    zero = torch.zeros(2, 1, 2, 2)
    loss = script.loss_ect(net, zero, zero, torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.5]))
    loss.backward()
    assert loss.item() == 0 and net.a.grad.item() == 0


def test_target_at_r_zero_is_the_state_there():
    """ECT: the clean image; ECD: where the teacher's step to 0 ends."""
    x = torch.full((1, 1, 1, 1), 0.7)
    nan_at_zero = lambda y, s: y + 0 * torch.log(s).view(-1, 1, 1, 1)                  # noqa: E731
    loss = script.loss_ect(nan_at_zero, x + 1.0, x, torch.tensor([2.0]), torch.tensor([0.0]))
    assert loss.item() == pytest.approx(0.5)


class Half(torch.nn.Module):
    """A small net of either kind that answers differently under every mask."""

    def __init__(self, kind):
        super().__init__()
        size = dict(img_resolution=8, img_channels=1, model_channels=32, channel_mult=(1, 1), num_blocks=1,
                    attn_resolutions=(4,), dropout=0.5)
        torch.manual_seed(0)
        self.net = kind(**size, **({"label_dim": 0, "channels_per_head": 32} if kind is nets.EDM2Precond else {}))
        for p in self.net.parameters():               # gains and last layers start at zero, where no mask would show
            torch.nn.init.normal_(p.data, std=0.3)

    def forward(self, x, s, masks=None):
        return self.net(x, s, masks=masks)


@pytest.mark.parametrize("kind", [nets.EDMPrecond, nets.EDM2Precond])
def test_dropout_masks_depend_on_the_place_in_the_batch_alone(kind):
    """A share of the batch, or a micro-batch, drops what the whole batch drops; other seeds drop something else."""
    net, x, t = Half(kind), torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.full((6,), 2.0)
    whole = net(x, t, nets.dropout_masks(net.net, range(10, 16)))
    part = net(x[4:], t[4:], nets.dropout_masks(net.net, range(14, 16)))
    other = net(x[4:], t[4:], nets.dropout_masks(net.net, range(15, 17)))
    assert torch.allclose(whole[4:], part, atol=1e-5) and not torch.allclose(part, other, atol=1e-2)
    masks = nets.dropout_masks(net.net, range(200))
    assert masks.float().mean().item() == pytest.approx(0.5, abs=0.01) and masks.shape[1] == sum(
        m.width * {"8": 64, "4": 16}[name.split(".")[-1][0]] for name, m in net.named_modules() if hasattr(m, "width"))
    assert nets.dropout_masks(net.net.eval(), range(4)) is None


def test_ect_has_one_dropout_mask_for_both_answers():
    """The masks belong to the net that loss_ect is given, so both calls have the same."""
    from functools import partial
    net, x, t = Half(nets.EDMPrecond), torch.zeros(4, 1, 8, 8), torch.full((4,), 2.0)
    D = partial(net, masks=nets.dropout_masks(net.net, range(4)))
    assert imagenet.loss_ect(D, x, x, t, t, torch.ones(4)).item() == 0
    torch.manual_seed(0)
    assert imagenet.loss_ect(net, x, x, t, t, torch.ones(4)).item() > 0       # two masks: this is what is avoided


@pytest.mark.parametrize("c", [0.0, 0.06])
def test_both_scripts_have_one_ect_but_for_the_weight(c):
    """Eq. 3 by 1 / (t - r), and by a weight that is given."""
    (x_t, x_r), t = torch.randn((2, 2, 3, 2, 2)), torch.tensor([7.0, 0.2])
    ours, given = (f(tanh_net, x_t, x_r, t, t / 2, *weight, huber_c=c) for f, weight in ((script.loss_ect, ()), (imagenet.loss_ect, (2 / t,))))
    assert ours.item() == pytest.approx(given.item(), rel=1e-5) and ours > 0


def test_pseudo_huber_and_denoising_loss_by_hand():
    net = lambda x, s: x                                                              # noqa: E731
    x, one = torch.zeros(1, 1, 1, 2), torch.tensor([1.0])
    x_t = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
    assert script.loss_ect(net, x_t, x, one * 2, one, huber_c=12.0).item() == pytest.approx(1.0)
    eps = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2)
    assert script.loss_dm(net, x, one, eps).item() == pytest.approx(5 * 2.5)          # (1 + 1/4) / (1/4) = 5


# ---- plumbing ------------------------------------------------------------------------------------
def test_flat_vectors_are_the_weights_and_gradients_of_the_net():
    net = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    before, strides = net.weight.detach().clone(), net.weight.stride()
    flat, grad = nets.flatten(net)
    assert torch.equal(net.weight, before) and net.weight.stride() == net.weight.grad.stride() == strides
    net(torch.ones(1, 3, 5, 5)).sum().backward()
    assert torch.equal(grad.sum(), net.weight.grad.sum() + net.bias.grad.sum()) and len(grad) == len(flat)
    flat.zero_()
    assert net.weight.abs().sum() == 0


def test_pre_training_is_by_adam_and_what_follows_by_radam(road, tmp_path):
    """B.2; after it Adam's first steps would be adapted, by a variance of few gradients."""
    for stage, optimiser in ("pretrain", torch.optim.Adam), ("mid", torch.optim.RAdam), ("post", torch.optim.RAdam):
        cfg = config("--stage", stage, "--out", str(tmp_path), "--batch", "16", "--trajectories", "4")
        assert type(script.set_up(cfg).opt) is optimiser
        shutil.copy(road / f"{stage}.pt", tmp_path)


def test_moments_come_back_and_the_settings_are_those_of_the_code(road):
    """A file of 2026-11-27 has Adam's eps, which made a step of RAdam of it: 1e10 in the first five."""
    ckpt = nets.load_checkpoint(f"{road}/mid.pt")
    ckpt["opt"]["param_groups"][0].update(eps=1e10, fused=True)
    net, ema = (script.build(config(), ckpt["model"]) for _ in range(2))
    opt = torch.optim.RAdam([torch.zeros_like(ckpt["opt"]["state"][0]["exp_avg"])])
    nets.restore(ckpt, "mid.pt", net, ema, opt, {})
    assert opt.param_groups[0]["eps"] == 1e-8 and not opt.param_groups[0].get("fused")
    (state,) = opt.state.values()
    assert torch.equal(state["exp_avg"], ckpt["opt"]["state"][0]["exp_avg"]) and state["step"] == 3


def test_seeds_are_a_fixed_function_of_their_key():
    assert script.fold(0, "mid", 1) == script.fold(0, "mid", 1) != script.fold(0, "mid", 2)
    assert script.fold(0, "mid", 1) == 5910107087388579277


def test_trained_vgg_sees_a_change_of_digit_as_larger_than_noise():
    images, labels = script.fid.digits()
    torch.manual_seed(0)
    vgg = nets.VGG()
    x = fid.to_float(images[:64], "cpu")
    assert vgg(x, x.flip(0)).mean() > vgg(x, x + 0.02 * torch.randn(x.shape)).mean()


def test_a_solve_of_another_size_than_stated_is_told():
    """Its batches would be empty, and their loss not a number."""
    pairs = torch.zeros(8, 1), torch.zeros(8)
    ask_pairs(pairs, 8)
    with pytest.raises(AssertionError, match="a solve returned 8, 8 rows, solve_size says 16 pairs"):
        ask_pairs(pairs, 16)
