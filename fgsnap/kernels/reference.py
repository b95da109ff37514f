"""The reference backend: every op in plain torch, on any device torch has. The truth other backends are compared with.

It reads plainly before it runs fast, with two exceptions: memory stays bounded (a weight of another dtype than the
activations is upcast a few rows at a time, attention gathers keys in groups of bounded size), and on an accelerator a
step uploads its plan and then never waits for the device until tokens are sampled.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch.nn import functional

from fgsnap.errors import HostError
from fgsnap.kernels.ops import AttentionArgs, Batch, NormArgs, Sampled, Sampling

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
FEATURES = """
attention.rope attention.window attention.qkv_bias attention.out_bias
layer.attn_in layer.attn_out layer.mlp_in layer.mlp_out layer.sequential layer.parallel layer.post
layer.residual_multiplier
mlp.silu mlp.gelu mlp.gelu_tanh mlp.relu mlp.gated mlp.bias mlp.down_bias
norm.rms norm.ln norm.l2 norm.weight norm.bias norm.unit_offset norm.float32_weight
embedding.scale embedding.round_scale head.tied head.bias head.multiplier head.softcap
rope.linear rope.dynamic rope.llama3 rope.yarn rope.longrope rope.proportional_head_dim
yarn.beta_fast yarn.beta_slow yarn.truncate
"""

# Rows of a weight that is upcast at once: a chunk that stays in a core's cache costs one read of the weight, not three.
UPCAST_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
# Queries of one prompt chunk that attend together: later ones see more keys, so shorter runs waste fewer of them.
QUERY_RUN = 256
# Keys and values that one attention call may gather.
GATHER_BYTES = 64 << 20
# The first guess at how many tokens make up top_p; it grows until they do.
FIRST_NUCLEUS = 64


P = ParamSpec("P")
R = TypeVar("R")


def inference(op: Callable[P, R]) -> Callable[P, R]:
    """The op without autograd's bookkeeping, and with its types."""
    return cast("Callable[P, R]", torch.inference_mode()(op))


class RopeTable:
    """Inverse frequencies on the device and the factor on cos and sin."""

    def __init__(self, frequencies: torch.Tensor, factor: float) -> None:
        self.frequencies = frequencies
        self.factor = factor


class Run(NamedTuple):
    """Up to QUERY_RUN neighbouring queries of one sequence and the keys they can see, as host numbers."""

    sequence: int
    first_row: int
    first_position: int
    queries: int
    first_key: int
    last_key: int


class Gather(NamedTuple):
    """Runs of equal length that attend in one call: G runs, n queries each, L keys at most."""

    rows: torch.Tensor  # [G * n] indices into the step's tokens
    slots: torch.Tensor  # [G * L] cache slots; beyond a run's own keys its first key again, which the mask hides
    mask: torch.Tensor  # [G, 1, n, L]
    shape: tuple[int, int, int]


class Plan:
    """A batch on the device, with what several layers share: rotation tables, and key gathers for each window."""

    def __init__(self, batch: Batch, block_size: int, device: torch.device) -> None:
        check_batch(batch, block_size)
        self.batch = batch
        self.block_size = block_size
        self.device = device
        widest = max((len(table) for table in batch.block_tables), default=1)
        tables = [[*table, *[0] * (widest - len(table))] for table in batch.block_tables]
        sequences = [s for s in range(len(tables)) for _ in range(batch.starts[s], batch.starts[s + 1])]
        packed = upload([batch.tokens, batch.positions, sequences, batch.rows, *tables], device)
        self.tokens, self.positions, self.sequences, self.rows = packed[:4]
        self.tables = torch.stack(packed[4:]) if tables else torch.zeros(0, widest, dtype=torch.int64, device=device)
        self.slots = self._slots(self.sequences, self.positions)
        self._rotations: dict[RopeTable, tuple[torch.Tensor, torch.Tensor]] = {}
        self._gathers: dict[tuple[int | None, int], list[Gather]] = {}

    def rotation(self, rope: RopeTable) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotation of the batch's positions: cos and sin [T, 1, dims / 2]."""
        if rope not in self._rotations:
            angles = self.positions.float()[:, None, None] * rope.frequencies
            self._rotations[rope] = (angles.cos() * rope.factor, angles.sin() * rope.factor)
        return self._rotations[rope]

    def gathers(self, window: int | None, key_bytes: int) -> list[Gather]:
        """All attention of one layer as a few calls, none of which gathers more than GATHER_BYTES if it can help it."""
        keys = (window, max(1, GATHER_BYTES // key_bytes))
        if keys not in self._gathers:
            groups = grouped(runs(self.batch, window), keys[1])
            self._gathers[keys] = [self._gather(group, window) for group in groups]
        return self._gathers[keys]

    def _slots(self, sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        blocks = self.tables[sequences, positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size

    def _gather(self, group: list[Run], window: int | None) -> Gather:
        queries = group[0].queries
        keys = max(run.last_key - run.first_key for run in group) + 1
        columns = upload([list(column) for column in zip(*group, strict=True)], self.device)
        sequences, first_row, first_position, _, first_key, last_key = (column[:, None] for column in columns)
        query = torch.arange(queries, device=self.device)
        key = first_key + torch.arange(keys, device=self.device)
        slots = self._slots(sequences.expand_as(key), torch.where(key <= last_key, key, first_key))
        age = (first_position + query)[:, None, :, None] - key[:, None, None, :]
        mask = age >= 0 if window is None else (age >= 0) & (age < window)
        return Gather((first_row + query).flatten(), slots.flatten(), mask, (len(group), queries, keys))


def check_batch(batch: Batch, block_size: int) -> None:
    """What every scheduler owes every backend; a violation would read or write another sequence's keys."""
    assert batch.starts[0] == 0 and batch.starts[-1] == len(batch.tokens) == len(batch.positions)
    assert len(batch.starts) - 1 == len(batch.lengths) == len(batch.block_tables)
    for s, (length, table) in enumerate(zip(batch.lengths, batch.block_tables, strict=True)):
        start, stop = batch.starts[s], batch.starts[s + 1]
        assert start < stop and batch.positions[stop - 1] == length - 1 == batch.positions[start] + stop - start - 1
        assert length <= len(table) * block_size


def upload(columns: Sequence[Sequence[int]], device: torch.device) -> list[torch.Tensor]:
    """Host integers as device tensors, in one transfer."""
    flat = torch.tensor([value for column in columns for value in column], dtype=torch.int64).to(device)
    return list(flat.split([len(column) for column in columns]))


def runs(batch: Batch, window: int | None) -> list[Run]:
    """The batch's tokens as runs of queries, each with the range of keys that any of its queries sees."""
    found = []
    for s in range(len(batch.lengths)):
        for row in range(batch.starts[s], batch.starts[s + 1], QUERY_RUN):
            queries = min(QUERY_RUN, batch.starts[s + 1] - row)
            position = batch.positions[row]
            first_key = 0 if window is None else max(0, position - window + 1)
            found.append(Run(s, row, position, queries, first_key, position + queries - 1))
    return found


def grouped(all_runs: list[Run], most_keys: int) -> list[list[Run]]:
    """Runs of equal length together, similar key counts side by side, at most ``most_keys`` padded keys a group."""
    by_queries: dict[int, list[Run]] = defaultdict(list)
    for run in sorted(all_runs, key=lambda run: run.last_key - run.first_key, reverse=True):
        by_queries[run.queries].append(run)
    groups = []
    for equal in by_queries.values():
        while equal:
            size = max(1, most_keys // (equal[0].last_key - equal[0].first_key + 1))
            groups.append(equal[:size])
            equal = equal[size:]
    return groups


class Reference:
    """Implements ops.Ops with torch.

    Args:
        device: a torch device, such as "cpu", "cuda" or "cuda:1".
        dtype: of activations and of the KV cache; weights keep their own.
        threads: for torch's CPU ops; None leaves torch's choice.
    """

    name = "reference"
    supports = frozenset(FEATURES.split())

    def __init__(self, device: str = "cpu", dtype: str = "bfloat16", threads: int | None = None) -> None:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise HostError(
                f"The device {device} cannot be used.",
                "torch finds no CUDA device on this host, or is a build without CUDA.",
                "Use --device cpu, or install a CUDA build of torch.",
            )
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = device
        self.dtype = dtype
        self._device = torch.device(device)
        self._activation = DTYPES[dtype]
        self._upcast_bytes = UPCAST_BYTES.get(self._device.type, UPCAST_BYTES["cpu"])
        self._scratch = torch.empty(0, device=self._device)

    def weight(self, data: memoryview, dtype: str, shape: Sequence[int]) -> torch.Tensor:
        """Map bytes as a tensor; on CPU the tensor is a view of ``data``."""
        kind = DTYPES[dtype]
        assert data.nbytes == math.prod(shape) * kind.itemsize and data.nbytes > 0
        with warnings.catch_warnings():
            # The snapshot is mapped read-only on purpose, and no op here writes to a weight.
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            flat = torch.frombuffer(data, dtype=kind)
        return flat.view(tuple(shape)).to(self._device)

    def rope(self, inverse_frequencies: Sequence[float], factor: float) -> RopeTable:
        """Keep the frequencies in float32 on the device."""
        return RopeTable(torch.tensor(inverse_frequencies, dtype=torch.float32, device=self._device), factor)

    def kv_cache(
        self, layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int
    ) -> Sequence[torch.Tensor]:
        """One [2, slots, K, D] tensor a layer; untouched pages of it cost no memory on CPU."""
        shape = (2, blocks * block_size, kv_heads, head_dim)
        return [torch.empty(shape, dtype=self._activation, device=self._device) for _ in range(layers)]

    def kv_token_bytes(self, kv_heads: int, head_dim: int) -> int:
        """K and V of every head, without padding."""
        return 2 * kv_heads * head_dim * int(self._activation.itemsize)

    @inference
    def plan(self, batch: Batch, block_size: int) -> Plan:
        """Upload the batch."""
        return Plan(batch, block_size, self._device)

    @inference
    def embed(self, plan: Plan, table: torch.Tensor, scale: float) -> torch.Tensor:
        """Look rows up; a scale multiplies in float32."""
        rows = functional.embedding(plan.tokens, table)
        return (rows if scale == 1.0 else rows.float() * scale).to(self._activation)

    @inference
    def norm(self, x: torch.Tensor, args: NormArgs) -> torch.Tensor:
        """Normalise in float32; the weight multiplies after rounding to the activation dtype unless float32_weight."""
        wide = x.float()
        if args.kind == "ln":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + args.eps)
        if not args.float32_weight:
            wide = wide.to(x.dtype).float()
        if args.weight is not None:
            wide = wide * (args.weight.float() + 1.0 if args.unit_offset else args.weight.float())
        if args.bias is not None:
            wide = wide + args.bias.float()
        return wide.to(x.dtype)

    @inference
    def add(self, x: torch.Tensor, branch: torch.Tensor, multiplier: float = 1.0) -> torch.Tensor:
        """Add in place."""
        return x.add_(branch, alpha=multiplier)

    @inference
    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """One matrix product in the common dtype of x and weight."""
        if weight.dtype == x.dtype:
            return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        common = torch.promote_types(x.dtype, weight.dtype)
        out = self._upcast_linear(x.to(common), weight)
        return (out if bias is None else out + bias).to(x.dtype)

    @inference
    def append(
        self, qkv: torch.Tensor, cache: torch.Tensor, plan: Plan, args: AttentionArgs, rope: RopeTable | None
    ) -> torch.Tensor:
        """Rotate in float32, round once, scatter k and v to their slots."""
        heads, kv_heads = args.heads, args.kv_heads
        parts = qkv.view(len(qkv), heads + 2 * kv_heads, args.head_dim)
        turned = parts[:, : heads + kv_heads]
        if rope is not None:
            turned = rotated(turned, *plan.rotation(rope))
        cache[0].index_copy_(0, plan.slots, turned[:, heads:].to(cache.dtype))
        cache[1].index_copy_(0, plan.slots, parts[:, heads + kv_heads :].to(cache.dtype))
        return turned[:, :heads].reshape(len(qkv), -1)

    @inference
    def attend(self, q: torch.Tensor, cache: torch.Tensor, plan: Plan, args: AttentionArgs) -> torch.Tensor:
        """Gather each group's keys and values, and attend over them."""
        queries = q.view(len(q), args.heads, args.head_dim)
        out = torch.empty_like(queries)
        key_bytes = 2 * args.kv_heads * args.head_dim * cache.element_size()
        for group in plan.gathers(args.window, key_bytes):
            out.index_copy_(0, group.rows, attention(queries.index_select(0, group.rows), cache, group, args))
        return out.view(len(q), -1)

    @inference
    def activate(self, x: torch.Tensor, kind: str, gated: bool) -> torch.Tensor:
        """The activation function, times the second half of x when gated."""
        if not gated:
            return activation(x, kind)
        gate, up = x.chunk(2, dim=-1)
        return activation(gate, kind).mul_(up)

    @inference
    def logits(
        self,
        x: torch.Tensor,
        plan: Plan,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        vocab_size: int,
        multiplier: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """Float32 products, so that close candidates are not rounded into ties."""
        found = self._upcast_linear(x.index_select(0, plan.rows).float(), weight[:vocab_size])
        if bias is not None:
            found += bias[:vocab_size]
        if multiplier != 1.0:
            found *= multiplier
        return found if softcap is None else (found / softcap).tanh_().mul_(softcap)

    @inference
    def sample(self, logits: torch.Tensor, how: Sequence[Sampling]) -> list[Sampled]:
        """All rows' health and greedy tokens at once, then each row that needs more by itself."""
        assert len(how) == len(logits)
        sound = (~logits.isnan().any(-1) & logits.isfinite().any(-1)).tolist()
        tokens = logits.argmax(-1).tolist() if len(how) else []
        for row, rule in enumerate(how):
            if not sound[row]:
                tokens[row] = -1
            elif rule.temperature > 0:
                tokens[row] = drawn(logits[row], rule)
        return [
            Sampled(token) if rule.logprobs < 0 or token < 0 else with_logprobs(logits[row], token, rule.logprobs)
            for row, (token, rule) in enumerate(zip(tokens, how, strict=True))
        ]

    @inference
    def top_two(self, logits: torch.Tensor) -> list[tuple[int, float]]:
        """As ops.Ops says; the margin of a vocabulary of one is infinite."""
        tokens = logits.argmax(-1).tolist()
        if logits.shape[-1] == 1:
            return [(token, math.inf) for token in tokens]
        best = logits.topk(2, dim=-1).values.double()
        return list(zip(tokens, (best[:, 0] - best[:, 1]).tolist(), strict=True))

    @inference
    def floats(self, x: torch.Tensor) -> memoryview:
        """A float32 copy on the host."""
        host = x.detach().to("cpu", torch.float32, copy=True).contiguous().view(-1)
        return memoryview(host.numpy())

    def _upcast_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiply in x's dtype; a weight of another dtype is upcast some rows at a time, into memory kept for it."""
        if weight.dtype == x.dtype:
            return functional.linear(x, weight)
        rows, columns = weight.shape
        step = max(1, self._upcast_bytes // (columns * x.element_size()))
        out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
        for start in range(0, rows, step):
            part = weight[start : start + step]
            torch.mm(x, self._upcast(part, x.dtype).T, out=out[:, start : start + len(part)])
        return out

    def _upcast(self, part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self._scratch.numel() < part.numel() or self._scratch.dtype != dtype:
            self._scratch = torch.empty(part.numel(), dtype=dtype, device=part.device)
        return self._scratch[: part.numel()].view(part.shape).copy_(part)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first dims of every head of x [T, heads, D]: computed in float32, rounded once."""
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), dim=-1)


def attention(q: torch.Tensor, cache: torch.Tensor, group: Gather, args: AttentionArgs) -> torch.Tensor:
    """Scaled dot product attention of q [G * n, N, D] over the group's gathered keys: [G * n, N, D]."""
    count, queries, keys = group.shape
    heads, kv_heads, dim = args.heads, args.kv_heads, args.head_dim
    k, v = (part.index_select(0, group.slots).view(count, keys, kv_heads, dim).transpose(1, 2) for part in cache)
    if queries == 1:
        # The query heads of one key head stand in for several queries: no key is repeated.
        folded = q.view(count, kv_heads, heads // kv_heads, dim)
        mask = group.mask.expand(count, 1, heads // kv_heads, keys)
        out = functional.scaled_dot_product_attention(folded, k, v, mask, scale=args.scale)
        return out.reshape(count, heads, dim)
    q = q.view(count, queries, heads, dim).transpose(1, 2)
    out = functional.scaled_dot_product_attention(q, k, v, group.mask, scale=args.scale, enable_gqa=heads != kv_heads)
    return out.transpose(1, 2).reshape(count * queries, heads, dim)


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The activation functions of spec.Activation that stand alone. A new tensor."""
    if kind == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    functions: dict[str, Any] = {"silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu}
    return functions[kind](x)


def drawn(row: torch.Tensor, how: Sampling) -> int:
    """A random token of one sound row of logits; ops.Sampling defines it."""
    top_k = how.top_k if 0 < how.top_k < len(row) else len(row)
    kept = largest(row, top_k)
    values = row[kept].double()
    weights = ((values - values.max()) / how.temperature).nan_to_num(nan=0.0).exp()
    if how.top_p < 1.0:
        nucleus = largest(values, nucleus_size(weights, how.top_p))
        kept, weights = kept[nucleus], weights[nucleus]
    running = weights.cumsum(0)
    index = int(torch.searchsorted(running, how.uniform * running[-1], right=True))
    # Rounding can leave the sum at the target: the first token at which it is complete is then the last with a share.
    return int(kept[min(index, int(torch.searchsorted(running, running[-1])))])


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices, ascending, of the ``count`` largest values; of equal ones the lowest indices."""
    if count >= len(values):
        return torch.arange(len(values), device=values.device)
    threshold = values.topk(count).values[-1]
    above = (values > threshold).nonzero()[:, 0]
    equal = (values == threshold).nonzero()[: count - len(above), 0]
    return torch.cat((above, equal)).sort().values


def nucleus_size(weights: torch.Tensor, top_p: float) -> int:
    """How many of the largest weights reach ``top_p`` of their sum. Looks at few of them when few suffice."""
    target = top_p * weights.sum()
    count = min(FIRST_NUCLEUS, len(weights))
    while True:
        running = weights.topk(count).values.cumsum(0)
        if count == len(weights) or running[-1] >= target:
            return min(int(torch.searchsorted(running, target)) + 1, count)
        count = min(8 * count, len(weights))


def with_logprobs(row: torch.Tensor, token: int, count: int) -> Sampled:
    """The token with its logprob, and the ``count`` most likely (ties: lowest id first) with theirs."""
    values = row.double()
    logprobs = values - values.logsumexp(0)
    ids = largest(row, min(count, len(row))).tolist() if count else []
    top = sorted(((i, float(logprobs[i])) for i in ids), key=lambda pair: (-pair[1], pair[0]))
    return Sampled(token, float(logprobs[token]), tuple(top))
