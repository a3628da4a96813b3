"""Builds the native library; everything else is declared in pyproject.toml."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

OPS = Path("embedtrain/ops")
FOLDER = OPS / "_backend"
LIBRARY = "libembedtrain_native.so"
SOURCES = sorted(str(path) for path in OPS.glob("*/*.cpp"))
HEADERS = sorted(str(path) for path in OPS.glob("*/*.h"))
FLAGS = ["-O3", "-fPIC", "-shared", "-std=c++17", "-fno-math-errno", "-fopenmp-simd", "-pthread", f"-I{FOLDER}"]
# A function that Python could call is declared in embedtrain.h, or the library is not built.
FLAGS += ["-Werror=missing-declarations"]
# Vectors are returned by functions that are always inlined, so no caller depends on how.
FLAGS += ["-Wno-psabi"]


class BuildNativeLibrary(build_ext):
    """Compiles one plain shared library with a C ABI: it knows neither Python nor torch."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        fingerprint = runpy.run_path(str(FOLDER / "header.py"))["read"]().fingerprint()
        definition = f"-DEMBEDTRAIN_FINGERPRINT={fingerprint}u"
        command = [os.environ.get("CXX", "g++"), *FLAGS, definition, *ext.sources, "-o", str(library)]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            library.unlink(missing_ok=True)
            (FOLDER / LIBRARY).unlink(missing_ok=True)  # One built earlier may not match these sources.
            print(f"WARNING: embedtrain runs slowly: no native library was built: {error}", file=sys.stderr)


class PlatformWheel(bdist_wheel):
    """Tags the wheel for this platform and any Python, since ctypes loads the library."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


native_library = Extension("embedtrain.ops._backend.libembedtrain_native", SOURCES, depends=HEADERS, optional=True)

setup(
    ext_modules=[native_library] if SOURCES else [],
    cmdclass={"build_ext": BuildNativeLibrary, "bdist_wheel": PlatformWheel},
)
