"""DiT, SiT and MM-DiT against the official numbers, their derivatives, their conversions."""
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import nets

GOLDEN = Path(__file__).parent / "golden"
OURS = {"z_dims": "repa_dim", "encoder_depth": "repa_depth"}                  # official name -> ours
OFFICIAL_ONLY = {"decoder_hidden_size", "path_type", "qk_norm"}               # in the files, fixed here


def by_rule(net):
    """Weights of the golden files: a function of each parameter's name; the position table stays."""
    for name, p in net.named_parameters():
        if name != "pos_embed":
            z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(p.shape)).astype(np.float32)
            value = z / np.sqrt(np.prod(p.shape[1:])) if p.ndim > 1 else 0.1 * z + name.endswith("weight")
            p.data.copy_(torch.as_tensor(value, dtype=torch.float32))
    return net.eval()


def golden(name, make, **kwargs):
    """(file as tensors, net with the file's configuration and weights)."""
    f = np.load(GOLDEN / f"{name}.npz")
    config = {OURS.get(k, k): v for k, v in json.loads(str(f["config"])).items() if k not in OFFICIAL_ONLY}
    config |= {"repa_dim": config["repa_dim"][0]} if "repa_dim" in config else {}
    net = by_rule(make(**config, **kwargs))
    shapes = [[(n, list(p.shape)) for n, p in named] for named in (net.named_parameters(), net.named_buffers())]
    assert shapes == [list(json.loads(str(f[k])).items()) for k in ("param_names", "buffer_names")]
    return {k: torch.tensor(f[k]) for k in f if f[k].dtype.kind in "fi"}, net


def close(a, b, tolerance):
    return (a - b).abs().max() <= tolerance * b.abs().max()


def derivative(net, g):
    """u and du/dt along (v, 1 in t, 0 in r)."""
    tangents = g["v"], torch.ones_like(g["t"]), torch.zeros_like(g["r"])
    with torch.no_grad():
        return torch.func.jvp(lambda x, t, r: net(x, t, r, g["y"]), (g["x"], g["t"], g["r"]), tangents)


def double(g):
    return {k: v.double() if v.is_floating_point() else v for k, v in g.items()}


def tiny(seed=0, **kwargs):
    """A small DiT in float64 whose every weight acts."""
    torch.manual_seed(seed)
    kwargs = {"input_size": 4, "hidden_size": 16, "depth": 3, "num_heads": 2, "num_classes": 5, **kwargs}
    net = nets.DiT(**kwargs).double()
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p) * p.requires_grad
    return net


def batch(n=3, channels=4):
    torch.manual_seed(1)
    x, t = torch.randn(n, channels, 4, 4).double(), torch.rand(n).double()
    return x, t, t * torch.rand(n).double(), torch.arange(n)


# ---- the official numbers ------------------------------------------------------------------------
def test_mean_flow_equals_the_official_network_and_derivative():
    g, net = golden("meanflow_dit_tiny", nets.DiT)
    u, dudt = derivative(net, g)
    assert close(u, g["u"], 1e-5) and close(dudt, g["dudt"], 1e-4)
    assert close(net(g["x"], g["t"], g["r"], g["y"]), g["u"], 1e-5)            # the fused attention


def test_sit_with_projector_equals_the_official_network():
    g, net = golden("sit_repa_tiny", nets.DiT, average_velocity=False)
    out, z = net(g["x"], g["t"], y=g["y"])
    assert close(out, g["out"], 1e-5) and close(z, g["z"], 1e-5)
    assert torch.equal(net(g["x"], g["t"], y=g["y"], repa=False), out)


def test_mm_dit_equals_the_official_network():
    g, net = golden("mmdit_tiny", nets.MMDiT)
    out, z = net(g["x"], g["t"], g["context"])
    assert close(out, g["out"], 1e-5) and close(z, g["z"], 1e-5)


@pytest.mark.parametrize("name, kwargs, total, trained", [
    ("dit-s/4", {}, 33_166_912, 33_142_336), ("dit-b/4", {}, 131_214_400, 131_165_248),
    ("dit-b/2", {}, 131_288_080, 131_091_472), ("dit-m/2", {}, 308_281_360, 308_019_216),
    ("dit-l/2", {}, 459_399_184, 459_137_040), ("dit-xl/2", {}, 676_735_504, 676_440_592),
    ("dit-xl/2", {"average_velocity": False}, 675_111_184, 674_816_272),
    ("mmdit/2", {"repa_dim": 0}, 505_070_608, 505_070_608), ("mmdit/2", {}, 512_415_504, 512_415_504)])
def test_published_parameter_counts(name, kwargs, total, trained):
    make = nets.MMDiT if name.startswith("mm") else nets.DiT
    with torch.device("meta"):
        sizes = [(p.numel(), p.requires_grad) for p in make(**nets.SIZES[name], **kwargs).parameters()]
    assert sum(n for n, _ in sizes) == total and sum(n for n, grad in sizes if grad) == trained


# ---- derivatives ---------------------------------------------------------------------------------
def test_derivative_equals_finite_differences_and_float64():
    g, net = golden("meanflow_dit_tiny", nets.DiT)
    _, single = derivative(net, g)
    g, net, h = double(g), net.double(), 1e-5
    u, dudt = derivative(net, g)
    ends = [net(g["x"] + s * h * g["v"], g["t"] + s * h, g["r"], g["y"]) for s in (1, -1)]
    assert close((ends[0] - ends[1]) / (2 * h), dudt, 1e-7) and close(single.double(), dudt, 1e-5)
    assert close(u, net(g["x"], g["t"], g["r"], g["y"]), 1e-12)


def test_derivative_works_through_other_transforms():
    """vmap inside jvp, jvp of a gradient: where a look for tangents at the attention's input fails."""
    net, (x, t, r, y) = tiny(), batch()
    one = torch.func.vmap(lambda x, t, r: net(x[None], t[None], r[None])[0])
    args, tangents = (x, t, r), (x, torch.ones_like(t), torch.zeros_like(r))
    rows = torch.func.jvp(one, args, tangents)[1]
    assert close(rows, torch.func.jvp(net, args, tangents)[1], 1e-10)
    slope = torch.func.grad(lambda x: net(x, t, r).square().sum())
    ahead, behind = slope(x + 1e-5 * x), slope(x - 1e-5 * x)
    assert close(torch.func.jvp(slope, (x,), (x,))[1], (ahead - behind) / 2e-5, 1e-6)


def test_derivative_of_mm_dit():
    torch.manual_seed(0)
    net = nets.MMDiT(4, 2, 1, depth=2, context_dim=6, average_velocity=True, repa_dim=0).double()
    x, t, r, _ = batch(channels=1)
    context = torch.randn(3, 5, 6).double()
    u, dudt = torch.func.jvp(lambda x, t: net(x, t, context, r), (x, t), (x, torch.ones_like(t)))
    ends = [net(x + s * 1e-5 * x, t + s * 1e-5, context, r) for s in (1, -1)]
    assert close((ends[0] - ends[1]) / 2e-5, dudt, 1e-7) and not torch.allclose(u, net(x, t, context))


# ---- behaviour -----------------------------------------------------------------------------------
def test_start_is_zero_and_every_parameter_learns():
    """u = 0 at the start; after one step along the gradient all parameters have gradients."""
    torch.manual_seed(0)
    x, t, r, y = batch()
    net = nets.DiT(4, 2, 4, 16, 2, 2, num_classes=5).double()
    assert net(x, t, r, y).abs().max() == 0
    for _ in range(3):
        (net(x, t, r, y) - x).square().mean().backward()
        seen = {n: p.grad.abs().sum() > 0 for n, p in net.named_parameters() if p.requires_grad}
        torch.optim.SGD(net.parameters(), 1.0).step()
    assert all(seen.values()), [n for n in seen if not seen[n]]


def test_start_has_the_spread_of_the_official_one():
    torch.manual_seed(0)
    net = nets.DiT(hidden_size=128, depth=1, num_heads=2)
    xavier = [(net.blocks[0].attn.qkv.weight, 128 + 384), (net.blocks[0].mlp.fc1.weight, 128 + 512),
              (net.x_embedder.proj.weight, 128 + 16)]
    for w, fans in xavier:
        assert w.std().item() == pytest.approx((2 / fans) ** 0.5, rel=0.05)
    for w in (net.t_embedder.mlp[0].weight, net.r_embedder.mlp[2].weight, net.y_embedder.embedding_table.weight):
        assert w.std().item() == pytest.approx(0.02, rel=0.05)


def test_two_clocks_or_one():
    x, t, r, y = batch()
    net = tiny()
    assert not torch.allclose(net(x, t, r, y), net(x, t, t, y))
    assert torch.equal(net(x, t, t, y), net(x, t, None, y))
    assert torch.allclose(net(x, t, torch.tensor(0.0).double(), y), net(x, t, torch.zeros(3).double(), y))
    assert torch.allclose(net(x, t[:1], r, y), net(x, t[:1].expand(3), r, y))
    one = tiny(average_velocity=False)
    assert torch.equal(one(x, t, r, y), one(x, t, None, y)) and one.r_embedder is None


def test_no_label_is_the_null_class():
    x, t, r, y = batch()
    net = tiny()
    assert torch.equal(net(x, t, r), net(x, t, r, torch.full((3,), 5)))
    assert not torch.allclose(net(x, t, r), net(x, t, r, y))


def test_each_sample_is_computed_alone():
    x, t, r, y = batch()
    net = tiny()
    one = torch.cat([net(x[i:i + 1], t[i:i + 1], r[i:i + 1], y[i:i + 1]) for i in range(3)])
    assert torch.allclose(net(x, t, r, y), one, atol=1e-12)


def test_clock_is_exact_under_autocast():
    net, (x, t, r, y) = tiny().float(), batch()
    x, t = x.float(), torch.tensor([0.5, 0.501, 0.5015])                      # one number in bf16
    with torch.autocast("cpu", torch.bfloat16):
        low, u = net.t_embedder(t), net(x, t, t, y)
        dudt = torch.func.jvp(lambda x, t: net(x, t, r.float(), y), (x, t), (x, torch.ones_like(t)))[1]
    assert low.dtype == torch.float32 and torch.equal(low, net.t_embedder(t))
    assert u.dtype == torch.float32 and close(u, net(x, t, t, y), 0.05) and not torch.equal(u, net(x, t, t, y))
    assert torch.isfinite(dudt).all()


@pytest.mark.parametrize("make", ["dit", "mmdit"])
def test_projector_teaches_the_first_blocks_only(make):
    torch.manual_seed(0)
    x, t, r, y = batch()
    if make == "dit":
        net, args = tiny(repa_dim=6, repa_depth=2, projector_dim=8), (x, t, r, y)
    else:
        net = nets.MMDiT(4, 2, 4, 3, context_dim=6, repa_dim=6, repa_depth=2, projector_dim=8).double()
        args = x, t, torch.randn(3, 5, 6).double()
    u, z = net(*args)
    assert z.shape == (3, 4, 6) and torch.equal(net(*args, repa=False), u)
    z.square().sum().backward()
    blocks = net.blocks if make == "dit" else [b.x_block for b in net.joint_blocks]
    assert [b.mlp.fc2.weight.grad is not None for b in blocks] == [True, True, False]
    assert net.final_layer.linear.weight.grad is None
    with pytest.raises(ValueError, match="repa_depth=4"):
        nets.DiT(4, 2, 4, 16, 3, 2, repa_dim=6, repa_depth=4)


# ---- conversion ----------------------------------------------------------------------------------
def official_sit(**kwargs):
    """An official SiT: time runs from noise to data, twice the output channels, the last ones of no use."""
    net = tiny(average_velocity=False, **kwargs)
    net.final_layer["linear"] = torch.nn.Linear(16, 4 * 8).double()
    return net


@pytest.mark.parametrize("two", [True, False])
def test_an_official_sit_becomes_ours_exactly(two):
    x, t, r, y = batch()
    teacher, net = official_sit(), tiny(7, average_velocity=two)
    nets.load_flow(net, teacher.state_dict(), "sit.pt")
    v = -teacher(x, 1 - t, y=y)[:, :4]                                        # our clock, our sign
    assert (net(x, t, t, y) - v).abs().max() < 1e-12 and torch.equal(net(x, t, r, y), net(x, t, t, y))
    flipped = nets.turned(nets.turned(teacher.state_dict(), 4) | {"final_layer.linear.weight": torch.zeros(32, 16),
                          "final_layer.linear.bias": torch.zeros(32)}, 4)     # turned twice = not turned
    assert torch.allclose(flipped["t_embedder.mlp.0.weight"], teacher.t_embedder.mlp[0].weight)


def test_single_precision_weights_are_turned_in_double():
    x, t, r, y = batch()
    teacher, net = official_sit().float(), tiny(7).float()
    nets.load_flow(net, teacher.state_dict(), "sit.pt")
    x, t = x.float(), t.float()
    assert close(net(x, t, t, y), -teacher(x, 1 - t, y=y)[:, :4], 1e-5)


def test_second_clock_starts_at_zero_and_learns():
    x, t, r, y = batch()
    net = nets.DiT(4, 2, 4, 16, 3, 2, num_classes=5).double()
    nets.load_flow(net, official_sit().state_dict(), "sit.pt")
    optimizer = torch.optim.SGD(net.r_embedder.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (net(x, t, r, y) - x).square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in net.r_embedder.parameters())


@pytest.mark.parametrize("name", ["r_embedder", "h_embedder"])
def test_mean_flow_files_of_both_names(name):
    source, net = tiny(), tiny(7)
    nets.load_flow(net, {k.replace("r_embedder", name): v for k, v in source.state_dict().items()}, "mf.pt")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), source.state_dict().values()))


def test_repa_file_keeps_its_clock_and_the_projector_follows_the_net():
    x, t, r, y = batch()
    repa = dict(repa_dim=6, repa_depth=1, projector_dim=8)
    teacher = tiny(average_velocity=False, **repa)
    plain, both = tiny(7), tiny(7, **repa)
    nets.load_flow(plain, teacher.state_dict(), "repa.pt")
    nets.load_flow(both, teacher.state_dict(), "repa.pt")
    u, z = teacher(x, t, y=y)
    assert torch.equal(plain(x, t, r, y), u) and torch.equal(both(x, t, r, y)[1], z)
    kept = both.projectors[0][0].weight.clone()
    nets.load_flow(both, plain.state_dict(), "mf.pt")
    assert torch.equal(both.projectors[0][0].weight, kept)


def test_mm_dit_of_sit_becomes_mean_flow():
    torch.manual_seed(0)
    kwargs = dict(depth=2, context_dim=6, repa_dim=6, repa_depth=1, projector_dim=8)
    teacher, net = nets.MMDiT(4, 2, 4, **kwargs), nets.MMDiT(4, 2, 4, **kwargs, average_velocity=True)
    state = {k: v for k, v in teacher.state_dict().items() if k != "pos_embed"}          # an EMA of parameters only
    nets.load_flow(net, state, "t2i.pt")
    x, t, context = torch.randn(3, 4, 4, 4), torch.rand(3), torch.randn(3, 5, 6)
    for a, b in zip(net(x, t, context, t / 2), teacher(x, t, context)):
        assert torch.equal(a, b)


def broken(**changes):
    state = dict(official_sit().state_dict())
    return {k: v for k, v in (state | changes).items() if v is not None}


@pytest.mark.parametrize("state, says", [
    ({"model.map_noise.weight": torch.zeros(3)}, "41 missing: x_embedder.proj.weight, .*; 1 unexpected: model"),
    (broken(**{"blocks.1.attn.q_norm.weight": torch.zeros(8)}), "1 unexpected: blocks.1.attn.q_norm.weight"),
    (broken(**{"final_layer.linear.bias": None}), "1 missing: final_layer.linear.bias"),
    (broken(**{"y_embedder.embedding_table.weight": torch.zeros(1001, 16)}), r"table.weight \(1001, 16\) in the file"),
    (broken(**{f"r_embedder.mlp.{k}": torch.zeros(16, 256) for k in ("0.weight",)}), r"linear.weight \(32, 16\)")])
def test_another_format_is_one_clear_line(state, says):
    net = tiny()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=says) as e:
        nets.load_flow(net, state, "other.pt")
    assert str(e.value).startswith("other.pt does not fit the network: ") and "\n" not in str(e.value)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
