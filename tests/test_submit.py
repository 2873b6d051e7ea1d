"""spark-submit to a real standalone cluster, started with the files of conf/."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyspark
import pytest

import spark_mnist
from tests.conftest import PROGRAMS, REPOSITORY, spark_home

pytestmark = pytest.mark.ranks

CONF = REPOSITORY / "conf"
NVIDIA_SMI = "#!/bin/sh\necho $FAKE_GPU\n"
SMALL = {  # what a machine of two cores can give
    "spark.executor.cores": "1",
    "spark.task.cpus": "1",
    "spark.executor.memory": "1g",
    "spark.executor.memoryOverhead": "1g",
    "spark.ui.enabled": "false",
}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Cluster:
    """A master and two workers, each with one core and one made-up GPU."""

    def __init__(self, home):
        self.home = home
        self.master = f"spark://127.0.0.1:{free_port()}"
        conf, programs = home / "conf", home / "bin"
        shutil.copytree(CONF, conf)
        programs.mkdir()
        (programs / "nvidia-smi").write_text(NVIDIA_SMI)
        (programs / "nvidia-smi").chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SPARK_HOME": str(spark_home(home / "spark")),
            "SPARK_CONF_DIR": str(conf),
            "PYSPARK_PYTHON": sys.executable,
        }
        host, _, port = self.master.removeprefix("spark://").partition(":")
        self._running = [self._start("master.Master", "--host", host, "--port", port)]
        for gpu in ("4", "7"):
            self._running.append(
                self._start(
                    "worker.Worker", "--cores", "1", "--memory", "2g", "--work-dir",
                    str(home / f"work{gpu}"), self.master, FAKE_GPU=gpu,
                )
            )  # fmt: skip

    def _start(self, name, *arguments, **environment):
        program = Path(pyspark.__file__).parent / "bin" / "spark-class"
        with (self.home / f"{name}.log").open("a") as log:
            return subprocess.Popen(
                [program, f"org.apache.spark.deploy.{name}", *arguments, "--webui-port", "0"],
                stdout=log, stderr=log, env={**self.environment, **environment},
            )  # fmt: skip

    def submit(self, properties, *words, **environment):
        program = Path(pyspark.__file__).parent / "bin" / "spark-submit"
        given = [word for item in SMALL.items() for word in ("--conf", "=".join(item))]
        command = [program, "--master", self.master, "--properties-file", CONF / properties, *given]
        done = subprocess.run(
            [*command, *words],
            cwd=self.home, env={**self.environment, **environment}, text=True,
            capture_output=True, timeout=300, check=False,
        )  # fmt: skip
        words = done.stdout + done.stderr  # spark-submit joins what the driver's Python tells apart
        assert done.returncode == 0, words
        return words

    def stop(self):
        for process in reversed(self._running):
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    running = Cluster(tmp_path_factory.mktemp("cluster"))
    time.sleep(5)  # so that workers have said what they have; jobs would wait for them, too
    yield running
    running.stop()


def test_the_command_on_a_cluster_with_gpus(cluster):
    main = Path(spark_mnist.__file__).parent / "__main__.py"
    words = ["fit", "test_model", "epochs=2", "batch_size=16", "num_proc=2", "compression=fp16"]
    flags = ["--input", "digits:train", "--store", cluster.home / "models", "--json"]
    out = cluster.submit("spark-defaults-gpu.conf", main, *words, *flags)
    assert re.findall(r'^{"epoch":\d', out, flags=re.M) == ['{"epoch":1', '{"epoch":2']
    ranks = dict(re.findall(r"rank (\d): \S+, CPU, not GPU (\d)", out))
    assert sorted(ranks) == ["0", "1"]
    assert sorted(ranks.values()) == ["4", "7"], out
    told = re.findall(r"Spark gave this rank GPU (\d) .* TensorFlow sees none", out)
    assert sorted(told) == ["4", "7"]  # each once, since these GPUs are made up


def test_a_job_of_the_users(cluster):
    job = REPOSITORY / "examples" / "train_job.py"
    output = cluster.home / "predictions"
    out = cluster.submit("spark-defaults.conf", job, cluster.home / "models", output)
    found = re.search(r"^version 1: (\d+) of (\d+) digits", out, flags=re.M)
    assert int(found[1]) > 0.8 * int(found[2])
    assert (output / "_SUCCESS").exists()


@pytest.mark.slow
def test_an_environment_that_is_packed_and_sent_along(cluster):
    subprocess.run(["make", "pack"], cwd=REPOSITORY, check=True, timeout=600)
    dist, job = REPOSITORY / "dist", PROGRAMS / "packed_job.py"
    flags = ["--py-files", dist / "spark_mnist.zip"]
    flags += ["--archives", f"{dist}/environment.tar.gz#environment"]
    python = {"PYSPARK_DRIVER_PYTHON": sys.executable, "PYSPARK_PYTHON": "./environment/bin/python"}
    out = cluster.submit("spark-defaults.conf", *flags, job, cluster.home / "packed", **python)
    assert "predicted 1433" in out


@pytest.mark.parametrize("name", [path.name for path in CONF.iterdir()])
def test_every_setting_is_explained(name):
    lines = [line.strip() for line in (CONF / name).read_text().splitlines()]
    explained = False
    for line in lines:
        explained = line.startswith("#") or (bool(line) and explained)
        assert explained or not line, f"{line!r} follows no comment"
