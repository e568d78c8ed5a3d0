"""Where a benchmark's results go: JSON lines that say on what, from which commit and by which command they came, and a
plot of them."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pagoda
from pagoda.errors import MissingExtraError


def commit() -> str:
    """The commit of the checkout that runs, `-dirty` when files differ from it; else the package's version."""
    folder = Path(pagoda.__file__).parent
    for words in (["ls-files", "--error-unmatch", "__init__.py"], ["describe", "--always", "--dirty", "--exclude=*"]):
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return f"version {pagoda.__version__}"
    return done.stdout.strip()


def command() -> str:
    """The command line that runs, to be typed again."""
    name = Path(sys.argv[0]).name
    return shlex.join(["pagoda" if name in ("main.py", "pagoda", "lmdeploy") else name, *sys.argv[1:]])


def device_name(device: str, threads: int | None = None) -> str:
    """The device that `EngineConfig.device` means here, by its full name; `threads`: `EngineConfig.num_threads`."""
    import torch

    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        index = torch.device(device).index if device.startswith("cuda:") else None
        return torch.cuda.get_device_name(index)
    from pagoda.cli.env import cpu_name
    from pagoda.kernels.cpu.threads import default_threads

    return f"{cpu_name()}, {threads or default_threads()} threads"


class Record:
    """Prints one JSON line a result, appends it to `file` where one is given, and keeps it for the plot."""

    def __init__(self, common: dict[str, Any], file: Path | None = None):
        self.common = {**common, "commit": commit(), "command": command()}
        self.lines: list[dict[str, Any]] = []
        self._file = file

    def say(self, workload: str, value: float, unit: str, limit: float | None = None, **more: Any) -> dict[str, Any]:
        """`limit` is the physical limit of `value`, where one is known: the share that is reached stands beside."""
        share = {} if limit is None else {"limit": round(limit, 1), "of_limit": round(value / limit, 3)}
        line = {"workload": workload, "value": round(value, 2), "unit": unit, **share, **more, **self.common}
        self.lines.append(line)
        text = json.dumps(line)
        print(text, flush=True)
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        return line


def require_plot() -> None:
    """Say before measuring that a plot cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("--plot needs matplotlib: pip install 'pagoda-llm[bench]'.") from None


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """One panel a workload: bars of the figures with their limits, or latency over the rate of requests."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(line["workload"] for line in lines))
    figure, panels = pyplot.subplots(len(kinds), 1, figsize=(8, 3.5 * len(kinds)), squeeze=False)
    for kind, panel in zip(kinds, panels[:, 0], strict=True):
        some = [line for line in lines if line["workload"] == kind]
        panel.set_title(f"{kind}: {some[0]['model']} on {some[0]['device']} ({some[0]['commit']})", fontsize=9)
        if "rate" in some[0]:
            rates = [line["rate"] for line in some]
            for name in ("first_token_p95_ms", "gap_p95_ms"):
                panel.plot(rates, [line[name] for line in some], marker="o", label=name)
            panel.set_xlabel("requests a second")
            panel.set_yscale("log")
            panel.legend()
            continue
        names = [line.get("label", kind) for line in some]
        panel.bar(names, [line["value"] for line in some], color="tab:blue")
        panel.plot(names, [line.get("limit", float("nan")) for line in some], "k_", markersize=30)
        panel.set_ylabel(some[0]["unit"])
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
