"""FLOPs of the model, the training step, the coupling and the sampler, counted by hand.

By hand, since XLA's count of a compiled program takes the body of each loop once, and also counts
what is computed twice to save memory. A multiply-add is two. Of the network the matrix products
count and nothing else: the rest (norms, softmax, activations, the optimizer) is about 1 % of
SiT-S's and less of larger ones. Of the coupling, which is mostly not matrix products, everything
counts, an exponential as one.

Per image, with T tokens, width D, depth L, patches of P values and 256 sinusoids:
  a block: qkv 6 T D^2, attention 4 T^2 D, its projection 2 T D^2, MLP 16 T D^2, adaLN 12 D^2
  the rest: patches in and out 4 T D P, final adaLN 4 D^2, each scalar embedder 2 (256 D + D^2)
"""

from typing import NamedTuple

from ism_jax.experiment import Experiment

_SINUSOIDS = 256  # of `model.sinusoid`


class Forward(NamedTuple):
  """FLOPs of one image through the network once.

  Attributes:
    total: all.
    attention: in attention's two products.
    outside_blocks: in embedders and the final layer.
  """

  total: int
  attention: int
  outside_blocks: int


class Step(NamedTuple):
  """FLOPs of one training step, of the global batch.

  Attributes:
    gradient: the forward pass that is differentiated, and the backward pass at twice its cost.
    targets: the calls without gradient that make the targets.
    recomputed: what remat computes again in the backward pass; no FLOPs of the model.
  """

  gradient: float
  targets: float
  recomputed: float

  @property
  def model(self) -> float:
    """What the method asks for, however it is computed: the numerator of a utilisation."""
    return self.gradient + self.targets


class Coupling(NamedTuple):
  """FLOPs of pairing one pool: in matrix products, and element by element."""

  matrix: float
  elementwise: float


def forward(exp: Experiment) -> Forward:
  """FLOPs of one image through the network."""
  depth, width, _ = exp.model.dimensions
  height, wide, channels = exp.image_shape
  patch = exp.model.patch**2 * channels
  tokens = height * wide // exp.model.patch**2
  attention = depth * 4 * tokens**2 * width
  dense = depth * (24 * tokens * width**2 + 12 * width**2)
  embedders = 2 + exp.objective.intrinsic + (exp.objective.t_interval_max > 0)  # t, d, w, interval
  outside = (
    4 * tokens * width * patch + 4 * width**2 + embedders * 2 * (_SINUSOIDS * width + width**2)
  )
  return Forward(attention + dense + outside, attention, outside)


def target_calls(exp: Experiment) -> float:
  """Calls of the network without gradient, per image of the batch.

  A guidance row takes the conditional and the unconditional velocity; a consistency row two half
  steps, with fixed guidance each of them conditional and unconditional. With MeanFlow's identity it
  takes the guiding pair and a derivative in forward mode, which costs two, and along the network's
  own velocity one call more.
  """
  objective = exp.objective
  _, guidance, consistency = objective.shares
  per_consistency = 2 if objective.intrinsic else 4
  if objective.target == "identity":
    per_consistency = 4 + (objective.tangent == "network")
  return (2 * guidance + per_consistency * consistency) / sum(objective.shares)


def gradient_calls(exp: Experiment) -> float:
  """Calls of the network with gradient, per image: 1, and in a rollout half the jumps once more."""
  shares = exp.objective.shares
  return 1 + exp.objective.rollout * shares[2] / 2 / sum(shares)


def forward_equivalents(exp: Experiment) -> float:
  """A step's cost in forward passes: 3 for the gradient, and the targets' calls."""
  return 3 * gradient_calls(exp) + target_calls(exp)


def step(exp: Experiment, attention: str = "xla") -> Step:
  """FLOPs of one training step of the global batch.

  Args:
    exp: the experiment.
    attention: what computes it, see `attention.choose`.
  """
  once = forward(exp)
  again = {
    "none": 0,
    "names": 0 if attention == "tpu" else once.attention,
    "dots": once.attention,  # products with a batch axis are not kept
    "full": once.total - once.outside_blocks,
  }[exp.model.remat]
  if attention != "xla":
    again += once.attention // 2  # a kernel's backward pass begins with the logits
  m, calls = exp.batch_size, gradient_calls(exp)
  return Step(3 * calls * m * once.total, target_calls(exp) * m * once.total, calls * m * again)


def sample(exp: Experiment, schedule) -> int:
  """FLOPs of drawing one image in the steps of `paths.parse_schedule`."""
  if exp.objective.guidance == "two_pass":
    twice = len(schedule)
  else:
    twice = 0 if exp.objective.intrinsic else sum(d == 0 for _, d in schedule)
  return (len(schedule) + twice) * forward(exp).total


def couple(exp: Experiment, iterations: float, rounds: float) -> Coupling:
  """FLOPs of pairing one pool of n images of D values.

  Per element of the [n, n] cost: 8 for the deviation of the centred cost; 14 for an iteration of
  Sinkhorn, two log-sum-exps of (f + g - cost) / epsilon, and 7 more every tenth iteration for its
  error; 3 for a round of the greedy permutation; 9 for the diagnostics.

  Args:
    exp: the experiment.
    iterations: of Sinkhorn; they depend on the data.
    rounds: of the greedy permutation; they depend on the data.
  """
  if exp.coupling.coupling != "ot":
    return Coupling(0, 0)
  n = exp.coupling.pool_size * exp.batch_size
  height, width, channels = exp.image_shape
  greedy = 3 * rounds if exp.coupling.pairing == "permutation" else 3
  return Coupling(2 * n**2 * height * width * channels, n**2 * (17 + 14.7 * iterations + greedy))
