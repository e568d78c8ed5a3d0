"""What the layers of a step start from, in one launch: the tokens' rows of the embedding, and their angles.

Contract. `embed_rows(token_T, position_T, weight_VC, scale, angle_2MP, first, early_launch) -> (h_TC, cos_TP, sin_TP)`,
new memory. token_T and position_T int64; weight_VC [V, C] contiguous, its first row that of the token `first`; h =
weight[token - first] * scale in weight's dtype, computed in float32 and rounded once, zeros for a token that the table
does not hold; angle_2MP float32 [2, M, P] contiguous holds cosines, then sines of every position, each below M.
early_launch (GPU): start before the previous kernel of the stream has ended, and let the next one start when that one
has; both wait inside.
Shape letters: T tokens, V vocabulary, C hidden size, M positions, P rotated pairs.
"""

import torch
from torch import Tensor

from pagoda.kernels.triton_env import HAS_TRITON, gdc_launch_dependents, gdc_wait, jit, next_power_of_2, tl

BLOCK = 1024  # channels of a program


def embed_rows_reference(
    token_T: Tensor, position_T: Tensor, weight_VC: Tensor, scale: float, angle_2MP: Tensor, first: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    row_T = token_T - first
    held_T = (row_T >= 0) & (row_T < weight_VC.shape[0])
    h_TC = torch.nn.functional.embedding(row_T.where(held_T, 0), weight_VC).masked_fill(~held_T[:, None], 0.0)
    cos_TP, sin_TP = angle_2MP.index_select(1, position_T)
    return (h_TC if scale == 1.0 else h_TC * scale), cos_TP, sin_TP


@jit
def _embed_rows_kernel(
    token, position, weight, angle, h, cos, sin, scale, first, V, C, M,
    P: tl.constexpr, PP: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (T, parts of C)."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(token + t) - first
    x = tl.load(weight + row * C + c, mask=(c < C) & (row >= 0) & (row < V), other=0.0)
    tl.store(h + t * C + c, (x.to(tl.float32) * scale).to(h.dtype.element_ty), mask=c < C)
    if tl.program_id(1) == 0:
        p = tl.arange(0, PP)
        at = tl.load(position + t) * P + p
        tl.store(cos + t * P + p, tl.load(angle + at, mask=p < P), mask=p < P)
        tl.store(sin + t * P + p, tl.load(angle + M.to(tl.int64) * P + at, mask=p < P), mask=p < P)


def embed_rows_launch(
    token_T: Tensor, position_T: Tensor, weight_VC: Tensor, scale: float, angle_2MP: Tensor, first: int = 0,
    early_launch: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The Triton kernel."""
    (tokens,), (V, C), (_, M, P) = token_T.shape, weight_VC.shape, angle_2MP.shape
    h_TC = torch.empty(tokens, C, dtype=weight_VC.dtype, device=weight_VC.device)
    cos_TP, sin_TP = (torch.empty(tokens, P, dtype=torch.float32, device=weight_VC.device) for _ in range(2))
    block = min(BLOCK, next_power_of_2(C))
    if tokens:
        _embed_rows_kernel[(tokens, -(-C // block))](
            token_T, position_T, weight_VC, angle_2MP, h_TC, cos_TP, sin_TP, scale, first, V, C, M,
            P=P, PP=next_power_of_2(P), BLOCK=block, EARLY=early_launch, num_warps=max(1, min(4, block // 256)),
            **({"launch_pdl": True} if early_launch else {}),
        )  # fmt: skip
    return h_TC, cos_TP, sin_TP


def embed_rows(
    token_T: Tensor, position_T: Tensor, weight_VC: Tensor, scale: float, angle_2MP: Tensor, first: int = 0,
    early_launch: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See the contract."""
    args = (token_T, position_T, weight_VC, scale, angle_2MP, first)
    if weight_VC.is_cuda and HAS_TRITON and weight_VC.is_contiguous():
        return embed_rows_launch(*args, early_launch)
    return embed_rows_reference(*args)
