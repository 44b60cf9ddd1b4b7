"""What Fulcrum is built on, checked: `python scripts/check_supply.py`, which `make check` runs.

The versions that are tested (constraints.txt) are those of the locks, which hold hashes; what is
installed here is of these versions; every dependency that pyproject.toml names is in
CONTRIBUTING.md with its reason; and where the index of known vulnerabilities can be reached,
pip-audit finds none in what users install.
"""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", re.M)
_UNREACHED = re.compile(r"could not be audited|Connection|Max retries|timed out|resolve", re.I)


def plain(name: str) -> str:
    """A distribution's name as indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    """Names and versions of a file of pins."""
    return {
        plain(name): version
        for name, version in _PIN.findall((ROOT / file).read_text(encoding="utf-8"))
    }


def direct() -> set[str]:
    """The dependencies that pyproject.toml names, those of its extras too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]
    return {plain(re.split(r"[^A-Za-z0-9._-]", one)[0]) for one in wanted}


def faults() -> list[str]:
    """What is wrong with constraints, locks and reasons, in words."""
    tested, found = pins("constraints.txt"), []
    for lock in ("locks/run.txt", "locks/dev.txt"):
        locked = pins(lock)
        found += [
            f"{lock}: {name} {locked[name]}, and constraints.txt has {version}: make lock"
            for name, version in tested.items()
            if name in locked and locked[name] != version
        ]
        blocks = re.split(r"\n(?=\S)", (ROOT / lock).read_text(encoding="utf-8").strip())
        found += [
            f"{lock}: {block.split()[0]} has no hash: make lock"
            for block in blocks
            if "--hash=sha256:" not in block
        ]
    found += [
        f"constraints.txt: {name} is in no lock: make lock"
        for name in tested.keys() - pins("locks/dev.txt").keys()
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for one in project["dependencies"]:
        name = plain(re.split(r"[^A-Za-z0-9._-]", one)[0])
        found += [f"locks/run.txt: lacks {name}: make lock"] * (name not in pins("locks/run.txt"))
    reasons = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    given = {
        plain(name)
        for row in re.findall(r"^\| ([^|]*) \|", reasons, re.M)
        for name in re.findall(r"`([^`]+)`", row)
    }
    found += [f"CONTRIBUTING.md: no reason for {name}" for name in sorted(direct() - given)]
    found += [
        f"CONTRIBUTING.md: a reason for {name}, which is no dependency"
        for name in sorted(given - direct())
    ]
    return found


def installed() -> list[str]:
    """What is installed here in other versions than those tested (a build's own mark, +cpu, does
    not count)."""
    tested = pins("constraints.txt")
    here = {
        plain(one.metadata["Name"]): one.version.partition("+")[0]
        for one in metadata.distributions()
    }
    return [
        f"installed: {name} {here[name]}, tested: {version}"
        for name, version in tested.items()
        if here.get(name, version) != version
    ]


def audit() -> str:
    """What pip-audit says of locks/run.txt: nothing where it finds nothing.

    Raises ConnectionError where it cannot look.
    """
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "-r",
        str(ROOT / "locks" / "run.txt"),
        "--disable-pip",
        "--progress-spinner",
        "off",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if _UNREACHED.search(done.stdout + done.stderr):
        raise ConnectionError(
            "their index cannot be reached from here, or does not know these versions"
        )
    return done.stdout if done.returncode else ""


def main() -> None:
    """Check, say, and exit with 1 where anything is wrong."""
    wrong = faults() + installed()
    try:
        wrong += [f"pip-audit: {text}" for text in audit().splitlines()]
        print("known vulnerabilities: looked up")
    except (ConnectionError, subprocess.TimeoutExpired) as error:
        print(f"known vulnerabilities: not looked up: {error}")
    print(
        "\n".join(wrong)
        or (
            f"{len(pins('constraints.txt'))} versions, locked with hashes; every dependency has "
            "its reason"
        )
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
