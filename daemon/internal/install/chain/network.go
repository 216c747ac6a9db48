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

// network is a parsed network configuration.
type network struct {
	file    string // base name in NetDir
	name    string
	members map[string]json.RawMessage
	plugins []json.RawMessage
	// inlinedOnly disables drop-in files.
	inlinedOnly bool
	// unsupported says why the plugin cannot be in the network; nil if it can.
	unsupported error
}

const dropInName = "10-probelet.conf"

// primary returns the network that the runtime would use without us, which is that of the first file. If the first file is invalid, a
// runtime may use the next one; primary returns an error instead, because most likely the file's owner is still writing it.
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
			continue // renamed or removed meanwhile; the watcher will notice
		}
		if err != nil { // for example a symlink that dangles in our mount namespace but not in the runtime's
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

// parse parses a configuration as libcni does: the extension .conflist means a list of plugins, any other a single plugin, which
// becomes a list. It rejects what libcni rejects.
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
		w.unsupported = errors.New("plugins: empty in the network's own file, so the plugin might come first in the chain")
		return nil
	}
	return json.Unmarshal(w.members["plugins"], &w.plugins)
}

// oldestCNI is the oldest version of the CNI specification that the plugin supports: older ones have no prevResult.
const oldestCNI = "0.3.0"

func (w *network) tooOld() error {
	var version string
	var versions []string
	_ = json.Unmarshal(w.members["cniVersion"], &version) // not a string: no version
	_ = json.Unmarshal(w.members["cniVersions"], &versions)
	if slices.ContainsFunc(append(versions, version), func(v string) bool { return semver.Compare("v"+v, "v"+oldestCNI) >= 0 }) {
		return nil
	}
	return fmt.Errorf("cniVersion %q: must be %s or later", version, oldestCNI)
}

func pluginType(conf json.RawMessage) string {
	var plugin struct {
		Type string `json:"type"`
	}
	_ = json.Unmarshal(conf, &plugin) // not an object: no type
	return plugin.Type
}

// has reports whether the network has the plugin without Join: in its list, or in a network that one of its plugins delegates to.
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

// readsDropIns reports whether runtimes that support drop-ins read those of this network. Only lists have drop-ins.
func (w *network) readsDropIns() bool { return !w.inlinedOnly && filepath.Ext(w.file) == ".conflist" }
