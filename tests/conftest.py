"""One thread, so that results do not depend on the machine; the repository on the path; what the script tests share."""
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import traceback
import types
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.environ.get("CMT_CUDA"):                     # the suite is the CPU's, also where there is a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

import fid  # noqa: E402
import nets  # noqa: E402
import train_cmt_cifar as script  # noqa: E402
import train_cmt_imagenet  # noqa: E402

torch.set_num_threads(1)
SHIPPED = {size: dict(nets.SIZES[size]) for size in ("ddpm++-8", "edm2-8")}
for size in SHIPPED:                                   # narrow nets: what is tested is what scripts do, not what they reach
    nets.SIZES[size]["model_channels"] = 16
nets.SIZES["ddpm++-8"]["channel_mult"] = (1,)
draw_seeds, save_curve, WIDE = fid.draw_seeds, fid.save_curve, fid.WIDE
TINY = "--data digits --samples 16 --trajectories 4 --nfe 4 --batch 16 --log_every 1".split()


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="the fault tests at full length, and the soak")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: only with --long")


BESIDE = {"gpu": ["gpu_cases.py"], "files": ["test_mf.py", "test_load_pretrained.py", "test_encoders.py", "test_t2i.py", "test_imagenet.py", "test_bench.py"]}


def pytest_collection_modifyitems(config, items):
    """The whole suite keeps two cores busy: it leaves BESIDE to processes of their own, and waits for them last."""
    items.sort(key=lambda item: item.path.name == "test_beside.py")
    if items and items[-1].path.name == "test_beside.py":
        left = [item for item in items if item.path.name in BESIDE["files"]]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]
    for item in items:
        if "long" in item.keywords and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="--long runs it"))


@pytest.fixture(scope="session", autouse=True)
def beside(request):
    """The processes of BESIDE, started before the other tests, if test_beside.py is among them."""
    if all(item.path.name != "test_beside.py" for item in request.session.items):
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return {name: subprocess.Popen([*command, *(str(ROOT / "tests" / file) for file in files)], text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for name, files in BESIDE.items()}


@pytest.fixture
def environment():
    """As it was: a dry run leaves CMT_OFFLINE behind."""
    before = {*os.environ}
    yield
    for name in {*os.environ} - before:
        del os.environ[name]


@pytest.fixture(autouse=True)
def no_run(environment, monkeypatch):
    """No run before has left its folder: lines about files go to stderr, and to no log. Previews are of two noises.

    Curves, a fifth of a second each, are drawn by the roads of a few steps alone, which are made before this. Sheets are
    as narrow as their words allow: a wide one takes a twentieth of a second, and there are hundreds.
    """
    monkeypatch.setattr(fid, "WIDE", 900)
    monkeypatch.setattr(fid, "save_curve", lambda cfg, table=(): None)
    monkeypatch.setattr(fid, "OUT", "")
    monkeypatch.setattr(fid, "KEEP", True)
    monkeypatch.setattr(fid, "draw_seeds", lambda sampler, seeds, batch=64, seconds=math.inf:
                        draw_seeds(sampler, seeds if seconds == math.inf else seeds[:2], batch))
    fid.SAID.clear()
    nets.tell.cache_clear()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, offline, with signals as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CMT_CACHE", str(tmp_path / "cache"))
    for module in (script, train_cmt_imagenet):
        monkeypatch.setattr(module, "STOP", [])
    before = {s: signal.getsignal(s) for s in script.SIGNALS}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.fixture(scope="session")
def road(tmp_path_factory):
    """One whole run of a few steps: pretrain, vgg, mid, post, eval."""
    out = tmp_path_factory.mktemp("road")
    script.main([*TINY, "--out", str(out), "--steps", "3"])
    return out


def with_alone(road):
    """./x, a copy of a run whose last net stands in its folder alone/ too, as if it had had no mid-training."""
    shutil.copytree(road, "x")
    os.mkdir("x/alone")
    shutil.copy("x/post.pt", "x/alone")


def forked(text, monkeypatch):
    """A fork of this text, as a module; its file is ./fork.py."""
    Path("fork.py").write_text(text)
    spec = importlib.util.spec_from_file_location("fork", "fork.py")
    monkeypatch.setitem(sys.modules, "fork", fork := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(fork)
    return fork


def alone_is_shown(script, road, tiny):
    """What is drawn and scored are these candidates; a whole evaluation: tests/test_train.py."""
    with_alone(road)
    *_, (_, post, *_), (name, alone, *_) = found = script.candidates(script.parse([*tiny, "--out", "x", "--steps", "3", "--stage", "eval"]))
    assert [name for name, *_ in found][-3:] == ["mid", "post", "alone"] and name == "alone"
    assert all(torch.equal(a, b) for a, b in zip(post.parameters(), alone.parameters()))


class Pretrained(torch.nn.Module):
    """Stands in for a class of diffusers or transformers; its weight follows from a file in its folder, or from its name."""
    config = types.SimpleNamespace()

    def __init__(self, name="stub"):
        super().__init__()
        file = Path(name, "weight.txt")
        text = file.read_text() if file.exists() else file.parent.name
        self.register_buffer("weight", torch.tensor([zlib.crc32(text.encode()) % 1000.0]))

    @classmethod
    def from_pretrained(cls, name, local_files_only=False, output_loading_info=False):
        return (cls(name), dict(missing_keys=[], mismatched_keys=[])) if output_loading_info else cls(name)


def frozen_calls(script, monkeypatch):
    """The set of precisions in which the nets that script builds to be frozen are called from now on."""
    seen, build = set(), script.build

    def watched(*args, train=False, **more):
        net = build(*args, train=train, **more)
        if not train:
            net.register_forward_pre_hook(
                lambda *_: seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None))
        return net
    monkeypatch.setattr(script, "build", watched)
    return seen


def code(argv, capsys, main=script.main):
    """Exit code and stderr of a command line."""
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in argv])
    return e.value.code, capsys.readouterr().err


def fork(argv, log, rank=None, world=1, port=0, patch=lambda: None, main=script.main):
    """Process id of a copy of this process that runs a command line; its output goes to the file `log`.

    A copy starts at once, where a new Python imports torch for seconds; patch() runs in it first.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        if rank is not None:
            os.environ |= dict(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                               MASTER_PORT=str(port))
        patch()
        main([str(a) for a in argv])
        status = 0
    except SystemExit as e:
        status = e.code
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def wait(pid):
    """Exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def weights(path):
    """All numbers of a checkpoint that training depends on, as one vector."""
    c = torch.load(path, weights_only=True)
    opt = [v.float().reshape(-1) for s in c["opt"]["state"].values() for v in s.values()]
    return torch.cat([v.float().reshape(-1) for k in ("net", "ema") for v in c[k].values()] + opt)
