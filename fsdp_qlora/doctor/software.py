"""Checks of what is installed, and of the way to the hub."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from fsdp_qlora.doctor.finding import Finding, ok, problem, warning
from fsdp_qlora.doctor.host import existing_parent
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.host_memory import GIB
from fsdp_qlora.models.aliases import ALIASES
from fsdp_qlora.models.hub import resolve_config
from fsdp_qlora.models.skeleton import build_skeleton

DRIVER = Path("/proc/driver/nvidia/version")


def packages() -> Finding:
    """Compare the installed versions with those this package asks for."""
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("fsdp-qlora") or []]
    except importlib.metadata.PackageNotFoundError:
        unknown = "fsdp-qlora runs from its source and is not installed, so nothing says which versions it needs"
        return warning("packages", unknown, "install it with the set that was tested: scripts/setup.sh")
    wanted = [requirement for requirement in wanted if requirement.marker is None or requirement.marker.evaluate()]
    found, wrong = [f"Python {platform.python_version()}"], []
    for requirement in wanted:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement} is not installed")
            continue
        found.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} is needed, {version} is installed")
    if wrong:
        return problem("packages", "; ".join(wrong), "install the set that was tested: scripts/setup.sh")
    return ok("packages", ", ".join(found))


def quantisation() -> Finding:
    """Quantise a matrix on the CPU and on every GPU: bitsandbytes may be installed without code for the device."""
    import bitsandbytes

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices:
        try:
            bitsandbytes.functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4")
        except RuntimeError as error:
            remedy = "install a bitsandbytes that supports this GPU and this torch's CUDA"
            return problem("bitsandbytes", f"cannot quantise on {device}: {str(error).splitlines()[0]}", remedy)
    return ok("bitsandbytes", f"{bitsandbytes.__version__} quantises on {', '.join(devices)}")


def cuda() -> Finding:
    """Tell a machine without GPUs from one whose GPUs this torch cannot use."""
    build = f"torch {torch.__version__}, built for " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs")
    if torch.cuda.is_available():
        return ok("CUDA", f"{build}; driver {_driver() or 'unknown'}")
    if _driver() is None:
        remedy = "good for debugging small models; on a cluster, ask for GPUs (--gres gpu:N) and look there"
        return warning("CUDA", f"{build}; no NVIDIA driver here, so runs use the CPU", remedy)
    if os.environ.get("CUDA_VISIBLE_DEVICES", "x").strip() in ("", "-1"):
        return problem("CUDA", "CUDA_VISIBLE_DEVICES hides every GPU", "unset it, or name the GPUs to use")
    if torch.version.cuda is None:
        remedy = "install a torch built for CUDA, as the selector on pytorch.org says"
        return problem("CUDA", f"{build}, but there is an NVIDIA driver ({_driver()})", remedy)
    remedy = f"update the driver to one that supports CUDA {torch.version.cuda}, or install a torch for an older CUDA"
    return problem("CUDA", f"{build}, but it finds no GPU with driver {_driver()}", remedy)


def _driver() -> str | None:
    """Return the version of the NVIDIA kernel driver, None without one."""
    if not DRIVER.exists():
        return None
    words = DRIVER.read_text().splitlines()[0].split()
    return next((word for word in words if word[0].isdigit() and "." in word), "of unknown version")


def nccl() -> Finding:
    """Check the library that several GPUs talk through."""
    if not dist.is_nccl_available():
        return problem("NCCL", "this torch has none: several GPUs cannot work together", "install a torch with NCCL")
    return ok("NCCL", ".".join(str(part) for part in torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def compiler() -> Finding:
    """Check what Triton needs for --compile: a C compiler and Python's headers."""
    candidates = [os.environ.get("CC"), "cc", "gcc", "clang"]
    found = next((path for name in candidates if name and (path := shutil.which(name))), None)
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = [*([] if found else ["C compiler"]), *([] if headers.exists() else [f"{headers}"])]
    if missing:
        remedy = "install gcc and the headers (Debian: apt-get install gcc python3-dev), or train with --compile off"
        return problem("compiler", f"no {' and no '.join(missing)}: torch.compile fails at the first step", remedy)
    return ok("compiler", f"{found}, {headers}")


def hub_login() -> Finding:
    """Say whether there is a token for the hub; never which."""
    from huggingface_hub import constants, get_token

    offline = "; HF_HUB_OFFLINE is set: nothing is downloaded" if constants.HF_HUB_OFFLINE else ""
    where = "HF_TOKEN is set" if os.environ.get("HF_TOKEN") else "a stored login" if get_token() else ""
    if where:
        return ok("hub login", where + offline)
    gated = sum(alias.gated for alias in ALIASES.values())
    return ok("hub login", f"none; only gated models need one ({gated} of the {len(ALIASES)} aliases){offline}")


def model(name: str, cache: Path) -> Finding:
    """Fetch a model's config, which needs name, network, token and licence to be right; compare its size with the disk."""
    try:
        folder = resolve_config(name)
        number = build_skeleton(folder, torch.bfloat16).model.num_parameters()
    except FsdpQloraError as error:
        return problem("model", f"{name} cannot be used", str(error))
    bits = 4 if name in ALIASES and ALIASES[name].bits == 4 else 16
    size = number * bits // 8
    present = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    found = f"{name}: {number / 1e9:.1f} billion parameters, about {size / GIB:.1f} GiB at {bits} bits"
    if present:
        return ok("model", f"{found}; {present / GIB:.1f} GiB are here already")
    free = shutil.disk_usage(existing_parent(cache)).free
    if free < size:
        remedy = "free space, or set HF_HOME to a folder on a larger disk"
        return problem("model", f"{found}; {cache} has {free / GIB:.1f} GiB free for the download", remedy)
    return ok("model", f"{found} to download; {free / GIB:.1f} GiB free")
