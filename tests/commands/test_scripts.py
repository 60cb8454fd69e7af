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
# As the manual pages of SLURM 22.05 spell those that are used.
SBATCH_OPTIONS = {"job-name", "nodes", "ntasks-per-node", "cpus-per-task", "time", "output"}
SBATCH_OPTIONS |= {"open-mode", "requeue", "gres"}
SRUN_OPTIONS = {"cpus-per-task", "kill-on-bad-exit", "label"}


def bash(script, *argv, **options):
    command = ["bash", str(SCRIPTS / script), *argv]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture
def program(tmp_path):
    """Writes a shell script in place of a program, in `tmp_path`/bin."""

    def write(path, text):
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    return write


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
def installed(program, tmp_path):
    """The environment with which scripts find the package installed, and install nothing."""
    root = SCRIPTS.parent
    program("venv/bin/python", f'[ "$2" != pip ] && exec {shlex.quote(sys.executable)} "$@"')
    stamp = "cat setup.py constraints.txt | cksum"
    done = subprocess.run(["bash", "-c", stamp], cwd=root, capture_output=True, check=True)
    (tmp_path / "venv" / ".installed-").write_bytes(done.stdout)
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    own = {"VENV": str(tmp_path / "venv"), "PYTHON": sys.executable, "PYTHONPATH": paths}
    return os.environ | own


def test_the_quickstart_installs_once_and_passes_images_on(installed, program):
    program("venv/bin/python", 'echo "run $*"')
    done = bash("quickstart.sh", "my/dog.png", env=installed)
    assert done.returncode == 0, done.stderr
    modules = re.findall(r"^run -m keras_cifar\.(\S+)", done.stdout, re.M)
    assert modules == ["train", "evaluate", "predict", "predict"]
    assert "keras_cifar.predict --model pretrained:fast my/dog.png\n" in done.stdout


@pytest.mark.slow
def test_the_quickstart_reaches_its_accuracy(installed, tmp_path, image_folder):
    image = next(image_folder.rglob("*.png"))
    name = f"{image.parent.name}/{image.name}"
    env = installed | {"RUN_DIR": str(tmp_path / "run")}
    done = bash("quickstart.sh", name, env=env, cwd=image.parents[1])
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
            assert name in SBATCH_OPTIONS
            found[name] = value
    assert found["ntasks-per-node"] == "1"  # srun starts one worker a node


def test_srun_gets_options_that_it_has_and_a_valid_training_command():
    text = SLURM.read_text().replace("\\\n", " ")
    words = shlex.split(re.search(r"^(srun .*) \|\| status=\$\?$", text, re.M)[1])
    begin = words.index("python")
    options = [re.fullmatch(r"--([a-z-]+)(?:=(.+))?", word).groups() for word in words[1:begin]]
    assert {name for name, _ in options} <= SRUN_OPTIONS
    assert ("kill-on-bad-exit", "1") in options
    assert train_config(words[begin:]).output.run_dir == "$run_dir"


@pytest.fixture
def job(program, tmp_path):
    """Runs the batch file as SLURM would, with an srun that prints its arguments."""
    program("bin/activate", f"PATH={tmp_path}/bin:$PATH")
    program("bin/srun", "echo $PWD\nfor word; do echo $word; done\nexit ${STATUS:-3}")
    program("bin/scontrol", 'echo scontrol "$@"')
    env = {"PATH": os.environ["PATH"], "VENV": str(tmp_path), "SLURM_CPUS_PER_TASK": "8"}
    return lambda **variables: bash(SLURM, env=env | variables)


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_JOB_ID": "12"},
        {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"},
        {"SLURM_JOB_ID": "13", "RUN_DIR": "runs/slurm-12"},
    ],
)
def test_a_restarted_job_or_another_one_resumes_the_run(job, tmp_path, variables):
    done = job(SLURM_SUBMIT_DIR=str(tmp_path), MAX_RESTARTS="0", **variables)
    place, *words = done.stdout.splitlines()
    assert (done.returncode, place) == (3, str(tmp_path))
    assert "--cpus-per-task=8" in words
    assert train_config(words[words.index("python") :]).output.run_dir == "runs/slurm-12"


@pytest.mark.parametrize(
    ("variables", "status"),
    [
        ({"STATUS": "1"}, None),
        ({"STATUS": "137", "SLURM_RESTART_COUNT": "2"}, None),
        ({"STATUS": "1", "SLURM_RESTART_COUNT": "3"}, 1),
        ({"STATUS": "1", "SLURM_RESTART_COUNT": "1", "MAX_RESTARTS": "1"}, 1),
        *(({"STATUS": status}, int(status)) for status in ("0", "2", "130", "143")),
    ],
    ids=str,
)
def test_a_job_that_lost_a_worker_is_queued_again(job, tmp_path, variables, status):
    done = job(SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="12", **variables)
    *_, last = done.stdout.splitlines()
    assert (last == "scontrol requeue 12") == (status is None)
    assert done.returncode == (status or 0)


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
def docker(program, tmp_path):
    """Runs serve.sh with a docker that prints its arguments: (status, these, stderr)."""
    program("bin/docker", 'for word; do echo "$word"; done')
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}

    def run(*argv, **variables):
        done = bash("serve.sh", *argv, env=env | variables, cwd=tmp_path)
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


@pytest.mark.parametrize(
    ("argv", "status", "words"), [([], 2, "usage"), (["empty"], 1, "has no <version>")]
)
def test_docker_is_not_started_without_a_model(docker, tmp_path, argv, status, words):
    (tmp_path / "empty" / "1").mkdir(parents=True)
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


@pytest.mark.slow
@pytest.mark.parametrize("features", ["patches", "hog"])
def test_classical_features_classify_digits(features):
    pytest.importorskip("skimage", reason="the extra `classical` is not installed")
    command = [sys.executable, str(SCRIPTS / "classical.py"), "--centroids=50"]
    done = subprocess.run([*command, f"--features={features}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{200 if features == 'patches' else 1764:,} of {features}" in done.stdout
    assert float(re.search(r"test accuracy (\S+) on 359 images", done.stdout)[1]) > 0.95
