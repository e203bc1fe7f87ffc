"""iSM in diffusers, of an export's folder or of its name on the Hugging Face hub.

  pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
  images = pipe(class_labels=[3, 7], num_inference_steps=4, guidance_scale=[1.0, 2.5]).images

The network and its sampler are in transformer/ism_pytorch.py.

Axes: B batch, C channels, H/W size of an image, h/w of what the network sees.
"""

import json
import pathlib
import sys
from typing import ClassVar

from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
import torch

_OUTPUTS = ("pil", "np", "pt", "latent")


class ISMPipeline(DiffusionPipeline):
  """Images of classes in 1, 2, 4, ..., 128 steps, with a guidance scale of each image's own.

  Attributes:
    transformer: an `ISMTransformer2DModel`.
    scheduler: a FlowMatchEulerDiscreteScheduler without any shift.
    vae: an AutoencoderKL; None where images are pixels.
    labels: the numbers of the classes of each name; a name may be that of several.
  """

  model_cpu_offload_seq = "transformer->vae"
  _optional_components: ClassVar = ["vae"]

  def __init__(
    self,
    transformer,
    scheduler,
    vae,  # without a default, which diffusers would prefer to what from_pretrained is given
    id2label: dict | None = None,
    auto_map: dict | None = None,  # AutoModel's entry of model_index.json
  ):
    super().__init__()
    self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
    self.register_to_config(id2label=id2label, auto_map=auto_map)
    self.image_processor = VaeImageProcessor(do_resize=False)
    self.labels: dict[str, list[int]] = {}
    for number, label in (id2label or {}).items():
      for name in {label, *(part.strip() for part in label.split(","))}:
        self.labels.setdefault(name, []).append(int(number))

  def get_label_ids(self, label: str | list[str]) -> list[int]:
    """The numbers of classes by name, such as "tabby"."""
    numbers = []
    for name in [label] if isinstance(label, str) else label:
      classes = self.labels.get(name, [])
      if len(classes) != 1:
        known = ", ".join(self.labels) or "none: the classes of this model have numbers alone"
        is_not = f"is of the classes {classes}" if classes else "is the name of no class"
        raise ValueError(f"{name!r} {is_not}: pass a number. Names are {known}.")
      numbers += classes
    return numbers

  @torch.no_grad()
  def __call__(
    self,
    class_labels,
    num_inference_steps: int | str = 4,
    guidance_scale=None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    latents: torch.Tensor | None = None,
    output_type: str = "pil",
    return_dict: bool = True,
  ):
    """Draws an image of each class.

    Args:
      class_labels: B classes, by number or name; the number of classes is no class.
      num_inference_steps: 1, 2, 4, ..., 128, or step lengths such as "1/2,1/4,1/4".
      guidance_scale: of classifier-free guidance, a number or one for each image: 1 is none. It
        costs nothing but where a network has learnt a fixed one. None is 1.5, or the fixed one.
      generator: of the noise, or B of them, one for each image.
      latents: the noise itself, [B, C, h, w].
      output_type: "pil", "np" ([B, H, W, C] in [0, 1]), "pt" ([B, C, H, W] in [0, 1]) or "latent"
        ([B, C, h, w], what the network makes).
      return_dict: whether to return an ImagePipelineOutput, or a tuple.
    Raises:
      ValueError: the network was not trained for this; says what for.
      FloatingPointError: samples are not finite.
    """
    config, device = self.transformer.config, self._execution_device
    # The functions of the transformer's own file: diffusers downloads none that another imports.
    network = getattr(self.transformer, "_orig_mod", self.transformer)  # of torch.compile
    ism = sys.modules[type(network).__module__]
    if output_type not in _OUTPUTS:
      raise ValueError(f"output_type={output_type!r} is unknown; known are {', '.join(_OUTPUTS)}.")
    decoded = config.vae and output_type != "latent"
    if decoded and self.vae is None:
      raise ValueError(
        f"this folder has no autoencoder, and its latents are of {config.vae!r}: pass "
        'output_type="latent", or vae=AutoencoderKL.from_pretrained(...) to from_pretrained.'
      )
    several = isinstance(class_labels, (list, tuple)) or getattr(class_labels, "ndim", 0) > 0
    labels = list(class_labels) if several else [class_labels]
    c = [self.get_label_ids(a)[0] if isinstance(a, str) else a for a in labels]
    if isinstance(generator, list) and len(generator) != len(c):
      raise ValueError(f"{len(generator)} generators are given for {len(c)} images: one for each.")
    if latents is None:
      shape = len(c), *ism.image_shape(config)
      latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    if guidance_scale is None:
      guidance_scale = 1.5 if config.guided else 1 + config.fixed_w
    try:
      x0 = ism.as_tensor("latents", latents, device).to(device)
      w = ism.as_tensor("guidance_scale", guidance_scale, device).double() - 1
      x, c, w, schedule = ism.prepare(network, x0, c, w, num_inference_steps)
    except ValueError as error:
      names = "x0: latents, c: class_labels, w: guidance_scale - 1, steps: num_inference_steps"
      raise ValueError(f"{error} ({names})") from error
    self.scheduler.set_timesteps(sigmas=[1 - t for t, _ in schedule], device=device)
    steps = zip(self.progress_bar(schedule), self.scheduler.timesteps, strict=True)
    for (t, d), timestep in steps:
      s = ism.velocity(self.transformer, x, t, d, c, w)
      # Its velocity is noise - data.
      x = self.scheduler.step(-s, timestep, x, return_dict=False)[0]
    x = ism.check_samples(x)
    if decoded:
      x = ism.decode(network, x, self.vae)
    images = self.image_processor.postprocess(x, output_type=output_type)
    self.maybe_free_model_hooks()
    return ImagePipelineOutput(images=images) if return_dict else (images,)

  def to_json_string(self) -> str:
    """The model index, which names the files of the classes that are not diffusers' own."""
    index = json.loads(super().to_json_string())
    index["_class_name"] = [pathlib.Path(__file__).stem, type(self).__name__]
    network = getattr(self.transformer, "_orig_mod", self.transformer)
    index["transformer"] = [type(network).__module__.rpartition(".")[2], type(network).__name__]
    return json.dumps(index, indent=2, sort_keys=True) + "\n"

  def save_config(self, save_directory, push_to_hub=False, **kwargs):
    """Saves model_index.json, and beside it this file, without which it is not loaded."""
    super().save_config(save_directory, push_to_hub, **kwargs)
    source = pathlib.Path(__file__)
    (pathlib.Path(save_directory) / source.name).write_bytes(source.read_bytes())
