package node

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
)

// Connection is a TCP connection as one side sees it.
type Connection struct{ Local, Remote netip.AddrPort }

// TimeWait returns the sockets in TIME_WAIT that involve the endpoint, in the network namespace of a process.
func TimeWait(pid int, endpoint netip.AddrPort) (map[Connection]bool, error) {
	const timeWait = "06" // TCP_TIME_WAIT
	found := map[Connection]bool{}
	// IPv4 connections to a socket that listens on all addresses are in tcp6.
	for _, file := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, file))
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(text)) {
			fields := strings.Fields(line)
			if len(fields) < 4 || fields[3] != timeWait {
				continue
			}
			local, err := parseSocket(fields[1])
			if err != nil {
				return nil, err
			}
			remote, err := parseSocket(fields[2])
			if err != nil {
				return nil, err
			}
			if local == endpoint || remote == endpoint {
				found[Connection{local, remote}] = true
			}
		}
	}
	return found, nil
}

// parseSocket parses an address in /proc/net/tcp: hexadecimal words in the machine's byte order.
func parseSocket(text string) (netip.AddrPort, error) {
	address, port, _ := strings.Cut(text, ":")
	words, err := hex.DecodeString(address)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("socket %q: %w", text, err)
	}
	for i := 0; i+4 <= len(words); i += 4 {
		binary.BigEndian.PutUint32(words[i:], binary.NativeEndian.Uint32(words[i:]))
	}
	ip, ok := netip.AddrFromSlice(words)
	number, err := strconv.ParseUint(port, 16, 16)
	if err != nil || !ok {
		return netip.AddrPort{}, fmt.Errorf("socket %q: not an address and a port", text)
	}
	return netip.AddrPortFrom(ip.Unmap(), uint16(number)), nil
}

// SegmentsOfTCPProbe is the largest number of segments that a TCP probe sends to the pod: SYN, ACK, FIN, the last ACK, and
// one of these that Linux occasionally sends twice.
const SegmentsOfTCPProbe = 5

// SegmentsIn returns how many TCP segments the network namespace of a process has received.
func SegmentsIn(pid int) (int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/snmp", pid))
	if err != nil {
		return 0, err
	}
	var names []string
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] != "Tcp:" {
			continue
		}
		if names == nil {
			names = fields
			continue
		}
		for i, name := range names {
			if name == "InSegs" && i < len(fields) {
				return strconv.Atoi(fields[i])
			}
		}
	}
	return 0, fmt.Errorf("process %d: no count of TCP segments", pid)
}
