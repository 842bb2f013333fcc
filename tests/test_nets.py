"""DDPM++ against the official numbers, the preconditioning, the distances."""
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import nets

GOLDEN = Path(__file__).parent / "golden"


def by_rule(net):
    """Weights of the golden files: a function of each parameter's name."""
    for name, p in net.named_parameters():
        z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(p.shape)).astype(np.float32)
        value = z / np.sqrt(np.prod(p.shape[1:])) if p.ndim > 1 else 0.1 * z + name.endswith("weight")
        p.data.copy_(torch.as_tensor(value, dtype=torch.float32))
    return net.eval()


@pytest.fixture(params=["songunet_tiny", "songunet_tiny_cond_aug"])
def golden(request):
    return np.load(GOLDEN / f"{request.param}.npz")


def run(golden, **kwargs):
    net = by_rule(nets.EDMPrecond(**json.loads(str(golden["config"])), **kwargs))
    labels = torch.tensor(golden["labels"]).float() if golden["labels"].size else None
    return net, (torch.tensor(golden["x"]), torch.tensor(golden["sigma"]), labels)


def test_output_and_names_equal_the_official_network(golden):
    net, inputs = run(golden)
    expected = torch.tensor(golden["out"])
    assert (net(*inputs) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert [(n, list(p.shape)) for n, p in net.named_parameters()] == list(json.loads(str(golden["param_names"])).items())


@pytest.mark.parametrize("size, parameters, tensors, buffers", [("32", 55_733_891, 417, 8), ("64", 61_805_571, 541, 12)])
def test_published_parameter_counts(size, parameters, tensors, buffers):
    with torch.device("meta"):
        net = nets.EDMPrecond(**nets.SIZES[f"ddpm++-{size}"], augment_dim=9)
    counts = sum(p.numel() for p in net.parameters()), len(list(net.parameters())), len(list(net.buffers()))
    assert counts == (parameters, tensors, buffers)


def test_denoiser_is_the_identity_without_noise(golden):
    net, (x, _, labels) = run(golden)
    assert torch.allclose(net(x, torch.full((len(x),), 1e-5), labels), x, atol=1e-3)


def test_each_sample_is_computed_alone(golden):
    net, (x, sigma, labels) = run(golden)
    one = net(x[1:], sigma[1:], labels[1:] if labels is not None else None)
    assert torch.allclose(net(x, sigma, labels)[1:], one, atol=1e-5)


def test_shift_of_the_official_evaluation_only_outside_training(golden):
    net, (x, sigma, labels) = run(golden)
    shifted, _ = run(golden, sigma_shift=0.003)
    sd, s = 0.5, sigma.view(-1, 1, 1, 1)
    F_x = (net(x, sigma, labels) - sd**2 / (s**2 + sd**2) * x) / (s * sd / (s**2 + sd**2).sqrt())
    expected = sd**2 / ((s - 0.003) ** 2 + sd**2) * x + (s - 0.003) * sd / (s**2 + sd**2).sqrt() * F_x
    assert torch.allclose(shifted(x, sigma, labels), expected, atol=1e-4)
    for m in shifted.modules():
        if isinstance(m, nets.UNetBlock):
            m.dropout = 0.0
    shifted.train()
    assert torch.equal(shifted(x, sigma, labels), net(x, sigma, labels))


@pytest.mark.parametrize("kwargs", [dict(embedding_type="fourier"), dict(encoder_type="residual"),
                                    dict(resample_filter=[1, 3, 3, 1]), dict(model_type="DhariwalUNet")])
def test_other_architectures_are_refused(kwargs):
    with pytest.raises(ValueError, match="DDPM"):
        nets.EDMPrecond(8, 1, **kwargs)


def test_attention_reads_query_key_value_interleaved():
    block = by_rule(nets.UNetBlock(8, 8, 4, attention=True, dropout=0.0))
    x, emb = torch.randn(2, 8, 3, 3), torch.randn(2, 4)
    seen = {}
    block.norm2.register_forward_hook(lambda m, i, o: seen.update(x=i[0], normed=o))
    out = block(x, emb)
    qkv = block.qkv(seen["normed"]).reshape(2, 8, 3, 9)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]                                # (B, C, HW)
    a = torch.einsum("bcq,bck->bqk", q, k).div(8**0.5).softmax(2)
    expected = (block.proj(torch.einsum("bqk,bck->bcq", a, v).view(2, 8, 3, 3)) + seen["x"]) * 0.5**0.5
    assert torch.allclose(out, expected, atol=1e-5)


# ---- distances -----------------------------------------------------------------------------------
SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))      # convolutions in torchvision's VGG-16


@pytest.fixture(scope="module")
def lpips():
    torch.manual_seed(0)
    vgg, c = {}, 3
    for slice_, (width, *_) in zip(SLICES, nets.LPIPS.WIDTHS):
        for i in slice_:
            vgg[f"features.{i}.weight"] = torch.randn(width, c, 3, 3) * (2 / (9 * c)) ** 0.5
            vgg[f"features.{i}.bias"] = 0.1 * torch.randn(width)
            c = width
    return vgg, nets.LPIPS({**vgg, "classifier.0.weight": torch.zeros(1)})


def images():
    g = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 32, 32, generator=g) * 2 - 1, torch.rand(2, 3, 32, 32, generator=g) * 2 - 1


def test_lpips_equals_its_definition(lpips):
    """Zhang et al. 2018, Eq. 1, written out with the heads of the installed package."""
    vgg, net = lpips
    heads = torch.load(nets.lpips_heads(), map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-.030, -.088, -.188]).view(3, 1, 1), torch.tensor([.458, .448, .450]).view(3, 1, 1)
    x, maps = (torch.cat(images()) - shift) / scale, []
    for k, slice_ in enumerate(SLICES):
        x = F.max_pool2d(x, 2) if k else x
        for i in slice_:
            x = F.relu(F.conv2d(x, vgg[f"features.{i}.weight"], vgg[f"features.{i}.bias"], padding=1))
        maps.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
    expected = sum((heads[f"lin{k}.model.1.weight"].view(-1, 1, 1) * (m[:2] - m[2:]) ** 2).sum(1).mean((1, 2))
                   for k, m in enumerate(maps))
    assert torch.allclose(net(*images()), expected, rtol=1e-5)


def test_lpips_equals_the_package(lpips):
    try:
        import lpips as package
    except (ImportError, RuntimeError) as e:
        pytest.skip(f"the lpips package does not import beside this torch: {e}")
    vgg, net = lpips
    reference = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for name, p in reference.net.named_parameters():
        p.data.copy_(vgg["features." + name.split(".", 1)[1]])
    assert torch.allclose(net(*images()), reference(*images()).flatten(), rtol=1e-5)


def test_heads_are_those_of_version_0_1(lpips):
    sums = [head.weight.sum().item() for head in lpips[1].heads]
    assert sums == pytest.approx([6.9260, 8.8583, 17.5150, 51.5213, 47.0349], abs=1e-3)


@pytest.mark.parametrize("make", [nets.VGG, nets.PixelDistance, lambda: nets.PixelDistance(0.06)])
def test_distances_are_zero_at_zero_and_split_into_features(make):
    torch.manual_seed(0)
    net, a, b = make(), torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8)
    assert net(a, a).abs().max() < 1e-6 and (net(a, b) > 0).all() and net(a, b).shape == (3,)
    assert torch.equal(net(a, b), net.distance(net.features(a), net.features(b)))


def test_pixel_distances_by_hand():
    a, b = torch.zeros(1, 1, 1, 2), torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
    assert nets.PixelDistance()(a, b).item() == 12.5
    assert nets.PixelDistance(12.0)(a, b).item() == 1.0                               # sqrt(25 + 144) - 12


def test_a_zero_feature_pixel_has_a_finite_gradient():
    for eps in (1e-20, 1e-8):
        f = torch.zeros(1, 4, 2, 2, requires_grad=True)
        nets.unit(f, eps).square().sum().backward()
        assert torch.isfinite(f.grad).all()


def test_gradient_reaches_the_image_and_not_the_lpips_weights(lpips):
    a = images()[0].requires_grad_()
    lpips[1](a, images()[1]).sum().backward()
    assert a.grad.abs().sum() > 0 and all(p.grad is None for p in lpips[1].parameters())


def test_batch_norm_is_refused_and_other_nets_have_no_dropout_masks():
    """Its averages are no weights: the EMA and other processes would not see them, and nobody would say so."""
    own = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    with pytest.raises(nets.WeightsError, match="batch norm.*use group norm"):
        nets.flatten(own)
    with pytest.raises(nets.WeightsError, match="nn.Dropout draws anew"):
        nets.dropout_masks(torch.nn.Sequential(torch.nn.Dropout(0.1)), range(4))
    with pytest.raises(nets.WeightsError, match="model_size does not say the arguments of Conv2d: .*'groupz'"):
        nets.make(torch.nn.Conv2d, dict(in_channels=1, out_channels=2, kernel_size=3, groupz=1), "")
    assert nets.dropout_masks(own[0], range(4)) is None and len(nets.flatten(own[0])[0]) == 20


def test_dropout_of_a_network_of_ones_own_is_the_same_in_both_calls():
    """As docs/forking.md says: a module tells its sizes, and drops by masks."""
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.dropout, self.sizes = torch.nn.Conv2d(1, 16, 1), 0.5, [16 * 8 * 8]

        def forward(self, x, sigma, masks=None):
            return nets.dropout(self, self.conv(x), masks)
    net, x = Own(), torch.ones(4, 1, 8, 8)
    masks = nets.dropout_masks(net, range(4))
    once, twice = net(x, None, masks), net(x, None, masks)
    assert masks.shape == (4, 1024) and torch.equal(once, twice) and 0.4 < (once == 0).float().mean() < 0.6
    with pytest.raises(RuntimeError, match="invalid for input of size 4096"):
        nets.dropout(net, x, masks)
    other = Own()
    other.dropout = 0
    assert nets.dropout_masks(other, range(4)).all()
    other.dropout = 0.1
    with pytest.raises(nets.WeightsError, match="rates .0.1, 0.5.: the masks of a net have one"):
        nets.dropout_masks(torch.nn.Sequential(net, other), range(4))
    assert nets.dropout_masks(net.eval(), range(4)) is None and torch.equal(net(x, None), net.conv(x))
