"""Muon for the stacked matrices (momentum, orthogonalised by Newton-Schulz steps), AdamW for embedding and norms."""

import torch
from model import Model
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic in Keller Jordan's Muon


def orthogonalise(update_LNK: Tensor) -> Tensor:
    """Singular values of each matrix pressed towards 1, in bf16 on a GPU."""
    a, b, c = NEWTON_SCHULZ
    x = update_LNK.bfloat16() if update_LNK.is_cuda else update_LNK
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(update_LNK.dtype)


class Optimizer:
    def __init__(self, model: Model, lr_matrix: float, lr_rest: float, decay: float = 0.1) -> None:
        self.matrices = [model.w_qkv, model.w_o, model.w_gate_up, model.w_down]
        self.lr_matrix, self.lr_rest, self.decay = lr_matrix, lr_rest, decay
        self.momentum = [torch.zeros_like(w) for w in self.matrices]
        self.fused = model.w_qkv.is_cuda
        rest = [model.embed_VC, model.attention_norm, model.ffn_norm, model.norm]
        self.adam = torch.optim.AdamW(rest, lr=lr_rest, betas=(0.9, 0.97), weight_decay=0.0, fused=self.fused)

    @torch.no_grad()
    def step(self, scale: float, beta: float = 0.95) -> None:
        """One update at `scale` times the learning rates; consumes the gradients."""
        lr = self.lr_matrix * scale
        for weight, momentum in zip(self.matrices, self.momentum):
            momentum.lerp_(weight.grad, 1 - beta)
            update = orthogonalise(weight.grad.lerp(momentum, beta))
            weight.mul_(1 - lr * self.decay)
            weight.add_(update, alpha=-lr * max(1.0, weight.size(-2) / weight.size(-1)) ** 0.5)
            weight.grad = None
        for group in self.adam.param_groups:
            group["lr"] = self.lr_rest * scale
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        return {"momentum": self.momentum, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        for mine, saved in zip(self.momentum, state["momentum"]):
            mine.copy_(saved)
        self.adam.load_state_dict(state["adam"])
