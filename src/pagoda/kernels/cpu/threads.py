"""How many threads a step should use: the physical cores that this process may run on, within its CPU quota."""

import os
from pathlib import Path


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def cgroup_quota() -> float | None:
    """CPUs' worth of time that the control group allows (version 2, then 1); None: no limit."""
    words = _read("/sys/fs/cgroup/cpu.max").split()
    if not words:
        words = [_read(f"/sys/fs/cgroup/cpu/cpu.cfs_{part}_us") for part in ("quota", "period")]
    try:
        quota, period = float(words[0]), float(words[1])
    except (ValueError, IndexError):
        return None
    return quota / period if quota > 0 and period > 0 else None


def physical_cores(cpus: set[int]) -> int:
    """How many different cores the logical CPUs belong to: two threads of one core share its arithmetic units."""
    siblings = {_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    return len(siblings)


def default_threads() -> int:
    """At least 1."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    quota = cgroup_quota()
    cores = physical_cores(cpus)
    return max(1, cores if quota is None else min(cores, int(quota)))
