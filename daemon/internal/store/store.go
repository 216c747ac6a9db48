// Package store writes the decisions of the freshness policy (package probe) into the kernel's maps, and reads back what the kernel knows
// of a pod.
package store

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// Limits are the limits of the kernel.
var Limits = probe.Limits{
	Request: datapath.MaxRequest,
	Records: datapath.MaxEndpoints,
	Traffic: datapath.MaxTrafficAnswers,
}

// Records is the content of a pod's evidence map.
type Records map[datapath.EndpointKey]datapath.Evidence

// kinds maps the kinds that the kernel keeps records of to its names for them.
var kinds = map[probe.Kind]uint8{
	probe.HTTP: datapath.KindHTTP,
	probe.TCP:  datapath.KindTCP,
}

// Key returns the key of an endpoint's record. q is the question that its probes ask, or zero if that is not known yet.
// ok is false for kinds that have no record, and until the question is known.
func Key(e probe.Endpoint, q probe.Question) (key datapath.EndpointKey, ok bool) {
	kind, ok := kinds[e.Kind]
	if !ok {
		return datapath.EndpointKey{}, false
	}
	key = datapath.EndpointKey{Port: e.Port, Kind: kind}
	if e.Kind.Keying() == probe.KeyedByRequest {
		key.Hash = q.Hash
		return key, q != probe.Question{}
	}
	return key, true
}

// Desired returns the records that express what the tracker knows. Every port has one, even if nothing is known: the kernel only observes
// ports with a record.
func Desired(t *probe.Tracker) (Records, error) {
	records := Records{}
	for endpoint, evidence := range t.Evidence() {
		key, ok := Key(endpoint, evidence.Question)
		if !ok {
			continue
		}
		record, err := record(endpoint, evidence)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", endpoint, err)
		}
		// Two endpoints have the same question if one of them was asked it at another address of the pod.
		if other, shared := records[key]; shared {
			if other.FreshUntil < record.FreshUntil {
				record, other = other, record
			}
			record.TrafficUntil = min(record.TrafficUntil, other.TrafficUntil)
		}
		records[key] = record
	}
	for port, gate := range t.Gates() {
		records[datapath.PortKey(port)] = datapath.Evidence{
			ObservedAt: gate.ObservedAt, FreshUntil: gate.FreshUntil,
			TrafficUntil: gate.TrafficUntil, TrafficWindowMs: milliseconds(gate.TrafficWindow),
		}
	}
	return records, nil
}

func record(endpoint probe.Endpoint, evidence probe.Evidence) (datapath.Evidence, error) {
	record := datapath.Evidence{
		ObservedAt: evidence.ObservedAt,
		FreshUntil: evidence.FreshUntil,
		Check:      evidence.Question.Check,
		Status:     uint16(evidence.Status),
		Result:     results[evidence.Result],

		TrafficUntil: evidence.TrafficUntil, TrafficWindowMs: milliseconds(evidence.TrafficWindow),
	}
	if endpoint.Kind.Keying() != probe.KeyedByRequest || evidence.Result != probe.Success {
		return record, nil
	}
	return record, record.SetReply(evidence.Status)
}

func milliseconds(d time.Duration) uint32 { return uint32(d / time.Millisecond) }

var results = [...]uint8{
	probe.Unknown: datapath.ResultUnknown,
	probe.Success: datapath.ResultSuccess,
	probe.Failure: datapath.ResultFailure,
}

// Evidence returns the evidence for a question that a record has.
func Evidence(q probe.Question, record datapath.Evidence) probe.Evidence {
	return probe.Evidence{
		Question:   q,
		Result:     probe.Result(max(slices.Index(results[:], record.Result), 0)),
		Status:     int(record.Status),
		ObservedAt: record.ObservedAt,
		FreshUntil: record.FreshUntil,

		TrafficUntil: record.TrafficUntil, TrafficWindow: time.Duration(record.TrafficWindowMs) * time.Millisecond,
	}
}

// step is one change of a pod's evidence map.
type step struct {
	key    datapath.EndpointKey
	record datapath.Evidence
	remove bool
}

// diff returns the steps from have to want. Gates close first and open last: taking a connection answers a TCP probe, so between any two
// steps no gate may be open wider than the evidence of its port's TCP endpoint. (Each HTTP request is checked against evidence of its
// own.) Records are removed before others are added, to make room. Records that stay the same are not touched.
func diff(have, want Records) []step {
	var closing, removing, putting, opening []step
	for _, key := range slices.SortedFunc(maps.Keys(union(have, want)), compareKeys) {
		old, exists := have[key]
		wanted, stays := want[key]
		isGate := key.Kind == datapath.KindPort
		switch {
		case exists && stays && old == wanted:
		case !stays && isGate:
			closing = append(closing, step{key: key, remove: true})
		case !stays:
			removing = append(removing, step{key: key, remove: true})
		case !isGate:
			putting = append(putting, step{key: key, record: wanted})
		default:
			if narrow := narrower(old, wanted); exists && narrow != old {
				closing = append(closing, step{key: key, record: narrow})
				old = narrow
			}
			if old != wanted || !exists {
				opening = append(opening, step{key: key, record: wanted})
			}
		}
	}
	return slices.Concat(closing, removing, putting, opening)
}

// narrower returns a gate that admits only what both admit.
func narrower(a, b datapath.Evidence) datapath.Evidence {
	return datapath.Evidence{
		ObservedAt: min(a.ObservedAt, b.ObservedAt),
		FreshUntil: min(a.FreshUntil, b.FreshUntil),

		TrafficUntil: min(a.TrafficUntil, b.TrafficUntil), TrafficWindowMs: min(a.TrafficWindowMs, b.TrafficWindowMs),
	}
}

func union(a, b Records) Records {
	both := maps.Clone(a)
	if both == nil {
		both = Records{}
	}
	maps.Copy(both, b)
	return both
}

func compareKeys(a, b datapath.EndpointKey) int {
	return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Hash, b.Hash))
}

// Pod is a pod's part of the kernel's maps. This process is the only one that writes evidence there.
type Pod struct {
	maps *datapath.Pod
	have Records // in the maps
	// synced: the programs look at the traffic of all ports where have says that it is evidence.
	synced bool
}

// Open reads a pod's part of the maps.
func Open(maps *datapath.Pod) (*Pod, error) {
	have, err := read(maps)
	if err != nil {
		return nil, err
	}
	return &Pod{maps: maps, have: have}, nil
}

// Device returns the device that the pod is behind. Once it was attached again, what is written here has no effect.
func (p *Pod) Device() datapath.DeviceKey { return p.maps.Device() }

// Records returns the records in the maps, which must not be modified.
func (p *Pod) Records() Records { return p.have }

// Tally returns what the kernel counted for a record; nothing if there is none.
func (p *Pod) Tally(key datapath.EndpointKey) (datapath.Tally, error) { return p.maps.Tally(key) }

// Sync makes the maps hold the records. After an error their content is unknown, and the pod must be opened again.
func (p *Pod) Sync(want Records) error {
	if !p.synced { // records that stay as they are may date from a previous daemon
		if err := p.wantTraffic(want); err != nil {
			return err
		}
		p.synced = true
	}
	for _, s := range diff(p.have, want) {
		if err := p.apply(s); err != nil {
			return err
		}
	}
	p.have = want
	return nil
}

// wantTraffic makes the programs look at the traffic of ports where it is evidence.
func (p *Pod) wantTraffic(records Records) error {
	for _, port := range records.trafficPorts() {
		if err := p.maps.WantTraffic(port); err != nil {
			return err
		}
	}
	return nil
}

// trafficPorts returns the ports where traffic is evidence.
func (r Records) trafficPorts() []uint16 {
	var ports []uint16
	for key, record := range r {
		if key.Kind == datapath.KindPort && record.TrafficUntil != 0 {
			ports = append(ports, key.Port)
		}
	}
	return ports
}

// ServedAt returns when a pod was last seen serving an endpoint of a kind on the port whose tally is given; 0: never.
func ServedAt(kind probe.Kind, port datapath.Tally) uint64 { return port.LastServed(kinds[kind]) }

// TrafficPorts returns the pod's ports where traffic is evidence.
func (p *Pod) TrafficPorts() []datapath.PodPort {
	var all []datapath.PodPort
	for _, port := range p.have.trafficPorts() {
		all = append(all, datapath.PodPort{Device: p.Device(), Port: port})
	}
	return all
}

func (p *Pod) apply(s step) error {
	if s.remove {
		return p.maps.Delete(s.key)
	}
	if s.key.Kind == datapath.KindPort && s.record.TrafficUntil != 0 {
		if err := p.maps.WantTraffic(s.key.Port); err != nil { // before the record says that it is evidence
			return err
		}
	}
	if _, exists := p.have[s.key]; exists {
		return p.maps.Renew(s.key, s.record)
	}
	return p.maps.Put(s.key, s.record)
}

func read(pod *datapath.Pod) (Records, error) {
	keys, err := pod.Keys()
	if err != nil {
		return nil, err
	}
	records := Records{}
	for _, key := range keys {
		record, _, err := pod.Get(key)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			continue // without a tally, the kernel ignores it; Sync recreates it if necessary
		}
		if err != nil {
			return nil, err
		}
		records[key] = record
	}
	return records, nil
}
