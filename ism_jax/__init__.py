"""ism_jax: "Improved Training Technique for Shortcut Models" (iSM, NeurIPS 2025) in JAX."""
