"""What is shipped, what it asks for, and what the installer says when it cannot install."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import bootstrap

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = {"timm", "openclip", "transformers", "diffusers", "video", "train", "demo", "eval", "docs", "dev", "all"}
FLOORS = {
    "torch": {">=2.8"},
    "timm": {">=1.0.20", ">=1.0.21"},  # training needs its Muon
    "transformers": {">=5.19"},
}

# Files that a build must leave out, one in each folder that a wheel is known to pick up by mistake, and files that it
# must take along.
DECOYS = (
    "tokenizers/__init__.py",
    "tokenizers/flextok/train.py",
    "tests/test_x.py",
    "demos/app.py",
    "benchmarks/speed.py",
    "docs/index.py",
    "tools/x.py",
    "outputs/picture.png",
    "datasets/__init__.py",
    "tokred_notes.py",
)
WEIGHTS = ("tokred/zoo/probe.safetensors", "tokred/zoo/probe.json", "tokred/data/probe.npz")


def python_files(folder: Path) -> set[str]:
    """Every file of the package, as paths inside the archive; compiled files apart."""
    return {
        path.relative_to(folder.parent).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def metadata_of(text: str) -> Message:
    return Parser().parsestr(text)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, with decoys beside the package and weights inside it."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / "tokred", copy / "tokred", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*DECOYS, *WEIGHTS):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"")
    return copy


def build(project: Path, target: str) -> Path:
    """Build without isolation, so without a network."""
    dist = project.parent / f"{project.name}-dist-{target}"
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(dist)]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (archive,) = dist.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(project: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(build(project, "wheel"))


def test_wheel_holds_the_package_and_nothing_else(project: Path, wheel: zipfile.ZipFile) -> None:
    info = f"tokred-{metadata_version(wheel)}.dist-info"
    package = {name for name in wheel.namelist() if not name.startswith(f"{info}/")}
    assert package == python_files(project / "tokred")
    assert set(WEIGHTS) <= package
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert "tokred = tokred.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def metadata_version(wheel: zipfile.ZipFile) -> str:
    assert wheel.filename is not None
    return Path(wheel.filename).name.split("-")[1]


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = metadata_of(wheel.read(f"tokred-{metadata_version(wheel)}.dist-info/METADATA").decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    core = {canonicalize_name(r.name) for r in requirements if r.marker is None}
    assert core == {"torch", "einops", "numpy", "pillow", "safetensors"}
    for name, floors in FLOORS.items():
        assert {str(r.specifier) for r in requirements if r.name == name} == floors, name


def test_sdist_builds_the_same_wheel(project: Path, wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    with tarfile.open(build(project, "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        assert {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO", "tests/test_x.py", "tools/x.py"} <= names
        assert not {
            name for name in names if name.startswith(("outputs", "datasets", ".git/", ".venv", "tokred_notes"))
        }
        assert set(WEIGHTS) <= names
        archive.extractall(tmp_path)
    (unpacked,) = tmp_path.iterdir()
    with zipfile.ZipFile(build(unpacked, "wheel")) as again:
        assert sorted(again.namelist()) == sorted(wheel.namelist())


def test_package_is_typed() -> None:
    assert (ROOT / "tokred" / "py.typed").is_file()


def test_every_file_of_the_package_is_shipped() -> None:
    """No rule of .gitignore hides a file of the package from a build: hatchling leaves out what git ignores."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "--", "tokred"]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [name for name in ignored if "__pycache__" not in name] == []


@pytest.mark.parametrize("name", ["tokenizers", "datasets", "transformers", "diffusers", "timm", "torch", "evaluate"])
def test_no_folder_shadows_a_library(name: str) -> None:
    """The root is on sys.path in an editable install: a package or module of a library's name there would win."""
    assert not (ROOT / f"{name}.py").exists()
    assert not (ROOT / name / "__init__.py").exists()
    # `datasets` may not exist even as a plain folder: libraries then believe that it is installed.
    assert name == "tokenizers" or not (ROOT / name).exists()


def test_tokenizer_recipes_hold_no_tests() -> None:
    """Collected with importlib they would register a module `tokenizers` and break every later test."""
    assert [
        str(p) for p in (ROOT / "tokenizers").rglob("*.py") if re.match(r"test_|.*_test\.py|conftest", p.name)
    ] == []


def top_modules(distribution: importlib.metadata.Distribution) -> set[str]:
    """Names that a distribution makes importable."""
    parts = {file.parts[0] for file in distribution.files or []}
    return {re.sub(r"(\.[\w-]+)*\.(py|so|pth)$", "", part) for part in parts if not part.endswith((".dist-info", ".."))}


def installed_outside_core() -> set[str]:
    """Top-level modules of every installed distribution that the core dependencies do not pull in."""
    installed = {canonicalize_name(d.metadata["Name"]): d for d in importlib.metadata.distributions()}
    assert "tokred" in installed, "tokred is not installed here: run make install"
    queue, core = ["tokred"], set()
    while queue:
        name = canonicalize_name(queue.pop())
        if name in installed and name not in core:
            core.add(name)
            requirements = [Requirement(text) for text in installed[name].requires or []]
            queue += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    inside = {module for name in core for module in top_modules(installed[name])}
    return {module for distribution in installed.values() for module in top_modules(distribution)} - inside


def test_core_needs_only_the_core_dependencies() -> None:
    """With every other installed library blocked, the core, the ops, the methods and the command still load."""
    files = [*ROOT.glob("tokred/*.py"), *ROOT.glob("tokred/ops/*.py"), *ROOT.glob("tokred/core/*.py")]
    files += [*ROOT.glob("tokred/vision/*.py"), *ROOT.glob("tokred/vlm/*.py")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files}
    assert {"tokred", "tokred.cli"} <= modules
    blocked = installed_outside_core()
    assert {"timm", "transformers", "gradio", "torchvision"} <= blocked
    code = f"import sys, importlib; sys.modules.update(dict.fromkeys({sorted(blocked)}))\n"
    code += f"for module in {sorted(modules)}: importlib.import_module(module)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def run_bootstrap(folder: Path, installer: str) -> subprocess.CompletedProcess[str]:
    """Run the installer on a small project in `folder`, with an index that nobody answers for."""
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "bootstrap.py", folder / "tools")
    (folder / "pyproject.toml").write_text('[project]\nname = "tokred"\nversion = "0"\n')
    nowhere = "http://127.0.0.1:9/simple"
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_", "TOKRED_"))}
    env |= {"PIP_INDEX_URL": nowhere, "PIP_RETRIES": "1", "PIP_CONFIG_FILE": os.devnull}
    env |= {"UV_DEFAULT_INDEX": nowhere, "UV_NO_CACHE": "1", "UV_HTTP_RETRIES": "0", "TOKRED_INSTALLER": installer}
    command = [sys.executable, str(folder / "tools" / "bootstrap.py"), "demo"]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_an_unreachable_index_is_the_reason(tmp_path: Path, installer: str) -> None:
    if installer == "uv" and bootstrap.choose_installer() != "uv":
        pytest.skip("uv is not installed")
    result = run_bootstrap(tmp_path, installer)
    assert result.returncode == 1
    assert "tokred: error: the install failed: the package index could not be reached" in result.stderr
    assert not (tmp_path / ".venv" / ".tokred-installed.json").exists()


def test_a_broken_venv_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(tmp_path / "gone")
    result = run_bootstrap(tmp_path, "pip")
    assert "making it anew" in result.stderr
    assert (tmp_path / ".venv" / "bin" / "python").exists()


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full. About 8 GiB are needed"),
        ("error: failed to write: No space left on device (os error 28)", "the disk is full"),
        ("The virtual environment was not created successfully because ensurepip is not available.", "python3-venv"),
        ("ERROR: Could not find a version of torch (from versions: none)", "could not be reached, or it has no build"),
        ("ERROR: No matching distribution found for torch>=2.8", "no set of packages that fits Python 3"),
        # pip says both: it could not connect, and so found no version.
        ("Failed to establish a new connection: refused\nERROR: Could not find a version of hatchling", "the network"),
        ("ERROR: Failed building wheel for av", "no ready-made wheel"),
        ("RuntimeError: operator torchvision::nms does not exist", "different builds"),
        ("PermissionError: [Errno 13] Permission denied: '.venv/bin/tokred'", "could not be written"),
        ("something else", "its last lines, above, say why. Only 2.0 GiB of disk are free"),
    ],
)
def test_reason_of_a_failed_install(output: str, reason: str) -> None:
    assert reason in bootstrap.explain(f"first line\n{output}\nlast line\n", returncode=1, free=2.0)


def test_killed_installer_is_named() -> None:
    assert "memory" in bootstrap.explain("", returncode=-9, free=100.0)


@pytest.mark.parametrize(
    ("installed", "wanted", "nothing_to_do"),
    [
        (set(), {"demo"}, False),
        ({"demo"}, {"demo"}, True),
        ({"demo"}, {"all", "dev"}, False),
        ({"all", "dev"}, {"demo"}, True),
        ({"all"}, {"dev"}, False),
    ],
)
def test_a_larger_install_covers_a_smaller_one(installed: set[str], wanted: set[str], nothing_to_do: bool) -> None:
    assert bootstrap.covers(installed, wanted) is nothing_to_do
