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

// ErrMisplaced: the runtime would not find the plugin, so no pod could start.
var ErrMisplaced = errors.New("the runtime would not find the plugin")

// CanJoin returns an error if the plugin must not join: a directory is missing, or the error is ErrMisplaced. A missing or unreadable
// network is not an error, because it may still come.
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

// flagged prefixes an error about the value of a flag with the flag's name.
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

// searched returns ErrMisplaced unless every runtime looks for plugins in BinDir: its configuration must name BinDir or, if it names no
// directory, BinDir must have all plugins of the network. A runtime that reads networks from another directory does not matter.
func (n Node) searched(w *network) error {
	found := n.runtimes()
	silent := len(found) == 0 // no configuration names a directory
	for _, r := range found {
		conf, err := r.Configured()
		if err != nil {
			n.Log.Debug("failed to read the runtime's configuration", "runtime", r, "error", err)
		}
		switch {
		case conf.NoPods || conf.NetDir != "" && !r.SameDir(conf.NetDir, n.NetDir):
		case len(conf.BinDirs) == 0:
			silent = true
			if err := n.ambiguous(w, r); err != nil {
				return err
			}
		case !slices.ContainsFunc(conf.BinDirs, func(dir string) bool { return r.SameDir(dir, n.BinDir) }):
			return fmt.Errorf("%w: %s looks for plugins in %s, not in %s: set --cni-bin-dir (chart: cni.binDir)",
				ErrMisplaced, r.Name, strings.Join(conf.BinDirs, ", "), n.BinDir)
		}
	}
	if !silent {
		return nil
	}
	if name, err := w.lacking(n.program); err != nil {
		return fmt.Errorf("%w: %s of network %s (%s) is not in %s: set --cni-bin-dir (chart: cni.binDir): %w",
			ErrMisplaced, name, w.name, filepath.Join(n.NetDir, w.file), n.BinDir, err)
	}
	return nil
}

// lacking returns the first of a network's plugins, other than ours, for which look returns an error, and that error.
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

// defaultBinDir is the plugin directory of runtimes whose configuration names none (defaultNetworkPluginBinDirs in containerd's
// internal/cri/config, cniBinDir in CRI-O's pkg/config, --cni-bin-dir of cri-dockerd), unless a distribution changed the default.
const defaultBinDir = "/opt/cni/bin"

// ambiguous returns ErrMisplaced if the runtime's default directory is not BinDir and has all plugins of the network. That BinDir has
// them too proves nothing then: distributions package the same plugins in another directory.
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
	return fmt.Errorf("%w: the configuration of %s names no plugin directory, and its default, %s, has all plugins of network %s, as does %s: set --cni-bin-dir (chart: cni.binDir)",
		ErrMisplaced, r.Name, defaultBinDir, w.name, n.BinDir)
}

func (n Node) runtimes() runtimes.List {
	if n.Runtimes == nil {
		return nil
	}
	return n.Runtimes()
}

// program returns an error unless BinDir has an executable of that name that belongs to root or to the directory's owner.
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
		return fmt.Errorf("%s: not an executable file (mode %s)", file, info.Mode())
	}
	owner := info.Sys().(*syscall.Stat_t).Uid
	if owner != 0 && owner != dir.Sys().(*syscall.Stat_t).Uid {
		return fmt.Errorf("%s: belongs to user %d, must belong to root or the owner of the directory", file, owner)
	}
	return nil
}

// view returns the file system in which program looks: the host's if NetDir is the same directory there, otherwise ours. If BinDir is a
// symlink, the runtime follows it each time, but a pod's mount keeps the target that it had when the pod started.
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
