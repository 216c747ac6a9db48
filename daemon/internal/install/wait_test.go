package install

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/probelet/probelet/daemon/internal/kubeapi"
)

func TestWaitForDaemonSet(t *testing.T) {
	set := func(generation, observed int64, desired, updated, ready int32) *appsv1.DaemonSet {
		return &appsv1.DaemonSet{
			TypeMeta:   metav1.TypeMeta{APIVersion: "apps/v1", Kind: "DaemonSet"},
			ObjectMeta: metav1.ObjectMeta{Namespace: "probelet", Name: "x", Generation: generation},
			Status: appsv1.DaemonSetStatus{
				ObservedGeneration: observed, DesiredNumberScheduled: desired, UpdatedNumberScheduled: updated, NumberReady: ready,
			},
		}
	}
	for name, test := range map[string]struct {
		set  *appsv1.DaemonSet
		done bool
	}{
		"not observed yet":        {set(1, 0, 0, 0, 0), false},
		"one node not ready":      {set(1, 1, 3, 3, 2), false},
		"only old pods are ready": {set(2, 2, 3, 2, 3), false},
		"all nodes ready":         {set(2, 2, 3, 3, 3), true},
		"no nodes":                {set(1, 1, 0, 0, 0), true},
		"not found":               {nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if test.set == nil || r.URL.Path != "/apis/apps/v1/namespaces/probelet/daemonsets/x" {
					http.NotFound(w, r)
					return
				}
				w.Header().Set("Content-Type", "application/json")
				_ = json.NewEncoder(w).Encode(test.set)
			}))
			defer server.Close()
			client, err := kubeapi.Apps(&rest.Config{Host: server.URL})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			err = waitForDaemonSet(ctx, client, "probelet", "x", slog.New(slog.NewTextHandler(t.Output(), nil)))
			if test.done != (err == nil) || err != nil && !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v, want done: %v", err, test.done)
			}
		})
	}
}
