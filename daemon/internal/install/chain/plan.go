package chain

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Plan returns what Join would do, without doing it. The errors are those of Join.
func (n Node) Plan(way Way) (Joined, error) {
	w, j, err := n.joinable()
	if err == nil {
		err = n.searched(w) // not findable: the plugin's binary is yet to be installed
	}
	if err != nil {
		return j, err
	}
	p, err := n.plan(w, way, j)
	return p.Joined, err
}

// planned extends Joined by the content of the file to write, if File is set.
type planned struct {
	Joined
	text []byte
	like fs.FileInfo // supplies the mode and owner of the file; nil: readable by everyone, as it contains no secrets
}

// plan decides how the plugin joins the chain of a network.
func (n Node) plan(w *network, way Way, j Joined) (p planned, err error) {
	p.Joined = j
	original, file, err := n.throughOther(w)
	switch {
	case err != nil:
		return p, err
	case original != nil:
		return p.copied(n, file, original)
	case w.has() || way == DropIn && n.hasDropIn(w):
		return p, nil // nothing to do
	case filepath.Base(w.name) != w.name || w.name == "." || w.name == "..":
		return p, fmt.Errorf("%s: name %q: must be a file name", j.Primary, w.name)
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

// copied completes a plan to copy a network's configuration.
func (p planned) copied(n Node, file string, w *network) (planned, error) {
	p.Way, p.File = Copy, file
	var err error
	if p.text, err = n.withPlugin(w); err != nil {
		return p, err
	}
	p.like, err = os.Stat(filepath.Join(n.NetDir, w.file)) // it may contain a key
	return p, err
}
