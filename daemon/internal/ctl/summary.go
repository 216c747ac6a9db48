//go:build linux

package ctl

import (
	"context"
	"fmt"
	"strings"

	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
	"github.com/probelet/probelet/daemon/internal/table"
)

// summarize shows the node in a few numbers.
func summarize(ctx context.Context, env *environment, where place, asJSON bool) error {
	s, err := env.at(where).Read()
	if err != nil {
		return err
	}
	n := s.Node()
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
	return daemonDown(s.Daemon)
}

func printNode(env *environment, s survey.Status, n status.Node) error {
	var text table.Text
	text.Pair("version", n.Version)
	text.Pair("daemon", strings.TrimPrefix(s.Daemon.String(), "probeletd: "))
	text.Pair("attached", fmt.Sprintf("%d, with %d endpoints, of which %d are answered now", n.Attached, n.Endpoints, n.Answered))
	text.Pair("answered", fmt.Sprintf("%s of %d probes", n.Probes.Share(), n.Probes.Answered+n.Probes.Passed))
	if n.Running { // otherwise that is the only reason, and said above
		for _, why := range n.NotReady {
			text.Pair("not ready", why)
		}
	}
	for _, u := range n.Unattached {
		text.Pair("not attached", strings.TrimSuffix(u.Pod+": "+u.Why, ": "))
	}
	return text.Write(env.stdout, env.width)
}
