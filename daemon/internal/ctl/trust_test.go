//go:build linux

package ctl

import (
	"encoding/json"
	"errors"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/doctor"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
)

// lose makes answers by web's device not arrive.
func (m *machine) lose(loss string) {
	m.kernel.devices["c0ffee"] = datapath.Device{
		Key: webDevice, Hook: datapath.HookXDP, Trust: datapath.TrustLost, Loss: loss, LostAt: now - 12*second,
	}
}

func freshWeb(t *testing.T) *machine {
	m := newMachine(t)
	m.web(fakeMaps{
		datapath.PortKey(80): {evidence: success(1, 5, 0)}, keyOf(80, "/x"): {evidence: success(1, 5, 200)},
	}, endpoint(probe.HTTP, 80, "/x"))
	m.kernel.neighbours = map[int][]attach.Neighbour{7: {
		{Hook: "tcx ingress", What: "program 12 (guard)", Before: true}, {Hook: "tc filter egress", What: "bpf filter, priority 1, cil_to"},
	}}
	return m
}

// Everything that shows the pod says that it is not answered, why, since when, and who else is on its device.
func TestLostTrustIsShown(t *testing.T) {
	for _, loss := range datapath.Losses() {
		m := freshWeb(t)
		m.lose(loss)
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
	m.lose("unobserved")
	if got = a(); got.Hook != "xdp" || got.Trust != "lost" || got.Loss != "unobserved" || got.LostAge == nil || *got.LostAge != 12 {
		t.Errorf("%+v", got)
	}
	delete(m.kernel.devices, "c0ffee") // detached just now
	if got = a(); got.Trust != "" || got.Hook != "" || got.Neighbours == nil || len(got.Neighbours) > 0 {
		t.Errorf("%+v", got)
	}
}

// A pod that goes while it is looked at is no error, and what cannot be found out is a warning.
func TestNeighboursThatCannotBeFound(t *testing.T) {
	for err, warning := range map[error]string{
		netlink.LinkNotFoundError{}:         "",
		errors.New("operation not allowed"): "operation not allowed",
	} {
		m := freshWeb(t)
		m.kernel.neighbours, m.kernel.neighboursErr = nil, err
		if table := m.status(); !strings.Contains(table, "HTTP :80/x") {
			t.Errorf("%v:\n%s", err, table)
		}
		if got := m.stderr.String(); !strings.Contains(got, warning) || warning == "" && got != "" {
			t.Errorf("%v: %q", err, got)
		}
	}
}

// Nobody else is looked for where that is not shown: top would do it each second.
func TestTopLooksForNobody(t *testing.T) {
	m := freshWeb(t)
	m.kernel.neighboursErr = errors.New("looked")
	if _, err := m.run("top", "--iterations", "1", "-d", "100ms"); err != nil || m.stderr.Len() > 0 {
		t.Errorf("%v, %s", err, m.stderr.String())
	}
}

// The programs are told to try again where that is called for, and otherwise it is said that it is not. No daemon is needed.
func TestTrust(t *testing.T) {
	for name, test := range map[string]struct {
		change  func(*machine)
		pod     string
		said    string // on stdout
		failed  string // error
		trusted bool
	}{
		"lost":         {func(m *machine) { m.lose("syn_repeated") }, "shop/web", "shop/web: answers through veth7 will be tried again\n", "", true},
		"lost, daemon": {func(m *machine) { m.lose("syn_repeated"); m.daemon() }, "shop/web", "will be tried again", "", true},
		"proven":       {func(*machine) {}, "shop/web", "shop/web: nothing to do: answers through veth7 arrive\n", "", false},
		"not tried": {func(m *machine) { m.kernel.devices["c0ffee"] = datapath.Device{Key: webDevice} }, "shop/web",
			"nothing to do: no answer through veth7 has been tried yet", "", false},
		"not a pod":     {func(*machine) {}, "web", "", `"web": must be NAMESPACE/POD`, false},
		"unknown":       {func(m *machine) { m.lose("syn_repeated") }, "shop/other", "", "pod shop/other is not known on this node", false},
		"unattached":    {func(m *machine) { m.describe(statedir.Endpoints{Unattached: []string{"shop/api"}}) }, "shop/api", "", "pod shop/api is not attached", false},
		"nothing there": {func(m *machine) { m.kernel = nil }, "shop/web", "", "not loaded", false},
		"failed ADD": {func(m *machine) {
			m.record(attach.Record{ContainerID: "dead", IfName: "eth0", PodNamespace: "shop", PodName: "bad", Error: "no veth"})
		}, "shop/bad", "", "pod shop/bad: not attached: no veth", false},
	} {
		t.Run(name, func(t *testing.T) {
			m := freshWeb(t)
			kernel := m.kernel
			test.change(m)
			said, err := m.run("trust", test.pod)
			if !strings.Contains(said, test.said) || test.said == "" && said != "" {
				t.Errorf("said %q", said)
			}
			if (err != nil) != (test.failed != "") || err != nil && !strings.Contains(err.Error(), test.failed) {
				t.Errorf("error %v, want %q", err, test.failed)
			}
			if trusted := slices.Equal(kernel.trusted, []datapath.DeviceKey{webDevice}); trusted != test.trusted || !trusted && len(kernel.trusted) > 0 {
				t.Errorf("trusted %+v", kernel.trusted)
			}
		})
	}
}

// doctor calls it a problem, and says what to do.
func TestDoctorFindsLostTrust(t *testing.T) {
	c := newClinic(t)
	c.web(fakeMaps{}, endpoint(probe.HTTP, 80, "/x"))
	if text := c.examine(); strings.Contains(text, "trust") {
		t.Errorf("all is well:\n%s", text)
	}
	c.lose("request_repeated")
	c.devices = []doctor.Device{{Name: "veth7", IfIndex: 7, Veth: true, Others: []string{"program 12 (guard) at tcx ingress, before ours"}}}
	text := c.examine()
	for _, want := range []string{
		`PROBLEM +trust +shop/web is not answered: answers through veth7 stopped arriving 12s ago: a prober repeated its request`,
		` +-> find out what drops the answers on veth7 .*, then run probeletctl trust shop/web`,
		`note +attachments +other programs on veth7 of c0ffee/eth0: program 12 \(guard\) at tcx ingress, before ours`,
	} {
		if !regexp.MustCompile(`(?m)^` + want).MatchString(text) {
			t.Errorf("does not say %s:\n%s", want, text)
		}
	}
}
