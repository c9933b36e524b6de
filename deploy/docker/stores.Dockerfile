# Redis, PostgreSQL and Prometheus from Debian, for machines that reach no image registry. Elsewhere
# REDIS_IMAGE, POSTGRES_IMAGE and PROMETHEUS_IMAGE name the official images, which take the same
# commands, users and folders.
ARG BASE=python:3.11-slim

FROM ${BASE} AS redis
RUN groupadd --gid 999 redis \
 && useradd --uid 999 --gid 999 --no-create-home --home-dir /data --shell /usr/sbin/nologin redis \
 && apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends redis-server \
 && rm -rf /var/lib/apt/lists/* \
 && mkdir /data \
 && chown redis:redis /data
WORKDIR /data
HEALTHCHECK --interval=10s --timeout=5s CMD ["redis-cli", "ping"]
LABEL org.opencontainers.image.title="asap-redis" \
      org.opencontainers.image.licenses="BSD-3-Clause"
USER 999:999
CMD ["redis-server"]

FROM ${BASE} AS postgres
ENV PATH=/usr/lib/postgresql/15/bin:$PATH \
    PGDATA=/var/lib/postgresql/data
RUN groupadd --gid 999 postgres \
 && useradd --uid 999 --gid 999 --no-create-home --home-dir /var/lib/postgresql \
      --shell /usr/sbin/nologin postgres \
 && mkdir /etc/postgresql-common \
 && echo "create_main_cluster = false" > /etc/postgresql-common/createcluster.conf \
 && apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends postgresql-15 \
 && rm -rf /var/lib/apt/lists/* \
 && mkdir -p /var/lib/postgresql/data /var/run/postgresql \
 && chown -R postgres:postgres /var/lib/postgresql /var/run/postgresql
COPY deploy/docker/postgres.sh /usr/local/bin/
HEALTHCHECK --interval=10s --timeout=5s CMD ["pg_isready", "-q", "-h", "127.0.0.1"]
LABEL org.opencontainers.image.title="asap-postgres" \
      org.opencontainers.image.licenses="PostgreSQL"
USER 999:999
ENTRYPOINT ["sh", "/usr/local/bin/postgres.sh"]
CMD ["postgres"]

FROM ${BASE} AS prometheus
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends prometheus \
 && rm -rf /var/lib/apt/lists/* \
 && mkdir -p /prometheus \
 && chown 65534:65534 /prometheus
WORKDIR /prometheus
HEALTHCHECK --interval=10s --timeout=5s \
  CMD ["promtool", "query", "instant", "http://127.0.0.1:9090", "up"]
LABEL org.opencontainers.image.title="asap-prometheus" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 65534:65534
ENTRYPOINT ["prometheus"]
