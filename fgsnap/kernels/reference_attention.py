"""The arithmetic of attention: norms, rotations and temperatures of heads, and scores over gathered keys."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from fgsnap.kernels.ops import AlibiArgs, AttentionArgs, NormArgs, TemperatureArgs
from fgsnap.kernels.reference_plan import Gather

# Scores that one attention call may hold.
SCORE_BYTES = 64 << 20


def normalized(x: torch.Tensor, args: NormArgs, mean_square: torch.Tensor | None = None) -> torch.Tensor:
    """Normalise the last axis in float32; the weight multiplies after rounding to x's dtype unless float32_weight.

    ``mean_square`` [..., 1] is that of the vectors x are parts of; None: they are whole.
    """
    wide = x.float()
    if args.kind == "ln":
        assert mean_square is None, "ranks do not know the mean of the whole"
        wide = wide - wide.mean(-1, keepdim=True)
    if mean_square is None:
        mean_square = wide.square().mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(mean_square + args.eps)
    if not args.float32_weight:
        wide = wide.to(x.dtype).float()
    if args.weight is not None:
        wide = wide * (args.weight.float() + 1.0 if args.unit_offset else args.weight.float())
    if args.bias is not None:
        wide = wide + args.bias.float()
    return wide.to(x.dtype)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first dims of every head of x [T, heads, D]: computed in float32, rounded once to x's dtype."""
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), dim=-1)


def tempered(q: torch.Tensor, positions: torch.Tensor, args: TemperatureArgs) -> torch.Tensor:
    """q [T, N, D] times what its positions [T] call for; spec.QueryTemperature defines it."""
    count = positions + 1
    if args.kind == "logn":
        factor = (count.double().log() / math.log(args.base)).clamp(min=1.0)
    else:
        factor = 1.0 + args.scale * (count // args.base).double().log1p()
    return (q.float() * factor.float()[:, None, None]).to(q.dtype)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: Gather, args: AttentionArgs) -> torch.Tensor:
    """What q [G * n, N, D] makes of the group's gathered keys [G, L, K, D] and values [G, L, K, E]: [G * n, N, E]."""
    count, queries, keys = group.shape
    kv_heads, shared = args.kv_heads, args.heads // args.kv_heads
    q = q.view(count, queries, kv_heads, shared, -1).permute(0, 2, 3, 1, 4)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if args.softcap is None and args.alibi is None and args.sinks is None and k.shape[-1] == v.shape[-1]:
        out = plain(q, k, v, group.mask, args.scale)
    else:
        # Queries attend in pieces, none of whose scores take more than SCORE_BYTES if one query's do not.
        piece = max(1, SCORE_BYTES // (4 * count * args.heads * keys))
        pieces = zip(q.split(piece, dim=3), group.mask.split(piece, dim=1), strict=True)
        out = torch.cat([explicit(some, k, v, mask, group.keys, args) for some, mask in pieces], dim=3)
    return out.permute(0, 3, 1, 2, 4).reshape(count * queries, args.heads, -1)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Torch's own attention of q [G, K, N / K, n, D] over k, v [G, K, L, D]: [G, K, N / K, n, D]."""
    count, kv_heads, shared, queries, dim = q.shape
    if queries == 1:
        # The query heads of one key head stand in for several queries: no key is repeated.
        folded = q.reshape(count, kv_heads, shared, dim)
        out = functional.scaled_dot_product_attention(
            folded, k, v, mask[:, None].expand(-1, 1, shared, -1), scale=scale
        )
    else:
        heads = q.reshape(count, kv_heads * shared, queries, dim)
        out = functional.scaled_dot_product_attention(heads, k, v, mask[:, None], scale=scale, enable_gqa=shared > 1)
    return out.view(q.shape)


def explicit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, args: AttentionArgs
) -> torch.Tensor:
    """Attention as ops.AttentionArgs words it, in float32: q [G, K, N / K, n, D] over k, v [G, K, L, D or E]."""
    scores = q.float() @ k.float()[:, :, None].transpose(-1, -2) * args.scale
    if args.softcap is not None:
        scores = (scores / args.softcap).tanh() * args.softcap
    by_head = (args.kv_heads, args.heads // args.kv_heads, 1, 1)
    if args.alibi is not None:
        scores = scores + biases(positions[:, None, None, None], args.alibi, by_head)
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    if args.sinks is None:
        shares = scores.softmax(-1)
    else:
        sinks = args.sinks.float().view(by_head).expand(*scores.shape[:-1], 1)
        shares = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
    return (shares @ v.float()[:, :, None]).to(q.dtype)


def biases(positions: torch.Tensor, args: AlibiArgs, by_head: tuple[int, ...]) -> torch.Tensor:
    """ALiBi's addends for keys at ``positions`` [G, 1, 1, 1, L]: [G, K, N / K, 1, L]."""
    slopes, at = args.slopes.float().view(by_head), positions.float()
    product = (slopes * at.bfloat16().float()).bfloat16().float() if args.bfloat16 else slopes * at
    return product * args.scale
