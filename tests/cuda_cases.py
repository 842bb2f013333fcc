"""The scripts on a real GPU: CMT_CUDA=1 python -m pytest tests/cuda_cases.py. Minutes, not part of the suite.

What gpu_cases.py says of devices, dtypes and waits without a GPU is checked here by CUDA itself; numbers are the CPU's.
"""
import copy
import functools
import importlib
import os
import socket
import subprocess
import sys
import warnings

import nets
import pytest
import torch
from conftest import weights
from gpu_cases import CIFAR, IMAGENET, MF, ROADS, ROOT, T2I, VARIANTS, start

pytestmark = [pytest.mark.usefixtures("here"), pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or no CMT_CUDA=1")]
SMALL = [(nets.EDMPrecond, "ddpm++-8", dict(img_resolution=8, img_channels=1)),
         (nets.EDM2Precond, "edm2-8", dict(img_resolution=8, img_channels=1, label_dim=10)),
         (nets.DiT, "dit-b/4", dict(input_size=8, patch_size=2, in_channels=4, hidden_size=64, depth=2, num_heads=2, num_classes=10))]


def drive(monkeypatch, script, flags):
    """Runs script.main; {stage: the places where its second step waited}, as CUDA's own debug mode saw them."""
    waits, count, report = {}, script.count, script.report
    with warnings.catch_warnings(record=True, action="always") as seen:
        def counted(cfg, *args):
            places = [f"{os.path.basename(w.filename)}:{w.lineno}" for w in seen if "synchronizing CUDA" in str(w.message)]
            waits.setdefault(cfg.stage, []).append(places)
            seen.clear()
            return count(cfg, *args)

        def reported(*args, **kwargs):                # a first step has a line of the log: what that took is not the second's
            seen.clear()
            return report(*args, **kwargs)
        monkeypatch.setattr(script, "count", counted)
        monkeypatch.setattr(script, "report", reported)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            script.main(flags.split())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {stage: steps[1] for stage, steps in waits.items()}


def one_wait(script, waits):
    """A step waits once, in total()."""
    text = (ROOT / f"{script.__name__}.py").read_text().splitlines()
    for places in waits.values():
        lines = [text[int(place.split(":")[1]) - 1] for place in places if place.startswith(script.__name__)]
        assert len(places) == len(lines) == 1 and lines[0].strip().startswith("return torch.stack([grad.norm()"), waits


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """f(name): a folder in which a script has run from its first stage to its score, and its waits."""
    @functools.cache
    def whole(name):
        out = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            return out, drive(patch, importlib.import_module(name), f"{ROADS[name]} --out {out}")
    return whole


@pytest.mark.parametrize("name", ROADS)
def test_the_whole_road(road, name):
    out, waits = road(name)
    one_wait(importlib.import_module(name), waits)
    assert set(waits) >= {"pretrain", "mid", "post"} and (out / "results.md").exists()
    assert all(weights(out / f"{stage}.pt").isfinite().all() for stage in ("pretrain", "mid", "post"))


@pytest.mark.parametrize("name, stage, flags", VARIANTS)
def test_every_method_and_precision(road, name, stage, flags, monkeypatch, tmp_path):
    script = importlib.import_module(name)
    flags = start(road, name, stage, tmp_path) + flags.replace("TEACHER", f"{tmp_path}/pretrain.pt")
    if "--mid none" in flags:
        (tmp_path / "mid.pt").unlink()                # no folder of a road without
    one_wait(script, drive(monkeypatch, script, flags))
    assert weights(tmp_path / f"{stage}.pt").isfinite().all()


@pytest.mark.parametrize("name, stage", [(CIFAR, "mid"), (CIFAR, "post"), (IMAGENET, "mid"), (IMAGENET, "post"), (MF, "mid"),
                                         (MF, "post"), (T2I, "mid"), (T2I, "post")])
def test_compiled(road, name, stage, monkeypatch, tmp_path):
    """The same weights as without --compile, to rounding; nothing is compiled after the second step."""
    script, flags, graphs, found = importlib.import_module(name), start(road, name, stage, tmp_path), [], []
    stats, count = torch._dynamo.utils.counters["stats"], script.count
    torch._dynamo.reset()
    monkeypatch.setattr(script, "count", lambda *args: graphs.append(stats["unique_graphs"]) or count(*args))
    for more in ("", " --compile"):
        script.main(f"{flags} --steps 5{more}".split())
        found.append(weights(tmp_path / f"{stage}.pt"))
        (tmp_path / f"{stage}.pt").unlink()
    assert graphs[-1] == graphs[-4] > 0, graphs
    assert (found[0] - found[1]).norm() / found[0].norm() < 1e-3


@pytest.mark.parametrize("name", ROADS)
def test_a_stopped_run_goes_on(road, name, monkeypatch, tmp_path):
    """Stopped after two of four steps and run again: the weights of a run that was not stopped, to a GPU's rounding."""
    script, found = importlib.import_module(name), []
    count = script.count
    for stops in (False, True):
        (out := tmp_path / str(stops)).mkdir()
        argv = (start(road, name, "mid", out) + "--steps 4").split()
        if stops:
            steps = []
            monkeypatch.setattr(script, "count", lambda cfg, tally, *args: count(cfg, tally, *args) or steps.append(0) or
                                len(steps) == 1 and script.STOP.append(15))
            with pytest.raises(SystemExit) as e:
                script.main(argv)
            assert e.value.code == 75 and torch.load(out / "mid.pt", weights_only=True)["step"] == 2
            monkeypatch.setattr(script, "count", count)
            script.STOP.clear()
        script.main(argv)
        found.append(weights(out / "mid.pt"))
    assert (found[0] - found[1]).norm() / found[0].norm() < 1e-4


TWO = """
import sys, torch, torch.distributed as dist
init = dist.init_process_group
dist.init_process_group = lambda backend, **more: init("gloo", **more)       # NCCL refuses two processes on one GPU
import {name} as script
script.main(sys.argv[1:])
"""


@pytest.mark.parametrize("name", ROADS)
def test_two_processes_train_as_one(road, name, tmp_path):
    found = []
    for world in (1, 2):
        (out := tmp_path / str(world)).mkdir()
        argv = (start(road, name, "mid", out) + "--steps 3").split()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = dict(os.environ, LOCAL_RANK="0", WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        runs = [subprocess.Popen([sys.executable, "-c", TWO.format(name=name), *argv], env=dict(env, RANK=str(k)), cwd=ROOT,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for k in range(world)]
        output = [run.communicate(timeout=100)[0] for run in runs]
        assert not any(run.returncode for run in runs), output
        found.append(weights(out / "mid.pt"))
    assert (found[0] - found[1]).norm() / found[0].norm() < 1e-4


@pytest.mark.parametrize("name", ROADS)
def test_out_of_memory_is_one_line(road, name, tmp_path, capsys):
    flags = start(road, name, "mid", tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-5 + torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1])
    try:
        with pytest.raises(SystemExit) as e:
            importlib.import_module(name).main(f"{flags} --batch 4096 --trajectories 4096".split())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = capsys.readouterr().err
    assert e.value.code == 1 and "--batch_gpu" in said and "Traceback" not in said, said


def arguments(kind, device, n=4):
    """Inputs of a net: images and noise levels, or latents, two times and classes."""
    g, y = torch.Generator().manual_seed(0), torch.arange(n)
    x, t, r = torch.randn(n, 4 if kind is nets.DiT else 1, 8, 8, generator=g), torch.linspace(0.5, 1, n), torch.linspace(0, 0.4, n)
    one_hot = torch.nn.functional.one_hot(y, 10).float()
    args = (x, t, r, y) if kind is nets.DiT else (x, t, one_hot) if kind is nets.EDM2Precond else (x, t)
    return [a.to(device) for a in args]


@pytest.mark.parametrize("kind, row, more", SMALL)
def test_nets_say_what_they_say_on_the_cpu(kind, row, more):
    """Outputs and gradients, fp32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    net = kind(**{**nets.SIZES.get(row, {}), **more}).eval()
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    found = []
    for device in ("cpu", "cuda"):
        copied = copy.deepcopy(net).to(device)
        out = copied(*arguments(kind, device))
        out.square().mean().backward()
        found.append(torch.cat([out.detach().flatten().cpu(), *(p.grad.flatten().cpu() for p in copied.parameters() if
                                                                 p.grad is not None)]))
    assert (found[0] - found[1]).norm() / found[0].norm() < 1e-5


@pytest.mark.parametrize("precision, most", [("fp32", 1e-5), ("tf32", 3e-3), ("bf16", 3e-2)])
def test_the_product_is_the_derivative(precision, most):
    """nets.derivative on the GPU against float64 on the CPU: fused attention has no forward derivative, this has."""
    torch.manual_seed(0)
    net = nets.DiT(**SMALL[2][2]).eval().requires_grad_(False)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    z, t, r, y = arguments(nets.DiT, "cpu")
    exact = copy.deepcopy(net).double()
    _, true = torch.func.jvp(lambda z, t: exact(z, t, r.double(), y), (z.double(), t.double()),
                             (z.double(), torch.ones_like(t).double()))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        copied = copy.deepcopy(net).cuda()
        found = nets.derivative(copied, *(a.cuda() for a in (z, t, r, y)), z.cuda())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    assert (found.double().cpu() - true).norm() / true.norm() < most
