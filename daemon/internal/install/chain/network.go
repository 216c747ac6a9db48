package chain

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/mod/semver"
)

// network is the configuration that the runtime takes: the first one that it can read.
type network struct {
	file    string // name in NetDir
	name    string
	members map[string]json.RawMessage
	plugins []json.RawMessage
	// inlinedOnly: drop-in files are not read.
	inlinedOnly bool
	// unsupported is why the plugin cannot be in it; nil if it can.
	unsupported error
}

const dropInName = "10-probelet.conf"

// primary finds the network that the runtime would take without us. The first file is it, or nothing: a runtime may take
// the next one if that cannot be used, but more often its owner is just writing it.
func (n Node) primary() (*network, error) {
	entries, err := os.ReadDir(n.NetDir) // sorted
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		if e.IsDir() || !slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(e.Name())) {
			continue
		}
		text, err := os.ReadFile(filepath.Join(n.NetDir, e.Name()))
		if _, link := os.Lstat(filepath.Join(n.NetDir, e.Name())); errors.Is(err, fs.ErrNotExist) && link != nil {
			continue // renamed or removed meanwhile, which somebody will tell of
		}
		if err != nil { // such as: a link that leads nowhere from here; the runtime may see more
			return nil, fmt.Errorf("%w: %w", ErrUnusable, err)
		}
		found, err := parse(e.Name(), text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w: %w", filepath.Join(n.NetDir, e.Name()), ErrUnusable, err)
		}
		if _, ours := found.members[derivedFrom]; ours {
			continue
		}
		found.file = e.Name()
		return found, nil
	}
	return nil, fmt.Errorf("%w in %s", ErrNoNetwork, n.NetDir)
}

// parse reads a configuration as libcni does, for whom the file's name decides: a .conflist is a list of plugins, any other
// a single plugin's configuration, which becomes a list. What libcni refuses is refused.
func parse(file string, text []byte) (*network, error) {
	n := &network{file: file}
	if err := json.Unmarshal(text, &n.members); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(n.members["name"], &n.name); err != nil || n.name == "" {
		return nil, errors.New("name: must be set")
	}
	var err error
	if filepath.Ext(file) == ".conflist" {
		err = n.parseList(text)
	} else {
		err = n.parseSingle(text)
	}
	if err == nil && n.unsupported == nil {
		n.unsupported = n.tooOld()
	}
	return n, err
}

func (w *network) parseSingle(text []byte) error {
	if _, err := libcni.NetworkPluginConfFromBytes(text); err != nil {
		return err
	}
	single := map[string]json.RawMessage{"name": w.members["name"]}
	if version, ok := w.members["cniVersion"]; ok {
		single["cniVersion"] = version
	}
	w.plugins, w.members = []json.RawMessage{bytes.TrimSpace(text)}, single
	return nil
}

func (w *network) parseList(text []byte) error {
	list, err := libcni.NetworkConfFromBytes(text)
	if err != nil {
		return err
	}
	w.inlinedOnly = list.LoadOnlyInlinedPlugins
	if len(list.Plugins) == 0 {
		w.unsupported = errors.New("plugins: there are none in its own file, so nothing is certain to come before the plugin")
		return nil
	}
	return json.Unmarshal(w.members["plugins"], &w.plugins)
}

// oldestCNI is the oldest version of the CNI specification whose results the plugin reads; before it there was no prevResult.
const oldestCNI = "0.3.0"

func (w *network) tooOld() error {
	var version string
	var versions []string
	_ = json.Unmarshal(w.members["cniVersion"], &version) // of what is no string: none
	_ = json.Unmarshal(w.members["cniVersions"], &versions)
	if slices.ContainsFunc(append(versions, version), func(v string) bool { return semver.Compare("v"+v, "v"+oldestCNI) >= 0 }) {
		return nil
	}
	return fmt.Errorf("cniVersion: %q: must be %s or newer", version, oldestCNI)
}

func pluginType(conf json.RawMessage) string {
	var plugin struct {
		Type string `json:"type"`
	}
	_ = json.Unmarshal(conf, &plugin) // of what is no object: none
	return plugin.Type
}

// has reports whether the plugin is in the network already and not by Join: in its list, or in what one of its plugins delegates to.
func (w *network) has() bool {
	return slices.ContainsFunc(w.plugins, func(conf json.RawMessage) bool { return len(places(conf)) > 0 })
}

func isPlugin(conf json.RawMessage) bool { return pluginType(conf) == PluginType }

func read(file string) (*network, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	w, err := parse(filepath.Base(file), text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return w, nil
}

// readsDropIns is whether a runtime that knows drop-ins looks for those of this network: they are of lists only.
func (w *network) readsDropIns() bool { return !w.inlinedOnly && filepath.Ext(w.file) == ".conflist" }
