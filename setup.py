import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent


class CMakeBuild(build_ext):
    """Builds the CPU kernels; as the extension is optional, a machine without cmake or compiler installs all the rest."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        try:
            subprocess.run(["cmake", "-S", ROOT, "-B", build, f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}"], check=True)
            subprocess.run(["cmake", "--build", build, "--parallel"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"the CPU kernels were not built, the loss will run as plain PyTorch: {error}") from error


setup(
    name="d2v-fast",
    version="0.1.0",
    description="The fastest correct way to pre-train data2vec: text, images, speech",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["d2v_fast", "d2v_fast.*"]),
    package_data={"d2v_fast": ["presets/*/*.yaml", "docs/*.md", "report.html", "py.typed"]},
    ext_modules=[Extension("d2v_fast.ops.libd2v_fast", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
    install_requires=[
        "accelerate>=1.10",
        "datasets>=4",
        "filelock>=3.13",
        "jinja2",
        "joblib",
        "jsonargparse[signatures]>=4.49",
        "numpy",
        "pillow>=10.1",
        "scikit-learn>=1.5",
        "soundfile",
        "soxr",
        "torch>=2.11",
        "tqdm",
        "transformers>=5.17",
        "xxhash",
    ],
    extras_require={
        "audio": ["soundfile", "soxr"],  # always there; so that who asks for it gets no warning
        "flash": ["flash-attn"],  # encoder.attention=flash_attention_2, on GPUs; built from source
        "report": ["matplotlib"],
        "tensorboard": ["tensorboard"],
        "timm": ["timm>=1.0.20"],  # it brings torchvision, of the release that goes with torch
        "vision": ["torchvision"],  # what AutoImageProcessor of transformers 5.17 needs to load an exported processor
        "dev": [
            "hypothesis",
            "lightning",  # for an example
            "matplotlib",
            "mypy>=1.15",
            "pdoc",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "ruff",
            "triton==3.7.1; platform_system == 'Linux'",  # what torch 2.13 for CUDA brings with it
        ],
    },
    entry_points={
        "console_scripts": [f"d2v-{name} = d2v_fast.cli:{name}" for name in ("train", "probe", "export", "report", "doctor")]
    },
)
