"""The launcher: output, failures, signals, the workers' environments, and wrong usage."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from keras_cifar import launch
from keras_cifar.core import cli, environment
from keras_cifar.core.config import TrainConfig
from keras_cifar.distributed import launcher

FAST = [sys.executable, "-I", "-S", "-u", "-c"]  # Python without what takes time to start
FOREVER = "import time; print('here', flush=True); time.sleep(60)"
# The launcher as a process of its own, with scripts instead of training.
LAUNCHER = """
import os, sys
from keras_cifar import launch
from keras_cifar.core import cli
from keras_cifar.distributed import launcher

def main(options, scripts):
    commands = [[sys.executable, "-I", "-S", "-u", "-c", script] for script in scripts]
    launcher.run_workers(commands, [dict(os.environ)] * len(commands), grace=5)

cli.run("launch", main, launch.LaunchOptions, "", "SCRIPT ...", tensorflow=False)
"""
# A worker with a child process; it prints both ids.
FAMILY = """
import os, subprocess, time
child = subprocess.Popen(["sleep", "60"])
print("pids", os.getpid(), child.pid, flush=True)
time.sleep(60)
"""


def run(*scripts, grace=5.0):
    commands = [[*FAST, script] for script in scripts]
    launcher.run_workers(commands, [dict(os.environ)] * len(scripts), grace)


def ended(*scripts, grace=5.0):
    """(status, message) of a run that does not succeed."""
    with pytest.raises(launcher.EndedError) as caught:
        run(*scripts, grace=grace)
    return caught.value.status, str(caught.value)


def until(path):
    """The beginning of a script that waits for a file."""
    return f"import os, time\nwhile not os.path.exists({str(path)!r}): time.sleep(0.01)\n"


def start_launcher(*scripts, stderr=subprocess.PIPE):
    command = [sys.executable, "-c", LAUNCHER, "--workers", str(len(scripts)), "--", *scripts]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)


def family_of(process, workers=2):
    """The ids of the workers and of their children, from the workers' first lines."""
    lines = [process.stdout.readline() for _ in range(workers)]
    assert sorted(line[:8] for line in lines) == [f"[{i}] pids" for i in range(workers)]
    return [int(number) for line in lines for number in line.split()[2:]]


def alive(pid):
    try:
        # The state follows the name in parentheses. Not every container reaps zombies.
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids, seconds=5.0):
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(alive, pids))


# Output


def test_each_line_begins_with_its_workers_number(capfd):
    script = "import sys; print('a\\n\\nb %d'); print('error %d', file=sys.stderr, end='')"
    run(script % (0, 0), script % (1, 1))
    output = capfd.readouterr()
    for index in range(2):
        mine = [line for line in output.out.splitlines() if line.startswith(f"[{index}]")]
        assert mine == [f"[{index}] a", f"[{index}] ", f"[{index}] b {index}"]
    assert sorted(output.err.splitlines()) == ["[0] error 0", "[1] error 1"]
    assert output.err.endswith("\n")


def test_the_last_state_of_a_progress_bar_is_shown(capfdbinary):
    cases = {
        b"10%\r20%\r30%\ndone": ["30%", "done"],
        b"10%\r20%\r30%": ["30%"],
        b"windows\r\nlines\r\n": ["windows", "lines"],
        b"\r10%\r   \rdone\n": ["done"],
        b"\r10%\r   \r": [],
    }
    code = "import os, time\nfor t in {!r}, {!r}: os.write(1, t); time.sleep(0.02)"
    run(*(code.format(written[:5], written[5:]) for written in cases))
    lines = capfdbinary.readouterr().out.decode().split("\n")
    for index, shown in enumerate(cases.values()):
        prefix = f"[{index}] "
        assert [x.removeprefix(prefix) for x in lines if x.startswith(prefix)] == shown


def test_long_lines_of_several_workers_are_not_mixed():
    script = "import sys\nfor s in [sys.stdout, sys.stderr] * 5: print(str(%d) * 300_000, file=s)"
    process = start_launcher(script % 0, script % 1, stderr=subprocess.STDOUT)
    lines = process.communicate()[0].splitlines()
    assert process.returncode == 0
    assert len(lines) == 20
    assert set(lines) == {f"[{i}] {str(i) * 300_000}" for i in range(2)}


def test_workers_end_when_the_output_cannot_be_written():
    script = (
        "import os; print('pids', os.getpid(), os.getpid())\n"
        "try:\n    while True: print('y')\n"
        "except BrokenPipeError: os._exit(1)"
    )
    with start_launcher(script) as process:
        pids = family_of(process, 1)
        process.stdout.close()
        assert process.wait(10) == 1
        assert process.stderr.read() == ""
    assert gone(pids)


# Failures


def test_a_failure_ends_the_others_and_its_status_is_returned(capfd):
    scripts = "import os; print(os.getpid())\n" + FOREVER, "import os; os._exit(3)", FOREVER
    assert ended(*scripts) == (3, "worker 1 failed with status 3")
    assert not any(alive(int(pid)) for pid in re.findall(r"\] (\d+)", capfd.readouterr().out))


def test_what_a_worker_wrote_before_it_failed_is_shown(capfd):
    assert ended("import os; os.write(1, b'line\\n' * 100_000); os._exit(3)")[0] == 3
    assert capfd.readouterr().out == "[0] line\n" * 100_000


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_failure_wins(first, tmp_path):
    # The end of the first frees a lock that the second waits for, like a connection that closes.
    lock, held, asked = (str(tmp_path / name) for name in ("lock", "held", "asked"))
    take = f"import fcntl; file = open({lock!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
    scripts = {
        first: f"{take}open({held!r}, 'w')\n{until(asked)}time.sleep(0.1); os._exit(3)",
        1 - first: f"{until(held)}open({asked!r}, 'w')\n{take}time.sleep(0.02); os._exit(5)",
    }
    assert ended(scripts[0], scripts[1]) == (3, f"worker {first} failed with status 3")


def test_the_status_of_terminated_workers_is_ignored(capfd, tmp_path):
    ready = str(tmp_path / "ready")
    other = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'end'), os._exit(7)))\n"
        f"open({ready!r}, 'w'); time.sleep(60)"
    )
    assert ended(other, until(ready) + "os._exit(3)")[0] == 3
    assert capfd.readouterr().out == "[0] end\n"


@pytest.mark.parametrize(("number", "name"), [(9, "SIGKILL"), (40, "signal 40")])
def test_a_killed_worker_is_named_with_its_signal(number, name):
    found = ended(FOREVER, f"import os; os.kill(os.getpid(), {number})")
    assert found == (1, f"worker 1 was killed by {name}")


def test_a_worker_that_ignores_sigterm_is_killed_after_the_grace_period(capfd, tmp_path):
    ready = str(tmp_path / "ready")
    ignore = "import signal; signal.signal(15, signal.SIG_IGN)\n"
    stubborn = ignore + FAMILY.replace("time.sleep", f"open({ready!r}, 'w'); time.sleep")
    ended(stubborn, until(ready) + "os._exit(3)", grace=0.5)
    pids = [int(pid) for pid in capfd.readouterr().out.split()[2:]]
    assert len(pids) == 2
    assert gone(pids)


def test_a_command_that_cannot_be_started_ends_the_others(capfd):
    environments = [dict(os.environ), {"a": "a" * 2_000_000}]  # longer than Linux takes
    with pytest.raises(OSError, match="too long"):
        launcher.run_workers([[*FAST, FAMILY]] * 2, environments)


# Signals


@pytest.mark.parametrize(
    ("number", "status", "error"),
    [
        (signal.SIGINT, 130, "launch: error: interrupted\n"),
        (signal.SIGTERM, 143, "launch: error: terminated\n"),
        (signal.SIGKILL, -9, ""),
    ],
)
def test_a_signal_ends_everything(number, status, error):
    script, seconds = FAMILY, 0
    if number == signal.SIGKILL:  # Linux then kills the workers, but not their children.
        script = FAMILY.replace("child.pid", "os.getpid()").replace("subprocess.Popen", "list")
        seconds = 5.0
    with start_launcher(script, script) as process:
        pids = family_of(process)
        assert all(map(alive, pids))
        process.send_signal(number)
        assert process.wait(10) == status
        assert process.stderr.read() == error
    assert gone(pids, seconds)


def test_a_signal_between_two_starts_loses_no_worker_and_handlers_are_restored(monkeypatch):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    start, pids = subprocess.Popen, []

    def interrupted(*args, **kwargs):
        worker = start(*args, **kwargs)
        pids.append(worker.pid)
        signal.raise_signal(signal.SIGINT)
        return worker

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    assert ended(FOREVER, FOREVER) == (130, "interrupted")
    assert len(pids) == 2
    assert gone(pids, 0)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_worker_does_not_start_after_its_launcher_has_died():
    command = [sys.executable, "-c", launcher.DIE_WITH_PARENT]
    for pid, output in ((os.getpid(), b"begun\n"), (1 << 22, b"")):
        done = subprocess.run([*command, str(pid), "/bin/echo", "begun"], capture_output=True)
        assert (done.stdout, done.stderr) == (output, b"")


# The workers' environments


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of 8 CPUs without GPUs, on which the user has set nothing."""
    for name in (*environment.THREADS, "CUDA_VISIBLE_DEVICES", "TF_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(environment, "cpu_quota", lambda: None)
    monkeypatch.setattr(environment, "changed", set())
    monkeypatch.setenv("PATH", str(tmp_path))
    return monkeypatch


def test_each_worker_runs_in_its_environment_and_is_waited_for(capfd):
    script = "import os, time; time.sleep(int(os.environ['X']) * 0.3); print(os.environ['X'])"
    launcher.run_workers([[*FAST, script]] * 2, [{"X": "1"}, {"X": "0"}])
    assert capfd.readouterr().out == "[1] 0\n[0] 1\n"


@pytest.mark.parametrize(
    ("workers", "quota", "threads"),
    [(3, None, 2), (16, None, 1), (2, 5, 2), (2, 99, 4)],
)
def test_workers_share_the_cpus(machine, workers, quota, threads):
    machine.setattr(environment, "cpu_quota", lambda: quota)
    found = environment.shares(workers)
    assert len(found) == workers
    for each in found:
        counts = [str(threads), str(max(2, threads))]
        assert [each[name] for name in environment.THREADS] == counts
    assert not set(environment.THREADS) & set(os.environ)


def test_variables_of_the_user_stay_but_for_tf_config(machine):
    intra, inter = environment.THREADS
    machine.setenv(intra, "7")
    machine.setenv(inter, "8")
    machine.setattr(environment, "changed", {inter})  # by this process, from the quota
    machine.setenv("TF_CONFIG", "{}")
    machine.setenv("OTHER", "stays")
    for each in environment.shares(2):
        assert (each[intra], each[inter], each["OTHER"]) == ("7", "4", "stays")
        assert "TF_CONFIG" not in each


@pytest.mark.parametrize(
    ("visible", "shares"),
    [
        ("0,1,2,3", ["0,1", "2,3"]),
        ("3, 1,2", ["3", "1"]),
        ("GPU-4ad2,MIG-77f0", ["GPU-4ad2", "MIG-77f0"]),
        ("2,5,-1,3,4", ["2", "5"]),
        ("", ["", ""]),
        ("NoDevFiles", ["NoDevFiles", "NoDevFiles"]),
    ],
)
def test_workers_share_the_gpus_that_are_visible(machine, visible, shares):
    machine.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environment.shares(2)] == shares


@pytest.mark.parametrize(
    ("gpus", "status", "shares"),
    [(4, 0, ["0,1", "2,3"]), (2, 0, ["0", "1"]), (0, 0, [None, None]), (2, 9, [None, None])],
)
def test_workers_share_the_gpus_that_nvidia_smi_lists(machine, tmp_path, gpus, status, shares):
    tool = tmp_path / "nvidia-smi"
    lines = [f"GPU {i}: NVIDIA H100 (UUID: GPU-{i})\n  MIG 1g.10gb Device 0:" for i in range(gpus)]
    tool.write_text("#!/bin/sh\necho '" + "\n".join(lines) + f"'\nexit {status}\n")
    tool.chmod(0o755)
    assert [each.get("CUDA_VISIBLE_DEVICES") for each in environment.shares(2)] == shares


def test_ports_are_free_and_different(monkeypatch):
    assert min(launcher.PORTS) > 1024
    assert max(launcher.PORTS) < 32_768  # Linux gives those from there on to outgoing connections.
    used = launcher.free_ports(1)[0]
    monkeypatch.setattr(launcher, "PORTS", range(used, used + 40))
    with socket.socket() as taken:
        taken.bind(("", used))
        ports = launcher.free_ports(20)
    assert len(set(ports)) == 20
    assert set(ports) < set(range(used + 1, used + 40))


# The command line


def execute(argv):
    arguments = launch.main, launch.LaunchOptions, "[-- TRAIN FLAGS]", argv
    return cli._execute("launch", *arguments, tensorflow=False)


@pytest.fixture
def commands(monkeypatch):
    """The command lines that would have been run."""
    found = []
    monkeypatch.setattr(launcher, "run_workers", lambda commands, _: found.extend(commands))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    return found


def flags_of(command):
    assert command[:4] == [sys.executable, "-u", "-m", "keras_cifar.train"]
    return cli.parse(TrainConfig, command[4:])


def test_workers_train_as_one_cluster_into_one_run_directory(commands):
    assert execute(["--workers", "3", "--", "--model", "nin", "--data=digits", "--noexport"]) == 0
    first, *others = (flags_of(command)[0].flags() for command in commands)
    assert (first["strategy"], first["model"], first["export"]) == ("multiworker", "nin", False)
    assert first["worker_index"] == 0
    assert others == [first | {"worker_index": index} for index in (1, 2)]
    assert re.fullmatch(r"runs/nin-digits-[\d-]+", first["run_dir"])
    addresses = first["workers"].split(",")
    assert len(set(addresses)) == 3
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+", address) for address in addresses)


def test_workers_that_fail_are_started_again_into_the_same_run(monkeypatch, capfd):
    starts = []

    def fail_twice(commands, environments):
        starts.append(commands)
        if len(starts) < 3:
            raise launcher.EndedError(f"worker 1 was killed by {len(starts)}", 1)

    monkeypatch.setattr(launcher, "run_workers", fail_twice)
    monkeypatch.setattr(environment, "shares", lambda count: [{}] * count)
    flags = ["--workers=2", "--max_restarts=2", "--", "--data=digits"]
    assert execute(flags) == 0
    configs = [flags_of(commands[0])[0] for commands in starts]
    assert len({config.output.run_dir for config in configs}) == 1
    assert len({config.devices.workers for config in configs}) == 3  # Ports may still be in use.
    assert capfd.readouterr().err.splitlines() == [
        f"worker 1 was killed by {n}; starting all workers again (restart {n} of at most 2)"
        for n in (1, 2)
    ]


@pytest.mark.parametrize(
    ("restarts", "status", "starts"),
    [(0, 1, 1), (2, 1, 3), (2, 2, 1), (2, 130, 1), (2, 143, 1)],
)
def test_the_last_failure_is_the_end(monkeypatch, capfd, restarts, status, starts):
    def fail(commands, environments):
        count.append(1)
        raise launcher.EndedError(f"failure {len(count)}", status)

    count = []
    monkeypatch.setattr(launcher, "run_workers", fail)
    with pytest.raises(launcher.EndedError, match=f"failure {starts}$"):
        launcher.run_with_restarts(lambda: [], [], restarts)
    assert len(count) == starts
    assert len(capfd.readouterr().err.splitlines()) == starts - 1


@pytest.mark.parametrize("flags", [["--run_dir", "mine", "--strategy=auto"], ["--flagfile=FILE"]])
def test_the_users_run_directory_is_kept(flags, commands, tmp_path):
    file = tmp_path / "x.flags"
    file.write_text("--run_dir=mine\n")
    flags = [flag.replace("FILE", str(file)) for flag in flags]
    assert execute(["--workers=1", "--", *flags]) == 0
    (config,) = (flags_of(command)[0] for command in commands)
    assert (config.output.run_dir, config.devices.strategy) == ("mine", "multiworker")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("0", "--workers=0"),
        ("4", "4 workers need a GPU each, and this machine shows 3"),
        ("2 --model=nin", "model"),
        ("2 model", "'model'"),
        ("2 -- model", "'model'"),
        ("2 -- --model=nin --", "'--'"),
        ("2 -- --modle=nin", "modle"),
        ("2 -- --epochs=0", "--epochs=0"),
        ("2 -- --workers=a:1 --worker_index=0", "--workers after -- is set by the launcher itself"),
        ("2 -- --worker_index=0", "--worker_index"),
        ("2 -- --strategy=mirrored", "--strategy=mirrored"),
    ],
)
def test_wrong_usage_is_one_line_and_starts_nothing(argv, words, commands, capfd):
    assert execute(f"--workers={argv}".split()) == 2
    error = capfd.readouterr().err
    assert error.startswith("launch: error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not commands


def test_the_launcher_does_not_import_tensorflow():
    code = (
        "import runpy, sys; sys.argv = ['x', '--workers=2', '--', '--epochs=0']\n"
        "try: runpy.run_module('keras_cifar.launch', run_name='__main__')\n"
        "except SystemExit as e: print('status', e.code, 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "status 2 False\n"
