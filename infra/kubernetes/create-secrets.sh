#!/usr/bin/env bash
# create-secrets.sh NAMESPACE: make the secrets of given.yaml with fresh random values; existing ones are kept.
# Keys of the artifact bucket, for MLflow alone, come from ARTIFACTS_AWS_ACCESS_KEY_ID and ARTIFACTS_AWS_SECRET_ACCESS_KEY,
# keys of the data buckets, for jobs, from DATA_AWS_ACCESS_KEY_ID and DATA_AWS_SECRET_ACCESS_KEY; a pair that is not set
# is left out (workload identity). Values go through files, never arguments.
set -euo pipefail
namespace=${1:?usage: create-secrets.sh NAMESPACE}
umask 077
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

random() { head -c 32 /dev/urandom | base64 | tr -d '/+=\n' | head -c 40; }

# Write stdin to a value file of a secret: value SECRET KEY.
value() { mkdir -p "$work/$1" && cat > "$work/$1/$2"; }

apply() {
    if kubectl --namespace "$namespace" get secret "$1" > /dev/null 2>&1; then
        echo "kept    $1"
    else
        kubectl --namespace "$namespace" create secret generic "$1" --from-file="$work/$1"
    fi
}

kubectl get namespace "$namespace" > /dev/null 2>&1 || kubectl create namespace "$namespace"
for secret in loomvideo-postgres loomvideo-mlflow-server loomvideo-mlflow-client; do
    present=$(kubectl --namespace "$namespace" get secret "$secret" --output name 2> /dev/null || true)
    [ -z "$present" ] || some_present=1
done
if [ -n "${some_present:-}" ]; then
    # The three share passwords: fresh values for one would not match the others.
    echo "kept    the MLflow and Postgres secrets (delete all three to make new ones)"
else
    postgres_password=$(random)
    admin_password=$(random)
    printf '%s' "$postgres_password" | value loomvideo-postgres password
    printf 'postgresql+psycopg2://mlflow:%s@mlflow-postgres:5432/mlflow' "$postgres_password" \
        | value loomvideo-mlflow-server backend-store-uri
    random | value loomvideo-mlflow-server flask-secret-key
    value loomvideo-mlflow-server basic_auth.ini << INI
[mlflow]
default_permission = READ
database_uri = postgresql+psycopg2://mlflow:$postgres_password@mlflow-postgres:5432/mlflow_auth
admin_username = admin
admin_password = $admin_password
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
    printf 'admin' | value loomvideo-mlflow-server admin-username
    printf '%s' "$admin_password" | value loomvideo-mlflow-server admin-password
    printf 'loomvideo-jobs' | value loomvideo-mlflow-client MLFLOW_TRACKING_USERNAME
    random | value loomvideo-mlflow-client MLFLOW_TRACKING_PASSWORD
    apply loomvideo-postgres
    apply loomvideo-mlflow-server
    apply loomvideo-mlflow-client
fi
random | value loomvideo-ray-token auth_token
apply loomvideo-ray-token
random | value loomvideo-serve LOOMVIDEO_SERVE_TOKEN
apply loomvideo-serve

# keys SECRET PREFIX: a secret with an S3 key pair, if the environment has one.
keys() {
    local id="$2_AWS_ACCESS_KEY_ID" key="$2_AWS_SECRET_ACCESS_KEY"
    if [ -z "${!id:-}" ] && [ -z "${!key:-}" ]; then
        echo "left out $1 ($id and $key are not set)"
        return
    fi
    printf '%s' "${!id:?set both $id and $key}" | value "$1" AWS_ACCESS_KEY_ID
    printf '%s' "${!key:?set both $id and $key}" | value "$1" AWS_SECRET_ACCESS_KEY
    apply "$1"
}
keys loomvideo-object-store DATA
keys loomvideo-artifact-store ARTIFACTS
