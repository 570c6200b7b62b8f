"""Builds the sdist and the wheel, and uses the wheel as somebody does who has nothing else.

    python .ci/package.py            # `make package`

The wheel goes into a fresh environment that sees the packages it declares, and what those declare, and no
other: they are linked from the environment that runs this, so that torch is not downloaded a second time. A
dependency that was forgotten is missing there.
"""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WANTED = (
    "py.typed",
    "messages/en.toml",
    "messages/zh.toml",
    "integrations/live/live.js",
    "lessons/en/1-what-a-gradient-is.md",
    "lessons/zh/8-your-own-model.md",
    "view/static/index.html",
    "view/static/pages/run.js",
    "view/static/charts/chart.js",
    "view/static/base/base.css",
)
UNWANTED = ("tests/", "docs/", "benchmarks/")

CHECK = """
import importlib, pkgutil, sys
from importlib.resources import files
import clinometer
assert "torch" not in sys.modules
assert "site-packages" in clinometer.__file__, clinometer.__file__
assert files("clinometer").joinpath("py.typed").is_file()
extras = {name: name for name in ("transformers", "lightning", "notebook")} | {"pytest_plugin": None}
optional = {f"clinometer.integrations.{name}": extra for name, extra in extras.items()}
for module in pkgutil.walk_packages(clinometer.__path__, "clinometer."):
    if module.name == "clinometer.__main__":
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        if module.name not in optional:
            raise
        extra = optional.pop(module.name)
        assert extra is None or f"pip install 'clinometer[{extra}]'" in str(error), error
assert not optional, f"{optional} could be imported: this environment is not bare"
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        sdist, wheel = build(work)
        look_into(sdist, wheel)
        python = environment(work / "bare", wheel)
        use(python, work)
    print("The wheel works on its own.")


def build(work: Path) -> tuple[Path, Path]:
    """The sdist and the wheel of this tree; the wheel made from the sdist must hold the same files."""
    run(sys.executable, "-m", "build", "--outdir", work / "tree", "--wheel", ROOT)
    run(sys.executable, "-m", "build", "--outdir", work / "dist", ROOT)  # the sdist, and of it the wheel
    (direct,), (wheel,) = work.glob("tree/*.whl"), work.glob("dist/*.whl")
    (sdist,) = work.glob("dist/*.tar.gz")
    one, other = contents(direct), contents(wheel)
    if one != other:
        raise SystemExit(f"the wheel from the sdist differs: {sorted(set(one.items()) ^ set(other.items()))}")
    return sdist, wheel


def contents(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as file:
        return {entry.filename: entry.CRC for entry in file.infolist()}


def look_into(sdist: Path, wheel: Path) -> None:
    names = contents(wheel)
    source = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src").rglob("*.py")}
    missing = [n for n in [*source, *(f"clinometer/{name}" for name in WANTED)] if n not in names]
    extra = [name for name in names if name.startswith(UNWANTED)]
    if missing or extra:
        raise SystemExit(f"the wheel lacks {missing} and should not hold {extra}")
    torch = [line for line in requirements(wheel) if re.match(r"torch\b", line)]
    capped = [line for line in torch if not re.fullmatch(r"torch>=[\d.]+", line)]
    if capped or not torch:
        raise SystemExit(f"installing the wheel could change the torch that is there: {capped}")
    for path in (sdist, wheel):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


def environment(place: Path, wheel: Path) -> Path:
    """A fresh environment with the wheel, and links to the packages that it asks for."""
    venv.create(place, with_pip=False)
    windows = os.name == "nt"
    python = place / ("Scripts/python.exe" if windows else "bin/python")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for found in needed(wheel):
        for name in top_level(found):
            source = Path(str(found.locate_file(name)))
            target = site / name
            if source.exists() and not target.exists():
                target.symlink_to(source, target_is_directory=source.is_dir())
    prefix = ("-m", "pip", "--python", str(python), "--disable-pip-version-check")
    run(sys.executable, *prefix, "install", "--quiet", "--no-index", wheel)  # --no-index: all must be there
    run(sys.executable, *prefix, "check")
    return python


def needed(wheel: Path) -> list[Distribution]:
    """What the wheel requires, and what that requires, extras left out."""
    asked = requirements(wheel)
    found: dict[str, Distribution] = {}
    waiting = names_in(asked)
    while waiting:
        package = waiting.pop()
        if package in found:
            continue
        try:
            found[package] = distribution(package)
        except PackageNotFoundError:
            continue  # for another system, or another Python; `pip check` knows
        waiting += names_in(found[package].requires)
    return list(found.values())


def requirements(wheel: Path) -> list[str]:
    """What the wheel's metadata asks for, line by line."""
    with zipfile.ZipFile(wheel) as file:
        (metadata,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(file.read(metadata)).get_all("Requires-Dist") or []


def names_in(requires: list[str] | None) -> list[str]:
    asked = [line for line in requires or [] if not re.search(r"\bextra\s*==", line)]
    return [re.split(r"[\s\[<>=!~;(]", line, maxsplit=1)[0].lower().replace("_", "-") for line in asked]


def top_level(of: Distribution) -> set[str]:
    """The names in site-packages that a package brought there; its scripts lie elsewhere."""
    return {file.parts[0] for file in of.files or [] if file.parts[0] not in ("..", "__pycache__")}


def use(python: Path, work: Path) -> None:
    """As a stranger, in an empty folder."""
    home = work / "home"
    home.mkdir()
    command = python.with_name("clinometer" + (".exe" if os.name == "nt" else ""))
    run(python, "-c", CHECK, cwd=home)
    version = run(command, "--version", cwd=home).strip()
    if f"-{version}-" not in next(work.glob("dist/*.whl")).name:
        raise SystemExit(f"clinometer --version says {version}, and the wheel another")
    for line in (
        ["--help"],
        ["train", "--help"],
        ["doctor"],
        ["learn"],
        ["learn", "3"],
        ["demo", "--quick", "--run", "demo"],
    ):
        run(command, *line, cwd=home)
    run(command, "runs", "demo", cwd=home)


def run(*command: object, cwd: Path | None = None) -> str:
    """Its output; what it said, and an end, if it fails."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=kept, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed\n{done.stdout}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
