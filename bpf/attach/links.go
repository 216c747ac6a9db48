package attach

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Link holds what Check needs to know about a network device.
type Link struct {
	Name string
	NSID int            // id of its peer's namespace (IFLA_LINK_NETNSID); -1: none
	XDP  ebpf.ProgramID // 0: none
}

const (
	extSkipStats = 1 << 3 // RTEXT_FILTER_SKIP_STATS in linux/rtnetlink.h
	typeMask     = 0x3fff // NLA_TYPE_MASK in linux/netlink.h
)

// Links returns the devices of this network namespace by index.
func Links() (links map[int]Link, err error) {
	for range 5 { // like package netlinksafe: a list may be incomplete if devices came or went meanwhile
		links, err = linksOnce()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("listing devices: %w", err)
	}
	return links, nil
}

func linksOnce() (map[int]Link, error) {
	request := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
	request.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	request.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(extSkipStats)))
	messages, err := request.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil {
		return nil, err
	}
	links := make(map[int]Link, len(messages))
	for _, m := range messages {
		index := int(nl.DeserializeIfInfomsg(m).Index)
		if links[index], err = parseLink(m[unix.SizeofIfInfomsg:]); err != nil {
			return nil, fmt.Errorf("device %d: %w", index, err)
		}
	}
	return links, nil
}

func parseLink(attributes []byte) (Link, error) {
	l := Link{NSID: -1}
	return l, eachAttribute(attributes, func(kind uint16, value []byte) error {
		switch kind {
		case unix.IFLA_IFNAME:
			l.Name = unix.ByteSliceToString(value)
		case unix.IFLA_LINK_NETNSID:
			if len(value) >= 4 {
				l.NSID = int(int32(binary.NativeEndian.Uint32(value)))
			}
		case unix.IFLA_XDP:
			return eachAttribute(value, func(kind uint16, value []byte) error {
				if kind == nl.IFLA_XDP_PROG_ID && len(value) >= 4 {
					l.XDP = ebpf.ProgramID(binary.NativeEndian.Uint32(value))
				}
				return nil
			})
		}
		return nil
	})
}

// eachAttribute calls f for each netlink attribute (netlink(7)).
func eachAttribute(text []byte, f func(kind uint16, value []byte) error) error {
	for len(text) >= unix.SizeofRtAttr {
		length, kind := int(binary.NativeEndian.Uint16(text)), binary.NativeEndian.Uint16(text[2:])
		if length < unix.SizeofRtAttr || length > len(text) {
			return errors.New("truncated attribute")
		}
		if err := f(kind&typeMask, text[unix.SizeofRtAttr:length]); err != nil {
			return err
		}
		text = text[min(len(text), (length+3)&^3):]
	}
	return nil
}

// linkAt returns the device with the given index.
func linkAt(ifindex int) (netlink.Link, error) {
	device, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return nil, fmt.Errorf("device %d: %w", ifindex, err)
	}
	return device, nil
}
