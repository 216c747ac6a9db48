//go:build linux

package doctor

import (
	"context"
	"fmt"
	"reflect"
	"strings"
	"time"

	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
)

func (d *Doctor) daemon(ctx context.Context) {
	if !d.node.Daemon.Running {
		d.says(status.Problem, "daemon", "not running on "+d.Source.StateDir+"; "+d.node.Daemon.Still.Words(time.Now()),
			"start it with probeletd run; if it exits at once, its log says why")
		return
	}
	missing, err := api.NewClient(d.Source.StateDir).Ready(ctx)
	if err != nil {
		missing = []string{err.Error()}
	}
	if len(missing) > 0 {
		d.says(status.Problem, "daemon", fmt.Sprintf("process %d is running, but not ready: %s", d.node.Daemon.PID, strings.Join(missing, "; ")), "see its log")
		return
	}
	d.says(status.Well, "daemon", fmt.Sprintf("process %d, ready", d.node.Daemon.PID), "")
	d.states(ctx)
}

// states checks whether changes to containers are pushed to the daemon.
func (d *Doctor) states(ctx context.Context) {
	source, err := api.NewClient(d.Source.StateDir).Source(ctx)
	switch {
	case err != nil:
		d.says(status.Note, "states", "unknown whether container changes are pushed: "+err.Error(), "")
	case source.Pushed:
		d.says(status.Well, "states", "container changes are pushed", "")
	default:
		d.says(status.Note, "states", "container changes are not pushed: "+source.Why,
			"nothing to do, but a container that ends without closing a listening socket is noticed late")
	}
}

// kubelet checks that the prober set in the kernel is the kubelet.
func (d *Doctor) kubelet() {
	set := d.node.Prober
	if set != nil && set.Host {
		d.says(status.Note, "prober", "every process on the node counts as the prober (--prober host)", "on a cluster's nodes, run the daemon with --prober kubelet")
		return
	}
	found, err := d.Host.Kubelet()
	if err == nil {
		should := survey.ProberOf(found)
		switch {
		case set == nil:
			d.says(status.Note, "prober", fmt.Sprintf("the kubelet, %s; nothing is loaded to compare it with", should), "")
		case reflect.DeepEqual(set, should):
			d.says(status.Well, "prober", fmt.Sprintf("the kubelet, %s", should), "")
		default:
			d.says(status.Problem, "prober", fmt.Sprintf("the kubelet is %s, but the prober is set to %s, so probes are not answered", should, set),
				"run the daemon with --prober kubelet; if it is, its log says why")
		}
		return
	}
	if set != nil && len(set.CgroupIDs) > 0 {
		d.says(status.Note, "prober", fmt.Sprintf("cgroup %d, which is not a kubelet's", set.CgroupIDs[0]), "")
		return
	}
	d.says(status.Problem, "prober", err.Error(), "nothing is answered until the kubelet is found: is it running, and are the node's processes visible (hostPID)?")
}
