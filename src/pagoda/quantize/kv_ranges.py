"""Fixed ranges of an int8 KV cache, from the statistics that `calibrate` wrote.

Per kv head, over its channels: asymmetric zero = (min + max) / 2, scale = (max - min) / 255; symmetric zero = 0,
scale = absmax / 127; a value x is held as round((x - zero) / scale) in -128..127.
"""

from pathlib import Path

from torch import Tensor

from pagoda.errors import UsageError, WorkspaceError
from pagoda.models.safetensors_file import SafetensorsFile, write_tensors
from pagoda.models.workspace import is_workspace, kv_ranges_file, open_workspace

SMALLEST = 1e-6


def write_stats(folder: Path, files: dict[str, dict[str, Tensor]]) -> None:
    """`FILE.safetensors` for each file of `calibrate`'s result."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        write_tensors(folder / f"{name}.safetensors", tensors)


def write_kv_ranges(stats_dir: Path, workspace: Path, symmetric: bool) -> Path:
    """Read `key_stats` and `value_stats`, write the workspace's ranges; the workspace runs with them wherever its
    quant_policy is int8."""
    if not is_workspace(workspace):
        raise WorkspaceError(f"{workspace} is not a workspace: make one with `pagoda convert` first.")
    spec = open_workspace(workspace).spec
    tensors: dict[str, Tensor] = {}
    for short, name in (("k", "key_stats"), ("v", "value_stats")):
        path = stats_dir / f"{name}.safetensors"
        if not path.is_file():
            raise UsageError(f"{path} does not exist: run `lite calibrate --work-dir {stats_dir}` first.")
        stats = SafetensorsFile(path)
        shape = (spec.num_kv_heads, spec.head_dim)
        names = {f"layers.{i}.{s}" for i in range(spec.num_layers) for s in ("min", "max", "absmax")}
        if not names <= stats.names or any(stats.get(n).shape != shape for n in names):
            raise UsageError(f"{path} was made from another model than {workspace}: calibrate again.")
        for i in range(spec.num_layers):
            low, high, absmax = (stats.get(f"layers.{i}.{s}") for s in ("min", "max", "absmax"))
            scale, zero = ranges(low.amin(-1), high.amax(-1), absmax.amax(-1), symmetric)
            tensors |= {f"layers.{i}.{short}_scale": scale, f"layers.{i}.{short}_zero": zero}
    write_tensors(kv_ranges_file(workspace), tensors)
    return kv_ranges_file(workspace)


def ranges(low: Tensor, high: Tensor, absmax: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(scale, zero) of the formula above."""
    if symmetric:
        return (absmax / 127).clamp(min=SMALLEST), absmax * 0
    return ((high - low) / 255).clamp(min=SMALLEST), (low + high) / 2
