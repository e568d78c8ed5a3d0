"""From a folder to weights on a device: read a checkpoint or a workspace, pack it for the kernels.

Tensors stream: one matrix is read, cut, packed and freed before the next, so the peak lies about one layer above the
result.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pagoda.config import EngineConfig
from pagoda.errors import CheckpointError, WorkspaceError
from pagoda.layers.kv_schemes import StaticRanges
from pagoda.layers.linear import Linear
from pagoda.layers.parallel import Group
from pagoda.models.local_weights import LocalMatrix, LocalTensor, LocalWeights, open_weights
from pagoda.models.spec import ModelSpec, read_spec, with_overrides
from pagoda.models.workspace import is_workspace, open_workspace
from pagoda.models.workspace_weights import LocalWorkspace, read_kv_ranges

Progress = Callable[[float], None]


@dataclass
class LayerWeights:
    """One decoder layer of this rank; gains are float32 and None where the model has no such norm."""

    attention_norm: Tensor
    w_qkv: Linear
    wo: Linear
    ffn_norm: Tensor
    w_gate_up: Linear
    w_down: Linear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    attention_post_norm: Tensor | None = None
    ffn_post_norm: Tensor | None = None


@dataclass
class ModelWeights:
    """What this rank holds. `embed` [V_local, C]: the vocabulary is split over the ranks; a tied head shares it."""

    embed: Tensor
    norm: Tensor
    head: Linear
    layers: list[LayerWeights]
    kv_ranges: tuple[StaticRanges, ...] = ()  # by layer, where `kv_qparams` wrote some into the workspace


def resolve_spec(folder: Path, config: EngineConfig) -> tuple[ModelSpec, EngineConfig]:
    """The spec of a checkpoint or workspace, and `config` completed by the workspace's `engine.toml`."""
    if not is_workspace(folder):
        return read_spec(folder, config), config
    workspace = open_workspace(folder)
    config = config.under(workspace.settings)
    quant = workspace.spec.quant
    if config.weight_format != "auto" and (quant is None or quant.scheme != config.weight_format):
        raise WorkspaceError(
            f"{folder} holds {quant.scheme if quant else '16-bit'} weights: convert the checkpoint again with "
            f"--weight-format {config.weight_format}."
        )
    return with_overrides(workspace.spec, config), config


def load_model(
    folder: Path,
    spec: ModelSpec,
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    group: Group,
    progress: Progress | None = None,
) -> ModelWeights:
    """This rank's weights of a checkpoint or workspace, packed on `device` for activations of `dtype`. `progress` is
    told the share that is done, from 0 to 1."""
    if is_workspace(folder):
        check_packing(folder, device, dtype)
        local = LocalWorkspace(folder, spec, group.rank, group.size)
        built = _build(local, spec, device, dtype, progress)
        built.kv_ranges = read_kv_ranges(folder, spec, local.shape)
        return built
    weights = open_weights(folder, spec, config, group.rank, group.size, device)
    return _build(weights, spec, device, dtype, progress)


def check_packing(folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """WorkspaceError for weights that were packed for another kind of device or another number format."""
    packed = open_workspace(folder).packed
    if packed is not None and device.type != "cpu":
        raise WorkspaceError(f"{folder} is packed for CPUs: run it with --device cpu, or convert again without that.")
    if packed is not None and packed != str(dtype).removeprefix("torch."):
        raise WorkspaceError(f"{folder} is packed in {packed}: leave --dtype out, or convert again with that --dtype.")


def pick_dtype(config: EngineConfig, spec: ModelSpec) -> torch.dtype:
    """Of activations: `auto` is the checkpoint's own number format."""
    return getattr(torch, spec.dtype if config.dtype == "auto" else config.dtype)


def _build(
    items: "LocalWeights | LocalWorkspace",
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None,
) -> ModelWeights:
    """Pack the items as they come and sort them into their places."""
    gains: dict[str, Tensor] = {}
    linears: dict[str, Linear] = {}
    for i, item in enumerate(_checked(items)):
        if isinstance(item, LocalTensor):
            kind = dtype if item.name == "embed.weight" else torch.float32
            gains[item.name] = item.tensor.to(device=device, dtype=kind)
        else:
            linears[item.name] = Linear.pack(
                item.role, item.scheme, item.tensors, item.bias, item.in_features, device, dtype
            )
        if progress is not None:
            progress((i + 1) / len(items))
    embed = gains["embed.weight"] if "embed.weight" in gains else linears["head"].tensors["q"]  # packed together
    if "head" not in linears:
        linears["head"] = Linear.pack("head", "dense", {"weight": embed}, None, spec.hidden_size, device, dtype)
    layers = [_layer(f"layers.{i}.", gains, linears) for i in range(spec.num_layers)]
    return ModelWeights(embed, gains["norm.weight"], linears["head"], layers)


def _checked(items: Iterable[LocalMatrix | LocalTensor]) -> Iterable[LocalMatrix | LocalTensor]:
    """Errors of the operating system while mapped files are read become ours."""
    try:
        yield from items
    except OSError as e:
        raise CheckpointError(f"The weights cannot be read ({e}): check the disk.") from None


def _layer(prefix: str, gains: dict[str, Tensor], linears: dict[str, Linear]) -> LayerWeights:
    return LayerWeights(
        attention_norm=gains[prefix + "attention_norm.weight"],
        w_qkv=linears[prefix + "attention.w_qkv"],
        wo=linears[prefix + "attention.wo"],
        ffn_norm=gains[prefix + "ffn_norm.weight"],
        w_gate_up=linears[prefix + "ffn.w_gate_up"],
        w_down=linears[prefix + "ffn.w_down"],
        q_norm=gains.get(prefix + "attention.q_norm.weight"),
        k_norm=gains.get(prefix + "attention.k_norm.weight"),
        attention_post_norm=gains.get(prefix + "attention_post_norm.weight"),
        ffn_post_norm=gains.get(prefix + "ffn_post_norm.weight"),
    )
