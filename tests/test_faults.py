"""Faults of long runs on shared machines, F1 to F18: each is made to happen, and what must survive is compared.

The default is short; `python -m pytest tests/test_faults.py --long` runs every fault as often as the table of
docs/faults.md says, and a soak of 20,000 steps with 25 faults.
"""
import contextlib
import json
import os
import shlex
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, make_dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, code, draw_seeds, fork, wait, weights
from PIL import Image

import fid
import nets
import train_cmt_cifar as script

pytestmark = pytest.mark.usefixtures("here")
LONG = pytest.mark.long
PRETRAIN = [*TINY, "--stage", "pretrain", "--nfe", "2"]        # nfe: of the sample grid at every save


@pytest.fixture
def often(request):
    """often(short, full): how many times a fault happens, by default and with --long."""
    return lambda short, full: full if request.config.getoption("--long") else short


def same(a, b):
    return torch.equal(weights(a), weights(b))


def last_step(out):
    """The newest step in metrics.jsonl; 0 without one."""
    path = Path(out, "metrics.jsonl")
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_step(out, step, pid):
    while last_step(out) < step:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), Path("log").read_text()[-2000:]
        time.sleep(0.005)


def pair(argv, patches=(None, None), outs=None, more=((), ())):
    """Two processes of one run, as torchrun would start them; outs, more: what each has for itself."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    own = [[*argv, *more[r], *(["--out", outs[r]] if outs else [])] for r in range(2)]
    return [fork(own[r], f"log{r}", r, 2, port, patches[r] or (lambda: None)) for r in range(2)]


def stop_after(step):
    """A patch: the run is asked to stop after `step` steps, as a signal would."""
    real, calls = script.count, []

    def count(*a):
        calls.append(1)
        real(*a)
        if len(calls) == step - 1:
            script.STOP.append(signal.SIGTERM)

    def patch():
        script.count = count
        script.STOP.extend([signal.SIGTERM] * (step == 1))
    return patch


def stop_soon(monkeypatch):
    """A signal arrives during the first step of this process: the second one is saved."""
    real = script.count
    monkeypatch.setattr(script, "count", lambda *a: (script.STOP.append(signal.SIGTERM), real(*a)))


# ---- a process ends ------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", [pytest.param("pretrain", marks=LONG), "mid", pytest.param("post", marks=LONG)])
def test_f1_kill_at_random_times(road, stage, often):
    """Every restart succeeds, loses at most --save_every steps, and the end is the undisturbed run's, bit for bit."""
    kills, steps = often(2, 10), often(15, 200)
    argv = [*TINY, "--stage", stage, "--steps", steps, "--save_every", 3, "--dropout", 0.2, "--nfe", 4, "--trajectories", 8]
    argv += [] if stage == "pretrain" else ["--teacher", road / "pretrain.pt", "--loss", "l2"]
    argv += ["--mid", "none"] if stage == "post" else []
    assert wait(fork([*argv, "--out", "whole"], "log")) == 0
    rng = random.Random(0)
    for k in range(kills):
        pid = fork([*argv, "--out", "cut"], "log")
        wait_for_step("cut", max(4, steps * k // kills), pid)
        time.sleep(rng.random() * 0.05)
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL
        reached, saved = last_step("cut"), nets.load_checkpoint(f"cut/{stage}.pt")["step"]
        assert 0 <= reached - saved <= 3
    assert wait(fork([*argv, "--out", "cut"], "log")) == 0 and same(f"whole/{stage}.pt", f"cut/{stage}.pt")
    assert [m["step"] for m in script.fid.read_metrics("cut")] == [*range(1, steps + 1)]        # each one once
    assert nets.load_checkpoint(f"cut/{stage}.pt")["script"] == "train_cmt_cifar.py"


@pytest.mark.parametrize("stage", [pytest.param("pretrain", marks=LONG), pytest.param("mid", marks=LONG), "post"])
def test_f2_signal_saves_the_current_step(road, stage, often):
    """SIGTERM: exit code 75, a checkpoint of the step just done, nothing lost, the same end."""
    argv = [*TINY, "--stage", stage, "--steps", often(12, 40), "--save_every", 1000, "--trajectories", "4", "--loss", "l2"]
    argv += [] if stage == "pretrain" else ["--teacher", road / "pretrain.pt", "--mid", "cmt" if stage == "mid" else "none"]
    assert wait(fork([*argv, "--out", "whole"], "log")) == 0
    for _ in range(often(1, 5)):
        before = last_step("cut")
        pid = fork([*argv, "--out", "cut"], "log")
        wait_for_step("cut", before + 2, pid)
        os.kill(pid, signal.SIGTERM)
        sent = time.time()
        assert wait(pid) == 75 and time.time() - sent < 5
        assert nets.load_checkpoint(f"cut/{stage}.pt")["step"] == last_step("cut")
    assert "is saved, run the same command again" in Path("log").read_text()
    assert wait(fork([*argv, "--out", "cut"], "log")) == 0 and same(f"whole/{stage}.pt", f"cut/{stage}.pt")


def test_f2_signal_to_one_of_two_processes_stops_both():
    argv = [*PRETRAIN, "--steps", "5000", "--save_every", "5000", "--out", "run"]
    pids = pair(argv)
    wait_for_step("run", 3, pids[0])
    os.kill(pids[1], signal.SIGTERM)
    assert [wait(p) for p in pids] == [75, 75]
    assert nets.load_checkpoint("run/pretrain.pt")["step"] == last_step("run") < 5000


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_terminal_and_slurms_signal_save_like_sigterm(number):
    heard = lambda: setattr(script, "SIGNALS", [number])           # noqa: E731    pytest itself may run under nohup
    pid = fork([*PRETRAIN, "--steps", "5000", "--save_every", "5000", "--out", "run"], "log", patch=heard)
    wait_for_step("run", 2, pid)
    os.kill(pid, number)
    assert wait(pid) == 75 and nets.load_checkpoint("run/pretrain.pt")["step"] == last_step("run")


def test_what_nohup_ignores_stays_ignored():
    text = "import signal, train_cmt_cifar as s; print(signal.SIGHUP in s.SIGNALS, signal.SIGTERM in s.SIGNALS)"
    command = f"trap '' HUP; exec {sys.executable} -c '{text}'"
    run = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.split() == ["False", "True"], run.stderr


@pytest.mark.parametrize("streams", [[1], [1, 2]])
def test_a_closed_pipe_ends_the_output_not_the_run(streams):
    """As `| head` does, or `2>&1 | head`; the exit code of a stop is kept as well."""
    def deaf():
        read, write = os.pipe()
        for stream in streams:
            os.dup2(write, stream)
        os.close(read)
    argv = [*PRETRAIN, "--steps", "4", "--out", "run"]
    assert wait(fork(argv, "log", patch=lambda: (deaf(), stop_after(2)()))) == 75
    assert wait(fork(argv, "log", patch=deaf)) == 0
    assert nets.load_checkpoint("run/pretrain.pt")["step"] == 4 == last_step("run")
    assert "pretrain      4/4" in Path("run/log.txt").read_text()


def test_f3_kill_inside_a_save(often):
    """At every point of a save the old or the new checkpoint is whole; after the last rename the new one is."""
    Path("run").mkdir()
    nets.save_checkpoint("run/a.pt", step=0, ema={"w": torch.zeros(5000)})

    def half(state, f):
        f.write(bytes(10_000))
        os.kill(os.getpid(), signal.SIGKILL)

    def at_call(name, k):
        real, calls = getattr(os, name), []

        def killing(*a):
            if len(calls) == k:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(1)
            return real(*a)
        setattr(os, name, killing)
    points = [lambda: setattr(torch, "save", half), *(lambda n=n, k=k: at_call(n, k) for n, k in
              [("fsync", 0), ("replace", 0), ("replace", 1), ("fsync", 1)])]
    old = 0
    for step in range(1, 1 + often(10, 20)):
        pid = os.fork()
        if not pid:
            points[step % 5]()
            nets.save_checkpoint("run/a.pt", step=step, ema={"w": torch.full((5000,), float(step))})
            os._exit(0)
        assert wait(pid) == -signal.SIGKILL
        state = nets.load_checkpoint("run/a.pt")
        assert state["step"] == (step if step % 5 == 4 else old)
        assert (state["ema"]["w"] == state["step"]).all()
        old = state["step"]


def test_f7_a_dead_process_ends_the_run_and_a_restart_finishes_it():
    argv = [*PRETRAIN, "--steps", "16", "--save_every", "4", "--batch_gpu", 8]
    for pid in pair([*argv, "--out", "whole"]):
        assert wait(pid) == 0
    pids = pair([*argv, "--out", "cut"])
    wait_for_step("cut", 9, pids[0])
    os.kill(pids[1], signal.SIGKILL)
    died = time.time()
    assert [wait(p) for p in pids] == [1, -signal.SIGKILL] and time.time() - died < 30
    lines = Path("log0").read_text().splitlines()
    assert "another process died" in lines[-1] and "dist." in lines[-1] and "Traceback" not in Path("log0").read_text()
    assert wait(fork([*argv, "--out", "cut"], "log")) == 0                    # what is left of the machine goes on
    assert same("whole/pretrain.pt", "cut/pretrain.pt")


@LONG
def test_f7_torchrun_restarts_by_itself(monkeypatch):
    argv = [str(a) for a in [*PRETRAIN, "--steps", "400", "--save_every", "20", "--batch_gpu", 4]]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1",
              str(ROOT / "train_cmt_cifar.py")]
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")         # else it meets addresses of the dead in torchrun's store
    assert subprocess.run([*launch, *argv, "--out", "whole"], capture_output=True).returncode == 0
    p = subprocess.Popen([*launch, *argv, "--out", "cut"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while last_step("cut") < 50:
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(p.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert p.wait(timeout=120) == 0 and same("whole/pretrain.pt", "cut/pretrain.pt")


@LONG
@pytest.mark.parametrize("nodes, ends", [("2", 1), ("1:2", 0)])
def test_f7_a_dead_node(nodes, ends):
    """Two torchruns, one is killed with its process. Of --nnodes=2 the other ends; of 1:2 it goes on alone, the same."""
    argv = [str(a) for a in [*PRETRAIN, "--steps", "300", "--save_every", "20", "--batch_gpu", 8]]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc_per_node=1", "--max-restarts=1",
              "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1",
              "--rdzv_conf=last_call_timeout=3,join_timeout=20", str(ROOT / "train_cmt_cifar.py"), *argv, "--out", "cut"]
    first = subprocess.Popen(launch, stdout=open("log", "w"), stderr=subprocess.STDOUT)
    time.sleep(1)                                               # the store is the first one's
    second = subprocess.Popen(launch, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step("cut", 50, first.pid)
    children = subprocess.run(["pgrep", "-P", str(second.pid)], capture_output=True, text=True).stdout.split()
    for pid in (second.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    second.wait()
    assert first.wait(timeout=180) == ends
    assert "another process died" in Path("log").read_text()
    if ends == 0:
        whole = [sys.executable, str(ROOT / "train_cmt_cifar.py"), *argv, "--out", "whole"]     # nets as shipped, as torchrun's
        assert subprocess.run(whole, stdout=subprocess.DEVNULL).returncode == 0 and same("whole/pretrain.pt", "cut/pretrain.pt")


@pytest.mark.parametrize("step, call", [(2, "dist.all_reduce(grad)"), pytest.param(3, "dist.monitored_barrier(", marks=LONG)])
def test_f8_a_hung_process_ends_the_run_and_a_slow_save_does_not(step, call):
    """Within TIMEOUT + 15 s, with a line that names the call that waited in vain. A save takes longer than TIMEOUT."""
    def slow():
        script.fid.TIMEOUT, real = timedelta(seconds=2), nets.save_checkpoint
        nets.save_checkpoint = lambda *a, **k: (time.sleep(2.5 if step == 2 else 0), real(*a, **k))

    def hang():
        slow()
        real, calls = script.count, []
        script.count = lambda *a: time.sleep(100) if len(calls) == step else calls.append(1) or real(*a)
    pids = pair([*PRETRAIN, "--steps", "30", "--save_every", "2", "--out", "run"], (slow, hang))
    began = time.time()
    assert wait(pids[0]) == 1 and time.time() - began < 2.5 + 2 + 15
    os.kill(pids[1], signal.SIGKILL)
    wait(pids[1])
    line = Path("log0").read_text().splitlines()[-1]
    assert call in line and re.search("2000 ?ms", line) and "run again" in line, line
    assert nets.load_checkpoint("run/pretrain.pt")["step"] == 2 * (step - 1)


@pytest.mark.parametrize("stage", [pytest.param("pretrain", marks=LONG), "mid", pytest.param("post", marks=LONG)])
def test_f9_two_processes_then_one_then_two(road, stage):
    """With two micro-batches a step, the sums have one order: 1 = 2 = 2 -> 1 -> 2 processes, bit for bit."""
    argv = [*TINY, "--stage", stage, "--steps", "9", "--batch_gpu", "8", "--dropout", "0.2", "--loss", "l2",
            "--trajectories", "16", "--nfe", "4"]
    argv += [] if stage == "pretrain" else ["--teacher", road / "pretrain.pt", "--mid", "cmt" if stage == "mid" else "none"]
    assert wait(fork([*argv, "--out", "one"], "log")) == 0
    for pid in pair([*argv, "--out", "mixed"], (stop_after(3), stop_after(3))):
        assert wait(pid) == 75
    assert wait(fork([*argv, "--out", "mixed"], "log", patch=stop_after(3))) == 75
    for pid in pair([*argv, "--out", "mixed"]):
        assert wait(pid) == 0
    assert same(f"one/{stage}.pt", f"mixed/{stage}.pt")


@pytest.mark.parametrize("there, says", [(False, "checkpoints in mine: ['pretrain'] in process 0, [] in process 1"),
                                         (True, "step of mine/pretrain.pt: 3 in process 0, 2 in process 1")])
def test_processes_that_read_different_checkpoints_are_refused_by_name(there, says):
    """Two nodes without a shared --out: today's gradients would be mixed, and the mixture saved as finished."""
    argv = [*PRETRAIN, "--steps", "6"]
    assert wait(fork([*argv, "--out", "mine"], "log", patch=stop_after(3))) == 75
    before = Path("mine/pretrain.pt").read_bytes()
    os.mkdir("theirs")
    if there:
        assert wait(fork([*argv, "--out", "theirs"], "log", patch=stop_after(2))) == 75
        os.remove("theirs/log.txt")
    os.link("mine/log.txt", "theirs/log.txt")                   # else this is what differs
    pids = pair(argv, outs=("mine", "theirs"))
    assert [wait(p) for p in pids] == [3, 3]
    line = Path("log0").read_text().splitlines()[-1]
    assert says in line and "share --out" in line
    assert Path("mine/pretrain.pt").read_bytes() == before


@pytest.mark.parametrize("there", [False, pytest.param(True, marks=LONG)])
def test_nodes_that_do_not_share_out_are_refused_before_the_first_step(there):
    """Also at a fresh start, and where another node has what an earlier run has left."""
    if there:
        for folder in ("mine", "theirs"):
            os.mkdir(folder)
            Path(folder, "log.txt").write_text("a line\n")
    assert [wait(p) for p in pair([*PRETRAIN, "--steps", "2"], outs=("mine", "theirs"))] == [3, 3]
    line = Path("log0").read_text().splitlines()[-1]
    assert "mine/log.txt: " in line and f"{'7 bytes, crc32' if there else '0 bytes'}" in line and "share --out" in line
    assert not Path("mine/pretrain.pt").exists()


def test_a_node_with_other_data_of_the_same_name_is_refused(monkeypatch):
    """The first process reads the pictures for all; the others compare their names, in a .zip their CRCs."""
    for name, content in (("a.zip", "1"), ("b.zip", "2")):
        with zipfile.ZipFile(name, "w") as file:
            file.writestr("0.png", content)
    for mine, theirs in (("a.zip", ["0.png"]), ("b.zip", ["0.png"])), ((".", ["a.zip"]), (".", ["b.zip"])):
        seen = []
        monkeypatch.setattr(fid, "from_first", lambda work: seen.append(work()) or seen[0])
        stamp = fid.check_once(*mine, lambda k: 0, "notes/a.txt")
        assert fid.check_once(*mine, lambda k: 0, "notes/a.txt") == stamp
        with pytest.raises(fid.DataError, match=f"^{theirs[0]} holds other files here .* share --data"):
            fid.check_once(*theirs, lambda k: 0, "notes/b.txt")


def test_processes_that_start_from_different_weights_are_refused(road):
    argv = [*TINY, "--stage", "mid", "--steps", "2", "--loss", "l2", "--trajectories", "4"]
    other = torch.load(road / "pretrain.pt", weights_only=True)
    other["ema"]["model.map_layer0.bias"] += 1e-3
    torch.save(other, "other.pt")
    pids = pair([*argv, "--out", "run"], more=(["--teacher", road / "pretrain.pt"], ["--teacher", "other.pt"]))
    assert [wait(p) for p in pids] == [3, 3] and "sum of the first weights" in Path("log0").read_text()


@LONG
def test_f9_four_micro_batches_agree_to_rounding():
    argv = [*PRETRAIN, "--steps", "6", "--batch_gpu", "4", "--dropout", "0.2"]
    assert wait(fork([*argv, "--out", "one"], "log")) == 0
    for pid in pair([*argv, "--out", "two"]):
        assert wait(pid) == 0
    a, b = (torch.cat([v.flatten() for v in nets.load_checkpoint(f"{d}/pretrain.pt")["net"].values()]) for d in ("one", "two"))
    assert 0 <= (a - b).norm() / a.norm() < 1e-5
    a, b = ([json.loads(line)["loss"] for line in open(f"{d}/metrics.jsonl")] for d in ("one", "two"))
    assert a == pytest.approx(b, rel=1e-4)                                            # the mean over both processes


def test_f16_ctrl_c_saves_and_a_second_one_leaves_at_once():
    def slow():
        real = nets.save_checkpoint
        nets.save_checkpoint = lambda *a, **k: (print("saving", flush=True), time.sleep(30 if Path("slow").exists() else 0), real(*a, **k))
    argv = [*PRETRAIN, "--steps", "5000", "--save_every", "5000", "--out", "run"]
    pid = fork(argv, "log", patch=slow)
    wait_for_step("run", 2, pid)
    os.kill(pid, signal.SIGINT)
    assert wait(pid) == 75
    first = nets.load_checkpoint("run/pretrain.pt")["step"]
    Path("slow").touch()
    pid = fork(argv, "log", patch=slow)
    wait_for_step("run", first + 2, pid)
    os.kill(pid, signal.SIGINT)
    while Path("log").read_text().count("saving") < 2:
        time.sleep(0.01)
    os.kill(pid, signal.SIGINT)
    sent = time.time()
    assert Path("log").read_text().count("stopping: this step is saved first; Ctrl-C now leaves at once\n") == 2      # in both runs, before the step ends
    assert wait(pid) == -signal.SIGINT and time.time() - sent < 2 and nets.load_checkpoint("run/pretrain.pt")["step"] == first


def test_f16_a_signal_where_nothing_is_saved_is_one_line_and_its_number(road):
    """Samples and scores: no traceback, and no silence."""
    argv = ["--data", "digits", "--stage", "sample", "--seeds", "0-99999", "--out", "drawn"]
    shutil.copytree(road, "drawn", ignore=shutil.ignore_patterns("samples"))        # of a test before this one
    for number in (signal.SIGINT, signal.SIGTERM):
        pid = fork(argv, "log")
        while not Path("drawn/samples").exists():
            time.sleep(0.01)
        os.kill(pid, number)
        assert wait(pid) == 128 + number
        shutil.rmtree("drawn/samples")
    assert Path("log").read_text().count("stopped by a signal; nothing is lost") == 2 and "Traceback" not in Path("log").read_text()


def test_a_finished_road_is_read_with_one_crc_pass_a_stage(road, monkeypatch):
    """Checkpoints are mapped, not read; every byte is checked once, where a stage resumes."""
    import zipfile as z
    passes, real = [], z.ZipFile.testzip
    monkeypatch.setattr(z.ZipFile, "testzip", lambda self: passes.append(Path(self.filename).name) or real(self))
    nets.is_whole.cache_clear()
    script.main([*TINY, "--out", str(road), "--steps", "3"])
    assert sorted(passes) == ["mid.pt", "post.pt", "pretrain.pt"]
    mapped, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: mapped.append(k["mmap"]) or load(*a, **k))
    nets.load_checkpoint(str(road / "post.pt"))
    assert mapped == [True]


def test_a_damaged_checkpoint_is_left_by_every_process_alike():
    """Two processes: both go on from the one before, and the end is that of an undisturbed run."""
    argv = [*PRETRAIN, "--steps", "6", "--save_every", "2", "--batch_gpu", "8"]
    for pid in pair([*argv, "--out", "whole"]):
        assert wait(pid) == 0
    for pid in pair([*argv, "--out", "cut"], (stop_after(5), stop_after(5))):
        assert wait(pid) == 75
    data = bytearray(Path("cut/pretrain.pt").read_bytes())
    data[len(data) // 2] ^= 4
    Path("cut/pretrain.pt").write_bytes(data)
    for pid in pair([*argv, "--out", "cut"]):
        assert wait(pid) == 0
    assert same("whole/pretrain.pt", "cut/pretrain.pt") and "is damaged" in Path("log1").read_text()


def test_weights_with_a_flipped_bit_are_refused_ours_by_name_and_others_with_a_warning(road, capsys):
    """As --teacher, as --init, and by nets.load_pretrained: torch alone loads nine of ten in silence."""
    state = torch.load(road / "pretrain.pt", weights_only=True)
    torch.save(state["ema"], "foreign.pt")
    for name, source in (("ours.pt", road / "pretrain.pt"), ("foreign.pt", "foreign.pt")):
        data = bytearray(Path(source).read_bytes())
        data[len(data) // 2] ^= 4
        Path(name).write_bytes(data)
    mid = [*TINY, "--stage", "mid", "--steps", "1", "--loss", "l2", "--out", "run"]
    for argv in ([*mid, "--teacher", "ours.pt"], [*mid, "--teacher", road / "pretrain.pt", "--init", "ours.pt"],
                 [*TINY, "--stage", "sample", "--init", "ours.pt", "--out", "drawn", "--seeds", "0"]):
        exit_code, err = code(argv, capsys)
        assert exit_code == 3 and "ours.pt: damaged, a byte in it is wrong (CRC)" in err, err
    assert not os.path.exists("run/mid.pt")
    script.nets.load_pretrained("foreign.pt")
    assert "warning: foreign.pt has wrong checksums" in capsys.readouterr().err
    data, rng = (road / "pretrain.pt").read_bytes(), random.Random(0)
    for place in [rng.randrange(len(data)) for _ in range(8)] + [rng.randrange(len(data) - 9999, len(data)) for _ in range(24)]:
        Path("ours.pt").write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1:])     # headers and the directory as well
        try:                                          # a date or a filler may differ
            same = script.nets.load_pretrained("ours.pt")[0]
            assert all(torch.equal(w, state["ema"][name]) for name, w in same.items())
        except ValueError as error:
            assert str(error).startswith("ours.pt: ") and "\n" not in str(error)


def test_a_stage_that_is_not_finished_is_missed_in_a_line(road, capsys):
    shutil.copytree(road, "cut")
    state = torch.load("cut/post.pt", weights_only=True)
    torch.save({**state, "step": state["step"] - 1}, "cut/post.pt")
    for stage in ("eval", "sample"):
        script.main([*TINY, "--out", "cut", "--steps", "3", "--stage", stage, "--seeds", "0"] if stage == "sample" else
                    [*TINY, "--out", "cut", "--steps", "3", "--stage", stage])
        assert "post.pt is not finished, so neither drawn nor scored" in capsys.readouterr().err
        script.fid.SAID.clear()
    script.main([*TINY, "--out", "cut", "--steps", "3", "--stage", "eval", "--init", "cut/mid.pt"])
    assert "not finished, so" not in capsys.readouterr().err


def test_a_score_against_other_images_than_those_of_the_training_says_so(road, capsys):
    """Of mid-training, which saw none, nothing is said."""
    found, seen = script.candidates(script.parse([*TINY, "--out", str(road), "--stage", "eval"])), fid.digits()[0]
    for images, names in (seen, []), (seen[1:], ["teacher", "post"]):
        fid.say_changed(found, fid.stamp(images))
        assert re.findall("--data has changed since (.*) was trained", capsys.readouterr().err) == names
    fid.say_changed(found, "")
    assert not capsys.readouterr().err                # against statistics alone


def test_a_short_stage_that_diverged_is_not_finished():
    """After one good step all others are skipped: fewer than ten, and yet no net to go on from."""
    cfg = script.parse([*PRETRAIN, "--steps", "5"])
    since = dict(step=0, scale=1.0, skipped=0, bad=0, losses=[], norms=[])
    script.count(cfg, since, 1.0, 1.0)
    for _ in range(3):
        script.count(cfg, since, float("nan"), 1.0)
    with pytest.raises(SystemExit) as e:
        script.count(cfg, since, float("nan"), 1.0)
    assert e.value.code == 4


def test_a_teacher_with_a_flipped_bit_is_not_learned_from(road):
    Path("run").mkdir()
    data = bytearray((road / "pretrain.pt").read_bytes())
    data[len(data) // 2] ^= 4
    Path("run/pretrain.pt").write_bytes(data)
    with pytest.raises(SystemExit) as e:
        script.main([*TINY, "--stage", "mid", "--loss", "l2", "--out", "run"])
    assert e.value.code == 3 and not Path("run/mid.pt").exists()


def test_a_resumed_post_training_needs_neither_teacher_nor_mid(road):
    """Both were overwritten by the checkpoint at once; on another day they may be gone."""
    argv = [*TINY, "--stage", "post", "--steps", "6", "--out", "run"]
    Path("run").mkdir()
    for name in ("pretrain.pt", "mid.pt"):
        os.link(road / name, f"run/{name}")
    assert wait(fork(argv, "log", patch=stop_after(3))) == 75
    os.remove("run/pretrain.pt")
    os.remove("run/mid.pt")
    assert wait(fork(argv, "log")) == 0 and nets.load_checkpoint("run/post.pt")["step"] == 6


# ---- the disk ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl"])
def test_f4_a_line_that_finds_no_room_is_an_error_of_one_line(name, capsys):
    Path("run").mkdir()
    Path("run", name).symlink_to("/dev/full")
    exit_code, err = code([*PRETRAIN, "--steps", "1", "--out", "run"], capsys)
    assert exit_code == 3 and "No space left" in err and "free some space for run" in err and len(err.strip().splitlines()) == 1


def test_f4_full_disk_is_one_line_and_keeps_what_was_saved():
    """A write limit stands in for a full disk: torch fails in the middle of a checkpoint."""
    argv = [*PRETRAIN, "--steps", "9", "--save_every", "3", "--out", "run"]
    assert wait(fork(argv, "log", patch=stop_after(4))) == 75
    before = Path("run/pretrain.pt").read_bytes()
    limit = lambda size: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))    # noqa: E731
    assert wait(fork(argv, "log", patch=limit(200_000))) == 3
    lines = Path("log").read_text()
    assert "run/pretrain.pt: cannot write 658," in lines.splitlines()[-1] and "free some space" in lines
    assert Path("run/pretrain.pt").read_bytes() == before and not list(Path("run").glob("*.tmp"))
    assert wait(fork(argv, "second", patch=limit(Path("run/log.txt").stat().st_size + 100))) == 3    # no room for a line
    assert "free some space for run" in Path("second").read_text().splitlines()[-1]
    assert Path("run/pretrain.pt").read_bytes() == before and "Traceback" not in lines + Path("second").read_text()


def test_f5_truncated_checkpoints_fall_back_to_the_one_before(capsys):
    argv = [*PRETRAIN, "--out", "run", "--steps", "4", "--save_every", "1"]
    script.main(argv)
    good, data = weights("run/pretrain.pt"), Path("run/pretrain.pt").read_bytes()
    for part in (0, 0.01, 0.5, 0.999):
        Path("run/pretrain.pt").write_bytes(data[:int(part * len(data))])
        assert nets.load_checkpoint("run/pretrain.pt")["step"] == 3
        assert "is damaged" in capsys.readouterr().err
    script.main(argv)
    assert torch.equal(weights("run/pretrain.pt"), good)
    assert nets.load_checkpoint("run/pretrain.pt.prev", whole=True)["step"] == 3       # kept: the damaged one did not take its place
    for name in ("run/pretrain.pt", "run/pretrain.pt.prev"):
        Path(name).write_bytes(b"nothing")
    exit_code, err = code(argv, capsys)
    assert exit_code == 3 and "pretrain.pt and run/pretrain.pt.prev: damaged; to start anew move that and later stages away" in err                        # never a fresh start


def test_f5_flipped_bits_are_found_or_harmless(often, capsys):
    """Every byte that holds a number is covered by a CRC: no flip ever gives other weights."""
    good = torch.randn(500)
    nets.save_checkpoint("a.pt", step=1, ema={"w": good})
    data, found, flips = bytearray(Path("a.pt").read_bytes()), 0, often(60, 200)
    for k in range(flips):
        position = (k * 7919) % (8 * len(data))
        data[position // 8] ^= 1 << position % 8
        Path("a.pt").write_bytes(data)
        try:
            assert torch.equal(nets.load_checkpoint("a.pt", whole=True)["ema"]["w"], good)
        except nets.WeightsError:
            found += 1
        data[position // 8] ^= 1 << position % 8
    assert found > flips // 2


# ---- the data ------------------------------------------------------------------------------------
def picture(kind):
    """The bytes of a 32x32 image file that is not what it should be."""
    rgb = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    images = {"good": Image.fromarray(rgb), "LAB": Image.new("LAB", (32, 32)), "small": Image.fromarray(rgb[:31]),
              "float": Image.fromarray(rgb[..., 0].astype(np.float32))}
    image = images.get(kind, images["good"])
    image.save("picture", format="TIFF" if kind in ("LAB", "float") else "PNG")
    data = Path("picture").read_bytes()
    return {"empty": b"", "cut": data[:len(data) // 2], "text": b"<html>not found</html>"}.get(kind, data)


@pytest.mark.parametrize("form", ["zip", "folder"])
@pytest.mark.parametrize("kind", ["LAB", "float", "small", "empty", "cut", "text"])
def test_f6_one_bad_image_of_many_is_named_before_the_first_step(kind, form, capsys):
    with zipfile.ZipFile("own.zip", "w") as z:
        for i in range(20):
            z.writestr(f"00000/img{i:08d}.png", picture(kind if i == 13 else "good"))
    zipfile.ZipFile("own.zip").extractall("folder")
    for flags in ([], ["--res", "32"]):
        argv = ["--data", "own.zip" if form == "zip" else "folder", "--stage", "pretrain", "--out", "x", *flags]
        exit_code, err = code(argv, capsys)
        assert exit_code == 3 and "img00000013.png" in err and len(err.strip().splitlines()) == 1, err
    assert not Path("x/pretrain.pt").exists()


def test_f18_changed_data_is_refused_with_both_counts(monkeypatch, capsys):
    argv = [*PRETRAIN, "--out", "x", "--steps", "4"]
    stop_soon(monkeypatch)
    assert code(argv, capsys)[0] == 75
    script.STOP.clear()
    images = script.fid.digits()[0]
    for changed, count in ((images[1:], 1796), (images.flip(0), 1797)):               # a file less; another order
        monkeypatch.setattr(script.fid, "digits", lambda: (changed, None))
        exit_code, err = code(argv, capsys)
        assert exit_code == 2 and "saw 1797 images, crc32" in err and f"now {count} images" in err


def test_another_teacher_is_not_taken_up_in_the_middle(road, capsys, monkeypatch):
    """One mid.pt would mix what two teachers said; a copy of the same weights elsewhere goes on."""
    argv, real = [*TINY, "--stage", "mid", "--loss", "l2", "--steps", "4", "--out", "x", "--teacher"], script.count
    stop_soon(monkeypatch)
    assert code([*argv, road / "pretrain.pt"], capsys)[0] == 75
    script.STOP.clear()
    monkeypatch.setattr(script, "count", real)
    other = torch.load(road / "pretrain.pt", weights_only=True)
    torch.save(other, "copy.pt")
    other["ema"]["model.map_layer0.bias"] += 1e-3
    torch.save(other, "other.pt")
    exit_code, err = code([*argv, "other.pt"], capsys)
    assert exit_code == 2 and "--data or --teacher has changed" in err and "teacher of crc32" in err
    script.main([*map(str, argv), "copy.pt"])
    assert nets.load_checkpoint("x/mid.pt")["step"] == 4


def own_images(name, seed=0):
    Path(name).mkdir()
    for i in range(4):
        Image.fromarray(np.random.default_rng(seed + i).integers(0, 255, (8, 8, 3), np.uint8)).save(f"{name}/{i}.png")


def test_a_run_goes_on_when_the_data_are_the_same_wherever_they_lie(capsys, monkeypatch):
    """Two steps a run, under other names and on two threads: the end of one run; other images are refused."""
    own_images("own")
    own_images("copy")
    own_images("other", seed=9)
    argv, real = "--stage pretrain --batch 4 --nfe 2 --log_every 1 --steps 5".split(), script.count
    script.main([*argv, "--data", "own", "--out", "whole"])
    monkeypatch.setattr(script, "count", lambda *a: (real(*a), script.STOP.append(signal.SIGTERM)))
    for name in ("own/", f"{os.getcwd()}/own"):
        assert code([*argv, "--data", name, "--out", "cut"], capsys)[0] == 75
        script.STOP.clear()
        exit_code, err = code([*argv, "--data", "other", "--out", "cut"], capsys)
        assert exit_code == 2 and "--data or --teacher has changed" in err
    monkeypatch.setattr(script, "count", real)
    torch.set_num_threads(2)
    try:
        script.main([*argv, "--data", "copy", "--out", "cut"])
    finally:
        torch.set_num_threads(1)
    assert nets.finished("cut/pretrain.pt")["step"] == 5
    assert torch.allclose(weights("cut/pretrain.pt"), weights("whole/pretrain.pt"), atol=1e-6)
    exit_code, err = code([*argv, "--data", "other", "--out", "cut"], capsys)         # the finished stage too
    assert exit_code == 2 and "--data or --teacher has changed" in err
    script.main([*argv, "--data", "own/", "--out", "cut"])
    assert "finished, nothing to do" in capsys.readouterr().out
    exit_code, err = code([*argv, "--data", "digits", "--out", "cut"], capsys)
    assert exit_code == 2 and "--data copy, now digits" in err


def test_a_finished_stage_of_another_teacher_is_refused(road, capsys):
    """Its name alone decides nothing: a copy is the same teacher."""
    argv = [*TINY, "--stage", "mid", "--loss", "l2", "--steps", "2", "--out", "x", "--teacher"]
    script.main([*map(str, argv), str(road / "pretrain.pt")])
    other = torch.load(road / "pretrain.pt", weights_only=True)
    torch.save(other, "copy.pt")
    script.main([*map(str, argv), "copy.pt"])
    assert "finished, nothing to do" in capsys.readouterr().out
    other["ema"]["model.map_layer0.bias"] += 1e-3
    torch.save(other, "other.pt")
    exit_code, err = code([*argv, "other.pt"], capsys)
    assert exit_code == 2 and "--data or --teacher has changed" in err
    shutil.copy("copy.pt", "same name.pt")
    script.main([*map(str, argv), "same name.pt", "--out", "y"])
    torch.save(other, "same name.pt")                                        # a teacher trained anew, in its old place
    exit_code, err = code([*argv, "same name.pt", "--out", "y"], capsys)
    assert exit_code == 2 and "--data or --teacher has changed" in err


def test_a_finished_stage_of_constant_rate_goes_on_with_more_steps(road, capsys):
    """Bit for bit as if they had been asked for at first; not with fewer, nor beneath a stage that began from it."""
    argv = [*PRETRAIN, "--decay", "constant", "--warmup", "2", "--steps"]
    script.main([*argv, "4", "--out", "whole"])
    script.main([*argv, "2", "--out", "grown"])
    script.main([*argv, "4", "--out", "grown"])
    assert same("whole/pretrain.pt", "grown/pretrain.pt")
    assert nets.finished("grown/pretrain.pt")["cfg"]["steps"] == 4
    assert code([*argv, "3", "--out", "grown"], capsys)[0] == 2
    Path("grown/mid.pt").touch()
    exit_code, err = code([*argv, "6", "--out", "grown"], capsys)
    assert exit_code == 2 and "--pretrain.steps 4, now 6" in err and "linear" not in err           # its rate is constant
    exit_code, err = code([*TINY, "--out", road, "--stage", "post", "--steps", "6"], capsys)
    command = err.partition("; to train it on, in a folder of its own: python train_cmt_cifar.py ")[2].strip()
    assert exit_code == 2 and f"--teacher {road}/pretrain.pt --init {road}/post.pt --steps 3 " in command
    assert "to train it on" not in code([*TINY, "--out", road, "--stage", "pretrain", "--steps", "6"], capsys)[1]
    err = code([*TINY, "--out", road, "--stage", "post", "--steps", "6", "--lr", "1.0", "--q", "64"], capsys)[1]     # all that differ
    assert "to train it on" not in err and re.search(r"--post.steps 3, now 6 and --post.lr \S+, now 1.0 and --post.q \d+, now 64; repeat", err)
    assert f"use another --out, with --teacher {road}/pretrain.pt to keep its teacher" in err
    capsys.readouterr()
    script.main(shlex.split(f"{command} --out new"))                      # with every flag of the run that post reads, TINY's too, and no other
    made, new = (nets.finished(f"{out}/post.pt") for out in (road, "new"))
    unread = {*fid.never_read(script.parse([*TINY, "--stage", "post"])), *fid.SCORED}
    assert new["step"] == 3 and {k for k in made["cfg"] if made["cfg"][k] != new["cfg"][k]} <= {"out", "init", "teacher", *unread}
    assert "reads no" not in capsys.readouterr().out and new["cfg"]["batch"] == 16


def test_a_signal_between_stages_ends_the_road(road, capsys, monkeypatch):
    """It came when no loop was there to hear it: the score of hours is not begun."""
    monkeypatch.setattr(script, "STOP", [signal.SIGTERM])
    exit_code, err = code([*TINY, "--out", road, "--steps", "3"], capsys)
    assert exit_code == 75 and "run the same command again" in err


def test_a_random_start_is_one_configuration_stage_by_stage_or_at_once(road):
    argv = [*TINY, "--steps", "2", "--loss", "l2", "--init", "random", "--out", "x", "--teacher", road / "pretrain.pt"]
    for stage in ("mid", "post"):
        script.main([*map(str, argv), "--stage", stage])
    script.main(list(map(str, argv)))
    assert nets.load_checkpoint("x/post.pt")["cfg"]["init"] == "random"


# ---- the numbers ---------------------------------------------------------------------------------
def faulty(monkeypatch, bad, factor):
    """The loss times factor at the steps in bad (from 1)."""
    real, calls = script.loss_dm, []
    monkeypatch.setattr(script, "loss_dm", lambda *a: real(*a) * (factor if calls.append(1) or len(calls) in bad else 1))


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_f10_a_batch_that_is_not_finite_is_skipped_and_counted(monkeypatch, capsys, factor):
    flats, seen, flatten, count = [], [], nets.flatten, script.count
    monkeypatch.setattr(nets, "flatten", lambda net: flats.append(flatten(net)) or flats[-1])
    monkeypatch.setattr(script, "count", lambda *a: (seen.append(flats[0][0].clone()), count(*a)))
    faulty(monkeypatch, {2, 4}, factor)
    script.main([*PRETRAIN, "--steps", "6", "--out", "few"])
    state = nets.load_checkpoint("few/pretrain.pt")
    assert state["skipped"] == 2 and "skipped 2" in capsys.readouterr().out
    assert [torch.equal(a, b) for a, b in zip(seen, seen[1:])] == [True, False, True, False, False]
    moments = state["opt"]["state"][0]                # of the four steps that were made, and of no other
    assert moments["step"] == 4 and moments["exp_avg"].isfinite().all() and moments["exp_avg_sq"].isfinite().all()


def test_f10_ten_in_a_row_end_the_run_with_the_last_good_checkpoint(monkeypatch, capsys):
    faulty(monkeypatch, range(5, 99), float("nan"))
    exit_code, err = code([*PRETRAIN, "--steps", "30", "--save_every", "4", "--out", "many"], capsys)
    assert exit_code == 4 and "not finite in 10 steps" in err and "--lr" in err
    state = nets.load_checkpoint("many/pretrain.pt")
    assert all(torch.isfinite(v).all() for v in state["net"].values()) and state["step"] <= 12


def test_f11_a_loss_spike_is_logged_and_moves_no_later_batch(monkeypatch):
    """A loss of 1,000 times its size. Clipping belongs to the text-to-image script: test_t2i.py."""
    drawn, real = [], script.draw
    monkeypatch.setattr(script, "draw", lambda *a: drawn.append(real(*a)) or drawn[-1])
    argv = [*PRETRAIN, "--steps", "12"]
    script.main([*argv, "--out", "calm"])
    faulty(monkeypatch, {6}, 1000.0)
    script.main([*argv, "--out", "spike"])
    assert all(torch.equal(a, b) for a, b in zip(drawn[:12], drawn[12:]))
    grads = [json.loads(line)["grad"] for line in open("spike/metrics.jsonl")]
    assert grads[5] > 100 * grads[4]


def test_f17_evaluation_inside_a_run_changes_no_weight():
    for out, save in (("a", "1"), ("b", "3")):                                        # a save draws a sample grid
        script.main([*PRETRAIN, "--out", out, "--steps", "3", "--save_every", save])
    assert same("a/pretrain.pt", "b/pretrain.pt")


# ---- the command ---------------------------------------------------------------------------------
class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("flag", ["--teacher", "--init"])
def test_f12_malicious_weights_are_refused_and_not_run(road, flag, capsys):
    """One attack through the command line; test_load_pretrained.py holds the others, by name."""
    Path("evil.pkl").write_bytes(pickle.dumps({"ema": Evil()}))
    torch.save({"ema": Evil()}, "evil.pt")
    for name in ("evil.pkl", "evil.pt"):
        argv = [*TINY, "--stage", "mid", "--loss", "l2", "--teacher", road / "pretrain.pt", flag, name, "--out", "x"]
        exit_code, err = code(argv, capsys)
        assert exit_code == 3 and "system" in err and not os.path.exists("evil"), err


def test_f13_weights_of_another_shape_are_refused_by_name(road, capsys):
    state = torch.load(road / "pretrain.pt", weights_only=True)
    torch.save({**state, "model": {**state["model"], "model_channels": 32}}, "small.pt")
    exit_code, err = code([*TINY, "--stage", "mid", "--teacher", "small.pt", "--out", "x"], capsys)
    assert exit_code == 3 and "does not fit the network" in err and "model.map_layer0.weight (64, 16)" in err


@pytest.mark.parametrize("flag", ["--teacher", "--init"])
@pytest.mark.parametrize("what", ["missing.pt", "folder", "bytes.pkl"])
def test_f14_weights_that_are_not_there_are_never_a_fresh_start(road, flag, what, capsys):
    Path("folder").mkdir()
    Path("bytes.pkl").write_bytes(b"nothing")
    argv = [*TINY, "--stage", "mid", "--loss", "l2", "--teacher", road / "pretrain.pt", flag, what, "--out", "x"]
    exit_code, err = code(argv, capsys)
    assert exit_code == 3 and what in err and len(err.strip().splitlines()) == 1 and not Path("x/mid.pt").exists()


def test_f14_a_refusal_by_a_checkpoint_stands_in_the_log(capsys):
    """Read once the folder is locked, so that its log has the command and why it ended."""
    script.main([*PRETRAIN, "--steps", "1", "--out", "mine"])
    assert code([*PRETRAIN, "--steps", "1", "--lr", "5e-3", "--out", "mine"], capsys)[0] == 2
    lines = Path("mine/log.txt").read_text().splitlines()
    assert "with --pretrain.lr" in lines[-1] and "--lr 5e-3" in lines[-2]


def test_f14_an_out_that_is_a_file_is_refused(capsys, monkeypatch):
    Path("taken").write_bytes(b"mine")
    for flags in [], ["--dry_run"]:
        exit_code, err = code([*PRETRAIN, *flags, "--out", "taken"], capsys)
        assert exit_code == 2 and "--out taken: taken is a file" in err and Path("taken").read_bytes() == b"mine"
    os.symlink("gone", "dangling")
    exit_code, err = code([*PRETRAIN, "--out", "dangling/x"], capsys)
    assert exit_code == 2 and "/dangling is a file, or leads nowhere; name another folder" in err


def test_f14_a_folder_of_another_configuration_is_refused_and_left_alone(road, capsys):
    before = (road / "mid.pt").read_bytes()
    exit_code, err = code([*TINY, "--out", road, "--steps", "3", "--stage", "mid", "--lr", "1"], capsys)
    assert exit_code == 2 and "--mid.lr 0.002, now 1.0; repeat its flags" in err and err.endswith(f"use another --out, with --teacher {road}/pretrain.pt to keep its teacher\n") and (road / "mid.pt").read_bytes() == before


def test_f15_a_second_run_in_the_same_folder_is_refused():
    argv = [*PRETRAIN, "--steps", "5000", "--save_every", "5000", "--out", "run"]
    first = fork(argv, "log")
    wait_for_step("run", 2, first)
    assert wait(fork(argv, "second")) == 2
    line = Path("second").read_text()
    line = line.splitlines()[-1]
    assert "another run" in line and str(first) in line
    os.kill(first, signal.SIGKILL)
    wait(first)
    assert wait(fork(argv, "third", patch=stop_after(1))) == 75                        # a dead run holds no lock


def test_no_group_of_processes_is_left_for_the_end_of_python(monkeypatch, tmp_path):
    """Else one run of four under torchrun, or a refusal, ended in an abort (-6)."""
    kept, fid = [], script.fid
    monkeypatch.setattr(fid.atexit, "register", kept.append)
    fid.patient_group_of.cache_clear()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert fid.patient_group() is fid.patient_group() and kept == [fid.leave_groups]
    kept[0]()
    assert not torch.distributed.is_initialized() and fid.patient_group_of.cache_info().currsize == 0
    kept[0]()                                               # after a run that has ended its groups itself


def test_a_folder_without_locks_is_used_with_a_warning(monkeypatch, capsys):
    """Some network file systems have none: that is not another run."""
    def no_locks(*a):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(fid.fcntl, "flock", no_locks)
    script.main([*PRETRAIN, "--steps", "1", "--out", "run"])
    assert "cannot be locked" in capsys.readouterr().err and Path("run/pretrain.pt").exists()


def test_the_error_of_a_collective_is_printed(capsys):
    """Not only that one failed: a device-side assert surfaces where the host next waits."""
    class dist:
        def all_reduce(self):
            raise RuntimeError("CUDA error: device-side assert triggered\nmore lines")
    with pytest.raises(SystemExit), fid.one_line(script.parse(["--data", "digits"])):
        raise TimeoutError                            # an error of the system may say nothing: its kind is the line
    assert capsys.readouterr().err.endswith(": TimeoutError\n")
    with pytest.raises(SystemExit) as e, fid.one_line(script.parse(["--data", "digits"]), nets.WeightsError):
        dist = dist()
        dist.all_reduce()
    line = capsys.readouterr().err
    assert e.value.code == 1 and "CUDA error: device-side assert triggered" in line and len(line.splitlines()) == 1


def test_compile_without_a_compiler_is_one_line_before_the_first_step(monkeypatch, capsys):
    """What inductor and triton say of it, somewhere in a long message; another error stays a crash."""
    for text, where in (("RuntimeError: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')", "_dynamo.exc"),
                        ("RuntimeError: Failed to find C compiler. Please specify via CC environment variable", "_inductor.exc"),
                        ("CppCompileError: C++ compile error\n\nCommand:\ng++ x.cpp\nPython.h: No such file", "_inductor.exc")):
        failed = type("BackendCompilerFailed", (RuntimeError,), dict(__module__=f"torch.{where}"))

        def fails(*a, **k):
            raise failed(f"backend='inductor' raised:\n{text}\n\nSet TORCHDYNAMO_VERBOSE=1 for more")
        monkeypatch.setattr(torch, "compile", lambda net, **k: fails)
        exit_code, err = code([*PRETRAIN, "--compile", "--steps", "2", "--out", "x"], capsys)
        assert exit_code == 2 and " ".join(text.split()) in err and "pass --no-compile" in err and len(err.strip().splitlines()) == 1
        assert not Path("x/pretrain.pt").exists()
    failed, text = RuntimeError, "another"
    with pytest.raises(RuntimeError, match="another"):
        script.main([*PRETRAIN, "--compile", "--steps", "2", "--out", "x"])


def test_what_ends_a_run_stands_in_its_log(monkeypatch, capsys):
    """Whoever comes back to a run in the morning reads log.txt, and finds why it ended."""
    monkeypatch.setattr(script, "count", lambda *args: script.fail(4, "loss or gradient not finite"))
    assert code([*PRETRAIN, "--steps", "2", "--out", "ended"], capsys)[0] == 4
    log = Path("ended/log.txt").read_text()
    assert log.splitlines()[-1].endswith(": loss or gradient not finite")
    assert code([*PRETRAIN, "--batch_gpu", "3", "--out", "other"], capsys)[0] == 2      # of another run, which it does not concern
    assert Path("ended/log.txt").read_text() == log and not Path("other").exists()


def test_out_of_memory_names_the_flag(capsys):
    cfg = script.parse(["--data", "digits", "--batch_gpu", "8"])
    with pytest.raises(SystemExit) as e, fid.one_line(cfg, nets.WeightsError):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    assert e.value.code == 1 and "--batch_gpu smaller than 8" in capsys.readouterr().err


def test_previews_and_scores_respect_batch_gpu(road, monkeypatch):
    """What --batch_gpu is for: a sample grid or a score must not need more memory than a training step."""
    sizes, real = [], script.prior
    monkeypatch.setattr(script.fid, "draw_seeds", draw_seeds)
    monkeypatch.setattr(script, "prior", lambda net, seeds: sizes.append(len(seeds)) or real(net, seeds))
    script.main([*PRETRAIN, "--steps", "1", "--batch_gpu", "4", "--out", "run"])
    script.main([*TINY, "--out", str(road), "--steps", "3", "--stage", "sample", "--batch_gpu", "4", "--seeds", "0-8"])
    assert len(sizes) > 16 and max(sizes) == 4


def test_fp16_gives_up_only_when_its_scale_has_fallen_as_far_as_it_goes():
    cfg = script.parse(["--data", "digits", "--stage", "pretrain", "--precision", "fp16"])
    since = dict(step=0, scale=2.0**15, skipped=0, bad=0, losses=[], norms=[])
    for _ in range(15):
        script.count(cfg, since, float("inf"), 1.0)
    assert since["scale"] == 1 and since["skipped"] == 15
    with pytest.raises(SystemExit) as e:
        script.count(cfg, since, float("inf"), 1.0)
    assert e.value.code == 4
    script.count(cfg, since, 0.5, 1.0)
    assert since["bad"] == 0 and since["losses"] == [0.5] and since["scale"] > 1


# ---- all of it -----------------------------------------------------------------------------------
@LONG
def test_soak():
    """20,000 steps, 20 kills and 5 other faults at random times: the end of the undisturbed run, memory flat."""
    argv = "--data digits --stage pretrain --steps 20000 --batch 4 --save_every 200 --log_every 50 --dropout 0.1".split()
    whole = fork([*argv, "--out", "whole"], "whole.log")
    rng, memory = random.Random(1), []
    faults = ["kill"] * 20 + ["term", "int", "cut", "flip", "full"]
    rng.shuffle(faults)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    for k, fault in enumerate(faults):
        pid = fork([*argv, "--out", "cut"], "log", patch=limit if fault == "full" else lambda: None)
        if fault == "full":
            assert wait(pid) == 3
            continue
        wait_for_step("cut", 20_000 * (k + 1) // 27 + rng.randrange(300), pid)
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        memory.append(pages * resource.getpagesize() / 2**20)
        time.sleep(rng.random() * 0.3)
        number = dict(term=signal.SIGTERM, int=signal.SIGINT).get(fault, signal.SIGKILL)
        os.kill(pid, number)
        assert wait(pid) == (-number if number == signal.SIGKILL else 75)
        path = Path("cut/pretrain.pt")
        if fault == "cut":
            path.write_bytes(path.read_bytes()[:rng.randrange(1000, 100_000)])
        if fault == "flip":
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 4
            path.write_bytes(data)
    pid = fork([*argv, "--out", "cut"], "log")
    wait_for_step("cut", 19_900, pid)
    assert wait(pid) == 0 and wait(whole) == 0
    print(f"memory at each fault, MiB: {[round(m) for m in memory]}")
    assert same("whole/pretrain.pt", "cut/pretrain.pt") and max(memory) < 1.1 * memory[0] + 20


def test_a_crash_is_in_the_log_with_its_traceback(here, road, monkeypatch):
    """Whoever forks looks there first."""
    def broken(*args):
        raise TypeError("of a fork")
    monkeypatch.setattr(script, "loss_cmt", broken)
    with pytest.raises(TypeError):
        script.main([*TINY, "--stage", "mid", "--steps", "2", "--out", "x", "--teacher", str(road / "pretrain.pt")])
    log = Path("x/log.txt").read_text()
    assert "Traceback" in log and "in broken" in log and log.endswith("TypeError: of a fork\n")


def test_a_knob_of_a_fork_is_compared_where_it_is_read(here, road, monkeypatch, capsys):
    """A stage that never reads it, or reads it in another method, goes on once READ_BY says so."""
    Mine = make_dataclass("Mine", [("mine", float, 0.1)], bases=(script.Config,), frozen=True)
    Mine.__module__ = script.__name__
    was, now = (Mine(**vars(script.parse([*TINY, "--stage", "mid", "--steps", "3"])), mine=mine) for mine in (0.1, 0.5))
    ckpt = nets.load_checkpoint(str(road / "mid.pt")) | dict(cfg=asdict(was))
    rows = dict(script.READ_BY)
    for where in "post", "pretrain, post", "mid kd", "mid kd, mid slow, post", "mid, not mid cmt":
        monkeypatch.setattr(script, "READ_BY", rows | {"mine": where})
        assert script.fid.steps_left(now, ckpt, "x/mid.pt") == 3 - ckpt["step"]
    for row in {}, {"mine": "mid cmt"}, {"mine": "post, mid, not mid kd"}:
        monkeypatch.setattr(script, "READ_BY", rows | row)
        script.fid.SAID.clear()
        with pytest.raises(SystemExit):
            script.fid.steps_left(now, ckpt, "x/mid.pt")
        assert "--mid.mine 0.1, now 0.5" in capsys.readouterr().err
