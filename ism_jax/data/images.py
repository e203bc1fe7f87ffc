"""Classified images as they are published, read at random, and cropped to one size.

A source is a list of images in a fixed order, by class and then by name. Nothing is unpacked: a
member of a zip or tar file, also of a tar file that lies inside another, is read where it is.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
import dataclasses
import errno
import functools
import hashlib
import io
import os
import pathlib
import re
import tarfile
import threading
from typing import Any, NamedTuple
import zipfile
import zlib

from absl import flags, logging
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL import features as pil_features
import tensorflow_datasets as tfds

from ism_jax import ranges
from ism_jax.data import published
from ism_jax.runtime import files

CROP = "ADM centre crop"
TFDS = "tfds:"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SUFFIXES += (".avif", ".jfif", ".jp2")
# PIL has some that run programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
_LEVELS_PER_LEVEL = 257  # 65535 / 255: 16-bit levels in one of 8 bits
_LARGEST = 2**30  # bytes of a file: of more no image has come that PIL's limit of pixels allows
_LONGEST = 32  # times the length that is kept
_LARGEST_SIDE = 8192  # of a crop
# What is wrong with one file, and not with the storage that it is on.
_OF_ONE_FILE = {errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT}
_OF_ONE_FILE |= {errno.ENOTDIR, errno.ENXIO}


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """Images of classes, in an order that depends on their names alone.

  Attributes:
    classes: their names; the label of a class is its place.
    size: number of images.
    listing: checksum of the classes' and the images' names. Sources with the same one hold the same
      images, as far as names tell.
    name: of image i.
    read: image i -> (content, label). The content is that of an image file or, where a dataset
      holds decoded pixels, uint8 [H, W, 1 or 3]. Any thread may call it. Raises OSError.
    fingerprint: of the content of image i, which it reads; see `fingerprint`.
    stat: image i -> (bytes, or -1 where that takes reading it; when its file changed, in seconds).
      Raises OSError.
  """

  classes: tuple[str, ...]
  size: int
  listing: str
  name: Callable[[int], str]
  read: Callable[[int], tuple[bytes | np.ndarray, int]]
  fingerprint: Callable[[int], tuple[int, int]]
  stat: Callable[[int], tuple[int, float]]


class _File(NamedTuple):
  """`size` bytes at `offset` of `path`, -1 for all to its end; or why they are no image.

  Of a zip file, `unzip` gives the bytes.
  """

  name: str
  path: str
  offset: int = 0
  size: int = -1
  reason: str = ""
  unzip: Callable[[], bytes] | None = None


def open_source(images: str, tfds_dir: str) -> Source:
  """Finds all images, and reads none.

  Args:
    images: a folder of class folders, whose images may lie in folders of their own; a folder of
      images, which are one class; a folder of tar files, one for each class; a zip or tar file of
      class folders or of images; a tar file of class tar files (ImageNet's
      ILSVRC2012_img_train.tar); or "tfds:NAME", a dataset of TFDS prepared as ArrayRecord, whose
      training split is taken. Classes are named by their folders or tar files. Files that are
      hidden or have no suffix of an image are left out, which is logged.
    tfds_dir: where TFDS datasets are; "" for TFDS's default.
  Raises:
    ValueError: there is no such source, it holds no images, or a class is empty.
  """
  if images.startswith(TFDS):
    return _from_tfds(images.removeprefix(TFDS), tfds_dir)
  if os.path.isdir(images):
    listings = _classes_of_folder(images)
  elif os.path.isfile(images):
    listings = _classes_of_archive(images)
  else:
    raise ValueError(
      f"{images}: there is no such file or folder. Needed is a folder of class folders or of "
      "images, a zip or tar file of them, a folder of class tar files, ILSVRC2012_img_train.tar, "
      "or tfds:NAME."
    )
  # In threads: on network storage nearly all of the time is waiting for one header after another.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    members = pool.map(lambda listing: listing(), listings.values())
    listed = dict(zip(listings, members, strict=True))
  if empty := sorted(name for name, members in listed.items() if not members):
    raise ValueError(
      f"{len(empty)} of the {len(listed)} classes of {images} have no image: {', '.join(empty)}. "
      f"Remove them, or add their images (files with one of the suffixes {' '.join(SUFFIXES)})."
    )
  classes = tuple(sorted(listed))
  flat = [
    (file, label) for label, name in enumerate(classes) for file in sorted(listed[name], key=_place)
  ]
  names = "\n".join((*classes, "", *(file.name for file, _ in flat)))

  def read(i):
    file, label = flat[i]
    if file.reason:
      raise OSError(errno.EINVAL, file.reason, file.path)
    if file.unzip is not None:
      return file.unzip(), label
    return read_file(file.path, file.offset, file.size), label

  def stat(i):
    file, _ = flat[i]
    status = os.stat(file.path)
    return status.st_size if file.size < 0 else file.size, status.st_ctime

  return Source(
    classes=classes,
    size=len(flat),
    listing=hashlib.sha256(as_bytes(names)).hexdigest(),
    name=lambda i: flat[i][0].name,
    read=read,
    fingerprint=lambda i: fingerprint(read(i)[0]),
    stat=stat,
  )


def _place(file: _File) -> tuple:
  return file.name, file.path, file.offset


def fingerprint(content: bytes | np.ndarray) -> tuple[int, int]:
  """Length in bytes and CRC-32, each below 2^32: the same names do not make the same images."""
  content = content if isinstance(content, bytes) else np.ascontiguousarray(content).tobytes()
  return len(content) % 2**32, zlib.crc32(content)


def noting(source: Source) -> tuple[Source, np.ndarray]:
  """The source, and uint32 [size, 2]: the fingerprints of the images that it has read so far.

  Those of images that are unread, or cannot be, are 0.
  """
  contents = np.zeros((source.size, 2), np.uint32)

  def read(i):
    content, label = source.read(i)
    contents[i] = fingerprint(content)
    return content, label

  return dataclasses.replace(source, read=read), contents


def fingerprint_of(source: Source, i: int) -> tuple[int, int]:
  """The fingerprint of image i, by reading it; (0, 0) if it cannot be."""
  try:
    return source.fingerprint(i)
  except OSError as error:
    if _of_one_file(error):
      return 0, 0
    raise


def as_bytes(names: str) -> bytes:
  """Names in UTF-8; those of files that are not keep their bytes."""
  return names.encode(errors="surrogateescape")


def printable(name: str) -> str:
  """A name with escapes for the bytes that are no UTF-8."""
  return as_bytes(name).decode(errors="backslashreplace")


def read_file(path, offset: int = 0, size: int = -1) -> bytes:
  """The bytes of an image: those of a regular file, or `size` of them at an offset.

  Raises:
    OSError: there is no such file, or it is of another kind, or too large for an image.
  """
  with files.open_regular(path) as f:
    size = os.fstat(f.fileno()).st_size - offset if size < 0 else size
    if size > _LARGEST:
      raise OSError(errno.EINVAL, f"{size} bytes are too many for an image", os.fspath(path))
    f.seek(offset)
    return f.read(size)


def only_images(names, where):
  """The names that have the suffix of an image; logs how many others there are."""
  visible = [name for name in names if not os.path.basename(name).startswith(".")]
  images = [name for name in visible if name.lower().endswith(SUFFIXES)]
  if others := sorted(set(visible) - set(images)):
    logging.warning(
      f"{where}: {len(others)} files that are no images by their suffix are left out: "
      f"{_first(others)}."
    )
  return images


def _first(names: list[str]) -> str:
  """The first few of sorted names, in words."""
  return ", ".join(names[:5]) + (", ..." if names[5:] else "")


def _classes_of_folder(folder) -> dict[str, Callable[[], list[_File]]]:
  """Of each class, what lists its files."""
  entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
  kinds = {entry.name: _kind(entry) for entry in entries}
  loose = [name for name, kind in kinds.items() if kind != "folder" and not name.endswith(".tar")]
  odd = [name for name in loose if kinds[name] == "other" and not name.lower().endswith(SUFFIXES)]
  if odd:
    raise ValueError(
      f"{folder} holds {len(odd)} entries that are neither folders nor files, such as {min(odd)}: "
      "without the class that a broken link stood for, the others would have other labels. Mend or "
      "remove it."
    )
  classes = [name for name, kind in kinds.items() if kind == "folder"]
  tars = [name for name, kind in kinds.items() if kind == "file" and name.endswith(".tar")]
  if classes and tars:
    raise ValueError(
      f"{folder} holds both {len(classes)} folders, such as {min(classes)}, and {len(tars)} tar "
      f"files, such as {min(tars)}: keep those that are the classes and move the others away."
    )
  loose = only_images(loose, folder)
  if loose and (classes or tars):
    logging.warning(
      f"{folder}: {len(loose)} images that lie beside the classes are left out: "
      f"{_first(sorted(loose))}."
    )
  if classes:
    _check_no_splits(folder, classes)
    return {name: functools.partial(_files_of_class_folder, folder, name) for name in classes}
  if not tars:
    listed = [_File(name, os.path.join(folder, name)) for name in loose]
    return {_one_class(folder, listed): lambda: listed}
  path = lambda tar: os.path.join(folder, tar)
  return {tar[:-4]: functools.partial(_members, path(tar), tar[:-4]) for tar in tars}


def _check_no_splits(where, classes) -> None:
  """Raises ValueError where what would be taken for classes are the splits of a dataset."""
  if len(classes) > 1 and {name.lower() for name in classes} <= _SPLITS:
    raise ValueError(
      f"{where} holds {', '.join(sorted(classes))}, which are splits and no classes: name the "
      f"folder of one of them, such as {os.path.join(where, max(classes))}."
    )


def _one_class(where, files: list[_File]) -> str:
  """The class of images that have no class folders; a ValueError if there are none."""
  if not files:
    raise ValueError(
      f"{where} holds no image that is read here (files with one of the suffixes "
      f"{' '.join(SUFFIXES)}), nor class folders or class tar files of them: convert other formats "
      "to PNG first, or name another folder."
    )
  return title(where)


def title(where) -> str:
  """The name of a folder, or of an archive without its suffix."""
  name = os.path.basename(os.path.abspath(where))
  return (name if os.path.isdir(where) else os.path.splitext(name)[0]) or "images"


def _kind(entry: os.DirEntry) -> str:
  """Of what an entry is or leads to: "folder", "file" or "other"."""
  # Of links that lead nowhere some raise, if the entry itself is asked.
  linked = entry.is_symlink()
  if os.path.isdir(entry.path) if linked else entry.is_dir():
    return "folder"
  return "file" if (os.path.isfile(entry.path) if linked else entry.is_file()) else "other"


def _files_of_class_folder(folder, name) -> list[_File]:
  """The images in a class folder and the folders in it."""
  top, names, linked = os.path.join(folder, name), [], []

  def fail(error):
    raise error

  for path, folders, entries in os.walk(top, onerror=fail):
    linked += [f for f in folders if os.path.islink(os.path.join(path, f))]  # not entered: circles
    folders[:] = sorted(f for f in folders if not f.startswith("."))
    below = "" if path == top else os.path.relpath(path, top) + "/"
    names += [below + entry for entry in entries]  # with broken links
  if linked:
    logging.warning(f"Links to folders inside {top} are left out: {_first(sorted(linked))}.")
  return [_File(f"{name}/{file}", os.path.join(top, file)) for file in only_images(names, top)]


def _classes_of_archive(path) -> dict[str, Callable[[], list[_File]]]:
  """Of each class in a zip or tar file, what lists its files."""
  if zipfile.is_zipfile(path):
    return _classes_by_folder(path, _members_of_zip(path))
  members = _members_of_tar(path)
  tars = [m for m in members if m.isfile() and m.name.endswith(".tar")]
  if not tars:
    return _classes_by_folder(path, _members(path, "", members=members))
  if others := [m.name for m in members if m not in tars]:
    raise ValueError(
      f"{path} holds both {len(tars)} tar files, such as {tars[0].name}, and {len(others)} other "
      f"files, such as {others[0]}: keep those that are the classes."
    )
  names = [os.path.basename(member.name)[:-4] for member in tars]
  listing = lambda name, tar: functools.partial(_members, path, name, tar.offset_data, tar.size)
  return dict(zip(names, map(listing, names, tars), strict=True))


def _classes_by_folder(path, listed: list[_File]) -> dict[str, Callable[[], list[_File]]]:
  """Images of an archive by their first folder that they do not all lie in."""
  is_hidden = lambda part: part.startswith((".", "__MACOSX"))
  listed = [file for file in listed if not any(map(is_hidden, file.name.split("/")))]
  names = [file.name.split("/") for file in listed]
  while names and all(len(n) > 1 and n[0] == names[0][0] for n in names):
    names = [n[1:] for n in names]
  classes = collections.defaultdict(list)
  for file, name in zip(listed, names, strict=True):
    classes[name[0] if name[1:] else ""].append(file._replace(name="/".join(name)))
  loose = classes.pop("", [])
  if not classes:
    return {_one_class(path, loose): lambda: loose}
  if loose:
    first = _first(sorted(file.name for file in loose))
    logging.warning(
      f"{path}: {len(loose)} images that lie beside the classes are left out: {first}."
    )
  _check_no_splits(path, classes)
  return {name: functools.partial(list, files) for name, files in classes.items()}


def _members_of_zip(path) -> list[_File]:
  try:
    archive = zipfile.ZipFile(path)
  except (zipfile.BadZipFile, OSError, ValueError) as error:
    raise ValueError(f"{path} is a damaged zip file, {error}. Fetch it again.") from error
  members = {m.filename: m for m in archive.infolist() if not m.is_dir()}
  if locked := [name for name, member in members.items() if member.flag_bits & 1]:
    raise ValueError(f"{path} is encrypted, {locked[0]} for one: unpack it, and name the folder.")
  lock = threading.Lock()  # ZipFile counts who reads it without one

  def unzip(member):
    if member.file_size > _LARGEST:
      raise OSError(errno.EINVAL, f"{member.file_size} bytes are too many for an image", path)
    try:
      with lock:
        return archive.read(member)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
      raise OSError(errno.EINVAL, str(error), path) from error

  names = only_images(members, path)
  return [
    _File(n, path, size=members[n].file_size, unzip=functools.partial(unzip, members[n]))
    for n in names
  ]


def _members(path, class_name, start=0, size=None, members=None) -> list[_File]:
  """The images in the tar file of a class, which begins at byte `start` of `path`."""
  members = _members_of_tar(path, start, size) if members is None else members
  members = {m.name.removeprefix("./"): m for m in members}
  listed, above = [], f"{class_name}/" if class_name else ""
  for name in only_images(members, f"{class_name}.tar" if class_name else path):
    member, reason = members[name], ""
    if member.islnk():  # a file that is in the archive under another name
      member = members.get(member.linkname.removeprefix("./"), member)
    if not member.isfile() or member.issparse():
      reason = "a link, a device or a file with holes in the tar file"
    place = member.offset_data, member.size
    listed.append(_File(above + name, path, *place, reason))
  return listed


def _members_of_tar(path, start=0, size=None) -> list[tarfile.TarInfo]:
  size = os.path.getsize(path) if size is None else size
  damaged = (
    f"{path} is truncated, damaged or no (uncompressed) tar file: the archive of {size} bytes that "
    f"begins at byte {start} "
  )
  try:
    with open(path, "rb") as f:
      f.seek(start)
      # Offsets of members are those in the file object, wherever the archive begins in it.
      with tarfile.TarFile(fileobj=f) as tar:
        members = tar.getmembers()
        # Anything but a header ends the list without an error; a whole archive ends with zeros.
        f.seek(tar.offset)
        end = f.read(tarfile.BLOCKSIZE)
  except (tarfile.TarError, ValueError, OverflowError) as error:
    raise ValueError(f"{damaged}cannot be read, {error}. Fetch it again.") from error
  if tar.offset >= start + size or end != bytes(tarfile.BLOCKSIZE):
    raise ValueError(f"{damaged}has no end after {len(members)} members. Fetch it again.")
  return [member for member in members if not member.isdir()]


def _from_tfds(name, tfds_dir) -> Source:
  builder = published.tfds_builder(name, tfds_dir)
  image, label = published.image_and_label(name, builder.info.features)
  # As it lies in the file, so that all sources are decoded alike.
  as_file = isinstance(image, tfds.features.Image)
  decoders = {"image": tfds.decode.SkipDecoding()} if as_file else None
  records = published.open_split(builder, "train", decoders)

  def read(i):
    record = records[i]
    return record["image"], int(record["label"])

  changed = max(path.stat().st_ctime for path in pathlib.Path(builder.data_path).iterdir())
  classes = tuple(label.names)
  names = "\n".join((builder.info.full_name, str(len(records)), *classes))
  return Source(
    classes=classes,
    size=len(records),
    listing=hashlib.sha256(names.encode()).hexdigest(),
    name=lambda i: f"{builder.info.full_name}/train/{i}",
    read=read,
    fingerprint=lambda i: fingerprint(read(i)[0]),
    stat=lambda i: (-1, changed),
  )


def decode(
  content: bytes | np.ndarray, *, orient: bool = False, background: str = ""
) -> Image.Image:
  """An image as RGB, by default as ADM and DiT have it, but for 16 bits.

  CMYK is converted as PIL does, and of an animation the first frame is taken. PIL would clip grey
  levels of 16 bits to 255: here they are scaled.

  Args:
    orient: whether an EXIF orientation is applied.
    background: the colour that shows through what is transparent; "" drops alpha without blending.

  Raises:
    Exception: of any type, as PIL does for files that are damaged, of no known format, or of more
      than 179 million pixels.
  """
  if isinstance(content, np.ndarray):
    content = content[..., 0] if content.shape[-1] == 1 else content
    return Image.fromarray(content).convert("RGB")
  with open_image(io.BytesIO(content)) as image:
    image.load()
    image = ImageOps.exif_transpose(image) if orient else image
    if image.mode == "I" or image.mode.startswith("I;16"):
      levels = np.asarray(image).astype(np.int64)
      if levels.min() < 0 or levels.max() > 65535:
        raise ValueError("grey levels of more than 16 bits")
      grey = (levels + _LEVELS_PER_LEVEL // 2) // _LEVELS_PER_LEVEL
      return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
      raise ValueError("grey levels that are floating point numbers, of no known range")
    if background and image.has_transparency_data:
      behind = Image.new("RGBA", image.size, background)
      image = Image.alpha_composite(behind, image.convert("RGBA"))
    return image.convert("RGB")


def open_image(file) -> Image.Image:
  """An image file of a known format, of which PIL has read the header."""
  try:
    return Image.open(file, formats=_known_formats())
  except UnidentifiedImageError:
    file.seek(0)
    if file.read(12)[4:] == b"ftypavif" and not pil_features.check("avif"):
      raise ValueError("this Pillow reads no AVIF: pip install 'pillow>=11.3'") from None
    raise


@functools.cache
def _known_formats() -> list[str]:
  Image.init()
  return [name for name in _FORMATS if name in Image.OPEN]  # older Pillows have no AVIF


class SizeParser(flags.ArgumentParser):
  """Of a flag that is the size of crops, see `centre_crop`: "256", or "192x256"."""

  def parse(self, argument: str) -> int | tuple[int, int]:
    numbers = [int(n) if n.isdecimal() and len(n) < 9 else 0 for n in argument.split("x")]
    if len(numbers) > 2 or not all(1 <= n <= _LARGEST_SIDE for n in numbers):
      raise ValueError(
        f"give pixels in [1, {_LARGEST_SIDE}], such as 256, or HEIGHTxWIDTH, such as 192x256."
      )
    return numbers[0] if len(set(numbers)) == 1 else tuple(numbers)


def centre_crop(image: Image.Image, size: int | tuple[int, int]) -> np.ndarray:
  """The centre, uint8 [H, W, 3], by the recipe of ADM (Dhariwal and Nichol 2021), whose is square.

  Halved by box filters while both sides have at least twice the pixels, then resized bicubically,
  so that it just covers H x W; smaller images are enlarged. The recipe decides what FIDs are
  compared with. Of images that are 32 times too long only the middle is resized: ADM would make 5
  million columns of a line of 20,000 pixels, to keep 256.

  Args:
    size: (H, W), or both in one.
  """
  height, width = ranges.sides(size)
  longest = (
    _LONGEST * -(-image.height * width // height),
    _LONGEST * -(-image.width * height // width),
  )
  # As much on both sides, so that the centre stays where it is.
  left, top = (max(0, n - most) // 2 for n, most in zip(image.size, longest, strict=True))
  if left or top:
    image = image.crop((left, top, image.width - left, image.height - top))
  while image.width >= 2 * width and image.height >= 2 * height:
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
  scale = max(width / image.width, height / image.height)
  shape = round(image.width * scale), round(image.height * scale)
  image = image.resize(shape, Image.Resampling.BICUBIC)
  left, top = (image.width - width) // 2, (image.height - height) // 2
  return np.asarray(image.crop((left, top, left + width, top + height)))


class Crop(NamedTuple):
  """A decoded image, or why there is none."""

  index: int
  pixels: np.ndarray | None  # uint8 [H, W, 3]
  label: int | None
  reason: str | None


def read_crop(source: Source, size, index: int) -> Crop:
  """Reads and crops an image, or says why it cannot be; raises as `attempt` does."""
  crop = lambda content, label: (centre_crop(decode(content), size), label)
  read = functools.partial(source.read, index)
  result, reason = attempt(source.name(index), read, lambda image: crop(*image))
  return Crop(index, *(result or (None, None)), reason)


def attempt(name: str, read: Callable, convert: Callable) -> tuple[Any, str | None]:
  """(convert(read()), None) of an image; where the image is at fault (None, the reason).

  Raises:
    OSError: the storage fails, or memory. That is no property of the image: a run that went on
      would leave out everything that follows.
  """
  content = None
  try:
    content = read()
    return convert(content), None
  except MemoryError as error:
    raise OSError(f"there is no memory to decode {name}: pass a lower --num_threads.") from error
  except Exception as error:  # PIL raises all kinds for damaged files
    if content is None and not _of_one_file(error):
      raise OSError(
        f"{name} cannot be read from its storage: {error}. Make that available again, or remove "
        "the image, and run the same command again."
      ) from error
    # Without addresses in memory, so that another run gives the same reason.
    reason = re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", f"{type(error).__name__}: {error}")
    logging.warning("Image %s cannot be read: %s", name, reason)
    return None, reason


def readable_batches(
  images: Iterable[Crop], batch_size: int, name: Callable[[int], str], unreadable: dict[str, str]
) -> Iterator[np.ndarray]:
  """uint8 [B, H, W, C] of the images that could be read; why the others, by name, could not."""
  ready = []
  for image in images:
    if image.reason is not None:
      unreadable[name(image.index)] = image.reason
      continue
    ready.append(image.pixels)
    if len(ready) == batch_size:
      yield np.stack(ready)
      ready = []
  if ready:
    yield np.stack(ready)


def _of_one_file(error) -> bool:
  """Whether a file alone could not be read, and the folder that it is in is there."""
  if isinstance(error, PermissionError):
    return True
  if getattr(error, "errno", None) not in _OF_ONE_FILE or error.filename is None:
    return False
  return os.path.isdir(os.path.dirname(error.filename) or ".")


def in_order(function, items: Iterable, *, ahead: int, num_threads: int) -> Iterator:
  """function(item) of all items in their order, with `ahead` more under way in threads."""
  # Threads: PIL decodes, shrinks and resizes without Python's lock.
  pool, futures = concurrent.futures.ThreadPoolExecutor(num_threads), collections.deque()
  try:
    for item in items:
      futures.append(pool.submit(function, item))
      if len(futures) > ahead:
        yield futures.popleft().result()
    while futures:
      yield futures.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)
