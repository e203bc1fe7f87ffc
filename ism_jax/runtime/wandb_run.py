"""A run of Weights & Biases that has what metrics.jsonl and TensorBoard have.

For `pip install wandb`, with `wandb login`, or WANDB_MODE=offline and `wandb sync` later.
"""

from collections.abc import Iterator
import contextlib
import os
import secrets

from absl import logging
from etils import epath
from PIL import Image

from ism_jax.runtime import files

_ID = "wandb_id"  # in the workdir: a run that continues is the same one there


class Run:
  """A run that has begun; see `start`."""

  def __init__(self, wandb, run):
    self._wandb, self._run = wandb, run
    # The monitor's entries come after those of later steps, which W&B's own count would refuse.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")

  def add(self, step: int, values: dict[str, float | Image.Image]) -> None:
    """Adds numbers and pictures of a step."""
    as_image = lambda v: self._wandb.Image(v) if isinstance(v, Image.Image) else v
    self._run.log({"step": step} | {name: as_image(value) for name, value in values.items()})


@contextlib.contextmanager
def start(project: str, workdir: str, config: dict | None) -> Iterator[Run | None]:
  """Begins a run, or continues that of the workdir; it ends with the context.

  Args:
    project: PROJECT, or ENTITY/PROJECT.
    workdir: of the run; its files of W&B go there, or with a scheme such as gs:// to `./wandb`.
    config: {key: value}.
  Yields:
    The run; None, with a warning, if W&B's server does not answer.
  Raises:
    ValueError: wandb is not installed, or there is no login.
  """
  try:
    import wandb  # an extra
  except ImportError as error:
    raise ValueError(
      f"config.log.wandb={project!r} needs wandb ({error}): pip install wandb, or leave it out."
    ) from error
  entity, _, name = project.rpartition("/")
  path = epath.Path(workdir) / _ID
  if not path.exists():
    files.write_whole(os.fspath(path), secrets.token_hex(4))
  try:
    run = wandb.init(
      project=name,
      entity=entity or None,
      id=path.read_text(encoding="utf-8").strip(),
      resume="allow",
      name=os.path.basename(os.path.normpath(workdir)),
      dir=None if "://" in workdir else workdir,
      config=config,
    )
  except wandb.errors.CommError as error:
    logging.warning("W&B does not answer (%s): this run is logged without it.", error)
    yield None
    return
  except (wandb.errors.Error, ValueError) as error:
    raise ValueError(
      f"config.log.wandb={project!r}: W&B cannot begin a run ({error}). Give PROJECT or "
      "ENTITY/PROJECT; `wandb login` first, or WANDB_MODE=offline."
    ) from error
  try:
    yield Run(wandb, run)
  finally:
    run.finish()
