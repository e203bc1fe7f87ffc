"""From image files to latents: sources, decoding, ADM's crop, and runs stopped and continued."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zlib

from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
import jax
import numpy as np
from PIL import Image, ImageCms
import pytest
from sklearn.datasets import load_sample_images
import tensorflow_datasets as tfds

from ism_jax import data
from ism_jax.data import encode, images, latents
from ism_jax.pretrained import vae as vae_lib

PHOTOS = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
SIZE = 16


def file_of(image, kind="PNG", **options):
  buffer = io.BytesIO()
  Image.fromarray(np.asarray(image)).save(buffer, kind, **options)
  return buffer.getvalue()


def crops_of_photos(per_class, seed=0):
  """{class: {file name: bytes}}: crops of all shapes."""
  rng, made = np.random.default_rng(seed), {}
  for name, photo in PHOTOS.items():
    made[name] = {}
    for i in range(per_class):
      height, width = rng.integers(20, 90, 2)
      y, x = rng.integers(0, 427 - height), rng.integers(0, 640 - width)
      made[name][f"{name}_{i}.JPEG"] = file_of(photo[y : y + height, x : x + width], "JPEG")
  return made


def write_folder(root, classes):
  for name, files in classes.items():
    (root / name).mkdir(parents=True)
    for file, content in files.items():
      (root / name / file).write_bytes(content)
  return str(root)


def tar_bytes(members):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w") as tar:
    for name, content in members.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return buffer.getvalue()


def write_folder_of_tars(root, classes):
  root.mkdir()
  for name, files in classes.items():
    (root / f"{name}.tar").write_bytes(tar_bytes(files))
  return str(root)


def write_tar_of_tars(root, classes):
  root.mkdir()
  path = root / "ILSVRC2012_img_train.tar"
  path.write_bytes(tar_bytes({f"{name}.tar": tar_bytes(f) for name, f in classes.items()}))
  return str(path)


WRITERS = [write_folder, write_folder_of_tars, write_tar_of_tars]


def contents(source):
  return [(source.name(i), *source.read(i)) for i in range(source.size)]


@pytest.mark.parametrize("write", WRITERS)
def test_every_kind_of_source_has_the_same_images_in_the_same_order(tmp_path, write):
  # Not in the order of their names.
  classes = {
    "n02": {"b.JPEG": b"1", "a.png": b"22" * 400, "B.jpg": b"333"},
    "n10": {"x.webp": b"4" * 512},
    "n01": {"c.jpg": b"", ".hidden.jpg": b"6", "notes.txt": b"7"},
  }
  source = images.open_source(write(tmp_path / "source", classes), "")
  assert source.classes == ("n01", "n02", "n10")
  assert contents(source) == [
    ("n01/c.jpg", b"", 0),
    ("n02/B.jpg", b"333", 1),
    ("n02/a.png", b"22" * 400, 1),
    ("n02/b.JPEG", b"1", 1),
    ("n10/x.webp", b"4" * 512, 2),
  ]
  plain = images.open_source(write_folder(tmp_path / "again", classes), "")
  assert plain.listing == source.listing
  (tmp_path / "again" / "n10" / "y.jpg").touch()
  assert images.open_source(str(tmp_path / "again"), "").listing != source.listing


def test_threads_read_members_of_one_tar_file_at_the_same_time(tmp_path):
  classes = crops_of_photos(20)
  source = images.open_source(write_tar_of_tars(tmp_path / "tar", classes), "")
  expected = [c for name in sorted(classes) for _, c in sorted(classes[name].items())]
  wrong = []

  def read(seed):
    for i in np.random.default_rng(seed).integers(source.size, size=200):
      if source.read(i)[0] != expected[i]:
        wrong.append(i)

  threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


@pytest.fixture(scope="module")
def imagenet2012(tmp_path_factory):
  """A folder with a little `imagenet2012` as TFDS writes it, and its files and labels."""
  files = [content for f in crops_of_photos(3).values() for content in f.values()]
  labels = [999, 0, 7, 7, 500, 1]
  directory = tmp_path_factory.mktemp("tfds")
  version = tfds.builder_cls("imagenet2012").VERSION

  with tfds.core.registered.skip_registration():  # TFDS's own code is to read it

    class Imagenet2012(tfds.core.GeneratorBasedBuilder):
      VERSION = version
      code_path = epath.Path(__file__)

      def _info(self):
        features = {
          "image": tfds.features.Image(encoding_format="jpeg"),
          "label": tfds.features.ClassLabel(num_classes=1000),
          "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

      def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

      def _generate_examples(self):
        for i, (file, label) in enumerate(zip(files, labels, strict=True)):
          yield i, {"image": io.BytesIO(file), "label": label, "file_name": f"{i}.JPEG"}

  Imagenet2012(data_dir=directory).download_and_prepare(file_format="array_record")
  return str(directory), set(zip(files, labels, strict=True))


def test_imagenet_as_tfds_prepares_it_is_read_as_its_jpeg_files(imagenet2012):
  directory, expected = imagenet2012
  source = images.open_source("tfds:imagenet2012", directory)
  assert source.classes == tuple(tfds.builder("imagenet2012").info.features["label"].names)
  assert source.size == 6
  assert {source.read(i) for i in range(6)} == expected
  assert len({source.name(i) for i in range(6)}) == 6


def test_decoded_pixels_of_tfds_are_read_as_they_are(tmp_path):
  cfg = data.DataConfig("digits", str(tmp_path), 8, 1, 10, False, 0, 0, "")
  expected, labels = data.all_images(data.load_source(cfg))
  source = images.open_source("tfds:digits", str(tmp_path))
  assert source.size == len(expected) and len(source.classes) == 10
  for i in (0, 100, 1796):
    content, label = source.read(i)
    grey = np.asarray(images.decode(content))
    np.testing.assert_array_equal(grey, np.broadcast_to(expected[i], (8, 8, 3)))
    assert label == labels[i]


def test_a_source_that_is_not_there_or_not_prepared_says_what_is_needed(tmp_path):
  with pytest.raises(ValueError, match=r"nosuch.*no such file.*ILSVRC2012_img_train\.tar"):
    images.open_source(str(tmp_path / "nosuch"), "")
  with pytest.raises(ValueError, match=r"'imagenet2012' is not at .*TensorFlow"):
    images.open_source("tfds:imagenet2012", str(tmp_path))
  with pytest.raises(ValueError, match="'celeb_a' is not one of classified images"):
    images.open_source("tfds:celeb_a", str(tmp_path))


@pytest.mark.parametrize("write", WRITERS)
def test_classes_without_images_are_all_named_before_anything_is_read(tmp_path, write):
  classes = {"a": {"x.jpg": b"1"}, "c": {}, "b": {"readme.txt": b"2"}}
  with pytest.raises(ValueError, match=r"2 of the 3 classes of .* have no image: b, c\."):
    images.open_source(write(tmp_path / "source", classes), "")


def test_a_folder_that_holds_no_classes_is_refused(tmp_path):
  (tmp_path / "image.heic").touch()
  with pytest.raises(ValueError, match=r"no image that is read here.*convert other formats to PNG"):
    images.open_source(str(tmp_path), "")
  (tmp_path / "a").mkdir()
  (tmp_path / "b.tar").touch()
  with pytest.raises(ValueError, match=r"both 1 folders, such as a, and 1 tar files, such as b"):
    images.open_source(str(tmp_path), "")


def test_a_file_that_is_no_tar_of_tars_is_refused(tmp_path):
  (tmp_path / "text.tar").write_bytes(b"some text" * 100)
  with pytest.raises(ValueError, match=r"text\.tar is truncated, damaged or no .*tar file"):
    images.open_source(str(tmp_path / "text.tar"), "")
  (tmp_path / "both.tar").write_bytes(tar_bytes({"a.tar": tar_bytes({}), "a/x.jpg": b"1"}))
  with pytest.raises(ValueError, match=r"holds both 1 tar files.*1 other files, such as a/x\.jpg"):
    images.open_source(str(tmp_path / "both.tar"), "")


@pytest.mark.parametrize("write", [write_folder_of_tars, write_tar_of_tars])
@pytest.mark.parametrize("keep", ["half", "whole members"])
def test_a_truncated_tar_file_is_refused(tmp_path, write, keep):
  # Cut between two members, nothing is wrong but that the end is missing.
  files = {f"{i}.jpg": bytes([i]) * 512 for i in range(10)}
  path = pathlib.Path(write(tmp_path / "source", {"a": files}))
  path = path / "a.tar" if path.is_dir() else path
  start = 0 if path.name == "a.tar" else 512
  os.truncate(path, start + 1024 * 5 + (700 if keep == "half" else 0))
  with pytest.raises(ValueError, match="is truncated"):
    images.open_source(os.path.dirname(path) if path.name == "a.tar" else str(path), "")


def test_a_damaged_class_inside_a_tar_file_is_refused(tmp_path):
  good = tar_bytes({f"{i}.jpg": bytes([i]) * 512 for i in range(10)})
  damaged = good[:4096] + b"\xff" * 512 + good[4608:]  # a header
  path = tmp_path / "train.tar"
  path.write_bytes(tar_bytes({"a.tar": good, "b.tar": damaged}))
  with pytest.raises(ValueError, match=r"train\.tar is truncated, damaged.*no end after 4 members"):
    images.open_source(str(path), "")


def decoded(content):
  return np.asarray(images.decode(content)).astype(int)


def test_grey_levels_of_16_bits_are_scaled_to_8():
  levels = np.arange(0, 65536, 61, dtype=np.uint16)[:1024].reshape(32, 32)
  expected = np.repeat(np.round(levels / 257.0).astype(int)[..., None], 3, axis=2)
  for content in (
    file_of(levels, "PNG"),
    file_of(levels, "TIFF"),
    file_of(levels.astype(">u2"), "TIFF"),
    b"P5\n32 32\n65535\n" + levels.astype(">u2").tobytes(),
  ):
    np.testing.assert_array_equal(decoded(content), expected)


def test_grey_levels_of_unknown_range_are_refused():
  for array in (np.full((4, 4), 70_000, np.int32), np.full((4, 4), 0.5, np.float32)):
    with pytest.raises(ValueError, match="grey levels"):
      images.decode(file_of(array, "TIFF"))


def test_grey_palette_and_alpha_become_their_colours():
  rng = np.random.default_rng(0)
  grey = rng.integers(0, 256, (16, 16), np.uint8)
  np.testing.assert_array_equal(decoded(file_of(grey)), np.repeat(grey[..., None], 3, 2))
  two_levels = grey > 128
  np.testing.assert_array_equal(
    decoded(file_of(two_levels)), np.repeat(255 * two_levels[..., None], 3, 2)
  )

  palette = rng.integers(0, 256, (256, 3), np.uint8)
  image = Image.fromarray(grey).convert("P")
  image.putdata(grey.ravel().tolist())
  image.putpalette(palette.tobytes())
  buffer = io.BytesIO()
  image.save(buffer, "PNG", transparency=3)
  np.testing.assert_array_equal(decoded(buffer.getvalue()), palette[grey])

  # As ADM: what is transparent keeps the colour it has in the file.
  rgba = rng.integers(0, 256, (16, 16, 4), np.uint8)
  np.testing.assert_array_equal(decoded(file_of(rgba)), rgba[..., :3])
  grey_alpha = np.dstack([grey, rgba[..., 3]])
  np.testing.assert_array_equal(decoded(file_of(grey_alpha)), np.repeat(grey[..., None], 3, 2))


def test_inks_become_colours():
  cmyk = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
  left = 255 - cmyk.astype(float)
  expected = left[..., :3] * left[..., 3:] / 255
  for kind, options, tolerance in (("TIFF", {}, 1), ("JPEG", {"quality": 100}, 6)):
    buffer = io.BytesIO()
    Image.fromarray(cmyk, "CMYK").save(buffer, kind, **options)
    assert np.abs(decoded(buffer.getvalue()) - expected).max() <= tolerance, kind


def test_orientation_and_colour_profile_of_a_camera_are_not_applied():
  photo = PHOTOS["china"][:40, :60]
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by a quarter
  profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
  content = file_of(photo, "PNG", exif=exif, icc_profile=profile)
  np.testing.assert_array_equal(decoded(content), photo)


def resized(array, size, kind):
  """Each axis of a [H, W, 3] resampled to `size` (W, H) by a filter as wide as the reduction."""

  def kernel(x):
    if kind == "box":
      return ((x > -0.5 + 1e-9) & (x <= 0.5 + 1e-9)).astype(float)  # 213 -> 106 has a tie
    x = np.abs(x)
    inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0))

  def weights(old, new):
    step = max(old / new, 1)
    centre = (np.arange(new) + 0.5) * old / new
    w = kernel((np.arange(old) + 0.5 - centre[:, None]) / step)
    return w / w.sum(axis=1, keepdims=True)

  rows, columns = weights(array.shape[0], size[1]), weights(array.shape[1], size[0])
  # Levels are whole numbers after each pass: means of two, always rounded up, add up over halvings.
  levels = lambda x: np.clip(np.floor(x + 0.5), 0, 255)
  by_columns = levels(np.einsum("jkc,lk->jlc", array, columns, optimize=True))
  return levels(np.tensordot(rows, by_columns, 1))


def reference_crop(photo, size):
  array = photo.astype(float)
  ratios = lambda: np.divide(array.shape[:2], size)
  while min(ratios()) >= 2:
    array = resized(array, (array.shape[1] // 2, array.shape[0] // 2), "box")
  height, width = (round(n / min(ratios())) for n in array.shape[:2])
  array = resized(array, (width, height), "bicubic")
  top, left = (height - size[0]) // 2, (width - size[1]) // 2
  return array[top : top + size[0], left : left + size[1]]


@pytest.mark.parametrize("photo", PHOTOS)
@pytest.mark.parametrize("shape", [(427, 640), (640, 427), (100, 30), (64, 64), (31, 90)])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (256, 256), (48, 64), (96, 24)])
def test_the_crop_is_adms_against_a_reference_in_numpy(photo, shape, size):
  whole = PHOTOS[photo].swapaxes(0, 1) if shape == (640, 427) else PHOTOS[photo]
  pixels = np.ascontiguousarray(whole[: shape[0], : shape[1]])
  crop = images.centre_crop(Image.fromarray(pixels), size)
  assert crop.dtype == np.uint8 and crop.shape == (*size, 3)
  assert np.abs(crop - reference_crop(pixels, size)).max() <= 1


def adms_recipe(image, size):
  """As ADM's code has it, whatever it takes."""
  while min(image.size) >= 2 * size:
    image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
  scale = size / min(image.size)
  image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
  y, x = ((side - size) // 2 for side in (image.height, image.width))
  return np.asarray(image)[y : y + size, x : x + size]


@pytest.mark.parametrize("shape", [(640, 20), (37, 500), (1, 20_000), (20_001, 2), (5, 3_001)])
def test_the_crop_of_a_long_image_is_adms_and_takes_no_memory(shape, monkeypatch):
  pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  image, resize, areas = Image.fromarray(pixels), Image.Image.resize, []
  expected = adms_recipe(image, 16)

  def watched(self, size, *args):
    areas.append(size[0] * size[1])
    return resize(self, size, *args)

  monkeypatch.setattr(Image.Image, "resize", watched)
  crop = images.centre_crop(image, 16)
  if max(shape) <= 32 * min(shape) or 16 % min(shape) == 0:
    np.testing.assert_array_equal(crop, expected)
  else:  # places are rounded otherwise
    assert np.abs(crop.astype(int) - expected).max() <= 12
  assert max(areas) <= max(33 * 16**2, pixels.size // 3)


@pytest.fixture(scope="module")
def vae():
  return vae_lib.load("random-small")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """A folder of 22 images, of which one is truncated and one is text."""
  classes = crops_of_photos(10)
  classes["china"]["broken.jpg"] = classes["china"]["china_0.JPEG"][:-300]
  classes["flower"]["text.png"] = b"no image"
  return write_folder(tmp_path_factory.mktemp("photos") / "photos", classes)


def run(source, vae, out, processes=1, **changes):
  """Encodes as one process, or as several one after the other, and writes the manifest."""
  values = dict(size=SIZE, batch_size=2, images_per_shard=5, num_threads=2)
  values.update(devices=jax.devices()[:2], **changes)
  for p in range(processes):
    settings = encode.encode(
      source, vae, str(out), process_index=p, process_count=processes, **values
    )
  encode.write_manifest(source, str(out), settings)
  return settings


def files(directory):
  return {path.name: path.read_bytes() for path in pathlib.Path(directory).iterdir()}


@pytest.fixture(scope="module")
def encoded(photos, vae, tmp_path_factory):
  """The folder of a run that nothing disturbed, and its settings."""
  out = tmp_path_factory.mktemp("encoded")
  return out, run(images.open_source(photos, ""), vae, out)


def test_records_are_the_vaes_moments_of_the_crop_and_of_its_mirror_image(photos, vae, encoded):
  out, settings = encoded
  source = images.open_source(photos, "")
  kind = latents.record_type(settings.moments_shape)
  assert settings.shards == 5 and settings.moments_shape == (2, 2, 8)
  records = []
  for shard in range(5):
    *in_shard, trailer = ArrayRecordReader(settings.path(str(out), shard)).read_all()
    records += in_shard
    assert json.loads(trailer)["shard"] == shard
  readable = [i for i in range(22) if source.name(i) not in ("china/broken.jpg", "flower/text.png")]
  assert len(records) == 2 * len(readable)
  pixels = np.stack([images.centre_crop(images.decode(source.read(i)[0]), SIZE) for i in readable])
  views = np.stack([pixels, pixels[:, :, ::-1]], axis=1).reshape(-1, SIZE, SIZE, 3)
  expected = jax.jit(vae_lib.encode, static_argnums=0)(
    vae.cfg, vae.params, np.float32(views / 127.5 - 1)
  )
  records = np.frombuffer(b"".join(records), kind)
  np.testing.assert_allclose(records["moments"], expected, rtol=2e-3, atol=2e-3)
  assert np.std(np.diff(expected.reshape(-1, 2, 32), axis=1)) > 0.02, "views differ"
  labels = np.repeat([source.read(i)[1] for i in readable], 2)
  np.testing.assert_array_equal(records["label"], labels)


def test_rectangles_are_encoded_as_they_are_cropped_and_read_back(photos, vae, encoded, tmp_path):
  source = images.open_source(photos, "")
  settings = run(source, vae, tmp_path, size=(16, 24))
  run(source, vae, tmp_path, size=(16, 24))  # whole already
  manifest = json.loads((tmp_path / "manifest.json").read_text())
  assert manifest["size"] == [16, 24] and manifest["moments"] == [2, 3, 8]
  cfg = data.DataConfig("latents", str(tmp_path), (2, 3), 4, 2, True, 0, 0, "random-small")
  read, _ = data.load_source(cfg).read([0], np.array([True]))
  first = images.decode(source.read(1)[0])  # before it lies the broken one
  mirrored = images.centre_crop(first, (16, 24))[None, :, ::-1]
  expected = vae_lib.encode(vae.cfg, vae.params, np.float32(mirrored / 127.5 - 1))
  np.testing.assert_allclose(read["moments"], expected, rtol=2e-3, atol=2e-3)
  assert settings.moments_shape == expected.shape[1:]
  with pytest.raises(ValueError, match=r"size=16, not \[16, 24\]"):
    run(source, vae, encoded[0], size=(16, 24))
  with pytest.raises(ValueError, match=r"2x3 latents .*\(16x24 images\).* for 3x2 latents"):
    data.load_source(dataclasses.replace(cfg, image_size=(3, 2)))


def test_unreadable_images_are_counted_and_named_with_the_reason(encoded, vae):
  manifest = json.loads((encoded[0] / "manifest.json").read_text())
  assert manifest["classes"] == ["china", "flower"] and manifest["counts"] == [10, 10]
  assert manifest["listed"] == 22 and manifest["images"] == 20 and manifest["unreadable_count"] == 2
  assert set(manifest["unreadable"]) == {"china/broken.jpg", "flower/text.png"}
  assert "truncated" in manifest["unreadable"]["china/broken.jpg"]
  assert manifest["unreadable"]["flower/text.png"].endswith("cannot identify image file")
  assert sum(manifest["shards"]) == 20
  assert (manifest["vae"], manifest["vae_sha256"]) == ("random-small", vae.sha256)


def test_training_reads_what_was_encoded(encoded, photos):
  cfg = data.DataConfig("latents", str(encoded[0]), 2, 4, 2, True, 0, 0, "random-small")
  source = data.load_source(cfg)
  pool = next(data.pools(source, batch_size=20, pool_size=1, seed=0))
  assert pool["moments"].shape == (1, 20, 2, 2, 8)
  assert len(np.unique(pool["moments"].reshape(20, -1), axis=0)) == 20
  np.testing.assert_array_equal(np.bincount(pool["c"][0]), [10, 10])


@pytest.mark.parametrize("write", [write_folder_of_tars, write_tar_of_tars])
def test_tar_files_are_encoded_to_the_same_bytes_as_the_folder(
  tmp_path, write, photos, encoded, vae
):
  classes = {
    folder.name: {file.name: file.read_bytes() for file in folder.iterdir()}
    for folder in pathlib.Path(photos).iterdir()
  }
  source = images.open_source(write(tmp_path / "source", classes), "")
  run(source, vae, tmp_path / "out", num_threads=1)
  assert files(tmp_path / "out") == files(encoded[0])


@pytest.mark.parametrize("processes", [2, 7])
def test_processes_make_the_same_files_as_one(tmp_path, processes, photos, encoded, vae):
  run(images.open_source(photos, ""), vae, tmp_path, processes)
  assert files(tmp_path) == files(encoded[0])


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_bytes(
  tmp_path, photos, encoded, vae
):
  source = images.open_source(photos, "")

  def read(i):
    if i == 13:  # in the third shard, while the one before may be under way
      raise OSError("the network is down")
    return source.read(i)

  with pytest.raises(OSError, match=r"cannot be read from its storage: the network is down"):
    run(dataclasses.replace(source, read=read), vae, tmp_path)
  before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
  assert 0 < len(before) < 5 and all(path.suffix == ".array_record" for path in before)
  asked = []

  def note(i):
    asked.append(i)
    return source.read(i)

  settings = run(dataclasses.replace(source, read=note), vae, tmp_path)
  assert files(tmp_path) == files(encoded[0])
  assert {path: path.stat().st_mtime_ns for path in before} == before
  finished = {pathlib.Path(settings.path(str(tmp_path), s)): s for s in range(5)}
  made = sorted(set(range(5)) - {finished[path] for path in before})
  assert sorted(asked) == [i for s in made for i in settings.images_of(s)]


def test_a_shard_that_is_damaged_or_gone_is_made_again(tmp_path, photos, encoded, vae):
  for name, content in files(encoded[0]).items():
    (tmp_path / name).write_bytes(content)
  settings = encoded[1]
  os.truncate(settings.path(str(tmp_path), 1), 1000)
  os.remove(settings.path(str(tmp_path), 4))
  run(images.open_source(photos, ""), vae, tmp_path)
  assert files(tmp_path) == files(encoded[0])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"size": 32}, "size=16, not 32"),
    ({"images_per_shard": 4}, "images_per_shard=5, not 4"),
    ({"vae": {"sha256": "0"}}, "vae_sha256='.*', not '0'"),
    ({"source": {"listing": "1"}}, "listing='.*', not '1'"),
  ],
)
def test_a_folder_of_another_encoding_is_refused_before_any_work(
  photos, encoded, vae, change, message
):
  def read(i):
    raise AssertionError("read an image")

  changes = dict(change)
  source = images.open_source(photos, "")
  source = dataclasses.replace(source, read=read, **changes.pop("source", {}))
  vae = dataclasses.replace(vae, **changes.pop("vae", {}))
  before = files(encoded[0])
  with pytest.raises(ValueError, match=rf"shards of another encoding: .*{message}.*another folder"):
    run(source, vae, encoded[0], **changes)
  assert files(encoded[0]) == before


def noise(path, seed):
  pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
  Image.fromarray(pixels).save(path)


def test_shards_of_other_pictures_under_the_same_names_are_not_kept(tmp_path, vae, caplog):
  folder, other = tmp_path / "a", tmp_path / "b"
  for i, root in enumerate((folder, other)):  # both older than the shards, in files of one size
    (root / "class").mkdir(parents=True)
    for j in range(10):
      noise(root / "class" / f"{j}.bmp", 10 * i + j)
  out = tmp_path / "out"
  opened = lambda folder: images.open_source(str(folder), "")
  run(opened(folder), vae, out)
  before = files(out)
  contents = json.loads(before["manifest.json"])["contents"]
  with pytest.raises(ValueError, match=r"2 of 2 shards .* such as class/0\.bmp\. .* folder"):
    run(opened(other), vae, out)
  # Elsewhere, and written again, they are the same.
  shutil.copytree(folder, tmp_path / "moved")
  run(opened(tmp_path / "moved"), vae, out)
  assert files(out) == before
  # One that has changed since is noticed, whichever it is, and its shard alone is made anew.
  noise(folder / "class" / "8.bmp", 99)
  with pytest.raises(ValueError, match=r"1 of 2 shards .* class/8\.bmp\. .*00001-of-00002"):
    run(opened(folder), vae, out)
  second = out / "latents-00001-of-00002.array_record"
  second.unlink()
  run(opened(folder), vae, out)
  after = files(out)
  assert {name for name in before if before[name] != after[name]} == {second.name, "manifest.json"}
  assert json.loads(after["manifest.json"])["contents"] != contents


def test_shards_of_an_older_version_which_say_no_contents_are_kept(
  tmp_path, vae, caplog, monkeypatch
):
  folder = write_folder(tmp_path / "photos", crops_of_photos(2))
  with monkeypatch.context() as patch:
    patch.setattr(latents.ShardWriter, "note_contents", lambda *_: None)
    run(images.open_source(folder, ""), vae, tmp_path / "out")
  assert "contents" not in latents.read_manifest(str(tmp_path / "out"))
  with caplog.at_level("INFO", logger="absl"):
    run(images.open_source(folder, ""), vae, tmp_path / "out")
  assert "1 older shards do not say of which contents" in caplog.text


def test_a_missing_file_is_one_image_and_a_missing_folder_stops_the_run(tmp_path, vae):
  folder = pathlib.Path(write_folder(tmp_path / "photos", crops_of_photos(2)))
  (folder / "china" / "link.jpg").symlink_to(folder / "nowhere.jpg")
  source = images.open_source(str(folder), "")
  run(source, vae, tmp_path / "one")
  manifest = latents.read_manifest(str(tmp_path / "one"))
  assert manifest["images"] == 4 and "No such file" in manifest["unreadable"]["china/link.jpg"]
  (folder / "flower").rename(tmp_path / "elsewhere")
  with pytest.raises(OSError, match=r"flower/\S+ cannot be read from its storage"):
    run(source, vae, tmp_path / "two")


def hostile_files(folder):
  """{name: reason} of entries made in a folder, of which none is an image."""
  image = file_of(PHOTOS["china"][:20, :20])
  (folder / "cut.png").write_bytes(image[:-100])
  (folder / "empty.png").touch()
  # A few bytes that promise 30,000 x 30,000 pixels.
  promise = image[:16] + (30_000).to_bytes(4, "big") * 2 + image[24:29]
  promise += zlib.crc32(promise[12:]).to_bytes(4, "big") + image[33:]
  (folder / "bomb.png").write_bytes(promise)
  (folder / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
  with open(folder / "huge.bmp", "wb") as file:
    file.truncate(2**40)  # all of it a hole
  os.mkfifo(folder / "fifo.png")  # an open would wait for a writer
  with socket.socket(socket.AF_UNIX) as server:
    server.bind(os.path.relpath(folder / "socket.png"))
  (folder / "device.png").symlink_to("/dev/zero")
  (folder / "nothing.png").symlink_to("nowhere.png")
  (folder / "itself.png").symlink_to("itself.png")
  (folder / "through.png").symlink_to("cut.png/image.png")
  return {
    "cut.png": "",
    "empty.png": "cannot identify",
    "bomb.png": "exceeds limit",
    "program.jpg": "cannot identify",
    "huge.bmp": "1099511627776 bytes are too many",
    "fifo.png": "a FIFO, and no regular file",
    "socket.png": "a socket, and no regular file",
    "device.png": "a device, and no regular file",
    "nothing.png": "No such file",
    "itself.png": "symbolic links",
    "through.png": "Not a directory",
  }


def test_whatever_is_no_image_is_listed_and_no_image_is_lost(tmp_path, vae, monkeypatch):
  monkeypatch.chdir(tmp_path)  # names of sockets are short
  folder = pathlib.Path(write_folder(tmp_path / "photos", crops_of_photos(2)))
  expected = hostile_files(folder / "china")
  line = file_of(PHOTOS["china"][:1].repeat(40, axis=1)[:, :20_000])
  (folder / "flower" / "line.png").write_bytes(line)
  (folder / os.fsdecode(b"\xff")).mkdir()  # is not UTF-8
  (folder / os.fsdecode(b"\xff") / os.fsdecode(b"\xfe.png")).write_bytes(line)
  source = images.open_source(str(folder), "")
  run(source, vae, tmp_path / "out")
  manifest = latents.read_manifest(str(tmp_path / "out"))
  assert manifest["images"] == 6 and manifest["classes"][2] == os.fsdecode(b"\xff")
  reasons = manifest["unreadable"]
  assert reasons.keys() == {f"china/{name}" for name in expected}
  assert all(expected[name] in reasons[f"china/{name}"] for name in expected), reasons


def test_members_of_a_tar_file_that_are_no_files_are_listed(tmp_path):
  image = file_of(PHOTOS["china"][:20, :20])
  (tmp_path / "tars").mkdir()
  with tarfile.open(tmp_path / "tars" / "a.tar", "w") as tar:
    for name, kind, target in (
      ("1.png", tarfile.REGTYPE, ""),
      ("2.png", tarfile.LNKTYPE, "1.png"),  # as tar stores the same file a second time
      ("3.png", tarfile.SYMTYPE, "1.png"),
      ("4.png", tarfile.FIFOTYPE, ""),
      (os.fsdecode(b"\xff.png"), tarfile.REGTYPE, ""),
    ):
      member = tarfile.TarInfo(name)
      member.type, member.linkname, content = kind, target, image if not target else b""
      member.size = len(content) if kind == tarfile.REGTYPE else 0
      tar.addfile(member, io.BytesIO(content))
  source = images.open_source(str(tmp_path / "tars"), "")
  crops = {source.name(i): images.read_crop(source, SIZE, i) for i in range(source.size)}
  readable = [name for name, crop in crops.items() if crop.reason is None]
  assert readable == ["a/1.png", "a/2.png", os.fsdecode(b"a/\xff.png")]
  np.testing.assert_array_equal(crops["a/1.png"].pixels, crops["a/2.png"].pixels)
  assert all("a link, a device" in crops[f"a/{i}.png"].reason for i in (3, 4))


def test_a_class_that_is_a_broken_link_is_no_class_fewer(tmp_path):
  folder = pathlib.Path(write_folder(tmp_path / "photos", crops_of_photos(1)))
  (folder / "dahlia").symlink_to(tmp_path / "nowhere")
  with pytest.raises(ValueError, match=r"neither folders nor files, such as dahlia.*other labels"):
    images.open_source(str(folder), "")


def test_images_of_which_none_is_readable_are_no_dataset(tmp_path, vae):
  folder = write_folder(tmp_path / "photos", {"a": {"1.jpg": b"x"}, "b": {"2.jpg": b"y"}})
  with pytest.raises(ValueError, match=r"none of the 2 images .* first is a/1\.jpg: .*identify"):
    run(images.open_source(folder, ""), vae, tmp_path / "out")
  assert not (tmp_path / "out" / "manifest.json").exists()


def test_moments_that_are_not_finite_stop_the_run(tmp_path, photos, vae):
  broken = dataclasses.replace(vae, params=jax.tree.map(lambda a: a * np.nan, vae.params))
  with pytest.raises(FloatingPointError, match=r"moments of china/\S+ are not finite"):
    run(images.open_source(photos, ""), broken, tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_manifest_waits_for_all_shards(tmp_path, photos, vae, monkeypatch):
  monkeypatch.setattr(encode, "_SECONDS_BETWEEN_LOOKS", 0.05)
  source = images.open_source(photos, "")
  settings = encode.encode(
    source,
    vae,
    str(tmp_path),
    size=SIZE,
    batch_size=2,
    images_per_shard=5,
    num_threads=1,
    process_index=1,
    process_count=2,
    devices=jax.devices()[:2],
  )
  with pytest.raises(ValueError, match=r"3 of 5 shards are missing .*00000-of-00005"):
    encode.write_manifest(source, str(tmp_path), settings)
  waiting = threading.Thread(target=encode.wait_for_shards, args=(str(tmp_path), settings))
  waiting.start()
  waiting.join(0.2)
  assert waiting.is_alive()
  run(source, vae, tmp_path)
  waiting.join(30)
  assert not waiting.is_alive()


def test_a_bucket_is_no_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(OSError, match="--out=gs://bucket/latents is no folder: mount the bucket"):
    encode.make_folder("gs://bucket/latents")
  assert not list(tmp_path.iterdir())


def test_a_folder_whose_name_the_library_cannot_take_is_named_before_any_work(tmp_path):
  folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")  # is not UTF-8
  with pytest.raises(ValueError, match=r"--out='.*udcff' has bytes that are no UTF-8: rename"):
    encode.make_folder(folder)
  for name, vae in (("digits", ""), ("latents", "random-small")):
    with pytest.raises(ValueError, match=r"data\.dir='.*udcff' has bytes that are no UTF-8"):
      data.load_source(data.DataConfig(name, folder, 8, 1, 10, False, 0, 0, vae))
  assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, photos, vae):
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match=r"file/out cannot be written.*name a folder that can"):
    run(images.open_source(photos, ""), vae, tmp_path / "file" / "out")


def command(*arguments):
  return subprocess.Popen(
    [sys.executable, "-m", "ism_jax", "encode", *arguments],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(tmp_path):
  photos = write_folder(tmp_path / "photos", crops_of_photos(150))

  def start(out):
    return command(
      f"--images={photos}",
      f"--out={tmp_path / out}",
      f"--size={SIZE}",
      "--vae=random-small",
      "--batch_size=4",
      "--images_per_shard=20",
      "--num_threads=1",
    )

  undisturbed = start("whole")
  _, stderr = undisturbed.communicate(timeout=100)
  assert undisturbed.returncode == 0, stderr
  expected = files(tmp_path / "whole")
  assert len(expected) == 16

  out = tmp_path / "killed"
  for shards in (1, 7):
    process = start("killed")
    while len(list(out.glob("*.array_record"))) < shards:
      assert process.poll() is None, process.communicate()[1]
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "manifest.json").exists()
  last = start("killed")
  _, stderr = last.communicate(timeout=100)
  assert last.returncode == 0, stderr
  assert files(out) == expected


@pytest.mark.slow
def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
  photos = write_folder(tmp_path / "photos", crops_of_photos(1))
  for arguments, message in (
    ((f"--images={tmp_path / 'nosuch'}", "--vae=random-small"), "there is no such file or folder"),
    ((f"--images={photos}", f"--vae={tmp_path / 'nosuch'}"), "diffusion_pytorch_model.safetensors"),
    ((f"--images={photos}", "--size=250", "--vae=random-small"), "the nearest is 248"),
    (("--vae=random-small",), "--images is missing; --help tells what it is"),
    (("--verify",), "it has no manifest.json"),
    ((f"--images={photos}", "--sise=256"), "--sise is no flag of this command"),
    ((f"--images={photos}", "--size=large"), "flag --size=large"),
    ((f"--images={photos}", "--size=64x36", "--vae=random-small"), "size=36 must be a multiple"),
  ):
    process = command(*arguments, f"--out={tmp_path / 'out'}")
    _, stderr = process.communicate(timeout=100)
    (line,) = [line for line in stderr.splitlines() if line.startswith("Error: ")]
    assert process.returncode == 1 and message in line, stderr
    assert "Traceback" not in stderr
