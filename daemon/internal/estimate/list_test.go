package estimate

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// A large cluster's pods come in pages.
func TestListReadsAllPages(t *testing.T) {
	pages := map[string]corev1.PodList{
		"":      {ListMeta: metav1.ListMeta{Continue: "more"}, Items: make([]corev1.Pod, 2)},
		"more":  {ListMeta: metav1.ListMeta{Continue: "still"}, Items: make([]corev1.Pod, 3)},
		"still": {Items: make([]corev1.Pod, 1)},
	}
	var asked []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.Method+" "+r.URL.Path+" "+r.URL.Query().Get("limit"))
		list := pages[r.URL.Query().Get("continue")]
		list.APIVersion, list.Kind = "v1", "PodList"
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(list); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(server.Close)
	in, err := List(t.Context(), &rest.Config{Host: server.URL}, "shop")
	const want = "GET /api/v1/namespaces/shop/pods 500"
	if err != nil || len(in.Pods) != 6 || !slices.Equal(asked, []string{want, want, want}) {
		t.Errorf("%d pods, %v, asked %q", len(in.Pods), err, asked)
	}
}

// A signal ends the command while it waits for standard input.
func TestEndsWithItsContext(t *testing.T) {
	stdin, w := io.Pipe()
	t.Cleanup(func() { _ = w.Close() })
	cmd := Command(Environment{Stdin: stdin, Namespace: func() (string, error) { return "", nil }})
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetArgs([]string{"-f", "-"})
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("a signal")
	go func() {
		_, _ = w.Write([]byte("kind: Pod\n")) // returns once the command reads
		cancel(cause)
	}()
	if err := cmd.ExecuteContext(ctx); !errors.Is(err, cause) {
		t.Error(err)
	}
}

func TestNoKubeconfig(t *testing.T) {
	cmd := Command(Environment{
		Config:    func() (*rest.Config, error) { return nil, clientcmd.ErrEmptyConfig },
		Namespace: func() (string, error) { return "", nil },
	})
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetArgs([]string{})
	if err := cmd.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), "--file") {
		t.Error(err)
	}
}

// Narrow terminals and wide tables have the same numbers.
func TestWidths(t *testing.T) {
	text := podText("a", "", "nodeName: n1", "", lone) + podText("b", "", "hostNetwork: true", "", lone)
	for _, width := range []int{0, 60, 100} {
		out, err := execute(t, strings.NewReader(text), width, "-f", "-")
		if err != nil || !strings.Contains(out, "host_network: 1 (0.10/s)") {
			t.Errorf("%d: %v\n%s", width, err, out)
		}
		for line := range strings.Lines(out) {
			if n := len([]rune(strings.TrimSuffix(line, "\n"))); width > 0 && n > width {
				t.Errorf("%d characters, at most %d: %s", n, width, line)
			}
		}
	}
	out, err := execute(t, strings.NewReader(text), 60, "-f", "-", "-o", "wide")
	if err != nil || !strings.Contains(out, "KUBELETS") || strings.Count(out, "without probelet") != 2 {
		t.Errorf("%v\n%s", err, out)
	}
}
