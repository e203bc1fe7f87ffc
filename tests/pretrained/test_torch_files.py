"""Files of PyTorch weights, from a writer of their formats written here and from PyTorch itself."""

import argparse
import dataclasses
import functools
import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from ism_jax.pretrained import torch_files, weights

STORAGES = {
  "float32": "FloatStorage",
  "float16": "HalfStorage",
  "bfloat16": "BFloat16Storage",
  "int64": "LongStorage",
}
MAGIC, VERSION, MACHINE = 0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A view of a storage, with the offset and the strides in elements."""

  key: str
  offset: int
  shape: tuple
  strides: tuple


def opcodes(value, storages, stream=False):
  """A pickle's opcodes (protocol 2) for what state dicts hold, without PyTorch's classes."""
  write = functools.partial(opcodes, storages=storages, stream=stream)
  match value:
    case None:
      return b"N"
    case bytes():  # opcodes already
      return value
    case bool():
      return b"\x88" if value else b"\x89"
    case int():
      return b"J" + struct.pack("<i", value)
    case float():
      return b"G" + struct.pack(">d", value)
    case str():
      return b"X" + struct.pack("<I", len(value)) + value.encode()
    case tuple():
      return b"(" + b"".join(map(write, value)) + b"t"
    case list():
      return b"](" + b"".join(map(write, value)) + b"e"
    case dict():
      items = b"".join(write(key) + write(item) for key, item in value.items())
      return b"ccollections\nOrderedDict\n)R(" + items + b"u"
    case Tensor():
      array = storages[value.key]
      kind = f"ctorch\n{STORAGES[array.dtype.name]}\n".encode()
      view = (None,) if stream else ()
      storage = write(("storage", kind, value.key, "cpu", array.size, *view)) + b"Q"
      view = (storage, value.offset, value.shape, value.strides, False, write({}))
      return b"ctorch._utils\n_rebuild_tensor_v2\n" + write(view) + b"R"
  raise TypeError(value)


def pickled(value, storages=None, stream=False):
  return b"\x80\x02" + opcodes(value, storages or {}, stream) + b"."


def write_zip(path, structure, storages, **extra):
  """As PyTorch 1.6 and later; `structure` may be a whole pickle."""
  with zipfile.ZipFile(path, "w") as archive:
    if not isinstance(structure, bytes):
      structure = pickled(structure, storages)
    archive.writestr("archive/data.pkl", structure)
    for key, array in storages.items():
      archive.writestr(f"archive/data/{key}", array.tobytes())
    for name, data in extra.items():
      archive.writestr(f"archive/{name}".replace("_pkl", ".pkl"), data)


def write_stream(path, structure, storages, version=VERSION, machine=MACHINE):
  """As PyTorch before 1.6; `structure` may be a whole pickle."""
  if not isinstance(structure, bytes):
    structure = pickled(structure, storages, stream=True)
  parts = [pickle.dumps(part, protocol=2) for part in (MAGIC, version, machine)]
  parts += [structure, pickle.dumps(sorted(storages), protocol=2)]
  for _, array in sorted(storages.items()):
    parts += [struct.pack("<q", array.size), array.tobytes()]
  path.write_bytes(b"".join(parts))


WRITERS = pytest.mark.parametrize("write", [write_zip, write_stream])


def assert_same(read, expected):
  """Nested structures are equal, arrays in dtype, shape and value."""
  if isinstance(expected, np.ndarray):
    assert isinstance(read, np.ndarray)
    assert read.dtype == expected.dtype and read.shape == expected.shape
    np.testing.assert_array_equal(read, expected)
  elif isinstance(expected, dict):
    assert type(read) is dict and list(read) == list(expected)
    for key, value in expected.items():
      assert_same(read[key], value)
  else:
    assert type(read) is type(expected) and read == expected


@WRITERS
def test_tensors_are_views_of_storages_in_nested_dicts(tmp_path, write):
  base = np.arange(24, dtype=np.float32)
  brain = np.array([1.5, -2.0, 3e38], ml_dtypes.bfloat16)
  storages = {"0": base, "1": brain, "2": np.array([7, -1], np.int64)}
  structure = {
    "model": {
      "whole": Tensor("0", 0, (2, 3, 4), (12, 4, 1)),
      "transposed": Tensor("0", 0, (4, 6), (1, 4)),
      "column": Tensor("0", 5, (4,), (6,)),
      "expanded": Tensor("0", 2, (3, 2), (0, 1)),
      "scalar": Tensor("2", 1, (), ()),
      "empty": Tensor("0", 0, (0, 5), (5, 1)),
    },
    "ema": {"brain": Tensor("1", 0, (3,), (1,))},
    "epoch": 3,
    "rates": [1e-4, (0.9, None)],
  }
  write(tmp_path / "file.pt", structure, storages)
  expected = {
    "model": {
      "whole": base.reshape(2, 3, 4),
      "transposed": base.reshape(6, 4).T,
      "column": base[5::6],
      "expanded": np.stack([base[2:4]] * 3),
      "scalar": np.array(-1),
      "empty": np.empty((0, 5), np.float32),
    },
    "ema": {"brain": brain},
    "epoch": 3,
    "rates": [1e-4, (0.9, None)],
  }
  read = torch_files.read_state_dict(tmp_path / "file.pt")
  assert_same(read, expected)
  # So that no one changes, through one tensor, another that shares its memory.
  assert not any(array.flags.writeable for array in read["model"].values() if array.size)


@WRITERS
def test_no_code_of_a_pickle_is_run(tmp_path, write):
  class Malicious:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / "run"),)

  attack = pickle.dumps({"weight": Malicious()}, protocol=2)
  write(tmp_path / "evil.pth", attack, {})
  with pytest.raises(ValueError, match=r"evil\.pth .* its pickle names \w+\.mkdir, which no state"):
    torch_files.read_state_dict(tmp_path / "evil.pth")
  assert not (tmp_path / "run").exists()
  pickle.loads(attack)
  assert (tmp_path / "run").exists(), "which it does where it is unpickled"


@pytest.mark.parametrize(
  "name", ["builtins\neval", "torch\nload", "torch._utils\n_rebuild_qtensor", "posix\nsystem"]
)
def test_any_other_global_is_refused_by_name(tmp_path, name):
  write_zip(tmp_path / "file.pt", pickled({"x": f"c{name}\n".encode()}), {})
  with pytest.raises(ValueError, match=name.replace("\n", ".")):
    torch_files.read_state_dict(tmp_path / "file.pt")


def test_a_pickle_cannot_change_the_classes_that_it_may_name(tmp_path):
  change = b"cargparse\nNamespace\nN}X\x04\x00\x00\x00evilK\x01s\x86b"  # Namespace.evil = 1
  write_zip(tmp_path / "file.pt", pickled({"x": change}), {})
  with pytest.raises(ValueError, match="damaged"):
    torch_files.read_state_dict(tmp_path / "file.pt")
  assert not hasattr(argparse.Namespace, "evil")


@pytest.mark.parametrize("tensor", [(3, (2,), (2,)), (0, (6,), (1,)), (-1, (2,), (1,))])
@WRITERS
def test_a_tensor_that_reaches_beyond_its_storage_is_an_error(tmp_path, write, tensor):
  write(tmp_path / "file.pt", {"x": Tensor("0", *tensor)}, {"0": np.ones(5, np.float32)})
  with pytest.raises(ValueError, match="cut short or damaged"):
    torch_files.read_state_dict(tmp_path / "file.pt")


@WRITERS
def test_a_shape_that_promises_gigabytes_takes_no_memory(tmp_path, write):
  terabyte = Tensor("0", 0, (2**19, 2**19), (0, 0))  # the same number everywhere
  turned = {f"{i}": Tensor("0", 0, (500, 2000), (1, 500)) for i in range(1000)}
  write(tmp_path / "file.pt", turned | {"x": terabyte}, {"0": np.full(10**6, 1.5, np.float32)})
  tracemalloc.start()
  try:
    read = torch_files.read_state_dict(tmp_path / "file.pt")
    assert tracemalloc.get_traced_memory()[1] < 4e7  # 4 MB of storage, 4 GB of tensors
  finally:
    tracemalloc.stop()
  assert read["x"].shape == (2**19, 2**19) and read["x"][-1, -1] == 1.5
  with pytest.raises(ValueError, match=r"another shape: x is \(524288, 524288\)"):
    weights.check_tensors(read, {"x": (2, 2)}, source="file.pt", what="it", needed="others")
  write(
    tmp_path / "file.pt",
    {"x": Tensor("0", 0, (2**31 - 1,) * 3, (0, 0, 0))},
    {"0": np.ones(1, np.float32)},
  )
  with pytest.raises(ValueError, match="cut short or damaged"):
    torch_files.read_state_dict(tmp_path / "file.pt")


def test_a_zip_that_is_larger_inside_than_outside_is_not_read(tmp_path):
  with zipfile.ZipFile(tmp_path / "file.pt", "w", zipfile.ZIP_DEFLATED) as archive:
    tensor = pickled({"x": Tensor("0", 0, (2**24,), (1,))}, {"0": np.zeros(1, np.float32)})
    archive.writestr("archive/data.pkl", tensor)
    archive.writestr("archive/data/0", bytes(2**26))
  with pytest.raises(ValueError, match=r"is compressed, as no file of torch\.save is"):
    torch_files.read_state_dict(tmp_path / "file.pt")


@WRITERS
def test_lists_that_hold_each_other_many_times_end(tmp_path, write):
  nested = b"]"  # an empty list
  for _ in range(40):  # 2^40 empty lists, in 120 bytes
    nested = b"]" + b"(" + nested + b"2" + b"e"  # [x, x], by DUP
  write(tmp_path / "file.pt", pickled({"x": nested}), {})
  with pytest.raises(ValueError, match="holds more than 262144 values"):
    torch_files.read_state_dict(tmp_path / "file.pt")


def test_what_is_no_file_is_not_opened(tmp_path):
  os.mkfifo(tmp_path / "file.pt")  # an open would wait for a writer
  with pytest.raises(OSError, match="a FIFO, and no regular file"):
    torch_files.read_state_dict(tmp_path / "file.pt")


@WRITERS
def test_a_file_cut_short_anywhere_is_an_error_of_one_line(tmp_path, write):
  path = tmp_path / "file.pt"
  write(path, {"x": Tensor("0", 0, (9,), (1,))}, {"0": np.ones(9, np.float32)})
  whole = path.read_bytes()
  for size in range(0, len(whole), 5):
    path.write_bytes(whole[:size])
    with pytest.raises(
      ValueError, match=rf"file\.pt \({size} bytes\) .* Download it again"
    ) as error:
      torch_files.read_state_dict(path)
    assert "\n" not in str(error.value)


def test_a_changed_byte_of_a_zip_is_an_error(tmp_path):
  path = tmp_path / "file.pt"
  write_zip(path, {"x": Tensor("0", 0, (9,), (1,))}, {"0": np.full(9, 1.5, np.float32)})
  data = path.read_bytes()
  path.write_bytes(data.replace(np.full(9, 1.5, np.float32).tobytes(), bytes(36)))
  with pytest.raises(ValueError, match="CRC"):
    torch_files.read_state_dict(path)


@pytest.mark.parametrize(
  ("data", "reason"),
  [
    (b"", "is empty"),
    (b"\n<!DOCTYPE html><html>Not found</html>", "it is a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
    (pickle.dumps({"weight": 1}), "it begins with"),
    (b"\x00" * 100, "it begins with"),
  ],
)
def test_what_is_no_file_of_weights_is_named(tmp_path, data, reason):
  (tmp_path / "weights.pth").write_bytes(data)
  with pytest.raises(ValueError, match=rf"weights\.pth .*{reason}"):
    torch_files.read_state_dict(tmp_path / "weights.pth")


def test_files_that_are_nearly_right_say_what_they_are(tmp_path):
  def reason(write, *args, **options):
    write(tmp_path / "file.pt", *args, **options)
    with pytest.raises(ValueError) as error:
      torch_files.read_state_dict(tmp_path / "file.pt")
    return str(error.value)

  tensors = {"0": np.ones(2, np.float32)}
  one = Tensor("0", 0, (2,), (1,))
  assert "holds a list, not a dict" in reason(write_zip, [one], tensors)
  assert "holds a ndarray, not a dict" in reason(write_stream, one, tensors)
  assert "TorchScript" in reason(write_zip, {"x": one}, tensors, constants_pkl=b"")
  assert "big-endian" in reason(write_zip, {"x": one}, tensors, byteorder=b"big")
  assert "big-endian" in reason(write_stream, {"x": one}, tensors, machine={"little_endian": False})
  assert "version 7, not 1001" in reason(write_stream, {"x": one}, tensors, version=7)
  assert "has no data.pkl" in reason(lambda path: np.savez(path.open("wb"), x=np.ones(2)))
  with pytest.raises(FileNotFoundError):
    torch_files.read_state_dict(tmp_path / "nosuch.pt")


def write_safetensors(path, **arrays):
  header, data = {}, b""
  names = {"float32": "F32", "bfloat16": "BF16", "float8_e5m2": "F8_E5M2"}
  for name, array in arrays.items():
    offsets = [len(data), len(data) + array.nbytes]
    header[name] = {"dtype": names[array.dtype.name], "shape": array.shape, "data_offsets": offsets}
    data += array.tobytes()
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
def test_safetensors_are_known_by_their_content(tmp_path, name):
  arrays = {
    "x": np.arange(6, dtype=np.float32).reshape(2, 3),
    "brain": np.array([0.5, -7], ml_dtypes.bfloat16),
  }
  write_safetensors(tmp_path / name, **arrays)
  read = torch_files.read_state_dict(tmp_path / name)
  assert_same(dict(sorted(read.items())), dict(sorted(arrays.items())))


def test_bad_safetensors_are_errors(tmp_path):
  path = tmp_path / "model.safetensors"
  write_safetensors(path, x=np.ones(3, ml_dtypes.float8_e5m2))
  with pytest.raises(ValueError, match="holds x as F8_E5M2; readable are F64, F32"):
    torch_files.read_state_dict(path)
  write_safetensors(path, x=np.ones(3, np.float32))
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(ValueError, match="damaged safetensors file"):
    torch_files.read_state_dict(path)


@pytest.mark.parametrize(
  "wrapped",
  [
    ("module.blocks.0.w", "module.b"),
    ("_orig_mod.blocks.0.w", "_orig_mod.b"),
    ("module._orig_mod.blocks.0.w", "module._orig_mod.b"),
    ("_orig_mod.module.blocks.0._orig_mod.w", "_orig_mod.module.b"),
    ("blocks.0._checkpoint_wrapped_module._orig_mod.w", "b"),
    ("module.blocks.0.w", "module.b", "n_averaged"),
  ],
)
def test_keys_are_those_of_the_module_whatever_wrapped_it(tmp_path, wrapped):
  storages = {"0": np.arange(2, dtype=np.float32)}
  state = {key: Tensor("0", i % 2, (1,), (1,)) for i, key in enumerate(wrapped)}
  write_zip(tmp_path / "a.pt", {"ema": state, "args": {"n_averaged": 3}}, storages)
  read = torch_files.read_state_dict(tmp_path / "a.pt")
  expected = {"blocks.0.w": storages["0"][:1], "b": storages["0"][1:]}
  assert_same(read, {"ema": expected, "args": {"n_averaged": 3}})


@pytest.mark.parametrize(
  "keys", [("module.w", "b"), ("w", "_orig_mod.w"), ("modules.w", "modules")]
)
def test_keys_of_the_modules_own_stay(tmp_path, keys):
  state = dict.fromkeys(keys, Tensor("0", 0, (2,), (1,)))
  write_zip(tmp_path / "a.pt", state, {"0": np.arange(2, dtype=np.float32)})
  assert tuple(torch_files.read_state_dict(tmp_path / "a.pt")) == keys


@pytest.mark.slow
@pytest.mark.parametrize("as_zip", [True, False])
def test_files_that_pytorch_writes_are_read_as_pytorch_reads_them(pytorch, tmp_path, as_zip):
  torch = pytorch
  torch.manual_seed(0)
  network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
  network = network.to(memory_format=torch.channels_last)
  base = torch.randn(5, 6, dtype=torch.float64)
  dtypes = ["float16", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128"]
  saved = {
    "model": network.state_dict(),
    "dtypes": {name: (base * 50).to(getattr(torch, name)) for name in dtypes},
    "views": {
      "base": base,
      "transposed": base.T,
      "strided": base[1::2, ::3],
      "expanded": base[:1].expand(4, 6),
      "scalar": torch.tensor(2.5),
      "empty": torch.empty(0, 3),
      "parameter": torch.nn.Parameter(torch.ones(2)),
    },
    "size": torch.Size([2, 3]),
    "args": argparse.Namespace(model="SiT-XL/2", lr=1e-4, betas=[0.9, 0.999]),
    "epoch": 3,
  }
  path = tmp_path / "checkpoint.pt"
  torch.save({**saved, "brain": base.bfloat16()}, path, _use_new_zipfile_serialization=as_zip)
  assert zipfile.is_zipfile(path) == as_zip

  def expected(value):
    if isinstance(value, torch.Tensor):
      return value.detach().numpy()
    if isinstance(value, dict):
      return {key: expected(item) for key, item in value.items()}
    return value

  read = torch_files.read_state_dict(path)
  brain = read.pop("brain")
  assert brain.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(brain.astype(np.float32), base.bfloat16().float().numpy())
  assert_same(read, expected({**saved, "args": vars(saved["args"]), "size": (2, 3)}))
