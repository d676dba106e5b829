"""Builds the native core; everything else about the package is in pyproject.toml.

The CUDA copy engine is built when the toolkit is found and MOEVEMENT_CUDA is not 0; else only the CPU engine is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_namespace_packages, setup

SOURCES = (
    "csrc/bindings.cpp",
    "csrc/copy_engine.cpp",
    "csrc/copy_engine_cpu.cpp",
    "csrc/copy_engine_cuda.cpp",
    "csrc/copy_worker.cpp",
    "csrc/host_region.cpp",
)


class CudaToolkit(NamedTuple):
    """Where the CUDA runtime's header and library lie."""

    include: Path
    library: Path


def cuda_homes() -> list[Path]:
    """Toolkit folders to look into, the explicit ones first."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        # nvcc on the PATH can be a wrapper script far from the toolkit; a dry run names the toolkit itself.
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
        named = re.search(r"^#\$ (?:TOP|_HERE_)=(.+)$", dry.stderr, re.MULTILINE)
        if named is not None:
            top = Path(named[1].strip())
            homes += [top, top.parent]
        homes.append(Path(nvcc).resolve().parent.parent)
    return homes


def find_cuda() -> CudaToolkit | None:
    """The toolkit to build with, or None when there is none or it is switched off."""
    if os.environ.get("MOEVEMENT_CUDA", "1") == "0":
        return None
    for home in cuda_homes():
        for include in (home / "include", home / "targets/x86_64-linux/include", home / "targets/sbsa-linux/include"):
            if not (include / "cuda_runtime_api.h").is_file():
                continue
            for folder in (include.parent / "lib64", include.parent / "lib"):
                # The static runtime first: it looks for the driver when it is used and not when it is imported.
                for name in ("libcudart_static.a", "libcudart.so"):
                    if (folder / name).is_file():
                        return CudaToolkit(include, folder / name)
    return None


def extension() -> Pybind11Extension:
    """The extension module, with CUDA where it is found."""
    module = Pybind11Extension(
        "moevement_ext._C",
        sources=list(SOURCES),
        depends=[str(header) for header in sorted(Path("csrc").glob("*.h"))],
        cxx_std=17,
        extra_compile_args=["-O3", "-Wall", "-Wextra"],
    )
    cuda = find_cuda()
    if cuda is None:
        print("moevement: CUDA toolkit not found or switched off: building the CPU copy engine only", file=sys.stderr)
        return module
    print(f"moevement: building the CUDA copy engine with {cuda.library}", file=sys.stderr)
    module.define_macros.append(("MOEVEMENT_WITH_CUDA", "1"))
    # System headers of the toolkit are not ours to warn about.
    module.extra_compile_args += ["-isystem", str(cuda.include)]
    module.extra_link_args.append(str(cuda.library))
    if cuda.library.suffix == ".a":
        # Hidden, so that a second CUDA runtime in the process (torch's) keeps its own functions.
        module.extra_link_args += ["-Wl,--exclude-libs,ALL", "-lrt", "-ldl", "-lpthread"]
    else:
        module.extra_link_args.append(f"-Wl,-rpath,{cuda.library.parent}")
    return module


# Namespace packages: `megatron` belongs to Megatron too, and must have no __init__.py here.
setup(
    packages=find_namespace_packages(include=["megatron.moevement*", "moevement_ext*"]),
    package_data={"moevement_ext": ["py.typed", "*.pyi"]},
    ext_modules=[extension()],
    cmdclass={"build_ext": build_ext},
)
