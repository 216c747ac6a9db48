// Package chain adds the CNI plugin to the chain of the node's network and removes it. It never edits a file that it does not own, and
// it replaces its own files atomically.
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

// PluginType is the plugin's type in network configurations and the name of its binary.
const PluginType = "probelet"

// Way is how the plugin joins the chain.
type Way string

// Ways.
const (
	// DropIn is a separate file in the directory named after the network (libcni 1.3 and later).
	DropIn Way = "dropin"
	// Copy is a copy of the primary network's configuration that includes the plugin, under a name that sorts first.
	Copy Way = "copy"
)

// BestWay returns DropIn if all runtimes are known to support it, otherwise Copy.
func BestWay(all runtimes.List) Way {
	if all.ReadDropIns() {
		return DropIn
	}
	return Copy
}

// Node locates CNI's files on a node.
type Node struct {
	NetDir string // network configurations
	BinDir string // plugins
	// StateDir holds the lock that every process takes before it changes the two directories.
	StateDir string
	// Conf holds the plugin's own fields in the configuration, besides its type.
	Conf map[string]string
	Log  *slog.Logger
	// Looked, if set, receives what Follow found after each check: how the plugin joined the chain, or why it did not.
	Looked func(Joined, error)
	// Runtimes returns the node's runtimes, whose configuration names their plugin directories. It may be nil.
	Runtimes func() runtimes.List
	// proc is the host's proc file system. The default is /proc.
	proc string
}

// Transient errors.
var (
	// ErrNoNetwork: there is no network configuration.
	ErrNoNetwork = errors.New("no network configuration")
	// ErrUnusable: the network configuration cannot be read or parsed.
	ErrUnusable = errors.New("not a network configuration")
	// ErrUnsupported: the configuration is valid, but with the plugin in it pods could not start.
	ErrUnsupported = errors.New("the plugin cannot be in this network")
)

// Joined describes how the plugin joined the chain.
type Joined struct {
	Way     Way    // empty: the network's own configuration has the plugin
	Network string // name of the network
	Primary string // file of its configuration
	File    string // file that adds the plugin; empty if Way is
	Changed bool   // whether this Join changed a file
}

// Join adds the plugin to the chain of the primary network, or updates a previous Join to the network's current configuration.
//
// On ErrNoNetwork, ErrUnsupported and ErrMisplaced it removes the plugin from the chain, so that no network outlives its configuration
// and no pod is kept from starting. On ErrUnusable it changes nothing.
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

// hasDropIn reports whether a drop-in of the network that Join did not write has the plugin.
func (n Node) hasDropIn(w *network) bool {
	files, _ := filepath.Glob(filepath.Join(n.NetDir, w.name, "*.conf"))
	ours := n.ours()
	return w.readsDropIns() && slices.ContainsFunc(files, func(file string) bool {
		text, err := os.ReadFile(file)
		return err == nil && isPlugin(text) && !slices.Contains(ours, file)
	})
}

// joinable returns the primary network. The error is ErrUnsupported if the plugin cannot be in it.
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

// Look reports how the plugin is in the chain of the primary network, without changing anything. in reports whether Join would change
// nothing either. The errors are those of Join.
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

// lockDeadline bounds the wait for another process that is changing the chain, which takes milliseconds.
const lockDeadline = 10 * time.Second

// lock keeps other processes from changing the chain or the plugin's binary until the lock is released.
func (n Node) lock(ctx context.Context) (*lock.Lock, error) {
	ctx, cancel := context.WithTimeout(ctx, lockDeadline)
	defer cancel()
	return statedir.LockChain(ctx, n.StateDir)
}

// plugin returns our entry in the list of plugins.
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
