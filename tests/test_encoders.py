"""--stage encode of three scripts: what shards remember and refuse, by stubs; and the real classes of diffusers and transformers,
small, with random weights, where these packages import (otherwise skipped, and pytest says so)."""
import functools
import importlib
import io
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import types
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Pretrained, code, fork, wait
from PIL import Image, ImageOps

import fid
import nets

IMAGENET, MF, COCO = "train_cmt_imagenet", "train_mf_imagenet256", "train_t2i_coco"
LINES = {  # name of a case: script, flags, the file that says what was encoded
    "64": (IMAGENET, "--res 64 --data d.zip", "d.zip"), "512": (IMAGENET, "--res 512 --data d.zip", "d.zip"),
    "mf": (MF, "--data ./d", "d/index.json"), "coco": (COCO, "--data ./d", "d/index.json")}


@pytest.fixture(autouse=True)
def fresh(here, monkeypatch):
    for name in (IMAGENET, MF, COCO):
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "STOP", [])
        monkeypatch.setattr(module, "load_vae", functools.cache(nets.sd_vae))


# ---- what was encoded, by stubs ------------------------------------------------------------------
class Vae(Pretrained):
    """Moments of an image: its small picture, and its weight as deviation."""

    def encode(self, x):
        assert x.is_contiguous()
        mean = F.avg_pool2d(x, 8)[:, [0, 1, 2, 0]]
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mean=mean, std=0 * mean + self.weight / 1000))


class Text(Pretrained):
    config = types.SimpleNamespace(model_type="clip", vocab_size=9)

    def __call__(self, prompts, **_):
        return types.SimpleNamespace(input_ids=torch.tensor([[len(p)] * 77 for p in prompts]))

    def __len__(self):
        return 9


class Vision(Pretrained):
    config = types.SimpleNamespace(model_type="dinov2")

    def forward(self, x):
        return types.SimpleNamespace(last_hidden_state=F.avg_pool2d(x, 56).flatten(2).transpose(1, 2))


class Inception(torch.nn.Linear):
    dim, protocol = 3, "a stub"

    def __init__(self):
        super().__init__(1, 1)

    def forward(self, images):
        return images.float().mean((2, 3))


def picture(name, seed, size=(270, 300)):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(name, format="BMP")                  # all of one size in bytes


def captions(part, n):
    Path("src/annotations").mkdir(parents=True, exist_ok=True)
    notes = dict(images=[dict(id=i, file_name=f"{i}.bmp") for i in range(n)],
                 annotations=[dict(image_id=i, caption=f"{i} says {j}") for i in range(n) for j in range(2)])
    Path(f"src/annotations/captions_{part}.json").write_text(json.dumps(notes))


@pytest.fixture(params=LINES)
def case(request, monkeypatch):
    """f(flags): encode's exit code, 0 if it came to its end. Ten pictures in shards of four, in ./src."""
    name, flags, _ = LINES[request.param]
    script = importlib.import_module(name)
    for part in ("train2014", "val2014") if name == COCO else ("a", "b"):
        for i in range(10 if name == COCO else 5):
            picture(f"src/{part}/{i}.bmp", i + 100 * (part == "b"))
        if name == COCO:
            captions(part, 10)
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=Vae))
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(
        CLIPTextModel=Text, CLIPTokenizer=Text, Dinov2Model=Vision))
    monkeypatch.setattr(fid, "load_inception", lambda *a: Inception())
    monkeypatch.setattr(fid, "SHARD", 4)
    line = f"--stage encode --source src --out o {flags}".split()
    return types.SimpleNamespace(kind=request.param, script=script, line=line, coco=name == COCO, folder="a" if name != COCO else
                                 "train2014", main=lambda *more: script.main([*line, *more]))


def arrays(folder):
    """Every array in a folder of shards, by name."""
    return {p.name: np.load(p) for p in sorted(Path(folder).glob("*.npy"))}


def shards_of(case):
    return "d" if case.kind in ("mf", "coco") else "d.zip.parts"


CHANGES = {                                           # what happens to ./src: what the line says
    "a class more": r"1 pictures added, such as (c/0|train2014/10)\.bmp",
    "a picture more": r"1 pictures added, such as (a/9|train2014/10)\.bmp",
    "a picture less": r"1 pictures removed, such as (a/2|train2014/9)\.bmp",
    "a picture replaced, of equal size": r"1 pictures changed, such as (a|train2014)/1\.bmp"}


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_command_over_a_changed_source_is_refused(case, change, capsys):
    """With the difference, after the end and after a kill; nothing that was made is touched."""
    case.main()
    before, end = arrays(shards_of(case)), LINES[case.kind][2]
    if case.coco and "less" not in change and "equal" not in change:
        picture("src/train2014/10.bmp", 7), captions("train2014", 11)
    elif case.coco and "less" in change:
        os.remove("src/train2014/9.bmp"), captions("train2014", 9)
    elif "less" in change:
        os.remove("src/a/2.bmp")
    elif "equal" in change:
        picture(f"src/{case.folder}/1.bmp", 7)
    else:
        picture("src/c/0.bmp" if "class" in change else "src/a/9.bmp", 7)
    for killed in (False, True):
        if killed:
            os.remove(end)
            os.remove(next(Path(shards_of(case)).glob("*00001.npy")))
        capsys.readouterr()
        exit_code, err = code(case.line, capsys, case.script.main)
        line = [text for text in err.strip().splitlines() if "classes of" not in text]
        assert exit_code == 2 and len(line) == 1 and re.search(CHANGES[change], line[0]) and "name another --data" in line[0], err
    left = arrays(shards_of(case))
    assert all(np.array_equal(left[name], before[name]) for name in left) and not os.path.exists(end)


def test_other_labels_and_captions_are_refused(case, capsys):
    case.main()
    if case.coco:
        text = Path("src/annotations/captions_val2014.json").read_text()
        Path("src/annotations/captions_val2014.json").write_text(text.replace("3 says", "3 means"))
    else:
        names = [f"{part}/{i}.bmp" for part in "ab" for i in range(5)]
        Path("src/dataset.json").write_text(json.dumps({"labels": [[name, i % 2] for i, name in enumerate(names)]}))
    exit_code, err = code(case.line, capsys, case.script.main)
    assert exit_code == 2 and re.search("begun with other data: (labels|captions) was crc32 .{8}, now crc32", err)


def test_other_settings_are_refused(case, capsys):
    """Another precision, another VAE, another resolution; the same VAE in another folder is none."""
    os.makedirs("one/vae"), os.makedirs("two/vae"), os.makedirs("three")
    Path("three/weight.txt").write_text("another")
    flags = [] if case.kind == "64" else ["--vae", "one/vae/"]
    case.main(*flags)
    assert code([*case.line, *flags, "--precision", "bf16"], capsys, case.script.main)[0] == 2
    if case.kind == "64":
        exit_code, err = code([*case.line, "--res", "32"], capsys, case.script.main)
        assert exit_code == 2 and "crop was EDM2 64, now EDM2 32" in err
        return
    case.main("--vae", "two/vae")
    record = fid.made_of(LINES[case.kind][2] if "zip" in LINES[case.kind][2] else "d")
    assert re.fullmatch(rf"{os.getcwd()}/one/vae, crc32 .{{8}}", record["vae"]) and record["pictures"].startswith("10 images, crc32"
                                                                                   if not case.coco else "20 images, crc32")
    os.remove(LINES[case.kind][2])                    # killed
    exit_code, err = code([*case.line, "--vae", "three"], capsys, case.script.main)
    assert exit_code == 2 and re.search("vae was .*one/vae, crc32 .*, now .*three, crc32", err)


def test_a_kill_in_the_first_write_and_a_closed_pipe_cost_nothing(case, monkeypatch):
    """begun.json.tmp alone is no other's data; `| head -1` ends the output, not hours of work."""
    os.makedirs(shards_of(case))
    Path(shards_of(case), "begun.json.tmp").write_text("{")

    class Pipe(io.TextIOBase):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return os.dup(1)
    monkeypatch.setattr(sys, "stdout", Pipe())
    case.main()
    assert os.path.exists(LINES[case.kind][2])


CAPTIONS = {  # what is done to a COCO list: what the line says
    "an image without one": (lambda d: [d["annotations"].pop() for _ in "12"], "10 images, captions of 9 are text, not both: [9]"),
    "no text": (lambda d: d["annotations"][3].update(caption=None), "captions of 9 are text, not both: [1]"),
    "of no image": (lambda d: d["annotations"].append(dict(image_id=77, caption="")), "captions of 11 are text, not both: [77]"),
    "an image twice": (lambda d: d["images"].append(d["images"][0]), "11 images, captions of 10 are text"),
    "none": (lambda d: (d["images"].clear(), d["annotations"].clear()), "0 images")}


@pytest.mark.parametrize("what", CAPTIONS)
@pytest.mark.parametrize("case", ["coco"], indirect=True)
def test_captions_that_are_missing_or_no_text_are_refused_before_any_encoding(case, what, capsys):
    name = "src/annotations/captions_val2014.json"
    content = json.loads(Path(name).read_text())
    CAPTIONS[what][0](content)
    Path(name).write_text(json.dumps(content))
    exit_code, err = code(case.line, capsys, case.script.main)
    assert exit_code == 3 and f"{name}: " in err and CAPTIONS[what][1] in err and len(err.splitlines()) == 1
    assert not os.path.exists("d")


@pytest.mark.parametrize("case", ["64", "coco", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("512", "mf"))], indirect=True)
def test_a_killed_encode_goes_on_and_two_processes_give_what_one_gives(case, tmp_path):
    """No shard is left out, lost or made twice; who is done waits for the other, longer than the process group allows."""
    def slow():
        real = fid.write_whole

        def write(path, how):
            time.sleep(0.5)
            real(path, how)
        fid.write_whole = write

    def limping():
        """One process comes late to its list of shards and, in one case, needs longer for them than the other may wait."""
        fid.TIMEOUT = timedelta(seconds=3 if case.kind == "mf" else 60)
        real, group = fid.write_whole, fid.patient_group
        if os.environ["RANK"] == "1":
            fid.write_whole = lambda path, how: time.sleep(4 * (case.kind == "mf")) or real(path, how)
            fid.patient_group = lambda: (group(), time.sleep(0.5))[0]
    case.main("--data", "./whole" + ".zip" * ("zip" in LINES[case.kind][1]))
    whole = arrays("whole" + ".zip.parts" * ("zip" in LINES[case.kind][1]))
    pid = fork(case.line, "log", patch=slow, main=case.script.main)
    deadline = time.time() + 60
    while not list(Path(".").glob("d*/*00000.npy")) and time.time() < deadline:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL and not os.path.exists(LINES[case.kind][2])
    first = next(Path(".").glob("d*/*00000.npy"))
    made = first.stat().st_mtime_ns
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pids = [fork([*case.line, "--out", "p"], f"log{r}", r, 2, port, limping, case.script.main) for r in range(2)]
    assert [wait(p) for p in pids] == [0, 0], Path("log0").read_text() + Path("log1").read_text()
    both = arrays(shards_of(case))
    assert whole.keys() == both.keys() and all(np.array_equal(whole[name], both[name]) for name in whole)
    assert len(list(Path(shards_of(case)).glob("*0000*.npy"))) == (6 if case.coco else 3)
    assert first.stat().st_mtime_ns == made or case.coco                  # of COCO's two arrays one may have been missing
    assert os.path.exists(LINES[case.kind][2]) and "\nencode: " in Path("log0").read_text()


def test_what_cannot_be_encoded_is_said_before_the_first_picture(case, capsys, monkeypatch):
    """A damaged picture, by its name, before hours of work; a foreign folder; a full disk. Then it goes on."""
    broken = Path(f"src/{case.folder}/3.bmp")
    whole = broken.read_bytes()
    broken.write_bytes(whole[:99])
    exit_code, err = code(case.line, capsys, case.script.main)
    assert exit_code == 3 and re.search(rf"{case.folder}/3\.bmp: .*1 of {20 if case.coco else 10} pictures", err)
    assert not list(Path(shards_of(case)).iterdir())
    broken.write_bytes(whole)
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=10))
        exit_code, err = code(case.line, capsys, case.script.main)
        assert exit_code == 3 and "GB needed" in err and not list(Path(shards_of(case)).iterdir())
    real = np.save
    with monkeypatch.context() as m:
        def full(file, array):
            real(file, array[:1])
            raise OSError("7 requested and 3 written")
        m.setattr(np, "save", full)
        exit_code, err = code(case.line, capsys, case.script.main)
        assert exit_code == 3 and re.search(r"00000\.npy: cannot be written \(7 requested.*free some space and run again", err)
        assert [p.name for p in Path(shards_of(case)).iterdir()] == ["begun.json"]
    case.main()
    shutil.rmtree(shards_of(case), ignore_errors=True)
    if not os.path.exists("d.zip"):
        os.makedirs("d")
        Path("d/mine.txt").write_text("precious")
    exit_code, err = code(case.line, capsys, case.script.main)
    assert exit_code == 2 and ("d is not ours, it holds mine.txt" in err or "d.zip is there already" in err)


def test_stamps_follow_the_pictures_and_a_big_batch_is_its_own_flag(case, capsys, monkeypatch):
    """Two encodes of other pictures have two stamps, copies of the same one; out of memory names encode's --batch_gpu."""
    case.main()
    os.rename("src", "old"), shutil.copytree("old", "src")
    zipped = ".zip" * ("zip" in LINES[case.kind][1])
    case.main("--data", f"./copy{zipped}")
    picture(f"src/{case.folder}/1.bmp", 7)
    case.main("--data", f"./other{zipped}")
    made = [fid.made_of(f"{name}{zipped}") for name in ("d", "copy", "other")]
    with monkeypatch.context() as m:                       # every batch of samples asks: a file is read once
        m.setattr(fid.json, "loads", lambda *a, **k: pytest.fail("read again"))
        assert made == [fid.made_of(f"{name}{zipped}") for name in ("d", "copy", "other")]
    assert made[0] == made[1] and made[0]["pictures"] != made[2]["pictures"]
    if case.kind == "mf":
        d, copy, other = (case.script.Latents(name, "o").stamp for name in ("d", "copy", "other"))
        assert d == copy != other
    if case.kind != "64":
        def full(*_):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        monkeypatch.setattr(nets, "encode_moments", full)
        for flags, batch in (([], 8 if case.kind == "512" else 32), (["--batch_gpu", "3"], 3)):
            exit_code, err = code([*case.line, "--data", f"./{batch}{zipped}", *flags], capsys, case.script.main)
            assert exit_code == 1 and f"smaller than {batch}" in err


# ---- the loaders, by stubs -----------------------------------------------------------------------
@pytest.mark.parametrize("info, kind, says", [
    (dict(missing_keys=["a.weight"], mismatched_keys=[]), "dinov2", "lacks 1 weights .'a.weight'"),
    (dict(missing_keys=[], mismatched_keys=[("b", (1,), (2,))]), "dinov2", "lacks 1 weights"),
    (dict(missing_keys=[], mismatched_keys=[]), "dinov2_with_registers", "its kind is dinov2_with_registers")])
def test_half_a_model_and_another_one_are_refused(info, kind, says, monkeypatch):
    class Half(Vision):
        config = types.SimpleNamespace(model_type=kind)

        @classmethod
        def from_pretrained(cls, name, **_):
            return cls(name), info
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(Dinov2Model=Half))
    with pytest.raises(nets.WeightsError, match=f"facebook/dinov2-base: no whole Dinov2Model.*{says}"):
        nets.dinov2("", "cpu")


def test_a_tokenizer_without_its_vocabulary_is_refused(monkeypatch):
    class Empty(Text):
        def __len__(self):
            return 2
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(CLIPTextModel=Text, CLIPTokenizer=Empty))
    os.makedirs("clip")
    with pytest.raises(nets.WeightsError, match="clip: 2 tokens, not 9; are vocab.json and merges.txt there"):
        nets.CLIPText("clip", "cpu").ids(["a dog"])


def offline(*_, **__):
    raise OSError("Name or service not known")


def test_a_package_that_cannot_be_imported_is_one_line(monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("Failed to import diffusers.x because of the following error:\noperator torchvision::nms does not exist")
    monkeypatch.setitem(sys.modules, "diffusers", Broken("diffusers"))
    with pytest.raises(nets.WeightsError, match="^diffusers cannot be imported: .*torchvision::nms does not exist; pip install diffusers"):
        nets.sd_vae("", "cpu")


@pytest.mark.parametrize("name, says", [
    ("org/vae", "org/vae: not downloaded, and cannot be now .Name or service.*hf download org/vae --local-dir FOLDER/vae; "
                "then pass --vae FOLDER/vae"), ("/no/where", "/no/where: no such folder; pass --vae FOLDER/where")])
def test_what_is_not_there_is_one_line_that_says_how_to_get_it(name, says, monkeypatch):
    tried = []

    class Nothing(Vae):
        @classmethod
        def from_pretrained(cls, name, local_files_only=False, output_loading_info=False):
            tried.append(local_files_only)
            raise OSError("it is not here,\nnor there")
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=Nothing))
    monkeypatch.setattr(nets.urllib.request, "urlopen", offline)
    with pytest.raises(nets.WeightsError, match=says) as error:
        nets.sd_vae(name, "cpu")
    assert tried == [True] and "\n" not in str(error.value)                   # the hub's client would try six times


def test_latents_are_decoded_in_parts_of_their_size():
    parts = []

    class Decoder:
        def decode(self, z):
            assert z.is_contiguous()
            parts.append(len(z))
            return types.SimpleNamespace(sample=z)
    for side in (32, 64):
        z = torch.randn(20, 4, side, side).contiguous(memory_format=torch.channels_last)
        assert torch.equal(nets.decode_latents(Decoder(), z), z)
    assert parts == [16, 4, 4, 4, 4, 4, 4]


# ---- the real classes ----------------------------------------------------------------------------
try:                                                  # a torchvision of another torch raises RuntimeError
    from diffusers import AutoencoderKL
    from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTokenizer, Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig,
                              Dinov2WithRegistersModel)
    MISSING = ""
except Exception as e:
    MISSING = f"diffusers and transformers do not import: {e}"
real = pytest.mark.skipif(bool(MISSING), reason=MISSING[:100])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders as the real ones: AutoencoderKL, CLIP's text tower with its tokenizer, DINOv2."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    down, up = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    AutoencoderKL(block_out_channels=(8, 8, 16, 16), down_block_types=down, up_block_types=up, norm_num_groups=8,
                  layers_per_block=1, latent_channels=4).save_pretrained(root / "vae")
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    vocab = [*letters, *(c + "</w>" for c in letters), "do", "dog</w>", "<|startoftext|>", "<|endoftext|>"]
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(vocab), hidden_size=32, intermediate_size=64,
                                        num_hidden_layers=2, num_attention_heads=2))
    folder = root / "clip-vit-large-patch14"
    text.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocab)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="CLIPTokenizer", model_max_length=77)))
    vision = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=518))
    torch.nn.init.normal_(vision.embeddings.position_embeddings)
    vision.save_pretrained(root / "dinov2-base")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three class folders: a photo each, one CMYK, one grey, one PNG called .JPEG."""
    root = tmp_path_factory.mktemp("photos")
    ramp = np.add.outer(np.arange(300), 2 * np.arange(400)) % 256
    colours = np.stack([ramp, np.add.outer(np.arange(300), np.arange(400)) % 200, ramp // 2], 2).astype(np.uint8)
    for k, (mode, kind) in enumerate((("CMYK", "JPEG"), ("L", "JPEG"), ("RGB", "PNG"))):
        (root / f"n{k}").mkdir()
        Image.fromarray(colours).convert(mode).save(root / f"n{k}/a.JPEG", format=kind)
    return root


def moments(vae, image, low=-1.0):
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    dist = vae.encode(x * (1 - low) + low).latent_dist
    return torch.cat([dist.mean, dist.std], 1)[0]


@real
@torch.no_grad()
def test_shards_of_256_are_the_moments_of_both_mirror_images(models, photos, tmp_path):
    script = importlib.import_module(MF)
    script.main(f"--stage encode --source {photos} --data {tmp_path}/d --vae {models}/vae".split())
    vae, data = AutoencoderKL.from_pretrained(models / "vae").eval(), script.Latents(str(tmp_path / "d"), str(tmp_path))
    for k in range(3):
        image = fid.crop(Image.open(photos / f"n{k}/a.JPEG").convert("RGB"), 256)
        for flip, seen in ((False, image), (True, ImageOps.mirror(image))):
            torch.testing.assert_close(data.moments(k, flip), moments(vae, seen), rtol=2e-3, atol=2e-3)
    cfg = script.parse(["--data", f"{tmp_path}/d"])
    x = torch.randn(2, 4, 32, 32)
    torch.testing.assert_close(script.to_images(cfg, x * 0.18215), vae.decode(x).sample, rtol=1e-3, atol=1e-3)


@real
@torch.no_grad()
@pytest.mark.parametrize("precision, near", [("tf32", 1e-3), ("bf16", 0.2)])
def test_zip_of_512_holds_moments_of_images_in_0_1(precision, near, models, photos, tmp_path):
    script = importlib.import_module(IMAGENET)
    script.main(f"--res 512 --stage encode --source {photos} --data {tmp_path}/d.zip --vae {models}/vae "
                f"--precision {precision}".split())
    vae, data = AutoencoderKL.from_pretrained(models / "vae").eval(), script.Images(str(tmp_path / "d.zip"), str(tmp_path))
    assert data.labels.tolist() == [0, 1, 2] and data.image(0).dtype == torch.float32
    exact = [moments(vae, fid.crop(Image.open(photos / f"n{k}/a.JPEG").convert("RGB"), 512), 0.0) for k in range(3)]
    errors = [(data.image(k) - exact[k]).abs().max().item() for k in range(3)]
    assert max(errors) < near and (max(errors) > 1e-3) == (precision == "bf16")
    assert fid.made_of(str(tmp_path / "d.zip"))["vae"].startswith(f"{models}/vae, crc32 ")


@real
@torch.no_grad()
def test_coco_stores_what_the_libraries_say(models, photos, tmp_path):
    script = importlib.import_module(COCO)
    says = ["A dog.\n", "  Ein Café — 猫 😀 ", "dog " * 100, "", "d"]
    for part in ("train2014", "val2014"):
        (tmp_path / part).mkdir()
        for k in range(3):
            (tmp_path / part / f"{k}.jpg").write_bytes((photos / f"n{k}/a.JPEG").read_bytes())
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/captions_{part}.json").write_text(json.dumps(dict(
            images=[dict(id=k, file_name=f"{k}.jpg") for k in range(3)],
            annotations=[dict(image_id=k, caption=s) for s in says for k in range(3)])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "load_inception", lambda *a: Inception())
        script.main(f"--stage encode --source {tmp_path} --data {tmp_path}/d --vae {models}/vae --encoders {models}".split())
    data = script.Coco(str(tmp_path / "d"), str(tmp_path))
    folder = models / "clip-vit-large-patch14"
    tokenizer, clip = CLIPTokenizer.from_pretrained(folder), CLIPTextModel.from_pretrained(folder).eval()
    vae, dino = AutoencoderKL.from_pretrained(models / "vae").eval(), Dinov2Model.from_pretrained(models / "dinov2-base").eval()
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    ids = tokenizer(says, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    for k in range(3):
        image = fid.square(Image.open(tmp_path / f"train2014/{k}.jpg").convert("RGB"), 256)
        torch.testing.assert_close(data.moments(k), moments(vae, image), rtol=2e-3, atol=2e-3)
        x = (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - mean) / std
        tokens = dino(F.interpolate(x[None], 224, mode="bicubic")).last_hidden_state[0, 1:]      # no class token
        torch.testing.assert_close(data.tokens(k).float(), tokens, rtol=2e-3, atol=2e-3)
        assert torch.equal(torch.stack([data.words(k, (j + 0.5) / 5) for j in range(5)]), ids)
    features = script.text_encoder(script.parse(["--data", f"{tmp_path}/d"]))(ids)       # of the data's CLIP: no flag names it
    torch.testing.assert_close(features, clip(input_ids=ids).last_hidden_state, rtol=2e-3, atol=2e-3)


def changed(folder, target, change):
    """A copy of a model's folder with other weights: change(state dict) -> state dict."""
    from safetensors.torch import load_file, save_file
    shutil.copytree(folder, target)
    file = next(target.glob("*.safetensors"))
    save_file(change(load_file(file)), file, metadata=dict(format="pt"))
    return str(target)


@real
@pytest.mark.parametrize("case", ["vision is CLIP", "DINOv2 with registers", "VAE lacks a layer", "VAE is DINOv2", "no vocabulary"])
def test_encoders_that_would_load_as_random_are_refused_in_one_line(case, models, tmp_path, capfd):
    def lacks(state):
        return {k: v for k, v in state.items() if "conv_in" not in k}
    clip, dino = models / "clip-vit-large-patch14", models / "dinov2-base"
    if case == "DINOv2 with registers":
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                                           image_size=518)).save_pretrained(tmp_path / "reg")
    if case == "no vocabulary":
        (tmp_path / "clip").mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(clip / name, tmp_path / "clip")
    capfd.readouterr()
    with pytest.raises(nets.WeightsError) as error:
        {"vision is CLIP": lambda: nets.dinov2(str(clip), "cpu"),
         "DINOv2 with registers": lambda: nets.dinov2(str(tmp_path / "reg"), "cpu"),
         "VAE lacks a layer": lambda: nets.sd_vae(changed(models / "vae", tmp_path / "vae", lacks), "cpu"),
         "VAE is DINOv2": lambda: nets.sd_vae(str(dino), "cpu"),
         "no vocabulary": lambda: nets.CLIPText(str(tmp_path / "clip"), "cpu").ids(["a dog"])}[case]()
    assert "\n" not in str(error.value) and capfd.readouterr().err == ""
    says = {"no vocabulary": "/clip: ", "VAE is DINOv2": "dinov2-base: ", "DINOv2 with registers": "dinov2_with_reg"}
    assert says.get(case, "weights ['") in str(error.value)


@real
@torch.no_grad()
def test_weights_are_float32_and_known_by_the_half_that_encodes(models, tmp_path):
    """An fp16 folder; the old names of the SD-VAE's attention; another decoder; a link, a slash at the end."""
    vae = nets.sd_vae(str(models / "vae"), "cpu")
    same = nets.sd_vae(f"{models}/vae/", "cpu")
    assert same.identity == vae.identity == f"{models}/vae, {vae.identity.rpartition(', ')[2]}"

    def old_names(state):
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        return {functools.reduce(lambda k, n: k.replace(n, names[n]), names, k): v for k, v in state.items()}
    half = nets.sd_vae(changed(models / "vae", tmp_path / "half", lambda s: {k: v.half() for k, v in s.items()}), "cpu")
    assert {p.dtype for p in half.parameters()} == {torch.float32} and half.identity.rpartition(", ")[2] not in vae.identity
    old = nets.sd_vae(changed(models / "vae", tmp_path / "old", old_names), "cpu")
    ema = nets.sd_vae(changed(models / "vae", tmp_path / "ema", lambda s: {
        k: v + v.numel() * k.startswith("decoder") for k, v in s.items()}), "cpu")
    assert {v.identity.rpartition(", ")[2] for v in (vae, old, ema)} == {vae.identity.rpartition(", ")[2]}
    x = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    exact = moments_of(AutoencoderKL.from_pretrained(models / "vae").eval().double(), x.double())
    assert (nets.encode_moments(vae, x) - exact).abs().max() < 1e-4


def moments_of(vae, x):
    dist = vae.encode(x).latent_dist
    return torch.cat([dist.mean, dist.std], 1)
