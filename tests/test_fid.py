"""Frechet distance: identities, golden numbers, the FID network, statistics over ranks, files good and bad.

golden/ holds numbers of the official implementations: moments and distances, images and their features. The
weights of the golden network are a rule: normal numbers seeded by the crc32 of the name of the parameter.
"""
import dataclasses
import importlib
import io
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.multiprocessing as mp
from conftest import WIDE, draw_seeds, save_curve
from PIL import Image

import fid

ROOT = pathlib.Path(fid.__file__).parent
GOLDEN = ROOT / "tests" / "golden"


def moments(n, dim, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dim)) @ rng.standard_normal((dim, dim)) + shift
    return x.mean(0), np.cov(x.T)


@pytest.fixture
def run(monkeypatch, capsys):
    """The command line in this process: (exit code, stdout, stderr)."""
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, args)])
        code = 0
        try:
            fid.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return call


# ---- distance ----------------------------------------------------------------------------------
def test_equal_covariances_leave_the_squared_distance_of_the_means():
    mu, cov = moments(500, 32, seed=0)
    shift = np.arange(32) / 10
    assert fid.frechet_distance(mu, cov, mu + shift, cov) == pytest.approx(shift @ shift, rel=1e-12)


def test_diagonal_covariances_give_the_closed_form():
    a, b = np.linspace(0.1, 3, 40), np.linspace(5, 0.2, 40)
    distance = fid.frechet_distance(np.zeros(40), np.diag(a), np.zeros(40), np.diag(b))
    assert distance == pytest.approx(((a ** 0.5 - b ** 0.5) ** 2).sum(), rel=1e-12)


def test_distance_to_itself_is_zero_and_never_negative():
    for n in (10, 300):
        mu, cov = moments(n, 64, seed=n)
        assert 0 <= fid.frechet_distance(mu, cov, mu, cov) < 1e-9 * np.trace(cov)


def test_distance_is_symmetric():
    a, b = moments(300, 32, seed=1), moments(20, 32, seed=2, shift=0.3)
    assert fid.frechet_distance(*a, *b) == pytest.approx(fid.frechet_distance(*b, *a), rel=1e-12)


@pytest.mark.parametrize("pair", ["ab", "ac"])
def test_distance_agrees_with_golden_numbers(pair):
    golden = np.load(GOLDEN / "frechet.npz")
    sides = [golden[f"{name}_{side}"] for side in pair for name in ("mu", "cov")]
    assert fid.frechet_distance(*sides) == pytest.approx(float(golden[f"fid_{pair}"]), rel=1e-6)
    assert fid.frechet_distance(*map(torch.from_numpy, sides)) == fid.frechet_distance(*sides)


def test_distance_agrees_with_sqrtm():
    (mu1, cov1), (mu2, cov2) = moments(500, 48, seed=3), moments(400, 48, seed=4)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * scipy.linalg.sqrtm(cov1 @ cov2).real)
    assert fid.frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-9)


def test_singular_covariances_give_the_closed_form():
    """In a rotated space; 1e-13 is out of reach of sqrtm, and of a root that keeps rounded zeros."""
    q = np.linalg.qr(np.random.default_rng(5).standard_normal((256, 256)))[0]
    a, b = np.zeros(256), np.zeros(256)
    a[:20], b[10:40] = 7.0, 3.0
    distance = fid.frechet_distance(a, q @ np.diag(a) @ q.T, a, q @ np.diag(b) @ q.T)
    assert distance == pytest.approx(((a ** 0.5 - b ** 0.5) ** 2).sum(), rel=1e-13)
    few, many = moments(40, 64, seed=6), moments(700, 64, seed=7)
    root = scipy.linalg.sqrtm(few[1] @ many[1]).real
    expected = ((few[0] - many[0]) ** 2).sum() + np.trace(few[1] + many[1] - 2 * root)
    assert fid.frechet_distance(*few, *many) == pytest.approx(expected, rel=1e-6)


def test_collapsed_samples_give_a_finite_distance():
    mu, cov = moments(100, 16, seed=8)
    assert fid.frechet_distance(mu, cov, mu, np.zeros((16, 16))) == pytest.approx(np.trace(cov))
    assert fid.frechet_distance(mu, 0 * cov, mu, 0 * cov) == 0
    rounding = -1e-12 * np.eye(16)
    assert fid.frechet_distance(mu, cov, mu, rounding) == pytest.approx(np.trace(cov))


def test_what_cannot_be_compared_is_a_value_error():
    mu, cov = moments(100, 8, seed=9)
    threads = torch.get_num_threads()
    for wrong in ((mu[0], cov), (mu[:4], cov), (mu, cov[:4, :4]), (mu, cov[:, :4]), (mu[None], cov)):
        with pytest.raises(ValueError, match="dimensions differ"):
            fid.frechet_distance(mu, cov, *wrong)
        with pytest.raises(ValueError, match="dimensions differ"):
            fid.frechet_distance(*wrong, mu, cov)
    for wrong in ((mu * np.nan, cov), (mu, cov * np.inf)):
        with pytest.raises(ValueError, match="not finite"):
            fid.frechet_distance(mu, cov, *wrong)
    assert torch.get_num_threads() == threads


# ---- Inception ---------------------------------------------------------------------------------
def rule(name, shape):
    """Weights of the golden network."""
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("num_batches_tracked"):
        z = np.zeros(())
    elif len(shape) > 1:
        z *= 1.5 / np.prod(shape[1:]) ** 0.5
    elif name.endswith("running_var"):
        z = 1 + 0.1 * np.abs(z)
    else:
        z = 0.1 * z + name.endswith("weight")
    return torch.tensor(z, dtype=torch.float32)


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "inception_pool3.npz")


@pytest.fixture(scope="module")
def state(golden):
    return {name: rule(name, shape) for name, shape in json.loads(str(golden["state_names"])).items()}


@pytest.fixture(scope="module")
def half_pixel(state):
    return fid.InceptionV3(state)                     # the bare class agrees with the golden numbers


def test_names_and_shapes_are_those_of_the_published_file(golden, half_pixel):
    ours = {name: list(value.shape) for name, value in half_pixel.state_dict().items()}
    assert ours == json.loads(str(golden["state_names"]))


def test_features_agree_with_golden_numbers(golden, half_pixel):
    for images, features in (("images", "features"), ("images_b", "features_b")):
        ours = half_pixel(torch.from_numpy(golden[images]))
        assert ours.dtype == torch.float32 and ours.shape == golden[features].shape and not ours.requires_grad
        assert np.abs(ours.numpy() - golden[features]).max() < 1e-4


def test_precision_of_the_caller_does_not_reach_the_features(golden, half_pixel):
    images, seen, cudnn = torch.from_numpy(golden["images_b"]), [], torch.backends.cudnn
    def look(*_):
        seen.extend((cudnn.enabled, cudnn.allow_tf32))
    watch = half_pixel.Mixed_7c.register_forward_hook(look)
    cudnn.allow_tf32 = True
    with torch.autocast("cpu", torch.bfloat16):
        features = half_pixel(images)
    watch.remove()
    assert seen == [True, False] and cudnn.allow_tf32
    assert np.abs(features.numpy() - golden["features_b"]).max() < 1e-4


def test_tf1_resize_by_hand():
    """Two pixels to four: TF1 reads at 0, 1/2, 1, 3/2 and stops at the border; half-pixel reads elsewhere."""
    x = torch.tensor([[0.0, 8.0], [16.0, 32.0]])[None, None]
    rows = torch.tensor([[0, 4, 8, 8], [8, 14, 20, 20], [16, 24, 32, 32], [16, 24, 32, 32]]).float()
    assert torch.equal(fid.resize_tf1(x, 4)[0, 0], rows)
    other = torch.nn.functional.interpolate(x, (4, 4), mode="bilinear", align_corners=False)
    assert not torch.allclose(other[0, 0], rows)
    same = torch.randint(256, (1, 3, 299, 299)).float()
    assert torch.equal(fid.resize_tf1(same), same)


def test_tf1_is_the_default_of_scores_and_each_resize_has_its_scale(golden, state, half_pixel, tmp_path):
    torch.save(state, tmp_path / "inception.pth")
    net, images, seen = fid.load_inception(str(tmp_path / "inception.pth")), torch.from_numpy(golden["images_b"]), []
    assert net.resize == "tf1" and "tf1" in net.protocol and "half_pixel" in half_pixel.protocol
    for each in (net, half_pixel):
        hook = each.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        features = each(images)
        hook.remove()
        assert (np.abs(features.numpy() - golden["features_b"]).max() > 1e-2) == (each is net)
    other = torch.nn.functional.interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False)
    torch.testing.assert_close(seen, [(fid.resize_tf1(images.float()) - 128) / 128, other / 127.5 - 1])
    net.resize = "half_pixel"
    assert net.protocol.split("resize")[1] == half_pixel.protocol.split("resize")[1]
    with pytest.raises(ValueError, match="resize bicubic"):
        fid.InceptionV3(resize="bicubic")


def test_building_and_using_a_net_draws_no_random_numbers(golden, state):
    before = torch.get_rng_state()
    fid.InceptionV3(state)
    fid.measure(fid.DigitsNet(), [fid.digits()[0]])
    assert torch.equal(torch.get_rng_state(), before)


def test_grey_images_are_seen_as_rgb_and_floats_are_refused(half_pixel):
    grey = torch.randint(256, (1, 1, 16, 16)).byte()
    assert torch.equal(half_pixel(grey), half_pixel(grey.repeat(1, 3, 1, 1)))
    for wrong in (grey.float(), grey[0], grey.repeat(1, 4, 1, 1)):
        with pytest.raises(ValueError, match="expected uint8"):
            half_pixel(wrong)


def test_wrong_weights_are_one_clear_line(state, tmp_path):
    some = {k: v for k, v in state.items() if k != "fc.bias"}
    with pytest.raises(ValueError, match="fc.bias") as error:
        fid.InceptionV3(some)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="size mismatch"):
        fid.InceptionV3({**state, "fc.bias": torch.zeros(3)})
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="--inception .*broken.pth"):
        fid.load_inception(str(tmp_path / "broken.pth"))
    with pytest.raises(ValueError, match="--inception .*absent.pth: No such file"):
        fid.load_inception(str(tmp_path / "absent.pth"))


def test_published_weights_load():
    cache = os.environ.get("CMT_CACHE") or os.path.expanduser("~/.cache/cmt")
    path = os.path.join(cache, os.path.basename(fid.INCEPTION_URLS[0]))
    if not os.path.exists(path):
        pytest.skip(f"{path} is not there: 95 MB, published under {fid.INCEPTION_URLS[0]}")
    net = fid.load_inception()
    features = net(torch.randint(256, (2, 3, 32, 32)).byte())
    assert net.protocol.count(fid.INCEPTION_SHA256[:16]) and "not the published" not in net.protocol
    assert features.min() >= 0 and features.mean() < 2


# ---- digits ------------------------------------------------------------------------------------
def test_sheet_holds_1797_digits_in_order_of_class():
    images, labels = fid.digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (labels.diff() >= 0).all() and images.flatten(1).any(1).all()


def test_digits_net_is_small_and_right():
    net, (images, labels) = fid.DigitsNet(), fid.digits()
    held = torch.arange(len(labels)) % 5 == 0                      # what train_digits kept apart
    assert os.path.getsize(ROOT / "assets" / "fd_digits.npz") <= 200_000
    assert (net.logits(images[held]).argmax(1) == labels[held]).float().mean() > 0.98
    assert net(images).shape == (1797, 64) and net(images).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert net(images[:9]).dtype == torch.float32
    with pytest.raises(ValueError, match="8, 8"):
        net(images.repeat(1, 1, 2, 2))


def test_fd_digits_grows_with_the_fault():
    net, (images, _) = fid.DigitsNet(), fid.digits()
    reference = fid.measure(net, images.split(500), file="digits")
    x = images / 127.5 - 1
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    distances = [fid.frechet_distance(*fid.measure(net, [fid.to_uint8(x + s * noise)])[:2], *reference[:2])
                 for s in (0, 0.1, 0.3, 1)]
    assert distances[0] < 1e-9 and distances == sorted(distances) and distances[3] > 30


def test_training_the_digits_net_is_deterministic_and_writes_what_loads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fid, "measure", lambda *_: (torch.zeros(1), torch.eye(1)))     # its report is slow
    for name in ("a.npz", "b.npz"):
        fid.train_digits(str(tmp_path / name), steps=3)
    a, b = fid.DigitsNet(str(tmp_path / "a.npz")), fid.DigitsNet(str(tmp_path / "b.npz"))
    assert all(map(torch.equal, a.parameters(), b.parameters()))
    assert "half against half" in capsys.readouterr().out


def test_to_uint8_rounds_as_edm_does():
    x = torch.tensor([-2.0, -1.0, -0.99, 0.0, 1 / 255, 1.0, 1.1])
    assert fid.to_uint8(x).tolist() == [0, 0, 1, 128, 128, 255, 255]
    images = torch.arange(256).byte()
    assert torch.equal(fid.to_uint8(images / 127.5 - 1), images)
    with pytest.raises(ValueError, match="not finite"):
        fid.to_uint8(x * float("nan"))


# ---- statistics --------------------------------------------------------------------------------
def features(n=300, dim=16):
    """Far from zero, as where float32 sums lose the covariance."""
    return torch.from_numpy(100 + np.random.default_rng(1).standard_normal((n, dim)).astype(np.float32))


def test_streaming_is_numpy():
    x, stats = features(), fid.Statistics(16)
    for part in x.split(70):
        stats.update(part)
    assert stats.n == 300 and stats.cov.dtype == torch.float64
    np.testing.assert_allclose(stats.mean, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.cov, np.cov(x.double().T), rtol=0, atol=1e-9)


def test_statistics_refuse_what_is_wrong():
    stats = fid.Statistics(16)
    with pytest.raises(ValueError, match="two at least"):
        stats.update(features(1)).cov
    for wrong in (features(dim=15), features()[0]):
        with pytest.raises(ValueError, match="expected"):
            stats.update(wrong)
    with pytest.raises(ValueError, match="not finite"):
        stats.update(features() / 0)
    stats.reduce()
    with pytest.raises(ValueError, match="before reduce"):
        stats.update(features())


def test_saved_statistics_are_those_of_the_whole(tmp_path):
    x, path = features(), str(tmp_path / "stats.npz")
    whole = fid.Statistics(16).update(x[:100]).update(x[100:])
    fid.save_statistics(path, fid.Reference(whole.mean, whole.cov, whole.n, "FD-digits: test", path, ""))
    mu, cov, n, stated, *_ = fid.read_statistics(path)
    assert n == 300 and stated == "FD-digits: test" and torch.equal(mu, whole.mean) and torch.equal(cov, whole.cov)
    np.testing.assert_allclose(cov, np.cov(x.double().numpy().T), atol=1e-9)
    assert os.listdir(tmp_path) == ["stats.npz"]


def reduce_in_process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net, (images, _) = fid.DigitsNet(), fid.digits()
    made = fid.measure(net, fid.read_images(str(ROOT / "assets" / "digits.png"), 100, rank, 2))
    stats = fid.Statistics(64)
    if rank:                                                       # one rank has nothing
        stats.update(net(images))
    stats.reduce().reduce()
    torch.save([made.mu, made.cov, made.n, stats.mean, stats.cov, stats.n], f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one(tmp_path):
    mp.start_processes(reduce_in_process, (str(tmp_path),), nprocs=2, start_method="fork")
    one = fid.measure(fid.DigitsNet(), [fid.digits()[0]])
    for rank in range(2):
        mu, cov, n, mu_once, cov_once, n_once = torch.load(tmp_path / f"rank{rank}.pt")
        assert n == n_once == one.n
        for a, b in ((mu, one.mu), (cov, one.cov), (mu_once, one.mu), (cov_once, one.cov)):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        unit = torch.zeros(64), torch.eye(64)
        two, single = fid.frechet_distance(mu, cov, *unit), fid.frechet_distance(*one[:2], *unit)
        assert two == pytest.approx(single, rel=1e-10)


# ---- images ------------------------------------------------------------------------------------
@pytest.fixture
def images():
    return np.random.default_rng(2).integers(0, 256, (10, 6, 5, 3), dtype=np.uint8)


def write_folder(folder, images):
    for i, image in enumerate(images):
        (folder / f"{i // 4:05d}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i // 4:05d}" / f"img{i:08d}.png")


def test_all_formats_give_the_same_images(images, tmp_path):
    write_folder(tmp_path / "folder", images)
    with zipfile.ZipFile(tmp_path / "edm.zip", "w") as archive:
        for file in sorted((tmp_path / "folder").rglob("*.png")):
            archive.write(file, file.relative_to(tmp_path / "folder"))
        archive.writestr("dataset.json", "{}")
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "adm.npz", images, np.arange(10))
    np.savez_compressed(tmp_path / "named.npz", images=images.transpose(0, 3, 1, 2))
    for name in ("folder", "edm.zip", "a.npy", "adm.npz", "named.npz"):
        batches = list(fid.read_images(str(tmp_path / name), batch=4))
        assert [len(b) for b in batches] == [4, 4, 2], name
        assert np.array_equal(torch.cat(batches), images.transpose(0, 3, 1, 2)), name
        mine = [torch.cat(list(fid.read_images(str(tmp_path / name), 2, rank, 3))) for rank in range(3)]
        assert all(np.array_equal(mine[r], images[r::3].transpose(0, 3, 1, 2)) for r in range(3)), name


@pytest.mark.parametrize("fault", ["lab", "16 bit", "float", "cut", "text", "size", "channels"])
def test_an_odd_image_is_named(fault, images, tmp_path):
    write_folder(tmp_path / "set", images)
    odd, image = tmp_path / "set" / "00001" / "odd.png", Image.fromarray(images[0])
    if fault == "lab":
        odd = odd.with_suffix(".tif")
        Image.new("LAB", image.size).save(odd)
    elif fault == "16 bit":
        Image.fromarray(np.zeros((6, 5), np.uint16)).save(odd)
    elif fault == "float":
        odd = odd.with_suffix(".tiff")
        image.convert("F").save(odd)
    elif fault == "cut":
        image.save(odd)
        odd.write_bytes(odd.read_bytes()[:80])
    elif fault == "text":
        odd.write_text("not an image")
    else:
        (image.resize((9, 9)) if fault == "size" else image.convert("L")).save(odd)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in sorted((tmp_path / "set").rglob("*.*")):
            archive.write(file, file.name)
    for path in ("set", "set.zip"):
        with pytest.raises(fid.DataError, match=odd.name) as error:
            list(fid.read_images(str(tmp_path / path)))
        assert "\n" not in str(error.value)


def test_a_path_without_usable_images_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    for name in ("broken.zip", "broken.npy", "broken.npz", "broken.png", "broken.pkl"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 nothing that anybody could read")
    np.save(tmp_path / "float.npy", np.zeros((4, 8, 8, 3)))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object))
    Image.new("L", (12, 8)).save(tmp_path / "photo.png")
    for name in ("absent", "absent.npz", "empty", "notes.txt", "broken.zip", "broken.npy", "broken.npz",
                 "broken.png", "broken.pkl", "float.npy", "other.npz", "object.npy", "photo.png"):
        with pytest.raises(fid.DataError, match=name) as error:
            list(fid.read_images(str(tmp_path / name)))
        assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)


def test_a_flipped_bit_in_a_zip_is_found(images, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i, image in enumerate(images):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "bmp")
            archive.writestr(f"{i}.bmp", file.getvalue())
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[100] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(fid.DataError, match="a.zip/0.bmp"):
        list(fid.read_images(str(tmp_path / "a.zip")))


# ---- references --------------------------------------------------------------------------------
def edm2(mu, cov):
    return {"num_images": 50_000, "fid": {"mu": mu, "sigma": cov}, "fd_dinov2": {"mu": mu, "sigma": cov}}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_statistics_of_edm_adm_and_edm2_are_read(dtype, tmp_path):
    mu, cov = (a.astype(dtype) for a in moments(50, 8, seed=10))
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=cov)
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), mu=mu, sigma=cov, mu_s=mu)
    (tmp_path / "new.pkl").write_bytes(pickle.dumps(edm2(mu, np.asfortranarray(cov)), protocol=4))
    old = pickle.dumps(edm2(mu, cov), protocol=3).replace(b"numpy._core", b"numpy.core")
    (tmp_path / "old.pkl").write_bytes(old)
    for name, n in (("edm.npz", 0), ("adm.npz", 0), ("new.pkl", 50_000), ("old.pkl", 50_000)):
        found = fid.load_reference(str(tmp_path / name))
        assert found.n == n and found.features == "" and found.mu.dtype == found.cov.dtype == torch.float64
        assert np.array_equal(found.mu, mu) and np.array_equal(found.cov, cov)
        assert len(found.sha256) == 64


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("name", ["system", "eval", "getattr", "fromfile", "_reconstruct.__self__"])
def test_a_malicious_pickle_is_refused_by_name_and_not_run(name, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "img64.pkl"
    calls = {"system": Call(os.system, f"touch {marker}"), "eval": Call(eval, f"open('{marker}', 'w')"),
             "getattr": Call(getattr, marker, "touch"), "fromfile": Call(np.fromfile, str(marker))}
    path.write_bytes(pickle.dumps({**edm2(*moments(50, 8, seed=11)), "extra": calls.get(name)}, protocol=4))
    if name not in calls:      # protocol 4 may name attributes of attributes of what is allowed
        path.write_bytes(b"\x80\x04\x8c\x16numpy._core.multiarray\x8c\x15_reconstruct.__self__\x93.")
    with pytest.raises(fid.DataError, match=rf"refused .*\.{name}:"):
        fid.load_reference(str(path))
    assert not marker.exists()


def test_statistics_that_are_none_are_named(tmp_path):
    mu, cov = moments(50, 8, seed=12)
    np.savez(tmp_path / "shape.npz", mu=mu, sigma=cov[:3])
    np.savez(tmp_path / "half.npz", mu=mu)
    (tmp_path / "text.pkl").write_bytes(pickle.dumps({"fid": {"mu": "a", "sigma": "b"}, "num_images": 3}))
    (tmp_path / "int.pkl").write_bytes(pickle.dumps(edm2(np.arange(8), np.ones((8, 8), int)), protocol=4))
    (tmp_path / "big.pkl").write_bytes(pickle.dumps(edm2(mu.astype(">f8"), cov), protocol=4))
    for name in ("shape.npz", "half.npz", "text.pkl", "int.pkl", "big.pkl"):
        with pytest.raises(fid.DataError, match=name):
            fid.read_statistics(str(tmp_path / name))


class Page(BaseHTTPRequestHandler):
    """Serves /whole; /short promises more than comes; everything else is absent."""

    def do_GET(self):
        self.send_response(200 if self.path.startswith(("/whole", "/short")) else 404)
        self.send_header("Content-Length", "100" if self.path.startswith("/short") else "5")
        self.end_headers()
        self.wfile.write(b"bytes")

    def log_message(self, *_):
        pass


def test_downloads_are_whole_and_right_or_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("CMT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site = f"http://127.0.0.1:{server.server_port}"
    right = fid.hashlib.sha256(b"bytes").hexdigest()
    path = fid.fetch([f"{site}/absent/a.npz", f"{site}/whole/a.npz"], right)
    assert pathlib.Path(path).read_bytes() == b"bytes" and path == str(tmp_path / "cache" / "a.npz")
    with pytest.raises(fid.DataError, match=f"{right}, not 00"):
        fid.fetch([f"{site}/whole/a.npz"], "00" * 32)
    with pytest.raises(fid.DataError, match=f"b.npz .*{'00' * 32}.*{right}"):
        fid.fetch([f"{site}/whole/b.npz"], "00" * 32)
    with pytest.raises(fid.DataError, match="IncompleteRead"):
        fid.fetch([f"{site}/short/b.npz"])
    server.shutdown()
    server.server_close()
    with pytest.raises(fid.DataError, match=f"{site}/whole/b.npz.*refused.*put it there"):
        fid.fetch([f"{site}/whole/b.npz"], right, "put it there")
    assert os.listdir(tmp_path / "cache") == ["a.npz"]


def test_without_network_the_error_says_what_to_fetch(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")
    monkeypatch.setenv("CMT_CACHE", str(tmp_path))
    monkeypatch.setattr(fid.urllib.request, "urlopen", offline)
    with pytest.raises(fid.DataError) as error:
        fid.load_inception()
    for text in (*fid.INCEPTION_URLS, fid.INCEPTION_SHA256, str(tmp_path), "--inception FILE"):
        assert text in str(error.value)
    with pytest.raises(fid.DataError, match="cifar10-32x32.npz.*path of a copy"):
        fid.load_reference("cifar10")
    (tmp_path / os.path.basename(fid.INCEPTION_URLS[0])).write_bytes(b"damaged")
    with pytest.raises(fid.DataError, match=f"not {fid.INCEPTION_SHA256}; delete it"):
        fid.load_inception()


# ---- command line ------------------------------------------------------------------------------
def test_command_line_prints_the_number_and_its_protocol(run, tmp_path):
    sheet = ROOT / "assets" / "digits.png"
    env = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    code, out, err = run("--save", tmp_path / "half.npz", "--features", "digits", sheet)
    assert code == 0 and "half.npz: 1797 images" in out and "FD-digits: fd_digits.npz" in out
    done = subprocess.run([sys.executable, ROOT / "fid.py", sheet, tmp_path / "half.npz"], text=True,
                          capture_output=True, env={**os.environ, **env, "OMP_NUM_THREADS": "1"})
    code, out, err = done.returncode, done.stdout, done.stderr
    assert code == 0 and out.startswith("FD-digits 0.0000\n") and "FID" not in out
    for text in (fid.sha256(str(sheet)), fid.sha256(str(tmp_path / "half.npz")), "1797 images", "N-1",
                 fid.sha256(str(ROOT / "assets" / "fd_digits.npz"))[:16]):
        assert text in out
    assert err == ""


def of_means(mu1, cov1, mu2, cov2):
    """The true one takes seconds in 2048 dimensions."""
    return (mu1 - mu2).square().sum()


def test_command_line_scores_images_with_given_inception_weights(run, images, state, tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "frechet_distance", of_means)
    torch.save(state, tmp_path / "rule.pth")
    write_folder(tmp_path / "a", images[:3])
    np.save(tmp_path / "b.npy", images[3:6])
    given = "--inception", tmp_path / "rule.pth"
    code, out, err = run(*given, "--batch", 2, tmp_path / "a", tmp_path / "b.npy")
    assert code == 0 and float(out.split()[1]) > 0 and out.startswith("FID ")
    assert "resize tf1" in out and "(not the published file)" in out and out.count("3 images") == 2
    assert out.count("too few for 2048 features") == 2 and err == ""


def test_command_line_reads_statistics_of_unstated_origin(run, tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "frechet_distance", of_means)
    for dim, name in ((8, "Frechet distance"), (2048, "FID")):
        np.savez(tmp_path / "a.npz", mu=np.zeros(dim), sigma=np.eye(dim))
        np.savez(tmp_path / "b.npz", mu=np.ones(dim), sigma=np.eye(dim))
        code, out, err = run(tmp_path / "a.npz", tmp_path / "b.npz")
        assert (code, err) == (0, "") and "? images" in out
        assert out.startswith(f"{name} {dim}.0000\nfeatures not stated")


def test_a_score_says_first_that_features_differ_and_last_that_images_are_few():
    """The one before anything is drawn."""
    net, drawn = fid.DigitsNet(), []

    def sampler(seeds):
        drawn.append(len(seeds))
        return torch.rand(len(seeds), 1, 8, 8)
    other = fid.measure(net, [fid.digits()[0]])._replace(features="FD-digits: other weights")
    with pytest.raises(fid.DataError, match="features differ"):
        fid.score(sampler, net, other, 8)
    assert drawn == []
    reference = other._replace(features=net.protocol)
    text = fid.protocol(fid.score(sampler, net, reference, 8)[2], reference)
    assert drawn == [8] and "8 images of this run (too few for 64 features, under 1024: it comes out high) against" in text and text.count("too few") == 1


def test_numbers_of_different_features_are_not_compared(run, tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(64), sigma=np.eye(64), n=90, protocol="FD-digits: other weights")
    code, out, err = run(ROOT / "assets" / "digits.png", tmp_path / "a.npz")
    assert (code, out) == (3, "") and "features differ" in err and "other weights" in err
    np.savez(tmp_path / "b.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    code, out, err = run(ROOT / "assets" / "digits.png", tmp_path / "b.npz")
    assert (code, out) == (3, "") and "dimensions differ" in err and "b.npz" in err


def test_mistakes_are_one_line_and_an_exit_code(run, tmp_path):
    sheet = ROOT / "assets" / "digits.png"
    np.save(tmp_path / "one.npy", np.zeros((1, 8, 8, 1), np.uint8))
    np.save(tmp_path / "rgb.npy", np.zeros((4, 8, 8, 3), np.uint8))
    for code, text, args in (
            (2, "--colour", ("--colour", sheet, sheet)),
            (2, "2 paths", (sheet,)),
            (2, "2 paths", ()),
            (2, "1 paths", ("--save", tmp_path / "s.npz", sheet, sheet)),
            (2, "--batch 0", ("--batch", 0, sheet, sheet)),
            (2, "--resize", ("--resize", "bicubic", sheet, sheet)),
            (2, "--device", ("--device", "tpu", sheet, sheet)),
            (2, "s.npz", ("--save", tmp_path / "absent" / "s.npz", sheet)),
            (2, "s.txt", ("--save", "s.txt", sheet)),
            (3, "absent: not there", (sheet, tmp_path / "absent")),
            (3, "one.npy: 1 images", (sheet, tmp_path / "one.npy")),
            (3, "expected uint8 of 1 channels", (sheet, tmp_path / "rgb.npy")),
            (3, "w.pth: No such file", ("--inception", "w.pth", tmp_path / "one.npy", tmp_path / "rgb.npy"))):
        found, out, err = run(*args)
        lines = err.splitlines()
        assert found == code and out == "" and len(lines) == 1 and text in lines[0], (args, found, out, err)


def test_help_shows_the_module_docstring(run):
    code, out, _ = run("--help")
    assert code == 0 and "torchrun --nproc_per_node=8 fid.py A B" in out


# ---- images of a sampler -------------------------------------------------------------------------
def seeded(seeds):
    """A sampler: each image is one grey level, that of its seed."""
    return torch.stack([torch.full((1, 8, 8), s / 100 - 1) for s in seeds])


def as_process(monkeypatch, rank, world):
    """fid believes that it is one of several processes."""
    for name, value in (("is_initialized", True), ("get_rank", rank), ("get_world_size", world)):
        monkeypatch.setattr(fid.dist, name, lambda value=value: value)


def test_each_process_draws_and_writes_its_share_of_the_images(tmp_path, monkeypatch):
    """Every image is drawn once, and by its seed: not by every process, nor kept in memory."""
    drawn = []
    for rank in range(3):
        as_process(monkeypatch, rank, 3)
        fid.save_images(lambda seeds: drawn.extend(seeds) or seeded(seeds), range(5, 25), f"{tmp_path}/net_1/", batch=4)
    assert sorted(drawn) == list(range(5, 25)) and len(list((tmp_path / "net_1").iterdir())) == 20
    assert np.asarray(Image.open(tmp_path / "net_1/000007.png"))[0, 0] == fid.to_uint8(seeded([7]))[0, 0, 0, 0]


def test_a_score_is_the_distance_of_its_samples_and_repeats_use_fresh_seeds(monkeypatch):
    images, net, seen = fid.digits()[0], fid.DigitsNet(), []

    def sampler(seeds):
        seen.append(list(seeds))
        return images[torch.tensor(list(seeds))].float() / 127.5 - 1
    reference = fid.measure(net, images.split(300))
    text, values, ours = fid.score(sampler, net, reference, 500, batch=200)
    own = fid.measure(net, [images[:500]])
    assert values == [pytest.approx(fid.frechet_distance(*own[:2], *reference[:2]))] and text == f"{values[0]:.2f}"
    assert ours.n == 500 and [len(s) for s in seen] == [200, 200, 100]
    text, values, _ = fid.score(sampler, net, reference, 500, repeat=3)
    assert seen[-1][-1] == 1499 and text == f"{np.mean(values):.2f} +- {np.std(values, ddof=1):.2f}, min {min(values):.2f}"


def sheet_of(path, rows, caption="", **more):
    """The sheet as saved, in full width: uint8 (H, W, 3)."""
    fid.WIDE = WIDE                                    # until the test ends
    fid.save_sheet(str(path / "sheet.png"), rows, caption, **more)
    image = Image.open(path / "sheet.png")
    assert image.mode == ("L" if rows[0][1].shape[1] == 1 else "RGB") and image.width >= WIDE == 1800
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (3, 32, 32), (4, 16, 16), (3, 128, 128), (3, 512, 512)])
def test_sheets_show_every_image_enlarged_by_whole_numbers(tmp_path, shape):
    """Grey, colour, latents (three of their channels); each image is found again by its own colours."""
    rows, g = [], torch.Generator().manual_seed(0)
    for k in range(2):
        rows.append((f"row {k}", torch.rand((3, *shape), generator=g) * 2 - 1))
    sheet = sheet_of(tmp_path, rows, "what it shows")
    for _, images in rows:
        for image in images if shape[0] != 4 else ():
            pixels = Image.fromarray(fid.to_uint8(image[None])[0].permute(1, 2, 0).expand(-1, -1, 3).numpy())
            zoom = max(1, 192 // shape[1])
            big = np.asarray(pixels.resize([zoom * shape[1]] * 2, Image.Resampling.BICUBIC))
            places = zip(*(sheet == big[0, 0]).all(2).nonzero())
            assert any(np.array_equal(sheet[y:y + len(big), x:x + len(big)], big) for y, x in places)
    assert (sheet[-1] == 255).all() and (sheet[:, -1] == 255).all()                   # a light border


LONG = "a man riding a wave on top of a surfboard in the ocean while a purple elephant looks on " * 3


@pytest.mark.parametrize("part", ["label", "header", "caption"])
def test_words_of_a_sheet_are_there_and_whole(tmp_path, part):
    """Other words, other pixels; longer words, a larger sheet: the border stays white, so that nothing is cut."""
    images, seen = seeded(range(3)), []
    for text in ("seven", "eight", LONG, "W" * 300, "\u4e2d" * 50, "zw\u00f6lf \u2014\nB"):
        words = dict(label="", header=["", "", "", ""], caption="") | {part: text}
        words["header"] = ["", text, "", text] if part == "header" else words["header"]
        sheet = sheet_of(tmp_path, [(words["label"], images)], words["caption"], header=words["header"])
        seen.append(sheet)
        assert (np.concatenate([sheet[0], sheet[-1], sheet[:, 0], sheet[:, -1]]) == 255).all()
    assert not np.array_equal(seen[0], seen[1]) and seen[2].size > seen[0].size < seen[3].size
    assert fid.plain("zw\u00f6lf \u2014") == "zwolf ?"


def test_a_label_higher_than_its_images_makes_room(tmp_path):
    """The labels of 600 letters beside images of 8 pixels do not run into each other: white between them."""
    sheet = sheet_of(tmp_path, [(LONG, seeded([0])), (LONG, seeded([100]))])
    left = (sheet[:, :300] < 128).any((1, 2)).nonzero()[0]
    assert len(left) > 400 and max(np.diff(left)) < 32 and sheet.shape[0] > 2 * 10 * 40


def test_a_text_for_each_image_stands_below_it(tmp_path):
    """Without a header for texts at the right: room is made below the images, and between them for what is wider."""
    images = seeded(range(12))
    plain, below, wide = (sheet_of(tmp_path, [("net", images, *texts)]) for texts in ([], ["error 0.12"] * 12, ["an error of 0.12"] * 12))
    assert below.shape[0] > plain.shape[0] + 32 and wide.shape[1] > below.shape[1] and wide.shape[0] == below.shape[0]


def test_stages_have_the_scores_once_the_table_has_them(tmp_path, monkeypatch):
    shown = [("teacher", 16, seeded(range(4))), ("mid", 1, seeded(range(4)))]
    row = {"stage": "mid, balanced labels", "1-step FID": "3.50 +- 0.1", "2-step FID": "-"}
    lower = "FID of this row"
    assert fid.numbers_of("mid", 1, [row]) == {lower: "3.50 +- 0.1"} and fid.net_label("mid", 1) == "mid-training alone\n1 step"
    assert fid.numbers_of("post", 2, [row]) == {} and fid.net_label("post", 2) == "after post-training\n2 steps"
    assert fid.numbers_of("mid", 1, [row | {"2-step FID": "2.25", "1-step digit": "9%"}]) == {lower: "3.50 +- 0.1", "digit": "9%", "FID in two steps": "2.25"}
    teacher = {"stage": "teacher", "1-step FID": "9.0", "2-step FID": "8.0", "16-step FID": "7.0"}
    assert fid.numbers_of("teacher", 1, [teacher]) == {lower: "9.0", "FID in two steps": "8.0"} and fid.numbers_of("teacher", 16, [teacher]) == {lower: "7.0"}
    (tmp_path / "mid.pt").touch()
    monkeypatch.setattr(fid, "OUT", str(tmp_path))
    assert fid.net_label("post", 2) == "mid- and post-training\n2 steps" and fid.net_label("real digits", 0) == "real digits"
    for names in ([], list("0123"), [f"the digit {k}" for k in range(4)]):
        sizes = []
        for table in ((), [row]):
            fid.save_stages(str(tmp_path), shown, names, "", table)
            sizes.append((tmp_path / "stages.png").read_bytes())
        assert sizes[0] != sizes[1]
    heights = []
    for score in ("FID", "FD-digits"):                 # scored digits have real ones below them
        fid.save_stages(str(tmp_path), [("mid", 1, seeded(range(12)))], [], "", [{"stage": "mid", f"1-step {score}": "3.50"}])
        heights.append(Image.open(tmp_path / "stages.png").height)
    assert heights[0] < heights[1]


def test_charts_leave_out_what_is_not_above_zero(tmp_path):
    path = str(tmp_path / "chart.png")
    for points in ([(1, 0.5), (2, 0.25)], [(0, 1.0)], [(5, 3e-7), (6, float("nan")), (7, -1.0), (9e7, 4e5)], []):
        fid.save_chart(path, {"loss": {"mid": points, "diverged": [(1, float("nan"))], "one": points[:1]}, "empty": {}}, "words")
        assert Image.open(path).width >= 900 and (Image.open(path).height > 300) == bool(points)


def test_a_stage_that_has_just_begun_is_a_dot(tmp_path):
    """A curve of one point has no line, also beside long ones: it is seen all the same."""
    long, ink = [(k, 2.0) for k in range(1, 90)], fid.colours_of(["pretrain", "mid"])["mid"]
    fid.save_chart(path := str(tmp_path / "chart.png"), {"loss": {"pretrain": long, "mid": [(50, 4.0)]}}, "words")
    plot = np.asarray(Image.open(path))[80:540, 160:1600]                      # without the legend
    assert (plot == ink).all(-1).sum() > 20


@pytest.mark.parametrize("last", [[(0, 4.0), (90, 3.0)], [(0, 2.5), (90, 2.5)]], ids=["a curve", "a dashed line"])
def test_every_curve_of_a_panel_ends_at_its_last_point(tmp_path, last):
    """Each from the left of the axes to their right, the first one too; beyond stand names alone, in two panels as in one."""
    curves = {"mid": [(0, 90.0), (90, 2.0)], "without": [(0, 90.0), (90, 5.0)], "teacher": last}
    fid.save_chart(path := str(tmp_path / "chart.png"), {"one, lower is better": curves, "two, lower is better": curves}, "a heading\nwords")
    picture, inks = np.asarray(Image.open(path)), fid.colours_of([*curves])
    found = {name: (picture == ink).all(-1).any(0).nonzero()[0] for name, ink in inks.items()}             # columns of pixels
    gaps = {name: (np.diff(columns) > 100).nonzero()[0] for name, columns in found.items()}
    assert all(len(gap) == 1 for gap in gaps.values())                                  # between the curve and its key
    ends = [(columns[0], columns[gap[0]], columns[gap[0] + 1], columns[-1]) for columns, gap in zip(found.values(), gaps.values())]
    assert np.ptp(ends, 0).max() < 30 and ends[0][1] - ends[0][0] > 1000 and ends[0][3] - ends[0][2] < 30, ends


def test_a_stage_has_one_colour_whoever_is_beside_it(tmp_path):
    fid.save_chart(path := str(tmp_path / "chart.png"), {"loss": {"post": [(1, 2.0), (2, 1.0)]}}, "words")
    assert (np.asarray(Image.open(path))[:600, -40:] == 255).all()                # its name is not cut
    alone, both = fid.colours_of(["post"]), fid.colours_of(["pretrain", "mid", "post"])
    assert alone["post"] == both["post"] and len({*both.values()}) == 3


def test_of_a_long_trajectory_nine_states_are_drawn_where_most_changes(tmp_path, monkeypatch):
    """The first state and the end are among them; of a short one all are."""
    monkeypatch.setattr(fid, "save_sheet", lambda path, rows, caption, header, breaks: drawn.append((rows, header)) or said.append(caption))
    drawn, said, x = [], [], torch.arange(17.0).view(17, 1, 1, 1, 1).expand(-1, 2, 1, 8, 8)
    fid.save_trajectory("", x, torch.linspace(1, 0, 17), {"mid": lambda x, level: x})
    fid.save_trajectory("", torch.cat([x[:1]] * 8 + [x[:9]]), torch.linspace(1, 0, 17), {})
    fid.save_trajectory("", x[:8], torch.linspace(1, 0, 8), {}, names=["class 7"])                  # data of one class
    (rows, header), (late, _), (short, _) = drawn
    assert [len(images) for _, images, *_ in rows] == [9] * 2 and header[1:] == ["noise\n1", *"0.88 0.75 0.62 0.5 0.38 0.25 0.12".split(), "the end\n0"]
    assert late[0][1][:, 0, 0, 0].tolist() == [*range(9)] and len(short[0][1]) == 8
    assert [rows[0][0], short[0][0]] == ["the teacher's trajectory", "the teacher's trajectory\nclass 7"]
    assert rows[1][0] == "student after mid-training\nin one step" and rows[1][2:] == tuple(f"error {e:.2f}" for e in range(16, -1, -2)) and len(rows[0]) == 2
    assert said[0].startswith("Mid-training teaches the jump between any two states of the teacher's trajectory\nFirst row: the trajectory, from noise to an image (9 of 17 states; the others look like their neighbours).\nBelow: each net's answer to each state.\nError: ")
    assert "root mean square distance from the end; two ends are 0.00 apart.\nMean error in the first column, of 2 noises: student after mid-training 16.00. Shown: the noise whose error in the last row is the median." in said[0] and "divided by sigma" not in said[0] and "mean of all images" not in said[0]
    fid.save_trajectory("", x, torch.linspace(80, 0, 17), {"teacher": lambda x, level: x, "mid": lambda x, level: x + 9, "post": lambda x, level: x - 1})
    assert said[-1].startswith("Mid-training teaches the jump from every state of the teacher's trajectory to its end\n")
    assert [row[2:3] for row in drawn[-1][0]] == [(), ("error 16.00",), ("error 7.00",)] and "divided by sigma" in said[-1] and "; the teacher's is nearly the mean of all images that this noisy one could have been.\nError" in said[-1] and said[-1].endswith("Post-training no longer aims at this end: not shown.")


def test_the_heading_of_scored_images_has_the_last_net_in_one_step_and_two_and_the_teacher(tmp_path, monkeypatch):
    """Whether mid-training gains, a run without it tells; whether post-training hurts, the table. Nets and scores as in rows and table."""
    said = []
    monkeypatch.setattr(fid, "MADE_BY", "")
    monkeypatch.setattr(fid, "save_sheet", lambda path, rows, caption, header, *more: said.append(caption) or labels.append([(label, *texts) for label, _, *texts in rows]) or heads.append(header))
    heads, shown, labels = [], [(name, steps, seeded(range(12))) for name in ("mid", "post") for steps in (1, 2)], []
    rows = [{"stage": "teacher, balanced labels", "1-step FID": "99.0", "8-step FID": "2.0"}, {"stage": "mid", "1-step FID": "5.0", "2-step FID": "-"},
            {"stage": "post", "1-step FID": "6.0 +- 1.0, min 5.0", "2-step FID": "3.0"}]
    fid.save_stages(str(tmp_path), shown, (), "\nSeed 0.", rows, 500)
    assert said[0] == ("after post-training: FID (lower is better) 6.00 in one step, 3.00 in two steps\n"
                       "In each column every net draws from the same noise. What looks alike can differ in score.\nFID, lower is better: Frechet distance of 500 samples to the data, in a classifier's features; with so few it is off, mostly high.\nOnly a run without mid-training tells whether it helps (docs/usage.md).\nPost-training makes scores worse in one step.\nSeed 0.")
    assert labels == [[("mid-training alone\n1 step", "5.0", "-"), ("after post-training\n1 step", "6.0 +- 1.0, min 5.0", "3.0")]]     # two look like one
    assert heads == [["", *[""] * 12, "FID of this row", "FID in two steps"]]
    fid.save_stages(str(tmp_path), shown, (), "", [{"stage": "teacher", "8-step FID": "2.0"}])
    fid.save_stages(str(tmp_path), shown, (), "A heading\nand more", rows)
    nearly = [{"stage": "mid", "1-step FID": "5.0", "2-step FID": "3.0"}, {"stage": "post", "1-step FID": "5.4", "2-step FID": "3.2"}]
    assert fid.headline(nearly) == "after post-training: FID (lower is better) 5.40 in one step, 3.20 in two steps"
    for one, two, words in ("5.6", "3.4", "\nPost-training makes scores worse in one step and in two steps."), ("5.0", "3.4", "\nPost-training makes scores worse in two steps."), ("5.4", "3.2", "(docs/usage.md)."):
        assert fid.of_scores([nearly[0], nearly[1] | {"1-step FID": one, "2-step FID": two}], 500).endswith(words)           # in either; within 10 % it is not told
    assert fid.headline([{"stage": "teacher", "1-step FID": "9.0", "8-step FID": "2.0"}]) == ""
    assert fid.headline([{"stage": "teacher", "8-step FID": "2.0"}]) == ""
    alone = {"stage": "alone", "1-step FID": "1.48", "2-step FID": "9.00"}
    assert fid.headline([*nearly, alone]) == "Mid-training hurts in one step, helps in two steps: FID 5.40 / 3.20 with it, 1.48 / 9.00 without (one seed)"
    fid.save_stages(str(tmp_path), shown, (), fid.beside("FID", {"one step": 1.0}, {"one step": 2.0}, "one seed", "") + "\nand more", rows)        # claims.py: a title, no scope
    assert said.pop().startswith("Mid-training helps in one step: FID 1.00 with it, 2.00 without (one seed)\nIn each column")
    for without, effect in (5.9, "changes little"), (5.0, "changes little"), (6.1, "helps"), (4.9, "hurts"):                # within 10 %
        assert f"Mid-training with it {effect} in one step" in fid.headline([*nearly, alone | {"1-step FID": f"{without}"}], "with it ")
    assert fid.headline([nearly[1], alone]).startswith("after post-training: FID (lower is better) 5.40 in one step")      # the student had none either
    assert "mid-training" not in fid.of_scores([nearly[1], alone], 500)
    assert "Only a run without mid-training tells" in fid.of_scores(nearly, 500) and "Only a run" not in fid.of_scores([*nearly, alone], 500)
    assert said[1].startswith("What every net draws from the same noises\nIn each column") and said[2].startswith("A heading\nIn each column") and said[2].endswith("and more")


def test_a_picture_with_scores_stays_until_there_are_others(tmp_path, monkeypatch):
    """An evaluation that is stopped before its end leaves what the last one has drawn."""
    drawn = []
    monkeypatch.setattr(fid, "save_sheet", lambda path, *more: drawn.append(path) or pathlib.Path(path).touch())
    shown = [("mid", 1, seeded(range(12)))]
    for table in (), (), [{"stage": "mid", "1-step FID": "1.00"}]:
        fid.save_stages(str(tmp_path), shown, table=table)
    (tmp_path / "results.md").touch()
    fid.save_stages(str(tmp_path), shown)
    fid.save_stages(str(tmp_path), [("init_x", 1, seeded(range(12)))])
    assert [pathlib.Path(path).name for path in drawn] == ["stages.png"] * 3 + ["stages_init_x.png"]


def test_a_caption_names_seed_and_sizes(monkeypatch):
    import train_cmt_cifar
    import train_mf_imagenet256
    losses = dict(huber="pixels", elatentlpips="VGG features", edges="edges")                     # of a fork
    found = [("teacher", torch.nn.Linear(999, 1000), {}), ("mid", torch.nn.Linear(1999, 1000), dict(cfg=dict(batch=8), step=1)), ("post", torch.nn.Linear(1999, 1000), {})]
    assert fid.about(train_mf_imagenet256.Config(seed=7), found) == (
        "with a loss on velocities \nStudents: Mean Flows. Mid-training learns the mean velocity between any two states of a teacher's trajectory.\nPost-training learns it from images. Students are 2.0 times as large as the teacher.\nSeed 7.")
    for loss, words in losses.items():
        found[1][2]["cfg"]["loss"] = loss
        more = " The paper compares by features, not by pixels." * (words == "pixels")
        assert fid.about(train_cmt_cifar.Config(seed=7), found[1:]) == (
            f"with a loss on {words} \nStudents: consistency models. Mid-training learns the jump from any state of a teacher's trajectory to its end.\nPost-training learns, from images, to give one answer at two close noise levels.{more}\nSeed 7.")
    assert fid.about(train_cmt_cifar.Config(seed=7), found[2:]) == "\nSeed 7."
    cfg = dict(lr=1e-4, q=4096, out="x", mid="cmt", batch=8)
    rival = [("post", found[0][1], dict(cfg=cfg, step=1)), ("alone", found[0][1], dict(step=1, cfg=cfg | dict(post="vanilla", out="y", mid="none")))]
    assert fid.about(train_cmt_cifar.Config(seed=7), rival) == "\nWithout mid-training: post-training alone, on 8 images (with it: as many pairs and images).\nSeed 7."                # what it was trained by
    rival[1][2]["cfg"] |= dict(lr=1e-4, pretrain="fm")
    for step, words in (3, "post-training alone"), (20, "flow matching on 160 images, then post-training"):                        # not begun, or from a file; trained here
        monkeypatch.setattr(train_mf_imagenet256.nets, "finished", lambda path: {"step": 20, "seconds": 1, "cfg": {"batch": 8, "stage": "pretrain"}} if step == 20 else None)
        more = ".\nWith it: 8 pairs and images." if step == 20 else " (with it: as many pairs and images)."
        assert fid.about(train_mf_imagenet256.Config(seed=7), rival) == f"\nWithout mid-training: {words}, on 8 images{more}\nSeed 7."
    made = [("teacher", found[0][1], dict(step=2, cfg=cfg)), *rival]                                         # two trainings before the student's
    assert "on 8 images.\nWith it: a teacher on 16 images, then 8 pairs and images.\n" in fid.about(train_mf_imagenet256.Config(data="x"), made)


def test_a_colour_means_one_thing_in_every_chart():
    """Of a run, of two trainings beside each other, of Mean Flow's roads; names without a meaning take what is left."""
    run = fid.colours_of([*fid.SPOKEN.values()])
    two = fid.colours_of(["mid- and post-training, 1 step", "without mid-training, 1 step", "teacher, 16 steps"])
    roads = fid.colours_of(["from scratch", "from flow matching", "CMT + Mean Flow"])
    assert [run["pre-training"], run["mid-training"]] == [two["teacher, 16 steps"], two["mid- and post-training, 1 step"]]
    assert [two["without mid-training, 1 step"], run["mid-training"]] == [roads["from scratch"], roads["CMT + Mean Flow"]]
    assert len({*run.values(), *two.values(), *roads.values()}) == 6
    mixed = fid.colours_of([*"abcd", "mid", "flow matching, CMT, v", *"efg"])
    assert mixed["mid"] == run["mid-training"] and mixed["flow matching, CMT, v"] == roads["from flow matching"] and len({*mixed.values()}) == 6


def test_every_stage_has_an_axis_of_its_own(tmp_path, monkeypatch):
    """At full size the VGG sees ten times the images of the other stages, which would be left a tenth of the width."""
    rows = [dict(stage=s, images=k, loss=1.0, grad=1.0) for s, most in (("vgg", 9000), ("mid", 900), ("post", 600)) for k in (most // 4, most // 2, most)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in rows))
    drawn = {}
    monkeypatch.setattr(fid, "save_chart", lambda path, panels, caption, columns:
                        drawn.update({**panels, "caption": caption, "columns": columns}))
    cfg = importlib.import_module("train_cmt_imagenet").Config(out=str(tmp_path))
    save_curve(cfg)
    assert drawn["VGG: loss"] == {"VGG": [(2250, 1.0), (4500, 1.0), (9000, 1.0)]}
    assert drawn["mid-training: loss"] == drawn["mid-training: gradient norm"] == {"mid-training": [(225, 1.0), (450, 1.0), (900, 1.0)]}
    assert drawn["post-training: gradient norm"] == {"post-training": [(150, 1.0), (300, 1.0), (600, 1.0)]}
    assert [*drawn][:6] == [f"{s}: {y}" for y in ("loss", "gradient norm") for s in ("VGG", "mid-training", "post-training")] and drawn["columns"] == 3
    assert "lower is better" not in drawn["caption"]
    script = importlib.import_module("train_cmt_imagenet")
    monkeypatch.setitem(script.ABOUT, "post ecd", "stage 9, mine: by Heun: it rises")
    for post, words in ("ect", script.ABOUT["post"].partition(": ")[2]), ("ecd", "by Heun: it rises"):           # words of a method
        save_curve(dataclasses.replace(cfg, post=post))
        assert f"; in post-training: {words}. Each panel" in drawn["caption"]
    scores = {"stage": "teacher, balanced labels", "8-step FID": "2.00"}, {"stage": "mid", "1-step FID": "5.00 +- 1.00, min 4.00"}, {"stage": "post", "1-step FID": "-"}
    save_curve(cfg, scores)
    assert drawn["caption"].startswith("Loss and gradient norm of each stage; only scores tell what is better\n")
    assert drawn["caption"].endswith(" Each point is a mean since the last one. Mid-training alone: FID (lower is better) 5.00 in one step; 50,000 samples each.")



def test_slow_samplers_draw_fewer_images():
    def slow(seeds):
        time.sleep(0.03)
        return seeded(seeds)
    assert len(draw_seeds(slow, range(64), seconds=0.05)) in (4, 8) and torch.equal(draw_seeds(seeded, range(30), 5, 99), seeded(range(30)))


def test_metrics_have_every_step_once_after_a_kill(tmp_path):
    """What a run logged beyond its checkpoint goes when it resumes, and so does a line that the kill has cut."""
    rows = [dict(stage=s, step=k, images=k) for s in ("pretrain", "mid") for k in (1, 2, 3, 4)] + [dict(stage="eval", net="mid")]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(m) + "\n" for m in rows) + '{"stage": "mid", "st')
    import train_cmt_cifar
    mid, post = (train_cmt_cifar.Config(stage=s, steps=n, out=str(tmp_path)) for s, n in (("mid", 9), ("post", 7)))
    fid.begin_stage(mid, dict(step=2), "")
    assert [m.get("step") for m in fid.read_metrics(str(tmp_path))] == [1, 2, 3, 4, 1, 2, None]
    assert fid.begin_stage(post, dict(step=0), "1 GB") == "post: begins, 7 steps, 1 GB"
    made = json.loads((tmp_path / "config.json").read_text())
    for knobs, unread in (mid, {"P_mean", "P_std", "post", "q", "stair"}), (post, {"nfe", "loss", "trajectories"}):      # what a stage reads
        assert made[knobs.stage] == dict(script="train_cmt_cifar.py", **{k: v for k, v in vars(knobs).items() if k not in unread})
    with open(path, "a") as f:
        f.write('{"stage": "post"')
    fid.begin_stage(post, dict(step=0), "")
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_durations_are_for_people():
    assert [fid.duration(s) for s in (0, 89.6, 150, 9000, 8.64e5)] == ["0 s", "90 s", "2.5 min", "2.5 h", "10.0 days"]


def test_tables_are_markdown():
    assert fid.table([dict(stage="mid", steps=3)]) == "| stage | steps |\n| --- | --- |\n| mid | 3 |"


def test_images_are_drawn_in_batches():
    sizes = []
    x = fid.draw_seeds(lambda seeds: sizes.append(len(seeds)) or seeded(seeds), range(10), batch=4)
    assert sizes == [4, 4, 2] and torch.equal(x, seeded(range(10)))


def test_what_the_first_process_refuses_ends_all_with_its_exit_code(monkeypatch):
    """Not as a crash of the others, who would only see that it has gone."""
    sent = []
    monkeypatch.setattr(fid, "patient_group", lambda: "all")
    monkeypatch.setattr(fid.dist, "broadcast_object_list", lambda answer, *_: sent.append([*answer]) or answer.__setitem__(0, sent[0][0]))
    for rank in (0, 1):
        monkeypatch.setattr(fid, "processes", lambda: (rank, 2))
        with pytest.raises(SystemExit) as stop:
            fid.from_first(lambda: fid.fail(2, "no"))
        assert stop.value.code == 2
    assert isinstance(sent[0][0], SystemExit) and sent[1] == [None]
