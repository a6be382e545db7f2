"""What `bench/gpu.sh` provides before it measures: the environment, the native module, the peers' wheels."""

from __future__ import annotations

import json
import os
import shutil
import sysconfig
import zipfile
from dataclasses import replace

import pytest

from bench.gpu_run import build, environment, prebuild, wheels
from bench.gpu_run.settings import ROOT, Settings

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
NATIVE = ROOT / "slime_fused" / f"_C{SUFFIX}"
needs_native = pytest.mark.skipif(not NATIVE.exists(), reason="slime_fused._C is not built")


def settings(tmp_path, **changes):
    plain = Settings(out=tmp_path / "out", archive=tmp_path / "all.tar.gz", env=tmp_path / "env", cuda=False)
    (tmp_path / "env").mkdir(exist_ok=True)
    return replace(plain, **changes)


# --- environment -------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_environment_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="is no environment of this script and is not empty"):
        environment.create(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_an_environment_is_used_again_for_the_same_interpreter_and_torch(monkeypatch, tmp_path, capsys):
    made = []
    monkeypatch.setenv("ENV", str(tmp_path))
    monkeypatch.setattr(environment, "create", made.append)
    environment.main()
    assert made == [tmp_path]
    (tmp_path / environment.STAMP).write_text(json.dumps(environment.stamp()))
    environment.main()
    assert len(made) == 1
    assert "used again" in capsys.readouterr().out
    (tmp_path / environment.STAMP).write_text(json.dumps({**environment.stamp(), "torch": "2.8.0"}))
    environment.main()
    assert len(made) == 2


# --- the native module -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("archs", "arch", "runs"),
    [
        ("90", "90", True),
        ("80-real 86-real 90", "90", True),
        ("80-real 86-real", "89", True),
        ("80", "90", False),
        ("100", "90", False),
        ("89", "86", False),
        ("", "90", False),
    ],
)
def test_machine_code_runs_within_a_generation(archs, arch, runs):
    assert build.has_kernels_for({"cuda_archs": archs}, arch) is runs


@pytest.fixture
def carried(tmp_path):
    """A copy of this checkout's module with the stamp of its sources, as `prebuild` writes them."""
    folder = tmp_path / "carried"
    folder.mkdir()
    module = folder / NATIVE.name
    shutil.copy2(NATIVE, module)
    build.stamp_of(module).write_text(json.dumps({"sources": build.sources_hash()}))
    return module


@needs_native
def test_a_prebuilt_module_is_used_from_a_file_a_folder_or_a_wheel(carried, tmp_path):
    wheel = tmp_path / "slime_fused-0.1.0-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(carried, f"slime_fused/{carried.name}")
    for i, prebuilt in enumerate((carried, carried.parent, wheel)):
        target = tmp_path / f"placed{i}" / NATIVE.name
        target.parent.mkdir()
        assert build.use_prebuilt(prebuilt, target, arch="", wants_cuda=False)
        assert build.info_of(target) == build.info_of(NATIVE)


@needs_native
def test_a_prebuilt_module_that_does_not_fit_is_refused(carried, tmp_path):
    options = {"arch": "90", "wants_cuda": build.info_of(carried)["cuda"]}
    assert build.refusal(carried, **options) == ""
    other = carried.with_name("_C.cpython-399-x86_64-linux-gnu.so")
    assert build.refusal(other, **options).startswith("it is for another Python")
    if options["wants_cuda"]:
        assert "this GPU needs 103" in build.refusal(carried, arch="103", wants_cuda=True)
    build.stamp_of(carried).write_text(json.dumps({"sources": "of yesterday"}))
    assert build.refusal(carried, **options) == "it was built from other sources"
    carried.write_bytes(b"\x7fELF and then nothing")
    assert build.refusal(carried, **options).startswith("it cannot be imported")
    assert not build.use_prebuilt(tmp_path / "nowhere", tmp_path / "target", **options)


def fake_cmake(tmp_path, monkeypatch, program):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "cmake").write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/calls\n{program}\n')
    (tools / "cmake").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")


@needs_native
def test_the_module_is_compiled_once(tmp_path, monkeypatch, capsys):
    target = tmp_path / "package" / NATIVE.name
    target.parent.mkdir()
    fake_cmake(tmp_path, monkeypatch, f"case $1 in --build) cp {NATIVE} {target};; esac")
    assert build.provide(settings(tmp_path), target)
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
    assert f"-DSLIME_FUSED_OUTPUT_DIR={target.parent}" in (tmp_path / "calls").read_text()
    assert build.provide(settings(tmp_path), target)
    assert "used again" in capsys.readouterr().out
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
    # Another module in its place, by hand or from another checkout, is not taken for it.
    target.write_bytes(b"something else")
    assert build.provide(settings(tmp_path), target)
    assert len((tmp_path / "calls").read_text().splitlines()) == 4


@needs_native
def test_a_prebuilt_module_needs_no_compiler_and_a_stale_one_is_compiled(carried, tmp_path, monkeypatch):
    target = tmp_path / "package" / NATIVE.name
    target.parent.mkdir()
    fake_cmake(tmp_path, monkeypatch, "exit 1")
    assert build.provide(settings(tmp_path, prebuilt=carried), target)
    assert not (tmp_path / "calls").exists()
    build.stamp_of(carried).write_text(json.dumps({"sources": "of yesterday"}))
    (tmp_path / "env" / "build.json").unlink()
    assert not build.provide(settings(tmp_path, prebuilt=carried), target)
    assert (tmp_path / "calls").exists()


def test_where_the_gpu_kernels_do_not_compile_the_cpu_kernels_are_and_the_part_fails(tmp_path, monkeypatch):
    target = tmp_path / NATIVE.name
    fake_cmake(
        tmp_path, monkeypatch, f"case $* in *SLIME_FUSED_CUDA=ON*) exit 1;; --build*) echo cpu >{target};; esac"
    )
    assert not build.provide(settings(tmp_path, cuda=True), target)
    assert target.read_text() == "cpu\n"
    assert not (tmp_path / "env" / "build.json").exists()


def test_prebuild_names_and_stamps_the_module_for_the_other_python(tmp_path, monkeypatch):
    other = tmp_path / "python3.99"
    other.write_text("#!/bin/sh\necho .cpython-399-x86_64-linux-gnu.so\n")
    other.chmod(0o755)
    out = tmp_path / "out"
    module = out / "_C.cpython-399-x86_64-linux-gnu.so"
    fake_cmake(tmp_path, monkeypatch, f"case $1 in --build) echo module >{module};; esac")
    command = ["--python", str(other), "--out", str(out), "--build", str(tmp_path / "cmake")]
    assert prebuild.main(command) == 0
    assert json.loads(build.stamp_of(module).read_text()) == {"sources": build.sources_hash(), "archs": "90"}
    assert f"-DPython_EXECUTABLE={other}" in (tmp_path / "calls").read_text()


# --- wheels ------------------------------------------------------------------------------------------------------


def make_wheel(folder, name="peer", tag="py3-none-any"):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-{tag}.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"NAME = {name!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_pieces_of_several_runs_become_the_wheel(tmp_path, capsys):
    wheel = make_wheel(tmp_path / "whole")
    pieces = wheels.split(wheel, 200, tmp_path / "pieces")
    assert len(pieces) > 2
    assert all(piece.stat().st_size <= 200 for piece in pieces)
    store = tmp_path / "store"
    for i, piece in enumerate(pieces):
        carried = tmp_path / f"run{i}"
        carried.mkdir()
        shutil.copy(piece, carried)
        wheels.collect([carried, tmp_path / "absent"], store)
        assert (store / wheel.name).exists() == (i == len(pieces) - 1)
    assert (store / wheel.name).read_bytes() == wheel.read_bytes()
    assert [path.name for path in store.iterdir()] == [wheel.name]
    output = capsys.readouterr().out
    assert f"waits for pieces {', '.join(str(i) for i in range(2, len(pieces) + 1))} of {len(pieces)}" in output
    assert "absent is not a folder" in output


def test_one_wheel_that_cannot_be_installed_keeps_no_other_out(tmp_path):
    store = tmp_path / "store"
    make_wheel(store, "alpha")
    make_wheel(store, "beta", tag="cp27-none-any")
    make_wheel(store, "gamma")
    pip = tmp_path / "python"
    pip.write_text(
        f'#!/bin/sh\nfor last; do :; done\necho "$last" >>{tmp_path}/asked\ncase $last in *cp27*) exit 1;; esac\n'
    )
    pip.chmod(0o755)
    assert wheels.install(store, str(pip)) == 1
    assert len((tmp_path / "asked").read_text().splitlines()) == 3
    # Those that are installed stay so; the other is tried again.
    assert wheels.install(store, str(pip)) == 1
    assert len((tmp_path / "asked").read_text().splitlines()) == 4


def test_the_split_command_prints_the_pieces(tmp_path, capsys):
    wheel = make_wheel(tmp_path / "whole")
    assert wheels.main(["split", str(wheel), "--bytes", "300", "--out", str(tmp_path / "pieces")]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(f"{wheel.name}.1of{-(-wheel.stat().st_size // 300)}")
