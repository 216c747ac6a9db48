package probe

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// sentBy returns what a client sends for a request through its own transport.
func sentBy(t *testing.T, transport *http.Transport, request *http.Request) Request {
	t.Helper()
	client, server := net.Pipe()
	transport.DialContext = func(context.Context, string, string) (net.Conn, error) { return client, nil }
	go func() {
		_, _ = (&http.Client{Transport: transport}).Do(request) // gets no response
	}()
	_ = server.SetReadDeadline(time.Now().Add(10 * time.Second))
	var text []byte
	for !strings.HasSuffix(string(text), "\r\n\r\n") {
		buffer := make([]byte, 4096)
		n, err := server.Read(buffer)
		if err != nil {
			t.Fatalf("after %q: %v", text, err)
		}
		text = append(text, buffer[:n]...)
	}
	_ = server.Close()
	asked, err := ParseRequest(text)
	if err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	return asked
}

// kubelet describes a request of the kubelet's, for a probe or a lifecycle hook (pkg/probe/http of Kubernetes).
type kubelet struct {
	host, path, agent string
	headers           []Header
	hook              bool
}

func (k kubelet) asks(t *testing.T) Request {
	t.Helper()
	request, err := http.NewRequest(http.MethodGet, "http://"+k.host+k.path, nil)
	if err != nil {
		t.Fatal(err)
	}
	header := http.Header{}
	for _, h := range k.headers {
		header.Add(h.Name, h.Value)
	}
	if _, ok := header["User-Agent"]; !ok {
		header.Set("User-Agent", k.agent)
	}
	if _, ok := header["Accept"]; !ok {
		header.Set("Accept", "*/*")
	} else if header.Get("Accept") == "" {
		header.Del("Accept")
	}
	request.Header, request.Host = header, header.Get("Host")
	transport := &http.Transport{DisableKeepAlives: true, DisableCompression: true}
	if k.hook {
		transport = &http.Transport{}
	}
	return sentBy(t, transport, request)
}

func TestAsks(t *testing.T) {
	const own = "10.0.0.7:80"
	// With these a probe and a hook ask the same, except for Connection, unless the hook sets that.
	encoded := []Header{{"User-Agent", "me"}, {"Accept-Encoding", "identity"}}
	a, b, host := Header{"X-Auth", "a"}, Header{"x-auth", "b"}, Header{"host", "h.example"}
	for name, test := range map[string]struct {
		headers []Header // of the probe
		sent    kubelet
		asks    bool
	}{
		"the probe":                         {nil, kubelet{host: own}, true},
		"of another version":                {nil, kubelet{host: own, agent: "kube-probe/1.99+"}, true},
		"of another path":                   {nil, kubelet{host: own, path: "/x?b"}, false},
		"at another address":                {nil, kubelet{host: "[fd00::7]:80"}, false},
		"at a name":                         {nil, kubelet{host: "h.example:80"}, false},
		"with one header more":              {nil, kubelet{host: own, headers: []Header{a}}, false},
		"with one header less":              {[]Header{a}, kubelet{host: own}, false},
		"with headers":                      {[]Header{a, b}, kubelet{host: own, headers: []Header{a, b}}, true},
		"with other values":                 {[]Header{a}, kubelet{host: own, headers: []Header{b}}, false},
		"with values in another order":      {[]Header{a, b}, kubelet{host: own, headers: []Header{b, a}}, false},
		"with Host":                         {[]Header{host}, kubelet{host: own, headers: []Header{host}}, true},
		"with Host, set by another only":    {nil, kubelet{host: own, headers: []Header{host}}, false},
		"with Connection":                   {[]Header{{"Connection", "x"}}, kubelet{host: own, headers: []Header{{"Connection", "x"}}}, true},
		"with Pragma":                       {[]Header{{"Pragma", "no-cache"}}, kubelet{host: own, headers: []Header{{"Pragma", "no-cache"}}}, true},
		"with no Accept":                    {[]Header{{"Accept", ""}}, kubelet{host: own, headers: []Header{{"Accept", ""}}}, true},
		"with Accept, where there is none":  {[]Header{{"Accept", ""}}, kubelet{host: own}, false},
		"with spaces":                       {[]Header{{"A", " x "}}, kubelet{host: own, headers: []Header{{"A", "x"}}}, true},
		"its own User-Agent":                {[]Header{{"User-Agent", "me"}}, kubelet{host: own, headers: []Header{{"User-Agent", "me"}}}, true},
		"another User-Agent":                {[]Header{{"User-Agent", "me"}}, kubelet{host: own}, false},
		"a User-Agent, where there is none": {nil, kubelet{host: own, headers: []Header{{"User-Agent", "me"}}}, false},
		"of another client":                 {nil, kubelet{host: own, agent: "curl/8"}, false},
		"a hook":                            {nil, kubelet{host: own, agent: "kube-lifecycle/1.37", hook: true}, false},
		"a hook of its User-Agent":          {[]Header{{"User-Agent", "me"}}, kubelet{host: own, headers: []Header{{"User-Agent", "me"}}, hook: true}, false},
		"a hook that is the same":           {encoded, kubelet{host: own, headers: append(encoded, Header{"Connection", "close"}), hook: true}, true},
		"a hook like it":                    {nil, kubelet{host: own, headers: []Header{{"Connection", "close"}}, hook: true}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if test.sent.path == "" {
				test.sent.path = "/x?a"
			}
			if test.sent.agent == "" {
				test.sent.agent = "kube-probe/1.37"
			}
			probe := with(httpProbe(Readiness, "/x?a"), func(s *Spec) { s.Headers = test.headers })
			sent := test.sent.asks(t)
			if got := endpoints(t, probe)[0].Asks(sent); got != test.asks {
				t.Errorf("%+v: %v, want %v", sent, got, test.asks)
			}
		})
	}
}

func TestAsksWithoutAddress(t *testing.T) {
	specs, err := Endpoints(Pod{Probes: []Spec{httpProbe(Readiness, "/x")}}, NewDefaults().Settings(nil), limits)
	if err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]bool{"10.0.0.7:80": true, "[fd00::7]:80": true, "10.0.0.7:81": false, "h.example:80": false} {
		request := asked("/x")
		request.Host = host
		if got := specs[0].Asks(request); got != want {
			t.Errorf("%s: %v, want %v", host, got, want)
		}
	}
	if specs[0].Reason.Text != "" || !specs[0].Observed {
		t.Errorf("not an ordinary endpoint: %+v", specs[0])
	}
}

// Another pod's probe may ask the same of the pod's second address, unless the request says which address it is for.
// Without any known address, that is unknown.
func TestHostHeader(t *testing.T) {
	own, other := netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("fd00::7")
	set := with(httpProbe(Readiness, "/x"), func(s *Spec) { s.Headers = []Header{{"host", "x"}} })
	for name, test := range map[string]struct {
		probe    Spec
		ips      []netip.Addr
		answered bool
	}{
		"one address":                    {set, []netip.Addr{own}, true},
		"two":                            {set, []netip.Addr{own, other}, false},
		"none known":                     {set, nil, false},
		"two, but the header is not set": {httpProbe(Readiness, "/x"), []netip.Addr{own, other}, true},
		"two, and the header tells": {
			with(httpProbe(Readiness, "/x"), func(s *Spec) { s.Headers = []Header{{"Host", "10.0.0.7:80"}} }), []netip.Addr{own, other}, true,
		},
	} {
		specs, err := Endpoints(Pod{IPs: test.ips, Probes: []Spec{test.probe}}, NewDefaults().Settings(nil), limits)
		if err != nil || (specs[0].Reason.Text == "") != test.answered || !specs[0].Observed {
			t.Errorf("%s: %+v, %v", name, specs, err)
		}
	}
	likeOwn := with(httpProbe(Liveness, "/x"), func(s *Spec) { s.Host, s.Headers = "fd00::7", []Header{{"Host", "10.0.0.7:80"}} })
	for _, s := range endpoints(t, httpProbe(Readiness, "/x"), likeOwn) {
		if s.Host == "" && s.Reason.Text == "" {
			t.Errorf("answered, which would also answer %s", likeOwn.Asker())
		}
	}
}

// Probes with the same request are one endpoint, whatever their specs say; others are two. TestSameBytesAreOneEndpoint in
// daemon/differential checks the rest of what net/http does to headers, against the kubelet's own code.
func TestOneEndpointForOneRequest(t *testing.T) {
	h := func(namesAndValues ...string) (all []Header) {
		for i := 0; i < len(namesAndValues); i += 2 {
			all = append(all, Header{namesAndValues[i], namesAndValues[i+1]})
		}
		return all
	}
	own := []netip.Addr{netip.MustParseAddr("10.0.0.7")}
	for name, test := range map[string]struct {
		ips  []netip.Addr
		a, b []Header
		same bool
	}{
		"Accept as it is anyway":           {own, nil, h("Accept", "*/*"), true},
		"Accept as it is anyway, beside":   {own, h("A", "1"), h("A", "1", "accept", "*/*"), true},
		"another Accept":                   {own, nil, h("Accept", "text/html"), false},
		"no Accept":                        {own, nil, h("Accept", ""), false},
		"an Accept of blanks":              {own, h("Accept", " "), h("Accept", ""), false},
		"the kubelet's own agent":          {own, nil, h("User-Agent", "kube-probe/1.37"), true},
		"perhaps the kubelet's own agent":  {own, nil, h("User-Agent", "kube-probe/1.30"), true},
		"another agent":                    {own, nil, h("User-Agent", "kube-probe"), false},
		"no agent":                         {own, nil, h("User-Agent", ""), false},
		"no agent, no Accept":              {own, h("Accept", ""), h("User-Agent", ""), false},
		"the connection closes":            {own, nil, h("Connection", "close"), true},
		"the connection is kept":           {own, nil, h("Connection", "keep-alive"), false},
		"headers that are not sent":        {own, nil, h("Content-Length", "7", "Trailer", "x", "Transfer-Encoding", "chunked"), true},
		"Host as it is anyway":             {own, nil, h("Host", "10.0.0.7:80"), true},
		"Host, empty":                      {own, nil, h("Host", ""), true},
		"another Host":                     {own, nil, h("Host", "10.0.0.7"), false},
		"only one Host counts":             {own, h("Host", "x", "Host", "y"), h("Host", "x"), true},
		"perhaps Host as it is anyway":     {nil, nil, h("Host", "10.0.0.7:80"), true},
		"Host of another port":             {nil, nil, h("Host", "10.0.0.7:81"), false},
		"Host is a name, no address known": {nil, nil, h("Host", "pod:80"), false},
		"order and case of names":          {own, h("a", "1", "B", "2"), h("b", "2", "A", "1"), true},
		"blanks around values":             {own, h("A", "1"), h("A", " 1 "), true},
		"another value":                    {own, h("A", "1"), h("A", "2"), false},
		"another name":                     {own, h("A", "1"), h("B", "1"), false},
		"one more":                         {own, h("A", "1"), h("A", "1", "A", "1"), false},
		"order of values":                  {own, h("A", "1", "A", "2"), h("A", "2", "A", "1"), false},
	} {
		probes := []Spec{httpProbe(Liveness, "/x"), httpProbe(Readiness, "/x")}
		probes[0].Headers, probes[1].Headers = test.a, test.b
		specs, err := Endpoints(Pod{IPs: test.ips, Probes: probes}, NewDefaults().Settings(nil), limits)
		if err != nil || (len(specs) == 1) != test.same {
			t.Errorf("%s: %d endpoints, %v: %+v", name, len(specs), err, specs)
			continue
		}
		for i, s := range specs {
			if !s.Observed || len(s.Askers)*len(specs) != 2 || (s.Headers == "") != (test.a == nil && s.Askers[0] == probes[0].Asker()) {
				t.Errorf("%s: %+v", name, s)
			}
			for j, other := range specs {
				if s.Asks(other.question.Request) != (i == j) {
					t.Errorf("%s: %s and %s are not distinguished", name, s.Endpoint, other.Endpoint)
				}
			}
		}
	}
}

// If it is unknown which of two probes sent a request, enough successes are needed to be sure for both.
func TestTwinsCountTogether(t *testing.T) {
	for name, header := range map[string]Header{
		"Accept": {"Accept", "*/*"}, "Host": {"Host", "10.0.0.7:80"}, "User-Agent": {"User-Agent", "kube-probe/1.37"},
	} {
		tracker := track(t, httpProbe(Liveness, "/x"), with(httpProbe(Readiness, "/x"), func(s *Spec) {
			s.SuccessThreshold, s.Headers = 3, []Header{header}
		}))
		for i := uint64(1); i <= 3; i++ {
			o := after(i, x, Answered, 200)
			concerned := 0
			for range tracker.Verdicts(o) {
				concerned++
			}
			if tracker.Observe(o); concerned != 1 {
				t.Errorf("%s: one probe counts for %d endpoints", name, concerned)
			}
		}
		for e, known := range tracker.Evidence() {
			if known.FreshUntil != 0 {
				t.Errorf("%s: %s is armed by three successes of either", name, e)
			}
		}
	}
}

// A request that net/http refuses to send is never seen.
func TestNotSent(t *testing.T) {
	for name, header := range map[string]Header{
		"line": {"A", "1\n2"}, "control character": {"A", "\x01"},
	} {
		s := endpoints(t, with(httpProbe(Liveness, "/x"), func(s *Spec) { s.Headers = []Header{header} }))[0]
		if s.Observed || !strings.Contains(s.Reason.Text, "cannot be sent") {
			t.Errorf("%s: %q", name, s.Reason.Text)
		}
	}
}
