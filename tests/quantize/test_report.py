"""The command from end to end: folder, report, page; and calibration texts of every kind."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

import pagoda
from pagoda.cli.main import main
from pagoda.cli.quantize import METHODS
from pagoda.errors import UsageError
from pagoda.quantize import recipe
from pagoda.quantize.calibration_text import calibration_ids
from pagoda.text.tokenizer import load_tokenizer

MINI = Path(pagoda.__file__).parent / "mini"


def test_quantize_ends_with_a_report(tmp_path, capsys):
    words = ["quantize", "mini", "--method", "smooth", "--work-dir", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*words, "--questions", "34", "--calib-samples", "4", "--calib_seqlen", "256"]) == 0
    printed = capsys.readouterr()
    assert "perplexity" in printed.out and "points lost" in printed.out and "left" in printed.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    files = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert report["after"]["bytes"] == files < 0.75 * report["before"]["bytes"]
    assert report["after"]["perplexity"] == pytest.approx(report["before"]["perplexity"], rel=0.02)
    assert len(report["layers"]) == 8 and report["after"]["accuracy"]["overall"] > 0.9
    page = (tmp_path / "out" / "report.html").read_text()
    svgs = [part.split("</svg>")[0] + "</svg>" for part in ("<svg" + p for p in page.split("<svg")[1:])]
    assert len(svgs) == 2 and "http" not in page.replace("http://www.w3.org", "")
    lines = ElementTree.fromstring(svgs[0]).findall("polyline")
    assert [len(line.get("points").split()) for line in lines] == [8] * 4


def test_the_flags_know_every_method():
    assert set(METHODS) == set(recipe.METHODS)


def test_built_in_text_speaks_the_models_template():
    ids = calibration_ids(MINI, "builtin", 6, 128)
    assert ids.shape == (6, 128) and torch.equal(ids, calibration_ids(MINI, "builtin", 6, 128))
    tokenizer = load_tokenizer(MINI)
    assert sum(int((row == tokenizer.id_of("<|im_start|>")).sum()) for row in ids) > 6


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "parquet"])
def test_local_files_of_every_kind(kind, tmp_path):
    """The same documents in every kind give the same tokens; conversations go through the template."""
    texts = [f"The {word} of the river was {i} feet below the bridge." for i, word in enumerate(["level"] * 30)]
    path = tmp_path / f"calib.{kind}"
    if kind == "txt":
        path.write_text("\n".join(texts))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    elif kind == "json":
        path.write_text(json.dumps([{"conversations": [{"from": "human", "value": t}]} for t in texts]))
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"text": texts}), path)
    ids = calibration_ids(MINI, str(path), 4, 32)
    assert ids.shape == (4, 32)
    text = load_tokenizer(MINI).decode(ids.flatten().tolist(), skip_special=False)
    assert "feet below the bridge" in text and ("<|im_start|>user" in text) == (kind == "json")


def test_a_short_text_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(UsageError, match="less than one sequence"):
        calibration_ids(MINI, str(tmp_path / "short.txt"), 4, 64)
