"""The scripts' real main() on a GPU without data: devices, dtypes, and one wait a training step."""
import functools
import importlib
import json
import shutil
import sys
import types
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bench import FakeGPU, FakeTensor
from conftest import nets
from PIL import Image
from torch.utils._pytree import tree_map

pytestmark = [pytest.mark.usefixtures("here"),
              pytest.mark.filterwarnings("ignore:Accessing the data pointer", "ignore:.torch.jit.script")]
ROOT = Path(__file__).parent.parent
nets.SIZES["ddpm++-8"]["channel_mult"] = (1, 1)        # both resolutions: the filters, too, must be on the device
TINY = "--data digits --steps 2 --samples 2 --batch 8 --nfe 2 --trajectories 4"
CIFAR, IMAGENET = "train_cmt_cifar", "train_cmt_imagenet"
MF = "train_mf_imagenet256"
T2I = "train_t2i_coco"
FLOW = "--trajectories 8 --nodes 2 --omega 0.5 --kappa 0.3"
# nets of fewer blocks than those of digits: a call on this device costs as much, however wide
ROADS = {CIFAR: TINY, IMAGENET: f"{TINY} --vgg.steps 2", MF: f"{TINY} {FLOW} --weak 4x32x1 --size 4x64x1", T2I: f"{TINY} {FLOW} --size 4x1"}
ORDER = ["pretrain", "vgg", "mid", "post"]
VARIANTS = [
    (CIFAR, "pretrain", "--precision fp16 --batch_gpu 2 --dropout 0.13"),
    (CIFAR, "mid", "--precision bf16 --batch_gpu 2 --dropout 0.2 --mid kd --loss l2"),
    (CIFAR, "mid", "--precision fp16 --mid slow"),
    (CIFAR, "post", "--precision bf16 --dropout 0.2 --post ecd"),
    (CIFAR, "post", "--precision tf32 --post ecd_euler --mid none"),
    (CIFAR, "post", "--precision fp16 --batch_gpu 2 --post annealed"),
    (IMAGENET, "pretrain", "--precision bf16 --dropout 0.1"),
    (IMAGENET, "mid", "--precision bf16 --batch_gpu 2 --dropout 0.2"),
    (IMAGENET, "mid", "--precision fp16 --loss huber"),
    (IMAGENET, "post", "--precision fp16 --dropout 0.2 --post ecd --guide TEACHER --w 1.5"),
    (IMAGENET, "post", "--precision tf32 --batch_gpu 2 --post ecd_euler --mid none"),
    (MF, "pretrain", "--precision fp16 --batch_gpu 2 --pretrain fm"),
    (MF, "mid", "--precision bf16 --batch_gpu 2"),
    (MF, "post", "--precision bf16 --batch_gpu 2"),
    (MF, "post", "--precision tf32 --post vanilla --mid none --init teacher --size 4x32x1 --unguided 1"),
    (T2I, "pretrain", "--precision bf16 --pretrain plain --clip 1"),
    (T2I, "mid", "--precision fp16 --batch_gpu 2"),
    (T2I, "post", "--precision bf16 --batch_gpu 2 --post xl --clip 1"),
    (T2I, "post", "--precision tf32 --post vanilla --mid none --repa 0 --guide_from 0.3"),
]
BF16 = "pretrain --precision bf16"
PLANTS = [  # script, stage, file, what stands there, the fault in its place, what is said of it
    (CIFAR, "pretrain", CIFAR, "images = images.to(DEVICE)", "pass", "aten.index"),
    (CIFAR, "pretrain", CIFAR, "loss.detach() * part", "loss.detach() * loss.item()", "train: item"),
    (CIFAR, "pretrain", CIFAR, "torch.full_like(loss, len(STOP))", "torch.tensor(0.0, device=loss.device)", "total: to gpu, blocking"),
    (CIFAR, "pretrain", "solvers", "(shape, generator=g, device=g.device)", "(shape)", "'cpu'"),
    (CIFAR, "pretrain", CIFAR, "(DEVICE).manual_seed(fold(cfg.seed, cfg.stage, step))", "().manual_seed(0)", "'cpu'"),
    (IMAGENET, "pretrain", IMAGENET, "labels.to(DEVICE, non_blocking=True)", "labels", "'cpu'"),
    (IMAGENET, BF16, "nets", "else self.hoisted).to(x.dtype)", "else self.hoisted)", "bfloat16.*float32"),
    (IMAGENET, BF16, "nets", "self.emb_gain) + 1).to(y.dtype)", "self.emb_gain) + 1)", "bfloat16.*float32"),
    (IMAGENET, "post", IMAGENET, "if huber_c:", "d = d[d > 0]\n    if huber_c:", "loss_ect: mask"),
    (MF, "pretrain", MF, "a.pin_memory()", "a", "to_float: to gpu, not pinned"),
    (MF, "pretrain", "fid", "finite.float())", "finite.bfloat16())", "aten.index_add_"),
    (MF, "pretrain", MF, ".to(z.dtype).split([len(", ".half().split([len(", "aten.index_put_"),
    (MF, "mid", MF, "r, y) - target)", "r, y) - target * torch.tensor([1.0], device=z.device))",
     "loss_cmt_mf: to gpu, blocking"),
    (T2I, "pretrain", T2I, "(loss * part).back", "loss > 0 and (loss * part).back", "train: item"),
    (T2I, "pretrain", T2I, "(a.to(DEVICE, non_blocking=True)", "(a.to(DEVICE)", "image_batch: to gpu, blocking"),
]


def drive(monkeypatch, script, flags, rank=0, world=1):
    """Runs script.main as one of `world` processes on a FakeGPU; {stage: the waits of its second step}."""
    gpu, waits, count, report, save = FakeGPU(), {}, script.count, script.report, script.nets.save_checkpoint

    def counted(cfg, *args):
        waits.setdefault(cfg.stage, []).append([*gpu.waits])
        gpu.waits.clear()
        return count(cfg, *args)

    def reported(*args, **kwargs):                    # a first step has a line of the log: what that took is not the second's
        gpu.waits.clear()
        return report(*args, **kwargs)

    def real(a):
        return torch.zeros(a.shape, dtype=a.dtype) if isinstance(a, FakeTensor) else a

    def nccl(tensor):
        assert isinstance(tensor, FakeTensor), "NCCL takes tensors on the GPU only"
    def saved(path, **state):
        held = {name: v.state_dict() if hasattr(v, "state_dict") else v for name, v in state.items()}
        save(path, **tree_map(real, held))
    monkeypatch.setattr(script.nets, "save_checkpoint", saved)
    mine = dict(RANK=rank, WORLD=world, DEVICE=gpu.device, launch=lambda cfg: None, count=counted, report=reported)
    mine["dist"] = types.SimpleNamespace(
        all_reduce=nccl, all_gather=lambda parts, x: nccl(x), all_gather_object=lambda seen, x, group: None,
        is_initialized=lambda: False)
    for name, value in mine.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script.fid, "dist", mine["dist"])
    monkeypatch.setattr(script.fid, "processes", lambda: (rank, world))
    with gpu:
        script.main(flags.split())
    return {stage: steps[1] for stage, steps in waits.items()}


def one_wait(waits):
    """A step waits once, for the numbers of total()."""
    if any(len(w) != 1 or not w[0].endswith(" total: to cpu") for w in waits.values()):
        raise AssertionError(waits)


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """f(name): a folder in which a script has run from its first stage to its score, and its waits."""
    @functools.cache
    def whole(name):
        out = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            return out, drive(patch, importlib.import_module(name), f"{ROADS[name]} --out {out}")
    return whole


def start(road, name, stage, out):
    """Flags of one stage, after what the stages before it left in the road."""
    for before in ORDER[:ORDER.index(stage.split()[0])]:
        if (file := road(name)[0] / f"{before}.pt").exists():
            shutil.copy(file, out)
    return f"{ROADS[name]} --out {out} --stage {stage} "


def planted(monkeypatch, folder, name, file, right, wrong):
    """A copy of the script whose source, or that of its nets, has a fault."""
    text = (ROOT / f"{file}.py").read_text()
    assert right in text
    (folder / f"{file}.py").write_text(text.replace(right, wrong, 1))
    (folder / "assets").symlink_to(ROOT / "assets")
    for module in dict.fromkeys((file, name)):
        path = folder if module == file else ROOT
        spec = spec_from_file_location(module, path / f"{module}.py")
        monkeypatch.setitem(sys.modules, module, module_from_spec(spec))
        spec.loader.exec_module(sys.modules[module])
    return sys.modules[name]


@pytest.mark.parametrize("name", ROADS)
def test_the_whole_road(road, name):
    out, waits = road(name)
    one_wait(waits)
    assert set(waits) >= {"pretrain", "mid", "post"} and (out / "results.md").exists()


@pytest.mark.parametrize("name, stage, flags", VARIANTS)
def test_second_of_two_processes(road, name, stage, flags, monkeypatch, tmp_path):
    flags = start(road, name, stage, tmp_path) + flags.replace("TEACHER", f"{tmp_path}/pretrain.pt")
    if "--mid none" in flags:
        (tmp_path / "mid.pt").unlink()                # no folder of a road without
    one_wait(drive(monkeypatch, importlib.import_module(name), flags, rank=1, world=2))


@pytest.mark.parametrize("name, stage, file, right, wrong, says", PLANTS)
def test_planted_faults_are_caught(road, name, stage, file, right, wrong, says, monkeypatch, tmp_path):
    script = planted(monkeypatch, tmp_path, name, file, right, wrong)
    with pytest.raises((RuntimeError, AssertionError), match=says):
        one_wait(drive(monkeypatch, script, start(road, name, stage, tmp_path)))


class Encoder(torch.nn.Module):
    """Stands in for the SD-VAE, DINOv2, and CLIP's tokenizer and tower."""
    config = types.SimpleNamespace(vocab_size=2)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    @classmethod
    def from_pretrained(cls, name, local_files_only=False, output_loading_info=False):
        return (cls(), dict(missing_keys=[], mismatched_keys=[])) if output_loading_info else cls()

    def __len__(self):
        return 2

    def encode(self, x):
        mean = F.avg_pool2d((x * self.weight).mean(1, keepdim=True), 8).expand(-1, 4, -1, -1)
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mean=mean, std=mean.abs()))

    def decode(self, z):
        return types.SimpleNamespace(sample=F.interpolate(z[:, :3] * self.weight, scale_factor=8))

    def forward(self, x=None, input_ids=None, **kwargs):
        if isinstance(x, list):
            return types.SimpleNamespace(input_ids=torch.zeros(len(x), 77, dtype=torch.long))
        if x is None:
            return types.SimpleNamespace(last_hidden_state=input_ids[..., None] * self.weight)
        x = F.adaptive_avg_pool2d(x, 4).flatten(2).transpose(1, 2) * self.weight
        return types.SimpleNamespace(last_hidden_state=torch.cat([x[:, :1], x], 1))


def coco(folder):
    """A tiny COCO; without its annotations, a folder of two classes."""
    (folder / "annotations").mkdir(parents=True)
    for part in ("train2014", "val2014"):
        (folder / part).mkdir()
        for k in range(2):
            Image.new("RGB", (260, 270)).save(folder / part / f"{k}.png")
        notes = dict(images=[dict(id=k, file_name=f"{k}.png") for k in range(2)],
                     annotations=[dict(image_id=k, caption="a") for k in range(2)])
        (folder / f"annotations/captions_{part}.json").write_text(json.dumps(notes))


@pytest.mark.parametrize("name, flags", [
    (IMAGENET, "--res 512 --loss elatent --ensemble bgcfnc --post ecd"),
    (MF, f"{FLOW} --weak 8x32x1 --size 8x32x1"), (T2I, f"{FLOW} --size 8x1 --prompts a")])
def test_latents(name, flags, monkeypatch, tmp_path):
    """From pictures to latents, through the stages, to a sample."""
    coco(tmp_path / "coco")
    if name != T2I:
        shutil.rmtree(tmp_path / "coco/annotations")
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=Encoder))
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(
        CLIPTextModel=type("Text", (Encoder,), dict(config=types.SimpleNamespace(model_type="clip", vocab_size=2))),
        CLIPTokenizer=Encoder,
        Dinov2Model=type("Vision", (Encoder,), dict(config=types.SimpleNamespace(model_type="dinov2")))))
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "load_vae", functools.cache(script.nets.sd_vae))
    monkeypatch.setattr(script.fid, "load_inception", lambda: script.fid.InceptionV3())
    monkeypatch.setitem(script.nets.SIZES, "edm2-xl", dict(script.nets.SIZES["edm2-8"], attn_resolutions=()))
    monkeypatch.setattr(script, "make_distance", lambda cfg: script.new_vgg(cfg, 0), raising=False)
    flags = f"{TINY} --data {tmp_path}/lat.zip --out {tmp_path} {flags}"
    for stage in (f"encode --source {tmp_path}/coco", "pretrain", "mid", "post", "sample --seeds 0"):
        one_wait(drive(monkeypatch, script, f"{flags} --stage {stage}"))


def test_lpips(monkeypatch, tmp_path):
    script = importlib.import_module(CIFAR)
    model, lpips = script.nets.SIZES["ddpm++-16"], script.nets.LPIPS
    state = script.nets.EDMPrecond(**model).state_dict()
    monkeypatch.setattr(script, "teacher_state", lambda cfg: (state, model))
    monkeypatch.setattr(script.nets, "pretrained_lpips", lambda: lpips(None))
    flags = f"{TINY} --data own.npz --stage mid --loss lpips --precision bf16 --out {tmp_path}"
    one_wait(drive(monkeypatch, script, flags, rank=1, world=2))


@pytest.mark.parametrize("code, waits", [
    ("x * 2 + torch.tensor(2.0)", ""), ("torch.where(x > 0, x, 0.0)", ""), ("x[i] + x[0]", ""),
    ("cpu[None].pin_memory()[:1].to(x.device, non_blocking=True)", ""),
    ("cpu.to(x.device, non_blocking=True)", ""),
    ("cpu[None].to(x.device, non_blocking=True)", "to gpu, not pinned"),
    ("cpu.pin_memory().to(x.device)", "to gpu, blocking"), ("x.copy_(cpu)", "to gpu, blocking"),
    ("torch.tensor([1.0], device=x.device)", "to gpu, blocking"), ("x[cpu.long()]", "index from the cpu"),
    ("x[:1].fill_(2.0)", ""), ("x.__setitem__(0, 2.0)", "number to gpu"), ("x.__setitem__(i[:1], 2.0)", "number to gpu"),
    ("x.cpu()", "to cpu"), ("x.tolist()", "to cpu"), ("x.nonzero()", "nonzero"), ("x[x > 0]", "mask"),
    ("float(x.sum())", "item"), ("x[: i[0]]", "item"), ("x if x.isfinite().all() else 0", "item")])
def test_where_the_host_waits(code, waits):
    with FakeGPU() as gpu:
        cpu, x, i = torch.ones(4), torch.ones(4, device="gpu"), torch.arange(4, device="gpu")
        eval(code, dict(cpu=cpu, x=x, i=i, torch=torch))
    assert [w.split(": ")[1] for w in gpu.waits] == [waits] * bool(waits), gpu.waits


@pytest.mark.parametrize("code", [
    "x + cpu", "cpu[i]", "torch.stack([x[0], cpu[0]])", "x[None] @ x[:, None].half()", "x.lerp_(x.half(), 1)",
    "torch.randn(4, generator=torch.Generator(), device=x.device)",
    "torch.randn(4, generator=torch.Generator(x.device))"])
def test_what_cuda_refuses(code):
    with FakeGPU(), pytest.raises(RuntimeError):
        cpu, x, i = torch.ones(4), torch.ones(4, device="gpu"), torch.arange(4, device="gpu")
        eval(code, dict(cpu=cpu, x=x, i=i, torch=torch))


def test_autocast_follows_the_rules_of_cuda():
    with FakeGPU(), torch.autocast("gpu", torch.bfloat16):
        x, low = torch.ones(4, 4, device="gpu"), torch.ones(4, 4, device="gpu", dtype=torch.bfloat16)
        assert {a.dtype for a in (x @ x, torch.nn.functional.linear(x, x), low * 2)} == {torch.bfloat16}
        assert {a.dtype for a in (low.exp(), low.softmax(1), low.sum(1), low**2)} == {torch.float32}
        assert (x.double() @ x.double()).dtype == torch.float64
