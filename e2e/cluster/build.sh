#!/usr/bin/env bash
# Builds kubelet, kube-apiserver and containerd from their Go modules into a directory, and shows how far it is. The first time
# takes a quarter of an hour on two cores. A stamp beside them says what they were built from: as long as that is the same,
# nothing is done. "build.sh DIRECTORY check" only says whether it is.
set -euo pipefail
self="$(readlink -f "$0")"
here="$(cd "$(dirname "$self")/.." && pwd)"
mkdir -p "$1"
out="$(cd "$1" && pwd)"
kubernetes=v1.37.2
modules=(kubernetes containerd)
stamp="$out/stamp"

source_sum() {
	cd "$here"
	{ cat "$self" && go version && cat "${modules[@]/%//go.mod}" "${modules[@]/%//go.sum}"; } | sha256sum
}

sum="$(source_sum)"
if [[ -e $stamp && $(<"$stamp") == "$sum" ]]; then
	exit 0
fi
[[ ${2-} != check ]] || exit 1

rm -f "$stamp"
log="$(mktemp)"
trap 'rm -f "$log"' EXIT

# Shows every hundredth package, and every hundredth module that is downloaded.
progress() {
	awk -v start="$(date +%s)" '
		{ what = /^go: downloading/ ? "modules downloaded" : "packages" }
		++n[what] % 100 == 0 { "date +%s" | getline now; close("date +%s"); printf "%5ds %d %s\n", now - start, n[what], what; fflush() }'
}

build() {
	local dir="$1" flags="$2"
	cd "$here/$dir"
	echo "building programs of $dir"
	if ! CGO_ENABLED=0 go build -v -trimpath -ldflags "-s -w $flags" -o "$out/" tool 2>&1 | tee "$log" | progress; then
		tail -20 "$log"
		return 1
	fi
}

version=k8s.io/component-base/version
build kubernetes "-X $version.gitMajor=1 -X $version.gitMinor=37 -X $version.gitVersion=$kubernetes"
build containerd ""
echo "$sum" >"$stamp"
