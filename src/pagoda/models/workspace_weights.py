"""One rank's tensors of a workspace, mapped, as they were written."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pagoda.errors import WorkspaceError
from pagoda.kernels.cpu.pack import PackedWeight
from pagoda.layers.kv_schemes import StaticRanges
from pagoda.models.local_weights import LAYER_ROLES, LocalMatrix, LocalTensor
from pagoda.models.safetensors_file import SafetensorsFile
from pagoda.models.sharding import LocalShape
from pagoda.models.spec import ModelSpec
from pagoda.models.workspace import kv_ranges_file, open_workspace, rank_file

ROLES = {**LAYER_ROLES, "head": "head"}


class LocalWorkspace:
    """Iterating gives every LocalMatrix and LocalTensor of one rank's file, as they were written. Strict: names that
    are missing or left over raise WorkspaceError."""

    def __init__(self, folder: Path, spec: ModelSpec, rank: int, size: int):
        workspace = open_workspace(folder)
        self.packed, tp = workspace.packed is not None, workspace.settings["tp"]
        if tp != size:
            raise WorkspaceError(
                f"{folder} is cut for tp {tp}: run it with --tp {tp}, or convert again with --tp {size}."
            )
        self.spec, self.shape = spec, spec.shard(rank, size)
        self.path = rank_file(folder, rank, size)
        if not self.path.is_file():
            raise WorkspaceError(f"{self.path} does not exist: convert the checkpoint again.")
        self._file = SafetensorsFile(self.path)
        self._parts: dict[str, dict[str, Tensor]] = {}
        for name in sorted(self._file.names):
            module, _, suffix = name.rpartition(".")
            self._parts.setdefault(module, {})[suffix] = self._file.get(name)
        wanted = set(_module_names(spec, self.packed))
        if wanted != set(self._parts):
            odd = min(wanted ^ set(self._parts))
            raise WorkspaceError(f"{self.path} and model.json differ in {odd}: convert the checkpoint again.")

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[LocalMatrix | LocalTensor]:
        for module, parts in self._parts.items():
            role = ROLES.get(module.split(".", 2)[-1] if module.startswith("layers.") else module)
            if role is None:
                yield LocalTensor(f"{module}.weight", parts["weight"])
                continue
            parts = dict(parts)
            bias = None
            if self.packed:
                self._check_packed(module, parts)
                scheme = "packed"
            else:
                bias = parts.pop("bias", None)
                scheme = "dense" if set(parts) == {"weight"} or self.spec.quant is None else self.spec.quant.scheme
            local_k = {"o": self.shape.num_heads * self.spec.head_dim, "down": self.shape.ffn_size}
            yield LocalMatrix(module, role, scheme, parts, bias, local_k.get(role, self.spec.hidden_size))

    def _check_packed(self, module: str, parts: dict[str, Tensor]) -> None:
        try:
            PackedWeight.from_file(parts)
        except ValueError as e:
            raise WorkspaceError(f"{self.path}: {module} is damaged ({e}): convert the checkpoint again.") from None


def read_kv_ranges(folder: Path, spec: ModelSpec, shape: LocalShape) -> tuple[StaticRanges, ...]:
    """By layer, this rank's kv heads of `layers.N.{k,v}_{scale,zero}` [kv heads]; empty where there is no such file."""
    path = kv_ranges_file(folder)
    if not path.is_file():
        return ()
    file, heads = SafetensorsFile(path), torch.tensor([max(h, 0) for h in shape.kv_heads])
    names = ("k_scale", "k_zero", "v_scale", "v_zero")
    wanted = {f"layers.{i}.{name}" for i in range(spec.num_layers) for name in names}
    if wanted != file.names or any(file.get(n).shape != (spec.num_kv_heads,) for n in wanted):
        raise WorkspaceError(f"{path} belongs to another model: calibrate again, or remove it.")
    layers = range(spec.num_layers)
    return tuple(StaticRanges(*(file.get(f"layers.{i}.{name}")[heads] for name in names)) for i in layers)


def _module_names(spec: ModelSpec, packed: bool) -> Iterator[str]:
    """Canonical modules of a spec. What is packed has a head always, and no embedding where that is the head's."""
    tied = spec.tied_embeddings
    yield from ("norm", *(["embed"] if not (packed and tied) or spec.quant else []))
    yield from ["head"] if packed or not tied else []
    kinds = [*LAYER_ROLES, "attention_norm", "ffn_norm"]
    kinds += ["attention.q_norm", "attention.k_norm"] if spec.qk_norm else []
    kinds += ["attention_post_norm", "ffn_post_norm"] if spec.post_norms else []
    for layer in range(spec.num_layers):
        yield from (f"layers.{layer}.{kind}" for kind in kinds)
