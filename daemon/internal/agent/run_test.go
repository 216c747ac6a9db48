package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/repair/repairtest"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/store"
	"github.com/probelet/probelet/internal/polltest"
)

// node is a machine with one pod, whose HTTP server listens on port 8080.
type node struct {
	t      *testing.T
	pod    *bpftest.Pod
	d      *datapath.Datapath
	config Config
	via    attach.Via // for attaching
	log    io.Writer  // of the daemon

	server *http.Server
	status atomic.Int32 // of its responses
	served atomic.Int32 // requests that reached it
}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{t: t, pod: bpftest.NewNode(t).AddPod(t), log: t.Output()}
	n.config = Config{
		Specs:    filepath.Join(t.TempDir(), "specs.yaml"),
		Prober:   "host",
		BPFDir:   bpftest.BPFDir(t),
		StateDir: filepath.Join(t.TempDir(), "state"),
		Hook:     attach.HookTC,
		Defaults: probe.NewDefaults(),
		openSocket: func(family int) (fd int, err error) {
			err = n.pod.Node.NS.Do(func(ns.NetNS) (err error) {
				fd, err = openSocket(family)
				return err
			})
			return fd, err
		},
	}
	d, err := datapath.Ensure(t.Context(), n.config.BPFDir)
	if err != nil {
		t.Fatal(err)
	}
	n.d = d
	t.Cleanup(func() { _ = d.Close() })
	n.status.Store(http.StatusOK)
	n.server = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n.served.Add(1)
		received, _ := io.Copy(io.Discard, r.Body)
		w.Header().Set("X-Received", fmt.Sprint(received))
		status := int(n.status.Load())
		if wanted := r.Header.Get("X-Status"); wanted != "" {
			status, _ = strconv.Atoi(wanted)
		}
		w.WriteHeader(status)
	})}
	listener := n.pod.Listen(t, 8080)
	go func() { _ = n.server.Serve(listener) }()
	t.Cleanup(func() { _ = n.server.Close() })
	return n
}

// attach does what the plugin does at ADD if the runtime does not pass the name of the pod.
func (n *node) attach() { n.attachPod(n.pod) }

// idOf returns the ID of a pod's attachment, which must have a record.
func (n *node) idOf(pod *bpftest.Pod) attach.ID {
	n.t.Helper()
	records, err := attach.ReadRecords(n.config.StateDir)
	for _, r := range records {
		if r.IfIndex == pod.IfIndex {
			return r.ID()
		}
	}
	n.t.Fatalf("no record of %s: %v", pod.HostIfName, err)
	return attach.ID{}
}

func (n *node) attachPod(pod *bpftest.Pod) {
	n.t.Helper()
	record := attach.Record{
		ContainerID: "of-" + pod.HostIfName, IfName: "eth0", IfIndex: pod.IfIndex, HostIfName: pod.HostIfName, PodNetns: pod.Netns,
		PodIPs: []string{pod.IPv4.String(), pod.IPv6.String()}, CreatedAt: time.Now(),
	}
	if err := attach.WriteRecord(n.config.StateDir, record); err != nil {
		n.t.Fatal(err)
	}
	n.attachMaps(pod, record.ID())
	n.t.Cleanup(func() {
		bpftest.Do(n.t, pod.Node.NS, func() error { return attach.Detach(n.d, n.config.BPFDir, record.ID()) })
	})
}

func (n *node) attachMaps(pod *bpftest.Pod, id attach.ID) {
	n.t.Helper()
	bpftest.Do(n.t, pod.Node.NS, func() error {
		return attach.Attach(n.d, n.config.BPFDir, id, attach.Target{IfIndex: pod.IfIndex, PodNetns: pod.Netns, Hook: n.config.Hook}, n.via)
	})
}

// specs replaces the specs: one container with this readiness probe.
func (n *node) specs(probe string) {
	n.t.Helper()
	n.container("readinessProbe: {" + probe + "}")
}

// container replaces the specs: one container with these fields.
func (n *node) container(fields string) {
	n.t.Helper()
	text := fmt.Sprintf("pods: [{name: web, ips: [%s], containers: [{name: c, %s}]}]", n.pod.IPv4, fields)
	if err := os.WriteFile(n.config.Specs+".new", []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
	if err := os.Rename(n.config.Specs+".new", n.config.Specs); err != nil {
		n.t.Fatal(err)
	}
}

// start runs the daemon until stop, which may be called once or more.
func (n *node) start() (stop func()) {
	n.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, n.config, n.logger()) }()
	var stopped bool
	stop = func() {
		cancel()
		if stopped {
			return
		}
		stopped = true
		if err := <-done; err != nil {
			n.t.Errorf("daemon: %v", err)
		}
	}
	n.t.Cleanup(stop)
	return stop
}

// keepLog keeps the log of a daemon that is started afterwards. It returns a function that counts a text in it.
func (n *node) keepLog() (count func(text string) int) {
	n.t.Helper()
	file, err := os.Create(filepath.Join(n.t.TempDir(), "log"))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = file.Close() })
	n.log = io.MultiWriter(n.log, file)
	return func(text string) int {
		log, err := os.ReadFile(file.Name())
		if err != nil {
			n.t.Fatal(err)
		}
		return strings.Count(string(log), text)
	}
}

func (n *node) logger() *slog.Logger { return slog.New(slog.NewTextHandler(n.log, nil)) }

func (n *node) eventually(what string, ok func() bool) {
	n.t.Helper()
	polltest.Eventually(n.t, what, ok)
}

func (n *node) records() store.Records { return n.recordsOf(n.pod) }

func (n *node) recordsOf(pod *bpftest.Pod) store.Records {
	n.t.Helper()
	known, err := attach.OpenPod(n.d, n.config.BPFDir, n.idOf(pod))
	if err != nil {
		n.t.Fatal(err)
	}
	maps, err := store.Open(known)
	if err != nil {
		n.t.Fatal(err)
	}
	return maps.Records()
}

// device returns the pod's device, as the programs know it.
func (n *node) device() datapath.Device {
	n.t.Helper()
	key, err := attach.Device(n.config.BPFDir, n.idOf(n.pod))
	if err != nil {
		n.t.Fatal(err)
	}
	device, err := n.d.Device(key)
	if err != nil {
		n.t.Fatal(err)
	}
	return device
}

// pin returns a file of the pod's attachment.
func (n *node) pin(name string) string {
	n.t.Helper()
	return filepath.Join(datapath.AttachmentsDir(n.config.BPFDir), n.idOf(n.pod).ContainerID+"@eth0", name)
}

// detach detaches one of the pod's programs, as bpftool does.
func (n *node) detach(program string) {
	n.t.Helper()
	if err := repairtest.DetachPinned(n.pin(program)); err != nil {
		n.t.Fatal(err)
	}
}

// has reports whether the kernel has a record of the endpoint.
func (n *node) has(key datapath.EndpointKey) func() bool {
	return func() bool {
		_, ok := n.records()[key]
		return ok
	}
}

// open reports whether connections to the port are taken.
func (n *node) open(port uint16) func() bool {
	return func() bool {
		pod, err := attach.OpenPod(n.d, n.config.BPFDir, n.idOf(n.pod))
		if err != nil {
			n.t.Fatal(err)
		}
		evidence, tally, err := pod.Get(datapath.PortKey(port))
		return err == nil && datapath.PortFresh(evidence, tally, datapath.Now())
	}
}

func not(f func() bool) func() bool { return func() bool { return !f() } }

// ask probes like the kubelet. It returns the status, and whether the kernel answered.
func (n *node) ask(path string) (status int, byKernel bool) {
	n.t.Helper()
	return n.send(netip.AddrPortFrom(n.pod.IPv4, 8080), n.probeRequest(path, ""))
}

// send sends a request to the server. Its header X-Status sets the status of the response.
func (n *node) send(to netip.AddrPort, request string) (status int, byKernel bool) {
	n.t.Helper()
	before := n.served.Load()
	conn := n.pod.Dial(n.t, to.String())
	defer conn.Close() //nolint:errcheck // read to its end
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		n.t.Fatal(err)
	}
	_, err := io.WriteString(conn, request)
	if err != nil {
		n.t.Fatal(err)
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		n.t.Fatalf("reading the answer: %v", err)
	}
	if _, err := io.Copy(io.Discard, response.Body); err != nil {
		n.t.Fatalf("reading the body: %v", err)
	}
	byKernel = response.Header.Get("Cache-Status") != ""
	if served := n.served.Load() - before; served != 0 == byKernel {
		n.t.Fatalf("answered by the kernel: %v, and the server saw %d requests", byKernel, served)
	}
	return response.StatusCode, byKernel
}

// probeRequest returns the kubelet's request, with an additional header line.
func (n *node) probeRequest(path, line string) string {
	return fmt.Sprintf("GET %s HTTP/1.1\r\nHost: %s:8080\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\n%sConnection: close\r\n\r\n",
		path, n.pod.IPv4, line)
}

// want probes, and checks the status and whether the kernel answered.
func (n *node) want(path string, status int, byKernel bool) {
	n.t.Helper()
	if s, k := n.ask(path); s != status || k != byKernel {
		n.t.Fatalf("%s: status %d, by the kernel: %v; want %d, %v", path, s, k, status, byKernel)
	}
}

// key returns the key of the endpoint with a path, which must have been asked.
func (n *node) key(path string) (key datapath.EndpointKey) {
	n.t.Helper()
	n.eventually("the question of "+path+" is described", func() bool {
		described, err := statedir.ReadEndpoints(n.config.StateDir)
		if err != nil {
			return false
		}
		for _, a := range described.Attachments {
			for _, e := range a.Endpoints {
				if e.Path == path && e.Question != (probe.Question{}) {
					key = datapath.HTTPKey(e.Port, datapath.Question(e.Question))
				}
			}
		}
		return key != datapath.EndpointKey{}
	})
	return key
}

// makeFresh makes the pod answer a probe of /healthz, so that the kernel may answer the next.
func (n *node) makeFresh() datapath.EndpointKey {
	n.t.Helper()
	n.eventually("the probe's port is known", n.has(datapath.PortKey(8080)))
	n.want("/healthz", 200, false)
	n.eventually("fresh", n.open(8080))
	return n.key("/healthz")
}

const (
	long  = "periodSeconds: 300, timeoutSeconds: 30"
	short = "periodSeconds: 1, timeoutSeconds: 1" // stale after 1.5 s
)

func TestHTTP(t *testing.T) {
	n := newNode(t)
	n.specs("httpGet: {path: /healthz, port: 8080}, " + long)
	n.start()
	n.attach()
	n.eventually("the probe's port is known", n.has(datapath.PortKey(8080)))

	n.status.Store(http.StatusNoContent)
	n.want("/healthz", 204, false)
	n.eventually("fresh", n.open(8080))
	healthz := n.key("/healthz")
	n.want("/healthz", 204, true)
	n.want("/other", 204, false) // handed over
	n.want("/healthz", 204, true)

	n.specs("httpGet: {path: /healthz, port: 8080}, " + short)
	n.eventually("expired", not(n.open(8080)))
	if r := n.records()[healthz]; r.Result != datapath.ResultSuccess || r.FreshUntil == 0 {
		t.Errorf("the record was touched because it expired: %+v", r)
	}
	n.want("/healthz", 204, false)
	n.eventually("fresh again", n.open(8080))

	n.eventually("expired again", not(n.open(8080)))
	n.status.Store(http.StatusServiceUnavailable)
	n.want("/healthz", 503, false)
	n.eventually("failed", func() bool { return n.records()[healthz].Result == datapath.ResultFailure })
	n.want("/healthz", 503, false)
	n.status.Store(http.StatusOK)
	n.specs("httpGet: {path: /healthz, port: 8080}, " + long)
	n.want("/healthz", 200, false)
	n.eventually("recovered", n.open(8080))
	n.want("/healthz", 200, true)

	n.specs("httpGet: {path: /ready, port: 8080}, " + long)
	n.eventually("the old one is forgotten", not(n.has(healthz)))
	n.want("/healthz", 200, false)
	n.want("/ready", 200, false)
	n.eventually("fresh", n.open(8080))
	n.want("/ready", 200, true)
}

// Requests for the same path with different headers are each answered by evidence of their own, whether they belong to two probes, or to
// another pod's probe with host: set to an address or name of this pod.
func TestEachRequestCountsForItself(t *testing.T) {
	n := newNode(t)
	probe := func(status int) string {
		return fmt.Sprintf("{httpGet: {path: /x, port: 8080, httpHeaders: [{name: X-Status, value: '%d'}]}, %s}", status, long)
	}
	n.container("readinessProbe: " + probe(200) + ", livenessProbe: " + probe(403))
	n.attach()
	n.start()
	n.eventually("the probes' port is known", n.has(datapath.PortKey(8080)))
	own := n.probeRequest("/x", "X-Status: 200\r\n")
	named := func(host string) string {
		return strings.Replace(own, "Host: "+n.pod.IPv4.String(), "Host: "+host, 1)
	}
	v4, v6 := netip.AddrPortFrom(n.pod.IPv4, 8080), netip.AddrPortFrom(n.pod.IPv6, 8080)
	strangers := map[string]struct {
		to      netip.AddrPort
		request string
	}{
		"another header": {v4, n.probeRequest("/x", "X-Status: 200\r\nX-Stranger: yes\r\n")},
		"no header":      {v4, n.probeRequest("/x", "")},
		"a name":         {v4, named("web.example.org")},
		"an address":     {v6, named("[" + n.pod.IPv6.String() + "]")},
		"another agent":  {v4, strings.Replace(own, "kube-probe/1.37", "kube-probe/1.38+", 1)},
	}
	want := func(name string, to netip.AddrPort, request string, status int, byKernel bool) {
		t.Helper()
		if s, k := n.send(to, request); s != status || k != byKernel {
			t.Fatalf("%s: status %d, by the kernel: %v; want %d, %v", name, s, k, status, byKernel)
		}
	}
	want("a stranger", v6, named("["+n.pod.IPv6.String()+"]"), 200, false)
	want("its own", v4, own, 200, false)
	n.eventually("fresh", n.open(8080))
	for name, stranger := range strangers {
		want("its own", v4, own, 200, true)
		want("the other", v4, n.probeRequest("/x", "X-Status: 403\r\n"), 403, false)
		want(name, stranger.to, stranger.request, 200, false)
		if name == "another agent" { // which is what the probe sends by now
			n.eventually("answered to the new one", func() bool { s, k := n.send(stranger.to, stranger.request); return s == 200 && k })
			want("its own", v4, own, 200, false)
			n.eventually("answered to the old one", func() bool { s, k := n.send(v4, own); return s == 200 && k })
		}
	}
}

// After a failure, and after a withdrawal by the kernel, as many successes are needed as the prober counts.
func TestSuccessThreshold(t *testing.T) {
	n := newNode(t)
	if !n.d.Watched() {
		t.Skip("nothing tells that a listening socket closes")
	}
	n.specs("httpGet: {path: /healthz, port: 8090}, successThreshold: 2, " + long)
	n.attach()
	n.start()
	n.eventually("the probe's port is known", n.has(datapath.PortKey(8090)))
	to := netip.AddrPortFrom(n.pod.IPv4, 8090)
	probe := func(byKernel bool) {
		t.Helper()
		request := strings.Replace(n.probeRequest("/healthz", ""), ":8080", ":8090", 1)
		if status, k := n.send(to, request); status != 200 || k != byKernel {
			t.Fatalf("status %d, by the kernel: %v; want %v", status, k, byKernel)
		}
	}
	learned := func(n *node, count string) {
		t.Helper()
		n.eventually("learned of "+count, func() bool {
			got, _ := n.metricsOf()
			return got[`probelet_evidence_total{result="success",source="probe"}`] == count
		})
	}
	for i, counts := range [][2]string{{"1", "2"}, {"3", "4"}} {
		listener := n.pod.Listen(t, 8090)
		go func() { _ = n.server.Serve(listener) }()
		probe(false)
		learned(n, counts[0])
		if n.open(8090)() {
			t.Fatalf("round %d: armed by one success", i)
		}
		probe(false)
		learned(n, counts[1])
		n.eventually("fresh", n.open(8090))
		probe(true)
		_ = listener.Close()
	}
}

// A prober that cannot connect sends nothing when it gives up, but has failed all the same. An exchange that was not seen to succeed may
// have failed, too.
func TestUncertainOutcomesBreakTheRow(t *testing.T) {
	for name, between := range map[string]func(n *node) error{
		"no connection": func(n *node) error {
			dropper := n.pod.NewDropper(t)
			dropper.At(t, bpftest.PodIn, 8080, bpftest.Drop{Mask: bpftest.SYN, Flags: bpftest.SYN, Percent: 100})
			defer dropper.Stop(t, 8080)
			conn, err := net.DialTimeout("tcp", n.pod.IPv4.String()+":8080", 100*time.Millisecond)
			if err == nil {
				return errors.Join(errors.New("connected"), conn.Close())
			}
			return nil
		},
		"inconclusive": func(n *node) error {
			conn, err := net.Dial("tcp", n.pod.IPv4.String()+":8080")
			if err != nil {
				return err
			}
			defer conn.Close() //nolint:errcheck // a test's
			if _, err := io.WriteString(conn, "POST /healthz HTTP/1.1\r\nHost: pod\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"); err != nil {
				return err
			}
			_, err = io.ReadAll(conn)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.specs("httpGet: {path: /healthz, port: 8080}, successThreshold: 2, " + long)
			n.attach()
			n.start()
			n.eventually("the probe's port is known", n.has(datapath.PortKey(8080)))
			probe := func(count string) {
				t.Helper()
				n.want("/healthz", 200, false)
				n.eventually("learned of "+count, func() bool {
					got, _ := n.metricsOf()
					return got[`probelet_evidence_total{result="success",source="probe"}`] == count
				})
			}
			probe("1")
			bpftest.Do(t, n.pod.Node.NS, func() error { return between(n) })
			probe("2")
			if n.open(8080)() {
				t.Error("armed by two successes that were not in a row")
			}
			n.eventually("fresh", func() bool {
				n.ask("/healthz")
				return n.open(8080)()
			})
		})
	}
}

func TestTCP(t *testing.T) {
	n := newNode(t)
	n.specs("tcpSocket: {port: 9090}, " + long)
	n.attach()
	n.start()
	var accepted atomic.Int32
	listener := n.pod.Listen(t, 9090)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			accepted.Add(1)
			_ = conn.Close()
		}
	}()
	n.eventually("the probe's endpoint is known", n.has(datapath.TCPKey(9090)))
	connect := func() { _ = n.pod.Dial(t, n.pod.IPv4.String()+":9090").Close() }

	connect()
	n.eventually("the pod has accepted", func() bool { return accepted.Load() == 1 })
	n.eventually("fresh", n.open(9090))
	connect()
	counters, err := n.d.Counters()
	if err != nil {
		t.Fatal(err)
	}
	if got := counters["answered_tcp"]; got != 1 || accepted.Load() != 1 {
		t.Errorf("the kernel answered %d probes, the pod %d; want 1, 1", got, accepted.Load())
	}
}

// A pod that refuses connections fails every endpoint of the port.
func TestRefused(t *testing.T) {
	n := newNode(t)
	n.specs("tcpSocket: {port: 7070}, " + long)
	n.attach()
	n.start()
	n.eventually("the probe's endpoint is known", n.has(datapath.TCPKey(7070)))
	bpftest.Do(t, n.pod.Node.NS, func() error {
		conn, err := net.DialTimeout("tcp", n.pod.IPv4.String()+":7070", 5*time.Second)
		if err == nil {
			return fmt.Errorf("%s accepted a connection", conn.RemoteAddr())
		}
		return nil
	})
	n.eventually("failed", func() bool { return n.records()[datapath.TCPKey(7070)].Result == datapath.ResultFailure })
}

// Evidence outlives the daemon, within the bounds of the specs that the next one finds.
func TestRestart(t *testing.T) {
	n := newNode(t)
	n.specs("httpGet: {path: /healthz, port: 8080}, " + long)
	n.attach()
	stop := n.start()
	healthz := n.makeFresh()
	stop()
	before := n.records()[healthz]
	n.want("/healthz", 200, true)

	n.specs("httpGet: {path: /healthz, port: 8080}, periodSeconds: 200, timeoutSeconds: 30")
	stop = n.start()
	bound := before.ObservedAt + uint64(230*time.Second)
	n.eventually("the new bound holds", func() bool { return n.records()[healthz].FreshUntil == bound })
	if after := n.records()[healthz]; after.ObservedAt != before.ObservedAt {
		t.Errorf("observed at %d, was %d", after.ObservedAt, before.ObservedAt)
	}
	n.want("/healthz", 200, true)
	stop()

	// The same path, but another request.
	n.specs("httpGet: {path: /healthz, port: 8080, httpHeaders: [{name: X, value: z}]}, " + long)
	n.start()
	n.eventually("withdrawn", func() bool { return n.records()[healthz].Result == datapath.ResultUnknown })
	n.eventually("closed", not(n.open(8080)))
}

// Evidence of one pod does not apply to another that is asked the same.
func TestTwoPods(t *testing.T) {
	n := newNode(t)
	other := n.pod.Node.AddPod(t)
	pod := func(name string, p *bpftest.Pod) string {
		return fmt.Sprintf("{name: %s, ips: [%s, %s], containers: [{name: c, readinessProbe: {httpGet: {port: 8080}, %s}}]}",
			name, p.IPv4, p.IPv6, long)
	}
	text := fmt.Sprintf("pods: [%s, %s]", pod("web", n.pod), pod("other", other))
	if err := os.WriteFile(n.config.Specs, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	n.attachPod(n.pod)
	n.attachPod(other)
	n.start()
	port := datapath.PortKey(8080)
	n.eventually("the ports are known", func() bool {
		_, known := n.recordsOf(other)[port]
		return known && n.has(port)()
	})
	n.want("/", 200, false)
	n.eventually("fresh", n.open(8080))
	for key, r := range n.recordsOf(other) {
		if r != (datapath.Evidence{}) {
			t.Errorf("%+v of the other pod: %+v", key, r)
		}
	}
}

// A device may be attached again under the same record.
func TestReattachedUnderTheSameRecord(t *testing.T) {
	n := newNode(t)
	n.specs("httpGet: {path: /healthz, port: 8080}, " + long)
	n.attach()
	n.start()
	n.eventually("the probe's port is known", n.has(datapath.PortKey(8080)))
	n.attachMaps(n.pod, attach.ID{ContainerID: "of-" + n.pod.HostIfName, IfName: "eth0"})
	n.eventually("the probe's port is known again", n.has(datapath.PortKey(8080)))
}

func TestTooManyEndpoints(t *testing.T) {
	n := newNode(t)
	var containers strings.Builder
	for i := range datapath.MaxEndpoints {
		fmt.Fprintf(&containers, "{name: c%d, livenessProbe: {httpGet: {path: /%d, port: 8080}}}, ", i, i)
	}
	text := fmt.Sprintf("pods: [{name: web, ips: [%s], containers: [%s]}]", n.pod.IPv4, containers.String())
	if err := os.WriteFile(n.config.Specs, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	n.attach()
	n.start()
	n.eventually("the refusal is described", func() bool {
		e, err := statedir.ReadEndpoints(n.config.StateDir)
		return err == nil && len(e.Attachments) == 1 && len(e.Attachments[0].Endpoints) == datapath.MaxEndpoints &&
			strings.Contains(e.Attachments[0].Endpoints[0].NotAnswered, "65")
	})
	if records := n.records(); len(records) != 0 {
		t.Errorf("%d records, want none", len(records))
	}
	n.want("/1", 200, false)
}

func TestOneDaemon(t *testing.T) {
	n := newNode(t)
	n.specs("exec: {}")
	n.start()
	n.eventually("running", func() bool {
		_, running, err := statedir.Running(n.config.StateDir)
		return err == nil && running
	})
	err := Run(t.Context(), n.config, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), statedir.ErrRunning.Error()) {
		t.Errorf("a second daemon: %v", err)
	}
}
