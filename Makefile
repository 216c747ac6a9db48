# Everything below works on a fresh Debian machine with Go, make and git; targets that need more name the missing packages.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BIN := $(CURDIR)/bin
CLANG_PACKAGES := clang-19 llvm-19 clang-format-19

# The version that the binaries report. Set it (VERSION=v1.2.3) where there is no repository, such as in an image build.
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null)
# The runtime executes the CNI plugin once per pod, on any distribution: keep it small and static.
GO_BUILD := CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X github.com/probelet/probelet/internal/version.linked=$(VERSION)'
# The kubelet's prober reports the Kubernetes version in its User-Agent; the kubelet's own build sets it like this.
KUBE_VERSION := -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=37

# $(call need,COMMANDS,PACKAGES) stops unless all the commands are installed.
need = @for command in $(1); do command -v "$$command" >/dev/null || { echo "$$command is missing: apt-get install $(2)"; exit 1; }; done

# $(call tool,NAME) builds a pinned tool into bin/.
tool = cd e2e/tools/$(1) && go build -o $(BIN)/ tool

# $(call gotest,MODULE,ARGUMENTS) tests a Go module, printing a line per package.
RESULTS := $(BIN)/test-results
gotest = cd $(1) && $(BIN)/gotestsum --format pkgname --hide-summary skipped --jsonfile $(RESULTS)/$(or $(subst .,,$(subst /,-,$(1))),probelet).json -- -count=1 $(2)

# $(call gotest-begin) and $(call gotest-end) enclose calls of gotest; the latter lists the skipped tests of all modules, with reasons.
define gotest-begin
$(call tool,gotestsum)
@rm -rf $(RESULTS) && mkdir -p $(RESULTS)
@[ "$$(id -u)" = 0 ] || echo "NOT ROOT: tests that need network namespaces or BPF are skipped$${CI:+, which fails under CI}"
endef
define gotest-end
@echo "All modules together:"; $(BIN)/gotestsum --format none --raw-command -- cat $(RESULTS)/*.json
endef

.PHONY: help
help: ## Show this list
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
demo: build ## Compare probes answered by the pod with probes answered in the kernel (root)
	@$(BIN)/demo

.PHONY: test
test: build ## Run all tests, then list the skipped ones (the privileged ones need root)
	$(gotest-begin)
	$(call gotest,.,-timeout 20m ./...)
	export PROBELET_BIN=$(BIN) CGO_ENABLED=0; $(call gotest,e2e,-timeout 20m -ldflags '$(KUBE_VERSION)' ./...)
	$(call gotest,e2e/kind,./...)
	export CGO_ENABLED=0; $(call gotest,daemon/differential,./...)
	export PROBELET_BIN=$(BIN) CGO_ENABLED=0; $(call gotest,bench,-timeout 10m -ldflags '$(KUBE_VERSION)' . -measure -short)
	$(gotest-end)

# Of e2e only what runs in the tests' own processes: the others start the binaries in bin/, which have no race detector.
.PHONY: race
race: ## Run the tests under Go's race detector (root; gcc)
	$(call need,gcc,gcc libc6-dev)
	$(gotest-begin)
	$(call gotest,.,-race -timeout 40m ./...)
	$(call gotest,e2e,-race ./conformance ./demo ./harness/... ./manifests ./tools)
	$(call gotest,daemon/differential,-race -timeout 20m ./...)
	$(call gotest,bench,-race ./...)
	$(gotest-end)

.PHONY: churn
churn: ## Create and delete 100,000 pods, and check that the daemon does not grow (root)
	go test -count=1 -timeout 30m -v -run 'TestChurn$$' ./daemon/internal/agent -churn 100000

FUZZTIME ?= 10m
.PHONY: fuzz
fuzz: ## Search for replies judged a success here but not by the kubelet's prober (root; FUZZTIME=10m)
	cd daemon/differential && CGO_ENABLED=0 go test -run - -fuzz FuzzReply -fuzztime $(FUZZTIME)

.PHONY: e2e
e2e: build ## Test on a real kubelet, API server and containerd (root; etcd-server runc python3; first build 15 minutes; HOOK=xdp)
	$(call need,etcd runc /usr/bin/python3,etcd-server runc python3)
	e2e/tools/build.sh $(BIN)/cluster cluster
	cd e2e && PROBELET_BIN=$(BIN) PROBELET_CLUSTER=$(BIN)/cluster CGO_ENABLED=0 go test -count=1 -timeout 40m -v ./cluster $(if $(HOOK),-hook $(HOOK))

# Variants, separated by commas; "none" runs without probelet. Each takes ten minutes.
CONFORMANCE ?= none,default,stale5,refresh,xdp
.PHONY: conformance
conformance: build ## Run Kubernetes' own probe specs without and with probelet (root; etcd-server runc busybox-static; CONFORMANCE=none,default)
	$(call need,etcd runc busybox,etcd-server runc busybox-static)
	e2e/tools/build.sh $(BIN)/cluster cluster
	e2e/tools/build.sh $(BIN)/cluster conformance
	cd e2e && CGO_ENABLED=0 go build -trimpath -o $(BIN)/conformance ./conformance
	cd e2e/conformance && $(BIN)/conformance -variants $(CONFORMANCE) -tools $(BIN)/cluster -out $(BIN)/conformance-results

.PHONY: e2e-kind
e2e-kind: build ## Run the tests of "make e2e" on a kind cluster (docker)
	e2e/kind/run.sh $(BIN)

.PHONY: bench
bench: build ## Measure probelet against its marks, in twenty minutes; writes docs/benchmarks.*, docs/policies.svg and bench/results.json (root; nginx-light python3; BENCH=PART prints one part)
	$(call need,nginx /usr/bin/python3,nginx-light python3)
	cd bench && PROBELET_BIN=$(BIN) CGO_ENABLED=0 go test -count=1 -timeout 30m -ldflags '$(KUBE_VERSION)' \
		-run 'TestMarks/$(if $(BENCH),^$(BENCH)$$)' -measure $(if $(BENCH),,-write $(CURDIR))

.PHONY: image
image: build ## Write the container image into bin/probelet-image.tar, without Docker (IMAGE=NAME:TAG)
	cd e2e && go run ./harness/image/write -o $(BIN)/probelet-image.tar -bin $(BIN) $(if $(IMAGE),-t $(IMAGE))

.PHONY: simulate
simulate: ## Compare the freshness policy with plain Kubernetes over simulated days; writes docs/simulation.*
	go run ./daemon/simulate -docs docs

# Under emulation the kernel takes ten seconds to verify the programs, and each test loads them: this selection covers every program and hook.
OLDKERNEL_TESTS ?= Hooks|EnsureLoads|ProbeIsAnswered|Handover|WhatListens
.PHONY: oldkernel
oldkernel: ## Run BPF tests on Debian's Linux 6.1 and 6.12 under emulation (qemu-system-x86 busybox-static cpio kmod)
	bpf/bpftest/oldkernel.sh linux-image-cloud-amd64 '$(OLDKERNEL_TESTS)'
	bpf/bpftest/oldkernel.sh linux-image-6.12-cloud-amd64 '$(OLDKERNEL_TESTS)'

.PHONY: check
check: format tidy vet drift lint workflows vulncheck ## Run all the checks that follow

.PHONY: format
format: clang ## Check the formatting of Go and C
	@unformatted="$$(gofmt -l .)"; [ -z "$$unformatted" ] || { echo "not formatted (gofmt -w):"; echo "$$unformatted"; exit 1; }
	clang-format-19 --dry-run -Werror bpf/*.c bpf/*.h

.PHONY: tidy
tidy: ## Check that go.mod and go.sum are tidy, in each module
	go mod tidy -diff
	cd e2e && go mod tidy -diff
	cd e2e/kind && go mod tidy -diff
	cd daemon/differential && go mod tidy -diff
	cd bench && go mod tidy -diff

.PHONY: vet
vet: ## Run go vet
	go vet ./...
	cd e2e && go vet ./...
	cd daemon/differential && go vet ./...
	cd bench && go vet ./...

.PHONY: lint
lint: ## Run golangci-lint
	$(call tool,golangci-lint)
	$(BIN)/golangci-lint run
	cd e2e && $(BIN)/golangci-lint run --config ../.golangci.yml
	cd daemon/differential && $(BIN)/golangci-lint run --config ../../.golangci.yml
	cd bench && $(BIN)/golangci-lint run --config ../.golangci.yml

.PHONY: workflows
workflows: ## Check the GitHub workflows with actionlint
	$(call tool,actionlint)
	$(BIN)/actionlint

# Generates in a copy, so that the working tree stays untouched.
.PHONY: drift
drift: clang ## Check that generated files match their sources
	@copy="$$(mktemp -d)"; trap 'rm -rf "$$copy"' EXIT; \
	cp -R go.mod go.sum bpf "$$copy"; \
	(cd "$$copy" && go generate ./bpf/datapath); \
	diff -r bpf/datapath "$$copy/bpf/datapath" || { echo "generated files differ from their sources: make generate"; exit 1; }

# Only what is shipped: the other modules are tests.
.PHONY: vulncheck
vulncheck: ## Look for known vulnerabilities in shipped code (needs https://vuln.go.dev; without it, says so and succeeds)
	$(call tool,govulncheck)
	@output="$$($(BIN)/govulncheck ./... 2>&1)" && status=0 || status=$$?; echo "$$output"; \
	if [[ $$output = *"fetching vulnerabilities"* ]]; then echo "NOT RUN: govulncheck: the vulnerability database is unreachable"; exit 0; fi; \
	exit "$$status"

.PHONY: generate
generate: clang ## Recompile the BPF programs (after a change in bpf/)
	go generate ./bpf/datapath

.PHONY: clang
clang:
	$(call need,clang-19 clang-format-19 llvm-strip-19,$(CLANG_PACKAGES))

.PHONY: clean
clean: ## Remove bin/
	rm -rf $(BIN)
