// Package chain puts the CNI plugin onto a node and into the chain of the node's network, and takes it out again. It
// never edits a file of somebody else's, and whatever is there at any moment is whole.
package chain

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/probelet/probelet/bpf/lock"
	"github.com/probelet/probelet/daemon/internal/install/runtimes"
	"github.com/probelet/probelet/daemon/internal/statedir"
)

// PluginType is the plugin's type in a network configuration, and the name of its binary.
const PluginType = "probelet"

// Way is how the plugin joins the chain.
type Way string

// Ways.
const (
	// DropIn is a file of its own in the directory that is named after the network (libcni 1.3 and newer).
	DropIn Way = "dropin"
	// Copy is a copy of the primary network's configuration, with the plugin in it, under a name that sorts first.
	Copy Way = "copy"
)

// BestWay is the better one that all runtimes are known to understand.
func BestWay(all runtimes.List) Way {
	if all.ReadDropIns() {
		return DropIn
	}
	return Copy
}

// Node is where CNI keeps its files.
type Node struct {
	NetDir string // of network configurations
	BinDir string // of plugins
	// StateDir is where whoever changes the two directories takes a lock.
	StateDir string
	// Conf are the plugin's own fields in the configuration, beside its type.
	Conf map[string]string
	Log  *slog.Logger
	// Looked, if set, is told by Follow after each look how the plugin is in the chain, or why it is not.
	Looked func(Joined, error)
	// Runtimes finds the node's runtimes, whose configuration says where they look for plugins. nil: none is asked.
	Runtimes func() runtimes.List
	// proc is where the host's processes are; empty: /proc.
	proc string
}

// What may be otherwise in a moment.
var (
	// ErrNoNetwork: there is no network configuration.
	ErrNoNetwork = errors.New("no network configuration")
	// ErrUnusable: the one that there is cannot be read.
	ErrUnusable = errors.New("not a network configuration")
	// ErrUnsupported: it can, but the plugin would keep its pods from starting.
	ErrUnsupported = errors.New("the plugin cannot be in this network")
)

// Joined says how the plugin is in the chain.
type Joined struct {
	Way     Way    // empty: by somebody else's hand
	Network string // its name
	Primary string // the file of its configuration
	File    string // ours; empty with Way
	Changed bool   // just now
}

// Join puts the plugin into the chain of the primary network, or adapts what is there to how that is now. The error is
// ErrNoNetwork if there is none, ErrUnsupported if the plugin cannot be in it, and ErrMisplaced if the runtime would not find the
// plugin; then nothing of ours is left either, lest a network outlive its configuration or its pods do not start. It is ErrUnusable if that cannot be read; then everything stays as it is.
func (n Node) Join(ctx context.Context, way Way) (Joined, error) {
	locked, err := n.lock(ctx)
	if err != nil {
		return Joined{}, err
	}
	defer locked.Release()
	w, j, err := n.joinable()
	if err == nil {
		err = n.findable(w)
	}
	if err != nil {
		if errors.Is(err, ErrNoNetwork) || errors.Is(err, ErrUnsupported) || errors.Is(err, ErrMisplaced) {
			_, left := n.leaveBut("")
			err = errors.Join(err, left)
		}
		return Joined{}, err
	}
	p, err := n.plan(w, way, j)
	if err != nil {
		return p.Joined, err
	}
	if p.File != "" {
		if p.Changed, err = n.put(p.File, p.text, p.like); err != nil {
			return p.Joined, err
		}
	}
	left, err := n.leaveBut(p.File)
	p.Changed = p.Changed || left
	return p.Joined, err
}

// hasDropIn reports whether the plugin is in a drop-in of the network by somebody's hand.
func (n Node) hasDropIn(w *network) bool {
	files, _ := filepath.Glob(filepath.Join(n.NetDir, w.name, "*.conf"))
	ours := n.ours()
	return w.readsDropIns() && slices.ContainsFunc(files, func(file string) bool {
		text, err := os.ReadFile(file)
		return err == nil && isPlugin(text) && !slices.Contains(ours, file)
	})
}

// joinable returns the primary network, if the plugin can be in it.
func (n Node) joinable() (w *network, j Joined, err error) {
	if w, err = n.primary(); err != nil {
		return nil, j, err
	}
	j = Joined{Network: w.name, Primary: filepath.Join(n.NetDir, w.file)}
	if w.unsupported != nil {
		err = fmt.Errorf("%s: %w: %w", j.Primary, ErrUnsupported, w.unsupported)
	}
	return w, j, err
}

// Look finds out how the plugin is in the chain of the primary network, and changes nothing. in is whether it is there as Join
// would have it. The errors are Join's.
func (n Node) Look() (j Joined, in bool, err error) {
	w, j, err := n.joinable()
	if err == nil {
		err = n.findable(w)
	}
	if err != nil {
		return j, false, err
	}
	if original, file, err := n.throughOther(w); err != nil {
		return j, false, err
	} else if original != nil {
		j.Way, j.File = Copy, file
		return j, n.isCopy(file, original), nil
	}
	if w.has() || n.hasDropIn(w) {
		return j, true, nil
	}
	for _, file := range n.ours() {
		if filepath.Dir(file) == filepath.Clean(n.NetDir) {
			j.Way, j.File = Copy, file
			return j, n.isCopy(file, w), nil
		}
		if file == filepath.Join(n.NetDir, w.name, dropInName) {
			j.Way, j.File = DropIn, file
			return j, w.readsDropIns(), nil
		}
	}
	return j, false, nil
}

// lockDeadline bounds the wait for another process that changes the chain, which takes a moment.
const lockDeadline = 10 * time.Second

// lock keeps other processes from changing the chain or the plugin's binary, until it is released.
func (n Node) lock(ctx context.Context) (*lock.Lock, error) {
	ctx, cancel := context.WithTimeout(ctx, lockDeadline)
	defer cancel()
	return statedir.LockChain(ctx, n.StateDir)
}

// plugin is our entry.
func (n Node) plugin() (json.RawMessage, error) {
	conf := map[string]string{"type": PluginType}
	for name, value := range n.Conf {
		conf[name] = value
	}
	return json.MarshalIndent(conf, "", "  ")
}

func (j Joined) String() string {
	if j.Way == "" {
		return fmt.Sprintf("network %s (%s) has the plugin in its own configuration", j.Network, j.Primary)
	}
	return fmt.Sprintf("network %s (%s), by %s", j.Network, j.Primary, strings.TrimPrefix(string(j.Way)+" "+j.File, " "))
}
