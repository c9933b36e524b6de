#!/bin/sh
# Build the images, then tests/faults/composed.py shows that the system made of them
# works and that killed containers lose nothing.
#   sh scripts/images_smoke.sh [--train] [--evaluate]
#                                        with a training run, with vLLM serving and HumanEval
#   sh scripts/images_smoke.sh --build   all images, and nothing more
# VARIANT=gpu in the environment builds those for GPUs; the default is cpu.
# Needs docker, docker compose and Python 3.11. Where no image registry is reachable, the base image is
# made here, which needs root and debootstrap.
set -eu
cd -- "$(dirname -- "$0")/.."
base=python:3.11-slim
version=0.1.0
variant=${VARIANT:-cpu}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

make_base() {
  if docker image inspect "$base" >/dev/null 2>&1 || docker pull --quiet "$base" 2>/dev/null; then
    return
  fi
  echo "no registry: $base is made with debootstrap"
  debootstrap --variant=minbase \
    --include=python3,python3-venv,python3-pip,ca-certificates bookworm "$work/root" >/dev/null
  tar -C "$work/root" -c . | docker import --change 'CMD ["python3"]' - asap-base:bookworm >/dev/null
  mkdir "$work/base"
  cp /etc/ssl/certs/ca-certificates.crt "$work/base/"
  cat >"$work/base/Dockerfile" <<'END'
FROM asap-base:bookworm
COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
RUN rm -f /usr/lib/python3*/EXTERNALLY-MANAGED \
 && for name in python python3; do ln -s /usr/bin/python3 /usr/local/bin/$name; done \
 && for name in pip pip3; do ln -s /usr/bin/pip3 /usr/local/bin/$name; done
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt \
    LANG=C.UTF-8
END
  docker build --quiet --tag "$base" "$work/base" >/dev/null
}

# This machine's pip may know a CPU build of torch that pip in a container does not find.
fetch_torch() {
  if ls deploy/docker/wheels/torch-*.whl >/dev/null 2>&1; then return; fi
  python3 -m pip download --quiet --no-deps --dest "$work/wheels" "$(grep '^torch==' constraints.txt)"
  # Any other build is what the index gives in a container, too.
  cp "$work"/wheels/torch-*+cpu*.whl deploy/docker/wheels/ 2>/dev/null || true
}

build() { # FILE TARGET IMAGE
  began=$(date +%s)
  if ! docker build --file "deploy/docker/$1" --target "$2" --tag "$3:$version" \
    --build-arg "VARIANT=$variant" . >"$work/build.log" 2>&1; then
    tail -n 30 "$work/build.log" >&2
    exit 1
  fi
  bytes=$(docker image inspect --format '{{.Size}}' "$3:$version")
  echo "$3: $((bytes / 1000000)) MB, built in $(($(date +%s) - began)) s"
}

make_base
if [ "$variant" = cpu ]; then fetch_torch; fi
build stores.Dockerfile redis asap-redis
build stores.Dockerfile postgres asap-postgres
build stores.Dockerfile prometheus asap-prometheus
build Dockerfile light asap
build Dockerfile grade asap-grade
build Dockerfile surprisal asap-surprisal
case " $* " in *" --train "* | *" --build "*) build Dockerfile train asap-train ;; esac
case " $* " in *" --evaluate "* | *" --build "*) build Dockerfile vllm asap-vllm ;; esac
if [ "${1:-}" != --build ]; then python3 tests/faults/composed.py "$@"; fi
