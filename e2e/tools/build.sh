#!/usr/bin/env bash
# Builds programs from their Go modules into a directory, and shows progress:
#   build.sh DIRECTORY cluster       those that a node runs: 15 minutes on two cores the first time
#   build.sh DIRECTORY conformance   besides, Kubernetes' own end-to-end tests and what they need: 5 more
# A stamp beside the programs says what they were built from: while that is the same, nothing is done. With "check" as the
# last argument it only says whether it is.
set -euo pipefail
self="$(readlink -f "$0")"
here="$(cd "$(dirname "$self")/.." && pwd)"
mkdir -p "$1"
out="$(cd "$1" && pwd)"
set="$2"
kubernetes=v1.37.2
modules=(kubernetes containerd)
stamp="$out/stamp-$set"

source_sum() {
	cd "$here"
	{ cat "$self" && go version && cat "${modules[@]/%//go.mod}" "${modules[@]/%//go.sum}"; } | sha256sum
}

sum="$(source_sum)"
if [[ -e $stamp && $(<"$stamp") == "$sum" ]]; then
	exit 0
fi
[[ ${3-} != check ]] || exit 1

rm -f "$stamp"
log="$(mktemp)"
trap 'rm -f "$log"' EXIT

# Shows every hundredth package, and every hundredth module that is downloaded.
progress() {
	awk -v start="$(date +%s)" '
		{ what = /^go: downloading/ ? "modules downloaded" : "packages" }
		++n[what] % 100 == 0 { "date +%s" | getline now; close("date +%s"); printf "%5ds %d %s\n", now - start, n[what], what; fflush() }'
}

# run runs a command of go's, in a module.
run() {
	local module="$1"
	shift
	cd "$here/$module"
	echo "building in $module: go $1 ${*: -1}"
	if ! CGO_ENABLED=0 go "$@" 2>&1 | tee "$log" | progress; then
		tail -20 "$log"
		return 1
	fi
}

version=k8s.io/component-base/version
flags=(-v -trimpath -ldflags "-s -w -X $version.gitMajor=${kubernetes:1:1} -X $version.gitMinor=${kubernetes:3:2} -X $version.gitVersion=$kubernetes")
case $set in
cluster)
	run kubernetes build "${flags[@]}" -o "$out/" k8s.io/kubernetes/cmd/{kubelet,kube-apiserver,kube-scheduler,kube-controller-manager}
	run containerd build -v -trimpath -ldflags "-s -w" -o "$out/" tool
	;;
conformance)
	run kubernetes build "${flags[@]}" -o "$out/" k8s.io/kubernetes/cmd/kubectl k8s.io/kubernetes/test/images/agnhost github.com/onsi/ginkgo/v2/ginkgo
	run kubernetes test -c "${flags[@]}" -o "$out/e2e.test" k8s.io/kubernetes/test/e2e
	# agnhost's image has them
	cp "$(cd "$here/kubernetes" && go list -m -f '{{.Dir}}' k8s.io/kubernetes)"/test/images/agnhost/porter/localhost.{crt,key} "$out/"
	;;
*)
	echo "no such set: $set"
	exit 1
	;;
esac
echo "$sum" >"$stamp"
