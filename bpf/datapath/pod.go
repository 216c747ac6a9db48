package datapath

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
)

// The types that the kernel side shares, as generated from bpf/abi.h, where their fields are explained. Times are
// nanoseconds of CLOCK_BOOTTIME (see Now).
type (
	// Evidence is what was last observed of an endpoint, and until when it may be answered. Pod sets its seal.
	Evidence = probeletEvidence
	// Tally is what the programs note of an endpoint.
	Tally = probeletTally
)

// Question is a request, whole, as the kernel tells it from others: by two independent hashes of its bytes under keys that
// are drawn when the programs are loaded. That two different requests have the same Hash has a probability of 2^-32 at the
// most, the same Question 2^-64. The zero value is no question.
type Question struct{ Hash, Check uint64 }

// EndpointKey names an endpoint of a pod, or with KindPort a port as a whole.
type EndpointKey struct {
	Hash uint64 // of the Question; its Check is in the endpoint's Evidence
	Port uint16
	Kind uint8
}

// Kinds of an EndpointKey.
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

// WithdrawalCauses names the values of Tally.WithdrawnCause.
var WithdrawalCauses = map[uint8]string{
	uint8(probeletWithdrawalCauseWITHDRAWN_LISTENER_CLOSED): "listener_closed",
	uint8(probeletWithdrawalCauseWITHDRAWN_RESET):           "reset",
	uint8(probeletWithdrawalCauseWITHDRAWN_STATUS):          "status",
}

// Obstacles names the values of Tally.Obstacle: why a probe was passed on though its evidence was fresh.
var Obstacles = map[uint8]string{
	uint8(probeletObstacleOBSTACLE_NO_LISTENER): "no_listener",
	uint8(probeletObstacleOBSTACLE_QUEUE_LONG):  "queue_long",
	uint8(probeletObstacleOBSTACLE_HEAD_OLD):    "head_old",
	uint8(probeletObstacleOBSTACLE_SPECIAL):     "special",
	uint8(probeletObstacleOBSTACLE_REAL_DUE):    "real_due",
	uint8(probeletObstacleOBSTACLE_UNANSWERED):  "unanswered",
}

const (
	// MaxRequest is the longest request, in bytes, that is answered. REQUEST_MAX in bpf/abi.h.
	MaxRequest = 1024
	// MaxAnswers is how many TCP probes in a row are answered at most by looks at the listening socket. ANSWERS_MAX in
	// bpf/listener.h.
	MaxAnswers = 9
	// MaxEndpoints is how many records a pod may have; every probed port takes one too. ENDPOINTS_PER_POD in bpf/abi.h.
	MaxEndpoints = 64
	// takenGrace is TAKEN_GRACE_NS in bpf/abi.h.
	takenGrace = 1_000_000_000
)

// PortKey names a port as a whole.
func PortKey(port uint16) EndpointKey { return EndpointKey{Port: port, Kind: KindPort} }

// TCPKey names the endpoint of a TCP probe.
func TCPKey(port uint16) EndpointKey { return EndpointKey{Port: port, Kind: KindTCP} }

// HTTPKey names the endpoint of an HTTP probe that asks the question. Its evidence must have the question's Check.
func HTTPKey(port uint16, q Question) EndpointKey {
	return EndpointKey{Port: port, Kind: KindHTTP, Hash: q.Hash}
}

func (k EndpointKey) of(device DeviceKey) probeletEndpointKey {
	return probeletEndpointKey{Hash: k.Hash, Device: device, Port: k.Port, Kind: k.Kind}
}

// SetReply sets the status that e is answered with. It returns an error unless that is a 2xx.
func (e *probeletEvidence) SetReply(status int) error {
	if status < statusMin || status > statusMax {
		return fmt.Errorf("status %d: only a 2xx is answered", status)
	}
	e.Status = uint16(status)
	return nil
}

// sealOf computes the seal that binds evidence to its key, as seal_of in bpf/evidence.h does.
func sealOf(key probeletEndpointKey, e Evidence) uint64 {
	const fnvOffset, fnvPrime = 0xcbf29ce484222325, 0x100000001b3
	hash := uint64(fnvOffset)
	for _, word := range []uint64{
		key.Hash,
		uint64(key.Device.Ifindex)<<32 | uint64(key.Device.Generation),
		uint64(key.Port)<<32 | uint64(key.Kind)<<24 | uint64(e.Result)<<16 | uint64(e.Status),
		e.ObservedAt,
		e.FreshUntil,
		e.Check,
	} {
		hash = (hash ^ word) * fnvPrime
		hash ^= hash >> 29
	}
	return hash
}

// PortFresh reports whether the kernel may take a connection at its SYN, given the evidence and the tally under the port's
// PortKey. It is the model that the program is tested against.
func PortFresh(port Evidence, tally Tally, now uint64) bool {
	return now < port.FreshUntil && port.ObservedAt > tally.WithdrawnAt
}

// MayAnswer reports whether the kernel may answer the question that e is of with e, on a connection taken at takenAt. The
// tallies are the port's and the endpoint's own. Like PortFresh it is a model.
func MayAnswer(e Evidence, port, endpoint Tally, takenAt, now uint64) bool {
	if e.Result != ResultSuccess || e.ObservedAt <= max(port.WithdrawnAt, endpoint.WithdrawnAt) {
		return false
	}
	return now < e.FreshUntil || (takenAt < e.FreshUntil && now-takenAt < takenGrace)
}

// Pod gives access to what is known of the pod behind a device. Only one process may change it.
type Pod struct {
	d      *Datapath
	device DeviceKey
}

// Pod returns what is known of a device's pod. The error is os.ErrNotExist as for Device.
func (d *Datapath) Pod(key DeviceKey) (*Pod, error) {
	if _, err := d.Device(key); err != nil {
		return nil, err
	}
	return &Pod{d, key}, nil
}

// Device returns the key of the pod's device.
func (p *Pod) Device() DeviceKey { return p.device }

// Put sets an endpoint's evidence, and creates its tally if it has none. The error is os.ErrNotExist if the device was
// removed meanwhile; nothing is left of it then.
func (p *Pod) Put(key EndpointKey, e Evidence) error {
	if err := p.Renew(key, e); !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	unlock, err := p.d.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := p.d.Device(p.device); err != nil {
		return err
	}
	if err := p.list(key); err != nil {
		return err
	}
	k := key.of(p.device)
	if err := p.d.objects.EndpointTallies.Update(k, Tally{}, ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return fmt.Errorf("tally of port %d: %w", key.Port, err)
	}
	e.Seal = sealOf(k, e)
	if err := p.d.objects.EndpointEvidence.Put(k, e); err != nil {
		return fmt.Errorf("evidence of port %d: %w", key.Port, err)
	}
	return nil
}

// Renew replaces the evidence of an endpoint, without a lock. The error is os.ErrNotExist as for Put, and ebpf.ErrKeyNotExist if
// the endpoint has no evidence.
func (p *Pod) Renew(key EndpointKey, e Evidence) error {
	k := key.of(p.device)
	e.Seal = sealOf(k, e)
	err := p.d.objects.EndpointEvidence.Update(&k, &e, ebpf.UpdateExist) // pointers: values would be encoded by reflection
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		if _, gone := p.d.Device(p.device); gone != nil {
			return gone
		}
	}
	if err != nil {
		return fmt.Errorf("evidence of port %d: %w", key.Port, err)
	}
	return nil
}

// Get returns an endpoint's evidence, with Seal 0, and its Tally. The error is ebpf.ErrKeyNotExist if it has none.
func (p *Pod) Get(key EndpointKey) (Evidence, Tally, error) {
	var e Evidence
	var t Tally
	k := key.of(p.device)
	if err := p.d.objects.EndpointEvidence.Lookup(&k, &e); err != nil {
		return e, t, err
	}
	if e.Seal != sealOf(k, e) {
		return e, t, fmt.Errorf("evidence of port %d does not bear its seal", key.Port)
	}
	e.Seal = 0
	if err := p.d.objects.EndpointTallies.Lookup(&k, &t); err != nil {
		return e, t, err
	}
	return e, t, p.addWithdrawal(&t)
}

// Tally returns an endpoint's tally, or an empty one if it has none. WithdrawnAt and WithdrawnCause include withdrawals of all of the
// pod's evidence.
func (p *Pod) Tally(key EndpointKey) (t Tally, err error) {
	k := key.of(p.device)
	if err := ignoreAbsent(p.d.objects.EndpointTallies.Lookup(&k, &t)); err != nil {
		return t, err
	}
	return t, p.addWithdrawal(&t)
}

// addWithdrawal adds the withdrawal of all of the pod's evidence to a tally, if that was later. A device that was removed has none.
func (p *Pod) addWithdrawal(t *Tally) error {
	device, err := p.d.Device(p.device)
	if err == nil && device.WithdrawnAt > t.WithdrawnAt {
		t.WithdrawnAt, t.WithdrawnCause = device.WithdrawnAt, uint8(probeletWithdrawalCauseWITHDRAWN_LISTENER_CLOSED)
	}
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// Delete removes an endpoint. An endpoint that does not exist is no error.
func (p *Pod) Delete(key EndpointKey) error {
	unlock, err := p.d.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := p.delete(key); err != nil {
		return err
	}
	list, err := p.readList()
	if err != nil {
		return err
	}
	i := list.index(key)
	if i < 0 {
		return nil
	}
	list.Count--
	list.Hashes[i], list.Ports[i] = list.Hashes[list.Count], list.Ports[list.Count]
	list.Hashes[list.Count], list.Ports[list.Count] = 0, 0
	return p.writeList(list)
}

// delete removes the evidence first, so that there is never evidence without a tally.
func (p *Pod) delete(key EndpointKey) error {
	for _, m := range []*ebpf.Map{p.d.objects.EndpointEvidence, p.d.objects.EndpointTallies} {
		if err := ignoreAbsent(m.Delete(key.of(p.device))); err != nil {
			return fmt.Errorf("port %d: %w", key.Port, err)
		}
	}
	return nil
}

// Keys returns the keys of the pod's endpoints and ports.
func (p *Pod) Keys() ([]EndpointKey, error) {
	list, err := p.readList()
	if err != nil {
		return nil, err
	}
	return list.keys(), nil
}

// clear removes all endpoints.
func (p *Pod) clear() error {
	keys, err := p.Keys()
	errs := []error{err}
	for _, key := range keys {
		errs = append(errs, p.delete(key))
	}
	errs = append(errs, ignoreAbsent(p.d.objects.EndpointLists.Delete(p.device)))
	return errors.Join(errs...)
}

// list puts the key on the device's list, unless it is there already.
func (p *Pod) list(key EndpointKey) error {
	list, err := p.readList()
	if err != nil || list.index(key) >= 0 {
		return err
	}
	if int(list.Count) == len(list.Ports) {
		return fmt.Errorf("port %d: the pod has %d endpoints and ports already: %w", key.Port, list.Count, errTooMany)
	}
	list.Hashes[list.Count], list.Ports[list.Count] = key.Hash, key.packed()
	list.Count++
	return p.writeList(list)
}

var errTooMany = errors.New("there is no room for more")

// packed returns port and kind as struct endpoint_list has them.
func (k EndpointKey) packed() uint32 { return uint32(k.Port)<<16 | uint32(k.Kind) }

func (p *Pod) readList() (list probeletEndpointList, err error) {
	if err := ignoreAbsent(p.d.objects.EndpointLists.Lookup(p.device, &list)); err != nil {
		return list, fmt.Errorf("endpoints of device %d: %w", p.device.Ifindex, err)
	}
	return list, nil
}

func (p *Pod) writeList(list probeletEndpointList) error {
	if err := p.d.objects.EndpointLists.Put(p.device, &list); err != nil {
		return fmt.Errorf("endpoints of device %d: %w", p.device.Ifindex, err)
	}
	return nil
}

func (l *probeletEndpointList) keys() []EndpointKey {
	keys := make([]EndpointKey, min(int(l.Count), len(l.Ports)))
	for i := range keys {
		keys[i] = EndpointKey{Hash: l.Hashes[i], Port: uint16(l.Ports[i] >> 16), Kind: uint8(l.Ports[i])}
	}
	return keys
}

func (l *probeletEndpointList) index(key EndpointKey) int {
	for i, k := range l.keys() {
		if k == key {
			return i
		}
	}
	return -1
}
