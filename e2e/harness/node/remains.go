package node

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
)

// Remains lists every trace that pods leave: pins, records, map entries, devices with their qdiscs and filters.
func (n *Node) Remains() ([]string, error) {
	found, err := n.entries()
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{n.BPFDir, filepath.Join(n.StateDir, "attachments")} {
		err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			found = append(found, path)
			return err
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	devices, err := netlinksafe.LinkList()
	if err != nil {
		return nil, err
	}
	for _, d := range devices {
		found = append(found, "device "+d.Attrs().Name)
		qdiscs, err := netlinksafe.QdiscList(d)
		if err != nil {
			return nil, err
		}
		for _, q := range qdiscs {
			found = append(found, fmt.Sprintf("qdisc %s of %s", q.Type(), d.Attrs().Name))
		}
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			filters, err := netlinksafe.FilterList(d, parent)
			if err != nil { // without a qdisc, there are no filters
				continue
			}
			for _, f := range filters {
				found = append(found, fmt.Sprintf("%s filter at %x of %s", f.Type(), parent, d.Attrs().Name))
			}
		}
	}
	slices.Sort(found)
	return found, nil
}

// entries counts the entries of each pinned map, except for connections, which come and go.
func (n *Node) entries() ([]string, error) {
	pins, err := filepath.Glob(filepath.Join(n.BPFDir, "*", "*"))
	if err != nil {
		return nil, err
	}
	var found []string
	for _, pin := range pins {
		m, err := ebpf.LoadPinnedMap(pin, nil)
		if err != nil {
			continue // not a map
		}
		if m.Type() == ebpf.Hash && filepath.Base(pin) != "flows" {
			if count := countEntries(m); count > 0 {
				found = append(found, fmt.Sprintf("%d entries of %s", count, filepath.Base(pin)))
			}
		}
		if err := m.Close(); err != nil {
			return nil, err
		}
	}
	return found, nil
}

func countEntries(m *ebpf.Map) (n int) {
	var key, value []byte
	for entries := m.Iterate(); entries.Next(&key, &value); {
		n++
	}
	return n
}

// Object identifies a BPF object in the kernel.
type Object struct {
	Kind string // map, link or program
	ID   uint32
}

// Pinned returns the objects that are pinned for the node's pods.
func (n *Node) Pinned() (map[Object]bool, error) {
	found := map[Object]bool{}
	err := filepath.WalkDir(n.BPFDir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !strings.Contains(path, "/attachments/") {
			return err
		}
		o, err := openPin(path)
		found[o] = true
		return err
	})
	return found, err
}

func openPin(pin string) (Object, error) {
	if m, err := ebpf.LoadPinnedMap(pin, nil); err == nil {
		defer m.Close() //nolint:errcheck // read only
		info, err := m.Info()
		if err != nil {
			return Object{}, err
		}
		id, _ := info.ID()
		return Object{"map", uint32(id)}, nil
	}
	if l, err := link.LoadPinnedLink(pin, nil); err == nil {
		defer l.Close() //nolint:errcheck // read only
		info, err := l.Info()
		if err != nil {
			return Object{}, err
		}
		return Object{"link", uint32(info.ID)}, nil
	}
	p, err := ebpf.LoadPinnedProgram(pin, nil)
	if err != nil {
		return Object{}, fmt.Errorf("%s: %w", pin, err)
	}
	defer p.Close() //nolint:errcheck // read only
	info, err := p.Info()
	if err != nil {
		return Object{}, err
	}
	id, _ := info.ID()
	return Object{"program", uint32(id)}, nil
}

// Exists reports whether the kernel still has the object.
func (o Object) Exists() (bool, error) {
	var object io.Closer
	var err error
	switch o.Kind {
	case "map":
		object, err = ebpf.NewMapFromID(ebpf.MapID(o.ID))
	case "link":
		object, err = link.NewFromID(link.ID(o.ID))
	default:
		object, err = ebpf.NewProgramFromID(ebpf.ProgramID(o.ID))
	}
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, object.Close()
}
