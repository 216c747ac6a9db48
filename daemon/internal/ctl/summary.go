//go:build linux

package ctl

import (
	"context"
	"fmt"
	"strings"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/table"
	"github.com/probelet/probelet/internal/version"
)

// summarize shows the node in a few numbers.
func summarize(ctx context.Context, env *environment, where place, asJSON bool) error {
	s, err := collect(env, where)
	if err != nil {
		return err
	}
	n := s.node()
	if s.Daemon.Running {
		if n.NotReady, err = api.NewClient(where.stateDir).Ready(ctx); err != nil {
			n.NotReady = []string{err.Error()}
		}
	}
	if asJSON {
		err = printJSON(env.stdout, n)
	} else {
		err = printNode(env, s, n)
	}
	if err != nil {
		return err
	}
	return s.daemonDown()
}

func (s Status) node() status.Node {
	n := status.Node{Version: version.String(), Running: s.Daemon.Running, Still: s.Daemon.Still, NotReady: []string{}, Unattached: []status.Unattached{}}
	if !n.Running {
		n.NotReady = append(n.NotReady, api.ErrDown.Error())
	}
	for name, count := range s.Counters {
		switch verdict, _, _ := datapath.ProbeVerdict(name); verdict {
		case "answered":
			n.Probes.Answered += count
		case "passed":
			n.Probes.Passed += count
		}
	}
	for _, a := range s.Attachments {
		if why, failed := strings.CutPrefix(a.WhyNotAnswered, notAttached); failed {
			n.Unattached = append(n.Unattached, status.Unattached{Pod: a.name(), Why: strings.TrimPrefix(why, ": ")})
			continue
		}
		n.Attached++
		n.Endpoints += len(a.Endpoints)
		for _, e := range a.Endpoints {
			if e.answered() {
				n.Answered++
			}
		}
	}
	for _, pod := range s.Unattached {
		n.Unattached = append(n.Unattached, status.Unattached{Pod: pod})
	}
	status.SortUnattached(n.Unattached)
	return n
}

// answered reports whether the next probe is answered in the kernel.
func (e Endpoint) answered() bool { return e.State == Fresh && e.WhyNotAnswered == "" }

// still returns what is answered while nothing renews it. An endpoint whose pod must first accept a connection counts: the kernel
// notices by itself when it has.
func still(attachments []Attachment) *status.Still {
	s := &status.Still{}
	for _, a := range attachments {
		for _, e := range a.Endpoints {
			if e.answered() || e.due {
				s.Endpoints++
				s.For = max(s.For, *e.FreshFor)
			}
		}
	}
	return s
}

func printNode(env *environment, s Status, n status.Node) error {
	var text table.Text
	text.Pair("version", n.Version)
	text.Pair("daemon", strings.TrimPrefix(s.Daemon.String(), "probeletd: "))
	text.Pair("attached", fmt.Sprintf("%d, with %d endpoints, of which %d are answered now", n.Attached, n.Endpoints, n.Answered))
	text.Pair("answered", fmt.Sprintf("%s of %d probes", n.Probes.Share(), n.Probes.Answered+n.Probes.Passed))
	for _, why := range n.NotReady {
		if why != api.ErrDown.Error() {
			text.Pair("not ready", why)
		}
	}
	for _, u := range n.Unattached {
		text.Pair("not attached", strings.TrimSuffix(u.Pod+": "+u.Why, ": "))
	}
	return text.Write(env.stdout, env.width)
}
