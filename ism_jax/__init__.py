"""ism_jax: "Improved Training Technique for Shortcut Models" (iSM, NeurIPS 2025) in JAX.

  import ism_jax

  model = ism_jax.load("runs/digits")  # or ism_jax.fit(config, workdir)
  images, labels = model.sample(16, steps=4, w=0.5)
  ism_jax.picture(images, enlarge=8).save("samples.png")

See `api` for these names. Importing this package imports nothing else, JAX least of all, before one
of them is used: commands read their flags first.
"""

__all__ = ["Model", "fit", "load", "picture"]


def __getattr__(name: str):
  if name not in __all__:
    raise AttributeError(f"module 'ism_jax' has no attribute {name!r}; it has {', '.join(__all__)}")
  from ism_jax import api

  return getattr(api, name)


def __dir__():
  return sorted({*globals(), *__all__})
