"""The comparison, on runs made by hand: no training, no checkpoints."""

import json
import os
import pathlib
import subprocess
import sys

from examples import tiny_config
import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.optimize

from ism_jax import couplings
from ism_jax.evaluation import compare, figures, summary
from ism_jax.runtime import files

NETWORK = {
  "name": "classifier",
  "features": "f",
  "floor": {"mean": 0.1, "sd": 0.0, "is": "g"},
}
REAL = {"reference_spectrum": [4.0, 2.0, 1.0, 0.5], "reference_bands": [2.0, 1.0]}


def result(steps, w, times_floor, spectrum=(4.0, 2.0, 1.0, 0.5), bands=(2.0, 1.0), accuracy=0.5):
  scores = {"frechet_distance": times_floor / 10, "times_floor": times_floor, "accuracy": accuracy}
  return {
    "steps": steps,
    "w": w,
    "seed": 0,
    "scores": {"classifier": scores},
    "nearest_neighbour": 1.0,
    "spectrum": spectrum,
    "bands": bands,
  }


def write_run(workdir, results, variant="ism", entries=(), straight=(), **overrides):
  """A workdir with an evaluation.json and a metrics.jsonl; overrides as section__key=value."""
  config = tiny_config(variant)
  for key, value in overrides.items():
    config.update_from_flattened_dict({key.replace("__", "."): value})
  report = REAL | {
    "config": files.as_dict(config),
    "results": results,
    "networks": [NETWORK],
    "yardsticks": {"noise": result(0, 0, 77.0)},
    "straightness": [{"w": w, "deviation_from_chord": value} for w, value in straight],
  }
  workdir.mkdir()
  (workdir / "evaluation.json").write_text(json.dumps(report))
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
  return str(workdir)


def read(*workdirs):
  return [summary.read_run(workdir, summary.read_report(workdir)) for workdir in workdirs]


def run_compare(workdirs, out, **arguments):
  defaults = {"w": 0.5, "guidance": False, "examples": 1, "against": None, "pools": []}
  compare.compare(workdirs, str(out), **(defaults | arguments))


def cells(text, name):
  """The rows of this name, in every table of a Markdown text."""
  lines = [line.strip("| ").split(" | ") for line in text.splitlines()]
  return [line[1:] for line in lines if line[0] == name]


def test_the_best_w_is_that_of_the_lowest_mean_over_the_seeds(tmp_path):
  # Seed 0 alone would choose 0, and so would the single lowest distance.
  runs = read(
    write_run(tmp_path / "a", [result(1, 0.0, 1.0), result(1, 0.5, 2.0), result(1, 1.0, 9.0)]),
    write_run(tmp_path / "b", [result(1, 0.0, 8.0), result(1, 0.5, 4.0), result(1, 1.0, 9.0)]),
  )
  assert summary.best_w(runs, 1) == 0.5
  assert summary.best_w(runs[:1], 1) == 0.0
  assert summary.best_w(runs, 2) is None
  ((_, value, *_),) = cells("\n".join(compare.frechet_table({"x": runs}, None)), "x")
  assert value == "3.00 ± 1.41 (0.5)"


def test_a_w_that_one_seed_lacks_is_not_the_best(tmp_path):
  runs = read(
    write_run(tmp_path / "a", [result(1, 0.0, 1.0), result(1, 0.5, 2.0)]),
    write_run(tmp_path / "b", [result(1, 0.5, 4.0)]),
  )
  assert summary.best_w(runs, 1) == 0.5


def test_the_spread_is_over_trainings_and_not_over_seeds_of_noise(tmp_path):
  results = [result(1, 0.5, 1.0), result(1, 0.5, 3.0) | {"seed": 1}]
  (run,) = read(write_run(tmp_path / "a", results))
  assert compare.format_spread(summary.measured([run], "distance", 1, 0.5)) == "2.00"
  assert (
    compare.format_spread([1.0, 2.0, 4.5]) == f"2.50 ± {np.sqrt((1.5**2 + 0.5**2 + 2**2) / 2):.2f}"
  )


def test_a_folder_that_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
  monkeypatch.setattr(compare, "effective_guidance", lambda *_: pytest.fail("the work has begun"))
  workdir = write_run(tmp_path / "run", [result(1, 0.5, 2.0)])
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match="file/out cannot be written"):
    run_compare([workdir], tmp_path / "file" / "out", guidance=True)


def test_the_tables_show_what_each_run_has_and_a_dash_for_what_it_lacks(tmp_path):
  entries = [
    {"step": 4, "loss": 1.0, "coupling/attained_gain": 0.5},
    {"step": 4, "gradient_norm/consistency": 1.0},
    {"step": 8, "loss": 1.0, "coupling/attained_gain": 0.7, "steps_per_second": 5.0},
    {"step": 9, "loss": 1.0, "steps_per_second": 7.0},
    {"step": 10, "loss": 1.0, "steps_per_second": 100.0},
    {"step": 8, "gradient_norm/consistency": 2.0},
    {"step": 8, "gradient_norm/consistency": 6.0},
  ]
  half = result(1, 0.5, 4.0, spectrum=(4.0, 2.0, 0.5, 0.1), bands=(0.5, 1.0), accuracy=0.25)
  unguided = result(1, 0.0, 3.0)
  unguided["scores"]["classifier"] |= {"precision": 0.75, "recall": 0.5}
  workdirs = [
    write_run(tmp_path / "sm", [result(1, 0.5, 2.0), result(128, 0.5, 6.0)], variant="sm"),
    write_run(tmp_path / "ism", [unguided, half], entries=entries, straight=[(0.0, 2e-3)]),
  ]
  run_compare(workdirs, tmp_path / "out")
  text = (tmp_path / "out" / "comparison.md").read_text()
  unguided, guided, best, coverage, spectrum, training = cells(text, "`sm`")
  assert coverage == ["–"] * 4
  assert unguided == ["0.95", "–", "–", "–"]
  assert guided == ["0.95", "2.00", "6.00", "0.500"]
  assert best == ["0.95", "2.00 (0.5)", "6.00 (0.5)", "0.500 (0.5)"]
  assert spectrum == ["1.00", "1.00, 1.00", "1.00", "1.00, 1.00"]
  assert training == ["–"] * 6
  unguided, guided, _, coverage, spectrum, training = cells(text, "`ism`")
  assert coverage == ["0.750", "0.500", "–", "–"]
  assert unguided == ["0.999 / 0.95", "3.00", "–", "0.500"]
  assert guided == ["0.999 / 0.95", "4.00", "–", "0.250"]
  assert spectrum == ["0.40", "0.25, 1.00", "–", "–"]  # (0.5 + 0.1) / (1 + 0.5)
  assert training == ["2.00", "–", "0.600", "–", "3.000", "7.0"]
  assert "noise 77.00" in text
  for name in ("spectrum", "frechet_against_w", "frechet_against_steps"):
    assert (tmp_path / "out" / f"{name}.png").stat().st_size
  content = json.loads((tmp_path / "out" / "comparison.json").read_text())
  assert content["rows"]["`ism`"][0]["results"][1]["distance"] == 4.0


def test_a_row_is_named_by_what_changes_what_is_learnt(tmp_path):
  made = {
    "a": {},
    "b": {"seed": 1, "scan_steps": 1, "model__unroll": 1, "monitor__every": 0, "data__dir": "/x"},
    "c": {"objective__gamma": 6.0, "coupling__epsilon": 0.1},
    "d": {"variant": "sot"},
  }
  runs = read(*(write_run(tmp_path / name, [], **overrides) for name, overrides in made.items()))
  rows = summary.group(runs)
  ism = "`ism`, gamma=1.0, coupling.epsilon=0.05"  # wavelet.epsilon is another
  assert list(rows) == [ism, "`ism`, gamma=6.0, coupling.epsilon=0.1", "`sot`"]
  assert [run.workdir[-1] for run in rows[ism]] == ["a", "b"]


def test_runs_on_different_images_are_refused_by_name(tmp_path):
  workdirs = [
    write_run(tmp_path / "one", []),
    write_run(tmp_path / "two", [], data__name="photos/crops16"),
  ]
  with pytest.raises(ValueError, match=r"data\.name.*digits: .*one; photos/crops16: .*two"):
    run_compare(workdirs, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_floors_of_another_number_of_images_are_refused(tmp_path):
  """As evaluations had them before a floor was of the number of the samples."""
  workdir = write_run(tmp_path / "old", [result(1, 0.5, 2.0)])
  report = summary.read_report(workdir) | {"num_images": 500}
  (network,) = report["networks"]
  network |= {"reference_images": 1797}
  network["floor"]["is"] = "a bootstrap resample of the real images"
  with pytest.raises(
    ValueError, match=r"old has .* 500 samples in floors of 1797 .* evaluate --wo"
  ):
    summary.check_comparable({workdir: report})
  summary.check_comparable({workdir: report | {"num_images": 1797}})
  network["floor"]["count"] = 500
  summary.check_comparable({workdir: report})


def test_a_yardstick_of_another_number_of_images_says_so(tmp_path):
  workdir = write_run(tmp_path / "a", [result(1, 0.5, 2.0)])
  report = summary.read_report(workdir)
  report["yardsticks"] = {
    name: result(0, 0, 9.0) | {"num_images": count} for name, count in (("x", 1797), ("y", 60))
  }
  (tmp_path / "a" / "evaluation.json").write_text(json.dumps(report))
  run_compare([workdir], tmp_path / "out")
  text = (tmp_path / "out" / "comparison.md").read_text()
  assert "All are of 1797 samples" in text and "Yardsticks: x 9.00, y 9.00 (60 images)." in text


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda report: b"{", "damaged, or another file: Expecting"),
    (lambda report: b'{"a": "\xff"}', "can't decode byte 0xff"),
    (lambda report: [report], "it is list, not an object"),
    (lambda report: report | {"networks": {}}, "networks is an object, not list"),
    (lambda report: report | {"results": [{"steps": 1}]}, r"results\[0\] has no 'scores'"),
    (lambda report: report | {"config": {"variant": "ism"}}, "config has no 'batch_size'"),
    (lambda report: {k: v for k, v in report.items() if k != "yardsticks"}, "no 'yardsticks'"),
  ],
)
def test_an_evaluation_that_is_damaged_is_named_with_what_makes_it(tmp_path, change, message):
  workdir = pathlib.Path(write_run(tmp_path / "run", [result(1, 0.5, 2.0)]))
  path = workdir / "evaluation.json"
  content = change(json.loads(path.read_text()))
  path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
  with pytest.raises(ValueError, match=rf"evaluation\.json .*{message}.* ism_jax evaluate"):
    read(str(workdir))


def test_a_damaged_line_of_metrics_is_left_out(tmp_path, caplog):
  name = "coupling/attained_gain"
  entries = [{"step": i, name: i} for i in range(4)]
  workdir = write_run(tmp_path / "run", [result(1, 0.5, 2.0)], entries=entries)
  lines = pathlib.Path(workdir, "metrics.jsonl").read_bytes().splitlines()
  lines[1] = lines[1][:9] + b"\xff"
  lines[2] = b"[3]"
  pathlib.Path(workdir, "metrics.jsonl").write_bytes(b"\n".join(lines))
  (run,) = read(workdir)
  assert run.training[name] == 1.5
  assert "2 lines are damaged and left out, such as line 2" in caplog.text


def test_a_guidance_that_no_run_was_evaluated_at_is_refused(tmp_path):
  workdir = write_run(tmp_path / "a", [result(1, 0.0, 1.0), result(1, 1.0, 1.0)])
  with pytest.raises(ValueError, match=r"evaluated at --w=0\.5; there are \[0\.0, 1\.0\]"):
    run_compare([workdir], tmp_path / "out")


def test_the_loss_of_each_jump_is_that_of_the_last_quarter_of_the_training():
  entries = [{"step": i, "loss": 1.0, "consistency/d_1_64": float(i)} for i in range(8)]
  entries += [{"step": 7, "gradient_norm/consistency": 1.0}]
  entries[7]["consistency/d_1"] = 5.0
  assert summary.jump_losses(entries) == {"1/64": 6.5, "1": 5.0}
  assert summary.jump_losses([]) == {}


def test_rows_that_differ_in_one_key_are_set_against_it(tmp_path):
  jumps = [{"step": 8, "loss": 1.0, "consistency/d_1_2": 0.25, "coupling/class_shift": 0.5}]
  paired = [jumps[0] | {"coupling/attained_gain": 0.9}]
  four = {"results": [result(1, 0.5, 4.0), result(8, 0.5, 3.0)], "entries": paired}
  workdirs = [
    write_run(tmp_path / "k8", [result(1, 0.5, 3.0)], entries=paired, coupling__pool_size=8),
    write_run(tmp_path / "k4", **four),
    write_run(tmp_path / "k4b", [result(1, 0.5, 5.0)], seed=1),
    write_run(tmp_path / "k16", [result(1, 0.5, 2.0)], coupling__pool_size=16),
    write_run(tmp_path / "free", [result(1, 0.5, 9.0)], variant="no_sot", entries=jumps),
    write_run(tmp_path / "other", [result(1, 0.5, 7.0)], objective__gamma=6.0),
    write_run(tmp_path / "far", [result(1, 0.5, 8.0)], variant="interval"),
  ]
  points = summary.against(read(*workdirs), "coupling.pool_size")
  k4, k8, k16 = "K=4\nn=256", "K=8\nn=512", "K=16\nn=1024"
  assert list(points) == ["independent", k4, k8, k16]
  panels = {
    "Fréchet distance, in floors, w = 0.5": {
      "NFE 1": {"independent": [9.0], k4: [4.0, 5.0], k8: [3.0], k16: [2.0]},
      "NFE 8": {k4: [3.0]},
    },
    "attained gain of OT": {"": {k4: [0.9], k8: [0.9]}},
    "class shift": {"": {"independent": [0.5], k4: [0.5], k8: [0.5]}},
    "consistency loss, end of training": {
      "d = 1/2": {"independent": [0.25], k4: [0.25], k8: [0.25]}
    },
  }
  assert summary.panels(points, "coupling.pool_size", 0.5) == panels
  del panels["attained gain of OT"], panels["class shift"]
  assert summary.panels(points, "ema.target_decay", 0.5) == panels
  run_compare(workdirs, tmp_path / "out", against="coupling.pool_size")
  assert (tmp_path / "out" / "against_coupling.pool_size.png").stat().st_size


@pytest.mark.parametrize(
  ("key", "message"),
  [
    ("ema.target_decay", "no two of the runs differ only in ema.target_decay"),
    ("ema.target", "not a key"),
    ("log.every", "not a key"),
  ],
)
def test_a_key_that_no_two_rows_differ_in_alone_is_refused(tmp_path, key, message):
  runs = read(
    write_run(tmp_path / "a", [], log__every=1),
    write_run(tmp_path / "b", [], ema__target_decay=0.5, objective__gamma=6.0),
  )
  with pytest.raises(ValueError, match=message):
    summary.against(runs, key)


def test_the_figures_numbers_are_means_and_spreads_of_the_runs(tmp_path):
  both = [result(1, 0.0, 1.0, spectrum=(8.0, 2.0, 1.0, 0.5)), result(1, 0.5, 4.0)]
  rows = {
    "ism": read(
      write_run(tmp_path / "a", both),
      write_run(tmp_path / "b", [result(1, 0.0, 2.0, bands=(2.0, 3.0)), result(1, 0.5, 6.0)]),
    ),
    "sm": read(write_run(tmp_path / "c", [result(1, 0.5, 3.0)], variant="sm")),
  }
  assert summary.frechet_by_w(rows) == {1: {"ism": {0.0: [1.0, 2.0], 0.5: [4.0, 6.0]}}}
  ratios = summary.spectra(rows, 1, 0.0)
  assert ratios == {"spectrum": {"ism": [1.5, 1.0, 1.0, 1.0]}, "bands": {"ism": [1.0, 2.0]}}
  assert set(summary.spectra(rows, 1, 0.5)["bands"]) == {"ism", "sm"}


@pytest.mark.parametrize("penalty", [0.0, 100.0])
def test_the_gain_of_a_pool_is_that_of_an_optimal_assignment_of_squared_distances(key, penalty):
  n, shape = 48, (4, 4, 1)
  x0, x1 = jax.random.normal(key, (2, n, *shape))
  c = np.arange(n, dtype=np.int32) % 3
  cfg = couplings.CouplingConfig(
    coupling="ot",
    pool_size=1,
    epsilon=0.01,
    pairing="permutation",
    class_penalty=penalty,
    max_iterations=2000,
    threshold=1e-4,
    momentum=1.5,
  )
  gain = compare.pool_gain(x0, x1, c, key, cfg, num_classes=3)
  flat0, flat1 = (np.asarray(x, np.float64).reshape(n, -1) for x in (x0, x1))
  squared = np.square(flat1[:, None] - flat0[None]).mean(-1)
  # With a large penalty no pair crosses classes: three assignments, one in each class.
  classes = [np.arange(n)] if penalty == 0 else [np.flatnonzero(c == k) for k in range(3)]
  total = 0.0
  for some in classes:
    cost = squared[np.ix_(some, some)]
    total += cost[scipy.optimize.linear_sum_assignment(cost)].sum()
  optimal = (squared.mean() - total / n) / 2
  np.testing.assert_allclose(gain["optimal_gain"], optimal, rtol=1e-4)
  assert 0.9 * optimal < gain["gain"] <= optimal * (1 + 1e-4)


def test_pools_are_measured_for_every_size_and_penalty_on_the_configs_images(monkeypatch):
  calls = []

  def pool_gain(x0, x1, c, key, cfg, num_classes):
    calls.append((x0.shape, x1.shape, c.shape, cfg.pool_size, cfg.class_penalty, cfg.coupling))
    assert np.abs(x1).max() == 1 and num_classes == 10
    return {"gain": float(len(calls)), "optimal_gain": None}

  monkeypatch.setattr(compare, "pool_gain", pool_gain)
  gains = compare.pool_gains(files.as_dict(tiny_config("interval")), [1, 2])
  each = [(1, 5.0), (1, 0.0), (2, 5.0), (2, 0.0)]
  shape = lambda k: (64 * k, 8, 8, 1)
  assert calls == [
    (shape(k), shape(k), (64 * k,), k, penalty, "ot") for k, penalty in each for _ in range(3)
  ]
  assert gains[1] == {
    "K": 1,
    "n": 64,
    "class_penalty": 0.0,
    "gain": 5.0,
    "optimal_gain": None,
  }


WRONG = [
  (["--out=x"], "Error: no runs to compare: name the workdirs of evaluated runs."),
  (["a"], "Error: --out is missing"),
  (["--out=x", "--pools=1,two", "a"], "Error: flag --pools"),
  (["--out=x", "--examples=0", "a"], "Error: flag --examples=0"),
  (["--out=x", "--nosuch", "a"], "Error: --nosuch is no flag of this command."),
  (["--out=x", "nosuch"], "Error: nosuch/evaluation.json is missing"),
]


@pytest.mark.slow
def test_wrong_flags_end_in_one_line():
  script = (
    "import json, sys\n"
    "from absl.testing import flagsaver\n"
    "from ism_jax.evaluation import compare\n"
    "from ism_jax.runtime import commands\n"
    "compare.define_flags()\n"
    "for arguments in json.loads(sys.argv[1]):\n"
    "  with flagsaver.flagsaver():\n"
    "    try:\n"
    "      compare.main(commands.parse_flags(['compare', *arguments]))\n"
    "      print('no error')\n"
    "    except SystemExit as error:\n"
    "      print(error)\n"
  )
  wrong = json.dumps([arguments for arguments, _ in WRONG])
  command = [sys.executable, "-c", script, wrong]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  lines = done.stdout.splitlines()
  assert len(lines) == len(WRONG), done.stderr
  for line, (arguments, message) in zip(lines, WRONG, strict=True):
    assert message in line, arguments


@pytest.mark.parametrize(("low", "high"), [(3.0, 4.1), (0.9, 1.1), (0.02, 0.9), (1e-5, 3.0)])
def test_a_logarithmic_axis_is_labelled_with_enough_plain_numbers(low, high):
  figure, ax = plt.subplots()
  ax.plot([low, high])
  figures._log2(ax.yaxis)
  labels = [label.get_text() for label in ax.yaxis.get_ticklabels()]
  plt.close(figure)
  assert 4 <= len(labels) <= 9 and len(set(labels)) == len(labels)
  assert all(0.7 * low <= float(label) <= 1.4 * high for label in labels)
