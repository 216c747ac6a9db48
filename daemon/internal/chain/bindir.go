package chain

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/probelet/probelet/daemon/internal/hostfs"
)

// ErrMisplaced: the runtime would not find the plugin, so that no pod could start.
var ErrMisplaced = errors.New("the runtime would not find the plugin")

// CanJoin returns an error if the plugin must not join: a directory is missing, or ErrMisplaced. A network that is not there
// yet, or cannot be read, is no reason.
func (n Node) CanJoin() error {
	for flag, dir := range map[string]string{"--cni-net-dir": n.NetDir, "--cni-bin-dir": n.BinDir} {
		if info, err := os.Stat(dir); err != nil {
			return fmt.Errorf("%s: %w", flag, err)
		} else if !info.IsDir() {
			return fmt.Errorf("%s: %s: is no directory", flag, dir)
		}
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

// findable returns ErrMisplaced unless the runtime finds the plugin.
func (n Node) findable(w *network) error {
	if !isExecutable(n.pluginFile()) {
		return fmt.Errorf("%w: %s: there is no program", ErrMisplaced, n.pluginFile())
	}
	return n.searched(w)
}

// searched returns ErrMisplaced unless the runtime looks for plugins in BinDir: its configuration says so, or, where it does
// not say where it looks, all plugins of the network are there.
func (n Node) searched(w *network) error {
	var elsewhere []string
	for _, r := range n.runtimes() {
		dirs, err := r.binDirs()
		if err != nil {
			n.Log.Debug("the runtime's configuration cannot be read", "runtime", r, "error", err)
		}
		if slices.ContainsFunc(dirs, func(dir string) bool { return r.isSame(dir, n.BinDir) }) {
			return nil
		}
		elsewhere = append(elsewhere, dirs...)
	}
	if len(elsewhere) > 0 {
		return fmt.Errorf("%w: its configuration says that plugins are in %s, not in %s: set --cni-bin-dir (chart: cni.binDir)",
			ErrMisplaced, strings.Join(elsewhere, ", "), n.BinDir)
	}
	for _, p := range w.plugins {
		name := pluginType(p)
		if name != PluginType && !isExecutable(filepath.Join(n.BinDir, name)) {
			return fmt.Errorf("%w: %s of network %s (%s) is not in %s, so its plugins are elsewhere: set --cni-bin-dir (chart: cni.binDir)",
				ErrMisplaced, name, w.name, filepath.Join(n.NetDir, w.file), n.BinDir)
		}
	}
	return nil
}

func (n Node) runtimes() Runtimes {
	if n.Runtimes == nil {
		return nil
	}
	return n.Runtimes()
}

func isExecutable(file string) bool {
	info, err := os.Stat(file)
	return err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0
}

// isSame reports whether a directory of the runtime's is one of ours. In a pod they may be different mounts of the same.
func (r Runtime) isSame(theirs, ours string) bool {
	if filepath.Clean(theirs) == filepath.Clean(ours) {
		return true
	}
	file, err := r.root().Open(theirs)
	if err != nil {
		return false
	}
	defer file.Close() //nolint:errcheck // read only
	a, err := file.Stat()
	b, ourErr := os.Stat(ours)
	return err == nil && ourErr == nil && os.SameFile(a, b)
}

func (r Runtime) root() hostfs.FS { return hostfs.FS{Root: filepath.Join(r.process, "root")} }

// binDirs returns where a runtime looks for plugins, as its command line or its configuration says; nil if neither does.
func (r Runtime) binDirs() ([]string, error) {
	text, err := os.ReadFile(filepath.Join(r.process, "cmdline"))
	if err != nil {
		return nil, err
	}
	args := strings.Split(string(bytes.TrimRight(text, "\x00")), "\x00")
	switch r.Name {
	case "containerd": // cmd/containerd/command/main.go, internal/cri/config
		return r.containerdDirs(last(flagValues(args, "--config", "-c"), "/etc/containerd/config.toml"), map[string]bool{})
	case "crio": // pkg/config/config.go, crio(8)
		if dirs := commas(flagValues(args, "--cni-plugin-dir")); len(dirs) > 0 {
			return dirs, nil
		}
		return r.crioDirs(
			last(flagValues(args, "--config", "-c"), "/etc/crio/crio.conf"), last(flagValues(args, "--config-dir", "-d"), "/etc/crio/crio.conf.d"))
	case "cri-dockerd":
		return commas(flagValues(args, "--cni-bin-dir")), nil
	}
	return nil, nil
}

// flagValues returns the values of a flag, in any of its spellings.
func flagValues(args []string, names ...string) (values []string) {
	for i, arg := range args {
		name, value, has := strings.Cut(arg, "=")
		switch {
		case !slices.Contains(names, name):
		case has:
			values = append(values, value)
		case i+1 < len(args):
			values = append(values, args[i+1])
		}
	}
	return values
}

func last(values []string, otherwise string) string {
	if len(values) == 0 {
		return otherwise
	}
	return values[len(values)-1]
}

func commas(values []string) (all []string) {
	for _, value := range values {
		all = append(all, strings.Split(value, ",")...)
	}
	return all
}

// containerdDirs reads a file of containerd's and those that it imports, which go before it.
func (r Runtime) containerdDirs(file string, seen map[string]bool) ([]string, error) {
	if seen[file] {
		return nil, nil
	}
	seen[file] = true
	conf, err := r.readTOML(file)
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, plugin := range []string{"cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"} { // versions 1, 2 and 3
		cni := []string{"plugins", plugin, "cni"}
		if one := stringsOf(lookUp(conf, append(cni, "bin_dir")...)); len(one) > 0 {
			dirs = one
		}
		if several := stringsOf(lookUp(conf, append(cni, "bin_dirs")...)); len(several) > 0 {
			dirs = several
		}
	}
	for _, pattern := range stringsOf(lookUp(conf, "imports")) {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(filepath.Dir(file), pattern)
		}
		imported, err := r.root().Glob(pattern)
		if err != nil {
			return nil, fmt.Errorf("%s: imports: %w", file, err)
		}
		for _, one := range imported {
			if found, err := r.containerdDirs(one, seen); err != nil {
				return nil, err
			} else if len(found) > 0 {
				dirs = found
			}
		}
	}
	return dirs, nil
}

// crioDirs reads CRI-O's file and those in its directory, which go before it.
func (r Runtime) crioDirs(file, dir string) (dirs []string, err error) {
	dropIns, err := r.root().Glob(filepath.Join(dir, "*"))
	if err != nil {
		return nil, err
	}
	for _, one := range append([]string{file}, dropIns...) {
		conf, err := r.readTOML(one)
		if err != nil {
			return nil, err
		}
		network := []string{"crio", "network"}
		if found := append(stringsOf(lookUp(conf, append(network, "plugin_dirs")...)), stringsOf(lookUp(conf, append(network, "plugin_dir")...))...); len(found) > 0 {
			dirs = found
		}
	}
	return dirs, nil
}

// readTOML returns nil of a file that is not there, as runtimes take it.
func (r Runtime) readTOML(file string) (conf map[string]any, err error) {
	text, err := r.root().ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := toml.Unmarshal(text, &conf); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return conf, nil
}

// lookUp returns the value at a path of keys, or nil.
func lookUp(conf map[string]any, path ...string) any {
	var value any = conf
	for _, key := range path {
		table, _ := value.(map[string]any)
		value = table[key]
	}
	return value
}

// stringsOf returns a string, or a list of them, that is not empty.
func stringsOf(value any) (all []string) {
	switch v := value.(type) {
	case string:
		if v != "" {
			all = []string{v}
		}
	case []any:
		for _, one := range v {
			all = append(all, stringsOf(one)...)
		}
	}
	return all
}
