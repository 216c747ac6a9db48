package source

import (
	"cmp"
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/util/cert"

	"github.com/probelet/probelet/daemon/internal/kubelet"
	"github.com/probelet/probelet/daemon/internal/logtest"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/internal/polltest"
)

// webPod returns a running pod with a readiness probe on port 80.
func webPod(name, ip string) corev1.Pod {
	get := &corev1.HTTPGetAction{Path: "/ready", Port: intstr.FromInt32(80)}
	return corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{
			Name:           "web",
			ReadinessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: get}},
		}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip},
	}
}

func podList(t *testing.T, pods ...corev1.Pod) string {
	t.Helper()
	text, err := json.Marshal(corev1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}, Items: pods})
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// fakeKubelet answers as instructed.
type fakeKubelet struct {
	*httptest.Server
	handle   atomic.Pointer[http.HandlerFunc]
	requests atomic.Int32
}

func newFakeKubelet(t *testing.T, start func(*httptest.Server)) *fakeKubelet {
	t.Helper()
	f := &fakeKubelet{}
	f.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.requests.Add(1)
		(*f.handle.Load())(w, r)
	}))
	f.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	f.says("{}")
	start(f.Server)
	t.Cleanup(f.Close)
	return f
}

func (f *fakeKubelet) does(h http.HandlerFunc) { f.handle.Store(&h) }

func (f *fakeKubelet) says(text string) {
	f.does(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, text) })
}

// running runs a source, and returns its snapshots.
func running(t *testing.T, s Source) <-chan []probe.Pod {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	snapshots := make(chan []probe.Pod)
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, snapshots) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("ended with %v", err)
		}
	})
	return snapshots
}

func names(t *testing.T, snapshots <-chan []probe.Pod) []string {
	t.Helper()
	select {
	case pods := <-snapshots:
		all := []string{}
		for _, pod := range pods {
			all = append(all, fmt.Sprint(pod.Name, pod.IPs))
		}
		return all
	case <-time.After(20 * time.Second):
		t.Fatal("no snapshot")
		return nil
	}
}

func wantNext(t *testing.T, snapshots <-chan []probe.Pod, want ...string) {
	t.Helper()
	if got := names(t, snapshots); strings.Join(got, " ") != strings.Join(want, " ") {
		t.Fatalf("snapshot of %v, want %v", got, want)
	}
}

func at(url string) KubeletConfig { return KubeletConfig{Config: kubelet.Config{URL: url + "/pods"}} }

func openKubelet(t *testing.T, c KubeletConfig, log *slog.Logger) *Kubelet {
	t.Helper()
	if c.Poll == 0 {
		c.Poll = 20 * time.Millisecond
	}
	k, err := NewKubelet(c, log)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestKubelet(t *testing.T) {
	f := newFakeKubelet(t, (*httptest.Server).Start)
	hostNetwork := webPod("node-agent", "192.0.2.1")
	hostNetwork.Spec.HostNetwork = true
	b, a := webPod("b", "10.0.0.8"), webPod("a", "10.0.0.7")
	f.says(podList(t, b, hostNetwork, a, webPod("starting", "")))
	snapshots := running(t, openKubelet(t, at(f.URL), slog.New(slog.DiscardHandler)))
	wantNext(t, snapshots, "a[10.0.0.7]", "b[10.0.0.8]")

	f.says(podList(t, a, hostNetwork, b)) // the kubelet lists pods in no particular order
	before := f.requests.Load()
	polltest.Eventually(t, "asked again", func() bool { return f.requests.Load() > before+2 })
	f.says(podList(t, webPod("c", "10.0.0.9"), a))
	wantNext(t, snapshots, "a[10.0.0.7]", "c[10.0.0.9]")
	f.says(podList(t))
	wantNext(t, snapshots)
	f.says(podList(t, a))
	wantNext(t, snapshots, "a[10.0.0.7]")
	f.says(`{"kind":"PodList","apiVersion":"v1","metadata":{"later":[{}]},"items":null}`)
	wantNext(t, snapshots)
}

// A new pod is learned before the poll interval is over, and its address once the kubelet knows it: the list is polled at
// once, and then less and less often.
func TestKubeletRefresh(t *testing.T) {
	f := newFakeKubelet(t, (*httptest.Server).Start)
	f.says(podList(t))
	k := openKubelet(t, KubeletConfig{Config: at(f.URL).Config, Poll: time.Hour}, slog.New(slog.DiscardHandler))
	k.shortest = 5 * time.Millisecond
	wantNext(t, running(t, k))
	rare := func() {
		t.Helper()
		polltest.Eventually(t, "polls are rare", func() bool {
			before := f.requests.Load()
			time.Sleep(64 * k.shortest)
			return f.requests.Load() == before
		})
	}
	rare()
	for range 3 {
		before := f.requests.Load()
		k.Refresh()
		rare()
		if asked := f.requests.Load() - before; asked < 3 {
			t.Errorf("asked %d times", asked)
		}
	}
}

// However many pods are announced, the kubelet spends no more than a tenth of its time on listing them.
func TestKubeletIsAskedRarely(t *testing.T) {
	const took = 50 * time.Millisecond
	f := newFakeKubelet(t, (*httptest.Server).Start)
	good := podList(t)
	f.does(func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(took)
		_, _ = io.WriteString(w, good)
	})
	k := openKubelet(t, at(f.URL), slog.New(slog.DiscardHandler))
	k.shortest = time.Millisecond
	start := time.Now()
	wantNext(t, running(t, k))
	polltest.Eventually(t, "four requests", func() bool {
		k.Refresh()
		return f.requests.Load() >= 4
	})
	if asked, most := f.requests.Load(), 1+int32(time.Since(start)/(10*took)); asked > most {
		t.Errorf("asked %d times, want at most %d in that time", asked, most)
	}
}

// Each failure is logged once, and the last snapshot stays in force.
func TestKubeletFailures(t *testing.T) {
	good := podList(t, webPod("a", "10.0.0.7"))
	for name, test := range map[string]struct {
		handle http.HandlerFunc
		want   string
	}{
		"unauthorized": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) }, "401 Unauthorized"},
		"forbidden":    {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(403) }, "403 Forbidden"},
		"redirect": {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", http.StatusFound) },
			"302 Found"},
		"no content": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) }, "204"},
		"reset":      {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "is unreachable"},
		"hangs":      {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "is unreachable"},
		"hangs within": {func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, good[:len(good)/2])
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}, "no complete answer within"},
		"empty":            {says(""), "unexpected EOF"},
		"not JSON":         {says("<html>"), "invalid character"},
		"half":             {says(good[:len(good)/2]), "unexpected EOF"},
		"two":              {says(good + good), "more than one"},
		"trailing garbage": {says(good + "}"), "more than one"},
		"a list":           {says("[]"), "expected {"},
		"another kind":     {says(`{"kind":"Status","code":500}`), `kind: \"Status\"`},
		"no kind":          {says(`{"items":[]}`), "must be PodList"},
		"items an object":  {says(`{"kind":"PodList","items":{}}`), "items"},
		"a nameless pod":   {says(`{"kind":"PodList","items":[{}]}`), "items: [0]: a pod without name"},
		"type of a field":  {says(strings.Replace(good, `"port":80`, `"port":[]`, 1)), "items: [0]"},
		"case of a field":  {says(strings.Replace(good, `"name":"a"`, `"Name":"a"`, 1)), "without name"},
		"null for the pod": {says(`{"kind":"PodList","items":[null]}`), "without name"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFakeKubelet(t, (*httptest.Server).Start)
			f.says(good)
			var log logtest.Log
			k := openKubelet(t, at(f.URL), log.Logger())
			if strings.HasPrefix(name, "hangs") {
				k.timeout = 300 * time.Millisecond
			}
			snapshots := running(t, k)
			wantNext(t, snapshots, "a[10.0.0.7]")
			f.does(test.handle)
			before := f.requests.Load()
			polltest.Eventually(t, "asked again", func() bool { return f.requests.Load() > before+3 })
			f.says(podList(t, webPod("b", "10.0.0.8")))
			wantNext(t, snapshots, "b[10.0.0.8]") // the first snapshot since
			if log.Count("level=ERROR") != 1 || log.Count(test.want) == 0 || log.Count("source of specs recovered") != 1 {
				t.Errorf("want one error that says %s, one recovery; logged:\n%s", test.want, log.String())
			}
		})
	}
}

func says(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, text) }
}

func TestKubeletNotThere(t *testing.T) {
	f := newFakeKubelet(t, (*httptest.Server).Start)
	f.Close()
	var log logtest.Log
	running(t, openKubelet(t, KubeletConfig{Config: at(f.URL).Config, Poll: time.Millisecond}, log.Logger()))
	polltest.Eventually(t, "the refusal is logged", func() bool { return log.Count("refused") > 0 })
	time.Sleep(50 * time.Millisecond)
	if log.Count("level=ERROR") != 1 {
		t.Errorf("logged:\n%s", log.String())
	}
}

// The authenticated port: a token that is renewed, and a certificate authority.
func TestKubeletTLS(t *testing.T) {
	f := newFakeKubelet(t, (*httptest.Server).StartTLS)
	good := podList(t, webPod("a", "10.0.0.7"))
	f.does(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer second" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_, _ = io.WriteString(w, good)
	})
	dir := t.TempDir()
	c := at(f.URL)
	c.TokenFile, c.CAFile = filepath.Join(dir, "token"), filepath.Join(dir, "ca.crt")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.Certificate().Raw}))
	var log logtest.Log
	says := func(part string) {
		t.Helper()
		polltest.Eventually(t, part, func() bool { return log.Count(part) > 0 })
	}
	snapshots := running(t, openKubelet(t, c, log.Logger()))
	says("ca.crt")
	write(c.CAFile, "nonsense")
	write(c.TokenFile, "first\n")
	time.Sleep(100 * time.Millisecond)
	write(c.CAFile, ca)
	says("401 Unauthorized")
	write(c.TokenFile, "second\n")
	wantNext(t, snapshots, "a[10.0.0.7]")
}

func TestKubeletCertificate(t *testing.T) {
	f := newFakeKubelet(t, (*httptest.Server).StartTLS)
	f.says(podList(t))
	ca := filepath.Join(t.TempDir(), "ca.crt")
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.Certificate().Raw})
	if err := os.WriteFile(ca, text, 0o600); err != nil {
		t.Fatal(err)
	}
	own := func(text []byte, err error) func() ([]byte, error) {
		return func() ([]byte, error) { return text, err }
	}
	another, _, err := cert.GenerateSelfSignedCertKey("node", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		config kubelet.Config
		want   string // error; empty if none
	}{
		"unknown authority": {kubelet.Config{}, "unknown authority"},
		"another name":      {kubelet.Config{CAFile: ca, ServerName: "node.example.org"}, "node.example.org"},
		"its name":          {kubelet.Config{CAFile: ca, ServerName: "example.com"}, ""},
		"its address":       {kubelet.Config{CAFile: ca}, ""},
		"another host":      {kubelet.Config{CAFile: ca, URL: strings.Replace(f.URL, "127.0.0.1", "localhost", 1)}, "localhost"},
		"another address":   {kubelet.Config{CAFile: ca, ServerName: "127.0.0.2"}, "127.0.0.2"},
		"self-signed":       {kubelet.Config{SelfSigned: own(text, nil), ServerName: "node"}, ""},
		"another's":         {kubelet.Config{SelfSigned: own(another, nil)}, "not the certificate that the kubelet generated"},
		"none of its own":   {kubelet.Config{SelfSigned: own(nil, os.ErrNotExist)}, "not exist"},
	} {
		t.Run(name, func(t *testing.T) {
			test.config.URL = cmp.Or(test.config.URL, f.URL) + "/pods"
			_, err := openKubelet(t, KubeletConfig{Config: test.config}, slog.New(slog.DiscardHandler)).fetch(t.Context())
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
}

// No token is sent over an unencrypted connection.
func TestKubeletPlainHasNoToken(t *testing.T) {
	f := newFakeKubelet(t, (*httptest.Server).Start)
	good := podList(t)
	var authorized atomic.Bool
	f.does(func(w http.ResponseWriter, r *http.Request) {
		authorized.Store(r.Header.Get("Authorization") != "")
		_, _ = io.WriteString(w, good)
	})
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	k := openKubelet(t, KubeletConfig{Config: kubelet.Config{URL: f.URL, TokenFile: token, CAFile: "/nowhere"}}, slog.New(slog.DiscardHandler))
	if _, err := k.fetch(t.Context()); err != nil || authorized.Load() {
		t.Errorf("error %v, token sent: %v", err, authorized.Load())
	}
}

func TestKubeletConfigErrors(t *testing.T) {
	for url, poll := range map[string]time.Duration{
		"10.0.0.7:10250": 1, "unix:///run/x": 1, "https://": 1, "http://[::1/pods": 1, "http://localhost/pods": 0,
	} {
		if _, err := NewKubelet(KubeletConfig{Config: kubelet.Config{URL: url}, Poll: poll}, slog.New(slog.DiscardHandler)); err == nil {
			t.Errorf("%s, every %s: accepted", url, poll)
		}
	}
}

// A huge answer takes time but no memory, and is given up in the end.
func TestKubeletHugeAnswer(t *testing.T) {
	item := strings.TrimSuffix(strings.SplitN(podList(t, webPod("a", "10.0.0.7")), `"items":[`, 2)[1], "]}") + ","
	answer := strings.NewReader(`{"kind":"PodList","items":[` + strings.Repeat(item, 9<<20/len(item)))
	n := 0
	err := readPodList(kubelet.Limit(answer, 8<<20), func(*corev1.Pod) { n++ })
	if err == nil || !strings.Contains(err.Error(), "more than 8 MiB") || n < 1000 {
		t.Errorf("error %v after %d pods", err, n)
	}
}

func TestKubeletManyPodsAndLongAnnotations(t *testing.T) {
	pods := make([]corev1.Pod, 10_000)
	for i := range pods {
		pods[i] = webPod(fmt.Sprintf("p%05d", i), fmt.Sprintf("10.1.%d.%d", i/250, i%250))
	}
	for i := range 20 {
		pods[i].Annotations = map[string]string{"long": strings.Repeat(`"\ `, 350_000)}
	}
	text := podList(t, pods...)
	f := newFakeKubelet(t, (*httptest.Server).Start)
	f.says(text)
	k := openKubelet(t, at(f.URL), slog.New(slog.DiscardHandler))
	start := time.Now()
	got, err := k.fetch(t.Context())
	if err != nil || len(got) != len(pods) {
		t.Fatalf("%d pods, %v", len(got), err)
	}
	t.Logf("%d MiB in %s", len(text)>>20, time.Since(start))
}
