package source

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	podsv1alpha1 "k8s.io/kubelet/pkg/apis/pods/v1alpha1"
	"pgregory.net/rapid"

	"github.com/probelet/probelet/daemon/internal/logtest"
	"github.com/probelet/probelet/daemon/internal/podspec"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/internal/polltest"
)

// podsAPI serves the kubelet's pods API on a socket, as the kubelet does (pkg/kubelet/apis/pods/server.go): it drops a
// client that is 100 events behind.
type podsAPI struct {
	podsv1alpha1.UnimplementedPodsServer
	socket         string
	watches, lists atomic.Int32
	listing        func() // called between making a list and sending it; may be nil

	mutex    sync.Mutex
	pods     map[types.UID]*corev1.Pod
	clients  map[chan *podsv1alpha1.WatchPodsEvent]bool
	starting bool // not all pods are known yet
	dropped  int  // number of dropped clients
}

type fataler interface {
	Helper()
	Fatal(...any)
}

func newPodsAPI(t *testing.T) *podsAPI {
	t.Helper()
	return &podsAPI{
		socket: filepath.Join(t.TempDir(), "pods-api.sock"),
		pods:   map[types.UID]*corev1.Pod{}, clients: map[chan *podsv1alpha1.WatchPodsEvent]bool{},
	}
}

// start serves until the returned function is called.
func (a *podsAPI) start(t fataler) (stop func()) {
	t.Helper()
	listener, err := net.Listen("unix", a.socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	podsv1alpha1.RegisterPodsServer(server, a)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	return sync.OnceFunc(func() {
		server.Stop()
		<-served
	})
}

func (a *podsAPI) ready() error {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	if a.starting {
		return status.Error(codes.FailedPrecondition, "Kubelet is initializing")
	}
	return nil
}

func (a *podsAPI) marshalled() (all [][]byte) {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	for _, p := range a.pods {
		all = append(all, marshal(p))
	}
	return all
}

func marshal(p *corev1.Pod) []byte {
	text, err := p.Marshal()
	if err != nil {
		panic(err)
	}
	return text
}

func (a *podsAPI) ListPods(context.Context, *podsv1alpha1.ListPodsRequest) (*podsv1alpha1.ListPodsResponse, error) {
	a.lists.Add(1)
	all := a.marshalled()
	if a.listing != nil {
		a.listing()
	}
	return &podsv1alpha1.ListPodsResponse{Pods: all}, a.ready()
}

func (a *podsAPI) WatchPods(_ *podsv1alpha1.WatchPodsRequest, stream podsv1alpha1.Pods_WatchPodsServer) error {
	a.watches.Add(1)
	if err := a.ready(); err != nil {
		return err
	}
	events := make(chan *podsv1alpha1.WatchPodsEvent, 100)
	a.mutex.Lock()
	a.clients[events] = true
	a.mutex.Unlock()
	defer func() {
		a.mutex.Lock()
		delete(a.clients, events)
		a.mutex.Unlock()
	}()
	for _, text := range a.marshalled() {
		if err := stream.Send(&podsv1alpha1.WatchPodsEvent{Type: podsv1alpha1.EventType_ADDED, Pod: text}); err != nil {
			return err
		}
	}
	if err := stream.Send(&podsv1alpha1.WatchPodsEvent{Type: podsv1alpha1.EventType_INITIAL_SYNC_COMPLETE}); err != nil {
		return err
	}
	for {
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case event, ok := <-events:
			if !ok {
				return status.Error(codes.ResourceExhausted, "watch client channel closed")
			}
			if err := stream.Send(event); err != nil {
				return err
			}
		}
	}
}

// silently changes a pod without an event, so that only a list shows the change.
func (a *podsAPI) silently(p *corev1.Pod) {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	a.pods[p.UID] = p
}

func (a *podsAPI) set(p *corev1.Pod) {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	kind := podsv1alpha1.EventType_MODIFIED
	if a.pods[p.UID] == nil {
		kind = podsv1alpha1.EventType_ADDED
	}
	a.pods[p.UID] = p
	a.broadcast(&podsv1alpha1.WatchPodsEvent{Type: kind, Pod: marshal(p)})
}

func (a *podsAPI) remove(p *corev1.Pod, tell bool) {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	delete(a.pods, p.UID)
	if tell {
		a.broadcast(&podsv1alpha1.WatchPodsEvent{Type: podsv1alpha1.EventType_DELETED, Pod: marshal(p)})
	}
}

func (a *podsAPI) broadcast(event *podsv1alpha1.WatchPodsEvent) {
	for client := range a.clients {
		select {
		case client <- event:
		default:
			a.drop(client)
		}
	}
}

func (a *podsAPI) drop(client chan *podsv1alpha1.WatchPodsEvent) {
	delete(a.clients, client)
	close(client)
	a.dropped++
}

func (a *podsAPI) dropAll() {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	for client := range a.clients {
		a.drop(client)
	}
}

func (a *podsAPI) wasDropped() int {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	return a.dropped
}

// pushed returns webPod with a UID and a container state.
func pushed(name, ip, containerID string, restarts int32) *corev1.Pod {
	p := webPod(name, ip)
	p.UID = types.UID("uid-" + name)
	state := corev1.ContainerStatus{Name: "web", ContainerID: containerID, RestartCount: restarts}
	if containerID != "" {
		state.State.Running = &corev1.ContainerStateRunning{}
	}
	p.Status.ContainerStatuses = []corev1.ContainerStatus{state}
	return &p
}

// apiKubelet returns a source that uses the API. The list of the kubelet beside it has only a pod that the API does not
// know.
func apiKubelet(t *testing.T, a *podsAPI, log *slog.Logger) (*Kubelet, *fakeKubelet) {
	t.Helper()
	f := newFakeKubelet(t, (*httptest.Server).Start)
	f.says(podList(t, webPod("polled", "10.0.0.99")))
	c := at(f.URL)
	c.Socket, c.Poll = a.socket, time.Hour
	k := openKubelet(t, c, log)
	k.shortest = 10 * time.Millisecond
	return k, f
}

func wantInstance(t *testing.T, snapshots <-chan []probe.Pod, want string) {
	t.Helper()
	select {
	case pods := <-snapshots:
		if len(pods) != 1 || pods[0].Probes[0].Instance != want {
			t.Fatalf("%+v, want instance %q", pods, want)
		}
	case <-time.After(20 * time.Second):
		t.Fatalf("no snapshot; want instance %q", want)
	}
}

// Each change of a container's state is pushed.
func TestPodsAPI(t *testing.T) {
	a := newPodsAPI(t)
	t.Cleanup(a.start(t))
	hostNetwork := pushed("agent", "192.0.2.1", "containerd://x", 0)
	hostNetwork.Spec.HostNetwork = true
	a.set(hostNetwork)
	k, f := apiKubelet(t, a, slog.New(slog.DiscardHandler))
	snapshots := running(t, k)
	wantNext(t, snapshots)
	a.set(pushed("a", "", "", 0)) // no address yet
	a.set(pushed("a", "10.0.0.7", "containerd://1", 0))
	wantInstance(t, snapshots, "containerd://1#0")
	a.set(pushed("a", "10.0.0.7", "", 0))
	wantInstance(t, snapshots, "")
	a.set(pushed("a", "10.0.0.7", "containerd://2", 1))
	wantInstance(t, snapshots, "containerd://2#1")
	b := pushed("b", "10.0.0.8", "containerd://3", 0)
	a.set(b)
	wantNext(t, snapshots, "a[10.0.0.7]", "b[10.0.0.8]")
	a.remove(b, true)
	wantNext(t, snapshots, "a[10.0.0.7]")
	k.Refresh()
	if f.requests.Load() != 0 || a.watches.Load() != 1 {
		t.Errorf("%d polls, %d watches", f.requests.Load(), a.watches.Load())
	}
}

// When the kubelet comes back, everything that changed meanwhile is known at once. Until then no snapshot is sent:
// neither that there are no pods, nor a list that the kubelet returns while it is starting.
func TestPodsAPIOutage(t *testing.T) {
	for name, again := range map[string]func(t *testing.T, a *podsAPI, stop func()){
		"restarted": func(t *testing.T, a *podsAPI, stop func()) {
			stop()
			a.mutex.Lock()
			a.starting = true
			a.mutex.Unlock()
			t.Cleanup(a.start(t))
			before := a.watches.Load()
			polltest.Eventually(t, "asked again", func() bool { return a.watches.Load() > before+2 })
			a.mutex.Lock()
			defer a.mutex.Unlock()
			a.starting = false
		},
		"dropped us": func(t *testing.T, a *podsAPI, stop func()) {
			t.Cleanup(stop)
			a.dropAll()
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := newPodsAPI(t)
			stop := a.start(t)
			stays, ends := pushed("stays", "10.0.0.7", "containerd://1", 0), pushed("ends", "10.0.0.8", "containerd://2", 0)
			a.set(stays)
			a.set(ends)
			var log logtest.Log
			k, f := apiKubelet(t, a, log.Logger())
			snapshots := running(t, k)
			wantNext(t, snapshots, "ends[10.0.0.8]", "stays[10.0.0.7]")
			a.remove(ends, false)
			again(t, a, stop)
			wantNext(t, snapshots, "stays[10.0.0.7]")
			if f.requests.Load() != 0 || log.Count("level=ERROR") == 0 || log.Count("source of specs recovered") != 1 {
				t.Errorf("%d polls; logged:\n%s", f.requests.Load(), log.String())
			}
		})
	}
}

// The list is polled while there is no such API, and the API is used once it is there.
func TestPodsAPIComesAndGoes(t *testing.T) {
	a := newPodsAPI(t)
	a.set(pushed("watched", "10.0.0.7", "containerd://1", 0))
	var log logtest.Log
	k, f := apiKubelet(t, a, log.Logger())
	k.config.Poll, k.patient = 20*time.Millisecond, 200*time.Millisecond
	if d := k.Delivery(); d.Pushed || d.Why == "" {
		t.Errorf("before anything is known: %+v", d)
	}
	snapshots := running(t, k)
	wantNext(t, snapshots, "polled[10.0.0.99]")
	if d := k.Delivery(); d.Pushed || !strings.Contains(d.Why, a.socket) || !strings.Contains(d.Why, "no such file") {
		t.Errorf("without a socket: %+v", d)
	}
	for range 2 {
		stop := a.start(t)
		wantNext(t, snapshots, "watched[10.0.0.7]")
		if d := k.Delivery(); d != (Delivery{Pushed: true}) {
			t.Errorf("watched: %+v", d)
		}
		polls := f.requests.Load()
		before := a.lists.Load()
		polltest.Eventually(t, "listed", func() bool { return a.lists.Load() > before+3 })
		if f.requests.Load() != polls {
			t.Error("polled while watching")
		}
		stop()
		wantNext(t, snapshots, "polled[10.0.0.99]")
	}
	if log.Count("pod watch established") != 2 || log.Count("polling pods") != 3 {
		t.Errorf("logged:\n%s", log.String())
	}
}

// The server has a different API, or sends what cannot be understood.
func TestPodsAPIUnusable(t *testing.T) {
	nameless := pushed("a", "10.0.0.7", "containerd://1", 0)
	nameless.Name = ""
	for name, serve := range map[string]func(*grpc.Server){
		"another API": func(*grpc.Server) {},
		"nameless":    func(s *grpc.Server) { podsv1alpha1.RegisterPodsServer(s, tells{pod: marshal(nameless)}) },
		"garbage":     func(s *grpc.Server) { podsv1alpha1.RegisterPodsServer(s, tells{pod: []byte("garbage")}) },
		"hangs":       func(s *grpc.Server) { podsv1alpha1.RegisterPodsServer(s, tells{}) },
	} {
		t.Run(name, func(t *testing.T) {
			a := newPodsAPI(t)
			listener, err := net.Listen("unix", a.socket)
			if err != nil {
				t.Fatal(err)
			}
			server := grpc.NewServer()
			serve(server)
			go server.Serve(listener) //nolint:errcheck // it ends with the test
			t.Cleanup(server.Stop)
			k, f := apiKubelet(t, a, slog.New(slog.DiscardHandler))
			k.config.Poll, k.timeout = 20*time.Millisecond, 200*time.Millisecond
			wantNext(t, running(t, k), "polled[10.0.0.99]")
			polltest.Eventually(t, "polled repeatedly", func() bool { return f.requests.Load() > 3 })
			polltest.Eventually(t, "the reason is known", func() bool { d := k.Delivery(); return !d.Pushed && d.Why != "" })
		})
	}
}

// tells sends one pod, or none, but never completes the initial list.
type tells struct {
	podsv1alpha1.UnimplementedPodsServer
	pod []byte
}

func (p tells) WatchPods(_ *podsv1alpha1.WatchPodsRequest, stream podsv1alpha1.Pods_WatchPodsServer) error {
	if p.pod != nil {
		_ = stream.Send(&podsv1alpha1.WatchPodsEvent{Type: podsv1alpha1.EventType_ADDED, Pod: p.pod})
		_ = stream.Send(&podsv1alpha1.WatchPodsEvent{Type: podsv1alpha1.EventType_INITIAL_SYNC_COMPLETE})
	}
	<-stream.Context().Done()
	return nil
}

// If the receiver of snapshots is busy, the kubelet does not drop us, and the receiver gets only the latest snapshot.
func TestPodsAPIBusyLoop(t *testing.T) {
	a := newPodsAPI(t)
	t.Cleanup(a.start(t))
	k, _ := apiKubelet(t, a, slog.New(slog.DiscardHandler))
	snapshots := running(t, k)
	wantNext(t, snapshots)
	for i := range int32(1000) {
		a.set(pushed("a", "10.0.0.7", "containerd://1", i))
		time.Sleep(20 * time.Microsecond)
	}
	heard := 0
	polltest.Eventually(t, "the latest snapshot", func() bool {
		heard++
		pods := <-snapshots
		return pods[0].Probes[0].Instance == "containerd://1#999"
	})
	if heard > 100 || a.wasDropped() != 0 {
		t.Errorf("%d snapshots; dropped %d times", heard, a.wasDropped())
	}
}

// Changes that the kubelet does not push are in its list: here another annotation, and the end of a pod.
func TestPodsAPILists(t *testing.T) {
	a := newPodsAPI(t)
	t.Cleanup(a.start(t))
	p, ends := pushed("a", "10.0.0.7", "containerd://1", 0), pushed("b", "10.0.0.8", "containerd://2", 0)
	a.set(p)
	a.set(ends)
	k, _ := apiKubelet(t, a, slog.New(slog.DiscardHandler))
	k.config.Poll = 20 * time.Millisecond
	snapshots := running(t, k)
	wantNext(t, snapshots, "a[10.0.0.7]", "b[10.0.0.8]")
	a.remove(ends, false)
	wantNext(t, snapshots, "a[10.0.0.7]")
	p = p.DeepCopy()
	p.Annotations = map[string]string{probe.AnnotationMode: "off"}
	a.silently(p)
	if pods := <-snapshots; pods[0].Annotations[probe.AnnotationMode] != "off" {
		t.Errorf("%+v", pods)
	}
}

// A list made before an event does not undo the event.
func TestPodsAPIListIsLate(t *testing.T) {
	a := newPodsAPI(t)
	t.Cleanup(a.start(t))
	old, ends := pushed("a", "10.0.0.7", "containerd://1", 0), pushed("b", "10.0.0.8", "containerd://2", 0)
	a.set(old)
	a.set(ends)
	made, sent := make(chan struct{}), make(chan struct{})
	a.listing = func() { made <- struct{}{}; <-sent }
	w, events := following(t, a)
	done := make(chan error)
	go func() { done <- w.list(t.Context(), 20*time.Second) }()
	<-made
	a.set(pushed("a", "10.0.0.7", "containerd://3", 1))
	a.remove(ends, true)
	a.set(pushed("c", "10.0.0.9", "containerd://4", 0))
	polltest.Eventually(t, "all events", func() bool { return events() == "a#containerd://3#1 c#containerd://4#0" })
	sent <- struct{}{}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got := events(); got != "a#containerd://3#1 c#containerd://4#0" {
		t.Error(got)
	}
}

// Events during a list need not wait for it.
func TestPodsAPIPushesDuringAList(t *testing.T) {
	a := newPodsAPI(t)
	t.Cleanup(a.start(t))
	a.set(pushed("a", "10.0.0.7", "containerd://1", 0))
	asked, answer := make(chan struct{}, 100), make(chan struct{})
	t.Cleanup(func() { close(answer) })
	a.listing = func() { asked <- struct{}{}; <-answer }
	k, _ := apiKubelet(t, a, slog.New(slog.DiscardHandler))
	k.config.Poll, k.timeout = 20*time.Millisecond, time.Hour
	snapshots := running(t, k)
	wantInstance(t, snapshots, "containerd://1#0")
	<-asked
	a.set(pushed("a", "10.0.0.7", "containerd://2", 1))
	wantInstance(t, snapshots, "containerd://2#1")
	if n := a.lists.Load(); n != 1 {
		t.Errorf("%d lists at a time", n)
	}
}

// following returns a watch on its own, and a function that describes its pods.
func following(t *testing.T, a *podsAPI) (*podsWatch, func() string) {
	t.Helper()
	conn, err := dialPodsAPI(a.socket)
	if err != nil {
		t.Fatal(err)
	}
	w := newPodsWatch(podsv1alpha1.NewPodsClient(conn))
	ended := make(chan error, 1)
	go func() { ended <- w.receive(t.Context()) }()
	t.Cleanup(func() {
		_ = conn.Close()
		<-ended
	})
	<-w.synced
	return w, func() string {
		var all []string
		for _, p := range w.snapshot() {
			all = append(all, p.Name+"#"+p.Probes[0].Instance)
		}
		slices.Sort(all)
		return strings.Join(all, " ")
	}
}

// A list that exceeds gRPC's default limit of 4 MiB.
func TestPodsAPIManyPods(t *testing.T) {
	a := newPodsAPI(t)
	t.Cleanup(a.start(t))
	for i := range 1000 {
		p := pushed(fmt.Sprintf("p%03d", i), fmt.Sprintf("10.1.%d.%d", i/250, i%250), "containerd://1", 0)
		p.Annotations = map[string]string{"long": strings.Repeat("x", 10_000)}
		a.set(p)
	}
	w, _ := following(t, a)
	start := time.Now()
	if err := w.list(t.Context(), 20*time.Second); err != nil || len(w.snapshot()) != 1000 {
		t.Errorf("%d pods, %v", len(w.snapshot()), err)
	}
	t.Logf("listed in %s", time.Since(start))
}

// Whatever happens to pods and to the API, the source ends up with the actual pods.
func TestPodsAPIConverges(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		a := newPodsAPI(t)
		stop := a.start(rt)
		k, f := apiKubelet(t, a, slog.New(slog.DiscardHandler))
		f.does(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "not to be polled") })
		k.config.Poll, k.shortest = 5*time.Millisecond, time.Millisecond
		ctx, cancel := context.WithCancel(context.Background())
		snapshots, done := make(chan []probe.Pod), make(chan error)
		go func() { done <- k.Run(ctx, snapshots) }()
		defer func() {
			cancel()
			<-done
			stop()
		}()
		var got map[string]string
		take := func(pods []probe.Pod) {
			got = map[string]string{}
			for _, p := range pods {
				got[p.Name] = p.Probes[0].Instance
			}
		}
		take(<-snapshots)
		for i := range rapid.IntRange(0, 12).Draw(rt, "steps") {
			name := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(rt, "pod")
			p := pushed(name, "10.0.0.7", fmt.Sprintf("containerd://%d", i), 0)
			switch rapid.SampledFrom([]string{"set", "set", "remove", "silently", "vanish", "drop", "restart", "take"}).Draw(rt, "what") {
			case "set":
				a.set(p)
			case "remove":
				a.remove(p, true)
			case "silently":
				a.silently(p)
			case "vanish":
				a.remove(p, false)
			case "drop":
				a.dropAll()
			case "restart":
				stop()
				stop = a.start(rt)
			case "take":
				select {
				case pods := <-snapshots:
					take(pods)
				case <-time.After(10 * time.Millisecond):
				}
			}
		}
		want := a.known()
		for deadline := time.After(20 * time.Second); !maps.Equal(got, want); {
			select {
			case pods := <-snapshots:
				take(pods)
			case <-deadline:
				rt.Fatalf("known: %v, actual: %v", got, want)
			}
		}
	})
}

func (a *podsAPI) known() map[string]string {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	all := map[string]string{}
	for _, p := range a.pods {
		all[p.Name] = podspec.Instance(p.Status, "web")
	}
	return all
}
