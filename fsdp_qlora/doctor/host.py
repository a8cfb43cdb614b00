"""Checks of memory, disk and network of the host."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import tempfile
import time
from pathlib import Path

from fsdp_qlora.doctor.finding import Finding, ok, problem, warning
from fsdp_qlora.host_memory import GIB, available_host_bytes, cgroup_limits

SYS = Path("/sys")
LITTLE_RAM = 4 * GIB
LITTLE_SHM = GIB // 2
READ_BYTES = 256 * 2**20
SLOW_DISK = 200.0
"""MB/s below which loading a large checkpoint takes minutes: 37 GB, a 70B model in 4 bits, take three."""

LITTLE_DISK = 5 * GIB
SHARED = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "wekafs")


def memory() -> Finding:
    """Compare RAM with the limits of the job or container."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [limit for limit, _ in cgroup_limits() if limit < total]
    text = f"{available_host_bytes() / GIB:.1f} GiB available of {total / GIB:.1f} GiB"
    text += f"; this job or container is limited to {min(limits) / GIB:.1f} GiB" if limits else ""
    if available_host_bytes() < LITTLE_RAM:
        remedy = "end other processes, or ask for more (SLURM: --mem; a container: --memory)"
        return warning("host memory", text, remedy)
    return ok("host memory", text)


def locked_memory() -> Finding:
    """Read the limit of locked memory, which InfiniBand obeys (CUDA's pinning mostly does not)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return ok("locked memory", "no limit")
    text = f"at most {limit / 2**20:.0f} MiB"
    if any((SYS / "class/infiniband").glob("*")):
        remedy = "ulimit -l unlimited (SLURM: PropagateResourceLimitsExcept=MEMLOCK; Docker: --ulimit memlock=-1)"
        return warning("locked memory", f"{text}: NCCL over InfiniBand may fail", remedy)
    return ok("locked memory", f"{text}; only InfiniBand needs more")


def shared_memory() -> Finding:
    """Look at /dev/shm, through which NCCL and data loading exchange; containers often have 64 MiB."""
    free = shutil.disk_usage("/dev/shm").free
    text = f"/dev/shm has {free / GIB:.1f} GiB free"
    if free < LITTLE_SHM:
        return warning("shared memory", text, "several ranks need more: docker run --ipc=host, or --shm-size 8g")
    return ok("shared memory", text)


def disk(folder: Path) -> Finding:
    """Measure free space and uncached reading where models are read from."""
    existing = existing_parent(folder)
    kind = filesystem(existing)
    free = shutil.disk_usage(existing).free
    where = f"{folder}" if existing == folder else f"{folder}, which is not there yet: {existing}"
    text = f"{where} ({kind}{', shared' if kind in SHARED else ''}): {free / GIB:.1f} GiB free"
    try:
        rate = _read_rate(existing)
    except OSError as error:
        remedy = "name a folder that can be written with HF_HOME, or free space"
        return problem("disk", f"{text}; writing fails there ({error.strerror})", remedy)
    text += f", reads {rate:.0f} MB/s"
    if rate < SLOW_DISK:
        remedy = "loading will be slow: copy the model to a local disk and set HF_HOME to it, or use a 4-bit checkpoint"
        return warning("disk", text, remedy)
    if free < LITTLE_DISK:
        return warning("disk", text, "set HF_HOME to a folder on a larger disk before downloading models")
    return ok("disk", text)


def existing_parent(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def filesystem(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """Return the type of the file system that holds a folder, 'unknown' where the system does not say."""
    if not mounts.exists():
        return "unknown"
    parts = (line.split() for line in mounts.read_text().splitlines())
    types = {Path(where): kind for _, where, kind, *_ in parts}
    absolute = folder.resolve()
    return next((types[path] for path in (absolute, *absolute.parents) if path in types), "unknown")


def _read_rate(folder: Path) -> float:
    """Return MB/s of reading a file that is not in the page cache; the file is removed again."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".fsdp-qlora-doctor-") as file:
        block = os.urandom(2**20)
        for _ in range(READ_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        started = time.perf_counter()
        while file.read(8 * 2**20):
            pass
        return READ_BYTES / (time.perf_counter() - started) / 1e6


def interfaces() -> list[str]:
    """Return the network interfaces that are up, but for the loopback."""
    states = sorted((SYS / "class/net").glob("*/operstate"))
    up = [path.parent.name for path in states if path.read_text().strip() in ("up", "unknown")]
    return [name for name in up if name != "lo"]


def network() -> Finding:
    """List InfiniBand ports and network interfaces, and check those named by the environment."""
    ports = [_port(path) for path in sorted((SYS / "class/infiniband").glob("*/ports/*"))]
    text = f"InfiniBand: {', '.join(ports) or 'none'}; interfaces: {', '.join(map(_speed, interfaces())) or 'none'}"
    present = {path.name for path in (SYS / "class/net").glob("*")}
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = os.environ.get(name, "")
        # NCCL's value may be a prefix, '=exact' or '^excluded'; only plain lists of names are checked
        named = [part for part in wanted.split(",") if part.isalnum()]
        unknown = [part for part in named if not any(name.startswith(part) for name in present)]
        if unknown:
            remedy = f"name one of {', '.join(sorted(present))}, or unset {name}"
            return problem("network", f"{text}; {name}={wanted}: there is no {', '.join(unknown)}", remedy)
    down = [port for port in ports if "ACTIVE" not in port]
    if down:
        return warning(
            "network", text, f"{', '.join(down)}: not active; ask the administrator, or NCCL uses slower ways"
        )
    return ok("network", text)


def _port(path: Path) -> str:
    """Return an InfiniBand port as 'mlx5_0/1 ACTIVE 200 Gb/sec (4X HDR)'."""
    state, rate = ((path / name).read_text().strip() for name in ("state", "rate"))
    return f"{path.parents[1].name}/{path.name} {state.rpartition(' ')[2]} {rate}"


def _speed(interface: str) -> str:
    try:
        megabits = int((SYS / "class/net" / interface / "speed").read_text())
    except (OSError, ValueError):
        return interface  # virtual interfaces have no speed
    return f"{interface} ({megabits / 1000:g} Gb/s)" if megabits > 0 else interface


def host_name(num_nodes: int) -> Finding:
    """Resolve this host's name, by which gloo chooses the address that it tells the other nodes."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        remedy = f"add a line for {name} to /etc/hosts, or set GLOO_SOCKET_IFNAME to the interface to use"
        if num_nodes > 1:
            return problem("host name", f"{name} does not resolve ({error}): nodes cannot find each other", remedy)
        return warning("host name", f"{name} does not resolve ({error}): several nodes could not work together", remedy)
    if address.startswith("127.") and num_nodes > 1 and not os.environ.get("GLOO_SOCKET_IFNAME"):
        remedy = f"set GLOO_SOCKET_IFNAME to the interface between the nodes (here: {', '.join(interfaces())})"
        return problem("host name", f"{name} is {address}, which other nodes cannot reach", remedy)
    return ok("host name", f"{name} is {address}")
