"""Programs read from their HLO, with known answers; and compilation for TPUs that are not there."""

import json
import os
import pathlib
import re
import subprocess
import sys
import types

from examples import tiny_config
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from ism_jax import experiment
from ism_jax.performance import aot, hlo, topology
from ism_jax.runtime import chips, sharding

ROOT = pathlib.Path(__file__).parent.parent.parent


def mesh_of(n):
  auto = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((n,), ("data",), axis_types=auto, devices=jax.devices()[:n])


def text_of(function, *shapes, devices=8, split=False):
  """Optimised HLO of a function of float32 arrays, mapped over devices."""
  in_specs = P("data") if split else P()
  mapped = jax.shard_map(
    function, mesh=mesh_of(devices), in_specs=in_specs, out_specs=P(), check_vma=False
  )
  abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(mapped).lower(*abstract).compile().as_text()


def summed_five_times(x):
  return jax.lax.scan(lambda c, _: (jax.lax.psum(c, "data") * 0.1, None), x, length=5)[0]


def without_trip_counts(text):
  """As XLA for TPUs writes it."""
  return re.sub(r'"known_trip_count":\{"n":"\d+"\}', "", text)


@pytest.mark.parametrize("edit", [lambda text: text, without_trip_counts])
def test_a_sum_in_a_loop_of_five_counts_five_times(edit):
  profile = hlo.read(edit(text_of(summed_five_times, (100,))), 8, {})
  assert profile.payload() == {"all-reduce": 5 * 400}
  (collective,) = profile.collectives
  assert (collective.devices, collective.times) == (8, 5)
  assert collective.sent == 2 * 7 / 8 * 400
  assert not profile.unknown and not profile.assumed


def test_loops_within_loops_multiply():
  def function(x):
    return jax.lax.scan(lambda c, _: (summed_five_times(c), None), x, length=3)[0]

  text = without_trip_counts(text_of(function, (100,)))
  assert hlo.read(text, 8, {}).payload() == {"all-reduce": 15 * 400}


def test_a_loop_until_convergence_counts_as_often_as_assumed_or_once_and_is_named():
  def function(x):
    with jax.named_scope("until_small"):
      body = lambda c: jax.lax.psum(c, "data") * 0.01
      return jax.lax.while_loop(lambda c: c[0] > 1e-3, body, x)

  text = text_of(function, (100,))
  unknown = hlo.read(text, 8, {"another": 9})
  assert unknown.payload() == {"all-reduce": 400}
  (name,) = unknown.unknown
  assert "until_small" in name
  assumed = hlo.read(text, 8, {"until_small": 9})
  assert assumed.payload() == {"all-reduce": 9 * 400}
  assert assumed.assumed == {name: 9} and not assumed.unknown


def test_each_kind_of_collective_has_its_payload_and_its_share_to_send():
  def function(x):
    whole = jax.lax.all_gather(x, "data", tiled=True)
    part = jax.lax.psum_scatter(2 * whole, "data", tiled=True)
    turned = jax.lax.all_to_all(part, "data", 0, 0, tiled=True)
    passed = jax.lax.ppermute(turned, "data", [(i, (i + 1) % 8) for i in range(8)])
    return whole.sum() + passed

  text = text_of(function, (6400,), split=True)
  sizes = {c.kind: (c.payload, c.sent) for c in hlo.read(text, 8, {}).collectives}
  assert sizes == {
    "all-gather": (25_600, 7 / 8 * 25_600),
    "reduce-scatter": (25_600, 7 / 8 * 25_600),
    "all-to-all": (3200, 7 / 8 * 3200),
    "collective-permute": (3200, 3200),
  }


def test_groups_of_devices_are_those_that_take_part_together():
  groups = [[0, 1], [2, 3], [4, 5], [6, 7]]
  function = lambda x: jax.lax.psum(x, "data", axis_index_groups=groups)
  (collective,) = hlo.read(text_of(function, (100,)), 8, {}).collectives
  assert collective.group == (0, 1) and collective.sent == 400


@pytest.mark.parametrize(
  ("groups", "first"),
  [
    ("{{0,4},{1,5},{2,6},{3,7}}", (0, 4)),
    ("[2,4]<=[8]", (0, 1, 2, 3)),
    ("[4,2]<=[2,4]T(1,0)", (0, 4)),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3)),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
  ],
)
def test_groups_are_read_in_all_forms_in_which_xla_writes_them(groups, first):
  text = ASYNC.replace("{{0,1,2,3,4,5,6,7}}", groups)
  (collective,) = hlo.read(text, 8, {}).collectives
  assert collective.group == first


def test_a_sum_that_the_partitioner_adds_is_found_too():
  split = NamedSharding(mesh_of(8), P("data"))
  x = jax.ShapeDtypeStruct((80, 25), jnp.float32, sharding=split)
  text = jax.jit(lambda x: x.sum(0)).lower(x).compile().as_text()
  assert hlo.read(text, 8, {}).payload() == {"all-reduce": 100}


# One gather that XLA for TPUs runs beside a loop of three: begun before it, ended after it, and
# written out again in the fusion within.
ASYNC = """HloModule m, is_scheduled=true

%begin (a: f32[10]) -> (f32[10], f32[80]) {
  %a = f32[10]{0} parameter(0)
  %g.1 = f32[80]{0} all-gather(%a), channel_id=6, replica_groups={{0,1,2,3,4,5,6,7}}, ASYNC
  ROOT %s = (f32[10]{0}, f32[80]{0}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%during (b: f32[10], w: f32[80], z: f32[5]) -> (f32[5], f32[10], f32[80]) {
  %b = f32[10]{0} parameter(0)
  %w = f32[80]{0} parameter(1)
  %z = f32[5]{0} parameter(2)
  %g.2 = f32[80]{0} all-gather(%b), channel_id=6, replica_groups={{0,1,2,3,4,5,6,7}}, ASYNC
  %z2 = f32[5]{0} add(%z, %z)
  ROOT %r = (f32[5]{0}, f32[10]{0}, f32[80]{0}) tuple(%z2, %b, %w)
}

%body (p: (s32[], f32[5], f32[10], f32[80])) -> (s32[], f32[5], f32[10], f32[80]) {
  %p = (s32[], f32[5]{0}, f32[10]{0}, f32[80]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  %pz = f32[5]{0} get-tuple-element(%p), index=1
  %pb = f32[10]{0} get-tuple-element(%p), index=2
  %pw = f32[80]{0} get-tuple-element(%p), index=3
  %f = (f32[5]{0}, f32[10]{0}, f32[80]{0}) fusion(%pb, %pw, %pz), kind=kLoop, calls=%during
  %fz = f32[5]{0} get-tuple-element(%f), index=0
  %fb = f32[10]{0} get-tuple-element(%f), index=1
  %fw = f32[80]{0} get-tuple-element(%f), index=2
  ROOT %t = (s32[], f32[5]{0}, f32[10]{0}, f32[80]{0}) tuple(%j, %fz, %fb, %fw)
}

%until (q: (s32[], f32[5], f32[10], f32[80])) -> pred[] {
  %q = (s32[], f32[5]{0}, f32[10]{0}, f32[80]{0}) parameter(0)
  %k = s32[]{:T(128)} get-tuple-element(%q), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%k, %three), direction=LT
}

ENTRY %main (x: f32[10], y: f32[5]) -> f32[5] {
  %x = f32[10]{0} parameter(0)
  %y = f32[5]{0:T(128)S(1)} parameter(1)
  %zero = s32[] constant(0)
  %start = (f32[10]{0}, f32[80]{0}) fusion(%x), kind=kCustom, calls=%begin
  %sa = f32[10]{0} get-tuple-element(%start), index=0
  %sw = f32[80]{0} get-tuple-element(%start), index=1
  %t0 = (s32[], f32[5]{0}, f32[10]{0}, f32[80]{0}) tuple(%zero, %y, %sa, %sw)
  %loop = (s32[], f32[5]{0}, f32[10]{0}, f32[80]{0}) while(%t0), condition=%until, body=%body
  ROOT %out = f32[5]{0} get-tuple-element(%loop), index=1
}
""".replace("ASYNC", 'backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}')


def test_a_gather_that_runs_beside_a_loop_counts_once():
  profile = hlo.read(ASYNC, 8, {})
  assert profile.payload() == {"all-gather": 320}
  assert profile.collectives[0].times == 1
  # The gather, three times z + z, and three times the counter: two numbers in, one out.
  assert profile.hbm_bytes == (40 + 320) + 3 * (20 + 20) + 3 * (4 + 4 + 4) + 4 * (4 + 4 + 1)


def test_what_lies_on_the_chip_is_no_traffic_of_the_main_memory():
  on_chip = ASYNC.replace("%z2 = f32[5]{0}", "%z2 = f32[5]{0:T(128)S(1)}").replace(
    "(f32[5]{0}, f32[10]{0}, f32[80]{0}) fusion", "(f32[5]{0:S(1)}, f32[10]{0}, f32[80]{0}) fusion"
  )
  assert hlo.read(ASYNC, 8, {}).hbm_bytes - hlo.read(on_chip, 8, {}).hbm_bytes == 3 * 20


def test_a_loop_over_rows_reads_each_row_once_not_all_rows_each_time():
  """Sums 100 rows and keeps the partial sums: a row in, the sum in and out, a row out.

  With XLA's copies about eight rows an iteration, not the two hundred of two whole arrays.
  """

  def function(x):
    return jax.lax.scan(lambda c, row: (c + row, c), jnp.zeros(10_000), x)[1]

  profile = hlo.read(text_of(function, (100, 10_000), devices=1), 1, {})
  row = 40_000
  assert 4 * 100 * row <= profile.hbm_bytes < 10 * 100 * row


# A piece of an array is brought onto the chip for a kernel, whose metadata has lines of its own.
KERNEL = """HloModule m, is_scheduled=true

ENTRY %main (x: f32[100,10]) -> (f32[30], f32[7]) {
  %x = f32[100,10]{1,0} parameter(0)
  %s = ((f32[100,10]{1,0}), f32[2,10]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:2], [0:10]}
  %piece = f32[2,10]{1,0:S(1)} slice-done(%s)
  %c = (f32[100,10]{1,0}, f32[100,10]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %copy = f32[100,10]{1,0} copy-done(%c)
  %k = (f32[30]{0}, f32[7]{0:S(1)}) custom-call(%piece, %copy), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
  "name": "attention",
  "blocks": {
}
}}
  %first = f32[30]{0} get-tuple-element(%k), index=0
  %second = f32[7]{0:S(1)} get-tuple-element(%k), index=1
  %twice = f32[30]{0} add(%first, %first), backend_config={"window_config":{"estimated_cycles":"21"}}
  ROOT %t = (f32[30]{0}, f32[7]{0:S(1)}) tuple(%twice, %second)
}
"""  # noqa: E501


def test_a_slice_moves_its_piece_and_a_kernel_its_operands_and_results():
  profile = hlo.read(KERNEL, 1, {})
  piece, whole, result = 4 * 2 * 10, 4 * 100 * 10, 4 * 30
  # The piece is read, and lies on the chip then, as does the kernel's second result.
  assert profile.hbm_bytes == piece + 2 * whole + (whole + result) + (result + result)


def test_xlas_cycles_are_added_up_as_often_as_they_run():
  assert hlo.read(KERNEL, 1, {}).cycles == 21
  cycles = 'calls=%during, backend_config={"window_config":{"estimated_cycles":"5"}}'
  in_loop = ASYNC.replace("calls=%during", cycles)
  assert hlo.read(in_loop, 8, {}).cycles == 3 * 5


# A step of three layers: in their loop a kernel with a cost estimate, attention whose name XLA left
# only on what it fused, a copy of its result, a bias and an MLP; outside one of each other part.
STEP = """HloModule m, is_scheduled=true

%fused (a: f32[10,10], b: f32[10]) -> f32[10] {
  %a = f32[10,10]{1,0} parameter(0)
  %b = f32[10]{0} parameter(1)
  %n = f32[10]{0} negate(%b), metadata={op_name="NET/blocks/norm1/neg"}
  %e = f32[10,10]{1,0} exponential(%a), metadata={op_name="NET/blocks/attn/exp"}
  ROOT %d = f32[10]{0} dot(%e, %n), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (p: (s32[]{:S(2)}, f32[10,10], f32[10])) -> (s32[]{:S(2)}, f32[10,10], f32[10]) {
  %p = (s32[]{:S(2)}, f32[10,10]{1,0}, f32[10]{0}) parameter(0)
  %i = s32[]{:S(2)} get-tuple-element(%p), index=0
  %w = f32[10,10]{1,0} get-tuple-element(%p), index=1
  %x = f32[10]{0} get-tuple-element(%p), index=2
  %k = f32[10]{0} custom-call(%w, %x), custom_call_target="tpu_custom_call", metadata={op_name="NET/blocks/attn/pallas_call"}, backend_config={"custom_call_config":{"body":"TUzvUg==","cost_estimate":{"flops":"5000","transcendentals":"7","bytes_accessed":"9"}}}
  %f = f32[10]{0} fusion(%w, %k), kind=kOutput, calls=%fused, backend_config={"estimated_cycles":"11"}
  %v = f32[2,5]{1,0} bitcast(%f)
  %c = f32[2,5]{0,1} copy(%v), backend_config={"estimated_cycles":"2"}
  %u = f32[10]{0} bitcast(%c)
  %q = f32[10]{0} add(%u, %u), metadata={op_name="NET/blocks/attn/qkv/add"}
  %m = f32[10]{0} tanh(%q), metadata={op_name="NET/blocks/fc2/tanh"}, backend_config={"estimated_cycles":"3"}
  ROOT %t = (s32[]{:S(2)}, f32[10,10]{1,0}, f32[10]{0}) tuple(%i, %w, %m)
}

%until (r: (s32[]{:S(2)}, f32[10,10], f32[10])) -> pred[]{:S(2)} {
  %r = (s32[]{:S(2)}, f32[10,10]{1,0}, f32[10]{0}) parameter(0)
  ROOT %less = pred[]{:S(2)} constant(true)
}

ENTRY %main (w: f32[10,10], x: f32[10]) -> f32[10] {
  %w = f32[10,10]{1,0} parameter(0)
  %x = f32[10]{0} parameter(1)
  %s = (f32[10,10]{1,0:S(1)}, f32[10,10]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %near = f32[10,10]{1,0:S(1)} copy-done(%s)
  %one = f32[]{:S(2)} constant(1)
  %zero = f32[10]{0} broadcast(%one), dimensions={}, metadata={op_name="NET/broadcast_in_dim"}
  %a = f32[10]{0} add(%x, %zero), metadata={op_name="NET/x_embedder/add"}
  %b = f32[10]{0} add(%a, %a), metadata={op_name="NET/blocks/norm2/add"}
  %l = f32[10]{0} multiply(%b, %b), metadata={op_name="jit(train_steps)/shard_map/mul"}
  %i = s32[]{:S(2)} constant(0)
  %t0 = (s32[]{:S(2)}, f32[10,10]{1,0}, f32[10]{0}) tuple(%i, %w, %l)
  %loop = (s32[]{:S(2)}, f32[10,10]{1,0}, f32[10]{0}) while(%t0), condition=%until, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %y = f32[10]{0} get-tuple-element(%loop), index=2
  %g = f32[10]{0} all-reduce(%y), replica_groups={{0,1}}, metadata={op_name="NET/psum"}
  %z = f32[10]{0} custom-call(%g), custom_call_target="Elsewhere", metadata={op_name="jit(train_steps)/call"}
  %h = f32[10]{0} sine(%x)
  %o = f32[10]{0} subtract(%h, %z), metadata={op_name="jit(train_steps)/sub"}
  ROOT %end = f32[10]{0} negate(%o)
}
""".replace("NET", "jit(train_steps)/shard_map/jvp(SiT)")  # noqa: E501


def test_the_traffic_of_a_step_is_that_of_its_parts():
  profile = hlo.read(STEP, 2, {})
  sizes = {name: part.bytes for name, part in profile.parts.items()}
  vector, matrix = 4 * 10, 4 * 100
  assert sizes == {
    # Three times: the kernel and the fusion read a matrix and a vector, and write a vector; the
    # copy, nameless but made of the fusion's result, reads a vector and writes one.
    "attention": 3 * (2 * (matrix + 2 * vector) + 2 * vector),
    "qkv and proj": 3 * 2 * vector,  # an operand that is named twice is read once
    "MLP": 3 * 2 * vector,
    "prefetches": matrix,  # read; it lies on the chip then
    "copies, casts and zeroing": vector,
    "embedders and final layer": 3 * vector,
    "norms and modulation": 2 * vector,
    "losses": 2 * vector,
    "collectives": 2 * vector,
    # A kernel, a subtraction, and its negative, which has no name.
    "optimizer and EMAs": (2 + 3 + 2) * vector,
    "other": 2 * vector,  # the sine: it has no name, nor has what it is of
  }
  assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
  assert profile.hbm_bytes == sum(sizes.values())
  cycles = {name: part.cycles for name, part in profile.parts.items() if part.cycles}
  assert cycles == {"attention": 3 * (11 + 2), "MLP": 3 * 3}
  assert profile.cycles == 3 * (11 + 2 + 3)


def test_a_kernel_has_its_bytes_and_the_flops_of_its_estimate():
  parts = hlo.read(STEP, 2, {}).parts
  in_loop = hlo.Kernel(bytes=4 * (100 + 10 + 10), flops=5000, times=3)
  without_estimate = hlo.Kernel(bytes=4 * (10 + 10), flops=0, times=1)
  assert parts["attention"].kernels == [in_loop]
  assert parts["optimizer and EMAs"].kernels == [without_estimate]


def test_a_kernel_takes_at_least_its_bytes_or_its_flops_whichever_is_longer():
  top = a_topology("v5e:1x2", (1, 2), chips.V5E)  # 819 GB/s, 197 TFLOP/s a chip, 1.5 GHz
  by_bytes = hlo.Kernel(bytes=819e6, flops=197e6, times=2)  # 1 ms each
  by_flops = hlo.Kernel(bytes=819e3, flops=197e9, times=3)  # 1 ms each
  traffic = {
    "attention": hlo.Traffic(4e6, 1.5e6, [by_bytes]),
    "MLP": hlo.Traffic(2e6, 0, [by_flops]),
  }
  profile = hlo.Profile((), traffic, {}, ())
  seconds = aot.estimate(top, profile, at_peak=0)
  assert seconds["custom_calls_at_least"] == pytest.approx(5e-3)
  assert seconds["cycles"] == pytest.approx(1e-3 + 5e-3)
  assert aot.by_part(top.chip, profile, calls=2) == {
    "attention": {
      "hbm_bytes": 2e6,
      "custom_calls": 1,
      "seconds": pytest.approx((1e-3 + 2e-3) / 2),
    },
    "MLP": {"hbm_bytes": 1e6, "custom_calls": 1.5, "seconds": pytest.approx(3e-3 / 2)},
  }


def test_both_estimates_count_the_links():
  top = a_topology("v5e:1x2", (1, 2), chips.V5E)
  collective = hlo.Collective("all-reduce", 10**9, (0, 1), 1)
  profile = hlo.Profile((collective,), {"attention": hlo.Traffic(819e6, 3e6)}, {}, ())
  links = 1e9 / 50e9 + 2e-6
  seconds = aot.estimate(top, profile, at_peak=2 * 197e9)
  expected = {"compute": 1e-3, "memory": 1e-3, "links": links, "custom_calls_at_least": 0}
  assert seconds == pytest.approx(expected | {"total": 1e-3 + links, "cycles": 2e-3 + links})


def test_text_that_is_no_module_says_so():
  with pytest.raises(ValueError, match=re.escape("compiled.as_text()")):
    hlo.read("nothing\n", 1, {})


def a_topology(name, shape, chip, slices=1):
  devices = [types.SimpleNamespace(coords=coords) for coords in np.ndindex(*shape)] * slices
  return topology.Topology(name, shape, slices, chip, tuple(devices))


@pytest.mark.parametrize(
  ("name", "shape", "links", "diameter"),
  [
    ("v5e", (8, 8), 2, 14),  # no links from end to end in a slice smaller than the pod
    ("v5e", (8, 16), 3, 7 + 8),
    ("v5e", (16, 16), 4, 16),
    ("v4", (4, 4, 4), 6, 6),
    ("v5p", (2, 2, 1), 2, 2),
    ("v6e", (1, 1), 0, 0),
  ],
)
def test_links_and_hops_are_those_of_the_grid(name, shape, links, diameter):
  top = a_topology(name, shape, getattr(chips, name.upper()))
  assert top.ring(tuple(range(len(top.devices)))) == (links, diameter)


def test_a_collective_over_one_axis_has_the_links_and_hops_of_that_axis():
  top = a_topology("v5e:4x16", (4, 16), chips.V5E)
  along_x, along_y = tuple(range(0, 64, 16)), tuple(range(16))
  assert top.ring(along_x) == (1, 3) and top.ring(along_y) == (2, 8)  # 16 chips wrap around
  gather = hlo.Collective("all-gather", 10**9, along_x, 1)
  np.testing.assert_allclose(top.seconds(gather), 3 / 4 * 1e9 / 50e9 + 3e-6)


def test_a_collective_takes_its_bytes_over_the_links_and_its_hops():
  top = a_topology("v5e:16x16", (16, 16), chips.V5E)
  reduce = hlo.Collective("all-reduce", 10**9, tuple(range(256)), 3)
  expected = 3 * (2 * 255 / 256 * 1e9 / (4 * 50e9) + 2 * 16 * 1e-6)
  np.testing.assert_allclose(top.seconds(reduce), expected)
  one_link = hlo.Collective("collective-permute", 10**9, tuple(range(256)), 1)
  np.testing.assert_allclose(top.seconds(one_link), 1e9 / 50e9 + 1e-6)


def test_what_goes_to_another_slice_goes_over_the_network():
  two = a_topology("2xv5e:16x16", (16, 16), chips.V5E, slices=2)
  send = hlo.Collective("send", 10**9, tuple(range(512)), 2)
  np.testing.assert_allclose(two.seconds(send), 2 * (1e9 / 3.125e9 + 1e-6))


@pytest.mark.parametrize(
  ("name", "reason"),
  [
    ("nonsense", "is unknown; write one of v4, v5e, v5p, v6e"),
    ("v9:2x2", "is unknown; write one of v4, v5e, v5p, v6e"),
    ("v5e:8x8x8", "a slice of v5e has 2 axes and at most 256 chips"),
    ("v5e:16x32", "a slice of v5e has 2 axes and at most 256 chips"),
    ("v4:4x4", "a slice of v4 has 3 axes"),
    ("v5e:0x2", "does not exist"),
  ],
)
def test_a_topology_that_does_not_exist_says_what_does(name, reason):
  with pytest.raises(ValueError, match=re.escape(reason)):
    topology.describe(name)


def test_assumptions_that_cannot_be_and_a_missing_libtpu_are_errors(monkeypatch):
  exp = experiment.parse(tiny_config())
  monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: object())
  with pytest.raises(ValueError, match="sinkhorn_iterations=301: give 1 to"):
    aot.setting(exp, 301, 10)
  with pytest.raises(ValueError, match="greedy_rounds=0"):
    aot.setting(exp, 60, 0)
  monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=re.escape('pip install "ism_jax[aot]"')):
    aot.setting(exp, 60, 10)


@pytest.mark.parametrize(
  ("message", "needed"),
  [
    (
      "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
      "required for HLO temporaries (84.49G) exceeds available HBM (15.75G). HLO module: jit_f.",
      84.49 * 2**30,
    ),
    (
      "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
      "Used 16.40G of 15.75G hbm. Exceeded hbm capacity by 665.60M.",
      16.4 * 2**30,
    ),
    ("INTERNAL: something else (1.00G)", None),
  ],
)
def test_the_memory_that_a_refused_program_needs_is_read_from_the_refusal(message, needed):
  assert aot.out_of_memory(message) == needed


def refusal(name):
  """What libtpu says of a program that holds 512 GiB."""
  mesh = sharding.data_mesh(topology.describe(name).devices[:1])
  everywhere = sharding.replicated(mesh)
  x = jax.ShapeDtypeStruct((64, 1024, 1024, 1024), jnp.float32, sharding=everywhere)
  with pytest.raises(jax.errors.JaxRuntimeError) as error:
    jax.jit(lambda x: 2 * x, out_shardings=everywhere).lower(x).compile()
  return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_chips_have_the_memory_that_libtpu_says_they_have(name):
  message = refusal(name)
  assert aot.out_of_memory(message) == 512 * 2**30
  available = float(re.search(r"available HBM \(([\d.]+)G\)", message)[1])
  # Versions of libtpu keep a few MB more or less for themselves.
  np.testing.assert_allclose(topology.describe(name).chip.memory / 2**30, available, atol=0.02)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """Digits, replicated and sharded, for four chips, beside a topology that does not exist."""
  runs = {}
  for placement in ("replicated", "sharded"):
    out = tmp_path_factory.mktemp(placement)
    smaller = {
      "placement": placement,
      "batch_size": 16,
      "coupling.pool_size": 2,
      "scan_steps": 2,
      "evaluation.batch_size": 8,
    }
    arguments = ["--config=configs/digits.py", f"--out={out}", "--topology=v5e:3x5,v5e:2x2"]
    arguments += [f"--config.{key}={value}" for key, value in smaller.items()]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "ism_jax", "aot", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (out / "aot.json").exists(), run.stderr
    runs[placement] = run, json.loads((out / "aot.json").read_text()), out
  return runs


@pytest.mark.slow
def test_a_topology_that_does_not_exist_is_reported_and_the_others_are_too(command):
  run, content, out = command["replicated"]
  missing, there = content["topologies"]
  assert "'v5e:3x5' does not exist; name another. libtpu says" in missing["error"]
  assert there["fits"] and there["chips"] == 4
  assert run.returncode == 1
  assert run.stderr.splitlines()[-1] == "Error: 1 of 2 topologies; see above."
  table = (out / "aot.md").read_text()
  assert table in run.stdout and "| v5e:2x2 | 4 | replicated |" in table


@pytest.mark.slow
def test_a_replicated_step_sums_the_gradient_and_sends_nothing_else(command):
  _, content, _ = command["replicated"]
  step = content["topologies"][1]["programs"]["train_steps"]
  assert list(step["collective_bytes"]) == ["all-reduce"]
  gradient = 4 * content["parameters"]
  np.testing.assert_allclose(step["collective_bytes"]["all-reduce"], gradient, rtol=0.02)
  np.testing.assert_allclose(step["sent_bytes"], 2 * 3 / 4 * gradient, rtol=0.02)
  # The state's five trees are the arguments (small arrays are padded), read and written each step.
  assert 5 * gradient <= step["memory"]["arguments"] < 1.2 * 5 * gradient
  assert step["hbm_bytes"] > 2 * 5 * gradient


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_nearly_all_traffic_of_a_step_belongs_to_a_named_part(command, placement):
  _, content, out = command[placement]
  step = content["topologies"][1]["programs"]["train_steps"]
  sizes = {name: part["hbm_bytes"] for name, part in step["parts"].items()}
  np.testing.assert_allclose(sum(sizes.values()), step["hbm_bytes"], rtol=1e-12)
  assert sizes.get("other", 0) < 0.1 * step["hbm_bytes"]
  # Parameters, moments and averages are read and written, mostly by way of copies onto the chip.
  if placement == "replicated":
    assert 9 * 4 * content["parameters"] < sizes["optimizer and EMAs"] + sizes["prefetches"]
  assert f"| attention | {sizes['attention'] / 1e9:.2f} |" in (out / "aot.md").read_text()


@pytest.mark.slow
def test_a_sharded_step_gathers_the_parameters_and_scatters_the_gradient(command):
  _, content, _ = command["sharded"]
  report = content["topologies"][1]
  step, parameters = report["programs"]["train_steps"], content["parameters"]
  sizes = step["collective_bytes"]
  # Parameters and target average, in bfloat16 where XLA multiplies in it.
  assert 2 * 2 * parameters < sizes["all-gather"] < 2 * 4 * parameters
  # Most of the gradient; arrays that 8 rows a chip do not divide are summed everywhere.
  assert sizes["reduce-scatter"] > 0.7 * 4 * parameters
  assert 0.99 < (sizes["reduce-scatter"] + sizes["all-reduce"]) / (4 * parameters) < 1.05
  assert all(report["state"][tree] < 0.27 * 4 * parameters for tree in ("params", "target_ema"))


@pytest.mark.slow
def test_between_slices_goes_the_sum_of_each_alone():
  """Each chip sends its part of the slice's gradient, a quarter, and of some arrays more."""
  config = tiny_config()
  config.update({"batch_size": 32, "scan_steps": 2, "placement": "replicated"})
  exp = experiment.parse(config)
  report = aot.analyse(exp, topology.describe("2xv5e:2x2"), iterations=60, rounds=10)
  sent = report["programs"]["train_steps"]["collective_bytes"]["send"]
  gradient = report["state"]["params"]
  assert gradient / 4 <= sent < 1.4 * gradient / 4


@pytest.mark.slow
def test_the_coupling_counts_its_loops_and_never_gathers_the_pool(command):
  report = command["replicated"][1]["topologies"][1]
  couple = report["programs"]["couple"]
  assert couple["unknown_loops"] == []
  assert sorted(couple["assumed_loops"].values()) == [6, 10]  # 60 iterations in tens, and rounds
  assert set(report["coupling_share"]) == {"flops", "hbm_bytes", "sent_bytes", "seconds"}
  assert "all-gather" not in couple["collective_bytes"]
