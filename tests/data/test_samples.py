"""Samples in files: what is written is what any reader finds, and what anyone made is read."""

import hashlib
import io
import os
import pathlib
import tracemalloc
import zipfile

from absl import logging
from etils import epath
from fsspec.implementations import memory
import jax
import numpy as np
from PIL import Image
import pytest

from ism_jax.data import samples

SHAPE = (6, 5, 3)


def pixels(count, shape=SHAPE, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def labels_of(count):
  return np.arange(count) * 7 % 10


def write(path, count=7, added=None, batch=3):
  """Writes `added` images as a file that is to hold `count`."""
  added = count if added is None else added
  images, labels = pixels(added), labels_of(added)
  with samples.writer(str(path), count, SHAPE) as add:
    for start in range(0, added, batch):
      add(images[start : start + batch], labels[start : start + batch].astype(np.int32))
  return images, labels


def read(image_set, batch_size=3):
  batches = list(image_set.batches(batch_size))
  assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
  return np.concatenate(batches)


def save_images(folder, named, **options):
  """{name: array or (array, mode)} as files in a folder and in folders inside it."""
  for name, array in named.items():
    array, *mode = array if isinstance(array, tuple) else (array,)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, *mode).save(folder / name, **options)
  return str(folder)


def refused(path, message):
  with pytest.raises(ValueError, match=message) as raised:
    image_set = samples.open(str(path))
    for _ in image_set.batches(2):
      pass
  assert "\n" not in str(raised.value) and str(path) in str(raised.value)


# Writing.


def test_what_is_written_in_batches_is_adms_npz(tmp_path):
  images, labels = write(tmp_path / "new" / "samples.npz")
  with np.load(tmp_path / "new" / "samples.npz", allow_pickle=False) as file:
    assert file.files == ["arr_0", "arr_1"]
    np.testing.assert_array_equal(file["arr_0"], images)
    np.testing.assert_array_equal(file["arr_1"], labels)
    assert file["arr_0"].dtype == np.uint8 and file["arr_1"].dtype == np.int64
  with zipfile.ZipFile(tmp_path / "new" / "samples.npz") as archive:
    assert archive.testzip() is None
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["samples.npz"]


def test_equal_samples_make_equal_files_whatever_the_batches(tmp_path):
  write(tmp_path / "a.npz", batch=2)
  write(tmp_path / "b.npz", batch=7)
  assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
  with zipfile.ZipFile(tmp_path / "a.npz") as archive:  # nor on the day
    assert {m.date_time for m in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize("added", [6, 8, 0])
def test_too_many_or_too_few_images_leave_no_file_and_the_old_one(tmp_path, added):
  path = tmp_path / "samples.npz"
  with pytest.raises(ValueError, match=rf"samples\.npz got {added} images, .* hold 7"):
    write(path, 7, added)
  assert not list(tmp_path.iterdir())
  path.write_bytes(b"old")
  with pytest.raises(ValueError, match="is to hold 7"):
    write(path, 7, added)
  assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_an_error_while_sampling_leaves_no_file(tmp_path):
  def sample():
    with samples.writer(str(tmp_path / "samples.npz"), 7, SHAPE) as add:
      add(pixels(3), labels_of(3))
      assert not (tmp_path / "samples.npz").exists() and os.listdir(tmp_path)
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    sample()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("images", "labels", "message"),
  [
    (pixels(2).astype(np.float32), labels_of(2), r"float32 images of shape \(2, 6, 5, 3\)"),
    (pixels(2, (5, 6, 3)), labels_of(2), r"shape \(2, 5, 6, 3\); .* \[B, 6, 5, 3\]"),
    (pixels(2), labels_of(3), r"labels of shape \(3,\) for 2 images"),
    (pixels(2), np.zeros(2), "float64 labels"),
  ],
)
def test_images_and_labels_of_another_kind_are_refused(tmp_path, images, labels, message):
  with (
    pytest.raises(ValueError, match=message),
    samples.writer(str(tmp_path / "samples.npz"), 2, SHAPE) as add,
  ):
    add(images, labels)


def test_a_disk_without_room_is_refused_before_sampling(tmp_path):
  with (
    pytest.raises(OSError, match=r"takes 3000000\.0 GB, and .* has .* GB: make room"),
    samples.writer(str(tmp_path / "samples.npz"), 10**9, (1000, 1000, 3)),
  ):
    raise AssertionError("sampling began")
  assert not list(tmp_path.iterdir())


def test_of_several_processes_the_first_alone_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  write(tmp_path / "samples.npz")
  assert not list(tmp_path.iterdir())


class ObjectStore(memory.MemoryFileSystem):
  """In memory, as gs:// for epath."""

  store, pseudo_dirs, cachable = {}, [""], False

  @classmethod
  def _strip_protocol(cls, path):
    return "/" + os.fspath(path).removeprefix("gs://").strip("/")


def test_an_object_store_gets_the_same_file(tmp_path, monkeypatch):
  store, backend = ObjectStore(), type(epath.backend.fsspec_backend)
  store.store, local = {}, backend.fs
  monkeypatch.setattr(
    backend, "fs", lambda s, p: store if os.fspath(p).startswith("gs:/") else local(s, p)
  )
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  monkeypatch.setattr("tempfile.tempdir", None)
  monkeypatch.chdir(tmp_path)
  write(tmp_path / "samples.npz")
  write("gs://bucket/new/samples.npz")
  expected = (tmp_path / "samples.npz").read_bytes()
  assert epath.Path("gs://bucket/new/samples.npz").read_bytes() == expected
  with pytest.raises(ValueError, match="is to hold 7"):
    write("gs://bucket/few.npz", 7, 6)
  assert not epath.Path("gs://bucket/few.npz").exists()
  assert os.listdir(tmp_path) == ["samples.npz"]


def test_memory_holds_a_few_batches_and_not_the_file(tmp_path):
  shape, batch, batches = (64, 64, 3), 32, 40  # 0.4 MB of 15.7
  images = pixels(batch, shape)
  tracemalloc.start()
  try:
    with samples.writer(str(tmp_path / "samples.npz"), batch * batches, shape) as add:
      for _ in range(batches):
        add(images, labels_of(batch))
    for compressed in (False, True):
      if compressed:
        with (
          zipfile.ZipFile(tmp_path / "samples.npz") as plain,
          zipfile.ZipFile(tmp_path / "small.npz", "w", zipfile.ZIP_DEFLATED) as archive,
          archive.open("arr_0.npy", "w") as target,
          plain.open("arr_0.npy") as source,
        ):
          while content := source.read(2**16):
            target.write(content)
      image_set = samples.open(str(tmp_path / ("small.npz" if compressed else "samples.npz")))
      total = sum(int(b.sum(dtype=np.int64)) for b in image_set.batches(batch))
      assert total == batches * int(images.sum(dtype=np.int64))
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 6 * images.nbytes


# Reading arrays.


def saved(path, kind, **arrays):
  save = {"npz": np.savez, "compressed": np.savez_compressed}[kind]
  save(path, **arrays)
  return str(path)


@pytest.mark.parametrize("kind", ["npz", "compressed"])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_arrays_are_read_in_order_in_batches(tmp_path, kind, batch_size):
  images, labels = pixels(7), labels_of(7)
  path = saved(tmp_path / "a.npz", kind, arr_0=images, arr_1=labels)
  image_set = samples.open(path)
  assert image_set.count == 7 and image_set.image_shape == SHAPE and image_set.source == path
  assert image_set.labels.dtype == np.int64
  np.testing.assert_array_equal(image_set.labels, labels)
  for _ in range(2):  # again from the beginning
    np.testing.assert_array_equal(read(image_set, batch_size), images)
  assert (
    image_set.protocol()["sha256"] == hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
  )


def test_an_npy_file_and_grey_images_are_read(tmp_path):
  images = pixels(5, (4, 4, 1))
  np.save(tmp_path / "a.npy", images)
  image_set = samples.open(str(tmp_path / "a.npy"))
  assert image_set.image_shape == (4, 4, 1) and image_set.labels is None
  np.testing.assert_array_equal(read(image_set), images)
  header_2 = io.BytesIO()
  np.lib.format.write_array(header_2, images, version=(2, 0))
  (tmp_path / "a.npy").write_bytes(header_2.getvalue())
  np.testing.assert_array_equal(read(samples.open(str(tmp_path / "a.npy"))), images)


def test_images_and_labels_are_found_by_what_they_are(tmp_path):
  images, labels = pixels(5), labels_of(5).astype(">i2")
  image_set = samples.open(
    saved(tmp_path / "a.npz", "npz", x=images, labels=labels, mu=np.zeros(9))
  )
  np.testing.assert_array_equal(read(image_set), images)
  np.testing.assert_array_equal(image_set.labels, labels)
  # ADM's reference batches hold statistics besides.
  adm = dict(arr_0=images, mu=np.zeros(4), sigma=np.eye(4), other=pixels(2), arr_1=np.zeros(5))
  image_set = samples.open(saved(tmp_path / "b.npz", "npz", **adm))
  np.testing.assert_array_equal(read(image_set), images)
  assert image_set.labels is None  # these are no integers
  assert samples.open(saved(tmp_path / "c.npz", "npz", arr_0=images, arr_1=labels[:4])).labels is (
    None
  )


def test_arrays_that_are_no_images_are_refused_with_the_remedy(tmp_path):
  path = tmp_path / "a.npz"
  cases = [
    (dict(mu=np.zeros(4), sigma=np.eye(4)), r"holds mu float64 \[4\], sigma .* none may be images"),
    (dict(a=pixels(2), b=pixels(3)), r"a uint8 \[2, 6, 5, 3\].* of which 2 may be images"),
    (dict(arr_0=pixels(4, (6, 5))), r"arr_0 uint8 \[4, 6, 5\], of which none"),
    (dict(arr_0=pixels(4) / 255), r"float64 \[4, 6, 5, 3\], and uint8 .*127\.5 \* \(x \+ 1\)"),
    (dict(arr_0=pixels(4, (3, 6, 5))), r"channels first: x\.transpose\(0, 2, 3, 1\)"),
    (dict(arr_0=pixels(4, (6, 5, 4))), r"alpha, drop it: x\[\.\.\., :3\]"),
    (dict(arr_0=pixels(4, (6, 5, 7))), "the last axis must be the channels"),
    (dict(arr_0=np.asfortranarray(pixels(4))), r"Fortran order.* np\.ascontiguousarray"),
    (dict(arr_0=pixels(1)), "holds 1 image: statistics need at least 2"),
    (dict(arr_0=pixels(0)), "there are no images"),
  ]
  for arrays, message in cases:
    refused(saved(path, "npz", **arrays), message)


@pytest.mark.parametrize("kind", ["npz", "compressed"])
def test_a_checksum_that_is_wrong_is_noticed_at_the_end(tmp_path, kind):
  images = np.zeros((200, *SHAPE), np.uint8)
  path = pathlib.Path(saved(tmp_path / "a.npz", kind, arr_0=images))
  content = bytearray(path.read_bytes())
  content[content.index(b"PK\x01\x02") + 16] ^= 1  # of the directory's CRC-32
  path.write_bytes(content)
  refused(path, "is truncated or damaged: Bad CRC-32")


@pytest.mark.parametrize("kind", ["npz", "compressed"])
def test_damaged_archives_are_refused(tmp_path, kind):
  path = tmp_path / "a.npz"
  whole = pathlib.Path(saved(path, kind, arr_0=pixels(200), arr_1=labels_of(200))).read_bytes()
  for keep in (len(whole) - 100, len(whole) // 2, 100):
    path.write_bytes(whole[:keep])
    refused(path, "is truncated or damaged")
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 1
  path.write_bytes(flipped)
  refused(path, "is truncated or damaged")


def test_files_that_are_no_arrays_are_refused(tmp_path):
  np.save(tmp_path / "a.npy", pixels(5))
  whole = (tmp_path / "a.npy").read_bytes()
  (tmp_path / "a.npy").write_bytes(whole[:-1])
  refused(tmp_path / "a.npy", r"truncated or damaged: 577 bytes, .* has 578")
  (tmp_path / "text.npz").write_bytes(b"no array at all")
  refused(tmp_path / "text.npz", "is no array of NumPy's")
  with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
    archive.writestr("a.png", b"...")
  refused(tmp_path / "images.zip", "holds no arrays")
  refused(tmp_path / "nosuch", "no such file or folder")
  refused("gs://bucket/samples.npz", "copy it to this machine, or mount its bucket")


def test_what_a_header_promises_is_not_read_before_it_is_looked_at(tmp_path):
  np.savez(tmp_path / "a.npz", arr_0=pixels(3), extra=np.array([{}], object))
  np.testing.assert_array_equal(read(samples.open(str(tmp_path / "a.npz"))), pixels(3))
  with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as archive:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
      header, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 1, 1, 3)}
    )
    archive.writestr("arr_0.npy", header.getvalue() + bytes(100))
  refused(tmp_path / "b.npz", "truncated or damaged: .* has 3000000000128")
  with open(tmp_path / "c.npy", "wb") as file:  # a header of 4 GB, of which there is a hole
    file.write(b"\x93NUMPY\x02\x00" + b"\xff" * 4)
    file.truncate(2**33)
  refused(tmp_path / "c.npy", "is no array of NumPy's, or its header is damaged")
  np.save(tmp_path / "d.npy", np.array([[[[{}]]]] * 3, object), allow_pickle=True)
  refused(tmp_path / "d.npy", "the images are object")
  os.mkfifo(tmp_path / "fifo.npz")
  refused(tmp_path / "fifo.npz", "no such file or folder")


# Folders.


def test_a_folder_is_read_by_names_with_the_folders_inside_it(tmp_path):
  images = pixels(5)
  names = ["a/10.png", "a/2.png", "b.PNG", "c/d/e.bmp", "f.webp"]
  for name, image in zip(names, images, strict=True):
    save_images(tmp_path, {name: image}, **({"lossless": True} if name == "f.webp" else {}))
  (tmp_path / ".hidden").mkdir()
  save_images(tmp_path, {".hidden/x.png": images[0], ".x.png": images[0]})
  (tmp_path / "notes.txt").write_text("no image")
  image_set = samples.open(str(tmp_path))
  assert image_set.count == 5 and image_set.image_shape == SHAPE and image_set.labels is None
  for batch_size in (2, 5, 9):
    np.testing.assert_array_equal(read(image_set, batch_size), images)


def test_the_checksum_of_a_folder_tells_names_and_contents(tmp_path):
  images = pixels(3)
  named = {"a.png": images[0], "b.png": images[1]}
  checksum = lambda folder, named: samples.open(save_images(tmp_path / folder, named)).protocol()[
    "sha256"
  ]
  first = checksum("1", named)
  assert checksum("2", named) == first
  assert checksum("3", named | {"b.png": images[2]}) != first
  assert checksum("4", {"a.png": images[0], "c.png": images[1]}) != first
  assert checksum("5", {"a.png": images[1], "b.png": images[0]}) != first


def test_images_stay_grey_only_where_all_are(tmp_path):
  grey, colour = pixels(4, (6, 5)), pixels(1)[0]
  files = {"a.png": grey[0], "b.png": np.dstack([grey[1], grey[2]]), "c.png": grey[3] > 128}
  image_set = samples.open(save_images(tmp_path, files))
  assert image_set.image_shape == (6, 5, 1)
  np.testing.assert_array_equal(
    read(image_set)[..., 0], [grey[0], grey[1], 255 * np.uint8(grey[3] > 128)]
  )
  image_set = samples.open(save_images(tmp_path, {"d.png": colour}))
  assert image_set.image_shape == (6, 5, 3)
  np.testing.assert_array_equal(read(image_set)[0], np.repeat(grey[0][..., None], 3, -1))
  np.testing.assert_array_equal(read(image_set)[3], colour)


def test_alpha_and_palette_become_colours(tmp_path):
  rgba = pixels(2, (6, 5, 4))
  palette = Image.fromarray(rgba[1, ..., :3]).quantize(30)
  save_images(tmp_path, {"a.png": rgba[0]})
  palette.save(tmp_path / "b.png")
  decoded = read(samples.open(str(tmp_path)))
  np.testing.assert_array_equal(decoded[0], rgba[0, ..., :3])
  np.testing.assert_array_equal(decoded[1], np.asarray(palette.convert("RGB")))


def test_mixed_sizes_are_found_before_anything_is_decoded(tmp_path):
  folder = save_images(
    tmp_path, {"a.png": pixels(1)[0], "b.png": pixels(1)[0], "c.png": pixels(1, (5, 6, 3))[0]}
  )
  with pytest.raises(ValueError, match=r"a\.png is 5x6 .* c\.png is 6x5, and 1 of 3 differ"):
    samples.open(folder)


def test_damaged_images_and_folders_without_images_are_refused(tmp_path):
  refused(tmp_path, "holds no images: none of its 0 files")
  (tmp_path / "samples.txt").touch()
  refused(tmp_path, "none of its 1 files has one of the suffixes")
  save_images(tmp_path, {"a.png": pixels(1, (64, 64, 3))[0]})
  refused(tmp_path, "holds 1 image")
  (tmp_path / "b.png").write_bytes(b"text")
  refused(tmp_path / "b.png", "is no array of NumPy's")
  refused(tmp_path, r"1 of 2 images cannot be read; the first is b\.png: UnidentifiedImageError")
  (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:-2000])
  image_set = samples.open(str(tmp_path))
  assert image_set.count == 2 and not image_set.unreadable  # as far as its header tells
  assert len(read(image_set)) == 1 and "truncated" in image_set.unreadable["b.png"]


def test_images_of_a_folder_that_cannot_be_read_are_listed_and_never_opened_if_no_files(tmp_path):
  images = pixels(3)
  save_images(tmp_path, {f"{i}.png": image for i, image in enumerate(images)})
  (tmp_path / "text.png").write_bytes(b"text")
  (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:-40])
  os.mkfifo(tmp_path / "fifo.png")  # an open would wait for a writer
  (tmp_path / "device.png").symlink_to("/dev/zero")
  (tmp_path / "nothing.png").symlink_to(tmp_path / "nowhere")
  (tmp_path / "itself.png").symlink_to(tmp_path / "itself.png")
  os.rename(tmp_path / "2.png", os.fsencode(tmp_path) + b"/\xff.png")  # is not UTF-8
  image_set = samples.open(str(tmp_path))
  sha256 = image_set.protocol()["sha256"]
  np.testing.assert_array_equal(read(image_set, 2), images)
  reasons = {
    "text.png": "cannot identify image file",
    "cut.png": "",
    "fifo.png": "a FIFO, and no regular file",
    "device.png": "a device, and no regular file",
    "nothing.png": "No such file",
    "itself.png": "Too many levels of symbolic links",
  }
  assert image_set.count == 9 and image_set.unreadable.keys() == reasons.keys()
  assert all(reason in image_set.unreadable[name] for name, reason in reasons.items())
  assert image_set.protocol()["sha256"] == sha256  # before and after reading
  assert samples.open(str(tmp_path)).protocol()["sha256"] == sha256


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path):
  images = pixels(4)
  folder = tmp_path / "folder"
  save_images(folder, {"0.png": images[0], "a/1.png": images[1]})
  save_images(tmp_path / "elsewhere", {"2.png": images[2], "b/3.png": images[3]})
  (folder / "linked").symlink_to(tmp_path / "elsewhere")
  (folder / "twice").symlink_to(tmp_path / "elsewhere")
  (folder / "latest").symlink_to(folder / "a")  # whose images are listed already
  (folder / "loop").symlink_to(folder)
  (folder / "a" / "up").symlink_to(tmp_path)
  (tmp_path / "elsewhere" / "b" / "back").symlink_to(folder)
  (tmp_path / "elsewhere" / "nothing").symlink_to(tmp_path / "nowhere")
  image_set = samples.open(str(folder))
  names = ["0.png", "a/1.png", "linked/2.png", "linked/b/3.png"]
  assert sorted(samples._files_below(str(folder))) == sorted([*names, "linked/nothing"])
  np.testing.assert_array_equal(read(image_set), images)


def test_jpeg_samples_are_warned_of(tmp_path):
  said = []
  handler = logging.logging.Handler()
  handler.emit = lambda record: said.append(record.getMessage())
  logging.get_absl_logger().addHandler(handler)
  try:
    samples.open(save_images(tmp_path / "png", {"a.png": pixels(1)[0], "b.png": pixels(1)[0]}))
    assert not said
    samples.open(save_images(tmp_path / "jpg", {"a.png": pixels(1)[0], "b.JPG": pixels(1)[0]}))
  finally:
    logging.get_absl_logger().removeHandler(handler)
  assert len(said) == 1 and "1 of 2 images are JPEG files, such as b.JPG" in said[0]
