package differential

import (
	"bytes"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/component-base/version"
	kubeprobe "k8s.io/kubernetes/pkg/probe"
	httpprobe "k8s.io/kubernetes/pkg/probe/http"
	"pgregory.net/rapid"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// TestSameBytesAreOneEndpoint makes the kubelet's prober send the requests of two specs. They are one endpoint if it
// sends the same bytes for both, and two otherwise; and what it sends is recognised as that endpoint's request only.
func TestSameBytesAreOneEndpoint(t *testing.T) {
	loopbackUp(t)
	must(t, flag.Set("rapid.checks", "2000"))
	r := newRecorder(t)
	kinds := map[string]int{}
	rapid.Check(t, func(rt *rapid.T) {
		a := r.spec(probe.Liveness, paths.Draw(rt, "path"), rapid.SliceOfN(r.header(), 0, 3).Draw(rt, "headers"))
		b := r.variant(rt, a)
		sent := [][]byte{r.send(t, a), r.send(t, b)}
		specs, err := probe.Endpoints(probe.Pod{IPs: []netip.Addr{r.at.Addr()}, Probes: []probe.Spec{a, b}}, probe.NewDefaults().Settings(nil),
			probe.Limits{Request: 1024, Records: 64})
		if err != nil {
			rt.Fatal(err)
		}
		for i, p := range []probe.Spec{a, b} {
			r.check(rt, specs, p, sent[i])
		}
		if sent[0] == nil || sent[1] == nil {
			kinds["not sent"]++
			return
		}
		same := bytes.Equal(told(sent[0]), told(sent[1]))
		if (len(specs) == 1) != same {
			rt.Fatalf("%d endpoints:\n%q\n%q", len(specs), sent[0], sent[1])
		}
		kinds[fmt.Sprintf("the same: %v, with the same headers: %v", same, slices.Equal(a.Headers, b.Headers))]++
	})
	t.Logf("%v", kinds)
	if len(kinds) < 5 {
		t.Errorf("too few kinds of pairs were drawn: %v", kinds)
	}
}

var paths = rapid.SampledFrom([]string{"/x", "/x?a", "/y"})

// recorder records the requests that it receives, and responds.
type recorder struct {
	at       netip.AddrPort
	requests chan []byte
}

func newRecorder(t *testing.T) *recorder {
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { _ = listener.Close() })
	r := &recorder{listener.Addr().(*net.TCPAddr).AddrPort(), make(chan []byte, 1)}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			r.serve(conn)
		}
	}()
	return r
}

func (r *recorder) serve(conn net.Conn) {
	defer conn.Close() //nolint:errcheck // nothing is lost
	var text []byte
	for buffer := make([]byte, 4096); !bytes.HasSuffix(text, []byte("\r\n\r\n")); {
		n, err := conn.Read(buffer)
		if err != nil {
			return
		}
		text = append(text, buffer[:n]...)
	}
	r.requests <- text
	_, _ = conn.Write([]byte("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"))
}

func (r *recorder) spec(probeType probe.Type, path string, headers []probe.Header) probe.Spec {
	return probe.Spec{
		Container: "c", Type: probeType, Kind: probe.HTTP, Port: r.at.Port(), Path: path, Headers: headers,
		Period: time.Second, Timeout: time.Second,
	}
}

// header draws a header that net/http or the prober treat specially, or any other.
func (r *recorder) header() *rapid.Generator[probe.Header] {
	names := rapid.SampledFrom([]string{
		"Accept", "accept", "User-Agent", "user-agent", "Host", "host", "Connection", "Upgrade", "Content-Length", "Transfer-Encoding", "Trailer",
		"Accept-Encoding", "X-A", "x-a", "X-B",
	})
	values := rapid.SampledFrom([]string{
		"*/*", "", " ", "1", " 1 ", "2", "close", "Close", "close, x", "keep-alive", "upgrade", "chunked", "me", "kube-probe", "kube-probe/1.2",
		agent(), r.at.String(), r.at.Addr().String(), "h.example", "1\n2",
	})
	return rapid.Custom(func(rt *rapid.T) probe.Header {
		return probe.Header{Name: names.Draw(rt, "name"), Value: values.Draw(rt, "value")}
	})
}

// agent returns the kubelet's own User-Agent.
func agent() string {
	v := version.Get()
	return fmt.Sprintf("kube-probe/%s.%s", v.Major, v.Minor)
}

// variant draws a probe that may ask the same.
func (r *recorder) variant(rt *rapid.T, p probe.Spec) probe.Spec {
	headers := slices.Clone(p.Headers)
	anyway := []probe.Header{
		{Name: "Accept", Value: "*/*"}, {Name: "Host", Value: r.at.String()}, {Name: "Connection", Value: "close"}, {Name: "User-Agent", Value: agent()},
	}
	switch rapid.IntRange(0, 4).Draw(rt, "variant") {
	case 0:
		headers = append(headers, rapid.SampledFrom(anyway).Draw(rt, "sent anyway"))
	case 1:
		slices.Reverse(headers)
	case 2:
		headers = append(headers, r.header().Draw(rt, "one more"))
	case 3:
		headers = rapid.SliceOfN(r.header(), 0, 3).Draw(rt, "other headers")
	default:
		return r.spec(probe.Readiness, paths.Draw(rt, "other path"), headers)
	}
	return r.spec(probe.Readiness, p.Path, headers)
}

// send makes the prober ask as the kubelet does. It returns nil if the prober refuses.
func (r *recorder) send(t *testing.T, p probe.Spec) []byte {
	action := &v1.HTTPGetAction{Path: p.Path, Port: intstr.FromInt32(int32(p.Port))}
	for _, h := range p.Headers {
		action.HTTPHeaders = append(action.HTTPHeaders, v1.HTTPHeader{Name: h.Name, Value: h.Value})
	}
	request, err := httpprobe.NewRequestForHTTPGetAction(action, nil, r.at.Addr().String(), "probe")
	must(t, err)
	if result, _, err := httpprobe.New(false).Probe(request, 10*time.Second); err != nil || result != kubeprobe.Success {
		return nil
	}
	return <-r.requests
}

// check compares the endpoints of a probe with what the prober sent for it.
func (r *recorder) check(rt *rapid.T, specs []probe.EndpointSpec, p probe.Spec, sent []byte) {
	request, err := probe.ParseRequest(sent)
	if err != nil && sent != nil {
		rt.Fatal(err)
	}
	for _, s := range specs {
		asks := slices.Contains(s.Askers, p.Asker())
		if sent == nil && asks && (s.Observed || !strings.Contains(s.Reason.Text, "cannot be sent")) {
			rt.Fatalf("%v is not sent, %s: %q", p.Headers, s.Endpoint, s.Reason.Text)
		}
		if sent != nil && s.Asks(request) != asks {
			rt.Fatalf("%s, asked by %v, is asked by %q: %v", s.Endpoint, s.Askers, sent, !asks)
		}
	}
}

// told returns what the daemon can tell requests apart by: not the kubelet's version, which it does not know, nor
// "Connection: close", which all requests have, nor the order of headers of different names.
func told(request []byte) []byte {
	lines := strings.Split(strings.TrimSuffix(string(request), "\r\n\r\n"), "\r\n")
	headers := slices.DeleteFunc(lines[1:], func(line string) bool { return line == "Connection: close" })
	for i, line := range headers {
		if strings.HasPrefix(line, "User-Agent: kube-probe/") {
			headers[i] = "User-Agent: kube-probe/"
		}
	}
	name := func(line string) string { return strings.SplitN(line, ":", 2)[0] }
	slices.SortStableFunc(headers, func(a, b string) int { return strings.Compare(name(a), name(b)) })
	return []byte(lines[0] + "\n" + strings.Join(headers, "\n"))
}
