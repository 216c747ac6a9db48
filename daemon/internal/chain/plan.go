package chain

import "path/filepath"

// Plan says how Join would put the plugin into the chain, and changes nothing. The errors are those of Join.
func (n Node) Plan(way Way) (Joined, error) {
	w, j, err := n.joinable()
	if err == nil {
		err = n.searched(w) // the plugin itself is yet to come
	}
	if err != nil {
		return j, err
	}
	if original, file, err := n.throughOther(w); err != nil {
		return j, err
	} else if original != nil {
		j.Way, j.File = Copy, file
		return j, nil
	}
	if w.has() || way == DropIn && n.hasDropIn(w) {
		return j, nil // nothing is to be done
	}
	if j.Way = way; way == DropIn && w.readsDropIns() {
		j.File = filepath.Join(n.NetDir, w.name, dropInName)
		return j, nil
	}
	j.Way = Copy
	name, _, err := n.copyOf(w)
	j.File = filepath.Join(n.NetDir, name)
	return j, err
}
