"""The Dockerfiles and the programs that work inside of images."""

import http.server
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import threading
import tomllib
from contextlib import contextmanager
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "deploy" / "docker"
TARGETS = {"light", "grade", "surprisal", "train", "vllm"}
SERVERS = {"redis", "postgres", "prometheus"}


def instructions(path):
    """(name, rest) of each instruction, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def stages(path):
    """Name to (what it is made from, its instructions)."""
    found = {}
    for name, rest in instructions(path):
        if name == "FROM":
            parent, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            current = found.setdefault(name, (parent, []))[1]
        elif found:
            current.append((name, rest))
    return found


FILES = {"Dockerfile": TARGETS, "stores.Dockerfile": SERVERS}
OF_FILE = {name: stages(FOLDER / name) for name in FILES}
STAGES = OF_FILE["Dockerfile"]
FINAL = [(file, target) for file, targets in FILES.items() for target in sorted(targets)]


def inherited(file, stage, instruction):
    """The last of these instructions that holds in the stage."""
    parent, own = OF_FILE[file][stage]
    given = [rest for name, rest in own if name == instruction]
    if given:
        return given[-1]
    return inherited(file, parent, instruction) if parent in OF_FILE[file] else None


def load(name):
    spec = importlib.util.spec_from_file_location(f"image_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("file", "target"), FINAL)
def test_an_image_is_not_root(file, target):
    user = inherited(file, target, "USER")
    assert user == {"redis": "999:999", "postgres": "999:999", "prometheus": "65534:65534"}.get(
        target, "10001:10001"
    )


@pytest.mark.parametrize(("file", "target"), FINAL)
def test_an_image_says_what_it_is_and_whether_it_lives(file, target):
    labels = [rest for name, rest in OF_FILE[file][target][1] if name == "LABEL"]
    assert (
        f'org.opencontainers.image.title="asap{"" if target == "light" else f"-{target}"}"'
        in (labels[-1])
    )
    assert "--interval=" in inherited(file, target, "HEALTHCHECK")


@pytest.mark.parametrize("file", FILES)
def test_everything_is_made_from_one_base_with_a_version(file):
    declared = dict(rest.split("=") for name, rest in instructions(FOLDER / file) if name == "ARG")
    assert re.fullmatch(r"python:3\.\d+-slim(@sha256:[0-9a-f]{64})?", declared["BASE"])
    known = {"${BASE}"}
    for stage, (parent, own) in OF_FILE[file].items():
        assert parent in known
        for name, rest in own:
            if name == "COPY" and (source := re.match(r"--from=(\S+)", rest)):
                assert source[1] in known
        known.add(stage)


@pytest.mark.parametrize("file", FILES)
def test_old_builders_can_build_it(file):
    text = (FOLDER / file).read_text()
    assert not text.lower().startswith(("# syntax", "#syntax"))
    assert "--mount" not in text
    assert {name for name, _ in instructions(FOLDER / file)} <= {
        *("ARG", "FROM", "ENV", "RUN", "WORKDIR", "HEALTHCHECK", "ENTRYPOINT", "CMD", "LABEL"),
        *("COPY", "USER"),
    }


@pytest.mark.parametrize("file", FILES)
def test_packages_are_installed_without_leftovers(file):
    commands = [rest for name, rest in instructions(FOLDER / file) if name == "RUN"]
    apt = [command for command in commands if "apt-get" in command]
    assert apt
    for command in apt:
        assert "--no-install-recommends" in command
        assert "rm -rf /var/lib/apt/lists/*" in command
    for command in commands:
        assert not re.search(r"curl|wget|\|\s*sh\b", command)


def test_no_image_gets_sources_before_its_dependencies():
    for stage, (_, own) in STAGES.items():
        copied = [rest for name, rest in own if name == "COPY"]
        has_sources = any(re.match(r"(core|gateway|services|cli) ", rest) for rest in copied)
        assert has_sources == (stage == "app")
    for target in TARGETS - {"vllm"}:
        copies = [rest for name, rest in STAGES[target][1] if name == "COPY"]
        assert copies[-1] == "--from=app /out/ /"


def test_versions_are_exact():
    pinned = dict(
        line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
    )
    assert "--constraint /build/constraints.txt" in (FOLDER / "install.sh").read_text()
    text = (FOLDER / "Dockerfile").read_text()
    assert "pip install" not in text
    names = {name.lower().replace("_", "-") for name in pinned}
    assert {"unsloth", "unsloth-zoo", "bitsandbytes", "torchao", "hatchling", "psutil"} <= names
    [vllm] = re.findall(
        r"^version=(\S+)", (REPOSITORY / "tests/engines/install.sh").read_text(), re.M
    )
    assert re.findall(r"vllm(?:-cpu)?==([\d.]+)", text) == [vllm, vllm]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"ARG VERSION=(\S+)", text)) == {project["version"]}


def test_the_grading_image_has_the_sandbox_and_no_compiler():
    [install] = [rest for name, rest in STAGES["grade"][1] if name == "RUN" and "apt-get" in rest]
    assert {"bubblewrap", "libseccomp2", "util-linux"} <= set(install.split())
    assert "! command -v cc gcc clang" in install
    assert STAGES["grade"][0] == "light-deps"


def brought(*requirements):
    """Distributions that come with these, extras counted."""
    found, todo = set(), [Requirement(one) for one in requirements]
    while todo:
        one = todo.pop()
        key = (canonicalize_name(one.name), frozenset(one.extras))
        if key in found:
            continue
        found.add(key)
        for text in importlib.metadata.requires(one.name) or ():
            other = Requirement(text)
            extras = one.extras or {""}
            if other.marker is None or any(other.marker.evaluate({"extra": e}) for e in extras):
                todo.append(other)
    return {name for name, _ in found}


def listed(stage, lists):
    """What a stage installs: by the extras of `lists`, and by name."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    [install] = [rest for name, rest in STAGES[stage][1] if name == "RUN"]
    *_, by_name = install.rpartition(".txt ")
    return [*load("requirements").requirements(project, lists), *by_name.split()]


HIDING = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hidden())
import asap_cli.roles
"""


def test_the_image_without_torch_has_what_every_role_imports():
    there = brought(*listed("light-build", ["cluster", "s3", "kubernetes"])) | {"asap-cot"}
    homes = importlib.metadata.packages_distributions()
    away = {
        module
        for module, distributions in homes.items()
        if not there & {canonicalize_name(one) for one in distributions}
    }
    assert {"torch", "numpy", "jinja2"} <= away

    def started(*hidden):
        return subprocess.run([sys.executable, "-c", HIDING, *hidden], check=False).returncode == 0

    assert started(*away)
    assert not started(*away, "tokenizers")


def test_the_context_holds_what_is_copied_and_no_secrets():
    rules = (REPOSITORY / ".dockerignore").read_text().splitlines()
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    assert rules[0] == "*"
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    assert not {".env", ".git", ".venv", "tests", "examples", "."} & set(let_in)
    copied = [
        source
        for file in FILES
        for name, rest in instructions(FOLDER / file)
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert len(copied) > 10
    for source in copied:
        assert (REPOSITORY / source).exists(), source
        assert any(source.rstrip("/") == one or source.startswith(f"{one}/") for one in let_in)


def test_requirements_are_those_of_the_extras_and_of_the_extras_they_name():
    def printed(extras):
        command = [
            sys.executable,
            FOLDER / "requirements.py",
            REPOSITORY / "pyproject.toml",
            extras,
        ]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split(
            "\n"
        )

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    light = printed("cluster,s3,kubernetes")
    assert {*project["dependencies"], *extras["serve"], *extras["s3"]} <= set(light)
    assert "celery==5.6.3" in light
    assert not any(
        "asap-cot" in line or line.startswith(("torch", "transformers")) for line in light
    )
    assert set(extras["surprisal"]) <= set(printed("trainer"))


def test_the_bill_of_materials_lists_distributions():
    sbom = load("sbom")
    components = {one["name"]: one for one in sbom.python_components()}
    version = importlib.metadata.version("pydantic")
    assert components["pydantic"]["version"] == version
    assert components["pydantic"]["purl"] == f"pkg:pypi/pydantic@{version}"


def test_two_versions_of_one_distribution_end_the_build(monkeypatch, tmp_path):
    for version in ("1.0", "2.0"):
        folder = tmp_path / version / f"twice-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: twice\nVersion: {version}\n"
        )
    sbom = load("sbom")
    paths = [str(tmp_path / "1.0"), str(tmp_path / "2.0")]
    monkeypatch.setattr(sbom, "distributions", lambda: importlib.metadata.distributions(path=paths))
    with pytest.raises(SystemExit, match="twice is there in two versions"):
        sbom.python_components()


@contextmanager
def server(status):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}/readyz"
        listening.shutdown()
        thread.join()


def health(*urls):
    return subprocess.run([sys.executable, FOLDER / "health.py", *urls], check=False).returncode


def test_health_is_one_url_that_answers_with_200():
    nobody = "http://127.0.0.1:9/healthz"
    with server(200) as good, server(503) as bad:
        assert health(good) == 0
        assert health(nobody, good) == 0
        assert health(bad) == 1
        assert health(nobody, bad) == 1


def test_the_variant_reaches_every_image(tmp_path):
    docker, asked = tmp_path / "docker", tmp_path / "asked"
    docker.write_text(f'#!/bin/sh\necho "$*" >> {asked}\necho 1000000\n')
    docker.chmod(0o755)
    subprocess.run(
        ["sh", REPOSITORY / "scripts/images_smoke.sh", "--build"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "VARIANT": "gpu"},
        check=True,
    )
    builds = [line for line in asked.read_text().splitlines() if "/Dockerfile " in line]
    assert len(builds) == len(TARGETS)
    assert all("--build-arg VARIANT=gpu" in line for line in builds)


@pytest.mark.parametrize(
    "script",
    [
        "deploy/docker/install.sh",
        "deploy/docker/postgres.sh",
        "deploy/compose/make_env.sh",
        "scripts/images_smoke.sh",
    ],
)
def test_scripts_are_shell(script):
    subprocess.run(["sh", "-n", REPOSITORY / script], check=True)
