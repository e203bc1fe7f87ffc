"""Images in files, whoever made them: ADM's npz, NumPy arrays, and folders of image files.

ADM's npz (Dhariwal and Nichol 2021) holds arr_0, uint8 [N, H, W, C], and arr_1, labels [N]; every
evaluator in the field reads it. 50,000 images of 256x256 are 9.8 GB: files are written and read in
batches, and memory holds a few of these.

Axes: N images in a file, B in a batch, H/W size, C channels.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import re
import shutil
import tempfile
from typing import Any
import zipfile

from absl import logging
from etils import epath
import jax
import numpy as np
from PIL import Image

from ism_jax.data import images as images_lib
from ism_jax.runtime import arrays, files

_IMAGES, _LABELS = "arr_0", "arr_1"  # ADM's names
_LABEL_NAMES = (_LABELS, "labels")
_CHANNELS = (1, 3)
_GREY_MODES = ("1", "L", "LA", "La", "I", "F")  # of PIL, and I;16...
_LOSSY = (".jpg", ".jpeg")


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
  """Images of one size, in a fixed order.

  Attributes:
    source: where they are.
    count: how many are listed, readable or not, N.
    image_shape: (H, W, C), C 1 or 3.
    batches: B -> iterator of uint8 [B, H, W, C], the last one shorter. Raises ValueError, with the
      file's name, for damage that only reading shows.
    protocol: () -> what they are, for those who judge by them: JSON. Of `open` it has the checksum
      "sha256" of the file; of a folder, of the files' names and checksums, and so it reads all.
    labels: int64 [N], where the file has some.
    unreadable: {name: reason} of the images that batches had to leave out, filled as they are read.
  """

  source: str
  count: int
  image_shape: tuple[int, int, int]
  batches: Callable[[int], Iterator[np.ndarray]]
  protocol: Callable[[], dict[str, Any]]
  labels: np.ndarray | None = None
  unreadable: dict[str, str] = dataclasses.field(default_factory=dict)


def open(path: str, num_threads: int | None = None) -> ImageSet:
  """Finds images, and checks all that can be known without decoding them.

  Args:
    path: an npz with images in arr_0 (or in its only array of four axes) and perhaps labels in
      arr_1 or labels; an npy of images; or a folder of image files, in folders inside it too, which
      are sorted by name. Arrays are uint8 [N, H, W, 1 or 3]. Files are decoded as
      `data.images.decode` says, to one channel where all are grey.
    num_threads: that decode image files; default one for each processor.
  Raises:
    ValueError: there are no two images of one size, as uint8, to be had.
  """
  path = os.fspath(path)
  if "://" in path:
    raise ValueError(f"{path} is no local path: copy it to this machine, or mount its bucket.")
  if os.path.isdir(path):
    images = _open_folder(path, num_threads or os.cpu_count())
  elif os.path.isfile(path):
    images = _open_arrays(path)
  else:
    raise ValueError(
      f"{path}: there is no such file or folder. Needed is an npz or npy file of images, or a "
      "folder of image files."
    )
  if images.count < 2:
    raise ValueError(f"{path} holds {images.count} image: statistics need at least 2. Name more.")
  return images


def as_grey(images: ImageSet) -> ImageSet:
  """Images of three channels that are alike, as `writer` stores grey ones, with one channel.

  Its batches raise ValueError where there are colours.
  """

  def batches(batch_size):
    for batch in images.batches(batch_size):
      if (batch != batch[..., :1]).any():
        raise ValueError(
          f"the images of {images.source} have colours, and those of the dataset are grey: convert "
          "them, or pass files of evaluation.reference."
        )
      yield batch[..., :1]

  shape = (*images.image_shape[:2], 1)
  return dataclasses.replace(images, image_shape=shape, batches=batches)


# Arrays.


def _open_arrays(path) -> ImageSet:
  held = arrays.headers(path)
  images, labels = _images_of(path, held), None
  for name in _LABEL_NAMES:
    array = held.get(name)
    if array and array.shape == images.shape[:1] and array.dtype.kind in "iu":
      labels = arrays.read(path, array).astype(np.int64)
      break
  return ImageSet(
    source=path,
    count=images.shape[0],
    image_shape=images.shape[1:],
    batches=functools.partial(array_batches, path, images),
    protocol=lambda: {"source": path, "sha256": files.sha256(path), "listed": images.shape[0]},
    labels=labels,
  )


def _images_of(path, held: dict[str, arrays.Header]) -> arrays.Header:
  """The one of the arrays that holds the images, as they are needed."""
  of_four_axes = [array for array in held.values() if len(array.shape) == 4]
  named = [array for array in of_four_axes if array.name == _IMAGES]
  chosen = named or of_four_axes
  if len(chosen) != 1:
    describe = lambda array: f"{array.name} {array.dtype} {list(array.shape)}".strip()
    listing = ", ".join(map(describe, held.values()))
    raise ValueError(
      f"{path} holds {listing or 'no arrays'}, of which {len(chosen) or 'none'} may be images: "
      f"needed are uint8 [N, H, W, C] in {_IMAGES}."
    )
  (images,) = chosen
  what = f"{path}: the images are {images.dtype} {list(images.shape)}"
  if images.dtype != np.uint8:
    raise ValueError(
      f"{what}, and uint8 in 0..255 is needed. From numbers in [-1, 1]: "
      "np.uint8(np.clip(np.round(127.5 * (x + 1)), 0, 255)); from [0, 1]: "
      "np.uint8(np.clip(np.round(255 * x), 0, 255))."
    )
  if images.shape[3] not in _CHANNELS:
    if images.shape[1] in _CHANNELS:
      remedy = "these are channels first: x.transpose(0, 2, 3, 1)"
    elif images.shape[3] == 4:
      remedy = "if the fourth channel is alpha, drop it: x[..., :3]"
    else:
      remedy = "the last axis must be the channels"
    raise ValueError(f"{what}, and [N, H, W, 1 or 3] is needed; {remedy}.")
  if 0 in images.shape:
    raise ValueError(f"{what}: there are no images. Name a file or folder of some.")
  if images.fortran_order:
    raise ValueError(
      f"{what} in Fortran order, which cannot be read image by image: save np.ascontiguousarray(x)."
    )
  return images


def array_batches(path: str, images: arrays.Header, batch_size: int) -> Iterator[np.ndarray]:
  """uint8 [B, H, W, C] of an array of images in a file, the last batch shorter."""
  count, *image_shape = images.shape
  with arrays.opened(path, images) as file:
    for start in range(0, count, batch_size):
      shape = (min(batch_size, count - start), *image_shape)
      content = file.read(math.prod(shape))
      if len(content) < math.prod(shape):
        raise EOFError(f"it ends in images {start} to {start + shape[0] - 1}")
      yield np.frombuffer(content, np.uint8).reshape(shape)


# Folders.


def _open_folder(folder, num_threads) -> ImageSet:
  files_here = _files_below(folder)
  names = sorted(images_lib.only_images(files_here, folder))
  if not names:
    raise ValueError(
      f"{folder} holds no images: none of its {len(files_here)} files has one of the suffixes "
      f"{' '.join(images_lib.SUFFIXES)}."
    )
  path = functools.partial(os.path.join, folder)
  with futures.ThreadPoolExecutor(num_threads) as pool:
    headers = dict(zip(names, pool.map(_size_and_grey, map(path, names)), strict=True))
  sizes = {name: header[0] for name, (header, _) in headers.items() if header}
  unreadable = {name: reason for name, (_, reason) in headers.items() if reason}
  if len(sizes) < min(2, len(names)):
    name, reason = next(iter(unreadable.items()))
    raise ValueError(
      f"{folder}: {len(unreadable)} of {len(names)} images cannot be read; the first is {name}: "
      f"{reason}."
    )
  first, *_ = sizes
  if others := [name for name, size in sizes.items() if size != sizes[first]]:
    describe = lambda name: "{} is {}x{}".format(name, *sizes[name])
    raise ValueError(
      f"{folder} holds images of several sizes: {describe(first)} pixels (width x height), but "
      f"{describe(others[0])}, and {len(others)} of {len(names)} differ from the first. Put those "
      "of one size in a folder of their own, or resize them."
    )
  if lossy := [name for name in names if name.lower().endswith(_LOSSY)]:
    logging.warning(
      f"{folder}: {len(lossy)} of {len(names)} images are JPEG files, such as {lossy[0]}: what "
      "compression lost moves the Fréchet distance. PNG or npz loses nothing."
    )
  grey = all(header[1] for header, _ in headers.values() if header)
  image_shape = (*sizes[first][::-1], 1 if grey else 3)

  def sha256():
    checksum = lambda name: files.sha256(path(name)) if headers[name][0] else "unreadable"
    with futures.ThreadPoolExecutor(num_threads) as pool:
      contents = zip(names, pool.map(checksum, names), strict=True)
      lines = "".join(f"{name}\n{content}\n" for name, content in contents)
    return hashlib.sha256(images_lib.as_bytes(lines)).hexdigest()

  def batches(batch_size):
    decode = functools.partial(_decode, folder, image_shape)
    # The next batch is decoded while this one is used.
    items = [(i, name) for i, name in enumerate(names) if headers[name][0]]
    decoded = images_lib.in_order(decode, items, ahead=batch_size, num_threads=num_threads)
    with contextlib.closing(decoded):
      yield from images_lib.readable_batches(decoded, batch_size, names.__getitem__, unreadable)

  return ImageSet(
    source=folder,
    count=len(names),
    image_shape=image_shape,
    batches=batches,
    protocol=lambda: {"source": folder, "sha256": sha256(), "listed": len(names)},
    unreadable=unreadable,
  )


def _files_below(folder) -> list[str]:
  """The names of all that is no folder, in `folder` and in the folders inside it.

  Links to folders elsewhere are followed, to each folder once. Those to folders in `folder`, whose
  images are listed anyway, and to folders that they lie in are left out.
  """

  def fail(error):
    raise OSError(f"{error.filename} cannot be read ({error.strerror}): allow it, or remove it.")

  top = os.path.realpath(folder)
  names, entered, lies_in = [], set(), {folder: [top]}
  for root, folders, names_here in os.walk(folder, onerror=fail, followlinks=True):
    names += [os.path.relpath(os.path.join(root, name), folder) for name in names_here]
    entries, above = [], lies_in.pop(root)
    for name in sorted(name for name in folders if not name.startswith(".")):
      path = os.path.join(root, name)
      target = os.path.realpath(path)
      if os.path.islink(path):
        loop = any(os.path.commonpath([target, outer]) == target for outer in above)
        if loop or target in entered or os.path.commonpath([target, top]) == top:
          logging.warning("%s is left out: it leads to %s, which is read already.", path, target)
          continue
        entered.add(target)
      entries.append(name)
      lies_in[path] = [*above, target]
    folders[:] = entries
  return names


def _size_and_grey(path) -> tuple[tuple[tuple[int, int], bool] | None, str | None]:
  """((width, height), whether it has no colours) from the header of an image file, or why not."""

  def header(file):
    with file, images_lib.open_image(file) as image:
      return image.size, image.mode in _GREY_MODES or image.mode.startswith("I;16")

  return images_lib.attempt(path, lambda: files.open_regular(path), header)


def _decode(folder, image_shape, item) -> images_lib.Crop:
  """An image file as uint8 [H, W, C], or why it cannot be read."""
  index, name = item
  path = os.path.join(folder, name)
  read = functools.partial(images_lib.read_file, path)
  convert = lambda content: np.asarray(images_lib.decode(content))[..., : image_shape[2]]
  pixels, reason = images_lib.attempt(path, read, convert)
  if reason is None and pixels.shape != image_shape:
    raise ValueError(f"{path} has become {pixels.shape} since it was {image_shape}: start again.")
  return images_lib.Crop(index, pixels, None, reason)


# Writing.


@contextlib.contextmanager
def writer(path: str, count: int, image_shape: tuple[int, int, int]):
  """A context: add(images uint8 [B, H, W, C], labels int [B]), which appends to ADM's npz.

  ADM's evaluator reads three channels: of grey images all are alike. The file is there once the
  context is left with all images, and whole; an error leaves none. Its bytes depend only on the
  images and labels. Only the first process writes.

  Args:
    path: local, or of an object store such as gs://, for which it passes through a temporary file.
    count: images that it will hold, N.
    image_shape: (H, W, C).
  Raises:
    ValueError: images or labels of another type or shape, more or fewer than `count`.
    OSError: there is no room for `count` images.
  """
  path = os.fspath(path)
  labels: list[np.ndarray] = []
  add = functools.partial(_add, path, count, image_shape, labels)
  if jax.process_index() != 0:
    yield functools.partial(add, lambda images: None)
    return
  with contextlib.ExitStack() as stack:
    local = os.path.abspath(path)
    if "://" in path:
      folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ism_jax_samples_"))
      local = os.path.join(folder, "samples.npz")
    stored_shape = (*image_shape[:2], 3)
    folder, needed = os.path.dirname(local), count * math.prod(stored_shape)
    os.makedirs(folder, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < needed:
      raise OSError(
        f"{path} takes {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB: make room, or "
        "name another folder (in TMPDIR, for one through which files reach an object store)."
      )
    with files.whole_file(local) as temporary, zipfile.ZipFile(temporary, "w") as archive:
      with _member(archive, _IMAGES) as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *stored_shape)}
        np.lib.format.write_array_header_1_0(member, header)
        yield functools.partial(add, lambda images: member.write(_in_colour(images).data))
        if (added := sum(map(len, labels))) < count:
          raise ValueError(f"{path} got {added} images, and is to hold {count}.")
      with _member(archive, _LABELS) as member:
        np.lib.format.write_array(member, np.concatenate([np.empty(0, np.int64), *labels]))
    if "://" in path:
      epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
      epath.Path(local).copy(path, overwrite=True)


def _add(path, count, image_shape, batches, write, images, labels):
  """Checks images and labels, writes the images and appends the labels to `batches`."""
  images, labels = np.ascontiguousarray(images), np.asarray(labels)
  if images.dtype != np.uint8 or images.shape != (len(images), *image_shape):
    raise ValueError(
      f"{path} got {images.dtype} images of shape {images.shape}; needed are uint8 of "
      f"shape [B, {', '.join(map(str, image_shape))}]."
    )
  if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
    raise ValueError(
      f"{path} got {labels.dtype} labels of shape {labels.shape} for {len(images)} images; "
      "needed is one integer each."
    )
  if (added := sum(map(len, [*batches, images]))) > count:
    raise ValueError(f"{path} got {added} images, and is to hold {count}.")
  write(images)
  batches.append(labels.astype(np.int64))


def _in_colour(images):
  return np.ascontiguousarray(np.broadcast_to(images, (*images.shape[:3], 3)))


@contextlib.contextmanager
def folder_writer(path: str, count: int, names: Sequence[str] | None):
  """A context: add(images uint8 [B, H, W, 1 or 3], labels int [B]), which writes a PNG of each.

  They are called by their number and class, 000012_tabby.png, which torch-fidelity and clean-fid
  read. The folder is there, whole, once the context is left. Only the first process writes.

  Args:
    path: a folder that is empty or not there.
    count: images that it will hold.
    names: of the classes; None where they have numbers alone.
  """
  if jax.process_index() != 0:
    yield lambda images, labels: None
    return
  digits, numbers = max(6, len(str(count - 1))), itertools.count()
  with files.whole_folder(path) as folder, futures.ThreadPoolExecutor() as threads:

    def write(number, pixels, label):
      named = label < len(names) if names else False
      name = as_file_name(names[label]) if named else f"class{label}"
      image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
      image.save(folder / f"{number:0{digits}d}_{name}.png")

    yield lambda images, labels: list(
      threads.map(write, itertools.islice(numbers, len(images)), images, labels.tolist())
    )


def as_file_name(name: str) -> str:
  """The first of a class's names, at most 80 bytes, with "-" for what a file system may refuse."""
  plain = re.sub(r"[^\w.-]+", "-", name.partition(",")[0]).strip("-.")
  return plain.encode()[:80].decode(errors="ignore") or "class"


def _member(archive, name):
  """A member of a zip, open for writing, that has no date: equal samples make equal files."""
  return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)
