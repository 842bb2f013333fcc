"""EDM2 against the official numbers, its weights normalised once instead of at every call, the distance of latents."""
import copy
import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHIPPED

import nets

GOLDEN = Path(__file__).parent / "golden"


def by_rule(net):
    """Weights of the golden files: a function of each name."""
    for name, p in [*net.named_parameters(), *net.named_buffers()]:
        z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(p.shape))
        z = torch.as_tensor(np.asarray(z, np.float32))
        scaled = z / np.sqrt(np.prod(p.shape[1:])) if p.ndim > 1 else 0.5 + 0.1 * z
        rules = {"freqs": lambda z: 2 * np.pi * z, "phases": lambda z: 2 * np.pi * (z.abs() % 1)}
        p.data.copy_(rules.get(name.rsplit(".", 1)[-1], lambda z: scaled)(z))
    return net.eval()


@pytest.fixture(scope="module")
def golden():
    g = np.load(GOLDEN / "edm2_tiny.npz")
    return {k: g[k] if g[k].ndim else json.loads(str(g[k])) for k in g.files}


def make(golden, **kwargs):
    return by_rule(nets.EDM2Precond(**golden["config"], **kwargs))


def inputs(golden):
    return [torch.tensor(golden[k]) for k in ("x", "sigma", "labels")]


@pytest.fixture
def net():
    """A small one with attention, labels and gains that are not zero."""
    torch.manual_seed(0)
    net = nets.EDM2Precond(8, 1, 10, **SHIPPED["edm2-8"])
    for name, p in net.named_parameters():
        p.data.fill_(0.7) if p.ndim == 0 else p.data.mul_(3)
    return net


def batch(n=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 8, 8, generator=g)
    return x, torch.rand(n, generator=g) * 3 + 0.1, F.one_hot(torch.arange(n) % 10, 10).float()


def backward(net, seeds=(1,)):
    """Gradients by name of the mean square of the outputs on these batches."""
    for s in seeds:
        net(*batch(seed=s)).square().mean().backward()


def grads(net):
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def assert_close(a, b, tolerance):
    assert a.keys() == b.keys()
    for k in a:
        assert (a[k] - b[k]).abs().max() <= tolerance * b[k].abs().max().clamp_min(1e-6), k


def official(self, x, gain=1):
    """MPConv as the paper writes it: normalise, scale by gain / sqrt(fan_in), at every call."""
    w = self.weight
    w = w / (1e-4 + w.square().mean(tuple(range(1, w.ndim)), keepdim=True).sqrt())
    w = w * ((1 if gain is None else gain) / w[0].numel() ** 0.5)
    return x @ w.t() if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


# ---- the network ---------------------------------------------------------------------------------
def test_output_and_names_equal_the_official_network(golden):
    net = make(golden)
    for mine, key in zip(net(*inputs(golden), return_logvar=True), ("out", "logvar")):
        expected = torch.tensor(golden[key])
        assert mine.shape == expected.shape and (mine - expected).abs().max() < 1e-5 * expected.abs().max()
    assert {n: list(p.shape) for n, p in net.named_parameters()} == golden["param_names"]
    assert {n: list(p.shape) for n, p in net.named_buffers()} == golden["buffer_names"]


@pytest.mark.parametrize("size, channels, parameters, names", [
    ("xxs", 3, 31_307_877, ""), ("xs", 3, 124_710_949, "22ac8f26e002733a"), ("s", 3, 280_209_381, "a7e6ad8bb35be37a"),
    ("m", 4, 497_807_781, "ceabc9d432b000f8"), ("l", 3, 777_492_325, ""), ("xl", 3, 1_119_276_837, "6055aaecc9e83371"),
    ("xxl", 4, 1_523_164_773, "22973ba5b1936664")])
def test_published_parameter_counts_and_names(size, channels, parameters, names):
    """names: of the lines `name shape` of the official state dict."""
    with torch.device("meta"):
        net = nets.EDM2Precond(64, channels, 1000, **nets.SIZES[f"edm2-{size}"])
    lines = "".join(f"{k} {tuple(v.shape)}\n" for k, v in net.state_dict().items())
    assert sum(p.numel() for p in net.parameters()) == parameters and len(net.state_dict()) == 203
    assert not names or hashlib.sha256(lines.encode()).hexdigest()[:16] == names


def test_size_for_digits_and_interface(net):
    assert 250_000 < sum(p.numel() for p in net.parameters()) < 350_000
    assert (net.img_resolution, net.img_channels, net.label_dim, net.sigma_data) == (8, 1, 10, 0.5)
    assert any(b.heads for n, b in net.unet.enc.items() if "block" in n)


def test_denoiser_is_the_identity_without_noise_and_a_fresh_one_is_c_skip(golden):
    x, _, labels = inputs(golden)
    assert torch.allclose(make(golden)(x, torch.full((len(x),), 1e-6), labels), x, atol=1e-4)
    fresh = nets.EDM2Precond(8, 1, 10, **nets.SIZES["edm2-8"])
    x, sigma, labels = batch()
    assert torch.allclose(fresh(x, sigma, labels), x * 0.25 / (sigma.view(-1, 1, 1, 1) ** 2 + 0.25))


def test_each_sample_is_computed_alone_and_no_class_is_zeros(net):
    x, sigma, labels = batch()
    assert torch.allclose(net(x, sigma, labels)[1:2], net(x[1:2], sigma[1:2], labels[1:2]), atol=1e-5)
    assert torch.equal(net(x, sigma), net(x, sigma, torch.zeros(4, 10)))
    assert not torch.allclose(net(x, sigma), net(x, sigma, labels))
    uncond = nets.EDM2Precond(8, 1, 0, logvar_channels=0, **nets.SIZES["edm2-8"])
    assert uncond(x, sigma).shape == x.shape
    assert not any("emb_label" in n or "logvar" in n for n in uncond.state_dict())


def test_eps_is_added_to_the_root_mean_square():
    x = torch.full((1, 16, 1, 1), 1e-4)
    assert torch.allclose(nets.normalize(x, 1), torch.full_like(x, 0.5))
    w = torch.full((3, 16), 1e-4)
    assert torch.allclose(w / nets.row_norm(w), torch.full_like(w, 0.5 / 4))


def test_dropout_only_at_low_resolution():
    kwargs = {**nets.SIZES["edm2-8"], "channel_mult": (1, 1, 1), "dropout": 0.5}
    for limit, where in ((4, {4, 2}), (None, {8, 4, 2})):
        unet = nets.EDM2Precond(8, 1, 10, dropout_res=limit, **kwargs).unet
        blocks = [(int(n.split("x")[0]), b) for part in (unet.enc, unet.dec) for n, b in part.items() if "_conv" not in n]
        assert {res for res, b in blocks if b.dropout} == where and {res for res, _ in blocks} == {8, 4, 2}
        assert all(b.dropout for res, b in blocks if res in where)


def test_other_resampling_is_refused_and_official_arguments_are_taken():
    with pytest.raises(ValueError, match="resample_filter"):
        nets.EDM2Precond(8, 1, 10, resample_filter=[1, 3, 3, 1])
    nets.EDM2Precond(8, 1, 10, model_channels=8, channel_mult=[1], channel_mult_noise=1, channel_mult_emb=2, num_blocks=1,
                     attn_resolutions=[8], label_balance=0.5, concat_balance=0.5, res_balance=0.3, attn_balance=0.3,
                     clip_act=256, channels_per_head=8, dropout=0.1, use_fp16=True, resample_filter=[1, 1])


def test_half_precision_is_of_the_unet_alone(net):
    full, seen = net(*batch()), {}
    net.unet.out_conv.register_forward_pre_hook(lambda m, args: seen.update(conv=args[0].dtype))
    net.unet.emb_noise.register_forward_pre_hook(lambda m, args: seen.update(emb=args[0].dtype))
    for dtype, tolerance in ((torch.bfloat16, 0.04), (torch.float16, 0.005)):
        net.compute_dtype = dtype
        half = net(*batch())
        assert seen == dict(conv=dtype, emb=torch.float32) and half.dtype == torch.float32
        assert 0 < (half - full).abs().max() < tolerance * full.abs().max()


def test_channels_last_stays(net):
    layouts = []
    net = net.to(memory_format=torch.channels_last)
    for block in (*net.unet.enc.values(), *net.unet.dec.values()):
        block.register_forward_hook(lambda m, i, o: layouts.append(o.is_contiguous(memory_format=torch.channels_last)))
    net(batch()[0].contiguous(memory_format=torch.channels_last), *batch()[1:])
    assert all(layouts) and len(layouts) == 11


# ---- weights normalised once ---------------------------------------------------------------------
def test_gradient_equals_the_official_one_hoisted_or_not(net, monkeypatch):
    seeds = (1, 2, 3, 4)
    plain, hoisted = copy.deepcopy(net), copy.deepcopy(net)
    backward(plain, seeds)
    with nets.hoist(hoisted):
        backward(hoisted, seeds)
    monkeypatch.setattr(nets.MPConv, "forward", official)
    backward(net, seeds)
    assert_close(grads(plain), grads(net), 2e-5)
    assert_close(grads(hoisted), grads(net), 2e-5)


def test_hoisting_adds_to_gradients_that_are_views_of_one_vector(net):
    other = copy.deepcopy(net)
    params = [p for n, p in net.named_parameters() if "logvar" not in n]
    flat = torch.zeros(sum(p.numel() for p in params))
    for p, view in zip(params, flat.split([p.numel() for p in params])):
        p.grad = view.view_as(p)
    for seed in (1, 2):
        backward(other, [seed])
        with nets.hoist(net):
            backward(net, [seed])
    assert_close(grads(net), grads(other), 2e-5)
    assert torch.equal(flat, torch.cat([p.grad.flatten() for p in params])) and flat.abs().sum() > 0


def test_a_step_writes_its_gradients_anew(net):
    """force: what stood in .grad of the normalised weights is gone."""
    other = copy.deepcopy(net)
    with nets.hoist(other, force=True):
        backward(other, [1])
    for m, asked in zip(nets.trainable(net), nets.trainable(other)):
        m.weight.grad = None if asked.weight.grad is None else torch.full_like(m.weight, 7.0)
    with nets.hoist(net, force=True):
        backward(net, [1])
    assert_close(grads(net), grads(other), 1e-6)


def test_hoisting_normalises_once_and_leaves_no_trace(net, monkeypatch):
    calls, scale_rows = [], nets.scale_rows
    expected, keys = net(*batch()), list(net.state_dict())
    monkeypatch.setattr(nets, "scale_rows", lambda *args: calls.append(1) or scale_rows(*args))
    monkeypatch.setattr(nets, "row_norm", None)
    with nets.hoist(net), torch.no_grad():            # a target pass inside, and sampling from a live network
        assert torch.allclose(net(*batch()), expected, atol=1e-5) and torch.allclose(net(*batch()), expected, atol=1e-5)
        assert list(net.state_dict()) == keys
    monkeypatch.undo()
    assert len(calls) == 1 and not grads(net)
    with pytest.raises(KeyError), nets.hoist(net):
        backward(net)
        raise KeyError
    assert all(m.hoisted is None for m in nets.trainable(net))
    assert not any(g.ndim for g in grads(net).values())                     # the weights' part is dropped
    net.zero_grad()
    backward(net)
    assert len(list(net.buffers())) == 4 and all(g.isfinite().all() for g in grads(net).values())


def test_hoisted_gradients_in_half_precision(net):
    other = copy.deepcopy(net)
    backward(other, (1, 2, 3, 4))
    net.compute_dtype = torch.bfloat16
    with nets.hoist(net):
        assert {m.hoisted.dtype for m in nets.trainable(net) if m.weight.ndim == 4} == {torch.bfloat16}
        assert {m.hoisted.dtype for m in nets.trainable(net) if m.weight.ndim == 2} == {torch.float32}
        backward(net, (1, 2, 3, 4))
    a, b = (torch.cat([g.flatten() for g in grads(n).values()]) for n in (net, other))
    assert a.dtype == torch.float32 and F.cosine_similarity(a, b, 0) > 0.998


def test_the_length_of_a_gradient_in_fp16_does_not_overflow():
    layer = nets.MPConv(4096, 2, (1, 1))
    layer.compute_dtype = torch.float16
    with nets.hoist(layer):
        layer.hoisted.grad = 1e5 * layer.hoisted.detach()                   # along the weight: nothing of it is left
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.norm() < 1e5 * 2e-3 / 64


def test_two_forwards_before_one_backward_after_forced_normalisation(net):
    with nets.hoist(net.train(), force=True):
        pass
    (net(*batch(seed=1)) - net(*batch(seed=2))).square().mean().backward()
    assert all(g.isfinite().all() for g in grads(net).values())


def test_forced_normalisation_is_in_place_and_changes_no_output(net):
    before, pointers = net(*batch()), [p.data_ptr() for p in net.parameters()]
    with nets.hoist(net, force=True):
        pass
    assert pointers == [p.data_ptr() for p in net.parameters()]
    for m in nets.trainable(net):
        rms = m.weight.square().mean(tuple(range(1, m.weight.ndim))).sqrt()
        assert torch.allclose(rms, torch.ones_like(rms), atol=1e-3)
    assert torch.allclose(net(*batch()), before, atol=2e-3 * before.abs().max().item())
    assert all(p.item() == pytest.approx(0.7) for p in net.parameters() if p.ndim == 0)


def test_gradient_is_orthogonal_to_the_weight(net):
    with nets.hoist(net):
        backward(net)
    for m in nets.trainable(net):
        if m.weight.grad is not None:
            w, g = m.weight.flatten(1), m.weight.grad.flatten(1)
            assert F.cosine_similarity(w, g).abs().max() < 1e-3


def test_frozen_network(net):
    expected, size = net(*batch()), sum(p.numel() for p in net.parameters())
    for dtype, tolerance in ((None, 1e-5), (torch.bfloat16, 0.04)):
        frozen = copy.deepcopy(net).train()
        frozen.compute_dtype = dtype
        frozen = nets.freeze(frozen)
        out = frozen(*batch())
        assert (out - expected).abs().max() < tolerance * expected.abs().max()
        assert not frozen.training and not out.requires_grad and not any(p.requires_grad for p in frozen.parameters())
        held = sum(t.numel() for t in (*frozen.parameters(), *frozen.buffers()))
        assert held == size + sum(b.numel() for b in net.buffers())         # one copy
        with nets.hoist(frozen, force=True):
            assert torch.equal(frozen(*batch()), out)
        with pytest.raises(ValueError, match="frozen"):
            frozen.state_dict()
    assert net(*batch()).requires_grad                # the one it was copied from is as it was


# ---- distance of latents -------------------------------------------------------------------------
@pytest.fixture(scope="module")
def distance():
    torch.manual_seed(0)
    return nets.ELatentLPIPS(ensemble="bgcfnc")


def latents(n=2, seed=5):
    g = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn(n, 4, 16, 16, generator=g), 0.5 * torch.randn(n, 4, 16, 16, generator=g)


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def viewed(distance, a, b, generator):
    """The distance under a random view of each sample."""
    draw = distance.draw(a, generator)
    return distance(distance.augment(a, draw), distance.augment(b, draw))


def test_distance_of_latents(distance):
    a, b = latents()
    assert distance(a, a).abs().max() == 0 and (distance(a, b) > 0).all() and distance(a, b).shape == (2,)
    assert torch.allclose(distance(a, b), distance(b, a))
    assert torch.equal(distance(a, b), distance.distance(distance.features(a), distance.features(b)))
    assert torch.allclose(distance(a, b)[1:], distance(a[1:], b[1:]), rtol=1e-4)
    f, g = distance.features(a), distance.features(b)
    cosine = sum(2 - 2 * (x * y).sum(1).mean((1, 2)) for x, y in zip(f, g))
    assert torch.allclose(distance(a, b), cosine, atol=1e-3)                # unit length, sum over channels and taps


def test_gradient_reaches_the_latents_through_every_transformation(distance):
    a, b = latents(1)
    a.requires_grad_()
    viewed(distance, a, b, seeded()).sum().backward()
    assert a.grad.isfinite().all() and a.grad.abs().sum() > 0 and all(p.grad is None for p in distance.parameters())


def test_one_draw_for_both_images_by_the_generator_alone(distance):
    a, b = latents()
    assert viewed(distance, a, a, seeded()).abs().max() == 0
    assert torch.equal(viewed(distance, a, b, seeded()), viewed(distance, a, b, seeded()))
    assert not torch.allclose(viewed(distance, a, b, seeded()), viewed(distance, a, b, seeded(8)))
    draw = distance.draw(a, seeded())
    assert [*draw] == ["affine", "colour", "gains", "noise", "mask"]
    both = distance.augment(torch.cat([a[:1], a[:1]]), draw)
    assert not torch.allclose(both[0], both[1])       # each sample has its own
    assert torch.equal(distance.augment(a, {}), a)


@pytest.mark.parametrize("ensemble", nets.ELatentLPIPS.ENSEMBLES)
def test_views_names_what_is_drawn(ensemble):
    distance = nets.ELatentLPIPS(ensemble=ensemble)
    assert [*distance.draw(latents()[0], seeded())] == distance.views


def test_blit_moves_whole_pixels(monkeypatch, distance):
    monkeypatch.setattr(distance, "parts", "b")
    x = latents(16)[0]
    y = distance.augment(x, distance.draw(x, seeded()))
    for one, moved in zip(x, y):
        found = [torch.allclose(moved[:, 4:12, 4:12], r.roll((i, j), (1, 2))[:, 4:12, 4:12], atol=1e-4)
                 for k in range(4) for r in (one.rot90(k, (1, 2)), one.flip(2).rot90(k, (1, 2)))
                 for i in range(-2, 3) for j in range(-2, 3)]
        assert any(found)


def test_colour_of_four_channels(monkeypatch, distance):
    monkeypatch.setattr(distance, "parts", "c")
    x = latents(8)[0]
    y = distance.augment(x, distance.draw(x, seeded()))
    assert torch.equal(y[:, 3], x[:, 3]) and not torch.allclose(y[:, :3], x[:, :3])     # channel 4 stands for RGB's constant


def test_colour_matrix_by_hand():
    v = torch.tensor
    m = nets.rgb_matrix(v([0.2]), v([1.5]), v([-1.0]), v([0.3]), v([0.5]))[0]
    grey = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert torch.allclose(m @ grey, -1.5 * grey) and torch.allclose(m[:, 3], v([-0.3, -0.3, -0.3, 1.0]))
    red = nets.rgb_matrix(v([0.0]), v([1.0]), v([1.0]), v([1 / 3]), v([1.0]))[0] @ v([1.0, 0, 0, 0])
    assert torch.allclose(red, v([0, 1.0, 0, 0]), atol=1e-6)                # a third of a turn: red becomes green


def test_filter_with_equal_gains_and_cutout_by_hand(monkeypatch, distance):
    x = latents(64)[0]
    assert torch.allclose(distance.augment(x, {"gains": torch.ones(64, 4)}), x, atol=1e-6)
    monkeypatch.setattr(distance, "parts", "o")
    holes = 1 - distance.draw(x, seeded())["mask"]
    assert set(holes.unique().tolist()) == {0.0, 1.0} and holes.flatten(1).sum(1).max() == 64    # half by half of 16
    assert holes.amax(3).sum(2).max() == 8


def test_vgg_of_latents_has_the_published_size_and_taps(distance):
    kernels = sum(p.numel() for p in distance.parameters() if p.ndim == 4)
    assert kernels == 14_711_040 and not any(p.requires_grad for p in distance.parameters())
    with torch.device("meta"):
        classifier = nets.ELatentLPIPS(num_classes=1000)
        x = torch.empty(2, 4, 64, 64)
        assert [f.shape[-1] for f in classifier.features(x)] == [64, 64, 64, 32, 16]
        assert classifier.logits(x).shape == (2, 1000)
    assert sum(p.numel() for p in classifier.head.parameters()) == 123_642_856
    assert classifier.training and all(p.requires_grad for p in classifier.parameters())


def test_trained_vgg_becomes_a_distance_without_its_head(distance):
    state = {**distance.state_dict(), "head.2.weight": torch.zeros(1)}
    other = nets.ELatentLPIPS(state)
    assert torch.equal(other(*latents()), distance(*latents()))
    with pytest.raises(ValueError, match="VGG"):
        nets.ELatentLPIPS({k: v for k, v in state.items() if "slices.4" not in k})
    with pytest.raises(KeyError, match="bgx"):
        nets.ELatentLPIPS(ensemble="bgx")
