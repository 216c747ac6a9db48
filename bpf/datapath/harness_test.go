package datapath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/gopacket/gopacket/layers"

	"github.com/probelet/probelet/bpf/bpftest"
)

func TestMain(m *testing.M) { bpftest.RunInOwnCgroup(m.Run) }

// Verdicts, numbered as in include/uapi/linux/pkt_cls.h and bpf.h.
const (
	tcPass     = 0xffffffff // TC_ACT_UNSPEC
	tcRedirect = 7
	xdpPass    = 2
)

// fate describes what happens to a packet.
type fate string

const (
	untouched fate = "passes unchanged"
	toPod     fate = "reaches the pod rewritten"
	toClient  fate = "reaches the client rewritten"
	swallowed fate = "is dropped quietly"
)

const (
	request = "GET /healthz HTTP/1.1\r\nHost: pod:8080\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\nConnection: close\r\n\r\n"
	reply   = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\nCache-Status: probelet; hit\r\n\r\n"
)

// clientMark is skb->mark of the client's packets.
const clientMark = 0x4000

// bench is a pod's device without a pod: packets are fed to the programs and examined when they come out.
type bench struct {
	t           testing.TB
	d           *Datapath
	pod         *Pod
	key         DeviceKey
	hook        Hook
	client, srv netip.AddrPort
	isn         uint32
	answersLost bool   // something drops answers before observe sees them
	dropped     uint64 // last value of the counter
	bss         *ebpf.Map
}

var (
	hooks    = map[string]Hook{"tc": HookTC, "xdp": HookXDP}
	families = map[string][2]string{
		"ipv4": {"10.244.1.1:40000", "10.244.1.8:8080"},
		"ipv6": {"[fd00:10:244:1::1]:40000", "[fd00:10:244:1::8]:8080"},
	}
)

// onBench runs the test over both hooks and families.
func onBench(t *testing.T, f func(t *testing.T, b *bench)) {
	t.Helper()
	for _, hook := range slices.Sorted(maps.Keys(hooks)) {
		for _, family := range slices.Sorted(maps.Keys(families)) {
			t.Run(hook+" "+family, func(t *testing.T) { f(t, newBench(t, hooks[hook], families[family])) })
		}
	}
}

// benchIfindex is that of the loopback device, the only one that test runs can name. otherIfindex belongs to another device.
const benchIfindex, otherIfindex = 1, 2

func newBench(t testing.TB, hook Hook, addrs [2]string) *bench {
	t.Helper()
	bpftest.RequireRoot(t)
	carrying.once.Do(func() { carrying.d, carrying.maps = loadCarrying(t) })
	if carrying.d == nil {
		t.Fatal("the programs could not be loaded")
	}
	b := &bench{
		t: t, d: carrying.d, bss: carrying.maps[".bss"], hook: hook,
		isn:    0xfffffff0, // wraps within a request
		client: netip.MustParseAddrPort(addrs[0]), srv: netip.MustParseAddrPort(addrs[1]),
	}
	b.reset()
	return b
}

// carrying holds programs that carry skb->tc_index through test runs, and all maps. They are loaded only once, which takes a while.
var carrying struct {
	once      sync.Once
	d         *Datapath
	maps      map[string]*ebpf.Map
	flowPorts uint32 // offset of the variable in .bss
	keys      bpftest.QuestionKeys
}

// reset restores the state right after loading and attaches the device.
func (b *bench) reset() {
	b.t.Helper()
	for _, m := range []*ebpf.Map{
		b.d.objects.Devices, b.d.objects.EndpointEvidence, b.d.objects.EndpointTallies, b.d.objects.EndpointLists,
		b.d.objects.PodNetns, b.d.objects.Flows, b.d.objects.Requests,
	} {
		empty(b.t, m)
	}
	for _, m := range []*ebpf.Map{b.d.objects.Counters, b.d.objects.AnswerAges} {
		for i := range m.MaxEntries() {
			must(b.t, m.Put(i, make([]uint64, ebpf.MustPossibleCPU())))
		}
	}
	must(b.t, b.bss.Put(uint32(0), make([]byte, b.bss.ValueSize())))
	b.records()
	b.dropped = 0
	must(b.t, b.d.SetProber(Prober{AnyLocal: true}))
	b.attach()
}

func empty(t testing.TB, m *ebpf.Map) {
	t.Helper()
	for {
		key, err := m.NextKeyBytes(nil)
		must(t, err)
		if key == nil {
			return
		}
		must(t, m.Delete(key))
	}
}

// attach attaches the device again.
func (b *bench) attach() {
	b.t.Helper()
	key, err := NewDeviceKey(benchIfindex)
	must(b.t, err)
	must(b.t, b.d.AddDevice(key, 33, b.hook))
	b.key = key
	b.pod, err = b.d.Pod(key)
	must(b.t, err)
}

// loadCarrying loads the programs, with the tc programs changed to carry skb->tc_index. It also returns their maps by name, including
// those of global variables.
func loadCarrying(t testing.TB) (*Datapath, map[string]*ebpf.Map) {
	t.Helper()
	d, err := Load()
	must(t, err)
	shared := mapsOf(t, d.objects.Steer, d.objects.Observe)
	spec, err := loadProbelet()
	must(t, err)
	var changed struct {
		Steer   *ebpf.Program `ebpf:"steer"`
		Observe *ebpf.Program `ebpf:"observe"`
	}
	bpftest.CarryTCIndex(t, spec.Programs[probeletProgSteer])
	bpftest.CarryTCIndex(t, spec.Programs[probeletProgObserve])
	must(t, spec.LoadAndAssign(&changed, &ebpf.CollectionOptions{MapReplacements: shared}))
	must(t, errors.Join(d.objects.Steer.Close(), d.objects.Observe.Close()))
	d.objects.Steer, d.objects.Observe = changed.Steer, changed.Observe
	carrying.flowPorts = spec.Variables[probeletVarFlowPorts].Offset
	carrying.keys = bpftest.KeysOf(t, d.objects.Steer)
	return d, shared
}

func mapsOf(t testing.TB, programs ...*ebpf.Program) map[string]*ebpf.Map {
	t.Helper()
	spec, err := loadProbelet()
	must(t, err)
	all := map[string]*ebpf.Map{}
	for _, p := range programs {
		info, err := p.Info()
		must(t, err)
		ids, _ := info.MapIDs()
		for _, id := range ids {
			m, err := ebpf.NewMapFromID(id)
			must(t, err)
			info, err := m.Info()
			must(t, err)
			for name := range spec.Maps {
				if name[:min(len(name), 15)] == info.Name { // the kernel keeps 15 characters
					all[name] = m
				}
			}
		}
	}
	return all
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// success returns evidence of a success that is fresh for d.
func success(t testing.TB, status int, d time.Duration) Evidence {
	t.Helper()
	now := Now()
	e := Evidence{ObservedAt: now, FreshUntil: uint64(int64(now) + int64(d)), Result: ResultSuccess}
	must(t, e.SetReply(status))
	return e
}

func (b *bench) put(key EndpointKey, e Evidence) {
	b.t.Helper()
	must(b.t, b.pod.Put(key, e))
}

// putFor puts evidence for the question that a request asks.
func (b *bench) putFor(request string, e Evidence) {
	b.t.Helper()
	q := question(request)
	e.Check = q.Check
	b.put(HTTPKey(b.srv.Port(), q), e)
}

// question is the model of hash_request.
func question(text string) (q Question) {
	q.Hash, q.Check = carrying.keys.Question(text)
	return q
}

// asked returns the key of the endpoint that a request asks.
func (b *bench) asked() EndpointKey { return HTTPKey(b.srv.Port(), question(request)) }

// tally returns an endpoint's tally without the pod's withdrawals.
func (b *bench) tally(key EndpointKey) (t Tally) {
	b.t.Helper()
	must(b.t, ignoreAbsent(b.d.objects.EndpointTallies.Lookup(key.of(b.key), &t)))
	return t
}

func (b *bench) setTally(key EndpointKey, t Tally) {
	b.t.Helper()
	must(b.t, b.d.objects.EndpointTallies.Put(key.of(b.key), t))
}

// arm makes the answer to a request fresh for an hour, on a device whose answers are known to arrive.
func (b *bench) arm() {
	b.t.Helper()
	e := success(b.t, 200, time.Hour)
	b.putFor(request, e)
	b.put(PortKey(b.srv.Port()), e)
	b.trust(TrustProven)
}

// armPort makes the programs take connections to the port, but answer no request.
func (b *bench) armPort() {
	b.t.Helper()
	b.arm()
	b.putFor(request, Evidence{})
}

func (b *bench) device() (device probeletDevice) {
	b.t.Helper()
	must(b.t, b.d.objects.Devices.Lookup(b.key.Ifindex, &device))
	return device
}

func (b *bench) setDevice(device probeletDevice) {
	b.t.Helper()
	must(b.t, b.d.objects.Devices.Put(b.key.Ifindex, device))
}

// voidPod acts as if one of the pod's listening sockets had closed at the given time.
func (b *bench) voidPod(at uint64) {
	b.t.Helper()
	device := b.device()
	device.WithdrawnAt = at
	b.setDevice(device)
}

func (b *bench) trust(trust Trust) {
	b.t.Helper()
	device := b.device()
	device.Trust = uint16(trust)
	b.setDevice(device)
}

func (b *bench) wantTrust(trust Trust, loss string) {
	b.t.Helper()
	got, err := b.d.Device(b.key)
	must(b.t, err)
	if got.Trust != trust || got.Loss != loss || (got.LostAt != 0) != (trust == TrustLost) {
		b.t.Fatalf("%+v, want trust %d, loss %q", got, trust, loss)
	}
}

func (b *bench) toPod(flags string, seq, ack uint32, payload string) bpftest.Segment {
	return bpftest.Segment{
		Src: b.client, Dst: b.srv, SrcMAC: bpftest.ClientMAC, DstMAC: bpftest.PodMAC,
		Flags: flags, Seq: seq, Ack: ack, Window: 501, Payload: payload,
	}
}

func (b *bench) fromPod(flags string, seq, ack uint32, payload string) bpftest.Segment {
	return bpftest.Segment{
		Src: b.srv, Dst: b.client, SrcMAC: bpftest.PodMAC, DstMAC: bpftest.ClientMAC,
		Flags: flags, Seq: seq, Ack: ack, Window: 502, Payload: payload,
	}
}

const clientMSS = 1440

func (b *bench) syn() bpftest.Segment {
	s := b.toPod("S", b.isn, 0, "")
	s.Options = []layers.TCPOption{ // as Linux sends them
		mssOption(clientMSS),
		{OptionType: layers.TCPOptionKindSACKPermitted, OptionLength: 2},
		{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 10, OptionData: make([]byte, 8)},
		{OptionType: layers.TCPOptionKindNop, OptionLength: 1},
		{OptionType: layers.TCPOptionKindWindowScale, OptionLength: 3, OptionData: []byte{7}},
	}
	return s
}

func mssOption(mss uint16) layers.TCPOption {
	return layers.TCPOption{
		OptionType: layers.TCPOptionKindMSS, OptionLength: 4, OptionData: binary.BigEndian.AppendUint16(nil, mss),
	}
}

// sends passes a client's frame through the programs like the kernel, up to where it ends.
func (b *bench) sends(frame []byte) (fate, []byte) {
	b.t.Helper()
	return b.egress(bpftest.Packet{Frame: frame, Mark: clientMark})
}

func (b *bench) egress(in bpftest.Packet) (fate, []byte) {
	b.t.Helper()
	verdict, out := bpftest.RunTC(b.t, b.d.Steer(), b.key.Ifindex, in)
	swallows := b.countDropped()
	same := bytes.Equal(in.Frame, out.Frame)
	switch {
	case verdict == tcPass && !swallows && out.Mark == in.Mark:
		b.passesAgain(b.d.Steer(), out)
		return passed(same, toPod), out.Frame
	case verdict == tcRedirect && swallows && same:
		return swallowed, nil
	case verdict == tcRedirect && !swallows && !same && out.Mark == 0:
		return toClient, b.ascends(out)
	}
	b.t.Fatalf("verdict %#x, counted as dropped: %v, mark %#x, for\n% x, became\n% x", verdict, swallows, out.Mark, in.Frame, out.Frame)
	return "", nil
}

func passed(same bool, otherwise fate) fate {
	if same {
		return untouched
	}
	return otherwise
}

// ascends passes an answer of steer through respond, if that makes the answer, and past observe, which must ignore it.
func (b *bench) ascends(p bpftest.Packet) []byte {
	b.t.Helper()
	if b.hook == HookXDP {
		if proto := binary.BigEndian.Uint16(p.Frame[12:]); proto != 0x88b5 {
			b.t.Fatalf("EtherType %#x of a steered packet", proto)
		}
		var verdict uint32
		if verdict, p.Frame = bpftest.RunRespond(b.t, b.d.Respond(), b.key.Ifindex, p.Frame); verdict != xdpPass {
			b.t.Fatalf("respond's verdict %d", verdict)
		}
	}
	if !b.answersLost {
		b.passesAgain(b.d.Observe(), p)
	}
	return p.Frame
}

// passesAgain asserts that a packet that our programs have handled is ignored by the next copy of them.
func (b *bench) passesAgain(p *ebpf.Program, in bpftest.Packet) {
	b.t.Helper()
	if in.TCIndex == 0 {
		return
	}
	in.From = b.key.Ifindex // must not matter
	verdict, out := bpftest.RunTC(b.t, p, b.key.Ifindex, in)
	if verdict != tcPass || !bytes.Equal(in.Frame, out.Frame) || b.countDropped() {
		b.t.Fatalf("verdict %#x for\n% x, became\n% x", verdict, in.Frame, out.Frame)
	}
}

// receives passes a pod's frame through the programs like the kernel, up to where it ends.
func (b *bench) receives(frame []byte) (fate, []byte) {
	b.t.Helper()
	in := bpftest.Packet{Frame: frame, From: b.key.Ifindex}
	verdict, out := bpftest.RunTC(b.t, b.d.Observe(), b.key.Ifindex, in)
	same := bytes.Equal(in.Frame, out.Frame)
	switch {
	case b.countDropped():
	case verdict == tcPass:
		b.passesAgain(b.d.Observe(), out)
		return passed(same, toClient), out.Frame
	case verdict == tcRedirect && out.TCIndex != 0:
		b.passesAgain(b.d.Steer(), out)
		return toPod, out.Frame
	}
	b.t.Fatalf("verdict %#x, tc_index %#x for\n% x, became\n% x", verdict, out.TCIndex, in.Frame, out.Frame)
	return "", nil
}

// countDropped reports whether another packet has been counted as dropped.
func (b *bench) countDropped() bool {
	b.t.Helper()
	var perCPU []uint64
	must(b.t, b.d.objects.Counters.Lookup(uint32(probeletCounterCOUNT_DROPPED), &perCPU))
	before := b.dropped
	b.dropped = 0
	for _, n := range perCPU {
		b.dropped += n
	}
	return b.dropped != before
}

// flowTable returns all flows.
func (b *bench) flowTable() map[probeletFlowKey]probeletFlow {
	b.t.Helper()
	return entries[probeletFlowKey, probeletFlow](b.t, b.d.objects.Flows)
}

func entries[K comparable, V any](t testing.TB, m *ebpf.Map) map[K]V {
	t.Helper()
	all := map[K]V{}
	var key K
	var value V
	iterator := m.Iterate()
	for iterator.Next(&key, &value) {
		all[key] = value
	}
	must(t, iterator.Err())
	return all
}

func (b *bench) noFlows() {
	b.t.Helper()
	if flows := b.flowTable(); len(flows) != 0 {
		b.t.Fatalf("flows left: %+v", flows)
	}
	if stored := entries[probeletFlowKey, probeletStored](b.t, b.d.objects.Requests); len(stored) != 0 {
		b.t.Fatalf("stored requests left: %d", len(stored))
	}
	if slots := b.flowPorts(); slots != [flowPortSlots]uint32{} {
		b.t.Fatal("ports count as in use")
	}
}

// flow returns the only flow.
func (b *bench) flow() probeletFlow {
	b.t.Helper()
	flows := b.flowTable()
	if len(flows) != 1 {
		b.t.Fatalf("%d flows", len(flows))
	}
	for _, f := range flows {
		return f
	}
	panic("unreachable")
}

// flowPortSlots is FLOW_PORT_SLOTS in bpf/maps.h.
const flowPortSlots = 4096

// flowPorts returns the programs' variable of that name.
func (b *bench) flowPorts() (slots [flowPortSlots]uint32) {
	b.t.Helper()
	content, err := b.bss.LookupBytes(uint32(0))
	must(b.t, err)
	for i := range slots {
		slots[i] = binary.NativeEndian.Uint32(content[int(carrying.flowPorts)+4*i:])
	}
	return slots
}

func (b *bench) counted(name string, want uint64) {
	b.t.Helper()
	counters, err := b.d.Counters()
	must(b.t, err)
	if counters[name] != want {
		b.t.Fatalf("counter %s is %d, want %d; all: %v", name, counters[name], want, counters)
	}
}

// records returns the records since the last call.
func (b *bench) records() []Record {
	b.t.Helper()
	r, err := b.d.Records()
	must(b.t, err)
	defer r.Close() //nolint:errcheck // a test's
	return readAll(b.t, r)
}

// readAll returns all pending records.
func readAll(t testing.TB, r *RecordReader) (all []Record) {
	t.Helper()
	for r.Pending() {
		var record Record
		must(t, r.Next(&record))
		record.Payload = bytes.Clone(record.Payload)
		all = append(all, record)
	}
	return all
}

// wait makes all evidence, tallies and flows older by d.
func (b *bench) wait(d time.Duration) {
	b.t.Helper()
	for key, f := range b.flowTable() {
		must(b.t, b.d.objects.Flows.Put(key, older(f, d)))
	}
	for ifindex, device := range entries[uint32, probeletDevice](b.t, b.d.objects.Devices) {
		must(b.t, b.d.objects.Devices.Put(ifindex, older(device, d)))
	}
	keys, err := b.pod.Keys()
	must(b.t, err)
	for _, key := range keys {
		e, _, err := b.pod.Get(key)
		must(b.t, err)
		b.setTally(key, older(b.tally(key), d))
		must(b.t, b.pod.Renew(key, older(e, d)))
	}
}

// older returns v with all its times d earlier, but at least 1; 0 stays, because it means no time.
func older[T probeletFlow | probeletDevice | Tally | Evidence](v T, d time.Duration) T {
	for _, time := range times(&v) {
		if *time != 0 {
			*time -= min(uint64(d), *time-1)
		}
	}
	return v
}

// times returns the fields of v that are times.
func times(v any) []*uint64 {
	switch v := v.(type) {
	case *probeletFlow:
		return []*uint64{&v.StartedAt, &v.Deadline, &v.EvidenceAt}
	case *probeletDevice:
		return []*uint64{&v.TrialAt, &v.LostAt, &v.WithdrawnAt}
	case *Tally:
		return []*uint64{&v.AnsweredAt, &v.WithdrawnAt, &v.WatchedAt, &v.AskedAt, &v.ServedAt, &v.ClosedAt}
	case *Evidence:
		return []*uint64{&v.ObservedAt, &v.FreshUntil, &v.TrafficUntil}
	}
	return nil
}

// another returns another client on the same machine.
func another(client netip.AddrPort, n uint16) netip.AddrPort {
	return netip.AddrPortFrom(client.Addr(), client.Port()+n)
}
