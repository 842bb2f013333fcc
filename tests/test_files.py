"""Other people's files: a table of (kind, member, what must happen), for every reader, folder and zip."""
import io
import json
import os
import shutil
import struct
import sys
import types
import zipfile
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import nets
import train_cmt_cifar
import train_cmt_imagenet
import train_mf_imagenet256
import train_t2i_coco

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 5, 3), np.uint8)
GREY = RNG.integers(0, 256, (6, 5, 1), np.uint8)
ALPHA = RNG.integers(0, 256, (6, 5, 1), np.uint8)
WIDE = RNG.integers(0, 65536, (6, 5), np.uint16)
PALETTE = np.arange(30, dtype=np.uint8).reshape(6, 5)                     # of COLOURS
COLOURS = RNG.integers(0, 256, (256, 3), np.uint8)
RED = np.broadcast_to(np.uint8([200, 10, 30]), (6, 5, 3))


def saved(pixels, form="PNG", mode=None, **options):
    """Bytes of a file. pixels: an image, or an array of uint8 (H, W, C), of which one channel is grey."""
    if isinstance(pixels, np.ndarray):
        pixels = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    file = io.BytesIO()
    (pixels.convert(mode) if mode else pixels).save(file, form, **options)
    return file.getvalue()


def palette(**options):
    image = Image.fromarray(PALETTE).convert("P")
    image.putdata(PALETTE.flatten().tolist())
    image.putpalette(COLOURS.tobytes())
    return saved(image, **options)


def png(width, depth, colour, row, key=b""):
    """A PNG of one row, written byte by byte: Pillow writes none of these."""
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    key = chunk(b"tRNS", key) if key else b""
    body = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + head + key + body + chunk(b"IEND", b"")


def tiff(white, bits, body, order="<"):
    """A grey TIFF of two pixels; white 0: zero is white. order: of the bytes in a number."""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: white, 273: 122, 277: 1, 278: 1, 279: len(body)}
    rows = b"".join(struct.pack(order + "HHIHH", t, 3, 1, value, 0) for t, value in tags.items())
    return {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, 9) + rows + bytes(4) + body


def over_white(pixels, alpha):
    a = alpha / 255
    return np.round(pixels * a + 255 * (1 - a))


def frames(form, mode="RGB", **options):
    first, second = (Image.fromarray(x).convert(mode) for x in (np.ascontiguousarray(RED), 255 - RED))
    return saved(first, form, save_all=True, append_images=[second], **options)


def flipped(data, at=-40):
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1:]


exact, about = 0, 1                                                       # grey levels that it may differ by
keyed = COLOURS[PALETTE].copy()
keyed[PALETTE == 7] = 255
bits = np.asarray(Image.fromarray(GREY[..., 0]).convert("1"))[..., None] * 255
FAINT = np.repeat([0, 128, 255], 10).astype(np.uint8)
PICTURES = [  # kind, member, ending, bytes, (what a person sees, tolerance) or a text of the refusal
    ("mode", "1", "png", saved(GREY, mode="1"), (bits, exact)),
    ("mode", "L", "png", saved(GREY), (GREY, exact)),
    ("mode", "L, one colour is clear", "png", saved(GREY, transparency=int(GREY[0, 0, 0])),
     (np.where(GREY == GREY[0, 0], 255, GREY), exact)),
    ("mode", "LA", "png", saved(np.concatenate([GREY, ALPHA], 2)), (over_white(GREY, ALPHA), about)),
    ("mode", "LA of a TIFF", "tif", saved(np.concatenate([GREY, ALPHA], 2), "TIFF"),
     (over_white(GREY, ALPHA), about)),
    ("mode", "P", "png", palette(), (COLOURS[PALETTE], exact)),
    ("mode", "P of a GIF", "gif", palette(form="GIF"), (COLOURS[PALETTE], exact)),
    ("mode", "P of a BMP", "bmp", palette(form="BMP"), (COLOURS[PALETTE], exact)),
    ("mode", "P of a TIFF", "tiff", palette(form="TIFF"), (COLOURS[PALETTE], exact)),
    ("mode", "P, one colour is clear", "png", palette(transparency=7), (keyed, exact)),
    ("mode", "P, one colour is clear, GIF", "gif", palette(form="GIF", transparency=7), (keyed, exact)),
    ("mode", "P, faint colours", "png", palette(transparency=FAINT.tobytes()),
     (over_white(COLOURS[PALETTE], FAINT[PALETTE][..., None]), about)),
    ("mode", "RGB", "png", saved(RGB), (RGB, exact)),
    ("mode", "RGB, one colour is clear", "png", saved(RGB, transparency=tuple(map(int, RGB[2, 2]))),
     (np.where((RGB == RGB[2, 2]).all(2, keepdims=True), 255, RGB), exact)),
    ("mode", "RGBA", "png", saved(np.concatenate([RGB, ALPHA], 2)), (over_white(RGB, ALPHA), about)),
    ("mode", "RGBA, all opaque", "png", saved(np.concatenate([RGB, 0 * ALPHA + 255], 2)), (RGB, exact)),
    ("mode", "RGBA of a WebP", "webp",
     saved(np.concatenate([RGB, ALPHA], 2), "WEBP", lossless=True, exact=True),
     (over_white(RGB, ALPHA), about)),
    ("mode", "CMYK", "tif", saved(RGB, "TIFF", "CMYK"), (RGB, about)),
    ("mode", "CMYK of a JPEG", "jpg", saved(RED, "JPEG", "CMYK", quality=100), (RED, 4)),
    ("mode", "YCbCr", "tif", saved(RED, "TIFF", "YCbCr"), (RED, 2)),
    ("mode", "I;16", "png", saved(Image.fromarray(WIDE)), (np.round(WIDE / 257)[..., None], exact)),
    ("mode", "I;16 of a TIFF", "tif", saved(Image.fromarray(WIDE), "TIFF"),
     (np.round(WIDE / 257)[..., None], exact)),
    ("mode", "I;16B", "tif", tiff(1, 16, b"\x01\x02\xff\xff", ">"), ([[[1], [255]]], exact)),
    ("mode", "I of a PGM", "ppm", b"P5 2 1 65535\n\x01\x02\xff\xff", ([[[1], [255]]], exact)),
    ("mode", "12 bits of a PGM", "ppm", b"P5 2 1 4095\n\x00\x00\x0f\xff", ([[[0], [255]]], exact)),
    ("mode", "2 bits", "png", png(4, 2, 0, b"\x1b"), ([[[0], [85], [170], [255]]], exact)),
    ("mode", "RGB of 16 bits", "png", png(1, 16, 2, b"\x01\x80\x80\x80\xff\xff"), ([[[1, 128, 255]]], about)),
    ("mode", "LA of 16 bits", "png", png(1, 16, 4, b"\x80\x12\x40\x34"), ([[[223] * 3]], about)),
    ("mode", "zero is white", "tif", tiff(0, 8, b"\x00\xff"), ([[[255], [0]]], exact)),
    ("mode", "zero is white, 16 bits", "tif", tiff(0, 16, b"\x00\x00\xff\xff"), "mode I;16"),
    ("mode", "4 bits, one is clear", "png", png(2, 4, 0, b"\x3a", b"\0\3"), "mode L"),
    ("mode", "16 bits, one is clear", "png", png(1, 16, 0, b"\1\2", b"\1\2"), "mode I;16"),
    ("mode", "RGB of 16 bits, one is clear", "png", png(1, 16, 2, bytes(6), bytes(6)), "mode RGB"),
    ("mode", "I, whose range nobody knows", "tif", saved(Image.fromarray(WIDE.astype(np.int32)), "TIFF"),
     "mode I .* save it as"),
    ("mode", "F", "tif", saved(Image.fromarray(WIDE.astype(np.float32)), "TIFF"), "mode F .* save it as"),
    ("mode", "LAB", "tif", saved(Image.new("LAB", (5, 6)), "TIFF"), "mode LAB .* save it as"),
    ("frames", "GIF", "gif", frames("GIF"), (RED, 2)),
    ("frames", "WebP", "webp", frames("WEBP", lossless=True), (RED, exact)),
    ("frames", "PNG", "png", frames("PNG"), (RED, exact)),
    ("frames", "TIFF", "tif", frames("TIFF"), (RED, exact)),
    ("ending", "JPEG with RGB", "jpeg", saved(RED, "JPEG", quality=100), (RED, 4)),
    ("ending", "a PNG named .jpg", "jpg", saved(RGB), (RGB, exact)),
    *[("ending", f"{upper}, {form}", upper, saved(RGB, form), (RGB, exact)) for form, upper in (
        ("PNG", "PNG"), ("BMP", "Bmp"), ("TIFF", "TIF"), ("TIFF", "TIFF"), ("PPM", "PPM"))],
    *[("ending", f"{upper}, {form}", upper, saved(RED, form), (RED, 9)) for form, upper in (
        ("JPEG", "JPG"), ("JPEG", "Jpeg"), ("WEBP", "WEBP"), ("GIF", "GIF"))],
    ("damage", "nothing in it", "png", b"", "not a picture"),
    ("damage", "a web page", "jpg", b"<html>not found</html>", "not a picture"),
    ("damage", "a program for a printer", "jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
     "not a picture"),
    ("damage", "a changed bit", "png", flipped(saved(RGB)), "broken|damaged|CRC|stream"),
    ("damage", "a changed bit, not packed", "png", flipped(saved(RGB, compress_level=0)), "broken|stream"),
    *[("damage", f"{form}, cut", "png", data[:len(data) // 2], "truncated|decoder") for form, data in (
        (form, saved(np.tile(RGB, (9, 9, 1)), form)) for form in fid.FORMATS)],
]
TURNS = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
         5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1),
         7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}
for k, turn in TURNS.items():                                             # EXIF's orientations
    note = Image.Exif()
    note[274] = k
    for form, ending in (("PNG", "png"), ("TIFF", "tif"), ("WEBP", "webp")):
        data = saved(RGB, form, exif=note, **dict(lossless=True) if form == "WEBP" else {})
        PICTURES.append(("exif", f"{form} {k}", ending, data, (turn(RGB), exact)))
    PICTURES.append(("exif", f"JPEG {k}", "jpg", saved(RED, "JPEG", quality=100, exif=note), (turn(RED), 4)))


def as_folder_and_zip(files, root="."):
    """Both forms of {name: bytes}; a name with "/" at its end is an empty folder."""
    with zipfile.ZipFile(f"{root}/set.zip", "w") as z:
        for name, data in files.items():
            z.writestr(name, data)
            path = Path(root, "set", name)
            path.mkdir(parents=True) if name.endswith("/") else path.parent.mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                path.write_bytes(data)
    return [f"{root}/set", f"{root}/set.zip"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def one_line(error, *texts):
    assert "\n" not in str(error.value) and all(text in str(error.value) for text in texts), error.value


# ---- pictures ------------------------------------------------------------------------------------
def table(arguments, rows):
    return pytest.mark.parametrize(arguments, rows, ids=[f"{kind}: {member}" for kind, member, *_ in rows])


@table("kind, member, ending, data, expected", PICTURES)
def test_a_picture_is_read_as_a_person_sees_it_or_refused_by_name(kind, member, ending, data, expected):
    name = f"a/one.{ending}"
    for path in as_folder_and_zip({name: data}):
        readers = [lambda: torch.cat(list(fid.read_images(path))), lambda: fid.load_images(path)]
        names, read = fid.list_pictures(path)
        assert names == [name]
        if isinstance(expected, str):
            for reader in (lambda: read(name), lambda: fid.check_pictures(names, read, path), *readers):
                with pytest.raises(fid.DataError, match=expected) as error:
                    reader()
                one_line(error, f"{path}/{name}")
            continue
        seen, tolerance = np.asarray(expected[0]), expected[1]
        assert read(name).dtype == np.uint8 and read(name).shape == seen.shape
        assert np.abs(read(name).astype(int) - seen).max() <= tolerance
        assert all(np.array_equal(reader()[0].permute(1, 2, 0), read(name)) for reader in readers)
        small = np.asarray(fid.square(fid.rgb(read(name)), 1))
        assert np.array_equal(fid.load_images(path, 1)[0].permute(1, 2, 0), small)


def test_encoders_may_ask_for_a_picture_as_it_is_stored():
    note = Image.Exif()
    note[274] = 6
    for path in as_folder_and_zip({"a.png": saved(RGB, exif=note)}):
        read = fid.list_pictures(path)[1]
        assert read("a.png", exif=False).shape == (6, 5, 3) and read("a.png").shape == (5, 6, 3)
        assert np.array_equal(read("a.png", exif=False), RGB)


def test_plain_pictures_are_what_pillow_gives_and_a_writable_copy():
    for form in ("PNG", "JPEG", "BMP", "PPM", "WEBP"):
        for pixels in (RGB, GREY):
            data = saved(pixels, form)
            plain = np.asarray(Image.open(io.BytesIO(data)))
            x = fid.open_picture(data, "x")
            assert np.array_equal(x, plain.reshape(x.shape)) and x.flags.writeable


# ---- names ---------------------------------------------------------------------------------------
ONE = saved(RGB)
NAMES = [  # kind, member, files, names that are read, what the line says
    ("left out", "of a Mac",
     {"a.png": ONE, "._a.png": b"", ".DS_Store": b"", "__MACOSX/._a.png": b"", "__MACOSX/b.png": ONE},
     ["a.png"], "1 pictures; left out: 4 files"),
    ("left out", "of Windows and editors",
     {"c/a.JPG": ONE, "Thumbs.db": b"", ".ipynb_checkpoints/a.png": ONE, "c/.a.png.swp": b""},
     ["c/a.JPG"], "1 pictures; left out: 3 files"),
    ("left out", "texts and what is not read",
     {"a.png": ONE, "b.png": ONE, "README.md": b"", "list.txt": b"", "c.heic": b""}, ["a.png", "b.png"],
     "left out: 3 files that are hidden or no pictures, such as ['README.md', 'c.heic', 'list.txt']"),
    ("silent", "dataset.json belongs to them", {"a.png": ONE, "dataset.json": b"{}"}, ["a.png"], ""),
    ("order", "by name, whatever the case of the ending",
     {f"{n}.{e}": ONE for n, e in zip("cabfed", ("PNG", "png", "Jpg", "GIF", "tiff", "ppm"))},
     ["a.png", "b.Jpg", "c.PNG", "d.ppm", "e.tiff", "f.GIF"], ""),
    ("order", "a dot before the name", {"./b/x.png": ONE, "./a/x.png": ONE}, ["a/x.png", "b/x.png"], ""),
    ("empty", "a folder named like a picture", {"x.png/": b"", "a.png": ONE}, ["a.png"], ""),
]


@table("kind, member, files, expected, line", NAMES)
def test_what_is_no_picture_is_counted_in_one_line(kind, member, files, expected, line, capsys):
    for path in as_folder_and_zip(files):
        names, read = fid.list_pictures(path)
        assert [os.path.normpath(n) for n in names] == expected
        assert all(read(n).shape == (6, 5, 3) for n in names)
        assert len(fid.load_images(path)) == len(expected)                # listed again: the line comes once
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == bool(line) and line in err and err.startswith(path * bool(line))


def test_where_no_picture_is_the_path_and_what_was_seen_are_named():
    for path in as_folder_and_zip({"notes.txt": b"", ".hidden.png": ONE}):
        for reader in (fid.list_pictures, fid.load_images, fid.image_source):
            with pytest.raises(fid.DataError) as error:
                reader(path)
            one_line(error, path, "notes.txt", ".jpeg")
    Path("bad.zip").write_bytes(b"PK\x03\x04 no")
    Path("one.jpg").write_bytes(ONE)
    for path in ("absent", "absent.zip", "bad.zip", "one.jpg"):
        with pytest.raises(fid.DataError, match=path) as error:
            fid.list_pictures(path)
        one_line(error)


@pytest.mark.parametrize("names", [["a.png", "b.png", "a.png"], ["a/1.png", "b\\2.png"]], ids=["twice", "backslash"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_in_a_zip_that_would_lose_a_picture_or_a_class_are_refused(names):
    with zipfile.ZipFile("set.zip", "w") as z:
        for name in names:
            z.writestr(name, ONE)
    for reader in (fid.list_pictures, fid.load_images, lambda path: fid.read_labels(path, names)):
        with pytest.raises(fid.DataError, match="twice or has a backslash") as error:
            reader("set.zip")
        one_line(error, "set.zip", repr(names[-1]))


def test_lines_and_tables_hold_any_name(capfd, monkeypatch):
    monkeypatch.setattr(fid, "save_stages", lambda *a, **k: None)
    fid.show("data/\udce9", sys.stdout)
    fid.save_results(types.SimpleNamespace(out=".", samples=8, data="own"), [dict(stage="post")], "of --data \udce9", ())
    assert "udce9" in capfd.readouterr().out and "udce9" in Path("results.md").read_text()


def test_links_are_followed_but_not_in_circles_and_broken_ones_are_named():
    as_folder_and_zip({"b/1.png": ONE})
    Path("far/deep").mkdir(parents=True)
    Path("far/deep/2.png").write_bytes(ONE)
    Path("far/back").symlink_to("../set")                                # a circle of two links
    Path("set/a").symlink_to("../far")
    Path("set/round").symlink_to(".")
    Path("set/3.png").symlink_to("../far/deep/2.png")
    Path("set/.#lock").symlink_to("nowhere")                             # an editor's, hidden
    names, read = fid.list_pictures("set")
    assert names == ["3.png", "a/deep/2.png", "b/1.png"] and all(read(n).shape == (6, 5, 3) for n in names)
    for name in ("c", "4.png", "itself"):
        Path("set", name).symlink_to("itself" if name == "itself" else "nowhere")
        with pytest.raises(fid.DataError) as error:
            fid.list_pictures("set")
        one_line(error, f"set/{name}", "link")
        Path("set", name).unlink()


def test_lines_come_from_the_first_process_or_go_where_a_script_wants_them(monkeypatch, capsys):
    path, _ = as_folder_and_zip({"a.png": ONE, "b.txt": b""})
    monkeypatch.setenv("RANK", "1")
    fid.list_pictures(path)
    assert capsys.readouterr().err == ""
    lines = []
    monkeypatch.setattr(fid, "say", lines.append)
    fid.list_pictures(path)
    assert len(lines) == 1


def test_latents_are_listed_and_read_too():
    file = io.BytesIO()
    np.save(file, np.ones((8, 2, 2), np.float32))
    files = {"0/a.npy": file.getvalue(), "0/b.npy": b"no", "0/c.txt": b""}
    for name, number in (("0/nan.npy", np.nan), ("0/inf.npy", -np.inf)):
        file = io.BytesIO()
        np.save(file, np.array([1, number], np.float16))
        files[name] = file.getvalue()
    for path in as_folder_and_zip(files):
        names, read = fid.list_pictures(path, (".npy", ".pt"))
        assert names == ["0/a.npy", "0/b.npy", "0/inf.npy", "0/nan.npy"] and read("0/a.npy").shape == (8, 2, 2)
        for name in names[1:]:
            with pytest.raises(fid.DataError, match=name) as error:
                read(name)
            one_line(error)


# ---- labels --------------------------------------------------------------------------------------
def listed(labels, top=""):
    return {f"{top}dataset.json": json.dumps({"labels": labels}).encode()}


def these(*names):
    return {name: ONE for name in names}


ABC, GIVEN = ["a.png", "b.png", "c.png"], [["a.png", 1], ["b.png", 0], ["c.png", 1]]
FLAT, CHUNKS = these(*ABC), these("00000/a.png", "00000/b.png", "00001/c.png")
LABELS = [  # kind, member, files, labels, None or the text of the refusal; what the line says
    ("list", "EDM's", {**FLAT, **listed(GIVEN)}, [1, 0, 1], "2 classes of 1 to 2 pictures"),
    ("list", "in chunks, not classes",
     {**CHUNKS, **listed([["00000/a.png", 1], ["00000/b.png", 0], ["00001/c.png", 1]])},
     [1, 0, 1], "2 classes"),
    ("list", "null: chunks are no classes", {**CHUNKS, **listed(None)}, None, "no labels"),
    ("list", "of other order, with a mark of byte order",
     {**FLAT, "dataset.json": b"\xef\xbb\xbf" + listed(GIVEN[::-1])["dataset.json"]}, [1, 0, 1], "2 classes"),
    ("list", "elsewhere, the only one", {**these(*(f"own/{n}" for n in ABC)), **listed(GIVEN, "own/")},
     [1, 0, 1], "own/dataset.json: 2 classes"),
    ("list", "elsewhere, two", {**these("x/a.png", "y/b.png"), **listed(GIVEN, "x/"), **listed(GIVEN, "y/")},
     "which is meant, x/dataset.json or y/", ""),
    ("list", "at the root and elsewhere", {**FLAT, **listed(GIVEN), **listed([], "x/")}, [1, 0, 1],
     "2 classes"),
    ("list", "elsewhere, of others", {**FLAT, **listed(GIVEN, "x/")}, "no label for a.png", ""),
    ("list", "a hidden one is none", {**FLAT, **listed(GIVEN, ".trash/")}, None, "no labels"),
    ("list", "with labels of absent pictures", {**FLAT, **listed([*GIVEN, ["x.png", 0]])}, [1, 0, 1],
     "1 labels of absent pictures, such as 'x.png'"),
    ("list", "of one class", {**FLAT, **listed([[n, 0] for n in ABC])}, [0, 0, 0],
     "1 classes of 3 to 3 pictures"),
    ("list", "a picture twice", {**FLAT, **listed([*GIVEN, ["a.png", 0]])},
     "1 pictures have a second label", ""),
    ("list", "of only some", {**FLAT, **listed(GIVEN[1:])}, "no label for a.png .* nor for 0 others", ""),
    ("list", "of none", {**FLAT, **listed([])}, "no label for a.png .* nor for 2 others", ""),
    *[("label", member, {**FLAT, **listed([["a.png", label], *GIVEN[1:]])},
       f"no label for a.png .found {shown}", "") for member, label, shown in (
        ("a fraction", 1.5, "1.5"), ("whole, but no integer", 1.0, "1.0"), ("text", "1", "'1'"),
        ("negative", -1, "-1"), ("boolean", True, "True"), ("null among others", None, "None"),
        ("nested", [0, 1], r"\[0, 1\]"), ("an object", {"k": 0}, "{'k'"),
        ("not a number", float("nan"), "nan"), ("endless", float("inf"), "inf"))],
    ("label", "a gap", {**FLAT, **listed([["a.png", 0], ["b.png", 3], ["c.png", 1]])},
     "3 labels from 0 to 3; renumber them 0 to 2", ""),
    ("label", "from 1", {**FLAT, **listed([["a.png", 1], ["b.png", 2], ["c.png", 1]])},
     "2 labels from 1 to 2; renumber them 0 to 1", ""),
    ("label", "beyond 64 bits", {**FLAT, **listed([["a.png", 10**30], *GIVEN[1:]])}, "renumber", ""),
    *[("form", member, {**FLAT, "dataset.json": text}, "dataset.json: ", "") for member, text in (
        ("no JSON", b"{labels"), ("nothing", b""), ("no labels", b"{}"), ("a list", b"[]"),
        ("a number", b'{"labels": 3}'), ("text", b'{"labels": "abc"}'),
        ("an object", b'{"labels": {"a.png": 0}}'), ("triples", b'{"labels": [["a.png", 0, 1]]}'),
        ("numbers for names", b'{"labels": [[1, 0]]}'),
        ("deep", b"[" * 100_000), ("bytes", b"\xff\xfe\xff"))],
    ("folders", "torchvision's, sorted as text", these("b/1.png", "10/1.png", "2/1.png", "2/2.png"),
     [0, 1, 1, 2], "3 classes of 1 to 2 pictures"),
    ("folders", "an empty one takes no number",
     {**these("a/1.png", "c/1.png"), "b/": b"", "d/x.txt": b""}, [0, 1],
     " to 1 pictures: a, c; left out: 2 folders without pictures, such as 'b'"),
    ("folders", "hidden ones are none", these("a/1.png", "c/1.png", ".c/1.png", "__MACOSX/1.png"), [0, 1],
     "2 classes of 1 to 1 pictures: "),
    ("folders", "below another", these("own/a/1.png", "own/c/1.png"), [0, 1], "2 classes"),
    ("folders", "a single one is no class", these("own/1.png", "own/2.png"), None, "no labels"),
    ("folders", "none", FLAT, None, "no labels"),
    ("folders", "pictures beside them", these("1.png", "a/1.png", "b/1.png"), "lie in '' and in 'b'", ""),
    ("folders", "pictures beneath them", these("a/1.png", "a/x/1.png", "b/1.png"),
     "lie in 'a/x' and in 'b'", ""),
    ("folders", "two levels", these("train/a/1.png", "train/b/1.png", "val/a/1.png"),
     "lie in 'train/a' and in 'val/a'", ""),
]


@table("kind, member, files, expected, line", LABELS)
def test_labels_are_right_or_refused_in_one_line(kind, member, files, expected, line, capsys):
    for path in as_folder_and_zip(files):
        names = fid.list_pictures(path)[0]
        capsys.readouterr()
        if isinstance(expected, str):
            with pytest.raises(fid.DataError, match=expected) as error:
                fid.read_labels(path, names)
            one_line(error, path)
            continue
        found, (out, err) = fid.read_labels(path, names), capsys.readouterr()
        assert not out and err.startswith(path) and err.count("\n") == 1 and line in err
        if expected is None:
            assert found is None
        else:
            labels, classes = found
            assert labels.dtype == torch.int64 and labels.tolist() == expected
            assert classes == max(expected) + 1


# ---- one look at every picture -------------------------------------------------------------------
def many(n=600):
    return {f"{i % 3}/{i:04d}.png": saved(np.full((4, 3, 3), i % 251, np.uint8)) for i in range(n)}


def stamp(path):
    return fid.check_pictures(*fid.list_pictures(path), path)


def test_the_stamp_is_of_contents_in_order_of_names(monkeypatch):
    files = many()
    folder, archive = as_folder_and_zip(files)
    first = stamp(folder)
    assert first.startswith("600 images, crc32 ")
    assert first == stamp(folder + "/") == stamp(os.path.abspath(folder)) == stamp(archive)
    shutil.copytree(folder, "copy")
    black = saved(np.zeros((4, 3, 3), np.uint8), compress_level=0)       # the first picture, packed otherwise
    Path("copy/0/0000.png").write_bytes(black)
    os.utime("copy/0/0000.png", (0, 0))
    assert stamp("copy") == first
    with monkeypatch.context() as patch:
        patch.setattr(fid, "ThreadPoolExecutor", lambda pool=fid.ThreadPoolExecutor: pool(1))
        assert stamp(folder) == first
    names = sorted(files)
    a, b = Path("copy", names[0]), Path("copy", names[1])
    for change in (lambda: a.write_bytes(saved(np.full((4, 3, 3), 9, np.uint8))),
                   lambda: a.write_bytes(saved(np.zeros((3, 4, 3), np.uint8))),                    # turned
                   lambda: (a.write_bytes(files[names[1]]), b.write_bytes(files[names[0]])),       # exchanged
                   a.unlink):
        change()
        assert stamp("copy") != first
        a.write_bytes(files[names[0]])
        b.write_bytes(files[names[1]])
    assert stamp("copy") == first                                         # mended: the run goes on


def test_files_of_one_size_and_time_that_were_exchanged_are_read_again():
    path, _ = as_folder_and_zip({f"{i}.bmp": saved(np.full((4, 3, 3), i, np.uint8), "BMP") for i in range(3)})
    names, read = fid.list_pictures(path)
    answers = []
    for k in range(2):
        [os.utime(f"{path}/{name}", (0, 0)) for name in names * (not k)]
        answers.append(fid.check_once(path, names, lambda k: read(names[k]), "out/checked.txt"))
        for a, b in ("0", "x"), ("1", "0"), ("x", "1"):
            os.replace(f"{path}/{a}.bmp", f"{path}/{b}.bmp")
    assert answers[0] != answers[1]


def test_the_first_damaged_picture_is_named_with_the_count():
    files = many()
    names = sorted(files)
    for k in (555, 99, 300):
        files[names[k]] = files[names[k]][:50]
    for path in as_folder_and_zip(files):
        for reader in (stamp, fid.load_images, lambda p: fid.load_images(p, 3)):
            with pytest.raises(fid.DataError) as error:
                reader(path)
            one_line(error, f"{path}/{names[99]}", "3 of 600 pictures")


def test_a_remedy_that_several_pictures_share_is_said_once_and_others_are_kept():
    odd = saved(Image.new("LAB", (5, 6)), "TIFF")
    for path in as_folder_and_zip({"a.tif": odd, "b.tif": odd, "c.png": saved(RGB)}):
        with pytest.raises(fid.DataError) as error:
            stamp(path)
        assert str(error.value).count("save it as an 8-bit RGB PNG") == 1 and "2 of 3 pictures cannot be used: save it" in str(error.value)
    for path in as_folder_and_zip({"a.tif": odd, "b.tif": saved(RGB)[:50], "c.png": saved(RGB)}):
        with pytest.raises(fid.DataError) as error:
            stamp(path)
        assert "save it as an 8-bit RGB PNG" in str(error.value) and "2 of 3 pictures cannot be used: mend or remove them" in str(error.value)


def test_progress_is_a_line_every_ten_seconds(monkeypatch, capsys):
    path, _ = as_folder_and_zip(many(1024))
    clock = iter(range(0, 600, 6))
    monkeypatch.setattr(fid.time, "time", lambda: next(clock))
    stamp(path)
    assert capsys.readouterr().err.splitlines() == [
        f"{n} pictures of {path} read, {left} left" for n, left in (("512/1,024", "12 s"), ("1,024/1,024", "0 s"))]


def test_a_size_that_is_offered_is_one_of_the_nets(tmp_path):
    """Pictures of 20x20: --res 20 would be refused, too. Where nets have no size so small, the pictures' own."""
    assert [fid.net_side(side) for side in (4, 16, 20, 32, 63, 64, 500)] == [4, 16, 16, 32, 32, 64, 64]
    os.makedirs(tmp_path / "small")
    for name in "ab":
        (tmp_path / f"small/{name}.png").write_bytes(saved(np.zeros((20, 20, 3), np.uint8)))
    with pytest.raises(fid.DataError, match="2 of 2 pictures are too small for --res 32, such as a.png, 20x20; take them out, or pass --res 16"):
        fid.load_images(str(tmp_path / "small"), 32)


def test_an_array_of_channels_first_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for array, told in (np.zeros((5, 3, 16, 16), np.uint8), "x.npz: (5, 3, 16, 16) is read as (N, C, H, W)\n"), (np.zeros((5, 16, 16, 3), np.uint8), ""):
        np.savez("x.npz", images=array)
        fid.SAID.clear()
        assert fid.load_images("x.npz").shape == (5, 3, 16, 16) and capsys.readouterr().err == told


def test_pictures_of_other_sizes_are_named_and_the_middle_square_is_taken():
    files = {"a.png": saved(RGB), "b.png": saved(RGB[:, :4]), "c.png": saved(GREY)}
    for path in as_folder_and_zip(files):
        with pytest.raises(fid.DataError) as error:
            fid.load_images(path)
        one_line(error, "2 of 3 pictures are not (6, 5, 3) (H, W, C) as a.png, such as b.png, (6, 4, 3); pass --res 4, which")
        assert fid.load_images(path, 4).shape == (3, 3, 4, 4)
        with pytest.raises(fid.DataError, match="1 of 3 pictures are too small for --res 5, such as b.png, 4x6; take"):
            fid.load_images(path, 5)
        read = fid.list_pictures(path)[1]
        for k, name in enumerate(sorted(files)):
            plain = Image.open(io.BytesIO(files[name])).convert("RGB")
            mine = fid.load_images(path, 4)[k].permute(1, 2, 0)
            assert np.array_equal(mine, np.asarray(fid.square(plain, 4)))
            assert fid.crop(fid.rgb(read(name)), 4).tobytes() == fid.crop(plain, 4).tobytes()


# ---- teachers of other data ----------------------------------------------------------------------
UNET = dict(img_resolution=8, img_channels=1, label_dim=0)
DIT = dict(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=1, num_heads=1, num_classes=10)
MMDIT = dict(input_size=8, in_channels=1, context_dim=32)
ROADS = [(train_cmt_cifar, UNET), (train_cmt_imagenet, dict(UNET, label_dim=10)), (train_mf_imagenet256, DIT),
         (train_t2i_coco, MMDIT)]
OTHERS = dict(img_resolution=16, img_channels=3, label_dim=3, input_size=16, in_channels=3, num_classes=3, context_dim=16)


def refused(script, capsys, *flags):
    """Exit code and lines of the check of post-training of digits; 0 if it passes."""
    cfg = script.parse(["--data", "digits", "--stage", "post", "--out", "x", *flags])
    try:
        with fid.one_line(cfg, nets.WeightsError):
            script.check(cfg)
    except SystemExit as e:
        return e.code, capsys.readouterr().err.splitlines()
    return 0, []


@pytest.mark.parametrize("script, model", ROADS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_teacher_of_other_pictures_or_classes_is_refused_before_any_training(script, model, capsys):
    """Else one more class draws what no picture shows, and another shape ends in a trace after mid-training."""
    for name, value in [("", 0), *((k, v) for k, v in OTHERS.items() if k in model)]:
        said = {**model, name: value} if name else model
        state = nets.DiT(**said).state_dict() if model is DIT else {"context_embedder.weight": torch.zeros(1)}
        torch.save({"ema": state, "model": said}, "teacher.pt")
        code, lines = refused(script, capsys, "--teacher", "teacher.pt")
        assert code == (3 if name else 0) and len(lines) == bool(name)
        assert not name or f": its {name} is {value}, not {model[name]}; pass a teacher of this script and --data digits" in lines[0]


@pytest.mark.parametrize("script, model", ROADS, ids=lambda v: getattr(v, "__name__", ""))
def test_pictures_that_changed_after_pre_training_are_refused(script, model, capsys):
    os.makedirs("x")
    seen = f"1797 images, crc32 {zlib.crc32(fid.digits()[0].numpy()):08x}"
    for data, expected in ((seen, 0), ("1797 images, crc32 00000000", 2)):
        torch.save(dict(ema={}, model=model, data=data, step=1, cfg=dict(steps=1)), "x/pretrain.pt")
        code, lines = refused(script, capsys)
        assert code == expected and len(lines) == bool(expected)
        assert not expected or f"saw {data}, now {seen}" in lines[0]


@pytest.mark.parametrize("script, model", ROADS, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("stage", ["mid", "post"])
def test_a_finished_stage_reads_neither_data_nor_teacher(script, model, stage, monkeypatch, capsys):
    """A road that a scheduler starts again goes on at its last stage, wherever the teacher of an earlier one is by now."""
    cfg = script.parse(["--data", "digits", "--stage", stage, "--teacher", "gone.pt", "--out", "x"])
    os.makedirs("x")
    keys = {"net": {}, "ema": {}, "opt": {}, "scale": 1.0, "seconds": 0.0, "skipped": 0, "bad": 0}
    torch.save(dict(keys, model=model, data="1 image", step=cfg.steps, cfg=vars(cfg)), f"x/{stage}.pt")
    for name in "load_data", "teacher_state", "build":
        monkeypatch.setattr(script, name, lambda *a: pytest.fail("read"))
    assert script.set_up(cfg) is None and f"{stage}: finished, nothing to do" in capsys.readouterr().out


def test_a_reader_that_is_left_waits_for_no_thread():
    """Whatever thread collects garbage may close it, also one that a join would wait for: pytest hung there once."""
    gate, read = threading.Event(), []
    images = fid.ahead(lambda k: (k == 0 or gate.wait(2), read.append(k)), range(9))
    next(images)
    images.close()
    assert read == [0]                                      # the second is still being read
    gate.set()
