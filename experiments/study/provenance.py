"""Where a number comes from: command, commit, versions, machine and date."""

import datetime
import functools
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

# Options of folders that are another place on every machine end so.
_PLACES = ("data-dir", ".cells")


def environment() -> dict[str, str]:
    """The versions and the devices that a result and its time depend on."""
    packages = ("dsbp-jax", "jax", "jaxlib", "flax", "optax", "numpy", "scipy")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    device = jax.devices()[0]
    return versions | {
        "python": platform.python_version(),
        "device": f"{device.platform}: {device.device_kind}",
        "devices": str(jax.device_count()),
        "cores": str(usable_cores()),
        "processor": _processor(),
    }


def provenance() -> dict[str, Any]:
    """What every file of results has: `environment`, and command, commit and date."""
    return {
        "command": command(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "ran_on": environment(),
    }


def command() -> str:
    """The command line, as one would type it; folders of data are DIR."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    words = without_places(sys.argv[1:])
    if not spec:
        return shlex.join([Path(sys.argv[0]).name, *words])
    return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *words])


def without_places(words: Iterable[str]) -> list[str]:
    """Arguments of a command with DIR for folders that lie elsewhere for others.

    Example:
      >>> without_places(["--data-dir", "/mnt/sets", "--data.data-dir=/mnt/sets", "-v"])
      ['--data-dir', 'DIR', '--data.data-dir=DIR', '-v']
    """
    words = list(words)
    is_place = lambda option: option.startswith("--") and option.endswith(_PLACES)
    for at, word in enumerate(words):
        option, equals, _ = word.partition("=")
        if is_place(option) and equals:
            words[at] = f"{option}=DIR"
        elif at and is_place(words[at - 1]):
            words[at] = "DIR"
    return words


@functools.cache
def commit() -> str:
    """The commit of this source, with `+` where files were changed since."""
    try:
        hash_, changed = (
            subprocess.run(
                ["git", *words],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                check=True,
                encoding="utf-8",
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return hash_ + "+" * bool(changed)


def usable_cores() -> int:
    """The cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@functools.cache
def _processor() -> str:
    """The model of the processor, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown").strip()
