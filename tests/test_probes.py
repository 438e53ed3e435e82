"""The memory probes: the real `pynvml` on a stub driver compiled here, made-up cgroup trees, and this process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from outspoken.diagnostics import probes

GIB = 1024**3

# ------------------------------------------------------------------------------------------- NVML, by a stub

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="the stub driver is compiled with gcc")


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """A folder with the stub as libnvidia-ml.so.1, where the dynamic loader finds it before any real driver."""
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("fake_nvml.c")
    command = ["gcc", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", source]
    subprocess.run(command, check=True)
    return folder


def probe(folder, script, **settings):
    """Run a script with `NvmlProbe` in a new process; it prints one JSON value, returned here."""
    environ = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES" and not k.startswith("FAKE_NVML")}
    environ["LD_LIBRARY_PATH"] = str(folder)
    environ.update({k: str(v) for k, v in settings.items()})
    prelude = (
        "import json, os, sys\n"
        "from dataclasses import asdict\n"
        "from outspoken.diagnostics.probes import NvmlProbe\n"
        "assert 'pynvml' not in sys.modules and 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", prelude + script], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


READ = "p = NvmlProbe(); print(json.dumps([p.read(), p.reason])); p.close()"


@needs_gcc
def test_nvml_reads_one_device(driver, tmp_path):
    log = tmp_path / "log"
    script = (
        "with NvmlProbe() as p: print(json.dumps([p.read(), p.reason, [asdict(d) for d in p.devices()]]))\n"
        "p.close()\n"  # a second time
        "assert p.read() == {} and p.devices() == [] and p.reason == 'the probe is closed'"
    )
    signals, reason, devices = probe(
        driver, script, FAKE_NVML_TOTAL=80 * GIB, FAKE_NVML_USED=20 * GIB, FAKE_NVML_BUSY=37, FAKE_NVML_LOG=log
    )
    assert signals == {"memory/device_used": 20, "memory/device_total": 80, "memory/utilization": 0.25}
    assert reason is None
    assert devices == [
        {"name": "Fake 0", "uuid": "GPU-0000-fake", "used": 20, "total": 80, "busy": 0.37, "problem": None}
    ]
    assert log.read_text().split() == ["nvmlInitWithFlags", "nvmlShutdown"]


TWO = {"FAKE_NVML_COUNT": 2, "FAKE_NVML_TOTAL": f"{80 * GIB},{40 * GIB}", "FAKE_NVML_USED": f"{30 * GIB},{20 * GIB}"}
FIRST = {"memory/device_used": 30, "memory/device_total": 80, "memory/utilization": 0.375}
SECOND = {"memory/device_used": 20, "memory/device_total": 40, "memory/utilization": 0.5}


@needs_gcc
def test_nvml_respects_the_visible_devices(driver):
    """One process, the variable changed in between: `pynvml` and the stub read nothing of it themselves."""
    choices = ["", "0", "1", "1,0", "GPU-0000-fake", "GPU-1", "MIG-1-fake", "-1", "0,-1,1", "NoDevFiles", "7", "0,7,1"]
    script = (
        "out = {}\n"
        f"for choice in [None] + {choices!r}:\n"
        "    if choice is not None: os.environ['CUDA_VISIBLE_DEVICES'] = choice\n"
        "    with NvmlProbe() as p: out[str(choice)] = [p.read(), len(p.devices()), p.reason]\n"
        "with NvmlProbe(devices=['GPU-1111-fake']) as p: out['given'] = [p.read(), len(p.devices()), p.reason]\n"
        "with NvmlProbe(devices=['GPU-']) as p: out['ambiguous'] = [p.read(), len(p.devices()), p.reason]\n"
        "print(json.dumps(out))"
    )
    got = probe(driver, script, **TWO)
    assert got["None"] == [SECOND, 2, None]  # the fuller of the two, by share
    assert got["0"] == got["GPU-0000-fake"] == got["0,-1,1"] == [FIRST, 1, None]
    assert got["1"] == got["GPU-1"] == got["MIG-1-fake"] == got["given"] == [SECOND, 1, None]
    assert got["1,0"] == [SECOND, 2, None]
    assert got["0,7,1"] == [FIRST, 1, None]  # as in CUDA, nothing after the unknown one
    for nothing in ("", "-1", "NoDevFiles"):
        assert got[nothing][:2] == [{}, 0]
        assert "no device is visible" in got[nothing][2]
    assert got["7"][:2] == [{}, 0]
    assert "device '7' is not there: Invalid Argument" in got["7"][2]
    assert "2 of 2 devices have an identifier that begins so" in got["ambiguous"][2]


@needs_gcc
def test_nvml_without_a_library(tmp_path):
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")  # hides a real one, should the machine have it
    assert probe(tmp_path, READ) == [{}, "NVML cannot be used: NVML Shared Library Not Found"]


@needs_gcc
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"FAKE_NVML_FAIL": "nvmlInitWithFlags=9"}, "NVML cannot be used: Driver Not Loaded"),
        ({"FAKE_NVML_FAIL": "nvmlInitWithFlags=18"}, "version mismatch"),
        ({"FAKE_NVML_FAIL": "nvmlDeviceGetCount_v2=999"}, "cannot list the devices: Unknown Error"),
        ({"FAKE_NVML_FAIL": "nvmlDeviceGetHandleByIndex_v2=4"}, "device '0' is not there: Insufficient Permissions"),
        ({"FAKE_NVML_COUNT": "0"}, "no device"),
        ({"FAKE_NVML_FAIL": "nvmlDeviceGetMemoryInfo=3"}, "device 0: memory: Not Supported"),
    ],
)
def test_nvml_that_cannot_read_says_why(driver, tmp_path, settings, reason):
    log = tmp_path / "log"
    signals, said = probe(driver, READ, FAKE_NVML_LOG=log, **settings)
    assert signals == {}
    assert reason in said
    calls = log.read_text().split() if log.exists() else []
    assert calls.count("nvmlInitWithFlags") == calls.count("nvmlShutdown")


@needs_gcc
def test_nvml_loses_a_device_midway_and_finds_it_again(driver):
    """The memory call fails with GPU_IS_LOST (15) from its 3rd call on; then the fault is taken away."""
    script = (
        "p = NvmlProbe()\n"
        "out = []\n"
        "for i in range(4): out.append([p.read(), p.reason])\n"
        "del os.environ['FAKE_NVML_FAIL']\n"
        "out.append([p.read(), p.reason]); p.close(); print(json.dumps(out))"
    )
    first, second, lost, still_lost, back = probe(
        driver,
        script,
        FAKE_NVML_TOTAL=8 * GIB,
        FAKE_NVML_USED=GIB,
        FAKE_NVML_FAIL="nvmlDeviceGetMemoryInfo=15@3",
    )
    good = [{"memory/device_used": 1, "memory/device_total": 8, "memory/utilization": 0.125}, None]
    assert first == second == back == good
    assert lost == still_lost == [{}, "device 0: memory: GPU is lost"]


@needs_gcc
def test_nvml_reads_what_is_supported(driver):
    """A device without utilization rates (a MIG slice) still tells its memory; a total of 0 gives no share."""
    script = "p = NvmlProbe(); print(json.dumps([p.read(), asdict(p.devices()[0])])); p.close()"
    fail = "nvmlDeviceGetUtilizationRates=3,nvmlDeviceGetName=3"
    signals, device = probe(driver, script, FAKE_NVML_FAIL=fail, **TWO)
    assert signals == SECOND
    assert (device["busy"], device["name"], device["uuid"]) == (None, None, "GPU-0000-fake")
    assert device["problem"] == "busy: Not Supported; name: Not Supported"
    signals, device = probe(driver, script, FAKE_NVML_TOTAL=0)
    assert (signals, device["total"]) == ({}, 0)


@needs_gcc
def test_nvml_shutdown_that_fails_is_only_noted(driver):
    script = "p = NvmlProbe(); p.close(); p.close(); print(json.dumps(p.reason))"
    assert "did not shut down: GPU is lost" in probe(driver, script, FAKE_NVML_FAIL="nvmlShutdown=15")


def test_without_pynvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # `import pynvml` now raises ImportError
    with probes.NvmlProbe() as nvml:
        assert nvml.read() == {}
        assert "NVML cannot be used" in nvml.reason


@pytest.mark.parametrize(
    ("value", "devices"),
    [(None, None), ("", []), ("0, 2", ["0", "2"]), ("1,-1,0", ["1"]), ("GPU-a,MIG-b", ["GPU-a", "MIG-b"])],
)
def test_visible_devices(value, devices):
    assert probes.visible_devices({} if value is None else {"CUDA_VISIBLE_DEVICES": value}) == devices


# ------------------------------------------------------------------------------------------------------- host


def test_host_memory_is_this_process_s():
    """Against the kernel's own numbers: VmRSS grows by a block that we touch."""
    before = probes.host_memory()
    block = bytearray(200 * 1024 * 1024)
    block[::4096] = b"x" * len(block[::4096])
    after = probes.host_memory()
    grown = after["memory/host_rss"] - before["memory/host_rss"]
    assert grown == pytest.approx(200 / 1024, rel=0.2)
    assert 0 < after["memory/host_available"] < probes.host_total()
    del block


def test_host_memory_counts_children(monkeypatch):
    monkeypatch.setattr(probes, "_children", {})
    monkeypatch.setattr(probes, "CHILDREN_EVERY", 0.0)
    alone = probes.host_memory()["memory/host_rss"]
    child = subprocess.Popen(
        [sys.executable, "-c", "b = b'x' * 300_000_000; print('ready', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        child.stdout.readline()
        with_child = probes.host_memory()["memory/host_rss"]
        assert with_child - alone == pytest.approx(300_000_000 / GIB, rel=0.2)
        monkeypatch.setattr(probes, "CHILDREN_EVERY", 1e9)  # the list is kept: one that has ended does no harm
    finally:
        child.communicate(b"\n")
    assert probes.host_memory()["memory/host_rss"] < with_child - 0.2


def test_children_are_not_looked_for_at_every_call(monkeypatch):
    looked = []
    children = psutil.Process.children

    def counted(self, recursive=False):
        looked.append(recursive)
        return children(self, recursive=recursive)

    monkeypatch.setattr(psutil.Process, "children", counted)
    monkeypatch.setattr(probes, "_children", {})
    for _ in range(5):
        probes.host_memory()
    assert looked == [True]


def test_host_memory_that_cannot_be_read(monkeypatch):
    def refused(*_):
        raise psutil.AccessDenied(1)

    monkeypatch.setattr(psutil.Process, "memory_info", refused)
    assert set(probes.host_memory()) == {"memory/host_available"}
    monkeypatch.setattr(psutil, "virtual_memory", refused)
    assert probes.host_memory() == {}
    assert probes.host_total() is None


# ----------------------------------------------------------------------------------------------------- cgroup


def cgroup(tmp_path, membership, files):
    """Lay out a cgroup tree and read it."""
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "membership").write_text(membership)
    return probes.cgroup_memory(tmp_path / "cgroup", tmp_path / "membership")


def used_and_limit(used, limit=None):
    return {"memory/cgroup_used": used} | ({} if limit is None else {"memory/cgroup_limit": limit})


def test_cgroup_v2(tmp_path):
    files = {
        "job/memory.current": f"{6 * GIB}\n",
        "job/memory.max": f"{16 * GIB}\n",
        "job/memory.stat": f"anon 1\nactive_file 7\ninactive_file {2 * GIB}\nslab 3\n",
    }
    assert cgroup(tmp_path, "0::/job\n", files) == used_and_limit(4, 16)


def test_cgroup_v2_without_a_limit(tmp_path):
    files = {"job/memory.current": str(6 * GIB), "job/memory.max": "max\n"}
    assert cgroup(tmp_path, "0::/job\n", files) == used_and_limit(6)


def test_cgroup_v2_in_a_container_s_own_namespace(tmp_path):
    files = {"memory.current": str(GIB), "memory.max": str(4 * GIB)}
    assert cgroup(tmp_path, "0::/\n", files) == used_and_limit(1, 4)
    # The membership may name a path of the host that is not mounted here.
    assert cgroup(tmp_path, "0::/../../kubepods/pod1\n", files) == used_and_limit(1, 4)


def test_the_group_closest_to_its_limit_counts(tmp_path):
    files = {
        "pod/memory.current": str(30 * GIB),
        "pod/memory.max": str(32 * GIB),
        "pod/job/memory.current": str(10 * GIB),
        "pod/job/memory.max": str(16 * GIB),
    }
    assert cgroup(tmp_path, "0::/pod/job\n", files) == used_and_limit(30, 32)
    (tmp_path / "cgroup/pod/memory.max").write_text("max")
    assert cgroup(tmp_path, "0::/pod/job\n", {}) == used_and_limit(10, 16)


V1 = "9:name=systemd:/x\n4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/x\n"


def test_cgroup_v1(tmp_path):
    files = {
        "memory/docker/abc/memory.usage_in_bytes": str(3 * GIB),
        "memory/docker/abc/memory.limit_in_bytes": str(8 * GIB),
        "memory/docker/abc/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
    }
    assert cgroup(tmp_path, V1, files) == used_and_limit(2, 8)


def test_cgroup_v1_seen_from_inside_and_without_a_limit(tmp_path):
    files = {
        "memory/memory.usage_in_bytes": str(3 * GIB),
        "memory/memory.limit_in_bytes": "9223372036854771712\n",  # what the kernel writes for none
    }
    assert cgroup(tmp_path, V1, files) == used_and_limit(3)


@pytest.mark.parametrize(
    ("membership", "files"),
    [
        ("", {}),
        ("garbage\n\x00\n:::", {}),
        ("0::/job\n", {}),
        ("0::/job\n", {"job/memory.current": "what?", "job/memory.max": "-"}),
        (V1, {"memory.current": "1"}),
    ],
)
def test_cgroup_that_tells_nothing(tmp_path, membership, files):
    assert cgroup(tmp_path, membership, files) == {}


def test_cgroup_without_a_membership_file(tmp_path):
    assert probes.cgroup_memory(tmp_path, tmp_path / "missing") == {}


def test_cgroup_of_this_machine():
    """Whatever it is: no error, and a limit only together with what is used."""
    signals = probes.cgroup_memory()
    assert set(signals) in (set(), {"memory/cgroup_used"}, {"memory/cgroup_used", "memory/cgroup_limit"})
    assert all(value >= 0 for value in signals.values())
