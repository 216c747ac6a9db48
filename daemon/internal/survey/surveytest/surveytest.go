//go:build linux

// Package surveytest provides a node for tests of what reads one: a fake kernel side, and a real state directory.
package surveytest

import (
	"context"
	"log/slog"
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/survey"
)

// Second and Now are in ns of CLOCK_BOOTTIME. Now is the time at which the node is read.
const (
	Second = uint64(time.Second)
	Now    = 1000 * Second
)

// Kernel is a fake kernel side, with pods' maps and devices by container.
type Kernel struct {
	ProberSet datapath.Prober
	Pods      map[string]Maps
	Devices   map[string]datapath.Device
	// NeighboursOf has the neighbours by ifindex. NeighboursErr is returned for every device.
	NeighboursOf  map[int][]attach.Neighbour
	NeighboursErr error
	// Trusted collects the devices that were passed to TrustAgain.
	Trusted []datapath.DeviceKey
	// Unwatched makes Watched false, and Blind SeesListeners.
	Unwatched, Blind bool
}

// Maps has a pod's records.
type Maps map[datapath.EndpointKey]Record

// Record is what a pod's maps hold for a key.
type Record struct {
	Evidence datapath.Evidence
	Tally    datapath.Tally
}

// Prober implements survey.Kernel.
func (k *Kernel) Prober() (datapath.Prober, error) { return k.ProberSet, nil }

// Watched implements survey.Kernel.
func (k *Kernel) Watched() bool { return !k.Unwatched }

// SeesListeners implements survey.Kernel.
func (k *Kernel) SeesListeners() bool { return !k.Blind }

// Close implements survey.Kernel.
func (k *Kernel) Close() error { return nil }

// Counters implements survey.Kernel.
func (k *Kernel) Counters() (map[string]uint64, error) {
	return map[string]uint64{"answered_http": 12, "answered_tcp": 3, "observed": 20, "handed_over": 1}, nil
}

// Pod implements survey.Kernel.
func (k *Kernel) Pod(id attach.ID) (survey.PodMaps, error) {
	if maps, ok := k.Pods[id.ContainerID]; ok {
		return maps, nil
	}
	return nil, os.ErrNotExist
}

// AttachedDevice implements survey.Kernel.
func (k *Kernel) AttachedDevice(id attach.ID) (datapath.Device, error) {
	if device, ok := k.Devices[id.ContainerID]; ok {
		return device, nil
	}
	return datapath.Device{}, os.ErrNotExist
}

// Neighbours implements survey.Kernel.
func (k *Kernel) Neighbours(ifindex int) ([]attach.Neighbour, error) {
	return k.NeighboursOf[ifindex], k.NeighboursErr
}

// TrustAgain implements survey.Kernel.
func (k *Kernel) TrustAgain(key datapath.DeviceKey) error {
	k.Trusted = append(k.Trusted, key)
	return nil
}

// Get implements survey.PodMaps.
func (m Maps) Get(key datapath.EndpointKey) (datapath.Evidence, datapath.Tally, error) {
	r, ok := m[key]
	if !ok {
		return r.Evidence, r.Tally, ebpf.ErrKeyNotExist
	}
	return r.Evidence, r.Tally, nil
}

// Success returns a success that was observed ago seconds before Now and stays fresh for fresh seconds more.
func Success(ago, fresh uint64, status uint16) datapath.Evidence {
	return datapath.Evidence{
		Result: datapath.ResultSuccess, Status: status, ObservedAt: Now - ago*Second, FreshUntil: Now + fresh*Second,
	}
}

// Failed returns a failure that was observed ago seconds before Now.
func Failed(ago uint64, status uint16) datapath.Evidence {
	return datapath.Evidence{Result: datapath.ResultFailure, Status: status, ObservedAt: Now - ago*Second}
}

// Hits returns the tally of an endpoint that was answered n times.
func Hits(n uint64) datapath.Tally { return datapath.Tally{Hits: n} }

// Withdrawn returns the tally of an endpoint that was withdrawn ago seconds before Now.
func Withdrawn(ago uint64) datapath.Tally { return datapath.Tally{WithdrawnAt: Now - ago*Second} }

// Endpoint describes an endpoint that a readiness probe asks every 10 s.
func Endpoint(kind probe.Kind, port uint16, path string) statedir.Endpoint {
	return statedir.Endpoint{
		Kind: kind, Port: port, Path: path, Observed: true, Period: 10, Timeout: 1, StalenessBound: 11, Successes: 1,
		Question: questionOf(path),
		Probes: []statedir.Probe{{
			Asker:  probe.Asker{Container: "c", Type: probe.Readiness},
			Period: 10, Timeout: 1, FailureThreshold: 3, Detection: 43, DetectionPlain: 31, DetectionAnswered: 43, DetectionHang: 43,
		}},
	}
}

// questionOf stands in for the question of a probe's request.
func questionOf(path string) probe.Question { return probe.Question{Hash: uint64(len(path)), Check: 1} }

// KeyOf returns the key of an HTTP endpoint made by Endpoint.
func KeyOf(port uint16, path string) datapath.EndpointKey {
	return datapath.HTTPKey(port, datapath.Question(questionOf(path)))
}

// Machine is a node.
type Machine struct {
	T        *testing.T
	Kernel   *Kernel // nil: nothing is loaded
	StateDir string
	OpenErr  error // returned when the BPF objects are opened
}

// NewMachine returns a node on which nothing is attached and no daemon runs.
func NewMachine(t *testing.T) *Machine {
	return &Machine{T: t, StateDir: t.TempDir(), Kernel: &Kernel{
		ProberSet: datapath.Prober{CgroupIDs: []uint64{4711}}, Pods: map[string]Maps{}, Devices: map[string]datapath.Device{},
	}}
}

// Open is survey.Source's Open.
func (m *Machine) Open(string) (survey.Kernel, error) {
	if m.Kernel == nil || m.OpenErr != nil {
		return nil, m.OpenErr
	}
	return m.Kernel, nil
}

// Daemon makes a daemon run, as far as the lock of the state directory tells.
func (m *Machine) Daemon() {
	m.T.Helper()
	held, err := statedir.Lock(m.StateDir)
	if err != nil {
		m.T.Fatal(err)
	}
	m.T.Cleanup(func() { _ = held.Release() })
}

// Describe writes the daemon's file.
func (m *Machine) Describe(e statedir.Endpoints) {
	m.T.Helper()
	if err := statedir.WriteEndpoints(m.StateDir, e); err != nil {
		m.T.Fatal(err)
	}
}

// Record writes an attachment record.
func (m *Machine) Record(r attach.Record) {
	m.T.Helper()
	if err := attach.WriteRecord(m.StateDir, r); err != nil {
		m.T.Fatal(err)
	}
}

// WebDevice is the device of Web's pod.
var WebDevice = datapath.DeviceKey{Ifindex: 7, Generation: 4}

// Web attaches pod shop/web, container c0ffee, with these endpoints.
func (m *Machine) Web(maps Maps, endpoints ...statedir.Endpoint) {
	m.T.Helper()
	m.Record(attach.Record{ContainerID: "c0ffee", IfName: "eth0", IfIndex: 7, HostIfName: "veth7", PodIPs: []string{"10.0.0.7"}})
	m.Describe(statedir.Endpoints{Attachments: []statedir.Attachment{{
		ContainerID: "c0ffee", IfName: "eth0", Pod: "shop/web", Endpoints: endpoints,
		Settings: statedir.SettingsOf(probe.NewDefaults().Settings(nil)),
	}}})
	m.Kernel.Pods["c0ffee"] = maps
	m.Kernel.Devices["c0ffee"] = datapath.Device{Key: WebDevice, Trust: datapath.TrustProven}
}

// Lose makes answers through Web's device lost for 12 s.
func (m *Machine) Lose(loss string) {
	m.Kernel.Devices["c0ffee"] = datapath.Device{
		Key: WebDevice, Hook: datapath.HookXDP, Trust: datapath.TrustLost, Loss: loss, LostAt: Now - 12*Second,
	}
}

// Node is a running daemon's side of the API.
type Node struct {
	api.Node
	Known        []api.Endpoint
	Inconclusive map[string]uint64 // for Web's pod
	Delivery     api.SourceReply
	Missing      []string
}

// Endpoints implements api.Node.
func (n Node) Endpoints(context.Context) (api.EndpointsReply, error) {
	return api.EndpointsReply{
		Endpoints:    n.Known,
		Inconclusive: []api.Inconclusive{{ContainerID: "c0ffee", IfName: "eth0", Reasons: n.Inconclusive}},
	}, nil
}

// Source implements api.Node.
func (n Node) Source() api.SourceReply { return n.Delivery }

// Unready implements api.Node.
func (n Node) Unready(context.Context) ([]string, error) { return n.Missing, nil }

// Events implements api.Node.
func (n Node) Events(context.Context, string, string) (api.EventsReply, error) {
	return api.EventsReply{}, nil
}

// Serve runs a daemon that knows these endpoints of Web's pod.
func (m *Machine) Serve(endpoints ...api.Endpoint) {
	m.T.Helper()
	for i := range endpoints {
		endpoints[i].ContainerID, endpoints[i].IfName = "c0ffee", "eth0"
	}
	m.ServeNode(Node{Known: endpoints})
}

// ServeNode runs a daemon until the test ends.
func (m *Machine) ServeNode(n Node) {
	m.T.Helper()
	m.Daemon()
	listener, err := api.Listen(m.StateDir)
	if err != nil {
		m.T.Fatal(err)
	}
	ctx, stop := context.WithCancel(m.T.Context())
	served := make(chan error)
	go func() {
		served <- api.Serve(ctx, listener, api.Local(n, http.NotFoundHandler(), &slog.LevelVar{}), slog.New(slog.DiscardHandler))
	}()
	m.T.Cleanup(func() { stop(); <-served })
}
