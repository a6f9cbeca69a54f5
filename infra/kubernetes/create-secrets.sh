#!/usr/bin/env bash
# create-secrets.sh NAMESPACE: make the secrets of given.yaml with fresh random values; existing ones are kept.
# S3 credentials are read from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. Values go through files, never arguments.
set -euo pipefail
namespace=${1:?usage: create-secrets.sh NAMESPACE}
: "${AWS_ACCESS_KEY_ID:?set the S3 credentials of the artifact bucket}" "${AWS_SECRET_ACCESS_KEY:?}"

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
    mlflow_password=$(random)
    printf '%s' "$postgres_password" | value loomvideo-postgres password
    printf 'postgresql+psycopg2://mlflow:%s@mlflow-postgres:5432/mlflow' "$postgres_password" \
        | value loomvideo-mlflow-server backend-store-uri
    random | value loomvideo-mlflow-server flask-secret-key
    value loomvideo-mlflow-server basic_auth.ini << INI
[mlflow]
default_permission = EDIT
database_uri = postgresql+psycopg2://mlflow:$postgres_password@mlflow-postgres:5432/mlflow_auth
admin_username = loomvideo
admin_password = $mlflow_password
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
    printf 'loomvideo' | value loomvideo-mlflow-client MLFLOW_TRACKING_USERNAME
    printf '%s' "$mlflow_password" | value loomvideo-mlflow-client MLFLOW_TRACKING_PASSWORD
    apply loomvideo-postgres
    apply loomvideo-mlflow-server
    apply loomvideo-mlflow-client
fi
random | value loomvideo-ray-token auth_token
apply loomvideo-ray-token
printf '%s' "$AWS_ACCESS_KEY_ID" | value loomvideo-object-store AWS_ACCESS_KEY_ID
printf '%s' "$AWS_SECRET_ACCESS_KEY" | value loomvideo-object-store AWS_SECRET_ACCESS_KEY
apply loomvideo-object-store
