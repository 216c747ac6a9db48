// Package repair keeps a node's attachments whole. A Looker finds what is broken, a Repairer repairs it and adopts pods that
// were started before probelet, and a Promoter turns clsact attachments into tcx links. They report what they found and did;
// what follows from that for probes is up to the caller.
package repair

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/adopt"
)

// Config describes the node whose attachments are repaired.
type Config struct {
	Datapath         *datapath.Datapath
	BPFDir, StateDir string
	Hook             attach.Hook // of adopted pods
	Adopt            adopt.Node
	Log              *slog.Logger
}

// Action is what a repair did to an attachment.
type Action string

// Actions of repairs.
const (
	Reattached Action = "reattached" // part of it was lost
	Removed    Action = "removed"    // its device is gone
	Adopted    Action = "adopted"    // its pod was started before probelet
)

// Actions lists all of them.
var Actions = []Action{Reattached, Removed, Adopted}

const (
	// budget limits how long one call of Repair attaches and detaches, because its caller does nothing else meanwhile.
	budget = 500 * time.Millisecond
	// A failed repair is retried after firstRetry, and from then on at intervals that double up to longestRetry.
	firstRetry   = 5 * time.Second
	longestRetry = 5 * time.Minute
	// DeletionGrace is how long the other plugins and the runtime may take to forget a pod after our DEL, the first of the chain's.
	// Meanwhile the pod is not adopted.
	DeletionGrace = 2 * time.Minute
	// pruneEvery is after how many looks leftovers are pruned that a look cannot see.
	pruneEvery = 12
)

// SeesHost returns an error unless this process sees the host's network namespace, without which nothing can be repaired.
func SeesHost() error {
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return err
	}
	host, err := os.Readlink("/proc/1/ns/net")
	if err != nil {
		return fmt.Errorf("the host's network namespace is not visible: %w", err)
	}
	if own != host {
		return errors.New("not in the host's network namespace")
	}
	return nil
}

// SameBPFFS reports whether bpfDir is in the file system that the host has mounted there. In a pod it differs once the host's was
// mounted again. It is assumed to be the same if that cannot be determined.
func SameBPFFS(bpfDir string) bool {
	var ours, theirs syscall.Stat_t
	parent := filepath.Dir(bpfDir)
	if syscall.Stat(parent, &ours) != nil || syscall.Stat(filepath.Join("/proc/1/root", parent), &theirs) != nil {
		return true
	}
	return ours.Dev == theirs.Dev || !filepath.IsAbs(bpfDir)
}
