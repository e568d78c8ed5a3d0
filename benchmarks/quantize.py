"""Quantizing a large model: minutes, and peak memory on the device and on the host. One JSON line a method.

`python benchmarks/quantize.py benchmarks/shapes/llama-3.1-8b --methods awq gptq smooth fp8 [--layers 4]`

Weights are random numbers of the model's shapes (drawn on the device as they are needed), the text is random tokens.
Host memory is the process's peak resident size less its size once torch and the device are up, and less what a mapped
checkpoint would count (nothing here). Limits to meet for an 8B model: 6 GiB on the device, 8 GiB on the host.
With `--layers N` only so many are made and quantized; `minutes_whole` is then N's time, start and end included, times
layers / N. Memory does not grow with the layers: one is on the device, and the text's residual stream on the host.
"""

import argparse
import json
import resource
import tempfile
from pathlib import Path

import torch

from pagoda.quantize.produce import Calibration, Source, quantize_model
from pagoda.quantize.recipe import METHODS, Recipe


def host_gib() -> float:
    """Peak resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def cut(model: str, layers: int | None, folder: Path) -> tuple[Path, int]:
    """A shape of at most `layers` layers in `folder`, and how many the model has."""
    config = json.loads((Path(model) / "config.json").read_text())
    whole = config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": min(whole, layers or whole)}))
    return folder, whole


def run(model: str, method: str, args: argparse.Namespace) -> dict:
    generator = torch.Generator().manual_seed(0)
    calibration = Calibration(samples=args.samples, length=args.length, device=args.device)
    with tempfile.TemporaryDirectory(dir=args.tmp) as name:
        shape, whole = cut(model, args.layers, Path(name))
        dummy = Source(str(shape), calibration, "dummy", torch.zeros(1, 1, dtype=torch.long))
        ids = torch.randint(0, dummy.spec.vocab_size, (args.samples, args.length), generator=generator)
        source = Source(str(shape), calibration, "dummy", ids)
        layers, on_gpu = source.spec.num_layers, source.device.type == "cuda"
        if on_gpu:
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats()
        before = host_gib()
        done = quantize_model(source, Path(name) / "out", Recipe(method, args.group_size))
        size = sum(p.stat().st_size for p in (Path(name) / "out").glob("*.safetensors"))
    return {
        "benchmark": "quantize",
        "model": Path(model).name,
        "method": method,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "sequences": args.samples,
        "length": args.length,
        "layers": layers,
        "minutes": round(done.seconds / 60, 2),
        "minutes_whole": round(done.seconds / 60 * whole / layers, 2),
        "device_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "host_gib": round(host_gib() - before, 2),
        "output_gib": round(size / 2**30, 2),
        "largest_error": max(e for row in done.errors for e in row.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["awq"])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, help="quantize only so many, and say what all would take")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tmp", help="folder for the result, which is removed")
    args = parser.parse_args()
    for method in args.methods:
        print(json.dumps(run(args.model, method, args)), flush=True)


if __name__ == "__main__":
    main()
