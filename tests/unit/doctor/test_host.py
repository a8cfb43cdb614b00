"""Memory, disk and network as the doctor sees them, on made-up /proc and /sys trees."""

from __future__ import annotations

import resource
import socket
from pathlib import Path

import pytest

from fsdp_qlora.doctor import host
from fsdp_qlora.host_memory import GIB, cgroup_limits


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_every_cgroup_above_the_process_counts_and_idle_cache_does_not(tmp_path: Path) -> None:
    job, step = "sys/fs/cgroup/slurm/job_7", "sys/fs/cgroup/slurm/job_7/step_0"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
            f"{step}/memory.max": "max\n",
            f"{step}/memory.current": "5\n",
            f"{step}/memory.stat": "anon 5\n",
            f"{job}/memory.max": f"{8 * GIB}\n",
            f"{job}/memory.current": f"{5 * GIB}\n",
            f"{job}/memory.stat": f"anon 1\ninactive_file {3 * GIB}\n",
        },
    )
    assert cgroup_limits(tmp_path) == [(8 * GIB, 2 * GIB)]


def test_cgroups_of_version_1(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/memory"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/x\n2:memory:/job\n1:name=systemd:/\n",
            f"{top}/job/memory.limit_in_bytes": "1000\n",
            f"{top}/job/memory.usage_in_bytes": "300\n",
            f"{top}/job/memory.stat": "total_inactive_file 100\n",
            f"{top}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{top}/memory.usage_in_bytes": "300\n",
            f"{top}/memory.stat": "",
        },
    )
    assert cgroup_limits(tmp_path) == [(1000, 200)]


def test_no_cgroups_outside_linux(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path) == []


def test_memory_of_a_limited_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cgroup_limits", lambda: [(2 * GIB, 0)])
    monkeypatch.setattr(host, "available_host_bytes", lambda: 2 * GIB)
    finding = host.memory()
    assert finding.status == "warning"
    assert "limited to 2.0 GiB" in finding.found
    assert "--mem" in finding.remedy


def test_infiniband_needs_locked_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "SYS", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    assert host.locked_memory().status == "ok"
    (tmp_path / "class/infiniband/mlx5_0").mkdir(parents=True)
    assert host.locked_memory().status == "warning"
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert host.locked_memory().status == "ok"


def test_disk_is_measured_where_the_folder_will_be(tmp_path: Path) -> None:
    finding = host.disk(tmp_path / "not" / "there")
    assert finding.found.startswith(f"{tmp_path / 'not' / 'there'}, which is not there yet: {tmp_path} (")
    assert "GiB free, reads " in finding.found
    assert list(tmp_path.iterdir()) == []


def test_slow_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "_read_rate", lambda folder: 50.0)
    finding = host.disk(tmp_path)
    assert finding.status == "warning"
    assert "reads 50 MB/s" in finding.found


def test_disk_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(folder: Path) -> float:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(host, "_read_rate", full)
    assert host.disk(tmp_path).status == "problem"
    assert "No space left" in host.disk(tmp_path).found


def test_file_system_of_the_nearest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"root / ext4 rw 0 0\nserver:/data {tmp_path}/data nfs4 rw 0 0\n")
    assert host.filesystem(tmp_path / "data" / "hub", mounts) == "nfs4"
    assert host.filesystem(tmp_path / "other", mounts) == "ext4"
    assert host.filesystem(tmp_path, tmp_path / "absent") == "unknown"


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A host with one Ethernet interface and one InfiniBand port."""
    monkeypatch.setattr(host, "SYS", tmp_path)
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    port = "class/infiniband/mlx5_0/ports/1"
    write(
        tmp_path,
        {
            "class/net/lo/operstate": "unknown\n",
            "class/net/eth0/operstate": "up\n",
            "class/net/eth0/speed": "25000\n",
            "class/net/eth1/operstate": "down\n",
            f"{port}/state": "4: ACTIVE\n",
            f"{port}/rate": "200 Gb/sec (4X HDR)\n",
        },
    )
    return tmp_path


def test_network_is_listed(network: Path) -> None:
    finding = host.network()
    assert finding.status == "ok"
    assert finding.found == "InfiniBand: mlx5_0/1 ACTIVE 200 Gb/sec (4X HDR); interfaces: eth0 (25 Gb/s)"


def test_port_that_is_down(network: Path) -> None:
    (network / "class/infiniband/mlx5_0/ports/1/state").write_text("1: DOWN\n")
    assert host.network().status == "warning"


@pytest.mark.parametrize(("value", "status"), [("ib0", "problem"), ("eth", "ok"), ("^docker0,lo", "ok"), ("", "ok")])
def test_interface_named_by_the_environment(
    network: Path, monkeypatch: pytest.MonkeyPatch, value: str, status: str
) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
    assert host.network().status == status


@pytest.mark.parametrize(
    ("address", "num_nodes", "interface", "status"),
    [
        ("10.0.0.7", 2, "", "ok"),
        ("127.0.1.1", 1, "", "ok"),
        ("127.0.1.1", 2, "", "problem"),
        ("127.0.1.1", 2, "eth0", "ok"),
        (None, 1, "", "warning"),
        (None, 2, "", "problem"),
    ],
)
def test_host_name(
    network: Path, monkeypatch: pytest.MonkeyPatch, address: str | None, num_nodes: int, interface: str, status: str
) -> None:
    def resolve(name: str) -> str:
        if address is None:
            raise socket.gaierror(-2, "Name or service not known")
        return address

    monkeypatch.setattr(socket, "gethostbyname", resolve)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    assert host.host_name(num_nodes).status == status
