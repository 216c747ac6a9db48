package source

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/probelet/probelet/daemon/internal/logtest"
	"github.com/probelet/probelet/internal/polltest"
)

// fakeAPIServer lists and watches pods as an API server does, as far as the source needs it: a watch starts with the
// current state.
type fakeAPIServer struct {
	*httptest.Server
	t *testing.T

	mutex    sync.Mutex
	pods     map[string]corev1.Pod
	version  int
	watchers map[chan metav1.WatchEvent]bool
	selector string // of the last request
	down     bool
}

func newFakeAPIServer(t *testing.T) *fakeAPIServer {
	t.Helper()
	f := &fakeAPIServer{t: t, pods: map[string]corev1.Pod{}, watchers: map[chan metav1.WatchEvent]bool{}, version: 100}
	f.Server = httptest.NewServer(http.HandlerFunc(f.serve))
	t.Cleanup(func() {
		f.CloseClientConnections()
		f.Close()
	})
	return f
}

func (f *fakeAPIServer) serve(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	f.mutex.Lock()
	f.selector = query.Get("fieldSelector")
	down := f.down
	f.mutex.Unlock()
	switch {
	case r.URL.Path != "/api/v1/pods":
		http.NotFound(w, r)
	case down:
		http.Error(w, "etcd is away", http.StatusServiceUnavailable)
	case query.Get("sendInitialEvents") != "":
		f.refuse(w) // like a server too old for streaming lists
	case query.Get("watch") == "":
		f.list(w)
	default:
		f.watch(w, r)
	}
}

func (f *fakeAPIServer) refuse(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusUnprocessableEntity)
	_ = json.NewEncoder(w).Encode(metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"},
		Status:   metav1.StatusFailure, Reason: metav1.StatusReasonInvalid, Code: http.StatusUnprocessableEntity,
	})
}

func (f *fakeAPIServer) list(w http.ResponseWriter) {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	list := corev1.PodList{
		TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"},
		ListMeta: metav1.ListMeta{ResourceVersion: strconv.Itoa(f.version)},
	}
	for _, pod := range f.pods {
		list.Items = append(list.Items, pod)
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(list)
}

func (f *fakeAPIServer) watch(w http.ResponseWriter, r *http.Request) {
	events := make(chan metav1.WatchEvent, 100)
	f.mutex.Lock()
	f.watchers[events] = true
	f.mutex.Unlock()
	defer func() {
		f.mutex.Lock()
		delete(f.watchers, events)
		f.mutex.Unlock()
	}()
	w.Header().Set("Content-Type", "application/json")
	w.(http.Flusher).Flush()
	for {
		select {
		case <-r.Context().Done():
			return
		case e, open := <-events:
			if !open {
				return
			}
			_ = json.NewEncoder(w).Encode(e)
			w.(http.Flusher).Flush()
		}
	}
}

func (f *fakeAPIServer) change(kind string, pod corev1.Pod) {
	f.t.Helper()
	f.mutex.Lock()
	defer f.mutex.Unlock()
	f.version++
	pod.TypeMeta = metav1.TypeMeta{Kind: "Pod", APIVersion: "v1"}
	pod.ResourceVersion = strconv.Itoa(f.version)
	f.pods[pod.Name] = pod
	if kind == "DELETED" {
		delete(f.pods, pod.Name)
	}
	text, err := json.Marshal(pod)
	if err != nil {
		f.t.Fatal(err)
	}
	e := metav1.WatchEvent{Type: kind}
	e.Object.Raw = text
	for w := range f.watchers {
		w <- e
	}
}

func (f *fakeAPIServer) watched() bool {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	return len(f.watchers) > 0
}

func (f *fakeAPIServer) setDown(down bool) {
	f.mutex.Lock()
	f.down = down
	f.mutex.Unlock()
	if down {
		f.CloseClientConnections()
	}
}

func (f *fakeAPIServer) kubeconfig() string {
	f.t.Helper()
	text := fmt.Sprintf(`{"apiVersion":"v1","kind":"Config","current-context":"c",
"clusters":[{"name":"k","cluster":{"server":%q}}],
"contexts":[{"name":"c","context":{"cluster":"k","user":"u"}}],"users":[{"name":"u","user":{}}]}`, f.URL)
	path := filepath.Join(f.t.TempDir(), "kubeconfig")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		f.t.Fatal(err)
	}
	return path
}

func TestAPIServer(t *testing.T) {
	f := newFakeAPIServer(t)
	var log logtest.Log
	a, err := NewAPIServer(f.kubeconfig(), "node-1", log.Logger())
	if err != nil {
		t.Fatal(err)
	}
	f.change("ADDED", webPod("a", "10.0.0.7"))
	snapshots := running(t, a)
	wantNext(t, snapshots, "a[10.0.0.7]")
	polltest.Eventually(t, "watched", f.watched)
	if f.selector != "spec.nodeName=node-1" {
		t.Errorf("field selector %q does not select the node's pods", f.selector)
	}

	starting := webPod("b", "")
	f.change("ADDED", starting)
	f.change("MODIFIED", webPod("b", "10.0.0.8"))
	wantNext(t, snapshots, "a[10.0.0.7]", "b[10.0.0.8]")
	f.change("DELETED", webPod("a", "10.0.0.7"))
	wantNext(t, snapshots, "b[10.0.0.8]")

	// During an outage nothing is reported, and nothing forgotten.
	f.setDown(true)
	polltest.Eventually(t, "an error is logged", func() bool { return log.Count("level=ERROR") > 0 })
	select {
	case pods := <-snapshots:
		t.Fatalf("a snapshot during the outage: %v", pods)
	case <-time.After(100 * time.Millisecond):
	}
	f.change("MODIFIED", webPod("c", "10.0.0.9"))
	f.setDown(false)
	wantNext(t, snapshots, "b[10.0.0.8]", "c[10.0.0.9]")
	polltest.Eventually(t, "the recovery is logged", func() bool { return log.Count("source of specs recovered") > 0 })
}

func TestAPIServerNoPods(t *testing.T) {
	f := newFakeAPIServer(t)
	var log logtest.Log
	a, err := NewAPIServer(f.kubeconfig(), "node-1", log.Logger())
	if err != nil {
		t.Fatal(err)
	}
	wantNext(t, running(t, a))
}

// strip keeps everything that the conversion of a pod uses.
func TestStrip(t *testing.T) {
	files, err := filepath.Glob("testdata/pods/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		pod := podOf(t, file)
		stripped, err := strip(pod)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := described(t, stripped.(*corev1.Pod)), described(t, pod); got != want {
			t.Errorf("%s: got:\n%swant:\n%s", file, got, want)
		}
	}
}

func TestAPIServerErrors(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for name, test := range map[string]struct{ kubeconfig, node, want string }{
		"no node":        {"", "", "--node-name"},
		"no such file":   {"/nowhere/kubeconfig", "n", "/nowhere/kubeconfig"},
		"not in cluster": {"", "n", "cluster"},
	} {
		if _, err := NewAPIServer(test.kubeconfig, test.node, nil); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %s", name, err, test.want)
		}
	}
}
