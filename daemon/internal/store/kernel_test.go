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
	"github.com/probelet/probelet/daemon/internal/probe"
)

// The same histories through the policy alone and through everything that stands between it and a probe: outcomes as the
// kernel reports them, records in real maps, the verdicts of the real programs.
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

// attached is a pod by whose device answers are known to arrive.
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

// What the probes of a history ask; the last one at the start only.
var asked = []probe.Endpoint{
	{Port: 80, Kind: probe.HTTP, Path: "/x"}, {Port: 80, Kind: probe.HTTP, Path: "/y"}, {Port: 81, Kind: probe.HTTP, Path: "/x"},
	{Port: 82, Kind: probe.TCP}, {Port: 82, Kind: probe.HTTP, Path: "/x"}, {Port: 81, Kind: probe.HTTP, Path: "/startup"},
}

const (
	period, timeout = 40 * time.Millisecond, 20 * time.Millisecond
	// A bound that is so near that this machine's speed decides is not drawn upon.
	near = uint64(4 * time.Millisecond)
	// An exchange takes far less than quick, or is meant to be slow and takes so much longer.
	quick, slowly = 3 * time.Millisecond, timeout + timeout/2
)

// history is one pod's.
type history struct {
	attached
	t *testing.T
	d *datapath.Datapath

	policy    *probe.Tracker            // the policy alone
	closed    map[uint16]uint64         // when the kernel must have voided all of a port's evidence
	withdrawn map[probe.Endpoint]uint64 // when it must have voided an endpoint's own
	tracker   *probe.Tracker            // the daemon's
	maps      *Pod
	outcomes  *datapath.OutcomeReader

	specs    []probe.EndpointSpec
	since    uint64 // the last change of what is asked, or believed
	verdicts map[verdict]int
	// lost: this machine was so slow once that times are not what they were meant to be. Nothing more is done then.
	lost bool
}

func newHistory(t *testing.T, rt *rapid.T, d *datapath.Datapath, pod attached) *history {
	h := &history{
		attached: pod, t: t, d: d, closed: map[uint16]uint64{}, withdrawn: map[probe.Endpoint]uint64{}, verdicts: map[verdict]int{},
		policy: probe.NewTracker(), tracker: probe.NewTracker(),
	}
	var err error
	if h.maps, err = opened(d, pod.key); err == nil {
		h.outcomes, err = d.Outcomes()
	}
	if err == nil {
		err = h.maps.Sync(Records{})
	}
	if err != nil {
		t.Fatal(err)
	}
	h.outcomes.SetDeadline(time.Unix(1, 0))
	_, _ = h.outcomes.Read() // of the history before
	h.setSpecs(rt)
	return h
}

func (h *history) end() { _ = h.outcomes.Close() }

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
		probe.AnnotationStaleness: rapid.SampledFrom([]string{"1+timeout", "5", "5", "0.5"}).Draw(rt, "staleness"),
	})
	specs, err := probe.Endpoints(probe.Pod{Probes: probes}, settings, Limits)
	if err != nil {
		rt.Fatal(err)
	}
	h.specs = specs
	now := datapath.Now()
	h.since = now
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
	h.since = now
	h.policy.Withdraw(meant, now)
	h.tracker.Withdraw(meant, now)
	h.sync(rt)
}

// restartDaemon loses all but the maps, and takes over what is in them.
func (h *history) restartDaemon(rt *rapid.T) {
	h.tracker = probe.NewTracker()
	now := datapath.Now()
	h.since = now
	h.tracker.SetEndpoints(h.specs, now)
	maps, err := opened(h.d, h.key)
	if err != nil {
		h.t.Fatal(err)
	}
	h.maps = maps
	for _, s := range h.specs {
		if key, ok := Key(s.Endpoint); ok && s.Observed {
			h.tracker.Restore(s.Endpoint, Evidence(maps.Records()[key]), now)
		}
	}
	h.sync(rt)
}

// closeListener withdraws, where the kernel can be watched.
func (h *history) closeListener(rt *rapid.T) {
	if !h.d.Watched() {
		return
	}
	port := rapid.SampledFrom([]uint16{80, 81, 82}).Draw(rt, "closed")
	// In a goroutine, because this one is in the node's namespace.
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
	h.closed[port] = datapath.Now()
}

// refresh is an outcome that the daemon itself has come by.
func (h *history) refresh(rt *rapid.T) {
	now := datapath.Now()
	o := probe.Outcome{
		Endpoint: rapid.SampledFrom(asked).Draw(rt, "refreshed"), ObservedAt: now, Duration: 1, Refresh: true,
		Event:  rapid.SampledFrom([]probe.Event{probe.Answered, probe.Answered, probe.Reset, probe.Connected}).Draw(rt, "refresh"),
		Status: rapid.SampledFrom([]int{200, 200, 500, 302}).Draw(rt, "status of the refresh"),
	}
	if kept := uint64(rapid.IntRange(0, 60).Draw(rt, "kept for")) * uint64(time.Millisecond); o.Event == probe.Answered {
		// Not from before the question: of that a daemon knows nothing that was restarted since.
		o.ConnectedAt = max(now-kept, h.since)
	}
	h.learn(rt, o)
}

func (h *history) learn(rt *rapid.T, o probe.Outcome) {
	h.policy.Observe(o)
	h.tracker.Observe(o)
	h.sync(rt)
}

// expect is what the policy says of a probe now; certain is false where it is about to say something else.
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

// observed is whether the kernel has a record of the endpoint's port, and of itself.
func (h *history) observed(e probe.Endpoint) (port, endpoint bool) {
	for _, s := range h.specs {
		port = port || s.Observed && s.Port == e.Port
		endpoint = endpoint || s.Observed && s.Endpoint == e
	}
	return port, endpoint
}

// behaviours of a pod whose probe reaches it.
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
		behaviour = responds // nothing is asked that it could be silent to
	}
	began := datapath.Now()
	want, certain := h.expect(e, began)
	c := h.dial(e)
	got := c.probe()
	h.lost = datapath.Now()-began > near/2
	if certain && !h.lost && got != want {
		rt.Fatalf("%s was %s, want %s; gate %+v, evidence %+v, withdrawn %d and %d, now %d",
			e, got, want, h.policy.Gates()[e.Port], h.policy.Evidence()[e], h.closed[e.Port], h.withdrawn[e], began)
	}
	h.verdicts[got]++
	if got == answered {
		c.forget()
		return
	}
	// One that was handed over is observed like one that was passed on, but for what its request has shown not to be known.
	if port, endpoint := h.observed(e); !port || !endpoint && e.Kind == probe.HTTP && (behaviour != refuses || got == handedOver) {
		c.forget() // nothing is reported of what is not known
		_, _ = h.outcomes.Read()
		return
	}
	if e.Kind == probe.HTTP && rapid.Bool().Draw(rt, "refreshed meanwhile") {
		now := datapath.Now()
		h.learn(rt, probe.Outcome{Endpoint: e, Event: probe.Answered, Status: 200, ObservedAt: now, ConnectedAt: now, Duration: 1, Refresh: true})
	}
	o := c.exchange(behaviour, status)
	h.lost = o.Duration > quick
	if behaviour == slowReply || behaviour == silent {
		h.lost = o.Duration > slowly+quick
	}
	if h.lost {
		return
	}
	h.policy.Observe(o)
	switch {
	case o.Event == probe.Reset:
		h.closed[e.Port] = o.ObservedAt
	case o.Status >= 300:
		h.withdrawn[e] = o.ObservedAt
	}
	reported, err := h.outcomes.Read()
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		h.t.Fatal(err)
	}
	if len(reported) != 1 || reported[0].Device != h.key {
		rt.Fatalf("%s, %s: %s, %d: outcomes %+v are reported, began %d", e, got, behaviour, status, reported, c.began)
	}
	if o.Event == probe.Reset || o.Status >= 300 {
		h.wantVoid(rt, e)
	}
	if outcome, ok := Outcome(reported[0], h.tracker.Endpoints()); ok {
		h.tracker.Observe(outcome)
		h.sync(rt)
	}
	h.compare(rt)
}

// wantVoid probes an endpoint that has just failed, before the daemon has learned of that.
func (h *history) wantVoid(rt *rapid.T, e probe.Endpoint) {
	c := h.dial(e)
	if got := c.probe(); got == answered {
		rt.Fatalf("%s was answered after it had failed", e)
	}
	c.forget()
	_, _ = h.outcomes.Read()
}

// compare holds what the daemon has learned from the kernel against what the policy has from the truth.
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

// connection is a prober's, put packet by packet through the programs.
type connection struct {
	*history
	e           probe.Endpoint
	client, srv netip.AddrPort
	began       uint64
	serverISN   uint32 // as the client knows it
	handed      bool
}

const clientISN, podISN = 1000, 7000

// clients is how many connections there have been.
var clients int

func (h *history) dial(e probe.Endpoint) *connection {
	// Not one of the ports that a history before may have left in the flow table.
	clients++
	return &connection{
		history: h, e: e, began: datapath.Now(), serverISN: podISN,
		client: netip.AddrPortFrom(h.HostIPv4, uint16(10000+clients%50000)), srv: netip.AddrPortFrom(h.IPv4, e.Port),
	}
}

func (c *connection) request() string {
	return "GET " + c.e.Path + " HTTP/1.1\r\nHost: pod\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\nConnection: close\r\n\r\n"
}

// fate is what becomes of a packet.
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

// steer puts a client's packet through the programs. It returns what becomes of it, and it, rewritten.
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

// podSends puts a pod's packet through observe. It returns what goes back to the pod, nil if nothing does.
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

// probe begins one, and ends it if it is answered.
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

// forget ends what is left of the connection.
func (c *connection) forget() { c.steer("RA", clientISN+1, c.serverISN+1, "") }

// open makes the pod accept the connection and get the request, if there is one.
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

// exchange is what comes of a probe that reached the pod, as the prober sees it.
func (c *connection) exchange(behaviour string, status int) (o probe.Outcome) {
	defer c.forget()
	end := func(event probe.Event, status int) probe.Outcome {
		now := datapath.Now()
		return probe.Outcome{Endpoint: c.e, Event: event, Status: status, ObservedAt: now, Duration: time.Duration(now - c.began)}
	}
	if behaviour == refuses {
		c.podSends("RA", 0, clientISN+1, "")
		o = end(probe.Reset, 0)
		if !c.handed { // otherwise it is known what was asked for
			o.Endpoint = probe.Endpoint{Port: c.e.Port}
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
