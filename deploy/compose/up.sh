#!/bin/sh
# Create the secrets that are missing, and start the system. Arguments go to `docker compose up`.
set -eu
cd "$(dirname "$0")"

random() {
  head -c 32 /dev/urandom | base64 | tr -d '\n'
}

# Containers read the files as users of their own, so the folder is what keeps them from others.
mkdir -p secrets
chmod 700 secrets
umask 022

create() {
  if [ ! -s "secrets/$1" ]; then
    printf '%s' "$2" > "secrets/$1.new"
    mv "secrets/$1.new" "secrets/$1"
    echo "created secrets/$1"
  fi
}

create postgres-password "$(random | tr '+/' '-_' | tr -d '=')"
create database-url "postgresql://pointbook:$(cat secrets/postgres-password)@postgres/pointbook"
create code-keys "k1:$(random)"
create quarantine-keys "q1:$(random)"
create grafana-password "$(random)"
# Replace it with the secret of your SHOPLINE app, and restart the shim.
create shopline-secrets "$(random)"

exec docker compose up --build --detach --wait "$@"
