"""Make a virtual environment with other releases than the lock's: the oldest, or another PySpark.

    python tests/environment.py .venv-oldest --oldest
    python tests/environment.py .venv-spark-4.1 --with pyspark==4.1.*

What setup.cfg allows is resolved again each time, so that a bound that does not hold is seen. The
packages that tests need are the newest that go with it. Horovod is compiled against the environment's
TensorFlow, as pyproject.toml says.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
EXTRAS = ("cpu", "datasets", "images", "plots", "mlflow", "onnx")
PROJECT = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="of the environment")
    parser.add_argument("--oldest", action="store_true", help="the lowest release of each package")
    parser.add_argument("--with", dest="constraints", nargs="*", default=[], metavar="REQUIREMENT")
    arguments = parser.parse_args()
    directory = arguments.directory.absolute()
    resolution = "lowest-direct" if arguments.oldest else "highest"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    releases = resolved(arguments.constraints, resolution)
    project = REPOSITORY / "build" / directory.name
    write_project(project, python, releases)
    shutil.rmtree(directory, ignore_errors=True)
    environment = {**os.environ, "UV_PROJECT_ENVIRONMENT": str(directory)}
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    uv(
        "sync",
        "--python",
        sys.executable,
        "--no-install-project",
        *extras,
        cwd=project,
        env=environment,
    )
    uv("pip", "install", "--python", str(directory), "--no-deps", "--editable", str(REPOSITORY))
    print("\n".join(releases))


def uv(*words: str, **where: object) -> str:
    """Run uv quietly; returns what it prints."""
    program = shutil.which("uv") or sys.exit("uv is missing: run make setup")
    done = subprocess.run(
        [program, *words, "--quiet"], stdout=subprocess.PIPE, text=True, check=True, **where
    )
    return done.stdout


def resolved(constraints: list[str], resolution: str) -> list[str]:
    """Return the releases, as ``name==version``, of all that setup.cfg names."""
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    file = REPOSITORY / "build" / "constraints.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(constraints))
    text = uv(
        "pip", "compile", str(REPOSITORY / "setup.cfg"), *extras, "--resolution", resolution,
        "--constraint", str(file), "--python", sys.executable, "--no-annotate", "--no-header",
    )  # fmt: skip
    named = set(
        re.findall(r"^ +([\w-]+)(?:\[.*\])?[<>=]", (REPOSITORY / "setup.cfg").read_text(), re.M)
    )
    found = re.findall(r"^([\w-]+)(?:\[.*\])?==(\S+)", text, flags=re.M)
    return [f"{name}=={release}" for name, release in found if name in named]


def write_project(project: Path, python: str, releases: list[str]) -> None:
    """Copy what describes the package, with releases and Python fixed."""
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir(parents=True)
    for name in PROJECT:
        shutil.copy(REPOSITORY / name, project)
    shutil.copytree(REPOSITORY / "spark_mnist", project / "spark_mnist")
    text = (project / "pyproject.toml").read_text()
    text = re.sub(r'requires-python = ".*"', f'requires-python = "=={python}.*"', text)
    fixed = f"[tool.uv]\nconstraint-dependencies = {json.dumps(releases)}\n"
    (project / "pyproject.toml").write_text(text.replace("[tool.uv]\n", fixed, 1))


if __name__ == "__main__":
    main()
