package attach

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/datapath"
)

// Inspector checks all attachments of a node again and again. It lists devices once for all of them, and reads pins and filters
// only when they have changed: of a directory of pins its times tell, of filters the kernel's notifications. tcx programs and XDP
// programs, of which the kernel notifies nobody, are looked at each time. An Inspector is not safe for concurrent use, and
// belongs to the network namespace in which it was made.
type Inspector struct {
	datapath *datapath.Datapath
	checker  Checker // with devices of no time in particular
	memory   *memory
}

// NewInspector begins to listen for changes of filters.
func NewInspector(d *datapath.Datapath, bpfDir string) (*Inspector, error) {
	news, err := listenForFilters()
	if err != nil {
		return nil, fmt.Errorf("listening for changes of tc filters: %w", err)
	}
	c, err := NewChecker(d, bpfDir)
	if err != nil {
		return nil, errors.Join(err, unix.Close(news))
	}
	c.memory = &memory{news: news, filters: map[filterAt]bool{}}
	return &Inspector{d, *c, c.memory}, nil
}

// Close ends the listening.
func (i *Inspector) Close() error { return unix.Close(i.memory.news) }

// Begin returns a Checker for the attachments as they are now. It is good until the next call.
func (i *Inspector) Begin() (*Checker, error) {
	if err := i.memory.begin(); err != nil {
		return nil, err
	}
	c := i.checker
	var err error
	c.devices, err = i.datapath.Devices()
	return &c, err
}

// Links returns the node's devices, by index, as Begin found them.
func (i *Inspector) Links() map[int]Link { return i.memory.links }

// Promotable is the function Promotable, of an attachment that has just been checked.
func (i *Inspector) Promotable(id ID) bool { return i.memory.pins[id].clsact }

// Accounted reports whether each device that the programs know belongs to an attachment that has just been checked.
func (i *Inspector) Accounted(c *Checker) bool {
	known := make(map[datapath.DeviceKey]bool, len(i.memory.pins))
	for _, p := range i.memory.pins {
		known[p.device] = true
	}
	for _, device := range c.devices {
		if !known[device.Key] {
			return false
		}
	}
	return true
}

// memory is what an Inspector remembers. The nil memory remembers nothing.
type memory struct {
	links     map[int]Link
	pins, old map[ID]pins // of this look and of the previous one
	filters   map[filterAt]bool
	news      int // a netlink socket that hears of filters and qdiscs
}

// pins is the directory of an attachment.
type pins struct {
	device datapath.DeviceKey
	clsact bool // the marker viaClsact is there
	path   string
	stamp  datapath.Stamp // zero: it is to be read again
}

type filterAt struct {
	ifindex int
	parent  uint32
}

func (m *memory) begin() (err error) {
	m.old, m.pins = m.pins, make(map[ID]pins, len(m.pins))
	m.hear()
	m.links, err = Links()
	return err
}

// pinsOf returns what is pinned of an attachment. The error is ErrNotAttached if nothing is.
func (m *memory) pinsOf(bpfDir string, id ID) (pins, error) {
	var known pins
	if m != nil {
		known = m.old[id]
	}
	if known.path == "" {
		known.path = filepath.Join(datapath.AttachmentsDir(bpfDir), id.name())
	}
	now, err := datapath.StampOf(known.path)
	if datapath.Absent(err) {
		return pins{}, ErrNotAttached
	}
	if err != nil {
		return pins{}, err
	}
	if known.stamp != now {
		if known.device, err = deviceIn(known.path); err != nil {
			return pins{}, err
		}
		_, err = os.Stat(filepath.Join(known.path, viaClsact))
		known.clsact, known.stamp = err == nil, now.Settled()
	}
	if m != nil {
		m.pins[id] = known
	}
	return known, nil
}

func (m *memory) link(ifindex int) (Link, error) {
	if m == nil {
		device, err := linkAt(ifindex)
		if err != nil {
			return Link{}, err
		}
		return Link{device.Attrs().Name, device.Attrs().NetNsID, xdpOn(device)}, nil
	}
	l, ok := m.links[ifindex]
	if !ok {
		return l, fmt.Errorf("device %d: %w", ifindex, os.ErrNotExist)
	}
	return l, nil
}

func (m *memory) hasFilter(ifindex int, s side) bool {
	return m != nil && m.filters[filterAt{ifindex, s.parent}]
}

// foundFilter remembers that the side's filter is there. What changed since begin will be heard by the next one.
func (m *memory) foundFilter(ifindex int, s side) {
	if m != nil {
		m.filters[filterAt{ifindex, s.parent}] = true
	}
}

// newsBytes holds the news of a whole look: each time the kernel is asked for a clsact it tells all listeners, too (see ingressQdisc),
// and if these lost news the next look would have to ask for all of them again. A message takes less than 1 KiB.
const newsBytes = 8 << 20

// listenForFilters returns a socket that is told of each change of a filter or qdisc (rtnetlink(7)).
func listenForFilters() (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return -1, err
	}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, newsBytes),
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (unix.RTNLGRP_TC - 1)}),
	)
	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// hear forgets the filters of devices that there was news of; all if news was lost (ENOBUFS).
func (m *memory) hear() {
	changed := map[int]bool{}
	for text := make([]byte, 1<<16); ; {
		n, _, err := unix.Recvfrom(m.news, text, 0)
		if errors.Is(err, unix.EAGAIN) {
			break
		}
		messages, parseErr := syscall.ParseNetlinkMessage(text[:max(n, 0)])
		if err != nil || parseErr != nil {
			clear(m.filters)
			if errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EINTR) || err == nil {
				continue
			}
			break
		}
		for _, message := range messages {
			// A new qdisc takes no filters away, and the kernel tells of one whenever somebody asks for it (ingressQdisc).
			if message.Header.Type != unix.RTM_NEWQDISC && len(message.Data) >= nl.SizeofTcMsg {
				changed[int(nl.DeserializeTcMsg(message.Data).Ifindex)] = true
			}
		}
	}
	for at := range m.filters {
		_, listed := m.links[at.ifindex]
		if changed[at.ifindex] || !listed {
			delete(m.filters, at)
		}
	}
}
