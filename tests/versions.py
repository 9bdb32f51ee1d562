"""The suite on every supported Python, and once on the oldest of everything.

    python -m tests.versions --only oldest 3.13

Each has an environment of its own in `.venvs`, made when it is missing or setup.cfg has
changed: the newest that pip finds for that Python, or exactly the lower bounds of
setup.cfg. Needs nothing but a Python. What is not run is named, and is a failure.
"""

import argparse
import configparser
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / ".venvs"
PYTHONS = {"oldest": "3.10", **{v: v for v in ("3.10", "3.11", "3.12", "3.13")}}
SHOWN = ("keras", "tensorflow", "numpy", "scipy", "scikit-learn")


def lower_bounds() -> list[str]:
    """The requirements of setup.cfg, each at the oldest version that it allows."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    lines = [config["options"]["install_requires"], extras["plot"], extras["dev"]]
    found = "\n".join(lines).split()
    return [f.replace(">=", "==") for f in found if not f.startswith("keras-milr[")]


def find_python(version: str, given: list[str]) -> str | None:
    """A Python of that version: one that is given, on the PATH, or of pyenv."""
    pyenv = pathlib.Path.home() / ".pyenv/versions"
    own = sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)
    for candidate in [*given, f"python{version}", *map(str, own)]:
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        try:
            run = subprocess.run(
                [candidate, "-c", code], capture_output=True, text=True
            )
        except OSError:
            continue
        # What pyenv puts on the PATH may be there and yet not run.
        if run.returncode == 0 and run.stdout.strip() == version:
            return candidate
    return None


def prepared(name: str, python: str) -> pathlib.Path:
    """The Python of an environment, made if needed."""
    folder = FOLDER / name
    pins = lower_bounds() if name == "oldest" else []
    wanted = "\n".join([python, *pins, (ROOT / "setup.cfg").read_text()])
    ready, own = folder / ".ready", folder / "bin/python"
    if not ready.exists() or ready.read_text() != wanted:
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        install = [own, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, "--upgrade", "pip"], check=True)
        subprocess.run([*install, "--editable", f"{ROOT}[dev]", *pins], check=True)
        ready.write_text(wanted)
    return own


def versions(python) -> str:
    code = (
        "import sys, importlib.metadata as m; print(sys.version.split()[0], "
        "*[f'{n} {m.version(n)}' for n in sys.argv[1:]], sep=', ')"
    )
    run = subprocess.run([python, "-c", code, *SHOWN], capture_output=True, text=True)
    return run.stdout.strip()


def tested(name: str, python: str, options: list[str]) -> tuple[bool, str]:
    """Runs the suite: whether all passed, and a line on it."""
    try:
        own = prepared(name, python)
    except subprocess.CalledProcessError as error:
        return False, f"NOT RUN: no environment: {error}"
    start, log = time.perf_counter(), FOLDER / f"{name}.log"
    with open(log, "w", encoding="utf-8") as file:
        command = [own, "-m", "pytest", *options]
        run = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    said = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", log.read_text()[-2000:])
    line = f"{', '.join(said) or 'no result'}, {time.perf_counter() - start:.0f} s"
    line += f" (Python {versions(own)}; {log.relative_to(ROOT)})"
    return run.returncode == 0, line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PYTHONS, default=list(PYTHONS))
    help = "executables to try first, whatever their version"
    parser.add_argument("--pythons", nargs="+", default=[], help=help)
    parser.add_argument("pytest", nargs="*", help="options of pytest, after --")
    args = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    failed = False
    for name in args.only:
        python = find_python(PYTHONS[name], args.pythons)
        if python is None:
            passed, line = False, f"NOT RUN: no Python {PYTHONS[name]} was found"
        else:
            passed, line = tested(name, python, args.pytest or ["-q", "-n", "auto"])
        failed = failed or not passed
        print(f"{name}: {'' if passed else 'FAILED: '}{line}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
