package store

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"pgregory.net/rapid"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/evidence"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// The policy is run through the same histories twice: on its own, and with everything that stands between it and a probe, that is outcomes
// as the kernel reports them, records in real maps, and the verdicts of the real programs.
func TestKernelDoesWhatThePolicySays(t *testing.T) {
	node := bpftest.NewNode(t)
	bpfDir := bpftest.BPFDir(t)
	d, err := datapath.Ensure(t.Context(), bpfDir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	if err := d.SetProber(datapath.Prober{AnyLocal: true}); err != nil {
		t.Fatal(err)
	}
	pods := []attached{attachPod(t, d, bpfDir, node, attach.HookTC), attachPod(t, d, bpfDir, node, attach.HookXDP)}
	verdicts := map[verdict]int{}
	bpftest.Do(t, node.NS, func() error {
		rapid.Check(t, func(rt *rapid.T) {
			h := newHistory(t, rt, d, rapid.SampledFrom(pods).Draw(rt, "pod"))
			defer h.end()
			actions := map[string]func(*rapid.T){
				"wait":     h.wait,
				"listener": h.closeListener,
				"specs":    h.setSpecs,
				"withdraw": h.withdraw,
				"refresh":  h.refresh,
				"daemon":   h.restartDaemon,
				"":         func(*rapid.T) {},
			}
			for i := range 20 { // mostly probes
				actions[fmt.Sprint("probe ", i)] = h.probe
			}
			for name, action := range actions {
				actions[name] = func(rt *rapid.T) {
					if !h.lost {
						action(rt)
					}
				}
			}
			rt.Repeat(actions)
			for v, n := range h.verdicts {
				verdicts[v] += n
			}
		})
		return nil
	})
	t.Logf("%v", verdicts)
	for _, v := range []verdict{passed, answered, handedOver} {
		if verdicts[v] == 0 {
			t.Errorf("no probe was %s", v)
		}
	}
}

// attached is a pod with a device that answers are known to arrive by.
type attached struct {
	*bpftest.Pod
	key  datapath.DeviceKey
	hook attach.Hook
}

// String is for rapid.
func (a attached) String() string { return "hook " + string(a.hook) }

func attachPod(t *testing.T, d *datapath.Datapath, bpfDir string, node *bpftest.Node, hook attach.Hook) attached {
	t.Helper()
	pod := node.AddPod(t)
	id := attach.ID{ContainerID: pod.HostIfName, IfName: "eth0"}
	bpftest.Do(t, node.NS, func() error {
		return attach.Attach(d, bpfDir, id, attach.Target{IfIndex: pod.IfIndex, PodNetns: pod.Netns, Hook: hook}, attach.ViaAuto)
	})
	t.Cleanup(func() {
		bpftest.Do(t, node.NS, func() error { return attach.Detach(d, bpfDir, id) })
	})
	key, err := attach.Device(bpfDir, id)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.LookInto(key, -1, 0); err != nil { // nobody listens on some of the ports
		t.Fatal(err)
	}
	maps, err := opened(d, key)
	now := datapath.Now()
	if err == nil {
		err = maps.Sync(Records{datapath.PortKey(9): {ObservedAt: now, FreshUntil: now + second*60}})
	}
	if err != nil {
		t.Fatal(err)
	}
	_ = pod.Dial(t, pod.IPv4.String()+":9").Close() // nobody listens there
	if device, err := d.Device(key); err != nil || device.Trust != datapath.TrustProven {
		t.Fatalf("%+v, %v", device, err)
	}
	return attached{pod, key, hook}
}

type verdict string

const (
	passed     verdict = "passed"
	answered   verdict = "answered"
	handedOver verdict = "handed over"
)

// What the probes of a history ask, the last one only at startup.
var asked = []probe.Endpoint{
	{Port: 80, Kind: probe.HTTP, Path: "/x"}, {Port: 80, Kind: probe.HTTP, Path: "/y"}, {Port: 81, Kind: probe.HTTP, Path: "/x"},
	{Port: 82, Kind: probe.TCP}, {Port: 82, Kind: probe.HTTP, Path: "/x"}, {Port: 81, Kind: probe.HTTP, Path: "/startup"},
}

const (
	period, timeout = 40 * time.Millisecond, 20 * time.Millisecond
	// near is how close a bound must be for the speed of this machine to decide; such bounds are not tested.
	near = uint64(4 * time.Millisecond)
	// quick is far more than an ordinary exchange takes; slow ones are made to take that much longer.
	quick, slowly = 3 * time.Millisecond, timeout + timeout/2
)

// history is the history of a pod.
type history struct {
	attached
	t *testing.T
	d *datapath.Datapath

	policy    *probe.Tracker            // the policy alone
	closed    map[uint16]uint64         // when the kernel must have withdrawn all evidence of a port
	withdrawn map[probe.Endpoint]uint64 // when it must have withdrawn that of an endpoint
	tracker   *probe.Tracker            // the daemon's
	maps      *Pod
	records   *datapath.RecordReader
	assembler *evidence.Assembler

	specs    []probe.EndpointSpec
	verdicts map[verdict]int
	// lost is set once this machine was too slow to keep to the intended times. Then the history ends.
	lost bool
}

func newHistory(t *testing.T, rt *rapid.T, d *datapath.Datapath, pod attached) *history {
	h := &history{
		attached: pod, t: t, d: d, closed: map[uint16]uint64{}, withdrawn: map[probe.Endpoint]uint64{}, verdicts: map[verdict]int{},
		policy: probe.NewTracker(), tracker: probe.NewTracker(), assembler: evidence.NewAssembler(),
	}
	var err error
	if h.maps, err = opened(d, pod.key); err == nil {
		h.records, err = d.Records()
	}
	if err == nil {
		err = h.maps.Sync(Records{})
	}
	if err != nil {
		t.Fatal(err)
	}
	h.records.SetDeadline(time.Unix(1, 0))
	h.observations() // of the previous history
	h.setSpecs(rt)
	return h
}

func (h *history) end() { _ = h.records.Close() }

// observations returns the observations that the records amount to.
func (h *history) observations() (observed []evidence.Observation) {
	for {
		var r datapath.Record
		err := h.records.Next(&r)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return observed
		}
		if err != nil {
			h.t.Fatal(err)
		}
		if o, ok := h.assembler.Add(r); ok {
			observed = append(observed, o)
		}
	}
}

func (h *history) setSpecs(rt *rapid.T) {
	var probes []probe.Spec
	for i, e := range asked {
		p := probe.Spec{
			Container: fmt.Sprint(i), Type: probe.Liveness, Kind: e.Kind, Port: e.Port, Path: e.Path, Period: period, Timeout: timeout,
			Instance: rapid.SampledFrom([]string{"a", "a", "a", "b"}).Draw(rt, "instance"),
		}
		if e.Path == "/startup" {
			p.Type = probe.Startup
		}
		if rapid.IntRange(0, 9).Draw(rt, "headers") == 0 {
			p.Headers = []probe.Header{{Name: "A", Value: "1"}}
		}
		if rapid.IntRange(0, 9).Draw(rt, "not asked") > 0 {
			probes = append(probes, p)
		}
	}
	settings := probe.NewDefaults().Settings(map[string]string{
		probe.AnnotationMode:      rapid.SampledFrom([]string{"answer", "answer", "answer", "answer", "observe", "off"}).Draw(rt, "mode"),
		probe.AnnotationStaleness: rapid.SampledFrom([]string{"1", "5", "5", "0.5"}).Draw(rt, "staleness"),
	})
	specs, err := probe.Endpoints(probe.Pod{IPs: []netip.Addr{h.IPv4}, Probes: probes}, settings, Limits)
	if err != nil {
		rt.Fatal(err)
	}
	h.specs = specs
	now := datapath.Now()
	h.policy.SetEndpoints(specs, now)
	h.tracker.SetEndpoints(specs, now)
	h.sync(rt)
}

func (h *history) sync(rt *rapid.T) {
	want, err := Desired(h.tracker)
	if err == nil {
		err = h.maps.Sync(want)
	}
	if err != nil {
		rt.Fatal(err)
	}
}

func (h *history) wait(rt *rapid.T) {
	time.Sleep(time.Duration(rapid.IntRange(0, 70).Draw(rt, "wait")) * time.Millisecond)
}

func (h *history) withdraw(rt *rapid.T) {
	e := rapid.SampledFrom(asked).Draw(rt, "withdrawn")
	now := datapath.Now()
	meant := func(other probe.Endpoint) bool { return other == e }
	h.policy.Withdraw(meant, now)
	h.tracker.Withdraw(meant, now)
	h.sync(rt)
}

// restartDaemon forgets everything but the questions and the maps, and restores what they have.
func (h *history) restartDaemon(rt *rapid.T) {
	before := h.tracker.Evidence()
	// Evidence of an endpoint whose question is unknown is not in the maps.
	h.policy.Withdraw(func(e probe.Endpoint) bool { return e.Kind == probe.HTTP && before[e].Question == probe.Question{} }, datapath.Now())
	h.tracker = probe.NewTracker()
	now := datapath.Now()
	// Nor is the number of successes in a row.
	h.policy.Void(func(e probe.Endpoint) bool { return before[e].FreshUntil == 0 }, now)
	h.tracker.SetEndpoints(h.specs, now)
	maps, err := opened(h.d, h.key)
	if err != nil {
		h.t.Fatal(err)
	}
	h.maps = maps
	for _, s := range h.specs {
		question := before[s.Endpoint].Question
		if key, ok := Key(s.Endpoint, question); ok && s.Observed {
			h.tracker.Restore(s.Endpoint, Evidence(question, maps.Records()[key]), now)
		}
	}
	h.sync(rt)
}

// closeListener withdraws all evidence, if the kernel can be watched.
func (h *history) closeListener(rt *rapid.T) {
	if !h.d.Watched() {
		return
	}
	ports := []uint16{80, 81, 82}
	port := rapid.SampledFrom(append(ports, 83)).Draw(rt, "closed")
	// In another goroutine, because this one is in the node's namespace.
	closed := make(chan error)
	go func() {
		closed <- h.NS.Do(func(ns.NetNS) error {
			listener, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
			if err != nil {
				return err
			}
			return listener.Close()
		})
	}()
	if err := <-closed; err != nil {
		h.t.Fatal(err)
	}
	for _, port := range ports { // everything that is known of the pod
		h.closed[port] = datapath.Now()
	}
}

// refresh adds the outcome of a request by the daemon itself.
func (h *history) refresh(rt *rapid.T) {
	e := rapid.SampledFrom(asked).Draw(rt, "refreshed")
	event := rapid.SampledFrom([]probe.Event{probe.Answered, probe.Answered, probe.Reset, probe.Connected}).Draw(rt, "refresh")
	if o, ok := h.refreshed(e, event, rapid.SampledFrom([]int{200, 200, 500, 302}).Draw(rt, "status of the refresh")); ok {
		h.learn(rt, o)
	}
}

// refreshed returns the outcome of the daemon's own request, which it can only make if it has seen that of a probe.
func (h *history) refreshed(e probe.Endpoint, event probe.Event, status int) (o probe.Outcome, ok bool) {
	question := h.tracker.Evidence()[e].Question
	if e.Kind == probe.HTTP && question == (probe.Question{}) {
		return o, false
	}
	o = h.outcome(e, datapath.Now()-1, event, status)
	o.Question, o.Refresh = question, true
	return o, true
}

// outcome returns the outcome of a probe that has just ended.
func (h *history) outcome(e probe.Endpoint, began uint64, event probe.Event, status int) probe.Outcome {
	now := datapath.Now()
	o := probe.Outcome{
		Port: e.Port, Kind: e.Kind, Event: event, Status: status, ObservedAt: now, Duration: time.Duration(now - began),
	}
	if e.Kind == probe.HTTP {
		var err error
		if o.Request, err = probe.ParseRequest([]byte(h.request(e))); err != nil {
			h.t.Fatal(err)
		}
	}
	return o
}

func (h *history) learn(rt *rapid.T, o probe.Outcome) {
	h.policy.Observe(o)
	h.tracker.Observe(o)
	h.sync(rt)
}

// expect returns what the policy decides about a probe now. certain is false if that is about to change.
func (h *history) expect(e probe.Endpoint, now uint64) (v verdict, certain bool) {
	certain = true
	before := func(bound uint64) bool {
		certain = certain && (bound == 0 || bound > now+near || bound+near < now)
		return now < bound
	}
	gate := h.policy.Gates()[e.Port]
	if !before(gate.FreshUntil) || gate.ObservedAt <= h.closed[e.Port] {
		return passed, certain
	}
	known := h.policy.Evidence()[e]
	switch {
	case e.Kind == probe.TCP:
		return answered, certain
	case known.Result == probe.Success && before(known.FreshUntil) && known.ObservedAt > max(h.closed[e.Port], h.withdrawn[e]):
		return answered, certain
	}
	return handedOver, certain
}

// observed reports whether the port of the endpoint is observed, even if only for others.
func (h *history) observed(e probe.Endpoint) bool {
	return slices.ContainsFunc(h.specs, func(s probe.EndpointSpec) bool { return s.Observed && s.Port == e.Port })
}

// Behaviours of a pod that a probe reaches.
const (
	refuses   = "refuses"
	resets    = "resets"
	silent    = "silent"
	responds  = "responds"
	slowReply = "responds slowly"
)

func (h *history) probe(rt *rapid.T) {
	e := rapid.SampledFrom(asked).Draw(rt, "endpoint")
	behaviour := rapid.SampledFrom([]string{responds, responds, responds, responds, responds, responds, responds, responds, slowReply, silent, resets, refuses}).Draw(rt, "pod")
	status := rapid.SampledFrom([]int{200, 200, 200, 200, 200, 200, 204, 302, 503}).Draw(rt, "status")
	if e.Kind == probe.TCP && (behaviour == silent || behaviour == resets) {
		behaviour = responds // without a request it cannot be silent
	}
	began := datapath.Now()
	want, certain := h.expect(e, began)
	c := h.dial(e)
	got := c.probe()
	if h.lost = datapath.Now()-began > near/2; h.lost {
		c.forget()
		return
	}
	if certain && got != want {
		rt.Fatalf("%s was %s, want %s; gate %+v, evidence %+v, withdrawn %d and %d, now %d",
			e, got, want, h.policy.Gates()[e.Port], h.policy.Evidence()[e], h.closed[e.Port], h.withdrawn[e], began)
	}
	h.verdicts[got]++
	if got == answered {
		c.forget()
		return
	}
	if !h.observed(e) {
		c.forget()
		if reported := h.observations(); len(reported) > 0 {
			rt.Fatalf("%s is not observed, and %+v reported", e, reported)
		}
		return
	}
	if e.Kind == probe.HTTP && rapid.Bool().Draw(rt, "refreshed meanwhile") {
		if o, ok := h.refreshed(e, probe.Answered, 200); ok {
			h.learn(rt, o)
		}
	}
	o := c.exchange(behaviour, status)
	h.lost = o.Duration > quick
	if behaviour == slowReply || behaviour == silent {
		h.lost = o.Duration > slowly+quick
	}
	if h.lost = h.lost || datapath.Now() > o.ObservedAt+near/2; h.lost { // processing the outcome took too long
		return
	}
	h.policy.Observe(o)
	switch {
	case o.Event == probe.Reset:
		h.closed[e.Port] = o.ObservedAt
	case o.Status >= 300:
		h.withdrawn[e] = o.ObservedAt
	}
	reported := h.observations()
	if len(reported) != 1 || reported[0].Device != h.key {
		rt.Fatalf("%s, %s: %s, %d: outcomes %+v are reported, began %d", e, got, behaviour, status, reported, c.began)
	}
	if o.Event == probe.Reset || o.Status >= 300 {
		h.wantVoid(rt, e)
	}
	h.tracker.Observe(reported[0].Outcome)
	h.sync(rt)
	h.compare(rt)
}

// wantVoid probes an endpoint that has just failed, before the daemon has learned of it.
func (h *history) wantVoid(rt *rapid.T, e probe.Endpoint) {
	c := h.dial(e)
	if got := c.probe(); got == answered {
		rt.Fatalf("%s was answered after it had failed", e)
	}
	c.forget()
	h.observations()
}

// compare compares what the daemon has learned from the kernel with what the policy knows from the truth.
func (h *history) compare(rt *rapid.T) {
	policy, daemon := h.policy.Evidence(), h.tracker.Evidence()
	for _, e := range slices.SortedFunc(maps.Keys(policy), func(a, b probe.Endpoint) int { return int(a.Port) - int(b.Port) }) {
		a, b := policy[e], daemon[e]
		if a.Result != b.Result || a.Status != b.Status || apart(a.ObservedAt, b.ObservedAt) || apart(a.FreshUntil, b.FreshUntil) {
			rt.Fatalf("%s: the policy knows %+v, the daemon %+v", e, a, b)
		}
	}
}

func apart(a, b uint64) bool { return max(a, b)-min(a, b) > near }

// connection is a connection of a prober, whose packets the programs are run on one by one.
type connection struct {
	*history
	e           probe.Endpoint
	client, srv netip.AddrPort
	began       uint64
	serverISN   uint32 // as the client knows it
	handed      bool
}

const clientISN, podISN = 1000, 7000

// clients counts the connections so far.
var clients int

func (h *history) dial(e probe.Endpoint) *connection {
	// Not one of the ports that a previous history may have left in the flow table.
	clients++
	return &connection{
		history: h, e: e, began: datapath.Now(), serverISN: podISN,
		client: netip.AddrPortFrom(h.HostIPv4, uint16(10000+clients%50000)), srv: netip.AddrPortFrom(h.IPv4, e.Port),
	}
}

// request returns what a probe of the endpoint sends.
func (h *history) request(e probe.Endpoint) string {
	return fmt.Sprintf("GET %s HTTP/1.1\r\nHost: %s:%d\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\nConnection: close\r\n\r\n", e.Path, h.IPv4, e.Port)
}

func (c *connection) request() string { return c.history.request(c.e) }

// fate is what the programs do with a packet.
type fate string

const (
	onward    fate = "goes on as it is"
	toPod     fate = "goes to the pod, rewritten"
	toClient  fate = "goes to the client, rewritten"
	swallowed fate = "ends here"
)

// Verdicts of the programs (include/uapi/linux/pkt_cls.h, bpf.h).
const (
	unspec     = 0xffffffff
	redirected = 7
	upTheStack = 2
)

// steer runs the programs on a packet of the client. It returns its fate, and the packet as rewritten.
func (c *connection) steer(flags string, seq, ack uint32, payload string) (fate, bpftest.Segment) {
	c.t.Helper()
	sent := bpftest.Segment{
		Src: c.client, Dst: c.srv, SrcMAC: bpftest.ClientMAC, DstMAC: bpftest.PodMAC,
		Flags: flags, Seq: seq, Ack: ack, Window: 501, Payload: payload,
	}.Bytes(c.t, nil)
	verdict, frame := bpftest.RunSteer(c.t, c.d.Steer(), c.key.Ifindex, 0, sent)
	same := bytes.Equal(frame, sent)
	switch {
	case verdict == unspec && same:
		return onward, bpftest.Segment{}
	case verdict == unspec:
		return toPod, bpftest.ParseSegment(c.t, frame)
	case verdict != redirected:
		c.t.Fatalf("verdict %d", verdict)
	case same:
		return swallowed, bpftest.Segment{}
	}
	if c.hook == attach.HookXDP {
		if verdict, frame = bpftest.RunRespond(c.t, c.d.Respond(), c.key.Ifindex, frame); verdict != upTheStack {
			c.t.Fatalf("verdict %d of respond", verdict)
		}
	}
	return toClient, bpftest.ParseSegment(c.t, frame)
}

// podSends runs observe on a packet of the pod. It returns what is sent back to the pod, or nil.
func (c *connection) podSends(flags string, seq, ack uint32, payload string) (back *bpftest.Segment) {
	c.t.Helper()
	s := bpftest.Segment{
		Src: c.srv, Dst: c.client, SrcMAC: bpftest.PodMAC, DstMAC: bpftest.ClientMAC,
		Flags: flags, Seq: seq, Ack: ack, Window: 502, Payload: payload,
	}
	verdict, out := bpftest.RunTC(c.t, c.d.Observe(), c.key.Ifindex, bpftest.Packet{Frame: s.Bytes(c.t, nil), From: c.key.Ifindex})
	if verdict != redirected {
		return nil
	}
	parsed := bpftest.ParseSegment(c.t, out.Frame)
	return &parsed
}

// probe starts a probe, and ends it if it is answered.
func (c *connection) probe() verdict {
	fate, answer := c.steer("S", clientISN, 0, "")
	if fate == onward {
		return passed
	}
	if fate != toClient || answer.Flags != "SA" {
		c.t.Fatalf("the SYN %s: %v", fate, answer)
	}
	c.serverISN = answer.Seq
	c.steer("A", clientISN+1, c.serverISN+1, "")
	if c.e.Kind == probe.TCP {
		if fate, answer = c.steer("FA", clientISN+1, c.serverISN+1, ""); fate != toClient || answer.Flags != "RA" {
			c.t.Fatalf("the end of a connection %s: %v", fate, answer)
		}
		return answered
	}
	fate, answer = c.steer("PA", clientISN+1, c.serverISN+1, c.request())
	switch {
	case fate == toClient:
		return answered
	case fate != toPod || answer.Flags != "S" || answer.Seq != clientISN:
		c.t.Fatalf("a request %s: %v", fate, answer)
	}
	c.handed = true
	return handedOver
}

// forget removes what is left of the connection.
func (c *connection) forget() { c.steer("RA", clientISN+1, c.serverISN+1, "") }

// open makes the pod accept the connection and receive the request, if any.
func (c *connection) open() {
	back := c.podSends("SA", podISN, clientISN+1, "")
	if c.handed {
		if back == nil || back.Payload != c.request() || back.Ack != podISN+1 {
			c.t.Fatalf("the pod gets %v", back)
		}
		return
	}
	c.steer("A", clientISN+1, c.serverISN+1, "")
	if c.e.Kind == probe.HTTP {
		c.steer("PA", clientISN+1, c.serverISN+1, c.request())
	}
}

// exchange plays a probe that reached the pod, and returns its outcome as the prober sees it.
func (c *connection) exchange(behaviour string, status int) (o probe.Outcome) {
	defer c.forget()
	end := func(event probe.Event, status int) probe.Outcome { return c.outcome(c.e, c.began, event, status) }
	if behaviour == refuses {
		c.podSends("RA", 0, clientISN+1, "")
		o = end(probe.Reset, 0)
		if !c.handed { // otherwise it is known what was asked for
			o.Kind = ""
		}
		return o
	}
	c.open()
	if behaviour == slowReply || behaviour == silent {
		time.Sleep(slowly)
	}
	if c.e.Kind == probe.TCP {
		c.steer("FA", clientISN+1, c.serverISN+1, "")
		return end(probe.Connected, 0)
	}
	sent := clientISN + 1 + uint32(len(c.request()))
	switch behaviour {
	case resets:
		c.podSends("RA", podISN+1, sent, "")
		return end(probe.Reset, 0)
	case silent:
		c.steer("FA", sent, c.serverISN+1, "")
		return end(probe.NoAnswer, 0)
	}
	response := fmt.Sprintf("HTTP/1.1 %d Status\r\nContent-Length: 0\r\n\r\n", status)
	c.podSends("PA", podISN+1, sent, response)
	o = end(probe.Answered, status)
	c.steer("FA", sent, c.serverISN+1+uint32(len(response)), "")
	if status < 300 {
		o = end(probe.Answered, status) // a success is complete when the prober has closed
	}
	return o
}
