package datapath

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// The types that the kernel side shares, as generated from bpf/abi.h, where their fields are explained. Times are
// nanoseconds of CLOCK_BOOTTIME (see Now).
type (
	// EndpointKey names an endpoint of a pod, or with KindPort all endpoints of a port.
	EndpointKey = probeletEndpointKey
	// Evidence is what was last observed of an endpoint and until when it may be served.
	Evidence = probeletEvidence
	// Tally is what the kernel notes of an endpoint.
	Tally = probeletTally
	// Outcome is the report of one probe that was passed on.
	Outcome = probeletOutcome
)

// Kinds of an EndpointKey and an Outcome.
const (
	KindPort = uint8(probeletEndpointKindKIND_PORT)
	KindTCP  = uint8(probeletEndpointKindKIND_TCP)
	KindHTTP = uint8(probeletEndpointKindKIND_HTTP)
)

// Results of Evidence.
const (
	ResultUnknown = uint8(probeletEvidenceResultRESULT_UNKNOWN)
	ResultSuccess = uint8(probeletEvidenceResultRESULT_SUCCESS)
	ResultFailure = uint8(probeletEvidenceResultRESULT_FAILURE)
)

// Events of an Outcome.
const (
	EventConnected = uint8(probeletOutcomeEventOUTCOME_CONNECTED)
	EventStatus    = uint8(probeletOutcomeEventOUTCOME_STATUS)
	EventReset     = uint8(probeletOutcomeEventOUTCOME_RESET)
	EventNoAnswer  = uint8(probeletOutcomeEventOUTCOME_NO_ANSWER)
)

// WithdrawalCauses are the names of those of Tally.WithdrawnCause.
var WithdrawalCauses = map[uint8]string{
	uint8(probeletWithdrawalCauseWITHDRAWN_LISTENER_CLOSED): "listener_closed",
	uint8(probeletWithdrawalCauseWITHDRAWN_RESET):           "reset",
	uint8(probeletWithdrawalCauseWITHDRAWN_STATUS):          "status",
}

const (
	// MaxPath is the longest path, in bytes as sent, of which the kernel takes notice. PATH_MAX in bpf/abi.h.
	MaxPath = 255
	// MaxRequest is the longest request, in bytes, that the kernel reads. REQUEST_MAX in bpf/abi.h.
	MaxRequest = 1024
	// MaxEndpoints is how many records a pod's maps hold; every probed port takes one too.
	// ENDPOINTS_PER_POD in bpf/abi.h.
	MaxEndpoints = 64
	// takenGrace is TAKEN_GRACE_NS in bpf/abi.h.
	takenGrace = 1_000_000_000
	// lockDeadline is far longer than somebody needs to change a namespace's devices.
	lockDeadline = 5 * time.Second
)

// PathHash is the hash of path and query, as sent in the request line, under which the kernel looks an endpoint up:
// 64-bit FNV-1a.
func PathHash(path string) uint64 {
	hash := uint64(0xcbf29ce484222325)
	for i := range len(path) {
		hash = (hash ^ uint64(path[i])) * 0x100000001b3
	}
	return hash
}

// PortKey names all endpoints of a port.
func PortKey(port uint16) EndpointKey { return EndpointKey{Port: port, Kind: KindPort} }

// TCPKey names the endpoint of a TCP probe.
func TCPKey(port uint16) EndpointKey { return EndpointKey{Port: port, Kind: KindTCP} }

// HTTPKey names the endpoint of an HTTP probe; path as in the request line, query included.
func HTTPKey(port uint16, path string) EndpointKey {
	return EndpointKey{Port: port, Kind: KindHTTP, PathHash: PathHash(path)}
}

// SetReply puts into e the reply with that status: ordinary HTTP/1.1 (RFC 9112), marked as ours by Cache-Status
// (RFC 9211). Only a 2xx can be replied.
func (e *probeletEvidence) SetReply(status int) error {
	if status < 200 || status > 299 {
		return fmt.Errorf("status %d: only a 2xx is answered", status)
	}
	r := &replies[status-200]
	e.Reply, e.ReplyLen, e.ReplySum, e.Status = r.Reply, r.ReplyLen, r.ReplySum, r.Status
	return nil
}

// replies are those of each status from 200 on: there are few, and each success needs one.
var replies = func() (replies [100]Evidence) {
	for i := range replies {
		replies[i].buildReply(200 + i)
	}
	return replies
}()

func (e *probeletEvidence) buildReply(status int) {
	text := fmt.Sprintf("HTTP/1.1 %d %s\r\n", status, http.StatusText(status))
	if status != http.StatusNoContent { // RFC 9110, section 8.6
		text += "Content-Length: 0\r\n"
	}
	text += "Connection: close\r\nCache-Status: probelet; hit\r\n\r\n"
	if len(text) > len(e.Reply) {
		panic(fmt.Sprintf("status %d: a reply of %d bytes, at most %d are possible", status, len(text), len(e.Reply)))
	}
	e.ReplyLen = uint16(copy(e.Reply[:], text))
	e.Status = uint16(status)
	for i := 0; i < len(e.Reply); i += 2 { // the bytes beyond ReplyLen are 0
		e.ReplySum += uint32(e.Reply[i]) | uint32(e.Reply[i+1])<<8 // little-endian, as the object is
	}
}

// PortFresh is the kernel's verdict at a SYN, given the evidence and the tally under the port's PortKey: may the
// connection be taken? It is the model that the program is tested against.
func PortFresh(port Evidence, tally Tally, now uint64) bool {
	return now < port.FreshUntil && port.ObservedAt > tally.WithdrawnAt
}

// MayAnswer is the kernel's verdict on a request of a connection that was taken at takenAt: may it be answered with e?
// tally is the one under the port's PortKey.
func MayAnswer(e Evidence, tally Tally, takenAt, now uint64) bool {
	if e.Result != ResultSuccess || e.ObservedAt <= tally.WithdrawnAt {
		return false
	}
	return now < e.FreshUntil || (takenAt < e.FreshUntil && now-takenAt < takenGrace)
}

// Pod is the pair of maps of one pod. Close closes the file descriptors only.
type Pod struct {
	evidence *ebpf.Map // written by the daemon
	tallies  *ebpf.Map // written by the kernel
}

// NewPod creates the maps of a pod: empty, so that nothing is answered. They are as evidence_of_pod and tallies_of_pod
// in bpf/abi.h say; the kernel refuses others at AddPod.
func (d *Datapath) NewPod() (*Pod, error) {
	create := func(name string, value any) (*ebpf.Map, error) {
		return ebpf.NewMap(&ebpf.MapSpec{
			Name:       name,
			Type:       ebpf.Hash,
			KeySize:    uint32(binary.Size(EndpointKey{})),
			ValueSize:  uint32(binary.Size(value)),
			MaxEntries: MaxEndpoints,
		})
	}
	evidence, err := create("evidence", Evidence{})
	if err != nil {
		return nil, fmt.Errorf("creating a pod's evidence map: %w", err)
	}
	tallies, err := create("tallies", Tally{})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("creating a pod's tallies map: %w", err), evidence.Close())
	}
	return &Pod{evidence, tallies}, nil
}

// AddPod makes the programs use p for the device ifindex. netns is the inode number of the network namespace that the pod's
// processes listen in.
func (d *Datapath) AddPod(ifindex, netns uint32, p *Pod) error {
	if err := d.objects.PodTallies.Put(ifindex, p.tallies); err != nil {
		return fmt.Errorf("tallies of device %d: %w", ifindex, err)
	}
	if err := d.objects.PodEvidence.Put(ifindex, p.evidence); err != nil {
		return fmt.Errorf("evidence of device %d: %w", ifindex, err)
	}
	return d.addToNetns(ifindex, netns)
}

// lockNetns keeps others from changing a namespace's devices meanwhile.
func (d *Datapath) lockNetns() (unlock func(), err error) {
	if d.dir == "" {
		return func() {}, nil // nobody else has it
	}
	ctx, cancel := context.WithTimeout(context.Background(), lockDeadline)
	defer cancel()
	return Lock(ctx, d.dir, unix.LOCK_EX)
}

func (d *Datapath) addToNetns(ifindex, netns uint32) error {
	unlock, err := d.lockNetns()
	if err != nil {
		return err
	}
	defer unlock()
	var devices probeletNetnsDevices
	if err := d.objects.PodNetns.Lookup(netns, &devices); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("devices of network namespace %d: %w", netns, err)
	}
	if slices.Contains(devices.Ifindex[:], ifindex) {
		return nil
	}
	slot := slices.Index(devices.Ifindex[:], 0)
	if slot < 0 {
		return fmt.Errorf("network namespace %d has %d devices attached already", netns, len(devices.Ifindex))
	}
	devices.Ifindex[slot] = ifindex
	if err := d.objects.PodNetns.Put(netns, &devices); err != nil {
		return fmt.Errorf("devices of network namespace %d: %w", netns, err)
	}
	return nil
}

// removeFromNetns looks for the device everywhere: its namespace may be gone, or its number on record be wrong.
func (d *Datapath) removeFromNetns(ifindex uint32) error {
	unlock, err := d.lockNetns()
	if Absent(err) { // removed with all that was pinned
		unlock, err = func() {}, nil
	}
	if err != nil {
		return err
	}
	defer unlock()
	changed := map[uint32]probeletNetnsDevices{}
	var netns uint32
	var devices probeletNetnsDevices
	entries := d.objects.PodNetns.Iterate()
	for entries.Next(&netns, &devices) {
		if slot := slices.Index(devices.Ifindex[:], ifindex); slot >= 0 {
			devices.Ifindex[slot] = 0
			changed[netns] = devices
		}
	}
	errs := []error{entries.Err()}
	for netns, devices := range changed {
		if devices.Ifindex == (probeletNetnsDevices{}).Ifindex {
			errs = append(errs, d.objects.PodNetns.Delete(netns))
		} else {
			errs = append(errs, d.objects.PodNetns.Put(netns, &devices))
		}
	}
	return errors.Join(errs...)
}

// OpenPod opens the maps that were pinned in dir. The error is os.ErrNotExist if they were not. By their pins, because to
// open a map by its id takes CAP_SYS_ADMIN (bpf_map_get_fd_by_id in kernel/bpf/syscall.c).
func OpenPod(dir string) (*Pod, error) {
	evidence, err := ebpf.LoadPinnedMap(filepath.Join(dir, pinEvidence), nil)
	if err != nil {
		return nil, fmt.Errorf("evidence of a pod: %w", err)
	}
	tallies, err := ebpf.LoadPinnedMap(filepath.Join(dir, pinTallies), nil)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("tallies of a pod: %w", err), evidence.Close())
	}
	return &Pod{evidence, tallies}, nil
}

// PodIDs are the ids of a pod's maps, 0 for one that is missing.
type PodIDs struct{ Evidence, Tallies ebpf.MapID }

// PodIDs returns the ids of the maps that the programs use for each device, by ifindex.
func (d *Datapath) PodIDs() (map[uint32]PodIDs, error) {
	evidence, err := innerIDs(d.objects.PodEvidence)
	if err != nil {
		return nil, err
	}
	tallies, err := innerIDs(d.objects.PodTallies)
	if err != nil {
		return nil, err
	}
	pods := make(map[uint32]PodIDs, len(tallies))
	for ifindex, id := range tallies {
		pods[ifindex] = PodIDs{Tallies: id}
	}
	for ifindex, id := range evidence {
		pods[ifindex] = PodIDs{Evidence: id, Tallies: tallies[ifindex]}
	}
	return pods, nil
}

func innerIDs(outer *ebpf.Map) (map[uint32]ebpf.MapID, error) {
	ids := map[uint32]ebpf.MapID{}
	var ifindex, id uint32
	entries := outer.Iterate()
	for entries.Next(&ifindex, &id) {
		ids[ifindex] = ebpf.MapID(id)
	}
	return ids, entries.Err()
}

// IDs returns the ids of the maps.
func (p *Pod) IDs() (PodIDs, error) {
	evidence, err := p.evidence.Info()
	if err != nil {
		return PodIDs{}, err
	}
	tallies, err := p.tallies.Info()
	if err != nil {
		return PodIDs{}, err
	}
	var ids PodIDs
	ids.Evidence, _ = evidence.ID()
	ids.Tallies, _ = tallies.ID()
	return ids, nil
}

// RemovePod makes the programs forget the device ifindex. It is all right if they do not know it.
func (d *Datapath) RemovePod(ifindex uint32) error {
	for _, outer := range []*ebpf.Map{d.objects.PodEvidence, d.objects.PodTallies} {
		if err := outer.Delete(ifindex); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forgetting device %d: %w", ifindex, err)
		}
	}
	if err := d.removeFromNetns(ifindex); err != nil {
		return fmt.Errorf("forgetting device %d: %w", ifindex, err)
	}
	return nil
}

// Put sets an endpoint's evidence, and creates its tally if it has none.
func (p *Pod) Put(key EndpointKey, e Evidence) error {
	if err := p.tallies.Update(key, Tally{}, ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return fmt.Errorf("tally of port %d: %w", key.Port, err)
	}
	if err := p.evidence.Put(key, e); err != nil {
		return fmt.Errorf("evidence of port %d: %w", key.Port, err)
	}
	return nil
}

// Renew sets the evidence of an endpoint that has been Put.
func (p *Pod) Renew(key EndpointKey, e Evidence) error {
	if err := p.evidence.Update(key, e, ebpf.UpdateExist); err != nil {
		return fmt.Errorf("evidence of port %d: %w", key.Port, err)
	}
	return nil
}

// Get returns an endpoint's evidence and tally. The error is ebpf.ErrKeyNotExist if it has none.
func (p *Pod) Get(key EndpointKey) (Evidence, Tally, error) {
	var e Evidence
	var t Tally
	if err := p.evidence.Lookup(key, &e); err != nil {
		return e, t, err
	}
	return e, t, p.tallies.Lookup(key, &t)
}

// Tally returns an endpoint's tally, an empty one if it has none.
func (p *Pod) Tally(key EndpointKey) (t Tally, err error) {
	if err = p.tallies.Lookup(key, &t); errors.Is(err, ebpf.ErrKeyNotExist) {
		return Tally{}, nil
	}
	return t, err
}

// Delete removes an endpoint, evidence first.
func (p *Pod) Delete(key EndpointKey) error {
	for _, m := range []*ebpf.Map{p.evidence, p.tallies} {
		if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
	return nil
}

// Keys returns the endpoints that the pod's maps hold, ports among them.
func (p *Pod) Keys() ([]EndpointKey, error) {
	var keys []EndpointKey
	var key EndpointKey
	var e Evidence
	entries := p.evidence.Iterate()
	for entries.Next(&key, &e) {
		keys = append(keys, key)
	}
	return keys, entries.Err()
}

// Pin pins the maps in dir.
func (p *Pod) Pin(dir string) error {
	if err := p.evidence.Pin(filepath.Join(dir, pinEvidence)); err != nil {
		return err
	}
	return p.tallies.Pin(filepath.Join(dir, pinTallies))
}

const (
	pinEvidence = "evidence"
	pinTallies  = "tallies"
)

// PinnedPodIDs returns the ids of the maps that were pinned in dir.
func PinnedPodIDs(dir string) (PodIDs, error) {
	evidence, err := pinnedID(filepath.Join(dir, pinEvidence))
	if err != nil {
		return PodIDs{}, err
	}
	tallies, err := pinnedID(filepath.Join(dir, pinTallies))
	return PodIDs{evidence, tallies}, err
}

func pinnedID(pin string) (ebpf.MapID, error) {
	m, err := ebpf.LoadPinnedMap(pin, nil)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("%s: %w", pin, err)
	}
	defer m.Close() //nolint:errcheck // read only
	info, err := m.Info()
	if err != nil {
		return 0, err
	}
	id, _ := info.ID()
	return id, nil
}

// Close closes the maps' file descriptors.
func (p *Pod) Close() error { return errors.Join(p.evidence.Close(), p.tallies.Close()) }
