// Package store brings what the freshness policy says into the kernel's maps of a pod, and what the kernel reports back
// to the policy.
package store

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// Limits are those of the kernel side.
var Limits = probe.Limits{
	Request: datapath.MaxRequest,
	Records: datapath.MaxEndpoints,
}

// Records are the contents of a pod's evidence map.
type Records map[datapath.EndpointKey]datapath.Evidence

// kinds are the kernel side's names of the kinds that it keeps records of.
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

// Desired are the records that say what the policy says. Every port has one, known or not: the kernel observes only ports
// that it has a record of.
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
		// Two endpoints may have the same question, if the one was asked it at another address of the pod.
		if other, shared := records[key]; !shared || record.FreshUntil < other.FreshUntil {
			records[key] = record
		}
	}
	for port, gate := range t.Gates() {
		records[datapath.PortKey(port)] = datapath.Evidence{ObservedAt: gate.ObservedAt, FreshUntil: gate.FreshUntil}
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
	}
	if endpoint.Kind.Keying() != probe.KeyedByRequest || evidence.Result != probe.Success {
		return record, nil
	}
	return record, record.SetReply(evidence.Status)
}

var results = [...]uint8{
	probe.Unknown: datapath.ResultUnknown,
	probe.Success: datapath.ResultSuccess,
	probe.Failure: datapath.ResultFailure,
}

// Evidence is what a record says of a question.
func Evidence(q probe.Question, record datapath.Evidence) probe.Evidence {
	return probe.Evidence{
		Question:   q,
		Result:     probe.Result(max(slices.Index(results[:], record.Result), 0)),
		Status:     int(record.Status),
		ObservedAt: record.ObservedAt,
		FreshUntil: record.FreshUntil,
	}
}

// step is one change of a pod's evidence map.
type step struct {
	key    datapath.EndpointKey
	record datapath.Evidence
	remove bool
}

// diff returns the steps from have to want. Gates close first and open last: taking a connection answers a TCP probe, so
// at no moment between the steps may a gate be open wider than the evidence of its port's TCP endpoint. (HTTP requests are
// each checked against their own evidence.) Room is made before it is used. A record that is as it should be is not
// touched.
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

// narrower returns a gate that lets through only what both let through.
func narrower(a, b datapath.Evidence) datapath.Evidence {
	return datapath.Evidence{
		ObservedAt: min(a.ObservedAt, b.ObservedAt),
		FreshUntil: min(a.FreshUntil, b.FreshUntil),
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

// Pod is what the kernel's maps hold of the pod behind a device. This process is the only one that writes evidence there.
type Pod struct {
	maps *datapath.Pod
	have Records // what the maps hold
}

// Open reads what the maps hold of a pod.
func Open(maps *datapath.Pod) (*Pod, error) {
	have, err := read(maps)
	if err != nil {
		return nil, err
	}
	return &Pod{maps, have}, nil
}

// Device is the device that the pod is behind. If the programs know another life of it by now, what is written here has no
// effect.
func (p *Pod) Device() datapath.DeviceKey { return p.maps.Device() }

// Records are what the maps hold. They must not be changed.
func (p *Pod) Records() Records { return p.have }

// Tally is what the kernel noted of a record; nothing if there is none.
func (p *Pod) Tally(key datapath.EndpointKey) (datapath.Tally, error) { return p.maps.Tally(key) }

// Sync makes the maps hold the records. After an error it is not known what they hold: the pod must be opened anew.
func (p *Pod) Sync(want Records) error {
	for _, s := range diff(p.have, want) {
		if err := p.apply(s); err != nil {
			return err
		}
	}
	p.have = want
	return nil
}

func (p *Pod) apply(s step) error {
	if s.remove {
		return p.maps.Delete(s.key)
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
			continue // no tally: of no use to the kernel, and made anew if it is wanted
		}
		if err != nil {
			return nil, err
		}
		records[key] = record
	}
	return records, nil
}
