"""The cache of compiled libraries: built once, verified, private, robust to killed builds."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from support.builds import (
    await_end,
    caching_compiler,
    fake_compiler,
    finish,
    libraries,
    needs_compiler,
    settings,
    start,
)

from mistral_kernels.ops import build_cache, compiler, extension
from mistral_kernels.ops.compiler import BuildError, checksum_file


@pytest.fixture(scope="module")
def cxx(tmp_path_factory: pytest.TempPathFactory) -> str:
    return caching_compiler(tmp_path_factory.mktemp("objects"))


def unfinished(cache: Path) -> list[str]:
    return [path.parent.name for path in cache.rglob(".building-*")]


def test_folders_writable_by_others_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True, mode=0o700)
    build_cache.check_private(folder)
    for path, mode, message in (
        (folder, 0o777, f"{folder} may be written to by all users; "),
        (folder, 0o1777, f"{folder} may be written to by all users; "),
        (folder.parent, 0o757, f"{folder.parent} may be written to by all users; "),
        (folder.parent, 0o1777, None),  # sticky, like /tmp
        (folder, 0o755, None),
    ):
        path.chmod(mode)
        if message is None:
            build_cache.check_private(folder)
        else:
            with pytest.raises(BuildError, match=message + "set TORCH_EXTENSIONS_DIR to a folder"):
                build_cache.check_private(folder)
        path.chmod(0o700)


def test_folders_writable_by_a_shared_group_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The private group of this user may write."""
    tmp_path.chmod(0o770)
    monkeypatch.setattr(build_cache, "_is_own_group", lambda gid: gid == tmp_path.stat().st_gid)
    build_cache.check_private(tmp_path)
    monkeypatch.setattr(build_cache, "_is_own_group", lambda gid: False)
    with pytest.raises(BuildError, match=f"^{tmp_path} may be written to by its group; set TORCH"):
        build_cache.check_private(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
@pytest.mark.parametrize("above", [False, True])
def test_folders_of_another_user_are_refused(above: bool, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    path = folder.parent if above else folder
    os.chown(path, 12345, -1)
    with pytest.raises(BuildError, match=f"^{path} belongs to another user .uid 12345.; set "):
        build_cache.check_private(folder)


def test_links_are_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`folder_of` resolves links; a link that is created later is refused."""
    (tmp_path / "real").mkdir()
    (tmp_path / "mistral_kernels").symlink_to(tmp_path / "real")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = build_cache.folder_of("digest")
    assert folder == tmp_path / "real" / "digest"
    folder.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(BuildError, match=f"^{folder} must be a folder; set TORCH_EXTENSIONS_DIR"):
        build_cache.check_private(folder)


def test_created_folders_are_private(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        with build_cache.locked(tmp_path / "a" / "b"):
            pass
    finally:
        os.umask(mask)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b")] == [0o700] * 2
    (tmp_path / "a").chmod(0o777)
    with (
        pytest.raises(BuildError, match=f"^{tmp_path}/a may be written to by all"),
        build_cache.locked(tmp_path / "a" / "c"),
    ):
        pass
    assert not (tmp_path / "a" / "c").exists()


def test_public_cache_folder_is_not_used(tmp_path: Path) -> None:
    """The reason is printed as one line on stderr."""
    tmp_path.chmod(0o777)
    loaded, status, error = finish(start(tmp_path))
    reason = f"{tmp_path} may be written to by all users; set TORCH_EXTENSIONS_DIR to a folder "
    assert not loaded
    assert status.startswith(f"not loaded: {reason}")
    (line,) = error.splitlines()
    assert line.startswith(f"mistral_kernels: {reason}")


@pytest.mark.parametrize(
    "variables", [{"TORCH_EXTENSIONS_DIR": "here"}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "x"}]
)
def test_relative_paths_are_refused(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BuildError, match=r"'.+', is relative; set TORCH_EXTENSIONS_DIR to an abs"):
        build_cache.folder_of("digest")
    assert not list(tmp_path.iterdir())


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    message = (
        rf"^{tmp_path} cannot be locked \(No locks available\); set TORCH_EXTENSIONS_DIR to a "
        "folder that only you can write to, on another file system$"
    )
    with (
        pytest.raises(BuildError, match=message),
        build_cache.locked(tmp_path),
    ):
        pass


def test_old_objects_of_other_libraries_are_removed(tmp_path: Path) -> None:
    """The objects in the locked folder are kept; the next build uses them."""
    for folder, age in (("here", 7200), ("old", 7200), ("new", 0)):
        made = tmp_path / folder / ".building-x"
        made.mkdir(parents=True)
        (made / "x.o").write_bytes(b"object")
        os.utime(made, (time.time() - age,) * 2)
    with build_cache.locked(tmp_path / "here"):
        assert sorted(unfinished(tmp_path)) == ["here", "new"]


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"MAX_JOBS": "0"}, "MAX_JOBS must be a positive integer, got '0'"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS must be a positive integer, got 'many'"),
        ({"CXX": "'c++"}, """CXX must be a command, got "'c++": No closing quotation"""),
    ],
)
@needs_compiler
def test_malformed_variables(variables: dict[str, str], reason: str, tmp_path: Path) -> None:
    loaded, status, error = finish(start(tmp_path, **variables))
    assert not loaded
    assert status == f"not loaded: {reason}"
    remedy = "MISTRAL_KERNELS_BUILD=never stops further attempts"
    assert error == f"mistral_kernels: {reason}; {remedy}\n"


def counting_compiler(folder: Path, first: str = ":") -> str:
    """Write a compiler that makes empty objects, and a library without operators.

    It appends the name of each object to the file "compiled". `first` is a shell command that runs
    once, before all others.
    """
    (folder / "x.c").write_text("int x;")
    return fake_compiler(
        folder,
        f"if mkdir {folder}/begun 2>/dev/null; then echo $$ >{folder}/pid; {first}; fi",
        "for out; do :; done  # the last argument",
        '[ "$1" = -c ] || exec cc -shared -fPIC -o "$out" ' + f"{folder}/x.c",
        f'touch "$out"; echo "$out" >>{folder}/compiled',
    )


def complete_objects(cache: Path) -> set[str]:
    """Return the names of the objects that ninja has recorded as complete."""
    logs = (path.read_text() for path in cache.rglob(".ninja_log"))
    return {word for log in logs for word in log.split() if word.endswith(".o")}


def number_of_units() -> int:
    return len(compiler._units("cpu", compiler.supported_instruction_sets()[:1]))


@needs_compiler
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_build_keeps_complete_objects(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C ends the compilers at once. If Python is killed, they finish their work."""
    cxx = counting_compiler(tmp_path, "sleep 100" if number == signal.SIGINT else "sleep 5")
    cache = tmp_path / "cache"
    process = start(cache, CXX=cxx, MAX_JOBS="2")
    await_condition(lambda: complete_objects(cache), process)  # made by the second compiler
    process.send_signal(number)
    _, error = process.communicate(timeout=20)
    assert process.returncode == -number
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in error
        await_end(int((tmp_path / "pid").read_text()))
        assert libraries(cache) == []
    complete = complete_objects(cache)
    _, status, _ = finish(start(cache, CXX=cxx))
    assert "it does not define the operators" in status
    compiled = (tmp_path / "compiled").read_text().split()
    assert len(set(compiled)) == number_of_units()
    assert [compiled.count(name) for name in complete] == [1] * len(complete)
    assert unfinished(cache) == []


@needs_compiler
def test_four_processes_compile_once(tmp_path: Path) -> None:
    cxx = counting_compiler(tmp_path)
    processes = [start(tmp_path / "cache", CXX=cxx) for _ in range(4)]
    errors = [finish(process)[2] for process in processes]
    assert sum("compiling the cpu operators" in error for error in errors) == 1
    assert len((tmp_path / "compiled").read_text().split()) == number_of_units()


@needs_compiler
def test_status_does_not_compile(tmp_path: Path) -> None:
    code = 'from mistral_kernels.ops import extension; print(extension.status("cpu"))'
    out, error = start(tmp_path, code).communicate(timeout=60)
    assert out == (
        "not loaded: not compiled yet; the first use or `python -m mistral_kernels build` compiles "
        "it\n"
    )
    assert error == ""
    missing, _ = start(tmp_path, code, PATH="", CXX="").communicate(timeout=60)
    assert missing.startswith("not loaded: no compiler: c++ is not on PATH; ")
    assert list(tmp_path.iterdir()) == []


@needs_compiler
def test_a_missing_ninja_is_one_line_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(compiler.NotBuiltError, match=r"^no ninja: run `pip install ninja`$"):
        compiler._ninja()
    (tmp_path / "ninja").write_text("")
    (tmp_path / "ninja").chmod(0o755)
    assert compiler._ninja() == str(tmp_path / "ninja")
    # A folder named ninja on sys.path is a namespace package.
    monkeypatch.setitem(sys.modules, "ninja", ModuleType("ninja"))
    assert compiler._ninja() == str(tmp_path / "ninja")


def test_paths_are_quoted_for_ninja_and_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "$a b'c"
    folder.mkdir()
    monkeypatch.setenv("CXX", f"'{counting_compiler(tmp_path)}' '-I$x y'")
    compiler.build("cpu", folder / "$l b.so", instruction_sets=["plain"])
    assert {path.name for path in folder.iterdir()} == {"$l b.so", "$l b.so.sha256"}


def await_condition(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)


@pytest.mark.slow
@needs_compiler
def test_library_is_built_once(tmp_path: Path, cxx: str) -> None:
    """The first process builds the library and prints a line. Later processes load it silently."""
    loaded, status, error = finish(start(tmp_path, CXX=cxx))
    (library,) = libraries(tmp_path)
    assert loaded
    assert status == f"loaded from {library}"
    best = compiler.supported_instruction_sets()[0]
    assert error.splitlines() == [
        f"mistral_kernels: compiling the cpu operators ({best}), once, into {library.parent}"
    ]
    names = {path.name for path in library.parent.iterdir()}
    assert names == {library.name, checksum_file(library).name, ".lock"}
    for setting in ("never", "always", "auto"):
        again = finish(start(tmp_path, CXX=cxx, MISTRAL_KERNELS_BUILD=setting))
        assert again == (True, status, "")


@pytest.mark.slow
@needs_compiler
def test_one_process_builds_while_others_wait(tmp_path: Path, cxx: str) -> None:
    processes = [start(tmp_path, CXX=cxx) for _ in range(3)]
    results = [finish(process) for process in processes]
    (library,) = libraries(tmp_path)
    assert [result[:2] for result in results] == 3 * [(True, f"loaded from {library}")]
    lines = [line for *_, error in results for line in error.splitlines()]
    assert sum("compiling the cpu operators" in line for line in lines) == 1
    assert {line for line in lines if "compiling the cpu operators" not in line} <= {
        f"mistral_kernels: waiting for a process that compiles {library.parent}"
    }


@pytest.mark.slow
@needs_compiler
def test_build_after_a_killed_build(tmp_path: Path, cxx: str) -> None:
    """The killed build ends, or continues while the next one waits; then the next one succeeds."""
    wrapper = fake_compiler(
        tmp_path,
        f"if [ ! -e {tmp_path}/begun ]; then touch {tmp_path}/begun; exec sleep 3; fi",
        f'exec {cxx} "$@"',
    )
    cache = tmp_path / "cache"
    killed = start(cache, CXX=wrapper, MAX_JOBS="1")
    await_condition((tmp_path / "begun").exists, killed)
    killed.kill()
    killed.wait()
    assert libraries(cache) == []
    assert len(unfinished(cache)) == 1
    loaded, status, _ = finish(start(cache, CXX=wrapper))
    assert loaded
    assert status == f"loaded from {libraries(cache)[0]}"
    assert unfinished(cache) == []


@pytest.mark.slow
def test_cache_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    loaded, status, _ = finish(start(tmp_path / "file"))
    assert not loaded
    assert f"{tmp_path / 'file'} must be a folder" in status


@needs_compiler
@pytest.mark.slow
def test_damaged_library_with_build_never(tmp_path: Path, cxx: str) -> None:
    finish(start(tmp_path, CXX=cxx))
    (library,) = libraries(tmp_path)
    library.write_bytes(library.read_bytes()[:-1])
    loaded, status, error = finish(start(tmp_path, CXX=cxx, MISTRAL_KERNELS_BUILD="never"))
    assert not loaded
    assert error == ""
    assert f"{library} cannot be loaded: its SHA-256 must be " in status
    assert status.endswith("; not compiled, since MISTRAL_KERNELS_BUILD=never")


@needs_compiler
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("int x;", "cannot be loaded: it does not define the operators"),
        ("extern int nowhere(void); int x(void) { return nowhere(); }", "undefined symbol"),
    ],
)
def test_unusable_libraries_are_compiled_only_once(
    source: str, reason: str, tmp_path: Path
) -> None:
    """The second process reports the remedy instead of compiling again."""
    (tmp_path / "x.c").write_text(source)
    wrapper = fake_compiler(
        tmp_path,
        'for out; do :; done; [ "$1" = -c ] && exec touch "$out"',
        f'exec cc -shared -fPIC -Wl,-z,now -o "$out" {tmp_path}/x.c',
    )
    cache = tmp_path / "cache"
    loaded, status, error = finish(start(cache, CXX=wrapper))
    assert not loaded
    assert reason in status
    assert "compiling" in error
    (library,) = libraries(cache)
    loaded, status, error = finish(start(cache, CXX=wrapper))
    assert not loaded
    assert reason in status
    assert "compiling" not in error
    assert f"; remove {library.parent} to compile it again" in status


def damages(generator: random.Random) -> dict[str, Callable[[Path], object]]:
    """Return functions that damage a file, by name: power failures, other programs, odd files."""

    def bytes_like(change: Callable[[bytearray], object]) -> Callable[[Path], object]:
        def damage(path: Path) -> None:
            contents = bytearray(path.read_bytes())
            change(contents)
            path.write_bytes(contents)

        return damage

    def replaced(make: Callable[[Path], object]) -> Callable[[Path], object]:
        def damage(path: Path) -> None:
            path.unlink()
            make(path)

        return damage

    def zero_a_quarter(contents: bytearray) -> None:
        quarter = -(-len(contents) // 4)
        begin = generator.randrange(4) * quarter
        contents[begin : begin + quarter] = bytes(len(contents[begin : begin + quarter]))

    def overwrite(contents: bytearray) -> None:
        for _ in range(64):
            contents[generator.randrange(min(20_000, len(contents)))] = generator.randrange(256)

    def truncate(contents: bytearray) -> None:
        del contents[generator.randrange(len(contents)) :]

    def sparse(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(1 << 40)

    return {
        "a quarter zeroed": bytes_like(zero_a_quarter),
        "bytes overwritten": bytes_like(overwrite),
        "truncated": bytes_like(truncate),
        "empty": bytes_like(bytearray.clear),
        "a program": lambda path: shutil.copy(os.path.realpath(sys.executable), path),
        "a terabyte": sparse,
        "absent": replaced(lambda path: None),
        "a FIFO": replaced(os.mkfifo),
        "a device": replaced(lambda path: path.symlink_to("/dev/zero")),
        "a loop": replaced(lambda path: path.symlink_to(path)),
        "a dangling link": replaced(lambda path: path.symlink_to("nowhere")),
        "a folder": replaced(lambda path: (path / "x").mkdir(parents=True)),
    }


# Forks one process per line of stdin, so that a crash ends only that process.
FORKING = """
import os, sys, torch
from mistral_kernels.ops import extension
for _ in sys.stdin:
    if not os.fork():
        loaded = extension.load("cpu")
        print(loaded and len(torch.ops.mistral_kernels.instruction_sets()) > 0, flush=True)
        os._exit(0)
    print("ended with", os.wait()[1], flush=True)
"""


@needs_compiler
@pytest.mark.slow
def test_damaged_libraries_are_rebuilt(tmp_path: Path, cxx: str) -> None:
    """A damaged or replaced library or checksum file is detected, and the library is rebuilt."""
    finish(start(tmp_path, CXX=cxx))
    (library,) = libraries(tmp_path)
    generator = random.Random(random.getrandbits(32))
    errors = tmp_path / "errors"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", FORKING],
            env=settings(tmp_path, CXX=cxx),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    signal.signal(signal.SIGALRM, lambda *_: process.kill())
    for _ in range(5):
        for name, damage in damages(generator).items():
            file = generator.choice([library, library, checksum_file(library)])
            damage(file)
            what = f"{name} replaces {file.name}"
            signal.alarm(60)  # seconds; a build with cached objects takes 1 to 2
            process.stdin.write("\n")
            process.stdin.flush()
            lines = [process.stdout.readline(), process.stdout.readline()]
            signal.alarm(0)
            assert lines == ["True\n", "ended with 0\n"], (what, errors.read_text()[-2000:])
            assert build_cache.verify_checksum(library), what
    process.stdin.close()
    assert process.wait(20) == 0
    assert unfinished(tmp_path) == []


@needs_compiler
def test_foreign_library_fails_the_checksum(tmp_path: Path) -> None:
    """A valid library of another project under the same file name is refused."""
    library = tmp_path / "mistral_kernels_cpu.so"
    (tmp_path / "x.c").write_text("int x;")
    compiling = ["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "x.c")]
    subprocess.run(compiling, check=True)
    checksum_file(library).write_text(64 * "0")
    with pytest.raises(BuildError, match=f"^{library} cannot be loaded: its SHA-256 must be '000"):
        build_cache.verify_checksum(library)
    assert not extension._is_built_meanwhile(library)
