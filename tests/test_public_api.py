"""The public face: names that users type, and what importing them costs."""

import subprocess
import sys

import pytest

import pagoda


def test_every_public_name_is_there() -> None:
    for name in pagoda.__all__:
        assert getattr(pagoda, name) is not None
    assert pagoda.TurbomindEngineConfig is pagoda.EngineConfig
    with pytest.raises(AttributeError):
        pagoda.no_such_name  # noqa: B018


def test_pipeline_stays_a_function() -> None:
    code = (
        "import pagoda, pagoda.offline; from pagoda import pipeline; assert callable(pipeline); print(type(pipeline))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "function" in out.stdout


@pytest.mark.parametrize(
    "module", ["pagoda", "pagoda.config", "pagoda.engine.client", "pagoda.engine.scheduler", "pagoda.text.stream"]
)
def test_the_light_side_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'triton') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_engine_config_speaks_of_unknown_and_wrong_values() -> None:
    with pytest.raises(pagoda.PagodaError, match="session_length"):
        pagoda.EngineConfig.from_mapping({"session_length": 1})
    with pytest.raises(pagoda.PagodaError, match="cache_max_entry_count"):
        pagoda.EngineConfig(cache_max_entry_count=1.5)
    assert pagoda.EngineConfig(quant_policy=4).quant_policy == "int4"
    assert pagoda.EngineConfig(quant_policy=8).quant_policy == "int8"
    assert pagoda.EngineConfig(enable_prefix_caching="False").enable_prefix_caching is False
    for wrong in ({"top_k": True}, {"min_new_tokens": 1.0}, {"random_seed": 2**64}, {"logprobs": 21}):
        with pytest.raises(pagoda.PagodaError, match=next(iter(wrong))):
            pagoda.GenerationConfig(**wrong)
    with pytest.raises(pagoda.PagodaError, match="server_port"):
        pagoda.ServeConfig(server_port=1.5)
    with pytest.raises(pagoda.PagodaError, match="temperature"):
        pagoda.GenerationConfig(temperature=float("nan"))
