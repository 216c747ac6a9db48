package podevents

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	clientscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"

	"github.com/probelet/probelet/daemon/internal/kubeapi"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/internal/polltest"
)

var decoder = serializer.NewCodecFactory(clientscheme.Scheme).UniversalDeserializer()

// server accepts Events like the API server, one per name.
type server struct {
	mutex  sync.Mutex
	events map[string]corev1.Event
	posted int
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	text, _ := io.ReadAll(r.Body)
	object, _, err := decoder.Decode(text, nil, nil)
	e, ok := object.(*corev1.Event)
	if err != nil || !ok || r.Method != http.MethodPost || r.URL.Path != "/api/v1/namespaces/"+e.Namespace+"/events" {
		http.Error(w, r.Method+" "+r.URL.Path, http.StatusBadRequest)
		return
	}
	s.posted++
	w.Header().Set("Content-Type", "application/json")
	if _, exists := s.events[e.Namespace+"/"+e.Name]; exists {
		w.WriteHeader(http.StatusConflict)
		_, _ = io.WriteString(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"AlreadyExists","code":409}`)
		return
	}
	s.events[e.Namespace+"/"+e.Name] = *e
	w.WriteHeader(http.StatusCreated)
	_ = json.NewEncoder(w).Encode(map[string]string{"kind": "Event", "apiVersion": "v1"})
}

func newReporter(t *testing.T) (*Reporter, *server) {
	t.Helper()
	s := &server{events: map[string]corev1.Event{}}
	listener := httptest.NewServer(s)
	t.Cleanup(listener.Close)
	client, err := kubeapi.Core(&rest.Config{Host: listener.URL})
	if err != nil {
		t.Fatal(err)
	}
	return New(client, "node-1", slog.New(slog.NewTextHandler(t.Output(), nil))), s
}

func (s *server) all() (events []corev1.Event, posted int) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	for _, e := range s.events {
		events = append(events, e)
	}
	return events, s.posted
}

func (s *server) await(t *testing.T, posted int) (events []corev1.Event) {
	t.Helper()
	polltest.Eventually(t, fmt.Sprintf("%d events are posted", posted), func() bool {
		var n int
		events, n = s.all()
		return n >= posted
	})
	return events
}

// Each problem is reported once, and on the pod concerned.
func TestBadAnnotation(t *testing.T) {
	r, s := newReporter(t)
	go r.Run(t.Context())
	pod := probe.Pod{Namespace: "shop", Name: "web", UID: "u-1"}
	r.BadAnnotation(pod, strings.Repeat("x", 2*maxMessage))
	r.BadAnnotation(pod, strings.Repeat("x", 2*maxMessage)) // as another daemon would
	events := s.await(t, 2)
	if len(events) != 1 {
		t.Fatalf("%d events", len(events))
	}
	e := events[0]
	if e.InvolvedObject.Kind != "Pod" || e.InvolvedObject.Name != "web" || e.InvolvedObject.UID != "u-1" || e.InvolvedObject.Namespace != e.Namespace ||
		e.Type != corev1.EventTypeWarning || e.Source.Host != "node-1" || len(e.Message) != maxMessage || e.LastTimestamp.IsZero() {
		t.Errorf("%+v", e)
	}
}

// However many pods have problems, callers do not block, and the API server is not flooded.
func TestMany(t *testing.T) {
	r, s := newReporter(t)
	pod := probe.Pod{Namespace: "shop", Name: "web", UID: "u-1"}
	for range 10 * queued {
		r.BadAnnotation(pod, "wrong")
	}
	if len(r.events) != queued {
		t.Errorf("%d are queued", len(r.events))
	}
	if _, n := s.all(); n > 0 {
		t.Errorf("%d were written by the caller", n)
	}
	(*Reporter)(nil).BadAnnotation(pod, "wrong")
}
