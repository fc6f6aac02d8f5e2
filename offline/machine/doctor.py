"""Finds whether this machine and this installation can quantise and serve. Asks no network.

vLLM is loaded in a process of its own with a time limit, because an installation that is broken may hang or crash.
"""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vlmq_vllm import NEWEST, OLDEST

VLLM = f">={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"
REQUIRED = ("torch", "torchvision", "transformers", "safetensors")
OTHERS = ("triton", "compressed-tensors")  # come with vLLM; any version of them
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16")
CAPABILITY = (8, 0)  # the least that the plugin accepts
GROUP = "vllm.general_plugins"
TIMEOUT = 180  # seconds for loading vLLM: one busy core takes more than a minute
PROBE = (
    "import vlmq_vllm; vlmq_vllm.register(); "
    "from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS as methods; "
    "print('registered' if 'vlmq' in methods else 'missing')"
)


@dataclass(frozen=True)
class Package:
    """A package, the version found (None: not installed), the versions that are supported ("": any)."""

    name: str
    found: str | None
    supported: str
    problem: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """`devices`: name, capability and memory in bytes of each CUDA device. Memory and disk are bytes that are free.
    `plugin`: None where vLLM is not installed, else whether vLLM has vlmq among its methods."""

    packages: list[Package]
    plugin: bool | None
    devices: list[dict]
    processor: list[str]
    cores: int
    memory: int | None
    disk: int
    problems: list[str]

    def to_dict(self) -> dict:
        return asdict(self)


def diagnose() -> Diagnosis:
    packages = find_packages()
    found = {package.name: package.found for package in packages}
    plugin, trouble = probe_plugin() if found["vllm"] else (None, None)
    devices = find_devices() if found["torch"] else []
    flags = find_flags(Path("/proc/cpuinfo"))
    problems = [problem for problem in (*(package.problem for package in packages), trouble) if problem]
    return Diagnosis(
        packages=packages,
        plugin=plugin,
        devices=devices,
        processor=flags,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=available_memory(Path("/proc/meminfo")),
        disk=shutil.disk_usage(Path()).free,
        problems=problems + device_problems(devices, flags),
    )


def find_packages() -> list[Package]:
    """Python and the packages with the ranges that this distribution's own metadata asks for."""
    own = metadata.distribution("vlmq-vllm")
    ranges = {r.name: str(r.specifier) for r in map(Requirement, own.requires or []) if r.marker is None}
    python = str(own.metadata["Requires-Python"])
    packages = [judge("python", platform.python_version(), python, f"make the environment with Python {python}")]
    for name in REQUIRED:
        packages.append(judge(name, version_of(name), ranges[name], f'pip install "{name}{ranges[name]}"'))
    packages.append(judge("vllm", version_of("vllm"), VLLM, f'pip install "vllm{VLLM}" for serving'))
    return packages + [Package(name, version_of(name), "") for name in OTHERS]


def judge(name: str, found: str | None, supported: str, advice: str) -> Package:
    if found is None:
        return Package(name, None, supported, f"{name} is not installed; {advice}")
    if not SpecifierSet(supported).contains(found, prereleases=True):
        return Package(name, found, supported, f"{name} is {found}, supported is {supported}; {advice}")
    return Package(name, found, supported)


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def probe_plugin(probe: str = PROBE, timeout: float = TIMEOUT) -> tuple[bool, str | None]:
    """Whether vLLM finds the plugin and takes it, and if not what to do."""
    if not any(entry.name == "vlmq" for entry in metadata.entry_points(group=GROUP)):
        return False, f"the entry point vlmq of {GROUP} is not registered; run pip install vlmq-vllm again"
    try:
        result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return False, f"vLLM could not be loaded within {timeout:g} seconds; try: python -c 'import vllm'"
    lines = result.stdout.split()
    if result.returncode == 0 and lines[-1:] == ["registered"]:
        return True, None
    if result.returncode == 0:
        return False, "vLLM loads, but vlmq could not register with it; see the log of: python -c " + repr(probe)
    reason = (result.stderr.strip().splitlines() or ["it gave no reason"])[-1]
    return False, f"vLLM cannot be loaded ({reason}); install it again"


def find_devices() -> list[dict]:
    import torch

    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [{"name": d.name, "capability": [d.major, d.minor], "memory": d.total_memory} for d in devices]


def device_problems(devices: list[dict], flags: list[str]) -> list[str]:
    """GPUs that the plugin refuses, and processors that vLLM's CPU kernels do not run on."""
    least = ".".join(map(str, CAPABILITY))
    problems = [
        f"{device['name']} has compute capability {'.'.join(map(str, device['capability']))}, the plugin needs "
        f"{least}; hide it with CUDA_VISIBLE_DEVICES"
        for device in devices
        if tuple(device["capability"]) < CAPABILITY
    ]
    if not devices and platform.machine() == "x86_64" and not {"avx2", "avx512f"} & set(flags):
        problems.append("there is no GPU and the processor has neither AVX2 nor AVX-512; vLLM cannot serve on it")
    return problems


def find_flags(path: Path) -> list[str]:
    """The instruction sets that matter to vLLM's CPU kernels; [] where the system does not tell."""
    if not path.is_file():
        return []
    lines = [line for line in path.read_text().splitlines() if line.startswith(("flags", "Features"))]
    have = set(lines[0].partition(":")[2].split()) if lines else set()
    return [flag for flag in FLAGS if flag in have]


def available_memory(path: Path) -> int | None:
    """Bytes of memory that can be had, as Linux estimates them; None elsewhere."""
    if not path.is_file():
        return None
    fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024
