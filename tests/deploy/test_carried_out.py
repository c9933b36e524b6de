"""What the chart writes for others to carry out, carried out here: a query, options, a program."""

from __future__ import annotations

import subprocess
import sys

import pytest
import redis
import tenacity
from sqlalchemy import text

from asap_runtime.database import Database, open_engine
from asap_runtime.migrate import upgrade
from engines import postgres, redis_server
from helm_chart import changed, named, profile, render
from job_store import Platform
from live_server import live_server
from waiting import PATIENCE_S, free_port


@pytest.fixture
def platform():
    if reason := postgres.missing():
        pytest.skip(reason)
    with postgres.serve() as server:
        url = server.create_database()
        upgrade(url)
        database = Database(open_engine(url))
        yield Platform(database)
        database.close()


@pytest.mark.contract
def test_keda_counts_due_and_running_items_as_the_sweeper_does(platform):
    objects = render(changed("demo", "keda by postgresql"))
    [trigger] = named(objects, "ScaledObject", "surprisal")["spec"]["triggers"]
    platform.job(5, stage="surprisal")
    platform.job(7, stage="anchor")
    assert len(platform.claim(2, stage="surprisal")) == 2
    with platform.database.write() as connection:
        last = "SELECT max(id) FROM items WHERE stage = 'surprisal'"
        later = f"UPDATE items SET not_before = 9000000000000000 WHERE id = ({last})"
        connection.execute(text(later))
    with platform.database.read() as connection:
        counted = connection.execute(text(trigger["metadata"]["query"])).scalar_one()
    seen = platform.sweep.backlog("surprisal")
    assert (seen.due, seen.running) == (2, 2)
    assert counted == 4


@pytest.mark.contract
def test_redis_understands_its_options(tmp_path):
    if reason := redis_server.missing():
        pytest.skip(reason)
    container = named(render(profile("demo")), "StatefulSet", "redis")["spec"]["template"]["spec"][
        "containers"
    ][0]
    options = [one.replace("$(REDIS_PASSWORD)", "word") for one in container["args"]]
    options[options.index("--dir") + 1] = str(tmp_path)
    port = free_port()
    command = [str(redis_server.executable()), *options, "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with redis.Redis(port=port, password="word", decode_responses=True) as client:
            wait = tenacity.Retrying(
                stop=tenacity.stop_after_delay(PATIENCE_S), wait=tenacity.wait_fixed(0.05)
            )
            wait(client.ping)
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert client.config_get("maxmemory") == {"maxmemory": str(256 * 2**20)}
            assert client.config_get("append*")["appendonly"] == "yes"
        with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
    finally:
        server.terminate()
        server.wait(PATIENCE_S)


def test_the_test_pod_prunes_a_triple(tmp_path):
    pod = named(render(changed("demo", "bucket")), "Pod", "test")
    [program] = pod["spec"]["containers"][0]["args"]
    with live_server(tmp_path, keyed=True) as server:
        _, token = server.keys.create("local", "first", "admin")
        ran = {
            key: subprocess.run(
                [sys.executable, "-c", program],
                env={"SERVER": server.url, "ASAP_API_KEY": key},
                capture_output=True,
                text=True,
                check=False,
            )
            for key in (token, token[:-1] + "x")
        }
    assert (ran[token].returncode, ran[token].stdout) == (0, "ok\n"), ran[token].stderr
    [refused] = [one for key, one in ran.items() if key != token]
    assert refused.returncode != 0
    assert "unauthorized" in refused.stderr
    assert token[-60:] not in refused.stderr
