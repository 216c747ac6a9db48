//go:build linux

package doctor

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containernetworking/plugins/pkg/netlinksafe"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
)

// attachments checks the attachments on record.
func (d *Doctor) attachments() {
	records, err := attach.ReadRecords(d.Source.StateDir)
	if err != nil {
		d.says(status.Problem, "attachments", err.Error(), "remove the record; the daemon adopts the pod, or it is attached when it is recreated")
	}
	if unattached := d.node.Unattached; len(unattached) > 0 {
		d.says(status.Note, "attachments", "these pods have probes, but are not attached: "+strings.Join(unattached, ", "),
			"restart those that are older than probelet and that the daemon does not adopt; pods with hostNetwork are never attached")
	}
	for _, a := range d.node.Attachments {
		if a.Settings != nil && a.Settings.Problem != "" {
			d.says(status.Note, "annotations", a.Pod+": "+a.Settings.Problem, "correct the annotation; until then no probe of the pod is answered")
		}
	}
	if d.node.Prober == nil || len(records) == 0 {
		d.says(status.Well, "attachments", fmt.Sprintf("%d", len(records)), "")
		return
	}
	checker, done, err := newChecker(d.Source.BPFDir)
	if err != nil {
		d.says(status.Problem, "attachments", err.Error(), "")
		return
	}
	defer done()
	good := 0
	for _, r := range records {
		err := checker.Check(r.ID(), r.IfIndex)
		switch {
		case r.Error != "":
			d.says(status.Problem, "attachments", nameOf(r)+" was not attached: "+r.Error, "correct that and restart the pod; until then it runs without probelet")
		case err != nil:
			d.says(status.Problem, "attachments", nameOf(r)+": "+err.Error(), "the daemon repairs this within 10 s, unless another program holds the hook")
		default:
			good++
		}
	}
	if good == len(records) {
		d.says(status.Well, "attachments", fmt.Sprintf("%d, all complete", good), "")
	}
}

// trust looks for devices through which answers did not arrive.
func (d *Doctor) trust() {
	for _, a := range d.node.Attachments {
		if a.Trust != survey.TrustLost {
			continue
		}
		again := "restart the pod"
		if a.Pod != "" {
			again = "run probeletctl trust " + a.Pod
		}
		d.says(status.Problem, "trust", fmt.Sprintf("%s is not answered: %s", cmp.Or(a.Pod, a.ContainerID), a.Answers()),
			fmt.Sprintf("find out what drops the answers on %s (a firewall, or another program, listed below), then %s", a.HostIfName, again))
	}
}

func nameOf(r attach.Record) string {
	if r.PodName == "" {
		return r.ID().String()
	}
	return r.PodNamespace + "/" + r.PodName
}

// newChecker returns a checker for the loaded objects. If none are loaded, it takes every program for a neighbour.
func newChecker(bpfDir string) (checker *attach.Checker, done func(), err error) {
	objects, err := datapath.Open(bpfDir)
	if errors.Is(err, datapath.ErrNotLoaded) {
		return &attach.Checker{}, func() {}, nil
	}
	if err != nil {
		return nil, nil, err
	}
	done = func() { _ = objects.Close() } // read only
	if checker, err = attach.NewChecker(objects, bpfDir); err != nil {
		done()
	}
	return checker, done, err
}

// Device is a network device with the names of other agents' programs on it.
type Device struct {
	Name    string
	IfIndex int
	Veth    bool
	Others  []string
}

// devices returns the devices that have other agents' programs: on veths at XDP and tc hooks, on other devices at XDP.
func devices(bpfDir string) ([]Device, error) {
	links, err := netlinksafe.LinkList()
	if err != nil {
		return nil, err
	}
	checker, done, err := newChecker(bpfDir)
	if err != nil {
		return nil, err
	}
	defer done()
	var all []Device
	for _, link := range links {
		one := Device{Name: link.Attrs().Name, IfIndex: link.Attrs().Index, Veth: link.Type() == "veth"}
		if xdp := link.Attrs().Xdp; one.Veth {
			neighbours, _ := checker.Neighbours(one.IfIndex) // a device that has just gone has none
			for _, n := range neighbours {
				one.Others = append(one.Others, n.String())
			}
		} else if xdp != nil && xdp.ProgId != 0 {
			one.Others = []string{fmt.Sprintf("XDP program %d", xdp.ProgId)}
		}
		if len(one.Others) > 0 {
			all = append(all, one)
		}
	}
	return all, nil
}

// others lists other agents' programs on the node's devices: those of attached pods, other veths, and the rest.
func (d *Doctor) others() {
	found, err := d.Host.Devices(d.Source.BPFDir)
	if err != nil {
		d.says(status.Note, "others", "unknown: "+err.Error(), "")
		return
	}
	records, _ := attach.ReadRecords(d.Source.StateDir) // attachments has reported errors
	var veths, rest []string
	for _, one := range found {
		what := strings.Join(one.Others, ", ")
		i := slices.IndexFunc(records, func(r attach.Record) bool { return r.IfIndex == one.IfIndex })
		switch {
		case i >= 0:
			d.says(status.Note, "attachments", fmt.Sprintf("other programs on %s of %s: %s", one.Name, nameOf(records[i]), what),
				"nothing while probes are answered: those before ours may prevent that, and those after ours may drop the answers")
		case one.Veth:
			veths = append(veths, fmt.Sprintf("%s (%s)", one.Name, what))
		default:
			rest = append(rest, fmt.Sprintf("%s (%s)", one.Name, what))
		}
	}
	if len(veths) > 0 {
		d.says(status.Note, "others", "on veths without probelet: "+some(veths), "nothing to do, but a pod whose veth already has an XDP program starts without probelet")
	}
	if len(rest) > 0 {
		d.says(status.Note, "others", "on devices that belong to no pod: "+some(rest), "nothing to do, but the agent that attached them may attach to the pods' devices too")
	}
}

// some joins the first few of many names.
func some(all []string) string {
	const most = 5
	if len(all) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(all[:most], ", "), len(all)-most)
	}
	return strings.Join(all, ", ")
}
