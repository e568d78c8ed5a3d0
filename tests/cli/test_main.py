"""The command's grammar: verbs, spellings, booleans, refusals, and what `--help` costs."""

import dataclasses
import json
import subprocess
import sys

import pytest

from pagoda.cli import chat, convert
from pagoda.cli.flags import ALIASES, Parser, add_config_flags, config_from
from pagoda.cli.main import VERBS, main
from pagoda.config import EngineConfig, GenerationConfig, ServeConfig
from pagoda.errors import ConfigError, UsageError
from pagoda.text.template import template_names


def engine(*words: str) -> EngineConfig:
    parser = Parser(prog="x")
    parser.add_argument("model", nargs="?")
    add_config_flags(parser, EngineConfig, "engine")
    return config_from(parser.parse_args(parser.spelled(words)), EngineConfig)


def test_flags_in_both_spellings():
    expected = EngineConfig(session_len=99, max_batch_size=64, cache_max_entry_count=0.5, quant_policy="int8")
    for words in (
        ("--session_len", "99", "--instance_num", "64", "--cache_max_entry_count=0.5", "--quant_policy", "8"),
        ("--session-len=99", "--max-batch-size", "64", "--cache-max-entry-count", ".5", "--quant-policy", "int8"),
    ):
        assert engine(*words) == expected


@pytest.mark.parametrize("words", [["--cuda_graph", "False"], ["--cuda-graph=0"], ["--cuda_graph", "off", "model"]])
def test_booleans(words):
    assert engine(*words).cuda_graph is False


def test_a_bare_boolean_does_not_swallow_the_model():
    parser = chat.make_parser("pagoda chat")
    args = parser.parse_args(parser.spelled(["--ignore_eos", "model", "--do-sample", "--top_k", "3"]))
    assert args.model == "model" and args.ignore_eos is True and args.do_sample is True and args.top_k == 3


def test_every_knob_is_a_flag():
    for config in (EngineConfig, GenerationConfig, ServeConfig):
        parser = Parser(prog="x")
        add_config_flags(parser, config, "t")
        flags = {s for a in parser._actions for s in a.option_strings}
        for field in dataclasses.fields(config):
            assert (f"--{field.name.replace('_', '-')}" in flags) == field.metadata["cli"]
            for alias in ALIASES.get(field.name, ()):
                assert f"--{alias.replace('_', '-')}" in flags
        assert config_from(parser.parse_args([]), config) == config()
        assert parser.format_help()


def test_values_out_of_range_are_config_errors():
    with pytest.raises(ConfigError, match="tp is 0"):
        engine("--tp", "0")
    with pytest.raises(ConfigError, match="dtype is 'int3': it must be one of auto, float32"):
        engine("--dtype", "int3")
    with pytest.raises(UsageError, match="invalid int value: 'two'"):
        engine("--tp", "two")
    with pytest.raises(UsageError, match="unrecognized arguments: --session"):
        engine("--session", "3")  # no guessing of shortened names


MISTAKES = [
    (["foo"], "there is no verb 'foo': use one of chat"),
    (["chat", "/no/such/folder"], "does not exist"),
    (["chat", "--bogus", "1"], "unrecognized arguments: --bogus"),
    (["convert", "no-such-template", "."], "no chat template called"),
    (["convert", "a", "b", "c"], "not 3 words"),
    (["convert"], "required"),
    (["convert", "mini", "--model-format", "awq"], "format is hf, not awq"),
]


@pytest.mark.parametrize(("words", "sentence"), MISTAKES)
def test_mistakes_are_one_sentence_and_code_2(capsys, words, sentence):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1


def test_list_and_env(capsys, tmp_path):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out.replace(",", " ").split()
    assert set(listed) == set(template_names()) and "internlm-chat-7b" in listed
    assert main(["check_env", "--json", "--dump_file", str(tmp_path / "env.json")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"][0].isdigit() and facts == json.loads((tmp_path / "env.json").read_text())
    assert main(["check-env"]) == 0


def test_help_and_version(capsys):
    assert main([]) == main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in VERBS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __import__("pagoda").__version__
    for verb in VERBS:
        with pytest.raises(SystemExit) as done:
            main([verb, "--help"])
        assert done.value.code == 0 and "usage: pagoda" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["list"], ["env"], ["chat", "--help"], ["convert", "--help"]])
def test_light_verbs_import_nothing_heavy(words):
    code = (
        "import sys\nfrom pagoda.cli.main import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'prompt_toolkit', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_convert_settings_are_fields():
    names = {f.name for f in dataclasses.fields(EngineConfig)}
    assert set(convert.SETTINGS) <= names
