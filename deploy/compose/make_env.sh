#!/bin/sh
# Write a file for docker compose with random secrets, once: what is there is kept.
#   sh deploy/compose/make_env.sh [FILE]      default: .env at the top of the repository
set -eu
file=${1:-$(dirname -- "$0")/../../.env}
if [ -e "$file" ] && grep -q '^POSTGRES_PASSWORD=' "$file"; then
  echo "$file is there and kept"
  exit 0
fi
random() {
  od -An -N32 -tx1 /dev/urandom | tr -d ' \n'
}
umask 077
cat >> "$file" <<END
# Secrets of docker compose. The volumes know them: keep this file.
POSTGRES_PASSWORD=$(random)
REDIS_PASSWORD=$(random)
ASAP_AUTH__PEPPER=$(random)
GRAFANA_PASSWORD=$(random)
END
echo "random secrets are in $file"
