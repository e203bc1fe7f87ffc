"""python -m ism_jax.export, which is python -m ism_jax export."""

from ism_jax.export import pytorch
from ism_jax.runtime import commands

if __name__ == "__main__":
  commands.run(pytorch)
