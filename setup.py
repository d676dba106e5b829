"""Builds the native core; everything else about the package is in pyproject.toml.

The CUDA copy engine is built when the toolkit is found and MOEVEMENT_CUDA is not 0; else only the CPU engine is.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_namespace_packages, setup

AVX2 = "csrc/digest_avx2.cpp"
SOURCES = sorted({str(path) for path in Path("csrc").glob("*.cpp")} - {AVX2})
HEADERS = sorted(str(path) for path in [*Path("csrc").glob("*.h"), *Path("csrc/third_party").glob("*/*.h")])
KERNELS = sorted(str(path) for path in Path("csrc").glob("*.cu"))
# Compiled for these as far as the toolkit knows them; the newest also travels as PTX, for GPUs that come later.
ARCHITECTURES = (80, 90, 100)


class CudaToolkit(NamedTuple):
    """Where the CUDA runtime's header and library lie, and the compiler of the same toolkit, if it has one."""

    include: Path
    library: Path
    nvcc: Path | None


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
                        nvcc = home / "bin/nvcc"
                        return CudaToolkit(include, folder / name, nvcc if nvcc.is_file() else None)
    return None


def gencode(nvcc: Path) -> list[str]:
    """Options for the architectures that this nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {int(found) for found in re.findall(r"^compute_(\d+)$", listed, re.MULTILINE)}
    chosen = [number for number in ARCHITECTURES if number in known]
    if not chosen:
        raise RuntimeError(f"{nvcc} knows none of the architectures {ARCHITECTURES}")
    options = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in chosen]
    return [*options, f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]


class build_core(build_ext):
    """Compiles one file for AVX2, and the kernels with nvcc, beside what setuptools does."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        """Builds the extension module."""
        options = ["-std=c++17", "-O3", "-Wall", "-Wextra"]
        if platform.machine() == "x86_64":
            options.append("-mavx2")
        ext.extra_objects += self.compiler.compile([AVX2], output_dir=self.build_temp, extra_postargs=options)
        cuda = find_cuda()
        if cuda is not None and cuda.nvcc is not None:
            folder = Path(self.build_temp)
            folder.mkdir(parents=True, exist_ok=True)
            flags = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden", *gencode(cuda.nvcc)]
            for kernel in KERNELS:
                target = str(folder / f"{Path(kernel).stem}.cu.o")
                subprocess.run([cuda.nvcc, *flags, "-c", kernel, "-o", target], check=True)
                ext.extra_objects.append(target)
        super().build_extension(ext)


def extension() -> Pybind11Extension:
    """The extension module, with CUDA where it is found."""
    module = Pybind11Extension(
        "moevement_ext._C",
        sources=SOURCES,
        depends=[*HEADERS, AVX2, *KERNELS],
        cxx_std=17,
        extra_compile_args=["-O3", "-Wall", "-Wextra"],
    )
    cuda = find_cuda()
    if cuda is None:
        print("moevement: CUDA toolkit not found or switched off: building the CPU copy engine only", file=sys.stderr)
        return module
    print(f"moevement: building the CUDA copy engine with {cuda.library}", file=sys.stderr)
    module.define_macros.append(("MOEVEMENT_WITH_CUDA", "1"))
    if cuda.nvcc is None:
        print(
            "moevement: no nvcc in this toolkit: pieces are copied one by one, digested by threads",
            file=sys.stderr,
        )
    else:
        module.define_macros.append(("MOEVEMENT_WITH_GATHER", "1"))
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
    cmdclass={"build_ext": build_core},
)
