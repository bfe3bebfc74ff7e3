"""Where numbers were measured: machine, versions, load. Nothing that names a person, a host or a path."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_prune.deploy._profile_machine import load_average

PACKAGES = (
    "lightning-prune", "torch", "pytorch-lightning", "lightning", "numpy",
    "onnx", "onnxruntime", "onnxscript", "openvino",
)  # fmt: skip
# The instruction sets that decide which kernels a runtime picks.
SIMD = (
    "sse4_1", "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni_int8", "amx_tile", "amx_int8", "amx_bf16",
    "neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme", "rvv",
)  # fmt: skip


# Those that multiply and add integers of 8 bits without an overflow.
_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}


def environment() -> dict[str, Any]:
    """Describe this machine and the installed versions as plain data.

    Returns:
        Processor, cores, instruction sets, governor, memory, load, operating system, Python and packages.
        What the system does not tell is None.

    Example:
        >>> sorted(environment())[:4]
        ['allowed_cores', 'arch', 'cores', 'cpu']
    """
    info = _cpuinfo()
    return {
        "cpu": info.get("model name") or info.get("Model") or platform.processor() or None,
        "arch": platform.machine(),
        "cores": os.cpu_count(),
        "allowed_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cpu_quota": _cpu_quota(),
        "instruction_sets": instruction_sets(info),
        "virtual_machine": "hypervisor" in info["flags"].split() if info.get("flags") else None,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "mhz": _number(info.get("cpu MHz")),
        "memory_bytes": _memory_bytes(),
        "load_average": load_average(),
        "os": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": _versions(),
    }


def instruction_sets(info: dict[str, str] | None = None) -> list[str]:
    """Return the vector instruction sets of the processor that matter for inference.

    Args:
        info: Fields of `/proc/cpuinfo`; read from there by default.
    """
    fields = _cpuinfo() if info is None else info
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return [name for name in SIMD if name in flags]


def lacks_vnni(known: Mapping[str, Any]) -> bool:
    """Say whether a processor is an x86 one without VNNI, on which quick sums of 8-bit products overflow.

    Args:
        known: An `environment()`, or what a bundle's runner says of a device.

    Example:
        >>> lacks_vnni({"arch": "x86_64", "instruction_sets": ["avx2"]}), lacks_vnni({})
        (True, False)
    """
    arch = str(known.get("arch") or known.get("machine")).lower()
    sets = known.get("instruction_sets") or ()
    return arch in ("x86_64", "amd64") and bool(sets) and not _VNNI.intersection(sets)


def _cpuinfo() -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, separator, value = line.partition(":")
        if separator:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _cpu_quota() -> float | None:
    """Return the cores that the control group may use, None if it sets no limit."""
    quota, _, period = (_read("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    return None if quota == "max" else int(quota) / int(period or 100_000)


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
