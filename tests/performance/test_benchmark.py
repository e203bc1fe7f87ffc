"""The benchmark, with a simulated clock where numbers are checked."""

import importlib
import json
import math
import pathlib
import subprocess
import sys

from examples import random_params, tiny_config
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax import experiment
from ism_jax import state as state_lib
from ism_jax.performance import benchmark, flops, timing
from ism_jax.runtime import chips, sharding


def test_everything_is_timed_in_turn_and_short_calls_several_times(monkeypatch):
  now, made = [0.0], []

  def call(name, seconds):
    def run():
      made.append(name)
      now[0] += seconds
      return np.zeros(1)

    return run

  monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
  seconds = timing.rounds({"long": call("long", 20.0), "short": call("short", 0.06)}, repeats=3)
  np.testing.assert_allclose(seconds["long"], [20.0] * 3)
  np.testing.assert_allclose(seconds["short"], [0.06] * 3)
  warm = ["long"] + ["short"] * 2
  assert made == warm + 3 * (["long"] + ["short"] * math.ceil(0.2 / 0.06))


def test_steps_differ_in_one_technique_each():
  exp = experiment.parse(tiny_config())
  steps = benchmark.techniques(exp)
  shares = {name: one.objective.shares for name, (one, _) in steps.items()}
  assert list(shares.values()) == [(4, 0, 0), (3, 1, 0), (3, 0, 1), (2, 1, 1), (2, 1, 1), (2, 1, 1)]
  assert [one.wavelet.form for one, _ in steps.values()] == ["l2"] * 4 + [exp.wavelet.form] * 2
  step, update = steps[benchmark.STEP]
  assert step == exp and benchmark.UPDATES[update] is state_lib.update
  passes = [flops.forward_equivalents(one) for one, _ in steps.values()]
  np.testing.assert_allclose(passes, [3, 3.5, 3.5, 4, 4, 4])
  fixed = benchmark.techniques(experiment.parse(tiny_config("sm")))
  assert benchmark.GUIDANCE not in fixed and benchmark.CONSISTENCY in fixed


def test_one_ema_leaves_the_other_as_it_was():
  exp = experiment.parse(tiny_config())
  tx = state_lib.optimizer(exp.optimizer, exp.total_steps)
  state = state_lib.create({"a": jnp.arange(3.0)}, tx)
  both, one = (
    update(state, {"a": jnp.ones(3)}, tx, exp.ema)
    for update in (benchmark.UPDATES[benchmark.TWIN_EMA], benchmark.UPDATES[benchmark.ONE_EMA])
  )
  for name in ("params", "ema"):
    np.testing.assert_array_equal(getattr(one, name)["a"], getattr(both, name)["a"])
  np.testing.assert_array_equal(one.target_ema["a"], state.target_ema["a"])


def check(report, exp, rows, pools):
  cfg, training, costs = report["config"], report["train"], report["techniques"]["costs"]
  assert cfg["rows"] == rows and cfg["batch_size"] == exp.batch_size
  ratios = report["techniques"]["over_flow_matching"]
  assert ratios[benchmark.FLOW_MATCHING] == {"median": 1.0, "quartiles": [1.0, 1.0]}
  assert training["model_flops_per_step"] == flops.step(exp).model
  median = lambda value: value["median"]
  np.testing.assert_allclose(
    median(training["images_per_second"]) * median(training["seconds_per_step"]),
    exp.batch_size,
    rtol=0.5,
  )
  np.testing.assert_allclose(
    median(training["steps_per_second"]) * median(training["seconds_per_step"]), 1, rtol=0.5
  )
  assert 0 < median(training["utilisation"]) < 1 and training["utilisation_of_datasheet"] is None
  assert set(costs) == {*benchmark.COSTS, "pairing", "all"}
  parts = report["techniques"]["seconds_alone"]
  assert len(parts) == 4 and min(map(median, parts.values())) > 0
  assert sorted(report["pool"]["by_size"]) == sorted({exp.coupling.pool_size, *pools})
  assert 0 < median(report["pool"]["shares"]["pairing"]) < 1
  np.testing.assert_allclose(
    sum(median(part) for part in report["pool"]["parts"].values()),
    median(report["pool"]["seconds"]),
    rtol=0.5,
  )
  assert cfg["sampled_together"] == exp.sample.batch_size
  assert list(report["sampling"]) == list(benchmark.STEPS)
  for speeds in report["sampling"].values():
    assert median(speeds["decoded"]) <= median(speeds["drawn"])
  assert list(report["input"]["images_per_second"]) == [1, 2]
  assert min(map(median, report["input"]["images_per_second"].values())) > 0
  loop = report["input"]["loop"]
  assert 0 < loop["waited"] < loop["seconds"]
  assert min(p["compile_seconds"] for p in report["programs"].values()) > 0


@pytest.mark.slow
def test_latents_are_measured_without_data_and_weights(tmp_path, monkeypatch):
  monkeypatch.setattr(timing, "SHORTEST", 0.01)
  monkeypatch.setattr(benchmark, "STEPS", (1, 4))
  monkeypatch.setattr(benchmark, "_SECONDS_READ", 0.01)
  config = tiny_config()
  config.model.unroll = 1  # compiles faster
  config.data.update(
    {"name": "latents", "vae": "random-small", "channels": 4, "num_threads": 2, "flip": True}
  )
  report = benchmark.benchmark(
    config, str(tmp_path), rows=32, pools=[1], repeats=2, devices=jax.devices()[:2]
  )
  check(report, experiment.parse(config), rows=32, pools=[1])
  written = json.loads((tmp_path / "benchmark.json").read_text())
  assert written == json.loads(json.dumps(report))
  text = (tmp_path / "benchmark.md").read_text()
  scaled = (
    f"timed on 32 rows, and its time, but for the update's, is scaled to {config.batch_size}."
  )
  assert scaled in text
  assert {p.name for p in tmp_path.iterdir()} == {
    "benchmark.json",
    "benchmark.md",
    "techniques.png",
    "scaling.png",
  }


def test_losses_alone_are_those_of_the_config():
  exp = experiment.parse(tiny_config())
  calls = benchmark.loss_calls(exp, sharding.data_mesh(jax.devices()[:2]))
  (total, parts), gradient = calls["part", benchmark.WAVELETS]()
  (squares, its_parts), _ = calls["part", benchmark.SQUARES]()
  assert total != squares and parts["velocity"] == its_parts["velocity"]
  assert parts["consistency"] != its_parts["consistency"] and gradient != 0


def test_where_pairing_reaches_a_share_of_the_steps():
  exp = experiment.parse(tiny_config())
  step, pairing = np.full(3, 2.0), {1: np.full(3, 0.01), 4: np.full(3, 0.16)}
  costs = benchmark.pool_costs(exp, couple=np.full(3, 0.2), step=step, pairing=pairing)
  pairs = costs["pairs_at"][0.01][exp.model.size]
  # K batches take 0.01 K^2 seconds, their steps 2 K: 1 % at K = 2.
  np.testing.assert_allclose(pairs, 2 * exp.batch_size)
  np.testing.assert_allclose(costs["pairs_at"][0.04][exp.model.size], 4 * pairs)
  assert costs["pairs_at"][0.01]["SiT-XL/2"] > 100 * pairs
  assert costs["step_seconds"][exp.model.size] == 2.0


def test_a_coupling_that_does_not_pair_takes_no_share():
  exp = experiment.parse(tiny_config("sm"))
  costs = benchmark.pool_costs(exp, np.full(3, 0.2), np.full(3, 2.0), {4: np.zeros(3)})
  assert costs["pairs_at"] == {} and costs["shares"]["pairing"]["median"] == 0


def test_all_threads_are_read_with_in_turn(monkeypatch):
  monkeypatch.setattr(benchmark, "_SECONDS_READ", 0.0)
  monkeypatch.setattr(benchmark.time, "perf_counter", iter(range(1000)).__next__)
  made, pool = [], {"c": np.zeros((2, 8))}
  monkeypatch.setattr(
    benchmark, "read_pools", lambda exp, source, mesh, n: made.append(n) or (pool for _ in range(9))
  )
  config = tiny_config()
  config.data.num_threads = 6
  rates = benchmark.read_rates(experiment.parse(config), None, None, repeats=2)
  assert made == 2 * [1, 2, 4, 6]
  for rate in rates.values():  # three pools of 16, each a second after the other
    np.testing.assert_allclose(rate, [16, 16])


def test_a_dataset_that_is_there_is_what_is_read():
  with benchmark.source_of(experiment.parse(tiny_config())) as source:
    assert len(source) == 1797


def test_latents_of_a_published_autoencoder_are_read_before_anything_is_timed(
  tmp_path, monkeypatch
):
  class Read(Exception):
    pass

  def measure(exp, mesh, source, **_):
    raise Read(len(source))

  config = tiny_config()
  config.data.update(
    {"name": "latents", "vae": "stabilityai/sd-vae-ft-mse", "channels": 4, "dir": str(tmp_path)}
  )
  benchmark.write_random_latents(experiment.parse(config).data, str(tmp_path))
  monkeypatch.setattr(benchmark, "measure", measure)
  with pytest.raises(Read, match="4096"):
    benchmark.benchmark(config, str(tmp_path / "out"), rows=0, pools=[], repeats=1)


@pytest.mark.parametrize(
  ("asked", "message"),
  [
    ({"rows": 1000}, "--rows=1000: give 1 to batch_size="),
    ({"rows": 4}, "batch_size=4 does not split over 8 devices"),
    ({"pools": [0]}, "a pool has at least one batch"),
    ({"pools": [2], "variant": "sm"}, "there is no pairing with coupling.coupling='independent'"),
    ({"repeats": 0}, "--repeats=0 must be at least 1"),
  ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, asked, message):
  asked = {"rows": 0, "pools": [], "repeats": 1, "variant": "ism"} | asked
  config = tiny_config(asked.pop("variant"))
  with pytest.raises(ValueError, match=message):
    benchmark.benchmark(config, str(tmp_path / "out"), **asked)
  assert not (tmp_path / "out").exists()


def test_a_wrong_flag_is_one_line(tmp_path):
  command = [sys.executable, "-m", "ism_jax", "benchmark", "--config=configs/digits.py"]
  ran = subprocess.run(
    [*command, f"--out={tmp_path}", "--pools=1,two"], capture_output=True, text=True
  )
  assert ran.returncode == 1
  assert ran.stderr.strip().splitlines()[-1] == "Error: --pools=1,two must be whole numbers."


@pytest.mark.slow
def test_what_is_timed_against_pytorch_is_the_same_there(pytorch, monkeypatch):
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parent.parent.parent / "launch")
  against = importlib.import_module("against_pytorch")
  exp = experiment.parse(tiny_config())
  params = random_params(exp.network(), exp.image_shape)
  batches = [against.batch(exp, 4, seed) for seed in range(2)]
  assert [against.most_devices(8, cores) for cores in (1, 3, 6, 8, 96)] == [1, 2, 4, 8, 8]
  train, sample = against.in_jax(exp, params, batches, sharding.data_mesh(jax.devices()[:2]))
  train_whole, _ = against.in_jax(exp, params, batches, sharding.data_mesh(jax.devices()[:1]))
  train_there, sample_there = against.in_pytorch(exp, params, batches, None)
  loss, gradient = train()
  np.testing.assert_allclose(loss, train_there().item(), rtol=1e-5)
  assert jnp.abs(gradient["x_embedder"]["kernel"]).max() > 0
  jax.tree.map(
    lambda split, whole: np.testing.assert_allclose(split, whole, rtol=1e-4, atol=1e-6),
    gradient,
    train_whole()[1],
  )
  np.testing.assert_allclose(sample(), sample_there().permute(0, 2, 3, 1), atol=1e-5)


@pytest.mark.slow
def test_rows_that_do_not_split_over_devices_are_one_line(pytorch):
  command = [sys.executable, "launch/against_pytorch.py", "--rows=8", "--devices=3"]
  root = pathlib.Path(__file__).parent.parent.parent
  ran = subprocess.run(command, cwd=root, capture_output=True, text=True)
  assert ran.returncode == 1
  message = ran.stderr.strip().splitlines()[-1]
  assert message == "Error: flags rows=8, devices=3: --rows cannot be split evenly over --devices."


def test_peaks_are_known_by_the_kind_of_device():
  assert chips.peak("TPU v5e", "bfloat16") == 197e12
  assert chips.peak("NVIDIA H200", "bfloat16") == 989e12
  assert chips.peak("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
  assert chips.peak("NVIDIA H200", "float32") is None and chips.peak("cpu", "bfloat16") is None
