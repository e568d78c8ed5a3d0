"""The builder: one compilation, shared, safe against others, and one-line reasons."""

import os
import subprocess
import sys

import pytest

from pagoda.kernels.cpu import build as building
from pagoda.kernels.cpu.build import BuildError, build, usable_variants
from pagoda.kernels.cpu.threads import cgroup_quota, default_threads, physical_cores


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def small_source(tmp_path, monkeypatch):
    """A source that compiles at once, in place of the real one."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "step.cpp").write_text('extern "C" int pagoda_one() { return 1; }\n')
    monkeypatch.setattr(building, "SOURCES", ("step.cpp",))
    monkeypatch.setattr(building, "__file__", str(folder / "build.py"))
    return folder / "step.cpp"


def test_it_compiles_once_and_again_when_the_source_changes(empty_cache, small_source, capsys):
    first = build("portable")
    assert "compiling" in capsys.readouterr().err
    stamp = first.stat().st_mtime_ns
    assert build("portable") == first and first.stat().st_mtime_ns == stamp
    assert capsys.readouterr().err == ""
    small_source.write_text('extern "C" int pagoda_one() { return 2; }\n')
    assert build("portable") != first
    assert len(list(first.parent.iterdir())) == 2


def test_a_wheel_brings_what_it_needs(empty_cache, small_source, monkeypatch):
    made = building.prebuild()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build("portable") in made and build(usable_variants()[0]) in made
    small_source.write_text('extern "C" int pagoda_one() { return 2; }\n')
    with pytest.raises(BuildError):
        build("portable")  # what lies there is of another source


def test_a_broken_source_is_one_line_and_leaves_nothing(empty_cache, small_source):
    small_source.write_text("int broken( {\n")
    with pytest.raises(BuildError, match="could not compile") as caught:
        build("portable")
    assert "\n" not in str(caught.value)
    assert not list(building.cache_folder().iterdir())


def test_no_compiler_is_a_reason(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="no-such-compiler"):
        build("portable")


def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="cannot be written"):
        build("portable")


@pytest.mark.slow
def test_two_processes_build_at_once(empty_cache):
    """Both get a library that loads, and one file is left."""
    script = "from pagoda.kernels.cpu.build import load; print(load('portable').pagoda_context)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    both = [subprocess.Popen([sys.executable, "-c", script], env=env) for _ in range(2)]
    assert [process.wait(timeout=250) for process in both] == [0, 0]
    assert len(list(building.cache_folder().iterdir())) == 1


def test_variants_follow_the_cpu(monkeypatch):
    monkeypatch.setattr(building, "cpu_flags", lambda: frozenset({"avx2", "fma", "f16c", "sse2"}))
    assert usable_variants() == ["avx2", "portable"]
    monkeypatch.setattr(building, "cpu_flags", frozenset)
    assert usable_variants() == ["portable"]


def test_threads_follow_affinity_and_quota(monkeypatch):
    from pagoda.kernels.cpu import threads

    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    cpu = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    files = {cpu.format(c): siblings for c, siblings in enumerate(("0-1", "0-1", "2-3", "2-3"))}
    files["/sys/fs/cgroup/cpu.max"] = "250000 100000"
    monkeypatch.setattr(threads, "_read", lambda path: files.get(path, ""))
    assert cgroup_quota() == 2.5
    assert physical_cores({0, 1, 2, 3}) == 2
    assert default_threads() == 2
    files["/sys/fs/cgroup/cpu.max"] = "50000 100000"
    assert default_threads() == 1
    files["/sys/fs/cgroup/cpu.max"] = "max 100000"
    assert cgroup_quota() is None
    files["/sys/fs/cgroup/cpu.max"] = ""
    files["/sys/fs/cgroup/cpu/cpu.cfs_quota_us"], files["/sys/fs/cgroup/cpu/cpu.cfs_period_us"] = "-1", "100000"
    assert cgroup_quota() is None
