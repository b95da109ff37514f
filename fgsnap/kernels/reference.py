"""The reference backend: every op in plain torch, on any device torch has. The truth other backends are compared with.

It reads plainly before it runs fast, with two exceptions: memory stays bounded (a weight of another dtype than the
activations is upcast a few rows at a time; attention gathers keys, and holds scores, in pieces of bounded size), and on
an accelerator a step uploads its plan and then waits for the device only where tokens pick experts and at the end.

    reference_plan          a batch on the device, and which keys its queries see
    reference_attention     the arithmetic of heads and scores
    reference_experts       which experts a token picks
    reference_sampling      tokens and logprobs from logits
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch.nn import functional

from fgsnap.errors import HostError
from fgsnap.kernels.ops import (
    ActivationArgs,
    AttentionArgs,
    Batch,
    ExpertsArgs,
    HeadArgs,
    LatentArgs,
    NormArgs,
    RouterArgs,
    Sampled,
    Samples,
    Sampling,
)
from fgsnap.kernels.ranks import Ranks
from fgsnap.kernels.reference_attention import attention, normalized, rotated, tempered
from fgsnap.kernels.reference_experts import route, turned_round
from fgsnap.kernels.reference_plan import Plan, Reach, RopeTable
from fgsnap.kernels.reference_ranks import Group
from fgsnap.kernels.reference_sampling import picked, scored

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What the decoder can ask for today; the ops below compute more.
FEATURES = """
attention.rope attention.window attention.chunk attention.softcap attention.query_temperature
attention.qkv_bias attention.out_bias
query_temperature.logn query_temperature.step query_temperature.scale
layer.attn_in layer.attn_out layer.mlp_in layer.mlp_out layer.sequential layer.parallel layer.post
layer.residual_multiplier
mlp.silu mlp.gelu mlp.gelu_tanh mlp.relu mlp.clamped_swiglu mlp.clamp mlp.gated mlp.bias mlp.down_bias
norm.rms norm.ln norm.l2 norm.weight norm.bias norm.unit_offset norm.float32_weight
embedding.scale embedding.round_scale head.tied head.bias head.multiplier head.softcap
    attention.alibi alibi.scaled alibi.bfloat16 attention.sinks attention.qk_norm attention.value_dim attention.latent
    qk_norm.norm qk_norm.head qk_norm.projection qk_norm.after_rope latent.norm latent.query_rank
    layer.experts experts.router experts.shared shared.gated_by_input router.softmax router.sigmoid router.select_first
    router.bias router.selection_bias router.groups router.kept_groups router.max router.top2_sum router.renormalize
    router.scale router.weigh_input dynamic.powers_of_two embedding.learned_positions embedding.position_offset
rope.linear rope.dynamic rope.llama3 rope.yarn rope.longrope rope.proportional_head_dim
yarn.beta_fast yarn.beta_slow yarn.truncate
"""

# Rows of a weight that is upcast at once: a chunk that stays in a core's cache costs one read of the weight, not three.
UPCAST_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
# Logits that ``score`` may hold.
SCORED_BYTES = 16 << 20
# Rows of a matrix that the layout "words32" stores side by side.
PANEL = 32

P = ParamSpec("P")
R = TypeVar("R")


def inference(op: Callable[P, R]) -> Callable[P, R]:
    """The op without autograd's bookkeeping, and with its types."""
    return cast("Callable[P, R]", torch.inference_mode()(op))


class Reference:
    """Implements ops.Ops with torch.

    Args:
        device: a torch device, such as "cpu", "cuda" or "cuda:1".
        dtype: of activations and of the KV cache; weights keep their own.
        threads: for torch's CPU ops; None leaves torch's choice.
        ranks: which tensor parallel rank this is, on CUDA with the device of its number; None: the only one.
    """

    name = "reference"
    supports = frozenset(FEATURES.split())

    def __init__(
        self, device: str = "cpu", dtype: str = "bfloat16", threads: int | None = None, ranks: Ranks | None = None
    ) -> None:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise HostError(
                f"The device {device} cannot be used.",
                "torch finds no CUDA device on this host, or is a build without CUDA.",
                "Use --device cpu, or install a CUDA build of torch.",
            )
        if ranks is not None and device.startswith("cuda"):
            device = f"cuda:{ranks.rank}"
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = device
        count = torch.get_num_threads()
        self.setting = f"torch {torch.__version__}, {count} thread{'s' * (count > 1)}"
        self.dtype = dtype
        self._device = torch.device(device)
        self._activation = DTYPES[dtype]
        self._upcast_bytes = UPCAST_BYTES.get(self._device.type, UPCAST_BYTES["cpu"])
        self._scratch = torch.empty(0, device=self._device)
        self._group = None if ranks is None else Group(ranks, self._device)

    # tensors

    def weight(self, data: memoryview, dtype: str, shape: Sequence[int], layout: str = "row") -> torch.Tensor:
        """Map bytes as a tensor; on CPU one of layout "row" is a view of ``data``, and others are copied into rows."""
        kind = DTYPES[dtype]
        assert data.nbytes == stored_bytes(kind, shape, layout) > 0
        with warnings.catch_warnings():
            # The snapshot is mapped read-only on purpose, and no op here writes to a weight.
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            flat = torch.frombuffer(data, dtype=kind if layout == "row" else torch.int32)
        if layout == "words32":
            flat = as_rows(flat, kind, shape)
        return flat.view(tuple(shape)).to(self._device)

    def rope(self, inverse_frequencies: Sequence[float], factor: float) -> RopeTable:
        """Keep the frequencies in float32 on the device."""
        return RopeTable(torch.tensor(inverse_frequencies, dtype=torch.float32, device=self._device), factor)

    def kv_cache(self, blocks: int, block_size: int, kv_heads: int, head_dim: int) -> torch.Tensor:
        """[2, slots, K, D]; pages of it that nothing touches cost no memory on CPU."""
        return self._cache(2, blocks * block_size, kv_heads, head_dim)

    def kv_block_bytes(self, block_size: int, kv_heads: int, head_dim: int) -> int:
        """K and V of every head, without padding."""
        return 2 * block_size * kv_heads * head_dim * int(self._activation.itemsize)

    def latent_cache(self, blocks: int, block_size: int, args: LatentArgs) -> torch.Tensor:
        """[slots, kv_rank + rope_dim]."""
        return self._cache(blocks * block_size, args.kv_rank + args.rope_dim)

    def latent_block_bytes(self, block_size: int, args: LatentArgs) -> int:
        """The latent and the rotated key, without padding."""
        return block_size * (args.kv_rank + args.rope_dim) * int(self._activation.itemsize)

    def _cache(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self._activation, device=self._device)

    @inference
    def plan(self, batch: Batch, block_size: int) -> Plan:
        """Upload the batch."""
        return Plan(batch, block_size, self._device)

    def taped(self, forward: Callable[[Plan], torch.Tensor], block_size: int) -> Callable[[Batch], torch.Tensor]:
        """Record nothing: call ``forward`` each time."""
        return lambda batch: forward(self.plan(batch, block_size))

    # ops

    @inference
    def embed(self, plan: Plan, table: torch.Tensor, scale: float, first: int = 0) -> torch.Tensor:
        """Look rows up, scale in float32, round once."""
        ids = plan.tokens - first
        outside = (ids < 0) | (ids >= len(table))
        x = functional.embedding(ids.masked_fill(outside, 0), table)
        if scale != 1.0:
            x = x.float() * scale
        return x.to(self._activation).masked_fill_(outside[:, None], 0.0)

    @inference
    def positions(self, plan: Plan, table: torch.Tensor, offset: int) -> torch.Tensor:
        """Look rows up."""
        return functional.embedding(plan.positions + offset, table).to(self._activation)

    @inference
    def norm(self, x: torch.Tensor, args: NormArgs) -> torch.Tensor:
        """As reference_attention.normalized says."""
        return normalized(x, args)

    @inference
    def norm_heads(
        self, qkv: torch.Tensor, args: AttentionArgs, query: NormArgs, key: NormArgs, heads: int
    ) -> torch.Tensor:
        """Normalise the two vectors of each row, and leave the values as they are."""
        kv_width = args.kv_heads * args.head_dim
        queries, keys, values = qkv.split([args.heads * args.head_dim, kv_width, kv_width], dim=-1)
        of_queries = of_keys = None
        if self._group is not None:
            squares = [part.float().square().sum(-1, keepdim=True) for part in (queries, keys)]
            of_queries, of_keys = self._group.sum(torch.cat(squares, dim=-1)).split(1, dim=-1)
            of_queries = of_queries / (heads * args.head_dim)
            of_keys = of_keys / (self._group.size * kv_width)  # a key head counts once for each rank that holds it
        return torch.cat((normalized(queries, query, of_queries), normalized(keys, key, of_keys), values), dim=-1)

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
        """Norm, rotate and temper in float32, round once, scatter k and v to their slots."""
        heads = qkv.view(len(qkv), -1, args.head_dim)
        q, k, v = heads.float().split([args.heads, args.kv_heads, args.kv_heads], dim=1)
        norms = args.qk_norm
        if norms is not None and not norms.after_rope:
            q, k = normalized(q, norms.query), normalized(k, norms.key)
        if rope is not None:
            q, k = rotated(q, *plan.rotation(rope)), rotated(k, *plan.rotation(rope))
        if norms is not None and norms.after_rope:
            q, k = normalized(q, norms.query), normalized(k, norms.key)
        if args.temperature is not None:
            q = tempered(q, plan.positions, args.temperature)
        cache[0].index_copy_(0, plan.slots, k.to(cache.dtype))
        cache[1].index_copy_(0, plan.slots, v.to(cache.dtype))
        return q.to(qkv.dtype).reshape(len(qkv), -1)

    @inference
    def attend(self, q: torch.Tensor, cache: torch.Tensor, plan: Plan, args: AttentionArgs) -> torch.Tensor:
        """Gather each group's keys and values, and attend over them."""
        queries = q.view(len(q), args.heads, args.head_dim)
        out = torch.empty_like(queries)
        key_bytes = 2 * args.kv_heads * args.head_dim * cache.element_size()
        for group in plan.gathers(Reach(args.window, args.chunk), key_bytes):
            shape = (*group.keys.shape, args.kv_heads, args.head_dim)
            k, v = (part.index_select(0, group.slots).view(shape) for part in cache)
            out.index_copy_(0, group.rows, attention(queries.index_select(0, group.rows), k, v, group, args))
        return out.view(len(q), -1)

    @inference
    def latent_append(
        self,
        q: torch.Tensor,
        latent: torch.Tensor,
        cache: torch.Tensor,
        plan: Plan,
        args: LatentArgs,
        rope: RopeTable | None,
    ) -> torch.Tensor:
        """Multiply every head's query by its up_keys, which so need not multiply every key."""
        heads = q.view(len(q), args.heads, args.nope_dim + args.rope_dim)
        nope, turned = heads.split([args.nope_dim, args.rope_dim], dim=-1)
        normed, key = latent.float()[:, None].split([args.kv_rank, args.rope_dim], dim=-1)
        normed = normalized(normed, args.norm)
        if rope is not None:
            turned, key = rotated(turned, *plan.rotation(rope)), rotated(key, *plan.rotation(rope))
        cache.index_copy_(0, plan.slots, torch.cat((normed, key), dim=-1)[:, 0].to(cache.dtype))
        return torch.cat((by_head(nope, args.up_keys), turned), dim=-1).reshape(len(q), -1)

    @inference
    def latent_attend(self, q: torch.Tensor, cache: torch.Tensor, plan: Plan, args: LatentArgs) -> torch.Tensor:
        """One key head, whose values are the latents within its keys, serves all query heads."""
        width = args.kv_rank + args.rope_dim
        queries = q.view(len(q), args.heads, width)
        mean = torch.empty_like(queries[..., : args.kv_rank])
        shared = AttentionArgs(args.heads, 1, width, args.scale)
        for group in plan.gathers(Reach(), width * cache.element_size()):
            keys = cache.index_select(0, group.slots).view(*group.keys.shape, 1, width)
            values = keys[..., : args.kv_rank]
            mean.index_copy_(0, group.rows, attention(queries[group.rows], keys, values, group, shared))
        return by_head(mean, args.up_values).reshape(len(q), -1)

    @inference
    def activate(self, x: torch.Tensor, args: ActivationArgs) -> torch.Tensor:
        """The activation function, times the second half of x when gated."""
        if not args.gated:
            return activation(x, args.kind)
        gate, up = x.chunk(2, dim=-1)
        if args.kind == "clamped_swiglu":
            return clamped_swiglu(gate, up, args.clamp)
        return activation(gate, args.kind).mul_(up)

    @inference
    def gate(self, branch: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The sigmoid in float32."""
        return (branch.float() * self._upcast_linear(x.float(), weight).sigmoid()).to(branch.dtype)

    @inference
    def experts(self, x: torch.Tensor, router: RouterArgs, args: ExpertsArgs) -> torch.Tensor:
        """One expert after another takes the rows that picked it; their outputs are summed in float32."""
        logits = self._upcast_linear(x.float(), router.weight)
        experts, weights = route(logits if router.bias is None else logits + router.bias.float(), router)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert, picks in turned_round(experts, len(router.weight)):
            rows = picks // router.top_k
            out.index_add_(0, rows, self._expert(x[rows], weights.flatten()[picks, None], expert, args))
        return out.to(x.dtype)

    def _expert(self, x: torch.Tensor, weights: torch.Tensor, expert: int, args: ExpertsArgs) -> torch.Tensor:
        """One expert's weighed output [n, H] in float32 for its rows x [n, H] of weights [n, 1]."""
        if args.weigh_input:
            x = (x.float() * weights).to(x.dtype)
        up_bias = None if args.gate_up_bias is None else args.gate_up_bias[expert]
        down_bias = None if args.down_bias is None else args.down_bias[expert]
        inner = self.activate(self.linear(x, args.gate_up[expert], up_bias), args.activation)
        out = self.linear(inner, args.down[expert], down_bias).float()
        return out if args.weigh_input else out * weights

    @inference
    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """As Group.sum says; one rank's sum is complete."""
        return x if self._group is None else self._group.sum(x)

    @inference
    def gather(self, logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """One rank's logits are complete, but for padding."""
        if self._group is not None:
            logits = torch.cat(self._group.all(logits), dim=-1)
        return logits[:, :vocab_size]

    # results

    @inference
    def logits(self, x: torch.Tensor, plan: Plan, head: HeadArgs) -> torch.Tensor:
        """Float32 products, so that close candidates are not rounded into ties."""
        return self._logits(x.index_select(0, plan.rows).float(), head)

    @inference
    def score(
        self, x: torch.Tensor, plan: Plan, head: HeadArgs, vocab_size: int, targets: Sequence[int], top: int
    ) -> list[Sampled]:
        """Some rows' logits at a time."""
        assert len(targets) == len(plan.rows)
        rows = x.index_select(0, plan.rows).float()
        step = max(1, SCORED_BYTES // (4 * vocab_size))
        found: list[Sampled] = []
        for start in range(0, len(targets), step):
            stop = start + step
            logits = self.gather(self._logits(rows[start:stop], head), vocab_size)
            found += scored(logits, targets[start:stop], top)
        return found

    def _logits(self, x: torch.Tensor, head: HeadArgs) -> torch.Tensor:
        found = self._upcast_linear(x, head.weight[: head.vocab_size])
        if head.bias is not None:
            found += head.bias[: head.vocab_size]
        if head.multiplier != 1.0:
            found *= head.multiplier
        return found if head.softcap is None else (found / head.softcap).tanh_().mul_(head.softcap)

    @inference
    def sample(self, logits: torch.Tensor, how: Sequence[Sampling], positions: Sequence[int]) -> Samples:
        """As reference_sampling.picked says."""
        assert len(how) == len(positions) == len(logits)
        return picked(logits, how, positions)

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


def stored_bytes(kind: torch.dtype, shape: Sequence[int], layout: str) -> int:
    """What a tensor takes in the layout."""
    if layout == "row":
        return math.prod(shape) * int(kind.itemsize)
    assert layout == "words32" and len(shape) >= 2 and shape[-1] * kind.itemsize % 4 == 0
    assert len(shape) == 2 or shape[-2] % (2 * PANEL) == 0
    return -(-math.prod(shape[:-1]) // PANEL) * PANEL * shape[-1] * int(kind.itemsize)


def as_rows(words: torch.Tensor, kind: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """The rows of a matrix, or of a stack of them, from its words in the layout "words32"."""
    panels = words.view(-1, shape[-1] * kind.itemsize // 4, PANEL)
    rows = torch.empty(len(panels), PANEL, panels.shape[1], dtype=words.dtype).copy_(panels.transpose(1, 2))
    return rows.flatten().view(kind)[: math.prod(shape)]


def by_head(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """x [T, N, I] times each head's own matrix [N, O, I], in their common dtype: [T, N, O] of x's."""
    common = torch.promote_types(x.dtype, matrices.dtype)
    return torch.einsum("tni,noi->tno", x.to(common), matrices.to(common)).to(x.dtype)


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The activation functions of spec.Activation that stand alone. A new tensor."""
    if kind == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    functions: dict[str, Any] = {"silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu}
    return functions[kind](x)


def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, clamp: float | None) -> torch.Tensor:
    """(up + 1) gate sigmoid(1.702 gate) with gate at most ``clamp`` and up within it, as the gpt-oss models have it."""
    most = math.inf if clamp is None else clamp
    wide, other = gate.float().clamp(max=most), up.float().clamp(-most, most)
    return ((other + 1.0) * wide * (1.702 * wide).sigmoid()).to(gate.dtype)
