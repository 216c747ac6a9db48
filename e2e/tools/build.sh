#!/usr/bin/env bash
# Builds the programs of a set from the Go modules beside this script, showing progress:
#   build.sh DIRECTORY cluster       what a node runs: 15 minutes on two cores the first time
#   build.sh DIRECTORY conformance   Kubernetes' own end-to-end tests and what they need: 5 minutes more
#   build.sh DIRECTORY SET check     builds nothing; exits with 1 unless the set is up to date
# A stamp beside the programs records what they were built from: the Go version, the pins and the commands, not where they are.
# While that stays the same, nothing is built.
set -euo pipefail
(($# >= 2)) || { sed -n '2,5s/^# \?//p' "$0" >&2; exit 2; }
out="$(realpath -m -- "$1")"
set="$2"
unset CDPATH
cd "$(dirname "$(readlink -f "$0")")"

kubernetes="$(awk '$1 == "k8s.io/kubernetes" && $2 ~ /^v/ {print $2}' kubernetes/go.mod)"
version=k8s.io/component-base/version
flags=(-v -trimpath -ldflags "-s -w -X $version.gitMajor=${kubernetes:1:1} -X $version.gitMinor=${kubernetes:3:2} -X $version.gitVersion=$kubernetes")

# Each set is a function, because the stamp covers its text.
cluster() {
	run kubernetes build "${flags[@]}" -o "$out/" k8s.io/kubernetes/cmd/{kubelet,kube-apiserver,kube-scheduler,kube-controller-manager}
	run containerd build -v -trimpath -ldflags "-s -w" -o "$out/" tool
}

conformance() {
	run kubernetes build "${flags[@]}" -o "$out/" k8s.io/kubernetes/cmd/kubectl k8s.io/kubernetes/test/images/agnhost github.com/onsi/ginkgo/v2/ginkgo
	run kubernetes test -c "${flags[@]}" -o "$out/e2e.test" k8s.io/kubernetes/test/e2e
	# agnhost's image contains them.
	cp -f "$(go -C kubernetes list -m -f '{{.Dir}}' k8s.io/kubernetes)"/test/images/agnhost/porter/localhost.{crt,key} "$out/"
}

case $set in
cluster | conformance) ;;
*)
	echo "set \"$set\": must be cluster or conformance" >&2
	exit 2
	;;
esac

stamp="$out/stamp-$set"
sum="$({
	go env GOVERSION GOOS GOARCH
	printf '%s\n' "${flags[@]}"
	declare -f "$set"
	sed '/^module /d' {kubernetes,containerd}/go.mod
	cat {kubernetes,containerd}/go.sum
} | sha256sum | cut -d ' ' -f 1)"
if [[ -e $stamp && $(<"$stamp") == "$sum" ]]; then
	exit 0
fi
[[ ${3-} != check ]] || exit 1

mkdir -p "$out"
rm -f "$stamp"
log="$(mktemp)"
trap 'rm -f "$log"' EXIT

# progress shows every hundredth package, and every hundredth module that is downloaded.
progress() {
	awk -v start="$(date +%s)" '
		{ what = /^go: downloading/ ? "modules downloaded" : "packages" }
		++n[what] % 100 == 0 { "date +%s" | getline now; close("date +%s"); printf "%5ds %d %s\n", now - start, n[what], what; fflush() }'
}

# run MODULE ARGUMENTS runs the go command in a module.
run() {
	local module="$1"
	shift
	echo "building in $module: go $1 ${*: -1}"
	if ! CGO_ENABLED=0 go -C "$module" "$@" 2>&1 | tee "$log" | progress; then
		tail -20 "$log"
		return 1
	fi
}

"$set"
echo "$sum" >"$stamp"
