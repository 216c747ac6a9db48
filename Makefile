# Everything below works on a fresh Debian machine with Go, make and git; `check` needs clang besides and says so.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BIN := $(CURDIR)/bin
CLANG_PACKAGES := clang-19 llvm-19 clang-format-19 libbpf-dev linux-libc-dev

# The CNI plugin is run by the runtime, once for each pod, on any distribution: small and static.
# VERSION=v1.2.3 for builds that know nothing of version control; otherwise Go notes the revision.
GO_BUILD := CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X github.com/probelet/probelet/internal/version.linked=$(VERSION)'
# The kubelet's prober tells Kubernetes' version in its User-Agent, which the kubelet's own build sets.
KUBE_VERSION := -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=37

# $(call need,COMMANDS,PACKAGES): stops unless all the commands are there.
need = @for command in $(1); do command -v "$$command" >/dev/null || { echo "$$command is missing: apt-get install $(2)"; exit 1; }; done

.PHONY: help
help: ## Show this
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build everything into bin/
	$(GO_BUILD) -o $(BIN)/probelet ./plugin
	$(GO_BUILD) -o $(BIN)/ ./daemon/cmd/...
	cd e2e && CGO_ENABLED=0 go build -trimpath -o $(BIN)/ tool
	cd e2e && CGO_ENABLED=0 go build -trimpath -ldflags '$(KUBE_VERSION)' -o $(BIN)/demo ./demo
	cd e2e && $(GO_BUILD) -o $(BIN)/app ./harness/app
	cd bench && CGO_ENABLED=0 go build -trimpath -o $(BIN)/ tool

.PHONY: demo
demo: build ## Compare probes that the pod answers with probes that the kernel answers (root)
	@$(BIN)/demo

.PHONY: test
test: build ## Run all tests; the privileged ones need root
	@[ "$$(id -u)" = 0 ] || echo "NOT ROOT: tests with network namespaces and BPF programs are skipped$${CI:+, which fails under CI}"
	go test -count=1 -timeout 20m ./...
	cd e2e && PROBELET_BIN=$(BIN) CGO_ENABLED=0 go test -count=1 -timeout 20m -ldflags '$(KUBE_VERSION)' ./...
	cd e2e/kind && go test -count=1 ./...
	cd daemon/differential && CGO_ENABLED=0 go test -count=1 ./...
	cd bench && PROBELET_BIN=$(BIN) CGO_ENABLED=0 go test -count=1 -timeout 10m -ldflags '$(KUBE_VERSION)' -measure -short

.PHONY: churn
churn: ## Have 100,000 pods come and go, and see that the daemon stays as large as it is
	go test -count=1 -timeout 30m -v -run 'TestChurn$$' ./daemon/cmd/probeletd -churn 100000

FUZZTIME ?= 10m
.PHONY: fuzz
fuzz: ## Look for replies that are taken for a success, but not by the kubelet's prober (root; FUZZTIME=10m)
	cd daemon/differential && CGO_ENABLED=0 go test -run - -fuzz FuzzReply -fuzztime $(FUZZTIME)

.PHONY: e2e
e2e: build ## Test on a real kubelet, API server and containerd (root; etcd-server runc python3; the first build takes 15 minutes; HOOK=xdp)
	$(call need,etcd runc /usr/bin/python3,etcd-server runc python3)
	e2e/tools/build.sh $(BIN)/cluster cluster
	cd e2e && PROBELET_BIN=$(BIN) PROBELET_CLUSTER=$(BIN)/cluster CGO_ENABLED=0 go test -count=1 -timeout 40m -v ./cluster $(if $(HOOK),-hook $(HOOK))

# Variants, with commas between: none is without probelet. Each takes ten minutes.
CONFORMANCE ?= none,default,stale5,refresh,xdp
.PHONY: conformance
conformance: build ## Run Kubernetes' own probe specs without probelet and with it (root; etcd-server runc busybox-static; CONFORMANCE=none,default)
	$(call need,etcd runc busybox,etcd-server runc busybox-static)
	e2e/tools/build.sh $(BIN)/cluster cluster
	e2e/tools/build.sh $(BIN)/cluster conformance
	cd e2e && CGO_ENABLED=0 go build -trimpath -o $(BIN)/conformance ./conformance
	cd e2e/conformance && $(BIN)/conformance -variants $(CONFORMANCE) -tools $(BIN)/cluster -out $(BIN)/conformance-results

.PHONY: e2e-kind
e2e-kind: build ## The same tests on a cluster of kind's (docker)
	e2e/kind/run.sh $(BIN)

.PHONY: bench
bench: build ## Measure probelet against its marks, in ten minutes; writes docs/benchmarks.* (root; BENCH=PART prints a part)
	cd bench && PROBELET_BIN=$(BIN) CGO_ENABLED=0 go test -count=1 -timeout 30m -ldflags '$(KUBE_VERSION)' \
		-run 'TestMarks/$(BENCH)' -measure $(if $(BENCH),,-write $(CURDIR))

.PHONY: image
image: build ## Write the container image into bin/probelet-image.tar, without Docker (IMAGE=NAME:TAG)
	cd e2e && go run ./harness/image/write -o $(BIN)/probelet-image.tar -bin $(BIN) $(if $(IMAGE),-t $(IMAGE))

.PHONY: simulate
simulate: ## Hold the freshness policy against plain Kubernetes, over simulated days; writes docs/simulation.*
	go run ./daemon/simulate -docs docs

# An emulator takes ten seconds to verify the programs, and each test loads them: these pass every program and hook.
OLDKERNEL_TESTS ?= Hooks|EnsureLoads|ProbeIsAnswered|Handover|WhatListens
.PHONY: oldkernel
oldkernel: ## Run BPF tests on Debian's Linux 6.1 and 6.12, in an emulator (qemu-system-x86 busybox-static cpio kmod)
	bpf/bpftest/oldkernel.sh linux-image-cloud-amd64 '$(OLDKERNEL_TESTS)'
	bpf/bpftest/oldkernel.sh linux-image-6.12-cloud-amd64 '$(OLDKERNEL_TESTS)'

.PHONY: check
check: format tidy vet drift lint ## Check formatting, modules, generated files and lint

.PHONY: format
format: clang
	@unformatted="$$(gofmt -l .)"; [ -z "$$unformatted" ] || { echo "not formatted (gofmt -w):"; echo "$$unformatted"; exit 1; }
	clang-format-19 --dry-run -Werror bpf/*.c bpf/*.h

.PHONY: tidy
tidy:
	go mod tidy -diff
	cd e2e && go mod tidy -diff
	cd e2e/kind && go mod tidy -diff
	cd daemon/differential && go mod tidy -diff
	cd bench && go mod tidy -diff

.PHONY: vet
vet:
	go vet ./...
	cd e2e && go vet ./...
	cd daemon/differential && go vet ./...
	cd bench && go vet ./...

.PHONY: lint
lint:
	cd e2e/tools/golangci-lint && go build -o $(BIN)/ tool
	$(BIN)/golangci-lint run
	cd e2e && $(BIN)/golangci-lint run --config ../.golangci.yml
	cd daemon/differential && $(BIN)/golangci-lint run --config ../../.golangci.yml
	cd bench && $(BIN)/golangci-lint run --config ../.golangci.yml

# Generates in a copy, so that the work tree stays as it is.
.PHONY: drift
drift: clang
	@copy="$$(mktemp -d)"; trap 'rm -rf "$$copy"' EXIT; \
	cp -R go.mod go.sum bpf "$$copy"; \
	(cd "$$copy" && go generate ./bpf/datapath); \
	diff -r bpf/datapath "$$copy/bpf/datapath" || { echo "generated files are not what the source gives: make generate"; exit 1; }

.PHONY: generate
generate: clang ## Compile the BPF programs anew (after a change in bpf/)
	go generate ./bpf/datapath

.PHONY: clang
clang:
	$(call need,clang-19 clang-format-19 llvm-strip-19,$(CLANG_PACKAGES))
	@[ -e /usr/include/bpf/bpf_helpers.h ] || { echo "bpf_helpers.h is missing: apt-get install $(CLANG_PACKAGES)"; exit 1; }

.PHONY: clean
clean: ## Remove what was built
	rm -rf $(BIN)
