"""Token embedding, whole or split over the ranks by vocabulary.

Legend: T tokens, V vocabulary rows of this rank, C hidden size.
"""

import torch.nn.functional as F
from torch import Tensor

from pagoda.layers.parallel import Group


def embed(token_T: Tensor, weight_VC: Tensor, scale: float, group: Group, split: bool) -> Tensor:
    """Rows of the table times `scale` -> [T, C] in the table's dtype.

    `split`: rank r holds the rows from r * V on; each rank looks up its own ids, zeros stand for the others, the sum
    over the ranks is the whole.
    """
    if split:
        local_T = token_T - group.rank * weight_VC.shape[0]
        mine_T = (local_T >= 0) & (local_T < weight_VC.shape[0])
        h_TC = F.embedding(local_T.where(mine_T, 0), weight_VC).masked_fill(~mine_T[:, None], 0.0)
        h_TC = group.all_reduce_(h_TC)
    else:
        h_TC = F.embedding(token_T, weight_VC)
    return h_TC if scale == 1.0 else h_TC * scale
