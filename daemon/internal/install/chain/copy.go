package chain

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
)

// derivedFrom is the key in a copy that names the original.
const derivedFrom = "probelet.dev/derivedFrom"

// copyNames are the file names for copies. A copy takes the first one that sorts before its original.
var copyNames = []string{"00-probelet.conflist", "00-0-probelet.conflist", "!00-probelet.conflist"}

// copyFile returns the path for a copy of a network's configuration.
func (n Node) copyFile(w *network) (string, error) {
	ours := n.ours()
	for _, name := range copyNames {
		file := filepath.Join(n.NetDir, name)
		_, err := os.Lstat(file)
		if name < w.file && (slices.Contains(ours, file) || errors.Is(err, fs.ErrNotExist)) {
			return file, nil
		}
	}
	return "", fmt.Errorf("%s: no free name sorts before it", filepath.Join(n.NetDir, w.file))
}

// withPlugin returns a copy of a network's configuration, with the plugin appended.
func (n Node) withPlugin(w *network) ([]byte, error) {
	entry, err := n.plugin()
	if err != nil {
		return nil, err
	}
	return w.derived(w.file, append(slices.Clone(w.plugins), entry))
}

// derived returns the network's configuration with other plugins, marked as a copy of from.
func (w *network) derived(from string, plugins []json.RawMessage) ([]byte, error) {
	members := map[string]any{}
	for member, value := range w.members {
		members[member] = value
	}
	members["plugins"], members[derivedFrom] = plugins, from
	text, err := json.MarshalIndent(members, "", "  ")
	return append(text, '\n'), err
}

// throughOther handles a primary network that delegates to our copy of another one, as Multus does, either by the copy's path or by an
// inlined copy of its content. It returns the original network and the path of the copy, which must then keep its name and follow its
// original. The error is ErrUnusable if the network names the path of a copy whose original cannot be read, for example while its owner
// is writing it.
func (n Node) throughOther(w *network) (original *network, copied string, err error) {
	if !w.has() || slices.ContainsFunc(w.plugins, isPlugin) {
		return nil, "", nil
	}
	for _, file := range n.ours() {
		original, err := n.original(file)
		switch {
		case err != nil && w.names(file):
			return nil, "", fmt.Errorf("%s: %w: it delegates to %s: %w", filepath.Join(n.NetDir, w.file), ErrUnusable, file, err)
		case err == nil && original.file != w.file:
			return original, file, nil
		}
	}
	return nil, "", nil
}

// original returns the network that a file is a copy of. It returns an error if the plugin cannot be in that network.
func (n Node) original(copied string) (*network, error) {
	found, err := read(copied)
	if err != nil {
		return nil, err
	}
	var from string
	if err := json.Unmarshal(found.members[derivedFrom], &from); err != nil || filepath.Base(from) != from {
		return nil, fmt.Errorf("%s: %s: must be a file name", copied, derivedFrom)
	}
	w, err := read(filepath.Join(n.NetDir, from))
	if err == nil && (w.members[derivedFrom] != nil || w.has()) {
		err = fmt.Errorf("%s includes the plugin", filepath.Join(n.NetDir, from))
	}
	if err != nil {
		return nil, err
	}
	return w, w.unsupported
}

// isCopy reports whether a copy sorts before its original and matches it, apart from the plugin's own fields.
func (n Node) isCopy(file string, w *network) bool {
	text, err := os.ReadFile(file)
	if err != nil || filepath.Base(file) >= w.file {
		return false
	}
	found, err := parse(file, text)
	if err != nil || len(found.plugins) != len(w.plugins)+1 {
		return false
	}
	delete(found.members, derivedFrom)
	found.members["plugins"], w.members["plugins"] = nil, nil
	same := func(a, b json.RawMessage) bool {
		var x, y bytes.Buffer
		return json.Compact(&x, a) == nil && json.Compact(&y, b) == nil && bytes.Equal(x.Bytes(), y.Bytes())
	}
	return slices.EqualFunc(found.plugins[:len(w.plugins)], w.plugins, same) &&
		maps.EqualFunc(found.members, w.members, func(a, b json.RawMessage) bool { return a == nil && b == nil || same(a, b) })
}

// disarm removes the plugin from a copy.
func (n Node) disarm(file string) (changed bool, err error) {
	w, err := read(file)
	if err != nil {
		return false, err
	}
	var from string
	plugins := slices.DeleteFunc(slices.Clone(w.plugins), isPlugin)
	if err := json.Unmarshal(w.members[derivedFrom], &from); err != nil || len(plugins) == len(w.plugins) {
		return false, err
	}
	text, err := w.derived(from, plugins)
	if err != nil {
		return false, err
	}
	like, err := os.Stat(file)
	if err != nil {
		return false, err
	}
	return n.put(file, text, like)
}
