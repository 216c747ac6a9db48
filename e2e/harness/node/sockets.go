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

// TimeWaitOf returns the sockets in TIME_WAIT that involve the endpoint, in the network namespace of a process.
func TimeWaitOf(pid int, endpoint netip.AddrPort) (map[Connection]bool, error) {
	return TimeWaitWhere(pid, func(at netip.AddrPort) bool { return at == endpoint })
}

// TimeWaitWhere returns the sockets in TIME_WAIT with an address that matches, in the network namespace of a process.
func TimeWaitWhere(pid int, match func(netip.AddrPort) bool) (map[Connection]bool, error) {
	found := map[Connection]bool{}
	rows, err := sockets(pid, "06") // TCP_TIME_WAIT
	if err != nil {
		return nil, err
	}
	for _, fields := range rows {
		local, err := parseSocket(fields[1])
		if err != nil {
			return nil, err
		}
		remote, err := parseSocket(fields[2])
		if err != nil {
			return nil, err
		}
		if match(local) || match(remote) {
			found[Connection{local, remote}] = true
		}
	}
	return found, nil
}

// Unaccepted returns how many connections wait to be accepted on a port, in the network namespace of a process.
func Unaccepted(pid int, port uint16) (count int, err error) {
	rows, err := sockets(pid, "0A") // TCP_LISTEN
	if err != nil {
		return 0, err
	}
	for _, fields := range rows {
		local, err := parseSocket(fields[1])
		if err != nil {
			return 0, err
		}
		if local.Port() != port {
			continue
		}
		_, queued, _ := strings.Cut(fields[4], ":") // of a listening socket, the length of its queue
		waiting, err := strconv.ParseUint(queued, 16, 32)
		if err != nil {
			return 0, fmt.Errorf("queue %q: %w", fields[4], err)
		}
		count += int(waiting)
	}
	return count, nil
}

// sockets returns the fields of the TCP sockets in a state (in /proc/net/tcp) in the network namespace of a process.
func sockets(pid int, state string) (rows [][]string, err error) {
	// IPv4 connections to a socket that listens on all addresses are in tcp6.
	for _, file := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, file))
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(text)) {
			if fields := strings.Fields(line); len(fields) > 4 && fields[3] == state {
				rows = append(rows, fields)
			}
		}
	}
	return rows, nil
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
func SegmentsIn(pid int) (int, error) { return tcpCounter(pid, "InSegs") }

// AcceptedIn returns how many TCP connections to the network namespace of a process have been established.
func AcceptedIn(pid int) (int, error) { return tcpCounter(pid, "PassiveOpens") }

// tcpCounter returns a counter of RFC 4022 by its name in /proc/net/snmp.
func tcpCounter(pid int, counter string) (int, error) {
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
			if name == counter && i < len(fields) {
				return strconv.Atoi(fields[i])
			}
		}
	}
	return 0, fmt.Errorf("process %d: no counter %s", pid, counter)
}
