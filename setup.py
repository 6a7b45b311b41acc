"""Packaging metadata. Exact versions for a reproducible install are in constraints.txt (`make lock`)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def read_version() -> str:
    """`__version__` of the package, read as text: importing it would need what is about to be installed."""
    text = (HERE / "minitron_mcore" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    assert match, "minitron_mcore/__init__.py has no __version__"
    return match.group(1)


REQUIREMENTS = [
    "torch>=2.8,<2.14",
    # 0.16.1 is the last for Python 3.10 and 3.11; from 0.17 on there are wheels for 3.12 and newer alone.
    "megatron-core>=0.16.1,<0.20",
    # Undeclared by megatron-core, and dist_checkpointing.save hangs without it.
    "psutil>=5.9,<8",
    "transformers>=5,<6",
    "sentencepiece>=0.2,<0.3",
    "safetensors>=0.4.3,<1",
    "xxhash>=3.4,<5",
    "omegaconf>=2.3,<3",
    "numpy>=1.26,<3",
    # Text compressed by zstd; Python 3.14 has it in its standard library.
    'backports.zstd>=1.0,<2; python_version < "3.14"',
    "pyyaml>=6,<7",
    "matplotlib>=3.8,<4",
    "tensorboard>=2.16,<3",
    "wandb>=0.19,<1",
]

# Transformer Engine builds its PyTorch part against the installed torch: install torch first, then
# `pip install --no-build-isolation .[gpu]` with CUDA's nvcc on the path. Below Python 3.12 the range is the one that
# megatron-core 0.16 names; newer ones name none.
# Apex has no release on PyPI (the project of that name there is another one), so it cannot be named here; it is
# optional, and NVIDIA's PyTorch images carry it.
GPU = [
    "transformer-engine[pytorch,core_cu13]>=2.9,<2.12; python_version < '3.12'",
    "transformer-engine[pytorch,core_cu13]>=2.9,<3; python_version >= '3.12'",
]

# Text in Parquet files.
PARQUET = ["pyarrow>=16,<27"]

DEVELOPMENT = [
    "pytest>=8,<10",
    "pytest-timeout>=2.3,<3",
    "pytest-xdist>=3.6,<4",
    "hypothesis>=6.100,<7",
    # A second opinion on the distillation loss, in tests and in benchmarks/kd_loss.py.
    "nvidia-modelopt>=0.47,<0.48",
    "ruff>=0.9,<1",
    "mypy>=1.13,<3",
    "types-PyYAML>=6,<7",
    "pre-commit>=4,<5",
]

setup(
    name="minitron-mcore",
    version=read_version(),
    description="Prune and distil large language models on sharded Megatron checkpoints",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The minitron_mcore contributors",
    keywords=["pruning", "knowledge distillation", "large language models", "megatron", "minitron"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["minitron_mcore*"]),
    package_data={"minitron_mcore": ["py.typed", "**/*.yaml", "**/*.json", "**/*.html", "**/*.css"]},
    install_requires=REQUIREMENTS,
    extras_require={"gpu": GPU, "parquet": PARQUET, "dev": PARQUET + DEVELOPMENT},
    entry_points={"console_scripts": ["minitron = minitron_mcore.cli:main"]},
)
