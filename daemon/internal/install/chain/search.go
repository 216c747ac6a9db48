package chain

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/probelet/probelet/daemon/internal/hostfs"
	"github.com/probelet/probelet/daemon/internal/install/runtimes"
)

// ErrMisplaced: the runtime would not find the plugin, so that no pod could start.
var ErrMisplaced = errors.New("the runtime would not find the plugin")

// CanJoin returns an error if the plugin must not join: a directory is missing, or ErrMisplaced. A network that is not there
// yet, or cannot be read, is no reason.
func (n Node) CanJoin() error {
	if err := errors.Join(flagged("--cni-net-dir", CheckDir(n.NetDir)), flagged("--cni-bin-dir", CheckDir(n.BinDir))); err != nil {
		return err
	}
	w, err := n.primary()
	if errors.Is(err, ErrNoNetwork) || errors.Is(err, ErrUnusable) {
		return nil
	}
	if err != nil {
		return err
	}
	return n.searched(w)
}

// flagged adds the name of a flag to an error about its value.
func flagged(flag string, err error) error {
	if err != nil {
		err = fmt.Errorf("%s: %w", flag, err)
	}
	return err
}

// CheckDir returns an error unless dir is a directory.
func CheckDir(dir string) error {
	info, err := os.Stat(dir)
	if err == nil && !info.IsDir() {
		err = fmt.Errorf("%s: not a directory", dir)
	}
	return err
}

// findable returns ErrMisplaced unless the runtime finds the plugin.
func (n Node) findable(w *network) error {
	if err := n.program(PluginType); err != nil {
		return fmt.Errorf("%w: %w", ErrMisplaced, err)
	}
	return n.searched(w)
}

// searched returns ErrMisplaced unless every runtime looks for plugins in BinDir: its configuration says so, or, where that does not
// say where it looks, all plugins of the network are there. A runtime with other networks than NetDir's does not matter.
func (n Node) searched(w *network) error {
	found := n.runtimes()
	silent := len(found) == 0
	for _, r := range found {
		said, err := r.Configured()
		if err != nil {
			n.Log.Debug("the runtime's configuration cannot be read", "runtime", r, "error", err)
		}
		switch {
		case said.NoPods || said.NetDir != "" && !r.SameDir(said.NetDir, n.NetDir):
		case len(said.BinDirs) == 0:
			silent = true
			if err := n.ambiguous(w, r); err != nil {
				return err
			}
		case !slices.ContainsFunc(said.BinDirs, func(dir string) bool { return r.SameDir(dir, n.BinDir) }):
			return fmt.Errorf("%w: the configuration of %s says that plugins are in %s, not in %s: set --cni-bin-dir (chart: cni.binDir)",
				ErrMisplaced, r.Name, strings.Join(said.BinDirs, ", "), n.BinDir)
		}
	}
	if !silent {
		return nil
	}
	if name, err := w.lacking(n.program); err != nil {
		return fmt.Errorf("%w: %s of network %s (%s) is not in %s, so its plugins are elsewhere: set --cni-bin-dir (chart: cni.binDir): %w",
			ErrMisplaced, name, w.name, filepath.Join(n.NetDir, w.file), n.BinDir, err)
	}
	return nil
}

// lacking returns the first of a network's plugins, but for ours, that look does not find; nil: it finds all.
func (w *network) lacking(look func(name string) error) (name string, err error) {
	for _, p := range w.plugins {
		if name = pluginType(p); name == PluginType {
			continue
		}
		if err := look(name); err != nil {
			return name, err
		}
	}
	return "", nil
}

// defaultBinDir is where runtimes look that are not told otherwise (defaultNetworkPluginBinDirs in containerd's internal/cri/config,
// cniBinDir in CRI-O's pkg/config, --cni-bin-dir of cri-dockerd), if a distribution has not built in another directory.
const defaultBinDir = "/opt/cni/bin"

// ambiguous returns ErrMisplaced if a network's plugins are in the runtime's default directory, and that is not BinDir. That they are in
// BinDir too says nothing then: distributions have packages that put the same ones into another directory.
func (n Node) ambiguous(w *network, r runtimes.Runtime) error {
	if r.SameDir(defaultBinDir, n.BinDir) {
		return nil
	}
	_, err := w.lacking(func(name string) error {
		_, err := r.Root().Stat(filepath.Join(defaultBinDir, name))
		return err
	})
	if err != nil {
		return nil
	}
	return fmt.Errorf("%w: the configuration of %s does not say where plugins are, and those of network %s are in its default, %s, not only in %s: set --cni-bin-dir (chart: cni.binDir)",
		ErrMisplaced, r.Name, w.name, defaultBinDir, n.BinDir)
}

func (n Node) runtimes() runtimes.List {
	if n.Runtimes == nil {
		return nil
	}
	return n.Runtimes()
}

// program returns an error unless BinDir has a program of that name, put there by root or the directory's owner.
func (n Node) program(name string) error {
	file := filepath.Join(n.BinDir, name)
	fs := n.view()
	dir, err := fs.Stat(n.BinDir)
	if err != nil {
		return err
	}
	info, err := fs.Stat(file)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o111 == 0 {
		return fmt.Errorf("%s: there is no program, but %s", file, info.Mode())
	}
	owner := info.Sys().(*syscall.Stat_t).Uid
	if owner != 0 && owner != dir.Sys().(*syscall.Stat_t).Uid {
		return fmt.Errorf("%s: belongs to user %d, neither root nor the owner of the directory", file, owner)
	}
	return nil
}

// view is the file system in which programs are looked for: the host's, if NetDir is the same directory there, since a pod's mount of
// BinDir keeps to the directory that a link led to when the pod started, and the runtime follows the link. Otherwise it is ours.
func (n Node) view() hostfs.FS {
	host := hostfs.FS{Root: filepath.Join(cmp.Or(n.proc, "/proc"), "1/root")}
	ours, err := os.Stat(n.NetDir)
	if err != nil {
		return hostfs.FS{Root: "/"}
	}
	if theirs, err := host.Stat(n.NetDir); err != nil || !os.SameFile(ours, theirs) {
		return hostfs.FS{Root: "/"}
	}
	return host
}
