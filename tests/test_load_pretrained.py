"""Checkpoint import: foreign pickles give tensors and run nothing; downloads are whole and right or absent.

The files are written here in NVIDIA's layout: persistent objects that carry source text, tensors that carry a
second pickle. Attacks that torch or pickle would obey leave a marker file; no test may end with it.
"""
import argparse
import collections
import copyreg
import functools
import hashlib
import http.server
import importlib.util
import io
import json
import os
import pathlib
import pickle
import re
import runpy
import sys
import threading
import tracemalloc
import types

import numpy as np
import pytest
import torch
from conftest import code

import nets
import train_cmt_cifar
import train_cmt_imagenet
import train_mf_imagenet256
import train_t2i_coco

HOSTILE = "import os\nos.system('touch {}')\nclass Net: pass\n"


class Call:
    """Pickles as the call function(*args), with a state to BUILD if given."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


@pytest.fixture
def marker(tmp_path):
    """Path that an obeyed attack would create."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "the file was obeyed"


@pytest.fixture
def nvidia(monkeypatch):
    """NVIDIA's two packages for the writing side: (reconstruct, EasyDict)."""
    def _reconstruct_persistent_obj(meta):
        raise AssertionError("the stock loader would run meta['module_src'] here")
    easy = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    contents = {"torch_utils": {}, "dnnlib": {}, "dnnlib.util": {"EasyDict": easy},
                "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj}}
    for name, value in contents.items():
        module = types.ModuleType(name)
        vars(module).update(value)
        monkeypatch.setitem(sys.modules, name, module)
    return _reconstruct_persistent_obj, easy


@pytest.fixture
def write(nvidia, tmp_path):
    """write(root, protocol=4) -> path of a .pkl."""
    def write(root, protocol=4, name="net.pkl"):
        path = tmp_path / name
        path.write_bytes(root if isinstance(root, bytes) else pickle.dumps(root, protocol))
        return str(path)
    return write


@pytest.fixture
def forge(nvidia, write):
    """forge(tensor) -> path of a .pkl whose network has one parameter, `tensor`, of any make."""
    def forge(tensor):
        parameters = collections.OrderedDict(weight=tensor)    # torch 1 keeps them so
        state = dict(_parameters=parameters, _buffers={}, _modules={}, _init_kwargs={})
        meta = dict(type="class", version=6, module_src="", class_name="Net", state=state)
        return write(dict(ema=Call(nvidia[0], meta)))
    return forge


def persistent(reconstruct, cls, source="class Net: pass"):
    """What torch_utils.persistence.persistent_class makes of a class, as far as its pickles show."""
    class Decorated(cls):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._init_args, self._init_kwargs = args, kwargs

        def __reduce__(self):
            return reconstruct, (dict(type="class", version=6, module_src=source, class_name=cls.__name__,
                                      state=self.__dict__),)
    return Decorated


def build_net(reconstruct, *args, source="class Net: pass", **kwargs):
    """A small network with every kind of entry: parameters, buffers, 0-dim, None, containers, nesting."""
    def layer(n, m):
        layer = persistent(reconstruct, torch.nn.Module, source)()
        layer.weight = torch.nn.Parameter(torch.randn(n, m, 3, 3))
        layer.register_parameter("bias", None)
        layer.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))
        layer.register_buffer("scratch", torch.zeros(3), persistent=False)
        return layer

    class Net(torch.nn.Module):
        def __init__(self, *args, **kwargs):
            super().__init__()
            self.enc = torch.nn.ModuleDict({"8x8_conv": layer(4, 3), "8x8_block0": layer(5, 4)})
            self.dec = torch.nn.ModuleList([torch.nn.Sequential(layer(2, 2))])
            self.gain = torch.nn.Parameter(torch.tensor(0.5))
            self.transposed = torch.nn.Parameter(torch.randn(6, 4).t())
            self.empty = torch.nn.Parameter(torch.zeros(0, 4))
            self.register_buffer("steps", torch.tensor(2 ** 40))
            self.register_buffer("first", torch.arange(12.0)[2:6])
    torch.manual_seed(0)
    return persistent(reconstruct, Net, source)(*args, **kwargs)


def storage_bytes(tensor):
    """What torch writes for a tensor's storage."""
    return tensor.__reduce_ex__(2)[1][0].__reduce__()[1][0]


def rebuild(raw, offset=0, size=(2, 2), stride=(2, 1)):
    """A tensor as torch pickles it, on forged storage bytes."""
    storage = Call(torch.storage._load_from_bytes, raw)
    hooks = collections.OrderedDict()
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, hooks)


def same(state, net):
    """Assert that state is net's state dict: names in order, dtypes, shapes, bits."""
    want = net.state_dict()
    assert list(state) == list(want)
    for k, v in want.items():
        assert state[k].dtype == v.dtype and state[k].shape == v.shape, k
        assert state[k].numpy().tobytes() == v.numpy().tobytes(), k


# ---- files that load -----------------------------------------------------------------------------
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_edm_file_gives_the_names_dtypes_and_bits_of_the_network(nvidia, write, protocol, monkeypatch):
    given = dict(img_resolution=32, label_dim=0, channel_mult=[1, 2], use_fp16=False, model_type="SongUNet",
                 nothing=None, pair=(1, 2.5))
    net = build_net(nvidia[0], **given, skip_scale=np.sqrt(0.5), dropout=np.float32(0.25), depth=np.int64(4),
                    flag=np.bool_(True))
    loss = persistent(nvidia[0], collections.UserDict)(P_mean=-1.2)
    path = write(dict(ema=net, loss_fn=loss, augment_pipe=None, dataset_kwargs=dict(path="x.zip")), protocol)
    monkeypatch.delitem(sys.modules, "torch_utils.persistence")
    state, kwargs = nets.load_pretrained(path)
    assert "torch_utils.persistence" not in sys.modules
    same(state, net)
    assert kwargs == dict(given, skip_scale=0.5 ** 0.5, dropout=0.25, depth=4, flag=True)
    assert {type(v) for v in kwargs.values()} == {int, float, bool, str, list, tuple, type(None)}
    for v in state.values():                          # memory of their own: writable, aligned
        v.zero_()
        assert v.data_ptr() % v.element_size() == 0


def test_edm2_file_stays_fp16_and_its_encoder_does_not_matter(nvidia, write):
    net = build_net(nvidia[0], img_resolution=64, img_channels=4, label_dim=1000).to(torch.float16)
    encoder = persistent(nvidia[0], collections.UserDict)(raw_mean=np.array([5.81, 3.25], np.float32))
    root = nvidia[1](encoder=encoder, dataset_kwargs={}, loss_fn=None, ema=net)
    state, kwargs = nets.load_pretrained(write(root))
    same(state, net)
    assert state["transposed"].dtype == torch.float16 and state["steps"].dtype == torch.int64
    assert kwargs == dict(img_resolution=64, img_channels=4, label_dim=1000)


def test_scalars_of_numpy_1_and_of_other_byte_order_load():
    text = pickle.dumps(np.float64(0.5), 0)
    new, old = b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"
    assert new in text or old in text
    for name in (new, old):
        assert nets.plain(nets.read_pickle(io.BytesIO(text.replace(new, name).replace(old, name)))) == 0.5
    swapped = pickle.dumps(np.float64(0.5), 4).replace(b"\x8c\x01<", b"\x8c\x01>")
    swapped = swapped.replace(np.array(0.5, "<f8").tobytes(), np.array(0.5, ">f8").tobytes())
    assert nets.plain(nets.read_pickle(io.BytesIO(swapped))) == 0.5


def test_positional_arguments_get_their_names(nvidia, write):
    assert nets.load_pretrained(write(dict(ema=build_net(nvidia[0], 32, 3, label_dim=10))))[1] \
        == dict(img_resolution=32, img_channels=3, label_dim=10)
    assert nets.load_pretrained(write(dict(ema=build_net(nvidia[0], 32, 3, 0, True, dropout=0.1))))[1] \
        == dict(_init_args=(32, 3, 0, True), dropout=0.1)


@pytest.mark.parametrize("name", ["VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_another_noise_process_with_the_same_names_is_refused(nvidia, write, name):
    """EDM's baselines: DDPM++ and the arguments of EDMPrecond, but another c_noise; they would load, and draw noise."""
    meta = build_net(nvidia[0], 32, 3).__reduce__()[1][0]
    refuse(write(dict(ema=Call(nvidia[0], dict(meta, class_name=name)))), name, ValueError)


def test_hostile_source_text_is_not_run(nvidia, write, marker):
    net = build_net(nvidia[0], source=HOSTILE.format(marker))
    same(nets.load_pretrained(write(dict(ema=net)))[0], net)


def test_one_copy_in_memory(nvidia, write):
    net = build_net(nvidia[0])
    for i in range(8):
        net.register_buffer(f"big{i}", torch.full((1 << 20,), float(i)))
    path = write(dict(ema=net))
    tracemalloc.start()
    state, _ = nets.load_pretrained(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.4 * os.path.getsize(path)
    same(state, net)


# ---- files that are refused ------------------------------------------------------------------------
def refuse(path, names, error=nets.UnsafePickle):
    """Assert that path is refused with a one-line message that has its name and `names`."""
    with pytest.raises(error) as e:
        nets.load_pretrained(path)
    assert path in str(e.value) and names in str(e.value) and "\n" not in str(e.value)


def test_the_attack_is_real(tmp_path):
    pickle.loads(pickle.dumps(Call(os.system, f"touch {tmp_path / 'obeyed'}")))
    assert (tmp_path / "obeyed").exists()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("where", ["root", "state", "kwargs", "reduced first"])
@pytest.mark.parametrize("attack", ["os.system", "eval", "getattr", "torch.load", "partial"])
def test_functions_are_refused_by_name(nvidia, write, marker, attack, where, protocol):
    call = {"os.system": Call(os.system, f"touch {marker}"),
            "eval": Call(eval, f"open({str(marker)!r}, 'w')"),
            "getattr": Call(getattr, torch.nn.Module, "__init__"),
            "torch.load": Call(torch.load, str(marker)),
            "partial": Call(functools.partial, os.system, f"touch {marker}")}[attack]
    net = build_net(nvidia[0], **({"dropout": call} if where == "kwargs" else {}))
    root = {"x": call, "ema": net} if where == "reduced first" else {"ema": net}
    if where == "state":
        net.x = call
    if where == "root":
        root["x"] = call
    names = {"os.system": ".system'", "eval": ".eval'", "getattr": ".getattr'",
             "torch.load": "'torch.serialization.load'", "partial": "'functools.partial'"}
    refuse(write(root, protocol), names[attack])


def pickled(*parts):
    """A protocol-4 pickle from opcodes and short strings."""
    return b"\x80\x04" + b"".join(p if isinstance(p, bytes) else b"\x8c" + bytes([len(p)]) + p.encode()
                                  for p in parts) + b"."


@pytest.mark.parametrize("module, name", [
    ("torch._utils", "_rebuild_tensor_v2.__globals__"), ("torch._utils._rebuild_tensor_v2", "__globals__"),
    ("torch._utils", "_rebuild_tensor_v2.__init__.__globals__"), ("torch.storage", "io.open"),
    ("torch", "storage.io.open"), ("builtins", "dict.__init__"), ("collections.OrderedDict", "fromkeys"),
    ("nets", "Record"), ("__main__", "Record"), ("torch", "float32"), ("", ""), ("os", "system\x1b[2J"),
    ("torch.storage", "_load_from_bytes\n")])
def test_only_exact_names_are_found(write, module, name):
    refuse(write(pickled(module, name, b"\x93")), repr(f"{module}.{name}"))


@pytest.mark.parametrize("code", [b"\x82\x70", b"\x83\x70\x00", b"\x84\x70\x00\x00\x00"])
def test_extension_registry_is_refused(write, marker, code):
    copyreg.add_extension("os", "system", 0x70)
    copyreg._extension_cache[0x70] = os.system        # as after any earlier use in this process
    try:
        refuse(write(pickled(code, f"touch {marker}", b"\x85R")), "opcode EXT")
    finally:
        copyreg.remove_extension("os", "system", 0x70)
        copyreg._extension_cache.pop(0x70, None)


@pytest.mark.parametrize("parts, opcode", [
    ((b"Pid\n",), "PERSID"), (("id", b"Q"), "BINPERSID"), ((b"(ios\nsystem\n",), "INST"),
    ((b"(", "os", "system", b"\x93o"), "OBJ"), (("os", "system", b"\x93)}\x92"), "NEWOBJ_EX"),
    ((b"\x96" + bytes(8),), "BYTEARRAY8"), ((b"\x97",), "NEXT_BUFFER"), ((b"\x97\x98",), "NEXT_BUFFER")])
def test_opcodes_that_no_such_file_has_are_refused(write, parts, opcode):
    refuse(write(pickled(*parts)), f"opcode {opcode}")


@pytest.mark.parametrize("put", [b"r\x00\x00\x20\x00", b"p2000000\n"])
def test_memo_index_is_not_an_order_for_memory(write, put):
    refuse(write(pickled(b"N", put)), "PUT")


@pytest.mark.parametrize("module, name", [("torch._utils", "_rebuild_tensor_v2"), ("numpy", "dtype"),
                                          ("collections", "OrderedDict"), ("torch", "FloatStorage")])
@pytest.mark.parametrize("state", [(b"}", "args", b"K\x01s"), (b"N}", "__new__", b"K\x01s\x86")])
def test_stand_ins_cannot_be_altered(nvidia, write, module, name, state):
    refuse(write(pickled(module, name, b"\x93", *state, b"b")), "damaged", ValueError)
    same(nets.load_pretrained(write(dict(ema=build_net(nvidia[0]))))[0], build_net(nvidia[0]))


def test_state_of_a_stand_in_is_only_kept(write):
    node = nets.read_pickle(io.BytesIO(pickled("numpy", "dtype", b"\x93)R", b"N}", "args", b"K\x01s\x86b")))
    assert node.args == () and node.state == (None, {"args": 1})


# ---- tensors -----------------------------------------------------------------------------------------
def test_call_hidden_inside_tensor_bytes_is_refused(forge, marker):
    raw = storage_bytes(torch.ones(4))
    evil = pickle.dumps(Call(os.system, f"touch {marker}"), 2)
    record = raw.index(b"\x80\x02(X\x07\x00\x00\x00storage")
    for bad in (evil + raw, raw[:record] + evil + raw[record:], evil):
        refuse(forge(rebuild(bad)), "system")
    type_ = raw.replace(b"ctorch\nFloatStorage\n", b"cposix\nsystem\n")
    refuse(forge(rebuild(type_)), "posix.system")
    with pytest.raises(nets.UnsafePickle, match="EXT1"):
        nets.load_pretrained(forge(rebuild(b"\x80\x02\x82\x70.")))
    assert nets.load_pretrained(forge(rebuild(raw)))[0]["weight"].tolist() == [[1, 1], [1, 1]]    # untouched


@pytest.mark.parametrize("offset, size, stride", [
    (1, (2, 2), (2, 1)), (0, (3, 2), (2, 1)), (0, (2, 2), (3, 1)), (4, (), ()), (10 ** 30, (1,), (1,)),
    (0, (2, 2), (2, 10 ** 30))])
def test_tensor_outside_its_storage_is_refused(forge, offset, size, stride):
    refuse(forge(rebuild(storage_bytes(torch.ones(4)), offset, size, stride)),
           "leaves its storage of 4", ValueError)


def test_stride_zero_does_not_make_a_small_file_a_large_tensor(forge):
    refuse(forge(rebuild(storage_bytes(torch.ones(4)), 0, (10 ** 12,), (0,))),
           "leaves its storage of 4", ValueError)


@pytest.mark.parametrize("offset, size, stride", [
    (-1, (2, 2), (2, 1)), (0, (-2, 2), (2, 1)), (3, (2, 2), (-2, 1)), (0, (4,), ()), (0, (), (1,)),
    (0, (2.0,), (1,)), (0, (True,), (1,)), (0, ([0],), (10 ** 9,)), ("0", (1,), (1,)), (None, (1,), (1,))])
def test_tensor_with_impossible_numbers_is_refused(forge, offset, size, stride):
    refuse(forge(rebuild(storage_bytes(torch.ones(4)), offset, size, stride)),
           "negative or no size", ValueError)


def test_storage_that_is_not_exactly_what_torch_writes_is_refused(forge):
    raw = storage_bytes(torch.ones(4))
    head, body = raw[:-24], raw[-16:]
    assert raw == head + (4).to_bytes(8, "little") + body
    for bad in (raw[:-1], raw + b"\0", raw[21:], head, b"",
                head + (5).to_bytes(8, "little") + body, head + b"\xff" * 8 + body,
                raw.replace(b"\nl\xfc", b"\nl\xfd"), raw.replace(b"M\xe9\x03.", b"M\xea\x03."),
                raw.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
                raw.replace(b"storageq", b"storagEq"), raw.replace(b"FloatStorage", b"DoubleStorage"),
                raw.replace(b"K\x04Nt", b"K\x05Nt"), raw.replace(b"K\x04Nt", b"K\x04)t"),
                raw.replace(b"q\x01a.", b"q\x010.")):
        assert bad != raw
        refuse(forge(rebuild(bad)), "damaged", ValueError)
    number = raw.replace(b"ctorch\nFloatStorage\n", b"cnumpy\ndtype\n")
    refuse(forge(rebuild(number)), "wrong header", ValueError)
    refuse(forge(rebuild(raw.replace(b"FloatStorage", b"ComplexFloatStorage"))),
           "torch.ComplexFloatStorage")


def test_tensors_made_in_another_way_are_refused(forge):
    for bad in (3, np.ones(2), Call(torch._utils._rebuild_tensor_v2, Call(np.dtype, "f8"), 0, (), ())):
        refuse(forge(bad), "a tensor is made by", ValueError)


def test_tensors_may_share_a_storage(nvidia, write):
    shared = torch.nn.Parameter(torch.arange(6.0))
    net = build_net(nvidia[0])
    net.a = shared
    net.b = shared
    same(nets.load_pretrained(write(dict(ema=net)))[0], net)


# ---- damaged and foreign files -----------------------------------------------------------------------
def test_cut_files_are_one_clear_error(nvidia, write):
    whole = pickle.dumps(dict(ema=build_net(nvidia[0])), 4)
    refuse(write(b""), "text or empty", ValueError)
    for n in (1, 2, 50, len(whole) // 3, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        refuse(write(whole[:n]), "damaged, cut short", ValueError)


@pytest.mark.parametrize("root", [[1], {}, 3, None, {"ema": 1}, {"ema": {"w": 2}}, {"ema": np.float64(1)}])
def test_pickles_without_a_network_are_one_clear_error(write, root):
    refuse(write(root), "no `ema` network in it", ValueError)


def test_networks_that_contain_themselves_end(nvidia, write):
    net = build_net(nvidia[0])
    net.dec.append(net.dec)
    refuse(write(dict(ema=net)), "RecursionError", ValueError)
    loop = []
    loop.append(loop)
    refuse(write(dict(ema=build_net(nvidia[0], dropout=loop))), "RecursionError", ValueError)


def test_arguments_that_are_not_plain_are_refused(nvidia, write):
    for bad in (np.ones(3), torch.ones(1), b"x", {1, 2}):
        refuse(write(dict(ema=build_net(nvidia[0], dropout=bad))), "constructor argument", ValueError)


def test_a_file_that_may_not_be_read_is_not_called_damaged(write, monkeypatch):
    path = write({})

    def denied(path):
        raise PermissionError(f"denied: {path}")
    monkeypatch.setattr(nets, "read_nvidia", denied)
    refuse(path, "denied", PermissionError)


def test_messages_are_short_whatever_the_file_holds(write):
    for opcode in b"Ici":
        with pytest.raises(ValueError) as e:
            nets.load_pretrained(write(bytes([opcode]) + b"m" * 10 ** 5 + b"\nf\n."))
        assert len(str(e.value)) < 600


def test_missing_file_is_named(tmp_path):
    for path in (str(tmp_path / "no.pkl"), str(tmp_path / "no.pt"), str(tmp_path)):
        with pytest.raises(OSError, match=re.escape(path)):
            nets.load_pretrained(path)


# ---- .pt ---------------------------------------------------------------------------------------------
def test_own_checkpoint_and_bare_state_dict(tmp_path):
    net = torch.nn.Linear(3, 2)
    path = tmp_path / "mid.pt"
    torch.save(dict(ema=net.state_dict(), net={}, model=dict(img_resolution=8, channel_mult=(1, 2))), path)
    state, kwargs = nets.load_pretrained(path)
    same(state, net)
    assert kwargs == dict(img_resolution=8, channel_mult=(1, 2))
    torch.save(net.half().state_dict(), path)
    state, kwargs = nets.load_pretrained(str(path))
    same(state, net)
    assert kwargs == {}


def test_weights_under_model_are_not_arguments(tmp_path):
    net = torch.nn.Linear(3, 2)
    torch.save(dict(ema=net.state_dict(), model=net.state_dict(), opt={}), tmp_path / "dit.pt")
    state, kwargs = nets.load_pretrained(tmp_path / "dit.pt")
    same(state, net)
    assert kwargs == {}


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pt_is_refused_by_name(tmp_path, marker, zipped):
    path = str(tmp_path / "x.pt")
    for bad, name in ((Call(os.system, f"touch {marker}"), ".system'"),
                      (types.SimpleNamespace(a=1), "'types.SimpleNamespace'")):
        torch.save(dict(ema=bad), path, _use_new_zipfile_serialization=zipped)
        refuse(path, name)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_or_foreign_pt_is_one_clear_error(tmp_path, nvidia, write, marker):
    torch.save(dict(a=torch.ones(100)), tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    refuse(write(b"404: not found\n", name="x.pt"), "text or empty, no weights", ValueError)
    for head in b"\x89PNG\r\n", b"\xff\xd8\xff\xe0", b"GIF89a":
        refuse(write(head + bytes(99), name="x.pt"), "damaged, cut short or of another kind", ValueError)
    torch.save(dict(ema={"w": torch.randn(300, 300)}), tmp_path / "whole.pt")
    for size in 200, 5_000, 20_000, 300_000:          # torch's reader fails in another way at each
        refuse(write((tmp_path / "whole.pt").read_bytes()[:size], name="x.pt"), "x.pt: damaged, cut short", ValueError)
    refuse(write(b"", name="x.pt"), "text or empty, no weights", ValueError)
    for bad in (whole[:100], whole[:-30]):
        refuse(write(bad, name="x.pt"), "damaged, cut short", ValueError)
    for bad in (dict(epoch=3), dict(ema={}), [1, 2], torch.ones(2), dict(ema=3)):
        torch.save(bad, tmp_path / "x.pt")
        refuse(str(tmp_path / "x.pt"), "of another kind", ValueError)
    refuse(write(dict(ema=build_net(nvidia[0])), name="x.pt"), "must end in .pkl", ValueError)
    refuse(write(dict(x=Call(os.system, f"touch {marker}")), 2, name="x.pt"), "system")


# ---- nests and prefixes --------------------------------------------------------------------------
def weights(seed, prefix=""):
    """State dict of a small net, other numbers for another seed."""
    torch.manual_seed(seed)
    return {prefix + k: v for k, v in torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict().items()}


RAW, EMA = weights(1), weights(2)
OPT = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2, 3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
ARGS = argparse.Namespace(model="SiT-XL/2", lr=1e-4, names=["a"], best=np.float64(3.5))


def prefixed(prefix, state=EMA):
    return {prefix + k: v for k, v in state.items()}


NESTS = {  # kind of file: (what it holds, the place that is named; None: nothing is said)
    "bare": (EMA, None),
    "DiT, SiT, REPA": (dict(model=RAW, ema=EMA, opt=OPT, args=ARGS), "ema"),
    "steps": (dict(model=RAW, ema=EMA, opt=OPT, steps=5, args=ARGS), "ema"),
    "ema alone": (dict(ema=EMA), "ema"),
    "model alone": (dict(model=EMA, optimizer=OPT, epoch=3, best=np.float32(1.5)), "model"),
    "net": (dict(net=EMA), "net"), "state_dict": (dict(state_dict=EMA, epoch=1), "state_dict"),
    "another name": (dict(generator=EMA, step=torch.tensor(3)), "generator"),
    "timm": (dict(state_dict=RAW, state_dict_ema=EMA, args=ARGS), "state_dict_ema"),
    "model_ema": (dict(model=RAW, model_ema=EMA), "model_ema"),
    "a critic": (dict(model=EMA, critic=RAW), "model"),
    "nest in nest": (dict(checkpoint=dict(model=RAW, ema=EMA)), "checkpoint.ema"),
    "Lightning": (dict(state_dict={**prefixed("net.", RAW), **prefixed("ema.")}, callbacks={}, optimizer_states=[OPT]), "state_dict.ema"),
    "ema_pytorch": ({"step": torch.tensor(1), **prefixed("online_model.", RAW), **prefixed("ema_model.")}, "ema_model"),
    "average of DDP": (dict(ema=prefixed("module."), model=prefixed("module.", RAW)), "ema.module"),
    "DeepSpeed": (dict(module=EMA, global_steps=3), "module"),
    **{p: (prefixed(p), p.replace("_orig_mod.", "")[:-1] or None) for p in (
        "module.", "_orig_mod.", "ema.", "ema_model.", "net.", "module._orig_mod.", "_orig_mod.module.", "ema.module.",
        "module.ema.", "ema._orig_mod.module.", "_orig_mod.ema_model.module.", "module.module.")},
    "compiled inside": ({k.replace("0.", "0._orig_mod."): v for k, v in EMA.items()}, None)}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", NESTS)
def test_nests_and_prefixes_are_taken_off_and_the_average_is_taken(tmp_path, capsys, kind, zipped):
    path = str(tmp_path / "x.pt")
    torch.save(NESTS[kind][0], path, _use_new_zipfile_serialization=zipped)
    state, kwargs = nets.load_pretrained(path)
    assert kwargs == {} and list(state) == list(EMA)
    assert all(v.dtype == EMA[k].dtype and torch.equal(v, EMA[k]) for k, v in state.items())
    out, err = capsys.readouterr()
    place = NESTS[kind][1]
    assert out == "" and (err == "" if place is None else err.startswith(f"{path}: took its {place}; it holds "))


@pytest.mark.parametrize("tree, names", [
    (dict(generator=RAW, critic=EMA), "generator, critic"), (dict(model=RAW, net=EMA), "model, net"),
    (dict(ema=dict(a=RAW, b=EMA)), "ema.a, ema.b"), (dict(ema=RAW, model_ema=EMA), "ema, model_ema"),
    ({**prefixed("ema."), **prefixed("ema_model.")}, "ema, ema_model")])
def test_where_no_rule_says_which_weights_they_are_refused(tmp_path, tree, names):
    torch.save(tree, tmp_path / "x.pt")
    refuse(str(tmp_path / "x.pt"), f"it holds {names}; save the one you want alone", ValueError)


@pytest.mark.parametrize("tree", [{**prefixed("module."), "x": torch.ones(1)}, {**EMA, **prefixed("_orig_mod.", RAW)},
                                  {**prefixed("net."), **prefixed("loss.", RAW)}])
def test_a_prefix_of_some_names_stays_and_the_net_refuses_it(tmp_path, tree):
    torch.save(tree, tmp_path / "x.pt")
    state, _ = nets.load_pretrained(tmp_path / "x.pt")
    assert list(state) == list(tree)
    with pytest.raises(nets.WeightsError, match="unexpected"):
        nets.load_weights(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)), state, "x.pt")


def test_settings_beside_the_weights_run_nothing(tmp_path, marker):
    """A Namespace becomes a Record: neither its constructor nor a call hidden in it is obeyed."""
    torch.save(dict(ema=EMA, args=Call(argparse.Namespace, state=dict(x=1))), tmp_path / "x.pt")
    assert list(nets.load_pretrained(tmp_path / "x.pt")[0]) == list(EMA)
    torch.save(dict(ema=EMA, args=argparse.Namespace(x=Call(os.system, f"touch {marker}"))), tmp_path / "x.pt")
    refuse(str(tmp_path / "x.pt"), ".system'")
    torch.save(dict(ema=EMA, cfg=types.SimpleNamespace(a=1)), tmp_path / "x.pt")
    refuse(str(tmp_path / "x.pt"), "save its state dict alone")


# ---- .safetensors --------------------------------------------------------------------------------
def pack(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), first=0, last=8):
    return dict(dtype=dtype, shape=list(shape), data_offsets=[first, last])


@pytest.fixture
def mixed():
    """A tensor of every dtype: odd sizes, no dims, no elements, not contiguous."""
    g = torch.Generator().manual_seed(0)
    state = {name: torch.randint(0, 2 if name == "BOOL" else 99, (3,), generator=g).to(dtype) for name, dtype in nets.DTYPES.items()}
    return dict(state, scalar=torch.tensor(2.5), empty=torch.zeros(0, 4), turned=torch.randn(2, 3, generator=g).t())


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape
                                        and torch.equal(a[k], b[k]) for k in a)


def test_safetensors_give_back_every_dtype_arguments_and_configuration(tmp_path, mixed):
    path, model, cfg = str(tmp_path / "x.safetensors"), dict(channel_mult=[1, 2], dropout=0.1), dict(omega=0.2, out="ü")
    nets.save_checkpoint(path, ema=mixed, model=model, cfg=cfg, net={}, step=3)
    state, *said = nets.read_weights(path)
    assert equal(state, mixed) and said == [model, cfg] and nets.load_pretrained(path)[1] == model
    assert all(v.data_ptr() % v.element_size() == 0 for v in state.values())
    state["F32"].zero_()                              # a copy on write: the file stays
    assert equal(nets.load_pretrained(path)[0], mixed) and os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.skipif(not importlib.util.find_spec("safetensors"), reason="the package safetensors is not here")
def test_safetensors_agree_with_the_package(tmp_path, mixed):
    from safetensors.torch import load_file, save_file
    mine, theirs = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    nets.save_checkpoint(mine, ema=mixed, model={}, cfg={})
    assert equal(load_file(mine), mixed)
    save_file({k: v.contiguous() for k, v in mixed.items()}, theirs, metadata={"format": "pt"})
    assert equal(nets.load_pretrained(theirs)[0], mixed)


def test_safetensors_that_lie_unaligned_are_read(tmp_path):
    numbers = np.array([1.5, -2.0], "<f4").tobytes()
    header = {"a": entry("U8", (1,), 0, 1), "b": entry(first=1, last=9), "__metadata__": {"format": "pt", "model": "no JSON"}}
    for space in (b"", b" ", b"   "):
        path = tmp_path / "x.safetensors"
        path.write_bytes(pack(json.dumps(header).encode() + space, b"\x07" + numbers))
        state, kwargs = nets.load_pretrained(path)
        assert state["a"].tolist() == [7] and state["b"].tolist() == [1.5, -2.0] and kwargs == {}


EIGHT = bytes(8)
DAMAGED = {
    "empty": b"", "text": b"hello, I am a text file", "html": b"<!DOCTYPE html><html></html>", "short": bytes(7),
    "no header": bytes(8), "huge length": pack({"a": entry()}, EIGHT, 2 ** 64 - 1), "long length": pack({"a": entry()}, EIGHT, 500),
    "cut numbers": pack({"a": entry()}, EIGHT[:-1]), "more numbers": pack({"a": entry()}, EIGHT + b"x"), "cut header": pack({"a": entry()})[:30],
    "no numbers": pack({"a": entry()}), "no tensors": pack({}), "a list": pack([1]), "no entry": pack({"a": 1}), "no JSON": pack(b"{'a'}"),
    "deep": pack(b"[" * 10 ** 5), "metadata": pack({"a": entry(), "__metadata__": 3}, EIGHT), "lying metadata": pack(
        {"a": entry(), "__metadata__": {"cmt": "no JSON"}}, EIGHT),
    "dtype": pack({"a": entry("F8_E4M3", (8,))}, EIGHT), "no dtype": pack({"a": dict(shape=[2], data_offsets=[0, 8])}, EIGHT),
    "shape": pack({"a": entry(shape=(3,))}, EIGHT), "smaller": pack({"a": entry(shape=(1,))}, EIGHT),
    "huge shape": pack({"a": entry(shape=(2 ** 62, 2 ** 62))}, EIGHT), "negative shape": pack({"a": entry(shape=(-1, -2))}, EIGHT),
    "fraction": pack({"a": entry(shape=(2.0,))}, EIGHT), "truth": pack({"a": entry(shape=(True, 2))}, EIGHT),
    "negative offset": pack({"a": entry(first=-8, last=0)}, EIGHT), "backwards": pack({"a": entry(shape=(0,), first=8, last=0)}, EIGHT),
    "hole": pack({"a": entry(shape=(1,), first=4)}, EIGHT), "outside": pack({"a": entry(first=8, last=16)}, EIGHT),
    "overlap": pack({"a": entry(), "b": entry(shape=(1,), first=4)}, EIGHT), "one place": pack({"a": entry(), "b": entry()}, EIGHT)}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_safetensors_are_one_clear_error(tmp_path, damage):
    (tmp_path / "x.safetensors").write_bytes(DAMAGED[damage])
    text = "text or empty" if damage in ("text", "html", "empty") else "damaged, cut short or of another kind"
    refuse(str(tmp_path / "x.safetensors"), text, nets.WeightsError)


def test_the_command_turns_any_weights_into_safetensors(tmp_path, nvidia, write, capsys, monkeypatch):
    def export(*argv):
        monkeypatch.setattr(sys, "argv", ["nets.py", *argv])
        return code([], capsys, lambda argv: runpy.run_path(nets.__file__, run_name="__main__") and sys.exit(0))
    monkeypatch.chdir(tmp_path)
    torch.save(dict(ema=EMA, net=RAW, model=dict(channel_mult=(1, 2)), cfg=dict(omega=0.2, stage="mid")), tmp_path / "mid.pt")
    assert export("mid.pt", "mid.safetensors") == (0, "")
    state, *said = nets.read_weights(tmp_path / "mid.safetensors")
    assert equal(state, EMA) and said == [dict(channel_mult=[1, 2]), dict(omega=0.2, stage="mid")]
    net = build_net(nvidia[0], img_resolution=8, img_channels=1)
    assert export(write(dict(ema=net)), "net.safetensors") == (0, "")
    state, kwargs = nets.load_pretrained(tmp_path / "net.safetensors")
    assert equal(state, net.state_dict()) and kwargs == dict(img_resolution=8, img_channels=1)
    for argv, want, says in ((["mid.pt"], 2, "OUT.safetensors"), (["mid.pt", "x.pt"], 2, "end with .safetensors"), ([], 2, "IN, OUT"),
                             (["no.pt", "x.safetensors"], 3, "no.pt: no such file"), ([".", "x.safetensors"], 3, "a folder"),
                             (["mid.pt", "no/x.safetensors"], 3, "no/x.safetensors: cannot write")):
        done, err = export(*argv)
        assert done == want and says in err and len(err.splitlines()) == 1, err


def test_weights_that_only_resemble_a_u_net_are_one_clear_error(tmp_path):
    for w in (torch.ones(3), torch.tensor(1.0)):
        torch.save({"model.enc.8x8_conv.weight": w}, tmp_path / "x.pt")
        refuse(str(tmp_path / "x.pt"), "of another kind", nets.WeightsError)


# ---- the scripts' --teacher and --init -----------------------------------------------------------
DDPM, EDM2 = (dict(nets.SIZES["ddpm++-8"]), dict(nets.SIZES["edm2-8"], img_resolution=8, img_channels=1, label_dim=10))
FLOW = dict(input_size=8, in_channels=1, num_classes=10, patch_size=4, hidden_size=64, depth=1, num_heads=2, average_velocity=False)
TEXT = dict(input_size=8, in_channels=1, patch_size=2, depth=2, context_dim=32, repa_dim=0)
FAMILIES = {  # net, arguments, script, flags that fit
    "edm": (nets.EDMPrecond, DDPM, train_cmt_cifar, []),
    "edm2": (nets.EDM2Precond, EDM2, train_cmt_imagenet, []),
    "dit": (nets.DiT, FLOW, train_mf_imagenet256, ["--weak", "4x64x1x2", "--size", "4x64x1x2"]),
    "mmdit": (nets.MMDiT, TEXT, train_t2i_coco, ["--size", "2x2", "--repa", "0"])}
FORMS = {  # ways to write a net's state dict (and its arguments, where the form has a place for them)
    "ours": ("x.pt", lambda s, m: dict(net=s, ema=s, opt=OPT, model=m, cfg=dict(stage="pretrain"))),
    "bare": ("x.pt", lambda s, m: s),
    "training": ("x.pt", lambda s, m: dict(model={k: 0 * v for k, v in s.items()}, ema=prefixed("module.", s), opt=OPT, args=ARGS)),
    "compiled": ("x.bin", lambda s, m: prefixed("_orig_mod.module.", s)),
    "Lightning": ("x.ckpt", lambda s, m: dict(state_dict={**prefixed("net.", {k: 0 * v for k, v in s.items()}), **prefixed("ema.", s)})),
    "ours, of DDP": ("x.pt", lambda s, m: dict(ema=prefixed("module.", s), model=m, cfg=dict(stage="pretrain"))),
    "safetensors": ("x.safetensors", lambda s, m: dict(ema=s, model=m, cfg=dict(stage="pretrain"))),
    "bare safetensors": ("x.safetensors", lambda s, m: dict(ema=prefixed("module.", s), model={}, cfg={}))}


def make(family):
    torch.manual_seed(3)
    kind, model, *_ = FAMILIES[family]
    net = kind(**model).eval()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p) * p.requires_grad
    return net


def save(family, form):
    """A net of the family, written in that form; (net, file name)."""
    net, (name, layout) = make(family), FORMS[form]
    tree = layout(net.state_dict(), FAMILIES[family][1])
    nets.save_checkpoint(name, **tree) if name.endswith("safetensors") else torch.save(tree, name)
    return net, name


def answer(net, family):
    """What a net draws from fixed inputs, whatever its kind."""
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, 1, 8, 8, generator=g), torch.tensor([0.2, 0.5, 0.9])
    more = {"edm": (), "edm2": (torch.eye(10)[:3],), "dit": (t, torch.arange(3)), "mmdit": (torch.randn(3, 5, 32, generator=g),)}
    with torch.no_grad():
        return net(x, t, *more[family])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_a_file_draws_what_its_net_drew(here, family, form):
    """--teacher, --init to look at, --init to train from: bit for bit the net that was saved."""
    _, arguments, script, flags = FAMILIES[family]
    net, name = save(family, form)
    for argv in (["--stage", "mid", "--teacher", name], ["--stage", "sample", "--init", name], ["--stage", "post", "--init", name]):
        cfg = script.parse(["--data", "digits", "--precision", "fp32", *flags, *argv])
        if cfg.stage == "mid":
            state, model = script.teacher_state(cfg)
            made = script.build(cfg, model, state, name)
        elif cfg.stage == "sample":
            (_, made, *_), = script.candidates(cfg)
        else:
            more = dict(edm=(None, (None, arguments)), edm2=(None, dict(teacher=(None, arguments))), dit=(arguments,), mmdit=())[family]
            weights, *_, name = script.first_weights(cfg, *more)
            made = script.build(cfg, arguments, weights, name)
        want = script.build(cfg, arguments, net.state_dict())
        assert torch.equal(answer(made, family), answer(want, family)), argv


def wrong(kind):
    """Write a file that no flag of that script should take; its name."""
    if kind == "folder":
        os.makedirs("clip", exist_ok=True)
        pathlib.Path("clip/config.json").write_text("{}")
        return "clip"
    name, content = {"text": ("x.pt", b"hello, I am a text file"), "empty": ("x.pt", b""), "empty pickle": ("x.pkl", b""),
                     "text tensors": ("x.safetensors", b"hello, I am a text file"), "html": ("x.pkl", b"<!DOCTYPE html>"),
                     "missing": ("no.pt", None)}.get(kind, ("x.pt", None))
    if content is not None:
        pathlib.Path(name).write_bytes(content)
    elif kind in FAMILIES or kind == "misfit":
        torch.save(make(kind).state_dict() if kind in FAMILIES else EMA, name)
    elif kind.startswith("own "):
        return save(kind[4:], "ours")[1]
    elif kind == "two":
        torch.save(dict(generator=RAW, critic=EMA), name)
    return name


WRONG = ["text", "empty", "empty pickle", "text tensors", "html", "missing", "folder", "misfit", "two",
         *FAMILIES, *(f"own {family}" for family in FAMILIES)]


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_other_file_is_one_line_and_exit_code_3(here, family, kind, capsys):
    if kind in (family, f"own {family}"):
        return
    script, flags = FAMILIES[family][2:]
    name = wrong(kind)
    torch.save(FORMS["ours"][1](make(family).state_dict(), FAMILIES[family][1]), "teacher.pt")
    for argv in (["--stage", "mid", "--teacher", name], ["--stage", "sample", "--init", name],
                 ["--stage", "post", "--mid", "none", "--teacher", "teacher.pt", "--init", name]):
        exit_code, err = code(["--data", "digits", "--out", "o", *flags, *argv], capsys, script.main)
        assert exit_code == 3 and name in err and len(err.strip().splitlines()) == 1, (argv, err)
        assert not os.path.exists("o/mid.pt") and not os.path.exists("o/post.pt")


# ---- what weights do not show --------------------------------------------------------------------
def flow_file(**changes):
    """A bare DiT with these arguments in x.pt; the arguments."""
    model = {**FLOW, **changes}
    torch.save(nets.DiT(**model).state_dict(), "x.pt")
    return model


@pytest.mark.parametrize("flags, heads", [
    (["--weak", "4x128x2x1"], 1), (["--weak", "4x128x2x8"], 8), (["--weak", "4x128x2"], 4), (["--size", "4x128x2"], 4),
    (["--size", "4x128x2x2"], 2), ([], None), (["--size", "2x128x2"], None), (["--weak", "4x128x1x1"], None), (["--weak", "4x64x2"], None)])
def test_heads_of_bare_weights_are_what_the_flags_say_or_asked_for(here, capsys, flags, heads):
    model = flow_file(hidden_size=128, depth=2)
    argv = ["--data", "digits", "--stage", "mid", "--teacher", "x.pt", "--out", "o", *flags]
    if heads:
        assert train_mf_imagenet256.teacher_state(train_mf_imagenet256.parse(argv))[1] == {**model, "num_heads": heads}
        return
    for flag, argv in (("weak", argv), ("size", ["--data", "digits", "--stage", "sample", "--init", "x.pt", "--out", "o", *flags])):
        exit_code, err = code(argv, capsys, train_mf_imagenet256.main)
        assert exit_code == 3 and f"does not say its heads; pass --{flag} 4x128x2xHEADS" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", [name for name in nets.SIZES if name.startswith("dit-")])
def test_heads_of_the_papers_sizes_are_known(name):
    row = nets.SIZES[name]
    with torch.device("meta"):
        state = nets.DiT(**row).state_dict()
    assert row.items() <= nets.dit_shape(state, name).items()


@pytest.mark.parametrize("line, text", [("--size 4x64x2x3", "the width 64 must be a multiple of 12"),
                                        ("--size 4x6x2x2", "the width 6 must be a multiple of 4"), ("--weak 4x64x2x0", "PATCHxWIDTHxDEPTH")])
def test_impossible_heads_are_one_line(here, capsys, line, text):
    exit_code, err = code(["--data", "digits", *line.split()], capsys, train_mf_imagenet256.main)
    assert exit_code == 2 and text in err and len(err.strip().splitlines()) == 1


def test_a_student_with_other_heads_than_its_file_is_refused(here, capsys):
    """--init FILE, --init teacher and mid.pt: the shapes agree, the pictures would not."""
    net = nets.DiT(**FLOW)
    for name in ("x.pt", "o/mid.pt"):
        nets.os.makedirs("o", exist_ok=True)
        torch.save(dict(net=net.state_dict(), ema=net.state_dict(), model=FLOW, step=1, cfg=dict(stage="mid", steps=1)), name)
    flags = ["--data", "digits", "--size", "4x64x1x1", "--stage", "post", "--out"]
    for more in (["p", "--mid", "none", "--init", "x.pt"], ["p", "--mid", "none", "--init", "teacher", "--teacher", "x.pt"], ["o"]):
        exit_code, err = code([*flags, *more], capsys, train_mf_imagenet256.main)
        assert exit_code == 3 and "was trained with num_heads 2, the net to train has 1" in err, err


def test_what_weights_do_not_show_is_compared_with_the_defaults_of_the_net():
    state, row = {"w": torch.ones(1)}, dict(img_resolution=8, img_channels=1)
    assert nets.fitting(state, {**row, "sigma_data": 0.5}, row, "x") is state           # the default, said or not
    assert nets.fitting(state, {}, row, "x") is state
    for name in nets.HIDDEN:
        with pytest.raises(nets.WeightsError, match=f"x was trained with {name} 7, the net to train has"):
            nets.fitting(state, {**row, name: 7}, row, "x")


@pytest.mark.parametrize("size", [name for name in nets.SIZES if not name.startswith(("dit", "mmdit"))])
@pytest.mark.parametrize("labels", [0, 10])
def test_bare_u_nets_of_the_papers_sizes_say_their_arguments(tmp_path, size, labels):
    row, edm2 = nets.SIZES[size], size.startswith("edm2-")
    given = dict(img_resolution=int(size[5:]) if size == "edm2-8" else 64, img_channels=4) if edm2 else {}
    model = {**row, **given, "label_dim": labels}
    with torch.device("meta"):
        net = (nets.EDM2Precond if edm2 else nets.EDMPrecond)(**model)
    assert nets.unet_size(net.state_dict()) == model
    if size == "ddpm++-8":
        torch.save(nets.EDMPrecond(**{**model, "model_channels": 32}).state_dict(), tmp_path / "x.pt")
        assert nets.load_pretrained(tmp_path / "x.pt")[1] == {}


def test_noise_predictors_of_dit_are_refused_by_their_name(here, capsys):
    flow_file()
    os.rename("x.pt", "DiT-XL-2-256x256.pt")
    exit_code, err = code(["--data", "digits", "--stage", "mid", "--teacher", "DiT-XL-2-256x256.pt", "--out", "o", "--weak", "4x64x1x2"],
                          capsys, train_mf_imagenet256.main)
    assert exit_code == 3 and "predicts noise" in err and len(err.strip().splitlines()) == 1


# ---- load_weights ------------------------------------------------------------------------------------
class Small(torch.nn.Module):
    """Parameters of the given shapes, by name."""

    def __init__(self, **shapes):
        super().__init__()
        self.model = torch.nn.ParameterDict({k: torch.randn(s) for k, s in shapes.items()})
        self.register_buffer("steps", torch.tensor(3))


def test_load_weights_copies_by_name_into_the_nets_dtype():
    a, b = Small(w=(3, 2), v=(4,)).half(), Small(v=(4,), w=(3, 2))
    nets.load_weights(b, a.state_dict(), "a.pkl")
    same({k: v.float() if v.is_floating_point() else v for k, v in b.state_dict().items()}, b)
    assert torch.equal(b.model["w"], a.model["w"].float()) and b.model["w"].requires_grad


@pytest.mark.parametrize("change", [lambda w: (w * 40).to(torch.int8), lambda w: w.to(torch.complex64), lambda w: w / 0])
def test_weights_that_are_no_fractions_or_not_finite_are_refused(change):
    """Of int8 the scale is missing, of complex numbers a half would be dropped; a NaN would end the training later."""
    net, state = Small(a=(2,), b=(3, 2)), Small(a=(2,), b=(3, 2)).state_dict()
    with pytest.raises(ValueError, match="1 not finite, or of another type: model.b"):
        nets.load_weights(net, {**state, "model.b": change(state["model.b"])}, "x.pt")


def test_wrong_weights_are_named_and_nothing_is_copied():
    net = Small(a=(2,), b=(3, 2), c=(4,))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = {"model.a": torch.zeros(2), "model.b": torch.zeros(2, 3), "steps": torch.tensor(0),
             **{f"x{i}": torch.zeros(1) for i in range(7)}}
    with pytest.raises(ValueError) as e:
        nets.load_weights(net, state, "teacher.pkl")
    assert str(e.value) == ("teacher.pkl does not fit the network: 1 missing: model.c; "
                            "7 unexpected: x0, x1, x2, x3, x4, ...; 1 of another shape: "
                            "model.b (2, 3) in the file, (3, 2) in the net; pass others")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_map_augment_is_dropped_only_where_the_net_has_none():
    state = {"model.a": torch.zeros(2), "model.map_augment.weight": torch.ones(2), "steps": torch.tensor(0)}
    net = Small(a=(2,))
    nets.load_weights(net, state, "edm.pkl")
    assert not net.model["a"].any()
    net.model.map_augment = torch.nn.Linear(2, 1, bias=False)
    with pytest.raises(ValueError, match="map_augment.weight"):
        nets.load_weights(net, state, "edm.pkl")
    nets.load_weights(net, {**state, "model.map_augment.weight": torch.ones(1, 2)}, "edm.pkl")
    assert net.model.map_augment.weight.sum() == 2


# ---- downloads ---------------------------------------------------------------------------------------
@pytest.fixture
def server(tmp_path, monkeypatch):
    """Server on this machine: .url, .hits; /cut/... ends its answers early. The cache is tmp_path/cache."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.hits += 1
            body = server.body.get(self.path.split("?")[0])
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"") + 9 * self.path.startswith("/cut")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args):
            pass
    monkeypatch.setenv("CMT_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hits, server.body, server.cache = 0, {}, tmp_path / "cache"
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_good_file_is_fetched_once_and_its_sum_printed(server, capsys):
    server.body["/a/net.bin"] = body = os.urandom(3 << 20)
    sha256, url = hashlib.sha256(body).hexdigest(), server.url + "/a/net.bin"
    path = nets.fetch(url, sha256=sha256.upper())
    assert pathlib.Path(path).read_bytes() == body and sha256 in capsys.readouterr().err
    assert nets.fetch(url) == nets.fetch(url, sha256) == path
    assert server.hits == 1 and [str(p) for p in server.cache.iterdir()] == [path]
    with pytest.raises(ValueError, match=f"delete it.*{sha256}, expected 0000"):    # a cached file too
        nets.fetch(url, "0000")


def test_many_that_ask_at_once_download_one_copy(server):
    server.body["/net.bin"] = os.urandom(8 << 20)
    threads = [threading.Thread(target=nets.fetch, args=(server.url + "/net.bin",)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert server.hits == 1 and len(list(server.cache.iterdir())) == 1


def test_one_name_at_two_places_is_two_files(server):
    server.body.update({"/a/net.bin": b"first", "/b/net.bin": b"second"})
    paths = [nets.fetch(server.url + p) for p in ("/a/net.bin", "/b/net.bin", "/a/net.bin?x=1")]
    assert [pathlib.Path(p).read_bytes() for p in paths] == [b"first", b"second", b"first"]
    assert len(set(paths)) == 3


def test_wrong_sum_names_both_and_leaves_no_file(server):
    server.body["/net.bin"], wanted = b"body", "ab" * 32
    with pytest.raises(ValueError) as e:
        nets.fetch(server.url + "/net.bin", wanted)
    for part in (server.url, wanted, hashlib.sha256(b"body").hexdigest()):
        assert part in str(e.value)
    assert not list(server.cache.iterdir())


def test_pinned_sum_is_compared_without_asking(server, monkeypatch):
    server.body["/net.bin"] = b"body"
    monkeypatch.setitem(nets.CHECKSUMS, server.url + "/net.bin", "ab" * 32)
    with pytest.raises(ValueError, match="abababab"):
        nets.fetch(server.url + "/net.bin")


def test_cut_download_is_detected_and_leaves_no_file(server):
    server.body["/cut/net.bin"] = b"12345"
    with pytest.raises(OSError, match="5 of 14 bytes"):
        nets.fetch(server.url + "/cut/net.bin")
    assert not list(server.cache.iterdir())


def test_no_network_names_url_file_and_remedy(server):
    for url in (server.url + "/absent.pkl", "http://127.0.0.1:9/net.pkl", f"file://{server.cache}/no.pkl"):
        with pytest.raises(OSError) as e:
            nets.load_pretrained(url)
        assert url in str(e.value) and str(server.cache) in str(e.value) and "\n" not in str(e.value)
        assert "download it yourself" in str(e.value)
        target = re.search(r"save it as (\S+)", str(e.value))[1]
    pathlib.Path(target).write_bytes(b"here")         # the remedy works
    assert nets.fetch(url) == target and pathlib.Path(target).read_bytes() == b"here"


def test_url_loads_like_a_file(server, nvidia):
    net = build_net(nvidia[0], 8, 1)
    server.body["/net.pkl"] = pickle.dumps(dict(ema=net))
    state, kwargs = nets.load_pretrained(server.url + "/net.pkl")
    same(state, net)
    assert kwargs == dict(img_resolution=8, img_channels=1)
