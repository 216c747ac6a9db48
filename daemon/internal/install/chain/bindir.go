package chain

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/mod/semver"

	"github.com/probelet/probelet/daemon/internal/hostfs"
)

// ErrMisplaced: the runtime would not find the plugin, so that no pod could start.
var ErrMisplaced = errors.New("the runtime would not find the plugin")

// CanJoin returns an error if the plugin must not join: a directory is missing, or ErrMisplaced. A network that is not there
// yet, or cannot be read, is no reason.
func (n Node) CanJoin() error {
	if err := errors.Join(isDir("--cni-net-dir", n.NetDir), isDir("--cni-bin-dir", n.BinDir)); err != nil {
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

func isDir(flag, dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("%s: %w", flag, err)
	}
	if !info.IsDir() {
		return fmt.Errorf("%s: %s: not a directory", flag, dir)
	}
	return nil
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
		said, err := r.configured()
		if err != nil {
			n.Log.Debug("the runtime's configuration cannot be read", "runtime", r, "error", err)
		}
		switch {
		case said.noPods || said.netDir != "" && !r.isSame(said.netDir, n.NetDir):
		case len(said.binDirs) == 0:
			silent = true
			if err := n.ambiguous(w, r); err != nil {
				return err
			}
		case !slices.ContainsFunc(said.binDirs, func(dir string) bool { return r.isSame(dir, n.BinDir) }):
			return fmt.Errorf("%w: the configuration of %s says that plugins are in %s, not in %s: set --cni-bin-dir (chart: cni.binDir)",
				ErrMisplaced, r.Name, strings.Join(said.binDirs, ", "), n.BinDir)
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
func (n Node) ambiguous(w *network, r Runtime) error {
	if r.isSame(defaultBinDir, n.BinDir) {
		return nil
	}
	_, err := w.lacking(func(name string) error {
		_, err := r.root().Stat(filepath.Join(defaultBinDir, name))
		return err
	})
	if err != nil {
		return nil
	}
	return fmt.Errorf("%w: the configuration of %s does not say where plugins are, and those of network %s are in its default, %s, not only in %s: set --cni-bin-dir (chart: cni.binDir)",
		ErrMisplaced, r.Name, w.name, defaultBinDir, n.BinDir)
}

func (n Node) runtimes() Runtimes {
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

// isSame reports whether a directory of the runtime's is one of ours. In a pod they may be different mounts of the same.
func (r Runtime) isSame(theirs, ours string) bool {
	if filepath.Clean(theirs) == filepath.Clean(ours) {
		return true
	}
	a, err := r.root().Stat(theirs)
	b, ourErr := os.Stat(ours)
	return err == nil && ourErr == nil && os.SameFile(a, b)
}

func (r Runtime) root() hostfs.FS { return hostfs.FS{Root: filepath.Join(r.process, "root")} }

// configured is what a runtime's command line and configuration say of CNI. What they do not say is empty: defaults differ from
// build to build (Debian's containerd looks for plugins in /usr/lib/cni).
type configured struct {
	netDir  string
	binDirs []string
	// noPods: it runs none, as Docker's containerd.
	noPods bool
}

// override takes what is said elsewhere.
func (c *configured) override(netDir, binDirs []string) {
	if len(netDir) > 0 {
		c.netDir = netDir[len(netDir)-1]
	}
	if len(binDirs) > 0 {
		c.binDirs = binDirs
	}
}

// configured reads a runtime's command line and configuration.
func (r Runtime) configured() (c configured, err error) {
	text, err := os.ReadFile(filepath.Join(r.process, "cmdline"))
	if err != nil {
		return c, err
	}
	args := strings.Split(string(bytes.TrimRight(text, "\x00")), "\x00")
	switch r.Name {
	case "containerd": // cmd/containerd/command/main.go, internal/cri/config
		err = r.readContainerd(last(flagValues(args, "--config", "-c"), "/etc/containerd/config.toml"), &c)
	case "crio": // pkg/config/config.go, crio(8)
		err = r.readCRIO(
			last(flagValues(args, "--config", "-c"), "/etc/crio/crio.conf"), last(flagValues(args, "--config-dir", "-d"), "/etc/crio/crio.conf.d"), &c)
		c.override(flagValues(args, "--cni-config-dir"), commas(flagValues(args, "--cni-plugin-dir")))
	case "cri-dockerd":
		c.override(flagValues(args, "--cni-conf-dir"), commas(flagValues(args, "--cni-bin-dir")))
	}
	return c, err
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

// criPlugins are the names of containerd's plugin that runs pods, in versions 1, 2 and 3 of its configuration.
var criPlugins = []string{"cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"}

// readContainerd reads a file of containerd's and then those that are imported, which override it (LoadConfig in
// cmd/containerd/server/config/config.go).
func (r Runtime) readContainerd(file string, c *configured) error {
	seen := map[string]bool{}
	for pending := []string{file}; len(pending) > 0; pending = pending[1:] {
		file := pending[0]
		if seen[file] {
			continue
		}
		seen[file] = true
		conf, err := r.readTOML(file)
		if err != nil {
			return err
		}
		c.overrideContainerd(conf, semver.Compare(r.Version, "v2") < 0) // one that is not known is older
		for _, pattern := range stringsOf(lookUp(conf, "imports")) {
			if !filepath.IsAbs(pattern) {
				pattern = filepath.Join(filepath.Dir(file), pattern)
			}
			imported, err := r.root().Glob(pattern)
			if err != nil {
				return fmt.Errorf("%s: imports: %w", file, err)
			}
			pending = append(pending, imported...)
		}
	}
	return nil
}

// overrideContainerd takes what another file says. containerd 2 merges what two files say of a plugin. Before, the later file's section
// took the place of the other one, and what it does not say is the default (mergeConfig).
func (c *configured) overrideContainerd(conf map[string]any, replaces bool) {
	for _, plugin := range criPlugins {
		c.noPods = c.noPods || slices.Contains(stringsOf(lookUp(conf, "disabled_plugins")), plugin)
		if replaces && lookUp(conf, "plugins", plugin) != nil {
			c.netDir, c.binDirs = "", nil
		}
		cni := []string{"plugins", plugin, "cni"}
		c.override(stringsOf(lookUp(conf, append(cni, "conf_dir")...)), stringsOf(lookUp(conf, append(cni, "bin_dir")...)))
		c.override(nil, stringsOf(lookUp(conf, append(cni, "bin_dirs")...)))
	}
}

// readCRIO reads CRI-O's file and those in its directory, which override it.
func (r Runtime) readCRIO(file, dir string, c *configured) error {
	dropIns, err := r.root().Glob(filepath.Join(dir, "*"))
	if err != nil {
		return err
	}
	for _, one := range append([]string{file}, dropIns...) {
		conf, err := r.readTOML(one)
		if err != nil {
			return err
		}
		network, _ := lookUp(conf, "crio", "network").(map[string]any) // none: nothing
		c.override(stringsOf(network["network_dir"]), append(stringsOf(network["plugin_dirs"]), stringsOf(network["plugin_dir"])...))
	}
	return nil
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
