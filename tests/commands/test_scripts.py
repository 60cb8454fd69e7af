"""The files for clusters: what SLURM, Kubeflow and keras_cifar.train read in them must be right."""

import os
import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from keras_cifar import models
from keras_cifar.core import cli
from keras_cifar.core.config import TrainConfig

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
    """The flags of a command that trains, which must be those of a worker of a found cluster."""
    assert command[:4] == ["python", "-u", "-m", "keras_cifar.train"]
    config, rest = cli.parse(TrainConfig, command[4:])
    assert not rest
    devices = config.devices
    assert (devices.strategy, devices.workers, devices.worker_index) == ("auto", None, None)
    assert config.model.model in models.variants()
    assert config.output.run_dir  # the default differs between workers, and could not be resumed
    return config


@pytest.mark.parametrize(
    "name", ["train.slurm", "environment.sh", "quickstart.sh", "serve.sh", "test.sh"]
)
def test_bash_can_read_the_scripts(name):
    done = subprocess.run(["bash", "-n", str(SCRIPTS / name)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


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
    assert found["requeue"] is None
    assert found["open-mode"] == "append"
    assert found["ntasks-per-node"] == "1"
    assert int(found["nodes"]) > 1
    assert int(found["cpus-per-task"]) > 0


def test_srun_starts_training_and_ends_it_when_a_worker_fails():
    text = SLURM.read_text().replace("\\\n", " ")
    words = shlex.split(re.search(r"^exec (srun .*)$", text, re.M)[1])
    begin = words.index("python")
    options = [re.fullmatch(r"--([a-z-]+)(?:=(.+))?", word).groups() for word in words[1:begin]]
    assert {name for name, _ in options} <= SRUN_OPTIONS
    assert ("kill-on-bad-exit", "1") in options
    assert ("cpus-per-task", "$SLURM_CPUS_PER_TASK") in options
    assert train_config(words[begin:]).run_dir == "$run_dir"


@pytest.fixture
def job(tmp_path):
    """Runs the batch file as SLURM would, with an srun that shows what it is given."""
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


def test_a_job_that_runs_again_has_the_same_run_directory(job, tmp_path):
    submitted = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "12"}
    runs = [job(**submitted), job(**submitted, SLURM_RESTART_COUNT="1")]
    assert runs[0].stdout == runs[1].stdout
    place, *words = runs[0].stdout.splitlines()
    assert place == str(tmp_path)
    assert runs[0].returncode == 3
    assert "--cpus-per-task=8" in words
    assert train_config(words[words.index("python") :]).run_dir == "runs/slurm-12"


def test_a_job_can_go_on_with_the_run_of_another(job, tmp_path):
    done = job(SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="13", RUN_DIR="runs/slurm-12")
    words = done.stdout.splitlines()
    assert train_config(words[words.index("python") :]).run_dir == "runs/slurm-12"


def test_outside_slurm_the_batch_file_says_what_to_do(job):
    done = job()
    assert done.returncode != 0
    assert "sbatch" in done.stderr
    assert done.stdout == ""


def test_the_manifest_is_a_tfjob_whose_workers_are_restarted():
    manifest = yaml.safe_load((SCRIPTS / "tfjob.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "TFJob")
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", manifest["metadata"]["name"])
    spec = manifest["spec"]
    assert set(spec) == {"successPolicy", "runPolicy", "tfReplicaSpecs"}
    assert spec["successPolicy"] == "AllWorkers"
    assert spec["runPolicy"]["cleanPodPolicy"] in ("None", "Running", "All")
    assert spec["runPolicy"]["backoffLimit"] > 0
    assert set(spec["tfReplicaSpecs"]) == {"Worker"}
    worker = spec["tfReplicaSpecs"]["Worker"]
    assert worker["restartPolicy"] == "OnFailure"
    assert worker["replicas"] > 1
    assert worker["template"]["metadata"]["annotations"] == {"sidecar.istio.io/inject": "false"}


def test_the_manifests_workers_train_on_a_volume_that_they_share():
    manifest = yaml.safe_load((SCRIPTS / "tfjob.yaml").read_text())
    pod = manifest["spec"]["tfReplicaSpecs"]["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "tensorflow"
    assert all(isinstance(word, str) for word in container["command"])
    config = train_config(container["command"])
    # Kubernetes waits up to 300 s before it starts a container again.
    assert config.devices.startup_timeout > 300
    (mount,) = container["volumeMounts"]
    (volume,) = pod["volumes"]
    assert mount["name"] == volume["name"]
    assert volume["persistentVolumeClaim"]["claimName"]
    data = config.data
    for path in (config.output.run_dir, data.cache_dir, data.data.removeprefix("folder:")):
        assert path.startswith(mount["mountPath"] + "/")


def test_the_image_holds_what_setup_reads():
    lines = (SCRIPTS / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    root = SCRIPTS.parent
    assert all((root / name).exists() for name in copied)
    read = re.findall(r'HERE / "([\w.]+)"', (root / "setup.py").read_text())
    assert {*read, "setup.py", "pyproject.toml", "constraints.txt", "LICENSE"} == copied
    assert any("--constraint constraints.txt" in line and line.endswith(" .") for line in lines)


# ---- TensorFlow Serving

# Of those of tensorflow_model_server (its model_servers/main.cc): what is used.
SERVER_FLAGS = {"enable_batching"}


@pytest.fixture
def docker(tmp_path):
    """Runs serve.sh with a docker that shows what it is given: (status, its words, stderr)."""
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
    assert {word.strip("-").split("=")[0] for word in service["command"]} == SERVER_FLAGS
    assert all(word in text for word in service["command"])
    (volume,) = service["volumes"]
    assert volume["type"] == "bind"
    assert volume["read_only"] is True
    assert volume["target"] == f"/models/{service['environment']['MODEL_NAME']}"
    assert volume["source"].startswith("${EXPORT:?")  # compose stops where it is not set


def test_the_inference_service_has_kserves_fields():
    manifest = yaml.safe_load((SCRIPTS / "inferenceservice.yaml").read_text())
    kind = (manifest["apiVersion"], manifest["kind"])
    assert kind == ("serving.kserve.io/v1beta1", "InferenceService")
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", manifest["metadata"]["name"])
    assert set(manifest["spec"]) == {"predictor"}
    predictor = manifest["spec"]["predictor"]
    assert 0 < predictor["minReplicas"] <= predictor["maxReplicas"]
    model = predictor["model"]
    assert model["modelFormat"] == {"name": "tensorflow"}
    assert model["protocolVersion"] == "v1"
    assert re.fullmatch(r"(pvc|s3|gs)://\S+", model["storageUri"])
    assert set(model["resources"]) == {"requests", "limits"}
