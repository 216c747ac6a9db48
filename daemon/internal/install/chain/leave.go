package chain

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// Leave removes the plugin from the chain. changed reports whether it was there.
func (n Node) Leave(ctx context.Context) (changed bool, err error) {
	locked, err := n.lock(ctx)
	if err != nil {
		return false, err
	}
	defer locked.Release()
	changed, err = n.leaveBut("")
	// An interrupted Join or Leave may have left an empty directory for drop-ins.
	if w, err := n.primary(); err == nil && filepath.Base(w.name) == w.name {
		n.removeEmpty(filepath.Join(n.NetDir, w.name))
	}
	return changed, err
}

// leaveBut removes all of our files except keep, and the leftovers of interrupted writes. A copy whose path another plugin uses, as
// Multus does, stays without our plugin in it: without the file no pod could start.
func (n Node) leaveBut(keep string) (changed bool, err error) {
	var errs []error
	for _, file := range n.ours() {
		if file == keep {
			continue
		}
		if named, err := n.isNamed(file); err != nil {
			errs = append(errs, err)
			continue
		} else if named {
			disarmed, err := n.disarm(file)
			changed, errs = changed || disarmed, append(errs, err)
			continue
		}
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
			continue
		}
		changed = true
		n.removeEmpty(filepath.Dir(file))
	}
	for _, pattern := range n.interrupted() {
		errs = append(errs, removeAll(pattern))
	}
	if changed {
		errs = append(errs, syncDir(n.NetDir), n.Wake())
	}
	return changed, errors.Join(errs...)
}

// ours returns the files that Join wrote.
func (n Node) ours() []string {
	var files []string
	for _, name := range copyNames {
		file := filepath.Join(n.NetDir, name)
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		// A truncated file is not ours: we write atomically.
		if found, err := parse(name, text); err == nil && found.members[derivedFrom] != nil {
			files = append(files, file)
		}
	}
	dropIns, _ := filepath.Glob(filepath.Join(n.NetDir, "*", dropInName))
	for _, file := range dropIns {
		if text, err := os.ReadFile(file); err == nil && pluginType(text) == PluginType {
			files = append(files, file)
		}
	}
	return files
}
