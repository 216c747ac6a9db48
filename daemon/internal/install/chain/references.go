package chain

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/probelet/probelet/daemon/internal/install/runtimes"
)

// Reference is a place in a file that makes a runtime or another plugin run our plugin or read one of our files.
type Reference struct {
	File  string
	Place string // such as delegates[0].plugins[1].type; empty: the file is not JSON
}

func (r Reference) String() string {
	if r.Place == "" {
		return r.File
	}
	return r.File + ": " + r.Place
}

// maxReferring is the largest file that is searched, in bytes. Network configurations are far smaller.
const maxReferring = 1 << 20

// References returns all references below NetDir in files that Join did not write. It searches files of any name: a configuration that
// was renamed, as Cilium does (*.cilium_bak), may be renamed back. It follows symlinks, and NetDir itself may be one.
func (n Node) References() ([]Reference, error) { return n.referencesIn(n.NetDir, nil, true) }

// defaultNetDir is the directory of network configurations that runtimes read unless told otherwise (DefaultConfig in containerd's
// internal/cri/config, defaultNetworkDir in CRI-O's pkg/config, --cni-conf-dir of cri-dockerd).
const defaultNetDir = "/etc/cni/net.d"

// Elsewhere returns the references in other directories than NetDir that runtimes read networks from, unless the runtime does not look
// for plugins in BinDir. It includes files that Join wrote there, because Leave does not reach them. It is best effort.
func (n Node) Elsewhere() (all []Reference) {
	for _, r := range n.runtimes() {
		conf, err := r.Configured()
		if err != nil {
			n.Log.Debug("failed to read the runtime's configuration", "runtime", r, "error", err)
		}
		dir := cmp.Or(conf.NetDir, defaultNetDir)
		isBinDir := func(dir string) bool { return r.SameDir(dir, n.BinDir) }
		if conf.NoPods || r.SameDir(dir, n.NetDir) || len(conf.BinDirs) > 0 && !slices.ContainsFunc(conf.BinDirs, isBinDir) {
			continue
		}
		found, err := referencesOf(r, dir)
		if err != nil {
			n.Log.Warn("failed to read the runtime's network configurations", "runtime", r, "dir", dir, "error", err)
		}
		all = append(all, found...)
	}
	return all
}

// referencesOf returns the references below a directory of the runtime's file system, including files that Join wrote.
func referencesOf(r runtimes.Runtime, dir string) ([]Reference, error) {
	opened, err := r.Root().Open(dir)
	if err != nil {
		return nil, skipGone(err)
	}
	defer opened.Close() //nolint:errcheck // read only
	here := fmt.Sprintf("/proc/self/fd/%d", opened.Fd())
	found, err := Node{NetDir: here}.referencesIn(here, nil, false)
	for i := range found {
		found[i].File = filepath.Join(dir, strings.TrimPrefix(found[i].File, here))
	}
	return found, err
}

// referencesIn searches a directory, unless it is one of its own ancestors (by): symlinks may form cycles.
func (n Node) referencesIn(dir string, by []os.FileInfo, butOurs bool) (all []Reference, err error) {
	this, err := os.Stat(dir)
	if err != nil || slices.ContainsFunc(by, func(one os.FileInfo) bool { return os.SameFile(one, this) }) {
		return nil, skipGone(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, skipGone(err)
	}
	var ours []string
	if butOurs {
		ours = n.ours()
	}
	for _, entry := range entries {
		file := filepath.Join(dir, entry.Name())
		info, err := os.Stat(file)
		switch {
		case err != nil: // removed meanwhile, or a dangling symlink
		case info.IsDir():
			below, err := n.referencesIn(file, append(slices.Clone(by), this), butOurs)
			if err != nil {
				return nil, err
			}
			all = append(all, below...)
		case info.Mode().IsRegular() && info.Size() <= maxReferring && !slices.Contains(ours, file) && !n.isInterrupted(file):
			text, err := os.ReadFile(file)
			if skipGone(err) != nil {
				return nil, err
			}
			for _, place := range places(text) {
				all = append(all, Reference{file, place})
			}
		}
	}
	return all, nil
}

// isNamed reports whether a file that is not ours contains the path of our file.
func (n Node) isNamed(file string) (bool, error) {
	all, err := n.References()
	return slices.ContainsFunc(all, func(r Reference) bool {
		text, err := os.ReadFile(r.File)
		return err == nil && bytes.Contains(text, []byte("/"+filepath.Base(file)))
	}), err
}

// names reports whether the network contains the path of a file.
func (w *network) names(file string) bool {
	return slices.ContainsFunc(w.plugins, func(conf json.RawMessage) bool { return bytes.Contains(conf, []byte("/"+filepath.Base(file))) })
}

// isInterrupted reports whether a file was left by an interrupted write of ours.
func (n Node) isInterrupted(file string) bool {
	return slices.ContainsFunc(n.interrupted(), func(pattern string) bool {
		matches, _ := filepath.Match(pattern, file)
		return matches
	})
}

func skipGone(err error) error {
	if os.IsNotExist(err) {
		return nil
	}
	return err
}

// places returns the places in a file that refer to the plugin.
func places(text []byte) []string {
	var value any
	if json.Unmarshal(text, &value) != nil {
		if bytes.Contains(text, []byte(`"`+PluginType+`"`)) || namesPlugin.Match(text) || slices.ContainsFunc(copyNames, func(name string) bool { return bytes.Contains(text, []byte("/"+name)) }) {
			return []string{""}
		}
		return nil
	}
	return placesIn(value, "")
}

func placesIn(value any, at string) (all []string) {
	switch v := value.(type) {
	case map[string]any:
		for _, key := range slices.Sorted(maps.Keys(v)) {
			place := strings.TrimPrefix(at+"."+key, ".")
			if text, ok := v[key].(string); ok && (strings.EqualFold(key, "type") && text == PluginType || namesCopy(text) || namesPlugin.MatchString(text)) {
				all = append(all, place)
			}
			all = append(all, placesIn(v[key], place)...)
		}
	case []any:
		for i, one := range v {
			place := fmt.Sprintf("%s[%d]", at, i)
			if text, ok := one.(string); ok && namesCopy(text) {
				all = append(all, place)
			}
			all = append(all, placesIn(one, place)...)
		}
	}
	return all
}

// namesPlugin matches the plugin's type in YAML and in JSON inside a string.
var namesPlugin = regexp.MustCompile(`\btype\\?["']?\s*:\s*\\?["']?` + regexp.QuoteMeta(PluginType) + `(?:[\\"'\s,}\]]|$)`)

// namesCopy reports whether a string is the path of a copy that Join writes, as in Multus' clusterNetwork.
func namesCopy(text string) bool {
	return filepath.IsAbs(text) && slices.Contains(copyNames, filepath.Base(text))
}
