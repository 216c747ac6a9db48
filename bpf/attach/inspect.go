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

// Inspector checks all attachments of a node repeatedly. It lists devices once per round, and it reads pins and filters only if they
// have changed: it detects changed pins by the timestamps of their directory, and changed filters by the kernel's notifications. It
// reads tcx and XDP programs every time, because the kernel sends no notifications about them. An Inspector is not safe for
// concurrent use, and belongs to the network namespace where it was created.
type Inspector struct {
	datapath *datapath.Datapath
	checker  Checker // its devices are outdated
	memory   *memory
}

// NewInspector returns an Inspector that listens for changes of filters.
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

// Close stops listening.
func (i *Inspector) Close() error { return unix.Close(i.memory.news) }

// Begin starts a round: it returns a Checker for the current state, valid until the next call.
func (i *Inspector) Begin() (*Checker, error) {
	if err := i.memory.begin(); err != nil {
		return nil, err
	}
	c := i.checker
	var err error
	c.devices, err = i.datapath.Devices()
	return &c, err
}

// Links returns the node's devices by index, as of the last Begin.
func (i *Inspector) Links() map[int]Link { return i.memory.links }

// Promotable is like the function Promotable, for an attachment checked in this round.
func (i *Inspector) Promotable(id ID) bool { return i.memory.pins[id].clsact }

// Accounted reports whether every device that the programs know belongs to an attachment checked in this round.
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

// memory caches what an Inspector has read. A nil memory caches nothing.
type memory struct {
	links     map[int]Link
	pins, old map[ID]pins // of this round and the previous one
	filters   map[filterAt]bool
	news      int // netlink socket for notifications about filters and qdiscs
}

// pins caches the contents of an attachment's directory.
type pins struct {
	device datapath.DeviceKey
	clsact bool // the marker viaClsact exists
	path   string
	stamp  datapath.Stamp // zero: must be read again
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

// pinsOf returns the pins of an attachment. The error is ErrNotAttached if there are none.
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

// foundFilter remembers that the side's filter exists. The next begin receives whatever has changed since this one.
func (m *memory) foundFilter(ifindex int, s side) {
	if m != nil {
		m.filters[filterAt{ifindex, s.parent}] = true
	}
}

// newsBytes holds the notifications of a whole round: every request for a clsact makes the kernel notify all listeners (see
// ingressQdisc), and if any of these were lost, the next round would have to request every clsact again. A message takes less than
// 1 KiB.
const newsBytes = 8 << 20

// listenForFilters returns a socket that receives a notification for each change of a filter or qdisc (rtnetlink(7)).
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

// hear drops cached filters of devices with notifications, or all of them if notifications were lost (ENOBUFS).
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
			// A new qdisc removes no filters, and the kernel sends RTM_NEWQDISC on every request for one (ingressQdisc).
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
