"""What a result was measured on: processor or GPU, cores, memory, versions, threads; never a host's name."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mempool.kernels.implementation import Name, implementation_for
from mempool.kernels.implementation import implementation as kernel_implementation

_IMPLEMENTATIONS: dict[str, tuple[Name, ...]] = {"cpu": ("torch", "numba"), "cuda": ("torch", "triton")}
_PACKAGES = ("torch", "triton", "numba", "numpy", "fbgemm-gpu-cpu", "faiss-cpu")


def describe(device: torch.device) -> dict[str, Any]:
    """What is measured on, as it stands in the result file."""
    cores = num_cores()
    if device.type == "cuda":
        model, what = torch.cuda.get_device_name(device), "gpu"
    else:
        model, what = processor(), f"{cores}-cores"
    return {
        "name": f"{slug(model)}-{what}",
        "device": device.type,
        "model": model,
        "processor": processor(),
        "cores": cores,
        "memory_gib": round(memory_bytes(device) / (1 << 30), 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def implementation(device: torch.device) -> str:
    """Which implementation of the kernels runs on a device: "numba", "triton" or "torch"."""
    running = implementation_for(device)
    return next(name for name in _IMPLEMENTATIONS[device.type] if kernel_implementation(name) is running)


def versions(also: Sequence[str] = ()) -> dict[str, str | None]:
    """Versions of Python and of every package that takes part; None if it is not installed.

    Args:
        also: Packages beside those of the kernels and their peers.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in (*_PACKAGES, *also):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def processor() -> str:
    """The processor's model as the system calls it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes(device: torch.device) -> int:
    """Memory of the device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def slug(text: str) -> str:
    """Lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("(r)", "").replace("(tm)", "")).strip("-") or "unknown"
