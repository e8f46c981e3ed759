"""What a command in the sandbox can and cannot do; every command goes through one path."""

from __future__ import annotations

import ast
import errno
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from corral.executor.sandbox import LIMITS, TMP_BYTES, command_line, environment
from corral.executor.service import Executor
from corral.executor.syscalls import sandbox_filter
from tests.executor.make import Bench, ReadyBench
from tests.support import needs

SECRET = "canary-7c1d"
GATEWAY_ENV = {
    "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
    "LANG": "C.UTF-8",
    "LC_TIME": "C.UTF-8",
    "HOME": "/root",
    "CORRAL_TOKEN": SECRET,
    "OPENAI_API_KEY": SECRET,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "SSH_AUTH_SOCK": SECRET,
    "LD_PRELOAD": "",
    "BASH_ENV": "",
    "PYTHONPATH": SECRET,
}


@pytest.fixture(params=[Bench, ReadyBench], ids=["fresh", "made ready"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    """Commands in a sandbox that is started for them, and in one that waited for them."""
    needs.bubblewrap()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "token").write_text(SECRET)
    (tmp_path / "work").mkdir()
    executor = Executor(environ=GATEWAY_ENV, data_dir=tmp_path / "data")
    yield request.param(executor, tmp_path / "work")
    await executor.close()


GOLDEN = """/usr/bin/bwrap --unshare-user --uid 65534 --gid 65534
--unshare-pid --unshare-ipc --unshare-uts --unshare-cgroup-try --unshare-net
--hostname corral --new-session --die-with-parent --cap-drop ALL --disable-userns
--json-status-fd 3 --block-fd 4 --seccomp 6
--ro-bind /usr /usr --symlink usr/bin /bin --ro-bind /lib /lib
--ro-bind-try /etc/alternatives /etc/alternatives --ro-bind-try /etc/ca-certificates /etc/ca-certificates
--ro-bind-try /etc/crypto-policies /etc/crypto-policies --ro-bind-try /etc/group /etc/group
--ro-bind-try /etc/hosts /etc/hosts --ro-bind-try /etc/ld.so.cache /etc/ld.so.cache
--ro-bind-try /etc/ld.so.conf /etc/ld.so.conf --ro-bind-try /etc/ld.so.conf.d /etc/ld.so.conf.d
--ro-bind-try /etc/localtime /etc/localtime --ro-bind-try /etc/mime.types /etc/mime.types
--ro-bind-try /etc/nsswitch.conf /etc/nsswitch.conf --ro-bind-try /etc/os-release /etc/os-release
--ro-bind-try /etc/passwd /etc/passwd --ro-bind-try /etc/pki/ca-trust/extracted /etc/pki/ca-trust/extracted
--ro-bind-try /etc/pki/tls/certs /etc/pki/tls/certs --ro-bind-try /etc/pki/tls/openssl.cnf /etc/pki/tls/openssl.cnf
--ro-bind-try /etc/protocols /etc/protocols --ro-bind-try /etc/services /etc/services
--ro-bind-try /etc/ssl/certs /etc/ssl/certs --ro-bind-try /etc/ssl/openssl.cnf /etc/ssl/openssl.cnf
--dev /dev --size 1073741824 --tmpfs /dev/shm --remount-ro /dev
--proc /proc --remount-ro /proc
--size 1073741824 --tmpfs /tmp --dir /tmp/home
--bind /srv/w /srv/w --bind /srv/w/a /srv/w/a --bind /srv/w/a/b /srv/w/a/b
--tmpfs /srv/w/a/b/data --remount-ro / --chdir /srv/w --"""


def golden(**changes: object) -> list[str]:
    values: dict[str, object] = {
        "root": Path("/srv/w"),
        "network": "none",
        "bwrap": "/usr/bin/bwrap",
        "version": (0, 8, 0),
        "user": 0,
        "links": [("/bin", "usr/bin"), ("/lib", None)],
        "hidden": [Path("/srv/w/a/b/data"), Path("/srv"), Path("/srv/w-other")],
    }
    return command_line(["prog", "--bind", "/", "a b"], **(values | changes))  # type: ignore[arg-type]


def test_the_command_line_is_exactly_this() -> None:
    assert golden() == [*GOLDEN.split(), "prog", "--bind", "/", "a b"]


def test_only_these_options_depend_on_policy_user_and_version() -> None:
    plain = golden()
    network = golden(network="host")
    assert "--unshare-net" not in network
    assert [word for word in network if word not in plain] == ["/etc/resolv.conf"] * 2
    user = golden(user=1000)
    assert "--uid" not in user
    assert "--gid" not in user
    old = golden(version=(0, 4, 0))
    assert "--disable-userns" not in old
    assert "--size" not in old


async def test_the_environment_holds_a_fixed_list_and_no_secret(bench: Bench) -> None:
    outcome = await bench.bash("env; cat /proc/self/environ; cat /proc/1/environ; cat /proc/*/environ")
    assert SECRET not in outcome.output
    names = {line.partition("=")[0] for line in (await bench.call("process.exec", argv=["env"])).output.splitlines()}
    assert names == set(environment(GATEWAY_ENV)) | {"PWD"}
    assert "LC_TIME" in names


async def test_host_mode_hands_no_secret_on_either(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRAL_TOKEN", SECRET)  # what starts the commands must not have it either
    outcome = await bench.on(bash_mode="host").bash("env; cat /proc/$PPID/environ")
    assert SECRET not in outcome.output


async def test_the_folder_is_writable_and_nothing_else_is_there(bench: Bench) -> None:
    (bench.root.parent / "neighbour").write_text(SECRET)
    outcome = await bench.bash("touch mine && ls -A / && ls -A /home /root /var /run /srv /mnt /opt /sys; ls -A ..")
    assert (bench.root / "mine").exists()
    there = {line for line in outcome.output.splitlines() if "No such file" not in line}
    allowed = {"bin", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "sbin", "tmp", "usr", "exit status 2"}
    assert there <= allowed | {bench.root.parts[1], bench.root.name}
    for path in (
        bench.root.parent / "neighbour",
        bench.root.parent / "data" / "token",
        Path("/etc/shadow"),
        Path("/root"),
        Path("/etc/ssl/private"),
    ):
        assert "No such file" in (await bench.bash(f"ls {path}")).output


@pytest.mark.parametrize(
    "target",
    [
        "/usr/x", "/x", "/etc/x", "/bin/x", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname",
        "/proc/sysrq-trigger", "/proc/sys/vm/drop_caches", "/dev/x/y", "/etc/passwd", "/proc/1/oom_score_adj",
    ],
)  # fmt: skip
async def test_writing_elsewhere_fails(bench: Bench, target: str) -> None:
    outcome = await bench.bash(f"echo x > {target}")
    assert outcome.status == "failed"
    assert not Path("/x").exists()
    assert not Path("/usr/x").exists()


async def test_what_lies_beside_the_folder_is_the_sandboxs_own(bench: Bench) -> None:
    await bench.bash("mkdir -p ../beside && touch ../beside/x ../y /tmp/z")
    assert sorted(os.listdir(bench.root.parent)) == ["data", "work"]
    assert not Path("/tmp/z").exists()


async def test_there_is_no_capability_and_no_way_to_gain_one(bench: Bench) -> None:
    status = (await bench.bash("cat /proc/self/status")).output
    values = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(values[name], 16) == 0
    assert values["NoNewPrivs"] == "1"
    for command in ("mount -t tmpfs x /tmp", "unshare -U true", "unshare -n true", "chroot / true", "mknod n c 1 3"):
        if shutil.which(command.split()[0]):
            assert (await bench.bash(command)).status == "failed", command


async def test_no_file_of_the_folder_becomes_the_gateways_user_for_who_starts_it(bench: Bench) -> None:
    if not sandbox_filter():
        pytest.skip("no filter for this machine")
    tries = [
        "touch a; chmod 4755 a",
        "touch b; chmod 755 b; chmod g+s b",
        "cp /usr/bin/env c; chmod u+s c",
        "install -m 4755 /usr/bin/env d",
    ]
    if Path("/usr/bin/python3").exists():
        code = "import os; os.open('e', os.O_CREAT | os.O_WRONLY, 0o4755)"
        tries += [f'python3 -c "{code}"', "python3 -c \"import os; os.mknod('f', 0o104755)\""]
    for command in tries:
        assert (await bench.bash(command)).status == "failed", command
    assert [path.name for path in bench.root.iterdir() if path.stat().st_mode & 0o6000] == []
    assert (await bench.bash("touch g; chmod 755 g; mkdir -m 1777 h; umask 0; touch i; test -x g")).status == "success"


async def test_the_keys_that_the_kernel_keeps_for_the_gateways_user_are_not_reached(bench: Bench) -> None:
    numbers = {"x86_64": 250, "aarch64": 219}.get(os.uname().machine)
    if not sandbox_filter() or numbers is None or not Path("/usr/bin/python3").exists():
        pytest.skip("no filter for this machine, or no /usr/bin/python3 to ask with")
    # keyctl(KEYCTL_GET_KEYRING_ID, KEY_SPEC_USER_KEYRING, 0)
    code = f"import ctypes; print(ctypes.CDLL(None, use_errno=True).syscall({numbers}, 0, -4, 0), ctypes.get_errno())"
    assert (await bench.bash(f'python3 -c "{code}"')).output == f"-1 {errno.ENOSYS}\n"


async def test_no_file_system_in_memory_is_without_a_bound(bench: Bench) -> None:
    for folder in ("/dev", "/dev/pts", "/", "/etc", "/proc"):
        assert (await bench.bash(f"echo x > {folder}/file")).status == "failed", folder
    sizes = (await bench.bash("echo x > /dev/shm/file && df --output=size -k /dev/shm /tmp")).output.split()[1:]
    assert [int(size) * 1024 for size in sizes] == [TMP_BYTES, TMP_BYTES]
    assert (await bench.bash("echo x > /dev/null && head -c 1 /dev/zero > /dev/full")).output.count("No space") == 1


async def test_the_user_is_not_root_and_files_are_the_gateways(bench: Bench) -> None:
    assert int((await bench.bash("id -u")).output) == (65534 if os.getuid() == 0 else os.getuid())
    await bench.bash("touch made; chmod 4755 made")
    assert (bench.root / "made").stat().st_uid == os.getuid()


async def test_other_processes_are_neither_seen_nor_reached(bench: Bench) -> None:
    outcome = await bench.bash(f"ls /proc | grep -E '^[0-9]+$' | wc -l; kill -0 {os.getpid()}; kill -9 -1; echo on")
    assert int(outcome.output.splitlines()[0]) < 10
    os.kill(os.getpid(), 0)


async def test_there_is_no_network_unless_policy_says_so(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        command = f"exec 3<>/dev/tcp/127.0.0.1/{port} && echo connected"
        assert "connected" not in (await bench.bash(command)).output
        thread = threading.Thread(target=lambda: listener.accept()[0].close())
        thread.start()
        assert "connected" in (await bench.on(bash_network="host").bash(command)).output
        thread.join()


async def test_abstract_sockets_of_the_host_are_not_reached(bench: Bench) -> None:
    name = f"\0corral-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        code = f"import socket; socket.socket(socket.AF_UNIX).connect({name!r}); print('conn' + 'ected')"
        (bench.root / "connect.py").write_text(code)
        if not Path("/usr/bin/python3").exists():
            pytest.skip("no /usr/bin/python3 to connect with")
        assert "connected" not in (await bench.bash("/usr/bin/python3 connect.py")).output


async def test_each_call_has_a_tmp_of_its_own(bench: Bench) -> None:
    before = set(os.listdir("/tmp"))
    outcome = await bench.bash("echo x > /tmp/left; echo y > ~/left; echo z > $TMPDIR/more; ls /tmp")
    assert outcome.output.split() == sorted(["home", "left", "more", *bench.root.parts[2:3]])
    assert (await bench.bash("cat /tmp/left ~/left")).status == "failed"
    assert "left" not in set(os.listdir("/tmp")) - before


@pytest.mark.parametrize("mode", ["sandbox", "host"])
async def test_no_state_of_the_shell_goes_from_one_call_to_the_next(bench: Bench, mode: str) -> None:
    bench = bench.on(bash_mode=mode)
    await bench.bash("export X=left; cd /; umask 0; ls() { echo left; }; export -f ls; set -k; alias pwd='echo left'")
    outcome = await bench.bash("echo ${X-unset}; pwd; umask; type -t ls; echo $-; alias")
    assert outcome.output.split()[:4] == ["unset", str(bench.root), "0022", "file"]
    assert "left" not in outcome.output


async def test_limits_are_those_that_are_documented(bench: Bench) -> None:
    text = (await bench.bash("cat /proc/self/limits")).output
    rows = {line[:26].strip(): line[26:].split()[:2] for line in text.splitlines()[1:]}
    for row, name in (
        ("Max data size", "DATA"),
        ("Max processes", "NPROC"),
        ("Max open files", "NOFILE"),
        ("Max file size", "FSIZE"),
        ("Max core file size", "CORE"),
    ):
        assert rows[row] == [str(LIMITS[name])] * 2


async def test_memory_beyond_the_limit_is_not_given(bench: Bench) -> None:
    outcome = await bench.bash("dd if=/dev/zero of=/dev/null bs=6G count=1")
    assert "memory exhausted" in outcome.output


AS_USER = """
import asyncio, sys
from pathlib import Path
from corral.executor.service import Executor
from tests.executor.make import Bench

async def main():
    executor = Executor()
    bench = Bench(executor, Path(sys.argv[1]))
    print((await bench.bash("id -u; echo hi > f; cat f; echo x > /proc/sys/kernel/core_pattern")).output)
    bomb = "for i in $(seq 600); do sleep 20 & done 2>&1 | grep -m1 -o 'Resource temporarily'"
    print((await bench.bash(bomb)).output)
    await executor.close()

asyncio.run(main())
"""


def interpreter_for(user: int) -> str | None:
    """A Python of this version that another user can start with this checkout's libraries."""
    for candidate in (
        sys.executable,
        shutil.which(f"python3.{sys.version_info.minor}", path="/usr/bin:/usr/local/bin"),
    ):
        if candidate is None:
            continue
        try:
            done = run_as(user, [candidate, "-c", "import corral.executor.service, tests.executor.make"])
        except PermissionError:
            continue
        if done.returncode == 0:
            return candidate
    return None


def run_as(user: int, argv: list[str]) -> subprocess.CompletedProcess[bytes]:
    checkout = Path(__file__).parents[2]
    # Python's own library comes with the interpreter; only what this checkout uses is handed on.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join([str(checkout), str(checkout / "src"), *libraries])}
    return subprocess.run(
        argv, user=user, group=user, extra_groups=[], capture_output=True, timeout=60, cwd="/", env=env
    )


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_it_works_for_a_normal_user_and_a_fork_bomb_ends_at_the_number(tmp_path: Path) -> None:
    needs.bubblewrap()
    user = 54321
    python = interpreter_for(user)
    if python is None:
        pytest.skip("there is no interpreter here that another user may start")
    folder = Path(tempfile.mkdtemp(prefix="corral-user-"))
    try:
        os.chown(folder, user, user)
        done = run_as(user, [python, "-c", AS_USER, str(folder)])
        assert done.returncode == 0, done.stderr
        words = done.stdout.decode().split()
        assert words[:2] == [str(user), "hi"]
        assert "Read-only" in words
        assert words[-2:] == ["Resource", "temporarily"]
        assert (folder / "f").stat().st_uid == user
    finally:
        shutil.rmtree(folder)


async def test_an_argument_vector_arrives_as_it_was_given(bench: Bench) -> None:
    argv = ["printf", "[%s]", "a b", "$HOME", "*", "", "--bind", "/", "`id`", "\n", "ä", "-c"]
    outcome = await bench.call("process.exec", argv=argv)
    assert outcome.output == "".join(f"[{word}]" for word in argv[2:])


@pytest.mark.parametrize("mode", ["sandbox", "host"])
async def test_a_command_that_looks_like_an_option_is_a_command(bench: Bench, mode: str) -> None:
    outcome = await bench.on(bash_mode=mode).bash("--version; echo $0 $#")
    assert "--version: " in outcome.output
    assert "GNU bash, version" not in outcome.output


async def test_git_takes_no_files_that_a_tool_may_write_for_a_repository(bench: Bench) -> None:
    if not Path("/usr/bin/git").exists():
        pytest.skip("no /usr/bin/git to run")
    config = '[core]\n\trepositoryformatversion=0\n\tbare=false\n\tworktree=.\n\tfsmonitor="touch ran; false"\n'
    for path, content in (("HEAD", "ref: refs/heads/main\n"), ("config", config), ("refs/x", ""), ("objects/x", "")):
        await bench.call("file.write", path=path, content=content)
    for run in (bench, bench.on(bash_mode="host")):
        assert (await run.bash("git status")).status == "failed"
        assert not (bench.root / "ran").exists()
    assert (await bench.bash("cd objects && git init -q . && git status")).status == "success"


async def test_files_of_the_workspace_are_not_configuration(bench: Bench) -> None:
    for name in (".bashrc", ".bash_profile", ".profile", ".env", ".corral", "corral.toml", "sitecustomize.py"):
        (bench.root / name).write_text("touch hooked; echo hooked\n")
    (bench.root / "launcher.py").write_text("raise SystemExit('hooked')")
    outcome = await bench.bash("echo fine")
    assert outcome.output == "fine\n"
    assert not (bench.root / "hooked").exists()


async def test_a_link_left_as_a_device_or_socket_does_no_harm(bench: Bench) -> None:
    assert (await bench.bash("ln -s /proc/self/fd/0 in; ln -s / out; mkfifo p; cat out/etc/shadow")).status == "failed"
    outcome = await bench.call("file.read", path="out/etc/hostname")
    assert outcome.error is not None
    assert "leads out" in outcome.error.message


def test_processes_are_started_in_one_module_and_sandboxed_in_one() -> None:
    folder = Path(__file__).parents[2] / "src" / "corral" / "executor"
    starters: dict[str, set[str]] = {}
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                if name in ("os.fork", "os.execvpe", "subprocess.Popen", "subprocess.run") or name.startswith(
                    ("os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.popen", "asyncio.create_subprocess")
                ):
                    starters.setdefault(file.name, set()).add(name)
    assert starters == {
        "launcher.py": {"os.fork", "os.execvpe"},
        "processes.py": {"subprocess.Popen"},
        "sandbox.py": {"subprocess.run"},  # asks bubblewrap for its version
    }
