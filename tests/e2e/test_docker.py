"""The Dockerfiles' steps, run outside Docker: what an image would hold is made in a folder, and works there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from embedtrain.recipes.loading import load_config

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
IMAGE_FOLDER = "/app"


def instructions(path: Path) -> list[tuple[str, str]]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return [
        (line.split()[0], line.split(maxsplit=1)[1]) for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    ]


def ignored(path: Path) -> bool:
    """Whether .dockerignore keeps a path of the checkout out of the build, so far as the rules that it uses go."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    return any(path.match(rule.removeprefix("**/")) for rule in rules)


@dataclass
class Image:
    """A folder that stands for `/app`, and what the instructions so far have said.

    Every stage of a Dockerfile ends with the same folder, so that `COPY --from` has nothing to do.
    """

    app: Path
    environment: dict[str, str] = field(default_factory=dict)
    user: str = "root"
    command: list[str] = field(default_factory=list)

    def here(self, text: str) -> str:
        return text.replace(IMAGE_FOLDER, str(self.app))

    def copy(self, arguments: str) -> None:
        *sources, target = arguments.split()
        if sources[0].startswith("--from="):
            assert sources[1:] == [IMAGE_FOLDER] and target == IMAGE_FOLDER
            return
        for source in sources:
            assert not ignored(Path(source))
            if (ROOT / source).is_dir():
                shutil.copytree(
                    ROOT / source,
                    self.app / target,
                    ignore=lambda folder, names: [
                        name for name in names if ignored((Path(folder) / name).relative_to(ROOT))
                    ],
                )
            else:
                shutil.copy(ROOT / source, self.app / target)

    def run(self, command: str) -> None:
        assert "curl" not in command, "the steps are those of the scripts"
        for part in command.split("&&"):
            words = shlex.split(part)
            settings = [word for word in words if re.fullmatch(r"\w+=.*", word)]
            program, *arguments = words[len(settings) :]
            if program in ("apt-get", "rm"):
                # Of what the system needs, programs must be here already.
                assert all(shutil.which(name) for name in arguments if name == "g++"), "needs g++"
            elif program == "useradd":
                self.environment["USER_MADE"] = arguments[-1]
            elif program == "install":
                assert arguments[:3] == ["-d", "-o", self.environment["USER_MADE"]]
                Path(self.here(arguments[3])).mkdir()
            else:
                self.start([program, *arguments], **dict(setting.split("=", 1) for setting in settings))

    def start(self, command: list[str], **settings: str) -> str:
        own = {name: self.here(value) for name, value in self.environment.items()}
        path = own.get("PATH", "$PATH").replace("$PATH", os.environ["PATH"])
        # What the folder beside it has installed is not downloaded again, and the build takes its setuptools.
        offline = {"PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **own, **offline, **settings, "PATH": path}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(command, cwd=self.app, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def build(self, path: Path) -> None:
        steps: dict[str, Callable[[str], None]] = {
            "COPY": self.copy,
            "RUN": self.run,
            "ENV": lambda text: self.environment.update(pair.split("=", 1) for pair in shlex.split(text)),
            "USER": lambda text: setattr(self, "user", text),
            "CMD": lambda text: setattr(self, "command", yaml.safe_load(text)),
        }
        for name, arguments in instructions(path):
            if name == "WORKDIR":
                assert arguments == IMAGE_FOLDER
            elif name != "FROM":
                steps[name](arguments)


def make_environment(app: Path) -> None:
    """Makes `.venv` where the script would, with all packages that the tests run with but embedtrain itself."""
    venv.create(app / ".venv", with_pip=True)
    (packages,) = (app / ".venv" / "lib").glob("python*/site-packages")
    # Before Python 3.12 a venv has a setuptools of its own, too old for this package.
    for path in (*packages.glob("setuptools*"), packages / "pkg_resources", packages / "_distutils_hack"):
        shutil.rmtree(path, ignore_errors=True)
    (packages / "distutils-precedence.pth").unlink(missing_ok=True)
    (packages / "beside.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    program = app / ".venv" / "bin" / "torchrun"
    program.write_text(f"#!{program.with_name('python')}\nfrom torch.distributed.run import main\n\nmain()\n")
    program.chmod(0o755)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the images install g++, which this machine has not")
@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_steps_make_a_folder_that_trains(path: Path, tmp_path: Path) -> None:
    image = Image(tmp_path / "app")
    image.app.mkdir()
    make_environment(image.app)
    image.build(path)
    assert image.user == image.environment["USER_MADE"]
    assert "Usage: embedtrain" in image.start(image.command)
    where = "import embedtrain, embedtrain.ops._backend.dispatch as d; print(embedtrain.__file__)"
    assert image.start(["python", "-c", where]).startswith(str(image.app))
    assert (image.app / "embedtrain/ops/_backend/libembedtrain_native.so").exists()
    text = tmp_path / "text.txt"
    text.write_text("a small text of a few words\n" * 200)
    (command,) = re.findall(r"^#.*(torchrun .*)$", path.read_text(), re.MULTILINE)
    small = [f"data.path={text}", f"data.cache_path={tmp_path}/cache", "train.epochs=1", "run.device=cpu"]
    image.start([*shlex.split(command.replace("gpu", "1")), *small, "train.words_per_step=1024"])
    assert (image.app / "runs/quickstart/checkpoints").is_dir()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_pinned_small_and_without_rights(path: Path) -> None:
    steps = instructions(path)
    assert all(re.fullmatch(r"python:3\.\d+-slim( AS \w+)?", text) for name, text in steps if name == "FROM")
    assert [text for name, text in steps if name == "USER"] == ["embedtrain"]
    assert [text for name, text in steps if name == "RUN" and "setup_env.sh" in text]
    pins = (ROOT / "scripts/constraints.txt").read_text()
    assert re.fullmatch(r"torch==[\d.]+\n([\w-]+==[\d.]+(; python_version >= .*)?\n)*", pins)
    assert not [text for name, text in steps if name == "COPY" and text.split()[0] == "."]
    (command,) = re.findall(r"^#.*torchrun (.*)$", path.read_text(), re.MULTILINE)
    module = get_args_parser().parse_args(shlex.split(command))
    assert load_config(module.training_script_args[1], module.training_script_args[2:]).run.path


def test_builds_do_not_see_what_a_checkout_gathers() -> None:
    for name in (".venv", ".git", "runs", "embedtrain/__pycache__", "embedtrain/ops/_backend/libembedtrain_native.so"):
        assert ignored(Path(name)), name
    for name in ("pyproject.toml", "embedtrain/cli.py", "scripts/setup_env.sh", "configs/word2vec.yaml"):
        assert not ignored(Path(name)), name
