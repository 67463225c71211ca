from setuptools import find_packages, setup

setup(
    name="image-text-pretrain",
    version="0.1.0",
    description="Joint image-text pretraining: tar shards in, contrastive-plus-matching weights out",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["pretrain*", "data_tools*", "launch*"]),
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.18",
        "transformers>=4.57",
        "open_clip_torch>=3.2",
        "webdataset>=1.0",
        "aiohttp>=3.12",
        "braceexpand",
        "duckdb>=1.5",
        "fsspec>=2023.10",
        "ftfy>=6.1",
        "numpy>=1.26",
        "opencv-python-headless>=4.8,<5",  # 5 has no Haar cascades
        "pillow>=10.1",
        "pyarrow>=15",
        "pydantic>=2.7",
        "pyyaml>=6.0",
        "safetensors>=0.4.3",
        "simplejpeg>=1.7.3",
        "tensorboard>=2.15",
        "tokenizers>=0.20",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": ["hypothesis>=6.100", "pytest>=8", "pytest-xdist>=3.6", "ruff"],
        "bench": ["pandas"],
    },
)
