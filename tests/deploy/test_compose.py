"""docker-compose.yml and what belongs to it, by the rules that every container keeps."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from asap_cli.env_example import env_example
from asap_cli.roles import STAGES

REPOSITORY = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
NAMES = sorted(SERVICES)
ENDING = {"migrate", "weights"}
"""Services that do their work and end."""
REQUIRED = re.compile(r"\$\{(\w+):\?[^}]+\}")


def image(service):
    """The image with the defaults of its variables."""
    return re.sub(r"\$\{\w+:-([^}]+)\}", r"\1", SERVICES[service]["image"])


def target(service):
    return SERVICES[service].get("build", {}).get("target")


@pytest.mark.parametrize("name", NAMES)
def test_a_container_can_do_no_more_than_it_needs(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "ipc", "network_mode", "devices"} & set(service)


@pytest.mark.parametrize("name", NAMES)
def test_a_container_is_not_root(name):
    # Our own images end with their user, which test_dockerfile.py sees to.
    ours = SERVICES[name].get("build", {}).get("dockerfile") == "deploy/docker/Dockerfile"
    assert ours or re.fullmatch(r"[1-9]\d*:\d+", SERVICES[name]["user"])


@pytest.mark.parametrize("name", NAMES)
def test_a_container_is_bounded(name):
    service = SERVICES[name]
    assert re.fullmatch(r"(\$\{\w+:-)?\d+[gm]\}?", service["mem_limit"])
    assert service["pids_limit"] <= 1000
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}


@pytest.mark.parametrize("name", NAMES)
def test_a_service_tells_its_health(name):
    if name in ENDING:
        assert SERVICES[name]["restart"] == "no"
        return
    assert SERVICES[name]["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert SERVICES[name]["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", NAMES)
def test_an_image_has_a_version(name):
    assert re.fullmatch(r"[a-z0-9/-]+:\d+\.\d+\.\d+", image(name))


def test_workers_wait_for_the_schema():
    ours = [
        name for name in NAMES if name not in ("postgres", "redis", "migrate", "grafana", "vllm")
    ]
    assert len(ours) >= 7
    for name in ours:
        after = SERVICES[name]["depends_on"]
        assert after["migrate"] == {"condition": "service_completed_successfully"}
        assert after["redis"] == {"condition": "service_healthy"}
    assert SERVICES["migrate"]["depends_on"]["postgres"] == {"condition": "service_healthy"}


def test_without_profiles_it_is_the_two_stages_of_a_prune():
    always = {name for name in NAMES if "profiles" not in SERVICES[name]}
    assert always == {"postgres", "redis", "migrate", "gateway", "anchor", "surprisal"}
    profiles = {profile for one in SERVICES.values() for profile in one.get("profiles", [])}
    assert profiles == {"train", "evaluate", "monitoring"}


def test_workers_run_stages_that_exist():
    stages = {
        one["command"][1]: one.get("profiles", [])
        for one in SERVICES.values()
        if one.get("command", [None])[0] == "worker"
    }
    assert set(stages) == set(STAGES)
    assert stages["generate"] == stages["grade"] == ["evaluate"]


def test_settings_are_those_of_the_program():
    known = set(re.findall(r"^#(ASAP_\w+)=", env_example(), re.MULTILINE))
    for name in NAMES:
        given = {key for key in SERVICES[name].get("environment", {}) if key.startswith("ASAP_")}
        assert given <= known, name


def test_what_has_no_business_outside_has_no_way_out():
    assert COMPOSE["networks"]["back"] == {"internal": True}
    for name in ("postgres", "redis", "migrate", "grade", "generate", "vllm"):
        assert SERVICES[name]["networks"] == ["back"]


def test_ports_are_open_to_this_machine_alone():
    published = [port for one in SERVICES.values() for port in one.get("ports", [])]
    assert len(published) == 3
    assert all("127.0.0.1:" in port for port in published)


def test_the_model_that_is_asked_is_the_one_that_is_served():
    weights, vllm = SERVICES["weights"]["command"], SERVICES["vllm"]["command"]
    _, _, model, out = weights
    folder = out.removeprefix("--out=")
    assert folder == f"/cache/models/{model}"
    assert vllm[1] == folder
    assert f"--served-model-name={model}" in vllm
    assert SERVICES["generate"]["environment"]["ASAP_EVALUATOR__TOKENIZER"] == folder
    for name in ("vllm", "generate"):
        after = SERVICES[name]["depends_on"]["weights"]
        assert after == {"condition": "service_completed_successfully"}
        assert SERVICES[name]["volumes"] == ["cache:/cache:ro"]
    on_gpus = yaml.safe_load((REPOSITORY / "deploy/compose/gpu.yml").read_text())
    command = on_gpus["services"]["vllm"]["command"]
    assert [word for word in vllm if word != "--enforce-eager"] == command


def test_what_starts_programs_of_its_own_may_do_so():
    """The engine mounts /tmp without that right."""
    for name in ("grade", "trainer", "vllm"):
        assert "/tmp:exec" in SERVICES[name]["tmpfs"]


def test_large_tests_of_problems_reach_the_grader():
    assert "data:/data:ro" in SERVICES["grade"]["volumes"]
    assert SERVICES["gateway"]["environment"]["ASAP_BENCHMARKS"] == "/benchmarks"
    assert any(one.endswith(":/benchmarks:ro") for one in SERVICES["gateway"]["volumes"])


def test_no_secret_stands_in_the_file():
    text = (REPOSITORY / "docker-compose.yml").read_text()
    secret = r"POSTGRES_PASSWORD|REDIS_PASSWORD|ASAP_AUTH__PEPPER|GRAFANA_PASSWORD"
    named = set(re.findall(rf"\$\{{(?:{secret})[^}}]*\}}", text))
    assert named
    assert all(REQUIRED.fullmatch(one) for one in named)
    for name in NAMES:
        for key, value in SERVICES[name].get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|KEY|PEPPER|TOKEN$|__URL$", key) and value:
                assert REQUIRED.search(value), key


def test_secrets_are_made_once(tmp_path):
    def make():
        subprocess.run(["sh", REPOSITORY / "deploy/compose/make_env.sh", file], check=True)
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        return dict(line.split("=", 1) for line in lines)

    file = tmp_path / "env"
    file.write_text("VARIANT=cpu\n")
    made = make()
    text = (REPOSITORY / "docker-compose.yml").read_text()
    assert set(REQUIRED.findall(text)) == set(made) - {"VARIANT"}
    secrets = [value for name, value in made.items() if name != "VARIANT"]
    assert all(re.fullmatch(r"[0-9a-f]{64}", secret) for secret in secrets)
    assert len(set(secrets)) == len(secrets)
    assert make() == made
    (tmp_path / "env").unlink()
    make()
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_broker_keeps_what_it_has_and_who_uses_it_cannot_empty_it():
    script = SERVICES["redis"]["command"][-1]
    for line in ("appendonly yes", "maxmemory-policy noeviction", "user default off"):
        assert line in script.splitlines()
    assert "-@dangerous" in script
    assert "requirepass" not in script


def test_built_images_are_targets():
    for name in NAMES:
        build = SERVICES[name].get("build")
        if build is None:
            continue
        text = (REPOSITORY / build["dockerfile"]).read_text()
        assert re.search(rf"^FROM \S+ AS {target(name)}$", text, re.MULTILINE)


def test_mounted_files_are_there():
    mounted = [
        volume.split(":")[0]
        for one in SERVICES.values()
        for volume in one.get("volumes", [])
        if volume.startswith("./")
    ]
    assert len(mounted) == 4
    assert all((REPOSITORY / path).exists() for path in mounted)
    named = {
        re.sub(r"\$\{\w+:-(\w+)\}", r"\1", volume).split(":")[0]
        for one in SERVICES.values()
        for volume in one.get("volumes", [])
        if not volume.startswith("./")
    }
    assert named == set(COMPOSE["volumes"])


def test_old_programs_read_the_file():
    assert not {"name", "version"} & set(COMPOSE)


def test_gpus_are_for_what_computes():
    services = yaml.safe_load((REPOSITORY / "deploy/compose/gpu.yml").read_text())["services"]
    assert set(services) == {"surprisal", "trainer", "vllm"}
    for service in services.values():
        [device] = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
        assert "limits" not in service["deploy"]["resources"]


def test_prometheus_asks_every_worker():
    path = REPOSITORY / "deploy/compose/prometheus.yml"
    gateway, workers = yaml.safe_load(path.read_text())["scrape_configs"]
    assert gateway["static_configs"] == [{"targets": ["gateway:8000"]}]
    assert "keys:/keys:ro" in SERVICES["prometheus"]["volumes"]
    [found] = workers["dns_sd_configs"]
    stages = {name for name, one in SERVICES.items() if one.get("command", [""])[0] == "worker"}
    assert set(found["names"]) == stages
    ports = {SERVICES[name]["environment"]["ASAP_TELEMETRY__ADMIN_PORT"] for name in stages}
    assert ports == {str(found["port"])}


def test_grafana_finds_prometheus_and_the_dashboard():
    folder = REPOSITORY / "deploy" / "compose" / "grafana"
    [source] = yaml.safe_load((folder / "datasource.yml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    [provider] = yaml.safe_load((folder / "dashboards.yml").read_text())["providers"]
    mounted = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    assert mounted["./deploy/grafana"] == provider["options"]["path"]
    board = json.loads((REPOSITORY / "deploy/grafana/asap.json").read_text())
    [variable] = [one for one in board["templating"]["list"] if one["type"] == "datasource"]
    assert variable["query"] == source["type"]
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {f"${{{variable['name']}}}"}
