#!/usr/bin/env bash
# Creates a kind cluster, runs the cluster tests on its node and deletes the cluster:
#   run.sh BIN   BIN contains the built programs; after a failure, BIN/kind-logs contains the cluster's logs
set -euo pipefail
bin="$1"
here="$(cd "$(dirname "$0")" && pwd)"
name=probelet-e2e
node="$name-control-plane"
command -v docker >/dev/null || { echo "docker is missing"; exit 1; }
work="$(mktemp -d)"
# Leave the user's kubeconfig alone.
kind() { (cd "$here" && KUBECONFIG="$work/kubeconfig" go run sigs.k8s.io/kind "$@"); }
trap 'rm -rf "$work"' EXIT
if kind get clusters | grep -qx "$name"; then
	echo "a cluster named $name exists already; delete it if it is not needed: kind delete cluster --name $name"
	exit 1
fi

end() {
	local status=$?
	if ((status)); then
		rm -rf "$bin/kind-logs"
		kind export logs --name "$name" "$bin/kind-logs" || true
	fi
	kind delete cluster --name "$name"
	rm -rf "$work"
}
trap end EXIT

# tests MODE PATTERN runs the matching tests. The suite times out before the workflow's limit of an hour, and then reports what hung.
tests() {
	docker exec --workdir /probelet/e2e/cluster -e PROBELET_KIND="$1" -e PROBELET_BIN=/probelet/bin "$node" \
		./cluster.test -test.v -test.timeout 40m -test.run "$2"
}

(cd "$here/.." && CGO_ENABLED=0 go test -c -o "$work/cluster.test" ./cluster)
kind create cluster --name "$name" --config "$here/kind.yaml" --wait 3m
docker exec "$node" mkdir -p /probelet/e2e/cluster
docker cp "$bin" "$node:/probelet/bin"
docker cp "$here/../../cni-conf" "$node:/probelet/cni-conf"
docker cp "$work/cluster.test" "$node:/probelet/e2e/cluster/cluster.test"
tests all .
tests reboot TestReboot
docker restart "$node"
tests rebooted TestReboot
