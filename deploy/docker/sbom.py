"""Print what this image holds as CycloneDX JSON: its Python distributions and Debian packages."""

import json
import subprocess
import sys
from importlib.metadata import distributions
from urllib.parse import quote


def python_components() -> list[dict]:
    """Every distribution that this interpreter sees.

    Two versions of one end the build: a layer has been laid over what it does not fit.
    """
    found: dict[str, dict] = {}
    for distribution in distributions():
        name, version = distribution.name.lower().replace("_", "-"), distribution.version
        if any(one["name"] == name and one["version"] != version for one in found.values()):
            raise SystemExit(f"{name} is there in two versions")
        purl = f"pkg:pypi/{name}@{quote(version)}"
        component = {"type": "library", "name": name, "version": version, "purl": purl}
        licence = distribution.metadata.get("License-Expression")
        if licence:
            component["licenses"] = [{"expression": licence}]
        found[purl] = component
    return [found[purl] for purl in sorted(found)]


def debian_components() -> list[dict]:
    """Every installed package of the base system."""
    form = "${Package} ${Version} ${Architecture}\n"
    listed = subprocess.run(
        ["dpkg-query", "--show", f"--showformat={form}"], check=True, capture_output=True, text=True
    )
    found = []
    for line in sorted(listed.stdout.splitlines()):
        name, version, architecture = line.split()
        purl = f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={architecture}"
        found.append({"type": "library", "name": name, "version": version, "purl": purl})
    return found


if __name__ == "__main__":
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "components": python_components() + debian_components(),
    }
    sys.stdout.write(json.dumps(bom, indent=1) + "\n")
