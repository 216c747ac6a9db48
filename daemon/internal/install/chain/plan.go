package chain

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Plan says how Join would put the plugin into the chain, and changes nothing. The errors are those of Join.
func (n Node) Plan(way Way) (Joined, error) {
	w, j, err := n.joinable()
	if err == nil {
		err = n.searched(w) // the plugin itself is yet to come
	}
	if err != nil {
		return j, err
	}
	p, err := n.plan(w, way, j)
	return p.Joined, err
}

// planned is how the plugin is to be in the chain, with the file that it takes, if it takes one.
type planned struct {
	Joined
	text []byte
	like fs.FileInfo // whose mode and owner the file has; nil: it is readable for all, as there is nothing secret in it
}

// plan decides how the plugin is to be in the chain of a network.
func (n Node) plan(w *network, way Way, j Joined) (p planned, err error) {
	p.Joined = j
	original, file, err := n.throughOther(w)
	switch {
	case err != nil:
		return p, err
	case original != nil:
		return p.copied(n, file, original)
	case w.has() || way == DropIn && n.hasDropIn(w):
		return p, nil // nothing is to be done
	case filepath.Base(w.name) != w.name || w.name == "." || w.name == "..":
		return p, fmt.Errorf("%s: name: %q: is no file's name", j.Primary, w.name)
	case way == DropIn && w.readsDropIns():
		p.Way, p.File = DropIn, filepath.Join(n.NetDir, w.name, dropInName)
		p.text, err = n.plugin()
		p.text = append(p.text, '\n')
		return p, err
	}
	if file, err = n.copyFile(w); err != nil {
		return p, err
	}
	return p.copied(n, file, w)
}

// copied is a plan to copy a network's configuration.
func (p planned) copied(n Node, file string, w *network) (planned, error) {
	p.Way, p.File = Copy, file
	var err error
	if p.text, err = n.withPlugin(w); err != nil {
		return p, err
	}
	p.like, err = os.Stat(filepath.Join(n.NetDir, w.file)) // a key may be in it
	return p, err
}
