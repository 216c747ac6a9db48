#!/usr/bin/env bash
# Runs the tests on a cluster that kind makes, on its node, and removes the cluster. BIN is where everything is built.
set -euo pipefail
bin="$1"
here="$(cd "$(dirname "$0")" && pwd)"
name=probelet-e2e
node="$name-control-plane"
command -v docker >/dev/null || { echo "docker is missing"; exit 1; }
work="$(mktemp -d)"
# The user's kubeconfig stays as it is.
kind() { (cd "$here" && KUBECONFIG="$work/kubeconfig" go run sigs.k8s.io/kind "$@"); }
trap 'kind delete cluster --name "$name"; rm -rf "$work"' EXIT

(cd "$here/.." && CGO_ENABLED=0 go test -c -o "$work/cluster.test" ./cluster)
kind create cluster --name "$name" --config "$here/kind.yaml" --wait 3m
docker exec "$node" mkdir -p /probelet/e2e/cluster
docker cp "$bin" "$node:/probelet/bin"
docker cp "$here/../../cni-conf" "$node:/probelet/cni-conf"
docker cp "$work/cluster.test" "$node:/probelet/e2e/cluster/cluster.test"
docker exec --workdir /probelet/e2e/cluster -e PROBELET_KIND=1 -e PROBELET_BIN=/probelet/bin "$node" \
	./cluster.test -test.v -test.timeout 60m
