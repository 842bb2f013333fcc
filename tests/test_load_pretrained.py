"""Checkpoint import: foreign pickles give tensors and run nothing; downloads are whole and right or absent.

The files are written here in NVIDIA's layout: persistent objects that carry source text, tensors that carry a
second pickle. Attacks that torch or pickle would obey leave a marker file; no test may end with it.
"""
import collections
import copyreg
import functools
import hashlib
import http.server
import io
import os
import pathlib
import pickle
import re
import sys
import threading
import tracemalloc
import types

import numpy as np
import pytest
import torch

import nets

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
    for n in (0, 1, 2, 50, len(whole) // 3, len(whole) // 2, len(whole) - 100, len(whole) - 1):
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
    for bad in (b"", b"hello", whole[:100], whole[:-30]):
        refuse(write(bad, name="x.pt"), "damaged, cut short", ValueError)
    for bad in (dict(epoch=3), dict(ema={}), [1, 2], torch.ones(2), dict(ema=3)):
        torch.save(bad, tmp_path / "x.pt")
        refuse(str(tmp_path / "x.pt"), "of another kind", ValueError)
    refuse(write(dict(ema=build_net(nvidia[0])), name="x.pt"), "must end in .pkl", ValueError)
    refuse(write(dict(x=Call(os.system, f"touch {marker}")), 2, name="x.pt"), "system")


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


def test_wrong_weights_are_named_and_nothing_is_copied():
    net = Small(a=(2,), b=(3, 2), c=(4,))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = {"model.a": torch.zeros(2), "model.b": torch.zeros(2, 3), "steps": torch.tensor(0),
             **{f"x{i}": torch.zeros(1) for i in range(7)}}
    with pytest.raises(ValueError) as e:
        nets.load_weights(net, state, "teacher.pkl")
    assert str(e.value) == ("teacher.pkl does not fit the network: 1 missing: model.c; "
                            "7 unexpected: x0, x1, x2, x3, x4, ...; 1 of another shape: "
                            "model.b (2, 3) in the file, (3, 2) in the net")
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
    sha256, md5 = hashlib.sha256(body).hexdigest(), hashlib.md5(body).hexdigest()
    url = server.url + "/a/net.bin"
    path = nets.fetch(url, sha256=sha256.upper(), md5=md5)
    assert pathlib.Path(path).read_bytes() == body and sha256 in capsys.readouterr().out
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


@pytest.mark.parametrize("sums", [dict(sha256="ab" * 32), dict(md5="cd" * 16)])
def test_wrong_sum_names_both_and_leaves_no_file(server, sums):
    server.body["/net.bin"] = b"body"
    (kind, wanted), = sums.items()
    with pytest.raises(ValueError) as e:
        nets.fetch(server.url + "/net.bin", **sums)
    for part in (server.url, wanted, hashlib.new(kind, b"body").hexdigest()):
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
        assert "download it yourself" in str(e.value) and "--teacher FILE" in str(e.value)
        target = re.search(r"save it as (\S+),", str(e.value))[1]
    pathlib.Path(target).write_bytes(b"here")         # the remedy works
    assert nets.fetch(url) == target and pathlib.Path(target).read_bytes() == b"here"


def test_url_loads_like_a_file(server, nvidia):
    net = build_net(nvidia[0], 8, 1)
    server.body["/net.pkl"] = pickle.dumps(dict(ema=net))
    state, kwargs = nets.load_pretrained(server.url + "/net.pkl")
    same(state, net)
    assert kwargs == dict(img_resolution=8, img_channels=1)
