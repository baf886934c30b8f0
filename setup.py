"""The CPU kernels, an optional part of the package; everything else is in pyproject.toml."""

import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent


class CMakeBuild(build_ext):
    """Builds the kernels with CMake. Without cmake or a compiler the rest of the package is installed."""

    def get_ext_filename(self, fullname):  # the same on every system, as in CMakeLists.txt
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        try:
            subprocess.run(["cmake", "-S", ROOT, "-B", build, f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}"], check=True)
            subprocess.run(["cmake", "--build", build, "--parallel"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"the CPU kernels were not built, the loss will run as plain PyTorch: {error}") from error


class PlatformWheel(bdist_wheel):
    """One wheel for every Python version: ctypes loads the kernels, which do not use Python's C interface."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("d2v_fast.ops.libd2v_fast", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
