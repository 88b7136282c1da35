"""`flash_attn_func` as fa3-fwd 0.0.3 declares it, in plain torch: an autograd function around an operator, e4m3 in and bfloat16 out."""

from __future__ import annotations

import torch
from torch import Tensor

calls: list[tuple[torch.dtype, tuple[int, ...]]] = []
"""Dtype and shape of every query."""


@torch.library.custom_op("stand_in::flash_attn_forward", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    assert q.dtype == k.dtype == v.dtype, "FlashAttention-3 takes one dtype"
    calls.append((q.dtype, tuple(q.shape)))
    eight = q.dtype == torch.float8_e4m3fn
    assert all((d is not None) == eight for d in (q_descale, k_descale, v_descale))
    q, k, v = (
        x.double() if d is None else x.double() * _heads(d, x)
        for x, d in ((q, q_descale), (k, k_descale), (v, v_descale))
    )
    scores = torch.einsum("blhd,bshd->bhls", q, k) * softmax_scale
    if causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
        scores = scores.masked_fill(~keep, -torch.inf)
    out = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v)
    return out.to(torch.bfloat16 if eight else calls[-1][0])


@forward.register_fake
def _(q, k, v, q_descale, k_descale, v_descale, softmax_scale, causal):
    dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
    return torch.empty(q.shape, dtype=dtype, device=q.device)


def _heads(factor: Tensor, x: Tensor) -> Tensor:
    assert factor.dtype == torch.float32 and factor.shape == (x.shape[0], x.shape[2])
    return factor.double()[:, None, :, None]


class FlashAttnFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, softmax_scale, causal, q_descale, k_descale, v_descale):
        if softmax_scale is None:
            softmax_scale = q.shape[-1] ** -0.5
        out = forward(q, k, v, q_descale, k_descale, v_descale, softmax_scale, causal)
        ctx.save_for_backward(q, k, v, out)
        return out


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    return FlashAttnFunc.apply(q, k, v, softmax_scale, causal, q_descale, k_descale, v_descale)
