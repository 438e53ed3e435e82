"""Memory as the driver, the host and the container see it, without torch. All sizes in GiB.

A probe never raises and never guesses: what cannot be read is left out, and the reason is kept. `NvmlProbe` asks the
NVIDIA driver through `pynvml`, which is imported when the first probe is made.
"""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

GIB = 1024**3
CHILDREN_EVERY = 30.0  # seconds between two searches for child processes: one costs about 20 us a process of the host
NO_LIMIT = 2**60  # cgroup v1 writes "no limit" as the largest page-aligned number of bytes


# -------------------------------------------------------------------------------------------------- devices


@dataclass(frozen=True)
class DeviceReading:
    """One device, as NVML sees it now; `None` where it could not be read.

    Attributes:
        name, uuid: as the driver reports them, e.g. "GPU-8932f937-…".
        used: memory in use by all processes, the driver's own share included, so that total - used is still free.
        total: memory in all.
        busy: share of the driver's last sample period (a second or less) in which any kernel ran, 0..1.
        problem: why something is `None`.
    """

    name: str | None = None
    uuid: str | None = None
    used: float | None = None
    total: float | None = None
    busy: float | None = None
    problem: str | None = None

    @property
    def utilization(self) -> float | None:
        """used / total."""
        if self.used is None or not self.total:
            return None
        return self.used / self.total


class NvmlProbe:
    """Memory of the devices this process may use, from the NVIDIA driver.

    Args:
        devices: what to read, in the notation of `CUDA_VISIBLE_DEVICES` (indices, "GPU-…" or "MIG-…" identifiers, or
            the beginning of one). Left out, that variable decides; without it, all devices. Indices are NVML's, which
            are CUDA's when all devices are of one kind or `CUDA_DEVICE_ORDER=PCI_BUS_ID`.

    `reason` says why there is nothing to read (no driver, no library, no visible device), else it is `None`.

    >>> with NvmlProbe() as probe:
    ...     signals = probe.read()  # {} without a device; probe.reason tells why
    """

    def __init__(self, devices: Sequence[str] | None = None) -> None:
        self.reason: str | None = None
        self._nvml: ModuleType | None = None
        self._handles: list[Any] = []
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception as error:  # ImportError, NVMLError, or whatever a broken driver makes of it
            self.reason = f"NVML cannot be used: {_text(error)}"
            return
        self._nvml = pynvml
        try:
            self._find(visible_devices(os.environ) if devices is None else list(devices))
        except Exception as error:
            self.reason = f"NVML cannot list the devices: {_text(error)}"
        if not self._handles:
            self.close()

    def _find(self, wanted: list[str] | None) -> None:
        """Collect the handles of the wanted devices. As in CUDA, those after the first one unknown do not count."""
        nvml = self._nvml
        assert nvml is not None
        count = nvml.nvmlDeviceGetCount()
        if wanted is None:
            wanted = [str(i) for i in range(count)]
        for device in wanted:
            handle, problem = _handle(nvml, device, count)
            if handle is None:
                self.reason = f"device {device!r} is not there: {problem}"
                return
            self._handles.append(handle)
        if not wanted:
            self.reason = "no device is visible to this process (CUDA_VISIBLE_DEVICES)"
        elif not count:
            self.reason = "the driver lists no device"

    def devices(self) -> list[DeviceReading]:
        """A reading of each visible device, in the order in which this process counts them."""
        return [self._reading(handle) for handle in self._handles]

    def _reading(self, handle: Any) -> DeviceReading:
        nvml = self._nvml
        assert nvml is not None
        got: dict[str, Any] = {}
        problems: list[str] = []

        def ask(what: str, call: Any) -> None:
            try:
                got[what] = call(handle)
            except Exception as error:
                problems.append(f"{what}: {_text(error)}")

        ask("memory", nvml.nvmlDeviceGetMemoryInfo)
        ask("busy", nvml.nvmlDeviceGetUtilizationRates)
        ask("name", nvml.nvmlDeviceGetName)
        ask("uuid", nvml.nvmlDeviceGetUUID)
        memory = got.get("memory")
        return DeviceReading(
            name=got.get("name"),
            uuid=got.get("uuid"),
            used=None if memory is None else memory.used / GIB,
            total=None if memory is None else memory.total / GIB,
            busy=got["busy"].gpu / 100 if "busy" in got else None,
            problem="; ".join(problems) or None,
        )

    def read(self) -> dict[str, float]:
        """The signals of the fullest visible device, the one that would run out first.

        `memory/device_used`, `memory/device_total` (GiB) and `memory/utilization` (used / total, 0..1); empty when no
        device can be read, and `reason` then tells why. A device that failed is asked again the next time.
        """
        if not self._handles:
            return {}
        readings = self.devices()
        known = [(r.utilization, r) for r in readings if r.utilization is not None]
        if not known:
            self.reason = "; ".join(f"device {i}: {r.problem or 'no memory'}" for i, r in enumerate(readings))
            return {}
        self.reason = None
        utilization, fullest = max(known, key=lambda pair: pair[0])
        assert fullest.used is not None and fullest.total is not None
        return {
            "memory/device_used": fullest.used,
            "memory/device_total": fullest.total,
            "memory/utilization": utilization,
        }

    def close(self) -> None:
        """Let go of the driver. Safe to call twice; nothing can be read afterwards."""
        nvml, self._nvml = self._nvml, None
        self._handles = []
        if nvml is None:
            return
        self.reason = self.reason or "the probe is closed"
        try:
            nvml.nvmlShutdown()
        except Exception as error:
            self.reason = f"NVML did not shut down: {_text(error)}"

    def __enter__(self) -> "NvmlProbe":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def visible_devices(environ: Mapping[str, str]) -> list[str] | None:
    """The entries of `CUDA_VISIBLE_DEVICES`; `None` when it is unset: all devices.

    As CUDA reads it: entries after one that is negative do not count, and "NoDevFiles" or nothing means no device.
    """
    value = environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    devices: list[str] = []
    for entry in value.split(","):
        entry = entry.strip()
        if not entry or entry.startswith("-") or entry == "NoDevFiles":
            break
        devices.append(entry)
    return devices


def _handle(nvml: ModuleType, device: str, count: int) -> tuple[Any, str | None]:
    """NVML's handle of a device named by index, identifier or the beginning of one; else `None` and the reason."""
    try:
        if device.isdecimal():
            return nvml.nvmlDeviceGetHandleByIndex(int(device)), None
        if device.startswith("MIG-"):
            return nvml.nvmlDeviceGetHandleByUUID(device), None
        found = []
        for index in range(count):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            if nvml.nvmlDeviceGetUUID(handle).startswith(device):
                found.append(handle)
        if len(found) == 1:
            return found[0], None
        return None, f"{len(found)} of {count} devices have an identifier that begins so"
    except Exception as error:
        return None, _text(error)


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


# ---------------------------------------------------------------------------------------------------- host

_children: dict[int, tuple[float, list[psutil.Process]]] = {}  # of this process: when looked for, what was found


def host_memory() -> dict[str, float]:
    """`memory/host_rss`, resident memory of this process and its children, and `memory/host_available`, in GiB.

    Memory that processes share, such as a data loader's copy-on-write pages, counts once in each of them. Children are
    looked for every `CHILDREN_EVERY` seconds. What cannot be read is left out.
    """
    signals: dict[str, float] = {}
    with suppress(psutil.Error, OSError):
        process = psutil.Process()
        rss = process.memory_info().rss
        for child in _child_processes(process):
            with suppress(psutil.Error):  # it has ended, or is another user's
                rss += child.memory_info().rss
        signals["memory/host_rss"] = rss / GIB
    with suppress(psutil.Error, OSError):
        signals["memory/host_available"] = psutil.virtual_memory().available / GIB
    return signals


def host_total() -> float | None:
    """Memory of the host in all, in GiB; `None` where it cannot be read."""
    with suppress(psutil.Error, OSError):
        return float(psutil.virtual_memory().total) / GIB
    return None


def _child_processes(process: psutil.Process) -> list[psutil.Process]:
    now = time.monotonic()
    looked, children = _children.get(process.pid, (-CHILDREN_EVERY, []))
    if now - looked >= CHILDREN_EVERY:
        children = process.children(recursive=True)
        _children.clear()  # a fork inherits its parent's
        _children[process.pid] = (now, children)
    return children


# --------------------------------------------------------------------------------------------------- cgroup


def cgroup_memory(
    root: str | os.PathLike[str] = "/sys/fs/cgroup", membership: str | os.PathLike[str] = "/proc/self/cgroup"
) -> dict[str, float]:
    """`memory/cgroup_used` and `memory/cgroup_limit` of this process's container, in GiB; versions 1 and 2.

    Any group above this process's may set a limit: the one closest to its limit is reported, because that one kills.
    File cache that can be dropped at once (`inactive_file`) is not counted as used, as in Kubernetes. Without any
    limit ("max") there is no `memory/cgroup_limit`; outside a memory cgroup the result is empty.

    Args:
        root: where the cgroup file system is mounted.
        membership: the file that tells which groups this process is in.
    """
    try:
        lines = Path(membership).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    group: str | None = None
    version = 2
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):  # version 1, or both mounted and memory under version 1
            group, version = path, 1
            break
        if number == "0" and not controllers:
            group = path
    if group is None:
        return {}
    base = Path(root) / "memory" if version == 1 else Path(root)
    limit_file, used_file, cache_key = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )

    # Inside a container the mount may begin at its own group, so that the path only exists on the host.
    parts = [part for part in group.split("/") if part and part != ".."]
    levels = [base.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    found: list[tuple[int, int | None]] = []  # used, limit in bytes, from this process's group upwards
    for level in levels:
        used = _bytes(level / used_file)
        if used is None:
            continue
        limit = _bytes(level / limit_file)
        cache = _field(level / "memory.stat", cache_key)
        found.append((max(used - cache, 0), None if limit is None or limit >= NO_LIMIT else limit))
    if not found:
        return {}
    limited = [(used, limit) for used, limit in found if limit is not None]
    if not limited:
        return {"memory/cgroup_used": found[0][0] / GIB}
    used, limit = min(limited, key=lambda pair: pair[1] - pair[0])
    return {"memory/cgroup_used": used / GIB, "memory/cgroup_limit": limit / GIB}


def _bytes(path: Path) -> int | None:
    """The number in a file; `None` for "max", anything else that is no number, or no file."""
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _field(path: Path, key: str) -> int:
    """A number from lines of `key value`; 0 where it is missing."""
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return 0
