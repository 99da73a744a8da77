"""The release itself: wheel and source archive build, install where nothing else of ours is, and work."""

from __future__ import annotations

import email
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from armorm import __version__

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder of the wheel, which is built from the source archive."""
    folder = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("tree") / "armorm"
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("not a checkout")
    for name in filter(None, done.stdout.decode().split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    program = (
        "from setuptools.build_meta import build_sdist, build_wheel\n"
        f"print(build_sdist({str(folder)!r})); print(build_wheel({str(folder)!r}))"
    )
    built = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    return folder


def wheel_of(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_wheel_holds_types_models_and_licence_and_no_tests(built):
    with zipfile.ZipFile(wheel_of(built)) as wheel:
        names = wheel.namelist()
        about = email.message_from_bytes(wheel.read(f"armorm-{__version__}.dist-info/METADATA"))
    assert "armorm/py.typed" in names
    assert "armorm/embedded_models/armorm-tiny/model.safetensors" in names
    # Without the record of its prompts, heads would be trained on what the backbone has seen.
    assert "armorm/embedded_models/armorm-tiny/finetuned.safetensors" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert not [name for name in names if not name.startswith(("armorm/", f"armorm-{__version__}"))]
    assert about["Version"] == __version__
    assert about["Requires-Python"] == ">=3.10"
    assert about["License-Expression"] == "Apache-2.0"
    assert {"serve", "client", "ui", "ray", "finetune"} <= set(about.get_all("Provides-Extra"))


def test_the_source_archive_holds_what_the_build_needs(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/armorm/py.typed"} <= names


def test_the_wheel_installs_in_a_clean_environment_and_works(built, tmp_path):
    """The requirements come from this environment by a path file, so that nothing is fetched."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=True, symlinks=True)
    python = home / "bin" / "python"
    purelib = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel_of(built)]
    subprocess.run(install, check=True, capture_output=True)
    # Appended after the packages of its own; files of an editable install there are no packages and are not read.
    Path(purelib, "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def inside(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        return subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    where = inside(python, "-c", "import armorm; print(armorm.__file__)")
    assert where.stdout.startswith(str(home)), where.stdout + where.stderr
    assert inside(home / "bin" / "armorm", "--version").stdout.strip() == __version__
    explained = inside(home / "bin" / "armorm", "explain", "--prompt", "2+2?", "--response", "4", "--json")
    assert explained.returncode == 0, explained.stderr
    checked = inside(python, "-m", "pip", "check")
    ours = [line for line in checked.stdout.splitlines() if line.startswith("armorm ")]
    assert not ours, checked.stdout
