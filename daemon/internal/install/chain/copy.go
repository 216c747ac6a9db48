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

// derivedFrom is the member of a copy that says what it is a copy of.
const derivedFrom = "probelet.dev/derivedFrom"

// copyNames are those that a copy may have: the first one that sorts before what it is a copy of.
var copyNames = []string{"00-probelet.conflist", "00-0-probelet.conflist", "!00-probelet.conflist"}

// copyFile returns the file that a copy of a network's configuration takes.
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

// withPlugin is the text of a copy.
func (n Node) withPlugin(w *network) ([]byte, error) {
	entry, err := n.plugin()
	if err != nil {
		return nil, err
	}
	return w.derived(w.file, append(slices.Clone(w.plugins), entry))
}

// derived is the text of a configuration that has these plugins, and is otherwise the network's.
func (w *network) derived(from string, plugins []json.RawMessage) ([]byte, error) {
	members := map[string]any{}
	for member, value := range w.members {
		members[member] = value
	}
	members["plugins"], members[derivedFrom] = plugins, from
	text, err := json.MarshalIndent(members, "", "  ")
	return append(text, '\n'), err
}

// throughOther returns the network that a copy of ours is of, and that copy, if the primary network, such as Multus', takes its own from
// it: by its path, or because what was in it has been copied. Then the copy must stay, under its name, and as its original is. The error is
// ErrUnusable if the path of a copy is in the network and its original cannot be read, as while its owner writes it.
func (n Node) throughOther(w *network) (original *network, copied string, err error) {
	if !w.has() || slices.ContainsFunc(w.plugins, isPlugin) {
		return nil, "", nil
	}
	for _, file := range n.ours() {
		original, err := n.original(file)
		switch {
		case err != nil && w.names(file):
			return nil, "", fmt.Errorf("%s: %w: it takes its network from %s: %w", filepath.Join(n.NetDir, w.file), ErrUnusable, file, err)
		case err == nil && original.file != w.file:
			return original, file, nil
		}
	}
	return nil, "", nil
}

// original returns the network that a copy is of, if the plugin can be in it.
func (n Node) original(copied string) (*network, error) {
	found, err := read(copied)
	if err != nil {
		return nil, err
	}
	var from string
	if err := json.Unmarshal(found.members[derivedFrom], &from); err != nil || filepath.Base(from) != from {
		return nil, fmt.Errorf("%s: %s: no file's name", copied, derivedFrom)
	}
	w, err := read(filepath.Join(n.NetDir, from))
	if err == nil && (w.members[derivedFrom] != nil || w.has()) {
		err = fmt.Errorf("%s has the plugin itself", filepath.Join(n.NetDir, from))
	}
	if err != nil {
		return nil, err
	}
	return w, w.unsupported
}

// isCopy is whether a copy comes before its original, and has what that has now. Our own fields may be others.
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

// disarm takes the plugin out of a copy.
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
