"""Make `.venv` beside pyproject.toml and install tokred with the given extras: `python3 tools/bootstrap.py all dev`.

Uses uv when it runs here and pip when not (`TOKRED_INSTALLER=uv|pip` chooses). Does nothing when what was asked for is
already installed; an install for a smaller set of extras leaves the larger one in place. A failed install ends with the
reason. Needs nothing but the standard library, and parses on an old Python so that it can say that it is too old.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".tokred-installed.json"

OLDEST_PYTHON = (3, 10)
THIS_PYTHON = "{}.{}".format(*sys.version_info)
FRESH_INSTALL_GIB = 8  # torch with its CUDA libraries is about 5.6 GiB; the rest is unpacking

# What failed installers print, and what it means. The first pattern that is found is the reason.
REASONS = (
    (
        r"torchvision::nms|libtorch\S*: undefined symbol|partially initialized module 'torchvision'",
        "torch and torchvision are of different builds. Remove .venv and try again with one index for both.",
    ),
    (
        r"No space left on device|os error 28|Errno 28|Disk quota exceeded",
        "the disk is full. About {need} GiB are needed (torch brings its CUDA libraries); {free:.1f} GiB are free.",
    ),
    (
        r"ensurepip is (not available|disabled)|No module named '?(venv|ensurepip)",
        "this Python has no working venv module. Install it (Debian, Ubuntu: the package python3-venv), or install uv.",
    ),
    (
        r"Failed to establish a new connection|Max retries exceeded|Connection (refused|reset|aborted)|"
        r"Temporary failure in name resolution|Name or service not known|dns error|tcp connect error|"
        r"error sending request|client error \(Connect\)|Failed to fetch|timed? ?out|ProxyError|Network is unreachable|"
        r"certificate verify failed|invalid peer certificate|SSLError|Network connectivity is disabled",
        "the package index could not be reached. Check the network, the proxy variables, and the index that "
        "pip.conf, uv.toml, PIP_INDEX_URL or UV_DEFAULT_INDEX name.",
    ),
    (
        r"Permission denied|Errno 13|os error 13",
        "a file could not be written. Remove .venv (it may belong to another user) and try again.",
    ),
    (
        r"Failed (building wheel for|to build:?) [`'\"]?(?!tokred)",
        "a dependency has no ready-made wheel for Python {python} on this machine, and building it failed. "
        "Try another Python: make PYTHON=python3.12 ...",
    ),
    (
        r"from versions: none",  # all that pip says of an index that does not answer, once it has tried enough
        "the package index could not be reached, or it has no build of the package above for Python {python}.",
    ),
    (
        r"No solution found|No matching distribution|Could not find a version|requires a different Python|"
        r"ResolutionImpossible|has no wheels with a matching",
        "the index has no set of packages that fits Python {python} on this machine. Try another Python "
        "(make PYTHON=python3.12 ...), or the full index if yours is a mirror of a part.",
    ),
)


def say(message: str) -> None:
    print("tokred: " + message, file=sys.stderr, flush=True)


class InstallError(Exception):
    """An install that failed, with the reason in words that name a remedy."""


def rerun_on_newer_python() -> None:
    """Hand over to the newest python3.N >= 3.10 on PATH; exit with the reason if there is none."""
    for minor in range(20, OLDEST_PYTHON[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found and subprocess.call([found, "-c", ""], stderr=subprocess.DEVNULL) == 0:
            os.execv(found, [found, *sys.argv])
    raise InstallError(
        f"Python 3.10 or newer is needed; {sys.executable} is {THIS_PYTHON}. "
        "Install a newer one (with uv: uv python install 3.12) and run: make PYTHON=/path/to/it ..."
    )


def choose_installer() -> str:
    chosen = os.environ.get("TOKRED_INSTALLER", "")
    if chosen not in ("", "uv", "pip"):
        raise InstallError(f"TOKRED_INSTALLER is {chosen!r}; it may be 'uv' or 'pip'.")
    if chosen:
        return chosen
    # A version manager may leave a `uv` on PATH that does not run: ask it.
    with contextlib.suppress(OSError):
        if subprocess.run(["uv", "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
            return "uv"
    return "pip"


def free_gib() -> float:
    return shutil.disk_usage(str(ROOT)).free / 2**30


def explain(output: str, returncode: int, free: float) -> str:
    """The reason of a failed installer, from what it printed, its exit status and the free disk in GiB."""
    facts = {"need": FRESH_INSTALL_GIB, "free": free, "python": THIS_PYTHON}
    for pattern, reason in REASONS:
        if re.search(pattern, output, re.IGNORECASE):
            return reason.format(**facts)
    if returncode in (-9, 137):
        return "the installer was killed, most often for want of memory."
    reason = f"the installer failed (exit status {returncode}); its last lines, above, say why."
    if free < FRESH_INSTALL_GIB:
        reason += f" Only {free:.1f} GiB of disk are free; a fresh install needs about {FRESH_INSTALL_GIB}."
    return reason


def run(command: "list[str]") -> None:
    """Run an installer with its output passed through; raise `InstallError` with the reason if it fails."""
    last = deque(maxlen=200)  # type: deque[str]
    try:
        process = subprocess.Popen(
            command,
            cwd=str(ROOT),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            errors="replace",
        )
    except OSError as error:
        raise InstallError(f"{command[0]} did not start: {error}") from error
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            last.append(line)
    if process.returncode != 0:
        raise InstallError(explain("".join(last), process.returncode, free_gib()))


def venv_works() -> bool:
    """Whether .venv holds a Python that starts, is new enough, and belongs to this very folder."""
    probe = f"import sys; print(sys.prefix); sys.exit(sys.version_info < {OLDEST_PYTHON})"
    try:
        result = subprocess.run([str(PYTHON), "-c", probe], capture_output=True, text=True)
    except OSError:
        return False
    return result.returncode == 0 and Path(result.stdout.strip()).resolve() == VENV.resolve()


def make_venv(installer: str) -> None:
    if venv_works():
        return
    if VENV.exists():
        say(f"{VENV.name} holds no working Python >= 3.10; making it anew")
        shutil.rmtree(str(VENV), ignore_errors=True)
    base = getattr(sys, "_base_executable", None) or sys.executable
    if installer == "uv":
        run(["uv", "venv", "--quiet", "--python", base, str(VENV)])
    else:
        run([base, "-m", "venv", str(VENV)])


def install(installer: str, extras: "list[str]") -> None:
    target = ["-e", f".[{','.join(extras)}]"]
    if installer == "uv":
        run(["uv", "pip", "install", "--python", str(PYTHON), *target])
    else:
        pip = [str(PYTHON), "-m", "pip"]
        if subprocess.run([*pip, "--version"], capture_output=True).returncode != 0:
            run([str(PYTHON), "-m", "ensurepip", "--upgrade"])  # a .venv that uv made has no pip
        run([*pip, "install", "--disable-pip-version-check", "--progress-bar=off", *target])
    # A torch and a torchvision of different builds install well and fail when they are loaded.
    check = "import importlib.util, torch; importlib.util.find_spec('torchvision') and __import__('torchvision')"
    run([str(PYTHON), "-c", check])


def fingerprint() -> str:
    """Changes when what is to be installed changes, or when the tree was moved (an editable install holds its path)."""
    key = hashlib.sha256((ROOT / "pyproject.toml").read_bytes())
    key.update(str(ROOT).encode())
    return key.hexdigest()


def installed_extras() -> "set[str]":
    """The extras that are installed for the present pyproject.toml; empty if none or if .venv is gone."""
    try:
        stamp = json.loads(STAMP.read_text())
        return set(stamp["extras"]) if stamp["fingerprint"] == fingerprint() else set()
    except (OSError, ValueError, KeyError):
        return set()


def covers(installed: "set[str]", wanted: "set[str]") -> bool:
    missing = wanted - installed
    return not missing or ("all" in installed and "dev" not in missing)  # `all` is every extra but dev


@contextlib.contextmanager
def one_at_a_time():  # type: ignore[no-untyped-def]
    """Two `make` in one tree install one after the other. The lock is on the folder: it leaves no file."""
    import fcntl

    handle = os.open(str(ROOT), os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def bootstrap(extras: "list[str]") -> None:
    with one_at_a_time():
        done = installed_extras()
        if covers(done, set(extras)) and venv_works():
            return
        installer = choose_installer()
        fresh = not any(VENV.glob("lib/python*/site-packages/torch"))
        if fresh and free_gib() < FRESH_INSTALL_GIB:
            say(f"warning: {free_gib():.1f} GiB of disk are free; a fresh install needs about {FRESH_INSTALL_GIB} GiB")
        say(f"installing [{','.join(extras)}] into {VENV.name} with {installer}")
        make_venv(installer)
        install(installer, extras)
        done = installed_extras()  # empty again if .venv was made anew
        STAMP.write_text(json.dumps({"fingerprint": fingerprint(), "extras": sorted(done.union(extras))}))


def main() -> int:
    extras = sys.argv[1:]
    if not extras:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        if sys.version_info < OLDEST_PYTHON:
            rerun_on_newer_python()
        bootstrap(extras)
    except (InstallError, OSError) as error:
        say(f"error: the install failed: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
