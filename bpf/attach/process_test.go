package attach_test

import (
	"net/netip"
	"os"
	"testing"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
)

// If a prober shares its cgroup, connections of the other processes there reach the pod, whatever is fresh, and whether or not the
// prober started them.
func TestProberIsAProcess(t *testing.T) {
	eachOwnerTest(t, func(t *testing.T, o *ownerTest) {
		dir, err := bpftest.CurrentCgroupDir()
		if err != nil {
			t.Fatal(err)
		}
		id, err := bpftest.CurrentCgroup()
		if err != nil {
			t.Fatal(err)
		}
		set := func(p *datapath.Process) {
			t.Helper()
			if err := o.d.SetProber(datapath.Prober{CgroupIDs: []uint64{id}, Process: p}); err != nil {
				t.Fatal(err)
			}
		}
		// taken reports whether connections are taken from this process, and from another one in the same cgroup.
		taken := func() (own, bystander bool) {
			t.Helper()
			before := o.counters(t)["handed_over"]
			c, conn := o.open(t, "")
			if err := exchange(conn, echoed); err != nil {
				t.Error(err)
			}
			between := o.counters(t)["handed_over"]
			if err := exchangeIn(dir, o.Node.NS, connection{netip.AddrPortFrom(o.addrs[0], 0), c.to}); err != nil {
				t.Error(err)
			}
			return between != before, o.counters(t)["handed_over"] != between
		}
		own := &datapath.Process{PID: uint32(os.Getpid()), Cgroup: dir}
		for _, step := range []struct {
			name           string
			process        *datapath.Process
			own, bystander bool
		}{
			{"the cgroup", nil, true, true},
			{"this process", own, true, false},
			{"its parent", &datapath.Process{PID: uint32(os.Getppid()), Cgroup: dir}, false, false},
			{"this process again", own, true, false},
			{"the cgroup again", nil, true, true},
		} {
			set(step.process)
			if own, bystander := taken(); own != step.own || bystander != step.bystander {
				t.Errorf("%s is the prober: taken from this process %v, from another one %v", step.name, own, bystander)
			}
		}
		o.wantNothingLeft(t)
	})
}

// A marker ends with its process. From then on there is no prober; the whole cgroup never becomes one.
func TestNoProberWithoutAMarker(t *testing.T) {
	bpftest.RequireRoot(t)
	dir, err := bpftest.CurrentCgroupDir()
	if err != nil {
		t.Fatal(err)
	}
	d, err := datapath.Load()
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close() //nolint:errcheck // a test's
	err = d.SetProber(datapath.Prober{CgroupIDs: []uint64{1}, Process: &datapath.Process{PID: 1, Cgroup: dir + "/missing"}})
	who, readErr := d.Prober()
	if err == nil || readErr != nil || len(who.CgroupIDs) > 0 || who.AnyLocal {
		t.Errorf("in a missing cgroup: %v; the prober is %+v, %v", err, who, readErr)
	}
}
