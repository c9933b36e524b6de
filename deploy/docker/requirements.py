"""Print what extras of pyproject.toml need, so that an image gets it before the sources.

python3 requirements.py pyproject.toml serve,cluster
"""

import re
import sys
import tomllib
from pathlib import Path

OWN = re.compile(r"asap-cot\[([a-z0-9,-]+)\]")


def requirements(project: dict, extras: list[str]) -> list[str]:
    """Requirements of the project with these extras, those named by other extras included."""
    found = list(project["dependencies"])
    for extra in extras:
        for requirement in project["optional-dependencies"][extra]:
            own = OWN.fullmatch(requirement)
            found += requirements(project, own[1].split(",")) if own else [requirement]
    return sorted(set(found))


if __name__ == "__main__":
    project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
    sys.stdout.write("\n".join(requirements(project, sys.argv[2].split(","))) + "\n")
