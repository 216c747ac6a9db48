package runtimes

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
	"golang.org/x/mod/semver"

	"github.com/probelet/probelet/daemon/internal/hostfs"
)

// SameDir reports whether a directory of the runtime's is one of ours. In a pod they may be different mounts of the same.
func (r Runtime) SameDir(theirs, ours string) bool {
	if filepath.Clean(theirs) == filepath.Clean(ours) {
		return true
	}
	a, err := r.Root().Stat(theirs)
	b, ourErr := os.Stat(ours)
	return err == nil && ourErr == nil && os.SameFile(a, b)
}

// Root returns the file system that the runtime sees.
func (r Runtime) Root() hostfs.FS { return hostfs.FS{Root: filepath.Join(r.Dir, "root")} }

// Configuration is what a runtime's command line and configuration say of CNI. What they do not say is empty: defaults differ from
// build to build (Debian's containerd looks for plugins in /usr/lib/cni).
type Configuration struct {
	NetDir  string
	BinDirs []string
	// NoPods: it runs none, as Docker's containerd.
	NoPods bool
}

// override takes what is said elsewhere.
func (c *Configuration) override(netDir, binDirs []string) {
	if len(netDir) > 0 {
		c.NetDir = netDir[len(netDir)-1]
	}
	if len(binDirs) > 0 {
		c.BinDirs = binDirs
	}
}

// Configured reads a runtime's command line and configuration.
func (r Runtime) Configured() (c Configuration, err error) {
	text, err := os.ReadFile(filepath.Join(r.Dir, "cmdline"))
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
func (r Runtime) readContainerd(file string, c *Configuration) error {
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
			imported, err := r.Root().Glob(pattern)
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
func (c *Configuration) overrideContainerd(conf map[string]any, replaces bool) {
	for _, plugin := range criPlugins {
		c.NoPods = c.NoPods || slices.Contains(stringsOf(lookUp(conf, "disabled_plugins")), plugin)
		if replaces && lookUp(conf, "plugins", plugin) != nil {
			c.NetDir, c.BinDirs = "", nil
		}
		cni := []string{"plugins", plugin, "cni"}
		c.override(stringsOf(lookUp(conf, append(cni, "conf_dir")...)), stringsOf(lookUp(conf, append(cni, "bin_dir")...)))
		c.override(nil, stringsOf(lookUp(conf, append(cni, "bin_dirs")...)))
	}
}

// readCRIO reads CRI-O's file and those in its directory, which override it.
func (r Runtime) readCRIO(file, dir string, c *Configuration) error {
	dropIns, err := r.Root().Glob(filepath.Join(dir, "*"))
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
	text, err := r.Root().ReadFile(file)
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
