//go:build linux

package ctl

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
	"github.com/probelet/probelet/daemon/internal/survey/surveytest"
)

func freshWeb(t *testing.T) *machine {
	m := newMachine(t)
	m.Web(surveytest.Maps{
		datapath.PortKey(80): {Evidence: surveytest.Success(1, 5, 0)}, surveytest.KeyOf(80, "/x"): {Evidence: surveytest.Success(1, 5, 200)},
	}, surveytest.Endpoint(probe.HTTP, 80, "/x"))
	m.Kernel.NeighboursOf = map[int][]attach.Neighbour{7: {
		{Hook: "tcx ingress", What: "program 12 (guard)", Before: true}, {Hook: "tc filter egress", What: "bpf filter, priority 1, cil_to"},
	}}
	return m
}

// Every command that shows the pod says that it is not answered, why, since when, and what else is on its device.
func TestLostTrustIsShown(t *testing.T) {
	for _, loss := range datapath.Losses() {
		m := freshWeb(t)
		m.Lose(loss)
		why := status.LossText(loss)
		if why == loss {
			t.Errorf("%s has no words", loss)
		}
		table := m.status()
		explained, err := m.run("explain", "shop/web")
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{
			"HTTP :80/x fresh 1s 11s 0 answers through its device do not arrive: " + why,
			"shop/web is not answered: answers through veth7 stopped arriving 12s ago: " + why,
			"program 12 (guard) at tcx ingress, before ours", "bpf filter, priority 1, cil_to at tc filter egress, after ours",
		} {
			if !strings.Contains(squeeze(table), want) {
				t.Errorf("the table does not say %q:\n%s", want, table)
			}
		}
		for _, want := range []string{
			"hook xdp; answers through veth7 stopped arriving 12s ago: " + why,
			"also on the device: program 12 (guard) at tcx ingress, before ours",
			"next probe reaches the pod: answers through its device do not arrive: " + why,
		} {
			if !strings.Contains(squeeze(explained), want) {
				t.Errorf("explain does not say %q:\n%s", want, explained)
			}
		}
		if wide := squeeze(m.status("-o", "wide")); !strings.Contains(wide, "ADD xdp lost -") {
			t.Errorf("%s", wide)
		}
	}
}

func TestTrustInJSON(t *testing.T) {
	m := freshWeb(t)
	a := func() survey.Attachment {
		t.Helper()
		var s survey.Status
		if err := json.Unmarshal([]byte(m.status("-o", "json")), &s); err != nil {
			t.Fatal(err)
		}
		return s.Attachments[0]
	}
	got := a()
	if got.Hook != "tc" || got.Trust != "proven" || got.Loss != "" || got.LostAge != nil || got.WhyNotAnswered != "" {
		t.Errorf("%+v", got)
	}
	want := []survey.Neighbour{
		{Hook: "tcx ingress", What: "program 12 (guard)", Before: true},
		{Hook: "tc filter egress", What: "bpf filter, priority 1, cil_to"},
	}
	if !slices.Equal(got.Neighbours, want) {
		t.Errorf("%+v", got.Neighbours)
	}
	m.Lose("unobserved")
	if got = a(); got.Hook != "xdp" || got.Trust != "lost" || got.Loss != "unobserved" || got.LostAge == nil || *got.LostAge != 12 {
		t.Errorf("%+v", got)
	}
	delete(m.Kernel.Devices, "c0ffee") // detached meanwhile
	if got = a(); got.Trust != "" || got.Hook != "" || got.Neighbours == nil || len(got.Neighbours) > 0 {
		t.Errorf("%+v", got)
	}
}

// A pod that disappears meanwhile is not an error; other failures cause a warning.
func TestNeighboursThatCannotBeFound(t *testing.T) {
	for err, warning := range map[error]string{
		netlink.LinkNotFoundError{}:         "",
		errors.New("operation not allowed"): "operation not allowed",
	} {
		m := freshWeb(t)
		m.Kernel.NeighboursOf, m.Kernel.NeighboursErr = nil, err
		if table := m.status(); !strings.Contains(table, "HTTP :80/x") {
			t.Errorf("%v:\n%s", err, table)
		}
		if got := m.stderr.String(); !strings.Contains(got, warning) || warning == "" && got != "" {
			t.Errorf("%v: %q", err, got)
		}
	}
}

// top does not show neighbours, so it does not look for them every second.
func TestTopDoesNotLookForNeighbours(t *testing.T) {
	m := freshWeb(t)
	m.Kernel.NeighboursErr = errors.New("looked")
	if _, err := m.run("top", "--iterations", "1", "-d", "100ms"); err != nil || m.stderr.Len() > 0 {
		t.Errorf("%v, %s", err, m.stderr.String())
	}
}

// trust resets the trust in a device only if answers were lost, and otherwise says that there is nothing to do. It needs no daemon.
func TestTrust(t *testing.T) {
	for name, test := range map[string]struct {
		change  func(*machine)
		pod     string
		said    string // on stdout
		failed  string // error
		trusted bool
	}{
		"lost":         {func(m *machine) { m.Lose("syn_repeated") }, "shop/web", "shop/web: answers through veth7 will be tried again\n", "", true},
		"lost, daemon": {func(m *machine) { m.Lose("syn_repeated"); m.Daemon() }, "shop/web", "will be tried again", "", true},
		"proven":       {func(*machine) {}, "shop/web", "shop/web: nothing to do: answers through veth7 arrive\n", "", false},
		"not tried": {func(m *machine) { m.Kernel.Devices["c0ffee"] = datapath.Device{Key: surveytest.WebDevice} }, "shop/web",
			"nothing to do: no answer through veth7 has been tried yet", "", false},
		"not a pod":     {func(*machine) {}, "web", "", `"web": must be NAMESPACE/POD`, false},
		"unknown":       {func(m *machine) { m.Lose("syn_repeated") }, "shop/other", "", "pod shop/other is not known on this node", false},
		"unattached":    {func(m *machine) { m.Describe(statedir.Endpoints{Unattached: []string{"shop/api"}}) }, "shop/api", "", "pod shop/api is not attached", false},
		"nothing there": {func(m *machine) { m.Kernel = nil }, "shop/web", "", "not loaded", false},
		"failed ADD": {func(m *machine) {
			m.Record(attach.Record{ContainerID: "dead", IfName: "eth0", PodNamespace: "shop", PodName: "bad", Error: "no veth"})
		}, "shop/bad", "", "pod shop/bad: not attached: no veth", false},
	} {
		t.Run(name, func(t *testing.T) {
			m := freshWeb(t)
			kernel := m.Kernel
			test.change(m)
			said, err := m.run("trust", test.pod)
			if !strings.Contains(said, test.said) || test.said == "" && said != "" {
				t.Errorf("said %q", said)
			}
			if (err != nil) != (test.failed != "") || err != nil && !strings.Contains(err.Error(), test.failed) {
				t.Errorf("error %v, want %q", err, test.failed)
			}
			if trusted := slices.Equal(kernel.Trusted, []datapath.DeviceKey{surveytest.WebDevice}); trusted != test.trusted || !trusted && len(kernel.Trusted) > 0 {
				t.Errorf("trusted %+v", kernel.Trusted)
			}
		})
	}
}
