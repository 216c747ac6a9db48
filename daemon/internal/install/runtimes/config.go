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

// SameDir reports whether a directory of the runtime's file system is the same as one of ours. In a pod ours may be another mount of
// it.
func (r Runtime) SameDir(theirs, ours string) bool {
	if filepath.Clean(theirs) == filepath.Clean(ours) {
		return true
	}
	a, err := r.Root().Stat(theirs)
	b, ourErr := os.Stat(ours)
	return err == nil && ourErr == nil && os.SameFile(a, b)
}

// Root returns the runtime's file system.
func (r Runtime) Root() hostfs.FS { return hostfs.FS{Root: filepath.Join(r.Dir, "root")} }

// Configuration holds the CNI settings from a runtime's command line and configuration files. Fields are empty where these are silent:
// defaults vary between builds (Debian's containerd looks for plugins in /usr/lib/cni).
type Configuration struct {
	NetDir  string
	BinDirs []string
	// NoPods reports that the runtime runs no pods, like Docker's containerd.
	NoPods bool
}

// override applies settings that take precedence.
func (c *Configuration) override(netDir, binDirs []string) {
	if len(netDir) > 0 {
		c.NetDir = netDir[len(netDir)-1]
	}
	if len(binDirs) > 0 {
		c.BinDirs = binDirs
	}
}

// Configured reads the runtime's command line and configuration files.
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

// flagValues returns the values of a flag, under any of its names.
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

func last(values []string, fallback string) string {
	if len(values) == 0 {
		return fallback
	}
	return values[len(values)-1]
}

func commas(values []string) (all []string) {
	for _, value := range values {
		all = append(all, strings.Split(value, ",")...)
	}
	return all
}

// criPlugins are the names of containerd's CRI plugin in versions 1, 2 and 3 of its configuration.
var criPlugins = []string{"cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"}

// readContainerd reads a containerd configuration file and the files that it imports, which override it (LoadConfig in
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
		c.overrideContainerd(conf, semver.Compare(r.Version, "v2") < 0) // an unknown version counts as older
		for _, pattern := range stringsOf(lookup(conf, "imports")) {
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

// overrideContainerd applies another file. containerd 2 merges the sections that two files have for a plugin. Before, the later file's
// section replaced the earlier one, and settings missing from it got their defaults (mergeConfig).
func (c *Configuration) overrideContainerd(conf map[string]any, replaces bool) {
	for _, plugin := range criPlugins {
		c.NoPods = c.NoPods || slices.Contains(stringsOf(lookup(conf, "disabled_plugins")), plugin)
		if replaces && lookup(conf, "plugins", plugin) != nil {
			c.NetDir, c.BinDirs = "", nil
		}
		cni := []string{"plugins", plugin, "cni"}
		c.override(stringsOf(lookup(conf, append(cni, "conf_dir")...)), stringsOf(lookup(conf, append(cni, "bin_dir")...)))
		c.override(nil, stringsOf(lookup(conf, append(cni, "bin_dirs")...)))
	}
}

// readCRIO reads CRI-O's configuration file and its drop-in directory, which overrides the file.
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
		network, _ := lookup(conf, "crio", "network").(map[string]any) // nil if there is none
		c.override(stringsOf(network["network_dir"]), append(stringsOf(network["plugin_dirs"]), stringsOf(network["plugin_dir"])...))
	}
	return nil
}

// readTOML parses a file. It returns nil if the file does not exist, as runtimes ignore that.
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

// lookup returns the value at a path of keys, or nil.
func lookup(conf map[string]any, path ...string) any {
	var value any = conf
	for _, key := range path {
		table, _ := value.(map[string]any)
		value = table[key]
	}
	return value
}

// stringsOf returns the non-empty strings in a value, which may be a string or a list.
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
