"""The scripts, and the files for SLURM, Kubernetes, Docker and GitHub: what reads them accepts them."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from keras_cifar import models
from keras_cifar.core import cli
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.run_directory import Run
from keras_cifar.training import trainer

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"
SLURM = SCRIPTS / "train.slurm"
# Of the manual pages of SLURM 22.05: sbatch's options that set what a job gets and how it runs, and
# srun's that are used.
SBATCH_OPTIONS = """
account array begin chdir comment constraint contiguous cores-per-socket cpus-per-gpu cpus-per-task
deadline dependency distribution error exclude exclusive export gpus gpus-per-node gpus-per-task gres
hint hold input job-name licenses mail-type mail-user mem mem-per-cpu mem-per-gpu mincpus nice no-kill
no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node
ntasks-per-socket open-mode output overcommit oversubscribe partition priority propagate qos reboot
requeue reservation signal sockets-per-node switches threads-per-core time time-min tmp wait-all-nodes
"""
SRUN_OPTIONS = {"cpus-per-task", "kill-on-bad-exit", "label"}


def train_config(command):
    """The configuration of a training command, which must leave the cluster to --strategy auto."""
    assert command[:4] == ["python", "-u", "-m", "keras_cifar.train"]
    config, rest = cli.parse(TrainConfig, command[4:])
    assert not rest
    devices = config.devices
    assert (devices.strategy, devices.workers, devices.worker_index) == ("auto", None, None)
    assert config.model.model in models.variants()
    assert config.output.run_dir  # the default differs between workers, and no run could resume it
    return config


@pytest.mark.parametrize("path", sorted([*SCRIPTS.glob("*.sh"), SLURM]), ids=lambda path: path.name)
def test_bash_can_read_the_scripts(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---- The quickstart


def test_accuracy_of_a_short_quickstart(tmp_path):
    """Its training with a small network, for fewer epochs: broken training stays far below."""
    text = (SCRIPTS / "quickstart.sh").read_text().replace("\\\n", " ")
    words = shlex.split(re.search(r"^python -m keras_cifar.train (.*) --run_dir", text, re.M)[1])
    run = Run(tmp_path / "run")
    flags = ["--model=lenet5", "--epochs=6", "--noexport", f"--run_dir={run.path}"]
    config, _ = cli.parse(TrainConfig, [*words, *flags])
    trainer.train(config, run)
    assert accuracy(run.path) > 0.9


@pytest.fixture
def installed(tmp_path):
    """The environment variables with which scripts find the package installed, and install nothing."""
    root = SCRIPTS.parent
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$2" != pip ] && exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    stamp = "cat setup.py constraints.txt | cksum"
    done = subprocess.run(["bash", "-c", stamp], cwd=root, capture_output=True, check=True)
    (tmp_path / "venv" / ".installed-").write_bytes(done.stdout)
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return {"VENV": str(tmp_path / "venv"), "PYTHON": sys.executable, "PYTHONPATH": paths}


def test_the_quickstart_installs_once_and_passes_images_on(installed, tmp_path):
    (tmp_path / "venv" / "bin" / "python").write_text('#!/bin/sh\necho "run $*"\n')
    command = ["bash", str(SCRIPTS / "quickstart.sh"), "my/dog.png"]
    done = subprocess.run(command, env=os.environ | installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules = re.findall(r"^run -m (\S+)", done.stdout, re.M)
    assert modules == [
        f"keras_cifar.{name}" for name in ("train", "evaluate", "predict", "predict")
    ]
    assert "keras_cifar.predict --model pretrained:fast my/dog.png\n" in done.stdout


@pytest.mark.slow
def test_the_quickstart_reaches_its_accuracy(installed, tmp_path, image_folder):
    image = next(image_folder.rglob("*.png"))
    name = f"{image.parent.name}/{image.name}"
    command = ["bash", str(SCRIPTS / "quickstart.sh"), name]
    env = os.environ | installed | {"RUN_DIR": str(tmp_path / "run")}
    done = subprocess.run(command, env=env, cwd=image.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert accuracy(tmp_path / "run") >= 0.985  # 0.997 is usual
    digits, own = done.stdout.split("== your images")
    shown = re.findall(r"-a-(\d)\.png: (\d) ", digits)
    assert len(shown) == 5
    assert all(label == found for label, found in shown)
    assert f"{name}: " in own


def accuracy(run):
    return json.loads((run / "eval" / "test.json").read_text())["accuracy"]


# ---- SLURM


def test_every_option_for_sbatch_is_one_and_is_read():
    head, _, rest = SLURM.read_text().partition("\nset -euo pipefail\n")
    assert rest
    assert "SBATCH" not in rest  # sbatch reads no further than the first command
    assert all(line.startswith("#") for line in head.splitlines())
    found = {}
    for line in head.splitlines():
        if re.match("##?SBATCH", line):  # with two, it is a proposal
            name, value = re.fullmatch(r"##?SBATCH --([a-z-]+)(?:=(\S+))?", line).groups()
            assert name in SBATCH_OPTIONS.split()
            found[name] = value
    assert found["ntasks-per-node"] == "1"  # srun starts one worker a node


def test_srun_gets_options_that_it_has_and_a_valid_training_command():
    text = SLURM.read_text().replace("\\\n", " ")
    words = shlex.split(re.search(r"^exec (srun .*)$", text, re.M)[1])
    begin = words.index("python")
    options = [re.fullmatch(r"--([a-z-]+)(?:=(.+))?", word).groups() for word in words[1:begin]]
    assert {name for name, _ in options} <= SRUN_OPTIONS
    assert ("kill-on-bad-exit", "1") in options
    assert train_config(words[begin:]).output.run_dir == "$run_dir"


@pytest.fixture
def job(tmp_path):
    """Runs the batch file as SLURM would, with an srun that prints its arguments."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text(f"PATH={tmp_path}/bin:$PATH\n")
    srun = tmp_path / "bin" / "srun"
    srun.write_text("#!/bin/sh\necho $PWD\nfor word; do echo $word; done\nexit 3\n")
    srun.chmod(0o755)

    def run(**variables):
        env = {"PATH": os.environ["PATH"], "VENV": str(tmp_path), "SLURM_CPUS_PER_TASK": "8"}
        return subprocess.run(
            ["bash", str(SLURM)], env=env | variables, capture_output=True, text=True
        )

    return run


def test_a_restarted_job_has_the_same_run_directory(job, tmp_path):
    submitted = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "12"}
    runs = [job(**submitted), job(**submitted, SLURM_RESTART_COUNT="1")]
    assert runs[0].stdout == runs[1].stdout
    place, *words = runs[0].stdout.splitlines()
    assert place == str(tmp_path)
    assert runs[0].returncode == 3
    assert "--cpus-per-task=8" in words
    assert train_config(words[words.index("python") :]).output.run_dir == "runs/slurm-12"


def test_a_job_can_resume_the_run_of_another(job, tmp_path):
    done = job(SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="13", RUN_DIR="runs/slurm-12")
    words = done.stdout.splitlines()
    assert train_config(words[words.index("python") :]).output.run_dir == "runs/slurm-12"


def test_outside_slurm_the_batch_file_says_what_to_do(job):
    done = job()
    assert done.returncode != 0
    assert "sbatch" in done.stderr
    assert done.stdout == ""


# ---- Kubernetes and GitHub


def test_the_manifests_workers_train_on_a_volume_that_they_share():
    manifest = yaml.safe_load((SCRIPTS / "tfjob.yaml").read_text())
    pod = manifest["spec"]["tfReplicaSpecs"]["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert all(isinstance(word, str) for word in container["command"])
    config = train_config(container["command"])
    # Kubernetes waits up to 300 s before it restarts a container.
    assert config.devices.startup_timeout > 300
    (mount,) = container["volumeMounts"]
    (volume,) = pod["volumes"]
    assert mount["name"] == volume["name"]
    data = config.data
    for path in (config.output.run_dir, data.cache_dir, data.data.removeprefix("folder:")):
        assert path.startswith(mount["mountPath"] + "/")


def test_the_workflow_runs_scripts_of_the_checkout():
    workflow = yaml.safe_load((SCRIPTS.parent / ".github" / "workflows" / "test.yml").read_text())
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    (command,) = (step["run"] for step in job["steps"] if "run" in step)
    names = re.fullmatch(r"scripts/\$\{\{ .* && '(\w+)' \|\| '(\w+)' \}\}\.sh", command).groups()
    assert all(os.access(SCRIPTS / f"{name}.sh", os.X_OK) for name in names)


# ---- Docker


def test_the_image_holds_what_setup_reads():
    lines = (SCRIPTS / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    root = SCRIPTS.parent
    assert all((root / name).exists() for name in copied)
    read = re.findall(r'HERE / "([\w.]+)"', (root / "setup.py").read_text())
    assert {*read, "setup.py", "pyproject.toml", "constraints.txt", "LICENSE"} == copied
    assert any("--constraint constraints.txt" in line and line.endswith(" .") for line in lines)


@pytest.fixture
def docker(tmp_path):
    """Runs serve.sh with a docker that prints its arguments: (status, these, stderr)."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "docker"
    program.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    program.chmod(0o755)

    def run(*argv, **variables):
        env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"} | variables
        command = ["bash", str(SCRIPTS / "serve.sh"), *argv]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines(), done.stderr

    return run


@pytest.mark.parametrize(("given", "below"), [("my run", "export"), ("base", "")])
def test_docker_serves_a_run_or_a_base_path(docker, tmp_path, given, below):
    base = tmp_path / given / below
    (base / "3").mkdir(parents=True)
    (base / "3" / "saved_model.pb").touch()
    status, words, _ = docker(given, "name", PORT="8000", IMAGE="an/image:1")
    assert status == 0
    assert words == [
        *("run", "--rm", "--publish", "127.0.0.1:8000:8501"),
        *("--mount", f"type=bind,source={base},target=/models/name,readonly"),
        *("--env", "MODEL_NAME=name", "an/image:1", "--enable_batching=true"),
    ]
    assert "MODEL_NAME=model" in docker(given)[1]


def test_docker_is_not_started_without_a_model(docker, tmp_path):
    (tmp_path / "empty" / "1").mkdir(parents=True)
    for argv, status, words in (([], 2, "usage"), (["empty"], 1, "has no <version>")):
        found, out, error = docker(*argv)
        assert (found, out) == (status, [])
        assert words in error


def test_the_compose_file_serves_what_the_script_serves():
    (service,) = yaml.safe_load((SCRIPTS / "serve.compose.yaml").read_text())["services"].values()
    text = (SCRIPTS / "serve.sh").read_text()
    assert service["image"] in text
    assert service["ports"] == ["127.0.0.1:${PORT:-8501}:8501"]
    assert all(word in text for word in service["command"])
    (volume,) = service["volumes"]
    assert volume["target"] == f"/models/{service['environment']['MODEL_NAME']}"
