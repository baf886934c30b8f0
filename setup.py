from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="d2v-fast",
    version="0.1.0",
    description="The fastest correct way to pre-train data2vec: text, images, speech",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["d2v_fast", "d2v_fast.*"]),
    package_data={"d2v_fast": ["presets/*/*.yaml", "py.typed"]},
    install_requires=[
        "accelerate>=1.10",
        "datasets>=4",
        "jsonargparse[signatures]>=4.49",
        "numpy",
        "pillow",
        "scikit-learn>=1.5",
        "soundfile",
        "soxr",
        "torch>=2.11",
        "tqdm",
        "transformers>=5.17",
    ],
    extras_require={
        "tensorboard": ["tensorboard"],
        "dev": ["hypothesis", "pytest", "pytest-benchmark", "pytest-xdist", "ruff"],
    },
    entry_points={"console_scripts": ["d2v-train = d2v_fast.cli:train", "d2v-probe = d2v_fast.cli:probe"]},
)
